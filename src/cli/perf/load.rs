//! A load run from set-up to report: opens the workers, has them watched, adds them up.
//!
//! # Stopping
//! Publishers stop by themselves at their limit. Consumers go on until everything published has arrived, or
//! nothing has for 10 s, or the drain's time is over ([`super::watch`]). A worker that fails ends the run for all.

use std::time::{Duration, Instant};

use super::error::PerfError;
use super::meter::Total;
use super::options::Plan;
use super::posix;
use super::process::ProcessSample;
use super::report::{Observed, Report};
use super::topology::Topology;
use super::watch::Watch;
use super::workers::{Opened, Workers};

/// Files that are open besides the workers' connections, with room to spare.
const OTHER_FILES: u64 = 64;
/// With more workers than this, it is worth saying that they are connected.
const MANY_WORKERS: usize = 100;

/// Runs the plan. The report is there even if workers failed; why the first did is the second part.
///
/// # Errors
/// What kept the run from starting.
pub(super) fn execute(plan: &Plan) -> Result<(Report, Option<PerfError>), PerfError> {
    if let Some(pid) = plan.broker_pid {
        ProcessSample::take(pid)?; // before any queue is declared: the process must exist
    }
    check_open_files(plan)?;
    let start = Instant::now();
    let topology = Topology::set_up(plan)?;
    let ready_before = topology.ready_before;
    let run = Opened::connect(plan).and_then(|opened| {
        let setup = start.elapsed();
        if plan.worker_count() > MANY_WORKERS && !plan.json {
            let queues = plan.queues.names.len();
            eprintln!("{queues} queues and {} connections after {:.2} s", plan.worker_count(), setup.as_secs_f64());
        }
        run(plan, ready_before, setup, opened)
    });
    let torn_down = topology.tear_down(plan);
    let (report, error) = run?;
    Ok((report, error.or(torn_down.err())))
}

/// Raises the limit of open files as far as the workers need it.
fn check_open_files(plan: &Plan) -> Result<(), PerfError> {
    let wanted = plan.worker_count() as u64 + OTHER_FILES;
    let allowed = posix::allow_open_files(wanted);
    if allowed < wanted {
        return Err(PerfError::Usage(format!(
            "{} connections need {wanted} open files, and {allowed} are allowed: raise the hard limit (ulimit -Hn)",
            plan.worker_count()
        )));
    }
    Ok(())
}

fn run(
    plan: &Plan,
    ready_before: u64,
    setup: Duration,
    opened: Opened,
) -> Result<(Report, Option<PerfError>), PerfError> {
    let baseline = super::watch::Baseline::at_start(plan)?;
    let (workers, mut pools) = Workers::start(opened)?;
    let watched = Watch::new(plan, &workers, &mut pools, baseline, ready_before).until_the_end();
    workers.control.stop_consumers();
    let meters: (Vec<_>, Vec<_>) = (
        workers.publishers.iter().flat_map(|team| team.meters.clone()).collect(),
        workers.consumers.iter().flat_map(|team| team.meters.clone()).collect(),
    );
    let (publishers, consumers) = workers.join();
    let baseline = watched.baseline;
    let broker = baseline.broker.map(|broker| broker.end()).transpose();
    let total = (Total::of(meters.0.iter().map(|meter| &**meter)), Total::of(meters.1.iter().map(|meter| &**meter)));
    let (broker, broker_gone) = match broker {
        Ok(used) => (used, None),
        Err(error) => (None, Some(error)),
    };
    let observed = Observed {
        published_in_all: total.0.messages,
        delivered_in_all: total.1.messages,
        published: total.0.since(&baseline.published, baseline.at_ns),
        delivered: total.1.since(&baseline.delivered, baseline.at_ns),
        delivered_while_publishing: watched
            .delivered_while_publishing
            .map(|delivered| delivered.since(&baseline.delivered, baseline.at_ns)),
        ready_before,
        setup,
        drain: watched.drain,
        own_cpu: posix::own_cpu().saturating_sub(baseline.own_cpu),
        broker,
        delivery_latencies: pools.delivery.into_total(),
        confirm_latencies: pools.confirm.into_total(),
    };
    Ok(Report::new(plan, &observed, publishers, consumers, broker_gone))
}
