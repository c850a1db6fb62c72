//! At the end every client's rows must equal Postgres' rows: otherwise the numbers mean nothing.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::time::{Duration, Instant};

use millstream_client::SqlValue;
use millstream_stack::Stack;
use sqlx::Connection as _;
use sqlx::postgres::PgConnection;
use uuid::Uuid;

use crate::error::Error;
use crate::load::{Loader, number};

/// How often clients that differ are looked at again.
const POLL: Duration = Duration::from_millis(200);

/// A task, as both sides can tell it.
type Task = (String, String, bool, f64);

/// Waits until every client has exactly Postgres' rows of its project.
pub async fn converged(stack: &Stack, loaders: &[Loader], limit: Duration) -> Result<(), Error> {
    let mut connection = PgConnection::connect(&stack.postgres_url()).await.map_err(Error::postgres("connect"))?;
    // Nobody writes any more.
    let mut expected: HashMap<Uuid, Vec<Task>> = HashMap::new();
    for loader in loaders {
        if let Entry::Vacant(project) = expected.entry(loader.project) {
            let tasks =
                sqlx::query_as("SELECT id::text, title, done, position FROM tasks WHERE project_id = $1 ORDER BY id")
                    .bind(loader.project)
                    .fetch_all(&mut connection)
                    .await
                    .map_err(Error::postgres("read the tasks"))?;
            project.insert(tasks);
        }
    }
    let deadline = Instant::now() + limit;
    for (number, loader) in loaders.iter().enumerate() {
        let expected = expected.get(&loader.project).map_or(&[][..], Vec::as_slice);
        loop {
            let found = tasks(loader).await?;
            if found == expected {
                break;
            }
            if Instant::now() >= deadline {
                let first = found.iter().zip(expected).find(|(found, expected)| found != expected);
                return Err(Error::NotConverged(format!(
                    "client {number} has {} tasks, Postgres {}; first difference {first:?}; status {:?}",
                    found.len(),
                    expected.len(),
                    *loader.client.status().borrow()
                )));
            }
            tokio::time::sleep(POLL).await;
        }
    }
    Ok(())
}

/// All tasks of a client: it sees those of its one project only.
async fn tasks(loader: &Loader) -> Result<Vec<Task>, Error> {
    let rows = loader
        .client
        .query("SELECT id, title, done, position FROM tasks ORDER BY id", ())
        .await
        .map_err(Error::client("read the tasks"))?;
    let text = |value: &SqlValue| match value {
        SqlValue::Text(text) => text.clone(),
        other => format!("{other:?}"),
    };
    Ok(rows
        .rows
        .iter()
        .map(|row| {
            let value = |index: usize| row.get(index).unwrap_or(&SqlValue::Null);
            (text(value(0)), text(value(1)), number(value(2)) == Some(1.0), number(value(3)).unwrap_or(f64::NAN))
        })
        .collect())
}
