//! What SQLite stored is what is sent: random statements with every function and operator that SQLite has. Where a value that a
//! function gave still carried something besides its bytes, such as the JSON subtype, the two would differ.
//!
//! `MILLSTREAM_SEED` chooses other statements, `MILLSTREAM_CASES` how many.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use millstream_client_store::{StoreError, Table};
use millstream_schemas::{ColumnSchema, Numeric, Schema, TableSchema};
use rusqlite::types::Value;

use super::fixture::{Fixture, column};
use super::wide::with_schema;

/// Statements of an ordinary run.
const CASES: u64 = 3_000;
/// Functions that reach out of the statement.
const LEFT_OUT: [&str; 3] = ["load_extension", "sqlite_log", "fts3_tokenizer"];
/// Aggregates and window functions, which have rows of their own to work on.
const ROWS: &str = "(SELECT 1 AS v UNION ALL SELECT 'x' UNION ALL SELECT json('{\"k\":[1,\"y\"]}'))";

/// Columns of every kind, with what SQLite has for them.
const COLUMNS: [(&str, &str, Option<Numeric>); 17] = [
    ("txt", "text", None),
    ("json", "json", None),
    ("jsonb", "jsonb", None),
    ("small", "smallint", None),
    ("big", "bigint", None),
    ("dbl", "double precision", None),
    ("flag", "boolean", None),
    ("bytes", "bytea", None),
    ("num", "numeric", None),
    ("scaled", "numeric(8,2)", None),
    ("real", "numeric", Some(Numeric::Real)),
    ("units", "numeric(8,2)", Some(Numeric::Integer)),
    ("at", "timestamp with time zone", None),
    ("day", "date", None),
    ("uuid", "uuid", None),
    ("list", "text[]", None),
    ("mood", "mood", None),
];

/// Values to begin with, as SQL.
const VALUES: [&str; 40] = [
    "NULL",
    "0",
    "1",
    "-1",
    "2",
    "7",
    "255",
    "9223372036854775807",
    "1.5",
    "-0.25",
    "3.0",
    "1e20",
    "0.1",
    "''",
    "'a'",
    "'ü'",
    "'it''s \"quoted\"'",
    "'null'",
    "'true'",
    "'12'",
    "'-3.50'",
    "'%d %s'",
    "'$'",
    "'$.k'",
    "'$.k[0]'",
    "'{\"k\":[1,\"y\"]}'",
    "'[1,2]'",
    "'\"text\"'",
    "'2026-01-02'",
    "'2026-01-02T03:04:05Z'",
    "'+1 day'",
    "'%Y-%m-%d'",
    "x''",
    "x'00ff'",
    "x'6162'",
    "json('[\"z\"]')",
    "json('\"z\"')",
    "json('null')",
    "jsonb('{\"k\":2}')",
    "'A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11'",
];

const OPERATORS: [&str; 22] = [
    "+", "-", "*", "/", "%", "||", "->", "->>", "<<", ">>", "&", "|", "=", "<>", "<", ">=", "IS", "IS NOT", "LIKE",
    "GLOB", "AND", "OR",
];

struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        // xorshift64*, Vigna 2016.
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % n
    }

    fn of<'a, T: ?Sized>(&mut self, list: &[&'a T]) -> &'a T {
        list[self.below(list.len())]
    }
}

/// A function: its name, how many arguments it takes (-1: any number), and whether it works on rows.
#[derive(Clone, Debug)]
struct Function {
    name: String,
    arguments: i64,
    kind: String,
}

struct Generator {
    random: Random,
    functions: Vec<Function>,
    /// Names of those in the last expression.
    used: BTreeSet<String>,
}

impl Generator {
    fn expression(&mut self, depth: usize) -> String {
        if depth == 0 {
            return self.atom();
        }
        match self.random.below(10) {
            0..=5 => {
                let chosen = self.random.below(self.functions.len());
                self.call(chosen, depth - 1)
            }
            6 | 7 => {
                let operator = self.random.of(&OPERATORS);
                format!("({} {operator} {})", self.expression(depth - 1), self.expression(depth - 1))
            }
            8 => match self.random.below(6) {
                0 => format!("CASE WHEN {} THEN {} ELSE {} END", self.atom(), self.expression(depth - 1), self.atom()),
                1 => format!(
                    "CAST({} AS {})",
                    self.expression(depth - 1),
                    self.random.of(&["TEXT", "BLOB", "INTEGER", "REAL", "NUMERIC"])
                ),
                2 => format!("(SELECT value FROM json_each({}) LIMIT 1)", self.expression(depth - 1)),
                3 => format!("({} COLLATE NOCASE)", self.expression(depth - 1)),
                4 => format!("(- {})", self.expression(depth - 1)),
                _ => format!("(SELECT {} UNION SELECT NULL LIMIT 1 OFFSET 1)", self.expression(depth - 1)),
            },
            _ => self.atom(),
        }
    }

    fn call(&mut self, function: usize, depth: usize) -> String {
        let Function { name, arguments, kind } = self.functions[function].clone();
        let count = if arguments < 0 { self.random.below(5) } else { arguments as usize };
        let mut list: Vec<String> = (0..count).map(|_| self.expression(depth)).collect();
        self.used.insert(name.clone());
        match kind.as_str() {
            "s" => format!("{name}({})", list.join(", ")),
            _ => {
                if let Some(first) = list.first_mut().filter(|_| self.random.below(4) > 0) {
                    *first = "v".to_owned();
                }
                let over = if kind == "w" && self.random.below(2) == 0 { " OVER (ORDER BY v)" } else { "" };
                format!("(SELECT {name}({}){over} FROM {ROWS} LIMIT 1)", list.join(", "))
            }
        }
    }

    fn atom(&mut self) -> String {
        self.random.of(&VALUES).to_owned()
    }

    /// Statements for a row, and its id.
    fn statements(&mut self, case: u64) -> (String, Vec<String>) {
        // Each function in its turn, whatever chance chooses.
        let turn = case as usize % self.functions.len();
        self.used.clear();
        let depth = self.random.below(3);
        let chosen = match self.random.below(3) {
            0 => self.expression(2),
            _ => self.call(turn, depth),
        };
        let names: Vec<&str> = COLUMNS.iter().map(|(name, ..)| *name).collect();
        let (one, other) = (self.random.of(&names), self.random.of(&names));
        let second = self.expression(1);
        let fresh = format!("r{case}");
        let id = if self.random.below(2) == 0 { fresh } else { format!("r{}", self.random.below(case as usize + 1)) };
        let columns = if one == other { format!("id, {one}") } else { format!("id, {one}, {other}") };
        let values = if one == other { format!("'{id}', {chosen}") } else { format!("'{id}', {chosen}, {second}") };
        let set =
            if one == other { format!("{one} = {chosen}") } else { format!("{one} = {chosen}, {other} = {second}") };
        let statements = match self.random.below(9) {
            0 => vec![format!("INSERT INTO t ({columns}) VALUES ({values})")],
            1 => vec![format!("INSERT INTO t ({columns}) SELECT {values}")],
            2 => vec![format!("REPLACE INTO t ({columns}) VALUES ({values})")],
            3 => vec![format!("INSERT INTO t ({columns}) VALUES ({values}) ON CONFLICT (id) DO UPDATE SET {set}")],
            4 => vec![format!(
                "INSERT INTO t (id, {one}) VALUES ('{id}', {chosen}) ON CONFLICT (id) DO UPDATE SET {one} = excluded.{one}"
            )],
            5 => vec![
                format!("INSERT OR IGNORE INTO t (id) VALUES ('{id}')"),
                format!("UPDATE t SET {set} WHERE id = '{id}'"),
            ],
            6 => vec![
                format!("INSERT OR IGNORE INTO t (id) VALUES ('{id}')"),
                format!(
                    "UPDATE t SET {one} = source.x FROM (SELECT {chosen} AS x) AS source WHERE id = '{id}' RETURNING {one}"
                ),
            ],
            // By a trigger of the app's, with the value as it comes, and with what the trigger makes of it.
            7 => vec![format!("INSERT INTO inbox VALUES ('{id}', '{one}', {chosen})")],
            _ => vec![
                "DROP TRIGGER IF EXISTS made".to_owned(),
                format!(
                    "CREATE TRIGGER made AFTER INSERT ON outbox BEGIN \
                     INSERT INTO t (id, {one}) VALUES (NEW.id, {chosen}) ON CONFLICT (id) DO UPDATE SET {one} = {chosen}; END"
                ),
                format!("INSERT INTO outbox VALUES ('{id}')"),
            ],
        };
        (id, statements)
    }
}

/// The text that a stored value is sent as, made without SQL; none if it is null.
fn sent(column: &(&str, &str, Option<Numeric>), stored: &Value) -> Option<String> {
    let (_, sql_type, numeric) = column;
    let bytes = match stored {
        Value::Null => return None,
        Value::Blob(bytes) => bytes.clone(),
        Value::Text(text) => text.clone().into_bytes(),
        Value::Integer(number) => number.to_string().into_bytes(),
        Value::Real(number) => number.to_string().into_bytes(),
    };
    let text = || String::from_utf8(bytes.clone()).unwrap();
    Some(match (*sql_type, numeric, stored) {
        ("bytea", ..) => format!("\\x{}", bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>()),
        ("boolean", _, Value::Integer(0)) => "f".to_owned(),
        ("boolean", _, Value::Integer(1)) => "t".to_owned(),
        ("boolean", _, Value::Text(word)) if word == "true" || word == "false" => word[..1].to_owned(),
        (_, Some(Numeric::Integer), Value::Integer(units)) => {
            let (sign, units) = (if *units < 0 { "-" } else { "" }, units.abs());
            format!("{sign}{}.{:02}", units / 100, units % 100)
        }
        _ => text(),
    })
}

/// Whether a recorded text is that of the stored value. Floating-point numbers have many texts.
fn is_same(column: &(&str, &str, Option<Numeric>), stored: &Value, recorded: Option<&str>) -> bool {
    let number = |text: &str| text.parse::<f64>().ok();
    match (stored, recorded) {
        (Value::Real(real), Some(text)) if column.1 == "double precision" || column.2 == Some(Numeric::Real) => {
            number(text) == Some(*real)
        }
        // SQLite gives 15 digits where a column has no place for such a number.
        (Value::Real(real), Some(text)) if column.1 != "bytea" => {
            number(text).is_some_and(|n| (n - real).abs() <= real.abs() * 1e-14)
        }
        (Value::Real(_), Some(_)) => true,
        _ => sent(column, stored).as_deref() == recorded,
    }
}

fn fixture() -> Fixture {
    let columns = COLUMNS
        .iter()
        .map(|(name, sql_type, numeric)| ColumnSchema { numeric: *numeric, ..column(name, sql_type, true) });
    let table = TableSchema {
        name: "t".into(),
        columns: std::iter::once(column("id", "text", true)).chain(columns).collect(),
        key: vec![0],
        scopes: Vec::new(),
        references: Vec::new(),
        clocks: None,
    };
    let mut f = with_schema(&Schema { version: "1".into(), tables: vec![table] });
    f.write(&["CREATE TABLE inbox (id, name, value)", "CREATE TABLE outbox (id)"]).unwrap();
    let cases: Vec<String> = COLUMNS
        .iter()
        .map(|(name, ..)| format!("UPDATE t SET {name} = NEW.value WHERE id = NEW.id AND NEW.name = '{name}';"))
        .collect();
    let trigger = format!(
        "CREATE TRIGGER inbox_comes AFTER INSERT ON inbox BEGIN INSERT INTO t (id) VALUES (NEW.id) ON CONFLICT DO NOTHING; {} END",
        cases.join(" ")
    );
    f.write(&[&trigger]).unwrap();
    f
}

#[test]
fn what_sqlite_stored_is_what_is_recorded() {
    let setting = |name: &str, or| std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(or);
    let (seed, cases) = (setting("MILLSTREAM_SEED", 1), setting("MILLSTREAM_CASES", CASES));
    let mut f = fixture();
    let functions: Vec<Function> = f
        .read("SELECT DISTINCT name, narg, type FROM pragma_function_list WHERE builtin ORDER BY name, narg")
        .lines()
        .map(|line| line.split('|').collect::<Vec<_>>())
        // Operators are in the list under their names.
        .filter(|parts| parts[0].starts_with(|c: char| c.is_ascii_alphabetic()) && !LEFT_OUT.contains(&parts[0]))
        .map(|parts| Function { name: parts[0].into(), arguments: parts[1].parse().unwrap(), kind: parts[2].into() })
        .collect();
    assert!(functions.len() > 100, "{}", functions.len());
    let mut generator = Generator { random: Random(seed + 0x9e37_79b9_7f4a_7c15), functions, used: BTreeSet::new() };
    let mut rows: HashMap<String, BTreeMap<String, Option<String>>> = HashMap::new();
    let (mut worked, mut recorded) = (BTreeSet::new(), 0);
    for case in 0..cases {
        let (id, statements) = generator.statements(case);
        let written = f.store.write(None, |tx| -> Result<(Table, Table), StoreError> {
            for statement in &statements {
                tx.execute(statement, &[])?;
            }
            let changes =
                tx.query("SELECT op, columns, vals FROM local_changes WHERE tx = millstream_tx() ORDER BY id", &[])?;
            Ok((changes, tx.query("SELECT * FROM t WHERE id = ?1", &[Value::Text(id.clone())])?))
        });
        // Whatever SQLite or the store refuses leaves nothing behind.
        let Ok(written) = written else { continue };
        let (changes, stored) = written.value;
        let row = rows.entry(id.clone()).or_default();
        for change in &changes.rows {
            let [Value::Text(op), Value::Text(columns), Value::Text(values)] = &change[..] else {
                panic!("{change:?}")
            };
            if op == "insert" {
                row.clear();
            }
            let columns: Vec<String> = serde_json::from_str(columns).unwrap();
            let values: Vec<Option<String>> = serde_json::from_str(values)
                .unwrap_or_else(|error| panic!("seed {seed}, {statements:?}: {values}: {error}"));
            recorded += columns.len();
            row.extend(columns.into_iter().zip(values));
        }
        for (column, value) in COLUMNS.iter().zip(stored.rows.first().into_iter().flat_map(|row| &row[1..])) {
            let sent = row.get(column.0).cloned().flatten();
            assert!(
                is_same(column, value, sent.as_deref()),
                "seed {seed}, case {case}: {statements:#?}\n{column:?} is {value:?}, and recorded as {sent:?}"
            );
        }
        worked.append(&mut generator.used);
    }
    let names: BTreeSet<&str> = generator.functions.iter().map(|function| function.name.as_str()).collect();
    let never: Vec<&&str> = names.iter().filter(|name| !worked.contains(**name)).collect();
    println!("{recorded} values recorded by {} functions; never worked: {never:?}", worked.len());
    if cases >= CASES {
        assert!(never.iter().all(|name| !name.contains("json")), "{never:?}");
        assert!(worked.len() * 10 > names.len() * 8, "{never:?}");
    }
}
