//! `millstream token`: mints a session token with the edge's secret, for development and operations.

use std::path::PathBuf;
use std::time::Duration;

use millstream_provision::exit::{Exit, HasExit};
use millstream_provision::token::{DEFAULT_LIFE, SignError, mint};
use millstream_stack::data::{DEV_DATA, token_secret_file};

/// Flags of `millstream token`.
#[derive(clap::Args)]
#[command(after_help = "Without a secret given, the one of dev mode in --data is used.")]
pub struct Args {
    /// User id that the token names.
    #[arg(long)]
    pub user: String,
    /// Seconds until it expires.
    #[arg(long, env = "MILLSTREAM_TOKEN_LIFE_S", default_value_t = DEFAULT_LIFE.as_secs())]
    pub life: u64,
    /// Where the secret is.
    #[command(flatten)]
    pub secret: Secret,
}

/// Where the edge's secret is.
#[derive(clap::Args, Clone)]
pub struct Secret {
    /// File with the secret.
    #[arg(long, env = "MILLSTREAM_TOKEN_SECRET_FILE")]
    pub secret_file: Option<PathBuf>,
    /// The secret itself: by the environment only.
    #[arg(long = "token-secret", env = "MILLSTREAM_TOKEN_SECRET", hide = true, hide_env_values = true)]
    pub secret: Option<String>,
    /// Data folder of dev mode.
    #[arg(long, env = "MILLSTREAM_DEV_DATA", default_value = DEV_DATA)]
    pub data: PathBuf,
}

/// A token could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No secret.
    #[error(
        "no secret: set MILLSTREAM_TOKEN_SECRET_FILE or MILLSTREAM_TOKEN_SECRET, or run `cargo dev` first (cannot read {path})"
    )]
    Secret {
        /// Where it was looked for.
        path: PathBuf,
        /// Why it was not read.
        source: std::io::Error,
    },
    /// Signing failed.
    #[error(transparent)]
    Sign(#[from] SignError),
}

impl Secret {
    /// The secret, as the edge reads it: without white space around it.
    pub fn read(&self) -> Result<String, Error> {
        if let Some(secret) = self.secret.as_deref().filter(|secret| !secret.is_empty()) {
            return Ok(secret.trim().to_owned());
        }
        let path = self.secret_file.clone().unwrap_or_else(|| token_secret_file(&self.data));
        match std::fs::read_to_string(&path) {
            Ok(secret) => Ok(secret.trim().to_owned()),
            Err(source) => Err(Error::Secret { path, source }),
        }
    }
}

impl HasExit for Error {
    fn exit(&self) -> Exit {
        Exit::Config
    }
}

/// Runs `millstream token`: the token on stdout.
pub fn run(args: &Args) -> Result<(), Error> {
    println!("{}", mint(&args.secret.read()?, &args.user, Duration::from_secs(args.life))?);
    Ok(())
}
