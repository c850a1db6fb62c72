//! A client in a process of its own, for tests that stop it or measure its memory: prints the number that a query gives, now
//! and whenever it changes.

use std::io::Write;

use anyhow::{Context, Result};
use futures_util::StreamExt as _;
use millstream_client::{Client, SqlValue};

#[tokio::main]
async fn main() -> Result<()> {
    let variable = |name: &str| std::env::var(name).with_context(|| format!("{name} is not set"));
    let client = Client::builder(variable("WATCHER_STORE")?)
        .edge(variable("WATCHER_EDGE")?)
        .token(variable("WATCHER_TOKEN")?)
        .open()
        .await?;
    client.ready().await?;
    let mut rows = client.watch(&variable("WATCHER_QUERY")?, ());
    while let Some(shown) = rows.next().await {
        let shown = shown?;
        let Some(SqlValue::Integer(number)) = shown.rows.first().and_then(|row| row.first()) else {
            anyhow::bail!("{shown:?} is no number");
        };
        let mut out = std::io::stdout().lock();
        writeln!(out, "{number}")?;
        out.flush()?;
    }
    Ok(())
}
