"""Activation checkpointing: chosen modules recompute their activations in the backward pass.

Only the inputs of such a module are kept for the backward pass, which then runs the module's
forward pass a second time.  This costs the additional computation, and saves the memory of
everything inside the module.  The second pass draws the same random numbers (of torch, numpy and
Python) and does not update BatchNorm's statistics, so the result has the same bits as without.

Source: Chen et al., arXiv:1604.06174; torch's non-reentrant implementation.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from service.basics.errors import SpecError
from service.distributed.batchnorm import statistics_of
from service.optimization.buffers import Moving
from service.optimization.flops import uncounted
from service.spec.models import ActivationCheckpointingSpec

_WHERE = "model.activation_checkpointing.match"


def checkpoint_activations(model: nn.Module, spec: ActivationCheckpointingSpec | None) -> list[str]:
    """The names of the modules that recompute their activations from now on.

    Only their class changes, as for BatchNorm layers in `batchnorm.prepare`:
    parameters, hooks, `isinstance` and the keys of the state dict do not change, and a copy
    of the model behaves in the same way.

    Raises:
        SpecError: the pattern matches nothing, or a module that cannot be computed twice.
    """
    if spec is None:
        return []
    chosen = _outermost(model, spec.match)
    if not chosen:
        shown = [name for name, module in model.named_modules() if name and _has_forward(module)]
        raise SpecError(
            f"{_WHERE}: {spec.match!r} matches no module. The model has "
            f"{', '.join(shown[:8])}{' ...' if len(shown) > 8 else ''}."
        )
    kinds: dict[type, type] = {}
    for name, module in chosen.items():
        kind = type(module)
        if isinstance(module, _BatchNorm | torch.jit.ScriptModule):
            raise SpecError(
                f"{_WHERE}: {spec.match!r} chooses {name} of class {kind.__qualname__}, which "
                "cannot be recomputed. Choose the block that contains it."
            )
        if not issubclass(kind, _Checkpointed):
            members = {"__module__": __name__}
            if kind not in kinds:
                kinds[kind] = type(f"Checkpointed{kind.__name__}", (_Checkpointed, kind), members)
            module.__class__ = kinds[kind]
    return list(chosen)


def require_still_buffers(
    model: nn.Module, moving: Moving, spec: ActivationCheckpointingSpec | None
) -> None:
    """Check that no buffer, besides BatchNorm's, changes in a module that is computed twice.

    Raises:
        SpecError: one does: it would change twice.
    """
    if spec is None:
        return
    inside = tuple(f"{name}." for name in _outermost(model, spec.match))
    found = [name for name in [*moving.kept, *moving.reshaped] if name.startswith(inside)]
    if found:
        raise SpecError(
            f"{_WHERE}: the buffer {found[0]} changes in the forward pass, and recomputing the "
            "module would change it twice. Choose modules without it."
        )


def _outermost(model: nn.Module, pattern: str) -> dict[str, nn.Module]:
    """The modules whose names match; of nested ones, the outermost."""
    chosen: dict[str, nn.Module] = {}
    for name, module in model.named_modules():  # a module comes before its children
        within = any(name.startswith(f"{outer}.") for outer in chosen)
        if name and not within and _has_forward(module) and fnmatchcase(name, pattern):
            chosen[name] = module
    return chosen


def _has_forward(module: nn.Module) -> bool:
    """Whether it is called, and is not only a list or a dictionary of modules."""
    return not isinstance(module, nn.ModuleList | nn.ModuleDict)


class _Checkpointed(nn.Module):
    """A module whose activations are recomputed in the backward pass."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        forward = super().forward
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        if torch.compiler.is_compiling():  # which traces both passes, and does not support contexts
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)
        return checkpoint(
            forward, *args, use_reentrant=False, context_fn=lambda: _contexts(self), **kwargs
        )


def _contexts(module: nn.Module) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """The contexts of the first and of the second pass; called at the start of the first one."""
    return nullcontext(), _second_pass(module, random.getstate(), np.random.get_state())


@contextmanager
def _second_pass(module: nn.Module, python: Any, numpy: Any) -> Iterator[None]:
    """The generators as in the first pass, and no statistics are collected.

    `checkpoint` restores torch's own generators.
    """
    before = random.getstate(), np.random.get_state()
    statistics = [(tensor, tensor.clone()) for tensor in statistics_of(module)]
    random.setstate(python)
    np.random.set_state(numpy)
    try:
        with uncounted():
            yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        _give_back(statistics)


@torch.no_grad()
def _give_back(values: list[tuple[Tensor, Tensor]]) -> None:
    for tensor, before in values:
        tensor.copy_(before)
