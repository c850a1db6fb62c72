//! A batch within one Postgres transaction: fence, ledger, rows, ledger again, history, origin, COMMIT.

use millstream_runtime::telemetry;
use sqlx::PgConnection;
use uuid::Uuid;

use crate::decide::plan::{
    Action, Condemned, Planned, Rejected, depends_on_catalog, name_set_aside, plan, predecessors,
};
use crate::decide::results::Results;
use crate::decide::validator::Rejection;
use crate::error::{Fault, classify, keeps_connection};
use crate::item::{Item, Mode, PositionMove};
use crate::sql::model::{ConfigFile, Fingerprint, Model};
use crate::transaction::apply::Applier;
use crate::transaction::failed::Failed;
use crate::transaction::memory::Memory;
use crate::transaction::{history, settle};

/// Begins a transaction; one that a batch has to itself waits for no lock that is held for longer than others take.
const BEGIN: &str = "BEGIN";
const BEGIN_SINGLE: &str = "BEGIN; SET LOCAL lock_timeout = '50ms'";
const BEGIN_SINGLE_BRIEF: &str = "BEGIN; SET LOCAL lock_timeout = '50ms'; SET LOCAL statement_timeout = '500ms'";

/// A batch and its connection.
pub(crate) struct Transaction<'a> {
    pub connection: &'a mut PgConnection,
    pub source: &'a ConfigFile,
    pub incarnation: &'a str,
    pub items: &'a [Item],
    pub fences: &'a [PositionMove],
    pub mode: Mode,
    pub condemned: &'a Condemned,
    pub brief: bool,
    /// See [`spans`]; one a submission, made by the first attempt.
    pub spans: Option<Vec<tracing::Span>>,
}

impl<'a> Transaction<'a> {
    /// Applies the batch and commits it, by BEGIN and COMMIT.
    pub async fn run(mut self, model: &mut Model, memory: &mut Memory) -> Result<Results, Failed> {
        let begin = match (self.mode, self.brief) {
            (Mode::Single, true) => BEGIN_SINGLE_BRIEF,
            (Mode::Single, false) => BEGIN_SINGLE,
            (Mode::Fast | Mode::Careful | Mode::Savepoints, _) => BEGIN,
        };
        sqlx::raw_sql(begin).execute(&mut *self.connection).await.map_err(Failed::Server)?;
        let (mut ledger, now) = settle::fence(self.connection, self.incarnation, self.items, self.fences).await?;
        let Model { catalog, statements, combined, origin } = model;
        let items: &'a [Item] = self.items;
        let submissions = || items.iter().filter_map(|item| item.submission.as_ref());
        let mut rejected = Rejected::default();
        let named = predecessors(submissions(), &ledger);
        if !named.is_empty() {
            rejected.0 = history::rejected(self.connection, &named).await.map_err(Failed::Server)?;
        }
        let mut plan = plan(submissions(), &mut ledger, |name| catalog.table(name), self.condemned, &mut rejected);
        let mut current = false;
        if depends_on_catalog(&plan) {
            self.ensure_current(origin).await?;
            current = true;
            name_set_aside(&mut plan, &catalog.aside);
        }
        let spans = self.spans.take().unwrap_or_else(|| spans(&plan));
        let mut applier = Applier::new(self.connection, statements, combined, now);
        match self.mode {
            Mode::Fast | Mode::Careful => {
                applier.set_wise(&mut plan, &mut rejected, self.mode == Mode::Careful).await?;
            }
            Mode::Savepoints | Mode::Single => applier.one_by_one(&mut plan, &mut rejected).await?,
        }
        let met_error = applier.met_error();
        if !current && depends_on_catalog(&plan) {
            self.ensure_current(origin).await?;
        }
        let mut results = Results::default();
        let repeated: Vec<(Uuid, u64)> = plan
            .iter()
            .filter(|planned| matches!(planned.action, Action::Repeat))
            .map(|planned| (planned.submission.client_id, planned.submission.client_seq))
            .collect();
        results.extend(&plan);
        results.met_error = met_error;
        if !repeated.is_empty() {
            let known = history::known(self.connection, &repeated).await.map_err(Failed::Server)?;
            // Results of this batch come first, so a repetition within it does not hide its rejection.
            known.into_iter().for_each(|(client_id, result)| results.push(client_id, result));
        }
        settle::settle(self.connection, &plan, &ledger, traceparent(&plan, &spans)).await?;
        let committed = self.commit(&plan, results).await;
        if committed.is_ok() {
            memory.keep(ledger, Some(now));
        }
        committed
    }

    /// A refusal must not be due to a catalog that is behind the database.
    async fn ensure_current(&mut self, origin: &Fingerprint) -> Result<(), Failed> {
        match origin.is_current(self.connection, self.source).await {
            Ok(true) => Ok(()),
            Ok(false) => Err(Failed::Stale),
            Err(error) => Err(Failed::Server(error)),
        }
    }

    async fn commit(self, plan: &[Planned<'_>], results: Results) -> Result<Results, Failed> {
        let Err(error) = sqlx::raw_sql("COMMIT").execute(&mut *self.connection).await else {
            plan.iter().for_each(Planned::log_losses);
            return Ok(results);
        };
        if !keeps_connection(&error) {
            return Err(Failed::Unsure(results, error));
        }
        // Postgres said no: a deferred constraint, most likely. It names no change, so the transaction has to be alone.
        let alone = if let [planned] = plan { Some(planned) } else { None };
        Err(match (classify(&error), alone) {
            (Fault::Server | Fault::Gone, _) => Failed::at_work(error),
            (Fault::Verdict(refusal), Some(planned)) => {
                let submission = planned.submission;
                let rejection = Rejection::new(submission, submission.changes.len().saturating_sub(1), refusal);
                Failed::Condemned(submission.client_id, submission.client_seq, rejection)
            }
            (Fault::Unknown, Some(planned)) => {
                Failed::Strike(planned.submission.client_id, planned.submission.client_seq, error)
            }
            (Fault::Verdict(_) | Fault::Unknown, None) => Failed::Isolate { why: error.to_string(), at: None },
        })
    }
}

/// The spans of submissions, each within the trace that its client began.
pub(crate) fn spans(plan: &[Planned<'_>]) -> Vec<tracing::Span> {
    plan.iter().map(span).collect()
}

/// The trace that the batch's origin names: that of the last one that was taken.
pub(crate) fn traceparent(plan: &[Planned<'_>], spans: &[tracing::Span]) -> Option<String> {
    let (planned, span) = plan.iter().zip(spans).rev().find(|(planned, _)| planned.result().is_some())?;
    span.in_scope(telemetry::traceparent).or_else(|| planned.submission.traceparent.clone())
}

fn span(planned: &Planned<'_>) -> tracing::Span {
    if planned.result().is_none() {
        return tracing::Span::none();
    }
    let submission = planned.submission;
    let span = tracing::info_span!(
        "apply",
        client.id = %submission.client_id,
        client.seq = submission.client_seq,
        changes = submission.changes.len(),
    );
    telemetry::set_parent(&span, submission.traceparent.as_deref());
    span
}
