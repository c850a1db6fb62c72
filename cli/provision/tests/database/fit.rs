//! Tables that cannot be synced as they are: `check` names them with a remedy that works, and `setup` changes nothing meanwhile.

use std::path::Path;

use millstream_catalog::Config;
use millstream_provision::check::{Findings, check};
use millstream_provision::setup;
use millstream_stack::Stack;
use sqlx::{Connection as _, PgConnection};

use crate::{database, deploy, run};

/// Tables by themselves, what is said of each, and a part of the remedy; an SQL remedy is run, and has to help.
const CASES: [(&str, &str, &str, &str); 14] = [
    ("CREATE TABLE t (id int PRIMARY KEY DEFERRABLE, v text)", "is deferrable", "REPLICA IDENTITY FULL", ""),
    (
        "CREATE TABLE t (id int PRIMARY KEY, v text); ALTER TABLE t REPLICA IDENTITY NOTHING",
        "NOTHING",
        "USING INDEX",
        "",
    ),
    ("CREATE TABLE t (id int PRIMARY KEY, org text NOT NULL)", "lacks org", "CREATE UNIQUE INDEX CONCURRENTLY", "org"),
    ("CREATE TABLE t (id int PRIMARY KEY, org text)", "lacks org", "ALTER TABLE t REPLICA IDENTITY FULL", "org"),
    (
        "CREATE TABLE t (id int PRIMARY KEY, org text NOT NULL) PARTITION BY RANGE (id); CREATE TABLE t_1 PARTITION OF t FOR VALUES FROM (0) TO (10); \
         CREATE TABLE \"T 2\" PARTITION OF t FOR VALUES FROM (10) TO (20); ALTER TABLE t REPLICA IDENTITY FULL",
        "lacks org",
        "identity",
        "org",
    ),
    ("CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE child () INHERITS (t)", "child inherits", "NO INHERIT", ""),
    ("CREATE UNLOGGED TABLE t (id int PRIMARY KEY)", "unlogged", "SET LOGGED", ""),
    (
        "CREATE TABLE t (id int PRIMARY KEY) PARTITION BY RANGE (id); CREATE UNLOGGED TABLE t_1 PARTITION OF t FOR VALUES FROM (0) TO (10)",
        "t_1 is unlogged",
        "SET LOGGED",
        "",
    ),
    ("CREATE TABLE t (id double precision PRIMARY KEY)", "double precision", "TYPE numeric", ""),
    ("CREATE TABLE t (id int, r real, PRIMARY KEY (id, r))", "`r` of its key is real", "TYPE numeric", ""),
    (
        "CREATE FOREIGN DATA WRAPPER w; CREATE SERVER s FOREIGN DATA WRAPPER w; CREATE FOREIGN TABLE t (id int) SERVER s",
        "it is a foreign table",
        "",
        "",
    ),
    ("CREATE TABLE t (id int PRIMARY KEY, name text, \"Name\" text)", "differ in case only", "hidden", ""),
    ("CREATE TABLE local_changes (id int PRIMARY KEY)", "reserved", "RENAME", ""),
    (
        "CREATE TABLE t (id int PRIMARY KEY, org text GENERATED ALWAYS AS ('x') STORED)",
        "`org` is a generated column",
        "",
        "org",
    ),
];

fn config(sql: &str, scope: &str) -> String {
    let table = if sql.contains("local_changes") { "local_changes" } else { "t" };
    let scope = match scope {
        "" => "{ kind = \"global\" }".to_owned(),
        column => format!("{{ kind = \"user\", column = \"{column}\" }}"),
    };
    format!("[tables.{table}]\nscope = {scope}\n")
}

async fn findings(connection: &mut PgConnection, text: &str) -> Findings {
    let config = Config::parse(text, Path::new("m.toml")).expect("it is well formed");
    let mut found = check(connection, &config, text).await.expect("Postgres answers");
    // What `setup` is for.
    found.problems.retain(|problem| problem.place.is_some());
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_that_cannot_be_synced_are_named_with_a_remedy_that_works() {
    let stack = Stack::builder().progress(|_| {}).start().await.expect("Postgres starts");
    let mut admin = PgConnection::connect(&stack.postgres_url()).await.expect("it works");
    let url = stack.postgres_url();
    let (server, _) = url.rsplit_once('/').expect("a database");
    for (index, (sql, says, fix, scope)) in CASES.into_iter().enumerate() {
        run(&mut admin, &format!("CREATE DATABASE case_{index}")).await;
        let mut pg = PgConnection::connect(&format!("{server}/case_{index}")).await.expect("it works");
        run(&mut pg, sql).await;
        let config = config(sql, scope);
        let found = findings(&mut pg, &config).await.problems;
        assert!(!found.is_empty(), "{sql}");
        for problem in &found {
            let remedy = problem.fix.clone().unwrap_or_default();
            assert!(problem.message.contains(says) && remedy.contains(fix), "{sql}\n{problem}");
        }
        let refused = deploy(&mut pg, &config).await.expect_err("setup refuses");
        assert!(matches!(refused, setup::Error::Problems(_)), "{sql}: {refused}");
        let made: bool = sqlx::query_scalar("SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname = 'millstream')")
            .fetch_one(&mut pg)
            .await
            .expect("Postgres answers");
        assert!(!made, "{sql}: setup has changed something");
        let remedies: Vec<String> = found.iter().filter_map(|problem| problem.fix.clone()).collect();
        if remedies
            .iter()
            .any(|remedy| remedy.contains("another name") || remedy.contains("hidden") || remedy.contains(", or"))
            || fix.is_empty()
        {
            continue;
        }
        for statement in remedies.iter().flat_map(|remedy| remedy.split(";\n")) {
            run(&mut pg, statement).await;
        }
        assert_eq!(findings(&mut pg, &config).await.problems, [], "{sql}");
        deploy(&mut pg, &config).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wide_tables_types_of_other_schemas_and_indexes() {
    let stack = Stack::builder().progress(|_| {}).start().await.expect("Postgres starts");
    let mut pg = PgConnection::connect(&stack.postgres_url()).await.expect("it works");
    // As many as Postgres takes.
    let columns: Vec<String> = (1..=1_599).map(|n| format!("c{n} int")).collect();
    run(&mut pg, &format!("CREATE TABLE wide (id int PRIMARY KEY, {})", columns.join(", "))).await;
    let wide = "[tables.wide]\nscope = { kind = \"global\" }\n";
    assert_eq!(findings(&mut pg, wide).await.problems, []);
    assert_eq!(findings(&mut pg, &format!("{wide}hidden = [\"c1\"]\n")).await.problems, []);
    let gone = findings(&mut pg, &format!("{wide}hidden = [\"c1\", \"gone\"]\n")).await.problems;
    assert!(gone.len() == 1 && gone[0].message.contains("`hidden` names `gone`"), "{gone:?}");

    run(&mut pg, "CREATE TABLE pair (id int PRIMARY KEY); CREATE TABLE \"Pair\" (id int PRIMARY KEY)").await;
    let pair = "[tables.pair]\nscope = { kind = \"global\" }\n[tables.Pair]\nscope = { kind = \"global\" }\n";
    let alike = findings(&mut pg, pair).await.problems;
    assert!(alike.len() == 1 && alike[0].message.contains("differ in case only"), "{alike:?}");

    run(
        &mut pg,
        "CREATE SCHEMA extensions; CREATE DOMAIN extensions.org AS text; CREATE TYPE extensions.mood AS ENUM ('fine'); \
         CREATE TABLE t (id int PRIMARY KEY, org extensions.org NOT NULL, moods extensions.mood[]); ALTER TABLE t REPLICA IDENTITY FULL",
    )
    .await;
    let config = "[tables.t]\nscope = { kind = \"user\", column = \"org\" }\n";
    let warnings = findings(&mut pg, config).await.warnings;
    assert!(warnings.iter().any(|warning| warning.message.contains("no index begins with `org`")), "{warnings:?}");
    let fix = warnings.iter().find_map(|warning| warning.fix.clone().filter(|_| warning.message.contains("index")));
    run(&mut pg, &fix.expect("a remedy")).await;
    assert!(!findings(&mut pg, config).await.warnings.iter().any(|warning| warning.message.contains("index")));
    deploy(&mut pg, config).await.expect("it works");
    let may = "SELECT has_schema_privilege('millstream_edge', 'extensions', 'USAGE')";
    assert!(sqlx::query_scalar::<_, bool>(may).fetch_one(&mut pg).await.expect("Postgres answers"));
    run(&mut pg, "REVOKE USAGE ON SCHEMA extensions FROM millstream_edge").await;
    let text = check(&mut pg, &Config::parse(config, Path::new("m")).expect("it is well formed"), config).await;
    let problems = text.expect("Postgres answers").problems;
    assert!(
        problems.iter().any(|problem| problem.message.contains("may not use the schema extensions")),
        "{problems:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_that_anybody_may_write_into_the_log_are_warned_of() {
    let config = "[tables.notes]\nscope = { kind = \"global\" }\n";
    let (_stack, mut pg) = database("CREATE TABLE notes (id int PRIMARY KEY)", config).await;
    let warned = async |pg: &mut PgConnection| {
        let found = findings(pg, config).await;
        assert_eq!(found.problems, []);
        found.warnings.into_iter().find(|warning| warning.message.contains("pg_logical_emit_message"))
    };
    assert_eq!(warned(&mut pg).await, None, "setup has revoked it");
    // Postgres 17 has other arguments.
    let each = |what: &str| {
        format!(
            "DO $$ DECLARE f regprocedure; BEGIN FOR f IN SELECT oid FROM pg_proc WHERE proname = 'pg_logical_emit_message' \
             LOOP EXECUTE format('{what}', f); END LOOP; END $$"
        )
    };
    run(&mut pg, &each("GRANT EXECUTE ON FUNCTION %s TO PUBLIC")).await;
    let fix = warned(&mut pg).await.expect("one of them is open").fix.unwrap();
    assert!(fix.contains("REVOKE EXECUTE ON FUNCTION pg_logical_emit_message(boolean,text,bytea"), "{fix}");
    run(&mut pg, &each("REVOKE EXECUTE ON FUNCTION %s FROM PUBLIC")).await;
    assert_eq!(warned(&mut pg).await, None);
}
