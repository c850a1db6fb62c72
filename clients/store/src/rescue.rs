//! The files of a damaged store are put aside, and its unsent changes saved beside them.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rusqlite::{Connection, OpenFlags};

use crate::damage::{Aside, Damage};
use crate::error::StoreError;
use crate::functions::Host;
use crate::inspection::{FileId, beside, keep_log, length};
use crate::limits::BUSY_TIMEOUT_MS;
use crate::salvage;
use crate::saved::Saved;

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
