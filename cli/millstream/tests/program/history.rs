//! `changes_history`: exactly one row for each failed attempt and none for what succeeds; `millstream history`; retention.

use std::process::Output;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures_util::StreamExt;
use millstream_client::{Client, Error};
use millstream_provision::keys::Role;
use millstream_schemas::subject::CHANGES_STREAM;
use millstream_stack::Service;
use millstream_tests::board::{Board, PATIENCE};
use serde_json::Value;
use sqlx::{Connection as _, Executor as _};
use uuid::Uuid;

/// `millstream history` as an operator runs it beside `millstream dev`.
async fn history(board: &Board, arguments: &[&str]) -> Result<Output> {
    let mut command = tokio::process::Command::new(crate::PROGRAM);
    command.arg("history").arg("--data").arg(board.stack.dir()).args(arguments);
    for name in ["DATABASE_URL", "NATS_URL", "MILLSTREAM_NATS_SEED_FILE", "MILLSTREAM_NATS_SEED"] {
        command.env_remove(name);
    }
    Ok(tokio::time::timeout(PATIENCE, command.output()).await.context("millstream history hangs")??)
}

/// The JSON values that it prints, one a line.
async fn json(board: &Board, arguments: &[&str], exit: i32) -> Result<Vec<Value>> {
    let output = history(board, arguments).await?;
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.code() == Some(exit), "{arguments:?}: {}\n{out}\n{err}", output.status);
    out.lines().map(|line| serde_json::from_str(line).with_context(|| line.to_owned())).collect()
}

async fn count(board: &Board, sql: &'static str) -> Result<i64> {
    Ok(sqlx::query_scalar(sql).fetch_one(&mut board.postgres().await?).await?)
}

/// A task in a project that the client's user is no member of: permission denied.
async fn refused(client: &Client, project: Uuid, title: &str) -> Result<u64> {
    let sql = "INSERT INTO tasks (id, project_id, title) VALUES (?, ?, ?)";
    let write = client.execute(sql, (Uuid::now_v7(), project, title.to_owned())).await?;
    match tokio::time::timeout(PATIENCE, write.confirmed()).await? {
        Err(Error::Rejected { tx, code, .. }) if code.as_str() == "permission_denied" => Ok(tx),
        verdict => anyhow::bail!("{verdict:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_row_for_each_failed_attempt_and_none_for_successes() -> Result<()> {
    let mut board = crate::board().await?;
    let result = async {
        let alice = board.client("a", "alice").await?;
        let mut last = None;
        for n in 0..105 {
            if n % 21 == 20 {
                // Into nobody's project: refused, for good.
                let sql = "INSERT INTO tasks (id, project_id, title) VALUES (?, ?, 'no')";
                last = Some(alice.execute(sql, (Uuid::now_v7(), Uuid::now_v7())).await?);
            } else {
                let sql = "INSERT INTO projects (id, name) VALUES (?, ?)";
                last = Some(alice.execute(sql, (Uuid::now_v7(), format!("p{n}"))).await?);
            }
            if n % 30 == 10 {
                board.kill_and_restart(Service::Changes).await?;
            }
        }
        let last = last.context("no write")?;
        let verdict = tokio::time::timeout(PATIENCE, last.confirmed()).await?;
        ensure!(matches!(verdict, Err(Error::Rejected { .. })), "{verdict:?}");
        let rows = "SELECT count(*) FROM millstream.changes_history";
        ensure!(count(&board, rows).await? == 5, "{} rows", count(&board, rows).await?);
        ensure!(board.audit().await?.len() == 100);

        // Everything comes once more, as from an edge that did not hear the broker's acknowledgement, and again after a kill.
        let nats = millstream_runtime::nats::connect(&board.stack.nats_args(Role::Admin), "admin").await?;
        let stream = nats.jetstream.get_stream(CHANGES_STREAM).await?;
        for round in 0..2 {
            let end = stream.get_info().await?.state.last_sequence;
            let mut resent = 0;
            for sequence in 1..=end {
                let Ok(message) = stream.get_raw_message(sequence).await else { continue };
                resent = nats.jetstream.publish(message.subject, message.payload).await?.await?.sequence;
            }
            ensure!(resent > end, "nothing was resent");
            if round == 1 {
                board.kill_and_restart(Service::Changes).await?;
            }
            let start = Instant::now();
            let done = "SELECT coalesce(max(position), 0) FROM millstream.partitions";
            while (count(&board, done).await? as u64) < resent {
                ensure!(start.elapsed() < PATIENCE, "what was resent is not read");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        ensure!(count(&board, rows).await? == 5 && board.audit().await?.len() == 100, "a repetition had an effect");
        let attempts = "SELECT count(DISTINCT (client_id, seq, attempt)) FROM millstream.changes_history";
        ensure!(count(&board, attempts).await? == 5);
        Ok(())
    }
    .await;
    board.explain(result)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_history_is_listed_shown_exported_and_replayed() -> Result<()> {
    let board = crate::board().await?;
    let result = async {
        let (alice, bob) = (board.client("a", "alice").await?, board.client("b", "bob").await?);
        let project = Uuid::now_v7();
        bob.execute("INSERT INTO projects (id, name) VALUES (?, 'bobs')", (project,)).await?.confirmed().await?;
        let client_seq = refused(&alice, project, "first").await?;
        refused(&alice, project, "second").await?;
        refused(&bob, Uuid::now_v7(), "third").await?;

        let listed = json(&board, &["list", "-o", "json"], 0).await?;
        let ids: Vec<i64> =
            listed[0].as_array().context("no list")?.iter().filter_map(|row| row["id"].as_i64()).collect();
        ensure!(ids.len() == 3 && ids.is_sorted_by(|a, b| a > b), "{listed:?}");
        let (first, second) = (ids[2].to_string(), ids[1].to_string());
        let client = alice.client_id().to_string();
        for (flags, expected) in [
            (vec!["--user", "alice"], 2),
            (vec!["--client", client.as_str()], 2),
            (vec!["--code", "business_rule"], 0),
            (vec!["--code", "permission_denied", "--table", "tasks", "--since", "1h"], 3),
            (vec!["--since", "2100-01-01"], 0),
            (vec!["--limit", "1"], 1),
        ] {
            let listed = json(&board, &[&["list", "-o", "json"], &flags[..]].concat(), 0).await?;
            ensure!(listed[0].as_array().map(Vec::len) == Some(expected), "{flags:?}: {listed:?}");
        }
        let text = String::from_utf8(history(&board, &["list"]).await?.stdout)?;
        ensure!(text.contains("permission_denied") && text.ends_with("(3 rows)\n"), "{text}");

        let shown = json(&board, &["show", &first, "-o", "json"], 0).await?;
        ensure!(shown[0]["payload"]["client_seq"] == client_seq && shown[0]["user_id"] == "alice", "{shown:?}");
        let text = String::from_utf8(history(&board, &["show", &first]).await?.stdout)?;
        ensure!(text.contains("title = \"first\""), "{text}");
        ensure!(history(&board, &["show", "999999"]).await?.status.code() == Some(1));

        let exported = json(&board, &["export"], 0).await?;
        ensure!(exported.len() == 3 && exported[0]["id"] == ids[2], "{exported:?}");
        ensure!(json(&board, &["export", "--user", "bob"], 0).await?.len() == 1);

        // The cause is still there: one more failed attempt, recorded as its own.
        let replayed = json(&board, &["replay", &first, "-o", "json"], 1).await?;
        ensure!(replayed[0]["verdict"] == "rejected" && replayed[0]["code"] == "permission_denied", "{replayed:?}");
        let rows = "SELECT count(*) FROM millstream.changes_history";
        ensure!(count(&board, rows).await? == 4);
        let attempts = "SELECT count(*) FROM millstream.changes_history WHERE attempt = 2 AND user_id = 'alice'";
        ensure!(count(&board, attempts).await? == 1, "the replay is not alice's second attempt");

        // It is gone: applied once, however often it is replayed, and as alice's.
        bob.execute("INSERT INTO members (project_id, user_id) VALUES (?, 'alice')", (project,))
            .await?
            .confirmed()
            .await?;
        for before in [false, true] {
            let replayed = json(&board, &["replay", &first, &second, "-o", "json"], 0).await?;
            ensure!(replayed.len() == 2, "{replayed:?}");
            ensure!(replayed.iter().all(|one| one["verdict"] == "applied" && one["before"] == before), "{replayed:?}");
        }
        let tasks = "SELECT count(*) FROM audit WHERE tbl = 'tasks'";
        ensure!(count(&board, tasks).await? == 2 && count(&board, rows).await? == 4);

        // Alice's own ledger was not touched: her client goes on.
        alice
            .execute("INSERT INTO projects (id, name) VALUES (?, 'hers')", (Uuid::now_v7(),))
            .await?
            .confirmed()
            .await?;
        let mut titles = alice.watch("SELECT title FROM tasks ORDER BY title", ());
        let seen = async {
            while let Some(rows) = titles.next().await {
                if rows?.rows.len() == 2 {
                    return Ok(());
                }
            }
            anyhow::bail!("the watch ended")
        };
        tokio::time::timeout(PATIENCE, seen).await.context("alice does not see what was replayed")??;
        Ok(())
    };
    board.explain(result.await)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_history_is_forgotten_when_nobody_asks_any_more() -> Result<()> {
    let mut board = Board::with(|builder| {
        builder.executable(crate::PROGRAM).env_of(Service::Changes, "MILLSTREAM_HISTORY_RETENTION_DAYS", "30")
    })
    .await?;
    let result = async {
        let mut postgres = board.postgres().await?;
        // Clients: one that is active, one that has been away for as long as the retention, and one that nobody knows.
        sqlx::raw_sql(
            "INSERT INTO millstream.clients (client_id, user_id, last_seq, last_seen) VALUES
                 ('00000000-0000-0000-0000-00000000000a', 'a', 20000, now()),
                 ('00000000-0000-0000-0000-00000000000b', 'b', 9, now() - interval '31 days');
             INSERT INTO millstream.changes_history (client_id, user_id, seq, attempt, change_id, payload, code, message, at)
             SELECT client::uuid, 'u', seq, 1, gen_random_uuid(), '{}', 'internal', what, now() - age FROM (VALUES
                 ('00000000-0000-0000-0000-00000000000a', 10000, interval '31 days', 'goes'),
                 ('00000000-0000-0000-0000-00000000000a', 10001, interval '31 days', 'stays: it may still be asked about'),
                 ('00000000-0000-0000-0000-00000000000a', 1, interval '29 days', 'stays: young'),
                 ('00000000-0000-0000-0000-00000000000b', 9, interval '31 days', 'goes'),
                 ('00000000-0000-0000-0000-00000000000b', 8, interval '29 days', 'stays: young'),
                 ('00000000-0000-0000-0000-00000000000c', 1, interval '31 days', 'goes')) AS h(client, seq, age, what);
             INSERT INTO millstream.changes_history (client_id, user_id, seq, attempt, change_id, payload, code, message, at)
             SELECT '00000000-0000-0000-0000-00000000000d', 'u', n, 1, gen_random_uuid(), '{}', 'internal', 'goes',
                    now() - interval '31 days' FROM generate_series(1, 2500) n;
             INSERT INTO millstream.instances (client_id, first_seq, instance)
             SELECT '00000000-0000-0000-0000-00000000000a', n, gen_random_uuid() FROM generate_series(1, 1005) n;
             INSERT INTO millstream.instances (client_id, first_seq, instance)
             SELECT '00000000-0000-0000-0000-00000000000b', n, gen_random_uuid() FROM generate_series(1, 1000) n",
        )
        .execute(&mut postgres)
        .await?;
        board.kill_and_restart(Service::Changes).await?;
        let goes = "SELECT (SELECT count(*) FROM millstream.changes_history WHERE message = 'goes')
                  + (SELECT count(*) FROM millstream.instances WHERE client_id = '00000000-0000-0000-0000-00000000000a' AND first_seq <= 5)";
        let start = Instant::now();
        while count(&board, goes).await? > 0 {
            ensure!(start.elapsed() < PATIENCE, "{} are still there", count(&board, goes).await?);
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        ensure!(count(&board, "SELECT count(*) FROM millstream.changes_history").await? == 3);
        ensure!(count(&board, "SELECT count(*) FROM millstream.instances").await? == 2_000);
        Ok(())
    }
    .await;
    board.explain(result)
}

async fn parked(board: &Board) -> Result<Vec<Value>> {
    let rows = json(board, &["parked", "--output", "json"], 0).await?;
    Ok(rows.into_iter().next().and_then(|rows| rows.as_array().cloned()).unwrap_or_default())
}

/// A transaction that cannot be applied is the operator's to see and to refuse, and nobody else's to wait for.
#[tokio::test(flavor = "multi_thread")]
async fn an_operator_sees_what_is_parked_and_can_reject_it() -> Result<()> {
    let board = crate::board().await?;
    let result = async {
        let (a, b) = (board.client("a", "alice").await?, board.client("b", "alice").await?);
        let [project, one, two] = [Uuid::now_v7(), Uuid::now_v7(), Uuid::now_v7()].map(|id| id.to_string());
        a.execute("INSERT INTO projects (id, name) VALUES (?1, 'p')", (project.clone(),)).await?.confirmed().await?;
        for id in [&one, &two] {
            let sql = "INSERT INTO tasks (id, project_id, title) VALUES (?1, ?2, 'task')";
            a.execute(sql, (id.clone(), project.clone())).await?.confirmed().await?;
        }
        b.settled(PATIENCE).await?;
        // An admin's transaction that stays open.
        let mut admin = board.postgres().await?;
        let mut lock = admin.begin().await?;
        lock.execute(sqlx::query("SELECT FROM tasks WHERE id = $1::uuid FOR UPDATE").bind(&one)).await?;
        let write = a.execute("UPDATE tasks SET title = 'mine' WHERE id = ?1", (one.clone(),)).await?;
        let deadline = Instant::now() + PATIENCE;
        let row = loop {
            if let Some(row) = parked(&board).await?.first() {
                break row.clone();
            }
            ensure!(Instant::now() < deadline, "nothing is parked");
            tokio::time::sleep(Duration::from_millis(100)).await;
        };
        ensure!(row["user_id"] == "alice" && row["table_name"] == "tasks", "{row}");
        ensure!(row["reason"].as_str().is_some_and(|reason| reason.contains("lock timeout")), "{row}");
        let client_id = a.client_id().to_string();
        ensure!(row["client_id"] == client_id.as_str(), "{row}");
        // Others go on meanwhile.
        let start = Instant::now();
        let task = "INSERT INTO tasks (id, project_id, title) VALUES (?1, ?2, 'next')";
        b.execute(task, (Uuid::now_v7().to_string(), project.clone())).await?.confirmed().await?;
        ensure!(start.elapsed() < Duration::from_secs(2), "another client waited {:?}", start.elapsed());
        let client_seq = row["client_seq"].to_string();
        json(&board, &["reject", &client_id, "999999"], 1).await?;
        let told = history(&board, &["reject", &client_id, &client_seq, "--message", "closed for today"]).await?;
        ensure!(told.status.success(), "{told:?}");
        let error = tokio::time::timeout(PATIENCE, write.confirmed()).await?.err().context("it was applied")?;
        ensure!(error.to_string().contains("closed for today"), "{error:#}");
        let failed = a.failed().await?.remove(0);
        ensure!(failed.code.is_some_and(|code| code.as_str() == "operator_rejected"), "{failed:?}");
        let deadline = Instant::now() + PATIENCE;
        while !parked(&board).await?.is_empty() {
            ensure!(Instant::now() < deadline, "what is done is still called parked");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        lock.rollback().await?;
        a.retry(failed.tx).await?.confirmed().await?;
        a.close().await?;
        b.close().await?;
        Ok(())
    };
    let result = result.await;
    board.explain(result)
}
