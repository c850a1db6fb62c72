//! Snapshots are exact (G5, G6): whatever commits while one is taken, the rows that a new client gets and the stream that
//! goes on behind them leave nothing out and repeat nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use futures_util::StreamExt as _;
use millstream_client::{Client, SqlValue};
use millstream_schemas::frame::ServerFrame;
use millstream_schemas::{TableChanges, TableOp};
use millstream_stack::Service;
use millstream_tests::board::{Board, PATIENCE};
use millstream_tests::raw::{Raw, hello};
use sqlx::PgConnection;
use tokio::task::JoinSet;
use uuid::Uuid;

/// Snapshots of an ordinary run.
const SNAPSHOTS: usize = 500;
/// For so long at least, so that they are of several moments.
const DURATION: Duration = Duration::from_secs(6);
/// Taken at a time.
const AT_A_TIME: usize = 4;
/// Each writes its rows over and over; the last one holds its transaction open for long.
const WRITERS: usize = 8;
/// Rows that a writer's transactions change together.
const ROWS: usize = 5;

#[tokio::test(flavor = "multi_thread")]
async fn snapshots_are_exact_under_load() -> Result<()> {
    // Two users take snapshots for all.
    let board =
        Board::with(|builder| builder.env_of(Service::Edge, "MILLSTREAM_CONNECTIONS_PER_USER", "1000000")).await?;
    let outcome = run(&board).await;
    board.explain(outcome)
}

async fn run(board: &Board) -> Result<()> {
    let mut postgres = board.postgres().await?;
    let project = Uuid::now_v7();
    sqlx::query("INSERT INTO projects (id, name) VALUES ($1, 'p')").bind(project).execute(&mut postgres).await?;
    // Alice's snapshots are shared with others that start together; Bob has too many scopes for that.
    sqlx::query("INSERT INTO members VALUES ($1, 'alice', 'owner'), ($1, 'bob', 'owner')")
        .bind(project)
        .execute(&mut postgres)
        .await?;
    for sql in [
        "INSERT INTO projects (id, name) SELECT gen_random_uuid(), 'empty' FROM generate_series(1, 20)",
        "INSERT INTO members SELECT id, 'bob', 'owner' FROM projects WHERE name = 'empty'",
    ] {
        sqlx::query(sql).execute(&mut postgres).await?;
    }
    let stop = Arc::new(AtomicBool::new(false));
    let mut writers = JoinSet::new();
    for writer in 0..WRITERS {
        let (mut postgres, stop) = (board.postgres().await?, stop.clone());
        let ids: Vec<Uuid> = (0..ROWS).map(|_| Uuid::now_v7()).collect();
        sqlx::query("INSERT INTO tasks (id, project_id, title) SELECT id, $2, $3 FROM unnest($1) AS id")
            .bind(&ids)
            .bind(project)
            .bind(format!("{writer}:0"))
            .execute(&mut postgres)
            .await?;
        writers.spawn(async move {
            let mut n = 0_u64;
            while !stop.load(Ordering::Relaxed) {
                n += 1;
                write(&mut postgres, &ids, format!("{writer}:{n}"), writer + 1 == WRITERS).await?;
            }
            anyhow::Ok(n)
        });
    }
    let (taken, start) = (Arc::new(AtomicUsize::new(0)), Instant::now());
    let mut takers = JoinSet::new();
    for taker in 0..AT_A_TIME {
        let user = if taker % 2 == 0 { "alice" } else { "bob" };
        let (url, token, taken) = (board.stack.edge_url(), board.stack.token(user), taken.clone());
        takers.spawn(async move {
            while taken.fetch_add(1, Ordering::Relaxed) < SNAPSHOTS || start.elapsed() < DURATION {
                snapshot(&url, &token).await?;
            }
            anyhow::Ok(())
        });
    }
    let exact = takers.join_all().await.into_iter().collect::<Result<()>>();
    stop.store(true, Ordering::Relaxed);
    let commits: u64 = writers.join_all().await.into_iter().collect::<Result<Vec<_>>>()?.iter().sum();
    exact?;
    let (seconds, taken) = (start.elapsed().as_secs_f64(), taken.load(Ordering::Relaxed) - AT_A_TIME);
    println!("{taken} snapshots, all exact, beside {commits} commits of {WRITERS} writers, in {seconds:.1} s");
    Ok(())
}

async fn write(postgres: &mut PgConnection, ids: &[Uuid], title: String, slow: bool) -> Result<()> {
    use sqlx::Connection as _;
    let mut transaction = postgres.begin().await?;
    for (n, id) in ids.iter().enumerate() {
        sqlx::query("UPDATE tasks SET title = $2 WHERE id = $1")
            .bind(id)
            .bind(&title)
            .execute(&mut *transaction)
            .await?;
        if slow && n == 0 {
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    }
    transaction.commit().await?;
    tokio::time::sleep(Duration::from_millis(5)).await;
    Ok(())
}

/// What a new client has: of each row, its writer and the number of the writer's transaction.
type Rows = BTreeMap<String, (usize, u64)>;

/// The rows of tasks in some changes.
fn tasks(changes: &[TableChanges]) -> Result<Vec<(String, (usize, u64))>> {
    let mut rows = Vec::new();
    for change in changes.iter().filter(|change| change.table == "tasks") {
        ensure!(change.op == TableOp::Upsert && change.columns.is_none(), "{change:?}");
        for row in &change.rows {
            let (Some(id), Some(title)) = (&row[0], &row[2]) else { bail!("{row:?}") };
            let (writer, n) = title.split_once(':').context("a title")?;
            rows.push((id.clone(), (writer.parse()?, n.parse()?)));
        }
    }
    Ok(rows)
}

fn ensure_whole(rows: &Rows) -> Result<()> {
    let of_writers: BTreeSet<_> = rows.values().collect();
    ensure!(of_writers.len() == WRITERS, "a transaction is there in part: {of_writers:?}");
    Ok(())
}

/// Takes a snapshot as a new client, and follows the stream behind it until every quick writer has been heard of.
async fn snapshot(url: &str, token: &str) -> Result<()> {
    let mut raw = Raw::connect(url).await?;
    raw.frame(hello(Uuid::now_v7(), token)).await?;
    let (mut staged, mut rows, mut before) = (Rows::new(), Rows::new(), Vec::new());
    let (mut applied, mut heard, start) = (false, BTreeSet::new(), Instant::now());
    while heard.len() < WRITERS - 1 {
        ensure!(start.elapsed() < PATIENCE, "only {heard:?} were heard of");
        let text = raw.next_text().await?.context("the edge closed")?;
        match serde_json::from_str(&text)? {
            ServerFrame::SnapshotRows { changes, .. } => staged.extend(tasks(&changes)?),
            ServerFrame::SnapshotApply {} => {
                applied = true;
                rows = std::mem::take(&mut staged);
                ensure!(rows.len() == WRITERS * ROWS, "{} rows", rows.len());
                ensure_whole(&rows)?;
                for (id, (writer, n)) in before.drain(..) {
                    ensure!(rows[&id].1 >= n, "writer {writer}: the snapshot lacks {n}, which came before it");
                }
            }
            ServerFrame::Rows(message) if applied => {
                for (id, (writer, n)) in tasks(&message.changes)? {
                    let had = rows.insert(id, (writer, n)).map(|(_, n)| n);
                    ensure!(had == Some(n - 1), "writer {writer}: {n} comes behind {had:?}");
                    heard.insert(writer);
                }
                ensure_whole(&rows)?;
            }
            ServerFrame::Rows(message) => before.extend(tasks(&message.changes)?),
            _ => {}
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_sees_how_far_its_snapshot_is() -> Result<()> {
    const TASKS: u64 = 100_000;
    let board = Board::start().await?;
    let mut postgres = board.postgres().await?;
    for sql in [
        "INSERT INTO projects (id, name) VALUES ('00000000-0000-0000-0000-000000000001', 'p')".to_owned(),
        "INSERT INTO members VALUES ('00000000-0000-0000-0000-000000000001', 'alice', 'owner')".to_owned(),
        format!(
            "INSERT INTO tasks (id, project_id, title) SELECT gen_random_uuid(), '00000000-0000-0000-0000-000000000001', 't' FROM generate_series(1, {TASKS})"
        ),
    ] {
        sqlx::query(sqlx::AssertSqlSafe(sql)).execute(&mut postgres).await?;
    }
    let client = board.builder("a", "alice").open().await?;
    let mut status = client.status();
    let mut seen: Vec<millstream_client::Download> = Vec::new();
    let synced = async {
        while !status.borrow_and_update().has_synced {
            status.changed().await?;
            let download = status.borrow().download;
            seen.extend(download.filter(|download| seen.last() != Some(download)));
        }
        anyhow::Ok(())
    };
    tokio::time::timeout(PATIENCE, synced).await.context("no snapshot")??;
    // The project, the task, and the membership both as the project's row and as Alice's own.
    let total = TASKS + 3;
    // On a busy machine some states pass unseen.
    ensure!(seen.len() > 1 && seen.iter().all(|download| download.total == total), "{seen:?}");
    ensure!(
        seen.is_sorted_by(|a, b| a.rows < b.rows) && seen.last().is_some_and(|last| last.rows <= total),
        "{seen:?}"
    );
    ensure!(client.status().borrow().download.is_none(), "it is over");
    Ok(())
}

/// A new client: the rows of its snapshot, in however many frames.
async fn rows_of(url: String, token: String) -> Result<usize> {
    let mut raw = Raw::connect(&url).await?;
    raw.frame(hello(Uuid::now_v7(), &token)).await?;
    let (mut rows, mut told) = (0, 0);
    loop {
        match serde_json::from_str(&raw.next_text().await?.context("the edge closed")?)? {
            ServerFrame::SnapshotBegin { rows, .. } => told = rows,
            ServerFrame::SnapshotRows { changes, .. } => {
                rows += changes.iter().map(|change| change.rows.len()).sum::<usize>()
            }
            ServerFrame::SnapshotEnd { .. } => break,
            _ => {}
        }
    }
    ensure!(told == rows as u64, "{rows} rows, of {told} that were told");
    Ok(rows)
}

/// Rows are read and encoded once for clients that start together; whoever has too many scopes for that reads its own.
#[tokio::test(flavor = "multi_thread")]
async fn clients_that_start_together_share_what_is_read() -> Result<()> {
    const CLIENTS: usize = 40;
    let board = Board::start().await?;
    let result = async {
        let mut postgres = board.postgres().await?;
        for sql in [
            "INSERT INTO projects (id, name) SELECT gen_random_uuid(), 'p' || n FROM generate_series(1, 20) AS n",
            "INSERT INTO members SELECT id, user_id, 'member' FROM projects, (VALUES ('alice'), ('bob')) AS u (user_id) \
             WHERE user_id = 'bob' OR name = 'p1'",
            "INSERT INTO tasks (id, project_id, title) SELECT gen_random_uuid(), id, 't' FROM projects, generate_series(1, 500)",
            "ALTER SYSTEM SET log_statement = 'all'",
            "SELECT pg_reload_conf()",
        ] {
            sqlx::query(sql).execute(&mut postgres).await?;
        }
        let read = || -> Result<usize> {
            let log = std::fs::read_to_string(board.stack.log_path(Service::Postgres))?;
            Ok(log.matches("COPY (SELECT").count())
        };
        let start = |user: &'static str, clients: usize| {
            let mut takers = JoinSet::new();
            (0..clients).for_each(|_| drop(takers.spawn(rows_of(board.stack.edge_url(), board.stack.token(user)))));
            takers
        };
        // The project, its tasks, its two members, and a membership as one's own row.
        let rows = start("alice", CLIENTS).join_all().await.into_iter().collect::<Result<Vec<_>>>()?;
        ensure!(rows == [504; CLIENTS], "{rows:?}");
        // Six statements a client if each read for itself.
        let shared = read()?;
        ensure!((5..=4 * 6).contains(&shared), "{shared} reads for {CLIENTS} clients");
        let rows = start("bob", 4).join_all().await.into_iter().collect::<Result<Vec<_>>>()?;
        ensure!(rows == [20 * 501 + 21 + 20; 4], "{rows:?}");
        println!("{shared} reads for {CLIENTS} clients");
        Ok(())
    };
    let result = result.await;
    board.explain(result)
}

/// What a client keeps of a snapshot that is cut: its rows of tasks by id, and how far it is.
#[derive(Default)]
struct Kept {
    rows: BTreeMap<String, String>,
    token: Option<String>,
    mark: Option<String>,
}

impl Kept {
    fn take(&mut self, changes: &[TableChanges]) -> Result<()> {
        for change in changes.iter().filter(|change| change.table == "tasks") {
            for row in &change.rows {
                let id = row[0].clone().context("an id")?;
                match (change.op, row.get(2)) {
                    (TableOp::Delete, _) => drop(self.rows.remove(&id)),
                    (_, Some(Some(title))) => drop(self.rows.insert(id, title.clone())),
                    _ => bail!("{row:?}"),
                }
            }
        }
        Ok(())
    }

    /// Connects, and takes the next `frames` frames of rows. True: the snapshot is complete. Gives how many rows came.
    async fn go_on(&mut self, board: &Board, client_id: Uuid, user: &str, frames: usize) -> Result<(bool, usize)> {
        let mut raw = Raw::connect(&board.stack.edge_url()).await?;
        let mut frame = hello(client_id, &board.stack.token(user));
        if let (Some(token), Some(mark)) = (&self.token, &self.mark) {
            frame["snapshot"] = serde_json::json!({"token": token, "mark": mark});
        }
        raw.frame(frame).await?;
        let (mut found, mut rows, mut after) = (0, 0, Vec::new());
        loop {
            match serde_json::from_str(&raw.next_text().await?.context("the edge closed")?)? {
                ServerFrame::SnapshotBegin { token, resumed, .. } => {
                    ensure!(resumed == self.mark.is_some(), "resumed: {resumed}");
                    self.token = token;
                }
                ServerFrame::SnapshotRows { changes, mark } => {
                    rows += changes.iter().map(|change| change.rows.len()).sum::<usize>();
                    self.take(&changes)?;
                    self.mark = mark;
                    found += 1;
                    if found == frames {
                        return Ok((false, rows));
                    }
                }
                ServerFrame::Rows(message) => after.extend(message.changes),
                ServerFrame::SnapshotEnd { .. } => {
                    self.take(&after)?;
                    return Ok((true, rows));
                }
                _ => {}
            }
        }
    }
}

/// A snapshot that is cut goes on behind the last row that came, whatever has been written meanwhile, and ends with what Postgres
/// then has.
#[tokio::test(flavor = "multi_thread")]
async fn a_cut_snapshot_goes_on_where_it_was() -> Result<()> {
    const TASKS: usize = 20_000;
    let board = Board::start().await?;
    let result = async {
        let mut postgres = board.postgres().await?;
        for sql in [
            "INSERT INTO projects (id, name) SELECT gen_random_uuid(), 'p' || n FROM generate_series(1, 20) AS n",
            "INSERT INTO members SELECT id, user_id, 'member' FROM projects, (VALUES ('alice'), ('bob')) AS u (user_id) \
             WHERE user_id = 'bob' OR name IN ('p1', 'p2')",
            "INSERT INTO tasks (id, project_id, title) SELECT gen_random_uuid(), id, repeat('t', 50) \
             FROM projects, generate_series(1, 10000) WHERE name IN ('p1', 'p2')",
        ] {
            sqlx::query(sql).execute(&mut postgres).await?;
        }
        // Alice's is shared, a scope after the other; Bob's is his own.
        for user in ["alice", "bob"] {
            let (client_id, mut kept, mut came, mut cuts) = (Uuid::now_v7(), Kept::default(), 0, 0);
            loop {
                let (whole, rows) = kept.go_on(&board, client_id, user, 7).await?;
                came += rows;
                if whole {
                    break;
                }
                cuts += 1;
                // On both sides of the mark: changed, gone, new, moved to the other project, changed twice.
                for sql in [
                    "UPDATE tasks SET title = 'x' || title WHERE random() < 0.02",
                    "DELETE FROM tasks WHERE random() < 0.01",
                    "INSERT INTO tasks (id, project_id, title) SELECT gen_random_uuid(), id, 'new' FROM projects, \
                     generate_series(1, 100) WHERE name IN ('p1', 'p2')",
                    "UPDATE tasks SET project_id = (SELECT id FROM projects p WHERE name IN ('p1', 'p2') AND p.id <> tasks.project_id) \
                     WHERE random() < 0.01",
                    "UPDATE tasks SET id = gen_random_uuid() WHERE random() < 0.005",
                    "UPDATE tasks SET title = 'y' || title WHERE random() < 0.02",
                ] {
                    sqlx::query(sql).execute(&mut postgres).await?;
                }
            }
            let sql = "SELECT id::text, title FROM tasks";
            let there: BTreeMap<String, String> =
                sqlx::query_as::<_, (String, String)>(sql).fetch_all(&mut postgres).await?.into_iter().collect();
            let differ = there.iter().filter(|(id, title)| kept.rows.get(*id) != Some(title)).count();
            ensure!(differ == 0 && kept.rows.len() == there.len(), "{user}: {differ} of {} differ", there.len());
            ensure!(cuts >= 3 && came < TASKS * 5 / 4, "{user}: {came} rows came in {cuts} cuts");
            println!("{user}: {came} rows in {} sessions, for {} tasks", cuts + 1, there.len());
        }
        // What no snapshot is of (any more) begins anew.
        let mut kept = Kept::default();
        ensure!(!kept.go_on(&board, Uuid::now_v7(), "alice", 2).await?.0);
        sqlx::query(
            "DELETE FROM members WHERE user_id = 'alice' AND project_id = (SELECT id FROM projects WHERE name = 'p1')",
        )
        .execute(&mut postgres)
        .await?;
        let resumed = kept.go_on(&board, Uuid::now_v7(), "alice", 2).await;
        ensure!(resumed.as_ref().is_err_and(|error| error.to_string().contains("resumed: false")), "{resumed:?}");
        Ok(())
    };
    let result = result.await;
    board.explain(result)
}

/// Passes connections on to the edge, at most so many bytes a second to the client, and cuts each after so many; gives where
/// it listens, and how many connections there were.
async fn poor_network(board: &Board, per_second: usize, most: usize) -> Result<(String, Arc<AtomicUsize>)> {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, copy};
    let to = board.stack.edge_url().trim_start_matches("ws://").trim_end_matches('/').parse()?;
    // What is passed on is to arrive: what waits in the system's buffers when a connection is cut is lost.
    let socket = tokio::net::TcpSocket::new_v4()?;
    socket.set_send_buffer_size(32 << 10)?;
    socket.bind("127.0.0.1:0".parse()?)?;
    let listener = socket.listen(16)?;
    let (url, count) = (format!("ws://{}", listener.local_addr()?), Arc::new(AtomicUsize::new(0)));
    let connections = count.clone();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            connections.fetch_add(1, Ordering::Relaxed);
            tokio::spawn(async move {
                // Else several MB would be in the system's buffers.
                let Ok(socket) = tokio::net::TcpSocket::new_v4() else { return };
                let Ok(()) = socket.set_recv_buffer_size(32 << 10) else { return };
                let Ok(mut edge) = socket.connect(to).await else { return };
                let ((mut from_edge, mut to_edge), (mut from_client, mut to_client)) = (edge.split(), client.split());
                let (start, mut passed, mut buffer) = (Instant::now(), 0, vec![0; 16 << 10]);
                let down = async {
                    while passed < most {
                        let Ok(some @ 1..) = from_edge.read(&mut buffer).await else { return };
                        let Ok(()) = to_client.write_all(&buffer[..some]).await else { return };
                        passed += some;
                        let due = start + Duration::from_secs_f64(passed as f64 / per_second as f64);
                        tokio::time::sleep_until(due.into()).await;
                    }
                };
                // Whichever ends first ends both.
                tokio::select! {
                    () = down => {}
                    _ = copy(&mut from_client, &mut to_edge) => {}
                }
            });
        }
    });
    Ok((url, count))
}

/// A client with many tasks to get; waits until it has them.
async fn gets_many_tasks(board: &Board, url: String) -> Result<Client> {
    let client = board.builder("a", "alice").edge(url).open().await?;
    let mut status = client.status();
    tokio::time::timeout(PATIENCE, status.wait_for(|status| status.has_synced)).await.context("it never came")??;
    let rows = client.query("SELECT count(*), count(DISTINCT id) FROM tasks WHERE title <> ''", ()).await?.rows;
    ensure!(format!("{:?}", rows[0]).matches(&MANY.to_string()).count() == 2, "{rows:?}");
    Ok(client)
}

/// Tasks that have several MB together.
const MANY: u64 = 30_000;

async fn many_tasks(board: &Board) -> Result<()> {
    let mut postgres = board.postgres().await?;
    sqlx::raw_sql(sqlx::AssertSqlSafe(format!(
        "INSERT INTO projects (id, name) VALUES ('00000000-0000-0000-0000-000000000001', 'p');
         INSERT INTO members VALUES ('00000000-0000-0000-0000-000000000001', 'alice', 'owner');
         INSERT INTO tasks (id, project_id, title) SELECT gen_random_uuid(), '00000000-0000-0000-0000-000000000001', repeat('t', 100) FROM generate_series(1, {MANY})"
    )))
    .execute(&mut postgres)
    .await?;
    Ok(())
}

/// Through a network that breaks every connection long before a snapshot's end, it would never arrive if it began anew.
#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_arrives_through_connections_that_break() -> Result<()> {
    let board = Board::start().await?;
    let result = async {
        many_tasks(&board).await?;
        let (url, connections) = poor_network(&board, usize::MAX, 2 << 20).await?;
        gets_many_tasks(&board, url).await?.close().await?;
        let connections = connections.load(Ordering::Relaxed);
        ensure!((4..=10).contains(&connections), "{connections} connections");
        println!("{MANY} rows in {connections} connections of 2 MiB");
        Ok(())
    };
    let result = result.await;
    board.explain(result)
}

/// A slow client gives its turn, and what is kept for it, to others; it goes on with what it lacks. One that could not go on
/// gets the time that it needs.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_client_takes_a_snapshot_a_stretch_at_a_time() -> Result<()> {
    let board = Board::with(|builder| builder.env_of(Service::Edge, "MILLSTREAM_SNAPSHOT_SECONDS", "1")).await?;
    let result = async {
        many_tasks(&board).await?;
        let (url, connections) = poor_network(&board, 5 << 18, usize::MAX).await?;
        gets_many_tasks(&board, url.clone()).await?.close().await?;
        let stretches = connections.swap(0, Ordering::Relaxed);
        // What is shared is cut; the rest is read for it alone, and waits in a file.
        ensure!((2..=12).contains(&stretches), "{stretches} connections");
        println!("{MANY} rows in {stretches} connections of a second");

        let bob = board.builder("b", "bob").edge(url).open().await?;
        let mut status = bob.status();
        tokio::time::timeout(PATIENCE, status.wait_for(|status| status.has_synced)).await??;
        let grant = "INSERT INTO members VALUES ('00000000-0000-0000-0000-000000000001', 'bob', 'member')";
        sqlx::query(grant).execute(&mut board.postgres().await?).await?;
        let mut counts = bob.watch("SELECT count(*) FROM tasks", ());
        let all = async {
            while let Some(rows) = counts.next().await {
                if rows?.rows == [[SqlValue::Integer(MANY.cast_signed())]] {
                    return Ok(());
                }
            }
            bail!("the client ended")
        };
        tokio::time::timeout(PATIENCE, all).await.context("the tasks never came")??;
        let connections = connections.load(Ordering::Relaxed);
        ensure!(connections == 1, "{connections} connections for one that had rows before");
        bob.close().await?;
        Ok(())
    };
    let result = result.await;
    board.explain(result)
}
