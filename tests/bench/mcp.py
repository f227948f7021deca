"""The MCP server: how soon it answers, what it adds to a command, a VM from the pool, many clients at once."""

import http.client
import json
import signal
import subprocess
import threading
import time

import forks
import wire
from result import Result
from rig import host_kb, say
from sampling import in_turns

VERSION = "2026-07-28"
CLIENTS = 50


def message(number, method, tool=None, arguments=None):
    """A request that stands for itself, as clients without sessions send it."""
    params = {"_meta": {
        "io.modelcontextprotocol/protocolVersion": VERSION,
        "io.modelcontextprotocol/clientInfo": {"name": "bench", "version": "1"},
        "io.modelcontextprotocol/clientCapabilities": {},
    }}
    if tool:
        params.update(name=tool, arguments=arguments)
    return json.dumps({"jsonrpc": "2.0", "id": number, "method": method, "params": params})


def good(answer):
    """What a tool has answered, as data."""
    result = answer.get("result", {})
    if "error" in answer or result.get("isError"):
        raise RuntimeError(f"the call failed: {answer}")
    return result.get("structuredContent", result)


class Stdio:
    """A server on standard input and output."""

    def __init__(self, rig):
        argv = [rig.nido, "mcp-server", "start"]
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process, self.number = subprocess.Popen(argv, env=rig.env, text=True, bufsize=1, **streams), 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def ask(self, method, tool=None, arguments=None):
        self.number += 1
        self.process.stdin.write(message(self.number, method, tool, arguments) + "\n")
        while True:
            answer = json.loads(self.process.stdout.readline())
            if answer.get("id") == self.number:
                return good(answer)

    def call(self, tool, **arguments):
        return self.ask("tools/call", tool, arguments)


class Http:
    """A server over HTTP, and a token that may use VMs."""

    def __init__(self, rig):
        made = rig.json("token", "create", "--name", rig.fresh_name("token"), "--scope", "run")
        self.headers = {
            "Authorization": f"Bearer {made['token']}", "Content-Type": "application/json",
            "Accept": "application/json, text/event-stream", "MCP-Protocol-Version": VERSION, "Mcp-Method": "tools/call",
        }
        argv = [rig.nido, "mcp-server", "start", "--transport", "http", "--port", "0", "--rate", "1000000"]
        self.process = subprocess.Popen(argv, env=rig.env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.address = self.process.stdout.readline().strip().removeprefix("http://").split("/")[0]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=60)

    def connect(self):
        return http.client.HTTPConnection(self.address, timeout=120)

    def call(self, connection, tool, **arguments):
        connection.request("POST", "/mcp", body=message(1, "tools/call", tool, arguments), headers={**self.headers, "Mcp-Name": tool})
        answer = connection.getresponse()
        body = answer.read().decode()
        if answer.status != 200:
            raise RuntimeError(f"{answer.status}: {body}")
        # A stream of one message, or the message.
        lines = [line[6:] for line in body.splitlines() if line.startswith("data: {")]
        return good(json.loads(lines[-1] if lines else body))


def first(bench):
    """A whole server from its start to its list of tools."""
    result = Result("mcp-tools", "`nido mcp-server start`, until its tools are listed", "ms")

    def listed():
        begun = time.monotonic()
        with Stdio(bench.rig) as server:
            tools = server.ask("tools/list")["tools"]
            seconds = time.monotonic() - begun
        if len(tools) < 14:
            raise RuntimeError(f"only {len(tools)} tools")
        return seconds * 1000

    sides = {"tools/list over stdio": listed, "`nido --version`, whole process": lambda: bench.rig.timed("--version") * 1000}
    result.samples = in_turns(sides, bench.count(40, 10), warm_up=2)
    result.require("tools/list after the start", result.median("tools/list over stdio"), "<=", 30, "ms")
    return result


def execs(bench, server):
    vm = bench.vm
    result = Result("mcp-exec", "`true` in a running guest, by `vm_exec` over stdio", "ms")
    with wire.open_session(vm.dir) as session:

        def by_tool():
            begun = time.monotonic()
            done = server.call("vm_exec", name=vm.name, argv=["true"])
            if done["exit_code"] != 0:
                raise RuntimeError(f"it ended otherwise: {done}")
            return (time.monotonic() - begun) * 1000

        def over_session():
            begun = time.monotonic()
            session.run("true")
            return (time.monotonic() - begun) * 1000

        tool, agent = "vm_exec", "an open session with the agent"
        result.samples = in_turns({tool: by_tool, agent: over_session}, bench.count(100, 20), warm_up=3, what="mcp")
    result.require("vm_exec above the agent's own answer", result.more(tool, agent), "<=", 5, "ms")
    result.notes.append("the response is sent after the audit log has been synced to the disk, before and after the command")
    return result


def pool(bench, server):
    rig = bench.rig
    result = Result("mcp-pool", "`vm_spawn` from the pool, over stdio", "ms")

    def spawn():
        forks.full_pool(rig)
        name = rig.fresh_name("mcp")
        begun = time.monotonic()
        vm = server.call("vm_spawn", name=name)
        seconds = time.monotonic() - begun
        timings = server.call("vm_info", name=vm["name"])["timings"]
        rig.run("delete", "--force", "--yes", name)
        if timings["path"] != "pool":
            raise RuntimeError(f"the VM came from elsewhere: {timings}")
        return seconds * 1000

    rig.run("pool", "set", "sandbox", "2")
    try:
        result.samples = in_turns({"vm_spawn": spawn}, bench.count(20, 5), warm_up=1, what="mcp pool")
    finally:
        rig.run("pool", "set", "sandbox", "0")
    result.require("vm_spawn from the pool", result.median("vm_spawn"), "<=", 40, "ms")
    return result


def crowd(bench):
    """Many clients at once over HTTP: whether anything fails, and whether the server grows."""
    vm, seconds = bench.vm, bench.count(30, 8)
    result = Result("mcp-crowd", f"{CLIENTS} clients over HTTP, each running `true` by `vm_exec` for {seconds} s", "ms")
    took, failures = [], []
    with Http(bench.rig) as server:
        end = time.monotonic() + seconds

        def client():
            connection = server.connect()
            while time.monotonic() < end:
                begun = time.monotonic()
                try:
                    if server.call(connection, "vm_exec", name=vm.name, argv=["true"])["exit_code"] != 0:
                        failures.append("another exit code")
                except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
                    failures.append(str(error))
                    connection = server.connect()
                took.append((time.monotonic() - begun) * 1000)

        threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        time.sleep(seconds / 3)
        early = host_kb(server.process.pid, "VmRSS")
        for thread in threads:
            thread.join()
        late = host_kb(server.process.pid, "VmRSS")
    for failure in sorted(set(failures))[:5]:
        say(f"  failed: {failure}")
    result.samples["vm_exec"] = took
    result.require("failed", len(failures), "<=", 0)
    result.require("grown between a third of the time and its end", (late - early) / 1024, "<=", 2, "MiB")
    result.notes.append(f"{len(took) / seconds:.0f} commands a second; the server held {late / 1024:.1f} MiB at the end")
    return result


def mcp(bench):
    with Stdio(bench.rig) as server:
        say("  lists, commands, the pool")
        return [first(bench), execs(bench, server), pool(bench, server), crowd(bench)]


ALL = {"mcp": mcp}
