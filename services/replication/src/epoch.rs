//! The epoch: whether the stream's history goes on, or a new one begins.
//!
//! The history goes on only if nothing can have been lost between the stream and the replication slot: the row
//! `millstream.epoch` names the epoch of the stream's last message and this very Postgres cluster; the slot is there and
//! not invalidated; the stream does not know of WAL that this cluster has not written; and the slot has not been
//! confirmed beyond what the stream holds. The last point finds slots that were dropped and made again, and streams
//! that lost acknowledged messages. It holds because the slot is confirmed only up to LSNs that are written in
//! the stream, by transactions or, while nothing is published, by marks.
//!
//! A new epoch: first the row, then the slot, then the first message of the epoch. A crash in between leaves a row that
//! differs from the stream's last message, which simply begins another new epoch. When only the layout of rows has changed,
//! nothing is lost and the slot goes on; clients still start over, since rows on hand may have changed with it. And where a
//! transaction cannot be carried, try after try ([`crate::fault`]), a new slot begins behind it.

use std::time::Duration;

use millstream_schemas::Lsn;
use sqlx::{PgConnection, Row};
use uuid::Uuid;

use crate::append::Tail;
use crate::error::Error;
pub use crate::wait::Wait;

/// The state of things that decides, apart from the stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceState {
    /// Id of the Postgres cluster.
    pub system_identifier: String,
    /// How far the WAL is flushed.
    pub flushed: Lsn,
    /// The row `millstream.epoch`: epoch, cluster, slot.
    pub row: Option<(Uuid, String, String)>,
    /// The replication slot.
    pub slot: Option<Slot>,
}

/// A replication slot as `pg_replication_slots` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Whether it can be read: our plugin, this database, not invalidated.
    pub usable: bool,
    /// How far it has been confirmed.
    pub confirmed: Lsn,
    /// The walsender that uses it.
    pub active_pid: Option<i32>,
    /// Whose it is, if it is not ours: nothing of it is touched.
    pub foreign: Option<String>,
}

/// Why a new epoch begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The stream has no (more) message that names its epoch.
    EmptyStream,
    /// The stream's last message and the row name different epochs, or there is no row.
    OtherEpoch,
    /// Another Postgres cluster.
    OtherCluster,
    /// The slot is gone, of another kind, or was invalidated.
    SlotLost,
    /// The slot has been confirmed beyond the end of the stream.
    StreamBehind,
    /// The stream knows of WAL that does not exist.
    PostgresBehind,
    /// A transaction cannot be carried, try after try.
    Uncarriable,
    /// Postgres says that the slot can be read, and has not the write-ahead log for it.
    WalGone,
}

impl Reason {
    /// For the log.
    pub fn as_str(self) -> &'static str {
        match self {
            Reason::EmptyStream => "the stream holds no message that names its epoch",
            Reason::OtherEpoch => "the stream and the database name different epochs",
            Reason::OtherCluster => "this is another Postgres cluster",
            Reason::SlotLost => "the replication slot is gone or was invalidated",
            Reason::StreamBehind => "the replication slot is ahead of the stream",
            Reason::PostgresBehind => "the stream is ahead of Postgres",
            Reason::WalGone => "the write-ahead log that the replication slot needs is gone",
            Reason::Uncarriable => "a transaction of the write-ahead log cannot be carried",
        }
    }
}

/// Whether the history goes on; if not, why.
pub fn verdict(slot_name: &str, source: &SourceState, tail: Option<&Tail>) -> Result<(), Reason> {
    let tail = tail.ok_or(Reason::EmptyStream)?;
    let (epoch, system_identifier, slot) = source.row.as_ref().ok_or(Reason::OtherEpoch)?;
    if *epoch != tail.epoch {
        return Err(Reason::OtherEpoch);
    }
    if *system_identifier != source.system_identifier {
        return Err(Reason::OtherCluster);
    }
    let found = source.slot.as_ref().filter(|found| found.usable && slot == slot_name).ok_or(Reason::SlotLost)?;
    if tail.lsn > source.flushed {
        return Err(Reason::PostgresBehind);
    }
    // A transaction that was cut half-way is not confirmed: everything confirmed lies before its commit record.
    let held = if tail.last { tail.end_lsn } else { tail.lsn };
    if found.confirmed > held {
        return Err(Reason::StreamBehind);
    }
    Ok(())
}

/// Reads what decides.
pub async fn read_source(connection: &mut PgConnection, slot: &str) -> Result<SourceState, Error> {
    let row = sqlx::query(
        "SELECT (SELECT system_identifier FROM pg_control_system())::text, pg_current_wal_flush_lsn()::text",
    )
    .fetch_one(&mut *connection)
    .await
    .map_err(Error::postgres("identify the cluster"))?;
    let system_identifier: String = row.get(0);
    let flushed = lsn(row.get(1));
    let row = sqlx::query("SELECT epoch, system_identifier, slot FROM millstream.epoch")
        .fetch_optional(&mut *connection)
        .await
        .map_err(Error::postgres("read millstream.epoch"))?;
    Ok(SourceState {
        system_identifier,
        flushed,
        row: row.map(|row| (row.get(0), row.get(1), row.get(2))),
        slot: read_slot(connection, slot).await?,
    })
}

/// Refuses a slot that is not ours: names of slots are those of the cluster, whose databases may each have an installation.
pub fn is_ours(slot: &str, source: &SourceState) -> Result<(), Error> {
    match source.slot.as_ref().and_then(|found| found.foreign.clone()) {
        Some(owner) => Err(Error::ForeignSlot { slot: slot.to_owned(), owner }),
        None => Ok(()),
    }
}

/// Reads the slot.
pub async fn read_slot(connection: &mut PgConnection, slot: &str) -> Result<Option<Slot>, Error> {
    let row = sqlx::query(
        "SELECT plugin = 'pgoutput' AND database = current_database() AND coalesce(wal_status, '') <> 'lost' AND NOT temporary, \
         coalesce(confirmed_flush_lsn, '0/0')::text, active_pid, \
         CASE WHEN slot_type <> 'logical' THEN 'a standby' WHEN database <> current_database() THEN 'database ' || database \
           WHEN plugin <> 'pgoutput' THEN 'a reader with the plugin ' || plugin END FROM pg_replication_slots WHERE slot_name = $1",
    )
    .bind(slot)
    .fetch_optional(connection)
    .await
    .map_err(Error::postgres("read the replication slot"))?;
    Ok(row.map(|row| Slot {
        usable: row.get::<Option<bool>, _>(0).unwrap_or(false),
        confirmed: lsn(row.get(1)),
        active_pid: row.get(2),
        foreign: row.get(3),
    }))
}

/// Writes the row of a new epoch that goes on with the slot.
pub async fn renew(connection: &mut PgConnection) -> Result<Uuid, Error> {
    let epoch = Uuid::new_v4();
    sqlx::query("UPDATE millstream.epoch SET epoch = $1, at = now()")
        .bind(epoch)
        .execute(&mut *connection)
        .await
        .map_err(Error::postgres("write millstream.epoch"))?;
    all_visible(connection).await?;
    Ok(epoch)
}

/// Waits until whatever has committed by now can be seen: the new history does not tell of it, so the snapshots with which
/// clients begin must show it. Between a transaction's commit record and that it is seen there is a moment, in which nothing
/// tells it from one that is still at work; hence not for ever.
async fn all_visible(connection: &mut PgConnection) -> Result<(), Error> {
    /// How often it is checked.
    const POLL: Duration = Duration::from_millis(10);
    /// After this many checks, those that are not over are taken to be at work.
    const POLLS: u32 = 200;
    let begun: i64 = sqlx::query_scalar("SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint")
        .fetch_one(&mut *connection)
        .await
        .map_err(Error::postgres("read what is visible"))?;
    for _ in 0..POLLS {
        let over: bool = sqlx::query_scalar("SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint >= $1")
            .bind(begun)
            .fetch_one(&mut *connection)
            .await
            .map_err(Error::postgres("read what is visible"))?;
        if over {
            break;
        }
        tokio::time::sleep(POLL).await;
    }
    Ok(())
}

/// Writes the row of a new epoch and makes its slot. Returns the epoch and the LSN at which the slot begins: every
/// transaction with that commit LSN or a higher one will be decoded, every other one has ended.
pub async fn begin(
    connection: &mut PgConnection,
    slot: &str,
    system_identifier: &str,
    wait: &Wait,
) -> Result<(Uuid, Lsn), Error> {
    let epoch = Uuid::new_v4();
    sqlx::query(
        "INSERT INTO millstream.epoch (epoch, system_identifier, slot) VALUES ($1, $2, $3) \
         ON CONFLICT ON CONSTRAINT epoch_pkey DO UPDATE SET epoch = excluded.epoch, system_identifier = excluded.system_identifier, \
         slot = excluded.slot, at = now()",
    )
    .bind(epoch)
    .bind(system_identifier)
    .bind(slot)
    .execute(&mut *connection)
    .await
    .map_err(Error::postgres("write millstream.epoch"))?;
    if read_slot(connection, slot).await?.is_some() {
        release(connection, slot).await?;
        sqlx::query("SELECT pg_drop_replication_slot($1)")
            .bind(slot)
            .execute(&mut *connection)
            .await
            .map_err(Error::postgres("drop the replication slot"))?;
    }
    // From 17 on, the slot follows a fail-over to a standby that synchronises slots.
    let version: i32 = sqlx::query_scalar("SELECT current_setting('server_version_num')::int")
        .fetch_one(&mut *connection)
        .await
        .map_err(Error::postgres("read the server's version"))?;
    let create = if version >= 170_000 {
        "SELECT lsn::text FROM pg_create_logical_replication_slot($1, 'pgoutput', failover => true)"
    } else {
        "SELECT lsn::text FROM pg_create_logical_replication_slot($1, 'pgoutput')"
    };
    let pid: i32 = sqlx::query_scalar("SELECT pg_backend_pid()")
        .fetch_one(&mut *connection)
        .await
        .map_err(Error::postgres("ask for the connection's process"))?;
    let made = sqlx::query_scalar(create).bind(slot).fetch_one(&mut *connection);
    let made = tokio::select! {
        made = made => made,
        never = wait.tell(pid, slot) => match never {},
    };
    wait.is_over();
    let begins: String =
        made.map_err(Error::postgres("create the replication slot (it waits for open transactions)"))?;
    all_visible(connection).await?;
    Ok((epoch, lsn(begins)))
}

/// Ends the walsender that still uses the slot: the process that owned it is no longer leader.
pub async fn release(connection: &mut PgConnection, slot: &str) -> Result<(), Error> {
    /// How often the end of the walsender is checked.
    const POLL: Duration = Duration::from_millis(50);
    /// After this many checks the session gives up and starts over.
    const POLLS: u32 = 100;
    for _ in 0..POLLS {
        let Some(pid) = read_slot(connection, slot).await?.and_then(|slot| slot.active_pid) else { return Ok(()) };
        tracing::info!(postgres.pid = pid, "ending the walsender of a former leader");
        sqlx::query("SELECT pg_terminate_backend($1)")
            .bind(pid)
            .execute(&mut *connection)
            .await
            .map_err(Error::postgres("end the walsender of a former leader"))?;
        tokio::time::sleep(POLL).await;
    }
    Err(Error::LeaderLost)
}

fn lsn(text: String) -> Lsn {
    // Postgres writes its LSNs in the form that is parsed; were it ever otherwise, zero leads to a new epoch, not to a gap.
    text.parse().unwrap_or(Lsn::ZERO)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn history_goes_on_only_without_a_doubt() {
        let epoch = Uuid::from_u128(1);
        let source = SourceState {
            system_identifier: "7".into(),
            flushed: Lsn(1000),
            row: Some((epoch, "7".into(), "millstream".into())),
            slot: Some(Slot { usable: true, confirmed: Lsn(500), active_pid: None, foreign: None }),
        };
        let tail = Tail {
            epoch,
            lsn: Lsn(490),
            end_lsn: Lsn(500),
            previous: Lsn(400),
            last: true,
            schema: String::new(),
            landmark: None,
        };
        let check = |change: &dyn Fn(&mut SourceState, &mut Tail), expected: Result<(), Reason>| {
            let (mut source, mut tail) = (source.clone(), tail.clone());
            change(&mut source, &mut tail);
            assert_eq!(verdict("millstream", &source, Some(&tail)), expected);
        };
        assert_eq!(verdict("millstream", &source, None), Err(Reason::EmptyStream));
        check(&|_, _| {}, Ok(()));
        check(&|_, tail| tail.epoch = Uuid::from_u128(2), Err(Reason::OtherEpoch));
        check(&|source, _| source.row = None, Err(Reason::OtherEpoch));
        check(&|source, _| source.system_identifier = "8".into(), Err(Reason::OtherCluster));
        check(&|source, _| source.slot = None, Err(Reason::SlotLost));
        check(&|source, _| source.slot.as_mut().unwrap().usable = false, Err(Reason::SlotLost));
        check(&|source, _| source.row.as_mut().unwrap().2 = "other".into(), Err(Reason::SlotLost));
        check(&|source, _| source.flushed = Lsn(489), Err(Reason::PostgresBehind));
        check(&|source, _| source.slot.as_mut().unwrap().confirmed = Lsn(501), Err(Reason::StreamBehind));
        // Cut half-way: only what lies before the commit record can have been confirmed.
        check(&|_, tail| tail.last = false, Err(Reason::StreamBehind));
        check(
            &|source, tail| {
                tail.last = false;
                source.slot.as_mut().unwrap().confirmed = Lsn(490);
            },
            Ok(()),
        );
    }
}
