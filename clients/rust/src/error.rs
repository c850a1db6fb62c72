//! Errors of the SDK.

use std::sync::Arc;

use millstream_client_store::{SavedError, StoreError};
use millstream_schemas::{Code, Retry};
use uuid::Uuid;

/// Result of the SDK's functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of the app's own.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// An error of the SDK. `Display` says what failed, [`source`](std::error::Error::source) why: print the whole chain, as
/// `{:#}` of `anyhow` does.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The local store failed, or refused a statement.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A file of saved changes is of no use.
    #[error(transparent)]
    Saved(#[from] SavedError),
    /// The server rejected the transaction; its rows show the server's state again.
    #[error("the server rejected transaction {tx}: {code}: {message}")]
    Rejected {
        /// The local transaction.
        tx: u64,
        /// The change that failed.
        change_id: Uuid,
        /// Why.
        code: Code,
        /// The constraint, declared rule or external validator that refused it.
        rule: Option<String>,
        /// For people.
        message: String,
    },
    /// The time given was not enough.
    #[error("timed out")]
    Timeout,
    /// The client was closed.
    #[error("the client is closed")]
    Closed,
    /// A row does not fit the type asked for.
    #[error("a row does not fit the type")]
    Decode(#[source] BoxError),
    /// A value cannot be written as a row, or names what the table does not have.
    #[error("the value is not a row of {table}")]
    Encode {
        /// The table.
        table: String,
        /// What does not fit.
        source: BoxError,
    },
    /// The transaction was discarded while it waited.
    #[error("transaction {0} was discarded")]
    Discarded(u64),
    /// The app's closure panicked; the transaction was rolled back.
    #[error("the transaction's closure panicked")]
    Panicked,
    /// The transaction that this write shared its commit with failed.
    #[error("the commit failed")]
    Commit(#[source] Arc<StoreError>),
    /// The writer thread could not be started.
    #[error("starting the writer failed")]
    Start(#[source] std::io::Error),
    /// The app's closure gave this error; the transaction was rolled back.
    #[error(transparent)]
    App(BoxError),
}

/// Longest text of one error in a chain, in characters: SQLite's quote the statement, which a wide table makes very long.
const MAX_CAUSE_CHARS: usize = 500;

/// An error and its causes, for the status and the log.
pub(crate) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = String::new();
    let mut next = Some(error);
    while let Some(error) = next {
        let mut own = error.to_string();
        if let Some((end, _)) = own.char_indices().nth(MAX_CAUSE_CHARS) {
            own.truncate(end);
            own.push('…');
        }
        // Some errors repeat their cause in their own text.
        if !text.ends_with(&own) {
            text += if text.is_empty() { "" } else { ": " };
            text += &own;
        }
        next = error.source();
    }
    text
}

impl Error {
    /// An error of the app's own, to leave a transaction with: a message, or an error that [`Error::App`] gives back.
    pub fn app(error: impl Into<BoxError>) -> Self {
        Error::App(error.into())
    }

    /// Whether a statement was given to a reader, such as [`crate::Client::query`], that writes.
    pub fn is_write(&self) -> bool {
        let Error::Store(StoreError::Statement(source)) = self else { return false };
        source.sqlite_error_code() == Some(rusqlite::ErrorCode::ReadOnly)
    }

    /// A stable word for the kind of error; for a rejection the server's code.
    pub fn code(&self) -> &'static str {
        match self {
            Error::Store(StoreError::NotWritable(_)) => "not_writable",
            Error::Store(StoreError::NotAllowed(_)) => "not_allowed",
            Error::Store(StoreError::NotUtf8) => "not_utf8",
            Error::Store(StoreError::TriggerRecursion) => "trigger_recursion",
            Error::Store(StoreError::Schema(_) | StoreError::ReservedTable(_)) => "schema",
            Error::Store(StoreError::Foreign { .. }) => Code::IdentityMismatch.as_str(),
            Error::Store(StoreError::TooManyChanges { .. } | StoreError::TooManyBytes { .. }) => "too_large",
            Error::Store(StoreError::Statement(_)) => "statement",
            Error::Store(StoreError::NotFailed { .. }) => "not_failed",
            Error::Store(StoreError::Edit { .. }) => "edit",
            Error::Store(StoreError::Damaged(_)) => "store_damaged",
            Error::Store(StoreError::Moved) => "store_moved",
            Error::Store(_) => "store",
            Error::Saved(_) => "saved",
            Error::Rejected { code, .. } => code.as_str(),
            Error::Timeout => "timeout",
            Error::Closed => "closed",
            Error::Decode(_) => "decode",
            Error::Encode { .. } => "encode",
            Error::Discarded(_) => "discarded",
            Error::Panicked => "panicked",
            Error::Commit(_) => "commit",
            Error::Start(_) => "start",
            Error::App(_) => "app",
        }
    }

    /// Whether the same call may succeed later.
    pub fn is_retryable(&self) -> bool {
        match self {
            Error::Store(error) => error.is_retryable(),
            Error::Rejected { code, .. } => code.retry() == Retry::Automatic,
            Error::Timeout | Error::Commit(_) => true,
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_names_every_cause_up_to_the_limit() {
        #[derive(Debug, thiserror::Error)]
        #[error("{0}")]
        struct Layer(String, #[source] Option<Box<Layer>>);
        let layer = |text: &str, cause: Option<Layer>| Layer(text.to_owned(), cause.map(Box::new));
        let error = layer("store", Some(layer("table", Some(layer("too deep", Some(layer("too deep", None)))))));
        assert_eq!(chain(&error), "store: table: too deep");
        assert_eq!(chain(&layer(&"ü".repeat(MAX_CAUSE_CHARS), None)), "ü".repeat(MAX_CAUSE_CHARS));
        assert_eq!(chain(&layer(&"ü".repeat(MAX_CAUSE_CHARS + 1), None)), "ü".repeat(MAX_CAUSE_CHARS) + "…");
    }
}
