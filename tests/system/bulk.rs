//! A transaction of many rows reaches a client whole, and costs no process much memory.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use millstream::stack::Service;
use millstream_client::SqlValue;
use millstream_tests::board::{Board, PATIENCE};
use uuid::Uuid;

const ROWS: i64 = 100_000;
/// How much more a process may need.
const MORE_KIB: u64 = 128 * 1024;

/// Most memory that a process ever had in use, in KiB.
fn peak(pid: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bulk_update_arrives_whole_and_costs_little_memory() -> Result<()> {
    let mut board = Board::start().await?;
    let outcome = run(&mut board).await;
    board.explain(outcome)
}

async fn run(board: &mut Board) -> Result<()> {
    let (mut postgres, project) = (board.postgres().await?, Uuid::now_v7());
    sqlx::query("INSERT INTO projects (id, name) VALUES ($1, 'p')").bind(project).execute(&mut postgres).await?;
    sqlx::query("INSERT INTO members VALUES ($1, 'alice', 'owner')").bind(project).execute(&mut postgres).await?;
    sqlx::query(
        "INSERT INTO tasks (id, project_id, title) SELECT gen_random_uuid(), $1, 'before ' || repeat('x', 100) FROM generate_series(1, $2)",
    )
    .bind(project)
    .bind(ROWS)
    .execute(&mut postgres)
    .await?;
    let client = board.client("a", "alice").await?;
    let after = async || -> Result<i64> {
        let rows = client.query("SELECT count(*) FROM tasks WHERE title LIKE 'after%'", ()).await?.rows;
        let [SqlValue::Integer(count)] = rows[0][..] else { anyhow::bail!("{rows:?}") };
        Ok(count)
    };
    let mut before = Vec::new();
    for service in [Service::Nats, Service::Replication, Service::Changes, Service::Edge] {
        let pid = board.stack.pid(service).context("a running service")?;
        before.push((service, pid, peak(pid)?));
    }
    let start = Instant::now();
    sqlx::query("UPDATE tasks SET title = 'after ' || repeat('y', 100)").execute(&mut postgres).await?;
    let committed = start.elapsed();
    loop {
        let count = after().await?;
        ensure!(count == 0 || count == ROWS, "{count} of {ROWS} rows are visible");
        if count == ROWS {
            break;
        }
        ensure!(start.elapsed() < 2 * PATIENCE, "it does not arrive");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    println!("an UPDATE of {ROWS} rows: committed in {committed:.1?}, visible after {:.1?}", start.elapsed());
    for (service, pid, was) in before {
        let more = peak(pid)?.saturating_sub(was);
        println!("{}: +{} MiB", service.name(), more / 1024);
        ensure!(more < MORE_KIB, "{} took {more} KiB more", service.name());
    }
    Ok(())
}
