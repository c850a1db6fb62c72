//! Whose transaction is next: clients take turns. Pure, but for the time that the caller gives.
//!
//! The order that must hold is that of each client. Turns go round by deficit round robin (Shreedhar and Varghese,
//! "Efficient Fair Queuing using Deficit Round-Robin", 1995): a turn is one transaction, and one that costs more waits until its
//! client has the credit. A client that is alone needs none. Large transactions, and those of clients whose transactions took long,
//! hold up nobody: they are for a connection aside ([`crate::worker::aside`]), one at a time. A client whose transaction is in trouble is
//! parked until a time, and its transactions up to that one are then tried apart from others.
//!
//! A client does not fill the memory of the worker either: what exceeds its share is left in the stream, and read again
//! when its turn comes near.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::time::Duration;

use tokio::time::Instant;
use uuid::Uuid;

use crate::item::{Item, Left, MAX_COST, WORKER_KIB};

/// What a client gets as credit in a round of turns, in small changes as [`Item::cost`].
const QUANTUM: usize = 20;
/// A transaction that costs more is applied aside: others would wait for it.
const LARGE: usize = 200;
/// How long a slow client's transactions are applied aside after the last one that took long.
const SLOW: Duration = Duration::from_secs(10);
/// A transaction that took long counts so much, a quick one takes one off, and from so much on a client is slow: not after a single
/// one, which says more about the server at that moment, but also where slow and quick ones take turns.
const SLOW_COUNTS: u32 = 2;
const IS_SLOW: u32 = 3;
const MOST_SLOW: u32 = 6;
/// Most clients whose count is kept.
const MAX_SLOW: usize = 10_000;
/// Bytes of a client that are kept in memory; more are left in the stream.
const SHARE_BYTES: usize = 1 << 20;
/// The same where more than [`CROWDED_BYTES`] wait: half of the worker's room.
const CROWDED_SHARE_BYTES: usize = 16 << 10;
const CROWDED_BYTES: usize = WORKER_KIB << 9;
/// What was left in the stream is not read while more than this waits for its turn.
const MAX_BYTES: usize = WORKER_KIB << 10;
/// Most transactions that a worker leaves in the stream and keeps in mind, 24 bytes each.
const MAX_LEFT: usize = 1_000_000;

/// Whose an item is: a client's, or nobody's, where it only moves a position on.
type Owner = Option<Uuid>;

/// A client of which something waits.
#[derive(Debug)]
struct ClientTurns {
    items: VecDeque<Item>,
    /// Behind them.
    left: VecDeque<Left>,
    /// Of `items`.
    bytes: usize,
    /// What it may have applied before others have their turn.
    credit: usize,
    /// How many of the first are to be tried apart from others.
    apart: usize,
    parked: Option<Instant>,
    /// It has a place among the turns, or among those aside.
    has_turn: bool,
    /// A transaction of its is being applied aside.
    is_away: bool,
    /// What it left is asked for, or about to be.
    lacks: bool,
}

/// What waits for its turn.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    /// All items are treated as one client's.
    in_order: bool,
    clients: HashMap<Owner, ClientTurns>,
    /// Clients that have an item here and are not parked.
    turns: VecDeque<Owner>,
    /// The same, of which the next item is to be applied aside.
    aside: VecDeque<Owner>,
    /// Until when the counts of slow transactions hold, and the counts.
    slow: HashMap<Uuid, (Instant, u32)>,
    parked: BTreeSet<(Instant, Owner)>,
    /// Clients that have room for what they left.
    lacking: VecDeque<Owner>,
    bytes: usize,
    left: usize,
}

impl ClientTurns {
    fn new() -> ClientTurns {
        ClientTurns {
            items: VecDeque::new(),
            left: VecDeque::new(),
            bytes: 0,
            credit: QUANTUM,
            apart: 0,
            parked: None,
            has_turn: false,
            is_away: false,
            lacks: false,
        }
    }

    fn is_done(&self) -> bool {
        self.items.is_empty() && self.left.is_empty() && self.parked.is_none() && !self.is_away
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
    fn owner_of(&self, item: &Item) -> Owner {
        item.submission.as_ref().filter(|_| !self.in_order).map(|submission| submission.client_id)
    }

    /// Takes an item in.
    pub fn push(&mut self, item: Item) {
        let id = self.owner_of(&item);
        let share = if self.bytes < CROWDED_BYTES { SHARE_BYTES } else { CROWDED_SHARE_BYTES };
        let client = self.clients.entry(id).or_insert_with(ClientTurns::new);
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
    fn give_turn(&mut self, id: Owner) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        let Some(next) = client.items.front() else { return };
        if client.has_turn || client.is_away || client.parked.is_some() {
            return;
        }
        let is_large = next.cost > LARGE;
        client.has_turn = true;
        if id.is_some_and(|id| is_large || self.is_slow(id, Instant::now())) {
            self.aside.push_back(id);
        } else {
            self.turns.push_back(id);
        }
    }

    /// The next transaction to be applied aside, of a client that `may`, and whether it is to be tried apart from others. Its
    /// client has no turn until it is [`Turns::back`].
    pub fn take_aside(&mut self, may: impl Fn(Uuid) -> bool) -> Option<(Item, bool)> {
        let place = self.aside.iter().position(|id| id.is_some_and(&may))?;
        let id = self.aside.remove(place)?;
        let client = self.clients.get_mut(&id)?;
        client.has_turn = false;
        let item = client.items.pop_front()?;
        client.is_away = true;
        client.bytes -= item.bytes;
        self.bytes -= item.bytes;
        let apart = client.apart > 0;
        client.apart = client.apart.saturating_sub(1);
        Some((item, apart))
    }

    /// Whether something waits to be applied aside.
    pub fn has_aside(&self) -> bool {
        !self.aside.is_empty()
    }

    /// What was applied aside is done; or not, where the item comes back, to be tried apart: at once, or after its client was
    /// parked until a time.
    pub fn back(&mut self, id: Uuid, item: Option<Item>, parked: Option<Instant>) {
        let id = Some(id);
        let Some(client) = self.clients.get_mut(&id) else { return };
        client.is_away = false;
        match (item, parked) {
            (Some(item), Some(until)) => return self.park(vec![item], 1, until),
            (Some(item), None) => {
                client.apart = client.apart.max(1);
                self.put_back(vec![item]);
            }
            (None, _) if client.is_done() => drop(self.clients.remove(&id)),
            (None, _) => {}
        }
        self.give_turn(id);
        self.look_for(id);
    }

    /// Whether a client is slow.
    pub fn is_slow(&self, id: Uuid, now: Instant) -> bool {
        self.slow.get(&id).is_some_and(|(until, times)| *until > now && *times >= IS_SLOW)
    }

    /// A client's transaction was quick.
    pub fn set_quick(&mut self, id: Uuid) {
        let Some((_, times)) = self.slow.get_mut(&id) else { return };
        *times -= 1;
        if *times == 0 {
            self.slow.remove(&id);
        }
    }

    /// Notes that a transaction of the client took long. With `no_doubt`, one such transaction is enough: for a while, the client's
    /// transactions are applied aside, and other clients do not wait for them.
    pub fn set_slow(&mut self, id: Uuid, now: Instant, no_doubt: bool) {
        if self.slow.len() >= MAX_SLOW {
            self.slow.retain(|_, (until, _)| *until > now);
        }
        if self.slow.len() < MAX_SLOW {
            let (until, times) = self.slow.entry(id).or_insert((now, 0));
            let before = if *until >= now { *times } else { 0 };
            *times = if no_doubt { MOST_SLOW } else { (before + SLOW_COUNTS).min(MOST_SLOW) };
            *until = now + SLOW;
        }
    }

    /// Has what a client left asked for, if it has room for it.
    fn look_for(&mut self, id: Owner) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        if !client.lacks && !client.left.is_empty() && client.parked.is_none() && client.bytes < SHARE_BYTES / 2 {
            client.lacks = true;
            self.lacking.push_back(id);
        }
    }

    /// Adds the next items to a batch, until it has `most`. Whether the batch is an item to be tried apart from others.
    pub fn fill(&mut self, batch: &mut Vec<Item>, most: usize) -> bool {
        let mut costs: usize = batch.iter().map(|item| item.cost).sum();
        // The only client of the batch, and the clients in a row that had no credit.
        let mut only = batch.first().map(|item| self.owner_of(item));
        only = only.filter(|only| batch.iter().all(|item| self.owner_of(item) == *only));
        let mut waiting = 0;
        while batch.len() < most
            && let Some(&id) = self.turns.front()
        {
            let alone = batch.is_empty() || only == Some(id);
            let Some(client) = self.clients.get_mut(&id) else {
                self.turns.pop_front();
                continue;
            };
            let cost = client.items.front().map_or(0, |item| item.cost);
            if client.credit < cost && !(alone && self.turns.len() == 1) {
                client.credit += QUANTUM;
                self.turns.rotate_left(1);
                waiting += 1;
                if waiting > self.turns.len() && !batch.is_empty() {
                    break;
                }
                continue;
            }
            if !batch.is_empty() && (client.apart > 0 || costs + cost > MAX_COST) {
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
            costs += cost;
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

    /// Takes back what a batch has no room for, in its order.
    pub fn put_back(&mut self, items: Vec<Item>) {
        for item in items.into_iter().rev() {
            let id = self.owner_of(&item);
            let client = self.clients.entry(id).or_insert_with(ClientTurns::new);
            client.bytes += item.bytes;
            self.bytes += item.bytes;
            client.items.push_front(item);
            // Another item is the next one: it may be for the other connection.
            self.take_turn(id);
            self.give_turn(id);
        }
    }

    /// Takes a client's place among the turns away.
    fn take_turn(&mut self, id: Owner) {
        if self.clients.get_mut(&id).is_some_and(|client| std::mem::take(&mut client.has_turn)) {
            self.turns.retain(|other| *other != id);
            self.aside.retain(|other| *other != id);
        }
    }

    /// Parks a client until a time, with these items of it back at the front. The first `apart` of them are then tried
    /// apart from others.
    pub fn park(&mut self, items: Vec<Item>, apart: usize, until: Instant) {
        let Some(id) = items.first().map(|item| self.owner_of(item)) else { return };
        let client = self.clients.entry(id).or_insert_with(ClientTurns::new);
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
        self.take_turn(id);
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
                Some(left) if client.parked.is_none() => return Some((id?, *left)),
                _ => client.lacks = false,
            }
        }
        None
    }

    /// Takes in what a client left in a message, out of all `items` of the message; gives how many are not among them.
    pub fn load(&mut self, id: Uuid, sequence: u64, items: Vec<Item>) -> usize {
        let id = Some(id);
        let Some(client) = self.clients.get_mut(&id) else { return 0 };
        client.lacks = false;
        let mut missing = 0;
        let mut items = items.into_iter().peekable();
        while let Some(left) = client.left.pop_front_if(|left| left.sequence == sequence) {
            self.left -= 1;
            while items.next_if(|item| item.index < left.index).is_some() {}
            let belongs = |item: &Item| {
                item.index == left.index && item.submission.as_ref().is_some_and(|found| Some(found.client_id) == id)
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
        let id = Some(id);
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
            let is_gone = client.items.is_empty() && client.left.is_empty() && !client.is_away;
            if let Some(until) = client.parked.filter(|_| is_gone) {
                self.parked.remove(&(until, *id));
            }
            client.has_turn &= !client.items.is_empty();
            !is_gone
        });
        let clients = &self.clients;
        for turns in [&mut self.turns, &mut self.aside] {
            turns.retain(|id| clients.get(id).is_some_and(|client| client.has_turn));
        }
        self.lacking.retain(|id| clients.contains_key(id));
        let all: Vec<Owner> = self.clients.keys().copied().collect();
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
    use super::*;
    use crate::item::MAX_TRANSACTIONS;
    use crate::worker::queue::tests::submission;

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
        turns.fill(&mut batch, MAX_TRANSACTIONS);
        names(&batch)
    }

    fn names<'a>(items: impl IntoIterator<Item = &'a Item>) -> Vec<(u128, u64)> {
        let name = |item: &Item| item.submission.as_ref().map(|s| (s.client_id.as_u128(), s.client_seq));
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
    fn what_costs_much_is_applied_aside() {
        // All of them in memory.
        let mut turns = Turns::default();
        let put = |turns: &mut Turns, client: u128, sequence: u64, sizes: &[usize]| {
            message(client, sequence, sequence, sizes)
                .into_iter()
                .for_each(|item| turns.push(Item { bytes: 1, ..item }));
        };
        put(&mut turns, 1, 1, &[LARGE + 1, 1, LARGE + 1, LARGE]);
        put(&mut turns, 2, 2, &[1]);
        assert_eq!(batch(&mut turns), [(2, 2)]);
        assert!(!turns.is_ready() && !turns.is_empty());
        assert!(turns.take_aside(|_| false).is_none(), "something of its is in a batch");
        let client = Uuid::from_u128(1);
        let (item, apart) = turns.take_aside(|id| id == client).unwrap();
        assert_eq!((item.name(), apart), (Some((client, 1)), false));
        // Nothing of its client before it is back, though others go on.
        put(&mut turns, 1, 5, &[1]);
        put(&mut turns, 2, 6, &[1]);
        assert_eq!(batch(&mut turns), [(2, 6)]);
        turns.retain(|_, _| true);
        assert!(!turns.is_ready() && !turns.is_empty() && turns.take_aside(|_| true).is_none());
        // It failed: parked, and then tried apart.
        let now = Instant::now();
        turns.back(client, Some(item), Some(now));
        assert!(turns.take_aside(|_| true).is_none());
        turns.wake(now);
        let (item, apart) = turns.take_aside(|_| true).unwrap();
        assert_eq!((item.name(), apart), (Some((client, 1)), true));
        // And at once.
        turns.back(client, Some(item), None);
        let (item, apart) = turns.take_aside(|_| true).unwrap();
        assert_eq!((item.name(), apart), (Some((client, 1)), true));
        turns.back(client, None, None);
        // The others were left in the stream by parking.
        while let Some((id, left)) = turns.wanted() {
            turns.load(id, left.sequence, message(1, left.sequence, left.sequence, &[LARGE + 1, 1, LARGE + 1, LARGE]));
        }
        assert_eq!(batch(&mut turns), [(1, 2)]);
        assert_eq!(turns.take_aside(|_| true).unwrap().0.name(), Some((client, 3)));
        turns.back(client, None, None);
        // Whoever is slow stays aside for a while.
        turns.set_slow(client, Instant::now(), false);
        assert!(!turns.is_slow(client, Instant::now()), "once is no reason");
        turns.set_slow(client, Instant::now(), false);
        put(&mut turns, 3, 9, &[1]);
        put(&mut turns, 1, 10, &[1]);
        let mut seen = Vec::new();
        while !turns.is_empty() {
            seen.extend(batch(&mut turns));
            if let Some((item, _)) = turns.take_aside(|_| true) {
                seen.extend(names([&item]).into_iter().map(|(client, client_seq)| (client + 100, client_seq)));
                turns.back(client, None, None);
            }
            while let Some((id, left)) = turns.wanted() {
                let sizes: &[usize] = if left.sequence == 1 { &[LARGE + 1, 1, LARGE + 1, LARGE] } else { &[1] };
                turns.load(id, left.sequence, message(1, left.sequence, left.sequence, sizes));
            }
        }
        let aside: Vec<u64> =
            seen.iter().filter(|(client, _)| *client == 101).map(|(_, client_seq)| *client_seq).collect();
        assert!(aside.contains(&10) && aside.is_sorted() && seen.contains(&(3, 9)), "{seen:?}");
    }

    #[test]
    fn clients_are_slow_by_what_most_of_their_transactions_take() {
        let (client, start) = (Uuid::from_u128(1), Instant::now());
        let mut turns = Turns::default();
        // By turns slow and quick; many quick ones; and after a while.
        for (slow, expected) in
            [(true, false), (false, false), (true, true), (false, false), (true, true), (true, true)]
        {
            if slow {
                turns.set_slow(client, start, false)
            } else {
                turns.set_quick(client)
            }
            assert_eq!(turns.is_slow(client, start), expected);
        }
        (0..MOST_SLOW).for_each(|_| turns.set_quick(client));
        assert!(!turns.is_slow(client, start) && turns.slow.is_empty());
        turns.set_quick(client);
        (0..2).for_each(|_| turns.set_slow(client, start, false));
        assert!(turns.is_slow(client, start) && !turns.is_slow(client, start + SLOW));
        turns.set_slow(client, start + 2 * SLOW, false);
        assert!(!turns.is_slow(client, start + 2 * SLOW), "what was long ago does not count");
    }

    #[test]
    fn a_transaction_that_costs_more_waits_until_its_client_has_the_credit() {
        let mut turns = Turns::default();
        message(1, 1, 1, &[LARGE; 20]).into_iter().for_each(|item| turns.push(Item { bytes: 1, ..item }));
        message(2, 100, 6, &[1; 1_000]).into_iter().for_each(|item| turns.push(Item { bytes: 1, ..item }));
        let mut shares = [0, 0];
        for _ in 0..10 {
            batch(&mut turns).iter().for_each(|(client, _)| shares[*client as usize - 1] += 1);
        }
        assert!((5..=20).contains(&shares[0]) && shares[1] >= 200, "{shares:?}");
    }

    #[test]
    fn a_client_alone_has_full_batches_whatever_their_size() {
        for (sizes, expected) in [(vec![LARGE; 9], 5), (vec![90; 50], 11), (vec![1; 300], 100)] {
            assert_eq!(batch(&mut turns(&[(1, &sizes)])).len(), expected, "{}", sizes[0]);
        }
    }

    #[test]
    fn parked_clients_have_no_turn_until_their_time() {
        let mut turns = turns(&[(1, &[1, 1, 1]), (2, &[1])]);
        let mut items = Vec::new();
        turns.fill(&mut items, MAX_TRANSACTIONS);
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
        assert!(turns.fill(&mut items, MAX_TRANSACTIONS));
        assert_eq!(names(&items), [(1, 1)]);
        let (id, left) = turns.wanted().unwrap();
        assert_eq!((id, left.sequence, left.index), (Uuid::from_u128(1), 1, 1));
        assert_eq!(turns.load(id, 1, message(1, 1, 1, &[1, 1, 1])), 0);
        let mut items = Vec::new();
        assert!(turns.fill(&mut items, MAX_TRANSACTIONS));
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
        let own: Vec<u64> = seen.iter().filter(|(client, _)| *client == 1).map(|(_, client_seq)| *client_seq).collect();
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
