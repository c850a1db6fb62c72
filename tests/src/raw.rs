//! A client that speaks the wire by hand, to send what the SDK never would.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use futures_util::{SinkExt, StreamExt};
use millstream_schemas::frame::ServerFrame;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};
use uuid::Uuid;

/// A bare WebSocket to an edge.
pub struct Raw {
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
}

impl Raw {
    /// Connects, and says nothing.
    ///
    /// # Errors
    /// The edge is not there.
    pub async fn connect(url: &str) -> Result<Raw> {
        Ok(Raw { socket: connect_async(url).await?.0 })
    }

    /// Sends a text.
    ///
    /// # Errors
    /// The socket is closed.
    pub async fn text(&mut self, text: impl Into<String>) -> Result<()> {
        Ok(self.socket.send(Message::text(text.into())).await?)
    }

    /// Sends a binary message.
    ///
    /// # Errors
    /// The socket is closed.
    pub async fn binary(&mut self, bytes: Vec<u8>) -> Result<()> {
        Ok(self.socket.send(Message::binary(bytes)).await?)
    }

    /// Sends a frame.
    ///
    /// # Errors
    /// The socket is closed.
    pub async fn frame(&mut self, frame: Value) -> Result<()> {
        self.text(frame.to_string()).await
    }

    /// The next frame, as text; none when the edge closed.
    ///
    /// # Errors
    /// Nothing comes for 10 s.
    pub async fn next_text(&mut self) -> Result<Option<String>> {
        loop {
            let next = tokio::time::timeout(Duration::from_secs(10), self.socket.next());
            match next.await.context("no frame for 10 s")? {
                Some(Ok(Message::Text(text))) => return Ok(Some(text.to_string())),
                Some(Ok(Message::Close(_)) | Err(_)) | None => return Ok(None),
                Some(Ok(_)) => {}
            }
        }
    }

    /// The next frame that `pick` wants.
    ///
    /// # Errors
    /// The edge closed, nothing comes for 10 s, or a frame is not of the protocol.
    pub async fn wait<T>(&mut self, mut pick: impl FnMut(ServerFrame) -> Option<T>) -> Result<T> {
        loop {
            let Some(text) = self.next_text().await? else { bail!("the edge closed the socket") };
            let frame = serde_json::from_str(&text).with_context(|| format!("not a frame: {text}"))?;
            if let Some(found) = pick(frame) {
                return Ok(found);
            }
        }
    }

    /// The code of the next error frame.
    ///
    /// # Errors
    /// As [`Raw::wait`].
    pub async fn error(&mut self) -> Result<String> {
        self.wait(|frame| match frame {
            ServerFrame::Error(error) => Some(error.code.as_str().to_owned()),
            _ => None,
        })
        .await
    }

    /// Says hello as a new client.
    ///
    /// # Errors
    /// The edge does not welcome it.
    pub async fn hello(&mut self, client_id: Uuid, token: &str) -> Result<()> {
        self.frame(hello(client_id, token)).await?;
        self.wait(|frame| matches!(frame, ServerFrame::Welcome(_)).then_some(())).await
    }
}

/// A new client's `hello`.
pub fn hello(client_id: Uuid, token: &str) -> Value {
    json!({"type": "hello", "protocol": millstream_schemas::PROTOCOL_VERSION, "client_id": client_id,
        "token": token, "confirmed_seq": 0})
}

/// A `submit` of one insert.
pub fn submit(client_seq: u64, table: &str, columns: &[&str], values: &[&str]) -> Value {
    json!({"type": "submit", "client_seq": client_seq, "attempt": 1, "run_id": Uuid::nil(), "changes": [{"change_id": Uuid::now_v7(), "table": table,
        "op": "insert", "key": [values.first()], "columns": columns, "values": values, "stamp": 1}]})
}
