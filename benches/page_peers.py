"""The section of docs/benchmarks.md about libraries and the servers around them,
and its plot, from the reports that `run_peers.py` leaves in target/bench."""

import json
from xml.sax.saxutils import escape

from page import PAGE, ROOT, micros, rate, ratio, table, write_section

REPORTS = ROOT / "target" / "bench"
PLOT = PAGE.with_name("benchmarks_peers.svg")
SCENARIOS = ["library", "served", "digits"]
CORPORA = ["short", "long"]
CONCURRENCY = [1, 8, 64]
# What other programs may take of the machine before a reader is told.
OTHERS_CORES_MAX = 0.1

LIBRARY_TEXT = """\
Texts a second on all cores, from tokens to normalized vectors; tokens are made before
the clock starts. *Short*: 300 sentences of 29 tokens on average. *Long*: 32 texts of
256 tokens. Each peer has texts of like length together, and the fastest way that it
found before the rounds: rows of a batch, and batches computed at once with an equal
share of the cores each. The ratios are to the fastest peer of the same number format,
the cosines to the vectors of sentence-transformers in f32."""
SERVED_TEXT = """\
One sentence a request. Andon answers gRPC under `andon bench`; the peers are FastAPI in
one process of uvicorn and answer JSON under wrk, each in the styles that were fastest at
one level or another: *one at a time* and *two at once* are coroutines that call an
executor, *a thread a call* is FastAPI's pool, and *a batcher* computes together what
waits. Server and load share the machine. The ratio is to the fastest peer of the same
number format at the same number in flight."""
DIGITS_TEXT = """\
64 numbers a request: the network of `digits`, in Andon over gRPC, and with the same
weights in scikit-learn behind FastAPI over JSON."""


def head(report):
    """The facts that stand above a table."""
    text = (
        f"Machine: {report['machine']}. Peers: {report['peers']}. Command: "
        f"`{report['command']}`. Median of {report['rounds']} rounds of {report['seconds']} s."
    )
    others = report.get("others_cores", 0.0)
    if others > OTHERS_CORES_MAX:
        text += f" Other programs used up to {others:.1f} cores meanwhile."
    return text


def library_table(report):
    entries = report["entries"]
    rows = []
    for entry in entries:
        row = [entry["title"]]
        for corpus in CORPORA:
            peers = [
                other["median"][corpus] for other in entries
                if not other["andon"] and other["dtype"] == entry["dtype"]
            ]
            row.append(rate(entry["median"][corpus]))
            row.append(ratio(entry["median"][corpus], max(peers, default=0)))
        row.append("; ".join(entry["settings"].get(corpus, "") for corpus in CORPORA).strip("; "))
        for cosine in ("cosine_mean", "cosine_min"):
            row.append(f"{entry[cosine]:.5f}" if cosine in entry else "")
        rows.append(row)
    columns = ["library", "short texts/s", "of best peer", "long texts/s", "of best peer",
               "batches, short; long", "mean cosine", "least cosine"]
    return table(columns, rows)


def served_tables(report):
    """One table for each number in flight."""
    parts = []
    for concurrency in CONCURRENCY:
        entries = [e for e in report["entries"] if e["concurrency"] == concurrency]
        rows = []
        for entry in entries:
            peers = [
                other["median"]["requests_per_second"] for other in entries
                if not other["andon"] and other["dtype"] == entry["dtype"]
            ]
            median = entry["median"]
            rows.append([
                entry["title"],
                rate(median["requests_per_second"]),
                ratio(median["requests_per_second"], max(peers, default=0)),
                micros(median["p50_us"]),
                micros(median["p99_us"]),
                micros(median["cpu_us"]),
            ])
        columns = [f"{concurrency} in flight", "requests/s", "of best peer", "p50", "p99",
                   "processor per request"]
        parts.append(table(columns, rows))
    return "\n\n".join(parts)


def bars(reports):
    """The panels of the plot: a title, and (label, number, is it Andon) for each bar."""
    panels = []
    for corpus in CORPORA if "library" in reports else []:
        entries = reports["library"]["entries"]
        panels.append((
            f"Library, {corpus} texts a second",
            [(e["title"], e["median"][corpus], e["andon"]) for e in entries],
        ))
    for name, title in (("served", "Served, sentences a second, 64 in flight"),
                        ("digits", "Served, digits a second, 64 in flight")):
        if name in reports:
            entries = [e for e in reports[name]["entries"] if e["concurrency"] == CONCURRENCY[-1]]
            panels.append((title, [
                (e["title"], e["median"]["requests_per_second"], e["andon"]) for e in entries
            ]))
    return panels


def plot(panels):
    """Horizontal bars as SVG, readable on a light and on a dark page."""
    label, width, line = 270, 400, 22
    parts, y = [], 10
    for title, entries in panels:
        most = max((value for _, value, _ in entries), default=0) or 1
        y += 20
        parts.append(f'<text class="title" x="10" y="{y}">{escape(title)}</text>')
        y += 10
        for name, value, andon in entries:
            length = value / most * width
            kind = "andon" if andon else "peer"
            middle = y + line - 7
            parts.append(f'<text x="{label - 8}" y="{middle}" text-anchor="end">{escape(name)}</text>')
            parts.append(f'<rect class="{kind}" x="{label}" y="{y + 3}" width="{length:.1f}"'
                         f' height="{line - 6}" rx="2"/>')
            parts.append(f'<text x="{label + length + 6:.1f}" y="{middle}">{rate(value)}</text>')
            y += line
        y += 14
    style = (
        "text{font:13px sans-serif;fill:#24292f}.title{font-weight:bold}"
        ".andon{fill:#d9730d}.peer{fill:#9aa4b0}"
        "@media(prefers-color-scheme:dark){text{fill:#d6dde4}.peer{fill:#5d6873}}"
    )
    size = f'width="{label + width + 80}" height="{y}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {label + width + 80} {y}">'
        f"\n<style>{style}</style>\n" + "\n".join(parts) + "\n</svg>\n"
    )


def write():
    """The section and the plot, from every report that is there."""
    paths = {name: REPORTS / f"peers-{name}.json" for name in SCENARIOS}
    reports = {n: json.loads(path.read_text()) for n, path in paths.items() if path.exists()}
    parts = [f"![The tables below as bars]({PLOT.name})"]
    if "library" in reports:
        report = reports["library"]
        parts += ["### The library alone", LIBRARY_TEXT, head(report), library_table(report)]
    if "served" in reports:
        report = reports["served"]
        parts += ["### Served", SERVED_TEXT, head(report), served_tables(report)]
    if "digits" in reports:
        report = reports["digits"]
        parts += ["### Digits, served", DIGITS_TEXT, head(report), served_tables(report)]
    write_section("peers", "Beside other libraries, and servers around them", "\n\n".join(parts))
    PLOT.write_text(plot(bars(reports)))
