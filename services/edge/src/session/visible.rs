//! What Postgres shows of a transaction that was published: perhaps a moment before it becomes visible; and whether
//! a user still holds what was read a moment ago.

use std::time::{Duration, Instant};

use millstream_schemas::{Code, Lsn};
use uuid::Uuid;

use super::end::End;
use super::state::Session;
use crate::edge::Edge;
use crate::ledger::Ledger;
use crate::snapshot::Snapshot;

/// How long a published transaction may take to become visible, and how often to look: less often each time, up to the last.
pub const VISIBLE_WAIT: Duration = Duration::from_secs(10);
pub const VISIBLE_PAUSE: Duration = Duration::from_millis(2);
pub const VISIBLE_LONGEST_PAUSE: Duration = Duration::from_millis(100);
/// How long the ledger is waited for to show what the client knows to be confirmed.
const LEDGER_WAIT: Duration = Duration::from_millis(500);

/// What became of a client's changes, and the snapshot that says so: one that sees what the client knows to be confirmed and
/// what the stream tells of the client up to a message. Both were published, perhaps a moment before they become visible. (A
/// server that was restored never knows all that the client does.)
pub async fn settled(edge: &Edge, client_id: Uuid, confirmed_seq: u64, upto: u64) -> Result<(Snapshot, Ledger), End> {
    let unavailable = |error| End::unavailable(&error);
    let (start, mut pause, mut looked_again) = (Instant::now(), VISIBLE_PAUSE, false);
    loop {
        let mut snapshot = Snapshot::begin(&edge.pool).await.map_err(unavailable)?;
        let ledger = snapshot.ledger(client_id, confirmed_seq).await.map_err(unavailable)?;
        let unseen = edge.hub.unseen(&snapshot.fence, upto, start);
        let tells_all = unseen.iter().all(|message| message.settles(client_id).next().is_none());
        if tells_all && (ledger.last_seq >= confirmed_seq || looked_again) {
            return Ok((snapshot, ledger));
        }
        drop(snapshot);
        if start.elapsed() > VISIBLE_WAIT {
            return Err(End::retry(Code::Unavailable, "a published transaction does not become visible; try again"));
        }
        if tells_all {
            // That is the client's word alone: it is worth one more look.
            looked_again = true;
            tokio::time::sleep(LEDGER_WAIT).await;
        } else {
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(VISIBLE_LONGEST_PAUSE);
        }
    }
}

/// The end of a session whose client id is not its user's.
pub fn another_user() -> End {
    End::fatal(Code::IdentityMismatch, "this client id belongs to another user; make a new store")
}

impl Session {
    /// A snapshot in which a transaction is visible: it may be published a moment before it becomes so, and
    /// memberships read without it would miss what it grants or revokes.
    pub(super) async fn snapshot_that_sees(&self, xid: u32, commit: Lsn) -> Result<Snapshot, End> {
        let (start, mut pause) = (Instant::now(), VISIBLE_PAUSE);
        loop {
            let snapshot = Snapshot::begin(&self.edge.pool).await.map_err(|error| End::unavailable(&error))?;
            if snapshot.fence.sees(xid, commit) {
                return Ok(snapshot);
            }
            drop(snapshot);
            if start.elapsed() > VISIBLE_WAIT {
                return Err(End::retry(
                    Code::Unavailable,
                    "a published transaction does not become visible; try again",
                ));
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(VISIBLE_LONGEST_PAUSE);
        }
    }

    /// Reads what became of the client's changes up to a message while nobody was told. Gives the snapshot that says so.
    pub(super) async fn read_ledger(&mut self, upto: u64) -> Result<Snapshot, End> {
        let (snapshot, ledger) = settled(&self.edge, self.client_id, self.downlink.confirmed(), upto).await?;
        if ledger.user_id.as_ref().is_some_and(|bound| *bound != self.user_id) {
            return Err(another_user());
        }
        let cut = ledger.is_cut();
        self.downlink.ledger(snapshot.fence.lsn, ledger.confirmed(), cut);
        Ok(snapshot)
    }

    /// Somebody's first transaction under this client id was settled: whose was it?
    pub(super) async fn bind(&mut self, mut snapshot: Snapshot) -> Result<(), End> {
        let ledger = snapshot.ledger(self.client_id, u64::MAX).await.map_err(|error| End::unavailable(&error))?;
        self.is_bound = ledger.user_id.as_ref() == Some(&self.user_id);
        if self.is_bound || ledger.user_id.is_none() { Ok(()) } else { Err(another_user()) }
    }

    /// Ends the session if the user has lost a scope that it holds, or one of those that it is being sent, though the stream has
    /// not come so far: nothing more is sent of it, however slowly its client reads. To be asked while the move is in the ring.
    pub(super) async fn still_holds(&mut self) -> Result<(), End> {
        let (newest, behind) = (self.edge.hub.newest_move(), self.looked.max(self.downlink.cursor()));
        if newest <= behind {
            return Ok(());
        }
        let (moves, _) = self.edge.hub.moves_behind(behind, |message| self.downlink.may_lose(message, &self.sending));
        self.looked = newest;
        let Some(last) = moves.last() else { return Ok(()) };
        let mut snapshot = Box::pin(self.snapshot_that_sees(last.xid, last.lsn())).await?;
        let scopes = self.scopes_in(&mut snapshot).await?;
        if self.sending.iter().chain(self.downlink.scopes()).all(|scope| scopes.contains(scope)) {
            return Ok(());
        }
        Err(End::retry(Code::Unavailable, "memberships moved meanwhile; connect again"))
    }
}
