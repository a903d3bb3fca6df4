"""Checkpoints: a directory per step, whole or absent, written by one process and believed by none.

Tensors in safetensors, keyed by parameter name; everything else in JSON.  No pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from service.errors import EvenstepError, NoCheckpoint, SpecError, did_you_mean
from service.state import Best, TrainState
from service.world import World

FORMAT = 1
MODEL, AVERAGE, OPTIMIZER, STATE, MANIFEST = (
    "model.safetensors",
    "average.safetensors",
    "optimizer.safetensors",
    "state.json",
    "manifest.json",
)


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint on disk."""

    path: Path
    step: int


class Checkpoints:
    """The checkpoints of one run.  Every process calls `save` and `restore`; the lead writes."""

    def __init__(
        self,
        directory: Path,
        *,
        world: World,
        keep: int,
        facts: Mapping[str, Any],
        say: Callable[[str], None],
        rename: Mapping[str, str] | None = None,
    ) -> None:
        """`facts` go into every manifest: what the run is and on how many processes.

        `rename` gives the new names of parameters and modules that are saved under old ones.
        """
        self._directory = directory
        self._world = world
        self._keep = keep
        self._facts = dict(facts)
        self._say = say
        self._rename = rename or {}

    def save(self, state: TrainState) -> None:
        """Write the state; when this returns on any process it is on disk for all of them.

        Raises:
            EvenstepError: it could not be written; on every process, and the earlier
                checkpoints are as they were.
        """
        failed: EvenstepError | None = None
        places = self._world.gather(state.stream.place()) if state.stream else None
        if self._world.is_lead:
            try:
                self._write(state, places)
            except OSError as error:
                failed = EvenstepError(
                    f"The checkpoint of step {state.step} could not be written to "
                    f"{self._directory}: {error.strerror or error}. Earlier ones are untouched."
                )
        self._world.fail_together(failed)

    def restore(self, state: TrainState) -> bool:
        """Put the newest good checkpoint into `state`; False where there is none yet.

        Raises:
            NoCheckpoint: there are some, and none is good.
            SpecError: it does not fit the model or the optimizer.
        """
        chosen: str | None = None
        failed: EvenstepError | None = None
        if self._world.is_lead:
            try:
                newest = self._newest_good()
                chosen = newest.path.name if newest else None
            except EvenstepError as error:
                failed = error
        self._world.fail_together(failed)
        # One process chooses: two that fell back differently would train two models.
        chosen = self._world.from_lead(chosen)
        if chosen is None:
            return False
        try:
            load(self._directory / chosen, state, index=self._world.index, rename=self._rename)
        except EvenstepError as error:
            failed = error
        self._world.fail_together(failed)
        return True

    def _newest_good(self) -> Checkpoint | None:
        found = checkpoints_in(self._directory)
        for checkpoint in reversed(found):
            damage = damage_of(checkpoint.path)
            if damage is None:
                return checkpoint
            aside = checkpoint.path.with_name(f".damaged-{checkpoint.path.name}")
            self._say(
                f"WARNING: checkpoint {checkpoint.path} is damaged ({damage}); "
                f"kept as {aside.name}, trying the one before."
            )
            if not aside.exists():
                os.rename(checkpoint.path, aside)
        if found:
            raise NoCheckpoint(
                f"None of the {len(found)} checkpoints in {self._directory} can be read; "
                "they are kept there as .damaged-*. Begin again with --fresh."
            )
        return None

    def _write(self, state: TrainState, places: list[dict[str, Any]] | None) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        for leftover in self._directory.glob(".step-*.partial-*"):
            shutil.rmtree(leftover)
        final = self._directory / f"step-{state.step:08d}"
        partial = self._directory / f".{final.name}.partial-{secrets.token_hex(4)}"
        partial.mkdir()
        try:
            write_into(partial, state, self._facts, places)
            if final.exists():  # a run that stopped here and was asked to stop here again
                shutil.rmtree(final)
            os.rename(partial, final)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        _fsync(self._directory)
        if state.best is not None and state.best.step == state.step:
            self._mark_best(final.name)
        self._prune(state)

    def _mark_best(self, name: str) -> None:
        partial = self._directory / ".best.partial"
        partial.write_text(name + "\n")
        _fsync(partial)
        os.replace(partial, self._directory / "best")

    def _prune(self, state: TrainState) -> None:
        kept = state.best.step if state.best else None
        for old in checkpoints_in(self._directory)[: -self._keep]:
            if old.step != kept:
                shutil.rmtree(old.path)


def checkpoints_in(directory: Path) -> list[Checkpoint]:
    """Whole checkpoints, by step; whether they are good is another question."""
    found = [
        Checkpoint(path, int(path.name.removeprefix("step-")))
        for path in directory.glob("step-*")
        if path.name.removeprefix("step-").isdecimal() and path.is_dir() and not path.is_symlink()
    ]
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def find_checkpoint(directory: Path, which: str) -> Path:
    """The checkpoint that `latest`, `best` or a step means, if it is good.

    Raises:
        SpecError: there is none of that name.
        NoCheckpoint: it is damaged.
    """
    found = {str(checkpoint.step): checkpoint.path for checkpoint in checkpoints_in(directory)}
    if not found:
        raise SpecError(f"{directory} holds no checkpoint.")
    best = directory / "best"
    if which == "latest":
        path = list(found.values())[-1]
    elif which == "best" and best.exists():
        path = directory / Path(best.read_text().strip()).name
    elif which in found:
        path = found[which]
    else:
        raise SpecError(f"--checkpoint: there is no {which!r}; there are {', '.join(found)}.")
    damage = damage_of(path)
    if damage is not None:
        raise NoCheckpoint(f"The checkpoint {path} is damaged: {damage}.")
    return path


def load_weights(
    directory: Path,
    model: nn.Module,
    *,
    rename: Mapping[str, str] | None = None,
    average: bool = False,
) -> None:
    """Put a checkpoint's weights into `model`, renamed as for `load`, and leave the rest.

    Args:
        average: their moving average instead of the latest.
    Raises:
        SpecError: they do not fit the model, or there is no average.
        NoCheckpoint: its files cannot be read.
    """
    weights, _ = _read_weights(directory, average=average)
    renamed = Renaming(rename or {})
    _load_weights(model, {renamed(name): value for name, value in weights.items()}, directory)


def write_into(
    directory: Path,
    state: TrainState,
    facts: Mapping[str, Any],
    places: list[dict[str, Any]] | None = None,
) -> None:
    """Write a checkpoint's files, fsynced, the manifest last.

    Args:
        places: where each process is in a stream of data.
    """
    weights, aliases = _without_aliases(state.model)
    held, described = optimizer_state(state)
    save_file(weights, directory / MODEL)
    save_file(held, directory / OPTIMIZER)
    names = [MODEL, OPTIMIZER, STATE]
    if state.average is not None:
        save_file(_without_aliases(state.average.model)[0], directory / AVERAGE)
        names.append(AVERAGE)
    rest = {
        "step": state.step,
        "best": asdict(state.best) if state.best else None,
        "memory": state.memory(),
        "optimizer": described,
        "aliases": aliases,
        "stream": places,
        "scaler": state.scaler.state_dict() if state.scaler else None,
        "skipped_steps": state.skipped_steps,
        "faulty_steps": state.faulty_steps,
    }
    (directory / STATE).write_text(json.dumps(rest, allow_nan=True) + "\n")
    files = {}
    for name in names:
        _fsync(directory / name)
        files[name] = {
            "bytes": (directory / name).stat().st_size,
            "sha256": _sha256(directory / name),
        }
    manifest = {"format": FORMAT, "step": state.step, "time": time.time(), "files": files, **facts}
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    _fsync(directory / MANIFEST)
    _fsync(directory)


def damage_of(directory: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None: every size and hash is checked."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        files = manifest["files"]
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']!r} is not {FORMAT}"
        if set(files) - {AVERAGE} != {MODEL, OPTIMIZER, STATE}:
            return f"the manifest names the files {sorted(files)}"
        for name, told in files.items():
            path = directory / name
            if path.is_symlink() or not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != told["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {told['bytes']}"
            if _sha256(path) != told["sha256"]:
                return f"the content of {name} has changed"
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"{MANIFEST}: {type(error).__name__}: {error}"
    return None


def load(
    directory: Path,
    state: TrainState,
    *,
    index: int = 0,
    rename: Mapping[str, str] | None = None,
) -> None:
    """Put a checkpoint's content into `state`, on process `index`.

    Args:
        rename: new names of parameters and modules that are saved under old ones.

    Raises:
        SpecError: it does not fit the model or the optimizer.
        NoCheckpoint: its files cannot be read.
    """
    weights, rest = _read_weights(directory)
    try:
        average = _read_weights(directory, average=True)[0] if state.average else {}
        held = load_file(directory / OPTIMIZER)
    except (OSError, SafetensorError) as error:
        raise NoCheckpoint(f"The checkpoint {directory} cannot be read: {error}.") from error
    renamed = Renaming(rename or {})
    _load_weights(state.model, {renamed(name): value for name, value in weights.items()}, directory)
    if state.average is not None:
        averaged = {renamed(name): value for name, value in average.items()}
        _load_weights(state.average.model, averaged, directory)
    if state.scaler is not None:
        state.scaler.load_state_dict(rest["scaler"])
    state.skipped_steps, state.faulty_steps = rest["skipped_steps"], rest["faulty_steps"]
    _load_optimizer(state, held, rest["optimizer"], renamed, directory)
    if state.stream is not None and rest["stream"] is not None:
        state.stream.move_to(rest["stream"], index)
    state.step = rest["step"]
    state.best = Best(**rest["best"]) if rest["best"] else None
    state.remember(rest["memory"])


def _read_weights(
    directory: Path, *, average: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(weights by every name they have, the content of state.json).

    Args:
        average: the moving average of the weights instead of the latest.
    """
    if average and not (directory / AVERAGE).exists():
        raise SpecError(
            f"The checkpoint {directory} has no moving average of the weights; "
            "it was trained without model.moving_average."
        )
    try:
        weights = load_file(directory / (AVERAGE if average else MODEL))
        rest: dict[str, Any] = json.loads((directory / STATE).read_text())
    except (OSError, ValueError, SafetensorError) as error:
        raise NoCheckpoint(f"The checkpoint {directory} cannot be read: {error}.") from error
    return weights | {alias: weights[name] for alias, name in rest["aliases"].items()}, rest


def _load_weights(model: nn.Module, weights: dict[str, Tensor], directory: Path) -> None:
    own = model.state_dict()
    missing, strange = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    if missing or strange:
        near = did_you_mean(missing[0], strange) if missing and strange else "."
        raise SpecError(
            f"The checkpoint {directory} is of another model: it lacks {missing[:5]} and has "
            f"{strange[:5]} besides{near}{_how_to_rename(missing, strange)}"
        )
    shapes = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if weights[name].shape != tensor.shape
    ]
    if shapes:
        raise SpecError(f"The checkpoint {directory} is of another model: {'; '.join(shapes[:5])}")
    model.load_state_dict(weights)


def _how_to_rename(missing: list[str], strange: list[str]) -> str:
    if not (missing and strange):
        return ""
    return (
        " If it was renamed, say so: "
        f"checkpoint.rename={{{json.dumps(strange[0])}: {json.dumps(missing[0])}}}; the name of a "
        "module renames all that is in it."
    )


class Renaming:
    """New names of what is saved under old ones; a module's name stands for all that is in it."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self._names = names

    def __call__(self, name: str) -> str:
        parts = name.split(".")
        for length in range(len(parts), 0, -1):  # the longest path that was given wins
            new = self._names.get(".".join(parts[:length]))
            if new is not None:
                return ".".join([new, *parts[length:]])
        return name


# How the arithmetic is laid out on this machine, and the parameters, which have names instead.
_NOT_OF_THE_RUN = {"params", "param_names", "fused", "foreach", "capturable", "differentiable"}


def optimizer_state(state: TrainState) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's state by parameter name: tensors, and the rest with their places in it."""
    tensors: dict[str, Tensor] = {}
    names = {id(p): name for name, p in state.model.named_parameters()}
    by_name = {
        names[id(parameter)]: {
            key: _pack(value, f"{key}:{names[id(parameter)]}", tensors)
            for key, value in values.items()
        }
        for parameter, values in state.optimizer.state.items()
    }
    groups = [
        {
            "names": [names[id(parameter)] for parameter in group["params"]],
            "values": {
                key: _pack(value, f"{key}:group {number}", tensors)
                for key, value in group.items()
                if key not in _NOT_OF_THE_RUN
            },
        }
        for number, group in enumerate(state.optimizer.param_groups)
    ]
    return tensors, {"state": by_name, "groups": groups}


def _load_optimizer(
    state: TrainState,
    tensors: Mapping[str, Tensor],
    described: Mapping[str, Any],
    renamed: Renaming,
    directory: Path,
) -> None:
    optimizer, parameters = state.optimizer, dict(state.model.named_parameters())
    saved = {renamed(name): entries for name, entries in described["state"].items()}
    strange = sorted(saved.keys() - parameters.keys())
    if strange:
        raise SpecError(f"The checkpoint {directory} has optimizer state for {strange[:5]}.")
    groups = [
        (list(map(renamed, group["names"])), _unpacked(group["values"], tensors))
        for group in described["groups"]
    ]
    values = {name: _unpacked(entries, tensors) for name, entries in saved.items()}
    if isinstance(optimizer, torch.optim.LBFGS):
        values = _in_order(values, groups[0][0], optimizer, parameters)
    _load_groups(state, groups, directory)
    members = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = {id(parameter): number for number, parameter in enumerate(members)}
    by_number = {
        numbers[id(parameters[name])]: entries
        for name, entries in values.items()
        if id(parameters[name]) in numbers
    }
    own = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": by_number, "param_groups": own})
    for number, entries in by_number.items():
        held = optimizer.state[members[number]]
        for key, value in entries.items():
            held[key] = _as_saved(held[key], value)


def _load_groups(
    state: TrainState, groups: list[tuple[list[str], dict[str, Any]]], directory: Path
) -> None:
    """Give each of the optimizer's groups the values of the saved group with its parameters.

    Their order may have changed; who shares a group with whom may not.
    """
    names = {id(p): name for name, p in state.model.named_parameters()}
    home = {name: number for number, (members, _) in enumerate(groups) for name in members}
    for group in state.optimizer.param_groups:
        members = [names[id(parameter)] for parameter in group["params"]]
        number = home.get(members[0], -1)
        if number < 0 or set(groups[number][0]) != set(members):
            raise SpecError(
                f"The checkpoint {directory} was made with other parameter groups: "
                f"{members[0]!r} shared its settings with other parameters than now. "
                "Group them as they were, or begin again with --fresh."
            )
        group |= groups[number][1]


def _in_order(
    values: dict[str, dict[str, Any]],
    saved_order: list[str],
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
) -> dict[str, dict[str, Any]]:
    """The state of LBFGS, whose vectors hold all parameters in a row, in the order of now."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    order = [names[id(parameter)] for parameter in optimizer.param_groups[0]["params"]]
    sizes = [parameters[name].numel() for name in saved_order]

    def ordered(value: Any) -> Any:
        if isinstance(value, list):
            return [ordered(item) for item in value]
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        pieces = dict(zip(saved_order, torch.split(value, sizes), strict=True))
        return torch.cat([pieces[name] for name in order])

    if not values:
        return {}
    (entries,) = values.values()  # it keeps all of it with its first parameter
    return {order[0]: {key: ordered(value) for key, value in entries.items()}}


def _as_saved(loaded: Any, saved: Any) -> Any:
    """`saved` where torch put it: it gives some of an optimizer's numbers the parameter's type."""
    if isinstance(saved, Tensor):
        return saved.to(loaded.device)
    if isinstance(saved, list):
        return [_as_saved(*pair) for pair in zip(loaded, saved, strict=True)]
    return saved


def _pack(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """JSON for `value`; its tensors go into `tensors` under `key`."""
    if isinstance(value, Tensor):
        tensors[key] = value.detach().cpu().contiguous()
        return {"tensor": key}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_pack(v, f"{n}.{key}", tensors) for n, v in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise SpecError(
        f"optimizer.name: its state {key!r} is a {type(value).__name__}; cannot save it."
    )


def _unpack(packed: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    if "tensor" in packed:
        return tensors[packed["tensor"]]
    if "list" in packed:
        return [_unpack(part, tensors) for part in packed["list"]]
    if "tuple" in packed:
        return tuple(_unpack(part, tensors) for part in packed["tuple"])
    return packed["value"]


def _unpacked(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {key: _unpack(value, tensors) for key, value in values.items()}


def _without_aliases(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict with each tensor once, and for tied ones the name it is stored under."""
    weights: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[int, torch.Size], str] = {}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise SpecError(f"task: the model's {name!r} is a {type(tensor).__name__}, no tensor.")
        place = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() and place in first:
            aliases[name] = first[place]
        else:
            first[place] = name
            weights[name] = tensor.detach().cpu().contiguous()
    return weights, aliases


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
