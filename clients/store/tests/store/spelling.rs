//! A row keeps its name: keys that Postgres would give back in another spelling are refused when they are written.

use millstream_client_store::StoreError;
use millstream_schemas::{Schema, TableSchema};

use super::fixture::column;
use super::wide::with_schema;

/// Types, with a value as SQL that is refused, what its message names, and one that is taken.
const CASES: [(&str, &str, &str, &str); 12] = [
    (
        "uuid",
        "'A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11'",
        "'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'",
        "'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'",
    ),
    ("uuid", "'one'", "write it like '00000000-", "'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a12'"),
    ("timestamp with time zone", "'2026-11-29T08:00:00.000Z'", "'2026-11-29 08:00:00+00'", "'2026-11-29 08:00:00+00'"),
    ("timestamp without time zone", "'2026-11-29T08:00'", "'2026-11-29 08:00:00'", "'2026-11-29 08:00:00'"),
    ("date", "'2026-1-2'", "'2026-01-02'", "'2026-01-02'"),
    ("character(3)", "'a'", "'a  '", "'a  '"),
    ("numeric(6,2)", "1.5", "'1.50'", "'1.50'"),
    ("numeric", "'007'", "'7'", "7"),
    ("integer", "'seven'", "write it like '42'", "'7'"),
    ("bytea", "'\\x00FF'", "'\\x00ff'", "x'00ff'"),
    ("inet", "'192.0.2.1/32'", "'192.0.2.1'", "'192.0.2.1'"),
    ("text", "NULL", "is null", "'Any, as it is'"),
];

#[test]
fn keys_are_written_as_postgres_gives_them_back() {
    for (sql_type, other, named, taken) in CASES {
        let columns = vec![column("id", sql_type, true), column("note", "text", true)];
        let table = TableSchema { name: "t".into(), columns, key: vec![0], scopes: Vec::new(), clocks: None };
        let mut f = with_schema(&Schema { version: "1".into(), tables: vec![table] });
        let refused = f.write(&[&format!("INSERT INTO t VALUES ({other}, 'x')")]).unwrap_err();
        let StoreError::NotWritable(message) = &refused else { panic!("{sql_type}: {refused}") };
        assert!(message.contains(named) && message.contains("\"id\" of \"t\""), "{sql_type}: {message}");
        assert_eq!(f.read("SELECT count(*) FROM t"), "0");
        f.write(&[&format!("INSERT INTO t VALUES ({taken}, 'x')")]).unwrap();
        f.write(&[&format!("UPDATE t SET note = 'y' WHERE id = {taken}")]).unwrap();
        assert_eq!(f.read("SELECT count(*) FROM local_changes"), "2", "{sql_type}: found by its name");
    }
}
