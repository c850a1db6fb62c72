//! The validator and executor: from submitted change to committed row.
//!
//! The rooms, in the order of a change's way; each uses only those below it:
//!
//! - `partitions`: which partitions of the stream are this process's, and the cursor that reads them.
//! - `worker`: what waits for its turn, in each client's order; what is tried next after a failure.
//! - `transaction`: a batch in one Postgres transaction, guarded by the partitions' positions and the clients' ledger.
//! - `sql`: the texts that changes become, made from the catalog.
//! - `decide`: the rules that need no database.
//!
//! `error` tells verdicts from faults of the server, `item` is what is to be done. `direct` runs a worker without a broker.

mod decide;
pub mod direct;
mod error;
#[doc(hidden)]
pub mod for_simulation;
mod item;
mod partitions;
mod sql;
mod transaction;
mod worker;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use millstream_catalog::Config;
use millstream_runtime::backoff::Backoff;
use millstream_runtime::error::chain;
use millstream_runtime::health::{self, Health};
use millstream_runtime::nats::{self, Nats};
use millstream_runtime::postgres;
use millstream_runtime::shutdown::Shutdown;
use millstream_schemas::subject::{CHANGES_STREAM, PARTITIONS};
use sqlx::PgPool;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::item::WORKER_KIB;
use crate::partitions::consumer::{Consumer, Ended, Reading, WORKER_COMMANDS, WorkerLink};
use crate::partitions::janitor::Janitor;
use crate::partitions::ownership::{Assignment, Ownership};
use crate::partitions::retention::Retention;
use crate::partitions::{consumer, ownership};
use crate::sql::model::{ConfigFile, Watcher};
use crate::transaction::executor::Executor;
use crate::worker::external::External;
use crate::worker::parked::Parked;
use crate::worker::{Worker, WorkerContext};

pub use error::Error;

/// Connections beside the workers': heartbeats and housekeeping.
const POOL_CONNECTIONS: u32 = 2;
/// After this time of shutting down, work at hand is abandoned; Postgres rolls it back and another executor takes it.
const DRAIN_DEADLINE: Duration = Duration::from_secs(10);
/// Notices of lost partitions, and of idle ones, that may wait.
const NOTICES: usize = PARTITIONS as usize * 2;

/// Executes submitted changes in Postgres
#[derive(Clone, Debug, clap::Args)]
#[group(skip)]
pub struct Args {
    /// The broker.
    #[command(flatten)]
    pub nats: nats::Args,
    /// The database.
    #[command(flatten)]
    pub postgres: postgres::Args,
    /// Health checks.
    #[command(flatten)]
    pub health: health::Args,
    /// The file that declares the synced tables
    #[arg(long, env = "MILLSTREAM_CONFIG", default_value = "millstream.toml")]
    pub config: PathBuf,
    /// Batches that may be in Postgres at the same time; each has a connection of its own
    #[arg(long, env = "MILLSTREAM_CHANGES_WORKERS", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub workers: u16,
    /// Days for which failed changes are kept; longer than clients may stay away. 0 keeps them for ever
    #[arg(long, env = "MILLSTREAM_HISTORY_RETENTION_DAYS", default_value_t = 90)]
    pub history_retention_days: u16,
}

/// Runs the service until shutdown.
///
/// # Errors
/// The configuration cannot be used, or the broker refuses us. Postgres and the stream are waited for.
pub async fn run(args: Args, shutdown: Shutdown) -> Result<(), Error> {
    // What cannot get better by waiting ends the process at once; the workers read the file again when they need it.
    let config = Config::read(&args.config).map_err(Error::Config)?;
    let options = postgres::options(&args.postgres, "changes").map_err(Error::PostgresUrl)?;
    let pool = postgres::pool(&args.postgres, "changes", POOL_CONNECTIONS).map_err(Error::PostgresUrl)?;
    let health = Health::new();
    for part in ["nats", "ownership", "stream"] {
        health.set_ready(part, false);
    }
    let address = health::serve(args.health.listen, health.router(), shutdown.clone()).await.map_err(Error::Health)?;
    tracing::info!(%address, workers = args.workers, "health checks");
    let nats = tokio::select! {
        nats = nats::connect(&args.nats, "changes") => nats.map_err(Error::Nats)?,
        () = shutdown.requested() => return Ok(()),
    };
    let external = Arc::new(External::new(&config, nats.client.clone(), health.clone()));
    let source = Arc::new(ConfigFile::new(args.config.clone(), health.clone()));
    let service = Service { args, options, pool, health, nats, external, source, shutdown };
    while let Some(ended) = service.serve().await? {
        match ended {
            Ended::Shutdown => break,
            Ended::StreamRecreated => {
                tracing::warn!("MS_CHANGES is a new stream: its positions begin from the start, the ledger stays");
            }
        }
    }
    Ok(())
}

struct Service {
    args: Args,
    options: sqlx::postgres::PgConnectOptions,
    pool: PgPool,
    health: Health,
    nats: Nats,
    external: Arc<External>,
    source: Arc<ConfigFile>,
    shutdown: Shutdown,
}

impl Service {
    /// Works on one incarnation of the stream; none if asked to stop before it began.
    async fn serve(&self) -> Result<Option<Ended>, Error> {
        let Some(stream) = self.stream().await else { return Ok(None) };
        let incarnation = consumer::incarnation_of(stream.cached_info());
        let member = format!("changes-{}", Uuid::new_v4().simple());
        tracing::info!(member, stream.incarnation = incarnation, "executing");

        // Ends with the process's shutdown, and with this incarnation of the stream.
        let (trigger, stop) = Shutdown::manual();
        let (assignment_sender, assignment) = watch::channel(Assignment::default());
        let (lost_sender, lost) = mpsc::channel(NOTICES);
        let shared = WorkerContext {
            nats: Some(self.nats.client.clone()),
            stream: Some(stream.clone()),
            external: self.external.clone(),
            lost: lost_sender,
            health: self.health.clone(),
            parked: Parked::default(),
            shutdown: stop.clone(),
        };

        let mut tasks: JoinSet<&'static str> = JoinSet::new();
        let mut consumers: JoinSet<Ended> = JoinSet::new();
        let mut idle_senders = Vec::new();
        let workers = usize::from(self.args.workers);
        let (changed, _) = watch::channel(());
        let reading = Reading::new(self.health.clone(), workers);
        // Held so that no worker ends with its cursor, as if it were at fault, where the cursor says why all of them end.
        let mut held = Vec::new();
        for index in 0..workers {
            let (commands, receiver) = mpsc::channel(WORKER_COMMANDS);
            held.push(commands.clone());
            let executor =
                Executor::new(self.options.clone(), self.source.clone(), changed.subscribe(), incarnation.clone());
            let worker = Worker::new(index, executor, receiver, shared.clone());
            tasks.spawn(async move {
                worker.run().await;
                "worker"
            });
            let link = WorkerLink { index, workers, commands, room: Arc::new(Semaphore::new(WORKER_KIB)) };
            let (idle_sender, idle) = mpsc::channel(NOTICES);
            idle_senders.push(idle_sender);
            let (stream, incarnation, assignment) = (stream.clone(), incarnation.clone(), assignment.clone());
            let consumer = Consumer::new(stream, incarnation, link, assignment, idle, reading.clone(), stop.clone());
            consumers.spawn(consumer.run());
        }
        let (parked, pool, shutdown) = (shared.parked.clone(), self.pool.clone(), stop.clone());
        tasks.spawn(async move {
            parked.run(pool, shutdown).await;
            "parked"
        });
        drop(shared);
        let watcher = Watcher { pool: self.pool.clone(), source: self.source.clone(), changed, shutdown: stop.clone() };
        tasks.spawn(async move {
            watcher.run().await;
            "watcher"
        });
        let ownership = Ownership {
            pool: self.pool.clone(),
            member: member.clone(),
            incarnation: incarnation.clone(),
            assignment: assignment_sender,
            lost,
            health: self.health.clone(),
            shutdown: stop.clone(),
        };
        tasks.spawn(async move {
            ownership.run().await;
            "ownership"
        });
        let janitor = Janitor {
            pool: self.pool.clone(),
            retention: Retention::new(self.pool.clone(), self.args.history_retention_days),
            stream,
            incarnation,
            assignment,
            idle: idle_senders,
            shutdown: stop.clone(),
        };
        tasks.spawn(async move {
            janitor.run().await;
            "janitor"
        });

        let outcome = tokio::select! {
            () = self.shutdown.requested() => Ok(Some(Ended::Shutdown)),
            ended = consumers.join_next() => match ended {
                Some(Ok(ended)) => Ok(Some(ended)),
                Some(Err(_)) | None => Err(Error::TaskEnded("consumer")),
            },
            // Tasks end when they are told to; before that, it is a fault of ours.
            task = tasks.join_next() => Err(Error::TaskEnded(task.and_then(Result::ok).unwrap_or("unknown"))),
        };
        trigger.request();
        // With these the workers' commands end.
        consumers.shutdown().await;
        drop(held);
        let drained = tokio::time::timeout(DRAIN_DEADLINE, async { while tasks.join_next().await.is_some() {} }).await;
        if drained.is_err() {
            tracing::warn!("work at hand is abandoned; it is rolled back and done again by another executor");
        }
        tasks.shutdown().await;
        match tokio::time::timeout(Duration::from_secs(2), ownership::leave(&self.pool, &member)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::warn!(
                    error = chain(&error),
                    "partitions are not released; others wait for the heartbeat to grow old"
                )
            }
            Err(_) => tracing::warn!("partitions are not released in time; others wait for the heartbeat to grow old"),
        }
        outcome
    }

    /// Waits for the stream to be there and as it must be.
    async fn stream(&self) -> Option<async_nats::jetstream::stream::Stream> {
        let mut backoff = Backoff::dependency();
        loop {
            match nats::stream(&self.nats.jetstream, CHANGES_STREAM).await {
                Ok(stream) => {
                    self.health.set_ready("nats", true);
                    return Some(stream);
                }
                Err(error) => {
                    tracing::warn!(error = chain(&error), "cannot use the stream of changes yet");
                    self.health.set_ready("nats", false);
                }
            }
            tokio::select! {
                () = self.shutdown.requested() => return None,
                () = tokio::time::sleep(backoff.next()) => {}
            }
        }
    }
}
