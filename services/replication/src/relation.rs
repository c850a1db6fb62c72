//! Tables as the change stream describes them, mapped to the catalog, and the images of their rows.

use millstream_catalog::{Shape, Table};

use crate::pgoutput::{self, Old, Tuple, Value};

/// How the tuples of a relation map to a table of the catalog.
#[derive(Clone, Debug)]
pub struct Mapping {
    /// Index of the table among the synced ones.
    pub table: usize,
    /// For each column of the catalog, where the tuples have it; none if the relation lacks it.
    positions: Vec<Option<usize>>,
    /// For each position, whether it belongs to the replica identity.
    identity: Vec<bool>,
    /// Of a partitioned table, for each column of the catalog, whether the identities of all its partitions cover it. The
    /// relation is the root's, but old rows are written by the identity of the partition that holds them.
    partitions: Option<Vec<bool>>,
    /// Whether the relation has a column that the catalog does not know, lacks one, or has another type for one.
    pub differs: bool,
    /// Hash of the relation's shape.
    pub shape: u64,
}

impl Mapping {
    /// The mapping of a relation; none if the table is not synced.
    pub fn new(tables: &[Table], shapes: &[Shape], relation: &pgoutput::Relation<'_>) -> Option<Mapping> {
        let index = tables.iter().position(|table| table.oid == relation.id).or_else(|| {
            // A table that was dropped and created again has another object id: the catalog is out of date.
            let name = format!("{}.{}", relation.namespace, relation.name);
            tables.iter().position(|table| table.name == relation.name && table.sql_name.replace('"', "") == name)
        })?;
        let table = &tables[index];
        let positions: Vec<Option<usize>> = table
            .columns
            .iter()
            .map(|column| relation.columns.iter().position(|found| found.name == column.name))
            .collect();
        let differs =
            table.oid != relation.id
                || table.synced
                    && relation.columns.iter().any(|found| {
                        table.column(found.name).is_none() && !table.hidden.iter().any(|hidden| hidden == found.name)
                    })
                || table.columns.iter().zip(&positions).any(|(column, position)| {
                    position.is_none_or(|at| relation.columns[at].type_oid != column.type_oid)
                });
        let mut shape = std::hash::DefaultHasher::new();
        std::hash::Hash::hash(&relation.id, &mut shape);
        for column in &relation.columns {
            std::hash::Hash::hash(&(column.name, column.type_oid), &mut shape);
        }
        Some(Mapping {
            table: index,
            positions,
            identity: relation.columns.iter().map(|column| column.identity).collect(),
            partitions: shapes.get(index).and_then(|shape| shape.partitions.clone()),
            differs,
            shape: std::hash::Hasher::finish(&shape),
        })
    }

    /// Whether old images hold a column of the catalog, null or not.
    pub fn covers(&self, column: usize) -> bool {
        match &self.partitions {
            Some(covered) => covered.get(column).copied().unwrap_or(false),
            None => self.positions[column].is_some_and(|at| self.identity[at]),
        }
    }
}

/// One value of a row image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cell<'a> {
    /// The change stream does not have it: the relation lacks the column, or the old image is only a key.
    Absent,
    /// Stored out of line and not changed, so not sent.
    Unchanged,
    /// It cannot be carried: it is too large, or no UTF-8.
    Unsendable,
    /// Null.
    Null,
    /// Its text.
    Text(&'a str),
}

impl<'a> Cell<'a> {
    /// The text, if there is one.
    pub fn text(self) -> Option<&'a str> {
        match self {
            Cell::Text(text) => Some(text),
            Cell::Null | Cell::Absent | Cell::Unchanged | Cell::Unsendable => None,
        }
    }

    /// Whether its value is known.
    pub fn is_known(self) -> bool {
        matches!(self, Cell::Null | Cell::Text(_))
    }
}

/// The values of a row in the catalog's column order.
pub type Image<'a> = Vec<Cell<'a>>;

/// A tuple that does not fit its relation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadTuple {
    /// Another number of values than the relation has columns.
    #[error("the row has {found} values, its relation {expected} columns")]
    Width {
        /// Values in the tuple.
        found: usize,
        /// Columns of the relation.
        expected: usize,
    },
    /// A value in binary, which was not asked for.
    #[error("a value came in binary format")]
    Binary,
}

impl Mapping {
    /// The image of a new row.
    pub fn image<'a>(&self, tuple: &Tuple<'a>) -> Result<Image<'a>, BadTuple> {
        self.cells(tuple, |_, at| cell(&tuple[at]))
    }

    /// The image of an old row. Of a row of a partition, whatever has a value is known, however the message is tagged: that
    /// follows the root's identity. What is null may not have been written at all.
    pub fn old_image<'a>(&self, old: &Old<'a>) -> Result<Image<'a>, BadTuple> {
        let (tuple, key_only) = match old {
            Old::Key(tuple) => (tuple, true),
            Old::Full(tuple) => (tuple, false),
        };
        self.cells(tuple, |column, at| match (&self.partitions, &tuple[at]) {
            (Some(_), Value::Null) if !self.covers(column) => Ok(Cell::Absent),
            (None, _) if key_only && !self.identity[at] => Ok(Cell::Absent),
            (_, value) => cell(value),
        })
    }

    fn cells<'a>(
        &self,
        tuple: &Tuple<'a>,
        read: impl Fn(usize, usize) -> Result<Cell<'a>, BadTuple>,
    ) -> Result<Image<'a>, BadTuple> {
        if tuple.len() != self.identity.len() {
            return Err(BadTuple::Width { found: tuple.len(), expected: self.identity.len() });
        }
        let positions = self.positions.iter().enumerate();
        positions.map(|(column, at)| at.map_or(Ok(Cell::Absent), |at| read(column, at))).collect()
    }
}

fn cell<'a>(value: &Value<'a>) -> Result<Cell<'a>, BadTuple> {
    match *value {
        Value::Null => Ok(Cell::Null),
        Value::Unchanged => Ok(Cell::Unchanged),
        Value::TooLarge => Ok(Cell::Unsendable),
        Value::Text(bytes) => Ok(std::str::from_utf8(bytes).map_or(Cell::Unsendable, Cell::Text)),
        Value::Binary(_) => Err(BadTuple::Binary),
    }
}
