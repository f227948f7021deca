"""The guest agent's protocol, as much of it as a stopwatch needs: hello, ping and exec on one open session.

The protocol itself is written out in `guest-agent/src/wire.rs`. This is a second, independent reading of it, so what
is measured here contains nothing of nido's own client. Every wait ends by the socket's timeout.
"""

import os
import socket
import struct

VERSION = 3
MESSAGE, STDOUT, STDERR = 0x01, 0x11, 0x12
HELLO, PING, EXEC = 0, 1, 2
WELCOME, PONG, STARTED, STDIN_CREDIT, EXITED = 0, 2, 3, 4, 5


class WireError(Exception):
    """The other side said something that does not belong here, or has gone."""


def _head(major, number):
    for limit, code, layout in ((24, None, None), (1 << 8, 24, ">B"), (1 << 16, 25, ">H"), (1 << 32, 26, ">I")):
        if number < limit:
            if code is None:
                return bytes([major << 5 | number])
            return bytes([major << 5 | code]) + struct.pack(layout, number)
    return bytes([major << 5 | 27]) + struct.pack(">Q", number)


def cbor(value):
    """Encodes None, booleans, whole numbers, bytes, text and lists."""
    if value is None:
        return b"\xf6"
    if isinstance(value, bool):
        return b"\xf5" if value else b"\xf4"
    if isinstance(value, int):
        return _head(0, value) if value >= 0 else _head(1, -1 - value)
    if isinstance(value, bytes):
        return _head(2, len(value)) + value
    if isinstance(value, str):
        return _head(3, len(value.encode())) + value.encode()
    return _head(4, len(value)) + b"".join(map(cbor, value))


def uncbor(data, at=0):
    """Decodes one value of the kinds `cbor` knows; gives it and where it ends."""
    major, low = data[at] >> 5, data[at] & 31
    at += 1
    if major == 7:
        return {20: False, 21: True}.get(low), at
    number = low
    if low >= 24:
        size = 1 << (low - 24)
        number, at = int.from_bytes(data[at : at + size], "big"), at + size
    if major == 0:
        return number, at
    if major == 1:
        return -1 - number, at
    if major in (2, 3):
        raw = data[at : at + number]
        return (raw if major == 2 else raw.decode()), at + number
    if major != 4:
        raise WireError(f"CBOR of major type {major} is not part of this protocol")
    items = []
    for _ in range(number):
        item, at = uncbor(data, at)
        items.append(item)
    return items, at


def message(number, *fields):
    """A whole frame with one message."""
    payload = cbor([number, list(fields)])
    return struct.pack(">I", MESSAGE << 24 | len(payload)) + payload


def token_of(vm_dir):
    """The VM's token, from what the guest is told at boot."""
    with open(os.path.join(vm_dir, "guest.cbor"), "rb") as config:
        return uncbor(config.read())[0][1]


def unix_connect(path, timeout):
    """Connects to a socket however deep it lies: an address holds 108 bytes, so it goes through the directory."""
    directory = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY)
    try:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(timeout)
        sock.connect(f"/proc/self/fd/{directory}/{os.path.basename(path)}")
        return sock
    finally:
        os.close(directory)


class Session:
    """One open session over anything with `sendall` and `recv`."""

    def __init__(self, stream, token, first=b""):
        self.stream, self.held = stream, bytearray()
        nonce = int.from_bytes(os.urandom(8), "big")
        stream.sendall(message(HELLO, [VERSION, VERSION, token, nonce]) + first)
        kind, fields = self.next_message()
        if kind != WELCOME or fields[0][1] != nonce:
            raise WireError(f"no welcome but message {kind}: {fields}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stream.close()

    def _take(self, count):
        while len(self.held) < count:
            piece = self.stream.recv(65536)
            if not piece:
                raise WireError("the agent closed the session")
            self.held += piece
        taken = bytes(self.held[:count])
        del self.held[:count]
        return taken

    def next_frame(self):
        head = int.from_bytes(self._take(4), "big")
        return head >> 24, self._take(head & 0xFFFFFF)

    def next_message(self):
        kind, payload = self.next_frame()
        if kind != MESSAGE:
            raise WireError(f"a frame of kind {kind:#x} where a message was expected")
        (number, fields), _ = uncbor(payload)
        return number, fields

    def pong(self):
        """Waits for the answer to a ping that was sent."""
        number, fields = self.next_message()
        if number != PONG:
            raise WireError(f"no pong but message {number}: {fields}")

    def ping(self):
        self.stream.sendall(message(PING))
        self.pong()

    def run(self, *argv):
        """Runs a command without standard input; gives its exit code and output."""
        request = [[part.encode() for part in argv], [], None, None, False, None, None, False, None]
        self.stream.sendall(message(EXEC, request))
        output = b""
        while True:
            kind, payload = self.next_frame()
            if kind in (STDOUT, STDERR):
                output += payload
                continue
            (number, fields), _ = uncbor(payload)
            if number == EXITED:
                return fields[0][0], output
            if number not in (STARTED, STDIN_CREDIT):
                raise WireError(f"the command was not run: {fields}")


def open_session(vm_dir, timeout=60):
    """A session with the agent of a VM that nido runs."""
    return Session(unix_connect(os.path.join(vm_dir, "agent.sock"), timeout), token_of(vm_dir))
