//! Databases with settings of their own, for everybody or for a while, with names of all kinds, and with transactions in two phases:
//! clients have what Postgres has, and what cannot be written now is kept.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use millstream_stack::Service;
use millstream_tests::board::PATIENCE;
use uuid::Uuid;

use crate::tables::{Scene, scene, scene_with};

const SCHEMA: &str = r"
CREATE TYPE mood AS ENUM ('fine', 'it''s \ so so');
CREATE TABLE notes (id int PRIMARY KEY, org text NOT NULL, v text, m mood, at timestamptz, day date, took interval, ns numeric[], r regclass);
ALTER TABLE notes REPLICA IDENTITY FULL;
INSERT INTO notes VALUES (1, 'acme', 'before', 'fine', '2026-01-02 03:04:05.6+01', '2026-02-01', '26 hours', '{1.50,NULL}');";
/// Names that have to be quoted, of all kinds.
const ODD: &str = "
CREATE SCHEMA \"My App\";
CREATE TABLE \"My App\".\"Order\" (id int PRIMARY KEY, org text NOT NULL, \"it's\" text, \"q\"\"uote\" int, \"new\" text, \"?1\" text, \"новый\" text, \"a\tb\nc\" text);
ALTER TABLE \"My App\".\"Order\" REPLICA IDENTITY FULL;
INSERT INTO orgs VALUES ('Acme Corp. / EU', 'alice');
INSERT INTO \"My App\".\"Order\" VALUES (1, 'Acme Corp. / EU', 'x'), (2, 'acme', 'y'), (3, 'bolt', 'z');";
const ODD_CONFIG: &str = r#"[tables."My App.Order"]
scope = { kind = "org", column = "org" }
writable = ["it's", 'q"uote', "new", "?1", "новый", "a\tb\nc"]
write.update = """new."it's" <> '' AND new."q""uote" > 0"""
"#;
const ODD_COLUMNS: &str = "id, org, \"it's\", \"q\"\"uote\", \"new\", \"?1\", \"новый\", \"a\tb\nc\"";
const ORDERS: [&str; 2] = ["\"My App\".\"Order\"", "\"My App.Order\""];
const CONFIG: &str = "[tables.notes]\nscope = { kind = \"org\", column = \"org\" }\n\
    writable = [\"id\", \"org\", \"v\", \"m\", \"at\", \"day\", \"took\", \"ns\"]\n\
    write.insert = \"new.org = 'acme'\"\nwrite.update = \"new.org = old.org AND new.v <> ''\"\n";
const COLUMNS: &str = "id, org, v, m, at, day, took, ns, r";

/// What hosts, and applications, set for all connections to a database. Names of types are read differently by some of it.
const SETTINGS: [(&str, &str); 16] = [
    ("default_transaction_isolation", "serializable"),
    ("default_transaction_deferrable", "on"),
    ("standard_conforming_strings", "off"),
    ("backslash_quote", "off"),
    ("client_encoding", "LATIN1"),
    ("quote_all_identifiers", "on"),
    ("search_path", "pg_catalog"),
    ("DateStyle", "German"),
    ("TimeZone", "Asia/Kathmandu"),
    ("IntervalStyle", "sql_standard"),
    ("bytea_output", "escape"),
    ("extra_float_digits", "-5"),
    ("transform_null_equals", "on"),
    ("synchronous_commit", "off"),
    ("jit_above_cost", "0"),
    ("client_min_messages", "debug1"),
];

/// Ends what was connected before: a setting of the database is for those who connect after it.
const RECONNECT: &str =
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'millstream-%'";
const LEADER: &str = "SELECT l.pid FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid AND a.datname = current_database() \
    WHERE l.locktype = 'advisory' AND l.granted AND a.application_name LIKE 'millstream-replication%'";

impl Scene {
    async fn set(&mut self, name: &str, value: &str) -> Result<()> {
        self.sql(&format!("ALTER DATABASE app SET {name} = '{value}'")).await
    }

    async fn epoch(&mut self) -> Result<Uuid> {
        Ok(sqlx::query_scalar("SELECT epoch FROM millstream.epoch").fetch_one(&mut self.postgres).await?)
    }

    async fn leader(&mut self) -> Result<i32> {
        let start = Instant::now();
        loop {
            if let Some(pid) = sqlx::query_scalar(LEADER).fetch_optional(&mut self.postgres).await? {
                return Ok(pid);
            }
            ensure!(start.elapsed() < PATIENCE, "nobody leads");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// A client's changes, plain SQL, the stream and a snapshot.
    async fn everything_works(&mut self, name: &str, id: i32) -> Result<()> {
        let alice = &self.clients[0].1;
        for sql in [
            format!(
                "UPDATE \"My App.Order\" SET \"it's\" = \"it's\" || '''', \"q\"\"uote\" = {id}, \"new\" = 'n{id}', \"?1\" = '?', \
                 \"новый\" = 'да', \"a\tb\nc\" = '\t\n'"
            ),
            format!(
                r"INSERT INTO notes (id, org, v, m, at, day, took, ns) VALUES ({id}, 'acme', 'it''s a \ of \n', 'it''s \ so so', '2026-07-01 12:00:00.5+00', '2026-11-29', 'PT26H', '{{NULL,2.50}}')"
            ),
            format!(r"UPDATE notes SET v = v || '€ \' WHERE id = {id}"),
        ] {
            let write = alice.execute(&sql, ()).await?;
            tokio::time::timeout(PATIENCE, write.confirmed()).await.context("no verdict")??;
        }
        self.sql(&format!("UPDATE notes SET at = at + interval '1 day', took = took * 2, r = 'notes' WHERE id = {id}"))
            .await?;
        let moved = "SET \"it's\" = \"it's\" || '\"', org = CASE id WHEN 2 THEN 'bolt' WHEN 3 THEN 'acme' ELSE org END";
        self.sql(&format!("UPDATE {} {moved}", ORDERS[0])).await?;
        self.equal("notes", COLUMNS, true).await?;
        self.equal_as(ORDERS[0], ORDERS[1], ODD_COLUMNS, true).await?;
        let new = self.board.client(name, "alice").await.context("a new client")?;
        self.clients.push(("alice", new));
        self.equal("notes", COLUMNS, true).await?;
        self.equal_as(ORDERS[0], ORDERS[1], ODD_COLUMNS, true).await?;
        self.clients.pop();
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_of_the_database_change_nothing() -> Result<()> {
    let mut scene = scene(&format!("{SCHEMA}{ODD}"), &format!("{CONFIG}{ODD_CONFIG}")).await?;
    let outcome = async {
        scene.sql("SET IntervalStyle = iso_8601").await?;
        scene.everything_works("before", 2).await?;
        let epoch = scene.epoch().await?;
        for (name, value) in SETTINGS {
            scene.set(name, value).await?;
        }
        scene.sql(RECONNECT).await?;
        scene.everything_works("with settings", 3).await?;
        ensure!(scene.epoch().await? == epoch, "settings begin a new epoch");

        // Sessions are ended when they are idle: all but the one that says who leads.
        scene.sql("ALTER DATABASE app RESET ALL").await?;
        scene.set("idle_session_timeout", "800ms").await?;
        scene.sql(RECONNECT).await?;
        scene.everything_works("reconnected", 4).await?;
        let leader = scene.leader().await?;
        tokio::time::sleep(Duration::from_secs(3)).await;
        ensure!(scene.leader().await? == leader, "the leader's lock was lost");
        scene.everything_works("after being idle", 5).await?;
        ensure!(scene.leader().await? == leader && scene.epoch().await? == epoch, "another leader, or another epoch");

        // Read only for a while.
        scene.sql("ALTER DATABASE app RESET ALL").await?;
        scene.set("default_transaction_read_only", "on").await?;
        scene.sql(RECONNECT).await?;
        let write = scene.clients[0].1.execute("UPDATE notes SET v = 'while read only' WHERE id = 1", ()).await?;
        let told = "in a read-only transaction";
        let start = Instant::now();
        let log = scene.board.stack.log_path(Service::Changes);
        while !std::fs::read_to_string(&log)?.contains(told) {
            ensure!(start.elapsed() < PATIENCE, "nothing is told");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        ensure!(scene.clients[0].1.status().borrow().pending.count == 1, "it is not kept");
        scene.sql("SET default_transaction_read_only = off; ALTER DATABASE app RESET ALL").await?;
        tokio::time::timeout(PATIENCE, write.confirmed()).await.context("it is not applied")??;
        scene.everything_works("written again", 6).await?;
        ensure!(scene.epoch().await? == epoch, "another epoch");
        Ok(())
    }
    .await;
    scene.board.explain(outcome)
}

#[tokio::test(flavor = "multi_thread")]
async fn prepared_transactions_arrive_when_they_are_committed() -> Result<()> {
    let builder = |builder: millstream_stack::Builder| builder.postgres_setting("max_prepared_transactions", "5");
    let mut scene = scene_with(SCHEMA, CONFIG, builder).await?;
    let insert = |id: i32, org: &str| format!("INSERT INTO notes VALUES ({id}, '{org}', 'note {id}')");
    let outcome = async {
        // What savepoints took back, what they kept, rows that move and end, and a membership.
        let begin = |from: i32| {
            let rest = [(1, "acme"), (2, "bolt"), (3, "acme")].map(|(n, org)| insert(from + n, org));
            format!(
                "BEGIN; {}; SAVEPOINT a; {}; UPDATE notes SET org = 'bolt' WHERE id = 1; SAVEPOINT b; DELETE FROM notes; ROLLBACK TO b; \
                 ROLLBACK TO a; SAVEPOINT c; {}; UPDATE notes SET v = v || '!' WHERE id = 1; RELEASE c; \
                 INSERT INTO orgs VALUES ('bolt', 'alice')",
                rest[0], rest[1], rest[2]
            )
        };
        scene.sql("SET IntervalStyle = iso_8601").await?;
        scene.equal("notes", COLUMNS, true).await?;
        scene.sql(&format!("{}; PREPARE TRANSACTION 'kept'", begin(10))).await?;
        scene.settle().await?;
        scene.equal("notes", COLUMNS, true).await?;
        let late = scene.board.client("late", "alice").await?;
        scene.clients.push(("alice", late));
        // It outlives whoever reads the log.
        scene.board.kill_and_restart(Service::Replication).await?;
        scene.sql(&insert(20, "bolt")).await?;
        scene.equal("notes", COLUMNS, true).await?;
        scene.sql("COMMIT PREPARED 'kept'").await?;
        scene.equal("notes", COLUMNS, true).await?;
        let ids = scene.clients[0].1.query("SELECT group_concat(id ORDER BY id) FROM notes", ()).await?.rows;
        ensure!(format!("{ids:?}").contains("1,11,13,20"), "{ids:?}");
        scene.sql(&format!("{}; PREPARE TRANSACTION 'dropped'", begin(30).replace("alice", "carl"))).await?;
        scene.settle().await?;
        scene.sql("ROLLBACK PREPARED 'dropped'").await?;
        scene.sql(&insert(40, "acme")).await?;
        scene.equal("notes", COLUMNS, true).await?;
        // The same without two phases.
        scene.sql(&format!("{}; COMMIT", begin(50).replace("alice", "carl"))).await?;
        scene.equal("notes", COLUMNS, true).await?;
        Ok(())
    }
    .await;
    scene.board.explain(outcome)
}
