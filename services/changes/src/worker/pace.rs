//! What is slow: told by what is usual. Pure, but for the times that the caller gives.

use std::time::Duration;

use tokio::time::Instant;

/// How long a careful batch may take: others wait for it. Transactions that fail can take long, each tried more than once.
pub(crate) const CAREFUL: Duration = Duration::from_millis(15);

/// How long a worker's batches take, and what is long.
#[derive(Debug)]
pub(crate) struct Pace {
    usual: Duration,
    /// When clients were last told to be slow that had not been, and how many in this second.
    told: Option<(Instant, u32)>,
}

impl Default for Pace {
    fn default() -> Pace {
        Pace { usual: Duration::from_millis(10), told: None }
    }
}

impl Pace {
    /// A transaction is slow if it takes longer than `SLOW` and longer than `TIMES` the usual time. On a database that is slow as a
    /// whole, the usual time is long too.
    const SLOW: Duration = Duration::from_millis(25);
    const TIMES: u32 = 3;
    /// Where more clients than these become slow in a second, it is not for what they do.
    const MOST: u32 = 4;

    /// Whether this one is slow. It counts, but not for more than twice what is usual.
    pub fn is_slow(&mut self, took: Duration) -> bool {
        let usual = self.usual;
        self.usual = (usual * 15 + took.min(usual * 2)) / 16;
        took > Self::SLOW.max(usual * Self::TIMES)
    }

    /// Whether another client may be told to be slow.
    pub fn may_tell(&mut self, now: Instant) -> bool {
        let (since, told) =
            self.told.filter(|(since, _)| now.duration_since(*since) < Duration::from_secs(1)).unwrap_or((now, 0));
        self.told = Some((since, told + 1));
        told < Self::MOST
    }

    /// How long a careful batch may take.
    pub fn careful(&self) -> Duration {
        CAREFUL.max(self.usual * 2)
    }
}
