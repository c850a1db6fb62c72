//! `millstream.toml` as written.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use millstream_schemas::clock::{CLIENT_ID, FIELD_CLOCKS, UPDATED_AT};
use millstream_schemas::stream::{MAX_FAILURE_MESSAGE_BYTES, MAX_RULE_BYTES};
use millstream_schemas::subject::{GLOBAL_KIND, USER_KIND};
use millstream_schemas::{Merge, Numeric, Operation};
use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use crate::session::SessionConfig;

/// Longest deadline of external validators, in milliseconds: a change must not be held for longer before others are seen to.
const MAX_DEADLINE_MS: u64 = 30_000;

/// What names in the executor's statements begin with: a predicate that uses one would read another relation than it means.
const RESERVED: &str = "millstream_";

/// The whole file.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// What the executor's sessions have.
    #[serde(default)]
    pub session: SessionConfig,
    /// Declared kinds of scopes.
    #[serde(default)]
    pub scopes: BTreeMap<String, ScopeConfig>,
    /// Synced tables: `name` in the schema `public`, or `schema.name`.
    #[serde(default)]
    pub tables: BTreeMap<String, TableConfig>,
}

/// A kind of scope.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScopeConfig {
    /// Who may read it: whoever any of these makes a member.
    pub membership: OneOrMany<MembershipConfig>,
}

/// A row of `table` makes members of the scope in column `scope`: the user in column `user`, or every member of the other
/// scope in column `via`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MembershipConfig {
    /// A synced table, or one that is read for its memberships alone.
    pub table: String,
    /// Column with the scope's id.
    pub scope: String,
    /// Column with the user id.
    pub user: Option<String>,
    /// Only rows with one of these roles make a member of the user.
    pub roles: Option<RolesConfig>,
    /// Kind of the other scope.
    pub through: Option<String>,
    /// Column with the other scope's id.
    pub via: Option<String>,
}

impl MembershipConfig {
    /// The columns that it names.
    pub(crate) fn columns(&self) -> impl Iterator<Item = &str> {
        let role = self.roles.as_ref().map(|roles| roles.column.as_str());
        [Some(self.scope.as_str()), self.user.as_deref(), self.via.as_deref(), role].into_iter().flatten()
    }
}

/// The roles that count.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RolesConfig {
    /// Column with the role.
    pub column: String,
    /// Its values, as text, that make a member.
    pub r#in: Vec<String>,
}

/// A synced table.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TableConfig {
    /// The scope, or scopes, of its rows.
    pub scope: OneOrMany<TableScopeConfig>,
    /// Columns that clients may set.
    #[serde(default)]
    pub writable: Vec<String>,
    /// Former names of columns, with their names of today: clients that know only the old one may still set it.
    #[serde(default)]
    pub renamed: BTreeMap<String, String>,
    /// Columns that are gone: what clients set there is left out.
    #[serde(default)]
    pub dropped: Vec<String>,
    /// Columns that never leave the database: clients do not know of them.
    #[serde(default)]
    pub hidden: Vec<String>,
    /// Who may write; an operation without a rule is refused.
    #[serde(default)]
    pub write: WriteConfig,
    /// Columns of the unique index that serves as key, of a table without a primary key that has several.
    #[serde(default)]
    pub key: Vec<String>,
    /// How concurrent changes to one row meet. Absent: by column if the table has `field_clocks`, else by arrival.
    pub conflict: Option<Conflict>,
    /// Names of the columns that tell which change is newer.
    #[serde(default)]
    pub clocks: ClockNames,
    /// What becomes of the delete of a row that is not there.
    #[serde(default)]
    pub delete_missing: DeleteMissing,
    /// What becomes of the insert of a row that is there already.
    #[serde(default)]
    pub insert_existing: InsertExisting,
    /// Columns of which concurrent changes all count: sums, greatest and least values.
    #[serde(default)]
    pub merge: BTreeMap<String, Merge>,
    /// What SQLite has for the values of `numeric` columns; text, where nothing is declared.
    #[serde(default)]
    pub numeric: BTreeMap<String, Numeric>,
    /// Business rules beyond the database's own constraints.
    #[serde(default)]
    pub rules: Vec<RuleConfig>,
    /// Asks external validators before a change is applied.
    pub validate: Option<ValidateConfig>,
}

/// Names of the columns that tell which change is newer, where the application has columns of the default names.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ClockNames {
    /// Of the clocks of each column.
    pub field_clocks: String,
    /// Of the time of the row's newest change.
    pub updated_at: String,
    /// Of the client of the row's newest change.
    pub client_id: String,
}

impl Default for ClockNames {
    fn default() -> ClockNames {
        let [field_clocks, updated_at, client_id] = [FIELD_CLOCKS, UPDATED_AT, CLIENT_ID].map(str::to_owned);
        ClockNames { field_clocks, updated_at, client_id }
    }
}

/// How concurrent changes to one row meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Conflict {
    /// The newer change wins, column by column (column `field_clocks`).
    Column,
    /// The newer change wins, for the row (columns `updated_at` and `client_id`).
    Row,
    /// The later arrival wins.
    Arrival,
}

/// What becomes of the delete of a row that is not there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeleteMissing {
    /// It is rejected with `entity_missing`.
    #[default]
    Reject,
    /// It is applied: the row is gone, as its author wanted.
    Accept,
}

/// What becomes of the insert of a row that is there already.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InsertExisting {
    /// It sets its columns in that row, as an update by the same author: by the same rule, and no newer than it is.
    #[default]
    Merge,
    /// It is rejected with `business_rule`, by the primary key.
    Reject,
}

/// A business rule: what must hold for a change.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RuleConfig {
    /// Its name, for programs: a lower-case identifier, unique within the table.
    pub code: String,
    /// What the author of a refused change is told.
    pub message: String,
    /// Which operations it is for.
    pub on: Vec<Operation>,
    /// SQL predicate over `new` (insert, update), `old` (update, delete) and `auth`.
    pub check: String,
}

/// External validators, asked on `ms.validate.{table}`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ValidateConfig {
    /// Which operations they are asked about.
    pub on: Vec<Operation>,
    /// How long to wait for an answer, in milliseconds; without one the change waits and is asked about again.
    #[serde(default = "default_deadline_ms")]
    pub deadline_ms: u64,
}

fn default_deadline_ms() -> u64 {
    2_000
}

/// How a row's scope is read off it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TableScopeConfig {
    /// `global`, `user` or a declared kind.
    pub kind: String,
    /// Column with the scope's id; none for `global`.
    pub column: Option<String>,
}

/// SQL predicates over `new`, `old` and `auth`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WriteConfig {
    /// May this row be inserted?
    pub insert: Option<String>,
    /// May this row be changed so?
    pub update: Option<String>,
    /// May this row be deleted?
    pub delete: Option<String>,
}

/// One value (a table), or a list of them.
#[derive(Clone, Debug)]
pub enum OneOrMany<T> {
    /// One.
    One(T),
    /// Several.
    Many(Vec<T>),
}

// By hand, since the error of an untagged enum does not say what is wrong with the value.
impl<'de, T: Deserialize<'de>> Deserialize<'de> for OneOrMany<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either<T>(std::marker::PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Either<T> {
            type Value = OneOrMany<T>;

            fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                formatter.write_str("a table or a list of tables")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map)).map(OneOrMany::One)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Self::Value, A::Error> {
                Vec::deserialize(SeqAccessDeserializer::new(list)).map(OneOrMany::Many)
            }
        }
        deserializer.deserialize_any(Either(std::marker::PhantomData))
    }
}

impl<T> Default for OneOrMany<T> {
    fn default() -> Self {
        OneOrMany::Many(Vec::new())
    }
}

impl<T> OneOrMany<T> {
    /// As a slice.
    pub fn as_slice(&self) -> &[T] {
        match self {
            OneOrMany::One(one) => std::slice::from_ref(one),
            OneOrMany::Many(many) => many,
        }
    }
}

/// Why the file cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// It cannot be read.
    #[error("cannot read {}; name another file with --config or MILLSTREAM_CONFIG", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is not what it should be.
    #[error("{}: {source}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: Box<toml::de::Error>,
    },
    /// It contradicts itself.
    #[error("{}: {}", path.display(), problems.join("\n"))]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Where and what, each.
        problems: Vec<String>,
    },
}

impl Config {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn read(path: impl AsRef<Path>) -> Result<Config, ConfigError> {
        let path = path.as_ref();
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.into(), source })?;
        let config = Config::parse(&text, path)?;
        let problems = config.problems();
        if problems.is_empty() { Ok(config) } else { Err(ConfigError::Invalid { path: path.into(), problems }) }
    }

    /// The file's text, as far as it is well formed; [`Config::problems`] says whether it makes sense.
    ///
    /// # Errors
    /// [`ConfigError::Parse`].
    pub fn parse(text: &str, path: &Path) -> Result<Config, ConfigError> {
        toml::from_str(text).map_err(|source| ConfigError::Parse { path: path.into(), source: Box::new(source) })
    }

    /// Everything in it that contradicts itself, each with the section that it is in: `[tables.tasks]: …`.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if self.tables.is_empty() {
            problems.push("no [tables.NAME] is declared, so there is nothing to sync".to_owned());
        }
        for name in self.session.settings.keys() {
            let is_part = |part: &str| {
                part.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
                    && part.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
            };
            if !name.contains('.') || !name.split('.').all(is_part) || name.to_lowercase().starts_with("millstream.") {
                problems.push(format!(
                    "[session.settings]: `{name}`: only settings of the application's own can be set, such as `app.tenant`"
                ));
            }
        }
        for (kind, scope) in &self.scopes {
            if kind == USER_KIND || kind == GLOBAL_KIND {
                problems.push(format!("[scopes.{kind}]: `{kind}` is built in; choose another name"));
            } else if format!("{kind}:x").parse::<millstream_schemas::Scope>().is_err() {
                problems.push(format!("[scopes.{kind}]: a kind is a lower-case identifier, such as `project`"));
            }
            if scope.membership.as_slice().is_empty() {
                problems.push(format!("[scopes.{kind}]: `membership` is empty, so nobody could read it"));
            }
            for membership in scope.membership.as_slice() {
                problems.extend(self.membership_problem(membership).map(|what| format!("[scopes.{kind}]: {what}")));
            }
        }
        if let Err(cycle) = self.kinds() {
            problems.push(format!(
                "[scopes.{}]: it is reached through itself ({}); membership must come from users in the end",
                cycle[0],
                cycle.join(" through ")
            ));
        }
        for (name, table) in &self.tables {
            if table.scope.as_slice().is_empty() {
                problems.push(format!("[tables.{name}]: `scope` is empty, so nobody could read it"));
            }
            for scope in table.scope.as_slice() {
                let known =
                    scope.kind == USER_KIND || scope.kind == GLOBAL_KIND || self.scopes.contains_key(&scope.kind);
                if !known {
                    problems.push(format!(
                        "[tables.{name}]: scope kind `{0}` is not declared; add [scopes.{0}]",
                        scope.kind
                    ));
                }
                if (scope.kind == GLOBAL_KIND) != scope.column.is_none() {
                    problems.push(format!(
                        "[tables.{name}]: every scope but `global` names its `column`, and `global` none"
                    ));
                }
            }
            problems.extend(table.problems().into_iter().map(|what| format!("[tables.{name}]: {what}")));
        }
        problems
    }

    /// Tables that are read for the memberships that their rows grant, and are not synced: clients do not know of them.
    pub fn sources(&self) -> impl Iterator<Item = &str> {
        let granting = self.scopes.values().flat_map(|scope| scope.membership.as_slice());
        let names: BTreeSet<&str> = granting.map(|membership| membership.table.as_str()).collect();
        names.into_iter().filter(|name| !self.tables.contains_key(*name))
    }

    /// The memberships that rows of a table grant, each with its kind of scope.
    pub(crate) fn granted_by<'c>(&'c self, table: &str) -> impl Iterator<Item = (&'c str, &'c MembershipConfig)> {
        let all =
            self.scopes.iter().flat_map(|(kind, scope)| scope.membership.as_slice().iter().map(move |of| (kind, of)));
        all.filter(move |(_, of)| of.table == table).map(|(kind, of)| (kind.as_str(), of))
    }

    /// What contradicts itself in a membership: the first thing.
    fn membership_problem(&self, membership: &MembershipConfig) -> Option<String> {
        let MembershipConfig { table, user, roles, through, via, .. } = membership;
        match (user, through, via) {
            (Some(_), None, None) => {}
            (None, Some(through), Some(_)) if self.scopes.contains_key(through) => {}
            (None, Some(through), Some(_)) => {
                return Some(format!("`through` names `{through}`, which is not declared; add [scopes.{through}]"));
            }
            _ => {
                return Some(format!(
                    "membership by `{table}` names either the column `user`, or both `through` (a kind of scope) and `via` (the column with its id)"
                ));
            }
        }
        let roles = roles.as_ref()?;
        if user.is_none() {
            return Some("`roles` is for rows that name a `user`".to_owned());
        }
        roles.r#in.is_empty().then(|| "`roles.in` is empty, so nobody would be a member".to_owned())
    }

    /// The declared kinds of scopes, each behind those that it is reached through; or a circle among them, from a kind to
    /// itself.
    pub(crate) fn kinds(&self) -> Result<Vec<&str>, Vec<&str>> {
        fn visit<'c>(
            config: &'c Config,
            kind: &'c str,
            path: &mut Vec<&'c str>,
            sorted: &mut Vec<&'c str>,
        ) -> Result<(), Vec<&'c str>> {
            if let Some(start) = path.iter().position(|open| *open == kind) {
                return Err([&path[start..], &[kind]].concat());
            }
            let Some((kind, scope)) = config.scopes.get_key_value(kind).filter(|_| !sorted.contains(&kind)) else {
                return Ok(());
            };
            path.push(kind);
            for through in scope.membership.as_slice().iter().filter_map(|membership| membership.through.as_deref()) {
                visit(config, through, path, sorted)?;
            }
            path.pop();
            sorted.push(kind);
            Ok(())
        }
        let mut sorted = Vec::new();
        for kind in self.scopes.keys() {
            visit(self, kind, &mut Vec::new(), &mut sorted)?;
        }
        Ok(sorted)
    }
}

impl TableConfig {
    /// Of a table that is read for its memberships alone.
    pub(crate) fn source() -> TableConfig {
        TableConfig { conflict: Some(Conflict::Arrival), ..TableConfig::default() }
    }

    fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        for (index, rule) in self.rules.iter().enumerate() {
            let code = &rule.code;
            let is_identifier = code.len() <= MAX_RULE_BYTES
                && code.starts_with(|c: char| c.is_ascii_lowercase())
                && code.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
            if !is_identifier {
                problems.push(format!("rule `{code}`: a code is a lower-case identifier, such as `title_too_short`"));
            }
            if self.rules[..index].iter().any(|other| other.code == *code) {
                problems.push(format!("rule `{code}` is declared twice"));
            }
            if rule.on.is_empty() || rule.check.trim().is_empty() {
                problems.push(format!("rule `{code}`: name its operations in `on` and its predicate in `check`"));
            }
            if rule.message.is_empty() || rule.message.len() > MAX_FAILURE_MESSAGE_BYTES {
                problems.push(format!("rule `{code}`: `message` has 1 to {MAX_FAILURE_MESSAGE_BYTES} bytes"));
            }
        }
        let ClockNames { field_clocks, updated_at, client_id } = &self.clocks;
        if field_clocks == updated_at || updated_at == client_id || client_id == field_clocks {
            problems.push("`clocks` gives two of its columns one name".to_owned());
        }
        let write = [("insert", &self.write.insert), ("update", &self.write.update), ("delete", &self.write.delete)];
        let predicates = write.into_iter().filter_map(|(op, sql)| Some((format!("`write.{op}`"), sql.as_ref()?)));
        let rules = self.rules.iter().map(|rule| (format!("rule `{}`", rule.code), &rule.check));
        for (place, _) in predicates.chain(rules).filter(|(_, sql)| sql.to_lowercase().contains(RESERVED)) {
            problems.push(format!("{place}: names that begin with `{RESERVED}` are Millstream's; rename yours"));
        }
        if let Some(validate) = &self.validate {
            if validate.on.is_empty() {
                problems.push("`validate.on` names no operation".to_owned());
            }
            if !(1..=MAX_DEADLINE_MS).contains(&validate.deadline_ms) {
                problems.push(format!("`validate.deadline_ms` is 1 to {MAX_DEADLINE_MS}"));
            }
        }
        problems
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str) -> String {
        match Config::parse(text, Path::new("millstream.toml")) {
            Ok(config) if config.problems().is_empty() => "ok".to_owned(),
            Ok(config) => config.problems().join("\n"),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn mistakes_are_named() {
        let table = "[tables.notes]\nscope = { kind = \"user\", column = \"owner_id\" }\n";
        assert_eq!(check(table), "ok");
        for (text, says) in [
            ("", "nothing to sync"),
            ("[tables.a]\nscope = { kind = \"global\", column = \"x\" }", "`global` none"),
            ("[tables.a]\nscope = { kind = \"team\", column = \"x\" }", "add [scopes.team]"),
            ("[tables.a]\nscope = []", "nobody could read it"),
            ("[tables.a]\nscope = { kind = \"global\" }\nwritabel = []", "writabel"),
            (
                &format!("{table}[scopes.user]\nmembership = {{ table = \"notes\", user = \"a\", scope = \"b\" }}"),
                "built in",
            ),
            (&format!("{table}conflict = \"maybe\""), "maybe"),
            (
                &format!("{table}rules = [{{ code = \"A b\", message = \"m\", on = [\"insert\"], check = \"true\" }}]"),
                "lower-case",
            ),
            (&format!("{table}rules = [{{ code = \"a\", message = \"m\", on = [], check = \"true\" }}]"), "`on`"),
            (&format!("{table}write.insert = \"EXISTS (TABLE Millstream_known)\""), "`write.insert`: names that begin"),
            (&format!("{table}validate = {{ on = [\"insert\"], deadline_ms = 0 }}"), "deadline_ms"),
            (&format!("{table}clocks = {{ updated_at = \"at\" }}"), "ok"),
            (&format!("{table}clocks = {{ updated_at = \"client_id\" }}"), "one name"),
            (&format!("{table}clocks = {{ created_at = \"at\" }}"), "created_at"),
        ] {
            assert!(check(text).contains(says), "{text}\n{}", check(text));
        }
    }

    #[test]
    fn mistakes_in_memberships_are_named() {
        let tables = "[tables.notes]\nscope = { kind = \"user\", column = \"owner_id\" }\n[scopes]\n";
        for (scopes, says) in [
            ("a = { membership = { table = \"notes\", scope = \"b\", user = \"c\" } }", "ok"),
            (
                "a = { membership = { table = \"notes\", scope = \"b\" } }",
                "either the column `user`, or both `through`",
            ),
            ("a = { membership = { table = \"notes\", scope = \"b\", usr = \"c\" } }", "unknown field `usr`"),
            ("a = { membership = [{ table = \"notes\", scope = \"b\", usr = \"c\" }] }", "unknown field `usr`"),
            ("a = { membership = 1 }", "a table or a list of tables"),
            ("a = { membership = [] }", "`membership` is empty"),
            (
                "a = { membership = { table = \"notes\", scope = \"b\", user = \"c\", via = \"d\" } }",
                "[scopes.a]: membership by `notes` names either",
            ),
            (
                "a = { membership = { table = \"notes\", scope = \"b\", through = \"z\", via = \"d\" } }",
                "[scopes.a]: `through` names `z`, which is not declared; add [scopes.z]",
            ),
            (
                "a = { membership = { table = \"notes\", scope = \"b\", user = \"c\", roles = { column = \"r\", in = [] } } }",
                "[scopes.a]: `roles.in` is empty",
            ),
            (
                "a = { membership = { table = \"notes\", scope = \"b\", through = \"a\", via = \"d\" } }",
                "[scopes.a]: it is reached through itself (a through a)",
            ),
            (
                "a = { membership = { table = \"notes\", scope = \"b\", through = \"e\", via = \"d\" } }\n\
                 e = { membership = { table = \"notes\", scope = \"b\", through = \"f\", via = \"d\" } }\n\
                 f = { membership = { table = \"notes\", scope = \"b\", through = \"e\", via = \"d\" } }",
                "[scopes.e]: it is reached through itself (e through f through e)",
            ),
            (
                "a = { membership = { table = \"notes\", scope = \"b\", through = \"e\", via = \"d\", roles = { column = \"r\", in = [\"x\"] } } }\n\
                 e = { membership = { table = \"notes\", scope = \"b\", user = \"c\" } }",
                "[scopes.a]: `roles` is for rows that name a `user`",
            ),
        ] {
            let found = check(&format!("{tables}{scopes}"));
            assert!(found.contains(says), "{scopes}\n{found}");
        }
    }

    #[test]
    fn kinds_come_behind_those_they_are_reached_through() {
        let text = "[tables.t]\nscope = { kind = \"global\" }\n[scopes]\n\
            a = { membership = [{ table = \"t\", scope = \"b\", through = \"c\", via = \"d\" }, { table = \"t\", scope = \"b\", user = \"u\" }] }\n\
            b = { membership = { table = \"t\", scope = \"b\", through = \"a\", via = \"d\" } }\n\
            c = { membership = { table = \"t\", scope = \"b\", user = \"u\" } }";
        assert_eq!(check(text), "ok");
        assert_eq!(Config::parse(text, Path::new("")).unwrap().kinds(), Ok(vec!["c", "a", "b"]));
    }

    #[test]
    fn all_mistakes_are_named_at_once() {
        let text =
            "[tables.a]\nscope = { kind = \"team\" }\nvalidate = { on = [], deadline_ms = 0 }\n[tables.b]\nscope = []";
        let says = check(text);
        assert_eq!(says.lines().count(), 5, "{says}");
    }

    #[test]
    fn the_board_example_is_valid() {
        Config::read(concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/board/millstream.toml")).unwrap();
    }
}
