use super::*;
use millstream_schemas::TableOp;
use uuid::Uuid;

fn position(stream_seq: u64) -> Position {
    Position { epoch: Uuid::nil(), stream_seq, lsn: Lsn(stream_seq) }
}

fn changes(names: &[&str]) -> Vec<TableChanges> {
    let one = |name: &&str| TableChanges { table: (*name).into(), op: TableOp::Upsert, columns: None, rows: vec![] };
    names.iter().map(one).collect()
}

fn rows(lsn: u64, index: u32, last: bool, name: &str) -> ServerFrame {
    ServerFrame::Rows(Rows {
        stream_seq: lsn,
        lsn: Lsn(lsn),
        index,
        last,
        epoch: Uuid::nil(),
        at: lsn,
        traceparent: None,
        changes: changes(&[name]),
    })
}

fn confirmed(client_seq: u64) -> ServerFrame {
    ServerFrame::Confirmed(Confirmed { client_seq, run_id: Uuid::nil(), failed: vec![], lost: vec![] })
}

fn commit(stream_seq: u64) -> ServerFrame {
    ServerFrame::Commit { position: position(stream_seq) }
}

fn scope() -> Scope {
    Scope::new("project", "1")
}

/// Runs the frames; the works are written as one line each.
#[track_caller]
fn check(resume: Resume, frames: Vec<ServerFrame>, expected: &[&str]) {
    check_with(Replica::new(resume), frames, expected);
}

#[track_caller]
fn check_with(mut replica: Replica, frames: Vec<ServerFrame>, expected: &[&str]) {
    for frame in frames {
        assert_eq!(replica.handle(frame, 10).unwrap(), None);
    }
    let names = |changes: &[TableChanges]| changes.iter().map(|c| c.table.clone()).collect::<Vec<_>>().join("+");
    let lines: Vec<String> = replica
        .take()
        .iter()
        .map(|work| match work {
            Work::ClearStage => "clear".into(),
            Work::Stage(changes) => format!("stage {}", names(changes)),
            Work::Mark(mark, rows) => format!("mark {} {} {rows}", mark.token, mark.mark),
            Work::ClearSpill => "clear spill".into(),
            Work::Spill(part, changes) => format!("spill {part} {}", names(changes)),
            Work::Unspill(part) => format!("unspill {part}"),
            Work::Apply(batch) => {
                let steps: Vec<String> = batch
                    .steps
                    .iter()
                    .map(|step| match step {
                        Step::Rows(changes) => names(changes),
                        Step::Spilled(part) => format!("spilled {part}"),
                        Step::Confirmed(confirmed) => format!("confirmed {}", confirmed.client_seq),
                        Step::ScopeRemoved(scope) => format!("lost {scope}"),
                        Step::Snapshot { full, .. } => format!("snapshot{}", if *full { " full" } else { "" }),
                    })
                    .collect();
                let caught_up = if batch.caught_up { ", caught up" } else { "" };
                format!("{} @{}{caught_up}", steps.join(", "), batch.position.unwrap().stream_seq)
            }
        })
        .collect();
    assert_eq!(lines, expected);
}

#[test]
fn nothing_is_ready_before_the_last_flag() {
    check(Resume::CatchUp, vec![rows(5, 0, false, "a"), confirmed(3)], &[]);
    check(
        Resume::CatchUp,
        vec![rows(5, 0, false, "a"), confirmed(3), rows(5, 1, true, "b")],
        &["a, confirmed 3, b @5"],
    );
}

#[test]
fn commit_applies_what_is_staged() {
    check(Resume::CatchUp, vec![confirmed(3), commit(9)], &["confirmed 3 @9"]);
    let lost = ServerFrame::ScopeRemoved { scope: scope() };
    check(Resume::CatchUp, vec![rows(5, 0, false, "a"), lost, commit(6)], &["a, lost project:1 @6"]);
}

#[test]
fn caught_up_comes_with_what_was_sent_before_it() {
    let caught_up = || ServerFrame::CaughtUp { position: position(9) };
    check(Resume::CatchUp, vec![caught_up()], &[" @9, caught up"]);
    check(Resume::CatchUp, vec![rows(5, 0, true, "a"), caught_up(), rows(10, 0, true, "b")], &["a+b @10, caught up"]);
    let begin = || ServerFrame::SnapshotBegin { scopes: vec![scope()], rows: 0, token: None, resumed: false };
    let end = ServerFrame::SnapshotEnd { position: position(8) };
    let frames = vec![begin(), ServerFrame::SnapshotApply {}, end, caught_up()];
    check(Resume::Snapshot, frames, &["clear", "snapshot full @9, caught up"]);
    let mut replica = Replica::new(Resume::Snapshot);
    replica.handle(begin(), 10).unwrap();
    assert!(replica.handle(caught_up(), 10).is_err(), "within a snapshot");
}

#[test]
fn a_cut_transaction_starts_anew() {
    let frames = vec![rows(5, 0, false, "a"), rows(5, 1, false, "b"), rows(5, 0, false, "c"), rows(5, 1, true, "d")];
    check(Resume::CatchUp, frames, &["c+d @5"]);
}

#[test]
fn a_large_transaction_is_kept_aside() {
    // Frames count 10 bytes each.
    let small = || Replica::new(Resume::CatchUp).spilling_above(25);
    let parts = |names: &[&str], last: bool| -> Vec<ServerFrame> {
        let end = names.len() - 1;
        names.iter().enumerate().map(|(n, name)| rows(5, n as u32, last && n == end, name)).collect()
    };
    check_with(small(), parts(&["a", "b"], false), &[]);
    let all = ["a", "b", "c", "d", "e", "f", "g"];
    check_with(small(), parts(&all, true), &["clear spill", "spill 1 a+b+c", "spill 1 d+e+f", "spilled 1, g @5"]);
    // Between others, in their order; the next one knows that there is nothing of earlier sessions.
    let mut frames = vec![rows(4, 0, true, "x"), confirmed(1)];
    frames.extend(parts(&all[..4], false));
    frames.extend([confirmed(2), commit(6), rows(7, 0, true, "y")]);
    check_with(
        small(),
        frames,
        &["x @4", "clear spill", "spill 1 a+b+c", "confirmed 1, spilled 1, d, confirmed 2, y @7"],
    );
    // Cut, and sent anew.
    let mut frames = parts(&all[..4], false);
    frames.extend(parts(&["A", "B"], true));
    check_with(small(), frames, &["clear spill", "spill 1 a+b+c", "unspill 1", "A+B @5"]);
    // On both sides of a snapshot.
    let mut frames = parts(&all[..3], false);
    frames.extend([
        ServerFrame::SnapshotBegin { scopes: vec![scope()], rows: 3, token: None, resumed: false },
        ServerFrame::SnapshotApply {},
        rows(5, 3, false, "d"),
        rows(5, 4, false, "e"),
        rows(5, 5, false, "f"),
        ServerFrame::SnapshotEnd { position: position(6) },
    ]);
    let expected = ["clear spill", "spill 1 a+b+c", "clear", "spill 2 d+e+f", "spilled 1, snapshot, spilled 2 @6"];
    check_with(small(), frames, &expected);
    // What was settled before it ends does not take it along.
    let mut replica = small();
    for frame in parts(&all[..4], false) {
        replica.handle(frame, 10).unwrap();
    }
    assert_eq!((replica.staged_bytes(), replica.ready_bytes()), (10, 30));
}

#[test]
fn ready_transactions_merge() {
    check(
        Resume::CatchUp,
        vec![rows(5, 0, true, "a"), rows(6, 0, true, "b"), confirmed(1), commit(7)],
        &["a+b, confirmed 1 @7"],
    );
}

#[test]
fn a_snapshot_is_staged_until_its_end_and_rows_come_on_top() {
    let frames = vec![
        ServerFrame::SnapshotBegin { scopes: vec![scope()], rows: 3, token: None, resumed: false },
        ServerFrame::SnapshotRows { changes: changes(&["s"]), mark: None },
        rows(5, 0, true, "a"),
        ServerFrame::SnapshotRows { changes: changes(&["t"]), mark: None },
        confirmed(2),
        ServerFrame::SnapshotApply {},
        rows(6, 0, true, "b"),
        ServerFrame::SnapshotEnd { position: position(6) },
        rows(7, 0, true, "c"),
    ];
    check(Resume::Snapshot, frames.clone(), &["clear", "stage s+t", "a, confirmed 2, snapshot full, b+c @7"]);
    check(Resume::CatchUp, frames, &["clear", "stage s+t", "a, confirmed 2, snapshot, b+c @7"]);
}

#[test]
fn a_second_snapshot_waits_for_the_first() {
    let snapshot = |name: &str, stream_seq| {
        vec![
            ServerFrame::SnapshotBegin { scopes: vec![scope()], rows: 3, token: None, resumed: false },
            ServerFrame::SnapshotRows { changes: changes(&[name]), mark: None },
            ServerFrame::SnapshotApply {},
            ServerFrame::SnapshotEnd { position: position(stream_seq) },
        ]
    };
    let frames = [snapshot("s", 5), snapshot("t", 6)].concat();
    check(Resume::CatchUp, frames, &["clear", "stage s", "snapshot @5", "clear", "stage t", "snapshot @6"]);
}

#[test]
fn what_is_not_the_replicas_comes_back_and_nonsense_is_refused() {
    let mut replica = Replica::new(Resume::CatchUp);
    let accepted = ServerFrame::Accepted { client_seq: 1 };
    assert_eq!(replica.handle(accepted.clone(), 1).unwrap(), Some(accepted));
    assert!(replica.handle(ServerFrame::SnapshotRows { changes: vec![], mark: None }, 1).is_err());
    assert!(replica.handle(ServerFrame::SnapshotEnd { position: position(1) }, 1).is_err());
}

#[test]
fn a_transaction_that_ends_in_another_scope_is_whole_at_the_end_of_the_bracket() {
    let end = ServerFrame::SnapshotEnd { position: position(9) };
    let frames = vec![
        ServerFrame::SnapshotBegin { scopes: vec![scope()], rows: 3, token: None, resumed: false },
        ServerFrame::SnapshotApply {},
        rows(5, 0, false, "a"),
        end,
    ];
    check(Resume::CatchUp, frames, &["clear", "snapshot, a @9"]);
}

#[test]
fn a_snapshot_says_how_far_it_is() {
    let mut replica = Replica::new(Resume::Snapshot);
    assert_eq!(replica.download(), None);
    replica
        .handle(ServerFrame::SnapshotBegin { scopes: vec![scope()], rows: 3, token: None, resumed: false }, 10)
        .unwrap();
    let part = TableChanges { rows: vec![vec![], vec![]], ..changes(&["s"]).remove(0) };
    replica.handle(ServerFrame::SnapshotRows { changes: vec![part], mark: None }, 10).unwrap();
    assert_eq!(replica.download(), Some(Download { rows: 2, total: 3 }));
    replica.handle(ServerFrame::SnapshotApply {}, 10).unwrap();
    replica.handle(ServerFrame::SnapshotEnd { position: position(1) }, 10).unwrap();
    assert_eq!(replica.download(), None);
}
