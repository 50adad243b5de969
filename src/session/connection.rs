//! One connection's protocol state: bytes in, effects on the broker and bytes in the outbox out. No sockets.
//!
//! [`Session::feed`] runs a whole read to completion. It stops early only where the protocol has to wait: for a round
//! to become durable ([`Step::Await`]), or for good.

use std::{collections::VecDeque, net::IpAddr, sync::Arc};

use amq_protocol::{
    protocol::{AMQPClass, connection},
    types::FieldTable,
};

use super::{
    channel::{Channel, ChannelState},
    channel_map::ChannelMap,
    close::{CloseReason, Fault},
    events::Endpoints,
    handshake,
    outbox::{Outbox, Remains, SettleBatch},
};
use crate::{
    auth::{Authenticator, User, sasl::Mechanism},
    broker::{
        Broker, BrokerError, ConnectionId, Effects, Origin, Port, Queue, Round, Settlement, Vhost, arguments::QueueType,
    },
    model::Name,
    wire::{self, Scan, frame, hot},
};

/// Bytes published to queues whose consumers lag, after which the publisher is paused.
const CONGESTED_BYTES: usize = 128 << 10;

/// What a listener offers and refuses.
#[derive(Clone, Debug)]
pub struct SessionLimits {
    pub cluster_name: String,
    pub channel_max: u16,
    pub frame_max: u32,
    /// The frame limit until tuning is done.
    pub initial_frame_max: u32,
    /// Seconds; 0 is off.
    pub heartbeat_secs: u16,
    pub max_message_bytes: u64,
    /// Whether `basic.qos` with `global` sets a limit for the channel; else it is taken as one for each consumer, as
    /// RabbitMQ 4.3 does by default.
    pub permit_global_qos: bool,
}

/// Where the connection is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    AwaitStartOk,
    AwaitTuneOk,
    AwaitOpen,
    Running,
    /// `connection.close` was sent; only close and close-ok are looked at.
    Closing,
    /// What is in the outbox goes out, then the socket is closed.
    Closed,
}

/// What the client said of itself.
#[derive(Clone, Debug, Default)]
pub struct Client {
    pub name: String,
    /// All of it.
    pub properties: FieldTable,
    pub mechanism: Option<Mechanism>,
    pub blocked: bool,
    pub cancel_notify: bool,
    pub failure_close: bool,
}

/// How a [`Session::feed`] ended.
#[derive(Debug)]
pub enum Step {
    /// Everything whole was handled.
    More,
    /// Nothing more is handled before [`Session::wait`] has answered what waits for the disk.
    Await,
    /// Nothing more is handled before the client has read what waits for it: [`Session::is_clogged`].
    Drain,
    /// Flush the outbox and close the socket.
    Flush,
    /// Close the socket without a word; after a pause if `later`.
    Drop { later: bool, reason: String },
}

/// The answer of a method handler.
pub(super) enum Answer {
    None,
    Now(AMQPClass),
    /// Once the round is durable.
    After(Round, Option<AMQPClass>),
}

/// A body frame of which the beginning was handled.
#[derive(Clone, Copy)]
pub(super) struct PartialBody {
    pub(super) channel: u16,
    pub(super) remaining: usize,
}

/// A round that has to be durable before anything more is handled of a channel, and what is then said.
struct Awaiting {
    round: Round,
    channel: u16,
    answer: Option<AMQPClass>,
}

/// See [`Session::meanwhile`].
enum Meanwhile {
    GoOn,
    Wait,
    /// By a frame of so many bytes, which is done with.
    Interrupted(usize, Fault),
}

/// See the module.
pub struct Session {
    pub(super) broker: Arc<Broker>,
    pub(super) auth: Arc<Authenticator>,
    pub(super) limits: Arc<SessionLimits>,
    pub(super) outbox: Arc<Outbox>,
    pub(super) id: ConnectionId,
    pub(super) peer: IpAddr,
    pub(super) endpoints: Option<Endpoints>,
    /// Its name in events and traces, while it is open.
    pub(super) origin: Option<Arc<Origin>>,
    pub(super) phase: Phase,
    pub(super) client: Client,
    pub(super) user: Option<Arc<User>>,
    pub(super) user_name: Name,
    pub(super) vhost: Option<Arc<Vhost>>,
    pub(super) frame_max: u32,
    pub(super) channel_max: u16,
    pub(super) heartbeat_secs: u16,
    pub(super) channels: ChannelMap<Channel>,
    /// Queues that end with this connection.
    pub(super) exclusive: Vec<Arc<Queue>>,
    pub(super) effects: Effects,
    pub(super) settling: SettleBatch,
    /// Some channel was put into confirm mode, so that rounds matter.
    pub(super) confirms: bool,
    /// The latest round that something settled on this connection is in.
    pub(super) settled: Round,
    pub(super) partial: Option<PartialBody>,
    /// In the order in which they were asked for; at most one of each channel.
    awaiting: VecDeque<Awaiting>,
    /// Something was published since [`Session::take_published`].
    pub(super) published: bool,
    /// It has published what needs the disk while the store was failing.
    pub(super) needs_disk: bool,
    congested_bytes: usize,
    /// An answer has made the outbox large; set where one small method can ask for a lot.
    pub(super) clogged: bool,
    /// A frame had no end where it should be; what follows cannot be read.
    pub(super) framing_lost: bool,
}

/// What every connection's session is made from.
#[derive(Clone)]
pub struct ConnectionContext {
    pub broker: Arc<Broker>,
    pub auth: Arc<Authenticator>,
    pub limits: Arc<SessionLimits>,
}

impl ConnectionContext {
    /// A session for the connection `id` from `peer`.
    pub fn session(&self, id: u64, peer: IpAddr) -> Session {
        Session::new(self.broker.clone(), self.auth.clone(), self.limits.clone(), ConnectionId(id), peer)
    }
}

impl Session {
    /// A session whose client has sent the protocol header; `connection.start` is in the outbox.
    pub fn new(
        broker: Arc<Broker>,
        auth: Arc<Authenticator>,
        limits: Arc<SessionLimits>,
        id: ConnectionId,
        peer: IpAddr,
    ) -> Self {
        let outbox = Outbox::new(broker.clone());
        let session = Session {
            outbox,
            id,
            peer,
            endpoints: None,
            origin: None,
            phase: Phase::AwaitStartOk,
            client: Client::default(),
            user: None,
            user_name: "".into(),
            vhost: None,
            frame_max: limits.initial_frame_max,
            channel_max: limits.channel_max,
            heartbeat_secs: 0,
            channels: ChannelMap::default(),
            exclusive: Vec::new(),
            effects: Effects { on_behalf_of: Some(id), ..Effects::default() },
            settling: SettleBatch::default(),
            confirms: false,
            settled: 0,
            partial: None,
            awaiting: VecDeque::new(),
            published: false,
            needs_disk: false,
            congested_bytes: 0,
            clogged: false,
            framing_lost: false,
            broker,
            auth,
            limits,
        };
        session.reply(0, &handshake::start(&session.limits));
        session
    }

    /// Answers what waits for the disk, each when its round is durable or has failed.
    pub async fn wait(&mut self) {
        while let Some(round) = self.awaiting.front().map(|awaiting| awaiting.round) {
            let outcome = self.broker.durable(round).await;
            self.resume(outcome);
        }
        self.outbox.wake_if_needed();
    }

    /// Whether tuning is done.
    pub fn is_tuned(&self) -> bool {
        self.user.is_some() && self.frame_max != self.limits.initial_frame_max || self.vhost.is_some()
    }

    /// Whether frames can no longer be told apart, so that no answer can be waited for.
    pub fn has_lost_framing(&self) -> bool {
        self.framing_lost
    }

    /// Whether a publisher has to wait for the store to take what it is ahead by, or for paging to catch up.
    pub fn must_hold_back(&self) -> bool {
        self.broker.memory().must_hold_back()
    }

    /// The alarm in force, as `connection.blocked` names it.
    pub fn alarm(&self) -> Option<String> {
        self.broker.alarms().reason(self.needs_disk)
    }

    /// Tells the client that its publishes wait, if it understands that.
    pub fn tell_blocked(&self, reason: &str) {
        tracing::warn!(peer = %self.peer, reason, "publisher blocked");
        if self.client.blocked {
            let reason = amq_protocol::types::ShortString::try_new(reason).unwrap_or_default();
            self.reply(0, &AMQPClass::Connection(connection::AMQPMethod::Blocked(connection::Blocked { reason })));
            self.outbox.wake_if_needed();
        }
    }

    /// Ends what [`Session::tell_blocked`] began.
    pub fn tell_unblocked(&self) {
        if self.client.blocked {
            self.reply(0, &AMQPClass::Connection(connection::AMQPMethod::Unblocked(connection::Unblocked {})));
            self.outbox.wake_if_needed();
        }
    }

    pub fn outbox(&self) -> &Arc<Outbox> {
        &self.outbox
    }

    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// The negotiated heartbeat in seconds; 0 is off.
    pub fn heartbeat_secs(&self) -> u16 {
        self.heartbeat_secs
    }

    /// Whether so much waits for the client that nothing more should be read from it.
    pub fn is_clogged(&self) -> bool {
        self.outbox.is_clogged()
    }

    /// Stops the feed if what the last answer has added is too much.
    pub(super) fn check_clogged(&mut self) {
        self.clogged = self.is_clogged();
    }

    /// Whether something was published since the last call.
    pub fn take_published(&mut self) -> bool {
        self.needs_disk &= self.broker.is_store_failing();
        std::mem::take(&mut self.published)
    }

    /// The connection of a consumer that was given more since the last call than its writer keeps up with, if it is published
    /// to from here: who consumes and is behind himself goes on reading.
    pub fn take_behind(&mut self) -> Option<Arc<dyn Port>> {
        let own = Arc::as_ptr(&self.outbox);
        self.effects.behind.take().filter(|port| self.published && !std::ptr::addr_eq(Arc::as_ptr(port), own))
    }

    /// Whether enough was published to queues whose consumers do not keep up that the publisher should pause.
    /// `read_bytes` is what came in since the last call; a publisher of few bytes is never paused for them.
    pub fn take_congested(&mut self, read_bytes: usize) -> bool {
        if !std::mem::take(&mut self.effects.congested) {
            return false;
        }
        self.congested_bytes += read_bytes;
        let pause = self.congested_bytes >= CONGESTED_BYTES;
        if pause {
            self.congested_bytes = 0;
        }
        pause
    }

    pub(super) fn reply(&self, channel: u16, class: &AMQPClass) {
        self.outbox.push_method(channel, class);
    }

    /// Handles the whole frames at the start of `input`; answers how many bytes are done with.
    pub fn feed(&mut self, input: &[u8]) -> (usize, Step) {
        let mut at = 0;
        let step = loop {
            match self.meanwhile(&input[at..]) {
                Meanwhile::GoOn => {}
                Meanwhile::Wait => break Step::Await,
                Meanwhile::Interrupted(used, fault) => {
                    at += used;
                    self.fail(0, fault);
                    continue;
                }
            }
            if self.phase == Phase::Closed {
                break Step::Flush;
            }
            if std::mem::take(&mut self.clogged) {
                break Step::Drain;
            }
            if self.framing_lost {
                at = input.len();
                break Step::More;
            }
            let mut used = 0;
            let handled = self.next(&input[at..], &mut used);
            at += used;
            match handled {
                Ok(()) if used == 0 => break Step::More,
                Ok(()) => {}
                Err((channel, fault)) => {
                    if let Some(step) = self.fail(channel, fault) {
                        break step;
                    }
                }
            }
        };
        self.finish_batch();
        (at, step)
    }

    /// What the next frame may do while answers wait for the disk: those of other channels are handled, so that definitions
    /// on many channels share a sync; a method that follows a `tx.commit` on its channel before that is answered is a fault.
    #[inline]
    fn meanwhile(&self, input: &[u8]) -> Meanwhile {
        if self.awaiting.is_empty() {
            return Meanwhile::GoOn;
        }
        let Scan::Frame(frame) = wire::scan(input, self.frame_max) else { return Meanwhile::Wait };
        match self.awaiting.iter().find(|awaiting| awaiting.channel == frame.channel) {
            None if frame.channel == 0 || self.partial.is_some() => Meanwhile::Wait,
            None => Meanwhile::GoOn,
            Some(Awaiting { answer: Some(AMQPClass::Tx(_)), .. }) if frame.kind == frame::METHOD => {
                let Some(id) = hot::method_id(frame.payload) else { return Meanwhile::Wait };
                let fault = Fault::new(504, "unexpected command while processing 'tx.commit'");
                Meanwhile::Interrupted(frame.wire_len(), fault.at((id >> 16) as u16, id as u16))
            }
            Some(_) => Meanwhile::Wait,
        }
    }

    /// The first of the rounds that answers wait for is durable, or it failed.
    fn resume(&mut self, outcome: Result<(), BrokerError>) {
        let Some(Awaiting { channel, answer, .. }) = self.awaiting.pop_front() else { return };
        match (outcome, answer) {
            (Ok(()), Some(class)) => self.reply(channel, &class),
            (Ok(()), None) => {}
            (Err(error), _) => {
                let fault = Fault::new(541, error.to_string());
                let _ = self.fail(channel, fault);
            }
        }
    }

    /// Everything that was gathered while frames were handled goes where it belongs.
    fn finish_batch(&mut self) {
        self.carry_out();
        self.outbox.wake_if_needed();
    }

    pub(super) fn carry_out(&mut self) {
        if !self.effects.is_empty() {
            self.broker.carry_out(&mut self.effects);
        }
    }

    pub(super) fn on_method_while_closing(&mut self, class: &AMQPClass) {
        use connection::AMQPMethod as C;
        match class {
            AMQPClass::Connection(C::Close(_)) => {
                self.reply(0, &AMQPClass::Connection(C::CloseOk(connection::CloseOk {})));
                self.phase = Phase::Closed;
            }
            AMQPClass::Connection(C::CloseOk(_)) => self.phase = Phase::Closed,
            _ => {}
        }
    }

    /// Sends an answer now, or notes the round it has to wait for.
    pub(super) fn answer(&mut self, channel: u16, answer: Answer) {
        match answer {
            Answer::None => {}
            Answer::Now(class) => self.reply(channel, &class),
            Answer::After(round, answer) => self.await_round(channel, round, answer),
        }
    }

    fn await_round(&mut self, channel: u16, round: Round, answer: Option<AMQPClass>) {
        if round > self.broker.watermark() || self.broker.is_failed(round) {
            self.awaiting.push_back(Awaiting { round, channel, answer });
        } else if let Some(class) = answer {
            self.reply(channel, &class);
        }
    }

    /// Does what a fault asks for; answers how the feed ends, if it does.
    fn fail(&mut self, number: u16, fault: Fault) -> Option<Step> {
        match fault {
            Fault::Channel(reason) if self.channels.get(number).is_some() => {
                tracing::warn!(peer = %self.peer, channel = number, code = reason.code, text = reason.text, "channel error");
                self.release_channel(number);
                self.reply(number, &reason.channel_close());
                if let Some(channel) = self.channels.get_mut(number) {
                    channel.state = ChannelState::Closing;
                }
                None
            }
            Fault::Channel(reason) | Fault::Connection(reason) if self.is_silent() => {
                Some(Step::Drop { later: true, reason: reason.text })
            }
            Fault::Channel(reason) | Fault::Connection(reason) => {
                self.close(&reason);
                None
            }
            Fault::Drop(reason) => Some(Step::Drop { later: false, reason }),
            Fault::DropLater(reason) => Some(Step::Drop { later: true, reason }),
        }
    }

    /// Closes the channels on which a consumer did not settle in time, as RabbitMQ does with clients that cannot be told of a
    /// cancelled consumer.
    pub fn close_timed_out_channels(&mut self) {
        for number in self.outbox.take_timed_out() {
            if self.channels.get(number).is_some_and(|channel| channel.state == ChannelState::Open) {
                let text = format!(
                    "delivery acknowledgement on channel {number} timed out. Timeout value used: -1 ms. This timeout value can be configured, see consumers doc guide to learn more"
                );
                let _ = self.fail(number, Fault::new(406, text));
            }
        }
        self.outbox.wake_if_needed();
    }

    /// Whether faults are not told to the peer yet: before it has logged in, all but the refusal itself.
    fn is_silent(&self) -> bool {
        self.phase == Phase::AwaitStartOk && self.framing_lost || self.phase == Phase::AwaitTuneOk
    }

    /// Closes the connection from this side: channels end, exclusive queues go, `connection.close` is sent.
    pub fn close(&mut self, reason: &CloseReason) {
        if matches!(self.phase, Phase::Closing | Phase::Closed) {
            return;
        }
        tracing::warn!(peer = %self.peer, code = reason.code, text = reason.text, "closing connection");
        self.awaiting.clear();
        self.release();
        self.reply(0, &reason.connection_close());
        self.phase = Phase::Closing;
        self.outbox.wake_if_needed();
    }

    /// Ends a channel's deliveries, consumers and transaction; its unacked messages go back. Its number stays taken.
    pub(super) fn release_channel(&mut self, number: u16) {
        if self.channels.get(number).is_some_and(|channel| channel.state == ChannelState::Open) {
            self.note_channel_closed(number);
        }
        self.undo_settlements(number);
        let remains = self.outbox.close_channel(number);
        if let Some(channel) = self.channels.get_mut(number) {
            channel.release(&self.broker);
        }
        self.return_remains(remains);
    }

    fn return_remains(&mut self, remains: Remains) {
        // What comes back has to be there before the next consumer takes over.
        for (queue, consumer, deliveries) in remains.unacked {
            if queue.traits.queue_type == QueueType::Stream {
                continue; // to which nothing comes back, and which would take it for handled
            }
            queue.settle(consumer, &deliveries, Settlement::Failed, &mut self.effects);
        }
        for (queue, consumer) in remains.consumers {
            queue.cancel(consumer, &mut self.effects);
        }
        self.carry_out();
    }

    /// Ends everything the connection has on the broker. Called when it closes, however it does; idempotent.
    pub fn release(&mut self) {
        let numbers: Vec<u16> = self.channels.iter().map(|(number, _)| number).collect();
        numbers.into_iter().for_each(|number| self.undo_settlements(number));
        self.note_channels_closed();
        for (_, channel) in self.channels.iter_mut() {
            channel.release(&self.broker);
        }
        for remains in self.outbox.close_channels() {
            self.return_remains(remains);
        }
        self.effects.on_behalf_of = None; // nobody deletes them
        for queue in std::mem::take(&mut self.exclusive) {
            if let Some(vhost) = &self.vhost {
                // Cannot be refused: nothing is checked.
                let _ = vhost.delete_queue(&queue, &mut self.effects, |_| Ok(()));
            }
        }
        self.carry_out();
        self.note_closed();
    }
}
