// Swagger UI at /docs/ in Debian's Chromium: it loads, shows, sends, and asks
// nobody else.
//
//     node browser.mjs --http 127.0.0.1:8000 --guarded 127.0.0.1:8010 \
//         --key-file target/key --screenshots target/browser [--operations all]
//
// Both servers must serve `minilm`: the first asks nobody for a key, the second
// takes that of the file. Swagger UI resolves the whole document for each
// operation that is opened, which takes its time: one of each group and method is
// opened, or all.

import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";

import { Checks, CALL_MS_MAX, expect, expectEqual, flags, need } from "./checks.mjs";

const { chromium } = need("playwright-core");
const options = flags({
  http: undefined,
  guarded: undefined,
  "key-file": undefined,
  screenshots: "target/browser",
  chromium: "/usr/bin/chromium",
  operations: "some",
});
const origin = `http://${options.http}`;
const guarded = `http://${options.guarded}`;
const key = readFileSync(options["key-file"], "utf8").trim();
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

// The page's messages and requests, from its start.
const messages = [];
const requested = [];
context.on("request", (request) => requested.push(request.url()));
context.on("weberror", (error) => messages.push(`uncaught: ${error.error().message}`));
context.on("console", (message) => {
  if (["error", "warning"].includes(message.type())) {
    messages.push(`${message.type()}: ${message.text()}`);
  }
});

const page = await context.newPage();
const result = page.locator(".opblock.is-open .live-responses-table");

async function screenshot(name) {
  const path = join(folder, `${name}.png`);
  await page.screenshot({ path });
  console.log(`screenshot ${path}`);
}

// Opens the page of a server anew, with all operations listed and closed.
async function load(from) {
  const response = await page.goto(`${from}/docs`, { waitUntil: "networkidle" });
  await page.locator(".opblock").first().waitFor();
  return response;
}

async function open(method, path) {
  const operation = page.locator(`.opblock-${method}`).filter({ has: page.locator(`[data-path="${path}"]`) });
  await operation.locator(".opblock-summary-control").click();
  await operation.locator("button.execute").waitFor();
  return operation;
}

async function send(body) {
  const operation = page.locator(".opblock.is-open");
  if (body !== undefined) {
    await operation.locator("textarea.body-param__text").fill(body);
  }
  const clear = operation.locator("button.btn-clear");
  if ((await clear.count()) > 0) {
    await clear.click();
  }
  const responded = page.waitForResponse((response) => /\/v[12]\//.test(response.url()));
  await operation.locator("button.execute").click();
  await responded;
  await result.locator(".response-col_status").last().waitFor();
  return {
    status: Number((await result.locator("tbody .response-col_status").first().textContent()).slice(0, 3)),
    body: await result.locator(".highlight-code pre, pre.microlight").first().textContent(),
  };
}

async function authorize(value) {
  await page.locator("button.authorize.unlocked, button.authorize.locked").first().click();
  const dialog = page.locator(".dialog-ux");
  const bearer = dialog.locator(".auth-container").filter({ hasText: "bearer" }).first();
  const logout = bearer.locator("button", { hasText: "Logout" });
  if ((await logout.count()) > 0) {
    await logout.click();
  }
  await bearer.locator("input").fill(value);
  await bearer.locator("button.authorize").click();
  await bearer.locator("button.btn-done").click();
}

// How bright a color is, from 0 to 255.
function brightness(color) {
  const [red, green, blue] = color.match(/\d+/g).map(Number);
  return (red + green + blue) / 3;
}

const colors = () =>
  page.evaluate(() => {
    const style = (selector) => getComputedStyle(document.querySelector(selector));
    return {
      background: style("body").backgroundColor,
      text: style(".swagger-ui .opblock-tag").color,
      color: style(".swagger-ui .info .title").color,
    };
  });

await checks.check("the_page_loads", async () => {
  const response = await load(origin);
  expectEqual(response.status(), 200, "the status");
  const heading = await page.locator(".info .title").first().textContent();
  expect(heading.startsWith("Andon"), `the heading is ${heading}`);
  const { background, text, color } = await colors();
  expect(brightness(background) > 200, `the background is ${background}`);
  expect(brightness(text) < 100 && brightness(color) < 100, `the texts are ${text} and ${color}`);
  await screenshot("overview");
});

await checks.check("it_lists_every_operation", async () => {
  const document = await (await context.request.get(`${origin}/openapi.json`)).json();
  const methods = ["get", "post", "put", "delete", "patch"];
  const operations = Object.values(document.paths).flatMap((item) =>
    Object.keys(item).filter((key) => methods.includes(key)),
  );
  const listed = await page.locator(".opblock").count();
  expect(listed > 10, `${listed} operations are listed`);
  expectEqual(listed, operations.length, "the number of operations");
});

await checks.check("operations_open", async () => {
  const operations = page.locator(".opblock");
  expect((await operations.count()) > 10, "no operations are listed");
  const kinds = new Set();
  for (let index = 0; index < (await operations.count()); index += 1) {
    const operation = operations.nth(index);
    const kind = await operation.evaluate((element) => {
      const group = element.closest(".opblock-tag-section").querySelector(".opblock-tag");
      return `${group.id} ${element.className}`;
    });
    if (kinds.has(kind) && options.operations !== "all") {
      continue;
    }
    kinds.add(kind);
    const path = await operation.locator("[data-path]").getAttribute("data-path");
    await operation.locator(".opblock-summary-control").click();
    await operation.locator(".opblock-body .responses-table").waitFor();
    const text = await operation.innerText();
    expect(!/\[object |undefined|\bNaN\b/.test(text), `${path} shows no text but ${text.slice(0, 1500)}`);
    const responses = await operation.locator(".responses-table tr.response").count();
    expect(responses > 1, `${path} shows no errors`);
    await operation.locator(".opblock-summary-control").click();
  }
  expect(kinds.size >= 5, `only ${[...kinds]} were opened`);
});

await checks.check("the_embeddings_example_succeeds", async () => {
  await open("post", "/v1/embeddings");
  const { status, body } = await send();
  expectEqual(status, 200, `the status (${body.slice(0, 200)})`);
  const answer = JSON.parse(body);
  expectEqual(answer.object, "list", "object");
  expect(answer.data.length > 0 && answer.data[0].embedding.length > 0, "there is no vector");
  await screenshot("embeddings");
});

await checks.check("the_fields_of_a_body_are_shown", async () => {
  const body = page.locator(".opblock.is-open .opblock-section-request-body");
  await body.locator("button[data-name=model]").click();
  const names = await body.locator(".json-schema-2020-12__title").allTextContents();
  expect(names.includes("encoding_format"), `the fields are ${names}`);
  await screenshot("schema");
  await body.locator("button[data-name=example]").click();
});

await checks.check("a_bad_request_shows_its_problem", async () => {
  const { status, body } = await send('{"model": "minilm", "input": ["x", 7]}');
  expectEqual(status, 400, "the status");
  expectEqual(JSON.parse(body).error.param, "input[1]", "the field");
  await screenshot("bad_request");
});

await checks.check("json_that_is_none_is_refused", async () => {
  const { status, body } = await send('{"model": "minilm",');
  expectEqual(status, 400, "the status");
  expect(/line 1/.test(body), `it does not say where: ${body}`);
});

await checks.check("texts_are_not_read_as_html", async () => {
  const { body } = await send('{"model": "<img src=x onerror=alert(1)>", "input": "x"}');
  expectEqual(await result.locator("img").count(), 0, "images in the answer");
  expect(body.length > 0, "there is no answer");
});

await checks.check("a_key_is_required_sent_and_checked", async () => {
  await load(guarded);
  await open("get", "/v1/models");
  expectEqual((await send()).status, 401, "the status without a key");
  await authorize("andon_wrong");
  const wrong = await send();
  expectEqual(wrong.status, 401, "the status with a wrong key");
  expectEqual(JSON.parse(wrong.body).error.code, "invalid_api_key", "the code");
  await screenshot("wrong_key");
  await authorize(key);
  const { status, body } = await send();
  expectEqual(status, 200, "the status with the key");
  expectEqual(JSON.parse(body).data.map((model) => model.id), ["minilm"], "the models");
});

await checks.check("the_dark_is_dark", async () => {
  await page.emulateMedia({ colorScheme: "dark" });
  await load(origin);
  await open("post", "/v1/embeddings");
  const { background, text, color } = await colors();
  await screenshot("dark");
  expect(brightness(background) < 60, `the background is ${background}`);
  expect(brightness(text) > 150 && brightness(color) > 150, `the texts are ${text} and ${color}`);
});

await checks.check("a_small_window_is_usable", async () => {
  await page.setViewportSize({ width: 390, height: 844 });
  for (const scheme of ["dark", "light"]) {
    await page.emulateMedia({ colorScheme: scheme });
    await load(origin);
    const closed = await page.evaluate(() => document.documentElement.scrollWidth);
    await screenshot(`phone_${scheme}`);
    expect(closed <= 390, `the page is ${closed} pixels wide`);
    await open("post", "/v1/embeddings");
    const { status } = await send();
    expectEqual(status, 200, "the status");
    await page.locator(".opblock.is-open").scrollIntoViewIfNeeded();
    await screenshot(`phone_${scheme}_operation`);
    const opened = await page.evaluate(() => document.documentElement.scrollWidth);
    expect(opened <= 390, `with an operation it is ${opened} pixels wide`);
  }
});

await checks.check("no_foreign_requests", async () => {
  const own = [`${origin}/`, `${guarded}/`];
  const foreign = requested.filter(
    (url) => !own.some((known) => url.startsWith(known)) && !/^(data|blob|about):/.test(url),
  );
  expectEqual(foreign, [], "requests elsewhere");
  expect(requested.length >= 4, `only ${requested.length} requests were seen`);
});

await checks.check("the_console_is_silent", async () => {
  // What this script had refused on purpose, the browser reports by itself.
  const own = /Failed to load resource: the server responded with a status of 4\d\d/;
  expectEqual(messages.filter((text) => !own.test(text)), [], "the console");
});

await context.close();
rmSync(profile, { recursive: true, force: true });
checks.finish();
