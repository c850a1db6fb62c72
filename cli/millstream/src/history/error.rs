//! Why the history cannot be read, or not replayed.

use std::io;

use millstream_provision::exit::{Exit, HasExit};
use millstream_provision::setup::is_absence;
use millstream_runtime::nats;
use uuid::Uuid;

use crate::database::NoDatabase;

/// The history cannot be read, or not replayed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Neither settings nor dev mode.
    #[error("which database?")]
    NoDatabase(#[source] NoDatabase),
    /// Postgres cannot be reached.
    #[error("cannot connect to Postgres")]
    Connect(#[source] sqlx::Error),
    /// A query.
    #[error("cannot read what failed, or what is parked")]
    Query(#[source] sqlx::Error),
    /// No such row.
    #[error("there is no failed transaction {0}; `millstream history list` shows their ids")]
    NotFound(i64),
    /// It would count twice.
    #[error("{0} adds to a number: its author's client still has it, and both would count; let the author retry it")]
    Adds(i64),
    /// No such transaction, or not any more.
    #[error(
        "transaction {client_seq} of client {client_id} is not parked (any more); `millstream history parked` shows those that are"
    )]
    NotParked {
        /// The client.
        client_id: Uuid,
        /// `client_seq`.
        client_seq: i64,
    },
    /// The recorded transaction is not of this version.
    #[error("the record {id} cannot be replayed by this version")]
    Payload {
        /// Which.
        id: i64,
        /// Why.
        source: serde_json::Error,
    },
    /// A replay of a replay of a replay.
    #[error("{0} was replayed too often; submit the change anew instead")]
    TooOften(i64),
    /// NATS refuses us.
    #[error("NATS")]
    Nats(#[source] nats::Error),
    /// NATS does not answer.
    #[error("no answer from NATS at {0}: is it there, and does the key `operator` fit?")]
    NatsSilent(String),
    /// The broker did not store the transaction.
    #[error("the broker did not take the transaction")]
    Publish(#[source] async_nats::jetstream::context::PublishError),
    /// Standard output.
    #[error("cannot write")]
    Write(#[source] io::Error),
}

impl HasExit for Error {
    fn exit(&self) -> Exit {
        match self {
            Error::NoDatabase(error) => error.exit(),
            Error::Nats(nats::Error::Seed { .. } | nats::Error::Url { .. }) => Exit::Config,
            Error::Connect(error) if is_absence(error) => Exit::Dependency,
            Error::Nats(_) | Error::NatsSilent(_) | Error::Publish(_) => Exit::Dependency,
            _ => Exit::Failed,
        }
    }
}
