//! The replication connection. A task of its own owns the socket ([`feed`]) and goes on answering the server while we are busy
//! publishing. Authentication and framing are `pgwire-replication`'s; what is read is ours, so that no message of the change
//! stream is too long ([`crate::abridge`]).

mod connect;
mod feed;
mod socket;
mod source;
mod tls;

use std::time::Duration;

use millstream_schemas::Lsn;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use self::feed::Feed;
pub use self::feed::{Event, Received};
pub use self::source::Source;
use crate::error::Error;

/// Time to connect and start.
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// Messages between the socket's task and ours.
const BUFFERED_EVENTS: usize = 512;

/// The change stream. Dropping it closes the connection.
pub struct Wal {
    received: mpsc::Receiver<Result<Received, Error>>,
    confirmed: watch::Sender<Lsn>,
    _task: JoinSet<()>,
}

impl Wal {
    /// Starts the change stream where the slot has been confirmed.
    pub async fn start(source: &Source) -> Result<Wal, Error> {
        let stream = tokio::time::timeout(START_TIMEOUT, connect::start(source))
            .await
            .map_err(|_| Error::WalSilent(START_TIMEOUT))??;
        let (events, received) = mpsc::channel(BUFFERED_EVENTS);
        let (confirmed, confirmations) = watch::channel(Lsn::ZERO);
        let mut task = JoinSet::new();
        task.spawn(Feed::new(stream, events, confirmations).run());
        Ok(Wal { received, confirmed, _task: task })
    }

    /// The next event. May be dropped and called again without losing anything.
    pub async fn next(&mut self) -> Result<Received, Error> {
        self.received.recv().await.unwrap_or(Err(Error::WalEnded))
    }

    /// Tells the server that everything before this LSN is safe.
    pub fn confirm(&self, lsn: Lsn) {
        self.confirmed.send_if_modified(|confirmed| {
            let ahead = lsn > *confirmed;
            *confirmed = lsn.max(*confirmed);
            ahead
        });
    }
}
