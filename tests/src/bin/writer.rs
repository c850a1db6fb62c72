//! A client in a process of its own, for the test that kills it: writes for ever, and prints each write's marker once it
//! is durable locally.

use std::io::Write;

use anyhow::{Context, Result};
use millstream_client::Client;
use uuid::Uuid;

#[tokio::main]
async fn main() -> Result<()> {
    let variable = |name: &str| std::env::var(name).with_context(|| format!("{name} is not set"));
    let round = variable("WRITER_ROUND")?;
    let mut builder = Client::builder(variable("WRITER_STORE")?);
    let online = std::env::var_os("WRITER_OFFLINE").is_none();
    if online {
        builder = builder.edge(variable("WRITER_EDGE")?).token(variable("WRITER_TOKEN")?);
    }
    let client = builder.open().await?;
    if online {
        client.ready().await?;
    }
    let (project, marker) = (Uuid::now_v7(), format!("{round}:project"));
    let written = marker.clone();
    client
        .tx(move |tx| {
            tx.execute("INSERT INTO projects (id, name) VALUES (?, ?)", (project, written))?;
            tx.execute("INSERT INTO members (project_id, user_id) VALUES (?, 'bob')", (project,))?;
            Ok(())
        })
        .await?;
    say(&marker)?;
    for n in 0.. {
        let marker = format!("{round}:{n}");
        let sql = "INSERT INTO tasks (id, project_id, title) VALUES (?, ?, ?)";
        client.execute(sql, (Uuid::now_v7(), project, marker.clone())).await?;
        say(&marker)?;
    }
    Ok(())
}

fn say(marker: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{marker}")?;
    Ok(out.flush()?)
}
