"""MLServer's codecs: its requests as they are, over REST and over gRPC.

    python mlserver_codecs.py --http 127.0.0.1:8000 --grpc 127.0.0.1:8001

The server must serve `minilm` and `digits`. tritonclient over HTTP says which
numbers are right: its gRPC half registers the messages of the same names, so
that it cannot be loaded beside MLServer's.
"""

import datetime
import warnings

import grpc
import numpy as np
import pandas as pd
import requests
import tritonclient.http as over_http

# MLServer uses names that newer releases of its libraries call old.
warnings.simplefilter("ignore")

from mlserver.codecs import (
    Base64Codec,
    DatetimeCodec,
    NumpyCodec,
    PandasCodec,
    StringCodec,
)
from mlserver.grpc.converters import (
    ModelInferRequestConverter,
    ModelInferResponseConverter,
)
from mlserver.grpc.dataplane_pb2_grpc import GRPCInferenceServiceStub
from mlserver.types import (
    InferenceRequest,
    InferenceResponse,
    Parameters,
    RequestOutput,
)

from checks import CALL_SECONDS_MAX, Checks, arguments, expect, open_channel

TEXTS = ["The lantern is lit.", "提灯が静かに揺れている。", "naïve café"]
PIXELS = np.random.default_rng(7).integers(0, 17, (5, 64)).astype(np.float32)
# Three lists of token ids of minilm, one after the other.
IDS, LENGTHS = np.array([101, 12856, 102, 101, 102, 101, 2422, 2003, 102]), np.array([3, 2, 4])


class Refusal(Exception):
    """The status and the sentence of a refusal."""


class Rest:
    """Sends requests as MLServer's documentation does."""

    name = "rest"

    def __init__(self, address):
        self.address = address

    def infer(self, model, request):
        response = requests.post(
            f"http://{self.address}/v2/models/{model}/infer",
            data=request.model_dump_json(),
            headers={"content-type": "application/json"},
            timeout=CALL_SECONDS_MAX,
        )
        if response.status_code == 400:
            raise Refusal(response.text)
        expect(response.status_code == 200, f"status {response.status_code}: {response.text}")
        return InferenceResponse.model_validate_json(response.text)


class Grpc:
    """Sends requests through MLServer's converters, typed or raw."""

    def __init__(self, channel, use_raw):
        self.stub = GRPCInferenceServiceStub(channel)
        self.use_raw = use_raw
        self.name = "grpc_raw" if use_raw else "grpc_typed"

    def infer(self, model, request):
        message = ModelInferRequestConverter.from_types(request, model, use_raw=self.use_raw)
        try:
            response = self.stub.ModelInfer(message, timeout=CALL_SECONDS_MAX)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.INVALID_ARGUMENT:
                raise Refusal(error.details()) from error
            raise
        return ModelInferResponseConverter.to_types(response)


def request(*inputs, content_type=None, outputs=None):
    """A request of encoded inputs."""
    parameters = Parameters(content_type=content_type) if content_type else None
    return InferenceRequest(inputs=list(inputs), parameters=parameters, outputs=outputs)


def expect_output(response, name, expected):
    """An output, decoded by MLServer, has these numbers."""
    outputs = {output.name: output for output in response.outputs}
    expect(name in outputs, f"the outputs are {list(outputs)}")
    found = NumpyCodec.decode_output(outputs[name])
    expect(found.shape == expected.shape and found.dtype == expected.dtype,
           f"{name} is {found.dtype} {found.shape}")
    difference = float(np.abs(found.astype(np.float64) - expected).max())
    expect(difference <= 1e-5, f"{name} differs by {difference}")


def refused(call, *needles):
    """Runs a call that must be refused, with these words in the error."""
    try:
        response = call()
    except Refusal as error:
        for needle in needles:
            expect(needle in str(error), f"the error does not name {needle}: {error}")
        return
    raise AssertionError(f"the call succeeded: {response}")


def tensor(name, values):
    """An input of tritonclient: integers are INT64, and other objects texts."""
    datatype = {"f": "FP32", "i": "INT64", "O": "BYTES"}[values.dtype.kind]
    built = over_http.InferInput(name, list(values.shape), datatype)
    built.set_data_from_numpy(values)
    return built


def expected_outputs(http):
    """What tritonclient gets for the same inputs."""
    words = tensor("text", np.array([text.encode() for text in TEXTS], dtype=np.object_))
    lists = [tensor("input_ids", IDS), tensor("input_lengths", LENGTHS)]
    with over_http.InferenceServerClient(http, network_timeout=CALL_SECONDS_MAX) as client:
        digits = client.infer("digits", [tensor("pixels", PIXELS)])
        return {
            "probabilities": digits.as_numpy("probabilities"),
            "label": digits.as_numpy("label"),
            "texts": client.infer("minilm", [words]).as_numpy("embedding"),
            "ids": client.infer("minilm", lists).as_numpy("embedding"),
        }


def check_codecs(checks, door, expected):
    """What each codec writes is taken as it is."""
    with checks.check(f"{door.name}_numpy"):
        asked = [RequestOutput(name="probabilities", parameters=Parameters(content_type="np")),
                 RequestOutput(name="label")]
        response = door.infer("digits", request(
            NumpyCodec.encode_input("pixels", PIXELS), content_type="np", outputs=asked))
        for name in ("probabilities", "label"):
            expect_output(response, name, expected[name])
    with checks.check(f"{door.name}_numpy_columns"):
        # The codec writes [n, 1] for a list.
        response = door.infer("minilm", request(
            NumpyCodec.encode_input("input_ids", IDS),
            NumpyCodec.encode_input("input_lengths", LENGTHS)))
        expect_output(response, "embedding", expected["ids"])
    with checks.check(f"{door.name}_strings"):
        encoded = StringCodec.encode_input("text", TEXTS)
        expect(encoded.shape == [len(TEXTS), 1], f"the shape is {encoded.shape}")
        response = door.infer("minilm", request(encoded, content_type="str"))
        expect_output(response, "embedding", expected["texts"])
    with checks.check(f"{door.name}_pandas"):
        table = pd.DataFrame({"text": TEXTS})
        response = door.infer("minilm", PandasCodec.encode_request(table))
        expect_output(response, "embedding", expected["texts"])
    with checks.check(f"{door.name}_base64"):
        encoded = Base64Codec.encode_input("text", [text.encode() for text in TEXTS])
        response = door.infer("minilm", request(encoded))
        expect_output(response, "embedding", expected["texts"])


def check_refusals(checks, door):
    """What cannot be done, or contradicts the contents, is refused by name."""
    with checks.check(f"{door.name}_datetime"):
        encoded = DatetimeCodec.encode_input("text", [datetime.datetime(2026, 1, 31)])
        refused(lambda: door.infer("minilm", request(encoded)), "inputs[0]", "content_type")
    with checks.check(f"{door.name}_strings_that_are_numbers"):
        encoded = NumpyCodec.encode_input("pixels", PIXELS)
        encoded.parameters.content_type = "str"
        refused(lambda: door.infer("digits", request(encoded)), "inputs[0]", "content_type")
    with checks.check(f"{door.name}_unknown_codec_of_a_request"):
        encoded = StringCodec.encode_input("text", TEXTS)
        refused(lambda: door.infer("minilm", request(encoded, content_type="hf")), "content_type")
    with checks.check(f"{door.name}_numbers_as_strings"):
        asked = [RequestOutput(name="label", parameters=Parameters(content_type="str"))]
        encoded = NumpyCodec.encode_input("pixels", PIXELS)
        refused(lambda: door.infer("digits", request(encoded, outputs=asked)), "outputs[0]")


def main():
    options = arguments(__doc__.splitlines()[0], ("http", "grpc")).parse_args()
    checks, expected = Checks(), expected_outputs(options.http)
    with open_channel(options.grpc) as channel:
        for door in (Rest(options.http), Grpc(channel, False), Grpc(channel, True)):
            check_codecs(checks, door, expected)
            check_refusals(checks, door)
    checks.finish()


if __name__ == "__main__":
    main()
