//! Promises G5 to G8, with Postgres as the oracle: random schemas, memberships and transactions by SQL and by clients,
//! under cuts, restarts and revocations. Every client always shows a state that Postgres once had for its user, never an
//! earlier one than before, and in the end the last one.
//!
//! ```text
//! MILLSTREAM_SEED=123 cargo test -p millstream-tests --test system histories     (one history)
//! MILLSTREAM_HISTORIES=3000 cargo test -p millstream-tests --test system histories
//! ```

mod schema;
mod truth;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use millstream_client::{Client, SqlValue};
use millstream_stack::Service;
use millstream_tests::board::{Board, PATIENCE};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use schema::{Columns, MEMBERSHIPS, Pool, SERIAL, Schema};
use sqlx::error::DatabaseError;
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use tokio::sync::watch;
use truth::{Shown, Truth, View};
use uuid::Uuid;

/// Histories of an ordinary run.
const HISTORIES: u64 = 300;
/// Histories with one schema, one after the other.
const WITH_A_SCHEMA: u64 = 25;
/// How often tables are changed under the clients.
const WITH_MIGRATIONS: f64 = 0.2;
/// `lock_not_available`, `deadlock_detected`, `check_violation`, `duplicate_table`.
const REFUSALS: [&str; 4] = ["55P03", "40P01", "23514", "42P07"];
/// Schemas at a time.
const AT_A_TIME: u64 = 3;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is a number, not {text:?}")))
}

#[tokio::test(flavor = "multi_thread")]
async fn histories() -> Result<()> {
    if let Some(seed) = number("MILLSTREAM_SEED") {
        // As many as are told, one after the other, as in a run of all.
        let end = seed + number("MILLSTREAM_HISTORIES").unwrap_or(1);
        return with_a_schema(seed / WITH_A_SCHEMA, seed..end).await;
    }
    let histories = number("MILLSTREAM_HISTORIES").unwrap_or(HISTORIES);
    let start = Instant::now();
    let mut all = tokio::task::JoinSet::new();
    for first in 0..AT_A_TIME {
        all.spawn(async move {
            for nth in (first..histories.div_ceil(WITH_A_SCHEMA)).step_by(AT_A_TIME as usize) {
                let from = nth * WITH_A_SCHEMA;
                with_a_schema(nth, from..(from + WITH_A_SCHEMA).min(histories)).await?;
            }
            Ok(())
        });
    }
    all.join_all().await.into_iter().collect::<Result<()>>()?;
    println!("{histories} histories in {:.1} s", start.elapsed().as_secs_f64());
    Ok(())
}

async fn with_a_schema(nth: u64, seeds: std::ops::Range<u64>) -> Result<()> {
    let schema = Schema::random(&mut StdRng::seed_from_u64(nth));
    let folder = tempfile::tempdir()?;
    let config = folder.path().join("millstream.toml");
    std::fs::write(&config, schema.config())?;
    let mut board = Board::with(|builder| builder.app_schema(schema.ddl()).config(&config)).await?;
    for seed in seeds {
        let result = history(&mut board, &schema, seed).await.with_context(|| {
            format!(
                "replay: MILLSTREAM_SEED={seed} cargo test -p millstream-tests --test system histories\n{schema:#?}"
            )
        });
        board.explain(result)?;
    }
    board.stack.stop().await;
    Ok(())
}

/// How a client is opened, again and again.
#[derive(Clone)]
struct Seat {
    user: String,
    store: PathBuf,
    edge: String,
    token: String,
}

impl Seat {
    fn new(board: &Board, name: &str, user: &str) -> Seat {
        let (edge, token) = (board.stack.edge_url(), board.stack.token(user));
        Seat { user: user.to_owned(), store: board.store(name), edge, token }
    }

    async fn open(&self) -> Result<Client> {
        let builder = Client::builder(&self.store).edge(&self.edge).token(&self.token).max_attempts(1);
        let client = builder.open().await?;
        tokio::time::timeout(PATIENCE, client.ready()).await.context("no snapshot")??;
        Ok(client)
    }
}

/// The query that reads every table at one instant.
fn everything(schema: &Schema) -> String {
    let part = |(n, (table, columns)): (usize, &(String, Columns))| {
        let columns: Vec<&str> = columns.iter().map(|(name, _)| name.as_str()).collect();
        format!("SELECT {n}, json_array({}) FROM {table}", columns.join(", "))
    };
    let foreign = if schema.memberships_synced { 0 } else { MEMBERSHIPS.len() };
    schema.columns().iter().enumerate().skip(foreign).map(part).collect::<Vec<_>>().join(" UNION ALL ")
}

async fn look(client: &Client, schema: &Schema, sql: &str) -> Result<View> {
    let columns = schema.columns();
    let mut view = View::new();
    for row in client.query(sql, ()).await?.rows {
        let [SqlValue::Integer(table), SqlValue::Text(row)] = row.as_slice() else { anyhow::bail!("{row:?}") };
        let values: Vec<serde_json::Value> = serde_json::from_str(row)?;
        let text = |(value, (_, boolean)): (serde_json::Value, &(String, bool))| match value {
            serde_json::Value::Null => None,
            serde_json::Value::String(text) => Some(text),
            value if *boolean => Some(if value == 0 { "false" } else { "true" }.to_owned()),
            value => Some(value.to_string()),
        };
        let row = values.into_iter().zip(&columns[*table as usize].1).map(text).collect();
        view.insert((*table as usize, row));
    }
    Ok(view)
}

/// Looks again and again, through cuts and with the client closed for a while, until the end is seen.
async fn watcher(
    seat: Seat,
    schema: Schema,
    mut rng: StdRng,
    end: watch::Receiver<Option<Arc<Truth>>>,
) -> Result<Vec<Shown>> {
    let sql = everything(&schema);
    let mut shown: Vec<Shown> = Vec::new();
    let mut client = seat.open().await?;
    let (start, mut asked) = (Instant::now(), None);
    loop {
        let view = look(&client, &schema, &sql).await?;
        if shown.last().is_none_or(|last| last.view != view) {
            let status = client.status().borrow().clone();
            let position = status.position.map(|position| format!("{} {}", position.stream_seq, position.lsn));
            let at = format!(
                "{:.3} s: {:?}, {position:?}, {:?}",
                start.elapsed().as_secs_f64(),
                status.state,
                status.last_error
            );
            shown.push(Shown { view, at });
        }
        let truth = end.borrow().clone();
        if let Some(truth) = truth {
            let since = *asked.get_or_insert_with(Instant::now);
            let is_last = shown.last().is_some_and(|last| last.view == truth.last(&seat.user));
            if is_last || since.elapsed() > PATIENCE {
                client.close().await?;
                return Ok(shown);
            }
        } else {
            match rng.random_range(0..1_000) {
                0..8 => client.drop_connection(),
                8..12 => {
                    client.close().await?;
                    tokio::time::sleep(Duration::from_millis(rng.random_range(0..200))).await;
                    client = seat.open().await?;
                }
                _ => {}
            }
        }
        tokio::time::sleep(Duration::from_millis(rng.random_range(1..8))).await;
    }
}

/// Writes through a client; in the end everything is confirmed or given up.
async fn writer(client: &Client, schema: &Schema, pool: &Pool, mut rng: StdRng) -> Result<()> {
    for _ in 0..rng.random_range(4..10) {
        let statements: Vec<String> =
            (0..rng.random_range(1..4)).map(|_| schema.statement(pool, false, &mut rng)).collect();
        client.tx(move |tx| statements.iter().try_for_each(|sql| tx.execute(sql, ()).map(drop))).await?;
        if rng.random_bool(0.1) {
            client.drop_connection();
        }
        tokio::time::sleep(Duration::from_millis(rng.random_range(0..30))).await;
    }
    let start = Instant::now();
    loop {
        let settled = client.settled(Duration::from_secs(1)).await;
        let failed = client.failed().await?;
        if failed.is_empty() && settled.is_ok() {
            return Ok(());
        }
        let status = client.status().borrow().clone();
        ensure!(
            start.elapsed() < PATIENCE,
            "a writer's queue does not drain: {settled:?}, {status:?}, {:#?}",
            client.queue(20).await?
        );
        for write in failed {
            client.discard(write.tx).await?;
        }
    }
}

/// Writes as somebody does who knows nothing of Millstream.
async fn foreigner(mut postgres: PgConnection, schema: &Schema, pool: &Pool, mut rng: StdRng) -> Result<()> {
    for _ in 0..rng.random_range(6..14) {
        let transaction = foreign_transaction(&mut postgres, schema, pool, &mut rng).await;
        let passes = |error: &sqlx::Error| {
            let deadlock = |error: &dyn DatabaseError| error.code().as_deref() == Some("40P01");
            error.as_database_error().is_some_and(|error| deadlock(error) || error.constraint().is_some())
        };
        match transaction {
            // A deadlock with the executor, which locks rows before it writes; a deferred key that is taken.
            Err(error) if passes(&error) => {}
            other => other?,
        }
        tokio::time::sleep(Duration::from_millis(rng.random_range(0..30))).await;
    }
    Ok(())
}

async fn foreign_transaction(
    postgres: &mut PgConnection,
    schema: &Schema,
    pool: &Pool,
    rng: &mut StdRng,
) -> sqlx::Result<()> {
    let mut transaction = postgres.begin().await?;
    // Before any lock of a table.
    sqlx::query("SELECT pg_advisory_xact_lock($1)").bind(SERIAL).execute(&mut *transaction).await?;
    for _ in 0..rng.random_range(1..5) {
        let sql = schema.foreign_statement(pool, rng);
        // A savepoint each: a key may be taken, or a table not be emptied whose deferred key is still to be looked at.
        let mut part = transaction.begin().await?;
        match sqlx::query(AssertSqlSafe(sql)).execute(&mut *part).await {
            Ok(_) if rng.random_bool(0.95) => part.commit().await?,
            Ok(_) => part.rollback().await?,
            Err(sqlx::Error::Database(error))
                if error.constraint().is_some() || error.code().as_deref() == Some("55006") =>
            {
                part.rollback().await?;
            }
            Err(error) => return Err(error),
        }
    }
    if rng.random_bool(0.9) { transaction.commit().await } else { transaction.rollback().await }
}

/// Changes tables while they are written to.
async fn migrator(mut postgres: PgConnection, schema: &Schema, seed: u64, mut rng: StdRng) -> Result<()> {
    if !rng.random_bool(WITH_MIGRATIONS) {
        return Ok(());
    }
    sqlx::query("SET lock_timeout = '5s'").execute(&mut postgres).await?;
    for n in 0..rng.random_range(1..=2) {
        tokio::time::sleep(Duration::from_millis(rng.random_range(0..300))).await;
        let sql = schema.migration(seed * 10 + n, &mut rng);
        match sqlx::raw_sql(AssertSqlSafe(sql.clone())).execute(&mut postgres).await {
            // A partition that there is already, or for which there are rows elsewhere; a lock; rows that others write.
            Err(error)
                if error
                    .as_database_error()
                    .is_some_and(|error| REFUSALS.contains(&&*error.code().unwrap_or_default())) => {}
            other => {
                other.context(sql)?;
            }
        }
    }
    Ok(())
}

async fn history(board: &mut Board, schema: &Schema, seed: u64) -> Result<()> {
    let mut rng = StdRng::seed_from_u64(seed);
    let uuids = |rng: &mut StdRng, count: usize| -> Vec<String> {
        (0..count).map(|_| Uuid::from_u128(rng.random()).to_string()).collect()
    };
    let pool = Pool {
        users: ["ann", "bob", "cyd"].iter().map(|name| format!("{name}{seed}")).collect(),
        projects: {
            let count = rng.random_range(2..=3);
            uuids(&mut rng, count)
        },
        teams: uuids(&mut rng, 2),
        ids: schema.tables.iter().map(|table| (0..6).map(|_| table.key.random(&mut rng)).collect()).collect(),
    };
    let mut postgres = board.postgres().await?;
    let since = truth::now(&mut postgres).await?;
    let before = truth::read(&mut postgres, schema).await?;
    let mut part = || StdRng::seed_from_u64(rng.random());
    let (mut first, mut luck) = (part(), part());
    for _ in 0..20 {
        let sql = schema.foreign_statement(&pool, &mut first);
        if let Err(error) = sqlx::query(AssertSqlSafe(sql.clone())).execute(&mut postgres).await {
            let refused = error.as_database_error().is_some_and(|error| error.constraint().is_some());
            ensure!(refused, "{sql}: {error}");
        }
    }
    let (tell, end) = watch::channel(None);
    let mut watchers = tokio::task::JoinSet::new();
    for (n, user) in pool.users.iter().enumerate() {
        let (seat, schema, rng, end) =
            (Seat::new(board, &format!("{seed}-{n}"), user), schema.clone(), part(), end.clone());
        watchers.spawn(async move { (seat.user.clone(), watcher(seat, schema, rng, end).await) });
    }
    let mut writers = Vec::new();
    for (n, user) in pool.users.iter().take(2).enumerate() {
        writers.push((user.clone(), Seat::new(board, &format!("{seed}-w{n}"), user).open().await?));
    }
    let foreigners = (board.postgres().await?, board.postgres().await?);
    let migrations = migrator(board.postgres().await?, schema, seed, part());
    let trouble = async {
        if luck.random_bool(0.15) {
            tokio::time::sleep(Duration::from_millis(luck.random_range(20..200))).await;
            let service = Service::OWN[luck.random_range(0..Service::OWN.len())];
            board.kill_and_restart(service).await?;
        }
        Ok(())
    };
    tokio::try_join!(
        trouble,
        migrations,
        foreigner(foreigners.0, schema, &pool, part()),
        foreigner(foreigners.1, schema, &pool, part()),
        writer(&writers[0].1, schema, &pool, part()),
        writer(&writers[1].1, schema, &pool, part()),
    )?;
    let truth = Arc::new(Truth::read(&mut postgres, schema, before, since).await?);
    tell.send_replace(Some(truth.clone()));
    for (user, client) in writers {
        let (start, sql) = (Instant::now(), everything(schema));
        let mut shown = look(&client, schema, &sql).await?;
        while shown != truth.last(&user) && start.elapsed() < PATIENCE {
            tokio::time::sleep(Duration::from_millis(10)).await;
            shown = look(&client, schema, &sql).await?;
        }
        let ends = truth.ends(&user, &shown);
        ends.with_context(|| format!("a writer: {:?}", *client.status().borrow()))?;
        client.close().await?;
    }
    for (user, shown) in watchers.join_all().await {
        truth.check(&user, &shown?).context("a watcher")?;
    }
    Ok(())
}
