//! Names and keys that clients' stores cannot take, or not for what they are. Pure.

use std::collections::HashMap;

use crate::model::Table;
use crate::replication::Misfit;

/// The store's own table beside those that begin with its name.
const QUEUE: &str = "local_changes";

/// What no client could make a table of, or find the rows of again.
pub fn store_misfits(tables: &[Table]) -> Vec<Misfit> {
    let synced = || tables.iter().filter(|table| table.synced);
    let alike = alike(synced().map(|table| table.name.as_str())).into_iter().map(|(one, other)| Misfit {
        table: other.to_owned(),
        message: format!("SQLite takes its name for that of `{one}`: they differ in case only"),
        fix: "rename one of them, or leave one out of the file".to_owned(),
    });
    alike.chain(synced().flat_map(of)).collect()
}

fn of(table: &Table) -> Vec<Misfit> {
    let misfit = |message: String, fix: String| Misfit { table: table.name.clone(), message, fix };
    let mut found = Vec::new();
    let name = table.name.to_ascii_lowercase();
    if name == QUEUE || name.starts_with("millstream_") || name.starts_with("sqlite_") {
        found.push(misfit(
            "its name is reserved in clients' stores".to_owned(),
            format!("ALTER TABLE {} RENAME TO another name, or leave it out of the file", table.sql_name),
        ));
    }
    for (one, other) in alike(table.columns.iter().map(|column| column.name.as_str())) {
        found.push(misfit(
            format!("SQLite takes `{one}` and `{other}` for one column: they differ in case only"),
            format!("rename one of them, or keep it back: hidden = [\"{other}\"]"),
        ));
    }
    for column in table.key.iter().map(|index| &table.columns[*index]) {
        if matches!(column.sql_type.as_str(), "real" | "double precision") {
            found.push(misfit(
                format!(
                    "`{}` of its key is {}: such numbers are spelled in one way by Postgres and in another by SQLite, so that \
                     clients would not find their rows again",
                    column.name, column.sql_type
                ),
                format!("ALTER TABLE {} ALTER COLUMN {} TYPE numeric", table.sql_name, column.sql_name),
            ));
        }
    }
    found
}

/// Pairs of names that SQLite takes for one: it ignores the case of ASCII letters.
fn alike<'n>(names: impl Iterator<Item = &'n str>) -> Vec<(&'n str, &'n str)> {
    let mut seen: HashMap<String, &str> = HashMap::new();
    names.filter_map(|name| seen.insert(name.to_ascii_lowercase(), name).map(|before| (before, name))).collect()
}
