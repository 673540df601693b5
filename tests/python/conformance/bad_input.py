"""Every kind of bad input gets its status, names its field and disturbs nobody.

    python bad_input.py --grpc 127.0.0.1:8001

The server must serve `minilm` and `digits`. A gateway and a worker must pass
alike. The cases are sent with plain grpcio stubs, unary and then over one
stream, so that nothing corrects them on the way.
"""

import re
import struct

import grpc
import numpy as np
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from tritonclient.grpc import service_pb2, service_pb2_grpc

from checks import (
    CALL_SECONDS_MAX,
    Checks,
    Reflected,
    arguments,
    expect,
    expect_status,
    open_channel,
)

INVALID = grpc.StatusCode.INVALID_ARGUMENT
NOT_FOUND = grpc.StatusCode.NOT_FOUND
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED

# Contents may be blamed on the input or on the raw entry that holds them.
CONTENTS = ("inputs[0]", "inputs", "raw_input_contents[0]", "raw_input_contents")

# A path of the server's machine. A "/" after a word or a dot is something
# else: a caller's own "../x" or "and/or".
PATH = re.compile(r"(?<![\w./:])/[\w.-]+")

INFER_METHOD = "/inference.GRPCInferenceService/ModelInfer"


def pixel_bytes(rows):
    """The raw contents of `rows` rows of digits."""
    return np.full((rows, 64), 8, dtype="<f4").tobytes()


def text_bytes(*texts):
    """The raw contents of BYTES elements."""
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)


def tensor(request, name, datatype, shape):
    """Adds an input to a request and returns it."""
    return request.inputs.add(name=name, datatype=datatype, shape=shape)


def digits(shape=(1, 64), raw=None, name="pixels", datatype="FP32", **fields):
    """A request to digits, good unless an argument changes it."""
    request = service_pb2.ModelInferRequest(model_name="digits", **fields)
    tensor(request, name, datatype, shape)
    request.raw_input_contents.append(pixel_bytes(1) if raw is None else raw)
    return request


def minilm(*texts, raw=None, shape=None, **fields):
    """A request to minilm, good unless an argument changes it."""
    request = service_pb2.ModelInferRequest(model_name="minilm", **fields)
    tensor(request, "text", "BYTES", [len(texts)] if shape is None else shape)
    request.raw_input_contents.append(text_bytes(*texts) if raw is None else raw)
    return request


def with_parameter(request, name, **value):
    """The request with one parameter, for example int64_param=3."""
    field, content = next(iter(value.items()))
    setattr(request.parameters[name], field, content)
    return request


def typed(field, values, datatype="FP32", model="digits", name="pixels", shape=(1, 64)):
    """A request whose contents are typed, in the field given."""
    request = service_pb2.ModelInferRequest(model_name=model)
    contents = tensor(request, name, datatype, shape).contents
    getattr(contents, field).extend(values)
    return request


def named_cases():
    """Cases about names and versions: (name, request, statuses, fields)."""
    unnamed = digits()
    unnamed.model_name = ""
    unknown, climbing = digits(), digits()
    unknown.model_name = "nobody"
    climbing.model_name = "../../etc/passwd"
    two_outputs = digits()
    two_outputs.outputs.add(name="label")
    two_outputs.outputs.add(name="label")
    expected = digits()
    expected.outputs.add(name="weights")
    either = (INVALID, NOT_FOUND)
    return [
        ("model_unknown", unknown, (NOT_FOUND,), ("model_name",)),
        ("model_empty", unnamed, either, ("model_name",)),
        ("model_is_a_path", climbing, either, ("model_name",)),
        ("version_unknown", digits(model_version="99"), (NOT_FOUND,), ("model_version",)),
        ("version_is_a_word", digits(model_version="newest"), either, ("model_version",)),
        ("version_is_a_path", digits(model_version="../1"), either, ("model_version",)),
        ("version_negative", digits(model_version="-1"), either, ("model_version",)),
        ("version_overflows", digits(model_version="9" * 30), either, ("model_version",)),
        ("output_unknown", expected, (INVALID,), ("outputs[0].name", "outputs[0]")),
        ("output_twice", two_outputs, (INVALID,), ("outputs[1].name", "outputs[1]", "outputs")),
    ]


def tensor_cases():
    """Cases about inputs, datatypes and shapes."""
    missing = service_pb2.ModelInferRequest(model_name="digits")
    extra = digits()
    tensor(extra, "more", "FP32", [1, 64])
    extra.raw_input_contents.append(pixel_bytes(1))
    twice = digits()
    tensor(twice, "pixels", "FP32", [1, 64])
    twice.raw_input_contents.append(pixel_bytes(1))
    shape, datatype = ("inputs[0].shape",), ("inputs[0].datatype",)
    shape_or_contents = shape + CONTENTS
    short = struct.pack("<d", 8.0) * 64
    huge = 1 << 62
    return [
        ("input_missing", missing, ("inputs",)),
        ("input_renamed", digits(name="picture"), ("inputs",)),
        ("input_extra", extra, ("inputs",)),
        ("input_twice", twice, ("inputs",)),
        ("datatype_wrong", digits(datatype="FP64", raw=short), datatype),
        ("datatype_same_size", digits(datatype="INT32"), datatype),
        ("datatype_unknown", digits(datatype="FP33"), datatype),
        ("datatype_empty", digits(datatype=""), datatype),
        ("bytes_too_few", digits(raw=pixel_bytes(1)[:-4]), shape_or_contents),
        ("bytes_too_many", digits(raw=pixel_bytes(2)), shape_or_contents),
        ("bytes_none", digits(raw=b""), shape_or_contents),
        ("shape_negative", digits(shape=(-1, 64)), shape),
        ("shape_negative_twice", digits(shape=(-1, -64)), shape),
        ("shape_overflows", digits(shape=(huge, 64)), shape),
        ("shape_wraps_to_fit", digits(shape=(huge, 4, 64)), shape),
        ("shape_overflows_in_bytes", digits(shape=(1 << 56, 64)), shape),
        ("shape_is_huge", digits(shape=(1 << 40, 64)), shape_or_contents),
        ("dimensions_too_many", digits(shape=[1] * 200 + [64]), shape),
        ("dimensions_too_few", digits(shape=(64,)), shape),
        ("dimensions_none", digits(shape=()), shape_or_contents),
        ("row_width_wrong", digits(shape=(2, 32)), shape),
        ("batch_empty", digits(shape=(0, 64), raw=b""), shape_or_contents),
        ("batch_empty_text", minilm(shape=[0], raw=b""), shape_or_contents),
        ("zero_times_huge", digits(shape=(0, huge), raw=b""), shape_or_contents),
    ]


def contents_cases(options):
    """Cases about raw and typed contents and their values."""
    both = digits()
    both.inputs[0].contents.fp32_contents.extend([8.0] * 64)
    neither = service_pb2.ModelInferRequest(model_name="digits")
    tensor(neither, "pixels", "FP32", [1, 64])
    many = digits()
    many.raw_input_contents.append(b"")
    two_fields = typed("fp32_contents", [8.0] * 64)
    two_fields.inputs[0].contents.int_contents.extend([8] * 64)
    word = lambda field, values: typed(field, values, "BYTES", "minilm", "text", (1,))
    pixels = np.full((1, 64), 8, dtype="<f4")

    def changed(value):
        other = pixels.copy()
        other[0, 7] = value
        return digits(raw=other.tobytes())

    lying = struct.pack("<I", 4_000_000_000) + b"short"
    large = b"a" * (options.text_bytes_max + 1)
    rows = options.rows_max + 1
    typed_field = ("inputs[0].contents", "inputs[0]", "inputs")
    return [
        ("bytes_length_lies", minilm(raw=lying, shape=[1]), CONTENTS),
        ("bytes_length_one_over", minilm(raw=struct.pack("<I", 6) + b"short", shape=[1]), CONTENTS),
        ("bytes_length_cut", minilm(raw=b"\x05\x00", shape=[1]), CONTENTS),
        ("bytes_text_cut", minilm(raw=text_bytes(b"whole", b"cut")[:-1], shape=[2]), CONTENTS),
        ("bytes_elements_too_few", minilm(raw=text_bytes(b"one"), shape=[2]), CONTENTS),
        ("bytes_elements_too_many", minilm(raw=text_bytes(b"one", b"two"), shape=[1]), CONTENTS),
        ("bytes_left_over", minilm(raw=text_bytes(b"one") + b"\x00", shape=[1]), CONTENTS),
        ("raw_and_typed", both, CONTENTS),
        ("neither_raw_nor_typed", neither, CONTENTS),
        ("raw_entries_too_many", many, ("raw_input_contents",)),
        ("typed_in_wrong_field", typed("int_contents", [8] * 64), typed_field),
        ("typed_text_in_wrong_field", word("int64_contents", [1]), typed_field),
        ("typed_in_two_fields", two_fields, typed_field),
        ("typed_too_few", typed("fp32_contents", [8.0] * 63), typed_field),
        ("typed_too_many", typed("fp32_contents", [8.0] * 65), typed_field),
        ("typed_nan", typed("fp32_contents", [8.0] * 63 + [float("nan")]), typed_field),
        ("text_not_utf8", minilm(b"\xff\xfe\x80"), CONTENTS),
        ("text_not_utf8_second", minilm(b"good", b"\xc3\x28"), CONTENTS),
        ("text_not_utf8_typed", word("bytes_contents", [b"\xff\xfe"]), typed_field),
        ("text_over_the_cap", minilm(large), CONTENTS),
        (
            "rows_over_the_cap",
            digits(shape=(rows, 64), raw=pixel_bytes(rows)),
            ("inputs[0].shape",) + CONTENTS,
        ),
        ("pixel_over_16", changed(17.0), CONTENTS),
        ("pixel_below_0", changed(-1.0), CONTENTS),
        ("pixel_nan", changed(float("nan")), CONTENTS),
        ("pixel_infinite", changed(float("inf")), CONTENTS),
    ]


def parameter_cases():
    """Cases about parameters: all INVALID_ARGUMENT on `parameters[NAME]`."""
    entries = [
        ("unknown", "digits", "colour", {"string_param": "red"}),
        ("reserved_prefix", "digits", "triton_nonsense", {"bool_param": True}),
        ("of_another_model", "digits", "normalize", {"bool_param": True}),
        ("wrong_type", "minilm", "normalize", {"string_param": "true"}),
        ("wrong_type_number", "minilm", "dimensions", {"string_param": "128"}),
        ("wrong_type_flag", "minilm", "truncate", {"int64_param": 1}),
        ("dimensions_zero", "minilm", "dimensions", {"int64_param": 0}),
        ("dimensions_negative", "minilm", "dimensions", {"int64_param": -5}),
        ("dimensions_too_many", "minilm", "dimensions", {"int64_param": 100_000}),
        ("dimensions_overflow", "minilm", "dimensions", {"uint64_param": (1 << 64) - 1}),
        ("prompt_name_unknown", "minilm", "prompt_name", {"string_param": "nobody"}),
        ("prompt_name_is_a_number", "minilm", "prompt_name", {"int64_param": 1}),
        ("prompt_of_another_model", "digits", "prompt", {"string_param": "query: "}),
        ("prompt_too_long", "minilm", "prompt", {"string_param": "x" * 5000}),
        ("priority_negative", "digits", "priority", {"int64_param": -1}),
        ("priority_is_a_word", "digits", "priority", {"string_param": "high"}),
        ("timeout_negative", "digits", "timeout", {"int64_param": -1}),
        ("timeout_is_a_word", "digits", "timeout", {"string_param": "soon"}),
    ]
    cases = []
    for title, model, name, value in entries:
        request = digits() if model == "digits" else minilm(b"a text")
        with_parameter(request, name, **value)
        cases.append((f"parameter_{title}", request, (f"parameters[{name}]",)))
    unset = digits()
    unset.parameters["colour"].SetInParent()
    cases.append(("parameter_unset", unset, ("parameters[colour]",)))
    truncate = with_parameter(minilm(b"lantern " * 3000), "truncate", bool_param=False)
    cases.append(("text_too_long_without_truncate", truncate, CONTENTS))
    return cases


def all_cases(options):
    """(name, request, statuses, fields) of every case of ModelInfer."""
    invalid = tensor_cases() + contents_cases(options) + parameter_cases()
    return named_cases() + [(n, request, (INVALID,), fields) for n, request, fields in invalid]


def belongs(field, base):
    """Whether `field` is `base` or something inside it."""
    rest = field[len(base) :]
    return field.startswith(base) and (rest == "" or rest[0] in ".[")


def expect_no_path(text):
    """A message tells nothing of the server's file system."""
    found = PATH.search(text)
    expect(not found, f"a path stands in {text!r}")


def expect_field(error, fields):
    """The error carries google.rpc.BadRequest that names one of `fields`."""
    expect_no_path(error.details())
    status = rpc_status.from_call(error)
    expect(status is not None, "no grpc-status-details-bin")
    expect(status.code == error.code().value[0], f"the details say code {status.code}")
    violations = []
    for detail in status.details:
        bad_request = error_details_pb2.BadRequest()
        if detail.Unpack(bad_request):
            violations.extend(bad_request.field_violations)
    expect(violations, f"no BadRequest with the message {error.details()!r}")
    for violation in violations:
        expect(violation.description, f"the violation of {violation.field} says nothing")
        expect_no_path(violation.description)
        named = any(belongs(violation.field, base) for base in fields)
        expect(named, f"the field is {violation.field!r}, expected {' or '.join(fields)}")


class Server:
    """The calls that the cases need."""

    def __init__(self, channel):
        self.channel = channel
        self.stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)

    def infer(self, request):
        return self.stub.ModelInfer(request, timeout=CALL_SECONDS_MAX)

    def expect_good(self):
        """A good request succeeds: the last case disturbed nobody."""
        try:
            response = self.infer(digits(id="good"))
        except grpc.RpcError as error:
            raise AssertionError(f"a good request now gets {error.code().name}: {error.details()}")
        expect(response.id == "good", f"a good request has a response with the id {response.id!r}")
        expect(len(response.outputs) == 2, f"a good request has {len(response.outputs)} outputs")

    def expect_ready(self):
        """Readiness did not flip."""
        ready = self.stub.ServerReady(service_pb2.ServerReadyRequest(), timeout=CALL_SECONDS_MAX)
        expect(ready.ready, "the server is not ready any more")
        for model in ("minilm", "digits"):
            request = service_pb2.ModelReadyRequest(name=model)
            response = self.stub.ModelReady(request, timeout=CALL_SECONDS_MAX)
            expect(response.ready, f"{model} is not ready any more")


def check_infer(checks, server, options):
    """Every case by the unary call."""
    for name, request, codes, fields in all_cases(options):
        with checks.check(name):
            error = expect_status(lambda: server.infer(request), *codes)
            expect_field(error, fields)
            server.expect_good()


def check_stream(checks, server, options):
    """Every case over one stream, a good request after each: the stream stays
    open, errors are responses, and all keep their ids."""
    with checks.check("all_over_one_stream"):
        requests = []
        for name, request, _, _ in all_cases(options):
            bad = service_pb2.ModelInferRequest()
            bad.CopyFrom(request)
            bad.id = f"bad-{name}"
            requests += [bad, digits(id=f"good-after-{name}")]
        responses = server.stub.ModelStreamInfer(iter(requests), timeout=4 * CALL_SECONDS_MAX)
        seen = []
        for response in responses:
            seen.append(response.infer_response.id)
            failed = response.error_message != ""
            is_bad = response.infer_response.id.startswith("bad-")
            expect(failed == is_bad, f"{response.infer_response.id!r}: {response.error_message!r}")
            expect_no_path(response.error_message)
        expected = [request.id for request in requests]
        expect(sorted(seen) == sorted(expected), f"{len(seen)} responses to {len(expected)} requests")
        expect(seen == expected, "the responses are not in the order of the requests")
        server.expect_good()


def check_messages(checks, server, options):
    """Messages that are no messages, and messages over the limit."""
    send = server.channel.unary_unary(
        INFER_METHOD, request_serializer=bytes, response_deserializer=bytes
    )
    good = digits().SerializeToString()
    garbage = {
        "message_garbage": b"\xff" * 32,
        "message_cut": good[:-3],
        "message_length_lies": b"\x0a\xff\xff\xff\xff\x0f",
        "message_name_not_utf8": b"\x0a\x02\xff\xfe",
        "message_groups_unclosed": b"\x4b" * 200,
        "message_empty": b"",
    }
    for name, message in garbage.items():
        with checks.check(name):
            refuse = lambda: send(message, timeout=CALL_SECONDS_MAX)
            codes = (INVALID, NOT_FOUND) if name == "message_empty" else (INVALID,)
            error = expect_status(refuse, *codes)
            expect_no_path(error.details())
            server.expect_good()
    if options.message_bytes_max <= 64 << 20:
        with checks.check("message_over_the_limit"):
            message = digits(raw=bytes(options.message_bytes_max + 1)).SerializeToString()
            refuse = lambda: send(message, timeout=CALL_SECONDS_MAX)
            error = expect_status(refuse, EXHAUSTED)
            expect_no_path(error.details())
            server.expect_good()
    with checks.check("method_unknown"):
        call = server.channel.unary_unary(
            "/inference.GRPCInferenceService/Nothing",
            request_serializer=bytes,
            response_deserializer=bytes,
        )
        try:
            call(b"", timeout=CALL_SECONDS_MAX)
        except grpc.RpcError as error:
            expect(error.code() == grpc.StatusCode.UNIMPLEMENTED, f"{error.code().name}")
        else:
            raise AssertionError("an unknown method succeeded")
        server.expect_good()


def check_management(checks, server):
    """The other calls of the protocol with names that lead nowhere."""
    stub, either = server.stub, (INVALID, NOT_FOUND)
    nobody, path = "nobody", "../../etc"
    calls = {
        "metadata_unknown": (stub.ModelMetadata, service_pb2.ModelMetadataRequest(name=nobody),
                             (NOT_FOUND,), ("name",)),
        "metadata_version": (stub.ModelMetadata,
                             service_pb2.ModelMetadataRequest(name="digits", version="99"),
                             (NOT_FOUND,), ("version",)),
        "config_unknown": (stub.ModelConfig, service_pb2.ModelConfigRequest(name=nobody),
                           (NOT_FOUND,), ("name",)),
        "statistics_unknown": (stub.ModelStatistics,
                               service_pb2.ModelStatisticsRequest(name=nobody),
                               (NOT_FOUND,), ("name",)),
        "load_unknown": (stub.RepositoryModelLoad,
                         service_pb2.RepositoryModelLoadRequest(model_name=nobody),
                         (NOT_FOUND,), ("model_name",)),
        "load_path": (stub.RepositoryModelLoad,
                      service_pb2.RepositoryModelLoadRequest(model_name=path),
                      either, ("model_name",)),
        "unload_unknown": (stub.RepositoryModelUnload,
                           service_pb2.RepositoryModelUnloadRequest(model_name=nobody),
                           (NOT_FOUND,), ("model_name",)),
        "load_repository": (stub.RepositoryModelLoad,
                            service_pb2.RepositoryModelLoadRequest(
                                repository_name="other", model_name="digits"),
                            (INVALID,), ("repository_name",)),
        "index_repository": (stub.RepositoryIndex,
                             service_pb2.RepositoryIndexRequest(repository_name="other"),
                             (INVALID,), ("repository_name",)),
    }
    for name, (method, request, codes, fields) in calls.items():
        with checks.check(name):
            error = expect_status(lambda: method(request, timeout=CALL_SECONDS_MAX), *codes)
            # The management calls may name the field as ModelInfer does.
            aliases = tuple(f"model_{field}" for field in fields if field in ("name", "version"))
            expect_field(error, fields + aliases)
            server.expect_good()


def check_tei(checks, server, options):
    """tei.v1 with bad fields."""
    reflected = Reflected(server.channel)

    def caller(service, method, message):
        call = reflected.method(f"tei.v1.{service}", method)
        request_class = reflected.message(f"tei.v1.{message}")
        return lambda model="minilm", **fields: call(
            request_class(**fields),
            timeout=CALL_SECONDS_MAX,
            metadata=[("andon-model", model)] if model else [],
        )

    embed = caller("Embed", "Embed", "EmbedRequest")
    embed_all = caller("Embed", "EmbedAll", "EmbedAllRequest")
    decode = caller("Tokenize", "Decode", "DecodeRequest")
    large = "a" * (options.text_bytes_max + 1)
    long_text, direction = "lantern " * 3000, "truncation_direction"
    cases = {
        "tei_enum": (lambda: embed(inputs="a", truncation_direction=7), direction),
        "tei_enum_negative": (lambda: embed(inputs="a", truncation_direction=-1), direction),
        "tei_enum_embed_all": (lambda: embed_all(inputs="a", truncation_direction=7), direction),
        "tei_text_over_the_cap": (lambda: embed(inputs=large), "inputs"),
        "tei_text_too_long": (lambda: embed(inputs=long_text), "inputs"),
        "tei_dimensions_zero": (lambda: embed(inputs="a", dimensions=0), "dimensions"),
        "tei_dimensions_many": (lambda: embed(inputs="a", dimensions=100_000), "dimensions"),
        "tei_prompt_unknown": (lambda: embed(inputs="a", prompt_name="nobody"), "prompt_name"),
        "tei_token_unknown": (lambda: decode(ids=[4_000_000_000]), "ids"),
    }
    for name, (call, field) in cases.items():
        with checks.check(name):
            expect_field(expect_status(call, INVALID), (field,))
            server.expect_good()
    with checks.check("tei_model_unknown"):
        error = expect_status(lambda: embed(model="nobody", inputs="a"), NOT_FOUND)
        expect("nobody" in error.details(), f"it does not name it: {error.details()!r}")
        expect_no_path(error.details())
        server.expect_good()
    with checks.check("tei_not_utf8"):
        call = server.channel.unary_unary(
            "/tei.v1.Embed/Embed", request_serializer=bytes, response_deserializer=bytes
        )
        message = b"\x0a\x02\xff\xfe"
        metadata = [("andon-model", "minilm")]
        refuse = lambda: call(message, timeout=CALL_SECONDS_MAX, metadata=metadata)
        expect_status(refuse, INVALID)
        server.expect_good()


def main():
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--text-bytes-max", type=int, default=1 << 20,
                        help="the server's cap on one text")
    parser.add_argument("--rows-max", type=int, default=4096,
                        help="the server's cap on the rows of one request of digits")
    parser.add_argument("--message-bytes-max", type=int, default=64 << 20,
                        help="the server's limit on one message")
    options = parser.parse_args()
    channel = open_channel(options.grpc)
    server, checks = Server(channel), Checks()
    with checks.check("good_request_first"):
        server.expect_good()
    check_infer(checks, server, options)
    check_stream(checks, server, options)
    check_messages(checks, server, options)
    check_management(checks, server)
    check_tei(checks, server, options)
    with checks.check("readiness_never_flipped"):
        server.expect_ready()
    channel.close()
    checks.finish()


if __name__ == "__main__":
    main()
