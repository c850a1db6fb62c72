//! Snapshots that arrive in parts: what they come to is the same as if they had come at once.

use std::collections::{BTreeMap, BTreeSet};

use millstream_client_core::replica::{Batch, Step, Work};
use millstream_client_store::{Performing, Store, StoreError};
use millstream_schemas::frame::SnapshotMark;
use millstream_schemas::{Code, ColumnSchema, Lsn, Numeric, Position, Row, Scope, TableChanges, TableOp};
use uuid::Uuid;

use super::damage::host;
use super::fixture::{Fixture, changes, column, confirmed, delete, failed, fixture, set_format, task, upsert};

fn position() -> Position {
    Position { epoch: Uuid::nil(), stream_seq: 1, lsn: Lsn(1) }
}

fn project(id: &str) -> Scope {
    Scope::new("project", id)
}

fn stage(rows: Vec<Row>) -> Work {
    Work::Stage(vec![changes("tasks", TableOp::Upsert, rows)])
}

fn mark(mark: usize, rows: u64) -> Work {
    Work::Mark(SnapshotMark { token: "t".into(), mark: mark.to_string() }, rows)
}

fn many(ids: std::ops::Range<usize>, title: &str) -> Vec<Row> {
    ids.map(|n| task(&format!("{n:05}"), "p", title, false)).collect()
}

fn end(steps: Vec<Step>) -> Work {
    Work::Apply(Batch { steps, position: Some(position()), ..Batch::default() })
}

fn full() -> Step {
    Step::Snapshot { scopes: vec![project("p")], full: true }
}

fn count(f: &Fixture) -> String {
    f.read("SELECT count(*) FROM tasks")
}

#[test]
fn a_first_snapshot_shows_while_it_comes_and_counts_once_it_is_whole() {
    let mut f = fixture();
    f.store.perform(&[Work::ClearStage, stage(many(0..700, "new")), mark(1, 700)]).unwrap();
    assert_eq!(count(&f), "700");
    let info = f.store.info().unwrap();
    assert_eq!((info.position, info.scopes), (None, vec![]), "nothing is claimed before the end");
    assert_eq!(info.snapshot.unwrap().1, 700);
    assert_eq!(f.read("SELECT count(row) FROM millstream_snapshot"), "0", "no row is kept twice");
    // The app works on what is there, and on what is still to come.
    f.write(&[
        "UPDATE tasks SET title = 'mine' WHERE id = '00001'",
        "DELETE FROM tasks WHERE id = '00002'",
        "INSERT INTO tasks (id, project_id, title) VALUES ('00900', 'p', 'mine'), ('z', 'p', 'mine')",
    ])
    .unwrap();
    f.store.perform(&[stage(many(700..1_000, "new"))]).unwrap();
    let mine = |f: &Fixture| f.read("SELECT id FROM tasks WHERE title = 'mine' ORDER BY id");
    assert_eq!(mine(&f), "00001\n00900\nz");
    f.store.perform(&[end(vec![full()])]).unwrap();
    assert_eq!((count(&f).as_str(), mine(&f).as_str()), ("1000", "00001\n00900\nz"));
    assert_eq!(f.store.info().unwrap().scopes, [project("p")]);
    f.apply(vec![failed(1, Code::PermissionDenied)]);
    assert_eq!((count(&f).as_str(), mine(&f).as_str(), f.bases().as_str()), ("1000", "", ""));
}

#[test]
fn a_first_snapshot_that_begins_again_leaves_nothing_of_the_one_before() {
    let mut f = fixture();
    f.store.perform(&[Work::ClearStage, stage(many(0..3_000, "old"))]).unwrap();
    let mut f = f.reopen();
    f.store.perform(&[Work::ClearStage, stage(many(1..2, "new"))]).unwrap();
    assert_eq!(count(&f), "3000");
    f.store.perform(&[end(vec![full()])]).unwrap();
    assert_eq!(f.tasks(), "00001|new|0");
}

/// What came of a snapshot that was cut is somebody's already.
#[test]
fn a_store_with_rows_of_a_cut_snapshot_is_its_user_s() {
    let mut f = fixture();
    f.store.claim("ann").unwrap();
    f.store.claim("bob").unwrap();
    f.store.perform(&[Work::ClearStage, stage(many(0..1, "bob's"))]).unwrap();
    f.store.perform(&[Work::ClearStage]).unwrap();
    assert!(matches!(f.store.claim("ann"), Err(StoreError::Foreign { .. })));
}

#[test]
fn what_the_store_has_already_is_neither_staged_nor_written_again() {
    let mut f = fixture();
    f.store.perform(&[Work::ClearStage, stage(many(0..1_200, "same")), end(vec![full()])]).unwrap();
    f.write(&["UPDATE tasks SET title = 'mine' WHERE id < '00010'"]).unwrap();
    f.store.take_written();
    let mut again = many(0..1_199, "same");
    again[1_100] = task("01100", "p", "other", false);
    f.store.perform(&[Work::ClearStage, stage(again)]).unwrap();
    assert_eq!(f.read("SELECT key FROM millstream_snapshot WHERE row IS NOT NULL"), "[\"01100\"]");
    assert!(!f.store.take_written().contains("tasks"), "nothing shows before the end");
    let before = f.read("SELECT max(rowid) FROM tasks");
    f.store.perform(&[end(vec![full()])]).unwrap();
    assert_eq!(f.read("SELECT group_concat(DISTINCT title) FROM tasks"), "mine,same,other");
    assert_eq!((count(&f), before), ("1199".into(), "1200".into()));
}

/// A row that the snapshot and the store agree on is changed before its end: by what comes before `snapshot_apply`, or by a catch-up while
/// it waits to go on.
#[test]
fn what_changes_behind_the_back_of_a_staged_snapshot_is_set_right_at_its_end() {
    let touched = |f: &mut Fixture, apart: bool| {
        f.store.perform(&[Work::ClearStage, stage(many(0..6, "same")), end(vec![full()])]).unwrap();
        f.store.perform(&[Work::ClearStage, stage(many(0..5, "same")), mark(1, 5)]).unwrap();
        let other = upsert(vec![task("00000", "p", "other", false), task("x", "p", "new", false)]);
        let moved = TableChanges {
            columns: Some(vec!["id".into(), "project_id".into()]),
            ..changes("tasks", TableOp::Update, vec![vec![Some("00002".into()), Some("q".into())]])
        };
        let before = vec![other, delete("00001"), Step::Rows(vec![moved])];
        match apart {
            true => {
                f.store.perform(&[end(before)]).unwrap();
                f.store.perform(&[end(vec![full()])]).unwrap();
            }
            false => drop(f.store.perform(&[end([before, vec![full()]].concat())]).unwrap()),
        }
        assert_eq!(f.read("SELECT group_concat(DISTINCT title || project_id), count(*) FROM tasks"), "samep|5");
    };
    touched(&mut fixture(), false);
    touched(&mut fixture(), true);
}

/// The look for rows that leave has passed the place of a row that shows again.
#[test]
fn a_row_that_shows_again_behind_the_look_for_those_that_leave_leaves_too() {
    let mut f = fixture();
    f.store.perform(&[Work::ClearStage, stage(many(0..30, "old")), end(vec![full()])]).unwrap();
    f.write(&["UPDATE tasks SET title = 'bad' WHERE id = '00001'"]).unwrap();
    f.apply(vec![failed(1, Code::PermissionDenied)]);
    f.write(&["DELETE FROM tasks WHERE id = '00001'"]).unwrap();
    let mut performing =
        Performing::new(vec![Work::ClearStage, stage(many(25..30, "old")), end(vec![full()])]).in_slices_of(5);
    for _ in 0..5 {
        assert_eq!(f.store.perform_slice(&mut performing).unwrap(), None);
    }
    assert_eq!(f.read("SELECT max(key) FROM millstream_snapshot WHERE row = 'null'"), "[\"00010\"]", "in the middle");
    f.store.discard(2).unwrap();
    f.store.discard(1).unwrap();
    while !performing.is_done() {
        f.store.perform_slice(&mut performing).unwrap();
    }
    assert_eq!(count(&f), "5");
}

#[test]
fn a_cut_snapshot_of_a_store_of_version_5_begins_again() {
    let f = fixture();
    {
        let connection = rusqlite::Connection::open(&f.path).unwrap();
        connection
            .execute_batch(
                "DROP TABLE millstream_snapshot;
                 CREATE TABLE millstream_snapshot (tbl TEXT NOT NULL, key TEXT NOT NULL, row TEXT NOT NULL, PRIMARY KEY (tbl, key)) WITHOUT ROWID;
                 INSERT INTO millstream_snapshot VALUES ('tasks', '[\"a\"]', '[]');
                 INSERT INTO millstream_meta VALUES ('snapshot', '{\"token\":\"t\",\"mark\":\"m\"}');",
            )
            .unwrap();
    }
    set_format(&f.path, 5);
    let mut f = f.reopen();
    assert_eq!(f.store.info().unwrap().snapshot, None);
    f.store.perform(&[Work::ClearStage, stage(many(0..2, "new")), end(vec![full()])]).unwrap();
    assert_eq!(count(&f), "2");
}

/// Another schema of the same layout: a column gets another representation, and is empty until the rows come again.
#[test]
fn a_cut_snapshot_begins_again_over_another_representation_of_a_column() {
    let mut schema = super::fixture::schema();
    schema.tables[0].columns[4] = ColumnSchema { numeric: None, ..column("position", "numeric(10,2)", true) };
    let mut f = super::wide::with_schema(&schema);
    let mut rows = many(0..4, "same");
    rows.iter_mut().for_each(|row| row[4] = Some("1.50".into()));
    f.store.perform(&[Work::ClearStage, stage(rows.clone()), end(vec![full()])]).unwrap();
    f.store.perform(&[Work::ClearStage, stage(rows[..2].to_vec()), mark(1, 2)]).unwrap();
    schema.version = "2".into();
    schema.tables[0].columns[4].numeric = Some(Numeric::Integer);
    assert!(f.store.install(&schema).unwrap());
    // What the rows held may be less than what was sent: it comes again.
    assert_eq!(f.store.info().unwrap().snapshot, None);
    f.store.perform(&[Work::ClearStage, stage(rows), end(vec![full()])]).unwrap();
    assert_eq!(f.read("SELECT position FROM tasks"), "150\n150\n150\n150");
}

/// Processes that share a store take turns; one whose turn is over may still have work in hand.
#[test]
fn what_is_left_of_an_earlier_turn_does_not_reach_the_staging_area() {
    let mut f = fixture();
    let mut other = Store::open(&f.path, host()).unwrap();
    f.store.perform(&[Work::ClearStage, stage(many(0..3, "old"))]).unwrap();
    other.claim("me").unwrap();
    other.perform(&[Work::ClearStage, stage(many(1..3, "new"))]).unwrap();
    for work in [stage(many(0..2, "old")), Work::ClearStage, end(vec![full()])] {
        let error = f.store.perform(&[work]).unwrap_err();
        assert!(matches!(error, StoreError::Overtaken) && error.is_retryable(), "{error}");
    }
    other.perform(&[end(vec![full()])]).unwrap();
    assert_eq!(f.tasks(), "00001|new|0\n00002|new|0");
    // Its next turn.
    f.store.claim("me").unwrap();
    f.store.perform(&[Work::ClearStage, stage(many(0..1, "newest")), end(vec![full()])]).unwrap();
    assert_eq!(f.tasks(), "00000|newest|0");
}

/// No edge does that; a store that held nothing must not take what it has for the state at that position.
#[test]
fn a_position_alone_does_not_make_a_cut_first_snapshot_whole() {
    let mut f = fixture();
    f.store.perform(&[Work::ClearStage, stage(many(0..3, "first"))]).unwrap();
    f.write(&["UPDATE tasks SET title = 'mine' WHERE id = '00001'"]).unwrap();
    f.apply(vec![upsert(vec![task("x", "p", "later", false)])]);
    assert_eq!(f.tasks(), "x|later|0");
}

/// Small pseudo-random numbers: a seed replays.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % limit
    }

    fn chance(&mut self, one_in: usize) -> bool {
        self.below(one_in) == 0
    }
}

const PROJECTS: [&str; 3] = ["p", "q", "r"];
const USERS: [&str; 3] = ["ann", "bob", "me"];

/// Table and key.
type Key = (&'static str, String, String);

/// The confirmed rows and the held scopes, as they are to be.
#[derive(Default)]
struct Model {
    rows: BTreeMap<Key, Row>,
    scopes: BTreeSet<Scope>,
}

fn key_of(table: &'static str, row: &[Option<String>]) -> Key {
    let part = |index: usize| row[index].clone().unwrap();
    (table, part(0), if table == "members" { part(1) } else { String::new() })
}

fn scopes_of(table: &str, row: &[Option<String>]) -> Vec<Scope> {
    let part = |index: usize| row[index].clone().unwrap();
    match table {
        "members" => vec![project(&part(0)), Scope::user(part(1))],
        _ => vec![project(&part(1))],
    }
}

impl Model {
    fn set(&mut self, table: &'static str, row: Row) {
        self.rows.insert(key_of(table, &row), row);
    }

    fn remove_scope(&mut self, scope: &Scope) {
        self.scopes.remove(scope);
        let scopes = &self.scopes;
        self.rows.retain(|(table, ..), row| {
            let of = scopes_of(table, row);
            !of.contains(scope) || of.iter().any(|other| scopes.contains(other))
        });
    }

    fn snapshot(&mut self, staged: &BTreeMap<Key, Row>, scopes: &BTreeSet<Scope>, full: bool) {
        self.rows.extend(staged.clone());
        let others: BTreeSet<Scope> = self.scopes.difference(scopes).cloned().collect();
        self.rows.retain(|key, row| {
            let of = scopes_of(key.0, row);
            let named = of.iter().any(|scope| scopes.contains(scope));
            staged.contains_key(key) || !(full || named && !of.iter().any(|scope| others.contains(scope)))
        });
        if full {
            self.scopes.clear();
        }
        self.scopes.extend(scopes.iter().cloned());
    }

    fn text(&self) -> String {
        let line = |((table, ..), row): (&Key, &Row)| {
            let part = |index: usize| row[index].clone().unwrap_or_default();
            format!("{table}|{}|{}|{}", part(0), part(1), part(2))
        };
        let mut lines: Vec<String> = self.rows.iter().map(line).collect();
        lines.sort();
        lines.join("\n")
    }
}

/// The confirmed rows of the store.
fn confirmed_rows(f: &Fixture) -> String {
    let of = |table: &str, key: &str, columns: [&str; 3]| {
        let [one, two, three] = columns;
        format!(
            "SELECT '{table}' || '|' || {one} || '|' || {two} || '|' || {three} AS line FROM {table} WHERE {key} NOT IN \
             (SELECT key FROM millstream_base WHERE tbl = '{table}') \
             UNION ALL SELECT '{table}' || '|' || (row ->> '{one}') || '|' || (row ->> '{two}') || '|' || (row ->> '{three}') \
             FROM millstream_base WHERE tbl = '{table}' AND row IS NOT NULL"
        )
    };
    let tasks = of("tasks", "json_array(id)", ["id", "project_id", "title"]);
    let members = of("members", "json_array(project_id, user_id)", ["project_id", "user_id", "role"]);
    f.read(&format!("SELECT line FROM ({tasks} UNION ALL {members}) ORDER BY line"))
}

struct Run {
    f: Option<Fixture>,
    model: Model,
    random: Random,
    seed: u64,
}

impl Run {
    fn f(&mut self) -> &mut Fixture {
        self.f.as_mut().unwrap()
    }

    fn row(&mut self) -> (&'static str, Row) {
        let random = &mut self.random;
        let project = PROJECTS[random.below(3)];
        let title = format!("t{}", random.below(3));
        match random.chance(4) {
            true => ("members", vec![Some(project.into()), Some(USERS[random.below(3)].into()), Some(title)]),
            false => ("tasks", task(&format!("{:02}", random.below(40)), project, &title, false)),
        }
    }

    fn scopes(&mut self) -> BTreeSet<Scope> {
        let mut scopes: BTreeSet<Scope> = PROJECTS.iter().map(|id| project(id)).collect();
        scopes.extend(USERS.map(Scope::user));
        scopes.retain(|_| self.random.chance(2));
        scopes
    }

    /// What the stream tells; in order, and of whatever rows.
    fn steps(&mut self) -> Vec<Step> {
        let mut steps = Vec::new();
        for _ in 0..self.random.below(6) {
            let (table, row) = self.row();
            let key = key_of(table, &row);
            match self.random.below(12) {
                0 => {
                    let scope = self.scopes().pop_first();
                    steps.extend(scope.inspect(|scope| self.model.remove_scope(scope)).map(Step::ScopeRemoved));
                }
                1 if self.random.chance(3) => {
                    self.model.rows.retain(|(of, ..), _| *of != table);
                    steps.push(Step::Rows(vec![changes(table, TableOp::Truncate, vec![])]));
                }
                2 | 3 => {
                    self.model.rows.remove(&key);
                    let parts = if table == "members" { vec![Some(key.1), Some(key.2)] } else { vec![Some(key.1)] };
                    steps.push(Step::Rows(vec![changes(table, TableOp::Delete, vec![parts])]));
                }
                4 | 5 if table == "tasks" => {
                    if let Some(known) = self.model.rows.get_mut(&key) {
                        known[2].clone_from(&row[2]);
                    }
                    let columns = Some(vec!["id".into(), "title".into()]);
                    let update = changes(table, TableOp::Update, vec![vec![row[0].clone(), row[2].clone()]]);
                    steps.push(Step::Rows(vec![TableChanges { columns, ..update }]));
                }
                _ => {
                    self.model.set(table, row.clone());
                    steps.push(Step::Rows(vec![changes(table, TableOp::Upsert, vec![row])]));
                }
            }
        }
        if self.random.chance(2) {
            let info = self.f().store.info().unwrap();
            if info.last_seq > info.confirmed_seq {
                let seq =
                    info.confirmed_seq + 1 + self.random.below((info.last_seq - info.confirmed_seq) as usize) as u64;
                let step = if self.random.chance(2) { confirmed(seq) } else { failed(seq, Code::PermissionDenied) };
                let place = self.random.below(steps.len() + 1);
                steps.insert(place, step);
            }
        }
        steps
    }

    /// The app, or a person, does something.
    fn app(&mut self) {
        let (table, row) = self.row();
        let (id, project, title) = (row[0].clone().unwrap(), row[1].clone().unwrap(), row[2].clone().unwrap());
        let by = match table {
            "members" => format!("project_id = '{id}' AND user_id = '{project}'"),
            _ => format!("id = '{id}'"),
        };
        let choice = self.random.below(6);
        let f = self.f();
        let sql = match (choice, table) {
            (0, _) => {
                let failed = f.store.failed().unwrap();
                if let Some(write) = failed.last() {
                    let _ = f.store.discard(write.tx);
                }
                return;
            }
            (1, _) => {
                let failed = f.store.failed().unwrap();
                if let Some(write) = failed.first() {
                    let _ = f.store.retry(write.tx);
                }
                return;
            }
            (2, _) => format!("DELETE FROM {table} WHERE {by}"),
            (3, "tasks") => {
                format!("INSERT OR IGNORE INTO tasks (id, project_id, title) VALUES ('{id}', '{project}', 'mine')")
            }
            (3 | 4, "members") => format!("INSERT OR IGNORE INTO members VALUES ('{id}', '{project}', 'mine')"),
            (_, "members") => format!("UPDATE members SET role = 'mine {title}' WHERE {by}"),
            _ => format!("UPDATE tasks SET title = 'mine {title}' WHERE {by}"),
        };
        f.write(&[&sql]).unwrap();
    }

    /// Does it in slices, while the app goes on. False: the process died before the end, and before anything was applied.
    fn perform(&mut self, works: Vec<Work>, dies: bool) -> bool {
        let size = 1 + self.random.below(7);
        let mut performing = Performing::new(works).in_slices_of(size);
        let mut applied = false;
        while !performing.is_done() {
            if dies && self.random.chance(8) {
                self.f = self.f.take().map(Fixture::reopen);
                return applied;
            }
            applied |= self.f().store.perform_slice(&mut performing).unwrap().is_some();
            while self.random.chance(3) {
                self.app();
            }
        }
        true
    }

    fn batch(&mut self, steps: Vec<Step>) -> Work {
        let steps = self.f().with_runs(steps);
        end(steps)
    }

    /// One snapshot, from its beginning to its end, with all that may happen to it.
    fn snapshot(&mut self, first: bool) {
        let full = first || self.random.chance(2);
        let (mut scopes, mut pieces, mut next) = (BTreeSet::new(), Vec::new(), 0);
        let mut begins = true;
        loop {
            if begins {
                scopes = self.scopes();
                // Much of what the store has, and other rows.
                let mut rows: Vec<(&'static str, Row)> = Vec::new();
                for ((table, ..), row) in &self.model.rows {
                    if !self.random.chance(4) {
                        rows.push((table, row.clone()));
                    }
                }
                for _ in 0..self.random.below(20) {
                    rows.push(self.row());
                }
                pieces = rows.chunks(1 + self.random.below(9)).map(<[_]>::to_vec).collect();
                next = 0;
                if !self.perform(vec![Work::ClearStage], false) {
                    continue;
                }
            }
            begins = false;
            let mut works = Vec::new();
            for (place, piece) in pieces.iter().enumerate().skip(next) {
                let rows = piece.iter().map(|(table, row)| changes(table, TableOp::Upsert, vec![row.clone()]));
                works.push(Work::Stage(rows.collect()));
                if !place.is_multiple_of(3) {
                    works.push(mark(place + 1, place as u64 + 1));
                }
            }
            let whole = self.perform(works, true);
            if whole {
                let before = self.model.rows.clone();
                let held = self.model.scopes.clone();
                let mut steps = self.steps();
                let mut staged = BTreeMap::new();
                for (table, row) in pieces.iter().flatten() {
                    staged.insert(key_of(table, row), row.clone());
                }
                self.model.snapshot(&staged, &scopes, full);
                steps.push(Step::Snapshot { scopes: scopes.iter().cloned().collect(), full });
                steps.extend(self.steps());
                let batch = self.batch(steps);
                if self.perform(vec![batch], true) {
                    return;
                }
                (self.model.rows, self.model.scopes) = (before, held);
            }
            // It was cut. Perhaps other things come first.
            while !first && self.random.chance(3) {
                let steps = self.steps();
                let batch = self.batch(steps);
                self.perform(vec![batch], false);
                self.check("a catch-up");
            }
            match self.f().store.info().unwrap().snapshot {
                Some((mark, rows)) if self.random.chance(2) => {
                    next = mark.mark.parse().unwrap();
                    assert_eq!(rows, next as u64);
                }
                _ => begins = true,
            }
        }
    }

    #[track_caller]
    fn check(&mut self, when: &str) {
        let (seed, expected) = (self.seed, self.model.text());
        assert_eq!(confirmed_rows(self.f()), expected, "seed {seed}, {when}");
        let scopes: Vec<Scope> = self.model.scopes.iter().cloned().collect();
        assert_eq!(self.f().store.info().unwrap().scopes, scopes, "seed {seed}, {when}");
    }
}

#[test]
fn however_a_snapshot_comes_it_comes_to_the_same() {
    for seed in 0..40 {
        let mut run = Run { f: Some(fixture()), model: Model::default(), random: Random(seed), seed };
        for _ in 0..run.random.below(4) {
            run.app();
        }
        for round in 0..5 {
            run.snapshot(round == 0);
            run.check("a snapshot");
            assert_eq!(run.f().read("SELECT count(*) FROM millstream_meta WHERE key IN ('staging', 'snapshot')"), "0");
            assert!(run.f().store.info().unwrap().snapshot.is_none());
            let steps = run.steps();
            let batch = run.batch(steps);
            run.perform(vec![batch], false);
            run.check("rows");
        }
        // Without what is the app's, what shows is what is confirmed.
        let mut info = run.f().store.info().unwrap();
        while info.last_seq > info.confirmed_seq || info.failed + info.held > 0 {
            if info.last_seq > info.confirmed_seq {
                run.f().apply(vec![confirmed(info.last_seq)]);
            }
            if let Some(write) = run.f().store.failed().unwrap().last() {
                run.f().store.discard(write.tx).unwrap();
            }
            info = run.f().store.info().unwrap();
        }
        let shown = "SELECT line FROM (SELECT 'tasks|' || id || '|' || project_id || '|' || title AS line FROM tasks \
                     UNION ALL SELECT 'members|' || project_id || '|' || user_id || '|' || role FROM members) ORDER BY line";
        assert_eq!(run.f().read(shown), run.model.text(), "seed {seed}: what shows");
    }
}
