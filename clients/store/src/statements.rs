//! Synced tables, each with the statements that the store executes on it.

use std::collections::HashMap;
use std::sync::Arc;

use millstream_client_core::sql::{joined, quote};
use millstream_client_core::trigger;
use millstream_client_core::types::Kind;
use millstream_schemas::{Schema, TableSchema, Value};

use crate::error::{StoreError, encode};

/// Begins the store's statements, so that the app's own of the same words, which other rules hold for, are not found in their place
/// in the statement cache.
const OWN: &str = "/* store */";

/// The synced tables, by name.
pub(crate) type Tables = HashMap<String, Arc<TableSql>>;

/// A synced table with its statements.
pub(crate) struct TableSql {
    pub table: TableSchema,
    pub kinds: Vec<Kind>,
    /// Names of the key columns, quoted.
    pub key: Vec<String>,
    /// Whole rows: insert or replace.
    pub upsert: String,
    /// As `upsert`, but rows that are equal already are left alone.
    pub upsert_changed: String,
    /// Whether there is a row of exactly these values.
    pub equal: String,
    /// By key.
    pub delete: String,
    /// The row as a JSON object, by key.
    pub select_row: String,
    /// The key as JSON, from a row of the table.
    pub key_expr: String,
}

impl TableSql {
    pub fn new(table: TableSchema) -> Self {
        let kinds = table.columns.iter().map(Kind::of).collect();
        let key: Vec<String> = table.key.iter().map(|&index| quote(&table.columns[index].name)).collect();
        let mut sql = TableSql {
            kinds,
            upsert: String::new(),
            upsert_changed: String::new(),
            equal: String::new(),
            delete: format!("{OWN} DELETE FROM {} WHERE {}", quote(&table.name), by_key(&key, 1)),
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
            format!("{} WHERE {}", sql.upsert, joined(&changed, "OR"))
        };
        let values = sql.table.columns.iter().enumerate().map(|(index, column)| {
            let operator = if sql.table.key.contains(&index) { "=" } else { "IS" };
            format!("{} {operator} ?{}", quote(&column.name), index + 1)
        });
        let values: Vec<String> = values.collect();
        sql.equal = format!("SELECT EXISTS (SELECT 1 FROM {name} WHERE {})", joined(&values, "AND"));
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
        format!("{OWN} INSERT INTO {} ({}) VALUES ({})", quote(&self.table.name), names.join(", "), places.join(", "))
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
        (!set.is_empty()).then(|| {
            format!("{OWN} UPDATE {} SET {} WHERE {}", quote(&self.table.name), set.join(", "), by.join(" AND "))
        })
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

/// The tables of a schema.
pub(crate) fn indexed(schema: &Schema) -> Tables {
    schema.tables.iter().map(|table| (table.name.clone(), Arc::new(TableSql::new(table.clone())))).collect()
}
