"""Where webhooks are posted to: a server on this host that keeps what comes.

    receiver.py PIPE

Says where it listens, is told its endpoint's id and secret by a named pipe, and holds every message against it. Told to end (SIGTERM) it does so with 0
if there were messages, a test message among them, and all of them were signed.
"""

import json
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from standardwebhooks.webhooks import Webhook, WebhookVerificationError

DEADLINE = 120


class Message:
    """One attempt, as it came in."""

    def __init__(self, path, headers, body, status):
        self.path, self.headers, self.body, self.status, self.at = path, headers, body, status, time.time()

    def __str__(self):
        return f"{self.path} {self.headers} {self.body!r} -> {self.status}"

    @property
    def id(self):
        return self.headers["webhook-id"]

    @property
    def event(self):
        return json.loads(self.body)


class Receiver:
    """Keeps what is posted. `answers` is told of each message and says what to answer."""

    def __init__(self):
        self.messages, self.changed = [], threading.Condition()
        self.answers = lambda message: 204
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                headers = {name.lower(): value for name, value in self.headers.items()}
                message = Message(self.path, headers, body, None)
                with receiver.changed:
                    message.status = receiver.answers(message)
                    receiver.messages.append(message)
                    receiver.changed.notify_all()
                self.send_response(message.status)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def url(self, path):
        return f"http://127.0.0.1:{self.server.server_port}{path}"

    def at(self, path, taken=True):
        """What came to a path; only what was answered with success, unless all is wanted."""
        with self.changed:
            return [one for one in self.messages if one.path == path and (one.status < 300 or not taken)]

    def wait(self, what, condition):
        with self.changed:
            came = self.changed.wait_for(condition, DEADLINE)
        assert came, f"not within {DEADLINE} s: {what}; what came: " + "; ".join(str(one) for one in self.messages)


def main(pipe):
    # Before there are threads, which would be ended by it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    receiver = Receiver()
    print(receiver.url("/"), flush=True)
    with open(pipe) as told:
        id, secret = told.read().split()
    webhook, broken = Webhook(secret), []

    def answer(message):
        # Whoever asks the API at random makes other endpoints of this address, which have secrets of their own.
        if not message.id.startswith(f"msg_{id}_"):
            return 204
        # When it comes, as a receiver does: later it would be too old.
        try:
            webhook.verify(message.body, message.headers)
            return 204
        except WebhookVerificationError as error:
            broken.append(f"{error}: {message}")
            return 400

    receiver.answers = answer
    signal.sigwait({signal.SIGTERM})
    kinds = [message.event["event"] for message in receiver.at("/") if message.id.startswith(f"msg_{id}_")]
    assert not broken, broken
    assert "webhook.test" in kinds, f"no test message among {kinds}"
    print(f"contract: {len(kinds)} messages about what the server did were signed")


if __name__ == "__main__":
    main(sys.argv[1])
