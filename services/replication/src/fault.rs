//! Failures of sessions: whether they are about what is in a transaction, so that another try ends as the last one did, and
//! when such a transaction is passed over. Pure.

use millstream_runtime::postgres::is_about_content;
use millstream_schemas::Lsn;

use crate::assemble::AssembleError;
use crate::error::{Error, ServerError};

/// Sessions that fail in a row at one transaction, by the same error of content, before it is passed over.
pub const TRIES: u32 = 3;

/// NATS' error codes for a message that the stream never takes: over its own limit, or with too large headers.
const NEVER_TAKEN: [u64; 2] = [10054, 10097];

/// What the sessions so far failed at.
#[derive(Debug, Default)]
pub struct Faults {
    /// Where the last failed, by which error of content, and how many did in a row.
    last: Option<(Lsn, String, u32)>,
    /// The transaction that some session has failed at and none has got past yet.
    pub stuck: Option<Lsn>,
    /// The broker failed last: only what it stores shows that it works again.
    pub broker: bool,
}

impl Faults {
    /// Another session failed. Whether the transaction that it failed at is to be passed over.
    pub fn failed(&mut self, error: &Error) -> bool {
        let place = error.place().map(|place| place.lsn);
        self.stuck = place.or(self.stuck);
        self.broker = is_of_broker(error.cause());
        let (Some(lsn), Some(kind)) = (place, content(error.cause())) else { return false };
        let tries = match self.last.take() {
            Some((last, same, tries)) if last == lsn && same == kind => tries + 1,
            _ => 1,
        };
        self.last = (tries < TRIES).then_some((lsn, kind, tries));
        tries >= TRIES
    }
}

/// Whether the broker was asked for something and did not do it.
pub fn is_of_broker(error: &Error) -> bool {
    matches!(
        error,
        Error::Nats(_) | Error::Tail(_) | Error::Append(_) | Error::Refused { .. } | Error::Subscribe { .. }
    )
}

/// Whether Postgres lacks a file of its write-ahead log: somebody removed it, though the slot says that it is reserved.
pub fn is_wal_gone(error: &Error) -> bool {
    const UNDEFINED_FILE: &str = "58P01";
    matches!(error, Error::Server { source, .. } if source.code == UNDEFINED_FILE)
}

/// Names what is wrong with the content, if that is what is wrong.
fn content(error: &Error) -> Option<String> {
    match error {
        Error::Server { source, .. } if is_about_content(&source.code) => Some(format!("SQLSTATE {}", source.code)),
        Error::Refused { code, .. } if NEVER_TAKEN.contains(code) => Some(format!("refused with {code}")),
        Error::MessageTooLarge { .. } => Some("too large".into()),
        Error::Assemble(AssembleError::SchemaChanged { .. }) => None,
        Error::Assemble(error) => Some(error.to_string()),
        _ => None,
    }
}

impl ServerError {
    /// Whether its text may quote a value.
    pub(crate) fn may_quote(&self) -> bool {
        ["21", "22", "23", "38", "39", "P0"].iter().any(|class| self.code.starts_with(class))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::AtTransaction;

    fn server(code: &str) -> Error {
        let source = ServerError { code: code.into(), message: "it failed".into() };
        Error::Server { operation: "read", source }
    }

    fn at(lsn: u64, error: Error) -> Error {
        error.at(AtTransaction { lsn: Lsn(lsn), xid: Some(7), table: None })
    }

    #[test]
    fn the_same_failure_at_the_same_transaction_is_passed_over() {
        let mut faults = Faults::default();
        let outcomes: Vec<bool> = (0..TRIES).map(|_| faults.failed(&at(9, server("XX000")))).collect();
        assert_eq!(outcomes, [false, false, true]);
        assert!(!faults.failed(&at(9, server("XX000"))), "counted from the start");
        // Another place, another error: from the start.
        for (lsn, code) in [(10, "XX000"), (10, "XX000"), (11, "XX000"), (11, "XX000"), (11, "22021"), (11, "22021")] {
            assert!(!faults.failed(&at(lsn, server(code))), "{lsn} {code}");
        }
        // What is lost in between does not matter.
        assert!(!faults.failed(&Error::WalEnded));
        assert!(faults.failed(&at(11, server("22021"))));
    }

    #[test]
    fn what_can_pass_by_itself_is_never_passed_over() {
        let refused = |code| Error::Refused { code, description: String::new() };
        let errors: [&dyn Fn() -> Error; 14] = [
            &|| server("57P01"),
            &|| server("53100"),
            &|| server("58030"),
            &|| server("55006"),
            &|| server("42704"),
            &|| server("28000"),
            &|| server("08006"),
            &|| Error::WalEnded,
            &|| Error::LeaderLost,
            &|| Error::Append("timed out".into()),
            &|| Error::Conflict { expected: 1 },
            &|| refused(10077),
            &|| refused(10047),
            &|| Error::Lookup { source: sqlx::Error::PoolTimedOut },
        ];
        for error in errors {
            let mut faults = Faults::default();
            assert!((0..100).all(|_| !faults.failed(&at(9, error()))), "{:?}", error());
            assert_eq!(faults.stuck, Some(Lsn(9)));
        }
        // Without a transaction there is nothing to pass over.
        assert!((0..100).all(|_| !Faults::default().failed(&server("XX000"))));
    }

    #[test]
    fn what_cannot_pass_is() {
        let refused = |code| Error::Refused { code, description: String::new() };
        let errors: [&dyn Fn() -> Error; 6] = [
            &|| server("54000"),
            &|| server("53200"),
            &|| refused(10097),
            &|| refused(10054),
            &|| Error::MessageTooLarge { lsn: Lsn(9), bytes: 2, limit: 1 },
            &|| Error::Assemble(AssembleError::Order { what: "begin" }),
        ];
        for error in errors {
            let mut faults = Faults::default();
            assert!((0..TRIES).any(|_| faults.failed(&at(9, error()))), "{:?}", error());
        }
    }
}
