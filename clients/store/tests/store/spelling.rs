//! A row is what it will be: keys that Postgres would give back in another spelling are refused when they are written, columns that
//! are left out have their defaults.

use millstream_client_store::StoreError;
use millstream_schemas::{ColumnSchema, Schema, TableSchema};

use super::fixture::column;
use super::wide::with_schema;

/// Types, with a value as SQL that is refused, what its message names, and one that is taken.
const CASES: [(&str, &str, &str, &str); 18] = [
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
    // A text is not the bytes that come back for it, however it is written.
    ("bytea", "'\\x00FF'", "x'00ff'", "x'00ff'"),
    ("bytea", "'\\x00ff'", "x'00ff'", "x'00ff'"),
    ("numeric(6,2)", "'1.005'", "'1.01'", "'1.01'"),
    ("numeric(3,-2)", "'1250'", "'1300'", "'1300'"),
    ("time with time zone", "'8:00Z'", "'08:00:00+00'", "'08:00:00+00'"),
    ("time(0) with time zone", "'08:00:00.5+01'", "'08:00:01+01'", "'08:00:01+01'"),
    ("timestamp(0) without time zone", "'2026-11-29 08:00:00.5'", "'2026-11-29 08:00:01'", "'2026-11-29 08:00:01'"),
    ("inet", "'192.0.2.1/32'", "'192.0.2.1'", "'192.0.2.1'"),
    ("text", "NULL", "is null", "'Any, as it is'"),
];

#[test]
fn keys_are_written_as_postgres_gives_them_back() {
    for (sql_type, other, named, taken) in CASES {
        let columns = vec![column("id", sql_type, true), column("note", "text", true)];
        let table = TableSchema {
            name: "t".into(),
            columns,
            key: vec![0],
            scopes: Vec::new(),
            references: Vec::new(),
            clocks: None,
        };
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

/// What Postgres would fill in is there at once, and a null is one.
#[test]
fn left_out_columns_have_their_defaults_and_nulls_are_nulls() {
    let constant = |name: &str, sql_type: &str, default: &str, writable| ColumnSchema {
        default: Some(default.into()),
        ..column(name, sql_type, writable)
    };
    let columns = vec![
        column("id", "text", true),
        constant("pinned", "boolean", "f", true),
        constant("priority", "integer", "3", true),
        constant("note", "text", "it's", true),
        constant("share", "double precision", "0.1", true),
        constant("photo", "bytea", "\\x00ff", true),
        constant("status", "status", "open", false),
        column("made_at", "timestamp with time zone", true),
    ];
    let table = |columns| TableSchema {
        name: "t".into(),
        columns,
        key: vec![0],
        scopes: Vec::new(),
        references: Vec::new(),
        clocks: None,
    };
    let schema = |version: &str, columns| Schema { version: version.into(), tables: vec![table(columns)] };
    let mut f = with_schema(&schema("1", columns.clone()));
    f.write(&["INSERT INTO t (id) VALUES ('a')"]).unwrap();
    let row = "SELECT id, pinned, priority, note, share, hex(photo), status, made_at FROM t ORDER BY id";
    assert_eq!(f.read(row), "a|0|3|it's|0.1|00FF|open|-");
    f.write(&["UPDATE t SET pinned = NOT pinned WHERE NOT pinned", "UPDATE t SET priority = NULL"]).unwrap();
    f.write(&["INSERT INTO t (id, priority, note, made_at) VALUES ('b', NULL, 'x', NULL)"]).unwrap();
    let expected = r#"1|insert|["a"]|["id","pinned","priority","note","share","photo"]|["a","f","3","it's","0.1","\\x00ff"]
2|update|["a"]|["pinned"]|["t"]
2|update|["a"]|["priority"]|[null]
3|insert|["b"]|["id","pinned","priority","note","share","photo"]|["b","f",null,"x","0.1","\\x00ff"]"#;
    assert_eq!(f.changes(), expected);
    let refused = f.write(&["INSERT INTO t (id, status) VALUES ('c', 'closed')"]).unwrap_err();
    assert!(refused.to_string().contains("\"status\" of \"t\" is not writable"), "{refused}");
    f.write(&["INSERT INTO t (id, status) VALUES ('c', 'open')"]).unwrap();
    // A default that comes later: SQLite cannot have it for a column that is there, so a null is the server's to fill. A new
    // column has it, also for the rows on hand until the server's come.
    let mut later = columns;
    later[7].default = Some("2026-01-01 00:00:00+00".into());
    // One that is another by now: it shows until the server's comes, and is left to the server.
    later[2].default = Some("5".into());
    later.push(constant("rank", "integer", "7", true));
    f.store.install(&schema("2", later)).unwrap();
    f.write(&["INSERT INTO t (id) VALUES ('d')"]).unwrap();
    assert_eq!(f.read("SELECT id, made_at, rank FROM t ORDER BY id"), "a|-|7\nb|-|7\nc|-|7\nd|-|7");
    let last = "SELECT columns FROM local_changes ORDER BY id DESC LIMIT 1";
    assert_eq!(f.read(last), r#"["id","pinned","note","share","photo","rank"]"#);
    f.write(&["INSERT INTO t (id, priority) VALUES ('e', NULL)"]).unwrap();
    assert_eq!(f.read(last), r#"["id","pinned","priority","note","share","photo","rank"]"#);
}
