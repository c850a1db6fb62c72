//! SQLite tables and triggers, generated from the schema.
//!
//! A synced table is a real SQLite table. Its columns have the affinity of their Postgres type and neither NOT NULL nor
//! foreign keys, because the server's truth may arrive in any order. Three triggers a table record what the app writes:
//! the change in `local_changes`, and the row as the server knows it in `millstream_base`, in the app's own transaction.
//!
//! The triggers are silent while the store itself writes: `millstream_tx()` is null then. They call these functions of
//! the store's connection: `millstream_tx()`, `millstream_seq()`, `millstream_instance()`, `millstream_uuid()`,
//! `millstream_stamp(clocks)`, `millstream_now()`, `millstream_traceparent()`, `millstream_spelt(name, type, text)`, which
//! refuses what Postgres would give back in another spelling, `millstream_spelling(type, text)`, which gives that spelling, or
//! null where it is not known or no other, `millstream_real(type, value)`, the same for values of `REAL` columns, and
//! `millstream_double(value)`, a number as Postgres writes it.
//!
//! Keys are refused in another spelling, since rows are known by them. Of other columns the spelling is recorded, and two more triggers
//! bring it to the row, so that values compare the same before and after their confirmation. That is no change: the trigger that records
//! updates compares by the same function.
//!
//! SQLite applies the conflict clause of the app's statement (`INSERT OR REPLACE`) to statements inside triggers too.
//! Therefore nothing here relies on `OR IGNORE`; existence is asked for.

use millstream_schemas::spelling::is_spelt;
use millstream_schemas::{Merge, TableSchema};

use crate::sql::{joined, literal, quote};
use crate::types::{Kind, MAX_DIGITS, text_expr};

/// Through how many references a delete is followed to the one that took its row along.
const MAX_CASCADE: usize = 4;

/// SQL of the `CREATE TABLE`.
pub fn create_table(table: &TableSchema) -> String {
    let columns: Vec<String> = (0..table.columns.len()).map(|index| declared(table, index)).collect();
    let key: Vec<String> = table.key.iter().map(|&index| quote(&table.columns[index].name)).collect();
    format!("CREATE TABLE {} ({}, PRIMARY KEY ({}))", quote(&table.name), columns.join(", "), key.join(", "))
}

/// SQL of an `ALTER TABLE … ADD COLUMN`.
pub fn add_column(table: &TableSchema, column: usize) -> String {
    format!("ALTER TABLE {} ADD COLUMN {}", quote(&table.name), declared(table, column))
}

/// A column's name, type and default: what the server would fill in shows at once. Parts of the key have to be given.
fn declared(table: &TableSchema, index: usize) -> String {
    let column = &table.columns[index];
    let kind = Kind::of(column);
    let value = column.default.as_deref().filter(|_| !table.key.contains(&index));
    let default = value.and_then(|text| kind.literal(text)).map(|literal| format!(" DEFAULT {literal}"));
    format!("{} {}{}", quote(&column.name), kind.declaration(), default.unwrap_or_default())
}

/// SQL that drops the triggers of a table, if they exist.
pub fn drop_triggers(table: &str) -> String {
    ["insert", "update", "delete", "spell_insert", "spell_update"]
        .map(|op| format!("DROP TRIGGER IF EXISTS {};", quote(&format!("millstream_{op}_{table}"))))
        .join("\n")
}

/// SQL that gives the key as the JSON array that `local_changes` and `millstream_base` hold. `prefix` is `NEW.`, `OLD.` or empty.
pub fn key_expr(table: &TableSchema, prefix: &str) -> String {
    let parts: Vec<String> =
        table.key.iter().map(|&index| format!("json_quote({})", column_text(table, index, prefix))).collect();
    format!("'[' || {} || ']'", parts.join(" || ',' || "))
}

/// SQL that gives the row as a JSON object of text values.
pub fn row_expr(table: &TableSchema, prefix: &str) -> String {
    let parts: Vec<String> = (0..table.columns.len())
        .map(|index| {
            let comma = if index == 0 { "" } else { "," };
            let name = name_literal(table, index, comma, ":");
            format!("{name} || json_quote({})", column_text(table, index, prefix))
        })
        .collect();
    format!("'{{' || {} || '}}'", joined(&parts, "||"))
}

fn column_text(table: &TableSchema, index: usize, prefix: &str) -> String {
    let column = &table.columns[index];
    text_expr(Kind::of(column), &format!("{prefix}{}", quote(&column.name)))
}

/// The column's name as JSON, within an SQL literal.
fn name_literal(table: &TableSchema, index: usize, prefix: &str, suffix: &str) -> String {
    let name = serde_json::Value::String(table.columns[index].name.clone()).to_string();
    literal(&format!("{prefix}{name}{suffix}"))
}

/// A JSON array of those parts whose condition holds: each part is (condition, JSON expression).
fn json_list(parts: &[(String, String)]) -> String {
    if parts.is_empty() {
        return "'[]'".into();
    }
    let parts: Vec<String> =
        parts.iter().map(|(when, json)| format!("CASE WHEN {when} THEN ',' || {json} ELSE '' END")).collect();
    format!("'[' || substr({}, 2) || ']'", joined(&parts, "||"))
}

fn refuse(message: &str, when: &str) -> String {
    format!("  SELECT RAISE(ABORT, {}) WHERE {when};\n", literal(&format!("millstream: {message}")))
}

fn keep_base(table: &TableSchema, key: &str, row: &str) -> String {
    let name = literal(&table.name);
    format!(
        "  INSERT INTO millstream_base (tbl, key, row) SELECT {name}, {key}, {row} \
         WHERE NOT EXISTS (SELECT 1 FROM millstream_base WHERE tbl = {name} AND key = {key});\n"
    )
}

/// What an entry of the queue says of the row's columns, in SQL.
struct EntrySql<'a> {
    columns: &'a str,
    values: &'a str,
    adds: &'a str,
    gone: &'a str,
    previous: &'a str,
}

/// `when`: a condition, or nothing.
fn record(table: &TableSchema, op: &str, key: &str, entry: &EntrySql<'_>, when: &str) -> String {
    let EntrySql { columns, values, adds, gone, previous } = entry;
    // Whoever edits a row has seen its newest change, so the edit is newer, however slow the clock here is.
    let seen = match table.clocks {
        Some(clocks) if op != "insert" => format!("OLD.{}", quote(&table.columns[clocks].name)),
        _ => "NULL".to_owned(),
    };
    format!(
        "  INSERT INTO local_changes (tx, seq, instance, change_id, tbl, key, op, columns, vals, adds, gone, previous, stamp, state, traceparent, recorded_at)\n  \
         SELECT millstream_tx(), millstream_seq(), millstream_instance(), millstream_uuid(), {}, {key}, '{op}', {columns}, {values}, {adds}, {gone}, {previous}, \
         millstream_stamp({seen}), 'pending', millstream_traceparent(), millstream_now(){when};\n",
        literal(&table.name)
    )
}

fn trigger(table: &TableSchema, op: &str, when: &str, body: &str) -> String {
    format!(
        "CREATE TRIGGER {} AFTER {} ON {} WHEN millstream_tx() IS NOT NULL{when} BEGIN\n{body}END;",
        quote(&format!("millstream_{op}_{}", table.name)),
        op.to_uppercase(),
        quote(&table.name)
    )
}

/// SQL of the three triggers of a table among those of the schema. `defaults`: of each column, the SQL of the default that SQLite has for
/// it, if any.
///
/// A trigger cannot tell a null that was written from one that was left out. Where SQLite has a default, it was written; else it
/// is left to the server, which may have a default that SQLite cannot.
pub fn create_triggers(table: &TableSchema, tables: &[TableSchema], defaults: &[Option<String>]) -> String {
    let recording = [insert_trigger(table, defaults), update_trigger(table), delete_trigger(table, tables)];
    [&recording[..], &spelling_triggers(table)].concat().join("\n")
}

/// Whether Postgres' spelling of a column's values is known, and its values can be brought to it.
fn is_respelt(table: &TableSchema, index: usize) -> bool {
    let column = &table.columns[index];
    let by_its_kind = !matches!(Kind::of(column), Kind::Integer | Kind::Units { .. });
    column.writable && !table.key.contains(&index) && by_its_kind && is_spelt(&column.r#type)
}

/// SQL that gives a value in Postgres' spelling.
fn spelling_of(table: &TableSchema, index: usize, value: &str) -> String {
    format!("coalesce({}, {value})", other_spelling(table, index, value))
}

/// SQL that gives what becomes of a value that Postgres would give back as another one, else null.
fn other_spelling(table: &TableSchema, index: usize, value: &str) -> String {
    let sql_type = &table.columns[index].r#type;
    let named = literal(sql_type);
    match Kind::of(&table.columns[index]) {
        Kind::Bool => format!(
            "CASE WHEN typeof({value}) = 'text' THEN \
             CASE coalesce(millstream_spelling({named}, {value}), {value}) WHEN 't' THEN 1 WHEN 'f' THEN 0 END END"
        ),
        Kind::Bytes => format!("iif(typeof({value}) <> 'blob', CAST({value} AS BLOB), NULL)"),
        // Of these every number of SQLite's is one.
        Kind::Real if matches!(sql_type.as_str(), "double precision" | "numeric") => {
            format!("iif(typeof({value}) = 'text', millstream_real({named}, {value}), NULL)")
        }
        Kind::Real => format!("millstream_real({named}, {value})"),
        Kind::Integer | Kind::Units { .. } | Kind::Text => format!("millstream_spelling({named}, {value})"),
    }
}

/// SQL that gives the text that is recorded for a column.
fn recorded_text(table: &TableSchema, index: usize, prefix: &str) -> String {
    let text = column_text(table, index, prefix);
    if !is_respelt(table, index) {
        return text;
    }
    let column = &table.columns[index];
    match Kind::of(column) {
        Kind::Text => {
            format!("coalesce({}, {text})", other_spelling(table, index, &format!("{prefix}{}", quote(&column.name))))
        }
        Kind::Bool | Kind::Real => {
            format!("coalesce(millstream_spelling({}, {text}), {text})", literal(&column.r#type))
        }
        Kind::Integer | Kind::Units { .. } | Kind::Bytes => text,
    }
}

/// SQL that says whether an update changes a column.
fn changes(table: &TableSchema, index: usize) -> String {
    let name = quote(&table.columns[index].name);
    let differs = format!("OLD.{name} IS NOT NEW.{name}");
    if !is_respelt(table, index) {
        return differs;
    }
    let spelt = |prefix| spelling_of(table, index, &format!("{prefix}{name}"));
    format!("({differs} AND {} IS NOT {})", spelt("OLD."), spelt("NEW."))
}

/// SQL of the triggers that bring the columns of a row that the app wrote to Postgres' spelling.
fn spelling_triggers(table: &TableSchema) -> Vec<String> {
    let respelt: Vec<usize> = (0..table.columns.len()).filter(|&index| is_respelt(table, index)).collect();
    if respelt.is_empty() {
        return Vec::new();
    }
    let name = |index: &usize| quote(&table.columns[*index].name);
    let new = |index: &usize| format!("NEW.{}", name(index));
    let differs = |index: &usize| format!("{} IS NOT NULL", other_spelling(table, *index, &new(index)));
    let set = |index: &usize| format!("{} = {}", name(index), spelling_of(table, *index, &new(index)));
    let key = |index: &usize| format!("{} = {}", name(index), new(index));
    let list = |of: &[usize], sql: &dyn Fn(&usize) -> String| of.iter().map(sql).collect::<Vec<_>>();
    let (columns, set) = (list(&respelt, &name).join(", "), list(&respelt, &set).join(", "));
    let (any, by_key) = (joined(&list(&respelt, &differs), "OR"), list(&table.key, &key).join(" AND "));
    let to = quote(&table.name);
    [("spell_insert", "INSERT".to_owned()), ("spell_update", format!("UPDATE OF {columns}"))]
        .map(|(op, event)| {
            format!(
                "CREATE TRIGGER {} AFTER {event} ON {to} WHEN millstream_tx() IS NOT NULL AND ({any}) BEGIN\n  \
                 UPDATE {to} SET {set} WHERE {by_key};\nEND;",
                quote(&format!("millstream_{op}_{}", table.name))
            )
        })
        .to_vec()
}

/// SQL that refuses what is no number of units, where `when` holds; empty for other kinds.
fn require_units(table: &TableSchema, index: usize, when: &str) -> String {
    let column = &table.columns[index];
    let Kind::Units { precision, scale } = Kind::of(column) else { return String::new() };
    let new = format!("NEW.{}", quote(&column.name));
    let (mut wrong, mut most) =
        (format!("typeof({new}) NOT IN ('integer', 'null') AND {new} IS NOT 'NaN'"), "64 bits".to_owned());
    if precision <= MAX_DIGITS {
        let bound = 10_i64.pow(precision) - 1;
        wrong += &format!(" OR typeof({new}) = 'integer' AND {new} NOT BETWEEN -{bound} AND {bound}");
        most = format!("{precision} digits");
    }
    let (zeros, of_one) = ("0".repeat((scale as usize).saturating_sub(1)), 10_i64.pow(scale));
    let unit = if scale == 0 { "1".to_owned() } else { format!("0.{zeros}1") };
    let message = format!(
        "column \"{}\" of \"{}\", a {}, is kept as a whole number of units of {unit}, with at most {most}: {of_one} for 1",
        column.name, table.name, column.r#type
    );
    refuse(&message, &format!("{when} AND ({wrong})"))
}

fn insert_trigger(table: &TableSchema, defaults: &[Option<String>]) -> String {
    let new = |index: usize| format!("NEW.{}", quote(&table.columns[index].name));
    let mut body = String::new();
    let mut columns = Vec::new();
    let mut values = Vec::new();
    for (index, column) in table.columns.iter().enumerate() {
        let default = defaults.get(index).and_then(Option::as_deref);
        let is_key = table.key.contains(&index);
        if is_key {
            let message = format!("key column \"{}\" of \"{}\" is null", column.name, table.name);
            body += &refuse(&message, &format!("{} IS NULL", new(index)));
            if Kind::of(column) == Kind::Bytes {
                let message =
                    format!("key column \"{}\" of \"{}\" takes a blob, such as x'00ff'", column.name, table.name);
                body += &refuse(&message, &format!("typeof({}) NOT IN ('blob', 'null')", new(index)));
            } else if is_spelt(&column.r#type) {
                let name = literal(&format!("key column \"{}\" of \"{}\"", column.name, table.name));
                let (sql_type, text) = (literal(&column.r#type), column_text(table, index, "NEW."));
                body += &format!("  SELECT millstream_spelt({name}, {sql_type}, {text});\n");
            }
        } else if !column.writable {
            let message =
                format!("column \"{}\" of \"{}\" is not writable: the server fills it", column.name, table.name);
            let filled = default.map(|default| format!(" AND {} IS NOT {default}", new(index))).unwrap_or_default();
            body += &refuse(&message, &format!("{} IS NOT NULL{filled}", new(index)));
            continue;
        }
        body += &require_units(table, index, "true");
        let current = column.default.as_deref().and_then(|text| Kind::of(column).literal(text));
        let when = match default {
            Some(default) if Some(default) == current.as_deref() => "true".to_owned(),
            // Another one than the server has by now.
            Some(default) => format!("{} IS NOT {default}", new(index)),
            None => format!("{} IS NOT NULL", new(index)),
        };
        columns.push((when.clone(), name_literal(table, index, "", "")));
        values.push((when, format!("json_quote({})", recorded_text(table, index, "NEW."))));
    }
    let key = key_expr(table, "NEW.");
    body += &keep_base(table, &key, "NULL");
    // The transaction's last change is the row's delete: as REPLACE has it. The row was there and is there again, so to others it
    // changes where it differs; a delete would take with it what refers to the row.
    let last = "SELECT id, op, tbl, key FROM local_changes WHERE tx = millstream_tx() ORDER BY id DESC LIMIT 1";
    let replaced =
        format!("(SELECT id FROM ({last}) WHERE op = 'delete' AND tbl = {} AND key = {key})", literal(&table.name));
    let when = format!(" WHERE {replaced} IS NULL");
    let entry = EntrySql {
        columns: &json_list(&columns),
        values: &json_list(&values),
        adds: "NULL",
        gone: "NULL",
        previous: "NULL",
    };
    body += &record(table, "insert", &key, &entry, &when);
    body += &replace(table, &key, &replaced, last);
    trigger(table, "insert", "", &body)
}

/// Makes a delete the update of what differs between its row and the new one. Where nothing does, it still sets one column, so that
/// what only the server fills in comes back with the confirmation; a row that has nothing to set is as it was.
fn replace(table: &TableSchema, key: &str, replaced: &str, last: &str) -> String {
    let (mut columns, mut values, mut previous, mut adds) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let settable = |index: &usize| table.columns[*index].writable && !table.key.contains(index);
    let settable: Vec<usize> = (0..table.columns.len()).filter(settable).collect();
    let is_sum = |index: &usize| table.columns[*index].merge == Some(Merge::Add);
    let Some(&first) = settable.iter().find(|index| !is_sum(index)).or(settable.first()) else {
        let name = literal(&table.name);
        return format!(
            "  DELETE FROM local_changes WHERE id = {replaced};\n  \
             DELETE FROM millstream_base WHERE tbl = {name} AND key = {key} AND NOT EXISTS (SELECT 1 FROM local_changes \
             INDEXED BY local_changes_live WHERE tbl = {name} AND key = {key} AND state <> 'confirmed');\n"
        );
    };
    for &index in &settable {
        let (old, new) = (old_text(table, index), recorded_text(table, index, "NEW."));
        let mut differs = format!("{old} IS NOT {new}");
        if !table.columns[index].nullable {
            // Left out: the server's to fill.
            differs = format!("({differs} AND {new} IS NOT NULL)");
        }
        let name = name_literal(table, index, "", "");
        let before = format!("CAST({old} AS INTEGER)");
        let set = set_text(table, index, &before);
        adds.extend(adding(table, index, &before).map(|(_, is)| (format!("{differs} AND {is}"), name.clone())));
        columns.push((differs.clone(), name));
        values.push((differs.clone(), format!("json_quote({set})")));
        previous.push((differs, format!("json_quote({old})")));
    }
    let (old, new) = (old_text(table, first), recorded_text(table, first, "NEW."));
    let first_name = literal(&table.columns[first].name);
    let (value, added) = match table.columns[first].nullable {
        _ if is_sum(&first) => ("'0'".to_owned(), format!("json_array({first_name})")),
        true => (new, "NULL".to_owned()),
        false => (format!("coalesce({new}, {old})"), "NULL".to_owned()),
    };
    format!(
        "  UPDATE local_changes SET op = 'update', columns = {}, vals = {}, adds = {}, gone = NULL, previous = {}, stamp = millstream_stamp(NULL) WHERE id = {replaced};\n  \
         UPDATE local_changes SET columns = json_array({first_name}), vals = json_array({value}), adds = {added}, previous = json_array({old}) \
         WHERE op = 'update' AND columns = '[]' AND id = (SELECT id FROM ({last}));\n",
        json_list(&columns),
        json_list(&values),
        adds_list(&adds),
        json_list(&previous),
    )
}

/// SQL of the amount by which a column changes, and SQL that says whether the trigger records it; `None`: the column is not a sum. A value that is no whole number,
/// and an amount beyond 64 bits, is sent as the value itself. `old` is SQL of the value before.
fn adding(table: &TableSchema, index: usize, old: &str) -> Option<(String, String)> {
    let column = &table.columns[index];
    let new = format!("NEW.{}", quote(&column.name));
    let amount = format!("({new} - iif(typeof({old}) = 'integer', {old}, 0))");
    let is_recorded = format!("(typeof({new}) = 'integer' AND typeof({amount}) = 'integer')");
    (column.merge == Some(Merge::Add)).then_some((amount, is_recorded))
}

/// SQL that gives what is recorded for a column: its text, or by how much it changed.
fn set_text(table: &TableSchema, index: usize, old: &str) -> String {
    let text = recorded_text(table, index, "NEW.");
    match adding(table, index, old) {
        Some((amount, is_recorded)) => format!("iif({is_recorded}, CAST({amount} AS TEXT), {text})"),
        None => text,
    }
}

/// As [`json_list`]; null if there is nothing.
fn adds_list(parts: &[(String, String)]) -> String {
    if parts.is_empty() { "NULL".to_owned() } else { format!("nullif({}, '[]')", json_list(parts)) }
}

/// SQL that gives a column's text of the row that a delete recorded.
fn old_text(table: &TableSchema, index: usize) -> String {
    let name = &table.columns[index].name;
    // SQLite's paths know no escapes.
    if name.contains(['"', '\\']) {
        return format!("(SELECT value FROM json_each(previous) WHERE key = {})", literal(name));
    }
    format!("json_extract(previous, {})", literal(&format!("$.\"{name}\"")))
}

fn update_trigger(table: &TableSchema) -> String {
    let changed = |index: usize| changes(table, index);
    let mut body = String::new();
    let (mut columns, mut values, mut previous, mut adds) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (index, column) in table.columns.iter().enumerate() {
        if table.key.contains(&index) {
            let message = format!("key column \"{}\" of \"{}\" cannot be changed", column.name, table.name);
            body += &refuse(&message, &changed(index));
        } else if !column.writable {
            let message = format!("column \"{}\" of \"{}\" is not writable", column.name, table.name);
            body += &refuse(&message, &changed(index));
        } else {
            body += &require_units(table, index, &changed(index));
            let (name, old) = (name_literal(table, index, "", ""), format!("OLD.{}", quote(&column.name)));
            adds.extend(
                adding(table, index, &old).map(|(_, is)| (format!("{} AND {is}", changed(index)), name.clone())),
            );
            columns.push((changed(index), name));
            values.push((changed(index), format!("json_quote({})", set_text(table, index, &old))));
            previous.push((changed(index), format!("json_quote({})", column_text(table, index, "OLD."))));
        }
    }
    let key = key_expr(table, "OLD.");
    body += &keep_base(table, &key, &row_expr(table, "OLD."));
    let entry = EntrySql {
        columns: &json_list(&columns),
        values: &json_list(&values),
        adds: &adds_list(&adds),
        gone: "NULL",
        previous: &json_list(&previous),
    };
    body += &record(table, "update", &key, &entry, "");
    let any: Vec<String> = (0..table.columns.len()).map(changed).collect();
    trigger(table, "update", &format!(" AND ({})", joined(&any, "OR")), &body)
}

fn delete_trigger(table: &TableSchema, tables: &[TableSchema]) -> String {
    let key = key_expr(table, "OLD.");
    let row = row_expr(table, "OLD.");
    let gone = taken(table, tables, "OLD.", MAX_CASCADE);
    let gone = gone.map_or("NULL".to_owned(), |taken| format!("nullif({taken}, 0)"));
    let entry = EntrySql { columns: "'[]'", values: "'[]'", adds: "NULL", gone: &gone, previous: &row };
    let body = keep_base(table, &key, &row) + &record(table, "delete", &key, &entry, "");
    trigger(table, "delete", "", &body)
}

/// SQL that says whether a row that the app deletes goes with one that it has deleted already: what the row refers to, or what that
/// refers to, which may still be here. None: it refers to nothing that takes it along.
fn taken(table: &TableSchema, tables: &[TableSchema], prefix: &str, depth: usize) -> Option<String> {
    let mut ways = Vec::new();
    for reference in table.references.iter().filter(|reference| reference.cascades) {
        let Some(parent) = tables.iter().find(|parent| parent.name == reference.table) else { continue };
        if parent.key.len() != reference.columns.len() {
            continue;
        }
        let name = literal(&parent.name);
        let parts: Vec<String> = reference
            .columns
            .iter()
            .map(|&index| format!("json_quote({})", column_text(table, index, prefix)))
            .collect();
        let key = format!("'[' || {} || ']'", parts.join(" || ',' || "));
        let (from, alias) = (quote(&parent.name), format!("millstream_{depth}"));
        let same = |(&child, &index): (&usize, &usize)| {
            let (child, parent) = (quote(&table.columns[child].name), quote(&parent.columns[index].name));
            format!("{alias}.{parent} = {prefix}{child}")
        };
        let same: Vec<String> = reference.columns.iter().zip(&parent.key).map(same).collect();
        let here = format!("SELECT 1 FROM {from} AS {alias} WHERE {}", same.join(" AND "));
        // A deleted parent is not in its table. The first test spares the search through the queued changes of a parent that is there.
        ways.push(format!(
            "(NOT EXISTS ({here}) AND EXISTS (SELECT 1 FROM local_changes INDEXED BY local_changes_live \
             WHERE tbl = {name} AND key = {key} AND state <> 'confirmed' AND op = 'delete'))"
        ));
        if depth > 1
            && let Some(further) = taken(parent, tables, &format!("{alias}."), depth - 1)
        {
            ways.push(format!("EXISTS ({here} AND {further})"));
        }
    }
    (!ways.is_empty()).then(|| format!("({})", ways.join(" OR ")))
}

#[cfg(test)]
mod tests {
    use millstream_schemas::{ColumnSchema, Numeric};
    use rusqlite::Connection;

    use super::*;
    use crate::format::STORE_TABLES;

    fn table(columns: &[(&str, &str, bool)]) -> TableSchema {
        TableSchema {
            name: "it's".into(),
            columns: columns
                .iter()
                .map(|&(name, r#type, writable)| ColumnSchema {
                    name: name.into(),
                    r#type: r#type.into(),
                    nullable: true,
                    writable,
                    default: None,
                    merge: None,
                    numeric: None,
                })
                .collect(),
            key: vec![0],
            scopes: vec![],
            references: Vec::new(),
            clocks: None,
        }
    }

    #[test]
    fn names_with_quotes_stay_names() {
        let table = table(&[("i\"d", "uuid", true), ("a'b", "text", true)]);
        let connection = Connection::open_in_memory().unwrap();
        connection.execute_batch(STORE_TABLES).unwrap();
        connection.execute_batch(&create_table(&table)).unwrap();
        connection.execute_batch(&create_triggers(&table, &[], &[])).unwrap();
        connection.execute_batch(&drop_triggers(&table.name)).unwrap();
    }

    #[test]
    fn types_map_to_affinities() {
        let table = table(&[
            ("id", "bigint", true),
            ("b", "boolean", true),
            ("r", "real", true),
            ("n", "numeric(10,2)", true),
            ("y", "bytea", true),
            ("l", "integer[]", true),
            ("u", "numeric(18,2)", true),
            ("v", "numeric(19,2)", true),
            ("w", "numeric", true),
        ]);
        let mut table = table;
        table.columns[6].numeric = Some(Numeric::Integer);
        table.columns[7].numeric = Some(Numeric::Integer);
        table.columns[8].numeric = Some(Numeric::Real);
        assert_eq!(
            create_table(&table),
            r#"CREATE TABLE "it's" ("id" INT, "b" INT, "r" REAL, "n" TEXT, "y" BLOB, "l" TEXT, "u" INT, "v" BLOB, "w" REAL, PRIMARY KEY ("id"))"#
        );
    }
}
