"""Parameters that a forward pass changes itself, which each process would do in its own way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from service.sharding.sharding import own_rows


class Weights:
    """Checksums of parameters, to find those that a forward pass changes itself."""

    def __init__(self, model: nn.Module, *, only_frozen: bool = False) -> None:
        self._only_frozen = only_frozen
        self._before = {name: _identity(p) for name, p in self._watched(model)}

    def _watched(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        named = model.named_parameters()
        return [(n, p) for n, p in named if not (self._only_frozen and p.requires_grad)]

    def written(self, model: nn.Module) -> list[str]:
        """The names of the parameters that have other values now, or were frozen and written to.

        A frozen one that follows another starts with the value of that, and so keeps it in the
        first pass. One that is trained may be clamped in each pass: then its value stays.
        """
        limited = [
            f"{prefix}.weight" if prefix else "weight"
            for prefix, module in model.named_modules()
            if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None
        ]
        moved = []
        for name, parameter in self._watched(model):
            written_to, value = _identity(parameter)
            before = self._before.get(name, (written_to, value))
            is_frozen = not parameter.requires_grad
            if value != before[1] or (is_frozen and written_to != before[0]) or name in limited:
                moved.append(name)
        return moved


def _identity(parameter: Tensor) -> tuple[tuple[int, int], int]:
    """((the tensor, how often it was written to), a checksum of its values); of its own rows."""
    version = id(parameter), parameter._version
    rows = own_rows(parameter.detach())
    if type(rows) is not Tensor:  # a quantized one, of a form of its own
        return version, 0
    rows = torch.view_as_real(rows) if rows.is_complex() else rows
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()]
    value = int(rows.view(whole).sum(dtype=torch.int64))  # of the bits: exact, and without a copy
    return version, value


def written_in_words(written: Sequence[str]) -> str | None:
    """The parameters that only one process can train, and what to do; None if there are none."""
    if not written:
        return None
    return (
        f"the forward pass itself changes {', '.join(written[:8])}, as nn.Embedding(max_norm="
        "...) does, or a teacher that follows its student. On several processes each would do so "
        "with its own rows, and once per micro-batch that it has, so the weights would differ. "
        "Change them in after_update (service.task.custom) or make them buffers, which "
        "model.buffers keeps equal; or train on one process."
    )
