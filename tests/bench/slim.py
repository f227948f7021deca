"""The template with the slim kernel, `sandbox-slim`: whether the home has it, and how it is made.

Compiling a kernel takes minutes, so it is only done when asked for; where a compiled one is kept in the home, the template
is made of it. The template `sandbox` has afterwards the kernel it had before.
"""

import glob
import os

from rig import say

NAME, SUFFIX = "sandbox-slim", "-nido-slim"


def templates(rig):
    """What is built in the home: each template's entry by its name."""
    return {entry["name"]: entry for entry in rig.json("template", "ls")["templates"]}


def is_slim(entry):
    return entry["kernel"].endswith(SUFFIX)


def missing(rig):
    """Why the slim kernel cannot be measured here; nothing if it can."""
    entry = templates(rig).get(NAME)
    if not entry:
        return f"this home has no template `{NAME}` (`scripts/bench --slim` makes it: a kernel is compiled)"
    if not is_slim(entry):
        return f"the template `{NAME}` of this home has another kernel, {entry['kernel']}"
    return None


def make(rig, compile_it):
    """Makes the template if it is not there and a slim kernel is, or may be compiled."""
    found = templates(rig)
    kept = glob.glob(os.path.join(rig.home, "cache", "kernels", "slim-*"))
    if NAME in found or not (compile_it or kept or is_slim(found["sandbox"])):
        return
    say(f"making the template {NAME}" + ("" if kept or is_slim(found["sandbox"]) else ", a kernel is compiled for it"))
    try:
        _make(rig, is_slim(found["sandbox"]))
    except RuntimeError as error:
        if compile_it:
            raise
        say(f"  it could not be made: {error}")


def _make(rig, already):
    try:
        if not already:
            rig.run("template", "build", "sandbox", "--kernel", "slim", "--no-bake")
        vm = rig.spawn("slim", "--cold")
        rig.run("stop", vm.name)
        rig.run("template", "create", NAME, "--from", vm.name)
        rig.delete(vm)
    finally:
        if not already:
            rig.run("template", "build", "sandbox", "--kernel", "stock")
