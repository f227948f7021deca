"""An ssh server in a guest, to measure ssh and scp against the very VM that nido is measured with.

No template of nido's has one. Debian's packages are fetched on the host and unpacked in the guest: the guest needs no
network, and nothing is configured that a fresh `openssh-server` would not have, but that PAM is left out, which can only
make ssh quicker.
"""

import glob
import os
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


class GuestSsh:
    """ssh into one VM, by two ways: through `nido proxy`, and through a TCP port that `nido forward` publishes."""

    def __init__(self, vm, scratch):
        self.vm, self.scratch = vm, scratch
        self.key = os.path.join(scratch, "key")
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.key], check=True)
        self._install()
        self._start()
        self.port = vm.rig.json("forward", "add", vm.name, "22")["host_port"]
        self._wait()

    def _install(self):
        present = self.vm.exec("dpkg-query", "-W", "-f", "${Package}\n").split()
        wanted = [package for package in PACKAGES if package not in present]
        say(f"  fetching {len(wanted)} Debian packages for an ssh server in the guest")
        debs = os.path.join(self.scratch, "debs")
        os.makedirs(debs)
        # As root apt would fetch as another user, who cannot write here.
        fetch = ["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", *wanted]
        subprocess.run(fetch, cwd=debs, check=True)
        self.vm.rig.run("upload", self.vm.name, debs, "/root/debs")
        # Symlinks to directories (a merged /usr) stay what they are.
        unpack = 'for deb in /root/debs/*.deb; do dpkg-deb --fsys-tarfile "$deb" | tar -x --keep-directory-symlink -C /; done'
        self.vm.exec("sh", "-ec", unpack + "; rm -rf /root/debs; ldconfig")
        for deb in glob.glob(os.path.join(debs, "*.deb")):
            os.unlink(deb)

    def _start(self):
        with open(self.key + ".pub", "rb") as public:
            self.vm.exec(
                "sh", "-ec",
                "grep -q ^sshd: /etc/passwd || echo 'sshd:x:105:65534::/run/sshd:/usr/sbin/nologin' >>/etc/passwd;"
                "mkdir -p /run/sshd /root/.ssh; chmod 700 /root/.ssh; cat >/root/.ssh/authorized_keys;"
                "cp -n /usr/share/openssh/sshd_config /etc/ssh/; ssh-keygen -q -A;"
                "/usr/sbin/sshd -o UsePAM=no -o PermitRootLogin=prohibit-password </dev/null",
                stdin=public.read(),
            )

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
        common = {
            "IdentityFile": self.key, "IdentitiesOnly": "yes", "BatchMode": "yes", "LogLevel": "ERROR",
            "StrictHostKeyChecking": "no", "UserKnownHostsFile": "/dev/null", "GlobalKnownHostsFile": "/dev/null",
        }
        if way == "proxy":
            common["ProxyCommand"] = f"'{self.vm.rig.nido}' proxy {self.vm.name} 22"
        flags = ["-F", "/dev/null"]
        for key, value in common.items():
            flags += ["-o", f"{key}={value}"]
        return flags

    def true(self, way):
        """Seconds of `ssh vm true`; `way` is proxy or forward."""
        port = ["-p", str(self.port)] if way == "forward" else []
        return timed(["ssh", *self._options(way), *port, "root@127.0.0.1", "true"], self.vm.rig.env)

    def copy(self, way, source, target):
        """Seconds of one scp; a path in the guest is given as `:path`."""
        port = ["-P", str(self.port)] if way == "forward" else []
        ends = [f"root@127.0.0.1{end}" if end.startswith(":") else end for end in (source, target)]
        return timed(["scp", "-q", *self._options(way), *port, *ends], self.vm.rig.env)
