//! What changes of one kind depend on, and whether two kinds may be in each other's way. Pure.

use std::collections::HashSet;

use millstream_catalog::Table;
use millstream_schemas::Operation;

use crate::sql::predicate::Mentions;
use crate::sql::traits::{PrimaryKey, Traits, WrittenTable};

/// Table, operation and columns of changes, and what they depend on.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    /// Of the statement.
    pub id: usize,
    pub op: Operation,
    /// One row at a time, since the outcome for a row may depend on the rows before it.
    pub alone: bool,
    /// Rows of one user only, since more than the predicate's `auth` may read who writes.
    pub personal: bool,
    /// Its order with everything else is kept: it may read or write anything, and who writes.
    pub barrier: bool,
    /// What it sets off may write rows too, which get its clock.
    pub cause: bool,
    /// Of an insert that may become an update: the keys by which the row can be there already.
    pub primary_keys: Vec<PrimaryKey>,
    /// COMMIT decides about it: in a transaction of its own.
    pub deferred: bool,
    /// Its table has constraints by which inserts and deletes of different rows can be in each other's way.
    ordered: bool,
    /// Foreign keys that it touches.
    pub parents: Vec<Reference>,
    /// Tables that it writes, its own first.
    writes: Vec<u32>,
    /// Tables from which a delete takes rows away.
    takes: Vec<u32>,
    /// Their names, and those of its partitions.
    written: HashSet<String>,
    /// What its predicates mention.
    reads: HashSet<String>,
}

/// A foreign key that a shape touches.
#[derive(Clone, Debug)]
pub(crate) struct Reference {
    pub table: u32,
    /// Index of the value among the step's, and the column's type, where it names the parent's key.
    pub value: Option<(usize, String)>,
}

impl Shape {
    /// Takes together what is known. `mentions` is of all predicates of the operation.
    pub fn new(
        id: usize,
        table: &Table,
        op: Operation,
        columns: &[usize],
        traits: &Traits,
        mentions: Mentions,
        reads_view: bool,
    ) -> Shape {
        let set = |names: &[String]| columns.iter().any(|index| names.contains(&table.columns[*index].name));
        let own = table.name.rsplit('.').next().unwrap_or(&table.name).to_lowercase();
        let cascades: &[WrittenTable] = if op == Operation::Delete { &traits.cascades } else { &[] };
        let writes = std::iter::once(traits.root).chain(cascades.iter().map(|written| written.oid)).collect();
        let names = cascades.iter().map(|written| &written.name).chain(&traits.partitions);
        let written = names.cloned().chain([own]).collect();
        let touched = traits.parents.iter().filter(|parent| op != Operation::Update || set(&parent.columns));
        let parents: Vec<Reference> = touched
            .map(|parent| {
                let place = match parent.columns.as_slice() {
                    [column] if parent.to_key => columns.iter().position(|index| table.columns[*index].name == *column),
                    _ => None,
                };
                let value = place.map(|place| (place, table.columns[columns[place]].sql_type.clone()));
                Reference { table: parent.oid, value }
            })
            .collect();
        let under_unique = op == Operation::Update && set(&traits.unique_columns);
        let cascade_triggers = !cascades.is_empty() && traits.cascade_triggers;
        let refers_to_itself = parents.iter().any(|parent| parent.table == traits.root);
        let reads_what_it_writes = !mentions.names.is_disjoint(&written);
        let barrier = traits.triggers
            || traits.row_security
            || traits.functions
            || under_unique
            || cascade_triggers
            || mentions.functions
            || reads_view;
        let sets = match op {
            Operation::Insert => false,
            Operation::Update => traits.moves,
            Operation::Delete => traits.sets,
        };
        let cause = barrier || sets;
        Shape {
            id,
            op,
            alone: cause || refers_to_itself || reads_what_it_writes,
            personal: barrier || traits.settings,
            barrier,
            cause,
            primary_keys: match op {
                Operation::Insert if table.insert_existing_merges => traits.primary_keys.clone(),
                Operation::Insert | Operation::Update | Operation::Delete => Vec::new(),
            },
            deferred: traits.deferred,
            ordered: traits.sequences || !traits.unique_columns.is_empty(),
            parents,
            writes,
            takes: traits.takes.clone(),
            written,
            reads: mentions.names,
        }
    }

    /// The table that it is for.
    pub fn table(&self) -> u32 {
        self.writes[0]
    }

    /// Whether its deletes take rows away that are of the other's table.
    pub fn takes_from(&self, other: &Shape) -> bool {
        self.op == Operation::Delete && self.takes.contains(&other.table())
    }

    /// Whether rows with different keys come to the same in any order. Not so where they exclude each other, nor where
    /// what goes with one deleted row may be what keeps another.
    pub fn is_unordered(&self) -> bool {
        !self.ordered && self.writes.len() == 1
    }

    /// Whether changes of these shapes, of rows with different keys, may depend on their order.
    pub fn depends_on_order(&self, other: &Shape) -> bool {
        let one_way = |a: &Shape, b: &Shape| {
            a.barrier
                || !a.written.is_disjoint(&b.reads)
                || a.writes[1..].iter().any(|oid| b.writes.contains(oid))
                // What goes with a deleted row may be what kept another one from being deleted.
                || (a.writes.len() > 1 && b.op == Operation::Delete && a.id != b.id)
                || b.parents.iter().any(|parent| {
                    // A new parent can be told from others by its key; a deleted one has referrers that are not named.
                    a.writes.contains(&parent.table)
                        && match a.op {
                            Operation::Insert => b.op != Operation::Delete && parent.value.is_none(),
                            Operation::Update => false,
                            Operation::Delete => true,
                        }
                })
        };
        let moves = |shape: &Shape| shape.op != Operation::Update;
        (self.table() == other.table() && self.ordered && moves(self) && moves(other))
            || one_way(self, other)
            || one_way(other, self)
    }
}
