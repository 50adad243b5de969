//! The methods off the hot path: one file per class, the dispatch and the small classes here.

mod basic;
mod exchange;
mod queue;

use amq_protocol::protocol::{AMQPClass, access, channel, confirm, connection};

use super::{
    channel::{Channel, ChannelState, Mode},
    close::Fault,
    connection::{Answer, Phase, Session},
};
use crate::{
    auth::{Access, Resource},
    model::Name,
    wire::{hot, method},
};

/// A random name as RabbitMQ makes them: a prefix and 16 bytes in URL-safe base64.
fn generated_name(prefix: &str) -> String {
    use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
    let mut bytes = [0; 16];
    if getrandom::fill(&mut bytes).is_err() {
        tracing::error!("no randomness from the system; generated names may repeat");
    }
    format!("{prefix}{}", URL_SAFE_NO_PAD.encode(bytes))
}

impl Session {
    /// Handles a method of the running connection.
    pub(super) fn on_method(&mut self, number: u16, payload: &[u8], class: AMQPClass) -> Result<(), Fault> {
        let (class_id, method_id) = (class.get_amqp_class_id(), class.get_amqp_method_id());
        let handled =
            if number == 0 { self.on_connection_method(class) } else { self.on_channel_method(number, payload, class) };
        handled.map_err(|fault| fault.at(class_id, method_id)).map_err(|fault| match fault {
            // RabbitMQ counts channels outside of any method.
            Fault::Connection(reason) if (class_id, method_id, reason.code) == (20, 10, 530) => {
                Fault::Connection(reason.without_method())
            }
            other => other,
        })
    }

    fn on_connection_method(&mut self, class: AMQPClass) -> Result<(), Fault> {
        use connection::AMQPMethod as C;
        match class {
            AMQPClass::Connection(C::Close(_)) => {
                self.release();
                self.reply(0, &AMQPClass::Connection(C::CloseOk(connection::CloseOk {})));
                self.phase = Phase::Closed;
                Ok(())
            }
            AMQPClass::Connection(C::UpdateSecret(_)) => {
                // The internal user database has no secrets that expire: accepted, as in RabbitMQ.
                self.reply(0, &AMQPClass::Connection(C::UpdateSecretOk(connection::UpdateSecretOk {})));
                Ok(())
            }
            _ => Err(Fault::new(504, "unexpected method in connection state running")),
        }
    }

    fn on_channel_method(&mut self, number: u16, payload: &[u8], class: AMQPClass) -> Result<(), Fault> {
        use channel::AMQPMethod as Ch;
        let state = self.channels.get(number).map(|channel| channel.state);
        match (&class, state) {
            (AMQPClass::Connection(_), _) => return Err(Fault::new(503, "unimplemented method")),
            (AMQPClass::Channel(Ch::Open(_)), None) => return self.open_channel(number),
            (AMQPClass::Channel(Ch::Open(_)), Some(_)) => return Err(Fault::new(504, "second 'channel.open' seen")),
            (_, None) => return Err(Fault::new(504, "expected 'channel.open'")),
            (AMQPClass::Channel(Ch::Close(_)), Some(ChannelState::Open)) => {
                self.release_channel(number);
                self.channels.remove(number);
                self.reply(number, &AMQPClass::Channel(Ch::CloseOk(channel::CloseOk {})));
                return Ok(());
            }
            (AMQPClass::Channel(Ch::Close(_)), Some(ChannelState::Closing)) => {
                self.reply(number, &AMQPClass::Channel(Ch::CloseOk(channel::CloseOk {})));
                return Ok(());
            }
            (AMQPClass::Channel(Ch::CloseOk(_)), Some(ChannelState::Closing)) => {
                self.channels.remove(number);
                return Ok(());
            }
            (AMQPClass::Basic(_), Some(ChannelState::Closing))
                if hot::method_id(payload) == Some(hot::BASIC_PUBLISH) =>
            {
                return self.on_publish_method(number, payload); // its content has to be read past
            }
            (_, Some(ChannelState::Closing)) => return Ok(()),
            _ => {}
        }
        let answer = self.dispatch(number, payload, class)?;
        self.answer(number, answer);
        Ok(())
    }

    fn dispatch(&mut self, number: u16, payload: &[u8], class: AMQPClass) -> Result<Answer, Fault> {
        match class {
            AMQPClass::Basic(method) => self.on_basic(number, payload, method),
            AMQPClass::Queue(method) => self.on_queue(number, method),
            AMQPClass::Exchange(method) => self.on_exchange(method),
            AMQPClass::Tx(method) => self.on_tx(number, &method),
            AMQPClass::Confirm(confirm::AMQPMethod::Select(select)) => self.confirm_select(number, select.nowait),
            AMQPClass::Channel(channel::AMQPMethod::Flow(flow)) if flow.active => {
                Ok(Answer::Now(AMQPClass::Channel(channel::AMQPMethod::FlowOk(channel::FlowOk { active: true }))))
            }
            AMQPClass::Channel(channel::AMQPMethod::Flow(_)) => Err(Fault::new(540, "active=false")),
            AMQPClass::Access(access::AMQPMethod::Request(_)) => {
                // `amq-protocol` does not write the ticket, which is the whole answer.
                let mut frame = Vec::new();
                method::write_raw(&mut frame, number, &[0, 30, 0, 11, 0, 1]);
                self.outbox.push(&frame);
                Ok(Answer::None)
            }
            _ => Err(Fault::new(503, "unimplemented method")),
        }
    }

    fn open_channel(&mut self, number: u16) -> Result<(), Fault> {
        let open = self.channels.len();
        let max = usize::from(self.channel_max);
        if open >= max {
            return Err(Fault::new(
                530,
                format!("number of channels opened ({open}) has reached the negotiated channel_max ({max})"),
            ));
        }
        self.channels.insert(number, Channel::default());
        self.outbox.open_channel(number);
        self.note_channel_created(number);
        self.reply(number, &AMQPClass::Channel(channel::AMQPMethod::OpenOk(channel::OpenOk {})));
        Ok(())
    }

    fn confirm_select(&mut self, number: u16, no_wait: bool) -> Result<Answer, Fault> {
        let Some(channel) = self.channels.get_mut(number) else { return Ok(Answer::None) };
        match channel.mode {
            Mode::Tx(_) => return Err(Fault::new(406, "cannot switch from tx to confirm mode")),
            Mode::Plain => channel.mode = Mode::Confirm { published: 0 },
            Mode::Confirm { .. } => {}
        }
        if !std::mem::replace(&mut self.confirms, true) {
            // What was acknowledged so far is in no later round.
            self.settled = self.broker.open_round();
        }
        Ok(unless(no_wait, AMQPClass::Confirm(confirm::AMQPMethod::SelectOk(confirm::SelectOk {}))))
    }

    /// Checks a permission on an object of the connection's vhost.
    ///
    /// # Errors
    /// 403 with RabbitMQ's text.
    fn check(&self, access: Access, resource: Resource, name: &str) -> Result<(), Fault> {
        let vhost = self.vhost.as_ref().map_or("", |vhost| &vhost.name);
        self.auth.check(&self.user_name, vhost, access, resource, name).map_err(Fault::from)
    }

    /// Checks for any one permission, which is all a passive declaration needs.
    fn check_any(&self, resource: Resource, name: &str) -> Result<(), Fault> {
        [Access::Read, Access::Write]
            .iter()
            .find_map(|&access| self.check(access, resource, name).ok())
            .map_or_else(|| self.check(Access::Configure, resource, name), Ok)
    }

    /// The queue a method means: the named one, or with an empty name the channel's last declared one.
    fn queue_name(&self, number: u16, name: &str) -> Result<Name, Fault> {
        if !name.is_empty() {
            return Ok(crate::model::strip_cr_lf(name).into());
        }
        let last = self.channels.get(number).and_then(|channel| channel.last_queue.clone());
        last.ok_or_else(|| Fault::new(404, "no previously declared queue"))
    }
}

/// The answer, unless the client asked for none.
fn unless(no_wait: bool, class: AMQPClass) -> Answer {
    if no_wait { Answer::None } else { Answer::Now(class) }
}
