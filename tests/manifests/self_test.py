"""Breaks what is good, one fault at a time, and sees that each fault is found.

A check that cannot fail proves nothing.
"""

import ast
import copy
import functools
import json
import re
import sys
import tempfile
from pathlib import Path

import yaml

import check
import network
import telemetry
import workloads
from objects import main_container, pod_spec


def _get(objects, name):
    return next(item for item in objects if check.name_of(item) == name)


def _gateway(objects):
    return _get(objects, "Deployment/andon-gateway")


def _worker(objects):
    return _get(objects, "Deployment/andon-worker-minilm")


def _drop(name):
    return lambda objects: objects.remove(_get(objects, name))


def _set(name, path, value):
    """A fault: the field at `path` (keys joined by /) of one object is `value`, or gone if None."""
    def change(objects):
        node, keys = _get(objects, name), [int(key) if key.isdigit() else key for key in path.split("/")]
        for key in keys[:-1]:
            node = node[key]
        if value is None:
            del node[keys[-1]]
        else:
            node[keys[-1]] = value
    return change


def _setting(find, name, value):
    def change(objects):
        entry = next(e for e in main_container(find(objects))["env"] if e["name"] == name)
        entry["value"] = value
    return change


def _new_setting(find, name, value):
    return lambda objects: main_container(find(objects))["env"].append({"name": name, "value": value})


def _drop_setting(find, name):
    def change(objects):
        container = main_container(find(objects))
        container["env"] = [entry for entry in container["env"] if entry["name"] != name]
    return change


def _core_source(find, resource):
    def change(objects):
        entry = next(e for e in main_container(find(objects))["env"] if e["name"] == "ANDON_CORES")
        entry["valueFrom"]["resourceFieldRef"]["resource"] = resource
    return change


def _append(find, key, value):
    return lambda objects: pod_spec(find(objects)).setdefault(key, []).append(value)


GATEWAY, WORKER = "Deployment/andon-gateway", "Deployment/andon-worker-minilm"
POD, FIRST = "spec/template/spec", "spec/template/spec/containers/0"
TERM = f"{POD}/affinity/podAntiAffinity/preferredDuringSchedulingIgnoredDuringExecution/0/podAffinityTerm"
ZONES = {
    "topologyKey": "topology.kubernetes.io/zone", "maxSkew": 1, "whenUnsatisfiable": "ScheduleAnyway",
    "labelSelector": {"matchLabels": {"app.kubernetes.io/component": "worker"}},
}
SCALER, BUDGET = "HorizontalPodAutoscaler/andon-worker-minilm", "PodDisruptionBudget/andon-worker-minilm"

# What is broken, in which overlay, and words that the message must contain.
OBJECT_FAULTS = [
    ("a misspelt field", "cpu", _set(WORKER, f"{POD}/nodeSelectr", {"a": "b"}), "nodeSelectr"),
    ("a wrong type", "cpu", _set(WORKER, f"{POD}/terminationGracePeriodSeconds", "soon"), "not of type"),
    ("an object twice", "cpu", lambda o: o.append(copy.deepcopy(_get(o, BUDGET))), "appears twice"),
    ("another namespace", "cpu", _set(BUDGET, "metadata/namespace", "default"), "not in the namespace andon"),
    ("a lax namespace", "cpu", _set("Namespace/andon", "metadata/labels", {}), "restricted Pod Security"),
    ("no namespace", "cpu", _drop("Namespace/andon"), "restricted Pod Security"),
    ("no worker", "cpu", _drop(WORKER), "andon-worker-minilm is missing"),
    ("a wide selector", "cpu", _set(WORKER, "spec/selector/matchLabels", {"app.kubernetes.io/name": "andon"}), "its selector takes"),
    ("other labels", "cpu", _set(WORKER, "spec/template/metadata/labels", {"a": "b"}), "its selector takes the Pods of []"),
    ("a Service of nothing", "cpu", _set("Service/andon-gateway", "spec/selector", {"a": "b"}), "takes no Pods"),
    ("a foreign spread", "cpu", _set(WORKER, f"{POD}/topologySpreadConstraints/0/labelSelector/matchLabels", {"a": "b"}), "does not take its own Pods"),
    ("a careless rollout", "cpu", _set(WORKER, "spec/strategy/rollingUpdate/maxUnavailable", 1), "maxUnavailable must be 0"),
    ("no surge", "cpu", _set(GATEWAY, "spec/strategy/rollingUpdate/maxSurge", 0), "maxSurge"),
    ("a short grace period", "cpu", _set(GATEWAY, f"{POD}/terminationGracePeriodSeconds", 75), "grace period"),
    ("a grace period without preStop", "cpu", _set(WORKER, f"{POD}/terminationGracePeriodSeconds", 90), "to spare, 120 s"),
    ("nothing to spare", "cpu", _set(WORKER, f"{POD}/terminationGracePeriodSeconds", 115), "to spare"),
    ("a worker that leaves before DNS says so", "cpu", _set(WORKER, f"{FIRST}/lifecycle/preStop/sleep/seconds", 34), "cached DNS"),
    ("a gateway that looks seldom", "cpu", _new_setting(_gateway, "ANDON_DNS_INTERVAL", "15s"), "cached DNS"),
    ("a longer call", "cpu", _setting(_worker, "ANDON_DEADLINE_MAX", "2m"), "shorter than the longest call"),
    ("messages that fill the memory", "cpu", _new_setting(_worker, "ANDON_BYTES_IN_FLIGHT_MAX", "1025MiB"), "more than half"),
    ("a wrong duration", "cpu", _setting(_worker, "ANDON_DRAIN_DELAY", "five"), "no duration"),
    ("a shell in preStop", "cpu", _set(GATEWAY, f"{FIRST}/lifecycle/preStop", {"exec": {"command": ["sleep", "5"]}}), "no shell"),
    ("no startup probe", "cpu", _set(WORKER, f"{FIRST}/startupProbe", None), "startupProbe must be a gRPC probe"),
    ("an HTTP probe", "cpu", _set(WORKER, f"{FIRST}/readinessProbe", {"httpGet": {"port": 8002, "path": "/readyz"}}), "readinessProbe must be a gRPC probe"),
    ("no liveness probe", "cpu", _set(GATEWAY, f"{FIRST}/livenessProbe", None), "livenessProbe must be a gRPC probe"),
    ("a probe of another port", "cpu", _set(WORKER, f"{FIRST}/readinessProbe/grpc/port", 8002), "not the port named grpc"),
    ("readiness that is life", "cpu", _set(WORKER, f"{FIRST}/readinessProbe/grpc/service", "andon.live"), "follows readiness"),
    ("life that is readiness", "cpu", _set(WORKER, f"{FIRST}/livenessProbe/grpc/service", ""), "not a dead one"),
    ("a gateway that starts with workers", "cpu", _set(GATEWAY, f"{FIRST}/startupProbe/grpc/service", ""), "must not wait for workers"),
    ("the tag latest", "cpu", _set(WORKER, f"{FIRST}/image", "andon:latest"), "is not pinned"),
    ("no tag", "local", _set(WORKER, f"{POD}/initContainers/0/image", "andon-models"), "is not pinned"),
    ("no memory limit", "cpu", _set(WORKER, f"{FIRST}/resources/limits", {"cpu": "1"}), "limit memory"),
    ("service links", "cpu", _set(WORKER, f"{POD}/enableServiceLinks", True), "enableServiceLinks"),
    ("root", "cpu", _set(WORKER, f"{POD}/securityContext/runAsUser", 0), "not root"),
    ("perhaps root", "cpu", _set(GATEWAY, f"{POD}/securityContext/runAsNonRoot", None), "not root"),
    ("no seccomp", "cpu", _set(WORKER, f"{POD}/securityContext/seccompProfile", {"type": "Unconfined"}), "seccomp"),
    ("privilege", "cpu", _set(WORKER, f"{FIRST}/securityContext/privileged", True), "privileged"),
    ("escalation", "cpu", _set(WORKER, f"{FIRST}/securityContext/allowPrivilegeEscalation", None), "escalation"),
    ("a capability", "cpu", _set(WORKER, f"{FIRST}/securityContext/capabilities", {"drop": ["ALL"], "add": ["NET_ADMIN"]}), "capabilities"),
    ("a writable root", "local", _set(WORKER, f"{POD}/initContainers/0/securityContext/readOnlyRootFilesystem", False), "read-only root"),
    ("a port of the node", "cpu", _set(WORKER, f"{FIRST}/ports/0/hostPort", 8001), "port of its node"),
    ("the node's network", "cpu", _set(WORKER, f"{POD}/hostNetwork", True), "hostNetwork"),
    ("a path of the node", "cpu", _append(_worker, "volumes", {"name": "x", "hostPath": {"path": "/"}}), "kind that is not restricted"),
    ("a token for a Pod", "cpu", _set(WORKER, f"{POD}/automountServiceAccountToken", None), "automountServiceAccountToken"),
    ("a token for an account", "cpu", _set("ServiceAccount/andon-worker", "automountServiceAccountToken", True), "automountServiceAccountToken"),
    ("an unknown account", "cpu", _drop("ServiceAccount/andon-worker"), "does not exist"),
    ("writable weights", "cpu", _set(WORKER, f"{FIRST}/volumeMounts/0/readOnly", None), "mounted read-only"),
    ("weights elsewhere", "cpu", _setting(_worker, "ANDON_REPOSITORY", "/elsewhere"), "nothing is mounted"),
    ("a writable claim", "production", _set(WORKER, f"{POD}/volumes/0/persistentVolumeClaim/readOnly", None), "from a claim, read-only"),
    ("no claim", "production", _drop("PersistentVolumeClaim/andon-models"), "does not exist"),
    ("a claim of one node", "production", _set("PersistentVolumeClaim/andon-models", "spec/accessModes", ["ReadWriteOnce"]), "ReadOnlyMany"),
    ("no copied weights", "local", _set(WORKER, f"{POD}/initContainers", None), "from an image"),
    ("no budget", "cpu", _drop(BUDGET), "0 PodDisruptionBudgets"),
    ("a budget that blocks", "cpu", _set(BUDGET, "spec/maxUnavailable", 0), "maxUnavailable must be 1"),
    ("no autoscaler", "cpu", _drop(SCALER), "no HorizontalPodAutoscaler"),
    ("an autoscaler of nothing", "cpu", _set(SCALER, "spec/scaleTargetRef/name", "andon"), "does not exist"),
    ("another metric", "cpu", _set(SCALER, "spec/metrics/0/pods/metric/name", "andon_queue"), "must read andon_worker_queue_rows"),
    ("an unserved metric", "cpu", _set(SCALER, "spec/metrics/0/pods/metric/name", "andon_queue"), "adapter-rule.yaml"),
    ("no CPU metric", "cpu", _set(SCALER, "spec/metrics/1", None), "fall back to cpu"),
    ("a nervous autoscaler", "cpu", _set(SCALER, "spec/behavior/scaleDown/stabilizationWindowSeconds", 0), "stabilized"),
    ("a single Pod", "production", _set(SCALER, "spec/minReplicas", 1), "minReplicas"),
    ("two owners of replicas", "cpu", _set(WORKER, "spec/replicas", 2), "belongs to the autoscaler"),
    ("threads of the node", "cpu", _drop_setting(_gateway, "ANDON_CORES"), "must be the resource requests.cpu"),
    ("threads of a limit", "gpu", _core_source(_worker, "limits.cpu"), "must be the resource requests.cpu"),
    ("a Pod of two cores", "cpu", _set(WORKER, f"{FIRST}/resources/requests/cpu", "2"), "do not fit on a node of two"),
    ("a Pod of many millicores", "local", _set(GATEWAY, f"{FIRST}/resources/requests/cpu", "1501m"), "do not fit on a node of two"),
    ("no spread", "cpu", _set(WORKER, f"{POD}/topologySpreadConstraints", None), "must spread over"),
    ("no preference", "cpu", _set(WORKER, f"{POD}/affinity", None), "must prefer other zones"),
    ("a foreign preference", "cpu", _set(GATEWAY, f"{TERM}/labelSelector/matchLabels", {"a": "b"}), "does not take its own Pods"),
    ("a soft spread over zones", "cpu", _append(_worker, "topologySpreadConstraints", ZONES), "lose every soft spread"),
    ("drained nodes counted", "production", _set(WORKER, f"{POD}/topologySpreadConstraints/0/nodeTaintsPolicy", None), "must be Honor"),
    ("drained nodes counted by name", "production", _set(GATEWAY, f"{POD}/topologySpreadConstraints/0/nodeTaintsPolicy", "Ignore"), "must be Honor"),
    ("a lax spread", "production", _set(WORKER, f"{POD}/topologySpreadConstraints/0/whenUnsatisfiable", "ScheduleAnyway"), "strictly"),
    ("no device", "gpu", _set(WORKER, f"{FIRST}/resources/limits", {"memory": "1Gi"}), "go together"),
    ("a device unused", "gpu", _setting(_worker, "ANDON_DEVICE", "cpu"), "go together"),
    ("no toleration", "gpu", _set(WORKER, f"{POD}/tolerations", None), "must tolerate"),
    ("any node", "gpu", _set(WORKER, f"{POD}/nodeSelector", None), "must select nodes"),
    ("the image without CUDA", "gpu", _set(WORKER, f"{FIRST}/image", "andon:0.1.0"), "built for devices"),
    ("a port of no container", "cpu", _set("Service/andon-gateway", "spec/ports/0/targetPort", "web"), "is no port of"),
    ("no protocol", "cpu", _set("Service/andon-gateway", "spec/ports/1/appProtocol", None), "appProtocol kubernetes.io/h2c"),
    ("another protocol", "cpu", _set("Service/andon-gateway", "spec/ports/0/appProtocol", "https"), "appProtocol http"),
    ("clear text before TLS", "production", _set("Service/andon-gateway", "spec/ports/1/appProtocol", "kubernetes.io/h2c"), "appProtocol https"),
    ("no HTTP for callers", "cpu", lambda o: _get(o, "Service/andon-gateway")["spec"]["ports"].pop(0), "has no port http"),
    ("a port that nothing serves", "cpu", _set(GATEWAY, f"{FIRST}/ports/0/containerPort", 8080), "but it serves"),
    ("a served port that is not named", "cpu", _setting(_worker, "ANDON_ADMIN_ADDR", "0.0.0.0:9000"), "but it serves"),
    ("a gateway that cannot start", "cpu", _setting(_gateway, "ANDON_INSECURE", "false"), "either ANDON_INSECURE"),
    ("administrators by accident", "cpu", _new_setting(_gateway, "ANDON_INSECURE_ADMIN", "true"), "nobody an administrator"),
    ("administrators by a flag", "gpu", _set(GATEWAY, f"{FIRST}/args", ["gateway", "--insecure-admin"]), "nobody an administrator"),
    ("administrators by accident, locally", "local", _new_setting(_gateway, "ANDON_INSECURE_ADMIN", "true"), "nobody an administrator"),
    ("keys over clear text in production", "production", _setting(_gateway, "ANDON_REQUIRE_TLS", "false"), "ANDON_REQUIRE_TLS"),
    ("nobody authenticated in production", "production", _setting(_gateway, "ANDON_INSECURE", "true"), "must be false"),
    ("no keys in production", "production", _setting(_gateway, "ANDON_KEYS", ""), "ANDON_KEYS must be given"),
    ("a policy that is not there", "production", _setting(_gateway, "ANDON_POLICY", "/etc/andon/policy/other.toml"), "has no other.toml"),
    ("a certificate that is never renewed", "production", _set(GATEWAY, f"{FIRST}/volumeMounts/2/subPath", "tls.crt"), "a whole volume"),
    ("keys outside a Secret", "production", _set(GATEWAY, f"{POD}/volumes/1", {"name": "keys", "configMap": {"name": "andon-policy"}}), "must be a secret"),
    ("keys that all may read", "production", _set(GATEWAY, f"{POD}/volumes/1/secret/defaultMode", 0o444), "readable by others"),
    ("a gRPC probe before TLS", "production", _set(GATEWAY, f"{FIRST}/readinessProbe", {"grpc": {"port": 8001}}), "since callers come over TLS"),
    ("life that is readiness, over HTTP", "production", _set(GATEWAY, f"{FIRST}/livenessProbe/httpGet/path", "/readyz"), "since callers come over TLS"),
    ("a cluster IP for workers", "cpu", _set("Service/andon-workers", "spec/clusterIP", None), "must be headless"),
    ("unready addresses", "cpu", _set("Service/andon-workers", "spec/publishNotReadyAddresses", True), "must be headless"),
    ("a worker that is not found", "cpu", _set("Service/andon-workers", "spec/selector", {"andon/model": "digits"}), "does not take the Pods"),
    ("a wrong name of workers", "cpu", _setting(_gateway, "ANDON_WORKER_DNS", "workers:8001"), "which is no Service"),
    ("a wrong port of workers", "cpu", _setting(_gateway, "ANDON_WORKER_DNS", "andon-workers:8000"), "has no port 8000"),
    ("no default deny", "cpu", _drop("NetworkPolicy/default-deny"), "denies everything"),
    ("no path in", "cpu", _drop("NetworkPolicy/callers-to-gateway"), "a caller must reach"),
    ("no path out of the gateway", "cpu", _drop("NetworkPolicy/gateway-to-workers"), "Deployment/andon-gateway must reach"),
    ("no path into workers", "cpu", _drop("NetworkPolicy/workers-from-gateway"), "Deployment/andon-gateway must reach"),
    ("no names", "cpu", _drop("NetworkPolicy/dns"), "must reach the resolver"),
    ("no metrics", "cpu", _drop("NetworkPolicy/telemetry"), "the monitoring must reach"),
    ("HTTP closed to callers", "cpu", _set("NetworkPolicy/callers-to-gateway", "spec/ingress/0/ports", [{"protocol": "TCP", "port": 8001}]), "on TCP 8000"),
    ("anyone may call", "cpu", _set("NetworkPolicy/callers-to-gateway", "spec/ingress/0/from", None), "a stranger must not reach"),
    ("workers open to callers", "cpu", _set("NetworkPolicy/workers-from-gateway", "spec/ingress/0/from", [{"namespaceSelector": {}}]), "a caller must not reach"),
    ("a path to anywhere", "cpu", _set("NetworkPolicy/gateway-to-workers", "spec/egress", [{}]), "must not reach a stranger"),
]

KNOWN = {"a_total", "b_seconds"}
PANEL = {"id": 1, "title": "t", "type": "timeseries", "gridPos": {"x": 0, "y": 0, "w": 12, "h": 8}, "targets": [{"expr": "a_total"}]}
ALERT = """
groups:
  - rules:
      - alert: A
        expr: %s
        labels: {severity: %s}
        annotations: {summary: a sentence of some length, runbook: "%s"}
"""
RUNBOOK = "what to do, in a sentence"


def _board(*panels):
    return json.dumps({"panels": panels})


RULES, TESTS = telemetry.alert_texts()
ALERTS = re.findall(r"(?m)^      - alert: (\w+)$", RULES)
# Where nobody authenticates, and a drain of 70 s.
CONTAINER = """
services:
  a:
    image: andon:1
    read_only: true
    cap_drop: [ALL]
    stop_grace_period: %s
    environment: {ANDON_INSECURE: "true", ANDON_INSECURE_ADMIN: "%s", ANDON_DRAIN_DELAY: 5s, ANDON_DRAIN_DEADLINE: 65s}
    ports: ["%s:8001"]
"""
HERE = "127.0.0.1:8001"
# `echo` for a binary repeats the arguments, as its help.
SETTING = {
    "kind": "Deployment", "metadata": {"name": "a"},
    "spec": {"template": {"spec": {"containers": [{"args": ["gateway"], "env": [{"name": "ANDON_X"}]}]}}},
}
DOCKERFILE = "ARG A=1.0.0\nFROM scratch:${A} AS %s\n%s\n"


@functools.cache
def _mute():
    """What promtool says when no alert fires."""
    rules = yaml.safe_load(RULES)
    for group in rules["groups"]:
        for rule in group["rules"]:
            rule["expr"] = "vector(1) > 1"
    return list(telemetry.alert_outcomes(yaml.safe_dump(rules), TESTS))


def _changed(old, new):
    """What promtool says of the alerts with one change."""
    if RULES.count(old) != 1:
        return [f"{old!r} is not once in the rules"]
    return list(telemetry.alert_outcomes(RULES.replace(old, new), TESTS))


def _unread(text, checked):
    """What a check says of a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "file.yaml")
        path.write_text(text)
        return list(checked(path))


# What is broken, the faults found, and words that one of them must contain.
TEXT_FAULTS = [
    *((f"{alert} is mute", _mute, alert) for alert in ALERTS),
    ("an outage that is not seen", lambda: _changed("> 0.02", "> 0.03"), "AndonOutage"),
    ("an outage of a few calls", lambda: _changed("> 5\n", "> 1\n"), "AndonOutage"),
    ("an outage of calls that are seldom", lambda: _changed("> 5\n", "> 10\n"), "AndonOutage"),
    ("an outage that is waited for", lambda: _changed("[5m])) > 5\n          )\n", "[5m])) > 5\n          )\n        for: 5m\n"), "AndonOutage"),
    ("gateways that are not missed", lambda: _changed("absent(andon_gateway_in_flight)", "andon_gateway_in_flight < 0"), "AndonNoGateway"),
    ("gateways that are missed for ever", lambda: _changed("absent(andon_gateway_in_flight)", "absent(andon_gateway_in_flight > 3)"), "AndonNoGateway"),
    ("a worker that is away for a moment", lambda: _changed("andon_discovery_errors_total[5m])) > 0\n        for: 10m", "andon_discovery_errors_total[5m])) > 0\n        for: 1m"), "AndonDiscoveryFails"),
    ("an alert without a test", lambda: telemetry.alert_tests(ALERT % ("a_total", "page", RUNBOOK), TESTS), "no test of alerts_test.yaml"),
    ("a configuration that Prometheus refuses", lambda: _unread("scrape_config: []", telemetry.scraping), "promtool check config"),
    ("a file that is no YAML", lambda: _unread("a: [", lambda path: telemetry.malformed([path])), "file.yaml"),
    ("a query of nothing", lambda: telemetry.query_faults("q", "vector(1)", KNOWN), "reads no metric"),
    ("a package without a version", lambda: check.requirement_faults("pyyaml\n"), "exact version"),
    ("a package of many versions", lambda: check.requirement_faults("pyyaml>=6\n"), "exact version"),
    ("a Dockerfile that the linter refuses", lambda: check.dockerfile_faults("FROM debian\nRUN cd /tmp\n"), "hadolint"),
    ("no target", lambda: check.dockerfile_faults(DOCKERFILE % ("cpu", "USER 65532:65532")), "has no target cuda"),
    ("a target that runs as root", lambda: check.dockerfile_faults(DOCKERFILE % ("cpu", "USER 0:0")), "cpu must run as user"),
    ("a setting that the binary does not know", lambda: check.setting_faults([SETTING], "echo"), "does not name ANDON_X"),
    ("compose without administrators", lambda: telemetry.compose(CONTAINER % ("90s", "false", HERE)), "ANDON_INSECURE_ADMIN"),
    ("compose open to the network", lambda: telemetry.compose(CONTAINER % ("90s", "true", "8001")), "belong to 127.0.0.1"),
    ("compose open to all addresses", lambda: telemetry.compose(CONTAINER % ("90s", "true", "0.0.0.0:8001")), "belong to 127.0.0.1"),
    ("a short stop", lambda: telemetry.compose(CONTAINER % ("75s", "true", HERE)), "stop_grace_period"),
    ("an unknown metric", lambda: telemetry.query_faults("q", "rate(c_total[5m])", KNOWN), "no metric is named c_total"),
    ("an unknown histogram", lambda: telemetry.query_faults("q", "rate(a_seconds_bucket[5m])", KNOWN), "a_seconds_bucket"),
    ("a broken query", lambda: telemetry.query_faults("q", "sum(rate(a_total[5m])", KNOWN), "q: "),
    ("a range where none may be", lambda: telemetry.query_faults("q", "sum(a_total[5m])", KNOWN), "q: "),
    ("panels on panels", lambda: telemetry.dashboard(_board(PANEL, {**PANEL, "id": 2}), KNOWN), "lies over"),
    ("one id for two", lambda: telemetry.dashboard(_board(PANEL, PANEL), KNOWN), "one id"),
    ("an empty panel", lambda: telemetry.dashboard(_board({**PANEL, "targets": []}), KNOWN), "no query"),
    ("an alert without urgency", lambda: telemetry.alerts(ALERT % ("a_total", "x", RUNBOOK), KNOWN), "severity"),
    ("an alert without advice", lambda: telemetry.alerts(ALERT % ("a_total", "page", ""), KNOWN), "needs a runbook"),
    ("an alert on nothing", lambda: telemetry.alerts(ALERT % ("c_total", "page", RUNBOOK), KNOWN), "no metric is named"),
    ("a base by its minor version", lambda: check.base_faults("ARG A=1.95\nFROM rust:${A} AS rust\n"), "exact version"),
    ("a base without an ARG", lambda: check.base_faults("FROM rust:1.95.0 AS rust\n"), "exact version"),
    ("an unpinned image", lambda: telemetry.compose("services: {a: {image: x}}"), "not pinned"),
    ("a missing dependency", lambda: telemetry.compose("services: {a: {image: 'x:1', depends_on: {b: {}}}}"), "does not exist"),
    ("a container with rights", lambda: telemetry.compose("services: {a: {image: 'andon:1'}}"), "read-only"),
]
SOUND = [
    ("compose on one machine", lambda: telemetry.compose(CONTAINER % ("90s", "true", HERE))),
    ("packages", lambda: check.requirement_faults("a-b==1.2\nc==3\n")),
    ("a histogram", lambda: telemetry.query_faults("q", "rate(b_seconds_bucket[$__rate_interval])", KNOWN)),
    ("a base by its version", lambda: check.base_faults("ARG A=1.95.0-slim\nFROM rust:${A} AS a\nFROM a AS b\nFROM scratch AS c\n")),
    ("an alert", lambda: telemetry.alerts(ALERT % ("a_total > 1", "page", RUNBOOK), KNOWN)),
    ("a dashboard", lambda: telemetry.dashboard(_board(PANEL), KNOWN)),
]


def run_all(rendered):
    """Prints what was not found; exit status 1 if anything was not."""
    reached = Reached(check, network, telemetry, workloads)
    sys.settrace(reached.trace)
    missed = _missed_faults(rendered)
    sys.settrace(None)
    missed += [f"no fault reaches {rule}" for rule in reached.others()]
    count = len(OBJECT_FAULTS) + len(TEXT_FAULTS)
    print(f"self-test: {count - len(missed)} of {count} faults found")
    for text in missed:
        print(f"  {text}")
    return 1 if missed else 0


def _missed_faults(rendered):
    missed = [f"{what}: {text}" for what, check_sound in SOUND for text in check_sound()]
    for what, overlay, break_it, words in OBJECT_FAULTS:
        objects = copy.deepcopy(rendered[overlay])
        break_it(objects)
        missed += _missed(what, list(check.overlay_faults(objects, overlay)), words)
    for what, find, words in TEXT_FAULTS:
        missed += _missed(what, list(find()), words)
    return missed


def _missed(what, found, words):
    if any(words in fault for fault in found):
        return []
    return [f"{what}: expected {words!r}, found {found}"]


class Reached:
    """Which lines of the checks were run, to find the rules that no fault reaches."""

    def __init__(self, *modules):
        self.lines = {module.__file__: set() for module in modules}

    def trace(self, frame, _event, _argument):
        """For sys.settrace: follows the functions of the checks alone."""
        lines = self.lines.get(frame.f_code.co_filename)
        if lines is None:
            return None

        def follow(frame, event, _argument):
            if event == "line":
                lines.add(frame.f_lineno)
            return follow
        return follow

    def others(self):
        """The file and line of each `yield` of a fault that was never run."""
        for path, lines in self.lines.items():
            for node in ast.walk(ast.parse(Path(path).read_text())):
                if isinstance(node, ast.Expr) and isinstance(node.value, ast.Yield) and node.lineno not in lines:
                    yield f"{Path(path).name}:{node.lineno}"
