//! Why the client fails.

use std::path::PathBuf;

use millstream_client::Error as SdkError;
use millstream_provision::exit::{Exit, HasExit};

use crate::token;

/// The client failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No way to say who one is.
    #[error("who are you? Give --user, --token-file or MILLSTREAM_TOKEN; or --offline")]
    NoUser,
    /// The token file.
    #[error("cannot read the token file {path}")]
    TokenFile {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The token cannot be made.
    #[error("no token for this user")]
    Token(#[source] token::Error),
    /// A flag.
    #[error("{0}")]
    Flag(&'static str),
    /// The store or a statement.
    #[error("{action}")]
    Client {
        /// The operation that failed.
        action: &'static str,
        /// Why it failed.
        source: Box<SdkError>,
    },
    /// It was never there, or is not any more.
    #[error("the queue has no transaction {0} (any more)")]
    NoTransaction(u64),
    /// A new store needs the edge once.
    #[error("this store has no tables yet, and the edge at {edge} is not reachable ({reason}): connect once first")]
    Empty {
        /// Where.
        edge: String,
        /// Why not.
        reason: String,
    },
    /// It is about to have them.
    #[error(
        "the first snapshot is arriving from {edge}: {so_far}. Give --wait more seconds, or try again: it goes on from there"
    )]
    Arriving {
        /// From where.
        edge: String,
        /// How far it is.
        so_far: String,
    },
}

impl Error {
    pub fn client(action: &'static str) -> impl FnOnce(SdkError) -> Error {
        move |source| Error::Client { action, source: Box::new(source) }
    }
}

impl HasExit for Error {
    fn exit(&self) -> Exit {
        match self {
            Error::NoUser | Error::TokenFile { .. } | Error::Token(_) | Error::Flag(_) => Exit::Config,
            Error::Client { .. } | Error::NoTransaction(_) => Exit::Failed,
            Error::Empty { .. } | Error::Arriving { .. } => Exit::Dependency,
        }
    }
}
