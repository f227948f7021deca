"""Measures nido beside what people would otherwise use, and prints a table. Started by `scripts/bench`."""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time

import against
import measures
import plot
import report
import slim
from rig import Rig, say


def arguments():
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few samples: does it work, is anything far off")
    parser.add_argument("--only", metavar="NAME", action="append", choices=list(measures.ALL),
                        help=f"only this measurement; may be repeated ({', '.join(measures.ALL)})")
    parser.add_argument("--json", metavar="FILE", help="write everything, each sample included, as JSON")
    parser.add_argument("--write", metavar="FILE", nargs="?", const="docs/performance.md",
                        help="write the page as well, and its picture beside it (docs/performance.md, .svg; needs all"
                             " measurements)")
    parser.add_argument("--qemu", metavar="PATH", help="another QEMU")
    parser.add_argument("--slim", action="store_true",
                        help="make the template sandbox-slim first: compiles a kernel, some minutes")
    parser.add_argument("--against", metavar="PROGRAM",
                        help="compare with another nido program instead: the same operations, measured alternately")
    parser.add_argument("--nido", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--home", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--from", dest="start", default=".", help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    # Files are named as seen from where the command was given; the page has its place in the checkout.
    for option in ("json", "qemu", "against"):
        if getattr(parsed, option):
            setattr(parsed, option, os.path.join(parsed.start, getattr(parsed, option)))
    if parsed.write and (parsed.only or parsed.against):
        parser.error("--write needs all measurements: leave out --only and --against")
    return parsed


def measure(args, scratch):
    """Runs the measurements; gives the machine's facts and the results."""
    results = []
    with Rig(args.nido, args.home, args.qemu) as rig:
        names = args.only or [name for name in measures.ALL if name != "kvm"]
        names = [] if args.against else names
        if args.slim or "fork" in names:
            slim.make(rig, args.slim)
        say("what is measured")
        before = os.getloadavg()
        facts = report.machine(rig)
        bench = measures.Bench(rig, scratch, args.quick)
        for name in names:
            say(f"{name} ({time.strftime('%H:%M:%S')})")
            results += measures.ALL[name](bench)
        if args.against:
            facts["the_other_program"] = Rig(args.against, rig.home).output("--version").strip()
            results += against.against(bench, args.against)
        # nido's own guest is one process that computes; much more than that was somebody else.
        facts["load_before_and_after"] = f"{before[0]:.1f}, {os.getloadavg()[0]:.1f}"
    return facts, results


def main():
    args = arguments()
    # Ended from outside it cleans up as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    scratch = tempfile.mkdtemp(prefix="nido-bench-", dir=args.home)
    try:
        facts, results = measure(args, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    command = " ".join(["scripts/bench", *(f"--{word}" for word in ("quick", "slim", "write") if getattr(args, word))])
    picture = plot.svg(results) if args.write else None
    beside = os.path.splitext(args.write)[0] + ".svg" if picture else None
    page = report.markdown(facts, results, command, beside and os.path.basename(beside))
    print(page, end="")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"machine": facts, "results": [result.json() for result in results]}, file, indent=1)
            file.write("\n")
    if args.write:
        with open(args.write, "w", encoding="utf-8") as file:
            file.write(page)
    if picture:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(picture)
    return 0


sys.exit(main())
