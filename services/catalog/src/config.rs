//! `millstream.toml` as written.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use millstream_schemas::subject::{GLOBAL_KIND, USER_KIND};
use serde::Deserialize;

/// The whole file.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
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
    /// Who may read it.
    pub membership: MembershipConfig,
}

/// A row of `table` makes the user in column `user` a member of the scope in column `scope`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MembershipConfig {
    /// A synced table.
    pub table: String,
    /// Column with the user id.
    pub user: String,
    /// Column with the scope's id.
    pub scope: String,
}

/// A synced table.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TableConfig {
    /// The scope, or scopes, of its rows.
    pub scope: OneOrMany<TableScopeConfig>,
    /// Columns that clients may set.
    #[serde(default)]
    pub writable: Vec<String>,
    /// Who may write; an operation without a rule is refused.
    #[serde(default)]
    pub write: WriteConfig,
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

/// One value, or a list of them.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub enum OneOrMany<T> {
    /// One.
    One(T),
    /// Several.
    Many(Vec<T>),
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
    #[error("{}: {what}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Where and what.
        what: String,
    },
}

impl Config {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn read(path: impl AsRef<Path>) -> Result<Config, ConfigError> {
        let path = path.as_ref().to_path_buf();
        let text = std::fs::read_to_string(&path).map_err(|source| ConfigError::Read { path: path.clone(), source })?;
        Config::parse(&text, path)
    }

    fn parse(text: &str, path: PathBuf) -> Result<Config, ConfigError> {
        let config: Config = toml::from_str(text)
            .map_err(|source| ConfigError::Parse { path: path.clone(), source: Box::new(source) })?;
        config.check().map_err(|what| ConfigError::Invalid { path, what })?;
        Ok(config)
    }

    fn check(&self) -> Result<(), String> {
        if self.tables.is_empty() {
            return Err("no [tables.NAME] is declared, so there is nothing to sync".to_owned());
        }
        for (kind, scope) in &self.scopes {
            if kind == USER_KIND || kind == GLOBAL_KIND {
                return Err(format!("[scopes.{kind}]: `{kind}` is built in; choose another name"));
            }
            if format!("{kind}:x").parse::<millstream_schemas::Scope>().is_err() {
                return Err(format!("[scopes.{kind}]: a kind is a lower-case identifier, such as `project`"));
            }
            if !self.tables.contains_key(&scope.membership.table) {
                return Err(format!(
                    "[scopes.{kind}]: membership table `{0}` is not synced; declare [tables.{0}]",
                    scope.membership.table
                ));
            }
        }
        for (name, table) in &self.tables {
            if table.scope.as_slice().is_empty() {
                return Err(format!("[tables.{name}]: `scope` is empty, so nobody could read it"));
            }
            for scope in table.scope.as_slice() {
                let known =
                    scope.kind == USER_KIND || scope.kind == GLOBAL_KIND || self.scopes.contains_key(&scope.kind);
                if !known {
                    return Err(format!(
                        "[tables.{name}]: scope kind `{0}` is not declared; add [scopes.{0}]",
                        scope.kind
                    ));
                }
                if (scope.kind == GLOBAL_KIND) != scope.column.is_none() {
                    return Err(format!(
                        "[tables.{name}]: every scope but `global` names its `column`, and `global` none"
                    ));
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str) -> String {
        match Config::parse(text, "millstream.toml".into()) {
            Ok(_) => "ok".to_owned(),
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
            (
                &format!("{table}[scopes.team]\nmembership = {{ table = \"m\", user = \"a\", scope = \"b\" }}"),
                "declare [tables.m]",
            ),
        ] {
            assert!(check(text).contains(says), "{text}\n{}", check(text));
        }
    }

    #[test]
    fn the_board_example_is_valid() {
        Config::read(concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/board/millstream.toml")).unwrap();
    }
}
