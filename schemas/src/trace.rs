//! W3C trace context: the one place that says what a `traceparent` is.
//!
//! Every message that carries one reads it through [`lenient`], so whatever a client, a validator or an older process wrote, past
//! the contract it is 55 plain characters or absent. It is a hint: nothing is refused because of it.
//! Source: W3C Trace Context, section 3.2, "Traceparent Header".

use serde::{Deserialize, Deserializer};

/// Length of a `traceparent` of version `00`.
const LENGTH: usize = 55;

/// Whether the text is a `traceparent`: `00-{32 digits}-{16 digits}-{2 digits}`, lower-case hexadecimal, neither id zero.
///
/// ```
/// assert!(millstream_schemas::trace::is_valid("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"));
/// assert!(!millstream_schemas::trace::is_valid("00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01"));
/// ```
pub fn is_valid(text: &str) -> bool {
    let digits = |part: Option<&str>, length| {
        part.is_some_and(|part| part.len() == length && part.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')))
    };
    let id =
        |part: Option<&str>, length| digits(part, length) && part.is_some_and(|part| part.bytes().any(|b| b != b'0'));
    let mut parts = text.splitn(4, '-');
    text.len() == LENGTH
        && parts.next() == Some("00")
        && id(parts.next(), 32)
        && id(parts.next(), 16)
        && digits(parts.next(), 2)
}

/// For `deserialize_with`: a text that is no `traceparent` counts as absent.
///
/// # Errors
/// The value is neither a text nor null.
pub fn lenient<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    Ok(Option::<String>::deserialize(deserializer)?.filter(|text| is_valid(text)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_well_formed_texts_pass() {
        let good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        assert!(is_valid(good));
        let long = "x".repeat(66_000);
        for bad in [
            "",
            long.as_str(),
            &good[..54],
            &format!("{good}-"),
            &format!("{good}0"),
            &good.replacen("00", "ff", 1),
            &good.replacen("00", "01", 1),
            &good.to_uppercase(),
            &good.replace('4', "\n"),
            &good.replace("4bf9", "é92"),
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
        ] {
            assert!(!is_valid(bad), "{bad}");
        }
    }

    #[test]
    fn what_is_none_is_dropped_wherever_it_is_read() {
        use crate::stream::OriginRecord;
        let read = |text: &str| serde_json::from_str::<OriginRecord>(text).map(|record| record.traceparent);
        let good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        assert_eq!(read(&format!(r#"{{"clients":[],"traceparent":"{good}"}}"#)).unwrap().as_deref(), Some(good));
        assert_eq!(read(r#"{"clients":[],"traceparent":"x"}"#).unwrap(), None);
        assert_eq!(read(r#"{"clients":[],"traceparent":null}"#).unwrap(), None);
        assert_eq!(read(r#"{"clients":[]}"#).unwrap(), None);
        assert!(read(r#"{"clients":[],"traceparent":5}"#).is_err());
    }
}
