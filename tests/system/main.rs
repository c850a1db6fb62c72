//! System tests, named after the promise or the failure. Real Postgres, NATS, sockets and processes throughout.

mod bad_input;
mod batches;
mod bulk;
mod command_line;
mod epochs;
mod executor;
mod histories;
mod history;
mod kills;
mod leaks;
mod memberships;
mod offline;
mod order;
mod requirements;
mod restarts;
mod row_security;
mod schema_changes;
mod slow;
mod snapshots;
mod structure;
mod telemetry;
mod types;
mod validators;
mod verdicts;
mod watcher;
mod wire;
