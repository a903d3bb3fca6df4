"""What every test may ask for."""

from __future__ import annotations

import atexit
import gc
import logging
import multiprocessing.util
import os
import signal
import sys
import weakref
from collections.abc import Generator, Iterator
from pathlib import Path

import collector
import containers
import pytest
import slurm
from accelerate import Accelerator
from matrix import mark_further_cases
from processes import Processes, ProcessesOf
from services import mark_services

from service.distributed.world import World
from service.health.stop_request import STOP_SIGNALS


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        atexit.register(_leave)
    _hear_signals()


def _leave() -> None:
    """End a worker of pytest-xdist, without taking its million objects apart.

    That takes four seconds of CPU time. On a busy machine it took longer than the ten seconds after
    which pytest-xdist kills a worker, and then warns of it.
    """
    weakref.finalize._exitfunc()  # type: ignore[attr-defined]
    multiprocessing.util._exit_function()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)


def _hear_signals() -> None:
    """A script lets what it starts in the background ignore SIGINT, and nohup SIGHUP.

    So would every command that a test starts, and a test that interrupts it would wait in vain. A
    signal that is handled is ignored here just the same, and is not ignored by what is started.
    """
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


# A worker that began one of these at the end would work alone.
LONGEST = (
    *("object_storage", "docs", "sharding", "readme", "checkpoints", "optimizers", "elastic_nodes"),
    *("elastic_stored", "kubernetes_client", "slurm_script"),
    *("launcher", "simulated_device", "shared_saves", "wandb", "mlflow", "ends_of_nodes", "hooks"),
    *("python_door", "standing_still", "chaos", "precision", "metrics_endpoint", "terminal"),
    *("contention", "run_command", "ready", "features", "start"),
)


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    is_whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    mark_further_cases(items, is_whole)
    mark_services(items, is_whole)
    place = {f"test_{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Load all tests without a search for garbage: nearly all that is made then stays."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


def pytest_runtest_logfinish() -> None:
    collector.rest()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session")
def processes() -> Iterator[ProcessesOf]:
    """`processes(3).run(function, *args)`: real gloo processes, started once per session."""
    pools: dict[int, Processes] = {}

    def of(count: int) -> Processes:
        return pools.setdefault(count, Processes(count))

    yield of
    for pool in pools.values():
        pool.close()


@pytest.fixture(scope="session")
def simulated() -> Iterator[ProcessesOf]:
    """`simulated(2).run(function, *args)`: the same, each process on a device of its own."""
    pools: dict[int, Processes] = {}

    def of(count: int) -> Processes:
        return pools.setdefault(count, Processes(count, device="sim"))

    yield of
    for pool in pools.values():
        pool.close()


@pytest.fixture(scope="session")
def with_sim(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables with which every process that imports torch finds the simulated device."""
    place = tmp_path_factory.mktemp("torch-backends")
    about = place / "simulated_device-0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: simulated-device\nVersion: 0\n")
    (about / "entry_points.txt").write_text("[torch.backends]\nsim = simulated_device:register\n")
    (place / "simulated_device.py").symlink_to(Path(__file__).with_name("simulated_device.py"))
    return {"PYTHONPATH": str(place)}


@pytest.fixture(scope="session")
def alone() -> World:
    """A world of one process: this one."""
    return World(Accelerator(cpu=True))


@pytest.fixture(scope="session")
def image() -> Iterator[str]:
    """The image of this source tree, built once per session, which leaves no container behind."""
    reason = containers.why_not()
    if reason is not None:
        pytest.skip(f"no containers here: {reason}")
    try:
        built = containers.built_image()
    except containers.NotHere as error:
        pytest.skip(f"no containers here: {error}")
    yield built
    assert containers.left_behind() == []


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm.Cluster]:
    """A Slurm controller with two nodes, started once per session."""
    reason = slurm.why_not()
    if reason is not None:
        pytest.skip(f"no Slurm here: {reason}")
    with slurm.Cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running
