//! The deploy step. Runs the migrations, makes the services' roles with the rights that they need and no more, keeps
//! publication, read policies and triggers in line with `millstream.toml`, and declares the streams. Doing it again changes
//! nothing.

use std::time::{Duration, Instant};

use millstream_catalog::{Catalog, Config};
use millstream_runtime::{nats, postgres};
use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Connection as _, Executor as _};

use crate::exit::{Exit, HasExit};
use crate::grants::{emit_functions, grants, owned_sequences, publication, schemas};
use crate::keys::Role;
use crate::names::{PUBLICATION, READ_POLICY, role_name};
use crate::{attach, check, migrations};

/// Keeps two deployments from changing roles and grants at the same time.
const ADVISORY_LOCK: i64 = 0x6d69_6c6c_7374_7231;
/// How often Postgres is asked again while it is not there.
const RETRY: Duration = Duration::from_millis(250);
/// A lock that the application holds must not let a deployment wait for ever, with all others queueing behind it.
const LOCK_TIMEOUT: &str = "SET lock_timeout = '10s'";

/// The deploy step failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
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
    Check(#[source] Box<check::Error>),
    /// The configuration does not fit the database, or would not do it good.
    #[error("nothing was changed, since this does not fit:\n{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
    Problems(Vec<check::Problem>),
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

impl HasExit for Error {
    fn exit(&self) -> Exit {
        match self {
            Error::Connect(_) | Error::NatsSilent { .. } => Exit::Dependency,
            Error::Catalog(_) | Error::Problems(_) | Error::Restrictive { .. } => Exit::Config,
            Error::Postgres { .. } | Error::Migrations(_) | Error::Check(_) | Error::Nats(_) => Exit::Failed,
        }
    }
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
pub fn is_absence(error: &sqlx::Error) -> bool {
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
    let found = check::before_setup(connection, config).await.map_err(|error| Error::Check(Box::new(error)))?;
    if !found.is_empty() {
        return Err(Error::Problems(found));
    }
    migrations::run(connection).await.map_err(Error::Migrations)?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absence_is_told_from_refusal() {
        assert!(is_absence(&sqlx::Error::Io(std::io::ErrorKind::ConnectionRefused.into())));
        assert!(!is_absence(&sqlx::Error::RowNotFound));
    }
}
