//! `basic.publish`: the run of like messages that is the load, and the single message with everything that can be said
//! about it. What goes through an exchange that does more than routing: `way`.

mod way;

use std::{borrow::Cow, sync::Arc};

use amq_protocol::types::{AMQPValue, FieldTable};
use smallvec::SmallVec;

pub(super) use self::way::Way;
use super::{
    assembler::{Assembled, Assembler, Publish},
    channel::{CachedRoute, Channel, ChannelState, Mode},
    close::{CloseReason, Fault, undecodable},
    connection::Session,
    tx::TxPublish,
};
use crate::{
    auth::{Access, Resource},
    broker::{
        Body, Effects, Message, Outcome, REPLY_TO, ReplyRegistry, ReplyTarget, Round, Route, SHARED_BODY_BYTES, Vhost,
        copy_large_bodies, encode_names,
        exchange::Attributes,
        extension::{Extension, ExtensionBytes, encode_keys},
        with_bodies,
    },
    clock,
    model::{
        arguments::{as_longstr, type_name},
        erlang,
        properties::{self, Properties, plain_delivery_mode, raw_entries},
    },
    wire::{
        self, Scan, frame,
        hot::{BASIC_PUBLISH, HeaderView, PublishView, method_id, split_names},
        limits::check_table,
    },
};

/// Messages of one run: enough that what a run costs is little for each, and few enough that they stand on the stack.
const RUN_MESSAGES: usize = 128;
/// RabbitMQ's bound on `expiration`, in milliseconds.
const MAX_EXPIRATION_MS: u64 = 315_360_000_000;

type Run<'a> = SmallVec<[Message<'a>; RUN_MESSAGES]>;

fn fault(code: u16, text: impl AsRef<str>) -> Fault {
    Fault::new(code, text).at(60, 40)
}

impl Session {
    /// Handles the run of whole messages to one exchange and key at the start of `input`, which begins with a
    /// `basic.publish`. Answers its length, or `None` when the first message needs [`Session::publish`].
    ///
    /// Hot path: one route look-up, one lock per target queue and one confirm entry a run; nothing allocated a message.
    #[inline]
    pub(super) fn publish_run(&mut self, number: u16, input: &[u8]) -> Result<Option<usize>, Fault> {
        let Some(channel) = self.channels.get_mut(number) else { return Ok(None) };
        if channel.state != ChannelState::Open || !channel.assembler.is_idle() || matches!(channel.mode, Mode::Tx(_)) {
            return Ok(None);
        }
        let mut run = Run::new();
        let limits = Limits { payload: self.frame_max, body: self.limits.max_message_bytes };
        let (names, used) = gather(number, input, limits, &mut run);
        let Some(vhost) = &self.vhost else { return Ok(None) };
        if run.is_empty() || ReplyRegistry::is_reply_name(split_names(names).1) || vhost.is_tracing() {
            return Ok(None);
        }
        let epoch = (vhost.epoch(), self.auth.epoch());
        let Some(route) = channel.routes.find(names, epoch) else { return Ok(None) };
        if route.is_empty() {
            return Ok(None); // returns and their order belong to the careful path
        }
        self.published = true;
        let in_place = matches!(&route[..], [queue] if queue.takes_bodies_in_place());
        let copies = !in_place && run.iter().any(|message| message.large_inline_body().is_some());
        if copies || route.iter().any(|queue| queue.may_reject()) {
            let bodies = copy_large_bodies(&run);
            for message in with_bodies(&run, &bodies) {
                self.deliver_one(number, &route, &message);
            }
            return Ok(Some(used));
        }
        if let Some(Channel { mode: Mode::Confirm { published }, .. }) = self.channels.get_mut(number) {
            *published += run.len() as u64;
        }
        if self.broker.is_store_failing() && self.must_refuse(number, &route, &run) {
            self.refuse(number);
        } else {
            let round = deliver(&route, &run, &mut self.effects);
            self.confirm(number, round);
        }
        Ok(Some(used))
    }

    /// A confirm that waits for the disk also covers what was settled on the connection before: a queue that is drained late
    /// takes a publish into a round that an acknowledgement before it has just missed.
    fn confirm(&mut self, number: u16, round: Round) {
        let round = if round == 0 { 0 } else { round.max(self.settled) };
        if let Some(Channel { mode: Mode::Confirm { published }, .. }) = self.channels.get(number) {
            self.outbox.confirm(number, *published, round);
        }
    }

    /// Hands one message to its queues, some of which may refuse it, and confirms or nacks it.
    fn deliver_one(&mut self, number: u16, route: &CachedRoute, message: &Message<'_>) {
        self.count_publish(number);
        if self.broker.is_store_failing() && self.must_refuse(number, route, std::slice::from_ref(message)) {
            return self.refuse(number);
        }
        // A large body is stored once for all queues of a round.
        let shares_body = route.len() > 1 && message.persistent && matches!(message.body, Body::Shared(_));
        let one_round = shares_body.then(|| self.broker.atomic());
        let outcome = offer(route, message, &mut self.effects);
        drop(one_round);
        self.answer_publish(number, outcome);
    }

    /// Whether messages are nacked at once because they need the disk while it fails. Without confirms they are taken,
    /// as nothing else can be said of them, and kept in memory until the disk works again; either way nothing more is read
    /// from the connection until then.
    #[cold]
    fn must_refuse(&mut self, number: u16, route: &CachedRoute, messages: &[Message<'_>]) -> bool {
        let needs_disk =
            messages.iter().any(|message| message.persistent) && route.iter().any(|queue| queue.options.durable);
        self.needs_disk |= needs_disk;
        needs_disk && self.is_confirming(number)
    }

    fn is_confirming(&mut self, number: u16) -> bool {
        matches!(self.channels.get(number), Some(Channel { mode: Mode::Confirm { .. }, .. }))
    }

    /// Counts a message that will be confirmed.
    fn count_publish(&mut self, number: u16) {
        if let Some(Channel { mode: Mode::Confirm { published }, .. }) = self.channels.get_mut(number) {
            *published += 1;
        }
    }

    /// Confirms or nacks the message that was counted last. Without confirms the publisher is not told, as in RabbitMQ.
    fn answer_publish(&mut self, number: u16, outcome: Outcome) {
        match (outcome, self.channels.get(number)) {
            (Outcome::Accepted(round), _) => self.confirm(number, round),
            (Outcome::Rejected, Some(Channel { mode: Mode::Confirm { published }, .. })) => {
                self.outbox.refuse(number, *published);
            }
            (Outcome::Rejected, _) => {}
        }
    }

    /// Nacks what the store does not take.
    fn refuse(&mut self, number: u16) {
        if let Some(Channel { mode: Mode::Confirm { published }, .. }) = self.channels.get(number) {
            self.outbox.refuse(number, *published);
        }
    }

    /// Begins a `basic.publish` whose content is still to come.
    pub(super) fn on_publish_method(&mut self, number: u16, payload: &[u8]) -> Result<(), Fault> {
        let view = PublishView::read(payload).map_err(|_| undecodable(payload))?;
        let (exchange, routing_key) = split_names(view.names);
        if std::str::from_utf8(exchange).is_err() || std::str::from_utf8(routing_key).is_err() {
            return Err(Fault::Connection(CloseReason::new(501, "Malformed UTF-8 in shortstr")));
        }
        if let Some(channel) = self.channels.get_mut(number) {
            channel.assembler = Assembler::Header(Publish {
                names: view.names.to_vec(),
                mandatory: view.mandatory,
                immediate: view.immediate,
            });
        }
        Ok(())
    }

    /// Handles a message that was put together from its frames.
    pub(super) fn on_message(&mut self, number: u16, message: &Assembled) -> Result<(), Fault> {
        match self.channels.get(number) {
            Some(channel) if channel.state == ChannelState::Open => self.publish(number, message),
            _ => Ok(()), // a closing channel: read for the sake of framing
        }
    }

    /// Publishes one message, with RabbitMQ's checks in RabbitMQ's order.
    fn publish(&mut self, number: u16, message: &Assembled) -> Result<(), Fault> {
        if message.publish.immediate {
            return Err(fault(540, "immediate=true"));
        }
        let max = self.limits.max_message_bytes;
        if message.body_size as u64 > max {
            let text = format!("message size {} is larger than configured max size {max}", message.body_size);
            return Err(fault(406, text));
        }
        let Some(vhost) = self.vhost.clone() else { return Ok(()) };
        self.published = true;
        let (exchange, routing_key) = split_names(&message.publish.names);
        let (exchange, epoch) = (String::from_utf8_lossy(exchange), (vhost.epoch(), self.auth.epoch()));
        let Some(channel) = self.channels.get_mut(number) else { return Ok(()) };
        let cached = channel.routes.find(&message.publish.names, epoch);
        if cached.is_none() {
            self.auth
                .check(&self.user_name, &vhost.name, Access::Write, Resource::Exchange, &exchange)
                .map_err(|refusal| Fault::from(refusal).at(60, 40))?;
            vhost.check_publish(&exchange).map_err(|error| Fault::from(error).at(60, 40))?;
        }
        let properties = Properties::parse(&message.properties).map_err(|_| Fault::internal())?;
        if properties.raw_headers().is_some_and(|table| check_table(table).is_err()) {
            return Err(Fault::internal());
        }
        let adjusted = self.adjust(number, &properties)?;
        let properties = match &adjusted.properties {
            Cow::Borrowed(_) => properties,
            Cow::Owned(raw) => Properties::parse(raw).map_err(|_| Fault::internal())?,
        };
        let body = match message.body.len() {
            0..SHARED_BODY_BYTES => Body::Inline(&message.body),
            _ => Body::Shared(&message.body),
        };
        let message = &message.publish;
        let outgoing = Message {
            names: &message.names,
            properties: properties.raw(),
            body,
            persistent: properties.is_persistent(),
            extension: &adjusted.extension,
        };
        if exchange.is_empty() && ReplyRegistry::is_reply_name(routing_key) && routing_key != REPLY_TO.as_bytes() {
            self.trace_reply(number, routing_key, &outgoing);
            return self.publish_reply(number, routing_key, &outgoing, message.mandatory);
        }
        let way = match (cached, adjusted.extra_keys.is_empty()) {
            (Some(route), true) => Way::Queues(route),
            _ => self.find_way(number, &vhost, &exchange, routing_key, &adjusted, epoch, &outgoing)?,
        };
        if let Way::Queues(route) = &way {
            self.trace_publish(number, &outgoing, route);
        }
        self.enqueue(number, way, &outgoing, message.mandatory)
    }

    #[expect(clippy::too_many_arguments, reason = "all of it is what routing depends on")]
    fn find_way(
        &mut self,
        number: u16,
        vhost: &Arc<Vhost>,
        exchange: &str,
        routing_key: &[u8],
        adjusted: &Adjusted<'_>,
        epoch: (u64, u64),
        message: &Message<'_>,
    ) -> Result<Way, Fault> {
        let keys: SmallVec<[&[u8]; 4]> =
            std::iter::once(routing_key).chain(adjusted.extra_keys.iter().map(Vec::as_slice)).collect();
        let mut found = Route::default();
        let attributes = Properties::parse(message.properties).map(Attributes::of).unwrap_or_default();
        vhost.route(exchange, &keys, &attributes, &mut found).map_err(|error| Fault::from(error).at(60, 40))?;
        if found.observed {
            return Ok(Way::Exchange(exchange.into()));
        }
        let cacheable = found.cacheable && adjusted.extra_keys.is_empty();
        let route: CachedRoute = Arc::new(found.queues.drain(..).collect());
        if let (true, Some(channel)) = (cacheable, self.channels.get_mut(number)) {
            channel.routes.remember(message.names, epoch, route.clone());
        }
        Ok(Way::Queues(route))
    }

    /// Hands a routed message to its queues (or to the transaction), returns it if it is mandatory and has none, and
    /// confirms.
    fn enqueue(&mut self, number: u16, way: Way, message: &Message<'_>, mandatory: bool) -> Result<(), Fault> {
        let Some(channel) = self.channels.get_mut(number) else { return Ok(()) };
        match &mut channel.mode {
            Mode::Tx(transaction) => {
                transaction.publish(TxPublish::new(way, message, mandatory));
                return Ok(());
            }
            Mode::Confirm { .. } | Mode::Plain => {}
        }
        let route = match way {
            Way::Queues(route) => route,
            Way::Exchange(exchange) => return self.publish_through(number, &exchange, message, mandatory),
        };
        if route.is_empty() {
            self.count_publish(number);
            if mandatory {
                self.outbox.return_message(number, message);
                self.check_clogged();
            }
            self.confirm(number, 0);
            return Ok(());
        }
        self.deliver_one(number, &route, message);
        Ok(())
    }

    /// A message to a generated reply-to name goes straight to the requester.
    fn publish_reply(&mut self, number: u16, name: &[u8], message: &Message<'_>, mandatory: bool) -> Result<(), Fault> {
        match self.broker.replies.find(name) {
            ReplyTarget::Alive(id) => {
                let names = encode_names(b"", name);
                self.broker.replies.deliver(id, &Message { names: &names, ..*message }, &mut self.effects);
            }
            ReplyTarget::Malformed if mandatory => self.outbox.return_message(number, message),
            ReplyTarget::Malformed | ReplyTarget::Gone => {}
        }
        if let Some(Channel { mode: Mode::Confirm { published }, .. }) = self.channels.get_mut(number) {
            *published += 1;
        }
        self.confirm(number, 0);
        Ok(())
    }

    /// Checks the properties the broker acts on, and changes those it has to change.
    fn adjust<'a>(&self, number: u16, view: &Properties<'a>) -> Result<Adjusted<'a>, Fault> {
        let mut adjusted = Adjusted {
            properties: Cow::Borrowed(view.raw()),
            extra_keys: Vec::new(),
            extension: ExtensionBytes::new(),
        };
        let mut extension = Extension::default();
        let hidden_keys;
        if !Properties::needs_attention(view.raw()) {
            return Ok(adjusted);
        }
        if view.reply_to() == Some(REPLY_TO.as_bytes()) {
            let reply = self.channels.get(number).and_then(|channel| channel.reply.as_ref());
            let reply = reply.ok_or_else(|| fault(406, "fast reply consumer does not exist"))?;
            adjusted.properties = Cow::Owned(view.with_reply_to(reply.name.as_bytes()));
        }
        if let Some(expiration) = view.expiration() {
            let plain = check_expiration(expiration)
                .map_err(|error| fault(406, format!("invalid expiration '{}': {error}", erlang::text(expiration))))?;
            extension.expires_unix_ms = plain.parse().ok().map(|ms: u64| clock::ceil_unix_ms().saturating_add(ms));
            if plain.as_bytes() != expiration {
                let changed = reparse(&adjusted.properties)?.with_expiration(plain.as_bytes());
                adjusted.properties = Cow::Owned(changed);
            }
        }
        let named =
            |name: &[u8]| view.raw_headers().is_some_and(|table| raw_entries(table).any(|entry| entry.key == name));
        let (cc, bcc) = (named(b"CC"), named(b"BCC"));
        if cc || bcc {
            let headers = view.headers().ok_or_else(Fault::internal)?;
            adjusted.extra_keys = sender_selected_keys(&headers, "CC")?;
            let hidden = sender_selected_keys(&headers, "BCC")?;
            hidden_keys = encode_keys(hidden.iter().map(Vec::as_slice));
            extension.hidden_keys = &hidden_keys;
            adjusted.extra_keys.extend(hidden);
            if bcc {
                let stripped = reparse(&adjusted.properties)?.without_header(b"BCC");
                adjusted.properties = Cow::Owned(stripped);
            }
        }
        if let Some(user_id) = view.user_id() {
            let impersonates = self.user.as_ref().is_some_and(|user| user.may_impersonate());
            if user_id != self.user_name.as_bytes() && !impersonates {
                let text = format!(
                    "user_id property set to '{}' but authenticated user was '{}'",
                    erlang::text(user_id),
                    self.user_name
                );
                return Err(fault(406, text));
            }
        }
        adjusted.extension = extension.encode();
        Ok(adjusted)
    }
}

/// Collects the run; answers the names all its messages share and its length in bytes.
///
/// Messages of a run mostly differ in nothing but their bodies, so frames that repeat the first ones' bytes up to the body
/// are not read again.
#[inline]
fn gather<'a>(number: u16, input: &'a [u8], limits: Limits, run: &mut Run<'a>) -> (&'a [u8], usize) {
    let Some(first) = whole_message(number, input, limits) else { return (&[], 0) };
    let names = first.message.names;
    if !names_are_text(names) {
        return (&[], 0);
    }
    run.push(first.message);
    let Message { properties, persistent, .. } = first.message;
    // With the head of the body frame, if there is one.
    let repeated = &input[..first.body_at];
    let whole_len = first.len;
    let mut at = first.len;
    while run.len() < RUN_MESSAGES {
        let rest = &input[at..];
        if let Some(next) = rest.get(..whole_len)
            && next[..repeated.len()] == *repeated
        {
            let body: &[u8] = match &next[repeated.len()..] {
                [] => &[],
                [body @ .., frame::FRAME_END] => body,
                _ => break, // a bad frame: read with care
            };
            run.push(Message { names, properties, body: Body::Inline(body), persistent, extension: &[] });
            at += whole_len;
            continue;
        }
        match whole_message(number, rest, limits) {
            Some(next) if next.message.names == names => {
                run.push(next.message);
                at += next.len;
            }
            _ => break,
        }
    }
    (names, at)
}

fn names_are_text(names: &[u8]) -> bool {
    let (exchange, routing_key) = split_names(names);
    std::str::from_utf8(exchange).is_ok() && std::str::from_utf8(routing_key).is_ok()
}

/// What a message may be at most to be read in one piece.
#[derive(Clone, Copy)]
struct Limits {
    /// Bytes of a frame's payload.
    payload: u32,
    /// Bytes of a body.
    body: u64,
}

/// A message in the read buffer, with the frames it came in.
struct Whole<'a> {
    message: Message<'a>,
    /// Where the body begins; the end of the frames if there is none.
    body_at: usize,
    len: usize,
}

/// A message whose three frames are all there, with nothing about it that needs a closer look.
#[inline]
fn whole_message(number: u16, input: &[u8], limits: Limits) -> Option<Whole<'_>> {
    let max_payload = limits.payload;
    let Scan::Frame(method) = wire::scan(input, max_payload) else { return None };
    if method.kind != frame::METHOD || method.channel != number || method_id(method.payload) != Some(BASIC_PUBLISH) {
        return None;
    }
    let publish = PublishView::read(method.payload).ok()?;
    if publish.immediate || publish.mandatory {
        return None;
    }
    let header_at = method.wire_len();
    let Scan::Frame(header) = wire::scan(&input[header_at..], max_payload) else { return None };
    if header.kind != frame::HEADER || header.channel != number {
        return None;
    }
    let mut body_at = header_at + header.wire_len();
    let header = HeaderView::read(header.payload).ok()?;
    if header.class != 60 || header.weight != 0 || header.body_size > limits.body {
        return None;
    }
    let persistent = match plain_delivery_mode(header.properties) {
        Some(persistent) => persistent,
        None if Properties::needs_attention(header.properties) => return None,
        None => Properties::parse(header.properties).ok()?.is_persistent(),
    };
    let mut len = body_at;
    let mut body: &[u8] = &[];
    if header.body_size > 0 {
        let Scan::Frame(frame) = wire::scan(&input[body_at..], max_payload) else { return None };
        if frame.kind != frame::BODY || frame.channel != number || frame.payload.len() as u64 != header.body_size {
            return None;
        }
        len += frame.wire_len();
        body_at += frame::HEAD_BYTES;
        body = frame.payload;
    }
    let message = Message {
        names: publish.names,
        properties: header.properties,
        body: Body::Inline(body),
        persistent,
        extension: &[],
    };
    Some(Whole { message, body_at, len })
}

/// Hands messages to every queue of a route; answers the round that makes all of them durable.
#[inline]
pub(super) fn deliver(route: &CachedRoute, messages: &[Message<'_>], effects: &mut Effects) -> Round {
    route.iter().map(|queue| queue.publish(messages, effects)).max().unwrap_or(0)
}

/// Offers a message to every queue of a route; rejected if one of them refuses it.
pub(super) fn offer(route: &CachedRoute, message: &Message<'_>, effects: &mut Effects) -> Outcome {
    let mut answer = Outcome::Accepted(0);
    for queue in route.iter() {
        answer = match (queue.offer(message, effects), answer) {
            (Outcome::Accepted(round), Outcome::Accepted(others)) => Outcome::Accepted(round.max(others)),
            _ => Outcome::Rejected,
        };
    }
    answer
}

/// What [`Session::adjust`] made of the properties.
struct Adjusted<'a> {
    properties: Cow<'a, [u8]>,
    /// CC and BCC.
    extra_keys: Vec<Vec<u8>>,
    extension: ExtensionBytes,
}

fn reparse(raw: &[u8]) -> Result<Properties<'_>, Fault> {
    Properties::parse(raw).map_err(|_| Fault::internal())
}

/// The keys of `CC` or `BCC`: its long strings; elements of other types are ignored, as in RabbitMQ.
fn sender_selected_keys(headers: &FieldTable, name: &str) -> Result<Vec<Vec<u8>>, Fault> {
    let mut keys = Vec::new();
    {
        match properties::header(headers, name) {
            None => {}
            Some(AMQPValue::FieldArray(array)) => {
                keys.extend(array.as_slice().iter().filter_map(as_longstr).map(<[u8]>::to_vec))
            }
            Some(other) => {
                let text = format!("invalid message: {{unacceptable_type_in_header,\"{name}\",{}}}", type_name(other));
                return Err(fault(406, text));
            }
        }
    }
    Ok(keys)
}

/// Checks an `expiration`; answers its plain digits. The error is RabbitMQ's term.
fn check_expiration(expiration: &[u8]) -> Result<String, String> {
    let text = erlang::text(expiration).into_owned();
    let (negative, digits) = match text.as_bytes() {
        [b'-', ..] => (true, &text[1..]),
        [b'+', ..] => (false, &text[1..]),
        _ => (false, &text[..]),
    };
    let end = digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len());
    if end == 0 {
        return Err("no_integer".into());
    }
    if end < digits.len() {
        return Err(format!("{{leftover_string,\"{}\"}}", &digits[end..]));
    }
    let plain = digits.trim_start_matches('0');
    let plain = if plain.is_empty() { "0" } else { plain };
    if negative && plain != "0" {
        return Err(format!("{{value_negative,-{plain}}}"));
    }
    match plain.parse::<u64>() {
        Ok(ms) if ms <= MAX_EXPIRATION_MS => Ok(plain.into()),
        _ => Err(format!("{{value_too_large,{plain}}}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expirations_are_read_like_erlang_reads_integers() {
        for (text, expected) in [
            ("60000", Ok("60000")),
            ("+5", Ok("5")),
            ("007", Ok("7")),
            ("0", Ok("0")),
            ("", Err("no_integer")),
            ("abc", Err("no_integer")),
            (" 5", Err("no_integer")),
            ("5ms", Err("{leftover_string,\"ms\"}")),
            ("-1", Err("{value_negative,-1}")),
            ("315360000001", Err("{value_too_large,315360000001}")),
            ("99999999999999999999999", Err("{value_too_large,99999999999999999999999}")),
        ] {
            assert_eq!(check_expiration(text.as_bytes()), expected.map(String::from).map_err(String::from), "{text}");
        }
    }
}
