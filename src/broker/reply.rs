//! Direct reply-to: names that lead straight to a requester's channel, without a queue.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use dashmap::DashMap;

use super::message::Message;
use super::port::{Address, Delivery, Effects, Port};

/// The pseudo queue requesters consume from and name in `reply-to`.
pub const REPLY_TO: &str = "amq.rabbitmq.reply-to";

/// What a name leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReplyTarget {
    /// Not a generated name, so nobody was ever behind it.
    Malformed,
    /// Its requester is gone.
    Gone,
    Alive(u64),
}

struct Requester {
    key: [u8; 16],
    port: Arc<dyn Port>,
    to: Address,
}

/// All requesters. A name holds an id and a secret, so that it cannot be guessed.
#[derive(Default)]
pub struct ReplyRegistry {
    requesters: DashMap<u64, Requester>,
    next: AtomicU64,
}

impl fmt::Debug for ReplyRegistry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReplyRegistry").field("requesters", &self.requesters.len()).finish()
    }
}

impl ReplyRegistry {
    /// Adds a requester; answers its id and the name responders publish to.
    pub fn register(&self, port: Arc<dyn Port>, to: Address) -> (u64, String) {
        let mut key = [0; 16];
        if getrandom::fill(&mut key).is_err() {
            // Without randomness names are still unique, only not secret.
            key[..8].copy_from_slice(&self.next.load(Ordering::Relaxed).to_be_bytes());
        }
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        self.requesters.insert(id, Requester { key, port, to });
        let name = format!("{REPLY_TO}.{}.{}", URL_SAFE_NO_PAD.encode(id.to_be_bytes()), URL_SAFE_NO_PAD.encode(key));
        (id, name)
    }

    /// Removes a requester.
    pub fn remove(&self, id: u64) {
        self.requesters.remove(&id);
    }

    /// Whether `name` begins like a generated one (or is the pseudo queue itself).
    pub fn is_reply_name(name: &[u8]) -> bool {
        name.starts_with(REPLY_TO.as_bytes())
    }

    /// Looks a name up.
    pub fn find(&self, name: &[u8]) -> ReplyTarget {
        let Some((id, key)) = parse(name) else { return ReplyTarget::Malformed };
        match self.requesters.get(&id) {
            Some(requester) if requester.key == key => ReplyTarget::Alive(id),
            _ => ReplyTarget::Gone,
        }
    }

    /// Delivers to a requester; lost if it has just gone.
    pub fn deliver(&self, id: u64, message: &Message<'_>, effects: &mut Effects) {
        let Some((port, to)) = self.requesters.get(&id).map(|requester| (requester.port.clone(), requester.to)) else {
            return;
        };
        let wake = port.with_writer(&mut |writer| {
            writer.deliver(&Delivery { to, seq: 0, redelivered: false, message: *message });
        });
        if wake {
            effects.wakes.push(port);
        }
    }
}

fn parse(name: &[u8]) -> Option<(u64, [u8; 16])> {
    let rest = name.strip_prefix(REPLY_TO.as_bytes())?.strip_prefix(b".")?;
    let dot = rest.iter().position(|&byte| byte == b'.')?;
    let id = URL_SAFE_NO_PAD.decode(&rest[..dot]).ok()?.try_into().ok()?;
    let key = URL_SAFE_NO_PAD.decode(&rest[dot + 1..]).ok()?.try_into().ok()?;
    Some((u64::from_be_bytes(id), key))
}
