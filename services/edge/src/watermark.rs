//! How far replication has published, asked only while some session waits for it: on a quiet database no message would
//! ever tell that a fence has been passed.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use millstream_runtime::nats::Nats;
use millstream_runtime::shutdown::Shutdown;
use millstream_schemas::stream::Watermark;
use millstream_schemas::subject::WATERMARK;
use tokio::sync::{Notify, watch};

/// Pause between two questions: doubles from the first to the second while sessions still wait.
const PAUSES: (Duration, Duration) = (Duration::from_millis(2), Duration::from_millis(100));
/// Replication answers within this time, if it is there.
const TIMEOUT: Duration = Duration::from_secs(1);

/// The newest watermark, asked for on demand. Cheap to clone.
#[derive(Clone)]
pub struct Watermarks(Arc<Inner>);

struct Inner {
    newest: watch::Sender<Option<Watermark>>,
    waiting: AtomicUsize,
    wake: Notify,
}

/// While it lives, watermarks are asked for.
pub struct Waiting(Watermarks);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.0.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Default for Watermarks {
    fn default() -> Self {
        let newest = watch::Sender::new(None);
        Watermarks(Arc::new(Inner { newest, waiting: AtomicUsize::new(0), wake: Notify::new() }))
    }
}

impl Watermarks {
    /// The newest one, as a value to watch.
    pub fn subscribe(&self) -> watch::Receiver<Option<Watermark>> {
        self.0.newest.subscribe()
    }

    /// Asks for new ones for as long as the result lives.
    pub fn wait(&self) -> Waiting {
        self.0.waiting.fetch_add(1, Ordering::Relaxed);
        self.0.wake.notify_one();
        Waiting(self.clone())
    }

    /// The asking task, until shutdown.
    pub async fn run(self, nats: Nats, shutdown: Shutdown) {
        let mut pause = PAUSES.0;
        loop {
            if self.0.waiting.load(Ordering::Relaxed) == 0 {
                tokio::select! {
                    () = self.0.wake.notified() => pause = PAUSES.0,
                    () = shutdown.requested() => return,
                }
            }
            let asked = tokio::time::timeout(TIMEOUT, nats.client.request(WATERMARK, Bytes::new()));
            let answer = tokio::select! {
                answer = asked => answer,
                () = shutdown.requested() => return,
            };
            match answer {
                Ok(Ok(message)) => match serde_json::from_slice::<Watermark>(&message.payload) {
                    Ok(watermark) => {
                        if self.0.newest.send_replace(Some(watermark)) != Some(watermark) {
                            pause = PAUSES.0;
                        }
                    }
                    Err(error) => tracing::warn!(%error, "replication's watermark cannot be read"),
                },
                Ok(Err(error)) => tracing::debug!(%error, "no watermark from replication"),
                Err(_) => tracing::debug!("no watermark from replication in time"),
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                // A new session waits: ask again quickly.
                () = self.0.wake.notified() => pause = PAUSES.0,
                () = shutdown.requested() => return,
            }
            pause = (pause * 2).min(PAUSES.1);
        }
    }
}
