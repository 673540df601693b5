#!/usr/bin/env python3
"""Checks k8s/ and deploy/: rendering, schemas, and what must hold besides.

    check.py                    every overlay, the Dockerfile, dashboard and alerts
    check.py --self-test        breaks them one by one: each fault must be found
    check.py --binary PATH      also: every ANDON_ setting is one that `andon` knows
"""

import argparse
import functools
import json
import re
import sys

import kubernetes_validate
import yaml

import network
import telemetry
import workloads
from objects import main_container, name_of, of_kind
from tools import ROOT, TOOLS, ToolMissing, hadolint, kubectl, run

OVERLAYS = ("local", "cpu", "gpu", "production")
# The oldest release that has everything used here (a preStop that sleeps), and a
# new one, which has dropped what was deprecated.
KUBERNETES_VERSIONS = ("1.30", "1.37")


def render(overlay):
    """The objects of an overlay, as they would be applied."""
    status, output = run([kubectl(), "kustomize", ROOT / "k8s/overlays" / overlay])
    if status != 0:
        raise SystemExit(f"{overlay}: kubectl kustomize: {output}")
    return [item for item in yaml.safe_load_all(output) if item]


def schema_faults(objects):
    """What the API server would refuse or silently drop."""
    for item in objects:
        yield from _schema_faults(json.dumps(item, sort_keys=True))


# Most objects are the same in every overlay, and reading schemas is slow.
@functools.cache
def _schema_faults(text):
    item, faults = json.loads(text), []
    for version in KUBERNETES_VERSIONS:
        try:
            kubernetes_validate.validate(item, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            path = ".".join(str(part) for part in error.path)
            faults.append(f"{name_of(item)}: Kubernetes {version}: {path}: {error.message}")
    return faults


def overlay_faults(objects, overlay):
    """Every fault of one rendered overlay."""
    malformed = list(schema_faults(objects))
    if malformed:
        # The other checks rely on the shape that the schema promises.
        yield from malformed
        return
    for check in workloads.CHECKS + network.CHECKS:
        yield from check(objects, overlay)
    yield from telemetry.scaler_metrics(objects, telemetry.defined_metrics(), telemetry.adapter())


def dockerfile_faults(text):
    """The linter's findings, and the rules it does not know."""
    status, output = run([hadolint(), "-"], input=text)
    if status != 0:
        yield f"hadolint: {output}"
    stages = re.split(r"(?m)^FROM ", text)[1:]
    for target in ("cpu", "cuda", "models"):
        stage = next((s for s in stages if re.match(rf"\S+ AS {target}\n", s)), None)
        if stage is None:
            yield f"deploy/Dockerfile: has no target {target}"
        elif "\nUSER 65532:65532\n" not in stage:
            yield f"deploy/Dockerfile: the target {target} must run as user 65532"
    yield from base_faults(text)


def base_faults(text):
    """Images of others are named by an ARG at the top, whose default is an exact version."""
    versions = dict(re.findall(r"(?m)^ARG (\w+)=(\S+)$", text.split("FROM ", 1)[0]))
    stages = set()
    for base, stage in re.findall(r"(?m)^FROM (\S+) AS (\S+)$", text):
        name = re.search(r":\$\{(\w+)\}", base)
        version = versions.get(name[1], "") if name else ""
        if base != "scratch" and base not in stages and not re.match(r"\d+\.\d+\.\d+(-|$)", version):
            yield f"deploy/Dockerfile: {base} must have an exact version in an ARG"
        stages.add(stage)


def setting_faults(objects, binary):
    """Settings that the binary would ignore, because it does not know their names."""
    for deployment in of_kind(objects, "Deployment"):
        container = main_container(deployment)
        _, known = run([binary, *container["args"], "--help"])
        for entry in container.get("env", []):
            if not re.search(rf"\b{entry['name']}\b", known):
                yield f"{name_of(deployment)}: `andon {container['args'][0]} --help` does not name {entry['name']}"


def requirement_faults(text):
    """The packages of these checks have exact versions: what is a fault does not change by itself."""
    for line in text.split("\n"):
        if line and not re.fullmatch(r"[a-z-]+==[0-9.]+", line):
            yield f"tests/manifests/requirements.txt: {line} must have an exact version"


def report(name, size, faults):
    """Prints one line, and one for each fault; returns how many there were."""
    print(f"{name}: {size}, {len(faults) or 'no'} fault{'' if len(faults) == 1 else 's'}")
    for fault in faults:
        print(f"  {fault}")
    return len(faults)


def main():
    """Exit status 1 when anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--self-test", action="store_true", help="prove that each fault is found")
    parser.add_argument("--binary", metavar="PATH", help="the andon binary, to know its settings by")
    arguments = parser.parse_args()
    TOOLS.mkdir(parents=True, exist_ok=True)
    rendered = {overlay: render(overlay) for overlay in OVERLAYS}
    if arguments.self_test:
        import self_test  # It imports this module.
        return self_test.run_all(rendered)
    count = 0
    for overlay, objects in rendered.items():
        faults = list(overlay_faults(objects, overlay))
        if arguments.binary:
            faults += setting_faults(objects, arguments.binary)
        count += report(f"k8s/overlays/{overlay}", f"{len(objects)} objects", faults)
    metric_names = telemetry.defined_metrics()
    faults = [*dockerfile_faults((ROOT / "deploy/Dockerfile").read_text()), *telemetry.faults(metric_names)]
    count += report("deploy", f"{len(metric_names)} metrics", faults)
    requirements = (ROOT / "tests/manifests/requirements.txt").read_text()
    count += report("tests/manifests", f"{len(requirements.split())} packages", list(requirement_faults(requirements)))
    return 1 if count else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ToolMissing as missing:
        sys.exit(f"missing tool: {missing}")
