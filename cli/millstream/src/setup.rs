//! `millstream setup`: the deploy step.

use std::path::PathBuf;
use std::time::Duration;

use millstream_catalog::{Config, ConfigError};
use millstream_provision::exit::{Exit, HasExit};
use millstream_provision::keys::Role;
use millstream_provision::setup as deploy;
use millstream_runtime::{nats, postgres};
use sqlx::Connection as _;

/// Flags of `millstream setup`.
#[derive(clap::Args, Clone)]
#[command(
    after_help = "Needs a Postgres user that owns the application's tables and may create roles; needs the NATS \
key `setup.nk` that `millstream keys` makes. Roles get a password only where one is given."
)]
pub struct Args {
    /// The synced tables
    #[arg(long, env = "MILLSTREAM_CONFIG", default_value = "millstream.toml")]
    pub config: PathBuf,
    /// The database, as owner of the tables.
    #[command(flatten)]
    pub postgres: postgres::Args,
    /// The broker.
    #[command(flatten)]
    pub nats: nats::Args,
    /// Limits of the streams.
    #[command(flatten)]
    pub streams: nats::StreamArgs,
    /// Seconds to wait for Postgres and for NATS
    #[arg(long, env = "MILLSTREAM_SETUP_WAIT_S", default_value_t = 60)]
    pub wait: u64,
    /// Passwords of the roles.
    #[command(flatten)]
    pub passwords: Passwords,
}

/// Passwords of the services' Postgres roles, each by the environment or by a file.
#[derive(clap::Args, Clone, Default)]
pub struct Passwords {
    /// Password of millstream_edge: by the environment only
    #[arg(long, env = "MILLSTREAM_EDGE_PASSWORD", hide = true, hide_env_values = true)]
    pub edge_password: Option<String>,
    /// File with the password of millstream_edge (or MILLSTREAM_EDGE_PASSWORD)
    #[arg(long, env = "MILLSTREAM_EDGE_PASSWORD_FILE")]
    pub edge_password_file: Option<PathBuf>,
    /// Password of millstream_changes: by the environment only
    #[arg(long, env = "MILLSTREAM_CHANGES_PASSWORD", hide = true, hide_env_values = true)]
    pub changes_password: Option<String>,
    /// File with the password of millstream_changes (or MILLSTREAM_CHANGES_PASSWORD)
    #[arg(long, env = "MILLSTREAM_CHANGES_PASSWORD_FILE")]
    pub changes_password_file: Option<PathBuf>,
    /// Password of millstream_replication: by the environment only
    #[arg(long, env = "MILLSTREAM_REPLICATION_PASSWORD", hide = true, hide_env_values = true)]
    pub replication_password: Option<String>,
    /// File with the password of millstream_replication (or MILLSTREAM_REPLICATION_PASSWORD)
    #[arg(long, env = "MILLSTREAM_REPLICATION_PASSWORD_FILE")]
    pub replication_password_file: Option<PathBuf>,
}

/// The deploy step failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A password file.
    #[error("cannot read the password file {path}")]
    Password {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// `millstream.toml` itself.
    #[error("the configuration is not usable")]
    Config(#[source] ConfigError),
    /// A step.
    #[error(transparent)]
    Step(#[from] deploy::Error),
}

impl HasExit for Error {
    fn exit(&self) -> Exit {
        match self {
            Error::Password { .. } | Error::Config(_) => Exit::Config,
            Error::Step(error) => error.exit(),
        }
    }
}

/// Runs `millstream setup`.
pub async fn run(args: Args) -> Result<(), Error> {
    let config = Config::read(&args.config).map_err(Error::Config)?;
    let wait = Duration::from_secs(args.wait);
    let passwords = [
        (Role::Edge, password(args.passwords.edge_password, args.passwords.edge_password_file)?),
        (Role::Changes, password(args.passwords.changes_password, args.passwords.changes_password_file)?),
        (Role::Replication, password(args.passwords.replication_password, args.passwords.replication_password_file)?),
    ];
    let mut connection = deploy::connect(&args.postgres, wait).await?;
    let tables = deploy::database(&mut connection, &config, &passwords).await?;
    // The transaction is over; a connection that does not close well loses nothing.
    let _closed = connection.close().await;
    eprintln!("Postgres: schema millstream, roles, publication with {tables} tables");
    deploy::streams(&args.nats, &args.streams, wait).await?;
    eprintln!("NATS: streams declared");
    Ok(())
}

fn password(value: Option<String>, file: Option<PathBuf>) -> Result<Option<String>, Error> {
    let value = match file {
        Some(path) => Some(std::fs::read_to_string(&path).map_err(|source| Error::Password { path, source })?),
        None => value,
    };
    Ok(value.map(|value| value.trim().to_owned()).filter(|value| !value.is_empty()))
}
