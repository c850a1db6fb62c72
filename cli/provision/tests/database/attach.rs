//! `millstream attach`: the migration, and that plain SQL keeps clocks true once it has been applied.

use millstream_provision::attach::{Error, Outcome, Policy, attach};
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
    let clock = Clock { stamp, client_id: uuid::Uuid::from_u128(7), client_seq: 3, index: 1 };
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
    let found = outcome(&mut connection, &all, None).await.unwrap();
    let error = found.refused.join("\n");
    for says in [
        "view: only ordinary and partitioned tables",
        "keyless: it has no primary key",
        "nowhere: there is no such table",
        "parted_a: it is a partition of parted",
    ] {
        assert!(error.contains(says), "{says} in\n{error}");
    }
    assert_eq!(found.refused.len(), 4, "{error}");
    // They refuse no other.
    let sql = found.sql.expect("the rest is attached");
    run(&mut connection, &sql).await;
    let renamed: Vec<&str> = found.renamed.iter().map(|(table, _)| table.as_str()).collect();
    assert_eq!(renamed, ["crm", "stamped"]);
    let all: Vec<&str> = all.into_iter().filter(|table| !error.contains(table)).collect();
    assert_eq!(outcome(&mut connection, &all, None).await.unwrap().sql, None);
}

/// Columns as Rails, Prisma and a CRM have them.
const OWN_COLUMNS: &str = r#"
CREATE TABLE posts (id int PRIMARY KEY, title text, body text, updated_at timestamp(6) NOT NULL, size int GENERATED ALWAYS AS (length(body)) STORED);
CREATE TABLE calls (id int PRIMARY KEY, note text, client_id bigint NOT NULL DEFAULT 5, updated_at text);
CREATE TABLE lookups (id int PRIMARY KEY, title text);
ALTER TABLE posts REPLICA IDENTITY FULL;
ALTER TABLE calls REPLICA IDENTITY FULL;
INSERT INTO posts VALUES (1, 'a', 'b', '2020-01-01');
"#;

#[tokio::test(flavor = "multi_thread")]
async fn columns_of_the_application_keep_their_names_and_values() {
    let own = |posts: &str, calls: &str| {
        format!(
            "[tables.posts]\n{posts}scope = {{ kind = \"global\" }}\nwritable = [\"id\", \"title\", \"updated_at\"]\nwrite.update = \"true\"\n\
             [tables.calls]\n{calls}scope = {{ kind = \"global\" }}\nconflict = \"row\"\n\
             [tables.lookups]\nscope = {{ kind = \"global\" }}\n"
        )
    };
    let before = own("", "").replace("conflict = \"row\"", "");
    let (_stack, mut connection) = database(OWN_COLUMNS, &before).await;
    let pg = &mut connection;
    // Whatever takes a name, Millstream's columns get others.
    let found = attach(pg, Some(&parse(&own("", ""))), &[], None).await.unwrap();
    let renamed: Vec<&str> = found.renamed.iter().map(|(table, _)| table.as_str()).collect();
    assert_eq!((found.refused.len(), renamed), (0, vec!["calls", "posts"]));

    let config = own(
        "clocks = { updated_at = \"changed at\" }\n",
        "clocks = { updated_at = \"millstream_updated_at\", client_id = \"millstream_client_id\" }\n",
    );
    let found = attach(pg, Some(&parse(&config)), &[], None).await.unwrap();
    assert_eq!((found.refused.len(), found.renamed.len()), (0, 0));
    assert!(
        found.notes.iter().any(|note| note == "lookups: no client may write it, left as it is"),
        "{:?}",
        found.notes
    );
    let sql = found.sql.unwrap();
    assert!(!sql.contains("lookups"), "{sql}");
    run(pg, &sql).await;
    deploy(pg, &config).await.unwrap();
    assert_eq!(attach(pg, Some(&parse(&config)), &[], None).await.unwrap().sql, None);

    // Plain SQL keeps the clocks, and the application's column.
    run(pg, "UPDATE posts SET title = 'new' WHERE id = 1").await;
    let held = clocks(pg, "posts").await;
    assert!(held.of("title").stamp > 0 && held.of("body") == Clock::default(), "{held:?}");
    assert_eq!(held.of("changed at"), Clock::default());
    let kept = "(SELECT updated_at, size, \"changed at\" > now() - interval '1 minute' AS newer FROM posts)";
    assert_eq!(row(pg, kept).await, r#"{"size": 1, "newer": true, "updated_at": "2020-01-01T00:00:00"}"#);
    run(pg, "UPDATE posts SET updated_at = now()").await;
    assert!(clocks(pg, "posts").await.of("updated_at") > held.newest());
    run(pg, "INSERT INTO posts VALUES (2, 'x', NULL, now())").await;
    assert!(clocks(pg, "posts WHERE id = 2").await.newest().stamp > 0);

    // By row: newer than what a client set, whatever the session's time zone and way to write dates.
    run(pg, "SET TimeZone = 'Asia/Kolkata'; SET DateStyle = 'German'").await;
    run(pg, "INSERT INTO calls (id, updated_at) VALUES (1, 'mine')").await;
    run(pg, "UPDATE calls SET millstream_updated_at = clock_timestamp() + interval '60 s', millstream_client_id = gen_random_uuid()").await;
    run(pg, "UPDATE calls SET note = 'y'").await;
    let newer = "SELECT millstream_updated_at > clock_timestamp() + interval '59 s' AND millstream_client_id IS NULL AND updated_at = 'mine' AND client_id = 5 FROM calls";
    assert!(sqlx::query_scalar::<_, bool>(newer).fetch_one(&mut *pg).await.unwrap());

    // What triggers write because of a client's change has the clock of that change.
    let clock = Clock {
        stamp: now_micros(pg).await + 90_000_000,
        client_id: uuid::Uuid::from_u128(7),
        client_seq: 3,
        index: 1,
    };
    run(
        pg,
        &format!(
            "SET millstream.clock = '{clock}'; UPDATE posts SET body = 'z' WHERE id = 2; UPDATE calls SET note = 'z'"
        ),
    )
    .await;
    assert_eq!(clocks(pg, "posts WHERE id = 2").await.of("body"), clock);
    let author = "SELECT millstream_client_id = '00000000-0000-0000-0000-000000000007' FROM calls";
    assert!(sqlx::query_scalar::<_, bool>(author).fetch_one(&mut *pg).await.unwrap());
}

/// Keys of tables without a primary key.
const KEYLESS: &str = r#"
CREATE TABLE one (code text NOT NULL, title text);
CREATE UNIQUE INDEX one_code ON one (code) INCLUDE (title);
CREATE UNIQUE INDEX one_maybe ON one (title);
CREATE UNIQUE INDEX one_part ON one (code) WHERE title <> '';
CREATE TABLE two (a int NOT NULL UNIQUE, b int NOT NULL, c int NOT NULL, UNIQUE (b, c));
CREATE TABLE none (a int UNIQUE);
CREATE TABLE child (id int PRIMARY KEY, code text NOT NULL REFERENCES one (code) ON DELETE CASCADE);
ALTER TABLE one ADD CONSTRAINT one_unique UNIQUE (code);
"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_unique_index_over_columns_that_are_never_null_serves_as_key() {
    let table = |name: &str, key: &str| format!("[tables.{name}]\n{key}scope = {{ kind = \"global\" }}\n");
    let (_stack, mut connection) =
        database(&KEYLESS.replace("REFERENCES one (code) ON DELETE CASCADE", ""), &table("child", "")).await;
    let pg = &mut connection;
    run(pg, "ALTER TABLE child ADD FOREIGN KEY (code) REFERENCES one (code) ON DELETE CASCADE").await;
    let key = async |pg: &mut PgConnection, config: String, name: &str| {
        let (catalog, problems) = millstream_catalog::Catalog::collect(pg, &parse(&config)).await.unwrap();
        let table = catalog.table(name).unwrap();
        let key: Vec<String> = table.key.iter().map(|&column| table.columns[column].name.clone()).collect();
        (key, problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"), catalog)
    };
    let (found, problems, catalog) = key(pg, table("one", "") + &table("child", ""), "one").await;
    assert_eq!((found.join(","), problems.as_str()), ("code".to_owned(), ""));
    let references = &catalog.table("child").unwrap().references;
    assert!(references.len() == 1 && references[0].table == "one" && references[0].cascades, "{references:?}");
    for (name, declared, expected, says) in [
        ("two", "", "a", "several unique indexes"),
        ("two", "key = [\"a\"]\n", "a", ""),
        ("two", "key = [\"c\", \"b\"]\n", "b,c", ""),
        ("two", "key = [\"a\", \"b\"]\n", "", "`key` names `a`, `b`"),
        ("none", "", "", "no primary key"),
        ("child", "key = [\"code\"]\n", "", "`key` names `code`"),
    ] {
        let (found, problems, _) = key(pg, table(name, declared), name).await;
        assert_eq!(found.join(","), expected, "{name} {declared}");
        assert!(problems.contains(says) && problems.is_empty() == says.is_empty(), "{problems}");
    }
    let config = table("one", "");
    run(pg, "ALTER TABLE one REPLICA IDENTITY FULL").await;
    deploy(pg, &config).await.unwrap();
    let found = millstream_provision::check::check(pg, &parse(&config), &config).await.unwrap();
    assert_eq!(found.problems, []);
    let says = "it has no primary key: the unique index over (code) serves as its key";
    assert!(found.warnings.iter().any(|warning| warning.message == says), "{:?}", found.warnings);
}
