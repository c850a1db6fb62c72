//! `millstream bench snapshot`: how long a new client takes to hold a scope of many rows; beside it the least that this takes:
//! the same rows by `COPY` into a SQLite table.

use std::path::{Path, PathBuf};
use std::time::Instant;

use futures_util::TryStreamExt as _;
use millstream_client::Client;
use millstream_stack::Stack;
use rusqlite::params_from_iter;
use serde::Serialize;
use sqlx::Connection as _;
use sqlx::postgres::PgConnection;
use uuid::Uuid;

use crate::error::Error;
use crate::figures::round;
use crate::load::{SETTLE_LIMIT, number};
use crate::rig::{CONFIG, finish, folder, start};
use crate::socket::Socket;

const USER: &str = "bench";
/// Bytes of a row's title, so that a row has about 200.
const TITLE_BYTES: i32 = 60;

/// Flags of `millstream bench snapshot`.
#[derive(clap::Args, Clone, Debug)]
pub struct SnapshotArgs {
    /// Print one JSON object instead of text
    #[arg(long)]
    pub json: bool,
    /// Rows of the scope
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    pub rows: u32,
    /// Clients that join, one after the other; the median counts
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub runs: u32,
    /// Folder for the stack's data, to choose the disk; removed afterwards. Default: a temporary one
    #[arg(long)]
    pub dir: Option<PathBuf>,
}

/// The figures that the bench prints.
#[derive(Debug, Serialize)]
struct SnapshotReport {
    rows: u64,
    /// On the wire.
    bytes: u64,
    /// From opening a new store to the rows being there.
    seconds: f64,
    /// The same for a bare socket, which keeps nothing.
    wire_seconds: f64,
    /// The same rows by COPY into a new SQLite table.
    floor_seconds: f64,
}

/// Runs it.
pub async fn run(args: SnapshotArgs) -> Result<(), Error> {
    let folder = folder(args.dir.as_deref(), CONFIG)?;
    let stack = start(&folder).await?;
    let outcome = measure(&stack, folder.path(), &args).await;
    finish(stack, outcome, args.json, print).await
}

fn print(report: &SnapshotReport) {
    println!("{} rows to a new client   {} s", report.rows, report.seconds);
    println!("to a bare socket            {} s, {} bytes", report.wire_seconds, report.bytes);
    println!("floor: COPY into SQLite     {} s", report.floor_seconds);
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_unstable_by(f64::total_cmp);
    times.get(times.len() / 2).copied().map_or(0.0, |time| (time * 1_000.0).round() / 1_000.0)
}

async fn measure(stack: &Stack, folder: &Path, args: &SnapshotArgs) -> Result<SnapshotReport, Error> {
    let project = Uuid::now_v7();
    let mut postgres = PgConnection::connect(&stack.postgres_url()).await.map_err(Error::postgres("connect"))?;
    eprintln!("writing {} rows …", args.rows);
    let tasks = format!(
        "INSERT INTO tasks (id, project_id, title, position)
         SELECT gen_random_uuid(), '{project}', rpad('task ' || n, {TITLE_BYTES}, 'x'), n FROM generate_series(1, {}) AS n",
        args.rows
    );
    for sql in [
        format!("INSERT INTO projects (id, name) VALUES ('{project}', 'bench')"),
        format!("INSERT INTO members VALUES ('{project}', '{USER}', 'member')"),
        tasks,
        "VACUUM ANALYZE tasks".to_owned(),
        "CHECKPOINT".to_owned(),
    ] {
        let query = sqlx::query(sqlx::AssertSqlSafe(sql));
        query.execute(&mut postgres).await.map_err(Error::postgres("prepare"))?;
    }
    // The scope's own rows: those tasks, the project, the member.
    let rows = u64::from(args.rows) + 2;
    let (mut seconds, mut wire, mut floor, mut bytes) = (Vec::new(), Vec::new(), Vec::new(), 0);
    // In alternation; the first round only warms up.
    for round in 0..=args.runs {
        eprintln!("client {round} of {} …", args.runs);
        let file = |what: &str| folder.join(format!("{what}-{round}.db"));
        let times =
            [client(stack, &file("client"), args.rows).await?, copy(&mut postgres, &file("floor"), args.rows).await?];
        let began = Instant::now();
        let mut socket = Socket::hello(&stack.edge_url(), stack.token(USER)).await?;
        let (received, found) = socket.snapshot().await?;
        // A member's row is in two scopes, and may come for each.
        if found < rows || found > rows + 1 {
            return Err(Error::NotConverged(format!("a socket received {found} rows of {rows}")));
        }
        if round > 0 {
            seconds.push(times[0]);
            floor.push(times[1]);
            wire.push(began.elapsed().as_secs_f64());
            bytes = received;
        }
    }
    Ok(SnapshotReport {
        rows,
        bytes,
        seconds: median(seconds),
        wire_seconds: median(wire),
        floor_seconds: median(floor),
    })
}

/// A new client, until it holds the rows.
async fn client(stack: &Stack, file: &Path, rows: u32) -> Result<f64, Error> {
    let began = Instant::now();
    let builder = Client::builder(file).edge(stack.edge_url()).token(stack.token(USER));
    let client = builder.open().await.map_err(Error::client("open"))?;
    tokio::time::timeout(SETTLE_LIMIT, client.ready())
        .await
        .map_err(|_| Error::Late(format!("no snapshot within {SETTLE_LIMIT:?}")))?
        .map_err(Error::client("first snapshot"))?;
    let time = began.elapsed().as_secs_f64();
    let found = client.query("SELECT count(*) FROM tasks", ()).await.map_err(Error::client("count"))?;
    let found = found.rows.first().and_then(|row| row.first()).and_then(number).unwrap_or(0.0);
    client.close().await.map_err(Error::client("close"))?;
    if found as u32 != rows {
        return Err(Error::NotConverged(format!("a client holds {found} rows of {rows}")));
    }
    Ok(time)
}

/// The floor.
async fn copy(postgres: &mut PgConnection, file: &Path, rows: u32) -> Result<f64, Error> {
    let sqlite = |source: rusqlite::Error| Error::Floor(source.into());
    let began = Instant::now();
    let mut store = rusqlite::Connection::open(file).map_err(sqlite)?;
    store
        .execute_batch(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;
             CREATE TABLE tasks (id TEXT PRIMARY KEY, project_id TEXT, title TEXT, done INT, position REAL,
                 created_at TEXT, field_clocks TEXT, updated_at TEXT, client_id TEXT) WITHOUT ROWID",
        )
        .map_err(sqlite)?;
    let transaction = store.transaction().map_err(sqlite)?;
    {
        let mut insert = transaction.prepare("INSERT INTO tasks VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)").map_err(sqlite)?;
        let mut stream = postgres
            .copy_out_raw("COPY tasks (id, project_id, title, done, position, created_at, field_clocks, updated_at, client_id) TO STDOUT")
            .await
            .map_err(Error::postgres("copy"))?;
        // Postgres sends a row a message.
        while let Some(line) = stream.try_next().await.map_err(Error::postgres("copy"))? {
            let text = std::str::from_utf8(&line).unwrap_or_default().trim_end_matches('\n');
            let values = text.split('\t').map(|value| (value != r"\N").then_some(value));
            insert.execute(params_from_iter(values)).map_err(sqlite)?;
        }
    }
    transaction.commit().map_err(sqlite)?;
    let time = began.elapsed().as_secs_f64();
    let found: u32 = store.query_row("SELECT count(*) FROM tasks", (), |row| row.get(0)).map_err(sqlite)?;
    if found != rows {
        return Err(Error::NotConverged(format!("the floor has {found} rows of {rows}")));
    }
    Ok(round_time(time))
}

fn round_time(time: f64) -> f64 {
    round(time * 1_000.0) / 1_000.0
}
