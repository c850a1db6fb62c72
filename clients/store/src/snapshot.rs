//! Snapshots and scopes: which rows the store holds, and why.
//!
//! A snapshot is gathered in a staging table, so that a big one needs no memory, and as a difference to the confirmed rows, so that
//! what is left to do in the one transaction at its end is no more than what differs:
//!
//! - Of a row that the store has already, only the key is staged.
//! - While the store has never held anything, rows are written as they come: nobody takes them for whole before there is a position.
//! - Rows that the snapshot lacks are looked for before that transaction ([`Sweep`]).
//! - The staging area is cleared behind it: what is there means nothing any more.
//!
//! Whatever changes a confirmed row meanwhile brings the difference up to date ([`Applier::differ`]). So it is always that of now, also
//! when a snapshot was cut and goes on much later.
//!
//! The queue and the rows with changes under way survive: only their confirmed images change.

use std::sync::Arc;

use millstream_client_core::rebase::Image;
use millstream_client_core::sql::{joined, literal, quote};
use millstream_schemas::subject::GLOBAL_KIND;
use millstream_schemas::{Row, Scope, TableChanges, TableOp};
use rusqlite::types::Value;
use rusqlite::{OptionalExtension, params, params_from_iter};

use crate::apply::Applier;
use crate::error::{During, encode, parse};
use crate::statements::TableSql;
use crate::value::Wire;
use crate::{Store, StoreError};

/// Rows taken from the staging area at a time.
const STAGE_PAGE: usize = 1_000;
/// The staged entry of a row that has to leave.
const GONE: &str = "null";
const CLEARING: &str = "clearing the staging area";
/// The entry of `millstream_meta` that is there while a snapshot is staged: 1 if the tables were empty when it began, else 0.
const STAGING: &str = "staging";
/// The entry that names who stages: processes that share a store take turns, and one may still be at work when its turn is over.
const STAGER: &str = "stager";

/// The look for rows that a snapshot lacks: how far it is.
#[derive(Debug, Default)]
pub(crate) struct Sweep {
    /// The last table that has been looked through, or is being.
    table: String,
    /// Key of its last row that was looked at; empty: all have been.
    key: Vec<Value>,
}

impl Store {
    /// Forgets what is staged, and clears some of the staging area. True: there is nothing left in it.
    pub(crate) fn clear_stage(&mut self, rows: usize) -> Result<bool, StoreError> {
        self.transact(|store| {
            store.own_staging()?;
            store.forget_staged()?;
            let first: Option<(String, String)> = store
                .connection
                .prepare_cached("SELECT tbl, key FROM millstream_snapshot ORDER BY tbl, key LIMIT 1 OFFSET ?1")
                .and_then(|mut statement| {
                    statement.query_row([rows as i64], |row| Ok((row.get(0)?, row.get(1)?))).optional()
                })
                .during(CLEARING)?;
            let Some((table, key)) = first else {
                store.run("DELETE FROM millstream_snapshot", CLEARING)?;
                return Ok(true);
            };
            store
                .connection
                .prepare_cached("DELETE FROM millstream_snapshot WHERE (tbl, key) < (?1, ?2)")
                .and_then(|mut statement| statement.execute([table, key]))
                .during(CLEARING)?;
            Ok(false)
        })
    }

    /// Nothing is staged any more; what is in the staging area means nothing.
    pub(crate) fn forget_staged(&self) -> Result<(), StoreError> {
        self.run(
            "DELETE FROM millstream_meta WHERE key IN ('snapshot', 'staging')",
            "forgetting how far a snapshot was",
        )
    }

    /// The staging area is this process's, which takes it over with the first work of a session (see [`Store::claim`]).
    ///
    /// # Errors
    /// [`StoreError::Overtaken`]: another process has taken it over since.
    fn own_staging(&self) -> Result<(), StoreError> {
        let owner = self.meta_uuid(STAGER)?;
        if self.staging.get().is_none() || owner.is_none() {
            let id = self.session.uuid();
            self.set_meta(STAGER, id.to_string())?;
            self.staging.set(Some(id));
        }
        self.still_owns_staging()
    }

    /// The same, without taking it over.
    fn still_owns_staging(&self) -> Result<(), StoreError> {
        match self.staging.get() {
            Some(id) if self.meta_uuid(STAGER)? != Some(id) => Err(StoreError::Overtaken),
            _ => Ok(()),
        }
    }

    /// Takes rows of a snapshot.
    pub(crate) fn stage(&mut self, changes: &[TableChanges]) -> Result<(), StoreError> {
        self.put_in_order()?;
        self.unhindered(|store| {
            store.own_staging()?;
            store.begin_staging()?;
            let at_once = store.is_unclaimed()?;
            let mut applier = Applier { staging: false, ..Applier::new(store)? };
            changes.iter().try_for_each(|change| applier.stage(change, at_once))?;
            applier.finish()
        })
    }

    fn begin_staging(&self) -> Result<(), StoreError> {
        if self.is_staging()? {
            return Ok(());
        }
        self.run("DELETE FROM millstream_snapshot", CLEARING)?;
        self.set_meta(STAGING, !self.has_rows()?)
    }

    /// Whether a snapshot is being staged, or was when it was cut.
    pub(crate) fn is_staging(&self) -> Result<bool, StoreError> {
        self.has_meta(STAGING)
    }

    /// Whether the store has never held anything: rows in its tables are no state of the server's, and no client has said so.
    pub(crate) fn is_unclaimed(&self) -> Result<bool, StoreError> {
        let held = self
            .connection
            .prepare_cached("SELECT EXISTS (SELECT 1 FROM millstream_scopes)")
            .and_then(|mut statement| statement.query_row([], |row| row.get::<_, bool>(0)))
            .during("looking for scopes")?;
        Ok(!held && !self.has_meta("position")?)
    }

    /// Whether any synced table has a row.
    pub(crate) fn has_rows(&self) -> Result<bool, StoreError> {
        for table in self.tables.values() {
            let sql = format!("SELECT EXISTS (SELECT 1 FROM {})", quote(table.name()));
            let has: bool = self.connection.query_row(&sql, [], |row| row.get(0)).during("looking for rows")?;
            if has {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Goes on looking for rows that the snapshot of these scopes lacks, and stages that they leave: some of them may stay, which is
    /// decided when they are to leave. True: all have been looked at.
    pub(crate) fn sweep(
        &self,
        sweep: &mut Sweep,
        rows: usize,
        scopes: &[Scope],
        full: bool,
    ) -> Result<bool, StoreError> {
        self.still_owns_staging()?;
        self.begin_staging()?;
        if self.meta_integer(STAGING)? == Some(1) {
            // There is nothing that did not come with it, or was told apart since.
            return Ok(true);
        }
        let next = |table: &&Arc<TableSql>| match sweep.key.is_empty() {
            true => *table.name() > *sweep.table,
            false => table.name() == sweep.table,
        };
        let Some(table) = self.tables.values().filter(next).min_by_key(|table| table.name()) else { return Ok(true) };
        let (name, key) = (quote(table.name()), table.key.join(", "));
        let place =
            |first: usize| (first..first + table.key.len()).map(|n| format!("?{n}")).collect::<Vec<_>>().join(", ");
        let during = "looking for rows that a snapshot lacks";
        let after = match sweep.key.is_empty() {
            true => "1".to_owned(),
            false => format!("({key}) > ({})", place(1)),
        };
        // The last row of this slice.
        let last: Option<Vec<Value>> = self
            .connection
            .prepare_cached(&format!(
                "SELECT {key} FROM {name} WHERE {after} ORDER BY {key} LIMIT 1 OFFSET {}",
                rows.saturating_sub(1)
            ))
            .and_then(|mut statement| {
                let values = |row: &rusqlite::Row<'_>| (0..table.key.len()).map(|index| row.get(index)).collect();
                statement.query_row(params_from_iter(&sweep.key), values).optional()
            })
            .during(during)?;
        let mut values: Vec<Value> = sweep.key.clone();
        let mut conditions = vec![after];
        if let Some(last) = &last {
            conditions.push(format!("({key}) <= ({})", place(values.len() + 1)));
            values.extend(last.iter().cloned());
        }
        if !full {
            let (condition, ids) = among(table, scopes, values.len() + 1);
            conditions.push(condition);
            values.extend(ids);
        }
        let sql = format!(
            "INSERT INTO millstream_snapshot (tbl, key, row) SELECT {0}, {1}, '{GONE}' FROM {name} WHERE {2} \
             AND NOT EXISTS (SELECT 1 FROM millstream_snapshot s WHERE s.tbl = {0} AND s.key = {1})",
            literal(table.name()),
            table.key_expr,
            conditions.join(" AND ")
        );
        self.connection
            .prepare_cached(&sql)
            .and_then(|mut statement| statement.execute(params_from_iter(values)))
            .during(during)?;
        sweep.table = table.name().to_owned();
        sweep.key = last.unwrap_or_default();
        Ok(false)
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

impl Leave {
    /// Which of the rows that are not staged, as SQL conditions. Rows with changes under way have a confirmed image that leaves.
    fn conditions(self, table: &TableSql) -> Vec<String> {
        let mut conditions = vec![format!(
            "NOT EXISTS (SELECT 1 FROM millstream_base b WHERE b.tbl = {} AND b.key = {})",
            literal(table.name()),
            table.key_expr
        )];
        if self != Leave::Unstaged {
            conditions.push(held(table, 1));
            conditions.push(format!("NOT {}", held(table, 0)));
        }
        conditions
    }
}

impl Applier<'_> {
    /// The staged rows are the rows of these scopes. `swept`: those that the snapshot lacks have been looked for.
    pub fn snapshot(&mut self, scopes: &[Scope], full: bool, swept: bool) -> Result<(), StoreError> {
        self.store.still_owns_staging()?;
        if !swept {
            let mut sweep = Sweep::default();
            while !self.store.sweep(&mut sweep, STAGE_PAGE, scopes, full)? {}
        }
        for scope in scopes {
            self.store.mark_scope(scope)?;
        }
        self.staging = false;
        let leave = if full { Leave::Unstaged } else { Leave::MarkedUnstaged };
        self.apply_staged(leave)?;
        for table in self.store.tables.values() {
            self.purge_bases(table, leave)?;
        }
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
        let store = self.store;
        for table in store.tables.values() {
            let conditions = Leave::Marked.conditions(table).join(" AND ");
            let during = "removing rows of a scope";
            if self.staging {
                let sql = format!("SELECT {} FROM {} WHERE {conditions}", table.key_expr, quote(table.name()));
                let mut statement = store.connection.prepare_cached(&sql).during(during)?;
                let keys = statement.query_map([], |row| row.get::<_, String>(0)).during(during)?;
                let keys: Vec<String> = keys.collect::<rusqlite::Result<_>>().during(during)?;
                keys.iter().try_for_each(|key| self.differ(table, key))?;
            }
            store.run(&format!("DELETE FROM {} WHERE {conditions}", quote(table.name())), during)?;
            self.purge_bases(table, Leave::Marked)?;
        }
        self.store.run("DELETE FROM millstream_scopes WHERE replaced = 1", "forgetting a scope")
    }

    /// Takes rows of a snapshot: writes them at once, or stages those that differ from the confirmed ones.
    fn stage(&mut self, change: &TableChanges, at_once: bool) -> Result<(), StoreError> {
        let table = self.store.table(&change.table)?;
        if change.op != TableOp::Upsert {
            return Err(table.shape("a snapshot holds upserts only"));
        }
        let columns = table.columns(change.columns.as_deref())?;
        if columns.len() != table.table.columns.len() {
            return Err(table.shape("a snapshot holds whole rows"));
        }
        let places = table.key_places(&columns)?;
        if at_once {
            self.set(&table, change, true)?;
        }
        for row in &change.rows {
            if row.len() != columns.len() {
                return Err(table.shape("another number of values than columns"));
            }
            let key = table.key_json(row, &places);
            let mut ordered = vec![&None; columns.len()];
            for (&column, value) in columns.iter().zip(row) {
                ordered[column] = value;
            }
            let is_there = at_once || self.is_confirmed(&table, &key, &ordered)?;
            self.put_staged(&table, &key, (!is_there).then(|| encode(&ordered)))?;
        }
        Ok(())
    }

    fn put_staged(&self, table: &TableSql, key: &str, row: Option<String>) -> Result<(), StoreError> {
        self.store
            .connection
            .prepare_cached("INSERT OR REPLACE INTO millstream_snapshot (tbl, key, row) VALUES (?1, ?2, ?3)")
            .and_then(|mut statement| statement.execute(params![table.name(), key, row]))
            .during("staging a row")?;
        Ok(())
    }

    /// Whether the confirmed row has exactly these values, in the order of the columns.
    fn is_confirmed(&self, table: &TableSql, key: &str, row: &[&Option<String>]) -> Result<bool, StoreError> {
        if self.based
            && let Some(base) = self.base(table.name(), key)?
        {
            return Ok(base.is_some_and(|image| values(table, &image) == row));
        }
        let during = "comparing a row";
        let mut statement = self.store.connection.prepare_cached(&table.equal).during(during)?;
        for (index, value) in row.iter().enumerate() {
            statement.raw_bind_parameter(index + 1, Wire::new(table.kinds[index], value)).during(during)?;
        }
        let mut rows = statement.raw_query();
        let found = rows.next().during(during)?;
        found.map_or(Ok(false), |row| row.get(0)).during(during)
    }

    /// A confirmed row is about to change, or a row of which nobody knew shows: while a snapshot is staged, what is staged of it must not
    /// say that there is nothing to do.
    pub fn differ(&self, table: &TableSql, key: &str) -> Result<(), StoreError> {
        if !self.staging {
            return Ok(());
        }
        let staged: Option<bool> = self
            .store
            .connection
            .prepare_cached("SELECT row IS NULL FROM millstream_snapshot WHERE tbl = ?1 AND key = ?2")
            .and_then(|mut statement| statement.query_row([table.name(), key], |row| row.get(0)).optional())
            .during("looking for a staged row")?;
        let row = match staged {
            Some(false) => return Ok(()),
            Some(true) => match self.base(table.name(), key)? {
                Some(base) => base,
                None => self.visible(table, key)?,
            },
            None => None,
        };
        self.put_staged(table, key, Some(row.map_or(GONE.to_owned(), |image| encode(&values(table, &image)))))
    }

    /// As [`Applier::differ`], for all rows of a table.
    pub fn differ_all(&self, table: &TableSql) -> Result<(), StoreError> {
        if !self.staging {
            return Ok(());
        }
        let during = "reading staged rows";
        let mut statement = self
            .store
            .connection
            .prepare_cached("SELECT key FROM millstream_snapshot WHERE tbl = ?1 AND row IS NULL")
            .during(during)?;
        let keys = statement.query_map([table.name()], |row| row.get::<_, String>(0)).during(during)?;
        let keys: Vec<String> = keys.collect::<rusqlite::Result<_>>().during(during)?;
        keys.iter().try_for_each(|key| self.differ(table, key))
    }

    fn apply_staged(&mut self, leave: Leave) -> Result<(), StoreError> {
        let (mut table, mut key) = (String::new(), String::new());
        loop {
            let page: Vec<(String, String, String)> = self
                .store
                .connection
                .prepare_cached(
                    "SELECT tbl, key, row FROM millstream_snapshot INDEXED BY millstream_snapshot_differs WHERE row IS NOT NULL \
                     AND (tbl, key) > (?1, ?2) ORDER BY tbl, key LIMIT ?3",
                )
                .and_then(|mut statement| {
                    let page = params![table, key, STAGE_PAGE as i64];
                    statement.query_map(page, |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?.collect()
                })
                .during("reading staged rows")?;
            let Some((last_table, last_key, _)) = page.last() else { return Ok(()) };
            (table, key) = (last_table.clone(), last_key.clone());
            let mut changes: Vec<TableChanges> = Vec::new();
            for (name, key, row) in &page {
                let Some(row) = parse::<Option<Row>>(row, "staged row")? else {
                    self.leave(&*self.store.table(name)?, key, leave)?;
                    continue;
                };
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

    /// A row that the snapshot lacks leaves, unless it has a reason to stay.
    fn leave(&self, table: &TableSql, key: &str, leave: Leave) -> Result<(), StoreError> {
        let during = "removing rows of a scope";
        let key: Vec<millstream_schemas::Value> = parse(key, "key")?;
        let sql = format!("{} AND {}", table.delete, leave.conditions(table).join(" AND "));
        let mut statement = self.store.connection.prepare_cached(&sql).during(during)?;
        for (place, (&index, value)) in table.table.key.iter().zip(&key).enumerate() {
            statement.raw_bind_parameter(place + 1, Wire::new(table.kinds[index], value)).during(during)?;
        }
        statement.raw_execute().map(drop).during(during)
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
            self.differ(table, &key)?;
            self.set_base(table.name(), key, None)?;
        }
        Ok(())
    }

    fn is_staged(&self, table: &str, key: &str) -> Result<bool, StoreError> {
        self.store
            .connection
            .prepare_cached(
                "SELECT EXISTS (SELECT 1 FROM millstream_snapshot WHERE tbl = ?1 AND key = ?2 AND (row IS NOT 'null'))",
            )
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

/// The values of a row, in the order of the columns.
fn values<'a>(table: &TableSql, image: &'a Image) -> Vec<&'a Option<String>> {
    table.table.columns.iter().map(|column| image.get(&column.name).unwrap_or(&None)).collect()
}

/// SQL condition: the row is in one of these scopes; with the values of its parameters, which count from `first` on. (Comparing applies
/// the column's affinity to the ids.)
fn among(table: &TableSql, scopes: &[Scope], first: usize) -> (String, Vec<Value>) {
    let (mut parts, mut ids) = (Vec::new(), Vec::new());
    for scope in &table.table.scopes {
        let of_kind: Vec<&str> = scopes.iter().filter(|held| held.kind == scope.kind).map(|held| &*held.id).collect();
        match scope.column {
            None if scopes.iter().any(|held| held.kind == GLOBAL_KIND) => parts.push("1".to_owned()),
            Some(column) if !of_kind.is_empty() => {
                let (name, place) = (quote(&table.table.columns[column].name), first + ids.len());
                parts.push(format!("coalesce({name} IN (SELECT value FROM json_each(?{place})), 0)"));
                ids.push(Value::Text(encode(&of_kind)));
            }
            _ => {}
        }
    }
    (if parts.is_empty() { "0".into() } else { joined(&parts, "OR") }, ids)
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
