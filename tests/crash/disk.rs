//! What the end of a broker does to its data directory.

#![allow(dead_code, reason = "several test programs share it, and each uses a part")]

use std::path::Path;

use super::{broker::Environment, client::Rng};

pub trait Disk {
    /// Makes the data directory ready for the next start, and says what the broker's environment has to hold for that.
    fn before_start(&mut self, data_dir: &Path, rng: &mut Rng) -> Environment;

    /// Makes of the data directory what the next start is to find, and says how, for the log.
    fn after_end(&mut self, data_dir: &Path, rng: &mut Rng) -> String;

    /// Whether all that was written is there, synced or not.
    fn keeps_everything(&self) -> bool;
}

/// Only the process ends: whatever it wrote is there.
pub struct Lasting;

impl Disk for Lasting {
    fn before_start(&mut self, _: &Path, _: &mut Rng) -> Environment {
        Environment::new()
    }

    fn after_end(&mut self, _: &Path, _: &mut Rng) -> String {
        String::new()
    }

    fn keeps_everything(&self) -> bool {
        true
    }
}
