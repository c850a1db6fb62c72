//! The batches: 60 % inserts, 30 % updates, 10 % deletes by many clients, one change a transaction. Updates and deletes
//! hit rows that were there before the batch, each row once a batch, so that plain SQL may group them as it likes.

use std::time::{SystemTime, UNIX_EPOCH};

use millstream_schemas::stream::Submission;
use millstream_schemas::{Change, Operation};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use uuid::Uuid;

/// Rows in the table before the first batch, so that its indexes have depth and the planner no reason to read it whole.
const ROWS: u64 = 100_000;
/// Projects; each client's user is a member of some.
const PROJECTS: u64 = 100;
/// Memberships a user.
const MEMBERSHIPS: u64 = 5;
/// Any fixed number: runs are alike.
const SEED: u64 = 3;

/// Rows that both sides begin with.
pub fn seed(clients: usize) -> String {
    format!(
        "INSERT INTO projects (id, name, field_clocks) SELECT {project}, 'project ' || n, '{{\"\": \"\"}}' FROM generate_series(0, {PROJECTS} - 1) n;
         INSERT INTO members (project_id, user_id) SELECT {member}, 'user-' || c
             FROM generate_series(0, {clients} - 1) c, generate_series(0, {MEMBERSHIPS} - 1) k;
         INSERT INTO tasks (id, project_id, title, position, field_clocks, updated_at)
             SELECT {task}, {of}, 'task number ' || n, n, jsonb_build_object('', millstream.clock(1)), timestamptz 'epoch'
             FROM generate_series(0, {ROWS} - 1) n;
         INSERT INTO plain.projects (id, name) SELECT id, name FROM projects;
         INSERT INTO plain.tasks (id, project_id, title, position) SELECT id, project_id, title, position FROM tasks ORDER BY position;",
        project = sql_id(1, "n"),
        member = sql_id(1, &format!("(c * 7 + k * 13) % {PROJECTS}")),
        of = sql_id(1, &format!("n % {PROJECTS}")),
        task = sql_id(2, "n"),
    )
}

fn sql_id(kind: u64, number: &str) -> String {
    format!("('{kind:08}-0000-7000-8000-' || lpad(to_hex({number}), 12, '0'))::uuid")
}

fn id(kind: u64, number: u64) -> Uuid {
    // The decimal digits of `kind` are read as hexadecimal ones; below 10 that is the same.
    Uuid::from_u128((u128::from(kind) << 96) | (0x7000_u128 << 64) | (0x8000_u128 << 48) | u128::from(number))
}

struct Author {
    client_id: Uuid,
    user_id: String,
    run_id: Uuid,
    client_seq: u64,
    projects: Vec<u64>,
}

/// A batch.
pub struct Batch {
    /// For the executor.
    pub submissions: Vec<Submission>,
    /// The changes in it that must take effect.
    pub good: Vec<Change>,
    /// How many must be rejected.
    pub bad: usize,
}

/// Makes batches; knows which rows there are.
pub struct Workload {
    rng: StdRng,
    authors: Vec<Author>,
    rows: Vec<Vec<Uuid>>,
    stamp: u64,
}

impl Workload {
    /// As of [`seed`].
    pub fn new(clients: usize) -> Workload {
        let mut rng = StdRng::seed_from_u64(SEED);
        let authors = (0..clients as u64)
            .map(|number| Author {
                client_id: Uuid::from_u128(rng.random()),
                user_id: format!("user-{number}"),
                run_id: Uuid::from_u128(rng.random()),
                client_seq: 0,
                projects: (0..MEMBERSHIPS).map(|k| (number * 7 + k * 13) % PROJECTS).collect(),
            })
            .collect();
        let mut rows = vec![Vec::new(); PROJECTS as usize];
        for number in 0..ROWS {
            rows[(number % PROJECTS) as usize].push(id(2, number));
        }
        let stamp = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros() as u64;
        Workload { rng, authors, rows, stamp }
    }

    /// The next batch; a share of its changes violates a constraint or a permission.
    pub fn batch(&mut self, size: usize, bad_share: f64) -> Batch {
        let mut batch = Batch { submissions: Vec::with_capacity(size), good: Vec::with_capacity(size), bad: 0 };
        let mut back = Vec::new();
        for _ in 0..size {
            let author = self.rng.random_range(0..self.authors.len());
            let project = self.authors[author].projects[self.rng.random_range(0..MEMBERSHIPS as usize)];
            self.stamp += 1;
            let change = if bad_share > 0.0 && self.rng.random_bool(bad_share) {
                batch.bad += 1;
                self.bad_change(author, project)
            } else {
                let change = self.good_change(project, &mut back);
                batch.good.push(change.clone());
                change
            };
            let author = &mut self.authors[author];
            author.client_seq += 1;
            batch.submissions.push(Submission {
                client_id: author.client_id,
                user_id: author.user_id.clone(),
                client_seq: author.client_seq,
                attempt: 1,
                run_id: author.run_id,
                previous: None,
                after: Vec::new(),
                changes: vec![change],
                traceparent: None,
            });
        }
        for (project, row) in back {
            self.rows[project as usize].push(row);
        }
        batch
    }

    fn good_change(&mut self, project: u64, back: &mut Vec<(u64, Uuid)>) -> Change {
        let roll = self.rng.random_range(0..100);
        let rows = &mut self.rows[project as usize];
        if roll < 60 || rows.is_empty() {
            let row = Uuid::now_v7();
            back.push((project, row));
            let title = self.title();
            return self.insert(row, id(1, project), title);
        }
        let row = rows.swap_remove(self.rng.random_range(0..rows.len()));
        if roll >= 90 {
            return self.change(Operation::Delete, row, &[]);
        }
        back.push((project, row));
        let (column, value) = match self.rng.random_range(0..4) {
            0 => ("done", if self.rng.random() { "t" } else { "f" }.to_owned()),
            1 => ("position", self.rng.random_range(0..1_000_000).to_string()),
            _ => ("title", self.title()),
        };
        self.change(Operation::Update, row, &[(column, value)])
    }

    fn bad_change(&mut self, author: usize, project: u64) -> Change {
        let row = Uuid::now_v7();
        match self.rng.random_range(0..3) {
            // A check.
            0 => self.insert(row, id(1, project), String::new()),
            // A permission.
            1 => {
                let projects = &self.authors[author].projects;
                let foreign = (0..PROJECTS).find(|project| !projects.contains(project)).unwrap_or_default();
                let title = self.title();
                self.insert(row, id(1, foreign), title)
            }
            // The key.
            _ => {
                let taken = self.rows[project as usize].last().copied().unwrap_or_default();
                let title = self.title();
                self.insert(taken, id(1, project), title)
            }
        }
    }

    fn title(&mut self) -> String {
        format!("a task with a title of usual length, number {}", self.rng.random_range(0..1_000_000))
    }

    fn insert(&mut self, row: Uuid, project: Uuid, title: String) -> Change {
        let position = self.rng.random_range(0..1_000_000).to_string();
        let done = "f".to_owned();
        self.change(
            Operation::Insert,
            row,
            &[
                ("id", row.to_string()),
                ("project_id", project.to_string()),
                ("title", title),
                ("done", done),
                ("position", position),
            ],
        )
    }

    fn change(&self, op: Operation, row: Uuid, set: &[(&str, String)]) -> Change {
        Change {
            change_id: Uuid::now_v7(),
            table: "tasks".to_owned(),
            op,
            key: vec![Some(row.to_string())],
            columns: set.iter().map(|(column, _)| (*column).to_owned()).collect(),
            values: set.iter().map(|(_, value)| Some(value.clone())).collect(),
            adds: Vec::new(),
            gone: false,
            stamp: self.stamp,
        }
    }
}
