// The life of a VM through the client that openapi-generator makes for Go.
//
//	generated ADDRESS TOKEN
package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"

	nido "example.com/nido/client"
)

const (
	name  = "of-go"
	other = "of-go-2"
	// More than 32 bits hold.
	diskBytes = 5 << 30
)

func must[T any](value T, err error) T {
	if err != nil {
		var problem *nido.GenericOpenAPIError
		if errors.As(err, &problem) {
			err = fmt.Errorf("%w: %s", err, problem.Body())
		}
		panic(err)
	}
	return value
}

// done takes what the client answers beside a value: the HTTP response is not looked at.
func done[T, R any](value T, _ R, err error) T { return must(value, err) }

func check(is bool, what ...any) {
	if !is {
		panic(fmt.Sprint(what...))
	}
}

// A download is a file that the client has made.
func content(file *os.File) []byte {
	defer os.Remove(file.Name())
	defer file.Close()
	must(file.Seek(0, io.SeekStart))
	return must(io.ReadAll(file))
}

func main() {
	address := must(url.Parse(os.Args[1]))
	configuration := nido.NewConfiguration()
	configuration.Host, configuration.Scheme = address.Host, address.Scheme
	configuration.Servers = nido.ServerConfigurations{{URL: address.String()}}
	client := nido.NewAPIClient(configuration)
	ctx := context.WithValue(context.Background(), nido.ContextAccessToken, os.Args[2])

	spawn := nido.NewSpawnRequest(name)
	spawn.SetNet(nido.NETCHOICE_NONE)
	spawn.SetDiskBytes(diskBytes)
	spawn.SetLabels(map[string]string{"made-by": "go"})
	vm := done(client.VmsAPI.VmSpawn(ctx).SpawnRequest(*spawn).Execute())
	check(vm.Name == name && vm.Status == nido.VMSTATE_RUNNING && vm.DiskBytes == diskBytes, vm)
	listed := done(client.VmsAPI.VmList(ctx).Label([]string{"made-by=go"}).Status("running").Execute())
	check(len(listed.Vms) == 1 && listed.Vms[0].Name == name, listed)

	body := nido.NewExecBody()
	body.SetCommand("echo $WORD; cat")
	body.SetEnv(map[string]string{"WORD": "hello"})
	body.SetStdin("in")
	ran := done(client.ExecAPI.VmExec(ctx, name).ExecBody(*body).Execute())
	check(ran.GetStdout() == "hello\nin" && ran.GetExitCode() == 0, ran.GetStdout(), ran.GetExitCode())
	missing := nido.NewExecBody()
	missing.SetArgv([]string{"no-such-command"})
	_, answer, err := client.ExecAPI.VmExec(ctx, name).ExecBody(*missing).Execute()
	var problem *nido.GenericOpenAPIError
	check(errors.As(err, &problem) && answer.StatusCode == 422, err)
	check(bytes.Contains(problem.Body(), []byte("command_not_found")), string(problem.Body()))

	data := make([]byte, 300_000)
	for at := range data {
		data[at] = byte(at)
	}
	file := must(os.CreateTemp("", "nido"))
	defer os.Remove(file.Name())
	must(file.Write(data))
	must(file.Seek(0, io.SeekStart))
	copied := done(client.FilesAPI.VmUpload(ctx, name).Path("/root/a+b.bin").Body(file).Execute())
	check(copied.GetBytes() == int64(len(data)), copied)
	download := func() []byte {
		return content(done(client.FilesAPI.VmDownload(ctx, name).Path("/root/a+b.bin").Execute()))
	}
	check(bytes.Equal(download(), data), "what was downloaded is not what was uploaded")

	bound := done(client.ForwardsAPI.ForwardAdd(ctx, name).ForwardRequest(*nido.NewForwardRequest(80)).Execute())
	check(bound.Host == "127.0.0.1" && bound.HostPort > 0, bound)
	forwards := done(client.ForwardsAPI.ForwardList(ctx, name).Execute())
	check(len(forwards.Forwards) == 1 && forwards.Forwards[0].HostPort == bound.HostPort, forwards)
	done(client.ForwardsAPI.ForwardRemove(ctx, name, fmt.Sprint(bound.HostPort)).Execute())

	done(client.SnapshotsAPI.SnapshotCreate(ctx, name).SnapshotRequest(*nido.NewSnapshotRequest("before")).Execute())
	remove := nido.NewExecBody()
	remove.SetArgv([]string{"rm", "/root/a+b.bin"})
	done(client.ExecAPI.VmExec(ctx, name).ExecBody(*remove).Execute())
	restored := done(client.SnapshotsAPI.SnapshotRestore(ctx, name, "before").Execute())
	check(restored.Status == nido.VMSTATE_RUNNING, restored)
	check(bytes.Equal(download(), data), "what was restored is not what was saved")

	forked := done(client.VmsAPI.VmFork(ctx, name).ForkRequest(*nido.NewForkRequest([]string{other})).Execute())
	check(len(forked.Copies) == 1 && forked.Copies[0].Name == other, forked)
	stop := nido.NewStopRequest()
	stop.SetForce(true)
	stopped := done(client.VmsAPI.VmStop(ctx, other).StopRequest(*stop).Execute())
	check(stopped.Status == nido.VMSTATE_STOPPED, stopped)
	done(client.VmsAPI.VmDelete(ctx, other).Execute())
	deleted := done(client.VmsAPI.VmDelete(ctx, vm.Id).Force(true).Execute())
	check(deleted.Name == name, "an id is as good as a name: ", deleted)
	fmt.Println("openapi-generator, go: spawn to delete")
}
