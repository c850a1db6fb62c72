//! Error codes: a closed, documented list. The code is the promise; the text beside it may change.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What a client does about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// Again by itself, with back-off; counts against the limit of attempts where it is a verdict.
    Automatic,
    /// Only when a person says so, after editing or when circumstances changed.
    Manual,
    /// Never with the same input.
    Never,
}

macro_rules! codes {
    ($($(#[doc = $doc:literal])+ $name:ident = $text:literal, $retry:ident;)+) => {
        /// Why something was refused.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
        #[non_exhaustive]
        pub enum Code { $($(#[doc = $doc])+ #[serde(rename = $text)] $name,)+ }

        impl Code {
            /// Every code, in the order of the documentation.
            pub const ALL: &'static [Code] = &[$(Code::$name),+];

            /// The word on the wire.
            pub fn as_str(self) -> &'static str {
                match self { $(Code::$name => $text),+ }
            }

            /// What a client does about it.
            pub fn retry(self) -> Retry {
                match self { $(Code::$name => Retry::$retry),+ }
            }
        }

        impl std::str::FromStr for Code {
            type Err = UnknownCode;
            fn from_str(text: &str) -> Result<Self, UnknownCode> {
                match text { $($text => Ok(Code::$name),)+ _ => Err(UnknownCode) }
            }
        }
    };
}

codes! {
    /// Update or delete of a row that does not exist, or that the user may not read.
    EntityMissing = "entity_missing", Manual;
    /// The user may not do this to this row.
    PermissionDenied = "permission_denied", Manual;
    /// A constraint, trigger, declared rule or external validator refused; `rule` names it.
    BusinessRule = "business_rule", Automatic;
    /// A trigger or rule of the database left the row out, without an error: it is as it was.
    NotWritten = "not_written", Manual;
    /// An earlier transaction of the client that wrote the same row was rejected; this one waits until that one has been
    /// retried or discarded.
    PredecessorFailed = "predecessor_failed", Automatic;
    /// A value does not fit its column's type.
    InvalidValue = "invalid_value", Manual;
    /// The table is not synced.
    UnknownTable = "unknown_table", Manual;
    /// The table has no such column.
    UnknownColumn = "unknown_column", Manual;
    /// The column exists but clients may not set it.
    ColumnNotWritable = "column_not_writable", Manual;
    /// The change is malformed: wrong number of values or key parts, a column set twice, nothing set.
    InvalidChange = "invalid_change", Manual;
    /// An operator of the server refused it by hand, since it could not be applied; the message is theirs.
    OperatorRejected = "operator_rejected", Manual;
    /// The executor failed on it repeatedly; it is kept in `changes_history` with everything needed to replay it.
    Internal = "internal", Manual;

    /// The frame is not JSON, of an unknown type, or has unknown, missing or ill-typed fields.
    BadFrame = "bad_frame", Never;
    /// The frame or transaction is over the limit that the message names, or the transaction has no changes.
    TooLarge = "too_large", Never;
    /// A frame came before `hello`, or `hello` came twice.
    OutOfOrder = "out_of_order", Never;
    /// A submission leaves a gap in the client's numbers and was not taken: go on from `client_seq`.
    Gap = "gap", Automatic;
    /// A submission names neither as its own run nor as `previous` the run of the transaction before it: another copy of
    /// the store has submitted that one, or `previous` is wrong. Connect again: `welcome` says which runs submitted what.
    WrongPrevious = "wrong_previous", Automatic;
    /// The token is missing, malformed, wrongly signed or for another audience.
    BadToken = "bad_token", Manual;
    /// The token has expired: connect with a new one.
    TokenExpired = "token_expired", Manual;
    /// The session has outlived its right: its token ran out, or an operator ended the user's sessions. Connect with a new token.
    NeedsAuth = "needs_auth", Manual;
    /// The client id belongs to another user.
    IdentityMismatch = "identity_mismatch", Never;
    /// The client speaks another protocol version; its queue is kept.
    UpgradeRequired = "upgrade_required", Never;
    /// The server has more work than it takes on: wait `retry_after_ms`.
    Overloaded = "overloaded", Automatic;
    /// A part that the edge needs (Postgres, NATS, replication) does not answer: wait `retry_after_ms`.
    Unavailable = "unavailable", Automatic;
    /// The outbound stream began a new history, or the client is too far behind to catch up: drop the position and connect again
    /// for a snapshot; the queue is kept.
    EpochChanged = "epoch_changed", Automatic;
    /// The synced tables have changed: connect again for the new schema; the queue is kept.
    SchemaChanged = "schema_changed", Automatic;
    /// The client read too slowly and was cut; it catches up when it connects again.
    SlowConsumer = "slow_consumer", Automatic;
    /// Nothing was heard from the client within the heartbeat time.
    HeartbeatTimeout = "heartbeat_timeout", Automatic;
    /// The edge is shutting down: connect again.
    ShuttingDown = "shutting_down", Automatic;
}

/// The word is not a code of this protocol version.
#[derive(Debug, thiserror::Error)]
#[error("not an error code of this protocol version")]
pub struct UnknownCode;

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
