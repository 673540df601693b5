"""Writes what the reference implementations answer, for the engine's golden tests: `make golden`.

    golden.py [FOLDER]      FOLDER is tests/golden, which is committed, where none is given

For each family a tiny checkpoint with random weights and a small tokenizer of the family's kind,
saved as an ordinary Hugging Face folder, and beside it `expected.json`: token ids, hidden
states, pooled vectors and logits by transformers, in 32-bit floats, one text at a time. For
`minilm` the vectors of sentence-transformers, out of models/minilm/1. Needs no network.
"""

import hashlib
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

transformers.utils.logging.disable_progress_bar()

ROOT = pathlib.Path(__file__).resolve().parents[2]
HIDDEN = 32
SIZES = {"vocab_size": 400, "max_position_embeddings": 72}

CORPUS = [
    "A paper lantern hangs over the station door.",
    "The line stopped when the lamp turned red, and nobody blamed the worker.",
    "Workers scale on their own; the gateway picks the least loaded of two.",
    "She sells sea shells by the sea shore, he counts them twice.",
    "def answer(question): return sorted(question.split(), key=len)[-1]",
    "Prices rose by 4.5% in March 2024, less than the 6.1% of a year before.",
    "日本語の文章も読めます。", "مرحبا بالعالم", "Größe, Straße, naïve café, ein Œuvre",
    "The quick brown fox jumps over the lazy dog; the dog did not mind at all.",
]
TEXTS = [
    ["A paper lantern hangs over the door."],
    ["red"],
    [""],
    ["Workers scale on their own. " * 3],
    ["The quick brown fox jumps over the lazy dog 😀 日本語 café <pad> [SEP] x = {1: 'a'}"],
    ["the line stopped", "when the lamp turned red"],
    ["who sells sea shells?", "She sells sea shells by the sea shore, and counts them twice."],
    ["", "nobody"],
]


def main():
    folder = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "tests" / "golden"
    torch.set_num_threads(1)
    for name, build in CASES.items():
        torch.manual_seed(sum(name.encode()))
        write_case(folder / name, build)
        print(f"{folder / name}: done")
    write_minilm(folder / "minilm.json")
    trainer = ROOT / "tests" / "python" / "train_digits.py"
    subprocess.run([sys.executable, trainer, "--golden", folder / "digits.json"], check=True)
    write_sources(folder)


def write_sources(folder):
    """What the folder was made by: the programs, which `make check` compares, and the packages."""
    programs = ["golden.py", "golden_folders.py", "train_digits.py"]
    programs = [f"tests/python/{name}" for name in programs]
    sums = [f"{hashlib.sha256((ROOT / name).read_bytes()).hexdigest()}  {name}\n" for name in programs]
    (folder / "programs.sha256").write_text("".join(sums))
    names = (folder / "requirements.txt").read_text().split("\n")
    names = [name for name in names if name and not name.startswith("#")]
    versions = [f"{name} {importlib.metadata.version(name)}\n" for name in names]
    (folder / "versions.txt").write_text("".join(versions))


def wordpiece():
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.decoder = decoders.WordPiece()
    # As in the files of MiniLM: a server must not obey these.
    tokenizer.enable_padding(length=16, pad_id=0, pad_token="[PAD]")
    tokenizer.enable_truncation(16)
    return tokenizer


def byte_level(roberta):
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"] if roberta else ["[CLS]", "[PAD]", "[SEP]"]
    trainer = trainers.BpeTrainer(
        vocab_size=390,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if roberta:
        tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    else:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B [SEP]",
            special_tokens=[("[CLS]", 0), ("[SEP]", 2)],
        )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def unigram():
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def labels(count):
    return {"num_labels": count, "id2label": {index: f"label {index}" for index in range(count)}}


def bert(scores=0):
    kind = transformers.BertForSequenceClassification if scores else transformers.BertModel
    config = transformers.BertConfig(
        **SIZES, **labels(scores or 2), hidden_size=HIDDEN, num_hidden_layers=3,
        num_attention_heads=4, intermediate_size=64,
    )
    return kind(config), wordpiece()


def roberta(scores=0, xlm=False):
    family = "XLMRoberta" if xlm else "Roberta"
    kind = getattr(transformers, family + ("ForSequenceClassification" if scores else "Model"))
    config = getattr(transformers, family + "Config")(
        **SIZES, **labels(scores or 2), hidden_size=HIDDEN, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=64, type_vocab_size=1, pad_token_id=1,
        bos_token_id=0, eos_token_id=2,
    )
    return kind(config), unigram() if xlm else byte_level(True)


def distilbert(scores=0):
    kind = transformers.DistilBertForSequenceClassification if scores else transformers.DistilBertModel
    config = transformers.DistilBertConfig(
        **SIZES, **labels(scores or 2), dim=HIDDEN, n_layers=2, n_heads=4, hidden_dim=64,
    )
    return kind(config), wordpiece()


def modernbert(scores=0, pooling="cls"):
    kind = transformers.ModernBertForSequenceClassification if scores else transformers.ModernBertModel
    config = transformers.ModernBertConfig(
        **SIZES, **labels(scores or 2), hidden_size=HIDDEN, num_hidden_layers=5,
        num_attention_heads=4, intermediate_size=48, local_attention=8,
        global_attn_every_n_layers=2, classifier_pooling=pooling, pad_token_id=1,
        bos_token_id=0, eos_token_id=2, cls_token_id=0, sep_token_id=2,
    )
    return kind(config), byte_level(False)


# The name of a case, what builds it, and the pooling that its files ask for.
CASES = {
    "bert-embedding": (lambda: bert(), None),
    "bert-classification": (lambda: bert(3), None),
    "bert-rerank": (lambda: bert(1), None),
    "bert-dense": (lambda: bert(), "mean_tokens"),
    "roberta-embedding": (lambda: roberta(), "cls_token"),
    "roberta-classification": (lambda: roberta(4), None),
    "xlm-roberta-embedding": (lambda: roberta(xlm=True), "max_tokens"),
    "xlm-roberta-rerank": (lambda: roberta(1, xlm=True), None),
    "distilbert-embedding": (lambda: distilbert(), None),
    "distilbert-classification": (lambda: distilbert(2), None),
    "modernbert-embedding": (lambda: modernbert(), "lasttoken"),
    "modernbert-classification": (lambda: modernbert(3), None),
    "modernbert-mean": (lambda: modernbert(2, "mean"), None),
}


def randomize(model):
    """Weights large enough that two texts do not look alike."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name.lower():
                weight.normal_(1.0 if name.endswith("weight") else 0.0, 0.2)
            elif weight.dim() == 1:
                weight.normal_(0.0, 0.1)
            elif "embedding" in name.lower():
                weight.normal_(0.0, 1.0)
            else:
                weight.normal_(0.0, 1.2 / weight.shape[1] ** 0.5)


def write_case(folder, case):
    build, pooling = case
    model, tokenizer = build()
    model = model.float().eval()
    randomize(model)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    limit = {"model_max_length": 64}
    (folder / "tokenizer_config.json").write_text(json.dumps(limit))
    dense = None
    if pooling:
        dense = write_sentence_files(folder, pooling, folder.name.endswith("-dense"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    rows = [answer(model, tokenizer, text, pooling or "mean_tokens", dense) for text in TEXTS]
    (folder / "expected.json").write_text(json.dumps(rows))


def write_sentence_files(folder, pooling, with_dense):
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    (folder / "1_Pooling").mkdir(exist_ok=True)
    modes = ["cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "lasttoken"]
    config = {f"pooling_mode_{mode}": mode == pooling for mode in modes}
    config["word_embedding_dimension"] = HIDDEN
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    dense = None
    if with_dense:
        modules.append(("2_Dense", "Dense"))
        (folder / "2_Dense").mkdir(exist_ok=True)
        dense = torch.nn.Linear(HIDDEN, 12)
        torch.nn.init.normal_(dense.weight, 0.0, 0.2)
        config = {"in_features": HIDDEN, "out_features": 12, "bias": True,
                  "activation_function": "torch.nn.modules.activation.Tanh"}
        (folder / "2_Dense" / "config.json").write_text(json.dumps(config))
        tensors = {"linear.weight": dense.weight.data, "linear.bias": dense.bias.data}
        save_file(tensors, folder / "2_Dense" / "model.safetensors")
    modules = [{"idx": index, "name": str(index), "path": path,
                "type": f"sentence_transformers.models.{kind}"}
               for index, (path, kind) in enumerate(modules)]
    (folder / "modules.json").write_text(json.dumps(modules))
    prompts = {"prompts": {"query": "query: "}, "default_prompt_name": None}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 60}))
    return dense


def answer(model, tokenizer, text, pooling, dense):
    encoding = tokenizer.encode(*text)
    inputs = {"input_ids": torch.tensor([encoding.ids])}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if model.config.model_type == "bert":
        inputs["token_type_ids"] = torch.tensor([encoding.type_ids])
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
    row = {"text": text, "ids": encoding.ids, "type_ids": encoding.type_ids}
    if hasattr(output, "logits"):
        row["logits"] = output.logits[0].tolist()
        return row
    hidden = output.last_hidden_state[0]
    pooled = {
        "mean_tokens": lambda: hidden.mean(dim=0),
        "cls_token": lambda: hidden[0],
        "lasttoken": lambda: hidden[-1],
        "max_tokens": lambda: hidden.max(dim=0).values,
    }[pooling]()
    if dense is not None:
        pooled = torch.tanh(dense(pooled))
    row["hidden"] = hidden.flatten().tolist()
    row["pooled"] = pooled.tolist()
    return row


def sentences():
    """Two hundred, as varied as callers are."""
    odd = [
        "", " ", "\n\t  \n", ".", "a", "?!", "0", "  leading and trailing  ", "\u200b", "\ufeffmark",
        "UPPER CASE WORDS", "CamelCaseIdentifier snake_case_identifier kebab-case",
        "😀", "😀😀😀 party 🎉🎊", "👩‍👩‍👧‍👦 family", "🇯🇵 🇫🇷 flags", "smile :-) ;-P <3",
        "日本語の文章を埋め込みます。", "東京は日本の首都です", "カタカナとひらがな", "今日は天気がいいですね😀",
        "你好，世界", "机器学习模型", "안녕하세요 세계", "مرحبا بالعالم", "كيف حالك اليوم؟", "שלום עולם",
        "Привет, мир", "Γειά σου Κόσμε", "नमस्ते दुनिया", "สวัสดีชาวโลก", "Xin chào thế giới",
        "naïve café façade", "Größe und Straße", "e\u0301 combined \u00e9 composed", "ﬁ ligature ½ ²",
        "https://example.com/path?query=1&other=two#fragment", "someone@example.com",
        "def f(x):\n    return x ** 2  # square", "SELECT name FROM users WHERE id = 42;",
        "{\"key\": [1, 2.5, null, true]}", "<html><body>Hello</body></html>", "x = y != z && (a || b)",
        "fn main() { println!(\"{}\", 1u8 as char); }", "\\frac{a}{b} = \\sqrt{c}", "$ ls -la | grep foo",
        "3.14159 2,718,281 1e-10 0xDEADBEEF", "2026-11-23T12:45:00Z", "+1 (555) 010-9999",
        "[CLS] [SEP] [MASK] [PAD] [UNK]", "the " * 10, "word " * 254, "word " * 255, "word " * 600,
        "supercalifragilisticexpialidocious" * 5, "a" * 150, "é" * 120, "日本" * 300, "🙂" * 300, "- " * 200,
        "tab\tseparated\tvalues", "line one\nline two\r\nline three", "null\u0001control\u0007bell",
        "\u202eright to left override", "soft\u00adhyphen", "non\u00a0breaking", "quote “curly” ‘single’ — dash…",
    ]
    subjects = ["The gateway", "A small lantern", "My neighbour's dog", "The committee", "Every worker",
                "An unexpected error", "The latest release", "Nobody in the room", "The old bridge"]
    actions = ["picks the least loaded of two workers", "hangs over the door of the station",
               "barked at the moon until morning", "could not agree on the colour of the roof",
               "stops the line when something looks wrong", "was fixed before anyone noticed"]
    endings = [".", ", and that was that.", " because the rain would not stop, the road was closed and "
               "the last train had left an hour before anybody thought of looking at the clock."]
    made = [f"{s} {a}{e}" for s in subjects for a in actions for e in endings]
    step = max(1, len(made) // (200 - len(odd)))
    return (odd + made[::step] + made[1::step])[:200]


def write_minilm(path):
    from sentence_transformers import SentenceTransformer

    folder = ROOT / "models" / "minilm" / "1"
    if not (folder / "model.safetensors").exists():
        sys.exit("models/minilm/1 is missing: run `make models`")
    model = SentenceTransformer(str(folder), device="cpu")
    torch.set_num_threads(os.cpu_count() or 1)
    texts = sentences()
    assert len(texts) == 200
    vectors = model.encode(texts, normalize_embeddings=True)
    # Padding and truncation that stand in tokenizer.json are not the model's.
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(model.max_seq_length)
    rows = [
        {"text": text, "ids": tokenizer.encode(text).ids, "vector": vector.tolist()}
        for text, vector in zip(texts, vectors)
    ]
    path.write_text(json.dumps(rows))
    print(f"{path}: done")


if __name__ == "__main__":
    main()
