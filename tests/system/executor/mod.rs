//! What becomes of single changes: each kind of verdict, with its words, on a real Postgres.

#![expect(clippy::unwrap_used, reason = "tests panic on what must not happen")]

pub mod database;

use database::{Client, Database, change};
use millstream_schemas::Code;
use millstream_schemas::Operation::{Delete, Insert, Update};
use millstream_schemas::stream::{Failure, TransactionResult, Verdict};
use sqlx::{Connection as _, Executor as _};
use uuid::Uuid;

fn failure(results: &[(Uuid, TransactionResult)]) -> &Failure {
    results[0].1.failure.as_ref().unwrap_or_else(|| panic!("{results:?}"))
}

#[track_caller]
fn refused(results: &[(Uuid, TransactionResult)], code: Code, rule: Option<&str>, says: &str) {
    let failure = failure(results);
    assert_eq!((failure.code, failure.rule.as_deref()), (code, rule), "{failure:?}");
    assert!(failure.message.contains(says), "{failure:?}");
}

#[track_caller]
fn is(results: &[(Uuid, TransactionResult)], verdict: Verdict) {
    assert_eq!(results[0].1.verdict, verdict, "{results:?}");
}

const SEED: &str = "\
INSERT INTO members VALUES (1, 'ann');
INSERT INTO projects VALUES (1, 'one'), (2, 'two');
INSERT INTO secure VALUES (1, 'ann', 'x'), (2, 'bob', 'x'), (3, 'bob', 'public')";

fn micros() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_micros() as u64
}

#[tokio::test]
async fn refusals_name_what_refused() {
    let mut database = Database::start().await;
    database.sql.execute(SEED).await.unwrap();
    let mut ann = Client::new(1, "ann");
    let now = micros();
    let task = |set: &[(&'static str, Option<&'static str>)]| {
        let mut all = vec![("project_id", Some("1")), ("title", Some("t"))];
        all.retain(|(name, _)| !set.iter().any(|(other, _)| other == name));
        all.extend(set);
        change("tasks", Insert, &[("id", "1")], &all, now)
    };
    // In the order in which they are looked at.
    for (change, code, rule, says) in [
        (change("tasks", Update, &[("id", "1")], &[("rank", Some("-1"))], 0), Code::EntityMissing, None, "tasks"),
        (change("tasks", Delete, &[("id", "1")], &[], 0), Code::EntityMissing, None, "tasks"),
        (task(&[("project_id", Some("2")), ("rank", Some("-1"))]), Code::PermissionDenied, None, "insert on tasks"),
        (task(&[("rank", Some("-1"))]), Code::BusinessRule, Some("rank_negative"), "A rank is not negative."),
        // Constraints, by their names.
        (
            change("projects", Insert, &[("id", "9")], &[("name", Some("forbidden"))], 0),
            Code::BusinessRule,
            Some("projects_name_check"),
            "projects_name_check",
        ),
        (
            // That is there, and not theirs to update.
            change("projects", Insert, &[("id", "2")], &[("name", Some("p"))], 0),
            Code::BusinessRule,
            Some("projects_pkey"),
            "projects_pkey",
        ),
        (
            change("days", Insert, &[("day", "2026-01-01")], &[("task_id", Some("77"))], 0),
            Code::BusinessRule,
            Some("days_task_id_fkey"),
            "days_task_id_fkey",
        ),
        // Values, by column and type, and without the value.
        (
            task(&[("title", Some("more than twenty characters"))]),
            Code::InvalidValue,
            None,
            "tasks.title is too long for character varying(20)",
        ),
        (task(&[("rank", Some("99999999999"))]), Code::InvalidValue, None, "tasks.rank is out of the range of integer"),
        (task(&[("rank", Some("secret"))]), Code::InvalidValue, None, "tasks.rank is not a valid integer"),
        (
            change("logs", Insert, &[("id", "1")], &[("kind", Some("worse"))], 0),
            Code::InvalidValue,
            None,
            "logs.kind is not a valid kind",
        ),
        (
            change("logs", Insert, &[("id", "1")], &[("at", Some("2026-02-30"))], 0),
            Code::InvalidValue,
            None,
            "logs.at is out of the range of date",
        ),
        (
            change("logs", Insert, &[("id", "1")], &[("at", Some("soon"))], 0),
            Code::InvalidValue,
            None,
            "logs.at is not a valid date",
        ),
        (
            change("logs", Insert, &[("id", "1")], &[("data", Some("{"))], 0),
            Code::InvalidValue,
            None,
            "logs.data is not a valid jsonb",
        ),
        (
            change("logs", Insert, &[("id", "1")], &[("u", Some("1-2"))], 0),
            Code::InvalidValue,
            None,
            "logs.u is not a valid uuid",
        ),
        (
            change("logs", Insert, &[("id", "1")], &[("tags", Some("x"))], 0),
            Code::InvalidValue,
            None,
            "logs.tags is not a valid text[]",
        ),
        (
            change("logs", Update, &[("id", "x")], &[("u", None)], 0),
            Code::InvalidValue,
            None,
            "logs.id is not a valid integer",
        ),
        (
            change("notes", Insert, &[("id", "00000000-0000-0000-0000-000000000001")], &[("n", Some("12345.6"))], 0),
            Code::InvalidValue,
            None,
            "notes.n is out of the range of numeric(6,2)",
        ),
        // Row security: a row that is hidden is not there, one that is seen may not be written.
        (change("secure", Update, &[("id", "2")], &[("body", Some("y"))], 0), Code::EntityMissing, None, "secure"),
        (
            change("secure", Update, &[("id", "3")], &[("body", Some("y"))], 0),
            Code::PermissionDenied,
            None,
            "row security",
        ),
        (
            change("secure", Update, &[("id", "1")], &[("owner", Some("bob"))], 0),
            Code::PermissionDenied,
            None,
            "row-level security",
        ),
        (
            change("secure", Insert, &[("id", "4")], &[("owner", Some("bob")), ("body", Some("y"))], 0),
            Code::PermissionDenied,
            None,
            "row-level security",
        ),
    ] {
        for together in [false, true] {
            let change = millstream_schemas::Change { change_id: Uuid::new_v4(), ..change.clone() };
            let submission = ann.submit(vec![change.clone()]);
            let results =
                if together { database.batch(vec![submission]).await } else { database.each(vec![submission]).await };
            eprintln!("{}", failure(&results).message);
            refused(&results, code, rule, says);
            assert_eq!(failure(&results).change_id, change.change_id);
            assert!(!failure(&results).message.contains("secret"));
        }
    }
    is(&database.each(vec![ann.submit(vec![task(&[("rank", Some("5"))])])]).await, Verdict::Applied);
    // The row that is not there is deleted, where that is accepted.
    let gone = change("notes", Delete, &[("id", "00000000-0000-0000-0000-000000000009")], &[], 0);
    is(&database.each(vec![ann.submit(vec![gone])]).await, Verdict::Applied);
    let history = database.json("SELECT count(*)::text FROM millstream.changes_history").await;
    assert_eq!(history.parse::<u64>().unwrap(), ann.client_seq - 2);
    let rules =
        database.json("SELECT string_agg(DISTINCT rule, ',' ORDER BY rule) FROM millstream.changes_history").await;
    assert_eq!(rules, "days_task_id_fkey,projects_name_check,projects_pkey,rank_negative");
    database.stack.stop().await;
}

/// Times that plain SQL, or a database from before, has set, however far away: a client's change wins all the same.
#[tokio::test]
async fn no_time_of_plain_sql_pins_a_row() {
    let schema = "
        CREATE TABLE whole (id int PRIMARY KEY, v text, updated_at timestamptz NOT NULL DEFAULT now(), client_id uuid);
        CREATE TABLE parts (id int PRIMARY KEY, v text, field_clocks jsonb NOT NULL DEFAULT '{}',
            updated_at timestamptz NOT NULL DEFAULT now(), client_id uuid);
        INSERT INTO whole VALUES (1, 'old', 'infinity'), (2, 'old', '9999-12-31'), (3, 'old', '-infinity'), (4, 'old', now()), (5, 'old', now());
        INSERT INTO parts SELECT id, v, '{}', updated_at FROM whole;";
    let config: String = [("whole", "row"), ("parts", "column")]
        .map(|(table, conflict)| {
            format!(
                "[tables.{table}]\nscope = {{ kind = \"global\" }}\nconflict = \"{conflict}\"\nwritable = [\"v\"]\nwrite.update = \"true\"\n"
            )
        })
        .concat();
    let mut database = Database::with(schema, &config).await;
    let set = |table: &str| {
        format!(
            "UPDATE {table} SET updated_at = 'infinity' WHERE id = 4; UPDATE {table} SET updated_at = '9999-12-31', v = 'x' WHERE id = 5"
        )
    };
    let mut ann = Client::new(1, "ann");
    for table in ["whole", "parts"] {
        sqlx::raw_sql(sqlx::AssertSqlSafe(set(table))).execute(&mut database.sql).await.unwrap();
        for id in ["1", "2", "3", "4", "5"] {
            for v in ["mine", "mine again"] {
                let change = change(table, Update, &[("id", id)], &[("v", Some(v))], micros());
                let results = database.each(vec![ann.submit(vec![change])]).await;
                assert_eq!(results[0].1.verdict, Verdict::Applied, "{table} {id} {v}: {results:?}");
            }
        }
    }
    let rows = "SELECT string_agg(DISTINCT v, ',') FROM (SELECT v FROM whole UNION ALL SELECT v FROM parts) AS rows";
    assert_eq!(database.json(rows).await, "mine again");
    database.stack.stop().await;
}

#[tokio::test]
async fn newer_changes_win() {
    let mut database = Database::start().await;
    database.sql.execute(SEED).await.unwrap();
    let (mut ann, mut bob) = (Client::new(1, "ann"), Client::new(2, "ann"));
    let now = micros();
    let key = [("id", "1")];
    let insert = change("tasks", Insert, &key, &[("project_id", Some("1")), ("title", Some("a"))], now - 900);
    is(&database.each(vec![ann.submit(vec![insert])]).await, Verdict::Applied);
    let update = |set: &[(&str, Option<&str>)], stamp| change("tasks", Update, &key, set, stamp);
    is(&database.batch(vec![ann.submit(vec![update(&[("title", Some("b"))], now - 500)])]).await, Verdict::Applied);
    // Older than the title, newer than the rank.
    let both = update(&[("title", Some("c")), ("rank", Some("3"))], now - 600);
    is(&database.batch(vec![bob.submit(vec![both])]).await, Verdict::Merged);
    is(&database.batch(vec![bob.submit(vec![update(&[("rank", Some("4"))], now - 700)])]).await, Verdict::Superseded);
    // Rules come before.
    let wrong = update(&[("rank", Some("-4"))], now - 700);
    refused(&database.batch(vec![bob.submit(vec![wrong])]).await, Code::BusinessRule, Some("rank_negative"), "");
    is(
        &database.batch(vec![bob.submit(vec![change("tasks", Delete, &key, &[], now - 550)])]).await,
        Verdict::Superseded,
    );
    let row =
        "SELECT concat_ws(' ', title, rank, client_id, (extract(epoch FROM updated_at) * 1000000)::bigint) FROM tasks";
    assert_eq!(database.json(row).await, format!("b 3 {} {}", ann.id, now - 500));
    // What lost is known when it is asked for again, and rides in the ledger.
    let mut again = Client::new(2, "ann");
    let again: Vec<_> = (0..4).map(|_| again.submit(vec![update(&[("rank", Some("9"))], now)])).collect();
    let known: Vec<_> = database.batch(again).await.into_iter().map(|(_, result)| result.verdict).collect();
    assert_eq!(known, [Verdict::Merged, Verdict::Superseded, Verdict::Rejected, Verdict::Superseded]);
    let lost = database
        .json(
            "SELECT string_agg((l->>'client_seq') || (l->>'verdict'), ',' ORDER BY (l->>'client_seq')::int) FROM millstream.clients, jsonb_array_elements(lost) l",
        )
        .await;
    assert_eq!(lost, "1merged,2superseded,4superseded");
    // A plain writer is newer than all before it.
    database.sql.execute("UPDATE tasks SET rank = 7").await.unwrap();
    is(&database.batch(vec![ann.submit(vec![update(&[("rank", Some("8"))], now - 1)])]).await, Verdict::Superseded);
    // A clock that is ahead is taken for a minute ahead, by the database's time.
    let year = 365 * 24 * 3_600 * 1_000_000;
    is(&database.batch(vec![ann.submit(vec![update(&[("rank", Some("8"))], now + year)])]).await, Verdict::Applied);
    let stamp = database.json("SELECT left(field_clocks->>'rank', 16) FROM tasks").await.parse::<u64>().unwrap();
    assert!(stamp > now + 50_000_000 && stamp < now + 120_000_000, "{stamp} {now}");
    is(&database.batch(vec![ann.submit(vec![change("tasks", Delete, &key, &[], u64::MAX)])]).await, Verdict::Applied);

    // By row: what is older loses as a whole.
    let key = [("id", "00000000-0000-0000-0000-000000000001")];
    let note = |op, body: Option<&str>, stamp| {
        let set: &[_] = if op == Delete { &[] } else { &[("body", body)] };
        change("notes", op, &key, set, stamp)
    };
    for (op, body, stamp, verdict) in [
        (Insert, Some("a"), now - 500, Verdict::Applied),
        (Update, Some("b"), now - 600, Verdict::Superseded),
        (Delete, None, now - 600, Verdict::Superseded),
        (Update, Some("c"), now - 400, Verdict::Applied),
        (Delete, None, now - 300, Verdict::Applied),
    ] {
        is(&database.batch(vec![bob.submit(vec![note(op, body, stamp)])]).await, verdict);
    }
    database.stack.stop().await;
}

#[tokio::test]
async fn copies_and_successors_are_told_apart() {
    let mut database = Database::start().await;
    database.sql.execute(SEED).await.unwrap();
    let note = |id: &str| change("notes", Insert, &[("id", id)], &[("body", Some("x"))], 1);
    let ids: Vec<String> = (1..20).map(|n| Uuid::from_u128(n).to_string()).collect();
    let mut store = Client::new(1, "ann");
    let first = store.submit(vec![note(&ids[0])]);
    is(&database.batch(vec![first]).await, Verdict::Applied);
    // A copy made before the next run of the original wrote.
    let mut copy = Client { run_id: Uuid::from_u128(77), ..Client::new(1, "ann") };
    copy.client_seq = 1;
    let previous = store.run_id;
    store.run_id = Uuid::from_u128(66);
    let mut second = store.submit(vec![note(&ids[1])]);
    second.previous = Some(previous);
    is(&database.batch(vec![second]).await, Verdict::Applied);
    copy.client_seq = 2;
    let mut foreign = copy.submit(vec![note(&ids[2])]);
    foreign.previous = Some(previous);
    assert_eq!(database.batch(vec![foreign]).await, []);
    let spans = database.json("SELECT string_agg(first_seq || ':' || right(instance::text, 3), ',' ORDER BY first_seq) FROM millstream.instances").await;
    assert_eq!(spans, format!("1:{},2:{}", &previous.to_string()[33..], "042"));

    // What follows a rejected transaction is refused, in the same batch, in a later one, and after that.
    let mut client = Client::new(5, "ann");
    let bad = client.submit(vec![change("notes", Update, &[("id", &ids[9])], &[("body", Some("y"))], 1)]);
    let mut next = client.submit(vec![note(&ids[3])]);
    next.after = vec![bad.client_seq];
    let other = client.submit(vec![note(&ids[4])]);
    let results = database.batch(vec![bad, next.clone(), other]).await;
    let codes: Vec<_> = results.iter().map(|(_, result)| result.failure.as_ref().map(|f| f.code)).collect();
    assert_eq!(codes, [Some(Code::EntityMissing), Some(Code::PredecessorFailed), None]);
    let mut last = client.submit(vec![note(&ids[5])]);
    last.after = vec![next.client_seq];
    refused(&database.batch(vec![last]).await, Code::PredecessorFailed, None, "client_seq 2");
    assert_eq!(database.json("SELECT count(*)::text FROM notes").await, "3");
    database.stack.stop().await;
}

/// Whether the executor's last statement was a whole batch.
const AT_ONCE: &str = "SELECT bool_or(query LIKE '/* millstream at once */%')::text FROM pg_stat_activity WHERE application_name = 'millstream-test'";

#[tokio::test]
async fn a_batch_at_once_is_not_misled_by_what_it_remembers() {
    let mut database = Database::start().await;
    database.sql.execute(SEED).await.unwrap();
    let mut ann = Client::new(1, "ann");
    let now = micros();
    let key = [("id", "1")];
    let rank = |rank: &'static str, stamp| change("tasks", Update, &key, &[("rank", Some(rank))], stamp);
    let insert = change("tasks", Insert, &key, &[("project_id", Some("1")), ("title", Some("a"))], now);
    is(&database.batch(vec![ann.submit(vec![insert])]).await, Verdict::Applied);
    for _ in 0..2 {
        is(&database.batch(vec![ann.submit(vec![rank("1", now)])]).await, Verdict::Applied);
    }
    assert_eq!(database.json(AT_ONCE).await, "true");
    // What it does not remember: another worker took the next one.
    let mut another = database.another().await;
    let taken = ann.submit(vec![rank("2", now + 1)]);
    is(&another.execute(vec![taken.clone()], false).await.unwrap(), Verdict::Applied);
    let again = millstream_schemas::stream::Submission { changes: vec![rank("3", now + 2)], ..taken };
    is(&database.batch(vec![again]).await, Verdict::Applied);
    let row = "SELECT rank::text FROM tasks";
    assert_eq!(database.json(row).await, "2");
    is(&database.batch(vec![ann.submit(vec![rank("4", now + 3)])]).await, Verdict::Applied);
    assert_eq!((database.json(AT_ONCE).await.as_str(), database.json(row).await.as_str()), ("true", "4"));
    // What loses, wholly or in part, or may not be, is no less told.
    let both = |stamp| change("tasks", Update, &key, &[("title", Some("b")), ("rank", Some("0"))], stamp);
    for (stamp, verdict) in [(now + 3, Verdict::Applied), (now + 3, Verdict::Applied), (now + 4, Verdict::Applied)] {
        is(&database.batch(vec![ann.submit(vec![both(stamp)])]).await, verdict);
    }
    is(&database.batch(vec![ann.submit(vec![rank("5", now + 6)])]).await, Verdict::Applied);
    assert_eq!(database.json(AT_ONCE).await, "true");
    is(&database.batch(vec![ann.submit(vec![both(now + 5)])]).await, Verdict::Merged);
    assert_eq!(database.json(row).await, "5");
    is(&database.batch(vec![ann.submit(vec![rank("5", now)])]).await, Verdict::Superseded);
    refused(
        &database.batch(vec![ann.submit(vec![rank("-5", now + 7)])]).await,
        Code::BusinessRule,
        Some("rank_negative"),
        "",
    );
    assert_eq!(database.json(AT_ONCE).await, "false");
    for _ in 0..10 {
        is(&database.batch(vec![ann.submit(vec![rank("6", now + 7)])]).await, Verdict::Applied);
    }
    assert_eq!(database.json(AT_ONCE).await, "true");
    // Its backend ends; the same batch is applied by the next one.
    let end = "SELECT count(pg_terminate_backend(pid))::text FROM pg_stat_activity WHERE application_name = 'millstream-test'";
    database.json(end).await;
    is(&database.batch(vec![ann.submit(vec![rank("7", now + 8)])]).await, Verdict::Applied);
    assert_eq!(database.json(row).await, "7");
    for _ in 0..10 {
        is(&database.batch(vec![ann.submit(vec![rank("8", now + 9)])]).await, Verdict::Applied);
    }
    assert_eq!(database.json(AT_ONCE).await, "true");
    // The partition is somebody else's.
    database.sql.execute("UPDATE millstream.partitions SET epoch = epoch + 1").await.unwrap();
    let lost = database.direct.execute(vec![ann.submit(vec![rank("9", now + 10)])], false).await;
    assert!(lost.is_err(), "{lost:?}");
    assert_eq!(database.json(row).await, "8");
    let ledger = database.json("SELECT last_seq::text FROM millstream.clients").await;
    assert_eq!(ledger, (ann.client_seq - 1).to_string());
    database.stack.stop().await;
}

#[tokio::test]
async fn rows_that_exclude_each_other_keep_their_order_whatever_an_error_quotes() {
    let mut database = Database::start().await;
    database.sql.execute(SEED).await.unwrap();
    let mut ann = Client::new(1, "ann");
    let now = micros();
    let insert = |id: &'static str, code: Option<&'static str>| {
        let set = [("project_id", Some("1")), ("title", Some("a")), ("code", code)];
        change("tasks", Insert, &[("id", id)], &set, now)
    };
    let rank = |rank: &'static str| change("tasks", Update, &[("id", "1")], &[("rank", Some(rank))], now);
    is(&database.batch(vec![ann.submit(vec![insert("1", None)])]).await, Verdict::Applied);
    // Postgres quotes the second one's value in the first one's words.
    for (first, second) in [("2", "3"), ("4", "5"), ("6", "7")] {
        database.sql.execute("UPDATE tasks SET code = NULL").await.unwrap();
        let batch = [rank(first), insert(first, Some("7")), insert(second, Some("07"))];
        let results = database.batch(batch.into_iter().map(|change| ann.submit(vec![change])).collect()).await;
        let verdicts: Vec<Verdict> = results.iter().map(|(_, result)| result.verdict).collect();
        assert_eq!(verdicts, [Verdict::Applied, Verdict::Applied, Verdict::Rejected], "{first}");
    }
    assert_eq!(database.json("SELECT string_agg(id::text, ',' ORDER BY id) FROM tasks").await, "1,2,4,6");
    database.stack.stop().await;
}

#[tokio::test]
async fn what_depends_on_each_other_keeps_its_order_in_every_batch() {
    let mut database = Database::start().await;
    database.sql.execute(SEED).await.unwrap();
    database.sql.execute("INSERT INTO tasks (id, project_id, title) VALUES (1, 1, 'a')").await.unwrap();
    // A rule may read what is not synced by itself.
    database.sql.execute("GRANT SELECT ON parted_low TO millstream_changes").await.unwrap();
    let mut ann = Client::new(1, "ann");
    let now = micros();
    let rank = |rank: &'static str| change("tasks", Update, &[("id", "1")], &[("rank", Some(rank))], now);
    let delete = |table: &'static str, id: &'static str| change(table, Delete, &[("id", id)], &[], now);
    let insert = |table: &'static str, id: &'static str, part: &'static str| {
        change(table, Insert, &[("id", id)], &[("part", Some(part))], now)
    };
    let part = |id: &'static str| change("parted", Insert, &[("id", id)], &[], now);
    let (yes, no) = (Verdict::Applied, Verdict::Rejected);
    // Several times, since what is seen again is written in another way.
    for round in 0..3 {
        // Somebody's letters go with them, and then nothing keeps those who received them.
        database
            .sql
            .execute(
                "DELETE FROM letters; DELETE FROM people; DELETE FROM pieces; DELETE FROM spots; DELETE FROM parted; \
                 INSERT INTO people VALUES (1), (2); INSERT INTO letters VALUES (1, 1, 2); INSERT INTO parted VALUES (1), (2)",
            )
            .await
            .unwrap();
        for (batch, expected) in [
            (vec![delete("people", "2"), delete("people", "1"), rank("1")], vec![no, yes, yes]),
            (vec![delete("parted", "1"), insert("pieces", "1", "2"), delete("parted", "2")], vec![yes, yes, no]),
            (vec![part("3"), insert("spots", "1", "3"), insert("spots", "2", "4")], vec![yes, no, yes]),
            (vec![part("5"), insert("spots", "3", "5")], vec![yes, no]),
        ] {
            let results = database.batch(batch.into_iter().map(|change| ann.submit(vec![change])).collect()).await;
            let verdicts: Vec<Verdict> = results.iter().map(|(_, result)| result.verdict).collect();
            assert_eq!(verdicts, expected, "{round}: {results:?}");
        }
    }
    assert_eq!(database.json("SELECT string_agg(id::text, ',') FROM people").await, "2");
    database.stack.stop().await;
}

/// Refuses everything, at length.
const LENGTHY: &str = "\
CREATE FUNCTION lengthy() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION '%', repeat('no ', 160); END $$;
CREATE TRIGGER lengthy BEFORE INSERT ON people FOR EACH ROW EXECUTE FUNCTION lengthy()";

#[tokio::test]
async fn what_a_batch_tells_its_clients_fits_into_a_header() {
    let mut database = Database::start().await;
    database.sql.execute(LENGTHY).await.unwrap();
    let slot = "SELECT pg_create_logical_replication_slot('told', 'pgoutput')::text";
    database.json(slot).await;
    let insert = || change("people", Insert, &[("id", "1")], &[], micros());
    let batch: Vec<_> = (1..=100).map(|id| Client::new(id, "ann").submit(vec![insert()])).collect();
    let results = database.batch(batch).await;
    assert_eq!(results.iter().filter(|(_, result)| result.failure.is_some()).count(), 100);
    let told = "SELECT concat_ws(' ', count(*) FILTER (WHERE octet_length(data) > 1000) > 1, max(octet_length(data)) < 45000, \
                sum(octet_length(data)) > 50000) FROM pg_logical_slot_get_binary_changes('told', NULL, NULL, \
                'proto_version', '1', 'publication_names', 'millstream', 'messages', 'true')";
    assert_eq!(database.json(told).await, "t t t");
    database.json("SELECT pg_drop_replication_slot('told')::text").await;
    database.stack.stop().await;
}

/// Fails in ways that nobody understands: the backend crashes at once or at COMMIT, and Postgres with it, or an error is none that a change can be
/// blamed for. In the schema `millstream`, so that the executor takes the trigger for one of its own and the table for a
/// plain one.
const POISON: &str = "\
CREATE FUNCTION millstream.poison() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    IF NEW.title IN ('kills', 'ends') THEN
        COPY (SELECT) TO PROGRAM 'kill -9 $PPID';
        PERFORM pg_sleep(5);
    END IF;
    -- There is no such configuration, and Postgres takes that for a fault of its own.
    PERFORM to_tsvector(0::oid::regconfig, 'x');
END $$;
CREATE TRIGGER poison BEFORE UPDATE ON tasks FOR EACH ROW WHEN (NEW.title IN ('kills', 'fails'))
EXECUTE FUNCTION millstream.poison();
CREATE CONSTRAINT TRIGGER poison_late AFTER UPDATE ON tasks DEFERRABLE INITIALLY IMMEDIATE FOR EACH ROW
WHEN (NEW.title = 'ends') EXECUTE FUNCTION millstream.poison();
CREATE FUNCTION millstream.late() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    SET CONSTRAINTS poison_late DEFERRED;
    RETURN NEW;
END $$;
CREATE TRIGGER late BEFORE UPDATE ON tasks FOR EACH ROW EXECUTE FUNCTION millstream.late();
INSERT INTO tasks (id, project_id, title) SELECT n, 1, 'a' FROM generate_series(1, 9) AS n";

#[tokio::test]
async fn poison_is_given_up_and_spoils_nothing_else() {
    let mut database = Database::start().await;
    database.sql.execute(SEED).await.unwrap();
    database.sql.execute(POISON).await.unwrap();
    let mut clients: Vec<Client> = (1..=3).map(|id| Client::new(id, "ann")).collect();
    let now = micros() + 1_000_000;
    let titles = |bad: &'static str| ["b", "c", "d", "e", bad, "f", "g", "h", "i"];
    for (round, bad) in ["c", "c", "fails", "c", "kills", "c", "ends", "c"].into_iter().enumerate() {
        let changes = ["1", "2", "3", "4", "5", "6", "7", "8", "9"]
            .into_iter()
            .zip(titles(bad))
            .map(|(id, title)| change("tasks", Update, &[("id", id)], &[("title", Some(title))], now + round as u64));
        let batch = changes.enumerate().map(|(n, change)| clients[n % 3].submit(vec![change])).collect();
        let began = std::time::Instant::now();
        let results = database.batch(batch).await;
        assert_eq!(results.len(), 9, "{results:?}");
        let rejected: Vec<_> = results.iter().filter_map(|(_, result)| result.failure.as_ref()).collect();
        match bad {
            "c" => assert!(rejected.is_empty(), "{rejected:?}"),
            _ => {
                assert_eq!(rejected.iter().map(|failure| failure.code).collect::<Vec<_>>(), [Code::Internal]);
                assert!(rejected[0].message.contains("5 times"), "{rejected:?}");
                // Five tries, with pauses that double; and perhaps Postgres recovers before each.
                assert!(began.elapsed() < std::time::Duration::from_secs(60), "{:?}", began.elapsed());
                eprintln!("{bad}: {:?}", began.elapsed());
            }
        }
        let applied = results.iter().filter(|(_, result)| result.verdict == Verdict::Applied).count();
        assert_eq!(applied + rejected.len(), 9, "{results:?}");
    }
    // It went with the crash.
    database.sql = sqlx::PgConnection::connect(&database.stack.postgres_url()).await.unwrap();
    let recorded = "SELECT string_agg(concat_ws(' ', code, substring(payload::text FROM 'fails|kills|ends')), ',' ORDER BY at) FROM millstream.changes_history";
    assert_eq!(database.json(recorded).await, "internal fails,internal kills,internal ends");
    database.stack.stop().await;
}

/// Two people add the same row: the second one updates it, by the rules for updates and of clocks; what says no more than that the
/// row is there is content. Alone, in a batch, and within a transaction.
#[tokio::test]
async fn the_insert_of_a_row_that_is_there_updates_it() {
    const TABLES: &str = "
        CREATE TABLE habits (
            id text PRIMARY KEY, owner text NOT NULL, n int, note text, code text UNIQUE, field_clocks jsonb NOT NULL DEFAULT '{}',
            updated_at timestamptz NOT NULL DEFAULT now(), client_id uuid);
        CREATE TABLE tags (a text, b text, PRIMARY KEY (a, b));
        CREATE TABLE strict (id text PRIMARY KEY, n int);
        CREATE TABLE once (id text PRIMARY KEY, n int);
        INSERT INTO strict VALUES ('1', 1);
        INSERT INTO once VALUES ('1', 1);";
    let mut config =
        "[tables.habits]\nscope = { kind = \"global\" }\nwritable = [\"id\", \"owner\", \"n\", \"note\", \"code\"]\n\
        write.insert = \"true\"\nwrite.update = \"old.owner IN (auth.user_id, 'all')\"\n\
        rules = [{ code = \"negative\", message = \"m\", on = [\"update\"], check = \"new.n >= 0\" }]\n"
            .to_owned();
    config += "[tables.tags]\nscope = { kind = \"global\" }\nwritable = [\"a\", \"b\"]\nwrite.insert = \"true\"\n";
    config += "[tables.strict]\nscope = { kind = \"global\" }\nwritable = [\"id\", \"n\"]\ninsert_existing = \"reject\"\n\
        write.insert = \"true\"\nwrite.update = \"true\"\n";
    config += "[tables.once]\nscope = { kind = \"global\" }\nwritable = [\"id\", \"n\"]\nwrite.insert = \"true\"\n";
    let mut database = Database::with(TABLES, &config).await;
    let now = micros();
    let habit = |id: &str, set: &[(&str, Option<&str>)], stamp| change("habits", Insert, &[("id", id)], set, stamp);
    for (run, mode) in ["alone", "batch", "transaction"].into_iter().enumerate() {
        let (mut ann, mut bob) = (Client::new(100 + run as u128, "ann"), Client::new(200 + run as u128, "bob"));
        let id = |n: usize| format!("{run}-{n}");
        let all = [("owner", Some("all")), ("n", Some("1")), ("note", Some("first"))];
        let first = (0..6).map(|n| habit(&id(n), &all, now)).collect();
        is(&database.each(vec![ann.submit(first)]).await, Verdict::Applied);
        is(
            &database.each(vec![ann.submit(vec![habit(&id(6), &[("owner", Some("ann"))], now)])]).await,
            Verdict::Applied,
        );
        let tag = || change("tags", Insert, &[("a", &id(0)), ("b", "x")], &[], now);
        is(&database.each(vec![ann.submit(vec![tag()])]).await, Verdict::Applied);
        let cases: Vec<(_, Result<Verdict, (Code, &str)>)> = vec![
            (habit(&id(0), &[all[0], ("n", Some("2"))], now + 10), Ok(Verdict::Applied)),
            (habit(&id(1), &[all[0], ("n", Some("2"))], now - 10), Ok(Verdict::Superseded)),
            (tag(), Ok(Verdict::Applied)),
            // Somebody else's.
            (habit(&id(6), &[all[0], ("n", Some("2"))], now + 10), Err((Code::BusinessRule, "habits_pkey"))),
            // Rules and constraints of an update.
            (habit(&id(2), &[all[0], ("n", Some("-2"))], now + 10), Err((Code::BusinessRule, "negative"))),
            (habit(&id(3), &[all[0], ("code", Some("c"))], now + 10), Ok(Verdict::Applied)),
            (habit(&id(4), &[all[0], ("code", Some("c"))], now + 10), Err((Code::BusinessRule, "habits_code_key"))),
            (
                change("strict", Insert, &[("id", "1")], &[("n", Some("2"))], now),
                Err((Code::BusinessRule, "strict_pkey")),
            ),
            // Nobody may update it.
            (change("once", Insert, &[("id", "1")], &[("n", Some("2"))], now), Err((Code::BusinessRule, "once_pkey"))),
            // A new row; then the same one again.
            (habit(&id(9), &[("owner", Some("all")), ("n", Some("1"))], now), Ok(Verdict::Applied)),
            (habit(&id(9), &[all[0], ("n", Some("3"))], now + 1), Ok(Verdict::Applied)),
        ];
        database.sql.execute("UPDATE habits SET code = NULL").await.unwrap();
        database
            .sql
            .execute(sqlx::AssertSqlSafe(format!(
                "UPDATE habits SET field_clocks = jsonb_build_object('', millstream.clock({now}))"
            )))
            .await
            .unwrap();
        let submissions: Vec<_> = cases
            .iter()
            .map(|(change, _)| {
                let change = millstream_schemas::Change { change_id: Uuid::new_v4(), ..change.clone() };
                let other = habit(&format!("{}-extra", change.change_id), &[("owner", Some("all"))], now);
                bob.submit(if mode == "transaction" { vec![other, change] } else { vec![change] })
            })
            .collect();
        let results =
            if mode == "batch" { database.batch(submissions).await } else { database.each(submissions).await };
        assert_eq!(results.len(), cases.len());
        for ((_, result), (change, expected)) in results.iter().zip(&cases) {
            let found = match &result.failure {
                Some(failure) => Err((failure.code, failure.rule.as_deref().unwrap_or_default())),
                None => Ok(result.verdict),
            };
            // Of a transaction of two, one change lost.
            let expected = match expected {
                Ok(Verdict::Superseded) if mode == "transaction" => Ok(Verdict::Merged),
                other => *other,
            };
            assert_eq!(found, expected, "{mode}: {change:?}");
        }
        let rows = "SELECT string_agg(concat_ws(' ', right(id, 1), owner, n, note), ', ' ORDER BY id) FROM habits WHERE id NOT LIKE '%extra' AND id LIKE $1";
        let rows: String =
            sqlx::query_scalar(rows).bind(format!("{run}-%")).fetch_one(&mut database.sql).await.unwrap();
        assert_eq!(
            rows,
            "0 all 2 first, 1 all 1 first, 2 all 1 first, 3 all 1 first, 4 all 1 first, 5 all 1 first, 6 ann, 9 all 3",
            "{mode}"
        );
        // What a refused transaction did besides is undone.
        let extra =
            if mode == "transaction" { cases.iter().filter(|(_, expected)| expected.is_ok()).count() } else { 0 };
        let extras = format!("{extra}");
        assert_eq!(database.json("SELECT count(*)::text FROM habits WHERE id LIKE '%extra'").await, extras);
    }
    database.stack.stop().await;
}

/// The app deletes children itself, as SQLite without foreign keys has it: what the delete of their parent took is gone.
#[tokio::test]
async fn children_that_went_with_their_parent_are_deleted() {
    const TABLES: &str = "
        CREATE TABLE lists (id text PRIMARY KEY, parent text REFERENCES lists ON DELETE CASCADE);
        CREATE TABLE items (id text PRIMARY KEY, list text REFERENCES lists ON DELETE CASCADE);
        CREATE TABLE parts (id text PRIMARY KEY, item text REFERENCES items ON DELETE CASCADE);
        CREATE TABLE others (id text PRIMARY KEY, list text REFERENCES lists ON DELETE CASCADE);
        INSERT INTO lists VALUES ('l', NULL), ('m', NULL), ('n', NULL), ('o', 'n');
        INSERT INTO items VALUES ('i', 'l'), ('j', 'm');
        INSERT INTO parts VALUES ('p', 'i'), ('q', 'j');";
    let table = |name: &str| {
        format!("[tables.{name}]\nscope = {{ kind = \"global\" }}\nwritable = [\"id\"]\nwrite.delete = \"true\"\n")
    };
    let mut database = Database::with(TABLES, &["lists", "items", "parts"].map(table).concat()).await;
    let mut ann = Client::new(1, "ann");
    let delete = |table: &str, id: &str| change(table, Delete, &[("id", id)], &[], 1);
    let taken = |table: &str, id: &str| millstream_schemas::Change { gone: true, ..delete(table, id) };
    let all = vec![delete("lists", "l"), taken("items", "i"), taken("parts", "p")];
    is(&database.each(vec![ann.submit(all)]).await, Verdict::Applied);
    let other_way = vec![delete("parts", "q"), delete("items", "j"), delete("lists", "m")];
    is(&database.batch(vec![ann.submit(other_way)]).await, Verdict::Applied);
    let own_kind = vec![delete("lists", "n"), taken("lists", "o")];
    is(&database.batch(vec![ann.submit(own_kind)]).await, Verdict::Applied);
    // Nothing took this one.
    let results = database.batch(vec![ann.submit(vec![delete("items", "i")])]).await;
    refused(&results, Code::EntityMissing, None, "items");
    let left = "SELECT (SELECT count(*) FROM lists) || ' ' || (SELECT count(*) FROM items) || ' ' || (SELECT count(*) FROM parts)";
    assert_eq!(database.json(left).await, "0 0 0");
    database.stack.stop().await;
}
