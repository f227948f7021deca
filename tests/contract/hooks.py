"""What the description allows and this run leaves alone, value by value: what would take minutes, or for ever.

A template that is built anew is fetched from Debian, and its kernel compiled. That is left out only where there is such a recipe; all
else of the operation is tried. A log that is followed ends when its VM does, if ever. To bake a template is a boot, half a minute under
emulation: it is done on the usual kind of machine, and of a template that is made of a VM with the examples and with what lies around
them, not again for every value that chance brings. The endpoint that takes test messages is not removed; others are.
"""

import os
import uuid

import schemathesis

RECIPES = ("sandbox", "debian-12", "kvm-host")


@schemathesis.hook("filter_case").apply_to(operation_id="template_build")
def is_built_quickly(context, case):
    body = case.body if isinstance(case.body, dict) else {}
    return case.path_parameters.get("name") not in RECIPES or not (body.get("rebuild") is True or body.get("slim_kernel") is True)


@schemathesis.hook("filter_case").apply_to(operation_id="vm_logs")
def ends(context, case):
    return str((case.query or {}).get("follow")).lower() != "true"


@schemathesis.hook("filter_case").apply_to(operation_id="template_create")
def is_not_baked_again(context, case):
    body = case.body if isinstance(case.body, dict) else {}
    phase = case.meta.phase.name if case.meta else None
    return phase in ("examples", "coverage") or body.get("no_bake", False) is not False


@schemathesis.hook("filter_case").apply_to(operation_id="template_bake")
def is_a_usual_bake(context, case):
    body = case.body if isinstance(case.body, dict) else {}
    return not (body.get("again") is True or body.get("nested") is True or body.get("machine") in ("pc", "q35"))


@schemathesis.hook("filter_case").apply_to(operation_id="webhook_remove")
def is_of_the_run(context, case):
    return case.path_parameters.get("id") != os.environ["CONTRACT_WEBHOOK"]


@schemathesis.hook
def before_call(context, case, kwargs):
    """A key that two requests share is refused, as it should be: each that can be one is made another."""
    key = (case.headers or {}).get("Idempotency-Key")
    if isinstance(key, str) and 1 <= len(key) <= 255 and key.strip() and key.isascii() and key.isprintable():
        case.headers["Idempotency-Key"] = str(uuid.uuid4())
