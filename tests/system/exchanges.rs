//! A broken exchange with Postgres never reaches the next session: whatever fails at whatever byte, a pool of one connection goes on
//! to give each session the answer to its own question.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use millstream_runtime::lease::Lease;
use millstream_runtime::postgres;
use millstream_stack::Stack;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use sqlx::{PgPool, Row as _};
use uuid::Uuid;

const BEGIN: &str = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY";
/// Broken exchanges, each with sessions after it.
const BROKEN: usize = 120;
const SESSIONS: usize = 100;

/// What goes wrong in an exchange.
#[derive(Clone, Copy, Debug)]
enum Fault {
    /// A COPY that does not begin: no such column.
    Column,
    /// A COPY that does not begin: a text that is no value of the type.
    Cast,
    /// A COPY that fails behind its first rows.
    LateCast,
    /// A statement that runs out of time.
    Timeout,
    /// A statement that fails.
    Statement,
    /// The backend is ended in the middle of a COPY.
    Ended,
    /// The session gives up in the middle.
    GivenUp,
    /// The connection breaks behind so many bytes of Postgres' answers.
    Cut,
}

const FAULTS: [Fault; 8] = [
    Fault::Column,
    Fault::Cast,
    Fault::LateCast,
    Fault::Timeout,
    Fault::Statement,
    Fault::Ended,
    Fault::GivenUp,
    Fault::Cut,
];

/// Stands before Postgres, and breaks a connection when its budget of bytes is used up.
async fn proxy(to: std::net::SocketAddr) -> Result<(std::net::SocketAddr, Arc<AtomicUsize>)> {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, copy};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let (address, budget) = (listener.local_addr()?, Arc::new(AtomicUsize::new(usize::MAX)));
    let left = budget.clone();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let left = left.clone();
            tokio::spawn(async move {
                let Ok(mut server) = tokio::net::TcpStream::connect(to).await else { return };
                let ((mut from_server, mut to_server), (mut from_client, mut to_client)) =
                    (server.split(), client.split());
                let down = async {
                    let mut buffer = [0; 64];
                    while let Ok(some @ 1..) = from_server.read(&mut buffer).await {
                        let allowed = left.load(Ordering::Relaxed);
                        let passed = some.min(allowed);
                        if to_client.write_all(&buffer[..passed]).await.is_err() || passed < some {
                            return;
                        }
                        if allowed != usize::MAX {
                            left.store(allowed - passed, Ordering::Relaxed);
                        }
                    }
                };
                tokio::select! {
                    () = down => {}
                    _ = copy(&mut from_client, &mut to_server) => {}
                }
            });
        }
    });
    Ok((address, budget))
}

/// What a session does: begins, asks, copies, ends; each answer has to be that of its own question.
async fn session(pool: &PgPool) -> Result<()> {
    let mut lease = Lease::begin(pool, BEGIN).await?;
    for _ in 0..2 {
        let asked = Uuid::new_v4();
        let rows =
            lease.all(sqlx::query("SELECT $1::text AS asked UNION ALL SELECT 'x'").bind(asked.to_string())).await?;
        ensure!(rows.len() == 2 && rows[0].try_get::<&str, _>(0)? == asked.to_string(), "another question's answer");
    }
    let asked = Uuid::new_v4();
    let mut copied = Vec::new();
    let mut copy = lease.copy_out(&format!("COPY (SELECT '{asked}' FROM generate_series(1, 3)) TO STDOUT")).await?;
    while let Some(chunk) = copy.next().await? {
        copied.extend_from_slice(&chunk);
    }
    drop(copy);
    ensure!(String::from_utf8(copied)?.lines().eq([asked.to_string().as_str(); 3]), "another COPY's rows");
    Ok(lease.commit().await?)
}

async fn copy_all(lease: &mut Lease, sql: &str) -> Result<()> {
    let mut copy = lease.copy_out(sql).await?;
    while copy.next().await?.is_some() {}
    Ok(())
}

async fn breaks(pool: &PgPool, admin: &PgPool, budget: &AtomicUsize, fault: Fault, random: &mut StdRng) -> Result<()> {
    if let Fault::Cut = fault {
        budget.store(random.random_range(0..3_000), Ordering::Relaxed);
        let broken = session(pool).await;
        budget.store(usize::MAX, Ordering::Relaxed);
        return broken;
    }
    let mut lease = Lease::begin(pool, BEGIN).await?;
    match fault {
        Fault::Column => copy_all(&mut lease, "COPY (SELECT no_such_column FROM pg_class) TO STDOUT").await,
        Fault::Cast => copy_all(&mut lease, "COPY (SELECT 1 WHERE 'zzz'::text::uuid IS NOT NULL) TO STDOUT").await,
        Fault::LateCast => {
            copy_all(&mut lease, "COPY (SELECT n, 1 / (5000 - n) FROM generate_series(1, 9000) AS n) TO STDOUT").await
        }
        Fault::Timeout => {
            lease.raw("SET LOCAL statement_timeout = 20").await?;
            copy_all(&mut lease, "COPY (SELECT n, pg_sleep(0.001) FROM generate_series(1, 9000) AS n) TO STDOUT").await
        }
        Fault::Statement => Ok(lease.all(sqlx::query("SELECT 1 / 0")).await.map(drop)?),
        Fault::Ended => {
            let pid: i32 = lease.one(sqlx::query("SELECT pg_backend_pid()")).await?.get(0);
            let end = sqlx::query("SELECT pg_terminate_backend($1)").bind(pid).execute(admin);
            let copying =
                copy_all(&mut lease, "COPY (SELECT n, pg_sleep(0.001) FROM generate_series(1, 500) n) TO STDOUT");
            let (copied, ended) = tokio::join!(copying, end);
            ended?;
            copied
        }
        Fault::GivenUp => {
            let after = Duration::from_micros(random.random_range(0..3_000));
            let copying =
                copy_all(&mut lease, "COPY (SELECT n, repeat('x', 99) FROM generate_series(1, 90000) n) TO STDOUT");
            Ok(tokio::time::timeout(after, copying).await??)
        }
        Fault::Cut => Ok(()),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_exchange_never_reaches_the_next_session() -> Result<()> {
    let stack = Stack::builder().database_only().start().await?;
    let url = url::Url::parse(&stack.postgres_url())?;
    let to = format!("{}:{}", url.host_str().unwrap_or("127.0.0.1"), url.port().unwrap_or(5432)).parse()?;
    let (address, budget) = proxy(to).await?;
    let mut through = url.clone();
    through.set_port(Some(address.port())).ok();
    let pool = postgres::pool(&postgres::Args { database_url: through.into() }, "exchanges", 1)?;
    let admin = postgres::pool(&postgres::Args { database_url: url.into() }, "exchanges", 1)?;
    let seed = std::env::var("MILLSTREAM_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    let mut random = StdRng::seed_from_u64(seed);
    let mut failed = 0;
    for round in 0..BROKEN {
        let fault = FAULTS[round % FAULTS.len()];
        failed += usize::from(breaks(&pool, &admin, &budget, fault, &mut random).await.is_err());
        // All of them now and then, some each time.
        let sessions = if round % FAULTS.len() == 0 { SESSIONS } else { 12 };
        for number in 0..sessions {
            let what = || format!("session {number} after {fault:?} in round {round}, seed {seed}");
            session(&pool).await.with_context(what)?;
        }
    }
    ensure!(failed > BROKEN / 2, "only {failed} of {BROKEN} exchanges broke");
    println!("{failed} of {BROKEN} exchanges broke");
    Ok(())
}
