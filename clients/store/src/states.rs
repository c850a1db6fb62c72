//! Words of the queue: the states of its entries, how transactions took effect, and what changes do.

use millstream_schemas::Operation;
use millstream_schemas::stream::{self, Loss};
use serde::{Deserialize, Serialize};

/// SQL: the entry has a number and is not settled.
pub(crate) const OPEN: &str = "state IN ('pending', 'sending', 'accepted')";
/// SQL: the server rejected it.
pub(crate) const FAILED: &str = "state IN ('retry_wait', 'error')";
/// SQL: rejected, tried again, or held back. Later changes of the same rows wait behind it.
pub(crate) const TROUBLED: &str = "state <> 'confirmed' AND (attempts > 0 OR state = 'held')";

/// State of an entry of the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EntryState {
    /// Recorded.
    Pending,
    /// Sent.
    Sending,
    /// On the broker.
    Accepted,
    /// Rejected; tried again by itself.
    RetryWait,
    /// Rejected; waits for a person.
    Error,
    /// Held back until an earlier transaction on the same rows is retried or discarded.
    Held,
    /// Settled; kept for the retention time.
    Confirmed,
}

impl EntryState {
    /// `None`: a word that the table's CHECK does not admit.
    pub(crate) fn parse(word: &str) -> Option<Self> {
        Some(match word {
            "pending" => EntryState::Pending,
            "sending" => EntryState::Sending,
            "accepted" => EntryState::Accepted,
            "retry_wait" => EntryState::RetryWait,
            "error" => EntryState::Error,
            "held" => EntryState::Held,
            "confirmed" => EntryState::Confirmed,
            _ => return None,
        })
    }

    /// Whether it has a number and is not settled.
    pub(crate) fn is_open(self) -> bool {
        matches!(self, EntryState::Pending | EntryState::Sending | EntryState::Accepted)
    }
}

/// How a transaction took effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Every change did.
    Applied,
    /// Some columns lost to newer changes of others.
    Merged,
    /// All of it lost to newer changes of others.
    Superseded,
}

impl Outcome {
    /// Of a transaction that lost.
    pub(crate) fn of(loss: &Loss) -> Self {
        if loss.verdict == stream::Verdict::Superseded { Outcome::Superseded } else { Outcome::Merged }
    }

    pub(crate) fn as_str(self) -> Option<&'static str> {
        match self {
            Outcome::Applied => None,
            Outcome::Merged => Some("merged"),
            Outcome::Superseded => Some("superseded"),
        }
    }

    pub(crate) fn parse(word: Option<&str>) -> Self {
        match word {
            Some("merged") => Outcome::Merged,
            Some("superseded") => Outcome::Superseded,
            _ => Outcome::Applied,
        }
    }
}

/// What a change does, by the word that the queue has for it.
pub(crate) fn operation(word: &str) -> Operation {
    // The table's CHECK admits no other word.
    match word {
        "insert" => Operation::Insert,
        "update" => Operation::Update,
        _ => Operation::Delete,
    }
}
