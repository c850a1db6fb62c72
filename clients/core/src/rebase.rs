//! The visible row: the confirmed row with the changes that are still under way on top.

use std::borrow::Cow;
use std::collections::BTreeMap;

use millstream_schemas::spelling::{Spelling, spelling};
use millstream_schemas::{Clock, Clocks, ColumnSchema, Merge, Operation, TableSchema, Value};

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
    /// Those whose value is an amount to add.
    pub adds: Vec<String>,
    /// Its place in the order of all changes, as far as known.
    pub clock: Clock,
}

/// What the app sees: `base` (none: the server has no such row) with `pending` on top, in their order.
///
/// A change that the server will find older than what it has, by the clocks of the base where the table has such, is not shown over
/// it. What is added, or is the greatest or least, counts whatever is newer.
///
/// An insert over an existing row sets its columns, as an update does (the server's copy of it may have come first). An
/// update of a row that is gone changes nothing: the server will refuse it, and the row must not come back half-filled.
pub fn overlay(base: Option<Image>, pending: &[Pending], table: &TableSchema) -> Option<Image> {
    let clocks = table.clocks.map(|index| &table.columns[index].name);
    let texts = clocks.zip(base.as_ref()).and_then(|(column, base)| base.get(column)?.as_deref());
    let known = texts.map(Clocks::parse).unwrap_or_default();
    let wins = |change: &Pending, column: &str| known.of(column) <= change.clock;
    let becomes = |change: &Pending, name: &str, old: &Value, value: &Value| {
        let column = table.column(name).map(|index| &table.columns[index]);
        match column.and_then(|column| Some((column, column.merge?))) {
            _ if change.adds.iter().any(|added| added == name) => {
                // The row may have come back before its confirmation.
                let clock = known.of(name);
                let is_in = clock.client_id == change.clock.client_id && clock.client_seq >= change.clock.client_seq;
                (!is_in || clocks.is_none()).then(|| sum(old, value))
            }
            Some((column, merge @ (Merge::Max | Merge::Min))) if value.is_some() => {
                Some(extreme(merge, column, old, value))
            }
            _ => wins(change, name).then(|| value.clone()),
        }
    };
    pending.iter().fold(base, |row, change| match change.op {
        Operation::Delete if known.newest() > change.clock => row,
        Operation::Delete => None,
        Operation::Insert => Some(set(row.unwrap_or_default(), change, becomes)),
        Operation::Update => row.map(|row| set(row, change, becomes)),
    })
}

/// `to` gives the value that a column gets from the row's value and the change's; with `None` the column keeps its value.
fn set(mut row: Image, change: &Pending, to: impl Fn(&Pending, &str, &Value, &Value) -> Option<Value>) -> Image {
    for (column, value) in change.columns.iter().zip(&change.values) {
        if let Some(value) = to(change, column, row.get(column).unwrap_or(&None), value) {
            row.insert(column.clone(), value);
        }
    }
    row
}

/// A number with an amount added. What the server will refuse is not added.
pub fn sum(old: &Value, amount: &Value) -> Value {
    let number = |value: &Value| value.as_deref().unwrap_or("0").parse::<i64>().ok();
    let sum = number(old).zip(number(amount)).and_then(|(old, amount)| old.checked_add(amount));
    sum.map_or_else(|| old.clone(), |sum| Some(sum.to_string()))
}

/// The greater or the lesser of two values.
fn extreme(merge: Merge, column: &ColumnSchema, old: &Value, new: &Value) -> Value {
    let (Some(before), Some(after)) = (old, new) else { return new.clone() };
    let is_greater = match (before.parse::<i64>(), after.parse::<i64>()) {
        (Ok(before), Ok(after)) => after > before,
        // Of times, Postgres' spelling has the order of the values; those far off are shown as they were set.
        _ => match (spelling(&column.r#type, before), spelling(&column.r#type, after)) {
            (Spelling::Known(before), Spelling::Known(after)) => sortable(&after) > sortable(&before),
            _ => return new.clone(),
        },
    };
    if is_greater == (merge == Merge::Max) { new.clone() } else { old.clone() }
}

/// A time without its zone, which is the same in all.
fn sortable<'a>(text: &'a Cow<'a, str>) -> &'a str {
    text.strip_suffix("+00").unwrap_or(text)
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
        let names = columns.keys().cloned().collect();
        Pending { op, columns: names, values: columns.into_values().collect(), adds: Vec::new(), clock }
    }

    fn table(columns: &[(&str, &str, Option<Merge>)]) -> TableSchema {
        let column = |&(name, sql_type, merge): &(&str, &str, Option<Merge>)| ColumnSchema {
            name: name.into(),
            r#type: sql_type.into(),
            nullable: true,
            writable: true,
            default: None,
            merge,
            numeric: None,
        };
        TableSchema {
            name: "t".into(),
            columns: columns.iter().map(column).collect(),
            key: vec![0],
            scopes: Vec::new(),
            references: Vec::new(),
            clocks: None,
        }
    }

    #[test]
    fn what_counts_in_any_order_is_shown_so() {
        let counted = |merge, sql_type, base: Option<&str>, set: &[Option<&str>]| {
            let table = table(&[("n", sql_type, Some(merge))]);
            let adds = if merge == Merge::Add { vec!["n".to_owned()] } else { Vec::new() };
            let change = |value: &Option<&str>| Pending {
                values: vec![value.map(str::to_owned)],
                columns: vec!["n".into()],
                adds: adds.clone(),
                ..change(Operation::Update, "{}", 0)
            };
            let base = Image::from([("n".to_owned(), base.map(str::to_owned))]);
            overlay(Some(base), &set.iter().map(change).collect::<Vec<_>>(), &table).unwrap().remove("n").unwrap()
        };
        let add = |base, set: &[_]| counted(Merge::Add, "bigint", base, set);
        assert_eq!(add(Some("10"), &[Some("1"), Some("-3")]).as_deref(), Some("8"));
        assert_eq!(add(None, &[Some("1")]).as_deref(), Some("1"));
        assert_eq!(add(Some("9223372036854775807"), &[Some("1")]).as_deref(), Some("9223372036854775807"));
        let most = |sql_type, base, new| counted(Merge::Max, sql_type, Some(base), &[Some(new)]).unwrap();
        let least = |sql_type, base, new| counted(Merge::Min, sql_type, Some(base), &[Some(new)]).unwrap();
        assert_eq!((most("integer", "9", "10"), least("integer", "9", "10")), ("10".into(), "9".into()));
        assert_eq!((most("integer", "-9", "-10"), least("integer", "-9", "-10")), ("-9".into(), "-10".into()));
        let (early, late) = ("2026-11-29 08:30:00+00", "2026-11-29 08:30:00.5+00");
        assert_eq!(most("timestamp with time zone", early, late), late);
        assert_eq!(most("timestamp with time zone", late, early), late);
        assert_eq!(least("timestamp with time zone", late, "2026-11-29T08:29:00Z"), "2026-11-29T08:29:00Z");
        assert_eq!(counted(Merge::Max, "integer", None, &[Some("-1")]).as_deref(), Some("-1"));
        assert_eq!(counted(Merge::Max, "integer", Some("1"), &[None]), None);
    }

    #[track_caller]
    fn check(base: &str, pending: &[(Operation, &str)], expected: &str) {
        let pending: Vec<_> = pending.iter().map(|(op, columns)| change(*op, columns, 0)).collect();
        assert_eq!(overlay(image(base), &pending, &table(&[])), image(expected));
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
            let row = overlay(
                base("server"),
                pending,
                &TableSchema { clocks: Some(0), ..table(&[("clocks", "jsonb", None)]) },
            )?;
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
