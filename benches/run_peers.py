"""Measures Andon beside other libraries and the servers that are built around them,
and writes a section of docs/benchmarks.md and its plot.

    make bench-peers
    target/venv/bin/python benches/run_peers.py [--only library|served|digits]
        [--rounds 3] [--seconds 5] [--without-andon] [--formats f32 bf16 int8]

Three scenarios, each with all-MiniLM-L6-v2 or the network `digits`:

library  Texts a second from tokens to vectors. A contender is a process that speaks
         lines of JSON (benches/peers/library.py has the protocol); Andon's is the
         command of --andon, once for each of --formats.
served   One sentence a request at 1, 8 and 64 in flight: `andon serve` in each of
         --formats beside FastAPI around each library.
digits   64 numbers a request: `andon serve` beside FastAPI around scikit-learn.

All contenders of a scenario are there at once and are measured in turn, the order
reversed from round to round. A number in a table is the median of the rounds. The
reports stay in target/bench, so that one scenario can be measured again alone.
"""

import argparse
import importlib.metadata
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy

import page_peers
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
from page import PAGE, PYTHON, machine
from processes import CLOCK_TICKS, ROOT, Failure, Processes, cpu_seconds, family, free_port, run

PEERS = BENCHES / "peers"
MODELS = ROOT / "models"
WORK = ROOT / "target" / "peers"
FORMATS = ["f32", "bf16", "int8"]
LIBRARIES = [
    ("sentence-transformers", "f32"),
    ("sentence-transformers", "bf16"),
    ("onnxruntime", "f32"),
    ("onnxruntime", "int8"),
    ("openvino", "f32"),
    ("openvino", "bf16"),
]
REFERENCE = "sentence-transformers f32"
# Library, dtype, and the style of benches/peers/server.py with its streams. All styles
# were tried for each; these are the fastest at one level or another.
SERVERS = [
    ("sentence-transformers", "f32", "batch", 1),
    ("onnxruntime", "f32", "executor", 1),
    ("onnxruntime", "f32", "executor", 2),
    ("openvino", "bf16", "threads", 1),
    ("openvino", "bf16", "batch", 1),
    ("onnxruntime", "int8", "executor", 2),
    ("onnxruntime", "int8", "batch", 1),
]
STYLES = {
    ("threads", 1): "a thread a call",
    ("executor", 1): "one at a time",
    ("executor", 2): "two at once",
    ("batch", 1): "a batcher",
}
TITLES = {
    "sentence-transformers": "sentence-transformers",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "scikit-learn": "scikit-learn",
}
PACKAGES = {
    "library": ["sentence-transformers", "torch", "onnxruntime", "openvino"],
    "served": ["fastapi", "uvicorn", "sentence-transformers", "onnxruntime", "openvino"],
    "digits": ["fastapi", "uvicorn", "scikit-learn"],
}
LIBRARY_COMMAND = (
    "target/release/examples/library models/minilm/1 {dtype} auto"
    " short=target/peers/short.txt long=target/peers/long.txt"
)


class Contender:
    """A process that answers lines of JSON."""

    def __init__(self, title, dtype, andon, command):
        self.title, self.dtype, self.andon = title, dtype, andon
        self.rates = {corpus: [] for corpus in page_peers.CORPORA}
        self.others = 0.0
        self.quality = {}
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [str(word) for word in command], cwd=ROOT, text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
        )
        ready = self.read()
        if ready.get("ready") is not True:
            raise Failure(f"{title} printed {ready} instead of being ready")
        self.settings = ready.get("settings", {})
        self.gives_vectors = not andon or ready.get("vectors", False)

    def read(self):
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self.log.seek(0)
            raise Failure(f"{self.title} ended with {code}:\n{self.log.read()[-1500:]}")
        return json.loads(line)

    def ask(self, request):
        self.process.stdin.write(json.dumps(request) + "\n")
        found = self.read()
        if "error" in found:
            raise Failure(f"{self.title}: {found['error']}")
        return found

    def measure(self, corpus, seconds):
        """One rate, and how many cores other programs used meanwhile."""
        before, begun = others_seconds(self.process.pid), time.monotonic()
        rate = self.ask({"corpus": corpus, "seconds": seconds})["texts_per_second"]
        spent = others_seconds(self.process.pid) - before
        others = max(spent / (time.monotonic() - begun), 0.0)
        self.others = max(self.others, others)
        return rate, others

    def vectors(self, corpus, folder):
        path = Path(folder) / "vectors"
        found = self.ask({"corpus": corpus, "vectors": str(path)})
        return numpy.fromfile(path, "<f4").reshape(found["texts"], found["width"])

    def end(self):
        self.process.stdin.close()
        try:
            self.process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def others_seconds(pid):
    """Processor time of everything but this process and its children so far."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    user, nice, system = (int(field) / CLOCK_TICKS for field in fields[:3])
    return user + nice + system - sum(cpu_seconds(member) for member in family(pid))


def start_contenders(options, contenders):
    """Starts them one after the other: each tries batch sizes at its start."""
    for library, dtype in LIBRARIES:
        if dtype in options.formats:
            command = [PYTHON, PEERS / "library.py", library, dtype]
            title = f"{TITLES[library]} {dtype}"
            print(f"{title}: trying batch sizes", flush=True)
            contenders.append(Contender(title, dtype, False, command))
            print(f"{title}: {contenders[-1].settings}", flush=True)
    for dtype in [] if options.without_andon else options.formats:
        command = shlex.split(options.andon.format(dtype=dtype))
        contenders.append(Contender(f"Andon {dtype}", dtype, True, command))


def add_quality(contenders, folder):
    """Cosines of each contender's vectors with the reference's."""
    by_title = {contender.title: contender for contender in contenders}
    if REFERENCE not in by_title:
        return
    reference = by_title[REFERENCE].vectors("short", folder)
    for contender in contenders:
        if contender.gives_vectors:
            found = contender.vectors("short", folder)
            lengths = numpy.linalg.norm(found, axis=1) * numpy.linalg.norm(reference, axis=1)
            cosines = (found * reference).sum(axis=1) / lengths
            contender.quality = {
                "cosine_mean": float(cosines.mean()), "cosine_min": float(cosines.min()),
            }


def library_scenario(options, folder):
    contenders = []
    try:
        start_contenders(options, contenders)
        add_quality(contenders, folder)
        for number in range(options.rounds):
            for corpus in page_peers.CORPORA:
                for contender in contenders if number % 2 == 0 else reversed(contenders):
                    rate, others = contender.measure(corpus, options.seconds)
                    contender.rates[corpus].append(rate)
                    print(f"round {number + 1}  {contender.title:28} {corpus:5} {rate:8.1f}/s"
                          f"  others used {others:.2f} cores", flush=True)
        entries = [
            {"title": c.title, "dtype": c.dtype, "andon": c.andon, "settings": c.settings,
             "median": {corpus: statistics.median(c.rates[corpus]) for corpus in c.rates},
             "rounds": c.rates, **c.quality}
            for c in contenders
        ]
        return {"entries": entries, "others_cores": max(c.others for c in contenders)}
    finally:
        for contender in contenders:
            contender.end()


def repository(dtype):
    """A repository whose models compute in one number format."""
    folder = WORK / f"andon-{dtype}"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(MODELS / "minilm" / "1", folder / "minilm" / "1")
    (folder / "minilm" / "andon.toml").write_text(f'dtype = "{dtype}"\n')
    return folder


def andon_target(processes, title, models, load):
    """`andon serve` on free ports, and the load on it."""
    serve, admin, web = free_port(), free_port(), free_port()
    processes.start(title, [
        ANDON, "serve", "--repository", models,
        "--grpc-addr", f"127.0.0.1:{serve}", "--admin-addr", f"127.0.0.1:{admin}",
        "--http-addr", f"127.0.0.1:{web}",
    ])
    wait_for_http(processes, title, f"http://127.0.0.1:{admin}/readyz")
    return Target(title, title, andon_level(serve, load))


def fastapi_target(processes, title, arguments, path, bodies):
    """One of the servers of benches/peers/server.py, and the load on it."""
    port = free_port()
    processes.start(title, [PYTHON, PEERS / "server.py", *arguments, "--port", port])
    wait_for_http(processes, title, f"http://127.0.0.1:{port}/health")
    return Target(title, title, wrk_level(f"http://127.0.0.1:{port}{path}", bodies))


def served_scenario(options, folder):
    with Processes(folder) as processes:
        bodies, targets = sentence_bodies(processes.folder), []
        for library, dtype, style, streams in SERVERS:
            if dtype in options.formats:
                arguments = [library, "--dtype", dtype, "--style", style, "--streams", streams]
                title = f"{TITLES[library]} {dtype}, {STYLES[style, streams]}"
                targets.append(fastapi_target(processes, title, arguments, "/embed", bodies))
        for dtype in [] if options.without_andon else options.formats:
            load = ["--texts", SENTENCES]
            targets.append(andon_target(processes, f"Andon {dtype}", repository(dtype), load))
        return levels(processes, targets, "minilm", options)


def digits_scenario(options, folder):
    with Processes(folder) as processes:
        bodies = processes.folder / "digits.jsonl"
        pixels = [[(row * 7 + index * 5) % 17 for index in range(64)] for row in range(100)]
        bodies.write_text("".join(json.dumps({"pixels": row}) + "\n" for row in pixels))
        title = "FastAPI and scikit-learn"
        targets = [fastapi_target(processes, title, ["scikit-learn"], "/predict", bodies)]
        if not options.without_andon:
            targets.append(andon_target(processes, "Andon", MODELS, []))
        return levels(processes, targets, "digits", options)


def levels(processes, targets, model, options):
    """The entries of a served scenario."""
    cases = [(model, concurrency) for concurrency in page_peers.CONCURRENCY]
    samples = measure(processes, targets, cases, options)
    found = medians(samples)
    return {"entries": [
        {"title": name, "andon": name.startswith("Andon"), "dtype": dtype_of(name),
         "concurrency": concurrency, "median": found[(name, case, concurrency)], "rounds": rounds}
        for (name, case, concurrency), rounds in samples.items()
    ]}


def dtype_of(title):
    """The number format in a title; none for the digits."""
    return next((dtype for dtype in FORMATS if dtype in title), None)


SCENARIOS = {"library": library_scenario, "served": served_scenario, "digits": digits_scenario}


def report(name, found, options):
    """Leaves the report of a scenario and writes the page."""
    peers = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in PACKAGES[name])
    command = "make bench-peers"
    if (options.rounds, options.seconds) != (3, 5):
        command = f"benches/run_peers.py --rounds {options.rounds} --seconds {options.seconds}"
    facts = {"machine": machine(), "peers": peers, "command": command,
             "rounds": options.rounds, "seconds": options.seconds}
    page_peers.REPORTS.mkdir(parents=True, exist_ok=True)
    path = page_peers.REPORTS / f"peers-{name}.json"
    path.write_text(json.dumps({**facts, **found}, indent=2) + "\n")
    if not options.no_page:
        page_peers.write()
    print(f"wrote {path.relative_to(ROOT)}" + ("" if options.no_page else f" and {PAGE.name}"))


def need(options, scenarios):
    """Names everything that is missing before anything starts."""
    missing = []
    if not shutil.which("wrk") and set(scenarios) - {"library"}:
        missing.append("wrk (benches/setup.sh)")
    modules = "fastapi, onnx, onnxruntime, openvino, orjson, sentence_transformers, sklearn, uvicorn"
    if subprocess.run([PYTHON, "-c", f"import {modules}"], capture_output=True).returncode:
        missing.append("packages of benches/peers/requirements.txt (benches/setup.sh)")
    if not (MODELS / "minilm" / "1" / "config.json").exists():
        missing.append("models/minilm (make models)")
    if not options.without_andon:
        commands = [ANDON] if set(scenarios) - {"library"} else []
        if "library" in scenarios:
            commands.append(ROOT / shlex.split(options.andon)[0])
        missing += [f"{os.path.relpath(path, ROOT)} (make bench-peers builds it)"
                    for path in commands if not path.exists()]
    if missing:
        raise Failure("missing: " + "; ".join(missing))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=SCENARIOS, help="one scenario")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=5, help="length of one measurement")
    parser.add_argument("--warm-seconds", type=int, default=2, help="load before each served one")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS,
                        help="number formats: of the libraries and of Andon")
    parser.add_argument("--andon", default=LIBRARY_COMMAND,
                        help="Andon's process of the library scenario; {dtype} is replaced")
    parser.add_argument("--without-andon", action="store_true", help="the peers alone")
    parser.add_argument("--no-page", action="store_true", help="leave docs/ as it is")
    options = parser.parse_args()
    scenarios = [options.only] if options.only else list(SCENARIOS)
    try:
        need(options, scenarios)
        run([PYTHON, PEERS / "prepare.py"], seconds_max=600)
        for name in scenarios:
            with tempfile.TemporaryDirectory(prefix="andon-bench-") as folder:
                report(name, SCENARIOS[name](options, folder), options)
    except Failure as failure:
        print(f"benchmark failed: {failure}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
