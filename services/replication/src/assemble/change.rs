//! One row change on its way into the chunks: what becomes of it in the scopes that it was in, and in those that it is in.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};

use millstream_catalog::Table;
use millstream_schemas::{Scope, TableOp};

use super::error::AssembleError;
use super::limits::Limits;
use super::lookup::{Filled, ReadValue};
use super::sizes::Sizes;
use crate::chunks::{Chunk, Chunks, KeyHash, RowGroup, write_row};
use crate::left_out::{Again, LeftOut};
use crate::moves::{Moves, moves};
use crate::pgoutput::{Old, Tuple};
use crate::relation::{BadTuple, Cell, Image, Mapping};

/// Most rows remembered as withdrawn.
const MAX_WITHDRAWN: usize = 65_536;

/// One row change.
pub(super) struct Change<'a> {
    pub table: &'a Table,
    pub mapping: &'a Mapping,
    pub limits: Limits,
    pub chunks: &'a mut Chunks,
    pub withdrawn: &'a mut HashSet<KeyHash>,
    pub sizes: &'a mut Sizes,
    pub left_out: &'a mut Vec<LeftOut>,
    pub pieces: &'a mut Vec<Chunk>,
    pub row: &'a mut Vec<u8>,
    /// Memberships that it moves: told with the row, in the scopes of those whom they concern.
    pub moves: Moves,
    /// Keys of its table may change hands within a transaction.
    pub loose_key: bool,
    /// Set if readers may be left with rows that are not theirs any more, or lack some: the table is sent again.
    pub again: &'a mut Option<Again>,
}

impl Change<'_> {
    /// The key of a row. Without one it concerns nobody, and that is told.
    pub fn key<'v>(&mut self, image: &Image<'v>) -> Option<Vec<&'v str>> {
        let key = key(self.table, image);
        if key.is_none() {
            self.left_out.push(LeftOut::Key { table: self.table.name.clone() });
        }
        key
    }

    /// Who had the row cannot be told, or not all of them.
    pub fn unroutable(&mut self) {
        *self.again = Some(Again::Unroutable);
    }

    /// Whether the old image tells what names the row and its scopes; if not, its readers are sent the table again.
    pub fn route(&mut self, before: Option<&Image<'_>>) {
        let known = |column: usize| match before {
            Some(before) => before[column] != Cell::Absent,
            // No old image means that nothing of it changed, where it covers these columns.
            None => self.mapping.covers(column),
        };
        if !self.table.identity_columns().into_iter().all(known) {
            self.unroutable();
        }
    }

    pub fn update(&mut self, before: Option<&Image<'_>>, after: &Image<'_>) {
        self.moves = moves(self.table, before, Some(after), true);
        let now_in = scopes(self.table, after);
        let new_key = self.key(after);
        let Some(before) = before else {
            // No old image: neither key nor scope changed, since the identity covers both.
            return self.write(after, &now_in, new_key);
        };
        let was_in = scopes(self.table, before);
        let old_key = self.key(before);
        let moved = old_key != new_key;
        let lost: Vec<Scope> = was_in.iter().filter(|scope| moved || !now_in.contains(scope)).cloned().collect();
        self.delete(&lost, old_key.as_deref());
        if after.contains(&Cell::Unchanged) {
            // The value was to be read and the row was gone by then: nobody who did not have it needs it any more.
            let kept: Vec<Scope> = now_in.into_iter().filter(|scope| !moved && was_in.contains(scope)).collect();
            self.write(after, &kept, new_key);
        } else {
            self.write(after, &now_in, new_key);
        }
    }

    pub fn write(&mut self, image: &Image<'_>, scopes: &[Scope], key: Option<Vec<&str>>) {
        let Some(key) = key.filter(|_| !scopes.is_empty()) else { return };
        let table = self.table;
        let hash = hash(table, &key);
        if !self.encode(image) || self.row.len() + self.sizes.unchanged(hash, image) > self.limits.row {
            // Waiting for somebody to make it smaller would stop everybody's stream.
            self.left_out.push(LeftOut::Row { table: table.name.clone() });
            if self.withdrawn.len() >= MAX_WITHDRAWN
                && let Some(one) = self.withdrawn.iter().next().copied()
            {
                self.withdrawn.remove(&one);
            }
            self.withdrawn.insert(hash);
            self.sizes.forget(hash);
            return self.delete(scopes, Some(&key));
        }
        let whole = image.iter().all(|cell| cell.is_known());
        // Unchanged values keep what the reader has; columns that the relation lacks are simply not there.
        let op = if image.contains(&Cell::Unchanged) { TableOp::Update } else { TableOp::Upsert };
        if op == TableOp::Upsert && !self.withdrawn.is_empty() {
            self.withdrawn.remove(&hash);
        }
        // Where a part of the row is not known, clients hold it only if they did before.
        if op == TableOp::Upsert || !self.sizes.lacks(hash, &[]) {
            self.sizes.holds(hash, image);
        }
        let columns: Option<Vec<&str>> = (!whole).then(|| {
            let known = image.iter().zip(&table.columns).filter(|(cell, _)| cell.is_known());
            known.map(|(_, column)| column.name.as_str()).collect()
        });
        let group = RowGroup { table: &table.name, op, columns: columns.as_deref() };
        for scope in scopes {
            let moved = self.moves.get(scope).map_or(&[][..], Vec::as_slice);
            self.chunks.add_moving(scope, group, hash, self.row, moved, self.pieces);
        }
    }

    /// Writes the row as JSON, unless it is larger than clients get, or has a value that cannot be carried.
    fn encode(&mut self, image: &Image<'_>) -> bool {
        let bytes: usize = image.iter().filter_map(|cell| cell.text()).map(str::len).sum();
        if image.contains(&Cell::Unsendable) || bytes > self.limits.row {
            return false;
        }
        write_row(self.row, image.iter().filter(|cell| cell.is_known()).map(|cell| cell.text()));
        self.row.len() <= self.limits.row
    }

    pub fn delete(&mut self, scopes: &[Scope], key: Option<&[&str]>) {
        let Some(key) = key.filter(|_| !scopes.is_empty()) else { return };
        write_row(self.row, key.iter().map(|value| Some(*value)));
        if self.row.len() > self.limits.row {
            // Clients never had it either.
            return self.left_out.push(LeftOut::Key { table: self.table.name.clone() });
        }
        let group = RowGroup { table: &self.table.name, op: TableOp::Delete, columns: None };
        let hash = hash(self.table, key);
        for scope in scopes {
            let moved = self.moves.get(scope).map_or(&[][..], Vec::as_slice);
            self.chunks.add_moving(scope, group, hash, self.row, moved, self.pieces);
        }
    }
}

/// The old and new image of a row. Values that did not change and were not sent are taken from the old image where it
/// has them, and from what was read for them.
pub(super) fn images<'a>(
    table: &Table,
    mapping: &Mapping,
    old: Option<&Old<'a>>,
    new: &Tuple<'a>,
    filled: &'a Filled,
) -> Result<(Option<Image<'a>>, Image<'a>), AssembleError> {
    let before = old.map(|old| mapping.old_image(old)).transpose().map_err(|source| bad_row(table, source))?;
    let mut after = mapping.image(new).map_err(|source| bad_row(table, source))?;
    for (column, cell) in after.iter_mut().enumerate() {
        if *cell != Cell::Unchanged {
            continue;
        }
        if let Some(old) =
            before.as_ref().map(|before| before[column]).filter(|old| matches!(old, Cell::Text(_) | Cell::Unsendable))
        {
            *cell = old;
        } else if let Some((_, found)) = filled.iter().find(|(index, _)| *index == column) {
            *cell = match found {
                ReadValue::Null => Cell::Null,
                ReadValue::Text(text) => Cell::Text(text),
                ReadValue::TooLarge => Cell::Unsendable,
                ReadValue::Length(_) => continue,
            };
        }
    }
    Ok((before, after))
}

/// The scopes of a row. Ids that no subject can carry give no scope: nobody can ask for them either.
pub(super) fn scopes(table: &Table, image: &Image<'_>) -> Vec<Scope> {
    let mut scopes = table.row_scopes(|column| image[column].text());
    scopes.retain(|scope| Scope::fits(&scope.id));
    scopes
}

/// The key of a row; `None` if a part of it is not there or cannot be carried.
pub(super) fn key<'a>(table: &Table, image: &Image<'a>) -> Option<Vec<&'a str>> {
    table.key.iter().map(|&column| image[column].text()).collect()
}

pub(super) fn hash(table: &Table, key: &[&str]) -> KeyHash {
    let mut hasher = DefaultHasher::new();
    (table.oid, key).hash(&mut hasher);
    hasher.finish()
}

pub(super) fn bad_row(table: &Table, source: BadTuple) -> AssembleError {
    AssembleError::Row { table: table.name.clone(), source }
}
