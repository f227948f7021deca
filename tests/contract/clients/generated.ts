// The life of a VM through the client that openapi-generator makes for TypeScript (fetch).
//
//     node generated.js ADDRESS TOKEN

import { Configuration, ExecApi, FilesApi, ForwardsApi, SnapshotsApi, VmsApi } from "./client/index.js";

const [basePath, accessToken] = process.argv.slice(2);
const configuration = new Configuration({ basePath, accessToken });
const [vms, exec, files] = [new VmsApi(configuration), new ExecApi(configuration), new FilesApi(configuration)];
const [snapshots, forwards] = [new SnapshotsApi(configuration), new ForwardsApi(configuration)];
const [name, copy] = ["of-generated-ts", "of-generated-ts-2"];
const bytes = new Uint8Array(300_000).map((_, at) => at % 251);

function same(what: string, is: unknown, wanted: unknown): void {
  if (JSON.stringify(is) !== JSON.stringify(wanted)) throw new Error(`${what}: ${JSON.stringify(is)}`);
}

const vm = await vms.vmSpawn({ spawnRequest: { name } });
same("spawn", [vm.name, vm.status], [name, "running"]);
const done = await exec.vmExec({ name, execBody: { argv: ["echo", "hello"] } });
same("exec", [done.stdout, done.exitCode], ["hello\n", 0]);
const sent = await files.vmUpload({ name, path: "/root/a+b", body: new Blob([bytes]) });
same("upload", sent.bytes, bytes.length);
const got = await files.vmDownload({ name, path: "/root/a+b" });
same("download", Buffer.from(await got.arrayBuffer()).equals(Buffer.from(bytes)), true);
const bound = await forwards.forwardAdd({ name, forwardRequest: { guestPort: 80 } });
same("forward", bound.host, "127.0.0.1");
await snapshots.snapshotCreate({ name, snapshotRequest: { name: "before" } });
same("restore", (await snapshots.snapshotRestore({ name, snapshot: "before" })).status, "running");
await vms.vmFork({ name, forkRequest: { names: [copy] } });
for (const one of [copy, name]) {
  same("delete", (await vms.vmDelete({ name: one, force: true })).name, one);
}
console.log("openapi-generator, typescript: spawn to delete");
