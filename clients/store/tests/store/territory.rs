//! What an app adds to its database: allowed or refused when it is made, never in the way of the server's rows, never lost.

use millstream_client_core::replica::{Step, Work};
use millstream_client_core::territory::Kind;
use millstream_client_store::{Store, StoreError};
use millstream_schemas::{Schema, Scope, TableOp, TableSchema};

use super::fixture::{Fixture, changes, column, delete, fixture, insert, schema, stage, task, upsert};

fn refused(f: &mut Fixture, sql: &str) -> String {
    match f.write(&[sql]) {
        Err(StoreError::NotAllowed(words)) => words,
        other => panic!("{sql}: {other:?}"),
    }
}

/// As another program, or a version without rules, would.
fn behind_the_back(f: &Fixture, sql: &str) {
    let other = rusqlite::Connection::open(&f.path).unwrap();
    other.execute_batch("PRAGMA recursive_triggers = 1").unwrap();
    other.execute_batch(sql).unwrap_or_else(|error| panic!("{sql}: {error}"));
}

/// What was set aside: kind and name.
fn aside(f: &Fixture) -> String {
    f.read("SELECT kind || ' ' || name FROM millstream_aside ORDER BY kind, name").replace('\n', ", ")
}

/// Rows of the server come and go, and are what the server says.
fn sync(f: &mut Fixture, what: &str) {
    f.try_apply(vec![upsert(vec![task("x", "p", "one", false), task("y", "p", "one", false)])])
        .unwrap_or_else(|error| panic!("{what}: {error:?}"));
    f.apply(vec![upsert(vec![task("x", "p", "two", true)]), delete("y")]);
    assert_eq!(f.read("SELECT title, done FROM tasks WHERE id IN ('x', 'y')"), "two|1", "{what}");
    stage(f, vec![task("x", "p", "three", false), task("z", "p", "three", false)]);
    f.apply(vec![Step::Snapshot { scopes: vec![Scope::new("project", "p")], full: true }]);
    assert_eq!(f.read("SELECT id, title FROM tasks WHERE project_id = 'p' ORDER BY id"), "x|three\nz|three", "{what}");
    f.apply(vec![delete("x"), delete("z")]);
}

#[test]
fn what_would_meet_the_servers_rows_is_refused_when_it_is_made() {
    let mut f = fixture();
    f.write(&[
        "CREATE TABLE notes (id INTEGER PRIMARY KEY, text)",
        "CREATE TABLE log (id INTEGER PRIMARY KEY, text)",
        "CREATE VIEW shown AS SELECT id, title FROM tasks",
        "CREATE TRIGGER shown_u INSTEAD OF UPDATE ON shown BEGIN UPDATE tasks SET title = NEW.title WHERE id = NEW.id; END",
        "CREATE TRIGGER logged AFTER INSERT ON tasks BEGIN INSERT INTO log (text) VALUES (NEW.title); END",
    ])
    .unwrap();
    let before = f.read("SELECT count(*) FROM sqlite_schema");
    for (sql, parts) in [
        ("CREATE UNIQUE INDEX u ON tasks (title)", ["index \"u\" on \"tasks\"", "Make a plain index"]),
        ("create unique index if not exists u on Tasks (lower(title)) where done", ["\"u\"", "plain index"]),
        (
            "CREATE TRIGGER t BEFORE INSERT ON tasks WHEN NEW.title = '' BEGIN SELECT RAISE(ABORT, 'no title'); END",
            ["trigger \"t\" on \"tasks\" uses RAISE", "on the server"],
        ),
        ("CREATE TRIGGER t AFTER DELETE ON tasks BEGIN SELECT raise /**/ ( IGNORE ); END", ["\"t\"", "RAISE"]),
        (
            "CREATE TRIGGER t AFTER INSERT ON members BEGIN UPDATE tasks SET title = 'x' WHERE project_id = NEW.project_id; END",
            ["trigger \"t\" on \"members\" writes \"tasks\"", "A trigger may write the app's own tables"],
        ),
        (
            "CREATE TRIGGER touched AFTER UPDATE ON tasks BEGIN UPDATE tasks SET position = position + 1 WHERE id = NEW.id; END",
            ["\"touched\" on \"tasks\" writes \"tasks\"", "by a trigger in Postgres"],
        ),
        ("CREATE TRIGGER t AFTER UPDATE OF done ON tasks BEGIN DELETE FROM members; END", ["\"t\"", "\"members\""]),
        (
            "CREATE TEMP TRIGGER t AFTER DELETE ON main.tasks BEGIN INSERT INTO members VALUES (1, 2, 3); END",
            ["\"t\"", "\"members\""],
        ),
        // By way of tables and views of the app's.
        (
            "CREATE TRIGGER t AFTER INSERT ON log BEGIN DELETE FROM members; END",
            ["\"t\" on \"log\", which is set off by what is written to \"tasks\"", "\"members\""],
        ),
        (
            "CREATE TRIGGER t AFTER INSERT ON log BEGIN UPDATE shown SET title = 'x'; END",
            ["\"shown_u\" on \"shown\"", "\"tasks\""],
        ),
        (
            "CREATE TRIGGER t AFTER INSERT ON tasks BEGIN DELETE FROM local_changes; END",
            ["\"local_changes\"", "store's own"],
        ),
        (
            "CREATE TRIGGER t AFTER INSERT ON tasks BEGIN INSERT INTO nowhere VALUES (1); END",
            ["nothing could be written to \"tasks\"", "nowhere"],
        ),
        ("CREATE TRIGGER t AFTER INSERT ON log BEGIN SELECT NEW.missing; END", ["nothing could be written", "missing"]),
        ("DROP TABLE log", ["nothing could be written", "log"]),
        (
            "CREATE TABLE drafts (task TEXT REFERENCES tasks ON DELETE CASCADE)",
            ["\"drafts\" has a foreign key to \"tasks\"", "AFTER DELETE"],
        ),
        ("ALTER TABLE notes ADD COLUMN task REFERENCES TASKS (id)", ["foreign key", "synced"]),
    ] {
        let words = refused(&mut f, sql);
        assert!(parts.iter().all(|part| words.contains(part)), "{sql}: {words}");
        // Nor where the app goes on all the same, nor by the connection itself.
        f.store
            .write(None, |tx| {
                assert!(tx.execute(sql, &[]).is_err() && tx.query(sql, &[]).is_err(), "{sql}");
                tx.execute("INSERT INTO notes (text) VALUES ('kept')", &[]).map(drop)
            })
            .unwrap();
        let raw: Result<_, StoreError> =
            f.store.write(None, |tx| tx.connection().execute_batch(sql).map_err(|_| StoreError::NotUtf8));
        assert!(raw.is_err(), "{sql}");
        assert_eq!(f.read("SELECT count(*) FROM sqlite_schema"), before, "{sql}");
    }
    // What does not meet them is the app's.
    for sql in [
        "CREATE UNIQUE INDEX u ON notes (id, text)",
        "CREATE INDEX i ON tasks (title, json_extract(title, '$.a')) WHERE done",
        "CREATE TRIGGER checked BEFORE INSERT ON notes WHEN NEW.text = '' BEGIN SELECT RAISE(ABORT, 'no text'); END",
        "CREATE TRIGGER sent AFTER INSERT ON notes BEGIN INSERT INTO tasks (id, title) VALUES ('n' || NEW.id, NEW.text); END",
        "CREATE TABLE parts (note REFERENCES notes ON DELETE CASCADE)",
        "CREATE TABLE raise (raise)",
    ] {
        f.write(&[sql]).unwrap_or_else(|error| panic!("{sql}: {error}"));
    }
    // Set off by the app, its triggers' writes are recorded.
    f.write(&["INSERT INTO notes (id, text) VALUES (77, 'x')"]).unwrap();
    assert_eq!(f.read("SELECT key FROM local_changes"), "[\"n77\"]");
    assert_eq!(aside(&f), "");
    sync(&mut f, "the rest");
}

/// Each of these, in a store that has it already: sync goes on, it is there by name with its SQL, and is not there any more.
const LEGACY: [(&str, &str); 12] = [
    ("index u", "CREATE UNIQUE INDEX u ON tasks (title)"),
    ("trigger t", "CREATE TRIGGER t BEFORE UPDATE ON tasks BEGIN SELECT RAISE(ABORT, 'no'); END"),
    ("trigger t", "CREATE TRIGGER t BEFORE INSERT ON tasks BEGIN SELECT RAISE(IGNORE); END"),
    ("trigger t", "CREATE TRIGGER t BEFORE DELETE ON tasks BEGIN SELECT RAISE(ROLLBACK, 'no'); END"),
    ("trigger t", "CREATE TRIGGER t AFTER UPDATE ON tasks BEGIN UPDATE tasks SET position = 0 WHERE id = NEW.id; END"),
    ("trigger t", "CREATE TRIGGER t AFTER INSERT ON tasks BEGIN INSERT INTO members VALUES (NEW.id, 'u', 'r'); END"),
    ("trigger t", "CREATE TRIGGER t AFTER INSERT ON tasks BEGIN DELETE FROM local_changes; END"),
    ("trigger t", "CREATE TRIGGER t AFTER INSERT ON tasks BEGIN INSERT INTO nowhere VALUES (1); END"),
    (
        "trigger t, trigger t2",
        "CREATE TRIGGER t AFTER INSERT ON tasks BEGIN SELECT NEW.missing; END; CREATE TRIGGER t2 AFTER DELETE ON tasks BEGIN SELECT * FROM nowhere; END",
    ),
    (
        "trigger t",
        "CREATE TABLE log (a); CREATE TRIGGER s AFTER INSERT ON tasks BEGIN INSERT INTO log VALUES (1); END; CREATE TRIGGER t AFTER INSERT ON log BEGIN UPDATE tasks SET title = 'sly'; END",
    ),
    (
        "foreign_key drafts",
        "CREATE TABLE drafts (task TEXT REFERENCES tasks (id)); INSERT INTO drafts VALUES ('x'), ('y'), ('q')",
    ),
    (
        "foreign_key drafts",
        "CREATE TABLE drafts (task TEXT NOT NULL REFERENCES tasks (id) ON DELETE SET NULL); INSERT INTO drafts VALUES ('x'), ('y')",
    ),
];

#[test]
fn what_a_store_has_already_is_set_aside() {
    for (expected, sql) in LEGACY {
        let mut f = fixture();
        insert(&mut f, "mine");
        behind_the_back(&f, &format!("PRAGMA foreign_keys = 0; {sql}"));
        let mut f = f.reopen();
        assert_eq!(aside(&f), expected, "{sql}");
        let found = f.store.set_aside().unwrap();
        assert!(found.iter().all(|aside| !aside.reason.is_empty()), "{found:?}");
        assert!(found.iter().all(|aside| aside.sql.is_some() || aside.kind == Kind::ForeignKey), "{found:?}");
        assert_eq!(f.store.info().unwrap().set_aside, found);
        sync(&mut f, sql);
        assert_eq!(f.read("SELECT count(*) FROM local_changes"), "1", "{sql}: nothing was recorded, nothing lost");
        assert_eq!(f.read("SELECT count(*) FROM members"), "0", "{sql}");
        // It is remembered, and not met again.
        let f = f.reopen();
        assert_eq!(aside(&f), expected, "{sql}");
    }
}

/// The same, made by another program while the client runs.
#[test]
fn what_another_program_adds_meanwhile_is_set_aside() {
    for (expected, sql) in LEGACY {
        let mut f = fixture();
        insert(&mut f, "mine");
        sync(&mut f, "before");
        behind_the_back(&f, &format!("PRAGMA foreign_keys = 0; {sql}"));
        sync(&mut f, sql);
        assert_eq!(aside(&f), expected, "{sql}");
        assert_eq!(f.read("SELECT count(*) FROM local_changes"), "1", "{sql}: nothing was recorded, nothing lost");
        assert_eq!(f.read("SELECT count(*) FROM members"), "0", "{sql}");
    }
}

/// What only some rows show.
#[test]
fn what_fails_with_some_row_is_set_aside_when_it_does() {
    for (expected, setup) in [
        ("index j", vec!["CREATE INDEX j ON tasks (json_extract(title, '$.a'))"]),
        (
            "index j",
            vec![
                "CREATE INDEX fine ON tasks (done)",
                "CREATE INDEX j ON tasks (done) WHERE abs(title -> '$.b')",
                "CREATE INDEX g ON tasks (title)",
            ],
        ),
        (
            "trigger t",
            vec![
                "CREATE TABLE c (a UNIQUE)",
                "CREATE TRIGGER t AFTER INSERT ON tasks BEGIN INSERT INTO c VALUES (NEW.title); END",
            ],
        ),
        (
            "trigger t",
            vec![
                "CREATE TABLE c (a UNIQUE ON CONFLICT ROLLBACK)",
                "CREATE TABLE d (a)",
                "CREATE TRIGGER t AFTER INSERT ON tasks BEGIN INSERT INTO c VALUES (NEW.title); END",
                "CREATE TRIGGER harmless AFTER INSERT ON tasks BEGIN INSERT INTO d VALUES (NEW.title); END",
            ],
        ),
        (
            "trigger t, trigger t2",
            vec![
                "CREATE TABLE c (a CHECK (a > 'p'))",
                "CREATE TRIGGER t AFTER INSERT ON tasks BEGIN INSERT INTO c VALUES (NEW.title); END",
                "CREATE TRIGGER t2 AFTER UPDATE ON tasks BEGIN INSERT INTO c VALUES ('a'); END",
            ],
        ),
        (
            "trigger t",
            vec![
                "CREATE TABLE c (a, n)",
                "CREATE TRIGGER again AFTER UPDATE ON c BEGIN UPDATE c SET n = n + 1; END",
                "CREATE TRIGGER t AFTER INSERT ON tasks BEGIN INSERT INTO c VALUES (1, 1); UPDATE c SET n = 2; END",
            ],
        ),
        (
            "trigger t",
            vec![
                "CREATE TABLE p (a PRIMARY KEY)",
                "CREATE TABLE c (a REFERENCES p)",
                "CREATE TRIGGER t AFTER INSERT ON tasks BEGIN INSERT INTO c VALUES (NEW.title); END",
            ],
        ),
        (
            "trigger t",
            vec![
                "CREATE TABLE c (a)",
                "CREATE TRIGGER inner BEFORE INSERT ON c BEGIN SELECT RAISE(FAIL, 'no'); END",
                "CREATE TRIGGER t AFTER INSERT ON tasks BEGIN INSERT INTO c VALUES (NEW.title); END",
            ],
        ),
        // A search index that never saw the rows that it is told to forget: SQLite calls the database malformed.
        (
            "trigger t",
            vec![
                "CREATE VIRTUAL TABLE found USING fts5(title, content='tasks')",
                "CREATE TRIGGER t AFTER UPDATE ON tasks BEGIN INSERT INTO found (found, rowid, title) VALUES ('delete', 99, 'zebra'); \
                 INSERT INTO found (found, rank) VALUES ('integrity-check', 1); END",
            ],
        ),
    ] {
        let mut f = fixture();
        let setup: Vec<&str> = setup;
        f.write(&["INSERT INTO tasks (id) VALUES ('mine')"]).unwrap();
        f.write(&setup).unwrap_or_else(|error| panic!("{setup:?}: {error}"));
        sync(&mut f, setup[0]);
        assert_eq!(aside(&f), expected, "{setup:?}");
        let found = f.store.set_aside().unwrap();
        assert!(found[0].reason.contains("rows of the server could not be applied with it: "), "{found:?}");
        assert!(!f.store.has_met_damage(), "{setup:?}");
        assert_eq!(f.read("SELECT count(*) FROM local_changes"), "1", "{setup:?}");
    }
}

#[test]
fn what_was_set_aside_is_made_again_or_forgotten_by_the_app() {
    let f = fixture();
    behind_the_back(
        &f,
        "CREATE UNIQUE INDEX u ON tasks (title); CREATE UNIQUE INDEX v ON tasks (done); CREATE UNIQUE INDEX w ON tasks (title)",
    );
    let mut f = f.reopen();
    assert_eq!(aside(&f), "index u, index v, index w");
    // A plain one in its place; a drop, also of what is not there any more.
    f.write(&["CREATE INDEX U ON tasks (title)", "DROP INDEX IF EXISTS main.v", "drop index w"]).unwrap();
    assert_eq!(aside(&f), "");
    assert!(f.write(&["DROP INDEX w"]).is_err());
}

/// The tables of the fixture, changed in some way.
fn changed(change: impl FnOnce(&mut Vec<TableSchema>)) -> Schema {
    let mut schema = schema();
    schema.version = "2".into();
    change(&mut schema.tables);
    schema
}

fn without(table: &mut TableSchema, name: &str) {
    let index = table.column(name).unwrap();
    table.columns.remove(index);
}

const OBJECTS: [(&str, &str); 14] = [
    ("index i_title", "CREATE INDEX i_title ON tasks (title)"),
    ("index i_expr", "CREATE INDEX i_expr ON tasks (lower(title), done) WHERE title <> ''"),
    ("index i_quoted", "CREATE INDEX i_quoted ON tasks (\"title\")"),
    ("index i_role", "CREATE INDEX i_role ON members (role)"),
    ("view v_title", "CREATE VIEW v_title AS SELECT id, \"title\" FROM tasks"),
    ("view v_view", "CREATE VIEW v_view AS SELECT title AS t FROM v_title"),
    ("view v_role", "CREATE VIEW v_role AS SELECT role FROM members JOIN tasks USING (project_id)"),
    ("view v_star", "CREATE VIEW v_star AS SELECT * FROM tasks"),
    (
        "trigger t_log",
        "CREATE TRIGGER t_log AFTER UPDATE OF title ON tasks BEGIN INSERT INTO log VALUES (OLD.title || NEW.title); END",
    ),
    (
        "trigger t_when",
        "CREATE TRIGGER t_when AFTER DELETE ON tasks WHEN OLD.title <> '' BEGIN INSERT INTO log VALUES (OLD.id); END",
    ),
    (
        "trigger t_in",
        "CREATE TRIGGER t_in AFTER INSERT ON inbox BEGIN INSERT INTO tasks (id, title) VALUES (NEW.a, 'in'); END",
    ),
    (
        "trigger t_view",
        "CREATE TRIGGER t_view INSTEAD OF INSERT ON v_title BEGIN INSERT INTO tasks (id, title) VALUES (NEW.id, NEW.title); END",
    ),
    ("trigger t_fts", "CREATE TRIGGER t_fts AFTER INSERT ON tasks BEGIN INSERT INTO found VALUES (NEW.title); END"),
    ("trigger t_id", "CREATE TRIGGER t_id AFTER INSERT ON tasks BEGIN INSERT INTO log VALUES (NEW.id); END"),
];

#[test]
fn whatever_changes_on_the_server_nothing_of_the_app_is_in_the_way_or_lost() {
    type Change = (&'static str, fn(&mut Vec<TableSchema>), &'static [&'static str]);
    let title: &[&str] =
        &["i_title", "i_expr", "i_quoted", "v_title", "v_view", "t_log", "t_when", "t_in", "t_view", "t_fts"];
    let changes: [Change; 8] = [
        ("a column is dropped", |tables| without(&mut tables[0], "title"), title),
        ("a column is retyped", |tables| tables[0].columns[2].r#type = "bigint".into(), &[]),
        ("a column is renamed in case", |tables| tables[0].columns[2].name = "Title".into(), &[]),
        ("a column is added", |tables| tables[0].columns.push(column("more", "text", true)), &[]),
        ("a table is dropped", |tables| drop(tables.remove(1)), &["i_role", "v_role"]),
        (
            "a table is added",
            |tables| {
                let mut more = tables[1].clone();
                more.name = "more".into();
                tables.push(more);
            },
            &[],
        ),
        ("a key changes", |tables| tables[1].key = vec![0], &[]),
        ("another column is dropped", |tables| without(&mut tables[0], "photo"), &[]),
    ];
    for (what, change, gone) in changes {
        for broken in [
            "",
            "CREATE VIEW broken AS SELECT x FROM nowhere; CREATE TABLE far (a); CREATE TRIGGER broken_t AFTER INSERT ON far BEGIN DELETE FROM nowhere; END",
        ] {
            let mut f = fixture();
            f.write(&[
                "CREATE TABLE log (a)",
                "CREATE TABLE inbox (a)",
                "CREATE VIRTUAL TABLE found USING fts5(title)",
            ])
            .unwrap();
            f.write(&OBJECTS.map(|(_, sql)| sql)).unwrap();
            behind_the_back(&f, broken);
            insert(&mut f, "mine");
            f.store.install(&changed(change)).unwrap_or_else(|error| panic!("{what}: {error:?}"));
            for (object, sql) in OBJECTS {
                let (kind, name) = object.split_once(' ').unwrap();
                let there = f.read(&format!("SELECT sql FROM sqlite_schema WHERE type = '{kind}' AND name = '{name}'"));
                let kept =
                    f.read(&format!("SELECT sql FROM millstream_aside WHERE kind = '{kind}' AND name = '{name}'"));
                match gone.contains(&name) {
                    true => assert_eq!((there.as_str(), kept.as_str()), ("", sql), "{what}, {broken}"),
                    false => assert_eq!((there.as_str(), kept.as_str()), (sql, ""), "{what}, {broken}"),
                }
            }
            assert_eq!(
                f.read("SELECT count(*) FROM sqlite_schema WHERE name LIKE 'broken%'"),
                if broken.is_empty() { "0" } else { "2" }
            );
            let row = vec![Some("p".to_owned()), Some("u".into()), Some("r".into())];
            f.store.perform(&[Work::Unspill(1)]).unwrap();
            if !what.starts_with("a table is dropped") {
                f.apply(vec![Step::Rows(vec![super::fixture::changes("members", TableOp::Upsert, vec![row])])]);
            }
            f.write(&[
                "INSERT INTO tasks (id) VALUES ('w')",
                "UPDATE tasks SET done = 1",
                "DELETE FROM tasks WHERE id = 'w'",
            ])
            .unwrap();
            assert!(f.store.pending(0, 9).unwrap().len() == 2, "{what}");
            // It comes back, and with it what the app had made of it.
            f.store.install(&schema()).unwrap_or_else(|error| panic!("{what}, back: {error:?}"));
            assert_eq!(aside(&f), "", "{what}, back");
            for (object, sql) in OBJECTS {
                let (kind, name) = object.split_once(' ').unwrap();
                assert_eq!(
                    f.read(&format!("SELECT sql FROM sqlite_schema WHERE type = '{kind}' AND name = '{name}'")),
                    sql,
                    "{what}, back"
                );
            }
            sync(&mut f, what);
        }
    }
}

#[test]
fn a_name_that_the_server_takes_is_given_up_with_all_that_is_under_it() {
    let more = |name: &str| {
        changed(|tables| {
            let mut more = tables[1].clone();
            more.name = name.into();
            tables.push(more);
        })
    };
    for broken in ["", "CREATE VIEW broken AS SELECT x FROM nowhere"] {
        for (setup, name, expected, kept) in [
            (
                vec!["CREATE TABLE more (a)", "INSERT INTO more VALUES (7)"],
                "more",
                "table more",
                "SELECT a FROM more_of_the_app",
            ),
            (
                vec![
                    "CREATE TABLE MORE (a, b)",
                    "INSERT INTO more VALUES (7, 8)",
                    "CREATE TABLE more_of_the_app (a)",
                    "CREATE UNIQUE INDEX m ON more (a)",
                ],
                "more",
                "table MORE",
                "SELECT a FROM MORE_of_the_app_2",
            ),
            (vec!["CREATE VIEW more AS SELECT 7 AS a"], "More", "view more", "SELECT 7"),
            (
                vec!["CREATE TABLE a (x)", "CREATE INDEX more ON a (x)", "INSERT INTO a VALUES (7)"],
                "more",
                "index more",
                "SELECT x FROM a",
            ),
            (
                vec!["CREATE VIRTUAL TABLE more USING fts5(a)", "INSERT INTO more VALUES ('7')"],
                "more",
                "table more",
                "SELECT a FROM more_of_the_app WHERE more_of_the_app MATCH '7'",
            ),
            (
                vec!["CREATE VIRTUAL TABLE found USING fts5(a)", "INSERT INTO found VALUES ('7')"],
                "found_content",
                "table found",
                "SELECT a FROM found_of_the_app WHERE found_of_the_app MATCH '7'",
            ),
            (vec!["CREATE TEMP TABLE more (a)"], "more", "table more", "SELECT 7"),
        ] {
            let mut f = fixture();
            f.write(&setup).unwrap();
            behind_the_back(&f, broken);
            f.store.install(&more(name)).unwrap_or_else(|error| panic!("{setup:?}: {error:?}"));
            assert_eq!(aside(&f), expected, "{setup:?}");
            assert_eq!(
                f.read("SELECT reason FROM millstream_aside WHERE reason LIKE '%cannot be renamed%'"),
                "",
                "{setup:?}"
            );
            assert_eq!(f.read(kept), "7", "{setup:?}");
            let row = vec![Some("p".to_owned()), Some("u".into()), Some("r".into())];
            f.apply(vec![Step::Rows(vec![changes(name, TableOp::Upsert, vec![row])])]);
            assert_eq!(f.read(&format!("SELECT role FROM main.{name}")), "r", "{setup:?}");
            sync(&mut f, name);
        }
    }
    // Before there was any schema at all.
    let mut f = fixture();
    let mut store = Store::open(&format!("{}-new", f.path), f.host.clone()).unwrap();
    store
        .write(None, |tx| {
            tx.execute("CREATE TABLE Tasks (id INTEGER PRIMARY KEY, title UNIQUE NOT NULL)", &[])?;
            tx.execute("CREATE TRIGGER t AFTER INSERT ON tasks BEGIN SELECT RAISE(IGNORE); END", &[])?;
            tx.execute("CREATE TABLE parts (task REFERENCES tasks)", &[])?;
            tx.execute("INSERT INTO tasks VALUES (1, 'mine')", &[]).map(drop)
        })
        .unwrap_or_else(|error: StoreError| panic!("{error:?}"));
    store.install(&schema()).unwrap();
    f.store = store;
    f.path = format!("{}-new", f.path);
    assert_eq!(f.read("SELECT title FROM Tasks_of_the_app"), "mine");
    assert_eq!(f.read("SELECT tbl_name FROM sqlite_schema WHERE name = 't'"), "Tasks_of_the_app");
    sync(&mut f, "from the start");
    // The entry goes with the table.
    f.write(&["DROP TABLE parts", "DROP TABLE Tasks_of_the_app"]).unwrap();
    assert_eq!(aside(&f), "");
}

#[test]
fn columns_that_an_app_once_added_to_a_synced_table_keep_their_values() {
    let more = |name: &str| changed(|tables| tables[0].columns.push(column(name, "text", true)));
    let legacy = |sql: &str| {
        let mut f = fixture();
        f.apply(vec![upsert(vec![task("a", "p", "a", false)])]);
        behind_the_back(&f, sql);
        f.reopen()
    };
    let mut f =
        legacy("ALTER TABLE tasks ADD COLUMN Starred DEFAULT 7; CREATE VIEW s AS SELECT id, starred FROM tasks");
    sync(&mut f, "a column of the app's");
    f.apply(vec![upsert(vec![task("a", "p", "a", false)])]);
    f.store.install(&more("starred")).unwrap();
    assert_eq!(f.read("SELECT Starred_of_the_app, starred FROM tasks"), "7|-");
    assert_eq!(aside(&f), "column Starred");
    assert_eq!(f.read("SELECT * FROM s"), "a|7", "what refers to it follows it");
    // Bound up with what the server drops.
    let mut f = legacy(
        "ALTER TABLE tasks ADD COLUMN long AS (length(title)); ALTER TABLE tasks ADD COLUMN star DEFAULT 3 CHECK (star <> title)",
    );
    f.store.install(&changed(|tables| without(&mut tables[0], "title"))).unwrap();
    assert_eq!(aside(&f), "column long, column star");
    assert_eq!(f.read("SELECT id, long, star FROM tasks_of_the_app"), "a|1|3");
    assert_eq!(f.read("SELECT id, project_id FROM tasks"), "a|p");
    f.write(&["UPDATE tasks SET done = 1"]).unwrap();
    assert_eq!(f.store.pending(0, 9).unwrap().len(), 1);
}

#[test]
fn triggers_that_fire_themselves_are_told_how_to_end() {
    let mut f = fixture();
    f.write(&[
        "CREATE TABLE notes (id INTEGER PRIMARY KEY, text, updated_at)",
        "CREATE TRIGGER touched AFTER UPDATE ON notes BEGIN UPDATE notes SET updated_at = datetime('now') WHERE id = NEW.id; END",
        "INSERT INTO notes (text) VALUES ('a')",
    ])
    .unwrap();
    let error = f.write(&["UPDATE notes SET text = 'b'"]).unwrap_err();
    assert!(matches!(error, StoreError::TriggerRecursion), "{error:?}");
    assert!(error.to_string().contains("AFTER UPDATE OF title, body ON notes"), "{error}");
    f.write(&[
        "DROP TRIGGER touched",
        "CREATE TRIGGER touched AFTER UPDATE OF text ON notes BEGIN UPDATE notes SET updated_at = datetime('now') WHERE id = NEW.id; END",
        "UPDATE notes SET text = 'b'",
    ])
    .unwrap();
    assert_eq!(f.read("SELECT text, updated_at IS NULL FROM notes"), "b|0");
}

#[test]
fn tables_that_are_one_to_sqlite_are_refused_with_both_names() {
    let mut f = fixture();
    for (schema, parts) in [
        (changed(|tables| tables[1].name = "Tasks".into()), ["\"tasks\"", "\"Tasks\""]),
        (changed(|tables| tables[0].columns.push(column("TITLE", "text", true))), ["\"title\"", "\"TITLE\""]),
    ] {
        let error = f.store.install(&schema).unwrap_err();
        assert!(matches!(error, StoreError::Schema(_)), "{error:?}");
        assert!(parts.iter().all(|part| error.to_string().contains(part)), "{error}");
    }
    sync(&mut f, "the schema before");
    // One takes the place of the other.
    f.store.install(&changed(|tables| tables[1].name = "Members".into())).unwrap();
    assert_eq!(f.read("SELECT name FROM sqlite_schema WHERE name LIKE 'members'"), "Members");
}
