//! Every common type, by every way: written by SQL and by a client, read in a snapshot and from the stream. What a client
//! holds is what Postgres holds, to the last digit, and as the table of types in docs/tables.md says.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use futures_util::TryStreamExt as _;
use millstream_catalog::{Catalog, Config};
use millstream_client::{Client, SqlValue};
use millstream_schemas::spelling::{Spelling, spelling};
use millstream_tests::board::{Board, PATIENCE};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use sqlx::{AssertSqlSafe, PgConnection, Row as _};
use uuid::Uuid;

use crate::executor::database::Database;

/// Column, type, and values as SQL expressions.
const TYPES: [(&str, &str, &[&str]); 43] = [
    ("smallint_", "smallint", &["-32768", "32767", "0"]),
    ("integer_", "integer", &["-2147483648", "2147483647", "7"]),
    ("bigint_", "bigint", &["-9223372036854775808", "9223372036854775807", "9007199254740993"]),
    ("numeric_", "numeric", &["'0.1000'", "'123456789012345678901234567890.123456789'", "'NaN'", "'-Infinity'"]),
    ("scaled_", "numeric(12, 2)", &["'1.5'", "'-9999999999.99'", "'0'"]),
    ("real_", "real", &["'1.1'", "'3.4028235e38'", "'1e-45'", "'NaN'"]),
    (
        "double_",
        "double precision",
        &["'0.1'", "'1.7976931348623157e308'", "'5e-324'", "'-Infinity'", "'100'", "'1e21'"],
    ),
    ("boolean_", "boolean", &["true", "false"]),
    (
        "text_",
        "text",
        &["''", "E'a\\tb\\nc\\\\d\\r\\b'", "'ü 漢 🦀 \"quoted\" ''it''s'''", "'\\N'", "repeat('long ', 4000)"],
    ),
    ("varchar_", "varchar(20)", &["'short'", "'x'"]),
    ("char_", "char(5)", &["'ab'", "'abcde'"]),
    ("bytea_", "bytea", &["'\\x'", "'\\x00ff5c0a'", "decode(repeat('ab', 3000), 'hex')"]),
    ("date_", "date", &["'2026-11-26'", "'0044-03-15 BC'", "'infinity'"]),
    ("time_", "time", &["'23:59:59.999999'", "'00:00'"]),
    ("timetz_", "timetz", &["'12:34:56.7+05:30'", "'00:00Z'"]),
    ("timestamp_", "timestamp", &["'2026-02-28 12:00:00.000001'", "'4713-01-01 BC'", "'-infinity'"]),
    (
        "timestamptz_",
        "timestamptz",
        &["'2026-07-01 12:00:00.5+02'", "'1900-01-01 00:00:00 Europe/Amsterdam'", "'infinity'"],
    ),
    ("interval_", "interval", &["'1 year 2 months -3 days 04:05:06.789'", "'0'", "'-1 day +1 second'"]),
    ("uuid_", "uuid", &["'00000000-0000-0000-0000-000000000000'", "'A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11'"]),
    ("json_", "json", &["'{\"b\":1,   \"a\": [null, 1.0, \"\\u00fc\"]}'", "'null'", "'\"text\"'"]),
    ("jsonb_", "jsonb", &["'{\"b\":1,   \"a\": [null, 1.0, \"ü\"]}'", "'null'", "'12345678901234567890.5'"]),
    ("inet_", "inet", &["'192.168.0.1/24'", "'2001:db8::1'"]),
    ("cidr_", "cidr", &["'10.0.0.0/8'", "'::/0'"]),
    ("macaddr_", "macaddr", &["'08:00:2b:01:02:03'", "'ffffffffffff'"]),
    ("int4range_", "int4range", &["'[1,5]'", "'empty'", "'(,7)'"]),
    ("tstzrange_", "tstzrange", &["'[2026-01-01 00:00+01, 2026-02-01 00:00+01)'", "'(,infinity]'"]),
    ("multirange_", "int4multirange", &["'{[1,3), [5,8)}'", "'{}'"]),
    ("point_", "point", &["'(1.5,-2)'", "'(0.1,1e300)'"]),
    ("bit_", "bit(3)", &["B'101'", "B'000'"]),
    ("varbit_", "bit varying", &["B'10111'", "B''"]),
    ("tsvector_", "tsvector", &["'a:1 fat:2A cat'", "''"]),
    ("ints_", "integer[]", &["'{1,NULL,-3}'", "'{}'", "'{{1,2},{3,4}}'", "'[0:1]={7,8}'"]),
    ("texts_", "text[]", &["ARRAY['a,b', 'c\"d', '', NULL, 'NULL', E'\\\\', 'ü']", "'{}'"]),
    ("numerics_", "numeric[]", &["'{1.10,NaN,12345678901234567890}'", "'{}'"]),
    ("uuids_", "uuid[]", &["'{00000000-0000-0000-0000-000000000001}'", "'{}'"]),
    ("mood_", "mood", &["'happy'", "'so-so, really'"]),
    ("email_", "email", &["'a@b.c'", "'d@e'"]),
    ("positive_", "positive", &["1", "9223372036854775807"]),
    ("nested_", "nested", &["1", "99"]),
    ("moments_", "moment", &["'2026-07-01 12:00:00.5+02'"]),
    ("units_", "numeric(12, 2)", &["'1.5'", "'-9999999999.99'", "'0'", "'NaN'"]),
    ("float_", "numeric", &["'1.5'", "'-0.001'", "'123456789012345'", "'NaN'", "'Infinity'"]),
    ("pair_", "pair", &["ROW(1, 'a,b')", "ROW(NULL, '')"]),
];

fn schema() -> String {
    let columns: Vec<String> = TYPES.iter().map(|(name, sql_type, _)| format!("{name} {sql_type}")).collect();
    format!(
        "CREATE TYPE mood AS ENUM ('happy', 'so-so, really');
         CREATE DOMAIN email AS text CHECK (VALUE LIKE '%@%');
         CREATE DOMAIN positive AS bigint CHECK (VALUE > 0);
         CREATE DOMAIN nested AS positive CHECK (VALUE < 100);
         CREATE DOMAIN moment AS timestamptz;
         CREATE TYPE pair AS (n int, t text);
         CREATE TABLE kinds (id uuid PRIMARY KEY, {}, length int GENERATED ALWAYS AS (length(text_)) STORED);",
        columns.join(", ")
    )
}

fn config() -> String {
    let columns: Vec<String> = TYPES.iter().map(|(name, ..)| format!("{name:?}")).collect();
    format!(
        "[tables.kinds]\nscope = {{ kind = \"global\" }}\nwritable = [\"id\", {}]\nwrite.insert = \"true\"\nwrite.update = \"true\"\n\
         numeric = {{ units_ = \"integer\", float_ = \"real\" }}\n",
        columns.join(", ")
    )
}

/// What SQLite has for a value of a column that Postgres writes as `text`: the table in docs/tables.md.
fn held(name: &str, sql_type: &str, text: Option<String>) -> SqlValue {
    let Some(text) = text else { return SqlValue::Null };
    match sql_type {
        _ if text == "NaN" => SqlValue::Text(text),
        "numeric(12, 2)" if name == "units_" => SqlValue::Integer(text.replace('.', "").parse().expect("units")),
        "numeric" if name == "float_" => SqlValue::Real(text.parse().expect("a number")),
        "boolean" => SqlValue::Integer(i64::from(text == "t")),
        "smallint" | "integer" | "bigint" | "positive" | "nested" => {
            SqlValue::Integer(text.parse().expect("an integer"))
        }
        "real" | "double precision" => SqlValue::Real(text.parse().expect("a number")),
        "bytea" => {
            let digits: Vec<char> = text.trim_start_matches("\\x").chars().collect();
            let byte = |pair: &[char]| u8::from_str_radix(&String::from_iter(pair), 16).expect("hex");
            SqlValue::Blob(digits.chunks(2).map(byte).collect())
        }
        _ => SqlValue::Text(text),
    }
}

/// Postgres' rows as a client should hold them.
async fn expected(postgres: &mut PgConnection) -> Result<Vec<Vec<SqlValue>>> {
    sqlx::raw_sql(
        "SET TimeZone = 'UTC'; SET DateStyle = 'ISO'; SET IntervalStyle = 'iso_8601'; SET extra_float_digits = 1",
    )
    .execute(&mut *postgres)
    .await?;
    let list: Vec<&str> = TYPES.iter().map(|(name, ..)| *name).collect();
    let sql = format!("COPY (SELECT id, {} FROM kinds ORDER BY id) TO STDOUT", list.join(", "));
    let mut lines = Vec::new();
    {
        // As the types' output functions write them: a cast to text would not pad char(5), and says true for t.
        let mut copy = postgres.copy_out_raw(&sql).await?;
        while let Some(chunk) = copy.try_next().await? {
            lines.extend_from_slice(&chunk);
        }
    }
    let unescape = |field: &str| -> Option<String> {
        if field == "\\N" {
            return None;
        }
        let mut text = String::new();
        let mut rest = field.chars();
        while let Some(char) = rest.next() {
            text.push(match char {
                '\\' => match rest.next().expect("an escape") {
                    'b' => '\u{8}',
                    'f' => '\u{c}',
                    'n' => '\n',
                    'r' => '\r',
                    't' => '\t',
                    'v' => '\u{b}',
                    other => other,
                },
                other => other,
            });
        }
        Some(text)
    };
    let types: Vec<_> = std::iter::once(("id", "uuid")).chain(TYPES.iter().map(|(name, of, _)| (*name, *of))).collect();
    let text = String::from_utf8(lines)?;
    Ok(text
        .lines()
        .map(|line| line.split('\t').zip(&types).map(|(field, (name, of))| held(name, of, unescape(field))).collect())
        .collect())
}

async fn shows(client: &Client, postgres: &mut PgConnection) -> Result<()> {
    let names: Vec<&str> = std::iter::once("id").chain(TYPES.iter().map(|(name, ..)| *name)).collect();
    let expected = expected(postgres).await?;
    let start = Instant::now();
    loop {
        let shown = client.query(&format!("SELECT {} FROM kinds ORDER BY id", names.join(", ")), ()).await?.rows;
        let same = |a: &SqlValue, b: &SqlValue| match (a, b) {
            // Signs of zero and all: what is compared are bits.
            (SqlValue::Real(a), SqlValue::Real(b)) => a.to_bits() == b.to_bits(),
            (a, b) => a == b,
        };
        let differs = expected.iter().zip(&shown).find_map(|(wanted, found)| {
            let place = wanted.iter().zip(found).position(|(wanted, found)| !same(wanted, found))?;
            Some(format!("{}: {:?}, not {:?}", names[place], found[place], wanted[place]))
        });
        if shown.len() == expected.len() && differs.is_none() {
            return Ok(());
        }
        ensure!(start.elapsed() < PATIENCE, "{} of {} rows; {differs:?}", shown.len(), expected.len());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_common_type_is_exact_by_every_way() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("millstream.toml");
    std::fs::write(&file, config())?;
    let board = Board::with(|builder| builder.app_schema(schema()).config(&file)).await?;
    let outcome = run(&board).await;
    board.explain(outcome)
}

async fn run(board: &Board) -> Result<()> {
    let mut postgres = board.postgres().await?;
    let live = board.client("live", "alice").await?;
    // By SQL, to the stream: one row for every value, the others null; and one of nulls.
    let mut originals = vec![Uuid::now_v7()];
    sqlx::query("INSERT INTO kinds (id) VALUES ($1)").bind(originals[0]).execute(&mut postgres).await?;
    for (name, _, values) in TYPES {
        for value in values {
            let id = Uuid::now_v7();
            let sql = format!("INSERT INTO kinds (id, {name}) VALUES ('{id}', {value})");
            sqlx::query(AssertSqlSafe(sql.clone())).execute(&mut postgres).await.context(sql)?;
            originals.push(id);
        }
    }
    shows(&live, &mut postgres).await.context("the stream")?;
    shows(&board.client("new", "bob").await?, &mut postgres).await.context("a snapshot")?;

    // By a client: copies of all rows as it holds them, by insert and by update.
    let names: Vec<&str> = TYPES.iter().map(|(name, ..)| *name).collect();
    let mut copies = Vec::new();
    for original in &originals {
        for by_update in [false, true] {
            let copy = Uuid::now_v7();
            let write = if by_update {
                let set: Vec<String> =
                    names.iter().map(|name| format!("{name} = (SELECT {name} FROM kinds WHERE id = ?1)")).collect();
                let update = format!("UPDATE kinds SET {} WHERE id = ?2", set.join(", "));
                live.tx(move |tx| tx.execute("INSERT INTO kinds (id) VALUES (?)", (copy,)).map(drop)).await?;
                live.execute(&update, (*original, copy)).await?
            } else {
                let insert =
                    format!("INSERT INTO kinds (id, {0}) SELECT ?2, {0} FROM kinds WHERE id = ?1", names.join(", "));
                live.execute(&insert, (*original, copy)).await?
            };
            copies.push((*original, copy, write));
        }
    }
    for (original, copy, write) in copies {
        let verdict = tokio::time::timeout(PATIENCE, write.confirmed()).await?;
        verdict.with_context(|| format!("a copy of row {original}"))?;
        let differs: Vec<String> =
            names.iter().map(|name| format!("a.{name}::text IS NOT DISTINCT FROM b.{name}::text")).collect();
        let sql = format!("SELECT ARRAY[{}] FROM kinds a, kinds b WHERE a.id = $1 AND b.id = $2", differs.join(", "));
        let equal: Vec<bool> =
            sqlx::query(AssertSqlSafe(sql)).bind(original).bind(copy).fetch_one(&mut postgres).await?.get(0);
        let wrong: Vec<&&str> = names.iter().zip(equal).filter(|(_, equal)| !equal).map(|(name, _)| name).collect();
        ensure!(wrong.is_empty(), "a client's copy differs in {wrong:?}");
    }
    shows(&live, &mut postgres).await.context("the author")?;
    shows(&board.client("newer", "bob").await?, &mut postgres).await.context("a snapshot of copies")
}

/// Types whose spellings `millstream_schemas::spelling` knows, and letters of which texts of them are made.
const SPELT: [(&str, &[&str]); 34] = [
    (
        "uuid",
        &[
            "a0eebc99-9c0b-4ef8-bb6d-",
            "A0EEBC99-9C0B-4EF8-BB6D-",
            "a0eebc999c0b4ef8bb6d",
            "6bb9bd380a11",
            "6BB9-BD38-0A11",
            "{",
            "}",
        ],
    ),
    ("integer", &["7", "0", "+", "-", " ", "42", ".", "2147483647"]),
    ("numeric", &["7", "0", "00", "+", "-", ".", ".", "e", "E2", "e-3", "12", "50", " ", "NaN", "inf", "Infinity"]),
    ("numeric(8,2)", &["7", "0", "00", "-", "+", ".", ".", ".", "e1", "E-1", "12", "50", "5", "995", "4999", "nan"]),
    ("numeric(5)", &["7", "0", "-", ".", ".5", "e1", "e-2", "12", "99", "49", "-Inf"]),
    ("numeric(3,-2)", &["7", "0", "-", ".", "e1", "E3", "99", "49", "50", "950"]),
    ("numeric(2,4)", &["0.0", "0", ".00", "-", "e-2", "7", "99", "49", "5"]),
    ("real", &["7", "0", "-", "+", ".", "e", "E5", "e-3", "12", "33554434", " ", "NaN", "inf", "-Infinity"]),
    (
        "double precision",
        &["7", "0", "-", "+", ".", "e", "E15", "e-5", "12", "e23", "e300", " ", "nan", "Inf", "infinity"],
    ),
    ("boolean", &["t", "rue", "f", "alse", "yes", "no", "on", "off", "1", "0", " "]),
    ("date", &["2026", "2024", "1900", "-", "-", "-", "1", "02", "11", "29", "30", "infinity", " "]),
    ("date", &["2026-11-29", "2024-2-29", "T", " ", "8:00", "23:59:59", ".5", "Z", "+02", "-infinity", " UTC"]),
    ("time", &["8:00", "08:30:15", "23:59:59", "24:00", ":00", ":60", ".5", ".250", ".1234567", ":30", "Z"]),
    ("time", &["2026-11-29 ", "8:00", "23:59:59", ".9999999", "T", "Z", "+02", " GMT"]),
    ("time(2)", &["8:00", "08:30:15", "23:59:59", ".5", ".250", ".125", ".995", ":07"]),
    ("time(0)", &["8:00", "23:59:59", ".5", ".4999999", "23:59", ":60", "24:00"]),
    (
        "timetz",
        &[
            "2026-11-29 ",
            "8:00",
            "23:59:59",
            "24:00",
            ":60",
            ".9999999",
            ".5",
            " ",
            "Z",
            "+02",
            "-130",
            "+5:30:15",
            " utc",
        ],
    ),
    ("timetz(0)", &["8:00", "23:59:59", ".5", ".4999999", "Z", "-00", "-00:30", "+0530", "+15:59:59", "-16", " gmt"]),
    ("timetz(4)", &["8:00", "23:59:59", ".00005", ".12345", ".99995", "+1", "-1", ":1"]),
    ("timestamp(6)", &["1999-12-31", "2026-12-31", " ", "24:00", "23:59:60", "8:00:00", ".0000005", ".4999999", ".25"]),
    (
        "timestamp(1)",
        &["1999-12-31", "2026-12-31", "T", "23:59:59", "0:00:01", ".95", ".05", ".949999", "+130", "-5:3"],
    ),
    (
        "timestamptz(0)",
        &["1999-12-31", "2026-12-31", " ", "23:59:59", "24:00", ".5", ".05", "Z", "+130", "-5:3", "+1:2:3"],
    ),
    ("timestamptz(5)", &["1999-12-31", "2026-12-31", "T", "23:59:59", "0:00:01", ".999995", ".000015", "z", "-0130"]),
    ("timestamp(0)", &["1999-12-31", "2026-12-31", "T", "23:59:59", "0:00:01", ".5", ".4999999", ".49999999", ".25"]),
    (
        "timestamptz(2)",
        &["1999-12-31", "2026-12-31", "T", "23:59:59", ".995", ".125", ".004999", ".0000005", "Z", "-01", "utc"],
    ),
    (
        "timestamp",
        &["2026-11-29", "2024-2-29", "0001-01-01", "T", " ", "8:00", "08:30:15", ".5", "Z", "+02", "-infinity"],
    ),
    (
        "timestamptz",
        &["2026-11-29", "2026-12-31", "2024-2-28", "T", " ", "0:10", "23:30:15", ".5", "Z", "+02", "-0730", "+05:30"],
    ),
    ("timestamptz(3)", &["2026-01-01", "T", " ", "0:10:00", ".5", ".125", ".1255", "Z", "+02", "-13:59"]),
    ("char(4)", &["a", " ", "ü", "bc"]),
    ("char(1)", &["a", " ", "  ", "\t"]),
    ("bpchar", &["a", " ", "ü", "bc"]),
    ("varchar(4)", &["a", " ", "B"]),
    ("inet", &["10.0.0.1", "192.168.1.0", "/32", "/24", "2001:DB8::1", "fe80::1:2", "/128", "/64", "0:0"]),
    ("bytea", &["\\x", "00", "fF", "a", "0A"]),
];

/// A number as text: of any size, of few digits, or half-way between two that have this many bits.
fn number(random: &mut StdRng, bits: u32) -> String {
    let most = 10_u64.pow(random.random_range(1..18));
    let digits = random.random_range(0..most);
    match random.random_range(0..4) {
        0 if bits == 24 => format!("{:?}", f32::from_bits(random.random())),
        0 => format!("{:?}", f64::from_bits(random.random())),
        1 => format!("{digits}e{}", random.random_range(-330..310)),
        2 => format!("{digits}e{}", random.random_range(0..30)),
        _ => {
            let five = 5_u128.pow(random.random_range(0..bits * 2 / 5));
            let odd = random.random_range((1 << bits) / five..(2 << bits) / five) | 1;
            ((odd * five) << random.random_range(0..60)).to_string()
        }
    }
}

/// Keys keep their names, and no value is another after its confirmation: where the spelling of a value is foreseen, by the type that
/// the catalog has for its column, Postgres gives it back like that. Columns are of the types, of domains over them, and of domains over
/// these.
#[tokio::test(flavor = "multi_thread")]
async fn postgres_spells_values_as_foreseen() -> Result<()> {
    let of = |name: &str| std::env::var(name).ok().and_then(|number| number.parse::<u64>().ok());
    let (seed, values) = (of("MILLSTREAM_SEED").unwrap_or(1), of("MILLSTREAM_CASES").unwrap_or(1_500));
    let mut random = StdRng::seed_from_u64(seed);
    // As its output function writes it; null if it is no value of the type.
    let mut schema = "CREATE FUNCTION spelt(value text, sql_type text) RETURNS text LANGUAGE plpgsql AS $$
        DECLARE spelt text;
        BEGIN
            EXECUTE format('SELECT format(''%%s'', $1::text::%s)', sql_type) INTO spelt USING value;
            RETURN spelt;
        EXCEPTION WHEN data_exception OR syntax_error THEN RETURN NULL;
        END $$;"
        .to_owned();
    let mut columns = String::new();
    for (n, (sql_type, _)) in SPELT.iter().enumerate() {
        let of = ["", "d", "dd"]
            .map(|domain| if domain.is_empty() { (*sql_type).to_owned() } else { format!("{domain}{n}") });
        schema += &format!("CREATE DOMAIN d{n} AS {sql_type}; CREATE DOMAIN dd{n} AS d{n} NOT NULL;");
        columns += &of.iter().enumerate().map(|(depth, of)| format!(", c{n}_{depth} {of}")).collect::<String>();
    }
    schema += &format!("CREATE TABLE t (id int PRIMARY KEY{columns})");
    let mut database = Database::with(&schema, "[tables.t]\nscope = { kind = \"global\" }\n").await;
    sqlx::raw_sql("SET TimeZone = 'UTC'; SET DateStyle = 'ISO'").execute(&mut database.sql).await?;
    let config = Config::read(&database.config)?;
    let catalog = Catalog::load(&mut database.sql, &config, None).await?;
    let table = catalog.table("t").context("no table")?;
    let (mut foreseen, mut other, mut refused) = (0, 0, 0);
    for (n, (sql_type, parts)) in SPELT.into_iter().enumerate() {
        let mut known = 0;
        for _ in 0..values {
            let text: String =
                (0..random.random_range(1..9)).map(|_| parts[random.random_range(0..parts.len())]).collect();
            let text = match sql_type {
                "real" if random.random() => number(&mut random, 24),
                "double precision" if random.random() => number(&mut random, 53),
                // A cast cuts what an assignment refuses.
                _ if sql_type.contains("char") => {
                    text.chars().take(if sql_type == "char(1)" { 1 } else { 4 }).collect()
                }
                _ => text,
            };
            let depth: usize = random.random_range(0..3);
            let name = format!("c{n}_{depth}");
            let column = &table.columns[table.column(&name).context("no column")?];
            let full = &column.sql_type;
            let of = column.domain.as_ref().unwrap_or(full);
            let (given, again): (Option<String>, Option<String>) = sqlx::query_as(
                "SELECT given, CASE WHEN given IS NOT NULL THEN spelt(given, $2) END FROM spelt($1, $2) AS given",
            )
            .bind(&text)
            .bind(of)
            .fetch_one(&mut database.sql)
            .await?;
            // What Postgres writes itself stays as it is, if it reads that back as the same: `+130` may be the zone UTC-130 of POSIX.
            if let Some(given) = given.as_ref().filter(|given| again.as_ref() == Some(given)) {
                let again = spelling(full, given);
                ensure!(
                    [Spelling::Any, Spelling::Known(given.into())].contains(&again),
                    "seed {seed}: {full} '{given}', of '{text}', is taken for {again:?}"
                );
            }
            match (spelling(full, &text), given) {
                (Spelling::Known(known), Some(given)) if known != given => {
                    anyhow::bail!("seed {seed}: {full} '{text}' is '{given}', foreseen '{known}'");
                }
                (Spelling::Known(_), Some(given)) => {
                    known += 1;
                    foreseen += 1;
                    other += usize::from(given != text);
                }
                // Too long, or out of range.
                (Spelling::Known(_), None) => refused += 1,
                (Spelling::Other(_) | Spelling::Any, _) => {}
            }
        }
        ensure!(
            known > 10 || sql_type == "bpchar",
            "{sql_type}: only {known} of {values} are values that are understood"
        );
    }
    println!("{foreseen} values foreseen, {other} of them spelt otherwise; {refused} refused by Postgres");
    database.stack.stop().await;
    Ok(())
}
