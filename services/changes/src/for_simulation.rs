//! A batch's decisions without a database: ledger, plan, predecessors and origin are those that the executor uses; what
//! becomes of a change that is to be applied, the caller says. For the simulation, where Postgres is a model, and for `fuzz`.

use std::collections::HashSet;

use millstream_catalog::Table;
use millstream_schemas::Code;
use millstream_schemas::stream::{Failure, OriginEntry, RunSpan, Submission, ValidateRequest};
use uuid::Uuid;

use crate::decide::ledger::{Ledger, LedgerEntry};
use crate::decide::origin::origin;
use crate::decide::plan::{Condemned, Rejected, plan, predecessors};
use crate::decide::validator::{self, Rejection};
use crate::error::Refusal;
use crate::worker::external;

/// A client's row in the ledger.
#[derive(Clone, Debug)]
pub struct LedgerRow {
    /// The installation.
    pub client_id: Uuid,
    /// The user that it is bound to.
    pub user_id: String,
    /// Last `client_seq` taken.
    pub last_seq: u64,
    /// Which run of the store submitted it.
    pub run_id: Option<Uuid>,
}

/// What became of a transaction.
#[derive(Clone, Debug)]
pub enum Effect {
    /// It took effect, but for the changes with these indexes: they lost to newer ones, as a whole or in part.
    Applied(Vec<(usize, bool)>),
    /// The change with this index cannot be applied.
    Refused(usize, Code, &'static str),
}

/// What is to be stored with the batch's rows.
#[derive(Debug, Default)]
pub struct Settled {
    /// Ledger rows that moved.
    pub clients: Vec<LedgerRow>,
    /// Runs that began.
    pub spans: Vec<(Uuid, RunSpan)>,
    /// What the stream tells of it.
    pub origin: Vec<OriginEntry>,
}

/// Decides for each submission in order; `rejected` tells of transactions of earlier batches, `apply` applies one whole
/// or not at all.
pub fn settle(
    known: impl IntoIterator<Item = LedgerRow>,
    tables: &[Table],
    submissions: &[Submission],
    rejected: impl Fn(Uuid, u64) -> bool,
    mut apply: impl FnMut(&Submission) -> Effect,
) -> Settled {
    let mut ledger = Ledger::default();
    for LedgerRow { client_id, user_id, last_seq, run_id } in known {
        ledger.load(client_id, LedgerEntry::stored(user_id, last_seq, run_id));
    }
    let named = predecessors(submissions.iter(), &ledger);
    let mut refused =
        Rejected(HashSet::from_iter(named.into_iter().filter(|(client, client_seq)| rejected(*client, *client_seq))));
    let find = |name: &str| tables.iter().find(|table| table.name == name);
    let mut plan = plan(submissions.iter(), &mut ledger, find, &Condemned::new(), &mut refused);
    for planned in &mut plan {
        if planned.steps().is_empty() {
            continue;
        }
        if let Some(refusal) = refused.refuse(planned.submission) {
            planned.reject(0, refusal);
            refused.add(planned);
            continue;
        }
        match apply(planned.submission) {
            Effect::Applied(lost) => {
                lost.into_iter().for_each(|(index, whole)| planned.lose(index, whole, String::new()));
            }
            Effect::Refused(index, code, message) => {
                planned.reject(index, Refusal::new(code, message));
                refused.add(planned);
            }
        }
    }
    let clients = ledger.changed().map(|(client_id, client)| LedgerRow {
        client_id,
        user_id: client.user_id.clone(),
        last_seq: client.last,
        run_id: client.run_id,
    });
    Settled { clients: clients.collect(), spans: ledger.spans().to_vec(), origin: origin(&plan, &ledger) }
}

/// What needs no database to be said of a transaction: how many changes are left to be applied.
///
/// # Errors
/// The index of a change that cannot be applied, and why.
pub fn validate(tables: &[Table], submission: &Submission) -> Result<usize, (usize, Failure)> {
    let find = |name: &str| tables.iter().find(|table| table.name == name);
    validator::validate(find, submission).map(|steps| steps.len()).map_err(|why| failure(submission, why))
}

/// What an external validator's answer means for the transaction that it was asked about: with `Some`, it is rejected.
///
/// # Errors
/// It is no verdict.
pub fn answer(
    payload: &[u8],
    request: &ValidateRequest,
    submission: &Submission,
) -> Result<Option<(usize, Failure)>, String> {
    external::answer(payload, request, submission).map(|no| no.map(|why| failure(submission, why)))
}

fn failure(submission: &Submission, why: Rejection) -> (usize, Failure) {
    let Rejection { index, change_id, code, rule, message } = why;
    (index, Failure { client_seq: submission.client_seq, change_id, code, rule, message })
}
