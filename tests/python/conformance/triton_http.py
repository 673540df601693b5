"""NVIDIA's own client over HTTP against Andon, beside the same over gRPC.

    python triton_http.py --http 127.0.0.1:8000 --grpc 127.0.0.1:8001 [--repository-control]

The server must serve `minilm` and `digits`. Tensors go and come as JSON and as
binary data; each answer must have the bits of the answer over gRPC. With
--repository-control the script also unloads and loads `digits`.
"""

import numpy as np
import tritonclient.grpc as over_grpc
import tritonclient.http as over_http
from sklearn.datasets import load_digits
from tritonclient.utils import InferenceServerException

import triton_calls
from checks import CALL_SECONDS_MAX, Checks, arguments, eventually, expect
from triton_calls import SENTENCES

ODD = ["🙂🏮", "提灯が静かに揺れている。", 'quotes " and \\ and \n lines', "naïve café", "\u0007 a bell"]


def text_input(texts, binary=True):
    """`texts` as the input of minilm."""
    values = np.array([text.encode() for text in texts], dtype=np.object_)
    tensor = over_http.InferInput("text", [len(texts)], "BYTES")
    tensor.set_data_from_numpy(values, binary_data=binary)
    return [tensor]


def pixel_input(pixels, binary=True):
    """Rows of 64 pixel values as the input of digits."""
    values = np.ascontiguousarray(pixels, dtype=np.float32)
    tensor = over_http.InferInput("pixels", list(values.shape), "FP32")
    tensor.set_data_from_numpy(values, binary_data=binary)
    return [tensor]


def expect_refusal(call, *statuses):
    """Runs `call`, which must be refused with one of these HTTP statuses."""
    try:
        call()
    except InferenceServerException as error:
        expected = " or ".join(str(status) for status in statuses)
        expect(
            int(error.status() or 0) in statuses,
            f"status {error.status()} ({error.message()}), expected {expected}",
        )
        expect(error.message(), "the error has no message")
        expect("exception occurred in the client" not in error.message(), error.message())
        return error
    raise AssertionError("the call succeeded")


def expect_same(found, expected, what):
    """Both arrays have the same bits."""
    expect(found is not None, f"{what} is missing")
    expect(found.dtype == expected.dtype, f"{what} is {found.dtype}, over gRPC {expected.dtype}")
    expect(found.shape == expected.shape, f"{what} is {found.shape}, over gRPC {expected.shape}")
    expect(found.tobytes() == expected.tobytes(), f"{what} differs from the answer over gRPC")


def check_server(checks, web, rpc):
    """What a client calls before its first inference."""
    with checks.check("server_live_and_ready"):
        expect(web.is_server_live(), "it is not live")
        expect(web.is_server_ready(), "it is not ready")
    with checks.check("model_ready"):
        for model in ("minilm", "digits"):
            expect(web.is_model_ready(model), f"{model} is not ready")
            expect(web.is_model_ready(model, "1"), f"{model} version 1 is not ready")
        expect(not web.is_model_ready("nobody"), "a model that is not there is ready")
    with checks.check("server_metadata"):
        expect(web.get_server_metadata() == rpc.get_server_metadata(as_json=True),
               f"it is {web.get_server_metadata()}")
    with checks.check("model_metadata"):
        for model in ("minilm", "digits"):
            found = web.get_model_metadata(model)
            expected = rpc.get_model_metadata(model)
            expect(found["name"] == expected.name, f"the name is {found['name']}")
            expect(found["versions"] == list(expected.versions), f"versions: {found['versions']}")
            expect(found["platform"] == expected.platform, f"platform: {found['platform']}")
            for side in ("inputs", "outputs"):
                tensors = [(t["name"], t["datatype"], t["shape"]) for t in found[side]]
                same = [(t.name, t.datatype, list(t.shape)) for t in getattr(expected, side)]
                expect(tensors == same, f"{side} of {model} are {tensors}")
            expect(web.get_model_metadata(model, "1") == found, "version 1 is described otherwise")
    with checks.check("model_config"):
        for model in ("minilm", "digits"):
            found, expected = web.get_model_config(model), rpc.get_model_config(model).config
            expect(found["name"] == model, f"the name is {found['name']}")
            expect(found["max_batch_size"] == expected.max_batch_size, f"it is {found}")
            dims = [[int(size) for size in tensor["dims"]] for tensor in found["input"]]
            expect(dims == [list(tensor.dims) for tensor in expected.input], f"dims are {dims}")
            shapes = [tensor["shape"] for tensor in web.get_model_metadata(model)["inputs"]]
            expect([[-1, *sizes] for sizes in dims] == shapes, f"dims are {dims}, of {shapes}")
            types = [tensor["data_type"] for tensor in found["input"]]
            expect(all(name.startswith("TYPE_") for name in types), f"types are {types}")
    with checks.check("repository_index"):
        index = web.get_model_repository_index()
        ready = {(m["name"], m["version"]) for m in index if m.get("state") == "READY"}
        for expected in (("minilm", "1"), ("digits", "1")):
            expect(expected in ready, f"{expected} is not READY in the index: {index}")


def check_statistics(checks, web, digits):
    """The counts go up by what was requested, with and without a model's name."""

    def counts():
        stats = web.get_inference_statistics("digits")["model_stats"]
        expect([entry["name"] for entry in stats] == ["digits"], f"statistics: {stats}")
        return stats[0]["inference_stats"]["success"]["count"], stats[0]["inference_count"]

    with checks.check("statistics"):
        succeeded, rows = (int(count) for count in counts())
        for _ in range(3):
            web.infer("digits", pixel_input(digits.data[:7]))
        eventually(
            lambda: int(counts()[0]) >= succeeded + 3 and int(counts()[1]) >= rows + 21,
            "success or inference_count of digits did not go up",
        )
    with checks.check("statistics_all"):
        names = {entry["name"] for entry in web.get_inference_statistics()["model_stats"]}
        expect({"minilm", "digits"} <= names, f"models in the statistics: {names}")


def check_tensors(checks, web, rpc, digits):
    """Every way in and out has the bits of gRPC."""
    pixels = digits.data[1000:1064]
    expected = rpc.infer("digits", triton_calls.pixel_input(pixels))
    vectors = triton_calls.embed(rpc, SENTENCES + ODD)
    for way_in in (True, False):
        for way_out in (True, False):
            ways = f"{'binary' if way_in else 'json'}_to_{'binary' if way_out else 'json'}"
            with checks.check(f"digits_{ways}"):
                outputs = [over_http.InferRequestedOutput(name, binary_data=way_out)
                           for name in ("label", "probabilities")]
                result = web.infer("digits", pixel_input(pixels, way_in), outputs=outputs)
                names = [tensor["name"] for tensor in result.get_response()["outputs"]]
                expect(sorted(names) == ["label", "probabilities"], f"the outputs are {names}")
                for name in names:
                    expect_same(result.as_numpy(name), expected.as_numpy(name), name)
                    is_binary = "data" not in result.get_output(name)
                    expect(is_binary == way_out, f"{name} comes binary: {is_binary}")
            with checks.check(f"minilm_{ways}"):
                outputs = [over_http.InferRequestedOutput("embedding", binary_data=way_out)]
                result = web.infer("minilm", text_input(SENTENCES + ODD, way_in), outputs=outputs)
                expect_same(result.as_numpy("embedding"), vectors, "embedding")
    with checks.check("outputs_mixed"):
        outputs = [over_http.InferRequestedOutput("label", binary_data=False),
                   over_http.InferRequestedOutput("probabilities", binary_data=True)]
        result = web.infer("digits", pixel_input(pixels), outputs=outputs)
        for name in ("label", "probabilities"):
            expect_same(result.as_numpy(name), expected.as_numpy(name), name)
    with checks.check("outputs_unnamed"):
        # The client then asks for `binary_data_output` of the request.
        result = web.infer("digits", pixel_input(pixels))
        for name in ("label", "probabilities"):
            expect_same(result.as_numpy(name), expected.as_numpy(name), name)
            expect("data" not in result.get_output(name), f"{name} does not come binary")


def check_calls(checks, web, rpc, digits):
    """Identity, parameters, versions, compression, many at once and large ones."""
    with checks.check("request_id_and_version"):
        result = web.infer("digits", pixel_input(digits.data[:1]), model_version="1", request_id="lantern-7")
        response = result.get_response()
        found = [response.get(key) for key in ("id", "model_name", "model_version")]
        expect(found == ["lantern-7", "digits", "1"], f"they are {found}")
    with checks.check("parameters"):
        options = {"parameters": {"normalize": True, "dimensions": 64}}
        found = web.infer("minilm", text_input(SENTENCES), **options).as_numpy("embedding")
        expect_same(found, triton_calls.embed(rpc, SENTENCES, **options), "embedding")
    with checks.check("timeout_and_priority"):
        web.infer("digits", pixel_input(digits.data[:1]), priority=1, timeout=30_000_000)
    pixels = np.tile(digits.data, (2, 1))[:2400]
    expected = rpc.infer("digits", triton_calls.pixel_input(pixels)).as_numpy("probabilities")
    for algorithm in ("gzip", "deflate"):
        for binary in (True, False):
            with checks.check(f"{algorithm}_{'binary' if binary else 'json'}"):
                result = web.infer(
                    "digits", pixel_input(pixels, binary),
                    outputs=[over_http.InferRequestedOutput("probabilities", binary_data=binary)],
                    request_compression_algorithm=algorithm,
                    response_compression_algorithm=algorithm,
                )
                expect_same(result.as_numpy("probabilities"), expected, "probabilities")
    with checks.check("600_kilobytes"):
        result = web.infer("digits", pixel_input(pixels))
        expect_same(result.as_numpy("probabilities"), expected, "probabilities")
    with checks.check("many_at_once"):
        vectors = triton_calls.embed(rpc, SENTENCES[:1])
        calls = [web.async_infer("minilm", text_input(SENTENCES[:1])) for _ in range(64)]
        for call in calls:
            found = call.get_result(timeout=CALL_SECONDS_MAX).as_numpy("embedding")
            difference = float(np.abs(found - vectors).max())
            expect(difference <= 1e-5, f"the embedding differs by {difference}")


def both_refuse(web, rpc, http_inputs, grpc_inputs, model="digits", **options):
    """Both doors refuse, with the same sentence. A tensor's values are `data` here
    and `contents` there."""
    error = expect_refusal(lambda: web.infer(model, http_inputs, **options), 400, 404)
    other = triton_calls.expect_refusal(lambda: rpc.infer(model, grpc_inputs, **options))
    named = other.message().replace("].contents", "].data").replace("': contents", "': data")
    expect(error.message() == named,
           f"over HTTP {error.message()!r}, over gRPC {other.message()!r}")
    return error


def check_errors(checks, web, rpc, digits):
    """Refusals have their status and the sentence of the other door."""
    good = digits.data[:1]
    with checks.check("unknown_model"):
        error = both_refuse(web, rpc, pixel_input(good), triton_calls.pixel_input(good), "nobody")
        expect(error.status() == "404" and "nobody" in error.message(), f"it is {error}")
        for ask in (web.get_model_metadata, web.get_model_config, web.get_inference_statistics):
            expect_refusal(lambda ask=ask: ask("nobody"), 404)
    with checks.check("unknown_version"):
        both_refuse(web, rpc, pixel_input(good), triton_calls.pixel_input(good), model_version="99")
    with checks.check("value_that_cannot_be"):
        for binary in (True, False):
            bad = good.copy()
            bad[0, 7] = 99.0
            both_refuse(web, rpc, pixel_input(bad, binary), triton_calls.pixel_input(bad))
    with checks.check("not_a_number"):
        bad = good.copy()
        bad[0, 7] = np.nan
        both_refuse(web, rpc, pixel_input(bad), triton_calls.pixel_input(bad))
    with checks.check("wrong_shape"):
        bad = np.full((2, 32), 8.0)
        error = both_refuse(web, rpc, pixel_input(bad), triton_calls.pixel_input(bad))
        named = error.message().startswith("inputs[0] 'pixels': shape is [2, 32]")
        expect(named, f"it is {error.message()}")
    with checks.check("unknown_output"):
        outputs = [over_http.InferRequestedOutput("weights")]
        error = expect_refusal(lambda: web.infer("digits", pixel_input(good), outputs=outputs), 400)
        expect("outputs[0]" in error.message(), f"it does not name the output: {error.message()}")
    with checks.check("unknown_parameter"):
        refuse = lambda: web.infer("digits", pixel_input(good), parameters={"brightness": 1})
        expect_refusal(refuse, 400)
    with checks.check("load_errors"):
        expect_refusal(lambda: web.load_model("nobody"), 404)
        expect_refusal(lambda: web.unload_model("nobody"), 404)
        refuse = lambda: web.load_model("digits", config="{}", files={"file:1/x": b"x"})
        expect_refusal(refuse, 400, 501)
        expect(web.is_model_ready("digits"), "digits is gone after a refused load")


def check_repository_control(checks, web, digits):
    """digits goes and comes back."""
    inputs = pixel_input(digits.data[:1])
    with checks.check("unload"):
        web.unload_model("digits")
        eventually(lambda: not web.is_model_ready("digits"), "digits is still ready")
        expect_refusal(lambda: web.infer("digits", inputs), 404)
        expect_refusal(lambda: web.infer("digits", inputs, model_version="1"), 503)
        states = {m["name"]: m.get("state") for m in web.get_model_repository_index()}
        expect(states.get("digits") != "READY", f"the index still says {states}")
    with checks.check("load"):
        web.load_model("digits")
        eventually(lambda: web.is_model_ready("digits"), "digits does not come back")
        label = web.infer("digits", inputs).as_numpy("label")
        expect(int(label[0]) == int(digits.target[0]), f"the label is {label}")


def main():
    parser = arguments(__doc__.splitlines()[0], ("http", "grpc"))
    parser.add_argument("--repository-control", action="store_true",
                        help="unload and load digits too")
    options = parser.parse_args()
    digits, checks = load_digits(), Checks()
    web = over_http.InferenceServerClient(
        options.http, concurrency=16,
        connection_timeout=CALL_SECONDS_MAX, network_timeout=CALL_SECONDS_MAX,
    )
    with web, over_grpc.InferenceServerClient(options.grpc) as rpc:
        check_server(checks, web, rpc)
        check_statistics(checks, web, digits)
        check_tensors(checks, web, rpc, digits)
        check_calls(checks, web, rpc, digits)
        check_errors(checks, web, rpc, digits)
        if options.repository_control:
            check_repository_control(checks, web, digits)
    checks.finish()


if __name__ == "__main__":
    main()
