"""Webhooks: how quickly a full outbox is emptied, and what memory that takes.

Events are made by nido itself while a lock keeps it from delivering them; then one deliverer has them all before it. Its
endpoint is a Python program on the same machine.
"""

import contextlib
import fcntl
import os
import socket
import struct
import tempfile
import threading

from rest import Server
from result import Result
from rig import Rig, say

CLIENTS = 4


class Receiver:
    """An endpoint that takes everything, on connections that stay open."""

    def __init__(self):
        self.ids, self.lock = [], threading.Lock()
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/hook"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.listener.close()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                stream, _ = self.listener.accept()
                threading.Thread(target=self._serve, args=(stream,), daemon=True).start()

    def _serve(self, stream):
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with stream, stream.makefile("rb") as reader:
            while reader.readline().startswith(b"POST "):
                headers = {}
                while (line := reader.readline().strip()):
                    key, _, value = line.partition(b": ")
                    headers[key.lower()] = value
                reader.read(int(headers[b"content-length"]))
                with self.lock:
                    self.ids.append(headers[b"webhook-id"])
                stream.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")


@contextlib.contextmanager
def nothing_is_delivered(rig):
    """As long as somebody holds this lock, deliverers think that another one is at work."""
    with open(os.path.join(rig.home, "deliver.lock"), "a+b") as lock:
        whole_file = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        fcntl.fcntl(lock, fcntl.F_OFD_SETLK, whole_file)
        yield


def made_and_deleted(rig, vms):
    """Two events of each of so many VMs, which never run."""
    failures = []
    with Server(rig) as server:

        def client(numbers):
            connection = server.connect()
            for number in numbers:
                made = {"name": f"vm-{number}", "start": False}
                told = [server.ask(connection, "POST", "/v1/vms", made)[0],
                        server.ask(connection, "DELETE", f"/v1/vms/vm-{number}")[0]]
                if told != [201, 200]:
                    failures.append(told)

        threads = [threading.Thread(target=client, args=(range(n, vms, CLIENTS),)) for n in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failures:
        raise RuntimeError(f"VMs could not be made: {failures[:3]}")
    return 2 * vms


def paused_and_resumed(rig, vm, times):
    """Two events of one VM, so many times: these may only be sent one behind the other."""
    with Server(rig) as server:
        connection = server.connect()
        for _ in range(times):
            for verb in ("pause", "resume"):
                status, answer = server.ask(connection, "POST", f"/v1/vms/{vm.name}/{verb}", {})
                if status != 200:
                    raise RuntimeError(f"{status}: {answer}")
    return 2 * times


def drained(rig, make):
    """Messages a second and the peak memory, in KiB, of one deliverer that has what `make` has made before it."""
    with Receiver() as receiver:
        hook = rig.json("webhook", "add", "--allow-private", "--url", receiver.url)["id"]
        try:
            with nothing_is_delivered(rig):
                count = make()
            peak, seconds = rig.peak_kb("deliver")
            if len(receiver.ids) != count or len(set(receiver.ids)) != count:
                raise RuntimeError(f"{len(receiver.ids)} messages came of {count}, {len(set(receiver.ids))} different ones")
            return count / seconds, peak
        finally:
            rig.run("webhook", "remove", hook)


def webhooks(bench):
    vms, times = bench.count(5000, 500), bench.count(1000, 100)
    say(f"  {2 * vms} events of {vms} VMs, {2 * times} of one")
    with tempfile.TemporaryDirectory(dir=bench.scratch) as home:
        os.chmod(home, 0o700)
        for part in ("blobs", "templates"):
            os.symlink(os.path.join(bench.rig.home, part), os.path.join(home, part))
        with Rig(bench.rig.nido, home) as rig:
            many, many_kib = drained(rig, lambda: made_and_deleted(rig, vms))
    # Its start is an event as well, and over before there is an endpoint.
    vm = bench.vm
    one, one_kib = drained(bench.rig, lambda: paused_and_resumed(bench.rig, vm, times))
    rate = Result("webhooks", f"A full outbox: {2 * vms} deliveries", "messages/s")
    rate.samples = {f"about {vms} VMs": [many], f"{2 * times} about one VM, in order": [one]}
    rate.require("delivered in a second", many, ">=", 500)
    rate.require("peak memory of the deliverer", max(many_kib, one_kib) / 1024, "<=", 64, "MiB")
    rate.notes.append("the endpoint is a Python program on the same two cores, over HTTP and connections that stay open")
    return [rate]
