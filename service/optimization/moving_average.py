"""An exponential moving average of a model's weights, as a second model."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from service.basics.errors import SpecError
from service.sharding.sharding import own_rows


class MovingAverage:
    """The average of a model's parameters and buffers, updated after every optimizer step.

    Floating-point buffers are averaged like the weights, so BatchNorm's statistics match the
    averaged weights.  Other buffers (counters) are copied.
    """

    def __init__(self, model: nn.Module, decay: float, *, twin: nn.Module | None = None) -> None:
        """Start with the current weights of the model.

        Args:
            twin: the model for the average; None makes a copy. For a sharded model it is
                required, with the same sharding: torch cannot copy such models.
        Raises:
            SpecError: the model cannot be copied, or its weights have too low a precision.
        """
        coarse = [n for n, p in model.named_parameters() if p.dtype.itemsize < 4]
        if coarse:
            raise SpecError(
                f"model.moving_average: {', '.join(coarse[:3])} have 16 bits or fewer, too few to "
                "move by a thousandth. Return the model in float32 and use model.precision."
            )
        self.model = copy_for_average(model) if twin is None else twin
        self._decay = decay
        self._parameters = list(model.parameters())
        self._owners = _buffers_of(model)
        self._copies = _buffers_of(self.model)
        if twin is not None:
            for kept, live in self._pairs():
                kept.copy_(live)

    @torch.no_grad()
    def move(self, steps: int) -> None:
        """Update the average after `steps` finished optimizer steps, counted from 1.

        The decay rises to its value as (1 + steps) / (10 + steps): a short run does not keep its
        initial random weights.
        Source: num_updates of TensorFlow's tf.train.ExponentialMovingAverage.
        """
        decay = min(self._decay, (1 + steps) / (10 + steps))
        pairs = self._pairs()
        real = [pair for pair in pairs if pair[0].is_floating_point() or pair[0].is_complex()]
        rest = [pair for pair in pairs if not (pair[0].is_floating_point() or pair[0].is_complex())]
        for device in {a.device: None for a, _ in real}:  # rows may be offloaded, not buffers
            here = [pair for pair in real if pair[0].device == device]
            torch._foreach_lerp_([a for a, _ in here], [b for _, b in here], 1 - decay)
        if rest:
            torch._foreach_copy_([a for a, _ in rest], [b for _, b in rest])

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        """(averaged, current) of every parameter and buffer; if sharded, of this process's rows.

        Looked up each time, because a model may replace a buffer by another tensor.
        """
        live = [*map(own_rows, self._parameters), *_present(self._owners)]
        kept = [*map(own_rows, self.model.parameters()), *_present(self._copies)]
        return list(zip(kept, live, strict=True))


def copy_for_average(model: nn.Module) -> nn.Module:
    """A copy of the model that training does not change.

    Raises:
        SpecError: it cannot be copied.
    """
    try:
        return copy.deepcopy(model).requires_grad_(False).eval()
    except Exception as error:
        raise SpecError(f"model.moving_average: the model cannot be copied: {error}") from error


def _buffers_of(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """The module and key of each buffer, a shared one once."""
    seen: set[int] = set()
    found = []
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is None or id(buffer) not in seen:
                seen.add(id(buffer))
                found.append((module, name))
    return found


def _present(owners: list[tuple[nn.Module, str]]) -> list[Tensor]:
    buffers = [module._buffers[name] for module, name in owners]
    return [buffer for buffer in buffers if buffer is not None]
