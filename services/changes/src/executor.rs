//! One Postgres transaction a batch: fence, ledger, rows, ledger again, history, origin, COMMIT.
//!
//! The fence moves the positions of the batch's partitions and so locks their rows: whoever else believes to own one of
//! them waits, and then finds another position or epoch. What becomes of an error is decided by the caller, from
//! [`Failed`]; here everything is rolled back.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use millstream_runtime::telemetry;
use millstream_schemas::stream::{Failure, ORIGIN_PREFIX, OriginEntry, OriginRecord};
use millstream_schemas::{Code, Operation};
use sqlx::postgres::PgConnectOptions;
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, PgConnection, Row};
use uuid::Uuid;

use crate::batch::{Fence, Item, Mode, Owned};
use crate::error::{Fault, classify, is_drift, keeps_connection};
use crate::history::{self, Record};
use crate::ledger::Ledger;
use crate::model::{Model, ModelError};
use crate::plan::{Action, Condemned, Planned, depends_on_catalog, plan};
use crate::results::Results;
use crate::statement::{InputRow, Statements};
use crate::validator::{Rejection, Step, explain};

/// Limits of a worker's session. A statement has to end some time; a worker that hangs must not keep its locks.
const SESSION: [(&str, &str); 6] = [
    ("statement_timeout", "30s"),
    ("lock_timeout", "5s"),
    ("idle_in_transaction_session_timeout", "10s"),
    ("default_transaction_isolation", "read committed"),
    // Compiling costs more than these short statements.
    ("jit", "off"),
    // What triggers say for a person at a terminal has no reader here.
    ("client_min_messages", "error"),
];

/// Fence of all partitions, and the ledger of all clients, in one round trip. The two read the same snapshot: had
/// another owner changed the ledger meanwhile, it would have moved the position or the epoch too, and the fence fails.
const FENCE: &str = "\
WITH fenced AS (
    UPDATE millstream.partitions AS p SET position = f.new
    FROM unnest($2::smallint[], $3::bigint[], $4::bigint[], $5::bigint[]) AS f(partition, epoch, old, new)
    WHERE p.stream_epoch = $1 AND p.partition = f.partition AND p.epoch = f.epoch AND p.position = f.old
    RETURNING p.partition)
SELECT (SELECT count(*) FROM fenced) AS fenced, c.client_id, c.user_id, c.last_seq
FROM (SELECT) AS one LEFT JOIN millstream.clients c ON c.client_id = ANY ($6::uuid[])";

/// Ledger, history and origin in one round trip, the last before COMMIT. The ledger is compared and set, so that even
/// an owner under another stream epoch cannot take a transaction twice.
const SETTLE: &str = "\
WITH n AS (
    SELECT * FROM unnest($1::uuid[], $2::text[], $3::bigint[], $4::uuid[], $5::bigint[]) AS n(client_id, user_id, last_seq, instance, stored)),
known AS (
    UPDATE millstream.clients AS c SET last_seq = n.last_seq, instance = n.instance, last_seen = now()
    FROM n WHERE c.client_id = n.client_id AND c.last_seq = n.stored AND c.user_id = n.user_id
    RETURNING 1),
fresh AS (
    INSERT INTO millstream.clients (client_id, user_id, last_seq, instance)
    SELECT client_id, user_id, last_seq, instance FROM n WHERE stored IS NULL
    ON CONFLICT (client_id) DO NOTHING
    RETURNING 1),
failed AS (
    INSERT INTO millstream.changes_history
        (client_id, user_id, seq, attempt, change_id, table_name, key, operation, payload, code, rule, message, trace_id)
    SELECT client_id, user_id, seq, attempt, change_id, table_name, key, operation, payload, code, rule, message, trace_id
    FROM jsonb_to_recordset($6::jsonb) AS h(client_id uuid, user_id text, seq bigint, attempt int, change_id uuid,
        table_name text, key jsonb, operation text, payload jsonb, code text, rule text, message text, trace_id text)
    ON CONFLICT (client_id, seq) DO NOTHING)
SELECT (SELECT count(*) FROM known) + (SELECT count(*) FROM fresh) AS settled,
       pg_logical_emit_message(true, $7, $8)::text AS lsn";

const POSITIONS: &str = "\
SELECT partition, epoch, position FROM millstream.partitions
WHERE stream_epoch = $1 AND partition = ANY ($2) ORDER BY partition FOR UPDATE";

const RELEASE: &str = "\
UPDATE millstream.partitions SET owner = NULL, heartbeat = now()
WHERE stream_epoch = $1 AND partition = $2 AND epoch = $3";

/// Why a batch was not committed. Everything was rolled back, but for [`Failed::Unsure`].
#[derive(Debug)]
pub(crate) enum Failed {
    /// Another owner took a partition over, or a position is not the one in memory.
    Fenced,
    /// Something in the batch cannot be applied, or not together with the rest.
    Isolate(String),
    /// This transaction, alone in its batch, is refused by COMMIT.
    Condemned(Uuid, u64, Rejection),
    /// This transaction met an error that nobody understands.
    Strike(Uuid, u64, sqlx::Error),
    /// The backend went away while it applied the batch.
    Gone(sqlx::Error),
    /// Postgres cannot serve now.
    Server(sqlx::Error),
    /// The catalog cannot be read now.
    Model(ModelError),
    /// The catalog is old and a refusal depends on it; it will be read again.
    Stale,
    /// The ledger was moved by somebody else.
    Ledger,
    /// Nobody knows whether COMMIT happened. The results hold if it did.
    Unsure(Results, sqlx::Error),
}

/// A worker's connection and what it knows.
pub(crate) struct Executor {
    options: PgConnectOptions,
    config: PathBuf,
    stream_epoch: String,
    connection: Option<PgConnection>,
    model: Option<Model>,
}

impl Executor {
    /// Connects when first used.
    pub fn new(options: PgConnectOptions, config: PathBuf, stream_epoch: String) -> Self {
        Executor { options: options.options(SESSION), config, stream_epoch, connection: None, model: None }
    }

    async fn connect(&mut self) -> Result<&mut PgConnection, sqlx::Error> {
        let connection = match self.connection.take() {
            Some(connection) => connection,
            None => self.options.connect().await?,
        };
        Ok(self.connection.insert(connection))
    }

    /// Applies a batch and commits it.
    pub async fn execute(
        &mut self,
        items: &[Item],
        fences: &[Fence],
        mode: Mode,
        condemned: &Condemned,
    ) -> Result<Results, Failed> {
        let (config, stream_epoch) = (self.config.clone(), self.stream_epoch.clone());
        let mut model = self.model.take();
        let connection = self.connect().await.map_err(Failed::Server)?;
        let mut current = match model.take() {
            Some(model) => model,
            None => Model::load(connection, &config).await.map_err(Failed::Model)?,
        };
        let transaction = Transaction { connection, items, fences, mode, condemned };
        let outcome = transaction.run(&mut current, &stream_epoch).await;
        let (keep_model, keep_connection) = match &outcome {
            Ok(_) | Err(Failed::Fenced | Failed::Condemned(..) | Failed::Ledger) => (true, true),
            // Drift shows as an error of a statement, whichever way it is treated.
            Err(Failed::Isolate(_)) => (true, true),
            Err(Failed::Stale | Failed::Model(_)) => (false, true),
            Err(Failed::Strike(_, _, error)) => (!is_drift(error), keeps_connection(error)),
            Err(Failed::Server(error)) => (true, keeps_connection(error)),
            Err(Failed::Gone(_) | Failed::Unsure(..)) => (true, false),
        };
        self.model = Some(current).filter(|_| keep_model);
        if outcome.is_err() && !(keep_connection && self.rollback().await) {
            self.connection = None;
        }
        outcome
    }

    async fn rollback(&mut self) -> bool {
        match &mut self.connection {
            Some(connection) => sqlx::raw_sql("ROLLBACK").execute(connection).await.is_ok(),
            None => false,
        }
    }

    /// What Postgres holds of partitions. Waits for a transaction of a lost connection to end, by its row locks.
    pub async fn positions(&mut self, partitions: &[u16]) -> Result<BTreeMap<u16, Owned>, sqlx::Error> {
        let stream_epoch = self.stream_epoch.clone();
        let partitions: Vec<i16> = partitions.iter().map(|partition| *partition as i16).collect();
        let connection = self.connect().await?;
        let read = sqlx::query(POSITIONS).bind(stream_epoch).bind(partitions).fetch_all(connection).await;
        let rows = self.checked(read)?;
        rows.iter()
            .map(|row| {
                let partition: i16 = row.try_get("partition")?;
                let position: i64 = row.try_get("position")?;
                Ok((partition as u16, Owned { epoch: row.try_get("epoch")?, position: position as u64 }))
            })
            .collect()
    }

    /// Gives a partition up, unless somebody took it over already.
    pub async fn release(&mut self, partition: u16, epoch: i64) -> Result<(), sqlx::Error> {
        let stream_epoch = self.stream_epoch.clone();
        let connection = self.connect().await?;
        let release =
            sqlx::query(RELEASE).bind(stream_epoch).bind(partition as i16).bind(epoch).execute(connection).await;
        self.checked(release).map(drop)
    }

    /// Drops the connection if it cannot be used after this error.
    fn checked<T>(&mut self, result: Result<T, sqlx::Error>) -> Result<T, sqlx::Error> {
        if result.as_ref().is_err_and(|error| !keeps_connection(error)) {
            self.connection = None;
        }
        result
    }

    /// Ends the connection.
    pub async fn close(&mut self) {
        if let Some(connection) = self.connection.take() {
            let _ = connection.close().await;
        }
    }
}

struct Transaction<'a> {
    connection: &'a mut PgConnection,
    items: &'a [Item],
    fences: &'a [Fence],
    mode: Mode,
    condemned: &'a Condemned,
}

impl<'a> Transaction<'a> {
    async fn run(mut self, model: &mut Model, stream_epoch: &str) -> Result<Results, Failed> {
        sqlx::raw_sql("BEGIN").execute(&mut *self.connection).await.map_err(Failed::Server)?;
        let mut ledger = self.fence(stream_epoch).await?;
        let fresh = model.is_fresh();
        let Model { catalog, statements, .. } = model;
        let items: &'a [Item] = self.items;
        let submissions = items.iter().filter_map(|item| item.submission.as_ref());
        let mut plan = plan(submissions, &mut ledger, |name| catalog.table(name), self.condemned);
        if !fresh && depends_on_catalog(&plan) {
            return Err(Failed::Stale);
        }
        let spans: Vec<tracing::Span> = plan.iter().map(span).collect();
        match self.mode {
            Mode::Fast => self.apply_runs(&plan, statements).await?,
            Mode::Savepoints | Mode::Single => self.apply_each(&mut plan, statements).await?,
        }
        let mut results = Results::default();
        let repeated: Vec<(Uuid, u64)> = plan
            .iter()
            .filter(|planned| matches!(planned.action, Action::Repeat))
            .map(|planned| (planned.submission.client_id, planned.submission.seq))
            .collect();
        for planned in &plan {
            if let Some(result) = planned.result() {
                results.push(planned.submission.client_id, result);
            }
        }
        if !repeated.is_empty() {
            let known = history::known(self.connection, &repeated).await.map_err(Failed::Server)?;
            // Results of this batch come first, so a repetition within it does not hide its rejection.
            known.into_iter().for_each(|(client_id, result)| results.push(client_id, result));
        }
        let last = plan.iter().zip(&spans).rev().find(|(planned, _)| planned.result().is_some());
        let traceparent = last.and_then(|(planned, span)| {
            span.in_scope(telemetry::traceparent).or_else(|| planned.submission.traceparent.clone())
        });
        self.settle(&plan, &ledger, traceparent).await?;
        self.commit(&plan, results).await
    }

    async fn fence(&mut self, stream_epoch: &str) -> Result<Ledger, Failed> {
        let column = |value: fn(&Fence) -> i64| self.fences.iter().map(value).collect::<Vec<i64>>();
        let partitions: Vec<i16> = self.fences.iter().map(|fence| fence.partition as i16).collect();
        let clients: Vec<Uuid> = self
            .items
            .iter()
            .filter_map(|item| item.submission.as_ref())
            .map(|submission| submission.client_id)
            .collect();
        let rows = sqlx::query(FENCE)
            .bind(stream_epoch)
            .bind(partitions)
            .bind(column(|fence| fence.epoch))
            .bind(column(|fence| fence.old as i64))
            .bind(column(|fence| fence.new as i64))
            .bind(clients)
            .fetch_all(&mut *self.connection)
            .await
            .map_err(Failed::Server)?;
        let mut ledger = Ledger::default();
        for row in &rows {
            let fenced: i64 = row.try_get("fenced").map_err(Failed::Server)?;
            if fenced != self.fences.len() as i64 {
                return Err(Failed::Fenced);
            }
            if let Some(client_id) = row.try_get::<Option<Uuid>, _>("client_id").map_err(Failed::Server)? {
                let last: i64 = row.try_get("last_seq").map_err(Failed::Server)?;
                ledger.load(client_id, row.try_get("user_id").map_err(Failed::Server)?, last as u64);
            }
        }
        Ok(ledger)
    }

    /// Set-wise, all or nothing.
    async fn apply_runs(&mut self, plan: &[Planned<'_>], statements: &mut Statements) -> Result<(), Failed> {
        let steps = plan.iter().flat_map(|planned| {
            let steps: &[Step<'_>] = if let Action::Apply(steps) = &planned.action { steps } else { &[] };
            steps.iter().map(|step| (step, planned.submission.user_id.as_str(), planned.submission.client_id))
        });
        for run in statements.runs(steps) {
            match self.write(run.statement.sql.clone(), &run.rows).await {
                Ok(affected) if affected == run.rows.len() as u64 => {}
                Ok(affected) => {
                    return Err(Failed::Isolate(format!("{affected} of {} rows were affected", run.rows.len())));
                }
                Err(error) => {
                    return Err(match classify(&error) {
                        Fault::Server => Failed::Server(error),
                        Fault::Gone => Failed::Gone(error),
                        Fault::Verdict(code, _) => Failed::Isolate(code.to_string()),
                        Fault::Unknown => Failed::Isolate(error.to_string()),
                    });
                }
            }
        }
        Ok(())
    }

    /// One change at a time, each transaction in a savepoint; what fails becomes a rejection.
    async fn apply_each(&mut self, plan: &mut [Planned<'_>], statements: &mut Statements) -> Result<(), Failed> {
        for planned in plan {
            let submission = planned.submission;
            let Action::Apply(steps) = &planned.action else { continue };
            let strike = |error| Failed::Strike(submission.client_id, submission.seq, error);
            self.raw("SAVEPOINT change").await?;
            let mut rejection = None;
            for (index, step) in steps.iter().enumerate() {
                let refused = match self.apply_one(step, &submission.user_id, submission.client_id, statements).await {
                    Ok(refused) => refused,
                    Err(error) => match classify(&error) {
                        Fault::Verdict(code, message) => Some((code, message)),
                        Fault::Server => return Err(Failed::Server(error)),
                        Fault::Gone | Fault::Unknown => return Err(strike(error)),
                    },
                };
                if let Some((code, message)) = refused {
                    rejection = Some(Rejection { index, change_id: step.change_id, code, rule: None, message });
                    break;
                }
            }
            match rejection {
                None => self.raw("RELEASE SAVEPOINT change").await?,
                Some(rejection) => {
                    self.raw("ROLLBACK TO SAVEPOINT change; RELEASE SAVEPOINT change").await?;
                    planned.action = Action::Reject(rejection);
                }
            }
        }
        Ok(())
    }

    async fn apply_one(
        &mut self,
        step: &Step<'_>,
        user_id: &str,
        client_id: Uuid,
        statements: &mut Statements,
    ) -> Result<Option<(Code, String)>, sqlx::Error> {
        let statement = statements.of(step);
        let rows = [InputRow::new(step, user_id, client_id)];
        if self.write(statement.sql.clone(), &rows).await? > 0 {
            return Ok(None);
        }
        let exists = step.op != Operation::Insert && {
            let count: i64 = sqlx::query_scalar(AssertSqlSafe(statement.count_sql.clone()))
                .bind(encode(&rows)?)
                .fetch_one(&mut *self.connection)
                .await?;
            count > 0
        };
        Ok(Some(explain(step.table, step.op, exists)))
    }

    async fn write(&mut self, sql: std::sync::Arc<str>, rows: &[InputRow<'_>]) -> Result<u64, sqlx::Error> {
        // The text is made of the catalog's names and the operator's rules; values are bound.
        let done = sqlx::query(AssertSqlSafe(sql)).bind(encode(rows)?).execute(&mut *self.connection).await?;
        Ok(done.rows_affected())
    }

    async fn raw(&mut self, sql: &'static str) -> Result<(), Failed> {
        sqlx::raw_sql(sql).execute(&mut *self.connection).await.map(drop).map_err(Failed::Server)
    }

    async fn settle(
        &mut self,
        plan: &[Planned<'_>],
        ledger: &Ledger,
        traceparent: Option<String>,
    ) -> Result<(), Failed> {
        let mut failures: HashMap<Uuid, Vec<Failure>> = HashMap::new();
        let mut records = Vec::new();
        for planned in plan {
            let Action::Reject(rejection) = &planned.action else { continue };
            records.push(Record::new(planned.submission, rejection).map_err(unencodable).map_err(Failed::Server)?);
            if let Some(failure) = planned.result().and_then(|result| result.failure) {
                failures.entry(planned.submission.client_id).or_default().push(failure);
            }
        }
        let changed: Vec<_> = ledger.changed().collect();
        if changed.is_empty() {
            return Ok(());
        }
        let origin = OriginRecord {
            clients: changed
                .iter()
                .map(|(id, client)| OriginEntry {
                    client_id: *id,
                    seq: client.last,
                    instance: client.instance,
                    lost: Vec::new(),
                    failed: failures.remove(id).unwrap_or_default(),
                })
                .collect(),
            traceparent,
        };
        let row = sqlx::query(SETTLE)
            .bind(changed.iter().map(|(id, _)| *id).collect::<Vec<_>>())
            .bind(changed.iter().map(|(_, client)| client.user_id.clone()).collect::<Vec<_>>())
            .bind(changed.iter().map(|(_, client)| client.last as i64).collect::<Vec<_>>())
            .bind(changed.iter().map(|(_, client)| client.instance).collect::<Vec<_>>())
            .bind(changed.iter().map(|(_, client)| client.stored.map(|stored| stored as i64)).collect::<Vec<_>>())
            .bind(encode(&records).map_err(Failed::Server)?)
            .bind(ORIGIN_PREFIX)
            .bind(encode(&origin).map_err(Failed::Server)?)
            .fetch_one(&mut *self.connection)
            .await
            .map_err(Failed::Server)?;
        let settled: i64 = row.try_get("settled").map_err(Failed::Server)?;
        if settled == changed.len() as i64 { Ok(()) } else { Err(Failed::Ledger) }
    }

    async fn commit(self, plan: &[Planned<'_>], results: Results) -> Result<Results, Failed> {
        let Err(error) = sqlx::raw_sql("COMMIT").execute(&mut *self.connection).await else {
            return Ok(results);
        };
        if !keeps_connection(&error) {
            return Err(Failed::Unsure(results, error));
        }
        // Postgres said no: a deferred constraint, most likely. It names no change, so the transaction has to be alone.
        let alone = match (self.mode, plan) {
            (Mode::Single, [planned]) => Some(planned),
            _ => None,
        };
        Err(match (classify(&error), alone) {
            (Fault::Server | Fault::Gone, _) => Failed::Server(error),
            (Fault::Verdict(code, message), Some(planned)) => {
                let submission = planned.submission;
                let index = submission.changes.len().saturating_sub(1);
                let change_id = submission.changes.last().map(|change| change.change_id).unwrap_or_default();
                Failed::Condemned(
                    submission.client_id,
                    submission.seq,
                    Rejection { index, change_id, code, rule: None, message },
                )
            }
            (Fault::Unknown, Some(planned)) => {
                Failed::Strike(planned.submission.client_id, planned.submission.seq, error)
            }
            (Fault::Verdict(..) | Fault::Unknown, None) => Failed::Isolate(error.to_string()),
        })
    }
}

/// The span of a submission, within the trace that its client began.
fn span(planned: &Planned<'_>) -> tracing::Span {
    if planned.result().is_none() {
        return tracing::Span::none();
    }
    let submission = planned.submission;
    let span = tracing::info_span!(
        "apply",
        client.id = %submission.client_id,
        client.seq = submission.seq,
        changes = submission.changes.len(),
    );
    telemetry::set_parent(&span, submission.traceparent.as_deref());
    span
}

fn encode<T: serde::Serialize + ?Sized>(value: &T) -> Result<String, sqlx::Error> {
    serde_json::to_string(value).map_err(unencodable)
}

fn unencodable(error: serde_json::Error) -> sqlx::Error {
    sqlx::Error::Encode(Box::new(error))
}
