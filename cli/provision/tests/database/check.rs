//! `millstream check`: broken configurations and databases, and what is said of each.

use millstream_provision::check::{Problem, check};
use sqlx::{Connection as _, PgConnection};

use crate::{database, parse, run};

const SCHEMA: &str = r#"
CREATE TABLE members (project_id uuid, user_id text, PRIMARY KEY (project_id, user_id));
CREATE TABLE tasks (
    id uuid PRIMARY KEY,
    project_id uuid NOT NULL,
    title text NOT NULL,
    done boolean NOT NULL DEFAULT false,
    size int GENERATED ALWAYS AS (length(title)) STORED,
    field_clocks jsonb NOT NULL DEFAULT '{}',
    updated_at timestamptz NOT NULL DEFAULT now(),
    client_id uuid
);
ALTER TABLE tasks REPLICA IDENTITY FULL;
CREATE TABLE secrets (id int PRIMARY KEY);
CREATE VIEW view AS SELECT * FROM tasks;
CREATE TABLE keyless (project_id uuid);
CREATE TABLE narrow (id int PRIMARY KEY, project_id uuid NOT NULL);
"#;

const CONFIG: &str = r#"[scopes.project]
membership = { table = "members", user = "user_id", scope = "project_id" }

[tables.members]
scope = { kind = "project", column = "project_id" }
conflict = "arrival"

[tables.tasks]
scope = { kind = "project", column = "project_id" }
writable = ["id", "project_id", "title", "done"]
write.insert = "EXISTS (SELECT FROM members m WHERE m.project_id = new.project_id AND m.user_id = auth.user_id)"
write.update = "old.done IS DISTINCT FROM new.done OR title <> ''"
write.delete = "old.size > 0 AND auth.client_id IS NOT NULL"
rules = [
    { code = "blank", message = "no title", on = ["insert", "update"], check = "new.title ~ '\\S'" },
]
"#;

fn insert_rule() -> String {
    CONFIG.lines().find(|line| line.starts_with("write.insert")).map(|line| format!("{line}\n")).expect("a rule")
}

/// What is said of the database after this SQL and of the file with these parts replaced; nothing of it stays.
async fn found(connection: &mut PgConnection, sql: &str, from: &str, to: &str) -> Vec<Problem> {
    assert!(CONFIG.contains(from), "{from}");
    let text = CONFIG.replacen(from, to, 1);
    let mut transaction = connection.begin().await.expect("Postgres does");
    run(&mut transaction, sql).await;
    let problems = check(&mut transaction, &parse(&text), &text).await.expect("Postgres does").problems;
    transaction.rollback().await.expect("Postgres does");
    problems
}

/// One problem, whose place, line, message and remedy contain these.
async fn one(
    connection: &mut PgConnection,
    sql: &str,
    (from, to): (&str, &str),
    says: (&str, Option<usize>, &str, &str),
) {
    let problems = found(connection, sql, from, to).await;
    let (place, line, message, fix) = says;
    let fits = |problem: &Problem| {
        problem.place.as_deref().unwrap_or("") == place
            && problem.line == line
            && problem.message.contains(message)
            && problem.fix.as_deref().unwrap_or("").contains(fix)
    };
    assert!(problems.len() == 1 && fits(&problems[0]), "{sql} {to}: not {says:?} but\n{problems:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_fit_is_named_with_the_remedy() {
    let (_stack, mut connection) = database(SCHEMA, CONFIG).await;
    let pg = &mut connection;
    assert_eq!(found(pg, "", "", "").await, []);
    let same = ("", "");
    let table = |name: &str| format!("{CONFIG}[tables.{name}]\nscope = {{ kind = \"global\" }}\n");
    let whole = |text: &str| text.to_owned();

    // The file against the tables.
    for (text, place, line, says) in [
        (table("nowhere"), "[tables.nowhere]", 17, "table public.nowhere does not exist"),
        (table("view"), "[tables.view]", 17, "not views"),
        (
            whole(&CONFIG.replace("\"title\", \"done\"", "\"title\", \"titel\"")),
            "[tables.tasks]",
            8,
            "`writable` names `titel`",
        ),
        (
            whole(&CONFIG.replace("\"id\", \"project_id\", \"title\"", "\"project_id\", \"title\"")),
            "[tables.tasks]",
            8,
            "key column `id`",
        ),
        (
            whole(&CONFIG.replace("scope = \"project_id\" }", "scope = \"projekt\" }")),
            "[tables.members]",
            4,
            "no column `projekt`",
        ),
        (
            whole(&CONFIG.replace("\"title\", \"done\"", "\"title\", \"updated_at\"")),
            "[tables.tasks]",
            8,
            "take it out of `writable`",
        ),
        (
            whole(&CONFIG.replace(
                "scope = \"project_id\" }",
                "scope = \"project_id\", roles = { column = \"rank\", in = [\"x\"] } }",
            )),
            "[tables.members]",
            4,
            "no column `rank`",
        ),
        (
            format!(
                "{CONFIG}[scopes.task]\nmembership = {{ table = \"tasks\", scope = \"id\", through = \"project\", via = \"projekt\" }}"
            ),
            "[tables.tasks]",
            8,
            "no column `projekt`",
        ),
        (
            format!(
                "{CONFIG}[scopes.task]\nmembership = {{ table = \"tasks\", scope = \"id\", through = \"project\" }}"
            ),
            "[scopes.task]",
            17,
            "both `through` (a kind of scope) and `via`",
        ),
        (
            whole(&CONFIG.replace(
                "[tables.tasks]\nscope = { kind = \"project\", column = \"project_id\" }",
                "[tables.tasks]\nscope = { kind = \"project\", column = \"title\" }",
            )),
            "[tables.tasks]",
            8,
            "`title` is text, but `members.project_id`, which names a project too, is uuid",
        ),
    ] {
        one(pg, "", (CONFIG, &text), (place, Some(line), says, "")).await;
    }
    let declared_row = ("conflict = \"arrival\"", "conflict = \"row\"");
    one(pg, "", declared_row, ("[tables.members]", Some(4), "needs columns `updated_at", "")).await;

    // Predicates.
    let insert = "EXISTS (SELECT FROM members m WHERE m.project_id = new.project_id AND m.user_id = auth.user_id)";
    for (predicate, says, fix, column) in [
        ("new.titel <> ''", "column new.titel does not exist", "new.title", Some(1)),
        ("new.title <> '' AND (", "syntax error", "", None),
        ("old.done", "missing FROM-clause entry for table \\\"old\\\"", "`old` on update and delete", Some(1)),
        ("new.done = 'maybe'", "invalid input syntax for type boolean", "", Some(12)),
        ("new.title", "it is not true or false", "", Some(1)),
        ("auth.user = 'a'", "column auth.user does not exist", "", Some(1)),
        ("auth.client_id = auth.user_id", "operator does not exist: uuid = text", "", Some(16)),
        ("frobnicate(new.id)", "function frobnicate(uuid) does not exist", "", Some(1)),
        ("EXISTS (SELECT FROM secrets)", "permission denied for table secrets", "millstream_changes", None),
        ("true); DROP TABLE tasks; SELECT (true", "syntax error at or near", "", None),
    ] {
        let says = says.replace("\\\"", "\"");
        one(pg, "", (insert, predicate), ("[tables.tasks] write.insert", Some(11), &says, fix)).await;
        let problem = &found(pg, "", insert, predicate).await[0];
        if let Some(column) = column {
            assert_eq!(problem.excerpt.as_ref().map(|e| (e.text.as_str(), e.column)), Some((predicate, column)));
        }
    }
    let rule = ("new.title ~ '\\\\S'", "new.name <> ''");
    let problems = found(pg, "", rule.0, rule.1).await;
    assert_eq!(problems.len(), 2, "{problems:?}");
    assert!(problems[1].message.starts_with("rule `blank` on update: column new.name"), "{problems:?}");
    assert_eq!(problems[1].line, Some(15));

    // The database.
    for (sql, place, line, says, fix) in [
        ("ALTER TABLE tasks REPLICA IDENTITY DEFAULT", "[tables.tasks]", Some(8), "lacks project_id", ""),
        (
            "DROP TRIGGER millstream_clocks_insert ON tasks",
            "[tables.tasks]",
            Some(8),
            "_insert is missing",
            "attach tasks",
        ),
        (
            "ALTER TABLE tasks DISABLE TRIGGER millstream_clocks_update",
            "[tables.tasks]",
            Some(8),
            "_update is disabled",
            "attach tasks",
        ),
        (
            "ALTER TABLE tasks DROP COLUMN client_id CASCADE",
            "[tables.tasks]",
            Some(8),
            "lacks `updated_at timestamptz` or `client_id",
            "attach tasks",
        ),
        ("ALTER PUBLICATION millstream DROP TABLE tasks", "", None, "tasks is not in the publication", ""),
        (
            "ALTER PUBLICATION millstream SET (publish = 'insert')",
            "",
            None,
            "does not publish every operation",
            "setup",
        ),
        ("DROP PUBLICATION millstream", "", None, "publication millstream does not exist", ""),
        ("DROP SCHEMA millstream CASCADE", "", None, "no schema millstream", "setup"),
        ("DELETE FROM millstream.migrations WHERE version = 2", "", None, "lacks 1 of our migrations", "setup"),
        (
            "REVOKE SELECT ON tasks FROM millstream_edge",
            "[tables.tasks]",
            Some(8),
            "millstream_edge has no right to SELECT",
            "setup",
        ),
        ("ALTER ROLE millstream_edge RENAME TO other", "", None, "the role millstream_edge does not exist", "setup"),
        ("ALTER ROLE millstream_replication NOREPLICATION", "", None, "may not replicate", "setup"),
        ("ALTER ROLE millstream_changes NOLOGIN", "", None, "may not log in", "LOGIN"),
    ] {
        one(pg, sql, same, (place, line, says, fix)).await;
    }
    // Inserts that cannot be.
    let says = "`owner` is never null, has no default, and is not in `writable`";
    let owner = "ALTER TABLE tasks ADD COLUMN owner text NOT NULL";
    one(pg, owner, same, ("[tables.tasks]", Some(8), says, "ALTER COLUMN owner SET DEFAULT")).await;
    let filled = format!(
        "{owner}; CREATE FUNCTION fill() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN NEW.owner := 1; RETURN NEW; END';
         CREATE TRIGGER fill BEFORE INSERT ON tasks FOR EACH ROW EXECUTE FUNCTION fill()"
    );
    assert_eq!(found(pg, &filled, "", "").await, []);
    assert_eq!(found(pg, &format!("{owner} DEFAULT 'x'"), "", "").await, []);
    assert_eq!(found(pg, owner, &insert_rule(), "").await, [], "clients insert no rows");
    let number = "ALTER TABLE tasks ADD COLUMN number int GENERATED ALWAYS AS IDENTITY";
    assert_eq!(found(pg, number, "", "").await, []);
    let set = ("\"done\"]", "\"done\", \"number\"]");
    let says = "clients cannot set `number`: it is GENERATED ALWAYS AS IDENTITY";
    one(pg, number, set, ("[tables.tasks]", Some(8), says, "ALTER COLUMN number SET GENERATED BY DEFAULT")).await;
    // Everything is said at once.
    let text = "[tables.nowhere]\nscope = []\nvalidate = { on = [] }\n[tables.keyless]\nscope = { kind = \"global\" }\n[tables.narrow]\nscope = { kind = \"user\", column = \"project_id\" }\n";
    let problems = found(pg, "DROP SCHEMA millstream CASCADE", CONFIG, text).await;
    for says in [
        "`scope` is empty",
        "names no operation",
        "does not exist",
        "no primary key",
        "replica identity of narrow",
        "no schema",
    ] {
        assert!(problems.iter().any(|problem| problem.message.contains(says)), "{says}: {problems:#?}");
    }
}

const BOARD: (&str, &str) =
    (include_str!("../../../../examples/board/schema.sql"), include_str!("../../../../examples/board/millstream.toml"));

/// The warnings that the board's file gets with these parts replaced: place, line and message of each.
async fn warned(connection: &mut PgConnection, parts: &[(&str, &str)]) -> Vec<(String, Option<usize>, String)> {
    let mut text = BOARD.1.to_owned();
    for (from, to) in parts {
        assert!(text.contains(from), "{from}");
        text = text.replacen(from, to, 1);
    }
    let found = check(connection, &parse(&text), &text).await.expect("Postgres does");
    assert_eq!(found.problems, [], "{parts:?}");
    let told = |warning: Problem| {
        assert!(warning.fix.is_some_and(|fix| fix.contains("out of `writable`")));
        (warning.place.unwrap_or_default(), warning.line, warning.message)
    };
    found.warnings.into_iter().map(told).collect()
}

/// Who may write a row must not be able to move it to where they may not, unseen.
#[tokio::test(flavor = "multi_thread")]
async fn scope_columns_that_no_predicate_looks_at_are_warned_of() {
    let (_stack, mut connection) = database(BOARD.0, BOARD.1).await;
    let pg = &mut connection;
    assert_eq!(warned(pg, &[]).await, []);
    let line = |start: &str| BOARD.1.lines().position(|line| line.starts_with(start)).map(|line| line + 1);
    let comments = BOARD.1.find("[tables.comments]").expect("it is there");
    let tasks = BOARD.1.find("[tables.tasks]").expect("it is there");
    let rule = |from: usize, op: &str| {
        let text = BOARD.1[from..].split_once(&format!("write.{op} = ")).expect("it is there").1;
        format!("write.{op} = {}", text.lines().next().expect("it is there"))
    };
    // As the board had it: an author moves a comment into a project where they are no member.
    let update = rule(comments, "update");
    let found = warned(pg, &[(&update, "write.update = \"old.author_id = auth.user_id\"")]).await;
    assert_eq!(found.len(), 1, "{found:?}");
    let (place, at, message) = &found[0];
    assert_eq!(place, "[tables.comments] write.update");
    assert_eq!(*at, line(&update));
    assert!(message.contains("may set `project_id`, which says who may read the row"), "{message}");
    // What does look at it: by name, quoted, with the whole row, in a rule.
    let old = "old.author_id = auth.user_id";
    for seen in [
        "new.project_id = old.project_id",
        "\\\"new\\\".\\\"project_id\\\" = old.project_id",
        "NOT (new.*) IS DISTINCT FROM (old.*)",
    ] {
        assert_eq!(warned(pg, &[(&update, &format!("write.update = \"{old} AND {seen}\""))]).await, [], "{seen}");
    }
    let plain = format!("write.update = \"{old}\"");
    let in_a_rule = (
        "on = [\"insert\", \"update\"], check = \"new.body ~ '\\\\S'\"",
        "on = [\"update\"], check = \"new.project_id = old.project_id\"",
    );
    assert_eq!(warned(pg, &[(&update, &plain), in_a_rule]).await, []);
    // What does not: another column, a comment, a text, another table's column.
    for unseen in [
        "new.task_id = old.task_id",
        "true /* new.project_id */",
        "'new.project_id' <> ''",
        "EXISTS (SELECT FROM members m WHERE m.project_id = old.project_id)",
    ] {
        assert_eq!(
            warned(pg, &[(&update, &format!("write.update = \"{old} AND {unseen}\""))]).await.len(),
            1,
            "{unseen}"
        );
    }
    // Columns that clients may not set, and operations that they may not do.
    assert_eq!(
        warned(
            pg,
            &[
                (&update, &plain),
                ("\"id\", \"project_id\", \"task_id\", \"body\"", "\"id\", \"body\""),
                // Of two tables that have the same.
                (&rule(comments, "insert"), ""),
                (&rule(comments, "insert"), "")
            ]
        )
        .await,
        []
    );
    assert_eq!(warned(pg, &[(&update, "")]).await, []);
    // Inserts.
    let found = warned(pg, &[(&rule(tasks, "insert"), "write.insert = \"new.title <> ''\"")]).await;
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(found[0].0, "[tables.tasks] write.insert");
    // A row that grants memberships of one scope by another; what it grants is in its identity, so that its end is told.
    sqlx::raw_sql("ALTER TABLE tasks REPLICA IDENTITY FULL").execute(&mut *pg).await.expect("it is ours");
    let found = warned(pg, &[
        ("[tables.projects]", "[scopes.place]\nmembership = { table = \"tasks\", scope = \"position\", through = \"project\", via = \"project_id\" }\n\n[tables.projects]"),
    ])
    .await;
    let places: Vec<&str> = found.iter().map(|(place, ..)| place.as_str()).collect();
    assert_eq!(places, ["[tables.tasks] write.insert", "[tables.tasks] write.update"], "{found:?}");
    assert!(found[0].2.contains("may set `position`, which says who becomes a member"), "{found:?}");
}

/// Undeclared columns of `numeric` are told of once a table, with a line that helps; what cannot be as declared is a problem.
#[tokio::test(flavor = "multi_thread")]
async fn numeric_columns_are_declared_or_told_of() {
    let schema = "CREATE DOMAIN price AS numeric(10,2);
        CREATE TABLE goods (id numeric(12,0) PRIMARY KEY, cost price, weight numeric, \"Net total\" numeric(20,4), owner numeric(4,0), list numeric[], n int);
        ALTER TABLE goods REPLICA IDENTITY FULL;
        CREATE INDEX ON goods (owner);
        CREATE TABLE others (id int PRIMARY KEY, n int);";
    let config = "[tables.goods]\nscope = { kind = \"user\", column = \"owner\" }\nwritable = [\"cost\"]\n\
                  [tables.others]\nscope = { kind = \"global\" }\n";
    let (_stack, mut connection) = database(schema, config).await;
    let found = check(&mut connection, &parse(config), config).await.expect("Postgres does");
    let [warning] = &found.warnings[..] else { panic!("{found:#?}") };
    assert_eq!((warning.place.as_deref(), warning.line), (Some("[tables.goods]"), Some(1)));
    let fix = warning.fix.as_deref().expect("a remedy");
    let line = "numeric = { id = \"integer\", cost = \"integer\", weight = \"real\", \"Net total\" = \"real\", owner = \"text\" }";
    assert!(warning.message.contains("`cost`") && fix.starts_with(line), "{warning:#?}");
    assert_eq!(found.problems, []);
    let declared = |line: &str| config.replacen("writable", &format!("{line}\nwritable"), 1);
    let better = declared(fix);
    let found = check(&mut connection, &parse(&better), &better).await.expect("Postgres does");
    assert_eq!(found, millstream_provision::check::Findings::default());
    for (line, says) in [
        ("numeric = { n = \"real\" }", "`n`: its type is integer, and has to be numeric"),
        ("numeric = { list = \"text\" }", "`list`: its type is numeric[], and has to be numeric"),
        ("numeric = { nothing = \"real\" }", "it has no column `nothing`"),
        ("numeric = { weight = \"integer\" }", "`weight`: \"integer\" counts the smallest unit"),
        ("numeric = { id = \"real\" }", "`id`: it is part of the key"),
        ("numeric = { owner = \"integer\" }", "`owner`: it names a scope"),
    ] {
        let text = declared(line);
        let found = check(&mut connection, &parse(&text), &text).await.expect("Postgres does").problems;
        assert!(found.len() == 1 && found[0].message.contains(says), "{line}: {found:#?}");
    }
}

/// Keys that the database makes, of tables into which clients insert: theirs and the application's would meet.
#[tokio::test(flavor = "multi_thread")]
async fn keys_that_the_server_makes_are_warned_of() {
    let schema = "CREATE SEQUENCE numbers;
        CREATE TABLE a (id serial PRIMARY KEY, v text);
        CREATE TABLE b (id bigint GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY, v text);
        CREATE TABLE c (org text, no int DEFAULT nextval('numbers') + 1000, v text, PRIMARY KEY (org, no));
        CREATE TABLE d (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), n serial, v text);
        CREATE TABLE e (id serial PRIMARY KEY, v text);
        CREATE TABLE f (id int PRIMARY KEY, v text);";
    let table = |name: &str, writable: &str, insert: &str| {
        format!(
            "[tables.{name}]\nscope = {{ kind = \"global\" }}\nwritable = [{writable}]\n{insert}write.update = \"true\"\n"
        )
    };
    let insert = "write.insert = \"true\"\n";
    let mut config = table("c", "\"org\", \"no\", \"v\"", insert) + &table("e", "\"v\"", "");
    for name in ["a", "b", "d", "f"] {
        config += &table(name, "\"id\", \"v\"", insert);
    }
    let (_stack, mut connection) = database(schema, &config).await;
    let found = check(&mut connection, &parse(&config), &config).await.expect("Postgres does");
    assert_eq!(found.problems, []);
    let told: Vec<(&str, &str)> = found
        .warnings
        .iter()
        .map(|warning| {
            assert!(warning.message.contains("the database makes") && warning.line.is_some(), "{warning}");
            assert!(warning.fix.as_ref().is_some_and(|fix| fix.contains("uuid")), "{warning}");
            let column = if warning.message.contains("`no`") { "no" } else { "id" };
            (warning.place.as_deref().expect("a place"), column)
        })
        .collect();
    assert_eq!(told, [("[tables.a]", "id"), ("[tables.b]", "id"), ("[tables.c]", "no")]);
}

/// Settings of the executor's sessions, and names that predicates use without a schema.
#[tokio::test(flavor = "multi_thread")]
async fn sessions_are_checked_as_the_executor_has_them() {
    let schema = "CREATE SCHEMA app; CREATE TABLE app.staff (user_id text, org text);
        CREATE TABLE notes (id int PRIMARY KEY, v text);";
    let session = "[session]\nsearch_path = \"app, public\"\n\
        settings = { \"app.tenant\" = \"(SELECT org FROM staff WHERE user_id = auth.user_id)\" }\n";
    let config = format!(
        "{session}[tables.notes]\nscope = {{ kind = \"global\" }}\nwritable = [\"v\"]\n\
         write.update = \"EXISTS (SELECT FROM staff s WHERE s.user_id = auth.user_id)\"\n"
    );
    let (_stack, mut connection) = database(schema, &config).await;
    let pg = &mut connection;
    let found = async |pg: &mut PgConnection, text: &str| {
        let found = check(pg, &parse(text), text).await.expect("Postgres does");
        found.problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
    };
    let said = found(pg, &config).await;
    assert!(said.contains("[session.settings]: `app.tenant`: relation \"staff\" does not exist"), "{said}");
    run(pg, "GRANT USAGE ON SCHEMA app TO millstream_changes").await;
    assert!(found(pg, &config).await.contains("permission denied for table staff"));
    run(pg, "GRANT SELECT ON app.staff TO millstream_changes").await;
    assert_eq!(found(pg, &config).await, "");
    // The database's own path, where none is declared.
    let undeclared = config.replace("search_path = \"app, public\"\n", "");
    assert!(found(pg, &undeclared).await.contains("relation \"staff\" does not exist"));
    run(pg, "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET search_path = app', current_database()); END $$").await;
    assert_eq!(found(pg, &undeclared).await, "");
    for (wrong, says) in [
        (config.replace("auth.user_id)\" }", "auth.usr)\" }"), "[session.settings]: `app.tenant`: column auth.usr"),
        (config.replace("app.tenant", "role"), "[session.settings]: `role`: only settings of the application"),
        (config.replace("app.tenant", "millstream.clock"), "[session.settings]: `millstream.clock`: only settings"),
    ] {
        let said = found(pg, &wrong).await;
        assert!(said.contains(says), "{wrong}: {said}");
    }
}
