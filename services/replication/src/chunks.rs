//! The messages of one transaction while they grow: a buffer a scope, cut into chunks, with bounded memory.
//!
//! **Order across scopes.** A client may hold several scopes, and applies a transaction's messages in the order of the
//! stream. Where a row leaves one scope and enters another, or is deleted and inserted again elsewhere, the message with
//! the delete must come before the one with the new row. Buffers are emitted in the order of their ids; when a row
//! enters a buffer that stands before one with an open delete of the same key, everything up to that buffer is emitted
//! first and the buffer opened again at the end. Most transactions never need that, and then any chunk may go at any time.

use std::collections::{HashMap, VecDeque};

use bytes::Bytes;
use millstream_schemas::stream::ANY_SCOPE;
use millstream_schemas::{Scope, TableOp};

/// Most bytes of one transaction that wait for its end, over all scopes.
pub const MAX_TRANSACTION_BUFFER_BYTES: usize = 16 * 1024 * 1024;
/// What an open buffer costs beyond its bytes: its scope, map entry and vector.
const BUFFER_OVERHEAD_BYTES: usize = 256;
/// Most keys of deleted rows remembered for the order across scopes.
const MAX_TRACKED_DELETES: usize = 65_536;
/// Room for the brackets that close a chunk.
const CLOSING_BYTES: usize = 8;

/// A finished payload and where it goes.
#[derive(Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Subject in the outbound stream.
    pub subject: String,
    /// A JSON array of `TableChanges`.
    pub payload: Bytes,
    /// Scopes that its rows' readers came to hold, or hold no more.
    pub moves: Moved,
}

/// Scopes of which memberships moved.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Moved {
    /// None did.
    #[default]
    None,
    /// These, as the header tells them.
    Scopes(String),
    /// Too many to name.
    Any,
    /// None did, but the rows of some kinds of scopes are to be read again: these kinds, as the header tells them.
    Again(String),
}

/// Longest list of scopes that have moved, in bytes: it travels in a header.
const MAX_MOVES_BYTES: usize = 8 * 1024;

impl Moved {
    /// The header's text, if there is anything to tell.
    pub fn header(self) -> Option<String> {
        match self {
            Moved::None => None,
            Moved::Scopes(scopes) | Moved::Again(scopes) => Some(scopes),
            Moved::Any => Some(ANY_SCOPE.to_owned()),
        }
    }

    fn add(&mut self, scopes: &[Scope]) {
        for scope in scopes {
            let name = scope.subject();
            *self = match std::mem::take(self) {
                Moved::None => Moved::Scopes(name),
                Moved::Scopes(names) if names.split(' ').any(|known| known == name) => Moved::Scopes(names),
                Moved::Scopes(names) if names.len() + name.len() < MAX_MOVES_BYTES => {
                    Moved::Scopes(names + " " + &name)
                }
                Moved::Scopes(_) | Moved::Any | Moved::Again(_) => Moved::Any,
            };
        }
    }
}

/// Rows that share a `TableChanges`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowGroup<'a> {
    /// Name of the table.
    pub table: &'a str,
    /// What happened to the rows.
    pub op: TableOp,
    /// Columns of the rows; none where the operation implies them.
    pub columns: Option<&'a [&'a str]>,
}

/// Identity of a row, for the order across scopes. Equal keys have equal hashes; a collision costs one message.
pub type KeyHash = u64;

struct Buffer {
    scope: Scope,
    bytes: Vec<u8>,
    /// The head of the open group, as it stands in `bytes`.
    head: Vec<u8>,
    moves: Moved,
}

impl Buffer {
    fn is_empty(&self) -> bool {
        self.bytes.is_empty() && self.moves == Moved::None
    }

    fn add(&mut self, head: &[u8], row: &[u8]) {
        if self.bytes.is_empty() {
            self.bytes.push(b'[');
        } else if self.head == head {
            if !row.is_empty() {
                self.bytes.push(b',');
                self.bytes.extend_from_slice(row);
            }
            return;
        } else {
            self.bytes.extend_from_slice(b"]},");
        }
        self.bytes.extend_from_slice(head);
        self.bytes.extend_from_slice(row);
        self.head.clear();
        self.head.extend_from_slice(head);
    }

    fn take(&mut self) -> Chunk {
        let mut bytes = std::mem::take(&mut self.bytes);
        self.head.clear();
        bytes.extend_from_slice(if bytes.is_empty() { b"[]" } else { b"]}]" });
        Chunk { subject: self.scope.subject(), payload: Bytes::from(bytes), moves: std::mem::take(&mut self.moves) }
    }
}

/// The open messages of one transaction.
pub struct Chunks {
    /// Ids count on from `base`, in the order of emission.
    buffers: VecDeque<Buffer>,
    base: u64,
    ids: HashMap<Scope, u64>,
    bytes: usize,
    /// Whether some buffer must be emitted before another.
    ordered: bool,
    /// The last buffer that holds a delete of that key.
    deletes: HashMap<KeyHash, u64>,
    limit: usize,
    /// Most bytes of a message, unless it is one row.
    message_limit: usize,
    head: Vec<u8>,
}

impl Chunks {
    /// No rows yet; at most `limit` bytes are kept, and messages are cut at `message_limit`.
    pub fn new(limit: usize, message_limit: usize) -> Self {
        Chunks {
            buffers: VecDeque::new(),
            base: 0,
            ids: HashMap::new(),
            bytes: 0,
            ordered: false,
            deletes: HashMap::new(),
            limit,
            message_limit,
            head: Vec::new(),
        }
    }

    /// Adds an encoded row to a scope; whatever has to be emitted before goes to `out`. What was added last always stays,
    /// so that the end of the transaction has a message to be marked on.
    pub fn add(&mut self, scope: &Scope, group: RowGroup<'_>, key: KeyHash, row: &[u8], out: &mut Vec<Chunk>) {
        self.add_moving(scope, group, key, row, &[], out);
    }

    /// The same for a row by which those who read `scope` come to hold other scopes, or hold them no more.
    pub fn add_moving(
        &mut self,
        scope: &Scope,
        group: RowGroup<'_>,
        key: KeyHash,
        row: &[u8],
        moved: &[Scope],
        out: &mut Vec<Chunk>,
    ) {
        let mut head = std::mem::take(&mut self.head);
        write_head(&mut head, group);
        let cost = head.len() + row.len() + CLOSING_BYTES;
        if self.bytes + cost + BUFFER_OVERHEAD_BYTES > self.limit || self.deletes.len() >= MAX_TRACKED_DELETES {
            self.flush(out);
        }
        let mut id = self.ids.get(scope).copied();
        if group.op != TableOp::Delete
            && let Some(&delete) = self.deletes.get(&key)
            && delete >= self.base
        {
            self.ordered = true;
            if let Some(found) = id
                && found < delete
            {
                self.emit_through(found, out);
                id = None;
            }
        }
        if let Some(found) = id
            && self.buffers[(found - self.base) as usize].bytes.len() + cost > self.message_limit
            && !self.buffers[(found - self.base) as usize].is_empty()
        {
            if self.ordered {
                self.emit_through(found, out);
                id = None;
            } else {
                let chunk = self.buffers[(found - self.base) as usize].take();
                self.bytes = self.bytes.saturating_sub(chunk.payload.len());
                out.push(chunk);
            }
        }
        let id = id.unwrap_or_else(|| self.open(scope));
        let buffer = &mut self.buffers[(id - self.base) as usize];
        let before = buffer.bytes.len();
        buffer.add(&head, row);
        buffer.moves.add(moved);
        self.bytes += buffer.bytes.len() - before;
        if group.op == TableOp::Delete {
            let last = self.deletes.entry(key).or_insert(id);
            *last = (*last).max(id);
        }
        self.head = head;
    }

    /// Tells those who read `scope` that they come to hold other scopes, or hold them no more, by a row that is not theirs to see.
    pub fn add_moves(&mut self, scope: &Scope, moved: &[Scope], out: &mut Vec<Chunk>) {
        if self.bytes + BUFFER_OVERHEAD_BYTES > self.limit {
            self.flush(out);
        }
        let id = self.ids.get(scope).copied().unwrap_or_else(|| self.open(scope));
        // Counted by their names, though those that are there already take no room: then it is emitted sooner.
        self.bytes += moved.iter().map(|scope| scope.subject().len() + 1).sum::<usize>();
        self.buffers[(id - self.base) as usize].moves.add(moved);
    }

    fn open(&mut self, scope: &Scope) -> u64 {
        let id = self.base + self.buffers.len() as u64;
        self.buffers.push_back(Buffer {
            scope: scope.clone(),
            bytes: Vec::new(),
            head: Vec::new(),
            moves: Moved::None,
        });
        self.ids.insert(scope.clone(), id);
        self.bytes += BUFFER_OVERHEAD_BYTES;
        id
    }

    /// Adds a truncation (`grants`: of a table that grants memberships), which keeps its place among the rows of every scope.
    pub fn add_truncate(&mut self, scope: &Scope, table: &str, grants: bool, out: &mut Vec<Chunk>) {
        self.flush(out);
        self.ordered = true;
        self.add(scope, RowGroup { table, op: TableOp::Truncate, columns: None }, 0, &[], out);
        if let Some(buffer) = self.buffers.back_mut().filter(|_| grants) {
            buffer.moves = Moved::Any;
        }
    }

    /// Emits everything.
    pub fn flush(&mut self, out: &mut Vec<Chunk>) {
        if let Some(last) = (self.base + self.buffers.len() as u64).checked_sub(1) {
            self.emit_through(last, out);
        }
        self.deletes.clear();
        self.ordered = false;
        self.bytes = 0;
    }

    fn emit_through(&mut self, id: u64, out: &mut Vec<Chunk>) {
        while self.base <= id {
            let Some(mut buffer) = self.buffers.pop_front() else { return };
            self.base += 1;
            self.ids.remove(&buffer.scope);
            self.bytes = self.bytes.saturating_sub(buffer.bytes.len() + BUFFER_OVERHEAD_BYTES);
            if !buffer.is_empty() {
                out.push(buffer.take());
            }
        }
    }
}

fn write_head(head: &mut Vec<u8>, group: RowGroup<'_>) {
    head.clear();
    head.extend_from_slice(b"{\"table\":");
    write_string(head, group.table);
    head.extend_from_slice(match group.op {
        TableOp::Upsert => b",\"op\":\"upsert\"".as_slice(),
        TableOp::Update => b",\"op\":\"update\"",
        TableOp::Delete => b",\"op\":\"delete\"",
        TableOp::Truncate => b",\"op\":\"truncate\"",
    });
    if let Some(columns) = group.columns {
        head.extend_from_slice(b",\"columns\":[");
        for (index, column) in columns.iter().enumerate() {
            if index > 0 {
                head.push(b',');
            }
            write_string(head, column);
        }
        head.push(b']');
    }
    head.extend_from_slice(b",\"rows\":[");
}

/// Writes one row as a JSON array.
pub fn write_row<'a>(out: &mut Vec<u8>, values: impl Iterator<Item = Option<&'a str>>) {
    out.clear();
    out.push(b'[');
    for (index, value) in values.enumerate() {
        if index > 0 {
            out.push(b',');
        }
        match value {
            None => out.extend_from_slice(b"null"),
            Some(text) => write_string(out, text),
        }
    }
    out.push(b']');
}

/// Writes a JSON string (RFC 8259, section 7), escaping no more than must be.
fn write_string(out: &mut Vec<u8>, text: &str) {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    out.push(b'"');
    let bytes = text.as_bytes();
    let mut start = 0;
    for (at, &byte) in bytes.iter().enumerate() {
        if byte >= 0x20 && byte != b'"' && byte != b'\\' {
            continue;
        }
        out.extend_from_slice(&bytes[start..at]);
        start = at + 1;
        match byte {
            b'"' => out.extend_from_slice(b"\\\""),
            b'\\' => out.extend_from_slice(b"\\\\"),
            b'\n' => out.extend_from_slice(b"\\n"),
            b'\r' => out.extend_from_slice(b"\\r"),
            b'\t' => out.extend_from_slice(b"\\t"),
            _ => {
                out.extend_from_slice(b"\\u00");
                out.push(HEX[usize::from(byte >> 4)]);
                out.push(HEX[usize::from(byte & 15)]);
            }
        }
    }
    out.extend_from_slice(&bytes[start..]);
    out.push(b'"');
}

#[cfg(test)]
mod tests {
    use super::*;
    use millstream_schemas::TableChanges;
    use millstream_schemas::stream::MAX_MESSAGE_BYTES;

    const UPSERT: RowGroup<'static> = RowGroup { table: "t", op: TableOp::Upsert, columns: None };
    const DELETE: RowGroup<'static> = RowGroup { table: "t", op: TableOp::Delete, columns: None };

    fn scope(id: &str) -> Scope {
        Scope::new("p", id)
    }

    fn texts(chunks: &[Chunk]) -> Vec<String> {
        chunks.iter().map(|c| format!("{} {}", c.subject, std::str::from_utf8(&c.payload).unwrap())).collect()
    }

    #[test]
    fn strings_are_escaped_as_serde_json_does() {
        for text in ["", "plain", "\"\\/\u{8}\u{c}\n\r\t\u{0}\u{1f}\u{7f}", "üñî\u{2028}🎉", "a\"b"] {
            let mut out = Vec::new();
            write_string(&mut out, text);
            assert_eq!(serde_json::from_slice::<String>(&out).unwrap(), text);
        }
    }

    #[test]
    fn runs_share_a_group() {
        let mut chunks = Chunks::new(MAX_TRANSACTION_BUFFER_BYTES, MAX_MESSAGE_BYTES);
        let mut out = Vec::new();
        let narrow = RowGroup { columns: Some(&["id", "x"]), op: TableOp::Update, ..UPSERT };
        for (group, row) in [(UPSERT, "[\"1\"]"), (UPSERT, "[\"2\"]"), (narrow, "[\"1\",null]"), (DELETE, "[\"2\"]")] {
            chunks.add(&scope("a"), group, 0, row.as_bytes(), &mut out);
        }
        chunks.flush(&mut out);
        assert_eq!(
            texts(&out),
            [concat!(
                r#"ms.wal.p.a [{"table":"t","op":"upsert","rows":[["1"],["2"]]},"#,
                r#"{"table":"t","op":"update","columns":["id","x"],"rows":[["1",null]]},"#,
                r#"{"table":"t","op":"delete","rows":[["2"]]}]"#
            )]
        );
        let parsed: Vec<TableChanges> = serde_json::from_slice(&out[0].payload).unwrap();
        assert_eq!(parsed.len(), 3);
    }

    #[test]
    fn chunks_stay_under_the_limit_and_the_last_row_stays() {
        let mut chunks = Chunks::new(MAX_TRANSACTION_BUFFER_BYTES, MAX_MESSAGE_BYTES);
        let mut out = Vec::new();
        let row = format!("[\"{}\"]", "x".repeat(1000));
        for _ in 0..2000 {
            chunks.add(&scope("a"), UPSERT, 0, row.as_bytes(), &mut out);
        }
        assert_eq!(out.len(), 3);
        chunks.flush(&mut out);
        assert_eq!(out.len(), 4);
        let mut rows = 0;
        for chunk in &out {
            assert!(chunk.payload.len() <= MAX_MESSAGE_BYTES, "{}", chunk.payload.len());
            rows += serde_json::from_slice::<Vec<TableChanges>>(&chunk.payload).unwrap()[0].rows.len();
        }
        assert_eq!(rows, 2000);
    }

    #[test]
    fn memory_is_bounded_over_all_scopes() {
        let mut chunks = Chunks::new(100_000, MAX_MESSAGE_BYTES);
        let mut out = Vec::new();
        let mut emitted = 0;
        for n in 0..20_000 {
            chunks.add(&scope(&n.to_string()), UPSERT, 0, b"[\"1\"]", &mut out);
            emitted += out.len();
            out.clear();
            assert!(chunks.bytes <= 100_000 && chunks.ids.len() == chunks.buffers.len());
        }
        chunks.flush(&mut out);
        assert!(!out.is_empty());
        assert_eq!(emitted + out.len(), 20_000);
    }

    /// Applies the chunks as a client that holds every scope would; the keys that remain.
    fn final_keys(out: &[Chunk]) -> Vec<String> {
        let mut keys = std::collections::BTreeSet::new();
        for chunk in out {
            for changes in serde_json::from_slice::<Vec<TableChanges>>(&chunk.payload).unwrap() {
                for row in changes.rows {
                    let key = row[0].clone().unwrap();
                    match changes.op {
                        TableOp::Delete => keys.remove(&key),
                        _ => keys.insert(key),
                    };
                }
            }
        }
        keys.into_iter().collect()
    }

    #[test]
    fn moves_between_scopes_keep_their_order() {
        // Random moves, deletes and inserts of a few rows over a few scopes: whoever holds all scopes sees what is left.
        let mut state = 1_u64;
        let mut random = |n: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % n
        };
        for _ in 0..2000 {
            let mut chunks = Chunks::new(MAX_TRANSACTION_BUFFER_BYTES, MAX_MESSAGE_BYTES);
            let mut out = Vec::new();
            let mut homes: HashMap<u64, u64> = HashMap::new();
            for _ in 0..random(30) {
                let key = random(4);
                let row = format!("[\"{key}\"]");
                if let Some(home) = homes.remove(&key) {
                    chunks.add(&scope(&home.to_string()), DELETE, key, row.as_bytes(), &mut out);
                    if random(3) == 0 {
                        continue;
                    }
                }
                let home = random(3);
                chunks.add(&scope(&home.to_string()), UPSERT, key, row.as_bytes(), &mut out);
                homes.insert(key, home);
            }
            chunks.flush(&mut out);
            let mut expected: Vec<String> = homes.keys().map(u64::to_string).collect();
            expected.sort();
            assert_eq!(final_keys(&out), expected, "{:?}", texts(&out));
        }
    }

    #[test]
    fn bulk_moves_in_one_direction_take_few_messages() {
        let mut chunks = Chunks::new(MAX_TRANSACTION_BUFFER_BYTES, MAX_MESSAGE_BYTES);
        let mut out = Vec::new();
        chunks.add(&scope("to"), UPSERT, u64::MAX, b"[\"x\"]", &mut out);
        for key in 0..1000 {
            let row = format!("[\"{key}\"]");
            chunks.add(&scope("from"), DELETE, key, row.as_bytes(), &mut out);
            chunks.add(&scope("to"), UPSERT, key, row.as_bytes(), &mut out);
        }
        chunks.flush(&mut out);
        assert_eq!(out.len(), 3);
    }
}
