//! Order: through a network that flaps, through kills at any moment, and what an app sees meanwhile.

use std::collections::BTreeMap;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use millstream_client::{Client, State};
use millstream_tests::board::{Board, PATIENCE};
use millstream_tests::oracle::converged;
use millstream_tests::workload::{Workload, audit_of, write};
use uuid::Uuid;

/// Item 32: the socket is cut a hundred times during a thousand dependent edits.
#[tokio::test(flavor = "multi_thread")]
async fn the_order_is_kept_while_the_network_flaps() -> Result<()> {
    let board = Board::start().await?;
    let result = async {
        let (a, b) = (board.client("a", "alice").await?, board.client("b", "bob").await?);
        let done = Arc::new(AtomicBool::new(false));
        let flapping = {
            let (client, done) = (a.clone(), done.clone());
            tokio::spawn(async move {
                let mut cuts = 0;
                while !done.load(Ordering::Relaxed) || cuts < 100 {
                    tokio::time::sleep(Duration::from_millis(25)).await;
                    client.drop_connection();
                    client.connect_now();
                    cuts += 1;
                }
                cuts
            })
        };
        let (mut workload, mut journal) = (Workload::new("a", 9, Some("bob")), Vec::new());
        while journal.len() < 1_000 {
            journal.extend(write(&a, workload.transaction()).await?);
        }
        done.store(true, Ordering::Relaxed);
        let cuts = flapping.await?;
        a.settled(PATIENCE).await?;
        converged(&board, &a, "alice").await?;
        converged(&board, &b, "bob").await?;
        let effects = audit_of(&board.audit().await?, &journal);
        ensure!(effects == journal, "the effects are not the changes in their order");
        ensure!(a.failed().await?.is_empty() && a.status().borrow().held == 0);
        println!("{} changes over {cuts} cuts, {} sessions", journal.len(), a.status().borrow().reconnects);
        Ok(())
    };
    board.explain(result.await)
}

/// Item 1: a process that writes is killed two hundred times: a row and its queue entry are there both or neither.
#[tokio::test(flavor = "multi_thread")]
async fn a_change_and_its_queue_entry_are_one() -> Result<()> {
    const KILLS: u64 = 200;
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("store.db");
    // The tables are there before the first connection.
    let board_schema = serde_json::json!({"version": "1", "tables": [
        {"name": "projects", "key": [0], "scopes": [{"kind": "global"}], "columns": [
            {"name": "id", "type": "uuid", "nullable": false, "writable": true},
            {"name": "name", "type": "text", "nullable": false, "writable": true}]},
        {"name": "members", "key": [0, 1], "scopes": [{"kind": "global"}], "columns": [
            {"name": "project_id", "type": "uuid", "nullable": false, "writable": true},
            {"name": "user_id", "type": "text", "nullable": false, "writable": true}]},
        {"name": "tasks", "key": [0], "scopes": [{"kind": "global"}], "columns": [
            {"name": "id", "type": "uuid", "nullable": false, "writable": true},
            {"name": "project_id", "type": "uuid", "nullable": false, "writable": true},
            {"name": "title", "type": "text", "nullable": false, "writable": true}]}]});
    let schema = serde_json::from_value::<millstream_client::Schema>(board_schema)?;
    Client::builder(&path).schema(schema).open().await?.close().await?;
    let mut total = 0;
    for round in 0..KILLS {
        let mut writer = tokio::process::Command::new(env!("CARGO_BIN_EXE_writer"))
            .env("WRITER_STORE", &path)
            .env("WRITER_OFFLINE", "1")
            .env("WRITER_ROUND", round.to_string())
            .stdout(Stdio::null())
            .kill_on_drop(true)
            .spawn()?;
        tokio::time::sleep(Duration::from_micros(20_000 + round * 317 % 40_000)).await;
        writer.kill().await?;
        let client = Client::builder(&path).open().await?;
        let counted = "SELECT (SELECT count(*) FROM tasks) + (SELECT count(*) FROM projects) + (SELECT count(*) FROM members), \
                       (SELECT count(*) FROM local_changes), (SELECT count(*) FROM local_changes WHERE seq IS NULL)";
        let (rows, entries, unnumbered) = client.query_as::<(i64, i64, i64)>(counted, ()).await?[0];
        ensure!(
            rows == entries && unnumbered == 0,
            "round {round}: {rows} rows, {entries} entries, {unnumbered} without number"
        );
        total = rows;
        client.close().await?;
    }
    ensure!(total > KILLS as i64 / 2, "only {total} changes in {KILLS} rounds");
    println!("{total} changes over {KILLS} kills, each with its queue entry");
    Ok(())
}

/// Items 8c, 55, 61: while a queue of ten thousand changes drains, no read shows an older value than one before it.
#[tokio::test(flavor = "multi_thread")]
async fn a_long_queue_drains_without_flicker() -> Result<()> {
    const ROWS: u64 = 500;
    const CHANGES: u64 = 10_000;
    let board = Board::start().await?;
    let result = async {
        let (a, b) = (board.client("a", "alice").await?, board.client("b", "bob").await?);
        let project = Uuid::now_v7();
        a.tx(move |tx| {
            tx.execute("INSERT INTO projects (id, name) VALUES (?, 'p')", (project,))?;
            tx.execute("INSERT INTO members (project_id, user_id) VALUES (?, 'bob')", (project,))
        })
        .await?
        .confirmed()
        .await?;
        a.pause();
        a.status().wait_for(|status| status.state == State::Offline).await?;
        let ids: Vec<Uuid> = (0..ROWS).map(|_| Uuid::now_v7()).collect();
        for n in 0..CHANGES {
            let id = ids[(n % ROWS) as usize];
            let write = match n < ROWS {
                true => {
                    let sql = "INSERT INTO tasks (id, project_id, title, position) VALUES (?, ?, 'n', ?)";
                    a.execute(sql, (id, project, n as f64)).await?
                }
                false => a.execute("UPDATE tasks SET position = ? WHERE id = ?", (n as f64, id)).await?,
            };
            ensure!(write.tx().is_some());
        }
        let (stop, reads) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let reader = {
            let (client, stop, reads) = (a.clone(), stop.clone(), reads.clone());
            tokio::spawn(async move {
                let mut seen: BTreeMap<String, f64> = BTreeMap::new();
                while !stop.load(Ordering::Relaxed) {
                    let rows = client.query_as::<(String, f64)>("SELECT id, position FROM tasks", ()).await?;
                    ensure!(rows.len() as u64 == ROWS, "{} rows", rows.len());
                    for (id, position) in rows {
                        let before = seen.insert(id, position).unwrap_or(0.0);
                        ensure!(position >= before, "{position} was shown after {before}");
                    }
                    reads.fetch_add(1, Ordering::Relaxed);
                }
                Ok(())
            })
        };
        let start = Instant::now();
        a.resume();
        a.settled(Duration::from_secs(60)).await?;
        let seconds = start.elapsed().as_secs_f64();
        converged(&board, &a, "alice").await?;
        stop.store(true, Ordering::Relaxed);
        reader.await??;
        converged(&board, &b, "bob").await?;
        ensure!(a.failed().await?.is_empty());
        let reads = reads.load(Ordering::Relaxed);
        ensure!(reads > 20, "only {reads} reads");
        println!(
            "{CHANGES} changes in {seconds:.1} s ({:.0}/s), {reads} reads without flicker",
            CHANGES as f64 / seconds
        );
        Ok(())
    };
    board.explain(result.await).context("draining")
}
