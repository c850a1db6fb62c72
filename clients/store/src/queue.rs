//! The queue `local_changes`: reading it, retrying, discarding, pruning, and going back with the server.

use std::collections::BTreeMap;

use millstream_schemas::frame::Submit;
use millstream_schemas::{Change, Code, Value};
use rusqlite::{Row, params};
use serde::Serialize;
use uuid::Uuid;

use crate::apply::{Applier, operation};
use crate::error::{During, parse};
use crate::{Recorded, Store, StoreError};

/// Attempts at a transaction that a business rule refuses, before it waits for a person.
pub const MAX_ATTEMPTS: u32 = 5;
/// Bound of the first wait between attempts, in microseconds; doubles.
const ATTEMPT_BASE_MICROS: u64 = 1_000_000;

/// State of an entry of the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum EntryState {
    /// Recorded.
    Pending,
    /// Sent.
    Sending,
    /// On the broker.
    Accepted,
    /// Rejected; tried again by itself.
    RetryWait,
    /// Rejected; waits for a person.
    Error,
    /// Held back.
    Held,
    /// Settled; kept for the retention time.
    Confirmed,
}

impl EntryState {
    fn parse(word: &str) -> Self {
        // The table's CHECK admits no other word.
        match word {
            "pending" => EntryState::Pending,
            "sending" => EntryState::Sending,
            "accepted" => EntryState::Accepted,
            "retry_wait" => EntryState::RetryWait,
            "error" => EntryState::Error,
            "held" => EntryState::Held,
            _ => EntryState::Confirmed,
        }
    }
}

/// One change in the queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct QueueEntry {
    /// `client_seq` of its transaction.
    pub seq: u64,
    /// The change.
    pub change: Change,
    /// Values before it: of the changed columns, or the deleted row; JSON.
    pub previous: Option<String>,
    /// Where it stands.
    pub state: EntryState,
    /// Verdicts against it so far.
    pub attempts: u32,
    /// When it is tried again: microseconds since 1970.
    pub next_attempt: Option<u64>,
    /// Code of the last verdict against it.
    pub error_code: Option<String>,
    /// Text of the last verdict against it; only on the change that failed.
    pub error: Option<String>,
    /// When it was recorded: microseconds since 1970.
    pub recorded_at: u64,
}

/// A transaction that the server rejected.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FailedWrite {
    /// Its `client_seq`.
    pub seq: u64,
    /// `error` or `retry_wait`.
    pub state: EntryState,
    /// Why.
    pub code: Option<Code>,
    /// For people.
    pub message: String,
    /// The change that failed.
    pub change_id: Uuid,
    /// Verdicts against it so far.
    pub attempts: u32,
    /// When it is tried again: microseconds since 1970.
    pub next_attempt: Option<u64>,
    /// All changes of the transaction.
    pub changes: Vec<Change>,
}

/// What became of a transaction, as the store knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Not settled.
    Open,
    /// Done.
    Confirmed,
    /// Rejected.
    Failed(Box<FailedWrite>),
}

const COLUMNS: &str = "tx, change_id, tbl, key, op, columns, vals, stamp, previous, state, attempts, next_attempt, \
                       last_error_code, last_error, recorded_at, traceparent";

struct Raw {
    entry: QueueEntry,
    traceparent: Option<String>,
}

struct Columns(Box<[String; 5]>, i64, QueueEntryRest);
type QueueEntryRest =
    (i64, Option<String>, String, i64, Option<i64>, Option<String>, Option<String>, i64, Option<String>);

fn columns(row: &Row<'_>) -> rusqlite::Result<Columns> {
    Ok(Columns(
        Box::new([row.get(1)?, row.get(2)?, row.get(3)?, row.get(5)?, row.get(6)?]),
        row.get(0)?,
        (
            row.get(7)?,
            row.get(8)?,
            row.get(9)?,
            row.get(10)?,
            row.get(11)?,
            row.get(12)?,
            row.get(13)?,
            row.get(14)?,
            row.get(15)?,
        ),
    ))
}

/// Wall-clock time of the next attempt: exponential, the upper half of each wait jittered by a fresh UUID's random bits.
pub(crate) fn next_attempt_at(store: &Store, attempts: u32) -> u64 {
    let wait = ATTEMPT_BASE_MICROS << attempts.saturating_sub(1).min(16);
    let random = store.session.uuid().as_u128() as u64 % (wait / 2 + 1);
    store.session.now() + wait / 2 + random
}

impl Store {
    fn select(&self, suffix: &str, params: impl rusqlite::Params) -> Result<Vec<Raw>, StoreError> {
        let sql = format!("SELECT {COLUMNS}, op FROM local_changes {suffix}");
        let rows: Vec<(Columns, String)> = self
            .connection
            .prepare_cached(&sql)
            .and_then(|mut statement| statement.query_map(params, |row| Ok((columns(row)?, row.get(16)?)))?.collect())
            .during("reading the queue")?;
        rows.into_iter().map(|(columns, op)| raw(columns, &op)).collect()
    }

    /// Unsettled transactions after `after` by rising number, with the time they were recorded; at most `limit`.
    pub(crate) fn submits(&self, after: u64, limit: usize) -> Result<Vec<(Submit, u64)>, StoreError> {
        let raws = self.select(
            // By number, not by state: the index of open entries would be read whole.
            "INDEXED BY local_changes_by_tx WHERE tx > ?1 AND state IN ('pending', 'sending', 'accepted') AND tx <= (SELECT max(tx) FROM \
             (SELECT DISTINCT tx FROM local_changes INDEXED BY local_changes_by_tx \
             WHERE tx > ?1 AND state IN ('pending', 'sending', 'accepted') ORDER BY tx LIMIT ?2)) ORDER BY tx, id",
            params![after as i64, limit as i64],
        )?;
        let mut submits: Vec<(Submit, u64)> = Vec::new();
        for Raw { entry, traceparent } in raws {
            match submits.last_mut() {
                Some((submit, _)) if submit.seq == entry.seq => submit.changes.push(entry.change),
                _ => submits.push((
                    Submit {
                        seq: entry.seq,
                        attempt: entry.attempts + 1,
                        instance: Uuid::nil(),
                        previous: None,
                        after: Vec::new(),
                        changes: vec![entry.change],
                        traceparent,
                    },
                    entry.recorded_at,
                )),
            }
        }
        Ok(submits)
    }

    /// Unsettled transactions after `after` by rising number; at most `limit`.
    pub fn pending(&self, after: u64, limit: usize) -> Result<Vec<Submit>, StoreError> {
        Ok(self.submits(after, limit)?.into_iter().map(|(submit, _)| submit).collect())
    }

    /// The newest entries of the queue, settled ones included, newest last; at most `limit`.
    pub fn entries(&self, limit: usize) -> Result<Vec<QueueEntry>, StoreError> {
        let mut raws = self.select("ORDER BY id DESC LIMIT ?1", params![limit as i64])?;
        raws.reverse();
        Ok(raws.into_iter().map(|raw| raw.entry).collect())
    }

    /// The rejected transactions, oldest first.
    pub fn failed(&self) -> Result<Vec<FailedWrite>, StoreError> {
        let raws = self.select("WHERE state IN ('retry_wait', 'error') ORDER BY tx, id", [])?;
        Ok(failed(raws))
    }

    /// What became of a transaction.
    pub fn verdict(&self, seq: u64) -> Result<Verdict, StoreError> {
        if seq > self.confirmed_seq().during("reading confirmed_seq")? {
            return Ok(Verdict::Open);
        }
        let raws = self.select("WHERE tx = ?1 AND state IN ('retry_wait', 'error') ORDER BY id", [seq as i64])?;
        Ok(failed(raws).pop().map_or(Verdict::Confirmed, |failed| Verdict::Failed(Box::new(failed))))
    }

    /// Queues a failed transaction again, with the same change ids, as a new transaction.
    pub fn retry(&mut self, seq: u64) -> Result<Recorded, StoreError> {
        let new = self.transact(|store| store.requeue(seq, true))?;
        self.recorded_after(new - 1, 1)?.pop().ok_or(StoreError::NotFailed(seq))
    }

    /// Queues those failed transactions again whose time has come.
    pub fn retry_due(&mut self) -> Result<Vec<Recorded>, StoreError> {
        let now = self.session.now() as i64;
        let due: Vec<i64> = self
            .connection
            .prepare_cached(
                "SELECT DISTINCT tx FROM local_changes WHERE state = 'retry_wait' AND next_attempt <= ?1 ORDER BY tx",
            )
            .and_then(|mut statement| statement.query_map([now], |row| row.get(0))?.collect())
            .during("reading due retries")?;
        if due.is_empty() {
            return Ok(Vec::new());
        }
        let first = self.transact(|store| {
            let mut first = u64::MAX;
            for tx in &due {
                first = first.min(store.requeue(*tx as u64, false)?);
            }
            Ok::<_, StoreError>(first)
        })?;
        self.recorded_after(first - 1, due.len())
    }

    /// Gives a failed transaction the next number, and shows its changes again.
    fn requeue(&self, seq: u64, by_hand: bool) -> Result<u64, StoreError> {
        let keys = self.failed_keys(seq)?;
        let new = self.last_seq().during("reading the last number")? + 1;
        let mut applier = Applier::new(self)?;
        for (table, key) in &keys {
            applier.keep_base(table, key)?;
        }
        self.connection
            .prepare_cached(
                "UPDATE local_changes SET tx = ?2, state = 'pending', next_attempt = NULL, attempts = CASE WHEN ?3 THEN 0 ELSE attempts END \
                 WHERE tx = ?1 AND state IN ('retry_wait', 'error')",
            )
            .and_then(|mut statement| statement.execute(params![seq as i64, new as i64, by_hand]))
            .during("queueing again")?;
        applier.finish()?;
        Ok(new)
    }

    /// Forgets a failed transaction. Its rows show the server's state already.
    pub fn discard(&mut self, seq: u64) -> Result<(), StoreError> {
        self.transact(|store| {
            store.failed_keys(seq)?;
            store
                .connection
                .execute("DELETE FROM local_changes WHERE tx = ?1 AND state IN ('retry_wait', 'error')", [seq as i64])
                .during("discarding a transaction")?;
            Ok(())
        })
    }

    fn failed_keys(&self, seq: u64) -> Result<Vec<(String, String)>, StoreError> {
        let keys: Vec<(String, String)> = self
            .connection
            .prepare_cached(
                "SELECT DISTINCT tbl, key FROM local_changes WHERE tx = ?1 AND state IN ('retry_wait', 'error')",
            )
            .and_then(|mut statement| {
                statement.query_map([seq as i64], |row| Ok((row.get(0)?, row.get(1)?)))?.collect()
            })
            .during("reading a failed transaction")?;
        if keys.is_empty() { Err(StoreError::NotFailed(seq)) } else { Ok(keys) }
    }

    /// Removes settled entries recorded before `before` (microseconds since 1970); others are never removed.
    pub fn prune(&mut self, before: u64) -> Result<usize, StoreError> {
        self.connection
            .execute("DELETE FROM local_changes WHERE state = 'confirmed' AND recorded_at < ?1", [before as i64])
            .during("pruning the queue")
    }

    /// Notes what was sent and accepted. Written with the next batch or by [`Store::flush_marks`]: a mark is not worth
    /// an fsync, since whatever is sent twice is told apart by the server's ledger.
    pub fn mark(&mut self, sent: u64, accepted: u64) {
        self.marks = Some((sent, accepted));
    }

    /// Writes the marks that no batch has written.
    pub fn flush_marks(&mut self) -> Result<(), StoreError> {
        let Some((sent, accepted)) = self.marks.take() else { return Ok(()) };
        self.relaxed(|store| {
            store.transact(|store| {
                let confirmed = store.confirmed_seq().during("reading confirmed_seq")?;
                store.write_marks(sent, accepted, confirmed)
            })
        })
    }

    pub(crate) fn write_marks(&self, sent: u64, accepted: u64, confirmed: u64) -> Result<(), StoreError> {
        if sent.max(accepted) <= confirmed {
            return Ok(());
        }
        for (through, state, from) in [(accepted, "accepted", "'pending', 'sending'"), (sent, "sending", "'pending'")] {
            let sql = format!(
                "UPDATE local_changes INDEXED BY local_changes_by_tx SET state = '{state}' WHERE tx > ?1 AND tx <= ?2 AND state IN ({from})"
            );
            self.connection
                .prepare_cached(&sql)
                .and_then(|mut statement| statement.execute([confirmed as i64, through as i64]))
                .during("marking entries")?;
        }
        Ok(())
    }

    /// The server's ledger stands at `last_seq`, before what this store knows to be settled: the server was restored to an
    /// earlier point. Everything after it that is still in the queue is submitted again, in the old order.
    ///
    /// Numbers stay as they are, unless some are missing: then the rest moves up, because the ledger admits no gap.
    pub fn rewind(&mut self, last_seq: u64) -> Result<(), StoreError> {
        self.transact(|store| {
            let rows: Vec<(i64, String, String)> = store
                .connection
                .prepare_cached("SELECT tx, tbl, key FROM local_changes WHERE tx > ?1 ORDER BY tx, id")
                .and_then(|mut statement| {
                    statement.query_map([last_seq as i64], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?.collect()
                })
                .during("reading what the server lost")?;
            let mut applier = Applier::new(store)?;
            for (_, table, key) in &rows {
                applier.keep_base(table, key)?;
            }
            let numbers: BTreeMap<i64, ()> = rows.iter().map(|(tx, _, _)| (*tx, ())).collect();
            // Rising, and never above the old number: no two transactions ever share one.
            for (new, old) in (last_seq as i64 + 1..).zip(numbers.into_keys()) {
                store
                    .connection
                    .prepare_cached(
                        "UPDATE local_changes SET tx = ?2, state = 'pending', next_attempt = NULL WHERE tx = ?1",
                    )
                    .and_then(|mut statement| statement.execute([old, new]))
                    .during("queueing again")?;
            }
            store.set_meta("confirmed_seq", last_seq as i64)?;
            applier.finish()
        })
    }

    /// The server's ledger is ahead of everything this store ever recorded: this store is a copy or was restored, and
    /// the numbers it would use are taken. It goes on as a new installation; what is unsettled is numbered anew.
    pub fn become_new(&mut self) -> Result<(), StoreError> {
        self.transact(|store| {
            let open: Vec<i64> = store
                .connection
                .prepare_cached(
                    "SELECT DISTINCT tx FROM local_changes WHERE state IN ('pending', 'sending', 'accepted') ORDER BY tx",
                )
                .and_then(|mut statement| statement.query_map([], |row| row.get(0))?.collect())
                .during("reading the queue")?;
            // Settled and failed entries keep their place in the list, behind numbers that are never sent.
            store
                .connection
                .execute("UPDATE local_changes SET tx = -tx WHERE state NOT IN ('pending', 'sending', 'accepted') AND tx > 0", [])
                .during("setting settled entries aside")?;
            for (new, old) in (1i64..).zip(open) {
                store
                    .connection
                    .execute("UPDATE local_changes SET tx = ?2, state = 'pending' WHERE tx = ?1", [old, new])
                    .during("numbering anew")?;
            }
            store.set_meta("confirmed_seq", 0)?;
            store.set_meta("client_id", store.session.uuid().to_string())?;
            store.set_meta("instance", store.session.uuid().to_string())
        })
    }
}

fn raw(Columns(texts, tx, rest): Columns, op: &str) -> Result<Raw, StoreError> {
    let [change_id, table, key, columns, values] = *texts;
    let (stamp, previous, state, attempts, next_attempt, error_code, error, recorded_at, traceparent) = rest;
    let change = Change {
        change_id: change_id.parse().unwrap_or_default(),
        table,
        op: operation(op),
        key: parse::<Vec<Value>>(&key, "key")?,
        columns: parse(&columns, "list of columns")?,
        values: parse(&values, "list of values")?,
        stamp: stamp as u64,
    };
    let entry = QueueEntry {
        seq: tx.unsigned_abs(),
        change,
        previous,
        state: EntryState::parse(&state),
        attempts: attempts as u32,
        next_attempt: next_attempt.map(|at| at as u64),
        error_code,
        error,
        recorded_at: recorded_at as u64,
    };
    Ok(Raw { entry, traceparent })
}

fn failed(raws: Vec<Raw>) -> Vec<FailedWrite> {
    let mut writes: Vec<FailedWrite> = Vec::new();
    for Raw { entry, .. } in raws {
        if writes.last().is_none_or(|write| write.seq != entry.seq) {
            writes.push(FailedWrite {
                seq: entry.seq,
                state: entry.state,
                code: entry.error_code.as_deref().and_then(|code| code.parse().ok()),
                message: String::new(),
                change_id: entry.change.change_id,
                attempts: entry.attempts,
                next_attempt: entry.next_attempt,
                changes: Vec::new(),
            });
        }
        if let Some(write) = writes.last_mut() {
            if let Some(message) = entry.error
                && write.message.is_empty()
            {
                write.message = message;
                write.change_id = entry.change.change_id;
            }
            write.changes.push(entry.change);
        }
    }
    writes
}
