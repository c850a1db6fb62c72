//! The first load of a session has an end, of which its client is told: also where there is nothing to load.

use anyhow::{Context, Result, ensure};
use millstream_schemas::frame::ServerFrame;
use millstream_schemas::{Position, Schema};
use millstream_tests::board::{Board, PATIENCE};
use millstream_tests::raw::{Raw, hello};
use serde_json::json;
use sqlx::{AssertSqlSafe, Executor, PgConnection};
use uuid::Uuid;

/// What a session has sent up to `caught_up`: its welcome's schema, the types of its frames, tasks in snapshots and in live
/// rows, and the position.
#[derive(Default)]
struct Load {
    schema: Option<Schema>,
    kinds: Vec<&'static str>,
    tasks: (usize, usize),
    position: Option<Position>,
}

async fn load(raw: &mut Raw) -> Result<Load> {
    let mut load = Load::default();
    let tasks = |changes: &[millstream_schemas::TableChanges]| {
        changes.iter().filter(|group| group.table == "tasks").map(|group| group.rows.len()).sum::<usize>()
    };
    while load.position.is_none() {
        let kind = raw
            .wait(|frame| {
                Some(match frame {
                    ServerFrame::Welcome(welcome) => {
                        load.schema = welcome.schema;
                        "welcome"
                    }
                    ServerFrame::SnapshotBegin { .. } => "begin",
                    ServerFrame::SnapshotRows { changes, .. } => {
                        load.tasks.0 += tasks(&changes);
                        return None;
                    }
                    ServerFrame::SnapshotApply {} => "apply",
                    ServerFrame::SnapshotEnd { .. } => "end",
                    ServerFrame::Rows(rows) => {
                        load.tasks.1 += tasks(&rows.changes);
                        return None;
                    }
                    ServerFrame::Confirmed(_) => "confirmed",
                    ServerFrame::Commit { .. } => "commit",
                    ServerFrame::CaughtUp { position } => {
                        load.position = Some(position);
                        "caught_up"
                    }
                    other => panic!("{other:?}"),
                })
            })
            .await?;
        load.kinds.push(kind);
    }
    Ok(load)
}

async fn tasks(sql: &mut PgConnection, project: Uuid, count: usize) -> Result<()> {
    let statement = format!(
        "INSERT INTO tasks (id, project_id, title) SELECT gen_random_uuid(), '{project}', 'x' FROM generate_series(1, {count})"
    );
    sql.execute(sqlx::raw_sql(AssertSqlSafe(statement))).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn each_session_is_told_once_that_it_is_caught_up() -> Result<()> {
    let board = Board::start().await?;
    let result = async {
        let (url, token, id) = (board.stack.edge_url(), board.stack.token("alice"), Uuid::now_v7());
        let (mut sql, project) = (board.postgres().await?, Uuid::now_v7());
        // Nothing but the snapshot of empty scopes.
        let mut raw = Raw::connect(&url).await?;
        raw.frame(hello(id, &token)).await?;
        let first = load(&mut raw).await?;
        ensure!(first.kinds == ["welcome", "begin", "apply", "end", "caught_up"], "{:?}", first.kinds);
        let schema = first.schema.context("a new client gets the schema")?;

        // Nothing at all: its position is the newest.
        let come_back = |position: &Position, scopes: &[String]| {
            let mut frame = hello(id, &token);
            frame["schema"] = json!(schema.version);
            frame["position"] = json!(position);
            frame["scopes"] = json!(scopes);
            frame
        };
        let mut scopes = vec!["global:all".to_owned(), "user:alice".to_owned()];
        let mut raw = Raw::connect(&url).await?;
        raw.frame(come_back(&first.position.context("a position")?, &scopes)).await?;
        let second = load(&mut raw).await?;
        ensure!(second.kinds == ["welcome", "caught_up"], "{:?}", second.kinds);
        ensure!(second.position.map(|p| p.stream_seq) >= first.position.map(|p| p.stream_seq), "{:?}", second.position);

        // A grant and rows while it was away, and again: a snapshot, and rows of a scope that it holds.
        let grant = format!(
            "INSERT INTO projects (id, name) VALUES ('{project}', 'p');
             INSERT INTO members (project_id, user_id, role) VALUES ('{project}', 'alice', 'owner')"
        );
        sql.execute(sqlx::raw_sql(AssertSqlSafe(grant))).await?;
        tasks(&mut sql, project, 40).await?;
        let mut raw = Raw::connect(&url).await?;
        raw.frame(come_back(&second.position.context("a position")?, &scopes)).await?;
        let third = load(&mut raw).await?;
        ensure!(third.tasks.0 == 40, "{:?} tasks came before caught_up", third.tasks);
        scopes.push(format!("project:{project}"));
        for n in 0..5 {
            tasks(&mut sql, project, n).await?;
        }
        let mut raw = Raw::connect(&url).await?;
        raw.frame(come_back(&third.position.context("a position")?, &scopes)).await?;
        let fourth = load(&mut raw).await?;
        ensure!(fourth.tasks == (0, 10), "{:?} tasks came before caught_up", fourth.tasks);

        // Told once: what comes now is live.
        tasks(&mut sql, project, 1).await?;
        raw.wait(|frame| match frame {
            ServerFrame::Rows(_) => Some(Ok(())),
            ServerFrame::CaughtUp { .. } => Some(Err(anyhow::anyhow!("caught up twice"))),
            _ => None,
        })
        .await??;
        Ok(())
    };
    board.explain(result.await)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_app_ends_its_spinner_when_everything_is_there() -> Result<()> {
    let board = Board::start().await?;
    let result = async {
        let (mut sql, project) = (board.postgres().await?, Uuid::now_v7());
        let grant = format!(
            "INSERT INTO projects (id, name) VALUES ('{project}', 'p');
             INSERT INTO members (project_id, user_id, role) VALUES ('{project}', 'alice', 'owner')"
        );
        sql.execute(sqlx::raw_sql(AssertSqlSafe(grant))).await?;
        let client = board.client("a", "alice").await?;
        let mut status = client.status();
        let mut wanted = 0;
        for count in [0, 300, 1, 2_000, 0] {
            tokio::time::timeout(PATIENCE, status.wait_for(|status| status.caught_up)).await.context("never")??;
            let found: Vec<usize> = client.query_as("SELECT count(*) FROM tasks", ()).await?;
            ensure!(found == [wanted], "caught up with {found:?} of {wanted} tasks");
            client.pause();
            status.wait_for(|status| !status.caught_up).await?;
            tasks(&mut sql, project, count).await?;
            wanted += count;
            client.resume();
        }
        Ok(())
    };
    board.explain(result.await)
}
