//! Answers how far the stream reaches.

use std::convert::Infallible;
use std::time::Duration;

use futures_util::StreamExt;
use millstream_schemas::stream::Watermark;
use millstream_schemas::subject::WATERMARK;
use sqlx::PgPool;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::error::Error;

/// How often a request may make us look whether Postgres holds WAL back.
const NUDGE_INTERVAL: Duration = Duration::from_millis(200);
/// Time for that.
const NUDGE_TIMEOUT: Duration = Duration::from_secs(2);

/// Answers requests while this process is leader.
pub async fn answer(
    client: async_nats::Client,
    pool: PgPool,
    watermark: watch::Receiver<Watermark>,
) -> Result<Infallible, Error> {
    let mut requests =
        client.subscribe(WATERMARK).await.map_err(|source| Error::Subscribe { subject: WATERMARK, source })?;
    let mut nudged = Instant::now();
    let mut nudge: Option<JoinHandle<()>> = None;
    while let Some(request) = requests.next().await {
        let Some(reply) = request.reply else { continue };
        let current = *watermark.borrow();
        match serde_json::to_vec(&current) {
            // Whoever asked asks again: a lost answer needs no care.
            Ok(answer) => drop(client.publish(reply, answer.into()).await),
            Err(error) => tracing::error!(%error, "cannot write the watermark"),
        }
        if nudged.elapsed() >= NUDGE_INTERVAL && nudge.as_ref().is_none_or(JoinHandle::is_finished) {
            nudged = Instant::now();
            nudge = Some(tokio::spawn(flush(pool.clone())));
        }
    }
    Err(Error::PartEnded)
}

/// Makes Postgres flush its WAL where it has none to flush it for: on a quiet database, what an open or aborted
/// transaction wrote stays in memory for up to 15 s, and a reader that waits for the insert position would wait so
/// long. A commit flushes everything before it.
async fn flush(pool: PgPool) {
    let work = async {
        let behind: bool = sqlx::query_scalar("SELECT pg_current_wal_insert_lsn() > pg_current_wal_flush_lsn()")
            .fetch_one(&pool)
            .await?;
        if behind {
            sqlx::query("UPDATE millstream.epoch SET epoch = epoch").execute(&pool).await?;
        }
        Ok::<_, sqlx::Error>(())
    };
    match tokio::time::timeout(NUDGE_TIMEOUT, work).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "cannot make Postgres flush its WAL"),
        Err(_) => tracing::debug!("Postgres did not flush its WAL in time"),
    }
}
