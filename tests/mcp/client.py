"""The client of the Python SDK with a real server and a real guest: over stdio and over HTTP, in both eras of the protocol.

    client.py NIDO http URL      client.py NIDO stdio

Makes a VM, works in it, goes back, is asked before anything is destroyed, listens, cancels, meets a guest that wants to be
obeyed, and leaves a throw-away VM behind. Ends with 0 if all of it was as it should be.
"""

import asyncio
import base64
import json
import os
import pathlib
import sys
import time
import warnings

from hostile import harmless, hostile
from mcp import MCPDeprecationWarning, MCPError, types
from rig import DEADLINE, Rig, Steps, until

TOOLS = {
    "vm_ls", "vm_info", "vm_spawn", "vm_create", "vm_start", "vm_stop", "vm_delete", "vm_exec", "vm_upload", "vm_download",
    "vm_snapshot", "vm_restore", "template_list", "template_create", "job_get", "job_cancel", "vm_run", "vm_logs", "vm_ports",
    "vm_fork", "vm_network",
}
# "auto" asks with server/discover.
ERAS = {"auto": "2026-07-28", "legacy": "2025-11-25"}


async def looks(rig):
    """Who answers, and what there is."""
    client = rig.client
    assert client.protocol_version == ERAS[rig.mode], client.protocol_version
    assert client.server_info.name == "nido" and "vm_spawn" in client.instructions
    tools = (await client.list_tools()).tools
    assert {tool.name for tool in tools} == TOOLS, tools
    for tool in tools:
        hints = tool.annotations
        told = (hints.read_only_hint, hints.destructive_hint, hints.idempotent_hint, hints.open_world_hint)
        assert None not in told and tool.title and tool.description and tool.output_schema, tool
    uris = {str(one.uri) for one in (await client.list_resources()).resources}
    assert {"vmops://vms", "vmops://templates"} <= uris, uris
    kinds = [one.uri_template for one in (await client.list_resource_templates()).resource_templates]
    assert kinds == ["vmops://vm/{name}/logs"], kinds
    prompts = {prompt.name for prompt in (await client.list_prompts()).prompts}
    assert prompts == {"deploy_and_test", "quick_sandbox"}, prompts
    prompt = await client.get_prompt("quick_sandbox", {"task": "say hello"})
    assert "say hello" in prompt.messages[0].content.text
    found = await client.complete(types.PromptReference(type="ref/prompt", name="quick_sandbox"), {"name": "template", "value": "sand"})
    assert found.completion.values == ["sandbox"], found
    try:
        await client.read_resource("vmops://vm/nobody/logs")
        raise AssertionError("a console of nobody was read")
    except MCPError as error:
        assert error.error.data["uri"] == "vmops://vm/nobody/logs", error.error


async def lives(rig):
    """A VM is made, once, and works."""
    steps, wanted = Steps(), dict(name=rig.name, net="none", ttl_ms=1_800_000, labels={"by": "tests"})
    vm = await rig.good("vm_spawn", steps, **wanted)
    assert vm["status"] == "running" and vm["expires_at"], vm
    assert (await rig.good("vm_info", name=rig.name))["net"] == "none"
    steps.check(least=1)
    again = await rig.good("vm_spawn", **wanted)
    assert again["id"] == vm["id"]
    await rig.bad("vm_exists", "vm_spawn", name=rig.name, net="nat")
    assert [one["id"] for one in (await rig.good("vm_ls", labels={"by": "tests"}))["vms"]] == [vm["id"]]
    assert rig.name in await rig.read("vmops://vms")
    # One core: the command line tells the same.
    info = json.loads(rig.by_hand("--json", "info", rig.name))
    assert (info["id"], info["labels"]) == (vm["id"], {"by": "tests"}), info


async def works(rig):
    """Commands and files."""
    done = await rig.good("vm_exec", name=rig.name, command="echo out; echo err >&2; exit 3")
    assert (done["stdout"], done["stderr"], done["exit_code"]) == ("out\n", "err\n", 3), done
    done = await rig.good("vm_exec", name=rig.name, argv=["printf", "%s|", "a b", "$HOME", "*"])
    assert done["stdout"] == "a b|$HOME|*|", done
    done = await rig.good("vm_exec", name=rig.name, argv=["tr", "a-z", "A-Z"], stdin="grün", env={"LC_ALL": "C"})
    assert done["stdout"] == "GRüN", done
    done = await rig.good("vm_exec", name=rig.name, argv=["sleep", "1000"], timeout_ms=500)
    assert done["timed_out"], done
    await rig.good("vm_upload", name=rig.name, path="/srv/sdk/file", content="grün\n", mode="600")
    assert await rig.sh("stat -c %a /srv/sdk/file; cat /srv/sdk/file") == "600\ngrün\n"
    got = await rig.good("vm_download", name=rig.name, path="/srv/sdk/file")
    assert got["content"] == "grün\n" and got["bytes"] == 6, got
    raw = bytes(range(256)) * 300
    await rig.good("vm_upload", name=rig.name, path="/srv/sdk/raw", content_base64=base64.b64encode(raw).decode())
    got = await rig.good("vm_download", name=rig.name, path="/srv/sdk/raw", max_bytes=100_000)
    assert base64.b64decode(got["content_base64"]) == raw
    await rig.bad("guest_not_found", "vm_download", name=rig.name, path="/nowhere")
    error = await rig.bad("spec_invalid", "vm_exec", name=rig.name)
    assert "argv" in error["message"], error
    await rig.bad("vm_not_found", "vm_exec", name="nobody", argv=["true"])


async def several_in_one(rig):
    """A run, logs, a published port and a copy of a VM that runs."""
    ran = await rig.good("vm_run", command="echo $((6 * 7)); hostname", net="none")
    assert ran["stdout"].startswith("42\nrun-") and ran["exit_code"] == 0, ran
    assert rig.by_hand("--quiet", "ls").split() == [rig.name]
    log = await rig.good("vm_logs", name=rig.name)
    assert "state: running" in log["log"], log
    harmless(log["log"])
    await rig.sh("nohup python3 -m http.server 8000 -b 127.0.0.1 >/dev/null 2>&1 &")
    ports = (await rig.good("vm_ports", name=rig.name, publish="8000"))["forwards"]
    assert ports[0]["guest_port"] == 8000 and ports[0]["host_port"] > 0, ports
    assert (await rig.good("vm_ports", name=rig.name, unpublish="8000"))["forwards"] == []
    await rig.sh("echo kept >/srv/kept")
    copy = f"{rig.name}-copy"
    copies = (await rig.good("vm_fork", name=rig.name, copies=[copy]))["vms"]
    assert [(one["name"], one["status"]) for one in copies] == [(copy, "running")], copies
    done = await rig.good("vm_exec", name=copy, command="cat /srv/kept; hostname")
    assert done["stdout"] == f"kept\n{copy}\n", done
    rig.by_hand("delete", "--force", "--yes", copy)


async def cancelled(rig, steps, tool, **arguments):
    """A call that is given up as soon as it is told how it goes."""
    call = asyncio.create_task(rig.call(tool, steps, **arguments))

    async def told():
        assert not call.done(), call
        return steps.done

    await until(f"progress of {tool}", told)
    call.cancel()
    try:
        await call
        raise AssertionError(f"{tool} was not cancelled")
    except asyncio.CancelledError:
        pass
    steps.check(least=1)


async def copies(rig):
    """Files of the host in and out, with the whole told beforehand; a copy that is cancelled leaves nothing behind."""
    # Over HTTP nothing of the host may be named.
    if rig.server:
        error = await rig.bad("denied", "vm_upload", name=rig.name, source="/etc/passwd", path="/srv/passwd")
        assert error["next_step"], error
        return
    place = pathlib.Path(os.environ["NIDO_HOME"], "exchange")
    large, back = place / "large", place / "back"
    size = 64 << 20
    with open(large, "wb") as file:
        file.truncate(size)
    up, down = Steps(), Steps()
    await rig.good("vm_upload", up, name=rig.name, source=str(large), path="/srv/copies/large")
    assert await rig.sh("stat -c %s /srv/copies/large") == f"{size}\n"
    await rig.good("vm_download", down, name=rig.name, path="/srv/copies/large", destination=str(back))
    assert back.stat().st_size == size
    for steps in (up, down):
        steps.check(least=1, total=size)
    back.unlink()
    # Not of holes, which take no time.
    longer = 640 << 20
    with open(large, "wb") as file:
        for _ in range(longer >> 20):
            file.write(b"\x01" * (1 << 20))
    await rig.sh("rm /srv/copies/large")
    steps = Steps()
    await cancelled(rig, steps, "vm_upload", name=rig.name, source=str(large), path="/srv/copies/large")
    steps.check(least=1, total=longer)

    async def nothing():
        return await rig.sh("ls -A /srv/copies") == ""

    await until("the end of a copy that was cancelled", nothing)
    large.unlink()


async def templates(rig):
    """A template is made of the VM, stage by stage; one that is cancelled is not there."""
    name, steps = f"{rig.name}-template", Steps()
    made = await rig.good("template_create", steps, name=name, **{"from": rig.name}, no_bake=True)
    while "job_id" in made:
        job = await rig.good("job_get", job_id=made["job_id"], wait_ms=10_000)
        made = made if job["state"] == "running" else job["result"]
    assert made["template"]["name"] == name, made
    steps.check(least=1)

    async def names():
        return {one["name"] for one in (await rig.good("template_list"))["templates"]}

    assert name in await names()
    other = f"{name}-2"
    await cancelled(rig, Steps(), "template_create", name=other, **{"from": rig.name})

    async def gone():
        vms = json.loads(rig.by_hand("--json", "ls"))["vms"]
        return other not in await names() and [one["name"] for one in vms] == [rig.name]

    await until("the end of a template that was cancelled", gone)
    rig.by_hand("template", "delete", name)


async def goes_back(rig):
    """A snapshot, and back to it: not without a yes."""
    await rig.sh("echo before >/srv/state")
    kept = await rig.good("vm_snapshot", name=rig.name, snapshot="clean")
    assert kept["name"] == "clean" and kept["running"], kept
    await rig.sh("echo after >/srv/state; sync")
    back = dict(name=rig.name, snapshot="clean")
    if rig.forms:
        rig.says = "decline"
        await rig.bad("denied", "vm_restore", **back)
        # A user who said no is asked again twice, and not more often.
        for _ in range(3):
            await rig.bad("denied", "vm_restore", **back)
        assert len(rig.asked) == 3 and f"'{rig.name}'" in rig.asked[0], rig.asked
        harmless(rig.asked[0])
        assert await rig.sh("cat /srv/state") == "after\n"
        rig.says = "accept"
        vm = await rig.good("vm_restore", **back, timeout_ms=120_000)
        assert len(rig.asked) == 4, rig.asked
    else:
        vm = await by_hand(rig, "vm_restore", **back)
    assert vm["status"] == "running", vm
    assert await rig.sh("cat /srv/state") == "before\n"
    rig.asked.clear()


async def by_hand(rig, tool, **arguments):
    """What is done when the client cannot ask: a person approves at the machine."""
    error = await rig.bad("approval_required", tool, **arguments)
    given = error["approval_id"]
    assert f"nido approve {given}" in error["hint"], error
    # A model's own word is none.
    await rig.bad("approval_required", tool, **arguments, approval_id=given)
    assert given in rig.by_hand("approvals")
    rig.by_hand("approve", "--yes", given)
    done = await rig.good(tool, **arguments, approval_id=given)
    # One yes, one use.
    await rig.bad("vm_not_found" if tool == "vm_delete" else "approval_required", tool, **arguments, approval_id=given)
    return done


async def listens(rig):
    """Told when something happens to VMs, and only of what was asked for."""
    uri, other = "vmops://vms", "vmops://vm/nobody/logs"
    other_vm = f"{rig.name}-2"

    async def happens():
        await rig.good("vm_create", name=other_vm, ephemeral=True)

    if rig.mode == "legacy":
        def updates():
            return {str(one.params.uri) for one in rig.heard if isinstance(one, types.ResourceUpdatedNotification)}

        async def told():
            return uri in updates() and any(isinstance(one, types.ResourceListChangedNotification) for one in rig.heard)

        await rig.client.subscribe_resource(uri)
        await rig.client.subscribe_resource(other)
        rig.heard.clear()
        await happens()
        await until("the notifications", told)
        assert other not in updates(), rig.heard
        await rig.client.unsubscribe_resource(uri)
    else:
        async with rig.client.listen(resource_subscriptions=[uri, other], resources_list_changed=True) as changes:
            await happens()
            missing = {"ResourceUpdated", "ResourcesListChanged"}
            async with asyncio.timeout(DEADLINE):
                async for change in changes:
                    assert getattr(change, "uri", uri) == uri, change
                    missing.discard(type(change).__name__)
                    if not missing:
                        break
    assert other_vm in await rig.read(uri)
    # A throw-away VM of one's own: nobody is asked.
    await rig.good("vm_delete", name=other_vm)
    assert not rig.asked, rig.asked


async def cancels(rig):
    """Cancelling a call kills its command in the guest; until then it is told how it goes."""
    steps, mark = Steps(), "sleep 98765"
    call = asyncio.create_task(rig.call("vm_exec", steps, name=rig.name, argv=mark.split(), timeout_ms=0))

    async def runs():
        return bool(await rig.sh(f"pgrep -fx '{mark}' || true"))

    async def told_twice():
        assert not call.done(), call
        return len(steps.done) >= 2

    await until("the command", runs)
    await until("progress", told_twice)
    call.cancel()
    try:
        await call
        raise AssertionError("the call was not cancelled")
    except asyncio.CancelledError:
        pass

    async def gone():
        return not await runs()

    await until("the end of the command", gone)
    steps.check(least=2)


async def lasts(rig):
    """What a client would not wait for goes on as a job, and can be cancelled."""
    begun = await rig.good("vm_exec", name=rig.name, command="sleep 4; echo at last")
    assert begun["status"] == "running" and begun["job_id"], begun

    async def ended():
        job = await rig.good("job_get", job_id=begun["job_id"], wait_ms=10_000)
        return job if job["state"] != "running" else None

    job = await until("the job", ended)
    assert job["state"] == "done" and job["result"]["stdout"] == "at last\n", job
    mark = "sleep 87654"
    begun = await rig.good("vm_exec", name=rig.name, argv=mark.split(), timeout_ms=0)
    assert await rig.sh(f"pgrep -fx '{mark}'")
    await rig.good("job_cancel", job_id=begun["job_id"])
    job = await until("the cancelled job", ended)
    assert job["state"] == "cancelled", job
    assert await rig.sh(f"pgrep -fx '{mark}' || true") == ""


async def ends(rig):
    """Deleted, and not without a yes."""
    gone = dict(name=rig.name, force=True)
    if rig.forms:
        rig.says = "decline"
        # What cannot be done is not asked about.
        await rig.bad("vm_busy", "vm_delete", name=rig.name)
        assert not rig.asked, rig.asked
        await rig.bad("denied", "vm_delete", **gone)
        assert (await rig.good("vm_info", name=rig.name))["status"] == "running"
        rig.says = "accept"
        deleted = await rig.good("vm_delete", **gone)
        assert len(rig.asked) == 2 and all(f"'{rig.name}'" in words for words in rig.asked), rig.asked
    else:
        deleted = await by_hand(rig, "vm_delete", **gone)
    assert deleted["name"] == rig.name
    await rig.bad("vm_not_found", "vm_info", name=rig.name)
    assert rig.by_hand("--quiet", "ls") == ""


async def leaves(rig):
    """A throw-away VM is left behind: what becomes of it, `left` looks at when the session is over."""
    vm = await rig.good("vm_spawn", name=rig.name, net="none", ephemeral=True)
    assert vm["lease"] and (await rig.good("vm_info", name=rig.name))["lease"] == vm["lease"], vm
    # Where there are no sessions it has a time, without having been given one.
    assert ("expires_at" in vm) == (not rig.has_session), vm


async def left(rig):
    """It goes with its session; without one it stays until its time is up, or the server ends."""

    async def there():
        return rig.by_hand("--quiet", "ls") != ""

    async def gone():
        return not await there()

    if rig.has_session:
        await until("the end of the throw-away VM", gone)
    else:
        assert await there()
        rig.by_hand("delete", "--force", "--yes", rig.name)


async def ends_unasked(rig):
    """With --confirm never nobody is asked."""
    await rig.good("vm_delete", name=rig.name, force=True)
    assert not rig.asked and rig.by_hand("--quiet", "ls") == "", rig.asked


async def told(rig, *acts):
    """One session from its beginning to its end."""
    async with rig:
        for act in acts:
            began = time.monotonic()
            await act(rig)
            print(f"ok: {rig}: {act.__name__} ({time.monotonic() - began:.1f} s)", flush=True)
    if leaves in acts:
        await left(rig)
        print(f"ok: {rig}: left", flush=True)


async def main():
    nido, kind, *rest = sys.argv[1:]
    server = rest[0] if kind == "http" else None
    for mode in ERAS:
        await told(Rig(nido, server, mode), looks, lives, works, several_in_one, copies, templates, goes_back, listens, cancels, hostile, ends, leaves)
        await told(Rig(nido, server, mode, forms=False), lives, goes_back, ends)
        if kind == "stdio":
            await told(Rig(nido, None, mode, "--answer-within", "3s", "--confirm", "never"), lives, lasts, ends_unasked)


# The older era is what is tried.
warnings.simplefilter("ignore", MCPDeprecationWarning)
asyncio.run(main())
