//! The local SQLite store: the app's tables, the queue `local_changes`, and the confirmed image of rows under way.
//!
//! One [`Store`] writes; any number of [`Reader`]s read. Other processes may open the same file: writers exclude each
//! other by SQLite's own lock, and [`Store::changed_elsewhere`] tells of their commits.
//!
//! Nothing here starts threads, sleeps or asks the system for the time or randomness: the [`Host`] brings them, so that
//! the same code runs natively and in a browser.
//!
//! **Durability**: `journal_mode=WAL, synchronous=FULL`, both asserted at open. A commit is on the disk when it returns.

#![warn(clippy::missing_errors_doc)]

mod apply;
mod aside;
mod damage;
mod error;
mod functions;
mod meta;
mod number;
mod parents;
mod queue;
mod read;
mod salvage;
mod saved;
mod schema;
mod snapshot;
mod spill;
mod territory;
mod value;
mod wal;
mod write;
mod written;

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use millstream_client_core::{backoff, trigger};
use millstream_schemas::Schema;
use rusqlite::{Connection, OptionalExtension};

pub use apply::{Applied, Settled};
pub use damage::{Aside, Damage};
pub use error::StoreError;
pub use functions::Host;
pub use meta::Info;
pub use number::Meeting;
pub use queue::{Edit, EntryState, FailedWrite, Outcome, QueueEntry, Verdict};
pub use read::{Reader, Reads, Table};
pub use saved::{ImportOutcome, Imported, Saved, SavedError, SavedTransaction};
pub use write::{MAX_TRANSACTION_BYTES, Recorded, Tx, Written};

// For `fuzz`.
#[doc(hidden)]
pub use value::bound;

use damage::FileId;
use error::During;
use functions::Session;
use schema::TableSql;
use written::Watched;

/// How long a write waits for another process's write, in milliseconds.
const BUSY_TIMEOUT_MS: u64 = 10_000;
/// Most prepared statements kept by a connection.
const STATEMENTS: usize = 256;
/// Between looks through the whole store, in microseconds.
const CHECK_INTERVAL: u64 = 24 * 3600 * 1_000_000;

/// The writing connection.
pub struct Store {
    connection: Connection,
    session: Arc<Session>,
    tables: HashMap<String, Arc<TableSql>>,
    schema: Option<Schema>,
    /// Tables written since [`Store::take_written`], filled by SQLite's update hook.
    written: Arc<Mutex<BTreeSet<String>>>,
    /// Tables that the hook does not name.
    watched: Watched,
    data_version: i64,
    /// The database's `schema_version` when the rules were last held against it.
    in_order: i64,
    /// Transactions are parts of one that is already open: see [`Store::group`].
    grouped: bool,
    /// Sent and accepted up to here, as far as the rows of `local_changes` do not say so yet.
    marks: Option<(u64, u64)>,
    /// Rejections by business rules before a transaction waits for a person.
    max_attempts: u32,
    /// Where the store is, and which file that is.
    place: Option<(PathBuf, FileId)>,
    /// The whole store has not been looked through for a while, or was not closed.
    check_due: bool,
}

impl Store {
    /// Opens or creates the store at `path`. One that is damaged is put aside, which [`StoreError::Damaged`] tells; the next opening
    /// makes a new one.
    ///
    /// # Errors
    /// [`StoreError::Damaged`], [`StoreError::TooNew`], [`StoreError::NotDurable`]; otherwise SQLite failed.
    pub fn open(path: &str, host: Arc<dyn Host>) -> Result<Store, StoreError> {
        if path.is_empty() || path.starts_with(':') || path.starts_with("file:") {
            // Names that mean something else to SQLite.
            return Store::with_connection(Connection::open(path).during("opening the store")?, host);
        }
        // As SQLite has it: its own files lie beside what a link leads to, wherever the process goes.
        let path = std::fs::canonicalize(path).or_else(|_| std::path::absolute(path)).unwrap_or_else(|_| path.into());
        let id = FileId::of(&path);
        match Store::open_sound(&path, id, &host) {
            Err(error) if error.is_damage() => Err(damage::put_aside(&path, id, error, &*host)),
            result => result,
        }
    }

    fn open_sound(path: &Path, id: Option<FileId>, host: &Arc<dyn Host>) -> Result<Store, StoreError> {
        let unclean = damage::look(path)?;
        let connection = Connection::open(path).during("opening the store")?;
        damage::keep_log(&connection, true)?;
        let mut store =
            Store::new(connection, Arc::clone(host), |connection| damage::inspect(connection, path, unclean))?;
        // The file that was there before: if it was moved meanwhile, the first write finds out.
        store.place = id.or_else(|| FileId::of(path)).map(|id| (path.to_owned(), id));
        let checked = store.meta_integer("checked_at")?.unwrap_or(0);
        store.check_due = unclean || checked.saturating_add(CHECK_INTERVAL) < host.now_micros();
        damage::keep_log(&store.connection, false)?;
        Ok(store)
    }

    /// Takes over a connection, which must be able to use WAL.
    ///
    /// # Errors
    /// [`StoreError::TooNew`], [`StoreError::NotDurable`]; otherwise SQLite failed.
    pub fn with_connection(connection: Connection, host: Arc<dyn Host>) -> Result<Store, StoreError> {
        Store::new(connection, host, |_| Ok(()))
    }

    fn new(
        connection: Connection,
        host: Arc<dyn Host>,
        inspect: impl FnOnce(&Connection) -> Result<(), StoreError>,
    ) -> Result<Store, StoreError> {
        connection
            .busy_timeout(std::time::Duration::from_millis(BUSY_TIMEOUT_MS))
            .during("setting the busy timeout")?;
        connection.set_prepared_statement_cache_capacity(STATEMENTS);
        require_durability(&connection)?;
        inspect(&connection)?;
        // `INSERT OR REPLACE` deletes the row that it replaces: only with this does the delete trigger see it.
        connection.pragma_update(None, "recursive_triggers", true).during("setting recursive_triggers")?;
        let upgraded = create_tables(&connection)?;

        let session = Arc::new(Session::new(host));
        functions::register(&connection, &session, true)?;
        let written = Arc::new(Mutex::new(BTreeSet::new()));
        let sink = Arc::clone(&written);
        connection
            .update_hook(Some(move |_, _: &str, table: &str, _| {
                let mut tables = sink.lock().unwrap_or_else(PoisonError::into_inner);
                if !tables.contains(table) {
                    tables.insert(table.to_owned());
                }
            }))
            .during("installing the update hook")?;

        let mut store = Store {
            connection,
            session,
            tables: HashMap::new(),
            schema: None,
            written,
            watched: Watched::default(),
            data_version: 0,
            in_order: 0,
            grouped: false,
            marks: None,
            max_attempts: backoff::MAX_ATTEMPTS,
            place: None,
            check_due: false,
        };
        store.prepare_identity()?;
        store.schema = store.meta_json("schema")?;
        store.index_tables();
        if upgraded {
            store.make_triggers()?;
        }
        functions::guard(&store.connection, &store.session)?;
        store.put_in_order()?;
        store.data_version = store.read_data_version()?;
        Ok(store)
    }

    /// Sets after how many rejections by business rules a transaction waits for a person.
    pub fn set_max_attempts(&mut self, attempts: u32) {
        self.max_attempts = attempts.max(1);
    }

    /// Whether a [`Reader`] should [check](Reader::check) the whole store.
    pub fn is_check_due(&self) -> bool {
        self.check_due
    }

    /// The whole store was checked, and is sound.
    ///
    /// # Errors
    /// SQLite failed.
    pub fn checked(&mut self) -> Result<(), StoreError> {
        self.check_due = false;
        let now = self.session.now();
        self.relaxed(|store| store.set_meta("checked_at", now as i64))
    }

    /// Whether a statement of the app's met damage, whatever the app made of that.
    pub fn has_met_damage(&self) -> bool {
        self.session.has_met_damage()
    }

    /// Closes the store, for `error` shows that it is damaged, and puts its files aside. Gives what there is to tell; nothing else
    /// works any more.
    pub fn put_aside(&mut self, error: StoreError) -> StoreError {
        let Some((path, id)) = self.place.take() else { return error };
        // Nothing may be written any more, not by closing either.
        let closed = damage::keep_log(&self.connection, true)
            .and_then(|()| Connection::open_in_memory().during("closing the store"))
            .map(|nothing| drop(std::mem::replace(&mut self.connection, nothing)));
        match closed {
            Ok(()) => damage::put_aside(&path, Some(id), error, self.session.host()),
            Err(_) => error,
        }
    }

    /// The installed schema.
    pub fn schema(&self) -> Option<&Schema> {
        self.schema.as_ref()
    }

    /// Whether another connection (another process) committed since the last call.
    ///
    /// # Errors
    /// [`StoreError::Moved`]; otherwise SQLite failed.
    pub fn changed_elsewhere(&mut self) -> Result<bool, StoreError> {
        self.require_place()?;
        let version = self.read_data_version()?;
        let changed = version != self.data_version;
        self.data_version = version;
        if changed {
            // It may have installed a newer schema.
            let schema: Option<Schema> = self.meta_json("schema")?;
            if schema.as_ref().map(|s| &s.version) != self.schema.as_ref().map(|s| &s.version) {
                self.schema = schema;
                self.index_tables();
                self.clear_temporary()?;
            }
        }
        Ok(changed)
    }

    fn read_data_version(&self) -> Result<i64, StoreError> {
        self.connection
            .prepare_cached("PRAGMA data_version")
            .and_then(|mut statement| statement.query_row([], |row| row.get(0)))
            .during("reading data_version")
    }
}

/// Creates the store's own tables, or brings those of an older version up to date. True: it did.
fn create_tables(connection: &Connection) -> Result<bool, StoreError> {
    let exists = |table: &str| {
        connection
            .query_row("SELECT EXISTS (SELECT 1 FROM sqlite_schema WHERE name = ?1)", [table], |row| {
                row.get::<_, bool>(0)
            })
            .during("looking for the store's tables")
    };
    // None: there is no store in the file yet.
    let version = || -> Result<Option<i64>, StoreError> {
        if !exists("millstream_meta")? {
            return Ok(None);
        }
        let format: Option<i64> = connection
            .query_row("SELECT value FROM millstream_meta WHERE key = 'format'", [], |row| row.get(0))
            .optional()
            .during("reading the store's version")?;
        let old = || connection.pragma_query_value(None, "user_version", |row| row.get(0));
        format.map_or_else(|| old().during("reading the store's version"), Ok).map(Some)
    };
    if version()? == Some(trigger::STORE_VERSION) {
        return Ok(false);
    }
    let upgrade = || -> Result<(), StoreError> {
        // Under the lock: another process may have done it meanwhile.
        let found = version()?;
        if let Some(found) = found.filter(|found| *found > trigger::STORE_VERSION) {
            return Err(StoreError::TooNew { found, known: trigger::STORE_VERSION });
        }
        let upgrades = [
            trigger::UPGRADE_FROM_0,
            trigger::UPGRADE_FROM_1,
            trigger::UPGRADE_FROM_2,
            trigger::UPGRADE_FROM_3,
            trigger::UPGRADE_FROM_4,
        ];
        for (version, upgrade) in (0..).zip(upgrades) {
            if found.is_some_and(|found| found <= version) {
                connection.execute_batch(upgrade).during("upgrading the store's tables")?;
            }
        }
        connection.execute_batch(trigger::STORE_TABLES).during("creating the store's tables")?;
        connection
            .execute(
                "INSERT OR REPLACE INTO millstream_meta (key, value) VALUES ('format', ?1)",
                [trigger::STORE_VERSION],
            )
            .map(drop)
            .during("storing the store's version")
    };
    connection.execute_batch("BEGIN IMMEDIATE").during("beginning a transaction")?;
    match upgrade() {
        Ok(()) => connection.execute_batch("COMMIT").during("committing").map(|()| true),
        Err(error) => {
            connection.execute_batch("ROLLBACK").during("rolling back")?;
            Err(error)
        }
    }
}

/// A store that loses committed writes in a power cut would break the first promise: refuse to run on one.
fn require_durability(connection: &Connection) -> Result<(), StoreError> {
    let mode: String = connection
        .pragma_update_and_check(None, "journal_mode", "WAL", |row| row.get(0))
        .during("setting journal_mode")?;
    if !mode.eq_ignore_ascii_case("wal") {
        return Err(StoreError::NotDurable { setting: "journal_mode", found: mode });
    }
    connection.pragma_update(None, "synchronous", "FULL").during("setting synchronous")?;
    let synchronous: i64 =
        connection.pragma_query_value(None, "synchronous", |row| row.get(0)).during("reading synchronous")?;
    if synchronous != 2 {
        return Err(StoreError::NotDurable { setting: "synchronous", found: synchronous.to_string() });
    }
    Ok(())
}
