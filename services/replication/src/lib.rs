//! From the write-ahead log to the outbound stream.
//!
//! One process at a time, the leader, reads the replication slot, assembles whole transactions in commit order, splits
//! them by scope and appends them to `MS_WAL` by compare-and-set; the others stand by. The slot is confirmed only up to
//! what the stream holds and says it holds. On any failure the session ends and starts over from the last message of
//! the stream, so that every transaction is there once, in order.
//!
//! - `abridge`: messages of the change stream that are too long to be held
//! - [`pgoutput`]: decoder of the change stream; `relation`: its tables mapped to the catalog
//! - [`assemble`]: messages from transactions; `chunks`: their buffers, order across scopes, bounded memory; `origin`: what
//!   they settle
//! - `moves`: which memberships a row change moves
//! - [`append`]: the end of the stream and how to append there
//! - `content`: values that change without a row in the log
//! - `left_out`: what no message can carry; `fault`: transactions that no session gets past
//! - `epoch`: whether the history goes on; `leader`, `wal`: lock, connection
//! - `reader` → queue → `publisher`: the two halves of a session, which run side by side; `watermark`: how far it reaches;
//!   `lag`: how far it is behind
//!
//! Public beside [`run`] is only what the fuzz targets feed.

mod abridge;
#[doc(hidden)]
pub mod append;
#[doc(hidden)]
pub mod assemble;
mod chunks;
mod content;
mod epoch;
mod error;
mod fault;
mod lag;
mod leader;
mod left_out;
mod lookup;
mod moves;
mod origin;
#[doc(hidden)]
pub mod pgoutput;
mod publisher;
mod reader;
mod relation;
mod session;
mod wait;
mod wal;
mod watermark;
mod witness;

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use millstream_catalog::Config;
use millstream_runtime::backoff::Backoff;
use millstream_runtime::error::chain;
use millstream_runtime::health::{self, Health};
use millstream_runtime::shutdown::Shutdown;
use millstream_runtime::{nats, postgres};

use crate::assemble::AssembleError;
pub use crate::error::Error;
use crate::fault::{Faults, TRIES};
use crate::lag::Gauges;
use crate::left_out::Report;
use crate::session::{SessionContext, part};
use crate::wal::Source;

/// Name of the service in connections and telemetry.
const SERVICE: &str = "replication";
/// Connections besides that of the leader lock and that of the change stream.
const POOL_CONNECTIONS: u32 = 2;
/// A session that ran so long was healthy: the next failure is a new one.
const HEALTHY: Duration = Duration::from_secs(30);
/// Most table shapes remembered that differ from the catalog.
const MAX_ACCEPTED_SHAPES: usize = 1024;

/// Flags of the replication service.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// The configuration file: tables, scopes and rules
    #[arg(long, env = "MILLSTREAM_CONFIG", default_value = "millstream.toml")]
    pub config: PathBuf,
    /// Postgres
    #[command(flatten)]
    pub postgres: postgres::Args,
    /// NATS
    #[command(flatten)]
    pub nats: nats::Args,
    /// Health checks
    #[command(flatten)]
    pub health: health::Args,
    /// Name of the replication slot; created when it is not there
    #[arg(long, env = "MILLSTREAM_SLOT", default_value = "millstream")]
    pub slot: String,
    /// Name of the publication; `millstream setup` makes it
    #[arg(long, env = "MILLSTREAM_PUBLICATION", default_value = "millstream")]
    pub publication: String,
}

/// Runs the service until shutdown.
///
/// # Errors
/// The configuration is wrong, NATS refuses us, or health checks cannot be served. Everything that can pass by itself
/// is retried for ever, with back-off.
pub async fn run(args: Args, shutdown: Shutdown) -> Result<(), Error> {
    let source = Source::new(&args.postgres.database_url, &args.slot, &args.publication)?;
    let wrong_url = |_| Error::Config("DATABASE_URL: not a connection URL".into());
    let options = postgres::options(&args.postgres, SERVICE).map_err(wrong_url)?;
    let pool = postgres::pool(&args.postgres, SERVICE, POOL_CONNECTIONS).map_err(wrong_url)?;
    // Read anew by every session; what is wrong from the start is said at once.
    Config::read(&args.config).map_err(Error::ConfigFile)?;
    let config = args.config;
    let health = Health::new();
    for part in [part::POSTGRES, part::NATS, part::LEADER] {
        health.set_ready(part, false);
    }
    health::serve(args.health.listen, health.router(), shutdown.clone()).await.map_err(Error::Health)?;
    let nats = tokio::select! {
        () = shutdown.requested() => return Ok(()),
        nats = nats::connect(&args.nats, SERVICE) => nats?,
    };
    let (slot, publication, gauges) = (args.slot, args.publication, Gauges::register());
    let shared = SessionContext {
        report: Report::register(health.clone()),
        pass_over: AtomicBool::new(false),
        wal_gone: AtomicBool::new(false),
        config,
        nats,
        pool,
        options,
        source,
        slot,
        publication,
        health,
        gauges,
    };
    let mut backoff = Backoff::dependency();
    let mut faults = Faults::default();
    let mut without_wal = 0;
    let mut accepted = HashSet::new();
    loop {
        let started = Instant::now();
        let error = tokio::select! {
            () = shutdown.requested() => return Ok(()),
            ended = session::run(&shared, &accepted, &faults) => match ended {
                Err(error) => error,
                Ok(never) => match never {},
            },
        };
        unready(&shared.health, error.cause());
        if matches!(error.cause(), Error::SchemaChanged) {
            tracing::info!("the synced tables have changed; starting over with a new catalog");
            continue;
        }
        if let Error::Assemble(AssembleError::SchemaChanged { table, shape }) = error.cause() {
            // The next session reads the catalog again. If the table still differs from it, it does so on purpose, or
            // the change stream has not come to the change yet.
            tracing::info!(table.name = table, "a synced table has changed; starting over with a new catalog");
            if accepted.len() >= MAX_ACCEPTED_SHAPES {
                accepted.clear();
            }
            accepted.insert(*shape);
            continue;
        }
        if started.elapsed() >= HEALTHY {
            backoff.reset();
        }
        without_wal = if fault::is_wal_gone(error.cause()) { without_wal + 1 } else { 0 };
        if without_wal >= fault::TRIES {
            tracing::error!(
                error = chain(&error),
                tries = without_wal,
                "the write-ahead log is gone that the replication slot needs: another slot is made, and a new epoch begins"
            );
            shared.wal_gone.store(true, Ordering::Relaxed);
            without_wal = 0;
        }
        if faults.failed(&error)
            && let Some(place) = error.place()
        {
            tracing::error!(
                wal.lsn = %place.lsn, wal.xid = place.xid, table.name = place.table, error = chain(&error), tries = TRIES,
                "a transaction cannot be carried: a new epoch begins behind it, and clients start over"
            );
            shared.pass_over.store(true, Ordering::Relaxed);
        }
        let delay = backoff.next();
        tracing::warn!(
            error = chain(&error),
            retry.after_ms = delay.as_millis() as u64,
            "the session ended; starting over"
        );
        tokio::select! {
            () = shutdown.requested() => return Ok(()),
            () = tokio::time::sleep(delay) => {}
        }
    }
}

/// Marks the part that failed; leadership is gone in any case.
fn unready(health: &Health, error: &Error) {
    health.set_ready(part::LEADER, false);
    match error {
        error if fault::is_of_broker(error) => health.set_ready(part::NATS, false),
        Error::Postgres { .. }
        | Error::Lookup { .. }
        | Error::Wal { .. }
        | Error::Server { .. }
        | Error::NoTls
        | Error::Tls(_)
        | Error::WalEnded
        | Error::WalSilent(_)
        | Error::LeaderLost => health.set_ready(part::POSTGRES, false),
        _ => {}
    }
}
