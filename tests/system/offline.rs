//! Offline writes, and how they meet the rest of the world.

use anyhow::{Context, Result, ensure};
use millstream_client::{Outcome, State};
use millstream_tests::board::{Board, PATIENCE};
use millstream_tests::oracle::{actual, converged};
use millstream_tests::workload::{Workload, audit_of, write};
use uuid::Uuid;

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
        a.settled(PATIENCE).await.context("the queue did not drain")?;
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
        a.settled(PATIENCE).await?;
        converged(&board, &b, "bob").await?;
        b.close().await?;
        for _ in 0..200 {
            write(&a, workload.transaction()).await?;
        }
        a.settled(PATIENCE).await?;
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

        let code =
            |result: millstream_client::Result<millstream_client::Outcome>| result.err().map(|error| error.code());
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
        // A business rule is tried again by itself, so its code may be there more than once by now.
        let history: Vec<String> =
            sqlx::query_scalar("SELECT DISTINCT code FROM millstream.changes_history ORDER BY code")
                .fetch_all(&mut board.postgres().await?)
                .await?;
        ensure!(history == ["business_rule", "entity_missing", "permission_denied"], "{history:?}");
        ensure!(b.failed().await?.len() == 2, "{:?}", b.failed().await?);
        Ok(())
    };
    board.explain(result.await)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_moved_into_a_granted_scope_arrives() -> Result<()> {
    let board = Board::start().await?;
    let result = async {
        let mut postgres = board.postgres().await?;
        let (a, b, task) = (uuid::Uuid::now_v7(), uuid::Uuid::now_v7(), uuid::Uuid::now_v7());
        for project in [a, b] {
            sqlx::query("INSERT INTO projects (id, name) VALUES ($1, 'p')")
                .bind(project)
                .execute(&mut postgres)
                .await?;
        }
        let join = "INSERT INTO members (project_id, user_id) VALUES ($1, 'bob')";
        sqlx::query(join).bind(a).execute(&mut postgres).await?;
        let insert = "INSERT INTO tasks (id, project_id, title) VALUES ($1, $2, 't')";
        sqlx::query(insert).bind(task).bind(a).execute(&mut postgres).await?;
        let client = board.client("b", "bob").await?;
        converged(&board, &client, "bob").await?;

        // While bob is away, the row moves to a project that he then joins: the stream tells that it left the one, the
        // snapshot that it is in the other.
        client.close().await?;
        sqlx::query("UPDATE tasks SET project_id = $1").bind(b).execute(&mut postgres).await?;
        sqlx::query(join).bind(b).execute(&mut postgres).await?;
        let client = board.client("b", "bob").await?;
        converged(&board, &client, "bob").await?;

        // The same while he is connected, back and forth, with access to the one lost and regained.
        let leave = "DELETE FROM members WHERE project_id = $1 AND user_id = 'bob'";
        for round in 0..10 {
            sqlx::query(leave).bind(a).execute(&mut postgres).await?;
            let (from, to) = if round % 2 == 0 { (b, a) } else { (a, b) };
            sqlx::query("UPDATE tasks SET project_id = $1 WHERE project_id = $2")
                .bind(to)
                .bind(from)
                .execute(&mut postgres)
                .await?;
            sqlx::query(join).bind(a).execute(&mut postgres).await?;
        }
        converged(&board, &client, "bob").await?;
        ensure!(actual(&client).await?["tasks"].len() == 1);
        Ok(())
    };
    board.explain(result.await)
}

/// What Postgres fills in shows at once, so that a list and a toggle work before the first confirmation.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_made_offline_has_its_defaults_at_once() -> Result<()> {
    let board = Board::start().await?;
    let result = async {
        let (mut sql, project, id) = (board.postgres().await?, Uuid::now_v7(), Uuid::now_v7());
        sqlx::query("INSERT INTO projects (id, name) VALUES ($1, 'p')").bind(project).execute(&mut sql).await?;
        sqlx::query("INSERT INTO members VALUES ($1, 'alice', 'owner')").bind(project).execute(&mut sql).await?;
        let client = board.client("a", "alice").await?;
        converged(&board, &client, "alice").await?;
        client.pause();
        client.status().wait_for(|status| status.state == State::Offline).await?;
        let insert = "INSERT INTO tasks (id, project_id, title) VALUES (?, ?, 't')";
        client.execute(insert, (id, project)).await?;
        let open = client.query("SELECT id FROM tasks WHERE NOT done", ()).await?;
        ensure!(open.rows.len() == 1, "the new task is not in the list");
        let toggled = client.execute("UPDATE tasks SET done = NOT done WHERE id = ?", (id,)).await?;
        ensure!(*toggled.value() == 1);
        client.resume();
        ensure!(toggled.confirmed().await? == Outcome::Applied);
        let done: bool =
            sqlx::query_scalar("SELECT done FROM tasks WHERE id = $1").bind(id).fetch_one(&mut sql).await?;
        ensure!(done, "the toggle was lost");
        converged(&board, &client, "alice").await?;
        Ok(())
    }
    .await;
    board.explain(result)
}
