// The life of a VM through openapi-fetch, with the types that openapi-typescript makes.
//
//     node fetch.js ADDRESS TOKEN

import createClient from "openapi-fetch";
import type { paths } from "./schema.js";

const [baseUrl, token] = process.argv.slice(2);
const client = createClient<paths>({ baseUrl, headers: { Authorization: `Bearer ${token}` } });
const [name, copy] = ["of-fetch", "of-fetch-2"];
const bytes = new Uint8Array(300_000).map((_, at) => at % 251);

function must<T>(what: string, answer: { data?: T; error?: unknown; response: Response }): T {
  if (answer.data === undefined) throw new Error(`${what}: ${answer.response.status} ${JSON.stringify(answer.error)}`);
  return answer.data;
}
// Which of the answers that an operation may have it is: that of a caller who waits has this field.
type Having<T, K> = T extends unknown ? (K extends keyof T ? T : never) : never;
function having<T, K extends string>(what: string, value: T, field: K): Having<T, K> {
  if (typeof value !== "object" || value === null || !(field in value)) throw new Error(`${what}: ${JSON.stringify(value)}`);
  return value as Having<T, K>;
}
function same(what: string, is: unknown, wanted: unknown): void {
  if (JSON.stringify(is) !== JSON.stringify(wanted)) throw new Error(`${what}: ${JSON.stringify(is)}`);
}

const path = { name };
const vm = must("spawn", await client.POST("/v1/vms", {
  params: { header: { "Idempotency-Key": `fetch-${Date.now()}` } },
  body: { name, labels: { by: "fetch" } },
}));
same("spawn", vm.status, "running");
const ran = await client.POST("/v1/vms/{name}/exec", { params: { path }, body: { command: "echo hello" } });
const done = having("exec", must("exec", ran), "stdout");
same("exec", [done.stdout, done.exit_code], ["hello\n", 0]);
const file = { params: { path, query: { path: "/root/a+b" } } };
const sent = must("upload", await client.PUT("/v1/vms/{name}/files", {
  ...file,
  body: bytes as unknown as string,
  bodySerializer: (body) => body as unknown as Uint8Array<ArrayBuffer>,
  headers: { "Content-Type": "application/octet-stream" },
}));
same("upload", sent.bytes, bytes.length);
const got = must("download", await client.GET("/v1/vms/{name}/files", { ...file, parseAs: "arrayBuffer" }));
same("download", Buffer.from(got as unknown as ArrayBuffer).equals(Buffer.from(bytes)), true);
const bound = must("forward", await client.POST("/v1/vms/{name}/forwards", { params: { path }, body: { guest_port: 80 } }));
const host: string = bound.host;
same("forward", [host, bound.host_port > 0], ["127.0.0.1", true]);
must("snapshot", await client.POST("/v1/vms/{name}/snapshots", { params: { path }, body: { name: "before" } }));
const back = must("restore", await client.POST("/v1/vms/{name}/snapshots/{snapshot}/restore", {
  params: { path: { name, snapshot: "before" } },
}));
same("restore", back.status, "running");
must("fork", await client.POST("/v1/vms/{name}/fork", { params: { path }, body: { names: [copy] } }));
for (const one of [copy, name]) {
  const gone = await client.DELETE("/v1/vms/{name}", { params: { path: { name: one }, query: { force: true } } });
  same("delete", having("delete", must("delete", gone), "name").name, one);
}
console.log("openapi-typescript, openapi-fetch: spawn to delete");
