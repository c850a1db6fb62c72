//! A session, as its parts know it: who the client is, where it stands, and what waits for it.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use millstream_schemas::Scope;
use millstream_schemas::stream::TransactionResult;
use tokio::sync::mpsc;
use uuid::Uuid;

use super::end::End;
use super::unsettled::Unsettled;
use crate::catalogs::Loaded;
use crate::downlink::{Downlink, Out};
use crate::edge::Edge;
use crate::fence::Fence;
use crate::hub::Seat;
use crate::resume::{Mark, Token};
use crate::shares::Place;
use crate::snapshot::Snapshot;

/// Messages of the ring handled at once.
pub const PUMP: usize = 256;

/// A session that has been welcomed.
pub struct Session {
    pub edge: Arc<Edge>,
    pub id: Uuid,
    pub client_id: Uuid,
    pub user_id: String,
    /// Its share of the edge.
    pub place: Place,
    /// Whether the ledger says that the client is this user's; before its first transaction nobody knows.
    pub is_bound: bool,
    /// The catalog whose schema the client has.
    pub known: Arc<Loaded>,
    pub membership: Seat,
    pub downlink: Downlink,
    /// How its rows are brought up to date, until that has begun.
    pub start: Option<Start>,
    /// Up to which message moved memberships have been looked for ahead of the cursor.
    pub looked: u64,
    pub results: mpsc::Receiver<TransactionResult>,
    pub stored: (mpsc::Sender<u64>, mpsc::Receiver<u64>),
    /// The next `client_seq` that may be forwarded: a lane must not get holes from us.
    pub expected: u64,
    /// The run that submitted the transaction before it, if that is known.
    pub last_run: Option<Uuid>,
    /// Up to which `client_seq` the broker has what was forwarded.
    pub accepted: u64,
    /// What was forwarded and is not known to be settled.
    pub unsettled: Unsettled,
    /// The last submission that was not taken because of an overload or a gap, since one was taken.
    pub passed_over: Option<u64>,
    pub refusals: u32,
    /// What others wait for.
    pub holds: Holds,
    /// The scopes of the snapshot that is being sent.
    pub sending: Vec<Scope>,
    /// The client is not read before.
    pub deaf_until: Option<Instant>,
    pub out: Vec<Out>,
}

/// What a session holds that others wait for.
pub enum Holds {
    /// Nothing.
    Nothing,
    /// Room to catch up, since then.
    CatchUp(Instant),
    /// Rows that are kept in memory for it, until then.
    Rows(Instant),
    /// Rows that are kept in a file.
    Spooled,
}

/// What a client claims to have, as of a position, is looked at once everything is in the stream that was visible when its
/// memberships were read.
pub struct Start {
    /// The moment at which `scopes` was read.
    pub fence: Arc<Fence>,
    pub scopes: BTreeSet<Scope>,
    /// A snapshot that may go on.
    pub cut: Option<Cut>,
}

/// A snapshot that was cut, and can go on.
pub struct Cut {
    pub token: Token,
    pub mark: Mark,
    /// The moment at which it began.
    pub fence: Arc<Fence>,
}

impl Session {
    pub(super) async fn scopes_in(&self, snapshot: &mut Snapshot) -> Result<BTreeSet<Scope>, End> {
        let scopes = snapshot.scopes(&self.known.catalog, &self.user_id).await;
        scopes.map_err(|error| End::unavailable(&error))
    }
}
