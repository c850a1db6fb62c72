//! Where in `millstream.toml` something is said. Pure.

use toml::de::{DeTable, DeValue};

/// The line of a byte of the text, from 1.
pub fn line(text: &str, byte: usize) -> usize {
    text.bytes().take(byte).filter(|byte| *byte == b'\n').count() + 1
}

/// The line of a place as problems name it: `[section.name]`, then perhaps a dotted key, in which a number counts in a
/// list. If the key is not there, the line of its section; none if that is not there either.
pub fn place(text: &str, place: &str) -> Option<usize> {
    let (section, key) = place.strip_prefix('[')?.rsplit_once(']')?;
    // A table's name may hold dots itself.
    let (kind, name) = section.split_once('.')?;
    let path = [kind, name].into_iter().chain(key.trim().split('.').filter(|part| !part.is_empty()));
    let root = DeTable::parse(text).ok()?;
    let (mut found, mut depth) = (None, 0);
    let mut table = Some(root.get_ref());
    let mut list: Option<&[toml::Spanned<DeValue<'_>>]> = None;
    for part in path {
        let value = if let Some((key, value)) = table.and_then(|t| t.iter().find(|(key, _)| key.get_ref() == part)) {
            found = Some(key.span().start);
            value
        } else if let Some(value) = list.and_then(|list| list.get(part.parse::<usize>().ok()?)) {
            found = Some(value.span().start);
            value
        } else {
            break;
        };
        depth += 1;
        (table, list) = match value.get_ref() {
            DeValue::Table(table) => (Some(table), None),
            DeValue::Array(array) => (None, Some(&**array)),
            _ => (None, None),
        };
    }
    found.filter(|_| depth >= 2).map(|byte| line(text, byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_found() {
        let text = "# a\n[scopes.p]\nmembership = 1\n[tables.\"app.t\"]\nwrite.insert = \"x\"\n\
                    rules = [\n  { code = \"a\", check = \"1\" },\n  { code = \"b\",\n    check = \"2\" },\n]\n[tables.u.write]\ndelete = \"y\"\n";
        let check = |at: &str, expected| assert_eq!(place(text, at), expected, "{at}");
        check("[scopes.p]", Some(2));
        check("[tables.app.t]", Some(4));
        check("[tables.app.t] write.insert", Some(5));
        check("[tables.app.t] write.delete", Some(5));
        check("[tables.app.t] rules.0.check", Some(7));
        check("[tables.app.t] rules.1.check", Some(9));
        check("[tables.u] write.delete", Some(12));
        check("[tables.v]", None);
        check("elsewhere", None);
        assert_eq!(place("not toml [", "[tables.v]"), None);
    }
}
