//! Damaged stores, on real files: nothing undamaged is lost, nothing wrong is told, and the next opening goes on.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use millstream_client_store::{
    Damage, EntryState, ImportOutcome, Imported, Reader, Saved, SavedError, SavedTransaction, Store, StoreError,
};
use millstream_schemas::{Change, Code, Operation};
use rusqlite::Connection;
use uuid::Uuid;

use super::fixture::{FakeHost, Fixture, confirmed, failed, fixture, insert, schema, set_format, task, update, upsert};

const PAGE: usize = 4096;
const FRAME: usize = 24 + PAGE;
const LOG_HEADER: usize = 32;
const NOW: u64 = 1_764_392_400_000_000;

/// Xorshift: the same damages every time.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % bound.max(1) as u64) as usize
    }

    fn fill(&mut self, bytes: &mut [u8]) {
        bytes.fill_with(|| self.below(256) as u8);
    }
}

pub fn host() -> Arc<FakeHost> {
    Arc::new(FakeHost { now: AtomicU64::new(NOW), ids: AtomicU64::new(1 << 40) })
}

/// The files of a store.
#[derive(Clone)]
struct Files {
    database: Vec<u8>,
    log: Option<Vec<u8>>,
}

impl Files {
    fn of(path: &str) -> Files {
        Files { database: std::fs::read(path).unwrap(), log: std::fs::read(format!("{path}-wal")).ok() }
    }

    /// Writes them, as the SDK leaves them: with its lock file.
    fn write(&self, directory: &Path) -> PathBuf {
        let path = directory.join("store.db");
        std::fs::write(&path, &self.database).unwrap();
        std::fs::write(directory.join("store.db-lock"), "").unwrap();
        if let Some(log) = &self.log {
            std::fs::write(directory.join("store.db-wal"), log).unwrap();
        }
        path
    }
}

/// An entry of the queue: its transaction, its state and its change.
type Entries = Vec<(u64, EntryState, Change)>;

fn entries(store: &Store) -> Entries {
    store.entries(100_000).unwrap().into_iter().map(|entry| (entry.tx, entry.state, entry.change)).collect()
}

/// A queue with everything in it: settled, rejected, held and waiting entries, large ones and transactions of several changes.
fn scene() -> (Fixture, Entries) {
    let mut f = fixture();
    f.apply(vec![upsert((0..300).map(|n| task(&format!("server {n}"), "p", "from the server", false)).collect())]);
    for n in 0..40 {
        insert(&mut f, &format!("settled {n}"));
    }
    f.apply(vec![confirmed(40)]);
    insert(&mut f, "rejected");
    f.apply(vec![failed(41, Code::PermissionDenied)]);
    update(&mut f, "rejected", "held");
    for n in 0..120 {
        insert(&mut f, &format!("single {n}"));
    }
    for n in 0..12 {
        let statements: Vec<String> =
            (0..8).map(|k| format!("INSERT INTO tasks (id, title) VALUES ('part {n} {k}', 'x')")).collect();
        f.write(&statements.iter().map(String::as_str).collect::<Vec<_>>()).unwrap();
    }
    for n in 0..10 {
        let text = format!("fill-{n:03}-").repeat(2_000);
        f.write(&[&format!("INSERT INTO tasks (id, title) VALUES ('large {n}', '{text}')")]).unwrap();
    }
    for n in 0..120 {
        f.write(&[&format!("UPDATE tasks SET title = 'mine' WHERE id = 'server {n}'")]).unwrap();
    }
    let entries = entries(&f.store);
    (f, entries)
}

fn unsent(entries: &Entries) -> BTreeMap<Uuid, &Change> {
    let unsettled = entries.iter().filter(|(_, state, _)| *state != EntryState::Confirmed);
    unsettled.map(|(_, _, change)| (change.change_id, change)).collect()
}

/// On which pages of the queue each entry lies.
fn pages(path: &str, entries: &Entries) -> BTreeMap<Uuid, Vec<usize>> {
    let bytes = std::fs::read(path).unwrap();
    let connection = Connection::open(path).unwrap();
    let mut statement = connection.prepare("SELECT pageno, pagetype FROM dbstat WHERE name = 'local_changes'").unwrap();
    let found: Vec<(usize, String)> = statement
        .query_map([], |row| Ok((row.get::<_, i64>(0)? as usize, row.get(1)?)))
        .unwrap()
        .collect::<Result<_, _>>()
        .unwrap();
    let holds = |page: usize, text: &str| {
        bytes[(page - 1) * PAGE..page * PAGE].windows(text.len()).any(|window| window == text.as_bytes())
    };
    let of = |change: &Change| {
        let marker = change.values.iter().flatten().find_map(|value| value.starts_with("fill-").then(|| &value[..9]));
        found
            .iter()
            .filter(|(page, kind)| match (&**kind, marker) {
                ("leaf", _) => holds(*page, &change.change_id.to_string()),
                ("overflow", Some(marker)) => holds(*page, marker),
                _ => false,
            })
            .map(|(page, _)| *page)
            .collect()
    };
    entries.iter().map(|(_, _, change)| (change.change_id, of(change))).collect()
}

#[track_caller]
fn damage(error: StoreError, case: &str) -> Arc<Damage> {
    match error {
        StoreError::Damaged(damage) => damage,
        error => panic!("{case}: {error}: {:?}", std::error::Error::source(&error)),
    }
}

fn saved(damage: &Damage) -> (Option<Saved>, BTreeMap<Uuid, Change>) {
    let aside = damage.aside.as_ref().unwrap();
    let saved = aside.saved.as_ref().map(|path| Saved::read(path).unwrap());
    let changes = saved.iter().flat_map(|saved| &saved.transactions).flat_map(|tx| &tx.changes);
    let changes = changes.map(|change| (change.change_id, change.clone())).collect();
    (saved, changes)
}

/// A fresh store opens where the damaged one was, with another identity, and takes the saved changes.
fn goes_on(path: &Path, old: Uuid, damage: &Damage, case: &str) {
    let text = damage.to_string();
    let aside = damage.aside.as_ref().unwrap();
    assert!(text.contains("damaged-1764392400") && text.contains("Open the store again"), "{case}: {text}");
    let moved = |suffix: &str| PathBuf::from(format!("{}{suffix}", aside.damaged.display())).exists();
    assert!(moved("") || moved("-wal"), "{case}: nothing of it is thrown away");
    let mut store = Store::open(path.to_str().unwrap(), host()).unwrap();
    assert_ne!(store.info().unwrap().client_id, old, "{case}");
    assert_eq!(store.info().unwrap().last_seq, 0, "{case}");
    store.install(&schema()).unwrap();
    let Some(saved) = saved(damage).0 else { return };
    let imported = store.import(&saved).unwrap();
    assert_eq!(imported.len(), saved.transactions.len(), "{case}");
    // Nobody can tell that a letter of a table's name is not the one that was written: such a change is kept.
    let is_insert = |change: &Change| change.op == Operation::Insert && change.table == "tasks";
    let inserts = |tx: &&SavedTransaction| tx.complete && tx.changes.iter().all(is_insert);
    let applied = saved.transactions.iter().filter(inserts).count();
    let recorded = imported.iter().filter(|i| matches!(i.outcome, ImportOutcome::Recorded { .. })).count();
    assert!(recorded >= applied, "{case}: {recorded} of {applied}: {imported:?}");
    let again = store.import(&saved).unwrap();
    assert!(!again.iter().any(|i| matches!(i.outcome, ImportOutcome::Recorded { .. })), "{case}: each once");
    store.write::<_, StoreError>(None, |tx| tx.execute("INSERT INTO tasks (id) VALUES ('later')", &[])).unwrap();
    assert_eq!(store.pending(0, 10_000).unwrap().len(), recorded + 1, "{case}");
}

fn hurt(random: &mut Random, kind: usize, bytes: &mut Vec<u8>) -> String {
    let pages = bytes.len() / PAGE;
    let page = |n: usize| n * PAGE..(n + 1) * PAGE;
    match kind {
        0 => {
            let length = random.below(bytes.len());
            bytes.truncate(length);
            format!("cut at {length}")
        }
        1 => {
            let n = random.below(pages);
            random.fill(&mut bytes[page(n)]);
            format!("page {} is noise", n + 1)
        }
        2 => {
            let n = random.below(pages);
            bytes[page(n)].fill(0);
            format!("page {} is zero", n + 1)
        }
        3 => {
            let (from, to) = (random.below(pages), random.below(pages));
            let copy = bytes[page(from)].to_vec();
            bytes[page(to)].copy_from_slice(&copy);
            format!("page {} is where {} was", from + 1, to + 1)
        }
        4 => {
            let (n, most) = (random.below(pages), random.below(15) + 1);
            let at = n * PAGE + if n == 0 { 100 } else { 0 };
            random.fill(&mut bytes[at..at + most]);
            format!("the first {most} bytes of page {}", n + 1)
        }
        5 => {
            for _ in 0..8 {
                let n = random.below(pages);
                random.fill(&mut bytes[page(n)]);
            }
            "eight pages are noise".to_owned()
        }
        6 => {
            let (at, length) = (random.below(bytes.len() - 600), random.below(512) + 1);
            random.fill(&mut bytes[at..at + length]);
            format!("{length} bytes at {at}")
        }
        _ => {
            let (at, bit) = (random.below(bytes.len()), random.below(8));
            bytes[at] ^= 1 << bit;
            format!("bit {bit} of byte {at}, page {}", at / PAGE + 1)
        }
    }
}

/// Opens a damaged store and holds what comes of it against what was there.
fn check_database(
    case: &str,
    files: &Files,
    before: &Files,
    old: Uuid,
    all: &Entries,
    pages: &BTreeMap<Uuid, Vec<usize>>,
) -> bool {
    let directory = tempfile::tempdir().unwrap();
    let path = files.write(directory.path());
    let same = |page: &usize| {
        let range = (page - 1) * PAGE..page * PAGE;
        files.database.get(range.clone()) == before.database.get(range)
    };
    // An id that is not known has changed with its page.
    let intact = |id: &Uuid| pages.get(id).is_some_and(|pages| pages.iter().all(same));
    let expected = unsent(all);
    let error = match Store::open(path.to_str().unwrap(), host()) {
        Err(error) => Some(error),
        Ok(mut store) => {
            // What the queue tells is what was there, but for bytes of values, which nothing vouches for.
            let found = match store.entries(100_000) {
                Ok(_) => entries(&store),
                Err(error) => {
                    assert!(error.is_damage(), "{case}: {error}");
                    let damage = damage(store.put_aside(error), case);
                    goes_on(&path, old, &damage, case);
                    return true;
                }
            };
            let ids: Vec<Uuid> = found.iter().map(|(_, _, change)| change.change_id).collect();
            let known: Vec<Uuid> = all.iter().map(|(_, _, change)| change.change_id).collect();
            if pages.values().flatten().all(same) {
                assert_eq!(ids, known, "{case}");
            }
            for (found, before) in found.iter().zip(all).filter(|(_, (_, _, change))| intact(&change.change_id)) {
                assert_eq!(found, before, "{case}");
            }
            let checked = Reader::open(path.to_str().unwrap(), host()).and_then(|reader| reader.check(|| false));
            checked.err().map(|error| {
                assert!(error.is_damage(), "{case}: {error}");
                store.put_aside(error)
            })
        }
    };
    let Some(error) = error else { return false };
    let damage = damage(error, case);
    let (_, found) = saved(&damage);
    for (id, change) in &expected {
        if intact(id) {
            assert_eq!(found.get(id), Some(*change), "{case}: {change:?} is not saved");
        }
    }
    for id in found.keys() {
        assert!(expected.contains_key(id) || !intact(id), "{case}: what is settled is not unsent");
    }
    goes_on(&path, old, &damage, case);
    true
}

#[test]
fn a_damaged_file_is_put_aside_with_everything_that_reads() {
    let (Fixture { store, path, directory, .. }, all) = scene();
    let old = store.info().unwrap().client_id;
    drop(store);
    let before = Files::of(&path);
    assert!(before.log.is_none(), "closed");
    let pages = pages(&path, &all);
    assert!(pages.values().all(|pages| !pages.is_empty()));
    assert!(pages.values().any(|pages| pages.len() > 3), "some have overflow pages");
    drop(directory);

    assert!(!check_database("sound", &before, &before, old, &all, &pages));
    let check = |case: &str, database: Vec<u8>| {
        check_database(case, &Files { database, log: None }, &before, old, &all, &pages)
    };
    for tenth in 0..10 {
        let length = before.database.len() * tenth / 10;
        assert!(check(&format!("cut at {tenth} tenths"), before.database[..length].to_vec()), "{tenth} tenths");
    }
    let mut random = Random(0x9E37_79B9_7F4A_7C15);
    for length in [16, 24, 100, PAGE] {
        for noise in [false, true] {
            let mut bytes = before.database.clone();
            bytes[..length].fill(0);
            if noise {
                random.fill(&mut bytes[..length]);
            }
            assert!(check(&format!("header of {length} bytes, noise: {noise}"), bytes));
        }
    }
    let mut found = [(0, 0); 8];
    for n in 0..200 {
        let kind = n % 8;
        let mut bytes = before.database.clone();
        let what = hurt(&mut random, kind, &mut bytes);
        let detected = check(&format!("{n}: {what}"), bytes);
        found[kind].0 += usize::from(detected);
        found[kind].1 += 1;
    }
    println!("noticed, of: {found:?}");
    assert!(found[..6].iter().map(|(detected, _)| detected).sum::<usize>() > 120, "{found:?}");
}

/// Where the frames of each committed transaction of a log end.
fn commits(log: &[u8]) -> Vec<usize> {
    let salt = &log[16..24];
    let frames = log[LOG_HEADER..].chunks_exact(FRAME).enumerate().take_while(|(_, frame)| &frame[8..16] == salt);
    frames.filter(|(_, frame)| frame[4..8] != [0; 4]).map(|(n, _)| LOG_HEADER + (n + 1) * FRAME).collect()
}

#[test]
fn a_damaged_log_is_not_taken_for_a_shorter_one() {
    let mut f = fixture();
    f.apply(vec![upsert(vec![task("a", "p", "server", false)])]);
    f.store.prune(0).unwrap();
    for n in 0..60 {
        insert(&mut f, &format!("{n}"));
    }
    let (all, old) = (entries(&f.store), f.store.info().unwrap().client_id);
    let before = Files::of(&f.path);
    let log = before.log.clone().unwrap();
    let commits = commits(&log);
    let (last_start, end) = (commits[commits.len() - 2], *commits.last().unwrap());
    assert!(commits.len() > 60);
    let mut random = Random(7);
    let mut found = 0;
    for n in 0..80 {
        let mut bytes = log.clone();
        let (what, at, cut) = match n % 5 {
            0 => {
                let length = if n < 50 { bytes.len() * (n / 5) / 10 } else { random.below(bytes.len()) };
                bytes.truncate(length);
                (format!("cut at {length}"), length, true)
            }
            1 => {
                let at = random.below(LOG_HEADER);
                bytes[at] ^= 0x55;
                (format!("header, byte {at}"), 0, false)
            }
            2 => {
                let (at, bit) = (LOG_HEADER + random.below(end - LOG_HEADER), random.below(8));
                bytes[at] ^= 1 << bit;
                (format!("a bit at {at}"), at, false)
            }
            3 => {
                let at = LOG_HEADER + random.below((end - LOG_HEADER) / FRAME) * FRAME;
                random.fill(&mut bytes[at..at + FRAME]);
                (format!("the frame at {at} is noise"), at, false)
            }
            _ => {
                let at = random.below(end - 5_000);
                bytes[at..at + 5_000].fill(0);
                (format!("5,000 zeros at {at}"), at, false)
            }
        };
        let case = format!("{n}: {what} of {end}");
        let directory = tempfile::tempdir().unwrap();
        let path = Files { log: Some(bytes.clone()), ..before.clone() }.write(directory.path());
        match Store::open(path.to_str().unwrap(), host()) {
            Ok(store) => {
                assert!(cut || at >= last_start, "{case} was not noticed");
                // As after a power cut: what is there is a beginning of what was.
                let queue = entries(&store);
                assert_eq!(queue[..], all[..queue.len()], "{case}");
                assert!(queue.len() >= commits.iter().filter(|end| **end <= at).count().saturating_sub(20), "{case}");
            }
            Err(error) => {
                found += 1;
                let damage = damage(error, &case);
                let (_, saved) = saved(&damage);
                for (_, _, change) in &all {
                    let id = change.change_id.to_string();
                    let copies = (LOG_HEADER..last_start).step_by(FRAME).filter(|at| {
                        let frame = &log[*at..at + FRAME];
                        bytes.get(*at..at + FRAME) == Some(frame)
                            && frame[24] == 0x0d
                            && frame.windows(id.len()).any(|window| window == id.as_bytes())
                    });
                    if copies.count() > 0 {
                        assert_eq!(saved.get(&change.change_id), Some(change), "{case}");
                    }
                }
                goes_on(&path, old, &damage, &case);
            }
        }
    }
    assert!(found > 50, "{found}");
}

#[test]
fn a_log_without_its_database_is_not_thrown_away() {
    let (f, all) = scene();
    let (old, before) = (f.store.info().unwrap().client_id, Files::of(&f.path));
    for empty in [true, false] {
        let directory = tempfile::tempdir().unwrap();
        let path = Files { database: Vec::new(), log: before.log.clone() }.write(directory.path());
        if !empty {
            std::fs::remove_file(&path).unwrap();
        }
        let damage = damage(Store::open(path.to_str().unwrap(), host()).err().unwrap(), "no database");
        let (_, found) = saved(&damage);
        assert!(found.keys().all(|id| unsent(&all).contains_key(id)));
        goes_on(&path, old, &damage, &format!("empty: {empty}"));
    }
}

/// A store is damaged under a process that has it open, and another one has it open too.
#[test]
fn damage_under_a_running_store_ends_it_for_every_process() {
    let (mut f, all) = scene();
    let (old, path) = (f.store.info().unwrap().client_id, f.path.clone());
    std::fs::write(format!("{path}-lock"), "").unwrap();
    let mut other = Store::open(&path, host()).unwrap();
    // Noise in every second page of the log, and in all but the first of the database.
    let mut random = Random(3);
    let mut log = std::fs::read(format!("{path}-wal")).unwrap();
    for at in (LOG_HEADER..log.len() - FRAME).step_by(2 * FRAME) {
        random.fill(&mut log[at + 24..at + FRAME]);
    }
    use std::os::unix::fs::FileExt as _;
    std::fs::File::options().write(true).open(format!("{path}-wal")).unwrap().write_all_at(&log, 0).unwrap();
    let reader = Reader::open(&path, f.host.clone()).unwrap();
    let error = reader.check(|| false).err().unwrap();
    assert!(error.is_damage(), "{error}");
    let error = f.store.put_aside(error);
    let damage = damage(error, "running");
    let (_, found) = saved(&damage);
    assert!(!found.is_empty() && found.keys().all(|id| unsent(&all).contains_key(id)));
    // The other one neither writes into what was put aside nor takes the new store's log with it.
    let written = other.write::<_, StoreError>(None, |tx| tx.execute("INSERT INTO tasks (id) VALUES ('x')", &[]));
    assert!(matches!(written, Err(StoreError::Moved)), "{written:?}");
    assert!(matches!(other.changed_elsewhere(), Err(StoreError::Moved)));
    let group = other.group(|_| ());
    assert!(matches!(group, Err(StoreError::Moved)), "{group:?}");
    let mut fresh = Store::open(&path, host()).unwrap();
    fresh.install(&schema()).unwrap();
    fresh.write::<_, StoreError>(None, |tx| tx.execute("INSERT INTO tasks (id) VALUES ('y')", &[])).unwrap();
    assert!(matches!(other.put_aside(StoreError::Inconsistent("late".into())), StoreError::Moved));
    drop((other, reader));
    std::mem::forget(fresh);
    let fresh = Store::open(&path, host()).unwrap();
    assert_ne!(fresh.info().unwrap().client_id, old);
    assert_eq!(fresh.pending(0, 10).unwrap().len(), 1);
    drop(f);
}

#[test]
fn what_is_not_damaged_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let listed = |directory: &Path| -> BTreeSet<String> {
        let names = std::fs::read_dir(directory).unwrap();
        names.map(|name| name.unwrap().file_name().into_string().unwrap()).collect()
    };
    // Something else.
    let path = directory.path().join("letter.txt");
    std::fs::write(&path, "Dear database, ".repeat(1_000)).unwrap();
    let error = Store::open(path.to_str().unwrap(), host()).err().unwrap();
    assert!(matches!(error, StoreError::Sqlite { .. }), "{error}");
    assert_eq!(listed(directory.path()), BTreeSet::from(["letter.txt".to_owned()]));
    // A folder, and a place that is not there.
    for path in [directory.path().to_owned(), directory.path().join("no/store.db")] {
        let error = Store::open(path.to_str().unwrap(), host()).err().unwrap();
        assert!(!error.is_damage() && error.lost().is_none(), "{error}");
    }
    // A newer format.
    let f = fixture();
    set_format(&f.path, 99);
    drop(f.store);
    assert!(matches!(Store::open(&f.path, host()), Err(StoreError::TooNew { .. })));
    assert!(Path::new(&f.path).exists());
    // An empty file that nobody has used yet.
    let path = directory.path().join("new.db");
    std::fs::write(&path, "").unwrap();
    Store::open(path.to_str().unwrap(), host()).unwrap();
    // By the codes.
    use rusqlite::ffi;
    for (code, is_damage) in [
        (ffi::SQLITE_CORRUPT, true),
        (ffi::SQLITE_NOTADB, true),
        (ffi::SQLITE_CORRUPT_INDEX, true),
        (ffi::SQLITE_BUSY, false),
        (ffi::SQLITE_LOCKED, false),
        (ffi::SQLITE_FULL, false),
        (ffi::SQLITE_PERM, false),
        (ffi::SQLITE_READONLY, false),
        (ffi::SQLITE_CANTOPEN, false),
        (ffi::SQLITE_IOERR, false),
        (ffi::SQLITE_NOMEM, false),
        (ffi::SQLITE_CONSTRAINT, false),
    ] {
        let error = || rusqlite::Error::SqliteFailure(ffi::Error::new(code), None);
        assert_eq!(StoreError::Statement(error()).is_damage(), is_damage, "{code}");
        assert_eq!(StoreError::Sqlite { operation: "a test", source: error() }.is_damage(), is_damage, "{code}");
    }
}

/// A disk without room: nothing is moved and nothing is half written.
#[test]
fn what_cannot_be_saved_is_not_moved() {
    let (f, _) = scene();
    let Fixture { store, path, .. } = f;
    drop(store);
    let mut files = Files::of(&path);
    files.database[PAGE..20 * PAGE].fill(0);
    let directory = tempfile::tempdir().unwrap();
    let nested = directory.path().join("x".repeat(200));
    std::fs::create_dir(&nested).unwrap();
    // A name so long that there is no room for what is put behind it.
    let path = nested.join("s".repeat(250));
    std::fs::write(&path, &files.database).unwrap();
    let error = Store::open(path.to_str().unwrap(), host()).err().unwrap();
    assert!(matches!(&error, StoreError::Damaged(_)) && error.to_string().contains("nothing was moved"), "{error}");
    assert_eq!(std::fs::read(&path).unwrap().len(), files.database.len());
}

fn change(op: Operation, id: &str, columns: &[(&str, &str)], stamp: u64) -> Change {
    Change {
        change_id: Uuid::from_u128(u128::from(stamp)),
        table: "tasks".into(),
        op,
        key: vec![Some(id.into())],
        columns: columns.iter().map(|(name, _)| (*name).to_owned()).collect(),
        values: columns.iter().map(|(_, value)| Some((*value).to_owned())).collect(),
        adds: Vec::new(),
        gone: false,
        stamp,
    }
}

#[test]
fn saved_changes_are_recorded_in_order_with_their_stamps_and_each_once() {
    let mut f = fixture();
    f.apply(vec![upsert(vec![task("a", "p", "server", false), task("b", "p", "server", true)])]);
    let transaction = |tx: u64, complete: bool, changes: Vec<Change>| SavedTransaction {
        tx,
        client_seq: Some(tx),
        state: EntryState::Pending,
        recorded_at: 1,
        complete,
        changes,
    };
    let insert = |id: &str, title: &str, stamp| {
        change(Operation::Insert, id, &[("id", id), ("title", title), ("done", "t"), ("photo", "\\x00ff")], stamp)
    };
    let mut saved = Saved {
        format: 1,
        client_id: Some(Uuid::from_u128(9)),
        saved_at: 1,
        unreadable: 0,
        transactions: vec![
            transaction(
                3,
                true,
                vec![insert("n", "new", 20), change(Operation::Update, "a", &[("title", "mine")], 21)],
            ),
            transaction(4, true, vec![change(Operation::Update, "b", &[("done", "t")], 22)]),
            transaction(5, true, vec![change(Operation::Delete, "gone", &[], 23)]),
            transaction(6, true, vec![insert("m", "whole or not at all", 24), insert("a", "taken", 25)]),
            transaction(7, true, vec![change(Operation::Update, "gone", &[("title", "x")], 26)]),
            transaction(8, true, vec![change(Operation::Update, "a", &[("created_at", "x")], 27)]),
            transaction(9, false, vec![change(Operation::Update, "a", &[("done", "t")], 28)]),
            transaction(10, true, vec![change(Operation::Update, "a", &[("no_more", "x")], 29)]),
            transaction(11, true, vec![insert("n", "new", 30), change(Operation::Delete, "b", &[], 31)]),
        ],
    };
    let outcomes = |imported: Vec<Imported>| -> Vec<String> {
        let word = |outcome| match outcome {
            ImportOutcome::Recorded { as_tx } => format!("as {as_tx}"),
            ImportOutcome::Present => "present".to_owned(),
            ImportOutcome::Before => "before".to_owned(),
            ImportOutcome::Kept { reason } => reason,
        };
        imported.into_iter().map(|imported| word(imported.outcome)).collect()
    };
    let first = outcomes(f.store.import(&saved).unwrap());
    assert_eq!((&*first[0], &*first[1], &*first[2], &*first[8]), ("as 1", "present", "present", "as 2"));
    assert!(first[3].contains("the row is there, with other values"), "{first:?}");
    assert!(first[4].contains("the row is not there"), "{first:?}");
    assert!(first[5].contains("not writable"), "{first:?}");
    assert!(first[6].contains("may not have been readable"), "{first:?}");
    assert!(first[7].contains("an unknown column"), "{first:?}");
    assert_eq!(f.tasks(), "a|mine|0\nn|new|1");
    let recorded = f.store.pending(0, 10).unwrap();
    let stamps: Vec<Vec<u64>> =
        recorded.iter().map(|submit| submit.changes.iter().map(|change| change.stamp).collect()).collect();
    assert_eq!(stamps, [vec![20, 21], vec![31]], "what is there already is not recorded");
    assert_eq!(recorded[0].changes[0].values[3], Some("\\x00ff".into()));

    // The rows have come, and somebody has looked: what was kept is tried again, the rest is not.
    f.apply(vec![upsert(vec![task("gone", "p", "back", false)])]);
    saved.transactions[6].complete = true;
    let again = outcomes(f.store.import(&saved).unwrap());
    assert_eq!(
        (&*again[0], &*again[1], &*again[4], &*again[6], &*again[8]),
        ("before", "before", "as 3", "as 4", "before")
    );
    // Later writes are later, whatever the saved stamps are.
    let client_seq = f.write(&["UPDATE tasks SET title = 'later' WHERE id = 'n'"]).unwrap();
    assert!(f.store.pending(client_seq.unwrap() - 1, 1).unwrap()[0].changes[0].stamp > 31);
}

#[test]
fn files_of_saved_changes_are_told_from_others() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("x.json");
    assert!(matches!(Saved::read(&path), Err(SavedError::Read { .. })));
    for text in ["", "{}", "[1]", "{\"format\": \"one\"}", "{\"format\": 1}", "\u{0}\u{1}"] {
        std::fs::write(&path, text).unwrap();
        assert!(matches!(Saved::read(&path), Err(SavedError::Format { .. })), "{text:?}");
    }
    std::fs::write(&path, "{\"format\": 2, \"something\": \"new\"}").unwrap();
    let error = Saved::read(&path).err().unwrap();
    assert!(matches!(error, SavedError::TooNew { found: 2, .. }) && error.to_string().contains("upgrade"), "{error}");
}
