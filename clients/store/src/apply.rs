//! Applying what the server sent: rows, confirmations, lost scopes and the position, in one local transaction.
//!
//! A row without changes under way is simply written. Where changes are under way, `millstream_base` holds the row as
//! the server knows it; the server's changes go there, and at the end the visible row is made anew from it and the
//! changes that are still unsettled.

use std::collections::BTreeSet;

use millstream_client_core::rebase::{self, Image, Pending};
use millstream_client_core::replica::{Batch, Step, Work};
use millstream_schemas::frame::Confirmed;
use millstream_schemas::stream::Failure;
use millstream_schemas::{Operation, Position, Retry, TableChanges, TableOp, Value};
use rusqlite::{OptionalExtension, params};

use crate::error::{During, encode, parse};
use crate::queue::{MAX_ATTEMPTS, next_attempt_at};
use crate::schema::TableSql;
use crate::value::Wire;
use crate::{Store, StoreError};

/// What a batch did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Highest settled transaction.
    pub confirmed_seq: u64,
    /// Transactions that failed, and were not known to.
    pub failures: Vec<Failure>,
    /// The position that the store now has.
    pub position: Option<Position>,
    /// Number of server transactions with rows.
    pub transactions: u64,
}

impl Store {
    /// Does what a session's staging found ready, in order. Each [`Work::Apply`] is one local transaction, whole or not
    /// at all; it is durable with the app's next write at the latest.
    pub fn perform(&mut self, works: &[Work]) -> Result<Applied, StoreError> {
        self.relaxed(|store| store.perform_all(works))
    }

    fn perform_all(&mut self, works: &[Work]) -> Result<Applied, StoreError> {
        let mut all =
            Applied { confirmed_seq: self.confirmed_seq().during("reading confirmed_seq")?, ..Applied::default() };
        for work in works {
            match work {
                Work::ClearStage => self.clear_stage()?,
                Work::Stage(changes) => self.stage(changes)?,
                Work::Apply(batch) => {
                    let applied = self.apply(batch)?;
                    all.confirmed_seq = applied.confirmed_seq;
                    all.failures.extend(applied.failures);
                    all.position = applied.position.or(all.position);
                    all.transactions += applied.transactions;
                }
            }
        }
        Ok(all)
    }

    /// Applies a batch and its position in one local transaction.
    pub fn apply(&mut self, batch: &Batch) -> Result<Applied, StoreError> {
        let marks = self.marks.take();
        let result = self.transact(|store| {
            let mut applier = Applier::new(store)?;
            let mut failures = Vec::new();
            for step in &batch.steps {
                match step {
                    Step::Rows(changes) => applier.rows(changes, false)?,
                    Step::Confirmed(confirmed) => applier.confirm(confirmed, &mut failures)?,
                    Step::ScopeRemoved(scope) => applier.remove_scope(scope)?,
                    Step::Snapshot { scopes, full } => applier.snapshot(scopes, *full)?,
                }
            }
            applier.finish()?;
            if let Some(position) = &batch.position {
                store.set_meta_json("position", position)?;
            }
            let confirmed_seq = store.confirmed_seq().during("reading confirmed_seq")?;
            if let Some((sent, accepted)) = marks {
                store.write_marks(sent, accepted, confirmed_seq)?;
            }
            if batch.at > 0 {
                // Whoever edits a row after seeing it writes a later stamp, even if the clock here is slow.
                store.session.observe(batch.at);
                store.set_meta("stamp", store.session.stamp() as i64)?;
            }
            Ok::<_, StoreError>(Applied {
                confirmed_seq,
                failures,
                position: batch.position,
                transactions: batch.transactions,
            })
        });
        if result.is_err() {
            self.marks = marks;
        }
        result
    }
}

/// The application of one batch.
pub(crate) struct Applier<'a> {
    pub store: &'a Store,
    /// Whether any row has changes under way; if none has, no row is looked up.
    pub based: bool,
    /// Rows, by table and key, whose visible form is to be made anew.
    pub dirty: BTreeSet<(String, String)>,
}

impl<'a> Applier<'a> {
    pub fn new(store: &'a Store) -> Result<Self, StoreError> {
        let based: bool = store
            .connection
            .prepare_cached("SELECT EXISTS (SELECT 1 FROM millstream_base)")
            .and_then(|mut statement| statement.query_row([], |row| row.get(0)))
            .during("looking for changes under way")?;
        Ok(Applier { store, based, dirty: BTreeSet::new() })
    }

    /// Applies row changes. `diff`: rows that are equal already are not written.
    pub fn rows(&mut self, changes: &[TableChanges], diff: bool) -> Result<(), StoreError> {
        for change in changes {
            let table = self.store.table(&change.table)?;
            match change.op {
                TableOp::Upsert | TableOp::Update => self.set(&table, change, diff)?,
                TableOp::Delete => self.delete(&table, change)?,
                TableOp::Truncate => self.truncate(&table)?,
            }
        }
        Ok(())
    }

    fn set(&mut self, table: &TableSql, change: &TableChanges, diff: bool) -> Result<(), StoreError> {
        let columns = table.columns(change.columns.as_deref())?;
        let places = table.key_places(&columns)?;
        let partial = change.op == TableOp::Update;
        let sql = match (partial, &change.columns) {
            (true, _) => match table.update_columns(&columns) {
                Some(sql) => sql,
                None => return Ok(()),
            },
            (false, Some(_)) => table.upsert_columns(&columns),
            (false, None) if diff => table.upsert_changed.clone(),
            (false, None) => table.upsert.clone(),
        };
        let mut statement = self.store.connection.prepare_cached(&sql).during("preparing to write rows")?;
        for row in &change.rows {
            if row.len() != columns.len() {
                return Err(table.shape("another number of values than columns"));
            }
            if self.based {
                let key = table.key_json(row, &places);
                if let Some(base) = self.base(table.name(), &key)? {
                    if base.is_some() || !partial {
                        let mut image = base.unwrap_or_default();
                        for (&column, value) in columns.iter().zip(row) {
                            image.insert(table.table.columns[column].name.clone(), value.clone());
                        }
                        self.set_base(table.name(), key, Some(&image))?;
                    }
                    continue;
                }
            }
            for (place, (&column, value)) in columns.iter().zip(row).enumerate() {
                statement
                    .raw_bind_parameter(place + 1, Wire::new(table.kinds[column], value))
                    .during("binding a row")?;
            }
            statement.raw_execute().during("writing a row")?;
        }
        Ok(())
    }

    fn delete(&mut self, table: &TableSql, change: &TableChanges) -> Result<(), StoreError> {
        // Without names: the key columns in key order.
        let columns = match &change.columns {
            Some(_) => table.columns(change.columns.as_deref())?,
            None => table.table.key.clone(),
        };
        let places = table.key_places(&columns)?;
        let mut statement = self.store.connection.prepare_cached(&table.delete).during("preparing to delete rows")?;
        for row in &change.rows {
            if row.len() != columns.len() {
                return Err(table.shape("another number of values than columns"));
            }
            if self.based {
                let key = table.key_json(row, &places);
                if self.base(table.name(), &key)?.is_some() {
                    self.set_base(table.name(), key, None)?;
                    continue;
                }
            }
            for (parameter, &place) in places.iter().enumerate() {
                let wire = Wire::new(table.kinds[columns[place]], &row[place]);
                statement.raw_bind_parameter(parameter + 1, wire).during("binding a key")?;
            }
            statement.raw_execute().during("deleting a row")?;
        }
        Ok(())
    }

    fn truncate(&mut self, table: &TableSql) -> Result<(), StoreError> {
        for (key, _) in self.bases_of(table.name())? {
            self.set_base(table.name(), key, None)?;
        }
        let sql = format!("DELETE FROM {}", millstream_client_core::trigger::quote(table.name()));
        self.store.connection.execute(&sql, []).during("emptying a table")?;
        Ok(())
    }

    /// Settles transactions: failed ones wait for a retry, the others are done; none is under way any more.
    fn confirm(&mut self, confirmed: &Confirmed, failures: &mut Vec<Failure>) -> Result<(), StoreError> {
        const OPEN: &str = "state IN ('pending', 'sending', 'accepted')";
        let connection = &self.store.connection;
        // Open entries are above what was settled before; so only those are read, not the whole history.
        let (before, seq) = (self.store.confirmed_seq().during("reading confirmed_seq")? as i64, confirmed.seq as i64);
        if seq <= before {
            return Ok(());
        }
        let settled: Vec<(String, String)> = connection
            .prepare_cached(&format!(
                "SELECT tbl, key FROM local_changes INDEXED BY local_changes_by_tx WHERE tx > ?1 AND tx <= ?2 AND {OPEN}"
            ))
            .and_then(|mut statement| statement.query_map([before, seq], |row| Ok((row.get(0)?, row.get(1)?)))?.collect())
            .during("reading settled changes")?;
        self.dirty.extend(settled);
        for failure in &confirmed.failed {
            let attempts: Option<i64> = connection
                .prepare_cached(&format!("SELECT max(attempts) + 1 FROM local_changes WHERE tx = ?1 AND {OPEN}"))
                .and_then(|mut statement| statement.query_row([failure.seq as i64], |row| row.get(0)))
                .during("reading attempts")?;
            // Known before, or of another life of this store.
            let Some(attempts) = attempts else { continue };
            let again = failure.code.retry() == Retry::Automatic && (attempts as u32) < MAX_ATTEMPTS;
            let state = if again { "retry_wait" } else { "error" };
            let next = again.then(|| next_attempt_at(self.store, attempts as u32) as i64);
            connection
                .prepare_cached(&format!(
                    "UPDATE local_changes SET state = ?2, attempts = ?3, next_attempt = ?4, last_error_code = ?5, \
                     last_error = CASE WHEN change_id = ?6 OR NOT EXISTS \
                     (SELECT 1 FROM local_changes WHERE tx = ?1 AND change_id = ?6) THEN ?7 END WHERE tx = ?1 AND {OPEN}"
                ))
                .and_then(|mut statement| {
                    statement.execute(params![
                        failure.seq as i64,
                        state,
                        attempts,
                        next,
                        failure.code.as_str(),
                        failure.change_id.to_string(),
                        failure.message
                    ])
                })
                .during("recording a failure")?;
            failures.push(failure.clone());
        }
        connection
            .prepare_cached(&format!(
                "UPDATE local_changes INDEXED BY local_changes_by_tx SET state = 'confirmed', next_attempt = NULL, last_error_code = NULL, \
                 last_error = NULL WHERE tx > ?1 AND tx <= ?2 AND {OPEN}"
            ))
            .and_then(|mut statement| statement.execute([before, seq]))
            .during("settling changes")?;
        self.store.set_meta("confirmed_seq", seq)
    }

    /// Makes the visible form of dirty rows anew; rows without changes under way need no base any more.
    pub fn finish(&mut self) -> Result<(), StoreError> {
        for (name, key) in std::mem::take(&mut self.dirty) {
            // A table that a newer schema dropped has no rows to show.
            let Some(table) = self.store.tables.get(&name) else { continue };
            let pending = self.pending(&name, &key)?;
            let Some(base) = self.base(&name, &key)? else { continue };
            let settled = pending.is_empty();
            self.show(table, &key, rebase::overlay(base, &pending))?;
            if settled {
                self.store
                    .connection
                    .prepare_cached("DELETE FROM millstream_base WHERE tbl = ?1 AND key = ?2")
                    .and_then(|mut statement| statement.execute([&name, &key]))
                    .during("dropping a confirmed image")?;
            }
        }
        Ok(())
    }

    fn pending(&self, table: &str, key: &str) -> Result<Vec<Pending>, StoreError> {
        let rows: Vec<(String, String, String)> = self
            .store
            .connection
            .prepare_cached(
                "SELECT op, columns, vals FROM local_changes WHERE tbl = ?1 AND key = ?2 \
                 AND state IN ('pending', 'sending', 'accepted') ORDER BY tx, id",
            )
            .and_then(|mut statement| {
                statement.query_map([table, key], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?.collect()
            })
            .during("reading changes under way")?;
        rows.iter()
            .map(|(op, columns, values)| {
                Ok(Pending {
                    op: operation(op),
                    columns: parse(columns, "list of columns")?,
                    values: parse(values, "list of values")?,
                })
            })
            .collect()
    }

    fn show(&self, table: &TableSql, key: &str, row: Option<Image>) -> Result<(), StoreError> {
        let key: Vec<Value> = parse(key, "key")?;
        let sql = if row.is_some() { &table.upsert } else { &table.delete };
        let mut statement = self.store.connection.prepare_cached(sql).during("preparing to show a row")?;
        match row {
            Some(row) => {
                for (index, column) in table.table.columns.iter().enumerate() {
                    let value = match table.table.key.iter().position(|&part| part == index) {
                        Some(part) => &key[part],
                        None => row.get(&column.name).unwrap_or(&None),
                    };
                    statement
                        .raw_bind_parameter(index + 1, Wire::new(table.kinds[index], value))
                        .during("binding a row")?;
                }
            }
            None => {
                for (place, (&index, value)) in table.table.key.iter().zip(&key).enumerate() {
                    statement
                        .raw_bind_parameter(place + 1, Wire::new(table.kinds[index], value))
                        .during("binding a key")?;
                }
            }
        }
        statement.raw_execute().during("showing a row")?;
        Ok(())
    }

    /// The confirmed image of a row with changes under way; the outer none: there are no changes under way.
    pub fn base(&self, table: &str, key: &str) -> Result<Option<Option<Image>>, StoreError> {
        let row: Option<Option<String>> = self
            .store
            .connection
            .prepare_cached("SELECT row FROM millstream_base WHERE tbl = ?1 AND key = ?2")
            .and_then(|mut statement| statement.query_row([table, key], |row| row.get(0)).optional())
            .during("reading a confirmed image")?;
        row.map(|row| row.map(|text| parse(&text, "confirmed image")).transpose()).transpose()
    }

    /// All confirmed images of a table: key and row.
    pub fn bases_of(&self, table: &str) -> Result<Vec<(String, Option<Image>)>, StoreError> {
        let rows: Vec<(String, Option<String>)> = self
            .store
            .connection
            .prepare_cached("SELECT key, row FROM millstream_base WHERE tbl = ?1")
            .and_then(|mut statement| statement.query_map([table], |row| Ok((row.get(0)?, row.get(1)?)))?.collect())
            .during("reading confirmed images")?;
        rows.into_iter()
            .map(|(key, row)| Ok((key, row.map(|text| parse(&text, "confirmed image")).transpose()?)))
            .collect()
    }

    /// Replaces a confirmed image.
    pub fn set_base(&mut self, table: &str, key: String, row: Option<&Image>) -> Result<(), StoreError> {
        self.store
            .connection
            .prepare_cached(
                "INSERT INTO millstream_base (tbl, key, row) VALUES (?1, ?2, ?3) ON CONFLICT (tbl, key) DO UPDATE SET row = excluded.row",
            )
            .and_then(|mut statement| statement.execute(params![table, key, row.map(encode)]))
            .during("storing a confirmed image")?;
        self.based = true;
        self.dirty.insert((table.to_owned(), key));
        Ok(())
    }

    /// Makes sure that the row has a confirmed image, taking the visible row for it.
    pub fn keep_base(&mut self, table: &str, key: &str) -> Result<(), StoreError> {
        if self.base(table, key)?.is_none() {
            let image = match self.store.tables.get(table) {
                Some(table) => self.visible(table, key)?,
                None => None,
            };
            self.set_base(table, key.to_owned(), image.as_ref())?;
        }
        self.dirty.insert((table.to_owned(), key.to_owned()));
        Ok(())
    }

    fn visible(&self, table: &TableSql, key: &str) -> Result<Option<Image>, StoreError> {
        let key: Vec<Value> = parse(key, "key")?;
        let mut statement =
            self.store.connection.prepare_cached(&table.select_row).during("preparing to read a row")?;
        for (place, (&index, value)) in table.table.key.iter().zip(&key).enumerate() {
            statement.raw_bind_parameter(place + 1, Wire::new(table.kinds[index], value)).during("binding a key")?;
        }
        let mut rows = statement.raw_query();
        let Some(row) = rows.next().during("reading a row")? else { return Ok(None) };
        let text: String = row.get(0).during("reading a row")?;
        parse(&text, "row").map(Some)
    }
}

pub(crate) fn operation(word: &str) -> Operation {
    // The table's CHECK admits no other word.
    match word {
        "insert" => Operation::Insert,
        "update" => Operation::Update,
        _ => Operation::Delete,
    }
}
