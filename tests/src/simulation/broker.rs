//! Between the edges: the inbound stream with its lanes, executors, replication, and the outbound stream.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use async_nats::HeaderMap;
use bytes::Bytes;
use millstream_changes::for_simulation;
use millstream_edge::for_simulation::Message;
use millstream_schemas::stream::{ANY_SCOPE, OriginEntry, Submission, header};
use millstream_schemas::{Lsn, Row, Scope, TableChanges, TableOp};
use rand::RngExt;

use super::event::{Event, Stored};
use super::parts::{Executor, Item, Replication};
use super::postgres::Transaction;
use super::world::World;
use crate::trace;

/// Most submissions of a batch.
const BATCH: usize = 12;

impl World {
    pub fn lane(&mut self, edge: usize, run: u64) {
        let lane = &mut self.edges[edge];
        if lane.run != run || lane.publishing || lane.lane.is_empty() {
            return;
        }
        lane.publishing = true;
        let count = self.rng.random_range(1..=self.edges[edge].lane.len());
        let items: Vec<Stored> = self.edges[edge].lane.drain(..count).collect();
        self.soon(15, Event::Published(edge, run, self.broker.stream, items));
    }

    /// The broker stores a message, and perhaps says so.
    pub fn published(&mut self, edge: usize, run: u64, stream: u64, items: Vec<Stored>) {
        let (gone, now) = (self.edges[edge].run != run, self.broker.stream);
        let lost = if gone { stream != now || self.rng.random_bool(0.5) } else { self.bad_luck(0.05) };
        if lost {
            if !gone {
                self.soon(2_000, Event::Published(edge, run, now, items));
            }
            return;
        }
        self.broker.last += 1;
        let submissions: Vec<Submission> = items.iter().map(|(_, submission)| submission.clone()).collect();
        let list = || submissions.iter().map(|s| format!("{:.4}/{}", s.client_id.simple().to_string(), s.client_seq));
        trace!(self, "inbound {}: {}", self.broker.last, list().collect::<Vec<_>>().join(" "));
        self.broker.inbound.push((self.broker.last, submissions));
        for executor in 0..self.executors.len() {
            self.soon(10, Event::Execute(executor));
        }
        if gone {
            return;
        }
        if self.bad_luck(0.1) {
            // Not acknowledged in time: published again.
            self.soon(2_000, Event::Published(edge, run, now, items));
            return;
        }
        for (session, submission) in items {
            self.accepted(session, submission.client_seq);
        }
        self.edges[edge].publishing = false;
        self.after(0, Event::Lane(edge, run));
    }

    /// The broker crashes; what it had not synced is gone.
    pub fn break_broker(&mut self) {
        let lost = self.rng.random_range(0..=2.min(self.broker.inbound.len()));
        let kept = self.broker.inbound.len() - lost;
        self.broker.inbound.truncate(kept);
        self.broker.last -= lost as u64;
        let position = self.postgres.current.partition.get(&self.broker.stream).map_or(0, |(_, position)| *position);
        trace!(self, "the broker loses {lost} inbound messages");
        if position > self.broker.last {
            self.renew_inbound();
        }
        if self.rng.random_bool(0.5) {
            let lost = self.rng.random_range(0..=2.min(self.broker.outbound.len() - 1));
            trace!(self, "the broker loses {lost} outbound messages");
            let kept = self.broker.outbound.len() - lost;
            self.broker.has_lost |= lost > 0;
            self.broker.outbound.truncate(kept);
            self.replication.is_up = false;
            self.soon(500, Event::ReplicationUp);
            for edge in 0..self.edges.len() {
                self.edges[edge].seen = self.edges[edge].seen.min(kept);
            }
            for session in 0..self.sessions.len() {
                self.cut(session);
                self.sessions[session].end();
            }
        }
    }

    /// The operator's answer to an inbound stream that does not fit the database: another one.
    pub fn renew_inbound(&mut self) {
        trace!(self, "the inbound stream is made anew");
        self.broker.stream += 1;
        self.broker.last = 0;
        self.broker.inbound.clear();
        self.executors.iter_mut().for_each(|executor| executor.is_up = false);
        self.soon(500, Event::TakeOver);
    }

    pub fn take_over(&mut self) {
        let stream = self.broker.stream;
        let (owner, position) = self.postgres.current.partition.get(&stream).copied().unwrap_or((0, 0));
        let owner = owner + 1;
        self.postgres.partition(stream, owner, position);
        let executor =
            Executor { is_up: true, stream, owner, position, handed: position, items: VecDeque::new(), batch: None };
        self.executors.push(executor);
        self.soon(20, Event::Execute(self.executors.len() - 1));
    }

    /// Reads the stream, and begins a batch.
    pub fn execute(&mut self, index: usize) {
        let executor = &mut self.executors[index];
        if !executor.is_up || executor.stream != self.broker.stream {
            return;
        }
        for (sequence, submissions) in &self.broker.inbound {
            if *sequence > executor.handed {
                executor.handed = *sequence;
                let count = submissions.len();
                let item = |(place, submission): (usize, &Submission)| Item {
                    sequence: *sequence,
                    submission: submission.clone(),
                    last: place + 1 == count,
                };
                executor.items.extend(submissions.iter().enumerate().map(item));
            }
        }
        if executor.batch.is_none() && !executor.items.is_empty() {
            let most = executor.items.len().min(BATCH);
            executor.batch = Some(self.rng.random_range(1..=most));
            self.soon(40, Event::Commit(index));
        }
    }

    fn crash_executor(&mut self, index: usize) {
        self.executors[index].is_up = false;
        self.soon(1_000, Event::TakeOver);
    }

    pub fn commit(&mut self, index: usize) {
        let Some(count) = self.executors[index].batch.take().filter(|_| self.executors[index].is_up) else { return };
        if self.crashes_at(43) {
            return self.crash_executor(index);
        }
        let executor = &self.executors[index];
        let mut transaction = self.postgres.begin();
        let found = transaction.state.partition.get(&executor.stream).copied();
        if found != Some((executor.owner, executor.position)) {
            trace!(self, "executor {index} is fenced");
            return self.recover(index);
        }
        let items = executor.items.iter().take(count);
        let position = items.clone().filter(|item| item.last).map(|item| item.sequence).max();
        let position = position.map_or(executor.position, |last| last.max(executor.position));
        let submissions: Vec<Submission> = items.map(|item| item.submission.clone()).collect();
        transaction.state.partition.insert(executor.stream, (executor.owner, position));
        let settled = {
            let (tables, known) = (&self.postgres.tables, transaction.known(&submissions));
            let history = transaction.state.history.clone();
            let rejected = |client_id, client_seq| history.contains_key(&(client_id, client_seq));
            let apply = |submission: &Submission| transaction.submit(tables, submission, self.now);
            for_simulation::settle(known, tables, &submissions, rejected, apply)
        };
        transaction.settle(&settled);
        for entry in &settled.origin {
            trace!(
                self,
                "executor {index}: {:.4} up to {}, failed {:?}, lost {:?}",
                entry.client_id.simple().to_string(),
                entry.client_seq,
                entry.failed.iter().map(|f| (f.client_seq, f.code.as_str(), f.message.as_str())).collect::<Vec<_>>(),
                entry.lost.iter().map(|l| l.client_seq).collect::<Vec<_>>()
            );
        }
        self.checker.decided(&submissions, &settled.origin);
        let unknown = self.bad_luck(0.03);
        if unknown && self.rng.random_bool(0.5) {
            // COMMIT did not arrive.
            return self.recover(index);
        }
        self.committed(transaction, settled.origin);
        if self.crashes_at(44) {
            return self.crash_executor(index);
        }
        if unknown {
            return self.recover(index);
        }
        let executor = &mut self.executors[index];
        executor.position = position;
        executor.items.drain(..count);
        self.soon(5, Event::Execute(index));
    }

    /// Nothing is certain: the executor reads its position.
    fn recover(&mut self, index: usize) {
        let executor = &mut self.executors[index];
        match self.postgres.current.partition.get(&executor.stream) {
            Some((owner, position)) if *owner == executor.owner => {
                executor.position = *position;
                // After a restore the stream is read again from there.
                executor.handed = if *position < executor.handed { *position } else { executor.handed };
                executor.items.clear();
                executor.batch = None;
                self.soon(20, Event::Execute(index));
            }
            _ => {
                executor.is_up = false;
                if !self.executors.iter().any(|executor| executor.is_up) {
                    self.soon(500, Event::TakeOver);
                }
            }
        }
    }

    /// A transaction is in the log; snapshots see it a little later.
    pub fn committed(&mut self, transaction: Transaction, origin: Vec<OriginEntry>) {
        let gap = self.rng.random_range(100..900);
        self.postgres.commit(transaction, origin, self.now, gap);
        // Rarely for as long as a client takes to come back.
        let late = match self.rng.random_range(0..20) {
            0 => 400,
            1..=3 => 30,
            _ => 0,
        };
        self.soon(late, Event::Show(self.postgres.last_xid()));
        self.soon(10, Event::Replicate);
    }

    pub fn replicate(&mut self) {
        let Some(commit) = self.postgres.log.get(self.replication.next).cloned().filter(|_| self.replication.is_up)
        else {
            return;
        };
        if self.crashes_at(46) {
            return self.crash_replication();
        }
        let count = commit.messages.len();
        for (index, (scope, changes)) in commit.messages.iter().enumerate() {
            if index > 0 && self.crashes_at(46) {
                return self.crash_replication();
            }
            let last = index + 1 == count;
            let origin = if last { commit.origin.as_slice() } else { &[] };
            let payload = serde_json::to_vec(changes).expect("rows encode");
            let moves = scope.as_ref().and_then(|scope| self.moves(scope, changes));
            self.publish(scope.as_ref(), commit.lsn, commit.xid, commit.at, (index, last), origin, payload, moves);
        }
        if self.crashes_at(47) {
            return self.crash_replication();
        }
        self.replication.next += 1;
        self.replication.confirmed = Lsn(commit.lsn.0 + 1);
        self.soon(5, Event::Replicate);
    }

    fn crash_replication(&mut self) {
        self.replication.is_up = false;
        self.soon(1_000, Event::ReplicationUp);
    }

    /// Which memberships of those who hold `scope` may move with rows: what is new is named, what goes may be any.
    fn moves(&self, scope: &Scope, changes: &[TableChanges]) -> Option<String> {
        let mut names = BTreeSet::new();
        for change in changes {
            let table = self.postgres.tables.iter().find(|table| table.name == change.table)?;
            for membership in table.memberships.iter().filter(|membership| membership.members().kind == scope.kind) {
                let name = |row: &Row| {
                    Some(Scope::new(membership.kind.clone(), row.get(membership.scope)?.clone()?).subject())
                };
                let is_whole = change.op == TableOp::Upsert && change.columns.is_none();
                let any = || ANY_SCOPE.to_owned();
                names.extend(change.rows.iter().map(|row| name(row).filter(|_| is_whole).unwrap_or_else(any)));
            }
        }
        let any = names.contains(ANY_SCOPE);
        (!names.is_empty()).then(|| if any { ANY_SCOPE.to_owned() } else { Vec::from_iter(names).join(" ") })
    }

    #[allow(clippy::too_many_arguments)]
    fn publish(
        &mut self,
        scope: Option<&Scope>,
        lsn: Lsn,
        xid: u32,
        at: u64,
        (index, last): (usize, bool),
        origin: &[OriginEntry],
        payload: Vec<u8>,
        moves: Option<String>,
    ) {
        let mut headers = HeaderMap::new();
        headers.insert(header::EPOCH, self.replication.epoch.to_string());
        headers.insert(header::LSN, lsn.to_string());
        headers.insert(header::XID, xid.to_string());
        headers.insert(header::INDEX, index.to_string());
        headers.insert(header::LAST, if last { "1" } else { "0" });
        headers.insert(header::AT, at.to_string());
        if !origin.is_empty() {
            headers.insert(header::ORIGIN, serde_json::to_string(origin).expect("origins encode"));
        }
        if let Some(moves) = moves {
            headers.insert(header::MOVES, moves);
        }
        let subject = scope.map_or_else(|| "ms.wal.origin".to_owned(), Scope::subject);
        let stream_seq = self.broker.outbound.len() as u64 + 1;
        trace!(self, "outbound {stream_seq}: {subject} lsn {lsn} index {index}{}", if last { ", last" } else { "" });
        let message = Message::decode(stream_seq, &subject, &headers, Bytes::from(payload)).expect("a message");
        self.broker.outbound.push(Arc::new(message));
        for edge in 0..self.edges.len() {
            self.soon(10, Event::Tail(edge));
        }
    }

    pub fn replication_up(&mut self) {
        if self.replication.is_up {
            return;
        }
        let tail = self.broker.outbound.last().map(|message| (message.lsn(), message.last, message.position.epoch));
        let (lsn, last, epoch) = tail.unwrap_or_default();
        // As `epoch::verdict` has it: the stream's history is the database's, and the slot is not ahead of the stream.
        let held = if last { lsn.0 + 1 } else { lsn.0 };
        if self.replication.is_lost || epoch != self.replication.epoch || self.replication.confirmed.0 > held {
            self.new_epoch();
        } else {
            self.replication.is_up = true;
            // The last transaction again from its first message, if its end is not in the stream.
            let done = |commit: &std::rc::Rc<super::postgres::Commit>| commit.lsn < lsn || (commit.lsn == lsn && last);
            self.replication.next = self.postgres.log.iter().take_while(|commit| done(commit)).count();
        }
        self.soon(10, Event::Replicate);
    }

    pub fn new_epoch(&mut self) {
        // What the new history does not tell of can be seen before it begins.
        self.postgres.show(self.postgres.last_xid());
        let lsn = Lsn(self.postgres.insert);
        self.postgres.insert += 64;
        self.replication = Replication {
            is_up: true,
            is_lost: false,
            epoch: self.uuid(),
            next: self.postgres.log.len(),
            confirmed: lsn,
        };
        trace!(self, "a new epoch at {lsn}");
        self.publish(None, lsn, 0, self.now, (0, true), &[], b"[]".to_vec(), None);
    }

    /// What replication answers: everything before this LSN is in the stream.
    pub fn watermark(&self) -> Option<Lsn> {
        let next = self.postgres.log.get(self.replication.next);
        self.replication.is_up.then(|| next.map_or(Lsn(self.postgres.insert), |commit| commit.lsn))
    }

    pub fn is_idle(&self) -> bool {
        let executing = self.executors.iter().filter(|executor| executor.is_up);
        self.replication.is_up
            && self.replication.next == self.postgres.log.len()
            && executing.clone().count() > 0
            && executing.clone().all(|executor| executor.items.is_empty())
            && self.edges.iter().all(|edge| edge.lane.is_empty() && !edge.publishing)
    }
}
