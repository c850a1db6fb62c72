//! Time, events, chance and trouble of one seed.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use millstream_edge::for_simulation::Fence;
use millstream_schemas::Value;
use millstream_schemas::frame::Hello;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use uuid::Uuid;

use super::broker::{Broker, Executor, Replication, Stored};
use super::checker::Checker;
use super::client::Client;
use super::edge::{Edge, Session};
use super::postgres::{self, LABELS, MEMBERS, NOTES, Postgres, State, TASKS};

/// A millisecond.
pub const MS: u64 = 1_000;
/// Where the clock starts: microseconds since 1970.
const START: u64 = 1_764_000_000_000_000;
/// How long trouble lasts.
const TROUBLE: u64 = 12_000 * MS;
/// Everything is settled within this time after the last trouble: the longest back-offs of client and outbox.
const PATIENCE: u64 = 3_600_000 * MS;
/// The steps of a change at which something crashes; see requirements 40 to 49.
pub const POINTS: std::ops::RangeInclusive<usize> = 40..=49;

/// Crashes by step.
#[derive(Clone, Debug, Default)]
pub struct Points([u64; 10]);

impl Points {
    pub fn add(&mut self, other: &Points) {
        self.0.iter_mut().zip(other.0).for_each(|(hits, more)| *hits += more);
    }

    pub fn of(&self, point: usize) -> u64 {
        self.0[point - POINTS.start()]
    }
}

impl fmt::Display for Points {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        POINTS.zip(self.0).try_for_each(|(point, hits)| write!(f, "{point}: {hits}  "))
    }
}

/// What happens.
pub enum Event {
    /// The app of a client writes.
    App(usize),
    /// A person looks at what failed.
    Person(usize),
    /// A client's own pulse; the second: which run of it.
    Poll(usize, u64),
    Connect(usize, u64),
    /// A frame arrives.
    ToEdge(usize, String),
    ToClient(usize, String),
    /// One side hears that the session is cut.
    EdgeGone(usize),
    ClientGone(usize),
    /// The edge has read what it needs for a session.
    Open(usize, Box<Hello>, Rc<State>, Fence),
    /// A lane publishes; the second: which run of the edge.
    Lane(usize, u64),
    /// The third: which inbound stream, as [`crate::simulation::broker::Broker`] counts them.
    Published(usize, u64, u64, Vec<Stored>),
    /// An edge reads the outbound stream.
    Tail(usize),
    /// An executor reads, and commits.
    Execute(usize),
    Commit(usize),
    TakeOver,
    Replicate,
    ReplicationUp,
    /// A commit becomes visible.
    Show(u32),
    /// A writer that knows nothing of Millstream.
    Sql,
    /// Something breaks.
    Trouble,
    Heal,
}

pub fn directory() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    let made = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
    made.expect("a directory for the stores")
}

pub struct World {
    pub directory: PathBuf,
    pub now: u64,
    /// The same for the hosts of stores.
    pub clock: Arc<AtomicU64>,
    pub rng: StdRng,
    pub tracing: bool,
    /// Things break.
    pub trouble: bool,
    pub points: Points,
    /// Steps at which this seed crashes.
    crashing: BTreeSet<usize>,
    queue: BTreeMap<(u64, u64), Event>,
    events: u64,
    pub frames: usize,
    pub postgres: Postgres,
    pub broker: Broker,
    pub executors: Vec<Executor>,
    pub replication: Replication,
    pub edges: Vec<Edge>,
    pub sessions: Vec<Session>,
    pub clients: Vec<Client>,
    pub checker: Checker,
    pub projects: Vec<Value>,
    /// Keys of the rows that there are or were, by table.
    pub ids: [Vec<String>; 3],
    texts: u64,
    /// Postgres is restored, or stores are copied, in this seed.
    pub restores: bool,
    pub clones: bool,
}

/// A line on stderr, past the test harness, when one seed is replayed.
#[macro_export]
macro_rules! trace {
    ($world:expr, $($text:tt)*) => {
        if $world.tracing {
            $crate::simulation::say(format_args!("{:>10.3}  {}", $world.elapsed() as f64 / 1e6, format_args!($($text)*)));
        }
    };
}

impl World {
    pub fn new(seed: u64, directory: &Path, tracing: bool) -> World {
        let mut rng = StdRng::seed_from_u64(seed);
        let crashing = POINTS.filter(|_| rng.random_bool(0.5)).collect();
        let (restores, clones) = (rng.random_bool(0.15), rng.random_bool(0.15));
        let mut world = World {
            directory: directory.to_owned(),
            now: START,
            clock: Arc::new(AtomicU64::new(START)),
            rng,
            tracing,
            trouble: true,
            points: Points::default(),
            crashing,
            queue: BTreeMap::new(),
            events: 0,
            frames: 0,
            postgres: Postgres::new(),
            broker: Broker::default(),
            executors: Vec::new(),
            replication: Replication::default(),
            edges: vec![Edge::default(), Edge::default()],
            sessions: Vec::new(),
            clients: Vec::new(),
            checker: Checker::default(),
            projects: Vec::new(),
            ids: Default::default(),
            texts: 0,
            restores,
            clones,
        };
        world.set_up();
        world
    }

    fn set_up(&mut self) {
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
            let client = Client::new(self, index, user, skew);
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
        while let Some(((at, _), event)) = self.queue.pop_first() {
            self.now = at.max(self.now);
            self.clock.store(self.now, Ordering::Relaxed);
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

    /// Whether this is where the seed crashes. Counted as a crash.
    pub fn crashes_at(&mut self, point: usize) -> bool {
        // Some are reached much more often: with each batch that a client applies, or an edge sends.
        let chance = match point {
            48 => 0.004,
            45 | 49 => 0.01,
            _ => 0.03,
        };
        let hit = self.trouble && self.crashing.contains(&point) && self.rng.random_bool(chance);
        if hit {
            self.points.0[point - POINTS.start()] += 1;
            trace!(self, "CRASH at step {point}");
        }
        hit
    }

    pub fn elapsed(&self) -> u64 {
        self.now - START
    }

    /// Something with this chance, while there is trouble.
    pub fn bad_luck(&mut self, chance: f64) -> bool {
        self.trouble && self.rng.random_bool(chance)
    }

    pub fn after(&mut self, micros: u64, event: Event) {
        self.events += 1;
        self.queue.insert((self.now + micros, self.events), event);
    }

    /// Within so many milliseconds.
    pub fn soon(&mut self, ms: u64, event: Event) {
        let wait = self.rng.random_range(0..=ms * MS);
        self.after(wait, event);
    }

    pub fn uuid(&mut self) -> Uuid {
        Uuid::from_u128(self.rng.random())
    }

    /// A text that nobody wrote before.
    pub fn text(&mut self) -> String {
        self.texts += 1;
        format!("v{}", self.texts)
    }
}
