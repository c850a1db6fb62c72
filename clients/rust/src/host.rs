//! What the store asks of its surroundings, as the system has it.

use std::time::{SystemTime, UNIX_EPOCH};

use millstream_client_store::Host;
use uuid::Uuid;

/// The system's clock and ids.
pub(crate) struct SystemHost;

impl Host for SystemHost {
    fn now_micros(&self) -> u64 {
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64)
    }

    fn uuid(&self) -> Uuid {
        Uuid::now_v7()
    }
}
