//! Which messages of the outbound stream may move memberships: those with rows of tables that grant them, in the scope of
//! the members (`user:{id}`, or the scope that a membership is reached through).

use millstream_catalog::{Members, Membership, Table};
use millstream_schemas::{Scope, TableChanges, TableOp};

/// The tables whose rows grant memberships.
#[derive(Debug, Default)]
pub struct Grants {
    tables: Vec<Grant>,
}

/// A table whose rows make the members of scopes of one kind members of scopes of another.
#[derive(Debug)]
struct Grant {
    table: String,
    /// Kind of the members' scope.
    members: String,
    /// Kind of the scope that is granted, and index of its id's column, if the row's being there is all that matters and its
    /// deletion is always told of.
    granted: Option<(String, usize)>,
}

/// What a message may mean for the memberships of those who hold its scope.
#[derive(Debug, PartialEq, Eq)]
pub enum Moved {
    /// They are members of these scopes; other memberships are as they were.
    To(Vec<Scope>),
    /// Anything.
    Anywhere,
}

impl Grants {
    /// Those of these memberships, each with its table.
    pub fn new<'a>(memberships: impl Iterator<Item = (&'a Table, &'a Membership)>) -> Grants {
        let grant = |(table, membership): (&Table, &Membership)| {
            let members = membership.members();
            let by_row = !matches!(membership.of, Members::User { roles: Some(_), .. });
            // Neither id may change without the row leaving the scope, with a deletion.
            let fixed = table.key.contains(&membership.scope)
                && table.row_scope_columns().all(|scope| scope.kind != members.kind || scope.column == members.column);
            Grant {
                table: table.name.clone(),
                members: members.kind.to_owned(),
                granted: (by_row && fixed).then(|| (membership.kind.clone(), membership.scope)),
            }
        };
        Grants { tables: memberships.map(grant).collect() }
    }

    /// What a message's changes may mean for those who hold its scope.
    pub(crate) fn moved(&self, scope: &Scope, truncates: bool, payload: &[u8]) -> Moved {
        if !truncates && self.tables.iter().all(|grant| grant.members != scope.kind) {
            return Moved::To(Vec::new());
        }
        let is_granting = |table: &str| self.tables.iter().any(|grant| grant.table == table);
        // Unreadable counts as moved: reading memberships once too often harms nobody.
        let Ok(changes) = serde_json::from_slice::<Vec<TableChanges>>(payload) else { return Moved::Anywhere };
        let mut to = Vec::new();
        for change in &changes {
            if change.op == TableOp::Truncate && is_granting(&change.table) {
                return Moved::Anywhere;
            }
            for grant in self.tables.iter().filter(|grant| grant.table == change.table && grant.members == scope.kind) {
                let Some((kind, column)) =
                    grant.granted.as_ref().filter(|_| change.op == TableOp::Upsert && change.columns.is_none())
                else {
                    return Moved::Anywhere;
                };
                for row in &change.rows {
                    let Some(Some(id)) = row.get(*column) else { return Moved::Anywhere };
                    let scope = Scope::new(kind.clone(), id.clone());
                    if !to.contains(&scope) {
                        to.push(scope);
                    }
                }
            }
        }
        Moved::To(to)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Rows of `members` make users members of projects; rows of `projects` make members of an organisation so, and column 0
    /// is the project's id.
    pub(crate) fn board() -> Grants {
        let grant = |table: &str, members: &str, granted: Option<(String, usize)>| Grant {
            table: table.into(),
            members: members.into(),
            granted,
        };
        Grants {
            tables: vec![
                grant("members", "user", None),
                grant("projects", "organisation", Some(("project".into(), 0))),
            ],
        }
    }

    #[test]
    fn what_a_message_moves() {
        let moved =
            |kind: &str, truncates, payload: &str| board().moved(&Scope::new(kind, "x"), truncates, payload.as_bytes());
        let to = |ids: &[&str]| Moved::To(ids.iter().map(|id| Scope::new("project", *id)).collect());
        let rows = r#"[{"table":"projects","op":"upsert","rows":[["p","x"],["q","x"],["p","x"]]}]"#;
        assert_eq!(moved("organisation", false, rows), to(&["p", "q"]));
        assert_eq!(moved("project", false, rows), to(&[]), "told of where the members are");
        let other = r#"[{"table":"notes","op":"delete","rows":[["p"]]}]"#;
        assert_eq!(moved("organisation", false, other), to(&[]));
        for payload in [
            r#"[{"table":"projects","op":"delete","rows":[["p"]]}]"#,
            r#"[{"table":"projects","op":"update","columns":["id","name"],"rows":[["p","n"]]}]"#,
            r#"[{"table":"projects","op":"upsert","columns":["name","id"],"rows":[["n","p"]]}]"#,
            r#"[{"table":"projects","op":"upsert","rows":[[]]}]"#,
            "not ours",
        ] {
            assert_eq!(moved("organisation", false, payload), Moved::Anywhere, "{payload}");
        }
        assert_eq!(moved("user", false, r#"[{"table":"members","op":"upsert","rows":[["p","x"]]}]"#), Moved::Anywhere);
        let truncate = r#"[{"table":"projects","op":"truncate","rows":[]}]"#;
        assert_eq!(moved("global", true, truncate), Moved::Anywhere);
        assert_eq!(moved("global", true, r#"[{"table":"notes","op":"truncate","rows":[]}]"#), to(&[]));
    }
}
