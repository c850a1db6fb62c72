//! Which database a command is about: as told, else dev mode's.

use std::io;
use std::path::PathBuf;

use millstream_provision::exit::{Exit, HasExit};
use millstream_runtime::postgres;
use millstream_stack::data::{DEV_DATA, data_postgres_url};

/// Flags of commands for a database, or for the stack of `millstream dev`.
#[derive(Clone, clap::Args)]
#[group(skip)]
pub struct DatabaseArgs {
    /// Postgres, as the tables' owner; better in the environment than in argv
    #[arg(long, env = "DATABASE_URL", hide_env_values = true)]
    pub database_url: Option<String>,
    /// Data folder of dev mode, where DATABASE_URL is not given
    #[arg(long, env = "MILLSTREAM_DEV_DATA", default_value = DEV_DATA)]
    pub data: PathBuf,
}

/// Neither settings nor dev mode.
#[derive(Debug, thiserror::Error)]
#[error("set DATABASE_URL, or run `cargo dev` (`millstream dev`) first; nothing is in {}", .path.display())]
pub struct NoDatabase {
    /// Where dev mode's settings were looked for.
    pub path: PathBuf,
    /// Why they were not read.
    pub source: io::Error,
}

impl HasExit for NoDatabase {
    fn exit(&self) -> Exit {
        Exit::Config
    }
}

impl DatabaseArgs {
    /// The connection URL that was given.
    pub fn given(&self) -> Option<&str> {
        self.database_url.as_deref().filter(|url| !url.is_empty())
    }

    /// The database.
    ///
    /// # Errors
    /// Nothing says which.
    pub fn find(&self) -> Result<postgres::Args, NoDatabase> {
        let database_url = match self.given() {
            Some(url) => url.to_owned(),
            None => data_postgres_url(&self.data).map_err(|source| self.missing(source))?,
        };
        Ok(postgres::Args { database_url })
    }

    /// Why there is nothing of dev mode.
    pub fn missing(&self, source: io::Error) -> NoDatabase {
        NoDatabase { path: self.data.clone(), source }
    }
}
