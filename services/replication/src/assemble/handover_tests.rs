//! Keys that change hands within a transaction end as in Postgres.

use std::collections::{BTreeMap, BTreeSet};

use super::tests::{FOREIGN, TASKS, relations, tables};
use super::*;
use crate::pgoutput::Tuple;

/// Rows by key: scope and title.
type Rows = BTreeMap<String, (String, String)>;

fn shapes(loose_key: bool) -> Arc<[Shape]> {
    Arc::new([Shape { loose_key, ..Shape::default() }])
}

fn relation_of(full: bool) -> Message<'static> {
    let Some(Message::Relation(mut relation)) = relations().into_iter().next() else { panic!("no relation") };
    relation.columns.iter_mut().for_each(|column| column.identity |= full);
    Message::Relation(relation)
}

/// A row of the model: key, scope, title. As with Postgres, what a row is has nothing to do with its key.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Row([String; 3]);

impl Row {
    fn new(key: u64, scope: u64, title: u64) -> Row {
        Row([format!("k{key}"), format!("p{scope}"), format!("t{title}")])
    }

    /// In the order of the relation.
    fn tuple(&self) -> Tuple<'_> {
        let Row([key, scope, title]) = self;
        [title, key, scope].map(|text| Value::Text(text.as_bytes())).into()
    }

    fn old(&self, full: bool) -> Old<'_> {
        let mut tuple = self.tuple();
        if full {
            return Old::Full(tuple);
        }
        tuple[0] = Value::Null;
        Old::Key(tuple)
    }
}

/// What holders of these scopes have behind the messages.
fn apply(out: &[Outgoing], holds: impl Fn(&str) -> bool, mut rows: Rows) -> Rows {
    for message in out.iter().filter(|message| holds(message.subject.trim_start_matches("ms.wal.project."))) {
        for changes in serde_json::from_slice::<Vec<millstream_schemas::TableChanges>>(&message.payload).unwrap() {
            for row in changes.rows {
                let row: Vec<String> = row.into_iter().flatten().collect();
                match changes.op {
                    millstream_schemas::TableOp::Delete => drop(rows.remove(&row[0])),
                    _ => drop(rows.insert(row[0].clone(), (row[1].clone(), row[2].clone()))),
                }
            }
        }
    }
    rows
}

fn view(rows: &[Row], holds: impl Fn(&str) -> bool) -> Rows {
    let held = rows.iter().filter(|Row([_, scope, _])| holds(scope));
    held.map(|Row([key, scope, title])| (key.clone(), (scope.clone(), title.clone()))).collect()
}

/// Transactions of `(before, after)`, in their order.
fn run(changes: &[(Option<Row>, Option<Row>)], full: bool, loose: bool) -> Vec<Outgoing> {
    let mut assembler = Assembler::new(tables(), Lsn(10), HashSet::new()).with_shapes(shapes(loose));
    let mut out = Vec::new();
    let mut handle = |message: &Message<'_>| {
        assembler.handle(message, &Filled::new(), &mut out).unwrap();
    };
    handle(&Message::Begin { final_lsn: Lsn(100), at: 5, xid: 7 });
    handle(&relation_of(full));
    for (before, after) in changes {
        handle(&match (before, after) {
            (None, Some(after)) => Message::Insert { relation: TASKS, new: after.tuple() },
            (Some(before), None) => Message::Delete { relation: TASKS, old: before.old(full) },
            (Some(before), Some(after)) => {
                // Without a change of the identity there is no old image.
                let is_told = full || before.0[..2] != after.0[..2];
                Message::Update { relation: TASKS, old: is_told.then(|| before.old(full)), new: after.tuple() }
            }
            (None, None) => Message::Truncate { relations: vec![FOREIGN] },
        });
    }
    handle(&Message::Commit { lsn: Lsn(100), end_lsn: Lsn(108), at: 5 });
    out
}

#[test]
fn keys_that_change_hands_end_as_in_postgres() {
    let mut state = 7_u64;
    let mut random = |n: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % n
    };
    let (mut tried, mut wrong_in_order_of_the_log) = (0, 0);
    while tried < 5000 {
        let full = random(2) == 0;
        let mut rows: Vec<Row> = (0..random(6)).map(|key| Row::new(key, random(2), random(3))).collect();
        let start = rows.clone();
        let mut changes = Vec::new();
        for _ in 0..1 + random(12) {
            let change = match random(8) {
                0 => (None, Some(Row::new(random(7), random(2), random(3)))),
                1 if !rows.is_empty() => (Some(rows[random(rows.len() as u64) as usize].clone()), None),
                n if !rows.is_empty() => {
                    let before = rows[random(rows.len() as u64) as usize].clone();
                    let mut after = before.clone();
                    after.0[if n < 6 { 0 } else { (n - 5) as usize }] =
                        Row::new(random(7), random(2), random(3)).0[if n < 6 { 0 } else { (n - 5) as usize }].clone();
                    (Some(before), Some(after))
                }
                _ => continue,
            };
            let mut next = rows.clone();
            if let Some(before) = &change.0 {
                let at = next.iter().position(|row| row == before).unwrap();
                next.remove(at);
            }
            next.extend(change.1.clone());
            // The unique index of an identity that is no whole row is immediate.
            let distinct: BTreeSet<&[String]> = next.iter().map(|row| &row.0[..2]).collect();
            if full || distinct.len() == next.len() {
                rows = next;
                changes.push(change);
            }
        }
        let keys: BTreeSet<&String> = rows.iter().map(|row| &row.0[0]).collect();
        if keys.len() < rows.len() {
            continue;
        }
        tried += 1;
        let out = run(&changes, full, true);
        let scopes: [&dyn Fn(&str) -> bool; 3] = [&|_| true, &|scope| scope == "p0", &|scope| scope == "p1"];
        for holds in scopes {
            let found = apply(&out, holds, view(&start, holds));
            assert_eq!(found, view(&rows, holds), "{start:?}\n{changes:?}\nfull: {full}");
        }
        let as_logged = apply(&run(&changes, full, false), |_| true, view(&start, |_| true));
        wrong_in_order_of_the_log += u32::from(as_logged != view(&rows, |_| true));
    }
    assert!(wrong_in_order_of_the_log > 100, "the model finds nothing: {wrong_in_order_of_the_log}");
}

#[test]
fn too_many_rows_that_change_keys_are_sent_again() {
    let shift = |count: u64| -> Vec<_> {
        let row = |key, title| Row([format!("k{key}"), "p0".into(), format!("{title:01000}")]);
        (0..count).map(|key| (Some(row(key, key)), Some(row(key + 1, key)))).collect()
    };
    let moves = |out: &[Outgoing]| out.last().unwrap().moves.clone();
    assert_eq!(moves(&run(&shift(100), true, true)), None);
    assert_eq!(moves(&run(&shift(20_000), true, true)).as_deref(), Some("ms.wal.project.*"));
    // Rows that are new hold no key of others.
    let new: Vec<_> = shift(20_000).into_iter().map(|(_, after)| (None, after)).collect();
    let out = run(&new, true, true);
    assert_eq!((moves(&out), apply(&out, |_| true, Rows::new()).len()), (None, 20_000));
}
