//! What waits for a worker, cut into batches. Pure.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use millstream_schemas::stream::Submission;
use tokio::sync::OwnedSemaphorePermit;

/// Most transactions in one Postgres transaction.
pub(crate) const MAX_TRANSACTIONS: usize = 100;
/// Most changes in one Postgres transaction, unless a single transaction holds more.
pub(crate) const MAX_CHANGES: usize = 1_000;
/// Most transactions in one Postgres transaction where each has a savepoint: from 64 subtransactions on, every snapshot
/// of the server is slowed down.
pub(crate) const MAX_SAVEPOINTS: usize = 60;

/// So few transactions that are known to hold a bad one are applied one by one rather than halved once more.
const MIN_HALVED: usize = 8;

/// One submission of a message, or a message without any.
#[derive(Debug)]
pub(crate) struct Item {
    /// Partition of the message.
    pub partition: u16,
    /// Its stream sequence.
    pub sequence: u64,
    /// What to do; none for an undecodable message, and for an idle partition that is only moved on.
    pub submission: Option<Submission>,
    /// The last one of its message: with it the partition's position moves to `sequence`.
    pub last: bool,
    /// Room in the worker's memory, freed when the message is done with.
    #[expect(dead_code, reason = "held, not read")]
    pub room: Option<Arc<OwnedSemaphorePermit>>,
}

/// A partition's fence within one Postgres transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fence {
    pub partition: u16,
    pub epoch: i64,
    pub old: u64,
    pub new: u64,
}

/// A partition that the worker owns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Owned {
    pub epoch: i64,
    pub position: u64,
}

/// How the next batch is applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Set-wise, all or nothing.
    Fast,
    /// Change by change, a savepoint each transaction.
    Savepoints,
    /// As `Savepoints`, one transaction alone: a failure of COMMIT is then its own.
    Single,
}

/// The worker's queue: items in stream order, and how many of the first are to be applied how.
///
/// A fast batch that fails is halved until few transactions are left around the bad one; those are applied in
/// savepoints. Where many are bad, fast batches become smaller, and grow again as they succeed.
#[derive(Debug)]
pub(crate) struct Queue {
    items: VecDeque<Item>,
    /// Most transactions in a fast batch.
    fast: usize,
    /// The first ones, known to hold a bad one among them.
    suspect: usize,
    /// The first ones, to be applied in savepoints.
    isolated: usize,
    /// The first ones, to be applied alone.
    single: usize,
}

impl Default for Queue {
    fn default() -> Self {
        Queue { items: VecDeque::new(), fast: MAX_TRANSACTIONS, suspect: 0, isolated: 0, single: 0 }
    }
}

impl Queue {
    /// Adds the items of a message.
    pub fn extend(&mut self, items: impl IntoIterator<Item = Item>) {
        self.items.extend(items);
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// How many items wait.
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Whether a full batch waits.
    pub fn is_full(&self) -> bool {
        self.items.len() >= MAX_TRANSACTIONS
    }

    /// The next batch and how to apply it.
    pub fn batch(&mut self) -> (&[Item], Mode) {
        let (mode, limit) = if self.single > 0 {
            (Mode::Single, 1)
        } else if self.isolated > 0 {
            (Mode::Savepoints, self.isolated.min(MAX_SAVEPOINTS))
        } else if self.suspect > MIN_HALVED {
            (Mode::Fast, self.suspect / 2)
        } else if self.suspect > 0 {
            (Mode::Savepoints, self.suspect)
        } else {
            (Mode::Fast, self.fast)
        };
        let mut changes = 0;
        let mut count = 0;
        for item in self.items.iter().take(limit) {
            changes += item.submission.as_ref().map_or(0, |submission| submission.changes.len());
            if count > 0 && changes > MAX_CHANGES {
                break;
            }
            count += 1;
        }
        (&self.items.make_contiguous()[..count], mode)
    }

    /// The first `count` items are committed, in `mode`.
    pub fn done(&mut self, count: usize, mode: Mode) {
        self.items.drain(..count);
        for first in [&mut self.suspect, &mut self.isolated, &mut self.single] {
            *first = first.saturating_sub(count);
        }
        if mode == Mode::Fast {
            self.fast = (self.fast * 2).min(MAX_TRANSACTIONS);
        }
    }

    /// The first `count` items failed in `mode`: be more careful with them.
    pub fn failed(&mut self, count: usize, mode: Mode) {
        match mode {
            Mode::Fast => {
                self.suspect = count;
                self.fast = (self.fast / 2).max(MIN_HALVED);
            }
            Mode::Savepoints | Mode::Single => self.single = self.single.max(count),
        }
    }

    /// Apply the first `count` items in savepoints: one of them ended its backend, and halving would do so repeatedly.
    pub fn isolate(&mut self, count: usize) {
        self.isolated = self.isolated.max(count.min(self.items.len()));
    }

    /// Drops what the positions say is done, and what belongs to partitions that are not owned any more.
    pub fn retain(&mut self, owned: &BTreeMap<u16, Owned>) {
        self.items.retain(|item| owned.get(&item.partition).is_some_and(|state| item.sequence > state.position));
        // How many of the first were to be isolated is not known any more: the next failure will tell.
        (self.suspect, self.isolated, self.single) = (0, 0, 0);
    }
}

/// The fences for a batch; every partition of the batch must be in `owned`.
pub(crate) fn fences(items: &[Item], owned: &BTreeMap<u16, Owned>) -> Vec<Fence> {
    let mut fences: BTreeMap<u16, Fence> = BTreeMap::new();
    for item in items {
        let Some(state) = owned.get(&item.partition) else { continue };
        let fence = fences.entry(item.partition).or_insert(Fence {
            partition: item.partition,
            epoch: state.epoch,
            old: state.position,
            new: state.position,
        });
        if item.last {
            fence.new = fence.new.max(item.sequence);
        }
    }
    fences.into_values().collect()
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::validator::tests::change;

    fn message(partition: u16, sequence: u64, sizes: &[usize]) -> Vec<Item> {
        let item = |submission, last| Item { partition, sequence, submission, last, room: None };
        if sizes.is_empty() {
            return vec![item(None, true)];
        }
        let submission = |size: usize| Submission {
            client_id: Uuid::nil(),
            user_id: String::new(),
            instance: Uuid::nil(),
            previous: None,
            after: Vec::new(),
            seq: 1,
            attempt: 1,
            changes: (0..size).map(|_| change(millstream_schemas::Operation::Delete, "1", &[])).collect(),
            traceparent: None,
        };
        sizes.iter().enumerate().map(|(n, size)| item(Some(submission(*size)), n + 1 == sizes.len())).collect()
    }

    fn queue(messages: Vec<Vec<Item>>) -> Queue {
        let mut queue = Queue::default();
        queue.extend(messages.into_iter().flatten());
        queue
    }

    #[test]
    fn batches_keep_to_both_limits() {
        let check = |sizes: Vec<usize>, expected: usize| {
            assert_eq!(queue(vec![message(0, 1, &sizes)]).batch().0.len(), expected);
        };
        check(vec![1; 250], MAX_TRANSACTIONS);
        check(vec![1; 99], 99);
        check(vec![400, 400, 400], 2);
        check(vec![500, 500, 1], 2);
        check(vec![5_000, 1], 1);
        check(vec![], 1);
    }

    #[test]
    fn positions_move_with_the_last_of_a_message_only() {
        let owned = BTreeMap::from([(1, Owned { epoch: 5, position: 10 }), (2, Owned { epoch: 6, position: 12 })]);
        let items: Vec<Item> =
            [message(1, 11, &[1, 1]), message(2, 13, &[1]), message(1, 14, &[1, 1])].into_iter().flatten().collect();
        let new = |count: usize| {
            fences(&items[..count], &owned).iter().map(|f| (f.partition, f.epoch, f.old, f.new)).collect::<Vec<_>>()
        };
        assert_eq!(new(1), [(1, 5, 10, 10)]);
        assert_eq!(new(2), [(1, 5, 10, 11)]);
        assert_eq!(new(4), [(1, 5, 10, 11), (2, 6, 12, 13)]);
        assert_eq!(new(5), [(1, 5, 10, 14), (2, 6, 12, 13)]);
    }

    #[test]
    fn a_bad_transaction_is_closed_in_on() {
        let mut queue = queue(vec![message(1, 1, &[1; 200])]);
        let bad = 70;
        let (mut start, mut attempts) = (0, Vec::new());
        while start < 200 {
            let (items, mode) = queue.batch();
            let count = items.len();
            attempts.push((count, mode));
            if mode == Mode::Fast && (start..start + count).contains(&bad) {
                queue.failed(count, mode);
            } else {
                queue.done(count, mode);
                start += count;
            }
        }
        use Mode::{Fast, Savepoints};
        // 0 to 99 hold it; 0 to 49 do not; 50 to 74 do; 50 to 61 and 62 to 67 do not; so 68 to 74 do.
        let expected =
            [(100, Fast), (50, Fast), (25, Fast), (12, Fast), (6, Fast), (7, Savepoints), (100, Fast), (25, Fast)];
        assert_eq!(attempts, expected);
    }

    #[test]
    fn isolation_lasts_for_the_failed_batch() {
        let mut queue = queue(vec![message(1, 1, &[1; 90])]);
        assert_eq!((queue.batch().0.len(), queue.batch().1), (90, Mode::Fast));
        queue.isolate(90);
        queue.extend(message(1, 2, &[1; 50]));
        assert_eq!((queue.batch().0.len(), queue.batch().1), (MAX_SAVEPOINTS, Mode::Savepoints));
        queue.done(MAX_SAVEPOINTS, Mode::Savepoints);
        assert_eq!((queue.batch().0.len(), queue.batch().1), (30, Mode::Savepoints));
        queue.failed(30, Mode::Savepoints);
        assert_eq!((queue.batch().0.len(), queue.batch().1), (1, Mode::Single));
        queue.done(30, Mode::Single);
        assert_eq!((queue.batch().0.len(), queue.batch().1), (50, Mode::Fast));
    }

    #[test]
    fn lost_and_finished_items_leave() {
        let mut queue = queue(vec![message(1, 5, &[1]), message(2, 6, &[1]), message(1, 7, &[1])]);
        queue.retain(&BTreeMap::from([(1, Owned { epoch: 1, position: 5 })]));
        let (items, _) = queue.batch();
        assert_eq!(items.iter().map(|item| item.sequence).collect::<Vec<_>>(), [7]);
    }
}
