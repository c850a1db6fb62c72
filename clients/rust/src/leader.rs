//! Which of the processes that share a store does the syncing: the one that holds an exclusive lock on `<path>-lock`.
//! The system releases the lock when the process ends, however it ends.

use std::fs::{File, OpenOptions, TryLockError};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Time between attempts to become the leader.
const RETRY: Duration = Duration::from_secs(1);

/// Held by the leader; dropping it gives leadership up.
pub(crate) struct Leadership(#[expect(dead_code, reason = "the open file is the lock")] File);

/// Waits until this process leads.
pub(crate) async fn lead(store: &Path) -> Leadership {
    let mut path = PathBuf::from(store).into_os_string();
    path.push("-lock");
    loop {
        match try_lead(Path::new(&path)) {
            Ok(Some(leadership)) => return leadership,
            Ok(None) => {}
            Err(error) => tracing::warn!(error.message = %error, "locking the store's lock file failed"),
        }
        tokio::time::sleep(RETRY).await;
    }
}

fn try_lead(path: &Path) -> std::io::Result<Option<Leadership>> {
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(path)?;
    match file.try_lock() {
        Ok(()) => Ok(Some(Leadership(file))),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_one_leader_and_a_successor() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("store-lock");
        let first = try_lead(&path).unwrap();
        assert!(first.is_some());
        assert!(try_lead(&path).unwrap().is_none());
        drop(first);
        assert!(try_lead(&path).unwrap().is_some());
    }
}
