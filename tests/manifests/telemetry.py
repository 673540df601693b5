"""The dashboard, the alerts and the autoscalers speak of metrics that exist.

metrics.txt is the one list of names. An integration test holds a live /metrics
against the same list.
"""

import json
import re
import tempfile
from pathlib import Path

import promql_parser
import yaml

from objects import name_of, of_kind, seconds
from tools import ROOT, promtool, run

DEPLOY = ROOT / "deploy"
# What a histogram's name becomes in a query.
_SUFFIXES = ("_bucket", "_sum", "_count")
# The rules as alerts_test.yaml names them.
RULES = "../../deploy/prometheus/alerts.yaml"
# What a container that waits for CPU may be late with its drain, and its exit.
_STOP_SPARE_S = 10


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


def alert_tests(rules, tests):
    """For each alert there is a test in which it fires: promtool takes no more and no less."""
    samples = [sample for test in yaml.safe_load(tests)["tests"] for query in test.get("promql_expr_test", [])
               for sample in query["exp_samples"]]
    expected = {name for sample in samples for name in re.findall(r'alertname="(\w+)"', sample["labels"])}
    for group in yaml.safe_load(rules)["groups"]:
        for rule in group["rules"]:
            if rule["alert"] not in expected:
                yield f"alert {rule['alert']}: no test of alerts_test.yaml sees it fire"


def alert_outcomes(rules, tests):
    """What promtool finds when it runs the tests over the rules."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "alerts.yaml").write_text(rules)
        path = Path(folder, "alerts_test.yaml")
        path.write_text(tests.replace(RULES, "alerts.yaml"))
        status, output = run([promtool(), "test", "rules", path])
        if status != 0:
            yield f"promtool test rules tests/manifests/alerts_test.yaml: {output}"


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
        yield from (f"compose: {name}: {fault}" for fault in _service(service))


def _service(service):
    """The settings of a container of andon against what stands around it."""
    settings = service.get("environment", {})
    if settings.get("ANDON_INSECURE") == "true":
        # Through a published port nobody is on the container's loopback.
        if settings.get("ANDON_INSECURE_ADMIN") != "true":
            yield "nobody could load a model: ANDON_INSECURE_ADMIN must be true"
        if not all(str(port).startswith("127.0.0.1:") for port in service.get("ports", [])):
            yield "nobody authenticates, so its ports belong to 127.0.0.1"
    if "ANDON_DRAIN_DEADLINE" in settings:
        needed = seconds(settings.get("ANDON_DRAIN_DELAY", "5s")) + seconds(settings["ANDON_DRAIN_DEADLINE"])
        if seconds(service.get("stop_grace_period", "10s")) < needed + _STOP_SPARE_S:
            yield f"stop_grace_period must be that of the drain with {_STOP_SPARE_S} s to spare, {needed + _STOP_SPARE_S} s"


def scraping(path):
    """Prometheus's own opinion of its configuration."""
    status, output = run([promtool(), "check", "config", path])
    if status != 0:
        yield f"promtool check config {path.name}: {output}"


def malformed(paths):
    """Files that are no YAML."""
    for path in paths:
        try:
            yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            yield f"{path.name}: {error}"


def faults(metric_names):
    """Every fault of deploy/."""
    unread = list(malformed(sorted(DEPLOY.rglob("*.yaml"))))
    if unread:
        yield from unread
        return
    rules, tests = alert_texts()
    yield from dashboard((DEPLOY / "grafana/andon.json").read_text(), metric_names)
    yield from alerts(rules, metric_names)
    yield from alert_tests(rules, tests)
    yield from alert_outcomes(rules, tests)
    yield from adapter_rules(adapter(), metric_names)
    yield from compose((DEPLOY / "compose.yaml").read_text())
    yield from scraping(DEPLOY / "prometheus/prometheus.yaml")


def alert_texts():
    """The alerts, and their tests."""
    tests = ROOT / "tests/manifests/alerts_test.yaml"
    return (DEPLOY / "prometheus/alerts.yaml").read_text(), tests.read_text()


def adapter():
    """The rules of prometheus-adapter."""
    return yaml.safe_load((DEPLOY / "prometheus/adapter-rule.yaml").read_text())
