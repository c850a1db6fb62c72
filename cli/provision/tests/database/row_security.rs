//! Tables with row security: who reads for clients reads everything, who writes for them is under the app's policies.

use millstream_provision::check::check;
use millstream_provision::setup;
use sqlx::{Connection as _, PgConnection};

use crate::{database, deploy, parse, run};

const SCHEMA: &str = "
CREATE TABLE notes (id int PRIMARY KEY, owner_id text NOT NULL);
ALTER TABLE notes REPLICA IDENTITY FULL;
INSERT INTO notes VALUES (1, 'alice'), (2, 'bob');
ALTER TABLE notes ENABLE ROW LEVEL SECURITY;
";
const CONFIG: &str = "[tables.notes]\nscope = { kind = \"user\", column = \"owner_id\" }\nwritable = [\"id\"]\nwrite.update = \"true\"\n";

async fn seen_by(connection: &mut PgConnection, role: &str) -> i64 {
    run(connection, &format!("SET ROLE {role}; SET millstream.user_id = 'alice'")).await;
    let count =
        sqlx::query_scalar("SELECT count(*) FROM notes").fetch_one(&mut *connection).await.expect("Postgres does");
    run(connection, "RESET ROLE").await;
    count
}

async fn messages(connection: &mut PgConnection, sql: &str) -> Vec<String> {
    let mut transaction = connection.begin().await.expect("Postgres does");
    run(&mut transaction, sql).await;
    let problems = check(&mut transaction, &parse(CONFIG), CONFIG).await.expect("Postgres does").problems;
    transaction.rollback().await.expect("Postgres does");
    problems.into_iter().map(|problem| problem.message).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn row_security_hides_nothing_from_who_reads_for_clients() {
    let (_stack, mut connection) = database(SCHEMA, CONFIG).await;
    let pg = &mut connection;
    for (role, rows) in [("millstream_edge", 2), ("millstream_replication", 2), ("millstream_changes", 0)] {
        assert_eq!(seen_by(pg, role).await, rows, "{role}");
    }
    let found = messages(pg, "").await;
    assert_eq!(found.len(), 2, "{found:?}");
    assert!(found[0].contains("no policy lets millstream_changes UPDATE") && found[1].contains("SELECT"), "{found:?}");

    run(pg, "CREATE POLICY own ON notes USING (owner_id = current_setting('millstream.user_id', true))").await;
    assert_eq!(messages(pg, "").await, [""; 0]);
    assert_eq!(seen_by(pg, "millstream_changes").await, 1);
    assert_eq!(seen_by(pg, "millstream_edge").await, 2);
    let found = messages(pg, "DROP POLICY millstream_read ON notes").await;
    assert!(found.len() == 2 && found[0].contains("hides rows from millstream_edge"), "{found:?}");

    // A policy of ours that somebody changed is put right; one that takes rows away in any case is refused.
    run(pg, "ALTER POLICY millstream_read ON notes TO millstream_edge USING (false)").await;
    deploy(pg, CONFIG).await.unwrap();
    assert_eq!(seen_by(pg, "millstream_replication").await, 2);
    run(pg, "CREATE POLICY less ON notes AS RESTRICTIVE FOR SELECT USING (id = 1)").await;
    assert!(messages(pg, "").await[0].contains("restrictive policy less"));
    let error = deploy(pg, CONFIG).await.unwrap_err();
    assert!(matches!(&error, setup::Error::Restrictive { policy, .. } if policy == "less"), "{error}");
    run(pg, "ALTER POLICY less ON notes TO millstream_changes").await;
    deploy(pg, CONFIG).await.unwrap();
    assert_eq!(seen_by(pg, "millstream_edge").await, 2);
}
