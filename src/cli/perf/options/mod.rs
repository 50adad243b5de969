//! The options of `leveret perf`: what can be typed ([`args`]), the bodies' sizes ([`sizes`]), and the checked
//! [`Plan`] made from it all ([`plan`]; [`queues`] has the part about queues and exchanges).

mod args;
mod checks;
mod plan;
mod queues;
mod sizes;

pub use args::PerfArgs;
pub(super) use plan::{Limit, Plan};
pub(super) use sizes::Sizes;

/// The plan that `options` make, for the tests of those who carry it out.
#[cfg(test)]
pub(super) fn test_plan(options: &str) -> Plan {
    plan::tests::plan(options).expect(options)
}
