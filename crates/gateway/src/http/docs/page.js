// Shows what /openapi.json says and sends what the reader writes. The key
// stays in this page's memory; nothing is stored and nobody else is asked.
"use strict";

const METHODS = ["get", "post", "put", "delete", "patch"];
const state = { document: null, operations: [], key: "", sending: null };
const byId = (id) => document.getElementById(id);

/** An element with its properties and children; texts are never read as HTML. */
function make(tag, properties, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element && name !== "list") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return element;
}

/** Follows references within the document. */
function resolve(node) {
  for (let hops = 0; node?.$ref && hops < 16; hops += 1) {
    const path = node.$ref.replace(/^#\//, "").split("/");
    node = path.reduce((at, part) => at?.[part.replace(/~1/g, "/").replace(/~0/g, "~")], state.document);
  }
  return node ?? {};
}

function readOperations(document) {
  const found = [];
  for (const [path, item] of Object.entries(document.paths ?? {})) {
    for (const method of METHODS.filter((name) => item[name])) {
      const operation = item[method];
      const parameters = [...(item.parameters ?? []), ...(operation.parameters ?? [])].map(resolve);
      const id = operation.operationId ?? `${method}-${path}`;
      found.push({ ...operation, id, path, method, parameters, tag: operation.tags?.[0] ?? "other" });
    }
  }
  return found;
}

// What a schema says ---------------------------------------------------------

function typeOf(schema) {
  const plain = resolve(schema);
  if (plain.enum) return plain.enum.map((value) => JSON.stringify(value)).join(" | ");
  if (plain.const !== undefined) return JSON.stringify(plain.const);
  const choices = plain.oneOf ?? plain.anyOf;
  if (choices) return choices.map(typeOf).join(" | ");
  if (plain.allOf) return plain.allOf.map(typeOf).join(" & ");
  const types = [plain.type ?? (plain.properties ? "object" : "any")].flat();
  return types.map((type) => (type === "array" ? `[${typeOf(plain.items ?? {})}]` : type)).join(" | ");
}

function written(value) {
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

function boundsOf(schema) {
  const names = {
    minLength: "% or more characters", maxLength: "up to % characters", minItems: "% or more elements",
    maxItems: "up to % elements", minimum: "from %", maximum: "to %", pattern: "matches %", default: "% if not given",
  };
  const plain = resolve(schema);
  return Object.entries(names)
    .filter(([name]) => plain[name] !== undefined && plain[name] !== null)
    .map(([name, words]) => words.replace("%", () => written(plain[name])));
}

function sayings(description, schema) {
  return [description?.replace(/\.$/, ""), ...boundsOf(schema)].filter(Boolean).join(" · ");
}

/** The objects within a schema, whatever stands around them. */
function objectsOf(schema, depth = 0) {
  const plain = resolve(schema);
  if (depth > 4) return [];
  if (plain.properties) return [plain];
  const inside = [...(plain.oneOf ?? []), ...(plain.anyOf ?? []), ...(plain.allOf ?? []), plain.items];
  return inside.filter(Boolean).flatMap((part) => objectsOf(part, depth + 1));
}

function fields(schema, depth = 0) {
  const plain = resolve(schema);
  const rows = Object.entries(plain.properties ?? {}).map(([name, property]) => {
    const says = sayings(property.description ?? resolve(property).description, property);
    const inner = depth < 4 ? objectsOf(property) : [];
    return make("div", { className: "field" },
      make("span", { className: "name" }, name),
      make("span", { className: "type" }, typeOf(property)),
      plain.required?.includes(name) ? make("span", { className: "must" }, "required") : null,
      says ? make("div", { className: "says" }, says) : null,
      inner.map((object) => make("details", { open: depth < 1 },
        make("summary", null, object.title ?? "its fields"),
        make("div", { className: "nested" }, fields(object, depth + 1)))));
  });
  return make("div", { className: "fields" }, rows);
}

function sample(schema, depth = 0) {
  const plain = resolve(schema);
  const given = plain.example ?? plain.examples?.[0] ?? plain.default ?? plain.const ?? plain.enum?.[0];
  if (given !== undefined || depth > 6) return given;
  if (plain.oneOf ?? plain.anyOf) return sample((plain.oneOf ?? plain.anyOf)[0], depth + 1);
  const type = [plain.type].flat().find((name) => name !== "null");
  if (plain.properties) {
    const wanted = Object.entries(plain.properties).filter(([name]) => plain.required?.includes(name));
    return Object.fromEntries(wanted.map(([name, part]) => [name, sample(part, depth + 1)]));
  }
  if (type === "array") return [sample(plain.items ?? {}, depth + 1)];
  return { string: "text", integer: 1, number: 0.5, boolean: false, object: {} }[type] ?? null;
}

function examplesOf(content) {
  const named = Object.entries(content.examples ?? {}).map(([name, example]) => {
    const plain = resolve(example);
    return [plain.summary || name, plain.value];
  });
  if (named.length) return named;
  return [["example", content.example ?? sample(content.schema ?? {})]];
}

// The page -------------------------------------------------------------------

function showGroups() {
  const words = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const groups = new Map((state.document.tags ?? []).map((tag) => [tag.name, []]));
  for (const operation of state.operations) {
    const text = `${operation.method} ${operation.path} ${operation.summary ?? ""} ${operation.tag}`.toLowerCase();
    if (!words.every((word) => text.includes(word))) continue;
    if (!groups.has(operation.tag)) groups.set(operation.tag, []);
    groups.get(operation.tag).push(operation);
  }
  const here = decodeURIComponent(location.hash.slice(1));
  byId("groups").replaceChildren(...[...groups].filter(([, list]) => list.length).flatMap(([tag, list]) => [
    make("h2", null, tag),
    make("ul", null, list.map((operation) => make("li", null,
      make("a", { href: `#${encodeURIComponent(operation.id)}`, title: operation.path, "aria-current": operation.id === here ? "page" : null },
        make("span", { className: `verb ${operation.method}` }, operation.method.toUpperCase()),
        make("span", null, operation.summary ?? operation.path))))),
  ]));
}

function paragraphs(text) {
  return (text ?? "").split(/\n\n/).filter(Boolean);
}

function overview() {
  const { info, tags } = state.document;
  const first = (tag) => state.operations.find((operation) => operation.tag === tag);
  return [
    make("div", { className: "overview" },
      make("h1", null, info.title),
      paragraphs(info.description).map((text) => make("p", null, text))),
    make("div", { className: "tiles" }, (tags ?? []).filter((tag) => first(tag.name)).map((tag) =>
      make("a", { className: "tile", href: `#${encodeURIComponent(first(tag.name).id)}` },
        make("strong", null, tag.name), make("span", null, tag.description ?? "")))),
  ];
}

function describe(operation) {
  const parts = [
    make("h1", null, operation.summary ?? operation.path),
    make("div", { className: "address" }, make("span", { className: `verb ${operation.method}` }, operation.method.toUpperCase()), operation.path),
    paragraphs(operation.description).map((text) => make("p", null, text)),
  ];
  if (operation.parameters.length) {
    parts.push(make("h2", null, "Parameters"), make("div", { className: "fields" }, operation.parameters.map((parameter) =>
      make("div", { className: "field" },
        make("span", { className: "name" }, parameter.name),
        make("span", { className: "type" }, `${typeOf(parameter.schema)} · ${parameter.in}`),
        parameter.required ? make("span", { className: "must" }, "required") : null,
        make("div", { className: "says" }, sayings(parameter.description, parameter.schema))))));
  }
  for (const [type, content] of Object.entries(resolve(operation.requestBody).content ?? {})) {
    const shapes = objectsOf(content.schema ?? {});
    parts.push(make("h2", null, `Body · ${type}`),
      shapes.length ? shapes.map((shape) => [shapes.length > 1 ? make("p", null, shape.description ?? "One of the shapes:") : null, fields(shape)])
        : make("p", null, content.schema?.description ?? typeOf(content.schema)));
  }
  parts.push(make("h2", null, "Answers"), make("table", { className: "answers" }, make("tbody", null,
    Object.entries(operation.responses ?? {}).map(([status, answer]) => {
      const plain = resolve(answer);
      const shapes = Object.values(plain.content ?? {}).flatMap((content) => objectsOf(content.schema ?? {}));
      return make("tr", null,
        make("td", { className: status < "400" ? "ok" : "fail" }, status),
        make("td", null, plain.description,
          status < "400" && shapes.length ? make("details", null, make("summary", null, Object.keys(plain.content).join(", ")), shapes.map((shape) => fields(shape))) : null));
    }))));
  return make("section", null, parts);
}

function input(parameter, attributes) {
  const id = `parameter-${parameter.in}-${parameter.name}`;
  const schema = resolve(parameter.schema);
  const given = parameter.example ?? schema.example ?? schema.examples?.[0] ?? "";
  return make("div", { className: "row" },
    make("label", { htmlFor: id }, parameter.name),
    make("input", { id, value: parameter.required ? given : "", placeholder: parameter.required ? "required" : String(given || "optional"), spellcheck: false, ...attributes }));
}

function tryIt(operation) {
  const content = resolve(operation.requestBody).content?.["application/json"];
  const examples = content ? examplesOf(content) : [];
  const pretty = (value) => JSON.stringify(value, null, 2);
  const body = content && make("textarea", { id: "body", spellcheck: false, value: pretty(examples[0][1]), oninput: () => check(body) });
  const choose = examples.length > 1 && make("select", { "aria-label": "Example", onchange: (event) => { body.value = pretty(examples[event.target.value][1]); check(body); } },
    examples.map(([name], index) => make("option", { value: index }, name)));
  const result = make("div", { className: "result", role: "status", hidden: true });
  const stop = make("button", { type: "button", hidden: true, onclick: () => state.sending?.abort() }, "Stop");
  const form = make("form", {
    autocomplete: "off",
    onsubmit: (event) => { event.preventDefault(); send(operation, result, stop); },
    onkeydown: (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit(); },
  },
    make("h2", null, "Try it"),
    operation.parameters.map((parameter) => input(parameter, { "data-in": parameter.in, "data-name": parameter.name, required: Boolean(parameter.required) })),
    body && [make("div", { className: "body-head" }, make("label", { htmlFor: "body" }, "Body, JSON"), choose || null), body, make("div", { className: "warn", id: "warn", role: "alert" })],
    make("div", { className: "bar" },
      make("button", { className: "send", type: "submit" }, "Send"), stop,
      make("button", { type: "button", onclick: (event) => copy(event.target, curl(operation)) }, "Copy as curl"),
      make("span", { className: "hint" }, "Ctrl + Enter sends")));
  return make("aside", { className: "try", "aria-label": "Try it" }, form, result);
}

/** Says where JSON is wrong; it may be sent all the same, to see the answer. */
function check(body) {
  let reason = "";
  try { JSON.parse(body.value); } catch (error) { reason = error.message; }
  body.setAttribute("aria-invalid", String(Boolean(reason)));
  byId("warn").textContent = reason;
}

/** The address, headers and body that the form stands for. */
function request(operation) {
  let path = operation.path;
  const query = new URLSearchParams();
  const headers = {};
  for (const { dataset, value } of document.querySelectorAll("[data-in]")) {
    if (dataset.in === "path") path = path.replace(`{${dataset.name}}`, encodeURIComponent(value));
    else if (value && dataset.in === "query") query.append(dataset.name, value);
    else if (value && dataset.in === "header") headers[dataset.name] = value;
  }
  const body = byId("body")?.value;
  if (body !== undefined) headers["content-type"] = "application/json";
  const address = new URL(path.replace(/^\//, "") + (query.size ? `?${query}` : ""), new URL(".", location.href.split("#")[0]));
  return { address, headers, body, method: operation.method.toUpperCase() };
}

async function send(operation, result, stop) {
  state.sending?.abort();
  const control = (state.sending = new AbortController());
  const { address, headers, body, method } = request(operation);
  if (state.key) headers.authorization = `Bearer ${state.key}`;
  const started = performance.now();
  const took = () => `${(performance.now() - started).toFixed(1)} ms`;
  const output = make("pre", { tabIndex: 0 });
  stop.hidden = false;
  result.hidden = false;
  result.replaceChildren(make("div", { className: "line" }, "Waiting …"));
  try {
    const answer = await fetch(address, { method, headers, body, signal: control.signal, credentials: "omit", cache: "no-store" });
    const time = make("span", null, took());
    const size = make("span");
    result.replaceChildren(
      make("div", { className: "line" }, make("strong", { className: answer.ok ? "ok" : "fail" }, `${answer.status} ${answer.statusText}`.trim()), time, size),
      make("details", null, make("summary", null, "Headers"), make("dl", { className: "headers" },
        [...answer.headers].flatMap(([name, value]) => [make("dt", null, name), make("dd", null, value)]))),
      output);
    const bytes = await read(answer, output);
    time.textContent = took();
    size.textContent = `${bytes.toLocaleString("en")} bytes`;
  } catch (error) {
    const reason = error.name === "AbortError" ? "Stopped." : `No answer: ${error.message}`;
    result.append(make("p", { className: "fail" }, reason));
  } finally {
    if (state.sending === control) state.sending = null;
    stop.hidden = true;
  }
}

/** Shows a body as it comes, JSON indented once it is whole. */
async function read(answer, output) {
  const type = answer.headers.get("content-type") ?? "";
  if (/octet-stream/.test(type)) {
    const bytes = (await answer.arrayBuffer()).byteLength;
    output.textContent = `${bytes} bytes of binary data`;
    return bytes;
  }
  const reader = answer.body?.getReader();
  const decoder = new TextDecoder();
  let [text, bytes] = ["", 0];
  for (let part = await reader?.read(); part && !part.done; part = await reader.read()) {
    bytes += part.value.byteLength;
    text += decoder.decode(part.value, { stream: true });
    output.textContent = text.slice(0, 200000);
  }
  if (/json/.test(type)) {
    try { output.textContent = short(JSON.stringify(JSON.parse(text), null, 2)); } catch { /* shown as it came */ }
  }
  return bytes;
}

/** Rows of numbers on one line each, or a vector fills the screen. */
function short(text) {
  const joined = text.replace(/\[\n(\s+-?[\d.eE+-]+,?\n)+\s*\]/g, (list) => list.replace(/\s+/g, " "));
  return joined.length > 200000 ? `${joined.slice(0, 200000)}\n…` : joined;
}

function curl(operation) {
  const { address, headers, body, method } = request(operation);
  const quote = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  if (state.key) headers.authorization = "Bearer $ANDON_KEY";
  const parts = [`curl -sS -X ${method} ${quote(address.href)}`];
  for (const [name, value] of Object.entries(headers)) {
    parts.push(name === "authorization" ? `-H "${name}: ${value}"` : `-H ${quote(`${name}: ${value}`)}`);
  }
  if (body !== undefined) parts.push(`-d ${quote(body)}`);
  return parts.join(" \\\n  ");
}

async function copy(button, text) {
  const said = button.textContent;
  try { await navigator.clipboard.writeText(text); button.textContent = "Copied"; } catch { window.prompt("Copy", text); }
  setTimeout(() => { button.textContent = said; }, 1500);
}

function show() {
  const id = decodeURIComponent(location.hash.slice(1));
  const operation = state.operations.find((candidate) => candidate.id === id);
  state.sending?.abort();
  byId("operation").replaceChildren(...(operation ? [make("div", { className: "columns" }, describe(operation), tryIt(operation))] : overview()));
  document.title = operation ? `${operation.summary ?? operation.path} · Andon` : "Andon";
  showGroups();
  document.querySelector(".side [aria-current]")?.scrollIntoView({ block: "nearest" });
  window.scrollTo(0, 0);
}

async function start() {
  byId("key-form").addEventListener("submit", (event) => event.preventDefault());
  byId("key").addEventListener("input", (event) => {
    state.key = event.target.value.trim();
    byId("key-state").textContent = state.key ? "key set" : "no key";
    byId("key-state").classList.toggle("set", Boolean(state.key));
  });
  byId("filter").addEventListener("input", showGroups);
  document.querySelector(".skip").addEventListener("click", (event) => {
    event.preventDefault();
    byId("operation").focus();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName)) return;
    event.preventDefault();
    byId("filter").focus();
  });
  try {
    const answer = await fetch("openapi.json", { credentials: "omit" });
    if (!answer.ok) throw new Error(`openapi.json: ${answer.status}`);
    state.document = await answer.json();
  } catch (error) {
    byId("operation").replaceChildren(make("p", { className: "loading fail" }, `The document could not be read: ${error.message}`));
    return;
  }
  state.operations = readOperations(state.document);
  byId("version").textContent = state.document.info.version;
  window.addEventListener("hashchange", () => { show(); byId("operation").focus({ preventScroll: true }); });
  show();
}

start();
