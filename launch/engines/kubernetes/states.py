"""The states of a job and its pods in words: pure, from the cluster's objects."""

from __future__ import annotations

import re
from typing import Any

from launch.engines.contract import code_in_words

_INDEX = "batch.kubernetes.io/job-completion-index"
_ENDS = {"Complete", "Completed", "Failed"}
_ADVICE = {
    r"exceeded quota": (
        "ask for less (kubernetes.nodes, processes_per_node, cpu, memory, storage), or the "
        "cluster's administrator for more"
    ),
    r"ErrImagePull|ImagePullBackOff|InvalidImageName|Failed to pull image": (
        "is kubernetes.image right? One that is private needs kubernetes.image_pull_secret"
    ),
    r"unbound immediate PersistentVolumeClaims|no persistent volumes available": (
        "the claim has no volume: several nodes need a storage class that offers ReadWriteMany, "
        "see kubernetes.storage_class"
    ),
    r"Insufficient|didn't match Pod's node|untolerated taint|topology spread constraints": (
        "no machine has what one pod asks for: see kubernetes.device, processes_per_node, cpu, "
        "memory, resources, hugepages, node_selector, topology_spread and tolerations"
    ),
    r"CreateContainerConfigError|couldn't find key|non-existent (secret|config) key": (
        "make the Secret or ConfigMap, with its key, in this namespace: see kubernetes.env_from, "
        "mounts, s3_secret and gcs_secret"
    ),
    r"OOMKilled": "raise kubernetes.memory, or take a smaller batch.micro_batch",
    r"PodSecurity": "another admission plug-in has changed the pod: ask the administrator",
    r"insufficient (unused )?quota": "it starts when others of the queue have ended",
}


def advised(told: str) -> str:
    """The cluster's own words, and what to do about them where that is known."""
    for sign, advice in _ADVICE.items():
        if re.search(sign, told):
            return f"{told.rstrip('.')} -> {advice}"
    return told


def ending(work: dict[str, Any]) -> str | None:
    """How a job ended, with the reason; None where it has not."""
    for condition in (work.get("status") or {}).get("conditions") or []:
        if condition["type"] in _ENDS and condition["status"] == "True":
            words = [condition["type"], condition.get("reason"), condition.get("message")]
            return ": ".join(word for word in words if word)
    return None


def state(work: dict[str, Any]) -> str:
    """What a job does now."""
    end = ending(work)
    if end is not None:
        return end
    conditions = (work.get("status") or {}).get("conditions") or []
    now = {each["type"]: each for each in conditions if each["status"] == "True"}
    if "FailureTarget" in now:
        return f"failing: {now['FailureTarget']['message']}"
    if work["metadata"].get("deletionTimestamp"):
        return "stopping"
    if work["spec"].get("suspend"):
        return "suspended: it waits in its queue, or was stopped by hand"
    return "running"


def index(pod: dict[str, Any]) -> str:
    """Which node of the job a pod is."""
    return str(pod["metadata"]["labels"].get(_INDEX, "0"))


def node_state(pods: list[dict[str, Any]]) -> str:
    """What one node does; `pods` are all that it has had, the oldest first."""
    newest, earlier = pods[-1], pods[:-1]
    told = f"node {index(newest)}  {newest['metadata']['name']}  {advised(condition(newest))}"
    if earlier:
        times = "once" if len(earlier) == 1 else f"{len(earlier)} times"
        told += f"; restarted {times}, the one before {advised(condition(earlier[-1]))}"
    return told


def condition(pod: dict[str, Any]) -> str:
    """What a pod does, or why it does not."""
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
    """Whether only the pod's events can tell what it waits for."""
    return bool((pod.get("status") or {}).get("phase", "Pending") == "Pending")


def queued(workload: dict[str, Any]) -> str | None:
    """Why Kueue has not let a job start; None where it has."""
    for each in (workload.get("status") or {}).get("conditions") or []:
        if each["type"] in ("QuotaReserved", "Admitted") and each["status"] == "False":
            return f"the queue says: {advised(each.get('message') or each['reason'])}"
    return None


def _ended(code: int, reason: str | None) -> str:
    if reason == "OOMKilled":
        return f"ended with {code} (OOMKilled: out of memory)"
    return f"ended with {code_in_words(code)}"
