//! Submitting a failed transaction again for its author, by the way that all changes go: broker, validators, executor.
//!
//! The author's own client owns its `client_seq`, so a replay is the one and only transaction (`client_seq` 1) of a client
//! made for it, whose id follows from the record. Whoever replays the same record again submits the same number of the
//! same client, and the ledger takes it once. A replay that is rejected is a record of its own; replaying the first one
//! again goes on from the last.

use std::time::Duration;

use millstream_provision::exit::Exit;
use millstream_provision::keys::Role;
use millstream_runtime::nats::{self, Nats};
use millstream_schemas::stream::{ChangesMessage, Loss, Submission, Verdict};
use millstream_schemas::subject;
use serde::Serialize;
use sha2::{Digest as _, Sha256};
use sqlx::Row as _;
use sqlx::postgres::PgConnection;
use tokio::time::Instant;
use uuid::Uuid;

use super::error::Error;
use crate::output::{Output, print};

/// The only `client_seq` of a client that is made for a replay.
const SEQ: u64 = 1;
/// How often the verdict is looked for.
const POLL: Duration = Duration::from_millis(50);
/// Longest chain of replays that were rejected.
const MAX_CHAIN: usize = 100;

/// What a replay came to, as it is printed.
#[derive(Debug, Serialize)]
struct Replayed {
    /// The record that was named.
    id: i64,
    /// The client that was made for the replay.
    client_id: Uuid,
    /// None: not known within the time.
    verdict: Option<Verdict>,
    /// It had been replayed with success before; nothing was done.
    before: bool,
    /// The new record, where it was rejected again.
    #[serde(skip_serializing_if = "Option::is_none")]
    record: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rule: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<String>,
}

/// A record, as far as it matters here.
struct Record {
    id: i64,
    user_id: String,
    attempt: u32,
    submission: Submission,
    replay_client: Uuid,
}

/// What Postgres says of a replay's client.
enum ReplayClient {
    /// Nothing yet.
    Open,
    Settled(Verdict),
    Rejected {
        record: i64,
        code: String,
        rule: Option<String>,
        message: String,
    },
}

/// Replays each record and prints what it came to.
pub(super) async fn run(
    connection: &mut PgConnection,
    nats: &nats::Args,
    ids: &[i64],
    wait: Duration,
    output: Output,
) -> Result<Exit, Error> {
    // A refused key shows only as an endless wait.
    let connected = tokio::time::timeout(wait, nats::connect(nats, Role::Operator.name())).await;
    let broker = connected.map_err(|_| Error::NatsSilent(nats.nats_url.clone()))?.map_err(Error::Nats)?;
    let mut exit = Exit::Ok;
    for &id in ids {
        let replayed = replay(connection, &broker, id, wait).await?;
        match replayed.verdict {
            None => exit = Exit::Dependency,
            Some(Verdict::Rejected) if exit == Exit::Ok => exit = Exit::Failed,
            Some(_) => {}
        }
        match output {
            // Plain data: there is nothing in it that could fail.
            Output::Json => print(&serde_json::to_string(&replayed).unwrap_or_default()),
            Output::Text => print(&replayed.text()),
        }
    }
    Ok(exit)
}

async fn replay(connection: &mut PgConnection, nats: &Nats, id: i64, wait: Duration) -> Result<Replayed, Error> {
    let mut last = record(connection, id).await?;
    if last.submission.changes.iter().any(|change| !change.adds.is_empty()) {
        return Err(Error::Adds(id));
    }
    for _ in 0..MAX_CHAIN {
        let client_id = last.replay_client;
        match known(connection, client_id).await? {
            ReplayClient::Rejected { record: rejected, .. } => last = record(connection, rejected).await?,
            ReplayClient::Settled(verdict) => return Ok(Replayed::settled(id, client_id, verdict, true)),
            ReplayClient::Open => {
                submit(nats, last).await?;
                let deadline = Instant::now() + wait;
                loop {
                    match known(connection, client_id).await? {
                        ReplayClient::Settled(verdict) => return Ok(Replayed::settled(id, client_id, verdict, false)),
                        ReplayClient::Rejected { record, code, rule, message } => {
                            return Ok(Replayed {
                                record: Some(record),
                                code: Some(code),
                                rule,
                                message: Some(message),
                                ..Replayed::settled(id, client_id, Verdict::Rejected, false)
                            });
                        }
                        ReplayClient::Open if Instant::now() >= deadline => {
                            return Ok(Replayed {
                                verdict: None,
                                ..Replayed::settled(id, client_id, Verdict::Applied, false)
                            });
                        }
                        ReplayClient::Open => tokio::time::sleep(POLL).await,
                    }
                }
            }
        }
    }
    Err(Error::TooOften(id))
}

async fn record(connection: &mut PgConnection, id: i64) -> Result<Record, Error> {
    let row = sqlx::query(
        "SELECT user_id, client_id, seq, attempt, (extract(epoch FROM at) * 1000000)::int8 AS at, payload::text AS payload \
         FROM millstream.changes_history WHERE id = $1",
    )
    .bind(id)
    .fetch_optional(connection)
    .await
    .map_err(Error::Query)?
    .ok_or(Error::NotFound(id))?;
    let payload: String = row.try_get("payload").map_err(Error::Query)?;
    let attempt: i32 = row.try_get("attempt").map_err(Error::Query)?;
    Ok(Record {
        id,
        user_id: row.try_get("user_id").map_err(Error::Query)?,
        attempt: attempt.unsigned_abs(),
        submission: serde_json::from_str(&payload).map_err(|source| Error::Payload { id, source })?,
        replay_client: replay_client(
            id,
            row.try_get("client_id").map_err(Error::Query)?,
            row.try_get("seq").map_err(Error::Query)?,
            row.try_get("at").map_err(Error::Query)?,
        ),
    })
}

/// The client for the replay of a record: a UUIDv8 from the SHA-256 of what names it. Its time (microseconds since 1970)
/// is among that because ids, clients and sequences can be guessed: nobody shall take the client's id before.
fn replay_client(id: i64, client_id: Uuid, client_seq: i64, at: i64) -> Uuid {
    let hash = Sha256::digest(format!("millstream replay {id} {client_id} {client_seq} {at}"));
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&hash[..16]);
    uuid::Builder::from_custom_bytes(bytes).into_uuid()
}

async fn known(connection: &mut PgConnection, client_id: Uuid) -> Result<ReplayClient, Error> {
    let row = sqlx::query(
        "SELECT c.lost::text AS lost, h.id, h.code, h.rule, h.message FROM millstream.clients c \
         LEFT JOIN millstream.changes_history h ON h.client_id = c.client_id AND h.seq = $2 \
         WHERE c.client_id = $1 AND c.last_seq >= $2",
    )
    .bind(client_id)
    .bind(SEQ as i64)
    .fetch_optional(connection)
    .await
    .map_err(Error::Query)?;
    let Some(row) = row else { return Ok(ReplayClient::Open) };
    if let Some(record) = row.try_get("id").map_err(Error::Query)? {
        return Ok(ReplayClient::Rejected {
            record,
            code: row.try_get("code").map_err(Error::Query)?,
            rule: row.try_get("rule").map_err(Error::Query)?,
            message: row.try_get("message").map_err(Error::Query)?,
        });
    }
    let lost: String = row.try_get("lost").map_err(Error::Query)?;
    // What this version cannot read says at least that it was not rejected.
    let lost: Vec<Loss> = serde_json::from_str(&lost).unwrap_or_default();
    let loss = lost.iter().find(|loss| loss.client_seq == SEQ);
    Ok(ReplayClient::Settled(loss.map_or(Verdict::Applied, |loss| loss.verdict)))
}

/// Publishes as an edge does, with the author's identity.
async fn submit(nats: &Nats, record: Record) -> Result<(), Error> {
    let client_id = record.replay_client;
    let submission = Submission {
        client_id,
        user_id: record.user_id,
        client_seq: SEQ,
        attempt: record.attempt.saturating_add(1),
        run_id: Uuid::new_v4(),
        previous: None,
        after: Vec::new(),
        changes: record.submission.changes,
        traceparent: record.submission.traceparent,
    };
    let message = ChangesMessage { submissions: vec![submission] };
    let payload = serde_json::to_vec(&message).map_err(|source| Error::Payload { id: record.id, source })?;
    let subject = subject::changes(subject::partition(client_id));
    nats.jetstream.publish(subject, payload.into()).await.map_err(Error::Publish)?.await.map_err(Error::Publish)?;
    Ok(())
}

impl Replayed {
    fn settled(id: i64, client_id: Uuid, verdict: Verdict, before: bool) -> Self {
        let verdict = Some(verdict);
        Replayed { id, client_id, verdict, before, record: None, code: None, rule: None, message: None }
    }

    fn text(&self) -> String {
        let before = if self.before { " before" } else { "" };
        match self.verdict {
            None => {
                format!("{}: stored on the broker; its verdict is not known yet, replay it again to see it", self.id)
            }
            Some(Verdict::Applied) => format!("{}: applied{before}", self.id),
            Some(Verdict::Merged) => format!("{}: applied{before}, in part: newer changes had been made", self.id),
            Some(Verdict::Superseded) => format!("{}: without effect{before}: newer changes had been made", self.id),
            Some(Verdict::Rejected) => {
                let rule = self.rule.as_ref().map(|rule| format!(" ({rule})")).unwrap_or_default();
                format!(
                    "{}: rejected again, recorded as {}: {}{rule}: {}",
                    self.id,
                    self.record.unwrap_or_default(),
                    self.code.as_deref().unwrap_or_default(),
                    self.message.as_deref().unwrap_or_default()
                )
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_has_one_client_for_its_replay() {
        let client = Uuid::from_u128(1);
        let id = replay_client(7, client, 3, 1_700_000_000_000_000);
        assert_eq!(id, replay_client(7, client, 3, 1_700_000_000_000_000));
        assert_eq!(id.get_version_num(), 8);
        for other in [replay_client(8, client, 3, 1_700_000_000_000_000), replay_client(7, client, 3, 1)] {
            assert_ne!(id, other);
        }
    }
}
