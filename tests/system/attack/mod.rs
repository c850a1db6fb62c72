//! An attack suite: what an ordinary user, or somebody without a token, may send at its worst, and what bad luck looks like.
//! Each kind of attack is held against its neighbours: honest clients of the same stack, whose writes must be confirmed, and
//! reach each other, as before.
//!
//! Attacks run one at a time ([`Scene::start`] waits for its turn), since they measure. Their tests come first by name, so
//! that nearly all of them have the machine to themselves in `cargo test`.
//!
//! ```text
//! MILLSTREAM_ATTACK=full cargo test -p millstream-tests --test system attack     (sizes of a real attack, release advised)
//! MILLSTREAM_ATTACK_HISTORIES=10000 cargo test -p millstream-tests --test system random_memberships
//! ```

mod exchanges;
mod floods;
mod generator;
mod history;
mod neighbours;
mod peer;
mod poison;
mod rights;
mod rows;
mod traces;

use std::fmt::Display;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use millstream_schemas::frame::ServerFrame;
use millstream_stack::{Builder, Service};
use millstream_tests::board::Board;
use neighbours::{Neighbours, Seats};
use peer::{Held, Peer};
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, PgConnection};
use tokio::sync::{Mutex, MutexGuard};
use uuid::Uuid;

/// Tables of every kind that attacks need. `seen` is not synced: it keeps what each user could read at some commit.
const SCHEMA: &str = "
CREATE TABLE projects (id text PRIMARY KEY, organisation_id text, name text NOT NULL);
ALTER TABLE projects REPLICA IDENTITY FULL;
CREATE INDEX ON projects (organisation_id);
CREATE TABLE staff (organisation_id text, user_id text, role text NOT NULL, PRIMARY KEY (organisation_id, user_id));
ALTER TABLE staff REPLICA IDENTITY FULL;
CREATE INDEX ON staff (user_id);
CREATE TABLE members (id text PRIMARY KEY, project_id text NOT NULL, user_id text NOT NULL, role text NOT NULL DEFAULT 'reader');
ALTER TABLE members REPLICA IDENTITY FULL;
CREATE INDEX ON members (user_id);
CREATE INDEX ON members (project_id);
CREATE TABLE tasks (id text PRIMARY KEY, project_id text NOT NULL, title text NOT NULL);
CREATE UNIQUE INDEX tasks_identity ON tasks (project_id, id);
ALTER TABLE tasks REPLICA IDENTITY USING INDEX tasks_identity;
CREATE TABLE events (day date, id bigint, project_id text NOT NULL, what text NOT NULL, PRIMARY KEY (day, id));
CREATE UNIQUE INDEX events_identity ON events (project_id, day, id);
ALTER TABLE events REPLICA IDENTITY USING INDEX events_identity;
CREATE TABLE marks (user_id text PRIMARY KEY, note text NOT NULL);

CREATE DOMAIN document AS jsonb;
CREATE DOMAIN document_of_documents AS document;
CREATE DOMAIN amounts AS numeric[];
CREATE TYPE pair AS (name text, body jsonb);
CREATE TABLE docs (
    id text PRIMARY KEY, project_id text NOT NULL, note text, raw bytea, plain json, body jsonb, wide document,
    wider document_of_documents, both_ pair, listed amounts, n numeric, bodies document[], odd text
);
CREATE UNIQUE INDEX docs_identity ON docs (project_id, id);
ALTER TABLE docs REPLICA IDENTITY USING INDEX docs_identity;

CREATE VIEW held AS
    SELECT user_id, project_id FROM members WHERE role IN ('reader', 'owner')
    UNION SELECT s.user_id, p.id FROM projects p JOIN staff s ON s.organisation_id = p.organisation_id
          WHERE s.role IN ('engineer', 'boss');
CREATE TABLE seen (step int NOT NULL, user_id text NOT NULL, id text NOT NULL, project_id text NOT NULL, title text NOT NULL);
CREATE INDEX ON seen (user_id);
-- What rows were in between, within transactions; and who held what at the end of each.
CREATE TABLE versions (xid xid8 NOT NULL, id text NOT NULL, project_id text NOT NULL, title text NOT NULL);
CREATE TABLE holds (step int NOT NULL, xid xid8 NOT NULL, user_id text NOT NULL, project_id text NOT NULL);
CREATE INDEX ON holds (user_id);
CREATE FUNCTION keep_version() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = public AS $$
BEGIN
    INSERT INTO versions VALUES (pg_current_xact_id(), NEW.id, NEW.project_id, NEW.title);
    RETURN NULL;
END $$;
CREATE TRIGGER keep_version AFTER INSERT OR UPDATE ON tasks FOR EACH ROW EXECUTE FUNCTION keep_version();
";

const CONFIG: &str = r#"
[scopes.organisation]
membership = { table = "staff", user = "user_id", scope = "organisation_id", roles = { column = "role", in = ["engineer", "boss"] } }
[scopes.project]
membership = [
    { table = "members", user = "user_id", scope = "project_id", roles = { column = "role", in = ["reader", "owner"] } },
    { table = "projects", scope = "id", through = "organisation", via = "organisation_id" },
]

[tables.projects]
scope = { kind = "project", column = "id" }
[tables.staff]
scope = { kind = "organisation", column = "organisation_id" }
[tables.members]
scope = { kind = "project", column = "project_id" }
[tables.marks]
scope = { kind = "user", column = "user_id" }
[tables.events]
scope = { kind = "project", column = "project_id" }
[tables.tasks]
scope = { kind = "project", column = "project_id" }
writable = ["id", "project_id", "title"]
write.insert = "EXISTS (SELECT FROM members m WHERE m.project_id = new.project_id AND m.user_id = auth.user_id)"
write.update = "EXISTS (SELECT FROM members m WHERE m.project_id = old.project_id AND m.user_id = auth.user_id) AND new.project_id = old.project_id"
write.delete = "EXISTS (SELECT FROM members m WHERE m.project_id = old.project_id AND m.user_id = auth.user_id)"
[tables.docs]
scope = { kind = "project", column = "project_id" }
writable = ["id", "project_id", "note", "raw", "plain", "body", "wide", "wider", "both_", "listed", "n", "bodies", "odd"]
write.insert = "EXISTS (SELECT FROM members m WHERE m.project_id = new.project_id AND m.user_id = auth.user_id)"
write.update = "EXISTS (SELECT FROM members m WHERE m.project_id = old.project_id AND m.user_id = auth.user_id) AND new.project_id = old.project_id"
write.delete = "EXISTS (SELECT FROM members m WHERE m.project_id = old.project_id AND m.user_id = auth.user_id)"
"#;

/// Honest clients beside each attack.
const NEIGHBOURS: usize = 3;
/// How long they are measured before each attack.
const BEFORE: Duration = Duration::from_secs(3);
/// During an attack, p99 may grow to twice what it was, or by this much. In an ordinary run, debug builds of everything, the attackers
/// and other programs share what cores there are: only what a person would notice counts. A full run is made on a quiet machine.
fn noise() -> Duration {
    scaled(Duration::from_millis(250), Duration::from_millis(60))
}

/// An edge's memory may grow by this much, in bytes.
const MORE_MEMORY: u64 = 64 << 20;
/// Everything heals within this time of an attack's end.
const HEALED: Duration = Duration::from_secs(10);
/// A change of rights takes effect on a connected client within this time.
const RIGHTS: Duration = Duration::from_secs(5);

/// Whether attacks have their full size.
fn full() -> bool {
    std::env::var("MILLSTREAM_ATTACK").is_ok_and(|value| value == "full")
}

/// A size in an ordinary run, and in a full one.
fn scaled<T>(ordinary: T, of_full_size: T) -> T {
    if full() { of_full_size } else { ordinary }
}

static TURN: Mutex<()> = Mutex::const_new(());

/// A stack with neighbours at work.
pub struct Scene {
    pub board: Board,
    pub neighbours: Neighbours,
    edge: u32,
    _config: tempfile::TempDir,
    _turn: MutexGuard<'static, ()>,
}

/// What an attack may do to the neighbours' times.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Allow {
    /// Nothing that can be told from noise.
    Nothing,
    /// A pause while it lasts, such as the time that a very large transaction takes to pass through the one log.
    Pause,
}

impl Scene {
    /// A stack of its own, with rows from before the stream began.
    pub async fn start(seed: &str) -> Result<Scene> {
        Scene::with(seed, |builder| builder).await
    }

    /// A stack of its own, with changes to how.
    pub async fn with(seed: &str, change: impl FnOnce(Builder) -> Builder) -> Result<Scene> {
        let turn = TURN.lock().await;
        let folder = tempfile::tempdir()?;
        let config = folder.path().join("millstream.toml");
        std::fs::write(&config, CONFIG)?;
        let mut rows = String::from("INSERT INTO projects VALUES ('neighbours', NULL, 'neighbours');");
        for n in 0..NEIGHBOURS {
            rows += &format!(
                "INSERT INTO members VALUES ('neighbour-{n}', 'neighbours', 'neighbour-{n}', 'owner');
                 INSERT INTO tasks VALUES ('neighbour-{n}', 'neighbours', 'nothing yet');"
            );
        }
        rows += "INSERT INTO members VALUES ('newcomer', 'neighbours', 'newcomer', 'reader');";
        rows += seed;
        let mut board = Board::with(|builder| {
            let path: &Path = &config;
            change(builder.app_schema(SCHEMA).seed(rows).config(path))
        })
        .await?;
        let edge = board.stack.pid(Service::Edge).context("a running edge")?;
        // Spread over the executor's partitions, whatever the attackers' ids.
        let seat = |n: usize| (board.stack.token(&format!("neighbour-{n}")), client_in(n as u16 * 21));
        let seats = Seats { url: board.stack.edge_url(), seats: (0..NEIGHBOURS).map(seat).collect() };
        let neighbours = Neighbours::start(seats)?;
        let scene = Scene { board, neighbours, edge, _config: folder, _turn: turn };
        scene.healed(Instant::now(), 3 * HEALED).await.context("before the attack")?;
        Ok(scene)
    }

    /// URL of the edge.
    pub fn url(&self) -> String {
        self.board.stack.edge_url()
    }

    /// A token of a user.
    pub fn token(&self, user: &str) -> String {
        self.board.stack.token(user)
    }

    /// Runs statements as one transaction, as the owner.
    pub async fn sql(&self, sql: impl Into<String>) -> Result<()> {
        commit(&mut self.board.postgres().await?, sql.into()).await
    }

    /// A new session of a user.
    pub async fn open(&self, user: &str) -> Result<Peer> {
        Ok(Peer::open(&self.url(), &self.token(user)).await?.0)
    }

    /// Measures the neighbours before, during and after an attack, and the edge's memory; waits until all is well again. The
    /// error names everything that was not as it must be, with figures.
    pub async fn check(&self, name: &str, allow: Allow, attack: impl Future<Output = Result<()>>) -> Result<()> {
        let begun = Instant::now();
        tokio::time::sleep(if allow != Allow::Pause { BEFORE } else { BEFORE / 10 }).await;
        let (start, memory) = (Instant::now(), Memory::watch(self.edge)?);
        let before = self.neighbours.between(begun, start);
        let mut wrong: Vec<String> = Vec::new();
        if let Err(error) = attack.await {
            wrong.push(format!("{error:#}"));
        }
        let end = Instant::now();
        let healed = self.healed(end, HEALED).await;
        let during = self.neighbours.between(start, end);
        let grown = memory.grown();
        let heals = match &healed {
            Ok(after) => format!("well {:.1} s after its end", after.as_secs_f64()),
            Err(error) => {
                wrong.push(format!("it does not heal within {HEALED:?}: {error:#}"));
                "not well again".to_owned()
            }
        };
        println!(
            "{name}: {:.1} s; before: {before}; during: {during}; edge +{} MiB; {heals}",
            (end - start).as_secs_f64(),
            grown >> 20
        );
        let limit = |before: Duration| (2 * before).max(before + noise());
        let mut late = Vec::new();
        if allow != Allow::Pause {
            for (what, before, during) in
                [("confirmed", before.p99.0, during.p99.0), ("sent to another", before.p99.1, during.p99.1)]
            {
                if during > limit(before) {
                    late.push(format!("p99 of neighbours' writes being {what} rose from {before:.0?} to {during:.0?}"));
                }
            }
        }
        if grown > MORE_MEMORY {
            wrong.push(format!("the edge took {} MiB more", grown >> 20));
        }
        wrong.extend(self.neighbours.faults().into_iter().take(3).map(|fault| format!("a neighbour's write: {fault}")));
        let is_late = wrong.is_empty() && !late.is_empty();
        wrong.extend(late);
        let told = format!("{name}: {}", wrong.join("; "));
        if is_late {
            return Err(Late(told).into());
        }
        ensure!(wrong.is_empty(), "{told}");
        Ok(())
    }

    /// Waits until a write of each neighbour gets through and a new client gets its rows; returns how long that took.
    pub async fn healed(&self, since: Instant, limit: Duration) -> Result<Duration> {
        let newcomer = async {
            loop {
                match self.newcomer().await {
                    Ok(()) => return Instant::now(),
                    Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
                }
            }
        };
        let through = async {
            loop {
                if let Some(at) = self.neighbours.through(since) {
                    return at;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let end = tokio::time::Instant::from_std(since + limit);
        let (newcomer, through) =
            tokio::join!(tokio::time::timeout_at(end, newcomer), tokio::time::timeout_at(end, through));
        let through = through.ok().context("neighbours' writes are not confirmed, or do not reach each other");
        let newcomer = newcomer.ok().context("a new client gets no snapshot");
        match (through, newcomer) {
            (Ok(a), Ok(b)) => Ok(a.max(b).saturating_duration_since(since)),
            (Err(a), Err(b)) => bail!("{a}, and {b}"),
            (Err(error), _) | (_, Err(error)) => Err(error),
        }
    }

    /// A new client: it gets its rows.
    async fn newcomer(&self) -> Result<()> {
        let held = self.snapshot("newcomer").await?;
        ensure!(held.tasks.len() == NEIGHBOURS, "{} tasks", held.tasks.len());
        Ok(())
    }

    /// What a new client of a user holds after its snapshot. As clients do, it comes again where it is told to.
    pub async fn snapshot(&self, user: &str) -> Result<Held> {
        let start = Instant::now();
        let (client_id, mut held) = (Uuid::now_v7(), Held::default());
        loop {
            let mut peer = Peer::connect(&self.url()).await?;
            peer.say(held.hello(client_id, &self.token(user))).await?;
            let error = loop {
                if held.position.is_some() {
                    return Ok(held);
                }
                let frame = peer.frame(Duration::from_secs(10)).await?.context("closed")?;
                if let Some(error) = held.take(frame) {
                    break error;
                }
            };
            let again = error.retry_after_ms.filter(|_| start.elapsed() < HEALED);
            let Some(pause) = again else { bail!("{}: {}", error.code, error.message) };
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
    }
}

/// All that was wrong is that neighbours' writes took too long.
#[derive(Debug)]
struct Late(String);

impl Display for Late {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Late {}

/// Tries every variant of an attack; after one that did harm, the next gets a stack of its own. All failures are told. One that made
/// neighbours late, and nothing else, is tried once more on a new stack: on a shared machine anybody's writes take long now and
/// then, but not twice in a row.
pub async fn every<V: Clone>(
    seed: &str,
    allow: Allow,
    variants: impl IntoIterator<Item = (impl Display, V)>,
    attack: impl AsyncFn(&Scene, V) -> Result<()>,
) -> Result<()> {
    let (mut failures, mut scene) = (Vec::new(), None);
    for (name, variant) in variants {
        let name = name.to_string();
        for last in [false, true] {
            let current = match scene.take() {
                Some(scene) => scene,
                None => Scene::start(seed).await?,
            };
            match current.check(&name, allow, attack(&current, variant.clone())).await {
                Ok(()) => {
                    scene = Some(current);
                    break;
                }
                Err(error) => {
                    println!("FAILED {error:#}");
                    if last || !error.is::<Late>() {
                        failures.push(format!("{error:#}"));
                        break;
                    }
                }
            }
        }
    }
    ensure!(failures.is_empty(), "{} variants did harm:\n{}", failures.len(), failures.join("\n"));
    Ok(())
}

/// Executes statements as one transaction.
async fn commit(postgres: &mut PgConnection, sql: String) -> Result<()> {
    let result = sqlx::raw_sql(AssertSqlSafe(format!("BEGIN; {sql}; COMMIT;"))).execute(postgres).await;
    result.map(drop).with_context(|| format!("{sql:.300}"))
}

/// An insert as a client's change.
fn insert(table: &str, set: &[(&str, &str)]) -> Value {
    let (columns, values): (Vec<&str>, Vec<&str>) = set.iter().copied().unzip();
    json!({"change_id": Uuid::now_v7(), "table": table, "op": "insert", "key": [values[0]], "columns": columns,
        "values": values, "stamp": 1})
}

/// A transaction as a client's frame.
fn submit(client_seq: u64, run_id: Uuid, changes: Vec<Value>) -> Value {
    json!({"type": "submit", "client_seq": client_seq, "attempt": 1, "run_id": run_id, "changes": changes})
}

/// Waits for what becomes of a submission: `applied`, or the code of its refusal.
async fn verdict(peer: &mut Peer, client_seq: u64, limit: Duration) -> Result<String> {
    let end = Instant::now() + limit;
    loop {
        match peer.frame(end.saturating_duration_since(Instant::now())).await?.context("closed")? {
            ServerFrame::Confirmed(confirmed) if confirmed.client_seq >= client_seq => {
                let failure = confirmed.failed.iter().find(|failure| failure.client_seq == client_seq);
                return Ok(failure.map_or("applied".to_owned(), |failure| failure.code.to_string()));
            }
            ServerFrame::Error(error) if error.client_seq == Some(client_seq) || error.fatal => {
                return Ok(error.code.to_string());
            }
            _ => {}
        }
    }
}

/// A client id in one of the executor's partitions.
fn client_in(partition: u16) -> Uuid {
    loop {
        let id = Uuid::now_v7();
        if millstream_schemas::subject::partition(id) == partition % millstream_schemas::subject::PARTITIONS {
            return id;
        }
    }
}

/// The memory of a process, looked at all the time.
struct Memory {
    pid: u32,
    first: u64,
    most: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
}

impl Memory {
    fn watch(pid: u32) -> Result<Memory> {
        let first = resident(pid)?;
        let (most, stop) = (Arc::new(AtomicU64::new(first)), Arc::new(AtomicBool::new(false)));
        let (seen, stopped) = (most.clone(), stop.clone());
        tokio::spawn(async move {
            while !stopped.load(Ordering::Relaxed) {
                seen.fetch_max(resident(pid).unwrap_or(0), Ordering::Relaxed);
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        });
        Ok(Memory { pid, first, most, stop })
    }

    /// How much more it took at most, in bytes.
    fn grown(&self) -> u64 {
        let now = resident(self.pid).unwrap_or(0);
        self.most.load(Ordering::Relaxed).max(now).saturating_sub(self.first)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn resident(pid: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? << 10)
}

/// The measure itself: without an attack nothing is found wrong.
#[tokio::test(flavor = "multi_thread")]
async fn no_attack_is_found_harmless() -> Result<()> {
    let scene = Scene::start("").await?;
    let result = scene.check("nothing", Allow::Nothing, async {
        tokio::time::sleep(Duration::from_secs(3)).await;
        Ok(())
    });
    let result = result.await;
    scene.board.explain(result)
}
