//! What was rejected goes on: it is queued again, by itself or by hand, edited, or discarded.

use millstream_client_core::outbox::Entry;
use millstream_schemas::spelling::respelt;
use millstream_schemas::{Clocks, Operation, Value};
use rusqlite::params;
use uuid::Uuid;

use crate::apply::Applier;
use crate::error::{During, StoreError, encode};
use crate::queue::failed_change;
use crate::states::{FAILED, TROUBLED};
use crate::store::Store;

/// A new value for a column that a rejected change sets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Edit {
    /// The change; none: the one that failed.
    pub change_id: Option<Uuid>,
    /// The column, which clients may set; of the key only those of an insert stay as they are.
    pub column: String,
    /// The value, as Postgres writes it; of a column whose changes are added ([`Change::adds`](millstream_schemas::Change::adds)), the
    /// amount.
    pub value: Value,
}

impl Store {
    /// Queues a failed transaction again, with the same change ids; its attempts count from the start. It waits if an
    /// earlier transaction on the same rows waits.
    ///
    /// # Errors
    /// [`StoreError::NotFailed`]: there is no failed transaction of that number. Otherwise SQLite failed.
    pub fn retry(&mut self, tx: u64) -> Result<Option<Entry>, StoreError> {
        self.edit(tx, &[])
    }

    /// As [`Store::retry`], with other values for some columns.
    ///
    /// # Errors
    /// Those of [`Store::retry`], and [`StoreError::Edit`]: the transaction has no such change, or clients may not set the column.
    pub fn edit(&mut self, tx: u64, edits: &[Edit]) -> Result<Option<Entry>, StoreError> {
        let client_seq = self.unhindered(|store| {
            let keys = store.keys(tx, FAILED)?;
            if !edits.is_empty() {
                store.meet_stamps()?;
                store.meet_clocks(&keys)?;
                for edit in edits {
                    let edited = store.change_value(tx, edit)?;
                    store.restamp_from(edited)?;
                }
                store.keep_stamp()?;
            }
            let client_seq = store.requeue(tx, true)?;
            // What is behind it goes on too: if this one is refused again, the server refuses those.
            store.release()?;
            Ok::<_, StoreError>(client_seq)
        })?;
        match client_seq {
            Some(client_seq) => Ok(self.entries_after(client_seq - 1, 1)?.pop()),
            None => Ok(None),
        }
    }

    /// Whoever edits has seen the rows as they are: the edit is newer than their newest columns.
    fn meet_clocks(&self, keys: &[(String, String)]) -> Result<(), StoreError> {
        let applier = Applier::new(self)?;
        for (name, key) in keys {
            let Some(table) = self.tables.get(name) else { continue };
            let Some(clocks) = table.table.clocks else { continue };
            let row = applier.visible(table, key)?;
            if let Some(Some(text)) = row.and_then(|mut row| row.remove(&table.table.columns[clocks].name)) {
                self.session.observe(Clocks::parse(&text).newest().stamp);
            }
        }
        Ok(())
    }

    /// Gives the entry's id.
    fn change_value(&self, tx: u64, edit: &Edit) -> Result<i64, StoreError> {
        let refuse = |what: String| StoreError::Edit { tx, what };
        let raws = self.select(&format!("WHERE tx = ?1 AND {FAILED} ORDER BY id"), [tx as i64])?;
        let wanted = edit.change_id.or_else(|| failed_change(&raws));
        let raw = raws.into_iter().find(|raw| Some(raw.entry.change.change_id) == wanted);
        let mut change = raw.map(|raw| raw.entry.change).ok_or_else(|| refuse("it has no such change".into()))?;
        let table = self.table(&change.table)?;
        let known = table.table.column(&edit.column);
        let (name, column) =
            (&edit.column, known.ok_or_else(|| refuse(format!("there is no column {}", edit.column)))?);
        if change.op == Operation::Delete {
            return Err(refuse("a delete sets no column".into()));
        }
        if !table.table.columns[column].writable || table.table.key.contains(&column) {
            return Err(refuse(format!("the column {name} cannot be changed")));
        }
        let sql_type = &table.table.columns[column].r#type;
        let value = edit.value.as_ref().map(|text| respelt(sql_type, text).into_owned());
        match change.columns.iter().position(|column| column == name) {
            Some(place) => change.values[place] = value,
            None => {
                change.columns.push(name.clone());
                change.values.push(value);
            }
        }
        self.connection
            .prepare_cached("UPDATE local_changes SET columns = ?2, vals = ?3 WHERE change_id = ?1 RETURNING id")
            .and_then(|mut statement| {
                let id = change.change_id.to_string();
                statement.query_row(params![id, encode(&change.columns), encode(&change.values)], |row| row.get(0))
            })
            .during("editing a change")
    }

    /// An edit is made now; what was recorded later on the same row, in its transaction too, stays later.
    fn restamp_from(&self, edited: i64) -> Result<(), StoreError> {
        let later: Vec<i64> = self
            .connection
            .prepare_cached(
                "SELECT e.id FROM local_changes AS mine, local_changes AS e INDEXED BY local_changes_live \
                 WHERE mine.id = ?1 AND e.tbl = mine.tbl AND e.key = mine.key AND e.state <> 'confirmed' \
                 AND (e.tx, e.id) >= (mine.tx, mine.id) ORDER BY e.tx, e.id",
            )
            .and_then(|mut statement| statement.query_map([edited], |row| row.get(0))?.collect())
            .during("reading later changes")?;
        for id in later {
            self.connection
                .prepare_cached("UPDATE local_changes SET stamp = ?2 WHERE id = ?1")
                .and_then(|mut statement| statement.execute([id, self.session.next_stamp() as i64]))
                .during("keeping later changes later")?;
        }
        Ok(())
    }

    /// Queues those failed transactions again whose time has come. True: there were some.
    ///
    /// # Errors
    /// SQLite failed.
    pub fn retry_due(&mut self) -> Result<bool, StoreError> {
        let now = self.session.now() as i64;
        let due: Vec<i64> = self
            .connection
            .prepare_cached(&format!(
                "SELECT DISTINCT tx FROM local_changes INDEXED BY local_changes_troubled \
                 WHERE {TROUBLED} AND state = 'retry_wait' AND next_attempt <= ?1 ORDER BY tx"
            ))
            .and_then(|mut statement| statement.query_map([now], |row| row.get(0))?.collect())
            .during("reading due retries")?;
        if due.is_empty() {
            return Ok(false);
        }
        self.unhindered(|store| due.iter().try_for_each(|tx| store.requeue(*tx as u64, false).map(drop)))?;
        Ok(true)
    }

    /// Shows a failed transaction's changes again and gives it the next number, if none waits before it.
    fn requeue(&self, tx: u64, by_hand: bool) -> Result<Option<u64>, StoreError> {
        let keys = self.keys(tx, FAILED)?;
        let mut applier = Applier::new(self)?;
        for (table, key) in &keys {
            applier.keep_base(table, key)?;
        }
        self.connection
            .prepare_cached(
                "UPDATE local_changes SET next_attempt = NULL, attempts = iif(?2, 0, attempts), last_error = iif(?2, NULL, last_error), \
                 last_error_code = iif(?2, NULL, last_error_code), last_error_rule = iif(?2, NULL, last_error_rule) WHERE tx = ?1",
            )
            .and_then(|mut statement| statement.execute(params![tx as i64, by_hand]))
            .during("queueing again")?;
        let client_seq = self.number(tx)?;
        applier.finish()?;
        Ok(client_seq)
    }

    /// Forgets a failed or held transaction; its rows show the server's state.
    ///
    /// # Errors
    /// [`StoreError::NotFailed`]: the transaction is neither rejected nor held back. Otherwise SQLite failed.
    pub fn discard(&mut self, tx: u64) -> Result<(), StoreError> {
        const WAITING: &str = "state IN ('retry_wait', 'error', 'held')";
        self.unhindered(|store| {
            let keys = store.keys(tx, WAITING)?;
            store.keep_last_tx()?;
            store
                .connection
                .execute(&format!("DELETE FROM local_changes WHERE tx = ?1 AND {WAITING}"), [tx as i64])
                .during("discarding a transaction")?;
            let mut applier = Applier::new(store)?;
            applier.dirty.extend(keys);
            applier.finish()?;
            store.release().map(drop)
        })
    }
}
