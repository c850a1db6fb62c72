//! Names, literals and long expressions in SQLite's SQL.

/// An identifier, quoted.
pub fn quote(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// A text literal.
pub fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

/// SQL that joins operands by an associative operator, as a balanced tree. A plain chain is as deep as it is long, and SQLite
/// refuses expressions deeper than 1,000: a wide table's would be.
pub fn joined(operands: &[String], operator: &str) -> String {
    match operands {
        [operand] => operand.clone(),
        _ => {
            let (left, right) = operands.split_at(operands.len() / 2);
            format!("({} {operator} {})", joined(left, operator), joined(right, operator))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn joined_operands_are_a_balanced_tree() {
        let letters = |text: &str| text.chars().map(String::from).collect::<Vec<_>>();
        assert_eq!(joined(&letters("a"), "||"), "a");
        assert_eq!(joined(&letters("abcde"), "OR"), "((a OR b) OR (c OR (d OR e)))");
    }
}
