//! A session whose client is behind: what it claims to have is checked, and what the ring no longer holds is fetched.

use std::time::{Duration, Instant};

use millstream_schemas::stream::Watermark;
use millstream_schemas::{Code, Lsn, Scope};

use super::end::End;
use super::open::downlink_at_head;
use super::state::{Holds, PUMP, Session};
use super::wire::Wire;
use crate::catchup::Merge;
use crate::fence::Fence;
use crate::history::Past;
use crate::hub::READ_BYTES;
use crate::snapshot::Snapshot;

impl Session {
    /// Whether the ring no longer holds what comes next.
    pub(super) fn is_behind(&self) -> bool {
        self.edge.hub.oldest().is_some_and(|oldest| self.downlink.cursor() + 1 < oldest.stream_seq)
    }

    /// Fetches what the ring no longer holds, scope by scope, and sends it in stream order; then reads the ledger. Gives the
    /// snapshot that it is of.
    pub(super) async fn catch_up(&mut self, wire: &mut Wire) -> Result<Snapshot, End> {
        self.membership.set_scopes(self.downlink.scopes());
        let edge = self.edge.clone();
        let _turn = wire.alive(self.place.catch_up()).await?;
        let room = edge.catch_ups.room(self.downlink.followed().len());
        let _room = wire.alive(room).await?;
        self.holds = Holds::CatchUp(Instant::now());
        self.downlink.mute();
        while let Some(oldest) = edge.hub.oldest()
            && self.downlink.cursor() + 1 < oldest.stream_seq
        {
            let from = self.downlink.cursor() + 1;
            let scopes: Vec<Scope> = self.downlink.followed().into_iter().cloned().collect();
            let merge = Merge::new(&edge.nats, &edge.catch_ups, scopes.iter(), from, oldest.stream_seq);
            let mut merge = wire.alive(merge).await?.map_err(End::too_far)?;
            let mut bytes = 0;
            while let Some(message) = wire.alive(merge.next()).await?.map_err(End::too_far)? {
                self.end_before(wire, message.lsn()).await?;
                self.feed(wire, &message).await?;
                bytes += message.weight();
                if self.out.len() >= PUMP || bytes > READ_BYTES {
                    bytes = 0;
                    self.flush(wire).await?;
                    self.still_holds().await?;
                    self.lets_go(Duration::ZERO)?;
                }
            }
            wire.alive(merge.complete()).await?.map_err(End::too_far)?;
            // Where the ring began inside a transaction, its end will come from there.
            self.end_before(wire, oldest.lsn).await?;
            self.downlink.skip_to(oldest.stream_seq - 1);
            self.flush(wire).await?;
        }
        self.holds = Holds::Nothing;
        self.read_ledger(self.downlink.cursor()).await
    }

    /// Begins to bring the client's rows up to date, once it can be known which of its claims hold. False: not yet.
    pub(super) async fn begin(&mut self, wire: &mut Wire) -> Result<bool, End> {
        let Some(start) = self.start.take() else { return Ok(true) };
        let edge = self.edge.clone();
        if !self.has_reached(start.fence.lsn) {
            self.start = Some(start);
            return Ok(false);
        }
        // Nothing is held for the client while it is told what it lost.
        self.flush(wire).await?;
        self.downlink.listen(&start.scopes);
        let past = {
            let _turn = wire.alive(self.place.catch_up()).await?;
            let reading = Past::read(&edge, &self.known.reach, self.downlink.cursor(), &start.scopes);
            wire.alive(reading).await?.map_err(End::too_far)?
        };
        let moved = |scope: &Scope, since: Option<&Fence>| past.moved(&self.known.reach, scope, since);
        let claims: Vec<Scope> = self.downlink.scopes().filter(|scope| moved(scope, None)).cloned().collect();
        let goes_on = match start.cut {
            Some(cut) if start.scopes.iter().any(|scope| moved(scope, Some(&cut.fence))) => false,
            Some(cut) => {
                let mut snapshot = Snapshot::begin(&edge.pool).await.map_err(|error| End::unavailable(&error))?;
                let now = self.scopes_in(&mut snapshot).await?;
                if now == start.scopes {
                    self.resume(wire, now.into_iter().collect(), cut, snapshot).await?;
                    if self.is_behind() {
                        self.catch_up(wire).await?;
                    }
                    return Ok(true);
                }
                false
            }
            None => true,
        };
        if !goes_on || (self.is_behind() && !claims.is_empty()) {
            // From the start, at the stream's end: all of it is as of one moment.
            let (confirmed, held) = (self.downlink.confirmed(), self.downlink.scopes().cloned().collect::<Vec<_>>());
            self.downlink = downlink_at_head(&edge, self.client_id, &self.user_id, &self.known, &start.fence)?;
            self.downlink.knows(confirmed);
            held.into_iter().for_each(|scope| self.downlink.disclaim(scope));
            let mut snapshot = self.read_ledger(self.downlink.cursor()).await?;
            let scopes = self.scopes_in(&mut snapshot).await?;
            self.join(wire, snapshot, scopes).await?;
            return Ok(true);
        }
        claims.into_iter().for_each(|scope| self.downlink.disclaim(scope));
        if self.is_behind() {
            let mut snapshot = self.catch_up(wire).await?;
            let scopes = self.scopes_in(&mut snapshot).await?;
            self.join(wire, snapshot, scopes).await?;
        } else if start.scopes.iter().all(|scope| self.downlink.holds(scope)) {
            self.downlink.authorized(&start.scopes, start.fence, &mut self.out);
            self.membership.set_scopes(self.downlink.scopes());
        } else {
            let mut snapshot = Snapshot::begin(&edge.pool).await.map_err(|error| End::unavailable(&error))?;
            let scopes = self.scopes_in(&mut snapshot).await?;
            self.join(wire, snapshot, scopes).await?;
        }
        Ok(true)
    }

    /// Whether everything that committed before an LSN is in the ring, or was.
    pub(super) fn has_reached(&self, lsn: Lsn) -> bool {
        let Some(head) = *self.edge.hub.head().borrow() else { return false };
        let watermark = *self.edge.watermarks.subscribe().borrow();
        let passed = |watermark: Watermark| {
            watermark.epoch == head.epoch && watermark.lsn >= lsn && head.stream_seq >= watermark.stream_seq
        };
        head.lsn >= lsn || watermark.is_some_and(passed)
    }

    /// The cursor is older than the ring: from live to catch-up.
    pub(super) async fn fell_behind(&mut self, wire: &mut Wire) -> Result<(), End> {
        let behind = || End::retry(Code::SlowConsumer, "the live stream was interrupted; connect again to catch up");
        let head = (*self.edge.hub.head().borrow()).ok_or_else(behind)?;
        if head.epoch != self.downlink.epoch() || head.stream_seq < self.downlink.cursor() {
            return Err(End::retry(Code::EpochChanged, "the server began a new history; a snapshot follows"));
        }
        self.catch_up(wire).await.map(drop)
    }
}
