"""torch.compile of a model in place: the keys of its state dict do not change."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from service.basics.errors import SpecError, told_as_mistake


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


def compile_in_place(
    model: nn.Module, *, telling: bool, units: Mapping[str, nn.Module] | None = None
) -> None:
    """Let torch compile the model's forward and backward pass when it is first called.

    Of several models each is compiled. A plain copy of the model afterwards would still call
    this one: see `uncompiled_copy`.

    Args:
        telling: let torch report on stderr why it recompiles.
        units: as for `parts_to_compile`.
    """
    # Imported here, because loading the compiler takes a second at every start.
    from torch._logging._internal import set_logs

    if telling:
        set_logs(recompiles=True)
    for part in parts_to_compile(model, units).values():
        # Not Module.compile: if the outermost class is torch's own (nn.Sequential), it
        # compiles only layers that are not torch's own; and it would compile the hooks that
        # gather the parameters of a unit.
        part.forward = torch.compile(part.forward)


# The attribute of every function that torch.compile has created.
_COMPILED = "_torchdynamo_orig_callable"


def called_parts(model: nn.Module) -> list[nn.Module]:
    """The model; or the called modules in it, if it is only a container of several models."""
    if type(model).forward is not nn.Module.forward:
        return [model]
    return [part for child in model.children() for part in called_parts(child)]


def parts_to_compile(
    model: nn.Module, units: Mapping[str, nn.Module] | None = None
) -> dict[str, nn.Module]:
    """The modules that are compiled, by name; the model itself has an empty one.

    Args:
        units: modules of which each is compiled by itself, in place of the called module that
            contains them: a graph of several could not wait for parameters between them.
    """
    names = {id(module): name for name, module in model.named_modules()}
    chosen: dict[str, nn.Module] = {}
    for part in called_parts(model):
        inside = {id(module) for module in part.modules()}
        within = {name: unit for name, unit in (units or {}).items() if id(unit) in inside}
        chosen |= within or {names[id(part)]: part}
    return chosen


def uncompiled_copy(model: nn.Module) -> nn.Module:
    """A deep copy, which uses its own weights even if the model was compiled."""
    compiled = [part.forward for part in model.modules() if _is_compiled(part)]
    copied = copy.deepcopy(model, {id(forward): forward for forward in compiled})
    for part in copied.modules():
        if _is_compiled(part):
            del part.forward  # restores the method of its class
    return copied


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(vars(module).get("forward"), _COMPILED)


@contextmanager
def require_compiled(parts: Mapping[str, nn.Module]) -> Iterator[None]:
    """A context in which at least one of these compiled modules must be called.

    Raises:
        SpecError: torch cannot compile the forward pass of one, which it names; or, at its end,
            none was called.
    """
    called: list[str] = []
    compiled = {name: (part, part.forward) for name, part in parts.items()}
    for name, (part, forward) in compiled.items():
        part.forward = partial(_noting, called.append, name, forward)
    try:
        yield
    finally:
        for part, forward in compiled.values():
            part.forward = forward
    if not called:
        raise SpecError(
            "model.compile: the task's step does not call the model, but parts of it, so "
            "nothing is compiled. Let the task return its parts as several models by name "
            "(model=lambda: {...}), each of which is compiled; or leave model.compile out."
        )


def _noting(
    note: Callable[[str], None], name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    note(name)
    with told_as_mistake(f"model.compile: torch cannot compile {name or 'this model'} here"):
        return forward(*args, **kwargs)


def compiled_graphs() -> int:
    """Graphs compiled in this process so far; one more at a later step is a recompilation."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
