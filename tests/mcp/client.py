"""A session of the Python SDK's client with a real server: over stdio and over HTTP, in both eras of the protocol.

    client.py stdio COMMAND...      client.py http URL

Makes a VM, works in it, is asked before it is deleted, and says yes. Ends with 0 if all of it was as it should be.
"""

import asyncio
import os
import sys

import mcp
from mcp import types


async def session(server, mode):
    asked, steps = [], []

    async def elicit(context, params):
        asked.append(params.message)
        return types.ElicitResult(action="accept", content={"confirm": True})

    async def progress(done, total, message):
        steps.append(done)

    async with mcp.Client(server, mode=mode, elicitation_callback=elicit, read_timeout_seconds=120) as client:
        tools = {tool.name for tool in (await client.list_tools()).tools}
        assert {"vm_spawn", "vm_exec", "vm_delete", "job_get"} <= tools, tools
        name = f"py-{mode}".replace("_", "-")

        async def good(tool, progress_callback=None, **arguments):
            # The client holds what comes back against the tool's output schema.
            result = await client.call_tool(tool, arguments, progress_callback=progress_callback)
            assert not result.is_error, result
            return result.structured_content

        vm = await good("vm_spawn", progress_callback=progress, name=name, net="none", ttl_ms=600_000)
        assert vm["status"] == "running" and vm["expires_at"], vm
        assert steps == sorted(set(steps)), steps
        done = await good("vm_exec", name=name, command="echo out; echo err >&2; exit 3")
        assert (done["stdout"], done["stderr"], done["exit_code"]) == ("out\n", "err\n", 3), done
        await good("vm_upload", name=name, path="/tmp/py-client/file", content="grün\n")
        got = await good("vm_download", name=name, path="/tmp/py-client/file")
        assert got["content"] == "grün\n", got
        wrong = await client.call_tool("vm_exec", {"name": name})
        assert wrong.is_error and "argv" in wrong.content[0].text, wrong
        read = await client.read_resource("vmops://vms")
        assert name in read.contents[0].text
        prompt = await client.get_prompt("quick_sandbox", {"task": "say hello"})
        assert "say hello" in prompt.messages[0].content.text
        deleted = await good("vm_delete", name=name, force=True)
        assert deleted["name"] == name and asked and name in asked[0], asked
        gone = await client.call_tool("vm_info", {"name": name})
        assert gone.is_error and gone.structured_content["error"]["code"] == "vm_not_found", gone
        print(f"ok: {mode} speaks {client.protocol_version}")


async def main():
    kind, *rest = sys.argv[1:]
    server = rest[0] if kind == "http" else mcp.StdioServerParameters(command=rest[0], args=rest[1:], env=None)
    if kind == "stdio":
        server.env = {key: value for key, value in os.environ.items() if key.startswith("NIDO_") or key == "PATH"}
    for mode in ("2026-07-28", "legacy"):
        await session(server, mode)


asyncio.run(main())
