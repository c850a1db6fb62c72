use super::*;
use crate::pgoutput::{RelationColumn, Tuple};
use millstream_catalog::{Column, Members, Membership, WriteRules};
use millstream_schemas::stream::{MAX_MESSAGE_BYTES, MAX_ROW_BYTES};
use millstream_schemas::{TableChanges, TableScope};

pub(super) const TASKS: u32 = 100;
const MEMBERS: u32 = 200;
const NOTICES: u32 = 300;
pub(super) const FOREIGN: u32 = 999;
const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

fn table(oid: u32, name: &str, columns: &[&str], key: &[usize], scopes: Vec<TableScope>) -> Table {
    Table {
        synced: true,
        oid,
        name: name.into(),
        sql_name: format!("\"public\".\"{name}\""),
        columns: columns
            .iter()
            .map(|name| Column {
                name: (*name).into(),
                sql_name: format!("\"{name}\""),
                sql_type: "text".into(),
                type_oid: 25,
                growth: Default::default(),
                merge: None,
                numeric: None,
                domain: None,
                default: None,
                nullable: true,
                writable: true,
            })
            .collect(),
        key: key.to_vec(),
        scopes,
        memberships: Vec::new(),
        readable: "true".into(),
        write: WriteRules::default(),
        conflict: millstream_catalog::ConflictPolicy::Arrival,
        renamed: Default::default(),
        dropped: Vec::new(),
        delete_missing_accepted: false,
        partitioned: false,
        hidden: Vec::new(),
        insert_existing_merges: false,
        references: Vec::new(),
        rules: Vec::new(),
        validate: None,
    }
}

pub(super) fn tables() -> Arc<[Table]> {
    let project = |column| vec![TableScope { kind: "project".into(), column: Some(column) }];
    let mut members = table(MEMBERS, "members", &["project_id", "user_id", "role"], &[0, 1], project(0));
    members.memberships.push(Membership {
        kind: "project".into(),
        scope: 0,
        of: Members::User { column: 1, roles: None },
    });
    let global = vec![TableScope { kind: "global".into(), column: None }];
    let tasks = table(TASKS, "tasks", &["id", "project_id", "title"], &[0], project(1));
    Arc::new([tasks, members, table(NOTICES, "notices", &["id", "text"], &[0], global)])
}

pub(super) fn relation(id: u32, name: &'static str, columns: &[(&'static str, bool)]) -> Message<'static> {
    let columns = columns.iter().map(|&(name, identity)| RelationColumn { identity, name, type_oid: 25 }).collect();
    Message::Relation(Relation { id, namespace: "public", name, columns })
}

pub(super) fn relations() -> Vec<Message<'static>> {
    vec![
        // The relation's order differs from the catalog's, as it does after columns were added.
        relation(TASKS, "tasks", &[("title", false), ("id", true), ("project_id", true)]),
        relation(MEMBERS, "members", &[("project_id", true), ("user_id", true), ("role", false)]),
        relation(NOTICES, "notices", &[("id", true), ("text", false)]),
        relation(FOREIGN, "foreign", &[("id", true)]),
    ]
}

pub(super) fn tuple(values: &[&'static str]) -> Tuple<'static> {
    values
        .iter()
        .map(|value| match *value {
            "∅" => Value::Null,
            "…" => Value::Unchanged,
            "▒" => Value::TooLarge,
            text => Value::Text(text.as_bytes()),
        })
        .collect()
}

fn insert(relation: u32, new: &[&'static str]) -> Message<'static> {
    Message::Insert { relation, new: tuple(new) }
}

fn update(relation: u32, old: Option<Old<'static>>, new: &[&'static str]) -> Message<'static> {
    Message::Update { relation, old, new: tuple(new) }
}

fn delete(relation: u32, old: &[&'static str]) -> Message<'static> {
    Message::Delete { relation, old: Old::Key(tuple(old)) }
}

fn old_key(values: &[&'static str]) -> Option<Old<'static>> {
    Some(Old::Key(tuple(values)))
}

fn old_full(values: &[&'static str]) -> Option<Old<'static>> {
    Some(Old::Full(tuple(values)))
}

/// Runs one transaction with commit LSN 0/64 through an assembler.
fn assemble(rows: Vec<Message<'_>>) -> Vec<Outgoing> {
    let mut assembler = Assembler::new(tables(), Lsn(10), HashSet::new());
    run(&mut assembler, 100, rows)
}

fn run(assembler: &mut Assembler, lsn: u64, rows: Vec<Message<'_>>) -> Vec<Outgoing> {
    let mut out = Vec::new();
    let begin = Message::Begin { final_lsn: Lsn(lsn), at: 5, xid: 7 };
    let commit = Message::Commit { lsn: Lsn(lsn), end_lsn: Lsn(lsn + 8), at: 5 };
    let all = std::iter::once(begin).chain(relations()).chain(rows).chain([commit]);
    for message in all {
        assembler.handle(&message, &Filled::new(), &mut out).unwrap();
    }
    out
}

/// Each message as `subject payload`, with the payload's frame stripped to what matters.
fn texts(out: &[Outgoing]) -> Vec<String> {
    out.iter()
        .map(|message| {
            let changes: Vec<TableChanges> = serde_json::from_slice(&message.payload).unwrap();
            let changes: Vec<String> = changes
                .iter()
                .map(|change| {
                    let op = serde_json::to_value(change.op).unwrap();
                    let columns =
                        change.columns.as_ref().map_or(String::new(), |columns| format!("({})", columns.join(",")));
                    let rows: Vec<String> = change
                        .rows
                        .iter()
                        .map(|row| row.iter().map(|v| v.as_deref().unwrap_or("∅")).collect::<Vec<_>>().join(","))
                        .collect();
                    format!("{} {}{columns}[{}]", op.as_str().unwrap(), change.table, rows.join("|"))
                })
                .collect();
            format!("{} {}", message.subject, changes.join(" "))
        })
        .collect()
}

#[track_caller]
fn check(rows: Vec<Message<'static>>, expected: &[&str]) {
    assert_eq!(texts(&assemble(rows)), expected);
}

#[test]
fn rows_go_to_their_scopes() {
    check(vec![], &[]);
    check(vec![insert(FOREIGN, &["1"])], &[]);
    check(
        vec![
            insert(TASKS, &["one", "t1", "p1"]),
            insert(TASKS, &["two", "t2", "p2"]),
            insert(TASKS, &["∅", "t3", "p1"]),
        ],
        &["ms.wal.project.p1 upsert tasks[t1,p1,one|t3,p1,∅]", "ms.wal.project.p2 upsert tasks[t2,p2,two]"],
    );
    check(
        vec![insert(MEMBERS, &["p1", "a.b", "owner"])],
        &["ms.wal.project.p1 upsert members[p1,a.b,owner]", "ms.wal.user.a=2Eb upsert members[p1,a.b,owner]"],
    );
    check(vec![insert(NOTICES, &["1", "hello"])], &["ms.wal.global.all upsert notices[1,hello]"]);
    // No scope, no reader.
    check(vec![insert(TASKS, &["one", "t1", "∅"]), insert(TASKS, &["one", "t1", ""])], &[]);
}

#[test]
fn updates_and_deletes() {
    check(vec![update(TASKS, None, &["new", "t1", "p1"])], &["ms.wal.project.p1 upsert tasks[t1,p1,new]"]);
    check(vec![delete(TASKS, &["∅", "t1", "p1"])], &["ms.wal.project.p1 delete tasks[t1]"]);
    check(
        vec![delete(MEMBERS, &["p1", "u", "∅"])],
        &["ms.wal.project.p1 delete members[p1,u]", "ms.wal.user.u delete members[p1,u]"],
    );
    // A move between scopes: whoever loses the row is told first.
    check(
        vec![update(TASKS, old_key(&["∅", "t1", "p1"]), &["x", "t1", "p2"])],
        &["ms.wal.project.p1 delete tasks[t1]", "ms.wal.project.p2 upsert tasks[t1,p2,x]"],
    );
    check(
        vec![insert(TASKS, &["y", "t0", "p2"]), update(TASKS, old_full(&["x", "t1", "p1"]), &["x", "t1", "p2"])],
        &[
            "ms.wal.project.p2 upsert tasks[t0,p2,y]",
            "ms.wal.project.p1 delete tasks[t1]",
            "ms.wal.project.p2 upsert tasks[t1,p2,x]",
        ],
    );
    // A new key.
    check(
        vec![update(TASKS, old_key(&["∅", "t1", "p1"]), &["x", "t9", "p1"])],
        &["ms.wal.project.p1 delete tasks[t1] upsert tasks[t9,p1,x]"],
    );
    // A scope that is null now.
    check(vec![update(TASKS, old_key(&["∅", "t1", "p1"]), &["x", "t1", "∅"])], &["ms.wal.project.p1 delete tasks[t1]"]);
}

#[test]
fn unchanged_large_values() {
    check(vec![update(TASKS, None, &["…", "t1", "p1"])], &["ms.wal.project.p1 update tasks(id,project_id)[t1,p1]"]);
    check(
        vec![update(TASKS, old_full(&["large", "t1", "p1"]), &["…", "t1", "p1"])],
        &["ms.wal.project.p1 upsert tasks[t1,p1,large]"],
    );
    // It could not be read, since the row is gone by now: its new readers never see it.
    check(
        vec![update(TASKS, old_key(&["∅", "t1", "p1"]), &["…", "t1", "p2"])],
        &["ms.wal.project.p1 delete tasks[t1]"],
    );
}

#[test]
fn unchanged_large_values_are_read_for_new_readers() {
    let mut assembler = Assembler::new(tables(), Lsn::ZERO, HashSet::new());
    let mut out = Vec::new();
    let nothing = Filled::new();
    let begin = Message::Begin { final_lsn: Lsn(100), at: 5, xid: 7 };
    for message in std::iter::once(begin).chain(relations()) {
        assembler.handle(&message, &nothing, &mut out).unwrap();
    }
    let stays = update(TASKS, None, &["…", "t1", "p1"]);
    // Only once: it might be the one that makes a row small enough, or too large.
    let fixed = vec![(0, Some("t1".to_owned())), (1, Some("p1".to_owned()))];
    assert_eq!(assembler.lookup(&stays).unwrap(), Some(Lookup { table: 0, fixed, columns: vec![2], lengths: true }));
    // A length will do: the message stays as small as the change.
    assembler.handle(&stays, &vec![(2, ReadValue::Length(2000))], &mut out).unwrap();
    assert_eq!(assembler.lookup(&stays).unwrap(), None);
    let complete = update(TASKS, old_full(&["large", "t1", "p1"]), &["…", "t1", "p2"]);
    assert_eq!(assembler.lookup(&complete).unwrap(), None);
    for (moves, key, project) in [
        (update(TASKS, old_key(&["∅", "t1", "p1"]), &["…", "t1", "p2"]), "t1", "p2"),
        (update(TASKS, old_key(&["∅", "t1", "p1"]), &["…", "t2", "p1"]), "t2", "p1"),
    ] {
        let fixed = vec![(0, Some(key.to_owned())), (1, Some(project.to_owned()))];
        let expected = Lookup { table: 0, fixed, columns: vec![2], lengths: false };
        assert_eq!(assembler.lookup(&moves).unwrap(), Some(expected));
    }
    let moves = update(TASKS, old_key(&["∅", "t1", "p1"]), &["…", "t1", "p2"]);
    assembler.handle(&moves, &vec![(2, ReadValue::Text("large".into()))], &mut out).unwrap();
    let commit = Message::Commit { lsn: Lsn(100), end_lsn: Lsn(108), at: 5 };
    assembler.handle(&commit, &nothing, &mut out).unwrap();
    let texts = texts(&out);
    assert!(texts[0].ends_with(" delete tasks[t1]"), "{texts:?}");
    assert_eq!(texts[1..], ["ms.wal.project.p2 upsert tasks[t1,p2,large]"]);
}

/// Rows that cross the limit by an update that leaves a large value alone.
#[test]
fn rows_cross_the_limit_with_values_that_are_not_told() {
    let two = table(TASKS, "tasks", &["id", "a", "b"], &[0], vec![TableScope { kind: "global".into(), column: None }]);
    let mut assembler = Assembler::new(Arc::new([two]), Lsn::ZERO, HashSet::new());
    let large: &'static str = Box::leak("x".repeat(MAX_ROW_BYTES * 2 / 3).into_boxed_str());
    let mut lsn = 100;
    let mut check = |change: Message<'static>, found: Option<ReadValue>, expected: &str| {
        lsn += 100;
        let mut out = Vec::new();
        for message in [
            Message::Begin { final_lsn: Lsn(lsn), at: 5, xid: 7 },
            relation(TASKS, "tasks", &[("id", true), ("a", false), ("b", false)]),
            change,
            Message::Commit { lsn: Lsn(lsn), end_lsn: Lsn(lsn + 8), at: 5 },
        ] {
            let lookup = assembler.lookup(&message).unwrap();
            assert_eq!(lookup.is_some(), matches!(message, Message::Update { .. }) && found.is_some(), "{lsn}");
            let filled = lookup.map(|lookup| (lookup.columns[0], found.clone().unwrap())).into_iter().collect();
            assembler.handle(&message, &filled, &mut out).unwrap();
        }
        let changes: Vec<TableChanges> = serde_json::from_slice(&out[0].payload).unwrap();
        let (op, columns) = (serde_json::to_value(changes[0].op).unwrap(), changes[0].columns.clone());
        assert_eq!(format!("{} {}", op.as_str().unwrap(), columns.unwrap_or_default().join(" ")), expected, "{lsn}");
    };
    let small = |id| update(TASKS, None, &[id, "small", "…"]);
    // Not seen before: it may have been too large until now.
    check(small("1"), Some(ReadValue::Text(large.into())), "upsert ");
    check(small("1"), None, "update id a");
    check(update(TASKS, None, &["1", large, "…"]), None, "delete ");
    check(small("1"), Some(ReadValue::Text(large.into())), "upsert ");
    // Too large with what is in the table.
    check(update(TASKS, None, &["2", large, "…"]), Some(ReadValue::Text(large.into())), "delete ");
    check(update(TASKS, None, &["2", "…", "small"]), Some(ReadValue::Text(large.into())), "upsert ");
    check(update(TASKS, None, &["2", "…", "other"]), None, "update id b");
    check(insert(TASKS, &["3", large, "small"]), None, "upsert ");
    check(update(TASKS, None, &["3", "…", large]), None, "delete ");
}

/// A row that leaves one of two scopes: whoever may see it in both is told to delete it, and then needs it whole.
#[test]
fn unchanged_large_values_are_read_for_those_who_were_told_to_delete() {
    let project = |column| TableScope { kind: "project".into(), column: Some(column) };
    let tasks = table(TASKS, "tasks", &["id", "project_id", "other_id", "title"], &[0], vec![project(1), project(2)]);
    let mut assembler = Assembler::new(Arc::new([tasks]), Lsn::ZERO, HashSet::new());
    let (mut out, nothing) = (Vec::new(), Filled::new());
    let columns = [("id", true), ("project_id", true), ("other_id", true), ("title", false)];
    let begin = Message::Begin { final_lsn: Lsn(100), at: 5, xid: 7 };
    for message in [begin, relation(TASKS, "tasks", &columns)] {
        assembler.handle(&message, &nothing, &mut out).unwrap();
    }
    let leaves = update(TASKS, old_key(&["t1", "p1", "p2", "∅"]), &["t1", "p1", "∅", "…"]);
    let fixed = [Some("t1"), Some("p1"), None];
    let fixed = fixed.into_iter().enumerate().map(|(column, value)| (column, value.map(str::to_owned))).collect();
    assert_eq!(assembler.lookup(&leaves).unwrap(), Some(Lookup { table: 0, fixed, columns: vec![3], lengths: false }));
    assembler.handle(&leaves, &vec![(3, ReadValue::Text("large".into()))], &mut out).unwrap();
    let commit = Message::Commit { lsn: Lsn(100), end_lsn: Lsn(108), at: 5 };
    assembler.handle(&commit, &nothing, &mut out).unwrap();
    assert_eq!(texts(&out), ["ms.wal.project.p2 delete tasks[t1]", "ms.wal.project.p1 upsert tasks[t1,p1,∅,large]"]);
}

/// A row that goes into no message does not stop the others.
#[test]
fn rows_that_are_too_large_are_withdrawn() {
    let large: &'static str = Box::leak("x".repeat(MAX_ROW_BYTES).into_boxed_str());
    let quotes: &'static str = Box::leak("\"".repeat(MAX_ROW_BYTES / 2).into_boxed_str());
    for title in [large, quotes, "▒"] {
        check(
            vec![insert(TASKS, &[title, "t1", "p1"]), insert(TASKS, &["small", "t2", "p1"])],
            &["ms.wal.project.p1 delete tasks[t1] upsert tasks[t2,p1,small]"],
        );
        check(vec![update(TASKS, None, &[title, "t1", "p1"])], &["ms.wal.project.p1 delete tasks[t1]"]);
        // From every scope that it was in, and is in now.
        check(
            vec![update(TASKS, old_full(&[title, "t1", "p1"]), &[title, "t1", "p2"])],
            &["ms.wal.project.p1 delete tasks[t1]", "ms.wal.project.p2 delete tasks[t1]"],
        );
        check(
            vec![update(TASKS, old_full(&[title, "t1", "p1"]), &["…", "t1", "p1"])],
            &["ms.wal.project.p1 delete tasks[t1]"],
        );
        check(
            vec![update(TASKS, old_full(&[title, "t1", "p1"]), &["small", "t1", "p1"])],
            &["ms.wal.project.p1 upsert tasks[t1,p1,small]"],
        );
        check(
            vec![Message::Delete { relation: TASKS, old: Old::Full(tuple(&[title, "t1", "p1"])) }],
            &["ms.wal.project.p1 delete tasks[t1]"],
        );
    }
    // Without key, or scope, it concerns nobody.
    check(
        vec![insert(TASKS, &["x", "▒", "p1"]), insert(TASKS, &["x", "∅", "p1"]), insert(TASKS, &["x", "t1", "▒"])],
        &[],
    );
    check(vec![delete(TASKS, &["∅", "▒", "p1"]), update(TASKS, old_key(&["∅", "▒", "p1"]), &["x", "▒", "p1"])], &[]);
    let invalid =
        Message::Insert { relation: TASKS, new: vec![Value::Text(b"\xff"), Value::Text(b"t1"), Value::Text(b"p1")] };
    check(vec![invalid], &["ms.wal.project.p1 delete tasks[t1]"]);
}

#[test]
fn the_limit_of_a_row_is_its_json() {
    let row = r#"["t1","p1",""]"#.len();
    let fits: &'static str = Box::leak("x".repeat(MAX_ROW_BYTES - row).into_boxed_str());
    let over: &'static str = Box::leak("x".repeat(MAX_ROW_BYTES - row + 1).into_boxed_str());
    let out = assemble(vec![insert(TASKS, &[fits, "t1", "p1"])]);
    assert!(out[0].payload.len() > MAX_ROW_BYTES);
    check(vec![insert(TASKS, &[over, "t1", "p1"])], &["ms.wal.project.p1 delete tasks[t1]"]);
}

#[test]
fn a_broker_that_takes_less_gets_less() {
    let limits = Limits::of(1024 * 1024);
    let mut assembler = Assembler::new(tables(), Lsn(10), HashSet::new()).with_limits(limits);
    let title: &'static str = Box::leak("x".repeat(limits.row).into_boxed_str());
    let small: &'static str = Box::leak("x".repeat(100_000).into_boxed_str());
    let mut rows = vec![insert(TASKS, &[title, "large", "p1"])];
    rows.extend((0..30).map(|_| insert(TASKS, &[small, "t1", "p1"])));
    let out = run(&mut assembler, 100, rows);
    assert!(out.iter().all(|message| message.payload.len() <= limits.message), "{:?}", texts(&out));
    assert_eq!(assembler.take_left_out(), [LeftOut::Row { table: "tasks".into() }]);
    let tiny = Limits::of(millstream_schemas::stream::MIN_PAYLOAD_BYTES);
    assert!(tiny.row > 0 && tiny.message > 0);
}

/// Clients lack a row that was too large: when it fits again they need it whole.
#[test]
fn withdrawn_rows_are_read_once_they_fit() {
    let mut assembler = Assembler::new(tables(), Lsn(10), HashSet::new());
    run(&mut assembler, 100, vec![insert(TASKS, &["▒", "t1", "p1"])]);
    let mut out = Vec::new();
    let begin = Message::Begin { final_lsn: Lsn(200), at: 5, xid: 7 };
    assembler.handle(&begin, &Filled::new(), &mut out).unwrap();
    let again = update(TASKS, None, &["…", "t1", "p1"]);
    let lookup = assembler.lookup(&again).unwrap().unwrap();
    assert_eq!(lookup.columns, [2]);
    // Still too large.
    assembler.handle(&again, &vec![(2, ReadValue::TooLarge)], &mut out).unwrap();
    assert!(assembler.lookup(&again).unwrap().is_some());
    let fits = "f".repeat(200);
    assembler.handle(&again, &vec![(2, ReadValue::Text(fits.clone()))], &mut out).unwrap();
    assert_eq!(assembler.lookup(&again).unwrap(), None);
    let commit = Message::Commit { lsn: Lsn(200), end_lsn: Lsn(208), at: 5 };
    assembler.handle(&commit, &Filled::new(), &mut out).unwrap();
    assert_eq!(texts(&out), [format!("ms.wal.project.p1 delete tasks[t1] upsert tasks[t1,p1,{fits}]")]);
    // What is missing of an old image that should be whole was too large as well.
    assembler.handle(&Message::Begin { final_lsn: Lsn(300), at: 5, xid: 8 }, &Filled::new(), &mut out).unwrap();
    let abridged = update(TASKS, old_full(&["…", "t3", "p1"]), &["…", "t3", "p1"]);
    assert_eq!(assembler.lookup(&abridged).unwrap().unwrap().columns, [2]);
}

#[test]
fn truncation_keeps_its_place() {
    check(
        vec![
            insert(TASKS, &["x", "t1", "p1"]),
            Message::Truncate { relations: vec![TASKS, FOREIGN] },
            insert(TASKS, &["x", "t2", "p1"]),
        ],
        &[
            "ms.wal.project.p1 upsert tasks[t1,p1,x]",
            "ms.wal.global.all truncate tasks[]",
            "ms.wal.project.p1 upsert tasks[t2,p1,x]",
        ],
    );
}

#[test]
fn headers_tell_the_transaction() {
    let origin =
        br#"{"clients":[{"client_id":"0190f3c2-7d1e-7000-8000-000000000001","first_seq":4,"client_seq":4,"run_id":"0190f3c2-7d1e-7000-8000-000000000007"}],"traceparent":"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}"#;
    let record = Message::Logical { transactional: true, prefix: ORIGIN_PREFIX, content: origin };
    let out = assemble(vec![insert(TASKS, &["x", "t1", "p1"]), insert(TASKS, &["x", "t2", "p2"]), record.clone()]);
    assert_eq!(out.len(), 2);
    for (index, message) in out.iter().enumerate() {
        assert_eq!((message.lsn, message.end_lsn, message.xid, message.at), (Lsn(100), Lsn(108), 7, 5));
        assert_eq!((message.index as usize, message.last), (index, index == 1));
        assert_eq!(message.traceparent.as_deref(), Some(TRACE));
    }
    assert_eq!(out[0].origin, None);
    let entries = r#"[{"client_id":"0190f3c2-7d1e-7000-8000-000000000001","first_seq":4,"client_seq":4,"run_id":"0190f3c2-7d1e-7000-8000-000000000007"}]"#;
    assert_eq!(out[1].origin.as_deref(), Some(entries));

    let only_origin = assemble(vec![record, insert(FOREIGN, &["1"])]);
    assert_eq!((only_origin.len(), only_origin[0].subject.as_str(), only_origin[0].last), (1, WAL_ORIGIN, true));
    assert_eq!((only_origin[0].origin.as_deref(), &only_origin[0].payload[..]), (Some(entries), &b"[]"[..]));

    for (transactional, prefix, content) in [
        (false, ORIGIN_PREFIX, &origin[..]),
        (true, "other", &origin[..]),
        (true, ORIGIN_PREFIX, b"{"),
        (true, ORIGIN_PREFIX, br#"{"clients":[]}"#),
    ] {
        assert_eq!(assemble(vec![Message::Logical { transactional, prefix, content }]), []);
    }
    let forged =
        br#"{"clients":[{"client_id":"0190f3c2-7d1e-7000-8000-000000000001","first_seq":4,"client_seq":4,"run_id":"0190f3c2-7d1e-7000-8000-000000000007"}],"traceparent":"a\r\nb: c"}"#;
    let out = assemble(vec![Message::Logical { transactional: true, prefix: ORIGIN_PREFIX, content: forged }]);
    assert_eq!(out[0].traceparent, None);
}

#[test]
fn what_the_stream_holds_is_skipped() {
    let mut assembler = Assembler::new(tables(), Lsn(100), HashSet::new());
    assert_eq!(run(&mut assembler, 99, vec![insert(TASKS, &["x", "t1", "p1"])]), []);
    assert_eq!(run(&mut assembler, 100, vec![Message::Truncate { relations: vec![TASKS] }]), []);
    assert_eq!(run(&mut assembler, 101, vec![insert(TASKS, &["x", "t1", "p1"])]).len(), 1);
    assert_eq!(assembler.open(), None);
}

#[test]
fn big_transactions_leave_in_chunks() {
    let title: &'static str = Box::leak("x".repeat(1000).into_boxed_str());
    let rows = (0..3000).map(|_| insert(TASKS, &[title, "t1", "p1"])).collect();
    let out = assemble(rows);
    assert!(out.len() > 5, "{}", out.len());
    for (index, message) in out.iter().enumerate() {
        assert!(message.payload.len() <= MAX_MESSAGE_BYTES);
        assert_eq!((message.index as usize, message.last), (index, index + 1 == out.len()));
    }
}

#[test]
fn changed_tables_ask_for_a_new_catalog_once() {
    let wider = relation(TASKS, "tasks", &[("id", true), ("project_id", true), ("title", false), ("extra", false)]);
    let mut assembler = Assembler::new(tables(), Lsn::ZERO, HashSet::new());
    let mut out = Vec::new();
    let error = assembler.handle(&wider, &Filled::new(), &mut out).unwrap_err();
    let AssembleError::SchemaChanged { table, shape } = error else { panic!("{error}") };
    assert_eq!(table, "tasks");
    let mut assembler = Assembler::new(tables(), Lsn::ZERO, HashSet::from([shape]));
    assembler.handle(&wider, &Filled::new(), &mut out).unwrap();

    // A column that the relation lacks is not there, rather than null.
    let narrow = relation(TASKS, "tasks", &[("id", true), ("project_id", true)]);
    let error = assembler.handle(&narrow, &Filled::new(), &mut out).unwrap_err();
    let AssembleError::SchemaChanged { shape, .. } = error else { panic!("{error}") };
    let mut assembler = Assembler::new(tables(), Lsn::ZERO, HashSet::from([shape]));
    for message in [
        Message::Begin { final_lsn: Lsn(9), at: 0, xid: 1 },
        narrow,
        insert(TASKS, &["t1", "p1"]),
        Message::Commit { lsn: Lsn(9), end_lsn: Lsn(10), at: 0 },
    ] {
        assembler.handle(&message, &Filled::new(), &mut out).unwrap();
    }
    assert_eq!(texts(&out), ["ms.wal.project.p1 upsert tasks(id,project_id)[t1,p1]"]);
}

#[test]
fn nonsense_is_an_error() {
    let nothing = Filled::new();
    let begin = Message::Begin { final_lsn: Lsn(9), at: 0, xid: 1 };
    for messages in [
        vec![Message::Commit { lsn: Lsn(9), end_lsn: Lsn(10), at: 0 }],
        vec![begin.clone(), begin.clone()],
        vec![insert(TASKS, &["t1"])],
        vec![begin.clone(), insert(TASKS, &["t1"])],
        vec![begin.clone(), relations().remove(0), insert(TASKS, &["t1"])],
        vec![
            begin.clone(),
            relations().remove(0),
            Message::Insert { relation: TASKS, new: vec![Value::Binary(b"1"); 3] },
        ],
    ] {
        let mut assembler = Assembler::new(tables(), Lsn::ZERO, HashSet::new());
        let failed = messages.iter().any(|message| assembler.handle(message, &nothing, &mut Vec::new()).is_err());
        assert!(failed, "{messages:?}");
    }
}

/// The relation of a partitioned table is its root's; old rows are written by the identities of partitions.
#[test]
fn old_rows_of_partitions_are_read_by_what_they_hold() {
    let flags = |root_full| relation(TASKS, "tasks", &[("title", root_full), ("id", true), ("project_id", root_full)]);
    let check = |root_full: bool, covered: [bool; 3], change: Message<'static>, expected: &[&str], again: bool| {
        let shape = Shape { partitions: Some(covered.to_vec()), ..Shape::default() };
        let mut assembler = Assembler::new(tables(), Lsn(10), HashSet::new()).with_shapes(Arc::new([shape]));
        let mut out = Vec::new();
        for message in [
            Message::Begin { final_lsn: Lsn(100), at: 5, xid: 7 },
            flags(root_full),
            change.clone(),
            Message::Commit { lsn: Lsn(100), end_lsn: Lsn(108), at: 5 },
        ] {
            assembler.handle(&message, &Filled::new(), &mut out).unwrap();
        }
        let moves: Vec<String> = out.iter().filter_map(|message| message.moves.clone()).collect();
        assert_eq!(moves, if again { vec!["ms.wal.project.*"] } else { vec![] }, "{change:?}");
        let rows: Vec<Outgoing> = out.into_iter().filter(|message| message.moves.is_none()).collect();
        assert_eq!(texts(&rows), expected, "{change:?}");
    };
    let key_and_scope = [true, true, false];
    // Root by its key, partitions by key and scope; the other way round, partitions whole.
    for covered in [key_and_scope, [true; 3]] {
        check(false, covered, delete(TASKS, &["∅", "t1", "p1"]), &["ms.wal.project.p1 delete tasks[t1]"], false);
        let moved = update(TASKS, old_key(&["∅", "t1", "p1"]), &["x", "t1", "p2"]);
        let expected = ["ms.wal.project.p1 delete tasks[t1]", "ms.wal.project.p2 upsert tasks[t1,p2,x]"];
        check(false, covered, moved, &expected, false);
    }
    // Root whole, a partition by its key: what is null was not written.
    let (key_only, full) = ([true, false, false], |old: &[&'static str]| Old::Full(tuple(old)));
    let gone = Message::Delete { relation: TASKS, old: full(&["∅", "t1", "∅"]) };
    check(true, key_only, gone, &[], true);
    let large = update(TASKS, Some(full(&["∅", "t1", "∅"])), &["…", "t1", "p1"]);
    check(true, key_only, large, &[], true);
    check(true, key_only, update(TASKS, None, &["x", "t1", "p1"]), &["ms.wal.project.p1 upsert tasks[t1,p1,x]"], true);
    check(
        true,
        [true; 3],
        update(TASKS, Some(full(&["y", "t1", "p1"])), &["x", "t1", "p1"]),
        &["ms.wal.project.p1 upsert tasks[t1,p1,x]"],
        false,
    );
}

#[test]
fn tables_are_sent_again_when_somebody_asks_and_not_all_the_time() {
    let mut assembler = Assembler::new(tables(), Lsn(10), HashSet::new());
    let ask = |content: &'static [u8]| Message::Logical { transactional: true, prefix: AGAIN_PREFIX, content };
    let moves = |out: Vec<Outgoing>| out.into_iter().filter_map(|message| message.moves).collect::<Vec<_>>();
    assert_eq!(moves(run(&mut assembler, 100, vec![ask(b"tasks")])), ["ms.wal.project.*"]);
    assert_eq!(
        moves(run(&mut assembler, 101, vec![ask(b"notices\nmembers")])),
        ["ms.wal.global.* ms.wal.project.* ms.wal.user.*", "*"]
    );
    assert_eq!(moves(run(&mut assembler, 102, vec![ask(b"*")])).len(), 2);
    assert_eq!(moves(run(&mut assembler, 103, vec![ask(b"unknown")])), [""; 0]);
    assembler.take_left_out();
    // A key-only identity: two transactions of the same moment.
    let gone = || {
        let relation = relation(TASKS, "tasks", &[("title", false), ("id", true), ("project_id", false)]);
        vec![relation, Message::Delete { relation: TASKS, old: Old::Key(tuple(&["∅", "t1", "∅"])) }]
    };
    let told = |late| LeftOut::Again { table: "tasks".into(), why: Again::Unroutable, late };
    let mut fresh = Assembler::new(tables(), Lsn(10), HashSet::new());
    assert_eq!(moves(run(&mut fresh, 100, gone())), ["ms.wal.project.*"]);
    assert_eq!(moves(run(&mut fresh, 101, gone())), [""; 0]);
    assert_eq!(fresh.take_left_out(), [told(false), told(true)]);
}
