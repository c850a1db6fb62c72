//! Resolving the configuration against the database.

use std::collections::HashMap;
use std::time::Duration;

use millstream_schemas::TableScope;
use millstream_schemas::clock::{CLIENT_ID, FIELD_CLOCKS, UPDATED_AT};
use sha2::{Digest, Sha256};
use sqlx::{PgConnection, Row};

use crate::config::{Config, Conflict, DeleteMissing, TableConfig};
use crate::model::{Catalog, Column, ConflictPolicy, Membership, Rule, Table, Validate, WriteRules};

/// Why the configuration does not fit the database.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CatalogError {
    /// The database's catalog cannot be read.
    #[error("cannot read the database's catalog")]
    Query(#[source] sqlx::Error),
    /// A declaration does not fit.
    #[error("[tables.{table}]: {what}")]
    Table {
        /// As written in the file.
        table: String,
        /// What is wrong and what to do.
        what: String,
    },
}

impl CatalogError {
    fn table(table: &str, what: impl Into<String>) -> Self {
        CatalogError::Table { table: table.to_owned(), what: what.into() }
    }
}

impl Catalog {
    /// Finds every declared table, its columns, types and key in the database.
    ///
    /// # Errors
    /// A table or column does not exist, a table has no primary key, or the database cannot be asked.
    pub async fn load(connection: &mut PgConnection, config: &Config) -> Result<Catalog, CatalogError> {
        let mut tables = Vec::with_capacity(config.tables.len());
        for (name, declared) in &config.tables {
            tables.push(table(connection, name, declared, config).await?);
        }
        let by_name = tables.iter().enumerate().map(|(index, table)| (table.name.clone(), index)).collect();
        let by_oid = tables.iter().enumerate().map(|(index, table)| (table.oid, index)).collect();
        let mut catalog = Catalog { version: String::new(), tables, by_name, by_oid };
        catalog.version = version(&catalog);
        Ok(catalog)
    }
}

/// First 16 hexadecimal digits of the SHA-256 of what clients see, so that every service computes the same.
fn version(catalog: &Catalog) -> String {
    let mut hash = Sha256::new();
    for table in &catalog.tables {
        let schema = table.schema();
        hash.update(format!("{}\n{:?}\n{:?}\n{:?}\n", schema.name, schema.key, schema.scopes, schema.clocks));
        for column in &schema.columns {
            hash.update(format!("{}\t{}\t{}\t{}\n", column.name, column.r#type, column.nullable, column.writable));
        }
    }
    hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

async fn table(
    connection: &mut PgConnection,
    name: &str,
    declared: &TableConfig,
    config: &Config,
) -> Result<Table, CatalogError> {
    let (schema, relation) = name.split_once('.').unwrap_or(("public", name));
    let found = sqlx::query(
        "SELECT c.oid::int8 AS oid, c.relkind::text AS kind, c.relreplident::text AS identity,
                format('%I.%I', n.nspname, c.relname) AS sql_name
         FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE n.nspname = $1 AND c.relname = $2 AND c.relkind IN ('r', 'p', 'v', 'm', 'f')",
    )
    .bind(schema)
    .bind(relation)
    .fetch_optional(&mut *connection)
    .await
    .map_err(CatalogError::Query)?
    .ok_or_else(|| CatalogError::table(name, format!("table {schema}.{relation} does not exist in the database")))?;
    if !matches!(found.get("kind"), "r" | "p") {
        return Err(CatalogError::table(name, "only ordinary and partitioned tables can be synced, not views"));
    }
    let oid: i64 = found.get("oid");

    let (columns, numbers) = columns(connection, oid, name, declared).await?;
    let key_numbers: Option<Vec<i16>> =
        // By way of text: an int2vector counts from 0, which sqlx does not decode.
        sqlx::query_scalar(
            "SELECT string_to_array(indkey::text, ' ')::int2[] FROM pg_index \
             WHERE indrelid = $1::int8::oid AND indisprimary",
        )
            .bind(oid)
            .fetch_optional(&mut *connection)
            .await
            .map_err(CatalogError::Query)?;
    let key = key_numbers
        .ok_or_else(|| CatalogError::table(name, "it has no primary key; a synced table needs one"))?
        .iter()
        .map(|number| numbers.iter().position(|n| n == number))
        .collect::<Option<Vec<_>>>()
        .ok_or_else(|| CatalogError::table(name, "a generated column is part of its primary key"))?;

    let index = |column: &str| {
        columns
            .iter()
            .position(|c| c.name == column)
            .ok_or_else(|| CatalogError::table(name, format!("it has no column `{column}`")))
    };
    let mut scopes = Vec::new();
    for scope in declared.scope.as_slice() {
        let column = scope.column.as_deref().map(index).transpose()?;
        scopes.push(TableScope { kind: scope.kind.clone(), column });
    }
    let mut memberships = Vec::new();
    for (kind, scope) in config.scopes.iter().filter(|(_, scope)| scope.membership.table == name) {
        let membership = &scope.membership;
        memberships.push(Membership {
            kind: kind.clone(),
            user: index(&membership.user)?,
            scope: index(&membership.scope)?,
        });
    }
    if declared.write.insert.is_some() {
        for &column in &key {
            if !columns[column].writable {
                let missing = &columns[column].name;
                return Err(CatalogError::table(
                    name,
                    format!("clients may insert, so the key column `{missing}` must be in `writable`"),
                ));
            }
        }
    }
    let conflict = conflict(name, declared.conflict, &columns)?;
    Ok(Table {
        oid: u32::try_from(oid).unwrap_or_default(),
        name: name.to_owned(),
        sql_name: found.get("sql_name"),
        columns,
        key,
        scopes,
        memberships,
        write: WriteRules {
            insert: declared.write.insert.clone(),
            update: declared.write.update.clone(),
            delete: declared.write.delete.clone(),
        },
        conflict,
        delete_missing_accepted: declared.delete_missing == DeleteMissing::Accept,
        rules: declared
            .rules
            .iter()
            .map(|rule| Rule {
                code: rule.code.clone(),
                message: rule.message.clone(),
                on: rule.on.clone(),
                check: rule.check.clone(),
            })
            .collect(),
        validate: declared.validate.as_ref().map(|validate| Validate {
            on: validate.on.clone(),
            deadline: Duration::from_millis(validate.deadline_ms),
        }),
        identity_full: found.get::<&str, _>("identity") == "f",
    })
}

/// How concurrent changes meet: as declared, else by what columns there are.
fn conflict(table: &str, declared: Option<Conflict>, columns: &[Column]) -> Result<ConflictPolicy, CatalogError> {
    let find = |name: &str, sql_type: &str| {
        let found = columns.iter().position(|column| column.name == name && column.sql_type == sql_type);
        match found {
            Some(index) if columns[index].writable => {
                Err(CatalogError::table(table, format!("`{name}` is kept by Millstream: take it out of `writable`")))
            }
            found => Ok(found),
        }
    };
    let missing = |policy: &str, needs: &str| {
        let what = format!(
            "conflict = \"{policy}\" needs {needs}; `millstream attach {table}` writes the migration that adds them"
        );
        CatalogError::table(table, what)
    };
    let clocks = || find(FIELD_CLOCKS, "jsonb");
    let updated_at = || find(UPDATED_AT, "timestamp with time zone");
    let client_id = || find(CLIENT_ID, "uuid");
    let by_column = || -> Result<Option<ConflictPolicy>, CatalogError> {
        let Some(clocks) = clocks()? else { return Ok(None) };
        Ok(Some(ConflictPolicy::Column { clocks, updated_at: updated_at()?, client_id: client_id()? }))
    };
    let by_row = || -> Result<Option<ConflictPolicy>, CatalogError> {
        let (Some(updated_at), Some(client_id)) = (updated_at()?, client_id()?) else { return Ok(None) };
        Ok(Some(ConflictPolicy::Row { updated_at, client_id }))
    };
    match declared {
        Some(Conflict::Column) => by_column()?.ok_or_else(|| missing("column", "a column `field_clocks jsonb`")),
        Some(Conflict::Row) => {
            by_row()?.ok_or_else(|| missing("row", "columns `updated_at timestamptz` and `client_id uuid`"))
        }
        Some(Conflict::Arrival) => Ok(ConflictPolicy::Arrival),
        // A column `client_id` may well be the app's own: merging by row has to be asked for.
        None => Ok(by_column()?.unwrap_or(ConflictPolicy::Arrival)),
    }
}

/// The synced columns and their attribute numbers. Generated columns are left out: the WAL does not carry them.
async fn columns(
    connection: &mut PgConnection,
    oid: i64,
    name: &str,
    declared: &TableConfig,
) -> Result<(Vec<Column>, Vec<i16>), CatalogError> {
    let rows = sqlx::query(
        "SELECT attname::text AS name, quote_ident(attname) AS sql_name, attnum AS number, atttypid::int8 AS type,
                format_type(atttypid, atttypmod) AS sql_type, attnotnull AS not_null
         FROM pg_attribute WHERE attrelid = $1::int8::oid AND attnum > 0 AND NOT attisdropped AND attgenerated = ''
         ORDER BY attnum",
    )
    .bind(oid)
    .fetch_all(&mut *connection)
    .await
    .map_err(CatalogError::Query)?;
    let mut writable: HashMap<&str, bool> = declared.writable.iter().map(|column| (column.as_str(), false)).collect();
    let mut columns = Vec::with_capacity(rows.len());
    let mut numbers = Vec::with_capacity(rows.len());
    for row in &rows {
        let column: String = row.get("name");
        let writable = writable.get_mut(column.as_str()).map(|seen| *seen = true).is_some();
        columns.push(Column {
            sql_name: row.get("sql_name"),
            sql_type: row.get("sql_type"),
            type_oid: u32::try_from(row.get::<i64, _>("type")).unwrap_or_default(),
            nullable: !row.get::<bool, _>("not_null"),
            writable,
            name: column,
        });
        numbers.push(row.get("number"));
    }
    if let Some(unknown) = declared.writable.iter().find(|column| !writable[column.as_str()]) {
        return Err(CatalogError::table(
            name,
            format!("`writable` names `{unknown}`, which is not a column of it (generated columns cannot be written)"),
        ));
    }
    Ok((columns, numbers))
}
