"""libvirt, beside nido's own cold start: `virsh start` of the very machine that nido makes, until the same agent answers.

The daemon is a private one and in session mode: its files and sockets lie in a directory of its own, it knows no network
and no other domain, and daemon and domain are gone when the measurement ends. Asked as root, libvirt would serve the
whole system; so the daemon runs in a user namespace, in which whoever measures is an ordinary user.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from xml.sax.saxutils import escape, quoteattr

import bare
import forks
import wire
from result import Result
from rig import say
from sampling import in_turns

NIDO, VIRSH, BARE = "`nido spawn --cold --machine pc`, whole process", "`virsh start`, to the agent's answer", "bare script"
NAME, PORT = "nido-bench", "org.nido.agent"
UNPRIVILEGED = ["unshare", "--user", "--map-user=1", "--map-group=1"]


class Unusable(Exception):
    """libvirt cannot be measured here; says why."""


def after(argv, option):
    """What stands behind an option."""
    return argv[argv.index(option) + 1]


def part_of(arg, key):
    """What a key=value argument says of the key; nothing if it does not."""
    return next((part.split("=", 1)[1] for part in arg.split(",") if part.startswith(key + "=")), None)


def cpu_xml(model):
    """-cpu as libvirt writes it: `max` or `host`, and what is left out of it."""
    name, *flags = model.split(",")
    mode = {"max": "maximum", "host": "host-passthrough"}.get(name)
    if not mode or not all(flag.startswith("-") for flag in flags):
        raise Unusable(f"the processor {model!r} has no counterpart in libvirt")
    features = "".join(f"<feature policy='disable' name='{flag[1:]}'/>" for flag in flags)
    return f"<cpu mode='{mode}' check='none'>{features}</cpu>"


def domain_xml(template, place):
    """The domain: nido's machine, device by device."""
    argv = template.argv
    path = lambda name: quoteattr(os.path.join(place, name))
    accel = after(argv, "-accel")
    tb_size = part_of(accel, "tb-size")
    cache = f"<tcg><tb-cache unit='MiB'>{tb_size}</tb-cache></tcg>" if tb_size else ""
    return f"""<domain type='{"kvm" if accel.startswith("kvm") else "qemu"}'>
  <name>{NAME}</name>
  <memory unit='MiB'>{part_of(after(argv, "-m"), "size").removesuffix("M")}</memory>
  <vcpu>{part_of(after(argv, "-smp"), "cpus")}</vcpu>
  <sysinfo type='fwcfg'><entry name='opt/nido/config' file={path("guest.cbor")}/></sysinfo>
  <os>
    <type arch='x86_64' machine='pc'>hvm</type>
    <kernel>{escape(after(argv, "-kernel"))}</kernel>
    <initrd>{escape(after(argv, "-initrd"))}</initrd>
    <cmdline>{escape(after(argv, "-append"))}</cmdline>
  </os>
  <features><acpi/>{cache}<vmport state='off'/></features>
  {cpu_xml(after(argv, "-cpu"))}
  <on_poweroff>destroy</on_poweroff><on_reboot>destroy</on_reboot><on_crash>destroy</on_crash>
  <devices>
    <emulator>{escape(shutil.which(argv[0]) or argv[0])}</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' io='threads' discard='unmap' detect_zeroes='unmap'/>
      <source file={path("disk.qcow2")}/><target dev='vda' bus='virtio'/>
    </disk>
    <controller type='usb' model='none'/>
    <controller type='virtio-serial' ports='2'/>
    <interface type='user'><model type='virtio'/><rom enabled='no'/></interface>
    <serial type='file'><source path={path("console.log")}/></serial>
    <channel type='unix'><source mode='bind' path={path("channel.sock")}/><target type='virtio' name='{PORT}'/></channel>
    <input type='mouse' bus='ps2'/><input type='keyboard' bus='ps2'/>
    <memballoon model='none'/>
    <rng model='virtio'><backend model='builtin'/></rng>
    <panic model='isa'/>
  </devices>
</domain>
"""


class Daemon:
    """A libvirtd of this measurement's own, and one domain in it."""

    def __init__(self, place):
        self.place = place
        self.env = {key: value for key, value in os.environ.items() if not key.startswith(("XDG_", "LIBVIRT_"))}
        parts = {"HOME": "home", "XDG_RUNTIME_DIR": "run", "XDG_CONFIG_HOME": "config", "XDG_CACHE_HOME": "cache",
                 "XDG_DATA_HOME": "data"}
        for variable, part in parts.items():
            self.env[variable] = os.path.join(place, part)
            os.makedirs(self.env[variable], mode=0o700)
        conf = os.path.join(place, "config", "libvirt", "qemu.conf")
        os.makedirs(os.path.dirname(conf))
        with open(conf, "w", encoding="ascii") as file:
            # No second daemon for the console; confinement as in nido's own QEMU.
            file.write('stdio_handler = "file"\nsecurity_driver = "none"\nseccomp_sandbox = 1\n')
        self.wrap = UNPRIVILEGED if os.geteuid() == 0 else []
        with open(os.path.join(place, "libvirtd.log"), "wb") as log:
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            self.process = subprocess.Popen([*self.wrap, "libvirtd"], env=self.env, cwd=place, **streams)
        try:
            self._wait()
        except BaseException:
            self.end()
            raise

    def _wait(self):
        path = os.path.join(self.place, "run", "libvirt", "libvirt-sock")
        deadline = time.monotonic() + bare.DEADLINE
        while not os.path.exists(path):
            if self.process.poll() is not None or time.monotonic() > deadline:
                with open(os.path.join(self.place, "libvirtd.log"), encoding="utf-8", errors="replace") as log:
                    raise Unusable(f"libvirtd does not start: {' '.join(log.read()[-400:].split())}")
            time.sleep(0.01)
        self.uri = f"qemu+unix:///session?socket={path}"

    def virsh(self, *words):
        command = ["virsh", "--quiet", "--connect", self.uri, *words]
        done = subprocess.run(command, env=self.env, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        if done.returncode != 0:
            raise Unusable(f"virsh {words[0]}: {' '.join(done.stderr.decode(errors='replace').split())}")

    def _kill_domain(self):
        """Ends the domain's QEMU, if it runs: libvirtd leaves it alone when it goes itself."""
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            with open(os.path.join(self.place, "run", "libvirt", "qemu", "run", f"{NAME}.pid"), encoding="ascii") as file:
                os.kill(int(file.read()), signal.SIGKILL)

    def end(self):
        """Ends the domain and the daemon."""
        self._kill_domain()
        self.process.terminate()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Domain:
    """The domain of one template."""

    def __init__(self, daemon, template, place):
        self.daemon, self.template, self.place = daemon, template, place
        shutil.copy(template.config, os.path.join(place, "guest.cbor"))
        path = os.path.join(place, "domain.xml")
        with open(path, "w", encoding="utf-8") as file:
            file.write(domain_xml(template, place))
        daemon.virsh("define", path)

    def boot(self):
        """Seconds from `virsh start` to the agent's answer. The domain does not run any more when this returns."""
        begun = time.monotonic()
        shutil.copy(self.template.pristine, os.path.join(self.place, "disk.qcow2"))
        self.daemon.virsh("start", NAME)
        try:
            with socket.socket(socket.AF_UNIX) as port:
                port.settimeout(bare.DEADLINE)
                port.connect(os.path.join(self.place, "channel.sock"))
                bare.agree(port)
                wire.Session(bare.Stream(port), self.template.token, wire.message(wire.PING)).pong()
            return time.monotonic() - begun
        finally:
            self.daemon.virsh("destroy", NAME)


def measured(bench, result, template):
    """Measures it, in turns with nido and with QEMU by hand."""
    with_nido = forks.whole(bench.rig, "--cold", "--machine", "pc")
    # A socket's address holds 108 bytes, and libvirt's paths are long: not in the scratch directory, which may lie deep.
    with tempfile.TemporaryDirectory(prefix="nido-bench-") as place:
        daemon = Daemon(place)
        try:
            domain = Domain(daemon, template, place)
            sides = {NIDO: with_nido, VIRSH: lambda: domain.boot() * 1000, BARE: lambda: template.boot() * 1000}
            result.samples = in_turns(sides, bench.count(10, 2), warm_up=1, what="libvirt")
        finally:
            daemon.end()


def libvirt(bench):
    """Cold start by nido and by libvirt."""
    result = Result("libvirt", "Cold start to ready on machine `pc`: nido, libvirt", "ms")
    try:
        missing = [program for program in ("libvirtd", "virsh", "unshare") if not shutil.which(program)]
        if missing:
            raise Unusable(f"not installed: {', '.join(missing)} (scripts/packages libvirt)")
        running = bench.rig.spawn("model", "--cold", "--machine", "pc")
        with tempfile.TemporaryDirectory(dir=bench.scratch) as place:
            template = bare.Template(running, place)
            bench.rig.delete(running)
            measured(bench, result, template)
        result.notes.append(
            "libvirt: a private daemon that already runs, qemu:///session, the same QEMU, kernel, initramfs, command line,"
            " overlay and agent; the same devices, and the keyboard controller, which it cannot leave out"
        )
    except Unusable as reason:
        say(f"  libvirt is not measured: {reason}")
        result.notes.append(f"not measured: {reason}")
    return result
