//! What is to be done with each submission of a batch, before the database is asked to do it. Pure.

use std::collections::{HashMap, HashSet};

use millstream_catalog::{Aside, Table};
use millstream_schemas::Code;
use millstream_schemas::stream::{Failure, Loss, Submission, TransactionResult, Verdict};
use uuid::Uuid;

use crate::decide::ledger::{Decision, Ledger};
use crate::decide::validator::{self, CheckedChange, Rejection};
use crate::error::Refusal;

/// Rejections that are already certain, by client and `client_seq`: of transactions that failed at COMMIT or kept
/// failing in ways nobody understands.
pub(crate) type Condemned = HashMap<(Uuid, u64), Rejection>;

/// One submission's way.
#[derive(Debug)]
pub(crate) enum Action<'a> {
    /// Apply these steps.
    Apply(Vec<CheckedChange<'a>>),
    /// Take it into account without effects.
    Reject(Rejection),
    /// It was taken before: tell the known verdict.
    Repeat,
    /// Not the next of its client, or not its user's.
    Skip,
}

/// A submission and what to do.
#[derive(Debug)]
pub(crate) struct Planned<'a> {
    pub submission: &'a Submission,
    pub action: Action<'a>,
    lost: Vec<Lost>,
}

/// A change that lost to newer ones.
#[derive(Debug)]
struct Lost {
    index: usize,
    /// All of it.
    whole: bool,
    /// The newest clock among those that it lost to.
    winner: String,
}

impl<'a> Planned<'a> {
    fn new(submission: &'a Submission, action: Action<'a>) -> Self {
        Planned { submission, action, lost: Vec::new() }
    }

    /// The steps to apply.
    pub fn steps(&self) -> &[CheckedChange<'a>] {
        if let Action::Apply(steps) = &self.action { steps } else { &[] }
    }

    /// Refuses it for the change `index`.
    pub fn reject(&mut self, index: usize, refusal: Refusal) {
        self.action = Action::Reject(Rejection::new(self.submission, index, refusal));
        self.lost.clear();
    }

    /// The change `index` lost to a newer one, in part or as a `whole`.
    pub fn lose(&mut self, index: usize, whole: bool, winner: String) {
        self.lost.push(Lost { index, whole, winner });
    }

    /// Tells the log of changes that lost, once the action is committed.
    pub fn log_losses(&self) {
        for lost in &self.lost {
            let Some(change) = self.submission.changes.get(lost.index) else { continue };
            tracing::info!(
                client.id = %self.submission.client_id,
                client.seq = self.submission.client_seq,
                change.id = %change.change_id,
                change.stamp = change.stamp,
                winner = lost.winner,
                whole = lost.whole,
                "a change lost to a newer one"
            );
        }
    }

    /// What it lost, once the action is committed.
    pub fn loss(&self) -> Option<Loss> {
        let first = self.lost.iter().map(|lost| lost.index).min()?;
        let wholly = self.lost.iter().filter(|lost| lost.whole).count() == self.submission.changes.len();
        Some(Loss {
            client_seq: self.submission.client_seq,
            verdict: if wholly { Verdict::Superseded } else { Verdict::Merged },
            change_id: self.submission.changes.get(first)?.change_id,
        })
    }

    /// The result, once the action is committed; none for what was not taken by this batch.
    pub fn result(&self) -> Option<TransactionResult> {
        let client_seq = self.submission.client_seq;
        match &self.action {
            Action::Apply(_) => {
                let verdict = self.loss().map_or(Verdict::Applied, |loss| loss.verdict);
                Some(TransactionResult { client_seq, verdict, failure: None })
            }
            Action::Reject(rejection) => Some(TransactionResult {
                client_seq,
                verdict: Verdict::Rejected,
                failure: Some(Failure {
                    client_seq,
                    change_id: rejection.change_id,
                    code: rejection.code,
                    rule: rejection.rule.clone(),
                    message: rejection.message.clone(),
                }),
            }),
            Action::Repeat | Action::Skip => None,
        }
    }
}

/// Transactions that were rejected, by client and `client_seq`: those that what follows may name as predecessors.
#[derive(Debug, Default)]
pub(crate) struct Rejected(pub HashSet<(Uuid, u64)>);

impl Rejected {
    /// Remembers a transaction if it is rejected.
    pub fn add(&mut self, planned: &Planned<'_>) {
        if let Action::Reject(_) = planned.action {
            self.0.insert((planned.submission.client_id, planned.submission.client_seq));
        }
    }

    /// Why a submission cannot be taken after them.
    pub fn refuse(&self, submission: &Submission) -> Option<Refusal> {
        let failed = submission.after.iter().find(|&&client_seq| {
            client_seq < submission.client_seq && self.0.contains(&(submission.client_id, client_seq))
        })?;
        let message = format!("an earlier transaction on the same rows was rejected (client_seq {failed})");
        Some(Refusal::new(Code::PredecessorFailed, message))
    }
}

/// The transactions that submissions name as their predecessors and that earlier batches took.
pub(crate) fn predecessors<'a>(submissions: impl Iterator<Item = &'a Submission>, ledger: &Ledger) -> Vec<(Uuid, u64)> {
    submissions
        .flat_map(|submission| submission.after.iter().map(|client_seq| (submission.client_id, *client_seq)))
        .filter(|(client_id, client_seq)| ledger.is_stored(*client_id, *client_seq))
        .collect()
}

/// Decides for each submission in order; `find` gives the synced table of a name, `rejected` what is known of
/// [`predecessors`].
pub(crate) fn plan<'a>(
    submissions: impl Iterator<Item = &'a Submission>,
    ledger: &mut Ledger,
    find: impl Fn(&str) -> Option<&'a Table>,
    condemned: &Condemned,
    rejected: &mut Rejected,
) -> Vec<Planned<'a>> {
    submissions
        .map(|submission| {
            let (client, client_seq) = (submission.client_id, submission.client_seq);
            // Postgres cannot store such a user id, so the ledger could not be written either.
            if submission.user_id.contains('\0') {
                tracing::warn!(client.id = %client, client.seq = client_seq, "skipped: the user id contains U+0000");
                return Planned::new(submission, Action::Skip);
            }
            let action = match ledger.decide(submission) {
                Decision::Take => match (rejected.refuse(submission), condemned.get(&(client, client_seq))) {
                    (Some(refusal), _) => Action::Reject(Rejection::new(submission, 0, refusal)),
                    // Another copy of the store may have used the number for something else.
                    (None, Some(rejection)) if submission.changes.iter().any(|c| c.change_id == rejection.change_id) => {
                        Action::Reject(rejection.clone())
                    }
                    (None, _) => match validator::validate(&find, submission) {
                        Ok(steps) => Action::Apply(steps),
                        Err(rejection) => Action::Reject(rejection),
                    },
                },
                Decision::Duplicate => Action::Repeat,
                Decision::Gap => {
                    tracing::debug!(client.id = %client, client.seq = client_seq, "skipped: an earlier one is missing");
                    Action::Skip
                }
                Decision::Foreign => {
                    // Neither recorded nor published: both would reach the client's rightful user.
                    tracing::warn!(client.id = %client, client.seq = client_seq, code = %Code::IdentityMismatch, "refused: the client belongs to another user");
                    Action::Skip
                }
                Decision::Fork => {
                    // Not recorded either: it would be told to the copy whose number this is.
                    tracing::warn!(client.id = %client, client.seq = client_seq, "skipped: another copy of the client's store submitted this number");
                    Action::Skip
                }
            };
            let planned = Planned::new(submission, action);
            rejected.add(&planned);
            planned
        })
        .collect()
}

/// Whether a rejection may be due to a catalog that is behind the database: a column was added, or has a wider type.
pub(crate) fn depends_on_catalog(plan: &[Planned<'_>]) -> bool {
    plan.iter().any(|planned| {
        matches!(&planned.action, Action::Reject(rejection)
            if matches!(rejection.code, Code::UnknownTable | Code::UnknownColumn | Code::ColumnNotWritable | Code::InvalidValue))
    })
}

/// Name of the rule by which changes of a table that is set aside are refused.
const SET_ASIDE: &str = "table_set_aside";

/// Refuses changes of tables that are set aside by a rule of that name instead of for good: clients try them again by themselves,
/// then keep them for a person.
pub(crate) fn name_set_aside(plan: &mut [Planned<'_>], asides: &[Aside]) {
    for planned in plan {
        let Action::Reject(rejection) = &mut planned.action else { continue };
        let table = planned.submission.changes.get(rejection.index).map(|change| &change.table);
        if rejection.code == Code::UnknownTable && asides.iter().any(|aside| Some(&aside.table) == table) {
            rejection.code = Code::BusinessRule;
            rejection.rule = Some(SET_ASIDE.to_owned());
            rejection.message += "; it is set aside until it fits its declaration again";
        }
    }
}

#[cfg(test)]
mod tests {
    use millstream_schemas::{Change, Operation};

    use super::*;
    use crate::decide::ledger::LedgerEntry;
    use crate::decide::validator::tests::{change, only, tasks};

    fn submission(client_seq: u64, after: &[u64], title: &str) -> Submission {
        Submission {
            client_id: Uuid::from_u128(1),
            user_id: "u".into(),
            client_seq,
            attempt: 1,
            run_id: Uuid::nil(),
            previous: None,
            after: after.to_vec(),
            changes: vec![change(Operation::Update, "1", &[("title", Some(title))])],
            traceparent: None,
        }
    }

    #[test]
    fn what_follows_a_rejected_transaction_is_refused() {
        let table = tasks();
        // 3 was rejected in an earlier batch; 6 is in this one.
        let submissions = [
            submission(5, &[3], "x"),
            submission(6, &[], "\0"),
            submission(7, &[6], "x"),
            submission(8, &[7], "x"),
            submission(9, &[4], "x"),
        ];
        let mut ledger = Ledger::default();
        ledger.load(Uuid::from_u128(1), LedgerEntry::stored("u".into(), 4, None));
        assert_eq!(
            predecessors(submissions.iter(), &ledger).iter().map(|(_, client_seq)| *client_seq).collect::<Vec<_>>(),
            [3, 4]
        );
        let mut rejected = Rejected([(Uuid::from_u128(1), 3)].into());
        let plan = plan(submissions.iter(), &mut ledger, only(&table), &Condemned::new(), &mut rejected);
        let codes: Vec<_> =
            plan.iter().map(|planned| planned.result().and_then(|result| result.failure).map(|f| f.code)).collect();
        let failed = Some(Code::PredecessorFailed);
        assert_eq!(codes, [failed, Some(Code::InvalidValue), failed, failed, None]);
    }

    #[test]
    fn a_transaction_is_superseded_if_all_of_it_lost() {
        let mut two = submission(1, &[], "x");
        two.changes.push(Change { change_id: Uuid::from_u128(8), ..two.changes[0].clone() });
        let check = |lost: &[(usize, bool)], verdict: Verdict, first: Option<u128>| {
            let mut planned = Planned::new(&two, Action::Apply(Vec::new()));
            lost.iter().for_each(|(index, whole)| planned.lose(*index, *whole, String::new()));
            assert_eq!(planned.result().unwrap().verdict, verdict);
            assert_eq!(planned.loss().map(|loss| loss.change_id.as_u128()), first);
        };
        check(&[], Verdict::Applied, None);
        check(&[(1, true)], Verdict::Merged, Some(8));
        check(&[(1, false), (0, true)], Verdict::Merged, Some(7));
        check(&[(1, true), (0, true)], Verdict::Superseded, Some(7));
    }
}
