//! Which scopes a moved membership may end or begin: the one that it is of, and those that are reached through it. Pure.

use std::collections::{BTreeMap, BTreeSet};

use millstream_catalog::{Members, Membership};
use millstream_schemas::Scope;
use millstream_schemas::stream::ANY_SCOPE;
use millstream_schemas::subject::{GLOBAL_KIND, USER_KIND};

/// What a message says of the memberships of those who hold its scope (header `Ms-Moves`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Moves {
    /// They came to hold these scopes, or hold them no more.
    Scopes(Vec<Scope>),
    /// None of it moves, but rows of scopes of these kinds have changed without a message: they are to be read again.
    Again(Vec<String>),
    /// Any scope.
    Any,
}

/// Ends the name of a kind of which all scopes are meant.
const EVERY_SCOPE: &str = ".*";

impl Moves {
    /// Reads the header. What cannot be read may mean anything.
    pub fn parse(text: &str) -> Moves {
        if text == ANY_SCOPE {
            return Moves::Any;
        }
        let kind = |name: &str| Some(name.strip_prefix("ms.wal.")?.strip_suffix(EVERY_SCOPE)?.to_owned());
        if let Some(kinds) = text.split(' ').map(kind).collect() {
            return Moves::Again(kinds);
        }
        text.split(' ').map(Scope::from_subject).collect::<Option<_>>().map_or(Moves::Any, Moves::Scopes)
    }
}

/// Kinds of scopes, and through which others they are reached.
#[derive(Debug, Default)]
pub struct Reach {
    /// For each kind with memberships, those that are reached through it, over any number of steps.
    through: BTreeMap<String, BTreeSet<String>>,
}

impl Reach {
    /// Of these memberships, each behind those that it is reached through ([`millstream_catalog::Catalog::memberships`]).
    pub fn new<'a>(memberships: impl Iterator<Item = &'a Membership>) -> Reach {
        let mut through: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for membership in memberships {
            through.entry(membership.kind.clone()).or_default();
            if let Members::Through { kind, .. } = &membership.of {
                let above: Vec<String> = through
                    .iter()
                    .filter(|(k, below)| *k == kind || below.contains(kind))
                    .map(|(k, _)| k.clone())
                    .collect();
                for kind in above {
                    through.entry(kind).or_default().insert(membership.kind.clone());
                }
            }
        }
        Reach { through }
    }

    /// Whether holding a scope may have ended, or begun, with these moves.
    pub fn concerns(&self, moves: &Moves, scope: &Scope) -> bool {
        match moves {
            Moves::Any => self.through.contains_key(&scope.kind),
            // Truncations of all tables are messages of the global scope: where it skips one, the other scopes must have it, too.
            Moves::Again(kinds) => kinds.contains(&scope.kind) || kinds.iter().any(|kind| kind == GLOBAL_KIND),
            Moves::Scopes(moved) => moved.iter().any(|moved| {
                moved == scope || self.through.get(&moved.kind).is_some_and(|below| below.contains(&scope.kind))
            }),
        }
    }

    /// Whether messages of a scope may tell of moves: the user's own, and scopes that others are reached through.
    pub fn tells(&self, scope: &Scope) -> bool {
        scope.kind == USER_KIND || self.through.get(&scope.kind).is_some_and(|below| !below.is_empty())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Users are members of organisations and projects; members of an organisation are of its projects, and those of tasks.
    pub(crate) fn board() -> Reach {
        let of = |kind: &str, through: Option<&str>| Membership {
            kind: kind.into(),
            scope: 0,
            of: through.map_or(Members::User { column: 1, roles: None }, |kind| Members::Through {
                kind: kind.into(),
                column: 1,
            }),
        };
        let all = [
            of("organisation", None),
            of("project", None),
            of("project", Some("organisation")),
            of("task", Some("project")),
        ];
        Reach::new(all.iter())
    }

    #[test]
    fn a_move_concerns_the_scope_and_what_is_reached_through_it() {
        let reach = board();
        let (organisation, project, task) =
            (Scope::new("organisation", "o"), Scope::new("project", "p"), Scope::new("task", "t"));
        let moved = |scope: &Scope| Moves::parse(&scope.subject());
        let check = |moves: &Moves, expected: [bool; 5]| {
            let scopes = [&organisation, &project, &task, &Scope::user("u"), &Scope::global()];
            assert_eq!(scopes.map(|scope| reach.concerns(moves, scope)), expected, "{moves:?}");
        };
        check(&moved(&organisation), [true, true, true, false, false]);
        check(&moved(&project), [false, true, true, false, false]);
        check(&moved(&Scope::new("project", "q")), [false, false, true, false, false]);
        check(&moved(&task), [false, false, true, false, false]);
        for any in ["*", "", "x", "ms.wal.project.p ms"] {
            check(&Moves::parse(any), [true, true, true, false, false]);
        }
        check(&Moves::parse("ms.wal.project.* ms.wal.user.*"), [false, true, false, true, false]);
        check(&Moves::parse("ms.wal.task.* ms.wal.global.*"), [true; 5]);
        let told =
            [&organisation, &project, &task, &Scope::user("u"), &Scope::global()].map(|scope| reach.tells(scope));
        assert_eq!(told, [true, true, false, true, false]);
    }
}
