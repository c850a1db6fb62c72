//! Rows that a user may not read: an update or delete of one is refused in the same words as of one that is not there, whichever
//! kind of scope it belongs to.

use anyhow::{Context as _, Result, ensure};
use millstream_schemas::stream::{Failure, Verdict};
use millstream_schemas::{Change, Code, Operation};
use sqlx::{AssertSqlSafe, Executor as _};
use uuid::Uuid;

use crate::executor::database::{Client, Database, change};

/// Scopes of every kind: everybody's, a user's, by membership, by role, through one and two other scopes, several, and such
/// whose ids are equal and spelled in several ways.
const SCHEMA: &str = "
CREATE TABLE officials (country text, user_id text, PRIMARY KEY (country, user_id));
CREATE TABLE organisations (id uuid PRIMARY KEY, country text);
CREATE TABLE staff (organisation uuid, user_id varchar(20), role text, PRIMARY KEY (organisation, user_id));
CREATE TABLE projects (code int PRIMARY KEY, organisation uuid, title text);
CREATE TABLE guests (project int, user_id text, PRIMARY KEY (user_id, project));
CREATE TABLE readers (id int PRIMARY KEY, who text, amount numeric, padded char(4));
CREATE TABLE news (id int PRIMARY KEY, n int);
CREATE TABLE notes (id int PRIMARY KEY, owner text, n int);
CREATE TABLE tasks (id int PRIMARY KEY, project int, n int);
CREATE TABLE mixed (id int PRIMARY KEY, project int, assignee text, n int);
CREATE TABLE amounts (id int PRIMARY KEY, amount numeric, padded char(4), n int);
CREATE TABLE open (id int PRIMARY KEY, owner text, n int);
CREATE TABLE accepted (id int PRIMARY KEY, owner text, n int);
CREATE TABLE secured (id int PRIMARY KEY, owner text, n int);
ALTER TABLE secured ENABLE ROW LEVEL SECURITY;
CREATE POLICY seen ON secured FOR SELECT USING (true);
CREATE POLICY changed ON secured FOR UPDATE USING (false);
INSERT INTO officials VALUES ('nl', 'off');
INSERT INTO organisations VALUES ('0000000a-0000-0000-0000-000000000000', 'nl'), ('0000000b-0000-0000-0000-000000000000', NULL);
INSERT INTO staff VALUES ('0000000a-0000-0000-0000-000000000000', 'ann', 'it''s \"boss\"'),
    ('0000000a-0000-0000-0000-000000000000', 'tom', 'trainee'), ('0000000b-0000-0000-0000-000000000000', 'bob', 'engineer');
INSERT INTO projects VALUES (1, '0000000a-0000-0000-0000-000000000000', 'rocket'), (2, '0000000b-0000-0000-0000-000000000000', 'nut'),
    (3, NULL, 'free');
INSERT INTO guests VALUES (1, 'gus'), (3, 'tom');
INSERT INTO readers VALUES (1, 'ann', 1.0, 'ab'), (2, 'ANN', 1.00, 'abc');
INSERT INTO news VALUES (1, 0);
INSERT INTO notes VALUES (1, 'ann', 0), (2, 'bob', 0), (3, NULL, 0), (4, 'Ann', 0);
INSERT INTO tasks VALUES (1, 1, 0), (2, 2, 0), (3, 3, 0), (4, NULL, 0), (5, 99, 0);
INSERT INTO mixed VALUES (1, 1, 'bob', 0), (2, 2, NULL, 0), (3, NULL, 'ann', 0), (4, NULL, NULL, 0);
INSERT INTO amounts VALUES (1, 1.0, NULL, 0), (2, 1.00, NULL, 0), (3, NULL, 'ab', 0), (4, NULL, 'abc', 0), (5, NULL, NULL, 0);
INSERT INTO open VALUES (1, 'ann', 0), (2, 'bob', 0);
INSERT INTO accepted VALUES (1, 'ann', 0), (2, 'bob', 0);
INSERT INTO secured VALUES (1, 'ann', 0), (2, 'bob', 0);
";

const CONFIG: &str = r#"
[scopes.country]
membership = { table = "officials", user = "user_id", scope = "country" }

[scopes.organisation]
membership = [
    { table = "staff", user = "user_id", scope = "organisation", roles = { column = "role", in = ["engineer", "it's \"boss\""] } },
    { table = "organisations", scope = "id", through = "country", via = "country" },
]

[scopes.project]
membership = [
    { table = "guests", user = "user_id", scope = "project" },
    { table = "projects", scope = "code", through = "organisation", via = "organisation" },
]

[scopes.amount]
membership = { table = "readers", user = "who", scope = "amount" }

[scopes.padded]
membership = { table = "readers", user = "who", scope = "padded" }

[tables]
officials = { scope = { kind = "country", column = "country" } }
organisations = { scope = { kind = "organisation", column = "id" } }
staff = { scope = { kind = "organisation", column = "organisation" } }
guests = { scope = { kind = "project", column = "project" } }
readers = { scope = { kind = "user", column = "who" } }

[tables.projects]
scope = { kind = "project", column = "code" }
writable = ["title"]
write = { update = "false", delete = "false" }

[tables.news]
scope = { kind = "global" }
writable = ["n"]
write = { update = "false", delete = "false" }

[tables.notes]
scope = { kind = "user", column = "owner" }
writable = ["n"]
write = { update = "new.n < 0", delete = "false" }

[tables.tasks]
scope = { kind = "project", column = "project" }
writable = ["n"]
write = { update = "new.n < 0", delete = "1 / old.n > 0" }

[tables.mixed]
scope = [{ kind = "project", column = "project" }, { kind = "user", column = "assignee" }]
writable = ["n"]
write = { update = "false", delete = "false" }

[tables.amounts]
scope = [{ kind = "amount", column = "amount" }, { kind = "padded", column = "padded" }]
writable = ["n"]
write = { update = "false", delete = "false" }

[tables.open]
scope = { kind = "user", column = "owner" }
writable = ["id", "owner", "n"]
write = { insert = "true", update = "true", delete = "true" }

[tables.accepted]
scope = { kind = "user", column = "owner" }
delete_missing = "accept"
writable = ["n"]
write = { update = "false", delete = "false" }

[tables.secured]
scope = { kind = "user", column = "owner" }
writable = ["n"]
write = { update = "true", delete = "true" }
"#;

/// Who may read which rows.
#[expect(clippy::type_complexity, reason = "a table of cases")]
const READABLE: [(&str, &str, &[(&str, &[i32])]); 6] = [
    ("news", "n", &[("ann", &[1]), ("tom", &[1]), ("gus", &[1]), ("bob", &[1]), ("off", &[1]), ("eve", &[1])]),
    ("notes", "n", &[("ann", &[1]), ("tom", &[]), ("gus", &[]), ("bob", &[2]), ("off", &[]), ("eve", &[])]),
    ("projects", "title", &[("ann", &[1]), ("tom", &[3]), ("gus", &[1]), ("bob", &[2]), ("off", &[1]), ("eve", &[])]),
    ("tasks", "n", &[("ann", &[1]), ("tom", &[3]), ("gus", &[1]), ("bob", &[2]), ("off", &[1]), ("eve", &[])]),
    ("mixed", "n", &[("ann", &[1, 3]), ("tom", &[]), ("gus", &[1]), ("bob", &[1, 2]), ("off", &[1]), ("eve", &[])]),
    ("amounts", "n", &[("ann", &[1, 3]), ("ANN", &[2, 4]), ("tom", &[]), ("eve", &[])]),
];

/// Tries one change alone, and in a batch.
async fn told(database: &mut Database, client: &mut Client, change: &Change) -> Result<Vec<Option<Failure>>> {
    let mut told = Vec::new();
    for together in [false, true] {
        let again = Change { change_id: Uuid::new_v4(), ..change.clone() };
        let submissions = vec![client.submit(vec![again])];
        let results = if together { database.batch(submissions).await } else { database.each(submissions).await };
        let (_, result) = results.into_iter().next().context("no result")?;
        ensure!(result.failure.is_some() == (result.verdict == Verdict::Rejected), "{result:?}");
        told.push(result.failure);
    }
    Ok(told)
}

/// What a client learns of a failure, but for which of its changes it was.
fn words(failure: &Option<Failure>) -> Option<(Code, Option<String>, String)> {
    failure.as_ref().map(|failure| (failure.code, failure.rule.clone(), failure.message.clone()))
}

#[tokio::test(flavor = "multi_thread")]
async fn what_may_not_be_read_is_refused_as_what_is_not_there() -> Result<()> {
    let mut database = Database::with(SCHEMA, CONFIG).await;
    let mut id = 0;
    let mut client = |user: &'static str| {
        id += 1;
        Client::new(id, user)
    };
    let update = |table: &str, column: &str, id: i32, value: &str| {
        let key = if table == "projects" { "code" } else { "id" };
        change(table, Operation::Update, &[(key, &id.to_string())], &[(column, Some(value))], 1)
    };
    let delete = |table: &str, id: i32| change(table, Operation::Delete, &[("id", &id.to_string())], &[], 1);
    let mut compared = 0;
    for (table, column, users) in READABLE {
        let sql = format!("SELECT {}::int FROM {table}", if table == "projects" { "code" } else { "id" });
        let ids: Vec<i32> = sqlx::query_scalar(AssertSqlSafe(sql)).fetch_all(&mut database.sql).await?;
        for (user, readable) in users {
            let mut client = client(user);
            for op in [Operation::Update, Operation::Delete] {
                let make =
                    |id| if op == Operation::Update { update(table, column, id, "1") } else { delete(table, id) };
                let missing = told(&mut database, &mut client, &make(1_000)).await?;
                ensure!(missing[0].as_ref().is_some_and(|failure| failure.code == Code::EntityMissing), "{missing:?}");
                for id in &ids {
                    let found = told(&mut database, &mut client, &make(*id)).await?;
                    for (found, missing) in found.iter().zip(&missing) {
                        let code = found.as_ref().map(|failure| failure.code);
                        if readable.contains(id) {
                            // The rule of tasks divides by zero.
                            let odd = (table, op) == ("tasks", Operation::Delete);
                            let expected = if odd { Code::InvalidValue } else { Code::PermissionDenied };
                            ensure!(code == Some(expected), "{user} {op:?} {table} {id}: {found:?}");
                        } else {
                            ensure!(
                                words(found) == words(missing),
                                "{user} {op:?} {table} {id}: {found:?}, {missing:?}"
                            );
                        }
                        compared += 1;
                    }
                }
            }
            // What is wrong with a value tells of no row either.
            if column == "n" {
                let missing = told(&mut database, &mut client, &update(table, column, 1_000, "x")).await?;
                for id in ids.iter().filter(|id| !readable.contains(id)) {
                    for found in told(&mut database, &mut client, &update(table, column, *id, "x")).await? {
                        ensure!(words(&found) == words(&missing[0]), "{user} {table} {id}: {found:?}, {missing:?}");
                    }
                }
            }
        }
    }
    println!("{compared} refusals compared");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_may_be_written_needs_not_be_read() -> Result<()> {
    let mut database = Database::with(SCHEMA, CONFIG).await;
    let mut ann = Client::new(1, "ann");
    let update = |table: &str, id: &str| change(table, Operation::Update, &[("id", id)], &[("n", Some("1"))], 1);
    let delete = |table: &str, id: &str| change(table, Operation::Delete, &[("id", id)], &[], 1);
    // The rule allows it, so that it is there is no secret.
    for change in [update("open", "2"), update("open", "1")] {
        ensure!(told(&mut database, &mut ann, &change).await? == [None, None], "{change:?}");
    }
    // Where the delete of what is not there is accepted, it is accepted of what may not be read, and nothing is deleted.
    ensure!(told(&mut database, &mut ann, &delete("accepted", "2")).await? == [None, None]);
    ensure!(told(&mut database, &mut ann, &delete("accepted", "9")).await? == [None, None]);
    for failure in told(&mut database, &mut ann, &delete("accepted", "1")).await? {
        ensure!(failure.as_ref().is_some_and(|failure| failure.code == Code::PermissionDenied), "{failure:?}");
    }
    ensure!(database.json("SELECT count(*)::text FROM accepted").await == "2");
    // Row security that shows a row, and lets nobody write it.
    for change in [update("secured", "1"), delete("secured", "1")] {
        for failure in told(&mut database, &mut ann, &change).await? {
            ensure!(failure.as_ref().is_some_and(|failure| failure.code == Code::PermissionDenied), "{failure:?}");
        }
    }
    for (hidden, missing) in
        [(update("secured", "2"), update("secured", "9")), (delete("secured", "2"), delete("secured", "9"))]
    {
        let (hidden, missing) =
            (told(&mut database, &mut ann, &hidden).await?, told(&mut database, &mut ann, &missing).await?);
        ensure!(hidden.iter().map(words).eq(missing.iter().map(words)), "{hidden:?} {missing:?}");
    }
    // What is wrong with a value for a row that the same transaction made is told.
    let insert = change("open", Operation::Insert, &[("id", "7")], &[("owner", Some("eve"))], 1);
    let bad = change("open", Operation::Update, &[("id", "7")], &[("n", Some("x"))], 1);
    let results = database.batch(vec![ann.submit(vec![insert, bad])]).await;
    let failure = results[0].1.failure.as_ref().context("it was taken")?;
    ensure!(failure.code == Code::InvalidValue && failure.message.contains("open.n"), "{failure:?}");
    // A membership of the same batch counts for what comes after it, and for nothing before.
    database.sql.execute("INSERT INTO guests VALUES (2, 'eve')").await?;
    let mut eve = Client::new(2, "eve");
    for failure in told(&mut database, &mut eve, &update("tasks", "2")).await? {
        ensure!(failure.as_ref().is_some_and(|failure| failure.code == Code::PermissionDenied), "{failure:?}");
    }
    Ok(())
}
