//! What can be said of a change without asking the database: is it well formed, does it name what exists, may clients
//! set it at all. What is left (does the row exist, may this user, do constraints hold) the statement itself decides.
//!
//! Pure. A checked transaction comes out as [`CheckedChange`]s, the only form that statements are made from: its names are the
//! catalog's own, its columns in the catalog's order.

use crate::error::Refusal;
use millstream_catalog::{Column, Table};
use millstream_schemas::frame::MAX_TRANSACTION_CHANGES;
use millstream_schemas::stream::{MAX_ROW_BYTES, Submission};
use millstream_schemas::{Change, Code, Merge, Operation, Value};

/// Most bytes by which the values of one transaction may be longer as Postgres writes them, in the log, the stream and every
/// snapshot, than they were sent. What was sent is bounded by itself.
pub(crate) const MAX_GROWTH_BYTES: usize = MAX_ROW_BYTES;

/// Why a transaction is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rejection {
    /// Index of the change at fault.
    pub index: usize,
    /// Its id; nil for a transaction without changes.
    pub change_id: uuid::Uuid,
    /// Why.
    pub code: Code,
    /// What refused it, where that has a name.
    pub rule: Option<String>,
    /// For people.
    pub message: String,
}

impl Rejection {
    /// For one change of a transaction.
    pub fn new(submission: &Submission, index: usize, refusal: Refusal) -> Rejection {
        let change_id = submission.changes.get(index).map(|change| change.change_id).unwrap_or_default();
        Rejection { index, change_id, code: refusal.code, rule: refusal.rule, message: refusal.message }
    }
}

/// A checked change.
#[derive(Clone, Debug)]
pub(crate) struct CheckedChange<'a> {
    /// Where.
    pub table: &'a Table,
    /// What.
    pub op: Operation,
    /// Indexes of the set columns, rising.
    pub columns: Vec<usize>,
    /// Their values.
    pub values: Vec<Option<&'a str>>,
    /// Indexes of those whose value is added to what the row has.
    pub adds: Vec<usize>,
    /// Of a delete: where the row is not there, its author has taken it away before.
    pub gone: bool,
    /// The row's key; no part is null.
    pub key: &'a [Value],
    /// When it was made, by its client's clock.
    pub stamp: u64,
}

impl<'a> CheckedChange<'a> {
    /// Every text in it, with its column.
    fn texts(&self) -> impl Iterator<Item = (&'a Column, &'a str)> {
        let (table, key) = (self.table, self.key);
        // The key of an insert is among its values.
        let key = table.key.iter().copied().zip(key).filter(|_| self.op != Operation::Insert);
        let key = key.map(|(index, part)| (index, part.as_deref()));
        let set = self.columns.iter().copied().zip(self.values.iter().copied());
        key.chain(set).filter_map(move |(index, value)| Some((&table.columns[index], value?)))
    }
}

/// Checks a transaction; `find` gives the synced table of a name.
pub(crate) fn validate<'a>(
    find: impl Fn(&str) -> Option<&'a Table>,
    submission: &'a Submission,
) -> Result<Vec<CheckedChange<'a>>, Rejection> {
    let changes = &submission.changes;
    let refuse =
        |index, (code, message): (Code, String)| Rejection::new(submission, index, Refusal::new(code, message));
    if changes.is_empty() {
        return Err(refuse(0, (Code::InvalidChange, "a transaction holds at least one change".to_owned())));
    }
    if changes.len() > MAX_TRANSACTION_CHANGES {
        let message =
            format!("a transaction holds at most {MAX_TRANSACTION_CHANGES} changes, this one {}", changes.len());
        return Err(refuse(0, (Code::TooLarge, message)));
    }
    let mut steps = Vec::with_capacity(changes.len());
    let mut grown = 0_usize;
    for (index, change) in changes.iter().enumerate() {
        let Some(step) = check(&find, change).map_err(|why| refuse(index, why))? else { continue };
        for (column, value) in step.texts() {
            grown = grown.saturating_add(column.growth.of(value));
            if grown > MAX_GROWTH_BYTES {
                let message = format!(
                    "{}.{}: Postgres writes numbers, padding or quotes of this transaction with more than \
                     {MAX_GROWTH_BYTES} bytes that were not sent; use smaller exponents, shorter lists or more transactions",
                    step.table.name, column.name
                );
                return Err(refuse(index, (Code::InvalidValue, message)));
            }
        }
        steps.push(step);
    }
    Ok(steps)
}

/// None: the change sets only what is gone.
fn check<'a>(
    find: impl Fn(&str) -> Option<&'a Table>,
    change: &'a Change,
) -> Result<Option<CheckedChange<'a>>, (Code, String)> {
    let Some(table) = find(&change.table) else {
        return Err((Code::UnknownTable, format!("no table {:?} is synced", shown(&change.table))));
    };
    if change.key.len() != table.key.len() || change.key.iter().any(Option::is_none) {
        let message = format!("the key of {} has {} parts, none of them null", table.name, table.key.len());
        return Err((Code::InvalidChange, message));
    }
    if change.columns.len() != change.values.len() {
        let message = format!("{} columns but {} values", change.columns.len(), change.values.len());
        return Err((Code::InvalidChange, message));
    }
    let mut set = Vec::with_capacity(change.columns.len());
    for (name, value) in change.columns.iter().zip(&change.values) {
        let Some(column) = table.column(table.renamed.get(name).unwrap_or(name)) else {
            if table.dropped.contains(name) {
                continue;
            }
            return Err((Code::UnknownColumn, format!("{} has no column {:?}", table.name, shown(name))));
        };
        if !table.columns[column].writable {
            return Err((Code::ColumnNotWritable, format!("clients may not set {}.{name}", table.name)));
        }
        if change.op == Operation::Update && table.key.contains(&column) {
            return Err((
                Code::ColumnNotWritable,
                format!("{}.{name} is part of the key: set by insert only", table.name),
            ));
        }
        set.push((column, value.as_deref()));
    }
    set.sort_by_key(|(column, _)| *column);
    if let Some(pair) = set.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        let name = &table.columns[pair[0].0].name;
        return Err((Code::InvalidChange, format!("{}.{name} is set twice", table.name)));
    }
    let adds = adds(table, change, &set)?;
    if change.gone && change.op != Operation::Delete {
        return Err((Code::InvalidChange, "`gone` is said of a delete".to_owned()));
    }
    match change.op {
        Operation::Insert => {
            for (part, value) in table.key.iter().zip(&change.key) {
                let name = &table.columns[*part].name;
                match set.iter().find(|(column, _)| column == part) {
                    None => {
                        return Err((
                            Code::InvalidChange,
                            format!("the insert does not set {}.{name}, part of the key", table.name),
                        ));
                    }
                    Some((_, set)) if *set != value.as_deref() => {
                        return Err((
                            Code::InvalidChange,
                            format!("the insert sets {}.{name} to another value than its key", table.name),
                        ));
                    }
                    Some(_) => {}
                }
            }
        }
        Operation::Update if set.is_empty() => {
            if !change.columns.is_empty() {
                return Ok(None);
            }
            return Err((Code::InvalidChange, "the update sets no column".to_owned()));
        }
        Operation::Update => {}
        Operation::Delete if !set.is_empty() => {
            return Err((Code::InvalidChange, "a delete sets no columns".to_owned()));
        }
        Operation::Delete => {}
    }
    // Postgres' text cannot hold it.
    if set
        .iter()
        .map(|(_, value)| *value)
        .chain(change.key.iter().map(Option::as_deref))
        .flatten()
        .any(|v| v.contains('\0'))
    {
        return Err((Code::InvalidValue, "a value contains the character U+0000".to_owned()));
    }
    if rule(table, change.op).is_none() {
        return Err((Code::PermissionDenied, format!("clients may not {} {}", change.op.as_str(), table.name)));
    }
    let (columns, values) = set.into_iter().unzip();
    Ok(Some(CheckedChange {
        table,
        op: change.op,
        columns,
        values,
        adds,
        gone: change.gone,
        key: &change.key,
        stamp: change.stamp,
    }))
}

/// The columns, among those that are set, whose value is added.
fn adds(table: &Table, change: &Change, set: &[(usize, Option<&str>)]) -> Result<Vec<usize>, (Code, String)> {
    let mut adds = Vec::with_capacity(change.adds.len());
    for name in &change.adds {
        let column = table.column(table.renamed.get(name).unwrap_or(name));
        let column = column.filter(|column| set.iter().any(|(set, _)| set == column));
        let Some(column) = column.filter(|column| change.op == Operation::Update && !adds.contains(column)) else {
            if table.dropped.contains(name) {
                continue;
            }
            let message =
                format!("`adds` names {:?}, which the change does not set, or not once in an update", shown(name));
            return Err((Code::InvalidChange, message));
        };
        if table.columns[column].merge != Some(Merge::Add) {
            let message =
                format!("nothing can be added to {}.{name}: it is not declared as merge = \"add\"", table.name);
            return Err((Code::InvalidChange, message));
        }
        if set.iter().any(|(set, value)| *set == column && value.is_none()) {
            return Err((Code::InvalidChange, format!("null cannot be added to {}.{name}", table.name)));
        }
        adds.push(column);
    }
    adds.sort_unstable();
    Ok(adds)
}

/// The predicate that guards an operation.
pub(crate) fn rule(table: &Table, op: Operation) -> Option<&str> {
    match op {
        Operation::Insert => table.write.insert.as_deref(),
        Operation::Update => table.write.update.as_deref(),
        Operation::Delete => table.write.delete.as_deref(),
    }
}

/// A client's word in a message, kept short.
fn shown(name: &str) -> &str {
    const SHOWN_CHARACTERS: usize = 64;
    name.char_indices().nth(SHOWN_CHARACTERS).map_or(name, |(end, _)| &name[..end])
}

#[cfg(test)]
pub(crate) mod tests {
    use millstream_catalog::{Growth, WriteRules};
    use uuid::Uuid;

    use super::*;

    /// tasks(id key, title, done, secret: not writable), updates guarded by a look-up, deletes by nobody.
    pub(crate) fn tasks() -> Table {
        let column = |name: &str, sql_type: &str, writable| Column {
            name: name.into(),
            sql_name: format!("\"{name}\""),
            sql_type: sql_type.into(),
            type_oid: 0,
            growth: Growth::default(),
            default: None,
            merge: None,
            numeric: None,
            domain: None,
            nullable: true,
            writable,
        };
        Table {
            synced: true,
            oid: 1,
            name: "tasks".into(),
            sql_name: "\"public\".\"tasks\"".into(),
            columns: vec![
                column("id", "uuid", true),
                column("title", "character varying(20)", true),
                column("done", "boolean", true),
                column("secret", "text", false),
            ],
            key: vec![0],
            scopes: vec![],
            memberships: vec![],
            readable: "true".into(),
            write: WriteRules {
                insert: Some("new.title <> ''".into()),
                update: Some("EXISTS (SELECT FROM members m WHERE m.user_id = auth.user_id)".into()),
                delete: None,
            },
            conflict: millstream_catalog::ConflictPolicy::Arrival,
            renamed: Default::default(),
            dropped: Vec::new(),
            delete_missing_accepted: false,
            partitioned: false,
            hidden: Vec::new(),
            insert_existing_merges: false,
            references: Vec::new(),
            rules: Vec::new(),
            validate: None,
        }
    }

    /// A catalog of one table.
    pub(crate) fn only<'a>(table: &'a Table) -> impl Fn(&str) -> Option<&'a Table> + Copy {
        move |name| (name == table.name).then_some(table)
    }

    pub(crate) fn change(op: Operation, key: &str, set: &[(&str, Option<&str>)]) -> Change {
        Change {
            change_id: Uuid::from_u128(7),
            table: "tasks".into(),
            op,
            key: vec![Some(key.into())],
            columns: set.iter().map(|(name, _)| (*name).into()).collect(),
            values: set.iter().map(|(_, value)| value.map(Into::into)).collect(),
            adds: Vec::new(),
            gone: false,
            stamp: 1,
        }
    }

    pub(crate) fn submission(changes: Vec<Change>) -> Submission {
        Submission {
            client_id: Uuid::from_u128(1),
            user_id: "u".into(),
            run_id: Uuid::nil(),
            previous: None,
            after: Vec::new(),
            client_seq: 1,
            attempt: 1,
            changes,
            traceparent: None,
        }
    }

    fn check(change: Change, expected: Option<Code>) {
        let table = tasks();
        let text = format!("{change:?}");
        let submission = submission(vec![change]);
        assert_eq!(validate(only(&table), &submission).err().map(|rejection| rejection.code), expected, "{text}");
    }

    #[test]
    fn what_values_grow_to_is_limited_over_all_of_a_transaction() {
        let mut table = tasks();
        table.columns[1].growth = Growth { exponents: true, is_json: true, ..Growth::default() };
        table.columns[2].growth = Growth { each: 10, ..Growth::default() };
        table.columns[0].growth = Growth { exponents: true, ..Growth::default() };
        let number = |exponent: usize| format!("1e{exponent}");
        let fits = |changes: Vec<Change>| {
            let refused = validate(only(&table), &submission(changes)).err();
            if let Some(rejection) = &refused {
                assert_eq!(rejection.code, Code::InvalidValue, "{rejection:?}");
                assert!(rejection.message.starts_with("tasks."), "{rejection:?}");
            }
            refused.map(|rejection| rejection.index)
        };
        let update = |key: &str, title: &str, done| {
            let set = [("title", Some(title)), ("done", Some("f"))];
            change(Operation::Update, key, &set[..if done { 2 } else { 1 }])
        };
        // 32 times 131,072 is the limit.
        assert_eq!(32 * 131_072, MAX_GROWTH_BYTES);
        let many = |count: usize| format!("[{}]", vec![number(131_072); count].join(","));
        assert_eq!(fits(vec![update("a", &many(32), false)]), None);
        assert_eq!(fits(vec![update("a", &many(33), false)]), Some(0));
        assert_eq!(fits(vec![update("a", &many(32), true)]), Some(0));
        let strings = format!("[{}]", vec!["\"1e131072\""; 40].join(","));
        assert_eq!(fits(vec![update("a", &strings, true)]), None);
        // Over changes, and keys.
        let small = || update("a", &number(131_072), false);
        assert_eq!(fits((0..32).map(|_| small()).collect()), None);
        assert_eq!(fits((0..33).map(|_| small()).collect()), Some(32));
        let by_key = || update(&number(131_072), "null", false);
        assert_eq!(fits((0..32).map(|_| by_key()).collect()), None);
        assert_eq!(fits((0..33).map(|_| by_key()).collect()), Some(32));
        // Of an insert the key is sent twice and written once.
        let insert = |n: usize| change(Operation::Insert, &number(n), &[("id", Some(&number(n)))]);
        assert_eq!(fits((0..32).map(|_| insert(131_072)).collect()), None);
        assert_eq!(fits((0..32).map(|_| insert(131_072)).chain([insert(1)]).collect()), Some(32));
    }

    #[test]
    fn old_clients_name_columns_as_they_were() {
        let table = Table {
            renamed: [("name".to_owned(), "title".to_owned())].into(),
            dropped: vec!["junk".to_owned()],
            ..tasks()
        };
        let sets = |op, set: &[(&str, Option<&str>)]| {
            let submission = submission(vec![change(op, "1", set)]);
            let steps = validate(only(&table), &submission).map_err(|rejection| rejection.code)?;
            Ok(steps
                .iter()
                .map(|step| (step.columns.clone(), step.values.iter().flatten().count()))
                .collect::<Vec<_>>())
        };
        let all = [("junk", Some("j")), ("name", Some("x")), ("id", Some("1"))];
        assert_eq!(sets(Operation::Insert, &all), Ok(vec![(vec![0, 1], 2)]));
        assert_eq!(sets(Operation::Update, &all[..2]), Ok(vec![(vec![1], 1)]));
        assert_eq!(sets(Operation::Update, &all[..1]), Ok(vec![]), "nothing is left to do");
        assert_eq!(sets(Operation::Update, &[("name", None), ("title", None)]), Err(Code::InvalidChange), "set twice");
        assert_eq!(sets(Operation::Update, &[("nomen", None)]), Err(Code::UnknownColumn));
    }

    #[test]
    fn each_fault_has_its_code() {
        use Operation::{Delete, Insert, Update};
        let key = ("id", Some("1"));
        check(change(Insert, "1", &[("title", Some("x")), key]), None);
        check(change(Update, "1", &[("done", None)]), None);
        check(Change { table: "secrets".into(), ..change(Insert, "1", &[key]) }, Some(Code::UnknownTable));
        check(
            Change { table: "tasks\"; DROP TABLE tasks; --".into(), ..change(Insert, "1", &[key]) },
            Some(Code::UnknownTable),
        );
        check(change(Insert, "1", &[key, ("nope", None)]), Some(Code::UnknownColumn));
        check(change(Insert, "1", &[key, ("\"title\"", None)]), Some(Code::UnknownColumn));
        check(change(Insert, "1", &[key, ("secret", Some("x"))]), Some(Code::ColumnNotWritable));
        check(change(Update, "1", &[key]), Some(Code::ColumnNotWritable));
        check(change(Insert, "1", &[("title", Some("x"))]), Some(Code::InvalidChange));
        check(change(Insert, "1", &[("id", Some("2"))]), Some(Code::InvalidChange));
        check(change(Insert, "1", &[key, ("title", None), ("title", None)]), Some(Code::InvalidChange));
        check(change(Update, "1", &[]), Some(Code::InvalidChange));
        check(change(Delete, "1", &[("title", None)]), Some(Code::InvalidChange));
        check(change(Delete, "1", &[]), Some(Code::PermissionDenied));
        check(Change { key: vec![None], ..change(Update, "1", &[("done", None)]) }, Some(Code::InvalidChange));
        check(Change { key: vec![], ..change(Update, "1", &[("done", None)]) }, Some(Code::InvalidChange));
        check(Change { values: vec![], ..change(Update, "1", &[("done", None)]) }, Some(Code::InvalidChange));
        check(change(Update, "1", &[("title", Some("a\0b"))]), Some(Code::InvalidValue));
        check(change(Update, "1\0", &[("title", Some("a"))]), Some(Code::InvalidValue));
    }

    #[test]
    fn size_is_limited_and_the_change_at_fault_is_named() {
        let table = tasks();
        let good = || change(Operation::Update, "1", &[("done", None)]);
        let codes = |changes: Vec<Change>| {
            validate(only(&table), &submission(changes)).err().map(|rejection| (rejection.index, rejection.code))
        };
        assert_eq!(codes(vec![]), Some((0, Code::InvalidChange)));
        assert_eq!(codes((0..MAX_TRANSACTION_CHANGES).map(|_| good()).collect()), None);
        assert_eq!(codes((0..=MAX_TRANSACTION_CHANGES).map(|_| good()).collect()), Some((0, Code::TooLarge)));
        assert_eq!(codes(vec![good(), change(Operation::Update, "1", &[])]), Some((1, Code::InvalidChange)));
    }

    #[test]
    fn steps_have_the_catalogs_column_order() {
        let table = tasks();
        let submission = submission(vec![change(
            Operation::Insert,
            "1",
            &[("done", Some("t")), ("title", None), ("id", Some("1"))],
        )]);
        let steps = validate(only(&table), &submission).unwrap();
        assert_eq!(steps[0].columns, [0, 1, 2]);
        assert_eq!(steps[0].values, [Some("1"), None, Some("t")]);
    }
}
