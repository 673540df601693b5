"""The page docs/benchmarks.md: tables from measured medians, and the facts about
the machine that stand above them."""

import os
import platform
import re
import subprocess
from pathlib import Path

from processes import ROOT, Failure, run

PAGE = ROOT / "docs" / "benchmarks.md"
PYTHON = ROOT / "target" / "venv" / "bin" / "python"
PAYLOADS_BYTES = [1024, 614_400]
GATEWAY_CONCURRENCY = [1, 32]
MINILM_CONCURRENCY = [1, 8, 64]

INTRODUCTION = """# Benchmarks

What `make bench` measured: medians of the rounds on the machine named in each
section. The tables between the markers are written by `benches/run.py`; the
text around them is kept.
"""


def table(head, rows):
    """A Markdown table: the first column to the left, numbers to the right."""
    lines = ["| " + " | ".join(head) + " |"]
    lines.append("|---|" + "---:|" * (len(head) - 1))
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def micros(value):
    """Microseconds; milliseconds from ten of them on."""
    return f"{value / 1000:,.1f} ms" if abs(value) >= 10_000 else f"{value:,.0f} µs"


def rate(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def ratio(value, base):
    return f"{value / base:.2f}" if base else "—"


def gateway_tables(found):
    """One table for each message size and number in flight."""
    titles = {"direct": "direct", "andon": "Andon", "nginx": "nginx", "haproxy": "HAProxy"}
    parts = []
    for payload in PAYLOADS_BYTES:
        for concurrency in GATEWAY_CONCURRENCY:
            entries = {name: found[(name, payload, concurrency)] for name in titles}
            direct, haproxy = entries["direct"], entries["haproxy"]
            rows = []
            for name, title in titles.items():
                entry = entries[name]
                per_second = entry["requests_per_second"]
                rows.append([
                    title,
                    rate(per_second),
                    ratio(per_second, direct["requests_per_second"]),
                    ratio(per_second, haproxy["requests_per_second"]),
                    micros(entry["p50_us"]),
                    "" if name == "direct" else micros(entry["p50_us"] - direct["p50_us"]),
                    micros(entry["p99_us"]),
                    "" if name == "direct" else micros(entry["p99_us"] - direct["p99_us"]),
                    micros(entry["cpu_us"]),
                ])
            head = ["path", "requests/s", "of direct", "of HAProxy", "p50", "added p50",
                    "p99", "added p99", "processor per request"]
            parts.append(f"### {payload // 1024} KB, {concurrency} in flight\n")
            parts.append(table(head, rows) + "\n")
    parts.append(
        "\"Processor per request\" is the time that the proxy (for direct: the worker) spent\n"
        "on the processor. Worker, proxy and load share the machine."
    )
    return "\n".join(parts)


def gateway_aims(found):
    """Whether Andon is no slower than HAProxy, case by case."""
    lines = []
    for payload in PAYLOADS_BYTES:
        for concurrency in GATEWAY_CONCURRENCY:
            andon = found[("andon", payload, concurrency)]
            haproxy = found[("haproxy", payload, concurrency)]
            factors = {
                "p50": andon["p50_us"] / haproxy["p50_us"],
                "p99": andon["p99_us"] / haproxy["p99_us"],
                "throughput": haproxy["requests_per_second"] / andon["requests_per_second"],
            }
            missed = [f"{name} by {(f - 1) * 100:.0f} %" for name, f in factors.items() if f > 1]
            verdict = "missed: " + ", ".join(missed) if missed else "reached"
            lines.append(f"- {payload // 1024} KB, {concurrency} in flight: {verdict}")
    return "Aim: no slower than HAProxy at p50, p99 and throughput.\n\n" + "\n".join(lines)


def minilm_table(found):
    """Sentences per second and percentiles, and the ratios of one run."""
    rows = []
    for concurrency in MINILM_CONCURRENCY:
        andon = found[("andon", "minilm", concurrency)]
        peer = found[("fastapi", "minilm", concurrency)]
        for title, entry in (("Andon", andon), ("FastAPI", peer)):
            rows.append([
                f"{title}, {concurrency} in flight",
                rate(entry["requests_per_second"]),
                micros(entry["p50_us"]),
                micros(entry["p99_us"]),
                micros(entry["cpu_us"]),
                ratio(entry["requests_per_second"], peer["requests_per_second"]),
                ratio(entry["p99_us"], peer["p99_us"]),
            ])
    head = ["server", "sentences/s", "p50", "p99", "processor per sentence",
            "sentences/s of FastAPI's", "p99 of FastAPI's"]
    return table(head, rows)


def machine():
    """The machine and the peers' versions in one sentence each."""
    cpu = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    kernel = platform.release().split("-")[0]
    return f"{os.cpu_count()} cores, {cpu}, {memory:.0f} GiB, Linux {kernel}"


def versions(scenario):
    """The versions of the peers of a scenario."""
    if scenario == "gateway":
        nginx = subprocess.run(["nginx", "-v"], capture_output=True, text=True).stderr
        haproxy = subprocess.run(["haproxy", "-v"], capture_output=True, text=True).stdout
        return (
            f"nginx {re.search(r'nginx/([0-9.]+)', nginx).group(1)}, "
            f"HAProxy {re.search(r'version ([0-9.]+)', haproxy).group(1)}"
        )
    names = ["fastapi", "uvicorn", "sentence-transformers", "torch"]
    code = (
        "import importlib.metadata as m, sys; "
        "print(', '.join(f'{n} {m.version(n)}' for n in sys.argv[1:]))"
    )
    return run([PYTHON, "-c", code, *names], 60).strip()


def write_section(name, title, body):
    """Replaces what stands between a section's markers in the page."""
    begin, end = f"<!-- measured: {name} -->", f"<!-- end of measured: {name} -->"
    page = PAGE.read_text() if PAGE.exists() else INTRODUCTION
    if begin not in page:
        page = page.rstrip("\n") + f"\n\n## {title}\n\n{begin}\n{end}\n"
    before, rest = page.split(begin, 1)
    if end not in rest:
        raise Failure(f"{PAGE.name}: the marker {end!r} is missing")
    after = rest.split(end, 1)[1]
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(f"{before}{begin}\n{body}\n{end}{after}")
