//! The two phases: latency at a steady rate, and throughput.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use hdrhistogram::Histogram;
use millstream_client::{Client, SqlValue};
use millstream_schemas::frame::SUBMIT_WINDOW;
use millstream_stack::{Service, Stack};
use sqlx::Connection as _;
use sqlx::postgres::PgConnection;
use tokio::time::timeout;
use uuid::Uuid;

use crate::cpu::{self, PerChange, Sample};
use crate::error::Error;

/// How long clients may take for their first snapshot, and at the end for the last of their changes.
pub const SETTLE_LIMIT: Duration = Duration::from_secs(60);
/// Timers wake up to a millisecond late: the writer wakes this much early and waits out the rest awake.
const EARLY: Duration = Duration::from_millis(2);
/// Longest latency that is told apart, in microseconds.
const MAX_LATENCY_US: u64 = 120_000_000;

const INSERT: &str = "INSERT INTO tasks (id, project_id, title, done, position) VALUES (?, ?, ?, 0, ?)";

/// Flags of `millstream bench loop`.
#[derive(clap::Args, Clone, Debug)]
pub struct LoopArgs {
    /// Print one JSON object instead of text
    #[arg(long)]
    pub json: bool,
    /// Clients that write at once in the throughput phase; an even number, each pair shares a project
    #[arg(long, default_value_t = 20)]
    pub clients: usize,
    /// Writes per second in the latency phase
    #[arg(long, default_value_t = 20)]
    pub rate: u32,
    /// Length of the latency phase in seconds
    #[arg(long, default_value_t = 20)]
    pub latency_seconds: u64,
    /// Length of the measured part of the throughput phase in seconds
    #[arg(long, default_value_t = 15)]
    pub throughput_seconds: u64,
    /// Length of the warm-up before each phase in seconds
    #[arg(long, default_value_t = 3)]
    pub warm_up_seconds: u64,
    /// Changes in each client transaction of the throughput phase
    #[arg(long, default_value_t = 1)]
    pub changes_per_transaction: u32,
    /// Folder for the stack's data, to choose the disk; removed afterwards. Default: a temporary one
    #[arg(long)]
    pub dir: Option<PathBuf>,
}

/// A client with its half of a pair's project.
pub struct Loader {
    pub client: Client,
    pub project: Uuid,
    number: usize,
}

impl Loader {
    /// Number of the other client of the pair.
    fn partner(&self) -> usize {
        self.number ^ 1
    }
}

fn user(number: usize) -> String {
    format!("bench-{number}")
}

fn project(number: usize) -> Uuid {
    // Any fixed ids will do.
    Uuid::from_u128(0x0190_f3c2_0000_7000_8000_0000_0000_0000 + (number as u128) / 2 + 1)
}

/// Projects and memberships for so many clients.
pub async fn prepare(stack: &Stack, clients: usize) -> Result<(), Error> {
    let mut connection = PgConnection::connect(&stack.postgres_url()).await.map_err(Error::postgres("connect"))?;
    for number in 0..clients {
        sqlx::query("INSERT INTO projects (id, name) VALUES ($1, $2) ON CONFLICT DO NOTHING")
            .bind(project(number))
            .bind(format!("bench {}", number / 2))
            .execute(&mut connection)
            .await
            .map_err(Error::postgres("insert a project"))?;
        sqlx::query("INSERT INTO members (project_id, user_id, role) VALUES ($1, $2, 'member')")
            .bind(project(number))
            .bind(user(number))
            .execute(&mut connection)
            .await
            .map_err(Error::postgres("insert a member"))?;
    }
    Ok(())
}

/// Opens the clients, each with a store of its own, and waits for their first snapshots.
pub async fn open(stack: &Stack, folder: &Path, clients: usize) -> Result<Vec<Loader>, Error> {
    let mut loaders = Vec::with_capacity(clients);
    for number in 0..clients {
        let client = Client::builder(folder.join(format!("client-{number}.db")))
            .edge(stack.edge_url())
            .token(stack.token(&user(number)))
            .open()
            .await
            .map_err(Error::client("open"))?;
        loaders.push(Loader { client, project: project(number), number });
    }
    for loader in &loaders {
        timeout(SETTLE_LIMIT, loader.client.ready())
            .await
            .map_err(|_| {
                let status = loader.client.status().borrow().clone();
                Error::Late(format!("client {} got no snapshot within {SETTLE_LIMIT:?}: {status:?}", loader.number))
            })?
            .map_err(Error::client("first snapshot"))?;
    }
    Ok(loaders)
}

/// Client 0 writes at a steady rate; times end when the row is visible on client 1. Times begin when the write was
/// *due*: a stall is thereby counted for every write that it delayed.
pub async fn latency(loaders: &[Loader], args: &LoopArgs) -> Result<Histogram<u64>, Error> {
    let [writer, reader, ..] = loaders else { return Err(Error::Flag("two clients are needed")) };
    let skip = args.warm_up_seconds * u64::from(args.rate);
    let total = skip + args.latency_seconds * u64::from(args.rate);
    let interval = Duration::from_secs(1) / args.rate;
    let mut rows = reader.client.watch("SELECT max(position) FROM tasks WHERE project_id = ?", (reader.project,));
    let start = Instant::now() + interval;
    let due = move |number: u64| start + interval.mul_f64(number as f64);

    let (client, project) = (writer.client.clone(), writer.project);
    let writing = tokio::spawn(async move {
        for number in 1..=total {
            tokio::time::sleep_until((due(number) - EARLY).into()).await;
            while Instant::now() < due(number) {
                tokio::task::yield_now().await;
            }
            client
                .execute(INSERT, (Uuid::now_v7(), project, format!("latency-{number}"), number as f64))
                .await
                .map_err(Error::client("write"))?;
        }
        Ok::<(), Error>(())
    });

    let mut histogram = Histogram::new_with_bounds(1, MAX_LATENCY_US, 3).map_err(|_| Error::Histogram)?;
    let mut seen = 0;
    while seen < total {
        let next = timeout(SETTLE_LIMIT, rows.next()).await;
        let now = Instant::now();
        let Ok(Some(item)) = next else {
            let status = reader.client.status().borrow().clone();
            return Err(Error::Late(format!(
                "row {} of {total} did not arrive within {SETTLE_LIMIT:?}: {status:?}",
                seen + 1
            )));
        };
        let item = item.map_err(Error::client("watch"))?;
        let highest = item.rows.first().and_then(|row| row.first()).and_then(number).unwrap_or(0.0) as u64;
        for number in seen + 1..=highest {
            if number > skip {
                let micros = now.saturating_duration_since(due(number)).as_micros() as u64;
                histogram.record(micros.clamp(1, MAX_LATENCY_US)).map_err(|_| Error::Histogram)?;
            }
        }
        seen = seen.max(highest);
    }
    writing.await.map_err(|error| Error::Late(error.to_string()))??;
    Ok(histogram)
}

/// A number in SQLite.
pub fn number(value: &SqlValue) -> Option<f64> {
    match value {
        SqlValue::Integer(value) => Some(*value as f64),
        SqlValue::Real(value) => Some(*value),
        _ => None,
    }
}

/// What the throughput phase found.
pub struct Throughput {
    changes: u64,
    rate: f64,
    cpu: PerChange,
}

impl Throughput {
    /// Changes that became visible at the other client of their pair, a second.
    pub fn changes_per_s(&self) -> f64 {
        self.rate
    }

    /// CPU of each part.
    pub fn cpu_us_per_change(&self) -> PerChange {
        self.cpu.clone()
    }
}

/// Every client writes as fast as its window of unconfirmed transactions allows.
pub async fn throughput(loaders: &[Loader], args: &LoopArgs, pids: &[(Service, u32)]) -> Result<Throughput, Error> {
    let stop = Arc::new(AtomicBool::new(false));
    let mut writers = Vec::new();
    for loader in loaders {
        let writer =
            write(loader.client.clone(), loader.number, loader.project, args.changes_per_transaction, stop.clone());
        writers.push(tokio::spawn(writer));
    }
    tokio::time::sleep(Duration::from_secs(args.warm_up_seconds)).await;
    let before = (Sample::take(), arrived(loaders).await?);
    tokio::time::sleep(Duration::from_secs(args.throughput_seconds)).await;
    let after = (Sample::take(), arrived(loaders).await?);
    stop.store(true, Ordering::Relaxed);
    for writer in writers {
        writer.await.map_err(|error| Error::Late(error.to_string()))??;
    }
    for loader in loaders {
        loader.client.settled(SETTLE_LIMIT).await.map_err(Error::client("send all changes"))?;
    }
    let mut result = Throughput { changes: 0, rate: 0.0, cpu: PerChange::default() };
    for ((count, at), (count_before, at_before)) in after.1.iter().zip(&before.1) {
        let new = count.saturating_sub(*count_before);
        result.changes += new;
        result.rate += new as f64 / at.duration_since(*at_before).as_secs_f64();
    }
    result.cpu = cpu::per_change(&before.0, &after.0, pids, result.changes);
    Ok(result)
}

async fn write(client: Client, number: usize, project: Uuid, changes: u32, stop: Arc<AtomicBool>) -> Result<(), Error> {
    let mut status = client.status();
    let mut count = 0_u64;
    while !stop.load(Ordering::Relaxed) {
        if status.borrow_and_update().pending.count >= u64::from(SUBMIT_WINDOW) {
            // An error means that the client is closed: the next write says so.
            let _closed = timeout(Duration::from_millis(100), status.changed()).await;
            continue;
        }
        let first = count;
        count += u64::from(changes);
        client
            .tx(move |transaction| {
                for count in first..first + u64::from(changes) {
                    let title = format!("load-{number}-{count}");
                    transaction.execute(INSERT, (Uuid::now_v7(), project, title, count as f64))?;
                }
                Ok(())
            })
            .await
            .map_err(Error::client("write"))?;
    }
    Ok(())
}

/// How many changes of its partner each client has, and when it was asked.
async fn arrived(loaders: &[Loader]) -> Result<Vec<(u64, Instant)>, Error> {
    let mut counts = Vec::with_capacity(loaders.len());
    for loader in loaders {
        let pattern = format!("load-{}-%", loader.partner());
        let rows = loader
            .client
            .query("SELECT count(*) FROM tasks WHERE title LIKE ?", (pattern,))
            .await
            .map_err(Error::client("count"))?;
        let count = rows.rows.first().and_then(|row| row.first()).and_then(self::number).unwrap_or(0.0);
        counts.push((count as u64, Instant::now()));
    }
    Ok(counts)
}
