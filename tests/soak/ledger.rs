//! What became of every message: published, confirmed, done with. Exactly once, except where a connection was cut with
//! something on its way.

use std::{
    collections::{HashMap, HashSet},
    sync::Mutex,
};

use super::facts::Id;

/// Complaints that are kept; one fault can bring forth thousands.
const MOST_ERRORS: usize = 50;

/// Where a message stands that is not done with on both sides.
#[derive(Clone, Copy, Debug, Default)]
struct Standing {
    confirmed: bool,
    /// The publisher's connection was cut before it could learn whether the message is there.
    in_doubt: bool,
    /// A consumer has acknowledged it.
    done: bool,
}

#[derive(Default)]
struct Pages {
    open: HashMap<Id, Standing>,
    /// Done with on a connection that was cut before the broker need have heard of it.
    may_repeat: HashSet<Id>,
    totals: Totals,
    errors: Vec<String>,
}

#[derive(Clone, Copy, Debug, Default)]
pub struct Totals {
    pub sent: u64,
    pub confirmed: u64,
    pub done: u64,
    /// Came again after a cut.
    pub repeated: u64,
}

#[derive(Default)]
pub struct Ledger {
    pages: Mutex<Pages>,
}

impl Pages {
    fn complain(&mut self, text: String) {
        if self.errors.len() < MOST_ERRORS {
            self.errors.push(text);
        }
    }
}

impl Ledger {
    /// Its publish is about to be sent.
    pub fn sending(&self, id: Id) {
        let mut pages = self.pages.lock().unwrap();
        pages.totals.sent += 1;
        pages.open.insert(id, Standing::default());
    }

    pub fn confirmed(&self, id: Id) {
        let mut pages = self.pages.lock().unwrap();
        pages.totals.confirmed += 1;
        match pages.open.get_mut(&id) {
            Some(standing) if standing.done => drop(pages.open.remove(&id)),
            Some(standing) => standing.confirmed = true,
            None => pages.complain(format!("message {id:x} was confirmed twice")),
        }
    }

    /// The connection was cut before an answer.
    pub fn in_doubt(&self, id: Id) {
        let mut pages = self.pages.lock().unwrap();
        match pages.open.get_mut(&id) {
            Some(standing) if standing.done => drop(pages.open.remove(&id)),
            Some(standing) => standing.in_doubt = true,
            None => pages.complain(format!("message {id:x} was done with before its confirm, twice")),
        }
    }

    /// It was never published after all, and must never come.
    pub fn withdrawn(&self, id: Id) {
        let mut pages = self.pages.lock().unwrap();
        pages.totals.sent -= 1;
        if pages.open.remove(&id).is_some_and(|standing| standing.done) {
            pages.complain(format!("message {id:x} was delivered, and rolled back"));
        }
    }

    /// A consumer is done with it.
    pub fn done(&self, id: Id, redelivered: bool) {
        let mut guard = self.pages.lock().unwrap();
        let pages = &mut *guard;
        match pages.open.get_mut(&id) {
            Some(standing) if !standing.done => {
                standing.done = true;
                if standing.confirmed || standing.in_doubt {
                    pages.open.remove(&id);
                }
                pages.totals.done += 1;
            }
            _ if pages.may_repeat.remove(&id) => {
                pages.totals.repeated += 1;
                if !redelivered {
                    pages.complain(format!("message {id:x} came again, and does not say so"));
                }
            }
            _ => pages.complain(format!("message {id:x} came again, or was never published")),
        }
    }

    /// These were done with on a connection that is now cut.
    pub fn may_repeat(&self, ids: impl IntoIterator<Item = Id>) {
        self.pages.lock().unwrap().may_repeat.extend(ids);
    }

    pub fn complain(&self, text: String) {
        self.pages.lock().unwrap().complain(text);
    }

    pub fn totals(&self) -> Totals {
        self.pages.lock().unwrap().totals
    }

    /// Messages that have to come still.
    pub fn outstanding(&self) -> usize {
        let pages = self.pages.lock().unwrap();
        pages.open.values().filter(|standing| !standing.in_doubt).count()
    }

    pub fn errors(&self) -> Vec<String> {
        self.pages.lock().unwrap().errors.clone()
    }

    /// When everything is drained: what is missing.
    pub fn settle(&self) {
        let mut pages = self.pages.lock().unwrap();
        let open = std::mem::take(&mut pages.open);
        for (id, standing) in open.into_iter().filter(|(_, standing)| !standing.in_doubt) {
            pages.complain(format!("message {id:x} is LOST: {standing:?}"));
        }
    }
}
