"""What the description allows and this run leaves alone, value by value: what would take minutes, or for ever.

A template that is built anew is fetched from Debian, and its kernel compiled. A log that is followed ends when its VM does. These are
left out only where there is such a template, or a VM that runs; all else of these operations is tried. A template that is made of a VM
is baked at once, unless that is not wanted: a boot, half a minute under emulation. That is tried with the examples and with what lies
around them, and not again for every value that chance brings. The endpoint that takes test messages is not removed; others are.
"""

import os

import schemathesis

RECIPES = ("sandbox", "debian-12", "kvm-host")
# Made by the script, and never started.
AT_REST = "still"


@schemathesis.hook("filter_case").apply_to(operation_id="template_build")
def is_built_quickly(context, case):
    body = case.body if isinstance(case.body, dict) else {}
    return case.path_parameters.get("name") not in RECIPES or not (body.get("rebuild") is True or body.get("slim_kernel") is True)


@schemathesis.hook("filter_case").apply_to(operation_id="vm_logs")
def ends(context, case):
    return str((case.query or {}).get("follow")).lower() != "true" or case.path_parameters.get("name") == AT_REST


@schemathesis.hook("filter_case").apply_to(operation_id="template_create")
def is_not_baked_again(context, case):
    body = case.body if isinstance(case.body, dict) else {}
    phase = case.meta.phase.name if case.meta else None
    return phase in ("examples", "coverage") or body.get("no_bake", False) is not False


@schemathesis.hook("filter_case").apply_to(operation_id="webhook_remove")
def is_of_the_run(context, case):
    return case.path_parameters.get("id") != os.environ["CONTRACT_WEBHOOK"]
