//! Messages that wait for their time, in the order of it. Knows no exchanges and no queues: the owner says when a message
//! is due, and where it goes then.
//!
//! # Ownership
//! A [`Delays`] belongs to one owner, whose id it has. Its state is behind a mutex that nobody keeps while anything is
//! published. The owner's timer calls [`Delays::take_due`] when [`Delays::next_due`] has come.
//!
//! # Invariants
//! - D1: a message is handed out when it is due by the wall clock, never earlier, and in the order of [`DelayId`].
//! - D2: every message is a note of the owner, or about to become one with the round that [`Delays::push`] answered. One
//!   that is due before that round is written is never written.
//! - D3: what waits before the end of the [`Window`](window::Window) is in memory. What waits behind it is in the store,
//!   and in memory only until its round is durable.
//! - D4: within one [`AtomicSection`](crate::store::AtomicSection), taking a message and publishing it where it goes are in
//!   one round: after a crash it waits, or it is there.
//!
//! Transient messages are kept like persistent ones, as RabbitMQ's plugin keeps them: they survive a restart if their
//! owner does.
//!
//! # Why a window
//! Messages come in any order of their due times, and there may be millions. The store keeps them sorted, so memory
//! needs to hold only the next ones: those of the next [`Limits::lookahead_ms`], as far as they fit into
//! [`Limits::window_bytes`]. When half of that is used up, the store's reader thread brings more.
//!
//! # Units
//! Unix milliseconds of the wall clock; sizes in bytes.
//!
//! # Elsewhere
//! Who owns delays, and when it is called: `owner`. What is in memory: `window`. Keys, rounds and loading: `stored`.

mod owner;
mod stored;
#[cfg(test)]
mod tests;
mod window;

use std::{
    collections::{BTreeMap, HashSet},
    sync::{Arc, Weak},
};

use parking_lot::{Mutex, MutexGuard};

pub(super) use self::owner::{DelayOwner, Origin, RELEASE_BATCH, delays_of, with_released};
pub use self::window::{DelayId, Record};
use self::window::{Phase, Window};
use super::{
    memory::{MemoryBudget, Unwritten},
    message::Message,
    queue::record::stored_len,
};
use crate::{
    clock,
    store::{Durability, QueueId, Round, Store},
};

/// How much of what waits is in memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Bytes of messages in the window.
    pub window_bytes: usize,
    /// What is due later than this from now is not kept in memory.
    pub lookahead_ms: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { window_bytes: 2 << 20, lookahead_ms: 30_000 }
    }
}

/// What the window may hold while queues want memory, as a part of what it may hold otherwise.
const SCARCE_PART: usize = 16;

/// Told that [`Delays::next_due`] answers an earlier time than before. Called by whoever pushes and by the threads of
/// the store, with the delays unlocked; it must not block, nor keep its [`Delays`] alive.
pub type OnEarlier = Box<dyn Fn(u64) + Send + Sync>;

/// A waiting message, as [`Delays::list`] shows it.
#[derive(Clone, Debug)]
pub struct Delayed {
    pub id: DelayId,
    pub record: Record,
}

/// See the [module](self).
pub struct Delays {
    owner: QueueId,
    store: Arc<Store>,
    limits: Limits,
    on_earlier: OnEarlier,
    this: Weak<Delays>,
    state: Mutex<State>,
}

struct State {
    opening: Opening,
    closed: bool,
    window: Window,
    /// Waiting messages, in memory and in the store.
    count: u64,
    next_serial: u64,
    /// The round that takes what changed since the last drain.
    dirty: Option<Round>,
    unwritten: Unwritten,
    /// Pushed since the last drain. Those that are gone again are not in the window any more.
    puts: Vec<DelayId>,
    /// Taken or cancelled since the last drain, and written before.
    deletes: Vec<DelayId>,
    /// What the last drain took, until its round has ended.
    writing: Vec<DelayId>,
    deleting: Vec<DelayId>,
    clearing: Clearing,
    loading: Option<Loading>,
    loads: u64,
    /// After a failed read, not before this time.
    retry_unix_ms: u64,
    durability: Option<Durability>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Opening {
    /// What the store has is known.
    Done,
    /// The store may have something, and nobody looked yet.
    Unread,
}

/// Whether everything older is yet to be deleted from the store, and must not be read any more.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Clearing {
    No,
    Pending,
    Writing,
}

/// A read of the store that is under way.
struct Loading {
    number: u64,
    from: DelayId,
    /// When it was asked for.
    now_unix_ms: u64,
    /// Deleted ones that the read may still see.
    gone: HashSet<DelayId>,
}

impl std::fmt::Debug for Delays {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Delays").field("owner", &self.owner).finish_non_exhaustive()
    }
}

impl Delays {
    /// For an owner that is new.
    pub fn new(owner: QueueId, store: Arc<Store>, budget: Arc<MemoryBudget>, on_earlier: OnEarlier) -> Arc<Self> {
        Delays::with_limits(owner, store, budget, on_earlier, Opening::Done, Limits::default())
    }

    /// For an owner that may have had messages at the last shutdown. Reads the store when it is first used, and then one
    /// small note only.
    pub fn recovered(owner: QueueId, store: Arc<Store>, budget: Arc<MemoryBudget>, on_earlier: OnEarlier) -> Arc<Self> {
        Delays::with_limits(owner, store, budget, on_earlier, Opening::Unread, Limits::default())
    }

    fn with_limits(
        owner: QueueId,
        store: Arc<Store>,
        budget: Arc<MemoryBudget>,
        on_earlier: OnEarlier,
        opening: Opening,
        limits: Limits,
    ) -> Arc<Self> {
        let state = State {
            opening,
            closed: false,
            window: Window::new(budget.clone()),
            count: 0,
            next_serial: 0,
            dirty: None,
            unwritten: Unwritten::new(budget),
            puts: Vec::new(),
            deletes: Vec::new(),
            writing: Vec::new(),
            deleting: Vec::new(),
            clearing: Clearing::No,
            loading: None,
            loads: 0,
            retry_unix_ms: 0,
            durability: None,
        };
        let state = Mutex::new(state);
        Arc::new_cyclic(|this| Delays { owner, store, limits, on_earlier, this: this.clone(), state })
    }

    /// Says what the rounds of [`Delays::push`] wait for; `None` is what the broker is set to.
    pub fn set_durability(&self, durability: Option<Durability>) {
        self.state.lock().durability = durability;
    }

    /// Keeps a message until it is due; among those due at the same time, the earlier push comes first.
    ///
    /// # Returns
    /// The round that makes it durable. A message that need not be can be confirmed at once.
    ///
    /// # Cost
    /// Copies the message once, but for a shared body.
    pub fn push(&self, due_unix_ms: u64, message: &Message<'_>) -> Round {
        self.push_at(clock::now_unix_ms(), due_unix_ms, message)
    }

    fn push_at(&self, now_unix_ms: u64, due_unix_ms: u64, message: &Message<'_>) -> Round {
        let record = Record::of(message, now_unix_ms);
        let mut state = self.open();
        if state.closed {
            return 0;
        }
        let before = self.next_due_of(&state);
        let id = DelayId { due_unix_ms: due_unix_ms.min(DelayId::LAST_DUE), serial: state.next_serial };
        state.next_serial += 1;
        state.count += 1;
        state.window.insert(id, record, Phase::Unwritten);
        state.puts.push(id);
        state.unwritten.add(stored_len(message));
        self.trim(&mut state, now_unix_ms);
        let round = self.mark_dirty(&mut state);
        let after = self.next_due_of(&state);
        drop(state);
        self.tell_if_earlier(before, after);
        round
    }

    /// Hands out, in order, what is due at `now_unix_ms`, at most `max` messages, and removes them. Fewer than `max` does
    /// not mean that nothing else is due: what comes next may have to be read first. [`Delays::next_due`] tells.
    ///
    /// The removal is in the open round, so the caller holds a [`Store::atomic`] section around this and all that `each`
    /// does. `each` may push to these very delays. One caller at a time: two would mix up the order.
    ///
    /// # Returns
    /// How many were handed out or, being damaged, dropped.
    pub fn take_due(&self, now_unix_ms: u64, max: usize, each: &mut dyn FnMut(DelayId, &Message<'_>)) -> usize {
        let mut taken = Vec::new();
        {
            let mut state = self.open();
            while taken.len() < max
                && let Some((id, entry)) = state.window.pop_due(now_unix_ms)
            {
                state.removed(id, entry.phase);
                taken.push((id, entry.record));
            }
            if !taken.is_empty() {
                self.mark_dirty(&mut state);
            }
            self.load_if_wanted(&mut state, now_unix_ms);
        }
        for (id, record) in &taken {
            match record.message() {
                Some(message) => each(*id, &message),
                None => tracing::error!(owner = self.owner.0, ?id, "a delayed message is damaged and was dropped"),
            }
        }
        taken.len()
    }

    /// When [`Delays::take_due`] is to be called next; nothing as long as that is of no use. It is the due time of the
    /// first message or, if that is not in memory, earlier.
    pub fn next_due(&self) -> Option<u64> {
        let state = self.open();
        self.next_due_of(&state)
    }

    /// Messages that wait.
    pub fn len(&self) -> u64 {
        self.open().count
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of messages in memory.
    pub fn resident_bytes(&self) -> usize {
        self.state.lock().window.resident_bytes()
    }

    /// The first `limit` messages from `from` on, in order.
    ///
    /// # Cost
    /// Reads the store for what is not in memory, without keeping anyone else from pushing meanwhile.
    pub fn list(&self, from: DelayId, limit: usize) -> Vec<Delayed> {
        let (mut found, stored_from, gone) = {
            let state = self.open();
            let found: BTreeMap<_, _> =
                state.window.entries_from(from).take(limit).map(|(id, record)| (id, record.clone())).collect();
            let end = state.window.end();
            let enough = found.keys().nth(limit.wrapping_sub(1)).is_some_and(|last| *last < end);
            let stored = !enough && !state.closed && end != DelayId::END && state.clearing == Clearing::No;
            (found, stored.then_some(end.max(from)), state.gone(from))
        };
        if let Some(stored_from) = stored_from {
            self.read_stored(stored_from, limit.saturating_add(gone.len()), &mut |id, record| {
                if !gone.contains(&id) {
                    found.entry(id).or_insert(record);
                }
            });
        }
        found.into_iter().take(limit).map(|(id, record)| Delayed { id, record }).collect()
    }

    /// Removes a message before it is due. False if it does not wait, or not any more.
    pub fn cancel(&self, id: DelayId) -> bool {
        let mut state = self.open();
        let phase = match state.window.remove(id) {
            Some(entry) => entry.phase,
            None if id < state.window.end() || state.clearing != Clearing::No || state.closed => return false,
            None if state.deletes.contains(&id) || state.deleting.contains(&id) || !self.is_stored(id) => return false,
            None => Phase::Stored,
        };
        state.removed(id, phase);
        self.mark_dirty(&mut state);
        true
    }

    /// Removes all messages, and answers how many there were.
    pub fn clear(&self) -> u64 {
        let mut state = self.open();
        let count = std::mem::take(&mut state.count);
        if state.closed || (count == 0 && state.window.end() == DelayId::END) {
            return count;
        }
        if state.window.end() == DelayId::END && count <= MAX_SINGLE_DELETES {
            for (id, phase) in state.window.clear() {
                state.removed(id, phase);
            }
            state.count = 0;
        } else {
            state.window.clear();
            state.deletes.clear();
            state.clearing = Clearing::Pending;
        }
        state.loading = None;
        self.mark_dirty(&mut state);
        count
    }

    /// Lets go of everything in memory, and adds nothing to later rounds. Before [`Store::delete_queue`] for the owner,
    /// which deletes what is stored; or for good.
    pub fn close(&self) {
        let mut state = self.state.lock();
        state.closed = true;
        state.opening = Opening::Done;
        state.count = 0;
        state.loading = None;
        state.window.clear();
    }

    /// Locks the state; the first use of a recovered owner reads what there is.
    fn open(&self) -> MutexGuard<'_, State> {
        let mut state = self.state.lock();
        if state.opening == Opening::Unread {
            state.opening = Opening::Done;
            self.read_state(&mut state);
        }
        state
    }

    fn mark_dirty(&self, state: &mut State) -> Round {
        match (state.dirty, self.this.upgrade()) {
            (Some(round), _) => round,
            (None, Some(this)) => *state.dirty.insert(self.store.mark_dirty(this)),
            (None, None) => 0, // nobody has it any more
        }
    }

    /// Keeps the window within its limits.
    fn trim(&self, state: &mut State, now_unix_ms: u64) {
        let until = now_unix_ms.saturating_add(self.limits.lookahead_ms);
        state.window.trim(self.window_bytes(state), until);
    }

    fn window_bytes(&self, state: &State) -> usize {
        if state.window.is_memory_scarce() { self.limits.window_bytes / SCARCE_PART } else { self.limits.window_bytes }
    }

    /// When more of what is stored is wanted in memory, unless it is on its way.
    fn load_at(&self, state: &State) -> Option<u64> {
        let end = state.window.end();
        let wanted = end != DelayId::END
            && state.window.bytes() < self.window_bytes(state) / 2
            && state.loading.is_none()
            && state.clearing == Clearing::No
            && !state.closed;
        wanted.then(|| end.due_unix_ms.saturating_sub(self.limits.lookahead_ms / 2).max(state.retry_unix_ms))
    }

    fn next_due_of(&self, state: &State) -> Option<u64> {
        [state.window.first_due(), self.load_at(state)].into_iter().flatten().min()
    }

    fn tell_if_earlier(&self, before: Option<u64>, after: Option<u64>) {
        if let Some(after) = after
            && before.is_none_or(|before| after < before)
        {
            (self.on_earlier)(after);
        }
    }
}

/// Up to so many notes are deleted one by one when all are: a range deletion is dear.
const MAX_SINGLE_DELETES: u64 = 1_000;

impl State {
    /// Accounts for a message that left the window, or the store.
    fn removed(&mut self, id: DelayId, phase: Phase) {
        self.count = self.count.saturating_sub(1);
        if phase == Phase::Unwritten {
            return; // D2: its put finds it gone
        }
        self.deletes.push(id);
        if let Some(loading) = &mut self.loading
            && id >= loading.from
        {
            loading.gone.insert(id);
        }
    }

    /// Those from `from` on whose notes are deleted, but perhaps still there.
    fn gone(&self, from: DelayId) -> HashSet<DelayId> {
        self.deletes.iter().chain(&self.deleting).copied().filter(|id| *id >= from).collect()
    }
}
