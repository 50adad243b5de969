//! What a vhost has to tell: its events, and messages to the exchanges that only the broker publishes to.

use std::sync::{Arc, atomic::Ordering};

use super::{Arrival, Vhost};
use crate::{
    broker::{
        arguments::QueueType,
        binding::{Binding, Destination},
        events::{EVENT_EXCHANGE, EventProperties, Events},
        exchange::Exchange,
        message::Message,
        policy::{Policy, PolicyKind},
        port::Effects,
        queue::{ConnectionId, Queue},
        router::{Removed, Topology},
    },
    model::{Name, erlang},
};

const ACTOR: &str = "user_who_performed_action";

impl Vhost {
    /// Whether publishes and deliveries are copied to the exchange `amq.rabbitmq.trace`.
    #[inline]
    pub fn is_tracing(&self) -> bool {
        self.tracing.load(Ordering::Relaxed)
    }

    /// Switches tracing on or off, until the broker stops.
    pub fn set_tracing(&self, on: bool) {
        if self.tracing.swap(on, Ordering::Relaxed) != on {
            tracing::info!(vhost = %self.name, on, "tracing switched");
        }
    }

    /// Publishes a message of the broker's own to an internal exchange. Nothing is locked by the caller.
    pub(in crate::broker) fn publish_to_system_exchange(
        &self,
        exchange: &str,
        message: &Message<'_>,
        effects: &mut Effects,
    ) {
        // It may go nowhere, or be refused by a queue that is full: nobody waits for it.
        let _ = self.publish(exchange, message, Arrival::Client, effects);
    }

    /// The events' facade.
    fn events(&self) -> &Events {
        &self.environment.events
    }

    /// Gives the vhost its event exchange, if it is the one that has it.
    pub(super) fn add_event_exchange(&self, topology: &mut Topology<Arc<Queue>>) {
        if self.name == *self.events().vhost() {
            topology.insert_exchange(Exchange::of_events());
        }
    }

    /// Looks whether somebody listens to events. Called with every change that could have changed that.
    pub(super) fn look_for_listeners(&self, topology: &Topology<Arc<Queue>>) {
        if self.name == *self.events().vhost() {
            // As in RabbitMQ, only bindings count: an alternate exchange alone gets no events.
            self.events().set_bound(topology.bindings_from(EVENT_EXCHANGE).next().is_some());
        }
    }

    fn named(&self, name: &Name) -> EventProperties {
        EventProperties::default().text("name", &**name).text("vhost", &*self.name)
    }

    pub(super) fn note_queue_created(&self, queue: &Queue, connection: ConnectionId) {
        let events = self.events();
        events.note("queue.created", || {
            let options = &queue.options;
            let node = events.node();
            self.named(&options.name)
                .flag("durable", options.durable)
                .flag("auto_delete", options.auto_delete)
                .flag("exclusive", options.exclusive_to.is_some())
                .text("owner_pid", options.exclusive_to.map_or(String::new(), |owner| events.connection_pid(owner)))
                .arguments("arguments", &options.arguments)
                .text("type", QueueType::of(&options.arguments).module())
                .text("leader", &**node)
                .texts("members", [&**node])
                .text(ACTOR, events.actor(Some(connection)))
        });
    }

    pub(super) fn note_queue_deleted(&self, queue: &Queue, connection: Option<ConnectionId>) {
        let events = self.events();
        events.note("queue.deleted", || {
            self.named(&queue.options.name)
                .text("type", QueueType::of(&queue.options.arguments).module())
                .text(ACTOR, events.actor(connection))
        });
    }

    pub(super) fn note_exchange_created(&self, exchange: &Exchange, connection: ConnectionId) {
        let events = self.events();
        events.note("exchange.created", || {
            let policy = self.exchange_policy(&exchange.name).user.map(|policy| policy.name.clone());
            self.named(&exchange.name)
                .text("type", exchange.kind.as_str())
                .flag("durable", exchange.durable)
                .flag("auto_delete", exchange.auto_delete)
                .flag("internal", exchange.internal)
                .arguments("arguments", &exchange.arguments)
                .text("policy", policy.as_deref().unwrap_or_default())
                .text(ACTOR, events.actor(Some(connection)))
        });
    }

    pub(super) fn note_removed(&self, removed: &Removed, connection: Option<ConnectionId>) {
        let events = self.events();
        for exchange in &removed.exchanges {
            events.note("exchange.deleted", || self.named(&exchange.name).text(ACTOR, events.actor(connection)));
        }
        for binding in &removed.bindings {
            events.note("binding.deleted", || self.binding(binding, connection));
        }
    }

    pub(super) fn note_binding_created(&self, binding: &Binding, connection: ConnectionId) {
        self.events().note("binding.created", || self.binding(binding, Some(connection)));
    }

    fn binding(&self, binding: &Binding, connection: Option<ConnectionId>) -> EventProperties {
        let kind = match binding.destination {
            Destination::Queue(_) => "queue",
            Destination::Exchange(_) => "exchange",
        };
        EventProperties::default()
            .text("source_name", &*binding.source)
            .text("source_kind", "exchange")
            .text("destination_name", &**binding.destination.name())
            .text("destination_kind", kind)
            .text("routing_key", erlang::text(&binding.key))
            .arguments("arguments", &binding.arguments)
            .text("vhost", &*self.name)
            .text(ACTOR, self.events().actor(connection))
    }

    pub(super) fn note_policy_set(&self, policy: &Policy, connection: Option<ConnectionId>) {
        let events = self.events();
        // RabbitMQ tells of operator policies as of parameters, which is not done here.
        if policy.kind == PolicyKind::User {
            events.note("policy.set", || {
                with_policy(self.named(&policy.name), policy).text(ACTOR, events.actor(connection))
            });
        }
    }

    pub(super) fn note_policy_cleared(&self, kind: PolicyKind, name: &str, connection: Option<ConnectionId>) {
        let events = self.events();
        if kind == PolicyKind::User {
            events.note("policy.cleared", || self.named(&name.into()).text(ACTOR, events.actor(connection)));
        }
    }

    /// Notes that a queue follows other policies than before.
    pub(super) fn note_queue_policy(&self, queue: &Queue, connection: Option<ConnectionId>) {
        let events = self.events();
        if !events.has_listeners() {
            return;
        }
        let properties = self
            .named(&queue.options.name)
            .text("type", QueueType::of(&queue.options.arguments).module())
            .text(ACTOR, events.actor(connection));
        match self.queue_policy(queue).user {
            Some(policy) => events.note("queue.policy.updated", || with_policy(properties, &policy)),
            None => events.note("queue.policy.cleared", || properties),
        }
    }

    /// Notes that the vhost is new.
    pub(in crate::broker) fn note_created(&self) {
        let events = self.events();
        events.note("vhost.created", || {
            EventProperties::default()
                .text("name", &*self.name)
                .flag("tracing", self.is_tracing())
                .text(ACTOR, events.actor(None))
        });
    }
}

fn with_policy(properties: EventProperties, policy: &Policy) -> EventProperties {
    properties
        .text("pattern", policy.pattern.as_str())
        .text("apply-to", policy.apply_to.name())
        .number("priority", policy.priority)
        .json("definition", &policy.definition.to_json())
}
