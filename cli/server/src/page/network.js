// What a VM is connected to, and what confines it: badges in the list, and the panel "Network" of one VM. Names of refused
// destinations, and messages of limits, come from guests: they only ever become text nodes, without characters that hide text.
"use strict";

const HIDDEN_CHARACTERS = /[\u0000-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;

function plain(text) {
  return String(text).replace(HIDDEN_CHARACTERS, "·");
}

function badge(text, kind, title) {
  const made = element("span", plain(text), { class: `badge ${kind}` });
  if (title) made.title = plain(title);
  return made;
}

function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (count >= 1024 && unit < units.length - 1) {
    count /= 1024;
    unit += 1;
  }
  return `${unit === 0 ? count : count.toFixed(1)} ${units[unit]}`;
}

// The network, and what is out of the ordinary.
function badges(vm) {
  const made = [badge(vm.net, `net-${vm.net}`, "Network")];
  for (const hit of vm.limits_hit ?? []) made.push(badge(`limit: ${hit.kind}`, "hit", hit.message));
  if (vm.isolation && vm.isolation !== "hardware") made.push(badge("no hardware isolation", "hit"));
  if ((vm.secrets ?? []).length > 0) made.push(badge(`${vm.secrets.length} secrets`, "secret", vm.secrets.join(", ")));
  return made;
}

function openNetwork(vm) {
  const shown = { vm, over: false };
  openPanel(vm, `Network of ${vm}`, "network", () => {
    shown.over = true;
    $("network").replaceChildren();
  });
  state.panel.refresh = () => showNetwork(shown);
  $("network").focus();
  state.panel.refresh();
}

async function showNetwork(shown) {
  const path = `v1/vms/${encodeURIComponent(shown.vm)}`;
  try {
    const [vm, network] = await Promise.all([ask("GET", path), ask("GET", `${path}/network`)]);
    if (shown.over) return;
    // What the keyboard stands on stays under it.
    const focused = document.activeElement?.getAttribute("aria-label");
    $("network").replaceChildren(
      summary(vm), traffic(network), ...rules(shown, network), ...refusals(shown, network), ...secrets(vm),
    );
    if (focused) $("network").querySelector(`[aria-label="${CSS.escape(focused)}"]`)?.focus();
  } catch (error) {
    if (!shown.over) $("network").replaceChildren(element("p", plain(error.message)));
  }
}

function summary(vm) {
  const line = element("p", undefined, { class: "badges" });
  line.append(badge(vm.net, `net-${vm.net}`, "Network"));
  if (vm.isolation) line.append(badge(vm.isolation === "hardware" ? "hardware isolation" : "no hardware isolation", vm.isolation === "hardware" ? "good" : "hit"));
  for (const layer of vm.confinement ?? []) line.append(badge(layer, "good", "QEMU is confined by this layer"));
  if (vm.isolation && (vm.confinement ?? []).length === 0) line.append(badge("QEMU is not confined", "hit"));
  for (const hit of vm.limits_hit ?? []) line.append(badge(`limit: ${hit.kind} (${hit.count})`, "hit", hit.message));
  return line;
}

function traffic({ network }) {
  if (!network) return element("p", "It does not run, or has no network.");
  const { sent_bytes: sent, received_bytes: received, connections, open, denied } = network;
  return element("p", `${open} open connections of ${connections}; ${bytes(sent)} sent, ${bytes(received)} received; ${denied} refused`, { class: "traffic" });
}

// A change of rules, and the panel after it.
async function change(shown, what, work) {
  await attempt(what, work);
  if (!shown.over) await showNetwork(shown);
}

function removal(shown, rule) {
  const made = button(`Remove ${plain(rule)} of`, { name: shown.vm }, () => change(
    shown, `removing ${plain(rule)}`,
    () => ask("DELETE", `v1/vms/${encodeURIComponent(shown.vm)}/network/rules/${encodeURIComponent(rule)}`),
  ));
  made.textContent = "Remove";
  return made;
}

function rules(shown, { net, allow, presets = [] }) {
  const head = element("h3", net === "restricted" ? "It reaches only" : "It reaches in addition");
  const all = [...allow.map((rule) => [rule, ""]), ...presets.map(({ preset, rules }) => [preset, `: ${rules.join(" ")}`])];
  if (net === "none") return [];
  if (all.length === 0) return [head, element("p", "nothing")];
  const items = element("ul", undefined, { class: "rules" });
  for (const [rule, more] of all) {
    const item = element("li", undefined, { "data-rule": rule });
    item.append(element("code", plain(rule)), `${plain(more)} `, removal(shown, rule));
    items.append(item);
  }
  return [head, items];
}

function destination({ protocol, name, address, port }) {
  const to = name && address ? `${name} (${address})` : (name ?? address ?? "an unknown destination");
  return plain(`${protocol} to ${to}${port ? ` port ${port}` : ""}`);
}

async function allowRule(shown, rule) {
  const question = `Let the VM ${shown.vm} reach ${plain(rule)}? Its guest has chosen this destination.`;
  if (!(await confirmed(question, "Allow"))) return;
  const body = { allow: [rule] };
  await change(shown, `allowing ${plain(rule)}`, () => ask("POST", `v1/vms/${encodeURIComponent(shown.vm)}/network/rules`, body));
}

function refusals(shown, { network, allow }) {
  const denials = network?.denials ?? [];
  if (denials.length === 0) return [];
  const table = element("table", undefined, { id: "denials" });
  const line = table.createTHead().insertRow();
  for (const title of ["Refused", "Why", "Times", "Last", "Rule that allows it"]) line.append(element("th", title));
  const body = table.createTBody();
  for (const denial of denials) {
    const row = body.insertRow();
    const last = element("td");
    row.append(
      element("td", destination(denial)), element("td", plain(denial.reason)), element("td", denial.count),
      element("td", `${span(Date.now() - Date.parse(denial.last_at))} ago`), last,
    );
    if (!denial.rule) continue;
    last.append(element("code", plain(denial.rule)));
    if (allow.includes(denial.rule)) continue;
    const made = button(`Allow ${plain(denial.rule)} for`, { name: shown.vm }, () => allowRule(shown, denial.rule));
    made.textContent = "Allow";
    last.append(made);
  }
  return [element("h3", "Refused"), table];
}

function secrets({ secrets: uses = [], secret_env: variables = [] }) {
  if (uses.length === 0) return [];
  const items = element("ul", undefined, { class: "secrets" });
  for (const used of uses) items.append(element("li", plain(used)));
  for (const variable of variables) items.append(element("li", plain(variable)));
  return [element("h3", "Secrets: name, host and header; variables"), items];
}
