//! One WebSocket: the shell around [`Downlink`] and the lanes.

mod join;
mod open;
pub mod text;
mod uplink;
mod wire;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use millstream_schemas::frame::{ErrorFrame, Hello, MAX_FRAME_BYTES, SUBMIT_WINDOW, ServerFrame};
use millstream_schemas::stream::{TransactionResult, Watermark};
use millstream_schemas::{Code, Lsn, Scope};
use tokio::sync::mpsc;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use uuid::Uuid;

use crate::Edge;
use crate::catalogs::Known;
use crate::catchup::{CatchUpError, Merge};
use crate::downlink::{Downlink, Next, Out};
use crate::fence::Fence;
use crate::history::Past;
use crate::hub::{FellBehind, Membership, READ_BYTES};
use crate::message::Message;
use crate::shares::{Admission, Place};
use crate::snapshot::Snapshot;
use crate::tail::Chain;

use join::Cut;
use open::settled;
use uplink::Unsettled;
use wire::{Socket, SocketError, Wire};
pub use wire::{UNSENT_KIB, upgrade};

/// The client must be heard within this time.
const HEARTBEAT: Duration = Duration::from_secs(45);
/// Pings to the client, and checks of its heartbeat.
const PING_INTERVAL: Duration = Duration::from_secs(15);
/// While the client waits for us, it hears from us this often.
const SIGN_OF_LIFE: Duration = Duration::from_secs(10);
/// A client that takes not one frame in this time is cut.
const SEND_TIMEOUT: Duration = Duration::from_secs(30);
/// Messages of the ring handled at once.
const PUMP: usize = 256;
/// Such batches handled before the socket is looked at again.
const PUMP_BATCHES: usize = 16;
/// Acknowledgements of lanes between two looks at them.
const STORED_QUEUE: usize = 4 * SUBMIT_WINDOW as usize;
/// Refused frames after which a client is cut.
const MAX_REFUSALS: u32 = 100;
/// How long a published transaction may take to become visible, and how often to look: less often each time, up to the last.
const VISIBLE_WAIT: Duration = Duration::from_secs(10);
const VISIBLE_PAUSE: Duration = Duration::from_millis(2);
const VISIBLE_LONGEST_PAUSE: Duration = Duration::from_millis(100);
/// How long a catch-up may take what others wait for.
const CATCH_UP_TURN: Duration = Duration::from_secs(10);
/// How long a client may take for the last words of a session.
const GOODBYE: Duration = Duration::from_secs(5);
/// When to try again after a fault of ours, in milliseconds.
const RETRY_MS: u64 = 500;

/// Why a session ended.
pub enum End {
    /// The client went away.
    Gone,
    /// We refuse to go on; the client is told.
    Fatal(ErrorFrame),
}

impl End {
    fn fatal(code: Code, message: impl Into<String>) -> End {
        End::Fatal(ErrorFrame { code, message: message.into(), client_seq: None, retry_after_ms: None, fatal: true })
    }

    fn retry(code: Code, message: impl Into<String>) -> End {
        let frame =
            ErrorFrame { code, message: message.into(), client_seq: None, retry_after_ms: Some(RETRY_MS), fatal: true };
        End::Fatal(frame)
    }

    fn overloaded(wait: Duration, message: &str) -> End {
        End::Fatal(ErrorFrame {
            code: Code::Overloaded,
            message: message.into(),
            client_seq: None,
            retry_after_ms: Some(u64::try_from(wait.as_millis()).unwrap_or(u64::MAX)),
            fatal: true,
        })
    }

    fn schema_changed() -> End {
        End::retry(Code::SchemaChanged, "the synced tables have changed; connect again for the new schema")
    }

    /// The client drops its position when it is told so, and gets a snapshot.
    fn too_far(error: CatchUpError) -> End {
        match error {
            CatchUpError::TooMany | CatchUpError::Discarded => {
                End::retry(Code::EpochChanged, "too far behind; a snapshot is cheaper")
            }
            error => End::unavailable(&error),
        }
    }

    /// A part that we need failed: the log has the cause, the client the advice.
    fn unavailable(error: &dyn std::error::Error) -> End {
        tracing::warn!(error = %Chain(error), "a session cannot go on");
        End::retry(Code::Unavailable, "a part of the server does not answer; nothing is lost, try again")
    }
}

/// Serves a WebSocket until it ends. `admission` is its place among sockets of strangers.
pub async fn serve(edge: Arc<Edge>, mut wire: Wire, admission: Admission) {
    let said = tokio::select! {
        said = open::hello(&edge, &mut wire) => said,
        () = admission.is_over() => Err(End::Gone),
    };
    let end = match said {
        Ok((hello, identity)) => {
            drop(admission);
            let (user_id, issued) = (identity.user_id.clone(), identity.issued);
            let right = async {
                tokio::select! {
                    () = tokio::time::sleep(identity.left) =>
                        End::fatal(Code::NeedsAuth, "the token has run out; connect with a new one"),
                    () = edge.evictions.wait(&user_id, issued) =>
                        End::fatal(Code::NeedsAuth, "an operator ended this user's sessions; sign in again"),
                }
            };
            // Whatever the session is at: its right ends it.
            tokio::select! {
                end = session(&edge, &mut wire, hello, identity.user_id) => end,
                end = right => end,
            }
        }
        Err(end) => end,
    };
    if let End::Fatal(frame) = end {
        let close = match frame.code {
            Code::TooLarge => CloseCode::Size,
            Code::ShuttingDown => CloseCode::Restart,
            Code::Unavailable | Code::Overloaded | Code::SlowConsumer | Code::EpochChanged | Code::SchemaChanged => {
                CloseCode::Again
            }
            _ => CloseCode::Policy,
        };
        let reason = frame.code.as_str();
        let goodbye = async {
            // Within a text that was given up half-way, only a control frame can follow.
            if wire.is_whole() {
                let _ = wire.send(&[Out::Own(ServerFrame::Error(frame))]).await;
            }
            let _ = wire.close(close, reason).await;
        };
        let _ = tokio::time::timeout(GOODBYE, goodbye).await;
    }
}

async fn session(edge: &Arc<Edge>, wire: &mut Wire, hello: Hello, user_id: String) -> End {
    let place = match edge.shares.enter(&user_id) {
        Ok(place) => {
            wire.trust(place.unsent.clone());
            place
        }
        Err(wait) => return End::overloaded(wait, "this user has too many sessions, or opens them too often"),
    };
    // What is rare is boxed: a session keeps room for the largest of its futures for as long as it lives.
    match Box::pin(open::open(edge, wire, hello, user_id, place)).await {
        Ok(mut session) => {
            tracing::debug!(session = %session.id, client = %session.client_id, "session opened");
            let end = session.run(wire).await;
            tracing::debug!(session = %session.id, "session ended");
            end
        }
        Err(end) => end,
    }
}

/// A session that has been welcomed.
struct Session {
    edge: Arc<Edge>,
    id: Uuid,
    client_id: Uuid,
    user_id: String,
    /// Its share of the edge.
    place: Place,
    /// Whether the ledger says that the client is this user's; before its first transaction nobody knows.
    is_bound: bool,
    /// The catalog whose schema the client has.
    known: Arc<Known>,
    membership: Membership,
    downlink: Downlink,
    /// How its rows are brought up to date, until that has begun.
    start: Option<Start>,
    /// Up to which message moved memberships have been looked for ahead of the cursor.
    looked: u64,
    results: mpsc::Receiver<TransactionResult>,
    stored: (mpsc::Sender<u64>, mpsc::Receiver<u64>),
    /// The next `client_seq` that may be forwarded: a lane must not get holes from us.
    expected: u64,
    /// The run that submitted the transaction before it, if that is known.
    last_run: Option<Uuid>,
    /// Up to which `client_seq` the broker has what was forwarded.
    accepted: u64,
    /// What was forwarded and is not known to be settled.
    unsettled: Unsettled,
    /// The last submission that was not taken because of an overload or a gap, since one was taken.
    passed_over: Option<u64>,
    refusals: u32,
    /// The client is not read before.
    deaf_until: Option<Instant>,
    out: Vec<Out>,
}

/// What a client claims to have, as of a position, is looked at once everything is in the stream that was visible when its
/// memberships were read.
struct Start {
    /// The moment at which `scopes` was read.
    fence: Arc<Fence>,
    scopes: BTreeSet<Scope>,
    /// A snapshot that may go on.
    cut: Option<Cut>,
}

impl Session {
    /// Whether the ring no longer holds what comes next.
    fn is_behind(&self) -> bool {
        self.edge.hub.oldest().is_some_and(|oldest| self.downlink.cursor() + 1 < oldest.stream_seq)
    }

    /// Fetches what the ring no longer holds, scope by scope, and sends it in stream order; then reads the ledger. Gives the
    /// snapshot that it is of.
    async fn catch_up(&mut self, wire: &mut Wire) -> Result<Snapshot, End> {
        self.membership.set_scopes(self.downlink.scopes());
        let edge = self.edge.clone();
        let _turn = wire.alive(self.place.catch_up()).await?;
        let room = edge.catch_ups.room(self.downlink.followed().len());
        let _room = wire.alive(room).await?;
        let begun = Instant::now();
        self.downlink.mute();
        while let Some(oldest) = edge.hub.oldest()
            && self.downlink.cursor() + 1 < oldest.stream_seq
        {
            let from = self.downlink.cursor() + 1;
            let scopes: Vec<Scope> = self.downlink.followed().into_iter().cloned().collect();
            let merge = Merge::new(&edge.nats, &edge.catch_ups, scopes.iter(), from, oldest.stream_seq);
            let mut merge = wire.alive(merge).await?.map_err(End::too_far)?;
            let mut bytes = 0;
            while let Some(message) = wire.alive(merge.next()).await?.map_err(End::too_far)? {
                self.end_before(wire, message.lsn()).await?;
                self.feed(wire, &message).await?;
                bytes += message.weight();
                if self.out.len() >= PUMP || bytes > READ_BYTES {
                    bytes = 0;
                    self.flush(wire).await?;
                    self.still_holds(&[]).await?;
                    if begun.elapsed() > CATCH_UP_TURN && edge.catch_ups.is_wanted() {
                        let what = "others wait to catch up, too; connect again to go on";
                        return Err(End::retry(Code::SlowConsumer, what));
                    }
                }
            }
            wire.alive(merge.complete()).await?.map_err(End::too_far)?;
            // Where the ring began inside a transaction, its end will come from there.
            self.end_before(wire, oldest.lsn).await?;
            self.downlink.skip_to(oldest.stream_seq - 1);
            self.flush(wire).await?;
        }
        self.read_ledger(self.downlink.cursor()).await
    }

    /// Ends the session if the user has lost a scope that it holds, or one of those that it is being sent, though the stream has
    /// not come so far: nothing more is sent of it, however slowly its client reads.
    async fn still_holds(&mut self, sending: &[Scope]) -> Result<(), End> {
        let (newest, behind) = (self.edge.hub.newest_move(), self.looked.max(self.downlink.cursor()));
        if newest <= behind {
            return Ok(());
        }
        let (moves, _) = self.edge.hub.moves_behind(behind, |message| self.downlink.may_lose(message, sending));
        self.looked = newest;
        let Some(last) = moves.last() else { return Ok(()) };
        let mut snapshot = Box::pin(self.snapshot_that_sees(last.xid, last.lsn())).await?;
        let scopes = self.scopes_in(&mut snapshot).await?;
        if sending.iter().chain(self.downlink.scopes()).all(|scope| scopes.contains(scope)) {
            return Ok(());
        }
        Err(End::retry(Code::Unavailable, "memberships moved meanwhile; connect again"))
    }

    /// Gives one message to the downlink, reading memberships when it asks for them.
    async fn feed(&mut self, wire: &mut Wire, message: &Message) -> Result<(), End> {
        if !self.is_bound && message.settles(self.client_id).next().is_some() {
            let sees = self.snapshot_that_sees(message.xid, message.lsn()).await?;
            Box::pin(self.bind(sees)).await?;
        }
        let mut read = false;
        loop {
            match self.downlink.message(message, &mut self.out) {
                Next::Continue => return Ok(()),
                Next::EpochChanged => {
                    return Err(End::retry(Code::EpochChanged, "the server began a new history; a snapshot follows"));
                }
                Next::Reauthorize => Box::pin(self.reauthorize(wire, message.xid, message.lsn())).await?,
                Next::ReadLedger if read => {
                    let what = "changes were settled of which nothing is known; connect again";
                    return Err(End::retry(Code::Unavailable, what));
                }
                Next::ReadLedger => {
                    read = true;
                    Box::pin(self.read_ledger(message.position.stream_seq)).await?;
                }
            }
        }
    }

    /// Somebody's first transaction under this client id was settled: whose was it?
    async fn bind(&mut self, mut snapshot: Snapshot) -> Result<(), End> {
        let ledger = snapshot.ledger(self.client_id, u64::MAX).await.map_err(|error| End::unavailable(&error))?;
        self.is_bound = ledger.user_id.as_ref() == Some(&self.user_id);
        if self.is_bound || ledger.user_id.is_none() { Ok(()) } else { Err(open::another_user()) }
    }

    /// Reads memberships again, as they are from a transaction on.
    async fn reauthorize(&mut self, wire: &mut Wire, xid: u32, commit: Lsn) -> Result<(), End> {
        let mut snapshot = self.snapshot_that_sees(xid, commit).await?;
        let scopes = self.scopes_in(&mut snapshot).await?;
        self.join(wire, snapshot, scopes).await
    }

    /// Ends a transaction of which a catch-up does not fetch the last message.
    async fn end_before(&mut self, wire: &mut Wire, next: Lsn) -> Result<(), End> {
        while let Some((commit, xid)) = self.downlink.ends_before(next, &mut self.out) {
            self.reauthorize(wire, xid, commit).await?;
        }
        Ok(())
    }

    /// A snapshot in which a transaction is visible: it may be published a moment before it becomes so, and
    /// memberships read without it would miss what it grants or revokes.
    async fn snapshot_that_sees(&self, xid: u32, commit: Lsn) -> Result<Snapshot, End> {
        let (start, mut pause) = (Instant::now(), VISIBLE_PAUSE);
        loop {
            let snapshot = Snapshot::begin(&self.edge.pool).await.map_err(|error| End::unavailable(&error))?;
            if snapshot.fence.sees(xid, commit) {
                return Ok(snapshot);
            }
            drop(snapshot);
            if start.elapsed() > VISIBLE_WAIT {
                return Err(End::retry(
                    Code::Unavailable,
                    "a published transaction does not become visible; try again",
                ));
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(VISIBLE_LONGEST_PAUSE);
        }
    }

    async fn scopes_in(&self, snapshot: &mut Snapshot) -> Result<BTreeSet<Scope>, End> {
        let scopes = snapshot.scopes(&self.known.catalog, &self.user_id).await;
        scopes.map_err(|error| End::unavailable(&error))
    }

    async fn flush(&mut self, wire: &mut Wire) -> Result<(), End> {
        if self.out.is_empty() {
            return Ok(());
        }
        let sent = wire.send(&self.out).await;
        self.out.clear();
        sent
    }

    /// The same for what the ring holds: that is the edge's memory, not what is kept for this client.
    async fn flush_live(&mut self, wire: &mut Wire) -> Result<(), End> {
        wire.is_live = true;
        let sent = self.flush(wire).await;
        wire.is_live = false;
        sent
    }

    /// Sends what the ring holds behind the cursor.
    async fn pump(&mut self, wire: &mut Wire) -> Result<(), End> {
        if self.start.is_some() && !Box::pin(self.begin(wire)).await? {
            return Ok(());
        }
        let mut batch = Vec::new();
        for _ in 0..PUMP_BATCHES {
            batch.clear();
            if self.membership.read(self.downlink.cursor(), PUMP, &mut batch) == Err(FellBehind) {
                Box::pin(self.fell_behind(wire)).await?;
                continue;
            }
            for message in &batch {
                self.feed(wire, message).await?;
            }
            self.downlink.settle(&mut self.out);
            self.flush_live(wire).await?;
            if self.downlink.is_cut() && self.out.is_empty() {
                return Err(End::retry(Code::Unavailable, "there are more failures to tell: connect again"));
            }
            // Until nothing is left, not until a batch is short: a scope joined meanwhile was not woken for before.
            if batch.is_empty() {
                return Ok(());
            }
            if self.edge.hub.newest_move() > self.looked.max(self.downlink.cursor()) {
                Box::pin(self.still_holds(&[])).await?;
            }
        }
        // The socket gets its turn; then on.
        self.membership.wake.notify_one();
        Ok(())
    }

    /// Begins to bring the client's rows up to date, once it can be known which of its claims hold. False: not yet.
    async fn begin(&mut self, wire: &mut Wire) -> Result<bool, End> {
        let Some(start) = self.start.take() else { return Ok(true) };
        let edge = self.edge.clone();
        if !self.has_reached(start.fence.lsn) {
            self.start = Some(start);
            return Ok(false);
        }
        self.downlink.listen(&start.scopes);
        let past = {
            let _turn = wire.alive(self.place.catch_up()).await?;
            let reading = Past::read(&edge, &self.known.reach, self.downlink.cursor(), &start.scopes);
            wire.alive(reading).await?.map_err(End::too_far)?
        };
        let moved = |scope: &Scope, since: Option<&Fence>| past.moved(&self.known.reach, scope, since);
        let claims: Vec<Scope> = self.downlink.scopes().filter(|scope| moved(scope, None)).cloned().collect();
        let goes_on = match start.cut {
            Some(cut) if start.scopes.iter().any(|scope| moved(scope, Some(&cut.fence))) => false,
            Some(cut) => {
                let mut snapshot = Snapshot::begin(&edge.pool).await.map_err(|error| End::unavailable(&error))?;
                let now = self.scopes_in(&mut snapshot).await?;
                if now == start.scopes {
                    self.resume(wire, now.into_iter().collect(), cut, snapshot).await?;
                    if self.is_behind() {
                        self.catch_up(wire).await?;
                    }
                    return Ok(true);
                }
                false
            }
            None => true,
        };
        if !goes_on || (self.is_behind() && !claims.is_empty()) {
            // From the start, at the stream's end: all of it is as of one moment.
            let (confirmed, held) = (self.downlink.confirmed(), self.downlink.scopes().cloned().collect::<Vec<_>>());
            self.downlink = open::downlink_at_head(&edge, self.client_id, &self.user_id, &self.known, &start.fence)?;
            self.downlink.knows(confirmed);
            held.into_iter().for_each(|scope| self.downlink.disclaim(scope));
            let mut snapshot = self.read_ledger(self.downlink.cursor()).await?;
            let scopes = self.scopes_in(&mut snapshot).await?;
            self.join(wire, snapshot, scopes).await?;
            return Ok(true);
        }
        claims.into_iter().for_each(|scope| self.downlink.disclaim(scope));
        if self.is_behind() {
            let mut snapshot = self.catch_up(wire).await?;
            let scopes = self.scopes_in(&mut snapshot).await?;
            self.join(wire, snapshot, scopes).await?;
        } else if start.scopes.iter().all(|scope| self.downlink.holds(scope)) {
            self.downlink.authorized(&start.scopes, start.fence, &mut self.out);
            self.membership.set_scopes(self.downlink.scopes());
        } else {
            let mut snapshot = Snapshot::begin(&edge.pool).await.map_err(|error| End::unavailable(&error))?;
            let scopes = self.scopes_in(&mut snapshot).await?;
            self.join(wire, snapshot, scopes).await?;
        }
        Ok(true)
    }

    /// Whether everything that committed before an LSN is in the ring, or was.
    fn has_reached(&self, lsn: Lsn) -> bool {
        let Some(head) = *self.edge.hub.head().borrow() else { return false };
        let watermark = *self.edge.watermarks.subscribe().borrow();
        let passed = |watermark: Watermark| {
            watermark.epoch == head.epoch && watermark.lsn >= lsn && head.stream_seq >= watermark.stream_seq
        };
        head.lsn >= lsn || watermark.is_some_and(passed)
    }

    /// The cursor is older than the ring: from live to catch-up.
    async fn fell_behind(&mut self, wire: &mut Wire) -> Result<(), End> {
        let behind = || End::retry(Code::SlowConsumer, "the live stream was interrupted; connect again to catch up");
        let head = (*self.edge.hub.head().borrow()).ok_or_else(behind)?;
        if head.epoch != self.downlink.epoch() || head.stream_seq < self.downlink.cursor() {
            return Err(End::retry(Code::EpochChanged, "the server began a new history; a snapshot follows"));
        }
        self.catch_up(wire).await.map(drop)
    }

    /// Reads what became of the client's changes up to a message while nobody was told. Gives the snapshot that says so.
    async fn read_ledger(&mut self, upto: u64) -> Result<Snapshot, End> {
        let (snapshot, ledger) = settled(&self.edge, self.client_id, self.downlink.confirmed(), upto).await?;
        if ledger.user_id.as_ref().is_some_and(|bound| *bound != self.user_id) {
            return Err(open::another_user());
        }
        let cut = ledger.is_cut();
        self.downlink.ledger(snapshot.fence.lsn, ledger.confirmed(), cut);
        Ok(snapshot)
    }

    async fn run(&mut self, wire: &mut Wire) -> End {
        match self.steps(wire).await {
            Ok(()) => End::Gone,
            Err(end) => end,
        }
    }

    async fn steps(&mut self, wire: &mut Wire) -> Result<(), End> {
        let mut watermarks = self.edge.watermarks.subscribe();
        let mut waiting = None;
        let mut ticks = tokio::time::interval(PING_INTERVAL);
        ticks.tick().await;
        let wake = self.membership.wake.clone();
        let (shutdown, mut catalogs) = (self.edge.shutdown.clone(), self.edge.catalogs.subscribe());
        if !Arc::ptr_eq(&catalogs.borrow_and_update(), &self.known) {
            return Err(End::schema_changed());
        }
        // Waits once for all: sessions by the hundred that line up for it anew after each frame get in each other's way.
        let mut ended = std::pin::pin!(async {
            tokio::select! {
                Ok(()) = catalogs.changed() => End::schema_changed(),
                () = shutdown.requested() => End::retry(Code::ShuttingDown, "this edge is shutting down; connect again"),
            }
        });
        loop {
            self.pump(wire).await?;
            if self.downlink.waits() || self.start.is_some() {
                waiting.get_or_insert_with(|| self.edge.watermarks.wait());
            } else {
                waiting = None;
            }
            tokio::select! {
                () = wake.notified() => {}
                frame = wire.next(), if self.deaf_until.is_none() => self.heard(wire, frame).await?,
                () = deaf(self.deaf_until), if self.deaf_until.is_some() => {
                    self.deaf_until = None;
                    wire.heard = Instant::now();
                }
                Some(client_seq) = self.stored.1.recv() => {
                    let mut highest = client_seq;
                    while let Ok(client_seq) = self.stored.1.try_recv() {
                        highest = highest.max(client_seq);
                    }
                    self.accepted = self.accepted.max(highest);
                    wire.own(ServerFrame::Accepted { client_seq: highest }).await?;
                }
                Some(result) = self.results.recv() => {
                    let mut results = vec![result];
                    while let Ok(result) = self.results.try_recv() {
                        results.push(result);
                    }
                    if !self.is_bound {
                        let now = Snapshot::begin(&self.edge.pool).await.map_err(|error| End::unavailable(&error))?;
                        Box::pin(self.bind(now)).await?;
                    }
                    if self.is_bound {
                        wire.own(ServerFrame::Results { results }).await?;
                    }
                }
                Ok(()) = watermarks.changed(), if waiting.is_some() => {
                    if let Some(watermark) = *watermarks.borrow_and_update() {
                        self.downlink.watermark(watermark);
                    }
                }
                _ = ticks.tick() => {
                    if wire.heard.elapsed() > HEARTBEAT {
                        return Err(End::retry(Code::HeartbeatTimeout, "nothing was heard from the client for 45 s"));
                    }
                    wire.ping().await?;
                }
                end = &mut ended => return Err(end),
            }
        }
    }

    async fn heard(&mut self, wire: &mut Wire, frame: Option<Result<Socket, SocketError>>) -> Result<(), End> {
        let text = match frame {
            Some(Ok(Socket::Text(text))) => text,
            Some(Ok(Socket::Ping(_) | Socket::Pong(_))) => return Ok(()),
            Some(Ok(Socket::Binary(_))) => {
                return self.refuse(wire, Code::BadFrame, "frames are JSON texts".to_owned(), None).await;
            }
            Some(Err(SocketError::Capacity(_))) => {
                return Err(End::fatal(Code::TooLarge, format!("a frame is far over {MAX_FRAME_BYTES} bytes")));
            }
            Some(Ok(Socket::Close(_) | Socket::Frame(_)) | Err(_)) | None => return Err(End::Gone),
        };
        match text::submit(&text) {
            Ok(submit) => self.submit(wire, submit).await,
            Err(refused) if refused.code == Code::OutOfOrder => Err(End::fatal(refused.code, refused.message)),
            Err(refused) => self.refuse(wire, refused.code, refused.message, refused.client_seq).await,
        }
    }

    async fn refuse(
        &mut self,
        wire: &mut Wire,
        code: Code,
        message: String,
        client_seq: Option<u64>,
    ) -> Result<(), End> {
        self.refusals += 1;
        if self.refusals > MAX_REFUSALS {
            return Err(End::fatal(code, format!("{MAX_REFUSALS} frames were refused; the last: {message}")));
        }
        wire.own(ServerFrame::Error(ErrorFrame { code, message, client_seq, retry_after_ms: None, fatal: false })).await
    }
}

async fn deaf(until: Option<Instant>) {
    match until {
        Some(until) => tokio::time::sleep_until(until.into()).await,
        None => std::future::pending().await,
    }
}
