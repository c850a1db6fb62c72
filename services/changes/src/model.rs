//! What a worker knows of the database: the catalog, and the statements made from it.

use std::path::Path;
use std::time::{Duration, Instant};

use millstream_catalog::{Catalog, CatalogError, Config, ConfigError};
use sqlx::PgConnection;

use crate::statement::Statements;
use crate::traits;

/// A catalog older than this is read again before a change is refused for a name that it lacks: the client may know of
/// a column that was added meanwhile.
const FRESH: Duration = Duration::from_secs(5);

/// Why it cannot be known.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ModelError {
    #[error("cannot read the configuration")]
    Config(#[source] ConfigError),
    #[error("cannot read the catalog")]
    Catalog(#[source] CatalogError),
    #[error("cannot read the tables' triggers and constraints")]
    Traits(#[source] sqlx::Error),
}

/// Catalog and statements, as of one moment.
#[derive(Debug)]
pub(crate) struct Model {
    pub catalog: Catalog,
    pub statements: Statements,
    loaded: Instant,
}

impl Model {
    /// Reads the configuration and the database.
    pub async fn load(connection: &mut PgConnection, config: &Path) -> Result<Model, ModelError> {
        let config = Config::read(config).map_err(ModelError::Config)?;
        let catalog = Catalog::load(connection, &config).await.map_err(ModelError::Catalog)?;
        let oids: Vec<i64> = catalog.tables.iter().map(|table| i64::from(table.oid)).collect();
        let (traits, views) = traits::load(connection, oids).await.map_err(ModelError::Traits)?;
        Ok(Model { catalog, statements: Statements::new(traits, views), loaded: Instant::now() })
    }

    /// Whether a name that it lacks can be trusted not to exist.
    pub fn is_fresh(&self) -> bool {
        self.loaded.elapsed() < FRESH
    }
}
