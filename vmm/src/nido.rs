//! `Nido`: the core API, one method per operation. Every face calls these and nothing else.

use std::path::PathBuf;

use crate::api::*;
use crate::error::Result;
use crate::name::{TemplateName, VmName};

/// How nido is opened.
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    /// Where everything is kept. Absent: `NIDO_HOME`, else `/var/lib/nido` for root, else `$XDG_DATA_HOME/nido`.
    pub home: Option<PathBuf>,
    /// The QEMU to use. Absent: `NIDO_QEMU`, else `qemu-system-x86_64` in `PATH`.
    pub qemu: Option<PathBuf>,
    /// The program that supervises VMs: nido's own. Absent: the running program.
    pub supervisor: Option<PathBuf>,
}

/// The core API over one home.
#[derive(Debug)]
pub struct Nido {}

impl Nido {
    /// Opens (and makes, the first time) a home. Also settles what a crash may have left behind.
    pub async fn open(_options: OpenOptions) -> Result<Self> {
        todo!()
    }

    /// Makes a VM without starting it.
    pub async fn create(&self, _spec: VmSpec) -> Result<VmInfo> {
        todo!()
    }
    /// Makes a VM and starts it. If this fails or is dropped half-way, the VM is gone again.
    pub async fn spawn(
        &self,
        _spec: VmSpec,
        _start: StartRequest,
        _progress: &mut dyn FnMut(StartStage),
    ) -> Result<VmInfo> {
        todo!()
    }
    /// Starts a VM that is at rest.
    pub async fn start(
        &self,
        _name: &VmName,
        _start: StartRequest,
        _progress: &mut dyn FnMut(StartStage),
    ) -> Result<VmInfo> {
        todo!()
    }
    /// Stops a VM. The answer of an ephemeral VM is the last that is heard of it.
    pub async fn stop(&self, _name: &VmName, _stop: StopRequest) -> Result<VmInfo> {
        todo!()
    }
    /// Stops and starts again.
    pub async fn restart(
        &self,
        _name: &VmName,
        _stop: StopRequest,
        _start: StartRequest,
        _progress: &mut dyn FnMut(StartStage),
    ) -> Result<VmInfo> {
        todo!()
    }
    /// Halts the CPUs.
    pub async fn pause(&self, _name: &VmName) -> Result<VmInfo> {
        todo!()
    }
    /// Lets them run on.
    pub async fn resume(&self, _name: &VmName) -> Result<VmInfo> {
        todo!()
    }
    /// Deletes a VM and everything of it; a running one only with `force`.
    pub async fn delete(&self, _name: &VmName, _force: bool) -> Result<VmInfo> {
        todo!()
    }
    /// All VMs. Touches no socket: what is known from the store and the locks.
    pub fn list(&self) -> Result<VmList> {
        todo!()
    }
    /// One VM.
    pub async fn info(&self, _name: &VmName) -> Result<VmInfo> {
        todo!()
    }

    /// Starts a command. Dropping both halves kills it.
    pub async fn exec(&self, _name: &VmName, _request: ExecRequest) -> Result<(ExecControl, ExecEvents)> {
        todo!()
    }
    /// Copies from the host into the guest.
    pub async fn upload(
        &self,
        _name: &VmName,
        _request: UploadRequest,
        _progress: &mut dyn FnMut(CopyProgress),
    ) -> Result<CopyResult> {
        todo!()
    }
    /// Copies from the guest to the host.
    pub async fn download(
        &self,
        _name: &VmName,
        _request: DownloadRequest,
        _progress: &mut dyn FnMut(CopyProgress),
    ) -> Result<CopyResult> {
        todo!()
    }
    /// Publishes a port of the guest; the answer has the host port that was taken.
    pub async fn forward_add(&self, _name: &VmName, _spec: ForwardSpec) -> Result<ForwardSpec> {
        todo!()
    }
    /// Published ports.
    pub fn forward_list(&self, _name: &VmName) -> Result<ForwardList> {
        todo!()
    }
    /// Unpublishes a port, named as it is listed.
    pub async fn forward_remove(&self, _name: &VmName, _spec: &ForwardSpec) -> Result<()> {
        todo!()
    }
    /// Connects standard input and output to a port of the guest until both directions have ended.
    pub async fn proxy(&self, _name: &VmName, _port: u16) -> Result<()> {
        todo!()
    }
    /// Reads a log.
    pub fn logs(&self, _name: &VmName, _request: LogRequest) -> Result<LogStream> {
        todo!()
    }

    /// Templates and recipes.
    pub fn template_list(&self) -> Result<TemplateList> {
        todo!()
    }
    /// One template.
    pub fn template_info(&self, _name: &TemplateName) -> Result<TemplateInfo> {
        todo!()
    }
    /// Builds a template from the recipe of that name. Dropping the future cancels the build.
    pub async fn template_build(
        &self,
        _name: &TemplateName,
        _request: BuildRequest,
        _progress: &mut (dyn FnMut(BuildStep) + Send),
    ) -> Result<BuildResult> {
        todo!()
    }
    /// Deletes a template that no VM uses.
    pub fn template_delete(&self, _name: &TemplateName) -> Result<()> {
        todo!()
    }

    /// Looks at the host. With `gc`, removes what crashes left behind.
    pub async fn doctor(&self, _gc: bool) -> Result<DoctorReport> {
        todo!()
    }

    /// The hidden verb: supervises one VM until it is at rest. Returns when there is nothing left to supervise.
    pub async fn supervise(_options: OpenOptions, _id: &str) -> Result<()> {
        todo!()
    }
}

/// What the caller says to a running command.
#[derive(Debug)]
pub struct ExecControl {}

impl ExecControl {
    /// Sends bytes to its standard input; waits while it does not take them. Other calls may be made meanwhile.
    pub async fn stdin(&self, _bytes: &[u8]) -> Result<()> {
        todo!()
    }
    /// Ends its standard input.
    pub async fn stdin_eof(&self) -> Result<()> {
        todo!()
    }
    /// Sends a signal to it and its children.
    pub async fn signal(&self, _signal: u8) -> Result<()> {
        todo!()
    }
    /// Tells it the terminal's new size.
    pub async fn resize(&self, _rows: u16, _columns: u16) -> Result<()> {
        todo!()
    }
}

/// What a running command says.
#[derive(Debug)]
pub struct ExecEvents {}

impl ExecEvents {
    /// The next event; `None` after [`ExecEvent::Exited`].
    pub async fn next(&mut self) -> Option<Result<ExecEvent>> {
        todo!()
    }
}

/// A log being read.
#[derive(Debug)]
pub struct LogStream {}

impl LogStream {
    /// The next piece, as written by the guest: hostile bytes. `None` at the end.
    pub async fn next(&mut self) -> Option<Result<Vec<u8>>> {
        todo!()
    }
}
