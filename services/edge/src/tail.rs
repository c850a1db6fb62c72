//! The edge's own tail of the whole outbound stream: one consumer an edge, whatever the number of sessions.
//!
//! A throw-away pull consumer without acks, made anew after any gap or error at the sequence behind the last message.
//! (async-nats's ordered consumer stalls for 42 s after the loss of a node, and may replay from 1.)

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_nats::HeaderMap;
use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, pull};
use async_nats::jetstream::stream::Stream;
use futures_util::StreamExt;
use millstream_runtime::error::chain;
use millstream_runtime::health::Health;
use millstream_runtime::nats::{self, Nats};
use millstream_runtime::shutdown::Shutdown;
use millstream_schemas::subject::WAL_STREAM;

use crate::hub::{Hub, RING_MESSAGES};
use crate::message::Message;

/// The broker says within this time that it is alive; two misses and the consumer is made anew.
const HEARTBEAT: Duration = Duration::from_millis(500);
/// Life of one pull request.
const EXPIRES: Duration = Duration::from_secs(3);
/// Messages of one pull request: what may be on its way to an edge that is busy. (With a limit in bytes as well, async-nats asks
/// again only when the request expires.)
const BATCH: usize = 128;
/// The broker forgets an abandoned consumer after this time.
const INACTIVE: Duration = Duration::from_secs(30);
/// Pause before the consumer is made anew.
const PAUSE: Duration = Duration::from_millis(200);
/// How much history the tail starts with, in messages: what a look-back may need.
const START_BACK: u64 = RING_MESSAGES as u64 / 2;

/// Why the tail must begin again.
#[derive(Debug, thiserror::Error)]
enum TailError {
    #[error(transparent)]
    Stream(#[from] nats::Error),
    #[error("cannot {0}")]
    Consumer(&'static str, #[source] async_nats::Error),
    #[error("a message was skipped")]
    Gap,
    #[error("the stream was made anew or set back")]
    SetBack,
    #[error("the broker ended the delivery")]
    Ended,
}

/// Feeds the hub until shutdown.
pub async fn run(nats: Nats, hub: Arc<Hub>, health: Health, shutdown: Shutdown) {
    let mut last = None;
    while !shutdown.is_requested() {
        let ended = tokio::select! {
            () = shutdown.requested() => return,
            ended = follow(&nats, &hub, &health, &mut last) => ended,
        };
        health.set_ready("stream", false);
        if let Err(error) = ended {
            tracing::warn!(error = chain(&error), "the tail of the outbound stream begins again");
            if matches!(error, TailError::SetBack) {
                last = None;
                hub.reset();
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn follow(nats: &Nats, hub: &Hub, health: &Health, last: &mut Option<u64>) -> Result<(), TailError> {
    let stream: Stream = nats::stream(&nats.jetstream, WAL_STREAM).await?;
    let state = &stream.cached_info().state;
    let end = state.last_sequence;
    let start = match *last {
        // The same history goes on only if the stream still holds what comes next.
        Some(last) if last > end || last + 1 < state.first_sequence => return Err(TailError::SetBack),
        Some(last) => last + 1,
        None => end.saturating_sub(START_BACK).max(state.first_sequence).max(1),
    };
    let config = pull::Config {
        name: Some(format!("edge-{}", uuid::Uuid::new_v4().simple())),
        deliver_policy: DeliverPolicy::ByStartSequence { start_sequence: start },
        ack_policy: AckPolicy::None,
        memory_storage: true,
        num_replicas: 1,
        inactive_threshold: INACTIVE,
        ..pull::Config::default()
    };
    let consumer = stream
        .create_consumer(config)
        .await
        .map_err(|error| TailError::Consumer("make a consumer of the outbound stream", error.into()))?;
    let mut messages = consumer
        .stream()
        .max_messages_per_batch(BATCH)
        .heartbeat(HEARTBEAT)
        .expires(EXPIRES)
        .messages()
        .await
        .map_err(|error| TailError::Consumer("pull from the outbound stream", error.into()))?;
    let (mut expected, none) = (1, HeaderMap::new());
    if last.is_some_and(|last| last >= end) {
        health.set_ready("stream", true);
    }
    while let Some(message) = messages.next().await {
        let message = message.map_err(|error| TailError::Consumer("read the outbound stream", error.into()))?;
        let info = message.info().map_err(|error| TailError::Consumer("read a delivery's metadata", error))?;
        if info.consumer_sequence != expected {
            return Err(TailError::Gap);
        }
        expected += 1;
        let stream_seq = info.stream_sequence;
        if last.is_some_and(|last| stream_seq <= last) {
            continue;
        }
        let headers = message.headers.as_ref().unwrap_or(&none);
        match Message::decode(stream_seq, &message.subject, headers, message.payload.clone()) {
            Ok(decoded) => hub.push(Arc::new(decoded), Instant::now()),
            Err(error) => {
                // Only replication may publish here. Sessions must not step over it: without it there is a gap.
                tracing::error!(%error, "a message of the outbound stream cannot be read; sessions start over");
                hub.reset();
            }
        }
        *last = Some(stream_seq);
        if stream_seq >= end {
            health.set_ready("stream", true);
        }
    }
    Err(TailError::Ended)
}
