//! Which tables were written, for those who watch them.
//!
//! SQLite's update hook names the rows of rowid tables and of no others: it is silent about `WITHOUT ROWID` tables, about what
//! `DELETE FROM t` takes at a stroke, and names a virtual table by its shadow tables at best. Therefore the authorizer is asked,
//! too: while SQLite compiles a statement it names every table that the statement can write, through triggers of any depth. Those
//! count as written when the statement has changed anything. (SQLite documentation, `sqlite3_update_hook`, `sqlite3_set_authorizer`)

use std::collections::BTreeSet;
use std::sync::PoisonError;

use rusqlite::Connection;

use crate::error::During;
use crate::limits::STATEMENTS;
use crate::{Store, StoreError};

/// The store's own tables that the update hook is silent about.
const SILENT: [&str; 5] =
    ["millstream_aside", "millstream_base", "millstream_meta", "millstream_scopes", "millstream_snapshot"];

impl Store {
    /// Runs a statement of the app's, and notes the tables that it wrote.
    pub(crate) fn noting<T>(&self, sql: &str, run: impl FnOnce(&Connection) -> T) -> T {
        // As the cache knows it.
        let sql = sql.trim();
        let before = self.connection.total_changes();
        // What was compiled before is not this statement's.
        self.session.take_compiled();
        self.forget_effects(false);
        let result = run(&self.connection);
        let compiled = self.session.take_compiled();
        let mut effects = self.watched.effects.lock().unwrap_or_else(PoisonError::into_inner);
        if !compiled.is_empty() {
            effects.insert(sql.to_owned(), compiled);
        }
        if self.connection.total_changes() != before
            && let Some(tables) = effects.get(sql)
        {
            self.written.lock().unwrap_or_else(PoisonError::into_inner).extend(tables.iter().cloned());
        }
        result
    }

    /// Forgets the effects of the statements in the cache, and the cache with them, when there are as many as it holds, or at once.
    fn forget_effects(&self, at_once: bool) {
        let mut effects = self.watched.effects.lock().unwrap_or_else(PoisonError::into_inner);
        if at_once || effects.len() >= STATEMENTS {
            effects.clear();
            self.connection.flush_prepared_statement_cache();
        }
    }

    /// Everything may have been written: tables were made, changed or dropped, or the app had the connection itself.
    pub(crate) fn note_all(&self) -> Result<(), StoreError> {
        self.forget_effects(true);
        let during = "reading the names of all tables";
        let mut statement =
            self.connection.prepare("SELECT name FROM sqlite_schema WHERE type = 'table'").during(during)?;
        let names = statement.query_map([], |row| row.get::<_, String>(0)).during(during)?;
        let names: BTreeSet<String> = names.collect::<rusqlite::Result<_>>().during(during)?;
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        written.extend(names);
        written.insert("sqlite_master".into());
        Ok(())
    }

    /// The tables written by this connection since the last call. Among them may be some that a statement could have written, but
    /// did not; none is missing. A virtual table is there under the names of its shadow tables, or under its own.
    pub fn take_written(&mut self) -> BTreeSet<String> {
        let mut written = std::mem::take(&mut *self.written.lock().unwrap_or_else(PoisonError::into_inner));
        let changes = self.connection.total_changes();
        if std::mem::replace(&mut self.watched.changes, changes) != changes {
            written.extend(SILENT.map(str::to_owned));
            written.extend(self.session.fired());
        }
        written
    }
}
