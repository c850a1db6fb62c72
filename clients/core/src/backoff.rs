//! When to connect again, and when to try a rejected transaction again: exponential back-off with full jitter.
//!
//! Source of "full jitter": M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.

use millstream_schemas::{Code, Retry};

/// Bound of the first wait, in milliseconds.
pub const BASE_MS: u64 = 500;
/// Bound of the longest wait, in milliseconds; a server's `retry_after` may exceed it.
pub const CAP_MS: u64 = 60_000;
/// A connection that lasted this long counts as healthy and resets the back-off, in milliseconds.
pub const HEALTHY_MS: u64 = 30_000;
/// After a session of any length the bound starts over no higher than this many doublings: a server that welcomed us is
/// there, and one that has too much to do says so by `retry_after`.
pub const FAILURES_AFTER_WELCOME: u32 = 1;
/// Longest `retry_after` that is honoured, in milliseconds: a server's mistake must not silence a client for days.
pub const RETRY_AFTER_CAP_MS: u64 = 3_600_000;

/// Attempts at a transaction that a business rule refuses, before it waits for a person; unless the app says otherwise.
pub const MAX_ATTEMPTS: u32 = 5;
/// Bound of the wait before the second attempt at a rejected transaction, in milliseconds.
pub const ATTEMPT_BASE_MS: u64 = 2_000;
/// Bound of the longest wait between such attempts, in milliseconds.
pub const ATTEMPT_CAP_MS: u64 = 600_000;

/// How long a rejected transaction waits for its next attempt, in milliseconds; none: it waits for a person.
///
/// `attempts` is the number of rejections so far, `random` is uniform in `0.0..1.0`.
pub fn next_attempt(code: Code, attempts: u32, max_attempts: u32, random: f64) -> Option<u64> {
    if code.retry() != Retry::Automatic || attempts >= max_attempts {
        return None;
    }
    let bound = ATTEMPT_BASE_MS.saturating_mul(1 << attempts.saturating_sub(1).min(16)).min(ATTEMPT_CAP_MS);
    Some((bound as f64 * random.clamp(0.0, 1.0)) as u64)
}

/// The waits between attempts to connect. Never gives up.
#[derive(Clone, Debug, Default)]
pub struct Backoff {
    failures: u32,
    connected_at: Option<u64>,
}

impl Backoff {
    /// A fresh back-off.
    pub fn new() -> Self {
        Self::default()
    }

    /// A session began at `now_ms`.
    pub fn connected(&mut self, now_ms: u64) {
        self.connected_at = Some(now_ms);
    }

    /// The attempt or session failed: how long to wait, in milliseconds.
    ///
    /// `random` is uniform in `0.0..1.0`. A server's `retry_after_ms` is the least wait; jitter comes on top, so that
    /// clients that were turned away together do not come back together.
    pub fn failed(&mut self, now_ms: u64, random: f64, retry_after_ms: Option<u64>) -> u64 {
        if let Some(since) = self.connected_at.take() {
            let healthy = now_ms.saturating_sub(since) >= HEALTHY_MS;
            self.failures = if healthy { 0 } else { self.failures.min(FAILURES_AFTER_WELCOME) };
        }
        let bound = BASE_MS.saturating_mul(1 << self.failures.min(16)).min(CAP_MS);
        self.failures = self.failures.saturating_add(1);
        let jitter = (bound as f64 * random.clamp(0.0, 1.0)) as u64;
        retry_after_ms.unwrap_or(0).min(RETRY_AFTER_CAP_MS) + jitter
    }

    /// Start over, because something says that the network is back.
    pub fn reset(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_double_up_to_the_cap_and_jitter_fills_them() {
        let mut backoff = Backoff::new();
        let bounds: Vec<u64> = (0..10).map(|_| backoff.failed(0, 1.0, None)).collect();
        assert_eq!(bounds, [500, 1000, 2000, 4000, 8000, 16_000, 32_000, 60_000, 60_000, 60_000]);
        assert_eq!(backoff.failed(0, 0.0, None), 0);
        assert_eq!(backoff.failed(0, 0.5, None), 30_000);
        for _ in 0..100 {
            backoff.failed(0, 1.0, None);
        }
        assert_eq!(backoff.failed(0, 1.0, None), CAP_MS);
    }

    #[test]
    fn rejected_transactions_wait_longer_each_time_up_to_the_limit() {
        let wait = |attempts| next_attempt(Code::BusinessRule, attempts, 20, 1.0);
        assert_eq!([1, 2, 3, 4].map(wait), [2_000, 4_000, 8_000, 16_000].map(Some));
        assert_eq!((wait(10), wait(19), wait(20)), (Some(ATTEMPT_CAP_MS), Some(ATTEMPT_CAP_MS), None));
        assert_eq!(next_attempt(Code::BusinessRule, 1, 20, 0.0), Some(0), "full jitter: from nothing to the bound");
        assert_eq!(next_attempt(Code::BusinessRule, MAX_ATTEMPTS, MAX_ATTEMPTS, 0.5), None);
        for code in [Code::PermissionDenied, Code::EntityMissing, Code::InvalidValue, Code::Internal] {
            assert_eq!(next_attempt(code, 1, 20, 0.5), None, "{code} waits for a person");
        }
    }

    #[test]
    fn retry_after_is_the_least_wait() {
        assert_eq!(Backoff::new().failed(0, 0.0, Some(2_500)), 2_500);
        assert_eq!(Backoff::new().failed(0, 1.0, Some(2_500)), 3_000);
        assert_eq!(Backoff::new().failed(0, 0.0, Some(u64::MAX)), RETRY_AFTER_CAP_MS);
    }

    #[test]
    fn a_session_lowers_the_bound_and_a_healthy_one_resets_it() {
        let mut backoff = Backoff::new();
        backoff.failed(0, 1.0, None);
        backoff.connected(0);
        assert_eq!(backoff.failed(HEALTHY_MS - 1, 1.0, None), 1000);
        for _ in 0..10 {
            backoff.failed(0, 1.0, None);
        }
        backoff.connected(0);
        assert_eq!(backoff.failed(5, 1.0, None), 1000, "it was welcomed, if briefly");
        backoff.connected(100_000);
        assert_eq!(backoff.failed(100_000 + HEALTHY_MS, 1.0, None), 500);
        backoff.reset();
        assert_eq!(backoff.failed(0, 1.0, None), 500);
    }
}
