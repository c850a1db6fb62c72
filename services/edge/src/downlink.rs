//! What a session sends its client of the outbound stream: pure, `message in -> frames out`.
//!
//! The shell feeds the stream's messages in order. Whether a client may see one is decided here and nowhere else, for
//! live messages, catch-up and the look-back of a snapshot alike: the message's scope must be held, and a transaction
//! that the scope's snapshot already contains is skipped.
//!
//! A scope is held from a moment on. A message that moves its membership behind that moment ends it, also where the user has it
//! again by the time that this is read: then it comes again as of that time, and what happened in it in between is not the
//! user's to see.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use millstream_schemas::frame::{Confirmed, ServerFrame};
use millstream_schemas::stream::{OriginEntry, Watermark};
use millstream_schemas::{Lsn, Position, Scope};
use tokio_tungstenite::tungstenite::Utf8Bytes;
use uuid::Uuid;

use crate::fence::Fence;
use crate::message::Message;
use crate::reach::{Moves, Reach};

/// Most messages of a transaction that are kept until its end; a larger transaction streams, so that memory is bounded.
const MAX_HELD: usize = 64;

/// A frame on its way to the client.
#[derive(Clone, Debug)]
pub enum Out {
    /// Encoded once, shared by every session that gets it.
    Shared(Utf8Bytes),
    /// For this session alone.
    Own(ServerFrame),
}

/// What the shell does after a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Feed the next message.
    Continue,
    /// The user's memberships moved: read them, call [`Downlink::authorized`], then feed the same message again.
    Reauthorize,
    /// Something of the client's was settled that the session has not told, nor will: read the ledger as the message's
    /// transaction left it, call [`Downlink::ledger`], then feed the same message again.
    ReadLedger,
    /// The stream began a new history: the session ends.
    EpochChanged,
}

/// A snapshot that has been sent and waits for the stream to pass its fence.
#[derive(Debug)]
struct Bracket {
    fence: Arc<Fence>,
    /// Everything before it has to be fed before the bracket ends.
    until: Lsn,
    /// Frames of transactions that the snapshot does not see though they committed before its fence: they come after it.
    /// None: `snapshot_apply` has been sent.
    after: Option<Vec<Utf8Bytes>>,
}

/// The outbound half of a session.
#[derive(Debug)]
pub struct Downlink {
    client_id: Uuid,
    user_scope: Scope,
    /// Which scopes a moved membership concerns.
    reach: Arc<Reach>,
    /// Sequence of the last message fed.
    cursor: u64,
    /// Position of the last message fed, for commits.
    position: Position,
    /// Commit LSN and id of a transaction of which the end has not been fed.
    open: Option<(Lsn, u32)>,
    /// Scopes of which messages may tell of moves, held or not: those that the user had when memberships were read last.
    listens: BTreeSet<Scope>,
    /// The transaction, larger than what is kept, for which memberships have been read before any of it was sent.
    checked: Option<(Lsn, u32)>,
    /// Scopes held, each with the snapshot that its rows came from, if this session sent one.
    scopes: BTreeMap<Scope, Option<Arc<Fence>>>,
    /// Scopes that the client says it holds and that are not delivered: it is told if they are not the user's.
    disclaimed: BTreeSet<Scope>,
    /// The snapshot in which memberships were read last.
    authorization: Arc<Fence>,
    /// The open transaction moves memberships that the authorization does not know.
    reauthorize: bool,
    /// Scopes that it ends, though the user may have some of them again by now.
    ended: BTreeSet<Scope>,
    /// The open snapshot bracket.
    bracket: Option<Bracket>,
    /// Frames of the open transaction, kept until its end shows whether it revokes their scope.
    held: Vec<(Scope, Utf8Bytes)>,
    /// Something was sent that takes effect with the next commit.
    staged: bool,
    /// Highest `client_seq` confirmed to the client.
    confirmed: u64,
    /// The run that submitted it, if this session has confirmed it.
    confirmed_run: Option<Uuid>,
    /// The ledger as read at some fence, to be confirmed once the stream passes it.
    ledger: Option<(Lsn, Confirmed)>,
    /// It does not tell of everything up to its fence: the session ends behind it.
    cut: bool,
    /// A catch-up fetches only some of the messages that settle changes: nothing is confirmed until the ledger is read again.
    mute: bool,
    watermark: Option<Watermark>,
    /// Everything that committed before it has been sent once the session is caught up. None: the client has been told.
    catches_up: Option<Lsn>,
}

impl Downlink {
    /// A session that stands at `position` and holds `scopes` there; `open` is the commit LSN and id of a transaction that has
    /// only been published in part by then. It is caught up with what committed before `authorization` was taken.
    pub fn new(
        client_id: Uuid,
        user_id: &str,
        reach: Arc<Reach>,
        position: Position,
        open: Option<(Lsn, u32)>,
        scopes: impl IntoIterator<Item = Scope>,
        authorization: Arc<Fence>,
    ) -> Self {
        Downlink {
            client_id,
            user_scope: Scope::user(user_id),
            reach,
            cursor: position.stream_seq,
            position,
            open,
            listens: BTreeSet::from([Scope::user(user_id), Scope::global()]),
            checked: None,
            disclaimed: BTreeSet::new(),
            scopes: scopes.into_iter().map(|scope| (scope, None)).collect(),
            catches_up: Some(authorization.lsn),
            authorization,
            reauthorize: false,
            ended: BTreeSet::new(),
            bracket: None,
            held: Vec::new(),
            staged: false,
            confirmed: 0,
            confirmed_run: None,
            ledger: None,
            cut: false,
            mute: false,
            watermark: None,
        }
    }

    /// The client knows its changes up to this `client_seq` to be settled.
    pub fn knows(&mut self, confirmed_seq: u64) {
        self.confirmed = confirmed_seq;
    }

    /// The epoch of the history that the session follows.
    pub fn epoch(&self) -> Uuid {
        self.position.epoch
    }

    /// Sequence of the last message fed.
    pub fn cursor(&self) -> u64 {
        self.cursor
    }

    /// Continue behind `stream_seq` after a catch-up that fetched everything relevant up to it.
    pub fn skip_to(&mut self, stream_seq: u64) {
        self.cursor = self.cursor.max(stream_seq);
    }

    /// The scopes that the session delivers.
    pub fn scopes(&self) -> impl Iterator<Item = &Scope> {
        self.scopes.keys()
    }

    /// Whether the session delivers a scope.
    pub fn holds(&self, scope: &Scope) -> bool {
        self.scopes.contains_key(scope)
    }

    /// Those of these scopes that need a snapshot: they are not held, or have ended meanwhile.
    pub fn lacks(&self, scopes: &BTreeSet<Scope>) -> Vec<Scope> {
        scopes.iter().filter(|scope| !self.holds(scope) || self.ended.contains(scope)).cloned().collect()
    }

    /// Whether something waits for the stream to pass an LSN, so that a watermark would help on a quiet database.
    pub fn waits(&self) -> bool {
        self.bracket.is_some() || self.ledger.is_some() || self.catches_up.is_some()
    }

    /// A catch-up begins: nothing is confirmed until [`Downlink::ledger`] tells of all that it passed over.
    pub fn mute(&mut self) {
        self.mute = true;
        self.ledger = None;
    }

    /// The ledger was read at `fence`: confirm it once everything that it speaks of has been sent.
    /// `cut`: it does not tell of everything, so that the client has to come again for the rest.
    pub fn ledger(&mut self, fence: Lsn, confirmed: Option<Confirmed>, cut: bool) {
        self.ledger = confirmed.map(|confirmed| (fence, confirmed));
        self.cut = cut;
        self.mute = false;
    }

    /// Whether a ledger that does not tell of everything has been told: nothing may be confirmed behind it.
    pub fn is_cut(&self) -> bool {
        self.cut && self.ledger.is_none()
    }

    /// One message of the stream, in order.
    pub fn message(&mut self, message: &Message, out: &mut Vec<Out>) -> Next {
        if message.epoch() != self.position.epoch {
            return Next::EpochChanged;
        }
        if self.open.is_none() && self.bracket.as_ref().is_some_and(|bracket| message.lsn() >= bracket.until) {
            // Commit order: everything before the fence has been fed.
            self.close_bracket(out);
        }
        self.look_at_moves(message);
        if message.last && self.reauthorize {
            // Before the transaction takes effect: a revoked scope ends with it, a granted one begins with it.
            return Next::Reauthorize;
        }
        let transaction = (message.lsn(), message.xid);
        if !message.last && self.held.len() >= MAX_HELD && self.checked != Some(transaction) {
            // It streams from here on, before its end can show that it revokes a scope.
            self.checked = Some(transaction);
            return Next::Reauthorize;
        }
        if message.last && self.misses(message) {
            return Next::ReadLedger;
        }
        if message.last {
            self.release(message.lsn(), message.xid, out);
            self.confirm(message, out);
        }
        let delivered = self.delivers(message);
        if let Some(scope) = message.scope.as_ref().filter(|_| delivered) {
            if message.last {
                self.send(message.lsn(), message.xid, message.frame(), out);
            } else {
                self.held.push((scope.clone(), message.frame()));
                if self.checked == Some(transaction) {
                    self.release(message.lsn(), message.xid, out);
                }
            }
            self.staged = true;
        }
        self.cursor = message.position.stream_seq;
        self.position = message.position;
        self.open = (!message.last).then_some((message.lsn(), message.xid));
        if message.last && self.bracket.is_none() {
            if self.staged && !delivered {
                out.push(Out::Own(ServerFrame::Commit { position: self.position }));
            }
            self.staged = false;
        }
        Next::Continue
    }

    /// Sends what was held of a transaction, except scopes that it turned out to revoke.
    fn release(&mut self, lsn: Lsn, xid: u32, out: &mut Vec<Out>) {
        for (scope, frame) in std::mem::take(&mut self.held) {
            if self.scopes.contains_key(&scope) {
                self.send(lsn, xid, frame, out);
            }
        }
    }

    /// Sends a frame of a transaction, or keeps it for behind the snapshot that does not see it.
    fn send(&mut self, lsn: Lsn, xid: u32, frame: Utf8Bytes, out: &mut Vec<Out>) {
        match &mut self.bracket {
            Some(Bracket { fence, after: Some(after), .. }) if !fence.sees(xid, lsn) => after.push(frame),
            _ => out.push(Out::Shared(frame)),
        }
    }

    fn close_bracket(&mut self, out: &mut Vec<Out>) {
        if let Some(bracket) = self.bracket.take() {
            if let Some(after) = bracket.after {
                out.push(Out::Own(ServerFrame::SnapshotApply {}));
                out.extend(after.into_iter().map(Out::Shared));
            }
            out.push(Out::Own(ServerFrame::SnapshotEnd { position: self.position }));
            self.staged = false;
        }
    }

    fn delivers(&self, message: &Message) -> bool {
        match message.scope.as_ref().and_then(|scope| self.scopes.get(scope).filter(|_| !self.ended.contains(scope))) {
            None => false,
            Some(None) => true,
            Some(Some(snapshot)) => !snapshot.sees(message.xid, message.lsn()),
        }
    }

    /// Whether a message tells of memberships of the user, who holds `scopes`.
    fn is_told<'m>(&self, message: &'m Message, holds: impl Fn(&Scope) -> bool) -> Option<&'m Moves> {
        let (scope, moves) = (message.scope.as_ref()?, message.moves.as_ref()?);
        (self.listens.contains(scope) || holds(scope)).then_some(moves)
    }

    /// Whether a message may mean that the user has lost a scope that is held, or one of those that are being sent.
    pub fn may_lose(&self, message: &Message, sending: &[Scope]) -> bool {
        let told = self.is_told(message, |scope| self.scopes.contains_key(scope) || sending.contains(scope));
        let sees = |since: &Option<Arc<Fence>>| since.as_ref().is_some_and(|s| s.sees(message.xid, message.lsn()));
        told.is_some_and(|moves| {
            sending.iter().any(|scope| self.reach.concerns(moves, scope))
                || self.scopes.iter().any(|(scope, since)| !sees(since) && self.reach.concerns(moves, scope))
        })
    }

    /// Finds out which scopes a message ends, and whether memberships have to be read because of it.
    fn look_at_moves(&mut self, message: &Message) {
        let Some(moves) = self.is_told(message, |scope| self.scopes.contains_key(scope)) else { return };
        let sees = |moment: &Fence| moment.sees(message.xid, message.lsn());
        let since = |moment: &Option<Arc<Fence>>| moment.as_ref().is_some_and(|moment| sees(moment));
        let ended = self.scopes.iter().filter(|(scope, moment)| !since(moment) && self.reach.concerns(moves, scope));
        let ended: Vec<Scope> = ended.map(|(scope, _)| scope.clone()).collect();
        let is_new = |scope: &Scope| !self.scopes.contains_key(scope);
        let grants = match moves {
            Moves::Any => true,
            Moves::Again(_) => false,
            Moves::Scopes(moved) => moved.iter().any(is_new),
        };
        self.reauthorize |= !ended.is_empty() || (grants && !sees(&self.authorization));
        self.ended.extend(ended);
    }

    /// Whether a message settles changes of the client, but not those that come next.
    fn misses(&self, message: &Message) -> bool {
        let told = self.ledger.as_ref().map_or(self.confirmed, |(_, known)| known.client_seq.max(self.confirmed));
        let missing = |entry: &OriginEntry| entry.first_seq > told + 1;
        !self.cut && !self.mute && message.settles(self.client_id).any(missing)
    }

    fn confirm(&mut self, message: &Message, out: &mut Vec<Out>) {
        for entry in message.settles(self.client_id) {
            if let Some((_, known)) = &self.ledger {
                if entry.client_seq <= known.client_seq {
                    // A catch-up sees only some of the messages that told of failures: the ledger tells of all.
                    continue;
                }
                // This transaction committed after all that the ledger speaks of, so that has been sent.
                self.confirm_ledger(out);
            }
            if entry.client_seq > self.confirmed && !self.cut && !self.mute {
                self.confirmed = entry.client_seq;
                self.confirmed_run = Some(entry.run_id);
                out.push(Out::Own(ServerFrame::Confirmed(Confirmed {
                    client_seq: entry.client_seq,
                    run_id: entry.run_id,
                    failed: entry.failed.clone(),
                    lost: entry.lost.clone(),
                })));
                self.staged = true;
            }
        }
    }

    fn confirm_ledger(&mut self, out: &mut Vec<Out>) {
        if let Some((_, confirmed)) = self.ledger.take() {
            if confirmed.client_seq > self.confirmed {
                self.confirmed = confirmed.client_seq;
                self.confirmed_run = Some(confirmed.run_id);
            }
            out.push(Out::Own(ServerFrame::Confirmed(confirmed)));
            self.staged = true;
        }
    }

    /// The next message is of the transaction with this commit LSN: another one that is open has ended, with messages of
    /// scopes that a catch-up does not fetch. If it moved memberships, gives its commit LSN and id: as with
    /// [`Next::Reauthorize`], they are to be read before this is told again.
    pub fn ends_before(&mut self, next: Lsn, out: &mut Vec<Out>) -> Option<(Lsn, u32)> {
        let (lsn, xid) = self.open.filter(|(lsn, _)| *lsn != next)?;
        if self.reauthorize {
            return Some((lsn, xid));
        }
        self.open = None;
        self.release(lsn, xid, out);
        if self.staged && self.bracket.is_none() {
            out.push(Out::Own(ServerFrame::Commit { position: self.position }));
            self.staged = false;
        }
        None
    }

    /// The first transaction behind the cursor that moves the user's memberships and that a snapshot does not see: the `scopes`
    /// read there are outdated, and nothing that is still to be fed would tell.
    pub fn outdates<'a>(
        &self,
        snapshot: &Fence,
        scopes: &BTreeSet<Scope>,
        look_back: &'a [Arc<Message>],
    ) -> Option<&'a Message> {
        let moves = |message: &&Message| {
            message.epoch() == self.position.epoch
                && !snapshot.sees(message.xid, message.lsn())
                && self.is_told(message, |scope| scopes.contains(scope)).is_some()
        };
        look_back.iter().map(Arc::as_ref).find(moves)
    }

    /// Memberships as read in a snapshot. Lost scopes end here; the returned ones are new, or come again, and need a snapshot.
    pub fn authorized(&mut self, scopes: &BTreeSet<Scope>, fence: Arc<Fence>, out: &mut Vec<Out>) -> Vec<Scope> {
        self.reauthorize = false;
        self.authorization = fence;
        self.listen(scopes);
        // What came for them in this transaction is in the snapshot, or not for this user.
        let ended = std::mem::take(&mut self.ended);
        self.held.retain(|(scope, _)| !ended.contains(scope));
        for scope in ended.intersection(scopes) {
            self.scopes.remove(scope);
        }
        for scope in std::mem::take(&mut self.disclaimed) {
            if !scopes.contains(&scope) {
                self.removed(scope, out);
            }
        }
        let lost: Vec<Scope> = self.scopes.keys().filter(|scope| !scopes.contains(scope)).cloned().collect();
        for scope in lost {
            self.scopes.remove(&scope);
            self.removed(scope, out);
        }
        scopes.iter().filter(|scope| !self.scopes.contains_key(scope)).cloned().collect()
    }

    /// Messages of these scopes, which the user has, may tell of moves.
    pub fn listen(&mut self, scopes: &BTreeSet<Scope>) {
        let own = [self.user_scope.clone(), Scope::global()];
        self.listens = scopes.iter().filter(|scope| self.reach.tells(scope)).cloned().chain(own).collect();
    }

    /// What a catch-up fetches: the scopes held, and those of which messages tell of moves.
    pub fn followed(&self) -> BTreeSet<&Scope> {
        self.scopes.keys().chain(&self.listens).collect()
    }

    /// A client's claim to hold a scope does not stand: if the user has it, it comes as a snapshot.
    pub fn disclaim(&mut self, scope: Scope) {
        self.scopes.remove(&scope);
        self.disclaimed.insert(scope);
    }

    /// Tells the client that it may not hold a scope.
    pub fn removed(&mut self, scope: Scope, out: &mut Vec<Out>) {
        out.push(Out::Own(ServerFrame::ScopeRemoved { scope }));
        self.staged = true;
    }

    /// A snapshot of these scopes has been sent from `snapshot_begin` to its last row. Keeps what it lacks of the past, and
    /// leaves the bracket open until the stream has passed its fence.
    pub fn joined(&mut self, scopes: impl IntoIterator<Item = Scope>, fence: &Arc<Fence>, look_back: &[Arc<Message>]) {
        self.scopes.extend(scopes.into_iter().map(|scope| (scope, Some(fence.clone()))));
        // Of scopes held before, too: the snapshot may have set a row back that such a transaction moved to them.
        let unseen = |message: &&Arc<Message>| {
            message.epoch() == self.position.epoch
                && message.scope.as_ref().is_some_and(|scope| self.scopes.contains_key(scope))
                && !fence.sees(message.xid, message.lsn())
        };
        let after = look_back.iter().filter(unseen).map(|message| message.frame()).collect();
        self.bracket = Some(Bracket { fence: fence.clone(), until: fence.lsn, after: Some(after) });
        self.staged = true;
    }

    /// A snapshot that was cut has been sent to its last row, which begins where the session stands: before the cut as of
    /// `fence`, the rest as of `until`. Its scopes are all that the client has, so nothing comes before it.
    pub fn resumed(
        &mut self,
        scopes: impl IntoIterator<Item = Scope>,
        fence: &Arc<Fence>,
        until: Lsn,
        out: &mut Vec<Out>,
    ) {
        self.scopes.extend(scopes.into_iter().map(|scope| (scope, Some(fence.clone()))));
        out.push(Out::Own(ServerFrame::SnapshotApply {}));
        self.bracket = Some(Bracket { fence: fence.clone(), until, after: None });
        self.staged = true;
    }

    /// Position of the last message fed.
    pub fn position(&self) -> Position {
        self.position
    }

    /// Whether a snapshot has been sent that does not apply yet.
    pub fn in_bracket(&self) -> bool {
        self.bracket.is_some()
    }

    /// Highest `client_seq` confirmed to the client.
    pub fn confirmed(&self) -> u64 {
        self.confirmed
    }

    /// The run that submitted it, if this session has confirmed it.
    pub fn confirmed_run(&self) -> Option<Uuid> {
        self.confirmed_run
    }

    /// Everything before an LSN is known to be published.
    pub fn watermark(&mut self, watermark: Watermark) {
        if watermark.epoch == self.position.epoch {
            self.watermark = Some(watermark);
        }
    }

    /// Between messages: confirms and closes what the stream has passed by now.
    pub fn settle(&mut self, out: &mut Vec<Out>) {
        if self.open.is_some() {
            return;
        }
        if self.ledger.as_ref().is_some_and(|(fence, _)| self.passed(*fence)) {
            self.confirm_ledger(out);
        }
        match &self.bracket {
            Some(bracket) if self.passed(bracket.until) => self.close_bracket(out),
            None if self.staged => {
                self.staged = false;
                out.push(Out::Own(ServerFrame::Commit { position: self.position }));
            }
            _ => {}
        }
        let is_whole = self.bracket.is_none() && self.ledger.is_none() && !self.cut;
        if is_whole && self.catches_up.is_some_and(|until| self.passed(until)) {
            self.catches_up = None;
            out.push(Out::Own(ServerFrame::CaughtUp { position: self.position }));
        }
    }

    /// Whether every transaction that committed before `lsn` has been fed.
    fn passed(&self, lsn: Lsn) -> bool {
        self.position.lsn >= lsn
            || self.watermark.is_some_and(|watermark| watermark.lsn >= lsn && self.cursor >= watermark.stream_seq)
    }
}
