//! Housekeeping. Of the stream: idle partitions are moved on, and what every partition has behind it is purged. Of the
//! database: what is older than its `retention` is forgotten.

use std::time::Duration;

use async_nats::jetstream::stream::{LastRawMessageErrorKind, Stream};
use millstream_runtime::error::chain;
use millstream_runtime::shutdown::Shutdown;
use millstream_schemas::subject::{PARTITIONS, changes};
use sqlx::{PgPool, Row};
use tokio::sync::{mpsc, watch};

use crate::partitions::consumer::{Idle, worker_of};
use crate::partitions::ownership::Assignment;
use crate::partitions::retention::Retention;

/// Time between rounds.
const PERIOD: Duration = Duration::from_secs(30);

/// Why a round was given up; the next one tries again.
#[derive(Debug, thiserror::Error)]
enum JanitorError {
    #[error("cannot read positions")]
    Positions(#[source] sqlx::Error),
    #[error("cannot ask for the stream")]
    Info(#[source] async_nats::jetstream::stream::InfoError),
    #[error("cannot read a partition's last message")]
    Last(#[source] async_nats::jetstream::stream::LastRawMessageError),
    #[error("cannot purge")]
    Purge(#[source] async_nats::jetstream::stream::PurgeError),
}

pub(crate) struct Janitor {
    pub pool: PgPool,
    pub retention: Retention,
    pub stream: Stream,
    pub incarnation: String,
    pub assignment: watch::Receiver<Assignment>,
    /// One a worker's cursor.
    pub idle: Vec<mpsc::Sender<Idle>>,
    pub shutdown: Shutdown,
}

impl Janitor {
    /// Runs until shutdown.
    pub async fn run(mut self) {
        let mut rounds = tokio::time::interval_at(tokio::time::Instant::now() + PERIOD, PERIOD);
        rounds.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = self.shutdown.requested() => return,
                () = tokio::time::sleep_until(self.retention.due()) => {
                    let shutdown = self.shutdown.clone();
                    tokio::select! {
                        () = shutdown.requested() => return,
                        () = self.retention.round() => continue,
                    }
                }
                _ = rounds.tick() => {}
            }
            tokio::select! {
                () = self.shutdown.requested() => return,
                outcome = self.round() => if let Err(error) = outcome {
                    tracing::warn!(error = chain(&error), "housekeeping is put off");
                },
            }
        }
    }

    async fn round(&self) -> Result<(), JanitorError> {
        // In this order: what the stream holds, then how far partitions are. Messages published meanwhile lie behind `last`.
        let info = self.stream.get_info().await.map_err(JanitorError::Info)?;
        if crate::partitions::consumer::incarnation_of(&info) != self.incarnation {
            return Ok(());
        }
        let (first, last) = (info.state.first_sequence, info.state.last_sequence);
        let positions = self.positions().await?;
        let owned = self.assignment.borrow().owned.clone();
        for &(partition, position) in positions.iter().filter(|(p, position)| owned.contains_key(p) && *position < last)
        {
            // An idle partition's position would stay behind for ever, and nothing could be purged.
            if self.last_of(partition).await? <= position {
                // A cursor that waits for its worker hears of it in a later round.
                let _ = self.idle[worker_of(partition, self.idle.len())].try_send(Idle { partition, sequence: last });
            }
        }
        let behind = positions.iter().map(|(_, position)| *position).min().unwrap_or(0);
        if positions.len() == usize::from(PARTITIONS) && behind >= first && behind <= last {
            let purged = self.stream.purge().sequence(behind + 1).await.map_err(JanitorError::Purge)?;
            tracing::debug!(messages = purged.purged, up_to = behind, "purged what is executed");
        }
        Ok(())
    }

    async fn positions(&self) -> Result<Vec<(u16, u64)>, JanitorError> {
        let rows = sqlx::query("SELECT partition, position FROM millstream.partitions WHERE stream_epoch = $1")
            .bind(&self.incarnation)
            .fetch_all(&self.pool)
            .await
            .map_err(JanitorError::Positions)?;
        let position = |row: &sqlx::postgres::PgRow| {
            Ok((row.try_get::<i16, _>("partition")? as u16, row.try_get::<i64, _>("position")? as u64))
        };
        rows.iter().map(position).collect::<Result<_, _>>().map_err(JanitorError::Positions)
    }

    /// Sequence of the partition's last message, asked of the stream's leader; 0 for none.
    async fn last_of(&self, partition: u16) -> Result<u64, JanitorError> {
        match self.stream.get_last_raw_message_by_subject(&changes(partition)).await {
            Ok(message) => Ok(message.sequence),
            Err(error) if matches!(error.kind(), LastRawMessageErrorKind::NoMessageFound) => Ok(0),
            Err(error) => Err(JanitorError::Last(error)),
        }
    }
}
