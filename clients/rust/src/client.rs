//! The client.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use millstream_client_core::status::{State, Status};
use millstream_client_core::trigger;
use millstream_client_store::{
    self as store, Edit, FailedWrite, Imported, Outcome, QueueEntry, Saved, Store, StoreError, Written,
};
use millstream_schemas::Schema;
use serde::de::DeserializeOwned;
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tracing::Instrument;
use uuid::Uuid;

use crate::builder::{Builder, Traceparent};
use crate::bus::{Control, Done, Job, Notice, Reply, WriterCommand};
use crate::error::chain;
use crate::table::Table;
use crate::token::Tokens;
use crate::watch::{Readers, Watch, typed};
use crate::{Error, IntoParams, Result, Rows};

/// A local store that is kept in sync with Postgres. Cheap to clone; the last clone's end stops the workers.
#[derive(Clone)]
pub struct Client {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub writer: mpsc::Sender<WriterCommand>,
    pub readers: Arc<Readers>,
    pub notices: broadcast::Sender<Notice>,
    pub status: watch::Sender<Status>,
    /// Its end tells the workers that the client is gone.
    pub control: watch::Sender<Control>,
    pub tokens: Arc<Tokens>,
    pub traceparent: Option<Traceparent>,
    pub tasks: Mutex<Vec<JoinHandle<()>>>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.readers.close();
    }
}

impl Client {
    /// Begins to open the store at `path`, a file that is created if need be. Beside it lie SQLite's own files and `<path>-lock`.
    pub fn builder(path: impl Into<PathBuf>) -> Builder {
        Builder::new(path.into())
    }

    /// Waits until the tables exist and hold the rows of a first snapshot; at once if they ever did.
    pub async fn ready(&self) -> Result<()> {
        let mut status = self.status();
        let ended = |status: &Status| matches!(status.state, State::Closed | State::Damaged);
        let ready = |status: &Status| (status.has_synced && status.schema.is_some()) || ended(status);
        status.wait_for(ready).await.map_err(|_| Error::Closed)?;
        // The writer says why.
        if ended(&status.borrow()) { self.schema().await.and(Err(Error::Closed)) } else { Ok(()) }
    }

    /// Executes one statement in a transaction of its own. Returns once the rows and their queue entry are durable; the
    /// value is the number of rows changed.
    pub async fn execute(&self, sql: &str, params: impl IntoParams) -> Result<Write<usize>> {
        let sql = sql.to_owned();
        let params = params.into_params();
        self.tx(move |tx| tx.execute(&sql, params)).await
    }

    /// Runs a transaction on the writer's thread: all its rows and queue entries, or, if the closure gives an error, none.
    pub async fn tx<T, F>(&self, work: F) -> Result<Write<T>>
    where
        T: Send + 'static,
        F: FnOnce(&mut Tx<'_, '_>) -> Result<T> + Send + 'static,
    {
        let span = tracing::info_span!("millstream.write", change.tx = tracing::field::Empty);
        let traceparent = self.inner.traceparent.as_ref().and_then(|get| span.in_scope(|| get()));
        let (reply, answer) = oneshot::channel();
        let job = move |store: &mut Store| {
            let written = store.write(traceparent.as_deref(), |tx| {
                // The writer serves others too: a panic of the app's ends this transaction only.
                catch_unwind(AssertUnwindSafe(|| work(&mut Tx { tx }))).unwrap_or(Err(Error::Panicked))
            });
            let damage = match &written {
                Err(Error::Store(error)) if error.is_damage() => Some(StoreError::Inconsistent(chain(error))),
                Err(Error::Store(error)) => error.lost(),
                _ if store.has_met_damage() => Some(StoreError::Inconsistent("a statement met damage".into())),
                _ => None,
            };
            let (result, recorded) = match written {
                Ok(Written { value, recorded }) => {
                    (Ok((value, recorded.as_ref().map(|recorded| recorded.tx))), recorded)
                }
                Err(error) => (Err(error), None),
            };
            let reply = Box::new(move |failed: Option<Error>| {
                // The app may have stopped waiting; its transaction stands all the same.
                let _ = reply.send(match failed {
                    None => result,
                    Some(Error::Store(error)) if error.lost().is_some() => Err(Error::Store(error)),
                    Some(error) => result.and(Err(error)),
                });
            });
            Done { recorded, damage, reply }
        };
        let recorded = span.clone();
        async {
            self.command(WriterCommand::Write(Job(Box::new(job)))).await?;
            let (value, tx) = answer.await.map_err(|_| Error::Closed)??;
            if let Some(tx) = tx {
                recorded.record("change.tx", tx);
            }
            Ok(Write { value, tx, writer: self.inner.writer.clone() })
        }
        .instrument(span)
        .await
    }

    /// Reads.
    pub async fn query(&self, sql: &str, params: impl IntoParams) -> Result<Rows> {
        self.inner.readers.query(sql.to_owned(), params.into_params()).await
    }

    /// Reads rows as values of a type; see [`Rows::deserialize`].
    pub async fn query_as<T: DeserializeOwned>(&self, sql: &str, params: impl IntoParams) -> Result<Vec<T>> {
        self.query(sql, params).await?.deserialize()
    }

    /// The query's rows: at once, and again whenever a table that it reads has changed, by whomever. Changes that come
    /// while the app is busy with earlier rows are taken together. Ends after an error, and with the client.
    pub fn watch(&self, sql: &str, params: impl IntoParams) -> Watch<Rows> {
        // Subscribed before the first query runs, so that no change falls between the two.
        let notices = self.inner.notices.subscribe();
        crate::watch::watch(Arc::clone(&self.inner.readers), notices, sql.to_owned(), params.into_params())
    }

    /// As [`Client::watch`], with rows as values of a type.
    pub fn watch_as<T: DeserializeOwned + 'static>(&self, sql: &str, params: impl IntoParams) -> Watch<Vec<T>> {
        typed(self.watch(sql, params))
    }

    /// The client's status, and its changes.
    pub fn status(&self) -> watch::Receiver<Status> {
        self.inner.status.subscribe()
    }

    /// The installation's id.
    pub fn client_id(&self) -> Uuid {
        self.inner.status.borrow().client_id
    }

    /// Waits until every transaction recorded so far is settled, applied or rejected. Those that wait for a retry, for a
    /// person, or behind one that does, are not waited for.
    pub async fn settled(&self, timeout: Duration) -> Result<()> {
        match tokio::time::timeout(timeout, self.ask(WriterCommand::AllSettled)).await {
            Err(_) => Err(Error::Timeout),
            Ok(result) => result,
        }
    }

    /// The transactions that the server rejected, oldest first: waiting for their next attempt, or for a person.
    pub async fn failed(&self) -> Result<Vec<FailedWrite>> {
        self.ask(WriterCommand::Failed).await
    }

    /// The newest entries of the queue, settled ones included, newest last.
    pub async fn queue(&self, limit: usize) -> Result<Vec<QueueEntry>> {
        self.ask(|reply| WriterCommand::Queue(limit, reply)).await
    }

    /// The entries of a transaction in the queue, in order; none once it is discarded or pruned.
    pub async fn queue_entries(&self, tx: u64) -> Result<Vec<QueueEntry>> {
        self.ask(|reply| WriterCommand::QueueEntries(tx, reply)).await
    }

    /// Submits a failed transaction again, with the same change ids, once nothing before it on its rows waits.
    pub async fn retry(&self, tx: u64) -> Result<Write<()>> {
        self.edit(tx, Vec::new()).await
    }

    /// Submits a failed transaction again, with other values.
    pub async fn edit(&self, tx: u64, edits: Vec<Edit>) -> Result<Write<()>> {
        self.ask(|reply| WriterCommand::Retry(tx, edits, reply)).await?;
        Ok(Write { value: (), tx: Some(tx), writer: self.inner.writer.clone() })
    }

    /// Forgets a failed transaction, or one that is held back behind it: its rows show the server's state.
    pub async fn discard(&self, tx: u64) -> Result<()> {
        self.ask(|reply| WriterCommand::Discard(tx, reply)).await
    }

    /// Records the unsent changes of a store that was damaged again, each transaction as a new one, in their order: those that
    /// [`Error::Store`] with [`StoreError::Damaged`](crate::StoreError::Damaged) says were saved. Best after [`Client::ready`], since
    /// a change is made to the row as it is here. Tells what became of each; what does not apply stays in the file, and what was
    /// recorded is not recorded again by another import.
    ///
    /// ```no_run
    /// # use millstream_client::{Builder, Client, Error, ImportOutcome, Result, Saved, StoreError};
    /// # fn settings() -> Builder { Client::builder("app.db").edge("ws://127.0.0.1:4800").token("…") }
    /// # async fn example() -> Result<Client> {
    /// let damage = match settings().open().await {
    ///     Err(Error::Store(StoreError::Damaged(damage))) => damage,
    ///     opened => return opened,
    /// };
    /// // The damaged files are put aside: this opens a fresh store.
    /// let client = settings().open().await?;
    /// client.ready().await?;
    /// if let Ok(aside) = &damage.aside
    ///     && let Some(saved) = &aside.saved
    /// {
    ///     for imported in client.import(Saved::read(saved)?).await? {
    ///         if let ImportOutcome::Kept { reason } = imported.outcome {
    ///             eprintln!("transaction {} is still in {}: {reason}", imported.tx, saved.display());
    ///         }
    ///     }
    /// }
    /// # Ok(client)
    /// # }
    /// ```
    pub async fn import(&self, saved: Saved) -> Result<Vec<Imported>> {
        self.ask(|reply| WriterCommand::Import(Box::new(saved), reply)).await
    }

    /// The failed transactions: at once, and again whenever they change.
    pub fn watch_failed(&self) -> Watch<Vec<FailedWrite>> {
        let (notices, client) = (self.inner.notices.subscribe(), self.clone());
        crate::watch::watch_table(notices, trigger::LOCAL_CHANGES, move || {
            let client = client.clone();
            async move { client.failed().await }
        })
    }

    /// Rows of a synced table as values of a type; see [`Table`].
    pub fn table<T>(&self, name: impl Into<String>) -> Table<T> {
        Table::new(self.clone(), name.into())
    }

    /// The installed schema; none before the first connection.
    pub async fn schema(&self) -> Result<Option<Schema>> {
        self.ask(WriterCommand::Schema).await
    }

    /// Goes offline, until [`Client::resume`]. Writes are recorded meanwhile. The status says when it is so: a write of the same
    /// moment may still be sent.
    pub fn pause(&self) {
        self.inner.control.send_modify(|control| control.paused = true);
    }

    /// Goes online again, and connects at once. Nothing happens unless the client is paused.
    pub fn resume(&self) {
        self.inner.control.send_if_modified(|control| {
            let paused = std::mem::take(&mut control.paused);
            // The pause may not have been noticed yet.
            control.kicks += u64::from(paused);
            paused
        });
    }

    /// Connects now, without waiting for the back-off: when the system says that the network is back, say. Nothing happens while
    /// the client is connected, or paused.
    pub fn connect_now(&self) {
        self.inner.control.send_modify(|control| control.kicks += 1);
    }

    /// The session token from now on: for the next connection, which is made at once if the client waits for one. A session under
    /// way goes on.
    ///
    /// ```no_run
    /// # use millstream_client::{Client, Result, State};
    /// # async fn log_in() -> String { String::new() }
    /// # async fn example(client: Client) -> Result<()> {
    /// let mut status = client.status();
    /// while status.wait_for(|status| status.state == State::NeedsAuth).await.is_ok() {
    ///     client.set_token(log_in().await);
    ///     status.wait_for(|status| status.state != State::NeedsAuth).await.ok();
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn set_token(&self, token: impl Into<String>) {
        self.inner.tokens.set(token.into());
        self.inner.control.send_modify(|control| control.tokens += 1);
    }

    /// Cuts the connection, as a bad network would; the client connects again by itself.
    pub fn drop_connection(&self) {
        self.inner.control.send_modify(|control| control.cuts += 1);
    }

    /// Starts a worker anew, as after a crash of it. What it did not finish is done again.
    pub fn restart(&self, worker: Worker) {
        self.inner.control.send_modify(|control| match worker {
            Worker::Changes => control.changes_restarts += 1,
            Worker::Sync => control.sync_restarts += 1,
        });
    }

    /// Stops the workers and closes the store. What is in the queue is sent when the store is opened again.
    pub async fn close(self) -> Result<()> {
        self.inner.control.send_modify(|control| control.closed = true);
        let tasks = std::mem::take(&mut *self.inner.tasks.lock().unwrap_or_else(PoisonError::into_inner));
        for task in tasks {
            // A task that panicked has ended too.
            let _ = task.await;
        }
        self.inner.readers.close();
        let (reply, answer) = oneshot::channel();
        if self.inner.writer.send(WriterCommand::Close(reply)).await.is_ok() {
            let _ = answer.await;
        }
        self.inner.status.send_modify(|status| {
            status.state = State::Closed;
            status.retry_at = None;
        });
        Ok(())
    }

    async fn command(&self, command: WriterCommand) -> Result<()> {
        self.inner.writer.send(command).await.map_err(|_| Error::Closed)
    }

    async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> WriterCommand) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        self.command(command(reply)).await?;
        answer.await.map_err(|_| Error::Closed)?
    }
}

/// A part of the client that runs on its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Worker {
    /// Decides what is sent when.
    Changes,
    /// Keeps the one socket.
    Sync,
}

/// A transaction that is durable in the store.
#[derive(Clone)]
pub struct Write<T> {
    value: T,
    tx: Option<u64>,
    writer: mpsc::Sender<WriterCommand>,
}

impl<T> Write<T> {
    /// What the transaction gave.
    pub fn value(&self) -> &T {
        &self.value
    }

    /// What the transaction gave.
    pub fn into_value(self) -> T {
        self.value
    }

    /// The local transaction, as the queue names it; none if it changed no synced row.
    pub fn tx(&self) -> Option<u64> {
        self.tx
    }

    /// Waits until it is settled: confirmed by the server's outbound stream, or rejected ([`Error::Rejected`]). Losing to
    /// newer changes of others is success; the outcome tells.
    pub async fn confirmed(&self) -> Result<Outcome> {
        let Some(tx) = self.tx else { return Ok(Outcome::Applied) };
        let (reply, answer) = oneshot::channel();
        self.writer.send(WriterCommand::Settled(tx, reply)).await.map_err(|_| Error::Closed)?;
        answer.await.map_err(|_| Error::Closed)?
    }
}

/// The app's transaction under way.
pub struct Tx<'a, 'b> {
    tx: &'a mut store::Tx<'b>,
}

impl Tx<'_, '_> {
    /// Executes one statement; gives the number of rows it changed.
    pub fn execute(&mut self, sql: &str, params: impl IntoParams) -> Result<usize> {
        Ok(self.tx.execute(sql, &params.into_params())?)
    }

    /// Reads, seeing the transaction's own writes.
    pub fn query(&mut self, sql: &str, params: impl IntoParams) -> Result<Rows> {
        Ok(self.tx.query(sql, &params.into_params())?.into())
    }

    /// Reads rows as values of a type; see [`Rows::deserialize`].
    pub fn query_as<T: DeserializeOwned>(&mut self, sql: &str, params: impl IntoParams) -> Result<Vec<T>> {
        self.query(sql, params)?.deserialize()
    }

    /// Runs a part that can fail on its own: its writes and queue entries go when it does.
    pub fn savepoint<T>(&mut self, part: impl FnOnce(&mut Tx<'_, '_>) -> Result<T>) -> Result<T> {
        self.tx.savepoint(|tx| part(&mut Tx { tx }))
    }

    /// A new UUIDv7.
    pub fn uuid(&self) -> Uuid {
        self.tx.uuid()
    }
}
