//! The reading half of a session: from the replication connection through decoder and assembler into the queue, which
//! is bounded in messages and bytes. While the queue is full, confirmations still reach the server.

use std::collections::HashSet;
use std::convert::Infallible;
use std::sync::Arc;

use millstream_catalog::Table;
use millstream_runtime::telemetry;
use millstream_schemas::Lsn;
use pgwire_replication::ReplicationEvent;
use sqlx::{PgPool, Row};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tracing::Span;

use crate::assemble::{AssembleError, Assembler, Filled, Lookup, Outgoing, Step};
use crate::error::Error;
use crate::pgoutput::Message;
use crate::wal::{self, Wal};
use crate::witness::{Landmark, Witness};

/// Most messages between reader and publisher.
pub const QUEUE_MESSAGES: usize = 8 * 1024;
/// Most bytes of payload between reader and publisher.
pub const QUEUE_BYTES: usize = 32 * 1024 * 1024;
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
    tables: Arc<[Table]>,
    assembler: Assembler,
    witness: Witness,
    pool: PgPool,
    queue: mpsc::Sender<Queued>,
    room: Arc<Semaphore>,
    confirmed: watch::Receiver<Lsn>,
    reached: watch::Sender<Reached>,
    queued: u64,
    /// Kept for its memory.
    out: Vec<Outgoing>,
}

impl Reader {
    /// Reads on behind the transaction with commit LSN `through`.
    #[expect(clippy::too_many_arguments, reason = "the ends of every channel of the session")]
    pub fn new(
        wal: Wal,
        tables: Arc<[Table]>,
        through: Lsn,
        witness: Witness,
        accepted: HashSet<u64>,
        pool: PgPool,
        queue: mpsc::Sender<Queued>,
        confirmed: watch::Receiver<Lsn>,
        reached: watch::Sender<Reached>,
    ) -> Self {
        Reader {
            wal,
            assembler: Assembler::new(tables.clone(), through, accepted),
            witness,
            tables,
            pool,
            queue,
            room: Arc::new(Semaphore::new(QUEUE_BYTES)),
            confirmed,
            reached,
            queued: 0,
            out: Vec::new(),
        }
    }

    /// Runs until something fails.
    pub async fn run(mut self) -> Result<Infallible, Error> {
        loop {
            let event = tokio::select! {
                event = self.wal.next() => event?,
                changed = self.confirmed.changed() => {
                    self.confirm(changed)?;
                    continue;
                }
            };
            if let ReplicationEvent::KeepAlive { wal_end, .. } = &event {
                // With nothing open, the server has sent everything that committed before.
                if !self.assembler.is_open() {
                    self.witness.reached(Lsn(wal_end.0))?;
                    self.reach(Lsn(wal_end.0));
                }
                continue;
            }
            let Some(message) = wal::message(&event).map_err(AssembleError::Decode)? else { continue };
            if let Message::Begin { final_lsn, at, xid } = message {
                self.witness.begins(Landmark { lsn: final_lsn, xid, at })?;
            }
            if let Some(lsn) = self.assembler.skips(&message) {
                self.witness.skips(lsn)?;
            }
            let filled = match self.assembler.lookup(&message)? {
                Some(lookup) => self.fill(&lookup).await?,
                None => Filled::new(),
            };
            let mut out = std::mem::take(&mut self.out);
            let step = self.assembler.handle(&message, &filled, &mut out)?;
            if !out.is_empty() {
                self.push(&mut out, step).await?;
            }
            self.out = out;
            if let Step::Committed { end_lsn } = step {
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

    async fn push(&mut self, out: &mut Vec<Outgoing>, step: Step) -> Result<(), Error> {
        let mut span = None;
        if let (Step::Committed { .. }, Some(last)) = (step, out.last()) {
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
        self.wal.was_busy();
        Ok(())
    }

    /// Reads large values that the change stream did not repeat. A row that is gone by now, or has another key or scope, is
    /// settled by a later message of the change stream.
    async fn fill(&mut self, lookup: &Lookup) -> Result<Filled, Error> {
        let table = &self.tables[lookup.table];
        let columns: Vec<String> = lookup.columns.iter().map(|&column| table.columns[column].text()).collect();
        let fixed: Vec<String> = lookup
            .fixed
            .iter()
            .enumerate()
            .map(|(index, (place, _))| {
                let column = &table.columns[*place];
                // An index serves equality only.
                let is = if table.key.contains(place) { "=" } else { "IS NOT DISTINCT FROM" };
                format!("{} {is} ${}::text::{}", column.sql_name, index + 1, column.sql_type)
            })
            .collect();
        let sql = format!("SELECT {} FROM {} WHERE {}", columns.join(", "), table.sql_name, fixed.join(" AND "));
        // Every name in the statement comes from the catalog; values are bound.
        let mut query = sqlx::query(sqlx::AssertSqlSafe(sql));
        for (_, value) in &lookup.fixed {
            query = query.bind(value);
        }
        let row = query.fetch_optional(&self.pool).await.map_err(Error::postgres("read an unchanged large value"))?;
        self.wal.was_busy();
        Ok(row.map_or_else(Filled::new, |row| {
            lookup.columns.iter().enumerate().map(|(index, &column)| (column, row.get(index))).collect()
        }))
    }
}
