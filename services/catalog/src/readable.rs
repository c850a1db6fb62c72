//! Which rows a user may read, as SQL about one row. Edges answer the same question for all of a user's scopes at once
//! (`Snapshot::scopes`), from the same memberships and by the same comparison of ids.

use millstream_schemas::subject::USER_KIND;

use crate::model::{Catalog, Column, Members, ScopeColumn, Table, literal};

/// Who asks.
const USER: &str = "ARRAY[auth.user_id]";

impl Catalog {
    /// SQL predicate over `old`, a row of the table, and `auth`: whether the user may read the row.
    pub(crate) fn readable(&self, table: &Table) -> String {
        let mut scopes = Vec::new();
        for ScopeColumn { kind, column } in table.row_scope_columns() {
            // Everybody may.
            let Some(column) = column.map(|index| &table.columns[index]) else { return "true".to_owned() };
            let holds = self.holds(kind, column, "old", 1);
            if !scopes.contains(&holds) {
                scopes.push(holds);
            }
        }
        any(scopes)
    }

    /// Whether the user holds the scope of this kind whose id is in a column of `row`.
    fn holds(&self, kind: &str, column: &Column, row: &str, depth: usize) -> String {
        if kind == USER_KIND {
            return column.is_one_of_in(row, USER);
        }
        let member = format!("millstream_m{depth}");
        let id = format!("ARRAY[{}]", column.text_in(row));
        // Kinds are not reached through themselves: `Config::kinds`.
        let memberships = self.memberships().filter(|(_, membership)| membership.kind == kind);
        let grants = memberships.map(|(table, membership)| {
            let granting = |index: usize| &table.columns[index];
            let who = match &membership.of {
                Members::User { column, roles: None } => granting(*column).is_one_of_in(&member, USER),
                Members::User { column, roles: Some((role, allowed)) } => {
                    let allowed: Vec<String> = allowed.iter().map(|role| literal(role)).collect();
                    format!(
                        "{} AND ({}) COLLATE \"C\" = ANY (ARRAY[{}])",
                        granting(*column).is_one_of_in(&member, USER),
                        granting(*role).text_in(&member),
                        allowed.join(", ")
                    )
                }
                Members::Through { kind, column } => self.holds(kind, granting(*column), &member, depth + 1),
            };
            format!(
                "EXISTS (SELECT FROM {} AS {member} WHERE {} AND ({who}))",
                table.sql_rows(),
                granting(membership.scope).is_one_of_in(&member, &id)
            )
        });
        any(grants.collect())
    }
}

fn any(predicates: Vec<String>) -> String {
    if predicates.is_empty() { "false".to_owned() } else { format!("({})", predicates.join(" OR ")) }
}
