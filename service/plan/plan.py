"""The plan of a run: sizes, and at which step something is due. Pure arithmetic.

Pure and without torch: `evenstep plan` shows it on any machine.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.basics.errors import SpecError
from service.plan.changing import NOTHING_ACCEPTED, Accepted
from service.plan.samplers import halved_share, rows_at, share_of
from service.plan.sampling import Sampling
from service.plan.schedules import Length, Multiplier, Pace, multiplier, pace
from service.spec.models import CheckpointSpec, Spec, TestSpec

DEFAULT_MICRO_BATCH = 32


class Window(NamedTuple):
    """The steps to profile, counted from 1 as in metrics.jsonl."""

    first: int
    steps: int

    @property
    def last(self) -> int:
        """The last step of the window."""
        return self.first + self.steps - 1


def window_of(text: str) -> Window:
    """`20:5` as the steps 20 to 24.

    Raises:
        SpecError: it has another form.
    """
    found = re.fullmatch(r"0*([1-9][0-9]{0,15}):0*([1-9][0-9]{0,15})", text)
    if found is None:
        raise SpecError(
            f"--profile: must be START:STEPS, such as 20:5 for the steps 20 to 24, but is "
            f"{text[:40]!r}."
        )
    return Window(int(found[1]), int(found[2]))


@dataclass(frozen=True)
class Plan:
    """The arithmetic of one run with one number of processes; equal on every process."""

    spec: Spec
    processes: int
    train_rows: int | None
    """None for a stream, whose length is unknown."""
    test_rows: int
    global_batch: int
    """Rows of one optimizer step."""
    micro_batch: int
    """Rows of one forward pass; the last micro-batch of a step may have fewer."""
    steps: int
    """Optimizer steps of the whole run."""
    warmup: int
    test_every: Fraction | None
    """Steps between two test passes; an epoch may be a fractional number of steps."""
    save_every: Fraction | None
    stop_at: int | None = None
    """Stop after this step with a checkpoint, as after a request to stop."""
    profile: Window | None = None
    """The steps to profile."""
    accepted: Accepted = NOTHING_ACCEPTED
    """Changes that are accepted in a run that has begun."""
    sampling: Sampling | None = field(repr=False, compare=False, default=None)
    """Chooses the training rows; None: each row once per epoch."""
    rate: Multiplier = field(repr=False, compare=False, default=lambda step: 1.0)
    """Learning-rate multiplier of the update after `step` finished steps."""
    paces: Mapping[str, Pace] = field(repr=False, compare=False, default_factory=dict)
    """The same for each optimizer, if there are several."""

    @cached_property
    def micro_batches(self) -> int:
        """Micro-batches of one step, over all processes."""
        return math.ceil(self.global_batch / self.micro_batch)

    @property
    def most_processes(self) -> int:
        """The largest possible number of processes: each computes a micro-batch of every step."""
        return possible_processes(self.spec, most=self.micro_batches)

    @property
    def test_micro_batches(self) -> int:
        """Micro-batches of the test set, over all processes."""
        return math.ceil(self.test_rows / self.spec.test.micro_batch)

    @property
    def test_rounds(self) -> int:
        """Micro-batches of the test set that every process has; some have one more."""
        return self.test_micro_batches // self.processes

    def share(self, process: int) -> range:
        """The numbers of the micro-batches that `process` computes: a contiguous range."""
        if self.spec.exactness == "bitwise":
            return halved_share(self.micro_batches, index=process, of=self.processes)
        return share_of(self.micro_batches, index=process, of=self.processes)

    def rows_at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The training rows at any positions of the endless sequence.  # [P]"""
        assert self.train_rows is not None, "a stream has no row numbers"
        if self.sampling is None:
            return rows_at(positions, rows=self.train_rows, seed=self.spec.seed)
        return self.sampling.rows_at(positions, seed=self.spec.seed, global_batch=self.global_batch)

    @property
    def rounds(self) -> int:
        """Micro-batches of the process that has most of them: they determine the time of a step."""
        return max(len(self.share(process)) for process in (0, self.processes - 1))

    def epoch(self, step: int) -> float:
        """Passes over the training rows after `step` steps; 0 for a stream."""
        if self.train_rows is None:
            return 0.0
        return step * self.global_batch / self.train_rows

    @property
    def steps_per_epoch(self) -> Fraction | None:
        """Steps of one pass over the training rows; None for a stream."""
        return None if self.train_rows is None else Fraction(self.train_rows, self.global_batch)

    def ends_epoch_at(self, step: int) -> bool:
        """Whether this step uses the last row of an epoch."""
        return step > 0 and _passes_multiple(self.steps_per_epoch, step)

    def next_epoch_end(self, step: int) -> int:
        """The first step after `step` that ends an epoch; the last step of the run for a stream."""
        return min([self.steps, *_next_multiple(self.steps_per_epoch, step)])

    def logs_at(self, step: int) -> bool:
        """Whether this step is logged."""
        return step % self.spec.tracking.log_every_steps == 0 or step == self.steps

    def tests_at(self, step: int) -> bool:
        """Whether a test follows this step."""
        if self.test_rows == 0:
            return False
        return step == self.steps or _passes_multiple(self.test_every, step)

    def counts_at(self, step: int) -> bool:
        """Whether the test after this step counts for `plateau` and early stopping.

        The one after the last step does so only if its interval asks for it: a longer run has no
        test there, and a run that is extended must not remember one.
        """
        return _passes_multiple(self.test_every, step)

    def saves_at(self, step: int) -> bool:
        """Whether a checkpoint follows this step."""
        return step == self.steps or _passes_multiple(self.save_every, step)

    def stops_at(self, step: int) -> bool:
        """Whether the run stops after this step before its end."""
        return step == self.stop_at and step < self.steps

    def next_due(self, step: int) -> int:
        """The first step after `step` at which any of these is due."""
        every = self.spec.tracking.log_every_steps
        due = [self.steps, (step // every + 1) * every]
        if self.test_rows:
            due += _next_multiple(self.test_every, step)
        due += _next_multiple(self.save_every, step)
        if self.stop_at is not None and self.stop_at > step:
            due.append(self.stop_at)
        return min(due)


def _next_multiple(interval: Fraction | None, step: int) -> list[int]:
    """The first step after `step` that passes a multiple of `interval`, if there is one."""
    if interval is None:
        return []
    return [math.ceil((step // interval + 1) * interval)]


def due(interval: Fraction | None, *, steps: int) -> tuple[int, list[int]]:
    """How many of the steps 1, 2, ... `steps` pass a multiple of `interval` or are the last one.

    Also returns the first four of them.
    """
    first: list[int] = []
    step = 0
    while step < steps and len(first) < 4:
        step = min([steps, *_next_multiple(interval, step)])
        first.append(step)
    count = 0 if interval is None else min(steps, steps // interval)
    return count + (not _passes_multiple(interval, steps)), first


def _passes_multiple(interval: Fraction | None, step: int) -> bool:
    """Whether a multiple of `interval` lies in (step - 1, step]."""
    if interval is None:
        return False
    each, per = interval.denominator, interval.numerator
    return step * each // per > (step - 1) * each // per


def possible_processes(spec: Spec, *, most: int) -> int:
    """The largest number of processes up to `most` that the spec's exactness allows."""
    return 1 << (most.bit_length() - 1) if spec.exactness == "bitwise" else most


def make_plan(
    spec: Spec,
    *,
    processes: int,
    train_rows: int | None,
    test_rows: int,
    stop_at: int | None = None,
    profile: Window | None = None,
    accepted: Accepted = NOTHING_ACCEPTED,
    sampling: Sampling | None = None,
) -> Plan:
    """The plan of a run.

    Raises:
        SpecError: rows, batch and processes do not match; suggests a fix.
    """
    if train_rows is not None and train_rows < 1:
        raise SpecError("task: the training data is empty; give it at least one row.")
    asked = spec.batch.global_batch
    global_batch = _known(train_rows, "batch.global_batch: all") if asked == "all" else asked
    micro_batch = spec.batch.micro_batch or min(DEFAULT_MICRO_BATCH, global_batch)
    if micro_batch == "auto":  # a run finds it; here: the largest possible one
        micro_batch = largest_micro_batch(global_batch, processes)
    if micro_batch > global_batch:
        raise SpecError(
            f"batch.micro_batch: {micro_batch} rows do not fit in a global batch of "
            f"{global_batch}. Use at most {global_batch}."
        )
    pieces = math.ceil(global_batch / micro_batch)
    if (possible := possible_processes(spec, most=processes)) < processes:
        raise SpecError(
            f"exactness: bitwise sums in a fixed order for 1, 2, 4, 8, ... processes, "
            f"not for {processes}. Use {possible}."
        )
    if processes > pieces:
        raise SpecError(_too_many_processes(processes, pieces, global_batch, micro_batch))
    steps = spec.length.steps or math.ceil(
        _as_steps(spec.length.epochs or 0, _known(train_rows, "length.epochs"), global_batch)
    )
    if profile is not None and profile.first > steps:
        raise SpecError(f"--profile: the run ends after step {steps}, before step {profile.first}.")
    length = Length(steps, None if train_rows is None else Fraction(train_rows, global_batch))
    return Plan(
        spec=spec,
        processes=processes,
        train_rows=train_rows,
        test_rows=test_rows,
        global_batch=global_batch,
        micro_batch=micro_batch,
        steps=steps,
        warmup=length.whole(spec.schedule, "warmup", default=0),
        test_every=_interval(spec.test, train_rows, global_batch),
        save_every=_interval(spec.checkpoint, train_rows, global_batch),
        stop_at=stop_at,
        profile=profile,
        accepted=accepted,
        sampling=sampling,
        rate=multiplier(spec.schedule, length),
        paces={name: pace(turn.schedule, length) for name, turn in spec.optimizers.items()},
    )


def share_of_process(spec: Spec, *, processes: int, train_rows: int | None) -> int | None:
    """The default micro-batch on an accelerator: the rows of one process in one pass.

    None if the spec gives the number, or must give the same bits at any number of processes.
    """
    if spec.batch.micro_batch is not None or spec.exactness == "bitwise":
        return None
    asked = spec.batch.global_batch
    rows = _known(train_rows, "batch.global_batch: all") if asked == "all" else asked
    return largest_micro_batch(rows, processes)


def with_micro_batch(spec: Spec, rows: int | str | None) -> Spec:
    """The same spec with this number of rows in a micro-batch."""
    return spec.model_copy(update={"batch": spec.batch.model_copy(update={"micro_batch": rows})})


def largest_micro_batch(global_batch: int, processes: int) -> int:
    """Rows of the largest micro-batch that leaves one for each process; 1 if there are too many."""
    largest = max(1, math.ceil(global_batch / processes))
    while largest > 1 and math.ceil(global_batch / largest) < processes:
        largest -= 1
    return largest


def _too_many_processes(processes: int, pieces: int, global_batch: int, micro_batch: int) -> str:
    of, fix = f"{pieces} micro-batches", f"Use at most {pieces} processes"
    if pieces == 1:
        of, fix = "1 micro-batch", "Use one process"
    if processes <= global_batch:
        fix += f", or batch.micro_batch={largest_micro_batch(global_batch, processes)}"
    return (
        f"batch.micro_batch: a global batch of {global_batch} rows has {of} of "
        f"{micro_batch}, too few for {processes} processes. {fix}."
    )


def _known(rows: int | None, wish: str) -> int:
    if rows is None:
        raise SpecError(
            f"{wish}: the training data is a stream, which has no number of rows. Count in steps."
        )
    return rows


def _interval(
    part: TestSpec | CheckpointSpec, rows: int | None, global_batch: int
) -> Fraction | None:
    if part.every_epochs is not None:
        return _as_steps(part.every_epochs, _known(rows, "every_epochs"), global_batch)
    return Fraction(part.every_steps) if part.every_steps is not None else None


def _as_steps(epochs: float, rows: int, global_batch: int) -> Fraction:
    # The decimal number as written: 0.1 epochs of 30 rows is 3 rows, not 3.0000000000000004.
    return Fraction(str(epochs)) * rows / global_batch
