//! `leveret perf idle`: what connections cost a broker that do nothing.
//!
//! A few threads open them one after the other, each with its channels and consumers, and with heartbeats negotiated
//! away. Then nothing happens for a while, in which a broker should use no CPU time, and then all are closed. Consumers
//! share one queue, which stays empty.

mod options;
mod report;

use std::io::{self, ErrorKind, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

pub use options::IdleArgs;

use super::bare::Bare;
use super::connection::Connection;
use super::crew;
use super::error::PerfError;
use super::posix;
use super::process::ProcessSample;
use super::wire::{Arguments, FrameReader, method};
use options::Plan;
use report::{Observed, Report, Samples};

/// Threads that open and close; a broker's accept loop is the bottleneck long before them.
const OPENERS: usize = 4;
/// On loopback, source addresses that share the connections: each has some 28,000 ports.
const SOURCES: u8 = 16;
/// Open files besides the connections.
const SPARE_FILES: u64 = 64;
/// After opening and after closing, until memory and CPU are looked at.
const SETTLING: Duration = Duration::from_secs(1);
const TICK: Duration = Duration::from_millis(50);
const CONSUME_NO_ACK: u8 = 1 << 1;
const DECLARE_AUTO_DELETE: u8 = 1 << 3;

/// Opens the connections, holds them, closes them, and prints what that cost to standard output.
///
/// # Errors
/// Whatever kept it from starting, or cut it short. In the second case the report of what was open is printed all the
/// same.
pub(super) fn run(args: IdleArgs) -> Result<(), PerfError> {
    let plan = args.into_plan()?;
    raise_file_limit(plan.connection_count)?;
    posix::catch_interrupt();
    let (observed, error) = hold(&plan)?;
    let report = Report::new(&plan, &observed);
    let text = if plan.json {
        serde_json::to_string(&report)
            .map_err(|error| PerfError::Local { what: "cannot write the report as JSON", source: error.into() })?
            + "\n"
    } else {
        report.to_string()
    };
    io::stdout()
        .write_all(text.as_bytes())
        .map_err(|source| PerfError::Local { what: "cannot print the report", source })?;
    error.map_or(Ok(()), Err)
}

fn hold(plan: &Plan) -> Result<(Observed, Option<PerfError>), PerfError> {
    let sample = || plan.broker_pid.map(ProcessSample::take).transpose();
    sample()?; // before anything is opened: the process must exist
    let mut control = Connection::open(&plan.uri)?;
    let address = control.peer_address()?;
    let queue = format!("perf-idle-{}", std::process::id());
    if plan.consumer_count > 0 {
        let declare = Arguments::new().short(0).short_string(&queue).octet(DECLARE_AUTO_DELETE).empty_table();
        control.call(method::QUEUE_DECLARE, &declare, method::QUEUE_DECLARE_OK)?;
    }
    let before = sample()?;
    let begin = Instant::now();
    let (open, failure) =
        Opening { plan, address, queue: &queue, next: AtomicUsize::new(0), failed: AtomicBool::new(false) }.all();
    let opening = begin.elapsed();
    rest(SETTLING);
    let held_from = (sample()?, Instant::now());
    rest(plan.hold);
    let (held_to, held) = (sample()?, held_from.1.elapsed());
    let lost = open.iter().filter(|connection| is_lost(connection)).count();
    let opened = open.len();
    let begin = Instant::now();
    let closed = close_all(open);
    let closing = begin.elapsed();
    rest(SETTLING);
    let after = sample()?;
    let samples = before.zip(held_from.0).zip(held_to).zip(after).map(|(((before, opened), held), closed)| Samples {
        before,
        opened,
        held,
        closed,
    });
    let observed = Observed { opened, opening, held, lost, closing, samples };
    let left = control.finish(None);
    Ok((observed, failure.or(closed.err()).or(left.err())))
}

/// Lets this process open as many files as the connections need, if the system allows that.
fn raise_file_limit(connection_count: usize) -> Result<(), PerfError> {
    let needed = u64::try_from(connection_count).unwrap_or(u64::MAX).saturating_add(SPARE_FILES);
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_none_or(|current| current >= needed) {
        return Ok(());
    }
    if let Some(hard) = limit.maximum.filter(|hard| *hard < needed) {
        return Err(PerfError::Usage(format!(
            "{connection_count} connections need {needed} open files, and {hard} are allowed; raise that (ulimit -Hn) \
             or take fewer --connections"
        )));
    }
    setrlimit(Resource::Nofile, Rlimit { current: Some(needed), maximum: limit.maximum })
        .map_err(|error| PerfError::Local { what: "cannot raise the limit of open files", source: error.into() })
}

/// The part in which connections are opened.
struct Opening<'a> {
    plan: &'a Plan,
    address: SocketAddr,
    queue: &'a str,
    /// Index of the connection that is opened next.
    next: AtomicUsize,
    failed: AtomicBool,
}

impl Opening<'_> {
    /// Opens as many as can be; why it were not all is the second part.
    fn all(&self) -> (Vec<Bare>, Option<PerfError>) {
        let stop = || self.failed.store(true, Ordering::Relaxed);
        match crew::work_all(0..OPENERS, stop, |_| Ok(self.share())) {
            Ok(shares) => {
                let mut failure = None;
                let open = shares.into_iter().flat_map(|(open, failed)| {
                    failure = failure.take().or(failed);
                    open
                });
                (open.collect(), failure)
            }
            Err(error) => (Vec::new(), Some(error)),
        }
    }

    fn share(&self) -> (Vec<Bare>, Option<PerfError>) {
        let mut reader = FrameReader::new();
        let mut open = Vec::new();
        while !self.failed.load(Ordering::Relaxed) && !posix::was_interrupted() {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= self.plan.connection_count {
                break;
            }
            match self.one(index, &mut reader) {
                Ok(connection) => open.push(connection),
                Err(error) => {
                    self.failed.store(true, Ordering::Relaxed);
                    return (open, Some(error));
                }
            }
        }
        (open, None)
    }

    fn one(&self, index: usize, reader: &mut FrameReader) -> Result<Bare, PerfError> {
        let plan = self.plan;
        let mut connection = Bare::open(&plan.uri, self.address, source(self.address, index), reader)?;
        for channel in 1..=plan.channel_count {
            let open = Arguments::new().short_string("");
            connection.call(reader, channel, method::CHANNEL_OPEN, &open, method::CHANNEL_OPEN_OK)?;
        }
        for consumer in 0..plan.consumer_count {
            let channel = 1 + consumer % plan.channel_count;
            let tag = format!("c{consumer}");
            let consume = Arguments::new()
                .short(0)
                .short_string(self.queue)
                .short_string(&tag)
                .octet(CONSUME_NO_ACK)
                .empty_table();
            connection.call(reader, channel, method::BASIC_CONSUME, &consume, method::BASIC_CONSUME_OK)?;
        }
        Ok(connection)
    }
}

/// Where connection `index` comes from: on loopback one of several addresses, for the ports of one may not do.
fn source(broker: SocketAddr, index: usize) -> Option<IpAddr> {
    let is_loopback_v4 = matches!(broker.ip(), IpAddr::V4(address) if address.is_loopback());
    let number = u8::try_from(index % usize::from(SOURCES)).unwrap_or(0);
    is_loopback_v4.then(|| IpAddr::V4(Ipv4Addr::new(127, 0, 0, 2 + number)))
}

fn rest(duration: Duration) {
    let begin = Instant::now();
    while begin.elapsed() < duration && !posix::was_interrupted() {
        thread::sleep(TICK.min(duration));
    }
}

/// Whether the broker ended a connection or had something to say, which on an idle one is a farewell.
fn is_lost(connection: &Bare) -> bool {
    let stream = &connection.stream;
    let looked = stream.set_nonblocking(true).and_then(|()| {
        let seen = stream.peek(&mut [0]);
        stream.set_nonblocking(false).and(seen)
    });
    !matches!(looked, Err(error) if error.kind() == ErrorKind::WouldBlock)
}

fn close_all(open: Vec<Bare>) -> Result<(), PerfError> {
    let mut shares: Vec<Vec<Bare>> = (0..OPENERS).map(|_| Vec::new()).collect();
    for (index, connection) in open.into_iter().enumerate() {
        shares[index % OPENERS].push(connection);
    }
    let close = |share: Vec<Bare>| {
        let mut reader = FrameReader::new();
        share.into_iter().map(|connection| connection.close(&mut reader)).fold(Ok(()), Result::and)
    };
    crew::work_all(shares.into_iter(), || {}, close).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_to_loopback_come_from_several_addresses_and_others_from_where_the_system_likes() {
        let broker = |text: &str| text.parse::<SocketAddr>().expect("an address");
        let shown = |index| source(broker("127.0.0.1:5672"), index).map(|source| source.to_string());
        assert_eq!(shown(0).as_deref(), Some("127.0.0.2"));
        assert_eq!(shown(15).as_deref(), Some("127.0.0.17"));
        assert_eq!(shown(16), shown(0));
        assert_eq!(source(broker("10.0.0.1:5672"), 3), None);
        assert_eq!(source(broker("[::1]:5672"), 3), None);
    }

    #[test]
    fn more_connections_than_files_are_refused_with_the_way_out() {
        if getrlimit(Resource::Nofile).maximum.is_none() {
            return; // nothing is too much here
        }
        let refusal = raise_file_limit(usize::MAX).expect_err("too many").to_string();
        assert!(refusal.contains("ulimit -Hn"), "{refusal}");
        raise_file_limit(1).expect("allowed anywhere");
    }
}
