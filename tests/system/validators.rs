//! External validators: what they refuse is rejected, and while they give no verdict the
//! changes of that partition wait, in order, and no others.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures_util::StreamExt;
use millstream_client::{Client, Error};
use millstream_provision::keys::Role;
use millstream_schemas::stream::{ValidateRequest, ValidateResponse};
use millstream_schemas::subject;
use millstream_stack::Service;
use millstream_tests::board::{Board, PATIENCE};
use millstream_tests::oracle::converged;
use sqlx::Row;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::task::JoinHandle;
use uuid::Uuid;

/// How long validators have; short, so that a slow one is found out soon.
const DEADLINE_MS: u64 = 400;
/// Long enough for several rounds of asking.
const A_WHILE: Duration = Duration::from_millis(1_500);

/// The board with validators for tasks, all of it in one worker, so that what waits could get into the way of others.
async fn board(folder: &Path) -> Result<Board> {
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/board/millstream.toml");
    let text = std::fs::read_to_string(example)?;
    let validate =
        format!("[tables.tasks]\nvalidate = {{ on = [\"insert\", \"update\"], deadline_ms = {DEADLINE_MS} }}");
    ensure!(text.contains("[tables.tasks]\n"));
    let config = folder.join("millstream.toml");
    std::fs::write(&config, text.replace("[tables.tasks]", &validate))?;
    Board::with(|builder| builder.config(config).env_of(Service::Changes, "MILLSTREAM_CHANGES_WORKERS", "1")).await
}

const OK: u8 = 0;
const GARBAGE: u8 = 1;
const SLOW: u8 = 2;

/// A validator in the test's own process, with the key that validators get.
struct Responder {
    mode: Arc<AtomicU8>,
    asked: Arc<AtomicU64>,
    task: JoinHandle<Result<()>>,
}

impl Responder {
    async fn start(board: &Board, mode: u8) -> Result<Responder> {
        let nats =
            millstream_runtime::nats::connect(&board.stack.nats_args(Role::Validator), "validator").await?.client;
        let mut questions = nats.queue_subscribe(subject::validate("tasks"), "validators".into()).await?;
        nats.flush().await?;
        let (mode, asked) = (Arc::new(AtomicU8::new(mode)), Arc::new(AtomicU64::new(0)));
        let (now, count) = (mode.clone(), asked.clone());
        let task = tokio::spawn(async move {
            while let Some(question) = questions.next().await {
                count.fetch_add(1, Ordering::Relaxed);
                let request: ValidateRequest = serde_json::from_slice(&question.payload)?;
                ensure!(!request.changes.is_empty() && request.changes.iter().all(|change| change.table == "tasks"));
                let reply = question.reply.context("no reply subject")?;
                let (nats, mode) = (nats.clone(), now.load(Ordering::Relaxed));
                tokio::spawn(async move {
                    let answer = match mode {
                        OK => serde_json::to_vec(&ValidateResponse::Ok)?,
                        GARBAGE => b"{\"verdict\": \"reject\"".to_vec(),
                        _ => {
                            tokio::time::sleep(Duration::from_millis(2 * DEADLINE_MS)).await;
                            // Too late to count.
                            serde_json::to_vec(&ValidateResponse::Ok)?
                        }
                    };
                    anyhow::Ok(nats.publish(reply, answer.into()).await?)
                });
            }
            Ok(())
        });
        Ok(Responder { mode, asked, task })
    }

    fn asked(&self) -> u64 {
        self.asked.load(Ordering::Relaxed)
    }
}

impl Drop for Responder {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A client of `user` whose changes go through another partition than `client`'s.
async fn elsewhere(board: &Board, client: &Client, user: &str) -> Result<Client> {
    for n in 0.. {
        let other = board.client(&format!("{user}{n}"), user).await?;
        if subject::partition(other.client_id()) != subject::partition(client.client_id()) {
            return Ok(other);
        }
    }
    unreachable!("some partition differs")
}

async fn project(client: &Client) -> Result<Uuid> {
    let id = Uuid::now_v7();
    client.execute("INSERT INTO projects (id, name) VALUES (?, 'p')", (id,)).await?.confirmed().await?;
    Ok(id)
}

async fn task(client: &Client, project: Uuid, title: &str) -> Result<millstream_client::Write<usize>> {
    let sql = "INSERT INTO tasks (id, project_id, title) VALUES (?, ?, ?)";
    Ok(client.execute(sql, (Uuid::now_v7(), project, title.to_owned())).await?)
}

/// Titles of tasks in the order in which they were applied.
async fn applied(board: &Board) -> Result<Vec<String>> {
    Ok(board.audit().await?.into_iter().filter(|entry| entry.0 == "tasks").map(|entry| entry.3).collect())
}

async fn history(board: &Board) -> Result<Vec<(i64, String, Option<String>, String)>> {
    let sql = "SELECT seq, code, rule, message FROM millstream.changes_history WHERE attempt = 1 ORDER BY seq";
    let rows = sqlx::query(sql).fetch_all(&mut board.postgres().await?).await?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1), row.get(2), row.get(3))).collect())
}

/// Python with what the example needs, in the target folder.
async fn python() -> Result<PathBuf> {
    let requirements = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/validator/requirements.txt");
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("validator-venv");
    let (python, done) = (folder.join("bin/python"), folder.join("installed"));
    let wanted = std::fs::read_to_string(&requirements)?;
    if std::fs::read_to_string(&done).is_ok_and(|installed| installed == wanted) {
        return Ok(python);
    }
    let run = async |program: &Path, arguments: &[&str]| {
        let needs = "this test needs Python 3 with venv and pip, and PyPI";
        let output = tokio::process::Command::new(program).args(arguments).output().await.context(needs)?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success(), "{needs}; {} {arguments:?} failed: {text}", program.display());
        Ok(())
    };
    run(Path::new("python3"), &["-m", "venv", "--clear", &folder.to_string_lossy()]).await?;
    run(&python, &["-m", "pip", "install", "--quiet", "--requirement", &requirements.to_string_lossy()]).await?;
    std::fs::write(done, wanted)?;
    Ok(python)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_example_in_python_refuses_by_its_word_list() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (board, python) = (board(folder.path()).await?, python().await?);
    let result = async {
        let mut validator = tokio::process::Command::new(python)
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/validator/validator.py"))
            .env("NATS_URL", board.stack.nats_url())
            .env("MILLSTREAM_NATS_SEED_FILE", Role::Validator.seed_file(&board.stack.dir().join("nats")))
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let mut lines = BufReader::new(validator.stdout.take().context("no stdout")?).lines();
        let ready = tokio::time::timeout(PATIENCE, lines.next_line()).await.context("the validator is not ready")??;
        ensure!(ready.as_deref() == Some("ready"), "{ready:?}");

        let alice = board.client("a", "alice").await?;
        let project = project(&alice).await?;
        let mut writes = Vec::new();
        for n in 0..30 {
            let title = if n % 10 == 4 { format!("Win the LOTTERY {n}") } else { format!("fine {n}") };
            writes.push((n, task(&alice, project, &title).await?));
        }
        for (n, write) in &writes {
            let verdict = tokio::time::timeout(PATIENCE, write.confirmed()).await.with_context(|| format!("{n}"))?;
            match verdict {
                Ok(_) => ensure!(n % 10 != 4, "{n} was let through"),
                Err(Error::Rejected { code, message, .. }) => {
                    ensure!(n % 10 == 4 && code.as_str() == "business_rule", "{n}: {code}");
                    ensure!(message.contains("lottery"), "{message}");
                }
                Err(error) => return Err(error.into()),
            }
        }
        let expected: Vec<String> = (0..30).filter(|n| n % 10 != 4).map(|n| format!("fine {n}")).collect();
        ensure!(applied(&board).await? == expected, "{:?}", applied(&board).await?);
        let history = history(&board).await?;
        ensure!(history.len() == 3, "{history:?}");
        ensure!(history.iter().all(|row| row.1 == "business_rule" && row.2.as_deref() == Some("title_word")));

        // Another word of the list, by an update; a transaction falls as a whole.
        let sql = "UPDATE tasks SET title = 'spam' WHERE title = 'fine 0'";
        ensure!(matches!(alice.execute(sql, ()).await?.confirmed().await, Err(Error::Rejected { .. })));
        ensure!(applied(&board).await? == expected);
        Ok(())
    };
    board.explain(result.await)
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_validator_changes_wait_and_others_go_on() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut board = board(folder.path()).await?;
    let result = async {
        let alice = board.client("a", "alice").await?;
        let project_id = project(&alice).await?;
        let mut expected = Vec::new();
        let mut last = None;
        for n in 0..40 {
            let title = format!("t{n}");
            last = Some(task(&alice, project_id, &title).await?);
            expected.push(title);
        }
        // Behind them in alice's order.
        let comment = alice.execute("INSERT INTO projects (id, name) VALUES (?, 'behind')", (Uuid::now_v7(),)).await?;
        let bob = elsewhere(&board, &alice, "bob").await?;
        for _ in 0..5 {
            project(&bob).await?;
        }
        tokio::time::sleep(A_WHILE).await;
        project(&bob).await?;
        ensure!(applied(&board).await?.is_empty(), "a task was waved through");
        let behind = "SELECT count(*) FROM projects WHERE name = 'behind'";
        let behind: i64 = sqlx::query_scalar(behind).fetch_one(&mut board.postgres().await?).await?;
        ensure!(behind == 0, "alice's later change overtook");
        ensure!(history(&board).await?.is_empty(), "no verdict was a verdict");
        let log = std::fs::read_to_string(board.stack.log_path(Service::Changes))?;
        let warnings = log.lines().filter(|line| line.contains("validators give no verdict")).collect::<Vec<_>>();
        ensure!(warnings.len() == 1 && warnings[0].contains("\"table\":\"tasks\""), "{warnings:?}");

        // The one who waits may die meanwhile.
        board.kill_and_restart(Service::Changes).await?;
        project(&bob).await?;
        ensure!(applied(&board).await?.is_empty());

        let responder = Responder::start(&board, OK).await?;
        tokio::time::timeout(PATIENCE, last.context("no write")?.confirmed()).await.context("tasks still wait")??;
        tokio::time::timeout(PATIENCE, comment.confirmed()).await.context("what is behind still waits")??;
        ensure!(applied(&board).await? == expected, "not each once in order: {:?}", applied(&board).await?);
        ensure!(responder.asked() >= expected.len() as u64);
        ensure!(history(&board).await?.is_empty());
        alice.settled(PATIENCE).await?;
        converged(&board, &alice, "alice").await?;
        Ok(())
    }
    .await;
    board.explain(result)
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_and_slowness_are_no_verdicts() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let board = board(folder.path()).await?;
    let result = async {
        let alice = board.client("a", "alice").await?;
        let bob = elsewhere(&board, &alice, "bob").await?;
        let project_id = project(&alice).await?;
        let responder = Responder::start(&board, GARBAGE).await?;
        let mut expected: Vec<String> = Vec::new();
        for (mode, name) in [(GARBAGE, "garbage"), (SLOW, "slow")] {
            responder.mode.store(mode, Ordering::Relaxed);
            let asked = responder.asked();
            let mut writes = Vec::new();
            for n in 0..5 {
                let title = format!("{name} {n}");
                writes.push(task(&alice, project_id, &title).await?);
                expected.push(title);
            }
            tokio::time::sleep(A_WHILE).await;
            // No question of alice's holds bob up for as long as a validator may take.
            tokio::time::timeout(Duration::from_secs(10), project(&bob)).await.context("bob waits for alice")??;
            ensure!(responder.asked() > asked, "{name}: nobody was asked");
            ensure!(applied(&board).await?.len() == expected.len() - writes.len(), "{name}: taken for a yes");
            ensure!(history(&board).await?.is_empty(), "{name}: taken for a no");
            responder.mode.store(OK, Ordering::Relaxed);
            for write in writes {
                tokio::time::timeout(PATIENCE, write.confirmed()).await.context(name)??;
            }
            ensure!(applied(&board).await? == expected, "{name}: {:?}", applied(&board).await?);
        }
        // Where all goes well, each transaction is asked about once.
        let before = responder.asked();
        for n in 0..20 {
            task(&alice, project_id, &format!("once {n}")).await?.confirmed().await?;
        }
        ensure!(responder.asked() == before + 20, "{} questions for 20 transactions", responder.asked() - before);
        Ok(())
    };
    board.explain(result.await)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_validator_may_say_nothing_but_its_answers() -> Result<()> {
    let board = Board::with(|builder| builder.services(Vec::new())).await?;
    let admin = millstream_runtime::nats::connect(&board.stack.nats_args(Role::Admin), "admin").await?.client;
    let mut heard =
        futures_util::stream::select_all([admin.subscribe("ms.>").await?, admin.subscribe("_INBOX_changes.>").await?]);
    admin.flush().await?;
    let validator =
        millstream_runtime::nats::connect(&board.stack.nats_args(Role::Validator), "validator").await?.client;
    for subject in ["ms.changes.0", "ms.wal.origin", "ms.results.x", "ms.validate.tasks", "_INBOX_changes.x"] {
        validator.publish(subject, "forged".into()).await?;
    }
    validator.flush().await?;
    // Nor may it read what others say.
    let mut overheard = validator.subscribe("ms.changes.*").await?;
    validator.flush().await?;
    admin.publish("ms.changes.0", "true".into()).await?;
    admin.flush().await?;
    let first = tokio::time::timeout(PATIENCE, heard.next()).await?.context("nothing heard")?;
    ensure!(first.payload == "true", "{} came through", first.subject);
    let overheard = tokio::time::timeout(Duration::from_millis(300), overheard.next()).await;
    ensure!(overheard.is_err() || matches!(overheard, Ok(None)), "a validator reads changes");
    Ok(())
}
