//! Exit codes, the same for every subcommand. Each error knows its own.

use std::error::Error as StdError;
use std::process::ExitCode;

use millstream_catalog::{CatalogError, ConfigError};

/// How the program ends. 2, wrong usage, comes from the command line's parser.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Done.
    Ok = 0,
    /// It failed.
    Failed = 1,
    /// A configuration is wrong or missing.
    Config = 3,
    /// Something that is needed is not there.
    Dependency = 4,
    /// A check found problems.
    Problems = 5,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit as u8)
    }
}

/// An error that the program may end with.
pub trait HasExit: StdError {
    /// The exit code. An error that only adds words to its cause has the cause's.
    fn exit(&self) -> Exit;
}

impl HasExit for ConfigError {
    fn exit(&self) -> Exit {
        Exit::Config
    }
}

impl HasExit for CatalogError {
    fn exit(&self) -> Exit {
        Exit::Config
    }
}

impl HasExit for std::io::Error {
    fn exit(&self) -> Exit {
        Exit::Failed
    }
}
