//! One table's trouble is one table's: what a migration takes away from one stops no other, neither now nor at the next start.
//! And an operator learns what a replication slot waits for.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use millstream_catalog::Config;
use millstream_client::{Client, State};
use millstream_provision::names::SERVICE_ROLES;
use millstream_provision::{check, setup};
use millstream_stack::{Service, healthcheck};
use millstream_tests::board::PATIENCE;
use sqlx::Connection as _;

use crate::tables::{ORGS, Scene, scene};

const SCHEMA: &str = "CREATE TABLE tasks (id int PRIMARY KEY, v text);
    CREATE TABLE notes (id int PRIMARY KEY, org text NOT NULL, v text); ALTER TABLE notes REPLICA IDENTITY FULL;
    INSERT INTO tasks VALUES (1, 'before'); INSERT INTO notes VALUES (1, 'acme', 'a note');";
const CONFIG: &str = "[tables.tasks]\nscope = { kind = \"global\" }\nwritable = [\"id\", \"v\"]\nwrite.update = \"true\"\n\
    [tables.notes]\nscope = { kind = \"org\", column = \"org\" }\nwritable = [\"v\"]\nwrite.update = \"true\"\n";

impl Scene {
    async fn health(&self, service: Service) -> Result<String> {
        let url = match service {
            Service::Edge => format!("{}/readyz", self.board.stack.edge_url().replace("ws://", "http://")),
            _ => self.board.stack.health_url(service),
        };
        Ok(tokio::task::spawn_blocking(move || healthcheck::get(&url)).await??)
    }

    async fn deploy(&mut self) -> Result<(), setup::Error> {
        let config = Config::read(self.folder.path().join("millstream.toml")).expect("it is written");
        let passwords = SERVICE_ROLES.map(|role| (role, None));
        setup::database(&mut self.postgres, &config, &passwords).await.map(drop)
    }

    /// Changes of `tasks` reach everybody, by SQL and by a client; a new client gets a snapshot.
    async fn others_go_on(&mut self, what: &str) -> Result<()> {
        let place = || format!("others go on: {what}");
        self.sql(&format!("UPDATE tasks SET v = '{what}' WHERE id = 1")).await?;
        self.equal("tasks", "id, v", false).await.with_context(place)?;
        let alice = &self.clients[0].1;
        alice.execute("UPDATE tasks SET v = v || '!' WHERE id = 1", ()).await?.confirmed().await.with_context(place)?;
        self.equal("tasks", "id, v", false).await.with_context(place)?;
        let new = self.board.client(&format!("new {what}"), "alice").await.with_context(place)?;
        ensure!(new.query("SELECT v FROM tasks", ()).await?.rows.len() == 1);
        Ok(())
    }

    async fn restart_all(&mut self) -> Result<()> {
        for service in [Service::Replication, Service::Changes, Service::Edge] {
            self.board.kill_and_restart(service).await?;
        }
        Ok(())
    }
}

/// Waits until the client has no such table.
async fn is_gone(client: &Client, table: &str) -> Result<()> {
    let start = Instant::now();
    while client.query(&format!("SELECT count(*) FROM {table}"), ()).await.is_ok() {
        ensure!(start.elapsed() < PATIENCE, "{table} is still there");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_table_stops_no_other() -> Result<()> {
    let mut scene = scene(SCHEMA, CONFIG).await?;
    let outcome = async {
        scene.equal("notes", "id, v", true).await?;
        scene.sql("DROP TABLE notes").await?;
        is_gone(&scene.clients[0].1, "notes").await?;
        scene.others_go_on("at run time").await?;
        scene.restart_all().await?;
        scene.others_go_on("after a restart").await?;
        for service in [Service::Replication, Service::Changes, Service::Edge] {
            let health = scene.health(service).await?;
            ensure!(health.contains("table notes: set aside"), "{}: {health}", service.name());
        }
        let log = scene.log()?;
        ensure!(log.contains("the table is set aside") && log.contains("table public.notes does not exist"), "{log}");
        let text = std::fs::read_to_string(scene.folder.path().join("millstream.toml"))?;
        let config = Config::read(scene.folder.path().join("millstream.toml"))?;
        let found = check::check(&mut scene.postgres, &config, &text).await?.problems;
        ensure!(found.iter().any(|problem| problem.to_string().contains("notes does not exist")), "{found:?}");
        ensure!(matches!(scene.deploy().await, Err(setup::Error::Problems(_))), "setup says nothing");

        // It is there again, but not published: still one table's trouble.
        scene.sql("CREATE TABLE notes (id int PRIMARY KEY, org text NOT NULL, v text); ALTER TABLE notes REPLICA IDENTITY FULL; \
                   INSERT INTO notes VALUES (2, 'acme', 'another')").await?;
        scene.others_go_on("while it is not published").await?;
        scene.restart_all().await?;
        scene.others_go_on("not published after a restart").await?;
        ensure!(scene.log()?.contains("it is not in the publication"), "{}", scene.log()?);
        scene.deploy().await?;
        scene.equal("notes", "id, v", true).await?;
        scene.sql("INSERT INTO notes VALUES (3, 'bolt', 'later')").await?;
        scene.equal("notes", "id, v", true).await?;
        let health = scene.health(Service::Replication).await?;
        ensure!(!health.contains("notes"), "{health}");

        // All of them at once, restored from a dump: other tables by the same names.
        let dump = format!("{ORGS}{SCHEMA}").replace("before", "restored").replace("a note", "another note");
        let told = |log: String| log.matches("run `millstream setup`").count();
        let before = told(scene.log()?);
        scene.sql(&format!("DROP SCHEMA public CASCADE; CREATE SCHEMA public; {dump}")).await?;
        let start = Instant::now();
        while told(scene.log()?) == before {
            ensure!(start.elapsed() < PATIENCE, "{}", scene.log()?);
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        scene.deploy().await?;
        scene.equal("tasks", "id, v", false).await?;
        scene.equal("notes", "id, v", true).await?;
        scene.others_go_on("restored").await
    }
    .await;
    scene.board.explain(outcome)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_a_migration_breaks_stops_no_other() -> Result<()> {
    let mut scene = scene(SCHEMA, CONFIG).await?;
    let outcome = async {
        for (what, harm, says, undo) in [
            (
                "renamed",
                "ALTER TABLE notes RENAME TO memos",
                "notes does not exist",
                "ALTER TABLE memos RENAME TO notes",
            ),
            (
                "scope",
                "ALTER TABLE notes RENAME org TO organisation",
                "no column `org`",
                "ALTER TABLE notes RENAME organisation TO org",
            ),
            (
                "key",
                "ALTER TABLE notes DROP CONSTRAINT notes_pkey",
                "no primary key",
                "ALTER TABLE notes ADD PRIMARY KEY (id)",
            ),
            (
                "a key with a point",
                "ALTER TABLE notes ALTER id TYPE double precision",
                "spelled in one way by Postgres",
                "ALTER TABLE notes ALTER id TYPE int",
            ),
            ("names alike", "ALTER TABLE notes ADD \"V\" text", "differ in case only", "ALTER TABLE notes DROP \"V\""),
            (
                "view",
                "ALTER TABLE notes RENAME TO memos; CREATE VIEW notes AS SELECT * FROM memos",
                "not views",
                "DROP VIEW notes; ALTER TABLE memos RENAME TO notes",
            ),
            (
                "published",
                "ALTER PUBLICATION millstream DROP TABLE notes",
                "not in the publication",
                "ALTER PUBLICATION millstream ADD TABLE ONLY notes",
            ),
        ] {
            scene.sql(harm).await?;
            is_gone(&scene.clients[0].1, "notes").await.context(what)?;
            scene.others_go_on(what).await?;
            ensure!(scene.log()?.contains(says), "{what}: {}", scene.log()?);
            scene.board.kill_and_restart(Service::Replication).await?;
            scene.others_go_on(&format!("{what} restarted")).await?;
            scene.sql(undo).await?;
            scene.equal("notes", "id, v", true).await.context(what)?;
        }
        // The table that says who is a member: nobody may read what it granted, and all else goes on.
        scene.sql("DROP TABLE orgs").await?;
        let start = Instant::now();
        while !scene.clients[0].1.query("SELECT id FROM notes", ()).await?.rows.is_empty() {
            ensure!(start.elapsed() < PATIENCE, "rows are still there");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        scene.others_go_on("memberships").await
    }
    .await;
    scene.board.explain(outcome)
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_of_a_table_that_is_set_aside_are_tried_again() -> Result<()> {
    let mut scene = scene(SCHEMA, CONFIG).await?;
    let outcome = async {
        scene.equal("notes", "id, v", true).await?;
        let (user, eve) = scene.clients.pop().context("eve")?;
        eve.pause();
        let mut status = eve.status();
        tokio::time::timeout(PATIENCE, status.wait_for(|status| status.state == State::Offline)).await??;
        eve.execute("UPDATE notes SET v = 'meanwhile' WHERE id = 1", ()).await?;
        scene.sql("ALTER TABLE notes DROP CONSTRAINT notes_pkey").await?;
        is_gone(&scene.clients[0].1, "notes").await?;
        // The executor reads its model again with somebody's next change.
        let start = Instant::now();
        for n in 0.. {
            scene.others_go_on(&format!("change {n}")).await?;
            if scene.health(Service::Changes).await?.contains("table notes: set aside") {
                break;
            }
            ensure!(start.elapsed() < PATIENCE, "the executor does not know");
        }
        eve.resume();
        let mut status = eve.status();
        tokio::time::timeout(PATIENCE, status.wait_for(|status| status.failed == 1)).await??;
        let failed = eve.failed().await?;
        ensure!(failed[0].rule.as_deref() == Some("table_set_aside"), "{failed:?}");
        scene.others_go_on("while a change waits").await?;
        scene.sql("ALTER TABLE notes ADD PRIMARY KEY (id)").await?;
        scene.clients.push((user, eve));
        scene.equal("notes", "id, org", true).await?;
        let eve = &scene.clients[2].1;
        // By itself, or by hand if all attempts were made before.
        let _ = eve.retry(failed[0].tx).await;
        tokio::time::timeout(PATIENCE, eve.settled(PATIENCE)).await??;
        scene.equal("notes", "id, v", true).await?;
        let value: String =
            sqlx::query_scalar("SELECT v FROM notes WHERE id = 1").fetch_one(&mut scene.postgres).await?;
        ensure!(value == "meanwhile", "{value}");
        Ok(())
    }
    .await;
    scene.board.explain(outcome)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_slot_waits_for_is_said() -> Result<()> {
    /// Within this time.
    const SAID: Duration = Duration::from_secs(15);
    let mut scene = scene(SCHEMA, CONFIG).await?;
    let outcome = async {
        scene.board.stack.kill(Service::Replication);
        let start = Instant::now();
        while let Err(error) = scene.sql("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots").await {
            ensure!(start.elapsed() < PATIENCE, "{error:#}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let mut forgotten = scene.board.postgres().await?;
        sqlx::raw_sql("SET application_name = 'forgotten'; BEGIN; INSERT INTO tasks VALUES (2, 'open')")
            .execute(&mut forgotten)
            .await?;
        let pid: i32 = sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(&mut forgotten).await?;
        let started = tokio::time::timeout(SAID, scene.board.stack.start_service(Service::Replication)).await;
        ensure!(started.is_err(), "the slot did not wait: {started:?}");
        let log = scene.log()?;
        let line =
            log.lines().find(|line| line.contains("waits for an open transaction")).context("the log says nothing")?;
        for part in [
            format!("\"postgres.pid\":{pid}"),
            "forgotten".into(),
            "xact_start\":\"20".into(),
            format!("pg_terminate_backend({pid})"),
        ] {
            ensure!(line.contains(&part), "{part}: {line}");
        }
        let url = scene.board.stack.health_url(Service::Replication);
        let health = tokio::task::spawn_blocking(move || healthcheck::get(&url)).await?;
        let health = health.err().context("it is ready")?.to_string();
        ensure!(
            health.contains(&format!("replication slot: waits for open transactions: pid {pid} (forgotten)")),
            "{health}"
        );
        sqlx::raw_sql("COMMIT").execute(&mut forgotten).await?;
        scene.board.stack.wait_ready((Service::Replication, 0)).await?;
        scene.equal("tasks", "id, v", false).await?;
        let health = scene.health(Service::Replication).await?;
        ensure!(!health.contains("waits"), "{health}");
        forgotten.close().await?;
        Ok(())
    }
    .await;
    scene.board.explain(outcome)
}
