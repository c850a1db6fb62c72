//! What Postgres had: each state in the order of commits, and what a user may see of it.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, bail, ensure};
use sqlx::{AssertSqlSafe, PgConnection, Row as _};

use super::schema::{Belongs, Columns, Kind, MEMBERSHIPS, Schema, object};

/// A row's values as Postgres writes them, in the order of the compared columns.
pub type Row = Vec<Option<String>>;
/// Rows with the number of their table.
pub type View = BTreeSet<(usize, Row)>;

/// What a client showed, and where it stood just after that, for people.
pub struct Shown {
    pub view: View,
    pub at: String,
}

/// All that Postgres had.
pub struct Truth {
    schema: Schema,
    /// All rows, from one commit to the next, as they are compared ([`loosely`]).
    states: Vec<State>,
    /// All rows in the end.
    end: View,
    /// What each commit did, for people.
    commits: Vec<String>,
    /// Commits that emptied a table, or wrote its rows into another file.
    emptied: Vec<(usize, usize)>,
}

/// What there was after a commit.
#[derive(Clone, Default)]
struct State {
    rows: View,
    /// Rows as they were before they were rewritten without the log telling, which clients learn a moment later, and as they are.
    stale: BTreeMap<(usize, Row), (usize, Row)>,
    /// Tables whose changes could not all be told by their replica identity, so that clients learn of them a moment later.
    loose: BTreeSet<usize>,
}

/// What a user is a member of.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Memberships<'a> {
    projects: BTreeSet<&'a str>,
    teams: BTreeSet<&'a str>,
}

impl<'a> Memberships<'a> {
    fn and(&self, other: &Memberships<'a>) -> Memberships<'a> {
        let both = |one: &BTreeSet<&'a str>, other| one.intersection(other).copied().collect();
        Memberships { projects: both(&self.projects, &other.projects), teams: both(&self.teams, &other.teams) }
    }
}

/// A row, but for what depends on types that change.
fn loosely(schema: &Schema, (table, row): &(usize, Row)) -> (usize, Row) {
    let Some(of) = table.checked_sub(MEMBERSHIPS.len()) else { return (*table, row.clone()) };
    let columns = schema.tables[of].columns();
    let text = |(text, (_, kind)): (&Option<String>, &(String, Kind))| text.as_deref().map(|text| kind.loosely(text));
    (*table, row.iter().zip(&columns).map(text).collect())
}

/// What differs, for people.
fn differences(wanted: &View, shown: &View) -> String {
    let missing = wanted.difference(shown).map(|row| format!("\nmissing: {row:?}"));
    missing.chain(shown.difference(wanted).map(|row| format!("\nextra: {row:?}"))).collect()
}

/// Last entry of the log.
pub async fn now(postgres: &mut PgConnection) -> Result<i64> {
    Ok(sqlx::query_scalar("SELECT coalesce(max(n), 0) FROM log").fetch_one(postgres).await?)
}

/// A row of the log.
fn logged(columns: &Columns, object: &serde_json::Value) -> Row {
    let value = |(name, kind): &(String, Kind)| object[name].as_str().map(|text| kind.compared(text.to_owned()));
    columns.iter().map(value).collect()
}

/// Every row that there is.
pub async fn read(postgres: &mut PgConnection, schema: &Schema) -> Result<View> {
    let mut rows = View::new();
    for (table, (name, columns)) in schema.columns().iter().enumerate() {
        let of = table.checked_sub(MEMBERSHIPS.len()).map(|of| schema.tables[of].own_rows());
        let sql = format!("SELECT {} FROM {} r", object(columns, "r"), of.unwrap_or_else(|| name.clone()));
        for row in sqlx::query(AssertSqlSafe(sql)).fetch_all(&mut *postgres).await? {
            rows.insert((table, logged(columns, &row.get(0))));
        }
    }
    Ok(rows)
}

impl Truth {
    /// From the rows that there were at entry `since` of the log, and the log behind it.
    pub async fn read(postgres: &mut PgConnection, schema: &Schema, mut rows: View, since: i64) -> Result<Truth> {
        let tables = schema.columns();
        let log = sqlx::query("SELECT xid::text, tbl, old, new, what FROM log WHERE n > $1 ORDER BY n")
            .bind(since)
            .fetch_all(postgres)
            .await?;
        let all = |rows: &View| rows.iter().map(|row| loosely(schema, row)).collect();
        let mut state = State { rows: all(&rows), ..State::default() };
        let (mut states, mut commits, mut emptied) = (vec![state.clone()], vec![String::new()], Vec::new());
        for (index, entry) in log.iter().enumerate() {
            let [xid, name] = [0, 1].map(|place| entry.get::<&str, _>(place));
            let [old, new] = [2, 3].map(|place| entry.get::<Option<serde_json::Value>, _>(place));
            let what: Option<&str> = entry.get(4);
            let table = tables.iter().position(|(other, _)| other == name);
            let table = table.with_context(|| format!("{name}: {what:?}"))?;
            let row = |object: &serde_json::Value| (table, logged(&tables[table].1, object));
            let text =
                |value: &Option<serde_json::Value>| value.as_ref().map_or("-".to_owned(), |value| value.to_string());
            let commit = commits.last_mut().context("a commit")?;
            commit.push_str(&format!("\n  {name}{}: {} -> {}", what.unwrap_or_default(), text(&old), text(&new)));
            match (what, old, new) {
                (None, None, None) => {
                    rows.retain(|row| row.0 != table);
                    emptied.push((states.len(), table));
                }
                (None, old, new) => {
                    if let Some(old) = old {
                        ensure!(rows.remove(&row(&old)), "the log is out of order: there is no {old}");
                        let old = loosely(schema, &row(&old));
                        state.stale.retain(|_, fresh| *fresh != old);
                    }
                    rows.extend(new.as_ref().map(row));
                }
                (Some("loose"), ..) => {
                    state.loose.insert(table);
                }
                (Some("rewritten"), _, Some(serde_json::Value::Array(now))) => {
                    let key: Vec<usize> = schema.tables[table - MEMBERSHIPS.len()].key_columns().collect();
                    let now: BTreeSet<_> = now.iter().map(row).collect();
                    let fresh = |was: &(usize, Row)| {
                        let is_it = |now: &&(usize, Row)| key.iter().all(|&part| now.1[part] == was.1[part]);
                        now.iter().find(is_it).map(|now| loosely(schema, now))
                    };
                    for was in rows.iter().filter(|row| row.0 == table) {
                        let (fresh, was) = (fresh(was).context("a row is gone")?, loosely(schema, was));
                        state.stale.values_mut().filter(|row| **row == was).for_each(|row| *row = fresh.clone());
                        state.stale.insert(was, fresh);
                    }
                    rows.retain(|row| row.0 != table);
                    rows.extend(now);
                    emptied.push((states.len(), table));
                }
                (what, ..) => bail!("{name}: {what:?}"),
            }
            if log.get(index + 1).is_none_or(|next| next.get::<&str, _>(0) != xid) {
                state.rows = all(&rows);
                states.push(state.clone());
                commits.push(String::new());
            }
        }
        Ok(Truth { schema: schema.clone(), states, end: rows, commits, emptied })
    }

    /// What a user was a member of after a commit.
    fn memberships(&self, commit: usize, user: &str) -> Memberships<'_> {
        let rows = |table: usize| self.states[commit].rows.iter().filter(move |row| row.0 == table).map(|(_, row)| row);
        let granted = |table: usize| {
            let counts = |row: &&Row| row[1].as_deref() == Some(user) && row[2].as_deref() != Some("guest");
            rows(table).filter(counts).filter_map(|row| row[0].as_deref())
        };
        let teams: BTreeSet<&str> = granted(1).collect();
        let through = rows(2).filter(|row| row[1].as_deref().is_some_and(|team| teams.contains(team)));
        let projects = granted(0).chain(through.filter_map(|row| row[0].as_deref())).collect();
        Memberships { projects, teams }
    }

    /// Those of these rows that a user with these memberships sees, as the configuration says it.
    fn view(&self, rows: &View, user: &str, memberships: &Memberships<'_>) -> View {
        let tables = self.schema.columns();
        let seen = |(table, row): &&(usize, Row)| {
            let value = |column: &str| {
                let place = tables[*table].1.iter().position(|(name, _)| name == column)?;
                row[place].as_deref()
            };
            let in_project = value("project").is_some_and(|project| memberships.projects.contains(project));
            let in_team = value("team").is_some_and(|team| memberships.teams.contains(team));
            // Memberships are their user's own rows, too.
            let is_own = value(if *table < MEMBERSHIPS.len() { "user_id" } else { "owner" }) == Some(user);
            match table.checked_sub(MEMBERSHIPS.len()).map(|table| self.schema.tables[table].belongs) {
                Some(Belongs::Project) => in_project,
                Some(Belongs::User) => is_own,
                None => self.schema.memberships_synced && (in_project || in_team || is_own),
                Some(Belongs::Both) => in_project || is_own,
                Some(Belongs::Everybody) => true,
            }
        };
        rows.iter().filter(seen).cloned().collect()
    }

    /// What was committed behind a state, for people.
    fn commits(&self, from: usize) -> String {
        (from..self.states.len() - 1).map(|n| format!("\ncommit {}:{}", n + 1, self.commits[n])).collect()
    }

    /// What a user may see in the end.
    pub fn last(&self, user: &str) -> View {
        let last = self.states.len() - 1;
        self.view(&self.end, user, &self.memberships(last, user))
    }

    /// Whether what a client showed, in this order, are states of its user's rows, in this order, up to the last one.
    ///
    /// Memberships are read when a commit that moves them is delivered, and so may be those of a later one: whoever left a
    /// project and is back by then never lost it. A client that catches up with more than an edge remembers shows at first the
    /// scopes that it held where it stood, or held then, and holds later: lost ones are gone at once, new ones come at the end.
    /// And a snapshot may miss the rows of a table that is truncated or rewritten while it is read (PostgreSQL documentation,
    /// "TRUNCATE", "ALTER TABLE": they are not MVCC-safe). The truncation follows in the stream; what was rewritten is sent again,
    /// and until then its rows may be shown as they were.
    pub fn check(&self, user: &str, all: &[Shown]) -> Result<()> {
        let (mut at, last) = (0, self.states.len() - 1);
        for (nth, Shown { view: shown, .. }) in all.iter().enumerate() {
            let shown: View = shown.iter().map(|row| loosely(&self.schema, row)).collect();
            let fresh = |commit: usize| -> View {
                let State { stale, loose, .. } = &self.states[commit];
                let rows = shown.iter().filter(|row| !loose.contains(&row.0));
                rows.map(|row| stale.get(row).unwrap_or(row).clone()).collect()
            };
            let compared = |commit: usize, memberships: &Memberships<'_>| -> View {
                let mut view = self.view(&self.states[commit].rows, user, memberships);
                view.retain(|row| !self.states[commit].loose.contains(&row.0));
                view
            };
            let is = |commit: &usize| {
                let read: BTreeSet<_> = (*commit..=last).map(|later| self.memberships(later, user)).collect();
                let then = self.memberships(*commit, user);
                let stood = self.memberships(at, user);
                let both: BTreeSet<_> = read.iter().flat_map(|later| [then.and(later), stood.and(later)]).collect();
                let views = read.union(&both).map(|memberships| compared(*commit, memberships));
                let emptied: BTreeSet<usize> =
                    self.emptied.iter().filter(|(at, _)| at > commit).map(|(_, table)| *table).collect();
                let shown = fresh(*commit);
                let rewritten: BTreeSet<&(usize, Row)> = self.states[*commit].stale.values().collect();
                let is_late = |row: &(usize, Row)| emptied.contains(&row.0) || rewritten.contains(row);
                let lacks = |view: View| view.difference(&shown).all(is_late) && shown.is_subset(&view);
                views.into_iter().any(lacks)
            };
            let Some(found) = (at..=last).find(is) else {
                let view = |commit| compared(commit, &self.memberships(commit, user));
                let far = |commit: &usize| view(*commit).symmetric_difference(&fresh(*commit)).count();
                let nearest = (at..=last).min_by_key(far).unwrap_or(at);
                bail!(
                    "{user}, state {nth}: not one that Postgres had from its commit {at} to the last, {last}; from commit \
                     {nearest} differ:{}\nstates: {:#?}{}",
                    differences(&view(nearest), &fresh(nearest)),
                    all.iter().map(|shown| &shown.at).collect::<Vec<_>>(),
                    self.commits(at)
                );
            };
            at = found;
        }
        self.ends(user, &all.last().context("nothing was shown")?.view)
    }

    /// Whether a client ended where Postgres did.
    pub fn ends(&self, user: &str, shown: &View) -> Result<()> {
        let last = self.last(user);
        let last_commits = self.states.len().saturating_sub(15);
        ensure!(
            *shown == last,
            "{user} does not end where Postgres does:{}{}",
            differences(&last, shown),
            self.commits(last_commits)
        );
        Ok(())
    }
}
