// The page for people: VMs, live events, logs, a terminal, networks (network.js). Everything it shows comes from the API it is served by; text of
// guests only ever becomes text nodes, or goes to the terminal that is made for it.
"use strict";

const $ = (id) => document.getElementById(id);
const state = { token: sessionStorage.getItem("nido-token"), events: null, panel: null };

class Problem extends Error {
  constructor(problem) {
    super(problem.hint ? `${problem.detail} (${problem.hint})` : problem.detail);
    this.code = problem.code;
  }
}

async function ask(method, path, body, options = {}) {
  const headers = { Authorization: `Bearer ${state.token}`, ...options.headers };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const answer = await fetch(path, { method, headers, body: body && JSON.stringify(body), signal: options.signal });
  if (!answer.ok) throw new Problem(await answer.json());
  return options.raw ? answer : answer.json();
}

function tell(text) {
  $("state").textContent = text;
}

async function attempt(what, work) {
  tell(`${what} …`);
  try {
    await work();
    tell(`${what}: done`);
  } catch (error) {
    tell(`${what}: ${error.message}`);
    if (error.code === "unauthorized") forget(error.message);
  }
  await list();
}

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function span(milliseconds) {
  const seconds = Math.max(0, Math.round(milliseconds / 1000));
  if (seconds < 90) return `${seconds} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  if (seconds < 129600) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86400)} d`;
}

function button(label, vm, act, danger) {
  const made = element("button", label, { "aria-label": `${label} ${vm.name}` });
  if (danger) made.className = "danger";
  made.addEventListener("click", act);
  return made;
}

function row(vm) {
  const line = element("tr", undefined, { "data-vm": vm.name });
  const now = Date.now();
  const end = [vm.expires_at, vm.idle_at].filter(Boolean).sort()[0];
  const status = element("td", vm.status, { class: vm.status });
  if (vm.failure) status.title = vm.failure.message;
  const network = element("td");
  network.append(...badges(vm));
  const actions = element("td");
  const path = `v1/vms/${vm.name}`;
  if (vm.status === "running") {
    actions.append(button("Terminal", vm, () => openTerminal(vm.name)));
    actions.append(button("Stop", vm, () => stop(vm)));
  } else if (vm.status === "paused") {
    actions.append(button("Resume", vm, () => attempt(`resuming ${vm.name}`, () => ask("POST", `${path}/resume`, {}))));
  } else if (["created", "stopped", "failed"].includes(vm.status)) {
    actions.append(button("Start", vm, () => attempt(`starting ${vm.name}`, () => ask("POST", `${path}/start`, {}))));
  }
  actions.append(button("Log", vm, () => openLog(vm.name)));
  actions.append(button("Network", vm, () => openNetwork(vm.name)));
  actions.append(button("Delete", vm, () => remove(vm), true));
  line.append(
    element("td", vm.name), status, network, element("td", vm.template), element("td", span(now - Date.parse(vm.created_at))),
    element("td", end ? `in ${span(Date.parse(end) - now)}` : "–"), actions,
  );
  return line;
}

async function list() {
  if (!state.token) return;
  try {
    const { vms } = await ask("GET", "v1/vms");
    // What the keyboard stands on stays under it.
    const focused = document.activeElement?.getAttribute("aria-label");
    $("vms").replaceChildren(...vms.map(row));
    if (focused) document.querySelector(`[aria-label="${CSS.escape(focused)}"]`)?.focus();
    $("none").hidden = vms.length > 0;
  } catch (error) {
    tell(error.message);
    if (error.code === "unauthorized") forget(error.message);
  }
}

// Whether the user confirmed.
async function confirmed(question, word) {
  $("question").textContent = question;
  $("yes").textContent = word;
  const dialog = $("confirm");
  dialog.returnValue = "no";
  dialog.showModal();
  await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
  return dialog.returnValue === "yes";
}

async function stop(vm) {
  const lost = vm.ephemeral ? "It is ephemeral: it is deleted, with all data in it." : "The contents of its memory are lost.";
  if (!(await confirmed(`Stop the VM ${vm.name}? ${lost}`, "Stop"))) return;
  await attempt(`stopping ${vm.name}`, () => ask("POST", `v1/vms/${vm.name}/stop`, {}));
}

async function remove(vm) {
  if (!(await confirmed(`Delete the VM ${vm.name} and everything in it?`, "Delete"))) return;
  if (state.panel?.vm === vm.name) closePanel();
  await attempt(`deleting ${vm.name}`, () => ask("DELETE", `v1/vms/${vm.name}?force=true`));
}

function closePanel() {
  state.panel?.end();
  state.panel = null;
  $("panel").hidden = true;
  $("log").hidden = $("terminal").hidden = $("network").hidden = true;
  $("terminal").replaceChildren();
}

function openPanel(vm, title, shown, end) {
  closePanel();
  state.panel = { vm, end };
  $("panel-head").textContent = title;
  $("panel").hidden = false;
  $(shown).hidden = false;
}

async function openLog(vm) {
  const stop = new AbortController();
  openPanel(vm, `Console of ${vm}`, "log", () => stop.abort());
  const log = $("log");
  log.textContent = "";
  log.focus();
  try {
    const answer = await ask("GET", `v1/vms/${vm}/logs?tail=200&follow=true`, undefined, { raw: true, signal: stop.signal });
    const decoder = new TextDecoder();
    for await (const piece of pieces(answer.body)) {
      // Control characters are shown, not obeyed.
      const text = decoder.decode(piece, { stream: true }).replace(/[\u0000-\u0008\u000b-\u001f\u007f]/g, (c) => (c === "\r" ? "" : "·"));
      log.append(text);
      if (log.textContent.length > 400000) log.textContent = log.textContent.slice(-200000);
      log.scrollTop = log.scrollHeight;
    }
  } catch (error) {
    if (error.name !== "AbortError") log.append(`\n${error.message}\n`);
  }
}

async function* pieces(body) {
  const reader = body.getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    yield value;
  }
}

function openTerminal(vm) {
  const terminal = new Terminal({ cursorBlink: true, screenReaderMode: false, scrollback: 5000 });
  const fit = new FitAddon.FitAddon();
  const url = new URL(`v1/vms/${vm}/exec/socket`, document.baseURI);
  url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
  const socket = new WebSocket(url, ["nido", `nido.token.${state.token}`]);
  socket.binaryType = "arraybuffer";
  const encoder = new TextEncoder();
  const send = (message) => socket.readyState === WebSocket.OPEN && socket.send(message);
  const resized = () => fit.fit();
  openPanel(vm, `Terminal of ${vm}`, "terminal", () => {
    window.removeEventListener("resize", resized);
    socket.close();
    terminal.dispose();
  });
  terminal.loadAddon(fit);
  terminal.open($("terminal"));
  fit.fit();
  window.addEventListener("resize", resized);
  terminal.onData((data) => send(encoder.encode(data)));
  terminal.onResize(({ rows, cols }) => send(JSON.stringify({ resize: { rows, columns: cols } })));
  socket.addEventListener("open", () => {
    const size = { rows: terminal.rows, columns: terminal.cols };
    send(JSON.stringify({ start: { argv: ["sh", "-lc", 'exec "${SHELL:-/bin/bash}" -l'] }, pty: size, term: "xterm-256color" }));
    terminal.focus();
  });
  socket.addEventListener("message", ({ data }) => {
    if (data instanceof ArrayBuffer) return terminal.write(new Uint8Array(data, 1));
    const said = JSON.parse(data);
    if (said.exit) terminal.write("\r\n[the shell has ended]\r\n");
    if (said.error) terminal.write(`\r\n[${said.error.detail}]\r\n`);
  });
  socket.addEventListener("close", () => tell(`the terminal of ${vm} is closed`));
}

async function follow() {
  const stop = new AbortController();
  state.events = stop;
  let last;
  while (!stop.signal.aborted) {
    try {
      const headers = { Accept: "text/event-stream" };
      if (last) headers["Last-Event-ID"] = last;
      const answer = await ask("GET", "v1/events", undefined, { raw: true, headers, signal: stop.signal });
      tell("connected");
      await list();
      const decoder = new TextDecoder();
      let begun = "";
      for await (const piece of pieces(answer.body)) {
        begun += decoder.decode(piece, { stream: true });
        const frames = begun.split("\n\n");
        begun = frames.pop();
        for (const frame of frames) {
          const data = frame.split("\n").find((line) => line.startsWith("data:"));
          // Why the stream ends: the next request is told the same.
          if (!data || frame.startsWith("event: error")) continue;
          const event = JSON.parse(data.slice(5));
          last = String(event.cursor);
          happened(event);
        }
      }
    } catch (error) {
      if (stop.signal.aborted) return;
      if (error.code === "unauthorized") return forget(error.message);
      tell(`not connected: ${error.message}`);
    }
    await new Promise((resolve) => setTimeout(resolve, 2000));
  }
}

function happened(event) {
  const about = event.vm_name ?? event.details.template ?? "";
  const line = element("li", `${event.timestamp.slice(11, 19)} ${event.event} ${about} ${event.details.message ?? ""}`);
  $("events").prepend(line);
  while ($("events").children.length > 200) $("events").lastChild.remove();
  list();
  if (state.panel?.vm === event.vm_name) state.panel?.refresh?.();
}

function forget(why) {
  state.events?.abort();
  closePanel();
  state.token = null;
  sessionStorage.removeItem("nido-token");
  $("vms").replaceChildren();
  $("leave").hidden = true;
  $("token-trouble").textContent = why ?? "";
  $("token").value = "";
  if (!$("ask-token").open) $("ask-token").showModal();
}

async function enter() {
  $("leave").hidden = false;
  const { templates } = await ask("GET", "v1/templates");
  const select = document.querySelector("#spawn [name=template]");
  select.replaceChildren(...templates.map(({ name }) => element("option", name)));
  if (templates.some(({ name }) => name === "sandbox")) select.value = "sandbox";
  follow();
}

$("ask-token").addEventListener("close", async () => {
  state.token = $("token").value.trim();
  try {
    await enter();
    sessionStorage.setItem("nido-token", state.token);
  } catch (error) {
    forget(error.message);
  }
});
$("ask-token").addEventListener("cancel", (event) => event.preventDefault());
$("leave").addEventListener("click", () => forget());
$("close").addEventListener("click", closePanel);
$("spawn").addEventListener("submit", (event) => {
  event.preventDefault();
  const form = event.target;
  const body = Object.fromEntries(new FormData(form));
  const allow = body.allow.split(/[\s,]+/).filter(Boolean);
  if (allow.length > 0) body.allow = allow;
  else delete body.allow;
  form.elements.name.value = "";
  attempt(`spawning ${body.name}`, () => ask("POST", "v1/vms", body));
});
setInterval(list, 30000);
if (state.token) enter().catch((error) => forget(error.message));
else forget();
