//! Staging of what the edge sends, until it can be applied whole.
//!
//! The rule is in [`millstream_schemas::frame`]: what comes between two commits belongs together, a repeated index starts
//! its transaction anew, and a snapshot is staged until its end. Transactions that are ready at the same time leave as
//! one [`Batch`], for one local transaction: that is what makes catching up fast. Of a transaction that is too large to be kept
//! in memory until its end, the store keeps the rows aside.

use millstream_schemas::frame::{Confirmed, Resume, Rows, ServerFrame, SnapshotMark};
use millstream_schemas::{Lsn, Position, Scope, TableChanges};

use crate::status::Download;

/// What the store does, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Work {
    /// Forget the rows that an earlier snapshot, cut before its end, left in the staging area.
    ClearStage,
    /// Put rows of a snapshot into the staging area.
    Stage(Vec<TableChanges>),
    /// After a cut the snapshot may go on behind what is staged by now, this many rows.
    Mark(SnapshotMark, u64),
    /// Forget what was kept aside by earlier sessions.
    ClearSpill,
    /// Keep rows aside, behind what there is under this number.
    Spill(u64, Vec<TableChanges>),
    /// Forget what was kept aside under this number: its transaction begins anew.
    Unspill(u64),
    /// Apply in one local transaction.
    Apply(Batch),
}

/// Most encoded bytes of a transaction that is not complete which stay in memory.
pub const SPILL_BYTES: usize = 2 << 20;

/// Steps of one local transaction, with the position that the store then has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// In order.
    pub steps: Vec<Step>,
    /// Where the rows stand afterwards.
    pub position: Option<Position>,
    /// Newest commit time among the transactions, in microseconds since 1970; 0 if there is none.
    pub at: u64,
    /// Number of server transactions with rows.
    pub transactions: u64,
    /// Trace contexts of the transactions; at most [`MAX_TRACES`].
    pub traceparents: Vec<String>,
    /// With it, the store has everything that was committed before the session was welcomed.
    pub caught_up: bool,
}

impl Batch {
    /// Counts a transaction whose rows follow; `transaction` is the one that was counted last.
    fn begin(&mut self, rows: &Rows, transaction: &mut Option<Lsn>) {
        self.at = self.at.max(rows.at);
        if transaction.replace(rows.lsn) == Some(rows.lsn) {
            return;
        }
        self.transactions += 1;
        if let Some(traceparent) = &rows.traceparent
            && self.traceparents.len() < MAX_TRACES
        {
            self.traceparents.push(traceparent.clone());
        }
    }
}

/// Most trace contexts that a batch carries; those beyond are not continued.
pub const MAX_TRACES: usize = 64;

/// Part of a [`Batch`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Row changes, in commit order.
    Rows(Vec<TableChanges>),
    /// The row changes that were kept aside under this number.
    Spilled(u64),
    /// This client's transactions are settled.
    Confirmed(Confirmed),
    /// The scope was lost.
    ScopeRemoved(Scope),
    /// The rows of these scopes are those in the staging area.
    Snapshot {
        /// The scopes.
        scopes: Vec<Scope>,
        /// Whether every other scope is gone.
        full: bool,
    },
}

/// The edge broke the protocol: the session ends and the next one starts afresh.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the edge sent {0}")]
pub struct ProtocolError(pub &'static str);

#[derive(Debug)]
enum Staged {
    Rows(Rows, usize),
    /// Rows of which the store has the changes, under this number, and those of what followed.
    Spilled(Rows, u64),
    Confirmed(Confirmed),
    ScopeRemoved(Scope),
    Snapshot {
        scopes: Vec<Scope>,
        full: bool,
    },
}

/// The staging of one session.
#[derive(Debug)]
pub struct Replica {
    /// Most encoded bytes of an open transaction in memory.
    spill_bytes: usize,
    staged: Vec<Staged>,
    staged_bytes: usize,
    /// LSN and index of the last `rows` of a transaction that is not complete.
    open: Option<(Lsn, u32)>,
    /// How often something was kept aside.
    spills: u64,
    /// Scopes of the snapshot under way.
    snapshot: Option<Vec<Scope>>,
    /// By what it can go on after a cut.
    token: Option<String>,
    /// Rows of a cut snapshot in the staging area.
    cut: u64,
    /// How far it is.
    download: Download,
    /// Its place among what is staged has come.
    applied: bool,
    /// The next snapshot replaces every scope.
    full: bool,
    work: Vec<Work>,
    work_bytes: usize,
}

impl Replica {
    /// The staging of a session that began with this `resume`.
    pub fn new(resume: Resume) -> Self {
        Replica {
            spill_bytes: SPILL_BYTES,
            staged: Vec::new(),
            staged_bytes: 0,
            open: None,
            spills: 0,
            snapshot: None,
            token: None,
            cut: 0,
            download: Download::default(),
            applied: false,
            full: resume == Resume::Snapshot,
            work: Vec::new(),
            work_bytes: 0,
        }
    }

    /// The staging area holds this many rows of a snapshot that was cut.
    #[must_use]
    pub fn behind_cut(self, rows: u64) -> Self {
        Replica { cut: rows, ..self }
    }

    /// Keeps less than [`SPILL_BYTES`] in memory, for tests.
    #[must_use]
    pub fn spilling_above(self, bytes: usize) -> Self {
        Replica { spill_bytes: bytes, ..self }
    }

    /// Whether a snapshot is arriving.
    pub fn in_snapshot(&self) -> bool {
        self.snapshot.is_some() || self.full
    }

    /// How far the snapshot under way is.
    pub fn download(&self) -> Option<Download> {
        self.snapshot.is_some().then_some(self.download)
    }

    /// Whether something waits to be taken.
    pub fn is_ready(&self) -> bool {
        !self.work.is_empty()
    }

    /// Encoded size of what waits to be taken, in bytes; the caller stops reading when it is too much.
    pub fn ready_bytes(&self) -> usize {
        self.work_bytes
    }

    /// Encoded size of what is staged in memory, in bytes.
    pub fn staged_bytes(&self) -> usize {
        self.staged_bytes
    }

    /// What is ready for the store.
    pub fn take(&mut self) -> Vec<Work> {
        self.work_bytes = 0;
        std::mem::take(&mut self.work)
    }

    /// Takes a frame of `bytes` encoded bytes. Frames that are not the replica's come back.
    ///
    /// # Errors
    /// The frame is out of place.
    pub fn handle(&mut self, frame: ServerFrame, bytes: usize) -> Result<Option<ServerFrame>, ProtocolError> {
        match frame {
            ServerFrame::Rows(rows) => self.rows(rows, bytes),
            ServerFrame::Confirmed(confirmed) => self.stage(Staged::Confirmed(confirmed), bytes),
            ServerFrame::ScopeRemoved { scope } => self.stage(Staged::ScopeRemoved(scope), bytes),
            ServerFrame::Commit { position } => {
                self.open = None;
                if self.snapshot.is_none() {
                    self.commit(position);
                }
            }
            ServerFrame::CaughtUp { position } => {
                if self.snapshot.is_some() {
                    return Err(ProtocolError("caught_up within a snapshot"));
                }
                self.open = None;
                self.commit(position);
                if let Some(Work::Apply(batch)) = self.work.last_mut() {
                    batch.caught_up = true;
                }
            }
            ServerFrame::SnapshotBegin { scopes, rows, token, resumed } => {
                self.download = Download { rows: if resumed { self.cut } else { 0 }, total: rows };
                self.token = token;
                if self.snapshot.replace(scopes).is_some() {
                    return Err(ProtocolError("snapshot_begin within a snapshot"));
                }
                self.applied = false;
                if !resumed {
                    self.work.push(Work::ClearStage);
                }
            }
            ServerFrame::SnapshotRows { changes, mark } => {
                if self.snapshot.is_none() {
                    return Err(ProtocolError("snapshot_rows outside a snapshot"));
                }
                self.work_bytes += bytes;
                self.download.rows += changes.iter().map(|change| change.rows.len() as u64).sum::<u64>();
                self.work.pop_if(|work| matches!(work, Work::Mark(..)));
                match self.work.last_mut() {
                    Some(Work::Stage(earlier)) => earlier.extend(changes),
                    _ => self.work.push(Work::Stage(changes)),
                }
                let mark = self.token.clone().zip(mark).map(|(token, mark)| SnapshotMark { token, mark });
                self.work.extend(mark.map(|mark| Work::Mark(mark, self.download.rows)));
            }
            ServerFrame::SnapshotApply {} => {
                let scopes = self.snapshot.clone().ok_or(ProtocolError("snapshot_apply outside a snapshot"))?;
                if std::mem::replace(&mut self.applied, true) {
                    return Err(ProtocolError("snapshot_apply twice in a snapshot"));
                }
                let full = std::mem::take(&mut self.full);
                self.stage(Staged::Snapshot { scopes, full }, bytes);
            }
            ServerFrame::SnapshotEnd { position } => {
                if self.snapshot.take().is_none() || !self.applied {
                    return Err(ProtocolError("snapshot_end without snapshot_begin and snapshot_apply"));
                }
                // The edge ends a bracket between transactions, and says no `commit` inside it.
                self.open = None;
                self.commit(position);
            }
            other => return Ok(Some(other)),
        }
        Ok(None)
    }

    fn stage(&mut self, item: Staged, bytes: usize) {
        self.staged_bytes += bytes;
        self.staged.push(item);
    }

    fn rows(&mut self, rows: Rows, bytes: usize) {
        if self.open.is_some_and(|(lsn, index)| lsn == rows.lsn && rows.index <= index) {
            // The earlier attempt at this transaction was cut.
            let mut bytes = 0;
            let work = &mut self.work;
            self.staged.retain(|item| match item {
                Staged::Rows(earlier, size) if earlier.lsn == rows.lsn => {
                    bytes += size;
                    false
                }
                Staged::Spilled(earlier, number) if earlier.lsn == rows.lsn => {
                    work.push(Work::Unspill(*number));
                    false
                }
                _ => true,
            });
            self.staged_bytes -= bytes;
        }
        let position = Position { epoch: rows.epoch, stream_seq: rows.stream_seq, lsn: rows.lsn };
        let last = rows.last;
        self.open = (!last).then_some((rows.lsn, rows.index));
        self.stage(Staged::Rows(rows, bytes), bytes);
        if last && self.snapshot.is_none() {
            self.commit(position);
        } else if !last {
            self.spill(position.lsn);
        }
    }

    /// Has the store keep rows of the open transaction aside if they have grown too large: those at the end, so that what
    /// came before or between them (a snapshot, say) keeps its place.
    fn spill(&mut self, open: Lsn) {
        let size_of = |item: &Staged| match item {
            Staged::Rows(rows, size) if rows.lsn == open => Some(*size),
            _ => None,
        };
        let sizes: Vec<usize> = self.staged.iter().rev().map_while(size_of).collect();
        let size: usize = sizes.iter().sum();
        if size <= self.spill_bytes {
            return;
        }
        let run = self.staged.split_off(self.staged.len() - sizes.len());
        let mut changes = Vec::new();
        let mut number = match self.staged.last() {
            Some(Staged::Spilled(rows, number)) if rows.lsn == open => Some(*number),
            _ => None,
        };
        for item in run {
            let Staged::Rows(mut rows, _) = item else { continue };
            changes.append(&mut rows.changes);
            if number.is_none() {
                if self.spills == 0 {
                    self.work.push(Work::ClearSpill);
                }
                self.spills += 1;
                number = Some(self.spills);
                self.staged.push(Staged::Spilled(rows, self.spills));
            }
        }
        self.work.push(Work::Spill(number.unwrap_or_default(), changes));
        self.staged_bytes -= size;
        self.work_bytes += size;
    }

    /// Everything staged is ready.
    fn commit(&mut self, position: Position) {
        let mut batch = match self.work.pop() {
            Some(Work::Apply(batch)) => batch,
            other => {
                self.work.extend(other);
                Batch::default()
            }
        };
        let mut transaction = None;
        for item in self.staged.drain(..) {
            match item {
                Staged::Rows(rows, _) => {
                    batch.begin(&rows, &mut transaction);
                    match batch.steps.last_mut() {
                        Some(Step::Rows(earlier)) => earlier.extend(rows.changes),
                        _ => batch.steps.push(Step::Rows(rows.changes)),
                    }
                }
                Staged::Spilled(rows, number) => {
                    batch.begin(&rows, &mut transaction);
                    batch.steps.push(Step::Spilled(number));
                }
                Staged::Confirmed(confirmed) => batch.steps.push(Step::Confirmed(confirmed)),
                Staged::ScopeRemoved(scope) => batch.steps.push(Step::ScopeRemoved(scope)),
                Staged::Snapshot { scopes, full } => batch.steps.push(Step::Snapshot { scopes, full }),
            }
        }
        batch.position = Some(position);
        self.work.push(Work::Apply(batch));
        self.work_bytes += std::mem::take(&mut self.staged_bytes);
    }
}

#[cfg(test)]
#[path = "replica_tests.rs"]
mod tests;
