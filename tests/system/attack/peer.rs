//! A client that speaks the wire by hand, honestly or not: it says any frame, reads as slowly as it likes, or not at all, and
//! keeps every canary that it is sent.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use futures_util::{SinkExt, StreamExt};
use millstream_schemas::frame::{ErrorFrame, Resume, ServerFrame, SnapshotMark, Welcome};
use millstream_schemas::{Position, Scope, TableChanges, TableOp};
use millstream_tests::raw::hello;
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use tokio::net::{TcpSocket, TcpStream};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::{WebSocketStream, client_async_with_config};
use uuid::Uuid;

/// Read from the socket at once: a slow reader must not take more than it means to.
const READ_BYTES: usize = 4096;
/// Largest frame that is taken.
const MAX_MESSAGE_BYTES: usize = 256 << 20;

/// A bare WebSocket to an edge, and what it has been sent.
pub struct Peer {
    socket: WebSocketStream<TcpStream>,
    /// Bytes of all texts.
    pub bytes: u64,
    /// Words that begin with one of [`CANARIES`].
    pub canaries: BTreeSet<String>,
    /// The last pong.
    pub pong: Option<Vec<u8>>,
    /// Why the other side closed.
    pub reason: Option<String>,
}

/// How the ids and titles of watched rows begin.
pub const CANARIES: [&str; 2] = ["key-", "text-"];

/// What came of waiting.
#[derive(Debug)]
pub enum Heard {
    /// A text.
    Text(String),
    /// Nothing within the time.
    Silence,
    /// The socket is closed, or broken.
    Closed,
}

impl Peer {
    /// Connects, and says nothing.
    pub async fn connect(url: &str) -> Result<Peer> {
        Peer::with_buffer(url, None).await
    }

    /// Connects with a receive buffer of the kernel of this many bytes.
    pub async fn narrow(url: &str, bytes: u32) -> Result<Peer> {
        Peer::with_buffer(url, Some(bytes)).await
    }

    async fn with_buffer(url: &str, bytes: Option<u32>) -> Result<Peer> {
        let address = url.strip_prefix("ws://").context("a ws:// URL")?.parse()?;
        let socket = TcpSocket::new_v4()?;
        if let Some(bytes) = bytes {
            socket.set_recv_buffer_size(bytes)?;
        }
        let stream = socket.connect(address).await?;
        stream.set_nodelay(true)?;
        let config = WebSocketConfig::default()
            .read_buffer_size(READ_BYTES)
            .max_message_size(Some(MAX_MESSAGE_BYTES))
            .max_frame_size(Some(MAX_MESSAGE_BYTES));
        let (socket, _) = client_async_with_config(url, stream, Some(config)).await?;
        Ok(Peer { socket, bytes: 0, canaries: BTreeSet::new(), pong: None, reason: None })
    }

    /// Connects and says hello as a new client.
    pub async fn open(url: &str, token: &str) -> Result<(Peer, Welcome)> {
        let mut peer = Peer::connect(url).await?;
        peer.say(hello(Uuid::now_v7(), token)).await?;
        let welcome = peer.welcome().await?;
        Ok((peer, welcome))
    }

    /// Sends a text.
    pub async fn text(&mut self, text: impl Into<String>) -> Result<()> {
        Ok(self.socket.send(Message::text(text.into())).await?)
    }

    /// Sends a frame.
    pub async fn say(&mut self, frame: Value) -> Result<()> {
        self.text(frame.to_string()).await
    }

    /// Sends a ping.
    pub async fn ping(&mut self, payload: Vec<u8>) -> Result<()> {
        Ok(self.socket.send(Message::Ping(payload.into())).await?)
    }

    /// The next text.
    pub async fn next(&mut self, limit: Duration) -> Heard {
        let end = Instant::now() + limit;
        loop {
            match tokio::time::timeout(end.saturating_duration_since(Instant::now()), self.socket.next()).await {
                Err(_) => return Heard::Silence,
                Ok(Some(Ok(Message::Text(text)))) => {
                    self.keep(&text);
                    return Heard::Text(text.to_string());
                }
                Ok(Some(Ok(Message::Pong(payload)))) => {
                    self.pong = Some(payload.to_vec());
                    return Heard::Silence;
                }
                Ok(Some(Ok(Message::Close(close)))) => {
                    self.reason = close.map(|close| close.reason.to_string());
                    return Heard::Closed;
                }
                Ok(Some(Err(_)) | None) => return Heard::Closed,
                Ok(Some(Ok(_))) => {}
            }
        }
    }

    /// The next frame; none when the socket is closed.
    pub async fn frame(&mut self, limit: Duration) -> Result<Option<ServerFrame>> {
        let end = Instant::now() + limit;
        while Instant::now() < end {
            match self.next(end.saturating_duration_since(Instant::now())).await {
                Heard::Text(text) => {
                    let frame = serde_json::from_str(&text);
                    return frame.map(Some).with_context(|| format!("not a frame: {text:.300}"));
                }
                Heard::Closed => return Ok(None),
                Heard::Silence => {}
            }
        }
        bail!("no frame for {limit:?}")
    }

    /// The answer to `hello`.
    pub async fn welcome(&mut self) -> Result<Welcome> {
        loop {
            match self.frame(Duration::from_secs(20)).await? {
                Some(ServerFrame::Welcome(welcome)) => return Ok(welcome),
                Some(ServerFrame::Error(error)) => bail!("refused with {}: {}", error.code, error.message),
                Some(_) => {}
                None => bail!("closed before a welcome"),
            }
        }
    }

    /// Takes bytes off the socket without looking at them: a reader of any speed. False when the socket is closed.
    pub async fn drain(&mut self, most: usize, limit: Duration) -> bool {
        let mut bytes = vec![0; most];
        match tokio::time::timeout(limit, self.socket.get_mut().read(&mut bytes)).await {
            Ok(Ok(0) | Err(_)) => false,
            Ok(Ok(count)) => {
                self.bytes += count as u64;
                true
            }
            Err(_) => true,
        }
    }

    /// The socket below the WebSocket.
    pub fn stream(&mut self) -> &mut TcpStream {
        self.socket.get_mut()
    }

    fn keep(&mut self, text: &str) {
        self.bytes += text.len() as u64;
        let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '-');
        let canaries = words.filter(|word| CANARIES.iter().any(|prefix| word.starts_with(prefix)));
        for word in canaries {
            if !self.canaries.contains(word) {
                self.canaries.insert(word.to_owned());
            }
        }
    }
}

/// What a client holds, by the rules of the protocol. Of rows only those that tests look at: tasks by id, with their project
/// and title, and the user's own mark.
#[derive(Clone, Debug, Default)]
pub struct Held {
    /// Version of the schema.
    pub schema: Option<String>,
    /// Where the rows stand.
    pub position: Option<Position>,
    /// Scopes held there.
    pub scopes: BTreeSet<Scope>,
    /// Tasks: id to project and title.
    pub tasks: Tasks,
    /// The user's mark.
    pub mark: String,
    /// How many scopes were lost.
    pub removed: u64,
    /// The last snapshot's token and mark.
    pub cut: Option<SnapshotMark>,
    /// Every position that was taken, with the scopes and tasks held there.
    pub taken: Vec<(Position, BTreeSet<Scope>, Tasks)>,
    pub(super) staged: Vec<Step>,
    pub(super) bracket: Option<(Vec<Scope>, Vec<TableChanges>)>,
}

/// Tasks: id to project and title.
pub type Tasks = BTreeMap<String, (String, String)>;

/// What is staged.
#[derive(Clone, Debug)]
pub enum Step {
    Rows(Vec<TableChanges>),
    Removed(Scope),
    Replace(Vec<Scope>, Vec<TableChanges>),
}

impl Held {
    /// The `hello` that tells of it.
    pub fn hello(&self, client_id: Uuid, token: &str) -> Value {
        let mut frame = hello(client_id, token);
        if let (Some(position), Some(schema)) = (&self.position, &self.schema) {
            frame["position"] = json!(position);
            frame["schema"] = json!(schema);
            frame["scopes"] = json!(self.scopes);
        }
        frame
    }

    /// Whether a snapshot is under way.
    pub fn in_bracket(&self) -> bool {
        self.bracket.is_some()
    }

    /// Takes a frame; gives an error frame back.
    pub fn take(&mut self, frame: ServerFrame) -> Option<ErrorFrame> {
        match frame {
            ServerFrame::Welcome(welcome) => {
                self.staged.clear();
                self.bracket = None;
                if let Some(schema) = welcome.schema {
                    self.schema = Some(schema.version);
                }
                if welcome.resume == Resume::Snapshot {
                    self.scopes.clear();
                    self.tasks.clear();
                    self.mark.clear();
                    self.position = None;
                }
            }
            ServerFrame::SnapshotBegin { scopes, token, .. } => {
                self.bracket = Some((scopes, Vec::new()));
                self.cut = token.map(|token| SnapshotMark { token, mark: String::new() });
            }
            ServerFrame::SnapshotRows { changes, mark } => {
                if let Some((_, rows)) = &mut self.bracket {
                    rows.extend(changes);
                }
                if let (Some(cut), Some(mark)) = (&mut self.cut, mark) {
                    cut.mark = mark;
                }
            }
            ServerFrame::SnapshotApply {} => {
                if let Some((scopes, rows)) = &mut self.bracket {
                    self.staged.push(Step::Replace(scopes.clone(), std::mem::take(rows)));
                }
            }
            ServerFrame::SnapshotEnd { position } => {
                self.bracket = None;
                self.apply(position);
            }
            ServerFrame::Rows(rows) => {
                self.staged.push(Step::Rows(rows.changes));
                if rows.last && self.bracket.is_none() {
                    self.apply(Position { epoch: rows.epoch, stream_seq: rows.stream_seq, lsn: rows.lsn });
                }
            }
            ServerFrame::Commit { position } if self.bracket.is_none() => self.apply(position),
            ServerFrame::ScopeRemoved { scope } => self.staged.push(Step::Removed(scope)),
            ServerFrame::Error(error) => return Some(error),
            _ => {}
        }
        None
    }

    fn apply(&mut self, position: Position) {
        self.position = Some(position);
        for step in std::mem::take(&mut self.staged) {
            match step {
                Step::Rows(changes) => self.rows(changes),
                Step::Removed(scope) => {
                    self.removed += 1;
                    self.scopes.remove(&scope);
                    if scope.kind == "project" {
                        self.tasks.retain(|_, (project, _)| *project != scope.id);
                    }
                }
                Step::Replace(scopes, changes) => {
                    self.tasks.retain(|_, (project, _)| !scopes.contains(&Scope::new("project", project.as_str())));
                    self.scopes.extend(scopes);
                    self.rows(changes);
                }
            }
        }
        self.taken.push((position, self.scopes.clone(), self.tasks.clone()));
    }

    fn rows(&mut self, changes: Vec<TableChanges>) {
        for change in changes {
            for row in change.rows {
                let text = |index: usize| row.get(index).cloned().flatten().unwrap_or_default();
                match (change.table.as_str(), change.op) {
                    ("tasks", TableOp::Upsert | TableOp::Update) => {
                        self.tasks.insert(text(0), (text(1), text(2)));
                    }
                    ("tasks", TableOp::Delete) => {
                        self.tasks.remove(&text(0));
                    }
                    ("marks", TableOp::Upsert | TableOp::Update) => self.mark = text(1),
                    _ => {}
                }
            }
        }
    }
}
