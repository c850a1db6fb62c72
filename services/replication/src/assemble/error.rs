//! Why the change stream cannot be assembled.

use crate::pgoutput::DecodeError;
use crate::relation::BadTuple;

/// Why the change stream cannot be assembled.
#[derive(Debug, thiserror::Error)]
pub enum AssembleError {
    /// Bytes that are no message.
    #[error("cannot decode a message of the change stream")]
    Decode(#[from] DecodeError),
    /// A row that does not fit its table.
    #[error("cannot read a row of table {table}")]
    Row {
        /// The table.
        table: String,
        /// Why.
        source: BadTuple,
    },
    /// Messages in an impossible order.
    #[error("unexpected {what} in the change stream")]
    Order {
        /// What came.
        what: &'static str,
    },
    /// The database's table is no longer as the catalog says.
    #[error("table {table} has changed; reading the catalog again")]
    SchemaChanged {
        /// The table.
        table: String,
        /// The shape, to be accepted if the catalog stays as it is.
        shape: u64,
    },
}
