//! One message of the outbound stream, decoded once and shared by every session.

use std::sync::OnceLock;

use async_nats::HeaderMap;
use bytes::Bytes;
use millstream_runtime::telemetry;
use millstream_schemas::stream::{OriginEntry, header};
use millstream_schemas::{Lsn, Position, Scope, trace};
use tokio_tungstenite::tungstenite::Utf8Bytes;
use uuid::Uuid;

use crate::reach::Moves;

/// A message of `MS_WAL`. The row changes stay as encoded by replication; sessions send slices of one shared frame.
#[derive(Debug)]
pub struct Message {
    /// Its place in the stream, with its transaction's commit LSN.
    pub position: Position,
    /// Transaction id, 32 bits.
    pub xid: u32,
    /// Index within the transaction.
    pub index: u32,
    /// Whether it ends the transaction.
    pub last: bool,
    /// Commit time: microseconds since 1970.
    pub at: u64,
    /// Scope of the rows; none on messages that only settle or begin an epoch.
    pub scope: Option<Scope>,
    /// The clients that the transaction settles.
    pub origin: Vec<OriginEntry>,
    /// Version of the schema that its rows are encoded by.
    pub schema: Option<String>,
    /// Trace context of the delivery.
    pub traceparent: Option<String>,
    /// Which memberships of those who hold its scope move with it; on a truncation, those of everybody.
    pub moves: Option<Moves>,
    /// JSON array of `TableChanges`.
    pub payload: Bytes,
    frame: OnceLock<Utf8Bytes>,
}

/// The message lacks a header or has one that cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("message {stream_seq} on {subject}: header {header} is missing or malformed")]
pub struct InvalidMessage {
    stream_seq: u64,
    subject: String,
    header: &'static str,
}

impl Message {
    /// Decodes a message. Starts the span `deliver`, whose context the frame carries on.
    ///
    /// # Errors
    /// A header is missing or malformed, or the payload is not UTF-8: it was not published by replication.
    pub fn decode(
        stream_seq: u64,
        subject: &str,
        headers: &HeaderMap,
        payload: Bytes,
    ) -> Result<Message, InvalidMessage> {
        fn read<T: std::str::FromStr>(headers: &HeaderMap, name: &str) -> Option<T> {
            headers.get(name)?.as_str().parse().ok()
        }
        let invalid = |header| InvalidMessage { stream_seq, subject: subject.to_owned(), header };
        macro_rules! required {
            ($name:expr) => {
                read(headers, $name).ok_or_else(|| invalid($name))?
            };
        }
        let origin = match headers.get(header::ORIGIN) {
            None => Vec::new(),
            Some(text) => serde_json::from_str(text.as_str()).map_err(|_| invalid(header::ORIGIN))?,
        };
        if std::str::from_utf8(&payload).is_err() {
            return Err(invalid("(payload)"));
        }
        let upstream = headers.get(header::TRACEPARENT).map(|value| value.as_str());
        let span = tracing::info_span!("deliver", stream_seq, subject);
        telemetry::set_parent(&span, upstream);
        let traceparent = span
            .in_scope(telemetry::traceparent)
            .or_else(|| upstream.filter(|text| trace::is_valid(text)).map(str::to_owned));
        Ok(Message {
            position: Position { epoch: required!(header::EPOCH), stream_seq, lsn: required!(header::LSN) },
            xid: required!(header::XID),
            index: required!(header::INDEX),
            last: read::<u8>(headers, header::LAST).ok_or_else(|| invalid(header::LAST))? == 1,
            at: required!(header::AT),
            schema: headers.get(header::SCHEMA).map(|value| value.as_str().to_owned()),
            moves: headers.get(header::MOVES).map(|value| Moves::parse(value.as_str())),
            scope: Scope::from_subject(subject),
            origin,
            traceparent,
            payload,
            frame: OnceLock::new(),
        })
    }

    /// The epoch of its history.
    pub fn epoch(&self) -> Uuid {
        self.position.epoch
    }

    /// The commit LSN of its transaction.
    pub fn lsn(&self) -> Lsn {
        self.position.lsn
    }

    /// What its transaction settles for a client.
    pub fn settles(&self, client_id: Uuid) -> impl Iterator<Item = &OriginEntry> {
        self.origin.iter().filter(move |entry| entry.client_id == client_id)
    }

    /// Bytes that keeping it costs, roughly.
    pub fn weight(&self) -> usize {
        // The frame holds the payload a second time.
        512 + 2 * self.payload.len()
    }

    /// The frame `rows`, encoded at the first call and shared from then on.
    pub fn frame(&self) -> Utf8Bytes {
        self.frame.get_or_init(|| self.encode().into()).clone()
    }

    fn encode(&self) -> String {
        use std::fmt::Write;
        let Position { epoch, stream_seq, lsn } = self.position;
        let mut text = String::with_capacity(self.payload.len() + 256);
        // Writing to a string cannot fail.
        let _ = write!(
            text,
            r#"{{"type":"rows","stream_seq":{stream_seq},"lsn":"{lsn}","index":{},"last":{},"epoch":"{epoch}","at":{}"#,
            self.index, self.last, self.at
        );
        if let Some(traceparent) = &self.traceparent {
            let _ = write!(text, r#","traceparent":"{traceparent}""#);
        }
        text.push_str(r#","changes":"#);
        // Checked when the message was decoded.
        text.push_str(std::str::from_utf8(&self.payload).unwrap_or("[]"));
        text.push('}');
        text
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use millstream_schemas::frame::ServerFrame;

    /// A message for tests: `scope` none = origin only.
    pub(crate) fn message(stream_seq: u64, lsn: u64, index: u32, last: bool, scope: Option<Scope>) -> Message {
        let mut headers = HeaderMap::new();
        headers.insert(header::EPOCH, Uuid::nil().to_string().as_str());
        headers.insert(header::LSN, Lsn(lsn).to_string().as_str());
        headers.insert(header::XID, (lsn as u32).to_string().as_str());
        headers.insert(header::INDEX, index.to_string().as_str());
        headers.insert(header::LAST, if last { "1" } else { "0" });
        headers.insert(header::AT, "5");
        let subject = scope.map_or_else(|| "ms.wal.origin".to_owned(), |scope| scope.subject());
        Message::decode(stream_seq, &subject, &headers, Bytes::from_static(b"[]")).unwrap()
    }

    #[test]
    fn spliced_frames_are_what_the_contract_says() {
        let mut message = message(7, 0x16_0000_0001, 2, true, Some(Scope::new("project", "x")));
        message.payload = Bytes::from_static(br#"[{"table":"tasks","op":"upsert","rows":[["1",null]]}]"#);
        message.traceparent = Some("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01".to_owned());
        let ServerFrame::Rows(rows) = serde_json::from_str(&message.frame()).unwrap() else { panic!("not rows") };
        assert_eq!((rows.stream_seq, rows.lsn, rows.index, rows.last, rows.at), (7, Lsn(0x16_0000_0001), 2, true, 5));
        assert_eq!(rows.changes[0].rows, [vec![Some("1".to_owned()), None]]);
        assert_eq!(rows.traceparent, message.traceparent);
    }

    #[test]
    fn foreign_messages_are_refused() {
        let error = Message::decode(1, "ms.wal.project.x", &HeaderMap::new(), Bytes::new()).unwrap_err();
        assert!(error.to_string().contains("Ms-Epoch"), "{error}");
    }
}
