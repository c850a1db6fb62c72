//! `millstream check`: holds `millstream.toml` against the live database and says everything that does not fit.

use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use millstream_catalog::{Config, ConfigError};
use millstream_provision::check::{self as provision, Findings, Problem};
use millstream_provision::exit::{Exit, HasExit};
use millstream_provision::setup;
use serde::Serialize;

use crate::database::{DatabaseArgs, NoDatabase};
use crate::output::Output;

/// Flags of `millstream check`.
#[derive(clap::Args, Clone)]
#[command(before_help = "Examples:
  millstream check
  millstream check --config app/millstream.toml -o json")]
#[command(
    after_help = "The database is only read. Without DATABASE_URL it is that of `millstream dev` in --data. Exit status 5 when something does not fit; warnings alone leave it 0."
)]
pub struct Args {
    /// The synced tables
    #[arg(long, env = "MILLSTREAM_CONFIG", default_value = "millstream.toml")]
    pub config: PathBuf,
    /// How to print
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    pub output: Output,
    /// Name of the replication slot
    #[arg(long, env = "MILLSTREAM_SLOT", default_value = "millstream")]
    pub slot: String,
    /// The database, preferably as owner of the tables.
    #[command(flatten)]
    pub database: DatabaseArgs,
}

/// It could not be checked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `millstream.toml` cannot be read.
    #[error("the configuration is not usable")]
    Config(#[source] ConfigError),
    /// Nothing says which database.
    #[error("which database?")]
    NoDatabase(#[source] NoDatabase),
    /// The database cannot be reached.
    #[error("the database")]
    Connect(#[source] setup::Error),
    /// The database cannot be read.
    #[error(transparent)]
    Check(#[from] provision::Error),
    /// Nobody listens.
    #[error("cannot write to stdout")]
    Output(#[source] io::Error),
}

impl HasExit for Error {
    fn exit(&self) -> Exit {
        match self {
            Error::Config(error) => error.exit(),
            Error::NoDatabase(error) => error.exit(),
            Error::Connect(error) => error.exit(),
            Error::Check(error) => error.exit(),
            Error::Output(_) => Exit::Failed,
        }
    }
}

/// What `-o json` prints.
#[derive(Serialize)]
struct Report<'a> {
    ok: bool,
    config: &'a Path,
    problems: &'a [Problem],
    warnings: &'a [Problem],
}

/// Runs `millstream check`.
pub async fn run(args: Args) -> Result<Exit, Error> {
    let path = &args.config;
    let text = std::fs::read_to_string(path)
        .map_err(|source| Error::Config(ConfigError::Read { path: path.clone(), source }))?;
    let Findings { problems, warnings } = match Config::parse(&text, path) {
        Ok(config) => {
            let mut connection = setup::connect(&args.database.find().map_err(Error::NoDatabase)?, Duration::ZERO)
                .await
                .map_err(Error::Connect)?;
            let mut found = provision::check(&mut connection, &config, &text).await?;
            found.problems.extend(provision::slot(&mut connection, &args.slot).await?);
            found
        }
        // Without its structure there is nothing to hold against the database.
        Err(ConfigError::Parse { source, .. }) => {
            Findings { problems: vec![provision::unreadable(&text, &source)], warnings: Vec::new() }
        }
        Err(error) => return Err(Error::Config(error)),
    };
    let ok = problems.is_empty();
    let output = match args.output {
        Output::Json => {
            let report = Report { ok, config: path, problems: &problems, warnings: &warnings };
            format!("{}\n", serde_json::to_string(&report).unwrap_or_default())
        }
        Output::Text => {
            let mut parts: Vec<String> = problems.iter().map(|problem| problem.text(path, "")).collect();
            parts.extend(warnings.iter().map(|warning| warning.text(path, "warning: ")));
            if ok {
                parts.push(format!("{}: fits the database\n", path.display()));
            }
            parts.join("\n")
        }
    };
    io::stdout().lock().write_all(output.as_bytes()).map_err(Error::Output)?;
    for (found, what) in [(problems.len(), "problem"), (warnings.len(), "warning")] {
        if found > 0 {
            eprintln!("{found} {what}{}", if found == 1 { "" } else { "s" });
        }
    }
    Ok(if ok { Exit::Ok } else { Exit::Problems })
}
