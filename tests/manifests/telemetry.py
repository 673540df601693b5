"""The dashboard, the alerts and the autoscalers speak of metrics that exist.

metrics.txt is the one list of names. An integration test holds a live /metrics
against the same list.
"""

import json

import promql_parser
import yaml

from objects import name_of, of_kind
from tools import ROOT, promtool, run

DEPLOY = ROOT / "deploy"
# What a histogram's name becomes in a query.
_SUFFIXES = ("_bucket", "_sum", "_count")


def defined_metrics():
    """The names of metrics.txt."""
    return set((ROOT / "tests/manifests/metrics.txt").read_text().split())


def query_faults(where, query, metric_names):
    """A query must parse, and every metric in it must exist."""
    # Grafana puts a duration here; any will do to parse the rest.
    text = query.replace("$__rate_interval", "5m")
    names = set()
    try:
        promql_parser.walk(
            promql_parser.parse(text),
            lambda node: names.add(node.name) if isinstance(node, promql_parser.VectorSelector) else None)
    except ValueError as error:
        yield f"{where}: {error}: {query}"
        return
    if not names:
        yield f"{where}: reads no metric: {query}"
    for name in sorted(names):
        family = next((name.removesuffix(s) for s in _SUFFIXES if name.removesuffix(s) in metric_names), name)
        if family not in metric_names:
            yield f"{where}: no metric is named {name} (tests/manifests/metrics.txt)"


def dashboard(text, metric_names):
    """Every panel has a title and queries that hold; no two panels overlap."""
    board, taken = json.loads(text), set()
    for panel in board["panels"]:
        where = f"dashboard: {panel['title']}"
        grid = panel["gridPos"]
        cells = {(x, y) for x in range(grid["x"], grid["x"] + grid["w"]) for y in range(grid["y"], grid["y"] + grid["h"])}
        if cells & taken or grid["x"] + grid["w"] > 24:
            yield f"{where}: lies over another panel or the edge"
        taken |= cells
        for target in panel.get("targets", []):
            yield from query_faults(where, target["expr"], metric_names)
        if panel["type"] != "row" and not panel.get("targets"):
            yield f"{where}: has no query"
    if len({panel["id"] for panel in board["panels"]}) != len(board["panels"]):
        yield "dashboard: two panels have one id"


def alerts(text, metric_names):
    """Every alert can be acted on: how urgent it is, what happened, what to do."""
    for group in yaml.safe_load(text)["groups"]:
        for rule in group["rules"]:
            where = f"alert {rule['alert']}"
            yield from query_faults(where, rule["expr"], metric_names)
            if rule.get("labels", {}).get("severity") not in ("page", "ticket"):
                yield f"{where}: severity must be page or ticket"
            for key in ("summary", "runbook"):
                if len(rule.get("annotations", {}).get(key, "")) < 20:
                    yield f"{where}: needs a {key}"


def scaler_metrics(objects, metric_names, adapter):
    """What an autoscaler reads exists, and prometheus-adapter is told to serve it."""
    served = {rule["name"]["as"] for rule in adapter["rules"]["custom"]}
    for scaler in of_kind(objects, "HorizontalPodAutoscaler"):
        for metric in scaler["spec"].get("metrics", []):
            name = metric.get("pods", {}).get("metric", {}).get("name")
            if name and (name not in metric_names or name not in served):
                yield f"{name_of(scaler)}: {name} must be in metrics.txt and deploy/prometheus/adapter-rule.yaml"


def adapter_rules(adapter, metric_names):
    """The adapter reads metrics that exist."""
    for rule in adapter["rules"]["custom"]:
        yield from query_faults("adapter rule", rule["seriesQuery"], metric_names)


def compose(text):
    """Every image is pinned and every dependency exists; the fleet runs with no rights."""
    document = yaml.safe_load(text)
    for name, service in document["services"].items():
        tag = service["image"].rsplit("/", 1)[-1].partition(":")[2]
        if tag in ("", "latest"):
            yield f"compose: {name}: the image {service['image']} is not pinned"
        for other in service.get("depends_on", {}):
            if other not in document["services"]:
                yield f"compose: {name}: depends on {other}, which does not exist"
        if service["image"].startswith("andon:") and not (service.get("read_only") and service.get("cap_drop") == ["ALL"]):
            yield f"compose: {name}: must be read-only and drop ALL capabilities"


def prometheus_faults():
    """Prometheus's own opinion: the rules hold, and each alert fires when it should."""
    program = promtool()
    for command, path in (
        (["check", "config"], DEPLOY / "prometheus/prometheus.yaml"),
        (["test", "rules"], ROOT / "tests/manifests/alerts_test.yaml"),
    ):
        status, output = run([program, *command, path])
        if status != 0:
            yield f"promtool {' '.join(command)} {path.relative_to(ROOT)}: {output}"


def faults(metric_names):
    """Every fault of deploy/."""
    for path in sorted(DEPLOY.rglob("*.yaml")):
        try:
            yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            yield f"{path.relative_to(ROOT)}: {error}"
            return
    yield from dashboard((DEPLOY / "grafana/andon.json").read_text(), metric_names)
    yield from alerts((DEPLOY / "prometheus/alerts.yaml").read_text(), metric_names)
    yield from adapter_rules(adapter(), metric_names)
    yield from compose((DEPLOY / "compose.yaml").read_text())
    yield from prometheus_faults()


def adapter():
    """The rules of prometheus-adapter."""
    return yaml.safe_load((DEPLOY / "prometheus/adapter-rule.yaml").read_text())
