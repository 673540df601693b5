"""The scenarios of the API front: what identity, quotas and the cache cost, the
doors beside each other, and what identical requests at once cost."""

import json
import shutil
import struct
import subprocess
import urllib.request

from measure import ANDON, SENTENCES, Target, andon_level, measure, wait_for_http, wrk_level
from processes import ROOT, Failure, Processes, free_port, run

MODELS = ROOT / "models"
ECHO_WORKER = ROOT / "target" / "release" / "echo-worker"
IN_TURN = ROOT / "target" / "release" / "in-turn"
# More requests than a level sends, so that all are misses.
DISTINCT_MANY = 400_000
# Some requests again and again, so that all are hits.
DISTINCT_FEW = 100
IDENTICAL = 1000
TENSOR_ELEMENTS = 153_600  # 600 KB of FP32

POLICY = """
[tenants.bench]
models = ["*"]

[tenants.bench.quota]
requests_per_second = 1000000
items_per_minute = 1000000000
tokens_per_day = 1000000000000
in_flight = 10000
"""


def loopback(port):
    return f"127.0.0.1:{port}"


def deterministic(folder):
    """A repository whose models declare their responses cacheable."""
    repository = folder / "deterministic"
    for name in ("digits", "minilm"):
        (repository / name).mkdir(parents=True)
        shutil.copytree(MODELS / name / "1", repository / name / "1")
        (repository / name / "andon.toml").write_text("deterministic = true\n")
    return repository


def identity(folder):
    """The flags of a gateway that authenticates and counts, and the file of a key."""
    policy, keys, key = folder / "policy.toml", folder / "keys", folder / "key"
    policy.write_text(POLICY)
    made = run([ANDON, "keys", "create", "--keys", keys, "--tenant", "bench"], 30)
    words = [word for word in made.split() if word.startswith("andon_")]
    key.touch(mode=0o600)
    key.write_text(words[0])
    return ["--policy", policy, "--keys", keys], ["--key-file", key]


def start_worker(processes, name, repository, models):
    port = free_port()
    chosen = [word for model in models for word in ("--models", model)]
    processes.start(name, [
        ANDON, "worker", "--repository", repository, *chosen,
        "--grpc-addr", loopback(port), "--admin-addr", loopback(free_port()),
    ])
    return port


def start_gateway(processes, name, worker, flags=(), program=ANDON):
    """The gRPC, HTTP and admin ports of a gateway."""
    grpc, http, admin = free_port(), free_port(), free_port()
    processes.start(name, [
        program, "gateway", "--worker", loopback(worker), "--grpc-addr", loopback(grpc),
        "--http-addr", loopback(http), "--admin-addr", loopback(admin), *flags,
    ])
    return grpc, http, admin


def start_layers(processes):
    """Gateways with more and more layers, by their gRPC ports, and the flags of the key."""
    declared = deterministic(processes.folder)
    shutil.copytree(MODELS / "digits" / "1", declared / "plain" / "1")
    worker = start_worker(processes, "worker", declared, ["digits", "plain"])
    guard, key = identity(processes.folder)
    gateways = {
        "bare": [],
        "again": [],
        "guarded": guard,
        "whole": guard,
        # Its rows of the round before have expired.
        "forgets": [*guard, "--cache-ttl", "100ms"],
    }
    started = {name: start_gateway(processes, name, worker, flags)
               for name, flags in gateways.items()}
    return {name: grpc for name, (grpc, _, _) in started.items()}, key


def layers_scenario(options, folder):
    """Samples of digits through gateways with more and more layers, and what each adds to a call."""
    with Processes(folder) as processes:
        ports, key = start_layers(processes)
        many, few = ["--distinct", DISTINCT_MANY], ["--distinct", DISTINCT_FEW]
        # All over one worker; the responses of `plain` may not be cached.
        models = {"bare": "plain", "again": "plain", "guarded": "plain", "whole": "digits"}

        def level(gateway, load):
            run_level = andon_level(ports[gateway], load)
            model = models.get(gateway, "digits")
            return lambda _, concurrency, seconds: run_level(model, concurrency, seconds)

        targets = [
            Target("bare", "bare", level("bare", many)),
            Target("guarded", "guarded", level("guarded", [*many, *key])),
            Target("miss", "forgets", level("forgets", [*many, *key])),
            Target("hit", "whole", level("whole", [*few, *key])),
        ]
        samples = measure(processes, targets, [("digits", 1), ("digits", 32)], options)
        named = [word for name, model in models.items()
                 for word in ("--target", f"{name}={loopback(ports[name])}/{model}")]
        keyed = ["--keyed", "guarded", "--keyed", "whole"]
        found = run([IN_TURN, *named, *keyed, *key, "--rounds", options.pairs], 900)
        return samples, json.loads(found)


def embeddings_bodies(folder):
    """The benchmark's sentences as requests of /v1/embeddings."""
    path = folder / "embeddings.jsonl"
    lines = [line for line in SENTENCES.read_text().splitlines() if line]
    bodies = ({"model": "minilm", "input": line, "encoding_format": "base64"} for line in lines)
    path.write_text("".join(json.dumps(body) + "\n" for body in bodies))
    return path


def tensor_json(folder):
    """One request of 600 KB of FP32 in JSON, on a line."""
    path = folder / "tensor.jsonl"
    values = [(element % 17) / 17 for element in range(TENSOR_ELEMENTS)]
    values = [struct.unpack("<f", struct.pack("<f", value))[0] for value in values]
    values = [float(f"{value:.7g}") for value in values]
    body = {"inputs": [{"name": "input", "datatype": "FP32", "shape": [TENSOR_ELEMENTS],
                        "data": values}]}
    path.write_text(json.dumps(body) + "\n")
    return path


def tensor_binary(folder):
    """The same in the binary extension: its head, and head and tensor in one file."""
    head = json.dumps({
        "inputs": [{"name": "input", "datatype": "FP32", "shape": [TENSOR_ELEMENTS],
                    "parameters": {"binary_data_size": 4 * TENSOR_ELEMENTS}}],
        "parameters": {"binary_data_output": True},
    }).encode()
    values = ((element % 17) / 17 for element in range(TENSOR_ELEMENTS))
    path = folder / "tensor.bin"
    path.write_bytes(head + struct.pack(f"<{TENSOR_ELEMENTS}f", *values))
    return path, len(head)


def doors_scenario(options, folder):
    """Samples of one embedding and of a tensor of 600 KB at each door."""
    samples = {}
    with Processes(folder) as processes:
        worker = start_worker(processes, "worker", MODELS, ["minilm"])
        grpc, http, _ = start_gateway(processes, "andon", worker)
        wait_for_http(processes, "andon", f"http://{loopback(http)}/v2/models/minilm/ready")
        url = f"http://{loopback(http)}/v1/embeddings"
        targets = [
            Target("grpc", "andon", andon_level(grpc, ["--texts", SENTENCES])),
            Target("json", "andon", wrk_level(url, embeddings_bodies(processes.folder))),
        ]
        samples |= measure(processes, targets, [("minilm", 1), ("minilm", 32)], options)
    with Processes(folder) as processes:
        worker = free_port()
        processes.start("worker", [ECHO_WORKER, "--grpc-addr", loopback(worker)])
        grpc, http, _ = start_gateway(processes, "andon", worker)
        wait_for_http(processes, "andon", f"http://{loopback(http)}/v2/models/echo/ready")
        url = f"http://{loopback(http)}/v2/models/echo/infer"
        blob, head = tensor_binary(processes.folder)
        targets = [
            Target("grpc", "andon", andon_level(grpc, ["--payload-bytes", 4 * TENSOR_ELEMENTS])),
            Target("binary", "andon", wrk_level(url, blob, head)),
            Target("json", "andon", wrk_level(url, tensor_json(processes.folder))),
        ]
        samples |= measure(processes, targets, [("echo", 1), ("echo", 8)], options)
    return samples


def metric(admin, name):
    """The sum of a metric's lines."""
    with urllib.request.urlopen(f"http://{loopback(admin)}/metrics", timeout=10) as page:
        lines = page.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def coalescing_counts(options, folder):
    """How many rows were computed for identical requests at once, in each round."""
    counts = []
    with Processes(folder) as processes:
        worker = start_worker(processes, "worker", deterministic(processes.folder), ["minilm"])
        # Without a cache, so that it is coalescing alone that is seen.
        grpc, http, admin = start_gateway(processes, "andon", worker, ["--cache-bytes", "0"])
        wait_for_http(processes, "andon", f"http://{loopback(http)}/v2/models/minilm/ready")
        for number in range(options.rounds):
            text = processes.folder / "text"
            text.write_text(f"{number} " + "a lantern around a candle " * 40 + "\n")
            before = metric(admin, 'andon_gateway_cache_rows_total{outcome="computed"}')
            report = json.loads(run([
                ANDON, "bench", "minilm", "--address", loopback(grpc), "--texts", text,
                "--concurrency", IDENTICAL, "--requests", IDENTICAL, "--warmup", "0s",
                "--output", "json",
            ], 120))["levels"][0]
            if report["errors"]:
                raise Failure(f"{report['errors']} of the identical requests failed")
            after = metric(admin, 'andon_gateway_cache_rows_total{outcome="computed"}')
            counts.append(int(after - before))
            print(f"round {number + 1}  {IDENTICAL} identical requests: {counts[-1]} computed")
    return counts


def fits():
    """What is missing, by name."""
    missing = []
    if not shutil.which("wrk"):
        missing.append("wrk (benches/setup.sh)")
    if not IN_TURN.exists():
        missing.append("target/release/in-turn (cargo build --release -p fleet-tests --bins)")
    for model in ("digits", "minilm"):
        if not (MODELS / model / "1" / "config.json").exists():
            missing.append(f"models/{model} (make models)")
    if subprocess.run([ANDON, "keys", "--help"], capture_output=True).returncode:
        missing.append("a current target/release/andon (cargo build --release)")
    return missing
