"""The servers that a team writes first: FastAPI around a library, in one process of
uvicorn. The benchmark's peers over HTTP.

    target/venv/bin/python benches/peers/server.py openvino --dtype bf16 --port 8080

POST /embed {"text": "a text"} answers {"embedding": [...]}. The server `scikit-learn`
holds the network of models/digits: POST /predict {"pixels": [64 numbers]} answers
{"probabilities": [...], "label": "7"}. GET /health answers when the model is loaded.

--style says how calls reach the model:
threads   a plain function, which FastAPI runs in its pool of 40 threads; how many
          threads compute is left to the library
executor  a coroutine and an executor with --streams threads, which share the cores
batch     a coroutine; what waits is computed together, 32 texts at most
"""

import argparse
import asyncio
import json
from concurrent.futures import ThreadPoolExecutor

import numpy
import orjson
import uvicorn
from fastapi import FastAPI, Response
from pydantic import BaseModel

BATCH_TEXTS_MAX = 32
STYLES = ["threads", "executor", "batch"]


class EmbedRequest(BaseModel):
    text: str


class PredictRequest(BaseModel):
    pixels: list[float]


def as_json(content):
    """NumPy's arrays as JSON, without the way over Python's lists."""
    text = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(text, media_type="application/json")


def text_embedder(library, dtype, streams):
    """A function of texts, that so many threads may call."""
    from contenders import batch, embedder, sentence_transformer

    if library == "sentence-transformers":
        model = sentence_transformer(dtype)
        return lambda texts: model.encode(
            texts, normalize_embeddings=True, show_progress_bar=False
        ).astype(numpy.float32)

    from prepare import tokenizer

    tokens, embed = tokenizer(), embedder(library, dtype, streams)

    def embed_texts(texts):
        return embed(*batch([encoding.ids for encoding in tokens.encode_batch(texts)]))

    return embed_texts


class Batcher:
    """Collects the texts that come while a batch is computed."""

    def __init__(self, embed):
        self.embed = embed
        self.executor = ThreadPoolExecutor(1)
        self.waiting = asyncio.Queue()

    async def run(self):
        while True:
            entries = [await self.waiting.get()]
            while len(entries) < BATCH_TEXTS_MAX and not self.waiting.empty():
                entries.append(self.waiting.get_nowait())
            texts, answers = zip(*entries)
            loop = asyncio.get_running_loop()
            try:
                vectors = await loop.run_in_executor(self.executor, self.embed, list(texts))
                for answer, vector in zip(answers, vectors):
                    if not answer.done():
                        answer.set_result(vector)
            except Exception as error:
                for answer in answers:
                    if not answer.done():
                        answer.set_exception(error)

    async def __call__(self, text):
        answer = asyncio.get_running_loop().create_future()
        self.waiting.put_nowait((text, answer))
        return await answer


def add_threads(app, embed):
    @app.post("/embed")
    def answer(request: EmbedRequest):
        return as_json({"embedding": embed([request.text])[0]})


def add_executor(app, embed, streams):
    executor = ThreadPoolExecutor(streams)

    @app.post("/embed")
    async def answer(request: EmbedRequest):
        loop = asyncio.get_running_loop()
        vectors = await loop.run_in_executor(executor, embed, [request.text])
        return as_json({"embedding": vectors[0]})


def add_batch(app, embed):
    batcher, tasks = Batcher(embed), []

    @app.post("/embed")
    async def answer(request: EmbedRequest):
        if not tasks:
            tasks.append(asyncio.create_task(batcher.run()))
        return as_json({"embedding": await batcher(request.text)})


def add_digits(app):
    """The committed weights in scikit-learn's classifier of the same shape."""
    from safetensors.numpy import load_file
    from sklearn.neural_network import MLPClassifier

    from prepare import ROOT

    folder = ROOT / "models" / "digits" / "1"
    config = json.loads((folder / "config.json").read_text())
    model = MLPClassifier(config["hidden"], activation=config["activation"], max_iter=1)
    labels, width = config["labels"], config["input"]["width"]
    # Fitting makes its parts; the weights are then those of the model that is served.
    rows = numpy.zeros((len(labels), width), numpy.float32)
    model.fit(rows, labels)
    weights = load_file(folder / "model.safetensors")
    layers = range(len(weights) // 2)
    model.coefs_ = [numpy.ascontiguousarray(weights[f"layers.{n}.weight"].T) for n in layers]
    model.intercepts_ = [weights[f"layers.{n}.bias"] for n in layers]

    # It takes less time than the way to another thread would.
    @app.post("/predict")
    async def answer(request: PredictRequest):
        row = numpy.array(request.pixels, numpy.float32).reshape(1, -1)
        probabilities = model.predict_proba(row)[0]
        label = model.classes_[probabilities.argmax()]
        return as_json({"probabilities": probabilities, "label": label})


def build(options):
    app = FastAPI()
    if options.library == "scikit-learn":
        add_digits(app)
    elif options.style == "threads":
        add_threads(app, text_embedder(options.library, options.dtype, options.streams))
    elif options.style == "executor":
        embed = text_embedder(options.library, options.dtype, options.streams)
        add_executor(app, embed, options.streams)
    else:
        add_batch(app, text_embedder(options.library, options.dtype, 1))

    @app.get("/health")
    async def health():
        return {"ready": True}

    return app


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    libraries = ["sentence-transformers", "onnxruntime", "openvino", "scikit-learn"]
    parser.add_argument("library", choices=libraries)
    parser.add_argument("--dtype", choices=["f32", "bf16", "int8"], default="f32")
    parser.add_argument("--style", choices=STYLES, default="threads")
    parser.add_argument("--streams", type=int, default=1, help="computations at once")
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    uvicorn.run(build(options), host="127.0.0.1", port=options.port, access_log=False)


if __name__ == "__main__":
    main()
