//! The queues of a run: declared and bound before it, deleted after it.

use super::connection::Connection;
use super::error::PerfError;
use super::options::Plan;
use super::wire::{ArgumentReader, Arguments, method};

const DECLARE_PASSIVE: u8 = 1;
const DECLARE_DURABLE: u8 = 1 << 1;
const DECLARE_EXCLUSIVE: u8 = 1 << 2;
const DECLARE_AUTO_DELETE: u8 = 1 << 3;

/// The queues as they were found or made, and the connection that will delete them.
#[derive(Debug)]
pub(super) struct Topology {
    connection: Connection,
    /// Messages that were in the queues before the run.
    pub(super) ready_before: u64,
}

impl Topology {
    /// Declares and binds the plan's queues; exclusive ones are left to their consumers.
    pub(super) fn set_up(plan: &Plan) -> Result<Self, PerfError> {
        let mut connection = Connection::open(&plan.uri)?;
        let mut ready_before = 0;
        if !plan.queues.exclusive {
            for name in &plan.queues.names {
                ready_before += u64::from(declare(&mut connection, plan, name)?);
            }
        }
        Ok(Self { connection, ready_before })
    }

    /// Deletes what was declared, unless it is to stay.
    pub(super) fn tear_down(mut self, plan: &Plan) -> Result<(), PerfError> {
        let result = if plan.queues.keep || plan.queues.predeclared || plan.queues.exclusive {
            Ok(())
        } else {
            plan.queues.names.iter().try_for_each(|name| self.delete(name))
        };
        let left = self.connection.finish(result.as_ref().err());
        result.and(left)
    }

    fn delete(&mut self, name: &str) -> Result<(), PerfError> {
        let arguments = Arguments::new().short(0).short_string(name).octet(0);
        self.connection.call(method::QUEUE_DELETE, &arguments, method::QUEUE_DELETE_OK).map(drop)
    }
}

/// Declares (or looks up) one queue as the plan says and binds it; returns how many messages it holds.
pub(super) fn declare(connection: &mut Connection, plan: &Plan, name: &str) -> Result<u32, PerfError> {
    let queues = &plan.queues;
    let flags = [
        (queues.predeclared, DECLARE_PASSIVE),
        (queues.durable, DECLARE_DURABLE),
        (queues.exclusive, DECLARE_EXCLUSIVE),
        (queues.auto_delete, DECLARE_AUTO_DELETE),
    ];
    let bits = flags.iter().filter(|(wanted, _)| *wanted).fold(0, |bits, (_, bit)| bits | bit);
    let arguments = Arguments::new().short(0).short_string(name).octet(bits).empty_table();
    let answer = connection.call(method::QUEUE_DECLARE, &arguments, method::QUEUE_DECLARE_OK)?;
    let mut answer = ArgumentReader::new(&answer);
    answer.short_string()?;
    let message_count = answer.long()?;
    if !plan.exchange.is_empty() && !queues.predeclared {
        let key = plan.routing_key_of(name);
        let bind = Arguments::new().short(0).short_string(name).short_string(&plan.exchange).short_string(key);
        connection.call(method::QUEUE_BIND, &bind.octet(0).empty_table(), method::QUEUE_BIND_OK)?;
    }
    Ok(message_count)
}
