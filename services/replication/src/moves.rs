//! Which memberships a row change moves. Edges learn by it from which message on a user holds a scope, or holds it no more,
//! and so what of the stream's past is the user's to see. Pure.

use std::collections::BTreeMap;

use millstream_catalog::{Members, Table};
use millstream_schemas::Scope;

use crate::relation::{Cell, Image};

/// For each scope whose members are concerned: the scopes that they came to hold, or hold no more by this row.
pub type Moves = BTreeMap<Scope, Vec<Scope>>;

/// Whether a row grants what its columns say.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Grants {
    Yes,
    No,
    /// The change stream does not have the old role.
    Unknown,
}

/// The moves of a row that was as `before` and is as `after`; none: it was, or is, not there. An update without an old image
/// changed none of the columns that name scopes and members, since the replica identity covers them.
pub fn moves(table: &Table, before: Option<&Image<'_>>, after: Option<&Image<'_>>, is_update: bool) -> Moves {
    let mut found = Moves::new();
    if table.memberships.is_empty() {
        return found;
    }
    for membership in &table.memberships {
        let members = membership.members();
        let granted = |image: Option<&Image<'_>>| {
            let image = image?;
            let member = Scope::new(members.kind, members.column.and_then(|column| image[column].text())?);
            let scope = Scope::new(membership.kind.clone(), image[membership.scope].text()?);
            (Scope::fits(&member.id) && Scope::fits(&scope.id)).then_some((member, scope))
        };
        let grants = |image: Option<&Image<'_>>| match (image, &membership.of) {
            (None, _) => Grants::Unknown,
            (Some(image), Members::User { roles: Some((role, allowed)), .. }) => match image[*role] {
                Cell::Text(role) if allowed.iter().any(|allowed| allowed == role) => Grants::Yes,
                Cell::Text(_) | Cell::Null => Grants::No,
                Cell::Absent | Cell::Unchanged | Cell::Unsendable => Grants::Unknown,
            },
            (Some(_), Members::User { roles: None, .. } | Members::Through { .. }) => Grants::Yes,
        };
        let has_roles = matches!(membership.of, Members::User { roles: Some(_), .. });
        let (new, now) = (granted(after), grants(after));
        let (old, was) = if is_update && before.is_none() {
            (new.clone(), if has_roles { Grants::Unknown } else { now })
        } else {
            (granted(before), grants(before))
        };
        if old == new && was == now && was != Grants::Unknown {
            continue;
        }
        let ends = [(old, was), (new, now)].into_iter().filter(|(_, grants)| *grants != Grants::No);
        for (member, scope) in ends.filter_map(|(pair, _)| pair) {
            let scopes = found.entry(member).or_default();
            if !scopes.contains(&scope) {
                scopes.push(scope);
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use millstream_catalog::{Column, ConflictPolicy, Growth, Membership, WriteRules};
    use millstream_schemas::TableScope;

    use super::*;

    /// staff(user, organisation, role): engineers are members; and a row makes members of the organisation members of what
    /// `role` names, to have a chain.
    fn staff(roles: Option<(usize, Vec<String>)>) -> Table {
        let column = |name: &str| Column {
            name: name.into(),
            sql_name: name.into(),
            sql_type: "text".into(),
            type_oid: 25,
            nullable: true,
            writable: true,
            growth: Growth::default(),
            default: None,
            merge: None,
            numeric: None,
            domain: None,
        };
        Table {
            synced: true,
            oid: 1,
            name: "staff".into(),
            sql_name: "staff".into(),
            columns: vec![column("user"), column("organisation"), column("role")],
            key: vec![0],
            scopes: vec![TableScope { kind: "organisation".into(), column: Some(1) }],
            readable: "true".into(),
            memberships: vec![Membership {
                kind: "organisation".into(),
                scope: 1,
                of: Members::User { column: 0, roles },
            }],
            write: WriteRules::default(),
            conflict: ConflictPolicy::Arrival,
            renamed: Default::default(),
            dropped: Vec::new(),
            delete_missing_accepted: false,
            partitioned: false,
            hidden: Vec::new(),
            insert_existing_merges: false,
            references: Vec::new(),
            rules: Vec::new(),
            validate: None,
        }
    }

    fn image<'a>(cells: [Option<&'a str>; 3]) -> Image<'a> {
        cells.into_iter().map(|cell| cell.map_or(Cell::Absent, Cell::Text)).collect()
    }

    fn check(
        table: &Table,
        before: Option<[Option<&str>; 3]>,
        after: Option<[Option<&str>; 3]>,
        update: bool,
        told: &str,
    ) {
        let (before, after) = (before.map(image), after.map(image));
        let found = moves(table, before.as_ref(), after.as_ref(), update);
        let text = |(member, scopes): (&Scope, &Vec<Scope>)| {
            format!("{}>{}", member.id, scopes.iter().map(|s| s.id.as_str()).collect::<Vec<_>>().join("+"))
        };
        assert_eq!(found.iter().map(text).collect::<Vec<_>>().join(" "), told);
    }

    #[test]
    fn rows_that_come_go_and_change_move_memberships() {
        let plain = staff(None);
        let (a, b) = (Some([Some("u"), Some("a"), Some("x")]), Some([Some("u"), Some("b"), Some("x")]));
        check(&plain, None, a, false, "u>a");
        check(&plain, a, None, false, "u>a");
        check(&plain, a, b, true, "u>a+b");
        check(&plain, a, Some([Some("v"), Some("a"), Some("x")]), true, "u>a v>a");
        check(&plain, a, Some([Some("u"), Some("a"), Some("y")]), true, "");
        check(&plain, None, a, true, "");
        check(&plain, Some([Some("u"), Some("a"), None]), None, false, "u>a");
        check(&plain, None, Some([Some("u"), None, Some("x")]), false, "");
    }

    #[test]
    fn roles_count_and_an_unknown_one_may_have_been_any() {
        let table = staff(Some((2, vec!["engineer".into(), "boss".into()])));
        let role = |role| Some([Some("u"), Some("a"), role]);
        check(&table, None, role(Some("trainee")), false, "");
        check(&table, None, role(Some("boss")), false, "u>a");
        check(&table, role(Some("boss")), role(Some("engineer")), true, "");
        check(&table, role(Some("boss")), role(Some("trainee")), true, "u>a");
        check(&table, role(Some("trainee")), role(Some("boss")), true, "u>a");
        check(&table, role(None), role(Some("boss")), true, "u>a");
        check(&table, None, role(Some("boss")), true, "u>a");
        check(&table, None, role(Some("trainee")), true, "u>a");
        check(&table, role(None), None, false, "u>a");
    }
}
