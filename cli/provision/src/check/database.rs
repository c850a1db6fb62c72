//! Whether the database is ready: settings, roles, publication, replica identities, triggers, row security.

use std::collections::HashSet;

use millstream_catalog::{
    Catalog, Config, Conflict, ConflictPolicy, Table, Unanswered, identity_problems, publication_problems,
};
use sqlx::{PgConnection, Row};

use super::problem::{Error, Problem};
use crate::attach::{FoundTrigger, Policy, TRIGGERS, row_triggers};
use crate::keys::Role;
use crate::names::{PUBLICATION, READ_POLICY, SERVICE_ROLES, role_name};
use crate::{grants, migrations};

/// The remedy for most of it.
const SETUP: &str = "run `millstream setup`";

/// What does not fit.
pub async fn check(connection: &mut PgConnection, config: &Config, catalog: &Catalog) -> Result<Vec<Problem>, Error> {
    let mut problems = Vec::new();
    let row = sqlx::query("SELECT current_setting('wal_level'), current_setting('server_encoding')")
        .fetch_one(&mut *connection)
        .await
        .map_err(Error::Postgres)?;
    let (wal_level, encoding): (String, String) = (row.get(0), row.get(1));
    if wal_level != "logical" {
        problems.push(
            Problem::new(format!("wal_level is `{wal_level}`; replication needs `logical`"))
                .fix("ALTER SYSTEM SET wal_level = logical, then restart Postgres"),
        );
    }
    if encoding == "SQL_ASCII" {
        problems.push(
            Problem::new("the database's encoding is SQL_ASCII, so its texts cannot be replicated").fix("use UTF8"),
        );
    }
    problems.extend(unroutable(connection, catalog).await?);
    match migrations::pending(connection).await.map_err(Error::Postgres)? {
        Some(0) => {}
        Some(pending) => {
            problems.push(Problem::new(format!("the schema millstream lacks {pending} of our migrations")).fix(SETUP))
        }
        None => {
            // Roles, publication and triggers would all be missing, for this one reason.
            problems.push(Problem::new("the database has no schema millstream yet").fix(SETUP));
            return Ok(problems);
        }
    }
    let (roles, found) = roles(connection).await?;
    problems.extend(found);
    problems.extend(rights(connection, catalog, &roles).await?);
    problems.extend(publication(connection, catalog).await?);
    for table in &catalog.tables {
        let found = row_triggers(connection, i64::from(table.oid)).await.map_err(Error::Postgres)?;
        let declared = config.tables.get(&table.name).and_then(|table| table.conflict);
        problems.extend(clocks(table, declared, &found));
        problems.extend(inserts(connection, table).await?);
        problems.extend(row_security(connection, table).await?);
    }
    Ok(problems)
}

/// Tables, or what holds their rows, that cannot be replicated as they are.
pub async fn unroutable(connection: &mut PgConnection, catalog: &Catalog) -> Result<Vec<Problem>, Error> {
    let found = identity_problems(connection, catalog).await.map_err(replication)?;
    Ok(found.into_iter().map(Problem::misfit).collect())
}

/// What a table without a primary key has for a key.
pub async fn stand_in_keys(connection: &mut PgConnection, catalog: &Catalog) -> Result<Vec<Problem>, Error> {
    let mut warnings = Vec::new();
    for table in catalog.tables.iter().filter(|table| !table.key.is_empty()) {
        let primary: bool =
            sqlx::query_scalar("SELECT EXISTS (SELECT FROM pg_index WHERE indrelid = $1::int8::oid AND indisprimary)")
                .bind(i64::from(table.oid))
                .fetch_one(&mut *connection)
                .await
                .map_err(Error::Postgres)?;
        if !primary {
            let names: Vec<&str> = table.key.iter().map(|&column| table.columns[column].sql_name.as_str()).collect();
            let names = names.join(", ");
            let message = format!("it has no primary key: the unique index over ({names}) serves as its key");
            let fix = format!(
                "to have it said in the database too: ALTER TABLE {} ADD PRIMARY KEY ({names})",
                table.sql_name
            );
            warnings.push(Problem::table(&table.name, message).fix(fix));
        }
    }
    Ok(warnings)
}

/// Keys that the database makes, of tables into which clients insert: a client names the key itself, and the sequence does not move.
pub async fn server_keys(connection: &mut PgConnection, catalog: &Catalog) -> Result<Vec<Problem>, Error> {
    let mut warnings = Vec::new();
    for table in catalog.tables.iter().filter(|table| table.write.insert.is_some()) {
        let key: Vec<&str> = table.key.iter().map(|&column| table.columns[column].name.as_str()).collect();
        let made: Option<String> = sqlx::query_scalar(
            "SELECT a.attname::text FROM pg_attribute a LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum \
             WHERE a.attrelid = $1::int8::oid AND a.attname = ANY ($2) \
             AND (a.attidentity = 'd' OR pg_get_expr(d.adbin, d.adrelid) LIKE '%nextval(%') ORDER BY a.attnum LIMIT 1",
        )
        .bind(i64::from(table.oid))
        .bind(&key)
        .fetch_optional(&mut *connection)
        .await
        .map_err(Error::Postgres)?;
        if let Some(name) = made {
            let message = format!(
                "clients may insert, and name the key themselves, while the database makes `{name}` of its key by a sequence, which \
                 does not move with that: an insert of the application, or of another client, will meet a key that is taken"
            );
            let fix = "give the table a key that nobody has to ask for, such as uuid (docs/tables.md, Keys), or no `write.insert`";
            warnings.push(Problem::table(&table.name, message).fix(fix));
        }
    }
    Ok(warnings)
}

/// Forged origin records: a role that may write messages into the write-ahead log can claim that clients' changes took effect.
pub async fn emitters(connection: &mut PgConnection) -> Result<Vec<Problem>, Error> {
    let functions: Vec<String> = sqlx::query_scalar(
        "SELECT p.oid::regprocedure::text FROM pg_proc p, aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) AS acl \
         WHERE p.proname = 'pg_logical_emit_message' AND p.pronamespace = 'pg_catalog'::regnamespace \
         AND acl.grantee = 0 AND acl.privilege_type = 'EXECUTE' ORDER BY 1",
    )
    .fetch_all(connection)
    .await
    .map_err(Error::Postgres)?;
    if functions.is_empty() {
        return Ok(Vec::new());
    }
    let revoke: Vec<String> =
        functions.iter().map(|function| format!("REVOKE EXECUTE ON FUNCTION {function} FROM PUBLIC")).collect();
    let message = "every role of this database may call pg_logical_emit_message, and so write into the write-ahead log that \
        clients' changes took effect which did not, or have tables sent again";
    let fix = format!(
        "as a superuser: {}; then GRANT it to the roles of the application that use it, and run `millstream setup`",
        revoke.join("; ")
    );
    Ok(vec![Problem::new(message).fix(fix)])
}

/// A replication slot of that name that is not ours.
pub async fn slot(connection: &mut PgConnection, slot: &str) -> Result<Option<Problem>, Error> {
    let owner: Option<String> = sqlx::query_scalar(
        "SELECT coalesce('database ' || database, 'a standby') FROM pg_replication_slots \
         WHERE slot_name = $1 AND database IS DISTINCT FROM current_database()",
    )
    .bind(slot)
    .fetch_optional(connection)
    .await
    .map_err(Error::Postgres)?;
    let problem =
        |owner| Problem::new(format!("the replication slot {slot} of this Postgres cluster belongs to {owner}"));
    Ok(owner.map(|owner| problem(owner).fix("set MILLSTREAM_SLOT to another name, for replication and for `check`")))
}

/// Columns by which rows or memberships are looked up, and that no index begins with.
pub async fn unindexed(connection: &mut PgConnection, catalog: &Catalog) -> Result<Vec<Problem>, Error> {
    let mut warnings = Vec::new();
    for table in &catalog.tables {
        let mut columns: Vec<usize> = table.row_scope_columns().filter_map(|scope| scope.column).collect();
        columns.sort_unstable();
        columns.dedup();
        for column in columns {
            let column = &table.columns[column];
            let indexed: bool = sqlx::query_scalar(
                "SELECT EXISTS (SELECT FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0] \
                 WHERE i.indrelid = $1::int8::oid AND a.attname = $2 AND i.indisvalid AND i.indpred IS NULL)",
            )
            .bind(i64::from(table.oid))
            .bind(&column.name)
            .fetch_one(&mut *connection)
            .await
            .map_err(Error::Postgres)?;
            if !indexed {
                let message =
                    format!("no index begins with `{}`, by which the rows of a scope are looked up", column.name);
                // A partitioned table takes none concurrently.
                let how = if table.partitioned { "INDEX" } else { "INDEX CONCURRENTLY" };
                let fix = format!("CREATE {how} ON {} ({})", table.sql_name, column.sql_name);
                warnings.push(Problem::table(&table.name, message).fix(fix));
            }
        }
    }
    Ok(warnings)
}

fn replication(error: Unanswered) -> Error {
    Error::Replication(Box::new(error))
}

/// The roles that are there, and what is wrong with them.
async fn roles(connection: &mut PgConnection) -> Result<(HashSet<String>, Vec<Problem>), Error> {
    let names: Vec<String> = SERVICE_ROLES.map(role_name).into();
    let rows = sqlx::query(
        "SELECT r.rolname::text, r.rolcanlogin, r.rolreplication OR r.rolsuper OR EXISTS ( \
             SELECT FROM pg_roles g WHERE g.rolname = 'rds_replication' AND pg_has_role(r.oid, g.oid, 'MEMBER')) \
         FROM pg_roles r WHERE r.rolname = ANY ($1)",
    )
    .bind(&names)
    .fetch_all(connection)
    .await
    .map_err(Error::Postgres)?;
    let mut problems = Vec::new();
    for name in &names {
        let Some(row) = rows.iter().find(|row| row.get::<&str, _>(0) == name) else {
            problems.push(Problem::new(format!("the role {name} does not exist")).fix(SETUP));
            continue;
        };
        if !row.get::<bool, _>(1) {
            problems
                .push(Problem::new(format!("the role {name} may not log in")).fix(format!("ALTER ROLE {name} LOGIN")));
        }
        if *name == role_name(Role::Replication) && !row.get::<bool, _>(2) {
            problems.push(Problem::new(format!("the role {name} may not replicate")).fix(SETUP));
        }
    }
    Ok((rows.iter().map(|row| row.get(0)).collect(), problems))
}

/// The rights that the services lack on synced tables.
async fn rights(
    connection: &mut PgConnection,
    catalog: &Catalog,
    roles: &HashSet<String>,
) -> Result<Vec<Problem>, Error> {
    let mut problems = Vec::new();
    for table in &catalog.tables {
        let mut needed: Vec<(Role, &str)> = SERVICE_ROLES.map(|role| (role, "SELECT")).into();
        needed.extend(operations(table).map(|(verb, _)| (Role::Changes, verb)));
        for (role, verb) in needed {
            let role = role_name(role);
            if !roles.contains(&role) {
                continue;
            }
            let has: bool = sqlx::query_scalar("SELECT has_table_privilege($1, $2::int8::oid, $3)")
                .bind(&role)
                .bind(i64::from(table.oid))
                .bind(verb)
                .fetch_one(&mut *connection)
                .await
                .map_err(Error::Postgres)?;
            if !has {
                problems.push(Problem::table(&table.name, format!("{role} has no right to {verb}")).fix(SETUP));
            }
        }
    }
    for schema in grants::schemas(connection, catalog).await.map_err(Error::Postgres)? {
        for role in SERVICE_ROLES.map(role_name).iter().filter(|role| roles.contains(*role)) {
            let has: bool = sqlx::query_scalar("SELECT has_schema_privilege($1, $2::text::regnamespace::oid, 'USAGE')")
                .bind(role)
                .bind(&schema)
                .fetch_one(&mut *connection)
                .await
                .map_err(Error::Postgres)?;
            if !has {
                problems.push(Problem::new(format!("{role} may not use the schema {schema}")).fix(SETUP));
            }
        }
    }
    Ok(problems)
}

/// The declared operations: SQL's word, and its letter in `pg_policy`.
fn operations(table: &Table) -> impl Iterator<Item = (&'static str, &'static str)> {
    let write = &table.write;
    let all = [(&write.insert, "INSERT", "a"), (&write.update, "UPDATE", "w"), (&write.delete, "DELETE", "d")];
    all.map(|(rule, verb, letter)| rule.is_some().then_some((verb, letter))).into_iter().flatten()
}

async fn publication(connection: &mut PgConnection, catalog: &Catalog) -> Result<Vec<Problem>, Error> {
    let found = publication_problems(connection, catalog, PUBLICATION).await.map_err(replication)?;
    let mut problems: Vec<Problem> = found.into_iter().map(Problem::new).collect();
    let whole: Option<bool> = sqlx::query_scalar(
        "SELECT pubinsert AND pubupdate AND pubdelete AND pubtruncate AND pubviaroot FROM pg_publication WHERE pubname = $1",
    )
    .bind(PUBLICATION)
    .fetch_optional(connection)
    .await
    .map_err(Error::Postgres)?;
    if whole == Some(false) {
        problems.push(
            Problem::new(format!(
                "the publication {PUBLICATION} does not publish every operation by way of the root table"
            ))
            .fix(SETUP),
        );
    }
    Ok(problems)
}

/// Whether the columns and triggers that keep clocks are whole.
fn clocks(table: &Table, declared: Option<Conflict>, found: &[FoundTrigger]) -> Vec<Problem> {
    let attach = format!("run `millstream attach {}`", table.name);
    if declared == Some(Conflict::Arrival) {
        return Vec::new();
    }
    let Some((policy, names)) = Policy::of(table) else {
        // Missing columns of a declared policy are told of by the catalog.
        return match table.conflict {
            ConflictPolicy::Column { .. } => vec![
                Problem::table(
                    &table.name,
                    "it merges by column, but lacks `updated_at timestamptz` or `client_id uuid`, which the triggers for plain SQL keep",
                )
                .fix(attach),
            ],
            ConflictPolicy::Row { .. } | ConflictPolicy::Arrival => Vec::new(),
        };
    };
    let problem = |name: &&str| {
        let what = match found.iter().find(|trigger| trigger.name == *name) {
            None => "is missing",
            Some(trigger) if !policy.is_kept_by(trigger, &names) => {
                "is of another conflict policy, or of other columns"
            }
            Some(trigger) if !trigger.enabled => "is disabled",
            Some(_) => return None,
        };
        let message = format!(
            "it merges by {}, but its trigger {name} {what}: plain SQL would leave the clocks behind",
            policy.name()
        );
        Some(Problem::table(&table.name, message).fix(attach.clone()))
    };
    TRIGGERS.iter().filter_map(problem).collect()
}

/// Columns for which no insert of a client can have a value.
async fn inserts(connection: &mut PgConnection, table: &Table) -> Result<Vec<Problem>, Error> {
    if table.write.insert.is_none() {
        return Ok(Vec::new());
    }
    let rows = sqlx::query(
        "SELECT a.attname::text, quote_ident(a.attname), a.attidentity = 'a', \
           (a.attnotnull OR t.typnotnull) AND NOT a.atthasdef AND a.attidentity = '' AND t.typdefault IS NULL AND NOT EXISTS ( \
             SELECT FROM pg_trigger g JOIN pg_proc p ON p.oid = g.tgfoid \
             WHERE g.tgrelid = a.attrelid AND g.tgtype & 6 = 6 AND NOT g.tgisinternal AND g.tgenabled <> 'D' \
               AND p.pronamespace IS DISTINCT FROM to_regnamespace('millstream')::oid) \
         FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid \
         WHERE a.attrelid = $1::int8::oid AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum",
    )
    .bind(i64::from(table.oid))
    .fetch_all(connection)
    .await
    .map_err(Error::Postgres)?;
    let mut problems = Vec::new();
    for row in rows {
        let (name, quoted, always, needed): (String, String, bool, bool) =
            (row.get(0), row.get(1), row.get(2), row.get(3));
        let index = table.column(&name);
        let writable = index.is_some_and(|index| table.columns[index].writable);
        // Parts of the key have been told of.
        let needed = needed && !index.is_some_and(|index| table.key.contains(&index));
        let alter = |action: &str| format!("ALTER TABLE {} ALTER COLUMN {quoted} {action}", table.sql_name);
        if writable && always {
            let message = format!("clients cannot set `{name}`: it is GENERATED ALWAYS AS IDENTITY");
            problems.push(Problem::table(&table.name, message).fix(alter("SET GENERATED BY DEFAULT")));
        } else if !writable && needed {
            let message =
                format!("clients may insert, but `{name}` is never null, has no default, and is not in `writable`");
            problems.push(
                Problem::table(&table.name, message)
                    .fix(format!("add it to `writable`, or give it a default: {}", alter("SET DEFAULT …"))),
            );
        }
    }
    Ok(problems)
}

/// A policy of row security that applies to a role.
struct RowPolicy {
    name: String,
    permissive: bool,
    /// `*` for all, `r`, `a`, `w`, `d`.
    command: String,
    role: String,
}

impl RowPolicy {
    fn is_for(&self, role: &str, command: &str) -> bool {
        self.role == role && (self.command == "*" || self.command == command)
    }
}

async fn row_security(connection: &mut PgConnection, table: &Table) -> Result<Vec<Problem>, Error> {
    let names: Vec<String> = SERVICE_ROLES.map(role_name).into();
    let subject: Vec<String> = sqlx::query_scalar(
        "SELECT r.rolname::text FROM pg_roles r, pg_class c WHERE c.oid = $1::int8::oid AND c.relrowsecurity \
         AND r.rolname = ANY ($2) AND NOT r.rolbypassrls AND NOT r.rolsuper ORDER BY 1",
    )
    .bind(i64::from(table.oid))
    .bind(&names)
    .fetch_all(&mut *connection)
    .await
    .map_err(Error::Postgres)?;
    let rows = sqlx::query(
        "SELECT p.polname::text, p.polpermissive, p.polcmd::text, r.rolname::text FROM pg_policy p JOIN pg_roles r ON r.rolname = ANY ($2) \
         WHERE p.polrelid = $1::int8::oid AND (0::oid = ANY (p.polroles) \
           OR EXISTS (SELECT FROM unnest(p.polroles) AS m WHERE m <> 0 AND pg_has_role(r.oid, m, 'USAGE'))) ORDER BY 1, 4",
    )
    .bind(i64::from(table.oid))
    .bind(&names)
    .fetch_all(connection)
    .await
    .map_err(Error::Postgres)?;
    let policy = |row: &sqlx::postgres::PgRow| RowPolicy {
        name: row.get(0),
        permissive: row.get(1),
        command: row.get(2),
        role: row.get(3),
    };
    let policies: Vec<RowPolicy> = rows.iter().map(policy).collect();
    Ok(row_security_problems(table, &subject, &policies))
}

/// What row security hides from roles that are subject to it.
fn row_security_problems(table: &Table, subject: &[String], policies: &[RowPolicy]) -> Vec<Problem> {
    let mut problems = Vec::new();
    for role in subject {
        let permits = |command: &str| policies.iter().any(|policy| policy.permissive && policy.is_for(role, command));
        if *role == role_name(Role::Changes) {
            let writes = operations(table).collect::<Vec<_>>();
            let needed = writes.iter().copied().chain((!writes.is_empty()).then_some(("SELECT", "r")));
            for (verb, _) in needed.filter(|(_, letter)| !permits(letter)) {
                problems.push(
                    Problem::table(&table.name, format!("row security is on, and no policy lets {role} {verb}: clients' changes fail"))
                        .fix(format!("CREATE POLICY … ON {} FOR {verb} TO {role} …; current_setting('millstream.user_id') is the author", table.sql_name)),
                );
            }
            continue;
        }
        if !policies.iter().any(|policy| policy.name == READ_POLICY && policy.is_for(role, "r")) {
            let message = format!("row security is on, and hides rows from {role}: clients would silently lack them");
            problems.push(
                Problem::table(&table.name, message).fix(format!("{SETUP}, which makes the policy {READ_POLICY}")),
            );
        }
        for policy in policies.iter().filter(|policy| !policy.permissive && policy.is_for(role, "r")) {
            let message = format!(
                "the restrictive policy {} hides rows from {role}: clients would silently lack them",
                policy.name
            );
            problems
                .push(Problem::table(&table.name, message).fix("name the roles that it is for: ALTER POLICY … TO …"));
        }
    }
    problems
}
