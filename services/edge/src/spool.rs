//! The rows of a snapshot between Postgres and a client: read at Postgres' pace and sent at the client's. A few frames wait in
//! memory, the others in a file without a name, so that a slow client holds neither a transaction nor a turn nor memory.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use crate::snapshot::Frames;

/// Most that all files of an edge hold together, in KiB.
const MAX_KIB: usize = 4 << 20;

/// What waits in memory for one client, in bytes; a longer frame waits alone.
const MEMORY_BYTES: usize = 512 << 10;
/// How long a snapshot is read on for a client that takes nothing while there is no room.
const PATIENCE: Duration = Duration::from_secs(30);

/// Where files are made.
pub struct Spool {
    folder: PathBuf,
    room: Arc<Semaphore>,
}

enum Piece {
    Memory(String),
    File { at: u64, length: usize },
}

/// What comes next for the reader.
enum Taken {
    Memory(String),
    File(Arc<File>, u64, usize),
    End,
    Nothing,
}

#[derive(Default)]
struct State {
    pieces: VecDeque<Piece>,
    /// Bytes and pieces in memory.
    memory: usize,
    in_memory: usize,
    file: Option<Arc<File>>,
    written: u64,
    /// Its share of the room: the edge's, and the user's.
    room: Option<[OwnedSemaphorePermit; 2]>,
    /// There will be no more; or nobody takes them.
    is_closed: bool,
}

#[derive(Default)]
struct Inner {
    state: Mutex<State>,
    /// For the reader; each end has a call of its own, so that neither takes the other's.
    written: Notify,
    /// For the writer.
    taken: Notify,
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self) -> Taken {
        let mut state = self.state();
        match state.pieces.pop_front() {
            Some(Piece::Memory(frame)) => {
                state.in_memory -= 1;
                state.memory -= frame.len();
                Taken::Memory(frame)
            }
            Some(Piece::File { at, length }) => match state.file.clone() {
                Some(file) => Taken::File(file, at, length),
                None => Taken::End,
            },
            None if state.is_closed => Taken::End,
            None => Taken::Nothing,
        }
    }

    fn close(&self) {
        self.state().is_closed = true;
        self.written.notify_one();
        self.taken.notify_one();
    }
}

/// The end that is written.
pub struct Writer {
    shared: Arc<Inner>,
    spool: Arc<Spool>,
    user: Arc<Semaphore>,
}

/// The end that is read.
pub struct Reader(Arc<Inner>);

impl Drop for Writer {
    fn drop(&mut self) {
        self.shared.close();
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.0.close();
    }
}

impl Spool {
    /// Files are made in this folder, and are gone with the process.
    pub fn new(folder: PathBuf) -> Arc<Spool> {
        Arc::new(Spool { folder, room: Arc::new(Semaphore::new(MAX_KIB)) })
    }

    /// Both ends for one snapshot; `user` is the room that its user has, in KiB. What is beyond waits for the client.
    pub fn open(self: &Arc<Self>, user: Arc<Semaphore>) -> (Writer, Reader) {
        let shared = Arc::new(Inner::default());
        (Writer { shared: shared.clone(), spool: self.clone(), user }, Reader(shared))
    }

    fn file(&self) -> io::Result<Arc<File>> {
        tempfile::tempfile_in(&self.folder).map(Arc::new)
    }
}

impl Writer {
    /// Where the frame goes in the file, if there is room for it; without a file that can be written there is none.
    fn place(&self, state: &mut State, length: usize) -> Option<(Arc<File>, u64)> {
        let kib = u32::try_from(length.div_ceil(1024)).ok()?;
        let take = |room: &Arc<Semaphore>| room.clone().try_acquire_many_owned(kib).ok();
        let [edge, user] = [take(&self.spool.room)?, take(&self.user)?];
        let file = match &state.file {
            Some(file) => file.clone(),
            None => {
                let made = self.spool.file();
                let made = made.inspect_err(|error| {
                    tracing::warn!(%error, folder = %self.spool.folder.display(), "no room for the rows of slow clients; set MILLSTREAM_SPOOL_DIR");
                });
                state.file.insert(made.ok()?).clone()
            }
        };
        match &mut state.room {
            Some([all, own]) => {
                all.merge(edge);
                own.merge(user);
            }
            room => *room = Some([edge, user]),
        }
        Some((file, state.written))
    }
}

impl Frames for Writer {
    async fn put(&mut self, frame: String) -> bool {
        loop {
            let taken = self.shared.taken.notified();
            let place = {
                let mut state = self.shared.state();
                if state.is_closed {
                    return false;
                }
                let fits = state.pieces.is_empty() || state.memory + frame.len() <= MEMORY_BYTES;
                if fits && state.in_memory == state.pieces.len() {
                    state.in_memory += 1;
                    state.memory += frame.len();
                    state.pieces.push_back(Piece::Memory(frame));
                    self.shared.written.notify_one();
                    return true;
                }
                self.place(&mut state, frame.len())
            };
            let Some((file, at)) = place else {
                // What reads has a turn and a transaction, which others wait for.
                if tokio::time::timeout(PATIENCE, taken).await.is_err() {
                    return false;
                }
                continue;
            };
            let length = frame.len();
            let written = tokio::task::spawn_blocking(move || file.write_all_at(frame.as_bytes(), at)).await;
            if let Err(error) = written.map_err(io::Error::other).and_then(|written| written) {
                tracing::warn!(%error, "the rows of a slow client cannot be kept; it is cut");
                return false;
            }
            let mut state = self.shared.state();
            state.written = at + length as u64;
            state.pieces.push_back(Piece::File { at, length });
            self.shared.written.notify_one();
            return true;
        }
    }
}

impl Reader {
    /// The next frame; none at the end.
    ///
    /// # Errors
    /// The file cannot be read.
    pub async fn next(&mut self) -> io::Result<Option<String>> {
        loop {
            let written = self.0.written.notified();
            let (file, at, length) = match self.0.take() {
                Taken::Memory(frame) => {
                    self.0.taken.notify_one();
                    return Ok(Some(frame));
                }
                Taken::File(file, at, length) => (file, at, length),
                Taken::End => return Ok(None),
                Taken::Nothing => {
                    written.await;
                    continue;
                }
            };
            let read = tokio::task::spawn_blocking(move || {
                let mut bytes = vec![0; length];
                file.read_exact_at(&mut bytes, at).map(|()| bytes)
            });
            let bytes = read.await.map_err(io::Error::other)??;
            self.0.taken.notify_one();
            return String::from_utf8(bytes).map(Some).map_err(|_| io::ErrorKind::InvalidData.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(number: usize) -> String {
        format!("{number} {}", "é".repeat(number % 7 * 7_000))
    }

    #[tokio::test]
    async fn a_slow_reader_delays_no_writer_and_gets_everything_in_order() {
        let spool = Spool::new(std::env::temp_dir());
        let user = Arc::new(Semaphore::new(60_000));
        let (mut writer, mut reader) = spool.open(user.clone());
        for number in 0..500 {
            assert!(writer.put(frame(number)).await);
        }
        assert!(writer.shared.state().memory <= MEMORY_BYTES && writer.shared.state().written > 0);
        for number in 0..500 {
            assert_eq!(reader.next().await.unwrap(), Some(frame(number)));
        }
        // Back to memory, once the file is read.
        assert!(writer.put(frame(7)).await);
        assert_eq!(writer.shared.state().in_memory, 1);
        drop(writer);
        assert_eq!(reader.next().await.unwrap(), Some(frame(7)));
        assert_eq!(reader.next().await.unwrap(), None);
        drop(reader);
        assert_eq!(spool.room.available_permits(), MAX_KIB, "room is given back");
        assert_eq!(user.available_permits(), 60_000);
    }

    #[tokio::test]
    async fn without_room_a_writer_waits_and_without_a_reader_it_ends() {
        let spool = Spool::new("/proc/none".into());
        let (mut writer, mut reader) = spool.open(Arc::new(Semaphore::new(600)));
        for number in 0..4 {
            assert!(writer.put(big(number)).await);
        }
        let put = tokio::spawn(async move {
            assert!(writer.put(big(4)).await);
            writer
        });
        tokio::task::yield_now().await;
        assert!(!put.is_finished());
        assert_eq!(reader.next().await.unwrap(), Some(big(0)));
        let mut writer = put.await.unwrap();
        drop(reader);
        assert!(!writer.put(big(5)).await);
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_reads_on_for_ever_for_a_client_that_takes_nothing() {
        let (mut writer, _reader) = Spool::new("/proc/none".into()).open(Arc::new(Semaphore::new(600)));
        while writer.shared.state().in_memory < 4 {
            assert!(writer.put(big(1)).await);
        }
        assert!(!writer.put(big(2)).await);
    }

    fn big(number: usize) -> String {
        number.to_string().repeat(MEMORY_BYTES / 4)
    }
}
