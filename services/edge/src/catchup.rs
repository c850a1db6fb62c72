//! Messages older than the ring, of single scopes, by batched direct get: no consumer, and no cost for what other scopes
//! did meanwhile. Source: NATS ADR-31, "JetStream Direct Get", batched requests.

use std::sync::Arc;
use std::time::Duration;

use async_nats::StatusCode;
use bytes::Bytes;
use futures_util::StreamExt;
use millstream_runtime::nats::Nats;
use millstream_schemas::Scope;
use millstream_schemas::subject::WAL_STREAM;

use crate::message::{InvalidMessage, Message};

/// Messages of one request.
const BATCH: usize = 256;
/// Bytes of one request.
const BATCH_BYTES: usize = 8 << 20;
/// The broker answers within this time.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Most messages of one catch-up; beyond that a snapshot is cheaper.
pub(crate) const MAX_MESSAGES: usize = 50_000;

/// Most bytes of one catch-up, as the ring counts them.
pub(crate) const MAX_BYTES: usize = 64 << 20;

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
    /// A snapshot is cheaper.
    #[error("more than {MAX_MESSAGES} messages to catch up with")]
    TooMany,
}

/// All messages of one scope with `from <= seq < before`, in order.
///
/// # Errors
/// See [`CatchUpError`].
pub async fn fetch(nats: &Nats, scope: &Scope, from: u64, before: u64) -> Result<Vec<Arc<Message>>, CatchUpError> {
    let subject = scope.subject();
    let mut found = Vec::new();
    let mut from = from;
    while from < before {
        let (messages, end) = batch(nats, &subject, from, before).await?;
        let last = messages.last().map(|message: &Arc<Message>| message.position.seq);
        found.extend(messages);
        if found.len() > MAX_MESSAGES {
            return Err(CatchUpError::TooMany);
        }
        match last {
            Some(last) if !end => from = last + 1,
            _ => break,
        }
    }
    Ok(found)
}

/// One request: its messages, and whether there are no more.
async fn batch(nats: &Nats, subject: &str, from: u64, before: u64) -> Result<(Vec<Arc<Message>>, bool), CatchUpError> {
    let request = |source: async_nats::Error| CatchUpError::Request { subject: subject.to_owned(), source };
    let inbox = nats.client.new_inbox();
    let mut replies = nats.client.subscribe(inbox.clone()).await.map_err(|error| request(error.into()))?;
    let body = serde_json::json!({ "seq": from, "batch": BATCH, "max_bytes": BATCH_BYTES, "next_by_subj": subject });
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
        let Some(seq) = header(&reply, "Nats-Sequence") else { continue };
        if seq >= before {
            return Ok((messages, true));
        }
        messages.push(Arc::new(Message::decode(seq, subject, headers, reply.payload.clone())?));
    }
}

fn header<T: std::str::FromStr>(message: &async_nats::Message, name: &str) -> Option<T> {
    message.headers.as_ref()?.get(name)?.as_str().parse().ok()
}

/// The message with this sequence, if the stream holds it.
///
/// # Errors
/// The broker does not answer, or the message cannot be read.
pub async fn at(nats: &Nats, seq: u64) -> Result<Option<Message>, CatchUpError> {
    let subject = format!("$JS.API.DIRECT.GET.{WAL_STREAM}");
    let body = serde_json::json!({ "seq": seq }).to_string();
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
