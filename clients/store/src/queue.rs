//! The queue `local_changes`: its entries, as the app and the server are told of them.

use millstream_schemas::frame::Submit;
use millstream_schemas::{Change, Code};
use rusqlite::types::Type;
use rusqlite::{OptionalExtension, Row, params};
use serde::Serialize;
use uuid::Uuid;

use crate::error::{During, StoreError, parse};
use crate::states::{EntryState, FAILED, Outcome, TROUBLED, operation};
use crate::store::Store;

/// One change in the queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct QueueEntry {
    /// The local transaction; its name for good.
    pub tx: u64,
    /// Its `client_seq`: another one each time that it is sent anew after a rejection; none while it is held back.
    pub client_seq: Option<u64>,
    /// The change.
    pub change: Change,
    /// Values before it: of the changed columns, or the deleted row; JSON.
    pub previous: Option<String>,
    /// Where it stands.
    pub state: EntryState,
    /// How it took effect, once it is confirmed.
    pub outcome: Option<Outcome>,
    /// Verdicts against it so far.
    pub attempts: u32,
    /// When it is tried again: microseconds since 1970.
    pub next_attempt: Option<u64>,
    /// Code of the last verdict against it.
    pub error_code: Option<String>,
    /// The constraint, rule or validator that refused it.
    pub error_rule: Option<String>,
    /// Text of the last verdict against it; only on the change that failed.
    pub error: Option<String>,
    /// The transaction that it is held back for, if it is held.
    pub waits_for: Option<u64>,
    /// When it was recorded: microseconds since 1970.
    pub recorded_at: u64,
}

/// A transaction that the server rejected.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FailedWrite {
    /// The local transaction.
    pub tx: u64,
    /// `error` or `retry_wait`.
    pub state: EntryState,
    /// Why.
    pub code: Option<Code>,
    /// The constraint, rule or validator that refused it.
    pub rule: Option<String>,
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
    Confirmed(Outcome),
    /// Rejected.
    Failed(Box<FailedWrite>),
}

const COLUMNS: &str = "tx, seq, instance, change_id, tbl, key, op, columns, vals, stamp, previous, state, outcome, attempts, \
                       next_attempt, last_error_code, last_error_rule, last_error, recorded_at, traceparent, \
                       predecessors, adds, gone";

/// An entry, with what only the server is told.
pub(crate) struct Raw {
    pub entry: QueueEntry,
    run_id: Option<Uuid>,
    traceparent: Option<String>,
    /// A JSON array.
    predecessors: Option<String>,
}

/// What a damaged store holds in place of an id or a state: it must not pass for another one.
fn unreadable(column: usize) -> rusqlite::Error {
    rusqlite::Error::FromSqlConversionFailure(column, Type::Text, "an entry of the queue does not read back".into())
}

/// A row of [`COLUMNS`]; the JSON texts of key, columns, values and sums are read by [`decoded`].
fn raw(row: &Row<'_>) -> rusqlite::Result<(Raw, [String; 4])> {
    let id = |column: usize, text: String| text.parse::<Uuid>().map_err(|_| unreadable(column));
    let unsigned = |value: Option<i64>| value.map(|value| value as u64);
    let state = EntryState::parse(row.get_ref(11)?.as_str()?).ok_or_else(|| unreadable(11))?;
    let outcome = Outcome::parse(row.get::<_, Option<String>>(12)?.as_deref());
    let entry = QueueEntry {
        tx: row.get::<_, i64>(0)? as u64,
        client_seq: unsigned(row.get(1)?),
        change: Change {
            change_id: id(3, row.get(3)?)?,
            table: row.get(4)?,
            op: operation(row.get_ref(6)?.as_str()?),
            key: Vec::new(),
            columns: Vec::new(),
            values: Vec::new(),
            adds: Vec::new(),
            gone: row.get::<_, Option<i64>>(22)?.is_some(),
            stamp: row.get::<_, i64>(9)? as u64,
        },
        previous: row.get(10)?,
        state,
        outcome: (state == EntryState::Confirmed).then_some(outcome),
        attempts: row.get(13)?,
        next_attempt: unsigned(row.get(14)?),
        error_code: row.get(15)?,
        error_rule: row.get(16)?,
        error: row.get(17)?,
        waits_for: None,
        recorded_at: row.get::<_, i64>(18)? as u64,
    };
    let raw = Raw {
        entry,
        run_id: row.get::<_, Option<String>>(2)?.map(|text| id(2, text)).transpose()?,
        traceparent: row.get(19)?,
        predecessors: row.get(20)?,
    };
    let adds: Option<String> = row.get(21)?;
    Ok((raw, [row.get(5)?, row.get(7)?, row.get(8)?, adds.unwrap_or_else(|| "[]".to_owned())]))
}

fn decoded((mut raw, [key, columns, values, adds]): (Raw, [String; 4])) -> Result<Raw, StoreError> {
    raw.entry.change.key = parse(&key, "key")?;
    raw.entry.change.columns = parse(&columns, "list of columns")?;
    raw.entry.change.values = parse(&values, "list of values")?;
    raw.entry.change.adds = parse(&adds, "list of sums")?;
    Ok(raw)
}

impl Store {
    /// Reads entries; `suffix` is the SQL behind the table's name.
    pub(crate) fn select(&self, suffix: &str, params: impl rusqlite::Params) -> Result<Vec<Raw>, StoreError> {
        let sql = format!("SELECT {COLUMNS} FROM local_changes {suffix}");
        let rows: Vec<(Raw, [String; 4])> = self
            .connection
            .prepare_cached(&sql)
            .and_then(|mut statement| statement.query_map(params, raw)?.collect())
            .during("reading the queue")?;
        rows.into_iter().map(decoded).collect()
    }

    /// Numbered transactions after `after` that are not settled, by rising number; at most `limit`.
    ///
    /// # Errors
    /// SQLite failed.
    pub fn pending(&self, after: u64, limit: usize) -> Result<Vec<Submit>, StoreError> {
        // Behind what is confirmed, numbers have no gaps and all are open.
        let confirmed = self.confirmed_seq().during("reading confirmed_seq")?;
        let after = after.max(confirmed);
        let raws = self.select(
            "INDEXED BY local_changes_by_seq WHERE seq > ?1 AND seq <= ?2 ORDER BY seq, id",
            params![after as i64, (after + limit as u64) as i64],
        )?;
        let mut before = self.run_of(after)?;
        let mut submits: Vec<Submit> = Vec::new();
        for Raw { entry, run_id, traceparent, predecessors } in raws {
            let (client_seq, run_id) = (entry.client_seq.unwrap_or_default(), run_id.unwrap_or_default());
            match submits.last_mut() {
                Some(submit) if submit.client_seq == client_seq => submit.changes.push(entry.change),
                _ => {
                    submits.push(Submit {
                        client_seq,
                        attempt: entry.attempts + 1,
                        run_id,
                        previous: before.filter(|before| *before != run_id),
                        after: predecessors.map_or(Ok(Vec::new()), |text| self.unsettled(&text, confirmed))?,
                        changes: vec![entry.change],
                        traceparent,
                    });
                    before = Some(run_id);
                }
            }
        }
        Ok(submits)
    }

    /// The newest entries of the queue, settled ones included, newest last; at most `limit`.
    ///
    /// # Errors
    /// SQLite failed.
    pub fn entries(&self, limit: usize) -> Result<Vec<QueueEntry>, StoreError> {
        let mut raws = self.select("ORDER BY id DESC LIMIT ?1", params![limit as i64])?;
        raws.reverse();
        self.told(raws)
    }

    /// The entries of a transaction, in order; none if the queue does not have it (any more).
    ///
    /// # Errors
    /// SQLite failed.
    pub fn transaction(&self, tx: u64) -> Result<Vec<QueueEntry>, StoreError> {
        self.told(self.select("WHERE tx = ?1 ORDER BY id", [tx as i64])?)
    }

    /// Entries, with what those that are held wait for.
    fn told(&self, raws: Vec<Raw>) -> Result<Vec<QueueEntry>, StoreError> {
        let told = |mut entry: QueueEntry| {
            if entry.state == EntryState::Held {
                entry.waits_for = self.blocked_by(entry.tx)?;
            }
            Ok(entry)
        };
        raws.into_iter().map(|raw| told(raw.entry)).collect()
    }

    /// The rejected transactions, oldest first.
    ///
    /// # Errors
    /// SQLite failed.
    pub fn failed(&self) -> Result<Vec<FailedWrite>, StoreError> {
        let raws = self.select(&format!("WHERE {TROUBLED} AND {FAILED} ORDER BY tx, id"), [])?;
        Ok(failed(raws))
    }

    pub(crate) fn record_outcome(&self, tx: u64, outcome: Outcome) -> Result<(), StoreError> {
        if let Some(word) = outcome.as_str() {
            self.connection
                .prepare_cached("UPDATE local_changes SET outcome = ?2 WHERE tx = ?1")
                .and_then(|mut statement| statement.execute(params![tx as i64, word]))
                .during("recording an outcome")?;
        }
        Ok(())
    }

    /// What became of a transaction. One that is not in the queue any more is taken for applied.
    ///
    /// # Errors
    /// SQLite failed.
    pub fn verdict(&self, tx: u64) -> Result<Verdict, StoreError> {
        let raws = self.select("WHERE tx = ?1 ORDER BY id", [tx as i64])?;
        let outcome = match raws.first() {
            None => Outcome::Applied,
            Some(raw) => match (raw.entry.state, raw.entry.outcome) {
                (EntryState::Confirmed, outcome) => outcome.unwrap_or(Outcome::Applied),
                (EntryState::RetryWait | EntryState::Error, _) => {
                    return Ok(failed(raws).pop().map_or(Verdict::Open, |failed| Verdict::Failed(Box::new(failed))));
                }
                _ => return Ok(Verdict::Open),
            },
        };
        Ok(Verdict::Confirmed(outcome))
    }

    /// The rows that a transaction in these states writes.
    pub(crate) fn keys(&self, tx: u64, states: &str) -> Result<Vec<(String, String)>, StoreError> {
        let keys: Vec<(String, String)> = self
            .connection
            .prepare_cached(&format!("SELECT DISTINCT tbl, key FROM local_changes WHERE tx = ?1 AND {states}"))
            .and_then(|mut statement| statement.query_map([tx as i64], |row| Ok((row.get(0)?, row.get(1)?)))?.collect())
            .during("reading a transaction")?;
        if keys.is_empty() {
            let state = self.transaction(tx)?.first().map(|entry| entry.state);
            return Err(StoreError::NotFailed { tx, state });
        }
        Ok(keys)
    }

    /// Removes settled entries recorded before `before` (microseconds since 1970); others are never removed.
    ///
    /// # Errors
    /// SQLite failed.
    pub fn prune(&mut self, before: u64) -> Result<usize, StoreError> {
        self.transact(|store| {
            store.keep_last_tx()?;
            store
                .connection
                .execute("DELETE FROM local_changes WHERE state = 'confirmed' AND recorded_at < ?1", [before as i64])
                .during("pruning the queue")
        })
    }

    /// Notes what was sent and accepted. Written with the next batch or by [`Store::flush_marks`]: a mark is not worth
    /// an fsync, since whatever is sent twice is told apart by the server's ledger.
    pub fn mark(&mut self, sent: u64, accepted: u64) {
        self.marks = Some((sent, accepted));
    }

    /// Writes the marks that no batch has written.
    ///
    /// # Errors
    /// SQLite failed.
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
                "UPDATE local_changes INDEXED BY local_changes_by_seq SET state = '{state}' WHERE seq > ?1 AND seq <= ?2 AND state IN ({from})"
            );
            self.connection
                .prepare_cached(&sql)
                .and_then(|mut statement| statement.execute([confirmed as i64, through as i64]))
                .during("marking entries")?;
        }
        Ok(())
    }

    /// Run that numbered `client_seq`, as far as this store knows.
    pub(crate) fn run_of(&self, client_seq: u64) -> Result<Option<Uuid>, StoreError> {
        let own: Option<Option<String>> = self
            .connection
            .prepare_cached("SELECT instance FROM local_changes WHERE seq = ?1 LIMIT 1")
            .and_then(|mut statement| statement.query_row([client_seq as i64], |row| row.get(0)).optional())
            .during("reading a run")?;
        match own.flatten() {
            Some(text) => Ok(text.parse().ok()),
            None if client_seq == self.confirmed_seq().during("reading confirmed_seq")? => {
                self.meta_uuid("confirmed_instance")
            }
            None => Ok(None),
        }
    }
}

/// The change that failed: the one with a message, else the first.
pub(crate) fn failed_change(raws: &[Raw]) -> Option<Uuid> {
    let failed = raws.iter().find(|raw| raw.entry.error.is_some()).or(raws.first());
    failed.map(|raw| raw.entry.change.change_id)
}

fn failed(raws: Vec<Raw>) -> Vec<FailedWrite> {
    let mut writes: Vec<FailedWrite> = Vec::new();
    for Raw { entry, .. } in raws {
        if writes.last().is_none_or(|write| write.tx != entry.tx) {
            writes.push(FailedWrite {
                tx: entry.tx,
                state: entry.state,
                code: entry.error_code.as_deref().and_then(|code| code.parse().ok()),
                rule: entry.error_rule,
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
