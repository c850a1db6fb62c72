//! What is parked, for the operator: `millstream.parked` names each transaction that cannot be applied now, and why; what the operator
//! refuses there (`millstream history reject`) is rejected at its next try.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use millstream_runtime::error::chain;
use millstream_runtime::shutdown::Shutdown;
use millstream_schemas::Code;
use millstream_schemas::stream::Submission;
use sqlx::{PgPool, Row};
use tokio::time::{Instant, MissedTickBehavior, interval};
use uuid::Uuid;

use crate::error::Refusal;

/// Most transactions that a process names; the note in `/readyz` counts all.
const MAX_NAMED: usize = 1_000;
/// Time between rounds: a refusal is heard of within it.
const PERIOD: Duration = Duration::from_secs(1);
/// What is tried no more has been taken by somebody else. Tries are never so far apart.
const FORGOTTEN: Duration = Duration::from_secs(60);
/// Most bytes of a reason.
const MAX_REASON_BYTES: usize = 500;

/// A transaction's client and `client_seq`.
type Name = (Uuid, u64);

const NOTE: &str = "\
INSERT INTO millstream.parked AS p (client_id, seq, user_id, table_name, tries, reason)
SELECT * FROM unnest($1::uuid[], $2::bigint[], $3::text[], $4::text[], $5::int[], $6::text[])
ON CONFLICT (client_id, seq) DO UPDATE SET tries = excluded.tries, reason = excluded.reason, seen_at = now(),
    -- What has not been heard of for so long is another story.
    rejection = CASE WHEN p.seen_at > now() - interval '5 minutes' THEN p.rejection END,
    since = CASE WHEN p.seen_at > now() - interval '5 minutes' THEN p.since ELSE now() END";

const FORGET: &str = "\
DELETE FROM millstream.parked WHERE (client_id, seq) IN (SELECT * FROM unnest($1::uuid[], $2::bigint[]))
    OR seen_at < now() - interval '5 minutes'";

/// What is known of the transactions of a process that cannot be applied now. Shared by its workers.
#[derive(Clone, Default)]
pub(crate) struct Parked(Arc<Mutex<Board>>);

#[derive(Default)]
struct Board {
    parked: HashMap<Name, ParkedTransaction>,
    /// Not yet told to the database.
    gone: Vec<Name>,
    refused: HashMap<Name, String>,
}

struct ParkedTransaction {
    user_id: String,
    table: Option<String>,
    tries: u32,
    reason: String,
    at: Instant,
    is_told: bool,
}

impl Parked {
    fn with<T>(&self, work: impl FnOnce(&mut Board) -> T) -> T {
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A transaction was tried in vain, so many times by now.
    pub fn note(&self, submission: &Submission, tries: u32, error: &sqlx::Error) {
        // Postgres' text cannot hold U+0000.
        let clean = |text: &str| text.replace('\0', "\u{fffd}");
        let mut reason = clean(&error.to_string());
        reason.truncate(reason.floor_char_boundary(MAX_REASON_BYTES));
        let entry = ParkedTransaction {
            user_id: clean(&submission.user_id),
            table: submission.changes.first().map(|change| clean(&change.table)),
            tries,
            reason,
            at: Instant::now(),
            is_told: false,
        };
        self.with(|board| {
            let name = (submission.client_id, submission.client_seq);
            if board.parked.len() < MAX_NAMED || board.parked.contains_key(&name) {
                board.parked.insert(name, entry);
            }
        });
    }

    /// A transaction is done with.
    pub fn settled(&self, name: Name) {
        self.with(|board| {
            board.refused.remove(&name);
            if board.parked.remove(&name).is_some() {
                board.gone.push(name);
            }
        });
    }

    /// Why an operator refused a transaction, if one did.
    pub fn refusal(&self, name: Name) -> Option<Refusal> {
        let message = self.with(|board| board.refused.get(&name).cloned())?;
        Some(Refusal::new(Code::OperatorRejected, message))
    }

    /// Keeps the table until shutdown.
    pub async fn run(self, pool: PgPool, shutdown: Shutdown) {
        let mut rounds = interval(PERIOD);
        rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = shutdown.requested() => return,
                _ = rounds.tick() => {}
            }
            tokio::select! {
                () = shutdown.requested() => return,
                done = self.round(&pool) => if let Err(error) = done {
                    tracing::warn!(error = chain(&error), "what is parked cannot be told now");
                }
            }
        }
    }

    async fn round(&self, pool: &PgPool) -> Result<(), sqlx::Error> {
        let forgotten = Instant::now().checked_sub(FORGOTTEN);
        let (gone, news) = self.with(|board| {
            board.parked.retain(|_, entry| forgotten.is_none_or(|forgotten| entry.at > forgotten));
            board.refused.retain(|name, _| board.parked.contains_key(name));
            let mut columns = Columns::default();
            board
                .parked
                .iter()
                .filter(|(_, entry)| !entry.is_told)
                .for_each(|(name, entry)| columns.push(*name, entry));
            (board.gone.clone(), columns)
        });
        if !news.clients.is_empty() {
            let Columns { clients, seqs, users, tables, tries, reasons } = &news;
            let note = sqlx::query(NOTE).bind(clients).bind(seqs).bind(users).bind(tables).bind(tries).bind(reasons);
            note.execute(pool).await?;
            self.with(|board| {
                for ((client, client_seq), tries) in clients.iter().zip(seqs).zip(tries) {
                    let entry = board.parked.get_mut(&(*client, *client_seq as u64));
                    entry.into_iter().for_each(|entry| entry.is_told |= i64::from(entry.tries) == i64::from(*tries));
                }
            });
        }
        if !gone.is_empty() {
            let (clients, seqs): (Vec<Uuid>, Vec<i64>) =
                gone.iter().map(|(client, client_seq)| (*client, *client_seq as i64)).unzip();
            sqlx::query(FORGET).bind(clients).bind(seqs).execute(pool).await?;
            self.with(|board| drop(board.gone.drain(..gone.len())));
        }
        let ours: HashSet<Name> = self.with(|board| board.parked.keys().copied().collect());
        if ours.is_empty() {
            return Ok(());
        }
        let refused = sqlx::query(
            "SELECT client_id, seq, rejection FROM millstream.parked \
             WHERE rejection IS NOT NULL AND seen_at > now() - interval '5 minutes'",
        );
        for row in &refused.fetch_all(pool).await? {
            let name = (row.try_get("client_id")?, row.try_get::<i64, _>("seq")? as u64);
            if ours.contains(&name) {
                let message = row.try_get("rejection")?;
                self.with(|board| board.refused.insert(name, message));
            }
        }
        Ok(())
    }
}

/// The rows to write, by column.
#[derive(Default)]
struct Columns {
    clients: Vec<Uuid>,
    seqs: Vec<i64>,
    users: Vec<String>,
    tables: Vec<Option<String>>,
    tries: Vec<i32>,
    reasons: Vec<String>,
}

impl Columns {
    fn push(&mut self, (client_id, client_seq): Name, entry: &ParkedTransaction) {
        self.clients.push(client_id);
        self.seqs.push(client_seq as i64);
        self.users.push(entry.user_id.clone());
        self.tables.push(entry.table.clone());
        self.tries.push(i32::try_from(entry.tries).unwrap_or(i32::MAX));
        self.reasons.push(entry.reason.clone());
    }
}
