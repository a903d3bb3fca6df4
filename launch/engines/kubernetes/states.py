"""The states of a job and its pods as text: pure, from the cluster's objects."""

from __future__ import annotations

import re
from typing import Any

from launch.engines.contract import code_in_words

_INDEX = "batch.kubernetes.io/job-completion-index"
UNFINISHED = "evenstep-unfinished-submit"
"""The annotation of a job whose other objects are still being created."""
_ENDS = {"Complete", "Completed", "Failed"}
_ADVICE = {
    r"exceeded quota": (
        "request less (kubernetes.nodes, processes_per_node, cpu, memory, storage), or ask the "
        "cluster's administrator for more"
    ),
    r"ErrImagePull|ImagePullBackOff|InvalidImageName|Failed to pull image": (
        "is kubernetes.image correct? A private image needs kubernetes.image_pull_secret"
    ),
    r"unbound immediate PersistentVolumeClaims|no persistent volumes available": (
        "the claim has no volume: several nodes need a storage class that supports ReadWriteMany, "
        "see kubernetes.storage_class"
    ),
    r"Insufficient|didn't match Pod's node|untolerated taint|topology spread constraints": (
        "no node has the resources of one pod: see kubernetes.device, processes_per_node, cpu, "
        "memory, resources, hugepages, node_selector, topology_spread and tolerations"
    ),
    r"CreateContainerConfigError|couldn't find key|non-existent (secret|config) key": (
        "create the Secret or ConfigMap, with its key, in this namespace: see kubernetes.env_from, "
        "mounts, s3_secret and gcs_secret"
    ),
    r"OOMKilled": "raise kubernetes.memory, or use a smaller batch.micro_batch",
    r"PodSecurity": "another admission plugin has changed the pod: ask the administrator",
    r"insufficient (unused )?quota": "it starts when other jobs of the queue have ended",
}


def advised(told: str) -> str:
    """The cluster's message, with advice if there is any."""
    for sign, advice in _ADVICE.items():
        if re.search(sign, told):
            return f"{told.rstrip('.')} -> {advice}"
    return told


def is_unfinished(work: dict[str, Any]) -> bool:
    """Whether other objects of a job are still being created, or its submit died before that."""
    return UNFINISHED in (work["metadata"].get("annotations") or {})


def ending(work: dict[str, Any]) -> str | None:
    """How a job ended, with the reason; None if it has not ended."""
    for condition in (work.get("status") or {}).get("conditions") or []:
        if condition["type"] in _ENDS and condition["status"] == "True":
            words = [condition["type"], condition.get("reason"), condition.get("message")]
            return ": ".join(word for word in words if word)
    return None


def state(work: dict[str, Any]) -> str:
    """The current state of a job."""
    end = ending(work)
    if end is not None:
        return end
    conditions = (work.get("status") or {}).get("conditions") or []
    now = {each["type"]: each for each in conditions if each["status"] == "True"}
    if "FailureTarget" in now:
        return f"failing: {now['FailureTarget']['message']}"
    if work["metadata"].get("deletionTimestamp"):
        return "stopping"
    if is_unfinished(work):
        return "being submitted; if that command was interrupted, submit it again"
    if work["spec"].get("suspend"):
        return "suspended: it waits in its queue, or was stopped manually"
    return "running"


def index(pod: dict[str, Any]) -> str:
    """The node index of a pod."""
    return str(pod["metadata"]["labels"].get(_INDEX, "0"))


def node_state(pods: list[dict[str, Any]]) -> str:
    """The state of one node; `pods` are all of its pods, the oldest first."""
    newest, earlier = pods[-1], pods[:-1]
    told = f"node {index(newest)}  {newest['metadata']['name']}  {advised(condition(newest))}"
    if earlier:
        times = "once" if len(earlier) == 1 else f"{len(earlier)} times"
        told += f"; restarted {times}, the previous pod {advised(condition(earlier[-1]))}"
    return told


def condition(pod: dict[str, Any]) -> str:
    """The state of a pod, or why it does not run."""
    status = pod.get("status") or {}
    for container in status.get("containerStatuses") or []:
        ended = container["state"].get("terminated")
        if ended:
            return _ended(ended["exitCode"], ended.get("reason"))
        waiting = container["state"].get("waiting")
        if waiting:
            return ": ".join(w for w in (waiting["reason"], waiting.get("message")) if w)
    for each in status.get("conditions") or []:
        if each["type"] == "PodScheduled" and each["status"] == "False":
            return f"not scheduled: {each.get('message', each.get('reason'))}"
    if pod["metadata"].get("deletionTimestamp"):
        return "stopping"
    return str(status.get("phase", "unknown")).lower()


def has_not_begun(pod: dict[str, Any]) -> bool:
    """Whether only the pod's events can show why it waits."""
    return bool((pod.get("status") or {}).get("phase", "Pending") == "Pending")


def queued(workload: dict[str, Any]) -> str | None:
    """Why Kueue has not admitted a job; None if it has."""
    for each in (workload.get("status") or {}).get("conditions") or []:
        if each["type"] in ("QuotaReserved", "Admitted") and each["status"] == "False":
            return f"the queue says: {advised(each.get('message') or each['reason'])}"
    return None


def _ended(code: int, reason: str | None) -> str:
    if reason == "OOMKilled":
        return f"ended with {code} (OOMKilled: out of memory)"
    return f"ended with {code_in_words(code)}"
