//! The rows that a session sends: those of scopes that are new to it, read for itself or for several sessions, and the rest of
//! a snapshot that was cut.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use millstream_schemas::{Code, Position, Scope};

use super::end::End;
use super::state::{Cut, Holds, Session};
use super::visible::{VISIBLE_LONGEST_PAUSE, VISIBLE_PAUSE, VISIBLE_WAIT};
use super::wire::Wire;
use crate::downlink::Out;
use crate::edge::Edge;
use crate::fence::Fence;
use crate::message::Message;
use crate::moment::{Apart, ScopeFrames};
use crate::resume::{Mark, Seal, Token, moment_of};
use crate::shares::Turn;
use crate::snapshot::{Snapshot, SnapshotError, begin_frame};

/// A client that could not go on with a snapshot, but had to begin again, gets this many times as long for it.
const WHOLE: u32 = 10;

/// Rows that are to be sent, and what they are as of.
struct Joining {
    scopes: BTreeSet<Scope>,
    fence: Arc<Fence>,
    /// Messages that the rows may lack.
    back: Vec<Arc<Message>>,
    source: RowsFrom,
}

/// Where rows come from.
enum RowsFrom {
    /// None are needed.
    Nothing,
    /// A snapshot of the session's own, with its number of rows, and the turn to read it.
    Own(Snapshot, u64, Turn),
    /// What is read for several sessions, and how many rows that is.
    Shared(Vec<Arc<ScopeFrames>>, u64),
}

impl Session {
    /// Takes the user's scopes as read in `snapshot`, and sends the rows of those that are new.
    pub(super) async fn join(
        &mut self,
        wire: &mut Wire,
        snapshot: Snapshot,
        scopes: BTreeSet<Scope>,
    ) -> Result<(), End> {
        let edge = self.edge.clone();
        let Joining { scopes, fence, back, source } = self.joining(&edge, wire, snapshot, scopes).await?;
        let (in_bracket, held) = (self.downlink.in_bracket(), self.downlink.scopes().count());
        let new = self.downlink.authorized(&scopes, fence.clone(), &mut self.out);
        if in_bracket && (!new.is_empty() || self.downlink.scopes().count() != held) {
            // Memberships moved in a transaction that was published before it became visible to the open snapshot.
            return Err(End::retry(Code::Unavailable, "memberships moved during a snapshot; connect again"));
        }
        if !new.is_empty() {
            let apart = matches!(source, RowsFrom::Shared(..));
            // Only where it is all that the client has: what it held before is not as of this moment.
            let from = self.behind_unseen(&back).filter(|_| held == 0);
            let token = from.map(|from| Token::new(from, &fence, &self.known.catalog.version, &new, apart));
            let token = token.and_then(|token| token.encode(&edge.sealer, &self.user_id, self.client_id));
            let until = self.until(token.is_some());
            self.sending.clone_from(&new);
            match source {
                RowsFrom::Own(snapshot, rows, turn) => {
                    self.out.push(Out::Own(begin_frame(&new, rows, token, false)));
                    let seal = edge.sealer.seal(&moment_of(&fence, &self.known.catalog.version));
                    self.send_own(wire, (snapshot, turn), false, None, seal).await?;
                }
                RowsFrom::Shared(parts, rows) => {
                    self.out.push(Out::Own(begin_frame(&new, rows, token, false)));
                    self.send_shared(wire, &parts, until).await?;
                }
                RowsFrom::Nothing => {
                    return Err(End::retry(Code::Unavailable, "memberships moved meanwhile; connect again"));
                }
            }
            self.sending.clear();
            self.downlink.joined(new, &fence, &back);
        }
        self.membership.set_scopes(self.downlink.scopes());
        Ok(())
    }

    /// Where the stream has everything behind it that a moment does not see; none if that is not known any more.
    fn behind_unseen(&self, unseen: &[Arc<Message>]) -> Option<Position> {
        let Some(first) = unseen.first() else { return Some(self.downlink.position()) };
        let before = self.edge.hub.at(first.position.stream_seq.checked_sub(1)?)?;
        before.last.then_some(before.position)
    }

    /// Goes on with a snapshot that was cut: rows behind the mark as of now, and the stream from where it began.
    pub(super) async fn resume(
        &mut self,
        wire: &mut Wire,
        scopes: Vec<Scope>,
        cut: Cut,
        mut snapshot: Snapshot,
    ) -> Result<(), End> {
        let edge = self.edge.clone();
        let mut rows = self.count(wire, &mut snapshot, &scopes).await?;
        let turn = match edge.shares.try_turn(&self.place, rows) {
            Some(turn) => turn,
            None => {
                drop(snapshot);
                let turn = wire.alive(edge.shares.turn(&self.place, rows)).await?.ok_or(End::Gone)?;
                snapshot = Snapshot::begin(&edge.pool).await.map_err(|error| End::unavailable(&error))?;
                let now: Vec<Scope> = self.scopes_in(&mut snapshot).await?.into_iter().collect();
                if now != scopes {
                    return Err(End::retry(Code::Unavailable, "memberships moved during a snapshot; connect again"));
                }
                rows = self.count(wire, &mut snapshot, &scopes).await?;
                turn
            }
        };
        let until = Arc::new(snapshot.fence.clone());
        self.downlink.authorized(&scopes.iter().cloned().collect(), until.clone(), &mut self.out);
        let token = cut.token.encode(&edge.sealer, &self.user_id, self.client_id);
        self.out.push(Out::Own(begin_frame(&scopes, rows, token, true)));
        let seal = edge.sealer.seal(&cut.token.moment());
        self.sending.clone_from(&scopes);
        self.send_own(wire, (snapshot, turn), cut.token.apart, Some(cut.mark), seal).await?;
        self.sending.clear();
        self.downlink.resumed(scopes, &cut.fence, until.lsn, &mut self.out);
        self.membership.set_scopes(self.downlink.scopes());
        Ok(())
    }

    async fn count(&self, wire: &mut Wire, snapshot: &mut Snapshot, scopes: &[Scope]) -> Result<u64, End> {
        wire.alive(snapshot.count(&self.known.catalog, scopes)).await?.map_err(|error| End::unavailable(&error))
    }

    /// Finds where the rows come from, and a moment at which scopes and rows go with the stream behind the cursor.
    async fn joining(
        &self,
        edge: &Arc<Edge>,
        wire: &mut Wire,
        mut snapshot: Snapshot,
        mut scopes: BTreeSet<Scope>,
    ) -> Result<Joining, End> {
        let begin = async || Snapshot::begin(&edge.pool).await.map_err(|error| End::unavailable(&error));
        let (mut turn, start, mut pause) = (None, Instant::now(), VISIBLE_PAUSE);
        loop {
            // Now, while what the snapshot may not see is still young enough to be in the ring.
            let fence = Arc::new(snapshot.fence.clone());
            let back = edge.hub.unseen(&fence, self.downlink.cursor(), Instant::now());
            if !edge.hub.reaches_back_to(fence.lsn) {
                drop(snapshot);
                if start.elapsed() > VISIBLE_WAIT {
                    return Err(End::retry(
                        Code::Unavailable,
                        "the stream does not reach back to a snapshot; try again",
                    ));
                }
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(VISIBLE_LONGEST_PAUSE);
                snapshot = begin().await?;
            } else if let Some(message) = self.downlink.outdates(&fence, &scopes, &back) {
                drop(snapshot);
                snapshot = self.snapshot_that_sees(message.xid, message.lsn()).await?;
            } else {
                let new = self.downlink.lacks(&scopes);
                if new.is_empty() {
                    return Ok(Joining { scopes, fence, back, source: RowsFrom::Nothing });
                }
                let shared = snapshot.adopted.as_ref().and_then(|adopted| edge.shared.parts(adopted, &new).ok());
                // Nobody holds a connection while waiting, else sessions without rows could not open.
                if let Some(parts) = shared {
                    drop(snapshot);
                    if let Ok(rows) = wire.alive(count(&parts)).await? {
                        return Ok(Joining { scopes, fence, back, source: RowsFrom::Shared(parts, rows) });
                    }
                } else {
                    let rows = self.count(wire, &mut snapshot, &new).await?;
                    match turn.take().or_else(|| edge.shares.try_turn(&self.place, rows)) {
                        Some(turn) => {
                            let source = RowsFrom::Own(snapshot, rows, turn);
                            return Ok(Joining { scopes, fence, back, source });
                        }
                        None => {
                            drop(snapshot);
                            turn = wire.alive(edge.shares.turn(&self.place, rows)).await?;
                        }
                    }
                }
                snapshot = begin().await?;
            }
            scopes = self.scopes_in(&mut snapshot).await?;
        }
    }

    /// Until when a client may take rows that are kept in memory for it.
    fn until(&self, can_go_on: bool) -> Instant {
        Instant::now() + self.edge.snapshot_time * if can_go_on { 1 } else { WHOLE }
    }

    /// Sends what waits, then rows as fast as the client takes them; they are read as fast as Postgres gives them.
    async fn send_own(
        &mut self,
        wire: &mut Wire,
        (snapshot, turn): (Snapshot, Turn),
        apart: bool,
        behind: Option<Mark>,
        seal: Seal,
    ) -> Result<(), End> {
        let (mut writer, mut reader) = self.edge.spool.open(self.place.spool.clone());
        let (known, wanted) = (self.known.clone(), self.sending.clone());
        let framing = self.edge.shared.framing(seal);
        let reading = tokio::spawn(async move {
            let read = snapshot.rows(&known.catalog, &wanted, apart, behind, &framing, &mut writer).await;
            drop(turn);
            read
        });
        let held = std::mem::replace(&mut self.holds, Holds::Spooled);
        self.flush(wire).await?;
        loop {
            self.credit(wire).await?;
            let frame = wire.alive(reader.next()).await?;
            let Some(frame) = frame.map_err(|error| End::unavailable(&error))? else { break };
            self.still_holds().await?;
            wire.send(&[Out::Shared(frame.into())]).await?;
        }
        self.holds = held;
        match reading.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(SnapshotError::Gone)) => Err(End::retry(
                Code::SlowConsumer,
                "no more rows can be kept for so slow a client; connect again to go on",
            )),
            Ok(Err(error)) => Err(End::unavailable(&error)),
            Err(error) => Err(End::unavailable(&error)),
        }
    }

    /// Sends what waits, then rows that are read for others too.
    async fn send_shared(&mut self, wire: &mut Wire, parts: &[Arc<ScopeFrames>], until: Instant) -> Result<(), End> {
        let held = std::mem::replace(&mut self.holds, Holds::Rows(until));
        self.flush(wire).await?;
        for part in parts {
            let mut index = 0;
            loop {
                let frame = wire.alive(part.frame(index)).await?;
                let frame =
                    frame.map_err(|Apart| End::retry(Code::Unavailable, "a snapshot was cut; connect again"))?;
                let Some(frame) = frame else { break };
                self.credit(wire).await?;
                self.lets_go(Duration::ZERO)?;
                self.still_holds().await?;
                wire.send(&[Out::Shared(frame)]).await?;
                index += 1;
            }
        }
        self.holds = held;
        Ok(())
    }
}

/// How many rows parts have together.
async fn count(parts: &[Arc<ScopeFrames>]) -> Result<u64, Apart> {
    let mut rows = 0;
    for part in parts {
        rows += part.rows().await?;
    }
    Ok(rows)
}
