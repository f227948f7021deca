//! Flags for a VM's specification and for how a start waits, shared by `spawn`, `create`, `run`, `start`, `restart`.

use clap::ValueEnum;
use nido_api::egress::split_entries;
use nido_api::name::{TemplateName, VmName};
use nido_api::restart::RestartPolicy;
use nido_api::{
    AccelChoice, AllowEntry, BakeRequest, ForwardSpec, Limits, MachineChoice, NetChoice, NetLimitKey, NetLimits,
    PathChoice, SecretUse, SecretVariable, StartPath, StartRequest, VmInfo, VmSpec,
};
use nido_core::Nido;

use crate::output::Output;
use crate::parse;

/// Specification of a VM.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "The VM")]
pub struct VmArgs {
    /// Template of the VM [default: sandbox]
    #[arg(long, short = 'T', value_name = "NAME")]
    template: Option<TemplateName>,
    /// Size of the disk, for example 4G [default: the template's]
    #[arg(long, value_name = "SIZE", value_parser = parse::size)]
    disk: Option<u64>,
    /// What the VM's files on the host may have: disk, snapshots, logs [default: no quota]
    #[arg(long, value_name = "SIZE", value_parser = parse::size)]
    disk_quota: Option<u64>,
    /// How many processes and threads all commands in the guest may have together, at least 16 [default: no limit]
    #[arg(long, value_name = "NUMBER")]
    max_processes: Option<u32>,
    /// Publish a port of the guest on the host's loopback; may be repeated
    #[arg(long, short, value_name = "[[HOST:]PORT:]GUEST")]
    publish: Vec<ForwardSpec>,
    /// Let the guest reach this: example.com:443, *.example.com, 10.0.0.0/8:53/udp, host:8080 (the host's loopback), @pip (a
    /// preset, see nido net presets); may be repeated [default ports: 80,443]
    #[arg(long, value_name = "TARGET[:PORTS][/udp]|@PRESET")]
    allow: Vec<AllowEntry>,
    /// Limit the network: connections, new-connections (a second), udp, questions (for names, a second), or, in bytes since
    /// the start, sent and received; may be repeated [default: 512, 200, 128, 50, no limit]
    #[arg(long, value_name = "KEY=VALUE", value_parser = parse::net_limit)]
    net_limit: Vec<(NetLimitKey, u64)>,
    /// Put a secret into this header of requests to this host, in place of nido-secret-NAME; may be repeated [default header:
    /// authorization]
    #[arg(long, value_name = "NAME@HOST[:HEADER]")]
    secret: Vec<SecretUse>,
    /// Set a variable of commands to the placeholder of a secret; may be repeated
    #[arg(long, value_name = "VARIABLE=NAME")]
    secret_env: Vec<SecretVariable>,
    /// Stop the VM this long after its start, for example 10m
    #[arg(long, value_name = "TIME", value_parser = parse::duration_ms)]
    ttl: Option<u64>,
    /// Stop the VM after this long without an exec, copy or forwarded connection
    #[arg(long, value_name = "TIME", value_parser = parse::duration_ms)]
    idle: Option<u64>,
    /// Delete the VM when it stops
    #[arg(long)]
    ephemeral: bool,
    /// Start the VM again when it has failed, or (always) also when the guest powered itself off [default: no]
    #[arg(long, value_name = "POLICY")]
    restart: Option<Restart>,
    /// Refuse to start without hardware isolation
    #[arg(long)]
    require_isolation: bool,
    /// Refuse to start unless QEMU is fully confined
    #[arg(long)]
    require_confinement: bool,
    /// Label; may be repeated
    #[arg(long, value_name = "KEY=VALUE", value_parser = parse::label)]
    label: Vec<(String, String)>,
    #[command(flatten)]
    machine: MachineArgs,
}

/// The part of a specification that the guest can notice, and that a warm image therefore fixes.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "The machine")]
pub struct MachineArgs {
    /// Virtual CPUs [default: 1]
    #[arg(long, value_name = "N")]
    cpus: Option<u32>,
    /// Memory, for example 512M or 2G [default: 512M]
    #[arg(long, value_name = "SIZE", value_parser = parse::memory_mib)]
    memory: Option<u32>,
    /// Network: nat reaches what the host reaches, restricted only what --allow names, none has no network card [default: nat, or restricted if
    /// the template bounds the rules of its VMs]
    #[arg(long, value_name = "KIND")]
    net: Option<Net>,
    /// Provide virtualization in the guest
    #[arg(long)]
    nested: bool,
    /// Machine type [default: auto]
    #[arg(long, value_name = "TYPE")]
    machine: Option<Machine>,
    /// Accelerator: auto uses kvm if its test succeeds, else tcg with a warning [default: auto]
    #[arg(long, value_name = "KIND")]
    accel: Option<Accel>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Net {
    Nat,
    Restricted,
    None,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Machine {
    Auto,
    Microvm,
    Pc,
    Q35,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Restart {
    No,
    OnFailure,
    Always,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Accel {
    Auto,
    Kvm,
    Tcg,
}

impl Accel {
    const fn choice(self) -> AccelChoice {
        match self {
            Self::Auto => AccelChoice::Auto,
            Self::Kvm => AccelChoice::Kvm,
            Self::Tcg => AccelChoice::Tcg,
        }
    }
}

impl VmArgs {
    /// The core's specification; an absent flag keeps the core's default.
    pub fn spec(self, nido: &Nido, name: VmName) -> VmSpec {
        let names_net = self.machine.net.is_some();
        let spec = self.into_spec(name);
        let net = if names_net { spec.net } else { nido.default_net(&spec.template, &Limits::default()) };
        VmSpec { net, ..spec }
    }

    fn into_spec(self, name: VmName) -> VmSpec {
        let defaults = VmSpec::named(name);
        let machine = self.machine.bake();
        let (allow, presets) = split_entries(self.allow);
        let mut net_limits = NetLimits::default();
        self.net_limit.into_iter().for_each(|(key, value)| net_limits.set(key, value));
        VmSpec {
            template: self.template.unwrap_or(defaults.template),
            cpus: machine.cpus.unwrap_or(defaults.cpus),
            memory_mib: machine.memory_mib.unwrap_or(defaults.memory_mib),
            disk_bytes: self.disk,
            disk_quota_bytes: self.disk_quota,
            max_processes: self.max_processes,
            net: machine.net,
            allow,
            net_limits,
            presets,
            secrets: self.secret,
            secret_env: self.secret_env,
            machine: machine.machine,
            accel: machine.accel,
            nested: machine.nested,
            require_isolation: self.require_isolation,
            require_confinement: self.require_confinement,
            forwards: self.publish,
            ttl_ms: self.ttl,
            idle_ms: self.idle,
            ephemeral: self.ephemeral,
            restart: self.restart.map_or(RestartPolicy::No, |restart| match restart {
                Restart::No => RestartPolicy::No,
                Restart::OnFailure => RestartPolicy::OnFailure,
                Restart::Always => RestartPolicy::Always,
            }),
            labels: self.label.into_iter().collect(),
            ..defaults
        }
    }
}

impl MachineArgs {
    /// The core's words; an absent flag keeps the core's default.
    pub fn bake(self) -> BakeRequest {
        BakeRequest {
            cpus: self.cpus,
            memory_mib: self.memory,
            net: self.net.map_or(NetChoice::default(), |net| match net {
                Net::Nat => NetChoice::Nat,
                Net::Restricted => NetChoice::Restricted,
                Net::None => NetChoice::None,
            }),
            machine: self.machine.map_or(MachineChoice::default(), |machine| match machine {
                Machine::Auto => MachineChoice::Auto,
                Machine::Microvm => MachineChoice::Microvm,
                Machine::Pc => MachineChoice::Pc,
                Machine::Q35 => MachineChoice::Q35,
            }),
            accel: self.accel.map_or(AccelChoice::default(), Accel::choice),
            nested: self.nested,
            ..BakeRequest::default()
        }
    }
}

/// How a start waits.
#[derive(Debug, clap::Args)]
pub struct StartArgs {
    /// Do not wait until the guest is ready
    #[arg(long)]
    no_wait: bool,
    /// Time limit for the guest to become ready, for example 60s [default: depends on the accelerator]
    #[arg(long, value_name = "TIME", value_parser = parse::duration_ms)]
    timeout: Option<u64>,
    #[command(flatten)]
    path: PathArgs,
}

impl StartArgs {
    /// The core's request.
    pub const fn request(&self) -> StartRequest {
        StartRequest { wait: !self.no_wait, timeout_ms: self.timeout, path: self.path.choice(), accel: None }
    }
}

/// The accelerator of one start.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct StartAccelArgs {
    /// Accelerator of this start [default: the VM's]; tcg gives up the hardware isolation of earlier starts
    #[arg(long, value_name = "KIND")]
    accel: Option<Accel>,
}

impl StartAccelArgs {
    /// The request with it.
    pub fn with(self, request: StartRequest) -> StartRequest {
        StartRequest { accel: self.accel.map(Accel::choice), ..request }
    }
}

/// How the guest starts.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct PathArgs {
    /// Boot, even if a warm image matches
    #[arg(long)]
    cold: bool,
    /// Fork, or fail and report why the VM cannot be forked
    #[arg(long, conflicts_with = "cold")]
    fork: bool,
}

impl PathArgs {
    /// The core's word.
    pub const fn choice(self) -> PathChoice {
        match (self.cold, self.fork) {
            (true, _) => PathChoice::Cold,
            (false, true) => PathChoice::Fork,
            (false, false) => PathChoice::Auto,
        }
    }
}

/// Prints warnings, and how long it took. In JSON both are part of the result.
pub fn summarize(output: &Output, vm: &VmInfo) {
    if output.json {
        return;
    }
    vm.warnings.iter().for_each(|warning| output.warn(warning));
    output.note(&summary(vm));
}

/// Prints for how long a running VM's CPUs were paused to save it.
pub fn paused(output: &Output, vm: &VmName, paused_ms: Option<u64>) {
    if let Some(ms) = paused_ms.filter(|_| output.shows_progress()) {
        output.note(&format!("{vm} was paused for {ms} ms"));
    }
}

/// Milliseconds as people read them.
fn seconds(ms: f64) -> String {
    if ms < 1000.0 { format!("{ms:.0} ms") } else { format!("{:.2} s", ms / 1000.0) }
}

/// How a VM was started, for people.
pub const fn path_words(path: StartPath) -> &'static str {
    match path {
        StartPath::Cold => "cold boot",
        StartPath::Fork => "fork",
        StartPath::Pool => "from the pool",
        StartPath::Restore => "restored",
    }
}

fn summary(vm: &VmInfo) -> String {
    let isolation = match vm.isolation.as_deref() {
        Some("hardware") => Some("hardware isolation"),
        Some(_) => Some("no hardware isolation"),
        None => None,
    };
    let facts = [vm.machine.as_deref(), vm.accel.as_deref(), isolation].into_iter().flatten();
    match &vm.timings {
        Some(timings) if vm.agent.ready => {
            let facts: Vec<_> = std::iter::once(path_words(timings.path)).chain(facts).collect();
            format!("{} is ready after {} ({})", vm.name, seconds(timings.total_ms), facts.join(", "))
        }
        _ => {
            let facts: Vec<_> = facts.collect();
            let facts = if facts.is_empty() { String::new() } else { format!(" ({})", facts.join(", ")) };
            format!("{} is {}{facts}", vm.name, vm.status.word())
        }
    }
}
