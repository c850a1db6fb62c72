//! What the store knows of itself: identity, position, scopes.

use millstream_client_core::territory::SetAside;
use millstream_schemas::frame::SnapshotMark;
use millstream_schemas::subject::USER_KIND;
use millstream_schemas::{Position, Scope};
use rusqlite::types::Value;
use rusqlite::{OptionalExtension, ToSql, params};
use uuid::Uuid;

use crate::error::{During, encode, parse};
use crate::states::{FAILED, TROUBLED};
use crate::{Store, StoreError};

/// The store's facts, as `hello` and the status need them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    /// The installation.
    pub client_id: Uuid,
    /// Version of the installed schema.
    pub schema: Option<String>,
    /// Where the rows stand; none before the first snapshot.
    pub position: Option<Position>,
    /// The position is of no use to the server any more: a snapshot is needed. The rows stay until it comes.
    pub resync: bool,
    /// How far a snapshot is that was cut, and how many rows of it had arrived by then.
    pub snapshot: Option<(SnapshotMark, u64)>,
    /// Scopes whose rows the store holds.
    pub scopes: Vec<Scope>,
    /// Highest settled `client_seq`.
    pub confirmed_seq: u64,
    /// Highest `client_seq` given out.
    pub last_seq: u64,
    /// Number of failed transactions.
    pub failed: u64,
    /// Number of transactions held back behind them.
    pub held: u64,
    /// When the oldest unsettled transaction was recorded, in microseconds since 1970.
    pub oldest_pending: Option<u64>,
    /// What the app added and had to give way.
    pub set_aside: Vec<SetAside>,
}

impl Store {
    pub(crate) fn prepare_identity(&mut self) -> Result<(), StoreError> {
        if self.meta_uuid("client_id")?.is_none() {
            // OR IGNORE: two processes may open a new store at the same time.
            self.connection
                .execute(
                    "INSERT OR IGNORE INTO millstream_meta (key, value) VALUES ('client_id', ?1)",
                    params![self.session.uuid().to_string()],
                )
                .during("storing the identity")?;
        }
        Ok(())
    }

    /// The user whose store it is: the first that it was told of. Older stores know theirs by the scopes that they hold.
    ///
    /// # Errors
    /// SQLite failed.
    pub fn owner(&self) -> Result<Option<String>, StoreError> {
        if let Some(Value::Text(owner)) = self.meta("owner")? {
            return Ok(Some(owner));
        }
        Ok(self.scopes()?.into_iter().find(|scope| scope.kind == USER_KIND).map(|scope| scope.id))
    }

    /// This user wants to use the store: it is theirs from now on, if it is nobody's.
    ///
    /// # Errors
    /// [`StoreError::Foreign`]: it is somebody else's. Nothing is changed.
    pub fn claim(&mut self, user: &str) -> Result<(), StoreError> {
        // A session begins: what it stages is this process's.
        self.staging.set(None);
        self.transact(|store| match store.owner()? {
            Some(owner) if owner == user => Ok(()),
            // Perhaps a token that the edge never took: there is nothing of anybody's here.
            Some(_) if store.is_pristine()? => store.set_meta("owner", user),
            Some(owner) => Err(StoreError::Foreign { owner, user: user.to_owned() }),
            None => store.set_meta("owner", user),
        })
    }

    /// Nothing was ever recorded or received.
    fn is_pristine(&self) -> Result<bool, StoreError> {
        // Rows come before the position does.
        Ok(self.last_tx()? == 0 && self.is_unclaimed()? && !self.has_rows()?)
    }

    /// The newest stamp that a process of this store has given out or seen. (Stamps rise with the transactions, and an edit
    /// gives the newest to what is behind it.)
    pub(crate) fn last_stamp(&self) -> Result<u64, StoreError> {
        self.connection
            .prepare_cached(
                "SELECT max(coalesce((SELECT max(stamp) FROM local_changes WHERE tx = (SELECT max(tx) FROM local_changes)), 0), \
                 coalesce((SELECT value FROM millstream_meta WHERE key = 'stamp'), 0))",
            )
            .and_then(|mut statement| statement.query_row([], |row| row.get::<_, i64>(0)))
            .map(|stamp| stamp as u64)
            .during("reading the last stamp")
    }

    /// Brings this process's clock up to those that share the store and to the runs before it.
    pub(crate) fn meet_stamps(&self) -> Result<(), StoreError> {
        self.session.observe(self.last_stamp()?);
        Ok(())
    }

    /// Keeps the newest stamp that this process has given out or seen, for those that share the store and for the next run.
    pub(crate) fn keep_stamp(&self) -> Result<(), StoreError> {
        self.meet_stamps()?;
        self.set_meta("stamp", self.session.stamp() as i64)
    }

    /// The store's facts.
    ///
    /// # Errors
    /// SQLite failed.
    pub fn info(&self) -> Result<Info, StoreError> {
        let (failed, held, oldest): (i64, i64, Option<i64>) = self
            .connection
            .prepare_cached(&format!(
                "SELECT (SELECT count(DISTINCT tx) FROM local_changes INDEXED BY local_changes_troubled WHERE {TROUBLED} AND {FAILED}), \
                 (SELECT count(DISTINCT tx) FROM local_changes INDEXED BY local_changes_troubled WHERE {TROUBLED} AND state = 'held'), \
                 (SELECT recorded_at FROM local_changes WHERE seq > ?1 ORDER BY seq LIMIT 1)"
            ))
            .and_then(|mut statement| {
                statement.query_row([self.confirmed_seq()? as i64], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))
            })
            .during("reading the queue's state")?;
        Ok(Info {
            client_id: self.meta_uuid("client_id")?.unwrap_or_default(),
            schema: self.schema.as_ref().map(|schema| schema.version.clone()),
            position: self.meta_json("position")?,
            resync: self.meta("resync")?.is_some_and(|flag| flag != Value::Null),
            snapshot: self.meta_json("snapshot")?,
            scopes: self.scopes()?,
            confirmed_seq: self.confirmed_seq().during("reading confirmed_seq")?,
            last_seq: self.last_seq().during("reading the last number")?,
            failed: failed as u64,
            held: held as u64,
            oldest_pending: oldest.map(|at| at as u64),
            set_aside: self.set_aside()?,
        })
    }

    /// Gives the position up: the next session brings a snapshot of everything. Rows and queue stay.
    ///
    /// # Errors
    /// SQLite failed.
    pub fn forget_position(&mut self) -> Result<(), StoreError> {
        self.transact(|store| {
            // Going on with a cut snapshot might end where this one did.
            store.forget_staged()?;
            store.set_meta("resync", 1)
        })
    }

    /// The scopes whose rows the store holds.
    pub(crate) fn scopes(&self) -> Result<Vec<Scope>, StoreError> {
        self.connection
            .prepare_cached("SELECT kind, id FROM millstream_scopes ORDER BY kind, id")
            .and_then(|mut statement| {
                statement
                    .query_map([], |row| Ok(Scope::new(row.get::<_, String>(0)?, row.get::<_, String>(1)?)))?
                    .collect()
            })
            .during("reading the scopes")
    }

    /// Highest settled transaction.
    pub(crate) fn confirmed_seq(&self) -> rusqlite::Result<u64> {
        self.connection
            .prepare_cached("SELECT coalesce((SELECT value FROM millstream_meta WHERE key = 'confirmed_seq'), 0)")?
            .query_row([], |row| row.get::<_, i64>(0))
            .map(|client_seq| client_seq as u64)
    }

    /// Highest `client_seq` given out. Only settled ones are ever removed from the queue, hence the greater of the two.
    pub(crate) fn last_seq(&self) -> rusqlite::Result<u64> {
        self.connection
            .prepare_cached(
                "SELECT max(coalesce((SELECT max(seq) FROM local_changes WHERE seq IS NOT NULL), 0), \
                 coalesce((SELECT value FROM millstream_meta WHERE key = 'confirmed_seq'), 0))",
            )?
            .query_row([], |row| row.get::<_, i64>(0))
            .map(|client_seq| client_seq as u64)
    }

    /// Highest local transaction that there ever was.
    pub(crate) fn last_tx(&self) -> Result<u64, StoreError> {
        self.connection
            .prepare_cached(
                "SELECT max(coalesce((SELECT max(tx) FROM local_changes), 0), \
                 coalesce((SELECT value FROM millstream_meta WHERE key = 'last_tx'), 0))",
            )
            .and_then(|mut statement| statement.query_row([], |row| row.get::<_, i64>(0)))
            .map(|tx| tx as u64)
            .during("reading the last transaction")
    }

    /// Entries are about to be removed: remembers the last transaction, so that none is ever named again.
    pub(crate) fn keep_last_tx(&self) -> Result<(), StoreError> {
        self.set_meta("last_tx", self.last_tx()? as i64)
    }

    pub(crate) fn set_meta(&self, key: &str, value: impl ToSql) -> Result<(), StoreError> {
        self.connection
            .prepare_cached("INSERT INTO millstream_meta (key, value) VALUES (?1, ?2) ON CONFLICT (key) DO UPDATE SET value = excluded.value")
            .and_then(|mut statement| statement.execute(params![key, value]))
            .during("storing a setting")?;
        Ok(())
    }

    pub(crate) fn set_meta_json(&self, key: &str, value: &impl serde::Serialize) -> Result<(), StoreError> {
        self.set_meta(key, encode(value))
    }

    pub(crate) fn has_meta(&self, key: &str) -> Result<bool, StoreError> {
        Ok(self.meta(key)?.is_some())
    }

    fn meta(&self, key: &str) -> Result<Option<Value>, StoreError> {
        self.connection
            .prepare_cached("SELECT value FROM millstream_meta WHERE key = ?1")
            .and_then(|mut statement| statement.query_row([key], |row| row.get(0)).optional())
            .during("reading a setting")
    }

    pub(crate) fn meta_integer(&self, key: &str) -> Result<Option<u64>, StoreError> {
        Ok(match self.meta(key)? {
            Some(Value::Integer(value)) => Some(value as u64),
            _ => None,
        })
    }

    pub(crate) fn meta_json<T: serde::de::DeserializeOwned>(&self, key: &'static str) -> Result<Option<T>, StoreError> {
        match self.meta(key)? {
            Some(Value::Text(text)) => parse(&text, key).map(Some),
            _ => Ok(None),
        }
    }

    pub(crate) fn meta_uuid(&self, key: &'static str) -> Result<Option<Uuid>, StoreError> {
        match self.meta(key)? {
            // Nothing else is ever stored there: another one must not take its place.
            Some(Value::Text(text)) => text.parse().map(Some).map_err(|_| StoreError::Inconsistent(key.to_owned())),
            _ => Ok(None),
        }
    }
}
