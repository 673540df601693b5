"""The section of docs/benchmarks.md about the API front."""

from page import micros, rate, ratio, table

LAYERS = {
    "bare": "bare gateway",
    "guarded": "+ key, quotas",
    "miss": "+ key, quotas, cache misses",
    "hit": "+ key, quotas, cache hits",
}
DOORS = {"grpc": "gRPC", "binary": "HTTP, binary tensors", "json": "HTTP, JSON"}
# One call at a time; all are cache misses.
TURNS = {
    "bare": "bare gateway",
    "again": "another bare gateway",
    "guarded": "+ key, quotas",
    "whole": "+ key, quotas, cache misses",
}
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
    head = ["path", "requests/s", "of bare", "p50", "added p50", "p99", "processor per request"]
    spent = {name: found[(name, "digits", 32)]["cpu_us"] for name in LAYERS}
    return table(head, rows) + (
        "\n\nOf the gateway's processor time at 32 in flight identity and quotas take "
        f"{spent['guarded'] - spent['bare']:.0f} µs, a lookup that misses and caches the response "
        f"{spent['miss'] - spent['guarded']:.0f} µs more, and a cache hit "
        f"{spent['bare'] - spent['hit']:.0f} µs less than a bare gateway takes to call a worker."
    )


def turns_table(turns, found):
    """What each layer adds to a call where calls of one round meet the same noise."""
    rows = [
        [TURNS[turn["name"]], micros(turn["p50_us"]),
         "" if turn["name"] == "bare" else
         f"{turn['added_us']:+.1f} µs ({turn['low_us']:+.1f} to {turn['high_us']:+.1f})"]
        for turn in turns
    ]
    added = {turn["name"]: turn for turn in turns}["whole"]
    verdict = "reached" if added["high_us"] < AIM_US else (
        "missed" if added["low_us"] > AIM_US else "not shown")
    return table(["path", "p50", "added, median of the rounds (95 %)"], rows) + (
        f"\n\nAim: identity, quotas and a cache lookup add less than {AIM_US} µs at p50 with "
        f"one request in flight: {verdict}. It includes caching the response, and processor "
        "caches that other processes used meanwhile; under load of its own, in the table above, it "
        f"adds {found[('miss', 'digits', 1)]['p50_us'] - found[('bare', 'digits', 1)]['p50_us']:+.0f} µs."
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


def front_section(layers, turns, doors, computed):
    """The whole section."""
    return "\n\n".join([
        "### Identity, quotas and the cache\n\ndigits, one row per request, every request distinct "
        "but for the cache hits. The gateway's processor time.",
        layers_table(layers),
        "The same gateways in turn, one call at a time, so that the calls of a round meet the same "
        "noise; what the second bare one adds is what the machine leaves to chance.",
        turns_table(turns, layers),
        "### One embedding at each door\n\nminilm, a sentence per request; HTTP is "
        "`/v1/embeddings` with base64. gRPC's load comes from `andon bench`, HTTP's from wrk.",
        doors_table(doors, "minilm", (1, 32)),
        "### A tensor of 600 KB at each door\n\nThe echo worker, there and back.",
        doors_table(doors, "echo", (1, 8)),
        "### Identical requests at once\n\n1,000 requests for the same text at once, without a "
        "cache, so that one that comes after the response is computed again; computed, in each round: " + ", ".join(str(count) for count in computed) + ".",
    ])
