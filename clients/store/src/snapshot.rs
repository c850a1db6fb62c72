//! Snapshots and scopes: which rows the store holds, and why.
//!
//! A snapshot is gathered in a staging table, so that a big one needs no memory, and then applied as a difference: rows
//! that are equal stay untouched, rows that the snapshot lacks go unless another held scope has them. The queue and the
//! rows with changes under way survive: only their confirmed images change.

use millstream_client_core::rebase::Image;
use millstream_client_core::sql::{joined, literal, quote};
use millstream_schemas::subject::GLOBAL_KIND;
use millstream_schemas::{Row, Scope, TableChanges, TableOp};
use rusqlite::params;

use crate::apply::Applier;
use crate::error::{During, encode, parse};
use crate::statements::TableSql;
use crate::{Store, StoreError};

/// Rows taken from the staging area at a time.
const STAGE_PAGE: usize = 1_000;

impl Store {
    pub(crate) fn clear_stage(&mut self) -> Result<(), StoreError> {
        self.transact(|store| store.forget_staged())
    }

    pub(crate) fn forget_staged(&self) -> Result<(), StoreError> {
        self.run("DELETE FROM millstream_snapshot", "clearing the staging area")?;
        self.run("DELETE FROM millstream_meta WHERE key = 'snapshot'", "forgetting how far a snapshot was")
    }

    pub(crate) fn stage(&mut self, changes: &[TableChanges]) -> Result<(), StoreError> {
        self.transact(|store| {
            let mut statement = store
                .connection
                .prepare_cached("INSERT OR REPLACE INTO millstream_snapshot (tbl, key, row) VALUES (?1, ?2, ?3)")
                .during("preparing to stage rows")?;
            for change in changes {
                let table = store.table(&change.table)?;
                if change.op != TableOp::Upsert {
                    return Err(table.shape("a snapshot holds upserts only"));
                }
                let columns = table.columns(change.columns.as_deref())?;
                if columns.len() != table.table.columns.len() {
                    return Err(table.shape("a snapshot holds whole rows"));
                }
                let places = table.key_places(&columns)?;
                for row in &change.rows {
                    if row.len() != columns.len() {
                        return Err(table.shape("another number of values than columns"));
                    }
                    let mut ordered: Vec<&Option<String>> = vec![&None; columns.len()];
                    for (&column, value) in columns.iter().zip(row) {
                        ordered[column] = value;
                    }
                    statement
                        .execute(params![table.name(), table.key_json(row, &places), encode(&ordered)])
                        .during("staging a row")?;
                }
            }
            Ok(())
        })
    }

    fn mark_scope(&self, scope: &Scope) -> Result<(), StoreError> {
        self.connection
            .prepare_cached(
                "INSERT INTO millstream_scopes (kind, id, replaced) VALUES (?1, ?2, 1) ON CONFLICT (kind, id) DO UPDATE SET replaced = 1",
            )
            .and_then(|mut statement| statement.execute([&scope.kind, &scope.id]))
            .during("marking a scope")?;
        Ok(())
    }

    fn run(&self, sql: &str, operation: &'static str) -> Result<(), StoreError> {
        self.connection.prepare_cached(sql).and_then(|mut statement| statement.execute([])).during(operation)?;
        Ok(())
    }
}

/// Which rows leave.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Leave {
    /// Those of marked scopes that no other held scope has.
    Marked,
    /// The same, except the staged ones.
    MarkedUnstaged,
    /// All but the staged ones.
    Unstaged,
}

impl Applier<'_> {
    /// The staged rows are the rows of these scopes.
    pub fn snapshot(&mut self, scopes: &[Scope], full: bool) -> Result<(), StoreError> {
        for scope in scopes {
            self.store.mark_scope(scope)?;
        }
        self.apply_staged()?;
        self.purge(if full { Leave::Unstaged } else { Leave::MarkedUnstaged })?;
        if full {
            self.store.run("DELETE FROM millstream_scopes WHERE replaced = 0", "forgetting scopes")?;
            self.store.set_meta("resync", None::<i64>)?;
        }
        self.store.run("UPDATE millstream_scopes SET replaced = 0 WHERE replaced = 1", "keeping scopes")?;
        self.store.forget_staged()
    }

    /// The rows of the scope leave, unless another held scope has them.
    pub fn remove_scope(&mut self, scope: &Scope) -> Result<(), StoreError> {
        self.store.mark_scope(scope)?;
        self.purge(Leave::Marked)?;
        self.store.run("DELETE FROM millstream_scopes WHERE replaced = 1", "forgetting a scope")
    }

    fn apply_staged(&mut self) -> Result<(), StoreError> {
        let (mut table, mut key) = (String::new(), String::new());
        loop {
            let page: Vec<(String, String, String)> = self
                .store
                .connection
                .prepare_cached(
                    "SELECT tbl, key, row FROM millstream_snapshot WHERE (tbl, key) > (?1, ?2) ORDER BY tbl, key LIMIT ?3",
                )
                .and_then(|mut statement| {
                    let page = params![table, key, STAGE_PAGE as i64];
                    statement.query_map(page, |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?.collect()
                })
                .during("reading staged rows")?;
            let Some((last_table, last_key, _)) = page.last() else { return Ok(()) };
            (table, key) = (last_table.clone(), last_key.clone());
            let mut changes: Vec<TableChanges> = Vec::new();
            for (name, _, row) in &page {
                let row: Row = parse(row, "staged row")?;
                match changes.last_mut() {
                    Some(change) if change.table == *name => change.rows.push(row),
                    _ => changes.push(TableChanges {
                        table: name.clone(),
                        op: TableOp::Upsert,
                        columns: None,
                        rows: vec![row],
                    }),
                }
            }
            self.rows(&changes, true)?;
        }
    }

    fn purge(&mut self, leave: Leave) -> Result<(), StoreError> {
        let store = self.store;
        for table in store.tables.values() {
            let mut conditions = vec![format!(
                "NOT EXISTS (SELECT 1 FROM millstream_base b WHERE b.tbl = {0} AND b.key = {1})",
                literal(table.name()),
                table.key_expr
            )];
            if leave != Leave::Marked {
                conditions.push(format!(
                    "NOT EXISTS (SELECT 1 FROM millstream_snapshot s WHERE s.tbl = {0} AND s.key = {1})",
                    literal(table.name()),
                    table.key_expr
                ));
            }
            if leave != Leave::Unstaged {
                conditions.push(held(table, 1));
                conditions.push(format!("NOT {}", held(table, 0)));
            }
            let sql = format!("DELETE FROM {} WHERE {}", quote(table.name()), conditions.join(" AND "));
            store.run(&sql, "removing rows of a scope")?;
            self.purge_bases(table, leave)?;
        }
        Ok(())
    }

    fn purge_bases(&mut self, table: &TableSql, leave: Leave) -> Result<(), StoreError> {
        if !self.based {
            return Ok(());
        }
        for (key, image) in self.bases_of(table.name())? {
            let Some(image) = image else { continue };
            if leave != Leave::Marked && self.is_staged(table.name(), &key)? {
                continue;
            }
            if leave != Leave::Unstaged {
                let scopes = scopes_of(table, &image);
                let is_held = |replaced: i64| -> Result<bool, StoreError> {
                    for scope in &scopes {
                        if self.holds(scope, replaced)? {
                            return Ok(true);
                        }
                    }
                    Ok(false)
                };
                if !is_held(1)? || is_held(0)? {
                    continue;
                }
            }
            self.set_base(table.name(), key, None)?;
        }
        Ok(())
    }

    fn is_staged(&self, table: &str, key: &str) -> Result<bool, StoreError> {
        self.store
            .connection
            .prepare_cached("SELECT EXISTS (SELECT 1 FROM millstream_snapshot WHERE tbl = ?1 AND key = ?2)")
            .and_then(|mut statement| statement.query_row([table, key], |row| row.get(0)))
            .during("looking for a staged row")
    }

    fn holds(&self, scope: &Scope, replaced: i64) -> Result<bool, StoreError> {
        self.store
            .connection
            .prepare_cached(
                "SELECT EXISTS (SELECT 1 FROM millstream_scopes WHERE kind = ?1 AND id = ?2 AND replaced = ?3)",
            )
            .and_then(|mut statement| statement.query_row(params![scope.kind, scope.id, replaced], |row| row.get(0)))
            .during("looking for a scope")
    }
}

/// SQL condition: a scope of the row is held, with this mark. (Comparing applies the column's affinity to the id.)
fn held(table: &TableSql, replaced: u8) -> String {
    let parts: Vec<String> = table
        .table
        .scopes
        .iter()
        .map(|scope| match scope.column {
            None => format!(
                "EXISTS (SELECT 1 FROM millstream_scopes WHERE kind = {} AND replaced = {replaced})",
                literal(GLOBAL_KIND)
            ),
            Some(column) => format!(
                "coalesce({} IN (SELECT id FROM millstream_scopes WHERE kind = {} AND replaced = {replaced}), 0)",
                quote(&table.table.columns[column].name),
                literal(&scope.kind)
            ),
        })
        .collect();
    if parts.is_empty() { "0".into() } else { format!("({})", joined(&parts, "OR")) }
}

fn scopes_of(table: &TableSql, image: &Image) -> Vec<Scope> {
    let scope = |scope: &millstream_schemas::TableScope| match scope.column {
        None => Some(Scope::global()),
        Some(column) => {
            let id = image.get(&table.table.columns[column].name)?.clone()?;
            Some(Scope::new(scope.kind.clone(), id))
        }
    };
    table.table.scopes.iter().filter_map(scope).collect()
}
