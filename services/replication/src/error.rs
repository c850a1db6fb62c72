//! What can go wrong, by operation.

use millstream_catalog::Unanswered;
use millstream_schemas::Lsn;
use millstream_schemas::stream::MIN_PAYLOAD_BYTES;
use pgwire_replication::protocol::ErrorFields;

use crate::assemble::AssembleError;
use crate::witness::Differs;

/// Why the service, or one session of it, ended. Sessions are started again whatever the reason.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A flag or the environment is wrong.
    #[error("{0}")]
    Config(String),
    /// `millstream.toml` cannot be read.
    #[error("cannot read the configuration")]
    ConfigFile(#[source] millstream_catalog::ConfigError),
    /// The address for health checks cannot be bound.
    #[error("cannot serve health checks")]
    Health(#[source] std::io::Error),
    /// NATS refuses us, or the stream is not as it must be.
    #[error("cannot use NATS")]
    Nats(#[from] millstream_runtime::nats::Error),
    /// A statement on the ordinary connection failed.
    #[error("cannot {operation}")]
    Postgres {
        /// What was to be done.
        operation: &'static str,
        /// Why not.
        #[source]
        source: sqlx::Error,
    },
    /// The configuration does not fit the database.
    #[error("cannot load the catalog")]
    Catalog(#[source] millstream_catalog::CatalogError),
    /// The synced tables, or what `millstream.toml` says of them, have changed.
    #[error("the synced tables have changed")]
    SchemaChanged,
    /// The database's history is not the one that was published.
    #[error(transparent)]
    HistoryDiffers(#[from] Differs),
    /// Tables cannot be replicated as they are.
    #[error("tables cannot be replicated as they are:\n{0}")]
    Tables(String),
    /// The database's encoding does not say what its bytes mean.
    #[error("the database's encoding is SQL_ASCII: text of unknown encoding cannot be sent to clients; use UTF8")]
    Encoding,
    /// Another process has become leader, or the connection that proves leadership is gone.
    #[error("the leader lock is lost")]
    LeaderLost,
    /// The replication connection failed.
    #[error("cannot {operation} on the replication connection")]
    Wal {
        /// What was to be done.
        operation: &'static str,
        /// Why not.
        #[source]
        source: pgwire_replication::PgWireError,
    },
    /// The slot is another installation's.
    #[error(
        "the replication slot {slot} belongs to {owner}: set MILLSTREAM_SLOT to a name that is not used in this Postgres cluster"
    )]
    ForeignSlot {
        /// Its name.
        slot: String,
        /// Whose it is.
        owner: String,
    },
    /// The server refuses, or cannot go on with its change stream.
    #[error("Postgres cannot {operation}")]
    Server {
        /// What was to be done.
        operation: &'static str,
        /// What it says.
        #[source]
        source: ServerError,
    },
    /// TLS is required and the server has none.
    #[error("the server has no TLS, and sslmode requires it: switch TLS on in Postgres, or choose another sslmode")]
    NoTls,
    /// TLS fails on the replication connection.
    #[error("cannot use TLS on the replication connection: {0}")]
    Tls(String),
    /// A value that the change stream did not repeat cannot be read.
    #[error("cannot read an unchanged large value")]
    Lookup {
        /// Why not.
        #[source]
        source: sqlx::Error,
    },
    /// The broker takes so little that next to no row would fit.
    #[error("the broker's max_payload of {0} bytes is too small: set at least {MIN_PAYLOAD_BYTES} in nats.conf")]
    Payload(usize),
    /// A session failed while it was at a transaction.
    #[error("{place}")]
    At {
        /// Which.
        place: AtTransaction,
        /// Why.
        #[source]
        source: Box<Error>,
    },
    /// The replication connection ended without an error.
    #[error("the server ended the replication stream")]
    WalEnded,
    /// Nothing came from the server although it must send keep-alives.
    #[error("nothing came on the replication connection for {0:?}")]
    WalSilent(std::time::Duration),
    /// The change stream makes no sense.
    #[error("cannot assemble the change stream")]
    Assemble(#[from] AssembleError),
    /// The last message of the stream cannot be read.
    #[error("cannot read the end of the outbound stream: {0}")]
    Tail(String),
    /// The end of the outbound stream was not where this process left it.
    #[error("the outbound stream has another writer: it does not end at message {expected}")]
    Conflict {
        /// Last message that this process knows of.
        expected: u64,
    },
    /// It is not known whether the append took place.
    #[error("an append to the outbound stream has an unknown outcome: {0}")]
    Append(String),
    /// The stream refuses the message.
    #[error("the outbound stream refuses messages ({code}): {description}")]
    Refused {
        /// NATS' error code.
        code: u64,
        /// Its text.
        description: String,
    },
    /// A row is larger than the server takes.
    #[error(
        "a message of {bytes} bytes for transaction {lsn} is over the broker's max_payload of {limit}: raise max_payload in nats.conf"
    )]
    MessageTooLarge {
        /// The transaction.
        lsn: Lsn,
        /// Size of the message.
        bytes: usize,
        /// The broker's limit.
        limit: usize,
    },
    /// A subscription cannot be made.
    #[error("cannot subscribe to {subject}")]
    Subscribe {
        /// Subject.
        subject: &'static str,
        /// Why not.
        #[source]
        source: async_nats::SubscribeError,
    },
    /// A task of the session is gone.
    #[error("a part of the session ended unexpectedly")]
    PartEnded,
}

impl From<Unanswered> for Error {
    fn from(error: Unanswered) -> Error {
        Error::Postgres { operation: error.operation, source: error.source }
    }
}

/// A transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AtTransaction {
    /// Its commit LSN, or that of the last one before it.
    pub lsn: Lsn,
    /// Its id, if it is known.
    pub xid: Option<u32>,
    /// The table that the change stream spoke of last.
    pub table: Option<String>,
}

impl std::fmt::Display for AtTransaction {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.xid {
            Some(xid) => write!(f, "at transaction {xid} ({})", self.lsn),
            None => write!(f, "behind {}", self.lsn),
        }
    }
}

/// An error that Postgres reports on the replication connection.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct ServerError {
    /// SQLSTATE.
    pub code: String,
    /// Postgres' text.
    pub message: String,
}

impl ServerError {
    pub(crate) fn parse(payload: &[u8]) -> ServerError {
        let fields = ErrorFields::parse(payload);
        ServerError { code: fields.code.unwrap_or_default(), message: fields.message.unwrap_or_default() }
    }
}

impl std::fmt::Display for ServerError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // No values in our logs.
        let message = if self.may_quote() { "see Postgres' own log" } else { &self.message };
        write!(f, "{message} (SQLSTATE {})", self.code)
    }
}

impl Error {
    /// Says where it happened.
    pub(crate) fn at(self, place: AtTransaction) -> Error {
        Error::At { place, source: Box::new(self) }
    }

    /// Where it happened, if that is known.
    pub(crate) fn place(&self) -> Option<&AtTransaction> {
        match self {
            Error::At { place, .. } => Some(place),
            _ => None,
        }
    }

    /// What happened, wherever it did.
    pub(crate) fn cause(&self) -> &Error {
        match self {
            Error::At { source, .. } => source.cause(),
            error => error,
        }
    }

    /// Wraps an error of the ordinary connection.
    pub(crate) fn postgres(operation: &'static str) -> impl FnOnce(sqlx::Error) -> Error {
        move |source| Error::Postgres { operation, source }
    }
}
