"""What nido's cold start is compared with: the same QEMU, by hand.

A directory is made, the disk overlay copied, QEMU started with the very arguments nido used, and the same agent asked
for a sign of life over the same virtio-serial port: the preamble of `wire.rs` and a single yamux stream. No store, no
locks, no supervisor, no checks. It all happens inside this process, so not even the start of an interpreter counts.
"""

import json
import os
import shutil
import socket
import struct
import subprocess
import threading
import time

import wire

MAGIC = b"\xffNIDO\r\n\x01"
PROBE, ACK, GO = 1, 2, 3
DATA, WINDOW_UPDATE, YAMUX_PING = 0, 1, 2
SYN, YAMUX_ACK, FIN, RESET = 1, 2, 4, 8
# How long a guest may take, in seconds.
DEADLINE = 180


def _block(kind, nonce):
    body = MAGIC + bytes([kind, 0, 0, 0]) + nonce
    digest = 0x811C9DC5
    for byte in body:
        digest = (digest ^ byte) * 0x01000193 & 0xFFFFFFFF
    return body + digest.to_bytes(4, "big")


def agree(port):
    """Agrees with the agent where the connection begins. A PROBE sent early waits until the guest opens its port."""
    nonce = os.urandom(16)
    port.sendall(_block(PROBE, nonce))
    answer, held = _block(ACK, nonce), b""
    while answer not in held:
        piece = port.recv(4096)
        if not piece:
            raise wire.WireError("QEMU closed the channel")
        held += piece
    port.sendall(_block(GO, nonce))


class Stream:
    """The first and only stream of a yamux connection."""

    def __init__(self, port):
        self.port, self.held, self.opened = port, b"", False

    def sendall(self, data):
        flags = 0 if self.opened else SYN
        self.opened = True
        self.port.sendall(struct.pack(">BBHII", 0, DATA, flags, 1, len(data)) + data)

    def recv(self, _count):
        while True:
            _, kind, flags, stream, length = struct.unpack(">BBHII", self._take(12))
            if kind == DATA:
                data = self._take(length)
                if data or flags & (FIN | RESET):
                    return data
            elif kind == YAMUX_PING and flags & SYN:
                self.port.sendall(struct.pack(">BBHII", 0, YAMUX_PING, YAMUX_ACK, stream, length))
            elif kind > YAMUX_PING:
                return b""

    def _take(self, count):
        while len(self.held) < count:
            piece = self.port.recv(65536)
            if not piece:
                raise wire.WireError("QEMU closed the channel")
            self.held += piece
        taken, self.held = self.held[:count], self.held[count:]
        return taken


class Template:
    """What a VM of nido's leaves to start another one of the same kind by hand: its arguments and its configuration, and
    the disk that its own stands on."""

    def __init__(self, running, keep_in):
        self.argv, self.depth = running.qemu_argv(), keep_in
        self.pristine, self.config = os.path.join(keep_in, "pristine.qcow2"), os.path.join(keep_in, "guest.cbor")
        shutil.copy(os.path.join(running.dir, "guest.cbor"), self.config)
        node = "node-name=base-file,filename="
        base = next(arg.split(node)[1].split(",")[0] for arg in self.argv if node in arg)
        create = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, self.pristine]
        subprocess.run(create, check=True)
        self.token = wire.token_of(running.dir)
        os.makedirs(os.path.join(keep_in, "vms"))

    def boot(self):
        """Starts it and waits for the agent; gives the seconds that took. QEMU is gone when this returns."""
        path = os.path.join(self.depth, "vms", "bare")
        begun = time.monotonic()
        os.makedirs(path, mode=0o700)
        qemu = None
        try:
            shutil.copy(self.pristine, os.path.join(path, "disk.qcow2"))
            shutil.copy(self.config, os.path.join(path, "guest.cbor"))
            with socket.socket(socket.AF_UNIX) as listener, open(os.path.join(path, "qemu.log"), "wb") as log:
                listener.bind(os.path.join(path, "channel.sock"))
                listener.listen(1)
                listener.settimeout(DEADLINE)
                # In a session of its own, as nido's: the kernel shares the processors out by session.
                streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
                qemu = subprocess.Popen(self.argv, cwd=path, start_new_session=True, **streams)
                port, _ = listener.accept()
                with port:
                    port.settimeout(DEADLINE)
                    agree(port)
                    wire.Session(Stream(port), self.token, wire.message(wire.PING)).pong()
                    return time.monotonic() - begun
        finally:
            if qemu:
                qemu.kill()
                qemu.wait()
            shutil.rmtree(path, ignore_errors=True)


class Streams(Template):
    """A guest with a second port on the bus that its agent's port is on: what that carries without a protocol."""

    PORT = "bare"
    # The guest's device of that port.
    FIND = "for port in /sys/class/virtio-ports/*; do [ \"$(cat $port/name)\" != bare ] || device=/dev/${port##*/}; done; "

    def __enter__(self):
        self.path = os.path.join(self.depth, "vms", "streams")
        os.makedirs(self.path, mode=0o700)
        shutil.copy(self.pristine, os.path.join(self.path, "disk.qcow2"))
        shutil.copy(self.config, os.path.join(self.path, "guest.cbor"))
        argv = [arg.replace("max_ports=2", "max_ports=3") for arg in self.argv]
        argv += ["-chardev", f"socket,id={self.PORT},path=bare.sock", "-device", f"virtserialport,chardev={self.PORT},name={self.PORT}"]
        listeners = []
        for name in ("channel.sock", "bare.sock"):
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(os.path.join(self.path, name))
            listener.listen(1)
            listener.settimeout(DEADLINE)
            listeners.append(listener)
        with open(os.path.join(self.path, "qemu.log"), "wb") as log:
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            self.qemu = subprocess.Popen(argv, cwd=self.path, start_new_session=True, **streams)
        try:
            self.agent, self.port = (listener.accept()[0] for listener in listeners)
            for end in (self.agent, self.port):
                end.settimeout(DEADLINE)
            agree(self.agent)
            self.session = wire.Session(Stream(self.agent), self.token, wire.message(wire.PING))
            self.session.pong()
        except BaseException:
            self.__exit__()
            raise
        finally:
            for listener in listeners:
                listener.close()
        return self

    def __exit__(self, *_):
        self.qemu.kill()
        self.qemu.wait()
        shutil.rmtree(self.path, ignore_errors=True)

    def _run(self, command):
        code, output = self.session.run("sh", "-c", self.FIND + command)
        if code != 0:
            raise wire.WireError(f"{command}: {output!r}")

    def send(self, path, into="/dev/null"):
        """Seconds in which the guest reads as many bytes as a file has, and writes them."""
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            begun = time.monotonic()
            sender = threading.Thread(target=self.port.sendfile, args=(file,))
            sender.start()
            self._run(f"dd of={into} bs=256K iflag=count_bytes,fullblock count={size} status=none <$device")
            sender.join()
            return time.monotonic() - begun

    def receive(self, path):
        """Seconds in which as many bytes as a file has arrive from the guest."""
        left = os.path.getsize(path)
        begun = time.monotonic()
        writer = threading.Thread(target=self._run, args=(f"head -c {left} </dev/zero >$device",))
        writer.start()
        while left > 0:
            piece = self.port.recv(1 << 20)
            if not piece:
                raise wire.WireError("QEMU closed the port")
            left -= len(piece)
        seconds = time.monotonic() - begun
        writer.join()
        return seconds


class Monitor:
    """QEMU's monitor, for the few commands that a fork takes."""

    def __init__(self, path, deadline):
        self.socket, self.held = self._dial(path, deadline), b""
        self._line()
        self.run("qmp_capabilities")

    @staticmethod
    def _dial(path, deadline):
        while True:
            try:
                return wire.unix_connect(path, DEADLINE)
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.001)

    def _line(self):
        while b"\n" not in self.held:
            piece = self.socket.recv(65536)
            if not piece:
                raise wire.WireError("QEMU closed its monitor")
            self.held += piece
        line, self.held = self.held.split(b"\n", 1)
        return json.loads(line)

    def run(self, command, **arguments):
        self.socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while True:
            answer = self._line()
            if "error" in answer:
                raise wire.WireError(f"{command}: {answer['error']}")
            if "return" in answer:
                return answer["return"]

    def load(self, state, at):
        """Loads a machine's state over a socket, whose name QEMU gets relative to its own directory."""
        self.run("migrate-set-capabilities", capabilities=[{"capability": "x-ignore-shared", "state": True}])
        self.run("migrate-incoming", uri="unix:load.sock")
        with wire.unix_connect(os.path.join(at, "load.sock"), DEADLINE) as stream:
            stream.sendall(state)
            while self.run("query-migrate").get("status") != "completed":
                time.sleep(0.001)


class Clone:
    """A QEMU that takes over a saved state."""

    def __init__(self, baked, path):
        self.token, self.path, self.port = baked.token, path, None
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(os.path.join(path, "channel.sock"))
        self.listener.listen(1)
        self.listener.settimeout(DEADLINE)
        with open(os.path.join(path, "qemu.log"), "wb") as log:
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            self.qemu = subprocess.Popen(baked.argv, cwd=path, start_new_session=True, **streams)

    def load(self, state, deadline):
        self.monitor = Monitor(os.path.join(self.path, "qmp.sock"), deadline)
        self.port, _ = self.listener.accept()
        self.port.settimeout(DEADLINE)
        self.monitor.load(state, self.path)

    def agree(self):
        """Agrees with the agent and opens a session, by which it answers a ping."""
        agree(self.port)
        self.session = wire.Session(Stream(self.port), self.token, wire.message(wire.PING))
        self.session.pong()

    def claim(self):
        """Seconds until a clone that waited answers again."""
        begun = time.monotonic()
        self.monitor.run("cont")
        self.session.ping()
        return time.monotonic() - begun

    def end(self):
        self.qemu.kill()
        self.qemu.wait()
        for end in (self.listener, self.port):
            if end:
                end.close()
        shutil.rmtree(self.path, ignore_errors=True)


class Baked(Template):
    """What a forked VM leaves to fork another one by hand: the same agent answers a ping, with the token it was saved
    with; it is not renewed, so two such guests are twins."""

    clone = Clone

    def __init__(self, running, keep_in, bake):
        self.argv, self.depth = running.qemu_argv(), keep_in
        blobs = os.path.join(running.rig.home, "blobs", "sha256")
        with open(os.path.join(blobs, bake["state"]["sha256"]), "rb") as state:
            self.state = state.read()
        self.token = bytes.fromhex(bake["token"])
        self.config, self.pristine = (os.path.join(keep_in, name) for name in ("guest.cbor", "pristine.qcow2"))
        shutil.copy(os.path.join(running.dir, "guest.cbor"), self.config)
        base = os.path.join(blobs, bake["disk"]["sha256"])
        create = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, self.pristine]
        subprocess.run(create, check=True)
        os.makedirs(os.path.join(keep_in, "vms"))

    def load(self, name):
        """A clone whose state is loaded and that stands still."""
        path = os.path.join(self.depth, "vms", name)
        begun = time.monotonic()
        os.makedirs(path, mode=0o700)
        shutil.copy(self.pristine, os.path.join(path, "disk.qcow2"))
        shutil.copy(self.config, os.path.join(path, "guest.cbor"))
        clone = self.clone(self, path)
        try:
            clone.load(self.state, begun + DEADLINE)
        except BaseException:
            clone.end()
            raise
        return clone

    def start(self, name):
        """Forks; gives the seconds until the agent answered, and what ends the guest."""
        begun = time.monotonic()
        clone = self.load(name)
        try:
            clone.monitor.run("cont")
            clone.agree()
            return time.monotonic() - begun, clone.end
        except BaseException:
            clone.end()
            raise

    def wait(self, name):
        """A clone that waits to be claimed: it has run until its agent answered, and stands still. Its session is open."""
        clone = self.load(name)
        try:
            clone.monitor.run("cont")
            clone.agree()
            clone.monitor.run("stop")
        except BaseException:
            clone.end()
            raise
        return clone

    def boot(self):
        seconds, end = self.start("bare")
        end()
        return seconds
