"""The settings of queues and gang schedulers: labels, annotations, scheduler name, PodGroup.

Sources: https://kueue.sigs.k8s.io/docs/tasks/run/topology_aware_scheduling/,
https://volcano.sh/en/docs/podgroup/,
https://scheduler-plugins.sigs.k8s.io/docs/plugins/coscheduling/,
https://jobset.sigs.k8s.io/docs/concepts/
"""

from __future__ import annotations

from typing import Any

from service.spec.kubernetes import KubernetesSpec

QUEUE = "kueue.x-k8s.io/queue-name"
EXCLUSIVE = "alpha.jobset.sigs.k8s.io/exclusive-topology"
_PRIORITY = "kueue.x-k8s.io/priority-class"
_REQUIRED = "kueue.x-k8s.io/podset-required-topology"
_PREFERRED = "kueue.x-k8s.io/podset-preferred-topology"
_MIN_PARALLELISM = "kueue.x-k8s.io/job-min-parallelism"
_IN_STEP = "kueue.x-k8s.io/job-completions-equal-parallelism"
_GROUP_OF_VOLCANO = "scheduling.k8s.io/group-name"
_GROUP_OF_COSCHEDULING = "scheduling.x-k8s.io/pod-group"
_SCHEDULERS = {"volcano": "volcano", "coscheduling": "scheduler-plugins-scheduler"}


def queue_labels(cluster: KubernetesSpec) -> dict[str, str]:
    """The labels of the object that Kueue admits."""
    found = {QUEUE: cluster.queue, _PRIORITY: cluster.queue_priority}
    return {key: value for key, value in found.items() if value}


def queue_annotations(cluster: KubernetesSpec) -> dict[str, str]:
    """The annotations by which Kueue may admit an elastic Job with fewer pods.

    Source: https://kueue.sigs.k8s.io/docs/reference/labels-and-annotations/
    """
    if not (cluster.queue and cluster.is_elastic):
        return {}
    return {_MIN_PARALLELISM: str(cluster.least_nodes), _IN_STEP: "true"}


def pod_annotations(cluster: KubernetesSpec, name: str) -> dict[str, str]:
    """The annotations of the pods of the run `name`."""
    found = {
        _REQUIRED: cluster.queue_topology_required,
        _PREFERRED: cluster.queue_topology_preferred,
        _GROUP_OF_VOLCANO: name if cluster.gang == "volcano" else None,
    }
    return {key: value for key, value in found.items() if value} | dict(cluster.annotations)


def gang_labels(cluster: KubernetesSpec, name: str) -> dict[str, str]:
    """The labels of the pods of the run `name`."""
    return {_GROUP_OF_COSCHEDULING: name} if cluster.gang == "coscheduling" else {}


def scheduler(cluster: KubernetesSpec) -> str | None:
    """The name of the pods' scheduler; None for the cluster's default."""
    return cluster.scheduler or _SCHEDULERS.get(cluster.gang or "")


def pod_group(cluster: KubernetesSpec) -> tuple[str, str, dict[str, Any]] | None:
    """Version, kind and content of the PodGroup whose pods start together."""
    if cluster.gang is None:
        return None
    content: dict[str, Any] = {"minMember": cluster.least_nodes}
    if cluster.gang == "coscheduling":
        return "scheduling.x-k8s.io/v1alpha1", "PodGroup", {"spec": content}
    if cluster.gang_queue is not None:
        content["queue"] = cluster.gang_queue
    if cluster.priority_class is not None:
        content["priorityClassName"] = cluster.priority_class
    return "scheduling.volcano.sh/v1beta1", "PodGroup", {"spec": content}
