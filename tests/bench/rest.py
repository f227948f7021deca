"""The REST API: what it adds to a command, how many lists it answers in a second, how soon many listeners hear of an event."""

import contextlib
import http.client
import json
import os
import selectors
import signal
import socket
import subprocess
import tempfile
import threading
import time

import wire
from result import Result
from rig import Rig, say
from sampling import in_turns

LISTENERS = 200
STORED = 50


class Server:
    """A server of a home, and a token for everything."""

    def __init__(self, rig):
        made = rig.json("token", "create", "--name", rig.fresh_name("token"), "--scope", "admin")
        self.headers = {"Authorization": f"Bearer {made['token']}", "Content-Type": "application/json"}
        argv = [rig.nido, "api-server", "start", "--port", "0", "--rate", "1000000"]
        self.process = subprocess.Popen(argv, env=rig.env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.address = self.process.stdout.readline().strip().removeprefix("http://")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=60)

    def connect(self):
        return http.client.HTTPConnection(self.address, timeout=60)

    def ask(self, connection, method, path, body=None):
        """Sends one request on a connection that stays open; gives the answer's status and JSON."""
        connection.request(method, path, body=json.dumps(body) if body is not None else None, headers=self.headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


def execs(bench, server):
    """A command over HTTP, beside the agent's own answer."""
    vm, connection = bench.vm, server.connect()
    result = Result("rest-exec", "`true` in a running guest, over HTTP", "ms")
    with wire.open_session(vm.dir) as session:

        def over_http():
            begun = time.monotonic()
            status, done = server.ask(connection, "POST", f"/v1/vms/{vm.name}/exec", {"argv": ["true"]})
            if (status, done.get("exit_code")) != (200, 0):
                raise RuntimeError(f"{status}: {done}")
            return (time.monotonic() - begun) * 1000

        def over_session():
            begun = time.monotonic()
            session.run("true")
            return (time.monotonic() - begun) * 1000

        rest, agent = "POST exec, connection kept open", "an open session with the agent"
        result.samples = in_turns({rest: over_http, agent: over_session}, bench.count(100, 20), warm_up=3, what="rest")
    result.require("REST above the agent's own answer", result.more(rest, agent), "<=", 5, "ms")
    result.notes.append("the response is sent after the audit log has been synced to the disk, before and after the command")
    return result


def lists(bench):
    """How many lists of 50 VMs are answered in a second."""
    with tempfile.TemporaryDirectory(dir=bench.scratch) as home:
        os.chmod(home, 0o700)
        for part in ("blobs", "templates"):
            os.symlink(os.path.join(bench.rig.home, part), os.path.join(home, part))
        with Rig(bench.rig.nido, home) as rig, Server(rig) as server:
            for number in range(STORED):
                rig.run("create", f"stored-{number}")
            seconds, counts, failures = bench.count(10, 3), [], []
            end = time.monotonic() + seconds

            def client():
                connection, count = server.connect(), 0
                while time.monotonic() < end:
                    status, answer = server.ask(connection, "GET", "/v1/vms")
                    if status != 200 or len(answer["vms"]) != STORED:
                        failures.append(status)
                    count += 1
                counts.append(count)

            threads = [threading.Thread(target=client) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            result = Result("rest-list", f"`GET /v1/vms` with {STORED} VMs, four clients", "requests/s")
            result.samples["answered"] = [sum(counts) / seconds]
            result.require("lists in a second", sum(counts) / seconds, ">=", 500)
            result.require("failed", len(failures), "<=", 0)
            result.notes.append("the clients are a Python program on the same two cores")
            return result


def events(bench, server):
    """How long an event takes to the last of many listeners."""
    result = Result("rest-events", f"An event until the last of {LISTENERS} listeners has it", "ms")
    head = "GET /v1/events HTTP/1.1\r\nHost: " + server.address + "\r\nAccept: text/event-stream\r\n"
    head += f"Authorization: {server.headers['Authorization']}\r\n\r\n"
    host, port = server.address.split(":")
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as ready:
        listeners = [stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(LISTENERS)]
        for listener in listeners:
            listener.sendall(head.encode())
            listener.recv(4096)
            listener.setblocking(False)
            ready.register(listener, selectors.EVENT_READ)
        samples = []
        for _ in range(bench.count(20, 5)):
            name = bench.rig.fresh_name("event")
            bench.rig.run("create", name)
            heard, written, last = set(), None, None
            while len(heard) < LISTENERS:
                for key, _ in ready.select(timeout=10):
                    data = key.fileobj.recv(65536).decode(errors="replace")
                    if name in data:
                        heard.add(key.fileobj)
                        last = time.time()
                        line = next(line for line in data.splitlines() if line.startswith("data:") and name in line)
                        stamp = json.loads(line[5:])["timestamp"]
                        written = time.mktime(time.strptime(stamp[:19], "%Y-%m-%dT%H:%M:%S")) - time.timezone
                        written += float("0" + stamp[19:].rstrip("Z")) if "." in stamp else 0
            samples.append((last - written) * 1000)
            bench.rig.run("delete", "--yes", name)
            # Their deletion is an event as well.
            time.sleep(0.3)
            for listener in listeners:
                with contextlib.suppress(BlockingIOError):
                    listener.recv(65536)
        result.samples["create, until all have heard"] = samples
    result.require("the last listener", result.median("create, until all have heard"), "<=", 50, "ms")
    return result


def rest(bench):
    with Server(bench.rig) as server:
        say("  commands, lists, events")
        return [execs(bench, server), lists(bench), events(bench, server)]
