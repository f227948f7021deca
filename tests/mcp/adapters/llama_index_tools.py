"""LlamaIndex' tools for MCP, as they are by default, with a server and a guest.

    llama_index_tools.py NIDO URL TOKEN

It opens a session for each call. It is run without a model: what a model would send is sent here.
"""

import asyncio
import os
import sys

from llama_index.tools.mcp import BasicMCPClient, McpToolSpec

nido, url, token = sys.argv[1:]
env = {key: value for key, value in os.environ.items() if key.startswith("NIDO_")}


async def story(client, name, **more):
    spec = McpToolSpec(client=client)
    tools = {tool.metadata.name: tool for tool in await spec.to_tool_list_async()}

    async def call(tool, **arguments):
        # The model's arguments go through the model of the tool, which fills in what is absent.
        whole = tools[tool].metadata.fn_schema.model_validate(arguments).model_dump()
        for sent in (arguments, whole):
            if tool == "vm_spawn" and sent is arguments:
                continue
            answer = await tools[tool].acall(**sent)
            assert not answer.is_error, answer
            result = answer.raw_output
            assert not result.is_error, (sent, result)
            said = "".join(block.text for block in result.content)
        return said

    await call("vm_spawn", name=name, net="none", ephemeral=True, **more)
    assert "running" in await call("vm_info", name=name)
    assert "of llama" in await call("vm_exec", name=name, command="echo of llama")
    assert "of llama" in await call("vm_exec", name=name, argv=["printenv", "WORD"], env={"WORD": "of llama"}, timeout_seconds=5.0)
    await call("vm_upload", name=name, path="/srv/file", content="of llama\n")
    assert "of llama" in await call("vm_download", name=name, path="/srv/file")
    assert name in await call("vm_ls")
    logs = await client.read_resource(f"vmops://vm/{name}/logs")
    assert logs.contents[0].text, logs


async def main():
    await story(BasicMCPClient(url, headers={"Authorization": f"Bearer {token}"}, timeout=120), "llama")
    # A session over stdio is a process: what is to be there for the next call outlives it, with a time to live.
    stdio = BasicMCPClient(nido, args=["mcp-server", "start"], env=env, timeout=120)
    await story(stdio, "llama-stdio", outlives_session=True, ttl_seconds=600)
    print("ok: LlamaIndex")


asyncio.run(asyncio.wait_for(main(), 600))
