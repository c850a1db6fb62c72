//! A workload over the board that keeps a journal of what it did, marked so that each operation can be found again.

use millstream_client::{Client, SqlValue};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use uuid::Uuid;

/// One row operation: table, operation, id, marker. The same form as the audit's.
pub type JournalEntry = (String, String, String, String);

/// One statement with its journal entry (none for members, which the audit does not follow).
pub struct Journaled {
    /// SQL with `?` parameters.
    pub sql: &'static str,
    /// Its parameters.
    pub params: Vec<SqlValue>,
    /// What the audit must say of it.
    pub entry: Option<JournalEntry>,
}

struct Task {
    id: String,
    project: String,
    comments: Vec<String>,
}

/// Generates transactions of one client; rows that others made are left alone, so that its own order can be told.
pub struct Workload {
    rng: StdRng,
    name: String,
    share_with: Option<String>,
    n: u64,
    projects: Vec<String>,
    tasks: Vec<Task>,
}

impl Workload {
    /// A workload of the client `name`; new projects are shared with another user.
    pub fn new(name: &str, seed: u64, share_with: Option<&str>) -> Workload {
        Workload {
            rng: StdRng::seed_from_u64(seed),
            name: name.to_owned(),
            share_with: share_with.map(str::to_owned),
            n: 0,
            projects: Vec::new(),
            tasks: Vec::new(),
        }
    }

    fn marker(&mut self) -> String {
        self.n += 1;
        format!("{}:{}", self.name, self.n)
    }

    fn id(&mut self) -> String {
        Uuid::from_u128(self.rng.random::<u128>()).as_hyphenated().to_string()
    }

    /// The statements of the next transaction: one to a few, over all three tables, parents before children.
    pub fn transaction(&mut self) -> Vec<Journaled> {
        let mut steps = Vec::new();
        let roll = self.rng.random_range(0..100);
        if self.projects.is_empty() || roll < 3 {
            self.add_project(&mut steps);
        } else if self.tasks.len() < 3 || roll < 30 {
            for _ in 0..self.rng.random_range(1..4) {
                self.add_task(&mut steps);
            }
        } else if roll < 60 {
            let index = self.rng.random_range(0..self.tasks.len());
            let (id, marker) = (self.tasks[index].id.clone(), self.marker());
            let done = i64::from(self.rng.random_bool(0.5));
            steps.push(Journaled {
                sql: "UPDATE tasks SET title = ?, done = ? WHERE id = ?",
                params: vec![text(&marker), SqlValue::Integer(done), text(&id)],
                entry: entry("tasks", "update", &id, &marker),
            });
        } else if roll < 85 {
            self.add_comment(&mut steps);
        } else if roll < 93 {
            self.edit_comment(&mut steps);
        } else {
            self.remove_task(&mut steps);
        }
        steps
    }

    fn add_project(&mut self, steps: &mut Vec<Journaled>) {
        let (id, marker) = (self.id(), self.marker());
        steps.push(Journaled {
            sql: "INSERT INTO projects (id, name) VALUES (?, ?)",
            params: vec![text(&id), text(&marker)],
            entry: entry("projects", "insert", &id, &marker),
        });
        if let Some(user) = &self.share_with {
            steps.push(Journaled {
                sql: "INSERT INTO members (project_id, user_id, role) VALUES (?, ?, 'member')",
                params: vec![text(&id), text(user)],
                entry: None,
            });
        }
        self.projects.push(id);
    }

    fn add_task(&mut self, steps: &mut Vec<Journaled>) {
        let project = self.projects[self.rng.random_range(0..self.projects.len())].clone();
        let (id, marker) = (self.id(), self.marker());
        steps.push(Journaled {
            sql: "INSERT INTO tasks (id, project_id, title, position) VALUES (?, ?, ?, ?)",
            params: vec![text(&id), text(&project), text(&marker), SqlValue::Real(self.n as f64 / 8.0)],
            entry: entry("tasks", "insert", &id, &marker),
        });
        self.tasks.push(Task { id, project, comments: Vec::new() });
    }

    fn add_comment(&mut self, steps: &mut Vec<Journaled>) {
        let index = self.rng.random_range(0..self.tasks.len());
        let (id, marker) = (self.id(), self.marker());
        let task = &mut self.tasks[index];
        task.comments.push(id.clone());
        steps.push(Journaled {
            sql: "INSERT INTO comments (id, project_id, task_id, body) VALUES (?, ?, ?, ?)",
            params: vec![text(&id), text(&task.project), text(&task.id), text(&marker)],
            entry: entry("comments", "insert", &id, &marker),
        });
    }

    fn edit_comment(&mut self, steps: &mut Vec<Journaled>) {
        let marker = self.marker();
        let Some(id) = self.tasks.iter().find_map(|task| task.comments.last().cloned()) else {
            return self.add_task(steps);
        };
        steps.push(Journaled {
            sql: "UPDATE comments SET body = ? WHERE id = ?",
            params: vec![text(&marker), text(&id)],
            entry: entry("comments", "update", &id, &marker),
        });
    }

    /// Children first, in one transaction. The audit marks a delete with the row's last text, which is not tracked here.
    fn remove_task(&mut self, steps: &mut Vec<Journaled>) {
        let index = self.rng.random_range(0..self.tasks.len());
        let task = self.tasks.swap_remove(index);
        for id in &task.comments {
            steps.push(Journaled {
                sql: "DELETE FROM comments WHERE id = ?",
                params: vec![text(id)],
                entry: entry("comments", "delete", id, ""),
            });
        }
        steps.push(Journaled {
            sql: "DELETE FROM tasks WHERE id = ?",
            params: vec![text(&task.id)],
            entry: entry("tasks", "delete", &task.id, ""),
        });
    }
}

fn text(value: &str) -> SqlValue {
    SqlValue::Text(value.to_owned())
}

#[expect(clippy::unnecessary_wraps, reason = "reads as the field that it fills")]
fn entry(table: &str, op: &str, id: &str, marker: &str) -> Option<JournalEntry> {
    Some((table.to_owned(), op.to_owned(), id.to_owned(), marker.to_owned()))
}

/// Runs the statements in one local transaction; returns their journal once they are durable locally.
///
/// # Errors
/// The store refused.
pub async fn write(client: &Client, steps: Vec<Journaled>) -> millstream_client::Result<Vec<JournalEntry>> {
    let mut journal = Vec::new();
    let mut statements = Vec::new();
    for step in steps {
        journal.extend(step.entry);
        statements.push((step.sql, step.params));
    }
    client
        .tx(move |tx| {
            for (sql, params) in statements {
                tx.execute(sql, params)?;
            }
            Ok(())
        })
        .await?;
    Ok(journal)
}

/// The audit restricted to one client's rows, with delete markers blanked, in the journal's form.
pub fn audit_of(audit: &[JournalEntry], journal: &[JournalEntry]) -> Vec<JournalEntry> {
    let ids: std::collections::HashSet<&str> = journal.iter().map(|entry| entry.2.as_str()).collect();
    audit
        .iter()
        .filter(|entry| ids.contains(entry.2.as_str()))
        .map(|(table, op, id, marker)| {
            let marker = if op == "delete" { String::new() } else { marker.clone() };
            (table.clone(), op.clone(), id.clone(), marker)
        })
        .collect()
}
