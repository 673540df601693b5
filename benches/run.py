"""Measures Andon beside its peers on this machine and writes docs/benchmarks.md.

    make bench
    target/venv/bin/python benches/run.py [--only gateway|minilm] [--seconds 10]

Two scenarios:

gateway  The echo worker called directly, through Andon's gateway, through
         nginx and through HAProxy, with messages of 1 KB and 600 KB, at 1 and
         32 in flight. The load comes from `andon bench`.
minilm   One sentence per request at 1, 8 and 64 in flight: `andon serve`, with
         the load of `andon bench`, beside FastAPI with sentence-transformers,
         with the load of wrk.

All targets of a scenario run at once and are measured in turn, the order
reversed from round to round, so that a machine that changes its mind does so
to each of them. A number in a table is the median of the rounds. A request that
fails makes the whole run fail. Everything started is ended by its process id.
"""

import argparse
import getpass
import grp
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

from page import (
    GATEWAY_CONCURRENCY,
    MINILM_CONCURRENCY,
    PAGE,
    PAYLOADS_BYTES,
    PYTHON,
    gateway_aims,
    gateway_tables,
    machine,
    minilm_table,
    versions,
    write_section,
)
from processes import ROOT, Failure, Processes, free_port, run

BENCHES = ROOT / "benches"
REPORTS = ROOT / "target" / "bench"
ANDON = ROOT / "target" / "release" / "andon"
ECHO_WORKER = ROOT / "target" / "release" / "echo-worker"
MODELS = ROOT / "models"
SENTENCES = BENCHES / "sentences.txt"

METRICS = ["requests_per_second", "p50_us", "p90_us", "p99_us", "cpu_us"]
START_SECONDS_MAX = 120


def andon_bench(address, model, concurrency, load, extent):
    """One level of `andon bench`: its report as a dictionary."""
    command = [ANDON, "bench", model, "--address", address, "--concurrency", concurrency]
    output = run([*command, *load, *extent, "--output", "json"], seconds_max=300)
    levels = json.loads(output)["levels"]
    if len(levels) != 1:
        raise Failure(f"`andon bench` reported {len(levels)} levels, wanted one")
    return levels[0]


def wrk(url, concurrency, seconds):
    """One level of wrk with the sentences, in the shape of `andon bench`."""
    output = run(
        ["wrk", "--threads", 1, "--connections", concurrency, "--duration", f"{seconds}s",
         "--timeout", "60s", "--script", BENCHES / "embed.lua", url, "--", SENTENCES],
        seconds_max=seconds + 120,
    )
    found = re.search(r"^REPORT (.*)$", output, re.MULTILINE)
    if not found:
        raise Failure(f"wrk printed no report:\n{output[-1500:]}")
    return json.loads(found.group(1))


class Target:
    """Something to measure: a name, the process that is the peer, a load."""

    def __init__(self, name, process, level):
        self.name = name
        self.process = process
        # level(case, concurrency, seconds) runs the load and returns a report.
        self.level = level


def wait_until_answers(processes, target, case):
    """Sends single requests until one is answered."""
    deadline = time.monotonic() + START_SECONDS_MAX
    while True:
        processes.expect_alive(target.process)
        try:
            if target.level(case, 1, None)["errors"] == 0:
                return
            problem = "requests fail"
        except Failure as error:
            problem = str(error)
        if time.monotonic() > deadline:
            raise Failure(f"{target.name} does not answer: {problem}")
        time.sleep(0.3)


def measure_one(processes, target, case, concurrency, options):
    """One warm level with the processor time that its process spent."""
    target.level(case, concurrency, options.warm_seconds)
    processes.settle(target.process)
    before = processes.cpu_seconds(target.process)
    report = target.level(case, concurrency, options.seconds)
    processes.settle(target.process)
    spent = processes.cpu_seconds(target.process) - before
    if report["errors"]:
        raise Failure(f"{target.name}: {report['errors']} requests failed")
    rate = report["requests_per_second"]
    if not rate:
        raise Failure(f"{target.name} answered nothing within {options.seconds} s")
    if report["p50_us"] <= 0:
        raise Failure(f"{target.name}: a median latency of {report['p50_us']} us was reported")
    report["cpu_us"] = spent / (rate * options.seconds) * 1e6
    return report


def measure(processes, targets, cases, options):
    """{(target, case, concurrency): {metric: [one value per round]}}."""
    for target in targets:
        wait_until_answers(processes, target, cases[0][0])
    samples = {}
    for number in range(options.rounds):
        for case, concurrency in cases:
            order = targets if number % 2 == 0 else list(reversed(targets))
            for target in order:
                report = measure_one(processes, target, case, concurrency, options)
                entry = samples.setdefault((target.name, case, concurrency), {})
                for metric in METRICS:
                    entry.setdefault(metric, []).append(report[metric])
                print(
                    f"round {number + 1}  {target.name:8} {case!s:>7} x{concurrency:<3}"
                    f" {report['requests_per_second']:10.1f}/s  p50 {report['p50_us']:9.0f} us"
                    f"  p99 {report['p99_us']:9.0f} us",
                    flush=True,
                )
    return samples


def medians(samples):
    """The samples with each list replaced by its median."""
    return {
        key: {metric: statistics.median(values) for metric, values in entry.items()}
        for key, entry in samples.items()
    }


def fill(template, target, words):
    """Writes a configuration with its @WORDS@ replaced."""
    text = template.read_text()
    for word, value in words.items():
        text = text.replace(f"@{word}@", str(value))
    left = re.search(r"@[A-Z_]+@", text)
    if left:
        raise Failure(f"{template.name}: nothing replaces {left.group(0)}")
    target.write_text(text)


def start_proxies(processes, worker_port):
    """nginx and HAProxy before the worker; their ports by name."""
    folder = processes.folder
    ports = {"nginx": free_port(), "haproxy": free_port()}
    words = {
        "UPSTREAM_PORT": worker_port,
        "THREADS": os.cpu_count(),
        "WORK": folder,
        "USER": getpass.getuser(),
        "GROUP": grp.getgrgid(os.getgid()).gr_name,
    }
    nginx, haproxy = folder / "nginx.conf", folder / "haproxy.cfg"
    proxies = BENCHES / "proxies"
    fill(proxies / "nginx.conf.template", nginx, {**words, "LISTEN_PORT": ports["nginx"]})
    fill(proxies / "haproxy.cfg.template", haproxy, {**words, "LISTEN_PORT": ports["haproxy"]})
    run(["nginx", "-t", "-q", "-p", folder, "-c", nginx], 30)
    run(["haproxy", "-c", "-q", "-f", haproxy], 30)
    processes.start("nginx", ["nginx", "-p", folder, "-c", nginx])
    processes.start("haproxy", ["haproxy", "-db", "-f", haproxy])
    return ports


def gateway_scenario(options, folder):
    """Samples of the echo worker and of everything that stands before it."""
    with Processes(folder) as processes:
        worker, gateway, admin = free_port(), free_port(), free_port()
        processes.start("worker", [ECHO_WORKER, "--grpc-addr", f"127.0.0.1:{worker}"])
        processes.start("andon", [
            ANDON, "gateway", "--worker", f"127.0.0.1:{worker}",
            "--grpc-addr", f"127.0.0.1:{gateway}", "--admin-addr", f"127.0.0.1:{admin}",
        ])
        ports = start_proxies(processes, worker)

        def level(port):
            def call(payload, concurrency, seconds):
                extent = ["--duration", f"{seconds}s"] if seconds else ["--requests", 1]
                load = ["--payload-bytes", payload]
                return andon_bench(f"127.0.0.1:{port}", "echo", concurrency, load, extent)

            return call

        targets = [
            Target("direct", "worker", level(worker)),
            Target("andon", "andon", level(gateway)),
            Target("nginx", "nginx", level(ports["nginx"])),
            Target("haproxy", "haproxy", level(ports["haproxy"])),
        ]
        cases = [(p, c) for p in PAYLOADS_BYTES for c in GATEWAY_CONCURRENCY]
        return measure(processes, targets, cases, options)


def wait_for_http(processes, name, url):
    """Until a GET succeeds: loading the model takes a while."""
    deadline = time.monotonic() + START_SECONDS_MAX
    while True:
        processes.expect_alive(name)
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            if time.monotonic() > deadline:
                raise Failure(f"{name} does not answer {url}") from None
        time.sleep(0.3)


def minilm_scenario(options, folder):
    """Samples of minilm in Andon and in the peer."""
    with Processes(folder) as processes:
        serve, admin, peer = free_port(), free_port(), free_port()
        processes.start("andon", [
            ANDON, "serve", "--repository", MODELS,
            "--grpc-addr", f"127.0.0.1:{serve}", "--admin-addr", f"127.0.0.1:{admin}",
        ])
        script, model = BENCHES / "fastapi_peer.py", MODELS / "minilm" / "1"
        processes.start("fastapi", [PYTHON, script, "--model", model, "--port", peer])
        wait_for_http(processes, "fastapi", f"http://127.0.0.1:{peer}/health")

        def andon_level(case, concurrency, seconds):
            extent = ["--duration", f"{seconds}s"] if seconds else ["--requests", 1]
            load = ["--texts", SENTENCES]
            return andon_bench(f"127.0.0.1:{serve}", case, concurrency, load, extent)

        def peer_level(_, concurrency, seconds):
            return wrk(f"http://127.0.0.1:{peer}", concurrency, seconds or 1)

        targets = [
            Target("andon", "andon", andon_level),
            Target("fastapi", "fastapi", peer_level),
        ]
        cases = [("minilm", concurrency) for concurrency in MINILM_CONCURRENCY]
        return measure(processes, targets, cases, options)


def report(scenario, samples, options):
    """Writes the JSON report and the section of the page."""
    found = medians(samples)
    command = "make bench"
    if (options.rounds, options.seconds) != (3, 10):
        command = f"benches/run.py --rounds {options.rounds} --seconds {options.seconds}"
    facts = {"machine": machine(), "peers": versions(scenario), "command": command,
             "rounds": options.rounds, "seconds": options.seconds}
    entries = [
        {"target": target, "case": case, "concurrency": concurrency,
         "median": found[(target, case, concurrency)], "rounds": rounds}
        for (target, case, concurrency), rounds in samples.items()
    ]
    REPORTS.mkdir(parents=True, exist_ok=True)
    path = REPORTS / f"{scenario}.json"
    path.write_text(json.dumps({**facts, "levels": entries}, indent=2) + "\n")
    head = (
        f"Machine: {facts['machine']}. Peers: {facts['peers']}. Command: `{command}`. "
        f"Median of {options.rounds} rounds of {options.seconds} s.\n"
    )
    if scenario == "gateway":
        body = f"{head}\n{gateway_tables(found)}\n\n{gateway_aims(found)}"
        write_section(scenario, "The gateway beside nginx and HAProxy", body)
    else:
        body = f"{head}\n{minilm_table(found)}"
        write_section(scenario, "Sentence embeddings beside FastAPI", body)
    print(f"wrote {path.relative_to(ROOT)} and {PAGE.relative_to(ROOT)}")


def need(scenarios):
    """Names everything that is missing before anything starts."""
    missing = []
    if not ANDON.exists():
        missing.append("target/release/andon (cargo build --release)")
    if "gateway" in scenarios:
        if not ECHO_WORKER.exists():
            missing.append("target/release/echo-worker (cargo build --release)")
        missing += [f"{tool} (benches/setup.sh)" for tool in ("nginx", "haproxy")
                    if not shutil.which(tool)]
    if "minilm" in scenarios:
        if not shutil.which("wrk"):
            missing.append("wrk (benches/setup.sh)")
        if not PYTHON.exists():
            missing.append("target/venv (benches/setup.sh)")
        elif subprocess.run([PYTHON, "-c", "import fastapi, uvicorn, sentence_transformers"],
                            capture_output=True).returncode:
            missing.append("packages of benches/requirements.txt (benches/setup.sh)")
        if not (MODELS / "minilm" / "1" / "config.json").exists():
            missing.append("models/minilm (make models)")
    if missing:
        raise Failure("missing: " + "; ".join(missing))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=["gateway", "minilm"], help="one scenario")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=10, help="length of one measurement")
    parser.add_argument("--warm-seconds", type=int, default=2, help="load before each")
    options = parser.parse_args()
    scenarios = {"gateway": gateway_scenario, "minilm": minilm_scenario}
    if options.only:
        scenarios = {options.only: scenarios[options.only]}
    try:
        need(scenarios)
        for name, scenario in scenarios.items():
            with tempfile.TemporaryDirectory(prefix="andon-bench-") as folder:
                report(name, scenario(options, folder), options)
    except Failure as failure:
        print(f"benchmark failed: {failure}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
