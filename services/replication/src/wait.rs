//! A replication slot that is made waits for all transactions that are open: an idle one that somebody forgot holds it up for
//! as long as it stays. Says which.

use std::convert::Infallible;
use std::time::Duration;

use millstream_runtime::health::Health;
use sqlx::{PgPool, Row};

/// How long a slot is waited for before the log says what for, and between two looks.
const LOOK: Duration = Duration::from_secs(3);
/// The log says it again after this many looks, though nothing has changed.
const REPEAT: u32 = 20;
/// Name of the note in the health report.
const NOTE: &str = "replication slot";

/// Tells of what a slot waits for.
pub struct Wait {
    pool: PgPool,
    health: Health,
}

impl Wait {
    /// Looks by way of the pool, and tells in the health report too.
    pub fn new(pool: PgPool, health: Health) -> Wait {
        Wait { pool, health }
    }

    /// Tells what the backend `pid` waits for, for as long as it is polled.
    pub async fn tell(&self, pid: i32, slot: &str) -> Infallible {
        let (mut told, mut looks) = (None, 0);
        loop {
            tokio::time::sleep(LOOK).await;
            let found = match self.look(pid).await {
                Ok(found) => found,
                Err(error) => {
                    tracing::warn!(%error, slot, "cannot look which transactions the replication slot waits for");
                    continue;
                }
            };
            looks += 1;
            if told.as_ref() == Some(&found) && looks % REPEAT != 0 {
                continue;
            }
            for holder in &found {
                tracing::warn!(
                    slot,
                    postgres.pid = holder.pid,
                    postgres.application_name = holder.application,
                    postgres.user = holder.user,
                    postgres.xact_start = holder.since,
                    postgres.state = holder.state,
                    "the replication slot waits for an open transaction: {}",
                    holder.remedy()
                );
            }
            let note: Vec<String> = found.iter().map(Blocker::note).collect();
            let note = format!("waits for open transactions: {}", note.join("; "));
            self.health.set_note(NOTE, (!found.is_empty()).then_some(note.as_str()));
            told = Some(found);
        }
    }

    /// The slot is there, or could not be made.
    pub fn is_over(&self) {
        self.health.set_note(NOTE, None);
    }

    async fn look(&self, pid: i32) -> Result<Vec<Blocker>, sqlx::Error> {
        let rows = sqlx::query(
            "SELECT pid, coalesce(application_name, ''), coalesce(user_name, ''), \
             coalesce(to_char(xact_start AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"'), ''), coalesce(state, '') \
             FROM millstream.held_up_by($1) ORDER BY xact_start, pid",
        )
        .bind(pid)
        .fetch_all(&self.pool)
        .await?;
        let holder = |row: &sqlx::postgres::PgRow| Blocker {
            pid: row.get(0),
            application: row.get(1),
            user: row.get(2),
            since: row.get(3),
            state: row.get(4),
        };
        Ok(rows.iter().map(holder).collect())
    }
}

/// What holds it up.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Blocker {
    /// 0 for a prepared transaction.
    pid: i32,
    application: String,
    user: String,
    since: String,
    state: String,
}

impl Blocker {
    fn remedy(&self) -> String {
        match self.pid {
            0 => format!("commit it or roll it back ({})", self.application),
            pid => format!("end it, or SELECT pg_terminate_backend({pid})"),
        }
    }

    fn note(&self) -> String {
        let Blocker { pid, application, user, since, .. } = self;
        match pid {
            0 => format!("{application} of {user} since {since}"),
            pid => format!("pid {pid} ({application}) of {user} since {since}"),
        }
    }
}
