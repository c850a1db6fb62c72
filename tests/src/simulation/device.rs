//! A client's process and its files.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use millstream_client_core::outbox::Outbox;
use millstream_client_core::replica::Replica;
use millstream_client_store::{EntryState, Host, Reader, Store};
use millstream_schemas::{Position, Schema};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use uuid::Uuid;

use super::postgres::tables;

pub fn directory() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    let made = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
    made.expect("a directory for the stores")
}

/// A clock that is wrong by a day, or not, and random ids from a seed.
pub struct FakeHost {
    pub clock: Arc<AtomicU64>,
    pub skew: i64,
    pub rng: Mutex<StdRng>,
}

impl Host for FakeHost {
    fn now_micros(&self) -> u64 {
        self.clock.load(Ordering::Relaxed).saturating_add_signed(self.skew)
    }

    fn uuid(&self) -> Uuid {
        Uuid::from_u128(self.rng.lock().expect("the generator").random())
    }
}

pub struct Client {
    /// Which store of the checker.
    pub user: String,
    pub store: Option<Store>,
    pub reader: Option<Reader>,
    pub host: Arc<FakeHost>,
    pub path: PathBuf,
    pub outbox: Outbox,
    /// Session and its staging, from `welcome` on; before, the session alone.
    pub session: Option<usize>,
    pub replica: Option<Replica>,
    /// Which run of the process.
    pub run: u64,
    pub position: Option<Position>,
    /// Length of the write-ahead log when it was last synced: a power cut takes no byte of that.
    pub synced: u64,
}

/// A store that has its schema and no identity yet: made once, since that is slow.
pub fn template() -> &'static [u8] {
    static TEMPLATE: OnceLock<Vec<u8>> = OnceLock::new();
    TEMPLATE.get_or_init(|| {
        let directory = directory();
        let path = directory.path().join("template.db");
        let rng = Mutex::new(StdRng::seed_from_u64(0));
        let host = Arc::new(FakeHost { clock: Arc::default(), skew: 0, rng });
        let mut store = Store::open(&path.to_string_lossy(), host).expect("a store");
        let tables = tables().iter().map(|table| table.schema()).collect();
        store.install(&Schema { version: "1".into(), tables }).expect("a schema");
        drop(store);
        let connection = rusqlite::Connection::open(&path).expect("the store's file");
        connection.execute("DELETE FROM millstream_meta WHERE key = 'client_id'", []).expect("no identity");
        drop(connection);
        std::fs::read(&path).expect("the store's file")
    })
}

pub fn log_of(path: &Path) -> PathBuf {
    PathBuf::from(format!("{}-wal", path.display()))
}

pub fn length(path: &Path) -> u64 {
    std::fs::metadata(log_of(path)).map_or(0, |meta| meta.len())
}

impl Client {
    pub fn with(user: &str, store: Option<Store>, host: Arc<FakeHost>, path: PathBuf, synced: u64) -> Client {
        let mut client = Client {
            user: user.to_owned(),
            store,
            reader: None,
            host,
            path,
            outbox: Outbox::default(),
            session: None,
            replica: None,
            run: 0,
            position: None,
            synced,
        };
        client.opened();
        client
    }

    pub fn opened(&mut self) {
        let info = self.store().info().expect("the store's facts");
        self.outbox = Outbox::new(info.last_seq, info.confirmed_seq);
        self.position = info.position;
        self.reader = Reader::open(&self.path.to_string_lossy(), self.host.clone()).ok();
    }

    pub fn store(&mut self) -> &mut Store {
        self.store.as_mut().expect("an open store")
    }

    /// Copies the files as a crash leaves them; `power`: what was not synced may be gone.
    pub fn copy(&self, to: &Path, keep: u64) {
        std::fs::copy(&self.path, to).expect("a copy");
        if let Ok(log) = std::fs::read(log_of(&self.path)) {
            let keep = (keep as usize).min(log.len());
            std::fs::write(log_of(to), &log[..keep]).expect("a copy");
        }
    }

    /// Transactions that will be tried again by themselves.
    pub fn waiting(&mut self) -> usize {
        let failed = self.store().failed().expect("the failed ones");
        failed.iter().filter(|write| write.state == EntryState::RetryWait).count()
    }
}
