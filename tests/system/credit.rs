//! Clients that cannot stop reading their sockets, as browsers, get no more than they have credit for (G9), are heard all the
//! same, and nobody waits for them. Those that see no WebSocket pings ask by a frame.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use millstream_schemas::TableOp;
use millstream_schemas::frame::ServerFrame;
use millstream_tests::board::{Board, PATIENCE};
use millstream_tests::raw::{Raw, hello, submit};
use serde_json::{Value, json};
use sqlx::Executor as _;
use tokio::time::{Instant, timeout};
use uuid::Uuid;

const SCHEMA: &str = "
    CREATE TABLE members (team text, user_id text, PRIMARY KEY (team, user_id));
    CREATE TABLE notes (id int PRIMARY KEY, team text NOT NULL, body text NOT NULL);
    CREATE TABLE words (id int PRIMARY KEY);
    ALTER TABLE notes REPLICA IDENTITY FULL;
    INSERT INTO members VALUES ('red', 'alice'), ('red', 'bob');
    INSERT INTO notes SELECT n, 'red', repeat('x', 5000) FROM generate_series(1, 2000) AS n;";
const CONFIG: &str = "[scopes.team]
    membership = { table = \"members\", user = \"user_id\", scope = \"team\" }
    [tables.notes]
    scope = { kind = \"team\", column = \"team\" }
    [tables.words]
    scope = { kind = \"global\" }
    writable = [\"id\"]
    write = { insert = \"true\" }
";
const CREDIT: usize = 1 << 20;
/// The largest frame: rows of a snapshot until they have 128 KiB, or a message of the stream.
const FRAME: usize = 1 << 20;
/// An edge cuts a client that takes nothing for 30 s; one that waits for credit takes nothing either.
const LONG: Duration = Duration::from_secs(33);

/// A client with credit, which counts what it gets.
struct Careful {
    raw: Raw,
    bytes: usize,
    /// Rows of the table `notes`.
    notes: BTreeSet<String>,
    is_caught_up: bool,
}

impl Careful {
    async fn start(board: &Board, user: &str, credit: usize) -> Result<Careful> {
        let mut raw = Raw::connect(&board.stack.edge_url()).await?;
        let mut hello = hello(Uuid::now_v7(), &board.stack.token(user));
        hello["credit"] = json!(credit);
        raw.frame(hello).await?;
        Ok(Careful { raw, bytes: 0, notes: BTreeSet::new(), is_caught_up: false })
    }

    /// The next frame, or `None` if there is none for so long.
    async fn next(&mut self, patience: Duration) -> Result<Option<ServerFrame>> {
        let Ok(text) = timeout(patience, self.raw.next_text()).await else { return Ok(None) };
        let text = text?.context("the edge closed the socket")?;
        self.bytes += text.len();
        let frame: ServerFrame = serde_json::from_str(&text).with_context(|| format!("not a frame: {text:.300}"))?;
        let changes = match &frame {
            ServerFrame::SnapshotRows { changes, .. } => changes,
            ServerFrame::Rows(rows) => &rows.changes,
            ServerFrame::CaughtUp { .. } => {
                self.is_caught_up = true;
                return Ok(Some(frame));
            }
            _ => return Ok(Some(frame)),
        };
        for change in changes.iter().filter(|change| change.table == "notes") {
            for row in &change.rows {
                let id = row.first().cloned().flatten().unwrap_or_default();
                if change.op == TableOp::Upsert {
                    self.notes.insert(id)
                } else {
                    self.notes.remove(&id)
                };
            }
        }
        Ok(Some(frame))
    }

    /// Reads until nothing comes any more, and takes nothing.
    async fn used_up(&mut self) -> Result<()> {
        self.take().await?;
        let before = self.bytes;
        while self.next(Duration::from_secs(2)).await?.is_some() {
            ensure!(self.bytes - before <= CREDIT + FRAME, "{} bytes are ahead", self.bytes - before);
        }
        ensure!(self.bytes - before >= CREDIT, "only {} bytes came", self.bytes - before);
        Ok(())
    }

    /// What is answered to a frame, while there is no credit.
    async fn ask(&mut self, frame: Value, is_answer: impl Fn(&ServerFrame) -> bool) -> Result<()> {
        self.raw.frame(frame).await?;
        let start = Instant::now();
        while let Some(frame) = self.next(PATIENCE).await? {
            if is_answer(&frame) {
                ensure!(start.elapsed() < PATIENCE);
                return Ok(());
            }
            let is_rows = matches!(frame, ServerFrame::SnapshotRows { .. } | ServerFrame::Rows(_));
            ensure!(!is_rows, "rows without credit");
        }
        bail!("no answer")
    }

    async fn take(&mut self) -> Result<()> {
        self.raw.frame(json!({"type": "taken", "bytes": self.bytes})).await
    }

    /// Takes what comes until `is_done`.
    async fn take_until(&mut self, is_done: impl Fn(&Careful) -> bool) -> Result<()> {
        self.take().await?;
        while !is_done(self) {
            let before = self.bytes;
            self.next(PATIENCE).await?.with_context(|| format!("nothing comes; {} notes", self.notes.len()))?;
            if before / (CREDIT / 4) != self.bytes / (CREDIT / 4) {
                self.take().await?;
            }
        }
        Ok(())
    }
}

async fn board() -> Result<(Board, tempfile::TempDir)> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("millstream.toml");
    std::fs::write(&file, CONFIG)?;
    Ok((Board::with(|builder| builder.app_schema(SCHEMA).config(&file)).await?, folder))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_gets_no_more_than_it_has_credit_for() -> Result<()> {
    let (board, _folder) = board().await?;
    let outcome = async {
        let mut postgres = board.postgres().await?;
        let mut alice = Careful::start(&board, "alice", CREDIT).await?;

        // Within a snapshot: it does not take, and is heard.
        alice.used_up().await?;
        alice.ask(json!({"type": "ping"}), |frame| *frame == ServerFrame::Pong {}).await?;
        alice.raw.frame(submit(1, "words", &["id"], &["1"])).await?;
        let start = Instant::now();
        while sqlx::query_scalar::<_, i64>("SELECT count(*) FROM words").fetch_one(&mut postgres).await? == 0 {
            ensure!(start.elapsed() < PATIENCE, "what it submits is held up");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        // For longer than a client may take that lets its socket fill.
        let until = Instant::now() + LONG;
        while Instant::now() < until {
            alice.ask(json!({"type": "ping"}), |frame| *frame == ServerFrame::Pong {}).await?;
            tokio::time::sleep(Duration::from_secs(3)).await;
        }
        alice.take_until(|alice| alice.is_caught_up).await?;
        ensure!(alice.notes.len() == 2000, "{} of 2000 notes", alice.notes.len());

        // In the stream: more than an edge keeps of it.
        for begin in (2000..12_000).step_by(200) {
            let sql = "INSERT INTO notes SELECT n, 'red', repeat(md5(n::text), 150) FROM generate_series($1 + 1, $1 + 200) AS n";
            sqlx::query(sql).bind(begin).execute(&mut postgres).await?;
        }
        alice.used_up().await?;
        alice.ask(json!({"type": "ping"}), |frame| *frame == ServerFrame::Pong {}).await?;
        alice.take_until(|alice| alice.notes.len() == 12_000).await?;

        // What was not sent cannot be taken.
        let too_many = json!({"type": "taken", "bytes": alice.bytes + 1_000_000});
        alice.ask(too_many, |frame| matches!(frame, ServerFrame::Error(error) if error.code.as_str() == "bad_frame")).await
    }
    .await;
    board.explain(outcome)
}

/// What waits for credit is not sent any more once the right to it is lost.
#[tokio::test(flavor = "multi_thread")]
async fn what_waits_for_credit_ends_with_its_right() -> Result<()> {
    let (board, _folder) = board().await?;
    let outcome = async {
        let mut postgres = board.postgres().await?;
        // Among its rows, and before the first of them.
        for credit in [CREDIT, 1] {
            let mut bob = Careful::start(&board, "bob", credit).await?;
            while bob.next(Duration::from_secs(2)).await?.is_some() {}
            let before = bob.notes.len();
            ensure!((before > 0) == (credit == CREDIT) && before < 2000, "{before} notes with a credit of {credit}");
            postgres.execute("DELETE FROM members WHERE user_id = 'bob'").await?;
            // It need not take anything to be told.
            let revoked = Instant::now();
            loop {
                match bob.next(PATIENCE).await?.context("nothing comes")? {
                    ServerFrame::Error(error) => {
                        ensure!(error.fatal && error.code.as_str() == "unavailable", "{error:?}");
                        break;
                    }
                    _ => ensure!(bob.notes.len() == before, "rows of a scope that was lost"),
                }
            }
            ensure!(revoked.elapsed() < Duration::from_secs(5), "told after {:?}", revoked.elapsed());
            postgres.execute("INSERT INTO members VALUES ('red', 'bob')").await?;
        }
        Ok(())
    }
    .await;
    board.explain(outcome)
}
