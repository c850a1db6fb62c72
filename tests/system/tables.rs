//! Tables as they are found in databases: keys that change hands, partitions with replica identities of their own, values that
//! are rewritten without a row in the write-ahead log, children by inheritance. Clients show what Postgres has.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use millstream_client::{Client, Code, SqlValue};
use millstream_stack::{Builder, Service};
use millstream_tests::board::{Board, PATIENCE};
use sqlx::{AssertSqlSafe, PgConnection};

pub(super) struct Scene {
    pub(super) board: Board,
    pub(super) clients: Vec<(&'static str, Client)>,
    pub(super) postgres: PgConnection,
    pub(super) folder: tempfile::TempDir,
}

pub(super) const ORGS: &str =
    "CREATE TABLE orgs (org text NOT NULL, user_id text NOT NULL, PRIMARY KEY (org, user_id));
    INSERT INTO orgs VALUES ('acme', 'alice'), ('bolt', 'bob'), ('acme', 'eve'), ('bolt', 'eve');";

/// Clients of alice, who is of acme, of bob, who is of bolt, and of eve, who is of both.
pub(super) async fn scene(schema: &str, config: &str) -> Result<Scene> {
    scene_with(schema, config, |builder| builder).await
}

/// The same, with changes to how everything is started.
pub(super) async fn scene_with(schema: &str, config: &str, change: impl FnOnce(Builder) -> Builder) -> Result<Scene> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("millstream.toml");
    let scopes = "[scopes.org]\nmembership = { table = \"orgs\", user = \"user_id\", scope = \"org\" }\n\
        [tables.orgs]\nscope = { kind = \"org\", column = \"org\" }\n";
    std::fs::write(&file, format!("{scopes}{config}"))?;
    let board = Board::with(|builder| change(builder.app_schema(format!("{ORGS}{schema}")).config(&file))).await?;
    let mut clients = Vec::new();
    for user in ["alice", "bob", "eve"] {
        clients.push((user, board.client(user, user).await?));
    }
    let postgres = board.postgres().await?;
    Ok(Scene { board, clients, postgres, folder })
}

fn text(value: &SqlValue) -> String {
    match value {
        SqlValue::Null => "∅".to_owned(),
        SqlValue::Integer(n) => n.to_string(),
        SqlValue::Text(text) => text.clone(),
        other => format!("{other:?}"),
    }
}

impl Scene {
    pub(super) async fn sql(&mut self, sql: &str) -> Result<()> {
        sqlx::raw_sql(AssertSqlSafe(sql.to_owned()))
            .execute(&mut self.postgres)
            .await
            .with_context(|| sql.to_owned())?;
        Ok(())
    }

    /// Waits until every client shows those rows of a table that its user may read, by `org` where the table has it.
    pub(super) async fn equal(&mut self, table: &str, columns: &str, by_org: bool) -> Result<Duration> {
        self.equal_as(table, table, columns, by_org).await
    }

    /// The same, of a table that clients have under another name.
    pub(super) async fn equal_as(&mut self, table: &str, local: &str, columns: &str, by_org: bool) -> Result<Duration> {
        let start = Instant::now();
        let fields: Vec<String> = columns.split(", ").map(|name| format!("coalesce({name}::text, '∅')")).collect();
        for (user, client) in &self.clients {
            let filter = match by_org {
                true => format!("WHERE org IN (SELECT org FROM orgs WHERE user_id = '{user}')"),
                false => String::new(),
            };
            let sql = format!("SELECT concat_ws('|', {}) FROM {table} {filter}", fields.join(", "));
            loop {
                let mut wanted: Vec<String> =
                    sqlx::query_scalar(AssertSqlSafe(sql.clone())).fetch_all(&mut self.postgres).await?;
                let shown = client.query(&format!("SELECT {columns} FROM {local}"), ()).await;
                let mut shown: Vec<String> = match shown {
                    Ok(shown) => {
                        shown.rows.iter().map(|row| row.iter().map(text).collect::<Vec<_>>().join("|")).collect()
                    }
                    Err(error) => vec![error.to_string()],
                };
                wanted.sort();
                shown.sort();
                if wanted == shown {
                    break;
                }
                ensure!(start.elapsed() < PATIENCE, "{table} of {user}: {shown:?} instead of {wanted:?}");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        Ok(start.elapsed())
    }

    /// Waits until everything that was written before has come, and then some.
    pub(super) async fn settle(&mut self) -> Result<()> {
        self.sql("INSERT INTO orgs VALUES ('acme', 'settled'), ('bolt', 'settled')").await?;
        self.equal("orgs", "org, user_id", true).await?;
        self.sql("DELETE FROM orgs WHERE user_id = 'settled'").await?;
        self.equal("orgs", "org, user_id", true).await?;
        Ok(())
    }

    pub(super) fn log(&self) -> Result<String> {
        Ok(std::fs::read_to_string(self.board.stack.log_path(Service::Replication))?)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_that_change_hands() -> Result<()> {
    let schema = "
        CREATE TABLE items (list int, pos int, name text, PRIMARY KEY (list, pos) DEFERRABLE INITIALLY DEFERRED);
        ALTER TABLE items REPLICA IDENTITY FULL;
        CREATE TABLE seats (seat int PRIMARY KEY DEFERRABLE, org text NOT NULL, name text NOT NULL);
        CREATE UNIQUE INDEX seats_identity ON seats (seat, org, name);
        ALTER TABLE seats REPLICA IDENTITY USING INDEX seats_identity;
        INSERT INTO items SELECT 1, n, 'item ' || n FROM generate_series(1, 6) n;
        INSERT INTO seats SELECT n, CASE n % 2 WHEN 0 THEN 'acme' ELSE 'bolt' END, 'seat ' || n FROM generate_series(1, 6) n;";
    let config =
        "[tables.items]\nscope = { kind = \"global\" }\n[tables.seats]\nscope = { kind = \"org\", column = \"org\" }\n";
    let mut scene = scene(schema, config).await?;
    let outcome = async {
        for sql in [
            "UPDATE items SET pos = pos + 1 WHERE pos >= 3",
            "UPDATE items SET pos = pos - 1 WHERE pos > 3",
            "UPDATE items SET pos = 7 - pos",
            "UPDATE items SET pos = CASE pos WHEN 1 THEN 6 ELSE pos - 1 END",
            "BEGIN; SET CONSTRAINTS ALL DEFERRED; INSERT INTO items VALUES (1, 2, 'squeezed in'); UPDATE items SET pos = pos + 1 WHERE pos >= 2 AND name <> 'squeezed in'; COMMIT",
            "BEGIN; UPDATE items SET name = name || '!'; UPDATE items SET pos = 1 WHERE pos = 2; DELETE FROM items WHERE pos = 1 AND name LIKE 'item%'; INSERT INTO items VALUES (1, 2, 'x'), (1, 1, 'y'); DELETE FROM items WHERE name = 'x'; UPDATE items SET pos = 2 WHERE name = 'y'; COMMIT",
            "UPDATE seats SET seat = seat + 1",
            "UPDATE seats SET seat = 9 - seat",
            "BEGIN; SET CONSTRAINTS ALL DEFERRED; UPDATE seats SET org = CASE org WHEN 'acme' THEN 'bolt' ELSE 'acme' END, seat = seat + 1; UPDATE seats SET seat = seat - 1 WHERE org = 'acme'; UPDATE seats SET seat = seat + 1 WHERE org = 'acme'; COMMIT",
        ] {
            // Some of them Postgres itself refuses: then nothing changes.
            if let Err(error) = scene.sql(sql).await {
                println!("{error:#}");
                scene.sql("ROLLBACK").await?;
            }
            scene.settle().await?;
            scene.equal("items", "list, pos, name", false).await.with_context(|| sql.to_owned())?;
            scene.equal("seats", "seat, org, name", true).await.with_context(|| sql.to_owned())?;
        }
        Ok(())
    }
    .await;
    scene.board.explain(outcome)
}

const PARTITIONED: &str =
    "(id int, day int NOT NULL, org text NOT NULL, v text, big text, PRIMARY KEY (id, day)) PARTITION BY RANGE (day)";

#[tokio::test(flavor = "multi_thread")]
async fn partitions_of_other_identities_than_their_root() -> Result<()> {
    let schema = format!(
        "CREATE TABLE by_index {PARTITIONED};
        CREATE TABLE by_index_1 PARTITION OF by_index FOR VALUES FROM (0) TO (100);
        CREATE UNIQUE INDEX by_index_1_identity ON by_index_1 (id, day, org);
        ALTER TABLE by_index_1 REPLICA IDENTITY USING INDEX by_index_1_identity;
        CREATE TABLE whole {PARTITIONED};
        CREATE TABLE whole_1 PARTITION OF whole FOR VALUES FROM (0) TO (100);
        ALTER TABLE whole REPLICA IDENTITY FULL; ALTER TABLE whole_1 REPLICA IDENTITY FULL;
        ALTER TABLE by_index ALTER big SET STORAGE EXTERNAL; ALTER TABLE whole ALTER big SET STORAGE EXTERNAL;
        CREATE TABLE leaves {PARTITIONED};
        CREATE TABLE leaves_1 PARTITION OF leaves FOR VALUES FROM (0) TO (100);
        ALTER TABLE leaves_1 REPLICA IDENTITY FULL;
        INSERT INTO by_index SELECT n, n, 'acme', 'v' || n, repeat('x', 9000) FROM generate_series(1, 6) n;
        INSERT INTO leaves SELECT * FROM by_index; INSERT INTO whole SELECT * FROM by_index;"
    );
    let tables = ["by_index", "whole", "leaves"];
    let config: String = tables
        .iter()
        .map(|table| format!("[tables.{table}]\nscope = {{ kind = \"org\", column = \"org\" }}\n"))
        .collect();
    let mut scene = scene(&schema, &config).await?;
    let outcome = async {
        for table in tables {
            scene.sql(&format!("DELETE FROM {table} WHERE id = 1; UPDATE {table} SET org = 'bolt' WHERE id = 2; UPDATE {table} SET v = 'new' WHERE id = 3; UPDATE {table} SET id = 40 WHERE id = 4")).await?;
        }
        for table in tables {
            scene.equal(table, "id, day, org, v, big", true).await?;
        }
        ensure!(!scene.log()?.contains("sent to clients again"), "{}", scene.log()?);

        // A partition that somebody makes, with another identity than the others, under writes.
        for table in tables {
            scene.sql(&format!(
                "CREATE TABLE {table}_2 PARTITION OF {table} FOR VALUES FROM (100) TO (200);
                INSERT INTO {table} SELECT n, 100, 'acme', 'b' || n, repeat('y', 9000) FROM generate_series(1, 40) n"
            )).await?;
            scene.equal(table, "id, day, org, v, big", true).await?;
        }
        // At once; when it is known and no row has been sent again for it; a moment after that.
        for round in 1..=3 {
            for table in tables {
                for sql in [
                    "DELETE FROM @ WHERE id = # AND day = 100",
                    "UPDATE @ SET org = 'bolt' WHERE id = # + 1 AND day = 100",
                    "UPDATE @ SET v = 'partly' WHERE id = # + 2 AND day = 100",
                    "UPDATE @ SET org = 'bolt', id = # + 100 WHERE id = # + 3 AND day = 100",
                ] {
                    scene.sql(&sql.replace('@', table).replace('#', &(10 * round).to_string())).await?;
                }
            }
            for table in tables {
                let time = scene.equal(table, "id, day, org, v, big", true).await?;
                println!("{table}, round {round}: after {time:.1?}");
            }
            tokio::time::sleep(Duration::from_secs(if round == 1 { 5 } else { 0 })).await;
        }
        let log = scene.log()?;
        ensure!(log.contains("sent to clients again") && log.contains("millstream check"), "{log}");
        Ok(())
    }
    .await;
    scene.board.explain(outcome)
}

#[tokio::test(flavor = "multi_thread")]
async fn values_that_change_without_a_row_in_the_log() -> Result<()> {
    let schema = "
        CREATE TYPE mood AS ENUM ('meh', 'ok', 'good');
        CREATE TYPE pair AS (a int, b text);
        CREATE TABLE goods (id int PRIMARY KEY, price numeric(10,2), m mood, moods mood[], note text, p pair);
        INSERT INTO goods VALUES (1, 1.50, 'meh', '{meh,ok}', 'a', '(1,x)'), (2, 2.00, 'ok', '{}', 'b', '(2,y)');
        CREATE TABLE parts (id int, day int, v text, PRIMARY KEY (id, day)) PARTITION BY RANGE (day);
        CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM (0) TO (100);
        CREATE TABLE parts_2 PARTITION OF parts FOR VALUES FROM (100) TO (200);
        CREATE TABLE parts_3 (id int, day int, v text, PRIMARY KEY (id, day));
        INSERT INTO parts VALUES (1, 1, 'one'), (2, 101, 'two'); INSERT INTO parts_3 VALUES (3, 201, 'three');";
    let config = "[tables.goods]\nscope = { kind = \"global\" }\n[tables.parts]\nscope = { kind = \"global\" }\n";
    let mut scene = scene(schema, config).await?;
    let goods = "id, price, m, moods, note, p";
    let outcome = async {
        scene.equal("goods", goods, false).await?;
        // Replication keeps what it has found at its start.
        tokio::time::sleep(Duration::from_secs(3)).await;
        for sql in [
            "ALTER TABLE goods ALTER COLUMN price TYPE numeric(10,2) USING price * 100",
            "BEGIN; ALTER TYPE mood RENAME TO mood_old; CREATE TYPE mood AS ENUM ('fine', 'good'); ALTER TABLE goods ALTER m TYPE mood USING (CASE m::text WHEN 'good' THEN 'good' ELSE 'fine' END)::mood; ALTER TABLE goods ALTER moods TYPE mood[] USING '{good}'; DROP TYPE mood_old; COMMIT",
            "ALTER TYPE mood RENAME VALUE 'fine' TO 'so so'",
            "BEGIN; ALTER TABLE goods DROP COLUMN p; ALTER TABLE goods DROP COLUMN note; ALTER TABLE goods ADD COLUMN note text DEFAULT 'again'; ALTER TABLE goods ADD COLUMN p pair; COMMIT",
            "UPDATE goods SET p = '(3,z)'",
            "ALTER TYPE pair DROP ATTRIBUTE a",
            "TRUNCATE parts_2",
            "ALTER TABLE parts ATTACH PARTITION parts_3 FOR VALUES FROM (200) TO (300)",
            "ALTER TABLE parts DETACH PARTITION parts_1",
            "DROP TABLE parts_3",
            "BEGIN; CREATE TABLE parts_5 (LIKE parts INCLUDING ALL); INSERT INTO parts_5 VALUES (5, 500, 'five'); ALTER TABLE parts ATTACH PARTITION parts_5 FOR VALUES FROM (500) TO (600); COMMIT",
        ] {
            scene.sql(sql).await?;
            let time = scene.equal("goods", goods, false).await.with_context(|| sql.to_owned())?
                + scene.equal("parts", "id, day, v", false).await.with_context(|| sql.to_owned())?;
            println!("{time:.1?}: {sql}");
        }
        // What changes no value costs nothing, but for the first rewriting behind ADD COLUMN … DEFAULT: that cannot be told apart.
        scene.sql("VACUUM FULL goods").await?;
        tokio::time::sleep(Duration::from_secs(5)).await;
        let told = |log: String| log.matches("they are sent again").count();
        let before = told(scene.log()?);
        scene.sql("ALTER TYPE mood ADD VALUE 'new'; ALTER TABLE goods ALTER note SET NOT NULL").await?;
        tokio::time::sleep(Duration::from_secs(3)).await;
        scene.sql("VACUUM FULL goods").await?;
        // As a job makes it, ahead of its rows.
        scene.sql("CREATE TABLE parts_4 PARTITION OF parts FOR VALUES FROM (400) TO (500)").await?;
        tokio::time::sleep(Duration::from_secs(3)).await;
        scene.sql("INSERT INTO parts VALUES (4, 400, 'four')").await?;
        tokio::time::sleep(Duration::from_secs(5)).await;
        scene.equal("parts", "id, day, v", false).await?;
        ensure!(told(scene.log()?) == before, "{}", scene.log()?);
        Ok(())
    }
    .await;
    scene.board.explain(outcome)
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_around_the_limit() -> Result<()> {
    let schema = "
        CREATE TABLE docs (id int PRIMARY KEY, a text, b text);
        ALTER TABLE docs ALTER a SET STORAGE EXTERNAL, ALTER b SET STORAGE EXTERNAL;
        INSERT INTO docs VALUES (1, 'small', repeat('b', 3000000)), (2, repeat('a', 3000000), repeat('b', 3000000)), (3, 'x', repeat('c', 100000));";
    let mut scene = scene(schema, "[tables.docs]\nscope = { kind = \"global\" }\n").await?;
    let outcome = async {
        let shows = async |scene: &Scene, wanted: &str| -> Result<()> {
            let start = Instant::now();
            let (_, client) = &scene.clients[0];
            loop {
                let rows = client.query("SELECT id || ' ' || length(a) || '+' || length(b) FROM docs ORDER BY id", ()).await?;
                let shown: Vec<String> = rows.rows.iter().map(|row| text(&row[0])).collect();
                if shown.join(", ") == wanted {
                    return Ok(());
                }
                ensure!(start.elapsed() < PATIENCE, "{shown:?} instead of {wanted}");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        shows(&scene, "1 5+3000000, 3 1+100000").await?;
        scene.sql("UPDATE docs SET a = repeat('a', 3000000) WHERE id = 1; UPDATE docs SET b = 'small' WHERE id = 2; UPDATE docs SET a = 'yy' WHERE id = 3").await?;
        shows(&scene, "2 3000000+5, 3 2+100000").await?;
        scene.sql("UPDATE docs SET a = 'back' WHERE id = 1; UPDATE docs SET b = repeat('b', 3000000) WHERE id = 2; UPDATE docs SET a = 'zzz' WHERE id = 3").await?;
        shows(&scene, "1 4+3000000, 3 3+100000").await
    }
    .await;
    scene.board.explain(outcome)
}

#[tokio::test(flavor = "multi_thread")]
async fn hidden_columns_never_leave_the_database() -> Result<()> {
    let schema = "
        CREATE TABLE users (id int PRIMARY KEY, name text, password_digest text, level int NOT NULL DEFAULT 1);
        ALTER TABLE users REPLICA IDENTITY FULL;
        INSERT INTO users VALUES (1, 'ann', 'secret-1', 5), (2, 'ben', 'secret-2', 1);";
    let config = "[tables.users]\nscope = { kind = \"global\" }\nhidden = [\"password_digest\", \"level\"]\nwritable = [\"name\"]\n\
        write.update = \"old.level > 3\"\n";
    let mut scene = scene(schema, config).await?;
    let outcome = async {
        scene.equal("users", "id, name", false).await?;
        scene.sql("INSERT INTO users VALUES (3, 'cem', 'secret-3'); UPDATE users SET password_digest = 'secret-4', name = 'ann b' WHERE id = 1; UPDATE users SET level = 4, password_digest = 'secret-5' WHERE id = 2; DELETE FROM users WHERE id = 3").await?;
        scene.equal("users", "id, name", false).await?;
        let (_, alice) = &scene.clients[0];
        let columns = alice.query("SELECT name FROM pragma_table_info('users') ORDER BY cid", ()).await;
        println!("{columns:?}");
        ensure!(alice.query("SELECT password_digest FROM users", ()).await.is_err(), "a hidden column is at the client");
        // A predicate may look at it.
        let write = alice.execute("UPDATE users SET name = 'ann c' WHERE id = 1", ()).await?;
        tokio::time::timeout(PATIENCE, write.confirmed()).await??;
        scene.equal("users", "id, name", false).await?;
        for name in ["alice", "bob", "eve"] {
            let store = scene.board.store(name);
            for suffix in ["", "-wal"] {
                let bytes = std::fs::read(format!("{}{suffix}", store.display())).unwrap_or_default();
                ensure!(!bytes.windows(7).any(|found| found == b"secret-"), "a secret is in the store of {name}");
            }
        }
        Ok(())
    }
    .await;
    scene.board.explain(outcome)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_of_another_database_is_left_alone() -> Result<()> {
    let mut scene = scene("", "").await?;
    let outcome = async {
        // Another installation in this cluster, with the slot's name.
        let slot = "SELECT slot_name FROM pg_replication_slots";
        let slot: String = sqlx::query_scalar(slot).fetch_one(&mut scene.postgres).await?;
        scene.sql("CREATE DATABASE staging").await?;
        let url = scene.board.stack.postgres_url();
        let (server, _) = url.rsplit_once('/').context("no database")?;
        let mut staging = <PgConnection as sqlx::Connection>::connect(&format!("{server}/staging")).await?;
        let found = millstream_provision::check::slot(&mut staging, &slot).await?;
        let found = found.context("check says nothing")?.to_string();
        ensure!(found.contains("belongs to database") && found.contains("MILLSTREAM_SLOT"), "{found}");
        // Ours goes; theirs has the name when replication starts again.
        scene.board.stack.kill(Service::Replication);
        let start = Instant::now();
        while let Err(error) = scene.sql(&format!("SELECT pg_drop_replication_slot('{slot}')")).await {
            ensure!(start.elapsed() < PATIENCE, "{error:#}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let make = "SELECT pg_create_logical_replication_slot($1, 'pgoutput')::text";
        sqlx::query(make).bind(&slot).execute(&mut staging).await?;
        let _not_ready =
            tokio::time::timeout(Duration::from_secs(5), scene.board.stack.start_service(Service::Replication)).await;
        let start = Instant::now();
        while !scene.log()?.contains("belongs to database staging: set MILLSTREAM_SLOT") {
            ensure!(start.elapsed() < PATIENCE, "{}", scene.log()?);
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let theirs = "SELECT database::text FROM pg_replication_slots WHERE slot_name = $1";
        let theirs: Option<String> = sqlx::query_scalar(theirs).bind(&slot).fetch_optional(&mut staging).await?;
        ensure!(theirs.as_deref() == Some("staging"), "{theirs:?}");
        Ok(())
    }
    .await;
    scene.board.explain(outcome)
}

#[tokio::test(flavor = "multi_thread")]
async fn children_by_inheritance_are_no_rows_of_their_parent() -> Result<()> {
    let mut scene = scene(
        "CREATE TABLE notes (id int PRIMARY KEY, v text); INSERT INTO notes VALUES (1, 'own');",
        "[tables.notes]\nscope = { kind = \"global\" }\nwritable = [\"v\"]\nwrite.update = \"true\"\nwrite.delete = \"true\"\n\
         delete_missing = \"accept\"\n",
    )
    .await?;
    let outcome = async {
        scene
            .sql("CREATE TABLE notes_2025 () INHERITS (notes); INSERT INTO notes_2025 VALUES (2, 'of the child')")
            .await?;
        // The application's own statements work, and clients have what the log tells of.
        scene.sql("UPDATE notes SET v = v || '!'; DELETE FROM notes_2025 WHERE id = 3").await?;
        scene.sql("INSERT INTO notes VALUES (4, 'own, too'); DELETE FROM notes_2025").await?;
        scene.equal("notes", "id, v", false).await?;
        scene.sql("INSERT INTO notes_2025 VALUES (2, 'of the child')").await?;
        let late = scene.board.client("late", "alice").await?;
        let rows = late.query("SELECT id FROM notes ORDER BY id", ()).await?.rows;
        ensure!(rows.len() == 2, "{rows:?}");
        // Nor do clients write them: one with the key of a row that they have, and one that was such a row a moment ago.
        scene.sql("INSERT INTO notes_2025 VALUES (1, 'of the child')").await?;
        late.execute("UPDATE notes SET v = 'edited' WHERE id = 1", ()).await?.confirmed().await?;
        late.pause();
        late.execute("UPDATE notes SET v = 'edited' WHERE id = 4", ()).await?;
        scene.sql("WITH gone AS (DELETE FROM ONLY notes WHERE id = 4 RETURNING *) INSERT INTO notes_2025 SELECT * FROM gone").await?;
        late.resume();
        let mut status = late.status();
        tokio::time::timeout(PATIENCE, status.wait_for(|status| status.failed == 1)).await??;
        let failed = late.failed().await?;
        ensure!(failed[0].code == Some(Code::EntityMissing), "{failed:?}");
        late.execute("DELETE FROM notes WHERE id = 1", ()).await?.confirmed().await?;
        let of_child: Vec<String> = sqlx::query_scalar("SELECT id || ' ' || v FROM notes_2025 ORDER BY id")
            .fetch_all(&mut scene.postgres)
            .await?;
        ensure!(of_child == ["1 of the child", "2 of the child", "4 own, too"], "{of_child:?}");
        let start = Instant::now();
        while !scene.log()?.contains("notes_2025 inherits from it") {
            ensure!(start.elapsed() < PATIENCE, "{}", scene.log()?);
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Ok(())
    }
    .await;
    scene.board.explain(outcome)
}
