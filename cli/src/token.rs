//! `millstream token`: mints a session token with the edge's secret, for development and operations.

use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use jsonwebtoken::{EncodingKey, Header, encode};
use millstream_schemas::AUDIENCE;
use serde::Serialize;

use crate::stack::DEV_DATA;

/// How long a token lasts unless told otherwise.
pub const DEFAULT_LIFE: Duration = Duration::from_secs(24 * 60 * 60);

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
    #[error("cannot sign the token")]
    Sign(#[source] jsonwebtoken::errors::Error),
}

impl Secret {
    /// The secret, as the edge reads it: without white space around it.
    pub fn read(&self) -> Result<String, Error> {
        if let Some(secret) = self.secret.as_deref().filter(|secret| !secret.is_empty()) {
            return Ok(secret.trim().to_owned());
        }
        let path = self.secret_file.clone().unwrap_or_else(|| crate::stack::token_secret_file(&self.data));
        match std::fs::read_to_string(&path) {
            Ok(secret) => Ok(secret.trim().to_owned()),
            Err(source) => Err(Error::Secret { path, source }),
        }
    }
}

/// A token for a user.
pub fn mint(secret: &str, user: &str, life: Duration) -> Result<String, Error> {
    #[derive(Serialize)]
    struct Claims<'a> {
        sub: &'a str,
        aud: &'a str,
        iat: u64,
        exp: u64,
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let claims = Claims { sub: user, aud: AUDIENCE, iat: now, exp: now.saturating_add(life.as_secs()) };
    encode(&Header::default(), &claims, &EncodingKey::from_secret(secret.as_bytes())).map_err(Error::Sign)
}

/// Runs `millstream token`: the token on stdout.
pub fn run(args: &Args) -> Result<(), Error> {
    println!("{}", mint(&args.secret.read()?, &args.user, Duration::from_secs(args.life))?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_name_user_audience_and_end() {
        let token = mint("secret", "alice", Duration::from_secs(60)).unwrap();
        let mut validation = jsonwebtoken::Validation::default();
        validation.set_audience(&[AUDIENCE]);
        let key = jsonwebtoken::DecodingKey::from_secret(b"secret");
        let claims = jsonwebtoken::decode::<serde_json::Value>(&token, &key, &validation).unwrap().claims;
        assert_eq!(claims["sub"], "alice");
        assert_eq!(claims["exp"].as_u64().unwrap() - claims["iat"].as_u64().unwrap(), 60);
        let other = jsonwebtoken::DecodingKey::from_secret(b"other");
        assert!(jsonwebtoken::decode::<serde_json::Value>(&token, &other, &validation).is_err());
    }
}
