//! The edge: the WebSocket service. It holds no truth; any edge can serve any client.
//!
//! - `session`: one socket, from `hello` to its end: the shell; `edge`: what all sessions share
//! - `downlink`: which messages of the outbound stream a client gets, and when they take effect (pure)
//! - `authorize`: who may read what
//! - `hub`, `tail`: one own tail of the stream, a ring of recent messages, and who is woken by which
//! - `catalogs`: the synced tables, read anew when they have changed
//! - `catchup`: older messages of single scopes
//! - `snapshot`, `ledger`, `copy`, `fence`: what is read from Postgres, and how it joins the stream exactly
//! - `shared`, `moment`: snapshots of clients that start together; `resume`: those that were cut
//! - `history`, `reach`: which claims of a client on the past hold
//! - `shares`: what one user may take of the edge; `spool`: rows that slow clients have not taken yet
//! - `watermark`: how far replication has published, on a quiet database
//! - `lane`: submissions to the broker, in order
//! - `token`: who the user is; `evictions`: whose sessions were ended

mod authorize;
mod catalogs;
mod catchup;
mod copy;
mod downlink;
#[cfg(test)]
mod downlink_tests;
mod edge;
mod evictions;
mod fence;
mod history;
mod hub;
mod lane;
mod ledger;
mod message;
mod moment;
mod reach;
mod resume;
mod session;
mod shared;
mod shares;
mod snapshot;
mod spool;
mod tail;
mod token;
mod unwritable;
mod watermark;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use futures_util::StreamExt;
use millstream_runtime::health::{self, Health};
use millstream_runtime::nats::{self, Nats};
use millstream_runtime::postgres;
use millstream_runtime::shutdown::Shutdown;
use millstream_schemas::stream::{ResultsMessage, row_limit};
use millstream_schemas::subject::RESULTS_SUBJECTS;
use tokio::sync::Semaphore;
use uuid::Uuid;

use crate::edge::Edge;
pub use crate::token::MIN_SECRET_BYTES;

// What a session reads and sends, without sockets, databases and brokers, for the simulation in `tests` and for `fuzz`: they run
// this, not a copy of it.
#[doc(hidden)]
pub mod for_simulation;

/// Connections to Postgres: sessions that open, and snapshots.
/// More than snapshots and shared reads take together, so that sessions without one still open.
const POSTGRES_CONNECTIONS: u32 = 20;
/// Scopes that are read at once for several sessions: not behind those, whose clients may be slow.
const SHARED_READS: usize = 4;
/// Requests of catch-ups at once: hundreds of direct gets at a time make the broker time out.
const CATCH_UPS: usize = 16;
/// How long sessions get to say goodbye.
const DRAIN: Duration = Duration::from_secs(3);

/// What the edge is told at start.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Address of the WebSocket, and of /livez and /readyz
    #[arg(long, env = "MILLSTREAM_EDGE_LISTEN", default_value = "127.0.0.1:4800")]
    pub listen: SocketAddr,
    /// The declaration of what is synced
    #[arg(long, env = "MILLSTREAM_CONFIG", default_value = "millstream.toml")]
    pub config: PathBuf,
    /// Name of the publication; a table that it lacks is set aside
    #[arg(long, env = "MILLSTREAM_PUBLICATION", default_value = "millstream")]
    pub publication: String,
    /// File with the secret that session tokens are signed with (HS256, at least 32 bytes);
    /// MILLSTREAM_TOKEN_SECRET may hold the secret itself
    #[arg(long, env = "MILLSTREAM_TOKEN_SECRET_FILE")]
    pub token_secret_file: Option<PathBuf>,
    /// Longest time in seconds for which the rows of a snapshot are sent to one client at a stretch: a slower one gets the
    /// rest over a new connection
    #[arg(long, env = "MILLSTREAM_SNAPSHOT_SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..))]
    pub snapshot_seconds: u64,
    /// Folder for the rows that slow clients have not taken yet; by default the one for temporary files
    #[arg(long, env = "MILLSTREAM_SPOOL_DIR")]
    pub spool_dir: Option<PathBuf>,
    /// Most sessions of one user on this edge
    #[arg(long, env = "MILLSTREAM_SESSIONS_PER_USER", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    pub sessions_per_user: u32,
    /// Most connections that one user opens at once on this edge; a sixteenth of it more each second
    #[arg(long, env = "MILLSTREAM_CONNECTIONS_PER_USER", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    pub connections_per_user: u32,
    /// Most sockets of one address that have not shown a token yet; all clients behind a proxy share its address
    #[arg(long, env = "MILLSTREAM_STRANGERS_PER_ADDRESS", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    pub strangers_per_address: u32,
    /// The broker
    #[command(flatten)]
    pub nats: nats::Args,
    /// The database
    #[command(flatten)]
    pub postgres: postgres::Args,
}

/// Why the edge cannot run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The secret for tokens is missing or too short.
    #[error("{0}")]
    Secret(String),
    /// The configuration, or the tables that it names.
    #[error(transparent)]
    Catalog(#[from] catalogs::LoadError),
    /// The database URL is malformed.
    #[error("DATABASE_URL cannot be used")]
    Database(#[source] sqlx::Error),
    /// See [`nats::Error`].
    #[error(transparent)]
    Nats(#[from] nats::Error),
    /// The address is taken.
    #[error("cannot listen on {listen}")]
    Listen {
        /// The address.
        listen: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
}

/// Runs until shutdown.
///
/// # Errors
/// The configuration cannot be used, or the broker refuses us. Faults that may pass are waited for.
pub async fn run(args: Args, shutdown: Shutdown) -> Result<(), Error> {
    let secret = secret(&args)?;
    let health = Health::new();
    health.set_ready("catalog", false);
    health.set_ready("stream", false);
    let pool = postgres::pool(&args.postgres, "edge", POSTGRES_CONNECTIONS).map_err(Error::Database)?;
    let nats = tokio::select! {
        nats = nats::connect(&args.nats, "edge") => nats?,
        () = shutdown.requested() => return Ok(()),
    };
    let Some(catalogs) =
        catalogs::Catalogs::start(args.config.clone(), args.publication.clone(), pool.clone(), &health, &shutdown)
            .await?
    else {
        return Ok(());
    };
    let catalogs = Arc::new(catalogs);
    health.set_ready("catalog", true);

    let hub = Arc::new(hub::Hub::default());
    let watermarks = watermark::Watermarks::default();
    tokio::spawn(tail::run(nats.clone(), hub.clone(), health.clone(), shutdown.clone()));
    tokio::spawn(watermarks.clone().run(nats.clone(), shutdown.clone()));
    tokio::spawn(results(nats.clone(), hub.clone(), shutdown.clone()));
    tokio::spawn(catalogs.clone().run(hub.clone(), shutdown.clone()));
    let evictions = Arc::new(evictions::Evictions::default());
    tokio::spawn(evictions.clone().run(pool.clone(), shutdown.clone()));
    let sealer = resume::Sealer::new(&secret);

    let edge = Arc::new(Edge {
        catalogs,
        shared: shared::Shared::new(pool.clone(), sealer.clone(), row_limit(nats.client.max_payload()), SHARED_READS),
        pool,
        lanes: lane::Lanes::start(&nats, &health, &shutdown),
        nats,
        hub: hub.clone(),
        watermarks,
        verifier: token::Verifier::new(&secret),
        evictions,
        sealer,
        shares: shares::Shares::new(args.sessions_per_user as usize, args.connections_per_user),
        strangers: shares::Strangers::new(args.strangers_per_address as usize),
        snapshot_time: Duration::from_secs(args.snapshot_seconds),
        spool: spool::Spool::new(args.spool_dir.clone().unwrap_or_else(std::env::temp_dir)),
        unsent: Arc::new(Semaphore::new(session::UNSENT_KIB)),
        catch_ups: catchup::CatchUps::new(CATCH_UPS),
        shutdown: shutdown.clone(),
    });
    let router = Router::new().route("/", get(upgrade)).with_state(edge).merge(health.router());
    let address = health::serve(args.listen, router, shutdown.clone())
        .await
        .map_err(|source| Error::Listen { listen: args.listen, source })?;
    tracing::info!(%address, "edge listens");

    shutdown.requested().await;
    let drained = async {
        while hub.sessions() > 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let _ = tokio::time::timeout(DRAIN, drained).await;
    Ok(())
}

fn secret(args: &Args) -> Result<Vec<u8>, Error> {
    let secret = match (&args.token_secret_file, std::env::var("MILLSTREAM_TOKEN_SECRET")) {
        (Some(path), _) => std::fs::read_to_string(path)
            .map_err(|error| Error::Secret(format!("cannot read the token secret file {}: {error}", path.display())))?,
        (None, Ok(secret)) => secret,
        (None, Err(_)) => {
            return Err(Error::Secret(
                "set MILLSTREAM_TOKEN_SECRET_FILE (or MILLSTREAM_TOKEN_SECRET) to the secret of session tokens".into(),
            ));
        }
    };
    let secret = secret.trim().as_bytes().to_vec();
    if secret.len() < MIN_SECRET_BYTES {
        return Err(Error::Secret(format!(
            "the token secret has {} bytes; {MIN_SECRET_BYTES} are needed",
            secret.len()
        )));
    }
    Ok(secret)
}

/// Hands the executor's hints to the sessions that they are for.
async fn results(nats: Nats, hub: Arc<hub::Hub>, shutdown: Shutdown) {
    let mut messages = match nats.client.subscribe(RESULTS_SUBJECTS).await {
        Ok(messages) => messages,
        Err(error) => {
            tracing::error!(%error, "results are not delivered early; confirmations are");
            return;
        }
    };
    loop {
        let message = tokio::select! {
            message = messages.next() => message,
            () = shutdown.requested() => return,
        };
        let Some(message) = message else { return };
        let client = message.subject.rsplit('.').next().and_then(|token| token.parse::<Uuid>().ok());
        match (client, serde_json::from_slice::<ResultsMessage>(&message.payload)) {
            (Some(client), Ok(results)) => hub.results(client, &results.results),
            _ => tracing::warn!(subject = %message.subject, "a result cannot be read"),
        }
    }
}

async fn upgrade(State(edge): State<Arc<Edge>>, request: Request) -> Response {
    let peer = request.extensions().get::<health::Peer>().map(|peer| peer.0.ip());
    let Some(admission) = edge.strangers.admit(peer).await else {
        let retry = [(axum::http::header::RETRY_AFTER, "5")];
        let text = "too many connections from this address have not said hello yet\n";
        return (StatusCode::SERVICE_UNAVAILABLE, retry, text).into_response();
    };
    let unsent = edge.unsent.clone();
    session::upgrade(request, unsent, move |wire| session::serve(edge, wire, admission))
        .unwrap_or_else(|| (StatusCode::UPGRADE_REQUIRED, "a Millstream edge speaks WebSocket here\n").into_response())
}
