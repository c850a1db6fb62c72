//! Installing the schema, and the SQL that is made from it.

use std::collections::HashMap;
use std::sync::Arc;

use millstream_client_core::format::is_reserved;
use millstream_client_core::sql::quote;
use millstream_client_core::territory;
use millstream_client_core::trigger;
use millstream_client_core::types::Kind;
use millstream_schemas::{ColumnSchema, Schema, TableSchema};

use crate::apply::Applier;
use crate::error::During;
use crate::statements::{TableSql, Tables, indexed};
use crate::{Store, StoreError};

/// Whether rows are told apart by the same columns, of the same kinds.
fn has_key_of(table: &TableSchema, before: &TableSchema) -> bool {
    let key = |table: &TableSchema| -> Vec<(String, Kind)> {
        table.key.iter().map(|&i| (table.columns[i].name.clone(), Kind::of(&table.columns[i]))).collect()
    };
    key(table) == key(before)
}

impl Store {
    pub(crate) fn index_tables(&mut self) {
        self.session.set_synced(self.schema.iter().flat_map(|schema| &schema.tables).map(|table| table.name.as_str()));
        self.tables = self.schema.as_ref().map(indexed).unwrap_or_default();
    }

    pub(crate) fn table(&self, name: &str) -> Result<Arc<TableSql>, StoreError> {
        self.tables.get(name).cloned().ok_or_else(|| StoreError::UnknownTable(name.to_owned()))
    }

    /// Installs a schema: creates, extends and drops tables, and makes the triggers anew. The queue is kept.
    ///
    /// What the app added is in nobody's way: its views, triggers and indexes are dropped for it and made again; what does not fit any
    /// more is [set aside](Store::set_aside), as is a table or column whose name the server's schema takes.
    ///
    /// True: the rows on hand cannot be carried over (a key changed, or a column that is never null was added), and the
    /// position was given up, so that the next session brings a snapshot.
    ///
    /// # Errors
    /// [`StoreError::Schema`], [`StoreError::ReservedTable`]: SQLite cannot have such tables. Otherwise SQLite failed; the schema is the
    /// one before.
    pub fn install(&mut self, schema: &Schema) -> Result<bool, StoreError> {
        if self.schema.as_ref() == Some(schema) {
            return Ok(false);
        }
        require_names(schema)?;
        let tables = indexed(schema);
        // Without foreign keys: dropping a table would take rows of the app's with it.
        let installed = self.without_foreign_keys(|| {
            self.transact(|store| {
                // Under the lock: another process may have installed it meanwhile.
                let old: Option<Schema> = store.meta_json("schema")?;
                if old.as_ref() == Some(schema) { Ok(false) } else { store.migrate(old.as_ref(), schema, &tables) }
            })
        });
        self.connection.flush_prepared_statement_cache();
        if installed.is_ok() {
            self.schema = Some(schema.clone());
        }
        self.index_tables();
        installed
    }

    fn migrate(&self, old: Option<&Schema>, schema: &Schema, tables: &Tables) -> Result<bool, StoreError> {
        let old_tables = old.map_or(&[][..], |schema| &schema.tables);
        let before = |name: &str| old_tables.iter().find(|before| before.name == name);
        self.session.set_synced(old_tables.iter().chain(&schema.tables).map(|table| table.name.as_str()));
        // What refers to a table or column of the app's follows it to its new name, unless something is broken: then it cannot, and
        // is set aside.
        self.savepoint("SAVEPOINT millstream_room")?;
        let moved = self.make_way(old_tables, schema, false);
        if moved.is_err() {
            self.savepoint("ROLLBACK TO millstream_room")?;
        }
        self.savepoint("RELEASE millstream_room")?;
        let changes = |name: &str| {
            let same = |a: &TableSchema, b: &TableSchema| a.columns == b.columns && a.key == b.key;
            // What is not the store's yet is not concerned: it gets another name.
            before(name).is_some_and(|before| schema.table(name).is_none_or(|table| !same(before, table)))
        };
        let applier = Applier::new(self)?;
        for table in old_tables.iter().filter(|before| changes(&before.name)) {
            // Columns may lose what they hold, and a snapshot that was cut may go on nevertheless.
            applier.differ_all(&TableSql::new(table.clone()))?;
        }
        for table in
            old_tables.iter().filter(|before| schema.table(&before.name).is_none_or(|now| !has_key_of(now, before)))
        {
            self.empty(table)?;
        }
        let mut parked = self.park(changes)?;
        let mut without_place = Vec::new();
        if moved.is_err() {
            let moved = self.make_way(old_tables, schema, true)?;
            let follows = |sql: &str| moved.iter().any(|name| territory::mentions(sql, name));
            let (lost, kept) = parked.into_iter().partition(|parked| follows(&parked.object.sql));
            parked = kept;
            without_place = lost;
        }

        let mut stale = false;
        for table in old_tables {
            self.batch(&trigger::drop_triggers(&table.name))?;
            if schema.table(&table.name).is_none() {
                self.drop_table(&table.name)?;
            }
        }
        for table in &schema.tables {
            stale |= self.install_table(before(&table.name), table, schema)?;
            // Rows that a newly synced table has long had come with no transaction.
            stale |= old.is_some() && before(&table.name).is_none();
        }
        // They name each other's tables, with the columns of this schema.
        schema.tables.iter().try_for_each(|table| self.create_triggers(table, &schema.tables))?;
        self.session.set_synced(schema.tables.iter().map(|table| table.name.as_str()));
        self.restore(parked, tables)?;
        // Only now: what it names is not the server's table of that name.
        self.lose(without_place, "a table or column that it names has another name now")?;
        self.settle(tables)?;
        self.set_meta_json("schema", schema)?;
        if stale {
            self.set_meta("resync", 1)?;
            // Of rows that are there already only the keys are staged, and what they hold now is not what was sent.
            self.forget_staged()?;
        }
        Ok(stale)
    }

    /// Deletes the rows of a table that is about to go, so that the app's triggers hear of it; not if they do not let it.
    fn empty(&self, table: &TableSchema) -> Result<(), StoreError> {
        self.savepoint("SAVEPOINT millstream_empty")?;
        if self.connection.execute_batch(&format!("DELETE FROM {}", quote(&table.name))).is_err() {
            self.savepoint("ROLLBACK TO millstream_empty")?;
        }
        self.savepoint("RELEASE millstream_empty")
    }

    /// Gives what the app has under a name that the schema takes another one. Gives these names.
    fn make_way(&self, old_tables: &[TableSchema], schema: &Schema, last: bool) -> Result<Vec<String>, StoreError> {
        let is_own = |name: &str| old_tables.iter().any(|table| table.name == name);
        let taken = |name: &str| schema.tables.iter().any(|table| table.name.eq_ignore_ascii_case(name));
        let mut moved = Vec::new();
        for table in &schema.tables {
            let Some(before) = old_tables.iter().find(|before| before.name == table.name) else {
                self.make_room(&table.name, last, is_own, taken)?;
                moved.push(table.name.clone());
                continue;
            };
            let mut there = self.columns_of(&table.name)?;
            there.extend(table.columns.iter().map(|column| column.name.clone()));
            for column in &table.columns {
                let app = self.columns_of(&table.name)?;
                let clash =
                    app.iter().find(|name| name.eq_ignore_ascii_case(&column.name) && before.column(name).is_none());
                if let Some(clash) = clash {
                    self.move_column(&table.name, clash, &there)?;
                    moved.push(clash.clone());
                }
            }
        }
        Ok(moved)
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

    fn install_table(
        &self,
        before: Option<&TableSchema>,
        table: &TableSchema,
        schema: &Schema,
    ) -> Result<bool, StoreError> {
        let Some(before) = before else {
            self.batch(&trigger::create_table(table))?;
            return Ok(false);
        };
        if !has_key_of(table, before) {
            self.move_extra(before, schema)?;
            self.drop_table(&table.name)?;
            self.batch(&trigger::create_table(table))?;
            return Ok(true);
        }
        self.savepoint("SAVEPOINT millstream_alter")?;
        let altered = self.alter(before, table);
        if altered.is_err() {
            self.savepoint("ROLLBACK TO millstream_alter")?;
        }
        self.savepoint("RELEASE millstream_alter")?;
        match altered {
            // A column of the app's is in the way, with what it has to do with the server's.
            Err(error) if error.may_be_of_the_app() => self.rebuild(before, table, schema)?,
            altered => altered?,
        }
        let stale = |column: &ColumnSchema| match before.column(&column.name) {
            Some(index) => Kind::of(&before.columns[index]) != Kind::of(column),
            // Rows on hand have no value for it, and null cannot be the right one.
            None => !column.nullable,
        };
        Ok(table.columns.iter().any(stale))
    }

    fn alter(&self, before: &TableSchema, table: &TableSchema) -> Result<(), StoreError> {
        for column in &before.columns {
            let kept = table.column(&column.name).map(|index| &table.columns[index]);
            // Another representation: drop the column and add it again, empty.
            if kept.is_none_or(|kept| Kind::of(kept) != Kind::of(column)) {
                self.batch(&format!("ALTER TABLE {} DROP COLUMN {}", quote(&table.name), quote(&column.name)))?;
                if let Some(index) = table.column(&column.name) {
                    self.batch(&trigger::add_column(table, index))?;
                }
            }
        }
        for (index, column) in table.columns.iter().enumerate() {
            if before.column(&column.name).is_none() {
                self.batch(&trigger::add_column(table, index))?;
            }
        }
        Ok(())
    }

    /// Makes a table from the start, with the values that it has.
    fn rebuild(&self, before: &TableSchema, table: &TableSchema, schema: &Schema) -> Result<(), StoreError> {
        self.move_extra(before, schema)?;
        let new = TableSchema { name: "millstream_rebuilt".into(), ..table.clone() };
        self.batch(&trigger::create_table(&new))?;
        let is_kept = |column: &&ColumnSchema| {
            let same = |index: usize| Kind::of(&before.columns[index]) == Kind::of(column);
            before.column(&column.name).is_some_and(same)
        };
        let mut names: Vec<String> = table.columns.iter().filter(is_kept).map(|column| quote(&column.name)).collect();
        // Search indexes of the app's know the rows by it.
        let is_free = |name: &&&str| !before.columns.iter().any(|column| column.name.eq_ignore_ascii_case(name));
        names.extend(["rowid", "oid", "_rowid_"].iter().find(is_free).map(|name| (*name).to_owned()));
        let (name, names) = (quote(&table.name), names.join(", "));
        self.batch(&format!("INSERT INTO millstream_rebuilt ({names}) SELECT {names} FROM {name}"))?;
        self.batch(&format!("DROP TABLE {name}; ALTER TABLE millstream_rebuilt RENAME TO {name}"))
    }

    /// Keeps columns of the app's on a synced table that is about to be dropped.
    fn move_extra(&self, before: &TableSchema, schema: &Schema) -> Result<(), StoreError> {
        let mut extra = self.columns_of(&before.name)?;
        extra.retain(|name| before.column(name).is_none());
        let key: Vec<String> = before.key.iter().map(|&index| before.columns[index].name.clone()).collect();
        let taken = |name: &str| schema.tables.iter().any(|table| table.name.eq_ignore_ascii_case(name));
        self.move_columns(&before.name, &key, &extra, taken)
    }
}

/// SQLite takes names for the same that differ in the case of ASCII letters only, and some names are the store's.
fn require_names(schema: &Schema) -> Result<(), StoreError> {
    let mut tables: HashMap<String, &str> = HashMap::new();
    for table in &schema.tables {
        if is_reserved(&table.name) {
            return Err(StoreError::ReservedTable(table.name.clone()));
        }
        if let Some(other) = tables.insert(table.name.to_ascii_lowercase(), &table.name) {
            return Err(StoreError::Schema(format!(
                "the server syncs the tables \"{other}\" and \"{}\", which are one name to SQLite: rename one of them in Postgres, or sync \
                 only one",
                table.name
            )));
        }
        let mut columns: HashMap<String, &str> = HashMap::new();
        for column in &table.columns {
            if let Some(other) = columns.insert(column.name.to_ascii_lowercase(), &column.name) {
                return Err(StoreError::Schema(format!(
                    "the columns \"{other}\" and \"{}\" of \"{}\" are one name to SQLite: rename one of them in Postgres",
                    column.name, table.name
                )));
            }
        }
    }
    Ok(())
}
