//! Which tables are synced, by whom they may be read, and by whom written: `millstream.toml` held against the
//! database's own catalog.
//!
//! - [`Config`]: the file, as written
//! - [`Catalog`]: the file resolved against the database, with types, keys and column order

mod config;
mod defaults;
mod growth;
mod load;
mod model;
mod readable;

pub use config::{
    ClockNames, Config, ConfigError, Conflict, DeleteMissing, InsertExisting, MembershipConfig, OneOrMany, RolesConfig,
    RuleConfig, ScopeConfig, TableConfig, TableScopeConfig, ValidateConfig, WriteConfig,
};
pub use growth::Growth;
pub use load::{CatalogError, layout};
pub use model::{
    Aside, Catalog, Column, ConflictPolicy, Members, Membership, Rule, ScopeColumn, Table, Validate, WriteRules,
    literal,
};
