//! What a worker knows of the database: the catalog, and the statements made from it.

use std::path::Path;
use std::time::SystemTime;

use millstream_catalog::{Catalog, CatalogError, Config, ConfigError};
use sqlx::PgConnection;

use crate::statement::Statements;
use crate::traits;

/// Everything of the named tables that a refusal may depend on, as one text.
const SHAPE: &str = "
SELECT coalesce(md5(string_agg(concat_ws(',', c.oid, a.attnum, a.attname, a.atttypid, a.atttypmod, a.attnotnull, a.attgenerated), ';' ORDER BY c.oid, a.attnum)), '')
FROM unnest($1::text[]) AS t (name)
JOIN pg_namespace n ON n.nspname = CASE WHEN t.name LIKE '%.%' THEN split_part(t.name, '.', 1) ELSE 'public' END
JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = CASE WHEN t.name LIKE '%.%' THEN substr(t.name, strpos(t.name, '.') + 1) ELSE t.name END
JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped";

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
    pub origin: Origin,
}

/// What a model was made from.
#[derive(Debug)]
pub(crate) struct Origin {
    /// Names of the tables.
    tables: Vec<String>,
    shape: Shape,
}

/// What shows that the database or the configuration has changed.
#[derive(Debug, PartialEq, Eq)]
struct Shape {
    tables: String,
    file: Option<(SystemTime, u64)>,
}

impl Shape {
    async fn read(connection: &mut PgConnection, config: &Path, tables: &[String]) -> Result<Shape, sqlx::Error> {
        let file = std::fs::metadata(config).and_then(|found| Ok((found.modified()?, found.len()))).ok();
        Ok(Shape { tables: sqlx::query_scalar(SHAPE).bind(tables).fetch_one(connection).await?, file })
    }
}

impl Model {
    /// Reads the configuration and the database.
    pub async fn load(connection: &mut PgConnection, path: &Path) -> Result<Model, ModelError> {
        let config = Config::read(path).map_err(ModelError::Config)?;
        let tables: Vec<String> = config.tables.keys().cloned().collect();
        // First, so that a change meanwhile shows.
        let shape = Shape::read(connection, path, &tables).await.map_err(ModelError::Traits)?;
        let catalog = Catalog::load(connection, &config).await.map_err(ModelError::Catalog)?;
        let oids: Vec<i64> = catalog.tables.iter().map(|table| i64::from(table.oid)).collect();
        let (traits, views) = traits::load(connection, oids).await.map_err(ModelError::Traits)?;
        Ok(Model { catalog, statements: Statements::new(traits, views), origin: Origin { tables, shape } })
    }
}

impl Origin {
    /// Whether it is still so. Then a name that the model lacks does not exist, and a type that it has is the column's;
    /// otherwise the client may know of a column that was added meanwhile.
    pub async fn is_current(&self, connection: &mut PgConnection, config: &Path) -> Result<bool, sqlx::Error> {
        Ok(Shape::read(connection, config, &self.tables).await? == self.shape)
    }
}
