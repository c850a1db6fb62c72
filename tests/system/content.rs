//! What no message can carry does not stop what others wait for: rows of any size, other tools' messages, origin records,
//! brokers that take little, rows that Postgres itself cannot write. Replication says what it left out, and heals by itself.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use millstream_client::{Client, SqlValue};
use millstream_stack::{Builder, Service, healthcheck};
use millstream_tests::board::{Board, PATIENCE};
use sqlx::{AssertSqlSafe, PgConnection};

/// `blobs` sends old rows by their key, `full` as a whole, `moving` by key and scope.
const SCHEMA: &str = "
CREATE TABLE blobs (id int PRIMARY KEY, note text NOT NULL DEFAULT '', a text, b text, raw bytea);
CREATE TYPE mood AS ENUM ('fine', 'gone');
CREATE TABLE documents (id int PRIMARY KEY, note text NOT NULL DEFAULT '', document jsonb, mood mood NOT NULL DEFAULT 'fine');
CREATE TABLE full_rows (id int PRIMARY KEY, note text NOT NULL DEFAULT '', a text, b text, raw bytea);
ALTER TABLE full_rows REPLICA IDENTITY FULL;
CREATE TABLE moving (id int PRIMARY KEY, scope text NOT NULL, a text);
CREATE UNIQUE INDEX moving_identity ON moving (id, scope);
ALTER TABLE moving REPLICA IDENTITY USING INDEX moving_identity;
CREATE TABLE unseen (id int, owner text, raw bytea, PRIMARY KEY (id, owner));
CREATE TABLE canary (id int PRIMARY KEY);
";
const CONFIG: &str = r#"
[tables.blobs]
scope = { kind = "global" }
[tables.documents]
scope = { kind = "global" }
[tables.full_rows]
scope = { kind = "global" }
[tables.moving]
scope = { kind = "global" }
[tables.unseen]
scope = { kind = "user", column = "owner" }
[tables.canary]
scope = { kind = "global" }
writable = ["id"]
write.insert = "true"
"#;
/// Replication may need this much more memory, whatever passes: `MAX_WHOLE_BYTES` and what is in the queues.
const MORE_KIB: u64 = 128 * 1024;
/// Neighbours get their rows within this time after content that is passed over, on a busy machine.
const SOON: Duration = Duration::from_secs(10);

struct Scene {
    board: Board,
    client: Client,
    postgres: PgConnection,
    canaries: i64,
    _folder: tempfile::TempDir,
}

async fn scene(change: impl FnOnce(Builder) -> Builder) -> Result<Scene> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("millstream.toml");
    std::fs::write(&file, CONFIG)?;
    let board = Board::with(|builder| change(builder.app_schema(SCHEMA).config(&file))).await?;
    let client = board.client("c", "alice").await?;
    let postgres = board.postgres().await?;
    Ok(Scene { board, client, postgres, canaries: 0, _folder: folder })
}

impl Scene {
    async fn sql(&mut self, sql: &str) -> Result<()> {
        sqlx::raw_sql(AssertSqlSafe(sql.to_owned()))
            .execute(&mut self.postgres)
            .await
            .with_context(|| sql.chars().take(200).collect::<String>())?;
        Ok(())
    }

    /// A row of a neighbour arrives; gives how long it took.
    async fn canary(&mut self) -> Result<Duration> {
        self.canaries += 1;
        let start = Instant::now();
        self.sql(&format!("INSERT INTO canary VALUES ({})", self.canaries)).await?;
        let wanted = self.canaries;
        self.shows(&format!("SELECT id FROM canary WHERE id = {wanted}"), 1).await.context("the canary")?;
        Ok(start.elapsed())
    }

    /// Waits until a query of the client has so many rows.
    async fn shows(&self, query: &str, rows: usize) -> Result<()> {
        let start = Instant::now();
        loop {
            let found = self.client.query(query, ()).await?.rows.len();
            if found == rows {
                return Ok(());
            }
            // Postgres itself may fail three times at a row, by all the memory that it takes, before it is passed over.
            ensure!(start.elapsed() < 2 * PATIENCE, "{found} rows instead of {rows}: {query}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Ids and notes that the client shows of a table.
    async fn rows(&self, table: &str) -> Result<Vec<String>> {
        let found = self.client.query(&format!("SELECT id || ' ' || note FROM {table} ORDER BY id"), ()).await?;
        let text = |row: &Vec<SqlValue>| match &row[0] {
            SqlValue::Text(text) => text.clone(),
            other => format!("{other:?}"),
        };
        Ok(found.rows.iter().map(text).collect())
    }

    fn replication_peak(&mut self) -> Result<u64> {
        let pid = self.board.stack.pid(Service::Replication).context("replication runs")?;
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
        Ok(line.trim().trim_end_matches(" kB").parse()?)
    }

    fn log(&self) -> Result<String> {
        Ok(std::fs::read_to_string(self.board.stack.log_path(Service::Replication))?)
    }

    async fn health(&self) -> Result<String> {
        let url = self.board.stack.health_url(Service::Replication);
        Ok(tokio::task::spawn_blocking(move || healthcheck::get(&url)).await??)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_of_any_size_stop_nobody() -> Result<()> {
    let mut scene = scene(|builder| builder).await?;
    let outcome = any_size(&mut scene).await;
    scene.board.explain(outcome)
}

async fn any_size(scene: &mut Scene) -> Result<()> {
    // Stored as it is, so that an update does not repeat it in the write-ahead log.
    for table in ["blobs", "full_rows"] {
        for column in ["a", "b", "raw"] {
            scene.sql(&format!("ALTER TABLE {table} ALTER COLUMN {column} SET STORAGE EXTERNAL")).await?;
        }
    }
    scene.canary().await?;
    let before = scene.replication_peak()?;
    for table in ["blobs", "full_rows"] {
        let steps: [(&str, &[&str]); 11] = [
            ("INSERT INTO {t} (id, a) VALUES (1, 'small'), (2, repeat('x', 70000000))", &["1 "]),
            // 70 MB of text, in hexadecimal digits; two columns that are large together; many that are.
            ("INSERT INTO {t} (id, raw) VALUES (3, decode(repeat('ab', 35000000), 'hex'))", &["1 "]),
            ("INSERT INTO {t} (id, a, b) VALUES (4, repeat('x', 35000000), repeat('y', 35000000))", &["1 "]),
            ("INSERT INTO {t} (id, a, b) VALUES (5, repeat('x', 3000000), repeat('y', 3000000))", &["1 "]),
            // Another column of such rows: what is large does not change, and is not sent.
            ("UPDATE {t} SET note = 'n'", &["1 n"]),
            ("UPDATE {t} SET a = repeat('z', 70000000) WHERE id = 1", &[]),
            // Back again: whole, although a part of it did not change.
            ("UPDATE {t} SET a = 'small' WHERE id IN (1, 2)", &["1 n", "2 n"]),
            ("UPDATE {t} SET a = NULL WHERE id = 5", &["1 n", "2 n", "5 n"]),
            ("UPDATE {t} SET id = 14 WHERE id = 4", &["1 n", "2 n", "5 n"]),
            ("UPDATE {t} SET id = 15 WHERE id = 5", &["1 n", "2 n", "15 n"]),
            ("DELETE FROM {t} WHERE id IN (1, 3, 14)", &["2 n", "15 n"]),
        ];
        for (sql, expected) in steps {
            let sql = sql.replace("{t}", table);
            scene.sql(&sql).await?;
            let took = scene.canary().await.with_context(|| sql.clone())?;
            println!("{took:>6.1?} {sql}");
            let found = scene.rows(table).await?;
            ensure!(found == expected, "{sql}: {found:?} instead of {expected:?}");
        }
        let length = format!("SELECT length(b) FROM {table} WHERE id = 15 AND length(b) = 3000000 AND a IS NULL");
        scene.shows(&length, 1).await?;
    }
    // A row that moves with a large value that did not change.
    scene.sql("ALTER TABLE moving ALTER COLUMN a SET STORAGE EXTERNAL").await?;
    scene.sql("INSERT INTO moving VALUES (1, 's', repeat('x', 70000000)), (2, 's', 'small')").await?;
    scene.sql("UPDATE moving SET scope = 't'").await?;
    scene.canary().await?;
    scene.shows("SELECT id FROM moving WHERE scope = 't'", 1).await?;
    // Another tool's messages, within a transaction and outside.
    for transactional in [true, false] {
        scene.sql(&format!("SELECT pg_logical_emit_message({transactional}, 'other', repeat('m', 100000000))")).await?;
        println!("{:>6.1?} a message of 100 MB", scene.canary().await?);
    }
    let more = scene.replication_peak()?.saturating_sub(before);
    println!("replication: +{} MiB", more / 1024);
    ensure!(more < MORE_KIB, "replication took {more} KiB more");
    let (health, log) = (scene.health().await?, scene.log()?);
    ensure!(health.contains("rows of blobs: ") && health.contains("rows of full_rows: "), "{health}");
    ensure!(
        log.contains("withdrawn") && !log.contains("xxxx") && !log.contains("a new epoch begins behind it"),
        "the log"
    );
    // A client that starts now has the same rows.
    let late = scene.board.client("late", "bob").await?;
    for table in ["blobs", "full_rows", "moving"] {
        let query = format!("SELECT id FROM {table} ORDER BY id");
        let (late, early) = (late.query(&query, ()).await?, scene.client.query(&query, ()).await?);
        ensure!(late.rows == early.rows, "{table}: {:?} and {:?}", late.rows, early.rows);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_with_a_small_max_payload_stops_nobody() -> Result<()> {
    let mut scene = scene(|builder| builder.nats_conf("max_payload: 1MB")).await?;
    let outcome = async {
        scene.canary().await?;
        // Up to 832 KiB.
        scene
            .sql("INSERT INTO blobs (id, a) VALUES (1, repeat('x', 850000)), (2, repeat('x', 852000)), (3, 'small')")
            .await?;
        // Messages are cut as well.
        scene
            .sql("INSERT INTO blobs (id, a) SELECT n, repeat('y', 100000) FROM generate_series(100, 199) AS n")
            .await?;
        scene.canary().await?;
        let rows = scene.rows("blobs").await?;
        ensure!(rows.len() == 102 && rows[..2] == ["1 ", "3 "], "{:?}", &rows[..3]);
        let health = scene.health().await?;
        ensure!(health.contains("rows of blobs: "), "{health}");
        Ok(())
    }
    .await;
    scene.board.explain(outcome)
}

/// A transaction is decoded before it is visible: a moment as a rule, as long as it takes where its commit waits for a
/// standby. Values that it does not repeat are read from the table only once the read sees it.
#[tokio::test(flavor = "multi_thread")]
async fn values_are_read_once_their_transaction_is_visible() -> Result<()> {
    let mut scene = scene(|builder| builder.postgres_setting("synchronous_commit", "local")).await?;
    let outcome = async {
        scene.sql("ALTER TABLE blobs ALTER COLUMN a SET STORAGE EXTERNAL").await?;
        scene.sql("INSERT INTO blobs (id, note, a) VALUES (1, 'n', repeat('x', 10000)), (2, 'n', repeat('y', 10000))").await?;
        scene.canary().await?;
        scene.sql("ALTER SYSTEM SET synchronous_standby_names = 'nobody'").await?;
        scene.sql("SELECT pg_reload_conf()").await?;
        let mut waits = scene.board.postgres().await?;
        let decoded = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
        // The second keeps a value of the first, which is not the one that reads find until then.
        let moved = "BEGIN; SET LOCAL synchronous_commit = on; UPDATE blobs SET id = 11 WHERE id = 1; \
                     UPDATE blobs SET a = repeat('z', 20000) WHERE id = 2; UPDATE blobs SET id = 12 WHERE id = 2; COMMIT";
        let commit = tokio::spawn(async move { sqlx::raw_sql(moved).execute(&mut waits).await.map(|_| ()) });
        let start = Instant::now();
        while sqlx::raw_sql(decoded).fetch_all(&mut scene.postgres).await?.is_empty() {
            ensure!(start.elapsed() < PATIENCE, "the commit waits for nobody");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        // A reader that does not wait would have read by then.
        tokio::time::sleep(Duration::from_secs(1)).await;
        scene.sql("ALTER SYSTEM RESET synchronous_standby_names").await?;
        scene.sql("SELECT pg_reload_conf()").await?;
        tokio::time::timeout(PATIENCE, commit).await???;
        scene.canary().await?;
        let query = "SELECT id FROM blobs WHERE (id = 11 AND a LIKE 'x%' AND length(a) = 10000) \
                     OR (id = 12 AND a LIKE 'z%' AND length(a) = 20000)";
        scene.shows(query, 2).await.context("both rows are whole")?;
        Ok(())
    }
    .await;
    scene.board.explain(outcome)
}

/// Where the server takes Millstream's own connection for a synchronous standby, a commit waits for replication, which must not wait
/// for the commit: it reads too early, says so, and sends the table again once the commit is visible.
#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_waits_for_replication_itself_goes_on() -> Result<()> {
    let mut scene = scene(|builder| builder).await?;
    let outcome = async {
        scene.sql("ALTER TABLE blobs ALTER COLUMN a SET STORAGE EXTERNAL").await?;
        scene.sql("INSERT INTO blobs (id, note, a) VALUES (1, 'n', repeat('x', 10000))").await?;
        scene.canary().await?;
        scene.sql("ALTER SYSTEM SET synchronous_standby_names = '*'").await?;
        scene.sql("SELECT pg_reload_conf()").await?;
        scene.canary().await?;
        scene.sql("UPDATE blobs SET id = 11 WHERE id = 1").await?;
        scene.canary().await?;
        scene.shows("SELECT id FROM blobs WHERE id = 11 AND a LIKE 'x%' AND length(a) = 10000", 1).await
    }
    .await;
    scene.board.explain(outcome)
}

/// Origin records of any size, also of a writer that is not ours: who is not told by the stream is told by the ledger.
#[tokio::test(flavor = "multi_thread")]
async fn origin_records_of_any_size_stop_nobody() -> Result<()> {
    let mut scene = scene(|builder| builder).await?;
    let outcome = async {
        scene.canary().await?;
        let entry = r#"{"client_id":"%s","first_seq":1,"client_seq":1,"run_id":"0190f3c2-7d1e-7000-8000-000000000007"}"#;
        let failed = r#"{"client_id":"%s","first_seq":1,"client_seq":1,"run_id":"0190f3c2-7d1e-7000-8000-000000000007","failed":[{"client_seq":1,"change_id":"0190f3c2-7d1e-7000-8000-000000000007","code":"entity_missing","message":"%s"}]}"#;
        let entries = |template: &str, count: usize, text: &str| {
            let entries = (0..count).map(|n| {
                let id = format!("0190f3c2-7d1e-7000-8000-{n:012x}");
                template.replacen("%s", &id, 1).replacen("%s", text, 1)
            });
            format!(r#"{{"clients":[{}]}}"#, entries.collect::<Vec<_>>().join(","))
        };
        let records = [
            entries(entry, 5_000, ""),
            entries(failed, 300, &"m".repeat(500)),
            entries(failed, 1, &"m".repeat(20_000_000)),
            "x".repeat(20_000_000),
            format!(r#"{{"clients":[],"traceparent":"{}"}}"#, "x".repeat(66_000)),
        ];
        for record in records {
            // With rows, and alone.
            scene.canaries += 1;
            let id = scene.canaries;
            let sql = "WITH added AS (INSERT INTO canary VALUES ($2) RETURNING id) \
                       SELECT count(pg_logical_emit_message(true, 'millstream.origin', $1)) FROM added";
            sqlx::query(sql).bind(&record).bind(id as i32).execute(&mut scene.postgres).await?;
            let alone = "SELECT pg_logical_emit_message(true, 'millstream.origin', $1)::text";
            sqlx::query(alone).bind(&record).execute(&mut scene.postgres).await?;
            println!("{:>6.1?} {} bytes", scene.canary().await?, record.len());
            scene.shows(&format!("SELECT id FROM canary WHERE id = {id}"), 1).await?;
        }
        // Many small ones in one transaction.
        let one = entries(failed, 1, "m");
        let sql = "SELECT count(pg_logical_emit_message(true, 'millstream.origin', $1)) FROM generate_series(1, 10000)";
        sqlx::query(sql).bind(one).execute(&mut scene.postgres).await?;
        scene.canary().await?;
        let (health, log) = (scene.health().await?, scene.log()?);
        ensure!(health.contains("origin records: "), "{health}");
        ensure!(!log.contains("a new epoch begins behind it") && !log.contains("mmmm"), "the log");
        // Verdicts go on, and are true.
        let sql = "INSERT INTO canary (id) VALUES (?)";
        scene.client.execute(sql, (1_000_000_i64,)).await?;
        scene.client.settled(PATIENCE).await?;
        Ok(())
    }
    .await;
    scene.board.explain(outcome)
}

/// A row that Postgres stores, but cannot write as text: 600 MB are 1.2 GB in hexadecimal digits.
#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_that_postgres_cannot_decode_is_passed_over() -> Result<()> {
    let mut scene = scene(|builder| builder).await?;
    let outcome = async {
        scene.canary().await?;
        // Compressed, it costs neither disk nor time.
        let raw = ["decode(repeat('00', 100000000), 'hex')"; 6].join(" || ");
        scene.sql(&format!("INSERT INTO unseen SELECT 1, 'nobody', {raw}")).await?;
        let took = scene.canary().await?;
        println!("healed in {took:.1?}");
        ensure!(took < 2 * SOON, "healed after {took:?}");
        let (health, log) = (scene.health().await?, scene.log()?);
        ensure!(health.contains("transactions: one could not be carried"), "{health}");
        let told = log.lines().find(|line| line.contains("a new epoch begins behind it")).context("it is not told")?;
        ensure!(told.contains("\"ERROR\"") && told.contains("wal.lsn") && told.contains("wal.xid"), "{told}");
        ensure!(told.contains("\"unseen\""), "{told}");
        println!("{told}");
        // It goes on as before.
        scene.sql("DELETE FROM unseen; INSERT INTO blobs (id) VALUES (2)").await?;
        scene.canary().await?;
        ensure!(scene.rows("blobs").await? == ["2 "], "{:?}", scene.rows("blobs").await?);
        Ok(())
    }
    .await;
    scene.board.explain(outcome)
}

/// Nor can a snapshot read such a row; its size does not show before it is written. It stops neither who was there nor who comes.
#[tokio::test(flavor = "multi_thread")]
async fn rows_that_postgres_cannot_write_are_left_out_of_snapshots() -> Result<()> {
    let mut scene = scene(|builder| builder).await?;
    let outcome = async {
        scene.sql("INSERT INTO documents SELECT n, 'plain', '[1]' FROM generate_series(1, 9) AS n").await?;
        scene.sql("UPDATE documents SET mood = 'gone' WHERE id = 7").await?;
        scene.canary().await?;
        // Damage: what is stored is no value of its type any more.
        scene.sql("SET allow_system_table_mods = on; DELETE FROM pg_enum WHERE enumlabel = 'gone'").await?;
        // Each of these numbers is stored in 8 bytes, and has 131,072 digits.
        let document = "('[' || repeat('1e131071,', 8500) || '1]')::jsonb";
        scene.sql(&format!("UPDATE documents SET note = 'large', document = {document} WHERE id IN (4, 5)")).await?;
        let took = scene.canary().await?;
        println!("healed in {took:.1?}");
        let come = scene.board.client("d", "bob").await?;
        let start = Instant::now();
        while come.query("SELECT id FROM documents", ()).await?.rows.len() < 6 {
            ensure!(
                start.elapsed() < PATIENCE,
                "who comes gets {:?}",
                come.query("SELECT id FROM documents", ()).await?
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        println!("came in {:.1?}", start.elapsed());
        let plain: Vec<String> = [1, 2, 3, 6, 8, 9].iter().map(|id| format!("{id} plain")).collect();
        ensure!(scene.rows("documents").await? == plain, "{:?}", scene.rows("documents").await?);
        let log = scene.board.stack.logs();
        let told = log.lines().find(|line| line.contains("cannot write a row of the table as text"));
        ensure!(told.is_some_and(|line| line.contains("\"documents\"")), "{told:?}");
        // Mended, they are there again.
        scene.sql("UPDATE documents SET document = '[2]' WHERE id = 4; DELETE FROM documents WHERE id = 5").await?;
        scene.canary().await?;
        scene.shows("SELECT id FROM documents", 7).await
    }
    .await;
    scene.board.explain(outcome)
}

/// While it cannot go on, replication is not ready, however often it tries.
#[tokio::test(flavor = "multi_thread")]
async fn readiness_stays_away_while_replication_cannot_go_on() -> Result<()> {
    let mut scene = scene(|builder| builder).await?;
    let outcome = async {
        scene.canary().await?;
        // A stream that takes no message is what a broker with a full disk is like: it answers, and refuses.
        let args = scene.board.stack.nats_args(millstream_provision::keys::Role::Admin);
        let admin = millstream_runtime::nats::connect(&args, "admin").await?;
        let mut config = admin.jetstream.get_stream("MS_WAL").await?.cached_info().config.clone();
        config.sealed = false;
        config.max_message_size = -1;
        config.discard = async_nats::jetstream::stream::DiscardPolicy::New;
        config.max_messages = 1;
        admin.jetstream.update_stream(config.clone()).await?;
        scene.sql("INSERT INTO canary VALUES (1000)").await?;
        // From the first refusal on.
        let start = Instant::now();
        while scene.health().await.is_ok() {
            ensure!(start.elapsed() < PATIENCE, "it stays ready");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let start = Instant::now();
        while start.elapsed() < SOON {
            ensure!(scene.health().await.is_err(), "ready after {:?}", start.elapsed());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        config.discard = async_nats::jetstream::stream::DiscardPolicy::Old;
        config.max_messages = -1;
        admin.jetstream.update_stream(config).await?;
        let start = Instant::now();
        while scene.health().await.is_err() {
            ensure!(start.elapsed() < PATIENCE, "it does not get ready again");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        scene.canary().await?;
        scene.shows("SELECT id FROM canary WHERE id = 1000", 1).await?;
        let log = scene.log()?;
        ensure!(!log.contains("a new epoch begins behind it"), "a refusal that passes began an epoch");
        Ok(())
    }
    .await;
    scene.board.explain(outcome)
}

/// The healthcheck of compose.yaml ends a broker that stays unhealthy, but none that has not been healthy yet.
#[tokio::test(flavor = "multi_thread")]
async fn an_unhealthy_broker_is_ended() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/nats-health.sh");
    let file = folder.path().join("health");
    let check = |url: &str, pid: u32| -> Result<bool> {
        let mut command = std::process::Command::new("sh");
        command.arg(&script).arg(url).arg(pid.to_string()).arg(&file).arg("3");
        Ok(command.status()?.success())
    };
    let mut board = Board::start().await?;
    let outcome = async {
        let (page, pid) = (format!("{}/healthz", board.stack.nats_monitor_url()), board.stack.pid(Service::Nats));
        let (page, pid) = (page, pid.context("NATS runs")?);
        let no_page = page.replace("healthz", "no-such-page");
        let runs = |board: &mut Board| board.stack.pid(Service::Nats) == Some(pid);
        for _ in 0..9 {
            ensure!(!check(&no_page, pid)? && runs(&mut board), "ended before it was healthy");
        }
        for _ in 0..3 {
            ensure!(check(&page, pid)?, "healthy");
            ensure!(!check(&no_page, pid)? && !check(&no_page, pid)? && runs(&mut board), "ended too early");
        }
        ensure!(check(&page, pid)?, "healthy");
        for _ in 0..3 {
            check(&no_page, pid)?;
        }
        let start = Instant::now();
        while runs(&mut board) {
            ensure!(start.elapsed() < PATIENCE, "it was not ended");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        // Started again, it counts from the start.
        board.stack.start_service(Service::Nats).await?;
        ensure!(!check(&no_page, pid)? && !file.exists(), "it counts on");
        Ok(())
    }
    .await;
    board.explain(outcome)
}
