"""Merges the spec's `pod_template` over the rendered one, as a strategic merge patch does. Pure.

Lists whose items have a name are merged by it (containers, env, volumes; volumeMounts by their
path), other lists are replaced, and `null` removes a field. The kinds of lists, and the known
fields, are those of Kubernetes, in `pod_fields.json`.
Source: https://kubernetes.io/docs/tasks/manage-kubernetes-objects/update-api-object-kubectl-patch/
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from launch.engines.kubernetes.pod.pods import MAIN, Manifest
from service.basics.errors import SpecError, did_you_mean
from service.spec.files import on_one_line
from service.spec.kubernetes import OWN_LABELS
from service.spec.part import LABEL, LABEL_VALUE, PATTERNS_IN_WORDS

KEY = "kubernetes.pod_template"
_ROOT = "PodTemplateSpec"
_ONE_OF = {"Volume": {"name"}, "EnvVar": {"name"}}
"""Objects that have one field besides these: another one in a patch replaces it."""
_QUANTITY = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?\d+)?")
_LIST = re.compile(r"\[(?P<item>.+)\](?: by (?P<key>\w+))?")
_OURS = {
    "spec.restartPolicy": "a Job with rules for exit codes needs Never",
    "spec.terminationGracePeriodSeconds": "set kubernetes.grace_seconds, which the job reads too",
    "spec.subdomain": "the nodes find each other by it",
    "spec.hostname": "each pod has its own, by which the nodes find each other",
    "spec.serviceAccountName": "set kubernetes.service_account",
    "spec.serviceAccount": "set kubernetes.service_account",
    "spec.containers[trainer].command": "it starts the launcher; pass settings in the spec",
    "spec.containers[trainer].name": "the rules for exit codes name it",
    "spec.containers[trainer].image": "set kubernetes.image",
    f"spec.containers[{MAIN}]": "it trains",
    "spec.containers": "one of them trains",
    f"spec.containers[{MAIN}].env": "it has the variables of the rendezvous",
    "metadata.name": "each pod has its own",
    "metadata.namespace": "set kubernetes.namespace",
    **{f"metadata.labels[{key}]": "the run's objects are found by it" for key in OWN_LABELS},
    "metadata.labels": "the run's objects are found by them",
    "metadata": "the run's objects are found by its labels",
    "spec": "without it there are no pods",
}
"""Fields that the job, or another of its objects, depends on; and what to do instead."""
_OUR_VARIABLES = "spec.containers[trainer].env[PET_"


class Override(NamedTuple):
    """One field of the rendered template that the spec's template replaces or removes."""

    place: str
    before: Any
    after: Any

    def __str__(self) -> str:
        shown = [_short(value) for value in (self.before, self.after)]
        if self.after is None:
            return f"{KEY} removes {self.place}: {shown[0]}"
        return f"{KEY} overrides {self.place}: {shown[0]} -> {shown[1]}"


class _Type(NamedTuple):
    """The type of a field, according to the table."""

    kind: str
    item: str = ""
    key: str | None = None
    required: bool = False


def merged_template(rendered: Manifest, wanted: Manifest) -> Manifest:
    """The rendered template, with the wanted fields merged over it.

    In `wanted`, the container that trains is named `trainer`, whatever its name in the target.

    Raises:
        SpecError: `wanted` has a field that Kubernetes does not know, a value of a wrong type, or
            changes a field on which the job depends.
    """
    _require_known(wanted, _ROOT, "")
    for key, value in ((wanted.get("metadata") or {}).get("labels") or {}).items():
        if value is not None and not (
            re.fullmatch(LABEL, key) and re.fullmatch(LABEL_VALUE, value)
        ):
            told = f"must be {PATTERNS_IN_WORDS[LABEL_VALUE]}, but is {_short(value)}"
            raise SpecError(f"{KEY}.metadata.labels.{key}: {told}")
    wanted = _renamed(wanted, MAIN, _trainer_of(rendered))
    made: Manifest = _merged(rendered, wanted, _type(_ROOT), "")
    _require_whole(made, _ROOT, "")
    for each in [*overrides(rendered, made), *overrides(made, rendered)]:
        _require_free(each)
    return made


def overrides(rendered: Manifest, made: Manifest) -> list[Override]:
    """The fields of the rendered template that `made` lacks, or has with another value."""
    before, after = (_renamed(each, _trainer_of(each), MAIN) for each in (rendered, made))
    return list(_changes(before, after, _type(_ROOT), ""))


def _trainer_of(template: Manifest) -> str:
    """The name of the container that trains, which is the first."""
    containers = (template.get("spec") or {}).get("containers") or [{}]
    return str(containers[0].get("name", MAIN))


def newer_fields(wanted: Manifest) -> list[str]:
    """The fields that Kubernetes 1.31 does not know yet."""
    return [place for place, newer in _fields_of(wanted, _ROOT, "") if newer]


@cache
def _table() -> dict[str, dict[str, str]]:
    text = Path(__file__).with_name("pod_fields.json").read_text(encoding="utf-8")
    found: dict[str, dict[str, str]] = json.loads(text)
    return found


def _type(told: str) -> _Type:
    required = "!" in told
    told = told.rstrip("!+")
    listed = _LIST.fullmatch(told)
    if listed:
        return _Type("list", listed["item"], listed["key"], required)
    if told.startswith("{"):
        return _Type("mapping", told[1:-1], None, required)
    return _Type("object" if told in _table() else told, told, None, required)


def _merged(old: Any, new: Any, kind: _Type, name: str) -> Any:
    """`new` merged over `old`; null values in `new` are removed."""
    if kind.kind in ("object", "mapping") and isinstance(new, dict):
        old = old if isinstance(old, dict) else {}
        only = _ONE_OF.get(kind.item)
        if only is not None and new.keys() - only - old.keys():
            old = {key: value for key, value in old.items() if key in only}
        made = dict(old)
        for key, value in new.items():
            if value is None:
                made.pop(key, None)
            else:
                made[key] = _merged(old.get(key), value, _inner(kind, key), key)
        return made
    if kind.kind == "list" and kind.key is not None and isinstance(new, list):
        return _merged_list(old if isinstance(old, list) else [], new, kind)
    if kind.kind == "list" and isinstance(new, list):
        return [_merged(None, each, _type(kind.item), name) for each in new]
    return new


def _merged_list(old: list[Any], new: list[Any], kind: _Type) -> list[Any]:
    assert kind.key is not None
    made = {each[kind.key]: each for each in old}
    for each in new:
        own = each[kind.key]
        if each.get("$patch") == "delete":
            made.pop(own, None)
        else:
            made[own] = _merged(made.get(own), each, _type(kind.item), str(own))
    return list(made.values())


def _inner(kind: _Type, key: str) -> _Type:
    return _type(kind.item) if kind.kind == "mapping" else _type(_table()[kind.item][key])


def _changes(before: Any, after: Any, kind: _Type, place: str) -> Iterator[Override]:
    """The fields that were removed or changed."""
    if kind.kind in ("object", "mapping") and isinstance(after, dict):
        for key, value in before.items():
            at = f"{place}[{key}]" if kind.kind == "mapping" else f"{place}.{key}".lstrip(".")
            yield from _change(value, after.get(key), _inner(kind, key), at)
    elif kind.kind == "list" and kind.key is not None and isinstance(after, list):
        left = {each[kind.key]: each for each in after}
        for each in before:
            own = each[kind.key]
            yield from _change(each, left.get(own), _type(kind.item), f"{place}[{own}]")
    elif before != after:
        yield Override(place, before, after)


def _change(before: Any, after: Any, kind: _Type, place: str) -> Iterator[Override]:
    if after is None:
        yield Override(place, before, None)
    else:
        yield from _changes(before, after, kind, place)


def _renamed(template: Manifest, old: str, new: str) -> Manifest:
    """The template with a container of another name."""
    pod = template.get("spec")
    found = pod.get("containers") if isinstance(pod, dict) else None
    if old == new or not isinstance(pod, dict) or not found:
        return template
    renamed = [{**each, "name": new} if each["name"] == old else each for each in found]
    return {**template, "spec": {**pod, "containers": renamed}}


def _require_free(each: Override) -> None:
    why = _OURS.get(each.place)
    if each.place.startswith(_OUR_VARIABLES):
        why = "it follows from kubernetes.nodes, processes_per_node and port"
    if why is not None:
        raise SpecError(f"{KEY}: {each.place} cannot be changed here: {why}.")


# ---- fields and types


def _require_known(value: Any, name: str, place: str) -> None:
    """Refuse fields that Kubernetes does not know, and values of another type."""
    fields = _table()[name]
    if not isinstance(value, dict):
        raise _wrong(place, "a mapping of fields to values", value)
    for key, inner in value.items():
        at = f"{place}.{key}".lstrip(".")
        if key not in fields:
            raise SpecError(f"{KEY}.{at}: unknown field{did_you_mean(str(key), fields)}")
        if inner is not None:
            _require_type(inner, _type(fields[key]), at)


def _require_type(value: Any, kind: _Type, place: str) -> None:
    if kind.kind == "object":
        _require_known(value, kind.item, place)
    elif kind.kind == "mapping":
        if not isinstance(value, dict):
            raise _wrong(place, "a mapping", value)
        for key, inner in value.items():
            if inner is not None:
                _require_type(inner, _type(kind.item), f"{place}.{key}")
    elif kind.kind == "list":
        if not isinstance(value, list):
            raise _wrong(place, "a list", value)
        for number, inner in enumerate(value):
            removes = isinstance(inner, dict) and inner.get("$patch") == "delete"
            if kind.key is not None and removes:
                inner = {kind.key: inner.get(kind.key)}  # nothing else of it counts
            _require_type(inner, _type(kind.item), f"{place}.{number}")
            if kind.key is not None and inner.get(kind.key) is None:
                raise SpecError(
                    f"{KEY}.{place}.{number}.{kind.key}: missing; it identifies the item"
                )
    elif not _fits(value, kind.kind):
        words = "text, in quotes" if kind.kind == "text" else f"of type {kind.kind}"
        raise _wrong(place, words, value)


def _fits(value: Any, kind: str) -> bool:
    number = isinstance(value, int) and not isinstance(value, bool)
    if kind == "text":
        return isinstance(value, str)
    if kind == "boolean":
        return isinstance(value, bool)
    if kind == "integer":
        return number
    if kind == "number":
        return number or isinstance(value, float)
    if kind == "integer or text":
        return number or isinstance(value, str)
    if kind == "quantity":
        return number or (isinstance(value, str) and bool(_QUANTITY.fullmatch(value)))
    return True


def _require_whole(value: Any, name: str, place: str) -> None:
    """Refuse an object without a field that the server requires."""
    for key, told in _table()[name].items():
        at = f"{place}.{key}".lstrip(".")
        if "!" in told and key not in value:
            raise SpecError(f"{KEY}.{at}: missing; Kubernetes requires it")
    for at, inner, kind in _objects_in(value, name, place):
        _require_whole(inner, kind, at)


def _objects_in(value: Manifest, name: str, place: str) -> Iterator[tuple[str, Manifest, str]]:
    """The objects directly below one, with their places and the names of their types."""
    for key, inner in value.items():
        if inner is None:
            continue
        kind, at = _type(_table()[name][key]), f"{place}.{key}".lstrip(".")
        if kind.kind == "object":
            yield at, inner, kind.item
        elif kind.kind == "list" and kind.item in _table():
            for each in inner:
                if "$patch" not in each:
                    yield f"{at}[{each.get(kind.key or 'name', '')}]", each, kind.item


def _fields_of(value: Manifest, name: str, place: str) -> Iterator[tuple[str, bool]]:
    """Every field, and whether it is newer than the oldest supported Kubernetes."""
    for key in value:
        yield f"{place}.{key}".lstrip("."), _table()[name][key].endswith("+")
    for at, inner, kind in _objects_in(value, name, place):
        yield from _fields_of(inner, kind, at)


def _wrong(place: str, allowed: str, value: Any) -> SpecError:
    at = f"{KEY}.{place}" if place else KEY
    return SpecError(f"{at}: must be {allowed}, but is {_short(value)}")


def _short(value: Any) -> str:
    text = on_one_line(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
