//! The client.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};

use millstream_client_core::status::{State, Status};
use millstream_client_store::{Store, StoreError, Written};
use millstream_schemas::Schema;
use serde::de::DeserializeOwned;
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tracing::Instrument;
use uuid::Uuid;

use crate::bus::{Control, Done, Job, Notice, Reply, WriterCommand};
use crate::error::chain;
use crate::spans::Traceparent;
use crate::token::Tokens;
use crate::watch::{Readers, Watch, typed};
use crate::write::{Tx, Write};
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
    /// Waits until the tables exist and hold the rows of a first snapshot; at once if they ever did. Waits on while the client is
    /// offline. Queries before that see the rows that have come by then.
    ///
    /// ```no_run
    /// # use millstream_client::{Client, Result};
    /// # use std::time::Duration;
    /// # async fn example(client: Client) -> Result<()> {
    /// if tokio::time::timeout(Duration::from_secs(10), client.ready()).await.is_err() {
    ///     println!("the first start needs a network: {:?}", client.status().borrow().last_error);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Closed`]: the client was closed. [`Error::Store`]: the store is damaged.
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
    ///
    /// ```
    /// # mod local { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/local/mod.rs")); }
    /// # local::run(async |client| {
    /// let write = client.execute("INSERT INTO tasks (id, title) VALUES (millstream_uuid(), ?)", ["Buy milk"]).await?;
    /// assert_eq!(*write.value(), 1);
    /// # Ok(())
    /// # })
    /// ```
    ///
    /// # Errors
    /// - [`Error::Store`]: SQLite or the store's rules refuse the statement, or its changes are too large for a transaction. Nothing of
    ///   it was written.
    /// - [`Error::Commit`]: the disk refused the commit that it shared with others.
    /// - [`Error::Closed`]: the client was closed.
    pub async fn execute(&self, sql: &str, params: impl IntoParams) -> Result<Write<usize>> {
        let sql = sql.to_owned();
        let params = params.into_params();
        self.tx(move |tx| tx.execute(&sql, params)).await
    }

    /// Runs a transaction on the writer's thread: all its rows and queue entries, or, if the closure gives an error, none. The
    /// server applies it whole or not at all.
    ///
    /// ```
    /// # mod local { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/local/mod.rs")); }
    /// # local::run(async |client| {
    /// # use millstream_client::Error;
    /// let moved = client
    ///     .tx(|tx| {
    ///         tx.execute("UPDATE tasks SET done = 1 WHERE title = ?", ["Buy milk"])?;
    ///         let open = tx.query_as::<i64>("SELECT count(*) FROM tasks WHERE NOT done", ())?[0];
    ///         if open > 100 { Err(Error::app("too many open tasks")) } else { Ok(open) }
    ///     })
    ///     .await?;
    /// assert_eq!(*moved.value(), 0);
    /// # Ok(())
    /// # })
    /// ```
    ///
    /// # Errors
    /// - The error that the closure gives; [`Error::app`] makes one of the app's own.
    /// - [`Error::Panicked`]: the closure panicked.
    /// - Those of [`Client::execute`].
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
                catch_unwind(AssertUnwindSafe(|| work(&mut Tx::new(tx)))).unwrap_or(Err(Error::Panicked))
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
            Ok(Write::new(value, tx, self.inner.writer.clone()))
        }
        .instrument(span)
        .await
    }

    /// Reads with one SQL query. Up to four queries run at the same time, beside writes.
    ///
    /// ```
    /// # mod local { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/local/mod.rs")); }
    /// # local::run(async |client| {
    /// let rows = client.query("SELECT title FROM tasks WHERE done = ?", [true]).await?;
    /// assert_eq!((rows.columns.len(), rows.len()), (1, 0));
    /// # Ok(())
    /// # })
    /// ```
    ///
    /// # Errors
    /// [`Error::Store`]: SQLite refuses the query; [`Error::is_write`] tells a statement that writes. [`Error::Closed`]: the client
    /// was closed.
    pub async fn query(&self, sql: &str, params: impl IntoParams) -> Result<Rows> {
        self.inner.readers.query(sql.to_owned(), params.into_params()).await
    }

    /// Reads rows as values of a type; see [`Rows::deserialize`].
    ///
    /// ```
    /// # mod local { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/local/mod.rs")); }
    /// # local::run(async |client| {
    /// client.execute("INSERT INTO tasks (id, title) VALUES (millstream_uuid(), 'Buy milk')", ()).await?;
    /// let tasks: Vec<(String, bool)> = client.query_as("SELECT title, done FROM tasks", ()).await?;
    /// assert_eq!(tasks, [("Buy milk".to_owned(), false)]);
    /// # Ok(())
    /// # })
    /// ```
    ///
    /// # Errors
    /// Those of [`Client::query`], and [`Error::Decode`]: a row does not fit the type.
    pub async fn query_as<T: DeserializeOwned>(&self, sql: &str, params: impl IntoParams) -> Result<Vec<T>> {
        self.query(sql, params).await?.deserialize()
    }

    /// The query's rows: at once, and again whenever a table that it reads has changed, by the app, the server or another process.
    /// Changes that come while the app is busy with earlier rows are taken together. The errors are those of [`Client::query`]. Ends
    /// after an error, and with the client.
    ///
    /// ```
    /// # mod local { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/local/mod.rs")); }
    /// # local::run(async |client| {
    /// # use futures_util::StreamExt;
    /// let mut open = client.watch("SELECT title FROM tasks WHERE NOT done", ());
    /// assert_eq!(open.next().await.expect("the client is open")?.len(), 0);
    /// client.execute("INSERT INTO tasks (id, title) VALUES (millstream_uuid(), 'Buy milk')", ()).await?;
    /// assert_eq!(open.next().await.expect("the client is open")?.len(), 1);
    /// # Ok(())
    /// # })
    /// ```
    pub fn watch(&self, sql: &str, params: impl IntoParams) -> Watch<Rows> {
        // Subscribed before the first query runs, so that no change falls between the two.
        let notices = self.inner.notices.subscribe();
        crate::watch::watch(Arc::clone(&self.inner.readers), notices, sql.to_owned(), params.into_params())
    }

    /// As [`Client::watch`], with rows as values of a type.
    ///
    /// ```no_run
    /// # use futures_util::StreamExt;
    /// # use millstream_client::{Client, Result};
    /// # async fn example(client: Client) -> Result<()> {
    /// let mut counts = client.watch_as::<u64>("SELECT count(*) FROM tasks WHERE NOT done", ());
    /// while let Some(count) = counts.next().await {
    ///     println!("{} open", count?[0]);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn watch_as<T: DeserializeOwned + 'static>(&self, sql: &str, params: impl IntoParams) -> Watch<Vec<T>> {
        typed(self.watch(sql, params))
    }

    /// The client's status, and its changes.
    ///
    /// ```no_run
    /// # use millstream_client::{Client, Result};
    /// # async fn example(client: Client) -> Result<()> {
    /// let mut status = client.status();
    /// while status.changed().await.is_ok() {
    ///     let status = status.borrow_and_update();
    ///     println!("{:?}, {} pending, {} failed", status.state, status.pending.count, status.failed);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn status(&self) -> watch::Receiver<Status> {
        self.inner.status.subscribe()
    }

    /// The installation's id: random, kept in the store. The server tells clients apart by it.
    ///
    /// ```
    /// # mod local { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/local/mod.rs")); }
    /// # local::run(async |client| {
    /// println!("support id: {}", client.client_id());
    /// # Ok(())
    /// # })
    /// ```
    pub fn client_id(&self) -> Uuid {
        self.inner.status.borrow().client_id
    }

    /// The installed schema; `None` before the first connection.
    ///
    /// ```
    /// # mod local { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/local/mod.rs")); }
    /// # local::run(async |client| {
    /// if let Some(schema) = client.schema().await? {
    ///     println!("{}", serde_json::to_string_pretty(&schema)?);
    /// }
    /// # Ok(())
    /// # })
    /// ```
    ///
    /// # Errors
    /// [`Error::Closed`]: the client was closed. [`Error::Store`]: the store is damaged.
    pub async fn schema(&self) -> Result<Option<Schema>> {
        self.ask(WriterCommand::Schema).await
    }

    /// Goes offline, until [`Client::resume`]. Writes are recorded meanwhile. The status says when it is so: a write of the same
    /// moment may still be sent.
    ///
    /// ```no_run
    /// # use millstream_client::{Client, State};
    /// # async fn example(client: Client) {
    /// client.pause();
    /// client.status().wait_for(|status| status.state == State::Offline).await.ok();
    /// # }
    /// ```
    pub fn pause(&self) {
        self.inner.control.send_modify(|control| control.paused = true);
    }

    /// Goes online again, and connects at once. Nothing happens unless the client is paused.
    ///
    /// ```no_run
    /// # use millstream_client::{Client, Result};
    /// # use std::time::Duration;
    /// # async fn example(client: Client) -> Result<()> {
    /// client.pause();
    /// client.execute("UPDATE tasks SET done = 1", ()).await?;
    /// client.resume();
    /// client.settled(Duration::from_secs(10)).await?;
    /// # Ok(())
    /// # }
    /// ```
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
    ///
    /// ```no_run
    /// # async fn network_is_up() {}
    /// # async fn example(client: millstream_client::Client) {
    /// loop {
    ///     network_is_up().await;
    ///     client.connect_now();
    /// }
    /// # }
    /// ```
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

    /// Stops the workers and closes the store, for all clones. The queue is sent when the store is opened again.
    ///
    /// ```
    /// # mod local { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/local/mod.rs")); }
    /// # local::run(async |client| {
    /// # use millstream_client::Error;
    /// let clone = client.clone();
    /// client.close().await?;
    /// assert!(matches!(clone.query("SELECT 1", ()).await, Err(Error::Closed)));
    /// # Ok(())
    /// # })
    /// ```
    ///
    /// # Errors
    /// There are none today.
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

    pub(crate) async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> WriterCommand) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        self.command(command(reply)).await?;
        answer.await.map_err(|_| Error::Closed)?
    }
}
