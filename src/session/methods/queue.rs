//! Class queue.

use amq_protocol::{
    protocol::{AMQPClass, queue},
    types::{AMQPValue, FieldTable, ShortString},
};

use super::generated_name;
use crate::{
    auth::{Access, Resource},
    broker::{
        Queue, QueueOptions, REPLY_TO, ReplyRegistry, ReplyTarget, Vhost,
        arguments::QueueType,
        binding::{Binding, Destination},
    },
    model::{
        Name,
        arguments::{as_longstr, lookup, type_name},
        strip_cr_lf,
    },
    session::{
        close::Fault,
        connection::{Answer, Session},
    },
};

/// RabbitMQ 4.3's bound on `x-name-prefix`.
const MAX_NAME_PREFIX_BYTES: usize = 64;

impl Session {
    pub(super) fn on_queue(&mut self, number: u16, method: queue::AMQPMethod) -> Result<Answer, Fault> {
        use queue::AMQPMethod as Q;
        match method {
            Q::Declare(declare) => self.queue_declare(number, declare),
            Q::Bind(bind) => {
                let answer = (!bind.nowait).then_some(AMQPClass::Queue(Q::BindOk(queue::BindOk {})));
                let binding = self.queue_binding(
                    number,
                    bind.queue.as_str(),
                    bind.exchange.as_str(),
                    bind.routing_key.as_str(),
                    bind.arguments,
                )?;
                self.bind(binding, answer)
            }
            Q::Unbind(unbind) => {
                let answer = Some(AMQPClass::Queue(Q::UnbindOk(queue::UnbindOk {})));
                let binding = self.queue_binding(
                    number,
                    unbind.queue.as_str(),
                    unbind.exchange.as_str(),
                    unbind.routing_key.as_str(),
                    unbind.arguments,
                )?;
                self.unbind(&binding, answer)
            }
            Q::Purge(purge) => self.queue_purge(number, &purge),
            Q::Delete(delete) => self.queue_delete(number, &delete),
            _ => Err(Fault::new(503, "unimplemented method")),
        }
    }

    fn queue_binding(
        &self,
        number: u16,
        queue: &str,
        exchange: &str,
        key: &str,
        arguments: FieldTable,
    ) -> Result<Binding, Fault> {
        let name = self.queue_name(number, queue)?;
        if ReplyRegistry::is_reply_name(name.as_bytes()) {
            return Err(Fault::new(403, "cannot bind or unbind to a volatile (direct reply-to) queue"));
        }
        // With neither queue nor key given, the queue's name is the key.
        let key = if queue.is_empty() && key.is_empty() { name.to_string() } else { key.to_owned() };
        Ok(Binding {
            source: strip_cr_lf(exchange).into(),
            destination: Destination::Queue(name),
            key: key.into(),
            arguments,
        })
    }

    fn queue_declare(&mut self, number: u16, mut declare: queue::Declare) -> Result<Answer, Fault> {
        let asked = strip_cr_lf(declare.queue.as_str()).into_owned();
        if ReplyRegistry::is_reply_name(asked.as_bytes()) {
            return self.declare_reply_name(&asked, declare.nowait);
        }
        if declare.passive {
            return self.queue_declare_passive(number, &asked, declare.nowait);
        }
        let server_named = asked.is_empty();
        if server_named {
            self.check_server_named(&declare)?;
        }
        let name: Name = if server_named { self.server_name(&declare.arguments)?.into() } else { asked.into() };
        if lookup(&declare.arguments, "x-name-prefix").is_some() {
            declare.arguments = without(&declare.arguments, "x-name-prefix");
        }
        let Some(vhost) = self.vhost.clone() else { return Ok(Answer::None) };
        if !server_named && crate::model::is_reserved(&name) {
            return Err(Fault::new(403, format!("queue name '{name}' contains reserved prefix 'amq.*'")));
        }
        self.check(Access::Configure, Resource::Queue, &name)?;
        if let (Some(target), None) =
            (lookup(&declare.arguments, "x-dead-letter-exchange").and_then(as_longstr), vhost.queue(&name))
        {
            self.check(Access::Read, Resource::Queue, &name)?;
            self.check(Access::Write, Resource::Exchange, &String::from_utf8_lossy(target))?;
        }
        let exclusive = declare.exclusive;
        let nowait = declare.nowait;
        let declared = vhost.declare_queue(self.queue_options(&vhost, &name, declare), self.id, server_named)?;
        if declared.created && exclusive {
            self.exclusive.retain(|queue| !queue.is_deleted());
            self.exclusive.push(declared.queue.clone());
        }
        if !declared.created && !nowait {
            declared.queue.note_use();
        }
        self.remember_queue(number, &name);
        Ok(Answer::After(declared.round, (!nowait).then(|| declare_ok(&declared.queue))))
    }

    fn queue_options(&self, vhost: &Vhost, name: &Name, declare: queue::Declare) -> QueueOptions {
        QueueOptions {
            name: name.clone(),
            vhost: vhost.name.clone(),
            // An exclusive queue ends with its connection, so it is stored as transient, as in RabbitMQ.
            durable: declare.durable && !declare.exclusive,
            auto_delete: declare.auto_delete,
            exclusive_to: declare.exclusive.then_some(self.id),
            arguments: declare.arguments,
        }
    }

    fn check_server_named(&self, declare: &queue::Declare) -> Result<(), Fault> {
        let Some(vhost) = &self.vhost else { return Ok(()) };
        let options = self.queue_options(vhost, &"".into(), declare.clone());
        vhost.check_server_named(options).map_err(Fault::from)
    }

    /// A name for a queue declared without one; `x-name-prefix` may ask for another beginning.
    fn server_name(&self, arguments: &FieldTable) -> Result<String, Fault> {
        let Some(value) = lookup(arguments, "x-name-prefix") else { return Ok(generated_name("amq.gen-")) };
        let Some(prefix) = as_longstr(value) else {
            return Err(Fault::new(
                406,
                format!("invalid arg 'x-name-prefix': {{unacceptable_type,{}}}", type_name(value)),
            ));
        };
        let prefix = String::from_utf8_lossy(prefix);
        if prefix.len() > MAX_NAME_PREFIX_BYTES {
            return Err(Fault::new(406, format!("Queue name prefix '{prefix}' exceeds the 64-byte limit")));
        }
        Ok(generated_name(&format!("{prefix}-")))
    }

    fn queue_declare_passive(&mut self, number: u16, name: &str, no_wait: bool) -> Result<Answer, Fault> {
        self.check_any(Resource::Queue, name)?;
        let Some(vhost) = self.vhost.clone() else { return Ok(Answer::None) };
        let queue = vhost.queue_for(name, self.id)?;
        if !no_wait {
            queue.note_use();
        }
        self.remember_queue(number, &queue.options.name);
        Ok(if no_wait { Answer::None } else { Answer::Now(declare_ok(&queue)) })
    }

    /// Lets a responder see whether a requester still lives.
    fn declare_reply_name(&mut self, name: &str, no_wait: bool) -> Result<Answer, Fault> {
        let alive = name == REPLY_TO || matches!(self.broker.replies.find(name.as_bytes()), ReplyTarget::Alive(_));
        if !alive {
            let vhost = self.vhost.as_ref().map_or("", |vhost| &vhost.name);
            return Err(Fault::new(404, format!("no queue '{name}' in vhost '{vhost}'")));
        }
        let declare_ok = queue::DeclareOk { queue: short(name), message_count: 0, consumer_count: 1 };
        Ok(super::unless(no_wait, AMQPClass::Queue(queue::AMQPMethod::DeclareOk(declare_ok))))
    }

    fn remember_queue(&mut self, number: u16, name: &Name) {
        if let Some(channel) = self.channels.get_mut(number) {
            channel.last_queue = Some(name.clone());
        }
    }

    fn queue_purge(&mut self, number: u16, purge: &queue::Purge) -> Result<Answer, Fault> {
        let name = self.queue_name(number, purge.queue.as_str())?;
        self.check(Access::Read, Resource::Queue, &name)?;
        let Some(vhost) = self.vhost.clone() else { return Ok(Answer::None) };
        let queue = vhost.queue_for(&name, self.id)?;
        if queue.traits.queue_type == QueueType::Stream {
            return Err(Fault::new(540, format!("queue.purge not supported by stream queues {}", queue.resource())));
        }
        let message_count = u32::try_from(queue.purge()).unwrap_or(u32::MAX);
        let purge_ok = AMQPClass::Queue(queue::AMQPMethod::PurgeOk(queue::PurgeOk { message_count }));
        Ok(Answer::After(queue.settle_round(), (!purge.nowait).then_some(purge_ok)))
    }

    fn queue_delete(&mut self, number: u16, delete: &queue::Delete) -> Result<Answer, Fault> {
        let name = self.queue_name(number, delete.queue.as_str())?;
        self.check(Access::Configure, Resource::Queue, &name)?;
        let Some(vhost) = self.vhost.clone() else { return Ok(Answer::None) };
        let (mut deleted, mut round) = (0, 0);
        if vhost.queue(&name).is_some() {
            let queue = vhost.queue_for(&name, self.id)?;
            let (if_unused, if_empty) = (delete.if_unused, delete.if_empty);
            check_delete_flags(&queue, if_unused, if_empty)?;
            (deleted, round) = vhost.delete_queue(&queue, &mut self.effects, |counts| {
                vhost.check_delete(&queue, counts, if_unused, if_empty)
            })?;
            self.exclusive.retain(|exclusive| exclusive.id != queue.id);
            if queue.traits.queue_type == QueueType::Stream {
                deleted = 0; // as RabbitMQ counts
            }
        }
        let message_count = u32::try_from(deleted).unwrap_or(u32::MAX);
        let delete_ok = AMQPClass::Queue(queue::AMQPMethod::DeleteOk(queue::DeleteOk { message_count }));
        Ok(Answer::After(round, (!delete.nowait).then_some(delete_ok)))
    }
}

/// Quorum queues do not know the flags; streams ignore them.
fn check_delete_flags(queue: &Queue, if_unused: bool, if_empty: bool) -> Result<(), Fault> {
    let flag = match (if_unused, if_empty) {
        (true, _) => "if-unused",
        (false, true) => "if-empty",
        (false, false) => return Ok(()),
    };
    if queue.traits.queue_type != QueueType::Quorum {
        return Ok(());
    }
    let text = format!("queue.delete operations with {flag} flag set are not supported by quorum queues");
    Err(Fault::new(540, format!("cannot delete {}. {text}", queue.resource())))
}

fn short(text: &str) -> ShortString {
    ShortString::try_new(&text[..text.floor_char_boundary(255)]).unwrap_or_default()
}

fn declare_ok(queue: &Queue) -> AMQPClass {
    let counts = queue.counts();
    // RabbitMQ counts no consumers of streams here.
    let consumers = if queue.traits.queue_type == QueueType::Stream { 0 } else { counts.consumers };
    AMQPClass::Queue(queue::AMQPMethod::DeclareOk(queue::DeclareOk {
        queue: short(&queue.options.name),
        message_count: u32::try_from(counts.ready).unwrap_or(u32::MAX),
        consumer_count: u32::try_from(consumers).unwrap_or(u32::MAX),
    }))
}

fn without(table: &FieldTable, key: &str) -> FieldTable {
    let kept = table.into_iter().filter(|(name, _)| name.as_str() != key);
    kept.map(|(name, value): (&ShortString, &AMQPValue)| (name.clone(), value.clone()))
        .collect::<std::collections::BTreeMap<_, _>>()
        .into()
}
