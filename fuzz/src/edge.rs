//! What an edge reads: clients' texts, their marks, messages of the stream, and Postgres' answers.

use std::collections::BTreeSet;

use async_nats::{HeaderMap, HeaderName, HeaderValue};
use bytes::Bytes;
use millstream_edge::for_simulation::{self, Fence, Message, text};
use millstream_schemas::frame::{ClientFrame, MAX_FRAME_BYTES, MAX_HELLO_BYTES, Rows, ServerFrame, SnapshotMark};
use millstream_schemas::stream::{ChangesMessage, MAX_ROW_BYTES, Submission, WalPayload};
use millstream_schemas::{Code, Lsn, PROTOCOL_VERSION, Row, Scope, trace};
use uuid::Uuid;

use crate::cut::cut;

/// A text of a client: what is taken from it survives being sent on, and what is not has a code.
pub fn client_frame(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let frame = serde_json::from_str::<ClientFrame>(text);
    if let Ok(frame) = &frame {
        let again = serde_json::to_string(frame).expect("a frame encodes");
        assert_eq!(serde_json::from_str::<ClientFrame>(&again).ok().as_ref(), Some(frame), "{again}");
    }
    match (text::hello(text), &frame) {
        (Ok(hello), Ok(ClientFrame::Hello(read))) => {
            assert_eq!((&hello, hello.protocol), (read, PROTOCOL_VERSION));
            assert!(text.len() <= MAX_HELLO_BYTES);
        }
        (Ok(_), _) => panic!("a hello that is none"),
        (Err(refused), _) => assert!(
            matches!(refused.code, Code::BadFrame | Code::TooLarge | Code::OutOfOrder | Code::UpgradeRequired)
                && refused.client_seq.is_none(),
            "{refused:?}"
        ),
    }
    match text::submit(text) {
        Ok(submit) => {
            assert!(text.len() <= MAX_FRAME_BYTES);
            let traceparent = submit.traceparent;
            assert!(traceparent.as_deref().is_none_or(trace::is_valid), "{traceparent:?}");
            let submission = Submission {
                client_id: Uuid::nil(),
                user_id: "alice".into(),
                client_seq: submit.client_seq,
                attempt: submit.attempt,
                run_id: submit.run_id,
                previous: submit.previous,
                after: submit.after,
                changes: submit.changes,
                traceparent,
            };
            // The lane puts such texts together; one that the executor cannot read would take the others with it.
            let one = serde_json::to_string(&submission).expect("a submission encodes");
            let message = format!(r#"{{"submissions":[{one},{one}]}}"#);
            let read: ChangesMessage = serde_json::from_str(&message).expect("the executor reads what an edge accepts");
            assert_eq!(read.submissions, [submission.clone(), submission]);
        }
        Err(refused) => {
            assert!(matches!(refused.code, Code::BadFrame | Code::TooLarge | Code::OutOfOrder), "{refused:?}");
        }
    }
}

/// A cut snapshot's token and mark, a line each: as read, they can be written and read again, and the moment answers.
pub fn mark(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let (token, mark) = cut(text, '\n');
    let cut = SnapshotMark { token: token.into(), mark: mark.into() };
    assert!(!for_simulation::is_taken(b"0123456789abcdef0123456789abcdef", &cut), "no edge wrote it");
    // Whose digest is in the seeds.
    let scopes = BTreeSet::from([Scope::global(), Scope::user("alice")]);
    let read = |cut: &SnapshotMark| for_simulation::resumed(cut, "0123456789abcdef", &scopes);
    let Some((again, fence)) = read(&cut) else { return };
    assert_eq!(read(&again), Some((again.clone(), fence.clone())), "it is what it was");
    if let Some(fence) = fence {
        ask(&fence);
    }
}

/// Postgres' answer to what a snapshot sees: the snapshot and the LSN, a line each.
pub fn fence(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let (snapshot, lsn) = cut(text, '\n');
    let Ok(fence) = Fence::parse(snapshot, lsn) else { return };
    assert_eq!(Fence::parse(&fence.visible(), &fence.lsn.to_string()).ok().as_ref(), Some(&fence));
    ask(&fence);
}

/// Nothing behind the fence is visible, and every id has an answer.
fn ask(fence: &Fence) {
    let snapshot = fence.visible();
    let ids = snapshot.split([':', ',']).take(8).filter_map(|id| id.parse::<u64>().ok()).map(|id| id as u32);
    for xid in [0, 1, 1 << 31, u32::MAX].into_iter().chain(ids) {
        for near in [xid.wrapping_sub(1), xid, xid.wrapping_add(1)] {
            fence.sees(near, Lsn::ZERO);
            assert!(!fence.sees(near, fence.lsn) && !fence.sees(near, Lsn(u64::MAX)));
        }
    }
}

/// A message of the outbound stream: the subject, headers (`name: value`) and an empty line, then the payload. If its payload
/// is what replication publishes, its frame is what the contract says.
pub fn stream(input: &[u8]) {
    let mut lines = input.splitn(2, |&byte| byte == b'\n');
    let Ok(subject) = std::str::from_utf8(lines.next().unwrap_or_default()) else { return };
    let mut rest = lines.next().unwrap_or_default();
    let mut headers = HeaderMap::new();
    while let Some(end) = rest.iter().position(|&byte| byte == b'\n') {
        let line = &rest[..end];
        rest = &rest[end + 1..];
        if line.is_empty() {
            break;
        }
        let Some((name, value)) = std::str::from_utf8(line).ok().and_then(|line| line.split_once(": ")) else { return };
        let (Ok(name), Ok(value)) = (name.parse::<HeaderName>(), value.parse::<HeaderValue>()) else { return };
        headers.append(name, value);
    }
    // Replication reads the last one, too.
    let tail = millstream_replication::append::tail(&headers);
    let Ok(message) = Message::decode(7, subject, &headers, Bytes::copy_from_slice(rest)) else { return };
    if let Some(tail) = tail {
        assert_eq!((tail.epoch, tail.lsn, tail.last), (message.epoch(), message.lsn(), message.last));
    }
    if let Some(scope) = &message.scope {
        assert_eq!(Scope::from_subject(&scope.subject()).as_ref(), Some(scope), "{subject}");
    }
    let Ok(changes) = serde_json::from_slice::<WalPayload>(rest) else { return };
    let frame = message.frame();
    let raw: serde_json::Value = serde_json::from_str(&frame).expect("the frame is JSON");
    let traceparent = raw["traceparent"].as_str();
    assert!(traceparent.is_none_or(trace::is_valid), "{traceparent:?}");
    let expected = ServerFrame::Rows(Rows {
        stream_seq: 7,
        lsn: message.lsn(),
        index: message.index,
        last: message.last,
        epoch: message.epoch(),
        at: message.at,
        traceparent: traceparent.map(str::to_owned),
        changes,
    });
    assert_eq!(serde_json::from_str::<ServerFrame>(&frame).ok(), Some(expected), "{frame}");
}

/// What COPY sends: a byte that says how it is cut, then its lines. However it is cut, the rows are the same, as many as there
/// are lines, and told of in frames of the contract.
pub fn copy(input: &[u8]) {
    let Some((&step, text)) = input.split_first() else { return };
    let whole = rows([text]);
    assert_eq!(whole, rows(text.chunks(usize::from(step) + 1)));
    assert_eq!(whole, rows(text.split_inclusive(|&byte| byte == b'\n')));
    let lines: Vec<&[u8]> = text.split_inclusive(|&byte| byte == b'\n').filter(|line| line.ends_with(b"\n")).collect();
    // A row may grow sixfold as JSON.
    if lines.iter().all(|line| line.len() * 6 < MAX_ROW_BYTES) {
        assert_eq!(lines.len(), whole.0.len());
    }
    for (line, row) in lines.iter().zip(&whole.0) {
        let fields: Vec<&[u8]> = line[..line.len() - 1].split(|&byte| byte == b'\t').collect();
        assert_eq!(fields.len(), row.len());
        for (field, value) in fields.iter().zip(row) {
            assert_eq!(*field == br"\N", value.is_none());
        }
    }
    // As Postgres writes them, so they come back.
    let field = |value: &Option<String>| value.as_deref().map_or_else(|| r"\N".to_owned(), escaped);
    let line = |row: &Row| row.iter().map(field).collect::<Vec<_>>().join("\t") + "\n";
    let written: String = whole.0.iter().map(line).collect();
    assert_eq!(rows([written.as_bytes()]).0, whole.0);
}

/// The rows of a table of which COPY sends these chunks, and the last mark.
fn rows<'a>(chunks: impl IntoIterator<Item = &'a [u8]>) -> (Vec<Row>, Option<String>) {
    let (mut rows, mut last) = (Vec::new(), None);
    for frame in for_simulation::reframed("ta\"sks", &[1, 0], chunks) {
        match serde_json::from_str(&frame) {
            Ok(ServerFrame::SnapshotRows { changes, mark }) if changes.len() == 1 => {
                rows.extend(changes.into_iter().flat_map(|changes| changes.rows));
                last = mark;
            }
            other => panic!("{other:?}: {frame}"),
        }
    }
    (rows, last)
}

/// A value in COPY's text format.
fn escaped(value: &str) -> String {
    let mut field = String::new();
    for character in value.chars() {
        match character {
            '\\' => field.push_str("\\\\"),
            '\u{8}' => field.push_str("\\b"),
            '\u{c}' => field.push_str("\\f"),
            '\n' => field.push_str("\\n"),
            '\r' => field.push_str("\\r"),
            '\t' => field.push_str("\\t"),
            '\u{b}' => field.push_str("\\v"),
            other => field.push(other),
        }
    }
    field
}
