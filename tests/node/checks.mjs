// What the checks in Node share: the report, the flags, and packages from
// target/node. As the Python ones, they know a server by its address alone.

import { createRequire } from "node:module";
import { parseArgs } from "node:util";

// A package that `make test` installed, whatever the working folder.
export const need = createRequire(new URL("../../target/node/package.json", import.meta.url));

// The repository, for the proto files that a caller gets with it.
export const root = new URL("../../", import.meta.url).pathname;

// No single call may hang a test run.
export const CALL_MS_MAX = 60_000;

// The flags as an object; a flag without a default must be given.
export function flags(expected) {
  const options = {};
  for (const [name, fallback] of Object.entries(expected)) {
    options[name] = { type: "string", ...(fallback === undefined ? {} : { default: fallback }) };
  }
  const { values } = parseArgs({ options });
  for (const name of Object.keys(expected)) {
    if (values[name] === undefined) {
      console.log(`FAILED: --${name} is needed`);
      process.exit(2);
    }
  }
  return values;
}

// Counts checks. A failing check is printed and the next one still runs.
export class Checks {
  passed = 0;
  failed = [];

  async check(name, run) {
    try {
      await run();
      this.passed += 1;
      console.log(`ok ${name}`);
    } catch (error) {
      this.failed.push(name);
      const line = /\/([\w.-]+\.mjs:\d+)/.exec(error?.stack?.replace(/.*checks\.mjs.*/g, "") ?? "");
      console.log(`FAILED ${name}${line ? ` (${line[1]})` : ""}: ${error?.message ?? error}`);
    }
  }

  finish() {
    console.log(`${this.passed} checks passed`);
    if (this.failed.length > 0) {
      console.log(`${this.failed.length} checks FAILED: ${this.failed.join(", ")}`);
    }
    process.exit(this.failed.length === 0 && this.passed > 0 ? 0 : 1);
  }
}

export function expect(condition, message) {
  if (!condition) {
    throw new Error(message);
  }
}

export function expectEqual(found, expected, what) {
  const [a, b] = [JSON.stringify(found), JSON.stringify(expected)];
  expect(a === b, `${what} is ${String(a).slice(0, 200)}, expected ${String(b).slice(0, 200)}`);
}

// The error that a call must end with.
export async function refusal(call) {
  let response;
  try {
    response = await call();
  } catch (error) {
    return error;
  }
  throw new Error(`the call succeeded: ${JSON.stringify(response)?.slice(0, 200)}`);
}
