//! What the system tests share: a stack with the board example, clients, a workload that keeps a journal, and Postgres
//! as the oracle.
//!
//! Every test has a stack of its own (Postgres, NATS, services, folders), so tests run side by side.

pub mod board;
pub mod oracle;
pub mod raw;
pub mod workload;

// Here, and not among the system tests, so that it has the machine's cores to itself.
#[cfg(test)]
mod simulation;
