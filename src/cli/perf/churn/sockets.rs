//! Connections: each worker opens one and closes it, again and again.

use std::net::SocketAddr;

use super::super::bare::Bare;
use super::super::connection::Connection;
use super::super::crew;
use super::super::error::PerfError;
use super::super::posix::monotonic_ns;
use super::super::wire::FrameReader;
use super::Sampler;
use super::operation::Request;
use super::options::Plan;
use super::report::Observed;
use super::tally::{Budget, Tally};

/// # Errors
/// Why the first worker that failed did; the others are stopped.
pub(super) fn run(plan: &Plan, sample: Sampler<'_>) -> Result<(Observed, Tally), PerfError> {
    // The first one is not measured: it finds out whether and where the broker answers.
    let probe = Connection::open(&plan.uri)?;
    let address = probe.peer_address()?;
    probe.finish(None)?;
    let broker_before = sample()?;
    let start_ns = monotonic_ns();
    let budget = Budget::of(plan, start_ns);
    let tallies = crew::work_all(0..plan.connection_count, || budget.stop(), |_| churn(plan, address, &budget))?;
    let mut sum = Tally::new();
    tallies.iter().for_each(|tally| sum.add(tally));
    let broker = broker_before.zip(sample()?);
    Ok((Observed { start_ns, broker, cleaning: None }, sum))
}

fn churn(plan: &Plan, address: SocketAddr, budget: &Budget) -> Result<Tally, PerfError> {
    let mut reader = FrameReader::new();
    let mut tally = Tally::new();
    while budget.take() {
        let begin = monotonic_ns();
        let connection = Bare::open(&plan.uri, address, None, &mut reader)?;
        let open = monotonic_ns();
        tally.record(Request::Make, open.saturating_sub(begin));
        connection.close(&mut reader)?;
        let closed = monotonic_ns();
        tally.record(Request::Undo, closed.saturating_sub(open));
        tally.complete(closed);
    }
    Ok(tally)
}
