//! All that the sessions of an edge have in common.

use std::sync::Arc;
use std::time::Duration;

use millstream_runtime::nats::Nats;
use millstream_runtime::shutdown::Shutdown;
use sqlx::PgPool;
use tokio::sync::Semaphore;

use crate::catalogs::Catalogs;
use crate::catchup::CatchUps;
use crate::evictions::Evictions;
use crate::hub::Hub;
use crate::lane::Lanes;
use crate::resume::Sealer;
use crate::shared::Shared;
use crate::shares::{Shares, Strangers};
use crate::spool::Spool;
use crate::token::Verifier;
use crate::watermark::Watermarks;

/// What all sessions share.
pub struct Edge {
    pub catalogs: Arc<Catalogs>,
    pub pool: PgPool,
    pub nats: Nats,
    pub hub: Arc<Hub>,
    pub lanes: Lanes,
    pub watermarks: Watermarks,
    pub verifier: Verifier,
    pub evictions: Arc<Evictions>,
    /// Knows what edges gave to clients to keep.
    pub sealer: Sealer,
    pub shares: Shares,
    pub strangers: Strangers,
    /// How long a client may take for rows that are kept in memory for it.
    pub snapshot_time: Duration,
    pub shared: Arc<Shared>,
    pub spool: Arc<Spool>,
    /// Room for what waits for slow clients, in KiB.
    pub unsent: Arc<Semaphore>,
    pub catch_ups: CatchUps,
    pub shutdown: Shutdown,
}
