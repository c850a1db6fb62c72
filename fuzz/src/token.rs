//! Session tokens.

use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD as BASE64;
use jsonwebtoken::{Algorithm, EncodingKey};
use millstream_schemas::{AUDIENCE, Code};
use serde_json::Value;

use crate::cut::cut;

const SECRET: &[u8] = b"0123456789abcdef0123456789abcdef";
const ANOTHER: &[u8] = b"fedcba9876543210fedcba9876543210";
/// Clocks may differ by this much, in seconds: the edge's leeway, and a slow run.
const LEEWAY_SECONDS: u64 = 60;

/// A byte that says how it is signed, then the header and the claims, a line each; or the token itself. Only a token signed
/// with the secret by HS256 is accepted, and only for the user that it names, until it expires.
pub fn token(input: &[u8]) {
    let Some((how, Ok(text))) = input.split_first().map(|(how, text)| (how % 6, std::str::from_utf8(text))) else {
        return;
    };
    let (header, claims) = cut(text, '\n');
    let message = format!("{}.{}", BASE64.encode(header), BASE64.encode(claims));
    let token = match how {
        0 => text.to_owned(),
        1 => format!("{message}.{}", signature(&message, SECRET, Algorithm::HS256)),
        2 => format!("{message}.{}", signature(&message, ANOTHER, Algorithm::HS256)),
        3 => format!("{message}.{}", signature(&message, SECRET, Algorithm::HS512)),
        4 => format!("{message}."),
        // Signed, and then changed.
        _ => format!("{message}A.{}", signature(&message, SECRET, Algorithm::HS256)),
    };
    match millstream_edge::for_simulation::user(SECRET, &token) {
        Ok(user) => {
            let (message, signed) = token.rsplit_once('.').expect("three parts");
            assert_eq!(signature(message, SECRET, Algorithm::HS256), signed, "not signed with the secret: {token}");
            let (header, claims) = message.split_once('.').expect("three parts");
            let json = |part: &str| -> Value {
                serde_json::from_slice(&BASE64.decode(part).expect("base64")).expect("JSON in a part of the token")
            };
            let (header, claims) = (json(header), json(claims));
            assert_eq!(header["alg"], "HS256");
            assert_eq!(claims["sub"], *user);
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
            assert!(claims["exp"].as_f64().is_some_and(|exp| exp + LEEWAY_SECONDS as f64 > now as f64), "{claims}");
            assert!(
                claims["nbf"].is_null()
                    || claims["nbf"].as_f64().is_some_and(|nbf| nbf < (now + LEEWAY_SECONDS) as f64)
            );
            let is_ours = |audience: &Value| audience == AUDIENCE;
            let listed = claims["aud"].as_array().is_some_and(|listed| listed.iter().any(is_ours));
            assert!(is_ours(&claims["aud"]) || listed, "{claims}");
            assert!(!user.is_empty() && user.len() <= 128 && !user.chars().any(char::is_control));
        }
        Err((code, message)) => {
            assert!(matches!(code, Code::BadToken | Code::TokenExpired), "{code}");
            assert!(!message.contains("0123456789"));
        }
    }
}

fn signature(message: &str, secret: &[u8], algorithm: Algorithm) -> String {
    jsonwebtoken::crypto::sign(message.as_bytes(), &EncodingKey::from_secret(secret), algorithm).unwrap_or_default()
}
