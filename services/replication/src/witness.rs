//! Whether the change stream is the one that the outbound stream was made of. A database that was restored to an earlier
//! state may have written so much since that its LSNs lie beyond those of the outbound stream. But what has been published and
//! not been confirmed comes again, to be skipped: the transaction published last must be among it, and behind that nothing
//! that would have been published.

use millstream_schemas::Lsn;

/// A published transaction, as Postgres tells of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Landmark {
    /// Commit LSN.
    pub lsn: Lsn,
    /// Transaction id.
    pub xid: u32,
    /// Commit time: microseconds since 1970.
    pub at: i64,
}

/// The change stream shows other transactions than those that were published.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the database's history is not the one that was published up to {0}: was it restored?")]
pub struct Differs(pub Lsn);

/// Watches the change stream go by.
#[derive(Clone, Copy, Debug, Default)]
pub struct Witness {
    /// What must still come.
    expected: Option<Landmark>,
    /// Behind it, nothing was published of what is skipped; none if that is not known.
    last: Option<Lsn>,
}

impl Witness {
    /// For a change stream that begins with transactions committed at `from`; `landmark` is the transaction published last.
    pub fn new(landmark: Option<Landmark>, from: Lsn) -> Witness {
        let expected = landmark.filter(|landmark| landmark.lsn >= from);
        Witness { expected, last: landmark.map(|landmark| landmark.lsn) }
    }

    /// A transaction begins.
    ///
    /// # Errors
    /// [`Differs`].
    pub fn begins(&mut self, found: Landmark) -> Result<(), Differs> {
        match self.expected {
            Some(expected) if found == expected => self.expected = None,
            Some(expected) if found.lsn >= expected.lsn => return Err(Differs(expected.lsn)),
            _ => {}
        }
        Ok(())
    }

    /// Every transaction that committed before an LSN has come.
    ///
    /// # Errors
    /// [`Differs`].
    pub fn reached(&self, lsn: Lsn) -> Result<(), Differs> {
        match self.expected {
            Some(expected) if lsn > expected.lsn => Err(Differs(expected.lsn)),
            _ => Ok(()),
        }
    }

    /// A transaction that is skipped has something to publish.
    ///
    /// # Errors
    /// [`Differs`].
    pub fn skips(&self, lsn: Lsn) -> Result<(), Differs> {
        match self.last {
            Some(last) if lsn > last => Err(Differs(last)),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn landmark(lsn: u64) -> Landmark {
        Landmark { lsn: Lsn(lsn), xid: 7, at: 1_000 }
    }

    #[test]
    fn the_same_history_shows_the_landmark() {
        let mut witness = Witness::new(Some(landmark(50)), Lsn(40));
        for lsn in [40, 45, 50, 60] {
            assert_eq!(witness.begins(landmark(lsn)), Ok(()), "{lsn}");
            assert_eq!(witness.skips(Lsn(lsn.min(50))), Ok(()), "{lsn}");
        }
        assert_eq!(witness.reached(Lsn(70)), Ok(()));
    }

    #[test]
    fn another_history_is_noticed() {
        let witness = Witness::new(Some(landmark(50)), Lsn(40));
        let differs = Err(Differs(Lsn(50)));
        assert_eq!(witness.clone().begins(landmark(51)), differs, "it did not come");
        assert_eq!(witness.clone().begins(Landmark { xid: 8, ..landmark(50) }), differs, "another one in its place");
        assert_eq!(witness.clone().begins(Landmark { at: 1_001, ..landmark(50) }), differs, "another one in its place");
        assert_eq!(witness.reached(Lsn(50)), Ok(()));
        assert_eq!(witness.reached(Lsn(51)), differs, "it did not come, and nothing else");
    }

    #[test]
    fn behind_the_landmark_nothing_is_skipped() {
        let mut witness = Witness::new(Some(landmark(30)), Lsn(40));
        assert_eq!(witness.begins(landmark(60)), Ok(()), "the landmark was confirmed and does not come again");
        assert_eq!(witness.reached(Lsn(70)), Ok(()));
        assert_eq!(witness.skips(Lsn(60)), Err(Differs(Lsn(30))));
        assert_eq!(witness.skips(Lsn(20)), Ok(()));
        assert_eq!(Witness::default().skips(Lsn(60)), Ok(()), "nothing is known");
    }
}
