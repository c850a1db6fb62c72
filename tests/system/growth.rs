//! What a change may become when Postgres writes it: bounded, whatever the types are made of.

use anyhow::{Context as _, Result, ensure};
use millstream_catalog::{Catalog, Config};
use millstream_schemas::stream::{MAX_ROW_BYTES, Verdict};
use millstream_schemas::{Code, Operation};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use sqlx::AssertSqlSafe;

use crate::executor::database::{Client, Database, change};

/// A type, as SQL names it, and how its values are made.
#[derive(Clone)]
struct Kind {
    name: String,
    made: Made,
}

#[derive(Clone)]
enum Made {
    Numeric,
    Scaled,
    Json,
    Path,
    Text,
    Domain(Box<Kind>),
    Array(Box<Kind>),
    Composite(Vec<Kind>),
    Range(Box<Kind>),
    Multirange(Box<Kind>),
}

/// Makes types of types, and the SQL that creates them.
struct Types {
    random: StdRng,
    sql: String,
    made: usize,
}

impl Types {
    fn plain(&mut self) -> Kind {
        let (name, made) = match self.random.random_range(0..6) {
            0 => ("numeric".to_owned(), Made::Numeric),
            1 => (format!("numeric(1000, {})", self.random.random_range(0..1000)), Made::Scaled),
            2 => ("jsonb".to_owned(), Made::Json),
            3 => (format!("char({})", self.random.random_range(1..2000)), Made::Text),
            4 => ("jsonpath".to_owned(), Made::Path),
            _ => ("text".to_owned(), Made::Text),
        };
        Kind { name, made }
    }

    fn create(&mut self, sql: impl Fn(&str) -> String) -> String {
        self.made += 1;
        let name = format!("t{}", self.made);
        self.sql.push_str(&sql(&name));
        self.sql.push(';');
        name
    }

    fn of(&mut self, depth: usize) -> Kind {
        if depth == 0 {
            return self.plain();
        }
        let inside = self.of(depth - 1);
        match self.random.random_range(0..5) {
            0 | 1 if !matches!(inside.made, Made::Array(_)) => {
                Kind { name: format!("{}[]", inside.name), made: Made::Array(Box::new(inside)) }
            }
            2 if !matches!(inside.made, Made::Array(_) | Made::Composite(_) | Made::Path) && depth == 1 => {
                let domain = self.create(|name| format!("CREATE DOMAIN {name} AS {}", inside.name));
                let range = self.create(|name| {
                    format!("CREATE TYPE {name} AS RANGE (subtype = {domain}, multirange_type_name = {name}_many)")
                });
                match self.random.random_bool(0.5) {
                    true => Kind { name: range, made: Made::Range(Box::new(inside)) },
                    false => Kind { name: format!("{range}_many"), made: Made::Multirange(Box::new(inside)) },
                }
            }
            3 => {
                let name = self.create(|name| format!("CREATE DOMAIN {name} AS {}", inside.name));
                Kind { name, made: Made::Domain(Box::new(inside)) }
            }
            _ => {
                let other = self.plain();
                let list = format!("a {}, b {}, c {}", inside.name, other.name, inside.name);
                let name = self.create(|name| format!("CREATE TYPE {name} AS ({list})"));
                Kind { name, made: Made::Composite(vec![inside.clone(), other, inside]) }
            }
        }
    }

    fn number(&mut self) -> String {
        match self.random.random_range(0..5) {
            0 => "0".to_owned(),
            1 => "-1.50".to_owned(),
            2 => format!("1e{}", self.random.random_range(0..5000)),
            3 => format!("1.5E+{}", self.random.random_range(0..5000)),
            _ => format!("7e-{}", self.random.random_range(0..5000)),
        }
    }

    /// Inside of a list of a type: quoted, or with each character escaped.
    fn part(&mut self, text: &str) -> String {
        match self.random.random_bool(0.7) || text.is_empty() {
            true => format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\"")),
            false => text.chars().flat_map(|char| ['\\', char]).collect(),
        }
    }

    fn value(&mut self, kind: &Kind) -> String {
        match &kind.made {
            Made::Numeric => self.number(),
            Made::Scaled => ["0", "-0.5", "1e-3"][self.random.random_range(0..3)].to_owned(),
            Made::Json => {
                let parts: Vec<String> = (0..self.random.random_range(0..6))
                    .map(|n| if n % 2 == 0 { self.number() } else { "{\"1e5\": \"\\\"2e9\\\\\"}".to_owned() })
                    .collect();
                format!("[{}]", parts.join(","))
            }
            Made::Path => format!("$.a ? (@ > {} /* \" */ || @ == \"x\")", self.number()),
            Made::Text => {
                let length = self.random.random_range(0..12);
                (0..length)
                    .map(|_| *b"ae15 \",\\(){}"[self.random.random_range(0..12)..].first().unwrap_or(&b'a') as char)
                    .collect()
            }
            Made::Domain(inside) => self.value(inside),
            Made::Array(inside) => {
                let parts: Vec<String> = (0..self.random.random_range(0..4))
                    .map(|_| {
                        let value = self.value(inside);
                        self.part(&value)
                    })
                    .collect();
                format!("{{{}}}", parts.join(","))
            }
            Made::Composite(attributes) => {
                let parts: Vec<String> = attributes
                    .iter()
                    .map(|attribute| {
                        let value = self.value(attribute);
                        self.part(&value)
                    })
                    .collect();
                format!("({})", parts.join(","))
            }
            Made::Range(bound) => {
                let value = self.value(bound);
                format!("[{},)", self.part(&value))
            }
            Made::Multirange(bound) => {
                let value = self.value(bound);
                format!("{{(,{}]}}", self.part(&value))
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn values_of_any_type_become_at_most_as_long_as_foreseen() -> Result<()> {
    const COLUMNS: usize = 120;
    const VALUES: usize = 25;
    let seed = std::env::var("MILLSTREAM_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    let mut types = Types { random: StdRng::seed_from_u64(seed), sql: String::new(), made: 0 };
    let kinds: Vec<Kind> = (0..COLUMNS).map(|n| types.of(n % 5)).collect();
    let columns: Vec<String> = kinds.iter().enumerate().map(|(n, kind)| format!("c{n} {}", kind.name)).collect();
    let schema = format!("{} CREATE TABLE kinds (id serial PRIMARY KEY, {})", types.sql, columns.join(", "));
    let config = "[tables.kinds]\nscope = { kind = \"global\" }\n";
    let mut database = Database::with(&schema, config).await;
    let catalog = Catalog::load(&mut database.sql, &Config::read(&database.config)?, None).await?;
    let table = catalog.table("kinds").context("the table")?;
    let (mut taken, mut grown, mut longest) = (0, 0, 0_usize);
    for (n, kind) in kinds.iter().enumerate() {
        let column = &table.columns[n + 1];
        for _ in 0..VALUES {
            let value = types.value(kind);
            let insert = format!(
                "INSERT INTO kinds (c{n}) VALUES ($1::text::{}) RETURNING octet_length(concat(c{n}))",
                column.cast_type()
            );
            let written = sqlx::query_scalar(AssertSqlSafe(insert)).bind(&value).persistent(false);
            let written: i32 = match written.fetch_one(&mut database.sql).await {
                Ok(written) => written,
                // Too long, out of range, or text with a syntax of its own.
                Err(sqlx::Error::Database(error)) if error.code().is_some_and(|code| code.starts_with("22")) => {
                    continue;
                }
                Err(error) => return Err(error).with_context(|| format!("{}: {value}", kind.name)),
            };
            let (written, foreseen) = (written as usize, column.growth.of(&value));
            taken += 1;
            grown += usize::from(written > 2 * value.len() + 10);
            longest = longest.max(written.saturating_sub(2 * value.len()));
            ensure!(
                written <= 2 * value.len() + 2 + foreseen,
                "seed {seed}, {} ({:?}): {} bytes became {written}, foreseen {foreseen} more: {value}\n{}",
                kind.name,
                column.growth,
                value.len(),
                types.sql
            );
        }
    }
    println!("{taken} values taken, {grown} grew, by up to {longest} bytes");
    ensure!(taken > COLUMNS * VALUES / 2 && grown > taken / 10, "{taken} taken, {grown} grew");
    database.stack.stop().await;
    Ok(())
}

/// Column, type, and a value of few bytes that Postgres writes with many.
const WIDE: [(&str, &str, &str); 14] = [
    ("plain", "numeric", "1e131071"),
    ("small", "numeric", "1e-16383"),
    ("list", "numeric[]", "{1e131071,\"1e131071\"}"),
    ("escaped", "numeric[]", "{1\\e131071}"),
    ("json", "jsonb", "[1e131071, 1E+131071]"),
    ("jsons", "jsonb[]", "{\"[1e131071]\"}"),
    ("path", "jsonpath", "$ ? (@ > 1e131071)"),
    ("document", "document", "{\"a\": 1e131071}"),
    ("documents", "document2[]", "{\"[1e131071]\"}"),
    ("pair", "pair", "(1e131071,\"[1e131071]\")"),
    ("range", "numrange", "[\"1\"e\"131071\",)"),
    ("ranges", "nummultirange", "{[1e131071,)}"),
    ("scaled", "scaled[]", "{0,0,0,0,0,0,0,0,0,0}"),
    ("padded", "padded", "(x,y)"),
];

const WIDE_TYPES: &str = "
CREATE DOMAIN document AS jsonb;
CREATE DOMAIN document2 AS document;
CREATE TYPE pair AS (n numeric, d document2);
CREATE DOMAIN scale AS numeric(1000, 900);
CREATE DOMAIN scaled AS scale;
CREATE DOMAIN blanks AS char(10000);
CREATE TYPE padded AS (a blanks, b char(10000));
";

/// One change in a transaction, all of them, and many transactions: what is taken comes to no more than the limit when it is
/// read, what is refused is refused at once and names a column.
#[tokio::test(flavor = "multi_thread")]
async fn small_changes_do_not_become_large_rows() -> Result<()> {
    let columns: Vec<String> = WIDE.iter().map(|(name, sql_type, _)| format!("{name} {sql_type}")).collect();
    let schema = format!("{WIDE_TYPES} CREATE TABLE wide (id int PRIMARY KEY, {})", columns.join(", "));
    let names: Vec<String> = WIDE.iter().map(|(name, ..)| format!("{name:?}")).collect();
    let config = format!(
        "[tables.wide]\nscope = {{ kind = \"global\" }}\nwritable = [\"id\", {}]\nwrite.insert = \"true\"\nwrite.update = \"true\"\n",
        names.join(", ")
    );
    let mut database = Database::with(&schema, &config).await;
    let (mut client, mut id) = (Client::new(1, "ann"), 0);
    let mut insert = |set: &[(&str, &str)]| {
        id += 1;
        let set: Vec<_> = set.iter().map(|(name, value)| (*name, Some(*value))).collect();
        change("wide", Operation::Insert, &[("id", &id.to_string())], &set, 1)
    };
    // What Postgres writes for the rows that are there, each value by its type's output function.
    let read =
        format!("SELECT sum(octet_length(concat({})))::int8 FROM wide", { WIDE.map(|(name, ..)| name).join(", ") });
    for (name, sql_type, value) in WIDE {
        let one = database.batch(vec![client.submit(vec![insert(&[(name, value)])])]).await;
        ensure!(one[0].1.verdict == Verdict::Applied, "{name}: {one:?}");
        let bytes: i64 = sqlx::query_scalar(AssertSqlSafe(read.clone())).fetch_one(&mut database.sql).await?;
        ensure!(bytes > 9_000, "{name} does not grow: {bytes}");
        // The most that are taken at once, and one more.
        let (mut fits, mut fails) = (0, 1_001);
        while fits + 1 < fails {
            let count = (fits + fails) / 2;
            sqlx::query("TRUNCATE wide").execute(&mut database.sql).await?;
            let began = std::time::Instant::now();
            let changes = (0..count).map(|_| insert(&[(name, value)])).collect();
            let results = database.batch(vec![client.submit(changes)]).await;
            let bytes: Option<i64> =
                sqlx::query_scalar(AssertSqlSafe(read.clone())).fetch_one(&mut database.sql).await?;
            match &results[0].1.failure {
                None => {
                    fits = count;
                    let limit = (MAX_ROW_BYTES + 2 * count * value.len()) as i64;
                    ensure!(bytes.is_some_and(|bytes| bytes <= limit), "{count} {name} became {bytes:?} bytes");
                }
                Some(failure) => {
                    fails = count;
                    ensure!(bytes.is_none(), "{name}: refused, and written");
                    ensure!(failure.code == Code::InvalidValue, "{name}: {failure:?}");
                    ensure!(failure.message.contains(&format!("wide.{name}")), "{name}: {failure:?}");
                    ensure!(began.elapsed().as_millis() < 1_000, "{name}: refused after {:?}", began.elapsed());
                }
            }
        }
        let bytes = bytes as usize;
        println!("{name} {sql_type}: {} bytes become {bytes}; at most {fits} in a transaction", value.len());
        ensure!(fits >= 1 && fails <= 1_000, "{name}: {fits} fit, {fails} do not");
        sqlx::query("TRUNCATE wide").execute(&mut database.sql).await?;
    }
    // All columns of a row count together.
    let all: Vec<(&str, &str)> = WIDE.iter().map(|(name, _, value)| (*name, *value)).collect();
    let results = database.batch(vec![client.submit((0..20).map(|_| insert(&all)).collect())]).await;
    ensure!(results[0].1.failure.as_ref().is_some_and(|failure| failure.code == Code::InvalidValue), "{results:?}");
    let results = database.batch(vec![client.submit(vec![insert(&all)])]).await;
    ensure!(results[0].1.verdict == Verdict::Applied, "{results:?}");
    database.stack.stop().await;
    Ok(())
}
