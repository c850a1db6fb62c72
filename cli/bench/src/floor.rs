//! What the parts below the loop do at best on this machine.

use std::time::{Duration, Instant};

use millstream_provision::keys::Role;
use millstream_runtime::nats;
use millstream_stack::Stack;
use serde::Serialize;
use sqlx::Connection as _;
use sqlx::postgres::PgConnection;

use crate::error::Error;
use crate::figures::round;

/// Connections that commit at once.
pub const CONNECTIONS: usize = 20;
/// How long each is measured.
const TIME: Duration = Duration::from_secs(3);
/// Bytes of a published message: about a change.
const MESSAGE_BYTES: usize = 512;
/// Stream for the floor; removed afterwards.
const STREAM: &str = "BENCH_FLOOR";

/// The floor.
#[derive(Debug, Serialize)]
pub struct Floor {
    /// Single-row inserts, each its own transaction, with [`CONNECTIONS`] connections.
    pub postgres_commits_per_s: f64,
    /// The same with one connection: mean time of one.
    pub postgres_commit_ms: f64,
    /// Acknowledged publishes, one at a time.
    pub jetstream_acks_per_s: f64,
}

/// Measures the floor on a stack without load.
pub async fn measure(stack: &Stack) -> Result<Floor, Error> {
    // Another database: its WAL is read by the slot but decoded no further.
    let url = stack.postgres_url().replace(&format!("/{}", millstream_stack::data::DATABASE), "/postgres");
    let mut connection = PgConnection::connect(&url).await.map_err(Error::postgres("connect"))?;
    sqlx::query(
        "CREATE TABLE IF NOT EXISTS bench_floor (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, text text)",
    )
    .execute(&mut connection)
    .await
    .map_err(Error::postgres("create a table"))?;
    let single = commits(&url, 1).await?;
    let many = commits(&url, CONNECTIONS).await?;
    sqlx::query("DROP TABLE bench_floor").execute(&mut connection).await.map_err(Error::postgres("drop the table"))?;
    Ok(Floor {
        postgres_commits_per_s: round(many),
        postgres_commit_ms: round(1000.0 / single),
        jetstream_acks_per_s: round(acks(stack).await?),
    })
}

/// Commits per second.
async fn commits(url: &str, connections: usize) -> Result<f64, Error> {
    let mut tasks = Vec::new();
    for _ in 0..connections {
        let mut connection = PgConnection::connect(url).await.map_err(Error::postgres("connect"))?;
        tasks.push(tokio::spawn(async move {
            let (began, mut count) = (Instant::now(), 0_u64);
            while began.elapsed() < TIME {
                sqlx::query("INSERT INTO bench_floor (text) VALUES ($1)")
                    .bind("a row of the size of a small change, for the floor")
                    .execute(&mut connection)
                    .await
                    .map_err(Error::postgres("insert"))?;
                count += 1;
            }
            Ok::<f64, Error>(count as f64 / began.elapsed().as_secs_f64())
        }));
    }
    let mut sum = 0.0;
    for task in tasks {
        sum += task.await.map_err(|error| Error::Late(error.to_string()))??;
    }
    Ok(sum)
}

/// Acknowledged publishes per second, one at a time.
async fn acks(stack: &Stack) -> Result<f64, Error> {
    fn failed<E: Into<Box<dyn std::error::Error + Send + Sync>>>(action: &'static str) -> impl FnOnce(E) -> Error {
        move |source| Error::JetStream { action, source: source.into() }
    }
    let nats = nats::connect(&stack.nats_args(Role::Admin), Role::Admin.name()).await.map_err(failed("connect"))?;
    let config = async_nats::jetstream::stream::Config {
        name: STREAM.into(),
        subjects: vec!["bench.floor".into()],
        max_bytes: 256 << 20,
        ..Default::default()
    };
    nats.jetstream.create_stream(config).await.map_err(failed("create a stream"))?;
    let payload: bytes::Bytes = vec![b'x'; MESSAGE_BYTES].into();
    let (began, mut count) = (Instant::now(), 0_u64);
    while began.elapsed() < TIME {
        let ack = nats.jetstream.publish("bench.floor", payload.clone()).await.map_err(failed("publish"))?;
        ack.await.map_err(failed("wait for the ack"))?;
        count += 1;
    }
    let rate = count as f64 / began.elapsed().as_secs_f64();
    nats.jetstream.delete_stream(STREAM).await.map_err(failed("delete the stream"))?;
    Ok(rate)
}
