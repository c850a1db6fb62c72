//! The socket, and why a session on it ended.

use std::time::Duration;

use futures_util::SinkExt;
use millstream_client_core::replica::ProtocolError;
use millstream_schemas::frame::{ErrorFrame, MAX_FRAME_BYTES, ServerFrame};
use millstream_schemas::{Code, Retry};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{self, Message};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async_tls_with_config};

use crate::Result;

/// For a write to the socket to be taken.
const SEND_TIMEOUT: Duration = Duration::from_secs(30);
/// Largest message that is read, in bytes. Edges send frames of [`MAX_FRAME_BYTES`] and a little more for what is around them.
const MAX_READ_BYTES: usize = 32 * MAX_FRAME_BYTES;

pub(crate) type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

/// Why a session ended.
#[derive(Debug)]
pub(crate) struct End {
    pub then: Then,
    pub code: String,
    pub message: String,
    pub retry_after_ms: Option<u64>,
}

/// What follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Then {
    /// Connect again with back-off.
    Again,
    /// Connect again with back-off, for a snapshot.
    Snapshot,
    /// Connect again now: the store changed what it says in `hello`.
    Now,
    /// Connect again with another token.
    Auth,
    /// The edge will not have this client as it is; ask again now and then.
    Refused,
    /// The app wanted it.
    Interrupted,
    /// The client is gone.
    Gone,
}

impl End {
    pub fn new(then: Then, code: &str, message: impl Into<String>) -> End {
        End { then, code: code.to_owned(), message: message.into(), retry_after_ms: None }
    }

    pub fn socket(message: impl std::fmt::Display) -> End {
        End::new(Then::Again, "socket", message.to_string())
    }

    /// The connection broke; what had come by it is as good as ever.
    pub fn of_the_connection(&self) -> bool {
        self.then == Then::Again && matches!(self.code.as_str(), "socket" | "silent")
    }

    pub fn gone() -> End {
        End::new(Then::Gone, "closed", "the client is closed")
    }

    pub fn error(frame: ErrorFrame) -> End {
        let then = match (frame.code, frame.code.retry()) {
            (code, _) if wants_token(code) => Then::Auth,
            (Code::EpochChanged, _) => Then::Snapshot,
            (_, Retry::Automatic) => Then::Again,
            (_, Retry::Manual | Retry::Never) => Then::Refused,
        };
        End { then, code: frame.code.to_string(), message: frame.message, retry_after_ms: frame.retry_after_ms }
    }
}

/// Whether another token is the remedy.
pub(crate) fn wants_token(code: Code) -> bool {
    matches!(code, Code::BadToken | Code::TokenExpired | Code::NeedsAuth)
}

impl From<ProtocolError> for End {
    fn from(error: ProtocolError) -> End {
        End::new(Then::Again, "protocol", error.to_string())
    }
}

/// Connects, TLS included.
pub(crate) async fn connect(edge: &str) -> Result<Socket, tungstenite::Error> {
    if edge.starts_with("wss:") {
        // Fails if the app chose a provider already: then that one is used.
        let _ = rustls::crypto::ring::default_provider().install_default();
    }
    let config = WebSocketConfig::default().max_message_size(Some(MAX_READ_BYTES)).max_frame_size(Some(MAX_READ_BYTES));
    // Without Nagle's algorithm: a frame must not wait for the acknowledgement of the one before.
    connect_async_tls_with_config(edge, Some(config), true, None).await.map(|(socket, _)| socket)
}

/// Sends.
pub(crate) async fn flush(socket: &mut Socket, messages: impl IntoIterator<Item = Message>) -> Result<(), End> {
    let sending = async {
        for message in messages {
            socket.feed(message).await?;
        }
        socket.flush().await
    };
    match timeout(SEND_TIMEOUT, sending).await {
        Ok(result) => result.map_err(End::socket),
        Err(_) => Err(End::socket("the edge takes nothing")),
    }
}

/// Reads a frame.
pub(crate) fn decode(text: &str) -> Result<ServerFrame, End> {
    serde_json::from_str(text)
        .map_err(|error| End::new(Then::Again, "protocol", format!("a frame does not read: {error}")))
}

/// The edge closed the socket.
pub(crate) fn closed_by(frame: Option<tungstenite::protocol::CloseFrame>) -> End {
    match frame {
        Some(frame) => End::socket(format_args!("the edge closed the connection: {} {}", frame.code, frame.reason)),
        None => End::socket("the edge closed the connection"),
    }
}
