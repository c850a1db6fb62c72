//! The store on real SQLite files.

#![expect(clippy::unwrap_used, reason = "tests panic on what must not happen")]

mod clauses;
mod damage;
mod fixture;
mod guard;
mod identity;
mod leaving;
mod order;
mod parents;
mod recorded;
mod snapshots;
mod spelling;
mod territory;
mod types;
mod wide;

use std::sync::atomic::Ordering;

use fixture::{changes, column, confirmed, delete, failed, fixture, schema, stage, task, upsert};
use millstream_client_core::replica::{Batch, Step, Work};
use millstream_client_store::{MAX_TRANSACTION_BYTES, Outcome, Store, StoreError, Verdict};
use millstream_schemas::frame::{MAX_FRAME_BYTES, MAX_TRANSACTION_CHANGES};
use millstream_schemas::{
    Code, ColumnSchema, Lsn, Operation, Position, Row, Scope, TableChanges, TableOp, TableSchema,
};
use rusqlite::types::Value;
use uuid::Uuid;

#[test]
fn triggers_record_what_changed_in_text_form() {
    let mut f = fixture();
    f.apply(vec![upsert(vec![task("a", "p", "server", false)])]);
    let client_seq = f
        .write(&[
            "INSERT INTO tasks (id, project_id, title, done, position, photo) VALUES ('b', 'p', 'say \"hi\"', 1, 0.1, x'00ff')",
            "UPDATE tasks SET title = 'mine', done = 1 WHERE id = 'a'",
            "UPDATE tasks SET title = title",
            "DELETE FROM tasks WHERE id = 'a'",
            "INSERT INTO members VALUES ('p', 'ann', 'owner')",
            "UPDATE members SET role = NULL",
        ])
        .unwrap();
    assert_eq!(client_seq, Some(1));
    let expected = r#"1|insert|["b"]|["id","project_id","title","done","position","photo"]|["b","p","say \"hi\"","t","0.1","\\x00ff"]
1|update|["a"]|["title","done"]|["mine","t"]
1|delete|["a"]|[]|[]
1|insert|["p","ann"]|["project_id","user_id","role"]|["p","ann","owner"]
1|update|["p","ann"]|["role"]|[null]"#;
    assert_eq!(f.changes(), expected);
    assert_eq!(f.read("SELECT previous FROM local_changes WHERE op = 'update' AND tbl = 'tasks'"), r#"["server","f"]"#);
    let base = r#"["a"]|{"id":"a","project_id":"p","title":"server","done":"f","position":"1.5","photo":null,"created_at":"2026-01-01 00:00:00+00"}
["b"]|-
["p","ann"]|-"#;
    assert_eq!(f.bases(), base);

    let submits = f.store.pending(0, 10).unwrap();
    assert_eq!(submits.len(), 1);
    assert_eq!((submits[0].client_seq, submits[0].attempt, submits[0].changes.len()), (1, 1, 5));
    assert_eq!(submits[0].changes[2].op, Operation::Delete);
    let stamps: Vec<u64> = submits[0].changes.iter().map(|change| change.stamp).collect();
    assert!(stamps.is_sorted_by(|a, b| a < b), "the clock stands, stamps do not: {stamps:?}");
}

/// A delete of the row would take on the server what refers to it, and lose to newer edits as a whole.
#[test]
fn replacing_a_row_is_an_update_of_what_differs() {
    let mut f = fixture();
    f.apply(vec![upsert(vec![task("a", "p", "server", false), task("b", "p", "server", false)])]);
    f.write(&["REPLACE INTO tasks (id, project_id, title, done) VALUES ('a', 'p', 'say \"hi\"', 0)"]).unwrap();
    let first = r#"1|update|["a"]|["title","position"]|["say \"hi\"",null]"#;
    assert_eq!(f.changes(), first);
    assert_eq!(f.read("SELECT previous FROM local_changes"), r#"["server","1.5"]"#);
    // The first REPLACE changes nothing. Then come a new row, a row of the same transaction, and a row that the app deletes and
    // inserts itself.
    f.write(&["REPLACE INTO tasks (id, project_id, title, done, position) VALUES ('b', 'p', 'server', 0, 1.5)"])
        .unwrap();
    let nothing = r#"2|update|["b"]|["project_id"]|["p"]"#;
    assert_eq!(f.changes(), format!("{first}\n{nothing}"), "what only the server fills in comes back with it");
    f.write(&[
        "REPLACE INTO tasks (id, title) VALUES ('c', 'new')",
        "INSERT INTO tasks (id, title) VALUES ('d', 'one')",
        "INSERT OR REPLACE INTO tasks (id, title) VALUES ('d', 'two')",
        "DELETE FROM tasks WHERE id = 'b'",
        "INSERT INTO tasks (id, project_id, title) VALUES ('b', 'q', 'server')",
        "DELETE FROM tasks WHERE id = 'a'",
        "INSERT INTO tasks (id, title) VALUES ('e', 'between')",
        "INSERT INTO tasks (id, title) VALUES ('a', 'after it')",
        "DELETE FROM tasks WHERE id = 'a'",
        "REPLACE INTO members VALUES ('p', 'ann', 'owner')",
        "REPLACE INTO members VALUES ('p', 'ann', 'reader')",
        "REPLACE INTO members VALUES ('p', 'ann', 'reader')",
    ])
    .unwrap();
    let expected = r#"3|insert|["c"]|["id","title"]|["c","new"]
3|insert|["d"]|["id","title"]|["d","one"]
3|update|["d"]|["title"]|["two"]
3|update|["b"]|["project_id","done","position"]|["q",null,null]
3|delete|["a"]|[]|[]
3|insert|["e"]|["id","title"]|["e","between"]
3|insert|["a"]|["id","title"]|["a","after it"]
3|delete|["a"]|[]|[]
3|insert|["p","ann"]|["project_id","user_id","role"]|["p","ann","owner"]
3|update|["p","ann"]|["role"]|["reader"]
3|update|["p","ann"]|["role"]|["reader"]"#;
    assert_eq!(f.changes(), format!("{first}\n{nothing}\n{expected}"));
    let stamps: Vec<u64> = f.store.pending(2, 10).unwrap()[0].changes.iter().map(|change| change.stamp).collect();
    assert!(stamps.iter().collect::<std::collections::BTreeSet<_>>().len() == stamps.len(), "{stamps:?}");
    assert_eq!(f.tasks(), "b|server|-\nc|new|-\nd|two|-\ne|between|-");
}

#[test]
fn rows_with_odd_names_are_replaced_too() {
    let names = ["i.d", "a\"b", "c\\d", "e'f", "g.h", "[0]", "$", "ü 漢", ""];
    let columns = names.map(|name| column(if name.is_empty() { " " } else { name }, "text", true)).to_vec();
    let odd = TableSchema {
        name: "odd".into(),
        columns,
        key: vec![0],
        scopes: Vec::new(),
        references: Vec::new(),
        clocks: None,
    };
    let mut f = wide::with_schema(&millstream_schemas::Schema { version: "1".into(), tables: vec![odd] });
    f.write(&["INSERT INTO odd VALUES ('k', 'a', 'a', 'a', 'a', 'a', 'a', 'a', 'a')"]).unwrap();
    f.write(&["REPLACE INTO odd VALUES ('k', 'b', 'a', 'b', 'b', 'b', 'b', 'b', 'b')"]).unwrap();
    let changed = r#"["a\"b","e'f","g.h","[0]","$","ü 漢"," "]"#;
    assert_eq!(f.read("SELECT columns FROM local_changes WHERE op = 'update'"), changed);
    assert_eq!(f.read("SELECT previous FROM local_changes WHERE op = 'update'"), r#"["a","a","a","a","a","a","a"]"#);
}

#[test]
fn keys_are_recorded_as_the_server_s_are_looked_up() {
    let mut f = fixture();
    let key = "q\"\\/\u{1}\u{1f}\n\t\u{8}\u{c}\u{7f}é\u{2028}😀";
    f.apply(vec![upsert(vec![task(key, "p", "server", false)])]);
    f.write(&["UPDATE tasks SET title = 'mine'"]).unwrap();
    f.apply(vec![upsert(vec![task(key, "p", "newer", true)]), confirmed(1)]);
    assert_eq!(f.read("SELECT title FROM tasks"), "newer", "the server's row was matched to the pending one");
    assert_eq!(f.bases(), "");
}

#[test]
fn refusals_name_the_column_and_leave_nothing() {
    let mut f = fixture();
    f.apply(vec![upsert(vec![task("a", "p", "server", false)])]);
    for (sql, part) in [
        ("UPDATE tasks SET id = 'z'", "key column \"id\""),
        ("UPDATE tasks SET created_at = 'now'", "column \"created_at\" of \"tasks\" is not writable"),
        (
            "INSERT INTO tasks (id, created_at) VALUES ('c', 'now')",
            "column \"created_at\" of \"tasks\" is not writable",
        ),
        ("INSERT OR IGNORE INTO tasks (id, created_at) VALUES ('c', 'now')", "is not writable"),
        ("INSERT INTO tasks (title) VALUES ('no key')", "key column \"id\" of \"tasks\" is null"),
    ] {
        match f.write(&["UPDATE tasks SET title = 'lost'", sql]) {
            Err(StoreError::NotWritable(message)) => assert!(message.contains(part), "{sql}: {message}"),
            other => panic!("{sql}: {other:?}"),
        }
    }
    assert_eq!((f.changes(), f.tasks(), f.bases()), (String::new(), "a|server|0".into(), String::new()));
}

#[test]
fn a_rejected_replace_sets_the_row_back() {
    let mut f = fixture();
    f.apply(vec![upsert(vec![task("a", "p", "server", false)])]);
    f.write(&["INSERT OR REPLACE INTO tasks (id, project_id, title) VALUES ('a', 'p', 'mine')"]).unwrap();
    assert_eq!(f.read("SELECT op FROM local_changes ORDER BY id"), "update");
    assert!(f.bases().contains("server"), "the confirmed image survived: {}", f.bases());
    f.apply(vec![failed(1, Code::PermissionDenied)]);
    assert_eq!(f.tasks(), "a|server|0");
}

#[test]
fn numbers_have_no_gaps_whatever_is_rolled_back() {
    let mut f = fixture();
    assert_eq!(f.write(&["INSERT INTO tasks (id) VALUES ('a')"]).unwrap(), Some(1));
    assert!(f.write(&["INSERT INTO tasks (id) VALUES ('b')", "INSERT INTO tasks (id) VALUES ('a')"]).is_err());
    assert_eq!(f.write(&["UPDATE tasks SET title = title"]).unwrap(), None);
    assert_eq!(f.write(&["INSERT OR IGNORE INTO tasks (id) VALUES ('a')"]).unwrap(), None);
    let written = f.store.write(None, |tx| {
        let refused: Result<(), StoreError> = tx.savepoint(|tx| {
            tx.execute("INSERT INTO tasks (id) VALUES ('c')", &[])?;
            Err(StoreError::TransactionLost)
        });
        assert!(refused.is_err());
        Ok::<_, StoreError>(())
    });
    assert!(written.unwrap().recorded.is_none(), "everything recorded was rolled back");
    let written = f.store.write(None, |tx| {
        tx.execute("INSERT INTO tasks (id) VALUES ('d')", &[])?;
        let _: Result<(), StoreError> = tx.savepoint(|tx| {
            tx.execute("INSERT INTO tasks (id) VALUES ('e')", &[])?;
            Err(StoreError::TransactionLost)
        });
        // A statement that fails half-way takes only its own changes with it.
        assert!(tx.execute("INSERT INTO tasks (id) VALUES ('f'), ('a')", &[]).is_err());
        tx.savepoint(|tx| tx.execute("INSERT INTO tasks (id) VALUES ('g')", &[]))
    });
    assert_eq!(written.unwrap().recorded.unwrap().entry.unwrap().client_seq, 2);
    assert!(matches!(
        f.write(&["INSERT INTO tasks (id) VALUES ('h')", "INSERT OR ROLLBACK INTO tasks (id) VALUES ('a')"]),
        Err(StoreError::Statement(_))
    ));
    assert_eq!(f.write(&["INSERT INTO tasks (id) VALUES ('i')"]).unwrap(), Some(3));
    assert_eq!(f.read("SELECT tx, key FROM local_changes ORDER BY id"), "1|[\"a\"]\n2|[\"d\"]\n2|[\"g\"]\n3|[\"i\"]");
    // Numbers go on after settled entries are pruned.
    f.apply(vec![confirmed(3)]);
    f.host.now.store(10_000_000, Ordering::Relaxed);
    assert_eq!(f.store.prune(9_000_000).unwrap(), 4);
    let mut f = f.reopen();
    assert_eq!(f.write(&["INSERT INTO tasks (id) VALUES ('j')"]).unwrap(), Some(4));
}

#[test]
fn grouped_writes_are_whole_each_on_its_own() {
    let mut f = fixture();
    let results = f
        .store
        .group(|store| {
            ["a", "a", "b"].map(|id| {
                let written = store.write(None, |tx| {
                    tx.execute("INSERT INTO members VALUES ('p', ?1, 'x')", &[Value::Text(id.into())])?;
                    tx.execute("INSERT INTO tasks (id) VALUES (?1)", &[Value::Text(id.into())])
                });
                written.map(|written| written.recorded.unwrap().entry.unwrap().client_seq).map_err(|_: StoreError| ())
            })
        })
        .unwrap();
    assert_eq!(results, [Ok(1), Err(()), Ok(2)]);
    assert_eq!(f.read("SELECT tx, tbl, key FROM local_changes ORDER BY id").lines().count(), 4);
}

#[test]
fn a_kill_leaves_rows_and_queue_entries_together() {
    let mut f = fixture();
    for n in 0..30 {
        f.write(&[&format!("INSERT INTO tasks (id, title) VALUES ('{n:02}', 'x')")]).unwrap();
        f = f.reopen();
    }
    assert_eq!(f.read("SELECT count(*) FROM tasks"), "30");
    let seqs: Vec<u64> = f.store.pending(0, 100).unwrap().iter().map(|submit| submit.client_seq).collect();
    assert_eq!(seqs, (1..=30).collect::<Vec<_>>());
    assert_eq!(f.store.schema(), Some(&schema()));
    assert_eq!(f.read("PRAGMA integrity_check"), "ok");
}

#[test]
fn pending_changes_stay_on_top_of_newer_server_rows() {
    let mut f = fixture();
    f.apply(vec![upsert(vec![task("a", "p", "server", false)])]);
    f.write(&["UPDATE tasks SET title = 'first'"]).unwrap();
    f.write(&["UPDATE tasks SET title = 'second'"]).unwrap();
    // Someone else's change, then the echo of the first of ours.
    f.apply(vec![upsert(vec![task("a", "p", "theirs", true)])]);
    assert_eq!(f.tasks(), "a|second|1", "their column, our title");
    f.apply(vec![upsert(vec![task("a", "p", "first", true)]), confirmed(1)]);
    assert_eq!(f.tasks(), "a|second|1", "no flicker back to the first");
    f.apply(vec![upsert(vec![task("a", "p", "second", true)]), confirmed(2)]);
    assert_eq!((f.tasks(), f.bases()), ("a|second|1".into(), String::new()));
    assert_eq!(f.read("SELECT DISTINCT state FROM local_changes"), "confirmed");
    assert_eq!(f.store.verdict(2).unwrap(), Verdict::Confirmed(Outcome::Applied));
}

#[test]
fn partial_updates_and_deletes_meet_pending_changes() {
    let mut f = fixture();
    f.apply(vec![upsert(vec![task("a", "p", "server", false), task("b", "p", "server", false)])]);
    f.write(&["UPDATE tasks SET title = 'mine'"]).unwrap();
    let partial = TableChanges {
        table: "tasks".into(),
        op: TableOp::Update,
        columns: Some(vec!["done".into(), "id".into()]),
        rows: vec![vec![Some("t".into()), Some("a".into())], vec![Some("t".into()), Some("gone".into())]],
    };
    f.apply(vec![Step::Rows(vec![partial]), delete("b")]);
    assert_eq!(f.tasks(), "a|mine|1", "the deleted row is gone although an update of it is pending");
    f.apply(vec![confirmed(1)]);
    assert_eq!((f.tasks(), f.bases()), ("a|server|1".into(), String::new()));
}

#[test]
fn a_row_that_moves_between_scopes_within_a_transaction_stays() {
    let mut f = fixture();
    f.apply(vec![upsert(vec![task("a", "p", "server", false)])]);
    f.apply(vec![delete("a"), upsert(vec![task("a", "q", "moved", false)])]);
    assert_eq!(f.tasks(), "a|moved|0");
}

#[test]
fn truncate_keeps_pending_inserts() {
    let mut f = fixture();
    f.apply(vec![upsert(vec![task("a", "p", "server", false), task("b", "p", "server", false)])]);
    f.write(&["UPDATE tasks SET title = 'mine' WHERE id = 'a'", "INSERT INTO tasks (id, title) VALUES ('c', 'new')"])
        .unwrap();
    f.apply(vec![Step::Rows(vec![changes("tasks", TableOp::Truncate, vec![])])]);
    assert_eq!(f.tasks(), "c|new|-");
}

#[test]
fn rows_kept_aside_show_with_their_transaction() {
    let mut f = fixture();
    f.apply(vec![upsert(vec![task("a", "p", "old", false), task("b", "p", "old", false)])]);
    let spill = |part, rows: Vec<Row>| match upsert(rows) {
        Step::Rows(changes) => Work::Spill(part, changes),
        other => panic!("{other:?}"),
    };
    let many = (0..2_500).map(|n| task(&format!("m{n:04}"), "p", "m", false)).collect();
    f.store
        .perform(&[
            spill(7, vec![task("x", "p", "of a session that was cut", false)]),
            Work::ClearSpill,
            spill(8, vec![task("a", "p", "new", false)]),
            spill(9, vec![task("y", "p", "of an attempt that was cut", false)]),
            Work::Unspill(9),
            spill(8, many),
            spill(9, vec![task("b", "p", "later", false)]),
        ])
        .unwrap();
    assert_eq!(f.tasks(), "a|old|0\nb|old|0", "nothing is visible");
    f.write(&["UPDATE tasks SET done = 1 WHERE id = 'a'"]).unwrap();
    f.apply(vec![Step::Spilled(8), upsert(vec![task("b", "p", "between", false)]), Step::Spilled(9)]);
    assert_eq!(f.read("SELECT count(*) FROM tasks WHERE title = 'm'"), "2500");
    assert_eq!(f.read("SELECT group_concat(id || title || done, ' ') FROM tasks WHERE id < 'm'"), "anew1 blater0");
    assert_eq!(f.read("SELECT count(*) FROM millstream_spill"), "0");
}

#[test]
fn a_snapshot_replaces_by_difference_and_keeps_what_is_pending() {
    let mut f = fixture();
    let (p, q) = (Scope::new("project", "p"), Scope::new("project", "q"));
    stage(
        &mut f,
        vec![
            task("a", "p", "a", false),
            task("b", "p", "b", false),
            task("c", "p", "c", false),
            task("x", "q", "x", false),
        ],
    );
    f.apply(vec![Step::Snapshot { scopes: vec![p.clone(), q.clone()], full: true }]);
    assert_eq!(f.store.info().unwrap().scopes, [p.clone(), q.clone()]);
    f.write(&[
        "UPDATE tasks SET title = 'mine' WHERE id IN ('b', 'c')",
        "INSERT INTO tasks (id, project_id, title) VALUES ('n', 'p', 'new')",
    ])
    .unwrap();
    f.store.take_written();

    // b is gone on the server, c changed there, d is new; q is not part of it.
    stage(&mut f, vec![task("a", "p", "a", false), task("c", "p", "theirs", true), task("d", "p", "d", false)]);
    f.apply(vec![Step::Snapshot { scopes: vec![p.clone()], full: false }]);
    assert_eq!(f.tasks(), "a|a|0\nc|mine|1\nd|d|0\nn|new|-\nx|x|0");
    assert_eq!(f.store.pending(0, 9).unwrap()[0].changes.len(), 3, "the queue is untouched");
    assert_eq!(f.read("SELECT count(*) FROM millstream_snapshot"), "0");

    // All scopes anew, and q is not among them any more.
    stage(&mut f, vec![task("a", "p", "a", false)]);
    f.apply(vec![Step::Snapshot { scopes: vec![p.clone()], full: true }, confirmed(1)]);
    assert_eq!((f.tasks(), f.bases()), ("a|a|0".into(), String::new()));
    assert_eq!(f.store.info().unwrap().scopes, [p]);
}

#[test]
fn a_lost_scope_takes_its_rows_unless_another_holds_them() {
    let mut f = fixture();
    let member =
        |project: &str, user: &str| vec![Some(project.to_owned()), Some(user.to_owned()), Some("member".into())];
    let rows = vec![
        changes("tasks", TableOp::Upsert, vec![task("a", "p", "a", false), task("x", "q", "x", false)]),
        changes("members", TableOp::Upsert, vec![member("p", "ann"), member("p", "me"), member("q", "me")]),
    ];
    f.store.perform(&[Work::Stage(rows)]).unwrap();
    let scopes = vec![Scope::new("project", "p"), Scope::new("project", "q"), Scope::user("me")];
    f.apply(vec![Step::Snapshot { scopes, full: true }]);
    f.write(&["UPDATE tasks SET title = 'mine'"]).unwrap();
    f.apply(vec![Step::ScopeRemoved(Scope::new("project", "p"))]);
    assert_eq!(f.tasks(), "x|mine|0");
    assert_eq!(
        f.read("SELECT project_id, user_id FROM members ORDER BY 1, 2"),
        "p|me\nq|me",
        "my own membership is in my scope"
    );
    f.apply(vec![failed(1, Code::PermissionDenied)]);
    assert_eq!(f.tasks(), "x|x|0");
}

#[test]
fn a_new_schema_keeps_rows_and_queue() {
    let mut f = fixture();
    f.apply(vec![upsert(vec![task("a", "p", "server", false)])]);
    f.write(&["UPDATE tasks SET title = 'mine'"]).unwrap();
    let mut newer = schema();
    newer.version = "2".into();
    newer.tables[0].columns.remove(5);
    newer.tables[0].columns.push(column("due", "date", true));
    newer.tables.remove(1);
    newer.tables.push(TableSchema {
        name: "labels".into(),
        columns: vec![column("id", "bigint", true)],
        key: vec![0],
        scopes: vec![],
        references: Vec::new(),
        clocks: None,
    });
    assert!(f.store.install(&newer).unwrap(), "the rows of a newly synced table come with a snapshot");
    assert!(!f.store.install(&newer).unwrap());
    let mut f = f.reopen();
    f.write(&["UPDATE tasks SET due = '2026-12-24'", "INSERT INTO labels VALUES (7)"]).unwrap();
    assert_eq!(f.read("SELECT title, due FROM tasks"), "mine|2026-12-24");
    assert_eq!(
        f.read("SELECT columns, vals FROM local_changes WHERE tx = 2 ORDER BY id"),
        "[\"due\"]|[\"2026-12-24\"]\n[\"id\"]|[\"7\"]"
    );
    let mut row = task("a", "p", "server", false);
    row.remove(5);
    row.push(Some("2027-01-01".into()));
    f.apply(vec![upsert(vec![row]), confirmed(2)]);
    assert_eq!(f.read("SELECT title, due FROM tasks"), "server|2027-01-01");

    newer.version = "3".into();
    newer.tables[0].columns.push(ColumnSchema { nullable: false, ..column("rank", "integer", true) });
    assert!(f.store.install(&newer).unwrap(), "rows on hand lack what cannot be null: a snapshot is needed");
    assert!(f.store.info().unwrap().resync);
    f.apply(vec![Step::Snapshot { scopes: vec![], full: false }]);
    assert!(f.store.info().unwrap().resync, "only a full one will do");
    f.apply(vec![Step::Snapshot { scopes: vec![], full: true }]);
    assert!(!f.store.info().unwrap().resync);
    f.store.forget_position().unwrap();
    let f = f.reopen();
    assert!(f.store.info().unwrap().resync);
}

#[test]
fn limits_are_refused_at_write_time() {
    let mut f = fixture();
    let many = |count: usize| {
        format!(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {count}) INSERT INTO tasks (id) SELECT i FROM n"
        )
    };
    match f.write(&[&many(MAX_TRANSACTION_CHANGES + 1)]) {
        Err(StoreError::TooManyChanges { found }) => assert_eq!(found, MAX_TRANSACTION_CHANGES + 1),
        other => panic!("{other:?}"),
    }
    let big = format!("INSERT INTO tasks (id, title) VALUES ('big', '{}')", "x".repeat(MAX_FRAME_BYTES));
    let error = f.write(&[&big]).unwrap_err();
    assert!(
        matches!(error, StoreError::TooManyBytes { .. })
            && error.to_string().contains(&MAX_TRANSACTION_BYTES.to_string()),
        "{error}"
    );
    assert_eq!((f.tasks(), f.changes()), (String::new(), String::new()));
    assert_eq!(f.write(&[&many(MAX_TRANSACTION_CHANGES)]).unwrap(), Some(1));
}

#[test]
fn the_app_s_writes_wait_for_the_disk() {
    let mut f = fixture();
    let mode = f.store.write(None, |tx| tx.query("PRAGMA synchronous", &[])).unwrap().value.rows[0][0].clone();
    assert_eq!(mode, Value::Integer(2));
    // Applying may not, and must put it back even when it fails.
    let bad = Batch { steps: vec![upsert(vec![vec![None]])], ..Batch::default() };
    assert!(f.store.perform(&[Work::Apply(bad)]).is_err());
    let mode = f.store.write(None, |tx| tx.query("PRAGMA synchronous", &[])).unwrap().value.rows[0][0].clone();
    assert_eq!(mode, Value::Integer(2));
}

#[test]
fn another_connection_is_noticed_and_numbers_are_shared() {
    let mut f = fixture();
    let mut other = Store::open(&f.path, f.host.clone()).unwrap();
    assert!(!f.store.changed_elsewhere().unwrap());
    assert_eq!(f.write(&["INSERT INTO tasks (id) VALUES ('a')"]).unwrap(), Some(1));
    assert!(!f.store.changed_elsewhere().unwrap(), "its own commits are not elsewhere");
    let written = other.write(None, |tx| tx.execute("INSERT INTO tasks (id) VALUES ('b')", &[])).unwrap();
    assert_eq!(written.recorded.unwrap().entry.unwrap().client_seq, 2);
    assert!(f.store.changed_elsewhere().unwrap());
    assert_eq!(f.store.info().unwrap().last_seq, 2);
    assert_eq!(f.store.take_written().into_iter().filter(|t| t == "tasks").count(), 1);
}

#[test]
fn marks_are_written_with_the_next_batch() {
    let mut f = fixture();
    for id in ["a", "b", "c", "d"] {
        f.write(&[&format!("INSERT INTO tasks (id) VALUES ('{id}')")]).unwrap();
    }
    f.store.mark(3, 2);
    assert_eq!(f.read("SELECT state FROM local_changes ORDER BY id"), "pending\npending\npending\npending");
    f.apply(vec![confirmed(1)]);
    assert_eq!(f.read("SELECT state FROM local_changes ORDER BY id"), "confirmed\naccepted\nsending\npending");
    assert_eq!(f.store.pending(0, 9).unwrap().len(), 3, "what was sent can be sent again");
}

#[test]
fn stamps_follow_what_was_seen() {
    let mut f = fixture();
    let position = Position { epoch: Uuid::nil(), stream_seq: 1, lsn: Lsn(1) };
    let steps = vec![upsert(vec![task("a", "p", "server", false)])];
    f.store.apply(&Batch { steps, position: Some(position), at: 5_000_000, ..Batch::default() }).unwrap();
    let mut f = f.reopen();
    f.write(&["UPDATE tasks SET title = 'mine'"]).unwrap();
    assert!(
        f.store.pending(0, 1).unwrap()[0].changes[0].stamp > 5_000_000,
        "a later edit has a later stamp on a slow clock"
    );
}

#[test]
fn an_unknown_table_or_a_misshapen_row_applies_nothing() {
    let mut f = fixture();
    let good = upsert(vec![task("a", "p", "a", false)]);
    for bad in [
        Step::Rows(vec![changes("nope", TableOp::Upsert, vec![])]),
        upsert(vec![vec![None]]),
        Step::Rows(vec![TableChanges {
            columns: Some(vec!["nope".into()]),
            ..changes("tasks", TableOp::Upsert, vec![])
        }]),
    ] {
        let batch = Batch { steps: vec![good.clone(), bad, confirmed(1)], ..Batch::default() };
        assert!(f.store.apply(&batch).is_err());
    }
    assert_eq!((f.tasks(), f.store.info().unwrap().confirmed_seq), (String::new(), 0));
}
