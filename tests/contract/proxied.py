"""nido behind nginx, with TLS and below a path, configured as docs/api.md says.

    proxied.py NIDO

Starts a server and an nginx of its own, on loopback. Ends with 0 if a real guest can be used through both: requests, links, the
page, uploads that are not buffered, events that arrive while the stream is open, and a WebSocket. Every wait has a deadline.
"""

import contextlib
import http.client
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from html.parser import HTMLParser
from urllib.parse import urljoin

DEADLINE = 120
NAME = "behind"
CONFIGURATION = """
daemon off; master_process off; pid {here}/pid; error_log {here}/error.log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {here}/body; proxy_temp_path {here}/proxy;
    fastcgi_temp_path {here}/f; uwsgi_temp_path {here}/u; scgi_temp_path {here}/s;
    server {{
        listen 127.0.0.1:{port} ssl;
        ssl_certificate {here}/certificate.pem; ssl_certificate_key {here}/key.pem;
        {location}
    }}
}}
"""


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextlib.contextmanager
def running(*words, **more):
    with subprocess.Popen(words, **more) as program:
        try:
            yield program
        finally:
            program.send_signal(signal.SIGTERM)
            try:
                program.wait(DEADLINE)
            except subprocess.TimeoutExpired:
                program.kill()
                raise


class Client:
    """HTTPS to nginx, whose certificate is trusted and nothing else."""

    def __init__(self, port, token, here):
        self.port, self.token = port, token
        self.trust = ssl.create_default_context(cafile=here / "certificate.pem")

    def connect(self):
        return http.client.HTTPSConnection("localhost", self.port, context=self.trust, timeout=DEADLINE)

    def send(self, method, path, body=None, **headers):
        connection = self.connect()
        if isinstance(body, dict):
            body, headers["content-type"] = json.dumps(body), "application/json"
        headers = {"authorization": f"Bearer {self.token}"} | {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, headers)
        return connection.getresponse()

    def good(self, method, path, body=None, status=200, **headers):
        answer = self.send(method, path, body, **headers)
        content = answer.read()
        assert answer.status == status, (method, path, answer.status, content)
        return answer, content


class Links(HTMLParser):
    """What a page takes from its server."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("src", "href") and value and not value.startswith(("#", "data:"))]


def answers_alike(client):
    client.good("GET", "/nido/healthz")
    client.good("GET", "/v1/host", status=404)
    client.good("POST", "/nido/v1/vms", {"name": "x", "no-such-field": 1}, status=422)
    origin = f"https://localhost:{client.port}"
    client.good("GET", "/nido/v1/vms", origin=origin)
    client.good("GET", "/nido/v1/vms", origin="https://elsewhere.example", status=403)


def page(client):
    _, content = client.good("GET", "/nido/")
    links = Links()
    links.feed(content.decode())
    assert links.found, content
    for link in links.found:
        client.good("GET", urljoin("/nido/", link))


def live(client):
    """A spawn that is not waited for, its link, and its events while they are made."""
    events = client.send("GET", "/nido/v1/events", accept="text/event-stream")
    assert events.status == 200, events.status
    answer, _ = client.good("POST", "/nido/v1/vms", {"name": NAME, "net": "none"}, 202, prefer="respond-async")
    place = answer.headers["location"]
    assert place.startswith("/nido/v1/operations/"), place
    # The stream goes on: nothing but what came until now can be read of it.
    seen, began = b"", time.monotonic()
    while b"vm.started" not in seen:
        assert time.monotonic() - began < DEADLINE, seen
        seen += events.read1()
    events.close()
    while True:
        _, content = client.good("GET", place)
        if json.loads(content)["status"] != "running":
            break
        assert time.monotonic() - began < DEADLINE, content
        time.sleep(0.1)
    assert json.loads(content)["status"] == "succeeded", content


def files(client):
    data = os.urandom(3 << 20)
    client.good("PUT", f"/nido/v1/vms/{NAME}/files?path=/root/a%2Bb+c.bin", data, status=(200), content_type="application/octet-stream")
    _, content = client.good("GET", f"/nido/v1/vms/{NAME}/files?path=/root/a%2Bb+c.bin")
    assert content == data, len(content)


def web_socket(client):
    raw = client.trust.wrap_socket(socket.create_connection(("127.0.0.1", client.port), DEADLINE), server_hostname="localhost")
    lines = [
        f"GET /nido/v1/vms/{NAME}/exec/socket HTTP/1.1", f"Host: localhost:{client.port}", "Connection: Upgrade", "Upgrade: websocket",
        "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", f"Authorization: Bearer {client.token}", "", "",
    ]
    raw.sendall("\r\n".join(lines).encode())
    start = json.dumps({"start": {"argv": ["echo", "through nginx"]}}).encode()
    seen = b""
    while b"\r\n\r\n" not in seen:
        part = raw.recv(4096)
        assert part, seen
        seen += part
    assert seen.startswith(b"HTTP/1.1 101 ") and b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" in seen, seen
    # A text frame of a client: masked, here with zeros.
    raw.sendall(bytes([0x81, 0x80 | len(start), 0, 0, 0, 0]) + start)
    while b"through nginx" not in seen:
        part = raw.recv(4096)
        assert part, seen
        seen += part
    raw.close()


def main(nido):
    documented = pathlib.Path(__file__).parents[2].joinpath("docs/api.md").read_text()
    location = re.search(r"```nginx\n(.*?)```", documented, re.S)[1]
    nginx = shutil.which("nginx") or "/usr/sbin/nginx"
    with tempfile.TemporaryDirectory() as here, contextlib.ExitStack() as stack:
        here = pathlib.Path(here)
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost",
             "-keyout", here / "key.pem", "-out", here / "certificate.pem"], check=True, capture_output=True)
        port = free_port()
        public = f"https://localhost:{port}/nido/"
        server = stack.enter_context(running(
            nido, "--quiet", "api-server", "start", "--port", "0", "--public-url", public, stdout=subprocess.PIPE, text=True))
        address = server.stdout.readline().strip()
        behind = re.search(r"127\.0\.0\.1:\d+", address)
        assert behind, address
        assert location.count("127.0.0.1:8080") == 1, location
        text = CONFIGURATION.format(here=here, port=port, location=location.replace("127.0.0.1:8080", behind[0]))
        (here / "nginx.conf").write_text(text)
        stack.enter_context(running(nginx, "-p", here, "-e", here / "error.log", "-c", here / "nginx.conf"))
        token = subprocess.run([nido, "--quiet", "token", "create", "--name", "proxied", "--scope", "admin"], check=True,
                               capture_output=True, text=True, timeout=DEADLINE).stdout.strip()
        client = Client(port, token, here)
        began = time.monotonic()
        while True:
            try:
                client.connect().connect()
                break
            except OSError:
                assert time.monotonic() - began < DEADLINE, (here / "error.log").read_text()
                time.sleep(0.05)
        try:
            for step in (answers_alike, page, live, files, web_socket):
                step(client)
            client.good("DELETE", f"/nido/v1/vms/{NAME}?force=true")
        except BaseException:
            sys.stderr.write((here / "error.log").read_text())
            raise
    print("nginx, TLS and a path: the API, its page, its events and its WebSockets go through")


main(sys.argv[1])
