//! A damaged store: how it is found out, and what is done about it.
//!
//! Opening looks at what shows damage at once and at the queue; [`Reader::check`](crate::Reader::check) looks at everything, in the
//! background; and whatever SQLite meets later tells, too. Then the store's files are **put aside**: what the queue holds unsent is
//! read as far as it goes and saved beside them as a [`Saved`] file, and the next opening makes a fresh store.
//!
//! A store that is locked, of a newer format, on a full disk or without permission is not damaged. Nor is a file damaged that shows
//! no sign of having been a store.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use millstream_client_core::trigger;
use rusqlite::config::DbConfig;
use rusqlite::ffi::SQLITE_CORRUPT_VTAB;
use rusqlite::{Connection, ErrorCode, OpenFlags};

use crate::error::During;
use crate::saved::Saved;
use crate::{BUSY_TIMEOUT_MS, Host, StoreError, salvage, wal};

/// Most entries of the queue, settled ones among them, that are looked at whenever a store is opened (8 µs each). Of a longer queue
/// they are after the process before ended without closing the store.
const MAX_CHECKED_ENTRIES: i64 = 20_000;
/// What SQLite's checks say of the content of tables and virtual tables, rather than of the file.
const OF_CONTENT: [&str; 5] = [
    "malformed inverted index",
    "unable to validate the inverted index",
    "In RTree ",
    "NULL value in ",
    "CHECK constraint failed in ",
];

/// A store was found damaged.
#[derive(Debug)]
pub struct Damage {
    /// The store.
    pub store: PathBuf,
    /// What showed it.
    pub cause: String,
    /// Where everything is now; or why nothing was moved.
    pub aside: Result<Aside, io::Error>,
}

/// Where the files of a damaged store are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Aside {
    /// The damaged file, with SQLite's own beside it, as there were any.
    pub damaged: PathBuf,
    /// The unsent changes, as far as they could be read; none: there were none to be found.
    pub saved: Option<PathBuf>,
    /// How many transactions these are.
    pub transactions: usize,
}

impl std::fmt::Display for Damage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Damage { store, cause, aside } = self;
        let store = store.display();
        match aside {
            Err(error) => write!(
                f,
                "the store {store} is damaged ({cause}) and could not be put aside ({error}): nothing was moved. Make room or give \
                 the permission that is missing, and open the store again"
            ),
            Ok(Aside { damaged, saved: None, .. }) => write!(
                f,
                "the store {store} was damaged ({cause}). It was put aside as {}; no unsent changes were found in it. Open the store \
                 again: it begins as a new client and gets its rows from the server",
                damaged.display()
            ),
            Ok(Aside { damaged, saved: Some(saved), transactions }) => write!(
                f,
                "the store {store} was damaged ({cause}). It was put aside as {}, and its unsent changes, {transactions} transactions, \
                 were saved in {}. Open the store again: it begins as a new client and gets its rows from the server. Then record \
                 the saved changes again, by Client::import or by: millstream client --store {store} queue import {}",
                damaged.display(),
                saved.display(),
                saved.display()
            ),
        }
    }
}

impl StoreError {
    /// Whether the error shows that the store's file is damaged.
    pub fn is_damage(&self) -> bool {
        let by_sqlite = |error: &rusqlite::Error| {
            let Some(found) = error.sqlite_error() else { return false };
            // What is inside a virtual table is the app's: a search index that does not fit its table is no damage of the store.
            matches!(found.code, ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase)
                && found.extended_code != SQLITE_CORRUPT_VTAB
        };
        match self {
            StoreError::Statement(source) => by_sqlite(source),
            // Of the store's own rows, whose types are known.
            StoreError::Sqlite { source, .. } => {
                use rusqlite::Error::{FromSqlConversionFailure, InvalidColumnType, Utf8Error};
                by_sqlite(source)
                    || matches!(source, FromSqlConversionFailure(..) | InvalidColumnType(..) | Utf8Error(..))
            }
            StoreError::Corrupt { .. } | StoreError::Inconsistent(_) => true,
            _ => false,
        }
    }

    /// The same error again, if it says that the store is of no use any more: it is to be closed, and opened again.
    pub fn lost(&self) -> Option<StoreError> {
        match self {
            StoreError::Damaged(damage) => Some(StoreError::Damaged(Arc::clone(damage))),
            StoreError::Moved => Some(StoreError::Moved),
            _ => None,
        }
    }
}

/// Which file a path leads to, where the system tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileId(Option<(u64, u64)>);

impl FileId {
    pub fn of(path: &Path) -> Option<FileId> {
        let metadata = fs::metadata(path).ok()?;
        #[cfg(unix)]
        let id = {
            use std::os::unix::fs::MetadataExt as _;
            Some((metadata.dev(), metadata.ino()))
        };
        #[cfg(not(unix))]
        let id = {
            let _ = metadata;
            None
        };
        Some(FileId(id))
    }
}

/// The store's path with something behind it.
pub(crate) fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    name.into()
}

fn length(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |metadata| metadata.len())
}

/// What shows before SQLite touches the files. SQLite takes an empty file for a new database and removes the log beside it. True: the
/// process before did not close the store, or another one has it open.
pub(crate) fn look(path: &Path) -> Result<bool, StoreError> {
    let log = length(&beside(path, "-wal")) > 0;
    if length(path) == 0 && log {
        return Err(StoreError::Inconsistent("its file is empty or gone, and its log is not".into()));
    }
    if path.exists() && length(path) == 0 && beside(path, "-lock").exists() {
        return Err(StoreError::Inconsistent("its file is empty".into()));
    }
    Ok(log)
}

/// What shows once SQLite has opened the file; `unclean` as [`look`] found.
pub(crate) fn inspect(connection: &Connection, path: &Path, unclean: bool) -> Result<(), StoreError> {
    let torn = || -> io::Result<bool> {
        let log = File::open(beside(path, "-wal"))?;
        Ok(wal::read(log, wal::PAGE_SIZE)?.is_some_and(|wal| wal.damaged))
    };
    if unclean && torn().unwrap_or(false) {
        // Not while another process writes it.
        connection.execute_batch("BEGIN IMMEDIATE").during("locking the store")?;
        let torn = torn();
        connection.execute_batch("ROLLBACK").during("unlocking the store")?;
        if torn.unwrap_or(false) {
            return Err(StoreError::Inconsistent("committed changes follow a damaged part of its log".into()));
        }
    }
    let exists = "SELECT EXISTS (SELECT 1 FROM sqlite_schema WHERE name = 'local_changes')";
    let exists: bool = connection.query_row(exists, [], |row| row.get(0)).during("looking for the store's tables")?;
    if !exists {
        return Ok(());
    }
    let entries: i64 = connection
        .query_row("SELECT coalesce(max(id) - min(id) + 1, 0) FROM local_changes", [], |row| row.get(0))
        .during("counting the queue")?;
    if unclean || entries <= MAX_CHECKED_ENTRIES {
        sound(connection, "PRAGMA integrity_check(local_changes)")?;
    }
    sound(connection, "PRAGMA integrity_check(millstream_meta)")
}

/// Runs one of SQLite's checks. What it says of the app's own constraints and virtual tables is no damage.
pub(crate) fn sound(connection: &Connection, check: &str) -> Result<(), StoreError> {
    let mut statement = connection.prepare(check).during("checking the store")?;
    let mut rows = statement.query([]).during("checking the store")?;
    while let Some(row) = rows.next().during("checking the store")? {
        let found: String = row.get(0).during("checking the store")?;
        let is_own = found.contains(trigger::LOCAL_CHANGES) || found.contains("millstream_");
        if found != "ok" && (is_own || !OF_CONTENT.iter().any(|start| found.starts_with(start))) {
            return Err(StoreError::Inconsistent(found));
        }
    }
    Ok(())
}

/// While this connection finds damage, closing it must not write the log into the database.
pub(crate) fn keep_log(connection: &Connection, keep: bool) -> Result<(), StoreError> {
    connection
        .set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, keep)
        .map(drop)
        .during("setting what closing does")
}

/// Puts the files of a damaged store aside. `id` is the file that was found damaged: another process may have been faster.
pub(crate) fn put_aside(path: &Path, id: Option<FileId>, error: StoreError, host: &dyn Host) -> StoreError {
    if FileId::of(path) != id {
        return StoreError::Moved;
    }
    // Other processes write on until they find the file gone, which they look for once they have the lock.
    let lock = lock(path);
    let cause = cause(&error);
    let aside = match move_files(path, id, host) {
        Ok(Some(aside)) => Ok(aside),
        // What it is, is not for us to say: so it stays.
        Ok(None) => return error,
        Err(failed) if failed.kind() == io::ErrorKind::NotFound && FileId::of(path) != id => return StoreError::Moved,
        Err(failed) => Err(failed),
    };
    drop(lock);
    StoreError::Damaged(Arc::new(Damage { store: path.to_owned(), cause, aside }))
}

fn cause(error: &StoreError) -> String {
    match std::error::Error::source(error) {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}

/// A connection that keeps other processes from writing, if the file still lets it.
fn lock(path: &Path) -> Option<Connection> {
    if length(path) == 0 {
        // SQLite would remove the log.
        return None;
    }
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags).ok()?;
    keep_log(&connection, true).ok()?;
    connection.busy_timeout(Duration::from_millis(BUSY_TIMEOUT_MS)).ok()?;
    // Damage that shows here does not keep the files from being moved.
    let _ = connection.execute_batch("BEGIN IMMEDIATE");
    Some(connection)
}

/// `None`: the file shows no sign of having been a store.
fn move_files(path: &Path, id: Option<FileId>, host: &dyn Host) -> io::Result<Option<Aside>> {
    // Of two processes that find the damage one goes first.
    let file = match File::open(path) {
        Ok(file) => Some(file),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error),
    };
    if let Some(file) = &file {
        file.lock()?;
        if FileId::of(path) != id {
            return Err(io::ErrorKind::NotFound.into());
        }
    }
    let log = beside(path, "-wal");
    let found = salvage::read(path, &log)?;
    if !found.is_store && !log.exists() && !beside(path, "-lock").exists() {
        return Ok(None);
    }
    let mut seconds = host.now_micros() / 1_000_000;
    let names =
        |seconds: u64| (beside(path, &format!(".damaged-{seconds}")), beside(path, &format!(".unsent-{seconds}.json")));
    while names(seconds).0.exists() || names(seconds).1.exists() || beside(&names(seconds).0, "-wal").exists() {
        seconds += 1;
    }
    let (damaged, unsent) = names(seconds);
    let saved = Saved::of(found, seconds);
    let transactions = saved.transactions.len();
    let saved = (transactions > 0 || saved.unreadable > 0).then_some(saved);
    if let Some(saved) = &saved {
        let mut file = OpenOptions::new().write(true).create_new(true).open(&unsent)?;
        let written = file.write_all(saved.to_json().as_bytes()).and_then(|()| file.sync_all());
        if let Err(error) = written {
            let _ = fs::remove_file(&unsent);
            return Err(error);
        }
    }
    // The database first: without it the log is found out by the next opening, but not the other way round.
    if file.is_some()
        && let Err(error) = fs::rename(path, &damaged)
    {
        let _ = fs::remove_file(&unsent);
        return Err(error);
    }
    for suffix in ["-wal", "-shm"] {
        match fs::rename(beside(path, suffix), beside(&damaged, suffix)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    // So that a power cut does not undo it. Some systems cannot.
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let _ = File::open(directory).and_then(|directory| directory.sync_all());
    Ok(Some(Aside { damaged, saved: saved.map(|_| unsent), transactions }))
}
