//! `millstream bench catchup`: how long a client takes that comes back far behind, when little of what it missed is its own;
//! beside it the least that this takes: asking the broker for those messages.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt as _;
use millstream_client::Client;
use millstream_provision::keys::Role;
use millstream_runtime::nats;
use millstream_schemas::Scope;
use millstream_schemas::subject::WAL_STREAM;
use millstream_stack::Stack;
use serde::Serialize;
use sqlx::Connection as _;
use sqlx::postgres::PgConnection;
use uuid::Uuid;

use crate::error::Error;
use crate::load::{SETTLE_LIMIT, number};
use crate::rig::{CONFIG, finish, folder, start};

const USER: &str = "bench";
/// Projects that others are busy with: one message each a transaction.
const FOREIGN: u64 = 5_000;
/// How long replication may take to publish it all.
const PUBLISH_LIMIT: Duration = Duration::from_secs(900);

/// Flags of `millstream bench catchup`.
#[derive(clap::Args, Clone, Debug)]
pub struct CatchupArgs {
    /// Print one JSON object instead of text
    #[arg(long)]
    pub json: bool,
    /// Messages of the stream that the client is behind
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(5_000..=100_000_000))]
    pub behind: u64,
    /// Changes among them that concern the client
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    pub relevant: u64,
    /// Folder for the stack's data, to choose the disk; removed afterwards. Default: a temporary one
    #[arg(long)]
    pub dir: Option<PathBuf>,
}

/// The figures that the bench prints.
#[derive(Debug, Serialize)]
struct CatchupReport {
    /// Messages.
    behind: u64,
    relevant: u64,
    /// From opening the store to its having every change: the median of several clients.
    seconds: f64,
    /// The same of the first one, for whom the broker reads what it has not got in memory any more.
    first_seconds: f64,
    /// One request to the broker for the messages of the client's scope.
    floor_seconds: f64,
}

/// Runs it.
pub async fn run(args: CatchupArgs) -> Result<(), Error> {
    let folder = folder(args.dir.as_deref(), CONFIG)?;
    let stack = start(&folder).await?;
    let outcome = measure(&stack, folder.path(), &args).await;
    finish(stack, outcome, args.json, print).await
}

fn print(report: &CatchupReport) {
    println!("{} messages behind, {} changes of its own  {} s", report.behind, report.relevant, report.seconds);
    println!("the first client, with a broker that is cold  {} s", report.first_seconds);
    println!("floor: one request to the broker              {} s", report.floor_seconds);
}

/// Clients that come back, each with a store of its own.
const CLIENTS: usize = 5;

async fn measure(stack: &Stack, folder: &Path, args: &CatchupArgs) -> Result<CatchupReport, Error> {
    let mut postgres = PgConnection::connect(&stack.postgres_url()).await.map_err(Error::postgres("connect"))?;
    let (project, task) = (Uuid::now_v7(), Uuid::now_v7());
    for sql in [
        format!("INSERT INTO projects (id, name) VALUES ('{project}', 'bench')"),
        format!("INSERT INTO members VALUES ('{project}', '{USER}', 'member')"),
        format!("INSERT INTO tasks (id, project_id, title) VALUES ('{task}', '{project}', 'bench')"),
        format!(
            "INSERT INTO projects (id, name) SELECT gen_random_uuid(), 'foreign' FROM generate_series(1, {FOREIGN})"
        ),
    ] {
        execute(&mut postgres, sql).await?;
    }
    let store = |number: usize| folder.join(format!("client-{number}.db"));
    for number in 0..CLIENTS {
        let client = open(stack, &store(number)).await?;
        tokio::time::timeout(SETTLE_LIMIT, client.ready())
            .await
            .map_err(|_| Error::Late(format!("no snapshot within {SETTLE_LIMIT:?}")))?
            .map_err(Error::client("first snapshot"))?;
        client.close().await.map_err(Error::client("close"))?;
    }
    let nats = nats::connect(&stack.nats_args(Role::Admin), Role::Admin.name()).await.map_err(broker("connect"))?;
    let mut stream = nats.jetstream.get_stream(WAL_STREAM).await.map_err(broker("find the stream"))?;
    let from = last(&mut stream).await?;

    eprintln!("writing {} messages …", args.behind);
    let transactions = args.behind.div_ceil(FOREIGN);
    let mut written = 0;
    for nth in 1..=transactions {
        execute(&mut postgres, format!("UPDATE projects SET name = 'foreign {nth}' WHERE id <> '{project}'")).await?;
        while written < args.relevant * nth / transactions {
            written += 1;
            execute(&mut postgres, format!("UPDATE tasks SET position = {written} WHERE id = '{task}'")).await?;
        }
    }
    let began = Instant::now();
    let wanted = from + transactions * FOREIGN + args.relevant;
    while last(&mut stream).await? < wanted {
        if began.elapsed() > PUBLISH_LIMIT {
            return Err(Error::Late(format!("replication did not publish it all within {PUBLISH_LIMIT:?}")));
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    // The edge reads the stream, too: until it has, what is timed is how both get in each other's way.
    while unread(&stream).await? > 0 {
        if began.elapsed() > PUBLISH_LIMIT {
            return Err(Error::Late(format!("the edge did not read it all within {PUBLISH_LIMIT:?}")));
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    tokio::time::sleep(Duration::from_secs(2)).await;

    eprintln!("catching up …");
    let mut times = Vec::new();
    for number in 0..CLIENTS {
        times.push(come_back(stack, &store(number), args.relevant).await?);
    }
    let mut floors = Vec::new();
    for _ in 0..CLIENTS {
        floors.push(ask(&nats, &Scope::new("project", project.to_string()).subject(), from, args.relevant).await?);
    }
    let behind = last(&mut stream).await? - from;
    let (first_seconds, seconds) = (round(times.first().copied()), median(times));
    Ok(CatchupReport { behind, relevant: args.relevant, seconds, first_seconds, floor_seconds: median(floors) })
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_unstable_by(f64::total_cmp);
    round(times.get(times.len() / 2).copied())
}

/// Four decimals.
fn round(seconds: Option<f64>) -> f64 {
    (seconds.unwrap_or_default() * 10_000.0).round() / 10_000.0
}

fn broker<E: Into<Box<dyn std::error::Error + Send + Sync>>>(action: &'static str) -> impl FnOnce(E) -> Error {
    move |source| Error::JetStream { action, source: source.into() }
}

async fn execute(postgres: &mut PgConnection, sql: String) -> Result<(), Error> {
    let query = sqlx::query(sqlx::AssertSqlSafe(sql));
    query.execute(postgres).await.map(drop).map_err(Error::postgres("write"))
}

/// Last sequence of a stream.
async fn last(stream: &mut async_nats::jetstream::stream::Stream) -> Result<u64, Error> {
    Ok(stream.info().await.map_err(broker("ask for the stream"))?.state.last_sequence)
}

/// Messages that a consumer has not been given.
async fn unread(stream: &async_nats::jetstream::stream::Stream) -> Result<u64, Error> {
    let mut consumers = stream.consumers();
    let mut most = 0;
    while let Some(consumer) = consumers.next().await {
        most = most.max(consumer.map_err(broker("list the consumers"))?.num_pending);
    }
    Ok(most)
}

async fn open(stack: &Stack, file: &Path) -> Result<Client, Error> {
    let builder = Client::builder(file).edge(stack.edge_url()).token(stack.token(USER));
    builder.open().await.map_err(Error::client("open"))
}

/// From opening the store to the last change's being there; by catching up, not by a snapshot.
async fn come_back(stack: &Stack, file: &Path, relevant: u64) -> Result<f64, Error> {
    let began = Instant::now();
    let client = open(stack, file).await?;
    let mut rows = client.watch("SELECT max(position) FROM tasks", ());
    loop {
        let next = tokio::time::timeout(SETTLE_LIMIT, rows.next()).await;
        let Ok(Some(item)) = next else { return Err(Error::Late("a client did not catch up".into())) };
        let item = item.map_err(Error::client("watch"))?;
        let position = item.rows.first().and_then(|row| row.first()).and_then(number).unwrap_or(0.0);
        if position as u64 == relevant {
            break;
        }
    }
    let time = began.elapsed().as_secs_f64();
    client.close().await.map_err(Error::client("close"))?;
    Ok(time)
}

/// The floor: one batched direct get (NATS ADR-31) of the subject's messages behind `from`.
async fn ask(nats: &nats::Nats, subject: &str, from: u64, relevant: u64) -> Result<f64, Error> {
    let began = Instant::now();
    let inbox = nats.client.new_inbox();
    let mut replies = nats.client.subscribe(inbox.clone()).await.map_err(broker("subscribe"))?;
    let request = serde_json::json!({ "seq": from + 1, "batch": relevant, "next_by_subj": subject });
    let to = format!("$JS.API.DIRECT.GET.{WAL_STREAM}");
    nats.client.publish_with_reply(to, inbox, Bytes::from(request.to_string())).await.map_err(broker("ask"))?;
    let mut found = 0;
    while let Ok(Some(reply)) = tokio::time::timeout(SETTLE_LIMIT, replies.next()).await {
        if reply.status.is_some() {
            break;
        }
        found += 1;
    }
    if found != relevant {
        return Err(Error::NotConverged(format!("the broker has {found} messages of {relevant}")));
    }
    Ok(began.elapsed().as_secs_f64())
}
