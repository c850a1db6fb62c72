//! Connections to Postgres, with pinned settings so that every value's text form is the same everywhere.

use std::error::Error;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::error::chain;
use rustls::CertificateError;
use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions};
use sqlx::{AssertSqlSafe, ConnectOptions as _, Executor as _, PgConnection, Row as _};

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
pub const TEXT_SETTINGS: [(&str, &str); 7] = [
    ("DateStyle", "ISO"),
    ("TimeZone", "UTC"),
    ("IntervalStyle", "iso_8601"),
    ("extra_float_digits", "1"),
    ("bytea_output", "hex"),
    // How names are written, those of types too, which tell whether the layout of rows has changed; and where the application's
    // tables and types are looked for by names without a schema.
    ("search_path", "public"),
    ("quote_all_identifiers", "off"),
];

/// Idle transactions hold back vacuum and locks: the server ends them after this time.
const IDLE_IN_TRANSACTION: Duration = Duration::from_secs(60);
/// How long to wait for a connection of the pool.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a pool waits after a connection that lost its settings.
const REFUSED_PAUSE: Duration = Duration::from_secs(2);
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
        // Its own value would win over ours.
        .extra_float_digits(None)
        .options(TEXT_SETTINGS)
        .options([("idle_in_transaction_session_timeout", idle.as_str())])
        .statement_cache_capacity(STATEMENT_CACHE))
}

/// A setting that the connection asked for and does not have.
#[derive(Debug, thiserror::Error)]
#[error(
    "the connection asked for {name} = {wanted} and has {found}: a connection pooler stands between, which drops `options` \
     (in PgBouncer by ignore_startup_parameters). Sessions need a connection of their own: let DATABASE_URL name Postgres itself"
)]
pub struct SettingLost {
    name: &'static str,
    wanted: &'static str,
    found: String,
}

/// Opens a connection, and reads back whether it has the settings by which values are written.
///
/// # Errors
/// The server refuses, or a pooler has dropped the settings ([`SettingLost`] in [`sqlx::Error::Configuration`]).
pub async fn connect(options: &PgConnectOptions) -> Result<PgConnection, sqlx::Error> {
    let mut connection = options.connect().await?;
    verify(&mut connection).await?;
    Ok(connection)
}

/// Reads the settings back: one that is not there would write values in another form than the change stream has them.
async fn verify(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    let all = TEXT_SETTINGS.map(|(name, _)| format!("current_setting('{name}')"));
    // Not prepared: a pooler may have that statement of another session.
    let sql = AssertSqlSafe(format!("SELECT {}", all.join(", ")));
    let row = connection.fetch_one(sqlx::raw_sql(sql)).await?;
    for (index, (name, wanted)) in TEXT_SETTINGS.into_iter().enumerate() {
        let found: String = row.try_get(index)?;
        // DateStyle also names the order in which dates are read.
        if found != wanted && !(name == "DateStyle" && found.starts_with("ISO,")) {
            return Err(sqlx::Error::Configuration(Box::new(SettingLost { name, wanted, found })));
        }
    }
    Ok(())
}

/// Writes into the log whether a connection is encrypted.
pub fn tell(connection: &str, host: &str, encrypted: bool) {
    let encryption = if encrypted { "tls" } else { "plain text" };
    tracing::info!(
        postgres.connection = connection,
        postgres.encryption = encryption,
        postgres.host = host,
        "connected to Postgres"
    );
}

/// Asks the server whether a connection is encrypted, for [`tell`].
///
/// # Errors
/// The connection is lost.
pub async fn ask(connection: &mut PgConnection, name: &str, options: &PgConnectOptions) -> Result<(), sqlx::Error> {
    let encrypted: Option<bool> =
        sqlx::query_scalar("SELECT coalesce(ssl, false) FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
            .fetch_optional(connection)
            .await?;
    tell(name, options.get_host(), encrypted.unwrap_or(false));
    Ok(())
}

/// A pool that connects when first used, and then says how.
///
/// # Errors
/// The URL is malformed.
pub fn pool(args: &Args, service: &str, max_connections: u32) -> Result<PgPool, sqlx::Error> {
    let options = options(args, service)?;
    let (told, asked) = (Arc::new(AtomicBool::new(false)), options.clone());
    let pool = PgPoolOptions::new()
        .max_connections(max_connections)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        .after_connect(move |connection, _| {
            let (told, asked) = (told.clone(), asked.clone());
            Box::pin(async move {
                if let Err(error) = verify(connection).await {
                    // The pool tries again at once, and writes each time into the log.
                    tokio::time::sleep(REFUSED_PAUSE).await;
                    return Err(error);
                }
                if !told.swap(true, Ordering::Relaxed) {
                    ask(connection, "pool", &asked).await?;
                }
                Ok(())
            })
        })
        .connect_lazy_with(options);
    // So that what is wrong with TLS is said at the start, once.
    let first = pool.clone();
    tokio::spawn(async move {
        if let Err(error) = first.acquire().await
            && let Some(advice) = advice(&error)
        {
            tracing::error!(error = chain(&error), "cannot connect to Postgres: {advice}");
        }
    });
    Ok(pool)
}

/// What to do about an error of TLS, if it is one of those that a setting mends.
pub fn advice(error: &(dyn Error + 'static)) -> Option<&'static str> {
    const NO_TLS: &str =
        "the server has no TLS, and sslmode requires it: switch it on in Postgres, or choose another sslmode";
    const UNKNOWN: &str = "the server's certificate is of no trusted authority: name the file with the authority's certificate by \
                           sslrootcert (or PGSSLROOTCERT)";
    const NAME: &str =
        "the server's certificate is not for this host: connect by a name that it has, or use sslmode=verify-ca";
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(sqlx::Error::Tls(inner)) = error.downcast_ref() {
            // sqlx has a text for this, and no code.
            let refused = inner.to_string() == "server does not support TLS";
            return if refused { Some(NO_TLS) } else { advice(inner.as_ref()) };
        }
        if let Some(rustls::Error::InvalidCertificate(wrong)) = error.downcast_ref() {
            return match wrong {
                CertificateError::UnknownIssuer => Some(UNKNOWN),
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => Some(NAME),
                _ => None,
            };
        }
        // An `io::Error` shows the cause of what it holds as its own, and not what it holds.
        next = match error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref) {
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    None
}

/// Whether an error with this SQLSTATE comes from the data itself. Not what passes or an operator can mend: connections,
/// rights, settings, disks, an operator's intervention.
pub fn is_about_content(code: &str) -> bool {
    const OUT_OF_MEMORY: &str = "53200";
    let passes = ["08", "25", "28", "3D", "40", "42", "53", "55", "57", "58", "F0"];
    code == OUT_OF_MEMORY || !passes.iter().any(|class| code.starts_with(class))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_to_do_about_tls_is_said() {
        let certificate = |wrong| rustls::Error::InvalidCertificate(wrong);
        let io = |inner| sqlx::Error::Io(std::io::Error::new(std::io::ErrorKind::InvalidData, inner));
        for (error, expected) in [
            (sqlx::Error::Tls("server does not support TLS".into()), Some("switch it on")),
            (io(certificate(CertificateError::UnknownIssuer)), Some("sslrootcert")),
            (sqlx::Error::Tls(certificate(CertificateError::UnknownIssuer).into()), Some("sslrootcert")),
            (io(certificate(CertificateError::NotValidForName)), Some("verify-ca")),
            (io(certificate(CertificateError::Expired)), None),
            (sqlx::Error::Io(std::io::ErrorKind::ConnectionRefused.into()), None),
            (sqlx::Error::PoolTimedOut, None),
        ] {
            let advice = advice(&error);
            assert_eq!(advice.is_some(), expected.is_some(), "{error}");
            assert!(expected.is_none_or(|text| advice.unwrap().contains(text)), "{advice:?}");
        }
    }
}
