//! Outbox, replica, rebase and trigger SQL: pure, shared by every client.
//!
//! Nothing here does I/O, knows the time or makes randomness: the caller brings them. The parts:
//!
//! - [`format`](mod@format): the tables of the store itself
//! - [`types`]: how SQLite keeps the values of Postgres' types; [`sql`]: names and literals
//! - [`trigger`]: the SQLite tables, and the triggers that record local writes in `local_changes`
//! - [`outbox`]: what is sent when, so that every local transaction arrives in order and none is lost
//! - [`replica`]: staging of what the edge sends, until it can be applied whole
//! - [`rebase`]: the visible row, from the confirmed row and the changes that are still under way
//! - [`backoff`]: when to connect again
//! - [`status`]: what a client tells about itself
//! - [`territory`]: what an app adds to its database

#![warn(clippy::missing_errors_doc)]

pub mod backoff;
pub mod format;
pub mod outbox;
pub mod rebase;
pub mod replica;
pub mod sql;
pub mod status;
pub mod territory;
pub mod trigger;
pub mod types;
