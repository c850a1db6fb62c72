//! Errors as the log shows them.

use std::error::Error;

/// Longest text of an error in the log, in characters: it may quote what a client sent.
const MAX_CHARS: usize = 2000;

/// An error with its causes, in one line: `cannot read the catalog: connection refused`.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let part = cause.to_string();
        // Some errors of other crates repeat their cause.
        if !text.ends_with(&part) {
            text.push_str(": ");
            text.push_str(&part);
        }
        source = cause.source();
    }
    if let Some((end, _)) = text.char_indices().nth(MAX_CHARS) {
        text.truncate(end);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{text}")]
    struct Layer {
        text: String,
        source: Option<Box<Layer>>,
    }

    fn layers(texts: &[&str]) -> Option<Box<Layer>> {
        let (text, rest) = texts.split_first()?;
        Some(Box::new(Layer { text: (*text).to_owned(), source: layers(rest) }))
    }

    #[test]
    fn causes_follow_once_each() {
        let check = |texts: &[&str], expected: &str| assert_eq!(chain(&*layers(texts).unwrap()), expected);
        check(&["cannot ask"], "cannot ask");
        check(&["cannot ask", "cannot connect", "refused"], "cannot ask: cannot connect: refused");
        check(&["cannot ask: refused", "refused"], "cannot ask: refused");
    }

    #[test]
    fn long_texts_are_cut_at_the_limit() {
        for (chars, kept) in [(MAX_CHARS, MAX_CHARS), (MAX_CHARS + 1, MAX_CHARS)] {
            let text = "é".repeat(chars);
            assert_eq!(chain(&*layers(&[&text]).unwrap()).chars().count(), kept);
        }
    }
}
