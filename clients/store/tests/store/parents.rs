//! Changes that refer to a row wait for the transaction that makes it, and counted columns send by how much they changed.

use millstream_client_core::replica::Step;
use millstream_schemas::{Code, ColumnSchema, Merge, Reference, Schema, TableOp, TableSchema};
use uuid::Uuid;

use crate::fixture::*;

/// Projects, tasks in them, and comments on tasks by a key of two columns.
fn family() -> Fixture {
    let mut f = fixture();
    let table = |name: &str, columns: &[(&str, &str)], key: &[usize], references: &[(&[usize], &str)]| TableSchema {
        name: name.into(),
        columns: columns.iter().map(|(name, r#type)| column(name, r#type, true)).collect(),
        key: key.to_vec(),
        scopes: Vec::new(),
        references: references
            .iter()
            .map(|(columns, table)| Reference {
                columns: columns.to_vec(),
                table: (*table).into(),
                cascades: *table != "days",
            })
            .collect(),
        clocks: None,
    };
    let tables = vec![
        table("projects", &[("id", "uuid"), ("name", "text")], &[0], &[]),
        table("tasks", &[("id", "text"), ("project_id", "uuid"), ("title", "text")], &[0], &[(&[1], "projects")]),
        table("days", &[("task", "text"), ("day", "integer")], &[0, 1], &[(&[0], "tasks")]),
        table("notes", &[("id", "text"), ("day", "integer"), ("task", "text")], &[0], &[(&[2, 1], "days")]),
    ];
    f.store.install(&Schema { version: "2".into(), tables }).unwrap();
    f
}

const P: &str = "00000000-0000-0000-0000-00000000000a";

fn project(f: &mut Fixture) {
    f.write(&[&format!("INSERT INTO projects VALUES ('{P}', 'p')")]).unwrap();
}

fn refused(client_seq: u64, code: Code) -> millstream_schemas::stream::Failure {
    failure(client_seq, Uuid::nil(), code)
}

#[test]
fn what_refers_to_a_row_comes_after_its_creation() {
    let mut f = family();
    project(&mut f);
    // In whichever spelling the app refers to it.
    f.write(&[&format!("INSERT INTO tasks VALUES ('t', '{}', 'x')", P.to_uppercase())]).unwrap();
    f.write(&["INSERT INTO days VALUES ('t', 7)"]).unwrap();
    f.write(&["INSERT INTO notes VALUES ('n', 7, 't')"]).unwrap();
    // It does not touch what refers to something.
    f.write(&["UPDATE tasks SET title = 'y' WHERE id = 't'"]).unwrap();
    f.write(&["INSERT INTO tasks VALUES ('free', NULL, 'x')"]).unwrap();
    let chain = vec![
        entry(1, P, &[]),
        entry(2, "t", &[1]),
        entry(3, "t", &[2]),
        entry(4, "n", &[3]),
        entry(5, "t", &[2]),
        entry(6, "free", &[]),
    ];
    assert_eq!(queue(&f), chain);
}

#[test]
fn children_wait_for_their_parent_sent_or_not_stay_visible_and_follow() {
    let mut f = family();
    project(&mut f);
    f.write(&[&format!("INSERT INTO tasks VALUES ('sent', '{P}', 'x')")]).unwrap();
    f.apply(vec![told(2, vec![refused(1, Code::BusinessRule), refused(2, Code::PredecessorFailed)])]);
    f.write(&[&format!("INSERT INTO tasks VALUES ('unsent', '{P}', 'x')")]).unwrap();
    f.write(&["INSERT INTO days VALUES ('unsent', 1)"]).unwrap();
    f.write(&["INSERT INTO tasks VALUES ('free', NULL, 'x')"]).unwrap();
    assert_eq!(states(&f), "1|1|retry_wait|1\n2|-|held|0\n3|-|held|0\n4|-|held|0\n5|3|pending|0");
    assert_eq!(f.read("SELECT id FROM tasks ORDER BY id"), "free\nsent\nunsent");
    let waits = |f: &Fixture, tx| f.store.transaction(tx).unwrap()[0].waits_for;
    assert_eq!((waits(&f, 2), waits(&f, 3), waits(&f, 4)), (Some(1), Some(1), Some(3)));
    let edit = millstream_client_store::Edit { change_id: None, column: "name".into(), value: Some("Cellar".into()) };
    f.store.edit(1, &[edit]).unwrap();
    assert_eq!(
        queue(&f),
        [
            entry(3, "free", &[]),
            entry(4, P, &[]),
            entry(5, "sent", &[4]),
            entry(6, "unsent", &[4]),
            entry(7, "unsent", &[6])
        ]
    );
    // Again in vain: they wait again, and one that is discarded waits for nothing.
    let codes = [
        (4, Code::PermissionDenied),
        (5, Code::PredecessorFailed),
        (6, Code::PredecessorFailed),
        (7, Code::PredecessorFailed),
    ];
    f.apply(vec![told(7, codes.map(|(client_seq, code)| refused(client_seq, code)).to_vec())]);
    assert_eq!(states(&f), "1|4|error|1\n2|-|held|0\n3|-|held|0\n4|-|held|0\n5|3|confirmed|0");
    f.store.discard(1).unwrap();
    assert_eq!(queue(&f).len(), 3);
}

#[test]
fn a_row_that_the_server_has_is_waited_for_by_nobody() {
    let mut f = family();
    let row = vec![Some(P.to_owned()), Some("theirs".to_owned())];
    f.apply(vec![Step::Rows(vec![changes("projects", TableOp::Upsert, vec![row.clone()])])]);
    f.write(&[&format!("UPDATE projects SET name = 'mine' WHERE id = '{P}'")]).unwrap();
    f.apply(vec![told(1, vec![refused(1, Code::PermissionDenied)])]);
    f.write(&[&format!("INSERT INTO tasks VALUES ('t', '{P}', 'x')")]).unwrap();
    assert_eq!(states(&f), "1|1|error|1\n2|2|pending|0");
    // Made here, refused, and there all the same.
    let other = "00000000-0000-0000-0000-00000000000b";
    f.write(&[&format!("INSERT INTO projects VALUES ('{other}', 'p')")]).unwrap();
    f.apply(vec![
        Step::Rows(vec![changes("projects", TableOp::Upsert, vec![vec![Some(other.into()), Some("theirs".into())]])]),
        told(3, vec![refused(3, Code::BusinessRule)]),
    ]);
    f.write(&[&format!("INSERT INTO tasks VALUES ('u', '{other}', 'x')")]).unwrap();
    assert_eq!(queue(&f), [entry(4, "u", &[])]);
}

fn counters() -> Fixture {
    let mut f = fixture();
    let count = |name: &str, merge| ColumnSchema { merge: Some(merge), ..column(name, "bigint", true) };
    let tables = vec![TableSchema {
        name: "counters".into(),
        columns: vec![
            column("id", "text", true),
            count("n", Merge::Add),
            count("most", Merge::Max),
            column("title", "text", true),
        ],
        key: vec![0],
        scopes: Vec::new(),
        references: Vec::new(),
        clocks: None,
    }];
    f.store.install(&Schema { version: "2".into(), tables }).unwrap();
    f.apply(vec![server("10", "5")]);
    f
}

fn server(n: &str, most: &str) -> Step {
    let row = vec![Some("a".to_owned()), Some(n.to_owned()), Some(most.to_owned()), None];
    Step::Rows(vec![changes("counters", TableOp::Upsert, vec![row])])
}

#[test]
fn a_sum_sends_by_how_much_it_changed_and_shows_what_comes_of_it() {
    let mut f = counters();
    let shown = |f: &Fixture| f.read("SELECT n, most, title FROM counters");
    f.write(&["UPDATE counters SET n = n + 1, most = max(most, 7), title = 'x'"]).unwrap();
    f.write(&["UPDATE counters SET n = n - 3"]).unwrap();
    let sent: Vec<_> = submits(&f).into_iter().map(|submit| submit.changes[0].clone()).collect();
    let values = |values: &[&str]| values.iter().map(|text| Some((*text).to_owned())).collect::<Vec<_>>();
    assert_eq!(
        (&sent[0].columns[..], &sent[0].adds[..]),
        (&["n", "most", "title"].map(String::from)[..], &["n".to_owned()][..])
    );
    assert_eq!((&sent[0].values, &sent[1].values), (&values(&["1", "7", "x"]), &values(&["-3"])));
    assert_eq!(shown(&f), "8|7|x");
    // Another client's change comes in between, and counts too.
    f.apply(vec![server("20", "9")]);
    assert_eq!(shown(&f), "18|9|x");
    f.apply(vec![server("21", "9"), confirmed(1)]);
    assert_eq!(shown(&f), "18|9|-");
    f.apply(vec![server("18", "9"), confirmed(2)]);
    assert_eq!(shown(&f), "18|9|-");
}

#[test]
fn a_replaced_row_adds_the_difference_and_what_is_no_number_is_sent_as_it_is() {
    let mut f = counters();
    let last = |f: &Fixture| f.read("SELECT op, columns, vals, adds FROM local_changes ORDER BY id DESC LIMIT 1");
    f.write(&["REPLACE INTO counters VALUES ('a', 12, 5, NULL)"]).unwrap();
    assert_eq!(last(&f), r#"update|["n"]|["2"]|["n"]"#);
    f.write(&["REPLACE INTO counters VALUES ('a', 12, 5, NULL)"]).unwrap();
    assert_eq!(last(&f), r#"update|["most"]|["5"]|-"#);
    f.write(&["UPDATE counters SET n = 'many'"]).unwrap();
    assert_eq!(last(&f), r#"update|["n"]|["many"]|-"#);
    f.write(&["UPDATE counters SET n = 3"]).unwrap();
    assert_eq!(last(&f), r#"update|["n"]|["3"]|["n"]"#);
    f.write(&["UPDATE counters SET n = NULL"]).unwrap();
    assert_eq!(last(&f), r#"update|["n"]|[null]|-"#);
    f.write(&["INSERT INTO counters (id, n) VALUES ('b', 4)"]).unwrap();
    assert_eq!(last(&f), r#"insert|["id","n"]|["b","4"]|-"#);
}

#[test]
fn deletes_of_what_an_earlier_delete_took_along_say_so() {
    let mut f = family();
    project(&mut f);
    f.write(&[&format!("INSERT INTO tasks VALUES ('t', '{P}', 'x'), ('u', NULL, 'x')")]).unwrap();
    f.write(&["INSERT INTO days VALUES ('t', 7), ('u', 8)"]).unwrap();
    f.write(&["INSERT INTO notes VALUES ('n', 7, 't')"]).unwrap();
    f.write(&["DELETE FROM projects"]).unwrap();
    // Of what is still here: its task goes with the project. What refers without a cascade does not.
    f.write(&["DELETE FROM days", "DELETE FROM notes"]).unwrap();
    f.write(&["DELETE FROM tasks"]).unwrap();
    let gone = f.read("SELECT key, gone FROM local_changes WHERE op = 'delete' ORDER BY id");
    assert_eq!(
        gone,
        format!(
            r#"["{P}"]|-
["t","7"]|1
["u","8"]|-
["n"]|-
["t"]|1
["u"]|-"#
        )
    );
    let sent: Vec<bool> =
        submits(&f).iter().flat_map(|submit| submit.changes.iter().map(|change| change.gone)).collect();
    assert_eq!(sent.iter().filter(|gone| **gone).count(), 2);
}

/// A row that was made here and refused, since its key is taken, gets another one, with all that follows and refers to it.
#[test]
fn the_key_of_a_refused_insert_can_be_edited() {
    let mut f = family();
    // Another client's, which this one had not seen.
    f.write(&["INSERT INTO tasks VALUES ('7', NULL, 'mine')", "INSERT INTO days VALUES ('7', 1)"]).unwrap();
    f.write(&["INSERT INTO notes VALUES ('n', 1, '7')"]).unwrap();
    f.write(&["UPDATE tasks SET title = 'mine, too' WHERE id = '7'"]).unwrap();
    f.write(&["INSERT INTO days VALUES ('7', 2)"]).unwrap();
    f.write(&["DELETE FROM days WHERE task = '7' AND day = 2"]).unwrap();
    f.write(&["INSERT INTO tasks VALUES ('8', NULL, 'another')"]).unwrap();
    f.write(&["INSERT INTO notes VALUES ('other', 1, 'x')"]).unwrap();
    let theirs = vec![Some("7".to_owned()), None, Some("theirs".to_owned())];
    let codes = [2, 3, 4, 5].map(|client_seq| refused(client_seq, Code::PredecessorFailed)).to_vec();
    f.apply(vec![
        Step::Rows(vec![changes("tasks", TableOp::Upsert, vec![theirs])]),
        told(5, [vec![refused(1, Code::BusinessRule)], codes].concat()),
    ]);
    let edit = |column: &str, value: Option<&str>| millstream_client_store::Edit {
        change_id: None,
        column: column.into(),
        value: value.map(str::to_owned),
    };
    for (wrong, says) in [(Some("8"), "there is a row"), (None, "cannot be null")] {
        let error = f.store.edit(1, &[edit("title", Some("lost")), edit("id", wrong)]).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
    // The server had a row of that key by then, so two did not wait.
    let error = f.store.edit(1, &[edit("id", Some("9"))]).unwrap_err().to_string();
    assert!(error.contains("on its way"), "{error}");
    let last = submits(&f).last().unwrap().client_seq;
    f.apply(vec![told(last, Vec::new())]);
    f.store.edit(1, &[edit("id", Some("9"))]).unwrap();
    let shown = "SELECT group_concat(id || title, ' ' ORDER BY id) FROM tasks UNION ALL \
        SELECT group_concat(task || '/' || day, ' ') FROM days UNION ALL SELECT group_concat(id || task, ' ' ORDER BY id) FROM notes";
    assert_eq!(f.read(shown), "7theirs 9mine, too\n9/1\nn9");
    let sent: Vec<String> = submits(&f)
        .into_iter()
        .flat_map(|submit| submit.changes)
        .map(|change| {
            format!("{} {} {:?} {:?}", change.op.as_str(), change.table, change.key, change.values).replace("Some", "")
        })
        .collect();
    let expected = [
        r#"insert tasks [("9")] [("9"), ("mine")]"#,
        r#"insert days [("9"), ("1")] [("9"), ("1")]"#,
        r#"insert notes [("n")] [("n"), ("1"), ("9")]"#,
        r#"update tasks [("9")] [("mine, too")]"#,
    ];
    assert_eq!(sent, expected);
    let last = submits(&f).last().unwrap().client_seq;
    f.apply(vec![told(last, Vec::new())]);
    assert_eq!(f.bases(), "");
    // Of a row that is there, the key stays.
    f.write(&["UPDATE tasks SET title = 'x' WHERE id = '7'"]).unwrap();
    let last = submits(&f).last().unwrap().client_seq;
    f.apply(vec![told(last, vec![refused(last, Code::PermissionDenied)])]);
    let tx = f.store.failed().unwrap()[0].tx;
    let error = f.store.edit(tx, &[edit("id", Some("10"))]).unwrap_err().to_string();
    assert!(error.contains("cannot be changed"), "{error}");
}

/// The key was free again, and the app has used it: what it did to that row since stays there.
#[test]
fn an_edited_key_leaves_a_later_row_of_the_old_key_alone() {
    let mut f = family();
    f.write(&["INSERT INTO tasks VALUES ('7', NULL, 'first')"]).unwrap();
    f.apply(vec![told(1, vec![refused(1, Code::PermissionDenied)])]);
    f.write(&["INSERT INTO tasks VALUES ('7', NULL, 'second')"]).unwrap();
    f.write(&["UPDATE tasks SET title = 'second, too' WHERE id = '7'"]).unwrap();
    let edit = millstream_client_store::Edit { change_id: None, column: "id".into(), value: Some("9".into()) };
    f.store.edit(1, &[edit]).unwrap();
    assert_eq!(f.read("SELECT group_concat(id || title, ' ' ORDER BY id) FROM tasks"), "7second, too 9first");
}
