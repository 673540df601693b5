// The page /docs in Debian's Chromium: it loads, shows, sends, and asks nobody
// else.
//
//     node browser.mjs --http 127.0.0.1:8000 --screenshots target/browser
//
// The server must serve `minilm`, and ask nobody for a key.

import { existsSync, mkdirSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";

import { Checks, CALL_MS_MAX, expect, expectEqual, flags, need } from "./checks.mjs";

const { chromium } = need("playwright-core");
const options = flags({
  http: undefined,
  screenshots: "target/browser",
  chromium: "/usr/bin/chromium",
});
const origin = `http://${options.http}`;
const checks = new Checks();
const folder = resolve(options.screenshots);
mkdirSync(folder, { recursive: true });
if (!existsSync(options.chromium)) {
  console.log(`FAILED: ${options.chromium} is missing: run \`make test\``);
  process.exit(1);
}

const profile = mkdtempSync(join(tmpdir(), "andon-browser-"));
const context = await chromium.launchPersistentContext(profile, {
  executablePath: options.chromium,
  headless: true,
  viewport: { width: 1400, height: 1000 },
  args: [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
  ],
});
context.setDefaultTimeout(CALL_MS_MAX);

// All that the page says and asks for, from its first moment.
const said = [];
const asked = [];
context.on("request", (request) => asked.push(request.url()));
context.on("weberror", (error) => said.push(`uncaught: ${error.error().message}`));
context.on("console", (message) => {
  if (["error", "warning"].includes(message.type())) {
    said.push(`${message.type()}: ${message.text()}`);
  }
});

const page = await context.newPage();
const result = page.locator(".result");

async function screenshot(name) {
  const path = join(folder, `${name}.png`);
  await page.screenshot({ path });
  console.log(`screenshot ${path}`);
}

async function open(words) {
  await page.locator("#filter").fill(words);
  const link = page.locator("#groups a").first();
  await link.click();
  await page.locator("form .send, .send").first().waitFor();
}

async function send(body) {
  if (body !== undefined) {
    await page.locator("#body").fill(body);
  }
  const answered = page.waitForResponse((response) => response.request().method() === "POST");
  await page.locator(".send").click();
  await answered;
  // The line with the status, then the whole body.
  await result.locator("strong").waitFor();
  await page.waitForFunction(() => /bytes/.test(document.querySelector(".result .line")?.textContent ?? ""));
  return {
    status: Number((await result.locator("strong").textContent()).slice(0, 3)),
    body: await result.locator("pre").textContent(),
  };
}

await checks.check("the_page_loads", async () => {
  const answer = await page.goto(`${origin}/docs`, { waitUntil: "networkidle" });
  expectEqual(answer.status(), 200, "the status");
  await page.locator("#groups a").first().waitFor();
  expect((await page.locator("h1").first().textContent()).length > 0, "there is no heading");
  await screenshot("overview");
});

await checks.check("it_lists_every_operation", async () => {
  const document = await (await context.request.get(`${origin}/openapi.json`)).json();
  const methods = ["get", "post", "put", "delete", "patch"];
  const operations = Object.values(document.paths).flatMap((item) =>
    Object.keys(item).filter((key) => methods.includes(key)),
  );
  const listed = await page.locator("#groups a").count();
  expect(listed > 10, `${listed} operations are listed`);
  expectEqual(listed, operations.length, "the number of operations");
});

await checks.check("every_operation_opens", async () => {
  const links = page.locator("#groups a");
  expect((await links.count()) > 10, "no operations are listed");
  for (let place = 0; place < (await links.count()); place += 1) {
    await links.nth(place).click();
    await page.locator(".address").waitFor();
    const text = await page.locator("#operation").innerText();
    expect(!/\[object |undefined|\bNaN\b/.test(text), `it shows no text but ${text.slice(0, 1500)}`);
    expect(
      (await page.locator(".answers tr").count()) > 1,
      `${await page.locator(".address").textContent()} shows no errors`,
    );
  }
});

await checks.check("the_embeddings_example_is_answered", async () => {
  await open("/v1/embeddings");
  const { status, body } = await send();
  expectEqual(status, 200, `the status (${body.slice(0, 200)})`);
  const answer = JSON.parse(body);
  expectEqual(answer.object, "list", "object");
  expect(answer.data.length > 0 && answer.data[0].embedding.length > 0, "there is no vector");
  await screenshot("embeddings");
});

await checks.check("the_fields_of_a_body_are_shown", async () => {
  const names = await page.locator("#operation .field .name").allTextContents();
  expect(names.includes("encoding_format"), `the fields are ${names}`);
});

await checks.check("a_bad_request_shows_its_problem", async () => {
  const { status, body } = await send('{"model": "minilm", "input": ["x", 7]}');
  expectEqual(status, 400, "the status");
  expectEqual(JSON.parse(body).error.param, "input[1]", "the field");
  await screenshot("bad_request");
});

await checks.check("json_that_is_none_is_warned_of_and_refused", async () => {
  const text = '{"model": "minilm",';
  await page.locator("#body").fill(text);
  expect((await page.locator("#warn").textContent()).length > 0, "there is no warning");
  const { status, body } = await send(text);
  expectEqual(status, 400, "the status");
  expect(/line 1/.test(body), `it does not say where: ${body}`);
});

await checks.check("texts_are_not_read_as_html", async () => {
  const { body } = await send('{"model": "<img src=x onerror=alert(1)>", "input": "x"}');
  expectEqual(await result.locator("img").count(), 0, "images in the answer");
  expect(body.length > 0, "there is no answer");
});

await checks.check("a_small_window_is_usable", async () => {
  await page.setViewportSize({ width: 390, height: 844 });
  const wide = await page.evaluate(() => document.documentElement.scrollWidth);
  await screenshot("phone");
  expect(wide <= 390, `the page is ${wide} pixels wide`);
});

await checks.check("nobody_else_is_asked", async () => {
  const foreign = asked.filter((url) => !url.startsWith(`${origin}/`) && !/^(data|blob|about):/.test(url));
  expectEqual(foreign, [], "requests elsewhere");
  expect(asked.length >= 4, `only ${asked.length} requests were seen`);
});

await checks.check("the_console_is_silent", async () => {
  // What this script had refused on purpose, the browser reports by itself.
  const own = /Failed to load resource: the server responded with a status of 4\d\d/;
  expectEqual(said.filter((text) => !own.test(text)), [], "the console");
});

await context.close();
rmSync(profile, { recursive: true, force: true });
checks.finish();
