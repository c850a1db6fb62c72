//! What could not be carried and was passed over: counted, told in the log once per table and minute, and noted in the
//! health report.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use millstream_runtime::health::Health;
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
}

/// Where it is told. Cheap to clone.
#[derive(Clone)]
pub struct Report {
    health: Health,
    rows: Counter<u64>,
    origins: Counter<u64>,
    epochs: Counter<u64>,
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
            health,
            rows: counter("rows_withdrawn", "rows that no message can carry, withdrawn from clients"),
            origins: counter("origins_left_out", "entries of origin records for which there was no room"),
            epochs: counter("epochs_by_content", "epochs begun because a transaction could not be carried"),
            told: Arc::default(),
        }
    }

    /// Tells of something that was passed over in the transaction with this commit LSN and id.
    pub fn tell(&self, left_out: &LeftOut, lsn: Lsn, xid: u32) {
        let (about, rows) = match left_out {
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
            LeftOut::Origins { entries } => tracing::error!(
                entries, wal.lsn = %lsn, wal.xid = xid, times,
                "an origin record is too large: some clients learn of their verdicts from the ledger"
            ),
        }
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
