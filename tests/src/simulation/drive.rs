//! What happens in a seed: its beginning, its troubles, and its end.

use std::collections::BTreeSet;

use rand::RngExt;

use super::event::{Event, MS};
use super::postgres::{self, LABELS, MEMBERS, NOTES, TASKS};
use super::world::World;
use crate::trace;

/// How long trouble lasts.
const TROUBLE: u64 = 12_000 * MS;
/// Everything is settled within this time after the last trouble: the longest back-offs of client and outbox.
const PATIENCE: u64 = 3_600_000 * MS;

impl World {
    /// What there is when the seed begins, and what will happen.
    pub fn set_up(&mut self) {
        self.projects = (0..2).map(|_| Some(self.uuid().to_string())).collect();
        let mut transaction = self.postgres.begin();
        let users = ["ann", "bob", "cyd"];
        for project in self.projects.clone() {
            for user in users {
                if self.rng.random_bool(0.8) {
                    let row = vec![project.clone(), Some(user.into())];
                    transaction.write(&self.postgres.tables, (MEMBERS, row.clone()), Some(row), self.now);
                }
            }
            for table in [TASKS, NOTES, LABELS] {
                for _ in 0..2 {
                    let (id, text) = (self.uuid().to_string(), self.text());
                    self.ids[table].push(id.clone());
                    let mut row = vec![Some(id.clone()), project.clone(), Some(text)];
                    row.resize(self.postgres.tables[table].columns.len(), None);
                    transaction.write(&self.postgres.tables, (table, vec![Some(id)]), Some(row), self.now);
                }
            }
        }
        self.postgres.commit(transaction, Vec::new(), self.now, 600);
        self.postgres.show(self.postgres.last_xid());
        self.new_epoch();
        let count = self.rng.random_range(2..=3);
        for (index, user) in users.into_iter().take(count).enumerate() {
            let skew = [0, -86_400_000_000, 86_400_000_000_i64][self.rng.random_range(0..3)];
            let client = self.client(index, user, skew);
            self.clients.push(client);
            self.after(0, Event::Poll(index, 0));
            self.soon(300, Event::Connect(index, 0));
            for _ in 0..self.rng.random_range(4..=9) {
                self.soon(TROUBLE / MS, Event::App(index));
            }
            for _ in 0..3 {
                self.soon(TROUBLE / MS, Event::Person(index));
            }
        }
        self.after(0, Event::TakeOver);
        for _ in 0..self.rng.random_range(2..=6) {
            self.soon(TROUBLE / MS, Event::Sql);
        }
        for _ in 0..self.rng.random_range(3..=8) {
            self.soon(TROUBLE / MS, Event::Trouble);
        }
        self.after(TROUBLE, Event::Heal);
    }

    /// Runs to the end, and checks.
    pub fn run(&mut self) {
        while let Some(event) = self.next() {
            self.handle(event);
            if !self.trouble && self.is_quiet() {
                self.finish();
                return;
            }
            assert!(self.elapsed() < TROUBLE + PATIENCE, "does not come to rest: {}", self.restless());
        }
        panic!("nothing happens any more: {}", self.restless());
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::App(client) => self.app(client),
            Event::Person(client) => self.person(client),
            Event::Poll(client, run) => self.poll(client, run),
            Event::Connect(client, run) => self.connect(client, run),
            Event::ToEdge(session, text) => self.reach_edge(session, &text),
            Event::ToClient(session, text) => self.reach_client(session, &text),
            Event::EdgeGone(session) => self.sessions[session].end(),
            Event::ClientGone(session) => self.client_gone(session),
            Event::Open(session, hello, state, fence) => self.open(session, &hello, state, fence),
            Event::Lane(edge, run) => self.lane(edge, run),
            Event::Published(edge, run, stream, items) => self.published(edge, run, stream, items),
            Event::Tail(edge) => self.tail(edge),
            Event::Execute(executor) => self.execute(executor),
            Event::Commit(executor) => self.commit(executor),
            Event::TakeOver => self.take_over(),
            Event::Replicate => self.replicate(),
            Event::ReplicationUp => self.replication_up(),
            Event::Show(xid) => self.postgres.show(xid),
            Event::Sql => self.sql(),
            Event::Trouble => self.break_something(),
            Event::Heal => self.heal(),
        }
    }

    /// One thing breaks.
    fn break_something(&mut self) {
        if !self.trouble {
            return;
        }
        match self.rng.random_range(0..9) {
            0 | 1 => {
                let session = self.rng.random_range(0..=self.sessions.len());
                self.cut(session);
            }
            2 => {
                let edge = self.rng.random_range(0..self.edges.len());
                self.crash_edge(edge);
            }
            3 => self.break_broker(),
            4 => {
                trace!(self, "another executor takes the partition over");
                self.take_over();
            }
            5 if self.restores => {
                let taken = self.postgres.current.taken.clone();
                if self.postgres.restore() {
                    // As the operator has to: the edges stand meanwhile, and the inbound stream is made anew. Were its
                    // messages executed again, they would meet what clients submit again under other numbers.
                    trace!(self, "Postgres is restored");
                    (0..self.edges.len()).for_each(|edge| self.crash_edge(edge));
                    self.replication.is_up = false;
                    self.replication.is_lost = true;
                    self.renew_inbound();
                    self.soon(500, Event::ReplicationUp);
                    let kept: BTreeSet<_> = self.postgres.current.taken.iter().map(|taken| taken.change_id).collect();
                    self.checker.restored(taken.iter().map(|taken| taken.change_id).filter(|id| !kept.contains(id)));
                } else {
                    trace!(self, "Postgres is backed up");
                    self.postgres.back_up();
                    self.soon(5_000, Event::Trouble);
                }
            }
            6 if self.clones => self.copy_a_store(),
            _ => {
                let client = self.rng.random_range(0..self.clients.len());
                self.crash(client);
            }
        }
    }

    /// A writer beside Millstream: edits a row, or moves somebody into or out of a project.
    fn sql(&mut self) {
        let mut transaction = self.postgres.begin();
        let tables = postgres::tables();
        if self.rng.random_bool(0.4) {
            let user = ["ann", "bob", "cyd"][self.rng.random_range(0..3)];
            let project = self.projects[self.rng.random_range(0..self.projects.len())].clone();
            let row = vec![project.clone(), Some(user.to_owned())];
            let new = (!transaction.state.is_member(user, &project)).then(|| row.clone());
            trace!(self, "SQL: {user} {} a project", if new.is_some() { "joins" } else { "leaves" });
            transaction.write(&tables, (MEMBERS, row), new, self.now);
        } else {
            let table = self.rng.random_range(0..3);
            let id = self.ids[table][self.rng.random_range(0..self.ids[table].len())].clone();
            let key = (table, vec![Some(id)]);
            let Some(row) = transaction.state.rows.get(&key).map(|row| row.values.clone()) else { return };
            let column = if table == TASKS { 3 } else { 2 };
            let mut new = row.clone();
            new[column] = Some(self.text());
            trace!(self, "SQL: {} {:?}: {:?}", tables[table].name, key.1[0], new[column]);
            transaction.write(&tables, key, Some(new), self.now);
        }
        self.committed(transaction, Vec::new());
    }

    fn heal(&mut self) {
        trace!(self, "no more trouble");
        self.trouble = false;
        for client in 0..self.clients.len() {
            self.after(0, Event::Person(client));
        }
    }
}
