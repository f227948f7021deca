"""Another nido program beside this one: is a change slower?

Each program has a home of its own, because a home that a newer version has opened cannot be opened by an older one. Both
measure the same operation in turns, so that whatever else the machine does falls on both alike.
"""

import itertools
import os
import shutil
import statistics

import forks
import network
from result import Result
from rig import Rig, say
from sampling import in_turns

THIS, OTHER = "this program", "the other program"
# How much slower an operation may be, as a ratio of medians.
SLOWER_MAX = 1.03
MIB = 1 << 20
COPY_MIB = 64
# Memory sizes of the VMs that are forked, in MiB: each has a warm image of its own. Two warm images of one program can differ by
# several percent in how soon their forks are ready, so a single one of each program would compare the images.
MEMORY_MIB = (496, 512, 528, 544)


def other_home(rig):
    """Prepares a home for the other program, beside this one's, with the same templates."""
    home = rig.home.rstrip("/") + "-against"
    os.makedirs(home, mode=0o700, exist_ok=True)
    for part in ("blobs", "templates", "cache"):
        place = os.path.join(home, part)
        if not os.path.exists(place):
            # Linked, not copied: parts never change.
            shutil.copytree(os.path.join(rig.home, part), place, copy_function=os.link)
    return home


def ready(rig):
    """Gives a home its template and the warm image of the program that uses it."""
    rig.run("template", "build", "sandbox")
    for memory in MEMORY_MIB:
        rig.run("template", "bake", "sandbox", "--memory", f"{memory}M")


def spawned(rig):
    """Forks the program's warm images in turns."""
    sizes = itertools.cycle(MEMORY_MIB)
    return lambda: forks.timed_spawn(rig, "--fork", "--memory", f"{next(sizes)}M")[0] * 1000


def ran(rig):
    sizes = itertools.cycle(MEMORY_MIB)
    return lambda: rig.timed("run", "--memory", f"{next(sizes)}M", "--", "true") * 1000


def claimed(rig):
    forks.full_pool(rig)
    _, timings = forks.timed_spawn(rig)
    if timings["path"] != "pool":
        raise RuntimeError(f"the VM came from elsewhere: {timings}")
    return timings["total_ms"]


def against(bench, program):
    """Measures both programs; gives one result for each operation."""
    this = bench.rig
    with Rig(program, other_home(this), this.env.get("NIDO_QEMU")) as other:
        sides = {THIS: this, OTHER: other}
        for side, rig in sides.items():
            say(f"preparing {side}")
            ready(rig)
        vms = {side: rig.spawn("guest", "--fork") for side, rig in sides.items()}
        big = bench.file(COPY_MIB)
        back = os.path.join(bench.scratch, "against")

        def executed(side):
            return lambda: sides[side].timed("exec", vms[side].name, "--", "true") * 1000

        def uploaded(side):
            return lambda: sides[side].timed("--quiet", "upload", vms[side].name, big, "/root/up.bin") * 1000

        def downloaded(side):
            def measure():
                seconds = sides[side].timed("--quiet", "download", vms[side].name, "/root/up.bin", back)
                os.unlink(back)
                return seconds * 1000
            return measure

        def deleted(side):
            def measure():
                vm = sides[side].spawn("deleted", "--fork")
                return sides[side].timed("delete", "--force", "--yes", vm.name) * 1000
            return measure

        each = lambda measure: lambda side: measure(sides[side])
        of = lambda measure: lambda side: lambda: measure(sides[side])
        filled = {side: forks.filled(rig, "filled") for side, rig in sides.items()}
        still = lambda measure: lambda side: lambda: measure(sides[side], filled[side])
        operations = [
            ("snapshot", f"A running VM with {forks.DATA_MIB} MiB of data is paused by `nido snapshot create`", still(forks.paused_by_snapshot), bench.count(10, 3)),
            ("fork-paused", "The same VM is paused by `nido fork`", still(forks.paused_by_fork), bench.count(10, 3)),
            ("exec", "`nido exec vm -- true`, whole process", executed, bench.count(120, 10)),
            ("fork", "`nido spawn --fork`, whole process", each(spawned), bench.count(60, 8)),
            ("run", "`nido run -- true`, forked, whole process", each(ran), bench.count(40, 4)),
            ("delete", "`nido delete --force` of a running VM, whole process", deleted, bench.count(15, 3)),
            ("ls", "`nido ls`, whole process", of(lambda rig: rig.timed("ls") * 1000), bench.count(60, 10)),
            ("upload", f"`nido upload` of {COPY_MIB} MiB, whole process", uploaded, bench.count(8, 2)),
            ("download", f"`nido download` of {COPY_MIB} MiB, whole process", downloaded, bench.count(8, 2)),
        ]
        results = [compared(name, title, {side: measure(side) for side in sides}, count) for name, title, measure, count in operations]
        results += networks(sides, bench)
        for rig in sides.values():
            rig.run("pool", "set", "sandbox", "2")
        try:
            pools = {side: of(claimed)(side) for side in sides}
            results.append(compared("pool", "A claim from the pool to ready", pools, bench.count(20, 4)))
        finally:
            for rig in sides.values():
                rig.run("pool", "set", "sandbox", "0")
        return results


def networks(sides, bench):
    """The guest's network. QEMU's own one, which programs without rules use, has targets of its own."""
    server = network.Server()
    try:
        vms = {side: network.reaching(rig, "network", server.port) for side, rig in sides.items()}
        is_slirp = not vms[OTHER][1]
        size = network.TRANSFER_MIB * MIB
        operations = [
            ("net-up", f"The guest sends {network.TRANSFER_MIB} MiB", "up", size, 1 / 2.5),
            ("net-down", f"The guest receives {network.TRANSFER_MIB} MiB", "down", size, 1 / 1.4),
            ("net-connect", "The guest connects, median of 20", "connect", network.CONNECTIONS, None),
        ]
        results = []
        for name, title, what, amount, target in operations:
            measure = {side: network.measured(vm, what, server.port, amount) for side, (vm, _) in vms.items()}
            result = compared(name, title, measure, bench.count(10, 3), target if is_slirp else SLOWER_MAX)
            if target is None and is_slirp:
                result.require("longer than the other by", result.more(THIS, OTHER), "<=", 1, "ms")
            results.append(result)
        return results
    finally:
        server.close()


def compared(name, title, sides, count, most=SLOWER_MAX):
    """One operation, measured in turns. The figure is the median of the ratios of each turn."""
    result = Result(name, title, "ms", in_turns(sides, count, warm_up=1, what=name))
    ratios = [this / other for this, other in zip(result.samples[THIS], result.samples[OTHER], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4, method="inclusive")
    if most is not None:
        result.require(f"{THIS} / {OTHER}", statistics.median(ratios), "<=", most)
    result.notes.append(f"ratio of each turn: quartiles {quartiles[0]:.3f} and {quartiles[2]:.3f}")
    return result
