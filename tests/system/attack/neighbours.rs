//! Honest clients beside an attack: each changes a row of its own now and then, and measures how long the confirmation takes
//! and how long until another one is sent the change.
//!
//! They run on a thread of their own, so that what an attack costs this process does not count as the edge's delay. A write
//! that was due while its client could not send counts from when it was due: a stall is not hidden by a client that waits.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use millstream_schemas::TableOp;
use millstream_schemas::frame::{Confirmed, SUBMIT_WINDOW, ServerFrame};
use serde_json::{Value, json};
use uuid::Uuid;

use super::peer::{Heard, Peer};

/// Each writes this often.
const PACE: Duration = Duration::from_millis(50);
/// After a session has ended, until the next try.
const BACK_OFF: Duration = Duration::from_millis(200);

/// A write, and what became of it.
#[derive(Clone, Copy)]
struct Sample {
    due: Instant,
    confirmed: Option<Instant>,
    arrived: Option<Instant>,
}

/// Where they connect, and as whom.
#[derive(Clone)]
pub struct Seats {
    pub url: String,
    /// Token and client id of each.
    pub seats: Vec<(String, Uuid)>,
}

type Samples = Arc<Mutex<Vec<Vec<Sample>>>>;

/// The neighbours of an attack.
pub struct Neighbours {
    samples: Samples,
    faults: Arc<Mutex<Vec<String>>>,
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

/// How long writes of a span of time took.
#[derive(Clone, Copy, Debug)]
pub struct Latencies {
    pub writes: usize,
    /// Half of the writes were confirmed, and had reached another client, within these times.
    pub p50: (Duration, Duration),
    /// 99 of 100.
    pub p99: (Duration, Duration),
}

impl std::fmt::Display for Latencies {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ms = |d: Duration| d.as_millis();
        let ((a, b), (c, d)) = (self.p50, self.p99);
        let writes = self.writes;
        write!(f, "{writes} writes confirmed p50 {} p99 {} ms, elsewhere p50 {} p99 {} ms", ms(a), ms(c), ms(b), ms(d))
    }
}

impl Neighbours {
    /// Starts them.
    pub fn start(seats: Seats) -> Result<Neighbours> {
        let samples: Samples = Arc::new(Mutex::new(vec![Vec::new(); seats.seats.len()]));
        let (stop, faults) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let all = (samples.clone(), stop.clone(), faults.clone());
        let thread = std::thread::spawn(move || {
            runtime.block_on(async {
                let mut tasks = tokio::task::JoinSet::new();
                for number in 0..seats.seats.len() {
                    let (samples, stop, faults) = all.clone();
                    tasks.spawn(Neighbour::new(number, seats.clone(), samples, faults).live(stop));
                }
                tasks.join_all().await;
            });
        });
        Ok(Neighbours { samples, faults, stop, thread: Some(thread) })
    }

    /// Of the writes that were due in a span of time; those that are not through yet count with their age.
    pub fn between(&self, from: Instant, to: Instant) -> Latencies {
        let (now, samples) = (Instant::now(), self.samples.lock().expect("no panic"));
        let due = || samples.iter().flatten().filter(|sample| sample.due >= from && sample.due < to);
        let sorted = |times: &mut dyn Iterator<Item = Duration>| -> Vec<Duration> {
            let mut times: Vec<Duration> = times.collect();
            times.sort_unstable();
            times
        };
        let confirmed = sorted(&mut due().map(|s| s.confirmed.unwrap_or(now).duration_since(s.due)));
        let arrived = sorted(&mut due().map(|s| s.arrived.unwrap_or(now).duration_since(s.due)));
        let at = |hundredth: usize| {
            let of = |times: &[Duration]| times.get(times.len() * hundredth / 100).copied().unwrap_or_default();
            (of(&confirmed), of(&arrived))
        };
        Latencies { writes: confirmed.len(), p50: at(50), p99: at(99) }
    }

    /// When a write of each that was due at or after an instant had got through; none if some did not yet.
    pub fn through(&self, since: Instant) -> Option<Instant> {
        let samples = self.samples.lock().expect("no panic");
        let first = |all: &Vec<Sample>| {
            let done = |s: &Sample| s.confirmed.zip(s.arrived).map(|(a, b)| a.max(b));
            all.iter().filter(|sample| sample.due >= since).find_map(done)
        };
        samples.iter().map(first).collect::<Option<Vec<_>>>().and_then(|all| all.into_iter().max())
    }

    /// Refusals that none of them should have got.
    pub fn faults(&self) -> Vec<String> {
        self.faults.lock().expect("no panic").clone()
    }
}

impl Drop for Neighbours {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Neighbour {
    number: usize,
    seats: Seats,
    samples: Samples,
    faults: Arc<Mutex<Vec<String>>>,
    run_id: Uuid,
    next: Instant,
    confirmed: u64,
    /// Submitted and not confirmed, with when it was due.
    unsettled: BTreeMap<u64, Value>,
    client_seq: u64,
}

impl Neighbour {
    fn new(number: usize, seats: Seats, samples: Samples, faults: Arc<Mutex<Vec<String>>>) -> Neighbour {
        let (run_id, next) = (Uuid::new_v4(), Instant::now());
        Neighbour {
            number,
            seats,
            samples,
            faults,
            run_id,
            next,
            confirmed: 0,
            unsettled: BTreeMap::new(),
            client_seq: 0,
        }
    }

    async fn live(mut self, stop: Arc<AtomicBool>) {
        while !stop.load(Ordering::Relaxed) {
            if self.session(&stop).await.is_err() {
                self.due();
                tokio::time::sleep(BACK_OFF).await;
            }
        }
    }

    /// Makes the writes that are due by now, and gives them.
    fn due(&mut self) -> Vec<Value> {
        let mut new = Vec::new();
        while self.next <= Instant::now() {
            let due = self.next;
            self.next += PACE;
            if self.unsettled.len() + 1 >= SUBMIT_WINDOW as usize {
                continue;
            }
            self.client_seq += 1;
            let (client_seq, task) = (self.client_seq, format!("neighbour-{}", self.number));
            let change = json!({"change_id": Uuid::now_v7(), "table": "tasks", "op": "update", "key": [task],
                "columns": ["title"], "values": [format!("{} {client_seq}", self.number)], "stamp": client_seq});
            let frame = json!({"type": "submit", "client_seq": client_seq, "attempt": 1, "run_id": self.run_id, "changes": [change]});
            self.samples.lock().expect("no panic")[self.number].push(Sample { due, confirmed: None, arrived: None });
            self.unsettled.insert(client_seq, frame.clone());
            new.push(frame);
        }
        new
    }

    async fn session(&mut self, stop: &AtomicBool) -> Result<()> {
        let (token, client_id) = self.seats.seats[self.number].clone();
        let mut peer = Peer::connect(&self.seats.url).await?;
        let mut hello = millstream_tests::raw::hello(client_id, &token);
        hello["confirmed_seq"] = self.confirmed.into();
        peer.say(hello).await?;
        let welcome = peer.welcome().await?;
        for frame in self.unsettled.range(welcome.last_seq + 1..).map(|(_, frame)| frame.clone()) {
            peer.say(frame).await?;
        }
        while !stop.load(Ordering::Relaxed) {
            for frame in self.due() {
                peer.say(frame).await?;
            }
            match peer.next(self.next.saturating_duration_since(Instant::now())).await {
                Heard::Text(text) => self.heard(serde_json::from_str(&text)?)?,
                Heard::Silence => {}
                Heard::Closed => bail!("closed"),
            }
        }
        Ok(())
    }

    fn heard(&mut self, frame: ServerFrame) -> Result<()> {
        let now = Instant::now();
        match frame {
            ServerFrame::Confirmed(Confirmed { client_seq, failed, .. }) => {
                let mut samples = self.samples.lock().expect("no panic");
                while let Some((settled, _)) = self.unsettled.first_key_value().filter(|(next, _)| **next <= client_seq)
                {
                    let settled = *settled;
                    self.unsettled.remove(&settled);
                    if let Some(sample) = samples[self.number].get_mut(settled as usize - 1) {
                        sample.confirmed.get_or_insert(now);
                    }
                }
                self.confirmed = self.confirmed.max(client_seq);
                let mut faults = self.faults.lock().expect("no panic");
                faults.extend(failed.into_iter().map(|failure| format!("{}: {}", failure.code, failure.message)));
            }
            ServerFrame::Rows(rows) => {
                let changes = rows.changes.iter().filter(|change| change.table == "tasks");
                for row in changes.filter(|change| change.op == TableOp::Upsert).flat_map(|change| &change.rows) {
                    self.arrived(row, now);
                }
            }
            ServerFrame::SnapshotRows { changes, .. } => {
                for row in changes.iter().filter(|change| change.table == "tasks").flat_map(|change| &change.rows) {
                    self.arrived(row, now);
                }
            }
            ServerFrame::Error(error) => {
                ensure!(error.retry_after_ms.is_some(), "{}: {}", error.code, error.message);
                bail!("{}", error.code);
            }
            _ => {}
        }
        Ok(())
    }

    /// A title as [`Self::due`] writes it, of the neighbour whose writes are watched here: it and all before have arrived.
    fn arrived(&self, row: &[Option<String>], now: Instant) {
        let Some(Some(title)) = row.get(2) else { return };
        let Some((Ok(number), Ok(client_seq))) =
            title.split_once(' ').map(|(a, b)| (a.parse::<usize>(), b.parse::<usize>()))
        else {
            return;
        };
        if (number + 1) % self.seats.seats.len() != self.number {
            return;
        }
        let mut samples = self.samples.lock().expect("no panic");
        for sample in samples[number].iter_mut().take(client_seq).rev().take_while(|sample| sample.arrived.is_none()) {
            sample.arrived = Some(now);
        }
    }
}
