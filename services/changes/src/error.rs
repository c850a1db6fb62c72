//! What an error of Postgres means: a verdict on the change, a fault of the server, or nobody knows.

use millstream_schemas::Code;
use millstream_schemas::stream::{MAX_FAILURE_MESSAGE_BYTES, MAX_RULE_BYTES};
use sqlx::postgres::{PgDatabaseError, PgSeverity};

use crate::sql::traits::PrimaryKey;

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
        Refusal::by(None, code, message)
    }

    /// By a rule or constraint of that name, if it has one. Both texts are cut to what results carry: a name may be any text
    /// (`RAISE … USING CONSTRAINT`).
    pub fn by(rule: Option<&str>, code: Code, message: impl AsRef<str>) -> Refusal {
        let rule = rule.filter(|name| !name.is_empty()).map(|name| cut(name, MAX_RULE_BYTES));
        Refusal { code, rule, message: cut(message.as_ref(), MAX_FAILURE_MESSAGE_BYTES) }
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
    pub site: Site,
}

/// Where an error arose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Site {
    /// In the statement itself.
    #[default]
    Statement,
    /// Within something that the statement set off, a trigger or a function most likely.
    Within,
    /// A `RAISE` of the schema's author, with a SQLSTATE and words of their choice.
    Raised,
}

/// The routine of PL/pgSQL that reports what `RAISE` says (PostgreSQL source, `pl_exec.c`); unlike texts it is in no language.
const RAISE: &str = "exec_stmt_raise";

impl Site {
    fn of(error: &PgDatabaseError) -> Site {
        match (error.routine(), error.r#where()) {
            (Some(RAISE), _) => Site::Raised,
            (_, Some(context)) if !context.is_empty() => Site::Within,
            _ => Site::Statement,
        }
    }
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
                site: Site::of(error),
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

/// Classifies by SQLSTATE and by where the error arose: any SQLSTATE that an author raises is about the change at hand, the
/// server's own are not. Source of the codes: PostgreSQL documentation, Appendix A.
pub(crate) fn classify_reported(error: Reported<'_>) -> Fault {
    let verdict = |code, message: &str| Fault::Verdict(Refusal::by(error.constraint, code, message));
    // Five letters and digits; anything else is no SQLSTATE.
    let class = error.state.get(..2).filter(|class| class.is_ascii()).unwrap_or("");
    match (class, error.state, error.site) {
        (_, "42501", _) => verdict(Code::PermissionDenied, error.message),
        ("22", _, _) => verdict(Code::InvalidValue, error.message),
        // The words of the schema's author, who may name a constraint too (RAISE … USING CONSTRAINT); P0 also of PL/pgSQL itself,
        // 44 of views WITH CHECK OPTION.
        (_, _, Site::Raised) | ("P0" | "44", _, _) => verdict(Code::BusinessRule, error.message),
        (_, "23502", _) => match error.column {
            Some(column) => verdict(Code::BusinessRule, &must_not_be_null(column)),
            None => verdict(Code::BusinessRule, error.message),
        },
        ("23", state, _) => {
            let kind = match state {
                "23503" => "foreign key constraint",
                "23505" => "unique constraint",
                "23514" => "check constraint",
                "23P01" => "exclusion constraint",
                _ => "constraint",
            };
            match error.constraint {
                Some(name) => verdict(Code::BusinessRule, &format!("{kind} \"{name}\" does not hold")),
                // A row for which there is no partition, say.
                None => verdict(Code::BusinessRule, error.message),
            }
        }
        // A value too large for a row or an index, or nested too deeply.
        ("54", _, _) => verdict(Code::InvalidValue, error.message),
        // An identity that is always generated.
        (_, "428C9", _) => verdict(Code::ColumnNotWritable, error.message),
        // A statement that was stopped by its own time limit may be stopped by it every time.
        (_, "57014", _) => Fault::Unknown,
        // Locks, deadlocks and lack of resources pass, wherever they are met. So does a standby that is not (yet) a primary, and a
        // transaction that timed out while idle.
        ("40" | "53" | "57" | "58", _, _) | (_, "55P03" | "55006" | "25006" | "25P03", _) => Fault::Server,
        ("08" | "28" | "3D", _, Site::Statement) => Fault::Server,
        // No primary key to replicate by, connections that a trigger makes to elsewhere, foreign tables: nobody can say when it
        // ends, and it is not for everybody.
        ("08" | "28" | "3D" | "55" | "HV" | "XX", _, _) => Fault::Unknown,
        // The catalog in memory may be behind the database's, or it is the type's own word for a value that it cannot read; else a
        // prepared statement or a cursor of ours is at fault.
        ("0A" | "24" | "25" | "26" | "34" | "3F" | "42" | "", _, Site::Statement) => Fault::Unknown,
        _ => verdict(Code::BusinessRule, error.message),
    }
}

/// The message to an author who left a column null that must not be.
pub(crate) fn must_not_be_null(column: &str) -> String {
    format!("column \"{column}\" must not be null")
}

/// Whether it is that a row with one of these keys is there already.
pub(crate) fn is_duplicate(error: &sqlx::Error, keys: &[PrimaryKey]) -> bool {
    let error = error.as_database_error().and_then(|error| error.try_downcast_ref::<PgDatabaseError>());
    error.is_some_and(|error| {
        let named = error.schema().zip(error.table()).zip(error.constraint());
        error.code() == "23505"
            && named.is_some_and(|((schema, table), constraint)| {
                keys.iter().any(|(s, t, c)| (s.as_str(), t.as_str(), c.as_str()) == (schema, table, constraint))
            })
    })
}

/// Whether the error says that the catalog in memory is behind the database's (a column or table is gone, say).
pub(crate) fn is_drift(error: &sqlx::Error) -> bool {
    let state = error.as_database_error().and_then(|error| error.code());
    state.is_some_and(|state| (state.starts_with("42") && state != "42501") || state == "0A000")
}

/// Whether a value may be at fault: types have SQLSTATEs of many classes for texts that they cannot read, and some tell where
/// in the text.
pub(crate) fn may_be_a_value(error: &sqlx::Error) -> bool {
    let error = error.as_database_error().and_then(|error| error.try_downcast_ref::<PgDatabaseError>());
    error.is_some_and(|error| {
        let about_the_row = ["23", "44", "P0"].iter().any(|class| error.code().starts_with(class));
        !about_the_row && error.code() != "42501" && Site::of(error) != Site::Raised
    })
}

/// Schema and name of the domain that a null was refused by. Which column it was meant for, Postgres does not tell.
pub(crate) fn null_of_domain(error: &sqlx::Error) -> Option<(&str, &str)> {
    let error = error.as_database_error()?.try_downcast_ref::<PgDatabaseError>()?;
    let is_it = error.code() == "23502" && error.column().is_none() && Site::of(error) == Site::Statement;
    error.schema().zip(error.data_type()).filter(|_| is_it)
}

/// Whether the statement was stopped by its time limit.
pub(crate) fn is_out_of_time(error: &sqlx::Error) -> bool {
    error.as_database_error().and_then(|error| error.code()).is_some_and(|state| state == "57014")
}

/// Whether the connection can still be used after this error and a `ROLLBACK`. Not one that may not write: whether it may was decided
/// when it began.
pub(crate) fn keeps_connection(error: &sqlx::Error) -> bool {
    let error = error.as_database_error().and_then(|error| error.try_downcast_ref::<PgDatabaseError>());
    error.is_some_and(|error| match error.severity() {
        // An author may raise any SQLSTATE; the server ends connections by more than an error.
        PgSeverity::Error => {
            Site::of(error) == Site::Raised || !(error.code().starts_with("08") || error.code() == "25006")
        }
        _ => false,
    })
}

/// Cut at a character boundary.
fn cut(text: &str, bytes: usize) -> String {
    let mut end = text.len().min(bytes);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].replace('\0', "\u{fffd}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_have_meanings() {
        use Code::{BusinessRule, ColumnNotWritable, InvalidValue, PermissionDenied};
        const SERVER: Result<Code, &str> = Err("server");
        const UNKNOWN: Result<Code, &str> = Err("unknown");
        // In the statement itself, within what it set off, and raised by the schema's author.
        for (states, expected) in [
            (
                &["23505", "23503", "23502", "23514", "23P01", "23001", "P0001", "P0004", "44000"][..],
                [Ok(BusinessRule); 3],
            ),
            (&["22P02", "22001", "22003", "22030", "2200M"], [Ok(InvalidValue); 3]),
            (&["42501"], [Ok(PermissionDenied); 3]),
            (&["54000", "54001", "54011", "54023"], [Ok(InvalidValue), Ok(InvalidValue), Ok(BusinessRule)]),
            (&["428C9"], [Ok(ColumnNotWritable), Ok(ColumnNotWritable), Ok(BusinessRule)]),
            // An author's own, and what triggers do wrong.
            (
                &[
                    "21000", "2F002", "38000", "39P01", "09000", "27000", "20000", "2D000", "0L000", "PT403", "U0001",
                    "AB001",
                ],
                [Ok(BusinessRule); 3],
            ),
            (
                &["40001", "40P01", "55P03", "53300", "53400", "57P01", "58030", "25006"],
                [SERVER, SERVER, Ok(BusinessRule)],
            ),
            (&["08006", "28000", "3D000"], [SERVER, UNKNOWN, Ok(BusinessRule)]),
            (&["55000", "57014", "XX000", "HV00N"], [UNKNOWN, UNKNOWN, Ok(BusinessRule)]),
            (
                &["42703", "42P01", "42704", "42883", "42601", "0A000", "3F000", "25P02", "26000", "34000"],
                [UNKNOWN, Ok(BusinessRule), Ok(BusinessRule)],
            ),
        ] {
            for state in states {
                for (site, expected) in [Site::Statement, Site::Within, Site::Raised].into_iter().zip(expected) {
                    let fault = classify_reported(Reported { state, message: "words", site, ..Default::default() });
                    let found = match &fault {
                        Fault::Verdict(refusal) if refusal.message == "words" => Ok(refusal.code),
                        Fault::Server => SERVER,
                        Fault::Unknown => UNKNOWN,
                        other => panic!("{state} {site:?}: {other:?}"),
                    };
                    assert_eq!(found, expected, "{state} {site:?}");
                }
            }
        }
        for state in ["", "é"] {
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
            ..Default::default()
        });
        let expected = Refusal {
            code: Code::BusinessRule,
            rule: Some("tasks_pkey".into()),
            message: "unique constraint \"tasks_pkey\" does not hold".into(),
        };
        assert_eq!(fault, Fault::Verdict(expected));
    }

    #[test]
    fn names_and_messages_are_cut_at_a_character() {
        let long = "é".repeat(MAX_FAILURE_MESSAGE_BYTES);
        for text in [long.clone(), format!("x{long}")] {
            let refusal = Refusal::by(Some(&text), Code::BusinessRule, &text);
            let rule = refusal.rule.unwrap();
            assert!((MAX_RULE_BYTES - 1..=MAX_RULE_BYTES).contains(&rule.len()), "{}", rule.len());
            assert!(refusal.message.len() <= MAX_FAILURE_MESSAGE_BYTES);
        }
        let exact = "n".repeat(MAX_RULE_BYTES);
        assert_eq!(Refusal::by(Some(&exact), Code::BusinessRule, "short").rule, Some(exact.clone()));
        assert_eq!(Refusal::by(Some(&format!("{exact}n")), Code::BusinessRule, "short").rule, Some(exact));
        assert_eq!(Refusal::by(Some(""), Code::BusinessRule, "short"), Refusal::new(Code::BusinessRule, "short"));
    }
}
