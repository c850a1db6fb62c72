//! System tests, named after the promise or the failure. Real Postgres, NATS, sockets and processes throughout.

mod bad_input;
mod batches;
mod history;
mod kills;
mod offline;
mod restarts;
mod row_security;
mod structure;
mod telemetry;
mod validators;
mod wire;
