"""A training state as named tensors and plain values, and its restoration."""

from __future__ import annotations

import copy
import inspect
import json
import math
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from service.basics.errors import NoCheckpoint, SpecError, did_you_mean
from service.checkpoints.packing import DTYPES, is_wrapped, kept, pack, rewrapped, unpacked
from service.optimization.optimizers import Together, require_one_state, step_of, stepped_by
from service.optimization.train_state import Best, TrainState
from service.runs.checkpoint_files import AVERAGE, MODEL, OPTIMIZER, Entry, read_state
from service.sharding.heap import populate
from service.sharding.sharding import (
    empty_like_rows,
    is_sharded,
    own_rows,
    rows_like,
    sharded_like,
)


@dataclass(frozen=True)
class Content:
    """The content of a checkpoint: tensors by file and name, all else as JSON values."""

    tensors: dict[str, dict[str, Tensor]]
    rest: dict[str, Any]
    trained: frozenset[str]
    """The names of weights that are parameters; the others are buffers."""
    still: frozenset[str] = frozenset()
    """The parameters that no pass changes, and whose optimizer state none changes."""

    def entries(self, file: str) -> list[Entry]:
        """The tensors of one file, as entries of its header."""
        return [Entry(n, DTYPES[t.dtype], tuple(t.shape)) for n, t in self.tensors[file].items()]

    def is_still(self, file: str, name: str) -> bool:
        """Whether the tensor of that name in that file changes in an update only."""
        # The name of an optimizer's state ends with that of its parameter.
        return (name.partition(":")[2] if file == OPTIMIZER else name) in self.still

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for tensors in self.tensors.values() for t in tensors.values())

    @property
    def is_sharded(self) -> bool:
        """Whether each process has only some rows of the trained tensors."""
        return any(is_sharded(tensor) for tensor in self.tensors[MODEL].values())


def content_of(state: TrainState, places: list[dict[str, Any]] | None = None) -> Content:
    """The content of a checkpoint of `state`; tensors are shared with it, other values are copied.

    Args:
        places: the position of each process in a stream of data.
    Raises:
        SpecError: the model or the optimizer has a value that cannot be saved.
    """
    with state.evaluated():
        weights, aliases = weights_of(state.model)
        if state.is_modal:  # they exist only inside this context
            weights = {name: tensor.clone() for name, tensor in weights.items()}
    held, described = optimizer_state(state)
    files = {MODEL: weights, OPTIMIZER: held}
    if state.average is not None:
        files[AVERAGE] = weights_of(state.average.model)[0]
    rest = {
        "step": state.step,
        "best": asdict(state.best) if state.best else None,
        "runners_up": [asdict(other) for other in state.bests[1:]],
        "memory": state.memory(),
        "stream": places,
        "scaler": state.scaler.state_dict() if state.scaler else None,
        "skipped_steps": state.skipped_steps,
        "faulty_steps": state.faulty_steps,
        "untested": state.untested,
    }
    # New values are not copied: that would cost as much as copying a small model.
    rest = copy.deepcopy(rest) | {"optimizer": described, "aliases": aliases}
    trained = frozenset(name for name, _ in state.model.named_parameters())
    ordered = {name: _in_order_on_disk(tensors, trained) for name, tensors in files.items()}
    return Content(ordered, rest, trained, state.still)


def weights_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict with each tensor once, and for tied ones the name under which it is stored.

    Raises:
        SpecError: the state dict contains a value that is not a tensor, or a type that cannot be
            saved.
    """
    weights: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    parameters = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES:
            kind = getattr(tensor, "dtype", type(tensor).__name__)
            raise SpecError(
                f"task: the model's state contains {name!r}, a {kind}, which a checkpoint cannot "
                "contain. Register it as a buffer of another type, or with persistent=False."
            )
        if is_sharded(tensor):  # a process may have no row of it, so it has no address
            place: tuple[Any, ...] = (parameters[name],)
        else:
            place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and place in first:
            aliases[name] = first[place]
        else:
            first[place] = name
            weights[name] = tensor.detach() if tensor.requires_grad else tensor
    return weights, aliases


def _in_order_on_disk(tensors: Mapping[str, Tensor], trained: frozenset[str]) -> dict[str, Tensor]:
    """The widest types first: each starts at a multiple of its own width.

    Among equal widths the buffers are last, so that they are adjacent.
    """
    ordered = sorted(
        tensors.items(), key=lambda item: (-item[1].element_size(), item[0] not in trained)
    )
    return dict(ordered)


def expected_bytes(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, averaged: bool = False
) -> int | None:
    """Bytes of a checkpoint's tensors, before the first step; None if unknown until a step.

    The optimizer takes a step on parameters of a few numbers: its state
    for each is as large as the parameter, or one number, or the size is unknown.

    Args:
        averaged: the moving average of the weights is saved too.
    Raises:
        SpecError: the model has a value that cannot be saved.
    """
    weights = sum(tensor.nbytes for tensor in weights_of(model)[0].values())
    if type(optimizer).__module__.partition(".")[0] != "torch":
        return None  # a copy might share counters with the real optimizer
    groups = [[(_small(p), p) for p in group["params"]] for group in optimizer.param_groups]
    twin = copy.copy(optimizer)
    twin.state = defaultdict(dict)
    twin.param_groups = [
        {**group, "params": [small for small, _ in pairs], "foreach": False}
        | ({"fused": None} if "fused" in group else {})
        for group, pairs in zip(optimizer.param_groups, groups, strict=True)
    ]
    try:
        step_of(twin)()
    except (RuntimeError, TypeError, NotImplementedError, AssertionError):
        # It needs a closure, sparse gradients or a GPU: lbfgs, capturable.
        return None
    held = [
        _bytes_held(value, small, parameter)
        for pairs in groups
        for small, parameter in pairs
        for value in twin.state[small].values()
        if isinstance(value, Tensor)
    ]
    if None in held:
        return None
    return sum(filter(None, held)) + weights * (2 if averaged else 1)


def _small(parameter: Tensor) -> Tensor:
    """A parameter of the same kind with two numbers in each dimension, and a gradient."""
    shape = (2,) * parameter.dim()
    small = torch.zeros(shape, dtype=parameter.dtype, device="cpu", requires_grad=True)
    small.grad = torch.zeros_like(small)
    return small


def _bytes_held(value: Tensor, small: Tensor, parameter: Tensor) -> int | None:
    """Bytes for the real parameter of the state `value` of the small one; None if unknown."""
    if value.shape == small.shape:
        return parameter.numel() * value.element_size()
    return value.nbytes if value.dim() == 0 else None


# ---- load


def load(
    directory: Path,
    state: TrainState,
    *,
    index: int = 0,
    rename: Mapping[str, str] | None = None,
) -> None:
    """Load the content of a checkpoint into `state`, on process `index`.

    Args:
        rename: new names of parameters and modules that were saved under old ones.

    Raises:
        SpecError: it does not match the model or the optimizer.
        NoCheckpoint: its files cannot be read.
    """
    rest, renamed = read_state(directory), Renaming(rename or {})
    weights = _read_weights(directory, rest)
    average = _read_weights(directory, rest, average=True) if state.average else {}
    held = _tensors(directory / OPTIMIZER)
    _load_weights(state.model, {renamed(name): value for name, value in weights.items()}, directory)
    if state.average is not None:
        averaged = {renamed(name): value for name, value in average.items()}
        _load_weights(state.average.model, averaged, directory)
    try:
        if state.scaler is not None:
            state.scaler.load_state_dict(rest["scaler"])
        state.skipped_steps, state.faulty_steps = rest["skipped_steps"], rest["faulty_steps"]
        _load_optimizer(state, held, rest["optimizer"], renamed, directory)
        if state.stream is not None and rest["stream"] is not None:
            state.stream.move_to(rest["stream"], index)
        state.step = rest["step"]
        state.untested = rest.get("untested")  # checkpoints of earlier versions have none
        found = [rest["best"], *rest.get("runners_up", [])] if rest["best"] else []
        state.bests = [Best(**best) for best in found]
        state.remember(rest["memory"])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise NoCheckpoint(
            f"The checkpoint {directory} does not have the format of this version "
            f"({type(error).__name__}: {error})."
        ) from error


def load_weights(
    directory: Path,
    model: nn.Module,
    *,
    rename: Mapping[str, str] | None = None,
    average: bool = False,
) -> None:
    """Load only the weights of a checkpoint into `model`, renamed as in `load`.

    Args:
        average: their moving average instead of the latest.
    Raises:
        SpecError: they do not match the model, or there is no average.
        NoCheckpoint: its files cannot be read.
    """
    weights = _read_weights(directory, read_state(directory), average=average)
    renamed = Renaming(rename or {})
    _load_weights(model, {renamed(name): value for name, value in weights.items()}, directory)


def _read_weights(
    directory: Path, rest: Mapping[str, Any], *, average: bool = False
) -> dict[str, Tensor]:
    """Weights by all of their names.

    Args:
        average: the moving average of the weights instead of the latest.
    """
    if average and not (directory / AVERAGE).exists():
        raise SpecError(
            f"The checkpoint {directory} has no moving average of the weights; "
            "it was trained without model.moving_average."
        )
    weights = _tensors(directory / (AVERAGE if average else MODEL))
    return weights | {alias: weights[name] for alias, name in rest["aliases"].items()}


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise NoCheckpoint(f"{path} cannot be read: {error}.") from error


def _load_weights(model: nn.Module, weights: dict[str, Tensor], directory: Path) -> None:
    own = model.state_dict()
    missing, strange = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    if missing or strange:
        near = did_you_mean(missing[0], strange) if missing and strange else "."
        differs = [f"lacks {missing[:5]}"] if missing else []
        differs += [f"has {strange[:5]} besides"] if strange else []
        raise SpecError(
            f"The checkpoint {directory} belongs to another model: it {' and '.join(differs)}"
            f"{near}{_how_to_rename(missing, strange)}"
        )
    shapes = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if weights[name].shape != tensor.shape
    ]
    if shapes:
        raise SpecError(
            f"The checkpoint {directory} belongs to another model: {'; '.join(shapes[:5])}"
        )
    model.load_state_dict(_by_rows(model, own, weights))


def _by_rows(
    model: nn.Module, own: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What `load_state_dict` takes of the weights; rows of parameters are copied here.

    Then it copies each of those parameters to itself, which takes no time.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    given, windows = {}, []
    for name, tensor in own.items():
        if is_sharded(tensor) and _are_one(tensor, parameters.get(name)):
            windows.append((own_rows(tensor), rows_like(tensor, weights[name])))
            given[name] = tensor
        else:
            given[name] = sharded_like(tensor, weights[name])
    _fill(windows)
    return given


def _are_one(tensor: Tensor, parameter: nn.Parameter | None) -> bool:
    """Whether the value in a state dict is the parameter itself, and not computed from it."""
    if parameter is None or not is_sharded(parameter):
        return False
    own, rows = own_rows(parameter), own_rows(tensor)
    return own.data_ptr() == rows.data_ptr() and (own.shape, own.dtype) == (rows.shape, rows.dtype)


def _how_to_rename(missing: list[str], strange: list[str]) -> str:
    if not (missing and strange):
        return ""
    return (
        " If it was renamed, add "
        f"checkpoint.rename={{{json.dumps(strange[0])}: {json.dumps(missing[0])}}}; the name of a "
        "module renames everything in it."
    )


def read_weights(directory: Path, *, average: bool = False) -> dict[str, Tensor]:
    """A checkpoint's weights by all of their names, or their moving average.

    Raises:
        SpecError: there is no average.
        NoCheckpoint: its files cannot be read.
    """
    return _read_weights(directory, read_state(directory), average=average)


class Renaming:
    """New names for saved names; the name of a module renames everything in it."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self._names = names

    def __call__(self, name: str) -> str:
        parts = name.split(".")
        for length in range(len(parts), 0, -1):  # the longest matching path wins
            new = self._names.get(".".join(parts[:length]))
            if new is not None:
                return ".".join([new, *parts[length:]])
        return name


# ---- the optimizer

# Implementation settings of this machine, and the parameters, which are stored by name.
_NOT_OF_THE_RUN = {"params", "param_names", "fused", "foreach", "capturable", "differentiable"}


# Prefix of a parameter's name: its value in training, if the weights are those for testing.
_TRAINED_ON = "trained on"


def optimizer_state(state: TrainState) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's state by parameter name: tensors, and plain values that refer to them."""
    tensors: dict[str, Tensor] = {}
    names = {id(p): name for name, p in state.model.named_parameters()}
    by_name = {
        names[id(parameter)]: {
            key: pack(value, f"{key}:{names[id(parameter)]}", tensors)
            for key, value in values.items()
        }
        for parameter, values in state.optimizer.state.items()
    }
    groups = [
        {
            "names": [names[id(parameter)] for parameter in group["params"]],
            "values": {
                key: pack(value, f"{key}:group {number}", tensors)
                for key, value in group.items()
                if key not in _NOT_OF_THE_RUN
            },
        }
        for number, group in enumerate(state.optimizer.param_groups)
    ]
    if state.is_modal:
        members = [p for group in state.optimizer.param_groups for p in group["params"]]
        tensors |= {f"{_TRAINED_ON}:{names[id(p)]}": p.detach() for p in members}
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
        (list(map(renamed, group["names"])), kept(unpacked(group["values"], tensors)))
        for group in described["groups"]
    ]
    values = {name: unpacked(entries, tensors) for name, entries in saved.items()}
    _require_like_parameters(values, parameters, optimizer, directory)
    if isinstance(optimizer, torch.optim.LBFGS):
        values = _in_order(values, groups[0][0], optimizer, parameters)
    _load_groups(state, groups, directory)
    _require_whole(values, parameters, optimizer, directory)
    members = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = {id(parameter): number for number, parameter in enumerate(members)}
    whole = {
        numbers[id(parameters[name])]: entries
        for name, entries in values.items()
        if id(parameters[name]) in numbers
    }
    by_number = {n: _own_rows_of(entries, members[n]) for n, entries in whole.items()}
    own = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": by_number, "param_groups": own})
    require_one_state(optimizer)
    windows: list[tuple[Tensor, Tensor]] = []
    for number, entries in whole.items():
        held = optimizer.state[members[number]]
        for key, value in entries.items():
            held[key] = _as_saved(held[key], value, members[number], windows)
    windows += _trained_on(state, tensors, renamed, directory)
    _fill(windows)


def _own_rows_of(entries: Mapping[str, Any], parameter: nn.Parameter) -> dict[str, Any]:
    """The state of a parameter; if the parameter is sharded, only this process's rows.

    Torch moves all of it to the parameter's device, which may have no space for the whole state.
    """
    if not is_sharded(parameter):
        return dict(entries)
    return {
        key: own_rows(parameter)
        if isinstance(value, Tensor) and value.shape == parameter.shape
        else value
        for key, value in entries.items()
    }


def _trained_on(
    state: TrainState, tensors: Mapping[str, Tensor], renamed: Renaming, directory: Path
) -> list[tuple[Tensor, Tensor]]:
    """Parameters with a separate value for training, each with that value."""
    parameters = dict(state.model.named_parameters()) if state.is_modal else {}
    found: list[tuple[Tensor, Tensor]] = []
    for key, value in tensors.items():
        kind, _, name = key.partition(":")
        if kind != _TRAINED_ON:
            continue
        parameter = parameters.get(renamed(name))
        if parameter is None or parameter.shape != value.shape:
            raise SpecError(
                f"The checkpoint {directory} contains {key} of shape {list(value.shape)}, which "
                "is not a parameter of this model and optimizer."
            )
        found.append((parameter.detach(), value))
    return found


def _load_groups(
    state: TrainState, groups: list[tuple[list[str], dict[str, Any]]], directory: Path
) -> None:
    """Set each group of the optimizer to the values of the saved group with the same parameters.

    The order may have changed; which parameters share a group may not.
    """
    names = {id(p): name for name, p in state.model.named_parameters()}
    steps = stepped_by(state.optimizer)
    home = {name: number for number, (members, _) in enumerate(groups) for name in members}
    for group in state.optimizer.param_groups:
        members = [names[id(parameter)] for parameter in group["params"]]
        number = home.get(members[0], -1)
        if number < 0 or set(groups[number][0]) != set(members):
            raise SpecError(
                f"The checkpoint {directory} was made with other parameter groups: "
                f"{members[0]!r} shared its group with other parameters. "
                "Use the original groups, or start over with --fresh."
            )
        values = groups[number][1]
        if _is_of_torch(type(steps[id(group["params"][0])])):
            for key in values.keys() & group.keys():
                if not _is_alike(values[key], group[key]):
                    raise SpecError(
                        f"The checkpoint {directory} does not match the optimizer: {key} of a "
                        f"group is {values[key]!r:.40}, and now {group[key]!r:.40}. Use a "
                        "checkpoint of this optimizer."
                    )
        group |= values


def _is_alike(saved: Any, own: Any) -> bool:
    """Whether a saved option of an optimizer of torch is of the same kind as the current one."""
    if isinstance(own, tuple | list):
        same = isinstance(saved, tuple | list) and len(saved) == len(own)
        return same and all(map(_is_alike, saved, own))
    if saved is None or own is None or isinstance(own, Tensor):
        return True
    if isinstance(own, bool | str):
        return type(saved) is type(own)
    if isinstance(saved, Tensor):
        return saved.numel() == 1
    return isinstance(saved, int | float) and not isinstance(saved, bool) and math.isfinite(saved)


# State of torch.optim with its own shapes, which its operations check.
_OF_OTHER_SHAPES = {"row_var", "col_var"}
# State that torch's fused kernels read.
_OF_KERNELS = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "sum", "step"}


def _require_like_parameters(
    values: Mapping[str, Mapping[str, Any]],
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    directory: Path,
) -> None:
    """Refuse state that a fused kernel would read beyond its end: it checks neither shape nor type.

    The state of torch.optim for a parameter has the shape of the parameter, or is one number.
    LBFGS has its own vectors, without a fused kernel; other packages may have any state.

    Raises:
        SpecError: names the wrong state.
    """
    steps = stepped_by(optimizer)
    for name, entries in values.items():
        parameter = parameters[name]
        for key, value in entries.items():
            if not isinstance(value, Tensor) or not _is_checked(key, steps.get(id(parameter))):
                continue
            number = value.dim() == 0 and value.dtype in (torch.float32, torch.float64)
            if number and (parameter.dim() == 0 or key in _NUMBERS):
                continue
            alike = value.shape == parameter.shape and value.dtype == parameter.dtype
            if alike and key not in _NUMBERS:
                continue
            wanted = "one float" if key in _NUMBERS else _kind(parameter)
            raise SpecError(
                f"The checkpoint {directory} does not match the optimizer: {key} of {name} is "
                f"{_kind(value)} instead of {wanted}. Use a checkpoint of this model and optimizer."
            )


def _is_checked(key: str, optimizer: torch.optim.Optimizer | None) -> bool:
    """Whether this state of an optimizer has the shape of the parameter, or is one number."""
    if isinstance(optimizer, torch.optim.LBFGS):
        return False
    if _is_of_torch(type(optimizer)):
        return key not in _OF_OTHER_SHAPES
    # A class of the user's that extends one of torch's may have more state beside it.
    fused = optimizer is not None and any(group.get("fused") for group in optimizer.param_groups)
    return fused and key in _OF_KERNELS


_NUMBERS = {"step", "eta", "mu", "mu_product"}


def _require_whole(
    values: Mapping[str, Mapping[str, Any]],
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    directory: Path,
) -> None:
    """Refuse state that lacks what its optimizer, one of torch's, reads in a step.

    Raises:
        SpecError: names what is missing.
    """
    steps = stepped_by(optimizer)
    names = {id(parameter): name for name, parameter in parameters.items()}
    for group in optimizer.param_groups:
        wanted: dict[tuple[type, int, torch.dtype], frozenset[str]] = {}
        for parameter in group["params"]:
            entries = values.get(names[id(parameter)], {})
            kind = type(steps[id(parameter)])
            if kind is torch.optim.LBFGS or not _is_of_torch(kind):
                continue
            if not entries and (kind is not torch.optim.Adagrad or isinstance(optimizer, Together)):
                continue  # it has not stepped yet; only Adagrad's state exists from the beginning
            like = kind, parameter.dim(), parameter.dtype
            if like not in wanted:
                wanted[like] = _read_in_a_step(*like, group)
            missing = sorted(wanted[like] - entries.keys())
            if missing:
                raise SpecError(
                    f"The checkpoint {directory} does not match the optimizer: {missing[0]} of "
                    f"{names[id(parameter)]} is missing. Use a checkpoint of this optimizer."
                )


def _is_of_torch(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "torch"


def _read_in_a_step(
    kind: type[Any], dims: int, dtype: torch.dtype, group: Mapping[str, Any]
) -> frozenset[str]:
    """The names of what an optimizer holds after a step: that of one number, with these options."""
    number = nn.Parameter(torch.ones([1] * dims, dtype=dtype))
    number.grad = torch.zeros_like(number)
    if kind is torch.optim.SparseAdam:
        number.grad = number.grad.to_sparse()
    known = inspect.signature(kind).parameters
    options = {key: group[key] for key in known if key in group and key not in _OF_THE_DEVICE}
    tried = kind([number], **options)
    tried.step()
    return frozenset(tried.state[number])


# Options that need a certain device, and change no state.
_OF_THE_DEVICE = {"params", "capturable", "foreach", "fused", "differentiable"}


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _in_order(
    values: dict[str, dict[str, Any]],
    saved_order: list[str],
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
) -> dict[str, dict[str, Any]]:
    """The state of LBFGS, whose vectors contain all parameters, in the current order."""
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
    (entries,) = values.values()  # its whole state is stored with its first parameter
    return {order[0]: {key: ordered(value) for key, value in entries.items()}}


def _as_saved(
    loaded: Any, saved: Any, parameter: Tensor, windows: list[tuple[Tensor, Tensor]]
) -> Any:
    """A copy of `saved` on torch's device, with its own dtype and its parameter's memory layout.

    Torch converts some of an optimizer's values to the parameter's dtype; and an average with the
    channels-last layout of its parameter loses it: a fused step would then mix up its elements.

    Args:
        windows: receives large tensors that are still to be copied, with their sources.
    """
    if is_wrapped(saved):
        return rewrapped(saved, lambda part: part.to(loaded.device, copy=True))
    if isinstance(saved, Tensor) and saved.shape == parameter.shape:
        fresh = empty_like_rows(parameter, dtype=saved.dtype, device=loaded.device)
        windows.append((own_rows(fresh), rows_like(fresh, saved)))
        return fresh
    if isinstance(saved, Tensor):
        return saved.to(loaded.device, copy=True)
    if isinstance(saved, list | tuple):
        pairs = zip(loaded, saved, strict=True)
        return type(saved)([_as_saved(*pair, parameter, windows) for pair in pairs])
    return saved


def _fill(windows: list[tuple[Tensor, Tensor]]) -> None:
    """Copy each second tensor into the first, several in parallel.

    Allocating new memory takes longer than copying into it, and each core can do it.
    """
    with ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="load") as threads:
        copies = [threads.submit(_copy, *pair) for pair in windows]
    for copied in copies:
        copied.result()


def _copy(target: Tensor, source: Tensor) -> None:
    alike = target.dtype == source.dtype and target.is_contiguous() and source.is_contiguous()
    if not (alike and target.device.type == "cpu" and target.dim()):
        target.copy_(source)
        return
    populate(target)
    # With numpy, which starts no additional threads: there are as many as cores.
    into, of = (tensor.reshape(-1).view(torch.uint8).numpy() for tensor in (target, source))
    np.copyto(into, of)
