"""grpc.health.v1 and server reflection, through grpcio's own stubs.

    python health_reflection.py --grpc 127.0.0.1:8001 [--repository-control]

The server must serve `minilm` and `digits`. With --repository-control a watch
follows `digits` through an unload and a load.
"""

import queue
import threading
import time

import grpc
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

from checks import (
    CALL_SECONDS_MAX,
    Checks,
    Reflected,
    arguments,
    expect,
    expect_status,
    open_channel,
)

INFERENCE = "inference.GRPCInferenceService"
SERVICES = [INFERENCE] + [
    f"tei.v1.{name}" for name in ("Info", "Embed", "Predict", "Rerank", "Tokenize")
]
MODELS = ["minilm", "digits"]
INFRASTRUCTURE = ["grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection",
                  "grpc.reflection.v1alpha.ServerReflection"]
# Published after the client's copy of the protocol was made.
NEWER = {"InferResponseStatistics", "ModelStatistics.response_stats"}
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


def status_name(status):
    """SERVING rather than 1."""
    return health_pb2.HealthCheckResponse.ServingStatus.Name(status)


class Watch:
    """One Watch stream whose statuses arrive in a queue; None is its end."""

    def __init__(self, stub, service):
        self.call = stub.Watch(health_pb2.HealthCheckRequest(service=service))
        self.statuses = queue.Queue()
        self.thread = threading.Thread(target=self._follow, daemon=True)
        self.thread.start()

    def _follow(self):
        try:
            for response in self.call:
                self.statuses.put(response.status)
        except grpc.RpcError:
            pass
        self.statuses.put(None)

    def next(self, seconds_max=15.0):
        """The next status, or an error if none comes in time."""
        try:
            return self.statuses.get(timeout=seconds_max)
        except queue.Empty:
            raise AssertionError(f"no status within {seconds_max:g} s") from None

    def wait_for(self, expected):
        """Reads until `expected` comes."""
        seen = []
        while expected not in seen:
            status = self.next()
            expect(status is not None, f"the stream ended after {seen}")
            seen.append(status)

    def expect_silence(self, seconds):
        """Nothing comes and the stream stays open for `seconds`."""
        try:
            status = self.statuses.get(timeout=seconds)
        except queue.Empty:
            return
        what = "the stream ended" if status is None else status_name(status)
        raise AssertionError(f"the stream should stay open and silent: {what}")

    def close(self):
        self.call.cancel()
        self.thread.join(timeout=5)


def check_health(checks, stub):
    """Check, List and Watch."""
    ask = lambda name: stub.Check(
        health_pb2.HealthCheckRequest(service=name), timeout=CALL_SECONDS_MAX
    ).status
    for name in [""] + SERVICES + MODELS:
        with checks.check(f"health_check_{name or 'empty_name'}"):
            status = ask(name)
            expect(status == SERVING, f"{name!r} is {status_name(status)}")
    with checks.check("health_check_unknown"):
        for name in ("nobody", "tei.v1.Nothing", "MINILM", "minilm ", "../minilm"):
            expect_status(lambda: ask(name), grpc.StatusCode.NOT_FOUND)
    with checks.check("health_watch_known"):
        for name in ("", INFERENCE, "minilm"):
            watch = Watch(stub, name)
            status = watch.next()
            watch.close()
            expect(status == SERVING, f"{name!r} is {status}")
    with checks.check("health_watch_unknown"):
        watch = Watch(stub, "nobody")
        status = watch.next()
        expect(status == SERVICE_UNKNOWN, f"the first status is {status}")
        watch.expect_silence(1.2)
        watch.close()


def check_health_follows(checks, stub, channel):
    """The status of a model follows its unload and load."""
    inference = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    load = service_pb2.RepositoryModelLoadRequest(model_name="digits")
    unload = service_pb2.RepositoryModelUnloadRequest(model_name="digits")
    with checks.check("health_watch_follows_model"):
        watch, other = Watch(stub, "digits"), Watch(stub, "minilm")
        expect(watch.next() == SERVING, "digits does not begin SERVING")
        expect(other.next() == SERVING, "minilm does not begin SERVING")
        inference.RepositoryModelUnload(unload, timeout=CALL_SECONDS_MAX)
        try:
            watch.wait_for(NOT_SERVING)
            request = health_pb2.HealthCheckRequest(service="digits")
            status = stub.Check(request, timeout=CALL_SECONDS_MAX).status
            expect(status == NOT_SERVING, f"Check says {status_name(status)} after the unload")
            whole = stub.Check(health_pb2.HealthCheckRequest(), timeout=CALL_SECONDS_MAX).status
            expect(whole == SERVING, "the server is not SERVING though minilm can be called")
        finally:
            inference.RepositoryModelLoad(load, timeout=CALL_SECONDS_MAX)
        watch.wait_for(SERVING)
        other.expect_silence(0.2)
        watch.close()
        other.close()


def every_file(reflected):
    """The FileDescriptorProtos behind the listed services and their imports."""
    files, waiting = {}, []
    for service in reflected.database.get_services():
        waiting.append(reflected.database.FindFileContainingSymbol(service))
    while waiting:
        file = waiting.pop()
        if file.name not in files:
            files[file.name] = file
            waiting += [reflected.database.FindFileByName(name) for name in file.dependency]
    return files


def commented(file):
    """The paths of a file's elements that have a leading comment."""
    return {
        tuple(location.path)
        for location in file.source_code_info.location
        if location.leading_comments.strip()
    }


def uncommented(file):
    """The services, methods, messages and fields without a leading comment."""
    have, missing = commented(file), []
    proto = descriptor_pb2.FileDescriptorProto
    services = proto.SERVICE_FIELD_NUMBER
    method_number = descriptor_pb2.ServiceDescriptorProto.METHOD_FIELD_NUMBER
    field_number = descriptor_pb2.DescriptorProto.FIELD_FIELD_NUMBER
    for index, service in enumerate(file.service):
        if (services, index) not in have:
            missing.append(service.name)
        for number, method in enumerate(service.method):
            if (services, index, method_number, number) not in have:
                missing.append(f"{service.name}.{method.name}")
    for index, message in enumerate(file.message_type):
        for number, field in enumerate(message.field):
            path = (proto.MESSAGE_TYPE_FIELD_NUMBER, index, field_number, number)
            if path not in have:
                missing.append(f"{message.name}.{field.name}")
    return missing


def check_reflection(checks, channel, reflected):
    """Services, descriptors and comments by v1alpha, then the same by v1."""
    with checks.check("reflection_services"):
        listed = set(reflected.database.get_services())
        for name in SERVICES + INFRASTRUCTURE:
            expect(name in listed, f"{name} is not listed: {sorted(listed)}")
    with checks.check("reflection_resolves"):
        for name in reflected.database.get_services():
            service = reflected.pool.FindServiceByName(name)
            expect(len(service.methods) > 0, f"{name} has no methods")
            for method in service.methods:
                for message in (method.input_type, method.output_type):
                    expect(message.full_name, f"{name}.{method.name} names no message")
    with checks.check("reflection_comments"):
        files = every_file(reflected)
        ours = [f for f in files.values() if f.package in ("inference", "tei.v1")]
        expect(len(ours) >= 2, f"files of inference and tei are not all served: {list(files)}")
        for file in ours:
            missing = uncommented(file)
            expect(not missing, f"{file.name}: no comment on {missing[:5]}")
    with checks.check("reflection_by_message"):
        file = reflected.database.FindFileContainingSymbol("inference.ModelInferRequest")
        expect(file.package == "inference", f"the package is {file.package}")
        file = reflected.database.FindFileContainingSymbol("tei.v1.Embed.Embed")
        expect(file.package == "tei.v1", f"the package is {file.package}")
    request_class = reflection_pb2.ServerReflectionRequest
    requests = [
        request_class(list_services=""),
        request_class(file_containing_symbol=INFERENCE),
        request_class(file_containing_symbol="tei.v1.Embed"),
        request_class(file_containing_symbol="nothing.at.All"),
        request_class(file_by_filename="nothing.proto"),
    ]
    responses = {}
    for version in ("v1alpha", "v1"):
        with checks.check(f"reflection_{version}"):
            call = channel.stream_stream(
                f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
                request_serializer=request_class.SerializeToString,
                response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
            )
            known, unknown = requests[:3], requests[3:]
            responses[version] = [next(call(iter([r]), timeout=CALL_SECONDS_MAX)) for r in known]
            kinds = [response.WhichOneof("message_response") for response in responses[version]]
            expected = ["list_services_response"] + ["file_descriptor_response"] * 2
            expect(kinds == expected, f"the responses are {kinds}")
            for request in unknown:
                expect_not_found(call, request)
            names = {s.name for s in responses[version][0].list_services_response.service}
            expect(set(SERVICES) <= names, f"{version} lists {sorted(names)}")
    with checks.check("reflection_versions_agree"):
        for number, (old, new) in enumerate(zip(responses["v1alpha"], responses["v1"])):
            kind = old.WhichOneof("message_response")
            same = getattr(old, kind) == getattr(new, kind)
            expect(same, f"v1alpha and v1 respond to request {number} differently")


def expect_not_found(call, request):
    """An unknown name is NOT_FOUND, as an response or as the stream's status."""
    try:
        response = next(call(iter([request]), timeout=CALL_SECONDS_MAX))
    except grpc.RpcError as error:
        expect(error.code() == grpc.StatusCode.NOT_FOUND, f"unknown name: {error.code()}")
        return
    code = response.error_response.error_code
    expect(code == grpc.StatusCode.NOT_FOUND.value[0], f"unknown name: code {code}")


def field_facts(field):
    """What must agree between two descriptors of one field."""
    named, entry = field.message_type or field.enum_type, None
    if field.message_type and field.message_type.GetOptions().map_entry:
        entry = [field_facts(part) for part in field.message_type.fields]
    return {
        "entry": entry,
        "number": field.number,
        "type": field.type,
        "repeated": field.is_repeated,
        "of": named.full_name if named else None,
        "oneof": field.containing_oneof.name if field.containing_oneof else None,
    }


def compare_enum(ours, theirs, differences):
    """Our values are theirs."""
    for value in ours.values:
        other = theirs.values_by_name.get(value.name)
        if other is None or other.number != value.number:
            differences.append(f"{ours.full_name}.{value.name}")


def compare_message(ours, theirs, exact, differences):
    """Our fields are theirs; with `exact` none is left out."""
    for field in ours.fields:
        if f"{ours.name}.{field.name}" in NEWER:
            continue
        other = theirs.fields_by_name.get(field.name)
        if other is None or field_facts(field) != field_facts(other):
            found = field_facts(other) if other else "absent"
            differences.append(f"{field.full_name}: {field_facts(field)}, theirs {found}")
    if exact:
        absent = set(theirs.fields_by_name) - set(ours.fields_by_name)
        differences += [f"{ours.full_name} lacks {name}" for name in sorted(absent)]
    for enum in ours.enum_types:
        if enum.name in theirs.enum_types_by_name:
            compare_enum(enum, theirs.enum_types_by_name[enum.name], differences)
        else:
            differences.append(f"{enum.full_name} is unknown")
    for nested in ours.nested_types:
        if nested.GetOptions().map_entry:
            continue
        if nested.name in theirs.nested_types_by_name:
            other = theirs.nested_types_by_name[nested.name]
            compare_message(nested, other, exact, differences)
        else:
            differences.append(f"{nested.full_name} is unknown")


def check_descriptors(checks, reflected):
    """The served protocol is the published one, as NVIDIA's client has it."""
    theirs = service_pb2.DESCRIPTOR
    service = reflected.pool.FindServiceByName(INFERENCE)
    with checks.check("descriptors_methods"):
        published = theirs.services_by_name["GRPCInferenceService"]
        facts = lambda method: (method.input_type.full_name, method.output_type.full_name,
                                method.client_streaming, method.server_streaming)
        expected = {method.name: facts(method) for method in published.methods}
        found = {method.name: facts(method) for method in service.methods}
        lacking = sorted(set(expected) - set(found))
        expect(not lacking, f"methods that are not served: {lacking}")
        wrong = [name for name in found if found[name] != expected.get(name)]
        expect(not wrong, f"methods that differ: {wrong}")
    with checks.check("descriptors_messages"):
        differences = []
        ours = service.file.message_types_by_name
        for name, message in theirs.message_types_by_name.items():
            if name in ours:
                compare_message(ours[name], message, True, differences)
            else:
                differences.append(f"{name} is not defined")
        more = set(ours) - set(theirs.message_types_by_name) - NEWER
        differences += [f"{name} is unknown" for name in sorted(more)]
        expect(not differences, "; ".join(differences[:5]))
    with checks.check("descriptors_model_config"):
        differences, config = [], model_config_pb2.DESCRIPTOR
        ours = reflected.pool.FindMessageTypeByName("inference.ModelConfig").file
        for name, message in ours.message_types_by_name.items():
            if name in config.message_types_by_name:
                other = config.message_types_by_name[name]
                compare_message(message, other, False, differences)
            else:
                differences.append(f"{name} is unknown")
        for name, enum in ours.enum_types_by_name.items():
            compare_enum(enum, config.enum_types_by_name[name], differences)
        expect(not differences, "; ".join(differences[:5]))


def check_answers_promptly(checks, stub):
    """Probes call Check all the time: it must be cheap."""
    with checks.check("health_check_is_quick"):
        begin = time.monotonic()
        for _ in range(200):
            stub.Check(health_pb2.HealthCheckRequest(), timeout=CALL_SECONDS_MAX)
        seconds = time.monotonic() - begin
        expect(seconds < 10, f"200 checks took {seconds:.1f} s")


def main():
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--repository-control", action="store_true",
                        help="unload and load digits too")
    options = parser.parse_args()
    channel, checks = open_channel(options.grpc), Checks()
    health = health_pb2_grpc.HealthStub(channel)
    check_health(checks, health)
    check_answers_promptly(checks, health)
    reflected = Reflected(channel)
    check_reflection(checks, channel, reflected)
    check_descriptors(checks, reflected)
    if options.repository_control:
        check_health_follows(checks, health, channel)
    channel.close()
    checks.finish()


if __name__ == "__main__":
    main()
