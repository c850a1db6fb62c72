//! What a session sends, as far as the client's credit goes. While that is used up the client is heard: a client that is slow to
//! take rows still gets its changes through.

use std::time::Instant;

use super::end::End;
use super::state::Session;
use super::uplink::deaf;
use super::wire::{PING_INTERVAL, Wire};

impl Session {
    /// Sends what is ready.
    pub(super) async fn flush(&mut self, wire: &mut Wire) -> Result<(), End> {
        let mut sent = 0;
        while sent < self.out.len() {
            if !wire.has_credit() {
                let _room = wire.room(&self.out[sent..])?;
                Box::pin(self.credit(wire)).await?;
                // That may have been long ago.
                Box::pin(self.still_holds(&[])).await?;
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

    /// Waits until the client's credit allows for more rows.
    pub(super) async fn credit(&mut self, wire: &mut Wire) -> Result<(), End> {
        let mut ticks = tokio::time::interval(PING_INTERVAL);
        ticks.tick().await;
        while !wire.has_credit() {
            wire.answer().await?;
            tokio::select! {
                frame = wire.next(), if self.deaf_until.is_none() => self.heard(wire, frame).await?,
                () = deaf(self.deaf_until), if self.deaf_until.is_some() => {
                    self.deaf_until = None;
                    wire.heard = Instant::now();
                }
                _ = ticks.tick() => wire.beat().await?,
            }
        }
        Ok(())
    }
}
