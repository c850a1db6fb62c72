//! Which of two changes to a column is the newer one: the order of last-writer-wins.
//!
//! A change carries a stamp from its client's hybrid logical clock (source: Kulkarni et al., "Logical Physical Clocks and
//! Consistent Snapshots in Globally Distributed Databases", 2014): the time of the edit, or one more than the newest
//! stamp that the client has seen. Ties are broken by the client, its `client_seq` and the change's place in its
//! transaction, so that every replica decides alike.
//!
//! A table that merges by column keeps the clocks of its rows in `field_clocks`, a JSON object: column name to clock, and
//! under the empty name the clock of every column without one of its own. Clocks are texts that sort as they compare.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use uuid::Uuid;

/// How far ahead of the server's time a stamp may be, in microseconds; beyond, it is taken for that much ahead.
pub const MAX_AHEAD_MICROS: u64 = 60_000_000;
/// Name of the column that holds [`Clocks`].
pub const FIELD_CLOCKS: &str = "field_clocks";
/// Name of the column with the time of a row's newest change; it orders changes where a table merges by row.
pub const UPDATED_AT: &str = "updated_at";
/// Name of the column with the client that made it; null for other writers.
pub const CLIENT_ID: &str = "client_id";

/// Place of a change in the order of all changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Clock {
    /// Microseconds since 1970.
    pub stamp: u64,
    /// The client; nil for writers other than clients.
    pub client_id: Uuid,
    /// Its `client_seq`.
    pub client_seq: u64,
    /// Index of the change in its transaction.
    pub index: u32,
}

/// Written with fixed widths: stamp, client, sequence, index.
impl fmt::Display for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016}-{}-{:012}-{:04}", self.stamp, self.client_id.as_simple(), self.client_seq, self.index)
    }
}

/// The text is not a clock.
#[derive(Debug, thiserror::Error)]
#[error("not a clock: stamp-client-sequence-index")]
pub struct InvalidClock;

impl FromStr for Clock {
    type Err = InvalidClock;

    fn from_str(text: &str) -> Result<Self, InvalidClock> {
        let mut parts = text.split('-');
        let mut part = || parts.next().ok_or(InvalidClock);
        Ok(Clock {
            stamp: part()?.parse().map_err(|_| InvalidClock)?,
            client_id: part()?.parse().map_err(|_| InvalidClock)?,
            client_seq: part()?.parse().map_err(|_| InvalidClock)?,
            index: part()?.parse().map_err(|_| InvalidClock)?,
        })
    }
}

/// The clocks of a row.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Clocks(BTreeMap<String, Clock>);

impl Clocks {
    /// Reads the column's text; what is not a clock counts as the oldest.
    pub fn parse(text: &str) -> Clocks {
        let texts: BTreeMap<String, String> = serde_json::from_str(text).unwrap_or_default();
        Clocks(texts.into_iter().filter_map(|(column, text)| Some((column, text.parse().ok()?))).collect())
    }

    /// The clock of a column.
    pub fn of(&self, column: &str) -> Clock {
        self.0.get(column).or_else(|| self.0.get("")).copied().unwrap_or_default()
    }

    /// The newest clock of the row.
    pub fn newest(&self) -> Clock {
        self.0.values().max().copied().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_sort_as_clocks_compare() {
        let (a, b) = (Uuid::from_u128(1), Uuid::from_u128(u128::MAX));
        let clock = |stamp, client_id, client_seq, index| Clock { stamp, client_id, client_seq, index };
        let rising = [
            clock(0, Uuid::nil(), 0, 0),
            clock(9, b, 1, 0),
            clock(10, a, 11, 0),
            clock(10, b, 9, 2),
            clock(10, b, 9, 10),
            clock(10, b, 10, 0),
            clock(1_764_110_000_123_456, a, 1, 0),
        ];
        for pair in rising.windows(2) {
            assert!(pair[0] < pair[1] && pair[0].to_string() < pair[1].to_string(), "{} {}", pair[0], pair[1]);
        }
        for clock in rising {
            assert_eq!(clock.to_string().parse::<Clock>().ok(), Some(clock));
        }
    }

    #[test]
    fn columns_without_a_clock_have_the_rows() {
        let (old, new) = (Clock { stamp: 1, ..Clock::default() }, Clock { stamp: 2, ..Clock::default() });
        let clocks = Clocks::parse(&format!(r#"{{"": "{old}", "title": "{new}"}}"#));
        assert_eq!((clocks.of("title"), clocks.of("done"), clocks.newest()), (new, old, new));
        assert_eq!(Clocks::parse("{}").of("title"), Clock::default());
        assert_eq!(Clocks::parse("rubbish").newest(), Clock::default());
        assert_eq!(Clocks::parse(r#"{"title": "rubbish"}"#).of("title"), Clock::default());
    }
}
