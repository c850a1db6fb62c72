//! What the rooms hand to each other: one submission of a message of the stream with its place there, how it is to be applied,
//! positions, and the limits of what is done at a time.

use millstream_schemas::stream::{ChangesMessage, Submission};
use tokio::sync::OwnedSemaphorePermit;
use uuid::Uuid;

/// Payloads that may wait for a worker, in KiB.
pub(crate) const WORKER_KIB: usize = 16 * 1024;
/// Most transactions in one Postgres transaction.
pub(crate) const MAX_TRANSACTIONS: usize = 100;
/// Most that the transactions in one Postgres transaction may cost ([`Item::cost`]), unless a single one costs more.
pub(crate) const MAX_COST: usize = 1_000;
/// Most transactions in one Postgres transaction where each has a savepoint: from 64 subtransactions on, every snapshot
/// of the server is slowed down.
pub(crate) const MAX_SAVEPOINTS: usize = 60;

/// One submission of a message, or a message without any.
#[derive(Debug)]
pub(crate) struct Item {
    /// Partition of the message.
    pub partition: u16,
    /// Place in the message.
    pub index: u32,
    /// The message's stream sequence.
    pub sequence: u64,
    /// What to do; none for an undecodable message, and for an idle partition that is only moved on.
    pub submission: Option<Submission>,
    /// The last one of its message.
    pub last: bool,
    /// About what it takes in memory.
    pub bytes: usize,
    /// About what it takes to be applied, in small changes.
    pub cost: usize,
    /// Room in the worker's memory, freed when the item is done with.
    #[expect(dead_code, reason = "held, not read")]
    pub room: Option<OwnedSemaphorePermit>,
}

impl Item {
    /// The items of a [`ChangesMessage`].
    pub fn decode(partition: u16, sequence: u64, payload: &[u8], room: Option<OwnedSemaphorePermit>) -> Vec<Item> {
        let submissions = match serde_json::from_slice::<ChangesMessage>(payload) {
            Ok(message) => message.submissions,
            Err(error) => {
                // Nobody can be told: it does not say whose it is. The sender never sees it confirmed and sends it again.
                // (The error's text could quote values.)
                tracing::error!(
                    partition,
                    stream.sequence = sequence,
                    line = error.line(),
                    column = error.column(),
                    "a message cannot be decoded and is passed over"
                );
                Vec::new()
            }
        };
        Item::of_message(partition, sequence, submissions, room)
    }

    /// The items of a message, each with its part of the room.
    pub fn of_message(
        partition: u16,
        sequence: u64,
        submissions: Vec<Submission>,
        mut room: Option<OwnedSemaphorePermit>,
    ) -> Vec<Item> {
        let count = submissions.len();
        let item = |(index, submission): (usize, Submission)| {
            let (bytes, cost) = (bytes(&submission), cost(&submission));
            let room = room.as_mut().and_then(|room| room.split(room.num_permits().min(bytes / 1024 + 1)));
            let last = index + 1 == count;
            Item { partition, index: index as u32, sequence, submission: Some(submission), last, bytes, cost, room }
        };
        match count {
            0 => vec![Item::empty(partition, sequence)],
            _ => submissions.into_iter().enumerate().map(item).collect(),
        }
    }

    /// Of a message without a submission, and of none, that the partition is moved on over.
    pub fn empty(partition: u16, sequence: u64) -> Item {
        Item { partition, index: 0, sequence, submission: None, last: true, bytes: 0, cost: 0, room: None }
    }

    /// Which transaction it is: client and `client_seq`.
    pub fn name(&self) -> Option<(Uuid, u64)> {
        self.submission.as_ref().map(|submission| (submission.client_id, submission.client_seq))
    }

    /// Where it is in the stream.
    pub fn left(&self) -> Left {
        Left { partition: self.partition, index: self.index, sequence: self.sequence }
    }
}

/// About what a submission takes in memory.
fn bytes(submission: &Submission) -> usize {
    let change = |change: &millstream_schemas::Change| {
        let values = change.key.iter().chain(&change.values).flatten().map(String::len).sum::<usize>();
        size_of_val(change)
            + values
            + (change.columns.len() + change.values.len() + change.key.len()) * size_of::<String>()
    };
    size_of::<Item>() + submission.changes.iter().map(change).sum::<usize>()
}

/// What a transaction takes to be applied, in changes of a small row. Large values cost by their size: they are parsed, checked and
/// compressed.
fn cost(submission: &Submission) -> usize {
    const SMALL_ROW_BYTES: usize = 256;
    let values = submission.changes.iter().flat_map(|change| change.values.iter().flatten());
    submission.changes.len().max(values.map(String::len).sum::<usize>() / SMALL_ROW_BYTES)
}

/// How the next batch is applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Set-wise, without savepoints.
    Fast,
    /// Set-wise, each statement in a savepoint.
    Careful,
    /// Change by change, a savepoint each transaction.
    Savepoints,
    /// As `Savepoints`, one transaction alone.
    Single,
}

/// A transaction that was left in the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Left {
    pub partition: u16,
    /// Place in its message.
    pub index: u32,
    /// The message's.
    pub sequence: u64,
}

/// How one Postgres transaction moves a partition's position, which also fences off other owners.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PositionMove {
    pub partition: u16,
    pub term: i64,
    pub old: u64,
    pub new: u64,
}

/// A partition that the worker owns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Owned {
    pub term: i64,
    pub position: u64,
}
