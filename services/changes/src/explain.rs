//! Why a change was not written: the words of a refusal, and which value is at fault.

use millstream_catalog::Table;
use millstream_schemas::{Code, Operation};
use sqlx::postgres::PgArguments;
use sqlx::query::Query;
use sqlx::{AssertSqlSafe, PgConnection, Postgres, Row};

use crate::apply::Outcome;
use crate::error::{Fault, Refusal, bounded, classify, names_values};
use crate::statement::Statement;
use crate::validator::Step;

/// What the database says of a row that was not written.
#[derive(Clone, Debug, Default)]
struct Found {
    found: bool,
    allowed: bool,
    broken: Option<i32>,
    wins: bool,
    winner: Option<String>,
}

/// Asks about rows that were not written; none for one that could have been.
pub(crate) async fn outcomes(
    query: Query<'_, Postgres, PgArguments>,
    connection: &mut PgConnection,
    statement: &Statement,
    table: &Table,
) -> Result<Vec<Option<Outcome>>, sqlx::Error> {
    let rows = query.fetch_all(connection).await?;
    rows.iter()
        .map(|row| {
            let found = Found {
                found: row.try_get("found")?,
                allowed: row.try_get("allowed")?,
                broken: row.try_get("broken")?,
                wins: row.try_get("wins")?,
                winner: row.try_get("winner")?,
            };
            Ok(outcome(statement, table, found))
        })
        .collect()
}

/// In this order: is it there, may they, do the rules hold, is it newer.
fn outcome(statement: &Statement, table: &Table, found: Found) -> Option<Outcome> {
    let op = statement.shape.op;
    if !found.found {
        return Some(if op == Operation::Delete && table.delete_missing_accepted {
            Outcome::Won
        } else {
            // Also of a row that row security hides: that it is there is not theirs to know.
            Outcome::Refused(Refusal::new(Code::EntityMissing, format!("{} has no row with this key", table.name)))
        });
    }
    if !found.allowed {
        let message = format!("the rule for {} on {} does not allow it", op.as_str(), table.name);
        return Some(Outcome::Refused(Refusal::new(Code::PermissionDenied, message)));
    }
    if let Some((code, message)) = found.broken.and_then(|broken| statement.rules.get(usize::try_from(broken).ok()?)) {
        let refusal = Refusal::new(Code::BusinessRule, message);
        return Some(Outcome::Refused(Refusal { rule: Some(code.clone()), ..refusal }));
    }
    (!found.wins).then(|| Outcome::Lost { whole: true, winner: found.winner.unwrap_or_default() })
}

/// Finds the column whose value does not fit its type, by casting one after the other; leaves the transaction failed
/// where it finds one. The message names no value.
pub(crate) async fn value_at_fault(
    connection: &mut PgConnection,
    step: &Step<'_>,
    refusal: Refusal,
) -> Result<Refusal, sqlx::Error> {
    let keys = step.table.key.iter().copied().zip(step.key.iter().map(Option::as_deref));
    let values = step.columns.iter().copied().zip(step.values.iter().copied());
    for (index, value) in keys.chain(values) {
        let (column, Some(value)) = (&step.table.columns[index], value) else { continue };
        let sql_type = &column.sql_type;
        let cast = format!("SELECT $1::text::{} IS NULL", column.cast_type());
        // The type's own reading of a text looks at its length too; a JSON text would be taken as it is.
        let read = format!("SELECT v IS NULL FROM json_to_record(json_build_object('v', $1::text)) AS r(v {sql_type})");
        for sql in [cast, read] {
            match sqlx::query(AssertSqlSafe(sql)).bind(value).persistent(false).fetch_one(&mut *connection).await {
                Ok(_) => {}
                Err(error) if names_values(&error) => {
                    let name = format!("{}.{}", step.table.name, column.name);
                    let state =
                        error.as_database_error().and_then(|error| error.code()).unwrap_or_default().into_owned();
                    return Ok(Refusal { message: bounded(&misfit(&state, &name, sql_type)), ..refusal });
                }
                Err(error) if matches!(classify(&error), Fault::Server | Fault::Gone) => return Err(error),
                // Another check of the type's: the transaction is failed now, the first refusal stands.
                Err(_) => return Ok(refusal),
            }
        }
    }
    Ok(refusal)
}

/// What is wrong with a value, by SQLSTATE.
fn misfit(state: &str, column: &str, sql_type: &str) -> String {
    match state {
        "22001" | "22026" => format!("the value for {column} is too long for {sql_type}"),
        "22003" | "22008" => format!("the value for {column} is out of the range of {sql_type}"),
        _ => format!("the value for {column} is not a valid {sql_type}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::statement::Statements;
    use crate::validator::tests::{change, only, submission, tasks};
    use crate::validator::validate;

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
        let check = |table: &Table, op, found: Found, expected: Result<Option<&str>, (Code, Option<&str>)>| {
            let set: &[_] = if op == Operation::Delete { &[] } else { &[("title", Some("x"))] };
            let submission = submission(vec![change(op, "1", set)]);
            let steps = validate(only(table), &submission).unwrap();
            let statement = Statements::default().of(&steps[0]);
            let found = match outcome(&statement, table, found) {
                Some(Outcome::Refused(refusal)) => Err((refusal.code, refusal.rule)),
                Some(Outcome::Lost { winner, .. }) => Ok(Some(winner)),
                Some(Outcome::Won) => Ok(Some("won".to_owned())),
                None => Ok(None),
            };
            let expected =
                expected.map(|w| w.map(str::to_owned)).map_err(|(code, rule)| (code, rule.map(str::to_owned)));
            assert_eq!(found, expected);
        };
        let all = Found { found: true, allowed: true, broken: None, wins: true, winner: Some("9".into()) };
        let missing = Found { found: false, allowed: false, broken: None, wins: false, winner: None };
        let (update, delete) = (Operation::Update, Operation::Delete);
        check(&table, update, missing.clone(), Err((Code::EntityMissing, None)));
        check(&table, delete, missing.clone(), Err((Code::EntityMissing, None)));
        let denied = Found { allowed: false, broken: Some(0), wins: false, ..all.clone() };
        check(&table, update, denied, Err((Code::PermissionDenied, None)));
        let broken = Found { broken: Some(0), wins: false, ..all.clone() };
        check(&table, update, broken, Err((Code::BusinessRule, Some("title_too_short"))));
        check(&table, update, Found { wins: false, ..all.clone() }, Ok(Some("9")));
        check(&table, update, all, Ok(None));
        table.delete_missing_accepted = true;
        check(&table, delete, missing, Ok(Some("won")));
    }
}
