//! A catalog without a database: types that parsers look at, two kinds of scopes, and memberships.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use millstream_catalog::{Column, ConflictPolicy, Growth, Members, Membership, Table, WriteRules};
use millstream_schemas::TableScope;

/// Object id of the type of every column.
pub const TEXT: u32 = 25;

/// `tasks` of projects, `members` of projects, and `notices` for everybody.
pub static TABLES: LazyLock<Vec<Table>> = LazyLock::new(|| {
    let kind = |kind: &str, column| TableScope { kind: kind.to_owned(), column };
    let mut tasks = table(
        100,
        "tasks",
        &[
            ("id", "uuid"),
            ("project_id", "uuid"),
            ("title", "character varying(20)"),
            ("data", "jsonb"),
            ("n", "numeric[]"),
        ],
        &[0],
        vec![kind("project", Some(1))],
    );
    tasks.renamed = BTreeMap::from([("name".to_owned(), "title".to_owned())]);
    tasks.dropped = vec!["junk".to_owned()];
    let mut members = table(
        200,
        "members",
        &[("project_id", "uuid"), ("user_id", "text"), ("role", "text")],
        &[0, 1],
        vec![kind("project", Some(0))],
    );
    members.columns[2].writable = false;
    members.write.delete = None;
    let of = Members::User { column: 1, roles: None };
    members.memberships.push(Membership { kind: "project".into(), scope: 0, of });
    vec![
        tasks,
        members,
        table(300, "notices", &[("id", "integer"), ("text", "text")], &[0], vec![kind("global", None)]),
    ]
});

fn table(oid: u32, name: &str, columns: &[(&str, &str)], key: &[usize], scopes: Vec<TableScope>) -> Table {
    let column = |&(name, sql_type): &(&str, &str)| Column {
        name: name.into(),
        sql_name: format!("\"{name}\""),
        sql_type: sql_type.into(),
        type_oid: TEXT,
        nullable: true,
        writable: true,
        growth: Growth::default(),
        default: None,
        merge: None,
        numeric: None,
        domain: None,
    };
    let always = || Some("true".to_owned());
    Table {
        synced: true,
        oid,
        name: name.into(),
        sql_name: format!("\"public\".\"{name}\""),
        columns: columns.iter().map(column).collect(),
        key: key.to_vec(),
        scopes,
        memberships: Vec::new(),
        readable: "true".into(),
        write: WriteRules { insert: always(), update: always(), delete: always() },
        conflict: ConflictPolicy::Arrival,
        renamed: BTreeMap::new(),
        dropped: Vec::new(),
        delete_missing_accepted: false,
        partitioned: false,
        hidden: Vec::new(),
        insert_existing_merges: true,
        references: Vec::new(),
        rules: Vec::new(),
        validate: None,
    }
}
