"""An ssh server in a guest, to measure ssh and scp against the very VM that nido is measured with.

No template of nido's has one. Debian's packages are fetched on the host and unpacked in the guest: the guest needs no
network, and nothing is configured that a fresh `openssh-server` would not have, but that PAM is left out, which can only
make ssh quicker.
"""

import os
import shutil
import socket
import subprocess
import time

from rig import say, timed

PACKAGES = (
    "openssh-server openssh-sftp-server openssh-client libwrap0 libnsl2 libtirpc3 libtirpc-common libedit2 libbsd0 libmd0"
    " libfido2-1 libcbor0.8"
).split()
# How long the server may take to answer for the first time, in seconds.
DEADLINE = 60


def make_key(scratch):
    """A key pair of this run's own; gives the path of the private one."""
    key = os.path.join(scratch, "key")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    return key


def unpack(vm, scratch, packages, what):
    """Fetches those of the Debian packages that the guest lacks, and unpacks them in it."""
    present = vm.exec("dpkg-query", "-W", "-f", "${Package}\n").split()
    wanted = [package for package in packages if package not in present]
    say(f"  fetching {len(wanted)} Debian packages for {what} in the guest")
    debs = os.path.join(scratch, "debs")
    os.makedirs(debs)
    # As root apt would fetch as another user, who cannot write here.
    fetch = ["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", *wanted]
    subprocess.run(fetch, cwd=debs, check=True)
    vm.rig.run("upload", vm.name, debs, "/root/debs")
    shutil.rmtree(debs)
    # Symlinks to directories (a merged /usr) stay what they are.
    each = 'for deb in /root/debs/*.deb; do dpkg-deb --fsys-tarfile "$deb" | tar -x --keep-directory-symlink -C /; done'
    vm.exec("sh", "-ec", each + "; rm -rf /root/debs; ldconfig")


def install(vm, scratch, key):
    """An ssh server in the guest that lets this key in as root; it does not run yet."""
    unpack(vm, scratch, PACKAGES, "an ssh server")
    with open(key + ".pub", "rb") as public:
        vm.exec(
            "sh", "-ec",
            "grep -q ^sshd: /etc/passwd || echo 'sshd:x:105:65534::/run/sshd:/usr/sbin/nologin' >>/etc/passwd;"
            "mkdir -p /root/.ssh /etc/ssh/sshd_config.d; chmod 700 /root/.ssh; cat >/root/.ssh/authorized_keys;"
            "printf 'UsePAM no\nPermitRootLogin prohibit-password\nPasswordAuthentication no\n'"
            " >/etc/ssh/sshd_config.d/bench.conf;"
            "cp -n /usr/share/openssh/sshd_config /etc/ssh/; ssh-keygen -q -A",
            stdin=public.read(),
        )


def options(key):
    """What ssh and scp are told: this key, and no file of whoever measures."""
    words = {
        "IdentityFile": key, "IdentitiesOnly": "yes", "BatchMode": "yes", "LogLevel": "ERROR",
        "StrictHostKeyChecking": "no", "UserKnownHostsFile": "/dev/null", "GlobalKnownHostsFile": "/dev/null",
    }
    return ["-F", "/dev/null", *(part for key, value in words.items() for part in ("-o", f"{key}={value}"))]


class GuestSsh:
    """ssh into one VM, by two ways: through `nido proxy`, and through a TCP port that `nido forward` publishes."""

    def __init__(self, vm, scratch):
        self.vm, self.key = vm, make_key(scratch)
        install(vm, scratch, self.key)
        vm.exec("sh", "-ec", "mkdir -p /run/sshd; /usr/sbin/sshd </dev/null")
        self.port = vm.rig.json("forward", "add", vm.name, "22")["host_port"]
        self._wait()

    def _wait(self):
        """Waits until the server answers: a forward connects only when the guest does."""
        deadline = time.monotonic() + DEADLINE
        while True:
            with socket.create_connection(("127.0.0.1", self.port), timeout=DEADLINE) as probe:
                if probe.recv(4) == b"SSH-":
                    return
            if time.monotonic() > deadline:
                raise TimeoutError("the guest's ssh server does not answer")

    def _options(self, way):
        proxy = ["-o", f"ProxyCommand='{self.vm.rig.nido}' proxy {self.vm.name} 22"] if way == "proxy" else []
        return [*options(self.key), *proxy]

    def true(self, way):
        """Seconds of `ssh vm true`; `way` is proxy or forward."""
        port = ["-p", str(self.port)] if way == "forward" else []
        return timed(["ssh", *self._options(way), *port, "root@127.0.0.1", "true"], self.vm.rig.env)

    def copy(self, way, source, target):
        """Seconds of one scp; a path in the guest is given as `:path`."""
        port = ["-P", str(self.port)] if way == "forward" else []
        ends = [f"root@127.0.0.1{end}" if end.startswith(":") else end for end in (source, target)]
        return timed(["scp", "-q", *self._options(way), *port, *ends], self.vm.rig.env)
