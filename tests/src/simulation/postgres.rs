//! A model of Postgres: rows with clocks, the ledger, commits with LSNs in a log, and snapshots that may see a commit a
//! little later than the log has it. What the executor's SQL does to one change is written here once more, in Rust.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::rc::Rc;

use millstream_catalog::{Column, ConflictPolicy, Members, Membership, Table, WriteRules};
use millstream_changes::for_simulation::{Effect, LedgerRow, Settled};
use millstream_edge::for_simulation::Fence;
use millstream_schemas::clock::MAX_AHEAD_MICROS;
use millstream_schemas::frame::Confirmed;
use millstream_schemas::stream::{Failure, Loss, OriginEntry, RunSpan, Submission};
use millstream_schemas::{
    Change, Clock, Code, Lsn, Merge, Operation, Reference, Row, Scope, TableChanges, TableOp, TableScope, Value,
};
use uuid::Uuid;

pub const TASKS: usize = 0;
pub const NOTES: usize = 1;
pub const LABELS: usize = 2;
pub const MEMBERS: usize = 3;
/// Columns of all tables but `members`; the first is the id.
pub const PROJECT: usize = 1;
/// Of `tasks`: unique in a project. Of `notes` and `labels`: any text.
pub const TEXT: usize = 2;
/// Of `notes`: the task that it is about; it goes with the task.
pub const TASK: usize = 3;

/// tasks merge by column, labels by row, notes by arrival; members grant the scope `project`.
pub fn tables() -> Vec<Table> {
    let table = |oid, name: &str, columns: &[(&str, &str, bool)], key: &[usize], project, conflict| {
        let columns = columns.iter().map(|&(name, sql_type, writable)| Column {
            name: name.into(),
            sql_name: format!("\"{name}\""),
            sql_type: sql_type.into(),
            type_oid: 0,
            growth: Default::default(),
            merge: (name == "count").then_some(Merge::Add),
            numeric: None,
            domain: None,
            default: None,
            nullable: true,
            writable,
        });
        let rule = (name != "members").then(|| "member".to_owned());
        Table {
            synced: true,
            oid,
            name: name.into(),
            sql_name: format!("\"public\".\"{name}\""),
            columns: columns.collect(),
            key: key.to_vec(),
            scopes: vec![TableScope { kind: "project".into(), column: Some(project) }],
            memberships: match name {
                "members" => {
                    vec![Membership { kind: "project".into(), scope: 0, of: Members::User { column: 1, roles: None } }]
                }
                _ => vec![],
            },
            readable: "true".into(),
            write: WriteRules { insert: rule.clone(), update: rule.clone(), delete: rule },
            conflict,
            renamed: Default::default(),
            dropped: Vec::new(),
            delete_missing_accepted: false,
            partitioned: false,
            hidden: Vec::new(),
            insert_existing_merges: true,
            references: match name {
                "notes" => vec![Reference { columns: vec![TASK], table: "tasks".into(), cascades: true }],
                _ => vec![],
            },
            rules: vec![],
            validate: None,
        }
    };
    let by_column = ConflictPolicy::Column { clocks: 4, updated_at: None, client_id: None };
    let by_row = ConflictPolicy::Row { updated_at: 3, client_id: 4 };
    let (uuid, text) = ("uuid", "text");
    let tasks = [
        ("id", uuid, true),
        ("project_id", uuid, true),
        ("title", text, true),
        ("note", text, true),
        ("field_clocks", "jsonb", false),
    ];
    let labels = [
        ("id", uuid, true),
        ("project_id", uuid, true),
        ("name", text, true),
        ("updated_at", text, false),
        ("client_id", uuid, false),
    ];
    vec![
        table(1, "tasks", &tasks, &[0], 1, by_column),
        table(
            2,
            "notes",
            &[
                ("id", uuid, true),
                ("project_id", uuid, true),
                ("body", text, true),
                ("task_id", uuid, true),
                ("count", "bigint", true),
            ],
            &[0],
            1,
            ConflictPolicy::Arrival,
        ),
        table(3, "labels", &labels, &[0], 1, by_row),
        table(
            4,
            "members",
            &[("project_id", uuid, true), ("user_id", text, true)],
            &[0, 1],
            0,
            ConflictPolicy::Arrival,
        ),
    ]
}

/// A row's table and primary key.
pub type Key = (usize, Row);

/// A row: what clients see of it, and its clocks by column.
#[derive(Clone, Debug, PartialEq)]
pub struct Stored {
    pub values: Row,
    clocks: BTreeMap<String, Clock>,
}

impl Stored {
    fn of(&self, column: &str) -> Clock {
        self.clocks.get(column).or_else(|| self.clocks.get("")).copied().unwrap_or_default()
    }

    pub fn newest(&self) -> Clock {
        self.clocks.values().max().copied().unwrap_or_default()
    }

    /// Writes the clocks into the columns that clients get.
    fn show(mut self, table: usize) -> Stored {
        match table {
            TASKS => {
                let texts: BTreeMap<&String, String> =
                    self.clocks.iter().map(|(name, clock)| (name, clock.to_string())).collect();
                self.values[4] = serde_json::to_string(&texts).ok();
            }
            LABELS => {
                let clock = self.newest();
                self.values[3] = Some(clock.stamp.to_string());
                self.values[4] = Some(clock.client_id.to_string());
            }
            _ => {}
        }
        self
    }
}

/// A change that was taken, in the order of effects.
#[derive(Clone, Debug)]
pub struct Taken {
    pub change_id: Uuid,
    pub client_id: Uuid,
    pub client_seq: u64,
    /// Number of changes in its transaction.
    pub of: usize,
    /// All of it lost to newer changes.
    pub lost: bool,
}

#[derive(Clone, Debug, Default)]
pub struct Client {
    pub user_id: String,
    pub last_seq: u64,
    run_id: Option<Uuid>,
    lost: Vec<Loss>,
    spans: Vec<RunSpan>,
}

/// Everything that a transaction changes.
#[derive(Clone, Debug, Default)]
pub struct State {
    pub rows: BTreeMap<Key, Stored>,
    pub clients: BTreeMap<Uuid, Client>,
    pub history: BTreeMap<(Uuid, u64), Failure>,
    pub taken: Vec<Taken>,
    /// By incarnation of the inbound stream: the owner's term, and the position.
    pub partition: BTreeMap<u64, (i64, u64)>,
}

impl State {
    pub fn is_member(&self, user: &str, project: &Value) -> bool {
        self.rows.contains_key(&(MEMBERS, vec![project.clone(), Some(user.to_owned())]))
    }

    pub fn scopes(&self, user: &str) -> std::collections::BTreeSet<Scope> {
        let granted = self.rows.iter().filter(|((table, key), _)| *table == MEMBERS && key[1].as_deref() == Some(user));
        let projects = granted.filter_map(|((_, key), _)| key[0].clone()).map(|id| Scope::new("project", id));
        projects.chain([Scope::global(), Scope::user(user)]).collect()
    }

    /// The rows of these scopes.
    pub fn read(&self, tables: &[Table], scopes: &[Scope]) -> Vec<(usize, Row)> {
        let held = |(table, row): (&usize, &Row)| {
            tables[*table].row_scopes(|column| row[column].as_deref()).iter().any(|scope| scopes.contains(scope))
        };
        let rows = self.rows.iter().filter(|((table, _), row)| held((table, &row.values)));
        rows.map(|((table, _), row)| (*table, row.values.clone())).collect()
    }

    /// What `welcome` and the first `confirmed` tell a client.
    pub fn ledger(&self, client_id: Uuid, confirmed_seq: u64) -> (u64, Vec<RunSpan>, Option<Confirmed>) {
        let Some(client) = self.clients.get(&client_id) else { return (0, Vec::new(), None) };
        let failed = self.history.range((client_id, confirmed_seq + 1)..=(client_id, u64::MAX)).map(|(_, f)| f.clone());
        let lost = client.lost.iter().filter(|loss| loss.client_seq > confirmed_seq).cloned();
        let first = client.spans.iter().rposition(|span| span.first_seq <= confirmed_seq + 1).unwrap_or(0);
        let spans = client.spans[first..].to_vec();
        let run = client.spans.iter().rev().find(|span| span.first_seq <= client.last_seq);
        let confirmed = run.map(|span| Confirmed {
            client_seq: client.last_seq,
            run_id: span.run_id,
            failed: failed.collect(),
            lost: lost.collect(),
        });
        (client.last_seq, spans, confirmed)
    }
}

/// A committed transaction as the log has it.
#[derive(Debug)]
pub struct Commit {
    pub lsn: Lsn,
    pub xid: u32,
    pub at: u64,
    /// Scope and rows of each message; the last one carries the origin.
    pub messages: Vec<(Option<Scope>, Vec<TableChanges>)>,
    pub origin: Vec<OriginEntry>,
}

struct Backup {
    state: Rc<State>,
    commits: usize,
    insert: u64,
    xid: u32,
}

pub struct Postgres {
    pub tables: Vec<Table>,
    pub current: Rc<State>,
    /// What new snapshots see.
    pub visible: Rc<State>,
    /// Commits that snapshots do not see yet.
    hidden: VecDeque<(u32, Rc<State>)>,
    pub log: Vec<Rc<Commit>>,
    pub insert: u64,
    xid: u32,
    backup: Option<Backup>,
    /// Each text ever written: its clock, and when.
    pub written: HashMap<String, (Clock, u64)>,
    writes: u64,
}

/// A transaction under way.
pub struct Transaction {
    pub state: State,
    changes: Vec<(Key, Option<Row>, Option<Row>)>,
}

impl Postgres {
    pub fn new() -> Postgres {
        Postgres {
            tables: tables(),
            current: Rc::default(),
            visible: Rc::default(),
            hidden: VecDeque::new(),
            log: Vec::new(),
            insert: 0x10_0000,
            xid: 100,
            backup: None,
            written: HashMap::new(),
            writes: 0,
        }
    }

    pub fn begin(&self) -> Transaction {
        Transaction { state: State::clone(&self.current), changes: Vec::new() }
    }

    /// A snapshot and what it sees.
    pub fn snapshot(&self) -> (Rc<State>, Fence) {
        let hidden: Vec<String> = self.hidden.iter().map(|(xid, _)| xid.to_string()).collect();
        let xmin = self.hidden.front().map_or(self.xid, |(xid, _)| *xid);
        let text = format!("{xmin}:{}:{}", self.xid, hidden.join(","));
        (self.visible.clone(), Fence::parse(&text, &Lsn(self.insert).to_string()).expect("a fence"))
    }

    /// Commits; it is seen only after [`Postgres::show`].
    pub fn commit(&mut self, transaction: Transaction, origin: Vec<OriginEntry>, at: u64, gap: u64) {
        for (key, old, new) in &transaction.changes {
            let Some(new) = new else { continue };
            for value in new.iter().skip(TEXT).flatten() {
                let fresh = old.as_ref().is_none_or(|old| !old.contains(&Some(value.clone())));
                if fresh && key.0 != MEMBERS {
                    self.writes += 1;
                    let row = transaction.state.rows.get(key);
                    let place = new.iter().position(|v| v.as_ref() == Some(value)).unwrap_or_default();
                    let clock = row.map(|row| row.of(&self.tables[key.0].columns[place].name)).unwrap_or_default();
                    self.written.insert(value.clone(), (clock, self.writes));
                }
            }
        }
        let mut messages: Vec<(Option<Scope>, Vec<TableChanges>)> = Vec::new();
        for (key, old, new) in transaction.changes {
            let table = &self.tables[key.0];
            let scopes = |row: &Option<Row>| match row {
                Some(row) => table.row_scopes(|column| row[column].as_deref()),
                None => Vec::new(),
            };
            let (was, is) = (scopes(&old), scopes(&new));
            let left = was.into_iter().filter(|scope| !is.contains(scope)).map(|scope| (scope, None));
            let entered = is.iter().cloned().map(|scope| (scope, new.clone()));
            for (scope, row) in left.collect::<Vec<_>>().into_iter().chain(entered) {
                let op = if row.is_some() { TableOp::Upsert } else { TableOp::Delete };
                let rows = vec![row.unwrap_or_else(|| key.1.clone())];
                let change = TableChanges { table: table.name.clone(), op, columns: None, rows };
                match messages.last_mut() {
                    Some((Some(last), changes)) if *last == scope => changes.push(change),
                    _ => messages.push((Some(scope), vec![change])),
                }
            }
        }
        if messages.is_empty() && !origin.is_empty() {
            messages.push((None, Vec::new()));
        }
        self.current = Rc::new(transaction.state);
        self.hidden.push_back((self.xid, self.current.clone()));
        self.log.push(Rc::new(Commit { lsn: Lsn(self.insert), xid: self.xid, at, messages, origin }));
        self.xid += 1;
        self.insert += gap;
    }

    /// Makes the commits up to the transaction `xid` visible.
    pub fn show(&mut self, xid: u32) {
        while self.hidden.front().is_some_and(|(first, _)| *first <= xid) {
            if let Some((_, state)) = self.hidden.pop_front() {
                self.visible = state;
            }
        }
    }

    pub fn last_xid(&self) -> u32 {
        self.xid - 1
    }

    /// Changes that no log tells of: who owns the partition.
    pub fn partition(&mut self, stream: u64, owner: i64, position: u64) {
        let mut state = State::clone(&self.current);
        state.partition.insert(stream, (owner, position));
        self.current = Rc::new(state);
    }

    pub fn back_up(&mut self) {
        let (state, commits, insert, xid) = (self.current.clone(), self.log.len(), self.insert, self.xid);
        self.backup = Some(Backup { state, commits, insert, xid });
    }

    /// The database goes back to its backup. False: there is none.
    pub fn restore(&mut self) -> bool {
        let Some(backup) = self.backup.take() else { return false };
        self.current = backup.state.clone();
        self.visible = backup.state;
        self.hidden.clear();
        self.log.truncate(backup.commits);
        (self.insert, self.xid) = (backup.insert, backup.xid);
        self.written.clear();
        true
    }
}

impl Transaction {
    /// A writer that knows nothing of Millstream; the triggers keep its clocks.
    pub fn write(&mut self, tables: &[Table], key: Key, values: Option<Row>, now: u64) {
        let old = self.state.rows.get(&key).cloned();
        let new = values.map(|values| {
            let stamp = old.as_ref().map_or(now, |old| now.max(old.newest().stamp + 1));
            let clock = Clock { stamp, ..Clock::default() };
            let mut clocks = old.as_ref().map(|old| old.clocks.clone()).unwrap_or_default();
            match &old {
                Some(old) if key.0 == TASKS => {
                    let changed = (0..4).filter(|&index| old.values[index] != values[index]);
                    clocks.extend(changed.map(|index| (tables[TASKS].columns[index].name.clone(), clock)));
                }
                _ => clocks = BTreeMap::from([(String::new(), clock)]),
            }
            Stored { values, clocks }.show(key.0)
        });
        self.set(key, new);
    }

    fn set(&mut self, key: Key, new: Option<Stored>) {
        let old = match &new {
            Some(row) => self.state.rows.insert(key.clone(), row.clone()),
            None => self.state.rows.remove(&key),
        };
        let goes = key.0 == TASKS && new.is_none();
        let about = |other: &Key, row: &Stored| goes && other.0 == NOTES && row.values[TASK] == key.1[0];
        let notes: Vec<Key> =
            self.state.rows.iter().filter(|(other, row)| about(other, row)).map(|(other, _)| other.clone()).collect();
        self.changes.push((key, old.map(|row| row.values), new.map(|row| row.values)));
        for note in notes {
            self.set(note, None);
        }
    }

    /// One client's transaction, whole or not at all.
    pub fn submit(&mut self, tables: &[Table], submission: &Submission, now: u64) -> Effect {
        let before = (self.state.clone(), self.changes.len());
        let mut lost = Vec::new();
        for (index, change) in submission.changes.iter().enumerate() {
            match self.change(tables, submission, index, change, now) {
                Ok(None) => {}
                Ok(Some(whole)) => lost.push((index, whole)),
                Err((code, message)) => {
                    self.state = before.0;
                    self.changes.truncate(before.1);
                    return Effect::Refused(index, code, message);
                }
            }
        }
        let taken = submission.changes.iter().enumerate().map(|(index, change)| Taken {
            change_id: change.change_id,
            client_id: submission.client_id,
            client_seq: submission.client_seq,
            of: submission.changes.len(),
            lost: lost.contains(&(index, true)),
        });
        self.state.taken.extend(taken);
        Effect::Applied(lost)
    }

    /// None: it took effect. True: it lost, as a whole; false: some of its columns did.
    fn change(
        &mut self,
        tables: &[Table],
        submission: &Submission,
        index: usize,
        change: &Change,
        now: u64,
    ) -> Result<Option<bool>, (Code, &'static str)> {
        let Submission { client_id, client_seq, user_id, .. } = submission;
        let number = tables.iter().position(|table| table.name == change.table).expect("a known table");
        let (table, key) = (&tables[number], (number, change.key.clone()));
        let stamp = change.stamp.min(now + MAX_AHEAD_MICROS);
        let clock = Clock { stamp, client_id: *client_id, client_seq: *client_seq, index: index as u32 };
        let (mut clock, by_row) = (clock, number == LABELS);
        if by_row {
            // All that `updated_at` and `client_id` tell.
            (clock.client_seq, clock.index) = (0, 0);
        }
        let old = self.state.rows.get(&key).cloned();
        let merges = change.op == Operation::Insert && old.is_some();
        let sets = || {
            let set = change.columns.iter().map(|name| table.column(name).expect("a known column")).zip(&change.values);
            set.filter(|(column, _)| !merges || !table.key.contains(column))
        };
        let member = |row: &Row| self.state.is_member(user_id, &row[PROJECT]);
        let denied = (Code::PermissionDenied, "not a member");
        match (change.op, old) {
            (Operation::Insert, None) => {
                let mut values: Row = vec![None; table.columns.len()];
                sets().for_each(|(column, value)| values[column] = value.clone());
                if !member(&values) {
                    return Err(denied);
                }
                self.check_title(&key, &values)?;
                self.check_task(&key, &values)?;
                self.set(key, Some(Stored { values, clocks: BTreeMap::from([(String::new(), clock)]) }.show(number)));
                Ok(None)
            }
            // Its author's own delete of the task took it along.
            (Operation::Delete, None) if change.gone => Ok(None),
            (_, None) => Err((Code::EntityMissing, "no such row")),
            // A row that says no more than that it is there.
            (Operation::Insert, Some(_)) if sets().next().is_none() => Ok(None),
            (Operation::Insert | Operation::Update, Some(old)) => {
                let (mut meant, mut merged, mut lost) = (old.values.clone(), old.clone(), 0);
                for (column, value) in sets() {
                    let name = &table.columns[column].name;
                    let value = match change.adds.contains(name) {
                        true => &sum(&old.values[column], value),
                        false => value,
                    };
                    meant[column] = value.clone();
                    if number != NOTES && clock < old.of(name) {
                        lost += 1;
                        continue;
                    }
                    merged.values[column] = value.clone();
                    merged.clocks.insert(if by_row { String::new() } else { name.clone() }, clock);
                }
                if !member(&old.values) || !member(&meant) || !member(&merged.values) {
                    return Err(if merges { (Code::BusinessRule, "the key is taken") } else { denied });
                }
                if lost == sets().count() {
                    return Ok(Some(true));
                }
                self.check_title(&key, &merged.values)?;
                self.check_task(&key, &merged.values)?;
                self.set(key, Some(merged.show(number)));
                Ok((lost > 0).then_some(false))
            }
            (Operation::Delete, Some(old)) => {
                if !member(&old.values) {
                    return Err(denied);
                }
                if number != NOTES && clock < old.newest() {
                    return Ok(Some(true));
                }
                self.set(key, None);
                Ok(None)
            }
        }
    }

    fn check_title(&self, key: &Key, values: &Row) -> Result<(), (Code, &'static str)> {
        let same = |(other, row): (&Key, &Stored)| {
            other.0 == TASKS && other != key && row.values[PROJECT..=TEXT] == values[PROJECT..=TEXT]
        };
        if key.0 == TASKS && values[TEXT].is_some() && self.state.rows.iter().any(same) {
            return Err((Code::BusinessRule, "the title is taken"));
        }
        Ok(())
    }

    fn check_task(&self, key: &Key, values: &Row) -> Result<(), (Code, &'static str)> {
        if key.0 == NOTES
            && values[TASK].is_some()
            && !self.state.rows.contains_key(&(TASKS, vec![values[TASK].clone()]))
        {
            return Err((Code::BusinessRule, "there is no such task"));
        }
        Ok(())
    }

    /// Stores what the executor's rules say of the batch.
    pub fn settle(&mut self, settled: &Settled) {
        for LedgerRow { client_id, user_id, last_seq, run_id } in &settled.clients {
            let client = self.state.clients.entry(*client_id).or_default();
            (client.user_id, client.last_seq, client.run_id) = (user_id.clone(), *last_seq, *run_id);
        }
        for (client_id, span) in &settled.spans {
            let spans = &mut self.state.clients.entry(*client_id).or_default().spans;
            spans.retain(|old| old.first_seq != span.first_seq);
            spans.push(*span);
        }
        for entry in &settled.origin {
            self.state.clients.entry(entry.client_id).or_default().lost.extend(entry.lost.iter().cloned());
            for failure in &entry.failed {
                self.state.history.entry((entry.client_id, failure.client_seq)).or_insert_with(|| failure.clone());
            }
        }
    }

    pub fn known(&self, submissions: &[Submission]) -> Vec<LedgerRow> {
        let mut ids: Vec<Uuid> = submissions.iter().map(|submission| submission.client_id).collect();
        ids.sort_unstable();
        ids.dedup();
        let known = |client_id: Uuid| {
            let client = self.state.clients.get(&client_id)?;
            let (user_id, last_seq, run_id) = (client.user_id.clone(), client.last_seq, client.run_id);
            Some(LedgerRow { client_id, user_id, last_seq, run_id })
        };
        ids.into_iter().filter_map(known).collect()
    }
}

/// Of a number and an amount.
fn sum(old: &Value, amount: &Value) -> Value {
    let number = |value: &Value| value.as_ref().map_or(0, |text| text.parse::<i64>().expect("a number"));
    Some((number(old) + number(amount)).to_string())
}
