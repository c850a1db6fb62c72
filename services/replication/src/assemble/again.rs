//! When tables were sent again: changes that go on and on and cannot be routed must not keep clients at it all the time. Pure.

use std::collections::HashMap;

use crate::left_out::Again;

/// A table with changes that cannot be routed is sent again at most once in this time, in microseconds; while that goes on, in
/// twice as much each time, up to `MAX_AGAIN_INTERVAL_MICROS`.
pub const AGAIN_INTERVAL_MICROS: i64 = 10_000_000;
const MAX_AGAIN_INTERVAL_MICROS: i64 = 600_000_000;

/// For each table, by its index: the commit time at which it was sent again last, in microseconds since 1970, and the interval
/// in which it is not sent once more.
#[derive(Default)]
pub(super) struct SentAgain(HashMap<usize, (i64, i64)>);

impl SentAgain {
    /// Counts a table as sent again now, unless that was done a moment ago: true, it has to wait.
    pub fn must_wait(&mut self, table: usize, why: Again, at: i64) -> bool {
        let (last, interval) = self.0.get(&table).copied().unwrap_or((i64::MIN, AGAIN_INTERVAL_MICROS));
        let since = at.saturating_sub(last);
        let is_unroutable = why == Again::Unroutable;
        if is_unroutable && (0..interval).contains(&since) {
            return true;
        }
        let goes_on = is_unroutable && (0..interval.saturating_mul(3)).contains(&since);
        let interval =
            if goes_on { interval.saturating_mul(2).min(MAX_AGAIN_INTERVAL_MICROS) } else { AGAIN_INTERVAL_MICROS };
        self.0.insert(table, (at, interval));
        false
    }
}
