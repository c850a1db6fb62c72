//! Settings of a stack's parts.

use std::path::PathBuf;

use crate::service::Service;

/// Settings that parts are started with, again and again.
#[derive(Debug, Default)]
pub(crate) struct Settings {
    /// `millstream.toml`; without one, only Postgres and NATS run.
    pub config: Option<PathBuf>,
    /// Settings for Postgres beyond our own.
    pub postgres: Vec<(String, String)>,
    /// What connection URLs of Postgres have behind the question mark.
    pub postgres_parameters: String,
    /// Environment of Millstream's own services, of all or of one.
    pub env: Vec<(Option<Service>, String, String)>,
}
