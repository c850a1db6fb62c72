//! Postgres as the oracle: a client's rows must be what `SELECT` gives for its user.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use millstream_client::{Client, SqlValue};
use sqlx::{AssertSqlSafe, Row};

use crate::board::{Board, PATIENCE};

/// The board's tables, with their columns and how a user's rows are found.
const TABLES: [(&str, &[&str], &str); 4] = [
    ("projects", &["id", "name", "created_at"], "id"),
    ("members", &["project_id", "user_id", "role"], "project_id"),
    ("tasks", &["id", "project_id", "title", "done", "position", "created_at"], "project_id"),
    ("comments", &["id", "project_id", "task_id", "author_id", "body", "created_at"], "project_id"),
];

/// Rows of all tables: `table` and the row's values as text, to be compared whole.
pub type Rows = BTreeMap<String, Vec<String>>;

/// What the user may see, straight from Postgres.
///
/// # Errors
/// Postgres is down.
pub async fn expected(board: &Board, user: &str) -> Result<Rows> {
    let mut postgres = board.postgres().await?;
    sqlx::query("SET TimeZone = 'UTC'").execute(&mut postgres).await?;
    let mut rows = Rows::new();
    for (table, columns, scope) in TABLES {
        let columns: Vec<String> = columns.iter().map(|column| format!("coalesce({column}::text, '∅')")).collect();
        let sql = format!(
            "SELECT array_to_string(ARRAY[{}], '|') FROM {table}
             WHERE {scope} IN (SELECT project_id FROM members WHERE user_id = $1)",
            columns.join(", ")
        );
        let found = sqlx::query(AssertSqlSafe(sql)).bind(user).fetch_all(&mut postgres).await?;
        let mut found: Vec<String> = found.iter().map(|row| row.get(0)).collect();
        found.sort_unstable();
        rows.insert(table.to_owned(), found);
    }
    Ok(rows)
}

/// What the client has.
///
/// # Errors
/// Its store cannot be read.
pub async fn actual(client: &Client) -> Result<Rows> {
    let mut rows = Rows::new();
    for (table, columns, _) in TABLES {
        let found = client.query(&format!("SELECT {} FROM {table}", columns.join(", ")), ()).await?;
        let mut found: Vec<String> = found
            .rows
            .iter()
            .map(|row| row.iter().zip(columns).map(|(value, column)| text(value, column)).collect::<Vec<_>>().join("|"))
            .collect();
        found.sort_unstable();
        rows.insert(table.to_owned(), found);
    }
    Ok(rows)
}

fn text(value: &SqlValue, column: &str) -> String {
    match value {
        SqlValue::Null => "∅".to_owned(),
        SqlValue::Integer(n) if column == "done" => if *n == 0 { "false" } else { "true" }.to_owned(),
        SqlValue::Integer(n) => n.to_string(),
        SqlValue::Real(n) => n.to_string(),
        SqlValue::Text(text) => text.clone(),
        SqlValue::Blob(bytes) => format!("{bytes:?}"),
    }
}

/// Waits until the client equals Postgres row by row; returns how long that took, in seconds.
///
/// # Errors
/// It does not within [`PATIENCE`]; the error names a differing row.
pub async fn converged(board: &Board, client: &Client, user: &str) -> Result<f64> {
    let start = Instant::now();
    loop {
        let (expected, actual) = (expected(board, user).await?, actual(client).await?);
        if expected == actual {
            return Ok(start.elapsed().as_secs_f64());
        }
        if start.elapsed() > PATIENCE {
            let status = client.status().borrow().clone();
            return difference(&expected, &actual).context(format!("{user} did not converge: {status:?}"));
        }
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
}

fn difference(expected: &Rows, actual: &Rows) -> Result<f64> {
    for (table, wanted) in expected {
        let found = &actual[table];
        let missing: Vec<_> = wanted.iter().filter(|row| !found.contains(row)).collect();
        let extra: Vec<_> = found.iter().filter(|row| !wanted.contains(row)).collect();
        if !missing.is_empty() || !extra.is_empty() {
            bail!(
                "{table}: {} rows are missing, such as {:?}; {} are extra, such as {:?}",
                missing.len(),
                missing.first(),
                extra.len(),
                extra.first()
            );
        }
    }
    bail!("equal after all")
}
