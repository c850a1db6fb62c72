//! What the client prints: data on stdout, for people or as JSON.

use std::fmt::Write as _;
use std::io::Write as _;

use millstream_client::{FailedWrite, Rows, SqlValue, Status};
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::Output;

/// Widest column of a table, in characters.
const MAX_COLUMN: usize = 60;

/// What became of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum WriteState {
    /// Nothing synced was changed.
    Unchanged,
    /// Durable here, sent when the edge is reachable.
    Queued,
    /// Committed in Postgres and seen in the stream.
    Applied,
    /// Refused; nothing of it took effect.
    Rejected,
}

/// A write.
#[derive(Debug, Serialize)]
pub struct Written {
    pub state: WriteState,
    pub rows: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seq: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub code: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// Prints a write.
pub fn written(written: &Written, output: Output) {
    if output == Output::Json {
        return print(&to_json(written));
    }
    let rows = format!("{} row{}", written.rows, if written.rows == 1 { "" } else { "s" });
    let seq = written.seq.unwrap_or_default();
    match written.state {
        WriteState::Unchanged => print(&format!("unchanged, {rows}")),
        WriteState::Queued => print(&format!("queued, {rows} (transaction {seq})")),
        WriteState::Applied => print(&format!("applied, {rows} (transaction {seq})")),
        WriteState::Rejected => {
            let (code, message) = (written.code.as_deref(), written.message.as_deref());
            print(&format!("rejected: {} (transaction {seq})", code.unwrap_or("internal")));
            eprintln!("{}", message.unwrap_or_default());
        }
    }
}

/// Prints rows: a table, or one JSON array of objects on a line.
pub fn rows(rows: &Rows, output: Output) {
    match output {
        Output::Text => print(&table(rows)),
        Output::Json => {
            let objects: Vec<Value> = rows
                .rows
                .iter()
                .map(|row| {
                    Value::Object(rows.columns.iter().cloned().zip(row.iter().map(json_value)).collect::<Map<_, _>>())
                })
                .collect();
            print(&to_json(&objects));
        }
    }
}

/// Prints the status.
pub fn status(status: &Status, failed: &[FailedWrite], most: usize, output: Output) {
    if output == Output::Json {
        let mut value = serde_json::to_value(status).unwrap_or_default();
        if let Value::Object(object) = &mut value {
            object.insert("failures".into(), json!(failed.iter().take(most).collect::<Vec<_>>()));
        }
        return print(&value.to_string());
    }
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        // Writing into a string cannot fail.
        let _infallible = writeln!(text, "{name:<11} {value}");
    };
    let reason = status.reason.as_ref().map(|reason| format!(" ({reason})")).unwrap_or_default();
    line("connection", format!("{}{reason}", word(&status.state)));
    line("user", status.user_id.clone().unwrap_or_else(|| "not known yet".into()));
    line("client", status.client_id.to_string());
    line(
        "pending",
        format!("{} transactions, {} of them stored on the broker", status.pending.count, status.pending.accepted),
    );
    line("failed", format!("{} transactions", status.failed));
    let position = match &status.position {
        Some(position) => format!("{} in the stream, LSN {}, epoch {}", position.seq, position.lsn, position.epoch),
        None => "none: no snapshot yet".into(),
    };
    line("position", position);
    if let Some(error) = &status.last_error {
        line("last error", format!("{}: {}", error.code, error.message));
    }
    for failure in failed.iter().take(most) {
        let code = failure.code.map_or_else(|| "unknown".to_owned(), |code| code.to_string());
        line(
            "  failure",
            format!("transaction {}: {code}: {} ({})", failure.seq, failure.message, word(&failure.state)),
        );
    }
    print(text.trim_end());
}

/// A value in the words of its JSON form.
fn word(value: &impl Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(Value::String(text)) => text,
        Ok(value) => value.to_string(),
        Err(error) => error.to_string(),
    }
}

fn to_json(value: &impl Serialize) -> String {
    // Plain data: there is nothing in it that could fail.
    serde_json::to_string(value).unwrap_or_default()
}

fn json_value(value: &SqlValue) -> Value {
    match value {
        SqlValue::Null => Value::Null,
        SqlValue::Integer(value) => json!(value),
        SqlValue::Real(value) => json!(value),
        SqlValue::Text(value) => json!(value),
        SqlValue::Blob(value) => json!(hex(value)),
    }
}

fn text_value(value: &SqlValue) -> String {
    match value {
        SqlValue::Null => "NULL".into(),
        SqlValue::Integer(value) => value.to_string(),
        SqlValue::Real(value) => value.to_string(),
        SqlValue::Text(value) => value.replace(['\n', '\r', '\t'], " "),
        SqlValue::Blob(value) => hex(value),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold("\\x".to_owned(), |mut text, byte| {
        let _infallible = write!(text, "{byte:02x}");
        text
    })
}

/// Columns of equal width, a line below the names, and the number of rows.
fn table(rows: &Rows) -> String {
    let cut = |text: String| match text.char_indices().nth(MAX_COLUMN) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text,
    };
    let mut lines: Vec<Vec<String>> = vec![rows.columns.clone()];
    lines.extend(rows.rows.iter().map(|row| row.iter().map(|value| cut(text_value(value))).collect()));
    let mut widths = vec![0; rows.columns.len()];
    for line in &lines {
        for (width, text) in widths.iter_mut().zip(line) {
            *width = text.chars().count().max(*width);
        }
    }
    let mut text = String::new();
    for (number, line) in lines.iter().enumerate() {
        let cells: Vec<String> = line.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
        if number == 0 {
            let rule: Vec<String> = widths.iter().map(|width| "-".repeat(*width)).collect();
            text.push_str(&rule.join("  "));
            text.push('\n');
        }
    }
    let count = rows.rows.len();
    text.push_str(&format!("({count} row{})", if count == 1 { "" } else { "s" }));
    text
}

/// A line on stdout. A reader that is gone (`| head`) is no error.
fn print(text: &str) {
    let _unread = writeln!(std::io::stdout().lock(), "{text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_aligned() {
        let rows = Rows {
            columns: vec!["title".into(), "done".into()],
            rows: vec![
                vec![SqlValue::Text("Müll".into()), SqlValue::Integer(1)],
                vec![SqlValue::Text("a\nb".into()), SqlValue::Null],
            ],
        };
        assert_eq!(table(&rows), "title  done\n-----  ----\nMüll   1\na b    NULL\n(2 rows)");
    }

    #[test]
    fn long_values_are_cut_and_blobs_are_hexadecimal() {
        let rows = Rows { columns: vec!["x".into()], rows: vec![vec![SqlValue::Text("ü".repeat(100))]] };
        assert!(table(&rows).contains(&format!("{}…", "ü".repeat(MAX_COLUMN))));
        assert_eq!(text_value(&SqlValue::Blob(vec![0, 255])), "\\x00ff");
    }
}
