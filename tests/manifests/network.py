"""Who may talk to whom: Services and NetworkPolicies, evaluated as a cluster would."""

from dataclasses import dataclass, field

from objects import (
    environment, is_worker, main_container, matches, name_of, of_kind, pod_labels, speaks_tls,
)


@dataclass
class Peer:
    """One end of an edge: a Pod's labels, its namespace and that namespace's labels."""

    name: str
    namespace: str
    labels: dict = field(default_factory=dict)
    namespace_labels: dict = field(default_factory=dict)


CALLER = Peer("a caller", "shop", {"app": "shop"}, {"andon/caller": "true"})
STRANGER = Peer("a stranger", "elsewhere", {"app": "elsewhere"})
MONITORING = Peer("the monitoring", "monitoring", {}, {"kubernetes.io/metadata.name": "monitoring"})
RESOLVER = Peer("the resolver", "kube-system", {"k8s-app": "kube-dns"}, {"kubernetes.io/metadata.name": "kube-system"})


def services(objects, _overlay):
    """The ports of a Service are ports of every container behind it; workers are found by a headless one."""
    deployments = of_kind(objects, "Deployment")
    for item in of_kind(objects, "Service"):
        for deployment in deployments:
            if not matches({"matchLabels": item["spec"]["selector"]}, pod_labels(deployment)):
                continue
            ports = main_container(deployment).get("ports", [])
            known = {p["name"] for p in ports} | {p["containerPort"] for p in ports}
            for port in item["spec"]["ports"]:
                if port.get("targetPort", port["port"]) not in known:
                    yield f"{name_of(item)}: the port {port['name']} is no port of {name_of(deployment)}"
        behind = [d for d in deployments
                  if matches({"matchLabels": item["spec"]["selector"]}, pod_labels(d))]
        secured = any(speaks_tls(deployment) for deployment in behind)
        spoken = {"grpc": "kubernetes.io/h2c", "http": "http"}
        for port in item["spec"]["ports"]:
            expected = spoken.get(port["name"])
            expected = "https" if expected and secured else expected
            if port.get("appProtocol") != expected:
                yield f"{name_of(item)}: the port {port['name']} must have the appProtocol {expected}"
        for deployment in behind:
            if not is_worker(deployment):
                for name in {"http", "grpc"} - {port["name"] for port in item["spec"]["ports"]}:
                    yield f"{name_of(item)}: has no port {name}"
    yield from _discovery(objects)


def _discovery(objects):
    by_name = {item["metadata"]["name"]: item for item in of_kind(objects, "Service")}
    for deployment in of_kind(objects, "Deployment"):
        if is_worker(deployment):
            continue
        host, _, port = (environment(deployment).get("ANDON_WORKER_DNS") or "").partition(":")
        found = by_name.get(host)
        if found is None:
            yield f"{name_of(deployment)}: it looks for workers at {host!r}, which is no Service"
            continue
        if found["spec"].get("clusterIP") != "None" or found["spec"].get("publishNotReadyAddresses"):
            yield f"{name_of(found)}: must be headless and show ready Pods alone"
        if port not in {str(p["port"]) for p in found["spec"]["ports"]}:
            yield f"{name_of(deployment)}: {host} has no port {port}"
        for worker in filter(is_worker, of_kind(objects, "Deployment")):
            if not matches({"matchLabels": found["spec"]["selector"]}, pod_labels(worker)):
                yield f"{name_of(found)}: does not take the Pods of {name_of(worker)}"


def policies(objects, overlay):
    """Nothing may talk but for the edges that the fleet needs, and those all may."""
    rules = of_kind(objects, "NetworkPolicy")
    denies = [r for r in rules if r["spec"]["podSelector"] == {} and not r["spec"].get("ingress")
              and not r["spec"].get("egress") and set(r["spec"]["policyTypes"]) == {"Ingress", "Egress"}]
    if not denies:
        yield "there is no NetworkPolicy that denies everything by default"
    pods = [Peer(name_of(d), "andon", pod_labels(d)) for d in of_kind(objects, "Deployment")]
    workers = [p for p in pods if p.labels.get("app.kubernetes.io/component") == "worker"]
    gateways = [p for p in pods if p not in workers]

    doors = [(gateway, port) for gateway in gateways for port in (8000, 8001)]

    needed = [(CALLER, gateway, "TCP", port) for gateway, port in doors]
    needed += [(gateway, worker, "TCP", 8001) for gateway in gateways for worker in workers]
    needed += [(pod, RESOLVER, protocol, 53) for pod in pods for protocol in ("UDP", "TCP")]
    needed += [(MONITORING, pod, "TCP", 8002) for pod in pods]
    refused = [(CALLER, worker, "TCP", 8001) for worker in workers]
    refused += [(worker, gateway, "TCP", port) for gateway, port in doors for worker in workers]
    refused += [(pod, STRANGER, "TCP", 443) for pod in pods]
    refused += [(STRANGER, pod, "TCP", 8002) for pod in pods]
    if overlay != "local":
        refused += [(STRANGER, gateway, "TCP", port) for gateway, port in doors]
    for source, target, protocol, port in needed:
        if not _allowed(rules, source, target, protocol, port):
            yield f"NetworkPolicy: {source.name} must reach {target.name} on {protocol} {port}"
    for source, target, protocol, port in refused:
        if _allowed(rules, source, target, protocol, port):
            yield f"NetworkPolicy: {source.name} must not reach {target.name} on {protocol} {port}"


def _allowed(rules, source, target, protocol, port):
    return (_side(rules, "Egress", source, target, protocol, port)
            and _side(rules, "Ingress", target, source, protocol, port))


def _side(rules, direction, pod, peer, protocol, port):
    """Whether the policies on `pod` let this edge through on its side."""
    if pod.namespace != "andon":
        return True
    applying = [r["spec"] for r in rules
                if direction in r["spec"]["policyTypes"] and matches(r["spec"]["podSelector"], pod.labels)]
    clauses = [clause for spec in applying for clause in spec.get(direction.lower(), [])]
    peers = "to" if direction == "Egress" else "from"
    return not applying or any(
        _takes_peer(clause.get(peers), peer) and _takes_port(clause.get("ports"), protocol, port)
        for clause in clauses)


def _takes_peer(entries, peer):
    if not entries:
        return True
    for entry in entries:
        if set(entry) - {"podSelector", "namespaceSelector"}:
            raise ValueError(f"this check does not understand a peer with {sorted(entry)}")
        spaces = entry.get("namespaceSelector")
        near = peer.namespace == "andon" if spaces is None else matches(spaces, peer.namespace_labels)
        if near and matches(entry.get("podSelector", {}), peer.labels):
            return True
    return False


def _takes_port(entries, protocol, port):
    return not entries or any(
        entry.get("protocol", "TCP") == protocol and entry.get("port") in (None, port) for entry in entries)


CHECKS = [services, policies]
