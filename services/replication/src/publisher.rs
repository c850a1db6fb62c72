//! The writing half of a session: appends what waits, confirms what is in the stream, and knows the watermark.

use std::convert::Infallible;
use std::time::Duration;

use millstream_schemas::Lsn;
use millstream_schemas::stream::Watermark;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use crate::append::{Appender, MAX_BATCH_BYTES, MAX_BATCH_MESSAGES, mark};
use crate::error::{AtTransaction, Error};
use crate::reader::{Queued, Reached};

/// With nothing to publish, the slot is confirmed this long after the WAL moved …
const MARK_INTERVAL: Duration = Duration::from_secs(10);
/// … or as soon as so many bytes of WAL had nothing for us.
const MARK_BYTES: u64 = 16 * 1024 * 1024;

/// The writing half.
pub struct Publisher {
    appender: Appender,
    queue: mpsc::Receiver<Queued>,
    reached: watch::Receiver<Reached>,
    confirmed: watch::Sender<Lsn>,
    watermark: watch::Sender<Watermark>,
    /// Messages of the queue that are in the stream.
    appended: u64,
    /// What the stream itself says it holds, and since when.
    held: Lsn,
    held_since: Instant,
}

impl Publisher {
    /// Goes on from where the appender stands; the stream holds everything before `held`.
    pub fn new(
        appender: Appender,
        held: Lsn,
        queue: mpsc::Receiver<Queued>,
        reached: watch::Receiver<Reached>,
        confirmed: watch::Sender<Lsn>,
        watermark: watch::Sender<Watermark>,
    ) -> Self {
        Publisher { appender, queue, reached, confirmed, watermark, appended: 0, held, held_since: Instant::now() }
    }

    /// Runs until something fails.
    pub async fn run(mut self) -> Result<Infallible, Error> {
        let mut waiting = Vec::new();
        loop {
            let reached = self.idle();
            let mark_at = match reached {
                Some(lsn) if lsn.0 - self.held.0 >= MARK_BYTES => Some(Instant::now()),
                Some(lsn) if lsn > self.held => Some(self.held_since + MARK_INTERVAL),
                _ => None,
            };
            tokio::select! {
                biased;
                first = self.queue.recv() => {
                    waiting.push(first.ok_or(Error::PartEnded)?);
                    self.take_waiting(&mut waiting);
                    self.append(&mut waiting).await?;
                }
                changed = self.reached.changed() => changed.map_err(|_| Error::PartEnded)?,
                () = tokio::time::sleep_until(mark_at.unwrap_or_else(Instant::now)), if mark_at.is_some() => {
                    self.mark(reached.unwrap_or(self.held)).await?;
                }
            }
        }
    }

    /// The LSN that the reader has reached, if everything it queued until then is in the stream.
    fn idle(&mut self) -> Option<Lsn> {
        let reached = *self.reached.borrow_and_update();
        if reached.messages != self.appended || reached.lsn < self.held {
            return None;
        }
        self.advance(reached.lsn);
        Some(reached.lsn)
    }

    fn advance(&self, lsn: Lsn) {
        let stream_seq = self.appender.sequence();
        self.watermark.send_if_modified(|watermark| {
            let ahead = lsn > watermark.lsn;
            if ahead {
                (watermark.lsn, watermark.stream_seq) = (lsn, stream_seq);
            }
            ahead
        });
    }

    fn take_waiting(&mut self, waiting: &mut Vec<Queued>) {
        let mut bytes: usize = waiting.iter().map(|queued| queued.message.payload.len()).sum();
        while waiting.len() < MAX_BATCH_MESSAGES && bytes < MAX_BATCH_BYTES {
            let Ok(next) = self.queue.try_recv() else { break };
            bytes += next.message.payload.len();
            waiting.push(next);
        }
    }

    async fn append(&mut self, waiting: &mut Vec<Queued>) -> Result<(), Error> {
        let (mut messages, mut spans) = (Vec::with_capacity(waiting.len()), Vec::with_capacity(waiting.len()));
        for queued in waiting.drain(..) {
            messages.push(queued.message);
            spans.push((queued.span, queued.room));
        }
        if let Err(error) = self.appender.append(&messages).await {
            let first =
                messages.first().map(|first| AtTransaction { lsn: first.lsn, xid: Some(first.xid), table: None });
            return Err(match first {
                Some(place) => error.at(place),
                None => error,
            });
        }
        self.appended += messages.len() as u64;
        if let Some(last) = messages.iter().rfind(|message| message.last) {
            self.hold(last.end_lsn);
        }
        Ok(())
    }

    /// Everything before the LSN is in the stream, and the stream says so: now the slot may forget it.
    fn hold(&mut self, lsn: Lsn) {
        self.held = self.held.max(lsn);
        self.held_since = Instant::now();
        self.advance(self.held);
        self.confirmed.send_replace(self.held);
    }

    /// Writes into the stream that it is complete up to the LSN, so that the slot may be confirmed so far.
    async fn mark(&mut self, lsn: Lsn) -> Result<(), Error> {
        self.appender.append(&[mark(lsn)]).await?;
        self.hold(lsn);
        Ok(())
    }
}
