//! The numbered SQL of the schema `millstream`, part of this program.

use sqlx::migrate::{MigrateError, Migrator};
use sqlx::postgres::PgConnection;

static MIGRATIONS: Migrator = sqlx::migrate!("../../migrations");

/// Runs those that the database lacks.
///
/// # Errors
/// Postgres refuses one, or has another one of the same number.
pub async fn run(connection: &mut PgConnection) -> Result<(), MigrateError> {
    let mut migrations = Migrator::with_migrations(MIGRATIONS.iter().cloned().collect());
    migrations.dangerous_set_table_name("millstream.migrations");
    migrations.create_schema("millstream");
    migrations.run_direct(None, connection, false).await
}

/// How many of them the database lacks; `None` if it has no schema `millstream` yet.
///
/// # Errors
/// Postgres cannot be asked.
pub async fn pending(connection: &mut PgConnection) -> Result<Option<usize>, sqlx::Error> {
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
