//! From what went wrong to what the client is told: scope, reply code and text.

use amq_protocol::{
    protocol::{AMQPClass, channel, connection},
    types::ShortString,
};

use crate::{
    auth::Refusal,
    broker::{BrokerError, router::TopologyError},
    model::erlang,
};

/// RabbitMQ cuts explanations to this many characters.
const MAX_TEXT_CHARS: usize = 255;

/// The code, text and failing method of a `channel.close` or `connection.close`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CloseReason {
    pub code: u16,
    pub text: String,
    pub class_id: u16,
    pub method_id: u16,
}

/// How far the damage of an error reaches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The channel is closed, the connection goes on.
    Channel(CloseReason),
    /// The connection is closed.
    Connection(CloseReason),
    /// The socket is closed at once, without a word; the text is for the log.
    Drop(String),
    /// The socket is closed without a word after RabbitMQ's three seconds.
    DropLater(String),
}

/// The name that precedes the explanation of a reply code.
fn code_name(code: u16) -> &'static str {
    match code {
        311 => "CONTENT_TOO_LARGE",
        320 => "CONNECTION_FORCED",
        402 => "INVALID_PATH",
        403 => "ACCESS_REFUSED",
        404 => "NOT_FOUND",
        405 => "RESOURCE_LOCKED",
        406 => "PRECONDITION_FAILED",
        501 => "FRAME_ERROR",
        502 => "SYNTAX_ERROR",
        503 => "COMMAND_INVALID",
        504 => "CHANNEL_ERROR",
        505 => "UNEXPECTED_FRAME",
        506 => "RESOURCE_ERROR",
        530 => "NOT_ALLOWED",
        540 => "NOT_IMPLEMENTED",
        _ => "INTERNAL_ERROR",
    }
}

impl CloseReason {
    /// `NAME - explanation`, cut as RabbitMQ cuts it and so that it fits a short string. An empty explanation leaves the
    /// bare name.
    pub fn new(code: u16, explanation: &str) -> Self {
        let name = code_name(code);
        let mut text = if explanation.is_empty() { name.to_owned() } else { format!("{name} - {explanation}") };
        if text.chars().count() > MAX_TEXT_CHARS {
            text = text.chars().take(MAX_TEXT_CHARS - 3).chain("...".chars()).collect();
        }
        text.truncate(text.floor_char_boundary(255)); // names are client input, and bytes count on the wire
        CloseReason { code, text, class_id: 0, method_id: 0 }
    }

    /// The same, naming no method.
    pub fn without_method(self) -> Self {
        CloseReason { class_id: 0, method_id: 0, ..self }
    }

    fn short_text(&self) -> ShortString {
        ShortString::try_new(self.text.as_str()).unwrap_or_default()
    }

    /// The `channel.close` that says it.
    pub fn channel_close(&self) -> AMQPClass {
        AMQPClass::Channel(channel::AMQPMethod::Close(channel::Close {
            reply_code: self.code,
            reply_text: self.short_text(),
            class_id: self.class_id,
            method_id: self.method_id,
        }))
    }

    /// The `connection.close` that says it.
    pub fn connection_close(&self) -> AMQPClass {
        AMQPClass::Connection(connection::AMQPMethod::Close(connection::Close {
            reply_code: self.code,
            reply_text: self.short_text(),
            class_id: self.class_id,
            method_id: self.method_id,
        }))
    }
}

impl Fault {
    /// A fault of the scope that `code` has in the specification.
    pub fn new(code: u16, explanation: impl AsRef<str>) -> Self {
        let reason = CloseReason::new(code, explanation.as_ref());
        match code {
            403..=406 => Fault::Channel(reason),
            _ => Fault::Connection(reason),
        }
    }

    /// What a crashed channel looks like in RabbitMQ: the bare name, and no method.
    pub fn internal() -> Self {
        Fault::Connection(CloseReason::new(541, ""))
    }

    /// Names the method that failed, unless the fault is one without a method.
    pub fn at(mut self, class_id: u16, method_id: u16) -> Self {
        if let Fault::Channel(reason) | Fault::Connection(reason) = &mut self
            && reason.text != "INTERNAL_ERROR"
        {
            (reason.class_id, reason.method_id) = (class_id, method_id);
        }
        self
    }
}

impl From<BrokerError> for Fault {
    fn from(error: BrokerError) -> Self {
        Fault::new(error.code(), error.to_string())
    }
}

impl From<TopologyError> for Fault {
    fn from(error: TopologyError) -> Self {
        Fault::new(error.code(), error.to_string())
    }
}

impl From<Refusal> for Fault {
    fn from(refusal: Refusal) -> Self {
        Fault::new(403, refusal.to_string())
    }
}

/// RabbitMQ's rendering of a frame in frame errors: its type and all, or the first 16, of its payload's octets.
pub fn describe_frame(kind: u8, payload: &[u8]) -> String {
    let label = if payload.len() <= 16 { "all octets" } else { "first 16 octets" };
    format!("type {kind}, {label} = {}", erlang::binary(&payload[..payload.len().min(16)]))
}

/// 501 for a method whose arguments do not decode.
pub fn undecodable(payload: &[u8]) -> Fault {
    let number = |at: usize| payload.get(at..at + 2).map_or(0, |id| u16::from_be_bytes([id[0], id[1]]));
    let octets: Vec<String> = payload.iter().skip(4).map(u8::to_string).collect();
    let text = format!("cannot decode <<{}>>", octets.join(","));
    Fault::Connection(CloseReason::new(501, &text)).at(number(0), number(2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_cut_to_a_short_string_on_a_character_border() {
        let reason = CloseReason::new(404, &"é".repeat(300));
        assert!(reason.text.len() <= 255 && reason.text.starts_with("NOT_FOUND - é"));
        let reason = CloseReason::new(404, &"x".repeat(300));
        assert_eq!(reason.text.len(), 255);
        assert!(reason.text.ends_with("..."));
        assert_eq!(CloseReason::new(541, "").text, "INTERNAL_ERROR");
    }

    #[test]
    fn frames_are_described_like_rabbitmq() {
        assert_eq!(describe_frame(1, &[1, 2]), "type 1, all octets = <<1,2>>");
        assert_eq!(describe_frame(3, b"abc"), "type 3, all octets = <<\"abc\">>");
        assert!(describe_frame(3, &[0; 17]).starts_with("type 3, first 16 octets = <<0,0,"));
    }

    #[test]
    fn codes_have_the_scope_of_the_specification() {
        assert!(matches!(Fault::new(404, "x"), Fault::Channel(_)));
        assert!(matches!(Fault::new(530, "x"), Fault::Connection(_)));
    }
}
