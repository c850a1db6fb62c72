//! How large the large values of rows are that their readers hold. An update that leaves such a value alone does not bring it,
//! and yet the row may cross the limit with it: then it is withdrawn, or sent whole to readers who lack it. What is not known
//! here is read from the table, once for each row that is updated so. Pure.

use std::collections::HashMap;

use super::lookup::{Filled, ReadValue};
use crate::chunks::KeyHash;
use crate::relation::{Cell, Image};

/// Most rows remembered.
const MAX_ROWS: usize = 65_536;
/// Rows below this size have every value in the change stream: the least that `toast_tuple_target` may be.
const ROW_BYTES: usize = 128;
/// Smaller values than this are always in the change stream: nothing is won by storing them elsewhere.
const VALUE_BYTES: usize = 18;

/// For rows that clients hold as a whole: which columns have large values, and how long these are as JSON.
#[derive(Default)]
pub(super) struct Sizes(HashMap<KeyHash, Box<[(usize, usize)]>>);

impl Sizes {
    /// Whether it is unknown how large some of these columns are, or whether clients hold the row.
    pub fn lacks(&self, row: KeyHash, columns: &[usize]) -> bool {
        let Some(known) = self.0.get(&row) else { return true };
        columns.iter().any(|column| !known.iter().any(|(index, _)| index == column))
    }

    /// What was read of a row's values that are not in the change stream.
    pub fn learn(&mut self, row: KeyHash, filled: &Filled) {
        let lengths: Vec<(usize, usize)> = filled
            .iter()
            .filter_map(
                |(column, found)| if let ReadValue::Length(bytes) = found { Some((*column, *bytes)) } else { None },
            )
            .collect();
        if lengths.is_empty() {
            return;
        }
        let known = self.0.remove(&row).unwrap_or_default();
        let others = known.iter().filter(|(column, _)| !lengths.iter().any(|(read, _)| read == column)).copied();
        let sizes = others.chain(lengths.iter().copied()).collect();
        self.remember(row, sizes);
    }

    fn remember(&mut self, row: KeyHash, sizes: Box<[(usize, usize)]>) {
        if self.0.len() >= MAX_ROWS
            && !self.0.contains_key(&row)
            && let Some(one) = self.0.keys().next().copied()
        {
            self.0.remove(&one);
        }
        self.0.insert(row, sizes);
    }

    /// Bytes of the values that a row keeps without a message saying so.
    pub fn unchanged(&self, row: KeyHash, image: &Image<'_>) -> usize {
        let known = self.0.get(&row).map(AsRef::as_ref).unwrap_or_default();
        known.iter().filter(|(column, _)| image.get(*column) == Some(&Cell::Unchanged)).map(|(_, bytes)| bytes).sum()
    }

    /// Clients hold the row as it is now.
    pub fn holds(&mut self, row: KeyHash, image: &Image<'_>) {
        let kept = |column| self.0.get(&row)?.iter().find(|(index, _)| *index == column).map(|(_, bytes)| *bytes);
        let size = |(column, cell): (usize, &Cell<'_>)| match cell {
            Cell::Text(text) if text.len() >= VALUE_BYTES => Some((column, json_bytes(text))),
            Cell::Unchanged => Some((column, kept(column)?)),
            _ => None,
        };
        let sizes: Box<[(usize, usize)]> = image.iter().enumerate().filter_map(size).collect();
        if sizes.iter().map(|(_, bytes)| bytes).sum::<usize>() < ROW_BYTES {
            return self.forget(row);
        }
        self.remember(row, sizes);
    }

    /// Clients do not hold the row.
    pub fn forget(&mut self, row: KeyHash) {
        self.0.remove(&row);
    }
}

/// Length of a text as a JSON string.
fn json_bytes(text: &str) -> usize {
    let escaped = |byte: u8| match byte {
        b'"' | b'\\' | b'\n' | b'\r' | b'\t' => 2,
        0..0x20 => 6,
        _ => 1,
    };
    2 + text.bytes().map(escaped).sum::<usize>()
}
