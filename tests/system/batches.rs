//! A batch has the same effects and the same verdicts as its submissions one by one.
//!
//! Two databases that are alike: one takes random batches by the fast path, the other each submission in a transaction
//! of its own; then all rows, verdicts, ledgers and histories must be equal. A run of cases begins with empty tables and
//! has a seed of its own. `MILLSTREAM_BATCHES_SEED=n` replays one run up to its first difference, and then looks for the
//! smallest batch that shows it; `MILLSTREAM_BATCHES_RUNS=n` makes more runs.

mod generate;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use millstream_changes::direct::Direct;
use millstream_provision::keys::Role;
use millstream_schemas::Code;
use millstream_schemas::clock::MAX_AHEAD_MICROS;
use millstream_schemas::stream::{Submission, Verdict};
use millstream_stack::Stack;
use serde_json::Value;
use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Connection, Executor};
use uuid::Uuid;

use self::generate::Generator;

const SCHEMA: &str = include_str!("batches/schema.sql");
const POLICIES: &str = include_str!("batches/policies.sql");
/// Runs, each from empty tables, and their cases.
const RUNS: u64 = 20;
/// Seed of the first run; the same each time, so that a check fails for a change and not by chance.
const FIRST_SEED: u64 = 6_568_791_186_024_944_029;
const CASES: usize = 100;
const SEED: &str = "MILLSTREAM_BATCHES_SEED";
const MORE_RUNS: &str = "MILLSTREAM_BATCHES_RUNS";

/// All rows but for what differs by nature: stamps that were cut (from `$1` on, in microseconds since 1970), generated numbers,
/// texts for people.
const STATE: &str = "\
WITH late AS (SELECT to_timestamp($1::bigint / 1000000.0) AS begin, '{\"updated_at\": \"late\"}'::jsonb AS row)
SELECT jsonb_build_object(
    'teams', (SELECT jsonb_agg(to_jsonb(t) ORDER BY id) FROM teams t),
    'members', (SELECT jsonb_agg(to_jsonb(t) ORDER BY team_id, user_id) FROM members t),
    'labels', (SELECT jsonb_agg(to_jsonb(t) || CASE WHEN updated_at >= begin THEN late.row ELSE '{}' END ORDER BY id) FROM labels t, late),
    'tasks', (SELECT jsonb_agg(to_jsonb(t) || CASE WHEN updated_at >= begin THEN late.row ELSE '{}' END ORDER BY id) FROM tasks t, late),
    'notes', (SELECT jsonb_agg(to_jsonb(t) - 'number' || CASE WHEN updated_at >= begin THEN late.row ELSE '{}' END ORDER BY id) FROM notes t, late),
    'links', (SELECT jsonb_agg(to_jsonb(t) ORDER BY id) FROM links t),
    'cards', (SELECT jsonb_agg(to_jsonb(t) || CASE WHEN updated_at >= begin THEN late.row ELSE '{}' END ORDER BY id) FROM cards t, late),
    'marks', (SELECT jsonb_agg(to_jsonb(t) ORDER BY id) FROM marks t),
    'log', (SELECT jsonb_agg(jsonb_build_array(op, rows, times) ORDER BY op, rows) FROM (SELECT op, rows, count(*) AS times FROM log GROUP BY op, rows) t),
    'clients', (SELECT jsonb_agg(to_jsonb(t) - 'last_seen' ORDER BY client_id) FROM millstream.clients t),
    'instances', (SELECT jsonb_agg(to_jsonb(t) ORDER BY client_id, first_seq) FROM millstream.instances t),
    'history', (SELECT jsonb_agg(to_jsonb(t) - '{id,at,message,trace_id}'::text[] ORDER BY client_id, seq) FROM millstream.changes_history t)
)::text";

/// What became of a submission: verdict, code, rule.
type Known = (Verdict, Option<Code>, Option<String>);
/// A repetition in the same batch gets the same answer, or none: the first counts, as on the wire.
type Verdicts = BTreeMap<(Uuid, u64), String>;

/// One database and its executor.
struct Side {
    direct: Direct,
    watch: PgConnection,
    isolated: bool,
    /// Batches that were applied as one statement.
    at_once: u64,
}

impl Side {
    /// Takes a batch, no earlier than `now`; gives the verdicts and then the state.
    async fn take(&mut self, batch: Vec<Submission>, now: u64) -> Result<(Verdicts, Value)> {
        let late = now + MAX_AHEAD_MICROS;
        let mut verdicts = Verdicts::new();
        for (client_id, result) in self.direct.execute(batch, self.isolated).await? {
            let failure = result.failure;
            let known: Known = (result.verdict, failure.as_ref().map(|f| f.code), failure.and_then(|f| f.rule));
            verdicts.entry((client_id, result.client_seq)).or_insert_with(|| format!("{known:?}"));
        }
        let at_once: bool = sqlx::query_scalar(AT_ONCE).fetch_one(&mut self.watch).await?;
        self.at_once += u64::from(at_once);
        let text: String = sqlx::query_scalar(STATE).bind(late as i64).fetch_one(&mut self.watch).await?;
        let mut state = serde_json::from_str(&text)?;
        blur(&mut state, late);
        Ok((verdicts, state))
    }
}

/// Whether the executor applied its last batch as one statement.
const AT_ONCE: &str = "\
SELECT EXISTS (SELECT FROM pg_stat_activity
WHERE datname = current_database() AND usename = 'millstream_changes' AND query LIKE '/* millstream at once */%')";

/// Replaces stamps that are as late as they may be: those were cut to what the database's clock allowed.
fn blur(value: &mut Value, late: u64) {
    match value {
        Value::Array(values) => values.iter_mut().for_each(|value| blur(value, late)),
        Value::Object(object) => {
            for (name, value) in object {
                match (name.as_str(), value) {
                    ("field_clocks", Value::Object(clocks)) => {
                        for clock in clocks.values_mut() {
                            let Value::String(text) = clock else { continue };
                            let stamp = text.get(..16).and_then(|stamp| stamp.parse::<u64>().ok());
                            if stamp.is_some_and(|stamp| stamp >= late) {
                                text.replace_range(..16, "late");
                            }
                        }
                    }
                    (_, value) => blur(value, late),
                }
            }
        }
        _ => {}
    }
}

/// Postgres and the two databases in it.
struct Pair {
    stack: Stack,
    admin: PgConnection,
    config: PathBuf,
    /// When the test began, in microseconds since 1970.
    now: u64,
}

impl Pair {
    async fn start() -> Result<Pair> {
        let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("system/batches/millstream.toml");
        let stack = Stack::builder()
            .database_only()
            .app_schema(SCHEMA)
            .config(&config)
            .postgres_setting("fsync", "off")
            .postgres_setting("synchronous_commit", "off")
            .postgres_setting("autovacuum", "off")
            .progress(|_| {})
            .start()
            .await?;
        let mut app = PgConnection::connect(&stack.postgres_url()).await?;
        app.execute(sqlx::raw_sql(POLICIES)).await?;
        app.close().await?;
        let admin = PgConnection::connect(&stack.postgres_url().replace("/app", "/postgres")).await?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_micros() as u64;
        Ok(Pair { stack, admin, config, now })
    }

    async fn admin(&mut self, sql: String) -> Result<()> {
        self.admin.execute(sqlx::raw_sql(AssertSqlSafe(sql.clone()))).await.context(sql)?;
        Ok(())
    }

    /// A copy of a database, and an executor on it.
    async fn side(&mut self, name: &str, template: &str, isolated: bool) -> Result<Side> {
        self.admin(format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)")).await?;
        self.admin(format!("CREATE DATABASE {name} TEMPLATE {template}")).await?;
        let database_url = self.stack.postgres_url_of(Role::Changes).replace("/app", &format!("/{name}"));
        let options =
            millstream_runtime::postgres::options(&millstream_runtime::postgres::Args { database_url }, "changes")?;
        let direct = Direct::connect(options, self.config.clone()).await?;
        let watch = PgConnection::connect(&self.stack.postgres_url().replace("/app", &format!("/{name}"))).await?;
        Ok(Side { direct, watch, isolated, at_once: 0 })
    }

    async fn sides(&mut self, template: &str) -> Result<(Side, Side)> {
        Ok((self.side("fast", template, false).await?, self.side("single", template, true).await?))
    }

    /// A run of cases; gives the number of the first that differs and how, with its batch.
    async fn run(&mut self, seed: u64, tally: &mut Tally) -> Result<Option<(usize, String, Vec<Submission>)>> {
        let (mut fast, mut single) = self.sides("app").await?;
        let mut generator = Generator::new(seed, self.now);
        for case in 0..CASES {
            let batch = generator.batch();
            let (a, b) = tokio::try_join!(fast.take(batch.clone(), self.now), single.take(batch.clone(), self.now))?;
            tally.add(&b.0);
            let lost = |verdict: &&String| verdict.contains("Superseded") || verdict.contains("Merged");
            if let Some(verdict) = b.0.values().find(lost).filter(|_| generator.is_alone()) {
                return Ok(Some((case, format!("an author lost to nobody else: {verdict}"), batch)));
            }
            if let Some(difference) = difference(&a, &b) {
                return Ok(Some((case, difference, batch)));
            }
            generator.look(&b.1);
        }
        tally.at_once += fast.at_once;
        Ok(None)
    }

    /// The smallest batch that still differs, and from which state.
    async fn shrink(&mut self, seed: u64, case: usize, mut batch: Vec<Submission>) -> Result<String> {
        let mut before = self.side("before", "app", true).await?;
        let mut generator = Generator::new(seed, self.now);
        let mut state = Value::Null;
        for _ in 0..case {
            state = before.take(generator.batch(), self.now).await?.1;
            generator.look(&state);
        }
        drop(before);
        let Some(mut difference) = self.differs("before", &batch).await? else { bail!("it differs in its run only") };
        // Without half of it, a quarter, … one; then without single changes of transactions.
        let mut size = batch.len().div_ceil(2);
        while size > 0 {
            let mut index = 0;
            while index < batch.len() {
                let smaller = without(&batch, index..(index + size).min(batch.len()));
                match self.differs("before", &smaller).await? {
                    Some(found) => (batch, difference) = (smaller, found),
                    None => index += size,
                }
            }
            size /= 2;
        }
        for index in 0..batch.len() {
            let mut change = 0;
            while batch[index].changes.len() > 1 && change < batch[index].changes.len() {
                let mut smaller = batch.clone();
                smaller[index].changes.remove(change);
                match self.differs("before", &smaller).await? {
                    Some(found) => (batch, difference) = (smaller, found),
                    None => change += 1,
                }
            }
        }
        if let Some(tables) = state.as_object_mut() {
            tables.retain(|name, _| !["clients", "instances", "history", "log"].contains(&name.as_str()));
        }
        let batch: Vec<String> = batch.iter().map(serde_json::to_string).collect::<Result<_, _>>()?;
        Ok(format!("{difference}\nbatch:\n{}\nbefore:\n{state}", batch.join("\n")))
    }

    async fn differs(&mut self, template: &str, batch: &[Submission]) -> Result<Option<String>> {
        self.admin(format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{template}'"))
            .await?;
        let (mut fast, mut single) = self.sides(template).await?;
        let (a, b) = tokio::try_join!(fast.take(batch.to_vec(), self.now), single.take(batch.to_vec(), self.now))?;
        Ok(difference(&a, &b))
    }
}

/// The batch without some submissions; later ones of the same clients move up.
fn without(batch: &[Submission], range: std::ops::Range<usize>) -> Vec<Submission> {
    let mut batch = batch.to_vec();
    for index in range.rev() {
        let gone = batch.remove(index);
        let later = batch.iter_mut().skip(index);
        for later in later.filter(|later| later.client_id == gone.client_id && later.client_seq > gone.client_seq) {
            later.client_seq -= 1;
            later.after.retain(|client_seq| *client_seq != gone.client_seq);
            later
                .after
                .iter_mut()
                .filter(|client_seq| **client_seq > gone.client_seq)
                .for_each(|client_seq| *client_seq -= 1);
        }
    }
    batch
}

fn difference(fast: &(Verdicts, Value), single: &(Verdicts, Value)) -> Option<String> {
    for key in fast.0.keys().chain(single.0.keys()) {
        let (a, b) = (fast.0.get(key), single.0.get(key));
        if a != b {
            return Some(format!("verdict of {key:?}: batch {a:?}, one by one {b:?}"));
        }
    }
    let (Value::Object(a), Value::Object(b)) = (&fast.1, &single.1) else { return Some("no state".to_owned()) };
    let rows = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let (name, value) = a.iter().find(|(name, value)| b.get(*name) != Some(value))?;
    let (a, b) = (rows(value), rows(&b[name]));
    let only_a: Vec<String> = a.iter().filter(|row| !b.contains(row)).map(Value::to_string).collect();
    let only_b: Vec<String> = b.iter().filter(|row| !a.contains(row)).map(Value::to_string).collect();
    Some(format!("{name}:\n  batch      {}\n  one by one {}", only_a.join(" "), only_b.join(" ")))
}

/// How often each verdict was seen: a generator that never hits one proves nothing about it.
#[derive(Debug, Default)]
struct Tally {
    verdicts: BTreeMap<String, u64>,
    /// Batches that were applied as one statement.
    at_once: u64,
}

impl Tally {
    fn add(&mut self, verdicts: &Verdicts) {
        for verdict in verdicts.values() {
            *self.verdicts.entry(verdict.clone()).or_default() += 1;
        }
    }

    fn share(&self, verdict: &str) -> f64 {
        let all: u64 = self.verdicts.values().sum();
        let of: u64 = self.verdicts.iter().filter(|(name, _)| name.contains(verdict)).map(|(_, count)| count).sum();
        of as f64 / all.max(1) as f64
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn batches_equal_one_by_one() -> Result<()> {
    let mut pair = Pair::start().await?;
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let replayed = number(SEED);
    let first = replayed.unwrap_or(FIRST_SEED);
    let runs = if replayed.is_some() { 1 } else { number(MORE_RUNS).unwrap_or(RUNS) };
    let mut tally = Tally::default();
    for run in 0..runs {
        // Stamps of one run must be near one another, and no more than a minute ahead.
        pair.now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_micros() as u64;
        let seed = first.wrapping_add(run);
        let Some((case, difference, batch)) = pair.run(seed, &mut tally).await? else { continue };
        if replayed.is_some() {
            let smallest = pair.shrink(seed, case, batch).await?;
            bail!("seed {seed}, case {case}: {smallest}");
        }
        bail!("replay with {SEED}={seed}; case {case} of a run differs: {difference}");
    }
    println!("{runs} runs from seed {first}: {tally:#?}");
    if replayed.is_none() {
        for verdict in ["Applied", "EntityMissing", "PermissionDenied", "BusinessRule", "InvalidValue"] {
            ensure!(tally.share(verdict) > 0.005, "{verdict} is too rare: {tally:?}");
        }
        ensure!(tally.at_once > runs * CASES as u64 / 20, "few batches went at once: {tally:?}");
    }
    Ok(())
}
