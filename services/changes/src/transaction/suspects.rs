//! Which rows of a statement an error of Postgres seems to be about: a guess that saves searching for them. Pure.
//!
//! Postgres quotes rows and keys in an error's DETAIL (PostgreSQL source, `ExecBuildSlotValueDescription` and
//! `BuildIndexValueDescription`): `Failing row contains (1, x, null).`, `Key (id)=(1) already exists.`. The words around
//! may be of any language. What is guessed wrong costs an attempt, since each
//! suspect is then tried alone; the caller sees to it that the order does not matter.

use sqlx::postgres::PgDatabaseError;

use crate::sql::statement::InputRow;

/// Indexes of the rows; none where the error quotes nothing that they hold.
pub(crate) fn suspects(rows: &[InputRow<'_>], error: &sqlx::Error) -> Vec<usize> {
    let error = error.as_database_error().and_then(|error| error.try_downcast_ref::<PgDatabaseError>());
    let Some(detail) = error.and_then(|error| error.detail()) else { return Vec::new() };
    (0..rows.len()).filter(|index| quotes(detail, &rows[*index])).collect()
}

fn quotes(detail: &str, row: &InputRow<'_>) -> bool {
    let step = row.step;
    let columns = &step.table.columns;
    if let Some((before, after)) = detail.split_once(")=(") {
        let names = before.split_once('(').map_or("", |(_, names)| names).split(", ");
        let Some((values, _)) = after.rsplit_once(')') else { return false };
        let value = |name: &str| {
            let name = name.trim_matches('"');
            let set =
                step.columns.iter().position(|index| columns[*index].name == name).map(|place| step.values[place]);
            let key = || step.table.key.iter().position(|index| columns[*index].name == name);
            set.or_else(|| key().map(|place| step.key[place].as_deref()))?
        };
        let held: Option<Vec<&str>> = names.map(value).collect();
        return held.is_some_and(|held| held.join(", ") == values);
    }
    let Some((_, fields)) = detail.split_once('(') else { return false };
    let fields: Vec<&str> = fields.split(", ").collect();
    step.table.key.iter().zip(step.key).all(|(index, part)| {
        let field = fields.get(*index).map(|field| field.trim_end_matches(['.', ')']));
        field.is_some() && field == part.as_deref()
    })
}

#[cfg(test)]
mod tests {
    use millstream_schemas::{Clock, Operation};
    use uuid::Uuid;

    use super::*;
    use crate::decide::validator::tests::{change, only, submission, tasks};
    use crate::decide::validator::validate;

    #[test]
    fn rows_are_known_by_what_is_quoted() {
        let table = tasks();
        let check = |op, key: &str, set: &[(&str, Option<&str>)], detail: &str, expected: bool| {
            let submission = submission(vec![change(op, key, set)]);
            let steps = validate(only(&table), &submission).unwrap();
            let (client_id, clock) = (Uuid::nil(), Clock::default());
            let row = InputRow { step: &steps[0], user_id: "u", client_id, clock };
            assert_eq!(quotes(detail, &row), expected, "{detail}");
        };
        const A: &str = "00000000-0000-0000-0000-00000000000a";
        let insert: &[_] = &[("id", Some(A)), ("title", Some("a, b"))];
        let (new, old) = (Operation::Insert, Operation::Update);
        check(new, A, insert, &format!("Failing row contains ({A}, a, b, f, null)."), true);
        check(new, A, insert, "Failing row contains (00000000-0000-0000-0000-00000000000b, a, b, f, null).", false);
        check(new, A, insert, &format!("Key (id)=({A}) already exists."), true);
        check(new, A, insert, "Schlüssel »(title)=(a, b)« existiert bereits.", true);
        check(new, A, insert, &format!("Key (id, title)=({A}, a, b) already exists."), true);
        check(new, A, insert, "Key (title)=(a) already exists.", false);
        check(new, A, insert, "Key (lower(title))=(a, b) already exists.", false);
        check(old, A, &[("done", Some("t"))], &format!("Key (id)=({A}) is still referenced from table \"x\"."), true);
        check(old, A, &[("done", Some("t"))], "Key (title)=(a) already exists.", false);
        for odd in ["", "(", ")=(", "Key (", "Key (id)=(", "Failing row contains (", "(id)=()", "()=()"] {
            check(new, A, insert, odd, false);
        }
    }
}
