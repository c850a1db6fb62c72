//! Whether predicates and rules compile: Postgres plans each in the shape in which the executor evaluates it, as the
//! executor's role if there is one, and does not run it.

use std::fmt::Write as _;

use millstream_catalog::{Members, SessionConfig, Table};
use millstream_schemas::Operation;
use sqlx::postgres::{PgDatabaseError, PgErrorPosition};
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};

use super::problem::{Excerpt, Problem};
use crate::keys::Role;
use crate::names::role_name;

const OPERATIONS: [Operation; 3] = [Operation::Insert, Operation::Update, Operation::Delete];

/// What is wrong with the predicates of a table.
pub async fn check(connection: &mut PgConnection, table: &Table) -> Result<Vec<Problem>, sqlx::Error> {
    let mut problems: Vec<Problem> = Vec::new();
    let declared = [&table.write.insert, &table.write.update, &table.write.delete];
    for (op, predicate) in OPERATIONS.into_iter().zip(declared) {
        let Some(predicate) = predicate else { continue };
        let place = format!("[tables.{}] write.{}", table.name, op.as_str());
        let found = compile(connection, table, op, predicate, None).await?;
        problems.extend(found.map(|problem| Problem { place: Some(place), ..problem }));
    }
    for (index, rule) in table.rules.iter().enumerate() {
        let place = format!("[tables.{}] rules.{index}.check", table.name);
        for op in OPERATIONS.into_iter().filter(|op| rule.on.contains(op)) {
            let Some(problem) = compile(connection, table, op, &rule.check, None).await? else { continue };
            let message = format!("rule `{}` on {}: {}", rule.code, op.as_str(), problem.message);
            problems.push(Problem { place: Some(place.clone()), message, ..problem });
        }
    }
    Ok(problems)
}

/// Columns that say who may read a row, or of what it makes members, that clients may set as they like: no predicate of the
/// operation looks at them. So who may write some row may move it to where they may not, or a row of another's.
pub async fn unguarded(connection: &mut PgConnection, table: &Table) -> Result<Vec<Problem>, sqlx::Error> {
    let mut warnings = Vec::new();
    for (op, permission) in [(Operation::Insert, &table.write.insert), (Operation::Update, &table.write.update)] {
        let Some(permission) = permission else { continue };
        let rules = table.rules.iter().filter(|rule| rule.on.contains(&op)).map(|rule| &rule.check);
        let predicates: Vec<&String> = std::iter::once(permission).chain(rules).collect();
        for (index, what) in sensitive(table) {
            let column = &table.columns[index];
            // A key is set by inserts alone; and alone it names a scope that is new.
            let is_key = if op == Operation::Insert { table.key == [index] } else { table.key.contains(&index) };
            if !column.writable || is_key {
                continue;
            }
            let mut is_looked_at = predicates.iter().any(|predicate| takes_whole_row(predicate));
            for predicate in &predicates {
                // It cannot be planned without what it looks at.
                is_looked_at |= compile(connection, table, op, predicate, Some(index)).await?.is_some();
            }
            if is_looked_at {
                continue;
            }
            let name = &column.name;
            let (may, fix) = match op {
                Operation::Insert => ("put rows there for anybody", format!("look at `new.{name}` in the predicate")),
                _ => ("move such rows to anybody", format!("say `new.{name} = old.{name}`, or who may be there")),
            };
            let message = format!(
                "clients may set `{name}`, which {what}, and the predicate does not look at `new.{name}`: they may {may}"
            );
            let place = format!("[tables.{}] write.{}", table.name, op.as_str());
            let fix = format!("{fix}; or take `{name}` out of `writable`");
            warnings.push(Problem { place: Some(place), ..Problem::new(message).fix(fix) });
        }
    }
    Ok(warnings)
}

/// Indexes of the columns that it depends on who sees what, and why. Who becomes a member is for those to say who may write for
/// the scope.
fn sensitive(table: &Table) -> Vec<(usize, &'static str)> {
    let scopes = table.scopes.iter().filter_map(|scope| scope.column).map(|index| (index, "says who may read the row"));
    let grants = table.memberships.iter().flat_map(|membership| {
        let via = match membership.of {
            Members::Through { column, .. } => Some(column),
            Members::User { .. } => None,
        };
        via.into_iter().chain([membership.scope]).map(|index| (index, "says who becomes a member of what"))
    });
    let mut found: Vec<(usize, &'static str)> = Vec::new();
    for (index, what) in scopes.chain(grants) {
        if !found.iter().any(|(other, _)| *other == index) {
            found.push((index, what));
        }
    }
    found
}

/// Whether it seems to take `new` as a whole: a function may look at any column then, and Postgres plans that without one, too.
fn takes_whole_row(predicate: &str) -> bool {
    let text = predicate.to_lowercase();
    let in_word = |char: char| char.is_alphanumeric() || char == '_';
    text.match_indices("new").any(|(at, new)| {
        let (before, after) = (&text[..at], &text[at + new.len()..]);
        // Part of a longer word, a column of that name, or the text 'new'.
        if before.ends_with(|char| in_word(char) || matches!(char, '.' | '\'')) || after.starts_with(in_word) {
            return false;
        }
        let after = after.trim_start_matches('"').trim_start();
        after.strip_prefix('.').is_none_or(|column| column.trim_start().starts_with('*'))
    })
}

/// Plans a predicate, `without` a column of `new`; what Postgres says if it cannot.
async fn compile(
    connection: &mut PgConnection,
    table: &Table,
    op: Operation,
    predicate: &str,
    without: Option<usize>,
) -> Result<Option<Problem>, sqlx::Error> {
    let (before, after) = shape(table, op, without);
    plan(connection, &before, predicate, &after).await
}

/// Problems of the expressions in `[session.settings]`, which the executor evaluates for each author.
pub async fn settings(connection: &mut PgConnection, session: &SessionConfig) -> Result<Vec<Problem>, sqlx::Error> {
    let mut problems = Vec::new();
    for (name, sql) in &session.settings {
        let after = "\n)::text FROM (SELECT NULL::text AS user_id OFFSET 0) AS auth";
        if let Some(problem) = plan(connection, "EXPLAIN SELECT (\n", sql, after).await? {
            let message = format!("`{name}`: {}", problem.message);
            problems.push(Problem { place: Some("[session.settings]".to_owned()), message, ..problem });
        }
    }
    Ok(problems)
}

async fn plan(
    connection: &mut PgConnection,
    before: &str,
    predicate: &str,
    after: &str,
) -> Result<Option<Problem>, sqlx::Error> {
    let mut transaction = connection.begin().await?;
    // Predicates run with the executor's rights. Who may not take its role checks with his own.
    let mut attempt = transaction.begin().await?;
    let role = AssertSqlSafe(format!("SET LOCAL ROLE {}", role_name(Role::Changes)));
    if sqlx::query(role).execute(&mut *attempt).await.is_ok() {
        attempt.commit().await?
    } else {
        attempt.rollback().await?
    }
    // Prepared, so that it is one statement whatever the predicate holds.
    let sql = AssertSqlSafe(format!("{before}{predicate}{after}"));
    let planned = sqlx::query(sql).persistent(false).execute(&mut *transaction).await;
    transaction.rollback().await?;
    match planned {
        Ok(_) => Ok(None),
        Err(sqlx::Error::Database(error)) => {
            let Some(error) = error.try_downcast_ref::<PgDatabaseError>() else {
                return Err(sqlx::Error::Database(error));
            };
            Ok(Some(problem(error, before.chars().count(), predicate)))
        }
        Err(error) => Err(error),
    }
}

/// What stands before and after a predicate: it sees `new` and `old` with the types of the table, and `auth`.
fn shape(table: &Table, op: Operation, without: Option<usize>) -> (String, String) {
    let mut new = String::new();
    for (_, column) in table.columns.iter().enumerate().filter(|(index, _)| Some(*index) != without) {
        let comma = if new.is_empty() { "" } else { ", " };
        let _infallible = write!(new, "{comma}NULL::{} AS {}", column.sql_type, column.sql_name);
    }
    // OFFSET 0: or the planner would compute with these nulls.
    let new = format!("(SELECT {new} OFFSET 0) AS new");
    let auth = "(SELECT NULL::text AS user_id, NULL::uuid AS client_id OFFSET 0) AS auth";
    let old = format!("{} AS old", table.sql_name);
    let guard = "CASE WHEN auth.user_id IS NOT NULL THEN (\n";
    let guarded = "\n) ELSE false END";
    match op {
        Operation::Insert => (format!("EXPLAIN SELECT FROM {auth}, {new} WHERE {guard}"), guarded.into()),
        Operation::Update => (
            format!("EXPLAIN SELECT FROM {auth}, {old} WHERE CASE WHEN auth.user_id IS NOT NULL THEN (\nSELECT (\n"),
            format!("\n) FROM {new}{guarded}"),
        ),
        Operation::Delete => (format!("EXPLAIN SELECT FROM {auth}, {old} WHERE {guard}"), guarded.into()),
    }
}

fn problem(error: &PgDatabaseError, before: usize, predicate: &str) -> Problem {
    let position = match error.position() {
        Some(PgErrorPosition::Original(position)) => position.checked_sub(before),
        _ => None,
    };
    let message = error.message();
    let fix = match error.code() {
        "42501" => Some(format!(
            "`millstream setup` grants what is declared; what else a predicate reads, grant to {}",
            role_name(Role::Changes)
        )),
        // undefined_table
        "42P01" if message.contains("\"old\"") || message.contains("\"new\"") => {
            Some("`new` is there on insert and update, `old` on update and delete".to_owned())
        }
        _ => error.hint().map(str::to_owned),
    };
    let message = match message.strip_prefix("CASE types ") {
        // Our CASE, around the predicate.
        Some(_) if message.contains("boolean") => format!("it is not true or false: {message}"),
        _ => message.to_owned(),
    };
    Problem { excerpt: position.and_then(|at| excerpt(predicate, at)), fix, ..Problem::new(message) }
}

/// The line of a character of a predicate (from 1), and the place in the line.
fn excerpt(predicate: &str, position: usize) -> Option<Excerpt> {
    let mut left = position.checked_sub(1)?;
    for line in predicate.split('\n') {
        let length = line.chars().count();
        if left <= length {
            // A tab would move the caret.
            return Some(Excerpt { text: line.replace(['\t', '\r'], " "), column: left + 1 });
        }
        left -= length + 1;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_rows_are_told_from_columns() {
        for (predicate, whole) in [
            ("may_be(new)", true),
            ("may_be(NEW.*) AND new.a", true),
            ("row_to_json(\"new\") IS NOT NULL", true),
            ("new . * IS DISTINCT FROM old.*", true),
            ("new.a = 1", false),
            ("\"new\".\"a\" = 1 AND old.new > renewed", false),
            ("new.state = 'new'", false),
            ("old.a = 1", false),
        ] {
            assert_eq!(takes_whole_row(predicate), whole, "{predicate}");
        }
    }

    #[test]
    fn positions_are_found_in_the_predicate() {
        let check = |text: &str, position, expected: Option<(&str, usize)>| {
            let expected = expected.map(|(text, column)| Excerpt { text: text.into(), column });
            assert_eq!(excerpt(text, position), expected, "{text} {position}");
        };
        check("new.a", 1, Some(("new.a", 1)));
        check("new.a\n\tAND new.b", 7, Some((" AND new.b", 1)));
        check("é = new.a", 5, Some(("é = new.a", 5)));
        // Just behind the end: something is missing there.
        check("a =", 4, Some(("a =", 4)));
        check("a", 0, None);
        check("a", 9, None);
    }
}
