"""What must hold for every Deployment and what stands around it."""

from objects import (
    cores, environment, is_worker, main_container, matches, name_of, of_kind, pod_labels, pod_spec, quantity,
    seconds, speaks_tls,
)

# How long the stock CoreDNS, and a cache on the node, give the address of a Pod
# that has left a headless Service, and do not know its successor's.
DNS_CACHED_S = 30
# How often a gateway resolves names, unless it is told otherwise.
DNS_INTERVAL = "5s"
# What a process that waits for CPU may be late with its drain, and its exit.
DRAIN_SPARE_S = 10
# What the smallest node has for Pods: two cores, of which the kubelet and the
# Pods of every node take their part.
NODE_CORES = 1.5
VOLUMES_ALLOWED = {
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret",
}


def unique(objects, _overlay):
    """No two objects have one kind and name; all are in the namespace `andon`."""
    seen = set()
    for item in objects:
        if name_of(item) in seen:
            yield f"{name_of(item)} appears twice"
        seen.add(name_of(item))
        if item["kind"] != "Namespace" and item["metadata"].get("namespace") != "andon":
            yield f"{name_of(item)} is not in the namespace andon"


def namespace(objects, _overlay):
    """The namespace itself enforces restricted Pod Security."""
    labels = [item["metadata"].get("labels", {}) for item in of_kind(objects, "Namespace")]
    if [entry.get("pod-security.kubernetes.io/enforce") for entry in labels] != ["restricted"]:
        yield "there must be one Namespace, and it must enforce restricted Pod Security"


def expected(objects, _overlay):
    """There is a gateway, and a worker for each model."""
    names = {item["metadata"]["name"] for item in of_kind(objects, "Deployment")}
    for name in {"andon-gateway", "andon-worker-minilm", "andon-worker-digits"} - names:
        yield f"Deployment/{name} is missing"


def selectors(objects, _overlay):
    """Every selector takes the Pods it is meant for, and no selector takes two Deployments' Pods."""
    deployments = of_kind(objects, "Deployment")
    for deployment in deployments:
        taken = [name_of(other) for other in deployments
                 if matches(deployment["spec"]["selector"], pod_labels(other))]
        if taken != [name_of(deployment)]:
            yield f"{name_of(deployment)}: its selector takes the Pods of {taken}"
        for term in pod_spec(deployment).get("topologySpreadConstraints", []) + _preferences(deployment):
            if not matches(term.get("labelSelector"), pod_labels(deployment)):
                yield f"{name_of(deployment)}: the spread over {term['topologyKey']} does not take its own Pods"
    for item in of_kind(objects, "Service"):
        if not any(matches({"matchLabels": item["spec"].get("selector")}, pod_labels(d)) for d in deployments):
            yield f"{name_of(item)}: its selector takes no Pods"


def rollout(objects, _overlay):
    """A rollout takes no Pod away before its successor is ready."""
    for deployment in of_kind(objects, "Deployment"):
        rolling = deployment["spec"].get("strategy", {}).get("rollingUpdate", {})
        if rolling.get("maxUnavailable") != 0:
            yield f"{name_of(deployment)}: maxUnavailable must be 0"
        if not rolling.get("maxSurge"):
            yield f"{name_of(deployment)}: maxSurge must be at least 1"


def drain(objects, _overlay):
    """The longest call that a leaving Pod still takes can finish before the Pod is killed."""
    for deployment in of_kind(objects, "Deployment"):
        settings, spec, name = environment(deployment), pod_spec(deployment), name_of(deployment)
        try:
            delay, deadline, longest = (
                seconds(settings.get(key))
                for key in ("ANDON_DRAIN_DELAY", "ANDON_DRAIN_DEADLINE", "ANDON_DEADLINE_MAX"))
        except ValueError as error:
            yield f"{name}: the settings of the drain: {error}"
            continue
        pre_stop = main_container(deployment).get("lifecycle", {}).get("preStop", {})
        if set(pre_stop) != {"sleep"}:
            yield f"{name}: preStop must be a sleep action (the image has no shell)"
            continue
        # The delay runs before the deadline does.
        if deadline < longest:
            yield f"{name}: the drain deadline {deadline} s is shorter than the longest call, {longest} s"
        needed = pre_stop["sleep"]["seconds"] + delay + deadline + DRAIN_SPARE_S
        if spec.get("terminationGracePeriodSeconds", 30) < needed:
            yield f"{name}: the grace period must be that of preStop and the drain with {DRAIN_SPARE_S} s to spare, {needed} s"


def leaving(objects, _overlay):
    """A worker serves until no gateway has its address, though DNS is cached."""
    gateways = [d for d in of_kind(objects, "Deployment") if not is_worker(d)]
    intervals = [environment(gateway).get("ANDON_DNS_INTERVAL", DNS_INTERVAL) for gateway in gateways]
    needed = DNS_CACHED_S + max(map(seconds, intervals), default=0)
    for deployment in filter(is_worker, of_kind(objects, "Deployment")):
        sleep = main_container(deployment).get("lifecycle", {}).get("preStop", {}).get("sleep", {})
        if sleep.get("seconds", 0) < needed:
            yield f"{name_of(deployment)}: preStop must outlast cached DNS and the gateway's interval, {needed} s"


def memory(objects, _overlay):
    """Messages in flight cannot fill the memory that the container has: by default they have half of it."""
    for deployment in of_kind(objects, "Deployment"):
        flying = environment(deployment).get("ANDON_BYTES_IN_FLIGHT_MAX")
        if flying is None:
            continue
        limit = main_container(deployment).get("resources", {}).get("limits", {}).get("memory", "0")
        if 2 * quantity(flying.removesuffix("B")) > quantity(limit):
            yield f"{name_of(deployment)}: {flying} in flight are more than half of the memory limit {limit}"


def ports(objects, _overlay):
    """Each address that is served is a port of the container, under its name, and there are no others."""
    for deployment in of_kind(objects, "Deployment"):
        settings, name = environment(deployment), name_of(deployment)
        names = {"ANDON_GRPC_ADDR": "grpc", "ANDON_ADMIN_ADDR": "metrics"}
        if not is_worker(deployment):
            names["ANDON_HTTP_ADDR"] = "http"
        served = {port: (settings.get(setting) or "").rpartition(":")[2] for setting, port in names.items()}
        found = {p["name"]: str(p["containerPort"]) for p in main_container(deployment).get("ports", [])}
        if found != served:
            yield f"{name}: the ports of the container are {found}, but it serves {served}"


def identity(objects, overlay):
    """A gateway declares that it authenticates nobody, or has its policy, keys and certificate; in production it has them."""
    for deployment in of_kind(objects, "Deployment"):
        if is_worker(deployment):
            continue
        settings, name = environment(deployment), name_of(deployment)
        insecure, has_policy = settings.get("ANDON_INSECURE") == "true", bool(settings.get("ANDON_POLICY"))
        if insecure == has_policy:
            yield f"{name}: either ANDON_INSECURE is true or there is an ANDON_POLICY"
        if "ANDON_INSECURE_ADMIN" in settings or "--insecure-admin" in main_container(deployment).get("args", []):
            yield f"{name}: a network that lets calls pass makes nobody an administrator: no insecure-admin"
        if overlay == "production" and insecure:
            yield f"{name}: in production callers authenticate: ANDON_INSECURE must be false"
        if overlay == "production" and settings.get("ANDON_REQUIRE_TLS") != "true":
            yield f"{name}: in production no key comes over clear text: ANDON_REQUIRE_TLS must be true"
        files = {"ANDON_POLICY": "configMap", "ANDON_KEYS": "secret", "ANDON_TLS_CERT": "secret", "ANDON_TLS_KEY": "secret"}
        for setting, kind in files.items():
            path = settings.get(setting)
            if path:
                yield from (f"{name}: {setting}: {fault}" for fault in _mounted(objects, deployment, path, kind))
            elif overlay == "production":
                yield f"{name}: in production {setting} must be given"


def _mounted(objects, deployment, path, kind):
    """Faults of a file that is read again when it changes: its folder is a whole volume, read-only."""
    folder, _, file = path.rpartition("/")
    mounts = [m for m in main_container(deployment).get("volumeMounts", []) if m["mountPath"] == folder]
    if len(mounts) != 1 or mounts[0].get("readOnly") is not True or "subPath" in mounts[0]:
        yield f"a whole volume must be mounted read-only at {folder}"
        return
    volume = next((v for v in pod_spec(deployment).get("volumes", []) if v["name"] == mounts[0]["name"]), {})
    if kind not in volume:
        yield f"the volume at {folder} must be a {kind}"
    elif kind == "configMap":
        maps = {item["metadata"]["name"]: item.get("data", {}) for item in of_kind(objects, "ConfigMap")}
        if file not in maps.get(volume["configMap"]["name"], {}):
            yield f"the ConfigMap {volume['configMap']['name']} has no {file}"
    elif volume["secret"].get("defaultMode", 0o644) & 0o007:
        yield f"the Secret at {folder} must not be readable by others"


def probes(objects, _overlay):
    """Startup, readiness and liveness ask over gRPC, and liveness does not ask for readiness."""
    for deployment in of_kind(objects, "Deployment"):
        if speaks_tls(deployment):
            yield from _web_probes(deployment)
            continue
        container, name = main_container(deployment), name_of(deployment)
        grpc_ports = {port["containerPort"] for port in container.get("ports", []) if port["name"] == "grpc"}
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            probe = container.get(kind, {}).get("grpc")
            if probe is None:
                yield f"{name}: {kind} must be a gRPC probe"
                continue
            if probe["port"] not in grpc_ports:
                yield f"{name}: {kind} probes port {probe['port']}, which is not the port named grpc"
            service = probe.get("service", "")
            if kind == "readinessProbe" and service != "":
                yield f"{name}: readinessProbe must ask for the empty name, which follows readiness"
            if kind == "livenessProbe" and service != "andon.live":
                yield f"{name}: livenessProbe must ask for andon.live: an unready Pod is not a dead one"
            if kind == "startupProbe" and service == "" and not is_worker(deployment):
                yield f"{name}: startupProbe must not wait for workers: ask for andon.live"


def _web_probes(deployment):
    """The kubelet's gRPC probes speak no TLS: the port of metrics is probed in clear text."""
    container, name = main_container(deployment), name_of(deployment)
    for kind, path in (("startupProbe", "/livez"), ("readinessProbe", "/readyz"), ("livenessProbe", "/livez")):
        expected = {"port": "metrics", "path": path}
        if container.get(kind, {}).get("httpGet") != expected or "grpc" in container[kind]:
            yield f"{name}: {kind} must be an HTTP probe of {path} on the port metrics, since callers come over TLS"


def containers(objects, _overlay):
    """Images are pinned, resources are stated, and service links cannot be read as settings."""
    for deployment in of_kind(objects, "Deployment"):
        spec, name = pod_spec(deployment), name_of(deployment)
        if spec.get("enableServiceLinks") is not False:
            yield f"{name}: enableServiceLinks must be false, or Services become ANDON_ settings"
        for container in spec["containers"] + spec.get("initContainers", []):
            image = container["image"]
            tag = image.rsplit("/", 1)[-1].partition(":")[2]
            if "@sha256:" not in image and tag in ("", "latest"):
                yield f"{name}: the image {image} of {container['name']} is not pinned"
            resources = container.get("resources", {})
            if not {"cpu", "memory"} <= set(resources.get("requests", {})) or "memory" not in resources.get("limits", {}):
                yield f"{name}: {container['name']} must request cpu and memory and limit memory"


def pod_security(objects, _overlay):
    """The restricted profile of Pod Security, and a read-only root besides."""
    for deployment in of_kind(objects, "Deployment"):
        spec, name = pod_spec(deployment), name_of(deployment)
        for field in ("hostNetwork", "hostPID", "hostIPC"):
            if spec.get(field):
                yield f"{name}: {field} is not restricted"
        for volume in spec.get("volumes", []):
            if not set(volume) - {"name"} <= VOLUMES_ALLOWED:
                yield f"{name}: the volume {volume['name']} is of a kind that is not restricted"
        for container in spec["containers"] + spec.get("initContainers", []):
            for fault in _container_security(spec.get("securityContext", {}), container):
                yield f"{name}: {container['name']}: {fault}"


def _container_security(pod, container):
    own = container.get("securityContext", {})
    both = {**pod, **own}
    if both.get("runAsNonRoot") is not True or both.get("runAsUser") in (None, 0):
        yield "must run as a named user that is not root"
    if both.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield "must have the seccomp profile RuntimeDefault"
    if own.get("privileged") or own.get("procMount"):
        yield "must not be privileged"
    if own.get("allowPrivilegeEscalation") is not False:
        yield "must not allow privilege escalation"
    if own.get("capabilities", {}).get("drop") != ["ALL"] or own["capabilities"].get("add"):
        yield "must drop ALL capabilities and add none"
    if own.get("readOnlyRootFilesystem") is not True:
        yield "must have a read-only root filesystem"
    if any("hostPort" in port for port in container.get("ports", [])):
        yield "must not use a port of its node"


def tokens(objects, _overlay):
    """No Pod gets a token for the Kubernetes API."""
    accounts = {item["metadata"]["name"]: item for item in of_kind(objects, "ServiceAccount")}
    for account in accounts.values():
        if account.get("automountServiceAccountToken") is not False:
            yield f"{name_of(account)}: automountServiceAccountToken must be false"
    for deployment in of_kind(objects, "Deployment"):
        spec = pod_spec(deployment)
        if spec.get("automountServiceAccountToken") is not False:
            yield f"{name_of(deployment)}: automountServiceAccountToken must be false"
        if spec.get("serviceAccountName") not in accounts:
            yield f"{name_of(deployment)}: its service account {spec.get('serviceAccountName')} does not exist"


def weights(objects, overlay):
    """A worker's weights come by a volume that it cannot write."""
    for deployment in filter(is_worker, of_kind(objects, "Deployment")):
        name, container = name_of(deployment), main_container(deployment)
        repository = environment(deployment).get("ANDON_REPOSITORY")
        mounts = {mount["mountPath"]: mount for mount in container.get("volumeMounts", [])}
        mount = mounts.get(repository)
        if mount is None:
            yield f"{name}: nothing is mounted at its repository {repository}"
            continue
        if mount.get("readOnly") is not True:
            yield f"{name}: the weights must be mounted read-only"
        volume = next((v for v in pod_spec(deployment).get("volumes", []) if v["name"] == mount["name"]), {})
        claim = volume.get("persistentVolumeClaim")
        if overlay == "local":
            if "emptyDir" not in volume or not pod_spec(deployment).get("initContainers"):
                yield f"{name}: the weights of the overlay local must come from an image"
        elif not claim or claim.get("readOnly") is not True:
            yield f"{name}: the weights must come from a claim, read-only"
        elif claim["claimName"] not in {c["metadata"]["name"] for c in of_kind(objects, "PersistentVolumeClaim")}:
            yield f"{name}: the claim {claim['claimName']} does not exist"
    for item in of_kind(objects, "PersistentVolumeClaim"):
        if item["spec"].get("accessModes") != ["ReadOnlyMany"]:
            yield f"{name_of(item)}: many nodes mount the weights, read-only: ReadOnlyMany alone"


def disruption(objects, _overlay):
    """Each Deployment has one budget of its own, which still lets a node be drained."""
    for deployment in of_kind(objects, "Deployment"):
        budgets = [item for item in of_kind(objects, "PodDisruptionBudget")
                   if matches(item["spec"].get("selector"), pod_labels(deployment))]
        if len(budgets) != 1:
            yield f"{name_of(deployment)}: {len(budgets)} PodDisruptionBudgets take its Pods; there must be one"
        elif budgets[0]["spec"].get("maxUnavailable") != 1:
            yield f"{name_of(budgets[0])}: maxUnavailable must be 1"


def autoscaling(objects, overlay):
    """Each Deployment is scaled by its queue, and by CPU where the queue cannot be read."""
    deployments = {item["metadata"]["name"]: item for item in of_kind(objects, "Deployment")}
    scaled = set()
    for scaler in of_kind(objects, "HorizontalPodAutoscaler"):
        target = deployments.get(scaler["spec"]["scaleTargetRef"]["name"])
        if target is None:
            yield f"{name_of(scaler)}: its target {scaler['spec']['scaleTargetRef']['name']} does not exist"
            continue
        scaled.add(target["metadata"]["name"])
        read = [m["pods"]["metric"]["name"] for m in scaler["spec"].get("metrics", []) if m["type"] == "Pods"]
        queue = "andon_worker_queue_rows" if is_worker(target) else "andon_gateway_in_flight"
        if read != [queue]:
            yield f"{name_of(scaler)}: must read {queue}, not {read}"
        if not any(m["type"] == "Resource" and m["resource"]["name"] == "cpu" for m in scaler["spec"]["metrics"]):
            yield f"{name_of(scaler)}: must fall back to cpu"
        if scaler["spec"].get("behavior", {}).get("scaleDown", {}).get("stabilizationWindowSeconds", 0) < 60:
            yield f"{name_of(scaler)}: scaling down must be stabilized for a minute or more"
        if overlay != "local" and scaler["spec"].get("minReplicas", 1) < 2:
            yield f"{name_of(scaler)}: one Pod alone is no service: minReplicas must be 2 or more"
        if "replicas" in target["spec"]:
            yield f"{name_of(target)}: replicas belongs to the autoscaler"
    for name in set(deployments) - scaled:
        yield f"Deployment/{name}: no HorizontalPodAutoscaler scales it"


def threads(objects, _overlay):
    """A process has as many threads as its Pod reserves cores, whatever its node has."""
    for deployment in of_kind(objects, "Deployment"):
        container, name = main_container(deployment), name_of(deployment)
        sources = [e.get("valueFrom", {}).get("resourceFieldRef", {}) for e in container.get("env", [])
                   if e["name"] == "ANDON_CORES"]
        if [source.get("resource") for source in sources] != ["requests.cpu"]:
            yield f"{name}: ANDON_CORES must be the resource requests.cpu: without a limit, all cores of the node are seen"


def fit(objects, overlay):
    """Each Pod of the overlays for any cluster fits on a node of two cores."""
    for deployment in of_kind(objects, "Deployment") if overlay in ("local", "cpu") else []:
        spec = pod_spec(deployment)
        asked = sum(cores(c["resources"]["requests"]["cpu"]) for c in spec["containers"]
                    if "cpu" in c.get("resources", {}).get("requests", {}))
        if asked > NODE_CORES:
            yield f"{name_of(deployment)}: {asked:g} cores do not fit on a node of two: at most {NODE_CORES:g}"


def _preferences(deployment):
    """The terms by which a Deployment's Pods prefer other places than each other's."""
    affinity = pod_spec(deployment).get("affinity", {}).get("podAntiAffinity", {})
    return [term["podAffinityTerm"] for term in affinity.get("preferredDuringSchedulingIgnoredDuringExecution", [])]


def spread(objects, overlay):
    """Pods spread over nodes, strictly in production, and over zones where nodes have them."""
    for deployment in of_kind(objects, "Deployment"):
        name = name_of(deployment)
        constraints = {c["topologyKey"]: c for c in pod_spec(deployment).get("topologySpreadConstraints", [])}
        if "kubernetes.io/hostname" not in constraints:
            yield f"{name}: its Pods must spread over kubernetes.io/hostname"
        if "topology.kubernetes.io/zone" not in [term["topologyKey"] for term in _preferences(deployment)]:
            yield f"{name}: its Pods must prefer other zones, as podAntiAffinity"
        for key, constraint in constraints.items():
            soft = constraint["whenUnsatisfiable"] == "ScheduleAnyway"
            # A node that lacks one key gets no score from any of the constraints.
            if soft and key != "kubernetes.io/hostname":
                yield f"{name}: nodes without {key} lose every soft spread by that constraint: prefer it as podAntiAffinity"
            # A drained node counts as an empty one, which no Pod can join.
            if not soft and constraint.get("nodeTaintsPolicy") != "Honor":
                yield f"{name}: a strict spread must not count nodes that are drained: nodeTaintsPolicy must be Honor"
        strict = constraints.get("kubernetes.io/hostname", {}).get("whenUnsatisfiable") == "DoNotSchedule"
        if overlay == "production" and not strict:
            yield f"{name}: in production its Pods must spread strictly over nodes"


def devices(objects, overlay):
    """The overlay gpu, and it alone, uses devices, with all that this takes."""
    found = 0
    for deployment in of_kind(objects, "Deployment"):
        spec, container, name = pod_spec(deployment), main_container(deployment), name_of(deployment)
        limited = "nvidia.com/gpu" in container.get("resources", {}).get("limits", {})
        chosen = (environment(deployment).get("ANDON_DEVICE") or "").startswith("cuda")
        if limited != chosen:
            yield f"{name}: the limit nvidia.com/gpu and ANDON_DEVICE=cuda:… go together"
        if not limited:
            continue
        found += 1
        if not any(t.get("key") == "nvidia.com/gpu" for t in spec.get("tolerations", [])):
            yield f"{name}: must tolerate nvidia.com/gpu"
        if not spec.get("nodeSelector"):
            yield f"{name}: must select nodes that have a device"
        if not container["image"].endswith("-cuda"):
            yield f"{name}: must run the image built for devices, not {container['image']}"
    if (found > 0) != (overlay == "gpu"):
        yield f"{found} Deployments use a device in the overlay {overlay}"


CHECKS = [
    unique, namespace, expected, selectors, rollout, drain, leaving, memory, ports, identity, probes, containers, pod_security,
    tokens, weights, disruption, autoscaling, threads, fit, spread, devices,
]
