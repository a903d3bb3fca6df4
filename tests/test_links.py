"""What somebody else links to a file of this user's is not written, wherever a command writes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from test_report import place  # noqa: F401  # the runs that its fixture makes

from launch.cli import evenstep
from launch.engines.slurm.engine import Slurm
from launch.nodes import secret_file
from launch.processes.side_by_side import Command, run_side_by_side
from service.basics.errors import EvenstepError, SpecError
from service.health.stop_request import StopRequest
from service.spec.files import load_spec

A_JOB = {
    "name": "job",
    "task": "service.recipes.digits:task",
    "batch": {"global_batch": 96},
    "length": {"steps": 3},
    "optimizer": {"name": "sgd", "lr": 0.1},
    "slurm": {"nodes": 1, "gpus_per_node": 0},
}


def submit(runs: Path) -> None:
    spoken: list[str] = []
    Slurm().submit(
        load_spec(A_JOB), waits=False, say=spoken.append, complain=spoken.append, runs=runs
    )


def log_of_a_sweep(runs: Path) -> None:
    def refuse(_: Command, error: EvenstepError) -> None:
        raise error

    command = Command("one", [sys.executable, "-c", "print('taken')"], runs / "one.log")
    run_side_by_side(
        [command],
        places=[{}],
        stop=StopRequest(),
        began=lambda command: None,
        ended=lambda command, code: None,
        unstarted=refuse,
    )


def meet(runs: Path) -> None:
    with secret_file.secret_in(runs, "job", makes=True, seconds=1):
        pass


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs in the place of Slurm's, of which none is needed before a script is written."""
    (tmp_path / "bin").mkdir()
    for name in ("squeue", "sbatch", "scontrol"):
        (tmp_path / "bin" / name).write_text("#!/bin/sh\n[ $0 = sbatch ] && echo 12 || exit 0\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    ("link", "act"),
    [
        (".slurm", submit),
        (".slurm/job", submit),
        ("one.log", log_of_a_sweep),
        (secret_file.folder_in(Path()).name, meet),
    ],
)
def test_nothing_is_written_through_a_link(
    tmp_path: Path, link: str, act: Callable[[Path], None]
) -> None:
    runs, precious = tmp_path / "runs", tmp_path / "precious"
    (runs / link).parent.mkdir(parents=True)
    if act is log_of_a_sweep:
        precious.write_text("precious")
    else:
        precious.mkdir()
    (runs / link).symlink_to(precious)
    with pytest.raises(EvenstepError, match="link"):
        act(runs)
    assert precious.is_dir() or precious.read_text() == "precious"
    assert precious.is_file() or not list(precious.iterdir())


@pytest.mark.usefixtures("cluster")
def test_the_script_of_a_job_replaces_a_link_and_not_what_it_names(tmp_path: Path) -> None:
    precious, place_of_job = tmp_path / "precious", tmp_path / "runs/.slurm/job"
    precious.write_text("precious")
    place_of_job.mkdir(parents=True)
    for name in ("job.sh", "job"):
        (place_of_job / name).symlink_to(precious)
    submit(tmp_path / "runs")
    assert precious.read_text() == "precious"
    assert (place_of_job / "job.sh").read_text().startswith("#!/bin/bash")
    assert not (place_of_job / "job").is_symlink()


def test_a_report_is_not_written_through_a_link(
    place: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(place)
    (tmp_path / "precious").write_text("precious")
    page = tmp_path / "page.html"
    page.with_name(f".page.html.partial-{os.getpid()}").symlink_to(tmp_path / "precious")
    told = CliRunner().invoke(evenstep, ["report", "first", "-o", str(page)])
    assert isinstance(told.exception, SpecError) or told.exit_code == SpecError.exit_code
    assert (tmp_path / "precious").read_text() == "precious"
    assert not page.exists()
