//! Session tokens, as the application's backend signs them, for development and operations.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use jsonwebtoken::{EncodingKey, Header, encode};
use millstream_schemas::AUDIENCE;
use serde::Serialize;

/// How long a token lasts unless told otherwise.
pub const DEFAULT_LIFE: Duration = Duration::from_secs(24 * 60 * 60);

/// Signing failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot sign the token")]
pub struct SignError(#[source] jsonwebtoken::errors::Error);

/// A token for a user.
///
/// # Errors
/// It cannot be signed.
pub fn mint(secret: &str, user: &str, life: Duration) -> Result<String, SignError> {
    #[derive(Serialize)]
    struct Claims<'a> {
        sub: &'a str,
        aud: &'a str,
        iat: u64,
        exp: u64,
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let claims = Claims { sub: user, aud: AUDIENCE, iat: now, exp: now.saturating_add(life.as_secs()) };
    encode(&Header::default(), &claims, &EncodingKey::from_secret(secret.as_bytes())).map_err(SignError)
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
