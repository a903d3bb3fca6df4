"""torch.compile of a model in place: the keys of its state dict do not change."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from service.basics.errors import SpecError


def spare_compiler() -> None:
    """Let optimizers be created in this process without importing torch's compiler.

    Torch excludes an optimizer's methods from compilation, and imports the compiler for this, at
    the first call: a second of every start.  Without the compiler, this is not needed.
    """
    if "torch._dynamo" in sys.modules:
        return
    methods = ("add_param_group", "state_dict", "load_state_dict", "zero_grad")
    for method in [getattr(Optimizer, name) for name in methods]:
        bare = getattr(method, "__wrapped__", None)
        if bare is not None and not hasattr(bare, _KEPT_OUT):
            setattr(bare, _KEPT_OUT, bare)


# The attribute in which torch._disable_dynamo keeps the original method.
_KEPT_OUT = "__dynamo_disable"


def compile_in_place(model: nn.Module, *, telling: bool) -> None:
    """Let torch compile the model's forward and backward pass when it is first called.

    Of several models each is compiled. A plain copy of the model afterwards would still call
    this one: see `uncompiled_copy`.

    Args:
        telling: let torch report on stderr why it recompiles.
    """
    # Imported here, because loading the compiler takes a second at every start.
    from torch._logging._internal import set_logs

    if telling:
        set_logs(recompiles=True)
    for part in called_parts(model):
        # Not Module.compile: if the outermost class is torch's own (nn.Sequential), it
        # compiles only layers that are not torch's own.
        part.forward = torch.compile(part.forward)


# The attribute of every function that torch.compile has created.
_COMPILED = "_torchdynamo_orig_callable"


def called_parts(model: nn.Module) -> list[nn.Module]:
    """The model; or the called modules in it, if it is only a container of several models."""
    if type(model).forward is not nn.Module.forward:
        return [model]
    return [part for child in model.children() for part in called_parts(child)]


def uncompiled_copy(model: nn.Module) -> nn.Module:
    """A deep copy, which uses its own weights even if the model was compiled."""
    parts = [vars(part).get("forward") for part in called_parts(model)]
    compiled = [forward for forward in parts if hasattr(forward, _COMPILED)]
    copied = copy.deepcopy(model, {id(forward): forward for forward in compiled})
    for part in called_parts(copied):
        if hasattr(vars(part).get("forward"), _COMPILED):
            del part.forward  # restores the method of its class
    return copied


@contextmanager
def require_compiled(model: nn.Module) -> Iterator[None]:
    """A context in which a compiled part of the model must be called.

    Raises:
        SpecError: at its end, if none was called.
    """
    called: list[nn.Module] = []
    compiled = [(part, part.forward) for part in called_parts(model)]
    for part, forward in compiled:
        part.forward = partial(_noting, called.append, part, forward)
    try:
        yield
    finally:
        for part, forward in compiled:
            part.forward = forward
    if not called:
        raise SpecError(
            "model.compile: the task's step does not call the model, but parts of it, so "
            "nothing is compiled. Let the task return its parts as several models by name "
            "(model=lambda: {...}), each of which is compiled; or leave model.compile out."
        )


def _noting(
    note: Callable[[nn.Module], None],
    part: nn.Module,
    forward: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    note(part)
    return forward(*args, **kwargs)


def compiled_graphs() -> int:
    """Graphs compiled in this process so far; one more at a later step is a recompilation."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
