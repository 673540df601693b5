"""A collector of OTLP traces: writes `service trace span parent name` lines.

Usage: collector.py HOST:PORT FILE
"""

import sys
from concurrent import futures

import grpc
from opentelemetry.proto.collector.trace.v1 import (
    trace_service_pb2,
    trace_service_pb2_grpc,
)


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self, path):
        self.file = open(path, "a", buffering=1)

    def Export(self, request, context):
        for resource in request.resource_spans:
            service = next(
                a.value.string_value
                for a in resource.resource.attributes
                if a.key == "service.name"
            )
            for scope in resource.scope_spans:
                for span in scope.spans:
                    ids = (span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex())
                    print(service, *ids, span.name, file=self.file)
        return trace_service_pb2.ExportTraceServiceResponse()


def main():
    address, path = sys.argv[1:]
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Collector(path), server)
    if server.add_insecure_port(address) == 0:
        sys.exit(f"cannot listen on {address}")
    server.start()
    server.wait_for_termination()


main()
