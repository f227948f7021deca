"""The prompts, followed to the letter in real guests, over stdio and in both eras of the protocol.

    prompts.py NIDO

Nothing is fetched from anywhere but this machine. Needs git, with its daemon.
"""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from mcp import MCPDeprecationWarning
from recipe import NETWORK_RULES, Cook, Recipe
from rig import DEADLINE, Rig, until

ERAS = ("auto", "legacy")
# One that fails, with more output than an answer shows.
TESTS = """
import unittest

class Tests(unittest.TestCase):
    def test_right(self):
        self.assertEqual(1 + 1, 2)

    def test_wrong(self):
        for number in range(20000):
            print("line", number)
        self.assertEqual(1 + 1, 3)
"""
COMMAND = "python3 -m unittest -v"
# Makes a package of the git that is there, and takes git away: where apt finds it, it can be installed again.
WITHOUT_GIT = r"""
set -e
mkdir -p /srv/debs/git/DEBIAN
dpkg -L git | while read -r path; do if [ -f "$path" ] || [ -L "$path" ]; then echo "$path"; fi; done >/srv/list
tar -cf - -T /srv/list 2>/dev/null | tar -xf - -C /srv/debs/git
printf 'Package: git\nVersion: 1:99\nArchitecture: all\nMaintainer: tests\nDescription: git\n' >/srv/debs/git/DEBIAN/control
dpkg-deb -Znone --build /srv/debs/git /srv/debs/git.deb >/dev/null
cd /srv/debs
sum=$(sha256sum git.deb | cut -d' ' -f1)
{ cat git/DEBIAN/control; echo "Filename: ./git.deb"; echo "Size: $(stat -c %s git.deb)"; echo "SHA256: $sum"; } >Packages
rm -rf git /etc/apt/sources.list.d/*
echo 'deb [trusted=yes] file:/srv/debs ./' >/etc/apt/sources.list
dpkg --purge --force-depends git >/dev/null
! command -v git
"""


class Place:
    """Where the servers are started: what is below it they may copy from. And what is to be tested."""

    def __init__(self, nido, path):
        self.nido, self.path = nido, path
        app = path / "app"
        (app / "sub").mkdir(parents=True)
        (app / "test_app.py").write_text(TESTS)
        (app / "sub" / "data").write_text("data\n")
        (app / "loop").symlink_to(".")
        # The one with a directory that holds everything, as others pack it; the other without.
        for name, where, what in (("app.tar.gz", path, "app"), ("flat.tar", app, ".")):
            subprocess.run(["tar", "-caf", path / name, "-C", where, what], check=True)
        git = ["git", "-c", "user.name=tests", "-c", "user.email=tests@example", "-C", app]
        bare = ["clone", "-q", "--bare", ".", path / "git" / "app.git"]
        for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "all"], bare):
            subprocess.run([*git, *words], check=True)
        shutil.rmtree(app / ".git")

    def by_hand(self, *words):
        return subprocess.run([self.nido, "--quiet", *words], check=True, capture_output=True, text=True, timeout=5 * DEADLINE).stdout

    def vms(self):
        return self.by_hand("ls").split()


@contextmanager
def git_served(place):
    """The repository at an address, as a guest sees this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [f"--base-path={place.path / 'git'}", "--listen=127.0.0.1", f"--port={port}", "--export-all", "--log-destination=none"]
    server = subprocess.Popen(["git", "daemon", "--reuseaddr", *words], start_new_session=True)
    try:
        end = time.monotonic() + DEADLINE
        while subprocess.run(["git", "ls-remote", f"git://127.0.0.1:{port}/app.git"], capture_output=True).returncode:
            assert server.poll() is None and time.monotonic() < end, "git daemon does not serve"
            time.sleep(0.1)
        NETWORK_RULES[:] = [f"host:{port}"]
        yield f"git://10.0.2.2:{port}/app.git"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(DEADLINE)


async def prompt(rig, name, **arguments):
    return Recipe((await rig.client.get_prompt(name, arguments)).messages[0].content.text)


@asynccontextmanager
async def session(place, mode, what, *flags, forms=False):
    began = time.monotonic()
    async with Rig(place.nido, None, mode, *flags, forms=forms) as rig:
        yield rig
    print(f"ok: prompts, {mode}: {what} ({time.monotonic() - began:.1f} s)", flush=True)


async def deploys(place, mode, repository, *tools, template=None):
    """A repository is tested, the report is what the tests said, and the VM is gone."""
    more = {"template": template} if template else {}
    async with session(place, mode, f"{repository} is tested{f' with {template}' if template else ''}") as rig:
        recipe = await prompt(rig, "deploy_and_test", repository=repository, test_command=COMMAND, report="all there is", **more)
        assert recipe.report[1] == "all there is"
        cook = await Cook(rig, recipe).follow()
        assert cook.tools() == ["vm_spawn", *tools, "vm_exec", "vm_delete"], cook.calls
        vm = cook.last("vm_spawn")
        assert vm["lease"] and vm["expires_at"] and vm["ephemeral"], vm
        done = cook.last("vm_exec")
        assert done["exit_code"] == 1 and "FAIL: test_wrong" in done["stderr"] and "test_right" in done["stderr"], done
        assert "2 != 3" in done["stderr"] and "FAILED (failures=1)" in done["stderr"], done["stderr"]
        # What was cut is read before anything is said about it.
        assert done["truncated"] == {"stdout": True, "stderr": False}, done["truncated"]
        whole = await rig.read(done["full_output"][0])
        assert "line 10000\n" not in done["stdout"] and "line 10000\n" in whole, len(whole)
        # Nobody was asked: it was its own.
        assert cook.last("vm_delete")["name"] == recipe.vm and not cook.told, cook.told
        assert recipe.vm not in place.vms()


async def stops(place, mode, repository, code, *tools, template=None):
    """What cannot be fetched is not tested; the VM is gone all the same."""
    more = {"template": template} if template else {}
    async with session(place, mode, f"{repository} cannot be had{f' with {template}' if template else ''}") as rig:
        recipe = await prompt(rig, "deploy_and_test", repository=repository, test_command=COMMAND, **more)
        cook = await Cook(rig, recipe).follow()
        assert cook.tools() == ["vm_spawn", *tools, "vm_delete"], cook.calls
        answer = cook.calls[-2][2]
        assert (answer["error"]["code"] if code else answer["exit_code"] != 0) == (code or True), answer
        assert recipe.vm not in place.vms()
        return cook.told


async def sandboxes(place, mode):
    """A task is done, what came of it fetched, and the VM is gone."""
    words = {"file": "numbers", "text": "3\n1\n2\n", "program": "sort", "argument": "--version"}
    words["a line of shell"] = "sort /srv/numbers | tee /srv/sorted"
    async with session(place, mode, "quick_sandbox") as rig:
        recipe = await prompt(rig, "quick_sandbox", task="sort the numbers", ttl="10m")
        assert "<task>sort the numbers</task>" in recipe.text and recipe.report is None
        cook = await Cook(rig, recipe, words).follow()
        assert cook.tools() == ["vm_spawn", "vm_upload", "vm_exec", "vm_exec", "vm_download", "vm_delete"], cook.calls
        assert cook.last("vm_exec")["stdout"] == "1\n2\n3\n" and cook.last("vm_download")["content"] == "3\n1\n2\n"
        assert recipe.vm not in place.vms()


async def forgotten(place, mode, killed):
    """A model that never comes to the last step: the session's end does it, also if the server is killed."""
    rig = Rig(place.nido, None, mode)
    try:
        async with rig:
            recipe = await prompt(rig, "quick_sandbox", task="nothing")
            before = servers()
            await Cook(rig, recipe).follow(until=2)
            assert recipe.vm in place.vms()
            if killed:
                assert len(before) == 1, before
                os.kill(before[0], signal.SIGKILL)
    except BaseException as error:
        # The SDK may say that its server is gone.
        if not killed or isinstance(error, AssertionError):
            raise

    async def gone():
        return recipe.vm not in place.vms()

    if killed:
        await until("the end of the VM", gone)
    else:
        assert await gone()
    print(f"ok: prompts, {mode}: forgotten{', and the server killed' if killed else ''}", flush=True)


def servers():
    """The servers that this process has started."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((directory / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == os.getpid() and b"mcp-server" in (directory / "cmdline").read_bytes():
                found.append(int(directory.name))
        except (FileNotFoundError, ProcessLookupError):
            pass
    return found


async def confirmed(place, mode):
    """The step that deletes, in a session that did not make the VM: a person is asked, on the way that is told."""

    def approve(hint):
        given = hint.split("nido approve ")[1].split(";")[0]
        place.by_hand("approve", "--yes", given)

    async with session(place, mode, "the end is confirmed") as maker:
        for forms in (False, True):
            recipe = await prompt(maker, "quick_sandbox", task="nothing")
            await Cook(maker, recipe).follow(until=2)
            async with Rig(place.nido, None, mode, forms=forms) as other:
                cook = Cook(other, recipe, approve=approve)
                if forms:
                    # The user says no first; then there is nothing about it in the recipe, and nothing to be tried.
                    other.says = "decline"
                    error = await other.bad("denied", "vm_delete", name=recipe.vm, force=True)
                    assert error["next_step"].startswith("the user has refused: do not"), error
                    other.says = "accept"
                assert recipe.vm in place.vms()
                await cook.follow(first=recipe.last)
                if forms:
                    assert cook.tools() == ["vm_delete"] and len(other.asked) == 2, (cook.calls, other.asked)
                else:
                    assert cook.tools() == ["vm_delete"] * 2 and len(cook.told) == 1, cook.calls
                    assert cook.calls[0][2]["error"]["code"] == "approval_required", cook.calls
                assert recipe.vm not in place.vms()
            # Gone already, as its recipe knows.
            again = await Cook(maker, recipe).follow(first=recipe.last)
            assert again.last("vm_delete")["error"]["code"] == "vm_not_found", again.calls


def without_git(place):
    """Two templates without git: with one it can be installed, with the other not."""
    began = time.monotonic()
    place.by_hand("spawn", "box", "--net", "none", "--memory", "1G")
    place.by_hand("exec", "box", "--timeout", "10m", "--", "sh", "-c", WITHOUT_GIT)
    place.by_hand("template", "create", "git-later", "--from", "box", "--no-bake")
    place.by_hand("exec", "box", "--", "sh", "-c", "rm -rf /srv/debs")
    place.by_hand("template", "create", "git-never", "--from", "box", "--no-bake")
    place.by_hand("delete", "--force", "--yes", "box")
    print(f"ok: prompts: two templates without git ({time.monotonic() - began:.1f} s)", flush=True)


async def main():
    place = Place(sys.argv[1], Path.cwd())
    clone = ("vm_exec", "vm_exec")
    with git_served(place) as address:
        for mode in ERAS:
            await deploys(place, mode, "app", "vm_upload")
            await deploys(place, mode, str(place.path / "app.tar.gz"), "vm_upload", "vm_exec")
            await deploys(place, mode, address, *clone)
            await stops(place, mode, "/etc", "denied", "vm_upload")
            await stops(place, mode, address.replace("app", "none"), None, *clone)
            await sandboxes(place, mode)
            await confirmed(place, mode)
            await forgotten(place, mode, killed=False)
            await forgotten(place, mode, killed=True)
        await deploys(place, "auto", "flat.tar", "vm_upload", "vm_exec")
        without_git(place)
        await deploys(place, "auto", address, "vm_exec", "vm_exec", "vm_exec", template="git-later")
        told = await stops(place, "legacy", address, None, "vm_exec", "vm_exec", template="git-never")
        assert len(told) == 1 and "no git" in told[0], told
    assert place.vms() == [], place.vms()


# The older era is what is tried.
warnings.simplefilter("ignore", MCPDeprecationWarning)
with tempfile.TemporaryDirectory(prefix="nido-prompts-") as directory:
    os.chdir(directory)
    asyncio.run(main())
