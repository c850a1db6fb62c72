//! One session: become leader, find out where the stream ends, and stream from there until something fails.

use std::collections::HashSet;
use std::convert::Infallible;
use std::sync::Arc;

use millstream_catalog::{Catalog, Config};
use millstream_runtime::health::Health;
use millstream_runtime::nats::{self, Nats};
use millstream_schemas::Lsn;
use millstream_schemas::stream::Watermark;
use millstream_schemas::subject::WAL_STREAM;
use sqlx::PgPool;
use sqlx::postgres::PgConnectOptions;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::append::{self, Appender, Tail};
use crate::error::Error;
use crate::leader::Leader;
use crate::publisher::{Publisher, mark};
use crate::reader::{QUEUE_MESSAGES, Reached, Reader};
use crate::wal::Source;
use crate::{epoch, identity, watermark};

/// Names of the parts in the health report.
pub mod part {
    /// The connection to Postgres.
    pub const POSTGRES: &str = "postgres";
    /// The broker.
    pub const NATS: &str = "nats";
    /// Leader, or standby that waits for the leader to go.
    pub const LEADER: &str = "leader";
}

/// What every session needs.
pub struct Shared {
    /// `millstream.toml`.
    pub config: Config,
    /// The broker.
    pub nats: Nats,
    /// Ordinary connections.
    pub pool: PgPool,
    /// How to make one.
    pub options: PgConnectOptions,
    /// The replication connection.
    pub source: Source,
    /// Name of the slot.
    pub slot: String,
    /// Name of the publication.
    pub publication: String,
    /// Health report.
    pub health: Health,
}

/// Where a session starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Start {
    /// Commit LSN of the last transaction that the stream holds whole.
    through: Lsn,
    /// The stream holds everything before this LSN.
    held: Lsn,
    /// Where the change stream is to start; zero for where the slot stands.
    wal: Lsn,
}

impl Start {
    /// Behind the last message of a history that goes on.
    fn behind(tail: &Tail) -> Start {
        if tail.last {
            Start { through: tail.lsn, held: tail.end_lsn, wal: tail.end_lsn }
        } else {
            // That transaction was cut: it is sent anew, from its first message.
            Start { through: tail.previous, held: Lsn(tail.previous.0 + 1), wal: Lsn::ZERO }
        }
    }
}

/// Runs one session; returns when it has failed.
pub async fn run(shared: &Shared, accepted: &HashSet<u64>) -> Result<Infallible, Error> {
    let health = &shared.health;
    let stream = nats::stream(&shared.nats.jetstream, WAL_STREAM).await?;
    health.set_ready(part::NATS, true);
    let waiting = || {
        tracing::info!(slot = shared.slot, "standing by: another process is leader");
        health.set_ready(part::POSTGRES, true);
        health.set_ready(part::LEADER, true);
    };
    let mut leader = Leader::wait(&shared.options, &shared.slot, waiting).await?;
    health.set_ready(part::POSTGRES, true);
    let connection = leader.connection();
    let catalog = Catalog::load(connection, &shared.config).await.map_err(Error::Catalog)?;
    identity::check(connection, &catalog, &shared.publication).await?;

    // From here on, whoever was leader before is fenced: its next append conflicts with our first, or ours with its.
    let (sequence, tail) = append::read_end(&stream).await?;
    let source = epoch::read_source(connection, &shared.slot).await?;
    let nats = &shared.nats;
    let appender = |epoch, previous| Appender::new(nats.clone(), epoch, &catalog.version, sequence, previous);
    let (start, appender) = match (epoch::verdict(&shared.slot, &source, tail.as_ref()), tail) {
        (Ok(()), Some(tail)) => {
            let start = Start::behind(&tail);
            epoch::release(connection, &shared.slot).await?;
            (start, appender(tail.epoch, start.through))
        }
        (verdict, _) => {
            let reason = verdict.err().unwrap_or(epoch::Reason::EmptyStream);
            let (epoch, begins) = epoch::begin(connection, &shared.slot, &source.system_identifier).await?;
            tracing::warn!(%epoch, reason = reason.as_str(), wal.lsn = %begins, "a new epoch of the outbound stream begins");
            let mut appender = appender(epoch, Lsn::ZERO);
            let first = mark(begins);
            let through = first.lsn;
            appender.append(&[first]).await?;
            (Start { through, held: begins, wal: begins }, appender)
        }
    };
    let wal = shared.source.start(start.wal).await?;
    tracing::info!(
        epoch = %appender.epoch(), stream.seq = appender.sequence(), wal.lsn = %start.held, slot = shared.slot,
        "leader: replicating"
    );
    health.set_ready(part::LEADER, true);

    let (queue, queued) = mpsc::channel(QUEUE_MESSAGES);
    let (reached, reached_seen) = watch::channel(Reached::default());
    let (confirmed, confirmed_seen) = watch::channel(Lsn::ZERO);
    let first = Watermark { epoch: appender.epoch(), lsn: start.held, seq: appender.sequence() };
    let (marked, marked_seen) = watch::channel(first);
    let reader = Reader::new(
        wal,
        Arc::from(catalog.tables),
        start.through,
        accepted.clone(),
        shared.pool.clone(),
        queue,
        confirmed_seen,
        reached,
    );
    let publisher = Publisher::new(appender, start.held, queued, reached_seen, confirmed, marked);
    // Dropping the set, also when this future is dropped, ends all of them.
    let mut tasks = JoinSet::new();
    tasks.spawn(reader.run());
    tasks.spawn(publisher.run());
    tasks.spawn(watermark::answer(nats.client.clone(), shared.pool.clone(), marked_seen));
    tasks.spawn(async move { Err(leader.hold().await) });
    match tasks.join_next().await {
        Some(Ok(ended)) => ended,
        Some(Err(_)) | None => Err(Error::PartEnded),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cut_transactions_are_sent_anew() {
        let mut tail = Tail { epoch: uuid::Uuid::nil(), lsn: Lsn(50), end_lsn: Lsn(60), previous: Lsn(40), last: true };
        assert_eq!(Start::behind(&tail), Start { through: Lsn(50), held: Lsn(60), wal: Lsn(60) });
        tail.last = false;
        assert_eq!(Start::behind(&tail), Start { through: Lsn(40), held: Lsn(41), wal: Lsn::ZERO });
    }
}
