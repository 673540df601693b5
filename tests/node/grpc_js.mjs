// gRPC's own client for Node against Andon, over TLS and with a key.
//
//     node grpc_js.mjs --grpc localhost:8001 --ca ca.pem --key-file key.txt
//
// The server must serve `digits`, and the key must be of a tenant that may call
// it and is no administrator. Health must be open to anyone.

import { readFileSync } from "node:fs";

import { Checks, CALL_MS_MAX, expect, expectEqual, flags, need, refusal, root } from "./checks.mjs";

const grpc = need("@grpc/grpc-js");
const loader = need("@grpc/proto-loader");
const { protoPath } = need("grpc-health-check");
const options = flags({ grpc: undefined, ca: undefined, "key-file": undefined });
const key = readFileSync(options["key-file"], "utf8").trim();
const checks = new Checks();

const settings = { keepCase: true, longs: Number, enums: String, defaults: true, oneofs: true };
const { inference } = grpc.loadPackageDefinition(
  loader.loadSync("inference/grpc_service.proto", { ...settings, includeDirs: [`${root}proto`] }),
);
const { grpc: health } = grpc.loadPackageDefinition(loader.loadSync(protoPath, settings));

const secure = grpc.credentials.createSsl(readFileSync(options.ca));
const infer = new inference.GRPCInferenceService(options.grpc, secure);
const probe = new health.health.v1.Health(options.grpc, secure);

const deadline = () => ({ deadline: Date.now() + CALL_MS_MAX });

function metadata(entries) {
  const made = new grpc.Metadata();
  Object.entries(entries).forEach(([name, value]) => made.set(name, value));
  return made;
}

const bearer = (value) => metadata({ authorization: `Bearer ${value}` });

function call(client, method, request, headers = new grpc.Metadata()) {
  return new Promise((resolve, reject) => {
    client[method](request, headers, deadline(), (error, response) =>
      error ? reject(error) : resolve(response),
    );
  });
}

// Rows of 64 pixels, all of one shade.
function digits(rows, shade = 8) {
  const pixels = Buffer.alloc(rows * 64 * 4);
  for (let index = 0; index < rows * 64; index += 1) {
    pixels.writeFloatLE(shade, index * 4);
  }
  return {
    model_name: "digits",
    inputs: [{ name: "pixels", datatype: "FP32", shape: [rows, 64] }],
    raw_input_contents: [pixels],
  };
}

function expectDigits(response, rows) {
  const names = response.outputs.map((output) => output.name);
  expectEqual(names, ["probabilities", "label"], "the outputs");
  expectEqual(
    response.raw_output_contents.map((bytes) => bytes.length),
    [rows * 10 * 4, rows * 8],
    "the lengths of the outputs",
  );
  let sum = 0;
  for (let index = 0; index < 10; index += 1) {
    sum += response.raw_output_contents[0].readFloatLE(index * 4);
  }
  expect(Math.abs(sum - 1) < 1e-3, `the probabilities sum to ${sum}`);
}

async function expectCode(code, act) {
  const error = await refusal(act);
  expectEqual(grpc.status[error.code], grpc.status[code], `the status (${error.details})`);
  expect(error.details.length > 0, "the status has no message");
  for (const secret of [key, "wrong-key"]) {
    expect(!error.details.includes(secret), "the message repeats the key");
  }
  return error;
}

await checks.check("health_is_open", async () => {
  const response = await call(probe, "check", { service: "" });
  expectEqual(response.status, "SERVING", "the health of all");
  const digits = await call(probe, "check", { service: "digits" });
  expectEqual(digits.status, "SERVING", "the health of digits");
});

await checks.check("infer_with_a_key", async () => {
  expectDigits(await call(infer, "ModelInfer", digits(3), bearer(key)), 3);
});

await checks.check("infer_with_x_api_key", async () => {
  expectDigits(await call(infer, "ModelInfer", digits(1), metadata({ "x-api-key": key })), 1);
});

await checks.check("stream_with_a_key", async () => {
  const stream = infer.ModelStreamInfer(bearer(key), deadline());
  const responses = [];
  const ended = new Promise((resolve, reject) => {
    stream.on("data", (response) => responses.push(response));
    stream.on("end", resolve);
    stream.on("error", reject);
  });
  [1, 2, 5].forEach((rows) => stream.write(digits(rows)));
  stream.write({ ...digits(1), model_name: "nobody" });
  stream.end();
  await ended;
  expectEqual(responses.length, 4, "the number of responses");
  [1, 2, 5].forEach((rows, index) => {
    expectEqual(responses[index].error_message, "", "an error");
    expectDigits(responses[index].infer_response, rows);
  });
  expect(responses[3].error_message.length > 0, "an unknown model is no error in the stream");
});

await checks.check("no_key", async () => {
  await expectCode(grpc.status.UNAUTHENTICATED, () => call(infer, "ModelInfer", digits(1)));
});

const changed = `${key.slice(0, -1)}${key.endsWith("A") ? "B" : "A"}`;
for (const [name, value] of Object.entries({
  wrong_key: "wrong-key",
  changed_key: changed,
  longer_key: `${key}A`,
  empty_key: "",
})) {
  await checks.check(name, async () => {
    await expectCode(grpc.status.UNAUTHENTICATED, () =>
      call(infer, "ModelInfer", digits(1), bearer(value)),
    );
  });
}

await checks.check("wrong_key_of_a_stream", async () => {
  await expectCode(grpc.status.UNAUTHENTICATED, () => {
    const stream = infer.ModelStreamInfer(bearer("wrong-key"), deadline());
    return new Promise((resolve, reject) => {
      stream.on("data", () => {});
      stream.on("end", resolve);
      stream.on("error", reject);
      stream.write(digits(1));
      stream.end();
    });
  });
});

await checks.check("administration_is_refused", async () => {
  const load = { model_name: "digits" };
  await expectCode(grpc.status.PERMISSION_DENIED, () =>
    call(infer, "RepositoryModelLoad", load, bearer(key)),
  );
  await expectCode(grpc.status.UNAUTHENTICATED, () => call(infer, "RepositoryModelLoad", load));
});

await checks.check("another_authority_is_not_trusted", async () => {
  const other = new health.health.v1.Health(options.grpc, grpc.credentials.createSsl());
  const error = await refusal(() =>
    new Promise((resolve, reject) =>
      other.check({ service: "" }, { deadline: Date.now() + 5_000 }, (error, response) =>
        error ? reject(error) : resolve(response),
      ),
    ),
  );
  expectEqual(grpc.status[error.code], "UNAVAILABLE", `the status (${error.details})`);
});

await checks.check("clear_text_is_refused", async () => {
  const clear = new health.health.v1.Health(options.grpc, grpc.credentials.createInsecure());
  const error = await refusal(() =>
    new Promise((resolve, reject) =>
      clear.check({ service: "" }, { deadline: Date.now() + 5_000 }, (error, response) =>
        error ? reject(error) : resolve(response),
      ),
    ),
  );
  expect(
    [grpc.status.UNAVAILABLE, grpc.status.DEADLINE_EXCEEDED].includes(error.code),
    `the status is ${grpc.status[error.code]}`,
  );
});

checks.finish();
