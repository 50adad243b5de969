//! The patterns of `LIKE`: `%` stands for any number of bytes, `_` for one. As in RabbitMQ's plugin neither stands for a
//! line end, and a letter outside ASCII is as many bytes as it has in UTF-8.
//!
//! # Invariants
//! - J1: a match costs a bounded number of steps, whatever pattern and text are.

use regex::bytes::{Regex, RegexBuilder};

use super::term::{Term, as_bytes};
use crate::model::erlang;

/// The plugin's bound on patterns, in elements.
const MAX_ELEMENTS: usize = 1024;
/// Steps after which a text counts as not matching.
const MAX_STEPS: usize = 1 << 20;
/// Longer texts do not match a regular expression.
const MAX_REGEX_TEXT_BYTES: usize = 1 << 14;
/// Larger regular expressions are refused, in bytes when compiled.
const MAX_REGEX_BYTES: usize = 1 << 18;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    /// `%`
    Any,
    /// `_`
    One,
    Byte(u8),
}

/// A compiled pattern.
#[derive(Clone, Debug)]
pub enum Pattern {
    /// By lines, since wildcards stay within theirs.
    Like(Box<[Box<[Element]>]>),
    /// Must match from the first byte to the last.
    Regex(Regex),
}

impl Pattern {
    /// Compiles what stands behind the operand of `like`: a pattern and its escape character (or `no_escape`), or
    /// `regex` and a regular expression. The error is what `~tp` shows of the plugin's reason.
    pub fn compile(pattern: &Term, escape: &Term) -> Result<Self, String> {
        if *pattern == Term::Atom("regex") {
            return compile_regex(escape).map_err(|reason| format!("{{invalid_regex,{reason}}}"));
        }
        let invalid = |reason: String| format!("{{invalid_like_pattern,{reason}}}");
        let Term::Binary(bytes) = pattern else {
            return Err(invalid(format!("{{not_a_binary_pattern,{}}}", pattern.shown())));
        };
        let escape = match escape {
            Term::Atom("no_escape") => None,
            Term::Binary(escape) if escape.len() == 1 => Some(escape[0]),
            _ => return Err(invalid("invalid_escape".to_owned())),
        };
        let elements = elements(bytes, escape);
        if elements.len() > MAX_ELEMENTS {
            return Err(invalid("pattern_too_long".to_owned()));
        }
        let lines = elements.split(|element| *element == Element::Byte(b'\n'));
        Ok(Self::Like(lines.map(Box::from).collect()))
    }

    pub fn matches(&self, text: &[u8]) -> bool {
        match self {
            Self::Like(lines) => {
                let mut steps = MAX_STEPS;
                let mut texts = text.split(|byte| *byte == b'\n');
                lines.iter().all(|line| texts.next().is_some_and(|text| matches_line(line, text, &mut steps)))
                    && texts.next().is_none()
            }
            Self::Regex(regex) => {
                text.len() <= MAX_REGEX_TEXT_BYTES
                    && regex.find(text).is_some_and(|found| found.range() == (0..text.len()))
            }
        }
    }
}

/// An escape character makes the next byte a literal one; as the last byte it is one itself.
fn elements(pattern: &[u8], escape: Option<u8>) -> Vec<Element> {
    let mut elements = Vec::with_capacity(pattern.len());
    let mut rest = pattern;
    loop {
        let (element, after) = match rest {
            [] => return elements,
            [first, literal, after @ ..] if Some(*first) == escape => (Element::Byte(*literal), after),
            [b'_', after @ ..] => (Element::One, after),
            [b'%', after @ ..] => (Element::Any, after),
            [byte, after @ ..] => (Element::Byte(*byte), after),
        };
        elements.push(element);
        rest = after;
    }
}

/// Matches with one place to come back to: behind the last `%`, the next bytes are tried one later. What was before it
/// fits as early as it can, which leaves most to the rest.
fn matches_line(elements: &[Element], text: &[u8], steps: &mut usize) -> bool {
    let (mut element, mut at) = (0, 0);
    let mut retry: Option<(usize, usize)> = None;
    loop {
        if *steps == 0 {
            return false;
        }
        *steps -= 1;
        let fits = match (elements.get(element), text.get(at)) {
            (Some(Element::Any), _) => {
                element += 1;
                retry = Some((element, at));
                continue;
            }
            (None, None) => return true,
            (Some(Element::One), Some(_)) => true,
            (Some(Element::Byte(expected)), Some(byte)) => expected == byte,
            _ => false,
        };
        if fits {
            (element, at) = (element + 1, at + 1);
            continue;
        }
        match retry {
            Some((behind, from)) if from < text.len() => {
                retry = Some((behind, from + 1));
                (element, at) = (behind, from + 1);
            }
            _ => return false,
        }
    }
}

fn compile_regex(source: &Term) -> Result<Pattern, String> {
    let bytes: Option<Vec<u8>> = match source {
        Term::Binary(bytes) => Some(bytes.to_vec()),
        Term::List(items) => as_bytes(items),
        _ => None,
    };
    let bytes = bytes.ok_or("badarg")?;
    if bytes.len() > MAX_ELEMENTS {
        return Err("pattern_too_long".to_owned());
    }
    let text = String::from_utf8(bytes).map_err(|_| "badarg")?;
    let regex = RegexBuilder::new(&text).unicode(false).size_limit(MAX_REGEX_BYTES).build();
    regex.map(Pattern::Regex).map_err(|error| {
        let error = error.to_string();
        let reason = error.lines().last().unwrap_or_default();
        erlang::string(reason.trim_start_matches("error: ").as_bytes())
    })
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use proptest::prelude::*;

    use super::*;

    fn binary(bytes: &[u8]) -> Term {
        Term::Binary(bytes.into())
    }

    fn like(pattern: &str, text: &str) -> bool {
        Pattern::compile(&binary(pattern.as_bytes()), &Term::Atom("no_escape")).unwrap().matches(text.as_bytes())
    }

    #[test]
    fn wildcards_stand_for_bytes_of_a_line() {
        for (pattern, text, expected) in [
            ("bl%", "blue", true),
            ("bl%", "bl", true),
            ("bl_e", "blue", true),
            ("bl_e", "ble", false),
            ("l%", "blue", false),
            ("%u%", "blue", true),
            ("%", "", true),
            ("", "", true),
            ("", "a", false),
            ("_", "", false),
            ("%a%b%", "xaxbxaxb", true),
            ("%ab", "abab", true),
            ("__", "ü", true),
            ("_", "ü", false),
            ("a.c", "abc", false),
            ("a.*", "a.*", true),
            ("%", "a\nb", false),
            ("_", "\n", false),
            ("a%\n%b", "a1\n2b", true),
            ("a%\n%b", "a1\n2\nb", false),
        ] {
            assert_eq!(like(pattern, text), expected, "{text:?} like {pattern:?}");
        }
    }

    #[test]
    fn an_escape_character_makes_wildcards_literal() {
        let matches = |pattern: &[u8], text: &str| {
            Pattern::compile(&binary(pattern), &binary(b"!")).unwrap().matches(text.as_bytes())
        };
        assert!(matches(b"b_!_ue", "bl_ue") && !matches(b"b_!_ue", "blxue"));
        assert!(matches(b"100!%", "100%") && !matches(b"100!%", "1000"));
        assert!(matches(b"a!!b", "a!b") && matches(b"a!b", "ab") && matches(b"a!", "a!"));
    }

    #[test]
    fn bad_patterns_are_named() {
        let error = |pattern: Term, escape: Term| Pattern::compile(&pattern, &escape).unwrap_err();
        let none = || Term::Atom("no_escape");
        let invalid = |reason: &str| format!("{{invalid_like_pattern,{reason}}}");
        assert_eq!(error(binary(b"x"), binary(b"ab")), invalid("invalid_escape"));
        assert_eq!(error(binary(b"x"), Term::Atom("true")), invalid("invalid_escape"));
        assert_eq!(error(binary(&[b'x'; 1025]), none()), invalid("pattern_too_long"));
        assert_eq!(error(Term::List(vec![Term::Integer(120)]), none()), invalid("{not_a_binary_pattern,\"x\"}"));
        assert!(Pattern::compile(&binary(&[b'%'; 1024]), &none()).is_ok());
        let regex = |source: Term| error(Term::Atom("regex"), source);
        assert_eq!(regex(Term::Integer(5)), "{invalid_regex,badarg}");
        assert_eq!(regex(binary(&[0xff])), "{invalid_regex,badarg}");
        assert_eq!(regex(binary(b"(")), "{invalid_regex,\"unclosed group\"}");
        assert_eq!(regex(binary(&[b'x'; 1025])), "{invalid_regex,pattern_too_long}");
        assert!(regex(binary(b"((a{100}){100}){100}")).starts_with("{invalid_regex,\"Compiled regex exceeds"));
    }

    #[test]
    fn a_regular_expression_must_match_as_a_whole() {
        let matches = |source: &[u8], text: &str| {
            Pattern::compile(&Term::Atom("regex"), &binary(source)).unwrap().matches(text.as_bytes())
        };
        assert!(matches(b"bl(ue|ack)", "blue") && !matches(b"bl(ue|ack)", "blues") && !matches(b"ue", "blue"));
        assert!(!matches(b"a|ab", "ab"), "the first alternative wins, as in Perl");
        assert!(!matches(b".*", &"x".repeat(MAX_REGEX_TEXT_BYTES + 1)));
    }

    #[test]
    fn the_worst_patterns_cost_little() {
        let started = Instant::now();
        let text = "a".repeat(100_000);
        let pattern = format!("{}b", "%_".repeat(500));
        assert!(!like(&pattern, &text));
        assert!(!like(&format!("%{}b", "a".repeat(1000)), &text));
        assert!(like("%a%", &text));
        assert!(started.elapsed() < Duration::from_secs(2));
    }

    proptest! {
        #[test]
        fn like_is_the_regular_expression_it_stands_for(pattern in "[ab%_\n]{0,8}", text in "[ab\n]{0,10}") {
            let source: String = pattern
                .chars()
                .map(|c| match c {
                    '%' => ".*".to_owned(),
                    '_' => ".".to_owned(),
                    other => other.to_string(),
                })
                .collect();
            let expected = regex::Regex::new(&format!("\\A(?:{source})\\z")).unwrap().is_match(&text);
            prop_assert_eq!(like(&pattern, &text), expected, "{:?} like {:?}", text, pattern);
        }
    }
}
