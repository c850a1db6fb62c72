//! Tables as wide as Postgres makes them.

use millstream_client_core::replica::{Step, Work};
use millstream_client_store::Store;
use millstream_schemas::{Row, Schema, Scope, TableOp, TableSchema, TableScope};

use super::fixture::{Fixture, changes, column, confirmed, fixture};

/// Most columns of a Postgres table.
const MAX_COLUMNS: usize = 1_600;
/// Most columns of a Postgres key.
const MAX_KEY: usize = 32;

const KINDS: [(&str, &str, &str); 6] = [
    ("timestamp with time zone", "'2026-11-29T08:00Z'", "2026-11-29 08:00:00+00"),
    ("text", "'x'", "x"),
    ("boolean", "1", "t"),
    ("double precision", "0.1", "0.1"),
    ("bytea", "x'00ff'", "\\x00ff"),
    ("bigint", "7", "7"),
];

/// A table of this width: a key, a scope, columns of all kinds in turn.
fn wide(columns: usize, key: usize, writable: bool) -> Schema {
    let kind = |n: usize| if n <= key { "text" } else { KINDS[n % KINDS.len()].0 };
    let columns = (0..columns).map(|n| column(&format!("c{n:04}"), kind(n), writable || n <= key)).collect();
    let scopes = vec![TableScope { kind: "project".into(), column: Some(key) }];
    let table = TableSchema {
        name: "wide".into(),
        columns,
        key: (0..key).collect(),
        scopes,
        references: Vec::new(),
        clocks: None,
    };
    Schema { version: "w".into(), tables: vec![table] }
}

fn row(columns: usize, key: usize, id: &str) -> Row {
    let value = |n: usize| match n {
        _ if n < key => id,
        _ if n == key => "p",
        _ => KINDS[n % KINDS.len()].2,
    };
    (0..columns).map(|n| Some(value(n).to_owned())).collect()
}

pub fn with_schema(schema: &Schema) -> Fixture {
    let f = fixture();
    let mut store = Store::open(&format!("{}-wide", f.path), f.host.clone()).unwrap();
    store.install(schema).unwrap();
    Fixture { store, path: format!("{}-wide", f.path), ..f }
}

#[test]
fn any_width_that_postgres_allows_is_synced() {
    // On both sides of where a chain would be too deep for SQLite, and the widest.
    for (columns, key) in [(333, 1), (334, 1), (1_000, 2), (MAX_COLUMNS, 1), (MAX_COLUMNS, MAX_KEY)] {
        let mut f = with_schema(&wide(columns, key, true));
        let key_is = |id: &str| (0..key).map(|n| format!("c{n:04} = '{id}'")).collect::<Vec<_>>().join(" AND ");
        let rows = ["a", "b", "c"].map(|id| row(columns, key, id)).to_vec();
        stage_wide(&mut f, rows[..2].to_vec());
        let scopes = vec![Scope::new("project", "p")];
        f.apply(vec![Step::Snapshot { scopes: scopes.clone(), full: true }]);
        assert_eq!(f.read("SELECT count(*) FROM wide"), "2", "{columns} columns: a snapshot");
        f.apply(vec![Step::Rows(vec![changes("wide", TableOp::Upsert, rows[1..].to_vec())])]);
        assert_eq!(f.read("SELECT count(*) FROM wide"), "3", "{columns} columns: rows");

        let last = columns - 1;
        let new: Vec<&str> = (0..columns)
            .map(|n| match n {
                _ if n < key => "'n'",
                _ if n == key => "'p'",
                _ => KINDS[n % KINDS.len()].1,
            })
            .collect();
        let client_seq = f
            .write(&[
                &format!("INSERT INTO wide VALUES ({})", new.join(", ")),
                &format!("UPDATE wide SET c{last:04} = NULL WHERE {}", key_is("a")),
                &format!("DELETE FROM wide WHERE {}", key_is("b")),
            ])
            .unwrap();
        assert_eq!(client_seq, Some(1));
        let submit = f.store.pending(0, 1).unwrap().remove(0);
        assert_eq!(submit.changes[0].values, row(columns, key, "n"), "{columns} columns: an insert");
        assert_eq!(submit.changes[1].columns, [format!("c{last:04}")]);
        assert_eq!(submit.changes[1].values, [None]);
        assert_eq!(submit.changes[2].key, row(columns, key, "b")[..key]);

        // Someone else's change of another column meets ours: both are seen, and the confirmed rows in the end.
        let mut theirs = rows[0].clone();
        theirs[key + 1] = None;
        f.apply(vec![Step::Rows(vec![changes("wide", TableOp::Upsert, vec![theirs.clone()])])]);
        let both = format!("SELECT c{:04} IS NULL AND c{last:04} IS NULL FROM wide WHERE {}", key + 1, key_is("a"));
        assert_eq!(f.read(&both), "1");
        theirs[last] = None;
        let confirmation = [theirs, row(columns, key, "n")].to_vec();
        let gone = vec![rows[1][..key].to_vec()];
        f.apply(vec![
            Step::Rows(vec![changes("wide", TableOp::Upsert, confirmation), changes("wide", TableOp::Delete, gone)]),
            confirmed(1),
        ]);
        assert_eq!((f.read("SELECT count(*) FROM wide"), f.bases()), ("3".to_owned(), String::new()));
        f.apply(vec![Step::ScopeRemoved(scopes[0].clone())]);
        assert_eq!(f.read("SELECT count(*) FROM wide"), "0", "{columns} columns: a lost scope");
    }
}

#[test]
fn a_wide_table_that_only_the_server_writes_refuses_each_column() {
    let mut f = with_schema(&wide(MAX_COLUMNS, 1, false));
    stage_wide(&mut f, vec![row(MAX_COLUMNS, 1, "a")]);
    f.apply(vec![Step::Snapshot { scopes: vec![Scope::new("project", "p")], full: true }]);
    let error = f.write(&["UPDATE wide SET c1599 = NULL"]).unwrap_err();
    assert!(error.to_string().contains("\"c1599\" of \"wide\" is not writable"), "{error}");
    assert_eq!(f.write(&["DELETE FROM wide"]).unwrap(), Some(1));
}

fn stage_wide(f: &mut Fixture, rows: Vec<Row>) {
    f.store.perform(&[Work::Stage(vec![changes("wide", TableOp::Upsert, rows)])]).unwrap();
}
