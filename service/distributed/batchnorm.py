"""BatchNorm on several processes: which statistics a layer uses, and when they are updated.

`micro`  Every micro-batch is normalized by its own statistics.  The running ones are updated once
         per optimizer step, from all micro-batches of all processes: equal at any number of
         processes.
`sync`   The micro-batches that the processes compute at the same time are normalized as one batch.
         With gradient accumulation this is one round of the step, and not the whole step.
`local`  torch's own BatchNorm on each process.  The running statistics become different, and a
         checkpoint contains those of rank 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase

from service.basics.errors import SpecError
from service.distributed.world import World

Mode = Literal["micro", "sync", "local"]

# not torch.nn.SyncBatchNorm: a model that contains it wants it.
BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def prepare(
    model: nn.Module, mode: Mode, world: World, *, exchanged: bool = False
) -> Normalization:
    """Make the BatchNorm layers of `model` follow `mode`; return their running statistics.

    Only the class of the layers changes, also of the root, as with torch's lazy layers:
    parameters, buffers, hooks, `isinstance` and the keys of the state dict do not change.  Call it
    before the model is wrapped or compiled; it may be called again.

    Args:
        exchanged: the caller sums the collected sums over the processes before the step is
            finished.

    Raises:
        SpecError: a layer does not know its size yet, or `sync` does not support its class.
    """
    layers = dict(_named(model, BATCHNORMS))
    lazy = [name for name, _ in _named(model, _LazyNormBase)]
    if lazy:
        raise SpecError(
            f"task: the BatchNorm layers {', '.join(lazy)} do not know their size yet. Give them "
            "num_features, or run one batch through the model before it is returned."
        )
    for layer in layers.values():
        layer.__class__ = _plain_class(layer)
    extras = {name: _behaviour(name, layer, mode, world) for name, layer in layers.items()}
    kinds: dict[type, type] = {}
    for name, layer in layers.items():
        plain, extra = type(layer), extras[name]
        if extra is None:
            continue
        if plain not in kinds:
            kinds[plain] = _mixed(extra, plain, mode, world)
        layer.__class__ = kinds[plain]
    gathering = [layer for layer in layers.values() if isinstance(layer, _Gathering)]
    for layer in gathering:
        layer.start()
    return Normalization(
        mode, layers=len(layers), gathering=gathering, world=world, exchanged=exchanged
    )


class Normalization:
    """The BatchNorm layers of one model, taken together."""

    def __init__(
        self,
        mode: Mode,
        *,
        layers: int,
        gathering: Sequence[_Gathering],
        world: World,
        exchanged: bool = False,
    ) -> None:
        self.mode = mode
        self.layers = layers
        self._gathering = gathering
        self._world = world
        self._exchanged = exchanged
        self._sizes = [layer.num_features for layer in gathering]
        layer_of_channel = [i for i, size in enumerate(self._sizes) for _ in range(size)]
        self._owners = torch.tensor(layer_of_channel, dtype=torch.long)
        self._momentum_values: list[float | None] = []
        self._momentum = torch.empty(0)

    def finish_step(self, skipped: Tensor | None = None) -> None:
        """Update the running statistics after one optimizer step; every process calls it.

        They are updated towards the mean, over all micro-batches of the step on all processes, of
        the micro-batch's mean and unbiased variance, weighted by the values per channel.
        A layer that no process used keeps its statistics.  In the modes that collect nothing,
        nothing happens.

        Args:
            skipped: a scalar that is 1 if the step is skipped and nothing may change.
        """
        if self._gathering:  # checked here, so that the other modes have no cost in a step
            self._finish_step(skipped)

    @torch.no_grad()
    def _finish_step(self, skipped: Tensor | None) -> None:
        means, variances, counts = self._sums_of_the_step(skipped)
        self._owners = self._owners.to(counts.device)
        used = counts > 0  # [layers]
        tracked = [_present(layer.num_batches_tracked) for layer in self._gathering]
        torch._foreach_add_(tracked, used.long().unbind())
        share = (self._momentum_of(tracked, counts) * used).index_select(0, self._owners)
        # An unused layer divides 0 by 1, and its momentum is 0.
        values = counts.clamp(min=1).index_select(0, self._owners)  # [channels]
        targets = self._per_layer(means / values) + self._per_layer(variances / values)
        running = [_present(layer.running_mean) for layer in self._gathering]
        running += [_present(layer.running_var) for layer in self._gathering]
        _move(running, targets, self._per_layer(share) * 2)
        self.forget()

    @torch.no_grad()
    def forget(self) -> None:
        """Discard the sums since the last step, such as those of the dry run."""
        if self._gathering:
            # The latest ones too: torch keeps (1 - momentum) of them, and 0 times NaN would stay
            # NaN. By `data`: graphs that are still needed have saved these tensors, whose values
            # a backward pass in training does not read.
            tensors = [t.data for layer in self._gathering for t in layer.gathered()]
            torch._foreach_zero_(tensors)

    def sums(self) -> list[Tensor]:
        """The sums of the layers between two steps: tensors summed over micro-batches."""
        return [tensor for layer in self._gathering for tensor in layer.sums]

    def table(self, *, micro_batch: int, last: int, processes: int) -> list[tuple[str, str]]:
        """Lines for the user about these layers at `micro_batch` rows in each pass.

        Args:
            last: rows of the last micro-batch of a step.
        """
        if self.layers == 0:
            return [("BatchNorm layers", "none")]
        over, running = f"{micro_batch} rows, one micro-batch", "once per step, equal everywhere"
        if self.mode == "sync":
            rows = micro_batch * processes
            over = f"{rows} rows, the micro-batches of {processes} processes at one time"
            running = "once per micro-batch of a process, equal everywhere"
        if self.mode == "local":
            running = "once per micro-batch, separately on each process; those of rank 0 are saved"
        if processes == 1 and self.mode != "micro":
            over, running = f"{micro_batch} rows, one micro-batch", "once per micro-batch"
        told = [
            ("BatchNorm layers", f"{self.layers}, batchnorm: {self.mode}"),
            ("normalised over", over),
            ("running statistics change", running),
        ]
        if last < micro_batch:
            shown = f"{last} {'row' if last == 1 else 'rows'}"
            if last == 1:
                shown += ": fails in a layer that has one value per channel and row"
            told.append(("last micro-batch of a step", shown))
        return told

    def _sums_of_the_step(self, skipped: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(means times values [channels], variances times values [channels], values [layers])."""
        by_kind = zip(*(layer.sums for layer in self._gathering), strict=True)
        own = torch.cat(list(itertools.chain.from_iterable(by_kind)))
        channels = len(self._owners)
        total = own if self._exchanged else self._world.sum(own)
        if skipped is not None:  # as if no layer had been used, even if the sums are not finite
            total = torch.where(skipped > 0, torch.zeros_like(total), total)
        return total[:channels], total[channels : 2 * channels], total[2 * channels :]

    def _momentum_of(self, tracked: Sequence[Tensor], like: Tensor) -> Tensor:
        """The momentum of each layer, or 1 / steps if a layer averages over all steps: [layers]."""
        values = [layer.momentum for layer in self._gathering]
        if values != self._momentum_values or self._momentum.device != like.device:
            self._momentum_values = values
            self._momentum = like.new_tensor([torch.nan if m is None else m for m in values])
        if None not in values:
            return self._momentum
        steps = torch.stack(list(tracked)).clamp(min=1).to(like.dtype)
        return torch.where(self._momentum.isnan(), 1 / steps, self._momentum)

    def _per_layer(self, values: Tensor) -> list[Tensor]:
        return list(values.split_with_sizes(self._sizes))


def statistics_of(model: nn.Module) -> list[Tensor]:
    """All tensors that the BatchNorm layers of `model` change in a forward pass in training."""
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    running = [buffer for layer in layers for buffer in layer.buffers(recurse=False)]
    gathered = [t for layer in layers if isinstance(layer, _Gathering) for t in layer.gathered()]
    return running + gathered


def _move(running: list[Tensor], targets: list[Tensor], shares: list[Tensor]) -> None:
    """Move each running statistic towards its target by its momentum."""
    if any(r.dtype != targets[0].dtype for r in running):
        targets = [t.to(r.dtype) for t, r in zip(targets, running, strict=True)]
        shares = [s.to(r.dtype) for s, r in zip(shares, running, strict=True)]
    torch._foreach_lerp_(running, targets, shares)


def _named(model: nn.Module, kinds: Any) -> Iterator[tuple[str, _BatchNorm]]:
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            yield name or "(the model itself)", cast(_BatchNorm, module)


def _plain_class(layer: _BatchNorm) -> type[_BatchNorm]:
    """The layer's class before any `prepare`."""
    ours = (_Gathering, _Sync)
    kinds = cast(tuple[type[_BatchNorm], ...], type(layer).__mro__)
    return next(kind for kind in kinds if not issubclass(kind, ours))


def _behaviour(name: str, layer: _BatchNorm, mode: Mode, world: World) -> type[_BatchNorm] | None:
    """The mixin for the layer's class; None if torch's class already works as `mode` says."""
    writes_own = type(layer).forward is not _BatchNorm.forward
    if mode == "micro" and layer.track_running_stats:
        return _MicroAround if writes_own else _Micro
    if mode == "sync" and writes_own:
        raise SpecError(
            f"model.batchnorm: sync cannot be used with the layer {name} of class "
            f"{type(layer).__qualname__}, which has its own forward pass. Use batchnorm: micro."
        )
    return _Sync if mode == "sync" and world.processes > 1 else None


def _mixed(extra: type[_BatchNorm], plain: type[_BatchNorm], mode: Mode, world: World) -> type:
    """The class `plain` with the mixin `extra`."""
    # The world is an attribute of the class: a deep copy of a layer must not copy it.
    members: dict[str, Any] = {"world": world, "__module__": __name__}
    if untraced := getattr(extra, "untraced", None):
        # Here and not as a decorator: it imports the compiler, which takes a second at every start.
        disable = cast(Callable[[Any], Any], torch.compiler.disable)
        members[untraced] = disable(getattr(extra, untraced))
    return type(f"{mode.title()}{plain.__name__}", (extra, plain), members)


def _present(tensor: Tensor | None) -> Tensor:
    """A buffer that a layer with running statistics has."""
    assert tensor is not None
    return tensor


class _Gathering(_BatchNorm):
    """A layer whose running statistics are updated at the end of the step.

    torch's kernel writes the statistics of a micro-batch into `latest` (momentum 1), and one
    addition accumulates them in `sums`.  No Python number here changes from
    call to call, so a compiled model is compiled only once.

    The weight of a micro-batch is its number of values per channel, rows times positions.  Any
    weight that it knows by itself would give equality at any number of processes, since the
    micro-batches are the same; this one makes the mean that of all values of the step, whatever
    the sizes of the last micro-batch and of the images.
    """

    latest: list[Tensor]
    """Mean [C], unbiased variance [C], 1."""
    sums: list[Tensor]
    """The same times the values per channel, since the last step."""

    def start(self) -> None:
        """Set the sums to zero, on the device and in the dtype of the running statistics.

        They are not buffers: those are saved, and DistributedDataParallel would overwrite them.
        """
        mean = _present(self.running_mean)
        wide = torch.promote_types(mean.dtype, torch.float32)
        self.latest = [torch.zeros_like(mean), torch.zeros_like(mean), mean.new_ones(1)]
        self.sums = [torch.zeros_like(t, dtype=wide) for t in self.latest]

    def gathered(self) -> list[Tensor]:
        """All tensors to reset to zero."""
        return [*self.latest[:2], *self.sums]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.start()  # the layer may be on another device now
        return self

    def _add_latest(self, input: Tensor) -> None:
        # For an input without rows torch writes no statistics, and the latest ones get weight 0.
        values_per_channel = input.numel() // input.shape[1]
        torch._foreach_add_(self.sums, self.latest, alpha=values_per_channel)


class _Micro(_Gathering):
    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        mean, variance, _ = self.latest
        output = F.batch_norm(input, mean, variance, self.weight, self.bias, True, 1.0, self.eps)
        self._add_latest(input)
        return output


class _MicroAround(_Gathering):
    """The same for a class with its own forward pass (timm's BatchNormAct2d).

    During its forward pass, the latest statistics replace the running ones.
    """

    untraced = "forward"  # a compiled graph has no buffers to exchange

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        forward = cast(Callable[..., Any], super().forward)
        if not self.training:
            return forward(input, *args, **kwargs)
        buffers, momentum = dict(self._buffers), self.momentum
        mean, variance, _ = self.latest
        self._buffers.update(running_mean=mean, running_var=variance, num_batches_tracked=None)
        self.momentum = 1.0
        try:
            output = forward(input, *args, **kwargs)
        finally:
            self._buffers.update(buffers)
            self.momentum = momentum
        self._add_latest(input)
        return output


class _Sync(_BatchNorm):
    """A layer that normalizes the micro-batches of all processes as one batch.

    Every process takes part in every pass, without rows if it has none.  The gradients of
    weight and bias are this process's part of the sum; the gradient exchange adds them up.
    """

    world: World
    untraced = "_on_cpu"  # a compiled graph cannot wait for other processes

    # Additional attributes that torch.nn.SyncBatchNorm's forward pass needs in a layer.
    process_group = None
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        if input.device.type == "cpu":
            return self._on_cpu(input)
        torch_forward = cast(Callable[[nn.Module, Tensor], Tensor], nn.SyncBatchNorm.forward)
        if input.numel():
            return torch_forward(self, input)
        # torch sends the sums of an empty input in the input's type and all others in the
        # statistics': under autocast the processes would wait for different numbers of bytes.
        return torch_forward(self, input.to(_wide(input))).to(input.dtype)

    def _on_cpu(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            mean, variance, values = _statistics_of_all(input, self.world)
            if self.track_running_stats:
                self._move_running(mean, variance * (values / (values - 1)))
        normalise = cast(Callable[..., Tensor], _Normalise.apply)
        return normalise(
            input, self.weight, self.bias, mean, variance, values, self.eps, self.world
        )

    def _move_running(self, mean: Tensor, unbiased_variance: Tensor) -> None:
        tracked = _present(self.num_batches_tracked).add_(1)
        momentum = 1 / int(tracked) if self.momentum is None else self.momentum
        for running, now in (
            (_present(self.running_mean), mean),
            (_present(self.running_var), unbiased_variance),
        ):
            running.lerp_(now.to(running.dtype), momentum)


def _statistics_of_all(input: Tensor, world: World) -> tuple[Tensor, Tensor, float]:
    """(mean [C], biased variance [C], values per channel) of the processes' inputs as one batch.

    Raises:
        ValueError: all processes together have fewer than 2 values per channel.
    """
    channels = input.shape[1]
    values = input.numel() // channels
    row = input.new_zeros(2 * channels + 1, dtype=_wide(input))
    if values:
        # Relative to the first value: far from zero, torch's float32 sums alone lose the mean.
        first = input[0].reshape(channels, -1)[:, 0].to(row.dtype)
        near_zero = input - first.view(-1, *[1] * (input.dim() - 2))
        mean, variance = torch.batch_norm_update_stats(near_zero, None, None, 0.0)
        row[:channels], row[channels:-1], row[-1] = first + mean, variance * values, values
    means, squares, counts = world.stack(row).split_with_sizes([channels, channels, 1], dim=1)
    total = float(counts.sum())
    if total < 2:
        raise ValueError(
            "Expected more than 1 value per channel over all processes when training, "
            f"got {total:.0f}"
        )
    mean, square = merged(means, squares, counts)
    return mean, square / total, total


def merged(means: Tensor, squares: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """(mean [C], sum of squared deviations [C]) of the union of W parts; empty parts are zeros.

    It uses differences of means, never of squares, so values far from zero lose no precision.
    Source: Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for computing
    sample variances", Stanford STAN-CS-79-773, 1979, for W parts at once.

    Args:
        means: [W, C].
        squares: sums of squared deviations from each part's own mean, [W, C].
        counts: values per channel, [W, 1].
    """
    mean = (counts * means).sum(0) / counts.sum()
    return mean, (squares + counts * (means - mean) ** 2).sum(0)


class _Normalise(torch.autograd.Function):
    """(input - mean) / sqrt(variance + eps) * weight + bias, with the statistics of all processes.

    Source of the gradient: Ioffe & Szegedy, arXiv:1502.03167, section 3, with the two means
    of the batch over all processes.  It is the gradient of the *sum* of all processes'
    losses, each on the scale of its incoming gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        values: float,
        eps: float,
        world: World,
    ) -> Tensor:
        ctx.save_for_backward(input, weight, mean, variance)
        ctx.values, ctx.eps, ctx.world = values, eps, world
        if input.numel() == 0:
            return torch.empty_like(input)
        weight, bias = _like(weight, mean), _like(bias, mean)
        return F.batch_norm(input, mean, variance, weight, bias, False, 0.0, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mean, variance = ctx.saved_tensors
        wide_weight, eps = _like(weight, mean), ctx.eps
        if input.numel():
            grad_input, *own = torch.ops.aten.native_batch_norm_backward(
                grad, input, wide_weight, mean, variance, None, None, False, eps, [True] * 3
            )
            sums = torch.stack(own)  # [2, C]: of dy * (x - mean) / std, of dy
        else:  # torch's kernel would divide by zero, which ends the process
            grad_input, sums = torch.empty_like(input), mean.new_zeros(2, len(mean))
        if ctx.needs_input_grad[0]:
            means = ctx.world.sum(sums) / ctx.values
            scale = (variance + eps).rsqrt()
            scale = scale if wide_weight is None else scale * wide_weight
            # scale * ((x - mean) / std * means[0] + means[1]) is again a normalization.
            slope, offset = scale * means
            grad_input -= F.batch_norm(input, mean, variance, slope, offset, False, 0.0, eps)
        grad_weight = sums[0].to(weight.dtype) if ctx.needs_input_grad[1] else None
        grad_bias = sums[1].to(weight.dtype) if ctx.needs_input_grad[2] else None
        return grad_input, grad_weight, grad_bias, None, None, None, None, None


def _wide(tensor: Tensor) -> torch.dtype:
    """The dtype for sums of these values: at least float32."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _like(parameter: Tensor | None, statistics: Tensor) -> Tensor | None:
    return None if parameter is None else parameter.to(statistics.dtype)
