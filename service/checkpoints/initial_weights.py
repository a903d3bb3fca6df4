"""The initial weights of a run, if the spec's `init` names a source."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from service.basics.atomic_files import is_there, read_json, told_when_unread
from service.basics.errors import EvenstepError, SpecError, did_you_mean
from service.checkpoints.snapshots import Renaming, read_weights, weights_of
from service.distributed.world import World
from service.runs.checkpoint_files import checkpoints_in, find_checkpoint
from service.runs.directory import RunDirectory, find_run
from service.sharding.sharding import own_rows, rows_like
from service.spec.models import InitSpec, Spec

_INDEX_BYTES = 64 << 20
_SHARDED, _WHOLE = "model.safetensors.index.json", "model.safetensors"
_MOST_NAMES = 5


@dataclass(frozen=True)
class InitialWeights:
    """The weights that a model loads from another source, and those that it does not load."""

    source: str
    """The source, as text for the user."""
    taken: Mapping[str, Tensor]
    """By the model's own names."""
    new: Sequence[str]
    """Names in the model whose weights are initialized from the seed."""
    left: Sequence[str]
    """Names in the source, renamed, that the model does not load."""

    def apply(self, model: nn.Module) -> None:
        """Load them into the model, or into a copy of it."""
        own = model.state_dict()
        with torch.no_grad():
            for name, tensor in self.taken.items():
                own_rows(own[name]).copy_(rows_like(own[name], tensor))

    def in_words(self) -> str:
        """One line for the user."""
        told = f"Initial weights from {self.source}: {len(self.taken)} tensors loaded"
        told += f", new {_some(self.new)}" if self.new else ""
        return told + (f", ignored {_some(self.left)}" if self.left else "") + "."

    def table(self) -> list[tuple[str, str, str]]:
        """The loaded, new and ignored tensors: their number and their names."""
        rows = [("loaded", list(self.taken)), ("new", self.new), ("ignored", self.left)]
        return [
            ("initial weights", "tensors", f"from {self.source}"),
            *((what, str(len(names)), _some(names) if names else "-") for what, names in rows),
        ]


def initial_weights(init: InitSpec, model: nn.Module) -> InitialWeights:
    """The weights for `model` from the source in `init`.

    Raises:
        SpecError: the source does not exist, or does not match and `init` does not allow this.
        NoCheckpoint: a checkpoint is damaged.
    """
    source, found = _read(init)
    renamed, whole = Renaming(init.rename), init.rename.get(".")
    given: dict[str, Tensor] = {}
    for name, tensor in found.items():
        here = renamed(name)
        if here == name and whole is not None:
            here = f"{whole}.{name}"
        given[here] = tensor
    own = {**model.state_dict()}
    _require_patterns(init.skip, [*own, *given])
    wanted = {name: tensor for name, tensor in given.items() if not _skipped(name, init.skip)}
    shapes = [
        f"{name} {list(wanted[name].shape)} in the source and {list(own[name].shape)} in the model"
        for name in own.keys() & wanted.keys()
        if wanted[name].shape != own[name].shape
    ]
    if shapes and init.strict:
        raise SpecError(
            f"init: {source} does not match the model: {'; '.join(sorted(shapes)[:_MOST_NAMES])}. "
            "To initialize these from the seed, name them in init.skip, or set init.strict: "
            "false."
        )
    taken = {
        name: wanted[name]
        for name in own
        if name in wanted and wanted[name].shape == own[name].shape
    }
    new = [name for name in own if name not in taken and not _is_tied_to(taken, name, model)]
    left = sorted(given.keys() - taken.keys())
    if init.strict:
        _require_all(source, new, left, init)
    if not taken:
        near = did_you_mean(new[0], left) if new and left else "."
        raise SpecError(
            f"init: {source} has no tensor of this model. It has {_some(left)}, and the model has "
            f"{_some(list(own))}{near} init.rename maps names of the source to names of the model."
        )
    return InitialWeights(source, taken, new, left)


def settled_weights(
    spec: Spec, model: nn.Module, world: World, *, runs: Path, fresh: bool
) -> InitialWeights | None:
    """The initial weights of a run without a checkpoint, the same on every process.

    A run with a checkpoint continues from it, and the source may have been deleted.

    Raises:
        EvenstepError: see `initial_weights`; or processes find different weights; on every process.
    """
    if spec.init is None:
        return None
    begun = not fresh and bool(checkpoints_in(RunDirectory(runs / spec.name).checkpoints))
    if world.from_lead(begun):
        return None
    found: InitialWeights | None = None
    failed: EvenstepError | None = None
    try:
        found = initial_weights(spec.init, model)
    except EvenstepError as error:
        failed = error
    world.fail_together(failed)
    assert found is not None, "all processes have failed together"
    if world.processes == 1:
        return found
    digests = world.gather(_digest(found.taken))
    if len(set(digests)) > 1:
        other = next(index for index, digest in enumerate(digests) if digest != digests[0])
        raise SpecError(
            f"init: process {other} finds other weights in {found.source} than process 0. "
            "Give all processes the same files."
        )
    return found


def _digest(tensors: Mapping[str, Tensor]) -> str:
    whole = hashlib.sha256()
    for name in sorted(tensors):
        whole.update(name.encode())
        whole.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return whole.hexdigest()


# ---- the source


def _read(init: InitSpec) -> tuple[str, dict[str, Tensor]]:
    """The source, as text for the user, and its tensors by their names in the source."""
    place = Path(init.source).expanduser()
    if place.suffix == ".safetensors":
        return str(place), _tensors(place)
    with told_when_unread(place):
        if is_there(place / _SHARDED):
            return str(place), _sharded(place)
        if is_there(place / _WHOLE) and not is_there(place / "manifest.json"):
            return str(place), _tensors(place / _WHOLE)
        if place.is_file() or (place.is_dir() and not is_there(place / "run.json")):
            raise SpecError(
                f"init.from: {place} is not a .safetensors file, a run, or a directory of a "
                f"transformers model with {_WHOLE}. Pickle files (.bin, .pt) are not read: "
                "save them as safetensors."
            )
    run = find_run(place)
    chosen = find_checkpoint(run.checkpoints, init.checkpoint)
    what = "the average after" if init.average else "after"
    weights = read_weights(chosen.path, average=init.average)
    return f"{run.name} {what} step {chosen.step:,}", weights


def _sharded(directory: Path) -> dict[str, Tensor]:
    """The tensors of the files in an index of a transformers model."""
    index = directory / _SHARDED
    try:
        told = read_json(index, at_most=_INDEX_BYTES)
        files = sorted(set(told["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SpecError(f"init.from: {index} cannot be read: {error}.") from error
    if any(Path(file).name != file for file in files):
        raise SpecError(f"init.from: {index} names files outside of its directory.")
    return {name: t for file in files for name, t in _tensors(directory / file).items()}


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise SpecError(f"init.from: there is no file {path}.") from None
    except (OSError, ValueError, SafetensorError) as error:
        raise SpecError(f"init.from: {path} cannot be read: {error}.") from error


# ---- what matches


def _skipped(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _require_patterns(patterns: Sequence[str], names: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = did_you_mean(pattern.rstrip(".*"), names)
            raise SpecError(
                f"init.skip: {pattern!r} matches no tensor of the model or the source{near or '.'}"
            )


def _is_tied_to(taken: Mapping[str, Tensor], name: str, model: nn.Module) -> bool:
    """Whether it is the same tensor as a loaded one."""
    _, aliases = weights_of(model)
    first = aliases.get(name, name)
    return first in taken or any(aliases.get(other) == first for other in taken)


def _require_all(source: str, new: list[str], left: list[str], init: InitSpec) -> None:
    new = [name for name in new if not _skipped(name, init.skip)]
    left = [name for name in left if not _skipped(name, init.skip)]
    if not (new or left):
        return
    told = [f"the model also has {_some(new)}"] if new else []
    told += [f"the model lacks {_some(left)}"] if left else []
    rename = ""
    if new and left:
        rename = f", or rename with init.rename={{{json.dumps(left[0])}: {json.dumps(new[0])}}}"
    raise SpecError(
        f"init: {source} does not match the model: {', and '.join(told)}. Name in init.skip what "
        f"to leave out{rename}, or set init.strict: false to load only what matches."
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more
