//! Writes the migration that lets concurrent changes to an existing table merge. It reads the
//! database and changes nothing there.

mod found;
mod migration;

use millstream_catalog::{Catalog, CatalogError, ClockNames, Config, Conflict, TableConfig, identity_problems};
use sqlx::{AssertSqlSafe, PgConnection, Row};

pub use self::found::{Found, FoundColumn, FoundTrigger, TRIGGERS};
pub use self::migration::{Missing, Policy, migration, missing, rename_taken, triggers};
use crate::exit::{Exit, HasExit};

/// No migration.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Some tables cannot be attached: a line each. The migration of all others is there.
    #[error("cannot attach\n{}", .0.join("\n"))]
    Refused(Vec<String>),
    /// The database cannot be read.
    #[error("cannot read the database's catalog")]
    Postgres(#[source] sqlx::Error),
    /// Replica identities cannot be read.
    #[error("cannot read replica identities")]
    Identity(#[source] Box<millstream_catalog::Unanswered>),
}

impl HasExit for Error {
    fn exit(&self) -> Exit {
        Exit::Failed
    }
}

/// The migration, if there is something to do, and what to tell people beside it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// SQL.
    pub sql: Option<String>,
    /// A line each.
    pub notes: Vec<String>,
    /// Tables that cannot be attached, a line each. The SQL is for all others.
    pub refused: Vec<String>,
    /// Tables whose columns get other names than the file says: the file has to say these.
    pub renamed: Vec<(String, ClockNames)>,
}

/// Whether clients may write the table at all.
fn is_writable(table: &TableConfig) -> bool {
    table.write.insert.is_some() || table.write.update.is_some() || table.write.delete.is_some()
}

/// The migration for these tables, or for all synced ones if none is named.
///
/// # Errors
/// The database cannot be read.
pub async fn attach(
    connection: &mut PgConnection,
    config: Option<&Config>,
    tables: &[String],
    policy: Option<Policy>,
) -> Result<Outcome, Error> {
    let names: Vec<&String> = match config {
        Some(config) if tables.is_empty() => config.tables.keys().collect(),
        _ => tables.iter().collect(),
    };
    let identities = match config {
        Some(config) => {
            let (catalog, _) = Catalog::collect(connection, config).await.map_err(|error| match error {
                CatalogError::Query(source) => Error::Postgres(source),
                other => Error::Refused(vec![other.to_string()]),
            })?;
            identity_problems(connection, &catalog).await.map_err(|error| Error::Identity(Box::new(error)))?
        }
        None => Vec::new(),
    };
    let (mut todo, mut notes, mut refused, mut renamed) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for name in names {
        let declared = config.and_then(|config| config.tables.get(name));
        if tables.is_empty() && declared.is_some_and(|table| !is_writable(table) && table.conflict.is_none()) {
            notes.push(format!("{name}: no client may write it, left as it is"));
            continue;
        }
        let policy = match chosen(declared.and_then(|table| table.conflict), policy) {
            Ok(policy) => policy,
            Err(why) if tables.is_empty() => {
                notes.push(format!("{name}: {why}, left as it is"));
                continue;
            }
            Err(why) => {
                refused.push(format!("{name}: {why}"));
                continue;
            }
        };
        let clocks = declared.map(|table| table.clocks.clone()).unwrap_or_default();
        let Some(mut found) = find(connection, name, clocks).await.map_err(Error::Postgres)? else {
            refused.push(format!("{name}: there is no such table in the database"));
            continue;
        };
        found.writable = declared.map(|table| table.writable.clone()).unwrap_or_default();
        found.identity = identities.iter().filter(|found| found.table == *name).cloned().collect();
        let is_renamed = rename_taken(&mut found, policy);
        let missing = missing(&found, policy);
        if is_renamed && missing.is_ok() {
            renamed.push((name.clone(), found.clocks.clone()));
        }
        match missing {
            Ok(missing) if missing.is_empty() => {
                notes.push(format!("{name}: nothing to do, columns and triggers are there"));
                notes.extend(found.identity.iter().map(|found| format!("{name}: {}: {}", found.message, found.fix)));
            }
            Ok(missing) => {
                let triggers = missing.triggers.into_iter().map(str::to_owned).collect();
                let parts: Vec<String> = [missing.columns, triggers].concat();
                notes.push(format!("{name}: adds {}", parts.join(", ")));
                todo.push((found, policy));
            }
            Err(why) => refused.push(format!("{name}: {why}")),
        }
    }
    let todo: Vec<(&Found, Policy)> = todo.iter().map(|(found, policy)| (found, *policy)).collect();
    Ok(Outcome { sql: (!todo.is_empty()).then(|| migration(&todo)), notes, refused, renamed })
}

/// The policy, given what the file declares and the command line asks for.
fn chosen(declared: Option<Conflict>, asked: Option<Policy>) -> Result<Policy, String> {
    let declared = match declared {
        Some(Conflict::Arrival) => return Err("millstream.toml declares conflict = \"arrival\"".to_owned()),
        Some(Conflict::Column) => Some(Policy::Column),
        Some(Conflict::Row) => Some(Policy::Row),
        None => None,
    };
    match (declared, asked) {
        (Some(declared), Some(asked)) if declared != asked => {
            Err(format!("millstream.toml declares conflict = \"{}\"", declared.name()))
        }
        (declared, asked) => Ok(declared.or(asked).unwrap_or(Policy::Column)),
    }
}

/// What the database has under that name.
async fn find(connection: &mut PgConnection, name: &str, clocks: ClockNames) -> Result<Option<Found>, sqlx::Error> {
    let (schema, relation) = name.split_once('.').unwrap_or(("public", name));
    let row = sqlx::query(
        "SELECT c.oid::int8 AS oid, c.relkind::text AS kind, format('%I.%I', n.nspname, c.relname) AS sql_name,
                EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND (i.indisprimary OR (
                    i.indisunique AND i.indisvalid AND i.indimmediate AND i.indpred IS NULL AND i.indexprs IS NULL
                    AND NOT EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = c.oid AND NOT a.attnotnull
                                    AND a.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1]))))) AS has_key,
                (SELECT inhparent::regclass::text FROM pg_inherits WHERE inhrelid = c.oid AND c.relispartition) AS root
         FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE n.nspname = $1 AND c.relname = $2 AND c.relkind IN ('r', 'p', 'v', 'm', 'f')",
    )
    .bind(schema)
    .bind(relation)
    .fetch_optional(&mut *connection)
    .await?;
    let Some(row) = row else { return Ok(None) };
    let oid: i64 = row.get("oid");
    let columns = sqlx::query(
        "SELECT a.attname::text AS name, format_type(a.atttypid, a.atttypmod) AS type, a.attnotnull, a.attgenerated <> '' AS generated,
                EXISTS (SELECT FROM pg_constraint WHERE conrelid = a.attrelid AND contype = 'f' AND a.attnum = ANY (conkey))
                OR EXISTS (SELECT FROM pg_index WHERE indrelid = a.attrelid AND a.attnum = ANY (indkey)) AS referenced
         FROM pg_attribute a WHERE a.attrelid = $1::int8::oid AND a.attnum > 0 AND NOT a.attisdropped",
    )
    .bind(oid)
    .fetch_all(&mut *connection)
    .await?;
    let columns: Vec<FoundColumn> = columns
        .iter()
        .map(|row| FoundColumn {
            name: row.get("name"),
            sql_type: row.get("type"),
            not_null: row.get("attnotnull"),
            generated: row.get("generated"),
            referenced: row.get("referenced"),
        })
        .collect();
    let sql_name: String = row.get("sql_name");
    let has = |name: &str| columns.iter().any(|column| column.name == name);
    // Where the clocks are not there yet, values of `client_id` are the application's.
    let client_id_used = has(&clocks.client_id) && !has(&clocks.field_clocks) && {
        let column = clocks.client_id.replace('"', "\"\"");
        let sql = format!("SELECT EXISTS (SELECT FROM {sql_name} WHERE \"{column}\" IS NOT NULL)");
        sqlx::query_scalar(AssertSqlSafe(sql)).fetch_one(&mut *connection).await?
    };
    Ok(Some(Found {
        name: name.to_owned(),
        kind: row.get("kind"),
        partition_of: row.get("root"),
        has_key: row.get("has_key"),
        columns,
        triggers: row_triggers(connection, oid).await?,
        client_id_used,
        clocks,
        writable: Vec::new(),
        identity: Vec::new(),
        sql_name,
    }))
}

/// The triggers of a table that fire for each row, before insert or update (bits 1, 2, and 4 or 16 of the type).
///
/// # Errors
/// Postgres cannot be asked.
pub async fn row_triggers(connection: &mut PgConnection, oid: i64) -> Result<Vec<FoundTrigger>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT t.tgname::text AS name, format('%I.%I', n.nspname, p.proname) AS function, t.tgenabled IN ('O', 'A') AS enabled, t.tgargs AS arguments
         FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid JOIN pg_namespace n ON n.oid = p.pronamespace
         WHERE t.tgrelid = $1::int8::oid AND NOT t.tgisinternal AND t.tgtype::int & 3 = 3 AND t.tgtype::int & 20 <> 0
         ORDER BY t.tgname",
    )
    .bind(oid)
    .fetch_all(connection)
    .await?;
    let trigger = |row: &sqlx::postgres::PgRow| FoundTrigger {
        name: row.get("name"),
        function: row.get("function"),
        // Each ends with a zero byte.
        arguments: row
            .get::<Vec<u8>, _>("arguments")
            .split_inclusive(|byte| *byte == 0)
            .map(|text| String::from_utf8_lossy(text.strip_suffix(&[0]).unwrap_or(text)).into_owned())
            .collect(),
        enabled: row.get("enabled"),
    };
    Ok(rows.iter().map(trigger).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_and_the_command_line_must_agree() {
        assert_eq!(chosen(None, None), Ok(Policy::Column));
        assert_eq!(chosen(Some(Conflict::Row), None), Ok(Policy::Row));
        assert_eq!(chosen(None, Some(Policy::Row)), Ok(Policy::Row));
        assert!(chosen(Some(Conflict::Column), Some(Policy::Row)).is_err());
        assert!(chosen(Some(Conflict::Arrival), None).is_err());
    }
}
