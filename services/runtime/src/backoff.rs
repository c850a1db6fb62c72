//! Full-jitter exponential back-off.
//!
//! Source: Marc Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015: each delay is uniform between
//! zero and a bound that doubles up to a cap.

use std::time::Duration;

/// Delays between attempts.
#[derive(Clone, Debug)]
pub struct Backoff {
    base: Duration,
    cap: Duration,
    attempt: u32,
}

impl Backoff {
    /// The first delay is at most `base`; none is above `cap`.
    pub fn new(base: Duration, cap: Duration) -> Self {
        Backoff { base, cap, attempt: 0 }
    }

    /// For a service that lost a dependency: from 100 ms up to 5 s.
    pub fn dependency() -> Self {
        Backoff::new(Duration::from_millis(100), Duration::from_secs(5))
    }

    /// The next delay.
    #[expect(clippy::should_implement_trait, reason = "not an iterator: it never ends and is reset")]
    pub fn next(&mut self) -> Duration {
        let bound = self.base.saturating_mul(1 << self.attempt.min(20)).min(self.cap);
        self.attempt = self.attempt.saturating_add(1);
        bound.mul_f64(rand::random::<f64>())
    }

    /// After a success.
    pub fn reset(&mut self) {
        self.attempt = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_stay_within_doubling_bounds() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(1));
        for bound in [100, 200, 400, 800, 1000, 1000] {
            assert!(backoff.next() <= Duration::from_millis(bound));
        }
        backoff.reset();
        assert!(backoff.next() <= Duration::from_millis(100));
    }
}
