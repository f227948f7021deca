"""A nido home for measuring: how nido is called, which VMs it runs, and that nothing of it is left afterwards.

Invariant: only VMs of this home are touched, and all of them are deleted when the `with` block ends, however it ends.
"""

import json
import os
import subprocess
import sys
import time


def say(text):
    print(text, file=sys.stderr, flush=True)


class Vm:
    """A VM of the home."""

    def __init__(self, rig, name):
        self.rig, self.name = rig, name
        self.id = rig.json("info", name)["id"]
        self.dir = os.path.join(rig.home, "vms", self.id)

    def exec(self, *argv, stdin=None):
        """Runs a command in it; gives its output."""
        flags = ["-i"] if stdin is not None else []
        return self.rig.output("exec", self.name, *flags, "--", *argv, stdin=stdin)

    def status_kb(self, field, pid=1):
        """A field of a guest process's status, in KiB."""
        return _field_kb(self.exec("cat", f"/proc/{pid}/status"), field)

    def _process(self, matches):
        for entry in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{entry}/cmdline", "rb") as file:
                    argv = file.read().decode(errors="replace").split("\0")[:-1]
                if matches(entry, argv):
                    return int(entry), argv
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
        raise LookupError(f"no such process of VM {self.name}")

    def _qemu(self):
        here = os.path.realpath(self.dir)
        return self._process(lambda pid, argv: "-nodefaults" in argv and os.readlink(f"/proc/{pid}/cwd") == here)

    def qemu_argv(self):
        """What starts this QEMU once more: the program that nido started, which may be a script around QEMU, and its arguments."""
        running = self._qemu()[1]
        return [self.rig.env.get("NIDO_QEMU", running[0]), *running[1:]]

    def qemu_pid(self):
        return self._qemu()[0]

    def guardian_pid(self):
        return self._process(lambda _, argv: argv[-1:] == ["watch"] and self.rig.home in argv)[0]

    def supervisor_pid(self):
        return self._process(lambda _, argv: "supervise" in argv and any(self.id in arg for arg in argv))[0]


def _field_kb(text, field):
    for line in text.splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise LookupError(f"no {field}")


def host_kb(pid, field, file="status"):
    """A field of a host process's status (or smaps_rollup), in KiB."""
    with open(f"/proc/{pid}/{file}", encoding="ascii") as source:
        return _field_kb(source.read(), field)


class Rig:
    """nido, and a home of its own."""

    def __init__(self, nido, home, qemu=None):
        self.nido, self.home = nido, home
        self.env = {key: value for key, value in os.environ.items() if not key.startswith("NIDO_")}
        self.env["NIDO_HOME"] = home
        if qemu:
            self.env["NIDO_QEMU"] = qemu
        self._names = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        names = self.output("ls", "-q").split()
        if names:
            self.run("delete", "--force", "--yes", *names)

    def run(self, *argv, stdin=None, check=True):
        """Runs nido to its end; quiet unless it fails."""
        where = {"input": stdin} if stdin is not None else {"stdin": subprocess.DEVNULL}
        done = subprocess.run([self.nido, *argv], env=self.env, capture_output=True, check=False, **where)
        if check and done.returncode != 0:
            raise RuntimeError(f"nido {' '.join(argv)} ended with {done.returncode}: {done.stderr.decode().strip()}")
        return done

    def output(self, *argv, stdin=None):
        return self.run(*argv, stdin=stdin).stdout.decode(errors="replace")

    def json(self, *argv):
        return json.loads(self.output(*argv, "--json"))

    def timed(self, *argv):
        """Seconds a whole nido process takes, output thrown away."""
        return timed([self.nido, *argv], self.env)

    def peak_kb(self, *argv):
        """Peak memory of a nido process, in KiB, and the seconds it took.

        GNU time starts it: a process inherits the peak of the one that starts it, and an interpreter's hides nido's.
        """
        begun = time.monotonic()
        done = subprocess.run(
            ["/usr/bin/time", "-f", "%M", self.nido, "--quiet", *argv],
            env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=True,
        )
        return int(done.stderr.decode().split()[-1]), time.monotonic() - begun

    def fresh_name(self, word):
        self._names += 1
        return f"bench-{word}-{os.getpid()}-{self._names}"

    def spawn(self, word, *flags):
        name = self.fresh_name(word)
        self.run("spawn", name, *flags)
        return Vm(self, name)

    def create(self, word):
        name = self.fresh_name(word)
        self.run("create", name)
        return Vm(self, name)

    def delete(self, vm):
        self.run("delete", "--force", "--yes", vm.name)


def timed(argv, env=None, stdin=subprocess.DEVNULL):
    """Seconds a process takes from start to end, output thrown away."""
    begun = time.monotonic()
    subprocess.run(argv, env=env, stdin=stdin, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    return time.monotonic() - begun
