//! A store with two tables and a clock that the test sets.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use millstream_client_core::replica::{Batch, Step, Work};
use millstream_client_store::{Applied, Host, Reader, Store, StoreError};
use millstream_schemas::frame::{Confirmed, Submit};
use millstream_schemas::stream::Failure;
use millstream_schemas::{
    Code, ColumnSchema, Lsn, Position, Row, Schema, TableChanges, TableOp, TableSchema, TableScope,
};
use rusqlite::types::Value;
use uuid::Uuid;

/// A clock that stands still unless told otherwise; ids count.
pub struct FakeHost {
    pub now: AtomicU64,
    pub ids: AtomicU64,
}

impl Host for FakeHost {
    fn now_micros(&self) -> u64 {
        self.now.load(Ordering::Relaxed)
    }

    fn uuid(&self) -> Uuid {
        Uuid::from_u128(u128::from(self.ids.fetch_add(1, Ordering::Relaxed)))
    }
}

pub struct Fixture {
    pub store: Store,
    pub host: Arc<FakeHost>,
    pub path: String,
    pub directory: tempfile::TempDir,
}

pub fn column(name: &str, r#type: &str, writable: bool) -> ColumnSchema {
    ColumnSchema {
        name: name.into(),
        r#type: r#type.into(),
        nullable: true,
        writable,
        default: None,
        merge: None,
        numeric: None,
    }
}

pub fn schema() -> Schema {
    let project = vec![TableScope { kind: "project".into(), column: Some(1) }];
    Schema {
        version: "1".into(),
        tables: vec![
            TableSchema {
                name: "tasks".into(),
                columns: vec![
                    column("id", "text", true),
                    column("project_id", "text", true),
                    column("title", "text", true),
                    column("done", "boolean", true),
                    column("position", "double precision", true),
                    column("photo", "bytea", true),
                    column("created_at", "timestamp with time zone", false),
                ],
                key: vec![0],
                scopes: project,
                references: Vec::new(),
                clocks: None,
            },
            TableSchema {
                name: "members".into(),
                columns: vec![
                    column("project_id", "text", true),
                    column("user_id", "text", true),
                    column("role", "text", true),
                ],
                key: vec![0, 1],
                scopes: vec![
                    TableScope { kind: "project".into(), column: Some(0) },
                    TableScope { kind: "user".into(), column: Some(1) },
                ],
                references: Vec::new(),
                clocks: None,
            },
        ],
    }
}

/// Writes the version of the store's tables.
pub fn set_format(path: &str, format: i64) {
    let sql = "INSERT OR REPLACE INTO millstream_meta (key, value) VALUES ('format', ?1)";
    rusqlite::Connection::open(path).unwrap().execute(sql, [format]).unwrap();
}

pub fn fixture() -> Fixture {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store.db").to_string_lossy().into_owned();
    let host = Arc::new(FakeHost { now: AtomicU64::new(1_000), ids: AtomicU64::new(1) });
    let mut store = Store::open(&path, host.clone()).unwrap();
    store.install(&schema()).unwrap();
    Fixture { store, host, path, directory }
}

impl Fixture {
    /// As after kill -9: nothing is closed properly, the file is opened again.
    pub fn reopen(self) -> Fixture {
        let Fixture { store, host, path, directory } = self;
        std::mem::forget(store);
        let store = Store::open(&path, host.clone()).unwrap();
        Fixture { store, host, path, directory }
    }

    pub fn write(&mut self, statements: &[&str]) -> Result<Option<u64>, StoreError> {
        let written =
            self.store.write(None, |tx| statements.iter().try_for_each(|sql| tx.execute(sql, &[]).map(|_| ())))?;
        Ok(written.recorded.and_then(|recorded| recorded.entry).map(|entry| entry.client_seq))
    }

    pub fn apply(&mut self, steps: Vec<Step>) -> Applied {
        self.try_apply(steps).unwrap()
    }

    /// Applies steps; confirmations without a run get that of the queue's entry.
    pub fn try_apply(&mut self, steps: Vec<Step>) -> Result<Applied, StoreError> {
        let position = Position { epoch: Uuid::nil(), stream_seq: 1, lsn: Lsn(1) };
        let batch = Batch { steps: self.with_runs(steps), position: Some(position), ..Batch::default() };
        self.store.perform(&[Work::Apply(batch)])
    }

    /// Gives confirmations without a run that of the queue's entry.
    pub fn with_runs(&self, mut steps: Vec<Step>) -> Vec<Step> {
        for step in &mut steps {
            if let Step::Confirmed(confirmed) = step
                && confirmed.run_id.is_nil()
            {
                let sql = format!("SELECT instance FROM local_changes WHERE seq = {}", confirmed.client_seq);
                confirmed.run_id = self.read(&sql).lines().next().unwrap().parse().unwrap();
            }
        }
        steps
    }

    pub fn read(&self, sql: &str) -> String {
        let reader = Reader::open(&self.path, self.host.clone()).unwrap();
        let rows = reader.query(sql, &[]).unwrap().rows;
        let cell = |value: &Value| match value {
            Value::Null => "-".to_owned(),
            Value::Integer(value) => value.to_string(),
            Value::Real(value) => value.to_string(),
            Value::Text(value) => value.clone(),
            Value::Blob(value) => format!("{value:?}"),
        };
        let line = |row: &Vec<Value>| row.iter().map(cell).collect::<Vec<_>>().join("|");
        rows.iter().map(line).collect::<Vec<_>>().join("\n")
    }

    pub fn changes(&self) -> String {
        self.read("SELECT tx, op, key, columns, vals FROM local_changes ORDER BY id")
    }

    pub fn tasks(&self) -> String {
        self.read("SELECT id, title, done FROM tasks ORDER BY id")
    }

    pub fn bases(&self) -> String {
        self.read("SELECT key, row FROM millstream_base ORDER BY key")
    }
}

pub fn task(id: &str, project: &str, title: &str, done: bool) -> Row {
    let text = |text: &str| Some(text.to_owned());
    vec![
        text(id),
        text(project),
        text(title),
        text(if done { "t" } else { "f" }),
        text("1.5"),
        None,
        text("2026-01-01 00:00:00+00"),
    ]
}

pub fn changes(table: &str, op: TableOp, rows: Vec<Row>) -> TableChanges {
    TableChanges { table: table.into(), op, columns: None, rows }
}

pub fn upsert(rows: Vec<Row>) -> Step {
    Step::Rows(vec![changes("tasks", TableOp::Upsert, rows)])
}

pub fn delete(id: &str) -> Step {
    Step::Rows(vec![changes("tasks", TableOp::Delete, vec![vec![Some(id.into())]])])
}

pub fn confirmed(client_seq: u64) -> Step {
    Step::Confirmed(Confirmed { client_seq, run_id: Uuid::nil(), failed: vec![], lost: vec![] })
}

pub fn failed(client_seq: u64, code: Code) -> Step {
    let failure = Failure { client_seq, change_id: Uuid::nil(), code, rule: None, message: "no".into() };
    Step::Confirmed(Confirmed { client_seq, run_id: Uuid::nil(), failed: vec![failure], lost: vec![] })
}

pub fn stage(f: &mut Fixture, rows: Vec<Row>) {
    f.store.perform(&[Work::ClearStage, Work::Stage(vec![changes("tasks", TableOp::Upsert, rows)])]).unwrap();
}

pub fn failure(client_seq: u64, change_id: Uuid, code: Code) -> Failure {
    Failure { client_seq, change_id, code, rule: Some("a_rule".into()), message: "not so".into() }
}

pub fn told(client_seq: u64, failed: Vec<Failure>) -> Step {
    Step::Confirmed(Confirmed { client_seq, run_id: Uuid::nil(), failed, lost: vec![] })
}

pub fn submits(f: &Fixture) -> Vec<Submit> {
    f.store.pending(0, 100).unwrap()
}

/// Number, first key and what it comes after, of each numbered transaction.
pub fn queue(f: &Fixture) -> Vec<(u64, String, Vec<u64>)> {
    submits(f).into_iter().map(|s| (s.client_seq, s.changes[0].key[0].clone().unwrap(), s.after)).collect()
}

pub fn entry(client_seq: u64, key: &str, after: &[u64]) -> (u64, String, Vec<u64>) {
    (client_seq, key.to_owned(), after.to_vec())
}

pub fn states(f: &Fixture) -> String {
    f.read("SELECT DISTINCT tx, seq, state, attempts FROM local_changes ORDER BY tx")
}

pub fn insert(f: &mut Fixture, id: &str) {
    f.write(&[&format!("INSERT INTO tasks (id, title) VALUES ('{id}', 'new')")]).unwrap();
}

pub fn update(f: &mut Fixture, id: &str, title: &str) {
    f.write(&[&format!("UPDATE tasks SET title = '{title}' WHERE id = '{id}'")]).unwrap();
}
