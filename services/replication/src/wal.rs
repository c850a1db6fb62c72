//! The replication connection: a thin wrapper of `pgwire-replication`, which owns the socket in a task of its own and
//! goes on answering the server while we are busy publishing. Decoding is ours ([`crate::pgoutput`]).

use std::time::Duration;

use millstream_runtime::postgres::TEXT_SETTINGS;
use millstream_schemas::Lsn;
use pgwire_replication::{ReplicationClient, ReplicationConfig, ReplicationEvent, SslMode, TlsConfig};
use tokio::time::Instant;
use url::Url;

use crate::error::Error;
use crate::pgoutput::{self, DecodeError, Message};

/// The session's `wal_sender_timeout`: the server asks for a sign of life after half of it.
const WAL_SENDER_TIMEOUT: Duration = Duration::from_secs(20);
/// Silence after which the connection counts as dead. The server speaks at least every half [`WAL_SENDER_TIMEOUT`].
const MAX_SILENCE: Duration = Duration::from_secs(2 * WAL_SENDER_TIMEOUT.as_secs());
/// A confirmed position reaches the server within this time.
const STATUS_INTERVAL: Duration = Duration::from_secs(1);
/// Status reports of our own accord on a silent connection. Longer than the server's timeout on purpose: it would
/// otherwise never have a reason to speak, and a dead connection would go unnoticed.
const IDLE_REPORT_INTERVAL: Duration = Duration::from_secs(3600);
/// Messages between the socket's task and ours.
const BUFFERED_EVENTS: usize = 512;
/// Largest message of the change stream, that is largest row, in bytes. Larger ones could not be published either.
const MAX_WAL_MESSAGE_BYTES: usize = 64 * 1024 * 1024;
/// Time to connect and start.
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest slot name that Postgres takes.
const MAX_SLOT_NAME_BYTES: usize = 63;

/// Where the change stream comes from.
#[derive(Clone)]
pub struct Source {
    config: ReplicationConfig,
}

impl std::fmt::Debug for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Source").field("slot", &self.config.slot).finish_non_exhaustive()
    }
}

impl Source {
    /// Takes the connection URL apart.
    pub fn new(database_url: &str, slot: &str, publication: &str) -> Result<Source, Error> {
        // The name goes into the replication command as it is.
        let named = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
        if slot.is_empty() || slot.len() > MAX_SLOT_NAME_BYTES || !slot.bytes().all(named) {
            return Err(Error::Config(format!(
                "slot name {slot:?}: 1 to {MAX_SLOT_NAME_BYTES} lower-case letters, digits and underscores"
            )));
        }
        // The URL may hold a password, so it is not repeated.
        let url = Url::parse(database_url).map_err(|error| Error::Config(format!("DATABASE_URL: {error}")))?;
        if !matches!(url.scheme(), "postgres" | "postgresql") {
            return Err(Error::Config("DATABASE_URL: expected postgres://user:password@host:port/database".into()));
        }
        let parameter =
            |name: &str| url.query_pairs().find_map(|(key, value)| (key == name).then(|| value.into_owned()));
        let host = parameter("host").or_else(|| url.host_str().filter(|host| !host.is_empty()).map(decode));
        let host = host.unwrap_or_else(|| "localhost".into());
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let user = parameter("user").unwrap_or_else(|| decode(url.username()));
        let user = if user.is_empty() { "postgres".to_owned() } else { user };
        let password = parameter("password").or_else(|| url.password().map(decode));
        let password = password.or_else(|| std::env::var("PGPASSWORD").ok()).unwrap_or_default();
        let path = decode(url.path().trim_start_matches('/'));
        let database = parameter("dbname").unwrap_or(if path.is_empty() { user.clone() } else { path });
        let port = match parameter("port") {
            Some(port) => port.parse().map_err(|_| Error::Config("DATABASE_URL: the port is not a number".into()))?,
            None => url.port().unwrap_or(5432),
        };
        let tls = tls(&host, parameter("sslmode").as_deref(), parameter("sslrootcert"))?;
        let mut options = String::new();
        for (name, value) in TEXT_SETTINGS {
            options.push_str(&format!("-c {name}={value} "));
        }
        options.push_str(&format!("-c wal_sender_timeout={}", WAL_SENDER_TIMEOUT.as_millis()));
        let config = ReplicationConfig::new(host, user, password, database, slot, publication)
            .with_port(port)
            .with_tls(tls)
            .with_options(options)
            .with_application_name("millstream-replication-wal")
            .with_status_interval(STATUS_INTERVAL)
            .with_wakeup_interval(IDLE_REPORT_INTERVAL)
            .with_buffer_size(BUFFERED_EVENTS)
            .with_max_message_size(MAX_WAL_MESSAGE_BYTES);
        Ok(Source { config })
    }

    /// Starts the change stream where the slot has been confirmed.
    pub async fn start(&self) -> Result<Wal, Error> {
        let config = self.config.clone().with_start_lsn(to_wire(Lsn::ZERO));
        let failed = |operation| move |source| Error::Wal { operation, source };
        let mut client = ReplicationClient::connect(config).await.map_err(failed("connect"))?;
        tokio::time::timeout(START_TIMEOUT, client.wait_started())
            .await
            .map_err(|_| Error::WalSilent(START_TIMEOUT))?
            .map_err(failed("start replication"))?;
        Ok(Wal { client, heard: Instant::now() })
    }
}

fn decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        rest = tail;
        let escaped = (byte == b'%').then(|| rest.split_first_chunk::<2>()).flatten().and_then(|(digits, tail)| {
            let byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
            Some((byte, tail))
        });
        match escaped {
            Some((byte, tail)) => {
                bytes.push(byte);
                rest = tail;
            }
            None => bytes.push(byte),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn tls(host: &str, mode: Option<&str>, root: Option<String>) -> Result<TlsConfig, Error> {
    let mode = match mode.unwrap_or("prefer") {
        "disable" => SslMode::Disable,
        "allow" | "prefer" => SslMode::Prefer,
        "require" => SslMode::Require,
        "verify-ca" => SslMode::VerifyCa,
        "verify-full" => SslMode::VerifyFull,
        other => return Err(Error::Config(format!("DATABASE_URL: unknown sslmode {other:?}"))),
    };
    let optional = matches!(mode, SslMode::Disable | SslMode::Prefer);
    if host.starts_with('/') || (optional && !cfg!(feature = "tls")) {
        return Ok(TlsConfig::disabled());
    }
    if !cfg!(feature = "tls") {
        return Err(Error::Config(
            "DATABASE_URL: sslmode asks for TLS, and this build has none on the replication connection \
             (build with the cargo feature `tls`)"
                .into(),
        ));
    }
    Ok(TlsConfig { mode, ca_pem_path: root.map(Into::into), ..TlsConfig::disabled() })
}

fn to_wire(lsn: Lsn) -> pgwire_replication::Lsn {
    pgwire_replication::Lsn(lsn.0)
}

/// The change stream.
pub struct Wal {
    client: ReplicationClient,
    heard: Instant,
}

impl Wal {
    /// The next event. May be dropped and called again without losing anything.
    pub async fn next(&mut self) -> Result<ReplicationEvent, Error> {
        match tokio::time::timeout_at(self.heard + MAX_SILENCE, self.client.recv()).await {
            Err(_) => Err(Error::WalSilent(MAX_SILENCE)),
            Ok(Err(source)) => Err(Error::Wal { operation: "read", source }),
            Ok(Ok(None)) => Err(Error::WalEnded),
            Ok(Ok(Some(event))) => {
                self.heard = Instant::now();
                Ok(event)
            }
        }
    }

    /// Tells the server that everything before this LSN is safe.
    pub fn confirm(&self, lsn: Lsn) {
        self.client.update_applied_lsn(to_wire(lsn));
    }

    /// Time spent elsewhere does not count as the server's silence.
    pub fn was_busy(&mut self) {
        self.heard = Instant::now();
    }
}

/// The `pgoutput` message of an event; none for keep-alives.
pub fn message(event: &ReplicationEvent) -> Result<Option<Message<'_>>, DecodeError> {
    // The client library has parsed the boundaries already, everything else comes as it was sent.
    Ok(Some(match event {
        ReplicationEvent::Begin { final_lsn, xid, commit_time_micros } => {
            Message::Begin { final_lsn: Lsn(final_lsn.0), at: pgoutput::unix_micros(*commit_time_micros), xid: *xid }
        }
        ReplicationEvent::Commit { lsn, end_lsn, commit_time_micros } => {
            Message::Commit { lsn: Lsn(lsn.0), end_lsn: Lsn(end_lsn.0), at: pgoutput::unix_micros(*commit_time_micros) }
        }
        ReplicationEvent::Message { transactional, prefix, content, .. } => {
            Message::Logical { transactional: *transactional, prefix, content }
        }
        ReplicationEvent::XLogData { data, .. } => pgoutput::decode(data)?,
        ReplicationEvent::KeepAlive { .. } | ReplicationEvent::StoppedAt { .. } => return Ok(None),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_taken_apart() {
        let check = |url: &str, expected: (&str, u16, &str, &str, &str)| {
            let config = Source::new(url, "millstream", "millstream").unwrap().config;
            let found = (
                config.host.as_str(),
                config.port,
                config.user.as_str(),
                config.password.as_str(),
                config.database.as_str(),
            );
            assert_eq!(found, expected);
        };
        check("postgres://u:p%40%2F%25@db.example:6000/app", ("db.example", 6000, "u", "p@/%", "app"));
        check("postgresql://u:p@localhost", ("localhost", 5432, "u", "p", "u"));
        check("postgres:///app?host=/run/pg&port=7&user=u&password=p", ("/run/pg", 7, "u", "p", "app"));
        check("postgres://u:p@[::1]:5/a%20b", ("::1", 5, "u", "p", "a b"));
        check("postgres://u:100%@h/d", ("h", 5432, "u", "100%", "d"));
    }

    #[test]
    fn bad_settings_are_refused() {
        let url = "postgres://u:p@h/d";
        for slot in ["", "Upper", "a-b", "a;b", "é", &"x".repeat(64)] {
            assert!(Source::new(url, slot, "p").is_err(), "{slot}");
        }
        assert!(Source::new(url, &"x".repeat(63), "p").is_ok());
        for url in ["", "mysql://u@h/d", "postgres://u@h/d?sslmode=maybe", "postgres://u@h/d?port=x"] {
            assert!(Source::new(url, "s", "p").is_err(), "{url}");
        }
        assert_eq!(Source::new("postgres://u@h/d?sslmode=verify-full", "s", "p").is_ok(), cfg!(feature = "tls"));
    }
}
