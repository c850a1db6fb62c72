//! What an error of Postgres means: a verdict on the change, a fault of the server, or nobody knows.

use millstream_schemas::Code;
use millstream_schemas::stream::MAX_FAILURE_MESSAGE_BYTES;
use sqlx::postgres::PgDatabaseError;

/// Why the service ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `millstream.toml` cannot be used.
    #[error("cannot use the configuration")]
    Config(#[source] millstream_catalog::ConfigError),
    /// The broker refused us.
    #[error("cannot connect to NATS")]
    Nats(#[source] millstream_runtime::nats::Error),
    /// The connection URL of Postgres is malformed.
    #[error("cannot use the Postgres connection URL")]
    PostgresUrl(#[source] sqlx::Error),
    /// The health address cannot be bound.
    #[error("cannot listen for health checks")]
    Health(#[source] std::io::Error),
    /// A task ended that should not have.
    #[error("the {0} task ended unexpectedly")]
    TaskEnded(&'static str),
}

/// Why a change is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub code: Code,
    /// What refused it, where that has a name.
    pub rule: Option<String>,
    /// For people.
    pub message: String,
}

impl Refusal {
    /// Without a name.
    pub fn new(code: Code, message: impl AsRef<str>) -> Refusal {
        Refusal { code, rule: None, message: bounded(message.as_ref()) }
    }
}

/// Meaning of an error that a statement met.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The change itself cannot be applied: reject it.
    Verdict(Refusal),
    /// Postgres, or the way to it, cannot serve now: roll back and try the same again, for ever.
    Server,
    /// The backend went away during the statement: a server fault, unless it keeps happening on one change.
    Gone,
    /// Not known to be either. Try again a few times, then give the change up.
    Unknown,
}

/// What Postgres says of an error, without values of rows (`DETAIL` is left out on purpose).
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Reported<'a> {
    pub state: &'a str,
    pub message: &'a str,
    pub constraint: Option<&'a str>,
    pub column: Option<&'a str>,
}

/// Classifies an error of a statement.
pub(crate) fn classify(error: &sqlx::Error) -> Fault {
    match error {
        sqlx::Error::Database(database) => match database.try_downcast_ref::<PgDatabaseError>() {
            Some(error) => classify_reported(Reported {
                state: error.code(),
                message: error.message(),
                constraint: error.constraint(),
                column: error.column(),
            }),
            None => Fault::Unknown,
        },
        sqlx::Error::Io(_) => Fault::Gone,
        sqlx::Error::Tls(_) | sqlx::Error::PoolTimedOut | sqlx::Error::PoolClosed | sqlx::Error::WorkerCrashed => {
            Fault::Server
        }
        _ => Fault::Unknown,
    }
}

/// Classifies by SQLSTATE. Source of the codes: PostgreSQL documentation, Appendix A.
pub(crate) fn classify_reported(error: Reported<'_>) -> Fault {
    let class = error.state.get(..2).unwrap_or("");
    match (class, error.state) {
        (_, "23502") => Fault::Verdict(Refusal::new(
            Code::BusinessRule,
            match error.column {
                Some(column) => format!("column \"{column}\" must not be null"),
                None => "a column must not be null".to_owned(),
            },
        )),
        ("23", state) => {
            let kind = match state {
                "23503" => "foreign key constraint",
                "23505" => "unique constraint",
                "23514" => "check constraint",
                "23P01" => "exclusion constraint",
                _ => "constraint",
            };
            let name = error.constraint.unwrap_or("(unnamed)");
            let refusal = Refusal::new(Code::BusinessRule, format!("{kind} \"{name}\" does not hold"));
            Fault::Verdict(Refusal { rule: error.constraint.map(str::to_owned), ..refusal })
        }
        // What triggers raise, and views WITH CHECK OPTION: their message is written by the schema's author for people,
        // who may name a constraint too (RAISE … USING CONSTRAINT).
        ("P0" | "44", _) => Fault::Verdict(Refusal {
            rule: error.constraint.map(str::to_owned),
            ..Refusal::new(Code::BusinessRule, error.message)
        }),
        ("22", _) => Fault::Verdict(Refusal::new(Code::InvalidValue, error.message)),
        // A value too large for an index entry or a row.
        (_, "54000") => Fault::Verdict(Refusal::new(Code::InvalidValue, error.message)),
        (_, "42501") => Fault::Verdict(Refusal::new(Code::PermissionDenied, error.message)),
        // A statement that was stopped by its own time limit may be stopped by it every time.
        (_, "57014") => Fault::Unknown,
        ("08" | "28" | "3D" | "40" | "53" | "55" | "57" | "58", _) => Fault::Server,
        // A standby that is not (yet) a primary, or a transaction that timed out while idle.
        (_, "25006" | "25P03") => Fault::Server,
        _ => Fault::Unknown,
    }
}

/// Whether the error says that the catalog in memory is behind the database's (a column or table is gone, say).
pub(crate) fn is_drift(error: &sqlx::Error) -> bool {
    let state = error.as_database_error().and_then(|error| error.code());
    state.is_some_and(|state| (state.starts_with("42") && state != "42501") || state == "0A000")
}

/// Whether the connection can still be used after this error and a `ROLLBACK`.
pub(crate) fn keeps_connection(error: &sqlx::Error) -> bool {
    matches!(error, sqlx::Error::Database(error) if !error.code().is_some_and(|code| code.starts_with("57P") || code.starts_with("08") || code == "25P03"))
}

/// Whether a value did not fit its type.
pub(crate) fn names_values(error: &sqlx::Error) -> bool {
    error.as_database_error().and_then(|error| error.code()).is_some_and(|state| state.starts_with("22"))
}

/// Cut to what fits into a failure's message, at a character boundary.
pub(crate) fn bounded(message: &str) -> String {
    let mut end = message.len().min(MAX_FAILURE_MESSAGE_BYTES);
    while !message.is_char_boundary(end) {
        end -= 1;
    }
    message[..end].replace('\0', "\u{fffd}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_have_meanings() {
        let code = |state: &str| match classify_reported(Reported { state, message: "m", ..Default::default() }) {
            Fault::Verdict(refusal) => Some(refusal.code),
            _ => None,
        };
        for (state, expected) in [
            ("23505", Some(Code::BusinessRule)),
            ("23503", Some(Code::BusinessRule)),
            ("23502", Some(Code::BusinessRule)),
            ("P0001", Some(Code::BusinessRule)),
            ("22P02", Some(Code::InvalidValue)),
            ("22001", Some(Code::InvalidValue)),
            ("54000", Some(Code::InvalidValue)),
            ("42501", Some(Code::PermissionDenied)),
            ("40001", None),
            ("40P01", None),
            ("57014", None),
        ] {
            assert_eq!(code(state), expected, "{state}");
        }
        for state in ["40001", "40P01", "55P03", "08006", "53300", "57P01", "57P03", "58030", "25006"] {
            assert_eq!(classify_reported(Reported { state, ..Default::default() }), Fault::Server, "{state}");
        }
        for state in ["57014", "42703", "XX000", "0A000", "", "é"] {
            assert_eq!(classify_reported(Reported { state, ..Default::default() }), Fault::Unknown, "{state}");
        }
        assert_eq!(classify(&sqlx::Error::Io(std::io::Error::other("gone"))), Fault::Gone);
    }

    #[test]
    fn constraints_are_named_and_details_are_not_told() {
        let fault = classify_reported(Reported {
            state: "23505",
            message: "duplicate key value violates unique constraint \"tasks_pkey\"",
            constraint: Some("tasks_pkey"),
            column: None,
        });
        let expected = Refusal {
            code: Code::BusinessRule,
            rule: Some("tasks_pkey".into()),
            message: "unique constraint \"tasks_pkey\" does not hold".into(),
        };
        assert_eq!(fault, Fault::Verdict(expected));
    }

    #[test]
    fn messages_are_cut_at_a_character() {
        let long = "é".repeat(MAX_FAILURE_MESSAGE_BYTES);
        assert!(bounded(&long).len() <= MAX_FAILURE_MESSAGE_BYTES);
        assert!(bounded(&format!("x{long}")).len() <= MAX_FAILURE_MESSAGE_BYTES);
        assert_eq!(bounded("short"), "short");
    }
}
