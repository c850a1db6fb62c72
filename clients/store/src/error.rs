//! What can go wrong in the store.

use std::sync::Arc;

use millstream_schemas::frame::MAX_TRANSACTION_CHANGES;
use rusqlite::ErrorCode;
use rusqlite::ffi::SQLITE_CORRUPT_VTAB;

use crate::damage::Damage;
use crate::limits::MAX_TRANSACTION_BYTES;
use crate::states::EntryState;

/// An error of the store. What failed was rolled back.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// SQLite failed at something that the store did.
    #[error("{operation} failed")]
    Sqlite {
        /// What the store was doing.
        operation: &'static str,
        /// Why it failed.
        source: rusqlite::Error,
    },
    /// SQLite refused the app's statement.
    #[error("the statement failed")]
    Statement(#[source] rusqlite::Error),
    /// A trigger refused the app's statement: a key change, or a column that clients may not set.
    #[error("{0}")]
    NotWritable(String),
    /// The store belongs to another user. What is in it is kept.
    #[error(
        "the store belongs to {owner}, not to {user}: what waits in it is {owner}'s, and is kept. Sign in as {owner}, or open another \
         store for {user}"
    )]
    Foreign {
        /// Whose it is.
        owner: String,
        /// Who wanted to use it.
        user: String,
    },
    /// Triggers of the app's fire one another without end.
    #[error(
        "too many levels of trigger recursion: a trigger that writes its own table fires itself here (recursive_triggers is on, since \
         the rows that REPLACE takes away have to be recorded). Let it fire for the columns that it does not write: AFTER UPDATE OF title, \
         body ON notes"
    )]
    TriggerRecursion,
    /// The server's schema has what SQLite cannot.
    #[error("{0}")]
    Schema(String),
    /// The app's statement would do what only the store may.
    #[error("not allowed: {0}")]
    NotAllowed(String),
    /// A text that was written is not UTF-8.
    #[error("a text is not valid UTF-8, and Postgres takes no other: keep such bytes in a column of type bytea")]
    NotUtf8,
    /// The transaction has more changes than one transaction may have.
    #[error("the transaction has {found} changes; the limit is {MAX_TRANSACTION_CHANGES}")]
    TooManyChanges {
        /// How many it has.
        found: usize,
    },
    /// The transaction is larger than one frame may be.
    #[error("the transaction takes {found} bytes encoded; the limit is {MAX_TRANSACTION_BYTES}")]
    TooManyBytes {
        /// How large it is.
        found: usize,
    },
    /// The closure's statements ended the transaction (`ON CONFLICT ROLLBACK`).
    #[error("a statement ended the transaction")]
    TransactionLost,
    /// The connection cannot give the durability that the queue needs.
    #[error("SQLite keeps {setting} at {found}: the queue would not survive a power cut")]
    NotDurable {
        /// The PRAGMA.
        setting: &'static str,
        /// Its value.
        found: String,
    },
    /// Something stored does not read back.
    #[error("the stored {what} does not read back")]
    Corrupt {
        /// Which value.
        what: &'static str,
        /// Why.
        source: serde_json::Error,
    },
    /// The store's file is inconsistent in itself.
    #[error("the store's file is inconsistent: {0}")]
    Inconsistent(String),
    /// The store was damaged. Its files were put aside; the message says where they are and what to do.
    #[error("{0}")]
    Damaged(Arc<Damage>),
    /// The store's file is not where it was when it was opened.
    #[error(
        "the store's file was moved, removed or replaced while it was open: another process may have found it damaged and put it aside \
         as <store>.damaged-<time>. Close the client and open the store again"
    )]
    Moved,
    /// A saved transaction does not apply.
    #[error("{0}")]
    Import(String),
    /// The server sent rows of a table that the schema does not have.
    #[error("the server sent rows of \"{0}\", which the schema does not have")]
    UnknownTable(String),
    /// The server sent a row that does not fit the schema.
    #[error("the server sent a row of \"{table}\" that does not fit the schema: {what}")]
    RowShape {
        /// The table.
        table: String,
        /// What does not fit.
        what: &'static str,
    },
    /// The schema has a table that the store needs for itself.
    #[error("\"{0}\" is a name that the store needs for itself")]
    ReservedTable(String),
    /// There is no failed transaction of that number.
    #[error("transaction {tx} {}", not_failed(*.state))]
    NotFailed {
        /// The transaction.
        tx: u64,
        /// Where it stands; none: the queue does not have it.
        state: Option<EntryState>,
    },
    /// An edit names what the transaction does not have.
    #[error("the edit does not fit transaction {tx}: {what}")]
    Edit {
        /// The transaction.
        tx: u64,
        /// What does not fit.
        what: String,
    },
    /// The server took a transaction of this number from another copy of this store.
    #[error("another copy of this store uses its client id")]
    Copied,
    /// Another process that shares the store takes the snapshot by now. Nothing is lost.
    #[error("another process receives for this store by now")]
    Overtaken,
    /// A newer version of the library wrote the store.
    #[error("the store has format {found}, this version knows up to {known}: upgrade the app")]
    TooNew {
        /// Its format.
        found: i64,
        /// The newest known one.
        known: i64,
    },
}

impl StoreError {
    /// A failure of the app's own statement.
    pub(crate) fn statement(error: rusqlite::Error) -> Self {
        if let rusqlite::Error::SqliteFailure(_, Some(message)) = &error
            && let Some(message) = message.strip_prefix("millstream: ")
        {
            return StoreError::NotWritable(message.to_owned());
        }
        if let rusqlite::Error::SqliteFailure(_, Some(message)) = &error
            && message == "too many levels of trigger recursion"
        {
            return StoreError::TriggerRecursion;
        }
        StoreError::Statement(error)
    }

    /// Whether the guard refused the statement.
    pub(crate) fn is_refusal(&self) -> bool {
        let StoreError::Statement(source) = self else { return false };
        source.sqlite_error_code() == Some(ErrorCode::AuthorizationForStatementDenied)
    }

    /// Whether something that the app added to its database may be the reason.
    pub(crate) fn may_be_of_the_app(&self) -> bool {
        matches!(self, StoreError::Sqlite { .. } | StoreError::TransactionLost)
            && !self.is_retryable()
            && !self.is_damage()
    }

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

    /// Whether the same may succeed later: another process holds the lock, or the disk is full.
    pub fn is_retryable(&self) -> bool {
        if matches!(self, StoreError::Overtaken) {
            return true;
        }
        let (StoreError::Sqlite { source, .. } | StoreError::Statement(source)) = self else { return false };
        use ErrorCode::{DatabaseBusy, DatabaseLocked, DiskFull};
        matches!(source.sqlite_error_code(), Some(DatabaseBusy | DatabaseLocked | DiskFull))
    }
}

fn not_failed(state: Option<EntryState>) -> &'static str {
    match state {
        None => "is not in the queue: there was none of this number, it was discarded, or it took effect long ago",
        Some(EntryState::Confirmed) => "took effect: undo it by a new write",
        Some(EntryState::Held) => {
            "is held back behind a rejected one: retry, edit or discard that one, or discard this one"
        }
        Some(EntryState::Pending | EntryState::Sending | EntryState::Accepted) => {
            "is under way: only a rejected one can be retried, edited or discarded"
        }
        Some(EntryState::RetryWait | EntryState::Error) => "was rejected",
    }
}

/// Names the operation that failed.
pub(crate) trait During<T> {
    fn during(self, operation: &'static str) -> Result<T, StoreError>;
}

impl<T> During<T> for rusqlite::Result<T> {
    fn during(self, operation: &'static str) -> Result<T, StoreError> {
        self.map_err(|source| StoreError::Sqlite { operation, source })
    }
}

/// Names the stored value that did not read back.
pub(crate) fn parse<'a, T: serde::Deserialize<'a>>(text: &'a str, what: &'static str) -> Result<T, StoreError> {
    serde_json::from_str(text).map_err(|source| StoreError::Corrupt { what, source })
}

/// Values of ours always encode: their maps have text keys.
pub(crate) fn encode<T: serde::Serialize>(value: &T) -> String {
    #[expect(clippy::unwrap_used, reason = "plain structs and text keys cannot fail to encode")]
    serde_json::to_string(value).unwrap()
}

/// Longest text of one of SQLite's errors, in characters: they quote the statement, which a wide table makes very long.
const MAX_CAUSE_CHARS: usize = 300;

/// SQLite's words for an error.
pub(crate) fn cause(error: &rusqlite::Error) -> String {
    let text = match error {
        rusqlite::Error::SqlInputError { msg, .. } => msg.clone(),
        error => error.to_string(),
    };
    let mut words: String = text.chars().take(MAX_CAUSE_CHARS).collect();
    if words.len() < text.len() {
        words.push('…');
    }
    if error.sqlite_error().is_some_and(|error| error.extended_code == SQLITE_CORRUPT_VTAB) {
        words += " (a virtual table does not fit what it was made from: of FTS5, INSERT INTO t(t) VALUES('rebuild') mends it)";
    }
    words
}

/// An error with its cause.
pub(crate) fn chain(error: &StoreError) -> String {
    match error {
        StoreError::Sqlite { operation, source } => format!("{operation} failed: {}", cause(source)),
        error => error.to_string(),
    }
}
