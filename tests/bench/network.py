"""The guest's network: bytes in both directions and connections, to servers on the host's loopback."""

import socket
import threading

from rig import Vm

MIB = 1 << 20
# How much is sent in one measurement.
TRANSFER_MIB = 100
# How many connections one measurement opens.
CONNECTIONS = 20

# For the guest: prints the milliseconds that one operation took.
CLIENT = """
import socket, sys, time
what, port, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
connect = lambda: socket.create_connection(("10.0.2.2", port), 60)
if what == "connect":
    times = []
    for _ in range(size):
        began = time.monotonic(); end = connect(); times.append(time.monotonic() - began); end.close()
    print(sorted(times)[size // 2] * 1000)
    sys.exit()
end, piece = connect(), bytes(1 << 18)
began = time.monotonic()
if what == "up":
    end.sendall(b"u")
    for _ in range(size // len(piece)): end.sendall(piece)
    end.shutdown(socket.SHUT_WR)
    got = int(end.recv(64))
else:
    end.sendall(b"d" + size.to_bytes(8, "big")); got = 0
    while part := end.recv(1 << 18): got += len(part)
assert got >= size, (got, size)
print((time.monotonic() - began) * 1000)
"""


class Server:
    """Takes what a client sends, or sends what it asks for."""

    def __init__(self):
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    @staticmethod
    def _serve(client):
        with client:
            try:
                kind = client.recv(1)
                if kind == b"u":
                    count = 0
                    while part := client.recv(1 << 18):
                        count += len(part)
                    client.sendall(str(count).encode())
                elif kind == b"d":
                    left, piece = int.from_bytes(client.recv(8, socket.MSG_WAITALL), "big"), bytes(1 << 18)
                    while left > 0:
                        client.sendall(piece[:left])
                        left -= min(left, len(piece))
            except OSError:
                pass

    def close(self):
        self.listener.close()


def reaching(rig, word, port):
    """A VM that reaches the server, and whether that took a rule: a program without rules reaches the whole loopback."""
    name = rig.fresh_name(word)
    has_rules = rig.run("spawn", name, "--fork", "--allow", f"host:{port}", check=False).returncode == 0
    if not has_rules:
        rig.run("spawn", name, "--fork")
    return Vm(rig, name), has_rules


def measured(vm, what, port, size):
    return lambda: float(vm.exec("python3", "-c", CLIENT, what, str(port), str(size)))
