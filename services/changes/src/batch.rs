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

/// So many batches are applied carefully after one that failed; where many are bad, trying without is a waste.
const WARY: usize = 10;

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
    /// Set-wise, without savepoints.
    Fast,
    /// Set-wise, each statement in a savepoint.
    Careful,
    /// Change by change, a savepoint each transaction.
    Savepoints,
    /// As `Savepoints`, one transaction alone.
    Single,
}

/// The worker's queue: items in stream order, and how many of the first are to be applied how.
///
/// A fast batch that fails is tried again with care. Where one transaction is known not to go with the others, those
/// before it come first, then it alone.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    items: VecDeque<Item>,
    /// Batches still to be careful with.
    wary: usize,
    /// The first ones, to be applied before those that are isolated.
    ahead: usize,
    /// Those behind them, to be applied in savepoints.
    isolated: usize,
    /// The first ones, to be applied alone.
    single: usize,
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
        let set_wise = if self.wary > 0 { Mode::Careful } else { Mode::Fast };
        let (mode, limit) = if self.single > 0 {
            (Mode::Single, 1)
        } else if self.ahead > 0 {
            (set_wise, self.ahead.min(MAX_TRANSACTIONS))
        } else if self.isolated > 0 {
            (Mode::Savepoints, self.isolated.min(MAX_SAVEPOINTS))
        } else {
            (set_wise, MAX_TRANSACTIONS)
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
        self.single = self.single.saturating_sub(count);
        let ahead = self.ahead.min(count);
        self.ahead -= ahead;
        self.isolated = self.isolated.saturating_sub(count - ahead);
        if mode == Mode::Careful {
            self.wary = self.wary.saturating_sub(1);
        }
    }

    /// The first `count` items failed in `mode`: be more careful with them. `at` is the item that does not go with the
    /// others, if that is known.
    pub fn failed(&mut self, count: usize, mode: Mode, at: Option<usize>) {
        match (mode, at) {
            (Mode::Fast | Mode::Careful, Some(at)) => (self.ahead, self.isolated) = (at, 1),
            (Mode::Fast, None) => self.wary = WARY,
            (Mode::Careful, None) => (self.ahead, self.isolated) = (0, count),
            (Mode::Savepoints | Mode::Single, _) => self.single = self.single.max(count),
        }
    }

    /// Apply the first `count` items in savepoints: one of them ended its backend, and trying once more with others
    /// would do so again.
    pub fn isolate(&mut self, count: usize) {
        (self.ahead, self.isolated) = (0, self.isolated.max(count.min(self.items.len())));
    }

    /// Drops what the positions say is done, and what belongs to partitions that are not owned any more.
    pub fn retain(&mut self, owned: &BTreeMap<u16, Owned>) {
        self.items.retain(|item| owned.get(&item.partition).is_some_and(|state| item.sequence > state.position));
        // How many of the first were to be isolated is not known any more: the next failure will tell.
        (self.ahead, self.isolated, self.single) = (0, 0, 0);
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
    fn what_does_not_go_with_others_is_cut_out() {
        use Mode::{Careful, Fast, Savepoints};
        let mut queue = queue(vec![message(1, 1, &[1; 300])]);
        let next = |queue: &mut Queue| (queue.batch().0.len(), queue.batch().1);
        // Something fails: once more, with care, and then for a while.
        assert_eq!(next(&mut queue), (100, Fast));
        queue.failed(100, Fast, None);
        assert_eq!(next(&mut queue), (100, Careful));
        queue.failed(100, Careful, Some(70));
        for (count, mode) in [(70, Careful), (1, Savepoints), (100, Careful)] {
            assert_eq!(next(&mut queue), (count, mode));
            queue.done(count, mode);
        }
        // The first one of a batch.
        queue.failed(100, Careful, Some(0));
        assert_eq!(next(&mut queue), (1, Savepoints));
        queue.done(1, Savepoints);
        for _ in 2..WARY {
            assert_eq!(queue.batch().1, Careful);
            queue.done(1, Careful);
        }
        assert_eq!(queue.batch().1, Fast);
        // Only COMMIT says no.
        queue.wary = 1;
        queue.failed(100, Careful, None);
        assert_eq!(next(&mut queue), (MAX_SAVEPOINTS, Savepoints));
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
        queue.failed(30, Mode::Savepoints, None);
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
