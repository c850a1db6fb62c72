//! `millstream check`: holds `millstream.toml` against the live database and says everything that does not fit, with the
//! remedy. It reads the database and changes nothing there.

mod database;
mod locate;
mod names;
mod numeric;
mod predicate;

use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use self::database::slot;
use millstream_catalog::{Catalog, CatalogError, Config, ConfigError};
use serde::Serialize;
use sqlx::PgConnection;

use crate::client::Output;
use crate::database::{DatabaseArgs, NoDatabase};
use crate::exit::Exit;
use crate::setup;

/// Flags of `millstream check`.
#[derive(clap::Args, Clone)]
#[command(before_help = "Examples:
  millstream check
  millstream check --config app/millstream.toml -o json")]
#[command(
    after_help = "The database is only read. Without DATABASE_URL it is that of `millstream dev` in --data. Exit status 5 when something does not fit; warnings alone leave it 0."
)]
pub struct Args {
    /// The synced tables
    #[arg(long, env = "MILLSTREAM_CONFIG", default_value = "millstream.toml")]
    pub config: PathBuf,
    /// How to print
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    pub output: Output,
    /// Name of the replication slot
    #[arg(long, env = "MILLSTREAM_SLOT", default_value = "millstream")]
    pub slot: String,
    /// The database, preferably as owner of the tables.
    #[command(flatten)]
    pub database: DatabaseArgs,
}

/// It could not be checked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `millstream.toml` cannot be read.
    #[error("the configuration is not usable")]
    Config(#[source] ConfigError),
    /// Nothing says which database.
    #[error("which database?")]
    NoDatabase(#[source] NoDatabase),
    /// The database cannot be reached.
    #[error("the database")]
    Connect(#[source] setup::Error),
    /// The database cannot be read.
    #[error("cannot read the database's catalog")]
    Postgres(#[source] sqlx::Error),
    /// Publication and replica identities cannot be read.
    #[error("cannot read what is replicated")]
    Replication(#[source] Box<millstream_catalog::Unanswered>),
    /// Nobody listens.
    #[error("cannot write to stdout")]
    Output(#[source] io::Error),
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
    fn new(message: impl Into<String>) -> Problem {
        Problem { message: message.into(), ..Problem::default() }
    }

    /// Of a synced table.
    fn table(name: &str, message: impl Into<String>) -> Problem {
        Problem { place: Some(format!("[tables.{name}]")), ..Problem::new(message) }
    }

    /// From a text that begins with its section.
    fn sectioned(text: &str) -> Problem {
        match text.split_once("]: ") {
            Some((section, message)) if section.starts_with('[') => {
                Problem { place: Some(format!("{section}]")), ..Problem::new(message) }
            }
            _ => Problem::new(text),
        }
    }

    fn fix(self, fix: impl Into<String>) -> Problem {
        Problem { fix: Some(fix.into()), ..self }
    }

    /// For people, over several lines; `label` is `warning: ` or nothing.
    fn text(&self, file: &Path, label: &str) -> String {
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

/// Problems and warnings that `check` found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// What does not fit.
    pub problems: Vec<Problem>,
    /// What works, and may let clients do more than is meant.
    pub warnings: Vec<Problem>,
}

/// What `-o json` prints.
#[derive(Serialize)]
struct Report<'a> {
    ok: bool,
    config: &'a Path,
    problems: &'a [Problem],
    warnings: &'a [Problem],
}

/// Runs `millstream check`.
pub async fn run(args: Args) -> Result<Exit, Error> {
    let path = &args.config;
    let text = std::fs::read_to_string(path)
        .map_err(|source| Error::Config(ConfigError::Read { path: path.clone(), source }))?;
    let Findings { problems, warnings } = match Config::parse(&text, path) {
        Ok(config) => {
            let mut connection = setup::connect(&args.database.find().map_err(Error::NoDatabase)?, Duration::ZERO)
                .await
                .map_err(Error::Connect)?;
            let mut found = check(&mut connection, &config, &text).await?;
            found.problems.extend(database::slot(&mut connection, &args.slot).await?);
            found
        }
        // Without its structure there is nothing to hold against the database.
        Err(ConfigError::Parse { source, .. }) => {
            let line = source.span().map(|span| locate::line(&text, span.start));
            let problem = Problem { line, ..Problem::new(source.to_string().trim_end()) };
            Findings { problems: vec![problem], warnings: Vec::new() }
        }
        Err(error) => return Err(Error::Config(error)),
    };
    let ok = problems.is_empty();
    let output = match args.output {
        Output::Json => {
            let report = Report { ok, config: path, problems: &problems, warnings: &warnings };
            format!("{}\n", serde_json::to_string(&report).unwrap_or_default())
        }
        Output::Text => {
            let mut parts: Vec<String> = problems.iter().map(|problem| problem.text(path, "")).collect();
            parts.extend(warnings.iter().map(|warning| warning.text(path, "warning: ")));
            if ok {
                parts.push(format!("{}: fits the database\n", path.display()));
            }
            parts.join("\n")
        }
    };
    io::stdout().lock().write_all(output.as_bytes()).map_err(Error::Output)?;
    for (found, what) in [(problems.len(), "problem"), (warnings.len(), "warning")] {
        if found > 0 {
            eprintln!("{found} {what}{}", if found == 1 { "" } else { "s" });
        }
    }
    Ok(if ok { Exit::Ok } else { Exit::Problems })
}

/// Everything that does not fit, of the file first, and what may be meant otherwise. `text` is the file, for places in it.
///
/// # Errors
/// The database cannot be asked.
pub async fn check(connection: &mut PgConnection, config: &Config, text: &str) -> Result<Findings, Error> {
    let mut problems: Vec<Problem> = config.problems().iter().map(|text| Problem::sectioned(text)).collect();
    let (catalog, misfits) = Catalog::collect(connection, config).await.map_err(|error| match error {
        CatalogError::Query(source) => Error::Postgres(source),
        other => Error::Postgres(sqlx::Error::Protocol(other.to_string())),
    })?;
    problems.extend(misfits.iter().map(|error| Problem::sectioned(&error.to_string())));
    problems.extend(names::check(&catalog));
    let mut warnings = database::unindexed(connection, &catalog).await?;
    warnings.extend(database::stand_in_keys(connection, &catalog).await?);
    warnings.extend(database::emitters(connection).await?);
    warnings.extend(numeric::undeclared(&catalog));
    for table in &catalog.tables {
        problems.extend(predicate::check(connection, table).await.map_err(Error::Postgres)?);
        warnings.extend(predicate::unguarded(connection, table).await.map_err(Error::Postgres)?);
    }
    problems.extend(database::check(connection, config, &catalog).await?);
    for problem in problems.iter_mut().chain(&mut warnings) {
        problem.line = problem.place.as_deref().and_then(|place| locate::place(text, place));
    }
    Ok(Findings { problems, warnings })
}

/// What `setup` does not mend, or would make worse: it changes nothing while there is any of it.
///
/// # Errors
/// The database cannot be asked.
pub async fn before_setup(connection: &mut PgConnection, config: &Config) -> Result<Vec<Problem>, Error> {
    let (catalog, misfits) = Catalog::collect(connection, config).await.map_err(|error| match error {
        CatalogError::Query(source) => Error::Postgres(source),
        other => Error::Postgres(sqlx::Error::Protocol(other.to_string())),
    })?;
    // A column in `writable` that is not there stops nothing, nor does a number that SQLite cannot have as declared.
    let stops =
        |misfit: &&CatalogError| !matches!(misfit, CatalogError::Writable { .. } | CatalogError::Numeric { .. });
    let misfits = misfits.iter().filter(stops);
    let mut problems: Vec<Problem> = misfits.map(|error| Problem::sectioned(&error.to_string())).collect();
    problems.extend(names::check(&catalog));
    problems.extend(database::unroutable(connection, &catalog).await?);
    Ok(problems)
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
