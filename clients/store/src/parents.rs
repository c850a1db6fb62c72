//! What a transaction's rows refer to: a row cannot be made before the one that it belongs to.
//!
//! The schema tells the foreign keys between synced tables. Where an earlier transaction of this store makes the row that a later one
//! refers to, the later one comes after it, as if it wrote that row: it is held back while that row's creation is in trouble, and if both
//! were sent already, the server refuses it for that and not for a missing row or right.

use std::collections::BTreeSet;

use millstream_client_core::rebase::Image;
use millstream_schemas::spelling::respelt;
use millstream_schemas::{Operation, Value};
use rusqlite::params;

use crate::apply::Applier;
use crate::error::{During, encode, parse};
use crate::statements::TableSql;
use crate::states::operation;
use crate::{Store, StoreError};

/// The SQL of the rows that a transaction (`?1`) comes after others by: those that it writes, and (`?2`, as [`Store::parents`] gives
/// them) those that it refers to. Of these, only who made them counts.
pub(crate) const MINE: &str = "(SELECT tbl, key, 0 AS refers FROM local_changes WHERE tx = ?1 \
     UNION SELECT value ->> 0, value ->> 1, 1 FROM json_each(?2))";

impl Store {
    /// Rows that a transaction's rows refer to, that an earlier transaction makes, and that the server does not have: a JSON array of
    /// pairs of table and key.
    pub(crate) fn parents(&self, tx: u64) -> Result<String, StoreError> {
        let mut found: BTreeSet<(&str, String)> = BTreeSet::new();
        if self.tables.values().any(|table| !table.table.references.is_empty()) {
            let mut statement = self
                .connection
                .prepare_cached("SELECT tbl, key, op, columns, vals FROM local_changes WHERE tx = ?1")
                .during("preparing to read a transaction")?;
            let mut rows = statement.query([tx as i64]).during("reading a transaction")?;
            while let Some(row) = rows.next().during("reading a transaction")? {
                let text =
                    |column: usize| row.get_ref(column).and_then(|text| Ok(text.as_str()?)).during("reading a change");
                let Some(table) = self.tables.get(text(0)?) else { continue };
                if operation(text(2)?) == Operation::Delete || table.table.references.is_empty() {
                    continue;
                }
                let columns: Vec<String> = parse(text(3)?, "list of columns")?;
                let values: Vec<Value> = parse(text(4)?, "list of values")?;
                let set: Image = columns.into_iter().zip(values).collect();
                self.referred(table, text(1)?, &set, &mut found)?;
            }
        }
        let mut parents = Vec::new();
        for (table, key) in found {
            if !self.server_has(table, &key)? && self.is_made_before(tx, table, &key)? {
                parents.push((table, key));
            }
        }
        Ok(encode(&parents))
    }

    /// Adds what a row refers to by the columns that a change of it sets.
    fn referred<'a>(
        &'a self,
        table: &'a TableSql,
        key: &str,
        set: &Image,
        found: &mut BTreeSet<(&'a str, String)>,
    ) -> Result<(), StoreError> {
        for reference in &table.table.references {
            let names = || reference.columns.iter().map(|&index| &table.table.columns[index].name);
            let Some(parent) = self.tables.get(&reference.table) else { continue };
            if !names().any(|name| set.contains_key(name)) {
                continue;
            }
            let rest = match names().all(|name| set.contains_key(name)) {
                true => None,
                false => Applier::new(self)?.visible(table, key)?,
            };
            let value = |name| set.get(name).or(rest.as_ref().and_then(|rest| rest.get(name))).cloned().flatten();
            let types = parent.table.key.iter().map(|&index| &parent.table.columns[index].r#type);
            let spelt = |(text, sql_type): (Value, &String)| Some(respelt(sql_type, &text?).into_owned());
            let parts: Option<Vec<String>> = names().map(value).zip(types).map(spelt).collect();
            if let Some(parts) = parts.filter(|parts| parts.len() == parent.table.key.len()) {
                found.insert((parent.name(), encode(&parts)));
            }
        }
        Ok(())
    }

    fn is_made_before(&self, tx: u64, table: &str, key: &str) -> Result<bool, StoreError> {
        self.connection
            .prepare_cached(
                "SELECT EXISTS (SELECT 1 FROM local_changes INDEXED BY local_changes_live \
                 WHERE tbl = ?2 AND key = ?3 AND state <> 'confirmed' AND op = 'insert' AND tx < ?1)",
            )
            .and_then(|mut statement| statement.query_row(params![tx as i64, table, key], |row| row.get(0)))
            .during("looking for the creation of a row")
    }

    /// As far as is known here: others may have made the row too.
    fn server_has(&self, table: &str, key: &str) -> Result<bool, StoreError> {
        let applier = Applier::new(self)?;
        Ok(match (applier.base(table, key)?, self.tables.get(table)) {
            (Some(base), _) => base.is_some(),
            (None, Some(table)) => applier.visible(table, key)?.is_some(),
            (None, None) => false,
        })
    }
}
