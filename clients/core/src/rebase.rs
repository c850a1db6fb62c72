//! The visible row: the confirmed row with the changes that are still under way on top.

use std::collections::BTreeMap;

use millstream_schemas::{Operation, Value};

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
}

/// What the app sees: `base` (none: the server has no such row) with `pending` on top, in their order.
///
/// An insert over an existing row sets its columns (the server's copy of it may have come first). An update of a row
/// that is gone changes nothing: the server will refuse it, and the row must not come back half-filled.
pub fn overlay(base: Option<Image>, pending: &[Pending]) -> Option<Image> {
    pending.iter().fold(base, |row, change| match change.op {
        Operation::Delete => None,
        Operation::Insert => Some(set(row.unwrap_or_default(), change)),
        Operation::Update => row.map(|row| set(row, change)),
    })
}

fn set(mut row: Image, change: &Pending) -> Image {
    for (column, value) in change.columns.iter().zip(&change.values) {
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

    fn change(op: Operation, columns: &str) -> Pending {
        let columns: Image = serde_json::from_str(columns).unwrap();
        Pending { op, columns: columns.keys().cloned().collect(), values: columns.into_values().collect() }
    }

    #[track_caller]
    fn check(base: &str, pending: &[(Operation, &str)], expected: &str) {
        let pending: Vec<_> = pending.iter().map(|(op, columns)| change(*op, columns)).collect();
        assert_eq!(overlay(image(base), &pending), image(expected));
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
}
