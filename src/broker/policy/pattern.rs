//! The pattern of a policy: a regular expression that may match anywhere in a name.
//!
//! RabbitMQ's are Perl-compatible. The `regex` crate has no look-around, which is what keeps its matching linear, but
//! `^(?!amq\.)` is what half of all policies in the field begin with. A look-ahead right after `^` only ever looks at
//! the start of the name, so it is the same as a second expression that must, or must not, match there: those are
//! understood, in each of the alternatives that `|` separates at the top level.

use std::fmt;

use regex::{Regex, RegexBuilder};

/// RabbitMQ's bound on a pattern.
const MAX_PATTERN_BYTES: usize = 1024;
/// What one compiled expression may take. Counted repetitions would make a short pattern a large program.
const MAX_PROGRAM_BYTES: usize = 1 << 20;

/// A name pattern, known to be valid.
#[derive(Clone)]
pub struct Pattern {
    source: Box<str>,
    alternatives: Box<[Alternative]>,
}

/// One expression, and what must and must not match where it does.
#[derive(Clone)]
struct Alternative {
    expression: Regex,
    demanded: Vec<Regex>,
    refused: Vec<Regex>,
}

impl Alternative {
    fn matches(&self, name: &str) -> bool {
        self.expression.is_match(name)
            && self.demanded.iter().all(|demanded| demanded.is_match(name))
            && !self.refused.iter().any(|refused| refused.is_match(name))
    }
}

impl Pattern {
    /// Compiles a pattern.
    ///
    /// # Errors
    /// RabbitMQ's text for a pattern that is too long, or with the reason why it is no regular expression.
    pub fn parse(source: &str) -> Result<Self, String> {
        if source.len() > MAX_PATTERN_BYTES {
            return Err(format!("pattern must not exceed {MAX_PATTERN_BYTES} bytes"));
        }
        let alternatives = match compile(source) {
            Ok(expression) => vec![Alternative { expression, demanded: Vec::new(), refused: Vec::new() }],
            Err(error) => with_look_ahead(source)
                .ok_or_else(|| format!("pattern should be regular expression but is invalid: {}", reason(&error)))?,
        };
        Ok(Pattern { source: source.into(), alternatives: alternatives.into() })
    }

    #[must_use]
    pub fn matches(&self, name: &str) -> bool {
        self.alternatives.iter().any(|alternative| alternative.matches(name))
    }

    /// The pattern as it was written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.source
    }
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.source == other.source
    }
}

impl fmt::Debug for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Pattern").field(&self.source).finish()
    }
}

fn compile(source: &str) -> Result<Regex, regex::Error> {
    RegexBuilder::new(source).size_limit(MAX_PROGRAM_BYTES).build()
}

/// The last line of the crate's report; the ones before it draw the place.
fn reason(error: &regex::Error) -> String {
    let text = error.to_string();
    text.lines().next_back().unwrap_or_default().trim_start_matches("error: ").to_owned()
}

/// Compiles a pattern with look-ahead at the start of its alternatives; `None` if that is not what it has.
fn with_look_ahead(source: &str) -> Option<Vec<Alternative>> {
    let (flags, source) = match source.strip_prefix("(?i)") {
        Some(rest) => ("(?i)", rest),
        None => ("", source),
    };
    alternatives(source)?.into_iter().map(|alternative| look_ahead(flags, alternative)).collect()
}

fn look_ahead(flags: &str, alternative: &str) -> Option<Alternative> {
    let anchored = |part: &str| compile(&format!("{flags}^(?:{part})")).ok();
    let Some(mut rest) = alternative.strip_prefix('^') else {
        let expression = compile(&format!("{flags}(?:{alternative})")).ok()?;
        return Some(Alternative { expression, demanded: Vec::new(), refused: Vec::new() });
    };
    let (mut demanded, mut refused) = (Vec::new(), Vec::new());
    loop {
        let (group, list) = match (rest.strip_prefix("(?="), rest.strip_prefix("(?!")) {
            (Some(group), _) => (group, &mut demanded),
            (_, Some(group)) => (group, &mut refused),
            (None, None) => break,
        };
        let end = Scan::new(group).find(|(_, depth, byte)| *depth == 0 && *byte == b')')?.0;
        list.push(anchored(&group[..end])?);
        rest = &group[end + 1..];
    }
    Some(Alternative { expression: anchored(rest)?, demanded, refused })
}

/// The parts of a pattern between the `|` that stand in no group.
fn alternatives(source: &str) -> Option<Vec<&str>> {
    let mut parts = Vec::new();
    let mut start = 0;
    for (at, depth, byte) in Scan::new(source) {
        match byte {
            b'|' if depth == 0 => {
                parts.push(&source[start..at]);
                start = at + 1;
            }
            b')' if depth == 0 => return None, // one too many
            _ => {}
        }
    }
    parts.push(&source[start..]);
    Some(parts)
}

/// The `(`, `|` and `)` of a pattern that are neither escaped nor in a class, each with its place and the number of
/// groups that are open before it.
struct Scan<'a> {
    bytes: &'a [u8],
    at: usize,
    depth: usize,
}

impl<'a> Scan<'a> {
    fn new(source: &'a str) -> Self {
        Scan { bytes: source.as_bytes(), at: 0, depth: 0 }
    }

    /// Skips a class whose `[` was just passed. A `]` that comes first belongs to it.
    fn skip_class(&mut self) {
        if self.bytes.get(self.at) == Some(&b'^') {
            self.at += 1;
        }
        let first = self.at;
        while let Some(&byte) = self.bytes.get(self.at) {
            self.at += 1;
            match byte {
                b'\\' => self.at += 1,
                b'[' => self.skip_class(),
                b']' if self.at - 1 > first => return,
                _ => {}
            }
        }
    }
}

impl Iterator for Scan<'_> {
    type Item = (usize, usize, u8);

    fn next(&mut self) -> Option<Self::Item> {
        while let Some(&byte) = self.bytes.get(self.at) {
            let at = self.at;
            self.at += 1;
            match byte {
                b'\\' => self.at += 1,
                b'[' => self.skip_class(),
                b'(' | b')' | b'|' => {
                    let depth = self.depth;
                    match byte {
                        b'(' => self.depth += 1,
                        b')' => self.depth = depth.saturating_sub(1),
                        _ => {}
                    }
                    return Some((at, depth, byte));
                }
                _ => {}
            }
        }
        None
    }
}
