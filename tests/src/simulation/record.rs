//! What is known of stores from outside, to be compared with what they show.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use millstream_schemas::stream::{OriginEntry, Submission};
use uuid::Uuid;

/// A local transaction.
#[derive(Clone, Debug)]
pub struct Local {
    /// The changes: id, and the row as table and key.
    pub changes: Vec<(Uuid, String)>,
    pub discarded: bool,
}

/// What is known of a store from outside.
#[derive(Clone, Debug, Default)]
pub struct Store {
    pub transactions: BTreeMap<u64, Local>,
    /// Those that were rejected or held back at some time.
    pub troubled: BTreeSet<u64>,
    /// The newest value shown of a cell, in the order of Postgres.
    pub shown: HashMap<(usize, String), u64>,
    /// The outbound history of what it shows.
    pub epoch: Option<Uuid>,
}

impl Store {
    /// The store went back, or the server did.
    pub fn forget_shown(&mut self) {
        self.shown.clear();
    }

    pub fn discarded(&mut self, tx: u64) {
        self.transactions.get_mut(&tx).expect("a recorded transaction").discarded = true;
    }
}

#[derive(Default)]
pub struct Checker {
    pub stores: Vec<Store>,
    /// Changes that the server rejected at some time.
    pub rejected: HashSet<Uuid>,
    /// Changes that a restored database lost.
    pub lost: HashSet<Uuid>,
}

impl Checker {
    pub fn restored(&mut self, lost: impl Iterator<Item = Uuid>) {
        self.lost.extend(lost);
        self.stores.iter_mut().for_each(Store::forget_shown);
    }

    pub fn decided(&mut self, submissions: &[Submission], origin: &[OriginEntry]) {
        for entry in origin {
            for failure in &entry.failed {
                let same = |s: &&Submission| s.client_id == entry.client_id && s.client_seq == failure.client_seq;
                let changes = submissions.iter().filter(same).flat_map(|submission| &submission.changes);
                self.rejected.extend(changes.map(|change| change.change_id));
            }
        }
    }
}
