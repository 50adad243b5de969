//! A connection for tests of queues and streams.

use super::port::{Address, Delivery, DeliveryWriter, Offer, Port};

/// A port that is only written to: its queue wakes nobody, and tells nobody that a consumer is gone.
pub trait TestPort: Send + Sync {
    /// [`DeliveryWriter::deliver`].
    fn deliver(&self, delivery: &Delivery<'_>) -> Offer;

    /// [`DeliveryWriter::answer_get`].
    fn answer_get(&self, _: &Delivery<'_>, _: u64) -> Offer {
        unreachable!("the test has no basic.get")
    }
}

struct Writer<'a, P>(&'a P);

impl<P: TestPort> DeliveryWriter for Writer<'_, P> {
    fn deliver(&mut self, delivery: &Delivery<'_>) -> Offer {
        self.0.deliver(delivery)
    }

    fn answer_get(&mut self, delivery: &Delivery<'_>, remaining: u64) -> Offer {
        self.0.answer_get(delivery, remaining)
    }
}

impl<P: TestPort> Port for P {
    fn with_writer(&self, write: &mut dyn FnMut(&mut dyn DeliveryWriter)) -> bool {
        write(&mut Writer(self));
        true
    }

    fn wake(&self) {}

    fn consumer_cancelled(&self, _: Address) {}

    fn consumer_timed_out(&self, _: Address) {}

    fn get_timed_out(&self, _: Address) {}
}
