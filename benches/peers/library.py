"""A contender of the library level: one process for one library and one dtype.

    target/venv/bin/python benches/peers/library.py openvino bf16

It first tries batch sizes, with all cores on one batch and with one core on each of
several, and keeps the fastest for each corpus. Then it prints a line of JSON that
begins with "ready", and answers each line of its input with one line:

    {"corpus": "short", "seconds": 2}      how fast it is
    {"texts_per_second": 412.0, "texts": 900, "seconds": 2.18}
    {"corpus": "short", "vectors": "FILE"} its vectors, raw little-endian floats in the
    {"texts": 300, "width": 384}           order of the corpus, written to FILE

Both cores compute; tokens are made before the clock starts. A measurement is whole
passes over the corpus, at least one, until the seconds are over: batches of short
texts and of longer ones are then counted alike. It ends with its input.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy

from contenders import DTYPES, batch, cores, embedder
from prepare import CORPORA, tokenizer

ROWS = {"short": [4, 8, 16, 32, 64], "long": [1, 2, 4, 8, 16]}


class Way:
    """A corpus in batches of so many rows, computed by so many threads."""

    def __init__(self, embed, streams, rows, tokens):
        self.embed = embed
        self.streams = streams
        self.rows = rows
        # Texts of like length are neighbours, so that little is padded; the longest
        # go first, so that the threads end together.
        self.order = sorted(range(len(tokens)), key=lambda index: -len(tokens[index]))
        groups = [self.order[at : at + rows] for at in range(0, len(self.order), rows)]
        self.batches = [batch([tokens[index] for index in group]) for group in groups]
        self.pool = ThreadPoolExecutor(streams) if streams > 1 else None

    def run(self):
        """One pass: the vectors, batch by batch."""
        if self.pool:
            return list(self.pool.map(lambda pair: self.embed(*pair), self.batches))
        return [self.embed(*pair) for pair in self.batches]

    def measure(self, seconds):
        begun, texts = time.perf_counter(), 0
        while True:
            self.run()
            texts += len(self.order)
            passed = time.perf_counter() - begun
            if passed >= seconds:
                return {"texts_per_second": texts / passed, "texts": texts, "seconds": passed}

    def vectors(self):
        """The vectors in the order of the corpus."""
        found = numpy.concatenate([vectors.copy() for vectors in self.run()])
        ordered = numpy.empty_like(found)
        ordered[self.order] = found
        return ordered


def calibrate(library, dtype, corpora, seconds):
    """The fastest way for each corpus, after one pass of each that does not count."""
    best = {}
    for streams in sorted({1, cores()}):
        embed = embedder(library, dtype, streams)
        for name, tokens in corpora.items():
            for rows in ROWS[name]:
                way = Way(embed, streams, rows, tokens)
                way.run()
                rate = way.measure(seconds)["texts_per_second"]
                print(f"{library} {dtype} {name}: {rate:.1f} texts/s, {rows} rows a batch,"
                      f" {streams} at once", file=sys.stderr, flush=True)
                if name not in best or rate > best[name][0]:
                    best[name] = (rate, way)
    return {name: way for name, (_, way) in best.items()}


def answer(ways, request):
    way = ways[request["corpus"]]
    if "vectors" in request:
        vectors = way.vectors()
        vectors.astype("<f4").tofile(request["vectors"])
        return {"texts": len(vectors), "width": vectors.shape[1]}
    return way.measure(float(request["seconds"]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", choices=DTYPES)
    parser.add_argument("dtype", choices=["f32", "bf16", "int8"])
    parser.add_argument("--calibration-seconds", type=float, default=0.5)
    options = parser.parse_args()
    # The protocol has the output for itself, whatever a library prints.
    protocol = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    tokens = tokenizer()
    corpora = {
        name: [encoding.ids for encoding in tokens.encode_batch(path.read_text().splitlines())]
        for name, path in CORPORA.items()
    }
    ways = calibrate(options.library, options.dtype, corpora, options.calibration_seconds)
    settings = {name: f"{way.rows} rows, {way.streams} at once" for name, way in ways.items()}
    print(json.dumps({"ready": True, "settings": settings}), file=protocol)
    with contextlib.suppress(BrokenPipeError):
        for line in sys.stdin:
            print(json.dumps(answer(ways, json.loads(line))), file=protocol)


if __name__ == "__main__":
    main()
