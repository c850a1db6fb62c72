//! Taps on a running system: every frame and every message is what the contract says.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures_util::{SinkExt, StreamExt};
use millstream_client::Client;
use millstream_provision::keys::Role;
use millstream_tests::board::{Board, PATIENCE};
use millstream_tests::oracle::converged;
use millstream_tests::workload::{Workload, write};
use serde_json::Value;
use tokio::net::TcpListener;
use tokio_tungstenite::{accept_async, connect_async};

/// Texts that passed, by direction.
pub(crate) type Tapped = Arc<Mutex<Vec<(&'static str, String)>>>;

/// A WebSocket proxy that keeps a copy of every text.
pub(crate) async fn proxy(upstream: String, tapped: Tapped) -> Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("ws://{}", listener.local_addr()?);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (upstream, tapped) = (upstream.clone(), tapped.clone());
            tokio::spawn(async move {
                let (mut to_client, mut from_client) = accept_async(stream).await?.split();
                let (mut to_edge, mut from_edge) = connect_async(upstream).await?.0.split();
                let keep = |direction, message: &tokio_tungstenite::tungstenite::Message| {
                    if let Ok(text) = message.to_text()
                        && message.is_text()
                    {
                        tapped.lock().expect("no panic").push((direction, text.to_owned()));
                    }
                };
                loop {
                    tokio::select! {
                        Some(Ok(message)) = from_client.next() => {
                            keep("client-frame", &message);
                            to_edge.send(message).await?;
                        }
                        Some(Ok(message)) = from_edge.next() => {
                            keep("server-frame", &message);
                            to_client.send(message).await?;
                        }
                        else => return anyhow::Ok(()),
                    }
                }
            });
        }
    });
    Ok(url)
}

fn schema(name: &str) -> Result<jsonschema::Validator> {
    let path = format!("{}/../schemas/json/{name}.schema.json", env!("CARGO_MANIFEST_DIR"));
    let schema: Value = serde_json::from_str(&std::fs::read_to_string(&path).context(path)?)?;
    Ok(jsonschema::validator_for(&schema)?)
}

/// The schema of the messages on a subject; none for replies, which go to inboxes.
fn document(subject: &str) -> &'static str {
    match subject.split('.').take(2).collect::<Vec<_>>()[..] {
        ["ms", "changes"] => "changes-message",
        ["ms", "wal"] => "wal-payload",
        ["ms", "results"] => "results-message",
        ["ms", "replication"] => "request",
        _ => "unknown",
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_frame_and_message_validates() -> Result<()> {
    let board = Board::start().await?;
    let result = async {
        let nats = millstream_runtime::nats::connect(&board.stack.nats_args(Role::Admin), "admin").await?;
        let mut messages = nats.client.subscribe("ms.>").await?;
        let tapped = Tapped::default();
        let url = proxy(board.stack.edge_url(), tapped.clone()).await?;
        let open = |name: &str, user: &str| {
            Client::builder(board.store(name)).edge(url.clone()).token(board.stack.token(user)).open()
        };
        let (a, b) = (open("a", "alice").await?, open("b", "bob").await?);
        for client in [&a, &b] {
            tokio::time::timeout(PATIENCE, client.ready()).await.context("no snapshot")??;
        }
        let mut workload = Workload::new("a", 5, Some("bob"));
        for _ in 0..60 {
            write(&a, workload.transaction()).await?;
        }
        // A rejection, and a transaction that changes nothing that is synced.
        a.execute("UPDATE tasks SET title = '' WHERE id = (SELECT id FROM tasks LIMIT 1)", ()).await?;
        a.settled(PATIENCE).await?;
        converged(&board, &a, "alice").await?;
        converged(&board, &b, "bob").await?;
        // Revocation, by SQL.
        let sql = "DELETE FROM members WHERE user_id = 'bob' AND project_id = (SELECT min(project_id::text)::uuid FROM members)";
        sqlx::query(sql).execute(&mut board.postgres().await?).await?;
        converged(&board, &b, "bob").await?;
        b.drop_connection();
        b.status().wait_for(|status| status.reconnects > 0).await?;
        converged(&board, &b, "bob").await?;

        let mut schemas = BTreeMap::new();
        let mut seen: BTreeMap<String, u32> = BTreeMap::new();
        for (direction, text) in tapped.lock().unwrap().iter() {
            let frame: Value = serde_json::from_str(text)?;
            if !schemas.contains_key(direction) {
                schemas.insert(*direction, schema(direction)?);
            }
            if let Err(error) = schemas[direction].validate(&frame) {
                anyhow::bail!("{direction}: {error}: {text:.300}");
            }
            *seen.entry(format!("{direction} {}", frame["type"].as_str().unwrap_or("?"))).or_default() += 1;
        }
        while let Ok(Some(message)) = tokio::time::timeout(Duration::from_millis(300), messages.next()).await {
            let name = document(&message.subject);
            ensure!(name != "unknown", "a message on {}", message.subject);
            *seen.entry(name.to_owned()).or_default() += 1;
            if name == "request" {
                continue;
            }
            if !schemas.contains_key(name) {
                schemas.insert(name, schema(name)?);
            }
            let payload: Value = serde_json::from_slice(&message.payload)?;
            if let Err(error) = schemas[name].validate(&payload) {
                anyhow::bail!("{}: {error}: {payload:.300}", message.subject);
            }
            if name == "wal-payload" {
                let headers = message.headers.context("no headers")?;
                for header in
                    ["Ms-Epoch", "Ms-Lsn", "Ms-End-Lsn", "Ms-Previous-Lsn", "Ms-Xid", "Ms-Index", "Ms-Last", "Ms-At"]
                {
                    ensure!(headers.get(header).is_some(), "{}: no header {header}", message.subject);
                }
            }
        }
        println!("{seen:?}");
        for kind in [
            "client-frame hello",
            "client-frame submit",
            "server-frame welcome",
            "server-frame accepted",
            "server-frame results",
            "server-frame snapshot_begin",
            "server-frame snapshot_rows",
            "server-frame snapshot_apply",
            "server-frame snapshot_end",
            "server-frame rows",
            "server-frame confirmed",
            "server-frame commit",
            "server-frame caught_up",
            "server-frame scope_removed",
            "changes-message",
            "wal-payload",
            "results-message",
            "request",
        ] {
            ensure!(seen.contains_key(kind), "the tap never saw {kind}");
        }
        Ok(())
    };
    board.explain(result.await)
}
