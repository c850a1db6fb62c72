//! Lanes: one task for each partition, which publishes what waits as one message and goes on when that is acknowledged.
//!
//! One publish in flight keeps the order exact whatever fails: an unknown outcome is published again, and the ledger
//! makes the repeat harmless. Packing what waits makes up for it, since a single server fsyncs each message.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use millstream_runtime::backoff::Backoff;
use millstream_runtime::health::Health;
use millstream_runtime::nats::Nats;
use millstream_runtime::shutdown::Shutdown;
use millstream_runtime::telemetry;
use millstream_schemas::stream::MAX_MESSAGE_BYTES;
use millstream_schemas::subject::{self, PARTITIONS};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use uuid::Uuid;

/// Submissions waiting in one lane; when it is full, sessions answer `overloaded`.
const LANE_QUEUE: usize = 1024;
/// The broker acknowledges within this time, or the publish is repeated: it may have fallen into a reconnect.
/// A broker that is merely slow gets twice the time at each repeat, up to the second.
const PUBLISH_TIMEOUT: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(30));
/// Bytes waiting in all lanes of an edge together.
const LANES_BYTES: usize = 64 << 20;
/// Bytes around the submissions of a message.
const ENVELOPE_BYTES: usize = 64;

/// Name of the lanes in the health report.
const PART: &str = "lanes";

/// Lanes whose last message the broker has not acknowledged in time.
#[derive(Clone)]
struct Stalled {
    lanes: Arc<Mutex<u64>>,
    health: Health,
}

impl Stalled {
    /// Counts them in the health report and as a metric.
    fn new(health: Health) -> Stalled {
        health.set_ready(PART, true);
        let lanes = Arc::new(Mutex::new(0));
        let seen = lanes.clone();
        let _gauge = telemetry::meter()
            .u64_observable_gauge("millstream.edge.lanes_stalled")
            .with_description("Lanes to the broker that wait for an acknowledgement for more than 2 s")
            .with_callback(move |gauge| gauge.observe(*seen.lock().unwrap_or_else(PoisonError::into_inner), &[]))
            .build();
        Stalled { lanes, health }
    }

    fn stalls(&self) {
        let mut lanes = self.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        *lanes += 1;
        self.health.set_ready(PART, false);
    }

    fn goes_on(&self) {
        let mut lanes = self.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        *lanes -= 1;
        self.health.set_ready(PART, *lanes == 0);
    }
}

/// A submission, encoded, and where to say that it is stored.
pub struct Queued {
    /// JSON of a `Submission`.
    pub submission: Vec<u8>,
    /// Its `client_seq`.
    pub client_seq: u64,
    /// Gets `client_seq` once the broker has it.
    pub stored: mpsc::Sender<u64>,
}

/// The lane does not take more at the moment.
#[derive(Debug, PartialEq, Eq)]
pub struct Full;

/// All lanes of an edge. Cheap to clone.
#[derive(Clone)]
pub struct Lanes {
    lanes: Vec<mpsc::Sender<(Queued, OwnedSemaphorePermit)>>,
    room: Arc<Semaphore>,
}

impl Lanes {
    /// Starts the tasks.
    pub fn start(nats: &Nats, health: &Health, shutdown: &Shutdown) -> Lanes {
        let stalled = Stalled::new(health.clone());
        let lane = |partition| {
            let (sender, receiver) = mpsc::channel(LANE_QUEUE);
            tokio::spawn(run(nats.clone(), subject::changes(partition), receiver, stalled.clone(), shutdown.clone()));
            sender
        };
        Lanes { lanes: (0..PARTITIONS).map(lane).collect(), room: Arc::new(Semaphore::new(LANES_BYTES)) }
    }

    /// Queues a submission of this client.
    ///
    /// # Errors
    /// [`Full`]: try again later.
    pub fn submit(&self, client: Uuid, item: Queued) -> Result<(), Full> {
        let bytes = u32::try_from(item.submission.len()).map_err(|_| Full)?;
        let room = self.room.clone().try_acquire_many_owned(bytes).map_err(|_| Full)?;
        self.lanes[usize::from(subject::partition(client))].try_send((item, room)).map_err(|_| Full)
    }
}

async fn run(
    nats: Nats,
    subject: String,
    mut queue: mpsc::Receiver<(Queued, OwnedSemaphorePermit)>,
    stalled: Stalled,
    shutdown: Shutdown,
) {
    let mut carried = None;
    loop {
        let first = match carried.take() {
            Some(item) => item,
            None => tokio::select! {
                item = queue.recv() => match item {
                    Some(item) => item,
                    None => return,
                },
                // What is queued but not stored is the clients' still.
                () = shutdown.requested() => return,
            },
        };
        let mut body = Vec::with_capacity(first.0.submission.len() + ENVELOPE_BYTES);
        body.extend_from_slice(br#"{"submissions":["#);
        body.extend_from_slice(&first.0.submission);
        let mut items = vec![first];
        while let Ok(item) = queue.try_recv() {
            if body.len() + item.0.submission.len() + ENVELOPE_BYTES > MAX_MESSAGE_BYTES {
                carried = Some(item);
                break;
            }
            body.push(b',');
            body.extend_from_slice(&item.0.submission);
            items.push(item);
        }
        body.extend_from_slice(b"]}");
        if !publish(&nats, &subject, body.into(), &stalled, &shutdown).await {
            return;
        }
        for (item, _room) in items {
            // A session that is gone, or has hundreds of acks unread, learns from the ledger when it connects again.
            let _ = item.stored.try_send(item.client_seq);
        }
    }
}

/// Publishes until it is acknowledged; false on shutdown.
async fn publish(nats: &Nats, subject: &str, body: Bytes, stalled: &Stalled, shutdown: &Shutdown) -> bool {
    let mut is_stalled = false;
    let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(2));
    let mut patience = PUBLISH_TIMEOUT.0;
    let mut connections = nats.connections.clone();
    loop {
        connections.mark_unchanged();
        let attempt = async { nats.jetstream.publish(subject.to_owned(), body.clone()).await?.await };
        tokio::select! {
            result = tokio::time::timeout(patience, attempt) => match result {
                Ok(Ok(_)) => {
                    if is_stalled {
                        stalled.goes_on();
                    }
                    return true;
                }
                Ok(Err(error)) => {
                    if !std::mem::replace(&mut is_stalled, true) {
                        stalled.stalls();
                    }
                    tracing::warn!(subject, %error, "publishing again");
                }
                Err(_) => {
                    if !std::mem::replace(&mut is_stalled, true) {
                        stalled.stalls();
                    }
                    tracing::warn!(subject, "no acknowledgement in time; publishing again");
                    patience = (patience * 2).min(PUBLISH_TIMEOUT.1);
                }
            },
            // The acknowledgement was for the connection before.
            Ok(()) = connections.changed() => tracing::info!(subject, "connected anew; publishing again"),
            () = shutdown.requested() => return false,
        }
        tokio::select! {
            () = tokio::time::sleep(backoff.next()) => {}
            () = shutdown.requested() => return false,
        }
    }
}
