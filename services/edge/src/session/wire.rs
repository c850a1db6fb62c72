//! The socket of a session. Long texts go out in fragments (RFC 6455, 5.4), so that the buffer that a socket keeps for its
//! life stays small whatever has passed through it. While the client does not take what is sent, the socket is still read:
//! pings are answered, and what the client says waits in a bounded inbox. What a client says about the socket itself (`taken`,
//! `ping`) never waits there.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::num::NonZeroU32;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use bytes::Bytes;
use futures_util::stream::{SelectAll, SplitSink, SplitStream, select_all};
use futures_util::{SinkExt, StreamExt};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use millstream_schemas::Code;
use millstream_schemas::frame::{ClientFrame, MAX_FRAME_BYTES, MAX_HELLO_BYTES, ServerFrame};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::server::create_response_with_body;
use tokio_tungstenite::tungstenite::protocol::frame::coding::{CloseCode, Data, OpCode};
use tokio_tungstenite::tungstenite::protocol::frame::{CloseFrame, Frame};
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};
pub use tokio_tungstenite::tungstenite::{Error as SocketError, Message as Socket};

use super::end::End;
use crate::downlink::Out;
use crate::shares::USER_UNSENT_KIB;

/// Largest message that is read off a socket before the session can refuse it politely.
const HARD_FRAME_BYTES: usize = MAX_FRAME_BYTES + 128 * 1024;
/// Most bytes that are read off a socket before its client has shown who it is: a hello and some control frames.
const STRANGER_BYTES: usize = MAX_HELLO_BYTES + 16 * 1024;
/// An idle socket keeps this much for reading; the library's default is 128 KiB.
const READ_BUFFER: usize = 4096;
/// Longest fragment, and how much may wait to be written with the next: an idle socket keeps the sum of both.
const FRAGMENT: usize = 8 * 1024;
/// Most bytes and frames of the client that wait while it is sent something. The socket is not read beyond.
const INBOX_BYTES: usize = 256 * 1024;
const INBOX_FRAMES: usize = 256;
/// What waits for slow clients, of all sessions of an edge together and besides what the ring keeps, in KiB. A client that would
/// add to it is cut.
pub const UNSENT_KIB: usize = 96 * 1024;
/// What may wait for any client, in KiB.
const ALLOWANCE_KIB: usize = 256;

/// Longer texts are not about the socket.
const ASIDE_BYTES: usize = 128;
/// The client must be heard within this time.
pub const HEARTBEAT: Duration = Duration::from_secs(45);
/// Pings to the client, and checks of its heartbeat.
pub const PING_INTERVAL: Duration = Duration::from_secs(15);
/// While the client waits for us, it hears from us this often.
const SIGN_OF_LIFE: Duration = Duration::from_secs(10);
/// A client that takes not one frame in this time is cut.
const SEND_TIMEOUT: Duration = Duration::from_secs(30);

/// A WebSocket.
pub type WebSocket = WebSocketStream<Guarded>;

/// A connection of which only so much is read until its client is known.
pub struct Guarded {
    io: TokioIo<Upgraded>,
    left: Arc<AtomicUsize>,
}

impl AsyncRead for Guarded {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.io).poll_read(cx, buffer))?;
        let left = self.left.load(Ordering::Relaxed);
        if left != usize::MAX {
            let Some(left) = left.checked_sub(buffer.filled().len() - before) else {
                return Poll::Ready(Err(std::io::Error::other("too much before hello")));
            };
            self.left.store(left, Ordering::Relaxed);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Guarded {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

/// Answers a request for a WebSocket; none if it is none. `serve` gets the socket once the answer is on its way.
pub fn upgrade<F>(
    request: Request,
    unsent: Arc<Semaphore>,
    serve: impl FnOnce(Wire) -> F + Send + 'static,
) -> Option<Response>
where
    F: Future<Output = ()> + Send,
{
    let (mut parts, _) = request.into_parts();
    let upgrade = parts.extensions.remove::<OnUpgrade>()?;
    let request = axum::http::Request::from_parts(parts, ());
    let response = create_response_with_body(&request, Body::empty).ok()?;
    let config = WebSocketConfig::default()
        .read_buffer_size(READ_BUFFER)
        .write_buffer_size(FRAGMENT)
        .max_frame_size(Some(HARD_FRAME_BYTES))
        .max_message_size(Some(HARD_FRAME_BYTES));
    tokio::spawn(async move {
        // An error: the client went away before it got the answer.
        if let Ok(upgraded) = upgrade.await {
            let left = Arc::new(AtomicUsize::new(STRANGER_BYTES));
            let io = Guarded { io: TokioIo::new(upgraded), left: left.clone() };
            let socket = WebSocketStream::from_raw_socket(io, Role::Server, Some(config)).await;
            serve(Wire::new(socket, left, unsent)).await;
        }
    });
    Some(response)
}

/// Room that is taken, of the user's and the edge's.
pub type Room = [Option<OwnedSemaphorePermit>; 2];

/// A socket, which cuts clients that take nothing.
pub struct Wire {
    sink: SplitSink<WebSocket, Socket>,
    /// A set of one: it looks at the socket only when that has called, not with each delivery.
    stream: SelectAll<SplitStream<WebSocket>>,
    /// What the client said while it was sent something.
    inbox: VecDeque<Socket>,
    inbox_bytes: usize,
    /// When the client was heard last.
    pub heard: Instant,
    /// How much of a stranger is read.
    left: Arc<AtomicUsize>,
    /// Room for what waits for slow clients, and the user's.
    unsent: Arc<Semaphore>,
    own: Option<Arc<Semaphore>>,
    /// What is sent is in the ring.
    pub is_live: bool,
    /// The last fragment of a text has not been sent.
    is_within_text: bool,
    /// How far rows may be ahead of what the client has taken, in bytes; what was sent in texts, and what it has taken of that.
    credit: Option<NonZeroU32>,
    sent: u64,
    taken: u64,
    /// The client has asked for a `pong`.
    is_asked: bool,
}

impl Wire {
    fn new(socket: WebSocket, left: Arc<AtomicUsize>, unsent: Arc<Semaphore>) -> Wire {
        let (sink, stream) = socket.split();
        Wire {
            sink,
            stream: select_all([stream]),
            inbox: VecDeque::new(),
            inbox_bytes: 0,
            heard: Instant::now(),
            left,
            unsent,
            own: None,
            is_live: false,
            is_within_text: false,
            credit: None,
            sent: 0,
            taken: 0,
            is_asked: false,
        }
    }

    /// Its client has shown who it is; `own` is the room for what waits for all clients of this user, in KiB, and `credit` how far rows
    /// may be ahead of what the client has taken.
    pub fn trust(&mut self, own: Arc<Semaphore>, credit: Option<NonZeroU32>) {
        self.left.store(usize::MAX, Ordering::Relaxed);
        self.own = Some(own);
        self.credit = credit;
    }

    /// Whether the client's credit allows for more rows.
    pub fn has_credit(&self) -> bool {
        self.credit.is_none_or(|credit| self.sent - self.taken < u64::from(credit.get()))
    }

    /// Whether another frame can be sent: not so if sending one was given up half-way.
    pub fn is_whole(&self) -> bool {
        !self.is_within_text
    }

    /// The next that the client says. May be dropped and called again without losing anything.
    pub async fn next(&mut self) -> Option<Result<Socket, SocketError>> {
        if let Some(message) = self.inbox.pop_front() {
            self.inbox_bytes -= message.len();
            return Some(Ok(message));
        }
        let message = self.stream.next().await;
        self.heard = Instant::now();
        match message {
            // A sign of life like those that WebSockets have.
            Some(Ok(Socket::Text(text))) if self.is_aside(&text) => Some(Ok(Socket::Pong(Bytes::new()))),
            other => other,
        }
    }

    /// Takes note of what is about the socket itself. False: it is something else, or says that more was taken than sent.
    fn is_aside(&mut self, text: &str) -> bool {
        if self.own.is_none() || text.len() > ASIDE_BYTES {
            return false;
        }
        match serde_json::from_str(text) {
            Ok(ClientFrame::Taken { bytes }) if bytes <= self.sent => self.taken = self.taken.max(bytes),
            Ok(ClientFrame::Ping {}) => self.is_asked = true,
            _ => return false,
        }
        true
    }

    /// Reads what the client says into the inbox, as long as there is room.
    fn listen(&mut self, cx: &mut Context<'_>) -> Result<(), End> {
        while self.inbox.len() < INBOX_FRAMES && self.inbox_bytes < INBOX_BYTES {
            match self.stream.poll_next_unpin(cx) {
                Poll::Pending => return Ok(()),
                Poll::Ready(Some(Ok(Socket::Ping(_) | Socket::Pong(_)))) => self.heard = Instant::now(),
                Poll::Ready(Some(Ok(Socket::Text(text)))) if self.is_aside(&text) => self.heard = Instant::now(),
                Poll::Ready(Some(Ok(message @ (Socket::Text(_) | Socket::Binary(_))))) => {
                    self.heard = Instant::now();
                    self.inbox_bytes += message.len();
                    self.inbox.push_back(message);
                }
                Poll::Ready(Some(Ok(Socket::Close(_) | Socket::Frame(_)) | Err(_)) | None) => return Err(End::Gone),
            }
        }
        Ok(())
    }

    /// Sends frames in order.
    pub async fn send(&mut self, out: &[Out]) -> Result<(), End> {
        let mut room = None;
        self.pong().await?;
        for (index, frame) in out.iter().enumerate() {
            let text = match frame {
                Out::Shared(text) => text.clone().into(),
                // Our own types always encode.
                Out::Own(frame) => serde_json::to_vec(frame).unwrap_or_default().into(),
            };
            self.text(text, &out[index..], &mut room).await?;
            self.pong().await?;
        }
        self.wait(|sink, cx| sink.poll_flush_unpin(cx)).await
    }

    /// Sends what the client's credit allows for, at least one frame; gives how many those are.
    pub async fn send_some(&mut self, out: &[Out]) -> Result<usize, End> {
        let Some(credit) = self.credit else { return self.send(out).await.map(|()| out.len()) };
        let mut ahead = self.sent - self.taken;
        let fits = |frame: &&Out| {
            let before = ahead;
            ahead += weight(frame) as u64;
            before < u64::from(credit.get())
        };
        let count = out.iter().take_while(fits).count().max(1);
        self.send(&out[..count]).await.map(|()| count)
    }

    /// Answers a `ping`, if there was one.
    pub async fn answer(&mut self) -> Result<(), End> {
        if self.is_asked { self.send(&[]).await } else { Ok(()) }
    }

    /// The answer to a `ping`, between other texts.
    async fn pong(&mut self) -> Result<(), End> {
        if !std::mem::take(&mut self.is_asked) {
            return Ok(());
        }
        let text = serde_json::to_vec(&ServerFrame::Pong {}).unwrap_or_default();
        self.text(text.into(), &[], &mut None).await
    }

    async fn text(&mut self, text: Bytes, rest: &[Out], room: &mut Option<Room>) -> Result<(), End> {
        self.sent += text.len() as u64;
        let mut left = text;
        let mut data = Data::Text;
        loop {
            let part = left.split_to(left.len().min(FRAGMENT));
            let fragment = Frame::message(part, OpCode::Data(data), left.is_empty());
            match poll_fn(|cx| Poll::Ready(self.sink.poll_ready_unpin(cx))).await {
                Poll::Ready(ready) => ready.map_err(|_| End::Gone)?,
                Poll::Pending => {
                    if room.is_none() {
                        *room = Some(self.room(rest)?);
                    }
                    self.wait(|sink, cx| sink.poll_ready_unpin(cx)).await?;
                }
            }
            self.sink.start_send_unpin(Socket::Frame(fragment)).map_err(|_| End::Gone)?;
            self.is_within_text = !left.is_empty();
            if left.is_empty() {
                return Ok(());
            }
            data = Data::Continue;
        }
    }

    /// Room for frames that the client does not take yet.
    pub fn room(&self, frames: &[Out]) -> Result<Room, End> {
        self.room_for(frames.iter().map(weight).sum::<usize>().div_ceil(1024).saturating_sub(ALLOWANCE_KIB))
    }

    /// Takes `kib` KiB of room, of the user's and of the edge's.
    pub fn room_for(&self, kib: usize) -> Result<Room, End> {
        let take = |room: &Arc<Semaphore>, most: usize| {
            let room = room.clone().try_acquire_many_owned(u32::try_from(kib.min(most)).unwrap_or(u32::MAX));
            room.map_err(|_| End::retry(Code::SlowConsumer, "too much waits for slow clients; connect again to go on"))
        };
        let own = self.own.as_ref().map(|own| take(own, USER_UNSENT_KIB)).transpose()?;
        let all = if self.is_live { None } else { Some(take(&self.unsent, UNSENT_KIB)?) };
        Ok([own, all])
    }

    /// Waits for the socket to take something, and listens meanwhile.
    async fn wait(
        &mut self,
        mut poll: impl FnMut(&mut SplitSink<WebSocket, Socket>, &mut Context<'_>) -> Poll<Result<(), SocketError>>,
    ) -> Result<(), End> {
        let sending = poll_fn(|cx| match poll(&mut self.sink, cx) {
            Poll::Ready(sent) => Poll::Ready(sent.map_err(|_| End::Gone)),
            Poll::Pending => match self.listen(cx) {
                Ok(()) => Poll::Pending,
                Err(end) => Poll::Ready(Err(end)),
            },
        });
        tokio::time::timeout(SEND_TIMEOUT, sending).await.map_err(|_| End::Gone)?
    }

    /// Waits for something that may take long, with a sign of life for the client now and then; listens meanwhile.
    pub async fn alive<T>(&mut self, waited: impl Future<Output = T>) -> Result<T, End> {
        let mut waited = std::pin::pin!(waited);
        loop {
            let either = poll_fn(|cx| match waited.as_mut().poll(cx) {
                Poll::Ready(done) => Poll::Ready(Ok(Some(done))),
                Poll::Pending => match self.listen(cx) {
                    // Not to wait for the client instead.
                    Ok(()) if self.is_asked && self.sink.poll_ready_unpin(cx).is_ready() => Poll::Ready(Ok(None)),
                    Ok(()) => Poll::Pending,
                    Err(end) => Poll::Ready(Err(end)),
                },
            });
            match tokio::time::timeout(SIGN_OF_LIFE, either).await {
                Ok(Ok(Some(done))) => return Ok(done),
                Ok(Ok(None)) => {
                    self.pong().await?;
                    poll_fn(|cx| Poll::Ready(self.sink.poll_flush_unpin(cx).is_ready())).await;
                }
                Ok(Err(end)) => return Err(end),
                // One that does not see pings may have asked behind a full inbox.
                Err(_) if self.credit.is_some() => self.is_asked = true,
                Err(_) => self.ping().await?,
            }
        }
    }

    /// Asks for a sign of life, unless the last one is too long ago.
    pub async fn beat(&mut self) -> Result<(), End> {
        if self.heard.elapsed() > HEARTBEAT {
            return Err(End::retry(Code::HeartbeatTimeout, "nothing was heard from the client for 45 s"));
        }
        self.ping().await
    }

    async fn ping(&mut self) -> Result<(), End> {
        self.control(Socket::Ping(Bytes::new())).await
    }

    async fn control(&mut self, message: Socket) -> Result<(), End> {
        self.wait(|sink, cx| sink.poll_ready_unpin(cx)).await?;
        self.sink.start_send_unpin(message).map_err(|_| End::Gone)?;
        self.wait(|sink, cx| sink.poll_flush_unpin(cx)).await
    }

    /// Sends a frame.
    pub async fn own(&mut self, frame: ServerFrame) -> Result<(), End> {
        self.send(&[Out::Own(frame)]).await
    }

    /// Says goodbye.
    pub async fn close(&mut self, code: CloseCode, reason: &str) -> Result<(), End> {
        self.control(Socket::Close(Some(CloseFrame { code, reason: reason.into() }))).await
    }
}

/// What a frame takes in memory beyond its session's own.
fn weight(frame: &Out) -> usize {
    match frame {
        Out::Shared(text) => text.len(),
        Out::Own(_) => 0,
    }
}
