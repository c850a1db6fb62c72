//! Row security on a synced table: snapshots and the stream carry every row of a scope, changes obey the app's policies.

use anyhow::{Context as _, Result, ensure};
use millstream_tests::board::{Board, PATIENCE};

const SECURITY: &str = "
ALTER TABLE tasks ENABLE ROW LEVEL SECURITY;
CREATE POLICY not_locked ON tasks USING (title <> 'locked');
";

#[tokio::test(flavor = "multi_thread")]
async fn row_security_leaves_no_snapshot_empty() -> Result<()> {
    let schema = include_str!("../../examples/board/schema.sql");
    let seed = include_str!("../../examples/board/seed.sql");
    let board = Board::with(|builder| builder.app_schema(format!("{schema}{SECURITY}")).seed(seed)).await?;
    let mut postgres = board.postgres().await?;
    sqlx::query("UPDATE tasks SET title = 'locked' WHERE title = 'Buy milk'").execute(&mut postgres).await?;
    let result = async {
        let client = board.client("a", "alice").await?;
        let count = || async {
            let rows = client.query("SELECT count(*) FROM tasks WHERE title = 'locked'", ()).await?;
            anyhow::Ok(format!("{:?}", rows.rows))
        };
        let all: i64 = sqlx::query_scalar("SELECT count(*) FROM tasks").fetch_one(&mut postgres).await?;
        let rows = client.query("SELECT id FROM tasks", ()).await?;
        ensure!(rows.rows.len() as i64 == all, "{} of {all} rows", rows.rows.len());
        ensure!(count().await?.contains('1'), "the row that the executor may not see");
        // A row that the policy lets nobody write.
        let write = client.execute("UPDATE tasks SET done = 1 WHERE title = 'locked'", ()).await?;
        let verdict = tokio::time::timeout(PATIENCE, write.confirmed()).await?;
        let text = format!("{verdict:?}");
        ensure!(verdict.is_err(), "the policy was passed: {text}");
        let write = client.execute("UPDATE tasks SET done = 1 WHERE title = 'Rake the leaves'", ()).await?;
        tokio::time::timeout(PATIENCE, write.confirmed()).await?.context("an ordinary row")?;
        Ok(())
    };
    let outcome = result.await;
    board.explain(outcome)
}
