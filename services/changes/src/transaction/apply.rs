//! Applies what the plan says, within the transaction at hand: set-wise, or change by change.
//!
//! Set-wise, a group of changes of one shape is one statement, and groups that do not depend on each other are one round
//! trip: statements of a `WITH` see one snapshot and none of each other's effects, so independence is all that they need.
//!
//! Set-wise, a change that is refused without an effect (its row was not written) leaves the others as if it had not been
//! there, so the batch goes on without it. What cannot be undone so (a transaction of several changes, of which one is
//! refused) sends the batch back, to be cut there. An error of Postgres ends the transaction; with more care, each
//! statement has a savepoint and is halved until the change at fault is alone.

use std::cell::Cell;
use std::sync::Arc;

use millstream_schemas::clock::MAX_AHEAD_MICROS;
use millstream_schemas::{Clock, Code, Merge, Operation};
use sqlx::{AssertSqlSafe, PgConnection, Row};

use crate::decide::plan::{Action, Planned, Rejected};
use crate::decide::validator::CheckedChange;
use crate::error::{Fault, Refusal, classify, is_duplicate, is_out_of_time, may_be_a_value, null_of_domain};
use crate::item::MAX_SAVEPOINTS;
use crate::sql::combined::Combined;
use crate::sql::group::{Group, Groups, Place};
use crate::sql::statement::{InputRow, Statement, Statements, bind};
use crate::transaction::explain::{self, Outcome};
use crate::transaction::failed::Failed;
use crate::transaction::suspects::suspects;

/// Most rows that are left out of a statement for what its errors quote.
const MAX_APART: usize = 20;
/// How often a row is tried that is there, may be written and would win, but was not written: somebody else was writing it.
const RACES: usize = 3;

/// A transaction of Postgres in which changes are applied.
pub(crate) struct Applier<'a> {
    connection: &'a mut PgConnection,
    statements: &'a mut Statements,
    combined: &'a mut Combined,
    /// The database's time at the batch's beginning, microseconds since 1970.
    now: u64,
    /// How many stamps were cut to the bound.
    cut: Cell<u64>,
    /// Whom `millstream.user_id` names, and what `millstream.clock` is: see `migrations/0007_side_effects.sql`. None: not known.
    user: Option<String>,
    clock: Option<String>,
    savepoints: usize,
    met_error: bool,
}

impl<'a> Applier<'a> {
    pub fn new(
        connection: &'a mut PgConnection,
        statements: &'a mut Statements,
        combined: &'a mut Combined,
        now: u64,
    ) -> Self {
        Applier {
            connection,
            statements,
            combined,
            now,
            cut: Cell::new(0),
            user: None,
            clock: Some(String::new()),
            savepoints: 0,
            met_error: false,
        }
    }

    /// Whether a statement for several rows has failed and was undone.
    pub fn met_error(&self) -> bool {
        self.met_error
    }

    fn row<'b>(
        &self,
        planned: &Planned<'_>,
        user_id: &'b str,
        index: usize,
        step: &'b CheckedChange<'b>,
    ) -> InputRow<'b> {
        let (client_id, client_seq) = (planned.submission.client_id, planned.submission.client_seq);
        // A client whose clock is ahead must not win for as long as it is. What is cut to the bound keeps its order there.
        let bound = self.now + MAX_AHEAD_MICROS;
        let stamp = if step.stamp > bound {
            self.cut.set(self.cut.get() + 1);
            bound + self.cut.get()
        } else {
            step.stamp
        };
        let clock = Clock { stamp, client_id, client_seq, index: u32::try_from(index).unwrap_or(u32::MAX) };
        InputRow { step, user_id, client_id, clock }
    }

    /// The changes in groups, and whether those are independent.
    pub fn groups<'p>(&mut self, plan: &'p [Planned<'_>]) -> Result<(Vec<Group<'p>>, bool), Failed> {
        let mut groups = Groups::default();
        for (index, planned) in plan.iter().enumerate() {
            for (number, step) in planned.steps().iter().enumerate() {
                if plan.len() > 1 && self.statements.of(step).shape.deferred {
                    return Err(Failed::isolate_at(index, "COMMIT decides about it"));
                }
                let row = self.row(planned, &planned.submission.user_id, number, step);
                groups.add(self.statements, Place { planned: index, step: number }, row);
            }
        }
        let independent = groups.are_independent(self.statements);
        Ok((groups.into_groups(), independent))
    }

    /// Everything in as few statements as there may be; `careful`: with savepoints.
    pub async fn set_wise(
        &mut self,
        plan: &mut [Planned<'_>],
        rejected: &mut Rejected,
        careful: bool,
    ) -> Result<(), Failed> {
        let (mut groups, independent) = self.groups(plan)?;
        let mut outcomes = Vec::new();
        if careful && independent {
            outcomes = self.write_apart(groups).await?;
        } else if let Some(sql) = independent.then(|| self.combined.together(&mut groups)).flatten() {
            let written = self.write_together(&sql, &groups).await.map_err(Failed::of)?;
            outcomes.extend(groups.into_iter().flat_map(|group| group.places).zip(written.into_iter().flatten()));
        } else {
            for group in groups {
                let written = match careful {
                    false => self.write(&group.statement, &group.rows).await.map_err(Failed::of)?,
                    true => self.write_carefully(&group).await?,
                };
                outcomes.extend(group.places.into_iter().zip(written));
            }
        }
        // Where it is cut: nothing before the first that has to be alone depends on it.
        let mut cut = plan.len();
        for (Place { planned, step }, outcome) in outcomes {
            match outcome {
                Outcome::Won => {}
                Outcome::Lost { whole, winner } => plan[planned].lose(step, whole, winner),
                Outcome::Refused(refusal) if plan[planned].submission.changes.len() == 1 => {
                    plan[planned].reject(step, refusal);
                }
                Outcome::Refused(_) | Outcome::Undone(_) => cut = cut.min(planned),
            }
        }
        for (index, planned) in plan.iter_mut().enumerate() {
            match rejected.refuse(planned.submission) {
                Some(_) if !planned.steps().is_empty() => cut = cut.min(index),
                // It was refused for another reason, without effect; but this one comes first.
                Some(refusal) if matches!(planned.action, Action::Reject(_)) => planned.reject(0, refusal),
                _ => {}
            }
            rejected.add(planned);
        }
        if cut < plan.len() {
            return Err(Failed::isolate_at(cut, "it is refused and others took effect with it"));
        }
        Ok(())
    }

    /// Independent groups, at once in a savepoint. Rows that an error of Postgres seems to be about are left out and come
    /// last, each alone, where the order of their group does not matter; groups of which it names no row are halved.
    async fn write_apart(&mut self, mut groups: Vec<Group<'_>>) -> Result<Vec<(Place, Outcome)>, Failed> {
        let mut apart = Vec::new();
        let mut outcomes = Vec::new();
        if groups.len() > 1 {
            self.savepoint(0).await?;
        }
        while let Some(sql) = self.combined.together(&mut groups) {
            let error = match self.write_together(&sql, &groups).await {
                Ok(written) => {
                    let places = groups.drain(..).flat_map(|group| group.places);
                    outcomes.extend(places.zip(written.into_iter().flatten()));
                    break;
                }
                Err(error) => error,
            };
            if ends_batch(&error) {
                return Err(Failed::of(error));
            }
            self.met_error = true;
            self.raw("ROLLBACK TO SAVEPOINT statement").await?;
            let before = apart.len();
            for group in groups.iter_mut().filter(|group| group.statement.shape.is_unordered()) {
                for index in suspects(&group.rows, &error).into_iter().rev() {
                    apart.push(group.cut(index));
                }
            }
            groups.retain(|group| !group.rows.is_empty());
            if apart.len() == before || apart.len() > MAX_APART {
                break;
            }
        }
        // In the order of the batch: they may be in each other's way.
        apart.sort_by_key(|group| group.places[0]);
        for group in groups.into_iter().chain(apart) {
            let written = self.write_carefully(&group).await?;
            outcomes.extend(group.places.into_iter().zip(written));
        }
        Ok(outcomes)
    }

    /// Begins a savepoint; `at` is the transaction that needs it.
    async fn savepoint(&mut self, at: usize) -> Result<(), Failed> {
        self.savepoints += 1;
        if self.savepoints > MAX_SAVEPOINTS {
            return Err(Failed::isolate_at(at, "too many savepoints"));
        }
        self.raw("SAVEPOINT statement").await
    }

    /// A group, taken apart in savepoints where it fails: at the row that the error is about, else in the middle.
    async fn write_carefully(&mut self, group: &Group<'_>) -> Result<Vec<Outcome>, Failed> {
        let mut outcomes = Vec::with_capacity(group.rows.len());
        let mut waiting: Vec<_> = std::iter::once(0..group.rows.len()).collect();
        while let Some(range) = waiting.pop() {
            let at = group.places[range.start].planned;
            self.savepoint(at).await?;
            let rows = &group.rows[range.clone()];
            match self.write(&group.statement, rows).await {
                Ok(written) => {
                    self.raw("RELEASE SAVEPOINT statement").await?;
                    outcomes.extend(written);
                    continue;
                }
                Err(error) => {
                    if ends_batch(&error) {
                        return Err(Failed::of(error));
                    }
                    self.met_error = true;
                    self.raw("ROLLBACK TO SAVEPOINT statement").await?;
                    self.forget();
                    match rows {
                        [row] => {
                            let mut error = error;
                            if is_duplicate(&error, &group.statement.shape.primary_keys) {
                                error = match self.merge(row, error).await {
                                    Ok(outcome) => {
                                        self.raw("RELEASE SAVEPOINT statement").await?;
                                        outcomes.push(outcome);
                                        continue;
                                    }
                                    Err(error) if ends_batch(&error) => return Err(Failed::of(error)),
                                    Err(error) => error,
                                };
                                self.raw("ROLLBACK TO SAVEPOINT statement").await?;
                                self.forget();
                            }
                            let Some(refusal) = self.refusal(&group.statement, row, false, &error).await? else {
                                return Err(Failed::isolate_at(at, &error.to_string()));
                            };
                            self.raw("ROLLBACK TO SAVEPOINT statement; RELEASE SAVEPOINT statement").await?;
                            outcomes.push(Outcome::Refused(refusal));
                        }
                        _ => {
                            let suspects = suspects(rows, &error);
                            let (one, next) = match suspects.first() {
                                Some(first) => (range.start + first, range.start + first + 1),
                                None => (range.start + rows.len() / 2, range.start + rows.len() / 2),
                            };
                            let parts = [next..range.end, one..next, range.start..one];
                            waiting.extend(parts.into_iter().filter(|part| !part.is_empty()));
                            self.raw("RELEASE SAVEPOINT statement").await?;
                        }
                    }
                }
            }
        }
        Ok(outcomes)
    }

    /// One change at a time, each transaction in a savepoint; what fails becomes a rejection.
    pub async fn one_by_one(&mut self, plan: &mut [Planned<'_>], rejected: &mut Rejected) -> Result<(), Failed> {
        for planned in plan {
            if planned.steps().is_empty() {
                continue;
            }
            if let Some(refusal) = rejected.refuse(planned.submission) {
                planned.reject(0, refusal);
                rejected.add(planned);
                continue;
            }
            self.raw("SAVEPOINT change").await?;
            let mut losses = Vec::new();
            let mut refused = None;
            // Anew, once it turns out that a row is there already.
            let mut merges = false;
            let mut index = 0;
            while let Some(step) = planned.steps().get(index) {
                match self.apply_one(planned, index, step, &mut merges).await? {
                    Some(Outcome::Won) => {}
                    Some(Outcome::Lost { whole, winner }) => losses.push((index, whole, winner)),
                    Some(Outcome::Refused(refusal) | Outcome::Undone(refusal))
                        if self.was_taken(&planned.steps()[..index], step, &refusal) => {}
                    Some(Outcome::Refused(refusal) | Outcome::Undone(refusal)) => {
                        refused = Some((index, refusal));
                        break;
                    }
                    None => {
                        losses.clear();
                        index = 0;
                        continue;
                    }
                }
                index += 1;
            }
            match refused {
                None => {
                    self.raw("RELEASE SAVEPOINT change").await?;
                    losses.into_iter().for_each(|(index, whole, winner)| planned.lose(index, whole, winner));
                }
                Some((index, refusal)) => {
                    self.raw("ROLLBACK TO SAVEPOINT change; RELEASE SAVEPOINT change").await?;
                    self.forget();
                    planned.reject(index, refusal);
                    rejected.add(planned);
                }
            }
        }
        Ok(())
    }

    /// Whether a delete is refused for a row that is gone with what the same transaction deleted `earlier`, by whichever foreign keys:
    /// clients know some of them.
    fn was_taken(&mut self, earlier: &[CheckedChange<'_>], step: &CheckedChange<'_>, refusal: &Refusal) -> bool {
        if step.op != Operation::Delete || refusal.code != Code::EntityMissing {
            return false;
        }
        let own = self.statements.of(step);
        earlier.iter().any(|earlier| self.statements.of(earlier).shape.takes_from(&own.shape))
    }

    /// Gives none when the step inserts a row that exists already: this method has then set `merges`, and the caller applies the
    /// transaction from its first step again.
    async fn apply_one(
        &mut self,
        planned: &Planned<'_>,
        index: usize,
        step: &CheckedChange<'_>,
        merges: &mut bool,
    ) -> Result<Option<Outcome>, Failed> {
        let statement = self.statements.of(step);
        let row = self.row(planned, &planned.submission.user_id, index, step);
        let may_merge = *merges && !statement.shape.primary_keys.is_empty();
        if may_merge {
            self.raw("SAVEPOINT step").await?;
        }
        let mut error = match self.write(&statement, &[row]).await {
            Ok(mut outcomes) => {
                if may_merge {
                    self.raw("RELEASE SAVEPOINT step").await?;
                }
                return Ok(Some(outcomes.pop().unwrap_or(Outcome::Won)));
            }
            Err(error) => error,
        };
        if may_merge && is_duplicate(&error, &statement.shape.primary_keys) {
            self.raw("ROLLBACK TO SAVEPOINT step; RELEASE SAVEPOINT step").await?;
            self.forget();
            error = match self.merge(&row, error).await {
                Ok(outcome) => return Ok(Some(outcome)),
                Err(error) => error,
            };
        }
        let strike = |error| Failed::Strike(planned.submission.client_id, planned.submission.client_seq, error);
        match classify(&error) {
            Fault::Server => return Err(Failed::at_work(error)),
            Fault::Gone => return Err(strike(error)),
            Fault::Verdict(_) | Fault::Unknown => {}
        }
        self.raw("ROLLBACK TO SAVEPOINT change").await?;
        self.forget();
        if !*merges && is_duplicate(&error, &statement.shape.primary_keys) {
            *merges = true;
            return Ok(None);
        }
        let is_same = |earlier: &CheckedChange<'_>| earlier.table.oid == step.table.oid && earlier.key == step.key;
        let undone = planned.steps()[..index].iter().any(|earlier| earlier.op == Operation::Insert && is_same(earlier));
        let refusal = self.refusal(&statement, &row, undone, &error).await?;
        refusal.map(|refusal| Some(Outcome::Refused(refusal))).ok_or_else(|| strike(error))
    }

    /// An insert that failed with this error, since the row is there already, and has been undone: it sets its columns in that row, as
    /// an update would. Where its author may not do that, or the row is gone by now, the error stands.
    async fn merge(&mut self, row: &InputRow<'_>, error: sqlx::Error) -> Result<Outcome, sqlx::Error> {
        let insert = row.step;
        let is_sum = |index: usize| insert.table.columns[index].merge == Some(Merge::Add);
        // What a sum begins with is no amount.
        let says = |index: usize, value: Option<&str>| {
            let default = insert.table.columns[index].default.as_deref();
            !(insert.table.key.contains(&index) || is_sum(index) && value == default)
        };
        let set = insert.columns.iter().zip(&insert.values).filter(|(index, value)| says(**index, **value));
        let (columns, values): (Vec<_>, Vec<_>) = set.map(|(index, value)| (*index, *value)).unzip();
        if columns.is_empty() {
            // It says no more than that the row is there.
            return Ok(Outcome::Won);
        }
        if insert.table.write.update.is_none() {
            return Err(error);
        }
        let adds = columns.iter().zip(&values).filter(|(index, value)| value.is_some() && is_sum(**index));
        let adds = adds.map(|(index, _)| *index).collect();
        let update = CheckedChange { op: Operation::Update, columns, values, adds, ..insert.clone() };
        let statement = self.statements.of(&update);
        match self.write(&statement, &[InputRow { step: &update, ..*row }]).await?.pop() {
            Some(Outcome::Refused(Refusal { code: Code::PermissionDenied | Code::EntityMissing, .. })) | None => {
                Err(error)
            }
            Some(outcome) => Ok(outcome),
        }
    }

    /// What the one change is refused for whose statement failed; none if nobody knows. `undone`: its own transaction made the
    /// row, and has been rolled back. May leave the transaction failed, within the savepoint.
    async fn refusal(
        &mut self,
        statement: &Statement,
        row: &InputRow<'_>,
        undone: bool,
        error: &sqlx::Error,
    ) -> Result<Option<Refusal>, Failed> {
        let known = match classify(error) {
            Fault::Verdict(refusal) => Some(refusal),
            Fault::Server | Fault::Gone | Fault::Unknown => None,
        };
        if let Some((schema, domain)) = null_of_domain(error) {
            let found = explain::null_at_fault(self.connection, row.step, schema, domain).await;
            return Ok(found.map_err(Failed::Server)?.or(known));
        }
        if !may_be_a_value(error) {
            return Ok(known);
        }
        let found = explain::value_at_fault(self.connection, statement, row, undone).await.map_err(Failed::Server)?;
        Ok(found.or(known))
    }

    /// Executes the statements of groups as one, and tells what became of each group's rows.
    async fn write_together(&mut self, sql: &Arc<str>, groups: &[Group<'_>]) -> Result<Vec<Vec<Outcome>>, sqlx::Error> {
        let mut query = sqlx::query(AssertSqlSafe(sql.clone()));
        for group in groups {
            query = bind(query, group.statement.shape.op, &group.rows);
        }
        let mut written: Vec<(Vec<Option<Outcome>>, u64)> =
            groups.iter().map(|group| (vec![None; group.rows.len()], 0)).collect();
        for row in query.fetch_all(&mut *self.connection).await? {
            let (place, number): (i32, i64) = (row.try_get("ms_place")?, row.try_get("ms_i")?);
            let Some(((outcomes, inserted), group)) =
                usize::try_from(place).ok().and_then(|place| written.get_mut(place).zip(groups.get(place)))
            else {
                continue;
            };
            match group.statement.shape.op {
                Operation::Insert => *inserted = number as u64,
                Operation::Update | Operation::Delete => {
                    let outcome = usize::try_from(number - 1).ok().and_then(|place| outcomes.get_mut(place));
                    if let Some(outcome) = outcome {
                        *outcome = Some(won(row.try_get("winner")?));
                    }
                }
            }
        }
        let mut all = Vec::with_capacity(groups.len());
        for (group, (outcomes, inserted)) in groups.iter().zip(written) {
            all.push(self.complete(&group.statement, &group.rows, outcomes, Some(inserted)).await?);
        }
        Ok(all)
    }

    /// Executes a statement for some rows and tells what became of each.
    async fn write(&mut self, statement: &Statement, rows: &[InputRow<'_>]) -> Result<Vec<Outcome>, sqlx::Error> {
        let Some(first) = rows.first() else { return Ok(Vec::new()) };
        let clock = if statement.shape.cause { first.clock.to_string() } else { String::new() };
        let mut set = Vec::new();
        if statement.shape.personal && self.user.as_deref() != Some(first.user_id) {
            set.push(("millstream.user_id", first.user_id));
            if let Some(sql) = &self.statements.settings_sql {
                let sql = AssertSqlSafe(sql.clone());
                sqlx::query(sql).bind(first.user_id).execute(&mut *self.connection).await?;
            }
        }
        if self.clock.as_deref() != Some(clock.as_str()) {
            set.push(("millstream.clock", clock.as_str()));
        }
        if !set.is_empty() {
            let (names, values): (Vec<&str>, Vec<&str>) = set.into_iter().unzip();
            let set = "SELECT set_config(name, value, true) FROM unnest($1::text[], $2::text[]) AS s(name, value)";
            sqlx::query(set).bind(names).bind(values).execute(&mut *self.connection).await?;
            self.clock = Some(clock);
            if statement.shape.personal {
                self.user = Some(first.user_id.to_owned());
            }
        }
        self.complete(statement, rows, vec![None; rows.len()], None).await
    }

    /// Goes on where some outcomes are known; `sent`: the statement has been executed, and has inserted so many rows.
    async fn complete(
        &mut self,
        statement: &Statement,
        rows: &[InputRow<'_>],
        mut outcomes: Vec<Option<Outcome>>,
        mut sent: Option<u64>,
    ) -> Result<Vec<Outcome>, sqlx::Error> {
        let mut hidden = vec![false; rows.len()];
        let mut versions = vec![None; rows.len()];
        let mut left_out = vec![false; rows.len()];
        for _ in 0..RACES {
            let waiting: Vec<usize> = (0..rows.len()).filter(|index| outcomes[*index].is_none()).collect();
            if waiting.is_empty() {
                break;
            }
            let inserted = match sent.take() {
                Some(inserted) => inserted,
                None => self.send(statement, rows, &waiting, &mut outcomes, &mut versions).await?,
            };
            if inserted == waiting.len() as u64 {
                waiting.iter().for_each(|index| outcomes[*index] = Some(Outcome::Won));
            }
            let unexplained: Vec<usize> = waiting.into_iter().filter(|index| outcomes[*index].is_none()).collect();
            if unexplained.is_empty() {
                break;
            }
            let asked: Vec<InputRow<'_>> = unexplained.iter().map(|index| rows[*index]).collect();
            let query = sqlx::query(AssertSqlSafe(statement.explain_sql.clone()));
            let query = bind(query, statement.shape.op, &asked);
            let explained = explain::outcomes(query, self.connection, statement, asked[0].step.table).await?;
            unexplained.iter().zip(&explained).for_each(|(index, explained)| hidden[*index] = explained.hidden);
            // A trigger wrote the row instead of its delete.
            let replaced = |index: usize, now: &Option<String>| {
                now.is_some() && versions[index].is_some() && versions[index] != *now
            };
            let mut explained: Vec<_> = unexplained
                .iter()
                .zip(explained)
                .map(|(index, found)| match found.outcome {
                    _ if replaced(*index, &found.version) => Some(Outcome::Won),
                    Some(Outcome::Refused(Refusal { code: Code::EntityMissing, .. })) if rows[*index].step.gone => {
                        Some(Outcome::Won)
                    }
                    outcome => outcome,
                })
                .collect();
            // An insert does not tell which rows it made: those that nothing speaks against, if their number is right.
            if inserted > 0 {
                if explained.iter().filter(|outcome| outcome.is_none()).count() as u64 != inserted {
                    break;
                }
                explained.iter_mut().for_each(|outcome| *outcome = outcome.take().or(Some(Outcome::Won)));
            }
            for (place, outcome) in unexplained.into_iter().zip(explained) {
                left_out[place] |= outcome.is_none();
                outcomes[place] = outcome;
            }
        }
        let (table, op) = (rows[0].step.table, statement.shape.op);
        // Row security refuses inserts by an error.
        let hides = statement.row_security && op != Operation::Insert;
        let outcomes = outcomes.into_iter().zip(hidden).map(|(outcome, hidden)| match outcome {
            Some(outcome) => Ok(outcome),
            None if hides && hidden => Ok(explain::missing(op, table)),
            None if hides => Ok(Outcome::Refused(Refusal::new(
                Code::PermissionDenied,
                format!("row security does not let them {} {}", op.as_str(), table.name),
            ))),
            None if statement.shape.cause => Ok(explain::left_out(op, table)),
            None => Err(sqlx::Error::Protocol("a row is neither written nor refused".into())),
        });
        let undone = |(outcome, left_out): (Result<Outcome, sqlx::Error>, bool)| match outcome {
            Ok(Outcome::Refused(refusal)) if left_out && statement.shape.cause => Ok(Outcome::Undone(refusal)),
            outcome => outcome,
        };
        outcomes.zip(left_out).map(undone).collect()
    }

    /// Executes a statement for those rows that wait; gives how many it inserted. `versions`: of rows as they were before a delete
    /// that left them.
    async fn send(
        &mut self,
        statement: &Statement,
        rows: &[InputRow<'_>],
        waiting: &[usize],
        outcomes: &mut [Option<Outcome>],
        versions: &mut [Option<String>],
    ) -> Result<u64, sqlx::Error> {
        let tried: Vec<InputRow<'_>> = waiting.iter().map(|index| rows[*index]).collect();
        let query = bind(sqlx::query(AssertSqlSafe(statement.sql.clone())), statement.shape.op, &tried);
        if statement.shape.op == Operation::Insert {
            return Ok(query.execute(&mut *self.connection).await?.rows_affected());
        }
        for row in query.fetch_all(&mut *self.connection).await? {
            let number: i64 = row.try_get("ms_i")?;
            let place = usize::try_from(number - 1).ok().and_then(|place| waiting.get(place).copied());
            let Some(place) = place else { continue };
            if statement.watched && !row.try_get("written")? {
                versions[place] = row.try_get("version")?;
            } else {
                outcomes[place] = Some(won(row.try_get("winner")?));
            }
        }
        Ok(0)
    }

    /// A savepoint was rolled back to, and settings with it.
    fn forget(&mut self) {
        (self.user, self.clock) = (None, None);
    }

    async fn raw(&mut self, sql: &'static str) -> Result<(), Failed> {
        sqlx::raw_sql(sql).execute(&mut *self.connection).await.map(drop).map_err(Failed::Server)
    }
}

/// What became of a row that was written: all of it won, or some columns lost to this clock.
fn won(winner: Option<String>) -> Outcome {
    winner.map_or(Outcome::Won, |winner| Outcome::Lost { whole: false, winner })
}

/// Whether an error of a statement has the transactions of the batch tried one by one, or later: looking for the change at
/// fault would meet it again. A statement that ran out of time is one of them.
fn ends_batch(error: &sqlx::Error) -> bool {
    matches!(classify(error), Fault::Server | Fault::Gone) || is_out_of_time(error)
}
