//! SQL files as `psql` reads them: statements, and the rows of `COPY … FROM stdin` between them, as `pg_dump` writes both.

use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Executor as _};

/// Most characters of a statement that an error shows.
const SHOWN: usize = 60;
/// Commands of psql that change nothing in the database.
const WITHOUT_EFFECT: [&str; 9] =
    ["restrict", "unrestrict", "set", "unset", "echo", "qecho", "timing", "pset", "encoding"];

/// A part of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section<'a> {
    /// Line of the file on which it begins, from 1.
    pub line: usize,
    /// What it is.
    pub kind: SectionKind<'a>,
}

/// What a part is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SectionKind<'a> {
    /// A statement.
    Statement(&'a str),
    /// `COPY … FROM stdin`, with the rows.
    Copy(&'a str, &'a str),
}

/// Why a file cannot be applied.
#[derive(Debug)]
pub struct Failed {
    /// Line and statement.
    pub action: String,
    /// Why.
    pub source: sqlx::Error,
}

/// Applies a file, in the transaction that is open. Statements about owners and grants whose roles are not there, and settings
/// that this Postgres does not know, are left out; returns how many.
///
/// # Errors
/// Postgres refuses a statement, or it is a command of psql that does something.
pub async fn apply(connection: &mut PgConnection, text: &str) -> Result<usize, Failed> {
    let mut left_out = 0;
    for Section { line, kind } in parts(text).map_err(|(line, what)| Failed {
        action: format!("line {line}"),
        source: sqlx::Error::Configuration(what.into()),
    })? {
        let (SectionKind::Statement(statement) | SectionKind::Copy(statement, _)) = kind;
        let failed = |source: sqlx::Error| {
            let hint = if word(statement, 0) == "CREATE" && word(statement, 1) == "EXTENSION" {
                " (MILLSTREAM_POSTGRES_BIN names a Postgres that has the extension)"
            } else {
                ""
            };
            let first = statement.lines().next().unwrap_or_default();
            Failed { action: format!("line {line}: {}{hint}", first.chars().take(SHOWN).collect::<String>()), source }
        };
        match kind {
            SectionKind::Copy(statement, rows) => {
                let mut copy = connection.copy_in_raw(statement).await.map_err(failed)?;
                let sent = copy.send(rows.as_bytes()).await.map(drop);
                match sent {
                    Ok(()) => copy.finish().await.map(drop).map_err(failed)?,
                    Err(error) => return Err(failed(error)),
                }
            }
            SectionKind::Statement(statement) if may_be_left_out(statement) => {
                let run = async |connection: &mut PgConnection, sql: &str| {
                    connection.execute(sqlx::raw_sql(AssertSqlSafe(sql.to_owned()))).await.map(drop).map_err(failed)
                };
                run(connection, "SAVEPOINT millstream_statement").await?;
                match run(connection, statement).await {
                    Ok(()) => run(connection, "RELEASE millstream_statement").await?,
                    Err(error) if is_unknown(&error.source) => {
                        run(connection, "ROLLBACK TO millstream_statement; RELEASE millstream_statement").await?;
                        left_out += 1;
                    }
                    Err(error) => return Err(error),
                }
            }
            SectionKind::Statement(statement) => {
                let sql = sqlx::raw_sql(AssertSqlSafe(statement.to_owned()));
                connection.execute(sql).await.map_err(failed)?;
            }
        }
    }
    // A dump empties the search path of its session.
    let reset = connection.execute("RESET ALL").await;
    reset.map_err(|source| Failed { action: "RESET ALL".to_owned(), source })?;
    Ok(left_out)
}

/// An object, such as a role, or a setting that is not there.
fn is_unknown(error: &sqlx::Error) -> bool {
    const UNDEFINED_OBJECT: &str = "42704";
    error.as_database_error().and_then(|error| error.code()).as_deref() == Some(UNDEFINED_OBJECT)
}

/// Statements of a dump without which the tables are the same.
fn may_be_left_out(statement: &str) -> bool {
    match word(statement, 0).as_str() {
        "GRANT" | "REVOKE" | "SET" => true,
        "ALTER" => statement.to_uppercase().contains(" OWNER TO ") || word(statement, 1) == "DEFAULT",
        _ => false,
    }
}

/// A word of a statement, in capitals.
fn word(statement: &str, number: usize) -> String {
    statement.split_whitespace().nth(number).unwrap_or_default().trim_end_matches(';').to_uppercase()
}

/// The parts of a file; or the line of what cannot be done, and what it is. What comes before a `\connect` is about another
/// database, and no part.
pub fn parts(text: &str) -> Result<Vec<Section<'_>>, (usize, String)> {
    let mut parts = Vec::new();
    let (mut at, mut line, mut counted) = (0, 1, 0);
    loop {
        at += blank(&text[at..]);
        let rest = &text[at..];
        if rest.is_empty() {
            return Ok(parts);
        }
        line += text[counted..at].matches('\n').count();
        counted = at;
        if let Some(command) = rest.strip_prefix('\\') {
            let end = command.find('\n').unwrap_or(command.len());
            match command[..end].split_whitespace().next().unwrap_or_default() {
                "connect" | "c" => parts.clear(),
                name if WITHOUT_EFFECT.contains(&name) => {}
                name => return Err((line, format!("\\{name} is a command of psql: write what it does as SQL"))),
            }
            at += 1 + end;
            continue;
        }
        let end = statement(rest);
        let found = rest[..end].trim_end();
        at += end;
        if word(found, 0) == "COPY" && found.trim_end_matches(';').trim_end().to_lowercase().ends_with("from stdin") {
            let begin = at + text[at..].find('\n').map_or(text.len() - at, |found| found + 1);
            let rows = &text[begin..];
            let length = end_of_rows(rows).ok_or((line, "COPY … FROM stdin has no end (a line \\.)".to_owned()))?;
            parts.push(Section { line, kind: SectionKind::Copy(found.trim_end_matches(';'), &rows[..length]) });
            at = begin + length + "\\.".len();
        } else if found != ";" {
            parts.push(Section { line, kind: SectionKind::Statement(found) });
        }
    }
}

/// Length of the rows before the line `\.`.
fn end_of_rows(rows: &str) -> Option<usize> {
    let mut at = 0;
    for line in rows.split_inclusive('\n') {
        if line.trim_end_matches(['\r', '\n']) == "\\." {
            return Some(at);
        }
        at += line.len();
    }
    None
}

/// Length of blanks and comments.
fn blank(text: &str) -> usize {
    let mut at = 0;
    loop {
        let rest = &text[at..];
        let skipped = rest.len() - rest.trim_start().len();
        let comment = comment(&rest[skipped..]);
        if skipped + comment == 0 {
            return at;
        }
        at += skipped + comment;
    }
}

/// Length of the comment that the text begins with.
fn comment(text: &str) -> usize {
    if text.starts_with("--") {
        return text.find('\n').map_or(text.len(), |end| end + 1);
    }
    if !text.starts_with("/*") {
        return 0;
    }
    // They nest.
    let (mut depth, mut at) = (0_usize, 0);
    loop {
        match &text[at..] {
            "" => return at,
            rest if rest.starts_with("/*") => (depth, at) = (depth + 1, at + 2),
            rest if rest.starts_with("*/") => {
                (depth, at) = (depth - 1, at + 2);
                if depth == 0 {
                    return at;
                }
            }
            rest => at += rest.chars().next().map_or(1, char::len_utf8),
        }
    }
}

/// Length of the quoted text that the text begins with: `'…'`, `E'…'` (told by `escapes`), `"…"`, `$tag$…$tag$`.
fn quoted(text: &str, escapes: bool) -> usize {
    let Some(first @ ('\'' | '"' | '$')) = text.chars().next() else { return 0 };
    if first == '$' {
        let Some(end) = text[1..].find('$') else { return 0 };
        let tag = &text[..end + 2];
        let name = &tag[1..tag.len() - 1];
        let is_name =
            name.chars().all(|c| c.is_alphanumeric() || c == '_') && !name.starts_with(|c: char| c.is_ascii_digit());
        if !is_name {
            return 0;
        }
        return text[tag.len()..].find(tag).map_or(text.len(), |found| found + 2 * tag.len());
    }
    let mut at = 1;
    while at < text.len() {
        match text.as_bytes()[at] {
            b'\\' if escapes && first == '\'' => at += 2,
            // A doubled quote begins the next one, which is read as another text.
            byte if byte == first as u8 => return at + 1,
            _ => at += 1,
        }
    }
    text.len()
}

/// Length of the statement that the text begins with, with its semicolon. Bodies of functions between `BEGIN ATOMIC` and `END`
/// hold semicolons, too.
fn statement(text: &str) -> usize {
    let is_word = |c: char| c.is_alphanumeric() || c == '_' || c == '$';
    let makes_function = word(text, 0) == "CREATE"
        && (1..=3).any(|number| ["FUNCTION", "PROCEDURE"].contains(&word(text, number).as_str()));
    let (mut at, mut parentheses, mut blocks, mut last) = (0, 0_usize, 0_usize, String::new());
    while at < text.len() {
        let rest = &text[at..];
        let skipped = comment(rest).max(quoted(rest, last == "E"));
        if skipped > 0 {
            last.clear();
            at += skipped;
            while !text.is_char_boundary(at) {
                at += 1;
            }
            continue;
        }
        let first = rest.chars().next().unwrap_or_default();
        if is_word(first) {
            let end = rest.find(|c| !is_word(c)).unwrap_or(rest.len());
            last = rest[..end].to_uppercase();
            match last.as_str() {
                "BEGIN" | "CASE" if makes_function => blocks += 1,
                "END" if makes_function => blocks = blocks.saturating_sub(1),
                _ => {}
            }
            at += end;
            continue;
        }
        last.clear();
        at += first.len_utf8();
        match first {
            '(' => parentheses += 1,
            ')' => parentheses = parentheses.saturating_sub(1),
            ';' if parentheses == 0 && blocks == 0 => return at,
            _ => {}
        }
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(text: &str) -> Vec<String> {
        parts(text)
            .unwrap()
            .into_iter()
            .map(|part| match part.kind {
                SectionKind::Statement(text) => text.to_owned(),
                SectionKind::Copy(text, rows) => format!("{text}<{rows}>"),
            })
            .collect()
    }

    #[test]
    fn statements_end_where_psql_ends_them() {
        for (text, expected) in [
            ("", vec![]),
            ("-- only; this\n/* and; /* this; */ */ ;", vec![]),
            ("SELECT 1; SELECT 2", vec!["SELECT 1;", "SELECT 2"]),
            ("SELECT 'a;''b\\'; SELECT E'\\';' ;", vec!["SELECT 'a;''b\\';", "SELECT E'\\';' ;"]),
            ("SELECT \"a;\"\"b\"; X", vec!["SELECT \"a;\"\"b\";", "X"]),
            ("DO $$ BEGIN; END $$; X", vec!["DO $$ BEGIN; END $$;", "X"]),
            ("DO $a$ $$;\n\\x; $a$; SELECT $1; X", vec!["DO $a$ $$;\n\\x; $a$;", "SELECT $1;", "X"]),
            ("CREATE RULE r AS ON INSERT TO t DO (A; B); X", vec!["CREATE RULE r AS ON INSERT TO t DO (A; B);", "X"]),
            (
                "CREATE OR REPLACE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT CASE WHEN a THEN 1 END; SELECT 2; END; BEGIN; X; END;",
                vec![
                    "CREATE OR REPLACE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT CASE WHEN a THEN 1 END; SELECT 2; END;",
                    "BEGIN;",
                    "X;",
                    "END;",
                ],
            ),
            ("SELECT 'é;é'; X", vec!["SELECT 'é;é';", "X"]),
        ] {
            assert_eq!(texts(text), expected, "{text}");
        }
    }

    #[test]
    fn rows_and_commands_of_psql_are_understood() {
        let dump = "\\restrict abc\nCREATE DATABASE x;\n\\connect x\nCREATE TABLE t (a text);\n\
                    COPY public.t (a) FROM stdin;\n'\\\\;$$\n\\N\n\\.\n\nCOPY t FROM stdin;\n\\.\nSELECT 1;\n\\unrestrict abc\n";
        let expected = [
            "CREATE TABLE t (a text);",
            "COPY public.t (a) FROM stdin<'\\\\;$$\n\\N\n>",
            "COPY t FROM stdin<>",
            "SELECT 1;",
        ];
        assert_eq!(texts(dump), expected);
        assert_eq!(parts(dump).unwrap().iter().map(|part| part.line).collect::<Vec<_>>(), [4, 5, 10, 12]);
        assert_eq!(parts("SELECT 1;\n\\i other.sql").unwrap_err().0, 2);
        assert_eq!(parts("\n\nCOPY t FROM stdin;\n1\n").unwrap_err().0, 3);
        assert_eq!(texts("COPY t TO stdout; COPY t FROM '/a';"), ["COPY t TO stdout;", "COPY t FROM '/a';"]);
    }
}
