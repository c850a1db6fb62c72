//! Clients: the real outbox, staging and store, driven as the SDK's workers drive them.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use millstream_client_core::outbox::{Input, Output};
use millstream_client_core::replica::{Replica, Step, Work};
use millstream_client_store::{Applied, Edit, Meeting, Performing, Recorded, Store, StoreError, Tx};
use millstream_schemas::Code;
use millstream_schemas::frame::{Hello, ServerFrame};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use rusqlite::types::Value;

use super::device::{Client, FakeHost, length, log_of, template};
use super::event::{Event, MS, PAUSE};
use super::postgres::{LABELS, NOTES, TASKS};
use super::world::World;
use crate::trace;

impl World {
    pub fn client(&mut self, index: usize, user: &str, skew: i64) -> Client {
        let rng = Mutex::new(StdRng::seed_from_u64(self.rng.random()));
        let host = Arc::new(FakeHost { clock: self.clock.clone(), skew, rng });
        let path = self.directory.join(format!("{index}-0.db"));
        std::fs::write(&path, template()).expect("an empty store");
        let mut store = Store::open(&path.to_string_lossy(), host.clone()).expect("a store");
        store.set_max_attempts(3);
        self.checker.stores.push(Default::default());
        trace!(self, "client {index}: {user}, clock {} s", skew / 1_000_000);
        let synced = length(&path);
        Client::with(user, Some(store), host, path, synced)
    }

    /// The process dies: nothing is closed, the file is opened again. Sometimes the machine loses power.
    pub fn crash(&mut self, index: usize) {
        let (client, power) = (&self.clients[index], self.rng.random_bool(0.3));
        let all = length(&client.path);
        let keep = if power { self.rng.random_range(client.synced.min(all)..=all) } else { u64::MAX };
        let path = self.directory.join(format!("{index}-{}.db", client.run + 1));
        self.clients[index].copy(&path, keep);
        trace!(self, "client {index} crashes{}", if keep < all { ", with loss of power" } else { "" });
        self.reopen(index, path, keep < all);
    }

    /// Goes on with another file.
    fn reopen(&mut self, index: usize, path: PathBuf, back: bool) {
        if let Some(session) = self.clients[index].session {
            self.sessions[session].is_cut = true;
            self.soon(100, Event::EdgeGone(session));
        }
        let client = &mut self.clients[index];
        client.reader = None;
        client.store = None;
        let _ = std::fs::remove_file(&client.path);
        let mut store = Store::open(&path.to_string_lossy(), client.host.clone()).expect("a store");
        store.set_max_attempts(3);
        client.store = Some(store);
        client.path = path;
        client.synced = length(&client.path);
        (client.session, client.replica) = (None, None);
        client.run += 1;
        client.opened();
        let run = client.run;
        if back {
            self.checker.stores[index].forget_shown();
        }
        self.check(index, "reopened");
        self.after(0, Event::Poll(index, run));
        self.soon(2_000, Event::Connect(index, run));
    }

    /// Somebody copies the store, and both go on.
    pub fn copy_a_store(&mut self) {
        let index = self.rng.random_range(0..self.clients.len());
        let info = self.clients[index].store().info().expect("the store's facts");
        // What failed is with both copies then, and both may try it again: known, and not an error here. Of three copies that
        // have not met the server yet, two have to take what was not sent for their own.
        let id = |client: &Client| client.store.as_ref().and_then(|store| store.info().ok()).map(|info| info.client_id);
        let copies = self.clients.iter().filter(|client| id(client) == Some(info.client_id)).count();
        if self.clients.len() > 3 || info.failed + info.held > 0 || copies > 1 {
            return;
        }
        let new = self.clients.len();
        trace!(self, "client {index} is copied: client {new}");
        let path = self.directory.join(format!("{new}-0.db"));
        self.clients[index].copy(&path, u64::MAX);
        let rng = Mutex::new(StdRng::seed_from_u64(self.rng.random()));
        let host = Arc::new(FakeHost { clock: self.clock.clone(), skew: self.clients[index].host.skew, rng });
        let mut store = Store::open(&path.to_string_lossy(), host.clone()).expect("a store");
        store.set_max_attempts(3);
        let (user, synced) = (self.clients[index].user.clone(), length(&path));
        self.clients.push(Client::with(&user, Some(store), host, path, synced));
        let copy = self.checker.stores[index].clone();
        self.checker.stores.push(copy);
        self.after(0, Event::Poll(new, 0));
        self.soon(500, Event::Connect(new, 0));
        for _ in 0..5 {
            self.soon(8_000, Event::App(new));
        }
    }

    /// The app writes one transaction, or a few that share a commit.
    pub fn app(&mut self, index: usize) {
        if !self.trouble {
            return;
        }
        let count = if self.rng.random_bool(0.2) { self.rng.random_range(2..=4) } else { 1 };
        let plans: Vec<Vec<(String, Vec<Value>)>> = (0..count).map(|_| self.statements()).collect();
        let path = self.directory.join(format!("{index}-{}.db", self.clients[index].run + 1));
        let crash = count > 1 && self.crashes_at(40);
        let client = &mut self.clients[index];
        let (old, mut written) = (client.path.clone(), Vec::new());
        let write = |store: &mut Store, plan: &[(String, Vec<Value>)]| {
            let run = |tx: &mut Tx<'_>| plan.iter().try_for_each(|(sql, values)| tx.execute(sql, values).map(drop));
            store.write::<(), StoreError>(None, run).expect("a write").recorded
        };
        if count == 1 {
            written.extend(write(client.store(), &plans[0]));
        } else {
            let group = |store: &mut Store| {
                for (place, plan) in plans.iter().enumerate() {
                    if crash && place + 1 == count {
                        // In the middle of the group: nothing of it is durable.
                        std::fs::copy(&old, &path).expect("a copy");
                        let _ = std::fs::copy(log_of(&old), log_of(&path));
                    }
                    written.extend(write(store, plan));
                }
            };
            client.store().group(group).expect("a group");
        }
        if crash {
            return self.reopen(index, path, false);
        }
        client.synced = length(&client.path);
        for Recorded { tx, entry, .. } in &written {
            self.recorded(index, *tx);
            trace!(
                self,
                "client {index} writes {tx}: {}",
                match entry {
                    Some(entry) => entry.text.as_str(),
                    None => "held",
                }
            );
        }
        self.check(index, "written");
        if self.crashes_at(40) {
            return self.crash(index);
        }
        // The bus loses and repeats.
        let entries: Vec<_> = written.into_iter().filter_map(|recorded| recorded.entry).collect();
        for _ in 0..[1, 1, 1, 0, 2][self.rng.random_range(0..5)] {
            self.input(index, Input::Recorded(entries.clone()));
        }
    }

    /// One transaction's statements.
    fn statements(&mut self) -> Vec<(String, Vec<Value>)> {
        let count = if self.rng.random_bool(0.3) { self.rng.random_range(2..=3) } else { 1 };
        (0..count).map(|_| self.statement()).collect()
    }

    fn statement(&mut self) -> (String, Vec<Value>) {
        let table = [TASKS, TASKS, NOTES, LABELS][self.rng.random_range(0..4)];
        let name = ["tasks", "notes", "labels"][table];
        let text = |text: String| Value::Text(text);
        let project = self.projects[self.rng.random_range(0..self.projects.len())].clone().unwrap_or_default();
        let (one, two) = (self.text(), self.text());
        let title = if self.rng.random_bool(0.4) { format!("t{}", self.rng.random_range(0..3)) } else { two };
        let known = self.ids[table].len();
        let id = self.ids[table][self.rng.random_range(0..known)].clone();
        let column = ["note", "body", "name"][table];
        match self.rng.random_range(0..10) {
            0 | 1 => {
                let id = self.uuid().to_string();
                self.ids[table].push(id.clone());
                if table == TASKS {
                    let sql = "INSERT INTO tasks (id, project_id, title, note) VALUES (?1, ?2, ?3, ?4)";
                    return (sql.into(), vec![text(id), text(project), text(title), text(one)]);
                }
                if table == NOTES && self.rng.random_bool(0.7) {
                    let task = self.any_task();
                    let sql = "INSERT INTO notes (id, project_id, body, task_id, count) VALUES (?1, ?2, ?3, ?4, 0)";
                    return (sql.into(), vec![text(id), text(project), text(one), task]);
                }
                let sql = format!("INSERT INTO {name} (id, project_id, {column}) VALUES (?1, ?2, ?3)");
                (sql, vec![text(id), text(project), text(one)])
            }
            // With what is about it, as far as the app knows, or before, or not.
            2 if table == TASKS && self.rng.random_bool(0.3) => {
                ("DELETE FROM notes WHERE task_id = ?1".into(), vec![text(id)])
            }
            2 => (format!("DELETE FROM {name} WHERE id = ?1"), vec![text(id)]),
            4 if table == NOTES => {
                ("UPDATE notes SET task_id = ?2 WHERE id = ?1".into(), vec![text(id), self.any_task()])
            }
            5 | 6 if table == NOTES => {
                let by = Value::Integer(self.rng.random_range(-5..=5));
                ("UPDATE notes SET count = coalesce(count, 0) + ?2 WHERE id = ?1".into(), vec![text(id), by])
            }
            3 => (format!("UPDATE {name} SET project_id = ?2 WHERE id = ?1"), vec![text(id), text(project)]),
            4 | 5 if table == TASKS => {
                ("UPDATE tasks SET title = ?2 WHERE id = ?1".into(), vec![text(id), text(title)])
            }
            6 if table == TASKS => {
                let sql = "UPDATE tasks SET title = ?2, note = ?3 WHERE id = ?1";
                (sql.into(), vec![text(id), text(title), text(one)])
            }
            _ => (format!("UPDATE {name} SET {column} = ?2 WHERE id = ?1"), vec![text(id), text(one)]),
        }
    }

    /// One of the newest tasks, which may be on its way, or any.
    fn any_task(&mut self) -> Value {
        let tasks = self.ids[TASKS].len();
        let first = if self.rng.random_bool(0.6) { tasks.saturating_sub(2) } else { 0 };
        Value::Text(self.ids[TASKS][self.rng.random_range(first..tasks)].clone())
    }

    /// A person retries, edits or discards what failed.
    pub fn person(&mut self, index: usize) {
        let failed = self.clients[index].store().failed().expect("the failed ones");
        for write in failed {
            if self.trouble && self.rng.random_bool(0.5) {
                continue;
            }
            let (choice, title) = (self.rng.random_range(0..3), self.text());
            // What comes before may have been discarded meanwhile, or this may wait again.
            let store = self.clients[index].store.as_mut().expect("an open store");
            let editable = write.changes.iter().find(|change| change.columns.iter().any(|name| name == "title"));
            let result = match (choice, editable) {
                (0, Some(change)) => {
                    let (change_id, column) = (Some(change.change_id), "title".to_owned());
                    store.edit(write.tx, &[Edit { change_id, column, value: Some(title) }]).map(drop)
                }
                (1, _) => store.retry(write.tx).map(drop),
                _ => {
                    self.checker.stores[index].discarded(write.tx);
                    store.discard(write.tx)
                }
            };
            trace!(self, "client {index}: {} {}", ["edits", "retries", "discards"][choice], write.tx);
            result.expect("what a person does");
            let client = &mut self.clients[index];
            client.synced = length(&client.path);
            self.check(index, "a person did something");
        }
        self.pulse(index);
    }

    /// What the writer tells the changes worker again and again.
    fn pulse(&mut self, index: usize) {
        let info = self.clients[index].store().info().expect("the store's facts");
        self.input(index, Input::Confirmed { client_seq: info.confirmed_seq });
        self.input(index, Input::Known { last: info.last_seq });
    }

    pub fn poll(&mut self, index: usize, run: u64) {
        let client = &mut self.clients[index];
        if client.run != run {
            return;
        }
        let due = client.store().info().expect("the store's facts").failed > 0;
        if due && client.store().retry_due().expect("retries") {
            client.synced = length(&client.path);
            trace!(self, "client {index} tries again");
            self.check(index, "tried again");
        }
        if self.rng.random_bool(0.1) {
            self.clients[index].store().flush_marks().expect("marks");
        }
        self.perform(index);
        self.pulse(index);
        self.input(index, Input::Tick);
        if let Some(session) = self.clients[index].session {
            self.pump(session);
        }
        self.after(PAUSE, Event::Poll(index, run));
    }

    fn input(&mut self, index: usize, input: Input) {
        let run = self.clients[index].run;
        let mut inputs = vec![input];
        while let Some(input) = inputs.pop() {
            let now = self.elapsed() / MS;
            for output in self.clients[index].outbox.handle(input, now) {
                match output {
                    Output::Send(entry) => {
                        let Some(session) = self.clients[index].session else { continue };
                        if self.crashes_at(41) {
                            return self.crash(index);
                        }
                        trace!(self, "client {index} sends {}", entry.client_seq);
                        self.send_up(session, entry.text);
                        if self.crashes_at(42) {
                            if self.rng.random_bool(0.5) {
                                self.cut(session);
                            } else {
                                return self.crash(index);
                            }
                        }
                    }
                    Output::Load { after, limit } => {
                        let limit = limit.min(self.rng.random_range(1..8));
                        let found = self.clients[index].store().entries_after(after, limit).expect("entries");
                        inputs.push(Input::Loaded(found));
                    }
                    Output::Mark { sent, accepted } => self.clients[index].store().mark(sent, accepted),
                }
            }
            if self.clients[index].run != run {
                return;
            }
        }
    }

    pub fn connect(&mut self, index: usize, run: u64) {
        let client = &mut self.clients[index];
        if client.run != run || client.session.is_some() {
            return;
        }
        let info = client.store().info().expect("the store's facts");
        let known = info.position.filter(|_| !info.resync);
        let hello = Hello {
            protocol: 1,
            client_id: info.client_id,
            token: client.user.clone(),
            schema: info.schema,
            position: known,
            scopes: if known.is_some() { info.scopes } else { Vec::new() },
            scopes_digest: None,
            confirmed_seq: info.confirmed_seq,
            snapshot: None,
            credit: None,
        };
        trace!(self, "client {index} connects at {:?}, confirmed {}", known.map(|p| p.stream_seq), info.confirmed_seq);
        let session = self.connected(index, hello);
        self.clients[index].session = Some(session);
    }

    pub fn client_gone(&mut self, session: usize) {
        let index = self.sessions[session].client;
        if self.clients[index].session == Some(session) {
            self.hang_up(index, 1_500);
        }
    }

    /// Ends the session, and comes back.
    fn hang_up(&mut self, index: usize, within: u64) {
        let client = &mut self.clients[index];
        let Some(session) = client.session.take() else { return };
        client.replica = None;
        let run = client.run;
        self.sessions[session].is_cut = true;
        self.soon(100, Event::EdgeGone(session));
        self.input(index, Input::Disconnected);
        self.soon(within, Event::Connect(index, run));
    }

    pub fn reach_client(&mut self, session: usize, text: &str) {
        self.frames -= 1;
        let index = self.sessions[session].client;
        if self.sessions[session].is_cut || self.clients[index].session != Some(session) {
            return;
        }
        let frame: ServerFrame = serde_json::from_str(text).expect("an edge's frame");
        trace!(self, "client {index} gets {}", text.get(..400).unwrap_or(text));
        if let ServerFrame::Welcome(welcome) = frame {
            let meeting = self.clients[index]
                .store()
                .meet(welcome.last_seq, &welcome.runs, &welcome.failed, &welcome.lost)
                .expect("a meeting");
            trace!(self, "client {index} is welcomed: ledger {}, {:?}, {meeting:?}", welcome.last_seq, welcome.resume);
            let client = &mut self.clients[index];
            client.synced = length(&client.path);
            if meeting != Meeting::Continue {
                self.checker.stores[index].forget_shown();
                self.pulse(index);
            }
            self.check(index, "met");
            if meeting == Meeting::NewIdentity {
                return self.hang_up(index, 0);
            }
            self.clients[index].replica = Some(Replica::new(welcome.resume).spilling_above(500));
            let (last_seq, window) = (welcome.last_seq, welcome.limits.window);
            return self.input(index, Input::Connected { last_seq, window });
        }
        let Some(replica) = self.clients[index].replica.as_mut() else {
            // An error instead of a welcome.
            return self.hang_up(index, 1_000);
        };
        match replica.handle(frame, text.len()).expect("the protocol") {
            None => {}
            Some(ServerFrame::Accepted { client_seq }) => self.input(index, Input::Accepted { client_seq }),
            Some(ServerFrame::Error(error)) if error.fatal => {
                trace!(self, "client {index} is sent away: {}", error.code);
                if error.code == Code::EpochChanged {
                    self.clients[index].store().forget_position().expect("to forget");
                }
                return self.hang_up(index, 1_000);
            }
            Some(ServerFrame::Error(error)) => {
                self.input(index, Input::Refused { retry_after_ms: error.retry_after_ms });
            }
            Some(other) => panic!("out of place: {other:?}"),
        }
        if self.rng.random_bool(0.8) || !self.trouble {
            self.perform(index);
        }
    }

    /// Applies what is whole.
    fn perform(&mut self, index: usize) {
        let works = self.clients[index].replica.as_mut().map(Replica::take).unwrap_or_default();
        if works.is_empty() {
            return;
        }
        let confirms = |work: &Work| match work {
            Work::Apply(batch) => batch.steps.iter().any(|step| matches!(step, Step::Confirmed(_))),
            _ => false,
        };
        if self.trouble {
            if works.iter().any(confirms) && self.crashes_at(45) {
                return self.crash(index);
            }
            if self.crashes_at(48) {
                return self.crash(index);
            }
            if self.crashes_at(49) {
                return self.crash_applying(index, &works);
            }
        }
        let (run, size) = (self.clients[index].run, self.rng.random_range(1..=8));
        let mut performing = Performing::new(works).in_slices_of(size);
        while !performing.is_done() && self.clients[index].run == run {
            match self.clients[index].store().perform_slice(&mut performing) {
                Ok(None) => {}
                Ok(Some(applied)) => self.performed(index, &applied),
                Err(StoreError::Copied) => {
                    trace!(self, "client {index} meets its copy");
                    return self.hang_up(index, 1_000);
                }
                Err(error) => panic!("the store: {error:?}"),
            }
            // What the app does comes in between, and the end may.
            if self.trouble && !performing.is_done() {
                if self.crashes_at(49) {
                    return self.crash(index);
                }
                if self.rng.random_bool(0.1) {
                    self.app(index);
                }
            }
        }
    }

    fn performed(&mut self, index: usize, applied: &Applied) {
        trace!(
            self,
            "client {index} applies up to {:?}: {:?}",
            applied.position.map(|p| p.stream_seq),
            applied.settled.iter().map(|s| (s.tx, s.result.as_ref().map_err(|f| f.code.as_str()))).collect::<Vec<_>>()
        );
        if applied.released {
            let client = &mut self.clients[index];
            client.synced = length(&client.path);
        }
        self.applied(index, applied.position);
        self.check(index, "applied");
        self.pulse(index);
    }

    /// The process dies after it applied, before the commit.
    fn crash_applying(&mut self, index: usize, works: &[Work]) {
        let path = self.directory.join(format!("{index}-{}.db", self.clients[index].run + 1));
        let client = &mut self.clients[index];
        let old = client.path.clone();
        let group = |store: &mut Store| {
            for work in works {
                if let Work::Apply(batch) = work {
                    let _ = store.apply(batch);
                }
            }
            std::fs::copy(&old, &path).expect("a copy");
            let _ = std::fs::copy(log_of(&old), log_of(&path));
        };
        client.store().group(group).expect("a group");
        self.reopen(index, path, false);
    }

    /// Nothing to do, nothing on the way.
    pub fn is_settled(&mut self, index: usize) -> bool {
        let length = self.broker.outbound.len();
        let Some(session) = self.clients[index].session else { return false };
        let applied = self.clients[index].replica.as_ref().is_some_and(|replica| !replica.is_ready());
        if !applied || !self.sessions[session].is_idle(length) {
            return false;
        }
        let info = self.clients[index].store().info().expect("the store's facts");
        info.last_seq == info.confirmed_seq && !info.resync && self.clients[index].waiting() == 0
    }
}
