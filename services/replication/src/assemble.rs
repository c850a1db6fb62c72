//! From decoded messages to the messages of the outbound stream: whole transactions, in commit order, split by scope.
//!
//! Pure. Protocol version 1 sends only committed transactions, one after the other, so a transaction's chunks may be
//! published while it still arrives. Memory is bounded by `MAX_TRANSACTION_BUFFER_BYTES` whatever its size.

mod again;
mod change;
mod error;
mod handover;
mod limits;
mod lookup;
mod outgoing;
mod sizes;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use bytes::Bytes;
use millstream_catalog::{Shape, Table};
use millstream_schemas::stream::{ORIGIN_PREFIX, OriginRecord};
use millstream_schemas::subject::WAL_ORIGIN;
use millstream_schemas::{Lsn, Scope};

pub use self::again::AGAIN_INTERVAL_MICROS;
use self::again::SentAgain;
use self::change::{Change, bad_row, hash, images, key, scopes};
pub use self::error::AssembleError;
use self::handover::{Handover, change_row};
pub use self::limits::Limits;
pub use self::lookup::{Filled, Lookup, ReadValue};
pub use self::outgoing::Outgoing;
use self::sizes::Sizes;
use crate::chunks::{Chunk, Chunks, KeyHash, MAX_TRANSACTION_BUFFER_BYTES, Moved};
use crate::error::AtTransaction;
use crate::left_out::{Again, LeftOut};
use crate::moves::Moves;
use crate::origin::Origins;
use crate::pgoutput::{Message, Old, Relation, Value};
use crate::relation::{Cell, Mapping};

/// Prefix of transactional messages in the write-ahead log that ask for tables to be sent again: their names, a line each.
pub const AGAIN_PREFIX: &str = "millstream.again";
/// Stands for every table there.
const EVERY_TABLE: &str = "*";
/// What subjects of rows begin with.
const WAL_PREFIX: &str = "ms.wal.";
/// Ends the name of a kind in the header `Ms-Moves`: all scopes of that kind.
const EVERY_SCOPE: &str = ".*";

/// What a message meant for the transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Assembled {
    /// It goes on.
    Open,
    /// It is complete; everything that belongs to it has been handed out.
    Committed {
        /// LSN behind its commit record.
        end_lsn: Lsn,
    },
}

struct OpenTransaction {
    lsn: Lsn,
    xid: u32,
    at: i64,
    /// It is in the stream already.
    skip: bool,
    index: u32,
    chunks: Chunks,
    origins: Origins,
    traceparent: Option<String>,
    handover: Handover,
    /// Tables that are sent again behind it.
    again: BTreeMap<usize, Again>,
}

/// The assembler.
pub struct Assembler {
    tables: Arc<[Table]>,
    /// What the database says of them beyond that; none is known of tables behind the last.
    shapes: Arc<[Shape]>,
    /// When tables were sent again last because of their content.
    sent_again: SentAgain,
    relations: HashMap<u32, Option<Mapping>>,
    /// Transactions up to this commit LSN are in the stream.
    through: Lsn,
    /// Shapes of tables that differ from the catalog even after it was read anew.
    accepted: HashSet<u64>,
    transaction: Option<OpenTransaction>,
    limits: Limits,
    /// Rows that were withdrawn: clients lack them, so that a part of one is not enough for them.
    withdrawn: HashSet<KeyHash>,
    /// How large the values are that updates leave alone.
    sizes: Sizes,
    /// What was passed over and nobody has asked for yet.
    left_out: Vec<LeftOut>,
    /// The table that the change stream spoke of last.
    last_table: Option<usize>,
    pieces: Vec<Chunk>,
    row: Vec<u8>,
}

impl Assembler {
    /// Starts behind the transaction with commit LSN `through`; `tables` are the catalog's. `accepted` are the shapes of
    /// tables that differ from the catalog even after it was read anew.
    pub fn new(tables: Arc<[Table]>, through: Lsn, accepted: HashSet<u64>) -> Self {
        Assembler {
            tables,
            shapes: Arc::default(),
            sent_again: SentAgain::default(),
            relations: HashMap::new(),
            through,
            accepted,
            transaction: None,
            limits: Limits::of(usize::MAX),
            withdrawn: HashSet::new(),
            sizes: Sizes::default(),
            left_out: Vec::new(),
            last_table: None,
            pieces: Vec::new(),
            row: Vec::new(),
        }
    }

    /// With what the broker takes; without, only Millstream's own limits count.
    pub fn with_limits(self, limits: Limits) -> Self {
        Assembler { limits, ..self }
    }

    /// With what the database says of the tables, in their order.
    pub fn with_shapes(self, shapes: Arc<[Shape]>) -> Self {
        Assembler { shapes, ..self }
    }

    /// Commit LSN and id of the open transaction.
    pub fn open(&self) -> Option<(Lsn, u32)> {
        self.transaction.as_ref().map(|transaction| (transaction.lsn, transaction.xid))
    }

    /// The open transaction, or else the place behind the last one.
    pub fn place(&self) -> AtTransaction {
        let open = self.open();
        let table = open.and(self.last_table).map(|table| self.tables[table].name.clone());
        AtTransaction { lsn: open.map_or(self.through, |(lsn, _)| lsn), xid: open.map(|(_, xid)| xid), table }
    }

    /// Takes what was passed over since this was asked last.
    pub fn take_left_out(&mut self) -> Vec<LeftOut> {
        std::mem::take(&mut self.left_out)
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
    /// changes its key) while a large value of it did not change and is not in the change stream; or the row was too large,
    /// so that clients lack it. The value may be newer than the row; then the change that made it so follows in the stream.
    pub fn lookup(&self, message: &Message<'_>) -> Result<Option<Lookup>, AssembleError> {
        let Message::Update { relation, old, new } = message else { return Ok(None) };
        let (Some(Some(mapping)), Some(transaction)) = (self.relations.get(relation), &self.transaction) else {
            return Ok(None);
        };
        if transaction.skip || !new.contains(&Value::Unchanged) {
            return Ok(None);
        }
        let table = &self.tables[mapping.table];
        if !table.synced {
            return Ok(None);
        }
        let nothing = Filled::new();
        let (before, after) = images(table, mapping, old.as_ref(), new, &nothing)?;
        let columns: Vec<usize> = (0..after.len()).filter(|&c| after[c] == Cell::Unchanged).collect();
        let Some(new_key) = key(table, &after) else { return Ok(None) };
        if columns.is_empty() || after.contains(&Cell::Unsendable) {
            return Ok(None);
        }
        // Whoever may see it in two scopes and in one no more has been told to delete it: so the other has to give it whole.
        let moved = before.as_ref().is_some_and(|before| {
            key(table, before).as_ref() != Some(&new_key) || scopes(table, before) != scopes(table, &after)
        });
        // Of a whole old image something is missing only if the row was too large.
        let row = hash(table, &new_key);
        let was_too_large = matches!(old, Some(Old::Full(_))) || self.withdrawn.contains(&row);
        // It may cross the limit, in either direction, with values that are not in the change stream.
        let may_cross = self.sizes.lacks(row, &columns) && !scopes(table, &after).is_empty();
        if !moved && !was_too_large && !may_cross {
            return Ok(None);
        }
        let text = |&column: &usize| after[column].text().map(str::to_owned);
        let named =
            table.row_scope_columns().filter_map(|scope| scope.column).filter(|column| !table.key.contains(column));
        let named: BTreeSet<usize> = named.filter(|column| after[*column].is_known()).collect();
        let fixed = table.key.iter().copied().chain(named).map(|column| (column, text(&column))).collect();
        Ok(Some(Lookup { table: mapping.table, fixed, columns, lengths: !moved && !was_too_large }))
    }

    /// Handles one message; what can be published goes to `out`.
    pub fn handle(
        &mut self,
        message: &Message<'_>,
        filled: &Filled,
        out: &mut Vec<Outgoing>,
    ) -> Result<Assembled, AssembleError> {
        match message {
            Message::Begin { final_lsn, at, xid } => {
                if self.transaction.is_some() {
                    return Err(AssembleError::Order { what: "begin" });
                }
                self.last_table = None;
                self.transaction = Some(OpenTransaction {
                    lsn: *final_lsn,
                    xid: *xid,
                    at: *at,
                    skip: *final_lsn <= self.through,
                    index: 0,
                    chunks: Chunks::new(MAX_TRANSACTION_BUFFER_BYTES, self.limits.message),
                    origins: Origins::default(),
                    traceparent: None,
                    handover: Handover::default(),
                    again: BTreeMap::new(),
                });
            }
            Message::Commit { end_lsn, .. } => {
                let Some(mut transaction) = self.transaction.take() else {
                    return Err(AssembleError::Order { what: "commit" });
                };
                self.through = self.through.max(transaction.lsn);
                if !transaction.skip {
                    self.hand_over(&mut transaction, out);
                    self.finish(transaction, *end_lsn, out);
                }
                return Ok(Assembled::Committed { end_lsn: *end_lsn });
            }
            Message::Relation(relation) => self.relation(relation)?,
            Message::Origin | Message::Type => {}
            Message::Logical { transactional, prefix, content } => {
                if *transactional && *prefix == ORIGIN_PREFIX {
                    self.origin(content)?;
                } else if *transactional && *prefix == AGAIN_PREFIX {
                    self.asked_again(content);
                }
            }
            Message::Insert { relation, new } => self.with(*relation, out, |change, handover| {
                let (_, after) = images(change.table, change.mapping, None, new, filled)?;
                change_row(change, handover, None, Some(&after), false);
                Ok(())
            })?,
            Message::Update { relation, old, new } => self.with(*relation, out, |change, handover| {
                let (before, after) = images(change.table, change.mapping, old.as_ref(), new, filled)?;
                if let Some(key) = key(change.table, &after) {
                    change.sizes.learn(hash(change.table, &key), filled);
                }
                change.route(before.as_ref());
                change_row(change, handover, before.as_ref(), Some(&after), true);
                Ok(())
            })?,
            Message::Delete { relation, old } => self.with(*relation, out, |change, handover| {
                let before = change.mapping.old_image(old).map_err(|source| bad_row(change.table, source))?;
                change.route(Some(&before));
                change_row(change, handover, Some(&before), None, false);
                Ok(())
            })?,
            Message::Truncate { relations } => {
                for relation in relations {
                    // There is no single scope: every session listens to this one.
                    self.with(*relation, out, |change, handover| {
                        handover.truncate(change.mapping.table);
                        let grants = !change.table.memberships.is_empty();
                        if !change.table.synced {
                            change.chunks.flush(change.pieces);
                            change.pieces.push(silent(Moved::Any));
                            return Ok(());
                        }
                        change.chunks.add_truncate(&Scope::global(), &change.table.name, grants, change.pieces);
                        Ok(())
                    })?;
                }
            }
        }
        Ok(Assembled::Open)
    }

    fn relation(&mut self, relation: &Relation<'_>) -> Result<(), AssembleError> {
        let mapping = Mapping::new(&self.tables, &self.shapes, relation);
        self.last_table = mapping.as_ref().map(|mapping| mapping.table);
        if let Some(mapping) = &mapping {
            let table = &self.tables[mapping.table];
            if mapping.differs && !self.accepted.contains(&mapping.shape) {
                return Err(AssembleError::SchemaChanged { table: table.name.clone(), shape: mapping.shape });
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
                record.clients.into_iter().for_each(|entry| transaction.origins.add(entry));
                transaction.traceparent = record.traceparent.or(transaction.traceparent.take());
            }
            // Only the executor's role may write it; whoever else does must not stop everyone.
            Err(error) => {
                tracing::warn!(%error, wal.lsn = %transaction.lsn, "ignoring an origin record that does not parse");
                if !transaction.skip {
                    self.left_out.push(LeftOut::Origins { entries: 1 });
                }
            }
        }
        Ok(())
    }

    fn with(
        &mut self,
        relation: u32,
        out: &mut Vec<Outgoing>,
        act: impl FnOnce(&mut Change<'_>, &mut Handover) -> Result<(), AssembleError>,
    ) -> Result<(), AssembleError> {
        let Some(transaction) = &mut self.transaction else {
            return Err(AssembleError::Order { what: "row outside a transaction" });
        };
        let Some(mapping) = self.relations.get(&relation) else {
            return Err(AssembleError::Order { what: "row before its relation" });
        };
        self.last_table = mapping.as_ref().map(|mapping| mapping.table);
        let Some(mapping) = mapping else { return Ok(()) };
        if transaction.skip {
            return Ok(());
        }
        let mut again = None;
        let mut change = Change {
            table: &self.tables[mapping.table],
            mapping,
            limits: self.limits,
            chunks: &mut transaction.chunks,
            withdrawn: &mut self.withdrawn,
            sizes: &mut self.sizes,
            left_out: &mut self.left_out,
            pieces: &mut self.pieces,
            row: &mut self.row,
            moves: Moves::new(),
            loose_key: self.shapes.get(mapping.table).is_some_and(|shape| shape.loose_key),
            again: &mut again,
        };
        act(&mut change, &mut transaction.handover)?;
        if let Some(why) = again {
            transaction.again.entry(mapping.table).or_insert(why);
        }
        for chunk in self.pieces.drain(..) {
            out.push(transaction.message(chunk, None));
        }
        Ok(())
    }

    /// Sends the rows that were kept until the keys of a transaction had come to rest.
    fn hand_over(&mut self, transaction: &mut OpenTransaction, out: &mut Vec<Outgoing>) {
        for index in transaction.handover.tables() {
            let Some(mapping) = self.relations.values().flatten().find(|mapping| mapping.table == index) else {
                continue;
            };
            let mut change = Change {
                table: &self.tables[index],
                mapping,
                limits: self.limits,
                chunks: &mut transaction.chunks,
                withdrawn: &mut self.withdrawn,
                sizes: &mut self.sizes,
                left_out: &mut self.left_out,
                pieces: &mut self.pieces,
                row: &mut self.row,
                moves: Moves::new(),
                loose_key: true,
                again: &mut None,
            };
            transaction.handover.flush(index, &mut change);
            for chunk in self.pieces.drain(..) {
                out.push(transaction.message(chunk, None));
            }
        }
        for table in 0..self.tables.len() {
            if transaction.handover.is_in_doubt(table) {
                transaction.again.entry(table).or_insert(Again::Keys);
            }
        }
    }

    /// Somebody who may write such messages wants a table, or all of them, to be sent again.
    fn asked_again(&mut self, content: &[u8]) {
        let Some(transaction) = self.transaction.as_mut().filter(|transaction| !transaction.skip) else { return };
        let names = std::str::from_utf8(content).unwrap_or_default();
        for (index, table) in self.tables.iter().enumerate() {
            if names.lines().any(|name| name == table.name || name == EVERY_TABLE) {
                transaction.again.insert(index, Again::Asked);
            }
        }
    }

    /// The messages by which edges send tables again: behind everything else of the transaction.
    fn again(&mut self, transaction: &OpenTransaction) {
        let mut kinds: BTreeSet<&str> = BTreeSet::new();
        let mut grants = false;
        for (&index, &why) in &transaction.again {
            let table = &self.tables[index];
            let late = self.sent_again.must_wait(index, why, transaction.at);
            self.left_out.push(LeftOut::Again { table: table.name.clone(), why, late });
            if late {
                continue;
            }
            if table.synced {
                kinds.extend(table.row_scope_columns().map(|scope| scope.kind));
            }
            grants |= !table.memberships.is_empty();
        }
        if !kinds.is_empty() {
            let header: Vec<String> = kinds.iter().map(|kind| format!("{WAL_PREFIX}{kind}{EVERY_SCOPE}")).collect();
            self.pieces.push(silent(Moved::Again(header.join(" "))));
        }
        if grants {
            self.pieces.push(silent(Moved::Any));
        }
    }

    fn finish(&mut self, mut transaction: OpenTransaction, end_lsn: Lsn, out: &mut Vec<Outgoing>) {
        transaction.chunks.flush(&mut self.pieces);
        self.again(&transaction);
        if self.pieces.is_empty() && (!transaction.origins.is_empty() || transaction.index > 0) {
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
            let (origin, left_out) = std::mem::take(&mut transaction.origins).into_header();
            last.origin = origin;
            if left_out > 0 {
                self.left_out.push(LeftOut::Origins { entries: left_out });
            }
        }
    }
}

impl OpenTransaction {
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

/// A message to everybody that brings no row.
fn silent(moves: Moved) -> Chunk {
    Chunk { subject: Scope::global().subject(), payload: Bytes::from_static(b"[]"), moves }
}

#[cfg(test)]
mod handover_tests;
#[cfg(test)]
mod tests;
