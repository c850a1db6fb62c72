//! What the database need not remember for ever: old failed changes, and old spans of a client's runs.
//!
//! A row of `changes_history` is also the memory behind a repeated verdict: without it, a client that has not heard of
//! the rejection would be told that its transaction was applied. So age alone is not enough. A row may go when it is older
//! than the retention, and
//! - its client has gone on by [`KEPT_BEHIND`] transactions: it has long been told, since what an offline client
//!   catches up with comes in order, or
//! - its client has submitted nothing for as long as the retention: either it has heard of the row long ago, or it was
//!   away for all that time. **So the retention must be longer than clients may stay away**; the default is 90 days. Or
//! - nobody knows the client.

use std::time::Duration;

use millstream_runtime::error::chain;
use sqlx::PgPool;
use tokio::time::Instant;

/// Rejections among so many of a client's newest transactions stay while the client is active.
const KEPT_BEHIND: i64 = 10_000;
/// Spans of runs that are kept a client: it would take as many starts of a store, without any confirmation heard,
/// to miss one.
const KEPT_SPANS: i64 = 1_000;
/// Most rows in one statement, and most statements in a round: nobody waits for them, and nobody shall wait because of them.
const BATCH: i64 = 1_000;
const BATCHES: usize = 20;
/// Time between rounds. Executors may do it side by side; what one has deleted the other does not find.
const PERIOD: Duration = Duration::from_secs(60 * 60);

/// By age first, which has an index.
const FORGET: &str = "\
DELETE FROM millstream.changes_history WHERE id IN (
    SELECT h.id FROM millstream.changes_history h LEFT JOIN millstream.clients c USING (client_id)
    WHERE h.at < now() - make_interval(days => $1)
      AND (c.client_id IS NULL OR h.seq <= c.last_seq - $2 OR c.last_seen < now() - make_interval(days => $1))
    ORDER BY h.at LIMIT $3)";

const FORGET_SPANS: &str = "\
DELETE FROM millstream.instances WHERE (client_id, first_seq) IN (
    SELECT client_id, first_seq FROM (
        SELECT client_id, first_seq, row_number() OVER (PARTITION BY client_id ORDER BY first_seq DESC) AS place
        FROM millstream.instances
        WHERE client_id IN (SELECT client_id FROM millstream.instances GROUP BY client_id HAVING count(*) > $1)) AS spans
    WHERE place > $1 LIMIT $2)";

/// Forgets now and then.
pub(crate) struct Retention {
    pool: PgPool,
    /// Days; none keeps failed changes for ever.
    days: Option<i32>,
    due: Instant,
}

impl Retention {
    /// `days` of history, 0 for ever.
    pub fn new(pool: PgPool, days: u16) -> Self {
        Retention { pool, days: (days > 0).then_some(i32::from(days)), due: Instant::now() }
    }

    /// When the next round is due.
    pub fn due(&self) -> Instant {
        self.due
    }

    /// One round. What is left over, or could not be done, comes with the next.
    pub async fn round(&mut self) {
        self.due = Instant::now() + PERIOD;
        let forgotten = self.forget().await;
        match forgotten {
            Ok((0, 0)) => {}
            Ok((failures, spans)) => tracing::info!(failures, spans, "forgot what is older than the retention"),
            Err(error) => tracing::warn!(error = chain(&error), "forgetting is put off"),
        }
    }

    async fn forget(&self) -> Result<(u64, u64), sqlx::Error> {
        let (mut failures, mut spans) = (0, 0);
        if let Some(days) = self.days {
            for _ in 0..BATCHES {
                let done = sqlx::query(FORGET).bind(days).bind(KEPT_BEHIND).bind(BATCH).execute(&self.pool).await?;
                failures += done.rows_affected();
                if done.rows_affected() < BATCH as u64 {
                    break;
                }
            }
        }
        for _ in 0..BATCHES {
            let done = sqlx::query(FORGET_SPANS).bind(KEPT_SPANS).bind(BATCH).execute(&self.pool).await?;
            spans += done.rows_affected();
            if done.rows_affected() < BATCH as u64 {
                break;
            }
        }
        Ok((failures, spans))
    }
}
