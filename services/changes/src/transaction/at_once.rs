//! The short way: a whole batch as one statement, without BEGIN and COMMIT, in one round trip.
//!
//! It is open to batches whose outcome can be foreseen: each transaction is the next one of a client that was met before,
//! nothing is refused beforehand, and no change depends on another. The statement has Postgres check what was foreseen,
//! that is positions, ledger, and that every row is written as a whole; where something is different it takes itself back
//! by an error, and the batch goes the long way ([`Transaction::run`]).

use millstream_schemas::stream::ORIGIN_PREFIX;
use sqlx::postgres::PgRow;
use sqlx::{AssertSqlSafe, Row};
use uuid::Uuid;

use crate::decide::ledger::{Ledger, LedgerEntry};
use crate::decide::origin::origin;
use crate::decide::plan::{Action, Planned, Rejected, plan, predecessors};
use crate::decide::results::Results;
use crate::error::keeps_connection;
use crate::sql::fenced::bind_fences;
use crate::sql::group::Group;
use crate::sql::model::Model;
use crate::sql::statement::bind;
use crate::transaction::apply::Applier;
use crate::transaction::batch::{Transaction, spans, traceparent};
use crate::transaction::failed::Failed;
use crate::transaction::memory::Memory;
use crate::transaction::settle;

/// SQLSTATE of `millstream.take_back`.
const TAKEN_BACK: &str = "MS001";

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
        let Model { catalog, statements, combined, .. } = model;
        let find = |name: &str| catalog.table(name);
        let plan = plan(submissions(), &mut ledger, find, self.condemned, &mut Rejected::default());
        if plan.is_empty() || plan.iter().any(|planned| !matches!(planned.action, Action::Apply(_))) {
            return None;
        }
        let mut applier = Applier::new(self.connection, statements, combined, now);
        let (mut groups, true) = applier.groups(&plan).ok()? else { return None };
        let sql = combined.at_once(&mut groups)?;
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
                    memory.pause();
                }
                None
            }
            None => Some(Err(Failed::of(error))),
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
        let clients: Vec<(Uuid, &LedgerEntry)> = ledger.changed().collect();
        let number = |value: fn(&LedgerEntry) -> u64| clients.iter().map(|(_, c)| value(c) as i64).collect::<Vec<_>>();
        let counts = [self.fences.len(), clients.len()].into_iter().chain(groups.iter().map(|group| group.rows.len()));
        let origin = settle::encoded_origin(origin(plan, ledger), traceparent, plan.len())?;
        let mut query = bind_fences(sqlx::query(AssertSqlSafe(sql.clone())), self.incarnation, self.fences)
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
