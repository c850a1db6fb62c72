//! A backend that mints session tokens, with the secret that it shares with the edges. Against `cargo dev`:
//!
//! ```sh
//! export MILLSTREAM_TOKEN_SECRET_FILE=.millstream/dev/secrets/token.secret
//! cargo run -p millstream-client --example backend
//! curl http://127.0.0.1:4900/token -H 'content-type: application/json' -d '{"user": "alice", "password": "rabbit"}'
//! ```
//!
//! The app asks it in `Builder::token_fn`, with the HTTP client that it has already.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::post;
use axum::{Json, Router};
use jsonwebtoken::{EncodingKey, Header, encode};
use serde::{Deserialize, Serialize};

/// How long a token is good for. A session ends with its token, and the SDK asks for another.
const TOKEN_LIFE: Duration = Duration::from_secs(3600);

struct Backend {
    key: EncodingKey,
    /// Passwords by user. A real backend has accounts with hashed passwords, or the session of its website.
    users: HashMap<&'static str, &'static str>,
}

/// The body of a request.
#[derive(Deserialize)]
struct Login {
    user: String,
    password: String,
}

/// The claims that an edge reads.
#[derive(Serialize)]
struct Claims {
    /// The user id, as the database spells it.
    sub: String,
    aud: &'static str,
    /// Lets an operator end the sessions of all tokens issued so far.
    iat: u64,
    exp: u64,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let file = std::env::var("MILLSTREAM_TOKEN_SECRET_FILE").context("MILLSTREAM_TOKEN_SECRET_FILE names no file")?;
    // The edge reads it without the white space around it, too.
    let secret = std::fs::read_to_string(&file).with_context(|| format!("cannot read {file}"))?.trim().to_owned();
    let users = HashMap::from([("alice", "rabbit"), ("bob", "builder")]);
    let backend = Arc::new(Backend { key: EncodingKey::from_secret(secret.as_bytes()), users });
    let app = Router::new().route("/token", post(token)).with_state(backend);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:4900").await?;
    println!("tokens at http://{}/token", listener.local_addr()?);
    Ok(axum::serve(listener, app).await?)
}

async fn token(State(backend): State<Arc<Backend>>, Json(login): Json<Login>) -> Result<Json<String>, StatusCode> {
    if backend.users.get(login.user.as_str()).is_none_or(|password| *password != login.password) {
        return Err(StatusCode::UNAUTHORIZED);
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)?.as_secs();
    let claims = Claims { sub: login.user, aud: "millstream", iat: now, exp: now + TOKEN_LIFE.as_secs() };
    encode(&Header::default(), &claims, &backend.key).map(Json).map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)
}
