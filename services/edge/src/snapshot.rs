//! Snapshots of scopes. All that a session reads from Postgres, it reads in one `REPEATABLE READ` transaction whose visibility
//! it knows ([`Fence`]): who may read what (`authorize.rs`), the client's ledger (`ledger.rs`), and rows.
//!
//! Rows come by `COPY … TO STDOUT`, whose text form is that of the WAL decoder, and are re-framed as they stream (`copy.rs`):
//! memory does not grow with the scope.

use std::collections::BTreeMap;
use std::fmt::Write;

use millstream_catalog::{Catalog, Column, ScopeColumn, Table, literal};
use millstream_runtime::lease::Lease;
use millstream_schemas::Scope;
use millstream_schemas::frame::ServerFrame;
use sqlx::{AssertSqlSafe, PgPool, Row};
use tokio::sync::mpsc;

use crate::copy::{Framing, Lines, RowsFrame};
use crate::fence::{Fence, InvalidFence};
use crate::moment::{Adopted, Exporter};
use crate::resume::Mark;

/// Frames between Postgres and whoever takes them.
pub const SNAPSHOT_FRAMES: usize = 4;
const BEGIN: &str = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY";

/// Why Postgres could not be read.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// A statement failed.
    #[error("cannot {doing}")]
    Query {
        /// What was being done.
        doing: &'static str,
        /// Why.
        source: sqlx::Error,
    },
    /// See [`InvalidFence`].
    #[error(transparent)]
    Fence(#[from] InvalidFence),
    /// The session that wanted it is gone.
    #[error("the session ended during its snapshot")]
    Gone,
    /// The answer is not one to the question that was asked.
    #[error("Postgres answered another question than that for {0}; its connection is given up")]
    Foreign(&'static str),
}

pub(crate) fn query(doing: &'static str) -> impl FnOnce(sqlx::Error) -> SnapshotError {
    move |source| SnapshotError::Query { doing, source }
}

/// A read-only transaction at one instant.
pub struct Snapshot {
    pub(crate) lease: Lease,
    /// What it sees.
    pub fence: Fence,
    /// The moment that it shares with others.
    pub adopted: Option<Adopted>,
}

impl Snapshot {
    /// Begins the transaction.
    ///
    /// # Errors
    /// Postgres cannot be reached.
    pub async fn begin(pool: &PgPool) -> Result<Snapshot, SnapshotError> {
        let mut lease = Lease::begin(pool, BEGIN).await.map_err(query("begin a snapshot"))?;
        let visible = sqlx::query("SELECT pg_current_snapshot()::text, pg_current_wal_insert_lsn()::text");
        let row = lease.one(visible).await.map_err(query("read the snapshot's visibility"))?;
        let text = |index| row.try_get::<&str, _>(index).map_err(query("read the snapshot's visibility"));
        let fence = Fence::parse(text(0)?, text(1)?)?;
        Ok(Snapshot { lease, fence, adopted: None })
    }

    /// Begins a transaction whose snapshot others may adopt while it is open; gives also what it sees.
    ///
    /// # Errors
    /// Postgres cannot be reached.
    pub async fn export(pool: &PgPool) -> Result<(Exporter, Fence), SnapshotError> {
        let Snapshot { mut lease, fence, .. } = Snapshot::begin(pool).await?;
        let row = lease.one(sqlx::query("SELECT pg_export_snapshot()")).await.map_err(query("export a snapshot"))?;
        let id = row.try_get(0).map_err(query("export a snapshot"))?;
        Ok((Exporter::new(lease, id), fence))
    }

    /// Begins a transaction of a moment that others share.
    ///
    /// # Errors
    /// Postgres cannot be reached, or has lost the moment.
    pub async fn adopt(pool: &PgPool, adopted: Adopted) -> Result<Snapshot, SnapshotError> {
        let mut lease = Lease::begin(pool, BEGIN).await.map_err(query("begin a snapshot"))?;
        // Postgres gave the name, and takes no parameter here.
        let sql = format!("SET TRANSACTION SNAPSHOT '{}'", adopted.exporter.id());
        lease.raw(&sql).await.map_err(query("adopt a snapshot"))?;
        Ok(Snapshot { lease, fence: adopted.moment.fence.clone(), adopted: Some(adopted) })
    }

    /// How many rows these scopes have; those in several count for each.
    ///
    /// # Errors
    /// Postgres failed.
    pub async fn count(&mut self, catalog: &Catalog, scopes: &[Scope]) -> Result<u64, SnapshotError> {
        let ids = by_kind(scopes);
        let (mut counts, mut bound) = (Vec::new(), Vec::new());
        for table in catalog.synced() {
            for ScopeColumn { kind, column } in table.row_scope_columns() {
                let Some(ids) = ids.get(kind) else { continue };
                let mut sql = format!("(SELECT count(*) FROM {}", table.sql_rows());
                if let Some(column) = column.map(|index| &table.columns[index]) {
                    bound.push(ids);
                    let _ = write!(sql, " WHERE {}", column.is_among(&format!("${}", bound.len())));
                }
                sql.push(')');
                counts.push(sql);
            }
        }
        if counts.is_empty() {
            return Ok(0);
        }
        let sql = format!("SELECT ({})::int8", counts.join(" + "));
        // Identifiers come quoted from the catalog.
        let counted = bound.into_iter().fold(sqlx::query(AssertSqlSafe(sql)), |query, ids| query.bind(ids));
        let row = self.lease.one(counted).await.map_err(query("count a snapshot's rows"))?;
        Ok(row.try_get::<i64, _>(0).map_err(query("count a snapshot's rows"))?.cast_unsigned())
    }

    /// Sends the rows of these scopes as frames, in the order of their keys, and ends the transaction; `apart`: of one scope
    /// after the other. Where `behind` names a row of them, only what comes after it.
    ///
    /// # Errors
    /// Postgres failed, or the receiver is gone.
    pub async fn rows(
        mut self,
        catalog: &Catalog,
        scopes: &[Scope],
        apart: bool,
        mut behind: Option<Mark>,
        framing: &Framing,
        frames: &mut impl Frames,
    ) -> Result<(), SnapshotError> {
        let at_once = if apart { 1 } else { scopes.len().max(1) };
        for some in scopes.chunks(at_once) {
            let name = some.first().filter(|_| apart).map(Scope::to_string);
            if behind.as_ref().is_some_and(|mark| mark.scope != name) {
                continue;
            }
            let behind = behind.take();
            let ids = by_kind(some);
            let mut passes = Vec::new();
            for table in catalog.synced() {
                passes.extend(table.row_scope_columns().map(|of| (table, of)));
            }
            for (pass, (table, ScopeColumn { kind, column })) in passes.into_iter().enumerate() {
                let Some(ids) = ids.get(kind) else { continue };
                let key = match &behind {
                    Some(mark) if mark.pass > pass => continue,
                    Some(mark) if mark.pass == pass => Some(mark.key.as_slice()),
                    _ => None,
                };
                let mark = Mark { scope: name.clone(), pass, key: Vec::new() };
                self.table(table, column, ids, key, (mark, framing), frames).await?;
            }
        }
        self.lease.commit().await.map_err(query("end a snapshot"))
    }

    async fn table(
        &mut self,
        table: &Table,
        column: Option<usize>,
        ids: &[&str],
        behind: Option<&[String]>,
        (mark, framing): (Mark, &Framing),
        frames: &mut impl Frames,
    ) -> Result<(), SnapshotError> {
        // COPY takes no parameters: values are bound to settings of this transaction, which the statement reads.
        let settings = sqlx::query(
            "SELECT set_config('millstream.scope_ids', $1::text[]::text, true), \
             set_config('millstream.behind', $2::text[]::text, true)",
        )
        .bind(ids)
        .bind(behind.unwrap_or_default());
        self.lease.one(settings).await.map_err(query("set a snapshot's scopes"))?;
        let columns: Vec<&str> = table.columns.iter().map(|column| column.sql_name.as_str()).collect();
        let key: Vec<&str> = table.key.iter().map(|index| columns[*index]).collect();
        let key = key.join(", ");
        let mut sql = format!("COPY (SELECT {} FROM {} WHERE true", columns.join(", "), table.sql_rows());
        if let Some(column) = column.map(|index| &table.columns[index]) {
            let _ = write!(sql, " AND {}", column.is_among("current_setting('millstream.scope_ids')"));
        }
        if behind.is_some_and(|values| values.len() == table.key.len()) {
            let value = |(n, index): (usize, &usize)| {
                let key = format!("(current_setting('millstream.behind')::text[])[{}]", n + 1);
                format!("(SELECT {key}::{})", table.columns[*index].sql_type)
            };
            let values: Vec<String> = table.key.iter().enumerate().map(value).collect();
            let _ = write!(sql, " AND ({key}) > ({})", values.join(", "));
        }
        if let Some(fits) = may_fit(table, framing.row_limit) {
            let _ = write!(sql, " AND {fits}");
        }
        if framing.unwritable.is_known(&table.name) {
            let (name, columns) = (literal(&table.sql_name), literal(&columns.join(", ")));
            let _ = write!(sql, " AND millstream.has_text({name}::regclass, tableoid, ctid, {columns})");
        }
        let _ = write!(sql, " ORDER BY {key}) TO STDOUT");
        let mut lines = Lines::default();
        let mut frame = RowsFrame::new(&table.name, &table.key, mark, framing);
        let failed = |error| {
            framing.unwritable.note(&table.name, &error);
            query("copy a table's rows")(error)
        };
        let mut copy = self.lease.copy_out(&sql).await.map_err(failed)?;
        while let Some(chunk) = copy.next().await.map_err(failed)? {
            lines.push(&chunk, |line| frame.row(line));
            if frame.is_full() && !frames.put(frame.take()).await {
                return Err(SnapshotError::Gone);
            }
        }
        drop(copy);
        if !frame.is_empty() && !frames.put(frame.take()).await {
            return Err(SnapshotError::Gone);
        }
        Ok(())
    }
}

/// SQL that says whether a row may be small enough to be sent, without reading large values; none if every row may.
fn may_fit(table: &Table, limit: usize) -> Option<String> {
    let size = |column: &Column| {
        let name = &column.sql_name;
        match column.sql_type.split('(').next().unwrap_or_default() {
            "text" | "character varying" => Some(format!("coalesce(octet_length({name}), 0)")),
            "bytea" => Some(format!("2 * coalesce(octet_length({name}), 0)::int8")),
            "json" | "xml" => Some(format!("coalesce(pg_column_size({name}), 0)")),
            _ => None,
        }
    };
    let sizes: Vec<String> = table.columns.iter().filter_map(size).collect();
    (!sizes.is_empty()).then(|| format!("0::int8 + {} <= {limit}", sizes.join(" + ")))
}

/// Takes the frames of a snapshot as they are read.
pub trait Frames: Send {
    /// Takes the next one, when there is room. False: nobody wants them any more.
    fn put(&mut self, frame: String) -> impl Future<Output = bool> + Send;
}

impl Frames for mpsc::Sender<String> {
    async fn put(&mut self, frame: String) -> bool {
        self.send(frame).await.is_ok()
    }
}

/// The ids of scopes, by kind.
fn by_kind(scopes: &[Scope]) -> BTreeMap<&str, Vec<&str>> {
    let mut ids: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for scope in scopes {
        ids.entry(&scope.kind).or_default().push(&scope.id);
    }
    ids
}

/// The frame that opens a snapshot, or one that was cut.
pub fn begin_frame(scopes: &[Scope], rows: u64, token: Option<String>, resumed: bool) -> ServerFrame {
    ServerFrame::SnapshotBegin { scopes: scopes.to_vec(), rows, token, resumed }
}
