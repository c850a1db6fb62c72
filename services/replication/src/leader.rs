//! One leader: an advisory lock, held by a connection of its own for as long as the session runs. Everyone else waits
//! as a hot standby. The lock only saves work; what keeps a former leader from writing is the compare-and-set
//! of each append.

use std::time::Duration;

use millstream_runtime::postgres;
use sqlx::{Connection, PgConnection};

use crate::error::Error;

/// How often a standby tries to become leader.
const RETRY: Duration = Duration::from_secs(1);
/// How often the leader checks that its connection, and so its lock, is still there.
const CHECK: Duration = Duration::from_secs(1);
/// How long such a check may take.
const CHECK_TIMEOUT: Duration = Duration::from_secs(5);
/// Settings of the lock's connection: the server ends it, and so frees the lock, when the leader is frozen (no check
/// for 7 s) or its host is gone.
const SETTINGS: [(&str, &str); 4] = [
    ("idle_session_timeout", "7s"),
    ("tcp_keepalives_idle", "5"),
    ("tcp_keepalives_interval", "2"),
    ("tcp_keepalives_count", "3"),
];

/// Holds the lock.
#[derive(Debug)]
pub struct Leader {
    connection: PgConnection,
}

impl Leader {
    /// Waits until this process is leader for the slot. `waiting` is called once if another one is.
    pub async fn wait(
        options: &sqlx::postgres::PgConnectOptions,
        slot: &str,
        waiting: impl FnOnce(),
    ) -> Result<Leader, Error> {
        let options = options.clone().options(SETTINGS);
        let mut connection = tokio::time::timeout(CHECK_TIMEOUT, postgres::connect(&options))
            .await
            .unwrap_or_else(|_| Err(sqlx::Error::PoolTimedOut))
            .map_err(Error::postgres("connect"))?;
        let mut waiting = Some(waiting);
        loop {
            let taken: bool = tokio::time::timeout(
                CHECK_TIMEOUT,
                sqlx::query_scalar("SELECT pg_try_advisory_lock(hashtextextended('millstream.replication.' || $1, 0))")
                    .bind(slot)
                    .fetch_one(&mut connection),
            )
            .await
            .map_err(|_| Error::LeaderLost)?
            .map_err(Error::postgres("take the leader lock"))?;
            if taken {
                return Ok(Leader { connection });
            }
            if let Some(waiting) = waiting.take() {
                waiting();
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    /// The connection, for statements before the session runs.
    pub fn connection(&mut self) -> &mut PgConnection {
        &mut self.connection
    }

    /// Returns when the lock is lost.
    pub async fn hold(&mut self) -> Error {
        loop {
            tokio::time::sleep(CHECK).await;
            match tokio::time::timeout(CHECK_TIMEOUT, self.connection.ping()).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => return Error::Postgres { operation: "keep the leader lock", source: error },
                Err(_) => return Error::LeaderLost,
            }
        }
    }
}
