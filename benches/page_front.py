"""The section of docs/benchmarks.md about the API front."""

from page import micros, rate, ratio, table

LAYERS = {
    "bare": "bare gateway",
    "guarded": "+ key, quotas",
    "miss": "+ key, quotas, cache: nothing known",
    "hit": "+ key, quotas, cache: all known",
}
DOORS = {"grpc": "gRPC", "binary": "HTTP, binary tensors", "json": "HTTP, JSON"}
AIM_US = 20


def layers_table(found):
    """What each layer adds, and whether the aim is reached."""
    rows = []
    for concurrency in (1, 32):
        bare = found[("bare", "digits", concurrency)]
        for name, title in LAYERS.items():
            entry = found[(name, "digits", concurrency)]
            rows.append([
                f"{title}, {concurrency} in flight",
                rate(entry["requests_per_second"]),
                ratio(entry["requests_per_second"], bare["requests_per_second"]),
                micros(entry["p50_us"]),
                "" if name == "bare" else micros(entry["p50_us"] - bare["p50_us"]),
                micros(entry["p99_us"]),
                micros(entry["cpu_us"]),
            ])
    head = ["way", "requests/s", "of bare", "p50", "added p50", "p99", "processor per request"]
    added = {name: found[(name, "digits", 1)]["p50_us"] - found[("bare", "digits", 1)]["p50_us"]
             for name in ("guarded", "miss")}
    spent = {name: found[(name, "digits", 32)]["cpu_us"] for name in LAYERS}
    return table(head, rows) + (
        f"\n\nAim: identity, quotas and a look into the cache add less than {AIM_US} µs at p50 with "
        f"one request in flight. Measured: {added['guarded']:+.0f} µs for the first two, "
        f"{added['miss']:+.0f} µs with a look that finds nothing; compare the rounds of one gateway. "
        "Its processor time at 32 in flight is steadier: identity and quotas take "
        f"{spent['guarded'] - spent['bare']:.0f} µs, a look that finds nothing and keeps the answer "
        f"{spent['miss'] - spent['guarded']:.0f} µs more, and an answer that is known "
        f"{spent['bare'] - spent['hit']:.0f} µs less than a bare gateway takes to ask a worker."
    )


def doors_table(found, case, levels):
    """The doors of one case beside each other."""
    rows = []
    for concurrency in levels:
        grpc = found[("grpc", case, concurrency)]
        for name, title in DOORS.items():
            entry = found.get((name, case, concurrency))
            if entry is None:
                continue
            rows.append([
                f"{title}, {concurrency} in flight",
                rate(entry["requests_per_second"]),
                ratio(entry["requests_per_second"], grpc["requests_per_second"]),
                micros(entry["p50_us"]),
                micros(entry["p99_us"]),
                micros(entry["cpu_us"]),
            ])
    head = ["door", "requests/s", "of gRPC's", "p50", "p99", "processor per request"]
    return table(head, rows)


def front_section(layers, doors, computed):
    """The whole section."""
    return "\n\n".join([
        "### Identity, quotas and the cache\n\ndigits, one row per request, each request another "
        "where nothing is to be known. The gateway's processor time.",
        layers_table(layers),
        "### One embedding at each door\n\nminilm, a sentence per request; HTTP is "
        "`/v1/embeddings` with base64. gRPC's load comes from `andon bench`, HTTP's from wrk.",
        doors_table(doors, "minilm", (1, 32)),
        "### A tensor of 600 KB at each door\n\nThe echo worker, there and back.",
        doors_table(doors, "echo", (1, 8)),
        "### Identical requests at once\n\n1,000 requests for the same text at once, without a "
        "cache, so that one that comes after the answer is computed again; computed, in each round: " + ", ".join(str(count) for count in computed) + ".",
    ])
