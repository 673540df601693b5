"""Runs a fleet on loopback: `python3 demo/fleet.py target/release/andon`.

    gateway    127.0.0.1:8001, HTTP 8000, admin 8002
    worker 1   127.0.0.1:9001, admin 9011
    worker 2   127.0.0.1:9002, admin 9012
    worker 3   127.0.0.1:9003, admin 9013

Each role is a separate process whose log is printed here. SIGINT and SIGTERM drain all of them; a
second signal kills them. Needs Python's standard library only.
"""

import argparse
import os
import pathlib
import queue
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

HOST = "127.0.0.1"
WORKERS = (1, 2, 3)
READY_SECONDS_MAX = 60
# A role exits after drain_delay + drain_deadline + 2 s at the latest, 69 s by default.
DRAIN_SECONDS_MAX = 75


class Child:
    """One role of the fleet and its ports; only the gateway has an HTTP port."""

    def __init__(self, name, command, grpc, admin, http=None):
        self.name = name
        self.ports = {"grpc": grpc, "admin": admin}
        if http is not None:
            self.ports["http"] = http
        self.command = list(command)
        for use, port in self.ports.items():
            self.command += [f"--{use}-addr", f"{HOST}:{port}"]
        self.process = None

    def start(self, events):
        environment = os.environ.copy()
        # The workers share one machine, and each would use all of its cores.
        threads = max(1, (os.cpu_count() or 1) // len(WORKERS))
        environment.setdefault("ANDON_THREADS", str(threads))
        if not sys.stderr.isatty():
            environment["NO_COLOR"] = "1"
        self.process = subprocess.Popen(
            self.command,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            # A terminal's Ctrl-C reaches only this program, which forwards it once.
            start_new_session=True,
        )
        threading.Thread(target=self.follow, args=(events,), daemon=True).start()

    def follow(self, events):
        for line in self.process.stderr:
            print(f"{self.name} | {line}", end="", file=sys.stderr, flush=True)
        self.process.wait()
        events.put(self)

    def is_ready(self):
        try:
            with urllib.request.urlopen(f"http://{HOST}:{self.ports['admin']}/readyz", timeout=1) as response:
                return response.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def exit_reason(self):
        code = self.process.returncode
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def main():
    arguments = parse()
    gateway, workers = plan(arguments)
    children = [gateway, *workers]
    refuse_taken_ports(children)
    events = queue.Queue()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _frame: events.put(number))
    try:
        for child in children:
            child.start(events)
        outcome = run(gateway, children, events, arguments.andon)
    finally:
        # However this program ends, no process is left behind.
        for child in children:
            if child.process and child.process.poll() is None:
                child.process.kill()
                child.process.wait()
    sys.exit(outcome)


def parse():
    parser = argparse.ArgumentParser(description="A gateway and three workers on loopback.")
    parser.add_argument("andon", help="the binary, for example target/release/andon")
    parser.add_argument("--repository", default="models", help="the model repository")
    parser.add_argument(
        "--port-base",
        type=int,
        default=8000,
        help="base P of the ports P, P+1, P+2, P+1001 to P+1003 and P+1011 to P+1013",
    )
    arguments = parser.parse_args()
    if not os.access(arguments.andon, os.X_OK):
        parser.error(f"{arguments.andon} is not executable: run `make build`")
    if not pathlib.Path(arguments.repository).is_dir():
        parser.error(f"{arguments.repository} is not a folder: run `make models`")
    if not 0 < arguments.port_base <= 64000:
        parser.error("--port-base must be from 1 to 64000")
    return arguments


def plan(arguments):
    andon, base = os.path.abspath(arguments.andon), arguments.port_base
    serves = [andon, "worker", "--repository", arguments.repository]
    workers = [
        Child(f"worker {number}", serves, base + 1000 + number, base + 1010 + number)
        for number in WORKERS
    ]
    forwards = [andon, "gateway"]
    for worker in workers:
        forwards += ["--worker", f"{HOST}:{worker.ports['grpc']}"]
    return Child("gateway ", forwards, base + 1, base + 2, base), workers


def refuse_taken_ports(children):
    taken = []
    for child in children:
        for use, port in child.ports.items():
            with socket.socket() as probe:
                # As the roles do: a port in TIME_WAIT can be used.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((HOST, port))
                except OSError as error:
                    taken.append(f"  {port}, {use} of {child.name.strip()}: {error.strerror}")
    if taken:
        print("these ports are in use; stop the programs that use them, or choose --port-base:", file=sys.stderr)
        sys.exit("\n".join(taken))


def run(gateway, children, events, andon):
    """Waits until all are ready, then for a signal or an exit; returns the exit code."""
    ready_by = time.monotonic() + READY_SECONDS_MAX
    waiting = True
    while True:
        if waiting and all(child.is_ready() for child in children):
            waiting = False
            print(examples(gateway, children, andon), flush=True)
        if waiting and time.monotonic() > ready_by:
            late = [child.name.strip() for child in children if not child.is_ready()]
            print(f"not ready after {READY_SECONDS_MAX} s: {', '.join(late)}", file=sys.stderr)
            return drain(children, events, 1)
        try:
            event = events.get(timeout=0.1 if waiting else None)
        except queue.Empty:
            continue
        if not isinstance(event, Child):
            return drain(children, events, 0)
        print(f"{event.name} | exited: {event.exit_reason()}", file=sys.stderr, flush=True)
        if waiting or event is gateway:
            return drain(children, events, 1)
        print(f"to restart it:\n  {shlex.join(event.command)}", file=sys.stderr, flush=True)


def drain(children, events, outcome):
    """Drains the running roles, and kills them at a second signal or after a timeout."""
    print("draining the fleet; press Ctrl-C again to kill it", file=sys.stderr, flush=True)
    for child in children:
        child.process.send_signal(signal.SIGTERM)
    drained_by = time.monotonic() + DRAIN_SECONDS_MAX
    while any(child.process.poll() is None for child in children):
        try:
            event = events.get(timeout=max(0.0, drained_by - time.monotonic()))
        except queue.Empty:
            print("the drain timed out", file=sys.stderr)
            return 1
        if not isinstance(event, Child):
            return 1
        print(f"{event.name} | exited: {event.exit_reason()}", file=sys.stderr, flush=True)
    return outcome


def examples(gateway, children, andon):
    address = f"{HOST}:{gateway.ports['grpc']}"
    web, admin = (f"http://{HOST}:{gateway.ports[use]}" for use in ("http", "admin"))
    pids = "\n".join(
        f"  {c.name}  pid {c.process.pid:<8} {HOST}:{c.ports['grpc']}" for c in children
    )
    worker = children[-1]
    return f"""
A gateway and {len(WORKERS)} workers are ready: gRPC on {address}, HTTP on {web}, metrics on {admin}/metrics
{pids}

Try it in a browser: {web}/docs
Or in another terminal:
  {andon} models list --address {address}
  {andon} infer minilm "A lantern around a candle" --address {address}
  curl {web}/v1/embeddings -H 'content-type: application/json' -d '{{"model":"minilm","input":"A lantern around a candle"}}'
  grpcurl -plaintext -d '{{"inputs":"A lantern around a candle","normalize":true}}' {address} tei.v1.Embed/Embed
Kill a worker under load; no request fails:
  {andon} bench digits --concurrency 32 --duration 10s --address {address} & sleep 3; kill -9 {worker.process.pid}; wait
See the workers that are left:
  curl -s {admin}/metrics | grep andon_gateway_workers
Stop the fleet with Ctrl-C.
"""


if __name__ == "__main__":
    main()
