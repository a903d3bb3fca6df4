"""Hooks of the task, after a test or an epoch: called on rank 0; they cannot change the run."""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from service.basics import randomness
from service.basics.errors import LINES, HookFailed, SpecError, printable
from service.basics.running_time import TimeLimit
from service.data.task import Task, TestSet
from service.distributed.generators import generators_given_back, seed_generators
from service.distributed.world import World, Writers
from service.health.heartbeat import Heartbeat
from service.observability.logged_files import LoggedFiles, histogram, png, require_name
from service.optimization.compilation import uncompiled_copy
from service.optimization.precision import multiplied_in
from service.optimization.train_state import TrainState
from service.plan.plan import Plan
from service.runs.tracking import LoggedFile
from service.sharding.sharding import holds_rows

Hook = Callable[["HookContext"], object]
_RING_SECONDS = 0.05


class HookTimeout(Exception):
    """A hook has taken longer than `faults.hook_timeout_seconds`."""


class Logbook:
    """The values and files that the hooks have logged after one step."""

    def __init__(self, files: LoggedFiles, *, step: int) -> None:
        self.values: dict[str, float] = {}
        self.files: list[LoggedFile] = []
        self._names: set[str] = set()
        self._into = files
        self._step = step

    def take(self, name: str) -> str:
        """Reserve a name, which must be unused at this step.

        Raises:
            ValueError: it is already used, or is not a valid name.
        """
        if require_name(name) in self._names:
            raise ValueError(f"{name!r} was already logged at step {self._step}")
        self._names.add(name)
        return name

    def write(self, kind: Any, name: str, content: bytes) -> None:
        """Store a file."""
        self.files.append(self._into.write(self._step, kind, self.take(name), content))


@dataclass(frozen=True)
class HookContext:
    """The arguments of a hook, and its methods to log.

    All data that it gets are copies.  A logged value has the key `hook/NAME`, or `hook/SET/NAME`
    after the test of one of several sets.
    """

    step: int
    """Finished optimizer steps."""
    epoch: float
    """Finished passes over the training rows; 0 for a stream."""
    test: str
    """The name of the test set; empty if there is only one, and after an epoch."""
    measures: Mapping[str, float]
    """The measures of this test set, such as `accuracy`; empty after an epoch."""
    values: Mapping[str, float]
    """All values measured at this step, with the keys of metrics.jsonl: `train/loss`."""
    device: torch.device
    """The device of the model."""
    _book: Logbook = field(repr=False)
    _copied: Callable[[], nn.Module] = field(repr=False)

    @cached_property
    def model(self) -> nn.Module:
        """A copy of the model that is tested, in evaluation mode; created on first access.

        Raises:
            RuntimeError: it cannot be copied, or is sharded over the processes.
        """
        return self._copied()

    def log(self, name: str, value: Any) -> None:
        """Log one number.

        Raises:
            ValueError: it is not a number, or the name is already used.
        """
        number = np.asarray(_on_cpu(value))
        if number.size != 1 or number.dtype.kind not in "biuf":
            raise ValueError(f"context.log({name!r}): must be one number, but is {value!r}")
        self._book.values[f"hook/{self._book.take(self._key(name))}"] = float(number.item())

    def log_image(self, name: str, image: Any) -> None:
        """Log an image: a tensor or array, a pillow image or a matplotlib figure.

        Tensors and arrays are [H, W], [C, H, W] or [H, W, C] with 1, 3 or 4 channels, with
        integers from 0 to 255 or floats from 0 to 1.
        """
        self._book.write("image", self._key(name), _png_of(image))

    def log_text(self, name: str, text: str) -> None:
        """Log a text."""
        if not isinstance(text, str):
            raise ValueError(f"context.log_text({name!r}): must be a str, but is a {type(text)}")
        self._book.write("text", self._key(name), text.encode())

    def log_histogram(self, name: str, values: Any, *, bins: int = 64) -> None:
        """Log the histogram of values of any shape, without those that are not finite."""
        self._book.write("histogram", self._key(name), histogram(_on_cpu(values), bins=bins))

    def log_file(self, name: str, path: str | Path) -> None:
        """Log a copy of a file; the name needs the suffix."""
        self._book.write("file", self._key(name), Path(path).read_bytes())

    def _key(self, name: str) -> str:
        return f"{self.test}/{name}" if self.test else name


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        value = value.detach().to("cpu")
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    return np.asarray(value)


def _png_of(image: Any) -> bytes:
    from io import BytesIO

    content = BytesIO()
    if hasattr(image, "savefig"):  # a matplotlib figure
        image.savefig(content, format="png")
    elif hasattr(image, "save") and hasattr(image, "mode"):  # a pillow image
        image.save(content, "PNG")
    else:
        content.write(png(_on_cpu(image)))
    return content.getvalue()


class Hooked(NamedTuple):
    """The results of the hooks after a step."""

    values: Mapping[str, float] = {}
    """On rank 0."""
    files: Sequence[LoggedFile] = ()
    """On rank 0."""
    failure: str = ""
    """The hook that failed, with the traceback; the same on every process."""
    called: bool = False
    """The same on every process."""


class _Call(NamedTuple):
    what: str
    hook: Hook
    test: TestSet | None


def require_hooks(task: Task, plan: Plan) -> None:
    """Check that the hooks of a task can be called.

    Raises:
        SpecError: one is not a function, or will never be called.
    """
    for name in ("after_test", "after_epoch"):
        hook = getattr(task, name, None)
        if hook is not None and not callable(hook):
            raise SpecError(
                f"task.{name}: must be a function of a context, but is a {type(hook).__name__}."
            )
    if getattr(task, "after_test", None) is not None and plan.test_rows == 0:
        raise SpecError("task.after_test: the task has no test rows, so it is never called.")
    if getattr(task, "after_epoch", None) is not None and plan.train_rows is None:
        raise SpecError(
            "task.after_epoch: the training data is a stream, which has no epochs. Use after_test."
        )


class Hooks:
    """The hooks of a run; every process has them, and rank 0 calls them."""

    def __init__(
        self,
        task: Task,
        *,
        plan: Plan,
        world: World,
        heartbeat: Heartbeat,
        files: LoggedFiles | None,
        say: Callable[[str], None],
    ) -> None:
        """`files` is set on rank 0."""
        self._after_test: Hook | None = getattr(task, "after_test", None)
        self._after_epoch: Hook | None = getattr(task, "after_epoch", None)
        self._plan = plan
        self._world = world
        self._heartbeat = heartbeat
        self._files = files
        self._say = say
        self._failures = 0
        self._last_failure = ""
        self.has_epochs = self._after_epoch is not None
        # A separate group: the others may wait here longer than in any other collective.
        self._all = Writers(world.index, world.processes)
        if self._after_test is not None or self.has_epochs:
            self._all.meet()

    def next_due(self, step: int) -> int:
        """The first step after `step` that ends an epoch."""
        return self._plan.next_epoch_end(step)

    def call(
        self, state: TrainState, values: Mapping[str, float], tested: Sequence[TestSet]
    ) -> Hooked:
        """Call the hooks that are due after this step; every process calls it.

        Args:
            values: everything that was measured at this step.
            tested: the test sets that were tested.
        Returns:
            the logged values, on rank 0.
        """
        calls = self._due(state.step, tested)
        if not calls:
            return Hooked()
        self._heartbeat.enter("hook", state.step)
        began = time.perf_counter()
        logged, failure = Hooked(), ""
        if self._files is not None:
            book = Logbook(self._files, step=state.step)
            failures = [self._failure(call, state, values, book) for call in calls]
            failure = "\n".join(filter(None, failures))
            self._failures += sum(map(bool, failures))
            book.values["system/hook_seconds"] = time.perf_counter() - began
            if self._failures:
                book.values["system/hook_failures"] = self._failures
            logged = Hooked(book.values, book.files)
        failure = self._all.from_lead(failure)
        if failure and not self.ends(failure):
            self._tell(failure)
        return logged._replace(failure=failure, called=True)

    def ends(self, failure: str) -> bool:
        """Whether the run ends because of this failure, if it is one."""
        return bool(failure) and self._plan.spec.faults.on_hook_failure == "stop"

    def _due(self, step: int, tested: Sequence[TestSet]) -> list[_Call]:
        due: list[_Call] = []
        if self._after_test is not None:
            due += [_Call("task.after_test", self._after_test, part) for part in tested]
        if self._after_epoch is not None and self._plan.ends_epoch_at(step):
            due.append(_Call("task.after_epoch", self._after_epoch, None))
        return due

    def _failure(
        self, call: _Call, state: TrainState, values: Mapping[str, float], book: Logbook
    ) -> str:
        """Call one hook; return why it failed, or an empty text."""
        self._heartbeat.enter("hook")
        limit = _Limit(self._plan.spec.faults.hook_timeout_seconds)
        context = HookContext(
            step=state.step,
            epoch=self._plan.epoch(state.step),
            test=call.test.name if call.test is not None else "",
            measures=_of_set(call.test, values),
            values=dict(values),
            device=self._world.device,
            _book=book,
            _copied=lambda: _copy_of(state, limit),
        )
        try:
            with self._kept(state.step), limit.over():
                call.hook(context)
        except (Exception, SystemExit) as error:
            return _told(call, state.step, error)
        return ""

    @contextmanager
    def _kept(self, step: int) -> Iterator[None]:
        """A context that restores the process state that a hook may change."""
        kind, threads, place = torch.get_default_dtype(), torch.get_num_threads(), os.getcwd()
        key = randomness.key(randomness.HOOK, self._plan.spec.seed, step)
        in_precision = multiplied_in(self._plan.spec.model.precision)
        with generators_given_back(), torch.no_grad(), in_precision:
            self._world.seed(key)
            seed_generators(key)
            try:
                yield
            finally:
                torch.set_default_dtype(kind)
                if torch.get_num_threads() != threads:
                    torch.set_num_threads(threads)
                os.chdir(place)

    def _tell(self, failure: str) -> None:
        """Report a failure; the traceback only once if it is always the same."""
        first, _, trace = failure.partition("\n")
        told = failure if trace != self._last_failure else f"{first} (as before)"
        self._last_failure = trace
        self._say(f"WARNING: {told}\nThe run continues (faults.on_hook_failure: go_on).")


def failed(failure: str, *, saved: bool) -> HookFailed:
    """The error that ends the run because of a hook; `saved`: whether its steps are saved."""
    told = "The state is saved: the run continues after this step." if saved else "No step is lost."
    return HookFailed(
        f"{failure}\nThe run ends because of it (faults.on_hook_failure: stop). Correct the hook, "
        "or set "
        f"go_on, and run the same command again. {told}"
    )


def _of_set(test: TestSet | None, values: Mapping[str, float]) -> dict[str, float]:
    if test is None:
        return {}
    prefix = test.key("")
    return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}


def _copy_of(state: TrainState, limit: _Limit) -> nn.Module:
    if holds_rows(state.model):
        raise RuntimeError(
            "context.model: with exchange.mode: sharded no process has the whole model. Use "
            "context.measures, or export a checkpoint and inspect it."
        )
    with limit.held(), state.evaluated():
        return uncompiled_copy(state.tested).eval()


def _told(call: _Call, step: int, error: BaseException) -> str:
    begun = error.__traceback__
    inner = begun.tb_next if begun is not None else None  # without the line that calls the hook
    lines = "".join(traceback.format_exception(type(error), error, inner or begun))
    of_set = f" of the test set {call.test.name!r}" if call.test and call.test.name else ""
    return printable(f"{call.what}{of_set} failed at step {step}.\n{lines.rstrip()}", keep=LINES)


class _Limit:
    """Interrupts a hook that takes too long, if this thread can receive signals."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._held = False
        self._left = TimeLimit(seconds)

    @contextmanager
    def over(self) -> Iterator[None]:
        """A context that raises `HookTimeout` after that time."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGALRM, self._ring)
        self._left = TimeLimit(self._seconds)  # the timer itself continues while a run is stopped
        self._ring_again()
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    @contextmanager
    def held(self) -> Iterator[None]:
        """A context that is not interrupted: it contains the weights of the run for a moment."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def _ring(self, number: int, frame: object) -> None:
        if self._held or self._left.left:
            self._ring_again()
            return
        raise HookTimeout(f"it took longer than faults.hook_timeout_seconds ({self._seconds:g} s)")

    def _ring_again(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, max(self._left.look, _RING_SECONDS))
