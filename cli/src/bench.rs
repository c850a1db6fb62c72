//! `millstream bench`: measures the whole loop on a private stack, or a part of it, and in the same run the floor below it:
//! what this machine's Postgres and JetStream do at best. Absolutes depend on the machine; the ratio to the floor travels.

mod broadcast;
mod catchup;
mod cpu;
mod drain;
mod executor;
mod fanout;
mod floor;
mod load;
mod snapshot;
mod socket;
mod verify;

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;
use tempfile::TempDir;

use crate::stack::{self, Service, Stack};

pub use broadcast::BroadcastArgs;
pub use catchup::CatchupArgs;
pub use drain::DrainArgs;
pub use executor::ExecutorArgs;
pub use fanout::FanoutArgs;
pub use snapshot::SnapshotArgs;

/// The whole stack runs the board example.
const CONFIG: &str = include_str!("../../examples/board/millstream.toml");
const SCHEMA: &str = include_str!("../../examples/board/schema.sql");

/// Flags of `millstream bench`.
#[derive(clap::Args, Debug)]
#[command(before_help = "Examples:
  cargo millstream bench loop            for people
  cargo millstream bench loop --json     one JSON object on stdout
  cargo millstream bench executor        the executor beside plain SQL
  cargo millstream bench drain           a long offline queue
  cargo millstream bench snapshot        a new client's first rows
  cargo millstream bench fanout          one scope with many subscribers
  cargo millstream bench catchup         a client that comes back far behind")]
pub struct Args {
    /// What to measure.
    #[command(subcommand)]
    pub what: What,
}

/// What to measure.
#[derive(clap::Subcommand, Debug)]
pub enum What {
    /// From a write on one client to the applied row on another: latency at a steady rate, then throughput
    Loop(LoopArgs),
    /// From submitted changes to committed rows: the executor beside the same batches by plain SQL
    Executor(ExecutorArgs),
    /// From going online with a long queue to its last confirmation, and whether rows flicker meanwhile
    Drain(DrainArgs),
    /// From opening a new store to its holding a scope of many rows: beside COPY into SQLite
    Snapshot(SnapshotArgs),
    /// From a write to many subscribers of its scope: latency, CPU and memory, beside a server that only broadcasts
    Fanout(FanoutArgs),
    /// From opening a store that is far behind to its being up to date
    Catchup(CatchupArgs),
    /// The server that only broadcasts
    #[command(hide = true)]
    Broadcast(BroadcastArgs),
}

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

/// The bench failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The stack.
    #[error("the private stack")]
    Stack(#[source] stack::Error),
    /// A flag.
    #[error("{0}")]
    Flag(&'static str),
    /// Files of the bench.
    #[error("cannot use {path}")]
    Folder {
        /// Which path.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Postgres.
    #[error("Postgres: {action}")]
    Postgres {
        /// What was done.
        action: &'static str,
        /// Why it failed.
        source: sqlx::Error,
    },
    /// JetStream.
    #[error("JetStream: {action}")]
    JetStream {
        /// What was done.
        action: &'static str,
        /// Why it failed.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A client.
    #[error("client: {action}")]
    Client {
        /// What was done.
        action: &'static str,
        /// Why it failed.
        source: Box<millstream_client::Error>,
    },
    /// The executor.
    #[error("the executor")]
    Executor(#[source] Box<millstream_changes::direct::DirectError>),
    /// A client did not get there in time.
    #[error("{0}")]
    Late(String),
    /// SQLite, below a client.
    #[error("the floor's SQLite")]
    Floor(#[source] Box<rusqlite::Error>),
    /// A histogram.
    #[error("a time cannot be recorded")]
    Histogram,
    /// At the end rows differ that should be the same: the numbers mean nothing.
    #[error("not converged: {0}")]
    NotConverged(String),
}

impl Error {
    fn client(action: &'static str) -> impl FnOnce(millstream_client::Error) -> Error {
        move |source| Error::Client { action, source: Box::new(source) }
    }

    fn postgres(action: &'static str) -> impl FnOnce(sqlx::Error) -> Error {
        move |source| Error::Postgres { action, source }
    }
}

/// What is printed.
#[derive(Debug, Serialize)]
struct Report {
    latency_ms: Percentiles,
    changes_per_s: f64,
    clients: usize,
    changes_per_transaction: u32,
    floor: floor::Floor,
    cpu_us_per_change: cpu::PerChange,
    other_cores: f64,
}

/// Milliseconds.
#[derive(Debug, Serialize)]
struct Percentiles {
    p50: f64,
    p95: f64,
    p99: f64,
}

/// Runs `millstream bench`.
pub async fn run(args: Args) -> Result<(), Error> {
    match args.what {
        What::Loop(args) => whole_loop(args).await,
        What::Executor(args) => executor::run(args).await,
        What::Drain(args) => drain::run(args).await,
        What::Snapshot(args) => snapshot::run(args).await,
        What::Fanout(args) => fanout::run(args).await,
        What::Catchup(args) => catchup::run(args).await,
        What::Broadcast(args) => broadcast::serve(args).await,
    }
}

async fn whole_loop(args: LoopArgs) -> Result<(), Error> {
    if args.clients < 2 || !args.clients.is_multiple_of(2) {
        return Err(Error::Flag("--clients must be an even number from 2 on"));
    }
    if args.rate == 0 || args.latency_seconds == 0 || args.throughput_seconds == 0 || args.changes_per_transaction == 0
    {
        return Err(Error::Flag("--rate, the seconds and --changes-per-transaction must be at least 1"));
    }
    let folder = folder(args.dir.as_deref(), CONFIG)?;
    let mut stack = start(&folder).await?;
    let outcome = measure(&mut stack, &args, folder.path()).await;
    finish(stack, outcome, args.json, print).await
}

/// A new folder with a `millstream.toml`.
fn folder(dir: Option<&Path>, config: &str) -> Result<TempDir, Error> {
    let folder = match dir {
        Some(dir) => std::fs::create_dir_all(dir).and_then(|()| tempfile::tempdir_in(dir)),
        None => tempfile::Builder::new().prefix("millstream-bench-").tempdir(),
    };
    let folder = folder.map_err(|source| Error::Folder { path: dir.unwrap_or(Path::new("")).into(), source })?;
    let file = |source| Error::Folder { path: folder.path().into(), source };
    // Postgres may run as another user, who must get through.
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o711)).map_err(file)?;
    std::fs::write(folder.path().join("millstream.toml"), config).map_err(file)?;
    Ok(folder)
}

/// Starts a private stack with the board example.
async fn start(folder: &TempDir) -> Result<Stack, Error> {
    eprintln!("starting a private stack …");
    let mut builder = Stack::builder();
    if let Ok(own) = std::env::current_exe() {
        builder = builder.executable(own);
    }
    builder
        .dir(folder.path().join("stack"))
        .app_schema(SCHEMA)
        .config(folder.path().join("millstream.toml"))
        .service_env("RUST_LOG", "warn")
        .start()
        .await
        .map_err(Error::Stack)
}

/// Stops the stack, and prints what was measured; where that failed, the stack's logs.
async fn finish<R: Serialize>(stack: Stack, outcome: Result<R, Error>, json: bool, print: fn(&R)) -> Result<(), Error> {
    if outcome.is_err() {
        eprintln!("{}", stack.logs());
    }
    stack.stop().await;
    let report = outcome?;
    if json {
        println!("{}", serde_json::to_string(&report).unwrap_or_default());
    } else {
        print(&report);
    }
    Ok(())
}

async fn measure(stack: &mut Stack, args: &LoopArgs, folder: &std::path::Path) -> Result<Report, Error> {
    eprintln!("measuring the floor …");
    let floor = floor::measure(stack).await?;
    load::prepare(stack, args.clients).await?;
    let pids: Vec<(Service, u32)> =
        Service::ALL.into_iter().filter_map(|service| stack.pid(service).map(|pid| (service, pid))).collect();
    let watch = cpu::Watch::start();

    eprintln!("latency: {}/s for {} s …", args.rate, args.latency_seconds);
    let clients = load::open(stack, folder, args.clients).await?;
    let latency = load::latency(&clients, args).await?;

    eprintln!("throughput: {} clients for {} s …", args.clients, args.throughput_seconds);
    let throughput = load::throughput(&clients, args, &pids).await?;
    let other_cores = watch.other_cores();

    eprintln!("comparing every client with Postgres …");
    verify::converged(stack, &clients, load::SETTLE_LIMIT).await?;
    for client in clients {
        client.client.close().await.map_err(Error::client("close"))?;
    }
    let ms = |quantile: f64| round(latency.value_at_quantile(quantile) as f64 / 1000.0);
    Ok(Report {
        latency_ms: Percentiles { p50: ms(0.50), p95: ms(0.95), p99: ms(0.99) },
        changes_per_s: round(throughput.changes_per_s()),
        clients: args.clients,
        changes_per_transaction: args.changes_per_transaction,
        floor,
        cpu_us_per_change: throughput.cpu_us_per_change(),
        other_cores: round(other_cores),
    })
}

fn print(report: &Report) {
    let Report { latency_ms, floor, cpu_us_per_change: cpu, .. } = report;
    println!(
        "write on A -> applied on B   p50 {} ms   p95 {} ms   p99 {} ms",
        latency_ms.p50, latency_ms.p95, latency_ms.p99
    );
    println!(
        "whole loop                   {} changes/s with {} clients, {} change(s) a transaction",
        report.changes_per_s, report.clients, report.changes_per_transaction
    );
    println!(
        "floor                        Postgres {} commits/s with {} connections, {} ms for a single one; JetStream {} acks/s one at a time",
        floor.postgres_commits_per_s,
        floor::CONNECTIONS,
        floor.postgres_commit_ms,
        floor.jetstream_acks_per_s
    );
    println!(
        "CPU per change (us)          edge {}  changes {}  replication {}  postgres {}  nats {}  clients {}",
        cpu.edge, cpu.changes, cpu.replication, cpu.postgres, cpu.nats, cpu.clients
    );
    println!("cores used by other programs {}", report.other_cores);
}

/// Two decimals.
fn round(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}

/// A flag in seconds.
fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}
