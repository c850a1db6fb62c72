//! One seed: time, chance, the events to come, and all that takes part.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use millstream_schemas::Value;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use uuid::Uuid;

use super::device::Client;
use super::event::{Event, MS};
use super::parts::{Broker, Edge, Executor, Replication, Session};
use super::postgres::Postgres;
use super::record::Checker;
use crate::trace;

/// Where the clock starts: microseconds since 1970.
const START: u64 = 1_764_000_000_000_000;
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

impl World {
    pub fn new(seed: u64, directory: &Path, tracing: bool) -> World {
        let mut rng = StdRng::seed_from_u64(seed);
        let crashing = POINTS.filter(|_| rng.random_bool(0.5)).collect();
        let (restores, clones) = (rng.random_bool(0.15), rng.random_bool(0.15));
        World {
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

    /// The next event; it is its time now.
    pub fn next(&mut self) -> Option<Event> {
        let ((at, _), event) = self.queue.pop_first()?;
        self.now = at.max(self.now);
        self.clock.store(self.now, Ordering::Relaxed);
        Some(event)
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
