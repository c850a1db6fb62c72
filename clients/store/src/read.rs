//! Reading: query results, and read-only connections.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use rusqlite::hooks::{AuthAction, AuthContext, Authorization};
use rusqlite::types::Value;
use rusqlite::{Connection, OpenFlags, params_from_iter};

use crate::error::{During, StoreError};
use crate::functions::{self, ConnectionState, Host};
use crate::inspection;
use crate::limits::BUSY_TIMEOUT_MS;

/// Prepared statements kept by a reader.
const STATEMENTS: usize = 64;
/// SQLite's instructions between two questions whether a check is to go on.
const STOP_OPS: i32 = 10_000;

/// The result of a query.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Table {
    /// Names of the columns.
    pub columns: Vec<String>,
    /// The rows, each with one value a column.
    pub rows: Vec<Vec<Value>>,
}

pub(crate) fn query(connection: &Connection, sql: &str, params: &[Value]) -> Result<Table, StoreError> {
    let mut statement = connection.prepare_cached(sql).map_err(StoreError::statement)?;
    let columns: Vec<String> = statement.column_names().into_iter().map(str::to_owned).collect();
    let mut rows = statement.query(params_from_iter(params)).map_err(StoreError::statement)?;
    let mut found = Vec::new();
    while let Some(row) = rows.next().map_err(StoreError::statement)? {
        let values: rusqlite::Result<Vec<Value>> = (0..columns.len()).map(|index| row.get(index)).collect();
        found.push(values.map_err(StoreError::statement)?);
    }
    Ok(Table { columns, rows: found })
}

/// What a query reads.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reads {
    /// Its tables, also behind views. What the database consists of is `sqlite_master`.
    pub tables: BTreeSet<String>,
    /// It reads what can change with any table: a virtual table, which reads where it likes, or a shadow table, which is written when
    /// the virtual one sees fit.
    pub any: bool,
}

/// A read-only connection.
pub struct Reader {
    connection: Connection,
    seen: Arc<Mutex<BTreeSet<String>>>,
}

impl Reader {
    /// Opens the store at `path`, which must exist.
    ///
    /// # Errors
    /// SQLite failed.
    pub fn open(path: &str, host: Arc<dyn Host>) -> Result<Reader, StoreError> {
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(path, flags).during("opening the store for reading")?;
        connection
            .busy_timeout(std::time::Duration::from_millis(BUSY_TIMEOUT_MS))
            .during("setting the busy timeout")?;
        connection.set_prepared_statement_cache_capacity(STATEMENTS);
        functions::register(&connection, &Arc::new(ConnectionState::new(host)), false)?;
        let seen = Arc::new(Mutex::new(BTreeSet::new()));
        let sink = Arc::clone(&seen);
        let hook = move |context: AuthContext<'_>| {
            if let AuthAction::Read { table_name, .. } = context.action {
                sink.lock().unwrap_or_else(PoisonError::into_inner).insert(table_name.to_owned());
            }
            Authorization::Allow
        };
        connection.authorizer(Some(hook)).during("installing the authorizer")?;
        Ok(Reader { connection, seen })
    }

    /// Runs a query.
    ///
    /// # Errors
    /// [`StoreError::Statement`]: SQLite refuses it.
    pub fn query(&self, sql: &str, params: &[Value]) -> Result<Table, StoreError> {
        query(&self.connection, sql, params)
    }

    /// What a query reads.
    ///
    /// # Errors
    /// [`StoreError::Statement`]: SQLite does not take it.
    pub fn reads(&self, sql: &str) -> Result<Reads, StoreError> {
        let take = || std::mem::take(&mut *self.seen.lock().unwrap_or_else(PoisonError::into_inner));
        take();
        // Not from the cache: SQLite names the tables while it compiles.
        self.connection.prepare(sql).map_err(StoreError::statement)?;
        let mut reads = Reads::default();
        for name in take() {
            match name.as_str() {
                // They read their arguments.
                "json_each" | "json_tree" => {}
                "sqlite_master" | "sqlite_schema" => drop(reads.tables.insert("sqlite_master".into())),
                _ if self.is_virtual(&name)? => reads.any = true,
                _ => drop(reads.tables.insert(name)),
            }
        }
        take();
        Ok(reads)
    }

    /// Whether this is no table that is written by its own name: a virtual table, a shadow table of one, or a table-valued function.
    fn is_virtual(&self, name: &str) -> Result<bool, StoreError> {
        // A virtual table has no pages of its own. Its shadow tables are named after it.
        let sql = "SELECT NOT EXISTS (SELECT 1 FROM sqlite_schema WHERE name = ?1 COLLATE NOCASE) OR EXISTS (SELECT 1 FROM sqlite_schema \
                   WHERE type = 'table' AND rootpage = 0 AND (name = ?1 COLLATE NOCASE \
                   OR substr(?1, 1, length(name) + 1) = (name || '_') COLLATE NOCASE))";
        self.connection
            .prepare_cached(sql)
            .and_then(|mut statement| statement.query_row([name], |row| row.get(0)))
            .during("looking for a table")
    }

    /// Looks through the whole store for damage that shows, which takes some 6 ms a MiB; not for values that are others than they
    /// were. False: `stop`, which is asked now and then, wanted no more.
    ///
    /// # Errors
    /// SQLite failed, or found damage.
    pub fn check(&self, stop: impl FnMut() -> bool + Send + 'static) -> Result<bool, StoreError> {
        self.connection.progress_handler(STOP_OPS, Some(stop)).during("preparing a check")?;
        let result = inspection::sound(&self.connection, "PRAGMA quick_check(100)");
        self.connection.progress_handler(0, None::<fn() -> bool>).during("ending a check")?;
        match result {
            Err(StoreError::Sqlite { source, .. })
                if source.sqlite_error_code() == Some(rusqlite::ErrorCode::OperationInterrupted) =>
            {
                Ok(false)
            }
            result => result.map(|()| true),
        }
    }

    /// The connection, for reports that need more than [`Reader::query`].
    pub fn connection(&self) -> &Connection {
        &self.connection
    }
}
