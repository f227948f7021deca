"""The findings as a Markdown page and as JSON. The page is `docs/performance.md`; nobody types it."""

import os
import platform
import re
import textwrap


def machine(rig):
    """What was measured, and where."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        model = re.search(r"^model name\s*: (.*)$", file.read(), re.MULTILINE)
    with open("/proc/meminfo", encoding="ascii") as file:
        memory = int(file.readline().split()[1])
    return {
        "processor": model.group(1) if model else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / (1 << 20), 1),
        "kernel": platform.release(),
        "nido": rig.output("--version").strip(),
        **seen_in_a_vm(rig),
    }


def seen_in_a_vm(rig):
    vm = rig.spawn("facts")
    try:
        info = rig.json("info", vm.name)
        qemu = vm.qemu_argv()[0]
        version = os.popen(f"'{qemu}' --version").read().splitlines()[0]
        facts = {key: info[key] for key in ("machine", "accel", "cpus", "memory_mib")}
        return {"qemu": version, **facts, "transport": info["agent"]["transport"], "guest_kernel": vm.exec("uname", "-r").strip()}
    finally:
        rig.delete(vm)


def figure(value, unit):
    if unit == "KiB":
        return f"{value:,.0f}"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def paragraph(text):
    """The lines of a paragraph, and the empty one after it."""
    return [*textwrap.wrap(text, 100, break_long_words=False, break_on_hyphens=False), ""]


def markdown(facts, results, command, picture=None):
    """The page; the picture is a file beside it."""
    lines = [
        "# Performance",
        "",
        *paragraph(
            "This page shows how fast nido is, compared with the same operation by hand and with other programs. It is for"
            " users who compare tools, and for developers."
        ),
        *paragraph(
            f"`{command}` measured everything and wrote this page. Both sides of a comparison were measured alternately, in"
            " one run. The figures are not a test: they depend on the machine and its load. Ratios are more portable than"
            " times."
        ),
        *paragraph(
            "A *fork* is a VM that continues from the saved memory of a booted one; the *pool* holds forks that were started"
            " in advance. The *supervisor* is nido's process for a running VM, the *agent* its program in the guest. *Bare*"
            " is a script that runs QEMU with the same arguments, without nido."
        ),
        *([f"![Time until a machine can be used, for each way to start it: the figures below]({picture})", ""] if picture else ()),
        "| | |",
        "|---|---|",
    ]
    lines += [f"| {key.replace('_', ' ')} | {value} |" for key, value in facts.items()]
    busy = float(facts["load_before_and_after"].split(",")[0])
    if busy > facts["cores"] / 2:
        lines += [
            "",
            f"**The machine was busy with other work** (a load of {busy:g} on {facts['cores']} cores before the first sample): times are",
            "too long and rates too low by about that much. Values that were measured alternately can still be compared.",
        ]
    lines += ["", "## Targets", "", "| measurement | figure | found | target | |", "|---|---|---|---|---|"]
    for result in results:
        for verdict in result.verdicts:
            word = "met" if verdict.met() else "**short**"
            unit = f" {verdict.unit}" if verdict.unit else ""
            found = f"{figure(verdict.value, '')}{unit}"
            lines.append(f"| {result.name} | {verdict.what} | {found} | {verdict.sign} {verdict.target:g}{unit} | {word} |")
    for result in results:
        body = result.json()
        lines += ["", f"## {result.title}"]
        if body["sides"]:
            lines += ["", f"In {result.unit}.", ""]
            lines += ["| | median | p95 | min | max | IQR | n |", "|---|---|---|---|---|---|---|"]
        for side, found in body["sides"].items():
            cells = [figure(found[key], result.unit) for key in ("median", "p95", "min", "max", "iqr")]
            lines.append(f"| {side} | {' | '.join(cells)} | {found['n']} |")
        for note in result.notes:
            lines += ["", *paragraph(f"{note[0].upper()}{note[1:]}.")[:-1]]
    return "\n".join(lines) + "\n"
