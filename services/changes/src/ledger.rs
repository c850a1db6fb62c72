//! The ledger rule: each client's transactions are taken once, in the order of their `client_seq`, without holes.
//!
//! Pure: the executor loads the clients of a batch, asks for each submission, and stores what changed. The memory
//! within the batch makes several submissions of one client behave as if each were a batch of its own.

use std::collections::HashMap;

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
}

/// A client's state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Client {
    /// The user that the client is bound to.
    pub user_id: String,
    /// Id of the client's copy of its store, as of the last submission taken.
    pub instance: Uuid,
    /// `last_seq` in the database; none for a client that it does not know.
    pub stored: Option<u64>,
    /// Last `client_seq` taken.
    pub last: u64,
}

/// The clients of a batch.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    clients: HashMap<Uuid, Client>,
}

impl Ledger {
    /// Adds what the database knows of a client.
    pub fn load(&mut self, client_id: Uuid, user_id: String, last_seq: u64) {
        self.clients
            .insert(client_id, Client { user_id, instance: Uuid::nil(), stored: Some(last_seq), last: last_seq });
    }

    /// Applies the rule to a submission, and takes it if it is the next.
    pub fn decide(&mut self, client_id: Uuid, user_id: &str, instance: Uuid, seq: u64) -> Decision {
        let last = match self.clients.get(&client_id) {
            Some(client) if client.user_id != user_id => return Decision::Foreign,
            Some(client) => client.last,
            None => 0,
        };
        if seq == 0 || seq > last + 1 {
            return Decision::Gap;
        }
        if seq <= last {
            return Decision::Duplicate;
        }
        // The user is bound by the first submission that is taken, not by one that is skipped.
        let client = self.clients.entry(client_id).or_insert_with(|| Client {
            user_id: user_id.to_owned(),
            instance,
            stored: None,
            last: 0,
        });
        client.last = seq;
        client.instance = instance;
        Decision::Take
    }

    /// The clients whose state changed.
    pub fn changed(&self) -> impl Iterator<Item = (Uuid, &Client)> {
        self.clients.iter().filter(|(_, client)| client.stored != Some(client.last)).map(|(id, client)| (*id, client))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLIENT: Uuid = Uuid::from_u128(1);

    fn check(stored: Option<(&str, u64)>, submissions: &[(&str, u64, Decision)], last: Option<u64>) {
        let mut ledger = Ledger::default();
        if let Some((user, seq)) = stored {
            ledger.load(CLIENT, user.into(), seq);
        }
        for &(user, seq, expected) in submissions {
            assert_eq!(ledger.decide(CLIENT, user, Uuid::nil(), seq), expected, "{user} {seq}");
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
}
