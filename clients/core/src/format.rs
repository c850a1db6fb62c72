//! The format of a store: the tables of its own, and how those of older versions are brought up to date.

/// Version of [`STORE_TABLES`], kept in `millstream_meta` as `format`. Versions up to 2 were kept in `PRAGMA user_version`, which is the
/// app's by SQLite's own documentation.
pub const STORE_VERSION: i64 = 6;

/// Brings the tables of a store of version 0, where a transaction was known by its `client_seq` alone, up to version 1.
pub const UPGRADE_FROM_0: &str = "
DROP INDEX local_changes_open;
DROP INDEX local_changes_failed;
ALTER TABLE local_changes ADD COLUMN seq INTEGER;
ALTER TABLE local_changes ADD COLUMN instance TEXT;
ALTER TABLE local_changes ADD COLUMN last_error_rule TEXT;
ALTER TABLE local_changes ADD COLUMN outcome TEXT;
UPDATE local_changes SET seq = tx, instance = (SELECT value FROM millstream_meta WHERE key = 'instance') WHERE tx > 0;
INSERT OR REPLACE INTO millstream_meta (key, value) SELECT 'last_tx', coalesce(max(tx), 0) FROM local_changes WHERE tx > 0;
UPDATE local_changes SET tx = (SELECT value FROM millstream_meta WHERE key = 'last_tx') - tx WHERE tx < 0;
INSERT OR REPLACE INTO millstream_meta (key, value) SELECT 'confirmed_instance', value FROM millstream_meta WHERE key = 'instance';
";

/// Brings the tables of a store of version 1, where it was found out at each sending what a transaction has to come after, up
/// to version 2.
pub const UPGRADE_FROM_1: &str = "
ALTER TABLE local_changes ADD COLUMN predecessors TEXT;
DROP INDEX IF EXISTS local_changes_live;
CREATE INDEX local_changes_live ON local_changes (tbl, key, seq) WHERE state <> 'confirmed';
UPDATE local_changes AS entry SET predecessors = (SELECT nullif(json_group_array(before), '[]') FROM (
    SELECT DISTINCT (SELECT max(e.seq) FROM local_changes AS e INDEXED BY local_changes_live WHERE e.tbl = mine.tbl AND e.key = mine.key
        AND e.state <> 'confirmed' AND e.seq < mine.seq AND e.tx < mine.tx) AS before
    FROM local_changes AS mine WHERE mine.tx = entry.tx) WHERE before IS NOT NULL)
WHERE id IN (SELECT min(id) FROM local_changes WHERE seq IS NOT NULL AND state <> 'confirmed' GROUP BY tx);
";

/// Brings the tables of a store of version 2 up to version 3: the number is the app's from now on.
pub const UPGRADE_FROM_2: &str = "PRAGMA user_version = 0;";

/// Brings the tables of a store of version 3, where every value was what a column becomes, up to version 4.
pub const UPGRADE_FROM_3: &str =
    "ALTER TABLE local_changes ADD COLUMN adds TEXT; ALTER TABLE local_changes ADD COLUMN gone INTEGER;";

/// Brings the tables of a store of version 4, whose triggers recorded values as they were written, up to version 5.
pub const UPGRADE_FROM_4: &str = "";

/// Brings the tables of a store of version 5, which staged every row of a snapshot whole, up to version 6. A snapshot that was cut begins
/// again.
pub const UPGRADE_FROM_5: &str =
    "DROP TABLE IF EXISTS millstream_snapshot; DELETE FROM millstream_meta WHERE key = 'snapshot';";

/// Tables of the store itself.
///
/// `millstream_aside` keeps what the app added and had to give way. (Version 4 has it, and nothing else that version 3 has not.)
///
/// In `local_changes`, `tx` names the local transaction for good; `seq` is its `client_seq`, which it gets when it may be
/// sent and again when it is sent anew after a rejection, and `instance` is the run of the store that gave it. `predecessors`
/// are the numbers of those that it has to come after, as a JSON array on the transaction's first entry, if there are any. `adds` names
/// the columns whose value is an amount to add, as a JSON array; null: none. `gone` is 1 of a delete whose row an earlier one took along.
///
/// `millstream_snapshot` is the difference between the confirmed rows and a snapshot that is arriving. `row` is the row that the snapshot
/// has, as a JSON array of all its values; null where the confirmed row is that row already; and the JSON `null` where the snapshot has
/// no such row, which then leaves unless another scope holds it.
pub const STORE_TABLES: &str = "
CREATE TABLE IF NOT EXISTS local_changes (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    tx INTEGER NOT NULL,
    seq INTEGER,
    instance TEXT,
    predecessors TEXT,
    change_id TEXT NOT NULL UNIQUE,
    tbl TEXT NOT NULL,
    key TEXT NOT NULL,
    op TEXT NOT NULL CHECK (op IN ('insert', 'update', 'delete')),
    columns TEXT NOT NULL,
    vals TEXT NOT NULL,
    previous TEXT,
    stamp INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('pending', 'sending', 'accepted', 'retry_wait', 'error', 'held', 'confirmed')),
    attempts INTEGER NOT NULL DEFAULT 0,
    next_attempt INTEGER,
    last_error_code TEXT,
    last_error_rule TEXT,
    last_error TEXT,
    outcome TEXT CHECK (outcome IN ('merged', 'superseded')),
    traceparent TEXT,
    recorded_at INTEGER NOT NULL,
    adds TEXT,
    gone INTEGER
);
CREATE INDEX IF NOT EXISTS local_changes_by_tx ON local_changes (tx);
CREATE INDEX IF NOT EXISTS local_changes_by_seq ON local_changes (seq) WHERE seq IS NOT NULL;
CREATE INDEX IF NOT EXISTS local_changes_live ON local_changes (tbl, key, seq) WHERE state <> 'confirmed';
CREATE INDEX IF NOT EXISTS local_changes_troubled ON local_changes (tx) WHERE state <> 'confirmed' AND (attempts > 0 OR state = 'held');
CREATE TABLE IF NOT EXISTS millstream_base (tbl TEXT NOT NULL, key TEXT NOT NULL, row TEXT, PRIMARY KEY (tbl, key)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS millstream_meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS millstream_scopes (kind TEXT NOT NULL, id TEXT NOT NULL, replaced INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (kind, id)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS millstream_aside (kind TEXT NOT NULL, name TEXT NOT NULL COLLATE NOCASE, tbl TEXT, reason TEXT NOT NULL, sql TEXT, moved_to TEXT, PRIMARY KEY (kind, name)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS millstream_spill (n INTEGER PRIMARY KEY, part INTEGER NOT NULL, changes TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS millstream_snapshot (tbl TEXT NOT NULL, key TEXT NOT NULL, row TEXT, PRIMARY KEY (tbl, key)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS millstream_snapshot_differs ON millstream_snapshot (tbl, key) WHERE row IS NOT NULL;
";

/// Name of the queue's table.
pub const LOCAL_CHANGES: &str = "local_changes";

/// Names that synced tables may not have.
pub fn is_reserved(table: &str) -> bool {
    let name = table.to_ascii_lowercase();
    name == LOCAL_CHANGES || name.starts_with("millstream_") || name.starts_with("sqlite_")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reserved_names() {
        assert!(is_reserved("local_changes") && is_reserved("Millstream_meta") && is_reserved("sqlite_x"));
        assert!(!is_reserved("tasks"));
    }
}
