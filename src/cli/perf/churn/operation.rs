//! The two requests of an operation, make and undo, and how the broker answers them.

use super::super::wire::{self, Arguments, MethodId, method};
use super::options::What;

const DURABLE: u8 = 1 << 1;
const REPLY_SUCCESS: u16 = 200;
/// Exists in every virtual host.
const EXCHANGE: &str = "amq.direct";
const CONSUME_NO_ACK: u8 = 1 << 1;

/// One of the two requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    Make,
    Undo,
}

/// What is asked for on channels.
#[derive(Debug, Clone, Copy)]
pub(super) struct Operation {
    pub(super) what: What,
    pub(super) durable: bool,
}

impl Operation {
    /// Whether each channel needs a queue of its own before it can begin.
    pub(super) fn needs_queue(self) -> bool {
        matches!(self.what, What::Bindings | What::Consumers)
    }

    /// Method and reply; `None` for connections, which are not asked for on a channel.
    pub(super) fn methods(self, request: Request) -> Option<(MethodId, MethodId)> {
        let (make, undo) = match self.what {
            What::Connections => return None,
            What::Channels => {
                ((method::CHANNEL_OPEN, method::CHANNEL_OPEN_OK), (method::CHANNEL_CLOSE, method::CHANNEL_CLOSE_OK))
            }
            What::Queues => {
                ((method::QUEUE_DECLARE, method::QUEUE_DECLARE_OK), (method::QUEUE_DELETE, method::QUEUE_DELETE_OK))
            }
            What::Bindings => {
                ((method::QUEUE_BIND, method::QUEUE_BIND_OK), (method::QUEUE_UNBIND, method::QUEUE_UNBIND_OK))
            }
            What::Exchanges => (
                (method::EXCHANGE_DECLARE, method::EXCHANGE_DECLARE_OK),
                (method::EXCHANGE_DELETE, method::EXCHANGE_DELETE_OK),
            ),
            What::Consumers => {
                ((method::BASIC_CONSUME, method::BASIC_CONSUME_OK), (method::BASIC_CANCEL, method::BASIC_CANCEL_OK))
            }
        };
        Some(if request == Request::Make { make } else { undo })
    }

    /// Appends the request for the `number`th thing of a channel whose things are called `name`.
    pub(super) fn append(self, out: &mut Vec<u8>, channel: u16, request: Request, name: &str, number: u64) {
        let Some((id, _)) = self.methods(request) else { return };
        let numbered = || format!("{name}-{number}");
        let durable = if self.durable { DURABLE } else { 0 };
        let start = Arguments::new();
        let arguments = match (self.what, request) {
            (What::Connections, _) => return,
            (What::Channels, Request::Make) => start.short_string(""),
            (What::Channels, Request::Undo) => start.short(REPLY_SUCCESS).short_string("done").short(0).short(0),
            (What::Queues, Request::Make) => declare_queue(&numbered(), durable),
            (What::Queues, Request::Undo) => start.short(0).short_string(&numbered()).octet(0),
            (What::Bindings, _) => {
                let bound = start.short(0).short_string(name).short_string(EXCHANGE).short_string(&numbered());
                if request == Request::Make { bound.octet(0).empty_table() } else { bound.empty_table() }
            }
            (What::Exchanges, Request::Make) => {
                start.short(0).short_string(&numbered()).short_string("direct").octet(durable).empty_table()
            }
            (What::Exchanges, Request::Undo) => start.short(0).short_string(&numbered()).octet(0),
            (What::Consumers, Request::Make) => {
                start.short(0).short_string(name).short_string(&numbered()).octet(CONSUME_NO_ACK).empty_table()
            }
            (What::Consumers, Request::Undo) => start.short_string(&numbered()).octet(0),
        };
        wire::append_method(out, channel, id, &arguments);
    }

    /// Appends the declaration of a channel's own queue.
    pub(super) fn append_own_queue(self, out: &mut Vec<u8>, channel: u16, name: &str) {
        let durable = if self.durable { DURABLE } else { 0 };
        wire::append_method(out, channel, method::QUEUE_DECLARE, &declare_queue(name, durable));
    }
}

fn declare_queue(name: &str, bits: u8) -> Arguments {
    Arguments::new().short(0).short_string(name).octet(bits).empty_table()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(what: What, request: Request) -> Vec<u8> {
        let mut out = Vec::new();
        Operation { what, durable: true }.append(&mut out, 3, request, "q", 7);
        out
    }

    #[test]
    fn requests_have_the_form_that_the_specification_gives() {
        assert_eq!(
            request(What::Queues, Request::Make)[..],
            [&[1, 0, 3, 0, 0, 0, 15, 0, 50, 0, 10, 0, 0, 3][..], b"q-7", &[2, 0, 0, 0, 0, 0xCE]].concat()
        );
        assert_eq!(
            request(What::Bindings, Request::Undo)[7..],
            [&[0, 50, 0, 50, 0, 0, 1, b'q', 10][..], b"amq.direct", &[3], b"q-7", &[0, 0, 0, 0, 0xCE]].concat()
        );
        assert_eq!(request(What::Consumers, Request::Undo)[7..], [&[0, 60, 0, 30, 3][..], b"q-7", &[0, 0xCE]].concat());
        assert!(request(What::Connections, Request::Make).is_empty());
    }

    #[test]
    fn what_is_made_is_undone_by_another_method_with_another_answer() {
        for what in [What::Channels, What::Queues, What::Bindings, What::Exchanges, What::Consumers] {
            let operation = Operation { what, durable: false };
            let (make, undo) = (operation.methods(Request::Make), operation.methods(Request::Undo));
            let ((make, made), (undo, undone)) = (make.expect("on a channel"), undo.expect("on a channel"));
            assert_eq!((made, undone), ((make.0, make.1 + 1), (undo.0, undo.1 + 1)));
            assert_ne!(make, undo);
        }
    }
}
