"""Requests to the demo models through tritonclient, for the triton scripts."""

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from checks import CALL_SECONDS_MAX, expect

SENTENCES = [
    "The harbour was quiet before the first ferry left.",
    "A paper lantern hangs above the door.",
    "Quarterly revenue rose by four percent.",
]


def text_input(texts):
    """`texts` as the input of minilm."""
    values = np.array([text.encode() for text in texts], dtype=np.object_)
    tensor = triton.InferInput("text", [len(texts)], "BYTES")
    tensor.set_data_from_numpy(values)
    return [tensor]


def pixel_input(pixels):
    """Rows of 64 pixel values as the input of digits."""
    values = np.ascontiguousarray(pixels, dtype=np.float32)
    tensor = triton.InferInput("pixels", list(values.shape), "FP32")
    tensor.set_data_from_numpy(values)
    return [tensor]


def expect_refusal(call, *codes):
    """Runs `call`, which must raise tritonclient's exception; returns it."""
    try:
        call()
    except InferenceServerException as error:
        if codes:
            expect(
                error.status() in [f"StatusCode.{code}" for code in codes],
                f"status {error.status()} ({error.message()}), expected {' or '.join(codes)}",
            )
        expect(error.message(), "the error has no message")
        return error
    raise AssertionError("the call succeeded")


def embed(client, texts, **options):
    """The embedding of `texts` as an array."""
    result = client.infer("minilm", text_input(texts), client_timeout=CALL_SECONDS_MAX, **options)
    return result.as_numpy("embedding")
