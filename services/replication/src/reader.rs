//! The reading half of a session: from the replication connection through decoder and assembler into the queue, which
//! is bounded in messages and bytes. While the queue is full, confirmations still reach the server.

use std::collections::{BTreeSet, HashSet};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use millstream_catalog::{Shape, Table};
use millstream_runtime::error::chain;
use millstream_runtime::telemetry;
use millstream_schemas::Lsn;
use sqlx::PgPool;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::Instant;
use tracing::Span;

use crate::assemble::{AGAIN_INTERVAL_MICROS, AssembleError, Assembled, Assembler, Filled, Limits, Outgoing};
use crate::content;
use crate::error::Error;
use crate::left_out::{LeftOut, Report};
use crate::lookup::Lookups;
use crate::pgoutput::{self, Message};
use crate::wal::{Event, Wal};
use crate::witness::{Landmark, Witness};

/// Most messages between reader and publisher.
pub const QUEUE_MESSAGES: usize = 8 * 1024;
/// Most bytes of payload between reader and publisher.
pub const QUEUE_BYTES: usize = 32 * 1024 * 1024;
/// How long a table that was sent again a moment ago waits for the next time.
const AGAIN_INTERVAL: Duration = Duration::from_micros(AGAIN_INTERVAL_MICROS.unsigned_abs());
/// How soon a transaction that is not visible yet is looked at again, and how rarely at most.
const VISIBLE_POLL: Duration = Duration::from_millis(1);
const MAX_VISIBLE_POLL: Duration = Duration::from_millis(100);
/// A transaction that is not visible is waited for this long, while everything behind it waits too.
const VISIBLE_WAIT: Duration = Duration::from_secs(10);
/// What a message costs beyond its payload.
const MESSAGE_OVERHEAD_BYTES: usize = 512;

/// A message on its way to the publisher.
pub struct Queued {
    /// The message.
    pub message: Outgoing,
    /// On a transaction's last message: the span that ends when it is in the stream.
    pub span: Option<Span>,
    /// Its share of the queue's bytes; free again when it is dropped.
    pub room: OwnedSemaphorePermit,
}

/// How far the reader has come: once so many messages are in the stream, everything before the LSN is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reached {
    /// Messages put into the queue.
    pub messages: u64,
    /// Every transaction before this LSN is among them, or had nothing to publish.
    pub lsn: Lsn,
}

/// The reading half.
pub struct Reader {
    wal: Wal,
    assembler: Assembler,
    witness: Witness,
    pool: PgPool,
    lookups: Lookups,
    report: Report,
    queue: mpsc::Sender<Queued>,
    room: Arc<Semaphore>,
    confirmed: watch::Receiver<Lsn>,
    reached: watch::Sender<Reached>,
    queued: u64,
    /// Tables that are to be sent again, once this has not been done for a while.
    late: BTreeSet<String>,
    late_since: Instant,
    /// The transaction that reads have been found to see last.
    seen: Option<u32>,
    /// Transactions that were not waited for any longer.
    unseen: Vec<u32>,
    /// Kept for its memory.
    out: Vec<Outgoing>,
}

impl Reader {
    /// Reads on behind the transaction with commit LSN `through`.
    #[expect(clippy::too_many_arguments, reason = "the ends of every channel of the session")]
    pub fn new(
        wal: Wal,
        tables: Arc<[Table]>,
        shapes: Arc<[Shape]>,
        through: Lsn,
        witness: Witness,
        accepted: HashSet<u64>,
        limits: Limits,
        report: Report,
        pool: PgPool,
        queue: mpsc::Sender<Queued>,
        confirmed: watch::Receiver<Lsn>,
        reached: watch::Sender<Reached>,
    ) -> Self {
        Reader {
            wal,
            assembler: Assembler::new(tables.clone(), through, accepted).with_limits(limits).with_shapes(shapes),
            late: BTreeSet::new(),
            late_since: Instant::now(),
            seen: None,
            unseen: Vec::new(),
            witness,
            lookups: Lookups::new(pool.clone(), tables, limits),
            pool,
            report,
            queue,
            room: Arc::new(Semaphore::new(QUEUE_BYTES)),
            confirmed,
            reached,
            queued: 0,
            out: Vec::new(),
        }
    }

    /// Runs until something fails; says at which transaction.
    pub async fn run(mut self) -> Result<Infallible, Error> {
        match self.read().await {
            Ok(never) => match never {},
            Err(error) => Err(error.at(self.assembler.place())),
        }
    }

    async fn read(&mut self) -> Result<Infallible, Error> {
        loop {
            let received = tokio::select! {
                received = self.wal.next() => received?,
                changed = self.confirmed.changed() => {
                    self.confirm(changed)?;
                    continue;
                }
                () = tokio::time::sleep_until(self.late_since + AGAIN_INTERVAL), if !self.late.is_empty() => {
                    self.late_since = Instant::now();
                    // Nor is a snapshot right that does not see what was read too early.
                    while let Some(&xid) = self.unseen.last() && self.lookups.sees(xid).await? {
                        self.unseen.pop();
                    }
                    if !self.unseen.is_empty() {
                        continue;
                    }
                    match content::ask(&self.pool, &self.late).await {
                        Ok(()) => self.late.clear(),
                        Err(error) => tracing::warn!(error = chain(&error), "cannot ask for tables to be sent again; trying on"),
                    }
                    continue;
                }
            };
            let data = match &received.event {
                Event::Message(data) => data,
                Event::KeepAlive(lsn) => {
                    // With nothing open, the server has sent everything that committed before.
                    if self.assembler.open().is_none() {
                        self.witness.reached(*lsn)?;
                        self.reach(*lsn);
                    }
                    continue;
                }
            };
            let message = pgoutput::decode(data).map_err(AssembleError::Decode)?;
            if let Message::Begin { final_lsn, at, xid } = message {
                self.witness.begins(Landmark { lsn: final_lsn, xid, at })?;
            }
            if let Some(lsn) = self.assembler.skips(&message) {
                self.witness.skips(lsn)?;
            }
            let filled = match self.assembler.lookup(&message)? {
                Some(lookup) => {
                    let (_, xid) = self.assembler.open().unwrap_or_default();
                    if !self.is_visible(xid).await? {
                        let table = self.lookups.table(&lookup).to_owned();
                        self.unseen.push(xid);
                        self.send_again_later(table);
                    }
                    self.lookups.fill(&lookup).await?
                }
                None => Filled::new(),
            };
            let (lsn, xid) = self.assembler.open().unwrap_or_default();
            let mut out = std::mem::take(&mut self.out);
            let step = self.assembler.handle(&message, &filled, &mut out)?;
            for left_out in self.assembler.take_left_out() {
                self.report.tell(&left_out, lsn, xid);
                if let LeftOut::Again { table, late: true, .. } = left_out {
                    self.send_again_later(table);
                }
            }
            if !out.is_empty() {
                self.push(&mut out, step).await?;
            }
            self.out = out;
            if let Assembled::Committed { end_lsn } = step {
                self.reach(end_lsn);
            }
        }
    }

    fn confirm(&mut self, changed: Result<(), watch::error::RecvError>) -> Result<(), Error> {
        changed.map_err(|_| Error::PartEnded)?;
        self.wal.confirm(*self.confirmed.borrow_and_update());
        Ok(())
    }

    fn reach(&self, lsn: Lsn) {
        self.reached.send_if_modified(|reached| {
            let next = Reached { messages: self.queued, lsn: reached.lsn.max(lsn) };
            std::mem::replace(reached, next) != next
        });
    }

    async fn push(&mut self, out: &mut Vec<Outgoing>, step: Assembled) -> Result<(), Error> {
        let mut span = None;
        if let (Assembled::Committed { .. }, Some(last)) = (step, out.last()) {
            let replicate = tracing::info_span!("replicate", wal.lsn = %last.lsn, wal.xid = last.xid, stream.messages = last.index + 1);
            telemetry::set_parent(&replicate, last.traceparent.as_deref());
            if let Some(traceparent) = replicate.in_scope(telemetry::traceparent) {
                for message in out.iter_mut() {
                    message.traceparent = Some(traceparent.clone());
                }
            }
            span = Some(replicate);
        }
        for message in out.drain(..) {
            let span = if message.last { span.take() } else { None };
            let bytes = (message.payload.len() + MESSAGE_OVERHEAD_BYTES).min(QUEUE_BYTES);
            let share = u32::try_from(bytes).unwrap_or(u32::MAX);
            let room = loop {
                tokio::select! {
                    room = self.room.clone().acquire_many_owned(share) => break room.map_err(|_| Error::PartEnded)?,
                    changed = self.confirmed.changed() => self.confirm(changed)?,
                }
            };
            let slot = loop {
                tokio::select! {
                    slot = self.queue.clone().reserve_owned() => break slot.map_err(|_| Error::PartEnded)?,
                    changed = self.confirmed.changed() => self.confirm(changed)?,
                }
            };
            slot.send(Queued { message, span, room });
            self.queued += 1;
        }
        Ok(())
    }

    /// Waits until reads see a transaction: it is decoded a moment before, and long before where its commit waits for a
    /// standby. False: it takes too long. That may be our own doing, if the server counts this connection among its
    /// synchronous standbys: what we have not published, we do not confirm.
    async fn is_visible(&mut self, xid: u32) -> Result<bool, Error> {
        if self.seen == Some(xid) {
            return Ok(true);
        }
        if self.unseen.last() == Some(&xid) {
            return Ok(false);
        }
        let start = Instant::now();
        let mut pause = VISIBLE_POLL;
        while !self.lookups.sees(xid).await? {
            if start.elapsed() > VISIBLE_WAIT {
                tracing::warn!(
                    wal.xid = xid,
                    "a transaction is in the write-ahead log and not visible yet: does its commit wait for a synchronous standby? \
                     Leave this service out of synchronous_standby_names. What it may have read too early is sent again later"
                );
                return Ok(false);
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => pause = (pause * 2).min(MAX_VISIBLE_POLL),
                changed = self.confirmed.changed() => self.confirm(changed)?,
            }
        }
        self.seen = Some(xid);
        Ok(true)
    }

    fn send_again_later(&mut self, table: String) {
        if self.late.is_empty() {
            self.late_since = Instant::now();
        }
        self.late.insert(table);
    }
}
