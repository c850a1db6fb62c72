//! Numbers, verdicts, retries, and what waits for what.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use millstream_client_core::outbox::Entry;
use millstream_client_core::replica::Step;
use millstream_client_store::{Edit, EntryState, Meeting, Outcome, Store, StoreError, Verdict};
use millstream_schemas::frame::{Confirmed, Submit};
use millstream_schemas::stream::{self, Failure, InstanceSpan, Loss};
use millstream_schemas::{Clock, Code, Row};
use uuid::Uuid;

use super::fixture::{Fixture, confirmed, failed, fixture, schema, stage, task, upsert};

fn failure(seq: u64, change_id: Uuid, code: Code) -> Failure {
    Failure { seq, change_id, code, rule: Some("a_rule".into()), message: "not so".into() }
}

fn told(seq: u64, failed: Vec<Failure>) -> Step {
    Step::Confirmed(Confirmed { seq, instance: Uuid::nil(), failed, lost: vec![] })
}

fn submits(f: &Fixture) -> Vec<Submit> {
    f.store.pending(0, 100).unwrap()
}

/// Number, first key and what it comes after, of each numbered transaction.
fn queue(f: &Fixture) -> Vec<(u64, String, Vec<u64>)> {
    submits(f).into_iter().map(|s| (s.seq, s.changes[0].key[0].clone().unwrap(), s.after)).collect()
}

fn entry(seq: u64, key: &str, after: &[u64]) -> (u64, String, Vec<u64>) {
    (seq, key.to_owned(), after.to_vec())
}

fn states(f: &Fixture) -> String {
    f.read("SELECT DISTINCT tx, seq, state, attempts FROM local_changes ORDER BY tx")
}

fn insert(f: &mut Fixture, id: &str) {
    f.write(&[&format!("INSERT INTO tasks (id, title) VALUES ('{id}', 'new')")]).unwrap();
}

fn update(f: &mut Fixture, id: &str, title: &str) {
    f.write(&[&format!("UPDATE tasks SET title = '{title}' WHERE id = '{id}'")]).unwrap();
}

#[test]
fn a_rejection_brings_the_confirmed_row_back_and_is_listed() {
    let mut f = fixture();
    f.apply(vec![upsert(vec![task("a", "p", "server", false), task("z", "p", "server", false)])]);
    f.write(&["UPDATE tasks SET title = 'mine' WHERE id = 'a'", "INSERT INTO tasks (id) VALUES ('b')"]).unwrap();
    f.write(&["UPDATE tasks SET done = 1 WHERE id = 'z'"]).unwrap();
    let change_id = submits(&f)[0].changes[1].change_id;
    let rejection = failure(1, change_id, Code::PermissionDenied);
    let applied = f.apply(vec![told(1, vec![rejection.clone()])]);
    assert_eq!((applied.settled[0].tx, &applied.settled[0].result), (1, &Err(rejection.clone())));
    assert_eq!(f.tasks(), "a|server|0\nz|server|1", "the later, independent change stays visible");
    let listed = f.store.failed().unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!(
        (listed[0].change_id, listed[0].code, listed[0].rule.as_deref(), listed[0].state),
        (change_id, Some(Code::PermissionDenied), Some("a_rule"), EntryState::Error)
    );
    assert_eq!((listed[0].message.as_str(), listed[0].changes.len(), listed[0].attempts), ("not so", 2, 1));
    // Told again at the next connection: nothing new.
    assert_eq!(f.apply(vec![told(1, vec![rejection])]).settled, []);

    // A person says: again. The same transaction and change ids, a new number, shown again.
    assert_eq!(f.store.retry(1).unwrap().unwrap().seq, 3);
    let of_before = |entry: &millstream_client_store::QueueEntry| entry.error_code.is_some() || entry.error.is_some();
    assert!(!f.store.transaction(1).unwrap().iter().any(of_before), "it is another attempt");
    assert_eq!(f.tasks(), "a|mine|0\nb|-|-\nz|server|1");
    assert!(matches!(f.store.retry(1), Err(StoreError::NotFailed { tx: 1, state: Some(_) })));
    let submit = f.store.pending(2, 1).unwrap().remove(0);
    assert_eq!((submit.seq, submit.attempt, submit.changes[1].change_id), (3, 1, change_id));
    f.apply(vec![failed(3, Code::PermissionDenied)]);
    f.store.discard(1).unwrap();
    assert_eq!((f.store.failed().unwrap().len(), f.bases()), (0, String::new()));
    assert_eq!(f.tasks(), "a|server|0\nz|server|0");
}

/// Items 12, 14, 26, 27: attempts and their times, kept over a restart, up to the limit.
#[test]
fn business_rules_are_tried_again_up_to_the_limit() {
    let mut f = fixture();
    insert(&mut f, "a");
    for attempt in 1..=5u32 {
        let submit = submits(&f).pop().unwrap();
        assert_eq!((submit.seq, submit.attempt), (u64::from(attempt), attempt));
        f.apply(vec![failed(submit.seq, Code::BusinessRule)]);
        assert_eq!(f.tasks(), "");
        f = f.reopen();
        let listed = f.store.failed().unwrap().remove(0);
        assert_eq!((listed.attempts, listed.code, listed.message.as_str()), (attempt, Some(Code::BusinessRule), "no"));
        if attempt == 5 {
            f.host.now.fetch_add(24 * 3_600_000_000, Ordering::Relaxed);
            assert!(!f.store.retry_due().unwrap(), "then a person decides");
            assert_eq!((listed.state, listed.next_attempt), (EntryState::Error, None));
            continue;
        }
        let now = f.host.now.load(Ordering::Relaxed);
        let at = listed.next_attempt.unwrap();
        assert!((now..=now + (2_000_000 << (attempt - 1))).contains(&at), "attempt {attempt} waits {}", at - now);
        f.host.now.store(at - 1, Ordering::Relaxed);
        assert!(at == now || !f.store.retry_due().unwrap(), "not before its time");
        f.host.now.store(at, Ordering::Relaxed);
        assert!(f.store.retry_due().unwrap());
        assert_eq!(f.tasks(), "a|new|-");
    }
    assert_eq!(f.store.retry(1).unwrap().unwrap().seq, 6);
    assert_eq!(submits(&f)[0].attempt, 1, "by hand, attempts count from the start");
    f.apply(vec![confirmed(6)]);
    assert_eq!(f.store.verdict(1).unwrap(), Verdict::Confirmed(Outcome::Applied));
    assert_eq!(f.read("SELECT last_error, last_error_code FROM local_changes"), "-|-");
}

/// Items 15, 22, 23, 27: later changes of the same rows wait, others go on.
#[test]
fn what_follows_a_rejected_change_waits_for_it() {
    let mut f = fixture();
    insert(&mut f, "a");
    update(&mut f, "a", "second");
    insert(&mut f, "b");
    update(&mut f, "a", "third");
    assert_eq!(queue(&f), [entry(1, "a", &[]), entry(2, "a", &[1]), entry(3, "b", &[]), entry(4, "a", &[2])]);

    // The server refuses the insert, and the update behind it; the last was not sent yet.
    f.apply(vec![told(
        2,
        vec![failure(1, Uuid::nil(), Code::BusinessRule), failure(2, Uuid::nil(), Code::PredecessorFailed)],
    )]);
    assert_eq!(states(&f), "1|1|retry_wait|1\n2|-|held|0\n3|3|pending|0\n4|4|pending|0");
    assert_eq!(queue(&f)[1], entry(4, "a", &[2]), "the server is told what it comes after, and refused");
    assert_eq!(f.tasks(), "b|new|-", "without its insert the row is not there");
    insert(&mut f, "c");
    let b = upsert(vec![task("b", "p", "new", false)]);
    f.apply(vec![b, told(4, vec![failure(4, Uuid::nil(), Code::PredecessorFailed)])]);
    f = f.reopen();
    let info = f.store.info().unwrap();
    assert_eq!((info.failed, info.held, info.last_seq, info.confirmed_seq), (1, 2, 5, 4));

    // The retry goes alone; when it is through, the rest follows in its old order.
    f.host.now.fetch_add(60_000_000, Ordering::Relaxed);
    assert!(f.store.retry_due().unwrap());
    assert_eq!(queue(&f), [entry(5, "c", &[]), entry(6, "a", &[])]);
    assert_eq!(f.tasks(), "a|third|-\nb|new|0\nc|new|-", "what waits is visible");
    // A new edit of the row never overtakes.
    update(&mut f, "a", "fourth");
    assert_eq!(queue(&f).len(), 2);
    f.apply(vec![upsert(vec![task("a", "p", "new", false)]), confirmed(6)]);
    assert_eq!(queue(&f), [entry(7, "a", &[]), entry(8, "a", &[7]), entry(9, "a", &[8])]);
    assert_eq!(f.tasks().lines().next(), Some("a|fourth|0"), "no flicker");
    f.apply(vec![confirmed(9)]);
    assert_eq!(f.store.info().unwrap().held, 0);
    assert_eq!(f.store.verdict(4).unwrap(), Verdict::Confirmed(Outcome::Applied));
}

#[test]
fn a_transaction_that_joins_two_rows_joins_their_waits() {
    let mut f = fixture();
    insert(&mut f, "a");
    insert(&mut f, "b");
    let b = upsert(vec![task("b", "p", "new", false)]);
    f.apply(vec![b, told(2, vec![failure(1, Uuid::nil(), Code::PermissionDenied)])]);
    f.write(&["INSERT INTO tasks (id) VALUES ('a')", "UPDATE tasks SET title = 'x' WHERE id = 'b'"]).unwrap();
    update(&mut f, "b", "y");
    assert_eq!(states(&f), "1|1|error|1\n2|2|confirmed|0\n3|-|held|0\n4|-|held|0");
    let waits: Vec<_> = f.store.entries(10).unwrap().iter().map(|entry| (entry.tx, entry.waits_for)).collect();
    assert_eq!(waits, [(1, None), (2, None), (3, Some(1)), (3, Some(1)), (4, Some(3))]);
    f.store.discard(1).unwrap();
    assert_eq!(queue(&f), [entry(3, "a", &[]), entry(4, "b", &[3])]);
}

#[test]
fn a_held_transaction_can_be_discarded_and_a_retry_waits_for_its_predecessors() {
    let mut f = fixture();
    f.apply(vec![upsert(vec![task("a", "p", "server", false)])]);
    update(&mut f, "a", "first");
    update(&mut f, "a", "second");
    f.apply(vec![told(1, vec![failure(1, Uuid::nil(), Code::PermissionDenied)])]);
    f.apply(vec![told(2, vec![failure(2, Uuid::nil(), Code::EntityMissing)])]);
    assert_eq!(f.store.retry(2).unwrap(), None, "its predecessor waits for a person, so does it");
    assert_eq!(states(&f), "1|1|error|1\n2|-|held|0");
    update(&mut f, "a", "third");
    f.store.discard(2).unwrap();
    assert_eq!(f.store.retry(1).unwrap().unwrap().seq, 3);
    let of_before = |entry: &millstream_client_store::QueueEntry| entry.error_code.is_some() || entry.error.is_some();
    assert!(!f.store.transaction(1).unwrap().iter().any(of_before), "it is another attempt");
    assert_eq!(queue(&f), [entry(3, "a", &[]), entry(4, "a", &[3])]);
    assert!(
        matches!(f.store.discard(1), Err(StoreError::NotFailed { tx: 1, state: Some(EntryState::Pending) })),
        "it is under way"
    );
}

#[test]
fn a_failed_change_can_be_edited() {
    let mut f = fixture();
    f.write(&["INSERT INTO tasks (id, title) VALUES ('a', '')"]).unwrap();
    let before = submits(&f).remove(0).changes.remove(0);
    f.apply(vec![told(1, vec![failure(1, before.change_id, Code::BusinessRule)])]);
    let edit = |column: &str, value: &str| Edit { change_id: None, column: column.into(), value: Some(value.into()) };
    for (bad, what) in [
        (edit("nope", "x"), "no column"),
        (edit("id", "x"), "cannot be changed"),
        (edit("created_at", "x"), "cannot be"),
    ] {
        let error = f.store.edit(1, &[edit("title", "half"), bad]).unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    }
    assert!(matches!(f.store.edit(9, &[]), Err(StoreError::NotFailed { tx: 9, state: None })));
    f.store.edit(1, &[edit("title", "better"), edit("done", "t")]).unwrap();
    let after = submits(&f).remove(0).changes.remove(0);
    assert_eq!(after.change_id, before.change_id);
    assert_eq!(after.columns, ["id", "title", "done"]);
    assert_eq!(after.values, ["a", "better", "t"].map(|value| Some(value.to_owned())));
    assert!(after.stamp > before.stamp, "an edit is a new edit");
    assert_eq!(f.tasks(), "a|better|1");
}

#[test]
fn what_follows_an_edited_change_stays_the_newer() {
    let mut f = fixture();
    f.apply(vec![upsert(vec![task("a", "p", "server", false)])]);
    update(&mut f, "a", "first");
    f.apply(vec![told(1, vec![failure(1, Uuid::nil(), Code::PermissionDenied)])]);
    update(&mut f, "a", "second");
    let edit = Edit { change_id: None, column: "title".into(), value: Some("edited".into()) };
    f.store.edit(1, &[edit]).unwrap();
    let stamps: Vec<u64> = submits(&f).iter().map(|submit| submit.changes[0].stamp).collect();
    assert!(stamps.len() == 2 && stamps[0] < stamps[1], "{stamps:?}");
    // And so does what another process writes that has been open all the while.
    let mut other = Store::open(&f.path, f.host.clone()).unwrap();
    f.host.now.fetch_add(1_000_000, Ordering::Relaxed);
    update(&mut f, "a", "third");
    f.host.now.fetch_sub(1_000_000, Ordering::Relaxed);
    other.write(None, |tx| tx.execute("UPDATE tasks SET title = 'fourth'", &[])).unwrap();
    let stamps: Vec<u64> = submits(&f).iter().map(|submit| submit.changes[0].stamp).collect();
    assert!(stamps.len() == 4 && stamps.is_sorted_by(|a, b| a < b), "{stamps:?}");
}

/// What the transaction itself did later to the same row, too.
#[test]
fn the_rest_of_an_edited_transaction_stays_the_newer() {
    let mut f = fixture();
    f.apply(vec![upsert(vec![task("a", "p", "server", false)])]);
    f.write(&["UPDATE tasks SET title = 'x', done = 0 WHERE id = 'a'", "UPDATE tasks SET done = 1 WHERE id = 'a'"])
        .unwrap();
    let first = submits(&f)[0].changes[0].change_id;
    f.apply(vec![told(1, vec![failure(1, first, Code::BusinessRule)])]);
    f.store.edit(1, &[Edit { change_id: Some(first), column: "title".into(), value: Some("edited".into()) }]).unwrap();
    let changes = submits(&f).remove(0).changes;
    assert!(changes[0].stamp < changes[1].stamp, "{changes:?}");
    assert_eq!(f.tasks(), "a|edited|1");
}

/// Also where the clock has been set back, and the row's newest column came from a fast one.
#[test]
fn an_edit_is_newer_than_all_that_was_seen() {
    let mut f = clocked();
    f.host.now.store(5_000, Ordering::Relaxed);
    f.apply(vec![upsert(vec![clocked_task("a", ("server", 10), (false, 10))])]);
    update(&mut f, "a", "first");
    let before = submits(&f)[0].changes[0].stamp;
    f.apply(vec![told(1, vec![failure(1, Uuid::nil(), Code::PermissionDenied)])]);
    let mut f = f.reopen();
    f.host.now.store(100, Ordering::Relaxed);
    let edit = |value: &str| [Edit { change_id: None, column: "title".into(), value: Some(value.into()) }];
    f.store.edit(1, &edit("edited")).unwrap();
    let edited = submits(&f)[0].changes[0].stamp;
    assert!(edited > before, "{edited} after {before}");
    let mut f = f.reopen();
    insert(&mut f, "b");
    let next = submits(&f)[1].changes[0].stamp;
    assert!(next > edited, "{next} after {edited}");
    f.apply(vec![
        told(2, vec![failure(2, Uuid::nil(), Code::PermissionDenied)]),
        upsert(vec![clocked_task("a", ("fast", 9_000), (false, 10))]),
    ]);
    f.store.edit(1, &edit("again")).unwrap();
    let again = submits(&f)[1].changes[0].stamp;
    assert!(again > 9_000, "{again}");
}

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
             ALTER TABLE local_changes DROP COLUMN predecessors;
             PRAGMA user_version = 1;",
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
    let instance = before[0].instance;
    let mut f = f.reopen();
    assert_eq!(f.store.meet(1, &[InstanceSpan { instance, first_seq: 1 }], &[], &[]).unwrap(), Meeting::WentBack);
    let again = submits(&f);
    assert_eq!(again.iter().map(|s| (s.seq, s.instance)).collect::<Vec<_>>(), [2, 3, 4].map(|seq| (seq, instance)));
    assert!(again.iter().zip(&before[1..]).all(|(now, then)| now.changes == then.changes));
}

/// Items 16, 25, 28: losing is success.
#[test]
fn what_lost_to_newer_changes_is_settled() {
    let mut f = fixture();
    f.apply(vec![upsert(vec![task("a", "p", "server", false)])]);
    update(&mut f, "a", "mine");
    f.write(&["UPDATE tasks SET title = 'again', done = 1"]).unwrap();
    let lost = [(1, stream::Verdict::Superseded), (2, stream::Verdict::Merged)].map(|(seq, verdict)| Loss {
        seq,
        verdict,
        change_id: Uuid::nil(),
    });
    let newer = upsert(vec![task("a", "p", "theirs", true)]);
    let step = Step::Confirmed(Confirmed { seq: 2, instance: Uuid::nil(), failed: vec![], lost: lost.to_vec() });
    let applied = f.apply(vec![newer, step]);
    let outcomes: Vec<_> = applied.settled.iter().map(|settled| settled.result.clone().unwrap()).collect();
    assert_eq!(outcomes, [Outcome::Superseded, Outcome::Merged]);
    assert_eq!((f.tasks(), f.store.failed().unwrap().len()), ("a|theirs|1".into(), 0));
    assert_eq!(f.store.verdict(1).unwrap(), Verdict::Confirmed(Outcome::Superseded));
    assert_eq!(f.store.entries(9).unwrap()[1].outcome, Some(Outcome::Merged));
}

fn clocked() -> Fixture {
    let mut f = fixture();
    let mut schema = schema();
    schema.version = "clocks".into();
    schema.tables[0].columns[6].name = "field_clocks".into();
    schema.tables[0].clocks = Some(6);
    f.store.install(&schema).unwrap();
    f
}

fn clocked_task(id: &str, title: (&str, u64), done: (bool, u64)) -> Row {
    let clock = |stamp| Clock { stamp, ..Clock::default() };
    let mut row = task(id, "p", title.0, done.0);
    row[6] = Some(format!(r#"{{"": "{}", "title": "{}", "done": "{}"}}"#, clock(1), clock(title.1), clock(done.1)));
    row
}

/// Item 61: a newer column of the server is shown over an older pending edit, an older one is not.
#[test]
fn the_visible_row_follows_the_clocks() {
    let mut f = clocked();
    f.apply(vec![upsert(vec![clocked_task("a", ("server", 10), (false, 10))])]);
    f.host.now.store(100, Ordering::Relaxed);
    f.write(&["UPDATE tasks SET title = 'mine', done = 1"]).unwrap();
    f.apply(vec![upsert(vec![clocked_task("a", ("older", 90), (false, 90))])]);
    assert_eq!(f.tasks(), "a|mine|1");
    f.apply(vec![upsert(vec![clocked_task("a", ("newer", 1_000), (false, 90))])]);
    assert_eq!(f.tasks(), "a|newer|1");
    // An edit after seeing it is newer still, on whatever clock.
    update(&mut f, "a", "last");
    assert_eq!(f.tasks(), "a|last|1");
    assert!(submits(&f)[1].changes[0].stamp > 1_000);
    f.write(&["DELETE FROM tasks"]).unwrap();
    f.apply(vec![upsert(vec![clocked_task("a", ("edited", 10_000), (false, 90))])]);
    assert_eq!(f.tasks(), "a|edited|1", "the delete will lose");
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

/// The ledger's side of the rule, for one client id.
#[derive(Default)]
struct Server {
    last: u64,
    instances: Vec<InstanceSpan>,
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
            let known = self.instances.last().map(|span| span.instance);
            let follows = known.is_none() || known == Some(submit.instance) || known == submit.previous;
            if submit.seq != self.last + 1 || !follows {
                continue;
            }
            self.last += 1;
            if known != Some(submit.instance) {
                self.instances.push(InstanceSpan { instance: submit.instance, first_seq: submit.seq });
            }
            self.taken.extend(submit.changes.iter().map(|change| change.change_id));
        }
    }

    fn confirm(&self) -> Step {
        let instance = self.instances.last().unwrap().instance;
        Step::Confirmed(Confirmed { seq: self.last, instance, failed: vec![], lost: vec![] })
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
            first.store.meet(server.last, &server.instances, &server.failed, &server.lost).unwrap(),
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
            second.store.meet(server.last, &server.instances, &server.failed, &server.lost).unwrap(),
            Meeting::NewIdentity,
            "{case}"
        );
        first.apply(vec![server.confirm()]);

        let mut anew = Server::default();
        assert_ne!(second.store.info().unwrap().client_id, id, "{case}");
        assert_eq!(
            second.store.meet(anew.last, &anew.instances, &anew.failed, &anew.lost).unwrap(),
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
    server.lost = vec![Loss { seq: 3, verdict: stream::Verdict::Superseded, change_id: Uuid::nil() }];
    let mut clone = copy(&original);
    insert(&mut original, "own");
    server.submit(&submits(&original));
    insert(&mut clone, "cloned");
    assert_eq!(
        clone.store.meet(server.last, &server.instances, &server.failed, &server.lost).unwrap(),
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
    let backup = Server { last: server.last, instances: server.instances.clone(), ..Server::default() };
    insert(&mut clone, "cloned");
    server.submit(&submits(&clone));
    clone.apply(vec![server.confirm()]);
    assert_eq!(clone.store.info().unwrap().confirmed_seq, 2);

    server = backup;
    insert(&mut original, "own");
    server.submit(&submits(&original));
    assert_eq!(
        clone.store.meet(server.last, &server.instances, &server.failed, &server.lost).unwrap(),
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
        restored.store.meet(server.last, &server.instances, &server.failed, &server.lost).unwrap(),
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
            "DROP TABLE local_changes; PRAGMA user_version = 0;
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
        instances: vec![InstanceSpan { instance: old, first_seq: 1 }],
        failed: vec![],
        lost: vec![],
        taken: vec![],
    };
    let mut f = Fixture { store: Store::open(&f.path, f.host.clone()).unwrap(), ..f };
    insert(&mut f, "new");
    assert_eq!(f.store.meet(server.last, &server.instances, &server.failed, &server.lost).unwrap(), Meeting::Continue);
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
    rusqlite::Connection::open(&f.path).unwrap().pragma_update(None, "user_version", 99).unwrap();
    assert!(matches!(Store::open(&f.path, f.host.clone()), Err(StoreError::TooNew { found: 99, .. })));
}

/// Item 11: a hundred changes while the clock stands, then an hour back: they are sent as they were made.
#[test]
fn the_order_is_that_of_recording_whatever_the_clock_does() {
    let mut f = fixture();
    f.host.now.store(10_000_000_000, Ordering::Relaxed);
    for n in 0..100 {
        if n == 50 {
            f.host.now.fetch_sub(3_600_000_000, Ordering::Relaxed);
        }
        insert(&mut f, &format!("{n:03}"));
    }
    let submits = submits(&f);
    let keys: Vec<_> = submits.iter().map(|submit| submit.changes[0].key[0].clone().unwrap()).collect();
    assert_eq!(keys, (0..100).map(|n| format!("{n:03}")).collect::<Vec<_>>());
    assert!(submits.is_sorted_by(|a, b| a.seq < b.seq && a.changes[0].stamp < b.changes[0].stamp));
}

/// Item 19: what a store holds when it is opened again, by state, and what of it is sent.
#[test]
fn at_start_every_entry_is_where_it_was() {
    let mut f = fixture();
    for id in ["a", "b", "c", "d", "e"] {
        insert(&mut f, id);
    }
    f.apply(vec![told(
        2,
        vec![failure(1, Uuid::nil(), Code::PermissionDenied), failure(2, Uuid::nil(), Code::BusinessRule)],
    )]);
    f.write(&["INSERT INTO tasks (id) VALUES ('a')"]).unwrap();
    f.store.mark(4, 3);
    f.store.flush_marks().unwrap();
    let f = f.reopen();
    assert_eq!(
        f.read("SELECT tx, state FROM local_changes ORDER BY tx"),
        "1|error\n2|retry_wait\n3|accepted\n4|sending\n5|pending\n6|held"
    );
    let info = f.store.info().unwrap();
    assert_eq!((info.failed, info.held, info.last_seq, info.confirmed_seq), (2, 1, 5, 2));
    assert_eq!(
        queue(&f),
        [entry(3, "c", &[]), entry(4, "d", &[]), entry(5, "e", &[])],
        "what was in flight is sent again"
    );
}

/// Item 24: over random lives of transactions, every change of state is one of the legal ones.
#[test]
fn states_change_only_along_the_legal_ways() {
    const LEGAL: [(&str, &str); 17] = [
        ("pending", "sending"),
        ("pending", "accepted"),
        ("sending", "accepted"),
        ("pending", "confirmed"),
        ("sending", "confirmed"),
        ("accepted", "confirmed"),
        ("pending", "retry_wait"),
        ("sending", "retry_wait"),
        ("accepted", "retry_wait"),
        ("pending", "error"),
        ("sending", "error"),
        ("accepted", "error"),
        ("retry_wait", "pending"),
        ("error", "pending"),
        ("held", "pending"),
        // Refused for an earlier one, or put behind it.
        ("pending", "held"),
        ("retry_wait", "held"),
    ];
    let held = ["sending", "accepted", "error"].map(|from| (from, "held"));
    let mut f = fixture();
    rusqlite::Connection::open(&f.path)
        .unwrap()
        .execute_batch(
            "CREATE TABLE transitions (was TEXT, is_now TEXT, PRIMARY KEY (was, is_now)) WITHOUT ROWID;
             CREATE TRIGGER audit AFTER UPDATE OF state ON local_changes WHEN OLD.state <> NEW.state
             BEGIN INSERT INTO transitions VALUES (OLD.state, NEW.state) ON CONFLICT DO NOTHING; END;",
        )
        .unwrap();
    let mut random = 7u64;
    let mut next = move |bound: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % bound
    };
    for step in 0..1_500u64 {
        f.host.now.fetch_add(200_000, Ordering::Relaxed);
        let id = format!("{}", next(8));
        let info = f.store.info().unwrap();
        match next(7) {
            0 | 1 => {
                let sql = format!(
                    "INSERT INTO tasks (id, title) VALUES ('{id}', 'new') ON CONFLICT (id) DO UPDATE SET title = '{step}'"
                );
                f.write(&[&sql]).unwrap();
            }
            2 | 3 if info.last_seq > info.confirmed_seq => {
                let seq = info.confirmed_seq + 1 + next(info.last_seq - info.confirmed_seq);
                let codes = [Code::BusinessRule, Code::PermissionDenied, Code::PredecessorFailed];
                let rejected = (info.confirmed_seq + 1..=seq)
                    .filter(|_| next(3) == 0)
                    .collect::<Vec<_>>()
                    .into_iter()
                    .map(|seq| failure(seq, Uuid::nil(), codes[(seq % 3) as usize]))
                    .collect();
                f.apply(vec![told(seq, rejected)]);
            }
            4 if info.last_seq > info.confirmed_seq => {
                let sent = info.confirmed_seq + 1 + next(info.last_seq - info.confirmed_seq);
                f.store.mark(sent, info.confirmed_seq + next(sent - info.confirmed_seq + 1));
                f.store.flush_marks().unwrap();
            }
            5 => drop(f.store.retry_due().unwrap()),
            6 => {
                if let Some(failed) = f.store.failed().unwrap().first() {
                    let tx = failed.tx;
                    if next(2) == 0 { drop(f.store.retry(tx).unwrap()) } else { f.store.discard(tx).unwrap() }
                }
            }
            _ => f = f.reopen(),
        }
        // Numbers never have a gap, and what is held has none.
        let numbers = f.read(
            "SELECT DISTINCT seq FROM local_changes WHERE state IN ('pending', 'sending', 'accepted') ORDER BY seq",
        );
        let info = f.store.info().unwrap();
        let expected: Vec<String> = (info.confirmed_seq + 1..=info.last_seq).map(|seq| seq.to_string()).collect();
        assert_eq!(numbers, expected.join("\n"), "step {step}");
    }
    let seen = f.read("SELECT was, is_now FROM transitions");
    for line in seen.lines() {
        let (was, now) = line.split_once('|').unwrap();
        assert!(LEGAL.contains(&(was, now)) || held.contains(&(was, now)), "{was} became {now}");
    }
    assert!(seen.lines().count() >= 12, "{seen}");
}

/// Items 10, 29: a day without network: every write commits at once, is seen, and costs no attempt.
#[test]
fn the_queue_takes_ten_thousand_changes_offline() {
    let mut f = fixture();
    let mut times = Vec::with_capacity(10_000);
    for n in 0..10_000u64 {
        f.host.now.fetch_add(8_640_000, Ordering::Relaxed);
        let start = std::time::Instant::now();
        f.write(&[&format!("INSERT INTO tasks (id, title) VALUES ('{n:05}', 'new')")]).unwrap();
        times.push(start.elapsed());
        if n % 100 == 0 {
            assert!(!f.store.retry_due().unwrap());
        }
    }
    times.sort_unstable();
    assert!(times[9_900].as_millis() < 50, "99 % within {:?}", times[9_900]);
    assert_eq!(
        f.read("SELECT count(*), max(attempts), min(state), max(state) FROM local_changes"),
        "10000|0|pending|pending"
    );
    assert_eq!(f.read("SELECT count(*) FROM tasks"), "10000");
    let (mut after, mut count) = (0, 0);
    while let Some(last) = f.store.entries_after(after, 512).unwrap().last() {
        count += last.seq - after;
        after = last.seq;
    }
    assert_eq!(count, 10_000);
}

/// Item 38: settled entries stay for the retention time, others for ever.
#[test]
fn only_settled_entries_are_pruned() {
    let mut f = fixture();
    for id in ["a", "b", "c"] {
        insert(&mut f, id);
    }
    f.apply(vec![told(2, vec![failure(1, Uuid::nil(), Code::PermissionDenied)])]);
    f.write(&["INSERT INTO tasks (id) VALUES ('a')"]).unwrap();
    assert_eq!(f.store.prune(1_000).unwrap(), 0, "its time has not passed");
    assert_eq!(f.store.prune(u64::MAX >> 1).unwrap(), 1);
    assert_eq!(states(&f), "1|1|error|1\n3|3|pending|0\n4|-|held|0");
    f.store.discard(4).unwrap();
    insert(&mut f, "d");
    assert_eq!(f.read("SELECT max(tx), max(seq) FROM local_changes"), "5|4", "no name is given twice");
}
