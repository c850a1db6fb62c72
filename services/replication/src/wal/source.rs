//! Where the change stream comes from: `DATABASE_URL` taken apart.

use std::str::FromStr;
use std::time::Duration;

use millstream_runtime::postgres::TEXT_SETTINGS;
use sqlx::postgres::PgConnectOptions;
use url::Url;

use super::tls::Tls;
use crate::error::Error;

/// The session's `wal_sender_timeout`: the server asks for a sign of life after half of it.
pub const WAL_SENDER_TIMEOUT: Duration = Duration::from_secs(20);
/// Longest slot name that Postgres takes.
const MAX_SLOT_NAME_BYTES: usize = 63;

/// Where the change stream comes from.
#[derive(Clone)]
pub struct Source {
    /// A folder with the server's socket if it begins with a slash.
    pub(super) host: String,
    pub(super) port: u16,
    pub(super) user: String,
    pub(super) password: String,
    pub(super) database: String,
    /// Settings of the session.
    pub(super) options: String,
    pub(super) tls: Tls,
    pub(super) slot: String,
    pub(super) publication: String,
}

impl std::fmt::Debug for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Source").field("slot", &self.slot).finish_non_exhaustive()
    }
}

impl Source {
    /// Takes the connection URL apart, as the ordinary connections do.
    pub fn new(database_url: &str, slot: &str, publication: &str) -> Result<Source, Error> {
        // The name goes into the replication command as it is.
        let named = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
        if slot.is_empty() || slot.len() > MAX_SLOT_NAME_BYTES || !slot.bytes().all(named) {
            return Err(Error::Config(format!(
                "slot name {slot:?}: 1 to {MAX_SLOT_NAME_BYTES} lower-case letters, digits and underscores"
            )));
        }
        // The URL may hold a password, so it is not repeated.
        let url = Url::parse(database_url).map_err(|error| Error::Config(format!("DATABASE_URL: {error}")))?;
        if !matches!(url.scheme(), "postgres" | "postgresql") {
            return Err(Error::Config("DATABASE_URL: expected postgres://user:password@host:port/database".into()));
        }
        let parsed = PgConnectOptions::from_str(database_url)
            .map_err(|error| Error::Config(format!("DATABASE_URL: {error}")))?;
        let parameter = |names: &[&str]| {
            let named = url.query_pairs().filter(|(key, _)| names.contains(&key.as_ref()));
            named.last().map(|(_, value)| value.into_owned())
        };
        let socket = parsed.get_socket().map(|path| path.to_string_lossy().into_owned());
        let host = socket.unwrap_or_else(|| parsed.get_host().trim_matches(['[', ']']).to_owned());
        let user = parsed.get_username().to_owned();
        let password = parameter(&["password"]).or_else(|| url.password().map(decode));
        let password = password.or_else(|| std::env::var("PGPASSWORD").ok()).unwrap_or_default();
        let mut options = String::new();
        for (name, value) in TEXT_SETTINGS {
            options.push_str(&format!("-c {name}={value} "));
        }
        options.push_str(&format!("-c wal_sender_timeout={}", WAL_SENDER_TIMEOUT.as_millis()));
        let file = |names: &[&str], variable| parameter(names).or_else(|| std::env::var(variable).ok());
        Ok(Source {
            port: parsed.get_port(),
            database: parsed.get_database().unwrap_or(&user).to_owned(),
            tls: Tls {
                mode: parsed.get_ssl_mode(),
                root: file(&["sslrootcert", "ssl-root-cert", "ssl-ca"], "PGSSLROOTCERT"),
                certificate: file(&["sslcert", "ssl-cert"], "PGSSLCERT"),
                key: file(&["sslkey", "ssl-key"], "PGSSLKEY"),
            },
            host,
            user,
            password,
            options,
            slot: slot.to_owned(),
            publication: publication.to_owned(),
        })
    }
}

fn decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        rest = tail;
        let escaped = (byte == b'%').then(|| rest.split_first_chunk::<2>()).flatten().and_then(|(digits, tail)| {
            let byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
            Some((byte, tail))
        });
        match escaped {
            Some((byte, tail)) => {
                bytes.push(byte);
                rest = tail;
            }
            None => bytes.push(byte),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use millstream_runtime::error::chain;

    use super::*;

    #[test]
    fn urls_are_taken_apart() {
        let check = |url: &str, expected: (&str, u16, &str, &str, &str)| {
            let source = Source::new(url, "millstream", "millstream").unwrap();
            let found = (
                source.host.as_str(),
                source.port,
                source.user.as_str(),
                source.password.as_str(),
                source.database.as_str(),
            );
            assert_eq!(found, expected);
        };
        check("postgres://u:p%40%2F%25@db.example:6000/app", ("db.example", 6000, "u", "p@/%", "app"));
        check("postgresql://u:p@localhost", ("localhost", 5432, "u", "p", "u"));
        check("postgres:///app?host=/run/pg&port=7&user=u&password=p", ("/run/pg", 7, "u", "p", "app"));
        check("postgres://u:p@[::1]:5/a%20b", ("::1", 5, "u", "p", "a b"));
        check("postgres://u:100%@h/d", ("h", 5432, "u", "100%", "d"));
    }

    #[test]
    fn bad_settings_are_refused() {
        let url = "postgres://u:p@h/d";
        for slot in ["", "Upper", "a-b", "a;b", "é", &"x".repeat(64)] {
            assert!(Source::new(url, slot, "p").is_err(), "{slot}");
        }
        assert!(Source::new(url, &"x".repeat(63), "p").is_ok());
        for url in ["", "mysql://u@h/d", "postgres://u@h/d?sslmode=maybe", "postgres://u@h/d?port=x"] {
            assert!(Source::new(url, "s", "p").is_err(), "{url}");
        }
        for mode in ["disable", "allow", "prefer", "require", "verify-ca", "verify-full"] {
            assert!(Source::new(&format!("{url}?sslmode={mode}"), "s", "p").is_ok(), "{mode}");
        }
    }

    #[test]
    fn errors_do_not_repeat_the_password() {
        for url in ["postgres://u:hush@h:x/d", "postgres://u:hush@h/d?sslmode=maybe", "mysql://u:hush@h/d"] {
            let error = Source::new(url, "s", "p").unwrap_err();
            assert!(!chain(&error).contains("hush"), "{}", chain(&error));
        }
    }
}
