//! Which scopes a user may read: the edge decides it here alone. What a client says of its scopes is a claim, and deliveries, catch-ups and
//! snapshots follow what is read here.

use std::collections::BTreeSet;
use std::fmt::Write;

use millstream_catalog::{Catalog, Members};
use millstream_schemas::Scope;
use millstream_schemas::subject::USER_KIND;
use sqlx::{AssertSqlSafe, Row};
use uuid::Uuid;

use crate::snapshot::{Snapshot, SnapshotError, query};

impl Snapshot {
    /// The scopes that a user may read. Ids are compared as texts: so does the stream.
    ///
    /// # Errors
    /// Postgres failed.
    pub async fn scopes(&mut self, catalog: &Catalog, user_id: &str) -> Result<BTreeSet<Scope>, SnapshotError> {
        let mut scopes = BTreeSet::from([Scope::global(), Scope::user(user_id)]);
        for (table, membership) in catalog.memberships() {
            let column = |index: usize| &table.columns[index];
            // Of the other scopes, those of a kind have been read by now.
            let (members, of, roles) = match &membership.of {
                Members::User { column, roles } => (*column, vec![user_id], roles.as_ref()),
                Members::Through { kind, column } => {
                    let held = scopes.iter().filter(|scope| scope.kind == *kind).map(|scope| scope.id.as_str());
                    (*column, held.collect(), None)
                }
            };
            if of.is_empty() {
                continue;
            }
            // Identifiers come quoted from the catalog. The last row shows that this is the answer to this question: no other
            // answer, above all an empty one, is ever taken for the user's memberships.
            let proof = Uuid::new_v4().to_string();
            let mut sql = format!(
                "SELECT DISTINCT {} FROM {} WHERE {} AND {} IS NOT NULL",
                column(membership.scope).text(),
                table.sql_rows(),
                column(members).is_among("$1"),
                column(membership.scope).sql_name,
            );
            if let Some((role, _)) = roles {
                let _ = write!(sql, " AND ({}) COLLATE \"C\" = ANY ($3)", column(*role).text());
            }
            sql.push_str(" UNION ALL SELECT $2::text");
            let mut memberships = sqlx::query(AssertSqlSafe(sql)).bind(of).bind(&proof);
            if let Some((_, allowed)) = roles {
                memberships = memberships.bind(allowed);
            }
            let rows = self.lease.all(memberships).await.map_err(query("read memberships"))?;
            let mut ids = Vec::with_capacity(rows.len());
            for row in &rows {
                ids.push(row.try_get::<String, _>(0).map_err(query("read memberships"))?);
            }
            let proven = ids.iter().position(|id| *id == proof).map(|at| ids.swap_remove(at));
            if proven.is_none() {
                return Err(SnapshotError::Foreign("memberships"));
            }
            // Such an id is no scope to replication either; one bad row must not lock its user out.
            scopes
                .extend(ids.into_iter().filter(|id| Scope::fits(id)).map(|id| Scope::new(membership.kind.clone(), id)));
        }
        Ok(scopes)
    }

    /// Whether Postgres spells a user's id so, in every column that holds users'. Else rows for the user would be told of in
    /// another scope than the one that the session holds.
    ///
    /// # Errors
    /// Postgres failed.
    pub async fn spells(&mut self, catalog: &Catalog, user_id: &str) -> Result<bool, SnapshotError> {
        let columns = catalog.tables.iter().flat_map(|table| {
            let users = table.row_scope_columns().filter(|scope| scope.kind == USER_KIND);
            users.filter_map(|scope| scope.column).map(|column| table.columns[column].sql_type.as_str())
        });
        let types: BTreeSet<&str> =
            columns.filter(|name| *name != "text" && !name.starts_with("character varying")).collect();
        if types.is_empty() {
            return Ok(true);
        }
        // Types come from the catalog.
        let same: Vec<String> = types.iter().map(|name| format!("concat($1::text::{name}) = $1")).collect();
        let sql = format!("SELECT {}", same.join(" AND "));
        match self.lease.one(sqlx::query(AssertSqlSafe(sql)).bind(user_id)).await {
            Ok(row) => row.try_get(0).map_err(query("compare the user's id")),
            // Class 22: it is no value of the type.
            Err(sqlx::Error::Database(error)) if error.code().is_some_and(|code| code.starts_with("22")) => Ok(false),
            Err(error) => Err(query("compare the user's id")(error)),
        }
    }
}
