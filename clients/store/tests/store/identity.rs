//! Copies of a store, backups of it and of the server, and stores of older formats.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use millstream_client_core::outbox::Entry;
use millstream_client_core::replica::Step;
use millstream_client_store::{Meeting, Outcome, Store, StoreError, Verdict};
use millstream_schemas::Code;
use millstream_schemas::frame::{Confirmed, Submit};
use millstream_schemas::stream::{self, Loss, RunSpan};
use uuid::Uuid;

use super::fixture::{
    Fixture, confirmed, entry, failed, failure, fixture, insert, queue, set_format, stage, submits, task, told, update,
    upsert,
};

/// What was settled when a transaction got its number is not any more.
#[test]
fn a_restored_server_is_told_what_comes_after_what() {
    let mut f = fixture();
    insert(&mut f, "a");
    f.apply(vec![upsert(vec![task("a", "p", "new", false)]), told(1, vec![])]);
    update(&mut f, "a", "second");
    assert_eq!(queue(&f), [entry(2, "a", &[])]);
    f.apply(vec![told(2, vec![])]);
    assert_eq!(f.store.meet(0, &[], &[], &[]).unwrap(), Meeting::WentBack);
    assert_eq!(queue(&f), [entry(1, "a", &[]), entry(2, "a", &[1])]);
}

/// Item 39: what waits in a store of the second version still comes after what it came after.
#[test]
fn a_store_of_the_second_format_is_converted() {
    let mut f = fixture();
    insert(&mut f, "a");
    update(&mut f, "a", "second");
    update(&mut f, "a", "third");
    insert(&mut f, "b");
    let before = queue(&f);
    assert_eq!(before[2], entry(3, "a", &[2]));
    drop(f.store);
    rusqlite::Connection::open(&f.path)
        .unwrap()
        .execute_batch(
            "DROP INDEX local_changes_live;
             CREATE INDEX local_changes_live ON local_changes (tbl, key) WHERE state <> 'confirmed';
             ALTER TABLE local_changes DROP COLUMN predecessors; ALTER TABLE local_changes DROP COLUMN adds;
             ALTER TABLE local_changes DROP COLUMN gone;
             DELETE FROM millstream_meta WHERE key = 'format'; PRAGMA user_version = 1;",
        )
        .unwrap();
    let f = Fixture { store: Store::open(&f.path, f.host.clone()).unwrap(), ..f };
    assert_eq!(queue(&f), before);
}

/// What the broker still holds of the old submissions has to be what comes from here.
#[test]
fn a_restored_server_finds_the_old_numbers() {
    let mut f = fixture();
    for id in ["a", "b", "c", "d"] {
        insert(&mut f, id);
    }
    let before = submits(&f);
    f.apply(vec![told(4, vec![failure(2, Uuid::nil(), Code::PermissionDenied)])]);
    let run_id = before[0].run_id;
    let mut f = f.reopen();
    assert_eq!(f.store.meet(1, &[RunSpan { run_id, first_seq: 1 }], &[], &[]).unwrap(), Meeting::WentBack);
    let again = submits(&f);
    assert_eq!(
        again.iter().map(|s| (s.client_seq, s.run_id)).collect::<Vec<_>>(),
        [2, 3, 4].map(|client_seq| (client_seq, run_id))
    );
    assert!(again.iter().zip(&before[1..]).all(|(now, then)| now.changes == then.changes));
}

#[test]
fn a_restored_server_gets_again_what_it_lost() {
    let mut f = fixture();
    for id in ["a", "b", "c", "d"] {
        insert(&mut f, id);
    }
    f.apply(vec![failed(1, Code::InvalidValue), confirmed(3)]);
    f.store.discard(1).unwrap();
    // Its ledger says 0 again; transaction 1 is gone for good, so the rest moves up.
    assert_eq!(f.store.meet(0, &[], &[], &[]).unwrap(), Meeting::WentBack);
    assert_eq!(queue(&f), [entry(1, "b", &[]), entry(2, "c", &[]), entry(3, "d", &[])]);
    assert_eq!(f.store.info().unwrap().confirmed_seq, 0);
    // The server's snapshot lacks them: they stay visible, since they are on their way again.
    stage(&mut f, vec![]);
    f.apply(vec![Step::Snapshot { scopes: vec![], full: true }]);
    assert_eq!(f.read("SELECT id FROM tasks ORDER BY id"), "b\nc\nd");
}

/// A restored server gets the rejected transaction again, which ends its trouble: the transaction held back behind it goes on, too.
#[test]
fn what_was_held_back_goes_on_with_a_restored_server() {
    let mut f = fixture();
    insert(&mut f, "a");
    update(&mut f, "a", "behind");
    let refused = [(1, Code::InvalidValue), (2, Code::PredecessorFailed)]
        .map(|(client_seq, code)| failure(client_seq, Uuid::nil(), code));
    f.apply(vec![told(2, refused.to_vec())]);
    assert_eq!((queue(&f), f.store.info().unwrap().held), (vec![], 1));
    assert_eq!(f.store.meet(0, &[], &[], &[]).unwrap(), Meeting::WentBack);
    assert_eq!(queue(&f), [entry(1, "a", &[]), entry(2, "a", &[1])]);
    f.apply(vec![upsert(vec![task("a", "p", "behind", false)]), told(2, vec![])]);
    assert_eq!(f.store.info().unwrap().held, 0);
}

/// The ledger's side of the rule, for one client id.
#[derive(Default)]
struct Server {
    last: u64,
    runs: Vec<RunSpan>,
    /// Rejected ones.
    failed: Vec<u64>,
    /// Those that lost.
    lost: Vec<Loss>,
    taken: Vec<Uuid>,
}

impl Server {
    /// Takes what follows the ledger and comes from the same store.
    fn submit(&mut self, submits: &[Submit]) {
        for submit in submits {
            let known = self.runs.last().map(|span| span.run_id);
            let follows = known.is_none() || known == Some(submit.run_id) || known == submit.previous;
            if submit.client_seq != self.last + 1 || !follows {
                continue;
            }
            self.last += 1;
            if known != Some(submit.run_id) {
                self.runs.push(RunSpan { run_id: submit.run_id, first_seq: submit.client_seq });
            }
            self.taken.extend(submit.changes.iter().map(|change| change.change_id));
        }
    }

    fn confirm(&self) -> Step {
        let run_id = self.runs.last().unwrap().run_id;
        Step::Confirmed(Confirmed { client_seq: self.last, run_id, failed: vec![], lost: vec![] })
    }
}

fn copy(f: &Fixture) -> Fixture {
    let other = fixture();
    let source = rusqlite::Connection::open(&f.path).unwrap();
    drop(other.store);
    for suffix in ["", "-wal", "-shm"] {
        let _ = std::fs::remove_file(format!("{}{suffix}", other.path));
    }
    source.execute("VACUUM INTO ?1", [&other.path]).unwrap();
    // Ids of another machine.
    other.host.ids.store(1_000_000, Ordering::Relaxed);
    let store = Store::open(&other.path, other.host.clone()).unwrap();
    Fixture { store, ..other }
}

/// Item 9 of "client gone back or cloned": whoever comes second takes a new identity; nothing is lost, nothing doubled.
#[test]
fn a_copied_store_takes_a_new_identity() {
    // Which copy comes first, and whether the original was opened again after the copy.
    for (original_first, reopened) in [(true, false), (false, false), (true, true), (false, true)] {
        let case = format!("original first: {original_first}, reopened: {reopened}");
        let mut server = Server::default();
        let mut original = fixture();
        insert(&mut original, "a");
        server.submit(&submits(&original));
        original.apply(vec![server.confirm()]);
        // Two more before the copy: one of them has reached the server, without either knowing.
        insert(&mut original, "b");
        insert(&mut original, "c");
        server.submit(&submits(&original)[..1]);
        let mut clone = copy(&original);
        if reopened {
            original = original.reopen();
        }
        insert(&mut original, "own");
        insert(&mut clone, "cloned");
        let everything: BTreeMap<Uuid, u32> = [&original, &clone]
            .iter()
            .flat_map(|f| submits(f))
            .flat_map(|submit| submit.changes.into_iter().map(|change| (change.change_id, 1)))
            .collect();

        let id = original.store.info().unwrap().client_id;
        let (first, second) = if original_first { (&mut original, &mut clone) } else { (&mut clone, &mut original) };
        assert_eq!(
            first.store.meet(server.last, &server.runs, &server.failed, &server.lost).unwrap(),
            Meeting::Continue,
            "{case}"
        );
        server.submit(&submits(first));
        assert_eq!(server.last, 4, "{case}");
        // The second was in session too, and sent the same numbers: nothing of it is taken, and what it hears is not its own.
        server.submit(&submits(second));
        assert_eq!(server.last, 4, "{case}");
        assert!(matches!(second.try_apply(vec![server.confirm()]), Err(StoreError::Copied)), "{case}");
        assert_eq!(
            second.store.meet(server.last, &server.runs, &server.failed, &server.lost).unwrap(),
            Meeting::NewIdentity,
            "{case}"
        );
        first.apply(vec![server.confirm()]);

        let mut anew = Server::default();
        assert_ne!(second.store.info().unwrap().client_id, id, "{case}");
        assert_eq!(
            second.store.meet(anew.last, &anew.runs, &anew.failed, &anew.lost).unwrap(),
            Meeting::Continue,
            "{case}"
        );
        anew.submit(&submits(second));
        second.apply(vec![anew.confirm()]);
        let mut times: BTreeMap<Uuid, u32> = everything.keys().map(|id| (*id, 0)).collect();
        for id in server.taken[1..].iter().chain(&anew.taken) {
            *times.get_mut(id).unwrap() += 1;
        }
        assert_eq!(times, everything, "each once: {case}");
        for f in [first, second] {
            assert_eq!(f.store.info().unwrap().last_seq, f.store.info().unwrap().confirmed_seq, "{case}");
        }
    }
}

/// What the server rejected before the copy heard of it is not taken for applied: the copy submits it as its own. Nor is what
/// lost to a newer change.
#[test]
fn a_copy_does_not_take_a_rejected_or_lost_change_for_applied() {
    let mut original = fixture();
    insert(&mut original, "a");
    insert(&mut original, "b");
    insert(&mut original, "c");
    let mut server = Server::default();
    server.submit(&submits(&original));
    server.failed = vec![2];
    server.lost = vec![Loss { client_seq: 3, verdict: stream::Verdict::Superseded, change_id: Uuid::nil() }];
    let mut clone = copy(&original);
    insert(&mut original, "own");
    server.submit(&submits(&original));
    insert(&mut clone, "cloned");
    assert_eq!(
        clone.store.meet(server.last, &server.runs, &server.failed, &server.lost).unwrap(),
        Meeting::NewIdentity
    );
    assert_eq!(clone.store.verdict(1).unwrap(), Verdict::Confirmed(Outcome::Applied));
    assert_eq!(clone.store.verdict(2).unwrap(), Verdict::Open);
    assert_eq!(clone.store.verdict(3).unwrap(), Verdict::Confirmed(Outcome::Superseded));
    assert_eq!(queue(&clone), [entry(1, "b", &[]), entry(2, "cloned", &[])]);
}

/// The server was restored, and another copy of the store was there first: what was settled is submitted again as the copy's own.
#[test]
fn a_copy_submits_again_what_a_restored_server_lost() {
    let mut original = fixture();
    insert(&mut original, "a");
    let mut server = Server::default();
    server.submit(&submits(&original));
    original.apply(vec![server.confirm()]);
    let mut clone = copy(&original);
    let backup = Server { last: server.last, runs: server.runs.clone(), ..Server::default() };
    insert(&mut clone, "cloned");
    server.submit(&submits(&clone));
    clone.apply(vec![server.confirm()]);
    assert_eq!(clone.store.info().unwrap().confirmed_seq, 2);

    server = backup;
    insert(&mut original, "own");
    server.submit(&submits(&original));
    assert_eq!(
        clone.store.meet(server.last, &server.runs, &server.failed, &server.lost).unwrap(),
        Meeting::NewIdentity
    );
    assert_eq!(queue(&clone), [entry(1, "cloned", &[])], "the other one is there");
    assert_eq!(clone.store.verdict(2).unwrap(), Verdict::Open);
}

/// A backup of the device was restored: its server has seen more of it than it knows itself.
#[test]
fn a_store_restored_from_a_backup_takes_a_new_identity() {
    let mut server = Server::default();
    let mut f = fixture();
    insert(&mut f, "a");
    insert(&mut f, "b");
    let mut restored = copy(&f);
    insert(&mut f, "c");
    server.submit(&submits(&f));
    insert(&mut restored, "d");
    insert(&mut restored, "e");
    assert_eq!(
        restored.store.meet(server.last, &server.runs, &server.failed, &server.lost).unwrap(),
        Meeting::NewIdentity
    );
    assert_eq!(queue(&restored), [entry(1, "d", &[]), entry(2, "e", &[])], "a and b were taken before");
    assert_eq!(restored.store.meet(0, &[], &[], &[]).unwrap(), Meeting::Continue);
}

/// Item 39: a store of the first version, with what it had not sent.
#[test]
fn a_store_of_the_older_format_is_converted() {
    let f = fixture();
    drop(f.store);
    let connection = rusqlite::Connection::open(&f.path).unwrap();
    connection
        .execute_batch(
            "DROP TABLE local_changes; DELETE FROM millstream_meta WHERE key = 'format'; PRAGMA user_version = 0;
             CREATE TABLE local_changes (id INTEGER PRIMARY KEY AUTOINCREMENT, tx INTEGER NOT NULL, change_id TEXT NOT NULL UNIQUE,
                 tbl TEXT NOT NULL, key TEXT NOT NULL, op TEXT NOT NULL, columns TEXT NOT NULL, vals TEXT NOT NULL, previous TEXT,
                 stamp INTEGER NOT NULL, state TEXT NOT NULL, attempts INTEGER NOT NULL DEFAULT 0, next_attempt INTEGER,
                 last_error_code TEXT, last_error TEXT, traceparent TEXT, recorded_at INTEGER NOT NULL);
             CREATE INDEX local_changes_by_tx ON local_changes (tx);
             CREATE INDEX local_changes_open ON local_changes (tbl, key) WHERE state IN ('pending', 'sending', 'accepted');
             CREATE INDEX local_changes_failed ON local_changes (tx) WHERE state IN ('retry_wait', 'error');
             DROP TRIGGER millstream_insert_tasks;
             CREATE TRIGGER millstream_insert_tasks AFTER INSERT ON tasks WHEN millstream_tx() IS NOT NULL BEGIN
                 INSERT INTO local_changes (tx, change_id, tbl, key, op, columns, vals, previous, stamp, state, traceparent, recorded_at)
                 VALUES (millstream_tx(), millstream_uuid(), 'tasks', '[]', 'insert', '[]', '[]', NULL, millstream_now(), 'pending', NULL, millstream_now());
             END;
             INSERT INTO millstream_meta VALUES ('instance', '00000000-0000-0000-0000-0000000000aa');
             INSERT INTO millstream_meta VALUES ('confirmed_seq', 1);",
        )
        .unwrap();
    for n in 1..=51 {
        let (id, state) = (Uuid::from_u128(0xbb00 + n), if n == 1 { "confirmed" } else { "pending" });
        connection
            .execute(
                "INSERT INTO local_changes (tx, change_id, tbl, key, op, columns, vals, stamp, state, recorded_at)
                 VALUES (?1, ?2, 'tasks', ?3, 'insert', '[\"id\"]', ?3, 1, ?4, 1)",
                rusqlite::params![n as i64, id.to_string(), format!("[\"{n}\"]"), state],
            )
            .unwrap();
    }
    drop(connection);
    let old = Uuid::from_u128(0xaa);
    let mut server = Server {
        last: 1,
        runs: vec![RunSpan { run_id: old, first_seq: 1 }],
        failed: vec![],
        lost: vec![],
        taken: vec![],
    };
    let mut f = Fixture { store: Store::open(&f.path, f.host.clone()).unwrap(), ..f };
    insert(&mut f, "new");
    assert_eq!(f.store.meet(server.last, &server.runs, &server.failed, &server.lost).unwrap(), Meeting::Continue);
    server.submit(&submits(&f));
    server.submit(&submits(&f));
    assert_eq!((server.last, server.taken.len()), (52, 51));
    f.apply(vec![server.confirm()]);
    let mut f = f.reopen();
    insert(&mut f, "later");
    assert_eq!(queue(&f), [entry(53, "later", &[])]);
    let entries: Vec<Entry> = f.store.entries_after(0, 9).unwrap();
    assert_eq!(entries.len(), 1);
    // A format of the future is left alone.
    set_format(&f.path, 99);
    assert!(matches!(Store::open(&f.path, f.host.clone()), Err(StoreError::TooNew { found: 99, .. })));
}
