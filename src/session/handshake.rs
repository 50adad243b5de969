//! From the protocol header to `connection.open-ok`: versions, SASL, tuning, the virtual host.

use std::collections::BTreeMap;

use amq_protocol::{
    protocol::{AMQPClass, connection},
    types::{AMQPValue, FieldTable, ShortString, parsing::parse_field_table},
};

use super::{
    close::{CloseReason, Fault},
    connection::{Phase, Session, SessionLimits},
};
use crate::{
    auth::sasl::{self, Mechanism},
    wire::limits::check_table,
};

/// What a server answers to another protocol, and what every 0-9-1 client sends.
pub const PROTOCOL_HEADER: [u8; 8] = *b"AMQP\x00\x00\x09\x01";
/// RabbitMQ 4's answer to everything that is not nearly 0-9-1.
const PROTOCOL_HEADER_1_0: [u8; 8] = *b"AMQP\x03\x01\x00\x00";
/// RabbitMQ's floor for frame-max since 4.1.
const FRAME_MAX_FLOOR: u32 = 8192;

/// What the client's protocol header asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeaderAnswer {
    /// 0-9-1, or 0-9 which is served as 0-9-1.
    Serve,
    /// Send this header and close.
    Refuse([u8; 8]),
}

/// Judges the first eight bytes of a connection.
pub fn judge_header(header: &[u8; 8]) -> HeaderAnswer {
    match header {
        b"AMQP\x00\x00\x09\x01" | b"AMQP\x01\x01\x00\x09" => HeaderAnswer::Serve,
        [b'A', b'M', b'Q', b'P', 0, 0, minor, _] if *minor >= 9 => HeaderAnswer::Refuse(PROTOCOL_HEADER),
        _ => HeaderAnswer::Refuse(PROTOCOL_HEADER_1_0),
    }
}

fn text(value: &str) -> AMQPValue {
    AMQPValue::LongString(value.into())
}

/// Every capability is a promise that client libraries act on.
const CAPABILITIES: [&str; 9] = [
    "publisher_confirms",
    "exchange_exchange_bindings",
    "basic.nack",
    "consumer_cancel_notify",
    "connection.blocked",
    "consumer_priorities",
    "authentication_failure_close",
    "per_consumer_qos",
    "direct_reply_to",
];

/// `connection.start`.
pub fn start(limits: &SessionLimits) -> AMQPClass {
    let capabilities: BTreeMap<ShortString, AMQPValue> =
        CAPABILITIES.iter().map(|&name| (name.into(), AMQPValue::Boolean(true))).collect();
    let mut properties = FieldTable::default();
    properties.insert("capabilities".into(), AMQPValue::FieldTable(capabilities.into()));
    properties.insert("cluster_name".into(), text(&limits.cluster_name));
    properties.insert("copyright".into(), text("Copyright (c) the Leveret authors"));
    properties.insert("information".into(), text("Licensed under the Apache License 2.0"));
    properties.insert("platform".into(), text("Rust"));
    properties.insert("product".into(), text("Leveret"));
    properties.insert("version".into(), text(env!("CARGO_PKG_VERSION")));
    AMQPClass::Connection(connection::AMQPMethod::Start(connection::Start {
        version_major: 0,
        version_minor: 9,
        server_properties: properties,
        mechanisms: sasl::MECHANISMS.into(),
        locales: "en_US".into(),
    }))
}

fn capability(client_properties: &FieldTable, name: &str) -> bool {
    match client_properties.inner().get("capabilities") {
        Some(AMQPValue::FieldTable(capabilities)) => {
            matches!(capabilities.inner().get(name), Some(AMQPValue::Boolean(true)))
        }
        _ => false,
    }
}

impl Session {
    /// Handles a method that arrives before `connection.open-ok`.
    pub(super) fn on_handshake_method(&mut self, class: AMQPClass) -> Result<(), Fault> {
        use connection::AMQPMethod as C;
        match (self.phase, class) {
            (Phase::AwaitStartOk, AMQPClass::Connection(C::StartOk(start_ok))) => self.on_start_ok(&start_ok),
            (Phase::AwaitTuneOk, AMQPClass::Connection(C::TuneOk(tune_ok))) => self.on_tune_ok(&tune_ok),
            (Phase::AwaitOpen, AMQPClass::Connection(C::Open(open))) => self.on_open(open.virtual_host.as_str()),
            (Phase::AwaitOpen, AMQPClass::Connection(C::Close(_))) => {
                self.reply(0, &AMQPClass::Connection(C::CloseOk(connection::CloseOk {})));
                self.phase = Phase::Closed;
                Ok(())
            }
            (_, class) => {
                let id = (class.get_amqp_class_id(), class.get_amqp_method_id());
                Err(Fault::DropLater(format!("unexpected method {id:?} during the handshake")))
            }
        }
    }

    fn on_start_ok(&mut self, start_ok: &connection::StartOk) -> Result<(), Fault> {
        let properties = &start_ok.client_properties;
        self.client.blocked = capability(properties, "connection.blocked");
        self.client.cancel_notify = capability(properties, "consumer_cancel_notify");
        self.client.failure_close = capability(properties, "authentication_failure_close");
        self.client.properties = properties.clone();
        if let Some(AMQPValue::LongString(name)) = properties.inner().get("connection_name") {
            self.client.name = name.to_string().chars().take(255).collect();
        }
        let Some(mechanism) = Mechanism::from_name(start_ok.mechanism.as_str()) else {
            return Err(Fault::DropLater(format!("unknown authentication mechanism '{}'", start_ok.mechanism)));
        };
        self.client.mechanism = Some(mechanism);
        let response = start_ok.response.as_bytes();
        let credentials = match mechanism {
            Mechanism::Plain => sasl::parse_plain(response),
            Mechanism::AmqPlain => sasl::parse_amqplain(&amqplain_table(response).unwrap_or_default()),
        };
        let credentials = credentials.map_err(|error| Fault::DropLater(error.to_string()))?;
        match self.auth.authenticate(&credentials.user, &credentials.password, self.peer) {
            Ok(user) => {
                self.user_name = user.name.as_str().into();
                self.user = Some(user);
                self.note_login_accepted(&credentials.user);
            }
            Err(failure) => {
                tracing::warn!(user = credentials.user, peer = %self.peer, reason = ?failure, "login refused");
                self.note_login_refused(&credentials.user, &failure);
                if self.client.failure_close {
                    return Err(Fault::Connection(CloseReason::new(403, &mechanism.refusal_text())));
                }
                return Err(Fault::DropLater("login refused".into()));
            }
        }
        let limits = &self.limits;
        let tune = connection::Tune {
            channel_max: limits.channel_max,
            frame_max: limits.frame_max,
            heartbeat: limits.heartbeat_secs,
        };
        self.reply(0, &AMQPClass::Connection(connection::AMQPMethod::Tune(tune)));
        self.phase = Phase::AwaitTuneOk;
        Ok(())
    }

    fn on_tune_ok(&mut self, tune_ok: &connection::TuneOk) -> Result<(), Fault> {
        let limits = &self.limits;
        let refuse = |text: String| Err(Fault::DropLater(text));
        let frame_max = tune_ok.frame_max;
        if frame_max != 0 && frame_max < FRAME_MAX_FLOOR {
            return refuse(format!(
                "negotiated frame_max = {frame_max} is lower than the minimum allowed value ({FRAME_MAX_FLOOR})"
            ));
        }
        if frame_max == 0 || frame_max > limits.frame_max {
            let shown = if frame_max == 0 { "0 (no limit)".to_owned() } else { frame_max.to_string() };
            return refuse(format!(
                "negotiated frame_max = {shown} is higher than the maximum allowed value ({})",
                limits.frame_max
            ));
        }
        let channel_max = tune_ok.channel_max;
        if channel_max == 0 || channel_max > limits.channel_max {
            let shown = if channel_max == 0 { "0 (no limit)".to_owned() } else { channel_max.to_string() };
            return refuse(format!(
                "negotiated channel_max = {shown} is higher than the maximum allowed value ({})",
                limits.channel_max
            ));
        }
        self.frame_max = frame_max;
        self.channel_max = channel_max;
        self.heartbeat_secs = tune_ok.heartbeat;
        self.outbox.negotiated(frame_max, self.client.cancel_notify);
        self.phase = Phase::AwaitOpen;
        Ok(())
    }

    fn on_open(&mut self, vhost: &str) -> Result<(), Fault> {
        let user = self.user_name.clone();
        let fault = |text: String| Fault::new(530, text).at(10, 40);
        let found = self.broker.vhost(vhost).ok_or_else(|| fault(format!("vhost {vhost} not found")))?;
        if !self.auth.vhost_access(&user, vhost) {
            return Err(fault(format!("access to vhost '{vhost}' refused for user '{user}'")));
        }
        tracing::info!(peer = %self.peer, user = %user, vhost, name = self.client.name, "connection opened");
        self.note_open(found.clone());
        self.vhost = Some(found);
        self.phase = Phase::Running;
        self.reply(0, &AMQPClass::Connection(connection::AMQPMethod::OpenOk(connection::OpenOk {})));
        Ok(())
    }
}

/// AMQPLAIN's response is the body of a table without its length.
fn amqplain_table(response: &[u8]) -> Option<FieldTable> {
    let len = u32::try_from(response.len()).ok()?;
    let bytes = [&len.to_be_bytes(), response].concat();
    check_table(&bytes).ok()?;
    parse_field_table(bytes.as_slice()).ok().map(|(_, table)| table)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn protocol_headers_are_judged_like_rabbitmq() {
        assert_eq!(judge_header(&PROTOCOL_HEADER), HeaderAnswer::Serve);
        assert_eq!(judge_header(b"AMQP\x01\x01\x00\x09"), HeaderAnswer::Serve);
        assert_eq!(judge_header(b"AMQP\x00\x00\x09\x00"), HeaderAnswer::Refuse(PROTOCOL_HEADER));
        for other in [b"AMQP\x01\x01\x08\x00", b"HELLO123", b"GET / HT", b"AMQP\x03\x01\x00\x00"] {
            assert_eq!(judge_header(other), HeaderAnswer::Refuse(PROTOCOL_HEADER_1_0));
        }
    }
}
