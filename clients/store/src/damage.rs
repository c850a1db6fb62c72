//! A damaged store, as the app is told of it.
//!
//! Opening looks at what shows damage at once and at the queue; [`Reader::check`](crate::Reader::check) looks at everything, in the
//! background; and whatever SQLite meets later tells, too (`inspection.rs`). Then the store's files are **put aside**
//! (`rescue.rs`): what the queue holds unsent is read as far as it goes and saved beside them as a [`Saved`](crate::Saved) file, and
//! the next opening makes a fresh store.
//!
//! A store that is locked, of a newer format, on a full disk or without permission is not damaged. Nor is a file damaged that shows
//! no sign of having been a store.

use std::io;
use std::path::PathBuf;

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
