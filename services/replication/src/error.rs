//! What can go wrong, by operation.

use millstream_schemas::Lsn;

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

impl Error {
    /// Wraps an error of the ordinary connection.
    pub(crate) fn postgres(operation: &'static str) -> impl FnOnce(sqlx::Error) -> Error {
        move |source| Error::Postgres { operation, source }
    }

    /// The whole chain in one line, for the log.
    pub(crate) fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut source = std::error::Error::source(self);
        while let Some(error) = source {
            let part = error.to_string();
            if !text.ends_with(&part) {
                text.push_str(": ");
                text.push_str(&part);
            }
            source = error.source();
        }
        text
    }
}
