//! What was rejected goes on: it is queued again, by itself or by hand, edited, or discarded.

use std::collections::BTreeMap;

use millstream_client_core::outbox::Entry;
use millstream_schemas::spelling::respelt;
use millstream_schemas::{Change, Clocks, Operation, Reference, Value};
use rusqlite::params;
use uuid::Uuid;

use crate::apply::Applier;
use crate::error::{During, StoreError, encode};
use crate::queue::failed_change;
use crate::states::{FAILED, TROUBLED};
use crate::store::Store;

/// A new value for a column that a rejected change sets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Edit {
    /// The change; none: the one that failed.
    pub change_id: Option<Uuid>,
    /// The column, which clients may set. With the key of an insert, what follows the insert changes too: of the same row, and of
    /// others that refer to it.
    pub column: String,
    /// The value, as Postgres writes it; of a column whose changes are added ([`Change::adds`](millstream_schemas::Change::adds)), the
    /// amount.
    pub value: Value,
}

impl Store {
    /// Queues a failed transaction again, with the same change ids; its attempts count from the start. It waits if an
    /// earlier transaction on the same rows waits.
    ///
    /// # Errors
    /// [`StoreError::NotFailed`]: there is no failed transaction of that number. Otherwise SQLite failed.
    pub fn retry(&mut self, tx: u64) -> Result<Option<Entry>, StoreError> {
        self.edit(tx, &[])
    }

    /// As [`Store::retry`], with other values for some columns.
    ///
    /// # Errors
    /// Those of [`Store::retry`], and [`StoreError::Edit`]: the transaction has no such change, or clients may not set the column.
    pub fn edit(&mut self, tx: u64, edits: &[Edit]) -> Result<Option<Entry>, StoreError> {
        let client_seq = self.unhindered(|store| {
            let keys = store.keys(tx, FAILED)?;
            if !edits.is_empty() {
                store.meet_stamps()?;
                store.meet_clocks(&keys)?;
                for edit in edits {
                    let edited = store.change_value(tx, edit)?;
                    store.restamp_from(edited)?;
                }
                store.keep_stamp()?;
            }
            let client_seq = store.requeue(tx, true)?;
            // What is behind it goes on too: if this one is refused again, the server refuses those.
            store.release()?;
            Ok::<_, StoreError>(client_seq)
        })?;
        match client_seq {
            Some(client_seq) => Ok(self.entries_after(client_seq - 1, 1)?.pop()),
            None => Ok(None),
        }
    }

    /// Whoever edits has seen the rows as they are: the edit is newer than their newest columns.
    fn meet_clocks(&self, keys: &[(String, String)]) -> Result<(), StoreError> {
        let applier = Applier::new(self)?;
        for (name, key) in keys {
            let Some(table) = self.tables.get(name) else { continue };
            let Some(clocks) = table.table.clocks else { continue };
            let row = applier.visible(table, key)?;
            if let Some(Some(text)) = row.and_then(|mut row| row.remove(&table.table.columns[clocks].name)) {
                self.session.observe(Clocks::parse(&text).newest().stamp);
            }
        }
        Ok(())
    }

    /// Gives the entry's id.
    fn change_value(&self, tx: u64, edit: &Edit) -> Result<i64, StoreError> {
        let refuse = |what: String| StoreError::Edit { tx, what };
        let raws = self.select(&format!("WHERE tx = ?1 AND {FAILED} ORDER BY id"), [tx as i64])?;
        let wanted = edit.change_id.or_else(|| failed_change(&raws));
        let raw = raws.into_iter().find(|raw| Some(raw.entry.change.change_id) == wanted);
        let mut change = raw.map(|raw| raw.entry.change).ok_or_else(|| refuse("it has no such change".into()))?;
        let table = self.table(&change.table)?;
        let before = change.key.clone();
        let known = table.table.column(&edit.column);
        let (name, column) =
            (&edit.column, known.ok_or_else(|| refuse(format!("there is no column {}", edit.column)))?);
        if change.op == Operation::Delete {
            return Err(refuse("a delete sets no column".into()));
        }
        let part = table.table.key.iter().position(|&part| part == column);
        if !table.table.columns[column].writable || (part.is_some() && change.op != Operation::Insert) {
            return Err(refuse(format!("the column {name} cannot be changed")));
        }
        let sql_type = &table.table.columns[column].r#type;
        let value = edit.value.as_ref().map(|text| respelt(sql_type, text).into_owned());
        if let Some(part) = part {
            if value.is_none() {
                return Err(refuse(format!("the column {name} is part of the key and cannot be null")));
            }
            change.key[part].clone_from(&value);
        }
        match change.columns.iter().position(|column| column == name) {
            Some(place) => change.values[place] = value,
            None => {
                change.columns.push(name.clone());
                change.values.push(value);
            }
        }
        if change.key == before {
            return self.put_back(&change);
        }
        let key = encode(&change.key);
        let taken = "SELECT EXISTS (SELECT 1 FROM local_changes INDEXED BY local_changes_live WHERE tbl = ?1 AND key = ?2 AND state <> 'confirmed')";
        let taken: bool = self
            .connection
            .prepare_cached(taken)
            .and_then(|mut statement| statement.query_row([&change.table, &key], |row| row.get(0)))
            .during("looking for a row")?;
        if taken || Applier::new(self)?.visible(&table, &key)?.is_some() {
            return Err(refuse(format!("there is a row with this {name} already")));
        }
        self.rename(tx, change, before)
    }

    fn put_back(&self, change: &Change) -> Result<i64, StoreError> {
        let Change { change_id, key, columns, values, .. } = change;
        self.connection
            .prepare_cached(
                "UPDATE local_changes SET key = ?2, columns = ?3, vals = ?4 WHERE change_id = ?1 RETURNING id",
            )
            .and_then(|mut statement| {
                let id = change_id.to_string();
                statement.query_row(params![id, encode(key), encode(columns), encode(values)], |row| row.get(0))
            })
            .during("editing a change")
    }

    /// Gives the row of an insert, which had the key `before`, the key that it has by now in everything that waits behind it: its own
    /// changes, and those that refer to it, of whose keys it may be a part. Nothing of that may be on its way.
    fn rename(&self, tx: u64, insert: Change, before: Vec<Value>) -> Result<i64, StoreError> {
        let mut applier = Applier::new(self)?;
        let id = self.put_back(&insert)?;
        let insert_id = insert.change_id;
        let mut renamed = BTreeMap::from([((insert.table, before), insert.key)]);
        for raw in self.select("WHERE id >= ?1 AND state <> 'confirmed' ORDER BY id", [id])? {
            let is_open = raw.entry.state.is_open();
            let recorded = raw.entry.change;
            let mut change = recorded.clone();
            let Some(table) = self.tables.get(&change.table) else { continue };
            let place =
                |column: &usize| change.columns.iter().position(|name| *name == table.table.columns[*column].name);
            for Reference { columns, table: parent, .. } in &table.table.references {
                let places: Option<Vec<usize>> = columns.iter().map(place).collect();
                let (Some(places), Some(parent)) = (places, self.tables.get(parent)) else { continue };
                let types = parent.table.key.iter().map(|&part| &parent.table.columns[part].r#type);
                let spelt = |(&place, sql_type): (&usize, &String)| {
                    Some(respelt(sql_type, change.values[place].as_ref()?).into_owned())
                };
                let key: Vec<Value> = places.iter().zip(types).map(spelt).collect();
                if let Some(new) = renamed.get(&(parent.name().to_owned(), key)) {
                    places.into_iter().zip(new).for_each(|(place, value)| change.values[place].clone_from(value));
                }
            }
            if change.op == Operation::Insert {
                let places: Vec<Option<usize>> = table.table.key.iter().map(place).collect();
                for (part, place) in places.into_iter().enumerate() {
                    change.key[part] = place.map_or(change.key[part].take(), |place| change.values[place].clone());
                }
                let name = (change.table.clone(), recorded.key.clone());
                if change.key != recorded.key {
                    renamed.insert(name, change.key.clone());
                } else if change.change_id != insert_id {
                    // Another row of that key: what comes after it is about this one.
                    renamed.remove(&name);
                }
            } else if let Some(new) = renamed.get(&(change.table.clone(), change.key.clone())) {
                change.key.clone_from(new);
            }
            if change != recorded {
                if is_open {
                    let what = format!(
                        "transaction {} is on its way, and is about the row that it makes: edit the key once that has its verdict",
                        raw.entry.tx
                    );
                    return Err(StoreError::Edit { tx, what });
                }
                for key in [&recorded.key, &change.key] {
                    applier.keep_base(&change.table, &encode(key))?;
                }
                self.put_back(&change)?;
            }
        }
        applier.finish()?;
        Ok(id)
    }

    /// An edit is made now; what was recorded later on the same row, in its transaction too, stays later.
    fn restamp_from(&self, edited: i64) -> Result<(), StoreError> {
        let later: Vec<i64> = self
            .connection
            .prepare_cached(
                "SELECT e.id FROM local_changes AS mine, local_changes AS e INDEXED BY local_changes_live \
                 WHERE mine.id = ?1 AND e.tbl = mine.tbl AND e.key = mine.key AND e.state <> 'confirmed' \
                 AND (e.tx, e.id) >= (mine.tx, mine.id) ORDER BY e.tx, e.id",
            )
            .and_then(|mut statement| statement.query_map([edited], |row| row.get(0))?.collect())
            .during("reading later changes")?;
        for id in later {
            self.connection
                .prepare_cached("UPDATE local_changes SET stamp = ?2 WHERE id = ?1")
                .and_then(|mut statement| statement.execute([id, self.session.next_stamp() as i64]))
                .during("keeping later changes later")?;
        }
        Ok(())
    }

    /// Queues those failed transactions again whose time has come. True: there were some.
    ///
    /// # Errors
    /// SQLite failed.
    pub fn retry_due(&mut self) -> Result<bool, StoreError> {
        let now = self.session.now() as i64;
        let due: Vec<i64> = self
            .connection
            .prepare_cached(&format!(
                "SELECT DISTINCT tx FROM local_changes INDEXED BY local_changes_troubled \
                 WHERE {TROUBLED} AND state = 'retry_wait' AND next_attempt <= ?1 ORDER BY tx"
            ))
            .and_then(|mut statement| statement.query_map([now], |row| row.get(0))?.collect())
            .during("reading due retries")?;
        if due.is_empty() {
            return Ok(false);
        }
        self.unhindered(|store| due.iter().try_for_each(|tx| store.requeue(*tx as u64, false).map(drop)))?;
        Ok(true)
    }

    /// Shows a failed transaction's changes again and gives it the next number, if none waits before it.
    fn requeue(&self, tx: u64, by_hand: bool) -> Result<Option<u64>, StoreError> {
        let keys = self.keys(tx, FAILED)?;
        let mut applier = Applier::new(self)?;
        for (table, key) in &keys {
            applier.keep_base(table, key)?;
        }
        self.connection
            .prepare_cached(
                "UPDATE local_changes SET next_attempt = NULL, attempts = iif(?2, 0, attempts), last_error = iif(?2, NULL, last_error), \
                 last_error_code = iif(?2, NULL, last_error_code), last_error_rule = iif(?2, NULL, last_error_rule) WHERE tx = ?1",
            )
            .and_then(|mut statement| statement.execute(params![tx as i64, by_hand]))
            .during("queueing again")?;
        let client_seq = self.number(tx)?;
        applier.finish()?;
        Ok(client_seq)
    }

    /// Forgets a failed or held transaction; its rows show the server's state.
    ///
    /// # Errors
    /// [`StoreError::NotFailed`]: the transaction is neither rejected nor held back. Otherwise SQLite failed.
    pub fn discard(&mut self, tx: u64) -> Result<(), StoreError> {
        const WAITING: &str = "state IN ('retry_wait', 'error', 'held')";
        self.unhindered(|store| {
            let keys = store.keys(tx, WAITING)?;
            store.keep_last_tx()?;
            store
                .connection
                .execute(&format!("DELETE FROM local_changes WHERE tx = ?1 AND {WAITING}"), [tx as i64])
                .during("discarding a transaction")?;
            let mut applier = Applier::new(store)?;
            applier.dirty.extend(keys);
            applier.finish()?;
            store.release().map(drop)
        })
    }
}
