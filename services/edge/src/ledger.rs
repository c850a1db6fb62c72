//! What Postgres knows of a client: up to which `client_seq` its transactions were decided, and which of them failed.

use millstream_schemas::Code;
use millstream_schemas::frame::Confirmed;
use millstream_schemas::stream::{Failure, Loss, RunSpan};
use sqlx::Row;
use uuid::Uuid;

use crate::snapshot::{Snapshot, SnapshotError, query};

/// Most failures told at once; a client that has more asks again by connecting again.
const MAX_FAILURES: i64 = 1_000;
/// Most runs told at a welcome: the newest ones.
const MAX_RUNS: i64 = 1_000;

/// A client's ledger row.
#[derive(Debug, Default)]
pub struct Ledger {
    /// The user that the client id is bound to; none if it is new.
    pub user_id: Option<String>,
    /// Last `client_seq` taken into account.
    pub last_seq: u64,
    /// Failed transactions behind the `client_seq` that the client knows to be confirmed.
    pub failed: Vec<Failure>,
    /// Up to which `client_seq` those are all: less than `last_seq` if there are too many to tell at once.
    pub told_seq: u64,
    /// Transactions behind the `client_seq` that the client knows to be confirmed that lost to newer changes.
    pub lost: Vec<Loss>,
    /// Who submitted what is behind it, by rising `first_seq`.
    pub runs: Vec<RunSpan>,
}

impl Ledger {
    /// Whether there are too many failures to tell at once.
    pub fn is_cut(&self) -> bool {
        self.told_seq < self.last_seq
    }

    /// What the client is told once the stream has passed the snapshot that this was read from; none if it is new.
    pub fn confirmed(self) -> Option<Confirmed> {
        let client_seq = self.told_seq;
        let run_id = self.runs.iter().rev().find(|span| span.first_seq <= client_seq)?.run_id;
        let lost = self.lost.into_iter().filter(|loss| loss.client_seq <= client_seq).collect();
        Some(Confirmed { client_seq, run_id, failed: self.failed, lost })
    }
}

impl Snapshot {
    /// The client's ledger row, with the failures behind `confirmed_seq`.
    ///
    /// # Errors
    /// Postgres failed.
    pub async fn ledger(&mut self, client_id: Uuid, confirmed_seq: u64) -> Result<Ledger, SnapshotError> {
        // One row, known client or not.
        let known = sqlx::query(
            "SELECT $1::uuid AS asked, user_id, last_seq, lost::text AS lost
             FROM (SELECT) AS one LEFT JOIN millstream.clients ON client_id = $1",
        );
        let row = self.lease.one(known.bind(client_id)).await.map_err(query("read the ledger"))?;
        if row.try_get::<Uuid, _>("asked").ok() != Some(client_id) {
            return Err(SnapshotError::Foreign("the ledger"));
        }
        let Some(user_id) = row.try_get("user_id").map_err(query("read the ledger"))? else {
            return Ok(Ledger::default());
        };
        let failed = sqlx::query(
            "SELECT seq, change_id, code, rule, message FROM millstream.changes_history
             WHERE client_id = $1 AND seq > $2 ORDER BY seq LIMIT $3",
        )
        .bind(client_id)
        .bind(i64::try_from(confirmed_seq).unwrap_or(i64::MAX))
        .bind(MAX_FAILURES);
        let failed = self.lease.all(failed).await.map_err(query("read the client's failures"))?;
        let failure = |row: &sqlx::postgres::PgRow| Failure {
            client_seq: row.get::<i64, _>("seq").cast_unsigned(),
            change_id: row.get("change_id"),
            code: row.get::<&str, _>("code").parse().unwrap_or(Code::Internal),
            rule: row.get("rule"),
            message: row.get("message"),
        };
        let last_seq = row.get::<i64, _>("last_seq").cast_unsigned();
        let cut = failed.len() as i64 == MAX_FAILURES;
        let failed: Vec<Failure> = failed.iter().map(failure).collect();
        let told_seq = failed.last().filter(|_| cut).map_or(last_seq, |last| last.client_seq);
        let lost: Vec<Loss> = serde_json::from_str(row.get("lost")).unwrap_or_default();
        let lost = lost.into_iter().filter(|loss| loss.client_seq > confirmed_seq).collect();
        // The span that covers the first number behind it, and those after.
        let runs = sqlx::query(
            "SELECT instance, first_seq FROM (
                 SELECT instance, first_seq, lead(first_seq) OVER (ORDER BY first_seq) AS next
                 FROM millstream.instances WHERE client_id = $1) AS spans
             WHERE next IS NULL OR next > $2 + 1 ORDER BY first_seq DESC LIMIT $3",
        )
        .bind(client_id)
        .bind(i64::try_from(confirmed_seq).unwrap_or(i64::MAX).min(i64::MAX - 1))
        .bind(MAX_RUNS);
        let runs = self.lease.all(runs).await.map_err(query("read the client's runs"))?;
        let span = |row: &sqlx::postgres::PgRow| RunSpan {
            run_id: row.get("instance"),
            first_seq: row.get::<i64, _>("first_seq").cast_unsigned(),
        };
        let runs = runs.iter().rev().map(span).collect();
        Ok(Ledger { user_id: Some(user_id), last_seq, failed, told_seq, lost, runs })
    }
}
