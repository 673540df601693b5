"""KServe's SDK with its default settings, over REST and over gRPC.

    python kserve_client.py --http 127.0.0.1:8000 --grpc 127.0.0.1:8001

The server must serve `minilm` and `digits`. tritonclient over HTTP says which
numbers are right: its gRPC half registers the messages of the same names, so
that it cannot be loaded beside KServe's.
"""

import asyncio
import logging
import sys

import grpc
import httpx
import numpy as np
import tritonclient.http as over_http

from checks import CALL_SECONDS_MAX, Checks, arguments, expect

# The SDK reads the command line as its own server's when it is imported.
OPTIONS = arguments(__doc__.splitlines()[0], ("http", "grpc")).parse_args()
del sys.argv[1:]

from kserve import (
    InferenceGRPCClient,
    InferenceRESTClient,
    InferInput,
    InferRequest,
    RESTConfig,
)
from kserve.protocol.infer_type import RequestedOutput

TEXTS = ["The lantern is lit.", "提灯が静かに揺れている。", "naïve café"]
PIXELS = np.random.default_rng(7).integers(0, 17, (5, 64)).astype(np.float32)


def pixels():
    """Rows of digits in the default form of the SDK, which is binary."""
    tensor = InferInput("pixels", list(PIXELS.shape), "FP32")
    tensor.set_data_from_numpy(PIXELS)
    return tensor


def texts():
    """Texts of minilm in the same form."""
    values = np.array([text.encode() for text in TEXTS], dtype=np.object_)
    tensor = InferInput("text", [len(TEXTS)], "BYTES")
    tensor.set_data_from_numpy(values)
    return tensor


def listed(tensor):
    """The same tensor with its data as a list, which stands in the message."""
    if tensor.datatype == "BYTES":
        return InferInput(tensor.name, tensor.shape, "BYTES", data=list(TEXTS))
    return InferInput(tensor.name, tensor.shape, "FP32", data=PIXELS.flatten().tolist())


def expected_outputs(http):
    """The outputs of both models as tritonclient gets them."""
    rows = over_http.InferInput("pixels", list(PIXELS.shape), "FP32")
    rows.set_data_from_numpy(PIXELS)
    words = over_http.InferInput("text", [len(TEXTS)], "BYTES")
    words.set_data_from_numpy(np.array([text.encode() for text in TEXTS], dtype=np.object_))
    with over_http.InferenceServerClient(http, network_timeout=CALL_SECONDS_MAX) as client:
        digits, minilm = client.infer("digits", [rows]), client.infer("minilm", [words])
    return {
        "digits": {name: digits.as_numpy(name) for name in ("probabilities", "label")},
        "minilm": {"embedding": minilm.as_numpy("embedding")},
    }


def expect_outputs(response, expected, model):
    """The response has these outputs, to the bit but for how a batch is computed."""
    expect(response.model_name == model, f"the model is {response.model_name}")
    expect({output.name for output in response.outputs} == set(expected),
           f"the outputs are {[output.name for output in response.outputs]}")
    for output in response.outputs:
        found, right = output.as_numpy(), expected[output.name]
        expect(found.shape == right.shape and found.dtype == right.dtype,
               f"{output.name} is {found.dtype} {found.shape}")
        difference = float(np.abs(found.astype(np.float64) - right).max())
        expect(difference <= 1e-5, f"{output.name} differs by {difference}")


async def refused(call, *needles):
    """Runs a call that must be refused, with these words in the error."""
    try:
        response = await call
    except httpx.HTTPStatusError as error:
        expect(error.response.status_code == 400, f"status {error.response.status_code}")
        found = error.response.text
    except grpc.RpcError as error:
        expect(error.code() == grpc.StatusCode.INVALID_ARGUMENT, f"status {error.code()}")
        found = error.details()
    else:
        raise AssertionError(f"the call succeeded: {response}")
    for needle in needles:
        expect(needle in found, f"the error does not name {needle}: {found}")


async def check_rest(checks, client, base, expected):
    with checks.check("rest_health"):
        expect(await client.is_server_live(base) is True, "it is not live")
        expect(await client.is_server_ready(base) is True, "it is not ready")
        for model in ("minilm", "digits"):
            expect(await client.is_model_ready(base, model) is True, f"{model} is not ready")
        expect(not await client.is_model_ready(base, "nobody"), "a model that is not there is")
    for model, tensor in (("digits", pixels), ("minilm", texts)):
        for form, inputs in (("binary", [tensor()]), ("json", [listed(tensor())])):
            with checks.check(f"rest_{model}_{form}"):
                request = InferRequest(model, inputs)
                response = await client.infer(base, request, model_name=model)
                expect_outputs(response, expected[model], model)
        with checks.check(f"rest_{model}_binary_outputs"):
            request = InferRequest(model, [tensor()], parameters={"binary_data_output": True})
            response = await client.infer(base, request, model_name=model)
            expect_outputs(response, expected[model], model)
    with checks.check("rest_array"):
        # An array that is given as it is goes as JSON.
        tensor = InferInput("pixels", list(PIXELS.shape), "FP32", data=PIXELS)
        response = await client.infer(base, InferRequest("digits", [tensor]), model_name="digits")
        expect_outputs(response, expected["digits"], "digits")
    with checks.check("rest_id_and_outputs"):
        request = InferRequest("digits", [pixels()], request_id="lantern-7",
                               request_outputs=[RequestedOutput("label", {"binary_data": True})])
        response = await client.infer(base, request, model_name="digits")
        expect(response.id == "lantern-7", f"the id is {response.id}")
        expect_outputs(response, {"label": expected["digits"]["label"]}, "digits")
    with checks.check("rest_nulls"):
        # What `to_dict` of its types writes: null for whatever was not given.
        body = InferRequest("digits", [listed(pixels())]).to_dict()
        body.pop("from_grpc")
        expect(body["id"] is None and body["parameters"] is None, f"no nulls in {body}")
        response = await client.infer(base, body, model_name="digits")
        expect_outputs(response, expected["digits"], "digits")
    with checks.check("rest_another_model"):
        request = InferRequest("minilm", [pixels()])
        await refused(client.infer(base, request, model_name="digits"), "model_name")
    with checks.check("rest_wrong_size"):
        tensor = pixels()
        tensor.parameters["binary_data_size"] += 4
        request = InferRequest("digits", [tensor])
        await refused(client.infer(base, request, model_name="digits"), "binary_data_size")


async def check_grpc(checks, client, expected):
    with checks.check("grpc_health"):
        expect(await client.is_server_live(), "it is not live")
        expect(await client.is_server_ready(), "it is not ready")
        for model in ("minilm", "digits"):
            expect(await client.is_model_ready(model), f"{model} is not ready")
    for model, tensor in (("digits", pixels), ("minilm", texts)):
        for form, inputs in (("binary", [tensor()]), ("typed", [listed(tensor())])):
            with checks.check(f"grpc_{model}_{form}"):
                response = await client.infer(InferRequest(model, inputs))
                expect_outputs(response, expected[model], model)
    with checks.check("grpc_array"):
        tensor = InferInput("pixels", list(PIXELS.shape), "FP32", data=PIXELS)
        response = await client.infer(InferRequest("digits", [tensor]))
        expect_outputs(response, expected["digits"], "digits")
    with checks.check("grpc_id_and_outputs"):
        request = InferRequest("digits", [pixels()], request_id="lantern-7", model_version="1",
                               request_outputs=[RequestedOutput("label", {"binary_data": True})])
        response = await client.infer(request)
        expect(response.id == "lantern-7", f"the id is {response.id}")
        expect_outputs(response, {"label": expected["digits"]["label"]}, "digits")
    with checks.check("grpc_wrong_size"):
        tensor = pixels()
        tensor.parameters["binary_data_size"] += 4
        await refused(client.infer(InferRequest("digits", [tensor])),
                      "inputs[0].parameters[binary_data_size]")


async def main():
    # It logs every refusal, with its stack.
    logging.disable(logging.ERROR)
    checks, expected = Checks(), expected_outputs(OPTIONS.http)
    # Without a protocol the REST client speaks KServe's first one, which no server of
    # the Open Inference Protocol has.
    async with InferenceRESTClient(RESTConfig(protocol="v2")) as client:
        await check_rest(checks, client, f"http://{OPTIONS.http}", expected)
    async with InferenceGRPCClient(OPTIONS.grpc) as client:
        await check_grpc(checks, client, expected)
    checks.finish()


if __name__ == "__main__":
    asyncio.run(main())
