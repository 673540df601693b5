"""The libraries that are compared with: each loads the model and turns padded
batches of tokens into vectors of length one.

`embedder(library, dtype, streams)` is a function of (ids, mask), both [rows, tokens]
of int64, that may be called by `streams` threads at once. All of them share the
machine's cores.
"""

import os
import threading

import numpy

from prepare import MODEL, PEERS

DTYPES = {
    "sentence-transformers": ["f32", "bf16"],
    "onnxruntime": ["f32", "int8"],
    "openvino": ["f32", "bf16"],
}


def cores():
    return len(os.sched_getaffinity(0))


def sentence_transformer(dtype):
    """The model as sentence-transformers loads it."""
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    logging.disable_progress_bar()
    format = {"f32": torch.float32, "bf16": torch.bfloat16}[dtype]
    return SentenceTransformer(str(MODEL), device="cpu", model_kwargs={"dtype": format})


def sentence_transformers_embedder(dtype, streams):
    import torch

    threads = max(cores() // streams, 1)
    model = sentence_transformer(dtype)

    def embed(ids, mask):
        # The number belongs to the thread that calls.
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        with torch.inference_mode():
            inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
            return model(inputs)["sentence_embedding"].float().numpy()

    return embed


def onnxruntime_embedder(dtype, streams):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = max(cores() // streams, 1)
    options.inter_op_num_threads = 1
    path = PEERS / {"f32": "minilm.onnx", "int8": "minilm-int8.onnx"}[dtype]
    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(path, options, providers=providers)

    def embed(ids, mask):
        kinds = numpy.zeros_like(ids)
        inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": kinds}
        return session.run(None, inputs)[0]

    return embed


def openvino_embedder(dtype, streams):
    import openvino

    settings = {
        "PERFORMANCE_HINT": "LATENCY" if streams == 1 else "THROUGHPUT",
        "NUM_STREAMS": streams,
        "INFERENCE_NUM_THREADS": cores(),
        "INFERENCE_PRECISION_HINT": dtype,
    }
    model = openvino.Core().compile_model(PEERS / "minilm.xml", "CPU", settings)
    own = threading.local()

    def embed(ids, mask):
        if not hasattr(own, "request"):
            own.request = model.create_infer_request()
        found = own.request.infer([ids, mask, numpy.zeros_like(ids)], share_inputs=True)
        return found[0]

    return embed


EMBEDDERS = {
    "sentence-transformers": sentence_transformers_embedder,
    "onnxruntime": onnxruntime_embedder,
    "openvino": openvino_embedder,
}


def embedder(library, dtype, streams):
    if dtype not in DTYPES[library]:
        raise ValueError(f"{library} is compared in {' and '.join(DTYPES[library])}")
    return EMBEDDERS[library](dtype, streams)


def batch(rows):
    """Rows of tokens, padded to the longest of them: ids and mask."""
    ids = numpy.zeros((len(rows), max(map(len, rows))), numpy.int64)
    mask = numpy.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
        mask[number, : len(row)] = 1
    return ids, mask
