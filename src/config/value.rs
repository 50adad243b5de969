//! Values as they were written, and the forms that a setting may ask for.
//!
//! Each parser's error says what is allowed; the caller adds key, value and origin.

use std::fmt;
use std::ops::RangeInclusive;
use std::time::Duration;

/// One written value; numbers from a file are taken as text too, so that every source has one parser.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Value {
    One(String),
    Many(Vec<String>),
}

/// What is allowed, if the value is not.
pub(super) type Parsed<T> = Result<T, String>;

impl Value {
    /// `None` for what no setting takes: tables, and lists of anything but scalars.
    pub(super) fn from_toml(value: &toml::Value) -> Option<Self> {
        match value {
            toml::Value::Array(items) => items.iter().map(scalar).collect::<Option<_>>().map(Self::Many),
            single => scalar(single).map(Self::One),
        }
    }

    fn one(&self) -> Option<&str> {
        match self {
            Self::One(text) => Some(text.trim()),
            Self::Many(_) => None,
        }
    }

    fn parse<T>(&self, parser: impl FnOnce(&str) -> Option<T>, allowed: impl FnOnce() -> String) -> Parsed<T> {
        self.one().and_then(parser).ok_or_else(allowed)
    }

    pub(super) fn text(&self, max_bytes: usize) -> Parsed<String> {
        let valid = |text: &str| !text.is_empty() && text.len() <= max_bytes && !text.contains(char::is_control);
        self.parse(
            |text| valid(text).then(|| text.to_owned()),
            || format!("must be text of 1 to {max_bytes} bytes without control characters"),
        )
    }

    pub(super) fn integer<T>(&self, range: RangeInclusive<T>) -> Parsed<T>
    where
        T: std::str::FromStr + PartialOrd + fmt::Display,
    {
        self.parse(
            |text| text.parse().ok().filter(|number| range.contains(number)),
            || format!("must be a whole number from {} to {}", range.start(), range.end()),
        )
    }

    /// A number, or a word for the absence of one.
    pub(super) fn integer_or<T>(&self, word: &str, range: RangeInclusive<T>) -> Parsed<Option<T>>
    where
        T: std::str::FromStr + PartialOrd + fmt::Display,
    {
        if self.one() == Some(word) {
            return Ok(None);
        }
        self.integer(range).map(Some).map_err(|allowed| format!("{allowed}, or {word}"))
    }

    pub(super) fn size(&self, range: RangeInclusive<u64>) -> Parsed<u64> {
        self.parse(
            |text| parse_size(text).filter(|size| range.contains(size)),
            || {
                let (least, most) = (show_size(*range.start()), show_size(*range.end()));
                format!("must be a size from {least} to {most}, in bytes or with a unit (kiB, MiB, GiB; kB, MB, GB)")
            },
        )
    }

    /// Without a unit: seconds.
    pub(super) fn duration(&self, range: RangeInclusive<Duration>) -> Parsed<Duration> {
        self.parse(
            |text| parse_duration(text).filter(|duration| range.contains(duration)),
            || {
                format!(
                    "must be a time from {:?} to {:?}, in seconds or with a unit (ms, s, m)",
                    range.start(),
                    range.end()
                )
            },
        )
    }

    /// A time, or a word for the absence of one.
    pub(super) fn duration_or(&self, word: &str, range: RangeInclusive<Duration>) -> Parsed<Option<Duration>> {
        if self.one() == Some(word) {
            return Ok(None);
        }
        self.duration(range).map(Some).map_err(|allowed| format!("{allowed}, or {word}"))
    }

    pub(super) fn boolean(&self) -> Parsed<bool> {
        self.choice(&[("true", true), ("false", false)])
    }

    pub(super) fn choice<T: Copy>(&self, choices: &[(&str, T)]) -> Parsed<T> {
        self.parse(
            |text| choices.iter().find(|(name, _)| *name == text).map(|(_, choice)| *choice),
            || {
                let names: Vec<_> = choices.iter().map(|(name, _)| *name).collect();
                format!("must be one of {}", names.join(", "))
            },
        )
    }

    /// A list: an array in a file; on the command line and in the environment commas between the items, and
    /// `none` for no items.
    pub(super) fn list<T>(&self, item: impl Fn(&str) -> Option<T>, allowed: &str) -> Parsed<Vec<T>> {
        let items: Vec<&str> = match self {
            Self::Many(items) => items.iter().map(String::as_str).collect(),
            Self::One(text) if matches!(text.trim(), "" | "none") => Vec::new(),
            Self::One(text) => text.split(',').map(str::trim).collect(),
        };
        let parsed = items.into_iter().map(item).collect::<Option<Vec<_>>>();
        parsed.ok_or_else(|| format!("must be a list of {allowed}"))
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::One(text) => f.write_str(text),
            Self::Many(items) => f.write_str(&items.join(", ")),
        }
    }
}

fn scalar(value: &toml::Value) -> Option<String> {
    match value {
        toml::Value::String(text) => Some(text.clone()),
        toml::Value::Integer(_) | toml::Value::Float(_) | toml::Value::Boolean(_) => Some(value.to_string()),
        _ => None,
    }
}

/// `kiB` and a bare `k` count 1024, `kB` counts 1000, and so on; upper and lower case are the same.
fn parse_size(text: &str) -> Option<u64> {
    let (number, unit) = split_unit(text);
    let factor = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "ki" | "kib" => 1 << 10,
        "m" | "mi" | "mib" => 1 << 20,
        "g" | "gi" | "gib" => 1 << 30,
        "t" | "ti" | "tib" => 1 << 40,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(factor)
}

fn parse_duration(text: &str) -> Option<Duration> {
    let (number, unit) = split_unit(text);
    let number: u64 = number.parse().ok()?;
    match unit {
        "ms" => Some(Duration::from_millis(number)),
        "" | "s" => Some(Duration::from_secs(number)),
        "m" | "min" => number.checked_mul(60).map(Duration::from_secs),
        _ => None,
    }
}

fn split_unit(text: &str) -> (&str, &str) {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    (number, unit.trim_start())
}

fn show_size(bytes: u64) -> String {
    let units = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("kiB", 10)];
    units.into_iter().find(|(_, shift)| bytes >> shift > 0 && bytes.trailing_zeros() >= *shift).map_or_else(
        || format!("{bytes} byte{}", if bytes == 1 { "" } else { "s" }),
        |(unit, shift)| format!("{} {unit}", bytes >> shift),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(text: &str) -> Value {
        Value::One(text.to_owned())
    }

    #[test]
    fn sizes_take_binary_and_decimal_units() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("512B", 512),
            ("4k", 4096),
            ("256MiB", 256 << 20),
            ("256 mib", 256 << 20),
            ("1GB", 1_000_000_000),
            ("2Gi", 2 << 30),
        ] {
            assert_eq!(parse_size(text), Some(bytes), "{text}");
        }
        for text in ["", "MiB", "-1", "1.5GiB", "1XB", "99999999TiB", "1 2"] {
            assert_eq!(parse_size(text), None, "{text}");
        }
    }

    #[test]
    fn durations_are_seconds_unless_a_unit_says_otherwise() {
        assert_eq!(parse_duration("10"), Some(Duration::from_secs(10)));
        assert_eq!(parse_duration("500ms"), Some(Duration::from_millis(500)));
        assert_eq!(parse_duration("2m"), Some(Duration::from_secs(120)));
        assert_eq!(parse_duration("2h"), None);
        assert_eq!(parse_duration(""), None);
    }

    #[test]
    fn every_refusal_says_what_is_allowed() {
        assert_eq!(one("x").integer(0..=65_535_u16).unwrap_err(), "must be a whole number from 0 to 65535");
        assert_eq!(
            one("0").integer_or("unlimited", 1..=9_u32).unwrap_err(),
            "must be a whole number from 1 to 9, or unlimited"
        );
        assert_eq!(
            one("1").size((1 << 20)..=(1 << 40)).unwrap_err(),
            "must be a size from 1 MiB to 1 TiB, in bytes or with a unit (kiB, MiB, GiB; kB, MB, GB)"
        );
        assert_eq!(one("c").choice(&[("a", 1), ("b", 2)]).unwrap_err(), "must be one of a, b");
        assert!(Value::Many(vec!["1".to_owned()]).integer(0..=9_u8).is_err());
        assert!(one("a\nb").text(255).is_err() && one("").text(255).is_err());
    }

    #[test]
    fn lists_come_as_arrays_or_with_commas() {
        let list = |value: Value| value.list(|item| item.parse::<u8>().ok(), "numbers");
        assert_eq!(list(one("1, 2")), Ok(vec![1, 2]));
        assert_eq!(list(one("none")), Ok(vec![]));
        assert_eq!(list(Value::Many(vec!["1".to_owned()])), Ok(vec![1]));
        assert_eq!(list(one("1,,2")).unwrap_err(), "must be a list of numbers");
    }
}
