//! The short way: a whole batch as one statement, without BEGIN and COMMIT, in one round trip.
//!
//! It is open to batches whose outcome can be foreseen: each transaction is the next one of a client that was met before,
//! nothing is refused beforehand, and no change depends on another. The statement has Postgres check what was foreseen,
//! that is positions, ledger, and that every row is written as a whole; where something is different it takes itself back
//! by an error, and the batch goes the long way ([`Transaction::run`]).

use std::collections::HashMap;
use std::time::Instant;

use millstream_schemas::stream::ORIGIN_PREFIX;
use sqlx::postgres::PgRow;
use sqlx::{AssertSqlSafe, Row};
use uuid::Uuid;

use crate::apply::{Applier, bind, failed};
use crate::batch::Item;
use crate::error::keeps_connection;
use crate::executor::{Failed, Transaction, spans, traceparent};
use crate::group::Group;
use crate::ledger::{Client, Ledger};
use crate::model::Model;
use crate::plan::{Action, Planned, Rejected, plan, predecessors};
use crate::results::Results;
use crate::settle::{self, FENCED};

/// Parameters before those of the groups.
pub(crate) const PARAMETERS: usize = 13;
/// SQLSTATE of `millstream.take_back`.
const TAKEN_BACK: &str = "MS001";
/// So many batches go the long way after one of which a row was not written: where some lose, others may.
const PAUSE: u32 = 10;
/// How far the database's time may be from what is remembered of it, microseconds.
const MAX_OFF: i64 = 1_000_000;
/// Most clients that are remembered.
const MAX_CLIENTS: usize = 10_000;

/// Makes the statement from the groups' statements and what counts the rows that each wrote as a whole.
///
/// Postgres evaluates the branches of a CASE in their order, and with them what they count: no row is written before the
/// positions and the ledger stand.
pub(crate) fn text(parts: &str, counts: &[String]) -> String {
    let wrong = |(n, count): (usize, &String)| format!("{count} <> ($12::bigint[])[{}]", n + 3);
    let wrong = counts.iter().enumerate().map(wrong).collect::<Vec<_>>().join(" OR ");
    format!(
        "/* millstream at once */ WITH {FENCED},
millstream_known AS (
    UPDATE millstream.clients AS c SET last_seq = n.last_seq, last_seen = now()
    FROM unnest($6::uuid[], $7::text[], $8::bigint[], $9::bigint[]) AS n(client_id, user_id, stored, last_seq)
    WHERE c.client_id = n.client_id AND c.last_seq = n.stored AND c.user_id = n.user_id
    RETURNING 1),
{parts}
SELECT CASE
    WHEN abs(extract(epoch FROM clock_timestamp()) * 1000000 - $13) > {MAX_OFF} THEN millstream.take_back('time')
    WHEN (SELECT count(*) FROM millstream_fenced) <> ($12::bigint[])[1] THEN millstream.take_back('positions')
    WHEN (SELECT count(*) FROM millstream_known) <> ($12::bigint[])[2] THEN millstream.take_back('ledger')
    WHEN {wrong} THEN millstream.take_back('rows')
    ELSE pg_logical_emit_message(true, $10, $11) END::text AS lsn,
    (extract(epoch FROM clock_timestamp()) * 1000000)::bigint AS now"
    )
}

/// What batches before found: the ledger entries of clients, and the database's time. If somebody else moves an entry,
/// the comparison in the statement fails.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    clients: HashMap<Uuid, Client>,
    /// Microseconds since 1970, and when they were read.
    time: Option<(u64, Instant)>,
    /// Batches that are still to go the long way.
    pause: u32,
}

impl Memory {
    /// The ledger of a batch's clients; none if there is a submission that is not known to be the next of its client.
    fn ledger(&self, items: &[Item]) -> Option<Ledger> {
        let mut ledger = Ledger::default();
        let mut taken: HashMap<Uuid, u64> = HashMap::new();
        for submission in items.iter().filter_map(|item| item.submission.as_ref()) {
            let client = self.clients.get(&submission.client_id)?;
            let last = taken.entry(submission.client_id).or_insert_with(|| {
                ledger.load(submission.client_id, client.clone());
                client.last
            });
            *last += 1;
            let next = submission.client_seq == *last && client.run_id == Some(submission.run_id);
            if !next || client.user_id != submission.user_id {
                return None;
            }
        }
        Some(ledger)
    }

    /// Whether a batch may go the short way.
    fn allows(&mut self) -> bool {
        let paused = self.pause > 0;
        self.pause = self.pause.saturating_sub(1);
        !paused
    }

    /// The database's time, microseconds since 1970, or a little less; if its clock was set, the statement finds out.
    fn now(&self) -> Option<u64> {
        self.time.map(|(time, read)| time + read.elapsed().as_micros() as u64)
    }

    /// Keeps what a committed batch stored, and the time that it read.
    pub fn keep(&mut self, ledger: Ledger, time: Option<u64>) {
        self.time = time.map(|time| (time, Instant::now()));
        if self.clients.len() > MAX_CLIENTS {
            self.clients.clear();
        }
        self.clients.extend(ledger.stored());
    }
}

impl Transaction<'_> {
    /// Applies the batch and commits it, unless it has to go the long way.
    pub async fn at_once(&mut self, model: &mut Model, memory: &mut Memory) -> Option<Result<Results, Failed>> {
        if !memory.allows() {
            return None;
        }
        let (mut ledger, now) = (memory.ledger(self.items)?, memory.now()?);
        let submissions = || self.items.iter().filter_map(|item| item.submission.as_ref());
        if !predecessors(submissions(), &ledger).is_empty() {
            return None;
        }
        let Model { catalog, statements, .. } = model;
        let find = |name: &str| catalog.table(name);
        let plan = plan(submissions(), &mut ledger, find, self.condemned, &mut Rejected::default());
        if plan.is_empty() || plan.iter().any(|planned| !matches!(planned.action, Action::Apply(_))) {
            return None;
        }
        let mut applier = Applier::new(self.connection, statements, now);
        let (mut groups, true) = applier.groups(&plan).ok()? else { return None };
        let sql = statements.at_once(&mut groups)?;
        let spans = self.spans.insert(spans(&plan));
        let traceparent = traceparent(&plan, spans);
        let mut results = Results::default();
        results.extend(&plan);
        let error = match self.send(&sql, &plan, &groups, &ledger, now, traceparent).await {
            Ok(row) => {
                memory.keep(ledger, row.try_get("now").ok().map(|now: i64| now as u64));
                return Some(Ok(results));
            }
            Err(Failed::Server(error)) => error,
            Err(failed) => return Some(Err(failed)),
        };
        if !keeps_connection(&error) {
            return Some(Err(Failed::Unsure(results, error)));
        }
        let taken_back = error.as_database_error().filter(|error| error.code().is_some_and(|code| code == TAKEN_BACK));
        match taken_back.map(|error| error.message()) {
            Some("positions") => Some(Err(Failed::Fenced)),
            // Nothing is wrong with it: the long way reads time and ledger anew, and finds what was not written, and why.
            Some(reason) => {
                if reason == "rows" {
                    memory.pause = PAUSE;
                }
                None
            }
            None => Some(Err(failed(error))),
        }
    }

    async fn send(
        &mut self,
        sql: &std::sync::Arc<str>,
        plan: &[Planned<'_>],
        groups: &[Group<'_>],
        ledger: &Ledger,
        now: u64,
        traceparent: Option<String>,
    ) -> Result<PgRow, Failed> {
        let clients: Vec<(Uuid, &Client)> = ledger.changed().collect();
        let number = |value: fn(&Client) -> u64| clients.iter().map(|(_, c)| value(c) as i64).collect::<Vec<_>>();
        let counts = [self.fences.len(), clients.len()].into_iter().chain(groups.iter().map(|group| group.rows.len()));
        let origin = settle::encoded_origin(settle::origin(plan, ledger), traceparent, plan.len())?;
        let mut query = settle::bind_fences(sqlx::query(AssertSqlSafe(sql.clone())), self.incarnation, self.fences)
            .bind(clients.iter().map(|(id, _)| *id).collect::<Vec<_>>())
            .bind(clients.iter().map(|(_, client)| client.user_id.as_str()).collect::<Vec<_>>())
            .bind(number(|client| client.stored.unwrap_or_default()))
            .bind(number(|client| client.last))
            .bind(ORIGIN_PREFIX)
            .bind(origin)
            .bind(counts.map(|count| count as i64).collect::<Vec<_>>())
            .bind(now as i64);
        for group in groups {
            query = bind(query, group.statement.shape.op, &group.rows);
        }
        query.fetch_one(&mut *self.connection).await.map_err(Failed::Server)
    }
}
