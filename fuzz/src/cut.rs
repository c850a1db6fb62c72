//! Inputs of two parts.

/// The text before the first `separator`, and that behind it.
pub fn cut(text: &str, separator: char) -> (&str, &str) {
    text.split_once(separator).unwrap_or((text, ""))
}
