"""torch.compile of a model in place: the keys of its state dict stay what they are."""

from __future__ import annotations

import torch
from torch import nn


def compile_in_place(model: nn.Module, *, telling: bool) -> None:
    """Let torch compile the model's forward and backward pass when it is first called.

    A copy made of the model afterwards would still call this one: copy it before.

    Args:
        telling: have torch say on stderr why it compiles something again.
    """
    # Here and not above: loading the compiler is a second of every start.
    from torch._logging._internal import set_logs

    if telling:
        set_logs(recompiles=True)
    # Not Module.compile: where the outermost class is torch's own (nn.Sequential), that compiles
    # nothing but the layers which are not.
    model.forward = torch.compile(model.forward)


def compiled_graphs() -> int:
    """Graphs compiled in this process so far; one more at a later step is a recompilation."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
