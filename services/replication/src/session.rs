//! One session: become leader, find out where the stream ends, and stream from there until something fails.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use millstream_catalog::{Catalog, Config, Holders, Shape, layout, misfits, publication_problems};
use millstream_runtime::error::chain;
use millstream_runtime::health::Health;
use millstream_runtime::nats::{self, Nats};
use millstream_runtime::postgres;
use millstream_schemas::Lsn;
use millstream_schemas::stream::{MIN_PAYLOAD_BYTES, Watermark};
use millstream_schemas::subject::WAL_STREAM;
use sqlx::postgres::PgConnectOptions;
use sqlx::{PgConnection, PgPool};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::append::{self, Appender, Tail, mark};
use crate::assemble::Limits;
use crate::content::{self, Content};
use crate::error::Error;
use crate::fault::Faults;
use crate::lag::Gauges;
use crate::leader::Leader;
use crate::left_out::Report;
use crate::publisher::Publisher;
use crate::reader::{QUEUE_MESSAGES, Reached, Reader};
use crate::wal::{Source, Wal};
use crate::witness::Witness;
use crate::{epoch, lag, watermark};

/// How often it is looked whether synced tables have changed that nobody writes to.
const LOOK: Duration = Duration::from_secs(2);

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
pub struct SessionContext {
    /// `millstream.toml`.
    pub config: PathBuf,
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
    /// Metrics.
    pub gauges: Gauges,
    /// What is passed over.
    pub report: Report,
    /// The next session begins a new epoch: behind a transaction that cannot be carried.
    pub pass_over: AtomicBool,
    /// The next session makes another slot, and a new epoch with it: the write-ahead log that this one needs is gone.
    pub wal_gone: AtomicBool,
}

/// Where a session starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Start {
    /// Commit LSN of the last transaction that the stream holds whole.
    through: Lsn,
    /// The stream holds everything before this LSN.
    held: Lsn,
}

impl Start {
    /// Behind the last message of a history that goes on.
    fn behind(tail: &Tail) -> Start {
        if tail.last {
            Start { through: tail.lsn, held: tail.end_lsn }
        } else {
            // That transaction was cut: it is sent anew, from its first message.
            Start { through: tail.previous, held: Lsn(tail.previous.0 + 1) }
        }
    }
}

/// Runs one session; returns when it has failed. `faults` say what those before it failed at.
pub async fn run(shared: &SessionContext, accepted: &HashSet<u64>, faults: &Faults) -> Result<Infallible, Error> {
    let health = &shared.health;
    let stream = nats::stream(&shared.nats.jetstream, WAL_STREAM).await?;
    let max_payload = shared.nats.client.max_payload();
    if max_payload < MIN_PAYLOAD_BYTES {
        return Err(Error::Payload(max_payload));
    }
    // A broker whose disk is full still answers.
    let broker_is_back = || health.set_ready(part::NATS, true);
    if !faults.broker {
        broker_is_back();
    }
    let waiting = || {
        tracing::info!(slot = shared.slot, "standing by: another process is leader");
        broker_is_back();
        health.set_ready(part::POSTGRES, true);
        health.set_ready(part::LEADER, true);
    };
    let mut leader = Leader::wait(&shared.options, &shared.slot, waiting).await?;
    // It was ready as a standby.
    health.set_ready(part::LEADER, false);
    health.set_ready(part::POSTGRES, true);
    let connection = leader.connection();
    postgres::ask(connection, "leader lock", &shared.options)
        .await
        .map_err(Error::postgres("ask for its encryption"))?;
    let (catalog, shapes, found) = read_tables(connection, &shared.config, &shared.publication, &shared.report).await?;
    let kept = content::kept(connection).await?;

    // From here on, whoever was leader before is fenced: its next append conflicts with our first, or ours with its.
    let (sequence, tail) = append::read_end(&stream).await?;
    let source = epoch::read_source(connection, &shared.slot).await?;
    epoch::is_ours(&shared.slot, &source)?;
    let nats = &shared.nats;
    let appender =
        |epoch, previous, landmark| Appender::new(nats.clone(), epoch, &catalog.version, sequence, previous, landmark);
    let verdict = if shared.pass_over.load(Ordering::Relaxed) {
        Err(epoch::Reason::Uncarriable)
    } else if shared.wal_gone.load(Ordering::Relaxed) {
        Err(epoch::Reason::WalGone)
    } else {
        epoch::verdict(&shared.slot, &source, tail.as_ref())
    };
    let mut again = BTreeMap::new();
    let (start, witness, appender) = match (verdict, tail) {
        (Ok(()), Some(tail)) => {
            let start = Start::behind(&tail);
            epoch::release(connection, &shared.slot).await?;
            let epoch = if layout(&tail.schema) == layout(&catalog.version) {
                again = kept.as_ref().map(|kept| found.changed(kept)).unwrap_or_default();
                tail.epoch
            } else {
                let epoch = epoch::renew(connection).await?;
                tracing::warn!(%epoch, "a new epoch of the outbound stream begins: the synced tables have changed");
                epoch
            };
            let previous = if epoch == tail.epoch { start.through } else { Lsn::ZERO };
            let mut appender = appender(epoch, previous, tail.landmark);
            let confirmed = source.slot.as_ref().map_or(Lsn::ZERO, |slot| slot.confirmed);
            if (faults.broker || tail.schema != catalog.version) && tail.last {
                // Edges learn of a new schema from the stream; behind a transaction that was cut, from its rest.
                appender.append(&[mark(start.held)]).await?;
            }
            (start, Witness::new(tail.landmark, confirmed), appender)
        }
        (verdict, _) => {
            let reason = verdict.err().unwrap_or(epoch::Reason::EmptyStream);
            let wait = epoch::Wait::new(shared.pool.clone(), health.clone());
            let (epoch, begins) = epoch::begin(connection, &shared.slot, &source.system_identifier, &wait).await?;
            shared.wal_gone.store(false, Ordering::Relaxed);
            match (reason, &source.row) {
                (epoch::Reason::EmptyStream, None) => {
                    tracing::info!(%epoch, wal.lsn = %begins, "the first epoch of the outbound stream begins");
                }
                _ => {
                    let reason = reason.as_str();
                    tracing::warn!(%epoch, reason, wal.lsn = %begins, "a new epoch of the outbound stream begins");
                }
            }
            let mut appender = appender(epoch, Lsn::ZERO, None);
            let first = mark(begins);
            let through = first.lsn;
            appender.append(&[first]).await?;
            if shared.pass_over.swap(false, Ordering::Relaxed) {
                shared.report.epoch();
            }
            (Start { through, held: begins }, Witness::default(), appender)
        }
    };
    for (table, how) in &again {
        tracing::warn!(
            table.name = table,
            how,
            "rows have changed without the write-ahead log saying so: they are sent again"
        );
    }
    if !again.is_empty() || kept.as_ref() != Some(&found.content) {
        content::keep(connection, &found.content, &again.into_keys().collect()).await?;
    }
    let wal = Wal::start(&shared.source).await?;
    tracing::info!(
        epoch = %appender.epoch(), stream.seq = appender.sequence(), wal.lsn = %start.held, slot = shared.slot,
        "leader: replicating"
    );
    let (queue, queued) = mpsc::channel(QUEUE_MESSAGES);
    let (reached, reached_seen) = watch::channel(Reached::default());
    let (confirmed, confirmed_seen) = watch::channel(Lsn::ZERO);
    let first = Watermark { epoch: appender.epoch(), lsn: start.held, stream_seq: appender.sequence() };
    let (marked, marked_seen) = watch::channel(first);
    let reader = Reader::new(
        wal,
        catalog.tables.into(),
        shapes.into(),
        start.through,
        witness,
        accepted.clone(),
        Limits::of(max_payload),
        shared.report.clone(),
        shared.pool.clone(),
        queue,
        confirmed_seen,
        reached,
    );
    let version = catalog.version;
    let publisher = Publisher::new(appender, start.held, queued, reached_seen, confirmed, marked);
    // Dropping the set, also when this future is dropped, ends all of them.
    let mut tasks = JoinSet::new();
    tasks.spawn(reader.run());
    tasks.spawn(publisher.run());
    let look = Look {
        config: shared.config.clone(),
        publication: shared.publication.clone(),
        pool: shared.pool.clone(),
        report: shared.report.clone(),
    };
    tasks.spawn(look.watch(version, found.content));
    tasks.spawn(lag::measure(shared.gauges.clone(), shared.pool.clone(), shared.slot.clone(), marked_seen.clone()));
    tasks.spawn(get_ready(shared.health.clone(), faults.stuck, marked_seen.clone()));
    tasks.spawn(watermark::answer(nats.client.clone(), shared.pool.clone(), marked_seen));
    tasks.spawn(async move { Err(leader.hold().await) });
    let ended = match tasks.join_next().await {
        Some(Ok(ended)) => ended,
        Some(Err(_)) | None => Err(Error::PartEnded),
    };
    if let Err(error) = &ended
        && let Error::HistoryDiffers(_) = error.cause()
    {
        // The stream's epoch is now another than the database's: the next session begins a new one.
        let mut connection = shared.pool.acquire().await.map_err(Error::postgres("connect"))?;
        epoch::renew(&mut connection).await?;
    }
    ended
}

/// Says that the leader does its work: once the stream holds the transaction that sessions before this one failed at.
async fn get_ready(
    health: Health,
    stuck: Option<Lsn>,
    mut marked: watch::Receiver<Watermark>,
) -> Result<Infallible, Error> {
    let passed = |watermark: &Watermark| stuck.is_none_or(|stuck| watermark.lsn > stuck);
    marked.wait_for(passed).await.map_err(|_| Error::PartEnded)?;
    health.set_ready(part::NATS, true);
    health.set_ready(part::LEADER, true);
    std::future::pending().await
}

/// Reads the synced tables, and what holds their rows. Reports tables that do not fit.
async fn read_tables(
    connection: &mut PgConnection,
    config: &Path,
    publication: &str,
    report: &Report,
) -> Result<(Catalog, Vec<Shape>, content::Contents), Error> {
    let config = Config::read(config).map_err(Error::ConfigFile)?;
    let catalog = Catalog::load(connection, &config, Some(publication)).await.map_err(Error::Catalog)?;
    report.aside(&catalog);
    check(connection, &catalog, publication).await?;
    let holders = Holders::read_all(connection, &catalog).await?;
    let tables = || catalog.tables.iter().zip(&holders);
    for misfit in tables().flat_map(|(table, holders)| misfits(table, holders)) {
        report.misfit(&misfit);
    }
    let shapes: Vec<Shape> = tables().map(|(table, holders)| holders.shape(table)).collect();
    let found = content::read(connection, &catalog, &shapes).await?;
    Ok((catalog, shapes, found))
}

/// Refuses what nothing can be replicated with. What concerns one table is told by [`Report::misfit`], and stops no other.
async fn check(connection: &mut PgConnection, catalog: &Catalog, publication: &str) -> Result<(), Error> {
    let encoding: String = sqlx::query_scalar("SELECT current_setting('server_encoding')")
        .fetch_one(&mut *connection)
        .await
        .map_err(Error::postgres("read the database's encoding"))?;
    if encoding == "SQL_ASCII" {
        return Err(Error::Encoding);
    }
    let problems = publication_problems(connection, catalog, publication).await?;
    if problems.is_empty() { Ok(()) } else { Err(Error::Tables(problems.join("\n"))) }
}

/// What is looked at now and then.
struct Look {
    config: PathBuf,
    publication: String,
    pool: PgPool,
    report: Report,
}

impl Look {
    /// Looks whether the synced tables, what is said of them, or what they consist of have changed; ends the session then.
    async fn watch(self, version: String, mut content: Content) -> Result<Infallible, Error> {
        let mut told = None;
        loop {
            tokio::time::sleep(LOOK).await;
            match self.look().await {
                Ok((found, consists)) if found == version && consists.content == content => told = None,
                // A table was emptied, or its rows were moved: what is read of it is read as before.
                Ok((found, consists)) if found == version && consists.reads_as(&content) => {
                    match self.keep(&consists.content).await {
                        Ok(()) => content = consists.content,
                        Err(error) => {
                            tracing::warn!(error = chain(&error), "cannot keep what synced tables consist of")
                        }
                    }
                }
                Ok(_) => return Err(Error::SchemaChanged),
                // What goes on under the old catalog goes on.
                Err(error) => {
                    let text = chain(&error);
                    if told.as_ref() != Some(&text) {
                        tracing::warn!(error = text, "cannot look whether synced tables have changed");
                        told = Some(text);
                    }
                }
            }
        }
    }

    async fn keep(&self, content: &Content) -> Result<(), Error> {
        let mut connection = self.pool.acquire().await.map_err(Error::postgres("connect"))?;
        content::keep(&mut connection, content, &BTreeSet::new()).await
    }

    async fn look(&self) -> Result<(String, content::Contents), Error> {
        let mut connection = self.pool.acquire().await.map_err(Error::postgres("connect"))?;
        let (catalog, _, found) = read_tables(&mut connection, &self.config, &self.publication, &self.report).await?;
        Ok((catalog.version, found))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cut_transactions_are_sent_anew() {
        let mut tail = Tail {
            epoch: uuid::Uuid::nil(),
            lsn: Lsn(50),
            end_lsn: Lsn(60),
            previous: Lsn(40),
            last: true,
            schema: String::new(),
            landmark: None,
        };
        assert_eq!(Start::behind(&tail), Start { through: Lsn(50), held: Lsn(60) });
        tail.last = false;
        assert_eq!(Start::behind(&tail), Start { through: Lsn(40), held: Lsn(41) });
    }
}
