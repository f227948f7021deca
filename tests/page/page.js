// The page for people in a real browser: a token that is wrong and one that is right, a VM spawned, `uname -a` typed into its
// terminal, its console looked at, its network refused, allowed and restricted again, the VM stopped, started and deleted, after a question where something is lost; by keyboard where a keyboard can do it. Any error of the page or of its policy
// fails the test.
//
//   node page.js ADDRESS TOKEN [PICTURE]
"use strict";

const { chromium } = require("playwright-core");
const assert = require("assert");
const [address, token, picture] = process.argv.slice(2);
// Looks again and again: a page with a strict policy does not let a waiting function be compiled in it.
async function until(page, look) {
  const end = Date.now() + 60000;
  while (!(await page.evaluate(look))) {
    assert(Date.now() < end, `waited in vain: ${look}`);
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}

(async () => {
  const flags = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync";
  const executablePath = process.env.CHROMIUM ?? "/usr/bin/chromium";
  const browser = await chromium.launch({ executablePath, args: flags.split(" ") });
  const page = await browser.newPage();
  const trouble = [];
  page.on("pageerror", (e) => trouble.push(String(e)));
  page.on("response", (r) => r.status() >= 400 && trouble.push(`${r.status()} ${r.request().method()} ${r.url()}`));
  page.on("console", (m) => m.type() === "error" && trouble.push(m.text()));
  await page.goto(address + "/");
  await page.fill("#token", "nido_wrong");
  await page.keyboard.press("Enter");
  await until(page, () => document.querySelector("#token-trouble").textContent.includes("token"));
  trouble.length = 0;
  await page.fill("#token", token);
  await page.keyboard.press("Enter");
  await until(page, () => document.querySelector("#state").textContent.includes("connected"));
  await page.fill("#spawn [name=name]", "page");
  await page.selectOption("#spawn [name=template]", "sandbox");
  await page.selectOption("#spawn [name=net]", "restricted");
  await page.fill("#spawn [name=allow]", "first.example:443 host:8081");
  await page.press("#spawn [name=name]", "Enter");
  await page.waitForSelector('tr[data-vm=page] td.running', { timeout: 60000 });
  await page.click('[aria-label="Terminal page"]');
  await page.waitForSelector("#terminal .xterm-rows");
  await until(page, () => document.querySelector("#terminal .xterm-rows").textContent.includes("#"));
  await page.keyboard.type("uname -a; echo 'seen on the' console > /dev/console; echo $((6 * 7))42\n");
  await until(page, () => /Linux page .*x86_64[^]*4242/.test(document.querySelector("#terminal .xterm-rows").textContent));
  await until(page, () => document.querySelector("#events").textContent.includes("vm.started page"));
  // What the guest is refused is shown with its rule; the rule is added after a question, and removed.
  assert.deepStrictEqual(await page.$$eval("tr[data-vm=page] .badge", (all) => all.map((one) => one.textContent).slice(0, 1)), ["restricted"]);
  await page.keyboard.type("getent hosts refused.example; (: < /dev/tcp/10.0.2.2/8082) 2>&1; echo $((6 * 7))43\n");
  await until(page, () => document.querySelector("#terminal .xterm-rows").textContent.includes("4243"));
  await page.click('[aria-label="Network page"]');
  await page.waitForSelector("#network:not([hidden]) #denials");
  await until(page, () => document.querySelector("#denials").textContent.includes("dns to refused.example"));
  assert.deepStrictEqual(await page.$$eval("#network .rules code", (all) => all.map((one) => one.textContent)), ["first.example:443", "host:8081"]);
  if (picture) await page.screenshot({ path: picture, fullPage: true });
  await page.click('[aria-label="Allow refused.example for page"]');
  await page.waitForSelector("#confirm[open]");
  assert((await page.textContent("#question")).includes("reach refused.example?"));
  await page.keyboard.press("Escape");
  assert.strictEqual(await page.$('[data-rule="refused.example"]'), null);
  await page.click('[aria-label="Allow refused.example for page"]');
  await page.click("#confirm button.danger");
  await page.waitForSelector('[data-rule="refused.example"]');
  assert.strictEqual(await page.$('[aria-label="Allow refused.example for page"]'), null);
  await page.click('[aria-label="Remove refused.example of page"]');
  await page.waitForSelector('[data-rule="refused.example"]', { state: "detached" });
  // Text of a guest stays text: an event with elements and characters that hide text.
  const shown = await page.evaluate(() => {
    const denial = { protocol: "dns", name: "<img src=x onerror=alert(1)>\u202e", reason: "<b>", count: 1, last_at: new Date().toISOString(), rule: "<i>" };
    const parts = refusals({ vm: "page" }, { network: { denials: [denial] }, allow: [] });
    const place = document.createElement("div");
    place.append(...parts);
    return { text: place.textContent, elements: place.querySelectorAll("img, b, i").length };
  });
  assert(shown.text.includes("<img src=x onerror=alert(1)>·") && shown.elements === 0, JSON.stringify(shown));
  await page.click('[aria-label="Log page"]');
  await page.waitForSelector("#log:not([hidden])");
  await until(page, () => document.querySelector("#log").textContent.includes("seen on the console"));
  assert(await page.isHidden("#terminal"));
  await page.click('[aria-label="Stop page"]');
  await page.waitForSelector("#confirm[open]");
  assert((await page.textContent("#question")).includes("Stop the VM page?"));
  await page.keyboard.press("Escape");
  assert(await page.$('tr[data-vm=page] td.running'));
  await page.click('[aria-label="Stop page"]');
  await page.click("#confirm button.danger");
  await page.waitForSelector("tr[data-vm=page] td.stopped", { timeout: 60000 });
  await page.focus('[aria-label="Start page"]');
  await page.keyboard.press("Enter");
  await page.waitForSelector("tr[data-vm=page] td.running", { timeout: 60000 });
  await page.focus('[aria-label="Delete page"]');
  await page.keyboard.press("Enter");
  await page.waitForSelector("#confirm[open]");
  await page.keyboard.press("Enter"); // the focus is on Cancel
  assert(await page.$("tr[data-vm=page]"));
  await page.click('[aria-label="Delete page"]');
  await page.click("#confirm button.danger");
  await page.waitForSelector("tr[data-vm=page]", { state: "detached", timeout: 60000 });
  await until(page, () => document.querySelector("#events").textContent.includes("vm.deleted page"));
  assert.deepStrictEqual(trouble, []);
  await browser.close();
  console.log("page: ok");
})().catch((e) => { console.error(e); process.exit(1); });
