//! System tests, named after the promise or the failure. Real Postgres, NATS, sockets and processes throughout.

mod bad_input;
mod batches;
mod kills;
mod offline;
mod restarts;
mod structure;
mod telemetry;
mod wire;
