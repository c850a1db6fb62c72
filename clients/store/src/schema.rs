//! Installing the schema, and the SQL that is made from it.

use std::collections::HashMap;
use std::sync::Arc;

use millstream_client_core::trigger::{self, Kind, quote};
use millstream_schemas::{ColumnSchema, Schema, TableSchema, Value};

use crate::error::{During, encode};
use crate::{Store, StoreError};

/// A synced table with its statements.
pub(crate) struct TableSql {
    pub table: TableSchema,
    pub kinds: Vec<Kind>,
    /// Names of the key columns, quoted.
    key: Vec<String>,
    /// Whole rows: insert or replace.
    pub upsert: String,
    /// As `upsert`, but rows that are equal already are left alone.
    pub upsert_changed: String,
    /// By key.
    pub delete: String,
    /// The row as a JSON object, by key.
    pub select_row: String,
    /// The key as JSON, from a row of the table.
    pub key_expr: String,
}

impl TableSql {
    pub fn new(table: TableSchema) -> Self {
        let kinds = table.columns.iter().map(|column| Kind::of(&column.r#type)).collect();
        let key: Vec<String> = table.key.iter().map(|&index| quote(&table.columns[index].name)).collect();
        let mut sql = TableSql {
            kinds,
            upsert: String::new(),
            upsert_changed: String::new(),
            delete: format!("DELETE FROM {} WHERE {}", quote(&table.name), by_key(&key, 1)),
            select_row: format!(
                "SELECT {} FROM {} WHERE {}",
                trigger::row_expr(&table, ""),
                quote(&table.name),
                by_key(&key, 1)
            ),
            key_expr: trigger::key_expr(&table, ""),
            key,
            table,
        };
        let all: Vec<usize> = (0..sql.table.columns.len()).collect();
        sql.upsert = sql.upsert_columns(&all);
        let name = quote(&sql.table.name);
        let changed: Vec<String> =
            sql.others(&all).map(|column| format!("{name}.{column} IS NOT excluded.{column}")).collect();
        sql.upsert_changed = if changed.is_empty() {
            sql.upsert.clone()
        } else {
            format!("{} WHERE {}", sql.upsert, trigger::joined(&changed, "OR"))
        };
        sql
    }

    pub fn name(&self) -> &str {
        &self.table.name
    }

    /// The columns among `columns` that are not part of the key, quoted.
    fn others<'a>(&'a self, columns: &'a [usize]) -> impl Iterator<Item = String> + 'a {
        columns
            .iter()
            .filter(|index| !self.table.key.contains(index))
            .map(|&index| quote(&self.table.columns[index].name))
    }

    /// SQL that inserts rows of these columns, or sets them where the key exists. Parameters in the order of `columns`.
    pub fn upsert_columns(&self, columns: &[usize]) -> String {
        let set: Vec<String> = self.others(columns).map(|column| format!("{column} = excluded.{column}")).collect();
        let action = if set.is_empty() { "NOTHING".to_owned() } else { format!("UPDATE SET {}", set.join(", ")) };
        format!("{} ON CONFLICT ({}) DO {action}", self.insert_columns(columns), self.key.join(", "))
    }

    /// SQL that inserts a row of these columns. Parameters in their order.
    pub fn insert_columns(&self, columns: &[usize]) -> String {
        let names: Vec<String> = columns.iter().map(|&index| quote(&self.table.columns[index].name)).collect();
        let places: Vec<String> = (1..=columns.len()).map(|place| format!("?{place}")).collect();
        format!("INSERT INTO {} ({}) VALUES ({})", quote(&self.table.name), names.join(", "), places.join(", "))
    }

    /// SQL that sets these columns of a row. Parameters in their order, then the key.
    pub fn set_columns(&self, columns: &[usize]) -> String {
        let set: Vec<String> = columns
            .iter()
            .enumerate()
            .map(|(place, &index)| format!("{} = ?{}", quote(&self.table.columns[index].name), place + 1))
            .collect();
        let by_key = by_key(&self.key, columns.len() + 1);
        format!("UPDATE {} SET {} WHERE {by_key}", quote(&self.table.name), set.join(", "))
    }

    /// SQL that sets these columns where the key exists; nothing to set gives none. Parameters in the order of `columns`.
    pub fn update_columns(&self, columns: &[usize]) -> Option<String> {
        let mut set = Vec::new();
        let mut by = Vec::new();
        for (place, &index) in columns.iter().enumerate() {
            let clause = format!("{} = ?{}", quote(&self.table.columns[index].name), place + 1);
            if self.table.key.contains(&index) { by.push(clause) } else { set.push(clause) }
        }
        (!set.is_empty())
            .then(|| format!("UPDATE {} SET {} WHERE {}", quote(&self.table.name), set.join(", "), by.join(" AND ")))
    }

    /// Indexes of the named columns; all of them when none are named.
    pub fn columns(&self, names: Option<&[String]>) -> Result<Vec<usize>, StoreError> {
        match names {
            None => Ok((0..self.table.columns.len()).collect()),
            Some(names) => names
                .iter()
                .map(|name| self.table.column(name).ok_or_else(|| self.shape("an unknown column")))
                .collect(),
        }
    }

    /// Places of the key's parts within rows of these columns.
    pub fn key_places(&self, columns: &[usize]) -> Result<Vec<usize>, StoreError> {
        let place = |part: &usize| columns.iter().position(|column| column == part);
        self.table.key.iter().map(|part| place(part).ok_or_else(|| self.shape("a key column is missing"))).collect()
    }

    /// The key as triggers write it.
    pub fn key_json(&self, row: &[Value], places: &[usize]) -> String {
        let key: Vec<&Value> = places.iter().map(|&place| &row[place]).collect();
        encode(&key)
    }

    pub fn shape(&self, what: &'static str) -> StoreError {
        StoreError::RowShape { table: self.table.name.clone(), what }
    }
}

fn by_key(key: &[String], first: usize) -> String {
    let parts: Vec<String> =
        key.iter().enumerate().map(|(place, name)| format!("{name} = ?{}", place + first)).collect();
    parts.join(" AND ")
}

impl Store {
    pub(crate) fn index_tables(&mut self) {
        self.session.set_synced(self.schema.iter().flat_map(|schema| &schema.tables).map(|table| table.name.as_str()));
        self.tables = match &self.schema {
            None => Default::default(),
            Some(schema) => {
                schema.tables.iter().map(|table| (table.name.clone(), Arc::new(TableSql::new(table.clone())))).collect()
            }
        };
    }

    pub(crate) fn table(&self, name: &str) -> Result<Arc<TableSql>, StoreError> {
        self.tables.get(name).cloned().ok_or_else(|| StoreError::UnknownTable(name.to_owned()))
    }

    /// Installs a schema: creates, extends and drops tables, and makes the triggers anew. The queue is kept.
    ///
    /// True: the rows on hand cannot be carried over (a key changed, or a column that is never null was added), and the
    /// position was given up, so that the next session brings a snapshot.
    pub fn install(&mut self, schema: &Schema) -> Result<bool, StoreError> {
        if self.schema.as_ref() == Some(schema) {
            return Ok(false);
        }
        if let Some(table) = schema.tables.iter().find(|table| trigger::is_reserved(&table.name)) {
            return Err(StoreError::ReservedTable(table.name.clone()));
        }
        let old = self.schema.clone();
        let old_tables = old.as_ref().map_or(&[][..], |schema| &schema.tables);
        let stale = self.transact(|store| {
            let mut stale = false;
            for table in old_tables {
                store.batch(&trigger::drop_triggers(&table.name))?;
                if schema.table(&table.name).is_none() {
                    store.drop_table(&table.name)?;
                }
            }
            for table in &schema.tables {
                let before = old_tables.iter().find(|before| before.name == table.name);
                stale |= store.install_table(before, table)?;
                // Rows that a newly synced table has long had come with no transaction.
                stale |= old.is_some() && before.is_none();
            }
            // They name each other's tables, with the columns of this schema.
            schema.tables.iter().try_for_each(|table| store.create_triggers(table, &schema.tables))?;
            store.set_meta_json("schema", schema)?;
            if stale {
                store.set_meta("resync", 1)?;
            }
            Ok(stale)
        })?;
        self.connection.flush_prepared_statement_cache();
        self.schema = Some(schema.clone());
        self.index_tables();
        Ok(stale)
    }

    /// Makes the triggers of the installed tables anew.
    pub(crate) fn make_triggers(&mut self) -> Result<(), StoreError> {
        let Some(schema) = self.schema.clone() else { return Ok(()) };
        self.transact(|store| {
            schema.tables.iter().try_for_each(|table| {
                store.batch(&trigger::drop_triggers(&table.name))?;
                store.create_triggers(table, &schema.tables)
            })
        })
    }

    /// By the defaults that the table has here: SQLite cannot change one.
    fn create_triggers(&self, table: &TableSchema, tables: &[TableSchema]) -> Result<(), StoreError> {
        let during = "reading the columns of a table";
        let mut columns =
            self.connection.prepare("SELECT name, dflt_value FROM pragma_table_info(?1)").during(during)?;
        let found =
            columns.query_map([&table.name], |row| Ok((row.get::<_, String>(0)?, row.get::<_, Option<String>>(1)?)));
        let found: HashMap<String, Option<String>> =
            found.during(during)?.collect::<rusqlite::Result<_>>().during(during)?;
        let default = |column: &ColumnSchema| found.get(&column.name).cloned().flatten();
        let defaults: Vec<Option<String>> = table.columns.iter().map(default).collect();
        self.batch(&trigger::create_triggers(table, tables, &defaults))
    }

    fn batch(&self, sql: &str) -> Result<(), StoreError> {
        self.connection.execute_batch(sql).during("changing a table")
    }

    fn drop_table(&self, name: &str) -> Result<(), StoreError> {
        self.batch(&format!("DROP TABLE IF EXISTS {}", quote(name)))?;
        self.connection.execute("DELETE FROM millstream_base WHERE tbl = ?1", [name]).during("changing a table")?;
        Ok(())
    }

    fn install_table(&self, before: Option<&TableSchema>, table: &TableSchema) -> Result<bool, StoreError> {
        let Some(before) = before else {
            // A table of that name that the app made itself is not ours to drop: then this fails and says so.
            self.batch(&trigger::create_table(table))?;
            return Ok(false);
        };
        let key = |table: &TableSchema| -> Vec<(String, Kind)> {
            table.key.iter().map(|&i| (table.columns[i].name.clone(), Kind::of(&table.columns[i].r#type))).collect()
        };
        if key(before) != key(table) {
            self.drop_table(&table.name)?;
            self.batch(&trigger::create_table(table))?;
            return Ok(true);
        }
        let mut stale = false;
        for column in &before.columns {
            let kept = table.column(&column.name).map(|index| &table.columns[index]);
            // Another representation: drop the column and add it again, empty.
            if kept.is_none_or(|kept| Kind::of(&kept.r#type) != Kind::of(&column.r#type)) {
                self.batch(&format!("ALTER TABLE {} DROP COLUMN {}", quote(&table.name), quote(&column.name)))?;
                stale |= kept.is_some();
                if let Some(index) = table.column(&column.name) {
                    self.batch(&trigger::add_column(table, index))?;
                }
            }
        }
        for (index, column) in table.columns.iter().enumerate() {
            if before.column(&column.name).is_none() {
                self.batch(&trigger::add_column(table, index))?;
                // Rows on hand have no value for it, and null cannot be the right one.
                stale |= !column.nullable;
            }
        }
        Ok(stale)
    }
}
