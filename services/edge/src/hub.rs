//! Where the tail and the sessions meet: a bounded ring of recent messages, and who is woken by which.
//!
//! Sessions keep a cursor and read the ring themselves, so a slow session costs no queue: when its cursor falls off the
//! ring it is cut, and catches up from the stream when it connects again.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use millstream_schemas::stream::TransactionResult;
use millstream_schemas::{Lsn, Position, Scope};
use tokio::sync::{Notify, mpsc, watch};
use uuid::Uuid;

use crate::fence::Fence;
use crate::message::Message;

/// Most bytes that the ring keeps.
const RING_BYTES: usize = 48 << 20;
/// Most messages that the ring keeps.
pub(crate) const RING_MESSAGES: usize = 50_000;
/// Most bytes of messages that a session takes from the ring at a time: they live as long as its client is slow.
pub(crate) const READ_BYTES: usize = 512 << 10;
/// How far back a snapshot looks for transactions that were published before they became visible.
const LOOK_BACK: Duration = Duration::from_secs(60);
/// Results waiting for one session; they are a hint, so more are dropped.
pub(crate) const RESULTS_QUEUE: usize = 256;

/// The hub. One an edge, shared in an `Arc`.
#[derive(Default)]
pub struct Hub {
    state: RwLock<State>,
    /// The newest message.
    head: watch::Sender<Option<Position>>,
    /// Version of the schema that the newest rows are encoded by.
    schema: watch::Sender<Option<String>>,
}

#[derive(Default)]
struct State {
    ring: VecDeque<(Instant, Arc<Message>)>,
    bytes: usize,
    /// Those in the ring that move memberships.
    moves: VecDeque<Arc<Message>>,
    /// Bytes and messages since everybody was woken last.
    passed: (usize, usize),
    /// Sessions that hold a scope.
    scopes: HashMap<Scope, HashSet<u64>>,
    /// Sessions of a client (more than one while an old socket has not yet timed out).
    clients: HashMap<Uuid, HashSet<u64>>,
    sessions: HashMap<u64, Member>,
    next_session: u64,
    /// Sessions that saw a part of the transaction now passing and wait for its end.
    touched: HashSet<u64>,
}

impl State {
    fn clear(&mut self) {
        self.ring.clear();
        self.moves.clear();
        self.bytes = 0;
    }
}

struct Member {
    wake: Arc<Notify>,
    results: mpsc::Sender<TransactionResult>,
    client: Uuid,
    scopes: HashSet<Scope>,
}

/// A session's place in the hub; leaves it when dropped.
pub struct Seat {
    hub: Arc<Hub>,
    id: u64,
    /// Woken when something may be there for the session.
    pub wake: Arc<Notify>,
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut state = self.hub.write();
        if let Some(member) = state.sessions.remove(&self.id) {
            remove(&mut state.clients, &member.client, self.id);
            for scope in &member.scopes {
                remove(&mut state.scopes, scope, self.id);
            }
        }
        state.touched.remove(&self.id);
    }
}

fn remove<K: std::hash::Hash + Eq>(map: &mut HashMap<K, HashSet<u64>>, key: &K, id: u64) {
    if let Some(set) = map.get_mut(key) {
        set.remove(&id);
        if set.is_empty() {
            map.remove(key);
        }
    }
}

/// The cursor is older than what the ring holds.
#[derive(Debug, PartialEq, Eq)]
pub struct FellBehind;

impl Hub {
    fn read(&self) -> std::sync::RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds the stream's next message and wakes whom it concerns. The tail's call.
    ///
    /// A gap or another epoch empties the ring first: sessions then fall behind it and are cut.
    pub fn push(&self, message: Arc<Message>, now: Instant) {
        self.schema.send_if_modified(|newest| {
            let changed = message.schema.is_some() && *newest != message.schema;
            if changed {
                newest.clone_from(&message.schema);
            }
            changed
        });
        let mut state = self.write();
        let state = &mut *state;
        if let Some((_, previous)) = state.ring.back()
            && (previous.position.stream_seq + 1 != message.position.stream_seq || previous.epoch() != message.epoch())
        {
            state.clear();
            state.sessions.values().for_each(|member| member.wake.notify_one());
        }
        if message.moves.is_some() {
            state.moves.push_back(message.clone());
        }
        if let Some(scope) = &message.scope
            && let Some(sessions) = state.scopes.get(scope)
        {
            state.touched.extend(sessions);
        }
        for entry in &message.origin {
            if let Some(sessions) = state.clients.get(&entry.client_id) {
                state.touched.extend(sessions);
            }
        }
        for id in &state.touched {
            if let Some(member) = state.sessions.get(id) {
                member.wake.notify_one();
            }
        }
        if message.last {
            state.touched.clear();
        }
        state.bytes += message.weight();
        state.passed.0 += message.weight();
        state.passed.1 += 1;
        if state.passed.0 > RING_BYTES / 4 || state.passed.1 > RING_MESSAGES / 4 {
            // Else a session that nothing concerns would fall off the ring without having been slow.
            state.passed = (0, 0);
            state.sessions.values().for_each(|member| member.wake.notify_one());
        }
        let head = message.position;
        state.ring.push_back((now, message));
        while state.ring.len() > RING_MESSAGES || (state.bytes > RING_BYTES && state.ring.len() > 1) {
            if let Some((_, old)) = state.ring.pop_front() {
                state.bytes -= old.weight();
                state.moves.pop_front_if(|first| first.position.stream_seq <= old.position.stream_seq);
            }
        }
        self.head.send_replace(Some(head));
    }

    /// Version of the schema that the newest rows are encoded by.
    pub fn schema(&self) -> watch::Receiver<Option<String>> {
        self.schema.subscribe()
    }

    /// The position of the newest message, as a value to watch; none before the first one.
    pub fn head(&self) -> watch::Receiver<Option<Position>> {
        self.head.subscribe()
    }

    /// The position of the oldest message that the ring holds.
    pub fn oldest(&self) -> Option<Position> {
        self.read().ring.front().map(|(_, message)| message.position)
    }

    /// Whether the ring holds everything that was published of transactions which committed from `lsn` on.
    pub fn reaches_back_to(&self, lsn: Lsn) -> bool {
        self.oldest().is_some_and(|oldest| oldest.lsn <= lsn)
    }

    /// The message with this sequence, if the ring holds it.
    pub fn at(&self, stream_seq: u64) -> Option<Arc<Message>> {
        let state = self.read();
        let first = state.ring.front()?.1.position.stream_seq;
        state.ring.get(usize::try_from(stream_seq.checked_sub(first)?).ok()?).map(|(_, message)| message.clone())
    }

    /// The messages up to `cursor` that a snapshot taken now does not see.
    pub fn unseen(&self, fence: &Fence, cursor: u64, now: Instant) -> Vec<Arc<Message>> {
        let state = self.read();
        let mut found: Vec<_> = state
            .ring
            .iter()
            .rev()
            .skip_while(|(_, message)| message.position.stream_seq > cursor)
            .take_while(|(arrived, _)| now.saturating_duration_since(*arrived) < LOOK_BACK)
            .filter(|(_, message)| !fence.sees(message.xid, message.lsn()))
            .map(|(_, message)| message.clone())
            .collect();
        found.reverse();
        found
    }

    /// The messages of the ring behind `stream_seq` that `are` of those that move memberships, and where the ring begins.
    pub fn moves_behind(
        &self,
        stream_seq: u64,
        are: impl Fn(&Message) -> bool,
    ) -> (Vec<Arc<Message>>, Option<Position>) {
        let state = self.read();
        let behind = state.moves.iter().rev().take_while(|message| message.position.stream_seq > stream_seq);
        let mut found: Vec<_> = behind.filter(|message| are(message)).cloned().collect();
        found.reverse();
        (found, state.ring.front().map(|(_, message)| message.position))
    }

    /// Sequence of the newest message that moves memberships, if the ring holds one.
    pub fn newest_move(&self) -> u64 {
        self.read().moves.back().map_or(0, |message| message.position.stream_seq)
    }

    /// Enters a session without scopes.
    pub fn enter(self: &Arc<Self>, client: Uuid) -> (Seat, mpsc::Receiver<TransactionResult>) {
        let (sender, results) = mpsc::channel(RESULTS_QUEUE);
        let wake = Arc::new(Notify::new());
        let mut state = self.write();
        let id = state.next_session;
        state.next_session += 1;
        state.clients.entry(client).or_default().insert(id);
        let member = Member { wake: wake.clone(), results: sender, client, scopes: HashSet::new() };
        state.sessions.insert(id, member);
        (Seat { hub: self.clone(), id, wake }, results)
    }

    /// Number of sessions.
    pub fn sessions(&self) -> usize {
        self.read().sessions.len()
    }

    /// Routes results to the client's sessions; without one they are dropped, being a hint.
    pub fn results(&self, client: Uuid, results: &[TransactionResult]) {
        let state = self.read();
        for id in state.clients.get(&client).into_iter().flatten() {
            if let Some(member) = state.sessions.get(id) {
                for result in results {
                    let _ = member.results.try_send(result.clone());
                }
            }
        }
    }

    /// Cuts every session: their cursors no longer lie in the ring.
    pub fn reset(&self) {
        let mut state = self.write();
        state.clear();
        state.sessions.values().for_each(|member| member.wake.notify_one());
        self.head.send_replace(None);
    }
}

impl Seat {
    /// Sets the scopes whose messages wake the session.
    pub fn set_scopes<'a>(&self, scopes: impl IntoIterator<Item = &'a Scope>) {
        let wanted: HashSet<Scope> = scopes.into_iter().cloned().collect();
        let mut state = self.hub.write();
        let state = &mut *state;
        let Some(member) = state.sessions.get_mut(&self.id) else { return };
        for gone in member.scopes.difference(&wanted) {
            remove(&mut state.scopes, gone, self.id);
        }
        for new in wanted.difference(&member.scopes) {
            state.scopes.entry(new.clone()).or_default().insert(self.id);
        }
        member.scopes = wanted;
    }

    /// Copies messages behind `cursor` to `into`, at most `limit` and, but for the first, [`READ_BYTES`].
    ///
    /// # Errors
    /// [`FellBehind`] when the ring no longer holds the message after `cursor`.
    pub fn read(&self, cursor: u64, limit: usize, into: &mut Vec<Arc<Message>>) -> Result<(), FellBehind> {
        let state = self.hub.read();
        let Some((_, first)) = state.ring.front() else { return Err(FellBehind) };
        let skip = (cursor + 1).checked_sub(first.position.stream_seq).ok_or(FellBehind)?;
        let skip = usize::try_from(skip).map_err(|_| FellBehind)?;
        let mut bytes = 0;
        for (_, message) in state.ring.iter().skip(skip).take(limit) {
            bytes += message.weight();
            if bytes > READ_BYTES && !into.is_empty() {
                break;
            }
            into.push(message.clone());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::tests::message;

    fn seqs(membership: &Seat, cursor: u64) -> Result<Vec<u64>, FellBehind> {
        let mut found = Vec::new();
        membership.read(cursor, 100, &mut found)?;
        Ok(found.iter().map(|message| message.position.stream_seq).collect())
    }

    async fn woken(membership: &Seat) -> bool {
        tokio::time::timeout(Duration::from_millis(1), membership.wake.notified()).await.is_ok()
    }

    #[tokio::test]
    async fn sessions_are_woken_by_their_scopes_and_the_end_of_what_they_saw() {
        let hub = Arc::new(Hub::default());
        let scope = Scope::new("project", "a");
        let (session, _results) = hub.enter(Uuid::nil());
        session.set_scopes([&scope]);
        let now = Instant::now();
        hub.push(message(5, 50, 0, true, None).into(), now);
        assert!(!woken(&session).await);
        hub.push(message(6, 60, 0, false, Some(scope.clone())).into(), now);
        assert!(woken(&session).await);
        hub.push(message(7, 60, 1, true, Some(Scope::new("project", "b"))).into(), now);
        assert!(woken(&session).await, "the end of a transaction that it saw a part of");
        hub.push(message(8, 70, 0, true, Some(Scope::new("project", "b"))).into(), now);
        assert!(!woken(&session).await);
        assert_eq!(seqs(&session, 4), Ok(vec![5, 6, 7, 8]));
        assert_eq!(seqs(&session, 6), Ok(vec![7, 8]));
        assert_eq!(seqs(&session, 8), Ok(vec![]));
        assert_eq!(seqs(&session, 3), Err(FellBehind));
        assert_eq!(hub.at(7).map(|message| message.position.stream_seq), Some(7));
        assert!(hub.at(9).is_none());
        session.set_scopes([]);
        hub.push(message(9, 80, 0, true, Some(scope)).into(), now);
        assert!(!woken(&session).await);
        hub.push(message(11, 90, 0, true, None).into(), now);
        assert!(woken(&session).await, "a gap cuts everyone");
        assert_eq!(seqs(&session, 9), Err(FellBehind));
    }

    #[tokio::test]
    async fn the_ring_is_bounded() {
        let hub = Arc::new(Hub::default());
        let now = Instant::now();
        let total = RING_MESSAGES as u64 + 10;
        for stream_seq in 1..=total {
            hub.push(message(stream_seq, stream_seq, 0, true, None).into(), now);
        }
        assert_eq!(hub.oldest().map(|position| position.stream_seq), Some(11));
        let unseen = |xid: u32, now| {
            let fence = Fence::parse(&format!("{xid}:{xid}:"), "0/100000").unwrap();
            hub.unseen(&fence, 15, now).iter().map(|message| message.position.stream_seq).collect::<Vec<_>>()
        };
        assert_eq!(unseen(0, now), [11, 12, 13, 14, 15]);
        assert_eq!(unseen(14, now), [14, 15]);
        assert!(unseen(0, now + LOOK_BACK).is_empty());
    }
}
