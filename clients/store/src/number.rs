//! Which transaction has which number: holding back what must wait, and meeting a server whose ledger is elsewhere.
//!
//! A local transaction keeps its name `tx`. Its number `client_seq` says when it is sent: numbers have no gaps, and what is
//! sent has one. A transaction that writes a row on which an earlier one is in trouble, or refers to a row whose creation is, gets none
//! until that one is out of it; so the changes of one row take effect in the order in which they were made, retries included.

use std::collections::HashSet;

use millstream_schemas::frame::MAX_TRANSACTION_CHANGES;
use millstream_schemas::stream::{Loss, RunSpan};
use rusqlite::{OptionalExtension, params};
use uuid::Uuid;

use crate::apply::Applier;
use crate::error::{During, encode};
use crate::parents::MINE;
use crate::states::{OPEN, Outcome, TROUBLED};
use crate::{Store, StoreError};

/// How the server's ledger compares with the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meeting {
    /// They agree: go on behind it.
    Continue,
    /// The server was restored to an earlier point; what it lost is submitted again.
    WentBack,
    /// The server took other transactions under this client id: the store is a copy of another one, or was restored. It
    /// has a new identity now.
    NewIdentity,
}

impl Store {
    /// Whether a transaction has to wait for an earlier one.
    pub(crate) fn is_blocked(&self, tx: u64) -> Result<bool, StoreError> {
        let troubled: bool = self
            .connection
            .prepare_cached(&format!(
                "SELECT EXISTS (SELECT 1 FROM local_changes INDEXED BY local_changes_troubled WHERE {TROUBLED} AND tx < ?1)"
            ))
            .and_then(|mut statement| statement.query_row([tx as i64], |row| row.get(0)))
            .during("looking for transactions in trouble")?;
        Ok(troubled && self.blocked_by(tx)?.is_some())
    }

    /// The transaction that one is held back for: a rejected one on its rows or on what they refer to, else a held one.
    pub(crate) fn blocked_by(&self, tx: u64) -> Result<Option<u64>, StoreError> {
        let parents = self.parents(tx)?;
        self.connection
            .prepare_cached(&format!(
                "SELECT e.tx FROM {MINE} AS mine JOIN local_changes AS e INDEXED BY local_changes_live \
                 ON e.tbl = mine.tbl AND e.key = mine.key AND e.state <> 'confirmed' \
                 WHERE e.tx < ?1 AND (e.op = 'insert' OR NOT mine.refers) AND (e.attempts > 0 OR e.state = 'held') \
                 ORDER BY e.state = 'held', e.tx LIMIT 1"
            ))
            .and_then(|mut statement| statement.query_row(params![tx as i64, parents], |row| row.get(0)).optional())
            .map(|found: Option<i64>| found.map(|tx| tx as u64))
            .during("looking for what a transaction waits for")
    }

    /// Holds a transaction back.
    pub(crate) fn hold(&self, tx: u64) -> Result<(), StoreError> {
        self.connection
            .prepare_cached("UPDATE local_changes SET state = 'held', seq = NULL, instance = NULL WHERE tx = ?1 AND state <> 'held'")
            .and_then(|mut statement| statement.execute([tx as i64]))
            .during("holding a transaction back")?;
        Ok(())
    }

    /// Gives a transaction the next number, or holds it back.
    pub(crate) fn number(&self, tx: u64) -> Result<Option<u64>, StoreError> {
        if self.is_blocked(tx)? {
            self.hold(tx)?;
            return Ok(None);
        }
        let client_seq = self.last_seq().during("reading the last number")? + 1;
        self.connection
            .prepare_cached(
                "UPDATE local_changes SET state = 'pending', outcome = NULL, seq = ?2, instance = ?3, predecessors = NULL \
                 WHERE tx = ?1",
            )
            .and_then(|mut statement| {
                statement.execute(params![tx as i64, client_seq as i64, self.session.run_id().to_string()])
            })
            .during("numbering a transaction")?;
        self.put_behind(tx, client_seq)?;
        Ok(Some(client_seq))
    }

    /// Numbers those held transactions that need not wait any more. True: there were some.
    pub(crate) fn release(&self) -> Result<bool, StoreError> {
        let held = self.transactions(&format!(
            "INDEXED BY local_changes_troubled WHERE {TROUBLED} AND state = 'held' ORDER BY tx"
        ))?;
        self.release_of(held)
    }

    /// The same of these, which rise.
    pub(crate) fn release_of(&self, held: Vec<u64>) -> Result<bool, StoreError> {
        let mut released = false;
        for tx in held {
            released |= self.number(tx)?.is_some();
        }
        Ok(released)
    }

    /// Records what a transaction with a new number has to come after: the numbers of the nearest unsettled or failed ones
    /// before it that wrote its rows, or made what they refer to. Only of those recorded before it: one that is tried again has a higher number than a
    /// failed one that was made after it. Those may get other numbers later; under these the server has refused them.
    pub(crate) fn put_behind(&self, tx: u64, client_seq: u64) -> Result<(), StoreError> {
        let parents = self.parents(tx)?;
        let mut found: Vec<u64> = self
            .connection
            .prepare_cached(&format!(
                "SELECT (SELECT max(e.seq) FROM local_changes AS e INDEXED BY local_changes_live \
                 WHERE e.tbl = mine.tbl AND e.key = mine.key AND e.state <> 'confirmed' AND e.seq < ?3 AND e.tx < ?1 \
                 AND (e.op = 'insert' OR NOT mine.refers)) AS before FROM {MINE} AS mine ORDER BY mine.refers, before DESC"
            ))
            .and_then(|mut statement| {
                let row = |row: &rusqlite::Row<'_>| row.get::<_, Option<i64>>(0);
                statement.query_map(params![tx as i64, parents, client_seq as i64], row)?.collect()
            })
            .map(|found: Vec<Option<i64>>| found.into_iter().flatten().map(|client_seq| client_seq as u64).collect())
            .during("reading earlier transactions")?;
        if found.is_empty() {
            return Ok(());
        }
        // Those of its own rows first: there are never more of them than a transaction may name.
        let mut seen = HashSet::new();
        found.retain(|client_seq| seen.insert(*client_seq));
        found.truncate(MAX_TRANSACTION_CHANGES);
        found.sort_unstable();
        self.connection
            .prepare_cached(
                "UPDATE local_changes SET predecessors = ?2 WHERE id = (SELECT min(id) FROM local_changes WHERE tx = ?1)",
            )
            .and_then(|mut statement| statement.execute(params![tx as i64, encode(&found)]))
            .during("recording earlier transactions")?;
        Ok(())
    }

    /// Of recorded predecessors those that are not known to have been applied: the server need not look for the others.
    pub(crate) fn unsettled(&self, predecessors: &str, confirmed: u64) -> Result<Vec<u64>, StoreError> {
        self.connection
            .prepare_cached(
                "SELECT value FROM json_each(?1) WHERE value > ?2 \
                 OR NOT EXISTS (SELECT 1 FROM local_changes WHERE seq = value AND state = 'confirmed')",
            )
            .and_then(|mut statement| {
                statement
                    .query_map(params![predecessors, confirmed as i64], |row| Ok(row.get::<_, i64>(0)? as u64))?
                    .collect()
            })
            .during("reading earlier transactions")
    }

    /// Compares the server's ledger with the store, and follows it where they differ. The arguments are those of
    /// [`millstream_schemas::frame::Welcome`].
    ///
    /// # Errors
    /// SQLite failed.
    pub fn meet(
        &mut self,
        last_seq: u64,
        runs: &[RunSpan],
        failed: &[u64],
        lost: &[Loss],
    ) -> Result<Meeting, StoreError> {
        let confirmed = self.confirmed_seq().during("reading confirmed_seq")?;
        let own = self.run_of(last_seq)?;
        let theirs = submitted_by(runs, last_seq);
        let foreign = own.zip(theirs).is_some_and(|(own, theirs)| own != theirs);
        if foreign || last_seq > self.last_seq().during("reading the last number")? {
            self.become_new(last_seq, runs, failed, lost)?;
            Ok(Meeting::NewIdentity)
        } else if last_seq < confirmed {
            self.rewind(last_seq, theirs)?;
            Ok(Meeting::WentBack)
        } else {
            Ok(Meeting::Continue)
        }
    }

    /// The ledger stands before what this store knows to be settled. Everything after it that is still in the queue is
    /// submitted again, in the old order; what was rejected, too, for the server does not know that it was.
    ///
    /// Numbers and runs stay as they are, as far as there is no gap: the broker may still hold the old submissions, and
    /// what comes from there and from here has to be the same. Behind a gap (what was rejected was discarded, or has a higher
    /// number since) they are given anew, by another run: no two transactions ever have the same number and run.
    fn rewind(&mut self, last_seq: u64, run_id: Option<Uuid>) -> Result<(), StoreError> {
        self.unhindered(|store| {
            let again: Vec<(i64, i64)> = store
                .connection
                .prepare_cached("SELECT DISTINCT tx, seq FROM local_changes WHERE seq > ?1 ORDER BY seq")
                .and_then(|mut statement| {
                    statement.query_map([last_seq as i64], |row| Ok((row.get(0)?, row.get(1)?)))?.collect()
                })
                .during("reading what the server lost")?;
            let mut applier = Applier::new(store)?;
            for (tx, _) in &again {
                for (table, key) in store.keys(*tx as u64, "1")? {
                    applier.keep_base(&table, &key)?;
                }
            }
            store
                .connection
                .execute(
                    "UPDATE local_changes SET state = 'pending', outcome = NULL, attempts = 0, next_attempt = NULL WHERE seq > ?1",
                    [last_seq as i64],
                )
                .during("queueing again")?;
            store.set_confirmed(last_seq, run_id)?;
            let kept = again.iter().zip(last_seq as i64 + 1..).take_while(|((_, client_seq), next)| client_seq == next).count();
            store
                .connection
                .execute("UPDATE local_changes SET seq = NULL, instance = NULL WHERE seq > ?1", [(last_seq + kept as u64) as i64])
                .during("taking numbers back")?;
            if kept < again.len() {
                store.session.renew_run();
            }
            // Those before them were settled when they got their numbers, and are not any more.
            for (tx, client_seq) in &again[..kept] {
                store.put_behind(*tx as u64, *client_seq as u64)?;
            }
            for (tx, _) in &again[kept..] {
                store.number(*tx as u64)?;
            }
            // Rejected transactions are submitted again, so that none is in trouble.
            store.release()?;
            applier.finish()
        })
    }

    /// The numbers that this store would use are taken: it goes on as a new installation. What the ledger shows to have been
    /// submitted by this store's own runs (before it was copied), and not to have been rejected, is settled; the rest is
    /// numbered anew. So is what was settled and is not there any more: the server was restored, and another copy came first.
    fn become_new(&mut self, last_seq: u64, runs: &[RunSpan], failed: &[u64], lost: &[Loss]) -> Result<(), StoreError> {
        self.unhindered(|store| {
            let numbered: Vec<(i64, i64, Option<String>, bool)> = store
                .connection
                .prepare_cached(&format!(
                    "SELECT DISTINCT tx, seq, instance, state = 'confirmed' FROM local_changes \
                     WHERE seq IS NOT NULL AND (state = 'confirmed' OR {OPEN}) ORDER BY seq"
                ))
                .and_then(|mut statement| {
                    statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?)))?.collect()
                })
                .during("reading the queue")?;
            let mut applier = Applier::new(store)?;
            let mut rest = Vec::new();
            for (tx, client_seq, run_id, confirmed) in numbered {
                let (tx, client_seq) = (tx as u64, client_seq as u64);
                let own = run_id.and_then(|text| text.parse::<Uuid>().ok());
                let known = submitted_by(runs, client_seq);
                if confirmed {
                    // Of what lies further back, the server does not say who submitted it.
                    if client_seq > last_seq || (known.is_some() && known != own) {
                        for (table, key) in store.keys(tx, "1")? {
                            applier.keep_base(&table, &key)?;
                        }
                        store
                            .connection
                            .prepare_cached("UPDATE local_changes SET attempts = 0 WHERE tx = ?1")
                            .and_then(|mut statement| statement.execute([tx as i64]))
                            .during("queueing again")?;
                        rest.push(tx);
                    }
                    continue;
                }
                if client_seq > last_seq || failed.contains(&client_seq) || own.is_none() || known != own {
                    rest.push(tx);
                    continue;
                }
                applier.dirty.extend(store.keys(tx, OPEN)?);
                store
                    .connection
                    .prepare_cached("UPDATE local_changes SET state = 'confirmed' WHERE tx = ?1")
                    .and_then(|mut statement| statement.execute([tx as i64]))
                    .during("settling what was submitted before the copy")?;
                if let Some(loss) = lost.iter().find(|loss| loss.client_seq == client_seq) {
                    store.record_outcome(tx, Outcome::of(loss))?;
                }
            }
            store
                .connection
                .execute("UPDATE local_changes SET seq = NULL, instance = NULL", [])
                .during("taking numbers back")?;
            store.set_confirmed(0, None)?;
            store.set_meta("client_id", store.session.uuid().to_string())?;
            for tx in rest {
                store.number(tx)?;
            }
            store.release()?;
            applier.finish()
        })
    }

    pub(crate) fn set_confirmed(&self, client_seq: u64, run_id: Option<Uuid>) -> Result<(), StoreError> {
        self.set_meta("confirmed_seq", client_seq as i64)?;
        self.set_meta("confirmed_instance", run_id.map(|run_id| run_id.to_string()))
    }

    fn transactions(&self, suffix: &str) -> Result<Vec<u64>, StoreError> {
        let mut found: Vec<u64> = self
            .connection
            .prepare_cached(&format!("SELECT tx FROM local_changes {suffix}"))
            .and_then(|mut statement| statement.query_map([], |row| row.get::<_, i64>(0))?.collect())
            .map(|found: Vec<i64>| found.into_iter().map(|tx| tx as u64).collect())
            .during("reading transactions")?;
        found.dedup();
        Ok(found)
    }
}

/// The run whose span covers a number.
fn submitted_by(runs: &[RunSpan], client_seq: u64) -> Option<Uuid> {
    runs.iter().rev().find(|span| span.first_seq <= client_seq).map(|span| span.run_id)
}
