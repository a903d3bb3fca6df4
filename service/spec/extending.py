"""Specs that share values: `extends`, override files, `${env:NAME}`; keys free to change."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from service.basics.errors import SpecError, did_you_mean
from service.basics.secret_names import is_secret_name
from service.spec.documents import (
    NOWHERE,
    Document,
    SourcePosition,
    Steps,
    document_of,
    dotted,
    files_like,
    find,
    read_document,
    scalar,
    shown,
)

CANNOT_CHANGE_THE_RESULT = {
    "name": "it is only a label, and the name of the directory",
    "test": "the test loop does not change weights and random numbers",
    "checkpoint.every_steps": "saving only reads the state",
    "checkpoint.every_epochs": "saving only reads the state",
    "checkpoint.keep": "removing an old checkpoint does not touch the state",
    "checkpoint.keep_best": "removing an old checkpoint does not touch the state",
    "checkpoint.rename": "only the names change, not the weights",
    "checkpoint.keep_every_steps": "removing an old checkpoint does not touch the state",
    "checkpoint.asynchronous": "a copy is written",
    "checkpoint.on_failure": "saving only reads the state",
    "model.activation_checkpointing": "recomputed values have the same bits",
    "exchange.mode": "which process has which rows of a parameter does not matter",
    "exchange.reshard_after_forward": "it decides when parameters are sent, not their values",
    "exchange.offload": "it decides where rows are kept; updates are equal up to rounding",
    "exchange.return_memory": "it decides when memory is freed",
    "exchange.sync_each_micro_batch": "it only changes the order of a sum, as more processes do",
    "exchange.units": "which process has which rows of a parameter does not matter",
    "loader.workers": "rows are keyed by seed, epoch and row, not by the process that reads them",
    "loader.prefetch": "rows are keyed by seed, epoch and row, not by when they are read",
    "tracking": "only copies are recorded",
    "faults.hang_timeout_seconds": "it only ends a run, and a run that ends resumes",
    "faults.startup_timeout_seconds": "it only ends a run, and a run that ends resumes",
    "faults.hook_timeout_seconds": "it only ends a hook, which cannot change the run",
    "faults.on_hook_failure": "it only ends a run, and a run that ends resumes",
    "faults.stop_poll_steps": "it only ends a run, and a run that ends resumes",
    "faults.stop_budget_seconds": "it only ends a run, and a run that ends resumes",
    "faults.attempts_without_progress": "it only ends a run, and a run that ends resumes",
    "kubernetes": "the place, and the number of processes, are not part of the experiment",
    "slurm": "the place, and the number of processes, are not part of the experiment",
}
"""May change at every resume, and the reason. All other changes need the user's consent."""

FROM_ENVIRONMENT = tuple(key for key in CANNOT_CHANGE_THE_RESULT if key != "test")
"""Where `${env:NAME}` is allowed. `test` affects the result if the run depends on tests."""

EXTENDS = "extends"
_VALUES_OF_ONES_OWN = (("task_args",), ("kubernetes", "pod_template"))
"""Here null is a value: an argument of the user's function, or a pod field to be removed."""
UNITS = ("steps", "epochs", "fraction")
"""Suffixes of durations: of `every_steps` and `every_epochs` only one is set."""

# ---- extends


def with_bases(document: Document) -> Document:
    """The document merged over the one that its `extends` names, recursively.

    Mappings merge, lists and other values replace, and null removes the key. A position refers to
    the file that contains the value.

    Raises:
        SpecError: a file is missing, is not valid, or extends itself.
    """
    chain = [document]
    seen = {os.path.realpath(document.source): document.source} if document.source else {}
    while (named := chain[-1].values.get(EXTENDS)) is not None:
        where = _where(chain[-1])
        base = _base(chain[-1], named, where)
        if (known := os.path.realpath(base)) in seen:
            way = " -> ".join([*seen.values(), base])
            raise SpecError(f"{where}{EXTENDS}: a file cannot extend itself: {way}")
        seen[known] = base
        chain.append(read_document(base, rank=-len(chain)))
    merged = _own(chain.pop())
    while chain:
        merged = _merged(merged, child := _own(chain.pop()))
        merged = replace(merged, source=child.source)
    return merged


def _base(document: Document, named: Any, where: str) -> str:
    """The path of the file that a document extends."""
    if not isinstance(named, str) or not named:
        raise SpecError(
            f"{where}{EXTENDS}: must be the path of one spec, such as base.yaml, but is "
            f"{shown(named)}"
        )
    path = os.path.join(os.path.dirname(document.source), os.path.expanduser(named))
    if not os.path.isfile(path):
        raise SpecError(f"{where}{EXTENDS}: there is no file {path}{files_like(path)}")
    return path


def _where(document: Document) -> str:
    text = document.place_of_value((EXTENDS,)).text
    return f"{text}: " if text else ""


def _own(document: Document) -> Document:
    """The document without the key `extends`."""
    values = {key: value for key, value in document.values.items() if key != EXTENDS}
    return replace(document, values=values)


def with_set_file(document: Document, path: str | os.PathLike[str]) -> Document:
    """The document with the values of a file of overrides, as if given after it.

    Raises:
        SpecError: the file is not valid.
    """
    given = read_document(path, rank=document.overrides + 1)
    if EXTENDS in given.values:
        raise SpecError(
            f"{given.place_of_key((EXTENDS,)).text}: {EXTENDS}: belongs in the spec; "
            "instead, give several files of overrides"
        )
    merged = _merged(document, given)
    for places, before in ((merged.keys, document.keys), (merged.contents, document.contents)):
        places[()] = before.get((), NOWHERE)
    return replace(merged, overrides=document.overrides + 1)


# ---- merge


def _merged(base: Document, over: Document) -> Document:
    """`over` merged over `base`. A section in both keeps its position in `over`."""
    gone = {steps for steps, value in _walk(over.values, ()) if _is_new(value, base, steps)}
    # In one pass: a list may have thousands of items.
    keys, contents = (
        {at: place for at, place in places.items() if not _is_inside(at, gone)}
        for places in _all_places(base)
    )
    of_over = _all_places(over)
    for steps, _ in _walk(over.values, ()):
        keys[steps], contents[steps] = of_over[0][steps], of_over[1][steps]
    values = _merged_values(base.values, over.values, ())
    return replace(base, values=values, keys=keys, contents=contents)


def _all_places(document: Document) -> tuple[dict[Steps, SourcePosition], ...]:
    """The positions of every key and value; a file need not have all of them."""
    found = [steps for steps, _ in _walk(document.values, ())]
    keys = {steps: document.place_of_key(steps) for steps in found}
    contents = {steps: document.place_of_value(steps) for steps in found}
    return document.keys | keys, document.contents | contents


def _walk(values: Any, steps: Steps) -> Iterator[tuple[Steps, Any]]:
    """Every value with its steps, an outer value before its inner ones."""
    yield steps, values
    if isinstance(values, dict):
        inside: Any = values.items()
    else:
        inside = enumerate(values) if isinstance(values, list) else ()
    for key, value in inside:
        yield from _walk(value, (*steps, key))


def _is_new(value: Any, base: Document, steps: Steps) -> bool:
    """Whether the value replaces what `base` has at its position, and is not merged with it."""
    return not (isinstance(value, dict) and isinstance(find(base.values, steps), dict))


def _is_inside(steps: Steps, outer: set[Steps]) -> bool:
    return any(steps[:n] in outer for n in range(len(steps)))


def _merged_values(base: Any, over: Any, steps: Steps) -> Any:
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    merged = {key: value for key, value in base.items() if not _is_replaced(key, base, over)}
    for key, value in over.items():
        here = (*steps, key)
        if value is None and not any(here[: len(own)] == own for own in _VALUES_OF_ONES_OWN):
            merged.pop(key, None)
        else:
            merged[key] = _merged_values(merged.get(key), value, here)
    return merged


def _is_replaced(key: str, base: Mapping[str, Any], over: Mapping[str, Any]) -> bool:
    """Whether `over` sets the same duration in another unit."""
    if key in over or base[key] is None:
        return False
    return any(over.get(rival) is not None for rival in rivals_of(key))


def rivals_of(name: str) -> list[str]:
    """The names of the same duration in other units: `every_epochs` for `every_steps`."""
    stem, _, unit = name.rpartition("_")
    if unit not in UNITS:
        return []
    return [f"{stem}_{other}" if stem else other for other in UNITS if other != unit]


# ---- environment

_BEGIN = "${env:"
_REFERENCE = re.compile(r"\$\{env:([^}]*)\}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def with_environment(
    document: Document,
) -> tuple[Document, set[Steps], list[tuple[SourcePosition, str, str]]]:
    """The document with each `${env:NAME}` replaced.

    Also returns the positions of values that were a reference as a whole; and position, key and
    reason of those that could not be replaced: the variable is not set, or the key could change
    the result.
    """
    texts: dict[Steps, str] = {}
    whole: set[Steps] = set()
    faults = []
    for steps, value in _walk(document.values, ()):
        if not isinstance(value, str) or _BEGIN not in value:
            continue
        try:
            texts[steps] = _expanded(steps, value)
        except SpecError as error:
            faults.append((document.place_of_value(steps), dotted(steps), str(error)))
        if _REFERENCE.fullmatch(value):
            whole.add(steps)
    return with_values(document, texts), whole, faults


def _expanded(steps: Steps, text: str) -> str:
    if not any(dotted(steps[:n]) in FROM_ENVIRONMENT for n in range(1, len(steps) + 1)):
        raise SpecError(
            "${env:...} is only allowed in keys that cannot change the result "
            f"({', '.join(FROM_ENVIRONMENT)}), so that a spec means the same everywhere. Give it "
            f'on the command line: {dotted(steps)}="$NAME"'
        )

    def value_of(found: re.Match[str]) -> str:
        name = found[1]
        if not _VARIABLE.fullmatch(name):
            raise SpecError(f"{name!r} is not the name of an environment variable")
        if is_secret_name(name):
            raise SpecError(
                f"{name} is the name of a secret, which would be written into the run's spec.yaml. "
                "Secrets stay in the environment; the code that needs them reads them there"
            )
        if name not in os.environ:
            near = did_you_mean(name, os.environ)
            near = near if near.startswith("; did") else ""
            raise SpecError(f"the environment variable {name} is not set{near}")
        return os.environ[name]

    expanded = _REFERENCE.sub(value_of, text)
    if _BEGIN in expanded:
        raise SpecError(
            "the text after ${env: is not NAME}, or the value of a variable contains ${env: itself"
        )
    return expanded


def with_values(document: Document, values: Mapping[Steps, Any]) -> Document:
    """The document with other values at existing positions."""

    def replaced(value: Any, steps: Steps) -> Any:
        if steps in values:
            return values[steps]
        if isinstance(value, dict):
            return {key: replaced(inner, (*steps, key)) for key, inner in value.items()}
        if isinstance(value, list):
            return [replaced(inner, (*steps, at)) for at, inner in enumerate(value)]
        return value

    return replace(document, values=replaced(document.values, ()))


def read_as_scalars(document: Document, places: set[Steps]) -> Document:
    """The document with the texts at `places` parsed as YAML: `8` is a number."""
    return with_values(document, {steps: scalar(find(document.values, steps)) for steps in places})


def read_spec_file(source: str | os.PathLike[str] | Mapping[str, Any]) -> Document:
    """The document of a file or a mapping, merged with the files that it extends."""
    if isinstance(source, Mapping):
        return with_bases(document_of(source))
    return with_bases(read_document(source))


def keys_in(path: str | os.PathLike[str]) -> list[str]:
    """The keys that a file of overrides sets, such as `optimizer.lr`."""
    found = _walk(read_document(Path(path)).values, ())
    return [dotted(steps) for steps, value in found if not isinstance(value, dict)]
