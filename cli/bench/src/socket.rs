//! Bare WebSockets to an edge: what clients receive, without a client behind it.

use std::time::Duration;

use futures_util::{SinkExt as _, StreamExt as _};
use millstream_schemas::PROTOCOL_VERSION;
use millstream_schemas::frame::{ClientFrame, Hello};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::{Message, Utf8Bytes};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};
use uuid::Uuid;

use crate::error::Error;

/// How long the next frame may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// A WebSocket.
pub struct Socket(WebSocketStream<MaybeTlsStream<TcpStream>>);

impl Socket {
    /// Connects.
    pub async fn connect(url: &str) -> Result<Socket, Error> {
        let connected = connect_async(url).await;
        Ok(Socket(connected.map_err(|error| Error::Late(format!("a socket cannot connect: {error}")))?.0))
    }

    /// Connects as a new client that has nothing, and says so.
    pub async fn hello(url: &str, token: String) -> Result<Socket, Error> {
        let mut socket = Socket::connect(url).await?;
        let hello = ClientFrame::Hello(Hello {
            protocol: PROTOCOL_VERSION,
            client_id: Uuid::now_v7(),
            token,
            schema: None,
            position: None,
            scopes: Vec::new(),
            scopes_digest: None,
            confirmed_seq: 0,
            snapshot: None,
            credit: None,
        });
        socket.send(serde_json::to_string(&hello).unwrap_or_default()).await?;
        Ok(socket)
    }

    /// Sends a text.
    pub async fn send(&mut self, text: impl Into<Utf8Bytes>) -> Result<(), Error> {
        self.0.send(Message::Text(text.into())).await.map_err(|error| Error::Late(format!("a socket: {error}")))
    }

    /// The next text.
    pub async fn next(&mut self) -> Result<Utf8Bytes, Error> {
        loop {
            match tokio::time::timeout(PATIENCE, self.0.next()).await {
                Ok(Some(Ok(Message::Text(text)))) => return Ok(text),
                Ok(Some(Ok(Message::Ping(_) | Message::Pong(_)))) => {}
                Ok(other) => return Err(Error::Late(format!("a socket ended: {other:?}"))),
                Err(_) => return Err(Error::Late(format!("a socket heard nothing for {PATIENCE:?}"))),
            }
        }
    }

    /// Reads up to the end of the first snapshot; returns the bytes of its frames, and how many rows came.
    pub async fn snapshot(&mut self) -> Result<(u64, u64), Error> {
        let (mut bytes, mut rows) = (0, 0);
        loop {
            let text = self.next().await?;
            bytes += text.len() as u64;
            if text.starts_with(r#"{"type":"snapshot_rows""#) {
                // Between rows, and nowhere within one: a quote in a value is escaped.
                rows += 1 + text.matches("],[").count() as u64;
            } else if text.starts_with(r#"{"type":"snapshot_end""#) {
                return Ok((bytes, rows));
            } else if text.starts_with(r#"{"type":"error""#) {
                return Err(Error::Late(format!("the edge refuses: {text}")));
            }
        }
    }
}
