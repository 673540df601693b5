"""Tiny model folders whose files change the numbers, saved and computed by the reference libraries.

    golden_folders.py [FOLDER]      FOLDER is tests/golden/folders, where none is given

Each folder holds `expected.json`: rows of a text or of a pair, with the name of the prompt for it,
and the library's output, an embedding or logits, and the scores where the library makes some. A
case is written only if the library's output is another one without what the case is about, or the
library has none then: else a reading that leaves it out would do. `make golden` runs this after
`golden.py`. Needs no network.
"""

import json
import pathlib
import shutil
import sys
import tempfile

import golden
import torch
import transformers
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

WIDTH = 16
VOCABULARY = 128
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
           "mask_token": "[MASK]"}
ROBERTAS = {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>",
            "bos_token": "<s>", "eos_token": "</s>", "mask_token": "<unk>"}
CORPUS = [
    "A paper lantern hangs over the station door.", "RED Lamps and naïve Cafés",
    "The line stopped when the lamp turned red, and nobody blamed the worker.",
    "She sells sea shells by the sea shore, he counts them twice. Größe, Straße, ein Œuvre",
]
TEXTS = ["A paper lantern hangs over the door.", "RED Lamps and naïve Cafés",
         "She counts the workers, and nobody stopped."]
PAIRS = [["the line stopped", "when the lamp turned red"],
         ["who sells sea shells?", "She sells sea shells by the sea shore, and counts them twice."]]
LONG = ["The lamp turned red. " * 8 + "Nobody counts the lanterns at the station."]
PROMPTS = {"query": "the line stopped: ", "passage": "shells: "}
TOKENS = "token_embeddings"


def main():
    folder = golden.ROOT / "tests" / "golden" / "folders"
    folder = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else folder
    torch.set_num_threads(1)
    shutil.rmtree(folder, ignore_errors=True)
    for name, (make, answer, undo) in CASES.items():
        torch.manual_seed(sum(name.encode()))
        (folder / name).mkdir(parents=True)
        make(folder / name)
        for extra in [*(folder / name).rglob("README.md"), *(folder / name).rglob(".gitattributes")]:
            extra.unlink()
        rows = answer(folder / name)
        if undo:
            check_differs(name, rows, answer_without(folder / name, answer, undo))
        (folder / name / "expected.json").write_text(json.dumps(rows))
        print(f"{folder / name}: done")


def answer_without(folder, answer, undo):
    with tempfile.TemporaryDirectory() as name:
        copy = shutil.copytree(folder, pathlib.Path(name) / "copy")
        undo(copy)
        return answer(copy)


def check_differs(name, rows, others):
    """A row at least must show what the case is about."""
    for row, other in zip(rows, others, strict=True):
        values, others = [row.get("scores", row["output"]), other.get("scores", other["output"])]
        pairs = zip(values, others)
        if len(values) != len(others) or max(abs(one - two) for one, two in pairs) > 0.01:
            return
    sys.exit(f"{name}: the files that it is about change nothing")


# What makes a folder.

def pieces(start="", inside=""):
    """Words and their letters in both cases, with and without accents, in the same order each time:
    the trainers of tokenizers number theirs as they please."""
    bare = normalizers.BertNormalizer(lowercase=True)
    splitter = pre_tokenizers.BertPreTokenizer()
    corpus = CORPUS + [bare.normalize_str(text) for text in CORPUS]
    words = {word for text in corpus for word, _ in splitter.pre_tokenize_str(text)}
    letters = sorted({letter for word in words for letter in word})
    starts = {start + letter for letter in letters} | {start + word for word in words}
    return sorted(starts | {inside + letter for letter in letters})


def wordpiece(lowercase=True):
    vocabulary = [*SPECIAL.values(), *pieces(inside="##")]
    vocabulary = {piece: index for index, piece in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(list(SPECIAL.values()))
    return tokenizer


def unigram():
    vocabulary = [(piece, 0.0) for piece in ["<s>", "<pad>", "</s>", "<unk>"]]
    vocabulary += [(piece, -10.0) for piece in pieces(start="▁")]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>"])
    return tokenizer


def encoder(family="Bert", scores=0, **config):
    kind = getattr(transformers, family + ("ForSequenceClassification" if scores else "Model"))
    config = getattr(transformers, family + "Config")(
        **golden.labels(scores or 2), vocab_size=VOCABULARY, max_position_embeddings=72,
        hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32,
        **config,
    )
    return kind(config)


def save(folder, model, tokenizer=None, special=SPECIAL, **config):
    """A folder as transformers saves it, with these keys in `tokenizer_config.json`."""
    golden.randomize(model)
    model.float().eval().save_pretrained(folder)
    (tokenizer or wordpiece()).save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "BertTokenizer", "model_max_length": 64, **special, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write(path, value):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))


def change(path, **keys):
    """Sets keys of a JSON file, and removes those that are `...`."""
    value = json.loads(path.read_text()) | keys
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not ...}))


def plain(folder, pooling="mean", **config):
    """The files that versions of sentence-transformers before 5.4 wrote after an encoder's."""
    write(folder / "modules.json", [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ])
    modes = {f"pooling_mode_{mode}": mode.startswith(pooling)
             for mode in ["cls_token", "mean_tokens", "max_tokens"]}
    write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": WIDTH, **modes, **config})


def with_modules(*modules, prompts=None):
    """What saves an embedding model of these modules after an encoder, by the library."""
    def make(folder):
        with tempfile.TemporaryDirectory() as name:
            source = pathlib.Path(name)
            save(source, encoder())
            made = [module() for module in modules]
            built = [Transformer(str(source)), *made]
            built = SentenceTransformer(modules=built, device="cpu", prompts=prompts)
            with torch.no_grad():
                for weight in (weight for module in made for weight in module.parameters()):
                    weight.normal_(0.0, 0.4)
            built.save_pretrained(str(folder))
    return make


def cross_encoder(labels):
    def make(folder):
        with tempfile.TemporaryDirectory() as name:
            save(pathlib.Path(name), encoder(scores=labels))
            CrossEncoder(name, device="cpu").save_pretrained(str(folder))
    return make


def classifier(labels, tokenizer=None, **config):
    return lambda folder: save(folder, encoder(scores=labels, **config), **(tokenizer or {}))


def robertas(family):
    """A checkpoint of RoBERTa's kin that does not say which id pads."""
    def make(folder):
        model = encoder(family, type_vocab_size=1, pad_token_id=1, bos_token_id=0, eos_token_id=2)
        save(folder, model, unigram(), ROBERTAS, tokenizer_class="PreTrainedTokenizerFast")
        change(folder / "config.json", pad_token_id=...)
        plain(folder)
    return make


def tokenizer_says(lowercase, **config):
    """A folder with a `tokenizer.json` of its own and these keys in `tokenizer_config.json`."""
    def make(folder):
        save(folder, encoder(), wordpiece(lowercase), **config)
        plain(folder)
    return make


def sentence_says(file, lowercase=True, **config):
    """A folder with a file of sentence-transformers about its tokens."""
    def make(folder):
        save(folder, encoder(), wordpiece(lowercase), do_lower_case=lowercase)
        plain(folder)
        write(folder / file, config)
    return make


def switches(folder):
    save(folder, encoder())
    plain(folder, pooling_mode_lasttoken=True, pooling_mode_weightedmean_tokens=True)


# What answers.

def embeddings(texts=TEXTS, prompts=(None,)):
    def answer(folder):
        model = SentenceTransformer(str(folder), device="cpu")
        return [{"text": [text], "prompt": prompt,
                 "output": model.encode(text, prompt_name=prompt).tolist()}
                for text in texts for prompt in prompts]
    return answer


def predictions(folder):
    """The logits of pairs and the scores by default, as a CrossEncoder gives them."""
    model = CrossEncoder(str(folder), device="cpu")
    logits = model.predict(PAIRS, activation_fn=torch.nn.Identity()).reshape(len(PAIRS), -1)
    rows = [{"text": pair, "prompt": None, "output": row.tolist()}
            for pair, row in zip(PAIRS, logits)]
    if logits.shape[1] == 1:
        for row, score in zip(rows, model.predict(PAIRS)):
            row["scores"] = [float(score)]
    return rows


def classes(folder):
    """The logits and scores of pairs by transformers."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    pipeline = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer)
    rows = []
    for pair in PAIRS:
        with torch.no_grad():
            logits = model(**tokenizer(*pair, return_tensors="pt")).logits[0]
        scores = pipeline({"text": pair[0], "text_pair": pair[1]}, top_k=None)
        scores = {score["label"]: score["score"] for score in scores}
        scores = [scores[f"label {index}"] for index in range(len(logits))]
        rows.append({"text": pair, "prompt": None, "output": logits.tolist(), "scores": scores})
    return rows


# What a case is without what it is about.

def without(file, **keys):
    return lambda folder: change(folder / file, **keys)


def reordered(order):
    def undo(folder):
        modules = json.loads((folder / "modules.json").read_text())
        write(folder / "modules.json", [modules[index] for index in order])
    return undo


def unpooled(folder):
    """The Dense of tokens after the Pooling."""
    change(folder / "1_Dense" / "config.json", module_input_name="sentence_embedding",
           module_output_name="sentence_embedding")
    change(folder / "2_Pooling" / "config.json", embedding_dimension=WIDTH)
    reordered([0, 2, 1])(folder)


def pooling(modes, width=WIDTH, **keys):
    return lambda: Pooling(width, modes, **keys)


def dense(inputs, outputs, **keys):
    return lambda: Dense(inputs, outputs, **keys)


ALL_MODES = ("lasttoken", "weightedmean", "mean_sqrt_len_tokens", "mean", "max", "cls")
NO_TYPES = {"model_input_names": ["input_ids", "attention_mask"]}
TYPES = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
TOKENIZER = "tokenizer_config.json"
POOLING = "1_Pooling/config.json"

# The name of a case, what makes its folder, what answers, and what undoes the point of it; none
# where the library fails on such a folder or makes an output of another shape.
CASES = {
    "cross-encoder": (cross_encoder(1), predictions, None),
    "cross-encoder-labels": (cross_encoder(3), predictions, None),
    "regression": (
        classifier(3, problem_type="regression"), classes, without("config.json", problem_type=...)),
    "several-labels": (
        classifier(3, problem_type="multi_label_classification"), classes,
        without("config.json", problem_type=...)),
    "token-types-on": (classifier(2, TYPES), classes, without(TOKENIZER, **NO_TYPES)),
    "token-types-off": (classifier(2, NO_TYPES), classes, without(TOKENIZER, **TYPES)),
    "padding-xlm-roberta": (
        robertas("XLMRoberta"), embeddings(), without("config.json", pad_token_id=0)),
    "padding-camembert": (
        robertas("Camembert"), embeddings(), without("config.json", pad_token_id=0)),
    "lower-case-off": (
        tokenizer_says(True, do_lower_case=False), embeddings(),
        without(TOKENIZER, do_lower_case=True)),
    "lower-case-on": (
        tokenizer_says(False, do_lower_case=True), embeddings(),
        without(TOKENIZER, do_lower_case=False)),
    "accents-kept": (
        tokenizer_says(True, do_lower_case=True, strip_accents=False), embeddings(),
        without(TOKENIZER, strip_accents=...)),
    "sentence-lower-case": (
        sentence_says("sentence_bert_config.json", False, max_seq_length=60, do_lower_case=True),
        embeddings(), without("sentence_bert_config.json", do_lower_case=False)),
    "sentence-length": (
        sentence_says("sentence_xlm-roberta_config.json", max_seq_length=12), embeddings(LONG),
        without("sentence_xlm-roberta_config.json", max_seq_length=...)),
    "truncation-left": (
        tokenizer_says(True, truncation_side="left", model_max_length=16), embeddings(LONG),
        without(TOKENIZER, truncation_side="right")),
    "normalize-dense": (
        with_modules(pooling("mean"), Normalize, dense(WIDTH, 8)), embeddings(),
        reordered([0, 1, 3, 2])),
    "token-dense": (
        with_modules(dense(WIDTH, 8, module_input_name=TOKENS), pooling("max", 8)), embeddings(),
        unpooled),
    "poolings": (
        with_modules(pooling(ALL_MODES)), embeddings(),
        without(POOLING, pooling_mode=ALL_MODES[::-1])),
    "pooling-switches": (
        switches, embeddings(), without(POOLING, pooling_mode_lasttoken=False)),
    "include-prompt": (
        with_modules(pooling(ALL_MODES, include_prompt=False), prompts=PROMPTS),
        embeddings(prompts=tuple(PROMPTS)), without(POOLING, include_prompt=True)),
}


if __name__ == "__main__":
    main()
