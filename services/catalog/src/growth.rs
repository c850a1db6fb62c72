//! How much longer a value may become when Postgres writes it than it was sent: found once for each column, by what its type
//! is made of. A change of a few bytes must not become megabytes for everybody who may read its row.
//!
//! Only what has no small bound is counted. Left out are constant factors, such as `now` in an array of times, or the
//! spaces of `jsonb`: nothing there becomes more than some ten times longer, and what is sent is bounded.

use std::collections::HashMap;

use sqlx::{PgConnection, Row};

/// Largest exponent that Postgres' `numeric` takes (PostgreSQL documentation, "Numeric Types").
const MAX_EXPONENT: usize = 131_072;
/// Deepest nesting of types that is told apart; what is nested deeper is refused from the first byte on.
const MAX_NESTING: u32 = 24;

/// How much longer the values of a column may become when Postgres writes them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Growth {
    /// Its numbers may have exponents: `1e131071` is written with 131,072 digits.
    pub exponents: bool,
    /// It is JSON and nothing around it, so that double quotes begin and end strings, in which there are no numbers.
    pub is_json: bool,
    /// Most bytes that are added to each part of it: the blanks of `char(n)`, the decimals of `numeric(p, s)`.
    pub each: usize,
    /// How many types with elements, attributes or bounds are in each other: each doubles the quotes of those in it.
    pub nesting: u32,
}

impl Growth {
    /// At most how many bytes longer the value may become (see the module for what is left out).
    pub fn of(&self, value: &str) -> usize {
        let digits = if self.exponents { self.digits(value) } else { 0 };
        let parts = match (self.each, self.nesting) {
            (0, _) => 0,
            (_, 0) => 1,
            (_, _) => 1 + value.bytes().filter(|byte| *byte == b',').count(),
        };
        let quotes = if self.nesting < 2 { 0 } else { value.len() << self.nesting };
        digits.saturating_add(parts.saturating_mul(self.each)).saturating_add(quotes)
    }

    /// How many digits Postgres may write for the numbers that are given with an exponent.
    fn digits(&self, value: &str) -> usize {
        if !value.as_bytes().contains(&b'e') && !value.as_bytes().contains(&b'E') {
            return 0;
        }
        let (mut in_string, mut escaped) = (false, false);
        let mut bytes = value
            .bytes()
            .filter(|byte| {
                if !self.is_json {
                    // Elements, attributes and bounds may be quoted anywhere, and numbers of Postgres 16 be grouped.
                    return !matches!(byte, b'"' | b'\\' | b'_');
                }
                let outside = !in_string && *byte != b'"';
                match byte {
                    _ if escaped => escaped = false,
                    b'\\' => escaped = in_string,
                    b'"' => in_string = !in_string,
                    _ => {}
                }
                outside
            })
            .peekable();
        let (mut digits, mut before) = (0_usize, b' ');
        while let Some(byte) = bytes.next() {
            if matches!(byte, b'e' | b'E') && (before.is_ascii_digit() || before == b'.') {
                bytes.next_if(|sign| matches!(sign, b'+' | b'-'));
                let mut exponent = 0;
                while let Some(digit) = bytes.next_if(u8::is_ascii_digit) {
                    exponent = (exponent * 10 + usize::from(digit - b'0')).min(MAX_EXPONENT);
                }
                digits = digits.saturating_add(exponent);
            }
            before = byte;
        }
        digits
    }
}

/// The types that the columns of a table are made of: base types of domains, elements, attributes, bounds. Types cannot contain
/// themselves. `numeric(p, s)` is `(p << 16 | s & 2047) + 4`, with a sign in `s`; `char(n)` is `n + 4`.
const GROWTH: &str = "\
WITH RECURSIVE parts (attnum, type, typmod, nesting) AS (
    SELECT attnum, atttypid, atttypmod, 0 FROM pg_attribute
    WHERE attrelid = $1::int8::oid AND attnum > 0 AND NOT attisdropped
  UNION
    SELECT p.attnum, inside.type, inside.typmod, p.nesting + inside.level
    FROM parts p JOIN pg_type t ON t.oid = p.type, LATERAL (
        SELECT t.typbasetype, t.typtypmod, 0 WHERE t.typtype = 'd'
        UNION ALL SELECT t.typelem, p.typmod, 1 WHERE t.typelem <> 0 AND t.typlen = -1
        UNION ALL SELECT a.atttypid, a.atttypmod, 1 FROM pg_attribute a
            WHERE t.typtype = 'c' AND a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped
        UNION ALL SELECT r.rngsubtype, -1, 1 FROM pg_range r WHERE t.oid IN (r.rngtypid, r.rngmultitypid)
    ) AS inside (type, typmod, level)
)
SELECT attnum AS number,
       bool_or(type IN ('numeric'::regtype, 'jsonb'::regtype, 'jsonpath'::regtype)) AS exponents,
       bool_or(type = 'jsonb'::regtype AND nesting = 0) AS is_json,
       max(CASE
           WHEN typmod < 4 THEN 0
           WHEN type = 'bpchar'::regtype THEN typmod - 4
           -- Also the point, and a zero before it.
           WHEN type = 'numeric'::regtype THEN greatest((((typmod - 4) & 2047) # 1024) - 1024, 0) + 2
           ELSE 0
       END) AS each,
       max(nesting) AS nesting
FROM parts GROUP BY attnum";

/// Of the columns of a table, by attribute number.
pub(crate) async fn read(connection: &mut PgConnection, table: i64) -> Result<HashMap<i16, Growth>, sqlx::Error> {
    let rows = sqlx::query(GROWTH).bind(table).fetch_all(connection).await?;
    let growth = |row: &sqlx::postgres::PgRow| {
        Ok((
            row.try_get("number")?,
            Growth {
                exponents: row.try_get("exponents")?,
                is_json: row.try_get("is_json")?,
                each: usize::try_from(row.try_get::<i32, _>("each")?).unwrap_or_default(),
                nesting: u32::try_from(row.try_get::<i32, _>("nesting")?).unwrap_or_default().min(MAX_NESTING),
            },
        ))
    };
    rows.iter().map(growth).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_out_is_counted() {
        let none = Growth::default();
        let numeric = Growth { exponents: true, ..none };
        let json = Growth { is_json: true, ..numeric };
        let array = Growth { nesting: 1, ..numeric };
        let scaled = Growth { each: 1002, ..numeric };
        let padded = Growth { each: 100, ..none };
        for (growth, value, bytes) in [
            (none, "1e131071", 0),
            (numeric, "1e5", 5),
            (numeric, "NaN", 0),
            (numeric, "-1.E+131071", 131_071),
            (numeric, "1e-16383", 16_383),
            (numeric, "1e1_0", 10),
            (json, "", 0),
            (json, "e9", 0),
            (json, r#"[1E+20, 2.e-3, "9e9", "\"9e9", 1e1]"#, 24),
            (json, r#"{"1e9": "\\", "b": 1e4}"#, 4),
            (json, "1e9999999", MAX_EXPONENT),
            (json, "1e99999999999999999999999", MAX_EXPONENT),
            (json, "\"é1e2é\\", 0),
            // Quotes and escapes of arrays, composites and ranges may be anywhere.
            (array, r#"{1e5,"1e5"}"#, 10),
            (array, r#"{1\e5,"1e\5",(1"e"5)}"#, 15),
            (array, r#"{"{\"a\": 1e5, \"1e7\": 0}"}"#, 12),
            (scaled, "1", 1002),
            (Growth { nesting: 1, ..scaled }, "{0,0,{0}}", 3 * 1002),
            (padded, "a,b", 100),
            (Growth { nesting: 1, ..padded }, "{a,b}", 200),
            // Quotes within quotes within quotes.
            (Growth { nesting: 2, ..none }, "{\"( )\"}", 4 * 7),
            (Growth { nesting: 3, ..none }, "(\"{( )}\")", 8 * 9),
        ] {
            assert_eq!(growth.of(value), bytes, "{value} {growth:?}");
        }
    }
}
