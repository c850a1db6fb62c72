//! What a deployment needs before the services run: keys, the database's schema, roles and rights, the streams; and what the
//! application's tables need to be synced.
//!
//! - [`setup`]: the deploy step; [`migrations`], [`grants`]: parts of it; [`names`]: the names that it gives in Postgres
//! - [`keys`]: one NATS identity per service; [`token`]: session tokens
//! - [`mod@check`]: the configuration against the database; [`attach`]: the migration that lets a table's changes merge
//! - [`exit`]: exit codes, the same for every subcommand; [`files`]: files that appear whole

pub mod attach;
pub mod check;
pub mod exit;
pub mod files;
pub mod grants;
pub mod keys;
pub mod migrations;
pub mod names;
pub mod setup;
pub mod token;
