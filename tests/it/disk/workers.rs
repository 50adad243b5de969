//! Clients that remember what they were told.

use std::collections::BTreeSet;

use amq_protocol::protocol::{AMQPClass, basic, connection};

use crate::support::{Login, Peer, program::Program};

/// Messages a publisher has under way.
const WINDOW: usize = 32;
/// Of each message, so that a small volume is full soon.
const BODY_BYTES: usize = 16 << 10;

/// A body that says its number and cannot be compressed.
fn body_of(number: u64) -> Vec<u8> {
    let mut body = number.to_be_bytes().to_vec();
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    while body.len() < BODY_BYTES {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        body.extend_from_slice(&state.to_le_bytes());
    }
    body
}

fn number_of(body: &[u8]) -> u64 {
    let number = u64::from_be_bytes(body[..8].try_into().unwrap());
    assert!(body == body_of(number), "message {number} is damaged");
    number
}

/// Publishes numbered messages with confirms, and notes what it is told.
pub struct Publisher {
    peer: Peer,
    /// The number of its first message.
    pub first: u64,
    sent: u64,
    outstanding: BTreeSet<u64>,
    pub confirmed: BTreeSet<u64>,
    pub refused: BTreeSet<u64>,
    /// Why it is to publish nothing.
    pub blocked_for: Option<String>,
}

impl std::fmt::Debug for Publisher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let counts = (self.sent, self.confirmed.len(), self.refused.len(), &self.blocked_for);
        write!(f, "(sent, confirmed, refused, blocked for) = {counts:?}")
    }
}

impl Publisher {
    pub async fn connect(program: &Program) -> Publisher {
        let mut peer = Login::default().open(program.address).await;
        peer.open_channel(1).await;
        peer.select_confirms(1).await;
        let (outstanding, confirmed, refused) = Default::default();
        Publisher { peer, first: 1, sent: 0, outstanding, confirmed, refused, blocked_for: None }
    }

    /// The number of the last message.
    pub fn last(&self) -> u64 {
        self.first + self.sent - 1
    }

    async fn send(&mut self) {
        let number = self.first + self.sent;
        self.peer.publish_persistent(1, "q", body_of(number)).await;
        self.sent += 1;
        self.outstanding.insert(number);
    }

    /// Takes in what the broker says next.
    async fn listen(&mut self) {
        match self.peer.method_of_any_channel().await {
            AMQPClass::Basic(basic::AMQPMethod::Ack(ack)) => self.answered(ack.delivery_tag, ack.multiple, true),
            AMQPClass::Basic(basic::AMQPMethod::Nack(nack)) => self.answered(nack.delivery_tag, nack.multiple, false),
            AMQPClass::Connection(connection::AMQPMethod::Blocked(blocked)) => {
                assert_eq!(self.blocked_for.replace(blocked.reason.to_string()), None, "blocked twice");
            }
            AMQPClass::Connection(connection::AMQPMethod::Unblocked(_)) => {
                assert!(self.blocked_for.take().is_some(), "unblocked without a cause");
            }
            other => panic!("{other:?}"),
        }
    }

    fn answered(&mut self, tag: u64, multiple: bool, confirmed: bool) {
        let last = self.first + tag - 1;
        let answered: Vec<u64> =
            self.outstanding.iter().copied().filter(|number| *number == last || (multiple && *number < last)).collect();
        assert!(!answered.is_empty(), "{tag} was answered before");
        self.outstanding.retain(|number| !answered.contains(number));
        if confirmed { &mut self.confirmed } else { &mut self.refused }.extend(answered);
    }

    /// Sends so many, waiting for answers when there is too much under way.
    pub async fn publish(&mut self, count: u64) {
        for _ in 0..count {
            while self.outstanding.len() >= WINDOW {
                self.listen().await;
            }
            self.send().await;
        }
    }

    /// Publishes without an end, until it is told to stop.
    pub async fn publish_until_blocked(&mut self) {
        while self.blocked_for.is_none() {
            match self.outstanding.len() {
                ..WINDOW => self.send().await,
                _ => self.listen().await,
            }
        }
    }

    pub async fn wait_until_blocked(&mut self) {
        while self.blocked_for.is_none() {
            self.listen().await;
        }
    }

    pub async fn wait_until_unblocked(&mut self) {
        while self.blocked_for.is_some() {
            self.listen().await;
        }
    }

    /// Waits for all answers.
    pub async fn settle(&mut self) {
        while !self.outstanding.is_empty() {
            self.listen().await;
        }
    }
}

/// Takes so many messages and acknowledges them one by one, or all there are. Answers their numbers. All acknowledgements
/// were handled when it returns.
pub async fn work_off(program: &Program, count: usize) -> Vec<u64> {
    let mut peer = Login::default().open(program.address).await;
    peer.open_channel(1).await;
    let mut numbers = Vec::new();
    while numbers.len() < count {
        let Some(message) = peer.get(1, "q", false).await else {
            assert_eq!(count, usize::MAX, "the queue is empty");
            break;
        };
        peer.ack(1, message.tag, false).await;
        numbers.push(number_of(&message.body));
    }
    peer.nothing_more(1).await;
    peer.close().await;
    numbers
}

/// Ready messages.
pub async fn depth(program: &Program, queue: &str) -> u64 {
    let mut peer = Login::default().open(program.address).await;
    peer.open_channel(1).await;
    let (ready, _) = peer.depth(1, queue).await;
    peer.close().await;
    ready.into()
}

/// What all clients know together.
#[derive(Debug, Default)]
pub struct Facts {
    confirmed: BTreeSet<u64>,
    /// Nothing else was ever sent.
    sent: BTreeSet<u64>,
    /// And something was confirmed after it.
    pub acknowledged: BTreeSet<u64>,
}

impl Facts {
    pub fn take_in(&mut self, publisher: &Publisher) {
        self.confirmed.extend(&publisher.confirmed);
        self.sent.extend(publisher.first..publisher.first + publisher.sent);
    }

    /// Compares with what a broker has after a kill.
    pub fn check(&self, found: &[u64]) {
        let distinct: BTreeSet<u64> = found.iter().copied().collect();
        assert_eq!(distinct.len(), found.len(), "something is there twice");
        let missing: Vec<_> = self.confirmed.iter().filter(|number| !distinct.contains(number)).collect();
        let missing: Vec<_> = missing.into_iter().filter(|number| !self.acknowledged.contains(number)).collect();
        assert!(missing.is_empty(), "confirmed and not there: {missing:?}");
        let back: Vec<_> = distinct.intersection(&self.acknowledged).collect();
        assert!(back.is_empty(), "acknowledged and there again: {back:?}");
        assert!(distinct.is_subset(&self.sent), "nobody has sent these: {:?}", distinct.difference(&self.sent));
    }
}
