//! System tests, named after the promise or the failure. Real Postgres, NATS, sockets and processes throughout.

mod bad_input;
mod kills;
mod offline;
mod restarts;
mod simulation;
mod structure;
mod telemetry;
mod wire;
