"""What the checks ask of rendered Kubernetes objects."""

import re

_UNITS_S = {"ms": 0.001, "s": 1, "m": 60, "h": 3600}


def name_of(item):
    """`Kind/name`, for messages."""
    return f"{item['kind']}/{item['metadata']['name']}"


def of_kind(objects, kind):
    """The objects of one kind."""
    return [item for item in objects if item["kind"] == kind]


def pod_labels(workload):
    """The labels of a Deployment's Pods."""
    return workload["spec"]["template"]["metadata"].get("labels", {})


def pod_spec(workload):
    """The spec of a Deployment's Pods."""
    return workload["spec"]["template"]["spec"]


def main_container(workload):
    """The one container that serves."""
    return pod_spec(workload)["containers"][0]


def is_worker(workload):
    """Whether a Deployment runs `andon worker`."""
    return pod_labels(workload).get("app.kubernetes.io/component") == "worker"


def environment(workload):
    """The settings of the serving container by variable name."""
    return {entry["name"]: entry.get("value") for entry in main_container(workload).get("env", [])}


def speaks_tls(workload):
    """Whether callers must come over TLS."""
    return bool(environment(workload).get("ANDON_TLS_CERT"))


def matches(selector, labels):
    """Whether a label selector takes these labels. None takes nothing, {} everything."""
    if selector is None:
        return False
    unknown = set(selector) - {"matchLabels"}
    if unknown:
        raise ValueError(f"this check does not understand a selector with {sorted(unknown)}")
    return all(labels.get(key) == value for key, value in (selector.get("matchLabels") or {}).items())


def seconds(text):
    """A duration such as 1m30s in seconds."""
    parts = re.findall(r"(\d+)(ms|s|m|h)", text or "")
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError(f"{text!r} is no duration")
    return sum(int(number) * _UNITS_S[unit] for number, unit in parts)


def quantity(text):
    """A number of bytes such as 512Mi."""
    found = re.fullmatch(r"(\d+)(Ki|Mi|Gi|Ti|)", str(text))
    if not found:
        raise ValueError(f"{text!r} is no number of bytes")
    return int(found[1]) * 1024 ** ["", "Ki", "Mi", "Gi", "Ti"].index(found[2])


def cores(text):
    """A number of cores such as 250m."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(m?)", str(text))
    if not found:
        raise ValueError(f"{text!r} is no number of cores")
    return float(found[1]) / (1000 if found[2] else 1)
