"""Measures Andon beside its peers on this machine and writes docs/benchmarks.md.

    make bench
    target/venv/bin/python benches/run.py [--only gateway|minilm|front] [--seconds 10]

Three scenarios:

gateway  The echo worker called directly, through Andon's gateway, through
         nginx and through HAProxy, with messages of 1 KB and 600 KB, at 1 and
         32 in flight. The load comes from `andon bench`.
minilm   One sentence per request at 1, 8 and 64 in flight: `andon serve`, with
         the load of `andon bench`, beside FastAPI with sentence-transformers,
         with the load of wrk.
front    The API front: rows of numbers through a gateway with more and more
         layers (identity and quotas, then the cache); one embedding and a tensor of
         600 KB at each door; and how often 1,000 identical requests at once are
         computed.

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
import subprocess
import sys
import tempfile

import front
from measure import (
    ANDON,
    BENCHES,
    SENTENCES,
    Target,
    andon_level,
    measure,
    medians,
    sentence_bodies,
    wait_for_http,
    wrk_level,
)
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
from page_front import front_section
from processes import ROOT, Failure, Processes, free_port, run

REPORTS = ROOT / "target" / "bench"
ECHO_WORKER = ROOT / "target" / "release" / "echo-worker"
MODELS = ROOT / "models"


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
        worker, gateway, admin, web = (free_port() for _ in range(4))
        processes.start("worker", [ECHO_WORKER, "--grpc-addr", f"127.0.0.1:{worker}"])
        processes.start("andon", [
            ANDON, "gateway", "--worker", f"127.0.0.1:{worker}",
            "--grpc-addr", f"127.0.0.1:{gateway}", "--admin-addr", f"127.0.0.1:{admin}",
            "--http-addr", f"127.0.0.1:{web}",
        ])
        ports = start_proxies(processes, worker)

        def level(port):
            def call(payload, concurrency, seconds):
                load = ["--payload-bytes", payload]
                return andon_level(port, load)("echo", concurrency, seconds)

            return call

        targets = [
            Target("direct", "worker", level(worker)),
            Target("andon", "andon", level(gateway)),
            Target("nginx", "nginx", level(ports["nginx"])),
            Target("haproxy", "haproxy", level(ports["haproxy"])),
        ]
        cases = [(p, c) for p in PAYLOADS_BYTES for c in GATEWAY_CONCURRENCY]
        return measure(processes, targets, cases, options)


def minilm_scenario(options, folder):
    """Samples of minilm in Andon and in the peer."""
    with Processes(folder) as processes:
        serve, admin, web, peer = (free_port() for _ in range(4))
        processes.start("andon", [
            ANDON, "serve", "--repository", MODELS,
            "--grpc-addr", f"127.0.0.1:{serve}", "--admin-addr", f"127.0.0.1:{admin}",
            "--http-addr", f"127.0.0.1:{web}",
        ])
        processes.start("fastapi", [
            PYTHON, BENCHES / "peers" / "server.py", "sentence-transformers", "--port", peer,
        ])
        wait_for_http(processes, "fastapi", f"http://127.0.0.1:{peer}/health")
        bodies = sentence_bodies(processes.folder)
        targets = [
            Target("andon", "andon", andon_level(serve, ["--texts", SENTENCES])),
            Target("fastapi", "fastapi", wrk_level(f"http://127.0.0.1:{peer}/embed", bodies)),
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


def front_report(options, folder):
    """Measures the API front and writes its section of the page."""
    layers, turns = front.layers_scenario(options, os.path.join(folder, "layers"))
    doors = medians(front.doors_scenario(options, os.path.join(folder, "doors")))
    computed = front.coalescing_counts(options, os.path.join(folder, "coalescing"))
    command = f"benches/run.py --only front --rounds {options.rounds} --seconds {options.seconds}"
    head = (
        f"Machine: {machine()}. Command: `{command}`. "
        f"Median of {options.rounds} rounds of {options.seconds} s."
    )
    body = f"{head}\n\n{front_section(medians(layers), turns, doors, computed)}"
    write_section("front", "The API front", body)


def need(scenarios):
    """Names everything that is missing before anything starts."""
    missing = []
    if not ANDON.exists():
        missing.append("target/release/andon (cargo build --release)")
    if "front" in scenarios:
        missing += front.fits()
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
        elif subprocess.run([PYTHON, "-c", "import fastapi, orjson, uvicorn, sentence_transformers"],
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
    parser.add_argument("--only", choices=["gateway", "minilm", "front"], help="one scenario")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=10, help="length of one measurement")
    parser.add_argument("--warm-seconds", type=int, default=2, help="load before each")
    parser.add_argument("--pairs", type=int, default=4000, help="calls of each gateway in turn")
    options = parser.parse_args()
    scenarios = {"gateway": gateway_scenario, "minilm": minilm_scenario, "front": None}
    if options.only:
        scenarios = {options.only: scenarios[options.only]}
    try:
        need(scenarios)
        for name, scenario in scenarios.items():
            with tempfile.TemporaryDirectory(prefix="andon-bench-") as folder:
                if name == "front":
                    front_report(options, folder)
                else:
                    report(name, scenario(options, folder), options)
    except Failure as failure:
        print(f"benchmark failed: {failure}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
