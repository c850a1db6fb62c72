//! The broker: connecting, and the three streams. One deploy step declares the streams; every service verifies them.

use std::path::PathBuf;
use std::time::Duration;

use async_nats::ServerAddr;
use async_nats::connection::State;
use async_nats::jetstream::context::CreateStreamErrorKind;
use async_nats::jetstream::stream::{Config, DiscardPolicy, RetentionPolicy, StorageType, Stream};
use async_nats::jetstream::{self, Context, ErrorCode};
use millstream_schemas::subject;
use tokio::sync::watch;

/// Oldest server that group-commits its fsyncs and has atomic batches without their early faults.
const MINIMUM_SERVER: (u64, u64, u64) = (2, 15, 1);
/// Time for one request to the JetStream API.
const API_TIMEOUT: Duration = Duration::from_secs(5);
/// Pings find a half-open connection.
const PING_INTERVAL: Duration = Duration::from_secs(10);
/// Longest pause between attempts to reconnect.
const RECONNECT_CAP: Duration = Duration::from_secs(2);

/// How to reach the broker.
#[derive(Clone, Debug, clap::Args)]
// Several structs of this name meet in one command; a group is named after its struct.
#[group(skip)]
pub struct Args {
    /// URL of a NATS server, or of several servers of one cluster, separated by commas
    #[arg(long, env = "NATS_URL", default_value = "nats://127.0.0.1:4222")]
    pub nats_url: String,
    /// File with the seed of this service's nkey; MILLSTREAM_NATS_SEED may hold the seed itself
    #[arg(long, env = "MILLSTREAM_NATS_SEED_FILE")]
    pub nats_seed_file: Option<PathBuf>,
}

/// A connection, and JetStream over it.
#[derive(Clone, Debug)]
pub struct Nats {
    /// Core NATS.
    pub client: async_nats::Client,
    /// JetStream.
    pub jetstream: Context,
    /// How often the connection was made: what was asked over an earlier one gets no answer.
    pub connections: watch::Receiver<u64>,
}

/// Why the broker cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The seed file cannot be read.
    #[error("cannot read the nkey seed file {}; create keys with `millstream keys DIR`", path.display())]
    Seed {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A URL is malformed. It is not shown: it may hold a password.
    #[error(
        "NATS_URL: server {number} of the list is no URL such as nats://nats-1:4222; several are separated by commas"
    )]
    Url {
        /// Which one of the list, from 1.
        number: usize,
    },
    /// A server refuses us.
    #[error("cannot connect to NATS at {servers}")]
    Connect {
        /// Hosts and ports.
        servers: String,
        /// Why.
        source: async_nats::ConnectError,
    },
    /// The server is too old.
    #[error(
        "NATS server {found} is too old: 2.15.1 or newer is needed, since older ones cannot fsync each message at speed"
    )]
    TooOld {
        /// Its version.
        found: String,
    },
    /// The stream does not exist or cannot be asked for.
    #[error("cannot read stream {name}; `millstream setup` declares the streams")]
    Stream {
        /// Its name.
        name: &'static str,
        /// Why.
        source: jetstream::context::GetStreamError,
    },
    /// The stream cannot be created or updated.
    #[error("cannot declare stream {name}")]
    Declare {
        /// Its name.
        name: &'static str,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The broker has not the room that the stream may take.
    #[error(
        "stream {name} may take {bytes} bytes, and the broker has not as many left: raise max_file_store of its JetStream, or give \
         the streams less by MILLSTREAM_CHANGES_MAX_BYTES (1 GiB for a new one) and MILLSTREAM_WAL_MAX_BYTES (4 GiB)"
    )]
    NoRoom {
        /// Its name.
        name: &'static str,
        /// What it would take at most.
        bytes: i64,
    },
    /// The stream is not as it must be for the guarantees to hold.
    #[error("stream {name} has {what}; `millstream setup` puts it right where NATS allows that")]
    Mismatch {
        /// Its name.
        name: &'static str,
        /// What is wrong.
        what: String,
    },
}

/// Connects as `service`: inboxes are under `_INBOX_{service}`, so that no other service can read the replies. Waits
/// for the server for as long as it takes.
///
/// # Errors
/// The seed cannot be read, the server refuses the connection's parameters, or it is too old.
pub async fn connect(args: &Args, service: &'static str) -> Result<Nats, Error> {
    let seed = match (&args.nats_seed_file, std::env::var("MILLSTREAM_NATS_SEED")) {
        (Some(path), _) => {
            Some(std::fs::read_to_string(path).map_err(|source| Error::Seed { path: path.clone(), source })?)
        }
        (None, Ok(seed)) => Some(seed),
        (None, Err(_)) => None,
    };
    let mut options = async_nats::ConnectOptions::new();
    if let Some(seed) = seed {
        options = options.nkey(seed.trim().to_owned());
    }
    let (made, connections) = watch::channel(0);
    let options = options
        .name(format!("millstream-{service}"))
        .custom_inbox_prefix(format!("_INBOX_{service}"))
        .retry_on_initial_connect()
        .ping_interval(PING_INTERVAL)
        .reconnect_delay_callback(|attempts| {
            Duration::from_millis(50).saturating_mul(1 << attempts.min(6)).min(RECONNECT_CAP)
        })
        .event_callback(move |event| {
            match event {
                async_nats::Event::Connected => {
                    tracing::info!("connected to NATS");
                    made.send_modify(|made| *made += 1);
                }
                // By ourselves, at the end.
                async_nats::Event::Closed => tracing::debug!("the connection to NATS is closed"),
                // Also the only place where a missing permission shows itself.
                event => tracing::warn!(%event, "NATS connection"),
            }
            std::future::ready(())
        });
    let servers = servers(&args.nats_url)?;
    let client =
        options.connect(&servers[..]).await.map_err(|source| Error::Connect { servers: shown(&servers), source })?;
    while client.connection_state() != State::Connected || client.server_info().version.is_empty() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let found = client.server_info().version;
    if version(&found).is_none_or(|version| version < MINIMUM_SERVER) {
        return Err(Error::TooOld { found });
    }
    let jetstream = jetstream::ContextBuilder::new().timeout(API_TIMEOUT).build(client.clone());
    Ok(Nats { client, jetstream, connections })
}

/// Hosts and ports, without what else a URL may hold.
fn shown(servers: &[ServerAddr]) -> String {
    let place = |server: &ServerAddr| format!("{}:{}", server.host(), server.port());
    servers.iter().map(place).collect::<Vec<_>>().join(", ")
}

/// The servers of a list.
fn servers(list: &str) -> Result<Vec<ServerAddr>, Error> {
    let urls: Vec<&str> = list.split(',').map(str::trim).filter(|url| !url.is_empty()).collect();
    if urls.is_empty() {
        return Err(Error::Url { number: 1 });
    }
    let server = |url: &str| url.parse().ok().filter(|server: &ServerAddr| !server.host().is_empty());
    (1..).zip(urls).map(|(number, url)| server(url).ok_or(Error::Url { number })).collect()
}

fn version(text: &str) -> Option<(u64, u64, u64)> {
    let mut parts = text.split(['.', '-']).map(|part| part.parse().ok());
    Some((parts.next()??, parts.next()??, parts.next()??))
}

/// What the streams may hold. Of a stream that exists, what is not given stays as it is.
#[derive(Clone, Copy, Debug, Default, clap::Args)]
pub struct StreamArgs {
    /// Copies of each stream, such as 3 in a cluster; without it a stream keeps those that it has, and a new one has 1
    #[arg(long, env = "MILLSTREAM_STREAM_REPLICAS")]
    pub replicas: Option<usize>,
    /// Bytes of submitted changes that may wait for Postgres; when full, edges push back. A new stream has 1 GiB
    #[arg(long, env = "MILLSTREAM_CHANGES_MAX_BYTES")]
    pub changes_max_bytes: Option<i64>,
    /// Bytes of committed transactions kept for clients that return. A new stream has 4 GiB
    #[arg(long, env = "MILLSTREAM_WAL_MAX_BYTES")]
    pub wal_max_bytes: Option<i64>,
    /// Hours for which committed transactions are kept for clients that return. A new stream has 7 days
    #[arg(long, env = "MILLSTREAM_WAL_MAX_HOURS")]
    pub wal_max_hours: Option<u64>,
}

/// Copies of a new stream.
const REPLICAS: usize = 1;
/// Bytes of submitted changes in a new stream.
const CHANGES_MAX_BYTES: i64 = 1 << 30;
/// Bytes of committed transactions in a new stream.
const WAL_MAX_BYTES: i64 = 4 << 30;
/// Hours for which a new stream keeps committed transactions.
const WAL_MAX_HOURS: u64 = 7 * 24;
/// Consumers a stream may have: each is an edge's tail or an executor's cursor.
const MAX_CONSUMERS: i32 = 1_000;
/// Bytes of results kept for reading by stream.
const RESULTS_MAX_BYTES: i64 = 64 << 20;

/// How a stream is to be. What an operator has chosen for one that exists (copies, limits, placement) stays, unless it is
/// given here or the guarantees need it otherwise.
fn configuration(name: &str, args: &StreamArgs, before: Option<&Config>) -> Config {
    let base = |subjects: &str| Config {
        name: name.to_owned(),
        subjects: vec![subjects.to_owned()],
        retention: RetentionPolicy::Limits,
        storage: StorageType::File,
        num_replicas: args.replicas.or(before.map(|before| before.num_replicas)).unwrap_or(REPLICAS),
        max_consumers: MAX_CONSUMERS,
        // A window of broker-side deduplication that nothing relies on costs memory: the shortest there is.
        duplicate_window: Duration::from_millis(100),
        ..before.cloned().unwrap_or_default()
    };
    let max_bytes = |given: Option<i64>, new| given.or(before.map(|before| before.max_bytes)).unwrap_or(new);
    match name {
        // Discarding old messages would drop accepted changes, and so would an age: a full stream pushes back.
        subject::CHANGES_STREAM => Config {
            discard: DiscardPolicy::New,
            max_bytes: max_bytes(args.changes_max_bytes, CHANGES_MAX_BYTES),
            max_age: Duration::ZERO,
            ..base(subject::CHANGES_SUBJECTS)
        },
        subject::WAL_STREAM => Config {
            discard: DiscardPolicy::Old,
            max_bytes: max_bytes(args.wal_max_bytes, WAL_MAX_BYTES),
            max_age: match (args.wal_max_hours, before) {
                (None, Some(before)) => before.max_age,
                (hours, _) => Duration::from_secs(hours.unwrap_or(WAL_MAX_HOURS) * 3600),
            },
            allow_direct: true,
            allow_atomic_publish: true,
            deny_delete: true,
            ..base(subject::WAL_SUBJECTS)
        },
        _ => Config {
            discard: DiscardPolicy::Old,
            storage: StorageType::Memory,
            max_bytes: RESULTS_MAX_BYTES,
            max_age: Duration::from_secs(24 * 3600),
            ..base(subject::RESULTS_SUBJECTS)
        },
    }
}

/// Creates the streams, or updates their limits. The deploy step; services only verify.
///
/// # Errors
/// The broker refuses, for example to change the storage of an existing stream.
pub async fn declare_streams(jetstream: &Context, args: &StreamArgs) -> Result<(), Error> {
    for name in [subject::CHANGES_STREAM, subject::WAL_STREAM, subject::RESULTS_STREAM] {
        let declare = |source: Box<dyn std::error::Error + Send + Sync>| Error::Declare { name, source };
        match jetstream.get_stream(name).await {
            Ok(stream) => {
                let config = configuration(name, args, Some(&stream.cached_info().config));
                jetstream.update_stream(config).await.map_err(|error| declare(error.into()))?;
            }
            Err(error) if is_missing(&error) => {
                let config = configuration(name, args, None);
                let bytes = config.max_bytes;
                jetstream.create_stream(config).await.map_err(|error| match error.kind() {
                    CreateStreamErrorKind::JetStream(why)
                        if why.error_code() == ErrorCode::STORAGE_RESOURCES_EXCEEDED =>
                    {
                        Error::NoRoom { name, bytes }
                    }
                    _ => declare(error.into()),
                })?;
            }
            // Not taken for one that is missing: it would be made with other limits than it has.
            Err(source) => return Err(Error::Stream { name, source }),
        }
    }
    Ok(())
}

fn is_missing(error: &jetstream::context::GetStreamError) -> bool {
    use jetstream::context::GetStreamErrorKind;
    matches!(error.kind(), GetStreamErrorKind::JetStream(error) if error.error_code() == ErrorCode::STREAM_NOT_FOUND)
}

/// The stream, checked to be as the guarantees need it.
///
/// # Errors
/// It does not exist, or is configured otherwise.
pub async fn stream(jetstream: &Context, name: &'static str) -> Result<Stream, Error> {
    let stream = jetstream.get_stream(name).await.map_err(|source| Error::Stream { name, source })?;
    let found = &stream.cached_info().config;
    let mismatch = |what: String| Err(Error::Mismatch { name, what });
    if found.retention != RetentionPolicy::Limits {
        return mismatch(format!("retention {:?} instead of limits", found.retention));
    }
    match name {
        subject::CHANGES_STREAM => {
            if found.discard != DiscardPolicy::New || found.max_age != Duration::ZERO {
                return mismatch("a discard policy or age that would drop accepted changes".to_owned());
            }
            if found.storage != StorageType::File || !found.subjects.iter().any(|s| s == subject::CHANGES_SUBJECTS) {
                return mismatch("other storage than file, or lacks its subjects".to_owned());
            }
        }
        subject::WAL_STREAM => {
            if !found.allow_direct || !found.allow_atomic_publish {
                return mismatch("no direct get or no atomic publish".to_owned());
            }
            if found.storage != StorageType::File || !found.subjects.iter().any(|s| s == subject::WAL_SUBJECTS) {
                return mismatch("other storage than file, or lacks its subjects".to_owned());
            }
        }
        _ => {}
    }
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_as_numbers() {
        assert!(version("2.15.1").unwrap() >= MINIMUM_SERVER);
        assert!(version("2.15.10-RC.1").unwrap() >= MINIMUM_SERVER);
        assert!(version("2.9.10").unwrap() < MINIMUM_SERVER);
        assert_eq!(version("dev"), None);
    }

    #[test]
    fn a_list_of_servers_is_read_whole() {
        let read =
            |list: &str| servers(list).map(|all| all.iter().map(|one| (one.host().to_owned(), one.port())).collect());
        let pair = |host: &str, port| (host.to_owned(), port);
        assert_eq!(read("nats://a:1").unwrap(), [pair("a", 1)]);
        assert_eq!(read("nats://a:1, tls://b:2 ,c,").unwrap(), [pair("a", 1), pair("b", 2), pair("c", 4222)]);
        for bad in ["", " , ", "nats://a:1,http://b", "nats://a:1,nats://"] {
            let found: Result<Vec<_>, _> = read(bad);
            assert!(matches!(found, Err(Error::Url { .. })), "{bad}");
        }
    }

    #[test]
    fn a_stream_keeps_what_is_not_given() {
        let new = configuration(subject::WAL_STREAM, &StreamArgs::default(), None);
        assert_eq!((new.num_replicas, new.max_bytes), (REPLICAS, WAL_MAX_BYTES));
        let before = Config {
            num_replicas: 3,
            max_bytes: 7,
            max_age: Duration::from_secs(9),
            description: Some("ours".into()),
            ..new
        };
        let kept = configuration(subject::WAL_STREAM, &StreamArgs::default(), Some(&before));
        assert_eq!((kept.num_replicas, kept.max_bytes, kept.max_age), (3, 7, Duration::from_secs(9)));
        assert_eq!(kept.description, before.description);
        let given = StreamArgs { replicas: Some(1), wal_max_hours: Some(2), ..StreamArgs::default() };
        let changed = configuration(subject::WAL_STREAM, &given, Some(&before));
        assert_eq!((changed.num_replicas, changed.max_bytes, changed.max_age), (1, 7, Duration::from_secs(7200)));
        // An age would drop accepted changes, whoever set it.
        let aged = Config { max_age: Duration::from_secs(9), discard: DiscardPolicy::Old, ..before };
        let healed = configuration(subject::CHANGES_STREAM, &StreamArgs::default(), Some(&aged));
        assert_eq!((healed.max_age, healed.discard), (Duration::ZERO, DiscardPolicy::New));
    }
}
