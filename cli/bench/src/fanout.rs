//! `millstream bench fanout`: writes by plain SQL at a steady rate, to many subscribers of one scope; beside it the same texts
//! at the same rate through a server that only broadcasts. Subscribers are bare sockets in the bench's own process.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use millstream_stack::{Service, Stack};
use serde::Serialize;
use sqlx::Connection as _;
use sqlx::postgres::PgConnection;
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::broadcast;
use crate::cpu::{self, Sample};
use crate::error::Error;
use crate::figures::{Percentiles, round};
use crate::rig::{CONFIG, finish, folder, start};
use crate::socket::Socket;

/// Rows that are written, one after the other and again.
const ROWS: u64 = 50;
/// What the number of a write stands behind.
const MARK: &str = "bench write ";
/// Sockets that connect at once.
const CONNECTING: usize = 16;
/// How long memory is let settle.
const SETTLE: Duration = Duration::from_secs(2);
/// Writes before those that count.
const WARM_UP: u64 = 20;

/// Flags of `millstream bench fanout`.
#[derive(clap::Args, Clone, Debug)]
pub struct FanoutArgs {
    /// Print one JSON object instead of text
    #[arg(long)]
    pub json: bool,
    /// Numbers of subscribers
    #[arg(long, value_delimiter = ',', default_value = "100,500,1000")]
    pub subscribers: Vec<u32>,
    /// Writes per second
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    pub rate: u32,
    /// Length of each measurement in seconds
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u64).range(1..))]
    pub seconds: u64,
    /// Folder for the stack's data, to choose the disk; removed afterwards. Default: a temporary one
    #[arg(long)]
    pub dir: Option<PathBuf>,
}

/// The figures that the bench prints.
#[derive(Debug, Serialize)]
struct FanoutReport {
    writes_per_s: u32,
    points: Vec<Point>,
}

#[derive(Debug, Serialize)]
struct Point {
    subscribers: u32,
    /// From when a write was due to its frame on each socket.
    latency_ms: Percentiles,
    /// Of all services, Postgres and the broker together, for 10,000 deliveries.
    server_cpu_s_per_10k: f64,
    /// Of it, the edge.
    edge_cpu_s_per_10k: f64,
    /// Of it, the backend of Postgres that makes the application's own writes, which the floor has not got.
    write_cpu_s_per_10k: f64,
    /// Resident memory of the edge for each connection while nothing happens.
    rss_per_connection_kib: f64,
    floor: Floor,
}

#[derive(Debug, Serialize)]
struct Floor {
    latency_ms: Percentiles,
    server_cpu_s_per_10k: f64,
    rss_per_connection_kib: f64,
}

/// Runs it.
pub async fn run(args: FanoutArgs) -> Result<(), Error> {
    let folder = folder(args.dir.as_deref(), CONFIG)?;
    let mut stack = start(&folder).await?;
    let outcome = measure(&mut stack, folder.path(), &args).await;
    finish(stack, outcome, args.json, print).await
}

fn print(report: &FanoutReport) {
    println!(
        "{} writes/s to one scope          p50     p99    CPU of 10,000 deliveries                memory a connection",
        report.writes_per_s
    );
    for point in &report.points {
        let Point { latency_ms, floor, .. } = point;
        println!(
            "{:>6} subscribers           {:>7} {:>7} ms    {:>6} s (edge {} s, writes {} s)  {:>6} KiB",
            point.subscribers,
            latency_ms.p50,
            latency_ms.p99,
            point.server_cpu_s_per_10k,
            point.edge_cpu_s_per_10k,
            point.write_cpu_s_per_10k,
            point.rss_per_connection_kib
        );
        println!(
            "       floor                 {:>7} {:>7} ms    {:>6} s                                 {:>6} KiB",
            floor.latency_ms.p50, floor.latency_ms.p99, floor.server_cpu_s_per_10k, floor.rss_per_connection_kib
        );
    }
}

async fn measure(stack: &mut Stack, folder: &Path, args: &FanoutArgs) -> Result<FanoutReport, Error> {
    let most = args.subscribers.iter().copied().max().unwrap_or(0);
    let project = Uuid::now_v7();
    let mut postgres = PgConnection::connect(&stack.postgres_url()).await.map_err(Error::postgres("connect"))?;
    let prepare = [
        ("INSERT INTO projects (id, name) SELECT $1, 'bench' WHERE $2 >= 0", 0),
        ("INSERT INTO members SELECT $1, 'bench-' || n, 'member' FROM generate_series(0, $2) AS n", i64::from(most)),
        (
            "INSERT INTO tasks (id, project_id, title, position) SELECT gen_random_uuid(), $1, 'row', n FROM generate_series(1, $2) AS n",
            ROWS as i64,
        ),
    ];
    for (sql, number) in prepare {
        let query = sqlx::query(sql).bind(project).bind(number);
        query.execute(&mut postgres).await.map_err(Error::postgres("prepare"))?;
    }
    let mut points = Vec::new();
    for &subscribers in &args.subscribers {
        eprintln!("{subscribers} subscribers …");
        points.push(point(stack, folder, args, subscribers, &mut postgres).await?);
    }
    Ok(FanoutReport { writes_per_s: args.rate, points })
}

async fn point(
    stack: &mut Stack,
    folder: &Path,
    args: &FanoutArgs,
    subscribers: u32,
    postgres: &mut PgConnection,
) -> Result<Point, Error> {
    // A new process, so that the memory is that of these connections; warm with one that goes again.
    stack.restart(Service::Edge).await.map_err(Error::Stack)?;
    let pids: Vec<u32> = Service::ALL.into_iter().filter_map(|service| stack.pid(service)).collect();
    let edge = stack.pid(Service::Edge).unwrap_or_default();
    let (url, stack) = (stack.edge_url(), &*stack);
    let open = |number: u32| {
        let (url, token) = (url.clone(), stack.token(&format!("bench-{number}")));
        async move {
            let mut socket = Socket::hello(&url, token).await?;
            socket.snapshot().await?;
            Ok(socket)
        }
    };
    drop(open(0).await?);
    let (sockets, memory) = connect(subscribers, edge, open).await?;
    let mut sample = String::new();
    let backend: i32 = sqlx::query_scalar("SELECT pg_backend_pid()")
        .fetch_one(&mut *postgres)
        .await
        .map_err(Error::postgres("ask for the backend"))?;
    let before = Sample::take();
    let latency = {
        let write = async |number: u64| {
            let sql = "UPDATE tasks SET title = $1 WHERE position = $2";
            let query = sqlx::query(sql).bind(format!("{MARK}{number:08}")).bind((number % ROWS + 1) as f64);
            query.execute(&mut *postgres).await.map(drop).map_err(Error::postgres("write"))
        };
        deliver(sockets, args, write, &mut sample).await?
    };
    let after = Sample::take();
    let deliveries = u64::from(subscribers) * (WARM_UP + writes(args));
    let cpu = |roots: &[u32]| round_more(after.micros_since(&before, roots) as f64 / 1e6 / deliveries as f64 * 1e4);

    let (process, url) = broadcast::start(folder).await?;
    let server = process.pid();
    let url = &url;
    let (sockets, floor_memory) = connect(subscribers, server, |_| Socket::connect(url)).await?;
    let mut publisher = Socket::connect(url).await?;
    let floor_before = Sample::take();
    let text = sample.clone();
    let write = async |number: u64| {
        let place = text.find(MARK).map_or(0, |at| at + MARK.len());
        let mut text = text.clone();
        text.replace_range(place..place + 8, &format!("{number:08}"));
        publisher.send(text).await
    };
    let floor = deliver(sockets, args, write, &mut sample).await?;
    let floor_after = Sample::take();
    drop(process);
    std::fs::remove_file(folder.join("broadcast.address"))
        .map_err(|source| Error::Folder { path: folder.into(), source })?;
    let floor_cpu = floor_after.micros_since(&floor_before, &[server]) as f64 / 1e6 / deliveries as f64 * 1e4;
    Ok(Point {
        subscribers,
        latency_ms: percentiles(&latency),
        server_cpu_s_per_10k: cpu(&pids),
        edge_cpu_s_per_10k: cpu(&[edge]),
        write_cpu_s_per_10k: cpu(&[backend.cast_unsigned()]),
        rss_per_connection_kib: round(memory),
        floor: Floor {
            latency_ms: percentiles(&floor),
            server_cpu_s_per_10k: round_more(floor_cpu),
            rss_per_connection_kib: round(floor_memory),
        },
    })
}

/// Three decimals.
fn round_more(value: f64) -> f64 {
    (value * 1_000.0).round() / 1_000.0
}

fn percentiles(latency: &Histogram<u64>) -> Percentiles {
    let ms = |quantile: f64| round(latency.value_at_quantile(quantile) as f64 / 1_000.0);
    Percentiles { p50: ms(0.50), p95: ms(0.95), p99: ms(0.99) }
}

/// Connects so many, and says how much memory the server takes for each, in KiB.
async fn connect<F: Future<Output = Result<Socket, Error>>>(
    subscribers: u32,
    server: u32,
    open: impl Fn(u32) -> F,
) -> Result<(Vec<Socket>, f64), Error> {
    use futures_util::{StreamExt as _, TryStreamExt as _};
    tokio::time::sleep(SETTLE).await;
    let before = cpu::resident_kib(server);
    let sockets = futures_util::stream::iter((1..=subscribers).map(open)).buffer_unordered(CONNECTING);
    let sockets: Vec<Socket> = sockets.try_collect().await?;
    tokio::time::sleep(SETTLE).await;
    let more = cpu::resident_kib(server).saturating_sub(before);
    Ok((sockets, more as f64 / f64::from(subscribers.max(1))))
}

fn writes(args: &FanoutArgs) -> u64 {
    u64::from(args.rate) * args.seconds
}

/// Writes at the rate; every socket must receive every write, in order. `sample` becomes one of the texts.
async fn deliver(
    sockets: Vec<Socket>,
    args: &FanoutArgs,
    mut write: impl AsyncFnMut(u64) -> Result<(), Error>,
    sample: &mut String,
) -> Result<Histogram<u64>, Error> {
    let total = WARM_UP + writes(args);
    let interval = Duration::from_secs(1) / args.rate;
    let start = Instant::now() + SETTLE;
    let due = move |number: u64| start + interval.mul_f64(number as f64);
    let first = Arc::new(std::sync::OnceLock::new());
    let mut receivers = JoinSet::new();
    for mut socket in sockets {
        let first = first.clone();
        receivers.spawn(async move {
            let mut times = Vec::with_capacity(total as usize);
            for wanted in 0..total {
                let (number, text) = loop {
                    let text = socket.next().await?;
                    if let Some(number) = number(&text) {
                        break (number, text);
                    }
                };
                let now = Instant::now();
                if number != wanted {
                    return Err(Error::NotConverged(format!("write {number} came instead of {wanted}")));
                }
                if number >= WARM_UP {
                    times.push(now.saturating_duration_since(due(number)).as_micros() as u64);
                }
                first.get_or_init(|| text.to_string());
            }
            Ok(times)
        });
    }
    for number in 0..total {
        tokio::time::sleep_until(due(number).into()).await;
        write(number).await?;
    }
    let mut histogram = Histogram::new_with_bounds(1, 120_000_000, 3).map_err(|_| Error::Histogram)?;
    while let Some(times) = receivers.join_next().await {
        for time in times.map_err(|error| Error::Late(error.to_string()))?? {
            histogram.record(time.max(1)).map_err(|_| Error::Histogram)?;
        }
    }
    if let Some(text) = first.get() {
        sample.clone_from(text);
    }
    Ok(histogram)
}

/// The number of the write that a text tells of.
fn number(text: &str) -> Option<u64> {
    let place = text.find(MARK)? + MARK.len();
    text.get(place..place + 8)?.parse().ok()
}
