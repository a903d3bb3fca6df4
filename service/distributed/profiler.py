"""A trace of a few steps, one file for each process, with a table of the time spent."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from service.basics.atomic_files import make_directory, replace_unsynced, told_of
from service.health.heartbeat import ORDER, WORDS, Heartbeat
from service.health.throughput import Throughput
from service.plan.plan import Window

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

_OPERATORS_SHOWN = 15
_LONGEST_NAME = 44
_BACKWARD = "autograd::engine::evaluate_function: "


class Profile:
    """Traces the steps of a window in this process; each process traces its own."""

    def __init__(
        self,
        window: Window,
        *,
        directory: Path,
        heartbeat: Heartbeat,
        throughput: Throughput,
        device: torch.device,
        say: Callable[[str], None],
    ) -> None:
        """`directory` gets `rank-N.json`, a Chrome trace, and `rank-N.txt`, the table."""
        self._window = window
        self._directory = directory
        self._heartbeat = heartbeat
        self._throughput = throughput
        self._device = device
        self._say = say
        self._steps: Generator[Any, None, None] | None = None

    def over(self, steps: Iterable[T], *, start: int) -> Iterator[T]:
        """The same steps; each step in the window is traced from its request to its end.

        Args:
            start: optimizer steps finished before the first of `steps`.
        """
        self._steps = self._over(steps, start)
        return self._steps

    def close(self) -> None:
        """Write the trace, if the run has ended within the window."""
        if self._steps is not None:
            self._steps.close()

    def _over(self, steps: Iterable[T], start: int) -> Generator[T, None, None]:
        first, source = max(self._window.first, start + 1), iter(steps)
        if first > self._window.last:
            self._say(f"--profile: step {self._window.last} was taken before this attempt.")
        yield from islice(source, first - 1 - start)
        if first <= self._window.last:
            yield from self._traced(source, range(first, self._window.last + 1))
        yield from source

    def _traced(self, source: Iterator[T], numbers: range) -> Iterator[T]:
        from torch.profiler import record_function

        with self._tracing() as begun:
            for number in numbers:
                with record_function(f"step {number}"):
                    step = next(source, None)
                    if step is None:
                        return
                    begun.append(number)
                    yield step

    @contextmanager
    def _tracing(self) -> Iterator[list[int]]:
        """A context that traces; the caller adds each step that it starts to the list."""
        import torch

        from service.distributed.devices import synchronize

        on_cpu = self._device.type == "cpu"
        activities = {torch.profiler.ProfilerActivity.CPU}
        if not on_cpu:
            activities = torch.profiler.supported_activities()  # type: ignore[no-untyped-call]
        begun: list[int] = []
        with self._throughput.stopped():
            trace = torch.profiler.profile(activities=activities)
            trace.start()
        before = self._heartbeat.spent()
        try:
            yield begun
        finally:
            synchronize(self._device)
            spent = self._heartbeat.spent()
            with self._throughput.stopped():
                trace.stop()
                try:
                    self._write(trace, begun, {work: spent[work] - before[work] for work in ORDER})
                except OSError as error:  # a full disk loses the trace, not the run
                    self._say(
                        "WARNING: the trace could not be written: "
                        f"{told_of(self._directory, error)}"
                    )

    def _write(self, trace: Any, begun: Sequence[int], seconds: dict[Any, float]) -> None:
        make_directory(self._directory)
        path = self._directory / f"rank-{self._heartbeat.rank}.json"
        path.unlink(missing_ok=True)  # torch would follow a link
        trace.export_chrome_trace(str(path))
        if not begun:
            return
        table = "\n".join(
            [
                f"Where the time of {_counted(begun)} went, on rank {self._heartbeat.rank}:",
                "",
                *_aligned(_by_work(seconds, len(begun))),
                "",
                *_aligned(_by_operator(trace, len(begun), on_cpu=self._device.type == "cpu")),
                "",
                f"The trace: {path}, for https://ui.perfetto.dev or chrome://tracing",
            ]
        )
        replace_unsynced(path.with_suffix(".txt"), table + "\n")
        self._say(table)


def _counted(steps: Sequence[int]) -> str:
    return f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"


def _by_work(seconds: dict[Any, float], steps: int) -> list[tuple[str, ...]]:
    """The time of each kind of work of this process, on a GPU: of its host, from its heartbeat."""
    total = sum(seconds.values())
    rows = [
        (WORDS[work], f"{1e3 * seconds[work] / steps:.3f}", f"{seconds[work] / total:.1%}")
        for work in ORDER
        if seconds[work]
    ]
    whole = ("total", f"{1e3 * total / steps:.3f}", "100.0%")
    return [("activity of this process", "ms per step", "share"), *rows, whole]


def _by_operator(trace: Any, steps: int, *, on_cpu: bool) -> list[tuple[str, ...]]:
    """The operators with the longest own time: on the device, or on the CPU if that is the device.

    A kernel of the device is an event too, and its time belongs to the operator that started it.
    If the profiler does not support the device, only the CPU's times are available.
    """
    from torch._C._autograd import DeviceType

    events = [
        event
        for event in trace.key_averages()
        if event.device_type == DeviceType.CPU and not event.key.startswith("step ")
    ]
    on_cpu = on_cpu or not any(event.self_device_time_total for event in events)

    def self_time(event: Any) -> float:
        return float(event.self_cpu_time_total if on_cpu else event.self_device_time_total)

    total = sum(map(self_time, events)) or 1.0
    longest = sorted(events, key=self_time, reverse=True)[:_OPERATORS_SHOWN]
    rows = [
        (
            event.key.replace(_BACKWARD, "backward of ")[:_LONGEST_NAME],
            f"{event.count / steps:g}",
            f"{self_time(event) / 1e3 / steps:.3f}",
            f"{self_time(event) / total:.1%}",
        )
        for event in longest
        if self_time(event)
    ]
    return [("operator", "calls per step", "ms per step", "share"), *rows]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [f"  {row[0]:{widths[0]}}"]
            + [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)]
        )
        for row in rows
    ]
