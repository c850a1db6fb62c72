//! The rights of the services in Postgres, and the publication.

use millstream_catalog::{Catalog, Table};
use sqlx::postgres::PgConnection;

use crate::keys::Role;
use crate::names::{PUBLICATION, role_name};

/// The sequences behind `serial` columns, quoted: inserting needs the right to use them.
///
/// # Errors
/// Postgres cannot be asked.
pub async fn owned_sequences(connection: &mut PgConnection, catalog: &Catalog) -> Result<Vec<String>, sqlx::Error> {
    let oids: Vec<i64> = catalog.tables.iter().map(|table| i64::from(table.oid)).collect();
    sqlx::query_scalar(
        "SELECT DISTINCT d.objid::regclass::text FROM pg_depend d JOIN pg_class s ON s.oid = d.objid AND s.relkind = 'S' \
         WHERE d.classid = 'pg_class'::regclass AND d.deptype = 'a' AND d.refobjid::int8 = ANY($1) ORDER BY 1",
    )
    .bind(oids)
    .fetch_all(connection)
    .await
}

/// The schemas of the synced tables and of their columns' types, quoted.
///
/// # Errors
/// Postgres cannot be asked.
pub async fn schemas(connection: &mut PgConnection, catalog: &Catalog) -> Result<Vec<String>, sqlx::Error> {
    let oids: Vec<i64> = catalog.tables.iter().map(|table| i64::from(table.oid)).collect();
    sqlx::query_scalar(
        "SELECT DISTINCT namespace::regnamespace::text FROM ( \
           SELECT relnamespace FROM pg_class WHERE oid::int8 = ANY($1) UNION ALL \
           SELECT n FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid LEFT JOIN pg_type e ON e.oid = t.typelem \
             CROSS JOIN LATERAL (VALUES (t.typnamespace), (e.typnamespace)) AS of_type(n) \
           WHERE a.attrelid::int8 = ANY($1) AND a.attnum > 0 AND NOT a.attisdropped AND n IS NOT NULL) AS used(namespace) \
         WHERE namespace NOT IN ('pg_catalog'::regnamespace, 'information_schema'::regnamespace) ORDER BY 1",
    )
    .bind(oids)
    .fetch_all(connection)
    .await
}

/// The variants of `pg_logical_emit_message` (17 added an argument), with argument types.
///
/// # Errors
/// Postgres cannot be asked.
pub async fn emit_functions(connection: &mut PgConnection) -> Result<Vec<String>, sqlx::Error> {
    sqlx::query_scalar(
        "SELECT oid::regprocedure::text FROM pg_proc WHERE proname = 'pg_logical_emit_message' \
         AND pronamespace = 'pg_catalog'::regnamespace ORDER BY 1",
    )
    .fetch_all(connection)
    .await
}

/// What each service may do.
pub fn grants(tables: &[Table], schemas: &[String], sequences: &[String], functions: &[String]) -> Vec<String> {
    let (edge, changes, replication) = (role_name(Role::Edge), role_name(Role::Changes), role_name(Role::Replication));
    let mut statements = vec![
        format!("GRANT USAGE ON SCHEMA millstream TO {edge}, {changes}, {replication}"),
        format!(
            "GRANT SELECT ON millstream.clients, millstream.instances, millstream.changes_history, millstream.ended_sessions TO {edge}"
        ),
        format!(
            "GRANT SELECT, INSERT, UPDATE, DELETE ON millstream.partitions, millstream.members, millstream.clients, \
             millstream.instances, millstream.changes_history, millstream.parked TO {changes}"
        ),
        format!("GRANT EXECUTE ON FUNCTION millstream.take_back(text) TO {changes}"),
        format!("GRANT EXECUTE ON FUNCTION millstream.has_text(regclass, oid, tid, text) TO {edge}"),
        format!("GRANT SELECT, INSERT, UPDATE ON millstream.epoch TO {replication}"),
        format!("GRANT EXECUTE ON FUNCTION millstream.held_up_by(int) TO {replication}"),
    ];
    for schema in schemas {
        statements.push(format!("GRANT USAGE ON SCHEMA {schema} TO {edge}, {changes}, {replication}"));
    }
    for table in tables {
        let name = &table.sql_name;
        statements.push(format!("GRANT SELECT ON {name} TO {edge}, {changes}, {replication}"));
        // What an earlier configuration allowed is taken back. Where clients have no rows to write, rights are the application's own.
        if !table.synced {
            continue;
        }
        statements.push(format!("REVOKE INSERT, UPDATE, DELETE ON {name} FROM {changes}"));
        let allowed =
            [("INSERT", &table.write.insert), ("UPDATE", &table.write.update), ("DELETE", &table.write.delete)];
        let verbs: Vec<&str> = allowed.iter().filter(|(_, rule)| rule.is_some()).map(|(verb, _)| *verb).collect();
        if !verbs.is_empty() {
            statements.push(format!("GRANT {} ON {name} TO {changes}", verbs.join(", ")));
        }
    }
    for sequence in sequences {
        statements.push(format!("GRANT USAGE ON SEQUENCE {sequence} TO {changes}"));
    }
    // Only the executor may say which clients a transaction settles; replication asks for tables to be sent again.
    for function in functions {
        statements.push(format!("REVOKE EXECUTE ON FUNCTION {function} FROM PUBLIC"));
        statements.push(format!("GRANT EXECUTE ON FUNCTION {function} TO {changes}, {replication}"));
    }
    statements
}

/// The statements that make the publication, or bring it in line.
pub fn publication(tables: &[Table], exists: bool) -> Vec<String> {
    // Without children by inheritance: they may have no replica identity, and then their own UPDATE and DELETE would fail.
    let names: Vec<String> = tables.iter().map(|table| format!("ONLY {}", table.sql_name)).collect();
    let names = names.join(", ");
    let options = "publish = 'insert, update, delete, truncate', publish_via_partition_root = true";
    if exists {
        vec![
            format!("ALTER PUBLICATION {PUBLICATION} SET TABLE {names}"),
            format!("ALTER PUBLICATION {PUBLICATION} SET ({options})"),
        ]
    } else {
        vec![format!("CREATE PUBLICATION {PUBLICATION} FOR TABLE {names} WITH ({options})")]
    }
}

#[cfg(test)]
mod tests {
    use millstream_catalog::WriteRules;

    use super::*;

    fn table(write: WriteRules) -> Table {
        Table {
            synced: true,
            oid: 1,
            name: "tasks".into(),
            sql_name: "\"public\".\"tasks\"".into(),
            columns: Vec::new(),
            key: Vec::new(),
            scopes: Vec::new(),
            readable: "true".into(),
            memberships: Vec::new(),
            write,
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

    #[test]
    fn only_declared_operations_are_granted() {
        let check = |write: WriteRules, expected: Option<&str>| {
            let statements = grants(&[table(write)], &[], &[], &[]);
            let granted = statements.iter().find(|statement| {
                statement.starts_with("GRANT") && statement.contains("tasks") && !statement.contains("SELECT")
            });
            assert_eq!(granted.map(String::as_str), expected);
        };
        check(WriteRules::default(), None);
        let rule = Some("true".to_owned());
        check(
            WriteRules { insert: rule.clone(), update: None, delete: rule.clone() },
            Some("GRANT INSERT, DELETE ON \"public\".\"tasks\" TO millstream_changes"),
        );
    }

    #[test]
    fn the_publication_is_made_once() {
        let tables = [table(WriteRules::default())];
        assert!(publication(&tables, false)[0].starts_with("CREATE PUBLICATION millstream FOR TABLE ONLY \"public\""));
        assert!(publication(&tables, true).iter().all(|statement| statement.starts_with("ALTER PUBLICATION")));
    }
}
