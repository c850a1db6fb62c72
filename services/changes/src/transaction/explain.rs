//! Why a change was not written: the words of a refusal, and which value is at fault.

use millstream_catalog::{Column, Table};
use millstream_schemas::{Code, Operation};
use sqlx::postgres::PgArguments;
use sqlx::query::Query;
use sqlx::{AssertSqlSafe, PgConnection, Postgres, Row};

use crate::decide::validator::CheckedChange;
use crate::error::{Fault, Refusal, classify, may_be_a_value, must_not_be_null};
use crate::sql::statement::{InputRow, Statement, bind};

/// What became of a change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Won,
    /// It lost to newer changes, in part or as a whole; `winner` is the newest clock among them.
    Lost {
        whole: bool,
        winner: String,
    },
    /// It was refused, and nothing written.
    Refused(Refusal),
    /// It was refused after a trigger left it out: what that did meanwhile has to be undone.
    Undone(Refusal),
}

/// What the database says of a row that was not written.
#[derive(Clone, Debug, Default)]
struct Unwritten {
    found: bool,
    /// True also of rows of which it does not matter.
    readable: bool,
    allowed: bool,
    broken: Option<i32>,
    wins: bool,
    winner: Option<String>,
}

/// What is known of a row that was not written.
pub(crate) struct Explained {
    /// None if it could have been.
    pub outcome: Option<Outcome>,
    /// That it is there is not the user's to know.
    pub hidden: bool,
    /// Version of the row, where this transaction made it.
    pub version: Option<String>,
}

/// Asks about rows that were not written.
pub(crate) async fn outcomes(
    query: Query<'_, Postgres, PgArguments>,
    connection: &mut PgConnection,
    statement: &Statement,
    table: &Table,
) -> Result<Vec<Explained>, sqlx::Error> {
    let rows = query.fetch_all(connection).await?;
    rows.iter()
        .map(|row| {
            let found = Unwritten {
                found: row.try_get("found")?,
                readable: row.try_get("readable")?,
                allowed: row.try_get("allowed")?,
                broken: row.try_get("broken")?,
                wins: row.try_get("wins")?,
                winner: row.try_get("winner")?,
            };
            let hidden = !found.readable;
            Ok(Explained { outcome: outcome(statement, table, found), hidden, version: row.try_get("version")? })
        })
        .collect()
}

/// Of a row that is not there, or that the user neither may read nor write: that it is there is not theirs to know.
pub(crate) fn missing(op: Operation, table: &Table) -> Outcome {
    if op == Operation::Delete && table.delete_missing_accepted {
        return Outcome::Won;
    }
    Outcome::Refused(Refusal::new(Code::EntityMissing, format!("{} has no row with this key", table.name)))
}

/// Of a row that could be written, and was not: neither rules nor rights nor newer changes were against it.
pub(crate) fn left_out(op: Operation, table: &Table) -> Outcome {
    let message = format!("a trigger or rule of the database left out the {} of a row of {}", op.as_str(), table.name);
    Outcome::Refused(Refusal::new(Code::NotWritten, message))
}

/// In this order: is it there, may they, do the rules hold, is it newer.
fn outcome(statement: &Statement, table: &Table, found: Unwritten) -> Option<Outcome> {
    let op = statement.shape.op;
    if !found.found || !(found.allowed || found.readable) {
        return Some(missing(op, table));
    }
    if !found.allowed {
        let message = format!("the rule for {} on {} does not allow it", op.as_str(), table.name);
        return Some(Outcome::Refused(Refusal::new(Code::PermissionDenied, message)));
    }
    if let Some((code, message)) = found.broken.and_then(|broken| statement.rules.get(usize::try_from(broken).ok()?)) {
        return Some(Outcome::Refused(Refusal::by(Some(code), Code::BusinessRule, message)));
    }
    (!found.wins).then(|| Outcome::Lost { whole: true, winner: found.winner.unwrap_or_default() })
}

/// Whether the types that values are cast to are still called so.
const TYPES_EXIST: &str =
    "SELECT coalesce(bool_and(to_regtype(name) IS NOT NULL), true) FROM unnest($1::text[]) AS t (name)";

/// Finds out whether a statement failed for a value of its one row, by casting one after the other; leaves the transaction failed
/// where that is so. Each type has SQLSTATEs of its own for that: what counts is that the cast fails. Values for a row that is not
/// the user's to know tell nothing of it, unless the user made it (`own`).
pub(crate) async fn value_at_fault(
    connection: &mut PgConnection,
    statement: &Statement,
    row: &InputRow<'_>,
    own: bool,
) -> Result<Option<Refusal>, sqlx::Error> {
    let step = row.step;
    let keys = step.table.key.iter().zip(step.key).filter_map(|(index, part)| Some((*index, part.as_deref()?)));
    let values = step.columns.iter().zip(&step.values).filter_map(|(index, value)| Some((*index, (*value)?)));
    let (keys, values): (Vec<_>, Vec<_>) = (keys.collect(), values.collect());
    let types = keys.iter().chain(&values).map(|(index, _)| step.table.columns[*index].cast_type());
    let exist = sqlx::query_scalar::<_, bool>(TYPES_EXIST).bind(types.collect::<Vec<_>>());
    if !exist.fetch_one(&mut *connection).await? {
        return Ok(None);
    }
    if let Some(refusal) = misfit_among(connection, step.table, &keys).await? {
        return Ok(Some(refusal));
    }
    if step.op != Operation::Insert && !own {
        let readable = sqlx::query(AssertSqlSafe(statement.readable_sql.clone()));
        match bind(readable, step.op, &[*row]).fetch_one(&mut *connection).await.and_then(|row| row.try_get(0)) {
            Ok(true) => {}
            Ok(false) => {
                let Outcome::Refused(refusal) = missing(step.op, step.table) else { return Ok(None) };
                return Ok(Some(refusal));
            }
            Err(error) if matches!(classify(&error), Fault::Server | Fault::Gone) => return Err(error),
            // The table has changed, perhaps.
            Err(_) => return Ok(None),
        }
    }
    misfit_among(connection, step.table, &values).await
}

/// The column of this domain, which is never null, that a change leaves null. None: a trigger has, perhaps.
pub(crate) async fn null_at_fault(
    connection: &mut PgConnection,
    step: &CheckedChange<'_>,
    schema: &str,
    domain: &str,
) -> Result<Option<Refusal>, sqlx::Error> {
    let found = sqlx::query_scalar::<_, i64>(
        "SELECT t.oid::int8 FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace WHERE nspname = $1 AND typname = $2",
    );
    let oid = found.bind(schema).bind(domain).fetch_optional(connection).await?;
    let of_domain = |column: &Column| Some(i64::from(column.type_oid)) == oid;
    let null = step.columns.iter().zip(&step.values).filter(|(_, value)| value.is_none());
    let mut null = null.map(|(index, _)| &step.table.columns[*index]);
    let mut columns = step.table.columns.iter().enumerate();
    let left_out = || {
        let is_left_out = |(index, column): &(usize, &Column)| {
            step.op == Operation::Insert && column.default.is_none() && !step.columns.contains(index)
        };
        columns.find(|found| is_left_out(found) && of_domain(found.1)).map(|(_, column)| column)
    };
    let column = null.find(|column| of_domain(column)).or_else(left_out);
    Ok(column.map(|column| Refusal::new(Code::BusinessRule, must_not_be_null(&column.name))))
}

/// The first of the values, by indexes of columns, that Postgres cannot take. The message names no value.
async fn misfit_among(
    connection: &mut PgConnection,
    table: &Table,
    values: &[(usize, &str)],
) -> Result<Option<Refusal>, sqlx::Error> {
    for (index, value) in values {
        let column = &table.columns[*index];
        let sql_type = column.domain.as_ref().unwrap_or(&column.sql_type);
        let cast = format!("SELECT $1::text::{} IS NULL", column.cast_type());
        // The type's own reading of a text looks at its length too; a JSON text would be taken as it is.
        let read = format!("SELECT v IS NULL FROM json_to_record(json_build_object('v', $1::text)) AS r(v {sql_type})");
        for sql in [cast, read] {
            let tried = sqlx::query(AssertSqlSafe(sql)).bind(*value).persistent(false).fetch_one(&mut *connection);
            let Err(error) = tried.await else { continue };
            return match classify(&error) {
                Fault::Server | Fault::Gone => Err(error),
                // A domain's check, say.
                Fault::Verdict(refusal) if !may_be_a_value(&error) => Ok(Some(refusal)),
                Fault::Verdict(_) | Fault::Unknown => {
                    let name = format!("{}.{}", table.name, column.name);
                    let state = error.as_database_error().and_then(|error| error.code()).unwrap_or_default();
                    Ok(Some(Refusal::new(Code::InvalidValue, misfit(&state, &name, sql_type))))
                }
            };
        }
    }
    Ok(None)
}

/// What is wrong with a value, by SQLSTATE.
fn misfit(state: &str, column: &str, sql_type: &str) -> String {
    match state {
        "22001" | "22026" => format!("the value for {column} is too long for {sql_type}"),
        "22003" | "22008" => format!("the value for {column} is out of the range of {sql_type}"),
        _ if state.starts_with("54") => {
            format!("the value for {column} is too large or too deeply nested for {sql_type}")
        }
        _ => format!("the value for {column} is not a valid {sql_type}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decide::validator::tests::{change, only, submission, tasks};
    use crate::decide::validator::validate;
    use crate::sql::statement::Statements;

    #[test]
    fn the_first_reason_counts() {
        let mut table = tasks();
        table.write.delete = Some("true".into());
        table.rules = vec![millstream_catalog::Rule {
            code: "title_too_short".into(),
            message: "A title has a letter.".into(),
            on: vec![Operation::Update],
            check: "new.title <> ''".into(),
        }];
        let check = |table: &Table, op, found: Unwritten, expected: Result<Option<&str>, (Code, Option<&str>)>| {
            let set: &[_] = if op == Operation::Delete { &[] } else { &[("title", Some("x"))] };
            let submission = submission(vec![change(op, "1", set)]);
            let steps = validate(only(table), &submission).unwrap();
            let statement = Statements::default().of(&steps[0]);
            let found = match outcome(&statement, table, found) {
                Some(Outcome::Refused(refusal) | Outcome::Undone(refusal)) => Err((refusal.code, refusal.rule)),
                Some(Outcome::Lost { winner, .. }) => Ok(Some(winner)),
                Some(Outcome::Won) => Ok(Some("won".to_owned())),
                None => Ok(None),
            };
            let expected =
                expected.map(|w| w.map(str::to_owned)).map_err(|(code, rule)| (code, rule.map(str::to_owned)));
            assert_eq!(found, expected);
        };
        let all = Unwritten {
            found: true,
            readable: true,
            allowed: true,
            broken: None,
            wins: true,
            winner: Some("9".into()),
        };
        let missing =
            Unwritten { found: false, readable: true, allowed: false, broken: None, wins: false, winner: None };
        let (update, delete) = (Operation::Update, Operation::Delete);
        check(&table, update, missing.clone(), Err((Code::EntityMissing, None)));
        check(&table, delete, missing.clone(), Err((Code::EntityMissing, None)));
        let denied = Unwritten { allowed: false, broken: Some(0), wins: false, ..all.clone() };
        check(&table, update, denied.clone(), Err((Code::PermissionDenied, None)));
        let hidden = Unwritten { readable: false, ..denied };
        check(&table, update, hidden.clone(), Err((Code::EntityMissing, None)));
        check(&table, delete, hidden.clone(), Err((Code::EntityMissing, None)));
        check(&table, update, Unwritten { readable: false, ..all.clone() }, Ok(None));
        let broken = Unwritten { broken: Some(0), wins: false, ..all.clone() };
        check(&table, update, broken, Err((Code::BusinessRule, Some("title_too_short"))));
        check(&table, update, Unwritten { wins: false, ..all.clone() }, Ok(Some("9")));
        check(&table, update, all, Ok(None));
        table.delete_missing_accepted = true;
        check(&table, delete, missing, Ok(Some("won")));
        check(&table, delete, hidden, Ok(Some("won")));
    }
}
