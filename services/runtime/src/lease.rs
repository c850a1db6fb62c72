//! A pooled connection in a transaction, which goes back to its pool only from a known state.
//!
//! A connection whose last exchange failed, or was given up half-way, may hold an answer that nobody has read; in the pool it would
//! give that answer to the next question of somebody else. (sqlx-postgres 0.9 returns such a connection after an error that
//! comes instead of `CopyOutResponse`.) So every exchange is marked as it begins and as it ends, and a connection that is
//! dropped in between is closed.

use bytes::Bytes;
use futures_util::TryStreamExt;
use futures_util::stream::BoxStream;
use sqlx::pool::PoolConnection;
use sqlx::postgres::{PgArguments, PgRow};
use sqlx::query::Query;
use sqlx::{PgConnection, PgPool, Postgres};

/// A transaction on a connection of a pool. Dropped, it is rolled back.
pub struct Lease {
    /// None only while it is dropped.
    connection: Option<PoolConnection<Postgres>>,
    /// The last exchange has come to its end.
    is_known: bool,
}

impl Lease {
    /// Takes a connection and begins a transaction by `begin`, a statement such as `BEGIN READ ONLY`.
    ///
    /// # Errors
    /// No connection could be had in time, or Postgres refused.
    pub async fn begin(pool: &PgPool, begin: &'static str) -> Result<Lease, sqlx::Error> {
        let connection = Some(pool.acquire().await?);
        let mut lease = Lease { connection, is_known: true };
        lease.raw(begin).await?;
        Ok(lease)
    }

    /// Runs a statement without parameters, which comes from the caller's own text and from the catalog.
    ///
    /// # Errors
    /// Postgres refused, or the connection broke. Then nothing else can be done with it.
    pub async fn raw(&mut self, sql: &str) -> Result<(), sqlx::Error> {
        let statement = sqlx::raw_sql(sqlx::AssertSqlSafe(sql.to_owned()));
        statement.execute(self.start()?).await?;
        self.is_known = true;
        Ok(())
    }

    /// The rows of a query.
    ///
    /// # Errors
    /// As [`Lease::raw`].
    pub async fn all(&mut self, query: Query<'_, Postgres, PgArguments>) -> Result<Vec<PgRow>, sqlx::Error> {
        let rows = query.fetch_all(self.start()?).await?;
        self.is_known = true;
        Ok(rows)
    }

    /// The one row of a query.
    ///
    /// # Errors
    /// As [`Lease::raw`], or there is none.
    pub async fn one(&mut self, query: Query<'_, Postgres, PgArguments>) -> Result<PgRow, sqlx::Error> {
        self.all(query).await?.into_iter().next().ok_or(sqlx::Error::RowNotFound)
    }

    /// Hands the chunks of a `COPY … TO STDOUT` to `take`, until that says no.
    ///
    /// # Errors
    /// As [`Lease::raw`].
    pub async fn copy_out(&mut self, sql: &str) -> Result<Copy<'_>, sqlx::Error> {
        let Some(connection) = self.connection.as_deref_mut() else { return Err(sqlx::Error::PoolClosed) };
        self.is_known = false;
        let chunks = connection.copy_out_raw(sql).await?;
        Ok(Copy { chunks, is_known: &mut self.is_known })
    }

    /// Ends the transaction and gives the connection back.
    ///
    /// # Errors
    /// As [`Lease::raw`].
    pub async fn commit(mut self) -> Result<(), sqlx::Error> {
        self.raw("COMMIT").await?;
        // Nothing is left to be rolled back.
        drop(self.connection.take());
        Ok(())
    }

    fn start(&mut self) -> Result<&mut PgConnection, sqlx::Error> {
        if !self.is_known {
            return Err(sqlx::Error::WorkerCrashed);
        }
        self.is_known = false;
        self.connection.as_deref_mut().ok_or(sqlx::Error::PoolClosed)
    }
}

/// What a `COPY … TO STDOUT` gives. The connection is closed if it is dropped before its end.
pub struct Copy<'c> {
    chunks: BoxStream<'c, Result<Bytes, sqlx::Error>>,
    is_known: &'c mut bool,
}

impl Copy<'_> {
    /// The next chunk; none at the end.
    ///
    /// # Errors
    /// As [`Lease::raw`].
    pub async fn next(&mut self) -> Result<Option<Bytes>, sqlx::Error> {
        let chunk = self.chunks.try_next().await?;
        *self.is_known = chunk.is_none();
        Ok(chunk)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let Some(mut connection) = self.connection.take() else { return };
        if !self.is_known {
            // Out of the pool, and closed by being dropped: there is no telling what it would answer.
            drop(connection.detach());
            return;
        }
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            drop(connection.detach());
            return;
        };
        runtime.spawn(async move {
            if sqlx::raw_sql("ROLLBACK").execute(&mut *connection).await.is_err() {
                drop(connection.detach());
            }
        });
    }
}
