"""Trains the demo model `digits` and writes demo/digits/1.

    train_digits.py              train, and write the weights and the configuration
    train_digits.py --check      train, and compare with the committed weights
    train_digits.py --golden F   write the held-out split, and the reference's logits, to F

A multilayer perceptron on scikit-learn's bundled handwritten digits, in 64-bit floats on one
thread with a fixed seed, so that every machine arrives at the same weights.
"""

import argparse
import json
import os
import pathlib
import sys

# One thread: the order of a sum, and so its last digits, must not depend on the machine's cores.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"

import numpy
from safetensors.numpy import load_file, save_file
from sklearn.datasets import load_digits

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "demo" / "digits" / "1"
HIDDEN = [64, 32]
RANGE = [0.0, 16.0]
EPOCHS = 60
BATCH = 32
ACCURACY_MIN = 0.97
# The last digits of a sum may differ between processors; the weights are about 0.1 in size.
TOLERANCE = 1e-3


def split():
    """Every fifth digit of each class is held out."""
    data = load_digits()
    features = data.data.astype(numpy.float64)
    labels = data.target.astype(numpy.int64)
    place = numpy.zeros(len(labels), dtype=numpy.int64)
    for label in range(10):
        rows = numpy.flatnonzero(labels == label)
        place[rows] = numpy.arange(len(rows))
    held_out = place % 5 == 4
    return features[~held_out], labels[~held_out], features[held_out], labels[held_out]


def forward(layers, features):
    """The values before each layer, and the logits."""
    values = [features]
    for number, (weight, bias) in enumerate(layers):
        output = values[-1] @ weight.T + bias
        values.append(numpy.maximum(output, 0.0) if number + 1 < len(layers) else output)
    return values


def gradients(layers, features, labels):
    """Of the mean cross-entropy, by each weight and bias."""
    values = forward(layers, features)
    logits = values[-1] - values[-1].max(axis=1, keepdims=True)
    probabilities = numpy.exp(logits)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    error = probabilities
    error[numpy.arange(len(labels)), labels] -= 1.0
    error /= len(labels)
    found = []
    for number in reversed(range(len(layers))):
        found.append((error.T @ values[number], error.sum(axis=0)))
        error = (error @ layers[number][0]) * (values[number] > 0.0)
    return found[::-1]


def augment(random, features):
    """Each digit, moved by at most one pixel: the training set is small."""
    images = features.reshape(-1, 8, 8)
    padded = numpy.pad(images, ((0, 0), (1, 1), (1, 1)))
    down, right = random.integers(0, 3, len(images)), random.integers(0, 3, len(images))
    still = random.random(len(images)) < 0.5
    down[still], right[still] = 1, 1
    rows = down[:, None, None] + numpy.arange(8)[None, :, None]
    columns = right[:, None, None] + numpy.arange(8)[None, None, :]
    return padded[numpy.arange(len(images))[:, None, None], rows, columns].reshape(-1, 64)


def train():
    """Weights and biases of each layer, by Adam with weight decay and a falling rate."""
    features, labels, _, _ = split()
    features = features / RANGE[1]
    random = numpy.random.default_rng(20261123)
    widths = [64, *HIDDEN, 10]
    layers = [
        (random.normal(0.0, numpy.sqrt(2.0 / inputs), (outputs, inputs)), numpy.zeros(outputs))
        for inputs, outputs in zip(widths, widths[1:])
    ]
    means = [[numpy.zeros_like(part) for part in layer] for layer in layers]
    squares = [[numpy.zeros_like(part) for part in layer] for layer in layers]
    steps = EPOCHS * (len(labels) // BATCH)
    step = 0
    for _ in range(EPOCHS):
        order = random.permutation(len(labels))
        for start in range(0, len(labels) - BATCH + 1, BATCH):
            rows = order[start : start + BATCH]
            found = gradients(layers, augment(random, features[rows]), labels[rows])
            step += 1
            rate = 3e-3 * (1.0 - step / (steps + 1.0))
            for number, layer in enumerate(layers):
                for part, gradient in enumerate(found[number]):
                    mean, square = means[number][part], squares[number][part]
                    mean += 0.1 * (gradient - mean)
                    square += 0.001 * (gradient * gradient - square)
                    unbiased = mean / (1.0 - 0.9**step)
                    size = numpy.sqrt(square / (1.0 - 0.999**step)) + 1e-8
                    layer[part][...] -= rate * (unbiased / size + 1e-2 * layer[part] * (part == 0))
    # The first layer takes pixels of 0 to 16 as they come.
    layers[0][0][...] /= RANGE[1]
    return layers


def tensors(layers):
    found = {}
    for number, (weight, bias) in enumerate(layers):
        found[f"layers.{number}.weight"] = weight.astype(numpy.float32)
        found[f"layers.{number}.bias"] = bias.astype(numpy.float32)
    return found


def layers_of(found):
    numbers = range(len(found) // 2)
    return [(found[f"layers.{n}.weight"], found[f"layers.{n}.bias"]) for n in numbers]


def accuracy(layers):
    _, _, features, labels = split()
    return float((forward(layers, features)[-1].argmax(axis=1) == labels).mean())


def write(layers):
    FOLDER.mkdir(parents=True, exist_ok=True)
    file = FOLDER / "model.safetensors"
    save_file(tensors(layers), file)
    file.chmod(0o644)
    config = {
        "model_type": "andon_tabular",
        "input": {"name": "pixels", "width": 64, "range": RANGE},
        "hidden": HIDDEN,
        "activation": "relu",
        "labels": [str(digit) for digit in range(10)],
        "outputs": {"probabilities": "probabilities", "label": "label"},
    }
    (FOLDER / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def check(layers):
    """What is wrong with the committed weights; nothing when they are the trained ones."""
    committed = load_file(FOLDER / "model.safetensors")
    trained = tensors(layers)
    if committed.keys() != trained.keys():
        return "the committed file has other tensors"
    for name, tensor in trained.items():
        if committed[name].shape != tensor.shape:
            return f"{name} has another shape"
        difference = float(numpy.abs(committed[name] - tensor).max())
        if not difference <= TOLERANCE:
            return f"{name} differs by {difference}"
    reached = accuracy(layers_of(committed))
    if reached < ACCURACY_MIN:
        return f"the committed weights reach {reached:.4f} on the held-out split"
    return None


def write_golden(path):
    _, _, features, labels = split()
    layers = layers_of(load_file(FOLDER / "model.safetensors"))
    layers = [(weight.astype(numpy.float64), bias.astype(numpy.float64)) for weight, bias in layers]
    path.parent.mkdir(parents=True, exist_ok=True)
    golden = {
        "features": features.tolist(),
        "labels": labels.tolist(),
        "logits": forward(layers, features)[-1].tolist(),
    }
    path.write_text(json.dumps(golden))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--golden", type=pathlib.Path)
    arguments = parser.parse_args()
    if arguments.golden:
        write_golden(arguments.golden)
        return
    layers = train()
    if arguments.check:
        wrong = check(layers)
        if wrong:
            sys.exit(f"demo/digits/1/model.safetensors: {wrong}")
    else:
        write(layers)
    print(f"accuracy on the held-out split: {accuracy(layers_of(load_file(FOLDER / 'model.safetensors'))):.4f}")


if __name__ == "__main__":
    main()
