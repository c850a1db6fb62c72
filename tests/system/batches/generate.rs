//! Random batches. Most changes are meant to succeed on the rows as they are, so that whole batches do; some are spoilt.

use std::collections::{BTreeMap, BTreeSet};

use millstream_schemas::stream::Submission;
use millstream_schemas::{Change, Operation};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::Value;
use uuid::Uuid;

/// Most submissions a batch.
const MAX_SUBMISSIONS: usize = 40;
/// Clients, by user: some users have several.
const CLIENTS: [&str; 5] = ["ann", "ann", "bob", "eve", "eve"];
const USERS: [&str; 4] = ["ann", "bob", "eve", "dan"];
/// How far stale stamps reach back.
const STALE_MICROS: u64 = 2_000_000;

#[derive(Clone)]
struct Author {
    id: Uuid,
    user: &'static str,
    run_id: Uuid,
    last: u64,
}

/// The rows as the generator believes them to be: as read, then as its own changes would leave them.
#[derive(Clone, Default)]
struct Seen {
    teams: BTreeSet<i64>,
    /// Role by team and user.
    members: BTreeMap<(i64, String), String>,
    /// Team by id.
    labels: BTreeMap<i64, i64>,
    tasks: BTreeMap<i64, i64>,
    /// Task and author by id.
    notes: BTreeMap<i64, (i64, String)>,
    links: BTreeSet<i64>,
    /// Team by id.
    cards: BTreeMap<i64, i64>,
    marks: BTreeSet<i64>,
}

/// Makes batches.
pub struct Generator {
    rng: StdRng,
    authors: Vec<Author>,
    seen: Seen,
    begin: u64,
    stamp: u64,
    may_clamp: bool,
    /// All is by one client, whose stamps rise.
    alone: bool,
    /// Most batches are calm, so that those that are not do not keep the executor wary.
    quiet: bool,
    calm: bool,
    /// Rows of this batch, where it is calm.
    used: BTreeSet<(&'static str, i64)>,
}

impl Generator {
    /// For a seed; `now` in microseconds since 1970, the time that the whole test began.
    pub fn new(seed: u64, now: u64) -> Generator {
        let mut rng = StdRng::seed_from_u64(seed);
        let authors = CLIENTS.map(|user| Author {
            id: Uuid::from_u128(rng.random()),
            user,
            run_id: Uuid::from_u128(rng.random()),
            last: 0,
        });
        let quiet = rng.random();
        Generator {
            rng,
            authors: authors.to_vec(),
            seen: Seen::default(),
            begin: now,
            stamp: now,
            may_clamp: false,
            alone: seed.is_multiple_of(5),
            quiet,
            calm: false,
            used: BTreeSet::new(),
        }
    }

    /// Whether all is by one client, one after the other: nothing of it can lose.
    pub fn is_alone(&self) -> bool {
        self.alone
    }

    /// Takes over what a database holds (see `State`).
    pub fn look(&mut self, state: &Value) {
        let rows = |table: &str| state[table].as_array().cloned().unwrap_or_default();
        let int = |row: &Value, column: &str| row[column].as_i64().unwrap_or_default();
        let text = |row: &Value, column: &str| row[column].as_str().unwrap_or_default().to_owned();
        self.seen = Seen {
            teams: rows("teams").iter().map(|row| int(row, "id")).collect(),
            members: rows("members")
                .iter()
                .map(|row| ((int(row, "team_id"), text(row, "user_id")), text(row, "role")))
                .collect(),
            labels: rows("labels").iter().map(|row| (int(row, "id"), int(row, "team_id"))).collect(),
            tasks: rows("tasks").iter().map(|row| (int(row, "id"), int(row, "team_id"))).collect(),
            notes: rows("notes")
                .iter()
                .map(|row| (int(row, "id"), (int(row, "task_id"), text(row, "author"))))
                .collect(),
            links: rows("links").iter().map(|row| int(row, "id")).collect(),
            cards: rows("cards").iter().map(|row| (int(row, "id"), int(row, "team_id"))).collect(),
            marks: rows("marks").iter().map(|row| int(row, "id")).collect(),
        };
        for row in rows("clients") {
            if let Some(author) =
                self.authors.iter_mut().find(|author| author.id.to_string() == text(&row, "client_id"))
            {
                author.last = int(&row, "last_seq") as u64;
            }
        }
    }

    /// The next batch.
    pub fn batch(&mut self) -> Vec<Submission> {
        // Whole batches that are good, some with a single bad change, some full of them.
        let spoilt = [0.0, 0.0, 0.02, 0.1, 0.4][self.rng.random_range(0..5)];
        let odd = [0.0, 0.0, 0.05, 0.2][self.rng.random_range(0..4)];
        let long = [0.0, 0.1, 0.5][self.rng.random_range(0..3)];
        // Tables on which nothing depends; where no two changes meet and nothing is stale either, a batch may go at once.
        self.calm = !self.seen.members.is_empty() && self.rng.random_bool(if self.quiet { 0.95 } else { 0.2 });
        let (odd, long) = if self.calm { (0.0, 0.0) } else { (odd, long) };
        let odd = if self.alone { 0.0 } else { odd };
        let spoilt = if self.quiet && self.rng.random_bool(0.8) { 0.0 } else { spoilt };
        self.used.clear();
        self.may_clamp = true;
        let size = self.rng.random_range(1..=if self.calm { MAX_SUBMISSIONS / 2 } else { MAX_SUBMISSIONS });
        let mut batch = Vec::with_capacity(size);
        for _ in 0..size {
            let author = if self.alone { 0 } else { self.rng.random_range(0..self.authors.len()) };
            let user = self.authors[author].user;
            let count = if self.rng.random_bool(long) { self.rng.random_range(1..=4) } else { 1 };
            let changes = (0..count).map(|_| self.change(user, spoilt)).collect();
            let submission = self.submission(author, changes, odd);
            batch.push(submission);
        }
        batch
    }

    fn submission(&mut self, index: usize, changes: Vec<Change>, odd: f64) -> Submission {
        let author = &mut self.authors[index];
        let mut submission = Submission {
            client_id: author.id,
            user_id: author.user.to_owned(),
            client_seq: author.last + 1,
            attempt: self.rng.random_range(1..=3),
            run_id: author.run_id,
            previous: None,
            after: Vec::new(),
            changes,
            traceparent: None,
        };
        if !self.calm && self.rng.random_bool(0.2) {
            let back = self.rng.random_range(1..=5).min(author.last);
            submission.after = (submission.client_seq - back..submission.client_seq).collect();
        }
        if self.rng.random_bool(odd) {
            match self.rng.random_range(0..6) {
                // Again, perhaps what came just before.
                0 if author.last > 0 => submission.client_seq -= self.rng.random_range(1..=author.last.min(3)),
                1 => submission.client_seq += self.rng.random_range(1..=2),
                2 => submission.run_id = Uuid::from_u128(self.rng.random()),
                3 => submission.user_id = "dan".to_owned(),
                4 => {
                    // A store that knows what it was copied from.
                    let run_id = Uuid::from_u128(self.rng.random());
                    submission.previous = Some(std::mem::replace(&mut author.run_id, run_id));
                    submission.run_id = run_id;
                }
                _ => submission.changes.clear(),
            }
        }
        let skipped = submission.run_id != author.run_id || submission.user_id != author.user;
        if submission.client_seq == author.last + 1 && (!skipped || author.last == 0) {
            author.last += 1;
            author.run_id = submission.run_id;
        }
        submission
    }

    fn stamp(&mut self) -> u64 {
        match self.rng.random_range(0..100) {
            _ if self.alone => {
                self.stamp += 1_000;
                self.stamp
            }
            0 if self.may_clamp => {
                // One a batch: two of them would be ordered by the time of their transactions.
                self.may_clamp = false;
                self.begin + 400 * 86_400_000_000
            }
            1..20 if !self.calm || self.rng.random_bool(0.1) => self.begin - self.rng.random_range(0..STALE_MICROS),
            20..30 => self.stamp,
            30..40 if !self.calm => self.stamp + self.rng.random_range(0..50_000),
            _ => {
                self.stamp += 1_000;
                self.stamp
            }
        }
    }

    /// A change by a user; with probability `spoilt` one that is likely to be refused.
    fn change(&mut self, user: &str, spoilt: f64) -> Change {
        let spoil = spoilt > 0.0 && self.rng.random_bool(spoilt);
        // Somebody else's change, as this user's.
        let as_user = if spoil && self.rng.random_bool(0.2) { self.pick(&USERS) } else { user };
        let before = self.seen.clone();
        let mut change = loop {
            let roll = self.rng.random_range(0..100);
            let change = match self.rng.random_range(if self.calm { 14..16 } else { 0..16 }) {
                14.. if roll < 70 => self.card(as_user),
                14.. => self.mark(),
                0 => self.team(as_user, roll),
                1..3 => self.member(as_user, roll),
                3..5 => self.label(as_user, roll),
                5..10 => self.task(as_user, roll),
                10..12 => self.note(as_user, roll),
                _ => self.link(roll),
            };
            if let Some(change) = change {
                break change;
            }
        };
        if spoil {
            self.spoil(&mut change);
            self.seen = before;
        }
        change
    }

    fn spoil(&mut self, change: &mut Change) {
        let wrong: &[(&str, Option<&str>)] = &[
            ("name", Some("dup")),
            ("name", None),
            ("seats", Some("99")),
            ("seats", Some("0")),
            ("size", Some("1")),
            ("role", Some("king")),
            ("title", Some("x")),
            ("title", Some("forbidden")),
            ("title", Some("much too long for such a column")),
            ("points", Some("-1")),
            ("points", Some("many")),
            ("done", Some("perhaps")),
            ("done", Some("f")),
            ("label_id", Some("999")),
            ("parent_id", Some("999")),
            ("task_id", Some("999")),
            ("team_id", Some("999")),
            ("body", Some("")),
            ("text", Some("")),
            ("text", None),
            ("text", Some("denied")),
            ("url", None),
            ("url", Some("denied")),
            ("place", Some("1")),
            ("touched_by", Some("me")),
            ("nonsense", Some("1")),
        ];
        let fits: Vec<_> =
            wrong.iter().filter(|(name, _)| change.columns.iter().any(|column| column == name)).collect();
        match self.rng.random_range(0..10) {
            // Another row: missing, taken, somebody's.
            0..3 => {
                let key = self.rng.random_range(0..16).to_string();
                change.key[0] = Some(key.clone());
                if change.op == Operation::Insert {
                    change.values[0] = Some(key);
                }
            }
            3 if change.op != Operation::Delete => {
                let (name, value) = wrong[self.rng.random_range(0..wrong.len())];
                change.columns.push(name.to_owned());
                change.values.push(value.map(str::to_owned));
            }
            4 => change.table = "nonsense".to_owned(),
            5 => change.key[0] = Some("x".to_owned()),
            _ if !fits.is_empty() => {
                let (name, value) = fits[self.rng.random_range(0..fits.len())];
                let place = change.columns.iter().position(|column| column == name).unwrap_or(0);
                change.values[place] = value.map(str::to_owned);
            }
            _ => change.op = [Operation::Insert, Operation::Update, Operation::Delete][self.rng.random_range(0..3)],
        }
    }

    fn team(&mut self, user: &str, roll: u32) -> Option<Change> {
        if roll < 60 {
            let id = self.fresh(6, |seen, id| seen.teams.contains(&id))?;
            self.seen.teams.insert(id);
            let (name, seats) = (self.word("team"), self.rng.random_range(1..6).to_string());
            return Some(self.insert("teams", &[("id", id.to_string()), ("name", name), ("seats", seats)]));
        }
        let team = self.team_of(user, roll >= 90)?;
        if roll < 90 {
            let set = if roll < 75 {
                ("name", self.word("team"))
            } else {
                ("seats", self.rng.random_range(5..9).to_string())
            };
            return Some(self.update("teams", &[&team], &[set]));
        }
        self.seen.teams.remove(&team);
        self.seen.members.retain(|(of, _), _| *of != team);
        self.seen.labels.retain(|_, of| *of != team);
        self.seen.cards.retain(|_, of| *of != team);
        let Seen { tasks, notes, .. } = &mut self.seen;
        tasks.retain(|_, of| *of != team);
        notes.retain(|_, (task, _)| tasks.contains_key(task));
        Some(self.delete("teams", &[&team]))
    }

    fn member(&mut self, user: &str, roll: u32) -> Option<Change> {
        let owned = self.team_of(user, true);
        let who = self.pick(&USERS).to_owned();
        if roll < 60 {
            let teams: Vec<i64> = self.seen.teams.iter().copied().collect();
            let free = teams.iter().copied().find(|team| !self.seen.members.keys().any(|(of, _)| of == team));
            let (team, who, role) = match (free, owned) {
                (Some(team), _) => (team, user.to_owned(), "owner"),
                (None, Some(team)) => (team, who, self.pick(&["owner", "member"])),
                (None, None) => return None,
            };
            if self.seen.members.contains_key(&(team, who.clone())) {
                return None;
            }
            self.seen.members.insert((team, who.clone()), role.to_owned());
            let set = [("team_id", team.to_string()), ("user_id", who), ("role", role.to_owned())];
            return Some(self.insert("members", &set));
        }
        let team = owned?;
        // Deletes of missing rows are accepted here.
        if roll >= 85 {
            self.seen.members.remove(&(team, who.clone()));
            return Some(self.delete("members", &[&team, &who]));
        }
        let role = self.seen.members.get_mut(&(team, who.clone()))?;
        *role = if roll.is_multiple_of(2) { "owner" } else { "member" }.to_owned();
        let role = role.clone();
        Some(self.update("members", &[&team, &who], &[("role", role)]))
    }

    fn label(&mut self, user: &str, roll: u32) -> Option<Change> {
        let team = self.team_of(user, false)?;
        let of_team: Vec<i64> = self.seen.labels.iter().filter(|(_, of)| **of == team).map(|(id, _)| *id).collect();
        if roll < 40 || of_team.is_empty() {
            let id = self.fresh(8, |seen, id| seen.labels.contains_key(&id))?;
            if of_team.len() >= 3 && roll > 3 {
                return None;
            }
            self.seen.labels.insert(id, team);
            let (name, place) = (self.word("label"), self.rng.random_range(0..20).to_string());
            let set = [("id", id.to_string()), ("team_id", team.to_string()), ("name", name), ("place", place)];
            return Some(self.insert("labels", &set));
        }
        let id = of_team[self.rng.random_range(0..of_team.len())];
        if roll >= 75 {
            self.seen.labels.remove(&id);
            return Some(self.delete("labels", &[&id]));
        }
        let mut set = vec![("name", self.word("label")), ("place", self.rng.random_range(0..20).to_string())];
        if roll < 65 {
            set.remove(self.rng.random_range(0..2));
        }
        Some(self.update("labels", &[&id], &set))
    }

    fn task(&mut self, user: &str, roll: u32) -> Option<Change> {
        let team = self.team_of(user, false)?;
        let of_team: Vec<i64> = self.seen.tasks.iter().filter(|(_, of)| **of == team).map(|(id, _)| *id).collect();
        let labels: Vec<i64> = self.seen.labels.iter().filter(|(_, of)| **of == team).map(|(id, _)| *id).collect();
        let title = self.word("task");
        let mut set = Vec::new();
        if let Some(label) = self.one(&labels).filter(|_| self.rng.random_bool(0.5)) {
            set.push(("label_id", label.to_string()));
        }
        if roll < 45 || of_team.is_empty() {
            let id = self.fresh(14, |seen, id| seen.tasks.contains_key(&id))?;
            self.seen.tasks.insert(id, team);
            set.splice(0..0, [("id", id.to_string()), ("team_id", team.to_string()), ("title", title)]);
            if let Some(parent) = self.one(&of_team).filter(|_| self.rng.random_bool(0.3)) {
                set.push(("parent_id", parent.to_string()));
            }
            return Some(self.insert("tasks", &set));
        }
        let id = self.one(&of_team)?;
        if roll >= 88 {
            self.seen.tasks.remove(&id);
            self.seen.notes.retain(|_, (task, _)| *task != id);
            return Some(self.delete("tasks", &[&id]));
        }
        for part in [("title", title), ("done", "t".to_owned()), ("points", self.rng.random_range(0..9).to_string())] {
            if set.is_empty() || self.rng.random_bool(0.3) {
                set.push(part);
            }
        }
        if self.rng.random_bool(0.1) {
            let parent = self.one(&of_team)?;
            set.push(("parent_id", parent.to_string()));
        }
        Some(self.update("tasks", &[&id], &set))
    }

    fn note(&mut self, user: &str, roll: u32) -> Option<Change> {
        let own: Vec<i64> = self.seen.notes.iter().filter(|(_, (_, of))| of == user).map(|(id, _)| *id).collect();
        let body = self.word("note");
        if roll < 50 || own.is_empty() {
            let team = self.team_of(user, false)?;
            let tasks: Vec<i64> = self.seen.tasks.iter().filter(|(_, of)| **of == team).map(|(id, _)| *id).collect();
            let (id, task) = (self.fresh(10, |seen, id| seen.notes.contains_key(&id))?, self.one(&tasks)?);
            self.seen.notes.insert(id, (task, user.to_owned()));
            return Some(
                self.insert("notes", &[("id", id.to_string()), ("task_id", task.to_string()), ("body", body)]),
            );
        }
        let id = self.one(&own)?;
        if roll < 85 {
            return Some(self.update("notes", &[&id], &[("body", body)]));
        }
        self.seen.notes.remove(&id);
        Some(self.delete("notes", &[&id]))
    }

    fn link(&mut self, roll: u32) -> Option<Change> {
        let links: Vec<i64> = self.seen.links.iter().copied().collect();
        let tasks: Vec<i64> = self.seen.tasks.keys().copied().collect();
        let (url, task) = (self.word("url"), self.one(&tasks)?.to_string());
        if roll < 50 || links.is_empty() {
            let id = self.fresh(10, |seen, id| seen.links.contains(&id))?;
            self.seen.links.insert(id);
            return Some(self.insert("links", &[("id", id.to_string()), ("task_id", task), ("url", url)]));
        }
        let id = self.one(&links)?;
        if roll < 75 {
            let set = if roll < 65 { ("url", url) } else { ("task_id", task) };
            return Some(self.update("links", &[&id], &[set]));
        }
        self.seen.links.remove(&id);
        Some(self.delete("links", &[&id]))
    }

    fn card(&mut self, user: &str) -> Option<Change> {
        let team = self.team_of(user, false)?;
        let of_team: Vec<i64> = self.seen.cards.iter().filter(|(_, of)| **of == team).map(|(id, _)| *id).collect();
        let (text, roll) = (self.word("card"), self.rng.random_range(0..10));
        if roll < 5 || of_team.is_empty() {
            let id = self.fresh(200, |seen, id| seen.cards.contains_key(&id))?;
            self.alone("cards", id)?;
            self.seen.cards.insert(id, team);
            let set = [("id", id.to_string()), ("team_id", team.to_string()), ("text", text)];
            return Some(self.insert("cards", &set));
        }
        let id = self.one(&of_team)?;
        self.alone("cards", id)?;
        if roll == 9 {
            self.seen.cards.remove(&id);
            return Some(self.delete("cards", &[&id]));
        }
        let mut set = vec![("text", text), ("points", self.rng.random_range(0..9).to_string())];
        if roll < 7 {
            set.remove(self.rng.random_range(0..2));
        }
        Some(self.update("cards", &[&id], &set))
    }

    /// Notes a row; none if it may not be changed again.
    fn alone(&mut self, table: &'static str, id: i64) -> Option<()> {
        (self.used.insert((table, id)) || !self.calm).then_some(())
    }

    fn mark(&mut self) -> Option<Change> {
        let marks: Vec<i64> = self.seen.marks.iter().copied().collect();
        let roll = self.rng.random_range(0..10);
        if roll < 7 || marks.is_empty() {
            let id = self.fresh(200, |seen, id| seen.marks.contains(&id))?;
            self.alone("marks", id)?;
            self.seen.marks.insert(id);
            // Now and then one that is taken.
            let name = if roll == 0 && (!self.calm || self.rng.random_bool(0.1)) {
                "mark".to_owned()
            } else {
                format!("mark {}", self.rng.random::<u32>())
            };
            return Some(self.insert("marks", &[("id", id.to_string()), ("name", name)]));
        }
        let id = self.one(&marks)?;
        self.alone("marks", id)?;
        if roll == 7 || self.calm {
            let points = self.rng.random_range(0..9).to_string();
            return Some(self.update("marks", &[&id], &[("points", points)]));
        }
        self.seen.marks.remove(&id);
        Some(self.delete("marks", &[&id]))
    }

    /// A team with the user among its members, or its owners.
    fn team_of(&mut self, user: &str, owner: bool) -> Option<i64> {
        let teams: Vec<i64> = self
            .seen
            .members
            .iter()
            .filter(|((_, who), role)| who == user && (!owner || *role == "owner"))
            .map(|((team, _), _)| *team)
            .collect();
        self.one(&teams)
    }

    fn one(&mut self, of: &[i64]) -> Option<i64> {
        (!of.is_empty()).then(|| of[self.rng.random_range(0..of.len())])
    }

    fn pick<'a>(&mut self, of: &[&'a str]) -> &'a str {
        of[self.rng.random_range(0..of.len())]
    }

    /// A key from 1 to `most` that is not taken.
    fn fresh(&mut self, most: i64, taken: impl Fn(&Seen, i64) -> bool) -> Option<i64> {
        let free: Vec<i64> = (1..=most).filter(|id| !taken(&self.seen, *id)).collect();
        self.one(&free)
    }

    fn word(&mut self, kind: &str) -> String {
        format!("{kind} {}", self.rng.random_range(0..1_000))
    }

    fn insert(&mut self, table: &str, set: &[(&str, String)]) -> Change {
        let key = if table == "members" { &set[..2] } else { &set[..1] };
        self.make(table, Operation::Insert, key.iter().map(|(_, value)| value.clone()), set)
    }

    fn update(&mut self, table: &str, key: &[&dyn ToString], set: &[(&str, String)]) -> Change {
        let mut change = self.make(table, Operation::Update, key.iter().map(|part| part.to_string()), set);
        if table == "cards" && set.iter().any(|(column, _)| *column == "points") && self.rng.random_bool(0.4) {
            change.adds = vec!["points".to_owned()];
        }
        change
    }

    fn delete(&mut self, table: &str, key: &[&dyn ToString]) -> Change {
        self.make(table, Operation::Delete, key.iter().map(|part| part.to_string()), &[])
    }

    fn make(
        &mut self,
        table: &str,
        op: Operation,
        key: impl Iterator<Item = String>,
        set: &[(&str, String)],
    ) -> Change {
        Change {
            change_id: Uuid::from_u128(self.rng.random()),
            table: table.to_owned(),
            op,
            key: key.map(Some).collect(),
            columns: set.iter().map(|(column, _)| (*column).to_owned()).collect(),
            values: set.iter().map(|(_, value)| Some(value.clone())).collect(),
            adds: Vec::new(),
            gone: false,
            stamp: self.stamp(),
        }
    }
}
