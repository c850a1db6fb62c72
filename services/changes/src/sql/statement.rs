//! The SQL that writes: one static text per shape (table, operation, set of columns), for any number of rows.
//!
//! Its parameters are arrays, one a column: key, values, who writes, the change's clock. Values arrive as text and are cast
//! to their column's type, so what Postgres once wrote reads back exactly. The statement decides what has to hold in one
//! view of the database: whether the row is there, whether the user may (the permission predicate), whether the declared
//! rules hold, and whether the change is newer than what it writes over (see [`millstream_schemas::clock`]). It writes and
//! tells of the rows for which all that is so; a second text explains the others.
//!
//! Identifiers come from the catalog alone.

use std::collections::HashMap;
use std::sync::Arc;

use millstream_schemas::{Clock, Operation};
use sqlx::Postgres;
use sqlx::postgres::PgArguments;
use sqlx::query::Query;
use uuid::Uuid;

use crate::decide::validator::CheckedChange;
use crate::sql::predicate::Mentions;
use crate::sql::shape::Shape;
use crate::sql::traits::Traits;
use crate::sql::writer::Writer;

/// Most texts kept; column sets are the clients' choice, so there can be many.
const MAX_CACHED: usize = 1_000;
/// The texts of a shape.
#[derive(Debug)]
pub(crate) struct Statement {
    /// Writes the rows. Updates and deletes give for each row that they wrote its number (1, 2, 3 …) and, where some
    /// columns lost, the newest clock of those. Watched ones give `version` of each row that is there, and whether it was `written`.
    pub sql: Arc<str>,
    /// Deletes instead of which a trigger may write the row.
    pub watched: bool,
    /// Says of rows that were not written, by number: `found`, `readable` (told of those that are not allowed), `allowed`,
    /// `broken` (index into `rules`), `wins`, the newest clock that the row has, `winner`, and its `version` where that was made by
    /// this transaction.
    pub explain_sql: Arc<str>,
    /// Says whether the rows to update are there and the user may read them, without a look at the values.
    pub readable_sql: Arc<str>,
    /// The declared rules for the operation: code and message.
    pub rules: Vec<(String, String)>,
    /// Row security may keep rows from being written that can be seen.
    pub row_security: bool,
    /// What it depends on.
    pub shape: Shape,
}

/// One row of a statement's parameters.
#[derive(Clone, Copy, Debug)]
pub(crate) struct InputRow<'a> {
    pub step: &'a CheckedChange<'a>,
    pub user_id: &'a str,
    pub client_id: Uuid,
    pub clock: Clock,
}

/// What a statement is for: the table, the operation, the columns that are set, and those that are added to.
type Name = (u32, Operation, Vec<usize>, Vec<usize>);

/// The texts made so far.
#[derive(Debug, Default)]
pub(crate) struct Statements {
    /// Sets the application's settings for an author; none if none are declared.
    pub settings_sql: Option<Arc<str>>,
    traits: HashMap<u32, Traits>,
    views: Vec<String>,
    cache: HashMap<Name, Arc<Statement>>,
    ordered: HashMap<(usize, usize), bool>,
    made: usize,
}

impl Statements {
    /// Starts with what the database says of tables, and the names of views.
    pub fn new(traits: Vec<Traits>, views: Vec<String>) -> Self {
        Statements { traits: traits.into_iter().map(|traits| (traits.oid, traits)).collect(), views, ..Self::default() }
    }

    /// The statement for a change.
    pub fn of(&mut self, step: &CheckedChange<'_>) -> Arc<Statement> {
        let key = (step.table.oid, step.op, step.columns.clone(), step.adds.clone());
        if let Some(statement) = self.cache.get(&key) {
            return statement.clone();
        }
        if self.cache.len() >= MAX_CACHED {
            self.cache.clear();
            self.ordered.clear();
        }
        self.made += 1;
        let (table, op, columns) = (step.table, step.op, step.columns.as_slice());
        let unknown = Traits::unknown(table.oid);
        let traits = self.traits.get(&table.oid).unwrap_or(&unknown);
        let mut writer = Writer { table, op, columns, adds: &step.adds, first: 1, watched: false };
        let mut mentions = Mentions::default();
        writer.predicates().for_each(|sql| mentions.add(Mentions::of(sql)));
        // Where the row is there already, it is an update.
        let merges = op == Operation::Insert && table.insert_existing_merges && table.write.update.is_some();
        if merges {
            let update = Writer { op: Operation::Update, ..writer };
            update.predicates().for_each(|sql| mentions.add(Mentions::of(sql)));
        }
        let reads_view = self.views.iter().any(|view| mentions.names.contains(view));
        // A refusal depends on who is a member by then.
        if op != Operation::Insert || merges {
            mentions.names.extend(Mentions::of(&table.readable).names);
        }
        let shape = Shape::new(self.made, table, op, columns, traits, mentions, reads_view);
        // Rewrite rules cannot be where a delete is a part of a statement.
        let watched = shape.cause && op == Operation::Delete && !traits.rules;
        writer.watched = watched;
        let statement = Arc::new(Statement {
            sql: if watched { writer.delete_watched() } else { writer.write() }.into(),
            watched,
            explain_sql: writer.explain(traits.row_security).into(),
            readable_sql: writer.readable().into(),
            rules: writer.rules().map(|rule| (rule.code.clone(), rule.message.clone())).collect(),
            row_security: traits.row_security,
            shape,
        });
        self.cache.insert(key, statement.clone());
        statement
    }

    /// Whether changes of two shapes may depend on their order, even if of different rows.
    pub fn depend_on_order(&mut self, a: &Shape, b: &Shape) -> bool {
        let pair = (a.id.min(b.id), a.id.max(b.id));
        *self.ordered.entry(pair).or_insert_with(|| a.depends_on_order(b))
    }
}

/// A statement's text is made of the catalog's names and the operator's predicates; values are bound.
pub(crate) fn bind<'q>(
    mut query: Query<'q, Postgres, PgArguments>,
    op: Operation,
    rows: &[InputRow<'q>],
) -> Query<'q, Postgres, PgArguments> {
    let step = rows[0].step;
    let keys = if op == Operation::Insert { 0 } else { step.key.len() };
    for place in 0..keys {
        query = query.bind(rows.iter().map(|row| row.step.key[place].as_deref()).collect::<Vec<Option<&str>>>());
    }
    for place in 0..step.values.len() {
        query = query.bind(rows.iter().map(|row| row.step.values[place]).collect::<Vec<Option<&str>>>());
    }
    query
        .bind(rows.iter().map(|row| row.user_id).collect::<Vec<&str>>())
        .bind(rows.iter().map(|row| row.client_id).collect::<Vec<Uuid>>())
        .bind(rows.iter().map(|row| row.clock.to_string()).collect::<Vec<String>>())
        .bind(rows.iter().map(|row| row.clock.stamp as i64).collect::<Vec<i64>>())
}
