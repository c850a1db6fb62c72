//! Verdicts on their way back: a hint on the broker, that may be lost. Only the origin in the WAL settles a change.

use millstream_schemas::stream::{ResultsMessage, TransactionResult};
use millstream_schemas::subject;
use uuid::Uuid;

use crate::decide::plan::Planned;

/// Verdicts by client, each client's in the order in which they were reached.
#[derive(Debug, Default)]
pub(crate) struct Results(Vec<(Uuid, Vec<TransactionResult>)>);

impl Results {
    /// Adds a verdict.
    pub fn push(&mut self, client_id: Uuid, result: TransactionResult) {
        match self.0.iter_mut().rev().find(|(id, _)| *id == client_id) {
            Some((_, results)) => results.push(result),
            None => self.0.push((client_id, vec![result])),
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

    /// Publishes one message a client, without waiting for anything but room in the connection's own queue.
    pub async fn publish(mut self, client: &async_nats::Client) {
        for (client_id, results) in self.0.drain(..) {
            let mut message = ResultsMessage { results };
            message.results.sort_by_key(|result| result.client_seq);
            message.results.dedup_by_key(|result| result.client_seq);
            match serde_json::to_vec(&message) {
                Ok(payload) => {
                    if let Err(error) = client.publish(subject::results(client_id), payload.into()).await {
                        tracing::debug!(%error, "a result was not published; the outbound stream will tell it");
                        return;
                    }
                }
                Err(error) => tracing::error!(%error, "cannot encode results"),
            }
        }
    }
}

impl IntoIterator for Results {
    type Item = (Uuid, TransactionResult);
    type IntoIter = Box<dyn Iterator<Item = Self::Item> + Send>;

    fn into_iter(self) -> Self::IntoIter {
        Box::new(self.0.into_iter().flat_map(|(id, results)| results.into_iter().map(move |result| (id, result))))
    }
}
