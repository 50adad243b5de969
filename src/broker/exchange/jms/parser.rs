//! Reads a selector as the JMS client sends it: one Erlang term as text, with a dot behind it or without.
//!
//! The grammar and the words for what is wrong are those of RabbitMQ's plugin (`sjx_parser`, 4.3): integers and floats,
//! atoms out of a fixed list, `<<"...">>`, `"..."`, lists and tuples, nested up to 16 deep.

use super::term::{Term, known_atom};
use crate::broker::exchange::kind::is_known_word;
use crate::model::erlang;

const MAX_DEPTH: usize = 16;

/// Reads a term; the error is what `~tp` shows of the plugin's reason.
pub fn parse(text: &[u8]) -> Result<Term, String> {
    let mut parser = Parser { rest: text };
    parser.skip_space();
    let term = parser.term(0)?;
    parser.skip_space();
    if parser.take(b".") {
        parser.skip_space();
    }
    if parser.rest.is_empty() { Ok(term) } else { failed("trailing_characters") }
}

fn failed<T>(reason: &str) -> Result<T, String> {
    Err(reason.to_owned())
}

struct Parser<'a> {
    rest: &'a [u8],
}

impl Parser<'_> {
    fn skip_space(&mut self) {
        let space = |byte: &u8| matches!(byte, b' ' | b'\t' | b'\n' | b'\r');
        let count = self.rest.iter().take_while(|byte| space(byte)).count();
        self.rest = &self.rest[count..];
    }

    fn take(&mut self, token: &[u8]) -> bool {
        match self.rest.strip_prefix(token) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    /// A term; recurses [`MAX_DEPTH`] deep at most.
    fn term(&mut self, depth: usize) -> Result<Term, String> {
        if depth > MAX_DEPTH {
            return failed("max_depth_exceeded");
        }
        match self.rest {
            [] => failed("unexpected_end"),
            [b'0'..=b'9', ..] => self.number(false),
            [b'a'..=b'z', ..] => self.bare_atom(),
            [b'<', b'<', ..] => self.binary(),
            [first, rest @ ..] => {
                let first = *first;
                self.rest = rest;
                match first {
                    b'{' => Ok(Term::Tuple(self.items(b"}", depth, "expected_comma_or_closing_brace")?)),
                    b'[' => Ok(Term::List(self.items(b"]", depth, "expected_comma_or_closing_bracket")?)),
                    b'"' => {
                        let bytes = self.string_bytes()?;
                        Ok(Term::List(bytes.into_iter().map(|byte| Term::Integer(byte.into())).collect()))
                    }
                    b'\'' => self.quoted_atom(),
                    b'-' | b'+' => {
                        self.skip_space();
                        match self.rest {
                            [b'0'..=b'9', ..] => self.number(first == b'-'),
                            _ => failed("unexpected_character"),
                        }
                    }
                    _ => failed("unexpected_character"),
                }
            }
        }
    }

    /// What stands between two brackets, the first of which is taken.
    fn items(&mut self, close: &[u8], depth: usize, otherwise: &str) -> Result<Vec<Term>, String> {
        let mut items = Vec::new();
        self.skip_space();
        if self.take(close) {
            return Ok(items);
        }
        loop {
            items.push(self.term(depth + 1)?);
            self.skip_space();
            if self.take(close) {
                return Ok(items);
            }
            if !self.take(b",") {
                return failed(otherwise);
            }
            self.skip_space();
            // The plugin takes a comma before a closing brace, but not before a closing bracket.
            if close == b"}" && self.take(close) {
                return Ok(items);
            }
        }
    }

    fn binary(&mut self) -> Result<Term, String> {
        self.rest = &self.rest[2..];
        self.skip_space();
        if self.take(b">>") {
            return Ok(Term::Binary(Box::default()));
        }
        if !self.take(b"\"") {
            return failed("invalid_binary");
        }
        let bytes = self.string_bytes()?;
        self.skip_space();
        if self.take(b">>") { Ok(Term::Binary(bytes.into())) } else { failed("expected_closing_binary") }
    }

    /// The rest of a string behind its opening quote.
    fn string_bytes(&mut self) -> Result<Vec<u8>, String> {
        let mut bytes = Vec::new();
        loop {
            let (byte, rest) = match self.rest {
                [] => return failed("unterminated_string"),
                [b'"', rest @ ..] => {
                    self.rest = rest;
                    return Ok(bytes);
                }
                [b'\\', escaped, rest @ ..] => (unescaped(*escaped), rest),
                [byte, rest @ ..] => (*byte, rest),
            };
            bytes.push(byte);
            self.rest = rest;
        }
    }

    fn quoted_atom(&mut self) -> Result<Term, String> {
        let mut name = Vec::new();
        loop {
            let (byte, rest) = match self.rest {
                [] => return failed("unterminated_quoted_atom"),
                [b'\'', rest @ ..] => {
                    self.rest = rest;
                    return atom(&name);
                }
                [b'\\', escaped, rest @ ..] => (*escaped, rest),
                [byte, rest @ ..] => (*byte, rest),
            };
            name.push(byte);
            self.rest = rest;
        }
    }

    fn bare_atom(&mut self) -> Result<Term, String> {
        let part = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'@');
        let (name, rest) = self.rest.split_at(self.rest.iter().take_while(|byte| part(byte)).count());
        self.rest = rest;
        atom(name)
    }

    /// A number that begins with a digit. A point counts only with a digit behind it, an exponent only behind a point.
    fn number(&mut self, negative: bool) -> Result<Term, String> {
        let digits = |from: &[u8]| from.iter().take_while(|byte| byte.is_ascii_digit()).count();
        let mut len = digits(self.rest);
        let is_float = matches!(self.rest[len..], [b'.', b'0'..=b'9', ..]);
        if is_float {
            len += 1 + digits(&self.rest[len + 1..]);
            if let [b'e' | b'E', exponent @ ..] = &self.rest[len..] {
                let sign = usize::from(matches!(exponent, [b'+' | b'-', ..]));
                len += 1 + sign + digits(&exponent[sign..]);
            }
        }
        let (text, rest) = self.rest.split_at(len);
        self.rest = rest;
        let text = str::from_utf8(text).unwrap_or_default();
        if !is_float && let Ok(value) = text.parse::<i128>() {
            return Ok(Term::Integer(if negative { -value } else { value }));
        }
        match text.parse::<f64>() {
            Ok(value) if value.is_finite() || !is_float => Ok(Term::Float(if negative { -value } else { value })),
            _ => failed("invalid_term"),
        }
    }
}

fn unescaped(byte: u8) -> u8 {
    match byte {
        b'n' => b'\n',
        b't' => b'\t',
        b'r' => b'\r',
        other => other,
    }
}

fn atom(name: &[u8]) -> Result<Term, String> {
    if let Some(atom) = known_atom(name) {
        return Ok(Term::Atom(atom));
    }
    // Which of the two a node says depends on all the code it has loaded.
    let kind = match str::from_utf8(name) {
        Ok(word) if is_known_word(word) => "disallowed_atom",
        _ => "unknown_atom",
    };
    Err(format!("{{{kind},{}}}", erlang::string(name)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(text: &str) -> Result<Term, String> {
        parse(text.as_bytes())
    }

    fn binary(text: &str) -> Term {
        Term::Binary(text.as_bytes().into())
    }

    #[test]
    fn every_kind_of_term_is_read() {
        let tuple = |items: &[Term]| Ok(Term::Tuple(items.to_vec()));
        for (text, integer) in [("0", 0), ("42.", 42), ("-5 .", -5), ("+ 100", 100), (" - 7", -7)] {
            assert_eq!(read(text), Ok(Term::Integer(integer)), "{text}");
        }
        for (text, float) in [("3.25.", 3.25), ("-1.5", -1.5), ("3.0e-2.", 0.03), ("1.0E+3", 1000.0)] {
            assert_eq!(read(text), Ok(Term::Float(float)), "{text}");
        }
        assert_eq!(read("true"), Ok(Term::Atom("true")));
        assert_eq!(read("'<='."), Ok(Term::Atom("<=")));
        assert_eq!(read("'no\\_escape'"), Ok(Term::Atom("no_escape")));
        assert_eq!(read("<<>>"), Ok(binary("")));
        assert_eq!(read(r#"<< "q\"r\n\\" >>"#), Ok(binary("q\"r\n\\")));
        assert_eq!(read("\"ab\""), Ok(Term::List(vec![Term::Integer(97), Term::Integer(98)])));
        assert_eq!(read("[]"), Ok(Term::List(Vec::new())));
        assert_eq!(read("{}"), tuple(&[]));
        assert_eq!(read("  { ident , << \"x\" >> }  .  "), tuple(&[Term::Atom("ident"), binary("x")]));
        assert_eq!(read("{1,}"), tuple(&[Term::Integer(1)]));
        assert!(matches!(read(&"9".repeat(60)), Ok(Term::Float(value)) if value > 9e59));
    }

    #[test]
    fn what_is_wrong_is_called_what_the_plugin_calls_it() {
        for (text, reason) in [
            ("", "unexpected_end"),
            ("{", "unexpected_end"),
            ("{1, ", "unexpected_end"),
            ("}", "unexpected_character"),
            ("True", "unexpected_character"),
            ("_foo", "unexpected_character"),
            ("- x", "unexpected_character"),
            ("{true", "expected_comma_or_closing_brace"),
            ("[1 2]", "expected_comma_or_closing_bracket"),
            ("[1,]", "unexpected_character"),
            ("1 2", "trailing_characters"),
            ("true..", "trailing_characters"),
            ("true. x", "trailing_characters"),
            ("1.0e", "invalid_term"),
            ("1.0e+.", "invalid_term"),
            ("9.9e999", "invalid_term"),
            ("<<5>>", "invalid_binary"),
            ("<<", "invalid_binary"),
            ("<<\"a\"", "expected_closing_binary"),
            ("<<\"a", "unterminated_string"),
            ("\"a", "unterminated_string"),
            ("'a", "unterminated_quoted_atom"),
            ("zk4m_w8ntp2v", "{unknown_atom,\"zk4m_w8ntp2v\"}"),
            ("'queue'", "{disallowed_atom,\"queue\"}"),
            ("''", "{disallowed_atom,[]}"),
        ] {
            assert_eq!(read(text), Err(reason.to_owned()), "{text}");
        }
    }

    #[test]
    fn nesting_is_limited() {
        let nested = |open: &str, count, close: &str| format!("{}1{}", open.repeat(count), close.repeat(count));
        for (open, close) in [("{", "}"), ("[", "]")] {
            assert!(read(&nested(open, 16, close)).is_ok());
            for count in [17, 100_000] {
                assert_eq!(read(&nested(open, count, close)), failed("max_depth_exceeded"));
            }
        }
    }

    #[test]
    fn terms_are_shown_as_erlang_shows_them() {
        for text in ["{true,1.5e10,\"ab\",[1,2],'<='}", "[<<\"x\">>,-5,{},[]]", "{ident,<<>>}"] {
            assert_eq!(read(text).unwrap().shown(), text);
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(text in proptest::collection::vec(any::<u8>(), 0..60)) {
            let _ = parse(&text);
        }

        #[test]
        fn shown_terms_are_read_back(text in r#"[\[\]{}<>",.'a-z0-9e+ \\-]{0,40}"#) {
            if let Ok(term) = parse(text.as_bytes()) {
                prop_assert_eq!(parse(term.shown().as_bytes()), Ok(term));
            }
        }
    }
}
