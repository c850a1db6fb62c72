//! Frames of the WebSocket between a client and an edge: JSON texts, told apart by `type`.
//!
//! Order of a session: the client sends [`ClientFrame::Hello`] and nothing before it; the edge answers `welcome` or a
//! fatal `error`; before that it may ask for the scopes that the client holds. From then on both directions are independent.
//!
//! **Staging.** What the edge sends between two `commit`s belongs together: a client stages `rows` (with `last: false`),
//! `confirmed` and `scope_removed`, and applies them with the position in one local transaction when `commit`, or
//! `rows` with `last: true`, arrives. A `rows` frame with an `index` not above the previous one of the same LSN starts that
//! transaction anew: what was staged of it is dropped.
//!
//! **Snapshots** are a bracket: from `snapshot_begin` to `snapshot_end` neither `commit` nor `last` applies anything.
//! Everything sent since the last commit is applied at `snapshot_end` as one local transaction, in the order in which it
//! came; at `snapshot_apply` the named scopes' rows are replaced by the snapshot's. (What the snapshot has seen comes
//! before it, what it has not seen comes after, so that a row which moved between scopes ends where it belongs.)
//!
//! **Credit.** A client that cannot stop reading its socket says in `hello` how far the edge may send ahead of it, and with `taken`
//! how far it is.
//!
//! **The first load** of a session is complete with `caught_up`, which comes once, always, and outside of brackets.

use std::num::NonZeroU32;

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, de};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::change::{Change, TableChanges};
use crate::code::Code;
use crate::position::{Lsn, Position};
use crate::schema::Schema;
use crate::stream::{Failure, Loss, RunSpan, TransactionResult};
use crate::subject::Scope;

/// Largest frame that an edge accepts after `hello`, in bytes.
pub const MAX_FRAME_BYTES: usize = 512 * 1024;
/// Largest `hello`, in bytes: the only frame before authentication.
pub const MAX_HELLO_BYTES: usize = 256 * 1024;
/// Most bytes of all `scopes` frames that answer one `scopes_wanted`.
pub const MAX_SCOPES_BYTES: usize = 4 * 1024 * 1024;
/// Most changes in one client transaction.
pub const MAX_TRANSACTION_CHANGES: usize = 1_000;
/// Most transactions of a client between submission and `accepted`.
pub const SUBMIT_WINDOW: u32 = 256;

/// What a client sends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum ClientFrame {
    /// First frame of a session.
    Hello(Hello),
    /// Scopes whose rows the client holds: the answer to `scopes_wanted`.
    Scopes {
        /// The scopes, each in one of these frames.
        scopes: Vec<Scope>,
        /// Whether they are complete with this frame.
        last: bool,
    },
    /// One local transaction.
    Submit(Submit),
    /// Of all frames that the edge has sent in this session, from its first one on, the client has taken this much. For clients that
    /// gave a `credit`.
    Taken {
        /// UTF-8 bytes of the frames, in all.
        bytes: u64,
    },
    /// Asks for a `pong`: for clients that cannot see WebSocket pings, such as browsers.
    Ping {},
}

/// Who the client is and where it stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Hello {
    /// Protocol version that the client speaks.
    pub protocol: u32,
    /// The installation: UUIDv7 made at first start.
    pub client_id: Uuid,
    /// JSON Web Token, signed with HS256: `sub` is the user id, `aud` contains `millstream`, and `exp` is required.
    pub token: String,
    /// Version of the schema that the store has, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schema: Option<String>,
    /// Where the client's rows stand; absent: it has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub position: Option<Position>,
    /// Scopes whose rows the client holds at that position.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub scopes: Vec<Scope>,
    /// The same, where the list would be long, and then instead of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scopes_digest: Option<ScopesDigest>,
    /// Highest `client_seq` that the client knows to be confirmed.
    pub confirmed_seq: u64,
    /// Where a snapshot was cut whose rows the client still has staged: the server may go on behind them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<SnapshotMark>,
    /// While the edge has sent this many bytes more than the client has `taken`, it sends no rows. Absent: it sends what the socket
    /// takes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credit: Option<NonZeroU32>,
}

/// A set of scopes, told by a digest. Where the user may read exactly these scopes, nobody has to name them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ScopesDigest {
    /// How many they are.
    pub count: usize,
    /// SHA-256, in lower-case hexadecimal digits, of the scopes as `kind:id` in the order of their UTF-8 bytes, each followed by a
    /// line feed.
    pub sha256: String,
}

impl ScopesDigest {
    /// Of these scopes, in any order.
    pub fn of<'a>(scopes: impl IntoIterator<Item = &'a Scope>) -> ScopesDigest {
        let mut names: Vec<String> = scopes.into_iter().map(Scope::to_string).collect();
        names.sort_unstable();
        let mut hash = Sha256::new();
        for name in &names {
            hash.update(name);
            hash.update("\n");
        }
        let sha256 = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        ScopesDigest { count: names.len(), sha256 }
    }
}

/// How far a snapshot has come. Both texts are the server's own; clients keep them with the staged rows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotMark {
    /// As `snapshot_begin` gave it.
    pub token: String,
    /// As the last `snapshot_rows` gave it.
    pub mark: String,
}

/// One local transaction on its way to Postgres.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Submit {
    /// `client_seq`: 1, 2, 3 … without gaps.
    #[serde(deserialize_with = "from_one")]
    #[schemars(range(min = 1))]
    pub client_seq: u64,
    /// 1, and one more for each time that the transaction was rejected. A resend does not raise it.
    #[serde(deserialize_with = "from_one")]
    #[schemars(range(min = 1))]
    pub attempt: u32,
    /// Which run of the store gave it its number. Each process that opens a store takes a random id before its first
    /// write, so two copies of a store never share a run beyond the point where they were copied.
    pub run_id: Uuid,
    /// Run of the transaction `client_seq - 1`, where that is another one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous: Option<Uuid>,
    /// Earlier transactions, by `client_seq`, that wrote a row which this one writes too, or created a row that it refers to, and
    /// that are not known to be applied. If one of them is rejected, this one is rejected with `predecessor_failed`. At most
    /// 1,000, all below `client_seq`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub after: Vec<u64>,
    /// The changes, in the order in which they were made; 1 to 1,000 (`limits.transaction_changes`).
    pub changes: Vec<Change>,
    /// W3C trace context of the local write.
    #[serde(default, deserialize_with = "crate::trace::lenient", skip_serializing_if = "Option::is_none")]
    pub traceparent: Option<String>,
}

/// A number that counts from 1.
fn from_one<'de, D: Deserializer<'de>, N: Deserialize<'de> + Default + PartialEq>(reader: D) -> Result<N, D::Error> {
    let number = N::deserialize(reader)?;
    if number == N::default() {
        return Err(de::Error::custom("`client_seq` and `attempt` count from 1"));
    }
    Ok(number)
}

/// What an edge sends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum ServerFrame {
    /// Before `welcome`: the user may read others than the scopes of `scopes_digest`, so the client is to name those that it holds.
    ScopesWanted {},
    /// Answer to `hello`.
    Welcome(Welcome),
    /// Every submission up to and including `client_seq` is stored on the broker. The client still keeps its entries.
    Accepted {
        /// Highest `client_seq` stored.
        client_seq: u64,
    },
    /// A hint: these transactions are committed or rejected in Postgres. Only `confirmed` settles them.
    Results {
        /// One entry a transaction.
        results: Vec<TransactionResult>,
    },
    /// A snapshot of these scopes follows, staged until `snapshot_end`.
    SnapshotBegin {
        /// The scopes, each to be replaced whole.
        scopes: Vec<Scope>,
        /// How many rows it has, for the client to show how far it is; those in several scopes count for each.
        rows: u64,
        /// With the marks of its rows: by what it can go on after a cut.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        token: Option<String>,
        /// It goes on behind the mark that the client named: what is staged stays. Else that is forgotten.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        resumed: bool,
    },
    /// Rows of a snapshot.
    SnapshotRows {
        /// Upserts only.
        changes: Vec<TableChanges>,
        /// How far the snapshot has come with these.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        mark: Option<String>,
    },
    /// Here, among what is staged, the scopes' rows are replaced by the snapshot's.
    SnapshotApply {},
    /// The bracket is complete: apply it and take the position, in one local transaction.
    SnapshotEnd {
        /// The state that results is Postgres' at this position.
        position: Position,
    },
    /// Row changes of a committed transaction.
    Rows(Rows),
    /// The transactions of this client up to `client_seq` are settled by what is staged with it.
    Confirmed(Confirmed),
    /// Apply what is staged.
    Commit {
        /// The position that the client then has.
        position: Position,
    },
    /// Once in each session, also if there was nothing to send, and never inside a snapshot bracket: everything that was
    /// committed before the session was welcomed has been sent. Apply what is staged, as with `commit`; then the first load
    /// is complete.
    CaughtUp {
        /// The position that the client then has.
        position: Position,
    },
    /// The user lost this scope: with the next commit, rows that no other held scope holds leave the store.
    ScopeRemoved {
        /// The lost scope.
        scope: Scope,
    },
    /// Answer to `ping`, or to several.
    Pong {},
    /// Something was refused.
    Error(ErrorFrame),
}

/// The session's terms.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Welcome {
    /// Protocol version of the edge.
    pub protocol: u32,
    /// Random id of the session, for logs.
    pub session: Uuid,
    /// The user that the token names.
    pub user_id: String,
    /// The synced tables; absent when the client's version is current.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schema: Option<Schema>,
    /// Limits that the client keeps to.
    pub limits: Limits,
    /// Last `client_seq` in the ledger: the client goes on submitting after it.
    pub last_seq: u64,
    /// Which runs submitted what the ledger has behind the client's `confirmed_seq`, by rising `first_seq`. Where the
    /// client's own entry has another run, another copy of its store used that number.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub runs: Vec<RunSpan>,
    /// `client_seq` of the rejected transactions among them: what a copy of a store takes for its own and settled, but these.
    /// Their reasons come with `confirmed`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failed: Vec<u64>,
    /// Those among them that lost to newer changes, in part or in whole.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lost: Vec<Loss>,
    /// The outbound stream's epoch.
    pub epoch: Uuid,
    /// Whether the client's rows are kept and brought up to date, or replaced by snapshots of every scope.
    pub resume: Resume,
}

/// How the client's rows are brought up to date.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Resume {
    /// From its position on; scopes that are new to it come as snapshots.
    CatchUp,
    /// Every scope comes as a snapshot, in one bracket. Scopes that are not in it are gone with its `snapshot_apply`.
    Snapshot,
}

/// Limits of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Most transactions submitted and not yet accepted.
    pub window: u32,
    /// Largest `submit`, in bytes: both the frame and the copy on the broker, to which the edge adds the user. Stay 4 KiB below.
    pub frame_bytes: usize,
    /// Most changes in one transaction.
    pub transaction_changes: usize,
    /// The client must be heard within this time (milliseconds). A WebSocket ping or pong suffices, such as the answer to
    /// the edge's own pings.
    pub heartbeat_ms: u64,
}

/// Row changes of a committed transaction, of one scope.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Rows {
    /// Sequence of the message in the outbound stream.
    pub stream_seq: u64,
    /// Commit LSN of the transaction.
    pub lsn: Lsn,
    /// Index of the message within the transaction.
    pub index: u32,
    /// Whether the transaction is complete with this frame. It is then applied as by `commit`, unless in a snapshot bracket.
    pub last: bool,
    /// Epoch of the outbound stream.
    pub epoch: Uuid,
    /// Commit time: microseconds since 1970.
    pub at: u64,
    /// W3C trace context of the transaction.
    #[serde(default, deserialize_with = "crate::trace::lenient", skip_serializing_if = "Option::is_none")]
    pub traceparent: Option<String>,
    /// The changes, in commit order.
    pub changes: Vec<TableChanges>,
}

/// What became of this client's transactions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Confirmed {
    /// All up to and including this `client_seq` are settled.
    pub client_seq: u64,
    /// Run that submitted the transaction `client_seq`. Another one than in the client's queue: a copy of its store
    /// did.
    pub run_id: Uuid,
    /// Those among them that failed, as far as the client has not been told before; the others are applied.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failed: Vec<Failure>,
    /// Those among them that lost to newer changes, in part or in whole; also only where it has not been told before.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lost: Vec<Loss>,
}

/// A refusal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ErrorFrame {
    /// What it is.
    pub code: Code,
    /// What to do about it, for people; not part of the compatibility promise.
    pub message: String,
    /// A `client_seq`. In `overloaded` and `gap`: the number to go on from. Otherwise the submission that was refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_seq: Option<u64>,
    /// Try again no sooner than this (milliseconds).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u64>,
    /// Whether the edge closes the session after this frame.
    pub fatal: bool,
}
