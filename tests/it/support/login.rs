//! The handshake, step by step, with every choice the client has.

use std::net::SocketAddr;

use amq_protocol::{
    protocol::{AMQPClass, connection},
    types::{AMQPValue, LongString},
};

use super::{peer::Peer, table};

/// How to log in.
#[derive(Clone)]
pub struct Login {
    pub mechanism: &'static str,
    pub response: Vec<u8>,
    pub capabilities: &'static [&'static str],
    pub channel_max: u16,
    pub frame_max: u32,
    pub heartbeat: u16,
    pub vhost: &'static str,
}

impl Default for Login {
    fn default() -> Self {
        Login {
            mechanism: "PLAIN",
            response: b"\0guest\0guest".to_vec(),
            capabilities: &["authentication_failure_close", "consumer_cancel_notify", "connection.blocked"],
            channel_max: 2047,
            frame_max: 131_072,
            heartbeat: 0,
            vhost: "/",
        }
    }
}

impl Login {
    /// Header, start, start-ok.
    pub async fn authenticate(&self, address: SocketAddr) -> Peer {
        let mut peer = Peer::connect(address).await;
        peer.write(b"AMQP\x00\x00\x09\x01").await;
        let AMQPClass::Connection(connection::AMQPMethod::Start(_)) = peer.method(0).await else { panic!("no start") };
        let capabilities = table(self.capabilities.iter().map(|&name| (name, AMQPValue::Boolean(true))));
        let start_ok = connection::StartOk {
            client_properties: table([("capabilities", AMQPValue::FieldTable(capabilities))]),
            mechanism: self.mechanism.into(),
            response: LongString::from(self.response.clone()),
            locale: "en_US".into(),
        };
        peer.send(0, AMQPClass::Connection(connection::AMQPMethod::StartOk(start_ok))).await;
        peer
    }

    /// As far as tune-ok, without waiting for what follows.
    pub async fn tune(&self, address: SocketAddr) -> Peer {
        let mut peer = self.authenticate(address).await;
        let AMQPClass::Connection(connection::AMQPMethod::Tune(_)) = peer.method(0).await else { panic!("no tune") };
        let tune_ok =
            connection::TuneOk { channel_max: self.channel_max, frame_max: self.frame_max, heartbeat: self.heartbeat };
        peer.send(0, AMQPClass::Connection(connection::AMQPMethod::TuneOk(tune_ok))).await;
        peer.frame_max = self.frame_max as usize;
        peer
    }

    /// As far as connection.open, without waiting for what follows.
    pub async fn ask_open(&self, address: SocketAddr) -> Peer {
        let mut peer = self.tune(address).await;
        let open = connection::Open { virtual_host: self.vhost.into() };
        peer.send(0, AMQPClass::Connection(connection::AMQPMethod::Open(open))).await;
        peer
    }

    /// The whole handshake.
    pub async fn open(&self, address: SocketAddr) -> Peer {
        let mut peer = self.ask_open(address).await;
        let AMQPClass::Connection(connection::AMQPMethod::OpenOk(_)) = peer.method(0).await else {
            panic!("no open-ok")
        };
        peer
    }
}
