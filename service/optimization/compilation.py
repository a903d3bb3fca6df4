"""torch.compile of a model in place: the keys of its state dict do not change.

A CUDA graph (`CompileSpec.replays`) writes its results to the same addresses in each replay. So
that nothing that a run keeps is overwritten, every result of a compiled module is copied from there
(`_copied_out`), and so are the gradients (`ReplayedSync` in `distributed/gradient_sync.py`). What a
graph reads may change its address: torch copies inputs to where the graph expects them, and records
the graph again if a parameter or a buffer has moved.

Random numbers stay keyed by the micro-batch: torch passes the seed and the offset of the device's
generator to the graph at each replay.
Source: pytorch/pytorch#84967; aten/src/ATen/cuda/CUDAGeneratorImpl.cpp (replay_prologue).
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, wraps
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from service.basics.errors import SpecError, did_you_mean, told_as_mistake
from service.distributed.batchnorm import statistics_of
from service.spec.models import CompileSpec


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
    model: nn.Module,
    how: CompileSpec,
    *,
    telling: bool,
    units: Mapping[str, nn.Module] | None = None,
) -> None:
    """Let torch compile the model's forward and backward pass when it is first called.

    Of several models each is compiled. A plain copy of the model afterwards would still call
    this one: see `uncompiled_copy`.

    Args:
        telling: let torch report on stderr why it recompiles.
        units: as for `parts_to_compile`.
    Raises:
        SpecError: torch has no such backend, or the environment asks for graphs that `how` does
            not ask for.
    """
    # Imported here, because loading the compiler takes a second at every start.
    import torch._dynamo as dynamo
    import torch._functorch.config as functorch
    from torch._logging._internal import set_logs

    _require_backend(how)
    if telling:
        set_logs(recompiles=True)
    # Otherwise dropout that is recomputed in the backward pass draws, on a GPU, from generators of
    # torch's own that no seed of a micro-batch reaches.
    functorch.graphsafe_rng_functionalization = False
    if how.replays:  # BatchNorm's statistics are written by the graph where they are
        for tensor in statistics_of(model):
            dynamo.mark_static_address(tensor)
    for part in parts_to_compile(model, units).values():
        # Not Module.compile: if the outermost class is torch's own (nn.Sequential), it
        # compiles only layers that are not torch's own; and it would compile the hooks that
        # gather the parameters of a unit.
        compiled = torch.compile(
            part.forward,
            mode=None if how.mode == "default" else how.mode,
            dynamic=how.dynamic,
            fullgraph=how.fullgraph,
            backend=how.backend,
            **_apart(units),
        )
        part.forward = _copied_out(compiled, how) if how.replays else compiled


def _apart(units: Mapping[str, nn.Module] | None) -> dict[str, Any]:
    """The option to count the versions of this model's functions from 0.

    Of one function torch compiles eight, and computes all further models of a process (a search in
    a notebook) uncompiled. Units of one class share theirs. torch 2.11 has no such option.
    """
    has_it = "isolate_recompiles" in signature(torch.compile).parameters
    return {"isolate_recompiles": True} if has_it and not units else {}


def _require_backend(how: CompileSpec) -> None:
    from torch._dynamo import list_backends, lookup_backend
    from torch._dynamo.exc import InvalidBackend

    try:
        lookup_backend(how.backend)
    except InvalidBackend:
        raise SpecError(
            f"model.compile.backend: torch has no backend {how.backend!r}"
            f"{did_you_mean(how.backend, list_backends(None))}"
        ) from None
    if os.environ.get("TORCHINDUCTOR_CUDAGRAPHS") == "1" and not how.replays:
        raise SpecError(
            "TORCHINDUCTOR_CUDAGRAPHS=1 makes CUDA graphs of which the run does not know, so they "
            "would overwrite losses and gradients: unset it, and set model.compile={mode: "
            "reduce-overhead}."
        )


def _copied_out(compiled: Callable[..., Any], how: CompileSpec) -> Callable[..., Any]:
    """The same function, whose results stay as they are when it is called again."""

    @wraps(compiled)  # also the attribute by which a compiled function is recognized
    def called(*args: Any, **kwargs: Any) -> Any:
        trees: Any = sys.modules.get("torch._inductor.cudagraph_trees")
        if trees is not None:  # a pass begins: nothing of the last one is still read
            trees.mark_step_begin()
        return _copies(compiled(*args, **kwargs), how)

    return called


def _copies(results: Any, how: CompileSpec) -> Any:
    from torch.utils._pytree import tree_map

    def copied(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.clone()
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise SpecError(
            f"{how.in_words}: the model returns a {type(value).__qualname__}, whose tensors the "
            "next pass of a CUDA graph would overwrite. Return tensors, in lists, tuples, mappings "
            "or a ModelOutput of transformers; or use mode: default."
        )

    return tree_map(copied, results)


def replays_in_words(how: CompileSpec | None, device: torch.device) -> list[str]:
    """What to tell, after the dry run, of CUDA graphs that torch has not made."""
    if how is None or not how.replays:
        return []
    if device.type != "cuda":
        what = f"torch makes CUDA graphs on GPUs of NVIDIA and AMD only, and none on {device.type}"
        return [f"WARNING: {how.in_words}: {what}."]
    from torch._dynamo.utils import counters

    skipped = int(counters["inductor"]["cudagraph_skips"])
    if not skipped:
        return []
    return [
        f"WARNING: {how.in_words}: torch makes no CUDA graph of {skipped} of the compiled graphs. "
        "TORCH_LOGS=perf_hints tells why: most often a tensor on the CPU, or an operation that "
        "waits for the device."
    ]


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
