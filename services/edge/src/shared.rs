//! Snapshots of clients that start together: one moment, whose rows are read and encoded once a scope.
//!
//! Whoever starts within [`WINDOW`] of the first adopts its moment by an exported snapshot (PostgreSQL documentation,
//! "Snapshot Synchronization Functions"), so all of a client's scopes are as of one fence. Rows are kept in memory until
//! the last of these clients has them; no client waits for a slower one, and none keeps a transaction open.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use millstream_runtime::error::chain;
use millstream_schemas::Scope;
use sqlx::PgPool;
use tokio::sync::{Semaphore, mpsc};

use crate::catalogs::Loaded;
use crate::copy::Framing;
use crate::moment::{Adopted, Apart, Moment, ScopeFrames};
use crate::resume::{Seal, Sealer, moment_of};
use crate::snapshot::{SNAPSHOT_FRAMES, Snapshot, SnapshotError};
use crate::unwritable::Unwritable;

/// Clients that connect within this window share one snapshot.
const WINDOW: Duration = Duration::from_secs(1);
/// Most bytes of rows that are kept.
const MAX_BYTES: usize = 50 << 20;
/// Most rows of a scope that are shared, and most scopes of a client: each is read by statements of its own.
const MAX_ROWS: u64 = 250_000;
const MAX_SCOPES: usize = 16;
/// How long a scope that was found too large to share is read for each session by itself.
const APART: Duration = Duration::from_secs(300);

/// What sessions share.
pub struct Shared {
    pool: PgPool,
    sealer: Sealer,
    row_limit: usize,
    unwritable: Unwritable,
    newest: tokio::sync::Mutex<Option<Adopted>>,
    /// Scopes that are too large, each with when that was found.
    apart: Mutex<HashMap<Scope, Instant>>,
    /// Snapshots that are read at once.
    reads: Semaphore,
    /// Room for rows, in bytes.
    room: Arc<Semaphore>,
}

impl Shared {
    /// Shares what is read through `pool`, by at most `reads` readers at once.
    pub fn new(pool: PgPool, sealer: Sealer, row_limit: usize, reads: usize) -> Arc<Shared> {
        let reads = Semaphore::new(reads);
        let room = Arc::new(Semaphore::new(MAX_BYTES));
        Arc::new(Shared {
            pool,
            sealer,
            row_limit,
            unwritable: Unwritable::default(),
            newest: tokio::sync::Mutex::default(),
            apart: Mutex::default(),
            reads,
            room,
        })
    }

    /// How rows become frames, for everybody.
    pub fn framing(&self, seal: Seal) -> Framing {
        Framing { seal, row_limit: self.row_limit, unwritable: self.unwritable.clone() }
    }

    /// A snapshot of the moment at which others start, or of a new one.
    ///
    /// # Errors
    /// Postgres cannot be reached.
    pub async fn begin(self: &Arc<Self>, known: &Arc<Loaded>) -> Result<Snapshot, SnapshotError> {
        let adopted = self.moment(known).await?;
        Snapshot::adopt(&self.pool, adopted).await
    }

    async fn moment(self: &Arc<Self>, known: &Arc<Loaded>) -> Result<Adopted, SnapshotError> {
        // Held while one begins: whoever comes meanwhile joins it.
        let mut newest = self.newest.lock().await;
        let joined = newest
            .as_ref()
            .filter(|adopted| adopted.moment.begun.elapsed() < WINDOW && Arc::ptr_eq(&adopted.moment.known, known));
        if let Some(adopted) = joined {
            return Ok(adopted.clone());
        }
        let begun = Instant::now();
        let (exporter, fence) = Snapshot::export(&self.pool).await?;
        let moment = Arc::new(Moment::new(fence, known.clone(), begun));
        let (shared, old) = (self.clone(), Arc::downgrade(&moment));
        tokio::spawn(async move {
            tokio::time::sleep(WINDOW).await;
            let mut newest = shared.newest.lock().await;
            if newest.as_ref().is_some_and(|newest| std::ptr::eq(Arc::as_ptr(&newest.moment), old.as_ptr())) {
                *newest = None;
            }
        });
        Ok(newest.insert(Adopted { moment, exporter: Arc::new(exporter) }).clone())
    }

    /// The rows of these scopes as of a moment; what nobody has asked for is read from now on.
    ///
    /// # Errors
    /// They are too many, or some are known to be too large.
    pub fn parts(self: &Arc<Self>, adopted: &Adopted, scopes: &[Scope]) -> Result<Vec<Arc<ScopeFrames>>, Apart> {
        let mut apart = self.known_apart();
        apart.retain(|_, found| found.elapsed() < APART);
        if scopes.len() > MAX_SCOPES || scopes.iter().any(|scope| apart.contains_key(scope)) {
            return Err(Apart);
        }
        drop(apart);
        let part = |scope: &Scope| {
            adopted.moment.part(scope, |part| {
                tokio::spawn(self.clone().read(adopted.clone(), scope.clone(), part));
            })
        };
        Ok(scopes.iter().map(part).collect())
    }

    fn known_apart(&self) -> MutexGuard<'_, HashMap<Scope, Instant>> {
        self.apart.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads a scope's rows, with no regard to how fast they are taken.
    async fn read(self: Arc<Self>, adopted: Adopted, scope: Scope, part: Arc<ScopeFrames>) {
        let whole = match self.fill(adopted, &scope, &part).await {
            Ok(whole) => whole,
            Err(error) => {
                tracing::warn!(error = chain(&error), "a shared snapshot cannot be read");
                false
            }
        };
        part.end(whole);
    }

    /// Gives whether all rows are there; not so if they are too large.
    async fn fill(&self, adopted: Adopted, scope: &Scope, part: &ScopeFrames) -> Result<bool, SnapshotError> {
        let (known, scopes) = (adopted.moment.known.clone(), [scope.clone()]);
        let mut rows = 0;
        if known.catalog.synced().any(|table| table.row_scope_columns().any(|of| of.kind == scope.kind)) {
            let Ok(_permit) = self.reads.acquire().await else { return Ok(false) };
            let mut snapshot = Snapshot::adopt(&self.pool, adopted).await?;
            rows = snapshot.count(&known.catalog, &scopes).await?;
            if rows > MAX_ROWS {
                self.known_apart().insert(scope.clone(), Instant::now());
                return Ok(false);
            }
            // Not before: who has been told how many there are gets them.
            part.set_rows(rows);
            let seal = self.sealer.seal(&moment_of(&snapshot.fence, &known.catalog.version));
            let framing = self.framing(seal);
            let (mut sender, mut frames) = mpsc::channel::<String>(SNAPSHOT_FRAMES);
            let keep = async move {
                while let Some(frame) = frames.recv().await {
                    let room =
                        u32::try_from(frame.len()).ok().map(|bytes| self.room.clone().try_acquire_many_owned(bytes));
                    let Some(Ok(room)) = room else { return false };
                    part.push(frame.into(), room);
                }
                true
            };
            let reading = async move {
                match snapshot.rows(&known.catalog, &scopes, true, None, &framing, &mut sender).await {
                    // Nobody keeps the rows: there is no room.
                    Err(SnapshotError::Gone) => Ok(()),
                    read => read,
                }
            };
            let (read, kept) = tokio::join!(reading, keep);
            read?;
            if !kept {
                self.known_apart().insert(scope.clone(), Instant::now());
                return Ok(false);
            }
        }
        part.set_rows(rows);
        Ok(true)
    }
}
