"""What somebody else links to a file of this user's is not written, wherever a command writes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from commands import BIN, DEADLINE_SECONDS, command
from test_report import place  # noqa: F401  # the runs that its fixture makes

from launch.cli import evenstep
from launch.engines.slurm.engine import Slurm
from launch.engines.slurm.script import Script, render
from launch.nodes import secret_file
from launch.processes.side_by_side import Command, run_side_by_side
from launch.slurm_step import note_exit_code
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
    told = {"say": spoken.append, "complain": spoken.append}
    Slurm().submit(load_spec(A_JOB), waits=False, runs=runs, files=runs, **told)


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


def test_the_script_itself_writes_nothing_through_a_link(tmp_path: Path) -> None:
    """Its parts that write files, run by bash in a directory where others have put links."""
    text = render(Script(load_spec(A_JOB), Path("/shared/runs"), 120.0))
    head, marked, _ = text.partition("\nset +C\n")
    spec = "set -u" + (head + marked).partition("set -u")[2]
    again = "again_if_allowed() {" + text.partition("again_if_allowed() {")[2].partition("\n}")[0]
    spec = spec.replace("place=/shared/runs/.slurm/job\n", "")
    program = f"{spec}\nagain() {{ :; }}\n{again}\n}}\ncode=1 again_if_allowed\n"
    assert "place=" not in program
    (tmp_path / "spec-7.yaml").symlink_to(tmp_path / "precious")
    (tmp_path / "failures-7").symlink_to(tmp_path / "precious")
    (tmp_path / "precious").write_text("precious")
    environ = os.environ | {"place": str(tmp_path), "SLURM_JOB_ID": "7"}
    subprocess.run(["bash", "-c", program], env=environ, check=True)
    assert (tmp_path / "precious").read_text() == "precious"
    assert load_spec(tmp_path / "spec-7.yaml") == load_spec(A_JOB)
    assert (tmp_path / "failures-7").read_text() == "1\n"


def test_the_exit_code_of_a_task_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "3").symlink_to(tmp_path / "precious")
    for task in ("3", "4"):
        variables = {"EVENSTEP_EXIT_CODES": str(tmp_path), "SLURM_PROCID": task}
        assert note_exit_code(42, variables) == 42
    assert (tmp_path / "precious").read_text() == "precious"
    assert (tmp_path / "4").read_text() == "42\n"


@pytest.mark.usefixtures("cluster")
def test_whatever_lies_among_the_files_of_a_job_its_status_is_told(tmp_path: Path) -> None:
    where = tmp_path / "runs/.slurm/job"
    where.mkdir(parents=True)
    (where / "job.sh").write_bytes(b"\xff\n#SBATCH --array=0-1\n")

    def told(*words: str) -> Result:
        return CliRunner().invoke(evenstep, ["slurm", *words, "job", "--runs", f"{tmp_path}/runs"])

    for content in (b"../../../secret", b"\xff\xfe", b"12\x1b[2J", b"9" * 5000, b""):
        (where / "job").write_bytes(content)
        done = told("status")
        assert done.exit_code == 0, (content, done.exception)
        assert done.stdout.startswith("job: it is not in the queue\n"), content
    (where / "job").write_text("12\n")
    (where / "failures-12").write_text("1\nnone\n137\n" + "9" * 5000)
    (where / "log-12_%a").write_text("step=1/2 loss=\x1b[2J\n")
    assert "failed 2 times, the last with 137 (killed" in (shown := told("status").stdout)
    assert "loss \\x1b[2J" in shown
    (where / "log-12_%a").unlink()
    for name in ("job", "job.sh", "failures-12", "log-12"):
        (where / name).unlink(missing_ok=True)
        os.mkfifo(where / name)
    assert told("status").exit_code == 0
    done = told("logs")
    assert isinstance(done.exception, EvenstepError) or "not a regular file" in done.output


@pytest.mark.parametrize("kind", ["pipe", "link", "broken link", "socket"])
def test_a_report_or_predictions_replace_only_a_file(
    place: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """As root, -o /dev/null replaced the device for all programs of the machine."""
    monkeypatch.chdir(place)
    (tmp_path / "precious").write_text("precious")
    page = tmp_path / "page.csv"
    if kind == "pipe":
        os.mkfifo(page)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(page))
    else:
        page.symlink_to(tmp_path / ("precious" if kind == "link" else "nothing"))
    before = os.lstat(page)
    for words in (["report", "first", "-o", page], ["test", "first", "--predictions", page]):
        told = command(BIN / "evenstep", *words, cwd=place, timeout=DEADLINE_SECONDS)
        assert told.returncode == 64, told.stderr
        assert "it is a link, a pipe or a device, and would be replaced" in told.stderr
    assert os.path.samestat(os.lstat(page), before)
    assert (tmp_path / "precious").read_text() == "precious"
    assert not (tmp_path / "nothing").exists()


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
