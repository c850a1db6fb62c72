//! What a worker knows of the database: the catalog, and the statements made from it.

use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, Instant};

use millstream_catalog::{Catalog, CatalogError, Config, ConfigError};
use sqlx::{PgConnection, Row};

use crate::statement::{Statements, Traits};

/// A catalog older than this is read again before a change is refused for a name that it lacks: the client may know of
/// a column that was added meanwhile.
const FRESH: Duration = Duration::from_secs(5);

/// The traits of [`Traits`] for every table. Trigger type bits: 1 = for each row, 2 = before.
const TRAITS: &str = "\
SELECT c.oid::bigint AS oid,
       EXISTS (SELECT FROM pg_trigger t WHERE t.tgrelid = ANY (tree.oids) AND NOT t.tgisinternal AND t.tgenabled <> 'D'
               AND t.tgtype::int & 3 <> 3) AS statement_triggers,
       EXISTS (SELECT FROM pg_constraint f WHERE f.contype = 'f' AND f.confrelid = ANY (tree.oids)
               AND (f.confdeltype IN ('c', 'n', 'd') OR f.confupdtype IN ('c', 'n', 'd'))) AS cascades,
       c.relrowsecurity
       OR EXISTS (SELECT FROM pg_trigger t WHERE t.tgrelid = ANY (tree.oids) AND NOT t.tgisinternal AND t.tgenabled <> 'D')
       OR EXISTS (SELECT FROM pg_attrdef d WHERE d.adrelid = ANY (tree.oids)
               AND (pg_get_expr(d.adbin, d.adrelid) LIKE '%current_setting%'
                    OR EXISTS (SELECT FROM pg_depend p WHERE p.classid = 'pg_attrdef'::regclass AND p.objid = d.oid
                               AND p.refclassid = 'pg_proc'::regclass)))
       OR EXISTS (SELECT FROM pg_constraint k WHERE k.contype = 'c' AND k.conrelid = ANY (tree.oids)
               AND (pg_get_constraintdef(k.oid) LIKE '%current_setting%'
                    OR EXISTS (SELECT FROM pg_depend p WHERE p.classid = 'pg_constraint'::regclass AND p.objid = k.oid
                               AND p.refclassid = 'pg_proc'::regclass))) AS personal
FROM pg_class c,
     LATERAL (SELECT array_agg(relid::oid) || c.oid AS oids FROM pg_partition_tree(c.oid)) AS tree
WHERE c.oid::bigint = ANY ($1)";

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
        let rows = sqlx::query(TRAITS).bind(oids).fetch_all(connection).await.map_err(ModelError::Traits)?;
        let traits = rows.iter().map(traits).collect::<Result<HashMap<_, _>, _>>().map_err(ModelError::Traits)?;
        Ok(Model { catalog, statements: Statements::new(traits), loaded: Instant::now() })
    }

    /// Whether a name that it lacks can be trusted not to exist.
    pub fn is_fresh(&self) -> bool {
        self.loaded.elapsed() < FRESH
    }
}

fn traits(row: &sqlx::postgres::PgRow) -> Result<(u32, Traits), sqlx::Error> {
    let oid: i64 = row.try_get("oid")?;
    let traits = Traits {
        statement_triggers: row.try_get("statement_triggers")?,
        cascades: row.try_get("cascades")?,
        personal: row.try_get("personal")?,
    };
    // An object id has 32 bits.
    Ok((oid as u32, traits))
}
