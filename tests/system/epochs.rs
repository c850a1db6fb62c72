//! What becomes of clients when the outbound history breaks off, and of a leader that was frozen: it is noticed without an
//! operator, queues are kept, and everybody converges.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use millstream_client::{Client, State};
use millstream_provision::keys::Role;
use millstream_runtime::nats::{self, StreamArgs};
use millstream_stack::Service;
use millstream_tests::board::{Board, PATIENCE};
use millstream_tests::oracle::converged;
use sqlx::PgConnection;
use uuid::Uuid;

/// The replication slot of a private stack.
const SLOT: &str = "SELECT slot_name FROM pg_replication_slots";

/// A project, a client that is in sync, and one with a change that it has not sent.
struct Scene {
    postgres: PgConnection,
    project: Uuid,
    online: Client,
    offline: Client,
}

impl Scene {
    async fn new(board: &Board) -> Result<Scene> {
        let (mut postgres, project) = (board.postgres().await?, Uuid::now_v7());
        sqlx::query("INSERT INTO projects (id, name) VALUES ($1, 'p')").bind(project).execute(&mut postgres).await?;
        sqlx::query("INSERT INTO members VALUES ($1, 'alice', 'owner')").bind(project).execute(&mut postgres).await?;
        let (online, offline) = (board.client("a", "alice").await?, board.client("b", "alice").await?);
        converged(board, &offline, "alice").await?;
        offline.pause();
        offline.status().wait_for(|status| status.state == State::Offline).await?;
        let scene = Scene { postgres, project, online, offline };
        scene.add(&scene.offline, "queued").await?;
        Ok(scene)
    }

    async fn add(&self, client: &Client, title: &str) -> Result<()> {
        let sql = "INSERT INTO tasks (id, project_id, title) VALUES (?, ?, ?)";
        client.execute(sql, (Uuid::now_v7(), self.project, title.to_owned())).await?;
        Ok(())
    }

    async fn add_by_sql(&mut self, title: &str) -> Result<()> {
        let sql = "INSERT INTO tasks (id, project_id, title) VALUES ($1, $2, $3)";
        sqlx::query(sql).bind(Uuid::now_v7()).bind(self.project).bind(title).execute(&mut self.postgres).await?;
        Ok(())
    }

    /// New changes reach the online client; then the other one comes back. Gives the time of the first.
    async fn heals(&mut self, board: &Board) -> Result<Duration> {
        let start = Instant::now();
        self.add_by_sql("by SQL").await?;
        self.add(&self.online, "by a client").await?;
        self.online.settled(PATIENCE).await.context("the online client's queue")?;
        converged(board, &self.online, "alice").await?;
        let healed = start.elapsed();
        self.offline.resume();
        self.offline.settled(PATIENCE).await.context("the offline client's queue")?;
        converged(board, &self.offline, "alice").await?;
        converged(board, &self.online, "alice").await?;
        let titles = "SELECT count(*) FROM audit WHERE tbl = 'tasks' AND marker IN ('queued', 'by a client')";
        let effects: i64 = sqlx::query_scalar(titles).fetch_one(&mut self.postgres).await?;
        ensure!(effects == 2, "two changes had {effects} effects");
        Ok(healed)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn slot_dropped() -> Result<()> {
    let board = Board::start().await?;
    let outcome = async {
        let mut scene = Scene::new(&board).await?;
        let slot: String = sqlx::query_scalar(SLOT).fetch_one(&mut scene.postgres).await?;
        // It is in use again at once: until the moment between.
        loop {
            let end = "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE active_pid IS NOT NULL";
            sqlx::query(end).execute(&mut scene.postgres).await?;
            let drop = sqlx::query("SELECT pg_drop_replication_slot($1)").bind(&slot);
            if drop.execute(&mut scene.postgres).await.is_ok() {
                break;
            }
        }
        println!("slot_dropped: healed in {:.1?}", scene.heals(&board).await?);
        Ok(())
    }
    .await;
    board.explain(outcome)
}

#[tokio::test(flavor = "multi_thread")]
async fn stream_deleted() -> Result<()> {
    let board = Board::start().await?;
    let outcome = async {
        let mut scene = Scene::new(&board).await?;
        let admin = nats::connect(&board.stack.nats_args(Role::Admin), "admin").await?;
        for stream in ["MS_WAL", "MS_CHANGES"] {
            admin.jetstream.delete_stream(stream).await?;
        }
        nats::declare_streams(&admin.jetstream, &StreamArgs::default()).await?;
        println!("stream_deleted: healed in {:.1?}", scene.heals(&board).await?);
        Ok(())
    }
    .await;
    board.explain(outcome)
}

#[tokio::test(flavor = "multi_thread")]
async fn replication_paused_then_resumed_as_zombie() -> Result<()> {
    let mut board = Board::start().await?;
    let outcome = async {
        let mut scene = Scene::new(&board).await?;
        board.stack.start_instance((Service::Replication, 1)).await?;
        board.stack.pause(Service::Replication);
        let frozen = Instant::now();
        scene.add_by_sql("while it is frozen").await?;
        converged(&board, &scene.online, "alice").await?;
        let took = frozen.elapsed();
        board.stack.resume(Service::Replication);
        tokio::time::sleep(Duration::from_secs(1)).await;
        let healed = scene.heals(&board).await?;
        println!("zombie: the standby took over in {took:.1?}; with the zombie awake, changes arrive in {healed:.1?}");
        ensure!(took < Duration::from_secs(10), "the standby took {took:?}");
        Ok(())
    }
    .await;
    board.explain(outcome)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_slot_moves_past_foreign_wal() -> Result<()> {
    let board = Board::start().await?;
    let outcome = async {
        let mut scene = Scene::new(&board).await?;
        sqlx::query("CREATE TABLE noise (text text)").execute(&mut scene.postgres).await?;
        let before: String =
            sqlx::query_scalar("SELECT pg_current_wal_lsn()::text").fetch_one(&mut scene.postgres).await?;
        let noise = "INSERT INTO noise SELECT string_agg(md5(random()::text), '') FROM generate_series(1, 60) i, generate_series(1, 30000) n GROUP BY n";
        let mut written = 0.0;
        while written < 50e6 {
            sqlx::query(noise).execute(&mut scene.postgres).await?;
            let lag = "SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), $1::text::pg_lsn)::float8";
            written = sqlx::query_scalar(lag).bind(&before).fetch_one(&mut scene.postgres).await?;
        }
        let start = Instant::now();
        let lag = "SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), confirmed_flush_lsn)::float8 FROM pg_replication_slots";
        loop {
            let lag: f64 = sqlx::query_scalar(lag).fetch_one(&mut scene.postgres).await?;
            if lag < 1e6 {
                break;
            }
            ensure!(start.elapsed() < PATIENCE, "the slot lags by {lag} bytes");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        println!("idle slot: under 1 MB {:.1?} after {:.0} MB of foreign WAL", start.elapsed(), written / 1e6);
        Ok(())
    }
    .await;
    board.explain(outcome)
}

/// Copies a folder with owners and modes.
fn copy(from: &std::path::Path, to: &std::path::Path) -> Result<()> {
    let done = std::process::Command::new("cp").arg("-a").arg(from).arg(to).status()?;
    ensure!(done.success(), "cannot copy {}", from.display());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres_restored_to_backup() -> Result<()> {
    let mut board = Board::start().await?;
    let outcome = restored(&mut board, false).await;
    board.explain(outcome)
}

/// By the time that replication looks, the restored database has written more than it had before.
#[tokio::test(flavor = "multi_thread")]
async fn postgres_restored_to_backup_and_written_on() -> Result<()> {
    let mut board = Board::start().await?;
    let outcome = restored(&mut board, true).await;
    board.explain(outcome)
}

async fn restored(board: &mut Board, written_on: bool) -> Result<()> {
    let mut scene = Scene::new(board).await?;
    let (data, backup) = (board.stack.dir().join("postgres"), board.stack.dir().join("backup"));
    board.stack.stop_postgres().await;
    copy(&data, &backup)?;
    board.stack.start_postgres().await?;
    // What the backup does not have: of a client, whose queue gives it again, and by SQL, which is lost.
    scene.postgres = board.postgres().await?;
    scene.add(&scene.online, "given again").await?;
    scene.online.settled(PATIENCE).await?;
    scene.add_by_sql("lost with the database").await?;
    converged(board, &scene.online, "alice").await?;
    // As docs/restoring.md says: the edges are stopped, the inbound stream is removed.
    board.stack.stop_service(Service::Edge).await;
    board.stack.stop_postgres().await;
    std::fs::remove_dir_all(&data)?;
    std::fs::rename(&backup, &data)?;
    if written_on {
        board.stack.stop_service(Service::Replication).await;
    }
    board.stack.start_postgres().await?;
    if written_on {
        scene.postgres = board.postgres().await?;
        for n in 0..20 {
            scene.add_by_sql(&format!("written on {n}")).await?;
        }
        board.stack.start_service(Service::Replication).await?;
    }
    let admin = nats::connect(&board.stack.nats_args(Role::Admin), "admin").await?;
    admin.jetstream.delete_stream("MS_CHANGES").await?;
    nats::declare_streams(&admin.jetstream, &StreamArgs::default()).await?;
    board.stack.start_service(Service::Edge).await?;
    scene.postgres = board.postgres().await?;
    println!("postgres_restored_to_backup: healed in {:.1?}", scene.heals(board).await?);
    let titles =
        "SELECT array_agg(title ORDER BY title) FROM tasks WHERE title IN ('given again', 'lost with the database')";
    let titles: Vec<String> = sqlx::query_scalar(titles).fetch_one(&mut scene.postgres).await?;
    ensure!(titles == ["given again"], "{titles:?}");
    Ok(())
}

/// People remove files on a full disk; Postgres goes on saying that the slot has what it needs.
#[tokio::test(flavor = "multi_thread")]
async fn write_ahead_log_removed_behind_a_reserved_slot() -> Result<()> {
    let mut board = Board::start().await?;
    let outcome = async {
        let mut scene = Scene::new(&board).await?;
        board.stack.stop_service(Service::Replication).await;
        let needed = "SELECT pg_walfile_name(restart_lsn) FROM pg_replication_slots";
        let needed: String = sqlx::query_scalar(needed).fetch_one(&mut scene.postgres).await?;
        for n in 0..3 {
            scene.add_by_sql(&format!("lost with its file {n}")).await?;
            sqlx::raw_sql("SELECT pg_switch_wal(); CHECKPOINT").execute(&mut scene.postgres).await?;
        }
        let wal = board.stack.dir().join("postgres/pg_wal");
        std::fs::remove_file(wal.join(&needed)).with_context(|| needed.clone())?;
        let status: String =
            sqlx::query_scalar("SELECT wal_status FROM pg_replication_slots").fetch_one(&mut scene.postgres).await?;
        ensure!(status != "lost", "{status}");
        board.stack.start_service(Service::Replication).await?;
        println!("write_ahead_log_removed: healed in {:.1?}", scene.heals(&board).await?);
        let log = std::fs::read_to_string(board.stack.log_path(Service::Replication))?;
        ensure!(log.contains("the write-ahead log that the replication slot needs is gone"), "{log}");
        Ok(())
    }
    .await;
    board.explain(outcome)
}
