//! Whether every synced table can be replicated: it is in the publication, and its replica identity covers what deletes
//! and moves between scopes need.

use std::collections::HashSet;

use millstream_catalog::{Catalog, Table};
use sqlx::{PgConnection, Row};

use crate::error::Error;
use crate::relation::identity_columns;

/// Refuses tables that cannot be replicated, with what to do about each.
pub async fn check(connection: &mut PgConnection, catalog: &Catalog, publication: &str) -> Result<(), Error> {
    let encoding: String = sqlx::query_scalar("SELECT current_setting('server_encoding')")
        .fetch_one(&mut *connection)
        .await
        .map_err(Error::postgres("read the database's encoding"))?;
    if encoding == "SQL_ASCII" {
        return Err(Error::Encoding);
    }
    let mut problems = publication_problems(connection, catalog, publication).await?;
    problems.extend(identity_problems(connection, catalog).await?.into_iter().map(|(_, problem)| problem));
    if problems.is_empty() { Ok(()) } else { Err(Error::Tables(problems.join("\n"))) }
}

/// The replica identities that do not cover what deletes and moves between scopes need: table, and what to do.
///
/// # Errors
/// Postgres cannot be asked.
pub async fn identity_problems(
    connection: &mut PgConnection,
    catalog: &Catalog,
) -> Result<Vec<(String, String)>, Error> {
    let mut problems = Vec::new();
    for table in &catalog.tables {
        let found = identity(connection, table).await?;
        problems.extend(problem(table, &found).map(|problem| (table.name.clone(), problem)));
    }
    Ok(problems)
}

/// The tables that the publication lacks, and what to do about each.
///
/// # Errors
/// Postgres cannot be asked.
pub async fn publication_problems(
    connection: &mut PgConnection,
    catalog: &Catalog,
    publication: &str,
) -> Result<Vec<String>, Error> {
    let mut problems = Vec::new();
    let published = published(connection, publication).await?;
    for table in &catalog.tables {
        match &published {
            None => {}
            Some(published) if published.contains(&i64::from(table.oid)) => {}
            Some(_) => problems.push(format!(
                "{} is not in the publication {publication}: run `millstream setup`, or ALTER PUBLICATION {} ADD TABLE {}",
                table.name,
                quoted(publication),
                table.sql_name
            )),
        }
    }
    if published.is_none() {
        problems.push(format!("the publication {publication} does not exist: run `millstream setup`"));
    }
    Ok(problems)
}

/// Object ids of the published tables (roots of partitioned ones); none if there is no such publication.
async fn published(connection: &mut PgConnection, publication: &str) -> Result<Option<HashSet<i64>>, Error> {
    let exists: bool = sqlx::query_scalar("SELECT EXISTS (SELECT FROM pg_publication WHERE pubname = $1)")
        .bind(publication)
        .fetch_one(&mut *connection)
        .await
        .map_err(Error::postgres("read the publication"))?;
    if !exists {
        return Ok(None);
    }
    let rows = sqlx::query(
        "SELECT c.oid::bigint FROM pg_publication_tables t JOIN pg_class c ON c.relname = t.tablename \
         JOIN pg_namespace n ON n.oid = c.relnamespace AND n.nspname = t.schemaname WHERE t.pubname = $1",
    )
    .bind(publication)
    .fetch_all(connection)
    .await
    .map_err(Error::postgres("read the publication's tables"))?;
    Ok(Some(rows.into_iter().map(|row| row.get(0)).collect()))
}

/// The replica identities of a table and its partitions: for each, its name and the covered columns, or none for `FULL`.
type Identities = Vec<(String, Option<HashSet<String>>)>;

async fn identity(connection: &mut PgConnection, table: &Table) -> Result<Identities, Error> {
    // What counts is the identity of the table that holds the row: of each partition, not of their root.
    let rows = sqlx::query(
        "SELECT c.oid::regclass::text, c.relreplident = 'f', \
           ARRAY(SELECT a.attname::text FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1]) \
                 WHERE i.indrelid = c.oid AND i.indisvalid \
                 AND CASE c.relreplident WHEN 'd' THEN i.indisprimary WHEN 'i' THEN i.indisreplident ELSE false END) \
         FROM pg_class c WHERE c.relkind = 'r' AND (c.oid = $1::bigint::oid \
           OR c.oid IN (SELECT relid FROM pg_partition_tree($1::bigint::oid::regclass)))",
    )
    .bind(i64::from(table.oid))
    .fetch_all(connection)
    .await
    .map_err(Error::postgres("read replica identities"))?;
    Ok(rows
        .into_iter()
        .map(|row| {
            let columns: Vec<String> = row.get(2);
            (row.get(0), (!row.get::<bool, _>(1)).then(|| columns.into_iter().collect()))
        })
        .collect())
}

fn problem(table: &Table, identities: &Identities) -> Option<String> {
    let needed: Vec<&str> =
        identity_columns(table).into_iter().map(|column| table.columns[column].name.as_str()).collect();
    identities.iter().find_map(|(name, covered)| {
        let covered = covered.as_ref()?;
        let missing: Vec<&str> = needed.iter().copied().filter(|column| !covered.contains(*column)).collect();
        if missing.is_empty() {
            return None;
        }
        let columns: Vec<String> = needed.iter().map(|column| quoted(column)).collect();
        let index = quoted(&format!("{}_identity", table.name));
        Some(format!(
            "the replica identity of {name} lacks {}, so its deletes cannot be routed: \
             CREATE UNIQUE INDEX {index} ON {name} ({}); ALTER TABLE {name} REPLICA IDENTITY USING INDEX {index} \
             (all these columns NOT NULL), or ALTER TABLE {name} REPLICA IDENTITY FULL",
            missing.join(", "),
            columns.join(", ")
        ))
    })
}

fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}
