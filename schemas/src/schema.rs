//! The synced tables as clients see them.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// All synced tables under a version. Rows on the wire are arrays in the order of a table's `columns`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Schema {
    /// Hash of the tables below (16 hexadecimal digits).
    pub version: String,
    /// The tables, by name.
    pub tables: Vec<TableSchema>,
}

impl Schema {
    /// The table of that name.
    pub fn table(&self, name: &str) -> Option<&TableSchema> {
        self.tables.iter().find(|table| table.name == name)
    }
}

/// One synced table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TableSchema {
    /// Its name, the same in Postgres and in the local store.
    pub name: String,
    /// Its columns in wire order.
    pub columns: Vec<ColumnSchema>,
    /// Indexes into `columns` of the primary key, in key order.
    pub key: Vec<usize>,
    /// The scopes that a row belongs to. A row leaves the client when the client holds none of them.
    pub scopes: Vec<TableScope>,
    /// The synced tables whose rows its rows refer to by their primary key. A client holds changes of a row back while the creation of
    /// what it refers to is in trouble.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub references: Vec<Reference>,
    /// Index of the column that holds a row's clocks, where changes merge by column.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clocks: Option<usize>,
}

impl TableSchema {
    /// Index of the column of that name.
    pub fn column(&self, name: &str) -> Option<usize> {
        self.columns.iter().position(|column| column.name == name)
    }
}

/// One column.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ColumnSchema {
    /// Its name.
    pub name: String,
    /// Postgres' name of its type, such as `timestamp with time zone`; of a domain, of the type below it.
    pub r#type: String,
    /// Whether it may be null.
    pub nullable: bool,
    /// Whether clients may set it.
    pub writable: bool,
    /// The value that it has where an insert names none, in its text form; absent if there is none, or none that is always the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub default: Option<String>,
    /// How concurrent changes of it meet, if both are to count.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub merge: Option<Merge>,
    /// What SQLite has for its values, if it is a `numeric` and that is declared; else they are text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub numeric: Option<Numeric>,
}

/// What SQLite has for the values of a `numeric` column. On the wire they are text, whatever is declared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Numeric {
    /// A floating-point number: it compares as a number, with some 15 digits.
    Real,
    /// A whole number of the smallest unit that the column's scale has: 12.50 in `numeric(10,2)` is 1250.
    Integer,
    /// Postgres' own text: exact, and compared as text.
    Text,
}

/// How concurrent changes of a column meet, where neither may be lost: in any order they come to the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Merge {
    /// Both are added: an update sends the amount by which it changed the number (`adds` of a change).
    Add,
    /// The greater value stays.
    Max,
    /// The lesser value stays.
    Min,
}

/// A foreign key to the primary key of a synced table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Reference {
    /// Indexes of the columns that hold it, in the order of the other table's key. A row refers to nothing if one of them is null.
    pub columns: Vec<usize>,
    /// Name of the other table.
    pub table: String,
    /// Whether the delete of a row takes those along that refer to it (`ON DELETE CASCADE`).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub cascades: bool,
}

/// How a row's scope is read off it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TableScope {
    /// Kind of scope, such as `project`; `user` and `global` are built in.
    pub kind: String,
    /// Index of the column that holds the scope's id; absent for `global`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub column: Option<usize>,
}
