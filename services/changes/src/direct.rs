//! Executes batches without a broker; for benches and tests. What it runs is the worker that serves the stream, with
//! its own policy on failures: only where submissions come from and verdicts go to is different.

use std::path::PathBuf;
use std::sync::Arc;

use millstream_runtime::health::Health;
use millstream_runtime::postgres;
use millstream_runtime::shutdown::{Shutdown, Trigger};
use millstream_schemas::stream::{Submission, TransactionResult};
use sqlx::Connection;
use sqlx::postgres::PgConnectOptions;
use tokio::sync::{mpsc, watch};
use uuid::Uuid;

use crate::item::{Item, Owned};
use crate::sql::model::ConfigFile;
use crate::transaction::executor::Executor;
use crate::worker::external::External;
use crate::worker::{Lost, Worker, WorkerContext};

/// Its partition, of an incarnation that is its own.
const PARTITION: u16 = 0;

/// Why it cannot execute.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DirectError {
    /// Postgres cannot be reached, or has no schema `millstream`.
    #[error("cannot make a partition in Postgres")]
    Partition(#[source] sqlx::Error),
    /// Somebody raised the partition's term.
    #[error("the partition was taken over")]
    Lost,
}

/// An executor with a partition of its own. Several can work side by side.
pub struct Direct {
    worker: Worker,
    lost: mpsc::Receiver<Lost>,
    sequence: u64,
    /// While it lives, nobody asks the worker to stop.
    _shutdown: Trigger,
}

impl Direct {
    /// Connects, with the synced tables of the file `config`. The role needs the executor's rights.
    ///
    /// # Errors
    /// See [`DirectError::Partition`].
    pub async fn connect(options: PgConnectOptions, config: PathBuf) -> Result<Direct, DirectError> {
        let incarnation = format!("direct-{}", Uuid::new_v4().simple());
        let made = async {
            let mut connection = postgres::connect(&options).await?;
            sqlx::query("INSERT INTO millstream.partitions (stream_epoch, partition, epoch) VALUES ($1, $2, 1)")
                .bind(&incarnation)
                .bind(PARTITION as i16)
                .execute(&mut connection)
                .await?;
            connection.close().await
        };
        made.await.map_err(DirectError::Partition)?;
        let (trigger, shutdown) = Shutdown::manual();
        let (lost_sender, lost) = mpsc::channel(1);
        let health = Health::new();
        let external = Arc::new(External::nobody(health.clone()));
        let source = Arc::new(ConfigFile::new(config, health.clone()));
        let shared = WorkerContext {
            nats: None,
            stream: None,
            external,
            lost: lost_sender,
            health,
            parked: Default::default(),
            shutdown,
        };
        // Nobody tells of changes: the executor finds out when something depends on them.
        let (_, changed) = watch::channel(());
        let executor = Executor::new(options, source, changed, incarnation);
        let (_, commands) = mpsc::channel(1);
        let mut worker = Worker::new(0, executor, commands, shared);
        worker.own(PARTITION, Owned { term: 1, position: 0 });
        Ok(Direct { worker, lost, sequence: 0, _shutdown: trigger })
    }

    /// Executes submissions as if each had come as a message of its own, until all are settled; `isolated`: each in a
    /// Postgres transaction of its own, one after the other. Gives a result for each that was taken now or before, in
    /// the order in which they were reached; none for those that the ledger's rule skips.
    ///
    /// # Errors
    /// See [`DirectError::Lost`]. Faults of Postgres are waited for.
    pub async fn execute(
        &mut self,
        submissions: Vec<Submission>,
        isolated: bool,
    ) -> Result<Vec<(Uuid, TransactionResult)>, DirectError> {
        let items: Vec<Item> = submissions
            .into_iter()
            .flat_map(|submission| {
                self.sequence += 1;
                Item::of_message(PARTITION, self.sequence, vec![submission], None)
            })
            .collect();
        let mut results = Vec::new();
        self.worker.settle(items, isolated, |batch| results.extend(batch)).await;
        match self.lost.try_recv() {
            Ok(_) => Err(DirectError::Lost),
            Err(_) => Ok(results),
        }
    }
}
