//! Keys that change hands within a transaction. Where a primary key is deferrable, two rows may have one key for a while:
//! `SET pos = pos + 1` gives a row the key of the next one before that has left it. In the order of the log the second row's
//! delete would take away what the first one has written. Such a table's rows are therefore kept until the transaction ends,
//! and a key gets what became of it: deletes of rows that have left go out at once, what is written goes out behind them all.
//!
//! Which of two rows with one key a change is about, its old image tells: Postgres identifies rows by an immediate unique
//! index, or by all of their columns; then rows that are not told apart are equal.

use std::collections::{HashMap, HashSet};

use super::change::{Change, hash, key, scopes};
use crate::moves::{Moves, moves};
use crate::relation::{Cell, Image};

/// Most bytes of rows that are kept. Beyond, rows go out in the order of the log; if any had left its key, the table is sent again.
const MAX_KEPT_BYTES: usize = 8 * 1024 * 1024;
/// What a row costs beyond its values.
const ROW_OVERHEAD_BYTES: usize = 256;

/// A value that is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Kept {
    Absent,
    Unchanged,
    Unsendable,
    Null,
    Text(Box<str>),
}

impl Kept {
    fn of(cell: &Cell<'_>) -> Kept {
        match *cell {
            Cell::Absent => Kept::Absent,
            Cell::Unchanged => Kept::Unchanged,
            Cell::Unsendable => Kept::Unsendable,
            Cell::Null => Kept::Null,
            Cell::Text(text) => Kept::Text(text.into()),
        }
    }

    fn cell(&self) -> Cell<'_> {
        match self {
            Kept::Absent => Cell::Absent,
            Kept::Unchanged => Cell::Unchanged,
            Kept::Unsendable => Cell::Unsendable,
            Kept::Null => Cell::Null,
            Kept::Text(text) => Cell::Text(text),
        }
    }
}

fn keep(image: &Image<'_>) -> Vec<Kept> {
    image.iter().map(Kept::of).collect()
}

fn cells(kept: &[Kept]) -> Image<'_> {
    kept.iter().map(Kept::cell).collect()
}

fn bytes(kept: &[Kept]) -> usize {
    let text = |kept: &Kept| if let Kept::Text(text) = kept { text.len() } else { 0 };
    ROW_OVERHEAD_BYTES + kept.iter().map(text).sum::<usize>()
}

/// A row under a key, as the transaction has left it so far.
struct Row {
    /// Place in the order in which rows are sent.
    number: u64,
    image: Vec<Kept>,
    /// It was under this key when the transaction began.
    was_here: bool,
    /// Then, as it was: none if the change stream does not say.
    before: Option<Vec<Kept>>,
}

impl Row {
    /// Whether it is the row that an old image is of.
    fn is(&self, old: &Image<'_>) -> bool {
        self.image.iter().zip(old).all(|(kept, old)| match (kept, old) {
            (Kept::Text(text), Cell::Text(old)) => **text == **old,
            (Kept::Null, Cell::Null) => true,
            (Kept::Text(_), Cell::Null) | (Kept::Null, Cell::Text(_)) => false,
            _ => true,
        })
    }

    /// The scopes that hold it since before the transaction.
    fn lose(&self, change: &mut Change<'_>, key: &[&str]) {
        let before = cells(self.before.as_ref().unwrap_or(&self.image));
        change.moves = moves(change.table, Some(&before), None, false);
        change.delete(&scopes(change.table, &before), Some(key));
    }
}

type Key = (usize, Vec<Box<str>>);

/// The rows of a transaction that are kept.
#[derive(Default)]
pub(super) struct Handover {
    keys: HashMap<Key, Vec<Row>>,
    next: u64,
    bytes: usize,
    /// Tables of which rows have left their keys.
    left: HashSet<usize>,
    /// Tables of which there were too many rows.
    over: HashSet<usize>,
}

impl Handover {
    /// Whether rows of a table are kept still.
    pub fn keeps(&self, table: usize) -> bool {
        !self.over.contains(&table)
    }

    /// Takes a row change; either image is missing where the row was not there, or is not there any more. An update without an
    /// old image has changed nothing that identifies its row; `identity` are those columns.
    pub fn take(
        &mut self,
        index: usize,
        change: &mut Change<'_>,
        before: Option<&Image<'_>>,
        after: Option<&Image<'_>>,
        is_update: bool,
        identity: impl Fn(usize) -> bool,
    ) {
        let identified: Option<Image<'_>> = match (before, after) {
            (Some(before), _) => Some(before.clone()),
            (None, Some(after)) if is_update => {
                let of = |(column, cell): (usize, &_)| if identity(column) { *cell } else { Cell::Absent };
                Some(after.iter().enumerate().map(of).collect())
            }
            _ => None,
        };
        let new_key = after.and_then(|after| change.key(after));
        let mut image = after.map(keep);
        let mut was_here = None;
        if let Some(old) = &identified {
            let Some(old_key) = key(change.table, old) else {
                change.unroutable();
                return self.enter(index, new_key, image, None);
            };
            let stays = new_key.as_ref() == Some(&old_key);
            let place: Key = (index, old_key.iter().map(|part| (*part).into()).collect());
            let rows = self.keys.get_mut(&place);
            let found = rows.and_then(|rows| Some(rows.swap_remove(rows.iter().position(|row| row.is(old))?)));
            if self.keys.get(&place).is_some_and(Vec::is_empty) {
                self.keys.remove(&place);
            }
            match found {
                Some(row) => {
                    self.bytes = self.bytes.saturating_sub(bytes(&row.image));
                    for (now, then) in image.iter_mut().flatten().zip(&row.image) {
                        if *now == Kept::Unchanged {
                            *now = then.clone();
                        }
                    }
                    if stays && row.was_here {
                        // Without an old image it was, as far as that counts, as its first update has left it.
                        was_here = Some(row.before.or(Some(row.image)));
                    } else if row.was_here {
                        row.lose(change, &old_key);
                    }
                }
                None if stays => was_here = Some(before.map(keep)),
                None => {
                    change.moves = moves(change.table, Some(old), None, false);
                    change.delete(&scopes(change.table, old), Some(&old_key));
                }
            }
            if !stays {
                self.left.insert(index);
            }
        }
        self.enter(index, new_key, image, was_here);
        if self.bytes > MAX_KEPT_BYTES {
            self.over.insert(index);
            self.flush(index, change);
        }
    }

    fn enter(
        &mut self,
        index: usize,
        key: Option<Vec<&str>>,
        image: Option<Vec<Kept>>,
        was_here: Option<Option<Vec<Kept>>>,
    ) {
        let Some((key, image)) = key.zip(image) else { return };
        let place: Key = (index, key.into_iter().map(Into::into).collect());
        self.bytes += bytes(&image);
        let number = self.next;
        self.next += 1;
        let (was_here, before) = (was_here.is_some(), was_here.flatten());
        self.keys.entry(place).or_default().push(Row { number, image, was_here, before });
    }

    /// A truncation leaves none of a table's rows.
    pub fn truncate(&mut self, table: usize) {
        let mut freed = 0;
        self.keys.retain(|(of, _), rows| {
            let stays = *of != table;
            freed += if stays { 0 } else { rows.iter().map(|row| bytes(&row.image)).sum() };
            stays
        });
        self.bytes = self.bytes.saturating_sub(freed);
    }

    /// The tables of which rows are kept.
    pub fn tables(&self) -> Vec<usize> {
        let mut tables: Vec<usize> = self.keys.keys().map(|(table, _)| *table).collect();
        tables.sort_unstable();
        tables.dedup();
        tables
    }

    /// Whether rows of a table may have been sent in an order that leaves a key with the wrong one.
    pub fn is_in_doubt(&self, table: usize) -> bool {
        self.over.contains(&table) && self.left.contains(&table)
    }

    /// Sends what is kept of a table.
    pub fn flush(&mut self, index: usize, change: &mut Change<'_>) {
        let mut rows: Vec<Row> = Vec::new();
        self.keys.retain(|(of, _), kept| {
            let is_of = *of == index;
            if is_of {
                rows.append(kept);
            }
            !is_of
        });
        rows.sort_unstable_by_key(|row| row.number);
        for row in rows {
            self.bytes = self.bytes.saturating_sub(bytes(&row.image));
            let image = cells(&row.image);
            if row.was_here {
                change.update(row.before.as_deref().map(cells).as_ref(), &image);
            } else if !image.contains(&Cell::Unchanged) {
                change.moves = moves(change.table, None, Some(&image), false);
                let key = key(change.table, &image);
                change.write(&image, &scopes(change.table, &image), key);
            }
            change.moves = Moves::new();
        }
    }

    /// Marks a table whose rows go out in the order of the log, as one of which a row has left its key.
    pub fn leaves(&mut self, table: usize) {
        self.left.insert(table);
    }
}

/// Sends a row change, or keeps it where keys may change hands.
pub(super) fn change_row(
    change: &mut Change<'_>,
    handover: &mut Handover,
    before: Option<&Image<'_>>,
    after: Option<&Image<'_>>,
    is_update: bool,
) {
    let (index, mapping) = (change.mapping.table, change.mapping);
    if !change.table.synced {
        for (member, moved) in moves(change.table, before, after, is_update) {
            change.chunks.add_moves(&member, &moved, change.pieces);
        }
        return;
    }
    if change.loose_key && handover.keeps(index) {
        return handover.take(index, change, before, after, is_update, |column| mapping.covers(column));
    }
    if change.loose_key
        && before.is_some_and(|before| after.is_none_or(|after| key(change.table, before) != key(change.table, after)))
    {
        handover.leaves(index);
    }
    match (before, after) {
        (before, Some(after)) if is_update => change.update(before, after),
        (_, Some(after)) => {
            let key = change.key(after);
            change.moves = moves(change.table, None, Some(after), false);
            change.write(after, &scopes(change.table, after), key);
        }
        (Some(before), None) => {
            let key = change.key(before);
            change.moves = moves(change.table, Some(before), None, false);
            change.delete(&scopes(change.table, before), key.as_deref());
            if let Some(key) = key {
                let row = hash(change.table, &key);
                change.withdrawn.remove(&row);
                change.sizes.forget(row);
            }
        }
        (None, None) => {}
    }
}
