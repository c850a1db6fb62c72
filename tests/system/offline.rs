//! Offline writes, and how they meet the rest of the world.

use anyhow::{Context, Result, ensure};
use millstream_client::State;
use millstream_tests::board::{Board, PATIENCE};
use millstream_tests::oracle::{actual, converged};
use millstream_tests::workload::{Workload, audit_of, write};

/// Changes made offline.
const CHANGES: usize = 1_000;

#[tokio::test(flavor = "multi_thread")]
async fn offline_then_online() -> Result<()> {
    let board = Board::start().await?;
    let result = async {
        // A has been online once, so that it knows the tables; then it goes away.
        let a = board.client("a", "alice").await?;
        let b = board.client("b", "bob").await?;
        a.pause();
        a.status().wait_for(|status| status.state == State::Offline).await?;

        let mut workload = Workload::new("a", 1, Some("bob"));
        let mut journal = Vec::new();
        while journal.len() < CHANGES {
            journal.extend(write(&a, workload.transaction()).await?);
        }
        let pending = a.status().borrow().pending.count;
        ensure!(pending > 100, "only {pending} transactions are pending");
        let offline = actual(&a).await?;
        ensure!(board.audit().await?.is_empty(), "something was sent while offline");

        a.resume();
        a.flush(PATIENCE).await.context("the queue did not drain")?;
        converged(&board, &a, "alice").await?;
        converged(&board, &b, "bob").await?;
        // What the user saw offline is what became of it (but for columns that the server fills).
        let online = actual(&a).await?;
        ensure!(
            offline["tasks"].len() == online["tasks"].len() && offline["comments"].len() == online["comments"].len()
        );

        let audit = audit_of(&board.audit().await?, &journal);
        ensure!(audit.len() == journal.len(), "{} changes had {} effects", journal.len(), audit.len());
        ensure!(audit == journal, "the effects are not in the order of the changes");
        ensure!(a.failed().await?.is_empty());
        println!("{} changes in {pending} transactions: each took effect once, in order", journal.len());
        Ok(())
    };
    board.explain(result.await)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_returning_client_gets_what_it_missed() -> Result<()> {
    let board = Board::start().await?;
    let result = async {
        let a = board.client("a", "alice").await?;
        let b = board.client("b", "bob").await?;
        let mut workload = Workload::new("a", 2, Some("bob"));
        for _ in 0..50 {
            write(&a, workload.transaction()).await?;
        }
        a.flush(PATIENCE).await?;
        converged(&board, &b, "bob").await?;
        b.close().await?;
        for _ in 0..200 {
            write(&a, workload.transaction()).await?;
        }
        a.flush(PATIENCE).await?;
        let b = board.client("b", "bob").await?;
        converged(&board, &b, "bob").await?;
        // One who was never there gets a snapshot of the same.
        let c = board.client("c", "bob").await?;
        converged(&board, &c, "bob").await?;
        // One without membership sees nothing of it.
        let d = board.client("d", "dave").await?;
        ensure!(actual(&d).await?.values().all(Vec::is_empty), "a stranger sees rows");
        Ok(())
    };
    board.explain(result.await)
}

#[tokio::test(flavor = "multi_thread")]
async fn verdicts_come_with_codes_and_block_nobody() -> Result<()> {
    let board = Board::start().await?;
    let result = async {
        let a = board.client("a", "alice").await?;
        let b = board.client("b", "bob").await?;
        let (shared, task) = (uuid::Uuid::now_v7(), uuid::Uuid::now_v7());
        a.execute("INSERT INTO projects (id, name) VALUES (?, 'p')", (shared,)).await?.confirmed().await?;
        a.execute("INSERT INTO tasks (id, project_id, title) VALUES (?, ?, 't')", (task, shared))
            .await?
            .confirmed()
            .await?;
        for user in ["bob", "carol"] {
            let member = a.execute("INSERT INTO members (project_id, user_id) VALUES (?, ?)", (shared, user)).await?;
            member.confirmed().await?;
        }
        converged(&board, &b, "bob").await?;

        let code = |result: millstream_client::Result<()>| result.err().map(|error| error.code());
        // Business rule: a check constraint.
        let bad = a.execute("UPDATE tasks SET title = '' WHERE id = ?", (task,)).await?;
        ensure!(code(bad.confirmed().await) == Some("business_rule"));
        // Permission: only owners change members.
        let bad = b.execute("UPDATE members SET role = 'owner' WHERE user_id = 'bob'", ()).await?;
        ensure!(code(bad.confirmed().await) == Some("permission_denied"));
        // Entity missing: gone in Postgres while b was away.
        b.pause();
        b.status().wait_for(|status| status.state == State::Offline).await?;
        sqlx::query("DELETE FROM tasks").execute(&mut board.postgres().await?).await?;
        let bad = b.execute("UPDATE tasks SET title = 'late' WHERE id = ?", (task,)).await?;
        let good = b
            .execute("INSERT INTO tasks (id, project_id, title) VALUES (?, ?, 'good')", (uuid::Uuid::now_v7(), shared));
        let good = good.await?;
        b.resume();
        ensure!(code(bad.confirmed().await) == Some("entity_missing"));
        good.confirmed().await.context("a later change is not held up")?;

        converged(&board, &a, "alice").await?;
        converged(&board, &b, "bob").await?;
        let history: Vec<(String, i64)> =
            sqlx::query_as("SELECT code, count(*) FROM millstream.changes_history GROUP BY code ORDER BY code")
                .fetch_all(&mut board.postgres().await?)
                .await?;
        let expected = ["business_rule", "entity_missing", "permission_denied"].map(|code| (code.to_owned(), 1));
        ensure!(history == expected, "{history:?}");
        ensure!(a.failed().await?.len() == 1 && b.failed().await?.len() == 2);
        Ok(())
    };
    board.explain(result.await)
}
