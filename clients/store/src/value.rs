//! Between Postgres' text form and SQLite's values.

use millstream_client_core::types::{Kind, units};
use rusqlite::ToSql;
use rusqlite::types::{ToSqlOutput, Value, ValueRef};

/// A wire value, bound as its column stores it. What does not parse stays text: nothing the server says is lost.
pub(crate) struct Wire<'a> {
    pub kind: Kind,
    pub text: Option<&'a str>,
}

impl<'a> Wire<'a> {
    pub fn new(kind: Kind, value: &'a Option<String>) -> Self {
        Wire { kind, text: value.as_deref() }
    }
}

impl ToSql for Wire<'_> {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        let Some(text) = self.text else { return Ok(ToSqlOutput::Borrowed(ValueRef::Null)) };
        let parsed = match (self.kind, text) {
            (Kind::Bool, "t") => Some(Value::Integer(1)),
            (Kind::Bool, "f") => Some(Value::Integer(0)),
            (Kind::Units { scale, .. }, _) => units(text, scale).map(Value::Integer),
            (Kind::Integer, _) => text.parse().ok().map(Value::Integer),
            // SQLite has no NaN.
            (Kind::Real, _) => text.parse().ok().filter(|real: &f64| !real.is_nan()).map(Value::Real),
            (Kind::Bytes, _) => text.strip_prefix("\\x").and_then(unhex).map(Value::Blob),
            _ => None,
        };
        Ok(match parsed {
            Some(value) => ToSqlOutput::Owned(value),
            None => ToSqlOutput::Borrowed(ValueRef::Text(text.as_bytes())),
        })
    }
}

/// What a column of this kind is given for a text of the wire.
///
/// # Errors
/// There are none today.
pub fn bound(kind: Kind, text: &str) -> rusqlite::Result<Value> {
    match (Wire { kind, text: Some(text) }).to_sql()? {
        ToSqlOutput::Owned(value) => Ok(value),
        ToSqlOutput::Borrowed(value) => Ok(value.try_into()?),
        _ => Ok(Value::Null),
    }
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| (byte as char).to_digit(16).map(|digit| digit as u8);
    if !text.len().is_multiple_of(2) {
        return None;
    }
    text.as_bytes().chunks_exact(2).map(|pair| Some(digit(pair[0])? << 4 | digit(pair[1])?)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(kind: Kind, text: &str, expected: Value) {
        assert_eq!(bound(kind, text).unwrap(), expected);
    }

    #[test]
    fn wire_values_become_stored_values() {
        check(Kind::Bool, "t", Value::Integer(1));
        check(Kind::Bool, "f", Value::Integer(0));
        check(Kind::Bool, "?", Value::Text("?".into()));
        check(Kind::Integer, "-9223372036854775808", Value::Integer(i64::MIN));
        check(Kind::Real, "1e-05", Value::Real(1e-5));
        check(Kind::Real, "Infinity", Value::Real(f64::INFINITY));
        check(Kind::Real, "NaN", Value::Text("NaN".into()));
        check(Kind::Bytes, "\\x00ff", Value::Blob(vec![0, 255]));
        check(Kind::Bytes, "\\x0", Value::Text("\\x0".into()));
        check(Kind::Text, "1.50", Value::Text("1.50".into()));
        let units = Kind::Units { precision: 19, scale: 2 };
        check(units, "-1.50", Value::Integer(-150));
        check(units, "92233720368547758.08", Value::Text("92233720368547758.08".into()));
        check(units, "NaN", Value::Text("NaN".into()));
    }
}
