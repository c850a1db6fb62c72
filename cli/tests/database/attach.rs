//! `millstream attach`: the migration, and that plain SQL keeps clocks true once it has been applied.

use millstream::attach::{Error, Outcome, Policy, attach};
use millstream_schemas::clock::{Clock, Clocks};
use sqlx::{AssertSqlSafe, PgConnection};

use crate::{database, deploy, parse, run, try_run};

const CONFIG: &str = r#"
[tables.notes]
scope = { kind = "user", column = "owner_id" }
writable = ["id", "title", "done"]
"#;

const SCHEMA: &str = r#"
CREATE TABLE notes (id int PRIMARY KEY, owner_id text NOT NULL, title text, done boolean NOT NULL DEFAULT false, size int GENERATED ALWAYS AS (length(title)) STORED);
ALTER TABLE notes REPLICA IDENTITY FULL;
INSERT INTO notes (id, owner_id, title) VALUES (1, 'alice', 'old'), (2, 'alice', 'older');
CREATE SCHEMA "App";
CREATE TABLE "App"."Odd ""na$$me" ("Id" int PRIMARY KEY, "Ti tle" text);
CREATE TABLE parted (id int, region text, title text, PRIMARY KEY (id, region)) PARTITION BY LIST (region);
CREATE TABLE parted_a PARTITION OF parted FOR VALUES IN ('a');
CREATE TABLE parted_b PARTITION OF parted FOR VALUES IN ('b');
CREATE TABLE rows (id int PRIMARY KEY, title text);
CREATE VIEW view AS SELECT * FROM notes;
CREATE TABLE keyless (a int);
CREATE TABLE crm (id int PRIMARY KEY, client_id uuid);
INSERT INTO crm VALUES (1, '0190f3c2-0000-7000-8000-000000000001');
CREATE TABLE stamped (id int PRIMARY KEY, updated_at timestamp);
CREATE ROLE plain;
GRANT SELECT, INSERT, UPDATE ON notes TO plain;
"#;

async fn outcome(connection: &mut PgConnection, tables: &[&str], policy: Option<Policy>) -> Result<Outcome, Error> {
    let tables: Vec<String> = tables.iter().map(|&table| table.to_owned()).collect();
    attach(connection, Some(&parse(CONFIG)), &tables, policy).await
}

/// Attaches, twice, after which there is nothing to do.
async fn attached(connection: &mut PgConnection, tables: &[&str], policy: Option<Policy>) -> String {
    let sql = outcome(connection, tables, policy).await.expect("Postgres does").sql.expect("there is something to do");
    run(connection, &sql).await;
    let again = outcome(connection, tables, policy).await.expect("Postgres does");
    assert_eq!(again.sql, None, "{:?}", again.notes);
    assert!(again.notes.iter().all(|note| note.contains("nothing to do")), "{:?}", again.notes);
    run(connection, &sql).await;
    sql
}

/// The clocks of the row that a condition names.
async fn clocks(connection: &mut PgConnection, from: &str) -> Clocks {
    let sql = AssertSqlSafe(format!("SELECT field_clocks::text FROM {from}"));
    Clocks::parse(&sqlx::query_scalar::<_, String>(sql).fetch_one(connection).await.expect("Postgres does"))
}

async fn row(connection: &mut PgConnection, from: &str) -> String {
    let sql = AssertSqlSafe(format!("SELECT to_jsonb(r)::text FROM {from} AS r"));
    sqlx::query_scalar(sql).fetch_one(connection).await.expect("Postgres does")
}

async fn now_micros(connection: &mut PgConnection) -> u64 {
    let sql = "SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint";
    sqlx::query_scalar::<_, i64>(sql).fetch_one(connection).await.expect("Postgres does").cast_unsigned()
}

/// What holds a clock of a client, `ahead_micros` before the server's time.
async fn by_client(connection: &mut PgConnection, columns: &[&str], ahead_micros: u64) -> (Clock, String) {
    let stamp = now_micros(connection).await + ahead_micros;
    let clock = Clock { stamp, client_id: uuid::Uuid::from_u128(7), seq: 3, index: 1 };
    let fields: Vec<String> = columns.iter().map(|column| format!("\"{column}\": \"{clock}\"")).collect();
    (clock, format!("{{{}}}", fields.join(", ")))
}

#[tokio::test(flavor = "multi_thread")]
async fn plain_sql_keeps_clocks_true() {
    let (_stack, mut connection) = database(SCHEMA, CONFIG).await;
    let pg = &mut connection;
    let sql = attached(pg, &["notes"], None).await;
    for part in ["-- What:", "-- Why:", "-- Undo:", "older than any change", "SET lock_timeout"] {
        assert!(sql.contains(part), "{part} in\n{sql}");
    }

    // Rows from before count as the oldest.
    assert_eq!(clocks(pg, "notes WHERE id = 1").await, Clocks::default());
    let before = now_micros(pg).await;
    run(pg, "UPDATE notes SET title = 'new' WHERE id = 1").await;
    let updated = clocks(pg, "notes WHERE id = 1").await;
    assert!(updated.of("title").stamp >= before && updated.of("title").client_id.is_nil());
    assert_eq!(updated.of("done"), Clock::default());

    // An insert, an upsert that inserts, and COPY's cousin INSERT … SELECT: one clock for the whole row.
    run(pg, "INSERT INTO notes (id, owner_id, title) VALUES (3, 'bob', 'x')").await;
    let inserted = clocks(pg, "notes WHERE id = 3").await;
    assert!(inserted.of("title") == inserted.of("done") && inserted.newest().stamp >= before);

    // A client's clock, up to the bound ahead of us: what plain SQL then changes is newer still, the rest keeps its clock.
    let (ahead, json) = by_client(pg, &["", "title"], 59_000_000).await;
    run(pg, &format!("UPDATE notes SET field_clocks = '{json}' WHERE id = 3")).await;
    assert_eq!(
        clocks(pg, "notes WHERE id = 3").await.of("title"),
        ahead,
        "a statement that sets the clocks is left alone"
    );
    let held = row(pg, "(SELECT id, title, done, field_clocks, client_id FROM notes WHERE id = 3)").await;
    run(pg, "UPDATE notes SET title = title, done = false WHERE id = 3").await;
    let same = row(pg, "(SELECT id, title, done, field_clocks, client_id FROM notes WHERE id = 3)").await;
    assert_eq!(same, held, "an update that changes nothing");
    run(pg, "UPDATE notes SET done = true WHERE id = 3").await;
    let after = clocks(pg, "notes WHERE id = 3").await;
    assert!(after.of("done") > ahead && after.of("done").stamp <= ahead.stamp + 1, "{:?}", after.of("done"));
    assert_eq!((after.of("title"), after.of("owner_id")), (ahead, ahead));
    let stamped: i64 =
        sqlx::query_scalar("SELECT (extract(epoch FROM updated_at) * 1000000)::bigint FROM notes WHERE id = 3")
            .fetch_one(&mut *pg)
            .await
            .unwrap();
    assert_eq!(stamped.cast_unsigned(), after.newest().stamp);

    // An upsert on a row that is there.
    run(pg, "INSERT INTO notes (id, owner_id, title) VALUES (3, 'bob', 'y') ON CONFLICT (id) DO UPDATE SET title = EXCLUDED.title").await;
    let upserted = clocks(pg, "notes WHERE id = 3").await;
    assert!(upserted.of("title") > after.of("done"));
    assert_eq!((upserted.of("done"), upserted.of("owner_id")), (after.of("done"), ahead));

    // An insert that brings its clocks.
    let (clock, json) = by_client(pg, &[""], 0).await;
    run(
        pg,
        &format!(
            "INSERT INTO notes (id, owner_id, field_clocks, client_id) VALUES (4, 'a', '{json}', '{}')",
            clock.client_id
        ),
    )
    .await;
    assert_eq!(clocks(pg, "notes WHERE id = 4").await.newest(), clock);
    assert!(row(pg, "(SELECT client_id FROM notes WHERE id = 4)").await.contains("0007"));

    // Writers need no right on the schema millstream.
    run(pg, "SET ROLE plain").await;
    assert!(try_run(pg, "SELECT millstream.clock(1)").await.is_err());
    run(pg, "INSERT INTO notes (id, owner_id) VALUES (5, 'p'); UPDATE notes SET title = 'by plain' WHERE id = 4").await;
    run(pg, "RESET ROLE").await;
    assert!(clocks(pg, "notes WHERE id = 5").await.newest().stamp >= before);
    assert!(clocks(pg, "notes WHERE id = 4").await.of("title") > clock);
    assert!(row(pg, "(SELECT client_id FROM notes WHERE id = 4)").await.contains("null"));
}

#[tokio::test(flavor = "multi_thread")]
async fn odd_names_partitions_and_rows_are_attached() {
    let (_stack, mut connection) = database(SCHEMA, CONFIG).await;
    let pg = &mut connection;
    attached(pg, &["App.Odd \"na$$me"], None).await;
    run(pg, "INSERT INTO \"App\".\"Odd \"\"na$$me\" VALUES (1, 'x'); UPDATE \"App\".\"Odd \"\"na$$me\" SET \"Ti tle\" = 'y'").await;
    let odd = clocks(pg, "\"App\".\"Odd \"\"na$$me\"").await;
    assert!(odd.of("Ti tle") > odd.of("Id") && odd.of("Id").stamp > 0);

    // A row that moves to another partition keeps its clocks too.
    attached(pg, &["parted"], None).await;
    run(pg, "INSERT INTO parted VALUES (1, 'a', 'x')").await;
    let inserted = clocks(pg, "parted").await;
    run(pg, "UPDATE parted SET region = 'b'").await;
    let moved = clocks(pg, "parted_b").await;
    assert!(moved.of("region") > inserted.newest());
    assert_eq!(moved.of("title"), inserted.newest());

    attached(pg, &["rows"], Some(Policy::Row)).await;
    let updated_at = "SELECT updated_at > clock_timestamp() + interval '59 s' AND client_id IS NULL FROM rows";
    run(pg, "INSERT INTO rows VALUES (1, 'x')").await;
    run(pg, "UPDATE rows SET updated_at = clock_timestamp() + interval '60 s', client_id = gen_random_uuid()").await;
    run(pg, "UPDATE rows SET title = 'y'").await;
    assert!(sqlx::query_scalar::<_, bool>(updated_at).fetch_one(&mut *pg).await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_migration_may_come_before_setup() {
    let (_stack, mut connection) = database(SCHEMA, CONFIG).await;
    let pg = &mut connection;
    let sql = outcome(pg, &["notes"], None).await.unwrap().sql.unwrap();
    run(pg, "DROP SCHEMA millstream CASCADE; DROP PUBLICATION millstream").await;
    run(pg, &sql).await;
    run(pg, "INSERT INTO notes (id, owner_id) VALUES (9, 'a')").await;
    assert_eq!(clocks(pg, "notes WHERE id = 9").await, Clocks::default());
    deploy(pg, CONFIG).await.unwrap();
    assert_eq!(outcome(pg, &["notes"], None).await.unwrap().sql, None);
    run(pg, "UPDATE notes SET title = 'z' WHERE id = 9").await;
    assert!(clocks(pg, "notes WHERE id = 9").await.of("title").stamp > 0);
    // What somebody disabled stays disabled.
    run(pg, "ALTER TABLE notes DISABLE TRIGGER millstream_clocks_update").await;
    deploy(pg, CONFIG).await.unwrap();
    let sql = outcome(pg, &["notes"], None).await.unwrap().sql.expect("a disabled trigger is missing");
    run(pg, &sql).await;
    assert_eq!(outcome(pg, &["notes"], None).await.unwrap().sql, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_that_cannot_be_attached_are_all_named() {
    let (_stack, mut connection) = database(SCHEMA, CONFIG).await;
    let all = ["view", "keyless", "crm", "stamped", "nowhere", "parted_a", "notes"];
    let error = outcome(&mut connection, &all, None).await.unwrap_err().to_string();
    for says in [
        "view: only ordinary and partitioned tables",
        "keyless: it has no primary key",
        "crm: its column `client_id` is in use by the application",
        "stamped: it has a column `updated_at` of type timestamp without time zone",
        "nowhere: there is no such table",
        "parted_a: it is a partition of parted",
    ] {
        assert!(error.contains(says), "{says} in\n{error}");
    }
    assert!(!error.contains("notes:"), "{error}");
}
