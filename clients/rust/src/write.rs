//! Writing: a transaction under way, and one that is durable.

use millstream_client_store::{self as store, Outcome};
use serde::de::DeserializeOwned;
use tokio::sync::{mpsc, oneshot};
use uuid::Uuid;

use crate::bus::WriterCommand;
use crate::{Error, IntoParams, Result, Rows};

/// A transaction that is durable in the store.
///
/// Dropping it changes nothing: the transaction stays in the queue and is sent. Keep it to hear of the verdict, or its number
/// [`tx`](Write::tx) to ask for its [queue entries](crate::Client::queue_entries) later, also after a restart of the app.
#[derive(Clone)]
pub struct Write<T> {
    value: T,
    tx: Option<u64>,
    writer: mpsc::Sender<WriterCommand>,
}

impl<T> Write<T> {
    pub(crate) fn new(value: T, tx: Option<u64>, writer: mpsc::Sender<WriterCommand>) -> Self {
        Write { value, tx, writer }
    }

    /// The value that the transaction gave: of [`Client::execute`](crate::Client::execute) the number of rows changed.
    ///
    /// ```
    /// # mod local { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/local/mod.rs")); }
    /// # local::run(async |client| {
    /// let write = client.execute("UPDATE tasks SET done = 1 WHERE title = ?", ["Buy milk"]).await?;
    /// if *write.value() == 0 {
    ///     println!("there is no such task");
    /// }
    /// # Ok(())
    /// # })
    /// ```
    pub fn value(&self) -> &T {
        &self.value
    }

    /// The value that the transaction gave, taken out.
    ///
    /// ```
    /// # mod local { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/local/mod.rs")); }
    /// # local::run(async |client| {
    /// let id = client
    ///     .tx(|tx| {
    ///         let id = tx.uuid();
    ///         tx.execute("INSERT INTO tasks (id, title) VALUES (?, ?)", (id, "Buy milk"))?;
    ///         Ok(id)
    ///     })
    ///     .await?
    ///     .into_value();
    /// assert_eq!(client.table::<serde_json::Value>("tasks").get([id]).await?.unwrap()["title"], "Buy milk");
    /// # Ok(())
    /// # })
    /// ```
    pub fn into_value(self) -> T {
        self.value
    }

    /// The local transaction, as the queue names it; `None` if it changed no synced row.
    ///
    /// ```
    /// # mod local { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/local/mod.rs")); }
    /// # local::run(async |client| {
    /// let write = client.execute("INSERT INTO tasks (id, title) VALUES (millstream_uuid(), 'Buy milk')", ()).await?;
    /// assert_eq!(write.tx(), Some(1));
    /// let write = client.execute("DELETE FROM tasks WHERE title = 'none of this name'", ()).await?;
    /// assert_eq!(write.tx(), None);
    /// # Ok(())
    /// # })
    /// ```
    pub fn tx(&self) -> Option<u64> {
        self.tx
    }

    /// Waits for the verdict of the server, however long the client is offline. Losing to newer changes of others is success; the
    /// outcome tells.
    ///
    /// A transaction that changed no synced row counts as applied at once, as does one whose entries are no longer in the queue.
    ///
    /// ```no_run
    /// # use millstream_client::{Client, Error, Outcome, Result};
    /// # async fn example(client: Client) -> Result<()> {
    /// let write = client.execute("UPDATE tasks SET title = ? WHERE done", ["Done"]).await?;
    /// match write.confirmed().await {
    ///     Ok(Outcome::Applied) => println!("it took effect"),
    ///     Ok(outcome) => println!("somebody changed the same columns later: {outcome:?}"),
    ///     // It stays in the queue: see `Client::watch_failed`.
    ///     Err(Error::Rejected { code, message, .. }) => println!("rejected, {code}: {message}"),
    ///     Err(error) => return Err(error),
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// - [`Error::Rejected`]: the server rejected it, and its rows show the server's state. It stays in the queue, and may be tried
    ///   again by itself; call `confirmed` again to wait for the next verdict.
    /// - [`Error::Discarded`]: it was discarded while it waited.
    /// - [`Error::Closed`]: the client was closed. The transaction is sent when the store is opened again.
    /// - [`Error::Store`]: the store failed.
    pub async fn confirmed(&self) -> Result<Outcome> {
        let Some(tx) = self.tx else { return Ok(Outcome::Applied) };
        let (reply, answer) = oneshot::channel();
        self.writer.send(WriterCommand::Settled(tx, reply)).await.map_err(|_| Error::Closed)?;
        answer.await.map_err(|_| Error::Closed)?
    }
}

/// The app's transaction under way, in the closure of [`Client::tx`](crate::Client::tx).
pub struct Tx<'a, 'b> {
    tx: &'a mut store::Tx<'b>,
}

impl<'a, 'b> Tx<'a, 'b> {
    pub(crate) fn new(tx: &'a mut store::Tx<'b>) -> Self {
        Tx { tx }
    }

    /// Executes one statement; gives the number of rows it changed.
    ///
    /// # Errors
    /// [`Error::Store`]: SQLite or the store's rules refuse the statement. The transaction goes on if the closure does.
    pub fn execute(&mut self, sql: &str, params: impl IntoParams) -> Result<usize> {
        Ok(self.tx.execute(sql, &params.into_params())?)
    }

    /// Reads, seeing the transaction's own writes.
    ///
    /// # Errors
    /// [`Error::Store`]: SQLite or the store's rules refuse the statement.
    pub fn query(&mut self, sql: &str, params: impl IntoParams) -> Result<Rows> {
        Ok(self.tx.query(sql, &params.into_params())?.into())
    }

    /// Reads rows as values of a type; see [`Rows::deserialize`].
    ///
    /// # Errors
    /// Those of [`Tx::query`], and [`Error::Decode`]: a row does not fit the type.
    pub fn query_as<T: DeserializeOwned>(&mut self, sql: &str, params: impl IntoParams) -> Result<Vec<T>> {
        self.query(sql, params)?.deserialize()
    }

    /// Runs a part that can fail on its own: its writes and queue entries go when it does.
    ///
    /// ```
    /// # mod local { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/local/mod.rs")); }
    /// # local::run(async |client| {
    /// # use millstream_client::Error;
    /// client
    ///     .tx(|tx| {
    ///         tx.execute("INSERT INTO tasks (id, title) VALUES (millstream_uuid(), 'Buy milk')", ())?;
    ///         let part = tx.savepoint(|tx| {
    ///             tx.execute("DELETE FROM tasks", ())?;
    ///             Err::<(), _>(Error::app("changed my mind"))
    ///         });
    ///         assert_eq!(part.unwrap_err().to_string(), "changed my mind");
    ///         Ok(())
    ///     })
    ///     .await?;
    /// assert_eq!(client.query("SELECT * FROM tasks", ()).await?.len(), 1);
    /// # Ok(())
    /// # })
    /// ```
    ///
    /// # Errors
    /// The error of the closure, or [`Error::Store`]: SQLite failed.
    pub fn savepoint<T>(&mut self, part: impl FnOnce(&mut Tx<'_, '_>) -> Result<T>) -> Result<T> {
        self.tx.savepoint(|tx| part(&mut Tx { tx }))
    }

    /// A new UUIDv7.
    pub fn uuid(&self) -> Uuid {
        self.tx.uuid()
    }
}
