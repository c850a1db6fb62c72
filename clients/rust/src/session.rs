//! One session of the sync worker: token, connection, `hello` and `welcome`, then frames in both directions until it ends.

use std::time::Duration;

use futures_util::{FutureExt, SinkExt, StreamExt};
use millstream_client_core::backoff::RETRY_AFTER_CAP_MS;
use millstream_client_core::replica::{Replica, Work};
use millstream_client_core::status::{LastError, State};
use millstream_client_store::{Meeting, StoreError};
use millstream_schemas::PROTOCOL_VERSION;
use millstream_schemas::frame::{ClientFrame, Hello, MAX_SCOPES_BYTES, ScopesDigest, ServerFrame, Welcome};
use tokio::sync::oneshot;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_tungstenite::tungstenite::{self, Message};

use crate::bus::{Link, ToSync, WriterCommand};
use crate::error::chain;
use crate::socket::{End, Socket, Then, closed_by, connect, decode, flush, wants_token};
use crate::sync::{NO_TOKEN, STORE, SyncWorker};
use crate::token;
use crate::{Error, Result};

/// To connect, TLS included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// From `hello` to `welcome`. The edge may have to wait for Postgres.
const WELCOME_TIMEOUT: Duration = Duration::from_secs(20);
/// Longer lists of scopes are not in `hello`: it has their digest.
const HELLO_SCOPES_BYTES: usize = 64 * 1024;
/// What a scope takes in a list beyond its own bytes.
const SCOPE_OVERHEAD_BYTES: usize = 4;
/// Most scopes in one frame; the longest ones fill it nearly.
const SCOPES_A_FRAME: usize = 2_000;
/// Between pings.
const PING_INTERVAL: Duration = Duration::from_secs(10);
/// A connection this long silent is dead, or as long as the edge bears silence if that is less: it answers pings.
const SILENCE: Duration = Duration::from_secs(30);
/// Encoded bytes that may wait for the writer before the socket is not read any more.
const MAX_READY_BYTES: usize = 8 * 1024 * 1024;
/// Most frames taken from the socket at once, before they go to the writer.
const DRAIN: usize = 4_096;
/// Between repetitions of where the connection stands.
const LINK_INTERVAL: Duration = Duration::from_millis(250);

impl SyncWorker {
    /// One session, from the token to the end.
    pub(crate) async fn session(&mut self, edge: &str) -> End {
        let token = match self.auth.fresh.take() {
            Some(token) => token,
            None => match self.tokens.get().await {
                Ok(token) => token,
                Err(error) => return End::new(Then::Auth, NO_TOKEN, chain(&*error)),
            },
        };
        self.auth.token.clone_from(&token);
        // Before anything is sent: the store may be somebody else's.
        if let Some(user) = token::subject(&token)
            && let Err(end) = self.claim(user).await
        {
            return end;
        }
        let mut socket = match timeout(CONNECT_TIMEOUT, connect(edge)).await {
            Ok(Ok(socket)) => socket,
            Ok(Err(error)) => return End::socket(error),
            Err(_) => return End::socket("connecting took too long"),
        };
        match self.welcome(&mut socket, token).await {
            Ok(welcome) => self.serve(&mut socket, welcome).await,
            Err(end) => end,
        }
    }

    /// The store is this user's, or the session ends.
    async fn claim(&self, user: String) -> Result<(), End> {
        let (reply, answer) = oneshot::channel();
        self.writer.send(WriterCommand::Claim(user, reply)).await.map_err(|_| End::gone())?;
        match answer.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(failed(&error)),
            Err(_) => Err(End::gone()),
        }
    }

    /// Asks the writer; its end is the client's end.
    pub(crate) async fn ask<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<Result<T>>) -> WriterCommand,
    ) -> Result<T, End> {
        let (reply, answer) = oneshot::channel();
        self.writer.send(command(reply)).await.map_err(|_| End::gone())?;
        match answer.await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => Err(failed(&error)),
            Err(_) => Err(End::gone()),
        }
    }

    /// `hello` and `welcome`.
    async fn welcome(&mut self, socket: &mut Socket, token: String) -> Result<Welcome, End> {
        let info = self.ask(WriterCommand::Info).await?;
        self.cut = info.snapshot.as_ref().map_or(0, |(_, staged)| *staged);
        let bytes =
            info.scopes.iter().map(|scope| scope.kind.len() + scope.id.len() + SCOPE_OVERHEAD_BYTES).sum::<usize>();
        // Nobody would take them: their rows come again, compared with those on hand.
        let position = info.position.filter(|_| !info.resync && bytes < MAX_SCOPES_BYTES / 2);
        let mut scopes = if position.is_some() { info.scopes } else { Vec::new() };
        let mut many = if bytes > HELLO_SCOPES_BYTES { std::mem::take(&mut scopes) } else { Vec::new() };
        let hello = ClientFrame::Hello(Hello {
            protocol: PROTOCOL_VERSION,
            client_id: info.client_id,
            token,
            schema: info.schema,
            position,
            scopes,
            scopes_digest: (!many.is_empty()).then(|| ScopesDigest::of(&many)),
            confirmed_seq: info.confirmed_seq,
            snapshot: info.snapshot.as_ref().map(|(mark, _)| mark.clone()),
            // The socket is not read while more waits than the store takes.
            credit: None,
        });
        let text = serde_json::to_string(&hello).map_err(End::socket)?;
        let mut frame = exchange(socket, Some(text)).await?;
        if let ServerFrame::ScopesWanted {} = frame {
            while !many.is_empty() {
                let rest = many.split_off(many.len().min(SCOPES_A_FRAME));
                let scopes = ClientFrame::Scopes { scopes: std::mem::replace(&mut many, rest), last: many.is_empty() };
                let text = serde_json::to_string(&scopes).map_err(End::socket)?;
                timeout(WELCOME_TIMEOUT, socket.send(Message::text(text)))
                    .await
                    .map_err(|_| End::socket("naming the scopes took too long"))?
                    .map_err(End::socket)?;
            }
            frame = exchange(socket, None).await?;
        }
        let mut welcome = match frame {
            ServerFrame::Welcome(welcome) => welcome,
            ServerFrame::Error(error) => return Err(End::error(error)),
            _ => return Err(End::new(Then::Again, "protocol", "the edge sent something before its welcome")),
        };
        self.claim(welcome.user_id.clone()).await?;
        if let Some(schema) = welcome.schema.take() {
            let stale = self.ask(|reply| WriterCommand::Install(Box::new(schema), reply)).await?;
            if stale && (info.position.is_some() && !info.resync || info.snapshot.is_some()) {
                return Err(End::new(Then::Now, "schema", "the schema changed such that a snapshot is needed"));
            }
        }
        let last_seq = welcome.last_seq;
        let (runs, failed) = (std::mem::take(&mut welcome.runs), std::mem::take(&mut welcome.failed));
        let lost = std::mem::take(&mut welcome.lost);
        match self.ask(|reply| WriterCommand::Meet { last_seq, runs, failed, lost, reply }).await? {
            Meeting::Continue | Meeting::WentBack => Ok(welcome),
            Meeting::NewIdentity => Err(End::new(Then::Now, "new_identity", "the store has a new identity")),
        }
    }

    /// The session proper.
    async fn serve(&mut self, socket: &mut Socket, welcome: Welcome) -> End {
        self.welcomed = Some(Instant::now());
        tracing::info!(session.id = %welcome.session, session.resume = ?welcome.resume, ledger.last_seq = welcome.last_seq, "connected");
        self.tell_status(|status| {
            status.state = State::Connected;
            status.reason = None;
            status.user_id = Some(welcome.user_id.clone());
            status.last_error = None;
        });
        let (session, last_seq, window) = (self.link.session + 1, welcome.last_seq, welcome.limits.window);
        let link =
            Link { session, online: true, last_seq, window, sent: last_seq, accepted: last_seq, ..Link::default() };
        self.gap = false;
        if !self.tell(|known| *known = link).await {
            return End::gone();
        }
        let mut links = interval(LINK_INTERVAL);
        links.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut replica = Replica::new(welcome.resume).behind_cut(self.cut);
        let mut performing: Option<Performing> = None;
        // The edge may want to hear from us sooner than we would ping.
        let every =
            PING_INTERVAL.min(Duration::from_millis(welcome.limits.heartbeat_ms / 3).max(Duration::from_secs(1)));
        let silence = SILENCE.min(Duration::from_millis(welcome.limits.heartbeat_ms).max(3 * every));
        let mut ping = interval(every);
        ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut heard = Instant::now();
        loop {
            let reading = replica.ready_bytes() < MAX_READY_BYTES;
            let step = tokio::select! {
                message = socket.next(), if reading => {
                    heard = Instant::now();
                    self.receive(socket, message, &mut replica).await
                }
                frame = self.frames.recv() => match frame {
                    Some(frame) => self.send(socket, frame).await,
                    None => Err(End::gone()),
                },
                applied = performed(&mut performing), if performing.is_some() => {
                    let caught_up = performing.take().is_some_and(|performing| performing.caught_up);
                    let applied = outcome(applied);
                    if applied.is_ok() && caught_up {
                        self.tell_status(|status| status.caught_up = true);
                    }
                    applied
                }
                _ = links.tick() => {
                    // What was asked for again may have been lost again.
                    let gap = u64::from(self.gap);
                    if self.tell(|link| link.losses += gap).await { Ok(()) } else { Err(End::gone()) }
                }
                _ = ping.tick() => {
                    if reading && heard.elapsed() > silence {
                        Err(End::new(Then::Again, "silent", "the edge was silent for too long"))
                    } else {
                        if !reading {
                            // We do not listen: silence means nothing.
                            heard = Instant::now();
                        }
                        flush(socket, [Message::Ping(Default::default())]).await
                    }
                }
            };
            if let Err(end) = step {
                if end.of_the_connection() {
                    self.keep(performing, replica.take()).await;
                }
                return end;
            }
            if performing.is_none() {
                let works = replica.take();
                if !works.is_empty() {
                    performing = match self.perform(works).await {
                        Ok(started) => Some(started),
                        Err(end) => return end,
                    };
                }
            }
            let now = (replica.in_snapshot(), replica.download());
            self.status.send_if_modified(|status| {
                let before = (status.downloading, status.download);
                (status.downloading, status.download) = now;
                before != now
            });
        }
    }

    /// Applies what had come whole before the connection broke, so that no connection, however short, is for nothing.
    async fn keep(&self, performing: Option<Performing>, works: Vec<Work>) {
        let mut earlier = performing;
        if let Ok(()) = if earlier.is_some() { outcome(performed(&mut earlier).await) } else { Ok(()) }
            && !works.is_empty()
            && let Ok(last) = self.perform(works).await
        {
            // If it fails, the next session begins before it, and finds out why.
            let _ = performed(&mut Some(last)).await;
        }
    }

    /// Takes a message, and those that are there already: what is ready together is applied together.
    async fn receive(
        &mut self,
        socket: &mut Socket,
        first: Option<Result<Message, tungstenite::Error>>,
        replica: &mut Replica,
    ) -> Result<(), End> {
        let mut message = first;
        for taken in 1.. {
            match message {
                Some(Ok(Message::Text(text))) => {
                    if let Some(frame) = replica.handle(decode(&text)?, text.len())? {
                        self.handle(frame).await?;
                    }
                }
                Some(Ok(Message::Close(frame))) => return Err(closed_by(frame)),
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(End::socket(error)),
                None => return Err(End::socket("the edge closed the connection")),
            }
            if taken == DRAIN || replica.ready_bytes() >= MAX_READY_BYTES {
                break;
            }
            message = match socket.next().now_or_never() {
                Some(message) => message,
                None => break,
            };
        }
        Ok(())
    }

    async fn handle(&mut self, frame: ServerFrame) -> Result<(), End> {
        let told = match frame {
            ServerFrame::Accepted { client_seq } => {
                self.tell(|link| link.accepted = link.accepted.max(client_seq)).await
            }
            // A hint that may be lost: nothing depends on it.
            ServerFrame::Results { .. } => return Ok(()),
            ServerFrame::Error(error) if error.fatal || wants_token(error.code) => return Err(End::error(error)),
            ServerFrame::Error(error) => {
                tracing::warn!(error.code = %error.code, error.message = %error.message, client.seq = error.client_seq, "the edge refused a submission");
                self.status.send_modify(|status| {
                    status.last_error =
                        Some(LastError { code: error.code.to_string(), message: error.message.clone() });
                });
                self.tell(|link| {
                    link.refusals += 1;
                    let wait = error.retry_after_ms.map(|wait| Duration::from_millis(wait.min(RETRY_AFTER_CAP_MS)));
                    link.not_before = link.not_before.max(wait.map(|wait| Instant::now() + wait));
                })
                .await
            }
            _ => return Err(End::new(Then::Again, "protocol", "the edge sent a frame out of place")),
        };
        if told { Ok(()) } else { Err(End::gone()) }
    }

    async fn send(&mut self, socket: &mut Socket, first: ToSync) -> Result<(), End> {
        let mut frames = Vec::new();
        let mut frame = Some(first);
        while let Some(ToSync { session, confirmed, entry }) = frame {
            // The outbox heard of the new session only after it had made frames for the old one.
            if session == self.link.session {
                if entry.client_seq <= self.link.sent.max(self.link.accepted).max(confirmed) + 1 {
                    self.link.sent = entry.client_seq;
                    self.gap = false;
                    frames.push(Message::text(entry.text));
                } else if !std::mem::replace(&mut self.gap, true) {
                    // The bus lost one before it: the edge would refuse this and all that follow.
                    self.link.losses += 1;
                }
            }
            frame = self.frames.try_recv().ok();
        }
        if self.gap && !self.tell(|_| ()).await {
            return Err(End::gone());
        }
        flush(socket, frames).await
    }

    async fn perform(&self, works: Vec<Work>) -> Result<Performing, End> {
        let spans = match &self.apply_span {
            None => Vec::new(),
            Some(span) => {
                let applies =
                    works.iter().filter_map(|work| if let Work::Apply(batch) = work { Some(batch) } else { None });
                applies.flat_map(|batch| &batch.traceparents).map(|parent| span(Some(parent))).collect()
            }
        };
        let caught_up = works.iter().any(|work| matches!(work, Work::Apply(batch) if batch.caught_up));
        let (reply, answer) = oneshot::channel();
        self.writer.send(WriterCommand::Perform(works, reply)).await.map_err(|_| End::gone())?;
        Ok(Performing { answer, caught_up, _spans: spans })
    }
}

/// Sends a text, if there is one, and waits for the next frame.
async fn exchange(socket: &mut Socket, text: Option<String>) -> Result<ServerFrame, End> {
    let exchange = async {
        if let Some(text) = text {
            socket.send(Message::text(text)).await.map_err(End::socket)?;
        }
        loop {
            match socket.next().await {
                Some(Ok(Message::Text(text))) => return decode(&text),
                Some(Ok(Message::Close(frame))) => return Err(closed_by(frame)),
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(End::socket(error)),
                None => return Err(End::socket("the edge closed the connection")),
            }
        }
    };
    timeout(WELCOME_TIMEOUT, exchange).await.map_err(|_| End::socket("no welcome came in time"))?
}

/// The store refused something or failed: what cannot heal by itself is told as an error, not as being offline.
fn failed(error: &Error) -> End {
    match error {
        _ if error.is_retryable() => End::new(Then::Again, STORE, chain(error)),
        Error::Store(StoreError::Foreign { .. }) => End::new(Then::Refused, error.code(), error.to_string()),
        _ => End::new(Then::Refused, error.code(), chain(error)),
    }
}

/// What the session does about a batch that the writer applied, or did not.
fn outcome(applied: Option<Result<()>>) -> Result<(), End> {
    match applied {
        Some(Ok(())) => Ok(()),
        // The next welcome tells which transactions were the copy's.
        Some(Err(Error::Store(error @ StoreError::Copied))) => Err(End::new(Then::Again, "copied", error.to_string())),
        // Nothing of the batch was applied, nor its position taken: the next session starts before it. Where the batch
        // itself is at fault it would fail again, so that one starts with a snapshot.
        Some(Err(error)) => {
            let then = if error.is_retryable() { Then::Again } else { Then::Snapshot };
            Err(End::new(then, STORE, chain(&error)))
        }
        None => Err(End::gone()),
    }
}

/// A batch at the writer, with the spans that last until it is applied.
struct Performing {
    answer: oneshot::Receiver<Result<()>>,
    /// With it, the store has everything that was committed before the session began.
    caught_up: bool,
    _spans: Vec<tracing::Span>,
}

async fn performed(performing: &mut Option<Performing>) -> Option<Result<()>> {
    match performing {
        Some(performing) => (&mut performing.answer).await.ok(),
        None => std::future::pending().await,
    }
}
