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
    """Let optimizers be made in this process without the import of torch's compiler.

    Torch keeps the compiler out of an optimizer's methods, and imports it to do so, at the first
    call: a second of every start.  Where it is not there, they need not be kept from it.
    """
    if "torch._dynamo" in sys.modules:
        return
    methods = ("add_param_group", "state_dict", "load_state_dict", "zero_grad")
    for method in [getattr(Optimizer, name) for name in methods]:
        bare = getattr(method, "__wrapped__", None)
        if bare is not None and not hasattr(bare, _KEPT_OUT):
            setattr(bare, _KEPT_OUT, bare)


# Where torch._disable_dynamo keeps the method that it calls instead of this one.
_KEPT_OUT = "__dynamo_disable"


def compile_in_place(model: nn.Module, *, telling: bool) -> None:
    """Let torch compile the model's forward and backward pass when it is first called.

    Of several models each is compiled. A plain copy made of the model afterwards would still call
    this one: see `uncompiled_copy`.

    Args:
        telling: have torch say on stderr why it compiles something again.
    """
    # Imported here, because loading the compiler takes a second at every start.
    from torch._logging._internal import set_logs

    if telling:
        set_logs(recompiles=True)
    for part in called_parts(model):
        # Not Module.compile: where the outermost class is torch's own (nn.Sequential), that
        # compiles nothing but the layers which are not.
        part.forward = torch.compile(part.forward)


# What torch.compile gives every function that it has made.
_COMPILED = "_torchdynamo_orig_callable"


def called_parts(model: nn.Module) -> list[nn.Module]:
    """The model; or where it is only a container, as of several models, what is called in it."""
    if type(model).forward is not nn.Module.forward:
        return [model]
    return [part for child in model.children() for part in called_parts(child)]


def uncompiled_copy(model: nn.Module) -> nn.Module:
    """A deep copy, which computes with its own weights also where the model was compiled."""
    parts = [vars(part).get("forward") for part in called_parts(model)]
    compiled = [forward for forward in parts if hasattr(forward, _COMPILED)]
    copied = copy.deepcopy(model, {id(forward): forward for forward in compiled})
    for part in called_parts(copied):
        if hasattr(vars(part).get("forward"), _COMPILED):
            del part.forward  # the method of its class is back
    return copied


@contextmanager
def require_compiled(model: nn.Module) -> Iterator[None]:
    """A context in which a compiled part of the model has to be called.

    Raises:
        SpecError: at its end, if none was.
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
            "model.compile: the task's step does not call the model, but parts of it, and then "
            "nothing is compiled. Let the task give its parts as several models by name "
            "(model=lambda: {...}), of which each is compiled; or leave model.compile out."
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
