//! `millstream attach`: writes the migration that lets concurrent changes to an existing table merge. It reads the
//! database and changes nothing there.

mod migration;

use std::fs;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::time::Duration;

use millstream_catalog::{Catalog, Config, ConfigError, Conflict};
use millstream_replication::identity_problems;
use sqlx::{AssertSqlSafe, PgConnection, Row};

pub use self::migration::{Found, FoundColumn, FoundTrigger, Missing, Policy, TRIGGERS, migration, missing, triggers};
use crate::database::{DatabaseArgs, NoDatabase};
use crate::setup;

/// Flags of `millstream attach`.
#[derive(clap::Args, Clone)]
#[command(before_help = "Examples:
  millstream attach                                     all synced tables, the migration on stdout
  millstream attach tasks --output migrations/7_merge_tasks.sql
  millstream attach app.notes --policy row")]
#[command(
    after_help = "The database is only read. Without DATABASE_URL it is that of `millstream dev` in --data. Nothing on stdout means that there is nothing to do."
)]
pub struct Args {
    /// Tables, as millstream.toml names them; all synced ones if none is named
    #[arg(value_name = "TABLE")]
    pub tables: Vec<String>,
    /// How concurrent changes shall meet; by default what the table declares, else by column
    #[arg(long)]
    pub policy: Option<Policy>,
    /// The synced tables; may be missing if tables are named
    #[arg(long, env = "MILLSTREAM_CONFIG", default_value = "millstream.toml")]
    pub config: PathBuf,
    /// Write the migration to this new file instead of stdout
    #[arg(long)]
    pub output: Option<PathBuf>,
    /// The database.
    #[command(flatten)]
    pub database: DatabaseArgs,
}

/// No migration.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Some tables cannot be attached: a line each.
    #[error("cannot attach\n{}", .0.join("\n"))]
    Refused(Vec<String>),
    /// `millstream.toml`.
    #[error("the configuration is not usable")]
    Config(#[source] ConfigError),
    /// Nothing says which database.
    #[error("which database?")]
    NoDatabase(#[source] NoDatabase),
    /// The database cannot be reached.
    #[error("the database")]
    Connect(#[source] setup::Error),
    /// The database cannot be read.
    #[error("cannot read the database's catalog")]
    Postgres(#[source] sqlx::Error),
    /// Replica identities cannot be read.
    #[error("cannot read replica identities")]
    Identity(#[source] Box<millstream_replication::Error>),
    /// The output.
    #[error("cannot write the migration to {path}")]
    Output {
        /// Where.
        path: String,
        /// Why.
        source: io::Error,
    },
}

/// The migration, if there is something to do, and what to tell people beside it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// SQL.
    pub sql: Option<String>,
    /// A line each.
    pub notes: Vec<String>,
}

/// Runs `millstream attach`.
pub async fn run(args: Args) -> Result<(), Error> {
    let config = match Config::read(&args.config) {
        Ok(config) => Some(config),
        Err(ConfigError::Read { source, .. })
            if source.kind() == io::ErrorKind::NotFound && !args.tables.is_empty() =>
        {
            None
        }
        Err(error) => return Err(Error::Config(error)),
    };
    let mut connection = setup::connect(&args.database.find().map_err(Error::NoDatabase)?, Duration::ZERO)
        .await
        .map_err(Error::Connect)?;
    let outcome = attach(&mut connection, config.as_ref(), &args.tables, args.policy).await?;
    for note in &outcome.notes {
        eprintln!("{note}");
    }
    let Some(sql) = outcome.sql else { return Ok(()) };
    match args.output {
        Some(path) => {
            let written = fs::File::create_new(&path).and_then(|mut file| file.write_all(sql.as_bytes()));
            written.map_err(|source| Error::Output { path: path.display().to_string(), source })?;
            eprintln!("wrote {}: apply it as the tables' owner", path.display());
            Ok(())
        }
        None => io::stdout()
            .lock()
            .write_all(sql.as_bytes())
            .map_err(|source| Error::Output { path: "stdout".into(), source }),
    }
}

/// The migration for these tables, or for all synced ones if none is named.
///
/// # Errors
/// A table cannot be attached, or the database cannot be read.
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
                millstream_catalog::CatalogError::Query(source) => Error::Postgres(source),
                other => Error::Refused(vec![other.to_string()]),
            })?;
            identity_problems(connection, &catalog).await.map_err(|error| Error::Identity(Box::new(error)))?
        }
        None => Vec::new(),
    };
    let (mut todo, mut notes, mut refused) = (Vec::new(), Vec::new(), Vec::new());
    for name in names {
        let declared = config.and_then(|config| config.tables.get(name));
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
        let Some(mut found) = find(connection, name).await.map_err(Error::Postgres)? else {
            refused.push(format!("{name}: there is no such table in the database"));
            continue;
        };
        found.writable = declared.map(|table| table.writable.clone()).unwrap_or_default();
        found.identity = identities.iter().filter(|found| found.table == *name).cloned().collect();
        match missing(&found, policy) {
            Ok(missing) if missing.is_empty() => {
                notes.push(format!("{name}: nothing to do, columns and triggers are there"));
                notes.extend(found.identity.iter().map(|found| format!("{name}: {}: {}", found.message, found.fix)));
            }
            Ok(missing) => {
                let parts = [missing.columns, missing.triggers].concat();
                notes.push(format!("{name}: adds {}", parts.join(", ")));
                todo.push((found, policy));
            }
            Err(why) => refused.push(format!("{name}: {why}")),
        }
    }
    if !refused.is_empty() {
        return Err(Error::Refused(refused));
    }
    let todo: Vec<(&Found, Policy)> = todo.iter().map(|(found, policy)| (found, *policy)).collect();
    Ok(Outcome { sql: (!todo.is_empty()).then(|| migration(&todo)), notes })
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
async fn find(connection: &mut PgConnection, name: &str) -> Result<Option<Found>, sqlx::Error> {
    let (schema, relation) = name.split_once('.').unwrap_or(("public", name));
    let row = sqlx::query(
        "SELECT c.oid::int8 AS oid, c.relkind::text AS kind, format('%I.%I', n.nspname, c.relname) AS sql_name,
                EXISTS (SELECT FROM pg_index WHERE indrelid = c.oid AND indisprimary) AS has_key,
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
    let client_id_used = has("client_id") && !has("field_clocks") && {
        let sql = format!("SELECT EXISTS (SELECT FROM {sql_name} WHERE client_id IS NOT NULL)");
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
        "SELECT t.tgname::text AS name, format('%I.%I', n.nspname, p.proname) AS function, t.tgenabled IN ('O', 'A') AS enabled
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
