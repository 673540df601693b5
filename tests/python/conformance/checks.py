"""What the outside-client checks share: the report, the arguments, polling and
message classes built from a server's reflection.

Every script here speaks to a running server by its address and imports nothing
of Andon's, so that it sees what any caller sees.
"""

import argparse
import os
import sys
import time
import traceback

import grpc
from google.protobuf import descriptor_pool, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

# grpcio limits received messages to 4 MiB by itself; these checks send more.
CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
]

# No single call of these checks may hang a test run.
CALL_SECONDS_MAX = 60


class Checks:
    """Counts checks. A failing check is printed and the next one still runs."""

    def __init__(self):
        self.passed = 0
        self.failed = []

    def check(self, name):
        """A context manager around one named check."""
        return _Check(self, name)

    def finish(self):
        """Prints the sum and leaves with 0 only if every check passed."""
        print(f"{self.passed} checks passed")
        if self.failed:
            print(f"{len(self.failed)} checks FAILED: {', '.join(self.failed)}", flush=True)
        if not self.passed and not self.failed:
            print("nothing was checked", flush=True)
        sys.stdout.flush()
        sys.exit(0 if self.passed and not self.failed else 1)


class _Check:
    def __init__(self, checks, name):
        self.checks = checks
        self.name = name
        self.began = 0.0

    def __enter__(self):
        self.began = time.monotonic()
        return self

    def __exit__(self, kind, error, trace):
        if kind is None:
            self.checks.passed += 1
            print(f"ok {self.name}", flush=True)
            return False
        if not issubclass(kind, Exception):
            return False
        self.checks.failed.append(self.name)
        # The line in the script, not in `expect` or in a library.
        script = os.path.abspath(sys.argv[0])
        frames = [f for f in traceback.extract_tb(trace) if f.filename == script]
        line = f" (line {frames[-1].lineno})" if frames else ""
        took = f" after {time.monotonic() - self.began:.1f} s"
        print(f"FAILED {self.name}{line}{took}: {describe(error)}", flush=True)
        return True


def describe(error):
    """One line about an exception; a gRPC error by its status."""
    if isinstance(error, grpc.RpcError) and hasattr(error, "code"):
        return f"unexpected status {error.code().name}: {error.details()}"
    return f"{type(error).__name__}: {error}"


def expect(condition, message):
    """An assertion that survives `python -O`."""
    if not condition:
        raise AssertionError(message)


def expect_status(call, *codes):
    """Runs `call`, which must fail with one of `codes`; returns the error."""
    try:
        response = call()
    except grpc.RpcError as error:
        expected = " or ".join(code.name for code in codes)
        expect(
            error.code() in codes,
            f"status {error.code().name} ({error.details()}), expected {expected}",
        )
        expect(error.details(), "the status has no message")
        return error
    raise AssertionError(f"the call succeeded: {str(response)[:200]}")


def eventually(condition, message, seconds_max=15.0):
    """Polls `condition` until it holds: a gateway hears of changes shortly
    after they happen."""
    deadline = time.monotonic() + seconds_max
    while True:
        if condition():
            return
        expect(time.monotonic() < deadline, f"{message} (waited {seconds_max:g} s)")
        time.sleep(0.05)


def arguments(description, doors=("grpc",)):
    """The parser with what every script takes: the server's addresses."""
    parser = argparse.ArgumentParser(description=description)
    for door in doors:
        parser.add_argument(f"--{door}", required=True, metavar="HOST:PORT", help="the server")
    return parser


def read_key(path):
    """The key that a file holds: keys are never flags."""
    with open(path, encoding="utf-8") as file:
        return file.read().strip()


def open_channel(address, seconds_max=20):
    """A channel that is connected, or an error within `seconds_max`."""
    channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
    try:
        grpc.channel_ready_future(channel).result(timeout=seconds_max)
    except grpc.FutureTimeoutError:
        print(f"FAILED connect: no gRPC server responds at {address} within {seconds_max} s")
        sys.exit(1)
    return channel


class Reflected:
    """Messages and calls built from what a server's reflection tells."""

    def __init__(self, channel):
        self.channel = channel
        self.database = ProtoReflectionDescriptorDatabase(channel)
        self.pool = descriptor_pool.DescriptorPool(self.database)

    def message(self, full_name):
        """The class of a message."""
        descriptor = self.pool.FindMessageTypeByName(full_name)
        return message_factory.GetMessageClass(descriptor)

    def method(self, service, method):
        """A callable for one method of a service, of its own streaming kind."""
        descriptor = self.pool.FindServiceByName(service).FindMethodByName(method)
        ask = "stream" if descriptor.client_streaming else "unary"
        response = "stream" if descriptor.server_streaming else "unary"
        make = getattr(self.channel, f"{ask}_{response}")
        answer_class = message_factory.GetMessageClass(descriptor.output_type)
        return make(
            f"/{service}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=answer_class.FromString,
        )
