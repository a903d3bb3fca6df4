"""Buffers that the forward pass changes, besides BatchNorm's: codebooks, counters and others.

Every micro-batch of a step starts from the value that the buffer has at the beginning of the step,
and at the end of the step the values after all micro-batches of all processes are combined:

`mean`   their mean.  Of integers and flags it is rounded to the nearest, half to even.
`sum`    the value at the beginning of the step, plus the change of every micro-batch.
`first`  the value after the first micro-batch of the step.
`local`  as in torch: each micro-batch starts with the value after the previous one on this process.
         The processes get different values, and a checkpoint has those of rank 0.

So with the first three rules the number of processes does not matter, only how a step is
divided into micro-batches.

A rule applies to the buffers that the dry run has seen change.  What begins to change later
(`StillBuffers`), what changes in attributes (`PlainState`) and parameters that the forward pass
changes itself (`WrittenWeights`) cannot be kept equal: they are found, and refused or reported.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from service.basics.errors import SpecError, WillFailAgain
from service.data.batches import Batch
from service.distributed.gradient_sync import GradientSync
from service.distributed.world import World
from service.sharding.sharding import own_rows

Rule = Literal["mean", "sum", "first", "local"]
Value = tuple[nn.Module, str, Tensor, Tensor]
T = TypeVar("T")


@dataclass(frozen=True)
class Moving:
    """Names of the buffers that a forward and backward pass in training has changed."""

    kept: Sequence[str] = ()
    """Changed buffers of the same shape, to which a rule can be applied."""
    reshaped: Sequence[str] = ()
    """Changed buffers of another shape, such as a cache that grows with its input."""


class BufferValues:
    """A copy of the buffers of a model, to compare and to restore."""

    def __init__(self, model: nn.Module) -> None:
        self._values: dict[str, Value] = {
            name: (module, key, buffer, buffer.detach().clone())
            for name, module, key, buffer in _places(model)
        }

    def moved(self) -> Moving:
        """The buffers that have changed, except BatchNorm's."""
        kept, reshaped = [], []
        for name, (module, key, _, before) in self._values.items():
            now = module._buffers[key]
            if isinstance(module, _BatchNorm):
                continue
            if now is None or now.shape != before.shape or now.dtype != before.dtype:
                reshaped.append(name)
            elif not _same(now, before):
                kept.append(name)
        return Moving(kept, reshaped)

    @torch.no_grad()
    def give_back(self) -> None:
        """Restore every buffer: the same tensor with the same value, even if it was replaced."""
        for module, key, buffer, before in self._values.values():
            buffer.copy_(before)
            module._buffers[key] = buffer


class PlainState:
    """The numbers and tensors in attributes of modules, which no checkpoint has."""

    def __init__(self, model: nn.Module) -> None:
        self._before = self._now(model)

    def changed(self, model: nn.Module) -> list[str]:
        """Names of those that another value of the same kind and shape has replaced since."""
        now = self._now(model)
        return [
            name
            for name, before in self._before.items()
            if name in now and now[name][0] == before[0] and now[name][1] != before[1]
        ]

    def _now(self, model: nn.Module) -> dict[str, tuple[object, object]]:
        """By name (the kind of value, the value); of a tensor which one, and how often written."""
        found: dict[str, tuple[object, object]] = {}
        for prefix, module in model.named_modules():
            for key, value in vars(module).items():
                name = f"{prefix}.{key}" if prefix else key
                if type(value) in (int, float):
                    found[name] = type(value), value
                elif isinstance(value, Tensor) and value.is_leaf and not value.is_inference():
                    # Others are computed from parameters, as by weight_norm.
                    found[name] = (value.shape, value.dtype), (id(value), value._version)
        return found


def plain_state_in_words(names: Sequence[str]) -> list[str]:
    """A warning about attributes of modules that change in training, if there are any."""
    if not names:
        return []
    return [
        f"WARNING: {_listed(names)} changes in training, and is an attribute, not a buffer: each "
        "process has its own, and a resumed run starts with the first value again. If the result "
        "depends on it, use register_buffer."
    ]


def buffers_besides_batchnorm(model: nn.Module) -> list[str]:
    """Names of all buffers that a forward pass might change."""
    return [n for n, module, _, _ in _places(model) if not isinstance(module, _BatchNorm)]


def kept_equal(exchange: GradientSync, buffers: Buffers | None) -> GradientSync:
    """`exchange`, extended to collect the buffer changes of each micro-batch, if there are any."""
    return exchange if buffers is None else _Gathering(exchange, buffers)


def buffers_of(
    model: nn.Module, moving: Moving, *, rule: Rule, micro_batches: int, world: World, bitwise: bool
) -> Buffers | None:
    """The rule that keeps the changing buffers of `model` equal; None if there are none.

    Raises:
        SpecError: `exactness: bitwise` is not possible; names the buffers.
    """
    # If a buffer changed on some processes only, all include it, because the sums are collectives.
    found = [name for names in world.gather(list(moving.kept)) for name in names]
    names = [name for name, *_ in _places(model) if name in found]
    if bitwise and moving.reshaped:
        raise SpecError(
            f"exactness: bitwise cannot keep {_listed(moving.reshaped)}: the shape changes in a "
            "forward pass. Give the buffer its final shape before training."
        )
    if bitwise and names and rule == "local":
        raise SpecError(
            f"exactness: bitwise cannot keep {_listed(names)} with model.buffers: local, by which "
            "each process has values of its own. Use mean, sum or first."
        )
    if not names or rule == "local":
        return None
    return Buffers(
        model, names, rule=rule, micro_batches=micro_batches, world=world, summed=bitwise
    )


def buffers_in_words(model: nn.Module, moving: Moving, rule: Rule) -> list[str]:
    """One line for the user about each of them."""
    lines = []
    if moving.kept:
        what = {
            "mean": "become the mean over the micro-batches of each step",
            "sum": "get the sum of the changes of all micro-batches of each step",
            "first": "get the value that the first micro-batch of each step leaves",
            "local": "are each process's own: they drift apart on several processes",
        }[rule]
        lines.append(
            f"Buffers that change in training: {_listed(moving.kept)}. They {what} "
            f"(model.buffers: {rule}).{_of_a_queue(model, moving, rule)}"
        )
    unsaved = [n for n in moving.kept if n not in model.state_dict(keep_vars=True)]
    if unsaved:
        lines.append(
            f"WARNING: {_listed(unsaved)} changes in training and is not saved (persistent=False): "
            "a resumed run starts with its initial value again."
        )
    if moving.reshaped:
        lines.append(
            f"WARNING: {_listed(moving.reshaped)} changes its shape in training: each process "
            "keeps its own."
        )
    return lines


def _of_a_queue(model: nn.Module, moving: Moving, rule: Rule) -> str:
    """What to do if a whole number is a place in a queue, whose elements a mean would mix."""
    buffers = {name: model.get_buffer(name) for name in moving.kept}
    whole = [
        name
        for name, buffer in buffers.items()
        if buffer.dim() == 0
        and not (buffer.dtype.is_floating_point or buffer.dtype == torch.bool)
        and not name.endswith("num_batches_tracked")
    ]
    if rule not in ("mean", "sum") or not whole or len(whole) == len(buffers):
        return ""
    return f" If {_listed(whole)} is a place in a queue, use model.buffers: first."


class Buffers:
    """The changing buffers of one model, and their changes in the micro-batches of a step."""

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        *,
        rule: Rule,
        micro_batches: int,
        world: World,
        summed: bool,
    ) -> None:
        """`summed`: the caller sums `sums` over the processes before the step is finished."""
        chosen = set(names)
        self._places = [(m, key) for name, m, key, _ in _places(model) if name in chosen]
        self._names = list(names)
        self._rule, self._count = rule, micro_batches
        self._world, self._summed = world, summed
        self._own = [buffer for name, _, _, buffer in _places(model) if name in chosen]
        self._start = [value.detach().clone() for value in self._own]
        self.sums = [torch.zeros_like(_wide(value, world)) for value in self._start]
        """Sums over the micro-batches so far, in the widest type."""

    def _now(self) -> list[Tensor]:
        """The current buffers of the model, which a forward pass may have replaced."""
        now = [module._buffers[key] for module, key in self._places]
        for name, start, value in zip(self._names, self._start, now, strict=True):
            if value is None or value.shape != start.shape:
                shape = None if value is None else list(value.shape)
                raise WillFailAgain(
                    f"The buffer {name} had the shape {list(start.shape)} and now has {shape}. It "
                    "cannot be kept equal on all processes; give it one shape, or set "
                    "model.buffers: local."
                )
        return [value for value in now if value is not None]

    def _put(self, values: Sequence[Tensor]) -> None:
        """Put the original tensors back into the model, with these values.

        The tensors that replaced them are not used: they may be a part of a parameter.
        """
        for (module, key), own, value in zip(self._places, self._own, values, strict=True):
            own.copy_(value)
            module._buffers[key] = own

    @torch.no_grad()
    def begin(self) -> None:
        """Save the values at the beginning of the step."""
        for start, now in zip(self._start, self._now(), strict=True):
            start.copy_(now)

    @torch.no_grad()
    def take(self, number: int) -> None:
        """Add the values after micro-batch `number`, and reset the buffers for the next one.

        Empty micro-batches, which only take part in a collective, are not counted.
        """
        counts = number < self._count and (self._rule != "first" or number == 0)
        for start, now, total in zip(self._start, self._now(), self.sums, strict=True):
            if counts:
                total += self._contribution(start, now)
        self._put(self._start)

    def _contribution(self, start: Tensor, now: Tensor) -> Tensor:
        if _by_value(start) and self._rule != "sum":
            return _wide(now, self._world)  # a change from infinity would not be a number
        if not _by_value(start) and start.dtype != torch.bool:
            return _wide(now - start, self._world)  # exact, however large they are
        before, after = _wide(start, self._world), _wide(now, self._world)
        return torch.where(after == before, 0.0, after - before)

    @torch.no_grad()
    def finish_step(self, skipped: Tensor | None = None) -> None:
        """Set the new values after one optimizer step; every process calls it.

        Args:
            skipped: a scalar that is 1 if the step is skipped, so that no buffer changes.
        """
        totals = self.sums
        if not self._summed:
            flat = self._world.sum(torch.cat([total.reshape(-1) for total in totals]))
            parts = flat.split_with_sizes([total.numel() for total in totals])
            totals = [part.view_as(total) for part, total in zip(parts, self.sums, strict=True)]
        values = [self._value(*pair) for pair in zip(self._start, totals, strict=True)]
        if skipped is not None:
            pairs = zip(self._start, values, strict=True)
            values = [torch.where(skipped > 0, start, value) for start, value in pairs]
        self._put(values)
        self.forget()

    def _value(self, start: Tensor, total: Tensor) -> Tensor:
        if self._rule == "mean":
            total = total / self._count
        if not _by_value(start):
            if start.dtype == torch.bool:
                return (start.to(total.dtype) + total).round() > 0
            return start + total.round().to(start.dtype)
        if self._rule == "sum":
            total = _wide(start, self._world) + total
        return (torch.view_as_complex(total) if start.is_complex() else total).to(start.dtype)

    def forget(self) -> None:
        """Discard the changes since the last step."""
        for total in self.sums:
            total.zero_()


class StillBuffers:
    """Finds a saved buffer that begins to change after the dry run, so that no rule applies to it.

    It looks how often each buffer was written to (torch's version counters), and only where that
    has changed at the values: a buffer may be computed again, or be a function of the step.
    """

    def __init__(self, model: nn.Module, moving: Sequence[str]) -> None:
        """Watch all but BatchNorm's buffers and `moving`, from now on."""
        saved = model.state_dict(keep_vars=True)
        self._watched = [
            (name, module, key)
            for name, module, key, buffer in _places(model)
            if name in saved and name not in moving and not isinstance(module, _BatchNorm)
            if not buffer.is_inference()  # which has no version
        ]
        self._before = self._now()

    def begin_again(self) -> None:
        """Forget the changes so far."""
        self._before = self._now()

    def changed(self) -> list[str]:
        """The names of those that were changed or replaced."""
        pairs = zip(self._watched, self._before, self._now(), strict=True)
        return [name for (name, *_), before, now in pairs if before != now]

    @contextmanager
    def ignored(self) -> Iterator[None]:
        """A context in which buffers may change, because what runs in it is known not to matter."""
        before = self.changed()
        yield
        if not before:
            self.begin_again()

    def require_equal(self, changed: Sequence[str], world: World) -> None:
        """Check that those which a process has changed are equal on all; every process calls it.

        Raises:
            WillFailAgain: they are not; on every process.
        """
        union = {name for names in world.gather(list(changed)) for name in names}
        asked = [(name, m._buffers[key]) for name, m, key in self._watched if name in union]
        found = world.gather([_checksum(value) for _, value in asked])  # by process, by buffer
        by_buffer = zip(asked, zip(*found, strict=True), strict=True)
        if names := [name for (name, _), sums in by_buffer if len(set(sums)) > 1]:
            raise WillFailAgain(
                f"The buffers {_listed(names)} began to change after the first pass of the run, "
                "which decides how buffers are kept equal on all processes, and now they differ. "
                "Change them from the first step on, or in after_update; or set model.buffers: "
                "local, or train on one process."
            )
        self.begin_again()

    def _now(self) -> list[tuple[int, int]]:
        buffers = [module._buffers[key] for _, module, key in self._watched]
        return [(id(b), -1 if b is None or b.is_inference() else b._version) for b in buffers]


def _checksum(value: Tensor | None) -> int:
    if value is None:
        return 0
    flat = value.detach().cpu().reshape(-1).contiguous().view(torch.uint8)
    return zlib.crc32(flat.numpy().data)


class _Gathering(GradientSync):
    """Gradient synchronization that also collects the buffer changes after each pass."""

    def __init__(self, inner: GradientSync, buffers: Buffers) -> None:
        self.model = inner.model
        self._inner, self._buffers = inner, buffers

    def backward(self, loss_sum: Tensor, step_weight: float | Tensor) -> None:
        self._inner.backward(loss_sum, step_weight)

    def over(self, micro_batches: Sequence[T]) -> Iterator[T]:
        self._buffers.begin()
        passes: Iterable[T] = self._inner.over(micro_batches)
        for batch in passes:
            yield batch
            assert isinstance(batch, Batch)
            # Before the next pass: `OrderedSync` removes the sums of a pass afterwards.
            self._buffers.take(batch.number)


def _places(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """(name, module, key in the module, buffer) of each buffer, a shared one once."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and id(buffer) not in seen:
                seen.add(id(buffer))
                yield f"{prefix}.{key}" if prefix else key, module, key, buffer


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape and type are equal; NaN equals NaN."""
    one, other = (torch.view_as_real(t) if t.is_complex() else t for t in (one, other))
    alike = one == other
    if one.is_floating_point():
        alike |= one.isnan() & other.isnan()
    return bool(alike.all())


def _by_value(buffer: Tensor) -> bool:
    return buffer.is_floating_point() or buffer.is_complex()


def _wide(value: Tensor, world: World) -> Tensor:
    value = torch.view_as_real(value) if value.is_complex() else value
    return value.detach().to(world.wide)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more


# ---- parameters that a forward pass changes itself


class WrittenWeights:
    """Checksums of parameters, to find those that a forward pass changes itself."""

    def __init__(self, model: nn.Module, *, only_frozen: bool = False) -> None:
        self._only_frozen = only_frozen
        self._before = {name: _identity(p) for name, p in self._watched(model)}

    def _watched(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        named = model.named_parameters()
        return [(n, p) for n, p in named if not (self._only_frozen and p.requires_grad)]

    def touched(self, model: nn.Module) -> list[str]:
        """The names of the trained parameters that were written to, also with equal values."""
        trained = [(name, p) for name, p in self._watched(model) if p.requires_grad]
        return [name for name, p in trained if _written_to(p) != self._before[name][0]]

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


def _written_to(parameter: Tensor) -> tuple[int, int]:
    """(the tensor, how often it was written to)."""
    return id(parameter), parameter._version


def _identity(parameter: Tensor) -> tuple[tuple[int, int], int]:
    """(what `_written_to` says, a checksum of its values); of its own rows."""
    version = _written_to(parameter)
    rows = own_rows(parameter.detach())
    if is_traceable_wrapper_subclass(rows):  # a quantized one, of a form of its own
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
