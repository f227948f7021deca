"""KVM and kernel vsock: what a fork is worth there, and vsock beside virtio-serial.

`kvm` needs a host that has both. `nested` measures the same anywhere, in a VM that has them (`scripts/nested`); its ratios
mean something, its times do not.
"""

import json
import os
import re
import socket
import subprocess
import tempfile
import threading
import time

import bare
import forks
import wire
from result import Result
from rig import Vm, say
from sampling import in_turns, percentile

AGENT_PORT = 1024
MIB = 1 << 20
BIG = 256
# How long a connection may take, at first and at most, in seconds: a guest that was just restored loses the first one.
ATTEMPT = (0.03, 2.0)


def dial(cid, deadline):
    """Connects to a guest's agent, trying again until it answers."""
    attempt = ATTEMPT[0]
    while True:
        sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        sock.settimeout(attempt)
        try:
            sock.connect((cid, AGENT_PORT))
            sock.settimeout(bare.DEADLINE)
            return sock
        except OSError as error:
            sock.close()
            if time.monotonic() > deadline:
                raise
            if isinstance(error, TimeoutError):
                attempt = min(attempt * 2, ATTEMPT[1])
            else:
                time.sleep(0.002)


def cid_of(argv):
    return next(int(found.group(1)) for arg in argv if (found := re.search(r"guest-cid=(\d+)", arg)))


class Clone(bare.Clone):
    """A clone that is reached over kernel vsock, at an address of its own."""

    cids = iter(range(0x4E000000, 0x4E010000))

    def __init__(self, baked, path):
        self.token, self.path, self.cid = baked.token, path, next(self.cids)
        self.listener = self.port = None
        argv = [re.sub(r"guest-cid=\d+", f"guest-cid={self.cid}", arg) for arg in baked.argv]
        with open(os.path.join(path, "qemu.log"), "wb") as log:
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            self.qemu = subprocess.Popen(argv, cwd=path, start_new_session=True, **streams)

    def load(self, state, deadline):
        self.monitor = bare.Monitor(os.path.join(self.path, "qmp.sock"), deadline)
        self.monitor.load(state, self.path)

    def agree(self):
        self.port = dial(self.cid, time.monotonic() + bare.DEADLINE)
        self.session = wire.Session(self.port, self.token, wire.message(wire.PING))
        self.session.pong()


class Baked(bare.Baked):
    """As `bare.Baked`, over vsock."""

    clone = Clone


def check(vm):
    info = vm.rig.json("info", vm.name)
    if (info["accel"], info["agent"]["transport"]) != ("kvm", "vsock"):
        raise RuntimeError(f"this host has no KVM or no kernel vsock: {info['accel']}, {info['agent']['transport']}")


def open_vsock(vm):
    return wire.Session(dial(cid_of(vm.qemu_argv()), time.monotonic() + 60), wire.token_of(vm.dir))


def fork(bench):
    rig = bench.rig
    with tempfile.TemporaryDirectory(dir=bench.scratch) as place:
        model = rig.spawn("model", "--fork")
        check(model)
        by_hand = Baked(model, place, forks.the_bake(rig))
        rig.delete(model)
        result = Result("kvm fork", "Fork to ready under KVM, over kernel vsock", "ms")
        ready = []

        def forked():
            seconds, timings = forks.timed_spawn(rig, "--fork")
            ready.append(timings["total_ms"])
            return seconds * 1000

        sides = {forks.FORK: forked, forks.BARE: lambda: by_hand.boot() * 1000, forks.COLD: forks.whole(rig, "--cold")}
        result.samples = in_turns(sides, bench.count(15, 5), warm_up=1, what="fork")
        result.samples["nido, until ready"] = ready[1:]
        result.require("cold / fork", result.median(forks.COLD) / result.median(forks.FORK), ">=", 3)
        result.require("nido's fork to ready / bare fork", result.median("nido, until ready") / result.median(forks.BARE), "<=", 1.25)
        result.notes.append("bare: the same QEMU and agent by hand, its first connection given 30 ms; no identity is reset")
        return result


def serial_vm(rig, place):
    """A VM without vsock: nido is shown a `/dev/vhost-vsock` that is no device."""
    name = rig.fresh_name("serial")
    script = 'mknod "$0" c 0 0 && mount --bind "$0" /dev/vhost-vsock && exec "$1" --quiet spawn "$2" --cold >&2'
    subprocess.run(["unshare", "--mount", "sh", "-c", script, os.path.join(place, "none"), rig.nido, name], env=rig.env, check=True)
    vm = Vm(rig, name)
    if rig.json("info", name)["agent"]["transport"] != "virtio-serial":
        raise RuntimeError("a VM without vsock was wanted")
    return vm


def transports(bench):
    """Round trips and copies over both, in the same kind of guest."""
    rig = bench.rig
    over = {"vsock": rig.spawn("vsock", "--cold"), "virtio-serial": serial_vm(rig, bench.scratch)}
    check(over["vsock"])
    trips = Result("kvm round trip", "A ping of the agent, over an open session", "ms")
    copies = Result("kvm copy", f"Upload of {BIG // 4} MiB by nido, whole process", "MiB/s")
    source = bench.file(BIG // 4)

    def ping(session):
        begun = time.monotonic()
        session.ping()
        return (time.monotonic() - begun) * 1000

    def copy(vm):
        seconds = rig.timed("--quiet", "upload", vm.name, source, "/dev/shm/copy")
        vm.exec("rm", "/dev/shm/copy")
        return BIG / 4 / seconds

    with open_vsock(over["vsock"]) as vsock, wire.open_session(over["virtio-serial"].dir) as serial:
        sides = {"vsock": lambda: ping(vsock), "virtio-serial": lambda: ping(serial)}
        trips.samples = in_turns(sides, bench.count(300, 100), warm_up=10)
    copies.samples = in_turns({way: lambda vm=vm: copy(vm) for way, vm in over.items()}, bench.count(5, 3), warm_up=1, what="copy")
    # On a par: two medians of the same thing differ by this much.
    trips.require("vsock / virtio-serial", trips.median("vsock") / trips.median("virtio-serial"), "<=", 1.1)
    copies.require("vsock / virtio-serial", copies.median("vsock") / copies.median("virtio-serial"), ">=", 1)
    lanes = control(bench, over["vsock"])
    for vm in over.values():
        rig.delete(vm)
    return [trips, copies, lanes]


def control(bench, vm):
    """Whether the agent answers while a big copy runs."""
    result = Result("kvm control", f"A ping of the agent over vsock, idle and while {BIG} MiB are copied in", "ms")
    idle, busy = "idle", f"while {BIG} MiB are copied in"
    result.samples = {idle: [], busy: []}
    source, done = bench.file(BIG), threading.Event()

    def upload():
        try:
            bench.rig.run("--quiet", "upload", vm.name, source, "/root/copy")
        finally:
            done.set()

    def sample(session, side):
        begun = time.monotonic()
        session.ping()
        result.samples[side].append((time.monotonic() - begun) * 1000)
        time.sleep(0.02)

    with open_vsock(vm) as session:
        for _ in range(200):
            sample(session, idle)
        copy = threading.Thread(target=upload)
        copy.start()
        while not done.is_set():
            sample(session, busy)
        copy.join()
    p95 = {side: percentile(samples, 95) for side, samples in result.samples.items()}
    result.require("p95 while copying / p95 idle", p95[busy] / p95[idle], "<=", 5)
    return result


def kvm(bench):
    return [fork(bench), *transports(bench)]


def nested(bench):
    """`kvm`, in a VM of its own that has KVM and kernel vsock."""
    here = os.path.dirname(os.path.abspath(__file__))
    script = os.path.join(here, "..", "..", "scripts", "nested")
    say("  a VM with KVM of its own is made; this takes some minutes")
    found = os.path.join(bench.scratch, "nested.json")
    quick = ["--quick"] if bench.quick else []
    bench.rig.run("template", "build", "kvm-host")
    subprocess.run([script, "--bench", found, bench.rig.nido, *quick], env=bench.rig.env, check=True)
    with open(found, encoding="utf-8") as file:
        return [Result.of_json(one) for one in json.load(file)["results"]]


ALL = {"kvm": kvm, "nested": nested}
