//! Erlang terms as far as selectors have them.

use std::fmt::Write as _;

use amq_protocol::types::AMQPValue;

use crate::model::erlang;

/// A term. An Erlang string is a list of its bytes.
#[derive(Clone, Debug, PartialEq)]
pub enum Term {
    /// Literals beyond `i128` become floats.
    Integer(i128),
    Float(f64),
    Atom(&'static str),
    Binary(Box<[u8]>),
    List(Vec<Term>),
    Tuple(Vec<Term>),
}

/// The atoms a selector may have.
const ATOMS: [&str; 27] = [
    "ident",
    "not",
    "and",
    "or",
    "is_null",
    "not_null",
    "like",
    "not_like",
    "between",
    "not_between",
    "range",
    "=",
    "<>",
    ">",
    "<",
    ">=",
    "<=",
    "in",
    "not_in",
    "+",
    "-",
    "*",
    "/",
    "true",
    "false",
    "no_escape",
    "regex",
];

/// The atom of that name, if a selector may have it.
pub fn known_atom(name: &[u8]) -> Option<&'static str> {
    ATOMS.into_iter().find(|atom| atom.as_bytes() == name)
}

impl Term {
    /// The term as `~tp` shows it, on one line.
    pub fn shown(&self) -> String {
        let mut out = String::new();
        self.show(&mut out);
        out
    }

    /// Recurses as deep as the parser did at most.
    fn show(&self, out: &mut String) {
        // Writing to a String cannot fail.
        let _ = match self {
            Self::Integer(value) => write!(out, "{value}"),
            Self::Float(value) => write!(out, "{}", erlang::term(&AMQPValue::Double(*value))),
            Self::Atom(name) => write!(out, "{}", erlang::atom(name)),
            Self::Binary(bytes) => write!(out, "{}", erlang::binary(bytes)),
            Self::List(items) => match as_bytes(items) {
                Some(bytes) => write!(out, "{}", erlang::string(&bytes)),
                None => return show_all(items, ['[', ']'], out),
            },
            Self::Tuple(items) => return show_all(items, ['{', '}'], out),
        };
    }
}

fn show_all(items: &[Term], [open, close]: [char; 2], out: &mut String) {
    out.push(open);
    for (place, item) in items.iter().enumerate() {
        if place > 0 {
            out.push(',');
        }
        item.show(out);
    }
    out.push(close);
}

/// The bytes of a list that may be a string.
pub fn as_bytes(items: &[Term]) -> Option<Vec<u8>> {
    let byte = |item: &Term| match item {
        Term::Integer(value) => u8::try_from(*value).ok(),
        _ => None,
    };
    items.iter().map(byte).collect()
}
