//! What Postgres cannot take: literals of every type, whatever SQLSTATE the type has for them, and what triggers raise. Each is
//! a verdict at the first try, with the right code, and those around it are taken.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use millstream_schemas::stream::{Failure, MAX_RULE_BYTES, Verdict};
use millstream_schemas::{Change, Code, Operation};
use sqlx::Executor as _;
use uuid::Uuid;

use crate::executor::database::{Client, Database, change};

/// A second try comes after 100 ms, the last one after 1.5 s.
const FIRST_TRY: Duration = Duration::from_millis(1_000);

/// Types, and texts that are none of their values.
const LITERALS: [(&str, &[&str]); 45] = [
    ("json", &["{", "nul"]),
    ("jsonb", &["{", "1e999999"]),
    ("document", &["{"]),
    ("tsquery", &["a &", "(a", "a b"]),
    ("jsonpath", &["$.", "", "$ ? (", "$[1e999999]"]),
    ("regclass", &["nowhere", "no.where", "", "a.b.c.d", "\"x"]),
    ("regtype", &["nothing", "int4("]),
    ("regproc", &["nothing", "abs", "no.thing"]),
    ("regprocedure", &["nothing(int)", "abs", "abs("]),
    ("regoper", &["nothing", "+"]),
    ("regrole", &["nobody"]),
    ("regnamespace", &["nowhere", "a.b"]),
    ("regconfig", &["nothing"]),
    ("regdictionary", &["nothing"]),
    ("regcollation", &["nothing"]),
    ("xml", &["<a", "<a></b>", "<"]),
    ("int4range", &["[5,1]", "[1", "1,2"]),
    ("numrange", &["[b,c]", "(1,1"]),
    ("tstzrange", &["[soon,]"]),
    ("int4multirange", &["{[5,1]}", "{[1,2]"]),
    ("integer[]", &["{", "{{1},{2,3}}", "{a}", "[1:2]={1}"]),
    ("text[]", &["[\"a\", \"b\"]", "a, b"]),
    ("regclass[]", &["{nowhere}"]),
    ("tsquery[]", &["{a &}"]),
    ("pair", &["(1", "(a,b)", "(1,nowhere)", "1"]),
    ("mood", &["worse"]),
    ("boolean", &["maybe"]),
    ("bigint", &["9223372036854775808", "1.5"]),
    ("numeric(4, 1)", &["12345", "x"]),
    ("double precision", &["1e400", "x"]),
    ("money", &["much"]),
    ("bytea", &["\\x0", "\\9"]),
    ("bit(3)", &["1", "102"]),
    ("bit varying(3)", &["10101"]),
    ("character varying(3)", &["abcd"]),
    ("char(3)", &["abcd"]),
    ("uuid", &["1-2"]),
    ("date", &["2026-02-30", "soon"]),
    ("timestamptz", &["noon", "2026-01-01 00:00 Mars/Base"]),
    ("interval", &["a while", "999999999999 years"]),
    ("cidr", &["10.0.0.1/8", "x"]),
    ("macaddr", &["zz"]),
    ("point", &["1"]),
    ("pg_lsn", &["0"]),
    ("pg_snapshot", &["1:0:"]),
];

const TYPES: &str = "
CREATE DOMAIN document AS jsonb;
CREATE TYPE pair AS (n int, c regclass);
CREATE TYPE mood AS ENUM ('good', 'bad');
CREATE DOMAIN deep AS document;
";

fn deep() -> Vec<(&'static str, String)> {
    const LEVELS: usize = 20_000;
    vec![
        ("json", "[".repeat(LEVELS)),
        ("json", format!("{}{}", "[".repeat(LEVELS), "]".repeat(LEVELS))),
        ("jsonb", "[".repeat(LEVELS)),
        ("jsonb", "{\"a\":".repeat(LEVELS)),
        ("deep", "[".repeat(LEVELS)),
        ("tsquery", "(".repeat(LEVELS)),
        ("tsquery", format!("{}a", "!".repeat(4 * LEVELS))),
        ("jsonpath", format!("{}$", "(".repeat(LEVELS))),
        ("integer[]", "{".repeat(LEVELS)),
        ("xml", "<a>".repeat(LEVELS)),
    ]
}

/// Executes one in the middle of others, apart and with them; gives what is told of it.
async fn refused(database: &mut Database, clients: &mut [Client; 3], bad: &Change, name: &str) -> Result<Failure> {
    let mut told = None;
    for together in [true, false] {
        let begin = Instant::now();
        let good = || {
            let id = Uuid::new_v4().to_string();
            change("plain", Operation::Insert, &[("id", &id)], &[], 1)
        };
        let bad = Change { change_id: Uuid::new_v4(), ..bad.clone() };
        let submissions =
            vec![clients[0].submit(vec![good()]), clients[1].submit(vec![bad]), clients[2].submit(vec![good()])];
        let results = if together { database.batch(submissions).await } else { database.each(submissions).await };
        let took = begin.elapsed();
        let of = |client: &Client| results.iter().find(|(id, _)| *id == client.id).map(|(_, result)| result);
        let [before, result, after] = [&clients[0], &clients[1], &clients[2]].map(of);
        for neighbour in [before, after] {
            ensure!(neighbour.is_some_and(|result| result.verdict == Verdict::Applied), "{name}: {results:?}");
        }
        ensure!(took < FIRST_TRY, "{name} took {took:?}: {result:?}");
        told = result.and_then(|result| result.failure.clone());
        ensure!(told.is_some(), "{name} was taken");
    }
    told.ok_or_else(|| anyhow::anyhow!("nothing was tried"))
}

fn clients() -> [Client; 3] {
    [1, 2, 3].map(|id| Client::new(id, "ann"))
}

#[tokio::test(flavor = "multi_thread")]
async fn literals_that_are_none_of_a_type_are_invalid_values_at_the_first_try() -> Result<()> {
    let mut types: Vec<&str> =
        LITERALS.iter().map(|(sql_type, _)| *sql_type).chain(deep().iter().map(|(t, _)| *t)).collect();
    types.sort_unstable();
    types.dedup();
    let columns: Vec<String> = types.iter().enumerate().map(|(n, sql_type)| format!("c{n} {sql_type}")).collect();
    let names: Vec<String> = (0..types.len()).map(|n| format!("\"c{n}\"")).collect();
    let schema = format!(
        "{TYPES} CREATE TABLE odd (id int PRIMARY KEY, n int, {}); INSERT INTO odd (id) VALUES (0); \
         CREATE TABLE plain (id uuid PRIMARY KEY);",
        columns.join(", ")
    );
    let config = format!(
        "[tables.odd]\nscope = {{ kind = \"global\" }}\nwritable = [\"id\", \"n\", {}]\nwrite.insert = \"true\"\nwrite.update = \"new.n > 0\"\n\
         [tables.plain]\nscope = {{ kind = \"global\" }}\nwritable = [\"id\"]\nwrite.insert = \"true\"\n",
        names.join(", ")
    );
    let mut database = Database::with(&schema, &config).await;
    let mut clients = clients();
    let literals =
        LITERALS.iter().flat_map(|(sql_type, texts)| texts.iter().map(move |text| (*sql_type, (*text).to_owned())));
    let (mut id, mut tried) = (0, 0);
    for (sql_type, text) in literals.chain(deep()) {
        let column = format!("c{}", types.binary_search(&sql_type).unwrap_or_default());
        for op in [Operation::Insert, Operation::Update] {
            id += 1;
            let key = if op == Operation::Insert { id.to_string() } else { "0".to_owned() };
            let bad = change("odd", op, &[("id", &key)], &[("n", Some("1")), (&column, Some(&text))], 1);
            let name = format!("{} {:.40}", sql_type, text);
            let failure = refused(&mut database, &mut clients, &bad, &name).await?;
            ensure!(failure.code == Code::InvalidValue, "{name}: {failure:?}");
            ensure!(failure.message.contains(&format!("odd.{column}")), "{name}: {failure:?}");
            tried += 1;
        }
    }
    println!("{tried} changes with literals of {} types", types.len());
    // A type that is called otherwise by now is no fault of the value.
    database.sql.execute("ALTER TYPE mood RENAME TO feeling").await?;
    let column = format!("c{}", types.binary_search(&"mood").unwrap_or_default());
    let good = change("odd", Operation::Insert, &[("id", "-1")], &[("n", None), (&column, Some("good"))], 1);
    let results = database.each(vec![clients[0].submit(vec![good])]).await;
    ensure!(results[0].1.verdict == Verdict::Applied, "{results:?}");
    database.stack.stop().await;
    Ok(())
}

/// A trigger that does what the row says.
const TRIGGERS: &str = "
CREATE TABLE acts (id int PRIMARY KEY, act text NOT NULL, what text);
CREATE TABLE plain (id uuid PRIMARY KEY);
CREATE FUNCTION act() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    CASE NEW.act
    WHEN 'raise' THEN
        RAISE EXCEPTION USING ERRCODE = NEW.what, MESSAGE = 'Not today.', DETAIL = 'secret', HINT = 'secret',
            CONSTRAINT = repeat('c', 300);
    WHEN 'missing table' THEN PERFORM * FROM nowhere;
    WHEN 'missing function' THEN PERFORM nothing(1);
    WHEN 'two rows' THEN PERFORM (SELECT n FROM generate_series(1, 2) AS n);
    WHEN 'recursion' THEN INSERT INTO acts VALUES (NEW.id + 1, 'recursion');
    WHEN 'commit' THEN COMMIT;
    WHEN 'cursor' THEN EXECUTE 'FETCH NEXT FROM nothing';
    WHEN 'assert' THEN ASSERT false, 'Not so.';
    WHEN 'value' THEN PERFORM 1 / 0;
    WHEN 'late' THEN NULL;
    END CASE;
    RETURN NEW;
END $$;
CREATE TRIGGER act BEFORE INSERT OR UPDATE ON acts FOR EACH ROW WHEN (NEW.act <> 'late') EXECUTE FUNCTION act();
CREATE FUNCTION late() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION USING ERRCODE = NEW.what, MESSAGE = 'Not today.', DETAIL = 'secret', CONSTRAINT = repeat('c', 300);
END $$;
CREATE CONSTRAINT TRIGGER late AFTER INSERT ON acts DEFERRABLE INITIALLY DEFERRED FOR EACH ROW WHEN (NEW.act = 'late')
EXECUTE FUNCTION late();
";

const TRIGGERS_CONFIG: &str = r#"
[tables.acts]
scope = { kind = "global" }
writable = ["id", "act", "what"]
write.insert = "true"
write.update = "true"

[tables.plain]
scope = { kind = "global" }
writable = ["id"]
write.insert = "true"
"#;

/// Of every class that stands for the server, for the caller, or for nothing.
const STATES: [&str; 34] = [
    "01000", "02000", "08006", "09000", "0A000", "0L000", "20000", "21000", "23505", "23502", "25006", "25P02",
    "26000", "27000", "28000", "2D000", "2F002", "38000", "39000", "3D000", "3F000", "40001", "40P01", "42P01",
    "42704", "53400", "54001", "55000", "55P03", "57014", "57P01", "58030", "XX000", "PT403",
];

#[tokio::test(flavor = "multi_thread")]
async fn what_a_trigger_raises_is_a_verdict_on_its_change_whatever_its_sqlstate() -> Result<()> {
    let mut database = Database::with(TRIGGERS, TRIGGERS_CONFIG).await;
    let mut clients = clients();
    let mut id = 0;
    let mut act = |act: &str, what: &str| {
        id += 1;
        let set = [("act", Some(act)), ("what", Some(what))];
        change("acts", Operation::Insert, &[("id", &id.to_string())], &set, 1)
    };
    for state in STATES.into_iter().chain(["U0001", "AB001"]) {
        for how in ["raise", "late"] {
            let failure = refused(&mut database, &mut clients, &act(how, state), state).await?;
            ensure!(failure.code == Code::BusinessRule, "{state} {how}: {failure:?}");
            ensure!(failure.message == "Not today.", "{state} {how}: {failure:?}");
            ensure!(
                failure.rule.as_ref().is_some_and(|rule| rule.len() == MAX_RULE_BYTES),
                "{state} {how}: {failure:?}"
            );
        }
    }
    for (state, code) in [("42501", Code::PermissionDenied), ("22023", Code::InvalidValue)] {
        let failure = refused(&mut database, &mut clients, &act("raise", state), state).await?;
        ensure!((failure.code, failure.message.as_str()) == (code, "Not today."), "{state}: {failure:?}");
    }
    for (what, code, says) in [
        ("missing table", Code::BusinessRule, "nowhere"),
        ("missing function", Code::BusinessRule, "nothing(integer)"),
        ("two rows", Code::BusinessRule, "more than one row"),
        ("no such act", Code::BusinessRule, "case"),
        ("recursion", Code::InvalidValue, "stack depth"),
        ("commit", Code::BusinessRule, "transaction"),
        ("cursor", Code::BusinessRule, "nothing"),
        ("assert", Code::BusinessRule, "Not so."),
        ("value", Code::InvalidValue, "division"),
    ] {
        let failure = refused(&mut database, &mut clients, &act(what, ""), what).await?;
        ensure!(failure.code == code && failure.message.contains(says), "{what}: {failure:?}");
    }
    let told =
        database.json("SELECT count(*)::text FROM millstream.changes_history WHERE message LIKE '%secret%'").await;
    ensure!(told == "0", "details were told");
    database.stack.stop().await;
    Ok(())
}
