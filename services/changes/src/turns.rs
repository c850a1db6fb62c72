//! Whose transaction is next: clients take turns. Pure, but for the time that the caller gives.
//!
//! The order that must hold is that of each client. Turns go round by deficit round robin (Shreedhar and Varghese,
//! "Efficient Fair Queuing using Deficit Round-Robin", 1995): a turn is one transaction, and a large one waits until its
//! client has the credit. A client that is alone needs none. A client whose transaction is in trouble is parked until a
//! time, and its transactions up to that one are then tried apart from others.
//!
//! A client does not fill the memory of the worker either: what exceeds its share is left in the stream, and read again
//! when its turn comes near.

use std::collections::{BTreeSet, HashMap, VecDeque};

use tokio::time::Instant;
use uuid::Uuid;

use crate::batch::{Item, MAX_CHANGES, MAX_TRANSACTIONS};

/// Changes for which a client gets credit in a round of turns.
const QUANTUM: usize = 20;
/// A transaction of more changes does not join a batch of others: they would wait for it.
const LARGE_CHANGES: usize = 200;
/// Bytes of a client that are kept in memory; more are left in the stream.
const SHARE_BYTES: usize = 1 << 20;
/// The same where more than [`CROWDED_BYTES`] wait: half of the worker's room.
const CROWDED_SHARE_BYTES: usize = 16 << 10;
const CROWDED_BYTES: usize = crate::consumer::WORKER_KIB << 9;
/// What was left in the stream is not read while more than this waits for its turn.
const MAX_BYTES: usize = crate::consumer::WORKER_KIB << 10;
/// Most transactions that a worker leaves in the stream and keeps in mind, 24 bytes each.
const MAX_LEFT: usize = 100_000;

/// A transaction that was left in the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Left {
    pub partition: u16,
    /// Place in its message.
    pub index: u32,
    /// The message's.
    pub sequence: u64,
}

/// A client of which something waits.
#[derive(Debug)]
struct Client {
    items: VecDeque<Item>,
    /// Behind them.
    left: VecDeque<Left>,
    /// Of `items`.
    bytes: usize,
    /// Changes that it may have applied before others have their turn.
    credit: usize,
    /// How many of the first are to be tried apart from others.
    apart: usize,
    parked: Option<Instant>,
    /// It has a place among the turns.
    has_turn: bool,
    /// What it left is asked for, or about to be.
    lacks: bool,
}

/// What waits for its turn.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    /// All items are treated as one client's.
    in_order: bool,
    clients: HashMap<Uuid, Client>,
    /// Clients that have an item here and are not parked.
    turns: VecDeque<Uuid>,
    parked: BTreeSet<(Instant, Uuid)>,
    /// Clients that have room for what they left.
    lacking: VecDeque<Uuid>,
    bytes: usize,
    left: usize,
}

impl Client {
    fn new() -> Client {
        Client {
            items: VecDeque::new(),
            left: VecDeque::new(),
            bytes: 0,
            credit: QUANTUM,
            apart: 0,
            parked: None,
            has_turn: false,
            lacks: false,
        }
    }

    fn is_done(&self) -> bool {
        self.items.is_empty() && self.left.is_empty() && self.parked.is_none()
    }
}

impl Turns {
    /// No turns: items leave in the order in which they come.
    pub fn in_order() -> Turns {
        Turns { in_order: true, ..Turns::default() }
    }

    /// See [`Turns::in_order`].
    pub fn is_in_order(&self) -> bool {
        self.in_order
    }

    /// Whose turn an item takes; items without a submission share one.
    fn client_of(&self, item: &Item) -> Uuid {
        match &item.submission {
            Some(submission) if !self.in_order => submission.client_id,
            _ => Uuid::nil(),
        }
    }

    /// Takes an item in.
    pub fn push(&mut self, item: Item) {
        let id = self.client_of(&item);
        let share = if self.bytes < CROWDED_BYTES { SHARE_BYTES } else { CROWDED_SHARE_BYTES };
        let client = self.clients.entry(id).or_insert_with(Client::new);
        let is_over = !client.left.is_empty() || client.bytes + item.bytes > share;
        if is_over && !self.in_order && item.submission.is_some() {
            client.left.push_back(item.left());
            self.left += 1;
            self.look_for(id);
        } else {
            client.bytes += item.bytes;
            self.bytes += item.bytes;
            client.items.push_back(item);
            self.give_turn(id);
        }
    }

    /// Gives a client a place among the turns, if it has something to do.
    fn give_turn(&mut self, id: Uuid) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        if !client.has_turn && client.parked.is_none() && !client.items.is_empty() {
            client.has_turn = true;
            self.turns.push_back(id);
        }
    }

    /// Has what a client left asked for, if it has room for it.
    fn look_for(&mut self, id: Uuid) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        if !client.lacks && !client.left.is_empty() && client.parked.is_none() && client.bytes < SHARE_BYTES / 2 {
            client.lacks = true;
            self.lacking.push_back(id);
        }
    }

    /// Adds the next items to a batch. Whether the batch is an item to be tried apart from others.
    pub fn fill(&mut self, batch: &mut Vec<Item>) -> bool {
        let mut changes: usize = batch.iter().map(Item::changes).sum();
        // The only client of the batch, and the clients in a row that had no credit.
        let mut only = batch.first().map(|item| self.client_of(item));
        only = only.filter(|only| batch.iter().all(|item| self.client_of(item) == *only));
        let mut waiting = 0;
        while batch.len() < MAX_TRANSACTIONS
            && let Some(&id) = self.turns.front()
        {
            let alone = batch.is_empty() || only == Some(id);
            let Some(client) = self.clients.get_mut(&id) else {
                self.turns.pop_front();
                continue;
            };
            let cost = client.items.front().map_or(0, Item::changes);
            if client.credit < cost && !(alone && self.turns.len() == 1) {
                client.credit += QUANTUM;
                self.turns.rotate_left(1);
                waiting += 1;
                if waiting > self.turns.len() && !batch.is_empty() {
                    break;
                }
                continue;
            }
            if !batch.is_empty()
                && (client.apart > 0 || changes + cost > MAX_CHANGES || (cost > LARGE_CHANGES && !alone))
            {
                break;
            }
            waiting = 0;
            self.turns.pop_front();
            client.has_turn = false;
            let Some(item) = client.items.pop_front() else { continue };
            client.credit = client.credit.saturating_sub(cost);
            client.bytes -= item.bytes;
            self.bytes -= item.bytes;
            only = Some(id).filter(|_| alone);
            changes += cost;
            batch.push(item);
            let apart = client.apart > 0;
            client.apart = client.apart.saturating_sub(1);
            if client.is_done() {
                self.clients.remove(&id);
            } else {
                self.give_turn(id);
                self.look_for(id);
            }
            if apart {
                return true;
            }
        }
        false
    }

    /// Parks a client until a time, with these items of it back at the front. The first `apart` of them are then tried
    /// apart from others.
    pub fn park(&mut self, items: Vec<Item>, apart: usize, until: Instant) {
        let Some(id) = items.first().map(|item| self.client_of(item)) else { return };
        let client = self.clients.entry(id).or_insert_with(Client::new);
        for item in items.into_iter().rev() {
            client.bytes += item.bytes;
            self.bytes += item.bytes;
            client.items.push_front(item);
        }
        // Memory is for those who can use it.
        while !self.in_order
            && client.items.len() > 1
            && client.items.back().is_some_and(|item| item.submission.is_some())
        {
            let Some(item) = client.items.pop_back() else { break };
            client.bytes -= item.bytes;
            self.bytes -= item.bytes;
            client.left.push_front(item.left());
            self.left += 1;
        }
        client.apart = apart;
        if let Some(before) = client.parked.replace(until) {
            self.parked.remove(&(before, id));
        }
        self.parked.insert((until, id));
        if std::mem::take(&mut client.has_turn) {
            self.turns.retain(|other| *other != id);
        }
    }

    /// Clients that were parked until now have turns again.
    pub fn wake(&mut self, now: Instant) {
        while let Some(&(until, id)) = self.parked.first()
            && until <= now
        {
            self.parked.pop_first();
            if let Some(client) = self.clients.get_mut(&id) {
                client.parked = None;
            }
            self.give_turn(id);
            self.look_for(id);
        }
    }

    /// When the next one is to be woken.
    pub fn wakes(&self) -> Option<Instant> {
        self.parked.first().map(|(until, _)| *until)
    }

    /// How many clients are parked.
    pub fn parked(&self) -> usize {
        self.parked.len()
    }

    /// What is to be read from the stream now: until [`Turns::load`], or [`Turns::fail_to_load`].
    pub fn wanted(&mut self) -> Option<(Uuid, Left)> {
        if self.bytes > MAX_BYTES && self.is_ready() {
            return None;
        }
        while let Some(id) = self.lacking.pop_front() {
            let Some(client) = self.clients.get_mut(&id) else { continue };
            match client.left.front() {
                Some(left) if client.parked.is_none() => return Some((id, *left)),
                _ => client.lacks = false,
            }
        }
        None
    }

    /// Takes in what a client left in a message, out of all `items` of the message; gives how many are not among them.
    pub fn load(&mut self, id: Uuid, sequence: u64, items: Vec<Item>) -> usize {
        let Some(client) = self.clients.get_mut(&id) else { return 0 };
        client.lacks = false;
        let mut missing = 0;
        let mut items = items.into_iter().peekable();
        while let Some(left) = client.left.pop_front_if(|left| left.sequence == sequence) {
            self.left -= 1;
            while items.next_if(|item| item.index < left.index).is_some() {}
            let belongs = |item: &Item| {
                item.index == left.index && item.submission.as_ref().is_some_and(|found| found.client_id == id)
            };
            match items.next_if(belongs) {
                Some(item) => {
                    client.bytes += item.bytes;
                    self.bytes += item.bytes;
                    client.items.push_back(item);
                }
                None => missing += 1,
            }
        }
        if client.is_done() {
            self.clients.remove(&id);
        }
        self.give_turn(id);
        self.look_for(id);
        missing
    }

    /// What a client left could not be read: it is asked for again.
    pub fn fail_to_load(&mut self, id: Uuid) {
        if let Some(client) = self.clients.get_mut(&id) {
            client.lacks = false;
        }
        self.look_for(id);
    }

    /// Drops what is not kept, by partition and sequence.
    pub fn retain(&mut self, keep: impl Fn(u16, u64) -> bool) {
        (self.bytes, self.left) = (0, 0);
        self.clients.retain(|id, client| {
            let before = client.items.len();
            client.items.retain(|item| keep(item.partition, item.sequence));
            client.left.retain(|left| keep(left.partition, left.sequence));
            client.bytes = client.items.iter().map(|item| item.bytes).sum();
            if client.items.len() < before {
                client.apart = 0;
            }
            self.bytes += client.bytes;
            self.left += client.left.len();
            let is_gone = client.items.is_empty() && client.left.is_empty();
            if let Some(until) = client.parked.filter(|_| is_gone) {
                self.parked.remove(&(until, *id));
            }
            client.has_turn &= !client.items.is_empty();
            !is_gone
        });
        let clients = &self.clients;
        self.turns.retain(|id| clients.get(id).is_some_and(|client| client.has_turn));
        self.lacking.retain(|id| clients.contains_key(id));
        let all: Vec<Uuid> = self.clients.keys().copied().collect();
        all.into_iter().for_each(|id| self.look_for(id));
    }

    /// Whether a batch can be made.
    pub fn is_ready(&self) -> bool {
        !self.turns.is_empty()
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.clients.is_empty()
    }

    /// Whether so much waits that nothing more should be taken in.
    pub fn is_full(&self) -> bool {
        self.left >= MAX_LEFT
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::batch::tests::submission;

    /// The transactions of a client, all in one message.
    fn message(client: u128, sequence: u64, first: u64, sizes: &[usize]) -> Vec<Item> {
        let submissions = sizes.iter().enumerate().map(|(n, size)| submission(client, first + n as u64, *size));
        Item::of_message(1, sequence, submissions.collect(), None)
    }

    fn turns(messages: &[(u128, &[usize])]) -> Turns {
        let mut turns = Turns::default();
        for (sequence, (client, sizes)) in messages.iter().enumerate() {
            message(*client, sequence as u64 + 1, 1, sizes).into_iter().for_each(|item| turns.push(item));
        }
        turns
    }

    /// The next batch: client and `client_seq`.
    fn batch(turns: &mut Turns) -> Vec<(u128, u64)> {
        let mut batch = Vec::new();
        turns.fill(&mut batch);
        names(&batch)
    }

    fn names<'a>(items: impl IntoIterator<Item = &'a Item>) -> Vec<(u128, u64)> {
        let name = |item: &Item| item.submission.as_ref().map(|s| (s.client_id.as_u128(), s.seq));
        items.into_iter().filter_map(name).collect()
    }

    #[test]
    fn clients_take_turns_a_transaction_each() {
        let mut turns = turns(&[(1, &[1; 500]), (2, &[1, 1]), (3, &[1])]);
        let first = batch(&mut turns);
        assert_eq!(first[..6], [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (1, 3)]);
        assert_eq!(first.len(), MAX_TRANSACTIONS);
        // Who is alone fills batches, as large as they may be.
        assert_eq!(batch(&mut turns).len(), MAX_TRANSACTIONS);
    }

    #[test]
    fn a_flood_of_large_transactions_holds_others_up_by_one_of_them() {
        // All of them in memory.
        let mut turns = Turns::default();
        message(1, 1, 1, &[900; 20]).into_iter().for_each(|item| turns.push(Item { bytes: 1, ..item }));
        assert_eq!(batch(&mut turns), [(1, 1)], "alone it goes at once");
        for seq in 1..=5 {
            message(2, 50 + seq, seq, &[1]).into_iter().for_each(|item| turns.push(item));
            assert_eq!(batch(&mut turns), [(2, seq)], "the small one first");
            assert_eq!(batch(&mut turns), [(1, 1 + seq)], "then the large one, alone");
        }
        // One that is busy all the time does not keep the large ones from going on.
        message(2, 100, 6, &[1; 1_000]).into_iter().for_each(|item| turns.push(item));
        let mut shares = [0, 0];
        for _ in 0..20 {
            batch(&mut turns).iter().for_each(|(client, _)| shares[*client as usize - 1] += 1);
        }
        assert!(shares[0] >= 5 && shares[1] >= 200, "{shares:?}");
    }

    #[test]
    fn a_client_alone_has_full_batches_whatever_their_size() {
        for (sizes, expected) in [(vec![400; 9], 2), (vec![90; 50], 11), (vec![1_000; 3], 1), (vec![1; 300], 100)] {
            assert_eq!(batch(&mut turns(&[(1, &sizes)])).len(), expected, "{}", sizes[0]);
        }
    }

    #[test]
    fn parked_clients_have_no_turn_until_their_time() {
        let mut turns = turns(&[(1, &[1, 1, 1]), (2, &[1])]);
        let mut items = Vec::new();
        turns.fill(&mut items);
        assert_eq!(names(&items), [(1, 1), (2, 1), (1, 2), (1, 3)]);
        let now = Instant::now();
        let until = now + Duration::from_millis(100);
        let (mine, others): (Vec<Item>, Vec<Item>) =
            items.into_iter().partition(|item| item.submission.as_ref().unwrap().client_id == Uuid::from_u128(1));
        assert_eq!(names(&others), [(2, 1)]);
        // The second one is at fault.
        turns.park(mine, 2, until);
        message(1, 9, 4, &[1]).into_iter().for_each(|item| turns.push(item));
        assert!(!turns.is_ready() && !turns.is_empty());
        assert_eq!((turns.wakes(), turns.parked(), turns.wanted()), (Some(until), 1, None));
        turns.wake(now);
        assert!(!turns.is_ready());
        turns.wake(until);
        assert_eq!(turns.parked(), 0);
        // Only the first stayed in memory; the others are read again, and two are tried apart.
        let mut items = Vec::new();
        assert!(turns.fill(&mut items));
        assert_eq!(names(&items), [(1, 1)]);
        let (id, left) = turns.wanted().unwrap();
        assert_eq!((id, left.sequence, left.index), (Uuid::from_u128(1), 1, 1));
        assert_eq!(turns.load(id, 1, message(1, 1, 1, &[1, 1, 1])), 0);
        let mut items = Vec::new();
        assert!(turns.fill(&mut items));
        assert_eq!(names(&items), [(1, 2)]);
        let (id, left) = turns.wanted().unwrap();
        assert_eq!((left.sequence, left.index), (9, 0));
        assert_eq!(turns.load(id, 9, message(1, 9, 4, &[1])), 0);
        assert_eq!(batch(&mut turns), [(1, 3), (1, 4)]);
        assert!(turns.is_empty());
    }

    #[test]
    fn what_exceeds_a_share_is_left_in_the_stream_and_read_again() {
        let each = message(1, 1, 1, &[100])[0].bytes;
        let (kept, all) = (SHARE_BYTES / each, SHARE_BYTES / each + 5);
        let mut turns = Turns::default();
        for n in 1..=all {
            message(1, n as u64, n as u64, &[100]).into_iter().for_each(|item| turns.push(item));
        }
        message(2, 999, 1, &[1]).into_iter().for_each(|item| turns.push(item));
        assert_eq!((turns.left, turns.bytes <= SHARE_BYTES + each), (5, true));
        assert_eq!(turns.wanted(), None, "there is enough in memory");
        let mut seen = Vec::new();
        while !turns.is_empty() {
            seen.extend(batch(&mut turns));
            while let Some((id, left)) = turns.wanted() {
                assert_eq!(turns.wanted(), None, "one at a time");
                // Reading fails once in a while, and one message is gone.
                if left.sequence as usize == kept + 2 && !seen.contains(&(0, 0)) {
                    seen.push((0, 0));
                    turns.fail_to_load(id);
                } else if left.sequence as usize == all {
                    assert_eq!(turns.load(id, left.sequence, Vec::new()), 1);
                } else {
                    let items = message(1, left.sequence, left.sequence, &[100]);
                    assert_eq!(turns.load(id, left.sequence, items), 0);
                }
            }
        }
        assert!(seen.contains(&(2, 1)));
        let own: Vec<u64> = seen.iter().filter(|(client, _)| *client == 1).map(|(_, seq)| *seq).collect();
        assert_eq!(own, (1..all as u64).collect::<Vec<_>>());
        assert_eq!((turns.left, turns.bytes), (0, 0));
    }

    #[test]
    fn so_much_may_be_left_and_no_more() {
        let mut turns = Turns::default();
        let large = message(1, 1, 1, &[1_000]).remove(0).bytes;
        for n in 1..=(SHARE_BYTES / large + MAX_LEFT) as u64 {
            assert!(!turns.is_full());
            // One message is enough for the counting.
            let mut item = Item::empty(1, n);
            (item.submission, item.bytes) = (Some(submission(1, n, 0)), large);
            turns.push(item);
        }
        assert!(turns.is_full());
        turns.retain(|_, _| false);
        assert!(!turns.is_full() && turns.is_empty() && turns.bytes == 0);
    }
}
