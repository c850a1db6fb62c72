//! How Postgres spells values: rows are known by the text of their keys, so a key in another spelling is another name.
//!
//! Source: PostgreSQL documentation, "Data Types", with `DateStyle = ISO` and `TimeZone = UTC`, as Millstream's own connections have
//! them.

use std::borrow::Cow;
use std::fmt::{Display, LowerExp};
use std::net::IpAddr;
use std::str::FromStr;

/// What Millstream knows about the way in which Postgres would write a text back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Spelling<'a> {
    /// Postgres gives the value back like this.
    Known(Cow<'a, str>),
    /// It is not understood here, if it is a value of the type at all; values look like this.
    Other(&'static str),
    /// The type is not known here: Postgres may give back something else.
    Any,
}

/// How Postgres spells a value of a type (as `format_type` names it) that was written as `text`.
///
/// ```
/// use millstream_schemas::spelling::{Spelling, spelling};
///
/// let known = |text: &str| Spelling::Known(text.to_owned().into());
/// assert_eq!(spelling("integer", "+7"), known("7"));
/// assert_eq!(spelling("timestamp with time zone", "2026-11-29T09:30:00.500+01:00"), known("2026-11-29 08:30:00.5+00"));
/// assert_eq!(spelling("uuid", "one"), Spelling::Other("00000000-0000-0000-0000-000000000000"));
/// assert_eq!(spelling("point", "(1, 2)"), Spelling::Any);
/// ```
pub fn spelling<'a>(sql_type: &str, text: &'a str) -> Spelling<'a> {
    let known = |found: Option<String>, form| match found {
        Some(found) if found == text => Spelling::Known(Cow::Borrowed(text)),
        Some(found) => Spelling::Known(Cow::Owned(found)),
        None => Spelling::Other(form),
    };
    let (name, modifiers) = split(sql_type);
    if ["date", "timestamp without time zone", "timestamp with time zone"].contains(&name.as_ref()) && is_far(text) {
        return Spelling::Any;
    }
    match name.as_ref() {
        "text" | "character varying" | "citext" => Spelling::Known(Cow::Borrowed(text)),
        "character" => {
            let length = modifiers.first().and_then(|n| usize::try_from(*n).ok()).unwrap_or(1);
            known(Some(format!("{:length$}", text.trim_end_matches(' '))), "")
        }
        "uuid" => known(uuid(text), "00000000-0000-0000-0000-000000000000"),
        "smallint" | "integer" | "bigint" => known(text.trim().parse::<i64>().ok().map(|n| n.to_string()), "42"),
        "boolean" => known(boolean(text).map(str::to_owned), "true or false"),
        "numeric" => known(decimal(text, modifiers.get(1).copied().or(modifiers.first().map(|_| 0))), "12.50"),
        "real" => known(real(text, |number: f32| float(number, 6)), "12.5"),
        "double precision" => known(real(text, |number: f64| float(number, 15)), "12.5"),
        "date" => known(date(text), "2026-11-29"),
        "timestamp without time zone" => known(timestamp(text, digits(&modifiers), false), "2026-11-29 08:30:00"),
        "timestamp with time zone" => known(timestamp(text, digits(&modifiers), true), "2026-11-29 08:30:00+00"),
        "time without time zone" => known(time(text, digits(&modifiers)).map(|(time, _)| time), "08:30:00"),
        "time with time zone" => {
            let zoned = |(time, ahead): (String, Option<i64>)| time + &zone_text(ahead.unwrap_or_default());
            known(time(text, digits(&modifiers)).map(zoned), "08:30:00+00")
        }
        // Postgres writes the last four bytes of some of these as of an IPv4 address.
        "inet" if text.trim_start().starts_with("::") => Spelling::Any,
        "inet" => known(inet(text), "192.0.2.1 or 2001:db8::1"),
        "bytea" => known(text.strip_prefix("\\x").is_some().then(|| text.to_ascii_lowercase()), "\\x00ff"),
        _ => Spelling::Any,
    }
}

/// A value as Postgres spells it, where that is known; else as it is.
pub fn respelt<'a>(sql_type: &str, text: &'a str) -> Cow<'a, str> {
    match spelling(sql_type, text) {
        Spelling::Known(known) => known,
        Spelling::Other(_) | Spelling::Any => Cow::Borrowed(text),
    }
}

/// Greatest scale of which one is still a number of 64 bits.
pub const MAX_SCALE: u32 = 18;

/// Precision and scale of a `numeric(p,s)` whose smallest unit can be counted: the scale is 0 to [`MAX_SCALE`].
///
/// ```
/// use millstream_schemas::spelling::decimals;
///
/// assert_eq!(decimals("numeric(10,2)"), Some((10, 2)));
/// assert_eq!((decimals("numeric"), decimals("numeric(3,-2)"), decimals("numeric(40,19)")), (None, None, None));
/// ```
pub fn decimals(sql_type: &str) -> Option<(u32, u32)> {
    let (name, modifiers) = split(sql_type);
    let [precision, scale] = modifiers[..] else { return None };
    let found = (u32::try_from(precision).ok()?, u32::try_from(scale).ok()?);
    (name == "numeric" && found.1 <= MAX_SCALE).then_some(found)
}

/// Whether texts of a type may be spelt in ways that Postgres does not give back, and that is known here.
pub fn is_spelt(sql_type: &str) -> bool {
    !matches!(spelling(sql_type, "?"), Spelling::Any | Spelling::Known(Cow::Borrowed("?")))
}

/// Whether equal values of a type are spelt alike, so that texts can be compared for them.
pub fn is_one_spelling(sql_type: &str) -> bool {
    !matches!(sql_type, "numeric" | "citext" | "real" | "double precision")
        && !matches!(spelling(sql_type, "?"), Spelling::Any)
}

/// Days before the year 1 or after 9999 are rare enough to be left to Postgres.
fn is_far(text: &str) -> bool {
    let year = text.bytes().take_while(u8::is_ascii_digit).count();
    text.trim_end().ends_with("BC") || year > 4
}

/// The type's name without its modifiers, and these.
fn split(sql_type: &str) -> (Cow<'_, str>, Vec<i64>) {
    let Some((before, (inside, after))) =
        sql_type.split_once('(').and_then(|(before, rest)| Some((before, rest.split_once(')')?)))
    else {
        return (Cow::Borrowed(sql_type), Vec::new());
    };
    let modifiers = inside.split(',').filter_map(|part| part.trim().parse().ok()).collect();
    if after.is_empty() {
        (Cow::Borrowed(before), modifiers)
    } else {
        (Cow::Owned(format!("{before}{after}")), modifiers)
    }
}

/// Most digits of a second's fraction.
fn digits(modifiers: &[i64]) -> usize {
    modifiers.first().and_then(|n| usize::try_from(*n).ok()).unwrap_or(6).min(6)
}

/// Hexadecimal digits, with hyphens behind any group of four, perhaps in braces.
fn uuid(text: &str) -> Option<String> {
    let inner = match text.strip_prefix('{') {
        Some(rest) => rest.strip_suffix('}')?,
        None => text,
    };
    let mut plain = String::with_capacity(36);
    let (mut count, mut hyphen) = (0, true);
    for c in inner.chars() {
        match c {
            '-' if !hyphen && count % 4 == 0 && count < 32 => hyphen = true,
            c if c.is_ascii_hexdigit() && count < 32 => {
                if [8, 12, 16, 20].contains(&count) {
                    plain.push('-');
                }
                plain.push(c.to_ascii_lowercase());
                (count, hyphen) = (count + 1, false);
            }
            _ => return None,
        }
    }
    (count == 32 && !hyphen).then_some(plain)
}

fn boolean(text: &str) -> Option<&'static str> {
    match text.trim().to_ascii_lowercase().as_str() {
        "t" | "true" | "y" | "yes" | "on" | "1" => Some("t"),
        "f" | "false" | "n" | "no" | "off" | "0" => Some("f"),
        _ => None,
    }
}

/// A number in decimal digits, rounded to the `scale` that the type has, away from zero in the middle.
fn decimal(text: &str, scale: Option<i64>) -> Option<String> {
    let text = text.trim();
    let (negative, unsigned) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    match unsigned.to_ascii_lowercase().as_str() {
        "nan" if unsigned == text => return Some("NaN".to_owned()),
        "inf" | "infinity" => return Some(if negative { "-Infinity" } else { "Infinity" }.to_owned()),
        _ => {}
    }
    let (mantissa, exponent) = match unsigned.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, exponent.parse::<i32>().ok().filter(|e| e.abs() <= 1_000)?),
        None => (unsigned, 0),
    };
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let all = format!("{whole}{fraction}");
    if all.is_empty() || !all.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    // Number of digits in front of the decimal point.
    let point = whole.len() as i64 + i64::from(exponent);
    // One more zero in front, for a carry.
    let front = (-point).max(0) as usize + 1;
    let mut digits = format!("{:0<front$}{all}", "").into_bytes();
    let point = point.max(0) as usize + 1;
    if let Some(scale) = scale {
        let cut = (point as i64 + scale).max(0) as usize;
        let up = digits.get(cut).is_some_and(|digit| *digit >= b'5');
        digits.truncate(cut);
        if let Some(last) = digits.iter().rposition(|digit| *digit != b'9').filter(|_| up) {
            digits[last] += 1;
            digits[last + 1..].fill(b'0');
        }
        digits.resize(cut, b'0');
    }
    digits.resize(digits.len().max(point), b'0');
    let sign = if negative && digits.iter().any(|digit| *digit != b'0') { "-" } else { "" };
    let digits = String::from_utf8(digits).ok()?;
    let (whole, fraction) = digits.split_at(point);
    let whole = Some(whole.trim_start_matches('0')).filter(|whole| !whole.is_empty()).unwrap_or("0");
    Some(if fraction.is_empty() { format!("{sign}{whole}") } else { format!("{sign}{whole}.{fraction}") })
}

/// A floating-point number. What is too large for the type, or rounded to nothing, is none.
fn real<F: FromStr + Into<f64> + Copy>(text: &str, spelt: impl Fn(F) -> String) -> Option<String> {
    let text = text.trim();
    let number: F = text.parse().ok()?;
    let is_number = text.contains(|c: char| c.is_ascii_digit());
    let mantissa = text.split(['e', 'E']).next().unwrap_or(text);
    let is_zero = !mantissa.contains(|c: char| ('1'..='9').contains(&c));
    let fits = !is_number || number.into().is_finite() && (number.into() == 0.0) == is_zero;
    fits.then(|| spelt(number))
}

/// A `double precision` as Postgres writes it.
pub fn double(number: f64) -> String {
    float(number, 15)
}

/// The shortest digits that give the number back; with an exponent below 1e-4 and from `10^digits` on.
///
/// Source: PostgreSQL, `d2s.c` and `f2s.c`, which are Ryu with `STRICTLY_SHORTEST` 0: digits half-way between two numbers,
/// where readers would have to round to the even one, do not count.
fn float<F: FromStr + LowerExp + Display + PartialEq + Copy>(number: F, digits: i32) -> String {
    let shortest = format!("{number:e}");
    let Some((mantissa, exponent)) = shortest.split_once('e') else {
        return shortest.replace("inf", "Infinity");
    };
    if exponent.parse().is_ok_and(|exponent: i32| (-4..digits).contains(&exponent)) {
        return number.to_string();
    }
    let gives_back = |text: String| text.parse::<F>().is_ok_and(|read| read == number);
    // A little less and a little more are the same number.
    let is_inside = |(mantissa, exponent): &(String, i32)| {
        let (before, last) = mantissa.split_at(mantissa.len() - 1);
        let point = if mantissa.contains('.') { "" } else { "." };
        let less = last.parse::<u8>().ok().and_then(|digit| digit.checked_sub(1));
        less.is_some_and(|less| gives_back(format!("{before}{less}{point}{}e{exponent}", "9".repeat(30))))
            && gives_back(format!("{mantissa}{point}{:030}1e{exponent}", 0))
    };
    let split = |text: &str| {
        let (mantissa, exponent) = text.split_once('e')?;
        Some((mantissa.to_owned(), exponent.parse().ok()?))
    };
    let places = mantissa.split_once('.').map_or(0, |(_, places)| places.len());
    let longer = (places + 1..20).filter_map(|places| split(&format!("{number:.places$e}")));
    let found = split(&shortest).into_iter().chain(longer).find(is_inside);
    found.map_or(shortest, |(mantissa, exponent)| format!("{mantissa}e{exponent:+03}"))
}

/// Microseconds of a second, and of a day.
const SECOND: i64 = 1_000_000;
const DAY: i64 = 86_400 * SECOND;

/// Days since 2000-01-01 of a day in the years 1 to 9999 of the Gregorian calendar.
/// Source: Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms".
fn days(year: i64, month: i64, day: i64) -> Option<i64> {
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let last = match month {
        2 if leap => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        1..=12 => 31,
        _ => return None,
    };
    if !(1..=9_999).contains(&year) || !(1..=last).contains(&day) {
        return None;
    }
    // Years that begin in March: the leap day is their last.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let of_year = (153 * month + 2) / 5 + day - 1;
    Some(365 * year + year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400) + of_year - 730_425)
}

/// The text of a day, in the years 1 to 9999.
fn day_text(days: i64) -> Option<String> {
    let days = days + 730_425;
    let (era, of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let (year, month) = (year + 400 * era, month + 3);
    let (year, month) = if month > 12 { (year + 1, month - 12) } else { (year, month) };
    (1..=9_999).contains(&year).then(|| format!("{year:04}-{month:02}-{day:02}"))
}

/// The text of microseconds since midnight.
fn time_text(micros: i64) -> String {
    let seconds = micros / SECOND;
    let fraction = format!("{:06}", micros % SECOND);
    let fraction = fraction.trim_end_matches('0');
    let point = if fraction.is_empty() { "" } else { "." };
    format!("{:02}:{:02}:{:02}{point}{fraction}", seconds / 3_600, seconds / 60 % 60, seconds % 60)
}

/// Microseconds since 2000, or since midnight, rounded to so many digits of a second, away from zero in the middle, as Postgres does it.
fn rounded(micros: i64, digits: usize) -> i64 {
    let unit = 10_i64.pow(6 - digits.min(6) as u32);
    (micros.abs() + unit / 2) / unit * unit * micros.signum()
}

/// Splits a number of at most `most` digits off the front of a text; gives the number and the rest of the text.
fn number(text: &str, most: usize) -> Option<(i64, &str)> {
    let end = text.bytes().take(most).take_while(u8::is_ascii_digit).count();
    Some((text[..end].parse().ok()?, &text[end..]))
}

fn day(text: &str) -> Option<(i64, &str)> {
    let (year, rest) = number(text, 4).filter(|(_, rest)| text.len() - rest.len() == 4)?;
    let (month, rest) = number(rest.strip_prefix('-')?, 2)?;
    let (day, rest) = number(rest.strip_prefix('-')?, 2)?;
    Some((days(year, month, day)?, rest))
}

fn endless(text: &str) -> Option<String> {
    let text = text.trim().to_ascii_lowercase();
    ["infinity", "-infinity"].contains(&text.as_str()).then_some(text)
}

/// Microseconds since midnight, and the rest of the text.
fn clock_time(text: &str) -> Option<(i64, &str)> {
    let (hours, rest) = number(text, 2)?;
    let (minutes, rest) = number(rest.strip_prefix(':')?, 2)?;
    // Without seconds, a fraction would have Postgres take the two numbers for minutes and seconds.
    let (seconds, fraction, rest) = match rest.strip_prefix(':') {
        Some(rest) => {
            let (seconds, rest) = number(rest, 2)?;
            let behind = rest.strip_prefix('.');
            let (fraction, rest) = behind
                .map_or(("", rest), |digits| digits.split_at(digits.bytes().take_while(u8::is_ascii_digit).count()));
            (seconds, fraction, rest)
        }
        None => (0, "", rest),
    };
    // By way of a floating-point number, as Postgres reads it.
    let fraction = format!("0.{fraction}0").parse::<f64>().ok()? * SECOND as f64;
    let micros = (hours * 3_600 + minutes * 60 + seconds) * SECOND + fraction.round_ties_even() as i64;
    // With the leap second, and 24:00.
    let is_time = (hours < 24 || hours == 24 && micros == DAY) && minutes < 60 && seconds <= 60;
    is_time.then_some((micros, rest))
}

/// Seconds that a zone is ahead of UTC.
fn zone(text: &str) -> Option<i64> {
    if ["z", "utc", "gmt"].contains(&text.to_ascii_lowercase().as_str()) {
        return Some(0);
    }
    let (sign, rest) = match text.split_at_checked(1)? {
        ("+", rest) => (1, rest),
        ("-", rest) => (-1, rest),
        _ => return None,
    };
    let (hours, rest) = number(rest, 4)?;
    // 130 is 1:30.
    let (hours, minutes, seconds, rest) = match rest.strip_prefix(':') {
        None if text.len() > 3 => (hours / 100, hours % 100, 0, rest),
        None => (hours, 0, 0, rest),
        Some(rest) => {
            let (minutes, rest) = number(rest, 2)?;
            let (seconds, rest) = rest.strip_prefix(':').map_or(Some((0, rest)), |rest| number(rest, 2))?;
            (hours, minutes, seconds, rest)
        }
    };
    let is_zone = rest.is_empty() && hours < 16 && minutes < 60 && seconds < 60;
    is_zone.then_some(sign * (hours * 3_600 + minutes * 60 + seconds))
}

/// A zone as Postgres writes it.
fn zone_text(ahead: i64) -> String {
    let (sign, ahead) = (if ahead < 0 { '-' } else { '+' }, ahead.abs());
    match (ahead / 60 % 60, ahead % 60) {
        (0, 0) => format!("{sign}{:02}", ahead / 3_600),
        (minutes, 0) => format!("{sign}{:02}:{minutes:02}", ahead / 3_600),
        (minutes, seconds) => format!("{sign}{:02}:{minutes:02}:{seconds:02}", ahead / 3_600),
    }
}

/// A time of the day, with its zone if there is one; Postgres ignores a day before it.
fn time(text: &str, digits: usize) -> Option<(String, Option<i64>)> {
    let text = text.trim();
    let behind_day = day(text).and_then(|(_, rest)| rest.strip_prefix(' '));
    let (micros, rest) = clock_time(behind_day.map_or(text, str::trim_start))?;
    let ahead = if rest.is_empty() { None } else { Some(zone(rest.trim_start())?) };
    (micros <= DAY).then(|| (time_text(rounded(micros, digits)), ahead))
}

/// A day, the microseconds since its midnight, and the seconds that the zone is ahead of UTC.
fn moment(text: &str) -> Option<(i64, i64, i64)> {
    let (day, rest) = day(text.trim())?;
    let (micros, rest) = match rest.strip_prefix([' ', 'T', 't']) {
        Some(rest) => clock_time(rest)?,
        None => (0, rest),
    };
    Some((day, micros, if rest.is_empty() { 0 } else { zone(rest.trim_start())? }))
}

/// A day; Postgres ignores a time behind it.
fn date(text: &str) -> Option<String> {
    endless(text).or_else(|| moment(text).and_then(|(day, ..)| day_text(day)))
}

fn timestamp(text: &str, digits: usize, zoned: bool) -> Option<String> {
    if let Some(end) = endless(text) {
        return Some(end);
    }
    let (day, micros, ahead) = moment(text)?;
    // Without a zone in its type, Postgres ignores that of the text.
    let ahead = if zoned { ahead } else { 0 };
    let micros = rounded(day * DAY + micros - ahead * SECOND, digits);
    let day = day_text(micros.div_euclid(DAY))?;
    Some(format!("{day} {}{}", time_text(micros.rem_euclid(DAY)), if zoned { "+00" } else { "" }))
}

/// An address without a network, or with one that is smaller than it.
fn inet(text: &str) -> Option<String> {
    let (address, length) = match text.split_once('/') {
        Some((address, length)) => (address, Some(length.parse::<u8>().ok()?)),
        None => (text, None),
    };
    let address: IpAddr = address.parse().ok()?;
    let full = if address.is_ipv4() { 32 } else { 128 };
    match length {
        Some(length) if length < full => Some(format!("{address}/{length}")),
        Some(length) if length > full => None,
        _ => Some(address.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The values of a type are Postgres' own: see `tests/system/types.rs`, which asks Postgres about all of these.
    #[test]
    fn what_is_not_understood_is_not_guessed() {
        for (sql_type, text) in [
            ("uuid", "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a1"),
            ("uuid", "a0eebc999c-0b4ef8bb6d6bb9bd380a11"),
            ("uuid", "{a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"),
            ("integer", "7.0"),
            ("integer", "seven"),
            ("numeric", "1e9999"),
            ("numeric", "1.5 apples"),
            ("numeric", "."),
            ("date", "tomorrow"),
            ("date", "2026-02-29"),
            ("date", "29.11.2026"),
            ("timestamp with time zone", "2026-11-29 25:00"),
            ("timestamp with time zone", "2026-11-29 08:00 Europe/Berlin"),
            ("timestamp with time zone", "9999-12-31 23:00-02"),
            ("date", "2026-11-29 25:00"),
            ("time without time zone", "noon"),
            ("time with time zone", "08:00 Europe/Berlin"),
            ("double precision", "1e400"),
            ("double precision", "1e-400"),
            ("real", "1e40"),
            ("real", "0x1p3"),
            ("inet", "10.1"),
            ("boolean", "perhaps"),
        ] {
            assert!(matches!(spelling(sql_type, text), Spelling::Other(_)), "{text} as {sql_type}");
        }
        for sql_type in ["interval", "point", "jsonb", "integer[]", "my.type"] {
            assert_eq!(spelling(sql_type, "x"), Spelling::Any, "{sql_type}");
        }
    }
}
