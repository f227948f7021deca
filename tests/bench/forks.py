"""Forks, claims from a pool, snapshots: how soon a guest is there, and what it costs to have many.

Compared with the same done by hand (`bare.Baked`): QEMU started with nido's own arguments, the state loaded, the same
agent asked for a sign of life. By hand nothing is renewed, so two such guests are twins; nido's are not.
"""

import concurrent.futures
import json
import os
import tempfile
import time

import bare
import rest
import slim
import wire
from result import Result
from rig import host_kb, say
from sampling import in_turns

FORK, COLD, BARE = "`nido spawn`, forked, whole process", "`nido spawn --cold`, whole process", "bare script, forked"
SLIM_FORK, SLIM_COLD = "`nido spawn` with the slim kernel, forked", "`nido spawn --cold` with the slim kernel"
CLAIMED, BARE_CLAIM, RUN = "claim to ready", "bare script, claimed", "`nido run -- true`, whole process"


def bakes(rig):
    with open(os.path.join(rig.home, "templates", "sandbox.json"), encoding="utf-8") as manifest:
        return json.load(manifest)["bakes"]


def the_bake(rig, memory_mib=512, net="nat"):
    fits = lambda machine: (machine["memory_mib"], machine["net"], machine["cpus"]) == (memory_mib, net, 1)
    return next(bake for bake in bakes(rig) if fits(bake["machine"]))


def timed_spawn(rig, *flags):
    """Whole `nido spawn`; gives its seconds and nido's own account of the start. The VM is gone afterwards."""
    name = rig.fresh_name("spawn")
    seconds = rig.timed("spawn", name, *flags)
    timings = rig.json("info", name)["timings"]
    rig.run("delete", "--force", "--yes", name)
    return seconds, timings


def whole(rig, *flags):
    """Milliseconds of a whole `nido spawn`, to be called when it is its turn."""
    return lambda: timed_spawn(rig, *flags)[0] * 1000


def fork(bench):
    """A fork to ready, by nido and by hand, beside a cold boot."""
    rig = bench.rig
    with tempfile.TemporaryDirectory(dir=bench.scratch) as place:
        model = rig.spawn("model", "--fork")
        by_hand = bare.Baked(model, place, the_bake(rig))
        rig.delete(model)
        result = Result("fork", "Fork to ready, template `sandbox`", "ms")
        phases = {"until QEMU's monitor answers": [], "until the state is loaded": [], "until ready": []}

        def forked():
            seconds, timings = timed_spawn(rig, "--fork")
            for phase, key in zip(phases, ("qemu_ms", "load_ms", "total_ms"), strict=True):
                phases[phase].append(timings[key])
            return seconds * 1000

        sides = {FORK: forked, BARE: lambda: by_hand.boot() * 1000}
        colds = {COLD: whole(rig, "--cold")}
        lacking = slim.missing(rig)
        if lacking:
            say(f"  the slim kernel is not measured: {lacking}")
            result.notes.append(f"the slim kernel was not measured: {lacking}")
        else:
            sides[SLIM_FORK] = whole(rig, "--fork", "--template", slim.NAME)
            colds[SLIM_COLD] = whole(rig, "--cold", "--template", slim.NAME)
        result.samples = in_turns(sides, bench.count(40, 8), warm_up=2, what="fork")
        result.samples.update(in_turns(colds, bench.count(5, 2), what="cold"))
        result.samples.update({f"nido, {phase}": found for phase, found in phases.items()})
        result.require("nido's fork to ready / bare fork", result.median("nido, until ready") / result.median(BARE), "<=", 1.25)
        result.require("cold / fork", result.median(COLD) / result.median(FORK), ">=", 20)
        result.notes.append("nido resets the identity of each fork before it counts as ready: random numbers, clock, machine id, name, token")
        burst = burst_of(bench, by_hand)
    return [result, burst]


def burst_of(bench, by_hand):
    """Eight at once: until the last is ready."""
    rig, count = bench.rig, 8
    result = Result("burst", f"{count} forks at once, until the last is ready", "ms")

    def at_once(start, end):
        with concurrent.futures.ThreadPoolExecutor(count) as threads:
            begun = time.monotonic()
            started = list(threads.map(start, range(count)))
            seconds = time.monotonic() - begun
            list(threads.map(end, started))
        return seconds * 1000

    def with_nido():
        names = [rig.fresh_name("burst") for _ in range(count)]
        end = lambda name: rig.run("delete", "--force", "--yes", name)
        return at_once(lambda n: rig.timed("spawn", names[n], "--fork") and names[n], end)

    def bare_burst():
        return at_once(lambda n: by_hand.start(f"burst-{n}")[1], lambda end: end())

    sides = {"`nido spawn`": with_nido, "bare script": bare_burst}
    result.samples = in_turns(sides, bench.count(5, 2), what="burst")
    result.require("nido / bare", result.median("`nido spawn`") / result.median("bare script"), "<=", 1.3)
    return result


def flat(bench):
    """Whether a fork takes longer with more memory."""
    rig = bench.rig
    sizes = (256, 4096)
    for mib in sizes:
        rig.run("template", "bake", "sandbox", "--memory", f"{mib}M", "--net", "none")
    result = Result("flat", "Fork to ready (nido's own timings), by memory", "ms")
    spawn = lambda mib: lambda: timed_spawn(rig, "--fork", "--net", "none", "--memory", f"{mib}M")[1]["total_ms"]
    result.samples = in_turns({f"{mib} MiB": spawn(mib) for mib in sizes}, bench.count(15, 4), warm_up=1, what="flat")
    result.require("4 GiB / 256 MiB", result.median("4096 MiB") / result.median("256 MiB"), "<=", 1.2)
    return [result]


def known(bench):
    """Whether commands take longer with more VMs that nido knows, stopped ones."""
    rig, count = bench.rig, bench.count(500, 100)
    vm = rig.spawn("guest", "--fork")
    result = Result("known", f"Whole commands, by the number of stopped VMs in the home (1 and {count})", "ms")
    sides = {
        "`nido spawn --fork`": whole(rig, "--fork"),
        "`nido exec vm -- true`": lambda: rig.timed("exec", vm.name, "--", "true") * 1000,
        "`nido info vm`": lambda: rig.timed("info", vm.name) * 1000,
        "`nido ls`": lambda: rig.timed("ls") * 1000,
    }
    samples = {}
    made = []
    for number in (1, count):
        say(f"  creating VMs until there are {number}")
        while len(made) < number:
            made.append(rig.create("known").name)
        samples[number] = in_turns(sides, bench.count(20, 5), warm_up=1, what=f"{number} known")
        result.samples.update({f"{side}, {number}": found for side, found in samples[number].items()})
    shares = idle_shares(rig, vm, bench.count(60, 10))
    for start in range(0, count, 50):
        rig.run("delete", "--yes", *made[start : start + 50])
    rig.delete(vm)
    for process, share in shares.items():
        result.require(f"{process} with {count} VMs known, of a core", share, "<=", 1, "%")
    for side in sides:
        result.require(f"{side}: {count} / 1", result.median(f"{side}, {count}") / result.median(f"{side}, 1"), "<=", 1.2)
    return [result]


def cpu_seconds(pid):
    with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
        fields = stat.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def idle_shares(rig, vm, seconds):
    """Percent of a core that the guardian and a server take while nothing is requested: they reconcile now and then."""
    guardian = vm.guardian_pid()
    with rest.Server(rig) as server:
        time.sleep(5)
        pids = {"the guardian": guardian, "a server": server.process.pid}
        before, begun = {name: cpu_seconds(pid) for name, pid in pids.items()}, time.monotonic()
        time.sleep(seconds)
        taken = time.monotonic() - begun
        return {name: 100 * (cpu_seconds(pid) - before[name]) / taken for name, pid in pids.items()}


def many(bench):
    """Clones that run and do nothing: what each costs, and a fork among them."""
    rig, count, rest = bench.rig, bench.count(50, 10), bench.count(20, 5)
    result = Result("many", f"{count} idle clones", "ms")
    alone = "fork to ready, nothing else runs"
    spawn = lambda: timed_spawn(rig, "--fork")[1]["total_ms"]
    result.samples = in_turns({alone: spawn}, bench.count(10, 3), warm_up=1)
    say(f"  spawning {count} clones")
    clones = [rig.spawn("many", "--fork") for _ in range(count)]
    pids = [pid for vm in clones for pid in (vm.qemu_pid(), vm.supervisor_pid())]
    time.sleep(5)
    before, begun = sum(map(cpu_seconds, pids)), time.monotonic()
    time.sleep(rest)
    share = 100 * (sum(map(cpu_seconds, pids)) - before) / (time.monotonic() - begun) / count
    among = f"fork to ready, among {count}"
    result.samples.update(in_turns({among: spawn}, bench.count(10, 3)))
    pss = [sum(host_kb(pid, "Pss", "smaps_rollup") for pid in (vm.qemu_pid(), vm.supervisor_pid())) / 1024 for vm in clones]
    for vm in clones:
        rig.delete(vm)
    result.require("an idle clone, of a core", share, "<=", 1, "%")
    result.require("memory of a clone (PSS), supervisor included", sum(pss) / count, "<=", 45, "MiB")
    result.require("fork among them / alone", result.median(among) / result.median(alone), "<=", 2)
    return [result]


def pool(bench):
    """A clone that waits: claimed, and used for one command; beside one that waits by hand."""
    with tempfile.TemporaryDirectory(dir=bench.scratch) as place:
        model = bench.rig.spawn("model", "--fork")
        by_hand = bare.Baked(model, place, the_bake(bench.rig))
        bench.rig.delete(model)
        return [pool_beside(bench, by_hand)]


def full_pool(rig):
    """Waits until nothing is left to be made."""
    deadline = time.monotonic() + 120
    while any(entry["ready"] < entry["wanted"] for entry in rig.json("pool", "ls")["pools"]):
        if time.monotonic() > deadline:
            raise RuntimeError("the pool does not fill")
        time.sleep(0.1)
    # The filler has to be gone, too.
    time.sleep(0.5)


def pool_beside(bench, by_hand):
    rig = bench.rig
    result = Result("pool", "From the pool", "ms")

    def claim():
        full_pool(rig)
        _, timings = timed_spawn(rig)
        if timings["path"] != "pool":
            raise RuntimeError(f"the VM came from elsewhere: {timings}")
        return timings["total_ms"]

    def run():
        full_pool(rig)
        return rig.timed("run", "--", "true") * 1000

    def bare_claim():
        full_pool(rig)
        clone = by_hand.wait("waits")
        try:
            return clone.claim() * 1000
        finally:
            clone.end()

    rig.run("pool", "set", "sandbox", "4")
    sides = {CLAIMED: claim, BARE_CLAIM: bare_claim, RUN: run}
    try:
        result.samples = in_turns(sides, bench.count(20, 4), warm_up=1, what="pool")
    finally:
        rig.run("pool", "set", "sandbox", "0")
    result.require(CLAIMED, result.median(CLAIMED), "<=", 15, "ms")
    result.require("nido run -- true", result.median(RUN), "<=", 80, "ms")
    result.notes.append(
        "bare: a clone that was loaded, used and paused by hand; from QEMU's `cont` until a ping on its open session."
        " Nido also resets the clone's identity: random numbers, clock, name, token"
    )
    return result


DATA_MIB = 64


def filled(rig, word):
    """A VM with data in its memory that no other VM has."""
    vm = rig.spawn(word)
    vm.exec("sh", "-c", f"head -c {DATA_MIB}M /dev/urandom > /dev/shm/data")
    return vm


def paused(vm, result):
    """For how long a VM was paused, in milliseconds. An older nido writes it only to the supervisor's log."""
    if "paused_ms" in result:
        return float(result["paused_ms"])
    with open(os.path.join(vm.dir, "supervisor.log"), encoding="utf-8") as log:
        words = [line for line in log if "the VM was paused for" in line][-1].split()
    return float(words[words.index("ms") - 1])


def paused_by_snapshot(rig, vm):
    name = rig.fresh_name("snapshot")
    result = rig.json("snapshot", "create", vm.name, name)
    rig.run("snapshot", "delete", "--yes", vm.name, name)
    return paused(vm, result)


def paused_by_fork(rig, vm):
    name = rig.fresh_name("copy")
    result = rig.json("fork", vm.name, name)
    rig.run("delete", "--force", "--yes", name)
    return paused(vm, result)


def snapshots(bench):
    """A snapshot of a running VM: how long it stands still, and going back."""
    rig = bench.rig
    vm = filled(rig, "snapped")
    result = Result("snapshot", f"Snapshot of a running 512 MiB VM with {DATA_MIB} MiB of data in memory", "ms")
    create, restore = "`nido snapshot create`, whole process", "restore to ready"
    still, still_forked = "the VM is paused", "the VM is paused by `nido fork`"
    result.samples = {create: [], still: [], still_forked: [], restore: []}
    for number in range(bench.count(8, 2)):
        name = f"s{number}"
        result.samples[create].append(rig.timed("snapshot", "create", vm.name, name) * 1000)
        result.samples[still].append(paused(vm, rig.json("snapshot", "ls", vm.name)["snapshots"][-1]))
        result.samples[still_forked].append(paused_by_fork(rig, vm))
        rig.run("snapshot", "restore", vm.name, name)
        result.samples[restore].append(rig.json("info", vm.name)["timings"]["total_ms"])
        rig.run("snapshot", "delete", vm.name, name)
    rig.delete(vm)
    for name in (still, still_forked):
        result.require(name, result.median(name), "<=", 150, "ms")
    return [result]


ALL = {"fork": fork, "pool": pool, "flat": flat, "known": known, "many": many, "snapshot": snapshots}
