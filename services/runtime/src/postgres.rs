//! Connections to Postgres, with pinned settings so that every value's text form is the same everywhere.

use std::str::FromStr;
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions};

/// How to reach Postgres.
#[derive(Clone, clap::Args)]
// Several structs of this name meet in one command; a group is named after its struct.
#[group(skip)]
pub struct Args {
    /// Connection URL, postgres://user:password@host:port/database; better in the environment than in argv
    #[arg(long, env = "DATABASE_URL", hide_env_values = true)]
    pub database_url: String,
}

impl std::fmt::Debug for Args {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("postgres::Args(redacted)")
    }
}

/// The settings under which values are written as text; the same list pins the replication connection.
pub const TEXT_SETTINGS: [(&str, &str); 5] = [
    ("DateStyle", "ISO"),
    ("TimeZone", "UTC"),
    ("IntervalStyle", "iso_8601"),
    ("extra_float_digits", "1"),
    ("bytea_output", "hex"),
];

/// Idle transactions hold back vacuum and locks: the server ends them after this time.
const IDLE_IN_TRANSACTION: Duration = Duration::from_secs(60);
/// How long to wait for a connection of the pool.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);
/// Prepared statements kept a connection.
const STATEMENT_CACHE: usize = 500;

/// Connect options of the URL with our settings.
///
/// # Errors
/// The URL is malformed.
pub fn options(args: &Args, service: &str) -> Result<PgConnectOptions, sqlx::Error> {
    let idle = IDLE_IN_TRANSACTION.as_millis().to_string();
    Ok(PgConnectOptions::from_str(&args.database_url)?
        .application_name(&format!("millstream-{service}"))
        .options(TEXT_SETTINGS)
        .options([("search_path", "public"), ("idle_in_transaction_session_timeout", idle.as_str())])
        .statement_cache_capacity(STATEMENT_CACHE))
}

/// A pool that connects when first used.
///
/// # Errors
/// The URL is malformed.
pub fn pool(args: &Args, service: &str, max_connections: u32) -> Result<PgPool, sqlx::Error> {
    Ok(PgPoolOptions::new()
        .max_connections(max_connections)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        .connect_lazy_with(options(args, service)?))
}
