//! Changes of which none may be lost: sums, greatest and least values by two clients at once, whichever way their table merges; and rows
//! that follow the one that they belong to.

use anyhow::{Context as _, Result, ensure};
use millstream_client::{Client, Edit, EntryState, Outcome, State};
use millstream_tests::board::{Board, PATIENCE};
use sqlx::{Connection as _, PgConnection};

const SCHEMA: &str = "
CREATE TABLE by_column (
    id text PRIMARY KEY, n int NOT NULL DEFAULT 0 CHECK (n < 1000), most int, first date, title text,
    field_clocks jsonb NOT NULL DEFAULT '{}', updated_at timestamptz NOT NULL DEFAULT now(), client_id uuid
);
CREATE TABLE by_row (
    id text PRIMARY KEY, n int NOT NULL DEFAULT 0 CHECK (n < 1000), most int, first date, title text,
    updated_at timestamptz NOT NULL DEFAULT now(), client_id uuid
);
CREATE TABLE by_arrival (
    id text PRIMARY KEY, n int NOT NULL DEFAULT 0 CHECK (n < 1000), most int, first date, title text
);
CREATE TABLE projects (id text PRIMARY KEY, name text NOT NULL CHECK (length(name) < 8));
CREATE TABLE tasks (id text PRIMARY KEY, project text NOT NULL REFERENCES projects ON DELETE CASCADE, title text);
CREATE TABLE comments (id text PRIMARY KEY, task text NOT NULL REFERENCES tasks ON DELETE CASCADE, text text);
";
const COUNTED: [&str; 3] = ["by_column", "by_row", "by_arrival"];
const CONFIG: &str = r#"
[tables.projects]
scope = { kind = "global" }
writable = ["id", "name"]
write = { insert = "true", update = "true", delete = "true" }

# The parent's rights are the children's: where it is missing, they are refused before the foreign key is looked at.
[tables.tasks]
scope = { kind = "global" }
writable = ["id", "project", "title"]
write.insert = "EXISTS (SELECT FROM projects p WHERE p.id = new.project)"
write.update = "true"
write.delete = "true"

[tables.comments]
scope = { kind = "global" }
writable = ["id", "task", "text"]
write.insert = "EXISTS (SELECT FROM tasks t WHERE t.id = new.task)"
write.delete = "true"
"#;

async fn start(folder: &tempfile::TempDir) -> Result<Board> {
    let mut config = CONFIG.to_owned();
    for table in COUNTED {
        let conflict = table.trim_start_matches("by_");
        config += &format!(
            "[tables.{table}]\nscope = {{ kind = \"global\" }}\nconflict = \"{conflict}\"\n\
             writable = [\"id\", \"n\", \"most\", \"first\", \"title\"]\n\
             merge = {{ n = \"add\", most = \"max\", first = \"min\" }}\n\
             write = {{ insert = \"true\", update = \"true\", delete = \"true\" }}\n"
        );
    }
    let file = folder.path().join("millstream.toml");
    std::fs::write(&file, config)?;
    let seed = COUNTED.map(|table| format!("INSERT INTO {table} VALUES ('a', 10, 5, '2026-01-02', 'old');")).concat();
    Board::with(|builder| builder.app_schema(SCHEMA).seed(seed).config(&file)).await
}

async fn offline(client: &Client) -> Result<()> {
    client.pause();
    client.status().wait_for(|status| status.state == State::Offline).await?;
    Ok(())
}

async fn rows(client: &Client, table: &str) -> Result<String> {
    let sql = format!("SELECT id || ' ' || n || ' ' || most || ' ' || first || ' ' || title FROM {table} ORDER BY id");
    Ok(client.query_as::<(String,)>(&sql, ()).await?.into_iter().map(|(row,)| row).collect::<Vec<_>>().join(", "))
}

/// Two clients count offline, on a row that both have and on one that both make; all of it counts, everywhere.
#[tokio::test(flavor = "multi_thread")]
async fn counters_of_two_clients_all_count() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let board = start(&folder).await?;
    let result = async {
        let (a, b) = (board.client("a", "alice").await?, board.client("b", "bob").await?);
        a.settled(PATIENCE).await?;
        b.settled(PATIENCE).await?;
        offline(&a).await?;
        offline(&b).await?;
        let mut writes = Vec::new();
        for table in COUNTED {
            let count = format!(
                "UPDATE {table} SET n = n + 1, most = max(most, ?1), first = min(first, ?2), title = ?3 WHERE id = 'a'"
            );
            let upsert = format!(
                "INSERT INTO {table} (id, n, most, first, title) VALUES ('new', 1, ?1, ?2, ?3) \
                 ON CONFLICT (id) DO UPDATE SET n = n + 1, most = max(most, excluded.most), first = min(first, excluded.first)"
            );
            writes.push(a.execute(&count, (7, "2026-01-03", "a's")).await?);
            writes.push(a.execute(&format!("UPDATE {table} SET n = n - 3 WHERE id = 'a'"), ()).await?);
            writes.push(a.execute(&upsert, (1, "2026-02-03", "a's")).await?);
            // Later, and online earlier: what it sets wins, what both count does not care.
            writes.push(b.execute(&count, (6, "2026-01-01", "b's")).await?);
            writes.push(b.execute(&upsert, (2, "2026-02-02", "b's")).await?);
            writes.push(b.execute(&upsert, (3, "2026-02-04", "b's")).await?);
            ensure!(
                rows(&a, table).await? == "a 8 7 2026-01-02 a's, new 1 1 2026-02-03 a's",
                "{}",
                rows(&a, table).await?
            );
            ensure!(
                rows(&b, table).await? == "a 11 6 2026-01-01 b's, new 2 3 2026-02-02 b's",
                "{}",
                rows(&b, table).await?
            );
        }
        b.resume();
        b.settled(PATIENCE).await?;
        a.resume();
        a.settled(PATIENCE).await?;
        let mut sql = PgConnection::connect(&board.stack.postgres_url()).await?;
        for table in COUNTED {
            let all =
                format!("SELECT string_agg(concat_ws(' ', id, n, most, first, title), ', ' ORDER BY id) FROM {table}");
            let postgres: String = sqlx::query_scalar(sqlx::AssertSqlSafe(all)).fetch_one(&mut sql).await?;
            // By arrival, whoever comes last sets the title.
            let title = if table == "by_arrival" { "a's" } else { "b's" };
            let expected = format!("a 9 7 2026-01-01 {title}, new 3 3 2026-02-02 {title}");
            ensure!(postgres == expected, "{table}: {postgres}");
            for client in [&a, &b] {
                let deadline = tokio::time::Instant::now() + PATIENCE;
                while rows(client, table).await? != postgres {
                    ensure!(tokio::time::Instant::now() < deadline, "{table}: {}", rows(client, table).await?);
                    tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                }
            }
        }
        for write in writes {
            write.confirmed().await.context("a change that counts is applied")?;
        }
        // Beyond what the column takes: refused, with a word, and taken back.
        let bad = a.execute("UPDATE by_column SET n = n + 1000", ()).await?;
        let error = bad.confirmed().await.err().context("1,009 was taken")?;
        ensure!(error.to_string().contains("by_column_n_check"), "{error:#}");
        ensure!(rows(&a, "by_column").await?.starts_with("a 9 "), "{}", rows(&a, "by_column").await?);
        a.close().await?;
        b.close().await?;
        Ok(())
    };
    let result = result.await;
    board.explain(result)
}

/// A project with too long a name, recorded offline with what is in it: all of it waits, stays on the screen, and follows by itself once
/// a person has given the project another name.
#[tokio::test(flavor = "multi_thread")]
async fn children_follow_a_parent_that_is_corrected() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let board = start(&folder).await?;
    let result = async {
        let a = board.client("a", "alice").await?;
        a.settled(PATIENCE).await?;
        offline(&a).await?;
        let project = a.execute("INSERT INTO projects VALUES ('p', 'far too long a name')", ()).await?;
        let mut writes = Vec::new();
        for id in ["x", "y", "z"] {
            writes.push(a.execute("INSERT INTO tasks VALUES (?1, 'p', 'title')", (id,)).await?);
            writes.push(a.execute("INSERT INTO comments VALUES (?1, ?1, 'text')", (id,)).await?);
        }
        a.resume();
        let error = project.confirmed().await.err().context("the name was taken")?;
        ensure!(error.to_string().contains("projects_name_check"), "{error:#}");
        // One that is recorded by now.
        writes.push(a.execute("INSERT INTO tasks VALUES ('late', 'p', 'title')", ()).await?);
        let tx = project.tx().context("it was recorded")?;
        a.execute("INSERT INTO projects VALUES ('free', 'free')", ()).await?.confirmed().await?;
        for write in &writes {
            let entry = a.queue_entries(write.tx().context("recorded")?).await?.remove(0);
            ensure!(entry.state == EntryState::Held && entry.waits_for.is_some(), "{entry:?}");
        }
        ensure!(a.failed().await?.len() == 1, "{:?}", a.failed().await?);
        let shown: Vec<(i64, i64)> =
            a.query_as("SELECT (SELECT count(*) FROM tasks), (SELECT count(*) FROM comments)", ()).await?;
        ensure!(shown == [(4, 3)], "{shown:?}");
        let edit = Edit { change_id: None, column: "name".into(), value: Some("Cellar".into()) };
        ensure!(a.edit(tx, vec![edit]).await?.confirmed().await? == Outcome::Applied);
        for write in writes {
            ensure!(write.confirmed().await? == Outcome::Applied);
        }
        // REPLACE of what they refer to is an update of what differs: they stay, here and there.
        let replaced = a.execute("REPLACE INTO projects VALUES ('p', 'Attic')", ()).await?;
        ensure!(replaced.confirmed().await? == Outcome::Applied);
        let shown: Vec<(i64, i64)> =
            a.query_as("SELECT (SELECT count(*) FROM tasks), (SELECT count(*) FROM comments)", ()).await?;
        ensure!(shown == [(4, 3)], "{shown:?}");
        let mut sql = PgConnection::connect(&board.stack.postgres_url()).await?;
        let counts: (i64, i64, String) = sqlx::query_as(
            "SELECT (SELECT count(*) FROM tasks), (SELECT count(*) FROM comments), (SELECT name FROM projects WHERE id = 'p')",
        )
        .fetch_one(&mut sql)
        .await?;
        ensure!(counts == (4, 3, "Attic".to_owned()), "{counts:?}");
        // The app deletes it all itself, from the top, each in a transaction of its own; the first of them took the rest along.
        offline(&a).await?;
        let mut writes = Vec::new();
        for sql in ["DELETE FROM projects WHERE id = 'p'", "DELETE FROM comments", "DELETE FROM tasks"] {
            writes.push(a.execute(sql, ()).await?);
        }
        a.resume();
        for write in writes {
            ensure!(write.confirmed().await? == Outcome::Applied);
        }
        // What somebody else deleted is another matter.
        let insert = "INSERT INTO tasks VALUES ('theirs', 'free', 'title')";
        a.execute(insert, ()).await?.confirmed().await?;
        offline(&a).await?;
        sqlx::query("DELETE FROM tasks").execute(&mut sql).await?;
        let write = a.execute("DELETE FROM tasks", ()).await?;
        a.resume();
        let error = write.confirmed().await.err().context("the row was there")?;
        ensure!(error.to_string().contains("no row with this key"), "{error:#}");
        a.close().await?;
        Ok(())
    };
    let result = result.await;
    board.explain(result)
}
