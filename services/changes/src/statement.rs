//! The SQL that writes: one static text per (table, operation, set of columns), for any number of rows.
//!
//! Its only parameter is a JSON array with an object a row: `k` the key, `v` the values in column order, `u` the user
//! and `c` the client. Values arrive as text and are cast to their column's type, so what Postgres once wrote reads back
//! exactly. The permission predicate is evaluated in the same statement, for the row that is written.
//!
//! Identifiers come from the catalog alone.

use std::collections::HashMap;
use std::sync::Arc;

use millstream_catalog::Table;
use millstream_schemas::{Operation, Value};
use serde::Serialize;
use uuid::Uuid;

use crate::validator::{Step, rule};

/// Most texts kept; column sets are the clients' choice, so there can be many.
const MAX_CACHED: usize = 1_000;

/// What the database says of a table beyond the catalog; it bounds how far rows may share a statement.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Traits {
    /// It has triggers that see all rows of a statement at once, so that several rows differ from one after another.
    pub statement_triggers: bool,
    /// Deleting or updating its rows may write others.
    pub cascades: bool,
    /// What it stores may depend on `millstream.user_id`: triggers, row security, defaults or checks that call functions.
    pub personal: bool,
}

/// A text, and how far rows may share it.
#[derive(Debug)]
pub(crate) struct Statement {
    /// Writes the rows.
    pub sql: Arc<str>,
    /// Counts those of the rows that exist, by key.
    pub count_sql: Arc<str>,
    /// One row at a time, since the outcome for a row may depend on the rows before it.
    pub alone: bool,
    /// Rows of one user and client only, since more than the predicate's `auth` may read who writes.
    pub personal: bool,
}

/// One row of a statement's parameter.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct InputRow<'a> {
    k: &'a [Value],
    v: &'a [Option<&'a str>],
    u: &'a str,
    c: Uuid,
}

impl<'a> InputRow<'a> {
    /// The row of a checked change.
    pub fn new(step: &'a Step<'a>, user_id: &'a str, client_id: Uuid) -> Self {
        InputRow { k: step.key, v: &step.values, u: user_id, c: client_id }
    }

    fn same_identity(&self, other: &InputRow<'_>) -> bool {
        self.c == other.c && self.u == other.u
    }
}

/// Consecutive changes that one statement applies.
#[derive(Debug)]
pub(crate) struct Run<'a> {
    /// How.
    pub statement: Arc<Statement>,
    /// To what; their number is the number of rows that must be affected.
    pub rows: Vec<InputRow<'a>>,
}

/// The texts made so far.
#[derive(Debug, Default)]
pub(crate) struct Statements {
    traits: HashMap<u32, Traits>,
    cache: HashMap<(u32, Operation, Vec<usize>), Arc<Statement>>,
}

impl Statements {
    /// Starts with what the database says of tables, by object id.
    pub fn new(traits: HashMap<u32, Traits>) -> Self {
        Statements { traits, cache: HashMap::new() }
    }

    /// The statement for a change.
    pub fn of(&mut self, step: &Step<'_>) -> Arc<Statement> {
        let shape = (step.table.oid, step.op, step.columns.clone());
        if let Some(statement) = self.cache.get(&shape) {
            return statement.clone();
        }
        if self.cache.len() >= MAX_CACHED {
            self.cache.clear();
        }
        // Without knowledge of the table: one by one.
        let traits = self.traits.get(&step.table.oid).copied().unwrap_or(Traits {
            statement_triggers: true,
            cascades: true,
            personal: true,
        });
        let statement = Arc::new(write(step.table, step.op, &step.columns, traits));
        self.cache.insert(shape, statement.clone());
        statement
    }

    /// Cuts changes into runs of one statement each, keeping their order.
    pub fn runs<'a>(&mut self, steps: impl Iterator<Item = (&'a Step<'a>, &'a str, Uuid)>) -> Vec<Run<'a>> {
        let mut runs: Vec<Run<'a>> = Vec::new();
        for (step, user_id, client_id) in steps {
            let row = InputRow::new(step, user_id, client_id);
            let statement = self.of(step);
            match runs.last_mut() {
                Some(run)
                    if Arc::ptr_eq(&run.statement, &statement)
                        && !statement.alone
                        && (!statement.personal || run.rows[0].same_identity(&row))
                        && !run.rows.iter().any(|other| other.k == row.k) =>
                {
                    run.rows.push(row);
                }
                _ => runs.push(Run { statement, rows: vec![row] }),
            }
        }
        runs
    }
}

/// `auth`, evaluated for each row: sets who writes for triggers and defaults, and shows it to the predicate.
const AUTH: &str = "LATERAL (SELECT set_config('millstream.user_id', millstream_input.e->>'u', true) AS user_id, \
                    (millstream_input.e->>'c')::uuid AS client_id OFFSET 0) AS auth";
const INPUT: &str = "jsonb_array_elements($1::jsonb) WITH ORDINALITY AS millstream_input(e, i)";

fn write(table: &Table, op: Operation, columns: &[usize], traits: Traits) -> Statement {
    let name = &table.sql_name;
    let column = |index: usize| table.columns[index].sql_name.as_str();
    let list = |separator: &str, text: &dyn Fn(usize) -> String| {
        (0..table.columns.len()).map(text).collect::<Vec<_>>().join(separator)
    };
    let value = |index: usize| {
        let place = columns.iter().position(|set| *set == index)?;
        Some(format!("(millstream_input.e->'v'->>{place})::{}", cast_type(&table.columns[index].sql_type)))
    };
    let key: Vec<String> = table
        .key
        .iter()
        .enumerate()
        .map(|(place, index)| {
            let r#type = cast_type(&table.columns[*index].sql_type);
            format!("old.{} = (millstream_input.e->'k'->>{place})::{type}", column(*index))
        })
        .collect();
    let key = key.join(" AND ");
    // The validator lets no operation through that has no rule.
    let rule = rule(table, op).unwrap_or("false");
    // `auth` has to be evaluated before anything of the rule, and before triggers: the CASE makes the rule depend on it,
    // whatever the planner would like to evaluate early. The line ends keep a comment at a rule's end within the rule.
    let guarded = |rule: &str| format!("CASE WHEN auth.user_id IS NOT NULL THEN (\n{rule}\n) ELSE false END");
    let sql = match op {
        Operation::Insert => {
            let names: Vec<&str> = columns.iter().map(|index| column(*index)).collect();
            let new = list(", ", &|index| {
                let value =
                    value(index).unwrap_or_else(|| format!("NULL::{}", cast_type(&table.columns[index].sql_type)));
                format!("{value} AS {}", column(index))
            });
            let selected: Vec<String> = names.iter().map(|name| format!("new.{name}")).collect();
            format!(
                "INSERT INTO {name} ({})\nSELECT {}\nFROM {INPUT}, {AUTH}, LATERAL (SELECT {new} OFFSET 0) AS new\nWHERE {}\nORDER BY millstream_input.i",
                names.join(", "),
                selected.join(", "),
                guarded(rule),
            )
        }
        Operation::Update => {
            let set: Vec<String> =
                columns.iter().filter_map(|index| Some(format!("{} = {}", column(*index), value(*index)?))).collect();
            let new = list(", ", &|index| {
                let value = value(index).unwrap_or_else(|| format!("old.{}", column(index)));
                format!("{value} AS {}", column(index))
            });
            // `old` is the target itself, so that the rule is evaluated again for a row that changed meanwhile.
            format!(
                "UPDATE {name} AS old SET {}\nFROM {INPUT}, {AUTH}\nWHERE {key} AND {}",
                set.join(", "),
                guarded(&format!("SELECT (\n{rule}\n) FROM (SELECT {new}) AS new")),
            )
        }
        Operation::Delete => {
            format!("DELETE FROM {name} AS old USING {INPUT}, {AUTH}\nWHERE {key} AND {}", guarded(rule))
        }
    };
    let count_sql = format!("SELECT count(*) FROM {INPUT}, {name} AS old WHERE {key}");
    let cascades = traits.cascades && op != Operation::Insert;
    Statement {
        sql: format!("/* millstream {} */ {sql}", op.as_str()).into(),
        count_sql: count_sql.into(),
        alone: traits.statement_triggers || cascades || mentions(rule, &table.name),
        personal: traits.personal || calls_functions(rule),
    }
}

/// The type to cast text to: without the length, so that a value that is too long is refused by the assignment that
/// follows instead of being cut by the cast.
fn cast_type(sql_type: &str) -> String {
    let Some((name, rest)) = sql_type.split_once('(').filter(|_| !sql_type.starts_with('"') && !sql_type.contains('.'))
    else {
        return match sql_type {
            "character" => "bpchar".to_owned(),
            "bit" => "bit varying".to_owned(),
            other => other.to_owned(),
        };
    };
    let suffix = rest.split_once(')').map_or("", |(_, suffix)| suffix);
    let name = match name {
        "character" => "bpchar",
        "bit" => "bit varying",
        other => other,
    };
    format!("{name}{suffix}")
}

/// Identifiers of a SQL text outside of string literals, in lower case, each with whether `(` follows.
fn words(sql: &str) -> Vec<(String, bool)> {
    let mut words: Vec<(String, bool)> = Vec::new();
    let mut after_word = false;
    let mut characters = sql.chars().peekable();
    while let Some(character) = characters.next() {
        match character {
            space if space.is_whitespace() => continue,
            '\'' => {
                while characters.next().is_some_and(|c| c != '\'') {}
                after_word = false;
            }
            '"' => {
                words.push((
                    characters.by_ref().take_while(|c| *c != '"').flat_map(char::to_lowercase).collect(),
                    false,
                ));
                after_word = true;
            }
            '(' => {
                if let Some(last) = words.last_mut().filter(|_| after_word) {
                    last.1 = true;
                }
                after_word = false;
            }
            first if first.is_alphabetic() || first == '_' => {
                let mut word = first.to_lowercase().collect::<String>();
                while let Some(next) = characters.next_if(|c| c.is_alphanumeric() || *c == '_' || *c == '$') {
                    word.extend(next.to_lowercase());
                }
                words.push((word, false));
                after_word = true;
            }
            _ => after_word = false,
        }
    }
    words
}

/// Whether a rule reads the table by name.
fn mentions(rule: &str, table: &str) -> bool {
    // Without its schema, as a rule would name it.
    let table = table.rsplit('.').next().unwrap_or(table).to_lowercase();
    words(rule).iter().any(|(word, _)| *word == table)
}

/// Whether a rule may call a function other than plain ones of Postgres: it could read `millstream.user_id`.
fn calls_functions(rule: &str) -> bool {
    const HARMLESS: [&str; 24] = [
        "exists", "in", "any", "all", "some", "and", "or", "not", "select", "from", "where", "on", "as", "join",
        "then", "else", "when", "coalesce", "lower", "upper", "length", "now", "count", "nullif",
    ];
    words(rule).iter().any(|(word, call)| *call && !HARMLESS.contains(&word.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::validator::tests::{change, only, tasks};
    use crate::validator::validate;

    fn sql(op: Operation, columns: &[usize]) -> String {
        write(&tasks(), op, columns, Traits::default()).sql.to_string()
    }

    fn has(sql: &str, parts: &[&str]) {
        for part in parts {
            assert!(sql.contains(part), "{part} in\n{sql}");
        }
    }

    #[test]
    fn texts_hold_what_they_must() {
        let insert = sql(Operation::Insert, &[0, 1]);
        has(
            &insert,
            &[
                "INSERT INTO \"public\".\"tasks\" (\"id\", \"title\")",
                "(millstream_input.e->'v'->>0)::uuid AS \"id\"",
                "(millstream_input.e->'v'->>1)::character varying AS \"title\"",
                "NULL::boolean AS \"done\"",
                "(\nnew.title <> ''\n)",
                "ORDER BY",
            ],
        );
        let update = sql(Operation::Update, &[2]);
        has(
            &update,
            &[
                "UPDATE \"public\".\"tasks\" AS old SET \"done\" = (millstream_input.e->'v'->>0)::boolean",
                "old.\"id\" = (millstream_input.e->'k'->>0)::uuid",
                "old.\"title\" AS \"title\"",
                "EXISTS (SELECT FROM members m",
            ],
        );
        // No rule: nobody may.
        has(&sql(Operation::Delete, &[]), &["DELETE FROM \"public\".\"tasks\" AS old USING", "THEN (\nfalse\n)"]);
        for text in [insert, update] {
            assert!(!text.contains("$2"), "{text}");
        }
    }

    #[test]
    fn casts_do_not_cut_values() {
        for (declared, cast) in [
            ("uuid", "uuid"),
            ("character varying(20)", "character varying"),
            ("character varying(20)[]", "character varying[]"),
            ("character(5)", "bpchar"),
            ("bit(3)", "bit varying"),
            ("numeric(10,2)", "numeric"),
            ("timestamp(3) with time zone", "timestamp with time zone"),
            ("board.status", "board.status"),
            ("\"Odd (name)\"", "\"Odd (name)\""),
        ] {
            assert_eq!(cast_type(declared), cast);
        }
    }

    #[test]
    fn rules_are_read_for_what_they_depend_on() {
        assert!(mentions("EXISTS (SELECT FROM members m)", "members"));
        assert!(mentions("EXISTS (SELECT FROM public.\"members\" m)", "members"));
        assert!(mentions("EXISTS (SELECT FROM MEMBERS)", "members"));
        assert!(!mentions("new.members_count > 1 AND new.x <> 'members'", "members"));
        assert!(!calls_functions(
            "EXISTS (SELECT FROM m WHERE (m.a = new.a) AND m.b IN (1, 2)) OR lower(new.x) = 'f(x)'"
        ));
        assert!(calls_functions("is_member(new.project_id)"));
        assert!(calls_functions("current_setting ('millstream.user_id') = new.owner"));
        assert!(!calls_functions("new.a = (1) OR ((new.b))"));
    }

    fn runs(changes: &[(Operation, &str, u128)], traits: Traits) -> Vec<usize> {
        let table = tasks();
        let submissions: Vec<_> = changes
            .iter()
            .map(|(op, key, client)| millstream_schemas::stream::Submission {
                client_id: Uuid::from_u128(*client),
                user_id: client.to_string(),
                instance: Uuid::nil(),
                previous: None,
                after: Vec::new(),
                seq: 1,
                attempt: 1,
                changes: vec![match op {
                    Operation::Insert => change(*op, key, &[("id", Some(*key)), ("title", Some("x"))]),
                    _ => change(*op, key, &[("title", Some("x"))]),
                }],
                traceparent: None,
            })
            .collect();
        let checked: Vec<_> = submissions.iter().map(|s| (validate(only(&table), s).unwrap(), s)).collect();
        let mut statements = Statements::new([(1, traits)].into());
        let steps =
            checked.iter().flat_map(|(steps, s)| steps.iter().map(|step| (step, s.user_id.as_str(), s.client_id)));
        statements.runs(steps).iter().map(|run| run.rows.len()).collect()
    }

    #[test]
    fn runs_break_where_order_or_identity_matters() {
        use Operation::{Insert, Update};
        let free = Traits::default();
        assert_eq!(runs(&[], free), Vec::<usize>::new());
        assert_eq!(runs(&[(Insert, "1", 1), (Insert, "2", 1), (Insert, "3", 2)], free), [3]);
        assert_eq!(runs(&[(Insert, "1", 1), (Update, "1", 1), (Insert, "2", 1)], free), [1, 1, 1]);
        assert_eq!(runs(&[(Update, "1", 1), (Update, "2", 1), (Update, "1", 1)], free), [2, 1]);
        let personal = Traits { personal: true, ..free };
        assert_eq!(runs(&[(Insert, "1", 1), (Insert, "2", 1), (Insert, "3", 2)], personal), [2, 1]);
        let triggers = Traits { statement_triggers: true, ..free };
        assert_eq!(runs(&[(Insert, "1", 1), (Insert, "2", 1)], triggers), [1, 1]);
        // A rule that reads the table that is written.
        let mut table = tasks();
        table.write.update = Some("EXISTS (SELECT FROM tasks)".into());
        assert!(write(&table, Update, &[2], free).alone);
        assert!(!write(&table, Insert, &[0], free).alone);
    }
}
