//! Memberships by role and through another scope: whoever works for an organisation sees its projects, unless as a trainee;
//! guests see single projects. Connected or not, everybody has what the rows say, and no more.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use millstream_catalog::Config;
use millstream_client::{Client, SqlValue, State};
use millstream_provision::check;
use millstream_tests::board::{Board, PATIENCE};
use millstream_tests::raw::{Raw, hello};
use sqlx::{AssertSqlSafe, Executor as _};

const SCHEMA: &str = "
CREATE TABLE staff (organisation text NOT NULL, user_id text NOT NULL, role text NOT NULL, PRIMARY KEY (organisation, user_id));
CREATE TABLE projects (code text PRIMARY KEY, organisation text, name text NOT NULL);
ALTER TABLE projects REPLICA IDENTITY FULL;
CREATE TABLE guests (project text NOT NULL, user_id text NOT NULL, PRIMARY KEY (project, user_id));
CREATE TABLE tasks (id int PRIMARY KEY, project text NOT NULL, title text NOT NULL);
ALTER TABLE tasks REPLICA IDENTITY FULL;
";

const CONFIG: &str = r#"
[scopes.organisation]
membership = { table = "staff", user = "user_id", scope = "organisation", roles = { column = "role", in = ["engineer", "boss"] } }

[scopes.project]
membership = [
    { table = "guests", user = "user_id", scope = "project" },
    { table = "projects", scope = "code", through = "organisation", via = "organisation" },
]

[tables]
staff = { scope = { kind = "organisation", column = "organisation" } }
projects = { scope = { kind = "project", column = "code" } }
guests = { scope = { kind = "project", column = "project" } }
tasks = { scope = { kind = "project", column = "project" } }
"#;

const SEED: &str = "
INSERT INTO staff VALUES ('acme', 'ann', 'boss'), ('acme', 'tom', 'trainee'), ('acme', 'off', 'engineer'), ('bolt', 'bob', 'engineer');
INSERT INTO projects VALUES ('rocket', 'acme', 'Rocket'), ('anvil', 'acme', 'Anvil'), ('nut', 'bolt', 'Nut'), ('free', NULL, 'Free');
INSERT INTO guests VALUES ('rocket', 'gus'), ('free', 'tom');
INSERT INTO tasks VALUES (1, 'rocket', 'fuel'), (2, 'rocket', 'fins'), (3, 'anvil', 'cast'), (4, 'nut', 'thread'), (5, 'free', 'roam');
";

/// What `user` may see of each table, by the rules above.
const ALLOWED: &str = "
WITH hired AS (SELECT organisation FROM staff WHERE user_id = $1 AND role IN ('engineer', 'boss')),
     open AS (SELECT project FROM guests WHERE user_id = $1
              UNION SELECT code FROM projects JOIN hired USING (organisation))
SELECT 'staff ' || user_id || ' ' || role FROM staff WHERE user_id = $1 OR organisation IN (TABLE hired)
UNION ALL SELECT 'project ' || name FROM projects WHERE code IN (TABLE open)
UNION ALL SELECT 'guest ' || project || ' ' || user_id FROM guests WHERE user_id = $1 OR project IN (TABLE open)
UNION ALL SELECT 'task ' || title FROM tasks WHERE project IN (TABLE open)";
const HELD: &str = "
SELECT 'staff ' || user_id || ' ' || role FROM staff
UNION ALL SELECT 'project ' || name FROM projects
UNION ALL SELECT 'guest ' || project || ' ' || user_id FROM guests
UNION ALL SELECT 'task ' || title FROM tasks";

/// What was committed, and how many tasks each of ann, tom, gus and bob sees then.
const STEPS: [(&str, [usize; 4]); 13] = [
    ("SELECT 1", [3, 1, 2, 1]),
    ("UPDATE staff SET role = 'engineer' WHERE user_id = 'tom'", [3, 4, 2, 1]),
    ("UPDATE projects SET name = 'Rocket II' WHERE code = 'rocket'", [3, 4, 2, 1]),
    ("UPDATE projects SET organisation = 'bolt' WHERE code = 'rocket'", [1, 2, 2, 3]),
    ("UPDATE tasks SET title = title || '!'", [1, 2, 2, 3]),
    ("INSERT INTO projects VALUES ('new', 'acme', 'New'); INSERT INTO tasks VALUES (6, 'new', 'begin')", [2, 3, 2, 3]),
    (
        "UPDATE staff SET role = 'trainee' WHERE user_id = 'tom'; UPDATE tasks SET title = 'secret' WHERE id = 6",
        [2, 1, 2, 3],
    ),
    ("UPDATE projects SET organisation = 'acme' WHERE code = 'free'", [3, 1, 2, 3]),
    ("UPDATE staff SET organisation = 'bolt' WHERE user_id = 'ann'", [3, 1, 2, 3]),
    ("UPDATE projects SET code = 'rkt' WHERE code = 'rocket'", [1, 1, 2, 1]),
    ("DELETE FROM guests WHERE user_id = 'gus'; DELETE FROM projects WHERE code = 'nut'", [0, 1, 0, 0]),
    (
        "UPDATE tasks SET project = 'rkt' WHERE project = 'rocket'; INSERT INTO staff VALUES ('bolt', 'gus', 'boss')",
        [2, 1, 2, 2],
    ),
    ("TRUNCATE staff", [0, 1, 0, 0]),
];

#[tokio::test(flavor = "multi_thread")]
async fn memberships_by_role_and_through_another_scope() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let config = folder.path().join("millstream.toml");
    std::fs::write(&config, CONFIG)?;
    let board = Board::with(|builder| builder.app_schema(SCHEMA).seed(SEED).config(&config)).await?;
    let outcome = steps(&board).await;
    board.explain(outcome)
}

async fn steps(board: &Board) -> Result<()> {
    let mut clients = Vec::new();
    for user in ["ann", "tom", "gus", "bob"] {
        clients.push((user, board.client(user, user).await?));
    }
    // Somebody who is away at every step and comes back after it.
    board.client("off", "off").await?.close().await?;
    for (sql, tasks) in STEPS {
        let mut postgres = board.postgres().await?;
        sqlx::raw_sql(AssertSqlSafe(format!("BEGIN; {sql}; COMMIT"))).execute(&mut postgres).await?;
        for ((user, client), tasks) in clients.iter().zip(tasks) {
            let rows = agrees(board, client, user).await.context(sql)?;
            let found = rows.iter().filter(|row| row.starts_with("task")).count();
            ensure!(found == tasks, "{sql}: {user} has {found} tasks, not {tasks}: {rows:?}");
        }
        let away = board.client("off", "off").await?;
        agrees(board, &away, "off").await.context(sql)?;
        away.close().await?;
    }
    Ok(())
}

/// Waits until a client holds what its user may see.
async fn agrees(board: &Board, client: &Client, user: &str) -> Result<Vec<String>> {
    let start = Instant::now();
    loop {
        let mut allowed: Vec<String> =
            sqlx::query_scalar(ALLOWED).bind(user).fetch_all(&mut board.postgres().await?).await?;
        allowed.sort_unstable();
        let text = |row: &Vec<SqlValue>| match row.as_slice() {
            [SqlValue::Text(text)] => text.clone(),
            other => format!("{other:?}"),
        };
        let mut held: Vec<String> = client.query(HELD, ()).await?.rows.iter().map(text).collect();
        held.sort_unstable();
        if held == allowed {
            return Ok(held);
        }
        ensure!(start.elapsed() < PATIENCE, "{user} holds {held:?}, and may see {allowed:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A token that spells a user's id in another way than the database would hold another scope than the one that the stream
/// tells of; so it is refused.
#[tokio::test(flavor = "multi_thread")]
async fn a_users_id_is_spelled_as_the_database_spells_it() -> Result<()> {
    const USER: &str = "0e37df36-f698-11e6-8dd4-cb9ced3df976";
    let folder = tempfile::tempdir()?;
    let config = folder.path().join("millstream.toml");
    let schema =
        "CREATE TABLE notes (id int PRIMARY KEY, owner uuid NOT NULL); ALTER TABLE notes REPLICA IDENTITY FULL";
    std::fs::write(&config, "[tables.notes]\nscope = { kind = \"user\", column = \"owner\" }\n")?;
    let seed = format!("INSERT INTO notes VALUES (1, '{USER}')");
    let board = Board::with(|builder| builder.app_schema(schema).seed(seed).config(&config)).await?;
    let result = async {
        let client = board.client("a", USER).await?;
        ensure!(client.query("SELECT id FROM notes", ()).await?.rows.len() == 1);
        for (user, expected) in [(USER.to_uppercase(), true), ("somebody".to_owned(), true), (USER.to_owned(), false)] {
            let mut raw = Raw::connect(&board.stack.edge_url()).await?;
            raw.frame(hello(uuid::Uuid::now_v7(), &board.stack.token(&user))).await?;
            let text = raw.next_text().await?.context("the edge closed")?;
            ensure!(text.contains("bad_token") == expected, "{user}: {text}");
        }
        Ok(())
    };
    let result = result.await;
    board.explain(result)
}

/// Types whose values can be equal and spelled in several ways, and a type that would cut an id: scopes go by the spelling, in a
/// snapshot as in the stream.
const SPELLED_SCHEMA: &str = "
CREATE COLLATION loose (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
CREATE TABLE readers (id int PRIMARY KEY, who text COLLATE loose NOT NULL,
                      number numeric, padded char(4), short text, word text COLLATE loose);
ALTER TABLE readers REPLICA IDENTITY FULL;
CREATE TABLE notes (id int PRIMARY KEY, number numeric, padded char(4), short varchar(3), word text COLLATE loose);
ALTER TABLE notes REPLICA IDENTITY FULL;
";
const SPELLED_CONFIG: &str = r#"
[scopes]
number = { membership = { table = "readers", user = "who", scope = "number" } }
padded = { membership = { table = "readers", user = "who", scope = "padded" } }
short = { membership = { table = "readers", user = "who", scope = "short" } }
word = { membership = { table = "readers", user = "who", scope = "word" } }

[tables]
readers = { scope = { kind = "user", column = "who" } }
notes = { scope = [
    { kind = "number", column = "number" }, { kind = "padded", column = "padded" },
    { kind = "short", column = "short" }, { kind = "word", column = "word" },
] }
"#;
/// Each twice: once there before, once written before everybody's eyes. Those with an odd id are spelled as ann's are.
const SPELLED_NOTES: [(u32, &str, &str); 8] = [
    (1, "number", "1.0"),
    (2, "number", "1.00"),
    (3, "padded", "ab"),
    (4, "padded", "abc"),
    (5, "short", "xyz"),
    (6, "short", "abc"),
    (7, "word", "Hello"),
    (8, "word", "hello"),
];

#[tokio::test(flavor = "multi_thread")]
async fn scopes_go_by_the_spelling_of_their_ids() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let config = folder.path().join("millstream.toml");
    std::fs::write(&config, SPELLED_CONFIG)?;
    let insert = |base: u32| -> String {
        let note = |(id, column, value): &(u32, &str, &str)| {
            format!("INSERT INTO notes (id, {column}) VALUES ({}, '{value}');", base + id)
        };
        SPELLED_NOTES.iter().map(note).collect()
    };
    let readers =
        "INSERT INTO readers VALUES (1, 'ann', 1.0, 'ab', 'xyz', 'Hello'), (2, 'ann', NULL, NULL, 'abcdef', NULL),
                   (3, 'ANN', 1.00, 'abc', 'abc', 'hello');";
    let seed = format!("{readers}{}", insert(0));
    let board = Board::with(|builder| builder.app_schema(SPELLED_SCHEMA).seed(seed).config(&config)).await?;
    let outcome = async {
        let early = board.client("early", "ann").await?;
        sqlx::raw_sql(AssertSqlSafe(insert(100))).execute(&mut board.postgres().await?).await?;
        let late = board.client("late", "ann").await?;
        // The last thing that ann is told of.
        sqlx::raw_sql("INSERT INTO notes (id, number) VALUES (1000, 1.0)")
            .execute(&mut board.postgres().await?)
            .await?;
        for (name, client) in [("early", &early), ("late", &late)] {
            let start = Instant::now();
            let held = loop {
                let rows =
                    client.query("SELECT id FROM notes UNION ALL SELECT -id FROM readers ORDER BY 1", ()).await?.rows;
                if rows.last() == Some(&vec![SqlValue::Integer(1000)]) {
                    break rows;
                }
                ensure!(start.elapsed() < PATIENCE, "{name} lacks the last note: {rows:?}");
                tokio::time::sleep(Duration::from_millis(10)).await;
            };
            let ids = [-2, -1, 1, 3, 5, 7, 101, 103, 105, 107, 1000];
            let expected: Vec<_> = ids.into_iter().map(|id| vec![SqlValue::Integer(id)]).collect();
            ensure!(held == expected, "{name} holds {held:?}");
        }
        Ok(())
    };
    let outcome = outcome.await;
    board.explain(outcome)
}

/// Memberships may be kept in a table of another schema that clients are not to know of: all that leaves the database is that
/// memberships have moved.
#[tokio::test(flavor = "multi_thread")]
async fn memberships_of_a_table_that_is_not_synced() -> Result<()> {
    let schema = "CREATE SCHEMA auth;
        CREATE TABLE auth.staff (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, org text, person text, role text, secret text);
        ALTER TABLE auth.staff REPLICA IDENTITY FULL;
        CREATE TABLE notes (id int PRIMARY KEY, org text NOT NULL, v text); ALTER TABLE notes REPLICA IDENTITY FULL;
        CREATE TABLE desks (id text PRIMARY KEY, org text NOT NULL); ALTER TABLE desks REPLICA IDENTITY FULL;
        CREATE TABLE drawers (id int PRIMARY KEY, desk text NOT NULL, v text); ALTER TABLE drawers REPLICA IDENTITY FULL;
        INSERT INTO notes VALUES (1, 'acme', 'one'), (2, 'bolt', 'two');
        INSERT INTO desks VALUES ('d1', 'acme'), ('d2', 'bolt'); INSERT INTO drawers VALUES (1, 'd1', 'one'), (2, 'd2', 'two');
        INSERT INTO auth.staff (org, person, role, secret) VALUES ('acme', 'alice', 'boss', 'secret-1'), ('bolt', 'alice', 'guest', 'secret-2');";
    let config = "[scopes.org]
        membership = { table = \"auth.staff\", user = \"person\", scope = \"org\", roles = { column = \"role\", in = [\"boss\"] } }
        [scopes.desk]
        membership = { table = \"desks\", scope = \"id\", through = \"org\", via = \"org\" }
        [tables.notes]
        scope = { kind = \"org\", column = \"org\" }
        writable = [\"id\", \"org\", \"v\"]
        write.insert = \"EXISTS (SELECT FROM auth.staff s WHERE s.person = auth.user_id AND s.org = new.org AND s.role = 'boss')\"
        [tables.desks]
        scope = { kind = \"org\", column = \"org\" }
        [tables.drawers]
        scope = { kind = \"desk\", column = \"desk\" }
";
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("millstream.toml");
    std::fs::write(&file, config)?;
    let board = Board::with(|builder| builder.app_schema(schema).config(&file)).await?;
    let outcome = async {
        let mut postgres = board.postgres().await?;
        let alice = board.client("alice", "alice").await?;
        let shows = async |expected: &[&str]| -> Result<()> {
            let all = "SELECT 'note ' || v FROM notes UNION ALL SELECT 'drawer ' || v FROM drawers ORDER BY 1";
            let start = Instant::now();
            loop {
                let found = alice.query(all, ()).await?.rows;
                let found: Vec<&str> = found
                    .iter()
                    .filter_map(|row| if let SqlValue::Text(text) = &row[0] { Some(text.as_str()) } else { None })
                    .collect();
                if found == expected {
                    return Ok(());
                }
                ensure!(start.elapsed() < PATIENCE, "{found:?} instead of {expected:?}");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let (one, two) = (["drawer one", "note one"], ["drawer two", "note two"]);
        let both = ["drawer one", "drawer two", "note one", "note two"];
        shows(&one).await.context("at first")?;
        for (sql, expected) in [
            ("UPDATE auth.staff SET role = 'boss', secret = 'secret-3' WHERE org = 'bolt'", both.as_slice()),
            ("UPDATE auth.staff SET secret = 'secret-4'", &both),
            ("UPDATE auth.staff SET role = 'guest' WHERE org = 'acme'", &two),
            ("DELETE FROM auth.staff WHERE org = 'bolt'", &[]),
            (
                "INSERT INTO auth.staff (org, person, role) VALUES ('bolt', 'alice', 'boss'), ('bolt', 'bob', 'boss')",
                &two,
            ),
            ("UPDATE auth.staff SET org = 'acme' WHERE person = 'alice'", &one),
            ("TRUNCATE auth.staff", &[]),
            ("INSERT INTO auth.staff (org, person, role, secret) VALUES ('acme', 'alice', 'boss', 'secret-5')", &one),
        ] {
            postgres.execute(sql).await?;
            shows(expected).await.context(sql)?;
        }
        // The write rule asks the same table; away meanwhile, and after a restart of everything.
        let write = alice.execute("INSERT INTO notes VALUES (3, 'acme', 'three')", ()).await?;
        tokio::time::timeout(PATIENCE, write.confirmed()).await??;
        alice.pause();
        let mut status = alice.status();
        tokio::time::timeout(PATIENCE, status.wait_for(|status| status.state == State::Offline)).await??;
        postgres.execute("UPDATE auth.staff SET org = 'bolt'").await?;
        alice.resume();
        shows(&two).await.context("back again")?;
        ensure!(
            alice.query("SELECT * FROM sqlite_schema WHERE sql LIKE '%staff%'", ()).await?.rows.is_empty(),
            "the store knows the table"
        );
        for suffix in ["", "-wal"] {
            let bytes = std::fs::read(format!("{}{suffix}", board.store("alice").display())).unwrap_or_default();
            ensure!(!bytes.windows(7).any(|found| found == b"secret-"), "a secret is in the store");
        }
        let text = std::fs::read_to_string(&file)?;
        let found = check::check(&mut postgres, &Config::read(&file)?, &text).await?.problems;
        ensure!(found.is_empty(), "{found:?}");
        // Without what its deletes need, `check` and `setup` say so.
        postgres.execute("ALTER TABLE auth.staff REPLICA IDENTITY DEFAULT").await?;
        let found = check::check(&mut postgres, &Config::read(&file)?, &text).await?.problems;
        ensure!(found.iter().any(|problem| problem.to_string().contains("auth.staff")), "{found:?}");
        // A client cannot write it, nor learn whether it is there.
        ensure!(alice.execute("INSERT INTO \"auth.staff\" (org) VALUES ('acme')", ()).await.is_err());
        Ok(())
    }
    .await;
    board.explain(outcome)
}

/// What is wrong with the declaration of a table is no reason to take from users the rows of others.
#[tokio::test(flavor = "multi_thread")]
async fn memberships_of_a_table_that_is_set_aside_still_count() -> Result<()> {
    let schema = "CREATE TABLE orgs (org text NOT NULL, user_id text NOT NULL, level int, PRIMARY KEY (org, user_id));
        CREATE TABLE notes (id int PRIMARY KEY, org text NOT NULL, v text); ALTER TABLE notes REPLICA IDENTITY FULL;
        INSERT INTO notes VALUES (1, 'acme', 'one'), (2, 'bolt', 'two'); INSERT INTO orgs VALUES ('acme', 'alice', 1);";
    let config = "[scopes.org]
        membership = { table = \"orgs\", user = \"user_id\", scope = \"org\" }
        [tables.orgs]
        scope = { kind = \"org\", column = \"org\" }
        hidden = [\"level\"]
        [tables.notes]
        scope = { kind = \"org\", column = \"org\" }
";
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("millstream.toml");
    std::fs::write(&file, config)?;
    let board = Board::with(|builder| builder.app_schema(schema).config(&file)).await?;
    let outcome = async {
        let mut postgres = board.postgres().await?;
        let alice = board.client("alice", "alice").await?;
        let mut lost = false;
        let mut shows = async |expected: usize, gone: bool| -> Result<()> {
            let start = Instant::now();
            loop {
                let notes =
                    alice.query("SELECT v FROM notes ORDER BY id", ()).await.map_or(99, |found| found.rows.len());
                let orgs = alice.query("SELECT org FROM orgs", ()).await;
                lost |= notes == 0;
                if notes == expected && orgs.is_err() == gone {
                    return Ok(());
                }
                ensure!(start.elapsed() < PATIENCE, "{notes} notes instead of {expected}; {orgs:?}");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        shows(1, false).await.context("at first")?;
        postgres.execute("ALTER TABLE orgs DROP COLUMN level").await?;
        shows(1, true).await.context("set aside")?;
        postgres.execute("INSERT INTO orgs VALUES ('bolt', 'alice')").await?;
        shows(2, true).await.context("a grant meanwhile")?;
        postgres.execute("DELETE FROM orgs WHERE org = 'acme'").await?;
        shows(1, true).await.context("a revocation meanwhile")?;
        postgres.execute("ALTER TABLE orgs ADD COLUMN level int").await?;
        shows(1, false).await.context("back")?;
        ensure!(!lost, "rows of other tables were gone meanwhile");
        Ok(())
    }
    .await;
    board.explain(outcome)
}
