//! One WebSocket: the shell around [`Downlink`] and the lanes.

mod join;
mod open;
mod wire;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::stream::SplitStream;
use millstream_runtime::telemetry;
use millstream_schemas::frame::{
    ClientFrame, ErrorFrame, MAX_FRAME_BYTES, MAX_TRANSACTION_CHANGES, SUBMIT_WINDOW, ServerFrame, Submit,
};
use millstream_schemas::stream::{Submission, TransactionResult};
use millstream_schemas::{Code, Lsn, Scope};
use tokio::sync::mpsc;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use uuid::Uuid;

use crate::Edge;
use crate::catalogs::Known;
use crate::catchup::{CatchUpError, Merge};
use crate::downlink::{Downlink, Next, Out};
use crate::hub::{FellBehind, Membership};
use crate::lane::Item;
use crate::message::Message;
use crate::snapshot::Snapshot;
use crate::tail::Chain;

use open::settled;
use wire::{Socket, SocketError, Wire};
pub use wire::{WebSocket, upgrade};

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
/// How long a published transaction may take to become visible, and how often to look.
const VISIBLE_WAIT: Duration = Duration::from_secs(10);
const VISIBLE_PAUSE: Duration = Duration::from_millis(2);
/// When to try again after a fault of ours, in milliseconds.
const RETRY_MS: u64 = 500;

/// Why a session ended.
enum End {
    /// The client went away.
    Gone,
    /// We refuse to go on; the client is told.
    Fatal(ErrorFrame),
}

impl End {
    fn fatal(code: Code, message: impl Into<String>) -> End {
        End::Fatal(ErrorFrame { code, message: message.into(), seq: None, retry_after_ms: None, fatal: true })
    }

    fn retry(code: Code, message: impl Into<String>) -> End {
        let frame =
            ErrorFrame { code, message: message.into(), seq: None, retry_after_ms: Some(RETRY_MS), fatal: true };
        End::Fatal(frame)
    }

    fn schema_changed() -> End {
        End::retry(Code::SchemaChanged, "the synced tables have changed; connect again for the new schema")
    }

    /// A part that we need failed: the log has the cause, the client the advice.
    fn unavailable(error: &dyn std::error::Error) -> End {
        tracing::warn!(error = %Chain(error), "a session cannot go on");
        End::retry(Code::Unavailable, "a part of the server does not answer; nothing is lost, try again")
    }
}

/// Serves a WebSocket until it ends.
pub async fn serve(edge: Arc<Edge>, socket: WebSocket) {
    let (mut wire, mut stream) = Wire::new(socket);
    let end = match open::hello(&edge, &mut stream).await {
        // What is rare is boxed: a session keeps room for the largest of its futures for as long as it lives.
        Ok((hello, user_id)) => match Box::pin(open::open(&edge, &mut wire, hello, user_id)).await {
            Ok(mut session) => {
                tracing::debug!(session = %session.id, client = %session.client_id, "session opened");
                let end = session.run(&mut wire, &mut stream).await;
                tracing::debug!(session = %session.id, "session ended");
                end
            }
            Err(end) => end,
        },
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
        let _ = wire.send(&[Out::Own(ServerFrame::Error(frame))]).await;
        let _ = wire.close(close, reason).await;
    }
}

/// A session that has been welcomed.
struct Session {
    edge: Arc<Edge>,
    id: Uuid,
    client_id: Uuid,
    user_id: String,
    /// The catalog whose schema the client has.
    known: Arc<Known>,
    membership: Membership,
    downlink: Downlink,
    results: mpsc::Receiver<TransactionResult>,
    stored: (mpsc::Sender<u64>, mpsc::Receiver<u64>),
    /// The next `client_seq` that may be forwarded: a lane must not get holes from us.
    expected: u64,
    /// The `client_seq` that the client was told to send again.
    gap_told: u64,
    refusals: u32,
    heard: Instant,
    out: Vec<Out>,
}

impl Session {
    /// Whether the ring no longer holds what comes next.
    fn is_behind(&self) -> bool {
        self.edge.hub.oldest().is_some_and(|oldest| self.downlink.cursor() + 1 < oldest.seq)
    }

    /// Fetches what the ring no longer holds, scope by scope, and sends it in stream order; then reads the ledger. Gives the
    /// snapshot that it is of.
    async fn catch_up(&mut self, wire: &mut Wire) -> Result<Snapshot, End> {
        self.membership.set_scopes(self.downlink.scopes());
        let edge = self.edge.clone();
        let failed = |error| match error {
            // The client drops its position when it is told so, and gets a snapshot.
            CatchUpError::TooMany | CatchUpError::Discarded => {
                End::retry(Code::EpochChanged, "too far behind; a snapshot is cheaper")
            }
            error => End::unavailable(&error),
        };
        self.downlink.mute();
        while let Some(oldest) = edge.hub.oldest()
            && self.downlink.cursor() + 1 < oldest.seq
        {
            let from = self.downlink.cursor() + 1;
            let scopes: Vec<Scope> = self.downlink.scopes().cloned().collect();
            let merge = Merge::new(&edge.nats, &edge.catch_ups, scopes.iter(), from, oldest.seq);
            let mut merge = wire.alive(merge).await?.map_err(failed)?;
            while let Some(message) = wire.alive(merge.next()).await?.map_err(failed)? {
                self.end_before(wire, message.lsn()).await?;
                self.feed(wire, &message).await?;
                if self.out.len() >= PUMP {
                    self.flush(wire).await?;
                }
            }
            wire.alive(merge.complete()).await?.map_err(failed)?;
            // Where the ring began inside a transaction, its end will come from there.
            self.end_before(wire, oldest.lsn).await?;
            self.downlink.skip_to(oldest.seq - 1);
            self.flush(wire).await?;
        }
        self.read_ledger(self.downlink.cursor()).await
    }

    /// Gives one message to the downlink, reading memberships when it asks for them.
    async fn feed(&mut self, wire: &mut Wire, message: &Message) -> Result<(), End> {
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
                    Box::pin(self.read_ledger(message.position.seq)).await?;
                }
            }
        }
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
        let start = Instant::now();
        loop {
            let snapshot = Snapshot::begin(&self.edge.pool).await.map_err(|error| End::unavailable(&error))?;
            if snapshot.fence.sees(xid, commit) {
                return Ok(snapshot);
            }
            if start.elapsed() > VISIBLE_WAIT {
                return Err(End::retry(
                    Code::Unavailable,
                    "a published transaction does not become visible; try again",
                ));
            }
            tokio::time::sleep(VISIBLE_PAUSE).await;
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

    /// Sends what the ring holds behind the cursor.
    async fn pump(&mut self, wire: &mut Wire) -> Result<(), End> {
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
            self.flush(wire).await?;
            if self.downlink.is_cut() && self.out.is_empty() {
                return Err(End::retry(Code::Unavailable, "there are more failures to tell: connect again"));
            }
            // Until nothing is left, not until a batch is short: a scope joined meanwhile was not woken for before.
            if batch.is_empty() {
                return Ok(());
            }
        }
        // The socket gets its turn; then on.
        self.membership.wake.notify_one();
        Ok(())
    }

    /// The cursor is older than the ring: from live to catch-up.
    async fn fell_behind(&mut self, wire: &mut Wire) -> Result<(), End> {
        let behind = || End::retry(Code::SlowConsumer, "the live stream was interrupted; connect again to catch up");
        let head = (*self.edge.hub.head().borrow()).ok_or_else(behind)?;
        if head.epoch != self.downlink.epoch() || head.seq < self.downlink.cursor() {
            return Err(End::retry(Code::EpochChanged, "the server began a new history; a snapshot follows"));
        }
        self.catch_up(wire).await.map(drop)
    }

    /// Reads what became of the client's changes up to a message while nobody was told. Gives the snapshot that says so.
    async fn read_ledger(&mut self, upto: u64) -> Result<Snapshot, End> {
        let (snapshot, ledger) = settled(&self.edge, self.client_id, self.downlink.confirmed(), upto).await?;
        let cut = ledger.is_cut();
        self.downlink.ledger(snapshot.fence.lsn, ledger.confirmed(), cut);
        Ok(snapshot)
    }

    async fn run(&mut self, wire: &mut Wire, stream: &mut SplitStream<WebSocket>) -> End {
        match self.steps(wire, stream).await {
            Ok(()) => End::Gone,
            Err(end) => end,
        }
    }

    async fn steps(&mut self, wire: &mut Wire, stream: &mut SplitStream<WebSocket>) -> Result<(), End> {
        let mut watermarks = self.edge.watermarks.subscribe();
        let mut waiting = None;
        let mut ticks = tokio::time::interval(PING_INTERVAL);
        ticks.tick().await;
        // A set of one: it looks at the socket only when that has called, not with each delivery.
        let mut frames = futures_util::stream::select_all([stream]);
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
            let start = Instant::now();
            self.pump(wire).await?;
            if start.elapsed() > PING_INTERVAL {
                // Nobody listened to the client meanwhile.
                self.heard = Instant::now();
            }
            if self.downlink.waits() {
                waiting.get_or_insert_with(|| self.edge.watermarks.wait());
            } else {
                waiting = None;
            }
            tokio::select! {
                () = wake.notified() => {}
                frame = frames.next() => self.heard(wire, frame).await?,
                Some(seq) = self.stored.1.recv() => {
                    let mut highest = seq;
                    while let Ok(seq) = self.stored.1.try_recv() {
                        highest = highest.max(seq);
                    }
                    wire.own(ServerFrame::Accepted { seq: highest }).await?;
                }
                Some(result) = self.results.recv() => {
                    let mut results = vec![result];
                    while let Ok(result) = self.results.try_recv() {
                        results.push(result);
                    }
                    wire.own(ServerFrame::Results { results }).await?;
                }
                Ok(()) = watermarks.changed(), if waiting.is_some() => {
                    if let Some(watermark) = *watermarks.borrow_and_update() {
                        self.downlink.watermark(watermark);
                    }
                }
                _ = ticks.tick() => {
                    if self.heard.elapsed() > HEARTBEAT {
                        return Err(End::retry(Code::HeartbeatTimeout, "nothing was heard from the client for 45 s"));
                    }
                    wire.ping().await?;
                }
                end = &mut ended => return Err(end),
            }
        }
    }

    async fn heard(&mut self, wire: &mut Wire, frame: Option<Result<Socket, SocketError>>) -> Result<(), End> {
        self.heard = Instant::now();
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
        if text.len() > MAX_FRAME_BYTES {
            let message = format!("the frame has {} bytes; the limit is {MAX_FRAME_BYTES}", text.len());
            return self.refuse(wire, Code::TooLarge, message, None).await;
        }
        match serde_json::from_str(&text) {
            Ok(ClientFrame::Submit(submit)) => self.submit(wire, submit).await,
            Ok(ClientFrame::Hello(_)) => {
                self.refuse(wire, Code::OutOfOrder, "hello comes once, as the first frame".to_owned(), None).await
            }
            Err(error) => {
                let message = format!("not a frame of this protocol: {error}");
                self.refuse(wire, Code::BadFrame, message, None).await
            }
        }
    }

    async fn refuse(&mut self, wire: &mut Wire, code: Code, message: String, seq: Option<u64>) -> Result<(), End> {
        self.refusals += 1;
        if self.refusals > MAX_REFUSALS {
            return Err(End::fatal(code, format!("{MAX_REFUSALS} frames were refused; the last: {message}")));
        }
        wire.own(ServerFrame::Error(ErrorFrame { code, message, seq, retry_after_ms: None, fatal: false })).await
    }

    async fn submit(&mut self, wire: &mut Wire, submit: Submit) -> Result<(), End> {
        let seq = submit.seq;
        if submit.changes.is_empty() || submit.changes.len() > MAX_TRANSACTION_CHANGES {
            let message =
                format!("a transaction has 1 to {MAX_TRANSACTION_CHANGES} changes, this one {}", submit.changes.len());
            return self.refuse(wire, Code::TooLarge, message, Some(seq)).await;
        }
        if submit.after.len() > MAX_TRANSACTION_CHANGES || submit.after.iter().any(|earlier| *earlier >= seq) {
            let message = format!("`after` names at most {MAX_TRANSACTION_CHANGES} transactions, all before seq {seq}");
            return self.refuse(wire, Code::BadFrame, message, Some(seq)).await;
        }
        // What was confirmed meanwhile came by another session; the client goes on behind it.
        self.expected = self.expected.max(self.downlink.confirmed() + 1);
        if seq > self.expected {
            // Said once for each gap: what was under way behind an overload is not the client's fault.
            if std::mem::replace(&mut self.gap_told, self.expected) == self.expected {
                return Ok(());
            }
            let message = format!("seq {seq} leaves a gap: {} comes next", self.expected);
            return self.refuse(wire, Code::OutOfOrder, message, Some(self.expected)).await;
        }
        let span = tracing::info_span!("submit", client = %self.client_id, seq);
        telemetry::set_parent(&span, submit.traceparent.as_deref());
        let submission = Submission {
            client_id: self.client_id,
            user_id: self.user_id.clone(),
            seq,
            attempt: submit.attempt,
            instance: submit.instance,
            previous: submit.previous,
            after: submit.after,
            changes: submit.changes,
            traceparent: span.in_scope(telemetry::traceparent).or(submit.traceparent),
        };
        let encoded = serde_json::to_vec(&submission)
            .map_err(|error| End::fatal(Code::Internal, format!("the submission cannot be encoded: {error}")))?;
        if encoded.len() > millstream_schemas::stream::MAX_MESSAGE_BYTES {
            let message =
                format!("the transaction has {} bytes on the broker; the limit is {MAX_FRAME_BYTES}", encoded.len());
            return self.refuse(wire, Code::TooLarge, message, Some(seq)).await;
        }
        let item = Item { submission: encoded, seq, stored: self.stored.0.clone() };
        if self.edge.lanes.submit(self.client_id, item).is_err() {
            let frame = ErrorFrame {
                code: Code::Overloaded,
                message: "too many changes wait for the broker; send again from this seq".to_owned(),
                seq: Some(seq),
                retry_after_ms: Some(RETRY_MS),
                fatal: false,
            };
            self.gap_told = seq;
            return wire.own(ServerFrame::Error(frame)).await;
        }
        self.expected = self.expected.max(seq + 1);
        Ok(())
    }
}
