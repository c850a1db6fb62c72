//! Names on the broker: streams, subjects, partitions, scopes.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Stream of submitted changes, subjects `ms.changes.{partition}`.
pub const CHANGES_STREAM: &str = "MS_CHANGES";
/// Stream of committed transactions, subjects `ms.wal.…`.
pub const WAL_STREAM: &str = "MS_WAL";
/// Stream of results, subjects `ms.results.{client_id}`.
pub const RESULTS_STREAM: &str = "MS_RESULTS";

/// All subjects of [`CHANGES_STREAM`].
pub const CHANGES_SUBJECTS: &str = "ms.changes.*";
/// All subjects of [`WAL_STREAM`].
pub const WAL_SUBJECTS: &str = "ms.wal.>";
/// All subjects of [`RESULTS_STREAM`].
pub const RESULTS_SUBJECTS: &str = "ms.results.*";
/// Transactions that changed no synced row but settle a client's changes, and the starts of epochs.
pub const WAL_ORIGIN: &str = "ms.wal.origin";
/// Request subject on which replication answers with a [`crate::stream::Watermark`].
pub const WATERMARK: &str = "ms.replication.watermark";

/// Number of partitions of [`CHANGES_STREAM`]; fixed for the life of a stream, since the messages of one client must
/// stay in one partition.
pub const PARTITIONS: u16 = 64;

/// The partition of a client: FNV-1a (32 bits) of the client id's lower-case hyphenated text, its upper half folded onto
/// the lower one by exclusive or, modulo [`PARTITIONS`]. Source of the hash: Fowler, Noll, Vo, <http://www.isthe.com/chongo/tech/comp/fnv/>.
pub fn partition(client_id: Uuid) -> u16 {
    let mut text = Uuid::encode_buffer();
    let hash = client_id
        .as_hyphenated()
        .encode_lower(&mut text)
        .bytes()
        .fold(0x811C_9DC5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    ((hash ^ (hash >> 16)) % u32::from(PARTITIONS)) as u16
}

/// Subject of a partition of [`CHANGES_STREAM`].
pub fn changes(partition: u16) -> String {
    format!("ms.changes.{partition}")
}

/// Request subject of the external validators of a table.
pub fn validate(table: &str) -> String {
    format!("ms.validate.{table}")
}

/// Subject of a client's results.
pub fn results(client_id: Uuid) -> String {
    format!("ms.results.{client_id}")
}

/// Kind of the scope that carries a user's own rows and memberships.
pub const USER_KIND: &str = "user";
/// Kind of the one scope that every user may read.
pub const GLOBAL_KIND: &str = "global";
/// The id in [`Scope::global`].
const GLOBAL_ID: &str = "all";
/// Longest scope id in bytes; keeps subjects short.
pub const MAX_SCOPE_ID_BYTES: usize = 128;

/// The unit of partial replication and of read permission: all rows that share one value of a scope key.
/// Written `kind:id`, such as `project:0190…`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Scope {
    /// `user`, `global` or a declared kind: a lower-case identifier.
    pub kind: String,
    /// Value of the scope key, as Postgres writes it.
    pub id: String,
}

impl Scope {
    /// A scope of a kind.
    pub fn new(kind: impl Into<String>, id: impl Into<String>) -> Self {
        Scope { kind: kind.into(), id: id.into() }
    }

    /// Whether a subject can carry an id; a row's that does not fit names no scope.
    pub fn fits(id: &str) -> bool {
        !id.is_empty() && id.len() <= MAX_SCOPE_ID_BYTES
    }

    /// The scope of a user's own rows.
    pub fn user(user_id: impl Into<String>) -> Self {
        Scope::new(USER_KIND, user_id)
    }

    /// The scope that every user may read.
    pub fn global() -> Self {
        Scope::new(GLOBAL_KIND, GLOBAL_ID)
    }

    /// Its subject in [`WAL_STREAM`]. Characters of the id other than ASCII letters, digits, `-` and `_` are written
    /// `=XX` (hexadecimal), so that any text is one token.
    pub fn subject(&self) -> String {
        let mut subject = String::with_capacity(8 + self.kind.len() + self.id.len());
        subject.push_str("ms.wal.");
        subject.push_str(&self.kind);
        subject.push('.');
        for byte in self.id.bytes() {
            if byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_' {
                subject.push(char::from(byte));
            } else {
                subject.push_str(&format!("={byte:02X}"));
            }
        }
        subject
    }

    /// The scope of a subject in [`WAL_STREAM`]; none for [`WAL_ORIGIN`] and foreign subjects.
    pub fn from_subject(subject: &str) -> Option<Scope> {
        let (kind, token) = subject.strip_prefix("ms.wal.")?.split_once('.')?;
        let mut id = Vec::with_capacity(token.len());
        let mut bytes = token.bytes();
        while let Some(byte) = bytes.next() {
            if byte == b'=' {
                let digits = [bytes.next()?, bytes.next()?];
                id.push(u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?);
            } else {
                id.push(byte);
            }
        }
        Some(Scope::new(kind, String::from_utf8(id).ok()?))
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.kind, self.id)
    }
}

impl fmt::Debug for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The text is not a scope such as `project:0190…`.
#[derive(Debug, thiserror::Error)]
#[error("not a scope: expected kind:id, with a lower-case kind and an id of 1 to {MAX_SCOPE_ID_BYTES} bytes")]
pub struct InvalidScope;

impl FromStr for Scope {
    type Err = InvalidScope;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (kind, id) = text.split_once(':').ok_or(InvalidScope)?;
        let kind_ok = kind.len() <= 63
            && kind.starts_with(|c: char| c.is_ascii_lowercase())
            && kind.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
        if !kind_ok || id.is_empty() || id.len() > MAX_SCOPE_ID_BYTES {
            return Err(InvalidScope);
        }
        Ok(Scope::new(kind, id))
    }
}

impl Serialize for Scope {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Scope {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl JsonSchema for Scope {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Scope".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "type": "string",
            "pattern": "^[a-z][a-z0-9_]{0,62}:.+$",
            "description": "A scope: kind:id"
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes_survive_their_subject() {
        for id in ["alice", "a.b c>*", "0190f3c2-7d1e-7000-8000-000000000001", "müller@example.org", "=41"] {
            let scope = Scope::new("project", id);
            let subject = scope.subject();
            assert_eq!(subject.split('.').count(), 4, "{subject}");
            assert!(!subject[7..].contains(['*', '>', ' ']), "{subject}");
            assert_eq!(Scope::from_subject(&subject), Some(scope.clone()));
            assert_eq!(scope.to_string().parse::<Scope>().unwrap(), scope);
        }
        assert_eq!(Scope::from_subject(WAL_ORIGIN), None);
        assert!("project:".parse::<Scope>().is_err());
        assert!("Project:1".parse::<Scope>().is_err());
        assert!(format!("p:{}", "x".repeat(MAX_SCOPE_ID_BYTES + 1)).parse::<Scope>().is_err());
        assert!(format!("p:{}", "x".repeat(MAX_SCOPE_ID_BYTES)).parse::<Scope>().is_ok());
    }

    #[test]
    fn partitions_are_pinned() {
        // Part of the contract: other languages compute the same.
        let id = Uuid::parse_str("0190f3c2-7d1e-7000-8000-000000000001").unwrap();
        assert_eq!(partition(id), 29);
        let mut used = std::collections::BTreeSet::new();
        for n in 0..4096_u128 {
            used.insert(partition(Uuid::from_u128(n << 64 | n)));
        }
        assert_eq!(used.len(), usize::from(PARTITIONS));
    }
}
