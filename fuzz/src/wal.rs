//! The change stream of Postgres.

use std::collections::HashSet;
use std::sync::{Arc, LazyLock};

use millstream_catalog::Table;
use millstream_replication::assemble::{Assembled, Assembler, Filled, Outgoing, ReadValue};
use millstream_replication::pgoutput::{self, DecodeError};
use millstream_schemas::stream::{MAX_MESSAGE_BYTES, OriginEntry, WalPayload};
use millstream_schemas::subject::WAL_ORIGIN;
use millstream_schemas::{Lsn, Scope, trace};

use crate::tables::TABLES;

/// What one message of the change stream may become, in bytes for each of its own: JSON of it (a byte as six) in two scopes,
/// once deleted and once written; and the names of the table and its columns.
const EXPANSION: usize = 4 * 6;
const NAMES: usize = 1024;

/// Messages, each behind its length (two bytes): what decodes is one whole message, and what is assembled is what edges read.
pub fn pgoutput(input: &[u8]) {
    static SYNCED: LazyLock<Arc<[Table]>> = LazyLock::new(|| TABLES.as_slice().into());
    let mut assembler = Assembler::new(SYNCED.clone(), Lsn(10), HashSet::new());
    let (mut out, mut taken, mut produced) = (Vec::new(), 0, 0);
    let mut rest = input;
    while let Some((length, behind)) = rest.split_first_chunk::<2>() {
        let (bytes, behind) = behind.split_at(usize::from(u16::from_be_bytes(*length)).min(behind.len()));
        rest = behind;
        let Ok(message) = pgoutput::decode(bytes) else { return };
        assert!(pgoutput::decode(&bytes[..bytes.len() - 1]).is_err(), "cut, it is another message");
        assert_eq!(pgoutput::decode(&[bytes, &[0]].concat()), Err(DecodeError::Trailing(1)));
        let _ = assembler.skips(&message);
        let Ok(lookup) = assembler.lookup(&message) else { return };
        let filled: Filled = lookup.map_or_else(Vec::new, |lookup| {
            let found = |column: usize| match column % 3 {
                0 => ReadValue::Text("looked \"up\"".to_owned()),
                1 => ReadValue::Null,
                _ => ReadValue::TooLarge,
            };
            let value = |column| (column, found(column));
            lookup.columns.into_iter().map(value).collect()
        });
        // Of what is left to be published, all may come now.
        taken += EXPANSION * bytes.len() + NAMES;
        let before = out.len();
        let Ok(step) = assembler.handle(&message, &filled, &mut out) else { return };
        produced += out[before..].iter().map(|message| message.payload.len()).sum::<usize>();
        assert!(produced <= taken, "{produced} bytes of at most {taken}");
        if matches!(step, Assembled::Committed { .. }) {
            transaction(&out);
            out.clear();
        }
    }
}

/// A transaction's messages are numbered, and the last one says that it is.
fn transaction(out: &[Outgoing]) {
    for (index, message) in out.iter().enumerate() {
        assert_eq!((message.index as usize, message.last), (index, index + 1 == out.len()));
        outgoing(message);
    }
}

fn outgoing(message: &Outgoing) {
    let payload: WalPayload = serde_json::from_slice(&message.payload).expect("the payload is what the contract says");
    let rows: usize = payload.iter().map(|changes| changes.rows.len()).sum();
    assert!(message.payload.len() <= MAX_MESSAGE_BYTES || rows == 1, "{} bytes", message.payload.len());
    match Scope::from_subject(&message.subject) {
        Some(scope) => assert!(Scope::fits(&scope.id) && scope.subject() == message.subject, "{}", message.subject),
        None => assert_eq!(message.subject, WAL_ORIGIN),
    }
    // They become headers.
    if let Some(origin) = &message.origin {
        assert!(message.last && !origin.contains(['\r', '\n']));
        serde_json::from_str::<Vec<OriginEntry>>(origin).expect("the origin is what the contract says");
    }
    assert!(message.traceparent.as_deref().is_none_or(trace::is_valid));
}
