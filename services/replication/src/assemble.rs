//! From decoded messages to the messages of the outbound stream: whole transactions, in commit order, split by scope.
//!
//! Pure. Protocol version 1 sends only committed transactions, one after the other, so a transaction's chunks may be
//! published while it still arrives. Memory is bounded by [`MAX_TRANSACTION_BUFFER_BYTES`] whatever its size.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use bytes::Bytes;
use millstream_catalog::Table;
use millstream_schemas::stream::{MAX_ROW_BYTES, ORIGIN_PREFIX, OriginEntry, OriginRecord};
use millstream_schemas::subject::WAL_ORIGIN;
use millstream_schemas::{Lsn, Scope, TableOp};

use crate::chunks::{Chunk, Chunks, Group, KeyHash, MAX_TRANSACTION_BUFFER_BYTES, Moved, write_row};
use crate::moves::{Moves, moves};
use crate::pgoutput::{DecodeError, Message, Old, Relation, Tuple};
use crate::relation::{BadTuple, Cell, Image, Mapping};

/// A message of the outbound stream. What is not known before it is appended (epoch, previous transaction) is missing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outgoing {
    /// Subject.
    pub subject: String,
    /// JSON array of `TableChanges`.
    pub payload: Bytes,
    /// Commit LSN of the transaction.
    pub lsn: Lsn,
    /// LSN behind the commit record; on messages that are sent before the record was read, `lsn` again, a lower bound.
    pub end_lsn: Lsn,
    /// Transaction id.
    pub xid: u32,
    /// Index within the transaction.
    pub index: u32,
    /// Whether it is the transaction's last.
    pub last: bool,
    /// Commit time, microseconds since 1970.
    pub at: i64,
    /// On the last message: the JSON array of `OriginEntry`.
    pub origin: Option<String>,
    /// Trace context, as far as it is known yet.
    pub traceparent: Option<String>,
    /// Scopes of which memberships moved for those who read it, as the header tells them.
    pub moves: Option<String>,
}

/// What a message meant for the transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// It goes on.
    Open,
    /// It is complete; everything that belongs to it has been handed out.
    Committed {
        /// LSN behind its commit record.
        end_lsn: Lsn,
    },
}

/// Why the change stream cannot be assembled.
#[derive(Debug, thiserror::Error)]
pub enum AssembleError {
    /// Bytes that are no message.
    #[error("cannot decode a message of the change stream")]
    Decode(#[from] DecodeError),
    /// A row that does not fit its table.
    #[error("cannot read a row of table {table}")]
    Row {
        /// The table.
        table: String,
        /// Why.
        source: BadTuple,
    },
    /// Messages in an impossible order.
    #[error("unexpected {what} in the change stream")]
    Order {
        /// What came.
        what: &'static str,
    },
    /// The database's table is no longer as the catalog says.
    #[error("table {table} has changed; reading the catalog again")]
    SchemaChanged {
        /// The table.
        table: String,
        /// The shape, to be accepted if the catalog stays as it is.
        shape: u64,
    },
    /// A row without its key.
    #[error("a row of table {table} came without its key")]
    NoKey {
        /// The table.
        table: String,
    },
}

/// Columns to be read from the table, since the change stream does not carry them and a new reader needs them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lookup {
    /// Index of the table among the synced ones.
    pub table: usize,
    /// Columns by which the row is found, with their values: its key, and what names its scopes. If it has gone on to other
    /// scopes by now, its values are not for those that it was in.
    pub fixed: Vec<(usize, Option<String>)>,
    /// Indexes of the columns to be read.
    pub columns: Vec<usize>,
}

/// The answer to a [`Lookup`]: column and value.
pub type Filled = Vec<(usize, Option<String>)>;

struct Transaction {
    lsn: Lsn,
    xid: u32,
    at: i64,
    /// It is in the stream already.
    skip: bool,
    index: u32,
    chunks: Chunks,
    origin: Vec<OriginEntry>,
    traceparent: Option<String>,
}

/// The assembler.
pub struct Assembler {
    tables: Arc<[Table]>,
    relations: HashMap<u32, Option<Mapping>>,
    /// Transactions up to this commit LSN are in the stream.
    through: Lsn,
    /// Shapes of tables that differ from the catalog even after it was read anew.
    accepted: HashSet<u64>,
    transaction: Option<Transaction>,
    pieces: Vec<Chunk>,
    row: Vec<u8>,
}

impl Assembler {
    /// Starts behind the transaction with commit LSN `through`; `tables` are the catalog's. `accepted` are the shapes of
    /// tables that differ from the catalog even after it was read anew.
    pub fn new(tables: Arc<[Table]>, through: Lsn, accepted: HashSet<u64>) -> Self {
        Assembler {
            tables,
            relations: HashMap::new(),
            through,
            accepted,
            transaction: None,
            pieces: Vec::new(),
            row: Vec::new(),
        }
    }

    /// Whether a transaction is open.
    pub fn is_open(&self) -> bool {
        self.transaction.is_some()
    }

    /// Whether a message has something to publish that is skipped, since its transaction is in the stream already: the
    /// transaction's commit LSN.
    pub fn skips(&self, message: &Message<'_>) -> Option<Lsn> {
        let transaction = self.transaction.as_ref().filter(|transaction| transaction.skip)?;
        let is_synced = |relation: &u32| matches!(self.relations.get(relation), Some(Some(_)));
        let publishes = match message {
            Message::Insert { relation, .. } | Message::Update { relation, .. } | Message::Delete { relation, .. } => {
                is_synced(relation)
            }
            Message::Truncate { relations } => relations.iter().any(is_synced),
            Message::Logical { transactional, prefix, .. } => *transactional && *prefix == ORIGIN_PREFIX,
            _ => false,
        };
        publishes.then_some(transaction.lsn)
    }

    /// What has to be read from the database before this message can be handled completely: a row enters a scope (or
    /// changes its key) while a large value of it did not change and is not in the change stream. The value may be newer
    /// than the row; then the change that made it so follows in the stream.
    pub fn lookup(&self, message: &Message<'_>) -> Result<Option<Lookup>, AssembleError> {
        let Message::Update { relation, old: Some(old), new } = message else { return Ok(None) };
        let (Some(Some(mapping)), Some(transaction)) = (self.relations.get(relation), &self.transaction) else {
            return Ok(None);
        };
        if transaction.skip || !new.contains(&crate::pgoutput::Value::Unchanged) {
            return Ok(None);
        }
        let table = &self.tables[mapping.table];
        let nothing = Filled::new();
        let (before, after) = images(table, mapping, Some(old), new, &nothing)?;
        let Some(before) = before else { return Ok(None) };
        let columns: Vec<usize> = (0..after.len()).filter(|&c| after[c] == Cell::Unchanged).collect();
        if columns.is_empty() {
            return Ok(None);
        }
        // Whoever may see it in two scopes and in one no more has been told to delete it: so the other has to give it whole.
        if key(table, &before)? == key(table, &after)? && scopes(table, &before) == scopes(table, &after) {
            return Ok(None);
        }
        let text = |&column: &usize| after[column].text().map(str::to_owned);
        let named =
            table.row_scope_columns().filter_map(|scope| scope.column).filter(|column| !table.key.contains(column));
        let named: BTreeSet<usize> = named.filter(|column| after[*column].is_known()).collect();
        let fixed = table.key.iter().copied().chain(named).map(|column| (column, text(&column))).collect();
        Ok(Some(Lookup { table: mapping.table, fixed, columns }))
    }

    /// Handles one message; what can be published goes to `out`.
    pub fn handle(
        &mut self,
        message: &Message<'_>,
        filled: &Filled,
        out: &mut Vec<Outgoing>,
    ) -> Result<Step, AssembleError> {
        match message {
            Message::Begin { final_lsn, at, xid } => {
                if self.transaction.is_some() {
                    return Err(AssembleError::Order { what: "begin" });
                }
                self.transaction = Some(Transaction {
                    lsn: *final_lsn,
                    xid: *xid,
                    at: *at,
                    skip: *final_lsn <= self.through,
                    index: 0,
                    chunks: Chunks::new(MAX_TRANSACTION_BUFFER_BYTES),
                    origin: Vec::new(),
                    traceparent: None,
                });
            }
            Message::Commit { end_lsn, .. } => {
                let Some(transaction) = self.transaction.take() else {
                    return Err(AssembleError::Order { what: "commit" });
                };
                self.through = self.through.max(transaction.lsn);
                if !transaction.skip {
                    self.finish(transaction, *end_lsn, out);
                }
                return Ok(Step::Committed { end_lsn: *end_lsn });
            }
            Message::Relation(relation) => self.relation(relation)?,
            Message::Origin | Message::Type => {}
            Message::Logical { transactional, prefix, content } => {
                if *transactional && *prefix == ORIGIN_PREFIX {
                    self.origin(content)?;
                }
            }
            Message::Insert { relation, new } => self.with(*relation, out, |change| {
                let (_, after) = images(change.table, change.mapping, None, new, filled)?;
                change.moves = moves(change.table, None, Some(&after), false);
                change.write(&after, &scopes(change.table, &after), key(change.table, &after)?);
                Ok(())
            })?,
            Message::Update { relation, old, new } => self.with(*relation, out, |change| {
                let (before, after) = images(change.table, change.mapping, old.as_ref(), new, filled)?;
                change.update(before.as_ref(), &after)
            })?,
            Message::Delete { relation, old } => self.with(*relation, out, |change| {
                let before = change.mapping.old_image(old).map_err(|source| bad_row(change.table, source))?;
                change.moves = moves(change.table, Some(&before), None, false);
                change.delete(&scopes(change.table, &before), &key(change.table, &before)?);
                Ok(())
            })?,
            Message::Truncate { relations } => {
                for relation in relations {
                    // There is no single scope: every session listens to this one.
                    self.with(*relation, out, |change| {
                        let grants = !change.table.memberships.is_empty();
                        change.chunks.add_truncate(&Scope::global(), &change.table.name, grants, change.pieces);
                        Ok(())
                    })?;
                }
            }
        }
        Ok(Step::Open)
    }

    fn relation(&mut self, relation: &Relation<'_>) -> Result<(), AssembleError> {
        let mapping = Mapping::new(&self.tables, relation);
        if let Some(mapping) = &mapping {
            let table = &self.tables[mapping.table];
            if mapping.differs && !self.accepted.contains(&mapping.shape) {
                return Err(AssembleError::SchemaChanged { table: table.name.clone(), shape: mapping.shape });
            }
            let uncovered = mapping.uncovered(table);
            if !uncovered.is_empty() {
                tracing::error!(
                    table.name = table.name,
                    columns = uncovered.join(", "),
                    "the replica identity no longer covers the key and the scope: deletes and moves cannot be published"
                );
            }
        }
        self.relations.insert(relation.id, mapping);
        Ok(())
    }

    fn origin(&mut self, content: &[u8]) -> Result<(), AssembleError> {
        let Some(transaction) = &mut self.transaction else {
            return Err(AssembleError::Order { what: "message outside a transaction" });
        };
        match serde_json::from_slice::<OriginRecord>(content) {
            Ok(record) => {
                transaction.origin.extend(record.clients);
                // It becomes a header, so it must be one line; a well-formed one is plain ASCII.
                let traceparent = record.traceparent.filter(|text| text.bytes().all(|byte| byte.is_ascii_graphic()));
                transaction.traceparent = traceparent.or(transaction.traceparent.take());
            }
            // Only the executor's role may write it; whoever else does must not stop everyone.
            Err(error) => {
                tracing::warn!(%error, wal.lsn = %transaction.lsn, "ignoring an origin record that does not parse")
            }
        }
        Ok(())
    }

    fn with(
        &mut self,
        relation: u32,
        out: &mut Vec<Outgoing>,
        act: impl FnOnce(&mut Change<'_>) -> Result<(), AssembleError>,
    ) -> Result<(), AssembleError> {
        let Some(transaction) = &mut self.transaction else {
            return Err(AssembleError::Order { what: "row outside a transaction" });
        };
        let Some(mapping) = self.relations.get(&relation) else {
            return Err(AssembleError::Order { what: "row before its relation" });
        };
        let Some(mapping) = mapping else { return Ok(()) };
        if transaction.skip {
            return Ok(());
        }
        act(&mut Change {
            table: &self.tables[mapping.table],
            mapping,
            chunks: &mut transaction.chunks,
            pieces: &mut self.pieces,
            row: &mut self.row,
            moves: Moves::new(),
        })?;
        for chunk in self.pieces.drain(..) {
            out.push(transaction.message(chunk, None));
        }
        Ok(())
    }

    fn finish(&mut self, mut transaction: Transaction, end_lsn: Lsn, out: &mut Vec<Outgoing>) {
        transaction.chunks.flush(&mut self.pieces);
        if self.pieces.is_empty() && (!transaction.origin.is_empty() || transaction.index > 0) {
            self.pieces.push(Chunk {
                subject: WAL_ORIGIN.to_owned(),
                payload: Bytes::from_static(b"[]"),
                moves: Moved::None,
            });
        }
        for chunk in self.pieces.drain(..) {
            out.push(transaction.message(chunk, Some(end_lsn)));
        }
        if transaction.index > 0
            && let Some(last) = out.last_mut()
        {
            last.last = true;
            // An error is impossible: the entries came out of JSON.
            last.origin =
                (!transaction.origin.is_empty()).then(|| serde_json::to_string(&transaction.origin).ok()).flatten();
        }
    }
}

impl Transaction {
    fn message(&mut self, chunk: Chunk, end_lsn: Option<Lsn>) -> Outgoing {
        let index = self.index;
        self.index += 1;
        Outgoing {
            subject: chunk.subject,
            payload: chunk.payload,
            lsn: self.lsn,
            end_lsn: end_lsn.unwrap_or(self.lsn),
            xid: self.xid,
            index,
            last: false,
            at: self.at,
            origin: None,
            traceparent: self.traceparent.clone(),
            moves: chunk.moves.header(),
        }
    }
}

/// One row change on its way into the chunks.
struct Change<'a> {
    table: &'a Table,
    mapping: &'a Mapping,
    chunks: &'a mut Chunks,
    pieces: &'a mut Vec<Chunk>,
    row: &'a mut Vec<u8>,
    /// Told with the rows, in the scopes of those whom they concern.
    moves: Moves,
}

impl Change<'_> {
    fn update(&mut self, before: Option<&Image<'_>>, after: &Image<'_>) -> Result<(), AssembleError> {
        self.moves = moves(self.table, before, Some(after), true);
        let now_in = scopes(self.table, after);
        let new_key = key(self.table, after)?;
        let Some(before) = before else {
            // No old image: neither key nor scope changed, since the identity covers both.
            self.write(after, &now_in, new_key);
            return Ok(());
        };
        let was_in = scopes(self.table, before);
        let old_key = key(self.table, before)?;
        let moved = old_key != new_key;
        let lost: Vec<Scope> = was_in.iter().filter(|scope| moved || !now_in.contains(scope)).cloned().collect();
        self.delete(&lost, &old_key);
        if after.contains(&Cell::Unchanged) {
            // The value was to be read and the row was gone by then: nobody who did not have it needs it any more.
            let kept: Vec<Scope> = now_in.into_iter().filter(|scope| !moved && was_in.contains(scope)).collect();
            self.write(after, &kept, new_key);
        } else {
            self.write(after, &now_in, new_key);
        }
        Ok(())
    }

    fn write(&mut self, image: &Image<'_>, scopes: &[Scope], key: Vec<&str>) {
        if scopes.is_empty() {
            return;
        }
        let table = self.table;
        let whole = image.iter().all(|cell| cell.is_known());
        // Unchanged values keep what the reader has; columns that the relation lacks are simply not there.
        let op = if image.contains(&Cell::Unchanged) { TableOp::Update } else { TableOp::Upsert };
        let columns: Option<Vec<&str>> = (!whole).then(|| {
            let known = image.iter().zip(&table.columns).filter(|(cell, _)| cell.is_known());
            known.map(|(_, column)| column.name.as_str()).collect()
        });
        write_row(self.row, image.iter().filter(|cell| cell.is_known()).map(|cell| cell.text()));
        if self.row.len() > MAX_ROW_BYTES {
            // Waiting for somebody to make it smaller would stop everybody's stream.
            tracing::error!(
                table = table.name,
                bytes = self.row.len(),
                "a row over {MAX_ROW_BYTES} bytes is withdrawn from clients"
            );
            return self.delete(scopes, &key);
        }
        let group = Group { table: &table.name, op, columns: columns.as_deref() };
        let hash = hash(table, &key);
        for scope in scopes {
            let moved = self.moves.get(scope).map_or(&[][..], Vec::as_slice);
            self.chunks.add_moving(scope, group, hash, self.row, moved, self.pieces);
        }
    }

    fn delete(&mut self, scopes: &[Scope], key: &[&str]) {
        if scopes.is_empty() {
            return;
        }
        write_row(self.row, key.iter().map(|value| Some(*value)));
        let group = Group { table: &self.table.name, op: TableOp::Delete, columns: None };
        let hash = hash(self.table, key);
        for scope in scopes {
            let moved = self.moves.get(scope).map_or(&[][..], Vec::as_slice);
            self.chunks.add_moving(scope, group, hash, self.row, moved, self.pieces);
        }
    }
}

/// The old and new image of a row. Values that did not change and were not sent are taken from the old image where it
/// has them, and from what was read for them.
fn images<'a>(
    table: &Table,
    mapping: &Mapping,
    old: Option<&Old<'a>>,
    new: &Tuple<'a>,
    filled: &'a Filled,
) -> Result<(Option<Image<'a>>, Image<'a>), AssembleError> {
    let before = old.map(|old| mapping.old_image(old)).transpose().map_err(|source| bad_row(table, source))?;
    let mut after = mapping.image(new).map_err(|source| bad_row(table, source))?;
    for (column, cell) in after.iter_mut().enumerate() {
        if *cell != Cell::Unchanged {
            continue;
        }
        if let Some(old) = before.as_ref().map(|before| before[column]).filter(|old| old.is_known()) {
            *cell = old;
        } else if let Some((_, value)) = filled.iter().find(|(index, _)| *index == column) {
            *cell = value.as_deref().map_or(Cell::Null, Cell::Text);
        }
    }
    Ok((before, after))
}

/// The scopes of a row. Ids that no subject can carry give no scope: nobody can ask for them either.
fn scopes(table: &Table, image: &Image<'_>) -> Vec<Scope> {
    let mut scopes = table.row_scopes(|column| image[column].text());
    scopes.retain(|scope| Scope::fits(&scope.id));
    scopes
}

fn key<'a>(table: &Table, image: &Image<'a>) -> Result<Vec<&'a str>, AssembleError> {
    let values = table.key.iter().map(|&column| image[column].text());
    values.collect::<Option<_>>().ok_or_else(|| AssembleError::NoKey { table: table.name.clone() })
}

fn hash(table: &Table, key: &[&str]) -> KeyHash {
    let mut hasher = DefaultHasher::new();
    (table.oid, key).hash(&mut hasher);
    hasher.finish()
}

fn bad_row(table: &Table, source: BadTuple) -> AssembleError {
    AssembleError::Row { table: table.name.clone(), source }
}

#[cfg(test)]
mod tests;
