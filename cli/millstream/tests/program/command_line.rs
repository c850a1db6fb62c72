//! `millstream client` as a person meets it: what it says of a write that does not go through, and of the way out.

use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use millstream_tests::board::{Board, PATIENCE};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use uuid::Uuid;

/// Runs it with alice's store; gives the exit code and everything that it says.
async fn client(board: &Board, user: &str, arguments: &[&str]) -> Result<(i32, String)> {
    let mut command = tokio::process::Command::new(crate::PROGRAM);
    command.args(["client", "--edge", &board.stack.edge_url(), "--user", user, "--data"]).arg(board.stack.dir());
    command.arg("--store").arg(board.store("alice")).args(arguments);
    let output = tokio::time::timeout(PATIENCE, command.output()).await.context("it hangs")??;
    let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    Ok((output.status.code().context("no exit code")?, text))
}

/// Runs it, and looks for what it has to say.
async fn says(board: &Board, arguments: &[&str], exit: i32, parts: &[&str]) -> Result<()> {
    let (code, text) = client(board, "alice", arguments).await?;
    let missing = parts.iter().find(|part| !text.contains(**part));
    ensure!(code == exit && missing.is_none(), "{arguments:?}: exit {code}, without {missing:?}:\n{text}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_go_through_says_why_and_the_way_out() -> Result<()> {
    let board = crate::board().await?;
    let result = async {
        let (project, task) = (Uuid::now_v7().to_string(), Uuid::now_v7().to_string());
        let made = format!("INSERT INTO projects (id, name) VALUES ('{project}', 'p')");
        says(&board, &["sql", &made], 0, &["applied, 1 row (transaction 1)"]).await?;
        // Into nobody's project, and again while that is refused.
        let stray = format!("INSERT INTO tasks (id, project_id, title) VALUES ('{task}', '{}', 't')", Uuid::now_v7());
        let refused = ["rejected: permission_denied (transaction 2)", "queue retry 2", "queue discard 2"];
        says(&board, &["sql", &stray], 1, &refused).await?;
        let held = ["held, 1 row (transaction 3)", "transaction 2, on the same rows", "queue show 2"];
        says(&board, &["sql", &stray], 0, &held).await?;
        let listed = ["rejections", "permission_denied", "waits for transaction 2"];
        says(&board, &["queue", "list", "--failed"], 0, &listed).await?;
        let shown = ["rejections  1", "permission_denied: ", "title = t", &format!("insert tasks {task}")];
        says(&board, &["queue", "show", "2"], 0, &shown).await?;
        says(&board, &["status"], 0, &["user        alice", "1 transactions, 1 held back"]).await?;
        says(&board, &["--offline", "status"], 0, &["user        alice"]).await?;
        // What cannot be.
        says(&board, &["queue", "show", "9"], 1, &["no transaction 9"]).await?;
        says(&board, &["queue", "retry", "9"], 1, &["transaction 9 is not in the queue"]).await?;
        says(&board, &["queue", "retry", "1"], 1, &["transaction 1 took effect"]).await?;
        says(&board, &["queue", "retry", "3"], 1, &["transaction 3 is held back"]).await?;
        says(&board, &["queue", "edit", "2"], 2, &["--set"]).await?;
        // The way out.
        says(&board, &["queue", "discard", "3"], 0, &["discarded (transaction 3)"]).await?;
        let edit = format!("project_id={project}");
        says(&board, &["queue", "edit", "2", "--set", &edit], 0, &["applied (transaction 2)"]).await?;
        let (_, text) = client(&board, "alice", &["queue", "show", "2"]).await?;
        ensure!(text.contains("state       applied") && !text.contains("permission_denied"), "{text}");
        // Whose store it is not.
        for command in [&["status"][..], &["sql", "SELECT name FROM projects"], &["queue", "list"]] {
            let (code, text) = client(&board, "bob", command).await?;
            ensure!(code == 1 && text.contains("belongs to alice, not to bob"), "{code}: {text}");
        }
        Ok(())
    }
    .await;
    board.explain(result)
}

/// Whatever gives rows shows them, however it begins.
#[tokio::test(flavor = "multi_thread")]
async fn statements_that_give_rows_show_them() -> Result<()> {
    let board = crate::board().await?;
    let result = async {
        let project = Uuid::now_v7().to_string();
        let made = format!("INSERT INTO projects (id, name) VALUES ('{project}', 'please') RETURNING name");
        says(&board, &["sql", &made], 0, &["please", "(1 row)", "applied, 1 row (transaction 1)"]).await?;
        for read in [
            "/* all */ SELECT name FROM projects",
            "/* all */ -- of them\nSELECT name FROM projects",
            "WITH p AS (SELECT replace(name, 'x', 'y') AS name FROM projects) SELECT name FROM p",
            "WITH p AS (SELECT 'please update' AS what) SELECT what FROM p",
            "VALUES ('please')",
        ] {
            says(&board, &["sql", read], 0, &["please", "(1 row)"]).await?;
        }
        let with = "WITH p AS (SELECT id FROM projects) UPDATE projects SET name = 'q' WHERE id IN (SELECT id FROM p)";
        says(&board, &["sql", with], 0, &["applied, 1 row (transaction 2)"]).await?;
        let several = ["sql", "UPDATE projects SET name = 'r'", "SELECT name || name FROM projects"];
        says(&board, &several, 0, &["rr", "applied", "(transaction 3)"]).await?;
        // As JSON, one document: rows, or what became of a write with the rows that it gave.
        let put = "WITH p AS (SELECT id FROM projects) INSERT INTO projects (id, name) SELECT id, 's' FROM p WHERE true \
                   ON CONFLICT (id) DO UPDATE SET name = excluded.name RETURNING id AS \"the id\", name";
        let renamed = "/* one */ -- and two\n update projects set name = 't' returning name";
        for (statements, expected) in [
            (vec!["SELECT name FROM projects"], serde_json::json!([{"name": "r"}])),
            (
                vec![put],
                serde_json::json!({"state": "applied", "rows": 1, "returned": [{"the id": &project, "name": "s"}], "tx": 4}),
            ),
            (
                vec![renamed],
                serde_json::json!({"state": "applied", "rows": 1, "returned": [{"name": "t"}], "tx": 5}),
            ),
            (
                vec!["UPDATE projects SET name = 'u'", "SELECT count(*) AS n FROM projects"],
                serde_json::json!({"state": "applied", "rows": 2, "returned": [{"n": 1}], "tx": 6}),
            ),
            (vec!["UPDATE projects SET name = 'v'"], serde_json::json!({"state": "applied", "rows": 1, "tx": 7})),
        ] {
            let (code, text) = client(&board, "alice", &[&["--output", "json", "sql"], &statements[..]].concat()).await?;
            let found: serde_json::Value = serde_json::from_str(&text).with_context(|| text.clone())?;
            ensure!(code == 0 && found == expected, "{statements:?}: exit {code}, {found}");
        }
        says(&board, &["sql", "SELECT nix FROM projects"], 1, &["no such column: nix"]).await?;
        Ok(())
    }
    .await;
    board.explain(result)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_store_says_where_everything_is_and_goes_on() -> Result<()> {
    let board = crate::board().await?;
    let result = async {
        let (sent, unsent) = (Uuid::now_v7().to_string(), Uuid::now_v7().to_string());
        let made = |id: &str| format!("INSERT INTO projects (id, name) VALUES ('{id}', 'p')");
        says(&board, &["sql", &made(&sent)], 0, &["applied"]).await?;
        says(&board, &["--offline", "sql", &made(&unsent)], 0, &["queued"]).await?;
        says(
            &board,
            &["--offline", "sql", &format!("UPDATE projects SET name = 'q' WHERE id = '{sent}'")],
            0,
            &["queued"],
        )
        .await?;
        let mut bytes = std::fs::read(board.store("alice"))?;
        bytes[..100].fill(0xa5);
        std::fs::write(board.store("alice"), &bytes)?;
        let (code, text) = client(&board, "alice", &["status"]).await?;
        let told = ["was damaged", "alice.db.damaged-", "2 transactions", "Open the store again", "queue import"];
        let missing = told.iter().find(|part| !text.contains(**part));
        ensure!(code == 1 && missing.is_none(), "{code}, without {missing:?}: {text}");
        let file = text.rsplit(' ').next().context("no file is named")?.trim().to_owned();
        says(&board, &["sql", "SELECT name FROM projects"], 0, &["p", "(1 row)"]).await?;
        let taken = ["recorded as transaction 1", "recorded as transaction 2", "(2 saved transactions)"];
        says(&board, &["queue", "import", &file], 0, &taken).await?;
        says(&board, &["queue", "list"], 0, &["applied"]).await?;
        says(&board, &["sql", "SELECT name FROM projects ORDER BY name"], 0, &["(2 rows)"]).await?;
        says(&board, &["queue", "import", &file], 0, &["was recorded by an earlier import"]).await?;
        says(&board, &["queue", "import", "no.json"], 1, &["cannot read no.json"]).await?;
        Ok(())
    }
    .await;
    board.explain(result)
}

/// A new store whose rows take longer to come than one waits for: that they come is worth waiting for.
#[tokio::test(flavor = "multi_thread")]
async fn a_first_read_waits_while_its_rows_arrive() -> Result<()> {
    let board = crate::board().await?;
    let result = async {
        let (mut postgres, project) = (board.postgres().await?, Uuid::now_v7());
        sqlx::query("INSERT INTO projects (id, name) VALUES ($1, 'p')").bind(project).execute(&mut postgres).await?;
        sqlx::query("INSERT INTO members VALUES ($1, 'alice', 'owner')").bind(project).execute(&mut postgres).await?;
        sqlx::query(
            "INSERT INTO tasks (id, project_id, title) SELECT gen_random_uuid(), $1, repeat('x', 200) FROM generate_series(1, 100000)",
        )
        .bind(project)
        .execute(&mut postgres)
        .await?;
        let count = ["--wait", "1", "sql", "SELECT count(*) FROM tasks"];
        says(&board, &count, 0, &["the first snapshot is arriving", "100000"]).await
    }
    .await;
    board.explain(result)
}

/// The edge does not take the token: the change is kept, and the way out is named.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_is_refused_says_what_to_do_and_loses_nothing() -> Result<()> {
    let board = crate::board().await?;
    let result = async {
        let id = Uuid::now_v7().to_string();
        let made = format!("INSERT INTO projects (id, name) VALUES ('{id}', 'p')");
        says(&board, &["status"], 0, &["connected"]).await?;
        let file = board.store("token");
        std::fs::write(&file, "not a token")?;
        let with_file = |arguments: &[&str]| {
            let mut command = tokio::process::Command::new(crate::PROGRAM);
            command.args(["client", "--edge", &board.stack.edge_url(), "--token-file"]).arg(&file);
            command.arg("--store").arg(board.store("alice")).args(arguments);
            command
        };
        let output = tokio::time::timeout(PATIENCE, with_file(&["sql", &made]).output()).await??;
        let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
        ensure!(output.status.code() == Some(0), "{text}");
        ensure!(text.contains("queued, 1 row") && text.contains("--token-file"), "{text}");
        std::fs::write(&file, board.stack.token("alice"))?;
        // Reading does not wait for what is queued to be confirmed.
        let start = std::time::Instant::now();
        loop {
            let output = tokio::time::timeout(PATIENCE, with_file(&["sql", "SELECT 1"]).output()).await??;
            ensure!(output.status.code() == Some(0), "{output:?}");
            match says(&board, &["queue", "show", "1"], 0, &["state       applied"]).await {
                Err(error) if start.elapsed() > PATIENCE => return Err(error),
                Err(_) => {}
                Ok(_) => break,
            }
        }
        Ok(())
    }
    .await;
    board.explain(result)
}

/// A watched query is shown at once and at each change, of a table by its name too, until Ctrl-C. The token comes from a file.
#[tokio::test(flavor = "multi_thread")]
async fn a_watched_query_is_shown_at_each_change() -> Result<()> {
    let board = crate::board().await?;
    let result = async {
        let token = board.store("alice.token");
        std::fs::write(&token, board.stack.token("alice"))?;
        let mut process = tokio::process::Command::new(crate::PROGRAM)
            .args(["client", "--edge", &board.stack.edge_url(), "--store"])
            .arg(board.store("watching"))
            .arg("--token-file")
            .arg(token)
            .args(["--output", "json", "watch", "projects"])
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let mut lines = BufReader::new(process.stdout.take().context("its output")?).lines();
        let mut shown = async |name: &str| -> Result<()> {
            let found = async {
                while let Some(line) = lines.next_line().await? {
                    let rows: serde_json::Value = serde_json::from_str(&line).with_context(|| line.clone())?;
                    if rows[0]["name"] == name {
                        return Ok(());
                    }
                }
                anyhow::bail!("it ended")
            };
            tokio::time::timeout(PATIENCE, found).await.with_context(|| format!("{name} is not shown"))?
        };
        let made = format!("INSERT INTO projects (id, name) VALUES ('{}', 'first')", Uuid::now_v7());
        says(&board, &["sql", &made], 0, &["applied"]).await?;
        shown("first").await?;
        says(&board, &["sql", "UPDATE projects SET name = 'second'"], 0, &["applied"]).await?;
        shown("second").await?;
        kill(Pid::from_raw(process.id().context("it runs")? as i32), Signal::SIGINT)?;
        let ended = tokio::time::timeout(PATIENCE, process.wait()).await.context("it does not end")??;
        ensure!(ended.code() == Some(0), "{ended}");
        says(&board, &["watch", "--times", "1", "SELECT name FROM projects"], 0, &["second", "(1 row)"]).await
    }
    .await;
    board.explain(result)
}
