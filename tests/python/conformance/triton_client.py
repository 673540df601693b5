"""NVIDIA's own client against Andon: tritonclient.grpc, unary and stream.

    python triton_client.py --grpc 127.0.0.1:8001 [--repository-control]

The server must serve `minilm` and `digits`. With --repository-control the
script also unloads and loads `digits`.
"""

import queue
import threading
import time

import numpy as np
import tritonclient.grpc as triton
from sklearn.datasets import load_digits
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

from checks import CALL_SECONDS_MAX, Checks, arguments, eventually, expect, open_channel
from triton_calls import SENTENCES, embed, expect_refusal, pixel_input, text_input
from triton_control import (
    check_load_errors,
    check_repository_control,
    check_settings,
    check_shared_memory,
)


def norms(vectors):
    """The length of each row."""
    return np.linalg.norm(vectors, axis=1)


def check_server(checks, client):
    """What a client calls before its first inference."""
    with checks.check("server_live"):
        expect(client.is_server_live(), "ServerLive says false")
    with checks.check("server_ready"):
        expect(client.is_server_ready(), "ServerReady says false")
    with checks.check("model_ready"):
        for model in ("minilm", "digits"):
            expect(client.is_model_ready(model), f"{model} is not ready")
            expect(client.is_model_ready(model, "1"), f"{model} version 1 is not ready")
    with checks.check("server_metadata"):
        metadata = client.get_server_metadata()
        expect(metadata.name == "andon", f"the name is {metadata.name!r}, expected andon")
        expect(metadata.version, "the version is empty")
        expect(len(metadata.extensions) > 0, "no extension is listed")
        as_json = client.get_server_metadata(as_json=True)
        expect(as_json["name"] == "andon", "the JSON form differs")


def check_tensor_list(found, expected, what):
    """Compares metadata tensors with {name: (datatype, shape)}."""
    got = {tensor.name: (tensor.datatype, list(tensor.shape)) for tensor in found}
    expect(got == expected, f"{what} are {got}, expected {expected}")


def check_models(checks, client):
    """Metadata, configuration, statistics and the repository's index."""
    with checks.check("model_metadata_minilm"):
        metadata = client.get_model_metadata("minilm")
        expect(metadata.name == "minilm", f"the name is {metadata.name!r}")
        expect(list(metadata.versions) == ["1"], f"versions are {list(metadata.versions)}")
        expect(metadata.platform, "the platform is empty")
        expected = {
            "text": ("BYTES", [-1]),
            "input_lengths": ("INT64", [-1]),
            "input_ids": ("INT64", [-1]),
        }
        check_tensor_list(metadata.inputs, expected, "inputs")
        check_tensor_list(metadata.outputs, {"embedding": ("FP32", [-1, 384])}, "outputs")
    with checks.check("model_metadata_digits"):
        metadata = client.get_model_metadata("digits", "1")
        check_tensor_list(metadata.inputs, {"pixels": ("FP32", [-1, 64])}, "inputs")
        expected = {"probabilities": ("FP32", [-1, 10]), "label": ("INT64", [-1])}
        check_tensor_list(metadata.outputs, expected, "outputs")
    with checks.check("model_config"):
        for model in ("minilm", "digits"):
            config = client.get_model_config(model).config
            expect(config.name == model, f"the name is {config.name!r}, expected {model}")
            expect(config.max_batch_size > 0, f"{model} does not batch: max_batch_size is 0")
            needed = [tensor.name for tensor in config.input if not tensor.optional]
            expected = ["pixels"] if model == "digits" else []
            expect(needed == expected, f"{model} needs {needed}")
            expect(len(config.output) >= 1, f"{model} has no outputs")
        config = client.get_model_config("digits", as_json=True)["config"]
        dims = [list(map(int, tensor["dims"])) for tensor in config["input"]]
        expect(dims == [[64]], f"dims of digits are {dims}, expected [[64]] without the batch")
    with checks.check("repository_index"):
        index = client.get_model_repository_index()
        ready = {(m.name, m.version) for m in index.models if m.state == "READY"}
        for expected in (("minilm", "1"), ("digits", "1")):
            expect(expected in ready, f"{expected} is not READY in the index: {index.models}")
    with checks.check("unknown_model"):
        expect_refusal(lambda: client.get_model_metadata("nobody"), "NOT_FOUND")
        expect_refusal(lambda: client.get_model_config("nobody"), "NOT_FOUND")
        expect_refusal(lambda: client.get_inference_statistics("nobody"), "NOT_FOUND")
        error = expect_refusal(lambda: client.infer("nobody", text_input(["x"])), "NOT_FOUND")
        expect("nobody" in error.message(), f"the message does not name it: {error.message()}")


def statistics(client, model):
    """(requests that succeeded, rows computed) of one model, over its versions."""
    stats = client.get_inference_statistics(model).model_stats
    expect(len(stats) > 0, f"no statistics for {model}")
    expect(all(entry.name == model for entry in stats), f"statistics of others: {stats}")
    succeeded = sum(entry.inference_stats.success.count for entry in stats)
    return succeeded, sum(entry.inference_count for entry in stats)


def check_statistics(checks, client, digits):
    """The counts go up by what was requested, with and without a model's name."""
    for model, inputs, rows in (
        ("digits", pixel_input(digits.data[:7]), 7),
        ("minilm", text_input(SENTENCES), 3),
    ):
        with checks.check(f"statistics_{model}"):
            succeeded, counted = statistics(client, model)
            for _ in range(3):
                client.infer(model, inputs)
            eventually(
                lambda: statistics(client, model)[0] >= succeeded + 3
                and statistics(client, model)[1] >= counted + 3 * rows,
                f"success or inference_count of {model} did not go up",
            )
    with checks.check("statistics_all"):
        names = {entry.name for entry in client.get_inference_statistics().model_stats}
        expect({"minilm", "digits"} <= names, f"models in the statistics: {names}")


def check_minilm(checks, client):
    """Embeddings: shape, norm, parameters."""
    with checks.check("minilm_infer"):
        result = client.infer("minilm", text_input(SENTENCES), request_id="request-7")
        response = result.get_response()
        expect(response.id == "request-7", f"the id came back as {response.id!r}")
        expect(response.model_name == "minilm", f"model_name is {response.model_name!r}")
        expect(response.model_version == "1", f"model_version is {response.model_version!r}")
        expect(len(response.raw_output_contents) == 1, "the answer is not raw")
        vectors = result.as_numpy("embedding")
        expect(vectors.dtype == np.float32, f"the dtype is {vectors.dtype}")
        expect(vectors.shape == (3, 384), f"the shape is {vectors.shape}")
        expect(np.allclose(norms(vectors), 1.0, atol=1e-4), f"norms are {norms(vectors)}")
    with checks.check("minilm_batched_equals_single"):
        together = embed(client, SENTENCES)
        single = np.concatenate([embed(client, [text]) for text in SENTENCES])
        difference = float(np.abs(together - single).max())
        expect(difference <= 1e-5, f"batched and single differ by {difference}")
    with checks.check("minilm_meaning"):
        near = embed(client, ["A cat sleeps on the sofa.", "A kitten naps on the couch.",
                              "Interest rates were raised again."])
        expect(near[0] @ near[1] > near[0] @ near[2] + 0.2, "near texts are not nearer")
    with checks.check("minilm_normalize"):
        scaled = embed(client, SENTENCES, parameters={"normalize": True})
        plain = embed(client, SENTENCES, parameters={"normalize": False})
        default = embed(client, SENTENCES)
        expect(np.allclose(scaled, default, atol=1e-6), "normalize is not true by default")
        expect(np.abs(norms(plain) - 1).min() > 0.01, f"normalize=False: {norms(plain)}")
        rescaled = plain / norms(plain)[:, None]
        expect(np.allclose(rescaled, scaled, atol=1e-5), "the directions differ")
    with checks.check("minilm_dimensions"):
        whole = embed(client, SENTENCES, parameters={"normalize": False})
        short = embed(client, SENTENCES, parameters={"dimensions": 128})
        expect(short.shape == (3, 128), f"the shape is {short.shape}")
        expect(np.allclose(norms(short), 1.0, atol=1e-4), f"norms are {norms(short)}")
        expected = whole[:, :128] / norms(whole[:, :128])[:, None]
        expect(np.allclose(short, expected, atol=1e-5), "not the leading dimensions")
    with checks.check("minilm_truncate"):
        long_text = "lantern " * 3000
        vectors = embed(client, [long_text], parameters={"truncate": True})
        expect(vectors.shape == (1, 384), f"the shape is {vectors.shape}")
        refuse = lambda: embed(client, [long_text], parameters={"truncate": False})
        expect_refusal(refuse, "INVALID_ARGUMENT")
    with checks.check("minilm_texts"):
        odd = ["", " ", "🙂🏮", "提灯が静かに揺れている。", "naïve café", "x" * 5000]
        vectors = embed(client, odd, parameters={"truncate": True})
        expect(vectors.shape == (len(odd), 384), f"the shape is {vectors.shape}")
        expect(np.isfinite(vectors).all(), "not every value is finite")


def check_digits(checks, client, digits):
    """The classifier: accuracy, outputs, versions, large batches."""
    pixels, labels = digits.data[1000:1600], digits.target[1000:1600]
    with checks.check("digits_accuracy"):
        result = client.infer("digits", pixel_input(pixels))
        probabilities, found = result.as_numpy("probabilities"), result.as_numpy("label")
        expect(probabilities.shape == (600, 10), f"the shape is {probabilities.shape}")
        expect(found.dtype == np.int64 and found.shape == (600,), f"label is {found.dtype}")
        accuracy = float((found == labels).mean())
        expect(accuracy >= 0.97, f"the accuracy is {accuracy}, expected at least 0.97")
        expect(np.allclose(probabilities.sum(axis=1), 1, atol=1e-4), "rows do not sum to 1")
        expect((probabilities.argmax(axis=1) == found).all(), "label is not the most probable")
    with checks.check("digits_one_output"):
        for name, other in (("label", "probabilities"), ("probabilities", "label")):
            outputs = [triton.InferRequestedOutput(name)]
            result = client.infer("digits", pixel_input(pixels[:4]), outputs=outputs)
            names = [tensor.name for tensor in result.get_response().outputs]
            expect(names == [name], f"asked for {name}, got {names}")
            expect(len(result.get_response().raw_output_contents) == 1, "not one raw entry")
            expect(result.as_numpy(other) is None, f"{other} came unasked")
    with checks.check("digits_output_order"):
        outputs = [triton.InferRequestedOutput(n) for n in ("label", "probabilities")]
        result = client.infer("digits", pixel_input(pixels[:4]), outputs=outputs)
        expect(result.as_numpy("label").shape == (4,), "label is misplaced")
        expect(result.as_numpy("probabilities").shape == (4, 10), "probabilities are misplaced")
    with checks.check("digits_version"):
        result = client.infer("digits", pixel_input(pixels[:1]), model_version="1")
        version = result.get_response().model_version
        expect(version == "1", f"the version is {version!r}")
    with checks.check("digits_priority_and_timeout"):
        inputs = pixel_input(pixels[:1])
        client.infer("digits", inputs, priority=1)
        client.infer("digits", inputs, timeout=30_000_000)
    with checks.check("digits_typed_contents"):
        tensor = triton.InferInput("pixels", [2, 64], "FP32")
        request = service_pb2.ModelInferRequest(model_name="digits")
        request.inputs.extend([tensor._get_tensor()])
        request.inputs[0].contents.fp32_contents.extend(pixels[:2].flatten().tolist())
        response = client._client_stub.ModelInfer(request, timeout=CALL_SECONDS_MAX)
        expect(len(response.raw_output_contents) == 2, "typed contents in, raw contents out")
        expected = client.infer("digits", pixel_input(pixels[:2])).get_response()
        same = response.raw_output_contents == expected.raw_output_contents
        expect(same, "typed and raw contents answer differently")
    with checks.check("digits_large_batch"):
        rows = np.resize(digits.data, (2400, 64))
        expected = np.resize(digits.target, 2400)
        result = client.infer("digits", pixel_input(rows))
        accuracy = float((result.as_numpy("label") == expected).mean())
        expect(accuracy >= 0.97, f"the accuracy is {accuracy}")


def check_calling(checks, client, digits):
    """Asynchronous calls, compression, deadlines, concurrent callers."""
    with checks.check("async_infer"):
        answers = queue.Queue()
        for number in range(32):
            client.async_infer(
                "digits",
                pixel_input(digits.data[number : number + 1]),
                lambda result, error: answers.put((result, error)),
                request_id=str(number),
                client_timeout=CALL_SECONDS_MAX,
            )
        seen = {}
        for _ in range(32):
            result, error = answers.get(timeout=CALL_SECONDS_MAX)
            expect(error is None, f"an answer is an error: {error}")
            seen[int(result.get_response().id)] = int(result.as_numpy("label")[0])
        right = sum(seen[number] == digits.target[number] for number in range(32))
        expect(len(seen) == 32, f"{len(seen)} of 32 requests were succeeded")
        expect(right >= 30, f"{right} of 32 labels are right: answers may be mixed up")
    with checks.check("gzip"):
        plain = client.infer("digits", pixel_input(digits.data[:1500]))
        packed = client.infer(
            "digits", pixel_input(digits.data[:1500]), compression_algorithm="gzip"
        )
        same = (plain.as_numpy("label") == packed.as_numpy("label")).all()
        expect(same, "compressed and plain requests answer differently")
        vectors = embed(client, SENTENCES, compression_algorithm="gzip")
        expect(vectors.shape == (3, 384), f"the shape is {vectors.shape}")
    with checks.check("unknown_compression"):
        # Either the server can inflate this, or it says so by the status that
        # gRPC's compression rules ask for.
        try:
            inputs = pixel_input(digits.data[:1])
            client.infer("digits", inputs, compression_algorithm="deflate")
        except InferenceServerException as error:
            expect(error.status() == "StatusCode.UNIMPLEMENTED", f"{error.status()}: {error}")
    with checks.check("client_timeout"):
        client.infer("digits", pixel_input(digits.data[:1]), client_timeout=30.0)
        inputs = text_input(["a lantern in the rain " * 40] * 64)
        begin = time.monotonic()
        # A server that knows that it cannot answer in time may say so sooner.
        try:
            client.infer("minilm", inputs, client_timeout=0.002)
            raise AssertionError("64 long texts were succeeded within 2 ms")
        except InferenceServerException as error:
            allowed = ("StatusCode.DEADLINE_EXCEEDED", "StatusCode.UNAVAILABLE")
            expect(error.status() in allowed, f"{error.status()}: {error}")
        expect(time.monotonic() - begin < 2, "the deadline of 2 ms took over 2 s")
        expect(client.is_server_ready(), "the server is not ready after a missed deadline")
    with checks.check("concurrent_callers"):
        errors = []

        def call(number):
            try:
                got = embed(client, [f"{SENTENCES[number % 3]}"] * (1 + number % 4))
                expect(got.shape == (1 + number % 4, 384), f"the shape is {got.shape}")
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=call, args=(number,)) for number in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        expect(not errors, f"{len(errors)} of 24 callers failed: {errors[:1]}")


def collect(answers, count):
    """The next `count` answers of a stream."""
    return [answers.get(timeout=CALL_SECONDS_MAX) for _ in range(count)]


def check_stream(checks, address, digits):
    """Streams of tritonclient: many requests of two models, one bad."""

    def interleaved(compression):
        answers = queue.Queue()
        with triton.InferenceServerClient(address) as client:
            client.start_stream(
                lambda result, error: answers.put((result, error)),
                compression_algorithm=compression,
            )
            for number in range(20):
                inputs = text_input([SENTENCES[number % 3]])
                if number % 2:
                    inputs = pixel_input(digits.data[number : number + 1])
                model = "digits" if number % 2 else "minilm"
                client.async_stream_infer(model, inputs, request_id=str(number))
            got = collect(answers, 20)
            client.stop_stream()
        errors = [error for _, error in got if error is not None]
        expect(not errors, f"{len(errors)} of 20 answers are errors: {errors[:1]}")
        ids = [result.get_response().id for result, _ in got]
        expect(sorted(ids, key=int) == [str(n) for n in range(20)], f"ids are {ids}")
        for result, _ in got:
            number = int(result.get_response().id)
            if number % 2:
                label = int(result.as_numpy("label")[0])
                expected = int(digits.target[number])
                expect(label == expected, f"request {number} is a {expected}, the label is {label}")
            else:
                shape = result.as_numpy("embedding").shape
                expect(shape == (1, 384), f"request {number} has the shape {shape}")

    with checks.check("stream_interleaved"):
        interleaved(None)
    with checks.check("stream_gzip"):
        interleaved("gzip")
    with checks.check("stream_bad_request"):
        answers = queue.Queue()
        with triton.InferenceServerClient(address) as client:
            client.start_stream(lambda result, error: answers.put((result, error)))
            good = pixel_input(digits.data[:1])
            client.async_stream_infer("digits", good, request_id="before")
            client.async_stream_infer("digits", text_input(["x"]), request_id="bad")
            client.async_stream_infer("nobody", good, request_id="unknown")
            for number in range(3):
                client.async_stream_infer("digits", good, request_id=f"after-{number}")
            got = collect(answers, 6)
            client.stop_stream()
        errors = [error for _, error in got if error is not None]
        ids = sorted(result.get_response().id for result, _ in got if result is not None)
        expect(len(errors) == 2, f"{len(errors)} errors for two bad requests: {errors}")
        expect(all(error.message() for error in errors), "an error has no message")
        expect(ids == ["after-0", "after-1", "after-2", "before"], f"succeeded: {ids}")
    with checks.check("stream_final_response"):
        answers = queue.Queue()
        with triton.InferenceServerClient(address) as client:
            client.start_stream(lambda result, error: answers.put((result, error)))
            client.async_stream_infer(
                "digits", pixel_input(digits.data[:1]), enable_empty_final_response=True
            )
            result, error = answers.get(timeout=CALL_SECONDS_MAX)
            client.stop_stream()
        expect(error is None, f"the answer is an error: {error}")
        parameters = result.get_response().parameters
        final = parameters["triton_final_response"].bool_param
        expect(final, f"triton_final_response is not true: {dict(parameters)}")
    with checks.check("stream_cancel"):
        with triton.InferenceServerClient(address) as client:
            client.start_stream(lambda result, error: None)
            for _ in range(50):
                client.async_stream_infer("minilm", text_input(SENTENCES))
            client.stop_stream(cancel_requests=True)
            expect(client.is_server_ready(), "a cancelled stream disturbs the server")


def main():
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--repository-control", action="store_true",
                        help="unload and load digits too")
    options = parser.parse_args()
    digits = load_digits()
    checks = Checks()
    channel = open_channel(options.grpc)
    with triton.InferenceServerClient(options.grpc) as client:
        check_server(checks, client)
        check_models(checks, client)
        check_statistics(checks, client, digits)
        check_minilm(checks, client)
        check_digits(checks, client, digits)
        check_calling(checks, client, digits)
        check_stream(checks, options.grpc, digits)
        check_settings(checks, client)
        check_shared_memory(checks, client)
        check_load_errors(checks, client)
        if options.repository_control:
            check_repository_control(checks, client, channel, digits)
    channel.close()
    checks.finish()


if __name__ == "__main__":
    main()
