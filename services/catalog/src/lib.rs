//! Which tables are synced, by whom they may be read, and by whom written: `millstream.toml` held against the
//! database's own catalog.
//!
//! - [`Config`]: the file, as written
//! - [`Catalog`]: the file resolved against the database, with types, keys and column order
//! - [`Holders`]: which tables hold the rows of a synced table, and what old rows tell
//! - [`identity_problems`], [`publication_problems`]: what keeps rows from being replicated as they should be
//! - [`store_misfits`]: what clients' stores cannot take

mod config;
mod defaults;
mod growth;
mod holders;
mod load;
mod model;
mod readable;
mod replication;
mod session;
mod stores;

pub use config::{
    ClockNames, Config, ConfigError, Conflict, DeleteMissing, InsertExisting, MembershipConfig, OneOrMany, RolesConfig,
    RuleConfig, ScopeConfig, TableConfig, TableScopeConfig, ValidateConfig, WriteConfig,
};
pub use growth::Growth;
pub use holders::{Holder, Holders, Shape, Unanswered};
pub use load::{CatalogError, layout};
pub use model::{
    Aside, Catalog, Column, ConflictPolicy, Members, Membership, Rule, ScopeColumn, Table, Validate, WriteRules,
    literal,
};
pub use replication::{Misfit, identity_problems, misfits, publication_problems};
pub use session::SessionConfig;
pub use stores::store_misfits;
