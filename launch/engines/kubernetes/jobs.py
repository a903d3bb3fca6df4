"""Watch the state of a job on a cluster, read its logs, cancel it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

from launch.engines.contract import progress_in
from launch.engines.kubernetes.api import Api, ClusterError, ClusterUnreachable
from launch.engines.kubernetes.pod.queues import QUEUE
from launch.engines.kubernetes.states import (
    advised,
    ending,
    has_not_begun,
    index,
    node_state,
    queued,
    state,
)
from launch.engines.kubernetes.targets import GROUP, QUEUE_OF
from launch.processes.echo import spoken
from service.basics.running_time import RunningClock

KINDS = {"job": "Job", "jobset": "JobSet", "kubeflow": "TrainJob"}
LEAST_KEEP_SECONDS = 60
"""A job that is deleted sooner after its end may be gone before its end was read."""
_POLL_SECONDS = 2.0
_SILENCE_SECONDS = 600.0
_MOST_SECONDS_A_LOOK = 60.0  # a longer gap means that this command was stopped
_ASKED_PODS = 3
"""With more waiting pods, the events are the same."""


def command(api: Api, kind: str, verb: str, name: str) -> str:
    """What a user types about a job, with the options it needs."""
    options = f" --namespace {api.namespace}" if api.namespace != api.default_namespace else ""
    target = next(target for target, its in KINDS.items() if its == kind)
    options += f" --target {target}" if target != "job" else ""
    return f"evenstep kubernetes {verb} {name}{options}"


def wait(api: Api, kind: str, name: str, *, say: Callable[[str], None]) -> str:
    """The end of the job, once it has ended; the cluster may be unreachable for a while.

    Raises:
        ClusterError: the job was deleted, or the cluster has not responded for ten minutes.
    """
    clock = RunningClock(_MOST_SECONDS_A_LOOK)
    silent_since: float | None = None
    while True:
        now = clock()
        try:
            work = api.get(kind, name)
        except ClusterUnreachable as error:
            if silent_since is None:
                silent_since = now
                say(f"{error} The job does not depend on it; retrying for ten minutes.")
            elif now - silent_since > _SILENCE_SECONDS:
                raise
        else:
            silent_since = None
            if work is None:
                raise ClusterError(f"{kind} {name} was deleted during the wait.")
            end = ending(work)
            if end is not None:
                return end
        time.sleep(_POLL_SECONDS)


def status(api: Api, kind: str, name: str) -> Iterator[str]:
    """The state of the job, as lines for the user."""
    work = _existing(api, kind, name)
    found = work.get("status") or {}
    counted = ", ".join(f"{found[k]} {k}" for k in ("active", "succeeded", "failed") if k in found)
    yield f"{name}: {state(work)}" + (f" ({counted} pods)" if counted else "")
    pods = _pods(api, name)
    for _, own in groupby(pods, key=index):
        yield f"  {node_state(list(own))}"
    yield from _progress(api, pods)
    if ending(work) is None:
        yield from _troubles(api, work, pods)


def logs(
    api: Api,
    kind: str,
    name: str,
    *,
    node: int | None = None,
    rank: int = 0,
    previous: bool = False,
    follow: bool = False,
) -> Iterator[str]:
    """The log of one rank, or of a whole node; of its newest pod or the previous one.

    Args:
        node: the whole log, with the rank before each line.

    Raises:
        ClusterError: the job or the pod does not exist.
    """
    _existing(api, kind, name)
    pods = _pods(api, name)
    each = int(_variable(pods, "PET_NPROC_PER_NODE") or 1)
    if node is None and rank >= each and ":" in _variable(pods, "PET_NNODES"):
        raise ClusterError(
            f"Nodes of {name} come and go, so rank {rank} has no fixed node. Use --node, for the "
            f"log of a node with all its ranks; or --rank below {each}, for node 0."
        )
    place = rank // each if node is None else node
    own = [pod for pod in pods if index(pod) == str(place)]
    wanted = 2 if previous else 1
    if len(own) < wanted:
        which = "an earlier pod" if previous else "a pod"
        raise ClusterError(f"{kind} {name} has not had {which} of node {place}.")
    for line in api.log(own[-wanted]["metadata"]["name"], follow=follow):
        spoke, words = spoken(line)
        if node is not None:
            yield line
        elif spoke == rank:
            yield words


def _variable(pods: list[dict[str, Any]], name: str) -> str:
    """The value of a variable of the pods; empty if they have none."""
    for pod in pods:
        for variable in pod["spec"]["containers"][0].get("env", []):
            if variable["name"] == name:
                return str(variable.get("value", ""))
    return ""


def cancel(api: Api, kind: str, name: str) -> str:
    """Stop the job: its pods are asked to save, and the next submit continues from there.

    Raises:
        ClusterError: the job does not exist.
    """
    deleted = api.delete(kind, name)
    if deleted is None:
        raise _missing(api, kind, name)
    end = ending(deleted) if deleted.get("kind") == kind else None
    if end is not None:
        return f"{name} had ended already ({end}); its {kind} is deleted, its runs are kept."
    return f"{name} is stopping with a checkpoint; submit it again to continue."


def _existing(api: Api, kind: str, name: str) -> dict[str, Any]:
    work = api.get(kind, name)
    if work is None:
        raise _missing(api, kind, name)
    return work


def _missing(api: Api, kind: str, name: str) -> ClusterError:
    return ClusterError(
        f"There is no {kind} {name} in namespace {api.namespace}. Use the --target with which it "
        "was submitted, and the --namespace in its spec."
    )


def _pods(api: Api, name: str) -> list[dict[str, Any]]:
    """The run's pods, by node, the oldest first."""
    found = api.find("Pod", labelSelector=f"app.kubernetes.io/instance={name}")
    return sorted(found, key=lambda p: (int(index(p)), p["metadata"]["creationTimestamp"]))


def _progress(api: Api, pods: list[dict[str, Any]]) -> Iterator[str]:
    """The newest step and loss in the log of node 0's newest pod, if there are any."""
    own = [pod for pod in pods if index(pod) == "0" and not has_not_begun(pod)]
    if not own:
        return
    try:
        lines = list(api.log(own[-1]["metadata"]["name"], lines=50))
    except ClusterError as error:
        yield f"  {error}"
        return
    progress = progress_in(lines)
    if progress is not None:
        yield f"  {progress}"


def _troubles(api: Api, work: dict[str, Any], pods: list[dict[str, Any]]) -> Iterator[str]:
    """The problems reported by the cluster: quota, Pod Security, volumes, the queue."""
    if QUEUE in work["metadata"].get("labels", {}) and work["spec"].get("suspend"):
        yield from _queue(api, work)
    name = work["metadata"]["name"]
    waiting = [pod["metadata"]["name"] for pod in pods if has_not_begun(pod)]
    told: dict[str, None] = {}  # in order, without duplicates
    for each in (name, f"{name}-{GROUP}-0", f"{name}-runs", *waiting[:_ASKED_PODS]):
        told |= dict.fromkeys(_complaints(api, each, since=work["metadata"]["creationTimestamp"]))
    yield from told


def _complaints(api: Api, name: str, *, since: str) -> Iterator[str]:
    """The newest warnings about the objects of this name, and what to do about them.

    Args:
        since: older ones are about an earlier job of this name.
    """
    events = api.find("Event", fieldSelector=f"involvedObject.name={name}")
    for event in [event for event in events if _is_trouble(event, since)][-3:]:
        yield f"  {event['reason']}: {advised(event['message'])}"


def _is_trouble(event: dict[str, Any], since: str) -> bool:
    when = event.get("lastTimestamp") or event.get("eventTime") or since
    # Events about a Service's endpoints while pods start and stop have no meaning.
    other = event["involvedObject"]["kind"] in ("Endpoints", "EndpointSlice")
    return bool(event["type"] == "Warning" and when >= since and not other)


def _queue(api: Api, work: dict[str, Any]) -> Iterator[str]:
    try:
        found = api.find("Workload", labelSelector=f"{QUEUE_OF}={work['metadata']['uid']}")
    except ClusterError as error:
        yield f"  the queue gives no status: {error}"
        return
    yield from (f"  {told}" for told in map(queued, found) if told is not None)
