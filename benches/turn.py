"""Compares the gateway of this build with that of another, row by row.

    make bench-turn BASE=path-or-commit
    python3 benches/turn.py BASE [--rounds 10] [--seconds 1] [--rows WORDS]

BASE is an `andon` binary, or a commit that is built into target/bench. Two
gateways, one of each binary, run at once over the same workers, and the same
load calls them in turn, so that a machine that changes its speed does so to
both. In every round each row is measured once with each, in the other order
than in the round before. A round's ratio is the requests per second of the new
gateway over those of the base; a row's ratio is the median over its rounds.
Fails if the geometric mean of the rows is below 0.98, or a row below 0.95.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import front
from measure import ANDON, SENTENCES, andon_level, wait_for_http, wrk_level
from processes import ROOT, Failure, Processes, free_port, run

MEAN_MIN = 0.98
ROW_MIN = 0.95
SIDES = ("base", "new")
BUILDS = ROOT / "target" / "bench"
BUILD_SECONDS_MAX = 3600


def base_binary(base):
    """The binary that BASE names, built first if BASE is a commit."""
    path = Path(base).resolve()
    if path.is_file():
        return path
    commit = run(["git", "-C", ROOT, "rev-parse", "--verify", f"{base}^{{commit}}"], 30).strip()
    cached = BUILDS / f"andon-{commit[:12]}"
    if not cached.exists():
        print(f"building {commit[:12]}, once", flush=True)
        sources = BUILDS / "sources"
        run(["git", "-C", ROOT, "worktree", "prune"], 30)
        run(["git", "-C", ROOT, "worktree", "add", "--detach", "--force", sources, commit], 120)
        try:
            build = ["cargo", "build", "--release", "--locked", "-p", "cli",
                     "--manifest-path", sources / "Cargo.toml", "--target-dir", BUILDS / "build"]
            run(build, BUILD_SECONDS_MAX)
            os.replace(BUILDS / "build" / "release" / "andon", cached)
        finally:
            run(["git", "-C", ROOT, "worktree", "remove", "--force", sources], 120)
    return cached


class Row:
    """One way of calling the gateway: a name, and for each side the function
    that runs one level of load."""

    def __init__(self, name, model, concurrency, levels):
        self.name = f"{name}, {concurrency} in flight"
        self.model = model
        self.concurrency = concurrency
        self.levels = levels
        # Requests per second by side, one value for each round.
        self.rates = {side: [] for side in SIDES}

    def warm(self, side):
        report = self.levels[side](self.model, 1, None)
        if report["errors"]:
            raise Failure(f"{self.name}: requests to {side} fail")

    def measure(self, side, seconds):
        report = self.levels[side](self.model, self.concurrency, seconds)
        if report["errors"] or not report["requests_per_second"]:
            raise Failure(f"{self.name}: {report['errors']} requests to {side} failed")
        self.rates[side].append(report["requests_per_second"])

    def ratios(self):
        return [new / base for base, new in zip(self.rates["base"], self.rates["new"])]

    def ratio(self):
        return statistics.median(self.ratios())


def gateways(processes, programs, name, worker, flags=()):
    """A gateway of each side over a worker: {side: (gRPC port, HTTP port)}."""
    ports = {}
    for side, program in programs.items():
        grpc, http, _ = front.start_gateway(processes, f"{name}-{side}", worker, flags, program)
        ports[side] = (grpc, http)
    return ports


def wait(processes, name, ports, model):
    for side, (_, http) in ports.items():
        url = f"http://{front.loopback(http)}/v2/models/{model}/ready"
        wait_for_http(processes, f"{name}-{side}", url)


def over_grpc(ports, load):
    return {side: andon_level(grpc, load) for side, (grpc, _) in ports.items()}


def over_http(ports, path, *bodies):
    return {side: wrk_level(f"http://{front.loopback(http)}{path}", *bodies)
            for side, (_, http) in ports.items()}


def tensor_rows(processes, programs):
    """Tensors of 1 KB and 600 KB through every door, answered by the echo worker."""
    worker = free_port()
    processes.start("echo", [front.ECHO_WORKER, "--grpc-addr", front.loopback(worker)])
    ports = gateways(processes, programs, "echo", worker)
    wait(processes, "echo", ports, "echo")
    blob, head = front.tensor_binary(processes.folder)
    path = "/v2/models/echo/infer"
    for name, levels, concurrencies in (
        ("1 KB over gRPC", over_grpc(ports, ["--payload-bytes", 1000]), (1, 32)),
        ("600 KB over gRPC", over_grpc(ports, ["--payload-bytes", 4 * front.TENSOR_ELEMENTS]), (1, 32)),
        ("600 KB over HTTP, binary", over_http(ports, path, blob, head), (1, 8)),
        ("600 KB over HTTP, JSON", over_http(ports, path, front.tensor_json(processes.folder)), (1, 8)),
    ):
        for concurrency in concurrencies:
            yield Row(name, "echo", concurrency, levels)


def layer_rows(processes, programs):
    """Rows of numbers: bare, with identity and quotas, and with cache misses and hits."""
    declared = front.deterministic(processes.folder)
    shutil.copytree(front.MODELS / "digits" / "1", declared / "plain" / "1")
    worker = front.start_worker(processes, "digits", declared, ["digits", "plain"])
    guard, key = front.identity(processes.folder)
    bare = gateways(processes, programs, "bare", worker)
    guarded = gateways(processes, programs, "guarded", worker, guard)
    # Its rows of the round before have expired.
    forgets = gateways(processes, programs, "forgets", worker, [*guard, "--cache-ttl", "100ms"])
    wait(processes, "bare", bare, "digits")
    many, few = ["--distinct", front.DISTINCT_MANY], ["--distinct", front.DISTINCT_FEW]
    for name, model, levels in (
        ("digits", "plain", over_grpc(bare, many)),
        ("digits with identity and quotas", "plain", over_grpc(guarded, [*many, *key])),
        ("digits, cache misses", "digits", over_grpc(forgets, [*many, *key])),
        ("digits, cache hits", "digits", over_grpc(guarded, [*few, *key])),
    ):
        for concurrency in (1, 32):
            yield Row(name, model, concurrency, levels)


def embedding_rows(processes, programs):
    """One sentence per request over gRPC and over HTTP."""
    worker = front.start_worker(processes, "minilm", front.MODELS, ["minilm"])
    ports = gateways(processes, programs, "texts", worker)
    wait(processes, "texts", ports, "minilm")
    bodies = front.embeddings_bodies(processes.folder)
    for name, levels in (
        ("embeddings over gRPC", over_grpc(ports, ["--texts", SENTENCES])),
        ("embeddings over HTTP", over_http(ports, "/v1/embeddings", bodies)),
    ):
        for concurrency in (1, 32):
            yield Row(name, "minilm", concurrency, levels)


def measure(rows, options):
    for row in rows:
        for side in SIDES:
            row.warm(side)
    for number in range(options.rounds):
        order = SIDES if number % 2 == 0 else tuple(reversed(SIDES))
        for row in rows:
            for side in order:
                row.measure(side, options.seconds)
            print(f"round {number + 1}  {row.name:48} {row.ratios()[-1]:.3f}", flush=True)


def report(rows, base):
    """Prints the table and writes the report; returns whether the new gateway holds."""
    mean = statistics.geometric_mean(row.ratio() for row in rows)
    print(f"\n{'':48} {'base/s':>10} {'new/s':>10}  {'new/base, median (least to most)'}")
    for row in rows:
        base_rate, new_rate = (statistics.median(row.rates[side]) for side in SIDES)
        low = "" if row.ratio() >= ROW_MIN else f"  below {ROW_MIN}"
        print(f"{row.name:48} {base_rate:10.1f} {new_rate:10.1f}  {row.ratio():.3f}"
              f" ({min(row.ratios()):.3f} to {max(row.ratios()):.3f}){low}")
    print(f"geometric mean of {len(rows)} rows: {mean:.3f} (at least {MEAN_MIN})")
    BUILDS.mkdir(parents=True, exist_ok=True)
    found = {"base": str(base), "mean": mean,
             "rows": [{"name": row.name, "ratio": row.ratio(), "rates": row.rates} for row in rows]}
    (BUILDS / "turn.json").write_text(json.dumps(found, indent=2) + "\n")
    return mean >= MEAN_MIN and all(row.ratio() >= ROW_MIN for row in rows)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", help="an andon binary, or a commit")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=int, default=1, help="length of one measurement")
    parser.add_argument("--rows", default="", help="only rows whose names match this expression")
    options = parser.parse_args()
    try:
        missing = front.fits() + ([] if front.ECHO_WORKER.exists() else ["target/release/echo-worker"])
        if missing:
            raise Failure("missing: " + "; ".join(missing))
        programs = {"base": base_binary(options.base), "new": ANDON}
        with tempfile.TemporaryDirectory(prefix="andon-bench-") as folder, Processes(folder) as processes:
            rows = [row for scenario in (tensor_rows, layer_rows, embedding_rows)
                    for row in scenario(processes, programs)]
            rows = [row for row in rows if re.search(options.rows, row.name)]
            measure(rows, options)
        held = report(rows, programs["base"])
    except Failure as failure:
        print(f"benchmark failed: {failure}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main()
