//! The queue, as the app sees it: waiting for all of it, and the writes that the server rejected.

use std::time::Duration;

use millstream_client_core::format::LOCAL_CHANGES;
use millstream_client_store::{Edit, FailedWrite, Imported, QueueEntry, Saved};

use crate::bus::WriterCommand;
use crate::watch::Watch;
use crate::write::Write;
use crate::{Client, Error, Result};

impl Client {
    /// Waits until every transaction recorded so far is settled, applied or rejected. Those that wait for a retry, for a
    /// person, or behind one that does, are not waited for.
    ///
    /// ```no_run
    /// # use millstream_client::{Client, Error, Result};
    /// # use std::time::Duration;
    /// # async fn example(client: Client) -> Result<()> {
    /// match client.settled(Duration::from_secs(5)).await {
    ///     Err(Error::Timeout) => println!("{} still pending", client.status().borrow().pending.count),
    ///     settled => settled?,
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// - [`Error::Timeout`]: it takes longer. Nothing is lost.
    /// - [`Error::Closed`]: the client was closed.
    /// - [`Error::Store`]: the store is damaged.
    pub async fn settled(&self, timeout: Duration) -> Result<()> {
        match tokio::time::timeout(timeout, self.ask(WriterCommand::AllSettled)).await {
            Err(_) => Err(Error::Timeout),
            Ok(result) => result,
        }
    }

    /// The transactions that the server rejected, oldest first: waiting for their next attempt, or for a person.
    ///
    /// ```no_run
    /// # use millstream_client::{Client, EntryState, Result};
    /// # async fn example(client: Client) -> Result<()> {
    /// for write in client.failed().await? {
    ///     // The others are tried again by themselves.
    ///     if write.state == EntryState::Error {
    ///         println!("{}: {}", write.tx, write.message);
    ///     }
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Closed`]: the client was closed. [`Error::Store`]: the store failed.
    pub async fn failed(&self) -> Result<Vec<FailedWrite>> {
        self.ask(WriterCommand::Failed).await
    }

    /// The failed transactions: at once, and again whenever they change. Ends after an error, and with the client.
    ///
    /// ```no_run
    /// # use futures_util::StreamExt;
    /// # use millstream_client::{Client, Code, Edit, EntryState, Result};
    /// # async fn example(client: Client) -> Result<()> {
    /// let mut failed = client.watch_failed();
    /// while let Some(writes) = failed.next().await {
    ///     for write in writes?.into_iter().filter(|write| write.state == EntryState::Error) {
    ///         match write.code {
    ///             Some(Code::PermissionDenied) => client.discard(write.tx).await?,
    ///             _ => println!("{} waits for you: {}", write.tx, write.message),
    ///         }
    ///     }
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn watch_failed(&self) -> Watch<Vec<FailedWrite>> {
        let (notices, client) = (self.inner.notices.subscribe(), self.clone());
        crate::watch::watch_table(notices, LOCAL_CHANGES, move || {
            let client = client.clone();
            async move { client.failed().await }
        })
    }

    /// The newest entries of the queue, settled ones included, newest last; at most `limit`. Each change is an entry.
    ///
    /// ```
    /// # mod local { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/local/mod.rs")); }
    /// # local::run(async |client| {
    /// # use millstream_client::EntryState;
    /// client.execute("INSERT INTO tasks (id, title) VALUES (millstream_uuid(), 'Buy milk')", ()).await?;
    /// let entries = client.queue(20).await?;
    /// assert_eq!((entries[0].tx, entries[0].state), (1, EntryState::Pending));
    /// assert_eq!(entries[0].change.table, "tasks");
    /// # Ok(())
    /// # })
    /// ```
    ///
    /// # Errors
    /// [`Error::Closed`]: the client was closed. [`Error::Store`]: the store failed.
    pub async fn queue(&self, limit: usize) -> Result<Vec<QueueEntry>> {
        self.ask(|reply| WriterCommand::Queue(limit, reply)).await
    }

    /// The entries of a transaction in the queue, in order; empty once it is discarded or [pruned](crate::Builder::retention).
    ///
    /// ```
    /// # mod local { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/local/mod.rs")); }
    /// # local::run(async |client| {
    /// let write = client.execute("INSERT INTO tasks (id, title) VALUES (millstream_uuid(), 'Buy milk')", ()).await?;
    /// let tx = write.tx().expect("it changed a synced row");
    /// // Perhaps after a restart of the app:
    /// for entry in client.queue_entries(tx).await? {
    ///     println!("{:?} {}: {:?}", entry.change.op, entry.change.table, entry.state);
    /// }
    /// # Ok(())
    /// # })
    /// ```
    ///
    /// # Errors
    /// [`Error::Closed`]: the client was closed. [`Error::Store`]: the store failed.
    pub async fn queue_entries(&self, tx: u64) -> Result<Vec<QueueEntry>> {
        self.ask(|reply| WriterCommand::QueueEntries(tx, reply)).await
    }

    /// Submits a failed transaction again, with the same change ids, once nothing before it on its rows waits. Its attempts count
    /// from the start.
    ///
    /// ```no_run
    /// # use millstream_client::{Client, Result};
    /// # async fn example(client: Client) -> Result<()> {
    /// for write in client.failed().await? {
    ///     client.retry(write.tx).await?;
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Store`] with [`StoreError::NotFailed`](crate::StoreError::NotFailed): the server has not rejected it, or it is no
    /// longer in the queue. Otherwise the store failed. [`Error::Closed`]: the client was closed.
    pub async fn retry(&self, tx: u64) -> Result<Write<()>> {
        self.edit(tx, Vec::new()).await
    }

    /// Submits a failed transaction again, with other values. The edit counts as made now.
    ///
    /// ```no_run
    /// # use millstream_client::{Client, Edit, Result};
    /// # async fn example(client: Client, tx: u64) -> Result<()> {
    /// let title = Edit { change_id: None, column: "title".into(), value: Some("Buy oat milk".into()) };
    /// client.edit(tx, vec![title]).await?.confirmed().await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Store`] with [`StoreError::Edit`](crate::StoreError::Edit): the transaction has no such change, or clients may not set
    /// the column. Otherwise those of [`Client::retry`]. Nothing is changed then.
    pub async fn edit(&self, tx: u64, edits: Vec<Edit>) -> Result<Write<()>> {
        self.ask(|reply| WriterCommand::Retry(tx, edits, reply)).await?;
        Ok(Write::new((), Some(tx), self.inner.writer.clone()))
    }

    /// Forgets a failed transaction, or one that is held back behind it: its rows show the server's state.
    ///
    /// ```no_run
    /// # use millstream_client::{Client, Result};
    /// # async fn example(client: Client, tx: u64) -> Result<()> {
    /// client.discard(tx).await?;
    /// assert!(client.queue_entries(tx).await?.is_empty());
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Store`] with [`StoreError::NotFailed`](crate::StoreError::NotFailed): it is neither rejected nor held back. What is
    /// under way or took effect is undone by a new write. Otherwise the store failed. [`Error::Closed`]: the client was closed.
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
    ///
    /// # Errors
    /// [`Error::Store`]: the store failed. Import the file again then; no transaction is recorded twice. [`Error::Closed`]: the client
    /// was closed.
    pub async fn import(&self, saved: Saved) -> Result<Vec<Imported>> {
        self.ask(|reply| WriterCommand::Import(Box::new(saved), reply)).await
    }
}
