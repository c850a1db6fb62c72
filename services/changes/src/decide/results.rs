//! The verdicts of a batch, for the hint that goes back by the broker. It may be lost: only the origin in the WAL settles a change.

use millstream_schemas::stream::{ResultsMessage, TransactionResult};
use uuid::Uuid;

use crate::decide::plan::Planned;

/// Verdicts by client, each client's in the order in which they were reached.
#[derive(Debug, Default)]
pub(crate) struct Results {
    verdicts: Vec<(Uuid, Vec<TransactionResult>)>,
    /// Postgres raised an error on the way, which was undone.
    pub met_error: bool,
}

impl Results {
    /// Adds a verdict.
    pub fn push(&mut self, client_id: Uuid, result: TransactionResult) {
        match self.verdicts.iter_mut().rev().find(|(id, _)| *id == client_id) {
            Some((_, results)) => results.push(result),
            None => self.verdicts.push((client_id, vec![result])),
        }
    }

    /// Adds the verdicts that a batch reached.
    pub fn extend(&mut self, plan: &[Planned<'_>]) {
        for planned in plan {
            if let Some(result) = planned.result() {
                self.push(planned.submission.client_id, result);
            }
        }
    }

    /// One message a client.
    pub fn messages(self) -> impl Iterator<Item = (Uuid, ResultsMessage)> {
        self.verdicts.into_iter().map(|(client_id, mut results)| {
            results.sort_by_key(|result| result.client_seq);
            results.dedup_by_key(|result| result.client_seq);
            (client_id, ResultsMessage { results })
        })
    }
}

impl IntoIterator for Results {
    type Item = (Uuid, TransactionResult);
    type IntoIter = Box<dyn Iterator<Item = Self::Item> + Send>;

    fn into_iter(self) -> Self::IntoIter {
        Box::new(
            self.verdicts.into_iter().flat_map(|(id, results)| results.into_iter().map(move |result| (id, result))),
        )
    }
}
