//! Doing what a session's staging found ready, a slice at a time: other calls to the store come between the slices, and need not wait
//! for the end of a snapshot.

use std::collections::VecDeque;

use millstream_client_core::replica::{Step, Work};
use millstream_schemas::{Row, TableChanges};

use crate::apply::Applied;
use crate::error::During;
use crate::snapshot::Sweep;
use crate::{Store, StoreError};

/// Rows of a snapshot that are taken in one slice, at most.
const SLICE_ROWS: usize = 500;
/// Bytes of rows of a snapshot that are taken in one slice; the last row may exceed it.
const SLICE_BYTES: usize = 256 * 1024;

/// As many rows as this are cleared from the staging area in the time in which one is taken.
const CLEARED_IN_PLACE_OF_ONE: usize = 10;

/// What a session's staging found ready, while it is being done.
#[derive(Debug)]
pub struct Performing {
    works: VecDeque<Work>,
    /// Of the first of them.
    sweep: Sweep,
    /// Rows in a slice.
    rows: usize,
}

impl Performing {
    /// All of it is to be done.
    pub fn new(works: Vec<Work>) -> Performing {
        Performing { works: works.into(), sweep: Sweep::default(), rows: SLICE_ROWS }
    }

    /// Smaller slices, for tests.
    #[must_use]
    pub fn in_slices_of(self, rows: usize) -> Performing {
        Performing { rows, ..self }
    }

    /// Nothing is left.
    pub fn is_done(&self) -> bool {
        self.works.is_empty()
    }
}

/// Takes the first rows, as many as fit a slice of at `most` this number.
fn cut_off(changes: &mut Vec<TableChanges>, most: usize) -> Vec<TableChanges> {
    let (mut rows, mut bytes) = (0, 0);
    let mut fits = |row: &Row| {
        let fits = rows < most && bytes < SLICE_BYTES;
        rows += 1;
        bytes += row.iter().flatten().map(String::len).sum::<usize>();
        fits
    };
    for (whole, change) in changes.iter_mut().enumerate() {
        let Some(first) = change.rows.iter().position(|row| !fits(row)) else { continue };
        let rest = change.rows.split_off(first);
        let rows = std::mem::replace(&mut change.rows, rest);
        let part = TableChanges { table: change.table.clone(), op: change.op, columns: change.columns.clone(), rows };
        let mut slice: Vec<TableChanges> = changes.drain(..whole).collect();
        slice.push(part);
        return slice;
    }
    std::mem::take(changes)
}

impl Store {
    /// Does what a session's staging found ready, in order. Each [`Work::Apply`] is one local transaction, whole or not
    /// at all; it is durable with the app's next write at the latest.
    ///
    /// # Errors
    /// [`StoreError::UnknownTable`], [`StoreError::RowShape`]: a row does not fit the schema. Otherwise SQLite failed. The step that
    /// failed is not applied, nor its position taken; those before it stand.
    pub fn perform(&mut self, works: &[Work]) -> Result<Applied, StoreError> {
        let mut all =
            Applied { confirmed_seq: self.confirmed_seq().during("reading confirmed_seq")?, ..Applied::default() };
        let mut performing = Performing::new(works.to_vec());
        while !performing.is_done() {
            let Some(applied) = self.perform_slice(&mut performing)? else { continue };
            all.confirmed_seq = applied.confirmed_seq;
            all.settled.extend(applied.settled);
            all.position = applied.position.or(all.position);
            all.transactions += applied.transactions;
            all.released |= applied.released;
        }
        Ok(all)
    }

    /// Does the next part of what is ready: as [`Store::perform`], but for no longer than a caller can wait who wants something else of
    /// the store. Gives what a batch did that was applied. What is left must be done before anything else that a session brings, or not
    /// at all.
    ///
    /// # Errors
    /// As [`Store::perform`].
    pub fn perform_slice(&mut self, performing: &mut Performing) -> Result<Option<Applied>, StoreError> {
        let applied = self.relaxed(|store| store.slice(performing))?;
        if applied.as_ref().is_some_and(|applied| applied.released) {
            // Numbers that are about to be sent have to be on the disk: this commit waits for it, and so for those before it.
            self.transact(|store| store.keep_stamp())?;
        }
        Ok(applied)
    }

    fn slice(&mut self, performing: &mut Performing) -> Result<Option<Applied>, StoreError> {
        let Performing { works, sweep, rows } = performing;
        let mut applied = None;
        match works.front_mut() {
            None => {}
            Some(Work::ClearStage) if !self.clear_stage(CLEARED_IN_PLACE_OF_ONE * *rows)? => return Ok(None),
            Some(Work::ClearStage) => {}
            Some(Work::Stage(changes)) => {
                self.stage(&cut_off(changes, *rows))?;
                if !changes.is_empty() {
                    return Ok(None);
                }
            }
            Some(Work::Mark(mark, arrived)) => self.set_meta_json("snapshot", &(mark, *arrived))?,
            Some(Work::ClearSpill) => self.clear_spill(None)?,
            Some(Work::Spill(part, changes)) => self.spill(*part, changes)?,
            Some(Work::Unspill(part)) => self.clear_spill(Some(*part))?,
            Some(Work::Apply(batch)) => {
                let snapshot = batch.steps.iter().find_map(|step| match step {
                    Step::Snapshot { scopes, full } => Some((scopes, *full)),
                    _ => None,
                });
                if let Some((scopes, full)) = snapshot
                    && !self.transact(|store| store.sweep(sweep, *rows, scopes, full))?
                {
                    return Ok(None);
                }
                let has_snapshot = snapshot.is_some();
                applied = Some(self.apply_batch(batch, true)?);
                *sweep = Sweep::default();
                if has_snapshot || (batch.caught_up && self.is_staging()?) {
                    // Nothing staged is needed now. With `caught_up`, no bracket is open, so a snapshot that was cut is not coming back.
                    works[0] = Work::ClearStage;
                    return Ok(applied);
                }
            }
        }
        works.pop_front();
        Ok(applied)
    }
}
