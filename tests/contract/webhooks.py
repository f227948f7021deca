"""Webhooks under a verifier that others wrote: every message of a real deliverer, held against PyPI's `standardwebhooks`.

    webhooks.py NIDO

Listens on this host, adds itself as an endpoint, has real VMs made and deleted, and ends with 0 if each event came, those of one
VM in order, each signed as the library wants it, and the library refuses what was altered. Every wait has a deadline.
"""

import base64
import json
import os
import subprocess
import sys
from datetime import datetime, timezone

from receiver import DEADLINE, Receiver
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

# Longer ago than the library takes.
STALE_S = 600
# What happens to the VMs of `live`.
WANTED = {"vm.created", "vm.started", "vm.paused", "vm.resumed", "vm.stopped", "vm.deleted"}


class Nido:
    def __init__(self, program):
        self.program = program

    def run(self, *words, expect=0):
        done = subprocess.run([self.program, *words], capture_output=True, text=True, timeout=DEADLINE)
        assert done.returncode == expect, f"{words}: {done.returncode}: {done.stdout} {done.stderr}"
        return done.stdout

    def json(self, *words, expect=0):
        return json.loads(self.run("--json", *words, expect=expect))

    def events(self, since):
        return self.json("events", "--since", str(since))["events"]


def refuses(webhook, body, headers, why):
    try:
        webhook.verify(body, headers)
    except WebhookVerificationError as error:
        assert why in str(error), f"refused, but for another reason: {error}"
        return
    raise AssertionError(f"the library takes what it must not: {headers} {body!r}")


class Endpoint:
    """One of the deliverer's endpoints: where it listens, what it is signed with, and what was verified of it."""

    def __init__(self, receiver, path, id, secret, other):
        self.receiver, self.path, self.id, self.secret, self.other, self.verified = receiver, path, id, secret, other, 0

    def messages(self, taken=True):
        return self.receiver.at(self.path, taken)

    def verify(self, message):
        """The library takes it as it came, and as nothing else. The answer is what it read."""
        webhook, headers, body = Webhook(self.secret), message.headers, message.body
        read = webhook.verify(body, headers)
        sent_at = int(headers["webhook-timestamp"])
        assert abs(sent_at - message.at) < 60, f"not the time of this attempt: {message}"

        def sign(at):
            return webhook.sign(message.id, datetime.fromtimestamp(at, tz=timezone.utc), body.decode())

        assert headers["webhook-signature"] == sign(sent_at), f"not what the library would sign: {message}"
        no_match, too_old = "No matching signature found", "Message timestamp too old"
        altered = body.replace(b'"event":"', b'"event":"x', 1)
        assert altered != body
        refuses(webhook, altered, headers, no_match)
        refuses(webhook, body + b" ", headers, no_match)
        refuses(webhook, body, headers | {"webhook-id": message.id + "0"}, no_match)
        refuses(webhook, body, headers | {"webhook-timestamp": str(sent_at + 1)}, no_match)
        refuses(Webhook(self.other), body, headers, no_match)
        stale = headers | {"webhook-timestamp": str(sent_at - STALE_S)}
        refuses(webhook, body, stale, too_old)
        # Even if it is signed for that time, as one that was recorded is.
        refuses(webhook, body, stale | {"webhook-signature": sign(sent_at - STALE_S)}, too_old)
        self.verified += 1
        return read


def live(nido):
    """Has something happen to two VMs. Nobody but commands that end, and what they leave behind, is there to deliver it."""
    for name in ["hook-a", "hook-b"]:
        nido.run("--quiet", "spawn", name, "--net", "none")
    nido.run("--quiet", "pause", "hook-a")
    nido.run("--quiet", "stop", "--force", "hook-b")
    nido.run("--quiet", "resume", "hook-a")
    for name in ["hook-b", "hook-a"]:
        nido.run("--quiet", "delete", "--force", "--yes", name)


def delivered(nido, endpoint, since):
    """Every event since then came, signed, those of one VM in order, and says what `nido events` says."""
    events = nido.events(since)
    kinds = {event["event"] for event in events}
    assert WANTED <= kinds, f"what should have happened has not: {kinds}"
    by_cursor = {event.pop("cursor"): event for event in events}

    def cursors():
        return [int(message.id.rsplit("_", 1)[1]) for message in endpoint.messages()]

    wanted = set(by_cursor)
    endpoint.receiver.wait(f"the events {sorted(wanted)} at {endpoint.path}", lambda: set(cursors()) >= wanted)
    assert set(cursors()) == wanted, f"messages about nothing: {cursors()} for {sorted(wanted)}"
    order = {}
    for cursor, message in zip(cursors(), endpoint.messages()):
        event = by_cursor[cursor]
        assert endpoint.verify(message) == event, f"not the event {event}: {message}"
        assert message.id.startswith(f"msg_{endpoint.id}_"), message
        order.setdefault(event["vm_name"], []).append(cursor)
    for name, came in order.items():
        # Each at least once: what came again is left out.
        first = list(dict.fromkeys(came))
        assert first == sorted(first), f"the events of {name} came in the order {came}"
    # The first attempt was refused, so the message came again, signed for another time.
    first, *rest = endpoint.messages(taken=False)
    assert first.status == 503 and first.id in {message.id for message in rest}, f"not tried again: {first}"
    endpoint.verify(first)


def again(nido, endpoint):
    """A delivery that is sent again is the same message, signed anew."""
    deliveries = nido.json("webhook", "deliveries", endpoint.id)["deliveries"]
    assert deliveries and all(one["state"] == "delivered" for one in deliveries), deliveries
    one = deliveries[0]

    def same():
        return [message for message in endpoint.messages() if message.id == one["message_id"]]

    before = same()
    nido.run("webhook", "redeliver", str(one["id"]))
    endpoint.receiver.wait(f"{one['message_id']} again", lambda: len(same()) > len(before))
    assert same()[-1].body == before[0].body, f"another message under the same id: {same()[-1]}"
    endpoint.verify(same()[-1])


def tested(nido, endpoint):
    """A test message is signed as well, and its outcome is told."""
    count = len(endpoint.messages())
    assert nido.json("webhook", "test", endpoint.id)["delivered"] is True
    messages = endpoint.messages()
    assert len(messages) == count + 1, "a test is one message"
    assert endpoint.verify(messages[-1])["event"] == "webhook.test"
    endpoint.receiver.answers = lambda message: 500
    failed = nido.json("webhook", "test", endpoint.id, expect=1)
    endpoint.receiver.answers = lambda message: 204
    assert (failed["delivered"], failed["status"]) == (False, 500), failed
    endpoint.verify(endpoint.messages(taken=False)[-1])


def main(program):
    nido, receiver = Nido(program), Receiver()
    since = nido.json("events")["cursor"]
    # As a person sees it: the id and the secret, once. And one of the endpoint's own.
    id, secret = nido.run("webhook", "add", "--url", receiver.url("/one"), "--allow-private").split()
    own = "whsec_" + base64.b64encode(os.urandom(64)).decode()
    own_id = nido.run("webhook", "add", "--url", receiver.url("/two"), "--allow-private", "--secret", own).strip()
    assert secret.startswith("whsec_") and len(base64.b64decode(secret[6:])) >= 24, secret
    endpoints = [Endpoint(receiver, "/one", id, secret, own), Endpoint(receiver, "/two", own_id, own, secret)]
    shown = nido.run("--json", "webhook", "list") + nido.run("webhook", "list")
    assert id in shown and secret[6:] not in shown and own[6:] not in shown, "a secret is shown again"

    refused = {}
    receiver.answers = lambda message: 204 if message.path in refused else refused.setdefault(message.path, 503)
    live(nido)
    for endpoint in endpoints:
        delivered(nido, endpoint, since)
        again(nido, endpoint)
        tested(nido, endpoint)
        nido.run("webhook", "remove", endpoint.id)
    counts = [endpoint.verified for endpoint in endpoints]
    assert min(counts) >= len(WANTED), f"too few messages were verified: {counts}"
    print(f"contract: standardwebhooks verifies {sum(counts)} messages, and refuses all of them altered, late, or of another key")


if __name__ == "__main__":
    main(sys.argv[1])
