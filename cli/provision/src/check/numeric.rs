//! Columns of type `numeric`, which SQLite compares as text unless something else is declared. Pure.

use millstream_catalog::{Catalog, Table};
use millstream_schemas::spelling::decimals;

use super::problem::Problem;

/// Most digits of which every number of units has 64 bits.
const MAX_DIGITS: u32 = 18;

/// Tables with such columns for which nothing is declared, one warning each.
pub fn undeclared(catalog: &Catalog) -> Vec<Problem> {
    catalog.synced().filter_map(of).collect()
}

fn of(table: &Table) -> Option<Problem> {
    let is_undeclared = |index: &usize| {
        let column = &table.columns[*index];
        let is_numeric = column.sql_type == "numeric" || column.sql_type.starts_with("numeric(");
        is_numeric && column.numeric.is_none()
    };
    let found: Vec<usize> = (0..table.columns.len()).filter(is_undeclared).collect();
    if found.is_empty() {
        return None;
    }
    let is_id = |index: &usize| {
        table.row_scope_columns().any(|scope| scope.column == Some(*index))
            || table.memberships.iter().any(|membership| membership.scope == *index)
    };
    let best = |index: &usize| match decimals(&table.columns[*index].sql_type) {
        _ if is_id(index) => "text",
        Some((precision, _)) if precision <= MAX_DIGITS => "integer",
        _ if table.key.contains(index) => "text",
        _ => "real",
    };
    let key = |name: &str| {
        let is_bare = !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-');
        if is_bare { name.to_owned() } else { format!("{name:?}") }
    };
    let names = found.iter().map(|&index| format!("`{}`", table.columns[index].name)).collect::<Vec<_>>().join(", ");
    let (is, they) = if found.len() == 1 { ("is", "it is") } else { ("are", "they are") };
    let declared = found.iter().map(|index| format!("{} = {:?}", key(&table.columns[*index].name), best(index)));
    let fix = format!(
        "numeric = {{ {} }}   # \"integer\" counts the smallest unit, \"real\" rounds to some 15 digits, \"text\" is as it is now",
        declared.collect::<Vec<_>>().join(", ")
    );
    let message = format!("{names} {is} numeric: in SQLite {they} text, which compares and sorts '9' behind '10'");
    Some(Problem::table(&table.name, message).fix(fix))
}
