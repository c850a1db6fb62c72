//! Ten lines: `cargo run -p millstream-client --example hello -- ws://127.0.0.1:4800/sync "$TOKEN"`.

use futures_util::StreamExt;
use millstream_client::Client;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let (edge, token) = (args.next().unwrap_or_default(), args.next().unwrap_or_default());
    let client = Client::builder("hello.db").edge(edge).token(token).open().await?;
    client.ready().await?;
    client.execute("INSERT INTO projects (id, name) VALUES (millstream_uuid(), ?)", ["From ten lines"]).await?;
    let mut projects = client.watch("SELECT name FROM projects ORDER BY id", ());
    while let Some(rows) = projects.next().await {
        println!("{:?}, {} pending", rows?.rows, client.status().borrow().pending.count);
    }
    Ok(())
}
