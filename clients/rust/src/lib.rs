//! The Rust SDK of Millstream: a local SQLite database that is kept in sync with Postgres.
//!
//! The app reads and writes its own tables in plain SQL. A write is durable, and queued, when [`Client::execute`] returns;
//! it travels when there is a network, in order and exactly once, and [`Write::confirmed`] tells what became of it.
//!
//! ```no_run
//! use futures_util::StreamExt;
//! use millstream_client::{Client, Result};
//!
//! # async fn example() -> Result<()> {
//! let client = Client::builder("app.db").edge("ws://127.0.0.1:4800").token("…").open().await?;
//! client.ready().await?;
//! let write = client.execute("UPDATE tasks SET done = 1 WHERE title = ?", ["buy milk"]).await?;
//! let mut open = client.watch("SELECT title FROM tasks WHERE NOT done", ());
//! while let Some(rows) = open.next().await {
//!     println!("{} open, {} pending", rows?.len(), client.status().borrow().pending.count);
//! }
//! # write.confirmed().await.map(drop)
//! # }
//! ```
//!
//! In SQL, `millstream_uuid()` gives a UUIDv7. Booleans are 0 and 1; UUIDs, times, `numeric` and JSON are text as Postgres
//! writes it; `bytea` is a BLOB.

mod builder;
mod bus;
mod changes;
mod client;
mod error;
mod leader;
mod params;
mod rows;
mod socket;
mod sync;
mod table;
mod token;
mod watch;
mod writer;

pub use builder::Builder;
pub use bus::Faults;
pub use client::{Client, Tx, Worker, Write};
pub use error::{BoxError, Error, Result};
pub use millstream_client_core::status::{Download, LastError, Pending, Role, State, Status};
pub use millstream_client_core::territory::{Kind as SetAsideKind, SetAside};
pub use millstream_client_store::{
    Aside, Damage, Edit, EntryState, FailedWrite, Host, ImportOutcome, Imported, Outcome, QueueEntry, Saved,
    SavedError, SavedTransaction, StoreError,
};
pub use millstream_schemas::{Change, Code, Operation, Position, Schema, Scope};
pub use params::{IntoParams, IntoSql};
pub use rows::Rows;
pub use rusqlite::types::Value as SqlValue;
pub use table::{Filter, Table};
pub use uuid::Uuid;
pub use watch::Watch;
