//! What the stream tells of a batch. Pure.

use std::collections::HashMap;

use millstream_schemas::stream::{Failure, Loss, OriginEntry};
use uuid::Uuid;

use crate::decide::ledger::{Ledger, LedgerEntry};
use crate::decide::plan::Planned;

/// What the batch settles: one entry for each client whose ledger moved, in the order of [`Ledger::changed`].
pub(crate) fn origin(plan: &[Planned<'_>], ledger: &Ledger) -> Vec<OriginEntry> {
    let mut failures: HashMap<Uuid, Vec<Failure>> = HashMap::new();
    let mut losses: HashMap<Uuid, Vec<Loss>> = HashMap::new();
    for planned in plan {
        let client_id = planned.submission.client_id;
        losses.entry(client_id).or_default().extend(planned.loss());
        failures.entry(client_id).or_default().extend(planned.result().and_then(|result| result.failure));
    }
    let entry = |(id, client): (Uuid, &LedgerEntry)| OriginEntry {
        client_id: id,
        first_seq: client.stored.unwrap_or(0) + 1,
        client_seq: client.last,
        run_id: client.run_id.unwrap_or_default(),
        failed: failures.remove(&id).unwrap_or_default(),
        lost: losses.remove(&id).unwrap_or_default(),
    };
    ledger.changed().map(entry).collect()
}
