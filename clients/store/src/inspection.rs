//! How damage of a store is found out.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use millstream_client_core::format::LOCAL_CHANGES;
use rusqlite::Connection;
use rusqlite::config::DbConfig;

use crate::error::{During, StoreError};
use crate::wal;

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

pub(crate) fn length(path: &Path) -> u64 {
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
        let is_own = found.contains(LOCAL_CHANGES) || found.contains("millstream_");
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
