//! Why a bench fails.

use std::path::PathBuf;

use millstream_provision::exit::{Exit, HasExit};

/// The bench failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The stack.
    #[error("the private stack")]
    Stack(#[source] millstream_stack::Error),
    /// A flag.
    #[error("{0}")]
    Flag(&'static str),
    /// Files of the bench.
    #[error("cannot use {path}")]
    Folder {
        /// Which path.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Postgres.
    #[error("Postgres: {action}")]
    Postgres {
        /// The operation that failed.
        action: &'static str,
        /// Why it failed.
        source: sqlx::Error,
    },
    /// JetStream.
    #[error("JetStream: {action}")]
    JetStream {
        /// The operation that failed.
        action: &'static str,
        /// Why it failed.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A client.
    #[error("client: {action}")]
    Client {
        /// The operation that failed.
        action: &'static str,
        /// Why it failed.
        source: Box<millstream_client::Error>,
    },
    /// The executor.
    #[error("the executor")]
    Executor(#[source] Box<millstream_changes::direct::DirectError>),
    /// A client did not get there in time.
    #[error("{0}")]
    Late(String),
    /// SQLite, below a client.
    #[error("the floor's SQLite")]
    Floor(#[source] Box<rusqlite::Error>),
    /// A histogram.
    #[error("a time cannot be recorded")]
    Histogram,
    /// At the end rows differ that should be the same: the numbers mean nothing.
    #[error("not converged: {0}")]
    NotConverged(String),
}

impl Error {
    pub(crate) fn client(action: &'static str) -> impl FnOnce(millstream_client::Error) -> Error {
        move |source| Error::Client { action, source: Box::new(source) }
    }

    pub(crate) fn postgres(action: &'static str) -> impl FnOnce(sqlx::Error) -> Error {
        move |source| Error::Postgres { action, source }
    }
}

impl HasExit for Error {
    fn exit(&self) -> Exit {
        match self {
            Error::Stack(error) => error.exit(),
            Error::NotConverged(_) => Exit::Problems,
            _ => Exit::Failed,
        }
    }
}
