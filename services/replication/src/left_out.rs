//! What could not be carried and was passed over: counted, told in the log once per table and minute, and noted in the
//! health report.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use millstream_catalog::{Catalog, Misfit};
use millstream_runtime::health::{Asides, Health};
use millstream_runtime::telemetry::{Counter, KeyValue, meter};
use millstream_schemas::Lsn;

/// The log tells of a table's rows, and of origin records, at most once in this time.
const LOG_INTERVAL: Duration = Duration::from_secs(60);
/// Stands for origin records among the names of tables, none of which is empty.
const ORIGINS: &str = "";

/// Something that was passed over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LeftOut {
    /// A row that no message can carry: withdrawn from clients by its key.
    Row {
        /// Its table.
        table: String,
    },
    /// A row whose key no message can carry: clients never had it, nor do they get it.
    Key {
        /// Its table.
        table: String,
    },
    /// Entries of origin records, for which there was no room: these clients learn of their verdicts from the ledger.
    Origins {
        /// How many.
        entries: usize,
    },
    /// Changes of a table that cannot be told row by row: it is sent again as a whole.
    Again {
        /// The table.
        table: String,
        /// Why.
        why: Again,
        /// Not yet: it was sent again a moment ago.
        late: bool,
    },
}

/// Why a table is sent again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Again {
    /// A delete, or an update, of which the change stream does not say whose row it was.
    Unroutable,
    /// More rows changed their keys in one transaction than are kept to find out what became of each key.
    Keys,
    /// The database says that it is to be: see `content.rs`.
    Asked,
}

/// Where it is told. Cheap to clone.
#[derive(Clone)]
pub struct Report {
    asides: Arc<Asides>,
    health: Health,
    rows: Counter<u64>,
    origins: Counter<u64>,
    epochs: Counter<u64>,
    again: Counter<u64>,
    /// When the log told of a table last, and how often there was something to tell since.
    told: Arc<Mutex<HashMap<String, (Instant, u64)>>>,
}

impl Report {
    /// Counts from now on, where metrics are on.
    pub fn register(health: Health) -> Report {
        let meter = meter();
        let counter = |name: &'static str, description: &'static str| {
            meter.u64_counter(format!("millstream.replication.{name}")).with_description(description).build()
        };
        Report {
            asides: Arc::new(Asides::new(health.clone())),
            health,
            rows: counter("rows_withdrawn", "rows that no message can carry, withdrawn from clients"),
            origins: counter("origins_left_out", "entries of origin records for which there was no room"),
            epochs: counter("epochs_by_content", "epochs begun because a transaction could not be carried"),
            again: counter(
                "tables_sent_again",
                "tables sent to clients again, since rows had changed without a message",
            ),
            told: Arc::default(),
        }
    }

    /// Tells of something that was passed over in the transaction with this commit LSN and id.
    pub fn tell(&self, left_out: &LeftOut, lsn: Lsn, xid: u32) {
        let (about, rows) = match left_out {
            LeftOut::Again { table, why, late } => {
                return self.again(table, *why, *late, lsn, xid);
            }
            LeftOut::Row { table } | LeftOut::Key { table } => {
                self.rows.add(1, &[KeyValue::new("table", table.clone())]);
                (table.as_str(), true)
            }
            LeftOut::Origins { entries } => {
                self.origins.add(*entries as u64, &[]);
                (ORIGINS, false)
            }
        };
        let Some(times) = self.is_due(about, Instant::now()) else { return };
        if rows {
            let note = "some are too large for clients, or not text, and were withdrawn; see the log";
            self.health.set_note(&format!("rows of {about}"), Some(note));
        } else {
            self.health.set_note("origin records", Some("some are too large; their clients read the ledger"));
        }
        match left_out {
            LeftOut::Row { table } => tracing::error!(
                table.name = table, wal.lsn = %lsn, wal.xid = xid, times,
                "a row that is too large for clients, or not text, is withdrawn from them"
            ),
            LeftOut::Key { table } => tracing::error!(
                table.name = table, wal.lsn = %lsn, wal.xid = xid, times,
                "a row whose key is not there, or too large for clients, is left out"
            ),
            LeftOut::Again { .. } => {}
            LeftOut::Origins { entries } => tracing::error!(
                entries, wal.lsn = %lsn, wal.xid = xid, times,
                "an origin record is too large: some clients learn of their verdicts from the ledger"
            ),
        }
    }

    /// Tables that cannot be synced as they are.
    pub fn aside(&self, catalog: &Catalog) {
        self.asides.tell(catalog.aside.iter().map(|aside| (aside.table.as_str(), aside.why.as_str())));
    }

    /// A table, or what holds its rows, is not as it should be. All others go on.
    pub fn misfit(&self, misfit: &Misfit) {
        let Some(_) = self.is_due(&format!("{} misfit {}", misfit.table, misfit.message), Instant::now()) else {
            return;
        };
        self.health.set_note(&format!("table {}", misfit.table), Some(&misfit.message));
        tracing::error!(table.name = misfit.table, fix = misfit.fix, "{}", misfit.message);
    }

    /// A table is sent again.
    fn again(&self, table: &str, why: Again, late: bool, lsn: Lsn, xid: u32) {
        if !late {
            self.again.add(1, &[KeyValue::new("table", table.to_owned())]);
        }
        let (reason, remedy) = match why {
            Again::Unroutable => (
                "deletes or updates do not say whose rows they were of",
                "give every partition, or the table, the replica identity that `millstream check` asks for",
            ),
            Again::Keys => (
                "more rows changed their keys in one transaction than are kept in memory",
                "change keys in smaller transactions",
            ),
            Again::Asked if late => return,
            Again::Asked => {
                tracing::warn!(table.name = table, wal.lsn = %lsn, wal.xid = xid, "a table is sent to clients again");
                return;
            }
        };
        let Some(times) = self.is_due(&format!("{table} again"), Instant::now()) else { return };
        let note = format!("{reason}: it is sent to clients again, at most every 10 s. {remedy}");
        self.health.set_note(&format!("changes of {table}"), Some(&note));
        tracing::error!(
            table.name = table, wal.lsn = %lsn, wal.xid = xid, times, reason, remedy,
            "a table is sent to clients again, since its changes cannot be told row by row"
        );
    }

    /// An epoch has begun because a transaction could not be carried.
    pub fn epoch(&self) {
        self.epochs.add(1, &[]);
        let note = "one could not be carried: a new epoch was begun behind it; see the log";
        self.health.set_note("transactions", Some(note));
    }

    /// How often there was something to tell since the log told of it last; `None` if that was just now.
    fn is_due(&self, about: &str, now: Instant) -> Option<u64> {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        match told.get_mut(about) {
            Some((at, times)) if now.saturating_duration_since(*at) < LOG_INTERVAL => {
                *times += 1;
                None
            }
            Some((at, times)) => {
                *at = now;
                Some(std::mem::take(times) + 1)
            }
            None => {
                told.insert(about.to_owned(), (now, 0));
                Some(1)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_tells_of_a_table_once_a_minute() {
        let report = Report::register(Health::new());
        let begin = Instant::now();
        for (table, second, expected) in [
            ("docs", 0, Some(1)),
            ("docs", 1, None),
            ("tasks", 2, Some(1)),
            ("docs", 59, None),
            ("docs", 60, Some(3)),
            ("docs", 61, None),
        ] {
            assert_eq!(report.is_due(table, begin + Duration::from_secs(second)), expected, "{table} {second}");
        }
    }

    #[test]
    fn health_names_the_table() {
        let health = Health::new();
        let report = Report::register(health.clone());
        report.tell(&LeftOut::Row { table: "docs".into() }, Lsn(1), 2);
        assert!(health.text().contains("rows of docs: "), "{}", health.text());
    }
}
