"""Makes what the peers load, once, into target/peers.

    target/venv/bin/python benches/peers/prepare.py

short.txt          the sentences of benches/sentences.txt, 9 to 50 tokens, 29 on average
long.txt           32 texts of joined sentences; each is a whole input of 256 tokens
minilm.onnx        the model, with pooling and norm, from the exporter of PyTorch
minilm-int8.onnx   its weights as int8 with a scale for each channel, activations as they
                   come (quantize_dynamic); one scale for all is 5 % faster, but its
                   mean cosine is 0.96 instead of 0.99
minilm.xml, .bin   OpenVINO's form. It is converted from PyTorch: OpenVINO then sees
                   the attention as one operation, which the ONNX file hides from it

A file stands under its name when it is whole.
"""

import os
import warnings
from pathlib import Path

from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "minilm" / "1"
SENTENCES = ROOT / "benches" / "sentences.txt"
PEERS = ROOT / "target" / "peers"
CORPORA = {name: PEERS / f"{name}.txt" for name in ("short", "long")}
TOKENS_MAX = 256
LONG_TEXTS = 32
INPUTS = ["input_ids", "attention_mask", "token_type_ids"]


def tokenizer():
    """The model's tokenizer, which cuts at what the model takes and does not pad."""
    found = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    found.enable_truncation(TOKENS_MAX)
    found.no_padding()
    return found


def long_texts(sentences):
    """Texts that begin at sentences spread over the file, each as long as it must be."""
    tokens = tokenizer()
    texts = []
    for number in range(LONG_TEXTS):
        index = number * len(sentences) // LONG_TEXTS
        text = ""
        while len(tokens.encode(text).ids) < TOKENS_MAX:
            text = f"{text} {sentences[index % len(sentences)]}".strip()
            index += 1
        texts.append(text)
    return texts


def write_corpora():
    sentences = [line for line in SENTENCES.read_text().splitlines() if line]
    for name, texts in (("short", sentences), ("long", long_texts(sentences))):
        CORPORA[name].write_text("".join(text + "\n" for text in texts))


def traced():
    """The model in PyTorch, from tokens to vectors of length one, with example inputs."""
    import torch
    from transformers import AutoModel

    class Embedding(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = AutoModel.from_pretrained(MODEL, attn_implementation="sdpa")

        def forward(self, input_ids, attention_mask, token_type_ids):
            states = self.model(
                input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
            ).last_hidden_state
            weights = attention_mask.unsqueeze(-1).to(states.dtype)
            mean = (states * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
            return torch.nn.functional.normalize(mean, dim=-1)

    ids = torch.tensor([[101, 1037, 12856, 1999, 1037, 12856, 102], [101, 7592, 102, 0, 0, 0, 0]])
    mask = (ids != 0).long()
    return Embedding().eval(), (ids, mask, torch.zeros_like(ids))


def write_onnx(path):
    import torch

    model, example = traced()
    axes = {name: {0: "rows", 1: "tokens"} for name in INPUTS}
    # The exporter that traces needs no further package; the model has no branches.
    torch.onnx.export(
        model, example, path, input_names=INPUTS, output_names=["embedding"],
        dynamic_axes=axes | {"embedding": {0: "rows"}}, opset_version=17, dynamo=False,
    )


def write_int8(path):
    from onnxruntime.quantization import QuantType, quantize_dynamic

    source = PEERS / "minilm.onnx"
    quantize_dynamic(source, path, per_channel=True, weight_type=QuantType.QInt8)


def write_openvino(path):
    import openvino

    model, example = traced()
    converted = openvino.convert_model(model, example_input=dict(zip(INPUTS, example)))
    openvino.save_model(converted, path, compress_to_fp16=False)
    # The weights stand beside the description, under its name.
    os.replace(path.with_suffix(".bin"), PEERS / "minilm.bin")


def prepare():
    """Makes what is missing or older than the model."""
    PEERS.mkdir(parents=True, exist_ok=True)
    write_corpora()
    warnings.filterwarnings("ignore")
    source = MODEL / "model.safetensors"
    writers = {
        "minilm.onnx": write_onnx, "minilm-int8.onnx": write_int8, "minilm.xml": write_openvino,
    }
    for name, write in writers.items():
        path = PEERS / name
        if path.exists() and path.stat().st_mtime > source.stat().st_mtime:
            continue
        unfinished = PEERS / f"unfinished-{name}"
        write(unfinished)
        os.replace(unfinished, path)
        print(f"made {path.relative_to(ROOT)}", flush=True)


if __name__ == "__main__":
    prepare()
