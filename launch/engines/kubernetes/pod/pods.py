"""The pod of one node, the same under every target; `k8s/README.md` gives each field's reason."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from launch.engines.kubernetes.pod.fabrics import fabric_variables
from launch.engines.kubernetes.pod.monitoring import container_ports, probe
from launch.engines.kubernetes.pod.monitoring import variables as monitoring_variables
from launch.engines.kubernetes.pod.queues import gang_labels, pod_annotations, scheduler
from service.spec.kubernetes import (
    KubernetesSpec,
    MountSpec,
    SpreadSpec,
    VariableSpec,
    quantity,
)
from service.spec.models import Spec

Manifest = dict[str, Any]

SPEC_DIRECTORY = "/etc/evenstep"
RUNS_DIRECTORY = "/runs"
SECRETS_DIRECTORY = "/var/run/secrets/evenstep"
MEETING_SECRET = "secret"
"""The key, and so the file name, of the secret of the nodes."""

MAIN = "trainer"
"""The spec's name of the container that trains; a target may use another one."""

_RANK = "metadata.annotations['batch.kubernetes.io/job-completion-index']"


def labels(spec: Spec) -> dict[str, str]:
    """The labels of every object; `instance` is unique to the run, and selects its pods."""
    return {
        "app.kubernetes.io/name": "evenstep",
        "app.kubernetes.io/instance": spec.name,
        "app.kubernetes.io/component": "trainer",
        "app.kubernetes.io/managed-by": "evenstep",
        **(spec.kubernetes.labels if spec.kubernetes else {}),
    }


def own_pods(spec: Spec) -> Manifest:
    """The selector of the run's own pods."""
    return {"matchLabels": {"app.kubernetes.io/instance": spec.name}}


def claim_name(spec: Spec, cluster: KubernetesSpec) -> str:
    """The name of the claim for the runs."""
    return cluster.storage_claim or f"{spec.name}-runs"


def meeting_secret_name(spec: Spec) -> str:
    """The name of the Secret of the rendezvous."""
    return f"{spec.name}-meeting"


def pod_template(
    spec: Spec, cluster: KubernetesSpec, *, container: str, world: list[Manifest], subdomain: bool
) -> Manifest:
    """The template of every pod.

    Args:
        container: the target's name of the container that trains.
        world: the variables with the node's position, if the target does not set them.
        subdomain: whether the pods' names are in our own Service.
    """
    pod: Manifest = {
        "restartPolicy": "Never",
        **({"subdomain": spec.name} if subdomain else {}),
        "serviceAccountName": cluster.service_account or spec.name,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": cluster.grace_seconds,
        **_host_network(cluster),
        "securityContext": _identity(cluster),
        **_scheduling(spec, cluster),
        "containers": [_container(spec, cluster, container, world)],
        "volumes": _volumes(spec, cluster),
    }
    marks = pod_annotations(cluster, spec.name)
    own = {**labels(spec), **gang_labels(cluster, spec.name)}
    metadata = {"labels": own, **({"annotations": marks} if marks else {})}
    return {"metadata": metadata, "spec": pod}


def _host_network(cluster: KubernetesSpec) -> Manifest:
    if not cluster.loosened_security.host_network:
        return {}
    return {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}


def _identity(cluster: KubernetesSpec) -> Manifest:
    root = cluster.loosened_security.root
    user, groups = 0 if root else cluster.user, list(cluster.supplemental_groups)
    return {
        "runAsNonRoot": not root,
        "runAsUser": user,
        "runAsGroup": user,
        "fsGroup": cluster.user,
        "fsGroupChangePolicy": "OnRootMismatch",
        **({"supplementalGroups": groups} if groups else {}),
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def literal(text: str) -> str:
    """A value or an argument of a container that Kubernetes leaves as `text`.

    It replaces `$(NAME)` by the value of a variable, and `$$` by `$`.
    Source: https://kubernetes.io/docs/reference/kubernetes-api/workload-resources/pod-v1/
    """
    return re.sub(r"\$(?=[$(])", "$$", text)


def numbers_of_nodes(cluster: KubernetesSpec) -> str:
    """The number of nodes, or the least and the most, as torchrun writes them."""
    least, most = cluster.least_nodes, cluster.most_nodes
    return f"{least}:{most}" if cluster.is_elastic else str(most)


def world_variables(cluster: KubernetesSpec, *, address: str | None) -> list[Manifest]:
    """The five variables of torchrun, which Kubeflow sets too: the position of a node."""
    variables: list[Manifest] = [
        {"name": "PET_NNODES", "value": numbers_of_nodes(cluster)},
        {"name": "PET_NPROC_PER_NODE", "value": str(cluster.processes_per_node)},
        {"name": "PET_NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": _RANK}}},
    ]
    if address is not None:
        variables += [
            {"name": "PET_MASTER_ADDR", "value": address},
            {"name": "PET_MASTER_PORT", "value": str(cluster.port)},
        ]
    return variables


def _scheduling(spec: Spec, cluster: KubernetesSpec) -> Manifest:
    """The placement of the pods; keys that are not set are left out."""
    tolerations = [t.model_dump(exclude_none=True) for t in cluster.tolerations]
    if not cluster.on_cpu:
        device = {"key": cluster.device, "operator": "Exists", "effect": "NoSchedule"}
        tolerations.insert(0, device)
    wishes: Manifest = {
        "nodeSelector": dict(cluster.node_selector),
        "tolerations": tolerations,
        "priorityClassName": cluster.priority_class,
        "runtimeClassName": cluster.runtime_class,
        "schedulerName": scheduler(cluster),
        "topologySpreadConstraints": [_spread(spec, rule) for rule in cluster.topology_spread],
    }
    wishes["imagePullSecrets"] = [{"name": name} for name in cluster.pull_secrets]
    if cluster.topology != "none" and cluster.most_nodes > 1:
        near = {"topologyKey": cluster.topology, "labelSelector": own_pods(spec)}
        preferred = [{"weight": 100, "podAffinityTerm": near}]
        wishes["affinity"] = {
            "podAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": preferred}
        }
    return {key: wish for key, wish in wishes.items() if wish}


def _spread(spec: Spec, rule: SpreadSpec) -> Manifest:
    return {
        "maxSkew": rule.max_skew,
        "topologyKey": rule.key,
        "whenUnsatisfiable": "DoNotSchedule" if rule.required else "ScheduleAnyway",
        "labelSelector": own_pods(spec),
    }


def _container(spec: Spec, cluster: KubernetesSpec, name: str, world: list[Manifest]) -> Manifest:
    resources, loosened = _resources(cluster), cluster.loosened_security
    added = {"add": list(loosened.capabilities)} if loosened.capabilities else {}
    meeting = {"name": "rendezvous", "containerPort": cluster.port, "protocol": "TCP"}
    ports = [*([meeting] if cluster.most_nodes > 1 else []), *container_ports(spec)]
    return {
        "name": name,
        "image": cluster.image,
        "imagePullPolicy": "IfNotPresent" if "@sha256:" in cluster.image else "Always",
        "command": [
            "evenstep",
            "run",
            f"{SPEC_DIRECTORY}/spec.yaml",
            "--runs",
            literal(cluster.runs or RUNS_DIRECTORY),
        ],
        "env": [*world, *_environment(spec, cluster)],
        **({"ports": ports} if ports else {}),
        **probe(spec, cluster),
        "resources": {"requests": resources, "limits": dict(resources)},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": not loosened.root,
            "capabilities": {"drop": ["ALL"], **added},
        },
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            *own_mounts(cluster),
            *(_mounted(n, m) for n, m in enumerate(cluster.mounts)),
        ],
    }


_MEETING_MOUNT = {
    "name": "meeting",
    "mountPath": f"{SECRETS_DIRECTORY}/meeting",
    "readOnly": True,
}


def _environment(spec: Spec, cluster: KubernetesSpec) -> list[Manifest]:
    threads = max(1, int(quantity(cluster.cpu)) // cluster.processes_per_node)
    variables = {
        "HOME": "/tmp",
        "TMPDIR": "/tmp",
        "USER": "evenstep",
        "TORCHINDUCTOR_CACHE_DIR": "/tmp/torchinductor",
        "TRITON_CACHE_DIR": "/tmp/triton",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(threads),
        "WANDB_API_KEY_FILE": f"{SECRETS_DIRECTORY}/wandb/api-key",
    }
    if cluster.most_nodes > 1:
        variables["EVENSTEP_SECRET_FILE"] = f"{_MEETING_MOUNT['mountPath']}/{MEETING_SECRET}"
    if cluster.runs is not None:
        variables["EVENSTEP_SCRATCH"] = "/tmp/runs"
    if cluster.on_cpu:
        variables["EVENSTEP_DEVICE"] = "cpu"
    variables |= fabric_variables(cluster)
    variables |= {s.variable: s.file for s in STORAGE_KEYS if getattr(cluster, s.field)}
    # The user's variables take precedence.
    variables |= {name: literal(text) for name, text in cluster.env.items()}
    values: dict[str, Manifest] = {name: {"value": text} for name, text in variables.items()}
    values = monitoring_variables(spec) | values
    values |= {name: {"valueFrom": _key_of(v)} for name, v in cluster.env_from.items()}
    return [{"name": name, **value} for name, value in values.items()]


def _key_of(variable: VariableSpec) -> Manifest:
    key = {
        "name": variable.secret or variable.config_map,
        "key": variable.key,
        **({"optional": True} if variable.optional else {}),
    }
    return {"secretKeyRef" if variable.secret else "configMapKeyRef": key}


def _resources(cluster: KubernetesSpec) -> Manifest:
    resources = {"cpu": cluster.cpu, "memory": cluster.memory}
    if not cluster.on_cpu:
        resources[cluster.device] = str(cluster.processes_per_node)
    resources |= {name: str(number) for name, number in cluster.resources.items()}
    resources |= {f"hugepages-{page}": size for page, size in cluster.hugepages.items()}
    return resources


def own_mounts(cluster: KubernetesSpec) -> list[Manifest]:
    """The mounts of Evenstep's own volumes in a pod."""
    return [
        *([{"name": "runs", "mountPath": RUNS_DIRECTORY}] if cluster.runs is None else []),
        {"name": "spec", "mountPath": SPEC_DIRECTORY, "readOnly": True},
        {"name": "scratch", "mountPath": "/tmp"},
        {"name": "shared-memory", "mountPath": "/dev/shm"},
        {"name": "wandb", "mountPath": f"{SECRETS_DIRECTORY}/wandb", "readOnly": True},
        *([_MEETING_MOUNT] if cluster.most_nodes > 1 else []),
        *(place for place, _ in _storage_keys(cluster)),
    ]


def _volumes(spec: Spec, cluster: KubernetesSpec) -> list[Manifest]:
    shared = {"medium": "Memory", "sizeLimit": cluster.shared_memory}
    # The file of a secret is readable only by its group, which fsGroup makes the pod's group.
    key = {"secretName": cluster.wandb_secret, "optional": True, "defaultMode": 0o440}
    claim = {"claimName": claim_name(spec, cluster)}
    own: list[Manifest] = [
        *([{"name": "runs", "persistentVolumeClaim": claim}] if cluster.runs is None else []),
        {"name": "spec", "configMap": {"name": spec.name}},
        {"name": "scratch", "emptyDir": {"sizeLimit": cluster.scratch}},
        {"name": "shared-memory", "emptyDir": shared},
        {"name": "wandb", "secret": key},
    ]
    if (
        cluster.most_nodes > 1
    ):  # not optional: a pod waits for it, and cannot join the others without it
        meeting = {"secretName": meeting_secret_name(spec), "defaultMode": 0o440}
        own.append({"name": "meeting", "secret": meeting})
    own += [volume for _, volume in _storage_keys(cluster)]
    return [*own, *({"name": f"mount-{n}", **_source(m)} for n, m in enumerate(cluster.mounts))]


class StorageKey(NamedTuple):
    """How a client of an object storage finds its credentials: a file, named by a variable."""

    field: str
    key: str
    variable: str

    @property
    def directory(self) -> str:
        """The directory of the mounted file."""
        return f"{SECRETS_DIRECTORY}/{self.field.removesuffix('_secret')}"

    @property
    def file(self) -> str:
        """The path of the file in the container."""
        return f"{self.directory}/{self.key}"


STORAGE_KEYS = (
    StorageKey("s3_secret", "credentials", "AWS_SHARED_CREDENTIALS_FILE"),
    StorageKey("gcs_secret", "key.json", "GOOGLE_APPLICATION_CREDENTIALS"),
)


def _storage_keys(cluster: KubernetesSpec) -> Iterator[tuple[Manifest, Manifest]]:
    """The mount and the volume of each object storage that has a Secret."""
    for storage in STORAGE_KEYS:
        secret = getattr(cluster, storage.field)
        if secret is not None:
            name = storage.field.replace("_", "-")
            place = {"name": name, "mountPath": storage.directory, "readOnly": True}
            yield place, {"name": name, "secret": {"secretName": secret, "defaultMode": 0o440}}


def _source(mount: MountSpec) -> Manifest:
    only = {"items": [{"key": mount.key, "path": mount.key}]} if mount.key else {}
    if mount.claim is not None:
        return {"persistentVolumeClaim": {"claimName": mount.claim}}
    if mount.secret is not None:
        return {"secret": {"secretName": mount.secret, "defaultMode": 0o440, **only}}
    return {"configMap": {"name": mount.config_map, **only}}


def _mounted(number: int, mount: MountSpec) -> Manifest:
    only_read = mount.read_only or mount.claim is None
    part = mount.key or mount.sub_path
    return {
        "name": f"mount-{number}",
        "mountPath": mount.path,
        **({"subPath": part} if part else {}),
        **({"readOnly": True} if only_read else {}),
    }
