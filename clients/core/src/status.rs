//! What a client tells about itself: one struct, the same fields in every SDK.

use millstream_schemas::Position;
use serde::Serialize;
use uuid::Uuid;

use crate::territory::SetAside;

/// Where the connection stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Not connected; the next attempt is at `retry_at`, if there is one.
    #[default]
    Offline,
    /// Connecting or waiting for the edge's welcome.
    Connecting,
    /// In session with an edge.
    Connected,
    /// The edge refused the token, or ended the session because it ran out; another one is wanted.
    NeedsAuth,
    /// The edge refused the client, or the store cannot take what the edge sends, for a reason that waiting alone does not cure; see
    /// `last_error`.
    Error,
    /// The local store is damaged, or its file is gone: nothing works any more; see `last_error`. Close the client and open it again.
    Damaged,
    /// The client was closed.
    Closed,
}

/// Which process of those that share a store does the syncing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// This one.
    Leader,
    /// Another one; this one records, and the leader sends.
    #[default]
    Follower,
}

/// Local transactions that are not settled yet.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Pending {
    /// Number of transactions recorded and not confirmed.
    pub count: u64,
    /// How many of them the broker has.
    pub accepted: u64,
    /// When the oldest was recorded: milliseconds since 1970.
    pub oldest_at: Option<u64>,
}

/// Progress of a snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Download {
    /// Rows that have arrived.
    pub rows: u64,
    /// Rows that it has; those in several scopes count for each.
    pub total: u64,
}

/// The last thing that went wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LastError {
    /// A stable code: from the protocol's list, or `socket`, `timeout`, `store`, `schema`, `store_damaged`, `store_moved`, `token`.
    pub code: String,
    /// For people.
    pub message: String,
}

/// The status of a client.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Status {
    /// Where the connection stands.
    pub state: State,
    /// Why, where that is not obvious.
    pub reason: Option<String>,
    /// Next attempt to connect: milliseconds since 1970.
    pub retry_at: Option<u64>,
    /// Whether the store holds the rows of a first snapshot, all of them.
    pub has_synced: bool,
    /// Whether the store has everything that was committed before this connection began: its first load is complete. False while
    /// there is no connection, and where another process does the syncing.
    pub caught_up: bool,
    /// When server rows were last applied: milliseconds since 1970.
    pub last_synced_at: Option<u64>,
    /// Local transactions under way.
    pub pending: Pending,
    /// Transactions that were rejected and wait for a retry or a person.
    pub failed: u64,
    /// Transactions that are held back until an earlier one on the same rows is retried or discarded.
    pub held: u64,
    /// Whether transactions wait for the broker's acceptance while connected.
    pub uploading: bool,
    /// Whether a snapshot is arriving.
    pub downloading: bool,
    /// How far it is, once it has begun.
    pub download: Option<Download>,
    /// Whether this process does the syncing.
    pub role: Role,
    /// Where the client's rows stand.
    pub position: Option<Position>,
    /// The user whose rows the store holds, or as whom the edge knows this client; none before the first connection.
    pub user_id: Option<String>,
    /// The installation.
    pub client_id: Uuid,
    /// Highest settled transaction.
    pub confirmed_seq: u64,
    /// Version of the installed schema.
    pub schema: Option<String>,
    /// Server transactions applied since this client was opened.
    pub applied_transactions: u64,
    /// Sessions that ended since this client was opened.
    pub reconnects: u64,
    /// What the app added to its database and had to give way, so that sync goes on.
    pub set_aside: Vec<SetAside>,
    /// The last thing that went wrong; cleared by a welcome.
    pub last_error: Option<LastError>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::territory::Kind;

    /// As the words of the protocol and of the queue are.
    #[test]
    fn words_are_in_snake_case() {
        assert_eq!(serde_json::to_value(State::NeedsAuth).unwrap(), "needs_auth");
        assert_eq!(serde_json::to_value(Role::Follower).unwrap(), "follower");
        for kind in [Kind::Index, Kind::View, Kind::Trigger, Kind::Table, Kind::Column, Kind::ForeignKey] {
            assert_eq!(serde_json::to_value(kind).unwrap(), kind.as_str());
        }
        assert_eq!(Kind::ForeignKey.as_str(), "foreign_key");
    }
}
