//! Messages of the outbound stream.

use bytes::Bytes;
use millstream_schemas::Lsn;

/// A message of the outbound stream. What is not known before it is appended (epoch, previous transaction) is missing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outgoing {
    /// Subject.
    pub subject: String,
    /// JSON array of `TableChanges`.
    pub payload: Bytes,
    /// Commit LSN of the transaction.
    pub lsn: Lsn,
    /// LSN behind the commit record; on messages that are sent before the record was read, `lsn` again, a lower bound.
    pub end_lsn: Lsn,
    /// Transaction id.
    pub xid: u32,
    /// Index within the transaction.
    pub index: u32,
    /// Whether it is the transaction's last.
    pub last: bool,
    /// Commit time, microseconds since 1970.
    pub at: i64,
    /// On the last message: the JSON array of `OriginEntry`.
    pub origin: Option<String>,
    /// Trace context, as far as it is known yet.
    pub traceparent: Option<String>,
    /// Scopes of which memberships moved for those who read it, as the header tells them.
    pub moves: Option<String>,
}
