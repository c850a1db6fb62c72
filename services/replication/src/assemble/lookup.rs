//! Values that the change stream does not carry: the question to the database, and its answer.

/// Columns to be read from the table, since the change stream does not carry them and a new reader needs them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lookup {
    /// Index of the table among the synced ones.
    pub table: usize,
    /// Columns by which the row is found, with their values: its key, and what names its scopes. If it has gone on to other
    /// scopes by now, its values are not for those that it was in.
    pub fixed: Vec<(usize, Option<String>)>,
    /// Indexes of the columns to be read.
    pub columns: Vec<usize>,
    /// Whether lengths will do, if they are far below the limit of a row.
    pub lengths: bool,
}

/// The answer to a [`Lookup`]: columns and what was found there.
pub type Filled = Vec<(usize, ReadValue)>;

/// A value that was read from the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReadValue {
    /// Null.
    Null,
    /// Its text.
    Text(String),
    /// It is too large to be read.
    TooLarge,
    /// Bytes of its text, which was not read.
    Length(usize),
}

impl From<Option<String>> for ReadValue {
    fn from(value: Option<String>) -> ReadValue {
        value.map_or(ReadValue::Null, ReadValue::Text)
    }
}
