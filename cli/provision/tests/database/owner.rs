//! `setup` by the owner of the database, who may create roles and is no superuser, as managed hosts have it.

use std::error::Error as _;
use std::path::Path;
use std::str::FromStr as _;

use millstream_catalog::Config;
use millstream_provision::check::check;
use millstream_stack::Stack;
use sqlx::postgres::PgConnectOptions;
use sqlx::{Connection as _, PgConnection};

use crate::{deploy, run};

#[tokio::test(flavor = "multi_thread")]
async fn an_owner_who_is_no_superuser_sets_up() {
    let stack = Stack::builder().progress(|_| {}).start().await.expect("Postgres starts");
    let mut admin = PgConnection::connect(&stack.postgres_url()).await.expect("it works");
    run(&mut admin, "CREATE ROLE host_owner LOGIN CREATEROLE PASSWORD 'owner'").await;
    run(&mut admin, "CREATE DATABASE hosted OWNER host_owner").await;
    let options = PgConnectOptions::from_str(&stack.postgres_url()).expect("it is a URL");
    let options = options.username("host_owner").password("owner").database("hosted");
    let mut owner = PgConnection::connect_with(&options).await.expect("the owner may connect");
    run(&mut owner, "CREATE TABLE tasks (id int PRIMARY KEY, v text)").await;
    let config = "[tables.tasks]\nscope = { kind = \"global\" }\nwritable = [\"v\"]\nwrite.update = \"true\"\n";

    // What only an administrator may do is said, as a statement.
    let refused = deploy(&mut owner, config).await.expect_err("it may not make a role that replicates");
    let said = format!("{refused}: {:?}", refused.source());
    assert!(said.contains("ALTER ROLE millstream_replication REPLICATION: let an administrator run it"), "{said}");
    run(&mut admin, "CREATE ROLE millstream_replication LOGIN REPLICATION").await;
    for time in ["first", "second"] {
        deploy(&mut owner, config).await.unwrap_or_else(|error| panic!("{time}: {error}: {:?}", error.source()));
    }
    let config_read = Config::parse(config, Path::new("m.toml")).expect("it is well formed");
    let found = check(&mut owner, &config_read, config).await.expect("Postgres answers");
    assert_eq!(found.problems, []);
    // What the owner could not take back.
    assert!(found.warnings.iter().any(|warning| warning.message.contains("pg_logical_emit_message")), "{found:?}");
}
