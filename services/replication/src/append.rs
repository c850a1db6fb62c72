//! Appending to the outbound stream by compare-and-set, and reading where it ends.
//!
//! Every append carries `Nats-Expected-Last-Sequence`. Few waiting messages go one by one, one in flight; many go as one
//! atomic batch (NATS ADR-50), with that header on its first message. Plain publishes are never pipelined: one foreign
//! message would make one of ours vanish while later ones succeed. An unknown outcome is an error; the session then
//! starts over from what the stream really holds.

use std::str::FromStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_nats::jetstream::stream::Stream;
use async_nats::{HeaderMap, HeaderValue};
use bytes::Bytes;
use millstream_runtime::nats::Nats;
use millstream_schemas::Lsn;
use millstream_schemas::stream::header;
use millstream_schemas::subject::WAL_ORIGIN;
use serde::Deserialize;
use uuid::Uuid;

use crate::assemble::Outgoing;
use crate::error::Error;
use crate::witness::Landmark;

/// Up to this many waiting messages are published one by one: a batch has a fixed cost of several milliseconds.
pub const SINGLES: usize = 4;
/// Most messages of an atomic batch; a limit of the server.
pub const MAX_BATCH_MESSAGES: usize = 1000;
/// Most bytes of payload in one batch.
pub const MAX_BATCH_BYTES: usize = 16 * 1024 * 1024;
/// Time for the server's answer to one append. A node that dies takes several seconds to be replaced.
const ACK_TIMEOUT: Duration = Duration::from_secs(10);
/// Time for an answer once the connection was made anew: what was asked over the old one gets none.
const ACK_TIMEOUT_RECONNECTED: Duration = Duration::from_millis(500);

/// What headers other than the origin take at most; the broker counts them too.
const HEADER_BYTES: usize = 10 * 1024;

const EXPECTED_LAST_SEQUENCE: &str = "Nats-Expected-Last-Sequence";
const BATCH_ID: &str = "Nats-Batch-Id";
const BATCH_SEQUENCE: &str = "Nats-Batch-Sequence";
const BATCH_COMMIT: &str = "Nats-Batch-Commit";

/// Transaction id of a mark: it stands for no transaction.
const MARK_XID: u32 = 0;

/// NATS' error code for a stream that does not end where the publisher thought.
const WRONG_LAST_SEQUENCE: u64 = 10071;

/// The last message of the stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tail {
    /// Epoch of the history.
    pub epoch: Uuid,
    /// Commit LSN of the message's transaction.
    pub lsn: Lsn,
    /// LSN behind the commit record, if the message is the transaction's last.
    pub end_lsn: Lsn,
    /// Commit LSN of the transaction before.
    pub previous: Lsn,
    /// Whether it is the last of its transaction.
    pub last: bool,
    /// Version of the schema that it is encoded by; empty if it does not say.
    pub schema: String,
    /// The last transaction in the stream that published something: the message's own, or the last before it.
    pub landmark: Option<Landmark>,
}

/// The end of the stream: its last sequence, and the message there if it is (still) there and one of ours.
pub async fn read_end(stream: &Stream) -> Result<(u64, Option<Tail>), Error> {
    let info = stream.get_info().await.map_err(|error| Error::Tail(error.to_string()))?;
    let sequence = info.state.last_sequence;
    if info.state.messages == 0 {
        return Ok((sequence, None));
    }
    // From the stream's leader, not by direct get: a lagging replica would only cost a conflict, but a slow one.
    let message = match stream.get_raw_message(sequence).await {
        Ok(message) => message,
        Err(error) if error.kind() == async_nats::jetstream::stream::RawMessageErrorKind::NoMessageFound => {
            return Ok((sequence, None));
        }
        Err(error) => return Err(Error::Tail(error.to_string())),
    };
    Ok((sequence, tail(&message.headers)))
}

/// What a message's headers say, if it is one of ours.
pub fn tail(headers: &HeaderMap) -> Option<Tail> {
    fn get<T: FromStr>(headers: &HeaderMap, name: &str) -> Option<T> {
        headers.get(name)?.as_str().parse().ok()
    }
    Some(Tail {
        epoch: get(headers, header::EPOCH)?,
        lsn: get(headers, header::LSN)?,
        end_lsn: get(headers, header::END_LSN)?,
        previous: get(headers, header::PREVIOUS)?,
        last: headers.get(header::LAST)?.as_str() == "1",
        schema: get(headers, header::SCHEMA).unwrap_or_default(),
        landmark: landmark(headers),
    })
}

fn landmark(headers: &HeaderMap) -> Option<Landmark> {
    if let Some(text) = headers.get(header::LANDMARK) {
        let mut parts = text.as_str().split(' ');
        let (lsn, xid, at) = (parts.next()?, parts.next()?, parts.next()?);
        return Some(Landmark { lsn: lsn.parse().ok()?, xid: xid.parse().ok()?, at: at.parse().ok()? });
    }
    let get = |name| Some(headers.get(name)?.as_str());
    let landmark = Landmark {
        lsn: get(header::LSN)?.parse().ok()?,
        xid: get(header::XID)?.parse().ok()?,
        at: get(header::AT)?.parse().ok()?,
    };
    Some(landmark).filter(|landmark| landmark.xid != MARK_XID)
}

/// A message without rows that says: the stream holds everything before `lsn`. Its own LSN lies above that of every
/// transaction before and below that of every one to come.
pub fn mark(lsn: Lsn) -> Outgoing {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Outgoing {
        subject: WAL_ORIGIN.to_owned(),
        payload: Bytes::from_static(b"[]"),
        lsn: Lsn(lsn.0.saturating_sub(1)),
        end_lsn: lsn,
        xid: MARK_XID,
        index: 0,
        last: true,
        at: i64::try_from(now.as_micros()).unwrap_or(i64::MAX),
        origin: None,
        traceparent: None,
        moves: None,
    }
}

/// The writing end of the stream.
#[derive(Debug)]
pub struct Appender {
    nats: Nats,
    epoch: Uuid,
    schema: String,
    /// Last sequence of the stream.
    sequence: u64,
    /// The transaction that was appended last and the one before it: what `Ms-Previous-Lsn` is taken from.
    current: Lsn,
    previous: Lsn,
    /// The last transaction that published something.
    landmark: Option<Landmark>,
}

#[derive(Deserialize)]
struct Ack {
    seq: Option<u64>,
    error: Option<ApiError>,
}

#[derive(Deserialize)]
struct ApiError {
    #[serde(default)]
    err_code: u64,
    #[serde(default)]
    description: String,
}

impl Appender {
    /// Goes on behind message `sequence`. `previous` is the commit LSN of the last complete transaction, `landmark` the
    /// last that published something.
    pub fn new(
        nats: Nats,
        epoch: Uuid,
        schema: &str,
        sequence: u64,
        previous: Lsn,
        landmark: Option<Landmark>,
    ) -> Self {
        Appender { nats, epoch, schema: schema.to_owned(), sequence, current: previous, previous: Lsn::ZERO, landmark }
    }

    /// Last sequence of the stream.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Epoch of the history.
    pub fn epoch(&self) -> Uuid {
        self.epoch
    }

    /// Appends the messages in order. On success all of them are in the stream; on error the session has to start over.
    pub async fn append(&mut self, messages: &[Outgoing]) -> Result<(), Error> {
        let limit = self.nats.client.max_payload();
        for message in messages {
            let bytes = message.payload.len() + message.origin.as_ref().map_or(0, String::len) + HEADER_BYTES;
            if bytes > limit {
                return Err(Error::MessageTooLarge { lsn: message.lsn, bytes, limit });
            }
        }
        if messages.len() <= SINGLES {
            for message in messages {
                let mut headers = self.headers(message);
                headers.insert(EXPECTED_LAST_SEQUENCE, HeaderValue::from(self.sequence));
                let answer = self.request(message, headers).await?;
                self.settle(&answer, 1)?;
            }
            return Ok(());
        }
        for batch in messages.chunks(MAX_BATCH_MESSAGES) {
            self.append_batch(batch).await?;
        }
        Ok(())
    }

    async fn append_batch(&mut self, batch: &[Outgoing]) -> Result<(), Error> {
        let id = Uuid::new_v4().simple().to_string();
        let count = batch.len();
        for (index, message) in batch.iter().enumerate() {
            let mut headers = self.headers(message);
            headers.insert(BATCH_ID, id.as_str());
            headers.insert(BATCH_SEQUENCE, HeaderValue::from(index as u64 + 1));
            if index == 0 {
                headers.insert(EXPECTED_LAST_SEQUENCE, HeaderValue::from(self.sequence));
            }
            if index + 1 == count {
                headers.insert(BATCH_COMMIT, "1");
                let answer = self.request(message, headers).await?;
                self.settle(&answer, count as u64)?;
            } else if index == 0 {
                // Answered at once, with nothing, so that a refusal is known before the rest is sent.
                let answer = self.request(message, headers).await?;
                if !answer.is_empty() {
                    self.refusal(&answer)?;
                }
            } else {
                self.nats
                    .client
                    .publish_with_headers(message.subject.clone(), headers, message.payload.clone())
                    .await
                    .map_err(|error| Error::Append(error.to_string()))?;
            }
        }
        Ok(())
    }

    async fn request(&self, message: &Outgoing, headers: HeaderMap) -> Result<Bytes, Error> {
        let request =
            async_nats::Request::new().headers(headers).payload(message.payload.clone()).timeout(Some(ACK_TIMEOUT));
        let mut connections = self.nats.connections.clone();
        connections.mark_unchanged();
        let lost = async {
            if connections.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
            tokio::time::sleep(ACK_TIMEOUT_RECONNECTED).await;
        };
        tokio::select! {
            answer = self.nats.client.send_request(message.subject.clone(), request) =>
                Ok(answer.map_err(|error| Error::Append(error.to_string()))?.payload),
            () = lost => Err(Error::Append("the connection was lost meanwhile".into())),
        }
    }

    fn settle(&mut self, answer: &[u8], count: u64) -> Result<(), Error> {
        let ack = self.refusal(answer)?;
        match ack.seq {
            Some(sequence) if sequence == self.sequence + count => {
                self.sequence = sequence;
                Ok(())
            }
            _ => Err(Error::Conflict { expected: self.sequence }),
        }
    }

    fn refusal(&self, answer: &[u8]) -> Result<Ack, Error> {
        let ack: Ack = serde_json::from_slice(answer).map_err(|error| Error::Append(error.to_string()))?;
        match &ack.error {
            None => Ok(ack),
            Some(error) if error.err_code == WRONG_LAST_SEQUENCE => Err(Error::Conflict { expected: self.sequence }),
            Some(error) => Err(Error::Refused { code: error.err_code, description: error.description.clone() }),
        }
    }

    fn headers(&mut self, message: &Outgoing) -> HeaderMap {
        if message.lsn != self.current {
            self.previous = self.current;
            self.current = message.lsn;
        }
        let mut headers = HeaderMap::new();
        headers.insert(header::EPOCH, self.epoch.to_string());
        headers.insert(header::LSN, message.lsn.to_string());
        headers.insert(header::END_LSN, message.end_lsn.to_string());
        headers.insert(header::PREVIOUS, self.previous.to_string());
        headers.insert(header::XID, HeaderValue::from(message.xid));
        headers.insert(header::INDEX, HeaderValue::from(message.index));
        headers.insert(header::LAST, if message.last { "1" } else { "0" });
        headers.insert(header::AT, HeaderValue::from(message.at));
        headers.insert(header::SCHEMA, self.schema.as_str());
        if message.xid != MARK_XID {
            self.landmark = Some(Landmark { lsn: message.lsn, xid: message.xid, at: message.at });
        } else if let Some(Landmark { lsn, xid, at }) = self.landmark {
            headers.insert(header::LANDMARK, format!("{lsn} {xid} {at}"));
        }
        if let Some(origin) = &message.origin {
            headers.insert(header::ORIGIN, origin.as_str());
        }
        if let Some(moves) = &message.moves {
            headers.insert(header::MOVES, moves.as_str());
        }
        if let Some(traceparent) = &message.traceparent {
            headers.insert(header::TRACEPARENT, traceparent.as_str());
        }
        headers
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tails_are_read_back_from_headers() {
        let epoch = Uuid::from_u128(7);
        let mut headers = HeaderMap::new();
        assert_eq!(tail(&headers), None);
        for (name, value) in [
            (header::EPOCH, epoch.to_string()),
            (header::LSN, "0/10".into()),
            (header::END_LSN, "0/20".into()),
            (header::PREVIOUS, "0/0".into()),
            (header::LAST, "1".into()),
        ] {
            assert_eq!(tail(&headers), None);
            headers.insert(name, value);
        }
        let expected = Tail {
            epoch,
            lsn: Lsn(16),
            end_lsn: Lsn(32),
            previous: Lsn::ZERO,
            last: true,
            schema: String::new(),
            landmark: None,
        };
        assert_eq!(tail(&headers), Some(expected));
        // A transaction is its own landmark; a mark names the last before it.
        headers.insert(header::AT, "5");
        headers.insert(header::XID, "0");
        assert_eq!(tail(&headers).and_then(|tail| tail.landmark), None);
        headers.insert(header::XID, "9");
        let own = Landmark { lsn: Lsn(16), xid: 9, at: 5 };
        assert_eq!(tail(&headers).and_then(|tail| tail.landmark), Some(own));
        headers.insert(header::LANDMARK, "0/8 8 4");
        let earlier = Landmark { lsn: Lsn(8), xid: 8, at: 4 };
        assert_eq!(tail(&headers).and_then(|tail| tail.landmark), Some(earlier));
    }
}
