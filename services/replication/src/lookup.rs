//! Values that the change stream did not repeat, read from their tables. A read must see the transaction that asks for it:
//! see [`Lookups::sees`].

use std::sync::Arc;

use millstream_catalog::Table;
use millstream_runtime::postgres::is_about_content;
use sqlx::{PgPool, Row};

use crate::assemble::{Filled, Limits, Lookup, ReadValue};
use crate::error::Error;

/// What reads them.
pub struct Lookups {
    pool: PgPool,
    tables: Arc<[Table]>,
    /// Bytes of a row that clients get.
    limit: usize,
}

impl Lookups {
    /// For the tables that an assembler's lookups name.
    pub fn new(pool: PgPool, tables: Arc<[Table]>, limits: Limits) -> Self {
        Lookups { pool, tables, limit: limits.row }
    }

    /// The table that a lookup reads.
    pub fn table(&self, lookup: &Lookup) -> &str {
        &self.tables[lookup.table].name
    }

    /// Whether reads that begin now see a committed transaction, by the 32 bits of its id that the change stream tells.
    /// Source: PostgreSQL documentation, "Transaction ID and Snapshot Information Functions".
    pub async fn sees(&self, xid: u32) -> Result<bool, Error> {
        // The id nearest to the snapshot's end that ends in these bits: one that runs may lie behind that end.
        sqlx::query_scalar(
            "SELECT pg_visible_in_snapshot((ends - ((ends - $1 + 2147483648 & 4294967295) - 2147483648))::text::xid8, now) \
             FROM (SELECT s AS now, pg_snapshot_xmax(s)::text::bigint AS ends FROM pg_current_snapshot() AS s) AS snapshot",
        )
        .bind(i64::from(xid))
        .fetch_one(&self.pool)
        .await
        .map_err(|source| Error::Lookup { source })
    }

    /// Reads large values that the change stream did not repeat, unless they are too large to be sent. A row that is gone by
    /// now, or has another key or scope, is settled by a later message of the change stream.
    pub async fn fill(&self, lookup: &Lookup) -> Result<Filled, Error> {
        let table = &self.tables[lookup.table];
        let limit = self.limit;
        let (mut inner, mut outer) = (Vec::new(), Vec::new());
        for (index, &column) in lookup.columns.iter().enumerate() {
            let column = &table.columns[column];
            let (name, text) = (&column.sql_name, column.text());
            let text = match is_stored_as_text(&column.sql_type) {
                true => format!("CASE WHEN octet_length({name}) <= {limit} THEN {text} END"),
                false => text,
            };
            inner.push(format!("{text} AS t{index}, {name} IS DISTINCT FROM NULL AS p{index}"));
            let fits = format!("octet_length(t{index}) <= {limit}");
            outer.push(format!("CASE WHEN {fits} THEN t{index} END, p{index} AND NOT coalesce({fits}, false)"));
        }
        let fixed: Vec<String> = lookup
            .fixed
            .iter()
            .enumerate()
            .map(|(index, (place, _))| {
                let column = &table.columns[*place];
                // An index serves equality only.
                let is = if table.key.contains(place) { "=" } else { "IS NOT DISTINCT FROM" };
                format!("{} {is} ${}::text::{}", column.sql_name, index + 1, column.sql_type)
            })
            .collect();
        if lookup.lengths
            && let Some(lengths) = self.lengths(lookup, &fixed).await?
        {
            return Ok(lengths);
        }
        // OFFSET keeps the two levels apart: a long text is made once.
        let sql = format!(
            "SELECT {} FROM (SELECT {} FROM {} WHERE {} OFFSET 0) AS found",
            outer.join(", "),
            inner.join(", "),
            table.sql_rows(),
            fixed.join(" AND ")
        );
        // Every name in the statement comes from the catalog; values are bound.
        let mut query = sqlx::query(sqlx::AssertSqlSafe(sql));
        for (_, value) in &lookup.fixed {
            query = query.bind(value);
        }
        let row = match query.fetch_optional(&self.pool).await {
            Ok(Some(row)) => row,
            Ok(None) => return Ok(Filled::new()),
            // So large that Postgres itself cannot write it as text.
            Err(sqlx::Error::Database(error)) if error.code().is_some_and(|code| is_about_content(&code)) => {
                return Ok(lookup.columns.iter().map(|&column| (column, ReadValue::TooLarge)).collect());
            }
            Err(source) => return Err(Error::Lookup { source }),
        };
        let found = |index: usize| match row.get(2 * index + 1) {
            true => ReadValue::TooLarge,
            false => row.get::<Option<String>, _>(2 * index).into(),
        };
        Ok(lookup.columns.iter().enumerate().map(|(index, &column)| (column, found(index))).collect())
    }

    /// How long values are, by the condition that finds their row; none if they may be too long together, or cannot be measured.
    async fn lengths(&self, lookup: &Lookup, fixed: &[String]) -> Result<Option<Filled>, Error> {
        let table = &self.tables[lookup.table];
        let length = |&column: &usize| {
            let column = &table.columns[column];
            let text = if is_stored_as_text(&column.sql_type) { column.sql_name.clone() } else { column.text() };
            format!("coalesce(octet_length({text}), 0)::int8")
        };
        let lengths: Vec<String> = lookup.columns.iter().map(length).collect();
        let sql =
            format!("SELECT ARRAY[{}] FROM {} WHERE {}", lengths.join(", "), table.sql_rows(), fixed.join(" AND "));
        let mut query = sqlx::query_scalar::<_, Vec<i64>>(sqlx::AssertSqlSafe(sql));
        for (_, value) in &lookup.fixed {
            query = query.bind(value);
        }
        let lengths = match query.fetch_optional(&self.pool).await {
            Ok(Some(lengths)) => lengths,
            Ok(None) => return Ok(Some(Filled::new())),
            Err(sqlx::Error::Database(error)) if error.code().is_some_and(|code| is_about_content(&code)) => {
                return Ok(None);
            }
            Err(source) => return Err(Error::Lookup { source }),
        };
        // As JSON they are longer, by a little as a rule.
        let is_far_below = lengths.iter().sum::<i64>() < i64::try_from(self.limit / 2).unwrap_or(i64::MAX);
        let found =
            |(&column, length): (&usize, i64)| (column, ReadValue::Length(usize::try_from(length).unwrap_or_default()));
        Ok(is_far_below.then(|| lookup.columns.iter().zip(lengths).map(found).collect()))
    }
}

/// Whether the size of a type's value in store tells, without reading it, how long its text is at least.
fn is_stored_as_text(sql_type: &str) -> bool {
    let is_varchar = sql_type.starts_with("character varying(") && sql_type.ends_with(')');
    is_varchar || matches!(sql_type, "text" | "bytea" | "character varying")
}
