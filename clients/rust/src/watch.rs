//! Reading: a few read-only connections, and queries that run again when their tables change.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use futures_util::stream::{BoxStream, StreamExt, unfold};
use millstream_client_store::{Reader, Reads, StoreError};
use tokio::sync::{Semaphore, broadcast, mpsc, oneshot};

use crate::bus::{Notice, WriterCommand};
use crate::error::chain;
use crate::host::SystemHost;
use crate::{Error, Result, Rows, SqlValue};

/// Most queries that run at the same time.
const READERS: usize = 4;

/// A watched query: a stream of its results. Drop it to stop.
pub type Watch<T> = BoxStream<'static, Result<T>>;

/// The reading connections.
pub(crate) struct Readers {
    path: PathBuf,
    idle: Mutex<Vec<Reader>>,
    permits: Semaphore,
    /// Whom to tell of damage.
    writer: mpsc::WeakSender<WriterCommand>,
    /// Why the store is of no use any more.
    lost: OnceLock<StoreError>,
}

impl Readers {
    pub fn new(path: PathBuf, writer: mpsc::WeakSender<WriterCommand>) -> Self {
        let (idle, permits) = (Mutex::new(Vec::new()), Semaphore::new(READERS));
        Readers { path, idle, permits, writer, lost: OnceLock::new() }
    }

    /// The store is of no use any more: all queries from now on give this error.
    pub fn lose(&self, error: StoreError) {
        let _ = self.lost.set(error);
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    fn require(&self) -> Result<()> {
        match self.lost.get().and_then(StoreError::lost) {
            Some(error) => Err(error.into()),
            None => Ok(()),
        }
    }

    /// Looks through the whole store, unless the client is closed meanwhile.
    pub async fn check(self: Arc<Self>) {
        let readers = Arc::clone(&self);
        let checked = self.with(move |reader| Ok(reader.check(move || readers.permits.is_closed())?)).await;
        match checked {
            Ok(true) => self.tell(WriterCommand::Checked).await,
            Ok(false) => {}
            Err(error) => tracing::debug!(error.message = %chain(&error), "the store was not checked"),
        }
    }

    async fn tell(&self, command: WriterCommand) {
        if let Some(writer) = self.writer.upgrade() {
            // It may have been closed.
            let _ = writer.send(command).await;
        }
    }

    /// No more queries.
    pub fn close(&self) {
        self.permits.close();
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Runs `work` with a connection, on a thread for blocking work.
    pub async fn with<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Reader) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let _permit = self.permits.acquire().await.map_err(|_| Error::Closed)?;
        self.require()?;
        let readers = Arc::clone(self);
        let run = move || {
            let idle = readers.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let reader = match idle {
                Some(reader) => reader,
                None => Reader::open(&readers.path.to_string_lossy(), Arc::new(SystemHost))?,
            };
            let result = work(&reader);
            if !readers.permits.is_closed() && readers.lost.get().is_none() {
                readers.idle.lock().unwrap_or_else(PoisonError::into_inner).push(reader);
            }
            result
        };
        // It can only be cancelled by a runtime that is shutting down.
        let result = tokio::task::spawn_blocking(run).await.map_err(|_| Error::Closed)?;
        match result {
            Err(Error::Store(error)) if error.is_damage() => {
                // The writer puts the store aside, and says what there is to tell.
                let (reply, answer) = oneshot::channel();
                self.tell(WriterCommand::Damaged(error, reply)).await;
                answer.await.map_err(|_| Error::Closed)?.map(|never| match never {})
            }
            result => result,
        }
    }

    pub async fn query(self: &Arc<Self>, sql: String, params: Vec<SqlValue>) -> Result<Rows> {
        self.with(move |reader| Ok(Rows::from(reader.query(&sql, &params)?))).await
    }
}

/// Rows of a watched query, again and again.
pub(crate) fn watch(
    readers: Arc<Readers>,
    notices: broadcast::Receiver<Notice>,
    sql: String,
    params: Vec<SqlValue>,
) -> Watch<Rows> {
    struct Watching {
        readers: Arc<Readers>,
        notices: broadcast::Receiver<Notice>,
        sql: String,
        params: Vec<SqlValue>,
        reads: Option<Reads>,
        /// The last rows of a query that may read anything: most changes are none of its rows.
        last: Option<Rows>,
        ended: bool,
    }

    let state = Watching { readers, notices, sql, params, reads: None, last: None, ended: false };
    unfold(state, |mut watch| async move {
        if watch.ended {
            return None;
        }
        loop {
            if let Some(reads) = &watch.reads
                && !changed(&mut watch.notices, reads).await
            {
                return None;
            }
            let (sql, params) = (watch.sql.clone(), watch.params.clone());
            let result = watch
                .readers
                .with(move |reader| {
                    // Asked for again each time: a view or the schema may have changed.
                    Ok((reader.reads(&sql)?, Rows::from(reader.query(&sql, &params)?)))
                })
                .await;
            match result {
                Ok((reads, rows)) => {
                    let is_same = reads.any && watch.last.as_ref() == Some(&rows);
                    watch.last = reads.any.then(|| rows.clone());
                    watch.reads = Some(reads);
                    if !is_same {
                        return Some((Ok(rows), watch));
                    }
                }
                Err(Error::Closed) => return None,
                Err(error) => {
                    watch.ended = true;
                    return Some((Err(error), watch));
                }
            }
        }
    })
    .boxed()
}

/// What `read` gives: at once, and again whenever the table has changed and it gives something else.
pub(crate) fn watch_table<T, F, Fut>(notices: broadcast::Receiver<Notice>, table: &str, read: F) -> Watch<T>
where
    T: Clone + PartialEq + Send + 'static,
    F: Fn() -> Fut + Send + 'static,
    Fut: Future<Output = Result<T>> + Send + 'static,
{
    let reads = Reads { tables: BTreeSet::from([table.to_owned()]), any: false };
    unfold((notices, reads, read, None::<T>, false), |(mut notices, reads, read, mut last, ended)| async move {
        if ended {
            return None;
        }
        loop {
            if last.is_some() && !changed(&mut notices, &reads).await {
                return None;
            }
            match read().await {
                Ok(value) if last.as_ref() == Some(&value) => {}
                Ok(value) => {
                    last = Some(value.clone());
                    return Some((Ok(value), (notices, reads, read, last, false)));
                }
                Err(Error::Closed) => return None,
                Err(error) => return Some((Err(error), (notices, reads, read, last, true))),
            }
        }
    })
    .boxed()
}

/// Waits until something changed of what is read; takes all notices that are there. False: the client is gone.
async fn changed(notices: &mut broadcast::Receiver<Notice>, reads: &Reads) -> bool {
    use tokio::sync::broadcast::error::{RecvError, TryRecvError};
    let concerns = |notice: &Notice| match notice {
        Notice::Any => true,
        Notice::Tables(written) => reads.any || written.iter().any(|table| reads.tables.contains(table)),
    };
    loop {
        match notices.recv().await {
            Ok(notice) if concerns(&notice) => break,
            Ok(_) => {}
            Err(RecvError::Lagged(_)) => break,
            Err(RecvError::Closed) => return false,
        }
    }
    // What is queued is covered by the query that follows.
    loop {
        match notices.try_recv() {
            Ok(_) | Err(TryRecvError::Lagged(_)) => {}
            Err(TryRecvError::Empty | TryRecvError::Closed) => return true,
        }
    }
}

/// The rows of a watch as values of a type.
pub(crate) fn typed<T: serde::de::DeserializeOwned + 'static>(rows: Watch<Rows>) -> Watch<Vec<T>> {
    rows.map(|rows| rows.and_then(|rows| rows.deserialize())).boxed()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn notices_are_coalesced_and_filtered() {
        let (sender, mut receiver) = broadcast::channel(8);
        let notice = |table: &str| Notice::Tables(Arc::new(BTreeSet::from([table.to_owned()])));
        let tables = Reads { tables: BTreeSet::from(["tasks".to_owned()]), any: false };
        for table in ["other", "tasks", "tasks", "other"] {
            sender.send(notice(table)).unwrap();
        }
        assert!(changed(&mut receiver, &tables).await);
        assert!(receiver.is_empty());
        drop(sender);
        assert!(!changed(&mut receiver, &tables).await);
    }
}
