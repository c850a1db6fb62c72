//! How far the partitions of a worker are done with. Pure.
//!
//! Clients take turns, so messages are done with in another order than the stream's. A partition's position moves over
//! the messages that are done with from the first one on; it may lag behind what the ledger knows. Messages behind it that
//! are read again are repeats by the ledger.

use std::collections::BTreeMap;

use crate::item::{Item, Owned, PositionMove};

/// The messages that are not done with. As many as there are such messages, however far others are ahead of them.
#[derive(Debug, Default)]
pub(crate) struct Progress(BTreeMap<u16, Partition>);

#[derive(Debug, Default)]
struct Partition {
    /// Of the newest message.
    seen: u64,
    /// By sequence.
    open: BTreeMap<u64, Open>,
}

#[derive(Debug, Default)]
struct Open {
    /// How many of its items are not done with.
    items: usize,
    /// Its last item has been seen.
    whole: bool,
}

impl Progress {
    /// Takes an item into account; a partition's items come in the order of the stream.
    pub fn enter(&mut self, item: &Item) {
        let partition = self.0.entry(item.partition).or_default();
        partition.seen = partition.seen.max(item.sequence);
        let open = partition.open.entry(item.sequence).or_default();
        open.items += 1;
        open.whole |= item.last;
    }

    /// An item of this message is done with.
    pub fn done(&mut self, partition: u16, sequence: u64) {
        let Some(partition) = self.0.get_mut(&partition) else { return };
        let Some(open) = partition.open.get_mut(&sequence) else { return };
        open.items = open.items.saturating_sub(1);
        if open.items == 0 && open.whole {
            partition.open.remove(&sequence);
        }
    }

    /// The fences for a batch: where the positions of its partitions are once it is done with.
    pub fn fences<'a>(&self, items: impl Iterator<Item = &'a Item>, owned: &BTreeMap<u16, Owned>) -> Vec<PositionMove> {
        let mut batch: BTreeMap<u16, BTreeMap<u64, usize>> = BTreeMap::new();
        for item in items {
            *batch.entry(item.partition).or_default().entry(item.sequence).or_default() += 1;
        }
        let fence = |(partition, done): (u16, BTreeMap<u64, usize>)| {
            let Owned { term, position } = *owned.get(&partition)?;
            let Partition { seen, open } = self.0.get(&partition)?;
            let remains = |(sequence, open): &(&u64, &Open)| !open.whole || done.get(sequence) != Some(&open.items);
            let new = open.iter().find(remains).map_or(*seen, |(first, _)| first.saturating_sub(1));
            Some(PositionMove { partition, term, old: position, new: new.max(position) })
        };
        batch.into_iter().filter_map(fence).collect()
    }

    /// Forgets the messages that are not kept.
    pub fn retain(&mut self, keep: impl Fn(u16, u64) -> bool) {
        self.0.retain(|partition, state| {
            state.open.retain(|sequence, _| keep(*partition, *sequence));
            keep(*partition, u64::MAX)
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::queue::tests::message;

    #[test]
    fn a_position_moves_over_what_is_done_from_the_first_on() {
        let owned = BTreeMap::from([(1, Owned { term: 5, position: 10 }), (2, Owned { term: 6, position: 12 })]);
        let items: Vec<Item> =
            [message(1, 11, &[1, 1]), message(2, 13, &[1]), message(1, 14, &[1, 1])].into_iter().flatten().collect();
        let mut progress = Progress::default();
        items.iter().for_each(|item| progress.enter(item));
        let check = |progress: &Progress, batch: &[usize], expected: &[(u16, i64, u64, u64)]| {
            let fences = progress.fences(batch.iter().map(|index| &items[*index]), &owned);
            let found: Vec<_> = fences.iter().map(|f| (f.partition, f.term, f.old, f.new)).collect();
            assert_eq!(found, expected, "{batch:?}");
        };
        // 11 is half done, or done, or all is; and the same in another order.
        check(&progress, &[0], &[(1, 5, 10, 10)]);
        check(&progress, &[0, 1], &[(1, 5, 10, 13)]);
        check(&progress, &[0, 1, 2, 3], &[(1, 5, 10, 13), (2, 6, 12, 13)]);
        check(&progress, &[0, 1, 2, 3, 4], &[(1, 5, 10, 14), (2, 6, 12, 13)]);
        check(&progress, &[1, 3, 4], &[(1, 5, 10, 10)]);
        for index in [4, 3, 1] {
            progress.done(items[index].partition, items[index].sequence);
        }
        check(&progress, &[0], &[(1, 5, 10, 14)]);
        assert_eq!(progress.0[&1].open.len(), 1, "what is done takes no memory");
        progress.done(1, 11);
        assert!(progress.0[&1].open.is_empty());
    }

    #[test]
    fn a_message_is_not_done_before_its_last_item_is_here() {
        let owned = BTreeMap::from([(1, Owned { term: 1, position: 0 })]);
        let items = message(1, 5, &[1, 1]);
        let mut progress = Progress::default();
        progress.enter(&items[0]);
        assert_eq!(progress.fences(items[..1].iter(), &owned)[0].new, 4);
        progress.done(1, 5);
        progress.enter(&items[1]);
        assert_eq!(progress.fences(items[1..].iter(), &owned)[0].new, 5);
    }

    #[test]
    fn lost_partitions_and_finished_messages_are_forgotten() {
        let mut progress = Progress::default();
        for (partition, sequence) in [(1, 5), (1, 7), (2, 6)] {
            progress.enter(&message(partition, sequence, &[1])[0]);
        }
        progress.retain(|partition, sequence| partition == 1 && sequence > 5);
        assert_eq!(progress.0.keys().collect::<Vec<_>>(), [&1]);
        assert_eq!(progress.0[&1].open.keys().collect::<Vec<_>>(), [&7]);
    }
}
