//! What every Millstream process does around its work. No domain types: names of streams are all that it knows of them.
//!
//! - [`telemetry`]: logs, and traces over OTLP where an endpoint is configured
//! - [`nats`]: connection, and the three streams: declared by one deploy step, verified by every service
//! - [`postgres`]: connection pools with pinned output settings
//! - [`lease`]: a pooled connection that goes back only from a known state
//! - [`health`]: `/livez` and `/readyz`, served with header timeouts
//! - [`shutdown`]: one signal that everything waits for
//! - [`backoff`]: full jitter
//! - [`error`]: errors as the log shows them

pub mod backoff;
pub mod error;
pub mod health;
pub mod lease;
pub mod nats;
pub mod postgres;
pub mod shutdown;
pub mod telemetry;
