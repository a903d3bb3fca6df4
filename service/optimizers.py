"""Optimizers by name, and parameter groups by pattern: every parameter in exactly one."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from service.errors import SpecError, did_you_mean
from service.optimizer_options import OPTIMIZERS
from service.spec import GroupSpec, OptimizerSpec

NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)

# Options that choose an implementation, of which torch takes one at a time.
_LAYOUT = {"fused", "foreach", "differentiable"}


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that are treated alike."""

    match: str
    """The pattern that chose them; `*` for those that no pattern chose."""
    names: tuple[str, ...]
    options: dict[str, Any]
    """What differs from the optimizer's own settings."""
    frozen: bool = False


def parameter_groups(model: nn.Module, spec: OptimizerSpec) -> list[ParameterGroup]:
    """Every trainable parameter of the model in exactly one group; the first match wins.

    A spec without groups has one group, `*`.  With groups, every parameter must match one.

    Raises:
        SpecError: a pattern chooses nothing, or a parameter is in no group; lists the names.
    """
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    if not names:
        raise SpecError("task: the model has no trainable parameter.")
    patterns: Sequence[GroupSpec] = spec.groups or (GroupSpec(match="*"),)
    chosen: list[list[str]] = [[] for _ in patterns]
    for name in names:
        home = next((i for i, g in enumerate(patterns) if fnmatchcase(name, g.match)), None)
        if home is None:
            left_out = [n for n in names if not any(fnmatchcase(n, g.match) for g in patterns)]
            raise SpecError(
                f"optimizer.groups: {_listed(left_out)} "
                f"{'is' if len(left_out) == 1 else 'are'} in no group. "
                "Add a group, or end with {match: '*'}."
            )
        chosen[home].append(name)
    for number, (pattern, found) in enumerate(zip(patterns, chosen, strict=True)):
        if not found:
            raise SpecError(
                f"optimizer.groups.{number}.match: {pattern.match!r} chooses no parameter "
                f"that an earlier group has not. The model has {_listed(names)}."
            )
    spared = _without_decay(model, spec)
    groups = []
    for pattern, found in zip(patterns, chosen, strict=True):
        options = pattern.options()
        decayed = tuple(n for n in found if n not in spared)
        rest = tuple(n for n in found if n in spared)
        if decayed:
            groups.append(ParameterGroup(pattern.match, decayed, options, pattern.freeze))
        if rest:
            spare = {**options, "weight_decay": 0.0}
            groups.append(ParameterGroup(pattern.match, rest, spare, pattern.freeze))
    return groups


def _without_decay(model: nn.Module, spec: OptimizerSpec) -> set[str]:
    """Names of the parameters that `no_decay` spares."""
    spared = set()
    if "bias" in spec.no_decay:
        spared |= {n for n, _ in model.named_parameters() if n.rpartition(".")[2] == "bias"}
    if "norm" in spec.no_decay:
        for prefix, module in model.named_modules():
            if isinstance(module, NORMS) or type(module).__name__.endswith("Norm"):
                dot = f"{prefix}." if prefix else ""
                spared |= {dot + n for n, _ in module.named_parameters(recurse=False)}
    return spared


def _listed(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def make_optimizer(
    model: nn.Module, spec: OptimizerSpec, groups: Sequence[ParameterGroup]
) -> torch.optim.Optimizer:
    """The optimizer over `groups`; frozen groups are taken out of training.

    Raises:
        SpecError: an option its class does not have or does not accept.
    """
    make = optimizer_class(spec.name)
    parameters = dict(model.named_parameters())
    trained: list[dict[str, Any]] = []
    for group in groups:
        members = [parameters[name] for name in group.names]
        if group.frozen:
            for member in members:
                member.requires_grad_(False)
            continue
        _check_options(make, group.options, "optimizer.groups")
        trained.append({"params": members, **group.options})
    if not trained:
        raise SpecError("optimizer.groups: every group is frozen, so there is nothing to train.")
    options = spec.options()
    _check_options(make, options, "optimizer")
    if _fused_pays(make, parameters) and not _LAYOUT & set(options):
        options["fused"] = True
    try:
        return make(trained, **options)
    except (ValueError, TypeError, RuntimeError) as error:
        raise SpecError(f"optimizer: torch's {make.__name__} says: {error}.") from error


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """The class that `sgd` or `package.module:Class` names.

    Raises:
        SpecError: it cannot be imported or is no optimizer.
    """
    if ":" not in name:
        known = OPTIMIZERS[name].torch_name
        if not hasattr(torch.optim, known):
            raise SpecError(
                f"optimizer.name: torch {torch.__version__} has no {known}; use a newer torch."
            )
        found = getattr(torch.optim, known)
    else:
        module, _, attribute = name.partition(":")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise SpecError(f"optimizer.name: cannot import {name}: {error}.") from error
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise SpecError(f"optimizer.name: {name} is not a torch.optim.Optimizer.")
    return found


def _check_options(make: type[torch.optim.Optimizer], options: dict[str, Any], where: str) -> None:
    signature = inspect.signature(make.__init__).parameters
    if any(p.kind is p.VAR_KEYWORD for p in signature.values()):
        return
    known = [n for n in signature if n not in ("self", "params")]
    for option in options:
        if option not in known:
            near = did_you_mean(option, known)
            raise SpecError(f"{where}.{option}: {make.__name__} has no such option{near}")


def _fused_pays(make: type[torch.optim.Optimizer], parameters: dict[str, nn.Parameter]) -> bool:
    """Whether torch's one-kernel implementation exists for these parameters; measured faster."""
    return "fused" in inspect.signature(make.__init__).parameters and all(
        p.is_floating_point() and p.device.type in ("cpu", "cuda", "mps", "xpu")
        for p in parameters.values()
    )
