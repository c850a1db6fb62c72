//! What Postgres had: each state in the order of commits, and what a user may see of it.

use std::collections::BTreeSet;

use anyhow::{Context, Result, bail, ensure};
use sqlx::{AssertSqlSafe, PgConnection, Row as _};

use super::schema::{Belongs, MEMBERSHIPS, Schema};

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
    /// All rows, from one commit to the next.
    states: Vec<View>,
    /// What each commit did, for people.
    commits: Vec<String>,
    /// Commits that emptied a table with TRUNCATE.
    truncations: Vec<(usize, usize)>,
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

/// What differs, for people.
fn differences(wanted: &View, shown: &View) -> String {
    let missing = wanted.difference(shown).map(|row| format!("\nmissing: {row:?}"));
    missing.chain(shown.difference(wanted).map(|row| format!("\nextra: {row:?}"))).collect()
}

/// Last entry of the log.
pub async fn now(postgres: &mut PgConnection) -> Result<i64> {
    Ok(sqlx::query_scalar("SELECT coalesce(max(n), 0) FROM log").fetch_one(postgres).await?)
}

/// Every row that there is.
pub async fn read(postgres: &mut PgConnection, schema: &Schema) -> Result<View> {
    let mut rows = View::new();
    for (table, (name, columns)) in schema.columns().iter().enumerate() {
        let columns: Vec<String> = columns.iter().map(|(name, _)| format!("{name}::text")).collect();
        let sql = format!("SELECT ARRAY[{}] FROM {name}", columns.join(", "));
        for row in sqlx::query(AssertSqlSafe(sql)).fetch_all(&mut *postgres).await? {
            rows.insert((table, row.get(0)));
        }
    }
    Ok(rows)
}

impl Truth {
    /// From the rows that there were at entry `since` of the log, and the log behind it.
    pub async fn read(postgres: &mut PgConnection, schema: &Schema, mut rows: View, since: i64) -> Result<Truth> {
        let tables = schema.columns();
        let log = sqlx::query("SELECT xid::text, tbl, old::text, new::text FROM log WHERE n > $1 ORDER BY n")
            .bind(since)
            .fetch_all(postgres)
            .await?;
        let (mut states, mut commits, mut truncations) = (vec![rows.clone()], vec![String::new()], Vec::new());
        for (index, entry) in log.iter().enumerate() {
            let [xid, name] = [0, 1].map(|place| entry.get::<&str, _>(place));
            let [old, new] = [2, 3].map(|place| entry.get::<Option<&str>, _>(place));
            let table = tables.iter().position(|(other, _)| other == name).context("a table")?;
            let row = |text: &str| -> Result<(usize, Row)> {
                let object: serde_json::Value = serde_json::from_str(text)?;
                let value = |(name, _): &(String, bool)| object[name].as_str().map(str::to_owned);
                Ok((table, tables[table].1.iter().map(value).collect()))
            };
            let text = format!("\n  {name}: {} -> {}", old.unwrap_or("-"), new.unwrap_or("-"));
            commits.last_mut().context("a commit")?.push_str(&text);
            if old.is_none() && new.is_none() {
                rows.retain(|row| row.0 != table);
                truncations.push((states.len(), table));
            }
            if let Some(old) = old {
                ensure!(rows.remove(&row(old)?), "the log is out of order: there is no {old}");
            }
            if let Some(new) = new {
                rows.insert(row(new)?);
            }
            if log.get(index + 1).is_none_or(|next| next.get::<&str, _>(0) != xid) {
                states.push(rows.clone());
                commits.push(String::new());
            }
        }
        Ok(Truth { schema: schema.clone(), states, commits, truncations })
    }

    /// What a user was a member of after a commit.
    fn memberships(&self, commit: usize, user: &str) -> Memberships<'_> {
        let rows = |table: usize| self.states[commit].iter().filter(move |row| row.0 == table).map(|(_, row)| row);
        let granted = |table: usize| {
            let counts = |row: &&Row| row[1].as_deref() == Some(user) && row[2].as_deref() != Some("guest");
            rows(table).filter(counts).filter_map(|row| row[0].as_deref())
        };
        let teams: BTreeSet<&str> = granted(1).collect();
        let through = rows(2).filter(|row| row[1].as_deref().is_some_and(|team| teams.contains(team)));
        let projects = granted(0).chain(through.filter_map(|row| row[0].as_deref())).collect();
        Memberships { projects, teams }
    }

    /// The rows of a state that a user with these memberships sees, as the configuration says it.
    fn view(&self, commit: usize, user: &str, memberships: &Memberships<'_>) -> View {
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
        self.states[commit].iter().filter(seen).cloned().collect()
    }

    /// What was committed behind a state, for people.
    fn commits(&self, from: usize) -> String {
        (from..self.states.len() - 1).map(|n| format!("\ncommit {}:{}", n + 1, self.commits[n])).collect()
    }

    /// What a user may see in the end.
    pub fn last(&self, user: &str) -> View {
        let last = self.states.len() - 1;
        self.view(last, user, &self.memberships(last, user))
    }

    /// Whether what a client showed, in this order, are states of its user's rows, in this order, up to the last one.
    ///
    /// Memberships are read when a commit that moves them is delivered, and so may be those of a later one: whoever left a
    /// project and is back by then never lost it. A client that catches up with more than an edge remembers shows at first the scopes
    /// that it held where it stood, or held then, and holds later: lost ones are gone at once, new ones come at the end. And a snapshot may miss the rows of a table that is truncated while it is
    /// read (PostgreSQL documentation, "TRUNCATE": it is not MVCC-safe); the truncation follows in the stream.
    pub fn check(&self, user: &str, all: &[Shown]) -> Result<()> {
        let (mut at, last) = (0, self.states.len() - 1);
        for (nth, Shown { view: shown, .. }) in all.iter().enumerate() {
            let is = |commit: &usize| {
                let read: BTreeSet<_> = (*commit..=last).map(|later| self.memberships(later, user)).collect();
                let then = self.memberships(*commit, user);
                let stood = self.memberships(at, user);
                let both: BTreeSet<_> = read.iter().flat_map(|later| [then.and(later), stood.and(later)]).collect();
                let views = read.union(&both).map(|memberships| self.view(*commit, user, memberships));
                let emptied: BTreeSet<usize> =
                    self.truncations.iter().filter(|(at, _)| at > commit).map(|(_, table)| *table).collect();
                let lacks = |view: View| {
                    view.difference(shown).all(|(table, _)| emptied.contains(table)) && shown.is_subset(&view)
                };
                views.into_iter().any(lacks)
            };
            let Some(found) = (at..=last).find(is) else {
                let view = |commit| self.view(commit, user, &self.memberships(commit, user));
                let far = |commit: &usize| view(*commit).symmetric_difference(shown).count();
                let nearest = (at..=last).min_by_key(far).unwrap_or(at);
                bail!(
                    "{user}, state {nth}: not one that Postgres had from its commit {at} to the last, {last}; from commit \
                     {nearest} differ:{}\nstates: {:#?}{}",
                    differences(&view(nearest), shown),
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
