"""The life of a VM through the client that openapi-generator makes for Python.

    generated.py ADDRESS TOKEN        with the client on PYTHONPATH
"""

import sys

import nido_client
from nido_client import (
    ExecApi, ExecBody, FilesApi, ForkRequest, ForwardRequest, ForwardsApi, SnapshotRequest, SnapshotsApi, SpawnRequest, StopRequest, VmsApi,
)
from nido_client.exceptions import ApiException

address, token = sys.argv[1:]
configuration = nido_client.Configuration(host=address, access_token=token)
name, copy = "of-generated", "of-generated-2"
DATA = bytes(range(256)) * 1200

with nido_client.ApiClient(configuration) as client:
    vms, execs, files = VmsApi(client), ExecApi(client), FilesApi(client)
    snapshots, forwards = SnapshotsApi(client), ForwardsApi(client)
    vm = vms.vm_spawn(SpawnRequest(name=name, net="none", labels={"made-by": "openapi-generator"}))
    assert (vm.name, vm.status) == (name, "running"), vm
    assert [one.name for one in vms.vm_list(label=["made-by"], status="running").vms] == [name]

    done = execs.vm_exec(name, ExecBody(command="echo $WORD; cat", env={"WORD": "hello"}, stdin="in"))
    assert (done.stdout, done.exit_code) == ("hello\nin", 0), done
    try:
        execs.vm_exec(name, ExecBody(argv=["no-such-command"]))
        raise SystemExit("a command that is not there was started")
    except ApiException as error:
        assert error.status == 422 and "command_not_found" in error.body, error

    assert files.vm_upload(name, "/root/a+b.bin", body=DATA).bytes == len(DATA)
    assert bytes(files.vm_download(name, "/root/a+b.bin")) == DATA

    bound = forwards.forward_add(name, ForwardRequest(guest_port=80))
    assert bound.host == "127.0.0.1" and bound.host_port > 0, bound
    assert [one.host_port for one in forwards.forward_list(name).forwards] == [bound.host_port]
    forwards.forward_remove(name, str(bound.host_port))

    snapshots.snapshot_create(name, SnapshotRequest(name="before"))
    execs.vm_exec(name, ExecBody(argv=["rm", "/root/a+b.bin"]))
    # A body that may be absent is left out, with the content type that the client names all the same.
    assert snapshots.snapshot_restore(name, "before").status == "running"
    assert bytes(files.vm_download(name, "/root/a+b.bin")) == DATA

    forked = vms.vm_fork(name, ForkRequest(names=[copy]))
    assert [one.name for one in forked.copies] == [copy], forked
    assert vms.vm_stop(copy, stop_request=StopRequest(force=True)).status == "stopped"
    assert vms.vm_delete(copy).name == copy
    assert vms.vm_delete(vm.id, force=True).name == name, "an id is as good as a name"
print("openapi-generator, python: spawn to delete")
