//! How the rows of synced tables are held and replicated: which tables hold them, which columns of old rows are told, and
//! whether keys may change hands within a transaction.

use std::collections::BTreeSet;

use sqlx::{PgConnection, Row};

use crate::model::{Catalog, Table};

/// A question about how tables are replicated that Postgres did not answer.
#[derive(Debug, thiserror::Error)]
#[error("cannot {operation}")]
pub struct Unanswered {
    /// What was to be done.
    pub operation: &'static str,
    /// Why it could not be.
    pub source: sqlx::Error,
}

impl Unanswered {
    pub(crate) fn at(operation: &'static str) -> impl FnOnce(sqlx::Error) -> Unanswered {
        move |source| Unanswered { operation, source }
    }
}

/// How one synced table is replicated.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Shape {
    /// Of a partitioned table: for each column of the catalog, whether the replica identities of all partitions cover it.
    pub partitions: Option<Vec<bool>>,
    /// Its primary key is deferrable: within a transaction two rows may have one key.
    pub loose_key: bool,
    /// Columns that deletes and moves need, and that some replica identity does not cover.
    pub uncovered: Vec<usize>,
}

impl Shape {
    /// Whether every delete and move can be routed.
    pub fn is_routable(&self) -> bool {
        self.uncovered.is_empty()
    }
}

/// A table that holds rows of a synced table: the table itself, one of its partitions, or a child by inheritance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// As SQL writes it.
    pub name: String,
    /// Its name without the schema.
    pub short: String,
    /// `pg_class.relkind`: `r`, `f` for a foreign table, `p` for a partitioned one.
    pub kind: String,
    /// Neither unlogged nor temporary.
    pub logged: bool,
    /// A child by `INHERITS`, which is no partition.
    pub inherits: bool,
    /// `pg_class.relreplident`: `d`, `n`, `f`, `i`.
    pub identity: String,
    /// The columns that its replica identity covers, unless that is `FULL`.
    pub columns: BTreeSet<String>,
    /// It has a primary key, which is deferrable.
    pub loose_key: bool,
    /// Its columns that may be null.
    pub nullable: BTreeSet<String>,
}

impl Holder {
    /// Whether old rows hold a column.
    fn covers(&self, column: &str) -> bool {
        self.identity == "f" || self.columns.contains(column)
    }
}

/// A synced table and what holds its rows, itself first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holders(pub Vec<Holder>);

impl Holders {
    /// Reads them for every synced table, in the catalog's order.
    ///
    /// # Errors
    /// Postgres cannot be asked.
    pub async fn read_all(connection: &mut PgConnection, catalog: &Catalog) -> Result<Vec<Holders>, Unanswered> {
        let mut all = Vec::with_capacity(catalog.tables.len());
        for table in &catalog.tables {
            all.push(Holders::read(connection, table).await?);
        }
        Ok(all)
    }

    async fn read(connection: &mut PgConnection, table: &Table) -> Result<Holders, Unanswered> {
        let rows = sqlx::query(
            "WITH RECURSIVE held AS (SELECT $1::bigint::oid AS oid, false AS inherits UNION ALL \
               SELECT h.inhrelid, NOT c.relispartition FROM held JOIN pg_inherits h ON h.inhparent = held.oid \
               JOIN pg_class c ON c.oid = h.inhrelid) \
             SELECT c.oid::regclass::text, c.relname::text, c.relkind::text, c.relpersistence = 'p', held.inherits, c.relreplident::text, \
               ARRAY(SELECT a.attname::text FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1]) \
                     WHERE i.indrelid = c.oid AND i.indisvalid AND i.indimmediate \
                     AND CASE c.relreplident WHEN 'd' THEN i.indisprimary WHEN 'i' THEN i.indisreplident ELSE false END), \
               EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisprimary AND NOT i.indimmediate), \
               ARRAY(SELECT a.attname::text FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped AND NOT a.attnotnull) \
             FROM held JOIN pg_class c USING (oid) ORDER BY c.oid <> $1::bigint::oid, 1",
        )
        .bind(i64::from(table.oid))
        .fetch_all(connection)
        .await
        .map_err(Unanswered::at("read replica identities"))?;
        let holder = |row: &sqlx::postgres::PgRow| Holder {
            name: row.get(0),
            short: row.get(1),
            kind: row.get(2),
            logged: row.get(3),
            inherits: row.get(4),
            identity: row.get(5),
            columns: row.get::<Vec<String>, _>(6).into_iter().collect(),
            loose_key: row.get(7),
            nullable: row.get::<Vec<String>, _>(8).into_iter().collect(),
        };
        Ok(Holders(rows.iter().map(holder).collect()))
    }

    /// The tables whose rows the change stream brings: the table itself, or its partitions.
    pub fn published(&self) -> impl Iterator<Item = &Holder> {
        self.0.iter().filter(|holder| holder.kind == "r" && !holder.inherits)
    }

    /// What the assembler asks.
    pub fn shape(&self, table: &Table) -> Shape {
        let is_partitioned = self.0.first().is_some_and(|holder| holder.kind == "p");
        let covered = |name: &str| self.published().all(|holder| holder.covers(name));
        let uncovered = table.identity_columns().into_iter().filter(|column| !covered(&table.columns[*column].name));
        Shape {
            uncovered: uncovered.collect(),
            partitions: is_partitioned.then(|| table.columns.iter().map(|column| covered(&column.name)).collect()),
            loose_key: self.0.first().is_some_and(|holder| holder.loose_key),
        }
    }

    /// Those whose deletes and moves cannot be routed, each with what its identity lacks.
    pub fn unroutable<'h>(&'h self, table: &Table) -> Vec<(&'h Holder, Vec<String>)> {
        let needed: Vec<String> =
            table.identity_columns().into_iter().map(|column| table.columns[column].name.clone()).collect();
        let lacks = |holder: &Holder| needed.iter().filter(|column| !holder.covers(column)).cloned().collect();
        self.published()
            .map(|holder| (holder, lacks(holder)))
            .filter(|(_, lacks): &(_, Vec<String>)| !lacks.is_empty())
            .collect()
    }
}
