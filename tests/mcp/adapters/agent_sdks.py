"""The adapters of LangChain, of the OpenAI Agents SDK and of google-genai, as they are by default, with a server and a guest.

    agent_sdks.py NIDO URL TOKEN

They are run without a model: what a model would send is sent here, in the forms that these libraries ask models for.
"""

import asyncio
import json
import os
import pathlib
import sys

from agents.mcp import MCPServerStdio, MCPServerStreamableHttp, MCPUtil
from agents.run_context import RunContextWrapper
from agents.tool_context import ToolContext
from google.genai import _mcp_utils
from langchain_mcp_adapters.client import MultiServerMCPClient
from langchain_mcp_adapters.tools import load_mcp_tools

nido, url, token = sys.argv[1:]
headers = {"Authorization": f"Bearer {token}"}
env = {key: value for key, value in os.environ.items() if key.startswith("NIDO_")}
server = {"command": nido, "args": ["mcp-server", "start"], "env": env}
# Maps cannot be written in the subset of JSON Schema that strict mode takes; the SDK offers these tools without it.
WITH_MAPS = {"vm_exec", "vm_spawn", "vm_ls"}


def text(answer):
    """What a model is given to read."""
    return answer if isinstance(answer, str) else "".join(block["text"] for block in answer)


async def langchain():
    """A session for each call over HTTP, which is what `get_tools` does; one session over stdio."""
    client = MultiServerMCPClient({"nido": {"transport": "streamable_http", "url": url, "headers": headers}})
    tools = {tool.name: tool for tool in await client.get_tools()}
    # Throw-away VMs outlast the session that each call has.
    await tools["vm_spawn"].ainvoke({"name": "chain", "net": "none", "ephemeral": True})
    said = text(await tools["vm_exec"].ainvoke({"name": "chain", "command": "echo said; exit 3"}))
    assert "said" in said and "3" in said, said
    await tools["vm_upload"].ainvoke({"name": "chain", "path": "/srv/file", "content": "of langchain\n"})
    said = text(await tools["vm_download"].ainvoke({"name": "chain", "path": "/srv/file"}))
    assert "of langchain" in said, said
    # As a model repeats them: numbers, lists and maps in strings, and fields that are there without a value.
    wrapped = {"name": "chain", "argv": '["sh", "-c", "echo $WORD"]', "env": '{"WORD": "wrapped"}', "timeout_seconds": "5"}
    said = text(await tools["vm_exec"].ainvoke({**wrapped, "command": None, "stdin": "", "user": ""}))
    assert "wrapped" in said, said
    try:
        said = text(await tools["vm_exec"].ainvoke({"name": "nobody", "command": "true"}))
    except Exception as error:  # noqa: BLE001: which class it is depends on the version
        said = str(error)
    assert "vm_not_found" in said or "no VM" in said, said
    # A person is asked before a VM is destroyed, and this client cannot ask: the throw-away VM goes with its sessions.
    logs = await client.get_resources("nido", uris=["vmops://vm/chain/logs"])
    assert logs and logs[0].as_string(), logs
    prompt = await client.get_prompt("nido", "quick_sandbox", arguments={"task": "say hello"})
    assert "say hello" in prompt[0].content, prompt

    client = MultiServerMCPClient({"nido": {"transport": "stdio", **server}})
    async with client.session("nido") as session:
        tools = {tool.name: tool for tool in await load_mcp_tools(session)}
        await tools["vm_spawn"].ainvoke({"name": "chain-stdio", "net": "none", "ephemeral": True})
        said = text(await tools["vm_exec"].ainvoke({"name": "chain-stdio", "command": "echo said"}))
        assert "said" in said, said
    print("ok: LangChain")


def as_strict_mode_has_it(schema):
    """Arguments with every field, those that nobody asked for as empty as their type allows: what strict mode makes models send."""
    empty = {"string": "", "array": [], "object": {}, "boolean": False}
    return {name: of.get("default", empty.get(of.get("type"))) for name, of in schema["properties"].items()}


async def openai_agents():
    """The Agents SDK with strict mode, over HTTP and over stdio."""
    ways = {
        "openai-http": MCPServerStreamableHttp({"url": url, "headers": headers}, client_session_timeout_seconds=120),
        "openai-stdio": MCPServerStdio(server, client_session_timeout_seconds=120),
    }
    for name, way in ways.items():
        async with way:
            offered = await way.list_tools()
            tools = {tool.name: MCPUtil.to_function_tool(tool, way, convert_schemas_to_strict=True) for tool in offered}
            lenient = {name for name, tool in tools.items() if not tool.strict_json_schema}
            assert lenient == WITH_MAPS, lenient

            async def call(tool, **arguments):
                sent = as_strict_mode_has_it(tools[tool].params_json_schema)
                sent.update(arguments)
                context = ToolContext.from_agent_context(RunContextWrapper(None), "call", None, tool_name=tool, tool_arguments=json.dumps(sent))
                answer = await tools[tool].on_invoke_tool(context, json.dumps(sent))
                answer = answer if isinstance(answer, str) else json.dumps(answer)
                assert "An error occurred" not in answer and "(spec_invalid)" not in answer, (sent, answer)
                return answer

            await call("vm_spawn", name=name, net="none", ephemeral=True)
            assert "running" in await call("vm_info", name=name)
            assert "of strict" in await call("vm_exec", name=name, command="echo of strict")
            await call("vm_upload", name=name, path="/srv/file", content="of openai\n")
            assert "of openai" in await call("vm_download", name=name, path="/srv/file")
            # `status` has words to choose from: a model chooses one.
            assert name in await call("vm_ls", status="running")
    print("ok: OpenAI Agents SDK, strict")


async def google_genai():
    """What google-genai makes of the tools for its models: every field is there, with its type."""
    async with MCPServerStreamableHttp({"url": url, "headers": headers}) as way:
        offered = await way.list_tools()
        for tool, made in zip(offered, _mcp_utils.mcp_to_gemini_tools(offered), strict=True):
            [declared] = made.function_declarations
            assert declared.name == tool.name and declared.description == tool.description, declared
            wanted = tool.inputSchema
            given = declared.parameters.properties or {}
            assert set(given) == set(wanted["properties"]), (tool.name, set(given) ^ set(wanted["properties"]))
            assert set(declared.parameters.required or []) == set(wanted.get("required", [])), tool.name
            for name, field in given.items():
                kind = wanted["properties"][name]["type"]
                assert field.type and field.type.value.lower() == kind, (tool.name, name, field.type, kind)
    print("ok: google-genai")


async def main():
    os.chdir(pathlib.Path(os.environ["NIDO_HOME"]).parent)
    await langchain()
    await openai_agents()
    await google_genai()


asyncio.run(asyncio.wait_for(main(), 600))
