//! Whether every synced table can be replicated: it is in the publication, all that holds its rows is in the write-ahead log,
//! and its replica identity covers what deletes and moves between scopes need.

use std::collections::{BTreeMap, HashSet};

use sqlx::{PgConnection, Row};

use crate::holders::{Holder, Holders, Unanswered};
use crate::model::{Catalog, Table};

/// Something about a table that keeps its rows from being replicated as they should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Misfit {
    /// The table, as in `millstream.toml`.
    pub table: String,
    /// What is wrong.
    pub message: String,
    /// What to do.
    pub fix: String,
}

/// What keeps rows of synced tables from being replicated as they should be.
///
/// # Errors
/// Postgres cannot be asked.
pub async fn identity_problems(connection: &mut PgConnection, catalog: &Catalog) -> Result<Vec<Misfit>, Unanswered> {
    let all = Holders::read_all(connection, catalog).await?;
    Ok(catalog.tables.iter().zip(&all).flat_map(|(table, holders)| misfits(table, holders)).collect())
}

/// The tables that the publication lacks, and what to do about each.
///
/// # Errors
/// Postgres cannot be asked.
pub async fn publication_problems(
    connection: &mut PgConnection,
    catalog: &Catalog,
    publication: &str,
) -> Result<Vec<String>, Unanswered> {
    let mut problems = Vec::new();
    let published = published(connection, publication).await?;
    for table in &catalog.tables {
        match &published {
            None => {}
            Some(published) if published.contains(&i64::from(table.oid)) => {}
            Some(_) => problems.push(format!(
                "{} is not in the publication {publication}: run `millstream setup`, or ALTER PUBLICATION {} ADD TABLE ONLY {}",
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
async fn published(connection: &mut PgConnection, publication: &str) -> Result<Option<HashSet<i64>>, Unanswered> {
    let exists: bool = sqlx::query_scalar("SELECT EXISTS (SELECT FROM pg_publication WHERE pubname = $1)")
        .bind(publication)
        .fetch_one(&mut *connection)
        .await
        .map_err(Unanswered::at("read the publication"))?;
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
    .map_err(Unanswered::at("read the publication's tables"))?;
    Ok(Some(rows.into_iter().map(|row| row.get(0)).collect()))
}

/// What keeps rows of a table from being replicated as they should be.
pub fn misfits(table: &Table, holders: &Holders) -> Vec<Misfit> {
    let misfit = |message: String, fix: String| Misfit { table: table.name.clone(), message, fix };
    let mut found = Vec::new();
    for holder in &holders.0 {
        let name = &holder.name;
        if holder.inherits {
            found.push(misfit(
                format!(
                    "{name} inherits from it: SELECT shows its rows as rows of {}, and clients never get them",
                    table.name
                ),
                format!("ALTER TABLE {name} NO INHERIT {}", table.sql_name),
            ));
        } else if holder.kind == "f" {
            found.push(misfit(
                format!("its partition {name} is a foreign table: changes of its rows are not in the write-ahead log"),
                format!("ALTER TABLE {} DETACH PARTITION {name}", table.sql_name),
            ));
        } else if !holder.logged {
            found.push(misfit(
                format!("{name} is unlogged: changes of its rows are not in the write-ahead log"),
                format!("ALTER TABLE {name} SET LOGGED"),
            ));
        }
    }
    let needed: Vec<&str> =
        table.identity_columns().into_iter().map(|column| table.columns[column].name.as_str()).collect();
    // Index names are of a schema: each gets its own.
    let mut names: BTreeMap<String, usize> = BTreeMap::new();
    for (holder, lacks) in holders.unroutable(table) {
        found.push(misfit(reason(holder, &lacks), remedy(holder, &needed, &mut names)));
    }
    found
}

fn reason(holder: &Holder, lacks: &[String]) -> String {
    let name = &holder.name;
    match holder.identity.as_str() {
        "n" => format!(
            "{name} has REPLICA IDENTITY NOTHING: once it is published, the application's own UPDATE and DELETE fail"
        ),
        "d" if holder.loose_key => format!(
            "the primary key of {name} is deferrable, which Postgres takes for no replica identity: once it is published, the \
             application's own UPDATE and DELETE fail"
        ),
        _ if holder.columns.is_empty() => format!(
            "{name} has no replica identity: once it is published, the application's own UPDATE and DELETE fail"
        ),
        _ => format!(
            "the replica identity of {name} lacks {}, so its deletes and moves cannot be routed",
            lacks.join(", ")
        ),
    }
}

/// SQL that makes a replica identity: by an index where all columns allow it.
fn remedy(holder: &Holder, needed: &[&str], names: &mut BTreeMap<String, usize>) -> String {
    /// Longest name of an object in Postgres, in bytes.
    const MAX_NAME_BYTES: usize = 63;
    let name = &holder.name;
    let full = format!("ALTER TABLE {name} REPLICA IDENTITY FULL");
    // An index would hold at once what a deferrable key holds at COMMIT only.
    if holder.loose_key || needed.iter().any(|column| holder.nullable.contains(*column)) {
        return full;
    }
    let mut stem = holder.short.clone();
    while stem.len() > MAX_NAME_BYTES - "_identity99".len() {
        stem.pop();
    }
    let times = names.entry(stem.clone()).or_default();
    *times += 1;
    let index = quoted(&format!("{stem}_identity{}", if *times > 1 { times.to_string() } else { String::new() }));
    let columns: Vec<String> = needed.iter().map(|column| quoted(column)).collect();
    format!(
        "CREATE UNIQUE INDEX CONCURRENTLY {index} ON {name} ({});\nALTER TABLE {name} REPLICA IDENTITY USING INDEX {index}",
        columns.join(", ")
    )
}

fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}
