//! `millstream bench drain`: how fast a long offline queue of one client is confirmed, and whether its rows flicker
//! meanwhile, that is, show an older value than the one that the user wrote last.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use millstream_client::Client;
use millstream_stack::Stack;
use rand::RngExt as _;
use rand::seq::SliceRandom as _;
use serde::Serialize;
use uuid::Uuid;

use crate::error::Error;
use crate::figures::round;
use crate::load::{self, number};
use crate::rig::{CONFIG, finish, folder, start};
use crate::verify;

/// Versions of each row that the queue holds: an insert, then updates.
const VERSIONS: u64 = 5;
/// How long it may take.
const LIMIT: Duration = Duration::from_secs(300);
/// Changes that are recorded at the same time, so that local commits are shared.
const RECORDERS: usize = 64;

/// Flags of `millstream bench drain`.
#[derive(clap::Args, Clone, Debug)]
pub struct DrainArgs {
    /// Print one JSON object instead of text
    #[arg(long)]
    pub json: bool,
    /// Changes in the queue, each a transaction: rows that are inserted and then updated 4 times
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(5..=1_000_000))]
    pub changes: u64,
    /// Folder for the stack's data, to choose the disk; removed afterwards. Default: a temporary one
    #[arg(long)]
    pub dir: Option<std::path::PathBuf>,
}

/// The figures that the bench prints.
#[derive(Debug, Serialize)]
struct DrainReport {
    changes: u64,
    /// From going online to the confirmation of the last one.
    seconds: f64,
    changes_per_s: f64,
    /// Reads of a row that showed an older version than the newest written, or none.
    flickers: u64,
    reads: u64,
    /// Time to record the queue while offline.
    recorded_per_s: f64,
}

/// Runs it.
pub async fn run(args: DrainArgs) -> Result<(), Error> {
    let folder = folder(args.dir.as_deref(), CONFIG)?;
    let stack = start(&folder).await?;
    let outcome = measure(&stack, folder.path(), args.changes / VERSIONS).await;
    finish(stack, outcome, args.json, print).await
}

fn print(report: &DrainReport) {
    println!("{} changes in {} s: {} changes/s", report.changes, report.seconds, report.changes_per_s);
    println!("flickers   {} in {} reads", report.flickers, report.reads);
    println!("recorded   {} changes/s while offline", report.recorded_per_s);
}

async fn measure(stack: &Stack, folder: &Path, rows: u64) -> Result<DrainReport, Error> {
    // Two, since projects are shared by pairs; the other one is the witness that the rows have left.
    load::prepare(stack, 2).await?;
    let loaders = load::open(stack, folder, 2).await?;
    let Some(loader) = loaders.first() else { return Err(Error::Flag("a client is needed")) };
    let client = &loader.client;
    client.pause();
    eprintln!("recording {} changes offline …", rows * VERSIONS);
    let ids: Arc<Vec<Uuid>> = Arc::new((0..rows).map(|_| Uuid::now_v7()).collect());
    let began = Instant::now();
    record(client, loader.project, &ids).await?;
    let recorded = began.elapsed();

    eprintln!("draining …");
    let stop = Arc::new(AtomicBool::new(false));
    let reader = tokio::spawn(read(client.clone(), ids.clone(), stop.clone()));
    let began = Instant::now();
    client.resume();
    let settled = client.settled(LIMIT).await;
    let time = began.elapsed();
    stop.store(true, Ordering::Relaxed);
    let (reads, flickers) = reader.await.map_err(|error| Error::Late(error.to_string()))??;
    settled.map_err(Error::client("send all changes"))?;
    let failed = client.failed().await.map_err(Error::client("list failed changes"))?;
    if let Some(first) = failed.first() {
        return Err(Error::NotConverged(format!("{} changes failed, the first: {first:?}", failed.len())));
    }
    eprintln!("comparing with Postgres …");
    verify::converged(stack, &loaders, load::SETTLE_LIMIT).await?;
    let changes = rows * VERSIONS;
    let report = DrainReport {
        changes,
        seconds: round(time.as_secs_f64()),
        changes_per_s: round(changes as f64 / time.as_secs_f64()),
        flickers,
        reads,
        recorded_per_s: round(changes as f64 / recorded.as_secs_f64()),
    };
    for loader in loaders {
        loader.client.close().await.map_err(Error::client("close"))?;
    }
    Ok(report)
}

/// Every row in its first version, then all in the next one in another order, and so on; `position` is the version.
async fn record(client: &Client, project: Uuid, ids: &[Uuid]) -> Result<(), Error> {
    let mut order = ids.to_vec();
    for version in 1..=VERSIONS {
        order.shuffle(&mut rand::rng());
        for part in order.chunks(RECORDERS) {
            let writes = part.iter().map(|id| async move {
                if version == 1 {
                    let sql = "INSERT INTO tasks (id, project_id, title, done, position) VALUES (?, ?, ?, 0, ?)";
                    client.execute(sql, (id, project, format!("version {version}"), version as f64)).await
                } else {
                    let sql = "UPDATE tasks SET title = ?, position = ? WHERE id = ?";
                    client.execute(sql, (format!("version {version}"), version as f64, id)).await
                }
            });
            for write in futures_util::future::join_all(writes).await {
                write.map_err(Error::client("write"))?;
            }
        }
    }
    Ok(())
}

/// Reads rows at random, as fast as it can; returns the number of reads and of those that did not show the last version.
async fn read(client: Client, ids: Arc<Vec<Uuid>>, stop: Arc<AtomicBool>) -> Result<(u64, u64), Error> {
    let (mut reads, mut flickers) = (0, 0);
    while !stop.load(Ordering::Relaxed) {
        let id = ids[rand::rng().random_range(0..ids.len())];
        let rows =
            client.query("SELECT position FROM tasks WHERE id = ?", (id,)).await.map_err(Error::client("read"))?;
        let version = rows.rows.first().and_then(|row| row.first()).and_then(number).unwrap_or(0.0);
        reads += 1;
        if (version as u64) < VERSIONS {
            flickers += 1;
        }
    }
    Ok((reads, flickers))
}
