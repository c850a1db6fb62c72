//! Hooks for tests: faults on purpose, and a clock of the test's own. They need the feature `testing`.
//!
//! ```toml
//! [dev-dependencies]
//! millstream-client = { version = "0.1", features = ["testing"] }
//! ```
//!
//! ```no_run
//! # async fn example(client: millstream_client::Client) -> millstream_client::Result<()> {
//! let write = client.execute("UPDATE tasks SET done = 1", ()).await?;
//! // The network fails; the change arrives all the same, once.
//! client.drop_connection();
//! write.confirmed().await?;
//! # Ok(())
//! # }
//! ```

use std::sync::{Arc, Mutex, PoisonError};

pub use millstream_client_store::Host;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::bus::Copies;
use crate::{Builder, Client};

/// Faults of the bus between the workers of a client.
#[derive(Clone, Copy, Debug)]
pub struct Faults {
    /// Share of the messages that are dropped.
    pub drop: f64,
    /// Share of the messages that arrive twice.
    pub duplicate: f64,
    /// Seed of the random choice.
    pub seed: u64,
}

impl Faults {
    fn copies(self) -> Copies {
        let random = Mutex::new(StdRng::seed_from_u64(self.seed));
        Arc::new(move || {
            let number: f64 = random.lock().unwrap_or_else(PoisonError::into_inner).random();
            if number < self.drop {
                0
            } else if number < self.drop + self.duplicate {
                2
            } else {
                1
            }
        })
    }
}

/// A part of the client that runs on its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Worker {
    /// Decides when each change is sent.
    Changes,
    /// Keeps the one socket.
    Sync,
}

impl Builder {
    /// The source of stamps and ids, by default the system's clock and random numbers.
    pub fn host(mut self, host: impl Host + 'static) -> Self {
        self.host = Arc::new(host);
        self
    }

    /// Puts faults into the bus between the workers, to show that nothing gets lost.
    pub fn bus_faults(mut self, faults: Faults) -> Self {
        self.copies = Some(faults.copies());
        self
    }
}

impl Client {
    /// Cuts the connection, as a bad network would; the client connects again by itself.
    pub fn drop_connection(&self) {
        self.inner.control.send_modify(|control| control.cuts += 1);
    }

    /// Starts a worker again, as after a crash of it. Its unfinished work is done again.
    pub fn restart(&self, worker: Worker) {
        self.inner.control.send_modify(|control| match worker {
            Worker::Changes => control.changes_restarts += 1,
            Worker::Sync => control.sync_restarts += 1,
        });
    }
}
