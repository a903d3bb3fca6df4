"""torch.compile of a model in place: the keys of its state dict do not change."""

from __future__ import annotations

import copy
import sys

import torch
from torch import nn
from torch.optim import Optimizer


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

    A plain copy made of the model afterwards would still call this one: see `uncompiled_copy`.

    Args:
        telling: have torch say on stderr why it compiles something again.
    """
    # Imported here, because loading the compiler takes a second at every start.
    from torch._logging._internal import set_logs

    if telling:
        set_logs(recompiles=True)
    # Not Module.compile: where the outermost class is torch's own (nn.Sequential), that compiles
    # nothing but the layers which are not.
    model.forward = torch.compile(model.forward)


def uncompiled_copy(model: nn.Module) -> nn.Module:
    """A deep copy, which computes with its own weights also where the model was compiled."""
    compiled = vars(model).get("forward")
    if not hasattr(compiled, "_torchdynamo_orig_callable"):
        return copy.deepcopy(model)
    copied = copy.deepcopy(model, {id(compiled): compiled})
    del copied.forward  # the method of its class is back
    return copied


def compiled_graphs() -> int:
    """Graphs compiled in this process so far; one more at a later step is a recompilation."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
