//! Tests of the downlink: scripted messages in, readable frames out.

use std::collections::BTreeSet;
use std::sync::Arc;

use millstream_schemas::frame::Confirmed;
use millstream_schemas::frame::ServerFrame;
use millstream_schemas::stream::{OriginEntry, Watermark};
use millstream_schemas::{Lsn, Position, Scope};
use uuid::Uuid;

use crate::downlink::{Downlink, Next, Out};
use crate::fence::Fence;
use crate::message::{Message, tests::message};
use crate::reach::{Moves, tests::board};

const CLIENT: Uuid = Uuid::from_u128(7);

fn project(id: &str) -> Scope {
    Scope::new("project", id)
}

/// A snapshot that sees every transaction below `xmax` committed before `lsn` (tests use xid = LSN).
fn fence(xmax: u64, lsn: u64) -> Arc<Fence> {
    Arc::new(Fence::parse(&format!("{xmax}:{xmax}:"), &Lsn(0x10_0000 + lsn).to_string()).unwrap())
}

/// Messages whose LSN is `0x10_0000 + n` and whose xid is `n`.
fn msg(stream_seq: u64, n: u64, index: u32, last: bool, scope: Option<Scope>) -> Message {
    let mut message = message(stream_seq, 0x10_0000 + n, index, last, scope);
    message.xid = n as u32;
    message
}

/// With which memberships move; none named: any.
fn moving(mut message: Message, scopes: &[Scope]) -> Message {
    message.moves = Some(if scopes.is_empty() { Moves::Any } else { Moves::Scopes(scopes.to_vec()) });
    message
}

/// A session that was caught up long ago.
fn downlink(scopes: &[Scope]) -> Downlink {
    let mut link = opened(scopes, fence(0, 0));
    link.settle(&mut Vec::new());
    link.authorized(&scopes.iter().cloned().collect(), fence(0, 0x100), &mut Vec::new());
    link
}

/// A session that opened at this moment, behind the last message that it was sent.
fn opened(scopes: &[Scope], moment: Arc<Fence>) -> Downlink {
    let position = Position { epoch: Uuid::nil(), stream_seq: 10, lsn: Lsn(0x10_0000) };
    Downlink::new(CLIENT, "alice", Arc::new(board()), position, None, scopes.iter().cloned(), moment)
}

fn words(out: Vec<Out>) -> String {
    let word = |frame: Out| match frame {
        Out::Shared(text) => match serde_json::from_str(&text).unwrap() {
            ServerFrame::Rows(rows) => format!("rows{}{}", rows.stream_seq, if rows.last { "!" } else { "" }),
            other => panic!("{other:?}"),
        },
        Out::Own(ServerFrame::Commit { position }) => format!("commit{}", position.stream_seq),
        Out::Own(ServerFrame::CaughtUp { position }) => format!("caught_up{}", position.stream_seq),
        Out::Own(ServerFrame::Confirmed(confirmed)) => format!("confirmed{}", confirmed.client_seq),
        Out::Own(ServerFrame::SnapshotApply {}) => "apply".to_owned(),
        Out::Own(ServerFrame::SnapshotEnd { position }) => format!("end{}", position.stream_seq),
        Out::Own(ServerFrame::ScopeRemoved { scope }) => format!("-{scope}"),
        Out::Own(other) => panic!("{other:?}"),
    };
    out.into_iter().map(word).collect::<Vec<_>>().join(" ")
}

fn feed(downlink: &mut Downlink, message: Message) -> String {
    let mut out = Vec::new();
    assert_eq!(downlink.message(&message, &mut out), Next::Continue);
    downlink.settle(&mut out);
    words(out)
}

fn origin(mut message: Message, client: Uuid, client_seq: u64) -> Message {
    message.origin = vec![OriginEntry {
        client_id: client,
        first_seq: client_seq,
        client_seq,
        run_id: Uuid::nil(),
        failed: Vec::new(),
        lost: Vec::new(),
    }];
    message
}

/// What a ledger that ends at `client_seq` says.
fn ledger(client_seq: u64) -> Option<Confirmed> {
    Some(Confirmed { client_seq, run_id: Uuid::nil(), failed: Vec::new(), lost: Vec::new() })
}

#[test]
fn only_held_scopes_are_sent_and_transactions_end_once() {
    let mut link = downlink(&[project("a"), Scope::global()]);
    assert_eq!(feed(&mut link, msg(11, 1, 0, true, Some(project("a")))), "rows11!");
    assert_eq!(feed(&mut link, msg(12, 2, 0, true, Some(project("b")))), "");
    assert_eq!(feed(&mut link, msg(13, 3, 0, false, Some(project("a")))), "", "held until the end is known");
    assert_eq!(feed(&mut link, msg(14, 3, 1, true, Some(project("b")))), "rows13 commit14");
    assert_eq!(feed(&mut link, msg(15, 4, 0, false, Some(project("b")))), "");
    assert_eq!(feed(&mut link, msg(16, 4, 1, true, Some(Scope::global()))), "rows16!");
}

#[test]
fn confirmation_comes_before_what_applies_it() {
    let mut link = downlink(&[project("a")]);
    assert_eq!(feed(&mut link, origin(msg(11, 1, 0, true, Some(project("a"))), CLIENT, 1)), "confirmed1 rows11!");
    assert_eq!(feed(&mut link, origin(msg(12, 2, 0, true, None), CLIENT, 2)), "confirmed2 commit12");
    assert_eq!(feed(&mut link, origin(msg(13, 3, 0, true, None), Uuid::nil(), 9)), "");
    assert_eq!(feed(&mut link, origin(msg(14, 4, 0, true, None), CLIENT, 2)), "", "said before");
}

#[test]
fn the_ledger_is_confirmed_behind_its_fence() {
    let mut link = downlink(&[]);
    link.ledger(Lsn(0x10_0000 + 0x200), ledger(5), false);
    assert!(link.waits());
    assert_eq!(feed(&mut link, msg(11, 0x1FF, 0, true, None)), "");
    assert_eq!(feed(&mut link, msg(12, 0x200, 0, true, None)), "confirmed5 commit12");
    assert!(!link.waits());
}

#[test]
fn a_catch_up_leaves_confirmation_to_the_ledger() {
    // The message that told of a failure of 4 is of a subject that a catch-up does not fetch.
    let mut link = downlink(&[project("a")]);
    link.ledger(Lsn(0x10_0000 + 0x200), ledger(5), false);
    assert_eq!(feed(&mut link, origin(msg(11, 1, 0, true, Some(project("a"))), CLIENT, 5)), "rows11!");
    assert_eq!(
        feed(&mut link, origin(msg(12, 2, 0, true, Some(project("a"))), CLIENT, 6)),
        "confirmed5 confirmed6 rows12!"
    );
}

#[test]
fn a_watermark_passes_the_fence_on_a_quiet_database() {
    let mut link = downlink(&[]);
    link.ledger(Lsn(0x10_0000 + 0x200), ledger(5), false);
    let mut out = Vec::new();
    let mark = Watermark { epoch: Uuid::nil(), lsn: Lsn(0x10_0000 + 0x200), stream_seq: 11 };
    link.watermark(Watermark { epoch: CLIENT, ..mark });
    link.settle(&mut out);
    link.watermark(mark);
    link.settle(&mut out);
    assert!(out.is_empty(), "message 11 has not been fed");
    assert_eq!(feed(&mut link, msg(11, 1, 0, true, None)), "confirmed5 commit11");
}

#[test]
fn a_snapshot_joins_without_gap_or_repeat() {
    let mut link = downlink(&[project("a")]);
    // The snapshot sees xids below 0x50 and lies before 0x10_0060; 0x55 was published already but is invisible to it.
    let snapshot = fence(0x50, 0x60);
    let back =
        [Arc::new(msg(8, 0x49, 0, true, Some(project("b")))), Arc::new(msg(9, 0x55, 0, true, Some(project("b"))))];
    link.joined([project("b")], &snapshot, &back);
    assert_eq!(feed(&mut link, msg(11, 0x4A, 0, true, Some(project("b")))), "", "in the snapshot");
    assert_eq!(feed(&mut link, msg(12, 0x56, 0, true, Some(project("b")))), "", "not in the snapshot: comes after it");
    assert_eq!(feed(&mut link, msg(13, 0x4B, 0, true, Some(project("a")))), "rows13!", "seen by it: comes before it");
    assert_eq!(feed(&mut link, msg(14, 0x80, 0, false, Some(project("b")))), "apply rows9! rows12! end13");
    assert_eq!(feed(&mut link, msg(15, 0x80, 1, true, None)), "rows14 commit15");
    assert_eq!(feed(&mut link, msg(16, 0x81, 0, true, Some(project("b")))), "rows16!");
}

#[test]
fn memberships_are_read_before_the_transaction_takes_effect() {
    let mut link = downlink(&[project("a"), Scope::user("alice")]);
    let grant = |stream_seq, n, last| {
        moving(msg(stream_seq, n, 0, last, Some(Scope::user("alice"))), &[project("a"), project("b")])
    };
    let mut out = Vec::new();
    assert_eq!(link.message(&msg(10, 0x200, 0, false, Some(project("a"))), &mut out), Next::Continue);
    assert_eq!(link.message(&grant(11, 0x200, false), &mut out), Next::Continue);
    let last = origin(msg(12, 0x200, 1, true, Some(project("b"))), CLIENT, 1);
    assert_eq!(link.message(&last, &mut out), Next::Reauthorize);
    assert_eq!(words(std::mem::take(&mut out)), "", "rows of a scope that the transaction revokes are never sent");
    let snapshot = fence(0x201, 0x300);
    let scopes: BTreeSet<Scope> = [Scope::user("alice"), project("b")].into();
    assert_eq!(link.authorized(&scopes, snapshot.clone(), &mut out), [project("b")]);
    link.joined([project("b")], &snapshot, &[]);
    assert_eq!(link.message(&last, &mut out), Next::Continue);
    link.settle(&mut out);
    assert_eq!(words(std::mem::take(&mut out)), "-project:a rows11 confirmed1", "the rest waits for the fence");
    assert_eq!(feed(&mut link, msg(13, 0x300, 0, true, None)), "apply end12");
    assert_eq!(feed(&mut link, msg(14, 0x301, 0, true, Some(project("a")))), "", "revoked");
    // A membership that the authorisation already saw is not read again.
    assert_eq!(feed(&mut link, grant(15, 0x200 - 1, true)), "rows15!");
    // Other rows in the user's scope move nothing.
    assert_eq!(feed(&mut link, msg(16, 0x400, 0, true, Some(Scope::user("alice")))), "rows16!");
}

/// A scope that was lost and won again, before anybody read the memberships: what happened in it in between is not the user's.
#[test]
fn a_scope_that_ended_comes_again_as_a_snapshot() {
    let mut link = downlink(&[project("a"), project("b"), Scope::user("alice")]);
    let user = || Some(Scope::user("alice"));
    let lost = moving(msg(11, 0x101, 0, true, user()), &[project("a")]);
    let mut out = Vec::new();
    assert_eq!(link.message(&lost, &mut out), Next::Reauthorize);
    // Read so late that it is there again.
    let scopes: BTreeSet<Scope> = [Scope::user("alice"), project("a"), project("b")].into();
    assert_eq!(link.lacks(&scopes), [project("a")]);
    let later = fence(0x110, 0x110);
    assert_eq!(link.authorized(&scopes, later.clone(), &mut out), [project("a")]);
    link.joined([project("a")], &later, &[]);
    assert_eq!(link.message(&lost, &mut out), Next::Continue);
    link.settle(&mut out);
    assert_eq!(words(std::mem::take(&mut out)), "rows11!");
    assert_eq!(feed(&mut link, msg(12, 0x102, 0, true, Some(project("a")))), "", "while it was not the user's");
    assert_eq!(feed(&mut link, msg(13, 0x103, 0, true, Some(project("b")))), "rows13!");
    let won = moving(msg(14, 0x104, 0, true, user()), &[project("a")]);
    assert_eq!(feed(&mut link, won), "rows14!", "known by the snapshot");
    assert_eq!(feed(&mut link, msg(15, 0x110, 0, true, Some(project("a")))), "apply end14 rows15!");
}

/// Memberships were read when the user had the scope, but not for it: another transaction asked.
#[test]
fn a_moment_that_sees_a_loss_does_not_hide_it() {
    let mut link = downlink(&[project("a"), Scope::user("alice")]);
    let mut out = Vec::new();
    // The authorisation sees the loss at 0x102, and that the scope is there again.
    let scopes: BTreeSet<Scope> = [Scope::user("alice"), project("a")].into();
    assert!(link.authorized(&scopes, fence(0x110, 0x110), &mut out).is_empty());
    let lost = moving(msg(11, 0x102, 0, true, Some(Scope::user("alice"))), &[project("a")]);
    assert_eq!(link.message(&lost, &mut out), Next::Reauthorize);
    assert_eq!(link.lacks(&scopes), [project("a")]);
}

#[test]
fn what_is_reached_through_a_scope_ends_with_it_and_rows_behind_that_are_not_sent() {
    let (organisation, user) = (Scope::new("organisation", "o"), Scope::user("alice"));
    let mut link = downlink(&[organisation.clone(), project("a"), user.clone()]);
    let mut out = Vec::new();
    let lost = moving(msg(11, 0x101, 0, false, Some(user)), &[organisation]);
    assert_eq!(link.message(&lost, &mut out), Next::Continue);
    assert_eq!(link.message(&msg(12, 0x101, 1, false, Some(project("a"))), &mut out), Next::Continue);
    let last = msg(13, 0x101, 2, true, Some(project("c")));
    assert_eq!(link.message(&last, &mut out), Next::Reauthorize);
    assert!(link.authorized(&[Scope::user("alice")].into(), fence(0x102, 0x102), &mut out).is_empty());
    assert_eq!(link.message(&last, &mut out), Next::Continue);
    link.settle(&mut out);
    assert_eq!(words(out), "-organisation:o -project:a rows11 commit13");
}

#[test]
fn a_truncation_may_end_every_membership() {
    let mut link = downlink(&[Scope::global(), project("a"), Scope::user("alice")]);
    let emptied = moving(msg(11, 0x101, 0, true, Some(Scope::global())), &[]);
    assert!(link.may_lose(&emptied, &[]));
    let mut out = Vec::new();
    assert_eq!(link.message(&emptied, &mut out), Next::Reauthorize);
    let scopes: BTreeSet<Scope> = [Scope::user("alice"), Scope::global()].into();
    assert!(link.authorized(&scopes, fence(0x102, 0x102), &mut out).is_empty());
    assert_eq!(words(out), "-project:a");
}

#[test]
fn another_epoch_ends_the_session() {
    let mut link = downlink(&[]);
    let mut message = msg(11, 1, 0, true, None);
    message.position.epoch = CLIENT;
    assert_eq!(link.message(&message, &mut Vec::new()), Next::EpochChanged);
}

/// Memberships read in a snapshot that does not see what is behind the cursor would hold for ever.
#[test]
fn memberships_that_moved_before_the_cursor_are_noticed() {
    let downlink = downlink(&[]);
    let moved = moving(msg(10, 8, 0, true, Some(Scope::user("alice"))), &[project("p")]);
    let other = msg(9, 7, 0, true, Some(project("p")));
    let back = [Arc::new(other), Arc::new(moved)];
    let outdates = |fence: &Fence, scopes: &[Scope], back| {
        downlink
            .outdates(fence, &scopes.iter().cloned().collect(), back)
            .map(|message: &Message| message.position.stream_seq)
    };
    assert_eq!(outdates(&fence(8, 0x100), &[], &back), Some(10));
    assert_eq!(outdates(&fence(9, 0x100), &[], &back), None);
    assert_eq!(outdates(&fence(0, 0), &[], &back[..1]), None);
    // Of a scope that the snapshot is about to grant, through which another one went meanwhile.
    let organisation = Scope::new("organisation", "o");
    let gone = moving(msg(10, 8, 0, true, Some(organisation.clone())), &[project("p")]);
    let back = [Arc::new(gone)];
    assert_eq!(outdates(&fence(8, 0x100), &[organisation], &back), Some(10));
    assert_eq!(outdates(&fence(8, 0x100), &[], &back), None, "of no concern to those outside");
}

#[test]
fn memberships_through_another_scope_follow_its_rows() {
    let organisation = Scope::new("organisation", "o");
    let projects = |stream_seq, n, ids: &[&str]| {
        let scopes: Vec<Scope> = ids.iter().map(|id| project(id)).collect();
        moving(msg(stream_seq, n, 0, true, Some(organisation.clone())), &scopes)
    };
    let mut link = downlink(&[organisation.clone(), project("a")]);
    assert_eq!(feed(&mut link, msg(11, 0x201, 0, true, Some(organisation.clone()))), "rows11!", "a new name, say");
    let mut out = Vec::new();
    for message in [projects(12, 0x202, &["b"]), projects(12, 0x202, &["a"])] {
        assert_eq!(link.message(&message, &mut out), Next::Reauthorize);
    }
    let mut outside = downlink(&[project("a")]);
    assert_eq!(feed(&mut outside, projects(12, 0x202, &["a"])), "");
}

/// A catch-up ends inside a transaction, the rest of which the ring has: perhaps not of a scope that is held.
#[test]
fn an_open_transaction_ends_where_another_begins() {
    let lsn = |n: u64| Lsn(0x10_0000 + n);
    let mut link = downlink(&[project("a")]);
    let mut out = Vec::new();
    assert_eq!(feed(&mut link, msg(11, 1, 0, false, Some(project("a")))), "");
    assert_eq!(link.ends_before(lsn(1), &mut out), None);
    assert_eq!(words(std::mem::take(&mut out)), "", "it goes on");
    assert_eq!(feed(&mut link, msg(13, 1, 2, false, Some(project("a")))), "");
    link.skip_to(14);
    assert_eq!(link.ends_before(lsn(2), &mut out), None);
    assert_eq!(words(std::mem::take(&mut out)), "rows11 rows13 commit13");
    assert_eq!(link.ends_before(lsn(3), &mut out), None);
    assert_eq!(words(out), "", "nothing is open");
}

/// Its last message is in a scope that a catch-up does not fetch, but it took a membership away.
#[test]
fn a_transaction_that_moved_memberships_ends_once_they_have_been_read() {
    let lsn = |n: u64| Lsn(0x10_0000 + n);
    let mut link = downlink(&[project("a"), Scope::user("alice")]);
    let gone = moving(msg(11, 0x101, 0, false, Some(Scope::user("alice"))), &[project("a")]);
    assert_eq!(feed(&mut link, gone), "");
    assert_eq!(feed(&mut link, msg(12, 0x101, 1, false, Some(project("a")))), "");
    link.skip_to(14);
    let mut out = Vec::new();
    assert_eq!(link.ends_before(lsn(0x102), &mut out), Some((lsn(0x101), 0x101)));
    assert!(out.is_empty());
    link.authorized(&BTreeSet::from([Scope::user("alice")]), fence(0x102, 0x102), &mut out);
    assert_eq!(link.ends_before(lsn(0x102), &mut out), None);
    assert_eq!(words(out), "-project:a rows11 commit12");
}

/// What a catch-up passes over may have told of a failure.
#[test]
fn nothing_is_confirmed_in_a_catch_up() {
    let mut link = downlink(&[project("a")]);
    link.knows(5);
    link.mute();
    assert_eq!(feed(&mut link, origin(msg(12, 2, 0, true, Some(project("a"))), CLIENT, 7)), "rows12!");
    assert_eq!(link.confirmed(), 5);
    link.ledger(Lsn(0x10_0000 + 3), ledger(8), false);
    assert_eq!(feed(&mut link, msg(13, 3, 0, true, None)), "confirmed8 commit13");
    assert_eq!(feed(&mut link, origin(msg(14, 4, 0, true, None), CLIENT, 9)), "confirmed9 commit14");
}

/// A snapshot that was cut goes on: what is behind its first moment is sent as it comes, however much that is.
#[test]
fn a_resumed_snapshot_keeps_nothing_back() {
    let mut link = downlink(&[]);
    let mut out = Vec::new();
    link.resumed([project("a")], &fence(0x50, 0x60), Lsn(0x10_0080), &mut out);
    assert_eq!(words(out), "apply");
    assert_eq!(feed(&mut link, msg(11, 0x4F, 0, true, Some(project("a")))), "", "seen at first");
    assert_eq!(feed(&mut link, msg(12, 0x50, 0, true, Some(project("a")))), "rows12!");
    assert_eq!(feed(&mut link, msg(13, 0x70, 0, true, Some(project("a")))), "rows13!");
    assert_eq!(feed(&mut link, msg(14, 0x80, 0, true, None)), "end13");
    assert_eq!(feed(&mut link, msg(15, 0x81, 0, true, Some(project("a")))), "rows15!");
}

/// A session begins while a transaction is being published: its snapshot may not see it, and the half that is there already
/// waits for the rest.
#[test]
fn a_session_may_begin_inside_a_transaction() {
    let position = Position { epoch: Uuid::nil(), stream_seq: 10, lsn: Lsn(0x10_0008) };
    let open = Some((Lsn(0x10_0008), 8));
    let mut link = Downlink::new(CLIENT, "alice", Arc::new(board()), position, open, [], fence(8, 0x9));
    let mut out = Vec::new();
    let new = link.authorized(&BTreeSet::from([project("a")]), fence(8, 0x8), &mut out);
    link.joined(new, &fence(8, 0x8), &[Arc::new(msg(10, 8, 0, false, Some(project("a"))))]);
    link.settle(&mut out);
    assert_eq!(words(out), "");
    assert_eq!(feed(&mut link, msg(11, 8, 1, true, Some(project("a")))), "apply rows10 rows11! end11 caught_up11");
}

/// A change whose fate the session has not been told, because it was settled before the session began and the ledger did not
/// show it yet, must not seem to have been applied.
#[test]
fn what_nobody_told_of_is_read_from_the_ledger() {
    let mut link = downlink(&[project("a")]);
    link.ledger(Lsn(0x10_0001), ledger(4), false);
    let next = origin(msg(12, 2, 0, true, Some(project("a"))), CLIENT, 6);
    let mut out = Vec::new();
    assert_eq!(link.message(&next, &mut out), Next::ReadLedger);
    assert!(out.is_empty());
    link.ledger(Lsn(0x10_0003), ledger(6), false);
    assert_eq!(feed(&mut link, next), "rows12!");
    assert_eq!(feed(&mut link, origin(msg(13, 3, 0, true, None), CLIENT, 7)), "confirmed6 confirmed7 commit13");
}

#[test]
fn a_session_is_caught_up_once_the_stream_has_passed_its_opening() {
    let mut link = opened(&[project("a")], fence(0, 0x100));
    assert!(link.waits());
    assert_eq!(feed(&mut link, msg(11, 1, 0, true, Some(project("a")))), "rows11!");
    assert_eq!(feed(&mut link, msg(12, 0xFF, 0, true, None)), "");
    assert_eq!(feed(&mut link, msg(13, 0x100, 0, false, Some(project("a")))), "", "inside of a transaction");
    assert_eq!(feed(&mut link, msg(14, 0x100, 1, true, None)), "rows13 commit14 caught_up14");
    assert!(!link.waits());
    assert_eq!(feed(&mut link, msg(15, 0x101, 0, true, Some(project("a")))), "rows15!", "told once");
}

#[test]
fn a_session_for_which_there_is_nothing_is_caught_up_too() {
    let mut link = opened(&[], fence(0, 0x100));
    let mut out = Vec::new();
    link.watermark(Watermark { epoch: Uuid::nil(), lsn: Lsn(0x10_0000 + 0x100), stream_seq: 10 });
    link.settle(&mut out);
    assert_eq!(words(out), "caught_up10");
}

/// What became of the client's own changes belongs to it, and so do the rows of a bracket that has begun.
#[test]
fn a_session_is_caught_up_behind_its_ledger_and_its_snapshots() {
    let mut link = opened(&[project("a")], fence(0, 0x10));
    link.ledger(Lsn(0x10_0000 + 0x20), ledger(5), false);
    link.joined([project("b")], &fence(0x30, 0x30), &[]);
    assert_eq!(feed(&mut link, msg(11, 0x10, 0, true, Some(project("a")))), "rows11!");
    assert_eq!(feed(&mut link, msg(12, 0x20, 0, true, None)), "confirmed5");
    assert_eq!(feed(&mut link, msg(13, 0x30, 0, true, None)), "apply end12 caught_up13");
    // More failures than can be told at once: the session ends, and the next one is told of the rest.
    let mut link = opened(&[], fence(0, 0x10));
    link.ledger(Lsn(0x10_0000 + 0x10), ledger(5), true);
    assert_eq!(feed(&mut link, msg(11, 0x10, 0, true, None)), "confirmed5 commit11");
    assert!(link.is_cut());
}
