//! How the values of Postgres' types are kept by SQLite, and how they leave it.

use millstream_schemas::spelling::decimals;
use millstream_schemas::{ColumnSchema, Numeric};

use crate::sql::literal;

/// Most digits of which every number has 64 bits.
pub(crate) const MAX_DIGITS: u32 = 18;

/// How SQLite stores the values of a column.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// 0 and 1; `f` and `t` on the wire.
    Bool,
    /// 64 bits.
    Integer,
    /// 64 bits; `NaN`, which SQLite lacks, stays text.
    Real,
    /// The smallest units of a `numeric(precision, scale)`, as 64 bits: 1250 for 12.50. What has no place in these stays text.
    Units {
        /// Number of all digits.
        precision: u32,
        /// Number of digits behind the point.
        scale: u32,
    },
    /// Bytes; `\x…` on the wire.
    Bytes,
    /// Everything else, as Postgres writes it: exact for `numeric`, times, JSON and arrays.
    Text,
}

impl Kind {
    /// Of a column, by its type, as `format_type` names it, and what is declared.
    pub fn of(column: &ColumnSchema) -> Kind {
        match (column.numeric, column.r#type.as_str()) {
            (Some(Numeric::Real), _) => Kind::Real,
            (Some(Numeric::Integer), r#type) => {
                decimals(r#type).map_or(Kind::Text, |(precision, scale)| Kind::Units { precision, scale })
            }
            (_, "boolean") => Kind::Bool,
            (_, "smallint" | "integer" | "bigint") => Kind::Integer,
            (_, "real" | "double precision") => Kind::Real,
            (_, "bytea") => Kind::Bytes,
            _ => Kind::Text,
        }
    }

    /// A value in Postgres' text form as SQL of SQLite; none if it is none of this kind.
    pub(crate) fn literal(self, text: &str) -> Option<String> {
        let is_hex = |digits: &&str| digits.bytes().all(|b| b.is_ascii_hexdigit()) && digits.len().is_multiple_of(2);
        match self {
            Kind::Bool => Some(if text == "t" { "1" } else { "0" }.to_owned()),
            Kind::Integer => text.parse::<i64>().ok().map(|number| number.to_string()),
            Kind::Units { scale, .. } => units(text, scale).map(|number| number.to_string()),
            Kind::Real => {
                text.parse::<f64>().ok().filter(|number| number.is_finite()).map(|number| format!("{number:e}"))
            }
            Kind::Bytes => text.strip_prefix("\\x").filter(is_hex).map(|digits| format!("x'{digits}'")),
            Kind::Text => Some(literal(text)),
        }
    }

    /// The declared type. `INT`, because `INTEGER` would make a sole key column an alias of the rowid, which SQLite fills in.
    pub(crate) fn declaration(self) -> &'static str {
        match self {
            // SQLite would make a rounded number of text that has no place in 64 bits.
            Kind::Units { precision, .. } if precision > MAX_DIGITS => "BLOB",
            Kind::Bool | Kind::Integer | Kind::Units { .. } => "INT",
            Kind::Real => "REAL",
            Kind::Bytes => "BLOB",
            Kind::Text => "TEXT",
        }
    }
}

/// How many of the smallest units a decimal number is, in Postgres' text form; none if that has no place in 64 bits, or is no such number.
pub fn units(text: &str, scale: u32) -> Option<i64> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let digits = whole.strip_prefix('-').unwrap_or(whole);
    if digits.is_empty() || fraction.len() > scale as usize || !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    format!("{whole}{fraction:0<width$}", width = scale as usize).parse().ok()
}

/// SQL that gives the Postgres text form of a stored value. Of [`Kind::Real`] it calls `millstream_double`.
///
/// `|| ''` takes from a value what it has besides its bytes: what a JSON function gave (`json_set`, `->`) carries a subtype to
/// wherever it goes within the statement, also through CAST, and `json_quote` would take it for JSON instead of quoting it
/// (SQLite documentation, "The JSON subtype").
pub fn text_expr(kind: Kind, value: &str) -> String {
    let text = format!("(CAST({value} AS TEXT) || '')");
    match kind {
        Kind::Bool => format!(
            "CASE WHEN {value} IS NULL THEN NULL WHEN {value} IN (1, 't', 'true') THEN 't' WHEN {value} IN (0, 'f', 'false') THEN 'f' ELSE {text} END"
        ),
        Kind::Integer | Kind::Text => text,
        Kind::Units { scale: 0, .. } => text,
        Kind::Units { scale, .. } => {
            let (digits, least) = (format!("ltrim({text}, '-')"), scale + 1);
            let digits = format!(
                "substr('{0:0<least$}', 1, {least} - length({digits})) || {digits}",
                "",
                least = least as usize
            );
            format!(
                "CASE WHEN typeof({value}) = 'integer' THEN iif({value} < 0, '-', '') || substr({digits}, 1, length({digits}) - {scale}) \
                 || '.' || substr({digits}, -{scale}) ELSE {text} END"
            )
        }
        // SQLite prints other digits than Postgres.
        Kind::Real => format!("iif(typeof({value}) = 'real', millstream_double({value}), {text})"),
        Kind::Bytes => format!("CASE WHEN {value} IS NULL THEN NULL ELSE '\\x' || lower(hex({value})) END"),
    }
}

#[cfg(test)]
mod tests {
    use millstream_schemas::spelling::double;
    use rusqlite::Connection;
    use rusqlite::functions::FunctionFlags;

    use super::*;

    #[track_caller]
    fn check(kind: Kind, stored: &str, expected: Option<&str>) {
        let connection = Connection::open_in_memory().unwrap();
        connection
            .create_scalar_function("millstream_double", 1, FunctionFlags::empty(), |of| Ok(double(of.get(0)?)))
            .unwrap();
        let sql = format!("SELECT {} FROM (SELECT {stored} AS v)", text_expr(kind, "v"));
        let text: Option<String> = connection.query_row(&sql, [], |row| row.get(0)).unwrap();
        assert_eq!(text.as_deref(), expected, "{stored}");
    }

    #[test]
    fn values_leave_in_postgres_text_form() {
        for kind in [Kind::Bool, Kind::Integer, Kind::Real, Kind::Bytes, Kind::Text] {
            check(kind, "NULL", None);
        }
        check(Kind::Bool, "1", Some("t"));
        check(Kind::Bool, "0", Some("f"));
        check(Kind::Bool, "'true'", Some("t"));
        check(Kind::Integer, "9223372036854775807", Some("9223372036854775807"));
        check(Kind::Real, "0.1", Some("0.1"));
        check(Kind::Real, "0.1 + 0.2", Some("0.30000000000000004"));
        check(Kind::Real, "3.0", Some("3"));
        check(Kind::Real, "-2.5", Some("-2.5"));
        check(Kind::Real, "'NaN'", Some("NaN"));
        check(Kind::Real, "1e308", Some("1e+308"));
        check(Kind::Real, "1e23", Some("9.999999999999999e+22"));
        check(Kind::Real, "0.00001", Some("1e-05"));
        check(Kind::Real, "9e999", Some("Infinity"));
        check(Kind::Bytes, "x'00FFab'", Some("\\x00ffab"));
        check(Kind::Bytes, "x''", Some("\\x"));
        check(Kind::Text, "'1.50'", Some("1.50"));
    }

    /// 64 bits are the limit of units, either way.
    #[test]
    fn units_leave_and_come_back_as_decimals() {
        for (scale, text, number) in [
            (2, "12.50", 1250),
            (2, "-0.05", -5),
            (2, "0.00", 0),
            (2, "-123.45", -12345),
            (0, "7", 7),
            (0, "-7", -7),
            (4, "0.0001", 1),
            (18, "9.223372036854775807", i64::MAX),
            (18, "-9.223372036854775808", i64::MIN),
            (2, "92233720368547758.07", i64::MAX),
        ] {
            assert_eq!(units(text, scale), Some(number), "{text}");
            check(Kind::Units { precision: 20, scale }, &number.to_string(), Some(text));
        }
        assert_eq!((units("12.5", 2), units("12", 2)), (Some(1250), Some(1200)));
        for (scale, text) in
            [(2, "92233720368547758.08"), (2, "1.505"), (2, "NaN"), (2, ""), (2, "."), (2, "-"), (2, "1.-5")]
        {
            assert_eq!(units(text, scale), None, "{text}");
        }
        let kind = Kind::Units { precision: 20, scale: 2 };
        for (stored, text) in
            [("NULL", None), ("'NaN'", Some("NaN")), ("'92233720368547758.08'", Some("92233720368547758.08"))]
        {
            check(kind, stored, text);
        }
    }
}
