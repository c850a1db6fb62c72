//! What a user may not see never reaches their socket, whoever writes it and however rows move (G7); a revocation
//! takes effect with its own transaction, at once (G8).

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use millstream_client::Client;
use millstream_tests::board::{Board, PATIENCE};
use millstream_tests::oracle::converged;
use sqlx::{AssertSqlSafe, PgConnection};
use uuid::Uuid;

use crate::wire::{Tapped, proxy};

/// Part of every value that Eve may not see.
const CANARY: &str = "CANARY";

fn told(tapped: &Tapped, what: &str) -> Option<String> {
    let tapped = tapped.lock().expect("no panic");
    tapped.iter().find(|(direction, text)| *direction == "server-frame" && text.contains(what)).map(|(_, t)| t.clone())
}

/// Executes statements as one transaction.
async fn commit(postgres: &mut PgConnection, sql: String) -> Result<()> {
    sqlx::raw_sql(AssertSqlSafe(format!("BEGIN; {sql} COMMIT;")))
        .execute(postgres)
        .await
        .with_context(|| sql.clone())?;
    Ok(())
}

async fn tapped(board: &Board, user: &str) -> Result<(Client, Tapped)> {
    let tapped: Tapped = Arc::default();
    let url = proxy(board.stack.edge_url(), tapped.clone()).await?;
    let client = Client::builder(board.store(user)).edge(url).token(board.stack.token(user)).open().await?;
    tokio::time::timeout(PATIENCE, client.ready()).await.context("no snapshot")??;
    Ok((client, tapped))
}

#[tokio::test(flavor = "multi_thread")]
async fn no_forbidden_value_reaches_a_socket() -> Result<()> {
    let board = Board::start().await?;
    let outcome = canaries(&board).await;
    board.explain(outcome)
}

async fn canaries(board: &Board) -> Result<()> {
    let mut postgres = board.postgres().await?;
    let [open, shut, lent] = [(); 3].map(|()| Uuid::now_v7());
    commit(
        &mut postgres,
        format!(
            "INSERT INTO projects (id, name) VALUES ('{open}', 'open'), ('{shut}', '{CANARY} project'), ('{lent}', 'lent');
             INSERT INTO members VALUES ('{open}', 'alice', 'owner'), ('{shut}', 'alice', 'owner'), ('{lent}', 'alice', 'owner'), ('{open}', 'eve', 'member');"
        ),
    )
    .await?;
    let (eve, hers) = tapped(board, "eve").await?;
    let (alice, control) = tapped(board, "alice").await?;
    for round in 0..25 {
        let [a, b, c, d, e] = [(); 5].map(|()| Uuid::now_v7());
        let task = |id: Uuid, project: Uuid, title: &str| {
            format!("INSERT INTO tasks (id, project_id, title) VALUES ('{id}', '{project}', '{title} {round}');")
        };
        let set = |id: Uuid, what: &str| format!("UPDATE tasks SET {what} WHERE id = '{id}';");
        let steps = [
            // Written, changed, and moved out once it is clean.
            task(a, shut, CANARY),
            set(a, &format!("title = '{CANARY} again'")),
            set(a, &format!("project_id = '{open}', title = 'clean'")),
            // Moved in together with the value, changed there, with another key, deleted.
            set(a, &format!("project_id = '{shut}', title = '{CANARY} moved'")),
            set(a, &format!("id = '{b}', title = '{CANARY} key'")),
            format!("DELETE FROM tasks WHERE id = '{b}';"),
            // There and back within a transaction.
            task(c, open, "clean")
                + &set(c, &format!("project_id = '{shut}', title = '{CANARY}'"))
                + &set(c, &format!("project_id = '{open}', title = 'clean'")),
            // The same key, first here, then there.
            format!("DELETE FROM tasks WHERE id = '{c}';") + &task(c, shut, CANARY),
            format!(
                "INSERT INTO comments (id, project_id, task_id, author_id, body) VALUES ('{e}', '{shut}', '{c}', 'alice', '{CANARY}');"
            ),
            format!("INSERT INTO members VALUES ('{shut}', '{CANARY}-{round}', 'member');"),
            // Granted once it is clean; revoked before, and behind, what else its transaction writes.
            task(d, lent, CANARY),
            set(d, "title = 'clean'") + &format!("INSERT INTO members VALUES ('{lent}', 'eve', 'member');"),
            set(d, &format!("title = '{CANARY} before'"))
                + &format!("DELETE FROM members WHERE project_id = '{lent}' AND user_id = 'eve';")
                + &set(d, &format!("title = '{CANARY} behind'")),
            set(d, &format!("title = '{CANARY} later'")),
            format!("DELETE FROM tasks WHERE id = '{d}';"),
        ];
        for (n, step) in steps.into_iter().enumerate() {
            commit(&mut postgres, step).await?;
            if (n + round) % 7 == 0 {
                eve.drop_connection();
            }
            if (n * 5 + round) % 11 == 0 {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }
    converged(board, &eve, "eve").await?;
    converged(board, &alice, "alice").await?;
    ensure!(told(&control, CANARY).is_some(), "the tap hears nothing");
    ensure!(told(&hers, "clean").is_some(), "the tap hears nothing of hers");
    if let Some(frame) = told(&hers, CANARY) {
        anyhow::bail!("a forbidden value reached the socket: {frame}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revocation_takes_effect_with_its_transaction() -> Result<()> {
    let board = Board::start().await?;
    let outcome = revocations(&board).await;
    board.explain(outcome)
}

async fn revocations(board: &Board) -> Result<()> {
    let mut postgres = board.postgres().await?;
    let (project, task) = (Uuid::now_v7(), Uuid::now_v7());
    commit(
        &mut postgres,
        format!(
            "INSERT INTO projects (id, name) VALUES ('{project}', 'p'); INSERT INTO members VALUES ('{project}', 'alice', 'owner');
             INSERT INTO tasks (id, project_id, title) VALUES ('{task}', '{project}', 'clean');"
        ),
    )
    .await?;
    let (eve, hers) = tapped(board, "eve").await?;
    let mut times = Vec::new();
    for round in 0..100 {
        let set = |title: &str| format!("UPDATE tasks SET title = '{title}' WHERE id = '{task}';");
        commit(&mut postgres, set("clean") + &format!("INSERT INTO members VALUES ('{project}', 'eve', 'member');"))
            .await?;
        converged(board, &eve, "eve").await?;
        hers.lock().expect("no panic").clear();
        // Whatever is written behind the revocation, in its transaction and after it.
        let revoke = format!("DELETE FROM members WHERE project_id = '{project}' AND user_id = 'eve';");
        commit(&mut postgres, set(&format!("{CANARY} {round}")) + &revoke).await?;
        let committed = Instant::now();
        for n in 0..3 {
            commit(&mut postgres, set(&format!("{CANARY} {round} {n}"))).await?;
        }
        while told(&hers, "scope_removed").is_none() {
            ensure!(committed.elapsed() < PATIENCE, "the revocation is not told");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        times.push(committed.elapsed());
        converged(board, &eve, "eve").await?;
        ensure!(eve.query("SELECT 1 FROM tasks", ()).await?.is_empty(), "rows stay");
        if let Some(frame) = told(&hers, CANARY) {
            anyhow::bail!("a value from behind the revocation reached the socket: {frame}");
        }
    }
    times.sort_unstable();
    let p99 = times[times.len() * 99 / 100];
    println!("revocations reach a connected client within {:?} (median), {p99:?} (p99)", times[times.len() / 2]);
    ensure!(p99 <= Duration::from_secs(2), "p99 is {p99:?}");
    Ok(())
}
