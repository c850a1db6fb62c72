//! Rows as Postgres writes them by `COPY … TO STDOUT`, re-framed for clients as they stream. Pure.

use std::fmt::Write;

use crate::resume::{Mark, Seal, Sealer};
use crate::unwritable::Unwritable;

/// A frame of snapshot rows is sent when it has grown to this many bytes.
const ROWS_FRAME_BYTES: usize = 128 * 1024;

/// How rows become frames.
pub struct Framing {
    /// Marks how far they have come.
    pub seal: Seal,
    /// Largest row, in bytes of its JSON text: larger ones are not in the stream either.
    pub row_limit: usize,
    /// Where rows are tried before they are read.
    pub unwritable: Unwritable,
}

/// Cuts a COPY stream into lines.
#[derive(Default)]
pub struct Lines {
    rest: Vec<u8>,
}

impl Lines {
    /// Calls `line` for each line that ends in the chunk.
    pub fn push(&mut self, chunk: &[u8], mut line: impl FnMut(&[u8])) {
        let mut chunk = chunk;
        while let Some(end) = chunk.iter().position(|&byte| byte == b'\n') {
            if self.rest.is_empty() {
                line(&chunk[..end]);
            } else {
                self.rest.extend_from_slice(&chunk[..end]);
                line(&self.rest);
                self.rest.clear();
            }
            chunk = &chunk[end + 1..];
        }
        self.rest.extend_from_slice(chunk);
    }
}

/// A frame `snapshot_rows` of one table, written as its rows come.
pub struct RowsFrame<'a> {
    /// Indexes of the key's columns.
    key: &'a [usize],
    mark: Mark,
    framing: &'a Framing,
    head: String,
    text: String,
    rows: usize,
    value: String,
    /// The last row.
    last: Vec<u8>,
}

impl<'a> RowsFrame<'a> {
    /// An empty frame of a table with this name and this key; `mark` says where the rows belong.
    pub fn new(table: &str, key: &'a [usize], mark: Mark, framing: &'a Framing) -> Self {
        let name = serde_json::Value::from(table);
        let head = format!(r#"{{"type":"snapshot_rows","changes":[{{"table":{name},"op":"upsert","rows":["#);
        RowsFrame { key, mark, framing, text: head.clone(), head, rows: 0, value: String::new(), last: Vec::new() }
    }

    /// Appends a row in COPY's text format (PostgreSQL documentation, "COPY", "Text Format"). Not one that is too large for
    /// the stream.
    pub fn row(&mut self, line: &[u8]) {
        self.last.clear();
        self.last.extend_from_slice(line);
        let before = self.text.len();
        if self.rows > 0 {
            self.text.push(',');
        }
        let start = self.text.len();
        self.rows += 1;
        self.text.push('[');
        for (index, field) in line.split(|&byte| byte == b'\t').enumerate() {
            if index > 0 {
                self.text.push(',');
            }
            if field == br"\N" {
                self.text.push_str("null");
                continue;
            }
            unescape(field, &mut self.value);
            match serde_json::to_string(&self.value) {
                Ok(json) => self.text.push_str(&json),
                Err(_) => self.text.push_str("null"),
            }
        }
        self.text.push(']');
        if self.text.len() - start > self.framing.row_limit {
            self.text.truncate(before);
            self.rows -= 1;
        }
    }

    /// Whether it has grown long enough to be sent.
    pub fn is_full(&self) -> bool {
        self.text.len() >= ROWS_FRAME_BYTES
    }

    /// Whether it has no rows.
    pub fn is_empty(&self) -> bool {
        self.rows == 0
    }

    /// Ends the frame, and begins the next.
    pub fn take(&mut self) -> String {
        self.rows = 0;
        let mut text = std::mem::replace(&mut self.text, self.head.clone());
        text.push_str("]}]");
        let fields: Vec<&[u8]> = self.last.split(|&byte| byte == b'\t').collect();
        self.mark.key.clear();
        for index in self.key {
            unescape(fields.get(*index).copied().unwrap_or_default(), &mut self.value);
            self.mark.key.push(self.value.clone());
        }
        if let Some(mark) = self.framing.seal.mark(&self.mark) {
            let _ = write!(text, r#","mark":{}"#, serde_json::Value::from(mark));
        }
        text.push('}');
        text
    }
}

/// The frames that a table's rows become, of which COPY sends these chunks: see `Snapshot::rows`.
pub fn reframed<'a>(table: &str, key: &[usize], chunks: impl IntoIterator<Item = &'a [u8]>) -> Vec<String> {
    let mut lines = Lines::default();
    let framing = Framing {
        seal: Sealer::new(b"").seal(""),
        row_limit: millstream_schemas::stream::MAX_ROW_BYTES,
        unwritable: Unwritable::default(),
    };
    let mut frame = RowsFrame::new(table, key, Mark { scope: None, pass: 0, key: Vec::new() }, &framing);
    let mut frames = Vec::new();
    for chunk in chunks {
        lines.push(chunk, |line| frame.row(line));
        if frame.is_full() {
            frames.push(frame.take());
        }
    }
    frames.extend((!frame.is_empty()).then(|| frame.take()));
    frames
}

/// A field of COPY's text format.
fn unescape(field: &[u8], value: &mut String) {
    let mut bytes = field.iter();
    let mut plain = Vec::with_capacity(field.len());
    while let Some(&byte) = bytes.next() {
        plain.push(match byte {
            b'\\' => match bytes.next() {
                Some(b'b') => 8,
                Some(b'f') => 12,
                Some(b'n') => b'\n',
                Some(b'r') => b'\r',
                Some(b't') => b'\t',
                Some(b'v') => 11,
                Some(&other) => other,
                None => b'\\',
            },
            other => other,
        });
    }
    value.clear();
    // The connection's encoding is UTF-8.
    value.push_str(&String::from_utf8_lossy(&plain));
}

#[cfg(test)]
mod tests {
    use millstream_schemas::frame::ServerFrame;

    use super::*;

    #[test]
    fn copy_lines_become_rows() {
        let mark = Mark { scope: None, pass: 1, key: Vec::new() };
        let framing =
            Framing { seal: Sealer::new(b"secret").seal("moment"), row_limit: 30, unwritable: Unwritable::default() };
        let mut frame = RowsFrame::new("ta\"sks", &[1, 0], mark.clone(), &framing);
        let mut lines = Lines::default();
        for chunk in ["1\tplain\t\\N\n2\tta\\tb\\\\n\\n", "end\t\n", "4\ttoo large by some bytes\t1\n3\t\"q\"\tt", "\n"]
        {
            lines.push(chunk.as_bytes(), |line| frame.row(line));
        }
        let text = frame.take();
        let ServerFrame::SnapshotRows { changes, mark: last } = serde_json::from_str(&text).unwrap() else {
            panic!("{text}")
        };
        assert_eq!(changes[0].table, "ta\"sks");
        let rows: Vec<Vec<Option<&str>>> =
            changes[0].rows.iter().map(|row| row.iter().map(Option::as_deref).collect()).collect();
        assert_eq!(
            rows,
            [
                vec![Some("1"), Some("plain"), None],
                vec![Some("2"), Some("ta\tb\\n\nend"), Some("")],
                vec![Some("3"), Some("\"q\""), Some("t")],
            ]
        );
        let last = framing.seal.open(&last.unwrap()).unwrap();
        assert_eq!(last, Mark { key: vec!["\"q\"".into(), "3".into()], ..mark });
        assert_eq!(frame.rows, 0);
    }
}
