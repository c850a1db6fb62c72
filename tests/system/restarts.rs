//! Restarts of what Millstream stands on, under load.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use millstream_tests::board::Board;
use millstream_tests::oracle::converged;

use crate::kills::Load;

#[tokio::test(flavor = "multi_thread")]
async fn nats_restarted() -> Result<()> {
    let mut board = Board::start().await?;
    let result = async {
        let load = Load::start(&board).await?;
        for _ in 0..3 {
            tokio::time::sleep(Duration::from_millis(700)).await;
            board.stack.restart_nats().await?;
        }
        load.check(&board).await
    }
    .await;
    board.explain(result)
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres_restarted() -> Result<()> {
    let mut board = Board::start().await?;
    let result = async {
        let load = Load::start(&board).await?;
        tokio::time::sleep(Duration::from_millis(700)).await;
        for _ in 0..3 {
            board.stack.stop_postgres().await;
            tokio::time::sleep(Duration::from_millis(500)).await;
            board.stack.start_postgres().await?;
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        load.check(&board).await
    }
    .await;
    board.explain(result)
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_are_accepted_while_postgres_is_down() -> Result<()> {
    let mut board = Board::start().await?;
    let result = async {
        let a = board.client("a", "alice").await?;
        let project = uuid::Uuid::now_v7();
        a.execute("INSERT INTO projects (id, name) VALUES (?, 'p')", (project,)).await?.confirmed().await?;
        board.stack.stop_postgres().await;
        let mut writes = Vec::new();
        for n in 0..50 {
            let sql = "INSERT INTO tasks (id, project_id, title) VALUES (?, ?, ?)";
            writes.push(a.execute(sql, (uuid::Uuid::now_v7(), project, format!("t{n}"))).await?);
        }
        let mut status = a.status();
        let accepted = status.wait_for(|status| status.pending.accepted == 50);
        tokio::time::timeout(Duration::from_secs(10), accepted).await.context("not accepted")??;
        ensure!(a.status().borrow().pending.count == 50, "nothing is confirmed yet");
        board.stack.start_postgres().await?;
        for write in writes {
            write.confirmed().await?;
        }
        converged(&board, &a, "alice").await?;
        Ok(())
    }
    .await;
    board.explain(result)
}
