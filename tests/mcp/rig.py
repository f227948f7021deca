"""What the story and the hostile guest have in common: a session of the SDK's client, and what it heard.

Every wait has a deadline. Whatever a tool answers is held against its output schema by the SDK.
"""

import asyncio
import os
import subprocess
import time

import mcp
from mcp import types

DEADLINE = 120


class Rig:
    """One session: over HTTP if there is a URL, else with a server of its own; what was asked, and what came in by itself."""

    def __init__(self, nido, url, mode, *flags, forms=True):
        self.nido, self.server, self.mode, self.forms = nido, url, mode, forms
        # What the person answers; every question is kept.
        self.says, self.asked, self.heard = "accept", [], []
        # Over HTTP only the older era has any.
        self.has_session = not url or mode == "legacy"
        self.name = f"sdk-{'http' if url else 'stdio'}-{mode}"
        env = {key: value for key, value in os.environ.items() if key.startswith("NIDO_")}
        server = url or mcp.StdioServerParameters(command=nido, args=["mcp-server", "start", *flags], env=env)
        self.client = mcp.Client(
            server,
            mode=mode,
            elicitation_callback=self._elicit if forms else None,
            message_handler=self._hear,
            client_info=types.Implementation(name="sdk-tests", version="1"),
            read_timeout_seconds=DEADLINE,
        )

    def __str__(self):
        return self.name + ("" if self.forms else ", which cannot ask")

    async def __aenter__(self):
        await self.client.__aenter__()
        return self

    async def __aexit__(self, *error):
        return await self.client.__aexit__(*error)

    async def _elicit(self, context, params):
        self.asked.append(params.message)
        content = {"confirm": True} if self.says == "accept" else None
        return types.ElicitResult(action=self.says, content=content)

    async def _hear(self, message):
        self.heard.append(message)

    async def call(self, tool, progress=None, **arguments):
        return await self.client.call_tool(tool, arguments, progress_callback=progress)

    async def good(self, tool, progress=None, **arguments):
        """What a tool answers that has to work."""
        result = await self.call(tool, progress, **arguments)
        assert not result.is_error, f"{tool} {arguments}: {result}"
        return result.structured_content

    async def bad(self, code, tool, **arguments):
        """The error of a tool that has to fail with this code: as data, and in words."""
        result = await self.call(tool, **arguments)
        assert result.is_error, f"{tool} {arguments}: {result}"
        error = result.structured_content["error"]
        assert error["code"] == code and code in result.content[0].text, f"{tool} {arguments}: {result}"
        return error

    async def sh(self, command, **more):
        """What a line of shell in the guest writes, which has to succeed."""
        done = await self.good("vm_exec", name=self.name, command=command, **more)
        assert done["exit_code"] == 0, f"{command}: {done}"
        return done["stdout"]

    async def read(self, uri):
        return (await self.client.read_resource(uri)).contents[0].text

    def by_hand(self, *words):
        """What a person does at the machine."""
        return subprocess.run([self.nido, *words], check=True, capture_output=True, text=True, timeout=DEADLINE).stdout


async def until(what, check):
    """Asks again until it is so."""
    end = time.monotonic() + DEADLINE
    while True:
        found = await check()
        if found:
            return found
        assert time.monotonic() < end, f"waited in vain for {what}"
        await asyncio.sleep(0.1)


class Steps:
    """Takes progress in, and says whether it only ever grew."""

    def __init__(self):
        self.done, self.totals = [], set()

    async def __call__(self, done, total, message):
        assert message, (done, total)
        self.done.append(done)
        self.totals.add(total)

    def check(self, least, total=None):
        assert total is None or self.totals == {total}, self.totals
        assert len(self.done) >= least, self.done
        assert all(a < b for a, b in zip(self.done, self.done[1:])), f"progress has to grow: {self.done}"
