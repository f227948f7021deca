"""Verifies a receipt from docs/audit.md alone: signature, chains, and what the lines state. Usage: FILE PUBLIC_KEY"""

import hashlib
import json
import re
import subprocess
import sys
import tempfile

NET = {"\\": "\\", "'": "'", "n": "\n", "t": "\t"}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def check_signature(receipt: dict, key: str) -> None:
    assert receipt["public_key"] == key, "another key"
    signature = bytes.fromhex(receipt["signature"])
    unsigned = {name: value for name, value in receipt.items() if name != "signature"}
    text = json.dumps(unsigned, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    # An Ed25519 key as SubjectPublicKeyInfo.
    spki = bytes.fromhex("302a300506032b6570032100") + bytes.fromhex(key)
    with tempfile.TemporaryDirectory() as directory:
        paths = {}
        for name, data in {"key": spki, "text": text, "signature": signature}.items():
            paths[name] = f"{directory}/{name}"
            with open(paths[name], "wb") as file:
                file.write(data)
        command = ["openssl", "pkeyutl", "-verify", "-pubin", "-keyform", "DER", "-inkey", paths["key"], "-rawin"]
        subprocess.run([*command, "-in", paths["text"], "-sigfile", paths["signature"]], check=True, capture_output=True)


def check_chain(segment: dict) -> list[str]:
    """The lines about the VM."""
    chain, own = segment["previous"], []
    for seq, entry in enumerate(segment["lines"], segment["first_seq"]):
        if isinstance(entry, str):
            body, stated = entry.split(" chain='")
            assert body.endswith(f" seq='{seq}'"), "a line without its number"
            chain = sha256((chain + sha256(body.encode())).encode())
            assert stated == chain + "'", f"line {seq} does not follow"
            own.append(entry)
        else:
            chain = sha256((chain + entry["sha256"]).encode())
    assert chain == segment["chain"], "another end"
    return own


def value(line: str, key: str) -> str:
    quoted = re.search(rf" {key}='((?:[^'\\]|\\.)*)'", line).group(1)
    return re.sub(r"\\(u\{[0-9a-f]+\}|.)", lambda m: NET.get(m[1]) or chr(int(m[1][2:-1], 16)), quoted)


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        receipt = json.load(file)
    check_signature(receipt, sys.argv[2])
    acts, events = check_chain(receipt["acts"]), check_chain(receipt["events"])
    created = [json.loads(value(line, "params")) for line in events if value(line, "tool") == "vm.created"]
    assert created[0]["details"]["source"]["parts"] == receipt["vm"]["parts"], "other digests"
    assert all(json.loads(value(line, "params"))["details"]["vm_id"] == receipt["vm"]["id"] for line in events)
    print(" ".join([value(line, "tool") for line in acts if value(line, "stage") == "attempt"]))
    print(" ".join(value(line, "tool") for line in events))


main()
