//! Rows that no snapshot can read.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use millstream_runtime::postgres::is_about_content;

/// Tables with rows that Postgres cannot write as text, because that is over 1 GB or what is stored is damaged. COPY fails at such
/// a row, so the first snapshot that meets one fails; those after it ask about every row of the table (`millstream.has_text`),
/// and leave out what cannot be written.
#[derive(Clone, Default)]
pub struct Unwritable {
    found: Arc<Mutex<HashMap<String, Instant>>>,
}

impl Unwritable {
    /// For so long after a failure, rows of its table are tried one by one.
    const TRIED: Duration = Duration::from_secs(3600);

    /// Whether rows of a table are to be tried.
    pub fn is_known(&self, table: &str) -> bool {
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        found.retain(|_, at| at.elapsed() < Self::TRIED);
        found.contains_key(table)
    }

    /// Notes that copying rows of a table has failed, if it did so by its rows.
    pub fn note(&self, table: &str, error: &sqlx::Error) {
        let code = error.as_database_error().and_then(|error| error.code());
        // The server being short of memory says nothing about a row.
        let Some(code) = code.filter(|code| is_about_content(code) && !code.starts_with("53")) else { return };
        tracing::error!(
            table,
            sqlstate = %code,
            "Postgres cannot write a row of the table as text; clients get the table without such rows"
        );
        self.found.lock().unwrap_or_else(PoisonError::into_inner).insert(table.to_owned(), Instant::now());
    }
}
