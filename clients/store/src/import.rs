//! How the saved changes of a damaged store are recorded again.

use millstream_client_core::rebase::{self, Image};
use millstream_schemas::{Change, Operation};
use rusqlite::params;
use serde::Serialize;

use crate::apply::Applier;
use crate::error::{During, StoreError, encode};
use crate::saved::{Saved, SavedTransaction};
use crate::statements::TableSql;
use crate::store::Store;
use crate::value::Wire;
use crate::write::Recorded;

/// Imported transactions that share a commit.
const GROUP: usize = 64;

/// What became of a saved transaction.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Imported {
    /// Its name in the damaged store.
    pub tx: u64,
    /// What became of it.
    #[serde(flatten)]
    pub outcome: ImportOutcome,
}

/// What became of a saved transaction.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum ImportOutcome {
    /// It is in the queue.
    Recorded {
        /// Under this name.
        as_tx: u64,
    },
    /// The rows are as it wants them: it had taken effect.
    Present,
    /// An earlier import took it.
    Before,
    /// It does not apply. It stays in the file; importing that again tries it again.
    Kept {
        /// Why.
        reason: String,
    },
}

impl Store {
    /// Records saved changes again, each transaction as a new one, in their order and with their stamps: what others have changed
    /// since wins as if they had been sent in time. What an import has taken it does not take again.
    ///
    /// # Errors
    /// [`StoreError::Import`]: the store's first snapshot is arriving. Otherwise SQLite failed: what was recorded until then stays.
    pub fn import(&mut self, saved: &Saved) -> Result<Vec<Imported>, StoreError> {
        // The changes are held against the rows, of which some are missing.
        if self.is_staging()? && self.is_unclaimed()? {
            return Err(StoreError::Import("the first snapshot is not complete: import once it is".into()));
        }
        let mut imported = Vec::with_capacity(saved.transactions.len());
        let source = saved.client_id.map_or_else(|| saved.saved_at.to_string(), |id| id.to_string());
        for transactions in saved.transactions.chunks(GROUP) {
            let outcomes = self.group(|store| -> Result<Vec<ImportOutcome>, StoreError> {
                transactions.iter().map(|transaction| store.import_or_keep(transaction, &source)).collect()
            })??;
            let tx = transactions.iter().map(|transaction| transaction.tx);
            imported.extend(tx.zip(outcomes).map(|(tx, outcome)| Imported { tx, outcome }));
        }
        Ok(imported)
    }

    /// What does not apply is kept; what the store cannot do now ends the import.
    fn import_or_keep(&mut self, transaction: &SavedTransaction, source: &str) -> Result<ImportOutcome, StoreError> {
        match self.import_one(transaction, &format!("imported {source} {}", transaction.tx)) {
            Err(error) if error.is_retryable() || error.is_damage() || error.lost().is_some() => Err(error),
            Err(error) => {
                let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}"));
                Ok(ImportOutcome::Kept { reason: format!("{error}{}", cause.unwrap_or_default()) })
            }
            taken => taken,
        }
    }

    fn import_one(&mut self, transaction: &SavedTransaction, name: &str) -> Result<ImportOutcome, StoreError> {
        self.transact(|store| {
            if store.has_meta(name)? {
                return Ok(ImportOutcome::Before);
            }
            if !transaction.complete {
                return Err(StoreError::Import("some of its changes may not have been readable".into()));
            }
            // The others are as good twice as once.
            if let Some(change) = transaction.changes.iter().find(|change| !change.adds.is_empty())
                && transaction.client_seq.is_some()
                && transaction.state.is_open()
            {
                let what = format!("what it adds to {} may have arrived: add by hand what is missing", change.table);
                return Err(StoreError::Import(what));
            }
            let tx = store.last_tx()? + 1;
            let client_seq = store.last_seq().during("reading the last number")? + 1;
            store.meet_stamps()?;
            store.session.begin(tx, client_seq, None);
            let mut stamps = Vec::new();
            let replayed = transaction.changes.iter().try_for_each(|change| {
                store.replay(change)?;
                let id: Option<i64> = store
                    .connection
                    .prepare_cached("SELECT max(id) FROM local_changes WHERE tx = ?1")
                    .and_then(|mut statement| statement.query_row([tx as i64], |row| row.get(0)))
                    .during("looking for what was recorded")?;
                // A change that changes nothing records nothing.
                if let Some(id) = id
                    && stamps.last().is_none_or(|(last, _)| *last < id)
                {
                    stamps.push((id, change.stamp));
                }
                Ok::<_, StoreError>(())
            });
            store.session.end();
            replayed?;
            store.keep_stamp()?;
            for (id, stamp) in stamps {
                store
                    .connection
                    .prepare_cached("UPDATE local_changes SET stamp = ?2 WHERE id = ?1")
                    .and_then(|mut statement| statement.execute(params![id, stamp as i64]))
                    .during("keeping when a change was made")?;
            }
            store.set_meta(name, tx as i64)?;
            Ok(match store.recorded(tx, client_seq)? {
                Some(Recorded { tx, .. }) => ImportOutcome::Recorded { as_tx: tx },
                None => ImportOutcome::Present,
            })
        })
    }

    /// Makes a change again, on the row as it is here.
    fn replay(&self, change: &Change) -> Result<(), StoreError> {
        let table = self.table(&change.table)?;
        let refuse =
            |what: &str| Err(StoreError::Import(format!("{} of {}: {what}", change.op.as_str(), change.table)));
        if change.key.len() != table.table.key.len() || change.columns.len() != change.values.len() {
            return refuse("the table has another key by now");
        }
        let row = Applier::new(self)?.visible(&table, &encode(&change.key))?;
        let change = &totalled(change, row.as_ref());
        let columns = table.columns(Some(change.columns.as_slice()))?;
        match (change.op, row) {
            (Operation::Insert, Some(row)) => {
                let same = |(column, value): (&String, &Option<String>)| row.get(column) == Some(value);
                match change.columns.iter().zip(&change.values).all(same) {
                    true => Ok(()),
                    false => refuse("the row is there, with other values"),
                }
            }
            (Operation::Insert, None) => {
                self.run_change(&table, &table.insert_columns(&columns), &columns, change, false)
            }
            (Operation::Update, Some(_)) if columns.is_empty() => Ok(()),
            (Operation::Update, Some(_)) => {
                self.run_change(&table, &table.set_columns(&columns), &columns, change, true)
            }
            (Operation::Update, None) => refuse("the row is not there"),
            (Operation::Delete, Some(_)) => self.run_change(&table, &table.delete, &[], change, true),
            (Operation::Delete, None) => Ok(()),
        }
    }

    /// Runs a statement whose parameters are the change's values, then its key if that is wanted.
    fn run_change(
        &self,
        table: &TableSql,
        sql: &str,
        columns: &[usize],
        change: &Change,
        by_key: bool,
    ) -> Result<(), StoreError> {
        let mut statement = self.connection.prepare_cached(sql).map_err(StoreError::statement)?;
        let values = columns.iter().copied().zip(&change.values);
        let key = table.table.key.iter().copied().zip(&change.key).filter(|_| by_key);
        for (place, (column, value)) in values.chain(key).enumerate() {
            let wire = Wire::new(table.kinds[column], value);
            statement.raw_bind_parameter(place + 1, wire).map_err(StoreError::statement)?;
        }
        statement.raw_execute().map(drop).map_err(StoreError::statement)
    }
}

/// A change with what its columns become in place of amounts.
fn totalled(change: &Change, row: Option<&Image>) -> Change {
    let mut change = change.clone();
    for name in std::mem::take(&mut change.adds) {
        let place = change.columns.iter().position(|column| *column == name);
        if let Some((place, row)) = place.zip(row) {
            change.values[place] = rebase::sum(row.get(&name).unwrap_or(&None), &change.values[place]);
        }
    }
    change
}
