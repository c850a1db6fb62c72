//! The socket of a session. Long texts go out in fragments (RFC 6455, 5.4), so that the buffer that a socket keeps for its
//! life stays small whatever has passed through it.

use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use bytes::Bytes;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use millstream_schemas::frame::{MAX_FRAME_BYTES, ServerFrame};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::server::create_response_with_body;
use tokio_tungstenite::tungstenite::protocol::frame::coding::{CloseCode, Data, OpCode};
use tokio_tungstenite::tungstenite::protocol::frame::{CloseFrame, Frame};
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};
pub use tokio_tungstenite::tungstenite::{Error as SocketError, Message as Socket};

use super::{End, SEND_TIMEOUT, SIGN_OF_LIFE};
use crate::downlink::Out;

/// Largest message that is read off a socket before the session can refuse it politely.
const HARD_FRAME_BYTES: usize = 2 * MAX_FRAME_BYTES;
/// An idle socket keeps this much for reading; the library's default is 128 KiB.
const READ_BUFFER: usize = 4096;
/// Longest fragment, and how much may wait to be written with the next: an idle socket keeps the sum of both.
const FRAGMENT: usize = 8 * 1024;

/// A WebSocket.
pub type WebSocket = WebSocketStream<TokioIo<Upgraded>>;

/// Answers a request for a WebSocket; none if it is none. `serve` gets the socket once the answer is on its way.
pub fn upgrade<F>(request: Request, serve: impl FnOnce(WebSocket) -> F + Send + 'static) -> Option<Response>
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
            serve(WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Server, Some(config)).await).await;
        }
    });
    Some(response)
}

/// The sending half, which cuts clients that take nothing.
pub struct Wire {
    sink: SplitSink<WebSocket, Socket>,
}

impl Wire {
    /// Both halves of a socket.
    pub fn new(socket: WebSocket) -> (Wire, SplitStream<WebSocket>) {
        let (sink, stream) = socket.split();
        (Wire { sink }, stream)
    }

    /// Sends frames in order.
    pub async fn send(&mut self, out: &[Out]) -> Result<(), End> {
        for frame in out {
            match frame {
                Out::Shared(text) => self.text(text.clone().into()).await?,
                // Our own types always encode.
                Out::Own(frame) => self.text(serde_json::to_vec(frame).unwrap_or_default().into()).await?,
            }
        }
        within(self.sink.flush()).await
    }

    async fn text(&mut self, text: Bytes) -> Result<(), End> {
        let mut rest = text;
        let mut data = Data::Text;
        loop {
            let part = rest.split_to(rest.len().min(FRAGMENT));
            let fragment = Frame::message(part, OpCode::Data(data), rest.is_empty());
            within(self.sink.feed(Socket::Frame(fragment))).await?;
            if rest.is_empty() {
                return Ok(());
            }
            data = Data::Continue;
        }
    }

    /// Waits for something that may take long, with a sign of life for the client now and then.
    pub async fn alive<T>(&mut self, waited: impl Future<Output = T>) -> Result<T, End> {
        let mut waited = std::pin::pin!(waited);
        loop {
            match tokio::time::timeout(SIGN_OF_LIFE, &mut waited).await {
                Ok(done) => return Ok(done),
                Err(_) => self.ping().await?,
            }
        }
    }

    /// Asks for a sign of life.
    pub async fn ping(&mut self) -> Result<(), End> {
        within(self.sink.send(Socket::Ping(Bytes::new()))).await
    }

    /// Sends a frame.
    pub async fn own(&mut self, frame: ServerFrame) -> Result<(), End> {
        self.send(&[Out::Own(frame)]).await
    }

    /// Says goodbye.
    pub async fn close(&mut self, code: CloseCode, reason: &str) -> Result<(), End> {
        within(self.sink.send(Socket::Close(Some(CloseFrame { code, reason: reason.into() })))).await
    }
}

async fn within(sending: impl Future<Output = Result<(), SocketError>>) -> Result<(), End> {
    const LIMIT: Duration = SEND_TIMEOUT;
    tokio::time::timeout(LIMIT, sending).await.map_err(|_| End::Gone)?.map_err(|_| End::Gone)
}
