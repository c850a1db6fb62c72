//! What must hold: G1 to G4, that nobody sees an older value again, and that all end alike.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use millstream_client_store::Reader;
use millstream_schemas::clock::MAX_AHEAD_MICROS;
use millstream_schemas::{Operation, Position, Row};
use rusqlite::types::Value;
use uuid::Uuid;

use super::postgres::{TASKS, Taken};
use super::record::Local;
use super::world::World;

fn read(reader: &Reader, sql: &str) -> Vec<Vec<Option<String>>> {
    read_with(reader, sql, &[])
}

fn read_with(reader: &Reader, sql: &str, params: &[Value]) -> Vec<Vec<Option<String>>> {
    let cell = |value: &Value| match value {
        Value::Null => None,
        Value::Integer(value) => Some(value.to_string()),
        Value::Text(value) => Some(value.clone()),
        other => panic!("{other:?}"),
    };
    let rows = reader.query(sql, params).expect("a query").rows;
    rows.iter().map(|row| row.iter().map(cell).collect()).collect()
}

fn text(cell: &Option<String>) -> &str {
    cell.as_deref().unwrap_or_default()
}

/// Table, column and place of the texts that are never written twice.
const CELLS: [(&str, &str); 3] = [("tasks", "note"), ("notes", "body"), ("labels", "name")];

impl World {
    fn reader(&self, index: usize) -> &Reader {
        self.clients[index].reader.as_ref().expect("a reader")
    }

    /// A transaction was committed.
    pub fn recorded(&mut self, index: usize, tx: u64) {
        let sql = "SELECT change_id, tbl, key FROM local_changes WHERE tx = ?1 ORDER BY id";
        let rows = read_with(self.reader(index), sql, &[Value::Integer(tx as i64)]);
        let change =
            |row: &Row| (text(&row[0]).parse().expect("an id"), format!("{} {}", text(&row[1]), text(&row[2])));
        let local = Local { changes: rows.iter().map(change).collect(), discarded: false };
        let known = self.checker.stores[index].transactions.insert(tx, local);
        assert!(known.is_none(), "client {index}: the name {tx} was given twice");
    }

    /// Positions rise within an epoch, unless the stream lost what the client had seen, and no other has begun yet.
    pub fn applied(&mut self, index: usize, position: Option<Position>) {
        let Some(now) = position else { return };
        if let Some(before) = self.clients[index].position.replace(now) {
            let fell = before.epoch == now.epoch && before.stream_seq > now.stream_seq;
            assert!(!fell || self.broker.has_lost, "client {index}: the position falls from {before:?} to {now:?}");
        }
    }

    /// What the app sees of each row after anything happened.
    pub fn check(&mut self, index: usize, why: &str) {
        let info = self.clients[index].store().info().expect("the store's facts");
        let epoch = info.position.map(|position| position.epoch);
        if std::mem::replace(&mut self.checker.stores[index].epoch, epoch) != epoch && self.restores {
            // Until now it showed rows that the restored database may have got again since.
            self.checker.stores[index].forget_shown();
        }
        let sql = "SELECT tbl, key, op, columns, vals, stamp, tx, state, attempts FROM local_changes \
                   WHERE state <> 'confirmed' ORDER BY tx, id";
        let mut edits: HashMap<(usize, String), (String, u64)> = HashMap::new();
        let entries = read(self.reader(index), sql);
        for entry in &entries {
            let tx: u64 = text(&entry[6]).parse().expect("a number");
            let state = text(&entry[7]);
            if text(&entry[8]) != "0" || ["retry_wait", "error", "held"].contains(&state) {
                self.checker.stores[index].troubled.insert(tx);
            }
            if ["retry_wait", "error"].contains(&state) {
                continue;
            }
            let Some(table) = CELLS.iter().position(|(name, _)| *name == text(&entry[0])) else { continue };
            let key: Vec<String> = serde_json::from_str(text(&entry[1])).expect("a key");
            let cell = (table, key[0].clone());
            if text(&entry[2]) == Operation::Delete.as_str() {
                edits.remove(&cell);
                continue;
            }
            let columns: Vec<String> = serde_json::from_str(text(&entry[3])).expect("columns");
            let values: Row = serde_json::from_str(text(&entry[4])).expect("values");
            if let Some(place) = columns.iter().position(|name| name == CELLS[table].1) {
                let stamp = text(&entry[5]).parse().expect("a stamp");
                edits.insert(cell, (text(&values[place]).to_owned(), stamp));
            }
        }
        for (table, (name, column)) in CELLS.iter().enumerate() {
            for row in read(self.reader(index), &format!("SELECT id, {column} FROM {name}")) {
                let (cell, shown) = ((table, text(&row[0]).to_owned()), text(&row[1]));
                let written = self.postgres.written.get(shown);
                if let Some((mine, stamp)) = edits.get(&cell)
                    && mine != shown
                {
                    // A newer clock of somebody else may be shown over it, where tables have clocks.
                    let newer =
                        written.is_some_and(|(clock, _)| (clock.stamp, clock.client_id) > (*stamp, info.client_id));
                    assert!(
                        table == TASKS && (newer || written.is_none() && self.restores),
                        "client {index}, {why}: {name} {} shows {shown}, not the edit {mine} under way",
                        cell.1
                    );
                }
                // A copy of the store may have written the same text before: an edit under way is shown, whatever came since.
                let is_mine = edits.get(&cell).is_some_and(|(mine, _)| mine == shown);
                if let Some((_, order)) = written.filter(|_| !is_mine) {
                    let before = self.checker.stores[index].shown.insert(cell.clone(), *order).unwrap_or(0);
                    assert!(before <= *order, "client {index}, {why}: {name} {} shows the older {shown} again", cell.1);
                }
            }
        }
    }

    pub fn is_quiet(&mut self) -> bool {
        self.frames == 0 && self.is_idle() && (0..self.clients.len()).all(|index| self.is_settled(index))
    }

    pub fn restless(&mut self) -> String {
        let mut text = format!("broker idle: {}, frames: {}", self.is_idle(), self.frames);
        for index in 0..self.clients.len() {
            let info = self.clients[index].store().info();
            let (session, settled) = (self.clients[index].session, self.is_settled(index));
            text += &format!("\nclient {index}: session {session:?}, settled {settled}, {info:?}");
        }
        text
    }

    /// The end: everything is settled, or failed and listed.
    pub fn finish(&mut self) {
        let taken = self.postgres.current.taken.clone();
        let mut by_id: HashMap<Uuid, Vec<&Taken>> = HashMap::new();
        let mut by_transaction: HashMap<(Uuid, u64), (usize, usize)> = HashMap::new();
        for change in &taken {
            by_id.entry(change.change_id).or_default().push(change);
            by_transaction.entry((change.client_id, change.client_seq)).or_insert((0, change.of)).0 += 1;
        }
        for (transaction, (found, of)) in by_transaction {
            assert_eq!(found, of, "G4: {transaction:?} took effect in part");
        }
        // What two copies of a store tried again after a rejection may take effect twice: see `copy_a_store`.
        let mut owners: HashMap<Uuid, usize> = HashMap::new();
        for store in &self.checker.stores {
            let ids = store.transactions.values().flat_map(|local| &local.changes);
            ids.for_each(|(id, _)| *owners.entry(*id).or_default() += 1);
        }
        let mut excused: HashSet<Uuid> = HashSet::new();
        for store in &self.checker.stores {
            for tx in &store.troubled {
                let ids = store.transactions.get(tx).into_iter().flat_map(|local| &local.changes);
                excused.extend(ids.map(|(id, _)| *id).filter(|id| owners[id] > 1));
            }
        }
        // Nor is it said which of them submits again what a restored database lost: see docs/restoring.md.
        excused.extend(self.checker.lost.iter().filter(|id| owners.get(id).is_some_and(|copies| *copies > 1)));
        for (id, effects) in &by_id {
            assert!(effects.len() == 1 || excused.contains(id), "G2: {id} took effect {} times", effects.len());
        }
        for (key, row) in &self.postgres.current.rows {
            let stamp = row.newest().stamp;
            assert!(stamp <= self.now + MAX_AHEAD_MICROS, "{key:?} is from the future: {stamp}");
        }
        for index in 0..self.clients.len() {
            self.check_queue(index, &by_id, &excused);
            self.check_order(index, &taken, &excused);
        }
        for index in 0..self.clients.len() {
            self.check_rows(index);
        }
    }

    /// G1: each local transaction ended in exactly one way.
    fn check_queue(&mut self, index: usize, taken: &HashMap<Uuid, Vec<&Taken>>, excused: &HashSet<Uuid>) {
        let sql = "SELECT tx, state, outcome, tbl, key, columns, vals FROM local_changes ORDER BY tx, id";
        let mut queue: BTreeMap<u64, (String, String, BTreeSet<String>)> = BTreeMap::new();
        let mut referred: BTreeMap<u64, BTreeSet<String>> = BTreeMap::new();
        for row in read(self.reader(index), sql) {
            let tx = text(&row[0]).parse().expect("a number");
            let entry = queue.entry(tx).or_default();
            (entry.0, entry.1) = (text(&row[1]).to_owned(), text(&row[2]).to_owned());
            entry.2.insert(format!("{} {}", text(&row[3]), text(&row[4])));
            let columns: Vec<String> = serde_json::from_str(text(&row[5])).expect("columns");
            let values: Row = serde_json::from_str(text(&row[6])).expect("values");
            let task = columns.iter().position(|name| name == "task_id").and_then(|place| values[place].clone());
            referred.entry(tx).or_default().extend(task.map(|id| format!("tasks [\"{id}\"]")));
        }
        let listed: BTreeSet<u64> =
            self.clients[index].store().failed().expect("the failed ones").iter().map(|write| write.tx).collect();
        for (tx, local) in &self.checker.stores[index].transactions {
            let found = queue.get(tx);
            let ids = || local.changes.iter().map(|(id, _)| id);
            if ids().any(|id| excused.contains(id)) {
                continue;
            }
            let effects = ids().map(|id| taken.get(id).map_or(0, Vec::len)).collect::<Vec<_>>();
            let (none, all) = (effects.iter().all(|n| *n == 0), effects.iter().all(|n| *n == 1));
            let name = format!("G1: client {index}, transaction {tx} ({found:?}), effects {effects:?}");
            match found.map(|(state, outcome, _)| (state.as_str(), outcome.as_str())) {
                None => assert!(local.discarded && none, "{name}: lost"),
                Some(("confirmed", outcome)) => {
                    assert!(all, "{name}: confirmed without effect");
                    let lost = ids().filter(|id| taken[id][0].lost).count();
                    let superseded = lost == local.changes.len();
                    assert_eq!(outcome == "superseded", superseded, "{name}: {lost} lost");
                    assert!(lost == 0 || superseded || outcome == "merged", "{name}: {lost} lost");
                }
                Some(("retry_wait" | "error", _)) => {
                    assert!(none && listed.contains(tx), "{name}: not listed, or taken")
                }
                Some(("held", _)) => {
                    let rows: BTreeSet<String> = queue[tx].2.union(&referred[tx]).cloned().collect();
                    let before = |(_, (state, _, others)): (&u64, &(String, String, BTreeSet<String>))| {
                        state != "confirmed" && !rows.is_disjoint(others)
                    };
                    assert!(none, "{name}: held, and taken");
                    assert!(queue.range(..tx).any(before), "{name}: held behind nothing of {rows:?} in {queue:#?}");
                }
                Some(_) => panic!("{name}: not settled"),
            }
        }
    }

    /// G3: effects come in the order in which the changes were recorded.
    fn check_order(&self, index: usize, taken: &[Taken], excused: &HashSet<Uuid>) {
        let store = &self.checker.stores[index];
        let mut places: HashMap<Uuid, (u64, usize, &str)> = HashMap::new();
        for (tx, local) in &store.transactions {
            for (place, (id, row)) in local.changes.iter().enumerate() {
                places.insert(*id, (*tx, place, row));
            }
        }
        let (mut rows, mut last): (HashMap<&str, (u64, usize)>, _) = (HashMap::new(), (0, 0));
        for change in taken.iter().filter(|change| !excused.contains(&change.change_id)) {
            let Some(&(tx, place, row)) = places.get(&change.change_id) else { continue };
            let before = rows.insert(row, (tx, place)).unwrap_or_default();
            assert!(before < (tx, place), "G3: client {index}: {row}: transaction {tx} took effect after {}", before.0);
            if !store.troubled.contains(&tx) && !self.checker.rejected.contains(&change.change_id) {
                assert!(last < (tx, place), "G3: client {index}: transaction {tx} took effect after {}", last.0);
                last = (tx, place);
            }
        }
    }

    /// When what failed is given up, everybody has the rows of Postgres.
    fn check_rows(&mut self, index: usize) {
        let held =
            read(self.reader(index), "SELECT DISTINCT tx FROM local_changes WHERE state = 'held' ORDER BY tx DESC");
        let failed = self.clients[index].store().failed().expect("the failed ones");
        let held = held.iter().map(|row| text(&row[0]).parse().expect("a number"));
        let all: Vec<u64> = held.chain(failed.iter().rev().map(|write| write.tx)).collect();
        for tx in all {
            self.clients[index].store().discard(tx).expect("to discard");
        }
        let info = self.clients[index].store().info().expect("the store's facts");
        assert_eq!((info.failed, info.held, info.last_seq), (0, 0, info.confirmed_seq), "client {index}: the queue");
        let scopes: Vec<_> = self.postgres.current.scopes(&self.clients[index].user).into_iter().collect();
        let mut held = info.scopes.clone();
        held.sort();
        assert_eq!(held, scopes, "client {index}: scopes");
        let mut expected = self.postgres.current.read(&self.postgres.tables, &scopes);
        let mut found: Vec<(usize, Row)> = Vec::new();
        for (number, table) in self.postgres.tables.iter().enumerate() {
            let columns: Vec<&str> = table.columns.iter().map(|column| column.name.as_str()).collect();
            let sql = format!("SELECT {} FROM {}", columns.join(", "), table.name);
            found.extend(read(self.reader(index), &sql).into_iter().map(|row| (number, row)));
        }
        expected.sort();
        found.sort();
        let extra: Vec<_> = found.iter().filter(|row| !expected.contains(row)).collect();
        let missing: Vec<_> = expected.iter().filter(|row| !found.contains(row)).collect();
        assert!(extra.is_empty() && missing.is_empty(), "client {index} has {extra:#?}\nbut not {missing:#?}");
        let bases = read(self.reader(index), "SELECT key FROM millstream_base");
        assert!(bases.is_empty(), "client {index}: images of rows that nobody changes: {bases:?}");
    }
}
