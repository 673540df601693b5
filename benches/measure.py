"""One measured level of load, and rounds of them over several servers in turn."""

import json
import re
import statistics
import time
import urllib.error
import urllib.request

from processes import ROOT, Failure, run

BENCHES = ROOT / "benches"
ANDON = ROOT / "target" / "release" / "andon"
SENTENCES = BENCHES / "sentences.txt"

METRICS = ["requests_per_second", "p50_us", "p90_us", "p99_us", "cpu_us"]
START_SECONDS_MAX = 120


def andon_level(port, load):
    """The function that runs one level of `andon bench` with these arguments."""

    def level(model, concurrency, seconds):
        extent = ["--duration", f"{seconds}s"] if seconds else ["--requests", 1]
        command = [ANDON, "bench", model, "--address", f"127.0.0.1:{port}"]
        command += ["--concurrency", concurrency, *load, *extent, "--output", "json"]
        levels = json.loads(run(command, seconds_max=300))["levels"]
        if len(levels) != 1:
            raise Failure(f"`andon bench` reported {len(levels)} levels, expected one")
        return levels[0]

    return level


def wrk_level(url, bodies, head_bytes=None):
    """The function that runs one level of wrk, in the shape of `andon bench`; the
    requests are the lines of the file `bodies`, or all of it with binary tensors
    after a head of so many bytes."""
    head = [head_bytes] if head_bytes else []

    def level(_, concurrency, seconds):
        seconds = seconds or 1
        output = run(
            ["wrk", "--threads", 1, "--connections", concurrency, "--duration", f"{seconds}s",
             "--timeout", "60s", "--script", BENCHES / "post.lua", url, "--", bodies, *head],
            seconds_max=seconds + 120,
        )
        found = re.search(r"^REPORT (.*)$", output, re.MULTILINE)
        if not found:
            raise Failure(f"wrk printed no report:\n{output[-1500:]}")
        return json.loads(found.group(1))

    return level


def sentence_bodies(folder):
    """A file with the benchmark's sentences as requests of the HTTP peers."""
    path = folder / "sentences.jsonl"
    lines = [line for line in SENTENCES.read_text().splitlines() if line]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


class Target:
    """Something to measure: a name, the process that is the peer, a load."""

    def __init__(self, name, process, level):
        self.name = name
        self.process = process
        # level(case, concurrency, seconds) runs the load and returns a report.
        self.level = level


def wait_until_ready(processes, target, case):
    """Sends single requests until one succeeds."""
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
            raise Failure(f"{target.name} does not respond: {problem}")
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
        raise Failure(f"{target.name} had no response within {options.seconds} s")
    if report["p50_us"] <= 0:
        raise Failure(f"{target.name}: a median latency of {report['p50_us']} us was reported")
    report["cpu_us"] = spent / (rate * options.seconds) * 1e6
    return report


def measure(processes, targets, cases, options):
    """{(target, case, concurrency): {metric: [one value per round]}}."""
    for target in targets:
        wait_until_ready(processes, target, cases[0][0])
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
                    f"round {number + 1}  {target.name:24} {case!s:>7} x{concurrency:<3}"
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
                raise Failure(f"{name} does not respond {url}") from None
        time.sleep(0.3)
