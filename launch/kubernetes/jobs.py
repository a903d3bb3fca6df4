"""Submit a job to a cluster, see how it does, read its log, stop it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from typing import Any

from launch.kubernetes.api import Api, ClusterError
from launch.kubernetes.pods import Manifest
from service.errors import SpecError

KINDS = {"job": "Job", "jobset": "JobSet", "kubeflow": "TrainJob"}
_INDEX = "batch.kubernetes.io/job-completion-index"
_OWN = {*KINDS.values(), "PersistentVolumeClaim", "Workload"}
_ENDS = {"Complete", "Completed", "Failed"}
_POLL_SECONDS = 2.0
_GONE_SECONDS = 300.0
_CODES = {
    0: "done",
    42: "would fail again",
    64: "a mistake in the spec",
    75: "stopped, its state is saved",
    76: "lost a peer",
    137: "killed; out of memory, if nobody killed it",
}
_PROGRESS = re.compile(r"\bstep=(\d+)/(\d+).*?(?:loss=(\S+))")


def submit(api: Api, objects: list[Manifest], *, say: Callable[[str], None]) -> None:
    """Make the objects; what is left of an earlier job of this name goes first, if it has ended.

    Raises:
        SpecError: a job of this name is running, or the cluster refuses an object.
        ClusterError: the cluster forbids it, or does not answer.
    """
    work = objects[-1]
    kind, name = work["kind"], work["metadata"]["name"]
    earlier = api.get(kind, name)
    if earlier is not None:
        if ending(earlier) is None:
            raise SpecError(
                f"{kind} {name} is there already and has not ended. Stop it with evenstep "
                f"kubernetes cancel {name}, or give this run a --name of its own."
            )
        api.delete(kind, name)
        _wait_until_gone(api, kind, name)
    for made in objects:
        api.apply(made)
    say(f"{kind} {name} is submitted to namespace {api.namespace}.")


def wait(api: Api, kind: str, name: str) -> str:
    """The ending of the job, once it has one.

    Raises:
        ClusterError: it was deleted meanwhile.
    """
    while True:
        work = api.get(kind, name)
        if work is None:
            raise ClusterError(f"{kind} {name} was deleted while it was waited for.")
        end = ending(work)
        if end is not None:
            return end
        time.sleep(_POLL_SECONDS)


def status(api: Api, kind: str, name: str) -> Iterator[str]:
    """How the job does, in lines for a person."""
    work = _existing(api, kind, name)
    state = work.get("status") or {}
    counted = ", ".join(f"{state[k]} {k}" for k in ("active", "succeeded", "failed") if k in state)
    yield f"{name}: {_state(work)}" + (f" ({counted} pods)" if counted else "")
    pods = _pods(api, name)
    for pod in pods:
        yield f"  node {_index(pod)}  {pod['metadata']['name']}  {_condition(pod)}"
    yield from _progress(api, pods)
    if ending(work) is None:
        yield from _troubles(api, name)


def logs(
    api: Api, kind: str, name: str, *, node: int, previous: bool, follow: bool
) -> Iterator[str]:
    """The log of a node's newest pod, or of the one before it.

    Raises:
        ClusterError: there is no such job, or no such pod.
    """
    _existing(api, kind, name)
    own = [pod for pod in _pods(api, name) if _index(pod) == str(node)]
    wanted = 2 if previous else 1
    if len(own) < wanted:
        which = "an earlier pod" if previous else "a pod"
        raise ClusterError(f"{kind} {name} has not had {which} of node {node}.")
    yield from api.log(own[-wanted]["metadata"]["name"], follow=follow)


def cancel(api: Api, kind: str, name: str) -> str:
    """Stop the job: its pods are asked to save, and the next submit goes on from there.

    Raises:
        ClusterError: there is no such job.
    """
    if not api.delete(kind, name):
        raise _missing(api, kind, name)
    return f"{name} is stopping with a checkpoint; submit it again to go on."


def ending(work: dict[str, Any]) -> str | None:
    """How a job ended, with the reason; None where it has not."""
    for condition in (work.get("status") or {}).get("conditions") or []:
        if condition["type"] in _ENDS and condition["status"] == "True":
            words = [condition["type"], condition.get("reason"), condition.get("message")]
            return ": ".join(word for word in words if word)
    return None


def _existing(api: Api, kind: str, name: str) -> dict[str, Any]:
    work = api.get(kind, name)
    if work is None:
        raise _missing(api, kind, name)
    return work


def _missing(api: Api, kind: str, name: str) -> ClusterError:
    return ClusterError(f"There is no {kind} {name} in namespace {api.namespace}.")


def _wait_until_gone(api: Api, kind: str, name: str) -> None:
    deadline = time.monotonic() + _GONE_SECONDS
    while api.get(kind, name) is not None:
        if time.monotonic() > deadline:
            raise ClusterError(f"{kind} {name} has ended, but is not gone yet. Try again later.")
        time.sleep(_POLL_SECONDS / 4)


def _state(work: dict[str, Any]) -> str:
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


def _pods(api: Api, name: str) -> list[dict[str, Any]]:
    """The run's pods, by node, the oldest first."""
    found = api.find("Pod", labelSelector=f"app.kubernetes.io/instance={name}")
    return sorted(found, key=lambda p: (int(_index(p)), p["metadata"]["creationTimestamp"]))


def _index(pod: dict[str, Any]) -> str:
    return str(pod["metadata"]["labels"].get(_INDEX, "0"))


def _condition(pod: dict[str, Any]) -> str:
    """What a pod does, or why it does not, in words."""
    state = pod.get("status") or {}
    for container in state.get("containerStatuses") or []:
        ended = container["state"].get("terminated")
        if ended:
            code = ended["exitCode"]
            return f"ended with {code}" + (f" ({_CODES[code]})" if code in _CODES else "")
        waiting = container["state"].get("waiting")
        if waiting:
            return ": ".join(w for w in (waiting["reason"], waiting.get("message")) if w)
    for condition in state.get("conditions") or []:
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return f"not scheduled: {condition.get('message', condition.get('reason'))}"
    return str(state.get("phase", "unknown")).lower()


def _progress(api: Api, pods: list[dict[str, Any]]) -> Iterator[str]:
    """The newest step and loss in the log of node 0's newest pod, where it has one."""
    own = [pod for pod in pods if _index(pod) == "0"]
    if not own:
        return
    try:
        lines = list(api.log(own[-1]["metadata"]["name"], lines=50))
    except ClusterError as error:
        yield f"  no log: {error}"
        return
    found = [match for match in map(_PROGRESS.search, lines) if match]
    if found:
        step, steps, loss = found[-1].groups()
        yield f"  step {step} of {steps}, loss {loss}"


def _troubles(api: Api, name: str) -> Iterator[str]:
    """What the cluster complains of about the job itself: quota, Pod Security, volumes."""
    events = api.find("Event", fieldSelector=f"involvedObject.name={name}")
    told = [
        e for e in events if e["type"] == "Warning" and e["involvedObject"]["kind"] != "Endpoints"
    ]
    for event in told[-3:]:
        yield f"  {event['reason']}: {event['message']}"
