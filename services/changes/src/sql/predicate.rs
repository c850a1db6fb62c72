//! What a declared predicate depends on, as far as its text tells. Pure; in doubt, on more.

use std::collections::HashSet;

/// Functions that depend on their arguments alone (or on the time), and words that are followed by a parenthesis.
const HARMLESS: [&str; 44] = [
    "exists",
    "in",
    "any",
    "all",
    "some",
    "and",
    "or",
    "not",
    "select",
    "from",
    "where",
    "on",
    "as",
    "join",
    "then",
    "else",
    "when",
    "is",
    "between",
    "like",
    "ilike",
    "using",
    "by",
    "having",
    "union",
    "coalesce",
    "nullif",
    "greatest",
    "least",
    "lower",
    "upper",
    "length",
    "char_length",
    "trim",
    "btrim",
    "abs",
    "now",
    "count",
    "min",
    "max",
    "sum",
    "jsonb_typeof",
    "array_length",
    "row",
];

/// What a predicate mentions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Mentions {
    /// Identifiers, in lower case: tables among them.
    pub names: HashSet<String>,
    /// It may call functions that read anything: tables, or who writes.
    pub functions: bool,
}

impl Mentions {
    /// Reads a predicate.
    pub fn of(sql: &str) -> Mentions {
        let words = words(sql);
        let functions = words.iter().any(|(word, call)| *call && !HARMLESS.contains(&word.as_str()));
        Mentions {
            // Forms of quoting that are not taken apart here.
            functions: functions || sql.contains('\\') || sql.contains("$$"),
            names: words.into_iter().map(|(word, _)| word).collect(),
        }
    }

    /// Adds what another one mentions.
    pub fn add(&mut self, other: Mentions) {
        self.names.extend(other.names);
        self.functions |= other.functions;
    }
}

/// Identifiers outside of string literals and comments, in lower case, each with whether `(` follows.
fn words(sql: &str) -> Vec<(String, bool)> {
    let mut words: Vec<(String, bool)> = Vec::new();
    let mut after_word = false;
    let mut characters = sql.chars().peekable();
    while let Some(character) = characters.next() {
        match character {
            space if space.is_whitespace() => continue,
            '-' if characters.peek() == Some(&'-') => while characters.next().is_some_and(|c| c != '\n') {},
            '/' if characters.peek() == Some(&'*') => {
                let mut last = ' ';
                while let Some(next) = characters.next()
                    && (last, next) != ('*', '/')
                {
                    last = next;
                }
            }
            '\'' => {
                while characters.next().is_some_and(|c| c != '\'') {}
                after_word = false;
            }
            '"' => {
                let word = characters.by_ref().take_while(|c| *c != '"').flat_map(char::to_lowercase).collect();
                words.push((word, false));
                after_word = true;
            }
            '(' => {
                if let Some(last) = words.last_mut().filter(|_| after_word) {
                    last.1 = true;
                }
                after_word = false;
            }
            first if first.is_alphabetic() || first == '_' => {
                let mut word = first.to_lowercase().collect::<String>();
                while let Some(next) = characters.next_if(|c| c.is_alphanumeric() || *c == '_' || *c == '$') {
                    word.extend(next.to_lowercase());
                }
                words.push((word, false));
                after_word = true;
            }
            _ => after_word = false,
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_found_by_name() {
        let mentions = |sql: &str, table: &str| Mentions::of(sql).names.contains(table);
        assert!(mentions("EXISTS (SELECT FROM members m)", "members"));
        assert!(mentions("EXISTS (SELECT FROM public.\"members\" m)", "members"));
        assert!(mentions("EXISTS (SELECT FROM MEMBERS)", "members"));
        assert!(mentions("true -- don't\n AND EXISTS (SELECT FROM members)", "members"));
        assert!(mentions("true /* isn't * / */ AND EXISTS (SELECT FROM members)", "members"));
        assert!(!mentions("new.members_count > 1 AND new.x <> 'members' -- members", "members"));
    }

    #[test]
    fn functions_are_told_from_words() {
        let calls = |sql: &str| Mentions::of(sql).functions;
        assert!(!calls("EXISTS (SELECT FROM m WHERE (m.a = new.a) AND m.b IN (1, 2)) OR lower(new.x) = 'f(x)'"));
        assert!(!calls("new.a = (1) OR ((new.b))"));
        assert!(calls("is_member(new.project_id)"));
        assert!(calls("current_setting ('millstream.user_id') = new.owner"));
        assert!(calls(r"new.x = E'it\'s' OR f(new.x) = ''"));
    }
}
