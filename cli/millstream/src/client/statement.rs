//! What can be told of a SQLite statement before it is run. Pure.

/// A statement without the comments and blanks that it begins with.
fn begin(mut statement: &str) -> &str {
    loop {
        statement = statement.trim_start();
        let behind = match (statement.strip_prefix("--"), statement.strip_prefix("/*")) {
            (Some(comment), _) => comment.split_once('\n'),
            (_, Some(comment)) => comment.split_once("*/"),
            (None, None) => return statement,
        };
        let Some((_, rest)) = behind else { return "" };
        statement = rest;
    }
}

/// Whether a statement begins with one of these words.
pub fn begins_with(statement: &str, words: &[&str]) -> bool {
    let statement = begin(statement);
    let end = statement.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(statement.len());
    words.iter().any(|word| statement[..end].eq_ignore_ascii_case(word))
}

/// Whether a statement may be one that only reads, by its first word; SQLite knows.
pub fn may_read(statement: &str) -> bool {
    begins_with(statement, &["select", "values", "explain", "pragma", "with"])
}

/// Whether a statement of a transaction may have rows to show: it reads, or has a RETURNING somewhere.
pub fn may_return(statement: &str) -> bool {
    may_read(statement) || statement.to_ascii_lowercase().contains("returning")
}

/// Whether a text is the name of a table, rather than a query.
pub fn is_name(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_alphanumeric() || c == '_')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_read_is_asked_first() {
        let check = |statement: &str, expected: bool| assert_eq!(may_read(statement), expected, "{statement}");
        check("SELECT 1", true);
        check("  select * from tasks", true);
        check("VALUES (1)", true);
        check("-- all\n/* open */ SELECT 1", true);
        check("WITH a AS (SELECT 1) INSERT INTO t SELECT * FROM a", true);
        check("update tasks set done = 1", false);
        check("/* SELECT */ DELETE FROM tasks", false);
        check("SAVEPOINT s", false);
        check("selection", false);
        for empty in ["", "  ", "-- nothing", "/* nothing"] {
            check(empty, false);
        }
    }

    #[test]
    fn names_are_told_from_queries() {
        assert!(is_name("tasks"));
        assert!(!is_name("SELECT * FROM tasks"));
        assert!(!is_name("a\"b"));
        assert!(!is_name(""));
    }
}
