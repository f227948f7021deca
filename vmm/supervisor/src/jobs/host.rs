//! The facts about the host and its QEMU that go with a machine's state. They are cached, but QEMU may have been replaced.

use std::path::PathBuf;

use nido_api::error::Result;
use nido_engine::bake::shape;
use nido_engine::host::{QemuFacts, facts, qemu};
use nido_engine::machine::Machine;
use nido_images::BakedMachine;

use crate::context::Context;

/// Finds out about the host, when a job wants that.
#[derive(Debug)]
pub(crate) struct HostProbe {
    /// The QEMU that was named, if any.
    named: Option<PathBuf>,
    cache: PathBuf,
}

impl HostProbe {
    pub(crate) fn new(context: &Context) -> Self {
        Self { named: context.qemu().map(ToOwned::to_owned), cache: context.home().cache() }
    }

    /// Tests QEMU, unless that is cached.
    ///
    /// # Errors
    /// `qemu_missing`, `qemu_failed`.
    pub(crate) fn qemu(&self) -> Result<QemuFacts> {
        Ok(qemu::probe(&qemu::find(self.named.as_deref())?, &self.cache)?)
    }

    /// The shape of a machine on this host.
    pub(crate) fn shape(&self, machine: &Machine) -> BakedMachine {
        shape(machine, &facts::gather(&self.cache))
    }
}
