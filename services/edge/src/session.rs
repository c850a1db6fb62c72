//! One WebSocket: the shell around [`Downlink`] and the lanes.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::ws::{CloseFrame, Message as Socket, WebSocket, close_code};
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use millstream_runtime::telemetry;
use millstream_schemas::frame::{
    ClientFrame, ErrorFrame, Hello, Limits, MAX_FRAME_BYTES, MAX_HELLO_BYTES, MAX_TRANSACTION_CHANGES, Resume,
    SUBMIT_WINDOW, ServerFrame, Submit, Welcome,
};
use millstream_schemas::stream::{Submission, TransactionResult};
use millstream_schemas::{Code, PROTOCOL_VERSION, Position, Scope};
use tokio::sync::mpsc;
use uuid::Uuid;

use crate::Edge;
use crate::catchup;
use crate::downlink::{Downlink, Next, Out};
use crate::hub::{FellBehind, Membership};
use crate::lane::Item;
use crate::snapshot::{Snapshot, begin_frame};
use crate::tail::Chain;

/// `hello` must have come within this time.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// The client must be heard within this time.
const HEARTBEAT: Duration = Duration::from_secs(45);
/// Pings to the client, and checks of its heartbeat.
const PING_INTERVAL: Duration = Duration::from_secs(15);
/// A client that takes nothing for this long is cut.
const SEND_TIMEOUT: Duration = Duration::from_secs(30);
/// Messages of the ring handled before the socket is looked at again.
const PUMP: usize = 256;
/// Frames of a snapshot between Postgres and the socket.
const SNAPSHOT_FRAMES: usize = 4;
/// Acknowledgements of lanes between two looks at them.
const STORED_QUEUE: usize = 4 * SUBMIT_WINDOW as usize;
/// Refused frames after which a client is cut.
const MAX_REFUSALS: u32 = 100;
/// How long the tail may lag behind a client that came from a faster edge.
const HEAD_WAIT: Duration = Duration::from_secs(2);
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

    /// A part that we need failed: the log has the cause, the client the advice.
    fn unavailable(error: &dyn std::error::Error) -> End {
        tracing::warn!(error = %Chain(error), "a session cannot go on");
        End::retry(Code::Unavailable, "a part of the server does not answer; nothing is lost, try again")
    }
}

/// Serves a WebSocket until it ends.
pub async fn serve(edge: Arc<Edge>, socket: WebSocket) {
    let (sink, mut stream) = socket.split();
    let mut wire = Wire { sink };
    let end = match hello(&edge, &mut stream).await {
        Ok((hello, user_id)) => match open(&edge, &mut wire, hello, user_id).await {
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
            Code::TooLarge => close_code::SIZE,
            Code::ShuttingDown => close_code::RESTART,
            Code::Unavailable | Code::Overloaded | Code::SlowConsumer | Code::EpochChanged => close_code::AGAIN,
            _ => close_code::POLICY,
        };
        let reason = frame.code.as_str().into();
        let _ = wire.send(&[Out::Own(ServerFrame::Error(frame))]).await;
        let _ = wire.sink.send(Socket::Close(Some(CloseFrame { code: close, reason }))).await;
    }
}

/// The sending half, which cuts clients that take nothing.
struct Wire {
    sink: SplitSink<WebSocket, Socket>,
}

impl Wire {
    async fn send(&mut self, out: &[Out]) -> Result<(), End> {
        let send = async {
            for frame in out {
                let text = match frame {
                    Out::Shared(text) => text.clone(),
                    // Our own types always encode.
                    Out::Own(frame) => serde_json::to_string(frame).unwrap_or_default().into(),
                };
                self.sink.feed(Socket::Text(text)).await?;
            }
            self.sink.flush().await
        };
        match tokio::time::timeout(SEND_TIMEOUT, send).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(End::Gone),
        }
    }

    async fn own(&mut self, frame: ServerFrame) -> Result<(), End> {
        self.send(&[Out::Own(frame)]).await
    }
}

/// Reads and checks the first frame: the only work done for a client that nobody vouches for.
async fn hello(edge: &Edge, stream: &mut SplitStream<WebSocket>) -> Result<(Hello, String), End> {
    let first = async {
        loop {
            match stream.next().await {
                Some(Ok(Socket::Text(text))) => return Ok(text),
                Some(Ok(Socket::Ping(_) | Socket::Pong(_))) => {}
                Some(Ok(Socket::Binary(_))) => return Err(End::fatal(Code::BadFrame, "frames are JSON texts")),
                Some(Ok(Socket::Close(_)) | Err(_)) | None => return Err(End::Gone),
            }
        }
    };
    let text = tokio::time::timeout(HELLO_TIMEOUT, first)
        .await
        .map_err(|_| End::fatal(Code::HeartbeatTimeout, "no hello within 5 s"))??;
    if text.len() > MAX_HELLO_BYTES {
        return Err(End::fatal(Code::TooLarge, format!("hello is over {MAX_HELLO_BYTES} bytes")));
    }
    let hello = match serde_json::from_str(&text) {
        Ok(ClientFrame::Hello(hello)) => hello,
        Ok(_) => return Err(End::fatal(Code::OutOfOrder, "the first frame must be hello")),
        Err(error) => return Err(End::fatal(Code::BadFrame, format!("not a frame of this protocol: {error}"))),
    };
    if hello.protocol != PROTOCOL_VERSION {
        let message = format!("this server speaks protocol {PROTOCOL_VERSION}, the client {}", hello.protocol);
        return Err(End::fatal(Code::UpgradeRequired, message));
    }
    let user_id = edge.verifier.user(&hello.token).map_err(|(code, message)| End::fatal(code, message))?;
    Ok((hello, user_id))
}

/// A session that has been welcomed.
struct Session {
    edge: Arc<Edge>,
    id: Uuid,
    client_id: Uuid,
    user_id: String,
    instance: Uuid,
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

/// Reads what Postgres knows of the client, welcomes it and brings it up to date.
async fn open(edge: &Arc<Edge>, wire: &mut Wire, hello: Hello, user_id: String) -> Result<Session, End> {
    let unavailable = |error| End::unavailable(&error);
    let mut snapshot = Snapshot::begin(&edge.pool).await.map_err(unavailable)?;
    let ledger = snapshot.ledger(hello.client_id, hello.confirmed_seq).await.map_err(unavailable)?;
    if ledger.user_id.as_ref().is_some_and(|bound| *bound != user_id) {
        return Err(End::fatal(Code::IdentityMismatch, "this client id belongs to another user; make a new store"));
    }
    let scopes = snapshot.scopes(&edge.catalog, &user_id).await.map_err(unavailable)?;
    let fence = Arc::new(snapshot.fence.clone());

    let Some(head) = *edge.hub.head().borrow() else {
        return Err(End::retry(Code::Unavailable, "this edge has not reached the outbound stream yet; try again"));
    };
    let kept = match hello.position {
        Some(position) if vouched(edge, position).await => Some(position),
        _ => None,
    };
    let (membership, results) = edge.hub.enter(hello.client_id);
    let id = Uuid::new_v4();
    wire.own(ServerFrame::Welcome(Welcome {
        protocol: PROTOCOL_VERSION,
        session: id,
        user_id: user_id.clone(),
        schema: (hello.schema.as_ref() != Some(&edge.catalog.version)).then(|| edge.catalog.schema()),
        limits: Limits {
            window: SUBMIT_WINDOW,
            frame_bytes: MAX_FRAME_BYTES,
            transaction_changes: MAX_TRANSACTION_CHANGES,
            heartbeat_ms: HEARTBEAT.as_millis() as u64,
        },
        last_seq: ledger.last_seq,
        epoch: head.epoch,
        resume: if kept.is_some() { Resume::CatchUp } else { Resume::Snapshot },
    }))
    .await?;

    let (held, lost): (Vec<Scope>, Vec<Scope>) = match kept {
        Some(_) => hello.scopes.into_iter().partition(|scope| scopes.contains(scope)),
        None => (Vec::new(), Vec::new()),
    };
    let tables = edge.membership_tables.clone();
    let mut downlink = Downlink::new(hello.client_id, &user_id, tables, kept.unwrap_or(head), held, fence.clone());
    let mut out = Vec::new();
    for scope in lost {
        downlink.removed(scope, &mut out);
    }
    downlink.ledger(fence.lsn, ledger.told_seq, ledger.failed);
    let mut session = Session {
        edge: edge.clone(),
        id,
        client_id: hello.client_id,
        user_id,
        instance: hello.instance,
        membership,
        downlink,
        results,
        stored: mpsc::channel(STORED_QUEUE),
        expected: ledger.last_seq + 1,
        gap_told: 0,
        refusals: 0,
        heard: Instant::now(),
        out,
    };
    let before = session.downlink.cursor();
    session.catch_up(wire).await?;
    if session.downlink.cursor() == before {
        session.join(wire, snapshot, &scopes).await?;
    } else {
        // That took its time: what the old snapshot does not see may have left the ring.
        drop(snapshot);
        let mut snapshot = Snapshot::begin(&edge.pool).await.map_err(unavailable)?;
        let scopes = snapshot.scopes(&edge.catalog, &session.user_id).await.map_err(unavailable)?;
        session.join(wire, snapshot, &scopes).await?;
    }
    Ok(session)
}

/// Whether the stream holds this position: its history, and at its sequence its LSN.
async fn vouched(edge: &Edge, position: Position) -> bool {
    let mut head = edge.hub.head();
    let reached =
        head.wait_for(|head| head.is_none_or(|head| head.seq >= position.seq || head.epoch != position.epoch));
    match tokio::time::timeout(HEAD_WAIT, reached).await {
        Ok(Ok(_)) => {}
        // Ahead of the stream: the stream lost something that the client has seen.
        Ok(Err(_)) | Err(_) => return false,
    }
    if let Some(found) = edge.hub.position_at(position.seq) {
        return found == position;
    }
    match catchup::at(&edge.nats, position.seq).await {
        Ok(Some(message)) => message.position == position,
        Ok(None) => false,
        Err(error) => {
            tracing::warn!(error = %Chain(&error), "a client's position cannot be checked; it gets a snapshot");
            false
        }
    }
}

impl Session {
    /// Fetches what the ring no longer holds, scope by scope, and sends it in stream order.
    async fn catch_up(&mut self, wire: &mut Wire) -> Result<(), End> {
        self.membership.set_scopes(self.downlink.scopes());
        let edge = self.edge.clone();
        while let Some(oldest) = edge.hub.oldest()
            && self.downlink.cursor() + 1 < oldest
        {
            let _permit = edge.catch_ups.acquire().await.map_err(|_| End::Gone)?;
            let mut messages = Vec::new();
            for scope in self.downlink.scopes() {
                let found = catchup::fetch(&edge.nats, scope, self.downlink.cursor() + 1, oldest).await;
                messages.extend(found.map_err(|error| match error {
                    // The client drops its position when it is told so, and gets a snapshot.
                    catchup::CatchUpError::TooMany => {
                        End::retry(Code::EpochChanged, "too far behind; a snapshot is cheaper")
                    }
                    error => End::unavailable(&error),
                })?);
                if messages.len() > catchup::MAX_MESSAGES {
                    return Err(End::retry(Code::EpochChanged, "too far behind; a snapshot is cheaper"));
                }
            }
            messages.sort_unstable_by_key(|message| message.position.seq);
            // Where the ring begins inside a transaction, its end will come from there.
            let ring_lsn = edge.hub.position_at(oldest).map(|position| position.lsn);
            for (index, message) in messages.iter().enumerate() {
                self.feed(wire, message).await?;
                let next = messages.get(index + 1).map_or(ring_lsn, |next| Some(next.lsn()));
                if next != Some(message.lsn()) {
                    self.downlink.end_of_group(&mut self.out);
                }
                if self.out.len() >= PUMP {
                    self.flush(wire).await?;
                }
            }
            self.downlink.skip_to(oldest - 1);
            self.flush(wire).await?;
        }
        Ok(())
    }

    /// Gives one message to the downlink, reading memberships when it asks for them.
    async fn feed(&mut self, wire: &mut Wire, message: &crate::message::Message) -> Result<(), End> {
        loop {
            match self.downlink.message(message, &mut self.out) {
                Next::Continue => return Ok(()),
                Next::EpochChanged => {
                    return Err(End::retry(Code::EpochChanged, "the server began a new history; a snapshot follows"));
                }
                Next::Reauthorize => {
                    let mut snapshot = self.snapshot_that_sees(message).await?;
                    let scopes = snapshot.scopes(&self.edge.catalog, &self.user_id).await;
                    let scopes = scopes.map_err(|error| End::unavailable(&error))?;
                    self.join(wire, snapshot, &scopes).await?;
                }
            }
        }
    }

    /// A snapshot in which the message's transaction is visible: it may be published a moment before it becomes so, and
    /// memberships read without it would miss what it grants or revokes.
    async fn snapshot_that_sees(&self, message: &crate::message::Message) -> Result<Snapshot, End> {
        let start = Instant::now();
        loop {
            let snapshot = Snapshot::begin(&self.edge.pool).await.map_err(|error| End::unavailable(&error))?;
            if snapshot.fence.sees(message.xid, message.lsn()) {
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

    /// Takes the user's scopes as read in `snapshot`, and sends the rows of those that are new.
    async fn join(&mut self, wire: &mut Wire, snapshot: Snapshot, scopes: &BTreeSet<Scope>) -> Result<(), End> {
        let fence = Arc::new(snapshot.fence.clone());
        let new = self.downlink.authorized(scopes, fence.clone(), &mut self.out);
        if !new.is_empty() {
            // Now, while what the snapshot may not see is still young enough to be in the ring.
            let back = self.membership.look_back(self.downlink.cursor(), Instant::now());
            self.out.push(Out::Own(begin_frame(&new)));
            self.flush(wire).await?;
            let _permit = self.edge.snapshots.acquire().await.map_err(|_| End::Gone)?;
            let (sender, mut frames) = mpsc::channel(SNAPSHOT_FRAMES);
            let catalog = self.edge.catalog.clone();
            let wanted = new.clone();
            let reading = tokio::spawn(async move { snapshot.rows(&catalog, &wanted, &sender).await });
            while let Some(frame) = frames.recv().await {
                wire.send(&[Out::Shared(frame.into())]).await?;
            }
            match reading.await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => return Err(End::unavailable(&error)),
                Err(error) => return Err(End::unavailable(&error)),
            }
            self.downlink.joined(new, &fence, &back, &mut self.out);
        }
        self.membership.set_scopes(self.downlink.scopes());
        Ok(())
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
        let mut batch = Vec::with_capacity(PUMP);
        loop {
            batch.clear();
            self.membership.read(self.downlink.cursor(), PUMP, &mut batch).map_err(|FellBehind| {
                End::retry(Code::SlowConsumer, "too slow for the live stream; connect again to catch up")
            })?;
            for message in &batch {
                self.feed(wire, message).await?;
            }
            self.downlink.settle(&mut self.out);
            self.flush(wire).await?;
            // Until nothing is left, not until a batch is short: a scope joined meanwhile was not woken for before.
            if batch.is_empty() {
                return Ok(());
            }
        }
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
        let wake = self.membership.wake.clone();
        let shutdown = self.edge.shutdown.clone();
        loop {
            self.pump(wire).await?;
            if self.downlink.waits() {
                waiting.get_or_insert_with(|| self.edge.watermarks.wait());
            } else {
                waiting = None;
            }
            tokio::select! {
                () = wake.notified() => {}
                frame = stream.next() => self.heard(wire, frame).await?,
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
                    let ping = wire.sink.send(Socket::Ping(bytes::Bytes::new()));
                    tokio::time::timeout(SEND_TIMEOUT, ping).await.map_err(|_| End::Gone)?.map_err(|_| End::Gone)?;
                }
                () = shutdown.requested() => {
                    return Err(End::retry(Code::ShuttingDown, "this edge is shutting down; connect again"));
                }
            }
        }
    }

    async fn heard(&mut self, wire: &mut Wire, frame: Option<Result<Socket, axum::Error>>) -> Result<(), End> {
        self.heard = Instant::now();
        let text = match frame {
            Some(Ok(Socket::Text(text))) => text,
            Some(Ok(Socket::Ping(_) | Socket::Pong(_))) => return Ok(()),
            Some(Ok(Socket::Binary(_))) => {
                return self.refuse(wire, Code::BadFrame, "frames are JSON texts".to_owned(), None).await;
            }
            Some(Err(error)) if is_too_long(&error) => {
                return Err(End::fatal(Code::TooLarge, format!("a frame is far over {MAX_FRAME_BYTES} bytes")));
            }
            Some(Ok(Socket::Close(_)) | Err(_)) | None => return Err(End::Gone),
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
            instance: self.instance,
            seq,
            attempt: submit.attempt,
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

/// Whether the socket was cut because a message went over the hard limit.
fn is_too_long(error: &axum::Error) -> bool {
    let mut source = Some(error as &dyn std::error::Error);
    while let Some(error) = source {
        if error.to_string().contains("too long") {
            return true;
        }
        source = error.source();
    }
    false
}
