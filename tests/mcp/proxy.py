#!/usr/bin/env python3
"""Adds a token to the requests of programs that cannot: proxy.py http://HOST:PORT TOKEN. Its first line is its own address.

One request for each connection: it asks the server to close behind its answer, and passes everything else on as it comes, so
streams stay streams, and whoever hangs up hangs up on the server as well.
"""

import socket
import sys
import threading
from urllib.parse import urlsplit

HEAD_MAX = 64 << 10


def head_of(client):
    data = b""
    while b"\r\n\r\n" not in data:
        more = client.recv(65536)
        if not more or len(data) > HEAD_MAX:
            return None
        data += more
    return data.split(b"\r\n\r\n", 1)


def copy(source, sink):
    try:
        while data := source.recv(65536):
            sink.sendall(data)
    except OSError:
        pass
    for end in (source, sink):
        try:
            end.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass


def serve(client, server, token):
    with client:
        parts = head_of(client)
        if parts is None:
            return
        first, *fields = parts[0].split(b"\r\n")
        dropped = (b"connection:", b"keep-alive:", b"authorization:")
        fields = [field for field in fields if not field.lower().startswith(dropped)]
        fields += [b"Authorization: Bearer " + token, b"Connection: close"]
        with socket.create_connection(server) as upstream:
            upstream.sendall(b"\r\n".join([first, *fields]) + b"\r\n\r\n" + parts[1])
            back = threading.Thread(target=copy, args=(upstream, client), daemon=True)
            back.start()
            copy(client, upstream)
            back.join()


def main():
    address, token = urlsplit(sys.argv[1]), sys.argv[2].strip().encode()
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    while True:
        client, _ = listener.accept()
        threading.Thread(target=serve, args=(client, (address.hostname, address.port), token), daemon=True).start()


main()
