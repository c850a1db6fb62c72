//! Numbers, verdicts, retries, and what waits for what.

use std::sync::atomic::Ordering;

use millstream_client_core::replica::Step;
use millstream_client_store::{Edit, EntryState, Outcome, Store, StoreError, Verdict};
use millstream_schemas::frame::Confirmed;
use millstream_schemas::stream::{self, Loss};
use millstream_schemas::{Clock, Code, Row};
use uuid::Uuid;

use super::fixture::{
    Fixture, confirmed, entry, failed, failure, fixture, insert, queue, schema, states, submits, task, told, update,
    upsert,
};

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
    assert_eq!(f.store.retry(1).unwrap().unwrap().client_seq, 3);
    let of_before = |entry: &millstream_client_store::QueueEntry| entry.error_code.is_some() || entry.error.is_some();
    assert!(!f.store.transaction(1).unwrap().iter().any(of_before), "it is another attempt");
    assert_eq!(f.tasks(), "a|mine|0\nb|-|-\nz|server|1");
    assert!(matches!(f.store.retry(1), Err(StoreError::NotFailed { tx: 1, state: Some(_) })));
    let submit = f.store.pending(2, 1).unwrap().remove(0);
    assert_eq!((submit.client_seq, submit.attempt, submit.changes[1].change_id), (3, 1, change_id));
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
        assert_eq!((submit.client_seq, submit.attempt), (u64::from(attempt), attempt));
        f.apply(vec![failed(submit.client_seq, Code::BusinessRule)]);
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
    assert_eq!(f.store.retry(1).unwrap().unwrap().client_seq, 6);
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
    assert_eq!(f.store.retry(1).unwrap().unwrap().client_seq, 3);
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
    for (bad, what) in [(edit("nope", "x"), "no column"), (edit("created_at", "x"), "cannot be")] {
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

/// Items 16, 25, 28: losing is success.
#[test]
fn what_lost_to_newer_changes_is_settled() {
    let mut f = fixture();
    f.apply(vec![upsert(vec![task("a", "p", "server", false)])]);
    update(&mut f, "a", "mine");
    f.write(&["UPDATE tasks SET title = 'again', done = 1"]).unwrap();
    let lost = [(1, stream::Verdict::Superseded), (2, stream::Verdict::Merged)].map(|(client_seq, verdict)| Loss {
        client_seq,
        verdict,
        change_id: Uuid::nil(),
    });
    let newer = upsert(vec![task("a", "p", "theirs", true)]);
    let step = Step::Confirmed(Confirmed { client_seq: 2, run_id: Uuid::nil(), failed: vec![], lost: lost.to_vec() });
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
    assert!(submits.is_sorted_by(|a, b| a.client_seq < b.client_seq && a.changes[0].stamp < b.changes[0].stamp));
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
                let client_seq = info.confirmed_seq + 1 + next(info.last_seq - info.confirmed_seq);
                let codes = [Code::BusinessRule, Code::PermissionDenied, Code::PredecessorFailed];
                let rejected = (info.confirmed_seq + 1..=client_seq)
                    .filter(|_| next(3) == 0)
                    .collect::<Vec<_>>()
                    .into_iter()
                    .map(|client_seq| failure(client_seq, Uuid::nil(), codes[(client_seq % 3) as usize]))
                    .collect();
                f.apply(vec![told(client_seq, rejected)]);
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
        let expected: Vec<String> =
            (info.confirmed_seq + 1..=info.last_seq).map(|client_seq| client_seq.to_string()).collect();
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
        count += last.client_seq - after;
        after = last.client_seq;
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
