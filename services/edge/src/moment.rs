//! A moment of Postgres at which several clients start, and the rows that were read in it for all of them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use millstream_runtime::lease::Lease;
use millstream_schemas::Scope;
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio_tungstenite::tungstenite::Utf8Bytes;

use crate::catalogs::Loaded;
use crate::fence::Fence;

/// The rows cannot be shared (any more): they have to be read apart.
#[derive(Debug)]
pub struct Apart;

/// A transaction whose snapshot others may adopt while it is open.
pub struct Exporter {
    _lease: Lease,
    id: String,
}

impl Exporter {
    /// The transaction has exported its snapshot under this name.
    pub fn new(lease: Lease, id: String) -> Exporter {
        Exporter { _lease: lease, id }
    }

    /// Name of the snapshot.
    pub fn id(&self) -> &str {
        &self.id
    }
}

/// A moment, as a session holds it: as long as it does, more scopes can be read as of it.
#[derive(Clone)]
pub struct Adopted {
    pub moment: Arc<Moment>,
    pub exporter: Arc<Exporter>,
}

/// A snapshot of Postgres, and what was read in it.
pub struct Moment {
    /// What it sees.
    pub fence: Fence,
    /// The catalog that it is read by.
    pub known: Arc<Loaded>,
    /// When the first session asked for it.
    pub begun: Instant,
    parts: Mutex<HashMap<Scope, Arc<ScopeFrames>>>,
}

impl Moment {
    /// A moment in which nothing was read yet.
    pub fn new(fence: Fence, known: Arc<Loaded>, begun: Instant) -> Moment {
        Moment { fence, known, begun, parts: Mutex::default() }
    }

    /// The rows of a scope; `read` is called to fill it if nobody has asked for them.
    pub fn part(&self, scope: &Scope, read: impl FnOnce(Arc<ScopeFrames>)) -> Arc<ScopeFrames> {
        let new = || {
            let part = Arc::new(ScopeFrames::default());
            read(part.clone());
            part
        };
        locked(&self.parts).entry(scope.clone()).or_insert_with(new).clone()
    }
}

/// The rows of a scope as frames, while they are read and after.
#[derive(Default)]
pub struct ScopeFrames {
    progress: watch::Sender<ReadProgress>,
    frames: Mutex<Vec<(Utf8Bytes, OwnedSemaphorePermit)>>,
}

#[derive(Clone, Copy, Default)]
struct ReadProgress {
    /// How many rows there are, once they have been counted.
    rows: Option<u64>,
    /// How many frames can be had.
    frames: usize,
    /// No more will come; and whether that is all.
    end: Option<bool>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl ScopeFrames {
    /// It has this many rows: who is told so gets them.
    pub fn set_rows(&self, rows: u64) {
        self.progress.send_modify(|progress| progress.rows = Some(rows));
    }

    /// Takes the next frame, with the room that it takes.
    pub fn push(&self, frame: Utf8Bytes, room: OwnedSemaphorePermit) {
        locked(&self.frames).push((frame, room));
        self.progress.send_modify(|progress| progress.frames += 1);
    }

    /// No more frames will come; `whole`: these are all.
    pub fn end(&self, whole: bool) {
        self.progress.send_modify(|progress| progress.end = Some(whole));
    }

    /// How many rows it has.
    ///
    /// # Errors
    /// They cannot be had.
    pub async fn rows(&self) -> Result<u64, Apart> {
        let mut progress = self.progress.subscribe();
        let known = progress.wait_for(|progress| progress.rows.is_some() || progress.end.is_some()).await;
        let known = *known.map_err(|_| Apart)?;
        known.rows.filter(|_| known.end != Some(false)).ok_or(Apart)
    }

    /// The frame with this index; none behind the last.
    ///
    /// # Errors
    /// It cannot be had.
    pub async fn frame(&self, index: usize) -> Result<Option<Utf8Bytes>, Apart> {
        let mut progress = self.progress.subscribe();
        let known = progress.wait_for(|progress| progress.frames > index || progress.end.is_some()).await;
        let known = *known.map_err(|_| Apart)?;
        if index < known.frames {
            return Ok(locked(&self.frames).get(index).map(|(frame, _)| frame.clone()));
        }
        if known.end == Some(true) { Ok(None) } else { Err(Apart) }
    }
}
