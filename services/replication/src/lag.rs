//! How far the stream is behind the write-ahead log, as metrics of the leader.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use millstream_runtime::telemetry::meter;
use millstream_schemas::Lsn;
use millstream_schemas::stream::Watermark;
use sqlx::PgPool;
use tokio::sync::watch;

use crate::error::Error;

/// How often it is measured.
const INTERVAL: Duration = Duration::from_secs(2);
/// Most measurements that the stream has not caught up with.
const MAX_ENDS: usize = 1_000;

/// End of the WAL, and how much of it Postgres keeps for the slot.
const READ: &str = "\
SELECT (pg_current_wal_flush_lsn() - '0/0')::int8, coalesce(pg_current_wal_flush_lsn() - restart_lsn, 0)::int8
FROM pg_replication_slots WHERE slot_name = $1";

/// What was measured last.
#[derive(Clone, Copy, Debug)]
struct Lag {
    /// WAL that the stream does not hold yet.
    bytes: u64,
    /// How long ago the WAL ended where the stream ends now.
    time: Duration,
    /// WAL that Postgres keeps for the slot.
    retained: u64,
}

/// The gauges of the process; nothing is reported while it is not leader.
#[derive(Clone, Default)]
pub struct Gauges(Arc<Mutex<Option<Lag>>>);

impl Gauges {
    /// Reports from now on, where metrics are on.
    pub fn register() -> Gauges {
        let gauges = Gauges::default();
        let meter = meter();
        let shown = gauges.clone();
        meter
            .f64_observable_gauge("millstream.replication.lag_seconds")
            .with_unit("s")
            .with_description("how long ago the WAL ended where the stream ends now")
            .with_callback(move |to| shown.show(|lag| to.observe(lag.time.as_secs_f64(), &[])))
            .build();
        for (name, description, value) in [
            ("lag_bytes", "WAL that the stream does not hold yet", (|lag| lag.bytes) as fn(&Lag) -> u64),
            ("retained_bytes", "WAL that Postgres keeps for the slot", |lag| lag.retained),
        ] {
            let shown = gauges.clone();
            meter
                .u64_observable_gauge(format!("millstream.replication.{name}"))
                .with_unit("By")
                .with_description(description)
                .with_callback(move |to| shown.show(|lag| to.observe(value(lag), &[])))
                .build();
        }
        gauges
    }

    fn show(&self, observe: impl FnOnce(&Lag)) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(observe);
    }

    fn set(&self, lag: Option<Lag>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = lag;
    }
}

/// While it lives, this process is leader.
struct Measuring(Gauges);

impl Drop for Measuring {
    fn drop(&mut self) {
        self.0.set(None);
    }
}

/// Measures while this process is leader.
pub async fn measure(
    gauges: Gauges,
    pool: PgPool,
    slot: String,
    watermark: watch::Receiver<Watermark>,
) -> Result<Infallible, Error> {
    let measuring = Measuring(gauges);
    let mut ends = Ends::default();
    loop {
        let read: Result<Option<(i64, i64)>, _> = sqlx::query_as(READ).bind(&slot).fetch_optional(&pool).await;
        match read {
            Ok(Some((end, retained))) => {
                let (end, held) = (Lsn(end as u64), watermark.borrow().lsn);
                let time = ends.behind(end, held, Instant::now());
                let bytes = end.0.saturating_sub(held.0);
                measuring.0.set(Some(Lag { bytes, time, retained: retained.max(0) as u64 }));
            }
            Ok(None) => measuring.0.set(None),
            Err(error) => tracing::debug!(%error, "cannot measure how far the stream is behind"),
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

/// Where the WAL ended, and when, as far as the stream has not come so far.
#[derive(Debug, Default)]
struct Ends(VecDeque<(Lsn, Instant)>);

impl Ends {
    /// Adds an end; gives how long ago the WAL ended where the stream, which holds everything before `held`, ends now.
    fn behind(&mut self, end: Lsn, held: Lsn, now: Instant) -> Duration {
        if self.0.len() < MAX_ENDS {
            self.0.push_back((end, now));
        }
        while self.0.front().is_some_and(|(end, _)| *end <= held) {
            self.0.pop_front();
        }
        self.0.front().map_or(Duration::ZERO, |(_, at)| now - *at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lag_is_the_age_of_the_first_end_that_the_stream_has_not_reached() {
        let mut ends = Ends::default();
        let begin = Instant::now();
        let mut check = |second, end, held, expected| {
            let now = begin + Duration::from_secs(second);
            assert_eq!(ends.behind(Lsn(end), Lsn(held), now), Duration::from_secs(expected), "{second}");
        };
        check(0, 100, 100, 0);
        check(2, 200, 100, 0);
        check(4, 300, 100, 2);
        check(6, 300, 199, 4);
        check(8, 400, 200, 4);
        check(10, 400, 400, 0);
        check(12, 500, 400, 0);
        // However long it lasts.
        (0..2 * MAX_ENDS as u64).for_each(|second| check(14 + second, 600 + second, 499, 2 + second));
        assert_eq!(ends.0.len(), MAX_ENDS);
    }
}
