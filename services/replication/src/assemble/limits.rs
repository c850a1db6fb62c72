//! How much the broker takes.

use millstream_schemas::stream::{message_limit, row_limit};

/// What the broker takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Largest row, in bytes of its JSON text.
    pub row: usize,
    /// Most bytes of rows in one message, unless it is a single row.
    pub message: usize,
}

impl Limits {
    /// With this `max_payload`.
    pub fn of(max_payload: usize) -> Limits {
        Limits { row: row_limit(max_payload), message: message_limit(max_payload) }
    }
}
