//! Migrations of synced tables while clients are connected, away, or have changes queued: columns are added, filled, widened,
//! renamed and dropped; nobody loses a change, nobody shows a value in the wrong column.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use millstream_client::{Client, SqlValue, State};
use millstream_tests::board::{Board, PATIENCE};
use sqlx::{AssertSqlSafe, PgConnection};

const SCHEMA: &str = "
CREATE TABLE notes (id int PRIMARY KEY, junk text, body text NOT NULL, size int NOT NULL DEFAULT 1);
CREATE TABLE tags (id int PRIMARY KEY, name text);
";
const SEED: &str = "INSERT INTO notes SELECT n, 'junk ' || n, 'body ' || n, n FROM generate_series(1, 50) AS n; INSERT INTO tags VALUES (1, 'a');";

/// What the file says of `notes`, beside its scope.
fn config(path: &Path, notes: &str) -> Result<()> {
    let text = format!(
        "[tables.notes]\nscope = {{ kind = \"global\" }}\nwrite.insert = \"true\"\nwrite.update = \"true\"\nwrite.delete = \"true\"\n{notes}\n\
         [tables.tags]\nscope = {{ kind = \"global\" }}\nwritable = [\"id\", \"name\"]\nwrite.insert = \"true\"\nwrite.update = \"true\"\n"
    );
    // As a whole: services read it while we write it.
    std::fs::write(path.with_extension("new"), text)?;
    Ok(std::fs::rename(path.with_extension("new"), path)?)
}

async fn sql(postgres: &mut PgConnection, sql: &str) -> Result<()> {
    sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(postgres).await.with_context(|| sql.to_owned())?;
    Ok(())
}

/// Waits until the client shows what Postgres has, column by column.
async fn agrees(client: &Client, postgres: &mut PgConnection, columns: &str) -> Result<Duration> {
    let start = Instant::now();
    let names: Vec<&str> = columns.split(", ").collect();
    let texts: Vec<String> = names.iter().map(|name| format!("coalesce({name}::text, '∅')")).collect();
    loop {
        let wanted: Vec<String> = sqlx::query_scalar(AssertSqlSafe(format!(
            "SELECT concat_ws('|', {}) FROM notes ORDER BY id",
            texts.join(", ")
        )))
        .fetch_all(&mut *postgres)
        .await?;
        // A client that has not learnt of a column yet cannot be asked for it.
        let found = client.query(&format!("SELECT {columns} FROM notes ORDER BY id"), ()).await;
        let text = |value: &SqlValue| match value {
            SqlValue::Null => "∅".to_owned(),
            SqlValue::Integer(n) => n.to_string(),
            SqlValue::Text(text) => text.clone(),
            other => format!("{other:?}"),
        };
        let shown = found.as_ref().map(|rows| -> Vec<String> {
            rows.rows.iter().map(|row| row.iter().map(text).collect::<Vec<_>>().join("|")).collect()
        });
        if shown.as_ref().is_ok_and(|shown| *shown == wanted) {
            return Ok(start.elapsed());
        }
        if start.elapsed() > PATIENCE {
            let status = client.status().borrow().clone();
            let differs = shown.map(|shown| shown.into_iter().zip(wanted).find(|(shown, wanted)| shown != wanted));
            anyhow::bail!("{columns}: {differs:?}; {status:?}; {found:?}");
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn confirmed(client: &Client, sql: &str) -> Result<()> {
    let write = client.execute(sql, ()).await.with_context(|| sql.to_owned())?;
    tokio::time::timeout(PATIENCE, write.confirmed()).await?.with_context(|| sql.to_owned())?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn columns_come_change_and_go_under_connected_and_old_clients() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("millstream.toml");
    config(&file, "writable = [\"id\", \"junk\", \"body\", \"size\"]")?;
    let board = Board::with(|builder| builder.app_schema(SCHEMA).seed(SEED).config(&file)).await?;
    let outcome = run(&board, &file).await;
    board.explain(outcome)
}

async fn run(board: &Board, file: &Path) -> Result<()> {
    let mut postgres = board.postgres().await?;
    let pg = &mut postgres;
    let live = board.client("live", "alice").await?;
    // An old client: away from the beginning, with changes to columns that will have other names, or none, by then.
    let old = board.client("old", "bob").await?;
    old.pause();
    old.status().wait_for(|status| status.state == State::Offline).await?;
    old.execute("UPDATE notes SET body = 'from afar', junk = 'gone' WHERE id = 7", ()).await?;
    old.execute("UPDATE notes SET junk = 'only junk' WHERE id = 8", ()).await?;
    old.execute("INSERT INTO notes (id, body, junk) VALUES (100, 'new from afar', 'x')", ()).await?;

    // A column with values for every row that there is, on a table that nobody writes to.
    sql(pg, "ALTER TABLE notes ADD COLUMN colour text DEFAULT 'grey'").await?;
    let time = agrees(&live, pg, "id, junk, body, size, colour").await?;
    println!("an added column is there after {time:.1?}");
    ensure!(time < Duration::from_secs(10), "{time:?}");
    // And under writes, in one transaction with its values.
    sql(pg, "BEGIN; ALTER TABLE notes ADD COLUMN stars int; UPDATE notes SET stars = id * 2; UPDATE tags SET name = 'b'; COMMIT").await?;
    agrees(&live, pg, "id, junk, body, size, colour, stars").await?;
    // Written by clients, once the file allows it, without a restart.
    config(file, "writable = [\"id\", \"junk\", \"body\", \"size\", \"stars\"]")?;
    let start = Instant::now();
    while confirmed(&live, "UPDATE notes SET stars = 77 WHERE id = 3").await.is_err() {
        ensure!(start.elapsed() < PATIENCE, "clients may not set the new column");
        for write in live.failed().await? {
            live.discard(write.tx).await?;
        }
        tokio::time::sleep(Duration::from_millis(1_100)).await;
    }

    // A wider type, and a value that only fits there.
    sql(pg, "ALTER TABLE notes ALTER COLUMN size TYPE bigint; UPDATE notes SET size = 9007199254740993 WHERE id = 1")
        .await?;
    agrees(&live, pg, "id, junk, body, size, colour, stars").await?;
    confirmed(&live, "UPDATE notes SET size = 9007199254740995 WHERE id = 2").await?;

    // A new name, a column less: the places of all others move.
    config(
        file,
        "writable = [\"id\", \"text\", \"size\", \"stars\"]\nrenamed = { body = \"text\" }\ndropped = [\"junk\"]",
    )?;
    sql(pg, "BEGIN; ALTER TABLE notes RENAME COLUMN body TO text; ALTER TABLE notes DROP COLUMN junk; UPDATE notes SET text = text || '!'; COMMIT").await?;
    agrees(&live, pg, "id, text, size, colour, stars").await?;
    ensure!(live.query("SELECT junk FROM notes", ()).await.is_err(), "the dropped column is still there");
    confirmed(&live, "UPDATE notes SET text = 'by its new name' WHERE id = 4").await?;
    // Added and dropped again, with rows written in between.
    sql(pg, "ALTER TABLE notes ADD COLUMN brief text; UPDATE notes SET brief = 'x', size = 5 WHERE id < 10").await?;
    sql(pg, "ALTER TABLE notes DROP COLUMN brief; UPDATE notes SET size = 6 WHERE id < 5").await?;
    agrees(&live, pg, "id, text, size, colour, stars").await?;

    // The old client comes back: what it wrote lands where it belongs now.
    old.resume();
    old.settled(PATIENCE).await.context("the old client's changes")?;
    let rows: Vec<(i32, String)> =
        sqlx::query_as("SELECT id, text FROM notes WHERE id IN (7, 8, 100) ORDER BY id").fetch_all(&mut *pg).await?;
    let texts: Vec<&str> = rows.iter().map(|(_, text)| text.as_str()).collect();
    ensure!(texts == ["from afar", "body 8!", "new from afar"], "{rows:?}");
    ensure!(old.failed().await?.is_empty(), "{:?}", old.failed().await?);
    agrees(&old, pg, "id, text, size, colour, stars").await.context("the old client")?;
    agrees(&live, pg, "id, text, size, colour, stars").await?;
    agrees(&board.client("new", "carol").await?, pg, "id, text, size, colour, stars").await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_of_every_shape_are_followed() -> Result<()> {
    const SHAPES: &str = "
        CREATE TABLE parts (id int, region text, body text, length int GENERATED ALWAYS AS (length(body)) STORED, PRIMARY KEY (id, region)) PARTITION BY LIST (region);
        CREATE TABLE parts_a PARTITION OF parts FOR VALUES IN ('a');
        CREATE TABLE parts_b PARTITION OF parts FOR VALUES IN ('b', 'c');
        CREATE TYPE pair AS (mark text, body text);
        CREATE TABLE large (id int PRIMARY KEY, n int NOT NULL, body text NOT NULL, of pair);
        ALTER TABLE large ALTER COLUMN body SET STORAGE EXTERNAL, ALTER COLUMN of SET STORAGE EXTERNAL;";
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("millstream.toml");
    std::fs::write(
        &file,
        "[tables.parts]\nscope = { kind = \"global\" }\nwritable = [\"id\", \"region\", \"body\"]\nwrite.insert = \"true\"\nwrite.update = \"true\"\nwrite.delete = \"true\"\n\
         [tables.large]\nscope = { kind = \"global\" }\nwritable = [\"id\", \"n\", \"body\"]\nwrite.insert = \"true\"\nwrite.update = \"true\"\n",
    )?;
    let board = Board::with(|builder| builder.app_schema(SHAPES).config(&file)).await?;
    let outcome = shapes(&board).await;
    board.explain(outcome)
}

async fn shapes(board: &Board) -> Result<()> {
    let mut postgres = board.postgres().await?;
    let pg = &mut postgres;
    let live = board.client("live", "alice").await?;
    let steps = [
        "INSERT INTO parts (id, region, body) SELECT n, chr(97 + n % 3), 'body ' || n FROM generate_series(1, 30) AS n",
        "UPDATE parts SET body = body || '!' WHERE id % 2 = 0",
        // To another partition, which is a delete and an insert.
        "UPDATE parts SET region = 'b' WHERE region = 'a' AND id < 10",
        // Another key, and a key that is taken over from another row.
        "BEGIN; UPDATE parts SET id = id + 100 WHERE region = 'c'; UPDATE parts SET id = 102 WHERE id = 4; COMMIT",
        "CREATE TABLE parts_d PARTITION OF parts FOR VALUES IN ('d'); ALTER TABLE parts_d REPLICA IDENTITY DEFAULT",
        "INSERT INTO parts (id, region, body) VALUES (500, 'd', 'in a new partition')",
        // Of rows that go with a partition the WAL would not tell.
        "DELETE FROM parts WHERE id = 500",
        "ALTER TABLE parts DETACH PARTITION parts_d",
        "DELETE FROM parts WHERE id = 6",
        // Values out of line, which updates of other columns do not carry.
        "INSERT INTO large SELECT n, n, repeat(md5(n::text), 1000), ROW(NULL::text, repeat(md5(n::text), 500))::pair FROM generate_series(1, 20) AS n",
        "UPDATE large SET n = n + 1",
        "BEGIN; UPDATE large SET n = n + 1 WHERE id < 5; UPDATE large SET body = 'short' WHERE id = 3; UPDATE large SET n = 0 WHERE id = 3; COMMIT",
        "UPDATE large SET id = id + 1000 WHERE id > 15",
        "TRUNCATE parts",
        "BEGIN; INSERT INTO parts (id, region, body) VALUES (1, 'a', 'before'); TRUNCATE parts; INSERT INTO parts (id, region, body) VALUES (2, 'a', 'after'); COMMIT",
    ];
    for step in steps {
        sql(pg, step).await?;
        shape(&live, pg).await.context(step)?;
        shape(&board.client(step, "bob").await?, pg).await.with_context(|| format!("a snapshot after {step}"))?;
    }
    confirmed(&live, "UPDATE large SET n = 4711 WHERE id = 1").await?;
    confirmed(&live, "UPDATE parts SET body = 'by a client' WHERE id = 2").await?;
    confirmed(&live, "INSERT INTO parts (id, region, body) VALUES (3, 'c', 'by a client')").await?;
    shape(&live, pg).await
}

async fn shape(client: &Client, postgres: &mut PgConnection) -> Result<()> {
    const SHOWN: &str = "SELECT id || region || body AS t FROM parts UNION ALL SELECT id || '|' || n || '|' || body || of FROM large ORDER BY 1";
    let start = Instant::now();
    loop {
        let wanted: Vec<String> =
            sqlx::query_scalar(AssertSqlSafe(format!("SELECT t FROM ({SHOWN}) AS s ORDER BY t COLLATE \"C\"")))
                .fetch_all(&mut *postgres)
                .await?;
        let text = |row: &Vec<SqlValue>| match row.as_slice() {
            [SqlValue::Text(text)] => text.clone(),
            other => format!("{other:?}"),
        };
        let shown: Vec<String> = client.query(SHOWN, ()).await?.rows.iter().map(text).collect();
        if shown == wanted {
            return Ok(());
        }
        let short = |rows: &[String]| rows.iter().map(|row| row.chars().take(30).collect()).collect::<Vec<String>>();
        ensure!(start.elapsed() < PATIENCE, "shown {:?}, wanted {:?}", short(&shown), short(&wanted));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A rule that becomes tighter holds for running executors, though nothing has been refused that would make them look.
#[tokio::test(flavor = "multi_thread")]
async fn changed_write_rules_reach_running_executors() -> Result<()> {
    /// Within this time.
    const REACHED: Duration = Duration::from_secs(5);
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("millstream.toml");
    let write = |rule: &str| -> Result<()> {
        let text = format!(
            "[tables.notes]\nscope = {{ kind = \"global\" }}\nwritable = [\"id\", \"body\", \"size\"]\nwrite.insert = \"{rule}\"\nwrite.update = \"{rule}\"\n"
        );
        std::fs::write(file.with_extension("new"), text)?;
        Ok(std::fs::rename(file.with_extension("new"), &file)?)
    };
    write("new.size >= 0")?;
    let board = Board::with(|builder| builder.app_schema(SCHEMA).seed(SEED).config(&file)).await?;
    let outcome = async {
        let client = board.client("a", "alice").await?;
        let mut id = 1_000;
        let mut insert = async |size: i64| {
            id += 1;
            confirmed(&client, &format!("INSERT INTO notes (id, body, size) VALUES ({id}, 'x', {size})")).await
        };
        insert(1).await?;
        write("new.size >= 100")?;
        let start = Instant::now();
        while insert(1).await.is_ok() {
            ensure!(start.elapsed() < REACHED, "the old rule holds after {:?}", start.elapsed());
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        println!("a tighter rule held after {:.1?}", start.elapsed());
        insert(100).await?;
        // A file that cannot be used leaves the rules in force, and everybody at work.
        std::fs::write(&file, "[tables.notes")?;
        let start = Instant::now();
        while start.elapsed() < REACHED {
            insert(100).await.context("beside a file that cannot be used")?;
            ensure!(insert(99).await.is_err(), "the rule was lost");
        }
        write("new.size >= 1000")?;
        let start = Instant::now();
        while insert(100).await.is_ok() {
            ensure!(start.elapsed() < REACHED, "the old rule holds after {:?}", start.elapsed());
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        insert(1_000).await
    }
    .await;
    board.explain(outcome)
}
