//! Class basic, without the hot methods.

use std::sync::Arc;

use amq_protocol::{
    protocol::{AMQPClass, basic},
    types::FieldTable,
};

use super::{generated_name, unless};
use crate::{
    auth::{Access, Resource},
    broker::{
        Address, Consumer, Queue, REPLY_TO, ReaderOptions, ReplyRegistry, ReplyTarget, Settlement, arguments::QueueType,
    },
    clock,
    model::{
        Name,
        arguments::{as_integer, lookup, type_name},
    },
    session::{
        channel::ReplyConsumer,
        close::Fault,
        connection::{Answer, Session},
    },
};

impl Session {
    pub(super) fn on_basic(&mut self, number: u16, payload: &[u8], method: basic::AMQPMethod) -> Result<Answer, Fault> {
        use basic::AMQPMethod as B;
        match method {
            B::Publish(_) => self.on_publish_method(number, payload).map(|()| Answer::None),
            B::Qos(qos) => self.qos(number, payload, &qos),
            B::Consume(consume) => self.consume(number, &consume),
            B::Cancel(cancel) => self.cancel(number, &cancel),
            B::CancelOk(cancel_ok) => {
                // The client's answer to a server-sent cancel. A consumer that timed out is then really gone.
                self.end_consumer(number, cancel_ok.consumer_tag.as_str());
                Ok(Answer::None)
            }
            B::Get(get) => self.get(number, get.queue.as_str(), get.no_ack),
            B::Recover(recover) => self.recover(number, recover.requeue, true),
            B::RecoverAsync(recover) => self.recover(number, recover.requeue, false),
            _ => Err(Fault::new(503, "unimplemented method")),
        }
    }

    fn qos(&mut self, number: u16, payload: &[u8], qos: &basic::Qos) -> Result<Answer, Fault> {
        // `amq-protocol` drops the prefetch size.
        let size = payload.get(4..8).and_then(|size| size.try_into().ok()).map_or(0, u32::from_be_bytes);
        if size != 0 {
            return Err(Fault::new(540, format!("prefetch_size!=0 ({size})")));
        }
        let unblocked = if qos.global && self.limits.permit_global_qos {
            self.outbox.set_channel_prefetch(number, qos.prefetch_count)
        } else {
            if let Some(channel) = self.channels.get_mut(number) {
                channel.prefetch = qos.prefetch_count;
            }
            // RabbitMQ: a count per consumer lifts the one of the channel.
            self.outbox.set_channel_prefetch(number, 0)
        };
        self.reply(number, &AMQPClass::Basic(basic::AMQPMethod::QosOk(basic::QosOk {})));
        for (queue, consumer) in unblocked {
            queue.unblock(consumer, &mut self.effects);
        }
        Ok(Answer::None)
    }

    fn consume(&mut self, number: u16, consume: &basic::Consume) -> Result<Answer, Fault> {
        let name = self.queue_name(number, consume.queue.as_str())?;
        let asked = consume.consumer_tag.as_str();
        let tag: Name = if asked.is_empty() { generated_name("amq.ctag-").into() } else { asked.into() };
        if self.outbox.has_tag(number, &tag) {
            return Err(Fault::new(530, format!("attempt to reuse consumer tag '{tag}'")));
        }
        if &*name == REPLY_TO {
            return self.consume_replies(number, &tag, consume);
        }
        self.check(Access::Read, Resource::Queue, &name)?;
        let Some(vhost) = self.vhost.clone() else { return Ok(Answer::None) };
        if ReplyRegistry::is_reply_name(name.as_bytes()) {
            return Err(Fault::new(
                406,
                format!("only creator channel may consume from queue '{name}' in vhost '{}'", vhost.name),
            ));
        }
        let queue = vhost.queue_for(&name, self.id)?;
        let prefetch = self.channels.get(number).map_or(0, |channel| channel.prefetch);
        let reader = match queue.traits.queue_type {
            QueueType::Stream => Some(reader_options(&queue, consume, &tag)?),
            QueueType::Classic | QueueType::Quorum => None,
        };
        check_consumer_arguments(&queue, &consume.arguments)?;
        if reader.is_some() {
            check_reader(&queue, prefetch, consume.no_ack)?;
        }
        let priority = consumer_priority(&queue, &consume.arguments)?;
        let timeout_ms = consumer_timeout(&queue, &consume.arguments)?;
        if queue.traits.queue_type != QueueType::Classic && self.outbox.channel_prefetch(number) > 0 {
            return Err(Fault::new(540, format!("{} does not support global qos", queue.resource())));
        }
        let Some(port) = self.outbox.port() else { return Ok(Answer::None) };
        let Some(slot) = self.outbox.add_consumer(number, &tag, Some(queue.clone()), consume.no_ack) else {
            return Ok(Answer::None);
        };
        let to = Address { channel: number, slot };
        let consumer =
            Consumer::new(port, to, consume.no_ack, consume.exclusive, priority, prefetch).with_timeout(timeout_ms);
        let consumer = match reader {
            Some(reader) => queue.read(consumer, reader),
            None => queue.consume(consumer),
        };
        let consumer = match consumer {
            Ok(consumer) => consumer,
            Err(error) => {
                self.outbox.remove_consumer(number, &tag);
                return Err(error.into());
            }
        };
        // `consume-ok` goes into the outbox before any delivery can.
        self.outbox.start_consumer(number, slot, Some(consumer), &tag, consume.nowait);
        self.note_consumer(number, &queue, &tag, prefetch, consume);
        queue.unblock(consumer, &mut self.effects);
        Ok(Answer::None)
    }

    /// `basic.consume` from the pseudo queue of direct reply-to.
    fn consume_replies(&mut self, number: u16, tag: &Name, consume: &basic::Consume) -> Result<Answer, Fault> {
        let Some(channel) = self.channels.get(number) else { return Ok(Answer::None) };
        if channel.reply.is_some() {
            return Err(Fault::new(406, "reply consumer already set"));
        }
        if !consume.no_ack {
            return Err(Fault::new(406, "reply consumer cannot acknowledge"));
        }
        let Some(port) = self.outbox.port() else { return Ok(Answer::None) };
        let Some(slot) = self.outbox.add_consumer(number, tag, None, true) else { return Ok(Answer::None) };
        let (id, name) = self.broker.replies.register(port, Address { channel: number, slot });
        self.outbox.start_consumer(number, slot, None, tag, consume.nowait);
        if let Some(channel) = self.channels.get_mut(number) {
            channel.reply = Some(ReplyConsumer { id, name, tag: tag.clone() });
        }
        Ok(Answer::None)
    }

    fn cancel(&mut self, number: u16, cancel: &basic::Cancel) -> Result<Answer, Fault> {
        let tag = cancel.consumer_tag.as_str();
        if let Some(channel) = self.channels.get_mut(number)
            && let Some(reply) = channel.reply.take_if(|reply| &*reply.tag == tag)
        {
            self.broker.replies.remove(reply.id);
        }
        self.end_consumer(number, tag);
        let cancel_ok = basic::CancelOk { consumer_tag: cancel.consumer_tag.clone() };
        Ok(unless(cancel.nowait, AMQPClass::Basic(basic::AMQPMethod::CancelOk(cancel_ok))))
    }

    fn end_consumer(&mut self, number: u16, tag: &str) {
        if let Some((Some(queue), Some(consumer))) = self.outbox.remove_consumer(number, tag) {
            self.note_consumer_gone(number, &queue, tag);
            queue.cancel(consumer, &mut self.effects);
            self.carry_out();
        }
    }

    fn get(&mut self, number: u16, queue: &str, no_ack: bool) -> Result<Answer, Fault> {
        let name = self.queue_name(number, queue)?;
        self.check(Access::Read, Resource::Queue, &name)?;
        let Some(vhost) = self.vhost.clone() else { return Ok(Answer::None) };
        if ReplyRegistry::is_reply_name(name.as_bytes())
            && self.broker.replies.find(name.as_bytes()) != ReplyTarget::Malformed
        {
            return Err(Fault::new(
                540,
                format!("basic.get not supported by volatile queue '{name}' in vhost '{}'", vhost.name),
            ));
        }
        let queue = vhost.queue_for(&name, self.id)?;
        if queue.traits.queue_type == QueueType::Quorum && queue.traits.single_active_consumer {
            let text = "basic.get operations are not supported by quorum queues with single active consumer";
            return Err(Fault::new(405, format!("cannot obtain access to locked {}. {text}", queue.resource())));
        }
        if queue.traits.queue_type == QueueType::Stream {
            return Err(Fault::new(540, format!("basic.get not supported by stream queues {}", queue.resource())));
        }
        self.check_clogged();
        if !self.hand_out(number, &queue, no_ack) {
            return Ok(Answer::Now(AMQPClass::Basic(basic::AMQPMethod::GetEmpty(basic::GetEmpty {}))));
        }
        Ok(Answer::None)
    }

    /// Answers a `basic.get` from the head of the queue, if there is one.
    fn hand_out(&mut self, number: u16, queue: &Arc<Queue>, no_ack: bool) -> bool {
        let (Some(port), Some(slot)) = (self.outbox.port(), self.outbox.begin_get(number, queue, no_ack)) else {
            return false;
        };
        let handed = queue.get(&port, Address { channel: number, slot }, no_ack, &mut self.effects);
        self.outbox.end_get(number, slot);
        if self.outbox.has_traces() {
            self.effects.wakes.push(port); // where they are published
        }
        handed
    }

    fn recover(&mut self, number: u16, requeue: bool, answered: bool) -> Result<Answer, Fault> {
        if !requeue {
            return Err(Fault::new(540, "requeue=false"));
        }
        self.outbox.take_unacked(number, &mut self.settling);
        if answered {
            // Before the deliveries that it lets loose.
            self.reply(number, &AMQPClass::Basic(basic::AMQPMethod::RecoverOk(basic::RecoverOk {})));
        }
        self.apply_settlements(Settlement::Returned, false);
        Ok(Answer::None)
    }
}

/// What a consumer of a stream asks for.
fn reader_options(queue: &Queue, consume: &basic::Consume, tag: &Name) -> Result<ReaderOptions, Fault> {
    Ok(ReaderOptions::parse(&queue.resource(), &consume.arguments, tag, clock::now_unix_ms())?)
}

/// What RabbitMQ demands of a stream's consumer.
fn check_reader(queue: &Queue, prefetch: u16, no_ack: bool) -> Result<(), Fault> {
    let resource = queue.resource();
    if prefetch == 0 {
        return Err(Fault::new(406, format!("consumer prefetch count is not set for stream {resource}")));
    }
    if no_ack {
        return Err(Fault::new(540, format!("automatic acknowledgement not supported by stream {resource}")));
    }
    Ok(())
}

/// Refuses consumer arguments that the queue's type does not know, though another does.
fn check_consumer_arguments(queue: &Queue, arguments: &FieldTable) -> Result<(), Fault> {
    const OF_STREAMS: [&str; 3] = ["x-stream-offset", "x-stream-filter", "x-stream-match-unfiltered"];
    let queue_type = queue.traits.queue_type;
    let foreign: &[&[&str]] = match queue_type {
        QueueType::Classic => &[&OF_STREAMS, &["x-consumer-timeout"]],
        QueueType::Quorum => &[&OF_STREAMS],
        QueueType::Stream => &[&["x-priority", "x-consumer-timeout"]],
    };
    match foreign.iter().copied().flatten().find(|key| arguments.contains_key(key)) {
        None => Ok(()),
        Some(key) => {
            let (resource, module) = (queue.resource(), queue_type.module());
            Err(Fault::new(406, format!("invalid arg '{key}' for {resource} of queue type {module}")))
        }
    }
}

/// `x-consumer-timeout` in milliseconds, checked as RabbitMQ checks it.
fn consumer_timeout(queue: &Queue, arguments: &FieldTable) -> Result<Option<u64>, Fault> {
    const KEY: &str = "x-consumer-timeout";
    let Some(value) = lookup(arguments, KEY) else { return Ok(None) };
    let invalid = |error: String| Fault::new(406, format!("invalid arg '{KEY}' for {}: {error}", queue.resource()));
    match as_integer(value) {
        None => Err(invalid(format!("\"expected integer, got {}\"", type_name(value)))),
        Some(ms) => u64::try_from(ms).map(Some).map_err(|_| invalid(format!("{{value_negative,{ms}}}"))),
    }
}

/// `x-priority`, checked as RabbitMQ checks it.
fn consumer_priority(queue: &Queue, arguments: &FieldTable) -> Result<i64, Fault> {
    let Some(value) = lookup(arguments, "x-priority") else { return Ok(0) };
    as_integer(value).ok_or_else(|| {
        let (name, vhost) = (&queue.options.name, &queue.options.vhost);
        Fault::new(
            406,
            format!(
                "invalid arg 'x-priority' for queue '{name}' in vhost '{vhost}': \"expected integer, got {}\"",
                type_name(value)
            ),
        )
    })
}
