//! One Postgres transaction a batch: fence, ledger, rows, ledger again, history, origin, COMMIT; or, where its outcome can
//! be foreseen, all that as one statement (see [`crate::transaction::at_once`]).
//!
//! The fence moves the positions of the batch's partitions and so locks their rows: whoever else believes to own one of
//! them waits, and then finds another position or term. What becomes of an error is decided by the caller, from
//! [`Failed`]; here everything is rolled back.

use std::collections::BTreeMap;
use std::sync::Arc;

use millstream_runtime::postgres;
use sqlx::postgres::PgConnectOptions;
use sqlx::{Connection, PgConnection, Row};
use tokio::sync::watch;

use crate::decide::plan::Condemned;
use crate::decide::results::Results;
use crate::error::{is_drift, keeps_connection};
use crate::item::{Item, Mode, Owned, PositionMove};
use crate::sql::model::{ConfigFile, Model};
use crate::transaction::batch::Transaction;
use crate::transaction::failed::Failed;
use crate::transaction::memory::Memory;

/// Longest statement where others wait for it, and longest of a transaction that is tried alone there. What takes longer is applied
/// aside, with the session's own limit.
const BRIEF: &str = "2s";

/// Limits of a worker's session. A statement has to end some time; a worker that hangs must not keep its locks.
const SESSION: [(&str, &str); 11] = [
    ("statement_timeout", "30s"),
    // Whoever is in the way of one client's change must not hold up all others for long: see [`Failed::Busy`].
    ("lock_timeout", "250ms"),
    ("idle_in_transaction_session_timeout", "10s"),
    ("default_transaction_isolation", "read committed"),
    // Compiling costs more than these short statements.
    ("jit", "off"),
    // Rows are found by their keys. A plan that was made while a table was small, or never analysed, must not read it whole
    // for the life of the connection.
    ("enable_seqscan", "off"),
    ("enable_hashjoin", "off"),
    ("enable_mergejoin", "off"),
    ("enable_material", "off"),
    // Their parameters are arrays: planning for these very values costs as much as the statement and gains nothing.
    ("plan_cache_mode", "force_generic_plan"),
    // What triggers say for a person at a terminal has no reader here.
    ("client_min_messages", "error"),
];

const POSITIONS: &str = "\
SELECT partition, epoch, position FROM millstream.partitions
WHERE stream_epoch = $1 AND partition = ANY ($2) ORDER BY partition FOR UPDATE";

const RELEASE: &str = "\
UPDATE millstream.partitions SET owner = NULL, heartbeat = now()
WHERE stream_epoch = $1 AND partition = $2 AND epoch = $3";

/// A worker's connection and what it knows.
pub(crate) struct Executor {
    options: PgConnectOptions,
    source: Arc<ConfigFile>,
    /// Tells that the model may be out of date.
    changed: watch::Receiver<()>,
    incarnation: String,
    connection: Option<PgConnection>,
    /// Others wait for it: see [`BRIEF`].
    brief: bool,
    model: Option<Model>,
    /// The model is to be made from what is there now.
    stale: bool,
    memory: Memory,
}

impl Executor {
    /// Connects when first used.
    pub fn new(
        options: PgConnectOptions,
        source: Arc<ConfigFile>,
        changed: watch::Receiver<()>,
        incarnation: String,
    ) -> Self {
        Executor {
            options: options.options(SESSION),
            source,
            changed,
            incarnation,
            connection: None,
            brief: false,
            model: None,
            stale: false,
            memory: Memory::default(),
        }
    }

    /// One with a connection of its own.
    pub fn another(&self) -> Executor {
        Executor {
            options: self.options.clone(),
            source: self.source.clone(),
            changed: self.changed.clone(),
            incarnation: self.incarnation.clone(),
            connection: None,
            brief: false,
            model: None,
            stale: false,
            memory: Memory::default(),
        }
    }

    /// The same for statements that others wait for.
    pub fn brief(mut self) -> Executor {
        self.options = self.options.options([("statement_timeout", BRIEF)]);
        self.brief = true;
        self
    }

    /// Whether a batch is applied without connecting or reading the catalog first.
    pub fn is_warm(&self) -> bool {
        self.connection.is_some() && self.model.is_some() && !self.stale && !self.changed.has_changed().unwrap_or(false)
    }

    /// The connection, to be given back if it can still be used.
    async fn take_connection(&mut self) -> Result<PgConnection, sqlx::Error> {
        match self.connection.take() {
            Some(connection) => Ok(connection),
            None => {
                // It looks for names elsewhere until the model is made on it.
                self.stale = true;
                postgres::connect(&self.options).await
            }
        }
    }

    async fn connect(&mut self) -> Result<&mut PgConnection, sqlx::Error> {
        let connection = self.take_connection().await?;
        Ok(self.connection.insert(connection))
    }

    /// Applies a batch and commits it.
    pub async fn execute(
        &mut self,
        items: &[Item],
        fences: &[PositionMove],
        mode: Mode,
        condemned: &Condemned,
    ) -> Result<Results, Failed> {
        let mut connection = self.take_connection().await.map_err(Failed::Server)?;
        if self.changed.has_changed().unwrap_or(false) {
            self.changed.mark_unchanged();
            self.stale = true;
        }
        if self.stale || self.model.is_none() {
            // Reading the catalog may take long where there are very many tables.
            let limit = async |connection: &mut PgConnection, reset: &'static str| match self.brief {
                true => sqlx::raw_sql(reset).execute(connection).await.map(drop).map_err(Failed::Server),
                false => Ok(()),
            };
            limit(&mut connection, "SET statement_timeout = '30s'").await?;
            let renewed = Model::renew(&mut self.model, &mut connection, &self.source).await;
            limit(&mut connection, "RESET statement_timeout").await?;
            if let Err(error) = renewed {
                // Without the connection, which may be why.
                return Err(Failed::Model(error));
            }
            self.stale = false;
        }
        let Some(model) = &mut self.model else { return Err(Failed::Stale) };
        let mut transaction = Transaction {
            connection: &mut connection,
            source: &self.source,
            incarnation: &self.incarnation,
            items,
            fences,
            mode,
            condemned,
            brief: self.brief,
            spans: None,
        };
        let at_once = match mode {
            Mode::Fast => transaction.at_once(model, &mut self.memory).await,
            Mode::Careful | Mode::Savepoints | Mode::Single => None,
        };
        // It is over with its statement, whichever way.
        let ended = at_once.is_some();
        let mut outcome = match at_once {
            Some(outcome) => outcome,
            None => transaction.run(model, &mut self.memory).await,
        };
        if let Err(Failed::Isolate { at: Some(at), .. }) = &mut outcome {
            // From an index among submissions to one among items.
            let mut submissions = items.iter().enumerate().filter(|(_, item)| item.submission.is_some());
            *at = submissions.nth(*at).map_or(0, |(index, _)| index);
        }
        let keep_connection = match &outcome {
            Ok(_) | Err(Failed::Fenced | Failed::Condemned(..) | Failed::Ledger | Failed::Isolate { .. }) => true,
            Err(Failed::Stale | Failed::Model(_)) => true,
            Err(Failed::Strike(_, _, error) | Failed::Server(error) | Failed::Busy(error)) => keeps_connection(error),
            Err(Failed::Gone(_) | Failed::Unsure(..)) => false,
        };
        self.stale = match &outcome {
            Err(Failed::Stale) => true,
            // Drift shows as an error of a statement, whichever way it is treated.
            Err(Failed::Strike(_, _, error)) => is_drift(error),
            _ => false,
        };
        // It may not be true any more.
        if let Err(Failed::Fenced | Failed::Ledger | Failed::Gone(_) | Failed::Unsure(..)) = &outcome {
            self.memory = Memory::default();
        }
        if outcome.is_ok() || (keep_connection && (ended || rollback(&mut connection).await)) {
            self.connection = Some(connection);
        }
        outcome
    }

    /// What Postgres holds of partitions. Waits for a transaction of a lost connection to end, by its row locks.
    pub async fn positions(&mut self, partitions: &[u16]) -> Result<BTreeMap<u16, Owned>, sqlx::Error> {
        let incarnation = self.incarnation.clone();
        let partitions: Vec<i16> = partitions.iter().map(|partition| *partition as i16).collect();
        let connection = self.connect().await?;
        let read = sqlx::query(POSITIONS).bind(incarnation).bind(partitions).fetch_all(connection).await;
        let rows = self.checked(read)?;
        rows.iter()
            .map(|row| {
                let partition: i16 = row.try_get("partition")?;
                let position: i64 = row.try_get("position")?;
                Ok((partition as u16, Owned { term: row.try_get("epoch")?, position: position as u64 }))
            })
            .collect()
    }

    /// Gives a partition up, unless somebody took it over already.
    pub async fn release(&mut self, partition: u16, term: i64) -> Result<(), sqlx::Error> {
        let incarnation = self.incarnation.clone();
        let connection = self.connect().await?;
        let release =
            sqlx::query(RELEASE).bind(incarnation).bind(partition as i16).bind(term).execute(connection).await;
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

async fn rollback(connection: &mut PgConnection) -> bool {
    sqlx::raw_sql("ROLLBACK").execute(connection).await.is_ok()
}
