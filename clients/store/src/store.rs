//! The writing connection: how a store is opened, brought up to date and closed.

use std::cell::Cell;
use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use millstream_client_core::{backoff, format};
use millstream_schemas::Schema;
use rusqlite::{Connection, OptionalExtension};
use uuid::Uuid;

use crate::error::{During, StoreError};
use crate::functions::{self, ConnectionState, Host};
use crate::inspection::{FileId, inspect, keep_log, look};
use crate::limits::{BUSY_TIMEOUT_MS, STATEMENTS};
use crate::rescue;
use crate::statements::Tables;

/// Between looks through the whole store, in microseconds.
const CHECK_INTERVAL: u64 = 24 * 3600 * 1_000_000;

/// The writing connection.
pub struct Store {
    pub(crate) connection: Connection,
    pub(crate) session: Arc<ConnectionState>,
    pub(crate) tables: Tables,
    pub(crate) schema: Option<Schema>,
    /// Tables written since [`Store::take_written`], filled by SQLite's update hook.
    pub(crate) written: Arc<Mutex<BTreeSet<String>>>,
    /// Tables that the hook does not name.
    pub(crate) watched: Watched,
    pub(crate) data_version: i64,
    /// The database's `schema_version` when the rules were last held against it.
    pub(crate) in_order: i64,
    /// Transactions are parts of one that is already open: see [`Store::group`].
    pub(crate) grouped: bool,
    /// Sent and accepted up to here, as far as the rows of `local_changes` do not say so yet.
    pub(crate) marks: Option<(u64, u64)>,
    /// Rejections by business rules before a transaction waits for a person.
    pub(crate) max_attempts: u32,
    /// Where the store is, and which file that is.
    pub(crate) place: Option<(PathBuf, FileId)>,
    /// The whole store has not been looked through for a while, or was not closed.
    pub(crate) check_due: bool,
    /// By what the staging area is this process's, since its session staged something: see `snapshot.rs`.
    pub(crate) staging: Cell<Option<Uuid>>,
}

/// What is known of the connection's writes.
#[derive(Default)]
pub(crate) struct Watched {
    /// The tables that the app's statements in the connection's cache can write: SQLite names them only while it compiles.
    pub(crate) effects: Mutex<HashMap<String, BTreeSet<String>>>,
    /// Rows that the connection had changed when it was asked last.
    pub(crate) changes: u64,
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
            Err(error) if error.is_damage() => Err(rescue::put_aside(&path, id, error, &*host)),
            result => result,
        }
    }

    fn open_sound(path: &Path, id: Option<FileId>, host: &Arc<dyn Host>) -> Result<Store, StoreError> {
        let unclean = look(path)?;
        let connection = Connection::open(path).during("opening the store")?;
        keep_log(&connection, true)?;
        let mut store = Store::new(connection, Arc::clone(host), |connection| inspect(connection, path, unclean))?;
        // The file that was there before: if it was moved meanwhile, the first write finds out.
        store.place = id.or_else(|| FileId::of(path)).map(|id| (path.to_owned(), id));
        let checked = store.meta_integer("checked_at")?.unwrap_or(0);
        store.check_due = unclean || checked.saturating_add(CHECK_INTERVAL) < host.now_micros();
        keep_log(&store.connection, false)?;
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

        let session = Arc::new(ConnectionState::new(host));
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
            staging: Cell::new(None),
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

    /// Whether a [`Reader`](crate::Reader) should [check](crate::Reader::check) the whole store.
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
        let closed = keep_log(&self.connection, true)
            .and_then(|()| Connection::open_in_memory().during("closing the store"))
            .map(|nothing| drop(std::mem::replace(&mut self.connection, nothing)));
        match closed {
            Ok(()) => rescue::put_aside(&path, Some(id), error, self.session.host()),
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
    if version()? == Some(format::STORE_VERSION) {
        return Ok(false);
    }
    let upgrade = || -> Result<(), StoreError> {
        // Under the lock: another process may have done it meanwhile.
        let found = version()?;
        if let Some(found) = found.filter(|found| *found > format::STORE_VERSION) {
            return Err(StoreError::TooNew { found, known: format::STORE_VERSION });
        }
        let upgrades = [
            format::UPGRADE_FROM_0,
            format::UPGRADE_FROM_1,
            format::UPGRADE_FROM_2,
            format::UPGRADE_FROM_3,
            format::UPGRADE_FROM_4,
            format::UPGRADE_FROM_5,
        ];
        for (version, upgrade) in (0..).zip(upgrades) {
            if found.is_some_and(|found| found <= version) {
                connection.execute_batch(upgrade).during("upgrading the store's tables")?;
            }
        }
        connection.execute_batch(format::STORE_TABLES).during("creating the store's tables")?;
        connection
            .execute(
                "INSERT OR REPLACE INTO millstream_meta (key, value) VALUES ('format', ?1)",
                [format::STORE_VERSION],
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
