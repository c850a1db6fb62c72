//! A client's store under whatever a server may send.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use millstream_catalog::Table;
use millstream_client_core::replica::Replica;
use millstream_client_store::{Host, Store, StoreError};
use millstream_schemas::Schema;
use millstream_schemas::frame::{Resume, ServerFrame};
use uuid::Uuid;

use crate::tables::TABLES;

/// Frames, a line each: the store takes them or refuses them, and goes on taking the app's writes.
pub fn store(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let mut replica = Replica::new(Resume::Snapshot).spilling_above(100);
    let file = File::new();
    let mut store = Store::open(&file.0.to_string_lossy(), Arc::new(Counting::default())).expect("a new store");
    let schema = Schema { version: "1".into(), tables: TABLES.iter().map(Table::schema).collect() };
    store.install(&schema).expect("the tables are installed");
    write(&mut store, "INSERT INTO notices (id, text) VALUES (7, 'mine')");
    for line in text.lines() {
        let Ok(frame) = serde_json::from_str::<ServerFrame>(line) else { break };
        if replica.handle(frame, line.len()).is_err() || store.perform(&replica.take()).is_err() {
            break;
        }
    }
    write(&mut store, "INSERT OR REPLACE INTO notices (id, text) VALUES (8, 'also mine')");
    let queued = store.pending(0, 10).expect("the queue is read");
    assert!(queued.iter().any(|submit| submit.changes[0].key == [Some("8".to_owned())]), "{queued:?}");
}

fn write(store: &mut Store, sql: &str) {
    let written = store.write(None, |tx| tx.execute(sql, &[]));
    let written: Result<_, StoreError> = written;
    assert!(written.expect("the app's write").recorded.is_some());
}

/// Time stands still; ids count.
#[derive(Default)]
struct Counting {
    ids: AtomicU64,
}

impl Host for Counting {
    fn now_micros(&self) -> u64 {
        1_000
    }

    fn uuid(&self) -> Uuid {
        Uuid::from_u128(u128::from(self.ids.fetch_add(1, Ordering::Relaxed) + 1))
    }
}

/// A file of this run, in memory where the system has such a folder; gone in the end.
struct File(PathBuf);

impl File {
    fn new() -> File {
        static FILES: AtomicU64 = AtomicU64::new(0);
        let memory = PathBuf::from("/dev/shm");
        let folder = if memory.is_dir() { memory } else { std::env::temp_dir() };
        let number = FILES.fetch_add(1, Ordering::Relaxed);
        File(folder.join(format!("millstream-fuzz-{}-{number}.db", std::process::id())))
    }
}

impl Drop for File {
    fn drop(&mut self) {
        for end in ["", "-wal", "-shm"] {
            // What is not there need not go.
            let _ = std::fs::remove_file(format!("{}{end}", self.0.display()));
        }
    }
}
