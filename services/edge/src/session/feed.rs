//! What the stream brings goes through the downlink, which asks for what has to be read from Postgres.

use millstream_schemas::{Code, Lsn};

use super::end::End;
use super::state::Session;
use super::wire::Wire;
use crate::downlink::Next;
use crate::message::Message;

impl Session {
    /// Gives one message to the downlink, reading memberships when it asks for them.
    pub(super) async fn feed(&mut self, wire: &mut Wire, message: &Message) -> Result<(), End> {
        if !self.is_bound && message.settles(self.client_id).next().is_some() {
            let sees = self.snapshot_that_sees(message.xid, message.lsn()).await?;
            Box::pin(self.bind(sees)).await?;
        }
        let mut read = false;
        loop {
            match self.downlink.message(message, &mut self.out) {
                Next::Continue => return Ok(()),
                Next::EpochChanged => {
                    return Err(End::retry(Code::EpochChanged, "the server began a new history; a snapshot follows"));
                }
                Next::Reauthorize => Box::pin(self.reauthorize(wire, message.xid, message.lsn())).await?,
                Next::ReadLedger if read => {
                    let what = "changes were settled of which nothing is known; connect again";
                    return Err(End::retry(Code::Unavailable, what));
                }
                Next::ReadLedger => {
                    read = true;
                    Box::pin(self.read_ledger(message.position.stream_seq)).await?;
                }
            }
        }
    }

    /// Reads memberships again, as they are from a transaction on.
    pub(super) async fn reauthorize(&mut self, wire: &mut Wire, xid: u32, commit: Lsn) -> Result<(), End> {
        // Nobody holds a connection while a client takes its time.
        self.flush(wire).await?;
        let mut snapshot = self.snapshot_that_sees(xid, commit).await?;
        let scopes = self.scopes_in(&mut snapshot).await?;
        self.join(wire, snapshot, scopes).await
    }

    /// Ends a transaction of which a catch-up does not fetch the last message.
    pub(super) async fn end_before(&mut self, wire: &mut Wire, next: Lsn) -> Result<(), End> {
        while let Some((commit, xid)) = self.downlink.ends_before(next, &mut self.out) {
            self.reauthorize(wire, xid, commit).await?;
        }
        Ok(())
    }
}
