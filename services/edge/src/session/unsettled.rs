//! How much a session has under way. Pure.

use std::collections::VecDeque;

/// Most that a session has submitted and that is not known to be settled: changes, and bytes. The rest waits at the client, not
/// before the changes of others.
const UNSETTLED_CHANGES: usize = 10_000;
const UNSETTLED_BYTES: usize = 4 << 20;

/// Submissions that were forwarded and are not known to be settled.
#[derive(Default)]
pub struct Unsettled {
    /// `client_seq`, changes, bytes.
    submissions: VecDeque<(u64, usize, usize)>,
    changes: usize,
    bytes: usize,
}

impl Unsettled {
    /// One more was forwarded.
    pub fn push(&mut self, client_seq: u64, changes: usize, bytes: usize) {
        self.submissions.push_back((client_seq, changes, bytes));
        self.changes += changes;
        self.bytes += bytes;
    }

    /// Everything up to `upto` is settled.
    pub fn settled(&mut self, upto: u64) {
        while let Some((_, changes, bytes)) = self.submissions.pop_front_if(|(client_seq, ..)| *client_seq <= upto) {
            self.changes -= changes;
            self.bytes -= bytes;
        }
    }

    /// Whether there is room for one more. The first always fits.
    pub fn fits(&self, changes: usize, bytes: usize) -> bool {
        self.submissions.is_empty()
            || (self.changes + changes <= UNSETTLED_CHANGES && self.bytes + bytes <= UNSETTLED_BYTES)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_under_way_is_bounded_and_the_first_always_fits() {
        let mut unsettled = Unsettled::default();
        assert!(unsettled.fits(UNSETTLED_CHANGES + 1, UNSETTLED_BYTES + 1));
        unsettled.push(1, UNSETTLED_CHANGES - 1, 10);
        assert!(unsettled.fits(1, 10) && !unsettled.fits(2, 10) && !unsettled.fits(1, UNSETTLED_BYTES - 9));
        unsettled.push(2, 1, UNSETTLED_BYTES - 10);
        assert!(!unsettled.fits(1, 1));
        unsettled.settled(1);
        assert!(unsettled.fits(5, 10) && !unsettled.fits(5, 11));
        unsettled.settled(7);
        assert_eq!((unsettled.changes, unsettled.bytes, unsettled.submissions.len()), (0, 0, 0));
    }
}
