//! The reading half of a session: from the replication connection through decoder and assembler into the queue, which
//! is bounded in messages and bytes. While the queue is full, confirmations still reach the server.

use std::collections::{BTreeSet, HashSet};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use millstream_catalog::Table;
use millstream_runtime::postgres::is_about_content;
use millstream_runtime::telemetry;
use millstream_schemas::Lsn;
use sqlx::{PgPool, Row};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::Instant;
use tracing::Span;

use crate::assemble::{AGAIN_INTERVAL_MICROS, AssembleError, Assembler, Filled, Found, Limits, Lookup, Outgoing, Step};
use crate::content;
use crate::error::Error;
use crate::left_out::{LeftOut, Report};
use crate::pgoutput::{self, Message};
use crate::shape::Shape;
use crate::wal::{Event, Wal};
use crate::witness::{Landmark, Witness};

/// Most messages between reader and publisher.
pub const QUEUE_MESSAGES: usize = 8 * 1024;
/// Most bytes of payload between reader and publisher.
pub const QUEUE_BYTES: usize = 32 * 1024 * 1024;
/// How long a table that was sent again a moment ago waits for the next time.
const AGAIN_INTERVAL: Duration = Duration::from_micros(AGAIN_INTERVAL_MICROS.unsigned_abs());
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
    limits: Limits,
    report: Report,
    queue: mpsc::Sender<Queued>,
    room: Arc<Semaphore>,
    confirmed: watch::Receiver<Lsn>,
    reached: watch::Sender<Reached>,
    queued: u64,
    /// Tables that are to be sent again, once this has not been done for a while.
    late: BTreeSet<String>,
    late_since: Instant,
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
            witness,
            tables,
            pool,
            limits,
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
                    match content::ask(&self.pool, &self.late).await {
                        Ok(()) => self.late.clear(),
                        Err(error) => tracing::warn!(error = error.chain(), "cannot ask for tables to be sent again; trying on"),
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
                Some(lookup) => self.fill(&lookup).await?,
                None => Filled::new(),
            };
            let (lsn, xid) = self.assembler.open().unwrap_or_default();
            let mut out = std::mem::take(&mut self.out);
            let step = self.assembler.handle(&message, &filled, &mut out)?;
            for left_out in self.assembler.take_left_out() {
                self.report.tell(&left_out, lsn, xid);
                if let LeftOut::Again { table, late: true, .. } = left_out {
                    if self.late.is_empty() {
                        self.late_since = Instant::now();
                    }
                    self.late.insert(table);
                }
            }
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
        Ok(())
    }

    /// Reads large values that the change stream did not repeat, unless they are too large to be sent. A row that is gone by
    /// now, or has another key or scope, is settled by a later message of the change stream.
    async fn fill(&mut self, lookup: &Lookup) -> Result<Filled, Error> {
        let table = &self.tables[lookup.table];
        let limit = self.limits.row;
        let (mut inner, mut outer) = (Vec::new(), Vec::new());
        for (index, &column) in lookup.columns.iter().enumerate() {
            let column = &table.columns[column];
            let (name, text) = (&column.sql_name, column.text());
            let text = match is_stored_as_text(&column.sql_type) {
                true => format!("CASE WHEN octet_length({name}) <= {limit} THEN {text} END"),
                false => text,
            };
            inner.push(format!("{text} AS t{index}, {name} IS DISTINCT FROM NULL AS p{index}"));
            let fits = format!("octet_length(t{index}) <= {limit}");
            outer.push(format!("CASE WHEN {fits} THEN t{index} END, p{index} AND NOT coalesce({fits}, false)"));
        }
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
        if lookup.lengths
            && let Some(lengths) = self.lengths(lookup, &fixed).await?
        {
            return Ok(lengths);
        }
        // OFFSET keeps the two levels apart: a long text is made once.
        let sql = format!(
            "SELECT {} FROM (SELECT {} FROM {} WHERE {} OFFSET 0) AS found",
            outer.join(", "),
            inner.join(", "),
            table.sql_rows(),
            fixed.join(" AND ")
        );
        // Every name in the statement comes from the catalog; values are bound.
        let mut query = sqlx::query(sqlx::AssertSqlSafe(sql));
        for (_, value) in &lookup.fixed {
            query = query.bind(value);
        }
        let row = match query.fetch_optional(&self.pool).await {
            Ok(Some(row)) => row,
            Ok(None) => return Ok(Filled::new()),
            // So large that Postgres itself cannot write it as text.
            Err(sqlx::Error::Database(error)) if error.code().is_some_and(|code| is_about_content(&code)) => {
                return Ok(lookup.columns.iter().map(|&column| (column, Found::TooLarge)).collect());
            }
            Err(source) => return Err(Error::Lookup { source }),
        };
        let found = |index: usize| match row.get(2 * index + 1) {
            true => Found::TooLarge,
            false => row.get::<Option<String>, _>(2 * index).into(),
        };
        Ok(lookup.columns.iter().enumerate().map(|(index, &column)| (column, found(index))).collect())
    }

    /// How long values are, by the condition that finds their row; none if they may be too long together, or cannot be measured.
    async fn lengths(&self, lookup: &Lookup, fixed: &[String]) -> Result<Option<Filled>, Error> {
        let table = &self.tables[lookup.table];
        let length = |&column: &usize| {
            let column = &table.columns[column];
            let text = if is_stored_as_text(&column.sql_type) { column.sql_name.clone() } else { column.text() };
            format!("coalesce(octet_length({text}), 0)::int8")
        };
        let lengths: Vec<String> = lookup.columns.iter().map(length).collect();
        let sql =
            format!("SELECT ARRAY[{}] FROM {} WHERE {}", lengths.join(", "), table.sql_rows(), fixed.join(" AND "));
        let mut query = sqlx::query_scalar::<_, Vec<i64>>(sqlx::AssertSqlSafe(sql));
        for (_, value) in &lookup.fixed {
            query = query.bind(value);
        }
        let lengths = match query.fetch_optional(&self.pool).await {
            Ok(Some(lengths)) => lengths,
            Ok(None) => return Ok(Some(Filled::new())),
            Err(sqlx::Error::Database(error)) if error.code().is_some_and(|code| is_about_content(&code)) => {
                return Ok(None);
            }
            Err(source) => return Err(Error::Lookup { source }),
        };
        // As JSON they are longer, by a little as a rule.
        let is_far_below = lengths.iter().sum::<i64>() < i64::try_from(self.limits.row / 2).unwrap_or(i64::MAX);
        let found =
            |(&column, length): (&usize, i64)| (column, Found::Length(usize::try_from(length).unwrap_or_default()));
        Ok(is_far_below.then(|| lookup.columns.iter().zip(lengths).map(found).collect()))
    }
}

/// Whether the size of a type's value in store tells, without reading it, how long its text is at least.
fn is_stored_as_text(sql_type: &str) -> bool {
    let is_varchar = sql_type.starts_with("character varying(") && sql_type.ends_with(')');
    is_varchar || matches!(sql_type, "text" | "bytea" | "character varying")
}
