//! Applying what the server sent: rows, confirmations, lost scopes and the position, in one local transaction.
//!
//! A row without changes under way is simply written. Where changes are under way, `millstream_base` holds the row as
//! the server knows it; the server's changes go there, and at the end the visible row is made anew from it and the
//! changes that are still unsettled.

use std::collections::{BTreeMap, BTreeSet};

use millstream_client_core::backoff;
use millstream_client_core::rebase::{self, Image, Pending};
use millstream_client_core::replica::{Batch, Step};
use millstream_client_core::sql::quote;
use millstream_schemas::frame::Confirmed;
use millstream_schemas::stream::Failure;
use millstream_schemas::{Clock, Code, Position, TableChanges, TableOp, Value};
use rusqlite::{OptionalExtension, params};

use crate::error::{During, StoreError, encode, parse};
use crate::statements::TableSql;
use crate::states::{OPEN, Outcome, operation};
use crate::store::Store;
use crate::value::Wire;

/// What a batch did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Highest settled `client_seq`.
    pub confirmed_seq: u64,
    /// Transactions that were settled, in their order.
    pub settled: Vec<Settled>,
    /// The position that the store now has.
    pub position: Option<Position>,
    /// Number of server transactions with rows.
    pub transactions: u64,
    /// Whether transactions that were held back have numbers now.
    pub released: bool,
}

/// A transaction that was settled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settled {
    /// The local transaction.
    pub tx: u64,
    /// How it took effect, or why it was rejected.
    pub result: Result<Outcome, Failure>,
}

impl Store {
    /// Applies a batch and its position in one local transaction.
    ///
    /// # Errors
    /// [`StoreError::UnknownTable`], [`StoreError::RowShape`]: a row does not fit the schema. Otherwise SQLite failed. Nothing of the
    /// batch is applied then.
    pub fn apply(&mut self, batch: &Batch) -> Result<Applied, StoreError> {
        self.apply_batch(batch, false)
    }

    /// `swept`: the rows that the first snapshot in it lacks have been looked for.
    pub(crate) fn apply_batch(&mut self, batch: &Batch, swept: bool) -> Result<Applied, StoreError> {
        self.put_in_order()?;
        let marks = self.marks.take();
        let result = self.unhindered(|store| {
            let mut applier = Applier::new(store)?;
            let (mut settled, mut swept) = (Vec::new(), swept);
            let is_whole = batch.steps.iter().any(|step| matches!(step, Step::Snapshot { full: true, .. }));
            if batch.position.is_some() && !is_whole && store.is_unclaimed()? {
                // What came of a first snapshot that was cut is no state of the server's, and this position does not make it one.
                store.tables.values().try_for_each(|table| applier.truncate(table))?;
            }
            for step in &batch.steps {
                match step {
                    Step::Rows(changes) => applier.rows(changes, false)?,
                    Step::Spilled(part) => applier.spilled(*part)?,
                    Step::Confirmed(confirmed) => applier.confirm(confirmed, &mut settled)?,
                    Step::ScopeRemoved(scope) => applier.remove_scope(scope)?,
                    Step::Snapshot { scopes, full } => {
                        applier.snapshot(scopes, *full, std::mem::take(&mut swept))?;
                    }
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
                store.keep_stamp()?;
            }
            Ok::<_, StoreError>(Applied {
                confirmed_seq,
                settled,
                position: batch.position,
                transactions: batch.transactions,
                released: applier.released,
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
    /// Whether a snapshot is being staged, as a difference to the confirmed rows.
    pub staging: bool,
    /// Whether held transactions were numbered.
    pub released: bool,
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
        Ok(Applier { store, based, staging: store.is_staging()?, released: false, dirty: BTreeSet::new() })
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

    pub fn set(&mut self, table: &TableSql, change: &TableChanges, diff: bool) -> Result<(), StoreError> {
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
            if self.based || self.staging {
                let key = table.key_json(row, &places);
                self.differ(table, &key)?;
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
            if self.based || self.staging {
                let key = table.key_json(row, &places);
                self.differ(table, &key)?;
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
        self.differ_all(table)?;
        for (key, _) in self.bases_of(table.name())? {
            self.set_base(table.name(), key, None)?;
        }
        let sql = format!("DELETE FROM {}", quote(table.name()));
        self.store.connection.execute(&sql, []).during("emptying a table")?;
        Ok(())
    }

    /// Settles transactions: rejected ones wait for a retry or a person, those refused for one of these are held back
    /// behind it, the others are done.
    fn confirm(&mut self, confirmed: &Confirmed, settled: &mut Vec<Settled>) -> Result<(), StoreError> {
        let store = self.store;
        let before = store.confirmed_seq().during("reading confirmed_seq")?;
        if confirmed.client_seq <= before {
            return Ok(());
        }
        if store.run_of(confirmed.client_seq)? != Some(confirmed.run_id) {
            return Err(StoreError::Copied);
        }
        let range = [before as i64, confirmed.client_seq as i64];
        // Open entries are above what was settled before; so only those are read, not the whole history.
        let open: Vec<(i64, u64, u32, String, String)> = store
            .connection
            .prepare_cached(
                "SELECT tx, seq, attempts, tbl, key FROM local_changes INDEXED BY local_changes_by_seq \
                 WHERE seq > ?1 AND seq <= ?2 ORDER BY seq, id",
            )
            .and_then(|mut statement| {
                let row = |row: &rusqlite::Row<'_>| {
                    Ok((row.get(0)?, row.get::<_, i64>(1)? as u64, row.get(2)?, row.get(3)?, row.get(4)?))
                };
                statement.query_map(range, row)?.collect()
            })
            .during("reading settled changes")?;
        let failed: BTreeMap<u64, &Failure> =
            confirmed.failed.iter().map(|failure| (failure.client_seq, failure)).collect();
        let lost: BTreeMap<u64, Outcome> =
            confirmed.lost.iter().map(|loss| (loss.client_seq, Outcome::of(loss))).collect();
        let mut last = 0;
        // Others wait for what was in trouble; without that, only what is held back just now may have to go on.
        let (mut relieved, mut held) = (false, Vec::new());
        for (tx, client_seq, attempts, table, key) in open {
            self.dirty.insert((table, key));
            if std::mem::replace(&mut last, client_seq) == client_seq {
                continue;
            }
            let result = match failed.get(&client_seq) {
                Some(failure) if failure.code == Code::PredecessorFailed => {
                    store.hold(tx as u64)?;
                    held.push(tx as u64);
                    continue;
                }
                Some(failure) => {
                    self.reject(tx, attempts + 1, failure)?;
                    Err((*failure).clone())
                }
                None => Ok(lost.get(&client_seq).copied().unwrap_or(Outcome::Applied)),
            };
            if let Ok(outcome) = result {
                relieved |= attempts > 0;
                store.record_outcome(tx as u64, outcome)?;
            }
            settled.push(Settled { tx: tx as u64, result });
        }
        store
            .connection
            .prepare_cached(&format!(
                "UPDATE local_changes INDEXED BY local_changes_by_seq SET state = 'confirmed', next_attempt = NULL, \
                 last_error_code = NULL, last_error_rule = NULL, last_error = NULL WHERE seq > ?1 AND seq <= ?2 AND {OPEN}"
            ))
            .and_then(|mut statement| statement.execute(range))
            .during("settling changes")?;
        store.set_confirmed(confirmed.client_seq, Some(confirmed.run_id))?;
        held.sort_unstable();
        self.released |= if relieved { store.release()? } else { store.release_of(held)? };
        Ok(())
    }

    /// Records a rejection.
    fn reject(&self, tx: i64, attempts: u32, failure: &Failure) -> Result<(), StoreError> {
        let store = self.store;
        // A fresh UUID's last bits are random.
        let random = (store.session.uuid().as_u128() as u32) as f64 / (u64::from(u32::MAX) + 1) as f64;
        let wait = backoff::next_attempt(failure.code, attempts, store.max_attempts, random);
        let next = wait.map(|wait| (store.session.now() + wait * 1_000) as i64);
        store
            .connection
            .prepare_cached(&format!(
                "UPDATE local_changes SET state = ?2, attempts = ?3, next_attempt = ?4, last_error_code = ?5, last_error_rule = ?6, \
                 last_error = CASE WHEN change_id = ?7 OR NOT EXISTS \
                 (SELECT 1 FROM local_changes WHERE tx = ?1 AND change_id = ?7) THEN ?8 END WHERE tx = ?1 AND {OPEN}"
            ))
            .and_then(|mut statement| {
                statement.execute(params![
                    tx,
                    if next.is_some() { "retry_wait" } else { "error" },
                    attempts,
                    next,
                    failure.code.as_str(),
                    failure.rule,
                    failure.change_id.to_string(),
                    failure.message
                ])
            })
            .during("recording a failure")?;
        Ok(())
    }

    /// Makes the visible form of dirty rows anew; rows without changes under way need no base any more.
    pub fn finish(&mut self) -> Result<(), StoreError> {
        for (name, key) in std::mem::take(&mut self.dirty) {
            // A table that a newer schema dropped has no rows to show.
            let Some(table) = self.store.tables.get(&name) else { continue };
            let pending = self.pending(&name, &key)?;
            let Some(base) = self.base(&name, &key)? else { continue };
            let settled = pending.is_empty();
            if settled {
                // It shows again, perhaps behind the look for rows that a snapshot lacks.
                self.differ(table, &key)?;
            }
            self.show(table, &key, rebase::overlay(base, &pending, &table.table))?;
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

    /// The unsettled changes of a row, in the order in which they were made. Held ones are among them: the app's edit
    /// stays visible while it waits.
    fn pending(&self, table: &str, key: &str) -> Result<Vec<Pending>, StoreError> {
        type Found = (String, String, String, i64, Option<i64>, Option<String>);
        let rows: Vec<Found> = self
            .store
            .connection
            .prepare_cached(
                "SELECT op, columns, vals, stamp, seq, adds FROM local_changes INDEXED BY local_changes_live WHERE tbl = ?1 AND key = ?2 \
                 AND state <> 'confirmed' AND state NOT IN ('retry_wait', 'error') ORDER BY tx, id",
            )
            .and_then(|mut statement| {
                let row = |row: &rusqlite::Row<'_>| {
                    Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?, row.get(4)?, row.get(5)?))
                };
                statement.query_map([table, key], row)?.collect()
            })
            .during("reading changes under way")?;
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        let client_id = self.store.meta_uuid("client_id")?.unwrap_or_default();
        rows.into_iter()
            .map(|(op, columns, values, stamp, client_seq, adds)| {
                Ok(Pending {
                    op: operation(&op),
                    columns: parse(&columns, "list of columns")?,
                    values: parse(&values, "list of values")?,
                    adds: adds.map_or(Ok(Vec::new()), |adds| parse(&adds, "list of sums"))?,
                    // Without a number yet: it will have a higher one than any that the server knows.
                    clock: Clock {
                        stamp: stamp as u64,
                        client_id,
                        client_seq: client_seq.map_or(u64::MAX, |client_seq| client_seq as u64),
                        index: u32::MAX,
                    },
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

    pub fn visible(&self, table: &TableSql, key: &str) -> Result<Option<Image>, StoreError> {
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
