//! The ledger rule: each client's transactions are taken once, in the order of their `client_seq`, without holes.
//!
//! Pure: the executor loads the clients of a batch, asks for each submission, and stores what changed. The memory
//! within the batch makes several submissions of one client behave as if each were a batch of its own.

use std::collections::HashMap;

use millstream_schemas::stream::{RunSpan, Submission};
use uuid::Uuid;

/// What to do with a submission.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Decision {
    /// The next of its client: take it.
    Take,
    /// Taken before: publish the known verdict again.
    Duplicate,
    /// One or more before it are missing: skip it, the sender resends from the gap.
    Gap,
    /// The client belongs to another user.
    Foreign,
    /// Another copy of the client's store has submitted under this number or before it.
    Fork,
}

/// A client's state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LedgerEntry {
    /// The user that the client is bound to.
    pub user_id: String,
    /// Which run of the client's store submitted `last`; none where it was taken before runs were known.
    pub run_id: Option<Uuid>,
    /// `last_seq` in the database; none for a client that it does not know.
    pub stored: Option<u64>,
    /// Last `client_seq` taken.
    pub last: u64,
}

impl LedgerEntry {
    /// As the database has it.
    pub fn stored(user_id: String, last_seq: u64, run_id: Option<Uuid>) -> LedgerEntry {
        LedgerEntry { user_id, run_id, stored: Some(last_seq), last: last_seq }
    }
}

/// The clients of a batch.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    clients: HashMap<Uuid, LedgerEntry>,
    spans: Vec<(Uuid, RunSpan)>,
}

impl Ledger {
    /// Adds what the database knows of a client.
    pub fn load(&mut self, client_id: Uuid, client: LedgerEntry) {
        self.clients.insert(client_id, client);
    }

    /// Whether the database, as opposed to this batch, has taken a transaction.
    pub fn is_stored(&self, client_id: Uuid, client_seq: u64) -> bool {
        self.clients.get(&client_id).and_then(|client| client.stored).is_some_and(|stored| client_seq <= stored)
    }

    /// Applies the rule to a submission, and takes it if it is the next.
    pub fn decide(&mut self, submission: &Submission) -> Decision {
        let &Submission { client_id, client_seq, run_id, previous, .. } = submission;
        let (last, known) = match self.clients.get(&client_id) {
            Some(client) if client.user_id != submission.user_id => return Decision::Foreign,
            Some(client) => (client.last, client.run_id),
            None => (0, None),
        };
        if client_seq == 0 || client_seq > last.saturating_add(1) {
            return Decision::Gap;
        }
        if client_seq <= last {
            return Decision::Duplicate;
        }
        // A store goes on where its last run ended; a copy of it goes on where that copy's did.
        if known.is_some_and(|known| known != run_id && previous != Some(known)) {
            return Decision::Fork;
        }
        // The user is bound by the first submission that is taken, not by one that is skipped.
        let client = self.clients.entry(client_id).or_insert_with(|| LedgerEntry {
            user_id: submission.user_id.clone(),
            run_id: None,
            stored: None,
            last: 0,
        });
        client.last = client_seq;
        if client.run_id.replace(run_id) != Some(run_id) {
            self.spans.push((client_id, RunSpan { run_id, first_seq: client_seq }));
        }
        Decision::Take
    }

    /// What the database knows of the clients once the batch is committed.
    pub fn stored(self) -> impl Iterator<Item = (Uuid, LedgerEntry)> {
        let stored = |client: LedgerEntry| LedgerEntry { stored: Some(client.last), ..client };
        self.clients.into_iter().map(move |(id, client)| (id, stored(client)))
    }

    /// Where runs began, in the batch.
    pub fn spans(&self) -> &[(Uuid, RunSpan)] {
        &self.spans
    }

    /// The clients whose state changed.
    pub fn changed(&self) -> impl Iterator<Item = (Uuid, &LedgerEntry)> {
        self.clients.iter().filter(|(_, client)| client.stored != Some(client.last)).map(|(id, client)| (*id, client))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLIENT: Uuid = Uuid::from_u128(1);

    fn submission(user: &str, client_seq: u64, run_id: u128, previous: Option<u128>) -> Submission {
        Submission {
            client_id: CLIENT,
            user_id: user.into(),
            client_seq,
            attempt: 1,
            run_id: Uuid::from_u128(run_id),
            previous: previous.map(Uuid::from_u128),
            after: Vec::new(),
            changes: Vec::new(),
            traceparent: None,
        }
    }

    fn check(stored: Option<(&str, u64)>, submissions: &[(&str, u64, Decision)], last: Option<u64>) {
        let mut ledger = Ledger::default();
        if let Some((user, client_seq)) = stored {
            ledger.load(CLIENT, LedgerEntry::stored(user.into(), client_seq, None));
        }
        for &(user, client_seq, expected) in submissions {
            assert_eq!(ledger.decide(&submission(user, client_seq, 0, None)), expected, "{user} {client_seq}");
        }
        assert_eq!(ledger.changed().map(|(_, client)| client.last).next(), last);
    }

    #[test]
    fn once_in_order_without_holes() {
        use Decision::{Duplicate, Foreign, Gap, Take};
        check(
            None,
            &[("a", 1, Take), ("a", 1, Duplicate), ("a", 2, Take), ("a", 4, Gap), ("a", 3, Take), ("a", 4, Take)],
            Some(4),
        );
        check(None, &[("a", 2, Gap), ("a", 0, Gap)], None);
        check(Some(("a", 7)), &[("a", 7, Duplicate), ("a", 1, Duplicate), ("a", 9, Gap), ("a", u64::MAX, Gap)], None);
        check(Some(("a", 7)), &[("a", 8, Take)], Some(8));
        check(Some(("a", 7)), &[("b", 8, Foreign), ("b", 1, Foreign), ("a", 8, Take)], Some(8));
        check(None, &[("b", 2, Gap), ("a", 1, Take), ("b", 2, Foreign)], Some(1));
    }

    #[test]
    fn a_copy_of_a_store_is_not_taken_for_it() {
        use Decision::{Duplicate, Fork, Take};
        let check = |stored: Option<u128>, steps: &[(u64, u128, Option<u128>, Decision)], spans: &[(u64, u128)]| {
            let mut ledger = Ledger::default();
            ledger.load(CLIENT, LedgerEntry::stored("a".into(), 7, stored.map(Uuid::from_u128)));
            for &(client_seq, run_id, previous, expected) in steps {
                assert_eq!(
                    ledger.decide(&submission("a", client_seq, run_id, previous)),
                    expected,
                    "{client_seq} {run_id}"
                );
            }
            let found: Vec<_> = ledger.spans().iter().map(|(_, s)| (s.first_seq, s.run_id.as_u128())).collect();
            assert_eq!(found, spans);
        };
        // Nothing is known of the past: whoever comes first.
        check(None, &[(8, 1, None, Take), (9, 2, None, Fork), (9, 1, None, Take)], &[(8, 1)]);
        check(Some(1), &[(8, 1, None, Take)], &[]);
        // The next run of the same store, and a copy that goes on from before it.
        check(Some(1), &[(8, 2, Some(1), Take), (8, 3, Some(1), Duplicate), (9, 3, Some(1), Fork)], &[(8, 2)]);
        check(Some(1), &[(8, 2, None, Fork), (8, 2, Some(9), Fork)], &[]);
    }
}
