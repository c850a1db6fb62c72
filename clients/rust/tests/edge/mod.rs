//! An edge in miniature: a real WebSocket server that speaks the real frames, over a ledger and a log in memory.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use futures_util::{SinkExt, StreamExt};
use millstream_schemas::frame::{
    ClientFrame, Confirmed, ErrorFrame, Hello, Limits, MAX_FRAME_BYTES, MAX_TRANSACTION_CHANGES, Resume, Rows,
    ServerFrame, Submit, Welcome,
};
use millstream_schemas::stream::{Failure, RunSpan};
use millstream_schemas::{
    Code, ColumnSchema, Lsn, Operation, PROTOCOL_VERSION, Position, Row, Schema, Scope, TableChanges, TableOp,
    TableSchema, TableScope,
};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::broadcast;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use uuid::Uuid;

pub const TOKEN: &str = "good";

#[derive(Default)]
pub struct State {
    pub ledger: HashMap<Uuid, u64>,
    pub tasks: BTreeMap<String, Row>,
    pub log: Vec<Rows>,
    pub failures: HashMap<Uuid, Vec<Failure>>,
    /// What the edge says of its patience; 0 means 30 s.
    pub heartbeat_ms: u64,
    /// Sockets stay open and nothing is read or said any more.
    pub deaf: bool,
    /// The next submission is answered by closing the socket with this code.
    pub close_with: Option<Option<u16>>,
    /// Which runs submitted what each client's ledger has.
    pub runs: HashMap<Uuid, Vec<RunSpan>>,
    /// Every submission in the order of arrival.
    pub received: Vec<u64>,
    pub connections: usize,
    /// The socket is cut after so many submissions of a connection.
    pub cut_after: Option<usize>,
    /// The welcome does not know yet what took effect last, though the rows that follow it confirm that.
    pub late_ledger: bool,
    /// Refuse this many of the next submissions with `overloaded`.
    pub overloaded: usize,
    /// Refuse submissions from this number on with `overloaded`.
    pub overloaded_from: Option<u64>,
    /// The wait that these refusals ask for; 0 means 30 ms.
    pub retry_after_ms: u64,
    /// Every submission with the time of its arrival, refused ones too.
    pub arrivals: Vec<(Instant, u64)>,
    /// The token that is accepted, if it is not [`TOKEN`].
    pub token: Option<&'static str>,
    /// The token of each connection.
    pub tokens: Vec<String>,
    /// A session ends with this code.
    pub end_with: Option<Code>,
    /// Frames are sent twice.
    pub twice: bool,
    /// Clients with a position are told `epoch_changed` instead of being brought up to date.
    pub too_far_behind: bool,
    /// Positions with which clients came.
    pub positions: Vec<Option<u64>>,
    /// The schema, if it is not [`schema`].
    pub schema: Option<Schema>,
    pub epoch: Uuid,
    pub traceparents: Vec<Option<String>>,
}

#[derive(Clone)]
pub struct Edge {
    pub url: String,
    state: Arc<Mutex<State>>,
    news: broadcast::Sender<(Uuid, Rows, Confirmed)>,
    acceptor: Arc<Mutex<Option<tokio::task::JoinHandle<()>>>>,
    address: std::net::SocketAddr,
}

pub fn schema() -> Schema {
    let column = |name: &str, r#type: &str, writable| ColumnSchema {
        name: name.into(),
        r#type: r#type.into(),
        nullable: true,
        writable,
        default: None,
        merge: None,
        numeric: None,
    };
    Schema {
        version: "v1".into(),
        tables: vec![TableSchema {
            name: "tasks".into(),
            columns: vec![
                column("id", "text", true),
                column("title", "text", true),
                column("done", "boolean", true),
                column("created_at", "timestamp with time zone", false),
            ],
            key: vec![0],
            scopes: vec![TableScope { kind: "global".into(), column: None }],
            references: Vec::new(),
            clocks: None,
        }],
    }
}

impl Edge {
    pub async fn start() -> Edge {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = State { epoch: Uuid::now_v7(), ..State::default() };
        let edge = Edge {
            url: format!("ws://{address}/sync"),
            state: Arc::new(Mutex::new(state)),
            news: broadcast::channel(4_096).0,
            acceptor: Arc::default(),
            address,
        };
        edge.accept(listener);
        edge
    }

    fn accept(&self, listener: TcpListener) {
        let edge = self.clone();
        let task = tokio::spawn(async move {
            let mut sessions = tokio::task::JoinSet::new();
            while let Ok((socket, _)) = listener.accept().await {
                let edge = edge.clone();
                sessions.spawn(async move {
                    let _ = edge.session(socket).await;
                });
            }
        });
        *self.acceptor.lock().unwrap() = Some(task);
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// The process dies: listener and sockets are gone.
    pub async fn kill(&self) {
        let task = self.acceptor.lock().unwrap().take().unwrap();
        task.abort();
        let _ = task.await;
    }

    /// It comes back at the same address.
    pub async fn revive(&self) {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.set_reuseaddr(true).unwrap();
        socket.bind(self.address).unwrap();
        self.accept(socket.listen(64).unwrap());
    }

    async fn session(&self, socket: TcpStream) -> Option<()> {
        let mut news = self.news.subscribe();
        let mut socket = tokio_tungstenite::accept_async(socket).await.ok()?;
        let ClientFrame::Hello(hello) = next(&mut socket).await? else { panic!("a frame before hello") };
        self.state().tokens.push(hello.token.clone());
        let accepted = self.state().token.unwrap_or(TOKEN);
        if hello.token != accepted {
            self.send(&mut socket, fatal(Code::BadToken)).await?;
            return None;
        }
        self.state().positions.push(hello.position.map(|position| position.stream_seq));
        if self.state().too_far_behind && hello.position.is_some() {
            let message = "too far behind".into();
            let error = ErrorFrame {
                code: Code::EpochChanged,
                message,
                client_seq: None,
                retry_after_ms: Some(10),
                fatal: true,
            };
            self.send(&mut socket, ServerFrame::Error(error)).await?;
            return None;
        }
        for frame in self.greeting(&hello) {
            self.send(&mut socket, frame).await?;
        }
        let mut submitted = 0;
        loop {
            while self.state().deaf {
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
            let end = self.state().end_with.take();
            if let Some(code) = end {
                self.send(&mut socket, fatal(code)).await?;
                return None;
            }
            tokio::select! {
                () = tokio::time::sleep(std::time::Duration::from_millis(20)) => {}
                frame = next(&mut socket) => {
                    let ClientFrame::Submit(submit) = frame? else { panic!("hello came twice") };
                    submitted += 1;
                    let close = self.state().close_with.take();
                    if let Some(code) = close {
                        let frame = code.map(|code| CloseFrame { code: code.into(), reason: "".into() });
                        let _ = socket.close(frame).await;
                        return None;
                    }
                    let reply = self.submit(&hello, submit);
                    if self.state().cut_after.is_some_and(|limit| submitted > limit) {
                        return None;
                    }
                    self.send(&mut socket, reply).await?;
                }
                event = news.recv() => {
                    let (author, rows, confirmed) = event.ok()?;
                    let position = Position { epoch: rows.epoch, stream_seq: rows.stream_seq, lsn: rows.lsn };
                    self.send(&mut socket, ServerFrame::Rows(Rows { last: author != hello.client_id, ..rows })).await?;
                    if author == hello.client_id {
                        self.send(&mut socket, ServerFrame::Confirmed(confirmed)).await?;
                        self.send(&mut socket, ServerFrame::Commit { position }).await?;
                    }
                }
            }
        }
    }

    async fn send(&self, socket: &mut WebSocketStream<TcpStream>, frame: ServerFrame) -> Option<()> {
        // What brackets a snapshot is never repeated by any retry of an edge.
        let once = matches!(
            frame,
            ServerFrame::Welcome(_)
                | ServerFrame::SnapshotBegin { .. }
                | ServerFrame::SnapshotApply {}
                | ServerFrame::SnapshotEnd { .. }
        );
        let times = if self.state().twice && !once { 2 } else { 1 };
        let text = serde_json::to_string(&frame).unwrap();
        for _ in 0..times {
            socket.send(Message::text(text.clone())).await.ok()?;
        }
        Some(())
    }

    fn greeting(&self, hello: &Hello) -> Vec<ServerFrame> {
        let mut state = self.state();
        state.connections += 1;
        let last_seq = state.ledger.get(&hello.client_id).copied().unwrap_or(0);
        let position =
            Position { epoch: state.epoch, stream_seq: state.log.len() as u64, lsn: Lsn(state.log.len() as u64) };
        let known =
            hello.position.filter(|known| known.epoch == state.epoch && known.stream_seq <= position.stream_seq);
        let mut frames = vec![ServerFrame::Welcome(Welcome {
            protocol: PROTOCOL_VERSION,
            session: Uuid::now_v7(),
            user_id: "ann".into(),
            schema: Some(state.schema.clone().unwrap_or_else(schema))
                .filter(|schema| hello.schema.as_deref() != Some(&schema.version)),
            limits: Limits {
                window: 16,
                frame_bytes: MAX_FRAME_BYTES,
                transaction_changes: MAX_TRANSACTION_CHANGES,
                heartbeat_ms: if state.heartbeat_ms == 0 { 30_000 } else { state.heartbeat_ms },
            },
            last_seq: if state.late_ledger { last_seq.saturating_sub(1) } else { last_seq },
            runs: state.runs.get(&hello.client_id).cloned().unwrap_or_default(),
            failed: state
                .failures
                .get(&hello.client_id)
                .into_iter()
                .flatten()
                .map(|failure| failure.client_seq)
                .collect(),
            lost: Vec::new(),
            epoch: state.epoch,
            resume: if known.is_some() { Resume::CatchUp } else { Resume::Snapshot },
        })];
        match known {
            Some(known) => {
                frames.extend(state.log.iter().skip(known.stream_seq as usize).cloned().map(ServerFrame::Rows));
            }
            None => {
                let rows = state.tasks.values().cloned().collect();
                let changes = vec![TableChanges { table: "tasks".into(), op: TableOp::Upsert, columns: None, rows }];
                frames.push(ServerFrame::SnapshotBegin {
                    scopes: vec![Scope::global()],
                    rows: 0,
                    token: None,
                    resumed: false,
                });
                frames.push(ServerFrame::SnapshotRows { changes, mark: None });
                frames.push(ServerFrame::SnapshotApply {});
                frames.push(ServerFrame::SnapshotEnd { position });
            }
        }
        let failed = state.failures.get(&hello.client_id).cloned().unwrap_or_default();
        let spans = state.runs.get(&hello.client_id);
        let run_id = spans.and_then(|spans| spans.last()).map_or(Uuid::nil(), |span| span.run_id);
        frames.push(ServerFrame::Confirmed(Confirmed { client_seq: last_seq, run_id, failed, lost: Vec::new() }));
        frames.push(ServerFrame::Commit { position });
        frames.push(ServerFrame::CaughtUp { position });
        frames
    }

    fn submit(&self, hello: &Hello, submit: Submit) -> ServerFrame {
        let mut state = self.state();
        state.arrivals.push((Instant::now(), submit.client_seq));
        if state.overloaded > 0 || state.overloaded_from.is_some_and(|from| submit.client_seq >= from) {
            state.overloaded = state.overloaded.saturating_sub(1);
            return ServerFrame::Error(ErrorFrame {
                code: Code::Overloaded,
                message: "later".into(),
                client_seq: Some(submit.client_seq),
                retry_after_ms: Some(if state.retry_after_ms == 0 { 30 } else { state.retry_after_ms }),
                fatal: false,
            });
        }
        state.received.push(submit.client_seq);
        let last = state.ledger.get(&hello.client_id).copied().unwrap_or(0);
        if submit.client_seq > last + 1 {
            return ServerFrame::Error(ErrorFrame {
                code: Code::Gap,
                message: format!("{} comes next", last + 1),
                client_seq: Some(last + 1),
                retry_after_ms: None,
                fatal: false,
            });
        }
        let known = state.runs.get(&hello.client_id).and_then(|spans| spans.last()).map(|span| span.run_id);
        let follows = known.is_none() || known == Some(submit.run_id) || known == submit.previous;
        if submit.client_seq == last + 1 && follows {
            state.traceparents.push(submit.traceparent.clone());
            state.ledger.insert(hello.client_id, submit.client_seq);
            let spans = state.runs.entry(hello.client_id).or_default();
            if spans.last().is_none_or(|span| span.run_id != submit.run_id) {
                spans.push(RunSpan { run_id: submit.run_id, first_seq: submit.client_seq });
            }
            let bad = submit.changes.iter().find(|change| change.values.contains(&Some("bad".into())));
            let failures = state.failures.get(&hello.client_id);
            let behind = submit
                .after
                .iter()
                .any(|client_seq| failures.into_iter().flatten().any(|failed| failed.client_seq == *client_seq));
            let (code, message) = match behind {
                true => (Code::PredecessorFailed, "it comes after a rejected one"),
                false => (Code::PermissionDenied, "bad title"),
            };
            let refused = if behind { submit.changes.first() } else { bad };
            let failure = refused.map(|change| Failure {
                client_seq: submit.client_seq,
                change_id: change.change_id,
                code,
                rule: None,
                message: message.into(),
            });
            let mut changes = Vec::new();
            if failure.is_none() {
                for change in &submit.changes {
                    let id = change.key[0].clone().unwrap();
                    let mut table =
                        TableChanges { table: "tasks".into(), op: TableOp::Upsert, columns: None, rows: vec![] };
                    if change.op == Operation::Delete {
                        state.tasks.remove(&id);
                        table.op = TableOp::Delete;
                        table.rows.push(change.key.clone());
                    } else {
                        let row = state.tasks.entry(id.clone()).or_insert_with(|| {
                            vec![Some(id), None, Some("f".into()), Some("2026-01-01 00:00:00+00".into())]
                        });
                        for (column, value) in change.columns.iter().zip(&change.values) {
                            row[schema().tables[0].column(column).unwrap()] = value.clone();
                        }
                        table.rows.push(row.clone());
                    }
                    changes.push(table);
                }
            }
            let stream_seq = state.log.len() as u64 + 1;
            let rows = Rows {
                stream_seq,
                lsn: Lsn(stream_seq),
                index: 0,
                last: true,
                epoch: state.epoch,
                at: 1,
                traceparent: submit.traceparent,
                changes,
            };
            state.log.push(rows.clone());
            state.failures.entry(hello.client_id).or_default().extend(failure.clone());
            let confirmed = Confirmed {
                client_seq: submit.client_seq,
                run_id: submit.run_id,
                lost: Vec::new(),
                failed: failure.into_iter().collect(),
            };
            let _ = self.news.send((hello.client_id, rows, confirmed));
        }
        ServerFrame::Accepted { client_seq: state.ledger.get(&hello.client_id).copied().unwrap_or(0) }
    }
}

fn fatal(code: Code) -> ServerFrame {
    ServerFrame::Error(ErrorFrame { code, message: "no".into(), client_seq: None, retry_after_ms: None, fatal: true })
}

async fn next(socket: &mut WebSocketStream<TcpStream>) -> Option<ClientFrame> {
    loop {
        match socket.next().await?.ok()? {
            Message::Text(text) => return Some(serde_json::from_str(&text).unwrap()),
            Message::Close(_) => return None,
            _ => {}
        }
    }
}
