"""What people would otherwise use: a full Debian with systemd and an ssh server in QEMU, the guest agent of QEMU, libvirt.

Each is given its best: the guest is that of nido's own template, with nothing in it that a machine with one disk and no
screen has no use for, the network is up without DHCP, the disk is copied before the stopwatch runs, and ssh is asked the
moment the server answers. No nido process is involved in starting or asking these guests.
"""

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time

import bare
import forks
import guest_ssh
import libvirt
import slim
import wire
from result import Result
from rig import say, timed
from sampling import in_turns

QGA_PACKAGES = ["qemu-guest-agent", "libglib2.0-0", "libnuma1", "liburing2", "libpcre2-8-0", "libffi8"]
QGA_PORT = "org.qemu.guest_agent.0"
# How long a probe waits for the ssh server's greeting, in seconds: before the guest has a network, QEMU takes the
# connection and nobody answers it.
GREETING = 1
SETTLE = ["systemctl", "is-system-running", "--wait"]
DEBIAN = "full Debian with systemd and sshd in QEMU, to the first answered ssh"


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Debian:
    """A Debian with systemd, sshd and QEMU's guest agent, prepared once with nido and from then on started by hand."""

    def __init__(self, rig, place):
        self.place, self.key = place, guest_ssh.make_key(place)
        if "debian-12" not in slim.templates(rig):
            say("  building the template debian-12")
            rig.run("template", "build", "debian-12", "--no-bake")
        self.vm = rig.spawn("debian", "--template", "debian-12", "--machine", "pc", "--cold")
        guest_ssh.install(self.vm, place, self.key)
        guest_ssh.unpack(self.vm, place, QGA_PACKAGES, "QEMU's guest agent")
        # That agent's unit is started by its port, as in any Debian.
        self.vm.exec("systemctl", "enable", "--quiet", "ssh.service")
        self.argv = self.vm.qemu_argv()
        rig.run("stop", self.vm.name)
        for name in ("disk.qcow2", "guest.cbor"):
            shutil.copy(os.path.join(self.vm.dir, name), os.path.join(place, name))

    def argv_by_hand(self, port):
        """The VM's arguments, with a forwarded port for ssh and a port for QEMU's guest agent. At nido's own port nobody
        listens."""
        argv = []
        for arg in self.argv:
            if arg == "user,id=net":
                arg += f",hostfwd=tcp:127.0.0.1:{port}-:22"
            elif arg.startswith("socket,id=agent,"):
                arg = "null,id=agent"
            elif arg.startswith("virtio-serial-"):
                arg = arg.replace("max_ports=2", "max_ports=3")
            argv.append(arg)
        return [
            *argv, "-chardev", "socket,id=qga,path=qga.sock,server=on,wait=off",
            "-device", f"virtserialport,chardev=qga,name={QGA_PORT}",
        ]

    def start(self):
        """Starts it; gives the seconds until ssh has answered, and the running guest."""
        path = tempfile.mkdtemp(prefix="debian-", dir=self.place)
        for name in ("disk.qcow2", "guest.cbor"):
            shutil.copy(os.path.join(self.place, name), os.path.join(path, name))
        port = free_port()
        begun = time.monotonic()
        with open(os.path.join(path, "qemu.log"), "wb") as log:
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            qemu = subprocess.Popen(self.argv_by_hand(port), cwd=path, start_new_session=True, **streams)
        guest = DebianGuest(qemu, path, port, self.key)
        try:
            guest.wait_for_ssh(begun + bare.DEADLINE)
            return time.monotonic() - begun, guest
        except BaseException:
            guest.end()
            raise


class DebianGuest:
    """A running one."""

    def __init__(self, qemu, path, port, key):
        self.qemu, self.path, self.port, self.key = qemu, path, port, key

    def ssh(self):
        """Seconds of `ssh guest true`."""
        return timed(["ssh", *guest_ssh.options(self.key), "-p", str(self.port), "root@127.0.0.1", "true"])

    def wait_for_ssh(self, deadline):
        """Waits until the server greets, and asks it once. A probe costs next to nothing, a whole ssh that fails does."""
        while True:
            if self.qemu.poll() is not None:
                with open(os.path.join(self.path, "qemu.log"), encoding="utf-8", errors="replace") as log:
                    raise RuntimeError(f"QEMU ended: {log.read()[-500:]}")
            if time.monotonic() > deadline:
                raise TimeoutError("the guest's ssh server does not answer")
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=GREETING) as probe:
                    greeted = probe.recv(4) == b"SSH-"
                if greeted:
                    self.ssh()
                    return
            except (OSError, subprocess.CalledProcessError):
                pass
            time.sleep(0.01)

    def settle(self):
        """Waits until everything that starts at boot has started. `degraded` is an end, too."""
        argv = ["ssh", *guest_ssh.options(self.key), "-p", str(self.port), "root@127.0.0.1", *SETTLE]
        subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, timeout=bare.DEADLINE, check=False)

    def agent(self):
        return GuestAgent(os.path.join(self.path, "qga.sock"))

    def end(self):
        self.qemu.kill()
        self.qemu.wait()
        shutil.rmtree(self.path, ignore_errors=True)


class GuestAgent:
    """QEMU's guest agent at the other end of its port: one line of JSON there, one back."""

    def __init__(self, path):
        self.socket, self.held = wire.unix_connect(path, bare.DEADLINE), b""
        number = time.monotonic_ns() & 0x7FFFFFFF
        self.socket.sendall(_line("guest-sync", id=number))
        while self._answer() != number:
            pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def _answer(self):
        while b"\n" not in self.held:
            piece = self.socket.recv(65536)
            if not piece:
                raise wire.WireError("QEMU closed its guest agent's port")
            self.held += piece
        line, self.held = self.held.split(b"\n", 1)
        answer = json.loads(line)
        if "error" in answer:
            raise wire.WireError(f"QEMU's guest agent: {answer['error']}")
        return answer["return"]

    def run(self, command, **arguments):
        self.socket.sendall(_line(command, **arguments))
        return self._answer()

    def true(self):
        """Seconds of /bin/true: there is no event for its end, so it is asked for every millisecond."""
        begun = time.monotonic()
        pid = self.run("guest-exec", path="/bin/true")["pid"]
        while True:
            status = self.run("guest-exec-status", pid=pid)
            if status["exited"]:
                break
            time.sleep(0.001)
        if status["exitcode"] != 0:
            raise RuntimeError(f"true ended with {status}")
        return time.monotonic() - begun


def _line(command, **arguments):
    return json.dumps({"execute": command, **({"arguments": arguments} if arguments else {})}).encode() + b"\n"


def full_debian(bench, debian):
    """Until one can work in it: a full Debian with ssh beside nido's fork and cold start. Gives the last guest, too."""
    rig, count = bench.rig, bench.count(3, 1)
    result = Result("others", "Until the first command can run: nido, and a full Debian with ssh", "ms")
    fork, cold = forks.whole(rig, "--fork"), forks.whole(rig, "--cold")
    result.samples = {forks.FORK: [], forks.COLD: [], DEBIAN: []}
    fork()
    guest = None
    for turn in range(count):
        if guest:
            guest.end()
        # A fork takes so little of a turn that several are measured in each.
        result.samples[forks.FORK] += [fork() for _ in range(5)]
        result.samples[forks.COLD].append(cold())
        seconds, guest = debian.start()
        result.samples[DEBIAN].append(seconds * 1000)
        say(f"  full Debian: {turn + 1} of {count}")
    result.require("full Debian with ssh / nido's fork", result.median(DEBIAN) / result.median(forks.FORK), ">=", 100)
    result.notes.append(
        "the Debian is nido's template debian-12 on machine `pc`, with openssh-server and qemu-guest-agent, started by hand;"
        " sshd without PAM, ed25519 keys; the copy of its disk and the first boot of that disk do not count"
    )
    return result, guest


def commands(bench, debian, guest):
    """`true` in the same Debian: QEMU's guest agent and ssh in the one started by hand, nido in its own."""
    rig = bench.rig
    rig.run("start", debian.vm.name)
    rig.run("exec", debian.vm.name, "--timeout", f"{bare.DEADLINE}s", "--", *SETTLE, check=False)
    guest.settle()
    result = Result("commands", "`true` in a running Debian: QEMU's guest agent, ssh, nido", "ms")
    with guest.agent() as agent:
        sides = {
            "`nido exec vm -- true`, whole process": lambda: rig.timed("exec", debian.vm.name, "--", "true") * 1000,
            "guest-exec of qemu-guest-agent, over an open socket": lambda: agent.true() * 1000,
            "`ssh guest true` through QEMU's forwarded port": lambda: guest.ssh() * 1000,
        }
        result.samples = in_turns(sides, bench.count(30, 5), warm_up=1, what="commands")
    result.notes.append("qemu-guest-agent does not notify of the end of a command: it was polled every millisecond")
    return result


def others(bench):
    """A full Debian with ssh, QEMU's guest agent, libvirt."""
    with tempfile.TemporaryDirectory(dir=bench.scratch) as place:
        debian = Debian(bench.rig, place)
        result, guest = full_debian(bench, debian)
        try:
            beside = commands(bench, debian, guest)
        finally:
            guest.end()
            bench.rig.delete(debian.vm)
    return [result, beside, libvirt.libvirt(bench)]
