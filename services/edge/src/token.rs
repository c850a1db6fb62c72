//! Session tokens: JSON Web Tokens, HS256, audience `millstream`, `sub` = user id, `exp` required, `iat` advised.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::{Algorithm, DecodingKey, Validation, decode, decode_header};
use millstream_schemas::{AUDIENCE, Code};
use serde::Deserialize;

/// Shortest secret, in bytes: RFC 7518 section 3.2 asks for a key as long as the hash.
pub const MIN_SECRET_BYTES: usize = 32;
/// Clocks may differ by this much, in seconds: a token is good this long behind its `exp`.
const LEEWAY_SECONDS: u64 = 30;
/// A session that may last longer is looked at again by then.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 3_600);
/// Longest user id, in bytes: it becomes part of a subject.
const MAX_USER_ID_BYTES: usize = millstream_schemas::subject::MAX_SCOPE_ID_BYTES;

#[derive(Deserialize)]
struct Claims {
    sub: String,
    exp: f64,
    iat: Option<f64>,
}

/// Who a session is, and for how long.
#[derive(Clone, Debug, PartialEq)]
pub struct Identity {
    /// The user.
    pub user_id: String,
    /// How long the token is good, leeway included.
    pub left: Duration,
    /// When the token was issued, in seconds since 1970; none if it does not say.
    pub issued: Option<f64>,
}

/// Checks tokens against one secret.
pub struct Verifier {
    key: DecodingKey,
    validation: Validation,
}

impl Verifier {
    /// A verifier for tokens signed with `secret`.
    pub fn new(secret: &[u8]) -> Self {
        let mut validation = Validation::new(Algorithm::HS256);
        validation.set_audience(&[AUDIENCE]);
        validation.set_required_spec_claims(&["exp", "aud", "sub"]);
        validation.validate_nbf = true;
        validation.leeway = LEEWAY_SECONDS;
        Verifier { key: DecodingKey::from_secret(secret), validation }
    }

    /// The user that a valid token names.
    ///
    /// # Errors
    /// `token_expired`, or `bad_token` for everything else, with a text for the client that tells nothing of the secret.
    pub fn user(&self, token: &str) -> Result<Identity, (Code, &'static str)> {
        // RFC 7515, 4.1.11: whoever does not understand a critical header refuses the token.
        if decode_header(token).is_ok_and(|header| header.crit.is_some()) {
            return Err((Code::BadToken, "the token has a `crit` header, of which this server understands none"));
        }
        let claims = decode::<Claims>(token, &self.key, &self.validation).map_err(|error| match error.kind() {
            ErrorKind::ExpiredSignature => (Code::TokenExpired, "the token has expired; connect with a new one"),
            ErrorKind::InvalidAudience => (Code::BadToken, "the token is for another audience than `millstream`"),
            ErrorKind::MissingRequiredClaim(_) => (Code::BadToken, "the token needs the claims sub, aud and exp"),
            _ => (Code::BadToken, "the token is malformed or not signed with this server's secret (HS256)"),
        })?;
        let user = claims.claims.sub;
        if user.is_empty() || user.len() > MAX_USER_ID_BYTES || user.chars().any(char::is_control) {
            return Err((Code::BadToken, "the token's `sub` must be 1 to 128 bytes without control characters"));
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        let left = (claims.claims.exp + LEEWAY_SECONDS as f64 - now).clamp(0.0, LONGEST.as_secs_f64());
        Ok(Identity { user_id: user, left: Duration::from_secs_f64(left), issued: claims.claims.iat })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use jsonwebtoken::{EncodingKey, Header, encode};

    const SECRET: &[u8] = b"0123456789abcdef0123456789abcdef";
    const FUTURE: u64 = 4_000_000_000;

    fn check(algorithm: Algorithm, secret: &[u8], claims: serde_json::Value) -> Result<String, Code> {
        let token = encode(&Header::new(algorithm), &claims, &EncodingKey::from_secret(secret)).unwrap();
        Verifier::new(SECRET).user(&token).map(|identity| identity.user_id).map_err(|(code, _)| code)
    }

    #[test]
    fn only_complete_fresh_tokens_pass() {
        let good = serde_json::json!({"sub": "alice", "aud": "millstream", "exp": FUTURE});
        assert_eq!(check(Algorithm::HS256, SECRET, good.clone()), Ok("alice".to_owned()));
        assert_eq!(check(Algorithm::HS256, b"another", good.clone()), Err(Code::BadToken));
        assert_eq!(check(Algorithm::HS512, SECRET, good.clone()), Err(Code::BadToken));
        let with = |key: &str, value: serde_json::Value| {
            let mut claims = good.clone();
            claims[key] = value;
            check(Algorithm::HS256, SECRET, claims)
        };
        assert_eq!(with("exp", 1.into()), Err(Code::TokenExpired));
        assert_eq!(with("exp", "never".into()), Err(Code::BadToken));
        assert_eq!(with("exp", serde_json::Value::Null), Err(Code::BadToken));
        assert_eq!(with("iat", "x".into()), Err(Code::BadToken));
        assert_eq!(with("nbf", FUTURE.into()), Err(Code::BadToken));
        assert_eq!(with("aud", "other".into()), Err(Code::BadToken));
        assert_eq!(with("sub", "".into()), Err(Code::BadToken));
        assert_eq!(with("sub", "x".repeat(129).into()), Err(Code::BadToken));
        assert_eq!(with("sub", "a\nb".into()), Err(Code::BadToken));
        for text in ["", "a.b.c", "eyJhbGciOiJub25lIn0.eyJzdWIiOiJhIn0."] {
            assert!(Verifier::new(SECRET).user(text).is_err());
        }
    }
}
