//! What a client reads: frames of an edge, and values on their way into SQLite.

use std::collections::HashMap;

use millstream_client_core::replica::{Batch, Replica, Step, Work};
use millstream_client_core::sql::quote;
use millstream_client_core::trigger::create_table;
use millstream_client_core::types::{Kind, text_expr};
use millstream_client_store::bound;
use millstream_schemas::frame::{Resume, ServerFrame};
use millstream_schemas::spelling::double;
use millstream_schemas::{ColumnSchema, Schema, TableChanges, TableSchema};
use rusqlite::Connection;
use rusqlite::functions::{Context, FunctionFlags};

/// Frames, a line each: they survive encoding, and what has to be kept aside for want of memory changes nothing.
pub fn server_frame(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let mut replica = Replica::new(Resume::Snapshot);
    let mut small = Replica::new(Resume::Snapshot).spilling_above(100);
    let (mut done, mut kept) = (Staging::default(), Staging::default());
    let mut received = 0;
    for line in text.lines() {
        let Ok(frame) = serde_json::from_str::<ServerFrame>(line) else { return };
        let again = serde_json::to_string(&frame).expect("a frame encodes");
        assert_eq!(serde_json::from_str::<ServerFrame>(&again).ok().as_ref(), Some(&frame), "{again}");
        received += line.len();
        let handled = replica.handle(frame.clone(), line.len());
        assert_eq!(handled, small.handle(frame, line.len()));
        assert!(replica.ready_bytes() + replica.staged_bytes() <= received);
        assert!(small.ready_bytes() + small.staged_bytes() <= received);
        if handled.is_err() {
            break;
        }
    }
    done.take(replica.take());
    kept.take(small.take());
    assert_eq!(done.work, kept.work);
}

/// What a store would have been told, with what was kept aside back in its place.
#[derive(Default)]
struct Staging {
    work: Vec<Work>,
    aside: HashMap<u64, Vec<TableChanges>>,
}

impl Staging {
    fn take(&mut self, work: Vec<Work>) {
        for work in work {
            match work {
                Work::ClearSpill => self.aside.clear(),
                Work::Spill(number, changes) => self.aside.entry(number).or_default().extend(changes),
                Work::Unspill(number) => {
                    self.aside.remove(&number).expect("what is forgotten was kept");
                }
                Work::Apply(batch) => self.apply(batch),
                Work::Stage(changes) => {
                    self.work.pop_if(|work| matches!(work, Work::Mark(..)));
                    match self.work.last_mut() {
                        Some(Work::Stage(earlier)) => earlier.extend(changes),
                        _ => self.work.push(Work::Stage(changes)),
                    }
                }
                other => self.work.push(other),
            }
        }
    }

    /// Batches next to each other are one; neighbouring rows, too. Time and trace are a transaction's, by its first rows.
    fn apply(&mut self, mut batch: Batch) {
        let mut all = match self.work.pop() {
            Some(Work::Apply(earlier)) => earlier,
            other => {
                self.work.extend(other);
                Batch::default()
            }
        };
        for step in batch.steps.drain(..) {
            let step = match step {
                Step::Spilled(number) => Step::Rows(self.aside.get(&number).expect("what is applied was kept").clone()),
                other => other,
            };
            match (all.steps.last_mut(), step) {
                (Some(Step::Rows(earlier)), Step::Rows(changes)) => earlier.extend(changes),
                (_, step) => all.steps.push(step),
            }
        }
        all.position = batch.position;
        all.transactions += batch.transactions;
        self.work.push(Work::Apply(all));
    }
}

/// The kinds of columns, with a type of each.
const TYPES: [(Kind, &str); 5] = [
    (Kind::Bool, "boolean"),
    (Kind::Integer, "bigint"),
    (Kind::Real, "double precision"),
    (Kind::Bytes, "bytea"),
    (Kind::Text, "text"),
];

/// A byte that says what kind of column it is for, then a value as Postgres writes it: it comes back from SQLite as it was.
pub fn value(input: &[u8]) {
    thread_local! {
        static CONNECTION: Connection = connection();
    }
    let Some((kind, Ok(text))) = input.split_first().map(|(kind, text)| (kind % 5, std::str::from_utf8(text))) else {
        return;
    };
    let (kind, sql_type) = TYPES[usize::from(kind)];
    let back = CONNECTION.with(|connection| stored(connection, kind, sql_type, text));
    let as_it_was = match kind {
        Kind::Bool => matches!(text, "t" | "f"),
        Kind::Integer => text.parse::<i64>().is_ok_and(|number| number.to_string() == text),
        Kind::Bytes => {
            let digits = text.strip_prefix("\\x").filter(|digits| digits.len() % 2 == 0);
            digits.is_some_and(|digits| digits.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)))
        }
        Kind::Text => !text.contains('\0'),
        Kind::Real | Kind::Units { .. } => false,
    };
    if as_it_was {
        assert_eq!(back, text);
    }
    if kind == Kind::Real
        && let Ok(number) = text.parse::<f64>()
    {
        let same = back.parse::<f64>().expect("a number comes back as one");
        assert!(same == number || (same.is_nan() && number.is_nan()), "{number} comes back as {same}");
    }
}

fn connection() -> Connection {
    let column = |(_, sql_type): &(Kind, &str)| ColumnSchema {
        name: (*sql_type).into(),
        r#type: (*sql_type).into(),
        nullable: true,
        writable: true,
        default: None,
        merge: None,
        numeric: None,
    };
    let table = TableSchema {
        name: "values".into(),
        columns: TYPES.iter().map(column).collect(),
        key: vec![0],
        scopes: Vec::new(),
        references: Vec::new(),
        clocks: None,
    };
    let schema = Schema { version: String::new(), tables: vec![table] };
    let connection = Connection::open_in_memory().expect("SQLite in memory");
    let sql = format!("{}; INSERT INTO \"values\" DEFAULT VALUES", create_table(&schema.tables[0]));
    connection.execute_batch(&sql).expect("a table");
    // As in a store.
    let number = |context: &Context<'_>| Ok(context.get::<Option<f64>>(0)?.map(double));
    connection
        .create_scalar_function("millstream_double", 1, FunctionFlags::SQLITE_DETERMINISTIC, number)
        .expect("a function");
    connection
}

/// What the wire is given for a value that came from there.
fn stored(connection: &Connection, kind: Kind, sql_type: &str, text: &str) -> String {
    let column = quote(sql_type);
    let value = bound(kind, text).expect("a value is bound");
    let set = format!("UPDATE \"values\" SET {column} = ?1");
    connection.prepare_cached(&set).and_then(|mut set| set.execute([value])).expect("a value is stored");
    let get = format!("SELECT {} FROM \"values\"", text_expr(kind, &column));
    let mut get = connection.prepare_cached(&get).expect("a value is read");
    get.query_row([], |row| row.get(0)).expect("a value is read as text")
}
