//! A domain is what is below it, in stores, keys, merges and scopes; its own checks hold on the server. Numbers are what is declared.

use anyhow::{Context as _, Result, ensure};
use millstream_client::{Client, Error, Outcome, State, Write};
use millstream_tests::board::{Board, PATIENCE};

const SCHEMA: &str = "
CREATE TYPE mood AS ENUM ('happy', 'sad');
CREATE DOMAIN counted AS int CHECK (VALUE < 1000);
CREATE DOMAIN positive AS counted NOT NULL CHECK (VALUE > 0);
CREATE DOMAIN price AS numeric(10,2) DEFAULT 0.50;
CREATE DOMAIN code AS varchar(5);
CREATE DOMAIN flag AS boolean DEFAULT false;
CREATE DOMAIN moment AS timestamptz;
CREATE DOMAIN moods AS mood CONSTRAINT not_sad CHECK (VALUE <> 'sad');
CREATE DOMAIN numbers AS int[] CHECK (cardinality(VALUE) < 3);
CREATE DOMAIN handle AS uuid;
CREATE DOMAIN person AS text CONSTRAINT known CHECK (VALUE IN ('alice', 'bob'));
CREATE TABLE goods (
    id handle PRIMARY KEY, owner person NOT NULL, n counted, size positive, cost price, code code, done flag NOT NULL, at moment, mood moods,
    list numbers, weight numeric, total numeric(12,2)
);
ALTER TABLE goods REPLICA IDENTITY FULL;
CREATE TABLE parts (id int PRIMARY KEY, of handle NOT NULL REFERENCES goods ON DELETE CASCADE);
CREATE TABLE boxes (id int PRIMARY KEY, width positive DEFAULT 1, height positive, lid counted);
";
const CONFIG: &str = r#"
[tables.goods]
scope = { kind = "user", column = "owner" }
writable = ["id", "owner", "n", "size", "cost", "code", "done", "at", "mood", "list", "weight", "total"]
merge = { n = "add", at = "max" }
numeric = { cost = "integer", weight = "real", total = "text" }
write = { insert = "new.owner = auth.user_id", update = "true", delete = "true" }
[tables.parts]
scope = { kind = "global" }
writable = ["id", "of"]
write = { insert = "true", delete = "true" }
[tables.boxes]
scope = { kind = "global" }
writable = ["id", "width", "height", "lid"]
write = { insert = "true", update = "true" }
"#;
const A: &str = "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11";
const ALL: &str = "SELECT id, n, typeof(n), size, cost, typeof(cost), code, done, typeof(done), at, mood, list, weight, typeof(weight), total FROM goods";

async fn confirmed<T>(write: Write<T>) -> Result<Result<Outcome, Error>> {
    Ok(tokio::time::timeout(PATIENCE, write.confirmed()).await?)
}

async fn shows(client: &Client, sql: &str, expected: &str) -> Result<()> {
    let start = std::time::Instant::now();
    loop {
        let rows = client.query(sql, ()).await?.rows;
        let line = |row: &Vec<millstream_client::SqlValue>| row.iter().map(text).collect::<Vec<_>>().join(" ");
        let found = rows.iter().map(line).collect::<Vec<_>>().join("; ");
        if found == expected {
            return Ok(());
        }
        ensure!(start.elapsed() < PATIENCE, "{found}, not {expected}");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

fn text(value: &millstream_client::SqlValue) -> String {
    use millstream_client::SqlValue::{Blob, Integer, Null, Real, Text};
    match value {
        Null => "-".to_owned(),
        Integer(number) => number.to_string(),
        Real(number) => number.to_string(),
        Text(text) => text.clone(),
        Blob(bytes) => format!("{bytes:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_domain_is_what_is_below_it() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("millstream.toml");
    std::fs::write(&file, CONFIG)?;
    let board = Board::with(|builder| builder.app_schema(SCHEMA).config(&file)).await?;
    let outcome = run(&board).await;
    board.explain(outcome)
}

async fn run(board: &Board) -> Result<()> {
    let mut postgres = board.postgres().await?;
    let (alice, other) = (board.client("alice", "alice").await?, board.client("other", "alice").await?);
    // No value of the domain of the column that names users, so nothing for them; and no reason for the edge to fail.
    board.client("carol", "carol").await?;

    let refused =
        alice.execute(&format!("INSERT INTO goods (id, owner) VALUES ('{}', 'alice')", A.to_uppercase()), ()).await;
    let refused = refused.err().context("a key in another spelling is taken")?.to_string();
    ensure!(refused.contains(A), "{refused}");

    let insert = format!(
        "INSERT INTO goods (id, owner, n, size, code, at, mood, list, weight, total) \
         VALUES ('{A}', 'alice', 10, 7, 'abcde', '2026-01-02T03:04Z', 'happy', '{{1,2}}', 0.1 + 0.2, 9.5)"
    );
    let write = alice.execute(&insert, ()).await?;
    let row = format!(
        "{A} 10 integer 7 50 integer abcde 0 integer 2026-01-02 03:04:00+00 happy {{1,2}} 0.30000000000000004 real 9.50"
    );
    shows(&alice, ALL, &row).await.context("at once")?;
    confirmed(write).await??;
    shows(&alice, ALL, &row).await.context("after the confirmation")?;
    shows(&other, ALL, &row).await.context("elsewhere")?;
    shows(&board.client("new", "alice").await?, ALL, &row).await.context("in a snapshot")?;

    // What the domain refuses, by the name of its constraint; what is too long is not cut.
    for (set, code, says) in [
        ("n = 1000", "business_rule", "counted_check"),
        ("size = -1", "business_rule", "positive_check"),
        ("size = 1000", "business_rule", "counted_check"),
        ("size = NULL", "business_rule", "column \"size\" must not be null"),
        ("size = NULL, code = NULL, at = NULL", "business_rule", "column \"size\" must not be null"),
        ("mood = 'sad'", "business_rule", "not_sad"),
        ("mood = 'odd'", "invalid_value", "mood"),
        ("list = '{1,2,3}'", "business_rule", "numbers_check"),
        ("code = 'abcdef'", "invalid_value", "too long"),
        ("at = 'never'", "invalid_value", "moment"),
    ] {
        let write = alice.execute(&format!("UPDATE goods SET {set}"), ()).await?;
        let tx = write.tx().context("nothing is queued")?;
        match confirmed(write).await? {
            Err(Error::Rejected { code: found, rule, message, .. }) => {
                let told = format!("{} {message}", rule.unwrap_or_default());
                ensure!(found.as_str() == code && told.contains(says), "{set}: {found} {told}");
            }
            other => anyhow::bail!("{set}: {other:?}"),
        }
        alice.discard(tx).await?;
    }
    // One that is null since it was left out, also where another column of the domain has a default.
    for (insert, column) in [
        ("INSERT INTO boxes (id) VALUES (1)", "height"),
        ("INSERT INTO boxes (id, width, height) VALUES (1, NULL, 2)", "width"),
        ("INSERT INTO boxes (id, width, lid) VALUES (1, 2, NULL)", "height"),
    ] {
        let write = alice.execute(insert, ()).await?;
        let tx = write.tx().context("nothing is queued")?;
        let refused = confirmed(write).await?.err().context(insert)?.to_string();
        ensure!(refused.contains(&format!("column \"{column}\" must not be null")), "{insert}: {refused}");
        alice.discard(tx).await?;
    }
    // Before it is queued, where that is known.
    for set in ["cost = 12.5", "cost = 10000000000", "cost = '12.50'"] {
        let refused = alice.execute(&format!("UPDATE goods SET {set}"), ()).await.err().context(set)?;
        ensure!(refused.to_string().contains("units of 0.01"), "{set}: {refused}");
    }

    // Two count offline, and units are numbers to SQLite.
    for client in [&alice, &other] {
        client.pause();
        client.status().wait_for(|status| status.state == State::Offline).await?;
    }
    let count = "UPDATE goods SET n = n + 1, cost = cost + 1205, at = '2026-01-0' || ?1 || 'T00:00Z' WHERE cost BETWEEN 9 AND 100";
    let writes = [alice.execute(count, ("5",)).await?, other.execute(count, ("4",)).await?];
    alice.resume();
    other.resume();
    for write in writes {
        confirmed(write).await??;
    }
    let row = format!(
        "{A} 12 integer 7 1255 integer abcde 0 integer 2026-01-05 00:00:00+00 happy {{1,2}} 0.30000000000000004 real 9.50"
    );
    shows(&alice, ALL, &row).await?;
    shows(&other, ALL, &row).await?;
    let sum: String =
        sqlx::query_scalar("SELECT n || ' ' || cost || ' ' || weight FROM goods").fetch_one(&mut postgres).await?;
    ensure!(sum == "12 12.55 0.30000000000000004", "{sum}");

    // By SQL, to the stream.
    sqlx::query("UPDATE goods SET cost = -0.07, weight = 1e3, done = true, size = 8").execute(&mut postgres).await?;
    shows(&other, "SELECT size, cost, weight, done FROM goods", "8 -7 1000 1").await?;
    // A child by its parent's key, and what it takes along.
    confirmed(other.execute(&format!("INSERT INTO parts VALUES (1, '{A}')"), ()).await?).await??;
    confirmed(other.execute("DELETE FROM goods", ()).await?).await??;
    shows(&alice, "SELECT (SELECT count(*) FROM goods) || (SELECT count(*) FROM parts)", "00").await
}
