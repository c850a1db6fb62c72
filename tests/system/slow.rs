//! A client that reads too slowly, or not at all, falls behind and catches up, or is cut and comes back; it never shows half a
//! transaction, and nobody waits for it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures_util::StreamExt as _;
use millstream_client::{Client, SqlValue};
use millstream_tests::board::{Board, PATIENCE};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sqlx::PgConnection;

use crate::watcher::Watcher;

const SCHEMA: &str = "CREATE TABLE notes (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, body text NOT NULL);";
/// Rows of a transaction, which are several messages of the stream.
const ROWS: u64 = 200;
const BODY_BYTES: i32 = 5_000;
/// What an edge keeps of the stream is less than 40 such transactions.
const TRANSACTIONS: u64 = 45;
/// An edge cuts a client that takes nothing for 30 s.
const LONG: Duration = Duration::from_secs(33);

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_client_catches_up_and_nobody_waits_for_it() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("millstream.toml");
    std::fs::write(&file, "[tables.notes]\nscope = { kind = \"global\" }\n")?;
    let board = Board::with(|builder| builder.app_schema(SCHEMA).config(&file)).await?;
    let outcome = run(&board).await;
    board.explain(outcome)
}

fn signal(watcher: &Watcher, signal: Signal) -> Result<()> {
    let pid = watcher.process.id().context("a running client")?;
    Ok(kill(Pid::from_raw(i32::try_from(pid)?), signal)?)
}

async fn run(board: &Board) -> Result<()> {
    let mut postgres = board.postgres().await?;
    let mut slow = Watcher::start(board, "slow", "SELECT count(*) FROM notes")?;
    slow.shows(0, ROWS, PATIENCE).await?;
    let quick = board.client("quick", "quick").await?;

    let mut written = 0;
    for pause in [Duration::from_secs(5), LONG] {
        signal(&slow, Signal::SIGSTOP)?;
        let stopped = Instant::now();
        for _ in 0..TRANSACTIONS {
            written += ROWS;
            let took = write(&mut postgres, &quick, written).await?;
            ensure!(took < Duration::from_secs(5), "the other client waited {took:?}");
        }
        tokio::time::sleep(pause.saturating_sub(stopped.elapsed())).await;
        signal(&slow, Signal::SIGCONT)?;
        let resumed = Instant::now();
        slow.shows(written, ROWS, PATIENCE).await.with_context(|| format!("after a pause of {pause:?}"))?;
        println!("after a pause of {pause:?}: caught up in {:.1?}", resumed.elapsed());
    }
    // Live again.
    written += ROWS;
    write(&mut postgres, &quick, written).await?;
    slow.shows(written, ROWS, PATIENCE).await
}

/// Writes a transaction; returns how long it took to show at a client.
async fn write(postgres: &mut PgConnection, client: &Client, wanted: u64) -> Result<Duration> {
    sqlx::query(
        "INSERT INTO notes (body) SELECT left(repeat(md5(random()::text), 200), $2) FROM generate_series(1, $1)",
    )
    .bind(ROWS as i64)
    .bind(BODY_BYTES)
    .execute(postgres)
    .await?;
    let committed = Instant::now();
    let mut counts = client.watch("SELECT count(*) FROM notes", ());
    loop {
        let next = tokio::time::timeout(PATIENCE, counts.next()).await?.context("the client ended")??;
        let Some([SqlValue::Integer(count)]) = next.rows.first().map(Vec::as_slice) else { anyhow::bail!("{next:?}") };
        ensure!((*count as u64).is_multiple_of(ROWS), "{count} rows are visible");
        if *count as u64 == wanted {
            return Ok(committed.elapsed());
        }
    }
}
