//! Messages older than the ring, of single scopes, by batched direct get: no consumer, and no cost for what other scopes
//! did meanwhile. Source: NATS ADR-31, "JetStream Direct Get", batched requests.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_nats::StatusCode;
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::future::try_join_all;
use millstream_runtime::nats::Nats;
use millstream_schemas::Scope;
use millstream_schemas::subject::WAL_STREAM;
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::message::{InvalidMessage, Message};

/// Messages of one request.
const BATCH: usize = 256;
/// Bytes of one request: a share of what the scopes of a session fetch ahead, within bounds.
const PAGES_BYTES: usize = 2 << 20;
const MIN_BATCH_BYTES: usize = 8 << 10;
const MAX_BATCH_BYTES: usize = 1 << 20;
/// Most bytes that a catch-up fetches ahead, and what all of an edge hold together. Others wait.
const MAX_AHEAD_BYTES: usize = 4 << 20;
const ALL_KIB: usize = 32 << 10;
/// Scopes of one session that are asked for at the same time.
const AT_ONCE: usize = 4;
/// The broker answers within this time.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Most messages of one catch-up; beyond that a snapshot is cheaper.
const MAX_MESSAGES: usize = 50_000;

/// Most bytes of one catch-up, as the ring counts them.
const MAX_BYTES: usize = 64 << 20;

/// Why catching up failed.
#[derive(Debug, thiserror::Error)]
pub enum CatchUpError {
    /// The request could not be made.
    #[error("cannot ask for messages of {subject}")]
    Request {
        /// The scope's subject.
        subject: String,
        /// Why.
        source: async_nats::Error,
    },
    /// No answer in time.
    #[error("no answer to a direct get of {subject}")]
    Timeout {
        /// The scope's subject.
        subject: String,
    },
    /// The broker refused.
    #[error("the broker refused a direct get of {subject}: {status}")]
    Refused {
        /// The scope's subject.
        subject: String,
        /// Its status.
        status: StatusCode,
    },
    /// See [`InvalidMessage`].
    #[error(transparent)]
    Message(#[from] InvalidMessage),
    /// The broker has discarded some of it.
    #[error("the stream does not reach back so far (any more)")]
    Discarded,
    /// A snapshot is cheaper.
    #[error("more than {MAX_MESSAGES} messages or {MAX_BYTES} bytes to catch up with")]
    TooMany,
}

/// What all catch-ups of an edge share.
pub struct CatchUps {
    /// Requests at once.
    requests: Semaphore,
    /// Room for what they fetch ahead, in KiB.
    room: Semaphore,
    waiting: AtomicUsize,
}

impl CatchUps {
    /// With this number of requests at once.
    pub fn new(requests: usize) -> CatchUps {
        CatchUps { requests: Semaphore::new(requests), room: Semaphore::new(ALL_KIB), waiting: AtomicUsize::new(0) }
    }

    /// Room for a catch-up of this number of scopes.
    pub async fn room(&self, scopes: usize) -> Option<SemaphorePermit<'_>> {
        struct Waits<'a>(&'a AtomicUsize);
        impl Drop for Waits<'_> {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Ordering::Relaxed);
            }
        }
        // A message is kept with its frame.
        let bytes = 2 * (scopes * MIN_BATCH_BYTES).clamp(PAGES_BYTES, MAX_AHEAD_BYTES);
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let _waits = Waits(&self.waiting);
        self.room.acquire_many((bytes / 1024) as u32).await.ok()
    }

    /// Whether somebody waits for room.
    pub fn is_wanted(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }
}

/// Messages of several scopes in the order of the stream, fetched page by page.
pub struct Merge<'a> {
    broker: Broker<'a>,
    from: u64,
    before: u64,
    scopes: Vec<Pages>,
    /// The next message of each scope that has one, by sequence.
    next: BinaryHeap<Reverse<(u64, usize)>>,
    /// What has been handed out.
    messages: usize,
    /// What has been fetched.
    bytes: usize,
}

/// Where pages come from.
#[derive(Clone, Copy)]
struct Broker<'a> {
    nats: &'a Nats,
    /// Requests at once, of all sessions.
    requests: &'a Semaphore,
    /// Bytes of one request.
    bytes: usize,
}

/// What has been fetched of a scope and not been handed out.
struct Pages {
    subject: String,
    from: u64,
    found: VecDeque<Arc<Message>>,
    /// There is no more to fetch.
    complete: bool,
}

impl<'a> Merge<'a> {
    /// All messages of these scopes with `from <= stream_seq < before`; the first page of each.
    ///
    /// # Errors
    /// See [`CatchUpError`].
    pub async fn new(
        nats: &'a Nats,
        catch_ups: &'a CatchUps,
        scopes: impl Iterator<Item = &Scope>,
        from: u64,
        before: u64,
    ) -> Result<Merge<'a>, CatchUpError> {
        let pages = |scope: &Scope| Pages { subject: scope.subject(), from, found: VecDeque::new(), complete: false };
        let mut scopes: Vec<Pages> = scopes.map(pages).collect();
        let share = PAGES_BYTES / scopes.len().max(1);
        let broker =
            Broker { nats, requests: &catch_ups.requests, bytes: share.clamp(MIN_BATCH_BYTES, MAX_BATCH_BYTES) };
        let mut bytes = 0;
        for some in scopes.chunks_mut(AT_ONCE) {
            let fetched = try_join_all(some.iter_mut().map(|pages| pages.fetch(broker, before))).await?;
            bytes += fetched.iter().sum::<usize>();
            if bytes > 2 * MAX_AHEAD_BYTES {
                return Err(CatchUpError::TooMany);
            }
        }
        let next = scopes.iter().enumerate().filter_map(|(index, pages)| pages.next(index)).collect();
        Ok(Merge { broker, from, before, scopes, next, messages: 0, bytes })
    }

    /// Makes sure that nothing was missing: the broker discards what is old, and then gives what comes behind it.
    ///
    /// # Errors
    /// See [`CatchUpError`].
    pub async fn complete(&self) -> Result<(), CatchUpError> {
        match at(self.broker.nats, self.from).await? {
            Some(_) => Ok(()),
            None => Err(CatchUpError::Discarded),
        }
    }

    /// The next one.
    ///
    /// # Errors
    /// See [`CatchUpError`].
    pub async fn next(&mut self) -> Result<Option<Arc<Message>>, CatchUpError> {
        let Some(Reverse((_, index))) = self.next.pop() else { return Ok(None) };
        let pages = &mut self.scopes[index];
        let Some(message) = pages.found.pop_front() else { return Ok(None) };
        if pages.found.is_empty() && !pages.complete {
            self.bytes += pages.fetch(self.broker, self.before).await?;
        }
        self.next.extend(pages.next(index));
        self.messages += 1;
        if self.messages > MAX_MESSAGES || self.bytes > MAX_BYTES {
            return Err(CatchUpError::TooMany);
        }
        Ok(Some(message))
    }
}

impl Pages {
    fn next(&self, index: usize) -> Option<Reverse<(u64, usize)>> {
        self.found.front().map(|message| Reverse((message.position.stream_seq, index)))
    }

    /// Gives how many bytes it fetched, as the ring counts them.
    async fn fetch(&mut self, broker: Broker<'_>, before: u64) -> Result<usize, CatchUpError> {
        if self.from >= before {
            self.complete = true;
            return Ok(0);
        }
        let (messages, end) = batch(broker, &self.subject, self.from, before).await?;
        self.complete = end || messages.is_empty();
        if let Some(last) = messages.last() {
            self.from = last.position.stream_seq + 1;
        }
        let bytes = messages.iter().map(|message| message.weight()).sum();
        self.found.extend(messages);
        Ok(bytes)
    }
}

/// One request: its messages, and whether there are no more.
async fn batch(
    broker: Broker<'_>,
    subject: &str,
    from: u64,
    before: u64,
) -> Result<(Vec<Arc<Message>>, bool), CatchUpError> {
    // Held for a request, not for as long as its client takes what it brings.
    let _permit = broker.requests.acquire().await;
    let nats = broker.nats;
    let request = |source: async_nats::Error| CatchUpError::Request { subject: subject.to_owned(), source };
    let inbox = nats.client.new_inbox();
    let mut replies = nats.client.subscribe(inbox.clone()).await.map_err(|error| request(error.into()))?;
    let body = serde_json::json!({ "seq": from, "batch": BATCH, "max_bytes": broker.bytes, "next_by_subj": subject });
    nats.client
        .publish_with_reply(format!("$JS.API.DIRECT.GET.{WAL_STREAM}"), inbox, Bytes::from(body.to_string()))
        .await
        .map_err(|error| request(error.into()))?;
    let mut messages = Vec::new();
    loop {
        let reply = tokio::time::timeout(TIMEOUT, replies.next())
            .await
            .ok()
            .flatten()
            .ok_or_else(|| CatchUpError::Timeout { subject: subject.to_owned() })?;
        match reply.status {
            None => {}
            // 204: the end of this batch.
            Some(status) if status.as_u16() == 204 => {
                let pending = header(&reply, "Nats-Num-Pending").unwrap_or(0_u64);
                return Ok((messages, pending == 0));
            }
            // 404: nothing of the subject from there on.
            Some(StatusCode::NOT_FOUND) => return Ok((messages, true)),
            Some(status) => return Err(CatchUpError::Refused { subject: subject.to_owned(), status }),
        }
        let Some(headers) = &reply.headers else { continue };
        let Some(stream_seq) = header(&reply, "Nats-Sequence") else { continue };
        if stream_seq >= before {
            return Ok((messages, true));
        }
        messages.push(Arc::new(Message::decode(stream_seq, subject, headers, reply.payload.clone())?));
    }
}

fn header<T: std::str::FromStr>(message: &async_nats::Message, name: &str) -> Option<T> {
    message.headers.as_ref()?.get(name)?.as_str().parse().ok()
}

/// The message with this sequence, if the stream holds it.
///
/// # Errors
/// The broker does not answer, or the message cannot be read.
pub async fn at(nats: &Nats, stream_seq: u64) -> Result<Option<Message>, CatchUpError> {
    let subject = format!("$JS.API.DIRECT.GET.{WAL_STREAM}");
    let body = serde_json::json!({ "seq": stream_seq }).to_string();
    let reply = tokio::time::timeout(TIMEOUT, nats.client.request(subject.clone(), Bytes::from(body)))
        .await
        .map_err(|_| CatchUpError::Timeout { subject: subject.clone() })?
        .map_err(|error| CatchUpError::Request { subject, source: error.into() })?;
    if reply.status.is_some() {
        return Ok(None);
    }
    let (Some(headers), Some(found), Some(subject)) =
        (&reply.headers, header::<u64>(&reply, "Nats-Sequence"), header::<String>(&reply, "Nats-Subject"))
    else {
        return Ok(None);
    };
    Ok(Some(Message::decode(found, &subject, headers, reply.payload.clone())?))
}
