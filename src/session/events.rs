//! What a session tells the event exchange and the firehose: its login, its connection, channels and consumers, and the
//! messages it publishes.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use amq_protocol::protocol::basic;

use super::{channel::ChannelState, connection::Session};
use crate::{
    auth::{AuthFailure, sasl::Mechanism},
    broker::{EventProperties, Message, Origin, Queue, Vhost},
    clock,
};

/// The two ends of a connection's socket.
#[derive(Clone, Copy, Debug)]
pub struct Endpoints {
    pub peer: SocketAddr,
    pub local: SocketAddr,
}

const ACTOR: &str = "user_who_performed_action";

impl Session {
    /// Tells the session the ends of its socket, for its name.
    pub fn set_endpoints(&mut self, endpoints: Endpoints) {
        self.endpoints = Some(endpoints);
    }

    /// The connection's name, as in RabbitMQ.
    fn connection_name(&self) -> String {
        match self.endpoints {
            Some(Endpoints { peer, local }) => format!("{peer} -> {local}"),
            None => self.peer.to_string(),
        }
    }

    /// The properties that logins and connections share.
    fn peer_properties(&self) -> EventProperties {
        let (peer_port, local) = match self.endpoints {
            Some(Endpoints { peer, local }) => (peer.port(), erlang_address(local.ip())),
            None => (0, String::new()),
        };
        EventProperties::default()
            .text("peer_host", erlang_address(self.peer))
            .number("peer_port", peer_port.into())
            .text("host", local)
            .text("protocol", "{0,9,1}")
            .flag("ssl", false)
            .text("auth_mechanism", self.client.mechanism.map_or("", Mechanism::name))
    }

    fn note_login(&self, key: &'static str, user: &str, more: impl FnOnce(EventProperties) -> EventProperties) {
        self.broker.events().note(key, || {
            let properties = self
                .peer_properties()
                .text("name", user)
                .text("connection_name", self.connection_name())
                .text("connection_type", "network");
            more(properties)
        });
    }

    /// Notes that the client has logged in.
    pub(super) fn note_login_accepted(&self, user: &str) {
        self.note_login("user.authentication.success", user, |properties| properties);
    }

    /// Notes that the client was refused.
    pub(super) fn note_login_refused(&self, user: &str, failure: &AuthFailure) {
        let error = format!("user '{user}' - {failure}");
        self.note_login("user.authentication.failure", user, |properties| properties.characters("error", &error));
    }

    /// The connection is open: gives it its name in traces, and notes it.
    pub(super) fn note_open(&mut self, vhost: Arc<Vhost>) {
        self.broker.events().remember_user(self.id, &self.user_name);
        let origin = Arc::new(Origin {
            connection: self.id,
            name: self.connection_name(),
            user: self.user_name.clone(),
            vhost: vhost.clone(),
        });
        self.outbox.set_origin(origin.clone());
        self.origin = Some(origin.clone());
        let events = self.broker.events();
        events.note("connection.created", || {
            let port = self.endpoints.map_or(0, |endpoints| endpoints.local.port());
            self.peer_properties()
                .text("name", &*origin.name)
                .text("pid", events.connection_pid(self.id))
                .text("node", &**events.node())
                .number("port", port.into())
                .text("user", &*self.user_name)
                .text("vhost", &*vhost.name)
                .text("type", "network")
                .number("timeout", self.heartbeat_secs.into())
                .number("frame_max", self.frame_max.into())
                .number("channel_max", self.channel_max.into())
                .arguments("client_properties", &self.client.properties)
                .number("connected_at", i64::try_from(clock::now_unix_ms()).unwrap_or(i64::MAX))
                .text(ACTOR, &*self.user_name)
        });
    }

    /// Notes that an open connection's channels end, if it is still open.
    pub(super) fn note_channels_closed(&self) {
        if self.origin.is_some() {
            let open = self.channels.iter().filter(|(_, channel)| channel.state == ChannelState::Open);
            open.for_each(|(number, _)| self.note_channel_closed(number));
        }
    }

    /// Notes that the connection has ended, once.
    pub(super) fn note_closed(&mut self) {
        let Some(origin) = self.origin.take() else { return };
        let events = self.broker.events();
        events.forget_user(self.id);
        events.note("connection.closed", || {
            EventProperties::default()
                .text("name", &*origin.name)
                .text("pid", events.connection_pid(self.id))
                .text("node", &**events.node())
                .arguments("client_properties", &self.client.properties)
        });
    }

    /// Notes that a channel was opened.
    pub(super) fn note_channel_created(&self, number: u16) {
        let (Some(origin), events) = (&self.origin, self.broker.events()) else { return };
        events.note("channel.created", || {
            EventProperties::default()
                .text("name", format!("{} ({number})", origin.name))
                .number("number", number.into())
                .text("connection", events.connection_pid(self.id))
                .text("pid", events.channel_pid(self.id, number))
                .text("user", &*origin.user)
                .text("vhost", &*origin.vhost.name)
                .text(ACTOR, &*origin.user)
        });
    }

    /// Notes that a channel was closed.
    pub(super) fn note_channel_closed(&self, number: u16) {
        let events = self.broker.events();
        events.note("channel.closed", || {
            EventProperties::default()
                .text("pid", events.channel_pid(self.id, number))
                .number("consumer_count", 0)
                .text(ACTOR, &*self.user_name)
        });
    }

    /// Notes a new consumer.
    pub(super) fn note_consumer(&self, number: u16, queue: &Queue, tag: &str, prefetch: u16, consume: &basic::Consume) {
        let events = self.broker.events();
        events.note("consumer.created", || {
            EventProperties::default()
                .text("queue", &*queue.options.name)
                .text("vhost", &*queue.options.vhost)
                .text("consumer_tag", tag)
                .text("channel", events.channel_pid(self.id, number))
                .flag("ack_required", !consume.no_ack)
                .flag("exclusive", consume.exclusive)
                .number("prefetch_count", prefetch.into())
                .arguments("arguments", &consume.arguments)
                .text(ACTOR, &*self.user_name)
        });
    }

    /// Notes that a client has cancelled its consumer.
    pub(super) fn note_consumer_gone(&self, number: u16, queue: &Queue, tag: &str) {
        let events = self.broker.events();
        events.note("consumer.deleted", || {
            EventProperties::default()
                .text("queue", &*queue.options.name)
                .text("vhost", &*queue.options.vhost)
                .text("consumer_tag", tag)
                .text("channel", events.channel_pid(self.id, number))
                .text(ACTOR, &*self.user_name)
        });
    }

    /// Copies a message that goes to these queues to the trace exchange, if the vhost is traced.
    pub(super) fn trace_publish(&mut self, number: u16, message: &Message<'_>, queues: &[Arc<Queue>]) {
        if let Some(origin) = self.traced_origin() {
            let queues = queues.iter().map(|queue| &*queue.options.name);
            origin.trace_publish(&self.broker, number, message, queues, &mut self.effects);
        }
    }

    /// The same with a message that goes straight to a requester.
    pub(super) fn trace_reply(&mut self, number: u16, name: &[u8], message: &Message<'_>) {
        if let Some(origin) = self.traced_origin() {
            let name = String::from_utf8_lossy(name);
            origin.trace_publish(&self.broker, number, message, std::iter::once(&*name), &mut self.effects);
        }
    }

    fn traced_origin(&self) -> Option<Arc<Origin>> {
        self.origin.as_ref().filter(|origin| origin.vhost.is_tracing()).cloned()
    }
}

/// An IP address as Erlang shows it.
fn erlang_address(address: IpAddr) -> String {
    match address {
        IpAddr::V4(v4) => format!("{{{}}}", v4.octets().map(|octet| octet.to_string()).join(",")),
        IpAddr::V6(v6) => format!("{{{}}}", v6.segments().map(|segment| segment.to_string()).join(",")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_look_like_erlangs() {
        assert_eq!(erlang_address([127, 0, 0, 1].into()), "{127,0,0,1}");
        assert_eq!(erlang_address([0, 0, 0, 0, 0, 0, 0, 1].into()), "{0,0,0,0,0,0,0,1}");
    }
}
