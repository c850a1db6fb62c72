//! Edges: what `session.rs` of the edge and the files below it do around the real downlink, with the network's frames
//! and a model of Postgres and the broker on the other sides.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::Arc;

use millstream_edge::for_simulation::{Downlink, Fence, Message, Next, Out, Reach};
use millstream_schemas::frame::{ClientFrame, ErrorFrame, Hello, Limits, Resume, ServerFrame, Submit, Welcome};
use millstream_schemas::stream::{Submission, Watermark};
use millstream_schemas::{Code, Lsn, Position, Scope, TableChanges, TableOp};
use rand::RngExt;
use tokio_tungstenite::tungstenite::Utf8Bytes;

use super::event::{Event, MS};
use super::parts::Session;
use super::postgres::State;
use super::world::World;
use crate::trace;

/// Messages that may be younger than what a snapshot sees.
const LOOK_BACK: usize = 40;

impl World {
    pub fn connected(&mut self, client: usize, hello: Hello) -> usize {
        let edge = self.rng.random_range(0..self.edges.len());
        self.sessions.push(Session {
            edge,
            client,
            client_id: hello.client_id,
            user: hello.token.clone(),
            downlink: None,
            is_cut: false,
            ended: false,
            expected: 0,
            last_run: None,
            passed_over: None,
            up: self.now,
            down: self.now,
        });
        let session = self.sessions.len() - 1;
        let (state, fence) = self.postgres.snapshot();
        let late = if self.bad_luck(0.3) { 40 } else { 2 };
        self.soon(late, Event::Open(session, Box::new(hello), state, fence));
        session
    }

    pub fn send_up(&mut self, session: usize, text: String) {
        let slow = if self.bad_luck(0.1) { 300 } else { 8 };
        let wait = self.rng.random_range(0..=slow) * MS;
        let at = self.sessions[session].up.max(self.now + wait);
        self.sessions[session].up = at;
        self.frames += 1;
        self.after(at - self.now, Event::ToEdge(session, text));
    }

    fn send_down(&mut self, session: usize, text: String) {
        let slow = if self.bad_luck(0.1) { 300 } else { 8 };
        let wait = self.rng.random_range(0..=slow) * MS;
        let at = self.sessions[session].down.max(self.now + wait);
        self.sessions[session].down = at;
        self.frames += 1;
        self.after(at - self.now, Event::ToClient(session, text));
    }

    fn tell(&mut self, session: usize, frame: &ServerFrame) {
        self.send_down(session, serde_json::to_string(frame).expect("frames encode"));
    }

    fn send(&mut self, session: usize, out: Vec<Out>) {
        let mut confirmed = false;
        for frame in out {
            confirmed |= matches!(frame, Out::Own(ServerFrame::Confirmed(_)));
            match frame {
                Out::Shared(text) => self.send_down(session, Utf8Bytes::as_str(&text).to_owned()),
                Out::Own(frame) => self.tell(session, &frame),
            }
        }
        if confirmed && self.crashes_at(45) {
            self.cut(session);
        }
    }

    /// Neither side gets anything more; each notices when it does.
    pub fn cut(&mut self, session: usize) {
        if self.sessions.get(session).is_none_or(|session| session.is_cut) {
            return;
        }
        trace!(self, "session {session} is cut");
        self.sessions[session].is_cut = true;
        let slow = if self.bad_luck(0.2) { 3_000 } else { 50 };
        self.soon(slow, Event::EdgeGone(session));
        self.soon(50, Event::ClientGone(session));
    }

    pub fn crash_edge(&mut self, edge: usize) {
        trace!(self, "edge {edge} crashes");
        self.edges[edge].run += 1;
        self.edges[edge].lane.clear();
        self.edges[edge].publishing = false;
        for session in 0..self.sessions.len() {
            if self.sessions[session].edge == edge {
                self.cut(session);
                self.sessions[session].end();
            }
        }
    }

    fn fatal(&mut self, session: usize, code: Code) {
        let frame =
            ErrorFrame { code, message: String::new(), client_seq: None, retry_after_ms: Some(100), fatal: true };
        self.tell(session, &ServerFrame::Error(frame));
        self.sessions[session].end();
    }

    /// The edge has read Postgres, and welcomes.
    pub fn open(&mut self, session: usize, hello: &Hello, state: Rc<State>, fence: Fence) {
        if self.sessions[session].ended || self.sessions[session].is_cut {
            return;
        }
        let edge = self.sessions[session].edge;
        let Some(head) = self.edges[edge].seen.checked_sub(1).map(|last| self.broker.outbound[last].position) else {
            return self.fatal(session, Code::Unavailable);
        };
        let Some((state, fence)) = self.settled(session, head.stream_seq, (state, fence)) else {
            return self.fatal(session, Code::Unavailable);
        };
        let (last_seq, runs, confirmed) = state.ledger(hello.client_id, hello.confirmed_seq);
        let scopes = state.scopes(&hello.token);
        let vouched = |position: &Position| {
            position.epoch == head.epoch
                && position.stream_seq <= head.stream_seq
                && self.broker.outbound[position.stream_seq as usize - 1].position == *position
        };
        let kept = hello.position.filter(vouched);
        self.sessions[session].last_run = runs.last().map(|span| span.run_id);
        let welcome = Welcome {
            protocol: 1,
            session: self.uuid(),
            user_id: hello.token.clone(),
            schema: None,
            limits: Limits {
                window: self.rng.random_range(1..=6),
                frame_bytes: 1 << 20,
                transaction_changes: 1_000,
                heartbeat_ms: 45_000,
            },
            last_seq,
            runs,
            failed: confirmed
                .iter()
                .flat_map(|confirmed| &confirmed.failed)
                .map(|failure| failure.client_seq)
                .collect(),
            lost: confirmed.iter().flat_map(|confirmed| &confirmed.lost).cloned().collect(),
            epoch: head.epoch,
            resume: if kept.is_some() { Resume::CatchUp } else { Resume::Snapshot },
        };
        self.tell(session, &ServerFrame::Welcome(welcome));
        let (held, lost): (Vec<Scope>, Vec<Scope>) = match kept {
            Some(_) => hello.scopes.iter().cloned().partition(|scope| scopes.contains(scope)),
            None => Default::default(),
        };
        let authorization = Arc::new(fence.clone());
        let tables = &self.postgres.tables;
        let reach = Arc::new(Reach::new(tables.iter().flat_map(|table| &table.memberships)));
        let position = kept.unwrap_or(head);
        // As `Session::begin`: what moved since is no claim. Everything that the snapshot sees has been read by then.
        let behind = self.broker.outbound[position.stream_seq as usize..].iter();
        let told = behind.filter(|message| message.scope.as_ref().is_some_and(|scope| scopes.contains(scope)));
        let moves: Vec<_> = told.filter_map(|message| message.moves.as_ref()).collect();
        let (claims, kept): (Vec<Scope>, Vec<Scope>) =
            held.into_iter().partition(|scope| moves.iter().any(|moves| reach.concerns(moves, scope)));
        // As `Session::begin`: a client behind the ring gets all scopes again as of one moment, another only those that moved.
        let (behind, mut claims) = (self.rng.random_bool(0.5), claims);
        let (position, held) = if behind && !claims.is_empty() {
            claims.extend(kept);
            (head, Vec::new())
        } else {
            (position, kept)
        };
        let mut downlink =
            Downlink::new(hello.client_id, &hello.token, reach.clone(), position, None, held, authorization);
        claims.into_iter().for_each(|scope| downlink.disclaim(scope));
        downlink.knows(hello.confirmed_seq.min(last_seq));
        let mut out = Vec::new();
        lost.into_iter().for_each(|scope| downlink.removed(scope, &mut out));
        downlink.ledger(fence.lsn, confirmed, false);
        self.sessions[session].expected = last_seq + 1;
        let before = downlink.cursor();
        if behind && !self.catch_up(session, &mut downlink, &mut out) {
            return self.fatal(session, Code::EpochChanged);
        }
        let snapshot = if downlink.cursor() == before {
            (state, fence)
        } else {
            let Some((state, fence)) = self.settled(session, downlink.cursor(), self.postgres.snapshot()) else {
                return self.fatal(session, Code::Unavailable);
            };
            let (_, _, confirmed) = state.ledger(hello.client_id, downlink.confirmed());
            downlink.ledger(fence.lsn, confirmed, false);
            (state, fence)
        };
        let joined = self.join(session, &mut downlink, snapshot, &mut out);
        self.send(session, out);
        if !joined {
            return self.fatal(session, Code::Unavailable);
        }
        self.sessions[session].downlink = Some(downlink);
        self.pump(session);
    }

    /// A snapshot that sees what the stream tells of the client up to a message. None: the edge gives up after a while.
    fn settled(&mut self, session: usize, upto: u64, (state, fence): (Rc<State>, Fence)) -> Option<(Rc<State>, Fence)> {
        let (upto, client_id) = ((upto as usize).min(self.broker.outbound.len()), self.sessions[session].client_id);
        let back = &self.broker.outbound[upto.saturating_sub(LOOK_BACK)..upto];
        let epoch = back.last()?.epoch();
        let unseen = |message: &&Arc<Message>| {
            message.epoch() == epoch
                && message.settles(client_id).next().is_some()
                && !fence.sees(message.xid, message.lsn())
        };
        match back.iter().rev().find(unseen).cloned() {
            Some(message) => self.snapshot_that_sees(message.xid, message.lsn()),
            None => Some((state, fence)),
        }
    }

    /// Fetches by scope what the ring no longer has.
    fn catch_up(&mut self, session: usize, downlink: &mut Downlink, out: &mut Vec<Out>) -> bool {
        let (cursor, seen) = (downlink.cursor() as usize, self.edges[self.sessions[session].edge].seen);
        if cursor >= seen {
            return true;
        }
        // First message of the ring.
        let oldest = self.rng.random_range(cursor + 1..=seen);
        if oldest == cursor + 1 {
            return true;
        }
        downlink.mute();
        let scopes: BTreeSet<Scope> = downlink.scopes().cloned().collect();
        let wanted = |message: &&Arc<Message>| message.scope.as_ref().is_some_and(|scope| scopes.contains(scope));
        let messages: Vec<Arc<Message>> =
            self.broker.outbound[cursor..oldest - 1].iter().filter(wanted).cloned().collect();
        let ring = self.broker.outbound[oldest - 1].lsn();
        for message in &messages {
            if !self.end_before(session, downlink, message.lsn(), out) || !self.feed(session, downlink, message, out) {
                return false;
            }
        }
        if !self.end_before(session, downlink, ring, out) {
            return false;
        }
        downlink.skip_to(oldest as u64 - 1);
        true
    }

    /// False: the session cannot go on.
    fn end_before(&mut self, session: usize, downlink: &mut Downlink, next: Lsn, out: &mut Vec<Out>) -> bool {
        while let Some((commit, xid)) = downlink.ends_before(next, out) {
            let Some(snapshot) = self.snapshot_that_sees(xid, commit) else { return false };
            if !self.join(session, downlink, snapshot, out) {
                return false;
            }
        }
        true
    }

    /// False: the session cannot go on.
    fn feed(&mut self, session: usize, downlink: &mut Downlink, message: &Message, out: &mut Vec<Out>) -> bool {
        loop {
            match downlink.message(message, out) {
                Next::Continue => return true,
                Next::EpochChanged => return false,
                Next::ReadLedger => {
                    let Some((state, fence)) = self.snapshot_that_sees(message.xid, message.lsn()) else {
                        return false;
                    };
                    let (_, _, confirmed) = state.ledger(self.sessions[session].client_id, downlink.confirmed());
                    downlink.ledger(fence.lsn, confirmed, false);
                }
                Next::Reauthorize => {
                    let Some(snapshot) = self.snapshot_that_sees(message.xid, message.lsn()) else { return false };
                    if !self.join(session, downlink, snapshot, out) {
                        return false;
                    }
                }
            }
        }
    }

    /// The edge waits until it is visible. None: the database was restored meanwhile, and the edge gives up after a while.
    fn snapshot_that_sees(&mut self, xid: u32, commit: Lsn) -> Option<(Rc<State>, Fence)> {
        self.postgres.show(xid);
        let (state, fence) = self.postgres.snapshot();
        fence.sees(xid, commit).then_some((state, fence))
    }

    fn join(
        &mut self,
        session: usize,
        downlink: &mut Downlink,
        (mut state, mut fence): (Rc<State>, Fence),
        out: &mut Vec<Out>,
    ) -> bool {
        let cursor = (downlink.cursor() as usize).min(self.broker.outbound.len());
        let back = self.broker.outbound[cursor.saturating_sub(LOOK_BACK)..cursor].to_vec();
        let user = self.sessions[session].user.clone();
        let mut scopes = state.scopes(&user);
        while let Some(message) = downlink.outdates(&fence, &scopes, &back) {
            let Some(later) = self.snapshot_that_sees(message.xid, message.lsn()) else { return false };
            (state, fence) = later;
            scopes = state.scopes(&user);
        }
        let fence = Arc::new(fence);
        let (in_bracket, held) = (downlink.in_bracket(), downlink.scopes().count());
        let new = downlink.authorized(&scopes, fence.clone(), out);
        if in_bracket && (!new.is_empty() || downlink.scopes().count() != held) {
            return false;
        }
        if new.is_empty() {
            return true;
        }
        out.push(Out::Own(ServerFrame::SnapshotBegin { scopes: new.clone(), rows: 0, token: None, resumed: false }));
        for (table, row) in state.read(&self.postgres.tables, &new) {
            let table = self.postgres.tables[table].name.clone();
            let changes = vec![TableChanges { table, op: TableOp::Upsert, columns: None, rows: vec![row] }];
            out.push(Out::Own(ServerFrame::SnapshotRows { changes, mark: None }));
        }
        downlink.joined(new, &fence, &back);
        true
    }

    pub fn tail(&mut self, edge: usize) {
        self.edges[edge].seen = self.broker.outbound.len();
        for session in 0..self.sessions.len() {
            if self.sessions[session].edge == edge {
                self.pump(session);
            }
        }
    }

    pub fn pump(&mut self, session: usize) {
        let Some(mut downlink) = self.sessions[session].downlink.take() else { return };
        let seen = self.edges[self.sessions[session].edge].seen;
        let mut out = Vec::new();
        while (downlink.cursor() as usize) < seen {
            let message = self.broker.outbound[downlink.cursor() as usize].clone();
            if !self.feed(session, &mut downlink, &message, &mut out) {
                self.send(session, out);
                return self.fatal(session, Code::EpochChanged);
            }
        }
        if downlink.waits()
            && let Some(lsn) = self.watermark()
        {
            let (epoch, stream_seq) = (self.replication.epoch, self.broker.outbound.len() as u64);
            downlink.watermark(Watermark { epoch, lsn, stream_seq });
        }
        downlink.settle(&mut out);
        self.sessions[session].downlink = Some(downlink);
        self.send(session, out);
        if self.crashes_at(48) {
            self.cut(session);
        }
    }

    /// The broker has stored a submission.
    pub fn accepted(&mut self, session: usize, client_seq: u64) {
        if !self.sessions[session].ended {
            self.tell(session, &ServerFrame::Accepted { client_seq });
        }
    }

    pub fn reach_edge(&mut self, session: usize, text: &str) {
        self.frames -= 1;
        let Session { edge, is_cut, ended, ref downlink, .. } = self.sessions[session];
        if is_cut || ended || downlink.is_none() {
            return;
        }
        match serde_json::from_str(text).expect("a client's frame") {
            ClientFrame::Submit(submit) => self.submit(session, edge, submit),
            ClientFrame::Hello(_) | ClientFrame::Scopes { .. } => unreachable!("hello is not sent as text here"),
            ClientFrame::Taken { .. } | ClientFrame::Ping {} => unreachable!("the SDK does not send these"),
        }
    }

    fn submit(&mut self, session: usize, edge: usize, submit: Submit) {
        let (client_seq, overloaded) = (submit.client_seq, self.bad_luck(0.03));
        let state = &mut self.sessions[session];
        let refuse = |code, client_seq, retry_after_ms| {
            let message = String::new();
            ServerFrame::Error(ErrorFrame { code, message, client_seq: Some(client_seq), retry_after_ms, fatal: false })
        };
        if let Some(downlink) = state.downlink.as_ref().filter(|downlink| downlink.confirmed() >= state.expected) {
            state.expected = downlink.confirmed() + 1;
            state.last_run = downlink.confirmed_run();
        }
        if client_seq > state.expected {
            let expected = state.expected;
            if state.passed_over.replace(client_seq) != Some(client_seq - 1) {
                self.tell(session, &refuse(Code::Gap, expected, None));
            }
            return;
        }
        let follows = |last: uuid::Uuid| submit.run_id == last || submit.previous == Some(last);
        if client_seq == state.expected && state.last_run.is_some_and(|last| !follows(last)) {
            return self.fatal(session, Code::WrongPrevious);
        }
        if overloaded {
            state.passed_over = Some(client_seq);
            return self.tell(session, &refuse(Code::Overloaded, client_seq, Some(500)));
        }
        if client_seq == state.expected {
            state.expected = client_seq + 1;
            state.last_run = Some(submit.run_id);
        }
        state.passed_over = None;
        let submission = Submission {
            client_id: state.client_id,
            user_id: state.user.clone(),
            client_seq,
            attempt: submit.attempt,
            run_id: submit.run_id,
            previous: submit.previous,
            after: submit.after,
            changes: submit.changes,
            traceparent: None,
        };
        let run = self.edges[edge].run;
        self.edges[edge].lane.push((session, submission));
        self.soon(3, Event::Lane(edge, run));
    }
}
