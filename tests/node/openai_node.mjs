// OpenAI's SDK for Node against Andon: embeddings, models and errors.
//
//     node openai_node.mjs --http 127.0.0.1:8000
//
// The server must serve `minilm`, and ask nobody for a key.

import { Checks, CALL_MS_MAX, expect, expectEqual, flags, need, refusal } from "./checks.mjs";

const OpenAI = need("openai").OpenAI;
const options = flags({ http: undefined });
const client = new OpenAI({
  baseURL: `http://${options.http}/v1`,
  apiKey: "unused",
  maxRetries: 0,
  timeout: CALL_MS_MAX,
});
const checks = new Checks();
const TEXTS = ["A paper lantern hangs above the door.", "Revenue rose by four percent.", "🏮"];

const norm = (vector) => Math.sqrt(vector.reduce((sum, value) => sum + value * value, 0));

function expectVectors(answer, count, size) {
  expectEqual(answer.object, "list", "object");
  expectEqual(answer.data.length, count, "the number of vectors");
  answer.data.forEach((entry, index) => {
    expectEqual(entry.object, "embedding", "object of an entry");
    expectEqual(entry.index, index, "the index");
    expectEqual(entry.embedding.length, size, "the size of a vector");
    expect(Math.abs(norm(entry.embedding) - 1) < 1e-3, `the norm is ${norm(entry.embedding)}`);
  });
  expect(answer.usage.prompt_tokens > 0, `usage is ${JSON.stringify(answer.usage)}`);
  expectEqual(answer.usage.total_tokens, answer.usage.prompt_tokens, "total_tokens");
}

await checks.check("models_list", async () => {
  const names = [];
  for await (const model of client.models.list()) {
    expectEqual(model.object, "model", "object");
    expect(Number.isInteger(model.created), `created is ${model.created}`);
    expect(typeof model.owned_by === "string", `owned_by is ${model.owned_by}`);
    names.push(model.id);
  }
  expect(names.includes("minilm"), `minilm is not among ${names}`);
});

await checks.check("models_retrieve", async () => {
  const model = await client.models.retrieve("minilm");
  expectEqual([model.id, model.object], ["minilm", "model"], "the model");
  const error = await refusal(() => client.models.retrieve("nobody"));
  expect(error instanceof OpenAI.NotFoundError, `it is a ${error.constructor.name}`);
});

let plain;
await checks.check("embeddings_one", async () => {
  // The SDK asks for base64 by itself and decodes it.
  plain = await client.embeddings.create({ model: "minilm", input: TEXTS[0] });
  expectVectors(plain, 1, 384);
  expectEqual(plain.model, "minilm", "model");
});

await checks.check("embeddings_many_as_floats", async () => {
  const floats = await client.embeddings.create({
    model: "minilm",
    input: TEXTS,
    encoding_format: "float",
  });
  expectVectors(floats, 3, 384);
  const coded = await client.embeddings.create({ model: "minilm", input: TEXTS });
  floats.data.forEach((entry, index) => {
    // Each written float must read back as the same 32 bits.
    const rounded = entry.embedding.map((value) => Math.fround(value));
    const exact = Array.from(coded.data[index].embedding);
    expectEqual(rounded, exact, `vector ${index} as float and as base64`);
  });
});

await checks.check("embeddings_dimensions", async () => {
  const short = await client.embeddings.create({ model: "minilm", input: TEXTS, dimensions: 64 });
  expectVectors(short, 3, 64);
});

await checks.check("embeddings_tokens", async () => {
  const tokens = await client.embeddings.create({ model: "minilm", input: [101, 7592, 102] });
  expectVectors(tokens, 1, 384);
  const lists = await client.embeddings.create({
    model: "minilm",
    input: [[101, 7592, 102], [101, 2088, 102]],
  });
  expectVectors(lists, 2, 384);
  expectEqual(
    Array.from(lists.data[0].embedding),
    Array.from(tokens.data[0].embedding),
    "one list of tokens beside another",
  );
});

await checks.check("concurrent_calls", async () => {
  const calls = Array.from({ length: 32 }, () =>
    client.embeddings.create({ model: "minilm", input: TEXTS[0] }),
  );
  for (const answer of await Promise.all(calls)) {
    expectEqual(
      Array.from(answer.data[0].embedding),
      Array.from(plain.data[0].embedding),
      "the vector",
    );
  }
});

async function expectBad(name, body, param) {
  await checks.check(name, async () => {
    const error = await refusal(() => client.embeddings.create(body));
    expect(error instanceof OpenAI.BadRequestError, `it is a ${error.constructor.name}: ${error}`);
    expectEqual([error.status, error.param], [400, param], "status and param");
    expectEqual(error.type, "invalid_request_error", "type");
    expect(error.message.length > 10, `the message is ${error.message}`);
  });
}

await expectBad("dimensions_too_many", { model: "minilm", input: "x", dimensions: 100_000 }, "dimensions");
await expectBad("format_unknown", { model: "minilm", input: "x", encoding_format: "hex" }, "encoding_format");
await expectBad("input_empty", { model: "minilm", input: [] }, "input");
await expectBad("input_is_a_number", { model: "minilm", input: 7 }, "input");
await expectBad("input_holds_a_number", { model: "minilm", input: ["x", 7] }, "input[1]");

await checks.check("model_unknown", async () => {
  const error = await refusal(() => client.embeddings.create({ model: "nobody", input: "x" }));
  expect(error instanceof OpenAI.NotFoundError, `it is a ${error.constructor.name}: ${error}`);
  expectEqual([error.status, error.code], [404, "model_not_found"], "status and code");
});

await checks.check("request_id", async () => {
  const { response } = await client.embeddings
    .create({ model: "minilm", input: "x" }, { headers: { "x-request-id": "lantern-7" } })
    .withResponse();
  expectEqual(response.headers.get("x-request-id"), "lantern-7", "x-request-id");
});

checks.finish();
