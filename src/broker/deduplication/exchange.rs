//! Deduplication at an exchange: a cache that many publishers share and that goes to the store by itself.

use std::sync::Arc;

use parking_lot::Mutex;

use super::{Admission, DedupCache, Verdict};
use crate::{
    broker::rules::Deduplication,
    store::{AtomicSection, QueueId, Round, RoundBuilder, RoundSource, Store, StoreError},
};

/// The deduplication of one exchange.
///
/// # Locks
/// Its lock is taken within the atomic section, before or after those of queues but never with one of them.
pub struct ExchangeDedup {
    owner: QueueId,
    store: Arc<Store>,
    state: Mutex<State>,
}

struct State {
    cache: DedupCache,
    /// The round that takes the present changes, if there are any.
    dirty: Option<Round>,
    /// The last round that took any.
    last: Round,
    closed: bool,
}

impl ExchangeDedup {
    /// The deduplication of a new exchange. `owner` is an id of its own, which a transient exchange does not use.
    pub fn new(store: Arc<Store>, owner: QueueId, rules: &Deduplication, durable: bool) -> Arc<Self> {
        Self::with_cache(store, owner, DedupCache::new(rules, durable))
    }

    /// The deduplication of a durable exchange after a restart.
    ///
    /// # Errors
    /// [`StoreError`] if its notes cannot be read.
    pub fn recover(
        store: Arc<Store>,
        owner: QueueId,
        rules: &Deduplication,
        now_unix_ms: u64,
    ) -> Result<Arc<Self>, StoreError> {
        let cache = DedupCache::recover(rules, owner, &store, now_unix_ms)?;
        Ok(Self::with_cache(store, owner, cache))
    }

    fn with_cache(store: Arc<Store>, owner: QueueId, cache: DedupCache) -> Arc<Self> {
        let state = Mutex::new(State { cache, dirty: None, last: 0, closed: false });
        Arc::new(ExchangeDedup { owner, store, state })
    }

    /// As [`DedupCache::check_and_insert`]. The section is the one in which the queues get the message, so that message and
    /// value are in the same round.
    ///
    /// # Returns
    /// The verdict, and the round a confirm waits for beside those of the queues, or 0: for a duplicate the one that made the
    /// message before it durable, or a later one.
    pub fn check_and_insert(
        self: &Arc<Self>,
        _section: &AtomicSection<'_>,
        now_unix_ms: u64,
        headers: Option<&[u8]>,
        persistent: bool,
    ) -> (Verdict, Round) {
        let mut state = self.state.lock();
        let verdict = state.cache.check_and_insert(now_unix_ms, headers, persistent);
        self.mark_dirty(&mut state);
        let round = match verdict {
            Verdict::Duplicate if state.cache.is_durable() => self.store.renewed(state.last),
            // Nothing tells in which round the message before was, so it is the one that is open now at the latest.
            Verdict::Duplicate if persistent => self.store.open_round(),
            Verdict::New(_) if persistent => state.last,
            _ => 0,
        };
        (verdict, round)
    }

    /// As [`DedupCache::withdraw`]; at best in the section of [`ExchangeDedup::check_and_insert`].
    pub fn withdraw(self: &Arc<Self>, admission: Admission) {
        let mut state = self.state.lock();
        state.cache.withdraw(admission);
        self.mark_dirty(&mut state);
    }

    /// As [`DedupCache::set_limits`].
    pub fn set_limits(&self, cache_size: u64, cache_ttl_ms: Option<u64>) {
        self.state.lock().cache.set_limits(cache_size, cache_ttl_ms);
    }

    /// Duplicates since the broker started.
    pub fn duplicates(&self) -> u64 {
        self.state.lock().cache.duplicates()
    }

    /// The id its notes are stored under.
    pub fn owner(&self) -> QueueId {
        self.owner
    }

    /// Writes nothing any more. To be called before the owner's notes are deleted with the exchange.
    pub fn close(&self) {
        self.state.lock().closed = true;
    }

    fn mark_dirty(self: &Arc<Self>, state: &mut State) {
        if state.dirty.is_none() && !state.closed && state.cache.has_news() {
            state.last = self.store.mark_dirty(self.clone());
            state.dirty = Some(state.last);
        }
    }
}

impl RoundSource for ExchangeDedup {
    fn drain(&self, round: &mut RoundBuilder) {
        let mut state = self.state.lock();
        state.dirty = None;
        if !state.closed {
            state.cache.drain_into(self.owner, round);
        }
    }

    fn round_ended(&self, _committed: bool) {} // a failed round is written after all, or none is
}
