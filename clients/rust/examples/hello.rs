//! Ten lines, against `cargo dev`: `MILLSTREAM_TOKEN=… cargo run -p millstream-client --example hello`.

use futures_util::StreamExt;
use millstream_client::Client;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let token = std::env::var("MILLSTREAM_TOKEN")?;
    let client = Client::builder("hello.db").edge("ws://127.0.0.1:4800").token(token).open().await?;
    client.ready().await?;
    client.execute("INSERT INTO projects (id, name) VALUES (millstream_uuid(), ?)", ["From ten lines"]).await?;
    let mut projects = client.watch("SELECT name FROM projects ORDER BY id", ());
    while let Some(rows) = projects.next().await {
        println!("{:?}, {} pending", rows?.rows, client.status().borrow().pending.count);
    }
    Ok(())
}
