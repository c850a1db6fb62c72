//! The logs of the parts: their ends, and for dev mode short, prefixed, coloured lines.

use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde_json::Value;

use crate::service::Service;

/// Most bytes of a log that go into an error or on the screen.
const LOG_TAIL_BYTES: usize = 4 * 1024;
/// Width of the names before the lines.
const NAME_WIDTH: usize = 11;
/// Most bytes of a line that are shown.
const MAX_LINE_BYTES: usize = 400;
/// Most bytes read at once; the rest comes with the next look.
const MAX_READ_BYTES: u64 = 256 * 1024;

/// Follows the log file of a part.
#[derive(Debug)]
pub struct Tail {
    service: Service,
    path: PathBuf,
    offset: u64,
    /// The start of a line whose end is not written yet.
    partial: Vec<u8>,
    /// Nothing is shown of a file that was written last before this: it is of an earlier run.
    since: Option<SystemTime>,
}

impl Tail {
    /// From the file's start.
    pub fn new(service: Service, path: PathBuf) -> Self {
        Tail { service, path, offset: 0, partial: Vec::new(), since: None }
    }

    /// Only if it is written to from now on.
    pub fn since(self, time: SystemTime) -> Self {
        Tail { since: Some(time), ..self }
    }

    /// The lines that were completed since the last call, as they are to be shown.
    pub fn lines(&mut self, colour: bool) -> io::Result<Vec<String>> {
        let mut file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        if let Some(since) = self.since {
            if file.metadata()?.modified()? < since {
                return Ok(Vec::new());
            }
            self.since = None;
        }
        file.seek(SeekFrom::Start(self.offset))?;
        let read = file.take(MAX_READ_BYTES).read_to_end(&mut self.partial)?;
        self.offset += read as u64;
        let Some(end) = self.partial.iter().rposition(|&byte| byte == b'\n') else { return Ok(Vec::new()) };
        let rest = self.partial.split_off(end + 1);
        let complete = std::mem::replace(&mut self.partial, rest);
        Ok(String::from_utf8_lossy(&complete).lines().filter_map(|line| render(self.service, line, colour)).collect())
    }
}

/// A line with a name before it, cut and coloured.
pub fn prefixed(name: &str, colour_code: u8, text: &str, colour: bool) -> String {
    let mut end = text.len().min(MAX_LINE_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let cut = if end < text.len() { " …" } else { "" };
    let text = &text[..end];
    if colour {
        format!("\x1b[{colour_code}m{name:<NAME_WIDTH$}\x1b[0m {text}{cut}")
    } else {
        format!("{name:<NAME_WIDTH$} {text}{cut}")
    }
}

/// How a part's line is shown; none where it says nothing to a developer.
fn render(service: Service, line: &str, colour: bool) -> Option<String> {
    let text = match service {
        Service::Postgres => {
            let telling = ["WARNING:", "ERROR:", "FATAL:", "PANIC:"].iter().any(|level| line.contains(level));
            // Answers to our own doing: asking whether it is up yet, and going away from a replication connection.
            let expected = ["the database system is starting up", "FATAL:  connection to client lost"];
            (telling && !expected.iter().any(|text| line.contains(text))).then(|| postgres_text(line))?
        }
        Service::Nats => {
            let at = ["[WRN]", "[ERR]", "[FTL]"].iter().find_map(|level| line.find(level))?;
            line[at..].to_owned()
        }
        _ => event_text(line, colour),
    };
    Some(prefixed(service.name(), colour_of(service), &text, colour))
}

fn colour_of(service: Service) -> u8 {
    match service {
        Service::Postgres => 34,
        Service::Nats => 36,
        Service::Replication => 35,
        Service::Changes => 33,
        Service::Edge => 32,
    }
}

/// Without date and process id: `2026-11-22 20:00:00.000 UTC [42] name ERROR:  …`.
fn postgres_text(line: &str) -> String {
    line.split_once("] ").map_or(line, |(_, text)| text).trim_start().to_owned()
}

/// A structured event of one of our services: level, message, fields. Anything else (a panic) as it is.
fn event_text(line: &str, colour: bool) -> String {
    let Ok(Value::Object(mut event)) = serde_json::from_str::<Value>(line) else { return line.to_owned() };
    let mut take = |name: &str| match event.remove(name) {
        Some(Value::String(text)) => text,
        Some(other) => other.to_string(),
        None => String::new(),
    };
    let (level, message) = (take("level"), take("message"));
    for noise in ["timestamp", "target", "span", "spans"] {
        take(noise);
    }
    let code = match level.as_str() {
        "ERROR" => 31,
        "WARN" => 33,
        _ => 2,
    };
    let mut text =
        if colour { format!("\x1b[{code}m{level:<5}\x1b[0m {message}") } else { format!("{level:<5} {message}") };
    for (name, value) in event {
        let value = match value {
            Value::String(value) => value,
            other => other.to_string(),
        };
        let field = if colour { format!(" \x1b[2m{name}=\x1b[0m{value}") } else { format!(" {name}={value}") };
        text.push_str(&field);
    }
    text
}

/// The end of a file, from the start of a line.
pub(crate) fn end_of(path: &Path) -> String {
    let text = fs::read(path).unwrap_or_default();
    let mut end = &text[text.len().saturating_sub(LOG_TAIL_BYTES)..];
    if end.len() < text.len()
        && let Some(at) = end.iter().position(|&byte| byte == b'\n')
    {
        end = &end[at + 1..];
    }
    String::from_utf8_lossy(end).into_owned()
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn lines_are_short() {
        let check = |service, line: &str, expected: Option<&str>| {
            assert_eq!(render(service, line, false).as_deref(), expected, "{line}");
        };
        check(
            Service::Edge,
            r#"{"timestamp":"2026-11-22T20:00:00.0Z","level":"INFO","message":"session began","user":"alice","n":3,"target":"x"}"#,
            Some("edge        INFO  session began n=3 user=alice"),
        );
        check(Service::Changes, "thread panicked", Some("changes     thread panicked"));
        check(Service::Nats, "[1] 2026/11/22 20:00:00.1 [INF] Server is ready", None);
        check(Service::Nats, "[1] 2026/11/22 20:00:00.1 [WRN] slow", Some("nats        [WRN] slow"));
        check(Service::Postgres, "2026-11-22 20:00:00.000 UTC [42] LOG:  ready", None);
        check(
            Service::Postgres,
            "2026-11-22 20:00:00.000 UTC [42] millstream-changes ERROR:  no",
            Some("postgres    millstream-changes ERROR:  no"),
        );
    }

    #[test]
    fn long_lines_are_cut_between_characters() {
        let line = prefixed("edge", 32, &"ü".repeat(MAX_LINE_BYTES), false);
        assert!(line.ends_with("ü …"));
        assert!(line.len() < MAX_LINE_BYTES + 20);
    }

    #[test]
    fn lines_wait_for_their_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut tail = Tail::new(Service::Edge, path.clone());
        assert!(tail.lines(false).unwrap().is_empty());
        let mut file = File::create(path).unwrap();
        file.write_all(b"one\ntw").unwrap();
        assert_eq!(tail.lines(false).unwrap(), ["edge        one"]);
        file.write_all(b"o\n").unwrap();
        assert_eq!(tail.lines(false).unwrap(), ["edge        two"]);
        assert!(tail.lines(false).unwrap().is_empty());
    }
}
