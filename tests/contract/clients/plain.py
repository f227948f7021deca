"""The life of a VM through the client that openapi-python-client makes.

    plain.py ADDRESS TOKEN        with the client on PYTHONPATH
"""

import io
import sys

from nido_plain import AuthenticatedClient
from nido_plain.api.exec_ import vm_exec
from nido_plain.api.files import vm_download, vm_upload
from nido_plain.api.forwards import forward_add
from nido_plain.api.snapshots import snapshot_create, snapshot_restore
from nido_plain.api.vms import vm_delete, vm_fork, vm_spawn
from nido_plain.models import ExecBody, ForkRequest, ForwardRequest, RestoreRequest, SnapshotRequest, SpawnRequest
from nido_plain.types import File

address, token = sys.argv[1:]
name, copy = "of-plain", "of-plain-2"
DATA = bytes(range(256)) * 1200

with AuthenticatedClient(base_url=address, token=token, timeout=120) as client:
    vm = vm_spawn.sync(client=client, body=SpawnRequest(name=name))
    assert vm.status == "running", vm
    done = vm_exec.sync(name, client=client, body=ExecBody(argv=["echo", "hello"], timeout_seconds=30))
    assert (done.stdout, done.exit_code) == ("hello\n", 0), done
    sent = vm_upload.sync(name, client=client, path="/root/data", body=File(payload=io.BytesIO(DATA)))
    assert sent.bytes_ == len(DATA), sent
    got = vm_download.sync_detailed(name, client=client, path="/root/data")
    assert got.content == DATA
    bound = forward_add.sync(name, client=client, body=ForwardRequest(guest_port=80))
    assert bound.host_port > 0, bound
    snapshot_create.sync(name, client=client, body=SnapshotRequest(name="before"))
    assert snapshot_restore.sync(name, "before", client=client, body=RestoreRequest()).status == "running"
    forked = vm_fork.sync(name, client=client, body=ForkRequest(names=[copy]))
    assert [one.name for one in forked.copies] == [copy], forked
    for one in (copy, name):
        assert vm_delete.sync(one, client=client, force=True).name == one
print("openapi-python-client: spawn to delete")
