//! Rows of transactions that are too large to wait in memory for their end: kept aside, invisible to the app, and applied from
//! there in the one local transaction that makes them visible.

use millstream_schemas::TableChanges;
use rusqlite::{OptionalExtension, params};

use crate::apply::Applier;
use crate::error::{During, encode, parse};
use crate::{Store, StoreError};

/// Rows in one piece; pieces are read one at a time.
const PIECE_ROWS: usize = 1_000;

impl Store {
    /// Keeps rows aside, behind what there is under this number.
    pub(crate) fn spill(&mut self, part: u64, changes: &[TableChanges]) -> Result<(), StoreError> {
        self.transact(|store| {
            let mut statement = store
                .connection
                .prepare_cached("INSERT INTO millstream_spill (part, changes) VALUES (?1, ?2)")
                .during("preparing to keep rows aside")?;
            for change in changes {
                // A change without rows (TRUNCATE) is a piece, too.
                let first = change.rows.len().min(PIECE_ROWS);
                let pieces = change.rows[first..].chunks(PIECE_ROWS);
                for rows in std::iter::once(&change.rows[..first]).chain(pieces) {
                    let piece = TableChanges {
                        table: change.table.clone(),
                        op: change.op,
                        columns: change.columns.clone(),
                        rows: rows.to_vec(),
                    };
                    statement.execute(params![part as i64, encode(&piece)]).during("keeping rows aside")?;
                }
            }
            Ok(())
        })
    }

    /// Forgets what was kept aside: under a number, or all.
    pub(crate) fn clear_spill(&mut self, part: Option<u64>) -> Result<(), StoreError> {
        self.connection
            .execute(
                "DELETE FROM millstream_spill WHERE ?1 IS NULL OR part = ?1",
                params![part.map(|part| part as i64)],
            )
            .during("forgetting rows kept aside")?;
        Ok(())
    }
}

impl Applier<'_> {
    /// Applies what was kept aside under a number, and forgets it.
    pub fn spilled(&mut self, part: u64) -> Result<(), StoreError> {
        let part = part as i64;
        let mut last = 0_i64;
        loop {
            let piece: Option<(i64, String)> = self
                .store
                .connection
                .prepare_cached("SELECT n, changes FROM millstream_spill WHERE n > ?1 AND part = ?2 ORDER BY n LIMIT 1")
                .and_then(|mut statement| {
                    statement.query_row(params![last, part], |row| Ok((row.get(0)?, row.get(1)?))).optional()
                })
                .during("reading rows kept aside")?;
            let Some((n, text)) = piece else { break };
            last = n;
            self.rows(&[parse(&text, "rows kept aside")?], false)?;
        }
        self.store
            .connection
            .prepare_cached("DELETE FROM millstream_spill WHERE part = ?1")
            .and_then(|mut statement| statement.execute([part]))
            .during("forgetting rows kept aside")?;
        Ok(())
    }
}
