//! What a session sends, as far as the client's credit goes. While that is used up the client is heard: a client that is slow to
//! take rows still gets its changes through. What others wait for is not held for as long as it likes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use millstream_schemas::Code;

use super::end::End;
use super::state::{Holds, Session};
use super::uplink::deaf;
use super::wire::{PING_INTERVAL, Wire};

/// How long a catch-up may take what others wait for.
const CATCH_UP_TURN: Duration = Duration::from_secs(10);
/// How often a session without credit looks whether it has to let go of what others wait for.
const LOOK: Duration = Duration::from_secs(1);

impl Session {
    /// Sends what is ready.
    pub(super) async fn flush(&mut self, wire: &mut Wire) -> Result<(), End> {
        let mut sent = 0;
        while sent < self.out.len() {
            if !wire.has_credit() {
                // By then the ring may have moved on.
                let is_live = std::mem::take(&mut wire.is_live);
                let _room = wire.room(&self.out[sent..])?;
                Box::pin(self.credit(wire)).await?;
                wire.is_live = is_live;
            }
            sent += wire.send_some(&self.out[sent..]).await?;
        }
        self.out.clear();
        Ok(())
    }

    /// The same for what the ring holds: that is the edge's memory, not what is kept for this client.
    pub(super) async fn flush_live(&mut self, wire: &mut Wire) -> Result<(), End> {
        wire.is_live = true;
        let sent = self.flush(wire).await;
        wire.is_live = false;
        sent
    }

    /// Waits until the client's credit allows for more rows. Meanwhile all but rows goes on as usual.
    pub(super) async fn credit(&mut self, wire: &mut Wire) -> Result<(), End> {
        if wire.has_credit() {
            return Ok(());
        }
        let (mut looks, mut pings) = (tokio::time::interval(LOOK), tokio::time::interval(PING_INTERVAL));
        pings.tick().await;
        let since = Instant::now();
        while !wire.has_credit() {
            wire.answer().await?;
            tokio::select! {
                frame = wire.next(), if self.deaf_until.is_none() => self.heard(wire, frame).await?,
                () = deaf(self.deaf_until), if self.deaf_until.is_some() => {
                    self.deaf_until = None;
                    wire.heard = Instant::now();
                }
                Some(client_seq) = self.stored.1.recv() => self.stored(wire, client_seq).await?,
                Some(result) = self.results.recv() => self.told(wire, result).await?,
                _ = looks.tick() => {
                    self.lets_go(since.elapsed())?;
                    self.still_holds().await?;
                }
                _ = pings.tick() => wire.beat().await?,
            }
        }
        // A right that was lost since the last look.
        self.still_holds().await
    }

    /// Ends a session that takes too long over what others wait for, or that may not go on; `waited`: for how long it has waited for
    /// its client's credit.
    pub(super) fn lets_go(&self, waited: Duration) -> Result<(), End> {
        if self.edge.shutdown.is_requested() {
            return Err(End::shutting_down());
        }
        if !Arc::ptr_eq(&self.edge.catalogs.subscribe().borrow(), &self.known) {
            return Err(End::schema_changed());
        }
        let what = match self.holds {
            Holds::CatchUp(since)
                if waited > CATCH_UP_TURN || since.elapsed() > CATCH_UP_TURN && self.edge.catch_ups.is_wanted() =>
            {
                "others wait to catch up, too; connect again to go on"
            }
            Holds::Rows(until) if Instant::now() > until => {
                "the snapshot takes too long at a stretch; connect again to go on with it"
            }
            Holds::Spooled if waited > self.edge.snapshot_time => {
                "nothing of the snapshot is taken; connect again to go on with it"
            }
            _ => return Ok(()),
        };
        Err(End::retry(Code::SlowConsumer, what))
    }
}
