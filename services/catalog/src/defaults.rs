//! Defaults that are always the same, which clients can fill in themselves: read off the expression as Postgres writes it.

use millstream_schemas::spelling::{Spelling, spelling};

/// The value of a default in the text form of its type; none if it may be another each time, is null, or is written in a way that is
/// not known here.
///
/// Of a constant, `pg_get_expr` gives a number, `true`, `false`, or a quoted text; behind it at most one cast. Anything that is computed
/// has more than that.
pub(crate) fn constant(expression: &str, sql_type: &str) -> Option<String> {
    let (value, rest) = match expression.strip_prefix('\'') {
        Some(quoted) => quoted_text(quoted)?,
        None => {
            let (open, bare) = expression.strip_prefix('(').map_or(("", expression), |bare| ("(", bare));
            let end = bare.find(|c: char| !(c.is_ascii_alphanumeric() || ".-+".contains(c))).unwrap_or(bare.len());
            let (value, rest) = bare.split_at(end);
            let rest = if open.is_empty() { rest } else { rest.strip_prefix(')')? };
            match value {
                "true" if sql_type == "boolean" => ("t".to_owned(), rest),
                "false" if sql_type == "boolean" => ("f".to_owned(), rest),
                number
                    if number.starts_with(|c: char| c.is_ascii_digit() || c == '-')
                        && number.parse::<f64>().is_ok() =>
                {
                    (number.to_owned(), rest)
                }
                _ => return None,
            }
        }
    };
    let is_type = |c: char| c.is_alphanumeric() || "_ .\"(),[]".contains(c);
    if !rest.is_empty() && !rest.strip_prefix("::").is_some_and(|cast| !cast.is_empty() && cast.chars().all(is_type)) {
        return None;
    }
    match spelling(sql_type, &value) {
        Spelling::Known(known) => Some(known.into_owned()),
        // A word that Postgres knows, say.
        Spelling::Other(_) => None,
        Spelling::Any => Some(value),
    }
}

/// A text up to its closing quote, and what is behind that.
fn quoted_text(quoted: &str) -> Option<(String, &str)> {
    let (mut text, mut rest) = (String::new(), quoted);
    loop {
        let (part, behind) = rest.split_once('\'')?;
        text.push_str(part);
        match behind.strip_prefix('\'') {
            Some(more) => {
                text.push('\'');
                rest = more;
            }
            None => return Some((text, behind)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn constants_are_told_from_what_is_computed() {
        for (expression, sql_type, expected) in [
            ("false", "boolean", Some("f")),
            ("3", "integer", Some("3")),
            ("'-1'::integer", "integer", Some("-1")),
            ("1.5", "numeric(6,2)", Some("1.50")),
            ("(0)::double precision", "double precision", Some("0")),
            ("(10)::numeric", "numeric", Some("10")),
            ("'it''s'::text", "text", Some("it's")),
            ("''::character varying", "character varying(20)", Some("")),
            ("'a'::bpchar", "character(3)", Some("a  ")),
            ("'open'::status", "status", Some("open")),
            ("'{}'::jsonb", "jsonb", Some("{}")),
            ("'{}'::text[]", "text[]", Some("{}")),
            ("'x'::\"My\".\"Type\"", "\"My\".\"Type\"", Some("x")),
            (
                "'2026-01-01 00:00:00+00'::timestamp with time zone",
                "timestamp with time zone",
                Some("2026-01-01 00:00:00+00"),
            ),
            ("true", "text", None),
            ("now()", "timestamp with time zone", None),
            ("CURRENT_TIMESTAMP", "timestamp with time zone", None),
            ("nextval('s'::regclass)", "bigint", None),
            ("gen_random_uuid()", "uuid", None),
            ("NULL::text", "text", None),
            ("('now'::text)::date", "date", None),
            ("'a'::text || 'b'::text", "text", None),
            ("('a'::text || CURRENT_USER)", "text", None),
            ("(1 + 1)", "integer", None),
            ("'5'::integer + 1", "integer", None),
            ("E'a\\\\b'::text", "text", None),
            ("current_setting('millstream.user_id'::text, true)", "text", None),
            ("1.555", "numeric(6,2)", Some("1.56")),
            ("'unfinished", "text", None),
        ] {
            assert_eq!(constant(expression, sql_type).as_deref(), expected, "{expression}");
        }
    }
}
