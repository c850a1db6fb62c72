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
mod import;
mod inspection;
mod limits;
mod meta;
mod number;
mod parents;
mod perform;
mod queue;
mod read;
mod requeue;
mod rescue;
mod salvage;
mod saved;
mod schema;
mod snapshot;
mod spill;
mod statements;
mod states;
mod store;
mod territory;
mod value;
mod wal;
mod write;
mod written;

pub use apply::{Applied, Settled};
pub use damage::{Aside, Damage};
pub use error::StoreError;
pub use functions::Host;
pub use import::{ImportOutcome, Imported};
pub use limits::MAX_TRANSACTION_BYTES;
pub use meta::Info;
pub use number::Meeting;
pub use perform::Performing;
pub use queue::{FailedWrite, QueueEntry, Verdict};
pub use read::{Reader, Reads, Table};
pub use requeue::Edit;
pub use saved::{Saved, SavedError, SavedTransaction};
pub use states::{EntryState, Outcome};
pub use store::Store;
// For `fuzz`.
#[doc(hidden)]
pub use value::bound;
pub use write::{Recorded, Tx, Written};
