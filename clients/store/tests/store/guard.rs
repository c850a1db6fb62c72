//! What the app's statements may do, and that what they store is what is sent.

use millstream_client_store::{Store, StoreError};
use rusqlite::types::Value;

use super::fixture::{Fixture, fixture, insert};

fn refused(f: &mut Fixture, sql: &str) -> String {
    match f.write(&[sql]) {
        Err(StoreError::NotAllowed(words)) => words,
        other => panic!("{sql}: {other:?}"),
    }
}

/// The settings of the connection that writes.
fn settings(f: &mut Fixture) -> Vec<String> {
    let names = [
        "journal_mode",
        "synchronous",
        "recursive_triggers",
        "foreign_keys",
        "query_only",
        "writable_schema",
        "locking_mode",
        "auto_vacuum",
        "encoding",
        "page_size",
        "secure_delete",
        "ignore_check_constraints",
        "legacy_alter_table",
        "trusted_schema",
        "defer_foreign_keys",
        "busy_timeout",
        "read_uncommitted",
        "temp_store",
        "max_page_count",
    ];
    let read = f.store.write(None, |tx| {
        let of =
            |name: &&str| tx.query(&format!("PRAGMA {name}"), &[]).map(|table| format!("{name}: {:?}", table.rows));
        names.iter().map(of).collect::<Result<Vec<_>, StoreError>>()
    });
    read.unwrap().value
}

#[test]
fn no_pragma_changes_what_is_recorded_or_how_durably() {
    let mut f = fixture();
    let names = f.read("SELECT name FROM pragma_pragma_list ORDER BY name");
    let names: Vec<&str> = names.lines().collect();
    assert!(names.len() > 50, "{names:?}");
    let before = settings(&mut f);
    let mut allowed = 0;
    for name in &names {
        for argument in ["", " = 1", " = 0", " = off", " = 'memory'", "('tasks')", "(99)"] {
            let sql = format!("PRAGMA {name}{argument}");
            match f.store.write(None, |tx| tx.query(&sql, &[]).map(drop)) {
                Ok(_) => allowed += 1,
                Err(StoreError::NotAllowed(words)) => {
                    assert!(words.contains(&name.to_ascii_lowercase()), "{sql}: {words}")
                }
                // Such as a table that is not there.
                Err(StoreError::Statement(_)) => {}
                Err(error) => panic!("{sql}: {error}"),
            }
            assert_eq!(settings(&mut f), before, "{sql}");
        }
    }
    assert!(allowed > 60, "{allowed}");
    // What was written before and after is there, numbers of the app's included.
    f.write(&["PRAGMA user_version = 3", "PRAGMA application_id = 7"]).unwrap();
    insert(&mut f, "a");
    let mut f = f.reopen();
    insert(&mut f, "b");
    assert_eq!(f.read("SELECT count(*) FROM local_changes"), "2");
    assert_eq!(f.read("PRAGMA user_version"), "3");
    // REPLACE still tells of the row that it takes away.
    f.write(&["REPLACE INTO tasks (id, title) VALUES ('a', 'anew')"]).unwrap();
    assert_eq!(f.read("SELECT op, previous FROM local_changes WHERE tx = 3"), "update|[\"new\"]");
}

#[test]
fn what_is_the_store_s_is_refused_with_words() {
    let mut f = fixture();
    f.write(&["CREATE TABLE notes (id INTEGER PRIMARY KEY, text)"]).unwrap();
    for (sql, part) in [
        ("DELETE FROM local_changes", "\"local_changes\" is the store's own"),
        ("UPDATE millstream_meta SET value = 1", "millstream_meta"),
        ("INSERT INTO millstream_scopes VALUES ('a', 'b', 0)", "millstream_scopes"),
        ("DROP TABLE Local_Changes", "store's own"),
        ("ALTER TABLE local_changes RENAME TO changes", "store's own"),
        ("CREATE TEMP TABLE local_changes (id)", "store's own"),
        ("CREATE TEMP VIEW tasks AS SELECT 1", "\"tasks\" is synced"),
        ("CREATE TEMP TABLE TASKS (id)", "is synced"),
        ("CREATE TABLE temp.tasks (id)", "is synced"),
        ("CREATE VIEW temp.tasks AS SELECT 1", "is synced"),
        ("CREATE VIRTUAL TABLE temp.tasks USING fts5(title)", "is synced"),
        ("CREATE TABLE temp.local_changes (id)", "store's own"),
        ("DROP TABLE tasks", "is synced"),
        ("ALTER TABLE tasks ADD COLUMN mine", "is synced"),
        ("ALTER TABLE tasks DROP COLUMN title", "is synced"),
        ("DROP TRIGGER millstream_insert_tasks", "store's own"),
        ("CREATE TRIGGER mine AFTER INSERT ON local_changes BEGIN DELETE FROM local_changes; END", "store's own"),
        ("CREATE TEMP TRIGGER mine AFTER INSERT ON local_changes BEGIN SELECT 1; END", "store's own"),
        ("CREATE UNIQUE INDEX mine ON local_changes (tbl)", "store's own"),
        ("DROP INDEX local_changes_live", "store's own"),
        ("CREATE TABLE millstream_new (id)", "store's own"),
        ("COMMIT", "a call is a transaction as a whole"),
        ("ROLLBACK", "savepoints"),
        ("BEGIN", "BEGIN"),
        ("ATTACH ':memory:' AS other", "attached"),
        ("PRAGMA recursive_triggers = OFF", "PRAGMA recursive_triggers"),
    ] {
        let words = refused(&mut f, sql);
        assert!(words.contains(part), "{sql}: {words}");
    }
    // By ways around.
    f.write(&["CREATE TEMP TABLE scratch (id)"]).unwrap();
    assert!(refused(&mut f, "ALTER TABLE scratch RENAME TO tasks").contains("create it anew"));
    f.write(&["DROP TABLE scratch"]).unwrap();
    f.write(&["CREATE TRIGGER sly AFTER INSERT ON notes BEGIN DELETE FROM local_changes; END"]).unwrap();
    assert!(refused(&mut f, "INSERT INTO notes (text) VALUES ('x')").contains("store's own"));
    f.write(&["DROP TRIGGER sly"]).unwrap();
    // All else of the app's own.
    for sql in [
        "CREATE INDEX by_title ON tasks (title)",
        "CREATE VIEW titles AS SELECT title FROM tasks",
        "CREATE TEMP TABLE scratch (id)",
        "CREATE TRIGGER kept AFTER INSERT ON tasks BEGIN INSERT INTO notes (text) VALUES (NEW.title); END",
        "CREATE VIRTUAL TABLE found USING fts5(title)",
        "ALTER TABLE notes ADD COLUMN more",
        "INSERT INTO found SELECT title FROM tasks",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 9) INSERT INTO notes (text) SELECT i FROM n",
        "DROP VIEW titles",
        "DROP INDEX by_title",
        "DROP TABLE found",
    ] {
        f.write(&[sql]).unwrap_or_else(|error| panic!("{sql}: {error}"));
    }
    f.write(&["SAVEPOINT mine", "INSERT INTO notes (text) VALUES ('x')", "ROLLBACK TO mine", "RELEASE mine"]).unwrap();
    insert(&mut f, "a");
    assert_eq!(f.read("SELECT count(*) FROM local_changes"), "1");
    // A refusal of before is no reason for what fails after it.
    refused(&mut f, "COMMIT");
    assert!(matches!(f.write(&["SELECT nothing"]), Err(StoreError::Statement(_))));
}

/// Whatever SQLite's functions give is recorded as it is stored: also JSON, which carries a subtype through the statement.
#[test]
fn what_sqlite_stored_is_what_is_sent() {
    let mut f = fixture();
    insert(&mut f, "a");
    let functions = f.read(
        "SELECT DISTINCT name || ' ' || narg FROM pragma_function_list WHERE builtin AND type = 's' AND name NOT LIKE 'millstream%' \
         AND name NOT IN ('load_extension', 'raise', 'fts3_tokenizer') AND name NOT LIKE '%->%' ORDER BY 1",
    );
    let values = [
        "'{\"a\": [1, 2, {\"b\": null}], \"c\": \"x\"}'",
        "'[1, \"two\", null]'",
        "'\"text\"'",
        "'null'",
        "'$.a'",
        "'$.c'",
        "'$[1]'",
        "'plain'",
        "''",
        "NULL",
        "1",
        "-2.5",
        "x'0001ff'",
        "title",
        "json_object('k', json('[1]'))",
        "json_array(1, 'x')",
        "json_quote('q')",
        "jsonb('[1]')",
        "'2026-01-01'",
    ];
    let mut state = 7_u64;
    let mut random = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % below as u64) as usize
    };
    let mut expressions: Vec<String> = vec![
        "'{\"a\": {\"b\": 1}}' -> 'a'".into(),
        "'{\"a\": \"x\"}' -> '$.a'".into(),
        "'{\"a\": null}' -> 'a'".into(),
        "'{\"a\": \"x\"}' ->> 'a'".into(),
        "(SELECT json_group_array(value) FROM json_each('[1, \"b\"]'))".into(),
        "(SELECT value FROM json_each('[[1]]'))".into(),
        "CASE WHEN 1 THEN json('{\"a\": 1}') END".into(),
        "coalesce(NULL, json_set('{}', '$.a', json('[1]')))".into(),
        "CAST(json('\"x\"') AS TEXT)".into(),
    ];
    for function in functions.lines() {
        let (name, count) = function.split_once(' ').unwrap();
        for _ in 0..40 {
            let count = usize::try_from(count.parse::<i64>().unwrap()).unwrap_or_else(|_| random(5));
            let arguments: Vec<&str> = (0..count).map(|_| values[random(values.len())]).collect();
            expressions.push(format!("{name}({})", arguments.join(", ")));
        }
    }
    let mut recorded = 0;
    for (n, expression) in expressions.iter().enumerate() {
        let column = ["title", "title", "position", "done"][random(4)];
        let sql = match n % 3 {
            0 => format!("UPDATE tasks SET {column} = {expression} WHERE id = 'a'"),
            1 => format!("INSERT INTO tasks (id, {column}) SELECT 'n{n}', {expression} FROM (SELECT 'x' AS title)"),
            _ => format!(
                "INSERT INTO tasks (id, title) VALUES ('a', 'x') ON CONFLICT (id) DO UPDATE SET {column} = {}",
                expression.replace("title", "tasks.title")
            ),
        };
        let written = f.store.write(None, |tx| {
            tx.execute(&sql, &[])?;
            let id = if n % 3 == 1 { format!("n{n}") } else { "a".to_owned() };
            // Read through a subquery that keeps no subtype: from the table itself.
            tx.query(&format!("SELECT {column}, typeof({column}) FROM tasks WHERE id = '{id}'"), &[])
        });
        let stored = match written {
            Ok(written) if written.recorded.is_some() => written.value.rows[0].clone(),
            // It set what was there before, or SQLite takes no such arguments.
            Ok(_) | Err(StoreError::Statement(_) | StoreError::NotUtf8) => continue,
            Err(error) => panic!("{sql}: {error}"),
        };
        recorded += 1;
        let change = f.read("SELECT columns || ' ' || vals FROM local_changes ORDER BY id DESC LIMIT 1");
        let (columns, values) = change.split_once("] ").unwrap();
        let columns: Vec<String> =
            serde_json::from_str(&format!("{columns}]")).unwrap_or_else(|_| panic!("{sql}: {change}"));
        let values: Vec<Option<String>> = serde_json::from_str(values).unwrap_or_else(|_| panic!("{sql}: {change}"));
        let sent = columns.iter().position(|name| name == column).and_then(|place| values[place].clone());
        let matches = match (&stored[0], &sent) {
            (Value::Null, sent) => sent.is_none(),
            (Value::Text(stored), Some(sent)) => {
                stored == sent || (column == "done" && [("t", "true"), ("f", "false")].contains(&(sent, stored)))
            }
            (Value::Integer(1), Some(sent)) if column == "done" => sent == "t",
            (Value::Integer(0), Some(sent)) if column == "done" => sent == "f",
            (Value::Integer(stored), Some(sent)) => stored.to_string() == *sent,
            // No boolean: all that is sent of it is what it is refused for.
            (Value::Real(stored), Some(sent)) if column == "done" => {
                sent.parse::<f64>().is_ok_and(|sent| (sent - stored).abs() <= stored.abs() * 1e-9)
            }
            (Value::Real(stored), Some(sent)) => sent.parse::<f64>().is_ok_and(|sent| sent == *stored),
            (Value::Blob(stored), Some(sent)) => stored == sent.as_bytes(),
            (_, None) => false,
        };
        assert!(matches, "{sql}: stored {stored:?}, sent {sent:?}");
    }
    assert!(recorded > 500, "{recorded} of {}", expressions.len());
}

/// Postgres takes no such text, so it is refused while somebody can still do something about it.
#[test]
fn text_that_is_no_utf_8_is_refused_when_it_is_written() {
    let mut f = fixture();
    assert!(matches!(
        f.write(&["INSERT INTO tasks (id, title) VALUES ('a', CAST(x'ff' AS TEXT))"]),
        Err(StoreError::NotUtf8)
    ));
    assert_eq!(f.read("SELECT count(*) FROM tasks"), "0");
    insert(&mut f, "b");
    let store = Store::open(&f.path, f.host.clone()).unwrap();
    assert_eq!(store.pending(0, 9).unwrap().len(), 1);
}
