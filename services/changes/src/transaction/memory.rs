//! What committed batches found, so that the next one need not ask for it. Pure, but for the time.

use std::collections::HashMap;
use std::time::Instant;

use uuid::Uuid;

use crate::decide::ledger::{Ledger, LedgerEntry};
use crate::item::Item;

/// So many batches go the long way after one of which a row was not written: where some lose, others may.
const PAUSE: u32 = 10;
/// Most clients that are remembered.
const MAX_CLIENTS: usize = 10_000;

/// What batches before found: the ledger entries of clients, and the database's time. If somebody else moves an entry,
/// the comparison in the statement fails.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    clients: HashMap<Uuid, LedgerEntry>,
    /// Microseconds since 1970, and when they were read.
    time: Option<(u64, Instant)>,
    /// Batches that are still to go the long way.
    pause: u32,
}

impl Memory {
    /// The ledger of a batch's clients; none if there is a submission that is not known to be the next of its client.
    pub fn ledger(&self, items: &[Item]) -> Option<Ledger> {
        let mut ledger = Ledger::default();
        let mut taken: HashMap<Uuid, u64> = HashMap::new();
        for submission in items.iter().filter_map(|item| item.submission.as_ref()) {
            let client = self.clients.get(&submission.client_id)?;
            let last = taken.entry(submission.client_id).or_insert_with(|| {
                ledger.load(submission.client_id, client.clone());
                client.last
            });
            *last += 1;
            let next = submission.client_seq == *last && client.run_id == Some(submission.run_id);
            if !next || client.user_id != submission.user_id {
                return None;
            }
        }
        Some(ledger)
    }

    /// Whether a batch may go the short way.
    pub fn allows(&mut self) -> bool {
        let paused = self.pause > 0;
        self.pause = self.pause.saturating_sub(1);
        !paused
    }

    /// The database's time, microseconds since 1970, or a little less; if its clock was set, the statement finds out.
    pub fn now(&self) -> Option<u64> {
        self.time.map(|(time, read)| time + read.elapsed().as_micros() as u64)
    }

    /// Keeps what a committed batch stored, and the time that it read.
    pub fn keep(&mut self, ledger: Ledger, time: Option<u64>) {
        self.time = time.map(|time| (time, Instant::now()));
        if self.clients.len() > MAX_CLIENTS {
            self.clients.clear();
        }
        self.clients.extend(ledger.stored());
    }

    /// A row was not written: the next batches go the long way.
    pub fn pause(&mut self) {
        self.pause = PAUSE;
    }
}
