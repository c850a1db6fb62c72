//! Reads again, message by message, what clients left in the stream: see [`crate::worker::turns`].

use std::time::Duration;

use async_nats::jetstream::stream::{RawMessageErrorKind, Stream};
use bytes::Bytes;
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::item::Left;

/// Messages of a worker that are read at a time.
const MAX_READS: usize = 4;
/// How long one is waited for, and the pause after one that could not be read.
const TIMEOUT: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(200);

/// A message that was read for a client.
pub(crate) struct Read {
    pub client_id: Uuid,
    pub left: Left,
    pub payload: Payload,
}

/// The message that a client left in the stream.
pub(crate) enum Payload {
    Found(Bytes),
    /// The stream does not hold it any more.
    Gone,
    /// It cannot be read now.
    Failed,
}

/// The reads under way.
pub(crate) struct Reads {
    /// None: there is nothing to read.
    stream: Option<Stream>,
    under_way: JoinSet<Read>,
}

impl Reads {
    pub fn new(stream: Option<Stream>) -> Reads {
        Reads { stream, under_way: JoinSet::new() }
    }

    /// Whether another one may begin.
    pub fn has_room(&self) -> bool {
        self.stream.is_some() && self.under_way.len() < MAX_READS
    }

    /// Begins to read the message in which a client left something.
    pub fn begin(&mut self, client_id: Uuid, left: Left) {
        let Some(stream) = self.stream.clone() else { return };
        self.under_way.spawn(async move {
            let read = tokio::time::timeout(TIMEOUT, stream.get_raw_message(left.sequence)).await;
            let payload = match read {
                Ok(Ok(message)) => Payload::Found(message.payload),
                Ok(Err(error)) if error.kind() == RawMessageErrorKind::NoMessageFound => Payload::Gone,
                Ok(Err(_)) | Err(_) => {
                    tracing::warn!(stream.sequence = left.sequence, "a message cannot be read again now");
                    tokio::time::sleep(PAUSE).await;
                    Payload::Failed
                }
            };
            Read { client_id, left, payload }
        });
    }

    /// One that is done, if there is one.
    pub fn done(&mut self) -> Option<Read> {
        self.under_way.try_join_next().and_then(Result::ok)
    }

    /// Waits for the next one; none if nothing is under way.
    pub async fn next(&mut self) -> Option<Read> {
        self.under_way.join_next().await.and_then(Result::ok)
    }
}
