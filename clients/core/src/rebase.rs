//! The visible row: the confirmed row with the changes that are still under way on top.

use std::collections::BTreeMap;

use millstream_schemas::{Clock, Clocks, Operation, Value};

/// A row by column name, values in Postgres' text form.
pub type Image = BTreeMap<String, Value>;

/// A change of the row that the server has not settled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pending {
    /// What was done.
    pub op: Operation,
    /// The columns that were set.
    pub columns: Vec<String>,
    /// Their values.
    pub values: Vec<Value>,
    /// Its place in the order of all changes, as far as known.
    pub clock: Clock,
}

/// What the app sees: `base` (none: the server has no such row) with `pending` on top, in their order.
///
/// `clocks` names the column with the clocks of the base, where the table merges by column: a change that the server will
/// find older than what it has is not shown over it.
///
/// An insert over an existing row sets its columns, as an update does (the server's copy of it may have come first). An
/// update of a row that is gone changes nothing: the server will refuse it, and the row must not come back half-filled.
pub fn overlay(base: Option<Image>, pending: &[Pending], clocks: Option<&str>) -> Option<Image> {
    let texts = clocks.zip(base.as_ref()).and_then(|(column, base)| base.get(column)?.as_deref());
    let known = texts.map(Clocks::parse).unwrap_or_default();
    pending.iter().fold(base, |row, change| match change.op {
        Operation::Delete if known.newest() > change.clock => row,
        Operation::Delete => None,
        Operation::Insert => Some(set(row.unwrap_or_default(), change, |column| known.of(column) <= change.clock)),
        Operation::Update => row.map(|row| set(row, change, |column| known.of(column) <= change.clock)),
    })
}

fn set(mut row: Image, change: &Pending, wins: impl Fn(&str) -> bool) -> Image {
    for (column, value) in change.columns.iter().zip(&change.values).filter(|(column, _)| wins(column)) {
        row.insert(column.clone(), value.clone());
    }
    row
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(text: &str) -> Option<Image> {
        serde_json::from_str(text).unwrap()
    }

    fn change(op: Operation, columns: &str, stamp: u64) -> Pending {
        let columns: Image = serde_json::from_str(columns).unwrap();
        let clock = Clock { stamp, ..Clock::default() };
        Pending { op, columns: columns.keys().cloned().collect(), values: columns.into_values().collect(), clock }
    }

    #[track_caller]
    fn check(base: &str, pending: &[(Operation, &str)], expected: &str) {
        let pending: Vec<_> = pending.iter().map(|(op, columns)| change(*op, columns, 0)).collect();
        assert_eq!(overlay(image(base), &pending, None), image(expected));
    }

    #[test]
    fn the_visible_row() {
        use Operation::{Delete, Insert, Update};
        check("null", &[], "null");
        check(r#"{"id":"1","a":"x"}"#, &[], r#"{"id":"1","a":"x"}"#);
        check(r#"{"id":"1","a":"x","b":"y"}"#, &[(Update, r#"{"a":"z"}"#)], r#"{"id":"1","a":"z","b":"y"}"#);
        check(
            r#"{"id":"1","a":"x"}"#,
            &[(Update, r#"{"a":"1"}"#), (Update, r#"{"a":null}"#)],
            r#"{"id":"1","a":null}"#,
        );
        check("null", &[(Insert, r#"{"id":"1","a":"x"}"#), (Update, r#"{"a":"y"}"#)], r#"{"id":"1","a":"y"}"#);
        check(r#"{"id":"1","at":"now"}"#, &[(Insert, r#"{"id":"1","a":"x"}"#)], r#"{"id":"1","a":"x","at":"now"}"#);
        check("null", &[(Update, r#"{"a":"x"}"#)], "null");
        check(r#"{"id":"1"}"#, &[(Delete, "{}"), (Update, r#"{"a":"x"}"#)], "null");
        check(r#"{"id":"1","b":"y"}"#, &[(Delete, "{}"), (Insert, r#"{"id":"1"}"#)], r#"{"id":"1"}"#);
    }

    #[test]
    fn a_newer_column_of_the_server_is_shown_over_an_older_edit() {
        use Operation::{Delete, Insert, Update};
        let clock = |stamp| Clock { stamp, ..Clock::default() };
        let base = |a: &str| {
            let mut base = image(r#"{"id":"1","b":"server"}"#).unwrap();
            base.insert("a".into(), Some(a.into()));
            let clocks = format!(r#"{{"": "{}", "a": "{}"}}"#, clock(5), clock(20));
            base.insert("clocks".into(), Some(clocks));
            Some(base)
        };
        let shown = |pending: &[Pending]| {
            let row = overlay(base("server"), pending, Some("clocks"))?;
            Some((row["a"].clone().unwrap(), row["b"].clone().unwrap()))
        };
        let both = r#"{"a":"mine","b":"mine"}"#;
        assert_eq!(shown(&[change(Update, both, 10)]), Some(("server".into(), "mine".into())));
        assert_eq!(shown(&[change(Update, both, 20)]), Some(("mine".into(), "mine".into())));
        assert_eq!(shown(&[change(Update, both, 4)]), Some(("server".into(), "server".into())));
        // The author's own row came back with somebody's newer column, and is not confirmed yet.
        assert_eq!(shown(&[change(Insert, both, 10)]), Some(("server".into(), "mine".into())));
        assert_eq!(shown(&[change(Delete, "{}", 10)]), Some(("server".into(), "server".into())));
        assert_eq!(shown(&[change(Delete, "{}", 21)]), None);
    }
}
