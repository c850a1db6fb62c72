//! External validators: programs in any language that are asked about a transaction before it is applied, by request
//! and reply over core NATS on `ms.validate.{table}`.
//!
//! Only a well-formed answer is a verdict. Silence, garbage and answers over the limits are faults of the server: the
//! transaction waits and is asked about again. Validators see changes, not the rows that result: what depends on other
//! rows belongs into the database's own constraints or into declared rules.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_nats::RequestErrorKind;
use millstream_catalog::{Config, InsertExisting};
use millstream_runtime::error::chain;
use millstream_runtime::health::Health;
use millstream_runtime::telemetry;
use millstream_schemas::stream::{
    MAX_FAILURE_MESSAGE_BYTES, MAX_RULE_BYTES, Submission, ValidateRequest, ValidateResponse,
};
use millstream_schemas::{Code, Operation, subject};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tracing::Instrument;

use crate::decide::validator::Rejection;
use crate::item::Item;
use crate::worker::gate::{Answer, Gate, Question};

/// Most questions under way a table, over all workers of the process.
const MAX_QUESTIONS: usize = 64;
/// A table's silence is told of at most this often.
const WARN_EVERY: Duration = Duration::from_secs(30);

/// Why there is no verdict.
#[derive(Debug, thiserror::Error)]
enum NoAnswer {
    #[error("no validator listens on {0}")]
    NoResponders(String),
    #[error("no answer within {0:?}")]
    Deadline(Duration),
    #[error("the request failed")]
    Request(#[source] async_nats::RequestError),
    #[error("the request cannot be encoded")]
    Encode(#[source] serde_json::Error),
    #[error("the service shuts down")]
    Closed,
    /// The text of a decoding error could quote values; its place says enough.
    #[error("the answer cannot be decoded, from line {line}, column {column} on")]
    Undecodable { line: usize, column: usize },
    #[error("the answer's {0}")]
    Invalid(&'static str),
}

/// A table's validators.
struct TableValidators {
    on: Vec<Operation>,
    deadline: Duration,
    room: Semaphore,
    warned: Mutex<Option<Instant>>,
}

/// The validators of all tables; shared by the workers.
pub(crate) struct External {
    /// None: nobody is asked.
    client: Option<async_nats::Client>,
    health: Health,
    tables: HashMap<String, TableValidators>,
}

impl External {
    /// As the configuration declares.
    pub fn new(config: &Config, client: async_nats::Client, health: Health) -> Self {
        let tables = config.tables.iter().filter_map(|(name, table)| {
            let validate = table.validate.as_ref()?;
            let mut on = validate.on.clone();
            // Where the row is there already, an insert is an update.
            let merges = table.insert_existing == InsertExisting::Merge && table.write.update.is_some();
            if merges && on.contains(&Operation::Update) && !on.contains(&Operation::Insert) {
                on.push(Operation::Insert);
            }
            let table = TableValidators {
                on,
                deadline: Duration::from_millis(validate.deadline_ms),
                room: Semaphore::new(MAX_QUESTIONS),
                warned: Mutex::new(None),
            };
            Some((name.clone(), table))
        });
        External { client: Some(client), health, tables: tables.collect() }
    }

    /// Asks nobody about anything.
    pub fn nobody(health: Health) -> Self {
        External { client: None, health, tables: HashMap::new() }
    }

    /// Whether validators have a say in a transaction.
    pub fn concerns(&self, submission: &Submission) -> bool {
        !self.tables.is_empty() && submission.changes.iter().any(|change| self.asks(&change.table, change.op))
    }

    fn asks(&self, table: &str, op: Operation) -> bool {
        self.tables.get(table).is_some_and(|table| table.on.contains(&op))
    }

    /// One request for each table that the transaction changes in a way that validators are asked about; with all of
    /// its changes to that table, so that they see the whole.
    fn requests(&self, submission: &Submission) -> Vec<(String, ValidateRequest)> {
        let mut requests: Vec<(String, ValidateRequest)> = Vec::new();
        for change in &submission.changes {
            if self.asks(&change.table, change.op) && !requests.iter().any(|(table, _)| *table == change.table) {
                let request = ValidateRequest {
                    user_id: submission.user_id.clone(),
                    client_id: submission.client_id,
                    client_seq: submission.client_seq,
                    attempt: submission.attempt,
                    changes: submission.changes.iter().filter(|other| other.table == change.table).cloned().collect(),
                    traceparent: submission.traceparent.clone(),
                };
                requests.push((change.table.clone(), request));
            }
        }
        requests
    }

    /// Asks all validators of a transaction; none if one of them gave no verdict.
    async fn ask(&self, requests: Vec<(String, ValidateRequest)>) -> Option<Vec<Refusal>> {
        let answers = requests.into_iter().map(|(name, request)| self.ask_table(name, request));
        let answers = futures_util::future::join_all(answers).await;
        answers.into_iter().collect::<Option<Vec<_>>>().map(|answers| answers.into_iter().flatten().collect())
    }

    /// The refusal of one table's validators, if they refuse; none at the outside if they do not say.
    async fn ask_table(&self, name: String, mut request: ValidateRequest) -> Option<Option<Refusal>> {
        let table = self.tables.get(&name)?;
        let span = tracing::info_span!("validate", table = name, client.id = %request.client_id, client.seq = request.client_seq);
        telemetry::set_parent(&span, request.traceparent.as_deref());
        request.traceparent = span.in_scope(telemetry::traceparent).or(request.traceparent);
        match self.exchange(&name, table, &request).instrument(span).await {
            Ok(answer) => {
                self.health.set_note(&format!("validators of {name}"), None);
                Some(answer)
            }
            Err(why) => {
                self.silent(&name, table, &request, &why);
                None
            }
        }
    }

    async fn exchange(
        &self,
        name: &str,
        table: &TableValidators,
        request: &ValidateRequest,
    ) -> Result<Option<Refusal>, NoAnswer> {
        let payload = serde_json::to_vec(request).map_err(NoAnswer::Encode)?;
        let _room = table.room.acquire().await.map_err(|_| NoAnswer::Closed)?;
        let subject = subject::validate(name);
        // The deadline is for all of it, also for a broker that is away.
        let sent = async_nats::Request::new().payload(payload.into()).timeout(None);
        let client = self.client.as_ref().ok_or(NoAnswer::Closed)?;
        let exchange = client.send_request(subject.clone(), sent);
        let reply = match tokio::time::timeout(table.deadline, exchange).await {
            Ok(Ok(reply)) => reply,
            Ok(Err(error)) if error.kind() == RequestErrorKind::NoResponders => {
                return Err(NoAnswer::NoResponders(subject));
            }
            Ok(Err(error)) => return Err(NoAnswer::Request(error)),
            Err(_) => return Err(NoAnswer::Deadline(table.deadline)),
        };
        refusal(&reply.payload, request)
    }

    /// Tells of a table whose validators give no verdict, but not at every question.
    fn silent(&self, name: &str, table: &TableValidators, request: &ValidateRequest, why: &NoAnswer) {
        self.health.set_note(&format!("validators of {name}"), Some("no verdict"));
        let mut warned = table.warned.lock().unwrap_or_else(PoisonError::into_inner);
        if warned.is_none_or(|at| at.elapsed() >= WARN_EVERY) {
            *warned = Some(Instant::now());
            tracing::warn!(
                table = name,
                client.id = %request.client_id,
                client.seq = request.client_seq,
                error = chain(why),
                "validators give no verdict; changes wait, in their order, and are asked about again"
            );
        }
    }
}

/// A validator's no.
#[derive(Debug, PartialEq, Eq)]
struct Refusal {
    change_id: uuid::Uuid,
    code: String,
    message: String,
}

/// Reads an answer.
fn refusal(payload: &[u8], request: &ValidateRequest) -> Result<Option<Refusal>, NoAnswer> {
    let answer = serde_json::from_slice(payload)
        .map_err(|error| NoAnswer::Undecodable { line: error.line(), column: error.column() })?;
    let (change_id, code, message) = match answer {
        ValidateResponse::Ok => return Ok(None),
        ValidateResponse::Reject { change_id, code, message } => (change_id, code, message),
    };
    if code.is_empty() || code.len() > MAX_RULE_BYTES {
        return Err(NoAnswer::Invalid("code is empty or too long"));
    }
    if message.len() > MAX_FAILURE_MESSAGE_BYTES {
        return Err(NoAnswer::Invalid("message is too long"));
    }
    // Postgres' text cannot hold it.
    if code.contains('\0') || message.contains('\0') {
        return Err(NoAnswer::Invalid("text contains U+0000"));
    }
    let asked = |id: &uuid::Uuid| request.changes.iter().any(|change| change.change_id == *id);
    let change_id = match change_id {
        Some(id) if asked(&id) => id,
        Some(_) => return Err(NoAnswer::Invalid("change is not one that was asked about")),
        None => request.changes.first().map(|change| change.change_id).unwrap_or_default(),
    };
    Ok(Some(Refusal { change_id, code, message }))
}

/// The verdict on the transaction: of several refusals, the one of the earliest change.
fn verdict(submission: &Submission, refusals: Vec<Refusal>) -> Answer {
    let place = |id| submission.changes.iter().position(|change| change.change_id == id).unwrap_or(0);
    let first = refusals.into_iter().min_by_key(|refusal| place(refusal.change_id))?;
    Some(Rejection {
        index: place(first.change_id),
        change_id: first.change_id,
        code: Code::BusinessRule,
        rule: Some(first.code),
        message: first.message,
    })
}

/// The verdict on a transaction by one answer alone, for [`crate::for_simulation`].
pub(crate) fn answer(payload: &[u8], request: &ValidateRequest, submission: &Submission) -> Result<Answer, String> {
    let refusal = refusal(payload, request).map_err(|why| why.to_string())?;
    Ok(verdict(submission, refusal.into_iter().collect()))
}

/// A worker's questions: the [`Gate`] with what is under way.
pub(crate) struct Questions {
    external: Arc<External>,
    pub gate: Gate,
    under_way: JoinSet<(u16, Question, Option<Answer>)>,
}

impl Questions {
    pub fn new(external: Arc<External>) -> Self {
        Questions { external, gate: Gate::default(), under_way: JoinSet::new() }
    }

    /// Takes an item in; gives it back if it need not wait.
    pub fn push(&mut self, item: Item) -> Option<Item> {
        let asks = item.submission.as_ref().is_some_and(|submission| self.external.concerns(submission));
        self.gate.push(item, asks)
    }

    /// Takes the answers that are there, hands on what waits no more, and asks what is to be asked.
    pub fn proceed(&mut self, out: impl FnMut(Item, Answer)) {
        while let Some(Ok((partition, key, answer))) = self.under_way.try_join_next() {
            self.gate.answered(partition, key, answer, Instant::now());
        }
        self.gate.release(out);
        let (external, under_way) = (&self.external, &mut self.under_way);
        self.gate.ask(Instant::now(), |partition, key, submission| {
            let (external, submission) = (external.clone(), submission.clone());
            under_way.spawn(async move {
                let refusals = external.ask(external.requests(&submission)).await;
                (partition, key, refusals.map(|refusals| verdict(&submission, refusals)))
            });
        });
    }

    /// Resolves when [`Questions::proceed`] has something to do. Can be dropped and called again.
    pub async fn ready(&mut self) {
        let again = self.gate.next();
        tokio::select! {
            Some(done) = self.under_way.join_next(), if !self.under_way.is_empty() => {
                if let Ok((partition, key, answer)) = done {
                    self.gate.answered(partition, key, answer, Instant::now());
                }
            }
            () = tokio::time::sleep_until(again.unwrap_or_else(Instant::now)), if again.is_some() => {}
            else => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::decide::validator::tests::change;

    fn request() -> ValidateRequest {
        let mut changes = vec![change(Operation::Delete, "1", &[]), change(Operation::Delete, "2", &[])];
        changes[1].change_id = Uuid::from_u128(8);
        let client_id = Uuid::nil();
        ValidateRequest { user_id: "u".into(), client_id, client_seq: 1, attempt: 1, changes, traceparent: None }
    }

    fn check(answer: &str, expected: Result<Option<u128>, &str>) {
        let found = refusal(answer.as_bytes(), &request())
            .map(|refusal| refusal.map(|refusal| refusal.change_id.as_u128()))
            .map_err(|error| error.to_string());
        match (&found, expected) {
            (Ok(found), Ok(expected)) if *found == expected => {}
            (Err(found), Err(expected)) if found.contains(expected) => {}
            (found, expected) => panic!("{answer:.100}: {found:?} instead of {expected:?}"),
        }
    }

    #[test]
    fn only_a_well_formed_answer_is_a_verdict() {
        let reject = |code: usize, message: usize| {
            let (code, message) = ("c".repeat(code), "m".repeat(message));
            format!(r#"{{"verdict": "reject", "code": "{code}", "message": "{message}"}}"#)
        };
        check(r#"{"verdict": "ok"}"#, Ok(None));
        check(&reject(1, 0), Ok(Some(7)));
        check(&reject(MAX_RULE_BYTES, MAX_FAILURE_MESSAGE_BYTES), Ok(Some(7)));
        check(&reject(MAX_RULE_BYTES + 1, 1), Err("code"));
        check(&reject(0, 1), Err("code"));
        check(&reject(1, MAX_FAILURE_MESSAGE_BYTES + 1), Err("message"));
        check(r#"{"verdict": "reject", "code": "a\u0000", "message": "m"}"#, Err("U+0000"));
        let named = |id: u128| {
            format!(r#"{{"verdict": "reject", "change_id": "{}", "code": "c", "message": "m"}}"#, Uuid::from_u128(id))
        };
        check(&named(8), Ok(Some(8)));
        check(&named(9), Err("not one that was asked about"));
        for garbage in ["", "ok", "{}", r#"{"verdict": "maybe"}"#, r#"{"verdict": "reject"}"#, "\u{1}"] {
            check(garbage, Err("decoded"));
        }
    }

    #[test]
    fn the_refusal_of_the_earliest_change_counts() {
        let submission = Submission {
            client_id: Uuid::nil(),
            user_id: "u".into(),
            client_seq: 1,
            attempt: 1,
            run_id: Uuid::nil(),
            previous: None,
            after: Vec::new(),
            changes: request().changes,
            traceparent: None,
        };
        let refusal =
            |id, code: &str| Refusal { change_id: Uuid::from_u128(id), code: code.into(), message: "m".into() };
        assert_eq!(verdict(&submission, vec![]), None);
        let rejection = verdict(&submission, vec![refusal(8, "later"), refusal(7, "earlier")]).unwrap();
        assert_eq!(
            (rejection.index, rejection.code, rejection.rule.as_deref()),
            (0, Code::BusinessRule, Some("earlier"))
        );
        assert_eq!(verdict(&submission, vec![refusal(8, "later")]).unwrap().index, 1);
    }
}
