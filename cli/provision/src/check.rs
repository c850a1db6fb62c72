//! Holds `millstream.toml` against the live database and says everything that does not fit, with the remedy. It reads the
//! database and changes nothing there.

mod database;
mod locate;
mod numeric;
mod predicate;
mod problem;

use millstream_catalog::{Catalog, CatalogError, Config, store_misfits};
use sqlx::PgConnection;

pub use self::database::slot;
pub use self::problem::{Error, Excerpt, Problem};

/// Problems and warnings that `check` found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// What does not fit.
    pub problems: Vec<Problem>,
    /// What works, and may let clients do more than is meant.
    pub warnings: Vec<Problem>,
}

/// A file that is not TOML, or has another structure: there is nothing to hold against the database.
pub fn unreadable(text: &str, error: &toml::de::Error) -> Problem {
    let line = error.span().map(|span| locate::line(text, span.start));
    Problem { line, ..Problem::new(error.to_string().trim_end()) }
}

/// Everything that does not fit, of the file first, and what may be meant otherwise. `text` is the file, for places in it.
///
/// # Errors
/// The database cannot be asked.
pub async fn check(connection: &mut PgConnection, config: &Config, text: &str) -> Result<Findings, Error> {
    let mut problems: Vec<Problem> = config.problems().iter().map(|text| Problem::sectioned(text)).collect();
    // As the executor reads predicates.
    config.session.set_search_path(connection).await.map_err(Error::Postgres)?;
    let (catalog, misfits) = Catalog::collect(connection, config).await.map_err(|error| match error {
        CatalogError::Query(source) => Error::Postgres(source),
        other => Error::Postgres(sqlx::Error::Protocol(other.to_string())),
    })?;
    problems.extend(misfits.iter().map(|error| Problem::sectioned(&error.to_string())));
    problems.extend(store_misfits(&catalog.tables).into_iter().map(Problem::misfit));
    let mut warnings = database::unindexed(connection, &catalog).await?;
    warnings.extend(database::stand_in_keys(connection, &catalog).await?);
    warnings.extend(database::emitters(connection).await?);
    warnings.extend(database::server_keys(connection, &catalog).await?);
    warnings.extend(numeric::undeclared(&catalog));
    problems.extend(predicate::settings(connection, &config.session).await.map_err(Error::Postgres)?);
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
    problems.extend(store_misfits(&catalog.tables).into_iter().map(Problem::misfit));
    problems.extend(database::unroutable(connection, &catalog).await?);
    Ok(problems)
}
