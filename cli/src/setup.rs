//! `millstream setup`: the deploy step. Runs the migrations, makes the services' roles with what they may do and no
//! more, keeps publication, read policies and triggers in line with `millstream.toml`, and declares the streams. Doing it again changes nothing.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use millstream_catalog::{Catalog, Config, Table};
use millstream_runtime::{nats, postgres};
use sqlx::migrate::Migrator;
use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Connection as _, Executor as _};

use crate::attach;
use crate::keys::Role;

/// The publication that replication reads.
pub const PUBLICATION: &str = "millstream";
/// The policy by which edge and replication read every row of a table with row security: who may read is decided by scopes.
pub const READ_POLICY: &str = "millstream_read";
/// The services that have a role in Postgres.
pub const SERVICE_ROLES: [Role; 3] = [Role::Edge, Role::Changes, Role::Replication];
/// Keeps two deployments from changing roles and grants at the same time.
const ADVISORY_LOCK: i64 = 0x6d69_6c6c_7374_7231;
/// How often Postgres is asked again while it is not there.
const RETRY: Duration = Duration::from_millis(250);
/// A lock that the application holds must not let a deployment wait for ever, with all others queueing behind it.
const LOCK_TIMEOUT: &str = "SET lock_timeout = '10s'";

/// The numbered SQL of the schema `millstream`, part of this program.
static MIGRATIONS: Migrator = sqlx::migrate!("../migrations");

/// Flags of `millstream setup`.
#[derive(clap::Args, Clone)]
#[command(
    after_help = "Needs a Postgres user that owns the application's tables and may create roles; needs the NATS \
key `setup.nk` that `millstream keys` makes. Roles get a password only where one is given."
)]
pub struct Args {
    /// The synced tables
    #[arg(long, env = "MILLSTREAM_CONFIG", default_value = "millstream.toml")]
    pub config: PathBuf,
    /// The database, as owner of the tables.
    #[command(flatten)]
    pub postgres: postgres::Args,
    /// The broker.
    #[command(flatten)]
    pub nats: nats::Args,
    /// Limits of the streams.
    #[command(flatten)]
    pub streams: nats::StreamArgs,
    /// Seconds to wait for Postgres and for NATS
    #[arg(long, env = "MILLSTREAM_SETUP_WAIT_S", default_value_t = 60)]
    pub wait: u64,
    /// Passwords of the roles.
    #[command(flatten)]
    pub passwords: Passwords,
}

/// Passwords of the services' Postgres roles, each by the environment or by a file.
#[derive(clap::Args, Clone, Default)]
pub struct Passwords {
    /// Password of millstream_edge: by the environment only
    #[arg(long, env = "MILLSTREAM_EDGE_PASSWORD", hide = true, hide_env_values = true)]
    pub edge_password: Option<String>,
    /// File with the password of millstream_edge (or MILLSTREAM_EDGE_PASSWORD)
    #[arg(long, env = "MILLSTREAM_EDGE_PASSWORD_FILE")]
    pub edge_password_file: Option<PathBuf>,
    /// Password of millstream_changes: by the environment only
    #[arg(long, env = "MILLSTREAM_CHANGES_PASSWORD", hide = true, hide_env_values = true)]
    pub changes_password: Option<String>,
    /// File with the password of millstream_changes (or MILLSTREAM_CHANGES_PASSWORD)
    #[arg(long, env = "MILLSTREAM_CHANGES_PASSWORD_FILE")]
    pub changes_password_file: Option<PathBuf>,
    /// Password of millstream_replication: by the environment only
    #[arg(long, env = "MILLSTREAM_REPLICATION_PASSWORD", hide = true, hide_env_values = true)]
    pub replication_password: Option<String>,
    /// File with the password of millstream_replication (or MILLSTREAM_REPLICATION_PASSWORD)
    #[arg(long, env = "MILLSTREAM_REPLICATION_PASSWORD_FILE")]
    pub replication_password_file: Option<PathBuf>,
}

/// The deploy step failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A password file.
    #[error("cannot read the password file {path}")]
    Password {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Postgres cannot be reached.
    #[error("cannot connect to Postgres")]
    Connect(#[source] sqlx::Error),
    /// Postgres refused a step.
    #[error("Postgres: {action}")]
    Postgres {
        /// Which step.
        action: String,
        /// Why.
        source: sqlx::Error,
    },
    /// The migrations.
    #[error("the migrations failed")]
    Migrations(#[source] sqlx::migrate::MigrateError),
    /// `millstream.toml` itself.
    #[error("the configuration is not usable")]
    Config(#[source] millstream_catalog::ConfigError),
    /// `millstream.toml` against the database.
    #[error("the configuration does not fit the database")]
    Catalog(#[source] millstream_catalog::CatalogError),
    /// Row security would hide rows from the services that read for clients.
    #[error("the restrictive policy {policy} of {table} applies to the roles {edge} and {replication}, so clients would \
silently lack rows: name the roles that it is for (ALTER POLICY … TO …)", edge = role_name(Role::Edge), replication = role_name(Role::Replication))]
    Restrictive {
        /// Quoted.
        table: String,
        /// Its name.
        policy: String,
    },
    /// The database cannot be checked.
    #[error("cannot check the configuration against the database")]
    Check(#[source] Box<crate::check::Error>),
    /// The configuration does not fit the database, or would not do it good.
    #[error("nothing was changed, since this does not fit:\n{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
    Problems(Vec<crate::check::Problem>),
    /// NATS.
    #[error("NATS")]
    Nats(#[source] nats::Error),
    /// NATS does not answer.
    #[error("no answer from NATS at {url} within {seconds} s")]
    NatsSilent {
        /// Where.
        url: String,
        /// How long was waited.
        seconds: u64,
    },
}

impl Error {
    /// Whether something that is not ours was not there, rather than something being wrong.
    pub fn is_dependency(&self) -> bool {
        matches!(self, Error::Connect(_) | Error::NatsSilent { .. })
    }

    /// Whether a configuration is wrong.
    pub fn is_config(&self) -> bool {
        matches!(
            self,
            Error::Config(_)
                | Error::Catalog(_)
                | Error::Problems(_)
                | Error::Password { .. }
                | Error::Restrictive { .. }
        )
    }
}

/// Runs `millstream setup`.
pub async fn run(args: Args) -> Result<(), Error> {
    let config = Config::read(&args.config).map_err(Error::Config)?;
    let wait = Duration::from_secs(args.wait);
    let passwords = [
        (Role::Edge, password(args.passwords.edge_password, args.passwords.edge_password_file)?),
        (Role::Changes, password(args.passwords.changes_password, args.passwords.changes_password_file)?),
        (Role::Replication, password(args.passwords.replication_password, args.passwords.replication_password_file)?),
    ];
    let mut connection = connect(&args.postgres, wait).await?;
    let tables = database(&mut connection, &config, &passwords).await?;
    // The transaction is over; a connection that does not close well loses nothing.
    let _closed = connection.close().await;
    eprintln!("Postgres: schema millstream, roles, publication with {tables} tables");
    streams(&args.nats, &args.streams, wait).await?;
    eprintln!("NATS: streams declared");
    Ok(())
}

fn password(value: Option<String>, file: Option<PathBuf>) -> Result<Option<String>, Error> {
    let value = match file {
        Some(path) => Some(std::fs::read_to_string(&path).map_err(|source| Error::Password { path, source })?),
        None => value,
    };
    Ok(value.map(|value| value.trim().to_owned()).filter(|value| !value.is_empty()))
}

/// Connects, again and again while Postgres is not there.
pub async fn connect(args: &postgres::Args, wait: Duration) -> Result<PgConnection, Error> {
    let options = postgres::options(args, "setup").map_err(Error::Connect)?;
    let deadline = Instant::now() + wait;
    loop {
        match postgres::connect(&options).await {
            Ok(connection) => return Ok(connection),
            Err(error) if Instant::now() >= deadline || !is_absence(&error) => return Err(Error::Connect(error)),
            Err(_) => tokio::time::sleep(RETRY).await,
        }
    }
}

/// Whether the server is not there or still starting, as opposed to refusing us.
pub(crate) fn is_absence(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(_) => true,
        // 57P03: starting up or shutting down; 53300: too many connections.
        sqlx::Error::Database(error) => matches!(error.code().as_deref(), Some("57P03" | "53300")),
        _ => false,
    }
}

/// The Postgres half: migrations, roles, grants, publication. Returns the number of synced tables.
pub async fn database(
    connection: &mut PgConnection,
    config: &Config,
    passwords: &[(Role, Option<String>)],
) -> Result<usize, Error> {
    let found = crate::check::before_setup(connection, config).await.map_err(|error| Error::Check(Box::new(error)))?;
    if !found.is_empty() {
        return Err(Error::Problems(found));
    }
    let mut migrations = Migrator::with_migrations(MIGRATIONS.iter().cloned().collect());
    migrations.dangerous_set_table_name("millstream.migrations");
    migrations.create_schema("millstream");
    migrations.run_direct(None, connection, false).await.map_err(Error::Migrations)?;
    let catalog = Catalog::load(connection, config, None).await.map_err(Error::Catalog)?;

    let failed = |action: &str| {
        let action = action.to_owned();
        move |source| Error::Postgres { action, source }
    };
    connection.execute(LOCK_TIMEOUT).await.map_err(failed("lock timeout"))?;
    let mut transaction = connection.begin().await.map_err(failed("begin"))?;
    sqlx::query("SELECT pg_advisory_xact_lock($1)")
        .bind(ADVISORY_LOCK)
        .execute(&mut *transaction)
        .await
        .map_err(failed("lock"))?;
    for (role, password) in passwords {
        make_role(&mut transaction, *role, password.as_deref()).await?;
    }
    let sequences = owned_sequences(&mut transaction, &catalog).await.map_err(failed("list sequences"))?;
    let functions = emit_functions(&mut transaction).await.map_err(failed("list functions"))?;
    let exists: bool = sqlx::query_scalar("SELECT EXISTS (SELECT FROM pg_publication WHERE pubname = $1)")
        .bind(PUBLICATION)
        .fetch_one(&mut *transaction)
        .await
        .map_err(failed("look for the publication"))?;
    if exists {
        let fresh = unpublished(&mut transaction, &catalog).await.map_err(failed("list published tables"))?;
        if !fresh.is_empty() {
            // What has been written to them is published in no part, and whoever snapshots meanwhile does not see it: there must
            // be none that is still open. Nobody waits long, since new writers queue behind the lock.
            let lock = format!("LOCK TABLE {} IN SHARE ROW EXCLUSIVE MODE", fresh.join(", "));
            transaction.execute(AssertSqlSafe(lock)).await.map_err(failed(
                "wait for transactions that write to newly synced tables; run it again when they have ended",
            ))?;
        }
    }
    let schemas = schemas(&mut transaction, &catalog).await.map_err(failed("list schemas"))?;
    let statements = grants(&catalog.tables, &schemas, &sequences, &functions)
        .into_iter()
        .chain(publication(&catalog.tables, exists));
    let statements = statements
        .chain(read_policies(&mut transaction, &catalog).await?)
        .chain(missing_triggers(&mut transaction, &catalog).await.map_err(failed("list triggers"))?);
    for statement in statements {
        let action = statement.clone();
        transaction.execute(AssertSqlSafe(statement)).await.map_err(|source| Error::Postgres { action, source })?;
    }
    transaction.commit().await.map_err(failed("commit"))?;
    Ok(catalog.tables.len())
}

/// How many of our migrations the database lacks; none if it has no schema `millstream` yet.
///
/// # Errors
/// Postgres cannot be asked.
pub async fn pending_migrations(connection: &mut PgConnection) -> Result<Option<usize>, sqlx::Error> {
    let exists: bool = sqlx::query_scalar("SELECT to_regclass('millstream.migrations') IS NOT NULL")
        .fetch_one(&mut *connection)
        .await?;
    if !exists {
        return Ok(None);
    }
    let done: Vec<i64> =
        sqlx::query_scalar("SELECT version FROM millstream.migrations WHERE success").fetch_all(connection).await?;
    Ok(Some(MIGRATIONS.iter().filter(|migration| !done.contains(&migration.version)).count()))
}

/// Lets edge and replication read every row of tables with row security. The executor is left to the app's own policies.
async fn read_policies(connection: &mut PgConnection, catalog: &Catalog) -> Result<Vec<String>, Error> {
    let failed = |source| Error::Postgres { action: "list policies".to_owned(), source };
    let (edge, replication) = (role_name(Role::Edge), role_name(Role::Replication));
    let mut statements = Vec::new();
    for table in &catalog.tables {
        let secured: bool = sqlx::query_scalar("SELECT relrowsecurity FROM pg_class WHERE oid = $1::int8::oid")
            .bind(i64::from(table.oid))
            .fetch_one(&mut *connection)
            .await
            .map_err(failed)?;
        if !secured {
            continue;
        }
        let restrictive: Option<String> = sqlx::query_scalar(
            "SELECT p.polname::text FROM pg_policy p, pg_roles r WHERE p.polrelid = $1::int8::oid AND NOT p.polpermissive \
             AND p.polcmd IN ('*', 'r') AND r.rolname IN ($2, $3) AND NOT r.rolbypassrls AND NOT r.rolsuper \
             AND (0::oid = ANY (p.polroles) OR EXISTS (SELECT FROM unnest(p.polroles) AS m WHERE m <> 0 AND pg_has_role(r.oid, m, 'USAGE'))) \
             ORDER BY 1 LIMIT 1",
        )
        .bind(i64::from(table.oid))
        .bind(&edge)
        .bind(&replication)
        .fetch_optional(&mut *connection)
        .await
        .map_err(failed)?;
        if let Some(policy) = restrictive {
            return Err(Error::Restrictive { table: table.sql_name.clone(), policy });
        }
        let exists: bool =
            sqlx::query_scalar("SELECT EXISTS (SELECT FROM pg_policy WHERE polrelid = $1::int8::oid AND polname = $2)")
                .bind(i64::from(table.oid))
                .bind(READ_POLICY)
                .fetch_one(&mut *connection)
                .await
                .map_err(failed)?;
        let (verb, kind) = if exists { ("ALTER", "") } else { ("CREATE", " AS PERMISSIVE FOR SELECT") };
        statements.push(format!(
            "{verb} POLICY {READ_POLICY} ON {}{kind} TO {edge}, {replication} USING (true)",
            table.sql_name
        ));
    }
    Ok(statements)
}

/// The triggers that keep clocks where a table has the columns and not yet the triggers: whoever made the columns may
/// have done so before the schema `millstream` was there. What is there, even disabled, is left alone.
async fn missing_triggers(connection: &mut PgConnection, catalog: &Catalog) -> Result<Vec<String>, sqlx::Error> {
    let mut statements = Vec::new();
    for table in &catalog.tables {
        let Some((policy, names)) = attach::Policy::of(table) else { continue };
        let found = attach::row_triggers(connection, i64::from(table.oid)).await?;
        let made = attach::triggers(policy, &table.sql_name, &names);
        for (name, statement) in attach::TRIGGERS.into_iter().zip(made) {
            if !found.iter().any(|trigger| trigger.name == name) {
                statements.push(statement);
            }
        }
    }
    Ok(statements)
}

/// The NATS half: the streams.
pub async fn streams(nats: &nats::Args, streams: &nats::StreamArgs, wait: Duration) -> Result<(), Error> {
    // A refused key shows only as an endless wait.
    let connected = tokio::time::timeout(wait, nats::connect(nats, Role::Setup.name())).await;
    let nats = connected
        .map_err(|_| Error::NatsSilent { url: nats.nats_url.clone(), seconds: wait.as_secs() })?
        .map_err(Error::Nats)?;
    nats::declare_streams(&nats.jetstream, streams).await.map_err(Error::Nats)
}

/// The Postgres role of a service.
pub fn role_name(role: Role) -> String {
    format!("millstream_{}", role.name())
}

async fn make_role(connection: &mut PgConnection, role: Role, password: Option<&str>) -> Result<(), Error> {
    let name = role_name(role);
    let failed = |source| Error::Postgres { action: format!("role {name}"), source };
    let exists: bool = sqlx::query_scalar("SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = $1)")
        .bind(&name)
        .fetch_one(&mut *connection)
        .await
        .map_err(failed)?;
    if !exists {
        connection.execute(AssertSqlSafe(format!("CREATE ROLE {name} LOGIN"))).await.map_err(failed)?;
    }
    let replicates: bool = sqlx::query_scalar("SELECT rolreplication OR rolsuper FROM pg_roles WHERE rolname = $1")
        .bind(&name)
        .fetch_one(&mut *connection)
        .await
        .map_err(failed)?;
    if role == Role::Replication && !replicates {
        // Hosts that make nobody a superuser have their own way, such as a group role.
        let member: bool = sqlx::query_scalar(
            "SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = 'rds_replication' AND pg_has_role($1, oid, 'MEMBER'))",
        )
        .bind(&name)
        .fetch_one(&mut *connection)
        .await
        .map_err(failed)?;
        if !member {
            let statement = format!("ALTER ROLE {name} REPLICATION");
            connection.execute(AssertSqlSafe(statement.clone())).await.map_err(|source| Error::Postgres {
                action: format!("{statement}: let an administrator run it, then run setup again"),
                source,
            })?;
        }
    }
    if let Some(password) = password {
        // The server quotes it: utility statements take no parameters.
        let statement: String = sqlx::query_scalar("SELECT format('ALTER ROLE %I LOGIN PASSWORD %L', $1, $2)")
            .bind(&name)
            .bind(password)
            .fetch_one(&mut *connection)
            .await
            .map_err(failed)?;
        connection.execute(AssertSqlSafe(statement)).await.map_err(failed)?;
    }
    Ok(())
}

/// The sequences behind `serial` columns, quoted: inserting needs the right to use them.
async fn owned_sequences(connection: &mut PgConnection, catalog: &Catalog) -> Result<Vec<String>, sqlx::Error> {
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
pub(crate) async fn schemas(connection: &mut PgConnection, catalog: &Catalog) -> Result<Vec<String>, sqlx::Error> {
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

/// Synced tables that are not published yet, as in SQL.
async fn unpublished(connection: &mut PgConnection, catalog: &Catalog) -> Result<Vec<String>, sqlx::Error> {
    let published: Vec<i64> = sqlx::query_scalar(
        "SELECT r.prrelid::int8 FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid WHERE p.pubname = $1",
    )
    .bind(PUBLICATION)
    .fetch_all(connection)
    .await?;
    let fresh = catalog.tables.iter().filter(|table| !published.contains(&i64::from(table.oid)));
    Ok(fresh.map(|table| table.sql_name.clone()).collect())
}

/// The variants of `pg_logical_emit_message` (17 added an argument), with argument types.
async fn emit_functions(connection: &mut PgConnection) -> Result<Vec<String>, sqlx::Error> {
    sqlx::query_scalar(
        "SELECT oid::regprocedure::text FROM pg_proc WHERE proname = 'pg_logical_emit_message' \
         AND pronamespace = 'pg_catalog'::regnamespace ORDER BY 1",
    )
    .fetch_all(connection)
    .await
}

/// What each service may do.
fn grants(tables: &[Table], schemas: &[String], sequences: &[String], functions: &[String]) -> Vec<String> {
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

fn publication(tables: &[Table], exists: bool) -> Vec<String> {
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

    #[test]
    fn absence_is_told_from_refusal() {
        assert!(is_absence(&sqlx::Error::Io(std::io::ErrorKind::ConnectionRefused.into())));
        assert!(!is_absence(&sqlx::Error::RowNotFound));
    }
}
