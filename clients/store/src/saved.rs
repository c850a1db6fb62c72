//! The unsent changes of a damaged store: the file that they are saved in. `import.rs` records them again.
//!
//! The file is JSON, by the fields of [`Saved`]:
//!
//! ```json
//! {
//!   "format": 1,
//!   "client_id": "0198c0de-…",
//!   "saved_at": 1764392400,
//!   "unreadable": 0,
//!   "transactions": [
//!     {
//!       "tx": 7, "client_seq": 9, "state": "pending", "recorded_at": 1764392399123456, "complete": true,
//!       "changes": [
//!         {
//!           "change_id": "0198c0de-…", "table": "tasks", "op": "update", "key": ["0198…"],
//!           "columns": ["title"], "values": ["Buy milk"], "stamp": 1764392399123457
//!         }
//!       ]
//!     }
//!   ]
//! }
//! ```
//!
//! Values are as on the wire: `null`, or the text that Postgres writes for them.

use std::collections::BTreeMap;
use std::path::Path;

use millstream_schemas::Change;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::error::encode;
use crate::salvage::Salvage;
use crate::states::EntryState;

/// The format that this version writes, and the newest that it reads.
const FORMAT: u32 = 1;
/// The unsent changes of a damaged store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    /// Version of the format: 1.
    pub format: u32,
    /// The client that recorded them, if that could be read.
    pub client_id: Option<Uuid>,
    /// When they were saved: seconds since 1970.
    pub saved_at: u64,
    /// Entries of the queue that were seen and could not be read.
    pub unreadable: u64,
    /// The transactions that were not settled, in the order in which they were made.
    pub transactions: Vec<SavedTransaction>,
}

/// A transaction of a damaged store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedTransaction {
    /// Its name in that store.
    pub tx: u64,
    /// Its `client_seq` there, if it had one.
    pub client_seq: Option<u64>,
    /// Where it stood. What was under way may have taken effect since.
    pub state: EntryState,
    /// When it was recorded: microseconds since 1970.
    pub recorded_at: u64,
    /// Nothing is missing, as far as can be told. Others are not recorded again; set this to have it done all the same.
    pub complete: bool,
    /// Its changes, in order.
    pub changes: Vec<Change>,
}

/// A saved file is of no use.
#[derive(Debug, thiserror::Error)]
pub enum SavedError {
    /// It could not be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// It is something else.
    #[error("{path} is not a file of saved changes, as a damaged store leaves them in <store>.unsent-<time>.json")]
    Format {
        /// The file.
        path: String,
        /// Why.
        source: serde_json::Error,
    },
    /// A newer version of the library wrote it.
    #[error("{path} has format {found}, this version knows up to {FORMAT}: upgrade the app")]
    TooNew {
        /// The file.
        path: String,
        /// Its format.
        found: u32,
    },
}

impl Saved {
    /// Reads a file.
    ///
    /// # Errors
    /// It cannot be read, is no such file, or is of a newer version.
    pub fn read(path: impl AsRef<Path>) -> Result<Saved, SavedError> {
        let name = || path.as_ref().display().to_string();
        let text = std::fs::read(&path).map_err(|source| SavedError::Read { path: name(), source })?;
        #[derive(Deserialize)]
        struct Format {
            format: u32,
        }
        let not_one = |source| SavedError::Format { path: name(), source };
        let Format { format } = serde_json::from_slice(&text).map_err(not_one)?;
        if format > FORMAT {
            return Err(SavedError::TooNew { path: name(), found: format });
        }
        serde_json::from_slice(&text).map_err(not_one)
    }

    pub(crate) fn to_json(&self) -> String {
        encode(self)
    }

    /// What is unsettled of what was left of a store.
    pub(crate) fn of(found: Salvage, saved_at: u64) -> Saved {
        let Salvage { entries, client_id, confirmed_seq, unreadable, last_id, .. } = found;
        // Ids rise by one: where one is missing, a change of its neighbours' transactions may be.
        let known = |id: i64| entries.contains_key(&id);
        let (first, last) = (entries.keys().next().copied(), entries.keys().next_back().copied());
        let last = last.max(last_id);
        let whole = |id: i64| (Some(id) == first || known(id - 1)) && (Some(id) == last || known(id + 1));
        let mut transactions: BTreeMap<u64, SavedTransaction> = BTreeMap::new();
        for (&id, entry) in &entries {
            let settled = entry.state == EntryState::Confirmed
                || entry.state.is_open()
                    && entry.client_seq.is_some_and(|client_seq| Some(client_seq) <= confirmed_seq);
            if settled {
                continue;
            }
            let transaction = transactions.entry(entry.tx).or_insert_with(|| SavedTransaction {
                tx: entry.tx,
                client_seq: entry.client_seq,
                state: entry.state,
                recorded_at: entry.recorded_at,
                complete: true,
                changes: Vec::new(),
            });
            transaction.complete &= whole(id);
            transaction.changes.push(entry.change.clone());
        }
        let transactions = transactions.into_values().collect();
        Saved { format: FORMAT, client_id, saved_at, unreadable, transactions }
    }
}
