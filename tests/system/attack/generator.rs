//! Tales: what one user's memberships, and the rows of their scopes, went through, and when a client of theirs came by, with an
//! honest claim of where it stood or a forged one. Postgres itself keeps what the user could read at each commit: a client may
//! never be sent anything else (G7), and at each position that it takes it must hold exactly that, of
//! the scopes that it holds by then (G6).
//!
//! ```text
//! MILLSTREAM_ATTACK_HISTORIES=10000 cargo test -p millstream-tests --test system random_memberships
//! MILLSTREAM_SEED=77 cargo test -p millstream-tests --test system random_memberships      (one history)
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures_util::future::{join_all, try_join_all};
use millstream_schemas::{Lsn, Position, Scope};
use millstream_stack::Service;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};
use sqlx::{Executor, PgConnection, Row};
use uuid::Uuid;

use super::peer::{CANARIES, Held, Peer, Tasks};
use super::{Scene, commit};

/// Histories of an ordinary run.
const HISTORIES: u64 = 300;
/// Histories that go on together, each step of them in one transaction.
const TOGETHER: u64 = 25;
/// Such batches at a time.
const AT_A_TIME: usize = 4;
/// A client that is sent nothing for this long has not been caught up with.
const PATIENCE: Duration = Duration::from_secs(20);
/// A refused client tries again this often.
const TRIES: usize = 20;

/// What a client says of itself.
#[derive(Clone, Copy, Debug)]
pub enum Claim {
    /// What it holds.
    Honest,
    /// What it held at an earlier visit, as after a backup was restored.
    Restored(usize),
    /// The position behind a step, which anybody can learn from a project of their own, with every scope of the tale.
    Forged(usize),
    /// A snapshot of its own that was cut, with that position in its token.
    Token(usize),
}

/// When a client comes by.
#[derive(Clone, Copy, Debug)]
pub struct Visit {
    /// Behind this step.
    pub after: usize,
    pub claim: Claim,
    /// Whether it stays connected.
    pub stays: bool,
}

/// What happens to one user.
#[derive(Clone, Debug)]
pub struct Tale {
    pub name: String,
    pub user: String,
    /// Scopes that there are.
    pub scopes: Vec<Scope>,
    /// Statements of each transaction.
    pub steps: Vec<String>,
    pub visits: Vec<Visit>,
}

/// The user's honest client, and what all clients of the user were sent.
struct Client {
    id: Uuid,
    held: Held,
    live: Option<Peer>,
    /// As it was after each visit.
    backups: Vec<Held>,
    canaries: BTreeSet<String>,
    wrong: Vec<String>,
}

/// Tales that go on together.
pub struct Batch {
    name: String,
    tales: Vec<Tale>,
    clients: Vec<Client>,
    observer: (Peer, Held),
    /// Behind each step.
    positions: Vec<Position>,
    postgres: PgConnection,
    notes: u64,
}

impl Batch {
    /// Nothing has happened yet.
    pub async fn new(scene: &Scene, name: &str, tales: Vec<Tale>) -> Result<Batch> {
        let mut postgres = scene.board.postgres().await?;
        postgres.execute("SET synchronous_commit = off").await?;
        let client = |_: &Tale| Client {
            id: Uuid::now_v7(),
            held: Held::default(),
            live: None,
            backups: Vec::new(),
            canaries: BTreeSet::new(),
            wrong: Vec::new(),
        };
        let clients = tales.iter().map(client).collect();
        let mut batch = Batch {
            name: name.to_owned(),
            tales,
            clients,
            observer: Batch::observe(scene, name).await?,
            positions: Vec::new(),
            postgres,
            notes: 0,
        };
        batch.step(String::new()).await?;
        batch.positions.clear();
        Ok(batch)
    }

    async fn observe(scene: &Scene, name: &str) -> Result<(Peer, Held)> {
        let (mut peer, welcome) = Peer::open(&scene.url(), &scene.token(&format!("observer-{name}"))).await?;
        let mut held = Held { schema: welcome.schema.map(|schema| schema.version), ..Held::default() };
        while held.position.is_none() {
            let frame = peer.frame(PATIENCE).await?.context("an observer's socket is closed")?;
            held.take(frame);
        }
        Ok((peer, held))
    }

    /// Commits a transaction, and waits until the stream has it.
    async fn step(&mut self, sql: String) -> Result<()> {
        self.notes += 1;
        let note = format!("step {}", self.notes);
        let users: Vec<String> = self.tales.iter().map(|tale| format!("'{}'", tale.user)).collect();
        let users = users.join(",");
        let sql = format!(
            "{sql};
             INSERT INTO seen SELECT {}, h.user_id, t.id, t.project_id, t.title
             FROM held h JOIN tasks t USING (project_id) WHERE h.user_id IN ({users});
             INSERT INTO holds SELECT {}, pg_current_xact_id(), user_id, project_id FROM held WHERE user_id IN ({users});
             {}",
            self.positions.len(),
            self.positions.len(),
            mark(&[format!("observer-{}", self.name)], &note),
        );
        commit(&mut self.postgres, sql).await?;
        let (peer, held) = &mut self.observer;
        while held.mark != note || held.in_bracket() {
            let frame = peer.frame(PATIENCE).await?.context("an observer's socket is closed")?;
            if let Some(error) = held.take(frame) {
                anyhow::bail!("an observer: {}: {}", error.code, error.message);
            }
        }
        self.positions.push(held.position.context("no position")?);
        Ok(())
    }

    /// Tells all tales to their ends.
    pub async fn tell(&mut self, scene: &Scene) -> Result<()> {
        let steps = self.tales.iter().map(|tale| tale.steps.len()).max().unwrap_or(0);
        for step in 0..steps {
            let parts: Vec<&str> =
                self.tales.iter().filter_map(|tale| tale.steps.get(step).map(String::as_str)).collect();
            self.step(parts.join(";")).await?;
            let at = |tale: &Tale| tale.visits.iter().find(|visit| visit.after == step).copied();
            let visits: Vec<Option<Visit>> = self.tales.iter().map(at).collect();
            self.visit(scene, &visits).await?;
        }
        let last = Visit { after: steps, claim: Claim::Honest, stays: false };
        let all = vec![Some(last); self.tales.len()];
        self.visit(scene, &all).await
    }

    /// Once more, behind the ring of an edge that has just been started: what is missed comes from the stream.
    pub async fn again(&mut self, scene: &Scene, rng: &mut StdRng) -> Result<()> {
        let name = self.name.clone();
        self.observer = Batch::observe(scene, &name).await?;
        let visit = |claim| Some(Visit { after: 0, claim, stays: false });
        let forged: Vec<_> =
            self.tales.iter().map(|_| visit(Claim::Forged(rng.random_range(0..self.positions.len())))).collect();
        self.visit(scene, &forged).await?;
        let restored =
            self.clients.iter().map(|client| visit(Claim::Restored(client.backups.len() / 2))).collect::<Vec<_>>();
        self.visit(scene, &restored).await
    }

    /// Lets clients come by, and waits until each of them has caught up.
    async fn visit(&mut self, scene: &Scene, visits: &[Option<Visit>]) -> Result<()> {
        if visits.iter().all(Option::is_none) {
            return Ok(());
        }
        self.notes += 1;
        let note = format!("visit {}", self.notes);
        let (url, positions) = (scene.url(), &self.positions);
        let comers = self.tales.iter().zip(&mut self.clients).zip(visits);
        let comers = comers.filter_map(|((tale, client), visit)| visit.map(|visit| (tale, client, visit)));
        let schema = self.observer.1.schema.clone();
        let opened = comers.map(async |(tale, client, visit)| {
            let token = scene.token(&tale.user);
            let opened = Guest::open(&url, &token, tale, client, visit, positions, schema.clone()).await;
            opened.with_context(|| format!("{}: {visit:?}", tale.name))
        });
        let guests = try_join_all(opened).await?;
        let users: Vec<String> = guests.iter().map(|guest| guest.tale.user.clone()).collect();
        commit(&mut self.postgres, mark(&users, &note)).await?;
        let read = guests.into_iter().map(async |guest| {
            let name = format!("{}: {:?}", guest.tale.name, guest.visit);
            guest.read(&url, &note).await.context(name)
        });
        for result in join_all(read).await {
            result?;
        }
        // What honest clients hold now, against what there is.
        let sql = "SELECT h.user_id, t.id, t.project_id, t.title FROM held h JOIN tasks t USING (project_id) WHERE h.user_id = ANY ($1)";
        let rows = sqlx::query(sql).bind(&users).fetch_all(&mut self.postgres).await?;
        let mut now: BTreeMap<String, Tasks> = BTreeMap::new();
        for row in rows {
            now.entry(row.get(0)).or_default().insert(row.get(1), (row.get(2), row.get(3)));
        }
        for ((tale, client), visit) in self.tales.iter().zip(&mut self.clients).zip(visits) {
            if visit.is_some_and(|visit| matches!(visit.claim, Claim::Honest | Claim::Restored(_))) {
                let expected = now.get(&tale.user).cloned().unwrap_or_default();
                if client.held.tasks != expected {
                    client.wrong.push(format!("{visit:?}: holds {:?} instead of {expected:?}", client.held.tasks));
                }
            }
        }
        Ok(())
    }

    /// What went wrong, by tale.
    pub async fn judge(&mut self) -> Result<Vec<String>> {
        let users: Vec<&str> = self.tales.iter().map(|tale| tale.user.as_str()).collect();
        let rows = sqlx::query("SELECT step, user_id, id, project_id, title FROM seen WHERE user_id = ANY ($1)")
            .bind(&users)
            .fetch_all(&mut self.postgres)
            .await?;
        let mut seen: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        let mut held: BTreeMap<(String, usize), Tasks> = BTreeMap::new();
        for row in rows {
            let (step, user): (i32, String) = (row.get(0), row.get(1));
            let (id, project, title): (String, String, String) = (row.get(2), row.get(3), row.get(4));
            seen.entry(user.clone()).or_default().extend([id.clone(), title.clone()]);
            held.entry((user, step as usize)).or_default().insert(id, (project, title));
        }
        // Versions of rows that a transaction itself replaced: to be seen by those who held their scope before it and behind it.
        let rows = sqlx::query(
            "SELECT h.user_id, v.id, v.title FROM versions v JOIN holds h USING (xid, project_id)
             JOIN holds b ON b.user_id = h.user_id AND b.project_id = h.project_id AND b.step = h.step - 1
             WHERE h.user_id = ANY ($1)",
        )
        .bind(&users)
        .fetch_all(&mut self.postgres)
        .await?;
        for row in rows {
            seen.entry(row.get(0)).or_default().extend([row.get(1), row.get(2)]);
        }
        let steps: BTreeMap<Lsn, usize> =
            self.positions.iter().enumerate().map(|(step, position)| (position.lsn, step)).collect();
        let mut all = Vec::new();
        for (tale, client) in self.tales.iter().zip(&mut self.clients) {
            let may = seen.remove(&tale.user).unwrap_or_default();
            let leaked: Vec<&String> = client.canaries.iter().filter(|word| !may.contains(*word)).collect();
            if !leaked.is_empty() {
                client.wrong.push(format!("it was sent what the user could never read: {leaked:?}"));
            }
            let taken = client.backups.iter().flat_map(|held| &held.taken).chain(&client.held.taken);
            for (position, scopes, tasks) in taken {
                if let Some(step) = steps.get(&position.lsn) {
                    // On its way it may hold fewer scopes than it may read, but of each what there was.
                    let mut expected = held.get(&(tale.user.clone(), *step)).cloned().unwrap_or_default();
                    expected.retain(|_, (project, _)| scopes.contains(&Scope::new("project", project.as_str())));
                    if *tasks != expected {
                        client.wrong.push(format!("at step {step} it held {tasks:?} instead of {expected:?}"));
                        break;
                    }
                }
            }
            if !client.wrong.is_empty() {
                all.push(format!("{}: {}", tale.name, client.wrong.join("; ")));
            }
        }
        Ok(all)
    }
}

/// A client that has come by.
struct Guest<'a> {
    tale: &'a Tale,
    client: &'a mut Client,
    visit: Visit,
    peer: Peer,
    /// Of a forged claim: nothing that the client itself holds.
    apart: Option<Held>,
    token: String,
    client_id: Uuid,
}

impl<'a> Guest<'a> {
    async fn open(
        url: &str,
        token: &str,
        tale: &'a Tale,
        client: &'a mut Client,
        visit: Visit,
        positions: &[Position],
        schema: Option<String>,
    ) -> Result<Guest<'a>> {
        let (mut apart, mut client_id, mut snapshot) = (None, client.id, None);
        match visit.claim {
            Claim::Honest => {}
            Claim::Restored(backup) => {
                client.live = None;
                if let Some(backup) = client.backups.get(backup) {
                    let taken = std::mem::take(&mut client.held.taken);
                    client.held = backup.clone();
                    client.held.taken = taken;
                }
            }
            Claim::Forged(step) => {
                client_id = Uuid::now_v7();
                let scopes = tale.scopes.iter().cloned().collect();
                apart = Some(Held { position: Some(positions[step]), scopes, schema, ..Held::default() });
            }
            Claim::Token(step) => {
                client_id = Uuid::now_v7();
                snapshot = Guest::cut(url, token, client, positions[step]).await?;
                apart = Some(Held { schema, ..Held::default() });
            }
        }
        let peer = match client.live.take() {
            Some(peer) if apart.is_none() => peer,
            live => {
                client.live = live;
                Peer::connect(url).await?
            }
        };
        let token = token.to_owned();
        let mut guest = Guest { tale, client, visit, peer, apart, token, client_id };
        if guest.peer.bytes == 0 {
            guest.greet(url, snapshot).await?;
        }
        Ok(guest)
    }

    /// A snapshot of the client's own that is cut, with a forged beginning.
    async fn cut(url: &str, token: &str, client: &mut Client, from: Position) -> Result<Option<Value>> {
        let (mut peer, _) = Peer::open(url, token).await?;
        let mut held = Held::default();
        while held.position.is_none() {
            let frame = peer.frame(PATIENCE).await?.context("closed during a snapshot")?;
            if held.take(frame).is_some() {
                break;
            }
        }
        client.canaries.append(&mut peer.canaries);
        let Some(mut cut) = held.cut else { return Ok(None) };
        if let Ok(mut forged) = serde_json::from_str::<Value>(&cut.token)
            && forged.is_object()
        {
            forged["from"] = json!(from);
            cut.token = forged.to_string();
        } else {
            // Opaque: the claim that can be made is beside it.
            cut.token = cut.token.replacen(|c: char| c.is_ascii_digit(), "7", 1);
        }
        Ok(Some(json!(cut)))
    }

    fn held(&mut self) -> &mut Held {
        self.apart.as_mut().unwrap_or(&mut self.client.held)
    }

    /// Says hello until it is welcome, as a client does that is told to try again.
    async fn greet(&mut self, url: &str, snapshot: Option<Value>) -> Result<()> {
        for _ in 0..TRIES {
            let (id, token) = (self.client_id, self.token.clone());
            let mut hello = self.held().hello(id, &token);
            if let Some(snapshot) = &snapshot {
                hello["snapshot"] = snapshot.clone();
                hello["schema"] = json!(self.held().schema);
            }
            self.peer.say(hello).await?;
            let frame = self.peer.frame(PATIENCE).await?.context("closed instead of a welcome")?;
            let Some(error) = self.held().take(frame) else { return Ok(()) };
            ensure!(error.retry_after_ms.is_some(), "refused: {}: {}", error.code, error.message);
            self.again(url, error.retry_after_ms).await?;
        }
        anyhow::bail!("refused {TRIES} times")
    }

    async fn again(&mut self, url: &str, after: Option<u64>) -> Result<()> {
        self.keep();
        tokio::time::sleep(Duration::from_millis(after.unwrap_or(100).min(1_000))).await;
        self.peer = Peer::connect(url).await?;
        Ok(())
    }

    fn keep(&mut self) {
        self.client.canaries.append(&mut self.peer.canaries);
    }

    /// Reads until the note has come, wherever it stands.
    async fn read(mut self, url: &str, note: &str) -> Result<()> {
        let start = Instant::now();
        while self.held().mark != note || self.held().in_bracket() {
            ensure!(start.elapsed() < PATIENCE, "it is not told of {note:?} within {PATIENCE:?}");
            let frame = self.peer.frame(PATIENCE).await?;
            let error = match frame {
                Some(frame) => self.held().take(frame),
                None => None,
            };
            match error {
                Some(error) if error.fatal => {
                    if error.code.as_str() == "epoch_changed" {
                        self.held().position = None;
                    }
                    self.again(url, error.retry_after_ms).await?;
                    self.greet(url, None).await?;
                }
                _ => {}
            }
        }
        self.keep();
        if self.apart.is_none() {
            let backup = Held { taken: Vec::new(), ..self.client.held.clone() };
            self.client.backups.push(backup);
            if self.visit.stays {
                self.client.live = Some(self.peer);
            }
        }
        Ok(())
    }
}

fn mark(users: &[String], note: &str) -> String {
    let rows: Vec<String> = users.iter().map(|user| format!("('{user}', '{note}')")).collect();
    format!("INSERT INTO marks VALUES {} ON CONFLICT (user_id) DO UPDATE SET note = excluded.note", rows.join(","))
}

/// A random tale.
fn random(seed: u64) -> Tale {
    let rng = &mut StdRng::seed_from_u64(seed);
    let user = format!("user-{seed}");
    let projects: Vec<String> = ["a", "b", "c"].iter().map(|name| format!("p{seed}{name}")).collect();
    let organisations: Vec<String> = ["x", "y"].iter().map(|name| format!("o{seed}{name}")).collect();
    let mut scopes = vec![Scope::global(), Scope::user(user.clone())];
    scopes.extend(projects.iter().map(|id| Scope::new("project", id.as_str())));
    scopes.extend(organisations.iter().map(|id| Scope::new("organisation", id.as_str())));
    let mut texts = 0;
    let mut text = || {
        texts += 1;
        format!("{}{seed}-{texts}", CANARIES[1])
    };
    let mut tasks = 0;
    let first: Vec<String> = projects
        .iter()
        .map(|id| {
            let organisation = if rng.random_bool(0.5) { format!("'{}'", organisations[0]) } else { "NULL".into() };
            format!("INSERT INTO projects VALUES ('{id}', {organisation}, 'p')")
        })
        .collect();
    let mut steps = vec![first.join(";")];
    for _ in 0..rng.random_range(6..14) {
        let mut statements = Vec::new();
        for _ in 0..rng.random_range(1..=3) {
            let project = projects[rng.random_range(0..projects.len())].clone();
            let organisation = organisations[rng.random_range(0..organisations.len())].clone();
            let row = format!("{seed}-{}", rng.random_range(0..3));
            let task = format!("{}{seed}-{}", CANARIES[0], rng.random_range(0..4));
            let role = ["reader", "owner", "muted"][rng.random_range(0..3)];
            let post = ["engineer", "boss", "trainee"][rng.random_range(0..3)];
            statements.push(match rng.random_range(0..22) {
                0..3 => format!(
                    "INSERT INTO members VALUES ('{row}', '{project}', '{user}', '{role}')
                     ON CONFLICT (id) DO UPDATE SET project_id = excluded.project_id, role = excluded.role"
                ),
                3 => format!("DELETE FROM members WHERE id = '{row}'"),
                4 => format!("DELETE FROM members WHERE user_id = '{user}'"),
                5 => format!("UPDATE members SET role = '{role}' WHERE id = '{row}'"),
                6 => format!("UPDATE members SET project_id = '{project}' WHERE id = '{row}'"),
                7 => format!("UPDATE members SET user_id = CASE user_id WHEN '{user}' THEN 'nobody' ELSE '{user}' END WHERE id = '{row}'"),
                8 => format!(
                    "INSERT INTO staff VALUES ('{organisation}', '{user}', '{post}')
                     ON CONFLICT (organisation_id, user_id) DO UPDATE SET role = excluded.role"
                ),
                9 => format!("DELETE FROM staff WHERE user_id = '{user}' AND organisation_id = '{organisation}'"),
                10 => format!("UPDATE staff SET role = '{post}' WHERE user_id = '{user}'"),
                11 => format!("UPDATE projects SET organisation_id = '{organisation}' WHERE id = '{project}'"),
                12 => format!("UPDATE projects SET organisation_id = NULL WHERE id = '{project}'"),
                13 => format!("DELETE FROM projects WHERE id = '{project}'"),
                14 => format!("INSERT INTO projects VALUES ('{project}', '{organisation}', 'again') ON CONFLICT DO NOTHING"),
                15..18 => format!(
                    "INSERT INTO tasks VALUES ('{task}', '{project}', '{}')
                     ON CONFLICT (id) DO UPDATE SET project_id = excluded.project_id, title = excluded.title",
                    text()
                ),
                18 => format!("UPDATE tasks SET title = '{}' WHERE id = '{task}'", text()),
                19 => format!("UPDATE tasks SET title = '{}', project_id = '{project}' WHERE id = '{task}'", text()),
                20 => format!("DELETE FROM tasks WHERE id = '{task}'"),
                _ => {
                    tasks += 1;
                    let brief = format!("{}{seed}-brief-{tasks}", CANARIES[0]);
                    format!(
                        "INSERT INTO tasks VALUES ('{brief}', '{project}', '{}'); UPDATE tasks SET title = '{}' WHERE id = '{brief}';
                         DELETE FROM tasks WHERE id = '{brief}'",
                        text(),
                        text()
                    )
                }
            });
        }
        steps.push(statements.join(";"));
    }
    let mut visits: Vec<Visit> = Vec::new();
    for after in 0..steps.len() {
        if rng.random_bool(0.3) {
            let earlier = rng.random_range(0..=after);
            let claim = match rng.random_range(0..10) {
                _ if visits.is_empty() => Claim::Honest,
                0..6 => Claim::Honest,
                6 => Claim::Restored(rng.random_range(0..visits.len())),
                7 | 8 => Claim::Forged(earlier),
                _ => Claim::Token(earlier),
            };
            visits.push(Visit { after, claim, stays: rng.random_bool(0.3) });
        }
    }
    Tale { name: format!("MILLSTREAM_SEED={seed}"), user, scopes, steps, visits }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is a number, not {text:?}")))
}

#[tokio::test(flavor = "multi_thread")]
async fn random_memberships_show_what_postgres_would_show() -> Result<()> {
    let seeds = match number("MILLSTREAM_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("MILLSTREAM_ATTACK_HISTORIES").unwrap_or(HISTORIES),
    };
    let mut scene = Scene::start("").await?;
    let start = Instant::now();
    let result = async {
        let (all, mut wrong): (Vec<u64>, Vec<String>) = (seeds.collect(), Vec::new());
        let rng = &mut StdRng::seed_from_u64(all[0]);
        // Each batch keeps a connection to Postgres from its first step to its judgement.
        for round in all.chunks(HISTORIES as usize) {
            let scene_ref = &scene;
            let turns = tokio::sync::Semaphore::new(AT_A_TIME);
            let told = round.chunks(TOGETHER as usize).map(async |seeds| {
                let _turn = turns.acquire().await?;
                let tales: Vec<Tale> = seeds.iter().copied().map(random).collect();
                let mut batch = Batch::new(scene_ref, &format!("from-{}", seeds[0]), tales).await?;
                batch.tell(scene_ref).await?;
                Ok::<_, anyhow::Error>(batch)
            });
            let mut batches = try_join_all(told).await?;
            scene.board.kill_and_restart(Service::Edge).await?;
            for batch in &mut batches {
                batch.again(&scene, rng).await?;
                wrong.extend(batch.judge().await?);
            }
        }
        println!("{} histories in {:.1} s; {} wrong", all.len(), start.elapsed().as_secs_f64(), wrong.len());
        ensure!(wrong.is_empty(), "{} of {} histories are wrong:\n{}", wrong.len(), all.len(), some(&wrong));
        Ok(())
    };
    let result = result.await;
    scene.board.explain(result)
}

/// The first of many complaints.
pub fn some(wrong: &[String]) -> String {
    wrong.iter().take(5).map(|text| format!("{text:.1500}")).collect::<Vec<_>>().join("\n")
}
