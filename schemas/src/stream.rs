//! Messages on the broker, and the origin record that rides in the WAL.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::change::{Change, TableChanges};
use crate::code::Code;
use crate::position::Lsn;

/// Largest message that a service publishes, in bytes; larger transactions are cut into several.
pub const MAX_MESSAGE_BYTES: usize = 512 * 1024;
/// Largest row that clients get, in bytes of its JSON text. It has to go into one message.
pub const MAX_ROW_BYTES: usize = 4 * 1024 * 1024;

/// Most bytes of a message's headers; a limit of the broker, which counts them to the message's size.
pub const MAX_HEADER_BYTES: usize = 64 * 1024;
/// Room in a row's message for what is around the row: the names of its table and columns.
const ROW_FRAME_BYTES: usize = 128 * 1024;
/// Smallest `max_payload` of the broker that Millstream works with, in bytes.
pub const MIN_PAYLOAD_BYTES: usize = 256 * 1024;

/// Largest row that clients get from a broker with this `max_payload`, in bytes of its JSON text. What is larger is left
/// out of snapshots, and withdrawn by the stream.
///
/// ```
/// use millstream_schemas::stream::{MAX_ROW_BYTES, row_limit};
/// assert_eq!(row_limit(8 * 1024 * 1024), MAX_ROW_BYTES);
/// assert_eq!(row_limit(1024 * 1024), 832 * 1024);
/// ```
pub fn row_limit(max_payload: usize) -> usize {
    MAX_ROW_BYTES.min(max_payload.saturating_sub(MAX_HEADER_BYTES + ROW_FRAME_BYTES))
}

/// Most bytes of rows in one message of a broker with this `max_payload`, unless it is a single row.
pub fn message_limit(max_payload: usize) -> usize {
    MAX_MESSAGE_BYTES.min(max_payload.saturating_sub(MAX_HEADER_BYTES))
}

/// Payload on `ms.changes.{partition}`: what waited in an edge's lane when it published.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ChangesMessage {
    /// In the order of arrival; the submissions of one client are in the order of their `client_seq`.
    pub submissions: Vec<Submission>,
}

/// One client transaction with the identity that the edge vouches for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Submission {
    /// The installation.
    pub client_id: Uuid,
    /// The user, from the token.
    pub user_id: String,
    /// `client_seq`.
    pub client_seq: u64,
    /// 1, and one more for each time that the transaction was rejected. A resend does not raise it.
    pub attempt: u32,
    /// Which run of the client's store gave it its number.
    pub run_id: Uuid,
    /// Run of the transaction `client_seq - 1`, where that is another one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous: Option<Uuid>,
    /// Earlier transactions of the client: if one of them is rejected, this one is refused with `predecessor_failed`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub after: Vec<u64>,
    /// The changes, in the order in which they were made.
    pub changes: Vec<Change>,
    /// W3C trace context.
    #[serde(default, deserialize_with = "crate::trace::lenient", skip_serializing_if = "Option::is_none")]
    pub traceparent: Option<String>,
}

/// What became of a transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Every change took effect.
    Applied,
    /// Some columns lost to newer ones.
    Merged,
    /// All of it lost to newer changes.
    Superseded,
    /// Nothing of it took effect; `failure` says why.
    Rejected,
}

/// Payload on `ms.results.{client_id}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ResultsMessage {
    /// One entry a transaction, by rising `client_seq`.
    pub results: Vec<TransactionResult>,
}

/// Verdict of one transaction.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TransactionResult {
    /// `client_seq`.
    pub client_seq: u64,
    /// What became of it.
    pub verdict: Verdict,
    /// Why it was rejected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
}

/// Why a transaction was rejected.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Failure {
    /// `client_seq` of the transaction.
    pub client_seq: u64,
    /// The change that failed.
    pub change_id: Uuid,
    /// Why.
    pub code: Code,
    /// What refused it, where that has a name: the constraint, the declared rule's code, the external validator's code.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
    /// For people; at most 500 bytes.
    pub message: String,
}

/// A transaction that took effect in part, or not at all, because newer changes had been made to the same columns. That
/// is success: it is not tried again, and the winning rows come with the stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Loss {
    /// `client_seq` of the transaction.
    pub client_seq: u64,
    /// `merged` or `superseded`.
    pub verdict: Verdict,
    /// The first change that lost.
    pub change_id: Uuid,
}

/// Part of a client's upload that one run of its store submitted; it ends where the next span begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RunSpan {
    /// The run.
    pub run_id: Uuid,
    /// Its first `client_seq`.
    pub first_seq: u64,
}

/// Longest text in a [`Failure`], in bytes.
pub const MAX_FAILURE_MESSAGE_BYTES: usize = 500;

/// Prefix of the transactional `pg_logical_emit_message` that carries an [`OriginRecord`].
pub const ORIGIN_PREFIX: &str = "millstream.origin";

/// Which clients' transactions a Postgres transaction settles.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OriginRecord {
    /// One entry a client.
    pub clients: Vec<OriginEntry>,
    /// W3C trace context of the transaction.
    #[serde(default, deserialize_with = "crate::trace::lenient", skip_serializing_if = "Option::is_none")]
    pub traceparent: Option<String>,
}

/// What a Postgres transaction settles for one client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OriginEntry {
    /// The client.
    pub client_id: Uuid,
    /// The first of its transactions that this settles: a reader that was not told of the one before has missed something.
    /// 0 from an executor that does not say.
    #[serde(default)]
    pub first_seq: u64,
    /// Its transactions up to and including this `client_seq` are settled.
    pub client_seq: u64,
    /// Run that submitted the transaction `client_seq`.
    pub run_id: Uuid,
    /// Those that failed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failed: Vec<Failure>,
    /// Those that lost to newer changes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lost: Vec<Loss>,
}

/// Request on `ms.validate.{table}`: what one transaction does to a table, before it is applied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ValidateRequest {
    /// The user, from the token.
    pub user_id: String,
    /// The installation.
    pub client_id: Uuid,
    /// `client_seq`.
    pub client_seq: u64,
    /// 1, and one more for each time that the transaction was rejected. A resend does not raise it.
    pub attempt: u32,
    /// The transaction's changes to the table, in their order.
    pub changes: Vec<Change>,
    /// W3C trace context.
    #[serde(default, deserialize_with = "crate::trace::lenient", skip_serializing_if = "Option::is_none")]
    pub traceparent: Option<String>,
}

/// Answer of an external validator. None within the deadline is a fault of the server: the transaction waits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "verdict", rename_all = "snake_case", deny_unknown_fields)]
pub enum ValidateResponse {
    /// Go on.
    Ok,
    /// Reject the transaction with `business_rule`.
    Reject {
        /// The change at fault; absent: the first of the request.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        change_id: Option<Uuid>,
        /// The rule's name, for programs: `rule` of the failure that the author is told; at most 128 bytes.
        code: String,
        /// For people; at most 500 bytes.
        message: String,
    },
}

/// Longest [`Failure::rule`], in bytes.
pub const MAX_RULE_BYTES: usize = 128;

/// Payload on `ms.wal.{scope}`: the JSON array of these. The rest of the message is in its headers, [`header`].
pub type WalPayload = Vec<TableChanges>;

/// In [`header::MOVES`]: memberships of any scope may have moved.
pub const ANY_SCOPE: &str = "*";

/// Header names of messages in `MS_WAL`.
pub mod header {
    /// Epoch of the stream's history (UUID).
    pub const EPOCH: &str = "Ms-Epoch";
    /// Commit LSN of the transaction.
    pub const LSN: &str = "Ms-Lsn";
    /// LSN just behind the transaction's commit record.
    pub const END_LSN: &str = "Ms-End-Lsn";
    /// Commit LSN of the transaction published before this one, `0/0` for the first of an epoch.
    pub const PREVIOUS: &str = "Ms-Previous-Lsn";
    /// Transaction id (32 bits, as in the WAL).
    pub const XID: &str = "Ms-Xid";
    /// Index of the message within the transaction: 0, 1, 2 …
    pub const INDEX: &str = "Ms-Index";
    /// `1` on the last message of the transaction, `0` on the others.
    pub const LAST: &str = "Ms-Last";
    /// Commit time: microseconds since 1970.
    pub const AT: &str = "Ms-At";
    /// On the last message: the clients that the transaction settles, a JSON array of [`super::OriginEntry`].
    pub const ORIGIN: &str = "Ms-Origin";
    /// On a message that only says how far the stream is complete: the last transaction before it that published something,
    /// as commit LSN, transaction id and commit time, with blanks between. So the end of the stream can be held against
    /// the database.
    pub const LANDMARK: &str = "Ms-Landmark";
    /// On a message with rows that grant memberships: the scopes that those who hold the message's scope came to hold, or hold no
    /// more, with this transaction, as subjects with blanks between; [`super::ANY_SCOPE`] for all of them.
    pub const MOVES: &str = "Ms-Moves";
    /// Schema version under which rows were encoded.
    pub const SCHEMA: &str = "Ms-Schema";
    /// W3C trace context.
    pub const TRACEPARENT: &str = "traceparent";
}

/// Answer on `ms.replication.watermark`: every transaction that committed before `lsn` is in the stream, at or
/// before message `stream_seq`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Watermark {
    /// Epoch of the outbound stream.
    pub epoch: Uuid,
    /// Everything before this LSN is published.
    pub lsn: Lsn,
    /// Last sequence of the outbound stream when that was so.
    pub stream_seq: u64,
}
