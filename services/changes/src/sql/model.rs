//! What a worker knows of the database: the catalog, and the statements made from it. And what tells that they have changed:
//! the [`ConfigFile`] of the configuration, and a [`Watcher`] of both it and the database.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use millstream_catalog::{Catalog, CatalogError, Config, ConfigError};
use millstream_runtime::error::chain;
use millstream_runtime::health::{Asides, Health};
use millstream_runtime::shutdown::Shutdown;
use sqlx::{PgConnection, PgPool};
use tokio::sync::watch;

use crate::sql::combined::Combined;
use crate::sql::statement::Statements;
use crate::sql::traits;

/// Time between looks at whether the configuration or the database has changed.
const LOOK: Duration = Duration::from_secs(2);
/// What the notes for an operator are about.
const FILE_NOTE: &str = "configuration file";
const CATALOG_NOTE: &str = "configuration and database";
const OLD_NOTE: &str = "cannot be used; the configuration before it stays in force";

/// Everything of the named tables that a refusal may depend on, as one text.
const SHAPE: &str = "
SELECT coalesce(md5(string_agg(concat_ws(',', c.oid, a.attnum, a.attname, a.atttypid, a.atttypmod, a.attnotnull, a.attgenerated, c.relrowsecurity), ';' ORDER BY c.oid, a.attnum)), '')
FROM unnest($1::text[]) AS t (name)
JOIN pg_namespace n ON n.nspname = CASE WHEN t.name LIKE '%.%' THEN split_part(t.name, '.', 1) ELSE 'public' END
JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = CASE WHEN t.name LIKE '%.%' THEN substr(t.name, strpos(t.name, '.') + 1) ELSE t.name END
JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped";

/// Everything else of the database that statements depend on: triggers, keys, indexes, defaults, rules, policies. A row that
/// is written has a newer `xmin`, one that is deleted counts no more. Temporary tables come and go with sessions.
const ATTACHED: &str = "
SELECT string_agg(count || ':' || newest, ' ' ORDER BY what) FROM (
    SELECT what, count(*), coalesce(max(version), 0) AS newest FROM (
        SELECT 'trigger' AS what, tgrelid AS oid, xmin::text::bigint AS version FROM pg_trigger
        UNION ALL SELECT 'constraint', conrelid, xmin::text::bigint FROM pg_constraint
        UNION ALL SELECT 'default', adrelid, xmin::text::bigint FROM pg_attrdef
        UNION ALL SELECT 'index', indrelid, xmin::text::bigint FROM pg_index
        UNION ALL SELECT 'rule', ev_class, xmin::text::bigint FROM pg_rewrite
        UNION ALL SELECT 'policy', polrelid, xmin::text::bigint FROM pg_policy
        UNION ALL SELECT 'parent', inhrelid, xmin::text::bigint FROM pg_inherits
    ) AS r LEFT JOIN pg_class c ON c.oid = r.oid
    WHERE c.relpersistence IS DISTINCT FROM 't' GROUP BY what) AS kinds";

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

/// The configuration file of a process. While what is in it cannot be used, what was there before stays in force.
#[derive(Debug)]
pub(crate) struct ConfigFile {
    path: PathBuf,
    health: Health,
    asides: Asides,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// What was in the file when it was last looked at; none if it could not be read.
    text: Option<String>,
    /// The last one that could be used, and which one that is.
    config: Option<(u64, Arc<Config>)>,
}

impl ConfigFile {
    /// Of a file, which is read when it is first needed.
    pub fn new(path: PathBuf, health: Health) -> ConfigFile {
        ConfigFile { path, asides: Asides::new(health.clone()), health, state: Mutex::default() }
    }

    /// The configuration in force, with a number that tells it from those before.
    ///
    /// # Errors
    /// There has been none yet.
    pub fn look(&self) -> Result<(u64, Arc<Config>), ConfigError> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let text = std::fs::read_to_string(&self.path).ok();
        let before = match &state.config {
            Some(config) if text == state.text => return Ok(config.clone()),
            Some((number, _)) => *number,
            None => 0,
        };
        match (Config::read(&self.path), &state.config) {
            (Ok(config), _) => {
                let config = (before + 1, Arc::new(config));
                self.health.set_note(FILE_NOTE, None);
                *state = State { text, config: Some(config.clone()) };
                Ok(config)
            }
            (Err(error), Some(config)) => {
                let config = config.clone();
                tracing::error!(error = chain(&error), "{FILE_NOTE}: {OLD_NOTE}");
                self.health.set_note(FILE_NOTE, Some(OLD_NOTE));
                state.text = text;
                Ok(config)
            }
            (Err(error), None) => Err(error),
        }
    }
}

/// Catalog and statements, as of one moment.
#[derive(Debug)]
pub(crate) struct Model {
    pub catalog: Catalog,
    pub statements: Statements,
    /// Made from [`Model::statements`].
    pub combined: Combined,
    pub origin: Fingerprint,
}

/// What a model was made from.
#[derive(Debug)]
pub(crate) struct Fingerprint {
    /// Names of the tables.
    tables: Vec<String>,
    shape: Observed,
}

/// What shows that the database or the configuration has changed.
#[derive(Debug, PartialEq, Eq)]
struct Observed {
    tables: String,
    /// Number of the configuration.
    config: u64,
}

async fn shape(connection: &mut PgConnection, tables: &[String]) -> Result<String, sqlx::Error> {
    sqlx::query_scalar(SHAPE).bind(tables).fetch_one(connection).await
}

impl Model {
    /// Makes it from what is there now. If that does not fit together, a model from before goes on.
    ///
    /// # Errors
    /// The database cannot be asked, or there is no model from before; `model` is then as it was.
    pub async fn renew(
        model: &mut Option<Model>,
        connection: &mut PgConnection,
        source: &ConfigFile,
    ) -> Result<(), ModelError> {
        let (number, config) = source.look().map_err(ModelError::Config)?;
        // First, since types are named by it.
        config.session.set_search_path(connection).await.map_err(ModelError::Traits)?;
        let tables: Vec<String> =
            config.tables.keys().map(String::as_str).chain(config.sources()).map(str::to_owned).collect();
        // First, so that a change meanwhile shows.
        let shape = Observed { tables: shape(connection, &tables).await.map_err(ModelError::Traits)?, config: number };
        let origin = Fingerprint { tables, shape };
        let catalog = match (Catalog::load(connection, &config, None).await, model.as_mut()) {
            (Ok(catalog), _) => catalog,
            (Err(error), Some(model)) if !matches!(error, CatalogError::Query(_)) => {
                tracing::error!(error = chain(&error), "{CATALOG_NOTE}: {OLD_NOTE}");
                source.health.set_note(CATALOG_NOTE, Some(OLD_NOTE));
                model.origin = origin;
                return Ok(());
            }
            (Err(error), _) => return Err(ModelError::Catalog(error)),
        };
        let (traits, views) = traits::load(connection, &catalog.tables).await.map_err(ModelError::Traits)?;
        source.health.set_note(CATALOG_NOTE, None);
        source.asides.tell(catalog.aside.iter().map(|aside| (aside.table.as_str(), aside.why.as_str())));
        let mut statements = Statements::new(traits, views);
        statements.settings_sql = config.session.settings_sql().map(Into::into);
        *model = Some(Model { catalog, statements, combined: Combined::default(), origin });
        Ok(())
    }
}

impl Fingerprint {
    /// Whether it is still so. Then a name that the model lacks does not exist, and a type that it has is the column's;
    /// otherwise the client may know of a column that was added meanwhile.
    pub async fn is_current(&self, connection: &mut PgConnection, source: &ConfigFile) -> Result<bool, sqlx::Error> {
        let config = source.look().map_or(self.shape.config, |(number, _)| number);
        Ok(Observed { tables: shape(connection, &self.tables).await?, config } == self.shape)
    }
}

/// Tells the workers when the configuration or the database has changed: a tighter rule must not wait until somebody is
/// refused something.
pub(crate) struct Watcher {
    pub pool: PgPool,
    pub source: Arc<ConfigFile>,
    pub changed: watch::Sender<()>,
    pub shutdown: Shutdown,
}

impl Watcher {
    /// Runs until shutdown.
    pub async fn run(self) {
        let mut looks = tokio::time::interval(LOOK);
        looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut before = None;
        loop {
            tokio::select! {
                () = self.shutdown.requested() => return,
                _ = looks.tick() => {}
            }
            let found = tokio::select! {
                () = self.shutdown.requested() => return,
                found = self.look() => found,
            };
            match found {
                Ok(found) if before.as_ref() == Some(&found) => {}
                Ok(found) => {
                    if before.replace(found).is_some() {
                        tracing::info!("the configuration or the database has changed; the catalog is read again");
                    }
                    self.changed.send_replace(());
                }
                Err(error) => tracing::debug!(error = chain(&error), "cannot look whether the database has changed"),
            }
        }
    }

    async fn look(&self) -> Result<(Option<Observed>, Option<String>), sqlx::Error> {
        // Without a configuration there are no models yet.
        let Ok((config, declared)) = self.source.look() else { return Ok((None, None)) };
        let tables: Vec<String> =
            declared.tables.keys().map(String::as_str).chain(declared.sources()).map(str::to_owned).collect();
        let mut connection = self.pool.acquire().await?;
        let shape = Observed { tables: shape(&mut connection, &tables).await?, config };
        Ok((Some(shape), sqlx::query_scalar(ATTACHED).fetch_one(&mut *connection).await?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "[tables.notes]\nscope = { kind = \"global\" }\nwrite.insert = \"true\"\n";

    #[test]
    fn a_file_that_cannot_be_used_leaves_the_one_before_in_force() {
        let path = std::env::temp_dir().join(format!("millstream-{}.toml", uuid::Uuid::new_v4().simple()));
        let health = Health::new();
        let source = ConfigFile::new(path.clone(), health.clone());
        assert!(source.look().is_err());
        std::fs::write(&path, GOOD).unwrap();
        let (first, _) = source.look().unwrap();
        assert_eq!(source.look().unwrap().0, first);
        for bad in [Some("[tables"), Some(""), None] {
            match bad {
                Some(text) => std::fs::write(&path, text).unwrap(),
                None => std::fs::remove_file(&path).unwrap(),
            }
            assert_eq!(source.look().unwrap().0, first, "{bad:?}");
            assert!(health.notes().contains(FILE_NOTE), "{bad:?}");
        }
        std::fs::write(&path, GOOD.replace("true", "false")).unwrap();
        assert_eq!(source.look().unwrap().0, first + 1);
        assert_eq!(health.notes(), "");
        std::fs::remove_file(&path).unwrap();
    }
}
