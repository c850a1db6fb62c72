//! Transactions of very many rows reach a client whole, and cost no process much memory.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use millstream_stack::Service;
use millstream_tests::board::{Board, PATIENCE};
use uuid::Uuid;

use crate::watcher::Watcher;

/// How much more a process may need.
const MORE_KIB: u64 = 128 * 1024;
/// For a million rows, beside other tests: an edge keeps its ring, and what a slow session fetches again.
const MORE_KIB_MILLION: u64 = 256 * 1024;
/// The broker is not ours: it keeps the blocks of its stream that were read within 10 s, and collects its garbage late.
const MORE_KIB_NATS: u64 = 512 * 1024;
/// How long the larger one may take, on a busy machine.
const LIMIT: Duration = Duration::from_secs(240);

/// Most memory that a process ever had in use, in KiB.
fn peak(pid: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

/// Peaks of all processes, by name and id.
fn peaks(board: &mut Board, client: &Watcher) -> Result<Vec<(&'static str, u32, u64)>> {
    let mut peaks = Vec::new();
    for service in [Service::Nats, Service::Replication, Service::Changes, Service::Edge] {
        let pid = board.stack.pid(service).context("a running service")?;
        peaks.push((service.name(), pid, peak(pid)?));
    }
    let pid = client.process.id().context("a running client")?;
    peaks.push(("client", pid, peak(pid)?));
    Ok(peaks)
}

/// No process may have needed much more than before.
fn compare(before: &[(&'static str, u32, u64)], kib: u64, nats_kib: u64) -> Result<()> {
    for (name, pid, was) in before {
        let more = peak(*pid)?.saturating_sub(*was);
        println!("{name}: +{} MiB", more / 1024);
        let limit = if *name == Service::Nats.name() { nats_kib } else { kib };
        ensure!(more < limit, "{name} took {more} KiB more");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bulk_update_arrives_whole_and_costs_little_memory() -> Result<()> {
    let mut board = Board::start().await?;
    let outcome = update(&mut board).await;
    board.explain(outcome)
}

async fn update(board: &mut Board) -> Result<()> {
    const ROWS: u64 = 100_000;
    let (mut postgres, project) = (board.postgres().await?, Uuid::now_v7());
    sqlx::query("INSERT INTO projects (id, name) VALUES ($1, 'p')").bind(project).execute(&mut postgres).await?;
    sqlx::query("INSERT INTO members VALUES ($1, 'alice', 'owner')").bind(project).execute(&mut postgres).await?;
    sqlx::query(
        "INSERT INTO tasks (id, project_id, title) SELECT gen_random_uuid(), $1, 'before ' || repeat('x', 100) FROM generate_series(1, $2)",
    )
    .bind(project)
    .bind(ROWS as i64)
    .execute(&mut postgres)
    .await?;
    let mut client = Watcher::start(board, "alice", "SELECT count(*) FROM tasks WHERE title LIKE 'before%'")?;
    client.shows(ROWS, ROWS, PATIENCE).await.context("the snapshot")?;
    drop(client);
    let mut client = Watcher::start(board, "alice", "SELECT count(*) FROM tasks WHERE title LIKE 'after%'")?;
    client.shows(0, 1, PATIENCE).await?;
    let before = peaks(board, &client)?;
    let start = Instant::now();
    sqlx::query("UPDATE tasks SET title = 'after ' || repeat('y', 100)").execute(&mut postgres).await?;
    let committed = start.elapsed();
    client.shows(ROWS, ROWS, 2 * PATIENCE).await?;
    println!("an UPDATE of {ROWS} rows: committed in {committed:.1?}, visible after {:.1?}", start.elapsed());
    compare(&before, MORE_KIB, MORE_KIB)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_of_a_million_rows_arrives_whole() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("millstream.toml");
    std::fs::write(&file, "[tables.numbers]\nscope = { kind = \"global\" }\n")?;
    let schema = "CREATE TABLE numbers (n bigint PRIMARY KEY, text text NOT NULL);";
    let mut board = Board::with(|builder| builder.app_schema(schema).config(&file)).await?;
    let outcome = million(&mut board).await;
    board.explain(outcome)
}

async fn million(board: &mut Board) -> Result<()> {
    // MILLSTREAM_BULK_ROWS asks for more.
    let rows: u64 = std::env::var("MILLSTREAM_BULK_ROWS").map_or(Ok(1_000_000), |text| text.parse())?;
    let mut postgres = board.postgres().await?;
    let mut client = Watcher::start(board, "alice", "SELECT count(*) FROM numbers")?;
    client.shows(0, 1, PATIENCE).await?;
    let before = peaks(board, &client)?;
    let start = Instant::now();
    sqlx::query(
        "INSERT INTO numbers SELECT n, 'row ' || n || repeat(' and so on', 10) FROM generate_series(1, $1) AS n",
    )
    .bind(rows as i64)
    .execute(&mut postgres)
    .await?;
    let committed = start.elapsed();
    client.shows(rows, rows, LIMIT).await?;
    println!("an INSERT of {rows} rows: committed in {committed:.1?}, visible after {:.1?}", start.elapsed());
    compare(&before, MORE_KIB_MILLION, MORE_KIB_NATS)?;
    // What comes behind it is not held up.
    sqlx::query("DELETE FROM numbers").execute(&mut postgres).await?;
    let emptied = async {
        while client.next().await? != 0 {}
        Ok::<(), anyhow::Error>(())
    };
    tokio::time::timeout(LIMIT, emptied).await.context("the rows stay")??;
    println!("emptied after {:.1?}", start.elapsed());
    compare(&before, MORE_KIB_MILLION, MORE_KIB_NATS)
}
