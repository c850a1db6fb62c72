//! The app's transactions.

use millstream_client_core::outbox::Entry;
use millstream_client_core::territory;
use millstream_schemas::frame::{ClientFrame, MAX_TRANSACTION_CHANGES};
use rusqlite::types::Value;
use rusqlite::{Connection, params_from_iter};
use uuid::Uuid;

use crate::error::{During, encode};
use crate::inspection::FileId;
use crate::limits::MAX_TRANSACTION_BYTES;
use crate::read::{Table, query};
use crate::{Store, StoreError};

// Commented, so that the app's own `COMMIT` is not found in the statement cache, where it would pass the guard unseen.
const BEGIN: &str = "/* store */ BEGIN IMMEDIATE";
const COMMIT: &str = "/* store */ COMMIT";
const ROLLBACK: &str = "/* store */ ROLLBACK";

/// Most bytes of encoded transactions read at a time; one transaction may exceed it.
const READ_BYTES: usize = 4 * 1024 * 1024;
/// Transactions read by one query.
const READ_PAGE: usize = 32;

/// A committed transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written<T> {
    /// What the closure gave.
    pub value: T,
    /// What it left in the queue; none if it changed no synced row.
    pub recorded: Option<Recorded>,
}

/// A transaction that is in the queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recorded {
    /// The local transaction.
    pub tx: u64,
    /// When it was recorded, in microseconds since 1970.
    pub at: u64,
    /// Its number and `submit` frame; none while it is held back.
    pub entry: Option<Entry>,
}

/// The app's transaction under way.
pub struct Tx<'a> {
    store: &'a Store,
    depth: usize,
}

impl Tx<'_> {
    /// Executes one statement; gives the number of rows it changed.
    ///
    /// # Errors
    /// SQLite or the store's rules refuse the statement. The transaction goes on, unless it is [`StoreError::TransactionLost`].
    pub fn execute(&mut self, sql: &str, params: &[Value]) -> Result<usize, StoreError> {
        self.require_open()?;
        if territory::defines(sql) {
            return self.define(sql, params);
        }
        self.noted(self.store.noting(sql, |_| self.run(sql, params)).map_err(StoreError::statement))
    }

    /// SQLite may have ended the transaction with a statement that failed (`OR ROLLBACK`, a full disk): what follows would be one by itself.
    fn require_open(&self) -> Result<(), StoreError> {
        if self.store.connection.is_autocommit() { Err(StoreError::TransactionLost) } else { Ok(()) }
    }

    /// Executes a statement that makes, changes or drops something of the database, and holds it to the rules (`territory.rs`).
    fn define(&self, sql: &str, params: &[Value]) -> Result<usize, StoreError> {
        let store = self.store;
        if let Some((kind, name)) = territory::dropped(sql)
            && store.session.as_store(|| store.forget_aside(kind, &name))?
        {
            return Ok(0);
        }
        store.session.as_store(|| store.savepoint("SAVEPOINT millstream_definition"))?;
        // Not from the cache, where it would pass the guard unseen.
        let run = |connection: &Connection| connection.prepare(sql)?.execute(params_from_iter(params));
        let made = self.noted(store.noting(sql, run).map_err(StoreError::statement));
        let made = made.and_then(|made| store.require_order().map(|()| made));
        store.session.as_store(|| {
            if made.is_err() {
                store.savepoint("ROLLBACK TO millstream_definition")?;
            }
            store.savepoint("RELEASE millstream_definition")
        })?;
        made
    }

    fn run(&self, sql: &str, params: &[Value]) -> rusqlite::Result<usize> {
        let mut statement = self.store.connection.prepare_cached(sql)?;
        if statement.column_count() > 0 {
            // `INSERT … RETURNING` gives rows: run it to its end.
            let mut rows = statement.query(params_from_iter(params))?;
            let mut count = 0;
            while rows.next()?.is_some() {
                count += 1;
            }
            return Ok(count);
        }
        statement.execute(params_from_iter(params))
    }

    /// Notes damage, whatever the app makes of the error; says why the guard refused.
    fn noted<T>(&self, result: Result<T, StoreError>) -> Result<T, StoreError> {
        let error = match result {
            Err(error) => error,
            ok => return ok,
        };
        if error.is_damage() {
            self.store.session.note_damage();
        }
        let refused = self.store.session.take_refused();
        Err(refused.filter(|_| error.is_refusal()).map_or(error, StoreError::NotAllowed))
    }

    /// Reads, seeing the transaction's own writes.
    ///
    /// # Errors
    /// SQLite or the store's rules refuse the statement.
    pub fn query(&mut self, sql: &str, params: &[Value]) -> Result<Table, StoreError> {
        self.require_open()?;
        if territory::defines(sql) {
            return self.define(sql, params).map(|_| Table::default());
        }
        self.noted(self.store.noting(sql, |connection| query(connection, sql, params)))
    }

    /// Runs a part that can fail on its own: its writes and queue entries go when it does.
    ///
    /// # Errors
    /// The error of `part`; otherwise SQLite failed.
    pub fn savepoint<T, E: From<StoreError>>(
        &mut self,
        part: impl FnOnce(&mut Tx<'_>) -> Result<T, E>,
    ) -> Result<T, E> {
        self.require_open()?;
        let name = format!("millstream_{}", self.depth);
        let run = |sql: String| self.store.connection.execute_batch(&sql).map_err(StoreError::statement);
        run(format!("SAVEPOINT {name}"))?;
        let result = part(&mut Tx { store: self.store, depth: self.depth + 1 });
        if self.require_open().is_err() {
            // With the savepoint. The cause is better than "the transaction is gone", if there is one.
            return result.and(Err(StoreError::TransactionLost.into()));
        }
        if result.is_err() {
            run(format!("ROLLBACK TO {name}"))?;
        }
        run(format!("RELEASE {name}"))?;
        result
    }

    /// A new UUIDv7.
    pub fn uuid(&self) -> Uuid {
        self.store.session.uuid()
    }

    /// The connection, for what this type does not offer. Transactions and the store's own tables are out of bounds.
    pub fn connection(&self) -> &Connection {
        self.store.session.note_defined();
        &self.store.connection
    }
}

impl Store {
    /// Runs the app's transaction: its rows and their queue entries become durable together, or not at all.
    ///
    /// Its `client_seq` is the highest one plus one, read under SQLite's write lock; so numbers have no gaps whatever is
    /// rolled back, and processes that share the store never give out the same one. A transaction that writes a row with a
    /// rejected or held change under it gets none yet: it is held back.
    ///
    /// # Errors
    /// The error of `work`; [`StoreError::TooManyChanges`], [`StoreError::TooManyBytes`]; otherwise SQLite failed. Nothing was written then.
    pub fn write<T, E: From<StoreError>>(
        &mut self,
        traceparent: Option<&str>,
        work: impl FnOnce(&mut Tx<'_>) -> Result<T, E>,
    ) -> Result<Written<T>, E> {
        let store = &*self;
        store.transact(|store| {
            let tx = store.last_tx()? + 1;
            let client_seq = store.last_seq().during("reading the last number")? + 1;
            // Another process may have given out later stamps.
            store.meet_stamps()?;
            store.session.begin(tx, client_seq, traceparent);
            let result = work(&mut Tx { store, depth: 0 });
            store.session.end();
            if store.connection.is_autocommit() {
                // The cause is better than "the transaction is gone", if there is one.
                return result.and(Err(StoreError::TransactionLost.into()));
            }
            let defined = store.session.take_defined();
            let value = result?;
            if defined {
                store.require_order()?;
                store.note_all()?;
            }
            Ok(Written { value, recorded: store.recorded(tx, client_seq)? })
        })
    }

    /// What the transaction under way left in the queue, within the limits.
    pub(crate) fn recorded(&self, tx: u64, client_seq: u64) -> Result<Option<Recorded>, StoreError> {
        let (found, at): (i64, Option<i64>) = self
            .connection
            .prepare_cached("SELECT count(*), min(recorded_at) FROM local_changes WHERE tx = ?1")
            .and_then(|mut statement| statement.query_row([tx as i64], |row| Ok((row.get(0)?, row.get(1)?))))
            .during("counting changes")?;
        let Some(at) = at else { return Ok(None) };
        if found as usize > MAX_TRANSACTION_CHANGES {
            return Err(StoreError::TooManyChanges { found: found as usize });
        }
        self.put_behind(tx, client_seq)?;
        // Also of one that is to be held back: its size must not be found out when its time comes.
        let entry = self.entries_after(client_seq - 1, 1).map_err(|error| match error {
            StoreError::Sqlite { source: rusqlite::Error::Utf8Error(..), .. } => StoreError::NotUtf8,
            error => error,
        });
        let entry = entry?.pop();
        if let Some(Entry { text, .. }) = &entry
            && text.len() > MAX_TRANSACTION_BYTES
        {
            return Err(StoreError::TooManyBytes { found: text.len() });
        }
        let entry = if self.is_blocked(tx)? {
            self.hold(tx)?;
            None
        } else {
            entry
        };
        Ok(Some(Recorded { tx, at: at as u64, entry }))
    }

    /// Numbered transactions after `after` that are not settled, encoded, by rising number; at most `limit`, and fewer if
    /// they are large.
    ///
    /// # Errors
    /// SQLite failed.
    pub fn entries_after(&self, after: u64, limit: usize) -> Result<Vec<Entry>, StoreError> {
        let mut found: Vec<Entry> = Vec::new();
        let mut bytes = 0;
        while found.len() < limit && bytes < READ_BYTES {
            let from = found.last().map_or(after, |entry| entry.client_seq);
            let page = self.pending(from, READ_PAGE.min(limit - found.len()))?;
            if page.is_empty() {
                break;
            }
            for submit in page {
                let (client_seq, text) = (submit.client_seq, encode(&ClientFrame::Submit(submit)));
                bytes += text.len();
                found.push(Entry { client_seq, text });
            }
        }
        Ok(found)
    }

    /// Runs `work`, whose transactions share one commit: each still is whole or not at all, with a number of its own, but
    /// they wait for the disk together. None of them is durable before this returns, and all are lost if it fails.
    ///
    /// # Errors
    /// The commit failed: all transactions are lost.
    pub fn group<T>(&mut self, work: impl FnOnce(&mut Store) -> T) -> Result<T, StoreError> {
        self.run_cached(BEGIN, "beginning a transaction")?;
        self.require_place().map_err(|error| self.abandon(error))?;
        self.grouped = true;
        let value = work(self);
        self.grouped = false;
        if self.connection.is_autocommit() {
            return Err(StoreError::TransactionLost);
        }
        if let Err(error) = self.run_cached(COMMIT, "committing") {
            if !self.connection.is_autocommit() {
                self.run_cached(ROLLBACK, "rolling back")?;
            }
            return Err(error);
        }
        Ok(value)
    }

    /// Runs `work` in a transaction that takes the write lock at once; within a group, in a part of its transaction.
    pub(crate) fn transact<T, E: From<StoreError>>(&self, work: impl FnOnce(&Store) -> Result<T, E>) -> Result<T, E> {
        let (begin, commit, rollback) = match self.grouped {
            false => (BEGIN, COMMIT, ROLLBACK),
            true => ("SAVEPOINT millstream_part", "RELEASE millstream_part", "ROLLBACK TO millstream_part"),
        };
        self.run_cached(begin, "beginning a transaction")?;
        // Under the lock: whoever moved the file has let it go only now.
        let in_place = if self.grouped { Ok(()) } else { self.require_place() };
        let result = in_place.map_err(E::from).and_then(|()| work(self)).and_then(|value| {
            self.run_cached(commit, "committing")?;
            Ok(value)
        });
        if result.is_err() && !self.connection.is_autocommit() {
            self.run_cached(rollback, "rolling back")?;
            if self.grouped {
                self.run_cached(commit, "rolling back")?;
            }
        }
        result
    }

    /// Runs `work` with commits that do not wait for the disk. For what the server can send again: if a power cut takes
    /// such a commit, the store is at an earlier position, and catches up from there. The log is written in order, so
    /// the next write of the app makes everything before it durable too.
    pub(crate) fn relaxed<T>(
        &mut self,
        work: impl FnOnce(&mut Store) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        // Not cached: SQLite obeys this PRAGMA while it compiles it.
        let set = |store: &Store, level: &str| {
            store.connection.execute_batch(&format!("PRAGMA synchronous = {level}")).during("setting synchronous")
        };
        set(self, "NORMAL")?;
        let result = work(self);
        // Without this the app's next write would not be durable: so this failing fails all.
        set(self, "FULL")?;
        result
    }

    /// The store's file has to be where it was: what is written to one that was put aside is lost.
    pub(crate) fn require_place(&self) -> Result<(), StoreError> {
        match &self.place {
            Some((path, id)) if FileId::of(path) != Some(*id) => Err(StoreError::Moved),
            _ => Ok(()),
        }
    }

    fn abandon(&self, error: StoreError) -> StoreError {
        // The connection is of no use any more, whether this works or not.
        let _ = self.run_cached(ROLLBACK, "rolling back");
        error
    }

    fn run_cached(&self, sql: &str, operation: &'static str) -> Result<usize, StoreError> {
        self.connection.prepare_cached(sql).and_then(|mut statement| statement.execute([])).during(operation)
    }
}
