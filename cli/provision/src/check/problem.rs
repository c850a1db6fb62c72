//! What a check finds, and why it could not be made.

use std::path::Path;

use millstream_catalog::Misfit;
use serde::Serialize;

use crate::exit::{Exit, HasExit};

/// The database cannot be checked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The database cannot be read.
    #[error("cannot read the database's catalog")]
    Postgres(#[source] sqlx::Error),
    /// Publication and replica identities cannot be read.
    #[error("cannot read what is replicated")]
    Replication(#[source] Box<millstream_catalog::Unanswered>),
}

impl HasExit for Error {
    fn exit(&self) -> Exit {
        Exit::Failed
    }
}

/// Something that does not fit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// Section or key of the file, such as `[tables.tasks] write.insert`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub place: Option<String>,
    /// Line of the file, from 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub line: Option<usize>,
    /// What is wrong.
    pub message: String,
    /// The part of a predicate that Postgres points at.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub excerpt: Option<Excerpt>,
    /// What to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
}

/// A line of a predicate, and a place in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Excerpt {
    /// The line.
    pub text: String,
    /// The character pointed at, from 1.
    pub column: usize,
}

impl Problem {
    pub(crate) fn new(message: impl Into<String>) -> Problem {
        Problem { message: message.into(), ..Problem::default() }
    }

    /// Of a synced table.
    pub(crate) fn table(name: &str, message: impl Into<String>) -> Problem {
        Problem { place: Some(format!("[tables.{name}]")), ..Problem::new(message) }
    }

    /// From a text that begins with its section.
    pub(crate) fn sectioned(text: &str) -> Problem {
        match text.split_once("]: ") {
            Some((section, message)) if section.starts_with('[') => {
                Problem { place: Some(format!("{section}]")), ..Problem::new(message) }
            }
            _ => Problem::new(text),
        }
    }

    pub(crate) fn misfit(found: Misfit) -> Problem {
        Problem::table(&found.table, found.message).fix(found.fix)
    }

    pub(crate) fn fix(self, fix: impl Into<String>) -> Problem {
        Problem { fix: Some(fix.into()), ..self }
    }

    /// For people, over several lines; `label` is `warning: ` or nothing.
    pub fn text(&self, file: &Path, label: &str) -> String {
        let line = self.line.map(|line| format!(":{line}")).unwrap_or_default();
        format!("{}{line}: {label}{self}\n", file.display())
    }
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Some(place) = &self.place {
            write!(f, "{place}: ")?;
        }
        write!(f, "{}", self.message)?;
        if let Some(excerpt) = &self.excerpt {
            let indent = " ".repeat(excerpt.column.saturating_sub(1));
            write!(f, "\n    {}\n    {indent}^", excerpt.text)?;
        }
        if let Some(fix) = &self.fix {
            write!(f, "\n  fix: {}", fix.replace('\n', "\n       "))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_names_its_place_and_points_at_it() {
        let problem = Problem {
            place: Some("[tables.tasks] write.insert".into()),
            line: Some(7),
            excerpt: Some(Excerpt { text: "new.titel <> ''".into(), column: 5 }),
            ..Problem::new("column new.titel does not exist").fix("perhaps new.title")
        };
        assert_eq!(
            problem.text(Path::new("m.toml"), ""),
            "m.toml:7: [tables.tasks] write.insert: column new.titel does not exist\n    new.titel <> ''\n        ^\n  fix: perhaps new.title\n"
        );
        assert_eq!(
            Problem::table("a", "it may be").text(Path::new("m.toml"), "warning: "),
            "m.toml: warning: [tables.a]: it may be\n"
        );
        assert_eq!(Problem::sectioned("[tables.a]: it: is"), Problem::table("a", "it: is"));
        assert_eq!(Problem::sectioned("nothing").place, None);
    }
}
