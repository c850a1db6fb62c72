//! Log sequence numbers and positions.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// A place in Postgres' write-ahead log, in bytes. Ordered as a number; written as Postgres writes it: `16/B374D848`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Lsn(pub u64);

impl Lsn {
    /// Before everything.
    pub const ZERO: Lsn = Lsn(0);
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF)
    }
}

impl fmt::Debug for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The text is not a log sequence number such as `16/B374D848`.
#[derive(Debug, thiserror::Error)]
#[error("not a log sequence number: expected two hexadecimal numbers joined by '/', such as 16/B374D848")]
pub struct InvalidLsn;

impl FromStr for Lsn {
    type Err = InvalidLsn;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (high, low) = text.split_once('/').ok_or(InvalidLsn)?;
        let part = |digits: &str| {
            if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(InvalidLsn);
            }
            u64::from_str_radix(digits, 16).map_err(|_| InvalidLsn)
        };
        Ok(Lsn(part(high)? << 32 | part(low)?))
    }
}

impl Serialize for Lsn {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Lsn {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl JsonSchema for Lsn {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Lsn".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "type": "string",
            "pattern": "^[0-9A-F]{1,8}/[0-9A-F]{1,8}$",
            "description": "A place in Postgres' write-ahead log, as Postgres writes it"
        })
    }
}

/// A client's place in the outbound stream: everything up to and including message `stream_seq` has been applied.
///
/// `lsn` is the commit LSN that the stream holds at `stream_seq`. If the epoch differs, or the stream holds another LSN at
/// `stream_seq`, the history that the client knows is not the history of this stream, and it needs a new snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Position {
    /// Random id of the outbound stream's history.
    pub epoch: Uuid,
    /// Sequence of the message in `MS_WAL`.
    pub stream_seq: u64,
    /// Commit LSN of the transaction which that message belongs to.
    pub lsn: Lsn,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_is_numeric_not_textual() {
        let parse = |text: &str| text.parse::<Lsn>().unwrap();
        assert!(parse("0/9") < parse("0/10"));
        assert!(parse("9/FFFFFFFF") < parse("A/0"));
        assert_eq!(parse("16/B374D848").to_string(), "16/B374D848");
        for bad in ["", "/", "0/", "x/1", "0/123456789", "00", "+1/0"] {
            assert!(bad.parse::<Lsn>().is_err(), "{bad}");
        }
    }
}
