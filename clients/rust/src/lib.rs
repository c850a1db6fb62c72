//! The Rust SDK of Millstream: a local SQLite database that is kept in sync with Postgres.
//!
//! The app reads and writes its own tables in plain SQL, with or without a network. Every write is recorded in a durable queue, and
//! reaches Postgres in order and exactly once; every change of others that the user may see arrives in the same tables.
//!
//! 1. [Open](#open) · 2. [Write](#write) · 3. [Watch](#watch) · 4. [Failed writes](#failed-writes) · 5. [Offline](#offline) ·
//!    6. [Tokens](#tokens) · 7. [Testing](#testing)
//!
//! # Open
//!
//! ```no_run
//! # use millstream_client::{Client, Result};
//! # async fn example(token: String) -> Result<()> {
//! let client = Client::builder("app.db").edge("ws://127.0.0.1:4800").token(token).open().await?;
//! client.ready().await?;
//! # Ok(())
//! # }
//! ```
//!
//! The store is one SQLite file, of one user and for one installation of the app. [`Client::ready`] waits for the first snapshot; a
//! store that has ever had one is ready at once, offline too. Before that, queries and watches see only the rows that have
//! come so far: [`Status::download`] tells how many, and [`Status::has_synced`] when the first snapshot is complete. From then on
//! every change of the server shows as a whole; [`Status::caught_up`] tells when everything is there that was committed before this
//! connection began. A [`Client`] is cheap to clone. Its calls run on a
//! [tokio](https://docs.rs/tokio) runtime; SQLite runs on threads of its own.
//!
//! Several processes may open the same store. One of them does the syncing ([`Status::role`]), and all read and write.
//!
//! # Write
//!
//! [`Client::execute`] runs one statement, [`Client::tx`] a transaction, and [`Client::table`] writes values of your own types.
//!
//! ```
//! # mod local { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/local/mod.rs")); }
//! # local::run(async |client| {
//! let write = client.execute("INSERT INTO tasks (id, title) VALUES (millstream_uuid(), ?)", ["Buy milk"]).await?;
//! println!("{} row, transaction {:?}", write.value(), write.tx());
//! # Ok(())
//! # })
//! ```
//!
//! When they return, rows and queue entry are on the disk: the app may show the result, go offline or crash. A screen rarely has to
//! wait for more. Where it does, [`Write::confirmed`] waits for the verdict of the server:
//!
//! ```no_run
//! # use millstream_client::{Client, Error, Result};
//! # async fn example(client: Client) -> Result<()> {
//! # let write = client.execute("DELETE FROM tasks WHERE done", ()).await?;
//! match write.confirmed().await {
//!     // Applied, or lost to newer changes of others: there is nothing to do.
//!     Ok(outcome) => println!("{outcome:?}"),
//!     Err(Error::Rejected { code, message, .. }) => println!("{code}: {message}"),
//!     Err(error) => return Err(error),
//! }
//! # Ok(())
//! # }
//! ```
//!
//! In SQL, `millstream_uuid()` gives a UUIDv7. Booleans are 0 and 1; UUIDs, times, `numeric` and JSON are text as Postgres writes it;
//! `bytea` is a BLOB. Tables, indexes, views and triggers of the app's own live beside the synced tables.
//!
//! # Watch
//!
//! [`Client::query`] and [`Client::query_as`] read once. [`Client::watch`] gives the rows at once, and again whenever a table that
//! the query reads has changed, by this app, the server or another process:
//!
//! ```no_run
//! # use futures_util::StreamExt;
//! # use millstream_client::{Client, Result};
//! # async fn example(client: Client) -> Result<()> {
//! #[derive(serde::Deserialize)]
//! struct Task {
//!     title: String,
//!     done: bool,
//! }
//!
//! let mut tasks = client.watch_as::<Task>("SELECT title, done FROM tasks ORDER BY title", ());
//! while let Some(tasks) = tasks.next().await {
//!     for task in tasks? {
//!         println!("[{}] {}", if task.done { "x" } else { " " }, task.title);
//!     }
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # Failed writes
//!
//! The server may reject a transaction: nothing of it takes effect, and its rows show the server's state again. If a business rule
//! refused it, it is tried again by itself, with back-off ([`Builder::max_attempts`]). Then, and for other reasons at once, it waits
//! for a person, who retries, edits or discards it. Later changes of the same rows are held back behind it; everything else goes on.
//!
//! ```no_run
//! # use futures_util::StreamExt;
//! # use millstream_client::{Client, Edit, Result};
//! # async fn example(client: Client) -> Result<()> {
//! # enum Answer { Retry, Title(String), Discard }
//! # async fn ask(_: &millstream_client::FailedWrite) -> Answer { Answer::Retry }
//! let mut failed = client.watch_failed();
//! while let Some(writes) = failed.next().await {
//!     for write in writes? {
//!         match ask(&write).await {
//!             Answer::Retry => drop(client.retry(write.tx).await?),
//!             Answer::Title(title) => {
//!                 let edit = Edit { change_id: None, column: "title".into(), value: Some(title) };
//!                 client.edit(write.tx, vec![edit]).await?;
//!             }
//!             Answer::Discard => client.discard(write.tx).await?,
//!         }
//!     }
//! }
//! # Ok(())
//! # }
//! ```
//!
//! `examples/failed_writes.rs` is a whole program. A [`Write`] does not outlive the process: keep its number [`Write::tx`], and ask
//! [`Client::queue_entries`] after a restart.
//!
//! # Offline
//!
//! Nothing has to be done. The client connects again by itself, with back-off, and sends the queue. [`Client::status`] tells the app
//! where it stands; [`Client::connect_now`] skips the back-off when the system says that the network is back; [`Client::pause`] and
//! [`Client::resume`] are for a switch in the app. [`Client::settled`] waits until the queue is empty, before the app logs out, say.
//!
//! ```no_run
//! # async fn example(client: millstream_client::Client) {
//! let mut status = client.status();
//! while status.changed().await.is_ok() {
//!     let status = status.borrow_and_update();
//!     println!("{:?}: {} to send, {} failed", status.state, status.pending.count, status.failed);
//! }
//! # }
//! ```
//!
//! # Tokens
//!
//! The app's backend signs a JSON Web Token for each user (`examples/backend.rs`). [`Builder::token_fn`] is asked for one before
//! each connection, and again when the edge wants another:
//!
//! ```no_run
//! # use millstream_client::{Client, Result};
//! # async fn fetch_token() -> std::io::Result<String> { Ok(String::new()) }
//! # async fn example() -> Result<()> {
//! let client = Client::builder("app.db")
//!     .edge("wss://sync.example.org")
//!     .token_fn(|| async { Ok(fetch_token().await?) })
//!     .open()
//!     .await?;
//! # Ok(())
//! # }
//! ```
//!
//! Without a good token the state is [`State::NeedsAuth`], and writes are queued until [`Client::set_token`]. A store belongs to the
//! first user whose token it is given: open another file for another user.
//!
//! # Testing
//!
//! A client without an edge only records, which is enough to test an app's queries and writes. [`Builder::schema`] brings the tables;
//! its JSON is the one that [`Client::schema`] of a client in production gives.
//!
//! ```
//! use millstream_client::{Client, Schema};
//!
//! # #[tokio::main]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let schema: Schema = serde_json::from_str(
//!     r#"{"version": "1", "tables": [{
//!         "name": "tasks",
//!         "columns": [
//!             {"name": "id", "type": "uuid", "nullable": false, "writable": true},
//!             {"name": "title", "type": "text", "nullable": false, "writable": true}
//!         ],
//!         "key": [0],
//!         "scopes": [{"kind": "global"}]
//!     }]}"#,
//! )?;
//! let directory = tempfile::tempdir()?;
//! let client = Client::builder(directory.path().join("test.db")).schema(schema).open().await?;
//! client.execute("INSERT INTO tasks (id, title) VALUES (millstream_uuid(), 'Buy milk')", ()).await?;
//! assert_eq!(client.status().borrow().pending.count, 1);
//! # Ok(())
//! # }
//! ```
//!
//! With the feature `testing`, the module `testing` has faults on purpose: cut connections, workers that start again, lost messages
//! between them, and a clock of the test's own. End to end, `millstream dev` runs Postgres, NATS and the services on one machine.

#![warn(clippy::missing_errors_doc)]

mod builder;
mod bus;
mod changes;
mod client;
mod error;
mod host;
mod leader;
mod params;
mod queue;
mod rows;
mod session;
mod socket;
mod spans;
mod sync;
mod table;
#[cfg(feature = "testing")]
pub mod testing;
mod token;
mod watch;
mod write;
mod writer;

pub use builder::Builder;
pub use client::Client;
pub use error::{BoxError, Error, Result};
pub use millstream_client_core::status::{Download, LastError, Pending, Role, State, Status};
pub use millstream_client_core::territory::{Kind as SetAsideKind, SetAside};
pub use millstream_client_store::{
    Aside, Damage, Edit, EntryState, FailedWrite, ImportOutcome, Imported, Outcome, QueueEntry, Saved, SavedError,
    SavedTransaction, StoreError,
};
pub use millstream_schemas::{Change, Code, Operation, Position, Schema, Scope};
pub use params::{IntoParams, IntoSql};
pub use rows::Rows;
pub use rusqlite::types::Value as SqlValue;
pub use table::{Filter, Table};
pub use uuid::Uuid;
pub use watch::Watch;
pub use write::{Tx, Write};
