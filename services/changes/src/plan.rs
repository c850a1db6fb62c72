//! What is to be done with each submission of a batch, before the database is asked to do it. Pure.

use std::collections::HashMap;

use millstream_catalog::Table;
use millstream_schemas::Code;
use millstream_schemas::stream::{Failure, Submission, TransactionResult, Verdict};
use uuid::Uuid;

use crate::ledger::{Decision, Ledger};
use crate::validator::{self, Rejection, Step};

/// Rejections that are already certain, by client and `client_seq`: of transactions that failed at COMMIT or kept
/// failing in ways nobody understands.
pub(crate) type Condemned = HashMap<(Uuid, u64), Rejection>;

/// One submission's way.
#[derive(Debug)]
pub(crate) enum Action<'a> {
    /// Apply these steps.
    Apply(Vec<Step<'a>>),
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
}

impl Planned<'_> {
    /// The result, once the action is committed; none for what was not taken by this batch.
    pub fn result(&self) -> Option<TransactionResult> {
        let seq = self.submission.seq;
        match &self.action {
            Action::Apply(_) => Some(TransactionResult { seq, verdict: Verdict::Applied, failure: None }),
            Action::Reject(rejection) => Some(TransactionResult {
                seq,
                verdict: Verdict::Rejected,
                failure: Some(Failure {
                    seq,
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

/// Decides for each submission in order; `find` gives the synced table of a name.
pub(crate) fn plan<'a>(
    submissions: impl Iterator<Item = &'a Submission>,
    ledger: &mut Ledger,
    find: impl Fn(&str) -> Option<&'a Table>,
    condemned: &Condemned,
) -> Vec<Planned<'a>> {
    submissions
        .map(|submission| {
            let (client, seq) = (submission.client_id, submission.seq);
            // Postgres cannot store such a user id, so the ledger could not be written either.
            if submission.user_id.contains('\0') {
                tracing::warn!(client.id = %client, client.seq = seq, "skipped: the user id contains U+0000");
                return Planned { submission, action: Action::Skip };
            }
            let action = match ledger.decide(client, &submission.user_id, submission.instance, seq) {
                Decision::Take => match condemned.get(&(client, seq)) {
                    Some(rejection) => Action::Reject(rejection.clone()),
                    None => match validator::validate(&find, submission) {
                        Ok(steps) => Action::Apply(steps),
                        Err(rejection) => Action::Reject(rejection),
                    },
                },
                Decision::Duplicate => Action::Repeat,
                Decision::Gap => {
                    tracing::debug!(client.id = %client, client.seq = seq, "skipped: an earlier one is missing");
                    Action::Skip
                }
                Decision::Foreign => {
                    // Neither recorded nor published: both would reach the client's rightful user.
                    tracing::warn!(client.id = %client, client.seq = seq, code = %Code::IdentityMismatch, "refused: the client belongs to another user");
                    Action::Skip
                }
            };
            Planned { submission, action }
        })
        .collect()
}

/// Whether a rejection may be due to a catalog that is behind the database.
pub(crate) fn depends_on_catalog(plan: &[Planned<'_>]) -> bool {
    plan.iter().any(|planned| {
        matches!(&planned.action, Action::Reject(rejection)
            if matches!(rejection.code, Code::UnknownTable | Code::UnknownColumn | Code::ColumnNotWritable))
    })
}
