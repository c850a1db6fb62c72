//! How data is printed: on stdout, for people or as JSON.

use std::fmt::Write as _;
use std::io::Write as _;

use millstream_client::{EntryState, FailedWrite, ImportOutcome, Imported, QueueEntry, Rows, SqlValue, Status};
use serde::Serialize;
use serde_json::{Map, Value, json};

/// Widest column of rows, in characters.
const MAX_COLUMN: usize = 60;

/// How data is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Output {
    /// For people.
    Text,
    /// JSON.
    Json,
}

/// What became of a write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum WriteState {
    /// Nothing synced was changed.
    #[default]
    Unchanged,
    /// Durable here, sent when the edge is reachable.
    Queued,
    /// Durable here, held back behind a rejected transaction on the same rows.
    Held,
    /// Committed in Postgres and seen in the stream.
    Applied,
    /// The same, but some columns lost to newer changes of others.
    Merged,
    /// All of it lost to newer changes of others.
    Superseded,
    /// Refused; nothing of it took effect.
    Rejected,
}

/// A write.
#[derive(Debug, Default, Serialize)]
pub struct Written {
    pub state: WriteState,
    /// Rows changed here; none where an earlier write was submitted again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rows: Option<usize>,
    /// Rows that it gave (`RETURNING`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub returned: Option<Vec<Value>>,
    /// Number of the transaction in the queue.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tx: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub code: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// The transaction that it is held back for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waits_for: Option<u64>,
    /// When a rejected one is tried again by itself, microseconds since 1970; none: it waits for a person.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next_attempt: Option<u64>,
}

/// Prints a write.
pub fn written(written: &Written, output: Output) {
    if output == Output::Json {
        return print(&to_json(written));
    }
    let rows = written.rows.map(|rows| format!(", {rows} row{}", if rows == 1 { "" } else { "s" })).unwrap_or_default();
    let transaction = written.tx.map(|tx| format!(" (transaction {tx})")).unwrap_or_default();
    match written.state {
        WriteState::Rejected => {
            let rule = written.rule.as_ref().map(|rule| format!(", {rule}")).unwrap_or_default();
            print(&format!("rejected: {}{rule}{transaction}", written.code.as_deref().unwrap_or("internal")));
            eprintln!("{}", written.message.as_deref().unwrap_or_default());
            let Some(tx) = written.tx else { return };
            match written.next_attempt {
                Some(_) => {
                    eprintln!("it is tried again by itself; `queue edit {tx}` and `queue discard {tx}` act at once")
                }
                None => eprintln!("it waits for you: `queue edit {tx}`, `queue retry {tx}` or `queue discard {tx}`"),
            }
        }
        WriteState::Held => {
            print(&format!("held{rows}{transaction}"));
            if let Some(first) = written.waits_for {
                eprintln!(
                    "transaction {first}, on the same rows, has to be retried, edited or discarded first: see `queue show {first}`"
                );
            }
        }
        state => print(&format!("{}{rows}{transaction}", word(&state))),
    }
}

/// Prints that a transaction was discarded.
pub fn discarded(tx: u64, output: Output) {
    match output {
        Output::Text => print(&format!("discarded (transaction {tx})")),
        Output::Json => print(&json!({"state": "discarded", "tx": tx}).to_string()),
    }
}

/// Prints what became of saved transactions: a line each, or one JSON array on a line.
pub fn imported(imported: &[Imported], output: Output) {
    if output == Output::Json {
        return print(&to_json(&imported));
    }
    for Imported { tx, outcome } in imported {
        let became = match outcome {
            ImportOutcome::Recorded { as_tx } => format!("recorded as transaction {as_tx}"),
            ImportOutcome::Present => "had taken effect".to_owned(),
            ImportOutcome::Before => "was recorded by an earlier import".to_owned(),
            ImportOutcome::Kept { reason } => format!("kept in the file: {reason}"),
        };
        print(&format!("saved transaction {tx}: {became}"));
    }
    print(&format!("({} saved transactions)", imported.len()));
}

/// Whether an entry waits for a retry, for a person, or behind one that does.
pub fn needs_attention(state: EntryState) -> bool {
    matches!(state, EntryState::RetryWait | EntryState::Error | EntryState::Held)
}

/// Prints entries of the queue: a table, or one JSON array on a line.
pub fn queue(entries: &[QueueEntry], output: Output) {
    if output == Output::Json {
        return print(&to_json(&entries));
    }
    let names = ["tx", "state", "change", "rejections", "why"].map(str::to_owned).to_vec();
    let row = |entry: &QueueEntry| {
        let texts = [state(entry), change(entry), entry.attempts.to_string(), why(entry)].map(SqlValue::Text);
        let tx = SqlValue::Integer(i64::try_from(entry.tx).unwrap_or(i64::MAX));
        std::iter::once(tx).chain(texts).collect()
    };
    print(&table(&Rows { columns: names, rows: entries.iter().map(row).collect() }, usize::MAX));
}

/// Prints a transaction of the queue: a block, or one JSON array of its entries on a line.
pub fn transaction(entries: &[QueueEntry], now: u64, output: Output) {
    if output == Output::Json {
        return print(&to_json(&entries));
    }
    let Some(first) = entries.first() else { return };
    let seconds = |micros: u64| micros as f64 / 1e6;
    let mut lines = vec![
        ("transaction", first.tx.to_string()),
        ("state", state(first)),
        ("recorded", format!("{:.0} s ago", seconds(now.saturating_sub(first.recorded_at)))),
        (
            "client_seq",
            first
                .client_seq
                .map_or_else(|| "none while it is held back".to_owned(), |client_seq| client_seq.to_string()),
        ),
        ("rejections", first.attempts.to_string()),
    ];
    if let Some(at) = first.next_attempt {
        lines.push(("next try", format!("in {:.0} s", seconds(at.saturating_sub(now)))));
    }
    let failed = entries.iter().find(|entry| entry.error.is_some()).unwrap_or(first);
    if !why(failed).is_empty() {
        lines.push(("why", why(failed)));
    }
    for entry in entries {
        lines.push(("change", format!("{}  ({})", change(entry), entry.change.change_id)));
        for (column, value) in entry.change.columns.iter().zip(&entry.change.values) {
            lines.push(("", format!("{column} = {}", value.as_deref().unwrap_or("NULL"))));
        }
    }
    let lines: Vec<String> = lines.iter().map(|(name, value)| format!("{name:<11} {value}")).collect();
    print(&lines.join("\n"));
}

fn state(entry: &QueueEntry) -> String {
    entry.outcome.map_or_else(|| word(&entry.state), |outcome| word(&outcome))
}

fn change(entry: &QueueEntry) -> String {
    let key: Vec<&str> = entry.change.key.iter().map(|part| part.as_deref().unwrap_or("null")).collect();
    format!("{} {} {}", entry.change.op.as_str(), entry.change.table, key.join(","))
}

/// Why it has not taken effect, as far as the server or the queue say.
fn why(entry: &QueueEntry) -> String {
    let waits = entry.waits_for.map(|tx| format!("waits for transaction {tx}"));
    let parts = [&waits, &entry.error_code, &entry.error_rule, &entry.error];
    parts.into_iter().flatten().map(String::as_str).collect::<Vec<_>>().join(": ")
}

/// Prints rows: a table, or one JSON array of objects on a line.
pub fn rows(rows: &Rows, output: Output) {
    match output {
        Output::Text => print(&table(rows, MAX_COLUMN)),
        Output::Json => print(&to_json(&objects(rows))),
    }
}

/// Rows as JSON objects.
pub fn objects(rows: &Rows) -> Vec<Value> {
    let object = |row: &Vec<SqlValue>| {
        Value::Object(rows.columns.iter().cloned().zip(row.iter().map(json_value)).collect::<Map<_, _>>())
    };
    rows.rows.iter().map(object).collect()
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
    line("failed", format!("{} transactions, {} held back behind them", status.failed, status.held));
    let position = match &status.position {
        Some(position) => {
            format!("{} in the stream, LSN {}, epoch {}", position.stream_seq, position.lsn, position.epoch)
        }
        None => "none: no snapshot yet".into(),
    };
    line("position", position);
    for aside in &status.set_aside {
        line("set aside", format!("{} {}: {}", aside.kind.as_str(), aside.name, aside.reason));
    }
    if let Some(error) = &status.last_error {
        line("last error", format!("{}: {}", error.code, error.message));
    }
    for failure in failed.iter().take(most) {
        let code = failure.code.map_or_else(|| "unknown".to_owned(), |code| code.to_string());
        line(
            "  failure",
            format!("transaction {}: {code}: {} ({})", failure.tx, failure.message, word(&failure.state)),
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

/// Columns of equal width, of at most `widest` characters, a line below the names, and the number of rows.
fn table(rows: &Rows, widest: usize) -> String {
    let cut = |text: String| match text.char_indices().nth(widest) {
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
pub fn print(text: &str) {
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
        assert_eq!(table(&rows, MAX_COLUMN), "title  done\n-----  ----\nMüll   1\na b    NULL\n(2 rows)");
    }

    #[test]
    fn long_values_are_cut_and_blobs_are_hexadecimal() {
        let rows = Rows { columns: vec!["x".into()], rows: vec![vec![SqlValue::Text("ü".repeat(100))]] };
        assert!(table(&rows, MAX_COLUMN).contains(&format!("{}…", "ü".repeat(MAX_COLUMN))));
        assert_eq!(text_value(&SqlValue::Blob(vec![0, 255])), "\\x00ff");
    }
}
