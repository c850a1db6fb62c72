//! What SQLite's conflict clauses, and its larger statements, do to rows is what is recorded of them, and nothing else.

use std::collections::BTreeMap;

use millstream_client_store::StoreError;

use super::fixture::{Fixture, fixture};

/// The rows that the queue makes of nothing, as `id title done`.
fn replayed(f: &Fixture) -> String {
    let mut rows: BTreeMap<String, BTreeMap<String, Option<String>>> = BTreeMap::new();
    for line in f.read("SELECT op, key ->> 0, columns, vals FROM local_changes ORDER BY id").lines() {
        let [op, key, columns, values] = line.split('|').collect::<Vec<_>>()[..] else { panic!("{line}") };
        let columns: Vec<String> = serde_json::from_str(columns).unwrap();
        let set = columns.into_iter().zip(serde_json::from_str::<Vec<Option<String>>>(values).unwrap());
        match op {
            "delete" => drop(rows.remove(key)),
            "insert" => drop(rows.insert(key.to_owned(), set.collect())),
            _ => rows.get_mut(key).unwrap().extend(set),
        }
    }
    let cell = |row: &BTreeMap<String, Option<String>>, name| row.get(name).cloned().flatten().unwrap_or("-".into());
    rows.iter()
        .map(|(id, row)| format!("{id}|{}|{}", cell(row, "title"), cell(row, "done")))
        .collect::<Vec<_>>()
        .join("\n")
}

/// What the rows are, which is also what the queue says.
#[track_caller]
fn same(f: &Fixture) -> String {
    let shown = f.read("SELECT id, title, CASE done WHEN 1 THEN 't' WHEN 0 THEN 'f' END FROM tasks ORDER BY id");
    assert_eq!(shown, replayed(f));
    shown
}

/// An error with its causes.
fn whole(error: &StoreError) -> String {
    let causes = std::iter::successors(Some(error as &dyn std::error::Error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

fn started() -> Fixture {
    let mut f = fixture();
    f.write(&["INSERT INTO tasks (id, title) VALUES ('a', '1'), ('b', '2')"]).unwrap();
    f
}

#[test]
fn conflict_clauses_leave_what_sqlite_says_and_record_no_more() {
    for (clause, after) in [("OR IGNORE", "a|1|-\nb|2|-\nc|3|-\nd|5|-"), ("OR REPLACE", "a|4|-\nb|2|-\nc|3|-\nd|5|-")] {
        let mut f = started();
        f.write(&[&format!("INSERT {clause} INTO tasks (id, title) VALUES ('c', '3'), ('a', '4'), ('d', '5')")])
            .unwrap();
        assert_eq!(same(&f), after, "{clause}");
        assert_eq!(f.read("SELECT count(*) FROM local_changes WHERE op = 'delete'"), "0");
    }
    for clause in ["", "OR ABORT", "OR FAIL", "OR ROLLBACK"] {
        let mut f = started();
        let statement = format!("INSERT {clause} INTO tasks (id, title) VALUES ('c', '3'), ('a', '4'), ('d', '5')");
        // The transaction ends with it, whatever came before.
        let error = f.write(&["UPDATE tasks SET done = 1", &statement]).unwrap_err();
        assert!(whole(&error).contains("UNIQUE"), "{clause}: {}", whole(&error));
        assert_eq!(same(&f), "a|1|-\nb|2|-", "{clause}");
        // Or goes on, as far as SQLite lets it.
        let went_on = f.store.write(None, |tx| {
            tx.execute("UPDATE tasks SET done = 1", &[])?;
            let failed = tx.execute(&statement, &[]).is_err();
            tx.execute("UPDATE tasks SET title = 'x' WHERE id IN ('b', 'c')", &[])?;
            Ok::<_, StoreError>(failed)
        });
        assert_eq!(went_on.is_ok(), clause != "OR ROLLBACK", "{clause}");
        // Neither by what follows in a part of it.
        let in_a_part = f.store.write(None, |tx| {
            let failed = tx.savepoint(|tx| tx.execute(&statement, &[])).unwrap_err();
            assert!(whole(&failed).contains("UNIQUE"), "{clause}: {}", whole(&failed));
            tx.savepoint(|tx| tx.execute("UPDATE tasks SET project_id = 'p'", &[]))
        });
        assert_eq!(in_a_part.is_ok(), clause != "OR ROLLBACK", "{clause}");
        let after = match clause {
            "OR FAIL" => "a|1|t\nb|x|t\nc|x|-",
            "OR ROLLBACK" => "a|1|-\nb|2|-",
            _ => "a|1|t\nb|x|t",
        };
        assert_eq!(same(&f), after, "{clause}");
        assert_eq!(
            f.write(&["UPDATE tasks SET title = 'last'"]).unwrap(),
            Some(if clause == "OR ROLLBACK" { 2 } else { 4 })
        );
        same(&f);
    }
}

#[test]
fn larger_statements_are_recorded_row_by_row() {
    let mut f = started();
    f.write(&[
        "CREATE TABLE new (id PRIMARY KEY, title) WITHOUT ROWID",
        "INSERT INTO new VALUES ('a', 'from new'), ('e', 'also new')",
        "CREATE VIEW open AS SELECT id, title FROM tasks WHERE done IS NOT 1",
        "CREATE TRIGGER open_changes INSTEAD OF UPDATE ON open BEGIN UPDATE tasks SET title = NEW.title || '!' WHERE id = OLD.id; END",
        "CREATE TRIGGER open_ends INSTEAD OF DELETE ON open BEGIN UPDATE tasks SET done = 1 WHERE id = OLD.id; END",
    ])
    .unwrap();
    for (statement, after) in [
        ("UPDATE tasks SET title = new.title FROM new WHERE new.id = tasks.id", "a|from new|-\nb|2|-"),
        (
            "INSERT INTO tasks (id, title) SELECT id, 'up' FROM new WHERE true ON CONFLICT (id) DO UPDATE SET title = excluded.title \
             WHERE tasks.title <> 'nothing'",
            "a|up|-\nb|2|-\ne|up|-",
        ),
        (
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 3) INSERT INTO tasks (id, title) SELECT 'n' || i, i FROM n RETURNING id",
            "a|up|-\nb|2|-\ne|up|-\nn1|1|-\nn2|2|-\nn3|3|-",
        ),
        ("DELETE FROM tasks WHERE id LIKE 'n%' RETURNING *", "a|up|-\nb|2|-\ne|up|-"),
        ("UPDATE open SET title = 'seen' WHERE id = 'a'", "a|seen!|-\nb|2|-\ne|up|-"),
        ("DELETE FROM open WHERE id = 'e'", "a|seen!|-\nb|2|-\ne|up|t"),
        ("UPDATE OR REPLACE tasks SET title = upper(title), done = NOT coalesce(done, 0)", "a|SEEN!|t\nb|2|t\ne|UP|f"),
        ("DELETE FROM tasks", ""),
    ] {
        f.write(&[statement]).unwrap_or_else(|error| panic!("{statement}: {error}"));
        assert_eq!(same(&f), after, "{statement}");
    }
    let refused = f.write(&["INSERT INTO tasks (id) VALUES ('x')", "UPDATE tasks SET id = 'y'"]).unwrap_err();
    assert!(refused.to_string().contains("\"id\" of \"tasks\" cannot be changed"), "{refused}");
    assert_eq!(same(&f), "");
}

/// Of several statements in one text, none is left out in silence.
#[test]
fn several_statements_in_one_text_are_refused() {
    let mut f = started();
    let two = "INSERT INTO tasks (id) VALUES ('x'); INSERT INTO tasks (id) VALUES ('y')";
    let refused = f.write(&[two]).unwrap_err();
    assert!(whole(&refused).contains("Multiple statements"), "{}", whole(&refused));
    assert_eq!(same(&f), "a|1|-\nb|2|-");
    // No statement follows the last one.
    f.write(&["INSERT INTO tasks (id) VALUES ('z'); -- that is all"]).unwrap();
    assert_eq!(same(&f), "a|1|-\nb|2|-\nz|-|-");
}

/// What another SQLite program writes to a synced table would be recorded nowhere: it does not take effect.
#[test]
fn writes_of_other_programs_do_not_take_effect() {
    let mut f = started();
    let other = rusqlite::Connection::open(&f.path).unwrap();
    for statement in [
        "INSERT INTO tasks (id) VALUES ('x')",
        "UPDATE tasks SET title = 'x'",
        "DELETE FROM tasks",
        "REPLACE INTO tasks (id) VALUES ('a')",
    ] {
        let refused = other.execute_batch(statement).unwrap_err().to_string();
        assert!(refused.contains("millstream_tx"), "{statement}: {refused}");
    }
    f.write(&["UPDATE tasks SET done = 0"]).unwrap();
    assert_eq!(same(&f), "a|1|f\nb|2|f");
}
