//! What waits for a worker, cut into batches. Pure, but for the time that the caller gives.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;
use uuid::Uuid;

use crate::item::{Item, Left, MAX_SAVEPOINTS, MAX_TRANSACTIONS, Mode, Owned, PositionMove};
use crate::worker::pace::Pace;
use crate::worker::progress::Progress;
use crate::worker::turns::Turns;

/// So many careful batches without an error in a row, and the next one is tried without care: where many changes are bad, trying
/// without is a waste.
const WARY: usize = 2;
/// After one that took longer, so many quick ones have to follow before there are more at once again.
const PATIENCE: usize = 10;

/// The worker's queue: a batch, how many of its first items are to be applied how, and behind it what waits for its turn.
///
/// A fast batch that fails is tried again with care, and little by little: careful batches begin with few transactions, with one if
/// the failure took long, and grow while they are quick, so that whoever waits behind a client with bad changes waits for few of
/// them. Where one transaction is
/// known not to go with the others, those before it come first, then it alone. While something is known of its items, nothing
/// is added to a batch.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    turns: Turns,
    batch: Vec<Item>,
    progress: Progress,
    pace: Pace,
    /// Everything is applied alone.
    one_by_one: bool,
    /// Transactions still to be careful with, since a batch with so many failed; and after them, batches.
    again: usize,
    wary: usize,
    /// How many transactions a careful batch may have.
    at_once: usize,
    /// Quick batches before there are more at once.
    slow: usize,
    /// The first ones, to be applied before those that are isolated.
    ahead: usize,
    /// Those behind them, to be applied in savepoints.
    isolated: usize,
    /// The first ones, to be applied alone.
    single: usize,
}

impl Queue {
    /// Without turns: in the order in which items come.
    pub fn in_order() -> Queue {
        Queue { turns: Turns::in_order(), ..Queue::default() }
    }

    /// Whether each item is applied alone.
    pub fn set_one_by_one(&mut self, one_by_one: bool) {
        self.one_by_one = one_by_one;
    }

    /// Adds items, those of a partition in the order of the stream.
    pub fn extend(&mut self, items: impl IntoIterator<Item = Item>) {
        for item in items {
            self.progress.enter(&item);
            self.turns.push(item);
        }
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.batch.is_empty() && self.turns.is_empty()
    }

    /// Whether there is a batch to apply now.
    pub fn is_ready(&self) -> bool {
        !self.batch.is_empty() || self.turns.is_ready()
    }

    /// Whether nothing more should be added.
    pub fn is_full(&self) -> bool {
        self.turns.is_full()
    }

    /// Makes up the next batch: how many of the first [`Queue::items`], and how to apply them.
    pub fn batch(&mut self) -> (usize, Mode) {
        let (set_wise, most) = match self.again + self.wary {
            0 => (Mode::Fast, MAX_TRANSACTIONS),
            _ => (Mode::Careful, self.at_once),
        };
        if (self.batch.is_empty() || self.ahead + self.isolated + self.single == 0)
            && self.turns.fill(&mut self.batch, most)
        {
            self.single = 1;
        }
        let (mode, limit) = if self.single > 0 || self.one_by_one {
            (Mode::Single, 1)
        } else if self.ahead > 0 {
            (set_wise, self.ahead)
        } else if self.isolated > 0 {
            (Mode::Savepoints, self.isolated.min(MAX_SAVEPOINTS))
        } else {
            (set_wise, most)
        };
        (limit.min(self.batch.len()), mode)
    }

    /// The fences for the first `count` items; every partition of theirs must be in `owned`.
    pub fn fences(&self, count: usize, owned: &BTreeMap<u16, Owned>) -> Vec<PositionMove> {
        self.progress.fences(self.batch.iter().take(count), owned)
    }

    /// The batch, and what comes right behind it.
    pub fn items(&self) -> &[Item] {
        &self.batch
    }

    /// The first `count` items are committed, in `mode`; that took so long, and an error was met and undone, or not. Gives them.
    pub fn done(&mut self, count: usize, mode: Mode, took: Duration, met_error: bool) -> Vec<Item> {
        let done: Vec<Item> = self.batch.drain(..count).collect();
        done.iter().for_each(|item| self.progress.done(item.partition, item.sequence));
        self.single = self.single.saturating_sub(count);
        let ahead = self.ahead.min(count);
        self.ahead -= ahead;
        self.isolated = self.isolated.saturating_sub(count - ahead);
        self.again = self.again.saturating_sub(count);
        if mode == Mode::Careful {
            match met_error {
                true => self.wary = WARY,
                false if self.again == 0 => self.wary = self.wary.saturating_sub(1),
                false => {}
            }
            if took > self.pace.careful() {
                (self.at_once, self.slow) = ((self.at_once / 2).max(1), PATIENCE);
            } else if self.slow > 0 {
                self.slow -= 1;
            } else if count >= self.at_once {
                self.at_once = (self.at_once * 2).min(MAX_TRANSACTIONS);
            }
        }
        done
    }

    /// The first `count` items failed in `mode`, after so long: be more careful with them. `at` is the item that does not go with the
    /// others, if that is known.
    pub fn failed(&mut self, count: usize, mode: Mode, at: Option<usize>, took: Duration) {
        match (mode, at) {
            (Mode::Fast, Some(at)) => (self.ahead, self.isolated) = (at, 1),
            (Mode::Careful, Some(at)) => (self.wary, self.ahead, self.isolated) = (WARY, at, 1),
            (Mode::Fast, None) => {
                // Where failing is quick, not far from where it was left.
                let kept = if took > self.pace.careful() { 1 } else { (self.at_once / 4).max(1) };
                (self.again, self.wary, self.at_once) = (count, WARY, kept);
                (self.ahead, self.isolated) = (0, 0);
                // Whoever else waits has a turn before the rest.
                self.turns.put_back(self.batch.split_off(1));
            }
            (Mode::Careful, None) => (self.wary, self.ahead, self.isolated) = (WARY, 0, count),
            (Mode::Savepoints | Mode::Single, _) => self.set_apart(count),
        }
    }

    /// Apply the first `count` items in savepoints: one of them ended its backend, and trying once more with others
    /// would do so again.
    pub fn isolate(&mut self, count: usize) {
        (self.ahead, self.isolated) = (0, self.isolated.max(count).min(self.batch.len()));
    }

    /// Apply the first `count` items each alone: one of them failed in a way that may be the server's too.
    pub fn set_apart(&mut self, count: usize) {
        self.single = self.single.max(count).min(self.batch.len());
    }

    /// Parks the client of the batch's item `at`, with all that the batch holds of it. The others go on.
    pub fn park(&mut self, at: usize, until: Instant) {
        let whose = |item: &Item| item.submission.as_ref().map(|submission| submission.client_id);
        let Some(client_id) = self.batch.get(at).map(whose) else { return };
        let (single, ahead, isolated) = (self.single, self.ahead, self.ahead + self.isolated);
        let (mut items, mut apart) = (Vec::new(), 0);
        for (index, item) in std::mem::take(&mut self.batch).into_iter().enumerate() {
            // Without turns the order of all is kept.
            if whose(&item) != client_id && !self.turns.is_in_order() {
                self.batch.push(item);
                continue;
            }
            items.push(item);
            apart += usize::from(index <= at);
            self.single -= usize::from(index < single);
            self.ahead -= usize::from(index < ahead);
            self.isolated -= usize::from((ahead..isolated).contains(&index));
        }
        self.turns.park(items, apart, until);
    }

    /// The next transaction to be applied aside, and how: see [`Turns::take_aside`]. None of a client that has others in the batch.
    pub fn take_aside(&mut self) -> Option<(Item, Mode)> {
        let is_here = |id| self.batch.iter().any(|item| item.name().is_some_and(|(client_id, _)| client_id == id));
        let (item, apart) = self.turns.take_aside(|id| !is_here(id))?;
        Some((item, if apart { Mode::Single } else { Mode::Fast }))
    }

    /// Whether something waits to be applied aside.
    pub fn has_aside(&self) -> bool {
        self.turns.has_aside()
    }

    /// What was applied aside is committed.
    pub fn done_aside(&mut self, item: &Item) {
        self.drop_aside(item);
        // It is done with, for its position, in the next batch: an item in its place.
        self.turns.push(Item::empty(item.partition, item.sequence));
    }

    /// What was to be applied aside has failed: it is tried apart, at once or after its client was parked until a time.
    pub fn return_aside(&mut self, item: Item, parked: Option<Instant>) {
        if let Some((client_id, _)) = item.name() {
            self.turns.back(client_id, Some(item), parked);
        }
    }

    /// Its partition is somebody else's, or was meanwhile.
    pub fn drop_aside(&mut self, item: &Item) {
        if let Some((client_id, _)) = item.name() {
            self.turns.back(client_id, None, None);
        }
    }

    /// A batch is about to be done with that took so long; if it is one transaction, others may not wait for its client for a while.
    pub fn took(&mut self, count: usize, took: Duration, now: Instant) {
        let client_id = self.batch.first().filter(|_| count == 1).and_then(Item::name).map(|(client_id, _)| client_id);
        self.measure(client_id, took, now);
    }

    /// A transaction that was applied aside took so long.
    pub fn took_aside(&mut self, item: &Item, took: Duration, now: Instant) {
        self.measure(item.name().map(|(client_id, _)| client_id), took, now);
    }

    /// A client's transaction was stopped, because it took longer than others may wait.
    pub fn took_too_long(&mut self, client_id: Uuid, now: Instant) {
        self.turns.set_slow(client_id, now, true);
    }

    fn measure(&mut self, client_id: Option<Uuid>, took: Duration, now: Instant) {
        let is_slow = self.pace.is_slow(took);
        let Some(client_id) = client_id else { return };
        if !is_slow {
            self.turns.set_quick(client_id);
        } else if self.turns.is_slow(client_id, now) || self.pace.may_tell(now) {
            self.turns.set_slow(client_id, now, false);
        }
    }

    /// Clients that were parked until now go on.
    pub fn wake(&mut self, now: Instant) {
        self.turns.wake(now);
    }

    /// When the next parked client goes on.
    pub fn wakes(&self) -> Option<Instant> {
        self.turns.wakes()
    }

    /// How many clients are parked.
    pub fn parked(&self) -> usize {
        self.turns.parked()
    }

    /// What is to be read from the stream again: see [`Turns::wanted`].
    pub fn wanted(&mut self) -> Option<(Uuid, Left)> {
        self.turns.wanted()
    }

    /// What a client left in a message has been read again, with all of the message; if it is still there.
    pub fn load(&mut self, client_id: Uuid, left: Left, items: Vec<Item>) {
        let missing = self.turns.load(client_id, left.sequence, items);
        (0..missing).for_each(|_| self.progress.done(left.partition, left.sequence));
    }

    /// It could not be read.
    pub fn fail_to_load(&mut self, client_id: Uuid) {
        self.turns.fail_to_load(client_id);
    }

    /// Drops what the positions say is done, and what belongs to partitions that are not owned any more.
    pub fn retain(&mut self, owned: &BTreeMap<u16, Owned>) {
        self.keep(|partition, sequence| owned.get(&partition).is_some_and(|state| sequence > state.position));
    }

    /// Drops a partition, which is handed over again.
    pub fn forget(&mut self, partition: u16) {
        self.keep(|other, _| other != partition);
    }

    fn keep(&mut self, keep: impl Fn(u16, u64) -> bool) {
        self.batch.retain(|item| keep(item.partition, item.sequence));
        self.turns.retain(&keep);
        self.progress.retain(&keep);
        // How many of the first were to be isolated is not known any more: the next failure will tell.
        (self.ahead, self.isolated, self.single) = (0, 0, 0);
        self.again = self.again.min(self.batch.len());
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::time::Duration;

    use super::*;
    use crate::worker::pace::CAREFUL;
    use millstream_schemas::stream::Submission;

    use crate::decide::validator::tests::change;

    /// A message of client 0 with transactions of these sizes.
    pub fn message(partition: u16, sequence: u64, sizes: &[usize]) -> Vec<Item> {
        Item::of_message(partition, sequence, sizes.iter().map(|size| submission(0, sequence, *size)).collect(), None)
    }

    pub fn submission(client: u128, client_seq: u64, size: usize) -> Submission {
        Submission {
            client_id: Uuid::from_u128(client),
            user_id: String::new(),
            run_id: Uuid::nil(),
            previous: None,
            after: Vec::new(),
            client_seq,
            attempt: 1,
            changes: (0..size).map(|_| change(millstream_schemas::Operation::Delete, "1", &[])).collect(),
            traceparent: None,
        }
    }

    fn queue(messages: Vec<Vec<Item>>) -> Queue {
        let mut queue = Queue::default();
        queue.extend(messages.into_iter().flatten());
        queue
    }

    #[test]
    fn batches_keep_to_both_limits() {
        let check = |sizes: Vec<usize>, expected: usize| {
            assert_eq!(queue(vec![message(0, 1, &sizes)]).batch().0, expected);
        };
        check(vec![1; 250], MAX_TRANSACTIONS);
        check(vec![1; 99], 99);
        check(vec![200; 9], 5);
        check(vec![199, 200, 200, 200, 200, 2], 5);
        check(vec![], 1);
    }

    #[test]
    fn what_does_not_go_with_others_is_cut_out() {
        use Mode::{Careful, Fast, Savepoints};
        let mut queue = queue(vec![message(1, 1, &[1; 300])]);
        // Something fails: once more, with care and little by little, and then for a while.
        assert_eq!(queue.batch(), (100, Fast));
        queue.failed(100, Fast, None, Duration::ZERO);
        for count in [1, 2, 4, 8, 16, 32, 64] {
            assert_eq!(queue.batch(), (count, Careful));
            queue.done(count, Careful, Duration::ZERO, false);
        }
        assert_eq!(queue.batch(), (100, Careful));
        queue.failed(100, Careful, Some(70), Duration::ZERO);
        for (count, mode) in [(70, Careful), (1, Savepoints)] {
            assert_eq!(queue.batch(), (count, mode));
            // While errors are met, there is no end of it.
            queue.done(count, mode, Duration::ZERO, mode == Careful);
        }
        // The first one of a batch.
        assert_eq!(queue.batch(), (100, Careful));
        queue.failed(100, Careful, Some(0), Duration::ZERO);
        assert_eq!(queue.batch(), (1, Savepoints));
        queue.done(1, Savepoints, Duration::ZERO, false);
        // What takes long comes in smaller parts.
        queue.wary = 3;
        for count in [100, 50, 25] {
            queue.extend(message(1, 2, &[1; 100]));
            assert_eq!(queue.batch(), (count, Careful));
            queue.done(count, Careful, 3 * CAREFUL, false);
        }
        // After so many batches it is tried without.
        queue.wary = 2 * PATIENCE;
        for _ in 0..=PATIENCE {
            queue.extend(message(1, 2, &[1; 100]));
            assert_eq!(queue.batch(), (12, Careful));
            queue.done(12, Careful, Duration::ZERO, false);
        }
        assert_eq!(queue.batch(), (24, Careful));
        while queue.wary > 0 {
            queue.extend(message(1, 3, &[1; 100]));
            let (count, mode) = queue.batch();
            assert_eq!(mode, Careful);
            queue.done(count, mode, Duration::ZERO, false);
        }
        // Where failing is quick, careful batches do not begin with one again.
        let (count, mode) = queue.batch();
        assert_eq!((mode, queue.at_once), (Fast, MAX_TRANSACTIONS));
        queue.failed(count, Fast, None, Duration::ZERO);
        assert_eq!(queue.batch(), (25, Careful));
        queue.done(25, Careful, Duration::ZERO, true);
        (queue.again, queue.wary) = (0, 0);
        let (count, mode) = queue.batch();
        assert_eq!(mode, Fast);
        queue.failed(count, Fast, None, 3 * CAREFUL);
        assert_eq!(queue.batch(), (1, Careful));
        queue.done(1, Careful, Duration::ZERO, false);
        // Only COMMIT says no.
        (queue.again, queue.wary, queue.at_once) = (0, 1, MAX_TRANSACTIONS);
        queue.extend(message(1, 4, &[1; 100]));
        assert_eq!(queue.batch(), (100, Careful));
        queue.failed(100, Careful, None, Duration::ZERO);
        assert_eq!(queue.batch(), (MAX_SAVEPOINTS, Savepoints));
    }

    #[test]
    fn isolation_lasts_for_the_failed_batch() {
        let mut queue = queue(vec![message(1, 1, &[1; 90])]);
        assert_eq!(queue.batch(), (90, Mode::Fast));
        queue.isolate(90);
        queue.extend(message(1, 2, &[1; 50]));
        assert_eq!(queue.batch(), (MAX_SAVEPOINTS, Mode::Savepoints));
        queue.done(MAX_SAVEPOINTS, Mode::Savepoints, Duration::ZERO, false);
        assert_eq!(queue.batch(), (30, Mode::Savepoints));
        queue.failed(30, Mode::Savepoints, None, Duration::ZERO);
        for _ in 0..30 {
            assert_eq!(queue.batch(), (1, Mode::Single));
            queue.done(1, Mode::Single, Duration::ZERO, false);
        }
        assert_eq!(queue.batch(), (50, Mode::Fast));
    }

    /// Of several clients, a message each: client, sequence, sizes.
    fn clients(messages: &[(u128, u64, &[usize])]) -> Queue {
        let message = |(client, sequence, sizes): &(u128, u64, &[usize])| {
            let submissions =
                sizes.iter().enumerate().map(|(n, size)| submission(*client, n as u64 + 1, *size)).collect();
            Item::of_message(1, *sequence, submissions, None)
        };
        queue(messages.iter().map(message).collect())
    }

    fn whose(queue: &Queue) -> Vec<(u128, u64)> {
        let of = |item: &Item| item.submission.as_ref().map(|s| (s.client_id.as_u128(), s.client_seq));
        queue.items().iter().filter_map(of).collect()
    }

    #[test]
    fn a_parked_client_leaves_the_batch_and_others_stay_as_they_were() {
        let mut queue = clients(&[(1, 1, &[1, 1]), (2, 2, &[1, 1]), (3, 3, &[1])]);
        assert_eq!(queue.batch(), (5, Mode::Fast));
        assert_eq!(whose(&queue), [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2)]);
        queue.failed(5, Mode::Savepoints, None, Duration::ZERO);
        queue.done(1, Mode::Single, Duration::ZERO, false);
        let until = Instant::now() + Duration::from_secs(1);
        queue.park(0, until);
        assert_eq!((whose(&queue), queue.parked()), (vec![(3, 1), (1, 2)], 1));
        for _ in 0..2 {
            assert_eq!(queue.batch(), (1, Mode::Single));
            queue.done(1, Mode::Single, Duration::ZERO, false);
        }
        assert!(!queue.is_ready() && !queue.is_empty());
        assert_eq!(queue.wakes(), Some(until));
        // The position waits with it: message 2 is not done, though 3 is.
        let owned = BTreeMap::from([(1, Owned { term: 1, position: 0 })]);
        queue.wake(until);
        assert!(queue.is_ready());
        assert_eq!(queue.batch(), (1, Mode::Single));
        assert_eq!(whose(&queue), [(2, 1)]);
        assert_eq!(queue.fences(1, &owned)[0].new, 1);
        queue.done(1, Mode::Single, Duration::ZERO, false);
    }

    /// Random messages, failures, parking and reading again: each transaction is done once, each client's in order, and no
    /// position passes what is not done.
    #[test]
    fn whatever_happens_order_and_positions_hold() {
        const CLIENTS: u64 = 9;
        const MESSAGES: u64 = 60;
        for seed in 1..=150_u64 {
            let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15);
            let mut random = |below: u64| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 33) % below
            };
            let mut last = [0; CLIENTS as usize];
            let messages: Vec<(u16, Vec<Submission>)> = (0..MESSAGES)
                .map(|_| {
                    let partition = random(3);
                    let submissions = (0..random(5)).map(|_| {
                        // A partition's clients; one of them has much to say.
                        let client = partition + 3 * random(3);
                        let size = if client == 0 { 900 } else { 1 + random(30) * random(30) };
                        last[client as usize] += 1;
                        submission(u128::from(client) + 1, last[client as usize], size as usize)
                    });
                    (partition as u16, submissions.collect())
                })
                .collect();
            let items = |sequence: u64| {
                let (partition, submissions) = &messages[sequence as usize - 1];
                Item::of_message(*partition, sequence, submissions.clone(), None)
            };
            let mut queue = Queue::default();
            let mut owned: BTreeMap<u16, Owned> = (0..3).map(|p| (p, Owned { term: 1, position: 0 })).collect();
            let mut open: Vec<usize> = messages.iter().map(|(_, submissions)| submissions.len().max(1)).collect();
            let (mut done, mut handed, mut now) = ([0; CLIENTS as usize], 0, Instant::now());
            let committed = |done: &mut [u64], open: &mut [usize], item: &Item| {
                open[item.sequence as usize - 1] -= 1;
                if let Some((client_id, client_seq)) = item.name() {
                    let of_client = &mut done[client_id.as_u128() as usize - 1];
                    *of_client += 1;
                    assert_eq!(*of_client, client_seq, "{seed}: {client_id}");
                }
            };
            let mut aside = None;
            for step in 0.. {
                assert!(step < 20_000, "{seed}: it does not end");
                if handed < MESSAGES && random(3) > 0 {
                    handed += 1;
                    queue.extend(items(handed));
                }
                if let Some((client, left)) = queue.wanted() {
                    match random(4) {
                        0 => queue.fail_to_load(client),
                        _ => queue.load(client, left, items(left.sequence)),
                    }
                }
                now += Duration::from_millis(random(200));
                queue.wake(now);
                if aside.is_none() && random(2) > 0 {
                    aside = queue.take_aside();
                } else if random(3) > 0
                    && let Some((item, _)) = aside.take()
                {
                    match random(5) {
                        0 => queue.return_aside(item, Some(now + Duration::from_millis(random(500)))),
                        1 => queue.return_aside(item, None),
                        _ => {
                            // It counts once the item in its place is done with.
                            open[item.sequence as usize - 1] += 1;
                            committed(&mut done, &mut open, &item);
                            queue.done_aside(&item);
                        }
                    }
                }
                if !queue.is_ready() {
                    if handed == MESSAGES && queue.is_empty() {
                        break;
                    }
                    continue;
                }
                let (count, mode) = queue.batch();
                assert!((1..=MAX_TRANSACTIONS).contains(&count), "{seed}: {count}");
                let at = random(count as u64) as usize;
                match random(10) {
                    0 => queue.failed(count, mode, None, Duration::ZERO),
                    1 => queue.failed(count, mode, Some(at), Duration::ZERO),
                    2 => queue.set_apart(count),
                    3 => queue.isolate(count),
                    4 | 5 => queue.park(at, now + Duration::from_millis(random(500))),
                    _ => {
                        for fence in queue.fences(count, &owned) {
                            let position = &mut owned.get_mut(&fence.partition).unwrap().position;
                            assert!(fence.old == *position && fence.new >= fence.old, "{seed}: {fence:?}");
                            *position = fence.new;
                        }
                        queue
                            .done(count, mode, Duration::ZERO, random(3) == 0)
                            .iter()
                            .for_each(|item| committed(&mut done, &mut open, item));
                        for (n, open) in open.iter().enumerate().filter(|(_, open)| **open > 0) {
                            let position = owned[&messages[n].0].position;
                            assert!(position < n as u64 + 1, "{seed}: {position} passes {n} with {open} items");
                        }
                    }
                }
            }
            assert_eq!(done, last, "{seed}");
            for (partition, owned) in owned {
                let newest = messages.iter().rposition(|(of, _)| *of == partition).map_or(0, |n| n as u64 + 1);
                assert_eq!(owned.position, newest, "{seed}: partition {partition}");
            }
        }
    }

    #[test]
    fn lost_and_finished_items_leave() {
        let mut queue = queue(vec![message(1, 5, &[1]), message(2, 6, &[1]), message(1, 7, &[1])]);
        queue.batch();
        queue.extend(message(2, 8, &[1]));
        queue.retain(&BTreeMap::from([(1, Owned { term: 1, position: 5 })]));
        queue.batch();
        assert_eq!(queue.items().iter().map(|item| item.sequence).collect::<Vec<_>>(), [7]);
        queue.forget(1);
        assert!(queue.is_empty());
    }
}
