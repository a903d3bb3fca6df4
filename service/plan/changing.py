"""What may change between two attempts at a run: two specs compared, key by key."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from service.basics.errors import SpecError, did_you_mean
from service.spec.documents import Steps, dotted
from service.spec.extending import CANNOT_CHANGE_THE_RESULT, UNITS, keys_in
from service.spec.files import (
    Override,
    on_one_line,
    plain_values,
    spec_schema,
    with_code_files,
    with_source,
)
from service.spec.models import Spec


class Change(NamedTuple):
    """A key whose value differs, with both values as YAML writes them."""

    key: str
    was: str
    now: str

    def __str__(self) -> str:
        return f"{self.key}: {self.was} -> {self.now}"


NOT_SET = "not set"
_NOTHING = (NOT_SET, "0", "0.0")


@dataclass(frozen=True)
class _Fixed:
    """A change that the state of a run does not support."""

    key: str
    """The key, or the section. A key of the optimizer also applies to its groups and companion."""
    when: str
    """The kinds of change, in words; empty for every change."""
    why: str
    applies: Callable[[Change, Spec], bool] = lambda change, old: True


def _begins_or_ends(value: str) -> Callable[[Change, Spec], bool]:
    return lambda change, old: (change.was == value) != (change.now == value)


def _has_both(change: Change, old: Spec) -> bool:
    return NOT_SET not in (change.was, change.now)


def _is_switch(change: Change, old: Spec) -> bool:
    return {change.was, change.now} <= {"true", "false", NOT_SET}


def _is_scheduled_by_torch(change: Change, old: Spec) -> bool:
    return any(":" in schedule.name for schedule in old.schedules.values())


def _involves_torch_scheduler(change: Change, old: Spec) -> bool:
    return ":" in change.now or _is_scheduled_by_torch(change, old)


FIXED = (
    _Fixed("optimizers", "", "not supported with several optimizers yet"),
    _Fixed("init", "", "the initial weights are loaded only once"),
    _Fixed(
        "batch.global_batch",
        "",
        "the position in the data is counted in steps of this size",
    ),
    _Fixed("exactness", "", "it is a guarantee for all steps of a run"),
    _Fixed("loader.stream", "", "the saved position belongs to the other way of reading"),
    _Fixed("optimizer.name", "", "a different optimizer cannot use its state"),
    _Fixed("optimizer.groups", "in number", "a checkpoint stores which parameters share a group"),
    _Fixed(
        "optimizer.*",
        "true or false",
        "such an option decides which state the optimizer keeps",
        _is_switch,
    ),
    _Fixed(
        "optimizer.momentum",
        "from 0, or to 0",
        "without momentum the optimizer has no momentum state",
        lambda change, old: (change.was in _NOTHING) != (change.now in _NOTHING),
    ),
    _Fixed(
        "optimizer.lr",
        "with a scheduler of torch",
        "the scheduler's rates are in the checkpoint",
        _is_scheduled_by_torch,
    ),
    _Fixed(
        "schedule",
        "to or between schedulers of torch",
        "the scheduler's rates and options are in the checkpoint",
        _involves_torch_scheduler,
    ),
    _Fixed("schedule.measure", "", "earlier tests counted the other measure", _has_both),
    _Fixed("schedule.mode", "", "earlier tests compared in the other direction", _has_both),
    _Fixed("early_stopping.measure", "", "earlier tests counted the other measure", _has_both),
    _Fixed("early_stopping.mode", "", "earlier tests compared in the other direction", _has_both),
    _Fixed("checkpoint.best.mode", "", "the best one was chosen in the other direction"),
    _Fixed(
        "model.moving_average",
        "to add or remove it",
        "an average starts at the first step, or not at all",
        _begins_or_ends(NOT_SET),
    ),
    _Fixed(
        "model.precision",
        "to or from fp16",
        "the scale of fp16's gradients is part of the state",
        _begins_or_ends("fp16"),
    ),
)


@dataclass(frozen=True)
class Accepted:
    """The changes of a run's spec that the user has requested."""

    keys: tuple[str, ...] = ()
    """Keys and sections; `length.epochs` includes `length.steps`, and `schedule.name` includes all
    of `schedule`, because the other keys depend on it."""
    everything: bool = False

    @classmethod
    def named(cls, overrides: Iterable[Override]) -> Accepted:
        """Those of `key=value` overrides, and of files of overrides."""
        keys: list[str] = []
        for given in overrides:
            if isinstance(given, str):
                keys.append(given.partition("=")[0].strip().removeprefix("--"))
            else:
                keys += keys_in(given)
        return cls(tuple(keys))

    def covers(self, change: Change) -> bool:
        """Whether this change was requested."""
        return self.everything or any(_covers(key, change.key) for key in self.keys)


NOTHING_ACCEPTED = Accepted()


def require_keys(keys: Iterable[str], spec: Spec, *, option: str) -> None:
    """Check that a spec can have these keys.

    An optimizer or a schedule of the user, which `spec` names, can have any option.

    Raises:
        SpecError: names the one that it cannot have, and those that it can.
    """
    schema: Any = None
    for key in keys:
        schema = schema or spec_schema()
        sections, values = [schema], plain_values(spec)
        for name in key.split("."):
            spec_name = values.get("name") if isinstance(values, dict) else None
            is_of_a_user = ":" in str(spec_name)
            values = values.get(name) if isinstance(values, dict) else None
            inner = [each for section in sections for each in _below(section, name)]
            if not inner and (is_of_a_user or values is not None):
                inner = [_ANYTHING]
            if not inner:
                named = [each for each in sections if _has_name(each, spec_name)]
                known = {each for one in named or sections for each in one.get("properties", ())}
                raise SpecError(f"{option} {key}: no spec has this key{did_you_mean(name, known)}")
            sections = [each for found in inner for each in _choices(found, schema)]


def _has_name(section: Any, name: Any) -> bool:
    """Whether it is the section of this optimizer or schedule."""
    told: Any = section.get("properties", {}).get("name", {}).get("const")
    return told is not None and told == name


def _below(section: Any, name: str) -> list[Any]:
    """What a schema says of the values of this name in a section, or in a list by its number."""
    if name in section.get("properties", ()):
        return [section["properties"][name]]
    if name.isdecimal() and "items" in section:
        return [section["items"]]
    others = [section.get("additionalProperties", False)]
    others += section.get("patternProperties", {}).values()
    if "properties" in section:  # of the user: next to its own keys it takes any
        return []
    return [_ANYTHING if each is True else each for each in others if each]


_ANYTHING: dict[str, Any] = {"additionalProperties": True, "items": {"additionalProperties": True}}


def _choices(found: Any, schema: Any) -> list[Any]:
    """The sections that a value may be, without references."""
    if "$ref" in found:
        return _choices(schema["$defs"][found["$ref"].rpartition("/")[2]], schema)
    several = [each for how in ("anyOf", "oneOf", "allOf") for each in found.get(how, ())]
    return [section for each in several for section in _choices(each, schema)] or [found]


def _covers(named: str, key: str) -> bool:
    section, _, last = named.rpartition(".")
    if last == "name" and section:
        named = section
    if key == named or key.startswith(f"{named}."):
        return True
    return bool(section) and _without_unit(named) == _without_unit(key)


def _without_unit(key: str) -> str:
    section, _, last = key.rpartition(".")
    stem, _, unit = last.rpartition("_")
    return f"{section}.{stem}" if unit in UNITS else key


def changes(old: Spec, new: Spec) -> list[Change]:
    """The keys that differ, as `optimizer.lr: 0.1 -> 0.2`, except those without effect.

    A task's file and the source of `init` may be in another directory: only their own names count.
    Parameter groups may be in another order: a checkpoint stores them by their parameters' names.
    `micro_batch: auto`, or none, equals the number with which the run began.
    """
    before, after = _compared(old), _compared(new)
    if not isinstance(new.batch.micro_batch, int):
        after["batch"].pop("micro_batch", None)
        begun = before["batch"].get("micro_batch")
        after["batch"] |= {} if begun is None else {"micro_batch": begun}
    if old.optimizer is not None and new.optimizer is not None:
        groups = [values["optimizer"]["groups"] for values in (before, after)]
        if sorted(map(_told, groups[0])) == sorted(map(_told, groups[1])):
            after["optimizer"]["groups"] = groups[0]
    ways = old.model.compilation, new.model.compilation
    if None not in ways:  # true is a mapping without keys
        for values, how in zip((before, after), ways, strict=True):
            values["model"]["compile"] = plain_values(how)
    orders = [", ".join(values["optimizers"]) for values in (before, after)]
    swapped = [Change("optimizers", *orders)] if orders[0] != orders[1] else []
    return swapped + [
        Change(dotted(steps), was, now)
        for steps, was, now in _differences(before, after, ())
        if _compiled_otherwise(steps, old, new) or not _cannot_matter(steps, old)
    ]


def as_text(spec: Spec) -> str:
    """All values of a spec, for `differences` with that of another process."""
    return json.dumps(_compared(spec), default=str)


def differences(one: str, other: str) -> list[Change]:
    """All keys that differ in two specs as `as_text` gives them."""
    found = _differences(json.loads(one), json.loads(other), ())
    return [Change(dotted(steps), was, now) for steps, was, now in found]


def why_not(change: Change, old: Spec) -> str | None:
    """Why the state of a run does not support this change of its spec `old`; None if it does."""
    for fixed in FIXED:
        if _is_of(change.key, fixed.key) and fixed.applies(change, old):
            return fixed.why
    return None


def _is_of(key: str, pattern: str) -> bool:
    section, _, last = pattern.partition(".")
    if section == "optimizer":  # of the optimizer, its groups or its companion
        return key.startswith("optimizer.") and last in ("*", key.rpartition(".")[2])
    return key == pattern or key.startswith(f"{pattern}.")


def changes_page() -> str:
    """Markdown: which keys may change in a run, from the tables above."""
    lines = [
        "\n## What may change in a run that has begun\n",
        "These may change at every resume, because they cannot change the result:\n",
        "| key | why |\n|---|---|",
        *(f"| `{key}` | {why} |" for key, why in CANNOT_CHANGE_THE_RESULT.items()),
        "",
        "`test` may not change if the run depends on tests (early stopping, schedule `plateau`).",
        "`exchange.units`, and `exchange.mode` from or to `ddp`, may not change if the model is",
        "compiled: they decide what is one graph, and so which numbers compiled dropout draws.\n",
        "In these keys, except `test`, a value may contain `${env:NAME}`, the value of an "
        "environment",
        "variable when the spec is read ([how](../how-to/share-a-spec.md)).\n",
        "These may not change in a run, because its state does not support it:\n",
        "| key | which change | why |\n|---|---|---|",
        *(f"| `{fixed.key}` | {fixed.when or 'any'} | {fixed.why} |" for fixed in FIXED),
        "",
        "Everything else may change with `evenstep run SPEC --change key=value`, "
        "`--accept-changes`",
        "or `evenstep fork`, and is recorded with the run ([how](../how-to/change-a-run.md)).",
    ]
    return "\n".join(lines) + "\n"


def told_of_lines(found: Sequence[Change]) -> str:
    """The changes as text for the user, one per line."""
    return "".join(f"\n  {change}" for change in found)


def _compared(spec: Spec) -> Any:
    named = with_code_files(spec, lambda file, at: os.path.basename(file))
    return plain_values(with_source(named, os.path.basename))


def _cannot_matter(steps: Steps, spec: Spec) -> bool:
    waits_for_rate = any(schedule.name == "plateau" for schedule in spec.schedules.values())
    waits_for_tests = spec.early_stopping is not None or waits_for_rate
    if steps[0] == "test" and waits_for_tests:
        return False
    return any(dotted(steps[:n]) in CANNOT_CHANGE_THE_RESULT for n in range(1, len(steps) + 1))


def _compiled_otherwise(steps: Steps, old: Spec, new: Spec) -> bool:
    """Whether this key decides which parts of a compiled model become one graph."""
    if not (old.model.compile and new.model.compile):
        return False
    sharded = old.exchange.shards or new.exchange.shards
    moved = old.exchange.shards != new.exchange.shards
    return (dotted(steps) == "exchange.mode" and moved) or (
        dotted(steps[:2]) == "exchange.units" and sharded
    )


class _Absent:
    """Marks a key that one of the two specs does not have."""


def _differences(old: Any, new: Any, steps: Steps) -> Iterator[tuple[Steps, str, str]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            inner = old.get(key, _Absent), new.get(key, _Absent)
            yield from _differences(*inner, (*steps, key))
    elif _are_alike_lists(old, new):
        for at, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from _differences(before, after, (*steps, at))
    elif _told(old) != _told(new):  # as text: 1 is not 1.0 or true to a task, and nan is nan
        yield steps, _told(old), _told(new)


def _are_alike_lists(old: Any, new: Any) -> bool:
    both = isinstance(old, list) and isinstance(new, list) and len(old) == len(new)
    return both and all(isinstance(item, dict) for item in [*old, *new])


def _told(value: Any) -> str:
    return NOT_SET if value is _Absent else on_one_line(value)
