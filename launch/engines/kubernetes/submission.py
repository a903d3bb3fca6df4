"""Creates the objects of a job, also if two submits of one job overlap or a submit dies.

The Job (JobSet, TrainJob) is created first, suspended and marked as unfinished. Its name can exist
only once, so of two submits one continues and the other is refused. The objects that differ from
submit to submit have names of their own, which the pods refer to, and belong to the job: the
cluster deletes them with it. Only when all objects exist is the job started. An unfinished job that
nobody finishes is deleted by the next submit.

A submit that was overtaken in this way changes nothing any more: it stops by itself after
`_SECONDS`, and the next submit waits longer than that and the time limit of a request.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from contextlib import suppress
from time import monotonic, sleep
from typing import Any

from launch.engines.kubernetes.api import Api, ClusterError, Conflict
from launch.engines.kubernetes.jobs import command
from launch.engines.kubernetes.pod.pods import Manifest
from launch.engines.kubernetes.pod.queues import QUEUE
from launch.engines.kubernetes.states import UNFINISHED, ending, is_unfinished
from launch.engines.kubernetes.targets import with_own_names
from service.basics.errors import EvenstepError, SpecError
from service.basics.running_time import TimeLimit

_POLL_SECONDS = 0.5
_GONE_SECONDS = 300.0
_SECONDS = 40.0
_UNFINISHED_SECONDS = 60.0
_MARK_BYTES = 4
_OWN = ("ConfigMap", "Secret", "TrainingRuntime")


def submit(api: Api, objects: list[Manifest], *, say: Callable[[str], None]) -> None:
    """Create the objects; the objects of an earlier job of this name are deleted first, if it has
    ended, is being stopped, or its submit was not finished.

    Raises:
        SpecError: a job of this name is running or being submitted, or the cluster refuses an
            object.
        ClusterError: permission is denied, or the cluster does not respond.
    """
    work = objects[-1]
    kind, name = work["kind"], work["metadata"]["name"]
    _make_room(api, kind, name, say=say)
    *others, work = with_own_names(objects, _OWN, secrets.token_hex(_MARK_BYTES))
    deadline = monotonic() + _SECONDS
    # The server accepts a TrainJob only if its runtime exists.
    runtimes = [each for each in others if each["kind"] == "TrainingRuntime"]
    claimed = None
    try:
        for runtime in runtimes:
            api.apply(runtime)
        claimed = _claim(api, work)
        _finish(api, claimed, others, work, deadline=deadline)
    except BaseException:
        _withdraw(api, kind, name, claimed, runtimes, say=say)
        raise
    say(f"{kind} {name} is submitted to namespace {api.namespace}.")


def _make_room(api: Api, kind: str, name: str, *, say: Callable[[str], None]) -> None:
    """Wait until no job of this name exists.

    Raises:
        SpecError: one is running.
    """
    while (earlier := api.get(kind, name)) is not None:
        if earlier["metadata"].get("deletionTimestamp"):
            say(f"{kind} {name} is still stopping; waiting until it is gone.")
        elif is_unfinished(earlier):
            say(
                f"{kind} {name} is being submitted by another command; waiting for it, for up to "
                f"{_UNFINISHED_SECONDS:.0f} s."
            )
            if not _remove_if_it_stays_unfinished(api, kind, name, earlier):
                continue
            say(f"The submit of {kind} {name} was not finished; it is replaced.")
        elif ending(earlier) is None:
            raise SpecError(
                f"{kind} {name} exists already and has not ended. Stop it with "
                f"{command(api, kind, 'cancel', name)}, or give this run its own --name."
            )
        else:
            api.delete(kind, name, uid=_uid(earlier))
        _wait_until_gone(api, kind, name, _uid(earlier))


def _remove_if_it_stays_unfinished(api: Api, kind: str, name: str, earlier: dict[str, Any]) -> bool:
    """Whether the job remained unfinished during the wait, and so was deleted."""
    limit, seen = TimeLimit(_UNFINISHED_SECONDS), earlier
    while limit.left:
        sleep(_POLL_SECONDS)
        now = api.get(kind, name)
        if now is None or _uid(now) != _uid(earlier) or not is_unfinished(now):
            return False
        seen = now
    try:
        # Not if it was finished since that look.
        api.delete(kind, name, uid=_uid(seen), version=seen["metadata"]["resourceVersion"])
    except Conflict:
        return False
    return True


def _wait_until_gone(api: Api, kind: str, name: str, uid: str) -> None:
    limit = TimeLimit(_GONE_SECONDS)
    while (now := api.get(kind, name)) is not None and _uid(now) == uid:
        if not limit.left:
            raise ClusterError(f"{kind} {name} has not been deleted yet. Try again later.")
        sleep(_POLL_SECONDS)


def _claim(api: Api, work: Manifest) -> dict[str, Any]:
    """Create the job, suspended.

    Raises:
        SpecError: another submit has just created one of this name, or the cluster refuses it.
    """
    kind, metadata = work["kind"], work["metadata"]
    marks = {**metadata.get("annotations", {}), UNFINISHED: "true"}
    suspended = {**work["spec"], "suspend": True}
    try:
        return api.create(
            {**work, "metadata": {**metadata, "annotations": marks}, "spec": suspended}
        )
    except Conflict as error:
        name = metadata["name"]
        raise SpecError(
            f"{kind} {name} has just been created by another submit, which continues. Stop it with "
            f"{command(api, kind, 'cancel', name)}, or give this run its own --name."
        ) from error


def _finish(
    api: Api, claimed: dict[str, Any], others: list[Manifest], work: Manifest, *, deadline: float
) -> None:
    """Create the other objects, then start the job.

    Raises:
        ClusterError: it took too long, or the job was deleted meanwhile.
    """
    kind, name = work["kind"], work["metadata"]["name"]
    owner = {"apiVersion": work["apiVersion"], "kind": kind, "name": name, "uid": _uid(claimed)}
    for made in others:
        _require_time(kind, name, deadline)
        if made["kind"] in _OWN:
            made = {**made, "metadata": {**made["metadata"], "ownerReferences": [owner]}}
        api.apply(made)
    _require_time(kind, name, deadline)
    _sweep(api, [each for each in others if each["kind"] == "TrainingRuntime"])
    _require_time(kind, name, deadline)
    change: Manifest = {"metadata": {"uid": _uid(claimed), "annotations": {UNFINISHED: None}}}
    if not work["spec"].get("suspend") and QUEUE not in claimed["metadata"].get("labels", {}):
        change["spec"] = {"suspend": False}  # a queue would start it by itself
    try:
        started = api.merge(kind, name, change)
    except SpecError:
        started = api.get(kind, name)
        if started is not None and _uid(started) == _uid(claimed):
            raise
        started = None
    if started is None or started["metadata"].get("deletionTimestamp"):
        raise ClusterError(f"{kind} {name} was deleted by another command during its submit.")


def _sweep(api: Api, runtimes: list[Manifest]) -> None:
    """Delete the runtimes of this run whose submit died before it created their TrainJob."""
    for runtime in runtimes:
        metadata = runtime["metadata"]
        keys = ("app.kubernetes.io/managed-by", "app.kubernetes.io/instance")
        selector = ",".join(f"{key}={metadata['labels'][key]}" for key in keys)
        for found in api.find(runtime["kind"], labelSelector=selector):
            other = found["metadata"]
            if other["name"] != metadata["name"] and not other.get("ownerReferences"):
                api.delete(runtime["kind"], other["name"], uid=other["uid"])


def _require_time(kind: str, name: str, deadline: float) -> None:
    if monotonic() > deadline:
        raise ClusterError(
            f"The submit of {kind} {name} took longer than {_SECONDS:.0f} s, so another may have "
            "replaced it. Submit it again."
        )


def _withdraw(
    api: Api,
    kind: str,
    name: str,
    claimed: dict[str, Any] | None,
    runtimes: list[Manifest],
    *,
    say: Callable[[str], None],
) -> None:
    """Delete what a failed submit has created; what is left is removed by the next one."""
    try:
        if claimed is not None:
            with suppress(Conflict):  # another submit has replaced it
                api.delete(kind, name, uid=_uid(claimed))
        for runtime in runtimes:
            api.delete(runtime["kind"], runtime["metadata"]["name"])
    except EvenstepError as error:
        say(f"The unfinished {kind} {name} was not deleted: {error} The next submit deletes it.")


def _uid(found: dict[str, Any]) -> str:
    uid: str = found["metadata"]["uid"]
    return uid
