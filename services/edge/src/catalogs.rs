//! The catalog that sessions work with. Replication says in each message by which schema its rows are encoded, and begins a
//! new epoch when their layout changes; here the catalog is read anew to follow it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use millstream_catalog::{Catalog, CatalogError, Config, ConfigError, layout};
use millstream_runtime::backoff::Backoff;
use millstream_runtime::error::chain;
use millstream_runtime::health::{Asides, Health};
use millstream_runtime::shutdown::Shutdown;
use sqlx::PgPool;
use tokio::sync::{Mutex, watch};

use crate::hub::Hub;
use crate::reach::Reach;

/// Shortest time between two looks that sessions ask for.
const PAUSE: Duration = Duration::from_millis(500);

/// Why the catalog cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// See [`ConfigError`].
    #[error("cannot read the configuration")]
    Config(#[from] ConfigError),
    /// See [`CatalogError`].
    #[error("cannot read the catalog")]
    Catalog(#[from] CatalogError),
}

/// A catalog, and what is made from it.
#[derive(Debug)]
pub struct Loaded {
    /// The catalog.
    pub catalog: Catalog,
    /// Which scopes a moved membership concerns.
    pub reach: Arc<Reach>,
}

impl Loaded {
    /// Whether the newest rows of the stream are encoded in its layout. Asked after the head was read, it holds for the head's
    /// epoch: an epoch has one layout, and a message shows its schema before it becomes the head.
    pub fn agrees(&self, hub: &Hub) -> bool {
        hub.schema().borrow().as_ref().is_none_or(|schema| layout(schema) == layout(&self.catalog.version))
    }
}

/// The catalog that holds at the moment.
pub struct Catalogs {
    config: PathBuf,
    publication: String,
    pool: PgPool,
    asides: Asides,
    known: watch::Sender<Arc<Loaded>>,
    /// When it was looked last.
    looked: Mutex<Instant>,
}

impl Catalogs {
    /// Reads the catalog, waiting for Postgres; none on shutdown.
    ///
    /// # Errors
    /// The configuration cannot be used.
    pub async fn start(
        config: PathBuf,
        publication: String,
        pool: PgPool,
        health: &Health,
        shutdown: &Shutdown,
    ) -> Result<Option<Catalogs>, LoadError> {
        let mut backoff = Backoff::dependency();
        let asides = Asides::new(health.clone());
        loop {
            match load(&config, &publication, &pool).await {
                Ok(known) => {
                    tell(&asides, &known.catalog);
                    let (known, looked) = (watch::Sender::new(Arc::new(known)), Mutex::new(Instant::now()));
                    return Ok(Some(Catalogs { config, publication, pool, asides, known, looked }));
                }
                Err(LoadError::Catalog(CatalogError::Query(error))) => tracing::warn!(%error, "waiting for Postgres"),
                Err(error) => return Err(error),
            }
            tokio::select! {
                () = tokio::time::sleep(backoff.next()) => {}
                () = shutdown.requested() => return Ok(None),
            }
        }
    }

    /// Tells of every other catalog than the one that is read first.
    pub fn subscribe(&self) -> watch::Receiver<Arc<Loaded>> {
        self.known.subscribe()
    }

    /// The catalog in whose layout the newest rows of the stream are encoded; none if the database or our configuration
    /// has another.
    ///
    /// # Errors
    /// It cannot be read.
    pub async fn agreeing(&self, hub: &Hub) -> Result<Option<Arc<Loaded>>, LoadError> {
        let agreeing = || {
            let known = self.known.borrow().clone();
            known.agrees(hub).then_some(known)
        };
        if let Some(known) = agreeing() {
            return Ok(Some(known));
        }
        let mut looked = self.looked.lock().await;
        if agreeing().is_none() && looked.elapsed() > PAUSE {
            self.look().await?;
            *looked = Instant::now();
        }
        Ok(agreeing())
    }

    /// Reads configuration and database; sessions are told if something has changed.
    async fn look(&self) -> Result<(), LoadError> {
        let found = load(&self.config, &self.publication, &self.pool).await?;
        tell(&self.asides, &found.catalog);
        self.known.send_if_modified(|known| {
            let changed = known.catalog.version != found.catalog.version;
            if changed {
                tracing::info!(schema = found.catalog.version, "the synced tables have changed");
                *known = Arc::new(found);
            }
            changed
        });
        Ok(())
    }

    /// Looks when the stream's schema changes, until shutdown.
    pub async fn run(self: Arc<Self>, hub: Arc<Hub>, shutdown: Shutdown) {
        let mut newest = hub.schema();
        loop {
            tokio::select! {
                changed = newest.changed() => if changed.is_err() { return },
                () = shutdown.requested() => return,
            }
            let mut backoff = Backoff::dependency();
            while newest
                .borrow_and_update()
                .as_ref()
                .is_some_and(|schema| *schema != self.known.borrow().catalog.version)
            {
                match self.look().await {
                    Ok(()) => break,
                    Err(error) => {
                        tracing::warn!(error = chain(&error), "the synced tables have changed; cannot read them")
                    }
                }
                tokio::select! {
                    () = tokio::time::sleep(backoff.next()) => {}
                    () = shutdown.requested() => return,
                }
            }
        }
    }
}

fn tell(asides: &Asides, catalog: &Catalog) {
    asides.tell(catalog.aside.iter().map(|aside| (aside.table.as_str(), aside.why.as_str())));
}

async fn load(config: &Path, publication: &str, pool: &PgPool) -> Result<Loaded, LoadError> {
    let config = Config::read(config)?;
    let mut connection = pool.acquire().await.map_err(CatalogError::Query)?;
    let catalog = Catalog::load(&mut connection, &config, Some(publication)).await?;
    let reach = Arc::new(Reach::new(catalog.memberships().map(|(_, membership)| membership)));
    Ok(Loaded { catalog, reach })
}
