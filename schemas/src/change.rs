//! Row operations, inbound and outbound.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// One column's value: `null`, or the text that Postgres itself writes for it (`numeric`, `bigint`, `timestamptz` and
/// arrays therefore travel exactly). Booleans are `t` and `f`, `bytea` is `\x…`, times are ISO 8601 in UTC.
pub type Value = Option<String>;

/// The values of one row, in the order of the columns that go with it.
pub type Row = Vec<Value>;

/// What a client did to a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Operation {
    /// A new row; `columns` and `values` hold every column that the client set, the key among them.
    Insert,
    /// Changed columns of an existing row.
    Update,
    /// The row is gone; `columns` and `values` are empty.
    Delete,
}

impl Operation {
    /// The word on the wire and in SQL comments.
    pub fn as_str(self) -> &'static str {
        match self {
            Operation::Insert => "insert",
            Operation::Update => "update",
            Operation::Delete => "delete",
        }
    }
}

/// One row operation as a client recorded it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Change {
    /// UUIDv7, made when the change was recorded; stays the same over resends and retries.
    pub change_id: Uuid,
    /// Name of a synced table.
    pub table: String,
    /// What was done.
    pub op: Operation,
    /// The row's primary key, in the order of the table's key columns.
    pub key: Row,
    /// Names of the columns that were set.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub columns: Vec<String>,
    /// Their values, in the same order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub values: Row,
    /// Those of `columns`, of whole numbers, whose value is an amount to add to what the row has, instead of what it becomes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub adds: Vec<String>,
    /// Of a delete: an earlier delete of the client has taken the row along, as far as it knows (`cascades` of a reference). Where the
    /// row is gone, that is what its author wanted.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub gone: bool,
    /// When the change was made: microseconds since 1970, from the client's hybrid logical clock.
    pub stamp: u64,
}

/// What happened to rows of a table in Postgres.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum TableOp {
    /// `rows` are whole rows (or, with `columns`, those columns): inserted, or replaced where the key exists.
    Upsert,
    /// `rows` hold `columns` (the key among them); other columns keep their value (unchanged TOAST).
    Update,
    /// `rows` hold the primary keys of deleted rows.
    Delete,
    /// Every row of the table is gone, in all scopes; `rows` is empty.
    Truncate,
}

/// Consecutive row changes of one table and one kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TableChanges {
    /// Name of a synced table.
    pub table: String,
    /// What happened to the rows.
    pub op: TableOp,
    /// Columns of each row. Absent: all columns in the schema's order (for deletes: the key columns in key order).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub columns: Option<Vec<String>>,
    /// One array per row.
    pub rows: Vec<Row>,
}
