//! Which changes may share a statement: those of one shape, moved past others that they commute with. Pure.
//!
//! Executing the groups in order must come to the same as executing the changes one by one: the same rows, the same
//! verdicts. Two changes commute if neither writes what the other writes, reads or must not write. Whether they may meet
//! at all is decided by their shapes (table, operation, columns); whether they do, by the rows' keys, where those are
//! texts that can be compared.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;

use millstream_schemas::spelling::{Spelling, is_one_spelling, spelling};
use uuid::Uuid;

use crate::decide::validator::CheckedChange;
use crate::sql::statement::{InputRow, Statement, Statements};

/// A change with its place in the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    /// Index of its transaction in the plan.
    pub planned: usize,
    /// Index of the change in it.
    pub step: usize,
}

/// Changes that one statement applies.
#[derive(Debug)]
pub(crate) struct Group<'a> {
    /// How.
    pub statement: Arc<Statement>,
    /// To what, in the order of the batch.
    pub rows: Vec<InputRow<'a>>,
    /// Whose rows these are.
    pub places: Vec<Place>,
}

impl<'a> Group<'a> {
    /// Takes a row out, as a group of its own.
    pub fn cut(&mut self, index: usize) -> Group<'a> {
        let (row, place) = (self.rows.remove(index), self.places.remove(index));
        Group { statement: self.statement.clone(), rows: vec![row], places: vec![place] }
    }
}

/// A row, by its table and the canonical form of its key.
type RowKey = (u32, String);

/// What rows of one group share: the shape, and where it matters the user and client.
type Kin<'a> = (usize, Option<(&'a str, Uuid)>);

/// Forms groups in the order in which changes come.
#[derive(Debug, Default)]
pub(crate) struct Groups<'a> {
    groups: Vec<Group<'a>>,
    /// Latest group of a shape, of a user where that matters.
    latest: HashMap<Kin<'a>, usize>,
    /// Latest group that writes a row, and that refers to it.
    written: HashMap<RowKey, usize>,
    referred: HashMap<RowKey, usize>,
    /// Latest group of a table whose rows cannot be told apart by their keys' texts.
    unknown: HashMap<u32, usize>,
    /// A row of one group has to come after a row of another.
    bound: bool,
}

impl<'a> Groups<'a> {
    /// Adds a change.
    pub fn add(&mut self, statements: &mut Statements, place: Place, row: InputRow<'a>) {
        let step: &CheckedChange<'_> = row.step;
        let statement = statements.of(step);
        let shape = &statement.shape;
        let table = shape.table();
        let key = key(step).map(|key| (table, key));
        let mut comparable = key.is_some();
        let mut references: Vec<RowKey> = Vec::new();
        for parent in &shape.parents {
            let Some((place, sql_type)) = &parent.value else { continue };
            match step.values[*place].map(|value| canonical(value, sql_type)) {
                None => {}
                Some(Some(value)) => references.push((parent.table, value.into_owned())),
                Some(None) => comparable = false,
            }
        }
        let identity = shape.personal.then_some((row.user_id, row.client_id));
        let latest = self.latest.get(&(shape.id, identity)).copied();
        let behind = |latest: Option<&usize>, group: usize| latest.is_none_or(|latest| *latest < group);
        let joins = latest.filter(|&group| {
            comparable
                && !shape.alone
                && key
                    .as_ref()
                    .is_none_or(|key| behind(self.written.get(key), group) && behind(self.referred.get(key), group))
                && behind(self.unknown.get(&table), group)
                && references
                    .iter()
                    .all(|parent| behind(self.written.get(parent), group) && behind(self.unknown.get(&parent.0), group))
                && !self.groups[group + 1..]
                    .iter()
                    .any(|later| statements.depend_on_order(&later.statement.shape, shape))
        });
        let group = joins.unwrap_or(self.groups.len());
        let elsewhere = |found: Option<&usize>| found.is_some_and(|found| *found != group);
        self.bound |= !comparable
            || shape.alone
            || shape.personal
            || key.as_ref().is_some_and(|key| elsewhere(self.written.get(key)) || elsewhere(self.referred.get(key)))
            || references.iter().any(|parent| elsewhere(self.written.get(parent)));
        if joins.is_none() {
            self.groups.push(Group { statement: statement.clone(), rows: Vec::new(), places: Vec::new() });
        }
        if comparable {
            self.latest.insert((shape.id, identity), group);
        } else {
            // Nothing may be moved past it: neither rows of its table nor what refers to them.
            self.unknown.insert(table, group);
            self.unknown.extend(shape.parents.iter().map(|parent| (parent.table, group)));
        }
        if let Some(key) = key {
            self.written.insert(key, group);
        }
        self.referred.extend(references.into_iter().map(|parent| (parent, group)));
        self.groups[group].rows.push(row);
        self.groups[group].places.push(place);
    }

    /// Whether the groups come to the same in any order, and at once: no two meet in a row, nor by what their shapes read.
    pub fn are_independent(&self, statements: &mut Statements) -> bool {
        let mut pairs =
            self.groups.iter().enumerate().flat_map(|(n, a)| self.groups[n + 1..].iter().map(move |b| (a, b)));
        !self.bound && !pairs.any(|(a, b)| statements.depend_on_order(&a.statement.shape, &b.statement.shape))
    }

    /// The groups, in the order of execution.
    pub fn into_groups(self) -> Vec<Group<'a>> {
        self.groups
    }
}

/// The key of a step's row in a form that is the same for the same key; none if that is not known of its types.
fn key(step: &CheckedChange<'_>) -> Option<String> {
    let mut text = String::new();
    for (index, value) in step.table.key.iter().zip(step.key) {
        text.push_str(&canonical(value.as_deref()?, &step.table.columns[*index].sql_type)?);
        text.push('\0');
    }
    // As of a single value, which a reference to it has.
    if step.key.len() == 1 {
        text.pop();
    }
    Some(text)
}

/// A value's text in a form that is the same for equal values; none if that is not known of its type.
fn canonical<'a>(value: &'a str, sql_type: &str) -> Option<Cow<'a, str>> {
    match spelling(sql_type, value) {
        Spelling::Known(text) if is_one_spelling(sql_type) => Some(text),
        Spelling::Known(_) | Spelling::Other(_) | Spelling::Any => None,
    }
}

#[cfg(test)]
mod tests {
    use millstream_schemas::Operation;
    use millstream_schemas::stream::Submission;

    use super::*;
    use crate::decide::validator::tests::{change, submission, tasks};
    use crate::decide::validator::validate;
    use crate::sql::traits::{Parent, Traits};

    const A: &str = "00000000-0000-0000-0000-00000000000a";
    const B: &str = "00000000-0000-0000-0000-00000000000b";
    const C: &str = "00000000-0000-0000-0000-00000000000c";

    /// Changes as (table, operation, key, set).
    type Changes<'a> = &'a [(&'a str, Operation, &'a str, &'a str)];

    fn check(traits: Traits, rule: &str, changes: Changes<'_>, expected: &[&[usize]]) {
        assert_eq!(groups(traits, rule, changes).0, expected, "{changes:?}");
    }

    /// The groups, as the indexes of their changes, and whether they are independent. `parents` is a table like `tasks`, to
    /// which `tasks.parent` refers where the traits say so.
    fn groups(traits: Traits, rule: &str, changes: Changes<'_>) -> (Vec<Vec<usize>>, bool) {
        let mut children = tasks();
        children.columns[3] = millstream_catalog::Column {
            name: "parent".into(),
            sql_type: "uuid".into(),
            writable: true,
            ..children.columns[3].clone()
        };
        children.write.update = Some(rule.into());
        children.write.delete = Some(rule.into());
        let mut parents = children.clone();
        (parents.oid, parents.name) = (2, "parents".into());
        let find = |name: &str| [&children, &parents].into_iter().find(|table| table.name == name);
        let submissions: Vec<Submission> = changes
            .iter()
            .map(|(table, op, key, set)| {
                let set: &[_] = match op {
                    Operation::Insert => &[("id", Some(*key)), ("parent", Some(*set))],
                    Operation::Update => &[(*set, Some(B))],
                    Operation::Delete => &[],
                };
                submission(vec![millstream_schemas::Change { table: (*table).into(), ..change(*op, key, set) }])
            })
            .collect();
        let checked: Vec<_> = submissions.iter().map(|submission| validate(find, submission).unwrap()).collect();
        let parent = Traits { oid: 2, root: 2, ..Traits::default() };
        let mut statements = Statements::new(vec![Traits { oid: 1, root: 1, ..traits }, parent], vec!["a_view".into()]);
        let mut groups = Groups::default();
        for (planned, steps) in checked.iter().enumerate() {
            let user_id = &submissions[planned].user_id;
            let row = InputRow {
                step: &steps[0],
                user_id,
                client_id: Uuid::nil(),
                clock: millstream_schemas::Clock::default(),
            };
            groups.add(&mut statements, Place { planned, step: 0 }, row);
        }
        let independent = groups.are_independent(&mut statements);
        let indexes = |group: &Group<'_>| group.places.iter().map(|place| place.planned).collect();
        (groups.into_groups().iter().map(indexes).collect(), independent)
    }

    #[test]
    fn groups_that_meet_in_no_row_and_read_nothing_of_each_other_may_go_at_once() {
        use Operation::{Delete, Insert, Update};
        let free = Traits::default;
        let check = |traits: Traits, rule, changes: Changes<'_>, expected| {
            assert_eq!(groups(traits, rule, changes).1, expected, "{changes:?}");
        };
        let apart = [("tasks", Insert, A, C), ("tasks", Update, B, "title"), ("tasks", Delete, C, "")];
        check(free(), "old.done", &apart, true);
        check(free(), "old.done", &[("tasks", Insert, A, C), ("tasks", Update, A, "title")], false);
        check(free(), "old.done", &[("tasks", Update, A, "title"), ("tasks", Update, A, "done")], false);
        check(free(), "old.done", &[("tasks", Update, A, "title"), ("tasks", Update, "odd", "done")], false);
        check(free(), "EXISTS (SELECT FROM tasks)", &apart, false);
        check(
            free(),
            "EXISTS (SELECT FROM parents)",
            &[("parents", Insert, A, C), ("tasks", Update, B, "title")],
            false,
        );
        let parent = Parent { oid: 2, columns: vec!["parent".into()], to_key: true };
        let child = || Traits { parents: vec![parent.clone()], ..Traits::default() };
        check(child(), "true", &[("parents", Insert, A, C), ("tasks", Insert, A, B)], true);
        check(child(), "true", &[("parents", Insert, A, C), ("tasks", Insert, A, A)], false);
        check(child(), "true", &[("tasks", Insert, A, A), ("parents", Insert, A, C)], false);
        check(child(), "true", &[("parents", Delete, A, ""), ("tasks", Insert, B, C)], false);
    }

    #[test]
    fn changes_move_past_those_that_they_commute_with() {
        use Operation::{Delete, Insert, Update};
        let free = Traits::default;
        let rule = "old.done";
        let mixed = [
            ("tasks", Insert, A, C),
            ("tasks", Update, B, "title"),
            ("tasks", Insert, C, C),
            ("tasks", Update, A, "title"),
        ];
        check(free(), rule, &mixed, &[&[0, 2], &[1, 3]]);
        // The same row, in whichever writing.
        let same = [
            ("tasks", Update, A, "title"),
            ("tasks", Delete, A, ""),
            ("tasks", Update, "{0000000000000000000000000000000A}", "title"),
        ];
        check(free(), rule, &same, &[&[0], &[1], &[2]]);
        // Another row by a unique column: inserts and deletes keep their order, and such a column's update all order.
        let unique = || Traits { unique_columns: vec!["title".into()], ..free() };
        let ordered = [("tasks", Insert, A, C), ("tasks", Delete, B, ""), ("tasks", Insert, C, C)];
        check(free(), rule, &ordered, &[&[0, 2], &[1]]);
        check(unique(), rule, &ordered, &[&[0], &[1], &[2]]);
        let updates = [("tasks", Update, A, "title"), ("tasks", Update, B, "title"), ("tasks", Update, C, "done")];
        check(free(), rule, &updates, &[&[0, 1], &[2]]);
        check(unique(), rule, &updates, &[&[0], &[1], &[2]]);
        let around = [("tasks", Update, A, "done"), ("tasks", Update, B, "title"), ("tasks", Update, C, "done")];
        check(unique(), rule, &around, &[&[0], &[1], &[2]]);
    }

    #[test]
    fn rules_and_triggers_keep_order() {
        use Operation::{Insert, Update};
        let free = Traits::default;
        let two = [("tasks", Update, A, "title"), ("tasks", Update, B, "title")];
        let around = [("tasks", Update, A, "title"), ("parents", Insert, B, C), ("tasks", Update, C, "title")];
        for (rule, together) in [
            ("old.done", true),
            ("EXISTS (SELECT FROM parents)", false),
            ("f(old.id)", false),
            ("EXISTS (TABLE a_view)", false),
        ] {
            let expected: &[&[usize]] = if together { &[&[0, 2], &[1]] } else { &[&[0], &[1], &[2]] };
            check(free(), rule, &around, expected);
        }
        check(free(), "EXISTS (SELECT FROM parents)", &two, &[&[0, 1]]);
        check(free(), "EXISTS (SELECT FROM tasks)", &two, &[&[0], &[1]]);
        check(Traits { triggers: true, ..free() }, "true", &two, &[&[0], &[1]]);
        check(Traits { row_security: true, ..free() }, "true", &around, &[&[0], &[1], &[2]]);
    }

    #[test]
    fn children_keep_their_place_behind_parents() {
        use Operation::{Delete, Insert};
        let parent = Parent { oid: 2, columns: vec!["parent".into()], to_key: true };
        let child = || Traits { parents: vec![parent.clone()], ..Traits::default() };
        // The second parent is not that of the first child; the third one is that of a child before it.
        let family = [
            ("parents", Insert, A, C),
            ("tasks", Insert, A, A),
            ("parents", Insert, B, C),
            ("tasks", Insert, B, B),
            ("tasks", Insert, C, C),
        ];
        check(child(), "true", &family, &[&[0, 2], &[1, 3, 4]]);
        let orphan =
            [("parents", Insert, A, C), ("tasks", Insert, A, B), ("parents", Insert, B, C), ("tasks", Insert, B, A)];
        check(child(), "true", &orphan, &[&[0], &[1, 3], &[2]]);
        // A reference to something else than the key cannot be compared.
        let other = Traits { parents: vec![Parent { to_key: false, ..parent.clone() }], ..Traits::default() };
        check(other, "true", &family, &[&[0], &[1], &[2], &[3, 4]]);
        let delete = [("parents", Delete, A, ""), ("tasks", Insert, B, C), ("parents", Delete, B, "")];
        check(child(), "true", &delete, &[&[0], &[1], &[2]]);
        check(Traits::default(), "true", &delete, &[&[0, 2], &[1]]);
    }
}
