//! What an app adds to its database: as much of SQL as it takes to see what a statement makes or drops, and what had to give way.

use serde::Serialize;

/// What kind of thing gave way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// An index on a synced table. It was dropped.
    Index,
    /// A view. It was dropped.
    View,
    /// A trigger. It was dropped.
    Trigger,
    /// A table whose name the server's schema took. It has another name, and all its rows.
    Table,
    /// A column of a synced table whose name the server's schema took. It has another name, or is in another table.
    Column,
    /// A foreign key to a synced table. It is not heeded while the server's rows are applied.
    ForeignKey,
}

impl Kind {
    /// As it is stored, and in the status.
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Index => "index",
            Kind::View => "view",
            Kind::Trigger => "trigger",
            Kind::Table => "table",
            Kind::Column => "column",
            Kind::ForeignKey => "foreign_key",
        }
    }

    /// The kind of this name, in whatever case.
    pub fn of(name: &str) -> Option<Kind> {
        [Kind::Index, Kind::View, Kind::Trigger, Kind::Table, Kind::Column, Kind::ForeignKey]
            .into_iter()
            .find(|kind| kind.as_str().eq_ignore_ascii_case(name))
    }
}

/// Something that the app added to its database and that had to give way, so that sync goes on.
///
/// What was dropped is made again when the server's schema changes and it fits once more. It is forgotten when the app makes
/// something of its name, or drops it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SetAside {
    /// What it is.
    pub kind: Kind,
    /// Its name.
    pub name: String,
    /// The table that it is on; of a view or a table none.
    pub table: Option<String>,
    /// Why, and what to do, for people.
    pub reason: String,
    /// The SQL that made it; none of what is still there.
    pub sql: Option<String>,
    /// The name that it has now, if it was renamed; of a column perhaps the table that it is in.
    pub moved_to: Option<String>,
}

/// A piece of SQL.
#[derive(Debug, PartialEq, Eq)]
enum Token {
    Word(String),
    /// An identifier in quotes, or a text.
    Quoted(String),
    Sign(char),
}

/// The pieces of a statement, without comments and white space.
fn tokens(sql: &str) -> Vec<Token> {
    let mut found = Vec::new();
    let mut rest = sql;
    while let Some(first) = rest.chars().next() {
        let is_word = |c: char| c.is_alphanumeric() || c == '_' || c == '$' || !c.is_ascii();
        let length = if first.is_whitespace() {
            first.len_utf8()
        } else if rest.starts_with("--") {
            rest.find('\n').unwrap_or(rest.len())
        } else if let Some(comment) = rest.strip_prefix("/*") {
            comment.find("*/").map_or(rest.len(), |end| end + 4)
        } else if matches!(first, '\'' | '"' | '`' | '[') {
            let close = if first == '[' { ']' } else { first };
            let (mut text, mut end, mut chars) = (String::new(), rest.len(), rest.char_indices().skip(1).peekable());
            while let Some((at, c)) = chars.next() {
                let doubled = first != '[' && chars.peek().is_some_and(|(_, next)| *next == close);
                if c != close {
                    text.push(c);
                } else if doubled {
                    text.push(c);
                    chars.next();
                } else {
                    end = at + 1;
                    break;
                }
            }
            found.push(Token::Quoted(text));
            end
        } else if is_word(first) {
            let end = rest.find(|c| !is_word(c)).unwrap_or(rest.len());
            found.push(Token::Word(rest[..end].to_owned()));
            end
        } else {
            found.push(Token::Sign(first));
            first.len_utf8()
        };
        rest = &rest[length..];
    }
    found
}

fn is(token: Option<&Token>, word: &str) -> bool {
    matches!(token, Some(Token::Word(found)) if found.eq_ignore_ascii_case(word))
}

/// Whether a statement makes, changes or drops something of the database.
pub fn defines(sql: &str) -> bool {
    let mut rest = tokens(sql).into_iter().skip_while(|token| *token == Token::Sign(';'));
    let first = rest.next();
    ["create", "alter", "drop"].iter().any(|word| is(first.as_ref(), word))
}

/// What a `DROP` drops.
pub fn dropped(sql: &str) -> Option<(Kind, String)> {
    let tokens = tokens(sql);
    let mut rest = tokens.iter().skip_while(|token| **token == Token::Sign(';')).peekable();
    if !is(rest.next(), "drop") {
        return None;
    }
    let Some(Token::Word(kind)) = rest.next() else { return None };
    let kind = Kind::of(kind)?;
    if is(rest.peek().copied(), "if") {
        rest.nth(1);
    }
    let name = |token: Option<&Token>| match token {
        Some(Token::Word(name) | Token::Quoted(name)) => Some(name.clone()),
        _ => None,
    };
    let first = name(rest.next())?;
    match rest.next() {
        Some(Token::Sign('.')) => Some((kind, name(rest.next())?)),
        _ => Some((kind, first)),
    }
}

/// Whether the SQL of a trigger uses `RAISE`.
pub fn raises(sql: &str) -> bool {
    tokens(sql).windows(2).any(|pair| is(pair.first(), "raise") && pair[1] == Token::Sign('('))
}

/// What a trigger fires on: `insert`, `update` or `delete`.
pub fn event(sql: &str) -> Option<&'static str> {
    if !update_of(sql).is_empty() {
        return Some("update");
    }
    let tokens = tokens(sql);
    let last = tokens.iter().position(|token| is(Some(token), "on"))?.checked_sub(1)?;
    ["insert", "update", "delete"].into_iter().find(|event| is(tokens.get(last), event))
}

/// The columns in the `UPDATE OF` of a trigger, if it has that.
pub fn update_of(sql: &str) -> Vec<String> {
    let tokens = tokens(sql);
    let is_head = |pair: &[Token]| is(pair.first(), "update") && is(pair.get(1), "of");
    // Its body begins behind ON.
    let head = tokens.iter().position(|token| is(Some(token), "on")).unwrap_or(0);
    let Some(at) = tokens[..head].windows(2).position(is_head) else { return Vec::new() };
    let name = |token: &Token| match token {
        Token::Word(name) | Token::Quoted(name) => Some(name.clone()),
        Token::Sign(_) => None,
    };
    tokens[at + 2..head].iter().filter_map(name).collect()
}

/// Whether SQL has this name in it.
pub fn mentions(sql: &str, name: &str) -> bool {
    tokens(sql)
        .iter()
        .any(|token| matches!(token, Token::Word(found) | Token::Quoted(found) if found.eq_ignore_ascii_case(name)))
}

/// SQL of SQLite's schema tables that makes something temporary again: they leave that word out.
pub fn temporary(sql: &str) -> String {
    let rest = sql.trim_start();
    let rest = rest.get(6..).filter(|_| rest.get(..6).is_some_and(|word| word.eq_ignore_ascii_case("create")));
    rest.map_or_else(|| sql.to_owned(), |rest| format!("CREATE TEMP{rest}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn definitions_are_told_from_other_statements() {
        for sql in ["CREATE TABLE t (a)", " ; /* x */ -- y\n alter table t add b", "DROP view v"] {
            assert!(defines(sql), "{sql}");
        }
        for sql in ["", "SELECT 'create'", "INSERT INTO creates VALUES (1)", "-- create\nSELECT 1", "\"create\""] {
            assert!(!defines(sql), "{sql}");
        }
    }

    #[test]
    fn what_is_dropped() {
        let check = |sql: &str, expected: Option<(Kind, &str)>| {
            assert_eq!(dropped(sql), expected.map(|(kind, name)| (kind, name.to_owned())), "{sql}");
        };
        check("DROP INDEX by_title", Some((Kind::Index, "by_title")));
        check("drop trigger if exists main.\"a \"\"b\"", Some((Kind::Trigger, "a \"b")));
        check("DROP/**/VIEW [v w];", Some((Kind::View, "v w")));
        check("DROP TABLE IF EXISTS `t`", Some((Kind::Table, "t")));
        check("DELETE FROM t", None);
        check("DROP", None);
        check("DROP INDEX", None);
    }

    #[test]
    fn raise_is_found_wherever_it_is_said() {
        assert!(raises("CREATE TRIGGER t BEFORE INSERT ON a BEGIN SELECT Raise /* x */ (IGNORE); END"));
        assert!(!raises("CREATE TRIGGER \"raise(\" AFTER INSERT ON a BEGIN SELECT 'RAISE(ABORT)'; -- raise(\n END"));
    }

    #[test]
    fn columns_that_a_trigger_waits_for() {
        let sql = "CREATE TRIGGER t AFTER UPDATE OF a, \"b c\" ON d BEGIN UPDATE e SET f = 1; END";
        assert_eq!(update_of(sql), ["a", "b c"]);
        assert_eq!(event(sql), Some("update"));
        assert_eq!(event("create trigger insert instead of delete on v begin select 1; end"), Some("delete"));
        assert_eq!(update_of("CREATE TRIGGER t AFTER UPDATE ON d BEGIN SELECT 1; END"), [""; 0]);
    }

    #[test]
    fn names_and_odd_texts() {
        assert!(mentions("CREATE VIEW v AS SELECT [A b] FROM t", "a B") && !mentions("SELECT notes2", "notes"));
        assert_eq!(temporary("create view v AS SELECT 1"), "CREATE TEMP view v AS SELECT 1");
        for sql in ["'", "\"x", "[", "/*", "--", "é ü", "/*/", "''''"] {
            tokens(sql);
        }
        assert_eq!(tokens("'it''s'"), [Token::Quoted("it's".into())]);
    }
}
