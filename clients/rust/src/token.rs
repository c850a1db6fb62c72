//! Where session tokens come from.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use data_encoding::BASE64URL_NOPAD;
use serde::Deserialize;
use tokio::time::timeout;

use crate::BoxError;

/// For the app to give a token.
const TOKEN_TIMEOUT: Duration = Duration::from_secs(60);

type TokenFuture = Pin<Box<dyn Future<Output = Result<String, BoxError>> + Send>>;

/// The user that a token says it is for, if it is a JSON Web Token (RFC 7519, `sub`). Only the edge can tell whether that is true.
pub(crate) fn subject(token: &str) -> Option<String> {
    #[derive(Deserialize)]
    struct Claims {
        sub: String,
    }
    let claims = token.split('.').nth(1)?;
    let claims = BASE64URL_NOPAD.decode(claims.trim_end_matches('=').as_bytes()).ok()?;
    serde_json::from_slice::<Claims>(&claims).ok().map(|claims| claims.sub)
}

/// A token that was set, or else one that the app is asked for.
#[derive(Default)]
pub(crate) struct Tokens {
    set: Mutex<Option<String>>,
    ask: Option<Box<dyn Fn() -> TokenFuture + Send + Sync>>,
}

impl Tokens {
    /// From now on the app is asked, once there is no token that was set.
    pub fn ask_with<F, Fut>(&mut self, ask: F)
    where
        F: Fn() -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<String, BoxError>> + Send + 'static,
    {
        self.ask = Some(Box::new(move || Box::pin(ask())));
    }

    /// This is the token.
    pub fn set(&self, token: String) {
        *self.set.lock().unwrap_or_else(PoisonError::into_inner) = Some(token);
    }

    /// The token that was set.
    pub fn given(&self) -> Option<String> {
        self.set.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The edge refused this token: it is not used again if the app can be asked for another.
    pub fn refused(&self, token: &str) {
        if self.ask.is_some() {
            self.set.lock().unwrap_or_else(PoisonError::into_inner).take_if(|set| set == token);
        }
    }

    /// The token to connect with.
    pub async fn get(&self) -> Result<String, BoxError> {
        let set = self.set.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match (set, &self.ask) {
            (Some(token), _) => Ok(token),
            (None, Some(ask)) => timeout(TOKEN_TIMEOUT, ask()).await.map_err(|_| "the app gave no token in time")?,
            (None, None) => Err("no token was given to the client".into()),
        }
    }
}
