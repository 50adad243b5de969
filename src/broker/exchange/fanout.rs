//! The fanout type: every binding matches, whatever the keys.

use super::target::{Target, TargetSet, Targets};

/// The targets of all bindings, ready to be copied.
#[derive(Clone, Debug, Default)]
pub struct FanoutTable {
    targets: TargetSet,
}

impl FanoutTable {
    pub fn add(&mut self, target: Target) {
        self.targets.add(target);
    }

    pub fn remove(&mut self, target: Target) {
        self.targets.remove(target);
    }

    pub fn collect(&self, out: &mut Targets) {
        out.extend(&self.targets);
    }
}
