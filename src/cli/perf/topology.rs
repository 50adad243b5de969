//! The queues and the exchange of a run: declared and bound before it, deleted after it.
//!
//! Declarations are sent many at a time, so that a thousand queues are not a thousand round trips.

use super::connection::{Call, Connection};
use super::error::PerfError;
use super::fields;
use super::options::Plan;
use super::wire::{ArgumentReader, Arguments, method};

const DECLARE_PASSIVE: u8 = 1;
const DECLARE_DURABLE: u8 = 1 << 1;
const DECLARE_EXCLUSIVE: u8 = 1 << 2;
const DECLARE_AUTO_DELETE: u8 = 1 << 3;
/// Queues per round trip.
const QUEUES_AT_ONCE: usize = 100;

/// The queues as they were found or made, and the connection that will delete them.
#[derive(Debug)]
pub(super) struct Topology {
    connection: Connection,
    /// Messages that were in the consumers' queues before the run.
    pub(super) ready_before: u64,
}

impl Topology {
    /// Declares the plan's exchange, and declares and binds its queues; exclusive ones are left to their consumers.
    pub(super) fn set_up(plan: &Plan) -> Result<Self, PerfError> {
        let mut connection = Connection::open(&plan.uri)?;
        if let Some(kind) = &plan.exchange.declared_type {
            declare_exchange(&mut connection, plan, kind)?;
        }
        let mut ready = Vec::new();
        if !plan.queues.exclusive {
            for names in plan.queues.names.chunks(QUEUES_AT_ONCE) {
                ready.extend(declare(&mut connection, plan, names)?);
            }
        }
        // What nobody consumes is no concern, nor is what a stream keeps anyway.
        let relevant = if plan.queues.are_streams() { 0 } else { plan.consumer_count };
        Ok(Self { connection, ready_before: ready.into_iter().take(relevant).map(u64::from).sum() })
    }

    /// Deletes what was declared, unless it is to stay.
    pub(super) fn tear_down(mut self, plan: &Plan) -> Result<(), PerfError> {
        let result = if plan.queues.keep { Ok(()) } else { self.delete(plan) };
        let left = self.connection.finish(result.as_ref().err());
        result.and(left)
    }

    fn delete(&mut self, plan: &Plan) -> Result<(), PerfError> {
        if !plan.queues.predeclared && !plan.queues.exclusive {
            for names in plan.queues.names.chunks(QUEUES_AT_ONCE) {
                let calls: Vec<_> = names.iter().map(|name| deletion(name)).collect();
                self.connection.call_all(&calls)?;
            }
        }
        if plan.exchange.declared_type.is_some() {
            let arguments = Arguments::new().short(0).short_string(&plan.exchange.name).octet(0);
            self.connection.call(method::EXCHANGE_DELETE, &arguments, method::EXCHANGE_DELETE_OK)?;
        }
        Ok(())
    }
}

fn declare_exchange(connection: &mut Connection, plan: &Plan, kind: &str) -> Result<(), PerfError> {
    let bits = if plan.queues.durable { DECLARE_DURABLE } else { 0 };
    let arguments = Arguments::new().short(0).short_string(&plan.exchange.name).short_string(kind).octet(bits);
    let arguments = fields::table(arguments, &plan.exchange.arguments);
    connection.call(method::EXCHANGE_DECLARE, &arguments, method::EXCHANGE_DECLARE_OK).map(drop)
}

/// Declares (or looks up) queues as the plan says and binds them; returns how many messages each one holds.
pub(super) fn declare(connection: &mut Connection, plan: &Plan, names: &[String]) -> Result<Vec<u32>, PerfError> {
    let binds = !plan.exchange.is_default() && !plan.queues.predeclared;
    let declarations: Vec<_> = names.iter().map(|name| declaration(plan, name)).collect();
    let answers = connection.call_all(&declarations)?;
    if binds {
        let bindings: Vec<_> = names.iter().map(|name| binding(plan, name)).collect();
        connection.call_all(&bindings)?;
    }
    let ready = |answer: &Vec<u8>| {
        let mut answer = ArgumentReader::new(answer);
        answer.short_string()?;
        Ok(answer.long()?)
    };
    answers.iter().map(ready).collect()
}

fn declaration(plan: &Plan, name: &str) -> Call {
    let queues = &plan.queues;
    let flags = [
        (queues.predeclared, DECLARE_PASSIVE),
        (queues.durable, DECLARE_DURABLE),
        (queues.exclusive, DECLARE_EXCLUSIVE),
        (queues.auto_delete, DECLARE_AUTO_DELETE),
    ];
    let bits = flags.iter().filter(|(wanted, _)| *wanted).fold(0, |bits, (_, bit)| bits | bit);
    let arguments = fields::table(Arguments::new().short(0).short_string(name).octet(bits), &queues.arguments);
    Call { id: method::QUEUE_DECLARE, arguments, reply: method::QUEUE_DECLARE_OK }
}

fn binding(plan: &Plan, name: &str) -> Call {
    let exchange = &plan.exchange;
    let arguments = Arguments::new()
        .short(0)
        .short_string(name)
        .short_string(&exchange.name)
        .short_string(exchange.binding_key_of(name))
        .octet(0);
    let arguments = fields::table(arguments, &exchange.binding_arguments());
    Call { id: method::QUEUE_BIND, arguments, reply: method::QUEUE_BIND_OK }
}

fn deletion(name: &str) -> Call {
    let arguments = Arguments::new().short(0).short_string(name).octet(0);
    Call { id: method::QUEUE_DELETE, arguments, reply: method::QUEUE_DELETE_OK }
}
