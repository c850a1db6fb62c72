//! Why a stack, or one of its parts, does not start.

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;

use millstream_provision::exit::{Exit, HasExit};
use millstream_provision::{keys, setup};

use crate::binaries;

/// The stack could not be started, or one of its parts.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// nats-server or Postgres.
    #[error("a program is missing")]
    Binaries(#[source] binaries::Error),
    /// The data folder.
    #[error("cannot use {path}")]
    Folder {
        /// Which path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Somebody else runs in the data folder.
    #[error("another stack runs in {0}: stop it first, or use another folder (--data)")]
    Locked(PathBuf),
    /// The data folder was made by another major version.
    #[error(
        "the data in {path} is of Postgres {found}, the programs are of {needed}: delete the folder or use another"
    )]
    PostgresVersion {
        /// The folder.
        path: PathBuf,
        /// Version of the data.
        found: String,
        /// Version of the programs.
        needed: String,
    },
    /// A given port is taken.
    #[error("port {0} is taken: use another (--port)")]
    PortTaken(u16),
    /// No free port.
    #[error("no free port found")]
    NoPort,
    /// The program of the services.
    #[error("this program cannot run the services: name one that can (Builder::executable)")]
    NoExecutable,
    /// A program does not start.
    #[error("cannot start {name}")]
    Spawn {
        /// Which.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// A part ended while it was waited for.
    #[error("{name} ended ({status}); its log ends with:\n{log}")]
    Ended {
        /// Which.
        name: String,
        /// How.
        status: ExitStatus,
        /// End of its log.
        log: String,
    },
    /// A part does not become ready.
    #[error("{name} is not ready after {seconds} s: {reason}; its log ends with:\n{log}")]
    NotReady {
        /// Which.
        name: String,
        /// How long was waited.
        seconds: u64,
        /// What it says.
        reason: String,
        /// End of its log.
        log: String,
    },
    /// Making the database's files.
    #[error("initdb failed: {0}")]
    Initdb(String),
    /// The application's database.
    #[error("Postgres: {action}")]
    Database {
        /// The operation that failed.
        action: String,
        /// Why it failed.
        source: sqlx::Error,
    },
    /// `millstream.toml`.
    #[error("the configuration is not usable")]
    Config(#[source] millstream_catalog::ConfigError),
    /// The deploy step.
    #[error("the deploy step failed")]
    Setup(#[source] setup::Error),
    /// Keys.
    #[error("the NATS keys")]
    Keys(#[source] keys::Error),
}

impl Error {
    pub(crate) fn folder(path: &Path) -> impl FnOnce(io::Error) -> Error + '_ {
        move |source| Error::Folder { path: path.into(), source }
    }
}

impl HasExit for Error {
    fn exit(&self) -> Exit {
        match self {
            Error::Config(_) | Error::PostgresVersion { .. } => Exit::Config,
            Error::PortTaken(_) => Exit::Dependency,
            Error::Binaries(error) => error.exit(),
            Error::Setup(error) => error.exit(),
            _ => Exit::Failed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cause_decides() {
        let own = || binaries::Error::Own { variable: "X", value: "y".into(), reason: "z".into() };
        for (error, exit) in [
            (Error::Binaries(own()), Exit::Config),
            (Error::Binaries(binaries::Error::NoCache), Exit::Dependency),
            (Error::Setup(setup::Error::Connect(sqlx::Error::RowNotFound)), Exit::Dependency),
            (Error::NoPort, Exit::Failed),
        ] {
            assert_eq!(error.exit(), exit, "{error}");
        }
    }
}
