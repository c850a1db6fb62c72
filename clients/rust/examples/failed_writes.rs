//! Rejected writes, and a person's answer to each, against `cargo dev`:
//! `MILLSTREAM_TOKEN=… cargo run -p millstream-client --example failed_writes`.
//!
//! A project of the board needs a name. This program writes one without, is rejected, and asks for the way on.

use std::io::Write as _;

use anyhow::Context as _;
use futures_util::StreamExt;
use millstream_client::{Client, Edit, EntryState, FailedWrite};

/// The answer to a rejected transaction.
enum Answer {
    /// Submit it again as it is.
    Retry,
    /// Submit it again with another value of a column.
    Edit(Edit),
    /// Forget it.
    Discard,
    /// Decide later.
    Later,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let token = std::env::var("MILLSTREAM_TOKEN").context("MILLSTREAM_TOKEN holds no token")?;
    let client = Client::builder("failed_writes.db").edge("ws://127.0.0.1:4800").token(token).open().await?;
    client.ready().await?;
    client.execute("INSERT INTO projects (id, name) VALUES (millstream_uuid(), '')", ()).await?;

    // At once with those of earlier runs, then whenever the server rejects something or an answer is given.
    let mut failed = client.watch_failed();
    while let Some(writes) = failed.next().await {
        for write in writes? {
            show(&write);
            // The others are tried again by themselves.
            if write.state == EntryState::Error {
                let answer = tokio::task::spawn_blocking(ask).await??;
                take(&client, &write, answer).await?;
            }
        }
    }
    Ok(())
}

/// Shows why the server refused a transaction, and its changes.
fn show(write: &FailedWrite) {
    println!("transaction {} was rejected: {}", write.tx, write.message);
    for change in &write.changes {
        println!(
            "  {} {} {:?}: {:?} = {:?}",
            change.op.as_str(),
            change.table,
            change.key,
            change.columns,
            change.values
        );
    }
}

/// Reads an answer from the terminal.
fn ask() -> std::io::Result<Answer> {
    loop {
        print!("retry, edit COLUMN=VALUE, discard, or later? ");
        std::io::stdout().flush()?;
        let mut line = String::new();
        if std::io::stdin().read_line(&mut line)? == 0 {
            return Ok(Answer::Later);
        }
        if let Some(answer) = parse(line.trim()) {
            return Ok(answer);
        }
    }
}

fn parse(line: &str) -> Option<Answer> {
    match line {
        "retry" => Some(Answer::Retry),
        "discard" => Some(Answer::Discard),
        "later" => Some(Answer::Later),
        line => {
            let (column, value) = line.strip_prefix("edit ")?.split_once('=')?;
            // Without the id of a change, the edit is about the one that failed.
            Some(Answer::Edit(Edit { change_id: None, column: column.into(), value: Some(value.into()) }))
        }
    }
}

async fn take(client: &Client, write: &FailedWrite, answer: Answer) -> millstream_client::Result<()> {
    match answer {
        // The watch tells if it is rejected again.
        Answer::Retry => client.retry(write.tx).await.map(drop),
        Answer::Edit(edit) => client.edit(write.tx, vec![edit]).await.map(drop),
        Answer::Discard => client.discard(write.tx).await,
        Answer::Later => Ok(()),
    }
}
