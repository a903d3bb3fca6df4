"""The arithmetic of a forward pass, and the loss scaler of fp16."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, cast

import torch
from torch import Tensor, nn

from service.basics.errors import SpecError
from service.data.batches import forward
from service.distributed.world import World
from service.sharding.sharding import holds_rows, own_rows

# Every overflow halves the scale, which starts at 2**16.  A gradient that is not finite at this
# scale does not overflow: it is not finite at any scale.
SMALLEST_SCALE = 2.0**-14


def multiply_in(precision: str) -> None:
    """Let a GPU round the factors of float32 products to 10 bits for tf32, and only for it."""
    # By default, torch allows it in convolutions and forbids it in matrix products.
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    if precision != "tf32":
        for operations in _IN_CUDNN:  # otherwise `torch.backends.fp32_precision` decides
            operations.fp32_precision = "ieee"


@contextmanager
def multiplied_in(precision: str) -> Iterator[None]:
    """The same as a context; afterwards the previous setting is restored."""
    before = [operations.fp32_precision for operations in (*_PRODUCTS, *_IN_CUDNN)]
    products, in_cudnn = None, None
    with suppress(RuntimeError):  # torch raises if it was set by its newer names
        products, in_cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    multiply_in(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products or "highest")
        torch.backends.cudnn.allow_tf32 = True if in_cudnn is None else in_cudnn
        for operations, value in zip((*_PRODUCTS, *_IN_CUDNN), before, strict=True):
            operations.fp32_precision = value


@contextmanager
def convolutions_timed(wanted: bool) -> Iterator[None]:
    """A context in which cuDNN times its algorithms for convolutions, if `wanted`."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = wanted or before
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


_BACKENDS: Any = torch.backends  # its modules have properties that their types do not tell
_PRODUCTS = (_BACKENDS.cuda.matmul, _BACKENDS.mkldnn.matmul)
_IN_CUDNN = (_BACKENDS.cudnn.conv, _BACKENDS.cudnn.rnn)


def computed(model: nn.Module, inputs: Any, world: World) -> Any:
    """The model's outputs, computed in the world's precision and returned in at least float32.

    So a loss or a measure never sums with 8 or 11 bits.
    """
    if world.narrow is None:
        return forward(model, inputs)
    with world.autocast():
        outputs = forward(model, inputs)
    return widened(outputs)


def widened(value: Any) -> Any:
    """The same nested tensors, with 16-bit ones converted to float32."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
    if isinstance(value, Mapping):  # a transformers model's outputs are one, with attributes
        wide = cast(Any, copy.copy(value))
        for key, part in value.items():
            wide[key] = widened(part)
        return wide
    if type(value) in (tuple, list):
        return type(value)(widened(part) for part in value)
    return value


class LossScaler(torch.amp.GradScaler):
    """torch's gradient scaler, which here scales the divisor of the gradients, not the loss.

    Every process uses the same scale: after the exchange all of them have the same gradients, and
    so find the same ones non-finite. Each process has only some rows of sharded gradients, so
    they exchange the result.
    """

    def __init__(self, model: nn.Module, world: World) -> None:
        """Scale the gradients of `model`.

        Raises:
            SpecError: its weights themselves are float16.
        """
        narrow = [n for n, p in model.named_parameters() if p.dtype == torch.float16]
        if narrow:
            raise SpecError(
                f"model.precision: fp16 computes in float16 with weights in float32, but "
                f"{', '.join(narrow[:3])} are float16. Return the model in float32."
            )
        super().__init__(world.device.type)
        self._told = world.sum if holds_rows(model) else None
        self._one = torch.ones((), device=world.device)
        self.scale(self._one)  # creates the scale, which torch delays

    def divisor(self, weight: float | Tensor) -> Tensor:
        """The divisor of a gradient in the backward pass, instead of the step's weight."""
        return weight / self.scale(self._one)

    def unscale(self, optimizer: torch.optim.Optimizer) -> Tensor:
        """Undo the scale in the gradients.

        Returns:
            A scalar on the device: 1 where one of them is not finite, otherwise 0.
        """
        self.unscale_(optimizer)
        found = list(self._found_inf_per_device(optimizer).values())
        return cast(Tensor, sum(found[1:], start=found[0]))

    def _unscale_grads_(
        self,
        optimizer: torch.optim.Optimizer,
        inv_scale: Tensor,
        found_inf: Tensor,
        allow_fp16: bool,
    ) -> dict[torch.device, Tensor]:
        """The same as torch's method, for sharded gradients too: 0 or more by device."""
        if self._told is None:
            found = super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
            return found or {found_inf.device: found_inf}  # torch needs one also without gradients
        members = [p for group in optimizer.param_groups for p in group["params"]]
        grads = [own_rows(p.grad) for p in members if p.grad is not None]
        for kind in {grad.dtype: None for grad in grads}:
            rows = [grad for grad in grads if grad.dtype == kind and grad.numel()]
            if not rows:
                continue
            where = rows[0].device  # main memory, if they are offloaded
            here = found_inf.to(where)
            torch._amp_foreach_non_finite_check_and_unscale_(rows, here, inv_scale.to(where))
            found_inf.copy_(here)
        return {found_inf.device: self._told(found_inf)}
