//! Subcommands that read or prepare a database, on a real Postgres.

mod attach;
mod brokers;
mod check;
mod fit;
mod owner;
mod poolers;
mod row_security;

use std::path::Path;

use millstream_catalog::Config;
use millstream_provision::names::SERVICE_ROLES;
use millstream_provision::setup;
use millstream_stack::Stack;
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};

/// A private Postgres. Its database is as `millstream setup` leaves it with this schema and configuration.
async fn database(schema: &str, config: &str) -> (Stack, PgConnection) {
    let stack = Stack::builder().progress(|_| {}).start().await.expect("Postgres starts");
    let mut connection = PgConnection::connect(&stack.postgres_url()).await.expect("it works");
    run(&mut connection, schema).await;
    deploy(&mut connection, config).await.expect("it works");
    (stack, connection)
}

async fn deploy(connection: &mut PgConnection, config: &str) -> Result<usize, setup::Error> {
    let passwords = SERVICE_ROLES.map(|role| (role, None));
    setup::database(connection, &parse(config), &passwords).await
}

fn parse(config: &str) -> Config {
    Config::parse(config, Path::new("millstream.toml")).expect("it works")
}

async fn run(connection: &mut PgConnection, sql: &str) {
    try_run(connection, sql).await.unwrap_or_else(|error| panic!("{error}\n{sql}"));
}

async fn try_run(connection: &mut PgConnection, sql: &str) -> Result<(), sqlx::Error> {
    sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(connection).await.map(drop)
}
