//! What a session reads from Postgres: who may read what, the client's ledger, and snapshots of scopes. All of it in one
//! `REPEATABLE READ` transaction whose visibility the session knows ([`Fence`]).
//!
//! Rows come by `COPY … TO STDOUT`, whose text form is that of the WAL decoder, and are re-framed as they stream: memory
//! does not grow with the scope.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use millstream_catalog::{Catalog, Column, Members, ScopeColumn, Table, literal};
use millstream_runtime::lease::Lease;
use millstream_schemas::frame::{Confirmed, ServerFrame};
use millstream_schemas::stream::{Failure, Loss, RunSpan};
use millstream_schemas::subject::USER_KIND;
use millstream_schemas::{Code, Scope};
use sqlx::{AssertSqlSafe, PgPool, Row};
use tokio::sync::mpsc;
use uuid::Uuid;

use crate::fence::{Fence, InvalidFence};
use crate::resume::{Mark, Seal, Sealer};
use crate::shared::Adopted;
use crate::unwritable::Unwritable;

/// A frame of snapshot rows is sent when it has grown to this many bytes.
const ROWS_FRAME_BYTES: usize = 128 * 1024;
/// Frames between Postgres and whoever takes them.
pub const SNAPSHOT_FRAMES: usize = 4;
const BEGIN: &str = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY";
/// Most failures told at once; a client that has more asks again by connecting again.
const MAX_FAILURES: i64 = 1_000;
/// Most runs told at a welcome: the newest ones.
const MAX_RUNS: i64 = 1_000;

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

fn query(doing: &'static str) -> impl FnOnce(sqlx::Error) -> SnapshotError {
    move |source| SnapshotError::Query { doing, source }
}

/// A read-only transaction at one instant.
pub struct Snapshot {
    lease: Lease,
    /// What it sees.
    pub fence: Fence,
    /// The moment that it shares with others.
    pub adopted: Option<Adopted>,
}

/// A transaction whose snapshot others may adopt while it is open.
pub struct Exporter {
    _lease: Lease,
    /// Name of the snapshot.
    id: String,
}

impl Exporter {
    /// Begins the transaction; gives also what it sees.
    ///
    /// # Errors
    /// Postgres cannot be reached.
    pub async fn begin(pool: &PgPool) -> Result<(Exporter, Fence), SnapshotError> {
        let Snapshot { mut lease, fence, .. } = Snapshot::begin(pool).await?;
        let row = lease.one(sqlx::query("SELECT pg_export_snapshot()")).await.map_err(query("export a snapshot"))?;
        let id = row.try_get(0).map_err(query("export a snapshot"))?;
        Ok((Exporter { _lease: lease, id }, fence))
    }
}

/// A client's ledger row.
#[derive(Debug, Default)]
pub struct Ledger {
    /// The user that the client id is bound to; none if it is new.
    pub user_id: Option<String>,
    /// Last `client_seq` taken into account.
    pub last_seq: u64,
    /// Failed transactions behind the `client_seq` that the client knows to be confirmed.
    pub failed: Vec<Failure>,
    /// Up to which `client_seq` those are all: less than `last_seq` if there are too many to tell at once.
    pub told_seq: u64,
    /// Transactions behind the `client_seq` that the client knows to be confirmed that lost to newer changes.
    pub lost: Vec<Loss>,
    /// Who submitted what is behind it, by rising `first_seq`.
    pub runs: Vec<RunSpan>,
}

impl Ledger {
    /// Whether there are too many failures to tell at once.
    pub fn is_cut(&self) -> bool {
        self.told_seq < self.last_seq
    }

    /// What the client is told once the stream has passed the snapshot that this was read from; none if it is new.
    pub fn confirmed(self) -> Option<Confirmed> {
        let client_seq = self.told_seq;
        let run_id = self.runs.iter().rev().find(|span| span.first_seq <= client_seq)?.run_id;
        let lost = self.lost.into_iter().filter(|loss| loss.client_seq <= client_seq).collect();
        Some(Confirmed { client_seq, run_id, failed: self.failed, lost })
    }
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

    /// Begins a transaction of a moment that others share.
    ///
    /// # Errors
    /// Postgres cannot be reached, or has lost the moment.
    pub async fn adopt(pool: &PgPool, adopted: Adopted) -> Result<Snapshot, SnapshotError> {
        let mut lease = Lease::begin(pool, BEGIN).await.map_err(query("begin a snapshot"))?;
        // Postgres gave the name, and takes no parameter here.
        let sql = format!("SET TRANSACTION SNAPSHOT '{}'", adopted.exporter().id);
        lease.raw(&sql).await.map_err(query("adopt a snapshot"))?;
        Ok(Snapshot { lease, fence: adopted.moment.fence.clone(), adopted: Some(adopted) })
    }

    /// The scopes that a user may read. The only place that decides it. Ids are compared as texts: so does the stream.
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

    /// The client's ledger row, with the failures behind `confirmed_seq`.
    ///
    /// # Errors
    /// Postgres failed.
    pub async fn ledger(&mut self, client_id: Uuid, confirmed_seq: u64) -> Result<Ledger, SnapshotError> {
        // One row, known client or not.
        let known = sqlx::query(
            "SELECT $1::uuid AS asked, user_id, last_seq, lost::text AS lost
             FROM (SELECT) AS one LEFT JOIN millstream.clients ON client_id = $1",
        );
        let row = self.lease.one(known.bind(client_id)).await.map_err(query("read the ledger"))?;
        if row.try_get::<Uuid, _>("asked").ok() != Some(client_id) {
            return Err(SnapshotError::Foreign("the ledger"));
        }
        let Some(user_id) = row.try_get("user_id").map_err(query("read the ledger"))? else {
            return Ok(Ledger::default());
        };
        let failed = sqlx::query(
            "SELECT seq, change_id, code, rule, message FROM millstream.changes_history
             WHERE client_id = $1 AND seq > $2 ORDER BY seq LIMIT $3",
        )
        .bind(client_id)
        .bind(i64::try_from(confirmed_seq).unwrap_or(i64::MAX))
        .bind(MAX_FAILURES);
        let failed = self.lease.all(failed).await.map_err(query("read the client's failures"))?;
        let failure = |row: &sqlx::postgres::PgRow| Failure {
            client_seq: row.get::<i64, _>("seq").cast_unsigned(),
            change_id: row.get("change_id"),
            code: row.get::<&str, _>("code").parse().unwrap_or(Code::Internal),
            rule: row.get("rule"),
            message: row.get("message"),
        };
        let last_seq = row.get::<i64, _>("last_seq").cast_unsigned();
        let cut = failed.len() as i64 == MAX_FAILURES;
        let failed: Vec<Failure> = failed.iter().map(failure).collect();
        let told_seq = failed.last().filter(|_| cut).map_or(last_seq, |last| last.client_seq);
        let lost: Vec<Loss> = serde_json::from_str(row.get("lost")).unwrap_or_default();
        let lost = lost.into_iter().filter(|loss| loss.client_seq > confirmed_seq).collect();
        // The span that covers the first number behind it, and those after.
        let runs = sqlx::query(
            "SELECT instance, first_seq FROM (
                 SELECT instance, first_seq, lead(first_seq) OVER (ORDER BY first_seq) AS next
                 FROM millstream.instances WHERE client_id = $1) AS spans
             WHERE next IS NULL OR next > $2 + 1 ORDER BY first_seq DESC LIMIT $3",
        )
        .bind(client_id)
        .bind(i64::try_from(confirmed_seq).unwrap_or(i64::MAX).min(i64::MAX - 1))
        .bind(MAX_RUNS);
        let runs = self.lease.all(runs).await.map_err(query("read the client's runs"))?;
        let span = |row: &sqlx::postgres::PgRow| RunSpan {
            run_id: row.get("instance"),
            first_seq: row.get::<i64, _>("first_seq").cast_unsigned(),
        };
        let runs = runs.iter().rev().map(span).collect();
        Ok(Ledger { user_id: Some(user_id), last_seq, failed, told_seq, lost, runs })
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
            if frame.text.len() >= ROWS_FRAME_BYTES && !frames.put(frame.take()).await {
                return Err(SnapshotError::Gone);
            }
        }
        drop(copy);
        if frame.rows > 0 && !frames.put(frame.take()).await {
            return Err(SnapshotError::Gone);
        }
        Ok(())
    }
}

/// How rows become frames.
pub struct Framing {
    /// Marks how far they have come.
    pub seal: Seal,
    /// Largest row, in bytes of its JSON text: larger ones are not in the stream either.
    pub row_limit: usize,
    /// Where rows are tried before they are read.
    pub unwritable: Unwritable,
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

/// Cuts a COPY stream into lines.
#[derive(Default)]
struct Lines {
    rest: Vec<u8>,
}

impl Lines {
    fn push(&mut self, chunk: &[u8], mut line: impl FnMut(&[u8])) {
        let mut chunk = chunk;
        while let Some(end) = chunk.iter().position(|&byte| byte == b'\n') {
            if self.rest.is_empty() {
                line(&chunk[..end]);
            } else {
                self.rest.extend_from_slice(&chunk[..end]);
                line(&self.rest);
                self.rest.clear();
            }
            chunk = &chunk[end + 1..];
        }
        self.rest.extend_from_slice(chunk);
    }
}

/// A frame `snapshot_rows` of one table, written as its rows come.
struct RowsFrame<'a> {
    /// Indexes of the key's columns.
    key: &'a [usize],
    mark: Mark,
    framing: &'a Framing,
    head: String,
    text: String,
    rows: usize,
    value: String,
    /// The last row.
    last: Vec<u8>,
}

impl<'a> RowsFrame<'a> {
    fn new(table: &str, key: &'a [usize], mark: Mark, framing: &'a Framing) -> Self {
        let name = serde_json::Value::from(table);
        let head = format!(r#"{{"type":"snapshot_rows","changes":[{{"table":{name},"op":"upsert","rows":["#);
        RowsFrame { key, mark, framing, text: head.clone(), head, rows: 0, value: String::new(), last: Vec::new() }
    }

    /// Appends a row in COPY's text format (PostgreSQL documentation, "COPY", "Text Format"). Not one that is too large for
    /// the stream.
    fn row(&mut self, line: &[u8]) {
        self.last.clear();
        self.last.extend_from_slice(line);
        let before = self.text.len();
        if self.rows > 0 {
            self.text.push(',');
        }
        let start = self.text.len();
        self.rows += 1;
        self.text.push('[');
        for (index, field) in line.split(|&byte| byte == b'\t').enumerate() {
            if index > 0 {
                self.text.push(',');
            }
            if field == br"\N" {
                self.text.push_str("null");
                continue;
            }
            unescape(field, &mut self.value);
            match serde_json::to_string(&self.value) {
                Ok(json) => self.text.push_str(&json),
                Err(_) => self.text.push_str("null"),
            }
        }
        self.text.push(']');
        if self.text.len() - start > self.framing.row_limit {
            self.text.truncate(before);
            self.rows -= 1;
        }
    }

    fn take(&mut self) -> String {
        self.rows = 0;
        let mut text = std::mem::replace(&mut self.text, self.head.clone());
        text.push_str("]}]");
        let fields: Vec<&[u8]> = self.last.split(|&byte| byte == b'\t').collect();
        self.mark.key.clear();
        for index in self.key {
            unescape(fields.get(*index).copied().unwrap_or_default(), &mut self.value);
            self.mark.key.push(self.value.clone());
        }
        if let Some(mark) = self.framing.seal.mark(&self.mark) {
            let _ = write!(text, r#","mark":{}"#, serde_json::Value::from(mark));
        }
        text.push('}');
        text
    }
}

/// The frames that a table's rows become, of which COPY sends these chunks: see `Snapshot::table`.
pub fn reframed<'a>(table: &str, key: &[usize], chunks: impl IntoIterator<Item = &'a [u8]>) -> Vec<String> {
    let mut lines = Lines::default();
    let framing = Framing {
        seal: Sealer::new(b"").seal(""),
        row_limit: millstream_schemas::stream::MAX_ROW_BYTES,
        unwritable: Unwritable::default(),
    };
    let mut frame = RowsFrame::new(table, key, Mark { scope: None, pass: 0, key: Vec::new() }, &framing);
    let mut frames = Vec::new();
    for chunk in chunks {
        lines.push(chunk, |line| frame.row(line));
        if frame.text.len() >= ROWS_FRAME_BYTES {
            frames.push(frame.take());
        }
    }
    frames.extend((frame.rows > 0).then(|| frame.take()));
    frames
}

/// A field of COPY's text format.
fn unescape(field: &[u8], value: &mut String) {
    let mut bytes = field.iter();
    let mut plain = Vec::with_capacity(field.len());
    while let Some(&byte) = bytes.next() {
        plain.push(match byte {
            b'\\' => match bytes.next() {
                Some(b'b') => 8,
                Some(b'f') => 12,
                Some(b'n') => b'\n',
                Some(b'r') => b'\r',
                Some(b't') => b'\t',
                Some(b'v') => 11,
                Some(&other) => other,
                None => b'\\',
            },
            other => other,
        });
    }
    value.clear();
    // The connection's encoding is UTF-8.
    value.push_str(&String::from_utf8_lossy(&plain));
}

/// The frame that opens a snapshot, or one that was cut.
pub fn begin_frame(scopes: &[Scope], rows: u64, token: Option<String>, resumed: bool) -> ServerFrame {
    ServerFrame::SnapshotBegin { scopes: scopes.to_vec(), rows, token, resumed }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copy_lines_become_rows() {
        let mark = Mark { scope: None, pass: 1, key: Vec::new() };
        let framing =
            Framing { seal: Sealer::new(b"secret").seal("moment"), row_limit: 30, unwritable: Unwritable::default() };
        let mut frame = RowsFrame::new("ta\"sks", &[1, 0], mark.clone(), &framing);
        let mut lines = Lines::default();
        for chunk in ["1\tplain\t\\N\n2\tta\\tb\\\\n\\n", "end\t\n", "4\ttoo large by some bytes\t1\n3\t\"q\"\tt", "\n"]
        {
            lines.push(chunk.as_bytes(), |line| frame.row(line));
        }
        let text = frame.take();
        let ServerFrame::SnapshotRows { changes, mark: last } = serde_json::from_str(&text).unwrap() else {
            panic!("{text}")
        };
        assert_eq!(changes[0].table, "ta\"sks");
        let rows: Vec<Vec<Option<&str>>> =
            changes[0].rows.iter().map(|row| row.iter().map(Option::as_deref).collect()).collect();
        assert_eq!(
            rows,
            [
                vec![Some("1"), Some("plain"), None],
                vec![Some("2"), Some("ta\tb\\n\nend"), Some("")],
                vec![Some("3"), Some("\"q\""), Some("t")],
            ]
        );
        let last = framing.seal.open(&last.unwrap()).unwrap();
        assert_eq!(last, Mark { key: vec!["\"q\"".into(), "3".into()], ..mark });
        assert_eq!(frame.rows, 0);
    }
}
