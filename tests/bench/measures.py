"""The measurements themselves, one function each. Each gives its `Result`s; the targets stand here and nowhere else.

What they share is in `Bench`: the rig, how many samples to take, one VM that is started when it is first asked for and
one ssh server in it.
"""

import functools
import os
import tempfile

import bare
import forks
import kvm
import mcp
import others
import rest
import webhooks
import wire
from guest_ssh import GuestSsh
from result import Result
from rig import Rig, host_kb, say, timed
from sampling import in_turns
import time

MIB = 1 << 20
BIG = 256
GUEST_FILE = "/root/bench.bin"
BARE = "bare script"


class Bench:
    """What the measurements have in common."""

    def __init__(self, rig, scratch, quick):
        self.rig, self.scratch, self.quick = rig, scratch, quick

    def count(self, full, quick):
        return quick if self.quick else full

    @functools.cached_property
    def vm(self):
        say("starting the VM that is measured")
        return self.rig.spawn("guest")

    @functools.cached_property
    def ssh(self):
        vm = self.vm
        say("preparing an ssh server in it")
        place = os.path.join(self.scratch, "ssh")
        os.makedirs(place)
        return GuestSsh(vm, place)

    @functools.lru_cache(maxsize=None)
    def file(self, mib):
        """A file of so many MiB that does not compress."""
        path = os.path.join(self.scratch, f"{mib}-mib")
        with open(path, "wb") as file:
            for _ in range(mib):
                file.write(os.urandom(MIB))
        return path


def milliseconds(measure, *args):
    return lambda: measure(*args) * 1000


def spawn(bench):
    """Cold start to ready, against the same QEMU started by hand."""
    running = bench.rig.spawn("model", "--cold")
    with tempfile.TemporaryDirectory(dir=bench.scratch) as place:
        template = bare.Template(running, place)
        bench.rig.delete(running)
        result = Result("spawn", "Cold start to ready, template `sandbox`", "ms")
        phases = {"qemu": [], "agent": []}

        def with_nido():
            name = bench.rig.fresh_name("spawn")
            seconds = bench.rig.timed("spawn", name, "--cold")
            timings = bench.rig.json("info", name)["timings"]
            phases["qemu"].append(timings["qemu_ms"])
            phases["agent"].append(timings["agent_ms"])
            bench.rig.run("delete", "--force", "--yes", name)
            return seconds * 1000

        sides = {forks.COLD: with_nido, BARE: milliseconds(template.boot)}
        result.samples = in_turns(sides, bench.count(15, 4), warm_up=1, what="spawn")
        nido, script = (result.median(side) for side in sides)
        result.require("nido / bare", nido / script, "<=", 1.3)
        result.notes.append("bare: the same arguments, kernel, initramfs and overlay, the same agent, no supervisor")
        return [result]


def execs(bench):
    """A command in a running guest: nido's whole process, an open session, ssh."""
    vm, ssh = bench.vm, bench.ssh
    first = Result("first", "The first `sh -c true` after ready, and the next ones", "ms")
    fresh = bench.rig.spawn("first")
    first.samples["first"] = [bench.rig.timed("exec", fresh.name, "--", "sh", "-c", "true") * 1000]
    first.samples["next"] = [
        bench.rig.timed("exec", fresh.name, "--", "sh", "-c", "true") * 1000 for _ in range(bench.count(20, 5))
    ]
    bench.rig.delete(fresh)

    result = Result("exec", "`true` in a running guest", "ms")
    with wire.open_session(vm.dir) as session:

        def over_session(*argv):
            begun = time.monotonic()
            code, output = session.run(*argv)
            if code != 0:
                raise RuntimeError(f"{argv} ended with {code}: {output!r}")
            return time.monotonic() - begun

        def ping():
            begun = time.monotonic()
            session.ping()
            return time.monotonic() - begun

        nido, opened = "`nido exec vm -- true`, whole process", "the same over an open session"
        sides = {
            nido: milliseconds(bench.rig.timed, "exec", vm.name, "--", "true"),
            opened: milliseconds(over_session, "true"),
            "ping over an open session": milliseconds(ping),
            "`nido --version`, whole process": milliseconds(bench.rig.timed, "--version"),
        }
        result.samples = in_turns(sides, bench.count(100, 15), warm_up=3, what="exec")
    result.require("nido above an open session", result.more(nido, opened), "<=", 15, "ms")

    against = Result("ssh", "`true` in the same guest, nido and ssh", "ms")
    sides = {
        nido: milliseconds(bench.rig.timed, "exec", vm.name, "--", "true"),
        "`ssh vm true` through `nido forward`": milliseconds(ssh.true, "forward"),
        "`ssh vm true` through `nido proxy`": milliseconds(ssh.true, "proxy"),
    }
    against.samples = in_turns(sides, bench.count(15, 3), warm_up=1, what="ssh")
    own, *others = (against.median(side) for side in sides)
    against.require("better ssh / nido", min(others) / own, ">=", 15)
    against.notes.append("sshd without PAM, ed25519 keys, default ciphers, no connection sharing")
    return [first, result, against]


def copies(bench):
    """Upload and download, against scp into the same guest."""
    vm, ssh, rig = bench.vm, bench.ssh, bench.rig
    scp_mib = bench.count(64, 16)
    big, small, back = bench.file(BIG), bench.file(scp_mib), os.path.join(bench.scratch, "back")

    def clean(seconds, mib):
        """Each copy begins with an empty place and nothing left to write."""
        vm.exec("sh", "-c", f"rm -f {GUEST_FILE}; sync")
        return mib / seconds

    def nido_up():
        return clean(rig.timed("--quiet", "upload", vm.name, big, GUEST_FILE), BIG)

    def scp_up(way):
        return clean(ssh.copy(way, small, ":" + GUEST_FILE), scp_mib)

    def fetch(seconds, mib):
        os.unlink(back)
        return mib / seconds

    def nido_down():
        return fetch(rig.timed("--quiet", "download", vm.name, "/root/big.bin", back), BIG)

    def scp_down(way):
        return fetch(ssh.copy(way, ":/root/small.bin", back), scp_mib)

    place = os.path.join(bench.scratch, "streams")
    os.makedirs(place)
    results = []
    # A forked one would have QEMU wait for the state of a warm image.
    model = rig.spawn("model", "--cold")
    streams = bare.Streams(model, place)
    rig.delete(model)
    with streams:
        sent = lambda path: streams.send(path, into="/root/bare.bin")
        # What a copy is compared with does what the copy does in the guest: writing a file there takes more than the channel.
        for title, own, other, carried, ends, turn in (
            ("Upload", nido_up, scp_up, sent, "from a file of the host into one of the guest", None),
            ("Download", nido_down, scp_down, streams.receive, "from nowhere to nowhere",
             (("/root/big.bin", big), ("/root/small.bin", small))),
        ):
            for path, source in turn or ():
                rig.run("--quiet", "upload", vm.name, source, path)
            result = Result(title.lower(), f"{title} of {BIG} MiB (scp: {scp_mib} MiB)", "MiB/s")
            name = f"`nido {title.lower()}`, whole process"
            forward, proxy = "`scp` through `nido forward`", "`scp` through `nido proxy`"
            stream = f"the same bytes over a bare virtio-serial port, {ends}"
            sides = {
                name: own,
                stream: lambda carried=carried: BIG / carried(big),
                forward: functools.partial(other, "forward"),
                proxy: functools.partial(other, "proxy"),
            }
            if title == "Upload":
                sides["the same bytes over a bare virtio-serial port, thrown away in the guest"] = lambda: BIG / streams.send(big)
            result.samples = in_turns(sides, bench.count(5, 2), what=title.lower())
            result.require("nido", result.median(name) * MIB / 1e6, ">=", 100, "MB/s")
            better = max(result.median(forward), result.median(proxy))
            result.require("nido / better scp", result.median(name) / better, ">=", 15)
            result.require("nido / bare stream", result.median(name) / result.median(stream), ">=", 0.9)
            results.append(result)
    vm.exec("rm", "-f", "/root/big.bin", "/root/small.bin")
    return results


def private_kb(pid):
    """Memory that only this process has, in KiB."""
    return sum(host_kb(pid, field, "smaps_rollup") for field in ("Private_Clean", "Private_Dirty"))


def memory(bench):
    """What nido, the supervisor and the agent hold, at rest and while files of different sizes are copied."""
    rig = bench.rig
    vm = rig.spawn("memory")
    supervisor = vm.supervisor_pid()
    with wire.open_session(vm.dir) as session:
        session.ping()
    rest = Result("rest", "A running, idle VM", "KiB")
    rest.samples["supervisor, private"] = [private_kb(supervisor)]
    rest.samples["supervisor, resident"] = [host_kb(supervisor, "VmRSS")]
    other = rig.spawn("other")
    rest.samples["supervisor, private, while a second VM runs"] = [private_kb(supervisor)]
    rig.delete(other)
    rest.samples["agent, resident"] = [vm.status_kb("VmRSS")]
    rest.samples["agent, program file"] = [int(vm.exec("stat", "-L", "-c", "%s", "/proc/1/exe")) / 1024]
    rest.samples["QEMU, resident"] = [host_kb(vm.qemu_pid(), "VmRSS")]
    rest.require("supervisor, private", rest.median("supervisor, private") * 1024 / 1e6, "<=", 8, "MB")
    rest.require("agent, resident", rest.median("agent, resident") * 1024 / 1e6, "<", 6, "MB")
    rest.require("agent, program file", rest.median("agent, program file") * 1024 / 1e6, "<=", 4, "MB")

    peak = Result("peak", "Peak memory of a copy, by the size of the file", "KiB")
    back = os.path.join(bench.scratch, "peak")
    rounds = bench.count(3, 1)
    for mib in (1, BIG):
        for _ in range(rounds):
            # 5 sets a process's peak back to what it holds now.
            vm.exec("sh", "-c", "echo 5 >/proc/1/clear_refs")
            with open(f"/proc/{supervisor}/clear_refs", "w", encoding="ascii") as peak_of:
                peak_of.write("5")
            up, _ = rig.peak_kb("upload", vm.name, bench.file(mib), GUEST_FILE)
            down, _ = rig.peak_kb("download", vm.name, GUEST_FILE, back)
            os.unlink(back)
            for side, value in (
                ("nido upload", up), ("nido download", down), ("agent", vm.status_kb("VmHWM")),
                ("supervisor", host_kb(supervisor, "VmHWM")),
            ):
                peak.samples.setdefault(f"{side}, {mib} MiB", []).append(value)
            vm.exec("rm", "-f", GUEST_FILE)
    rest.samples["supervisor, private, after copies"] = [private_kb(supervisor)]
    rest.notes.append("private: clean and dirty; the program itself is private only while one nido process runs")
    rig.delete(vm)
    # Flat: what 255 MiB more cost, in MiB. One MiB is a few buffers, and what the allocators' chance makes of them.
    for side in ("nido upload", "nido download", "agent", "supervisor"):
        grown = peak.median(f"{side}, {BIG} MiB") - peak.median(f"{side}, 1 MiB")
        peak.require(f"{side}: {BIG} MiB against 1 MiB", grown / 1024, "<=", 1, "MiB more")
    return [rest, peak]


def lists(bench):
    """`nido ls` over 200 stored VMs, in a home of its own."""
    with tempfile.TemporaryDirectory(dir=bench.scratch) as home:
        os.chmod(home, 0o700)
        for part in ("blobs", "templates"):
            os.symlink(os.path.join(bench.rig.home, part), os.path.join(home, part))
        with Rig(bench.rig.nido, home) as rig:
            rig.env = {**bench.rig.env, "NIDO_HOME": home}
            say("  creating 200 VMs")
            created = [rig.timed("create", f"stored-{number}") * 1000 for number in range(200)]
            result = Result("ls", "`nido ls` with 200 stored VMs", "ms")
            version = functools.partial(timed, [rig.nido, "--version"], rig.env)
            sides = {
                "`nido ls`, whole process": milliseconds(rig.timed, "ls"),
                "`nido --version`, whole process": milliseconds(version),
            }
            result.samples = in_turns(sides, bench.count(50, 10), warm_up=2)
            result.samples["`nido create`, whole process"] = created
            result.require("nido ls", result.median("`nido ls`, whole process"), "<", 20, "ms")
            return [result]


# Memory comes first: what several nido processes share is nobody's own, so no other VM should run then.
ALL = {"memory": memory, "spawn": spawn, **forks.ALL, "exec": execs, "copy": copies, "ls": lists, "rest": rest.rest, "webhooks": webhooks.webhooks,
       **mcp.ALL, "others": others.others, **kvm.ALL}
