"""A run from Python: in this process, with the console, files and checkpoints of the command."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from service.basics.errors import SpecError, Stopped
from service.data.task import load_task, sampling_of
from service.distributed.generators import generators_given_back
from service.distributed.world import in_place
from service.health.stop_request import StopRequest, stop_on_signals
from service.in_processes import run_in_processes
from service.monitoring.endpoint import metrics_endpoint
from service.optimization.precision import convolutions_timed, multiplied_in
from service.plan.changing import Accepted
from service.plan.plan import make_plan
from service.recipes import find_recipe
from service.results import History, read_history
from service.spec.documents import Setting, document_of
from service.spec.files import load_spec, plain_values
from service.spec.models import Spec
from service.training.batch_size_finder import settled
from service.training.worker import run as run_to_the_end

_OF_TRACKERS = ("WANDB_", "MLFLOW_", "TRACKIO_")
_ALONE = threading.Lock()
"""Locked by the run of this process: threads, random numbers and precision are process-wide."""


def run(
    spec: Spec | Mapping[str, Any] | str | os.PathLike[str],
    *,
    runs: str | os.PathLike[str] = "runs",
    fresh: bool = False,
    accept_changes: bool = False,
    processes: int = 1,
    quiet: bool = False,
    stop_at: int | None = None,
    **overrides: Any,
) -> History:
    """Train and test `spec`; return its history, with `rows` for a data frame, and `model()`.

    Called again, it resumes.  An interrupt saves and stops: then `state` is `stopped`.  Random
    generators, threads, precision, signal handlers and the variables of trackers are restored when
    this returns.

    Args:
        spec: a file, the name of a recipe, plain values, or a `Spec`.  The task of a notebook is
            `__main__:name`.
        fresh: set an earlier run of this name aside, and start a new one.
        accept_changes: accept changes of the spec in a run that has begun; they are recorded.
        processes: with more than one, the command starts them, as with `--processes`; they cannot
            use a task that is defined in a notebook.
        quiet: print nothing on standard output.
        stop_at: save after this step, and stop.
        overrides: sections or keys of the spec, such as `seed=1, optimizer={"lr": 0.02}`.
    Raises:
        SpecError: an error of the user, before anything is written; or another run trains in this
            process.
        EvenstepError: the run cannot continue.
    """
    _require_one_process()
    for name, count in (("processes", processes), ("stop_at", stop_at)):
        if count is not None and (type(count) is not int or count < 1):
            raise SpecError(f"{name}: must be a whole number, at least 1, but is {count}.")
    if not os.fspath(runs):
        raise SpecError("runs: is empty, which would be this directory. Name a directory.")
    place = Path(runs).absolute()
    loaded = _loaded(spec, overrides)
    if processes > 1:
        options = ["--runs", str(place), *["--fresh"] * fresh]
        options += ["--accept-changes"] * accept_changes
        options += [] if stop_at is None else ["--stop-at", str(stop_at)]
        run_in_processes(loaded, processes=processes, options=options, quiet=quiet)
        return read_history(place / loaded.name)
    if not _ALONE.acquire(blocking=False):
        raise SpecError(
            "service.run: this process already trains a run, and two runs would share its random "
            "numbers, threads and precision. Wait for its end, or start each run in its own "
            "process: "
            "with `evenstep run`, or with multiprocessing and the start method spawn."
        )
    try:
        accepted = Accepted(everything=accept_changes)
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if quiet else sys.stdout):
            _run_alone(loaded, place, fresh=fresh, accepted=accepted, stop_at=stop_at)
    finally:
        _ALONE.release()
    return read_history(place / loaded.name)


def _loaded(spec: Any, overrides: Mapping[str, Any]) -> Spec:
    given = document_of(overrides).values  # refuses values that no spec can contain
    return load_spec(_source(spec), overrides=list(_settings(given)))


def _run_alone(
    loaded: Spec, place: Path, *, fresh: bool, accepted: Accepted, stop_at: int | None
) -> None:
    if loaded.exactness == "bitwise":
        raise SpecError(
            "exactness: bitwise changes how this whole process computes. "
            "Use `evenstep run`, which starts its own process."
        )
    with _given_back(loaded):
        _run(loaded, place, fresh=fresh, accepted=accepted, stop_at=stop_at)


@contextmanager
def _given_back(spec: Spec) -> Iterator[None]:
    """Compute as the spec requires; afterwards restore the settings of the caller's process."""
    threads, variables = torch.get_num_threads(), _variables_of_trackers()
    hooks = sys.excepthook, sys.exit  # wandb replaces both, once more in each run
    timed = convolutions_timed(spec.model.cudnn_benchmark)
    with multiplied_in(spec.model.precision), timed, generators_given_back():
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            sys.excepthook, sys.exit = hooks
            for name in _variables_of_trackers().keys() - variables.keys():
                del os.environ[name]
            os.environ.update(variables)


def _variables_of_trackers() -> dict[str, str]:
    """What a tracker is told by, of which a run sets some."""
    return {name: value for name, value in os.environ.items() if name.startswith(_OF_TRACKERS)}


def _run(
    loaded: Spec, place: Path, *, fresh: bool, accepted: Accepted, stop_at: int | None
) -> None:
    world = in_place(precision=loaded.model.precision)
    task = load_task(loaded.task, loaded.task_args, seed=loaded.seed)
    loaded = settled(
        loaded,
        task=task,
        world=world,
        runs=place,
        fresh=fresh,
        processes=1,
        processes_here=1,
        say=print,
    )
    plan = make_plan(
        loaded,
        processes=1,
        train_rows=task.train_rows,
        test_rows=task.test_rows,
        accepted=accepted,
        sampling=sampling_of(task),
        stop_at=stop_at,
    )
    # Only the main thread can receive signals.
    hears = threading.current_thread() is threading.main_thread()
    endpoint = metrics_endpoint(
        loaded, place / loaded.name, ranks=range(1), started=time.time(), say=print
    )
    with endpoint, stop_on_signals() if hears else nullcontext(StopRequest()) as stop:
        try:
            run_to_the_end(plan, task, world, runs=place, stop=stop, fresh=fresh)
        except Stopped as stopped:
            print(stopped)


def _source(spec: Any) -> Path | Mapping[str, Any]:
    if isinstance(spec, Spec):
        values: dict[str, Any] = plain_values(spec)
        return values
    return spec if isinstance(spec, Mapping) else find_recipe(os.fspath(spec))


def _settings(values: Mapping[str, Any]) -> Iterator[Setting]:
    """A setting for each value; keys that a section does not name are kept."""
    for key, value in values.items():
        names = tuple(key.split("."))
        yield from _settings_within(value, names, written=len(names))


def _settings_within(value: Any, names: tuple[str, ...], *, written: int) -> Iterator[Setting]:
    """The same of one value. A mapping with a dot in a key (names of modules) is set as a whole."""
    if isinstance(value, Mapping) and value and not any("." in name for name in value):
        for name, inner in value.items():
            yield from _settings_within(inner, (*names, name), written=written)
    else:
        yield Setting(names, value, f"{'.'.join(names)}={json.dumps(value)}", written)


def _require_one_process() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SpecError(
            "service.run trains in one process, but torchrun started several. "
            "Use `torchrun ... -m launch run SPEC` for them."
        )
