//! One channel's state on the session's side: its mode, what it remembers, and its cached routes.

use std::sync::Arc;

use ahash::AHashMap;
use smallvec::SmallVec;

use super::{assembler::Assembler, tx::Transaction};
use crate::{
    broker::{Broker, Queue, ReplyRegistry},
    model::Name,
};

/// Routes a channel remembers at most.
const CACHED_ROUTES: usize = 2048;

/// Whether a channel works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChannelState {
    Open,
    /// `channel.close` was sent; everything but close and close-ok is ignored.
    Closing,
}

/// What publishes on the channel promise.
pub enum Mode {
    Plain,
    /// `confirm.select`: the number of the last publish.
    Confirm {
        published: u64,
    },
    /// `tx.select`.
    Tx(Box<Transaction>),
}

/// A requester of direct reply-to.
pub struct ReplyConsumer {
    pub id: u64,
    /// The name that replaces `amq.rabbitmq.reply-to` in its requests.
    pub name: String,
    pub tag: Name,
}

/// See the module.
pub struct Channel {
    pub state: ChannelState,
    pub assembler: Assembler,
    pub mode: Mode,
    /// `basic.qos` for consumers to come; 0 is unlimited.
    pub prefetch: u16,
    /// The queue that an empty name means.
    pub last_queue: Option<Name>,
    pub reply: Option<ReplyConsumer>,
    pub routes: RouteCache,
}

impl Default for Channel {
    fn default() -> Self {
        Channel {
            state: ChannelState::Open,
            assembler: Assembler::default(),
            mode: Mode::Plain,
            prefetch: 0,
            last_queue: None,
            reply: None,
            routes: RouteCache::default(),
        }
    }
}

impl Channel {
    /// Gives up what the channel holds in the broker's registries.
    pub fn release(&mut self, broker: &Broker) {
        if let Some(reply) = self.reply.take() {
            release_reply(&broker.replies, &reply);
        }
        self.routes = RouteCache::default();
        self.mode = Mode::Plain;
    }
}

fn release_reply(replies: &ReplyRegistry, reply: &ReplyConsumer) {
    replies.remove(reply.id);
}

/// The queues an exchange and key lead to.
pub type CachedRoute = Arc<SmallVec<[Arc<Queue>; 2]>>;

/// Routes by `names` (exchange and routing key as on the wire), valid for one epoch of topology and permissions.
#[derive(Default)]
pub struct RouteCache {
    epoch: (u64, u64),
    last: Option<(Arc<[u8]>, CachedRoute)>,
    /// Its keys are shared with `last`, so that a publisher who changes them allocates nothing.
    routes: AHashMap<Arc<[u8]>, CachedRoute>,
}

impl RouteCache {
    /// The route, if it was remembered in this epoch. The hot publisher, with one exchange and key, pays a comparison.
    #[inline]
    pub fn find(&mut self, names: &[u8], epoch: (u64, u64)) -> Option<CachedRoute> {
        if self.epoch != epoch {
            *self = RouteCache { epoch, ..RouteCache::default() };
            return None;
        }
        if let Some((key, route)) = &self.last
            && **key == *names
        {
            return Some(route.clone());
        }
        let (key, route) = self.routes.get_key_value(names)?;
        let (key, route) = (key.clone(), route.clone());
        self.last = Some((key, route.clone()));
        Some(route)
    }

    /// Remembers a route found in `epoch`.
    pub fn remember(&mut self, names: &[u8], epoch: (u64, u64), route: CachedRoute) {
        if self.epoch != epoch || self.routes.len() >= CACHED_ROUTES {
            *self = RouteCache { epoch, ..RouteCache::default() };
        }
        let key: Arc<[u8]> = names.into();
        self.routes.insert(key.clone(), route.clone());
        self.last = Some((key, route));
    }
}
