"""What is loaded by whom, and when: the order of a start, held without a clock."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from commands import BIN, CLEAN, ROOT, command, evenstep
from injuring import DEADLINE_SECONDS, descendants, is_alive, until

from launch.processes.warm_start import ensure_server, starts_processes
from service.basics.errors import SpecError

# Each process that Python starts leaves the names of its modules; a killed one leaves none.
_LEAVE_MODULES = """
import atexit, os, sys
place = os.environ["LEAVE_MODULES"]
def leave():
    with open(f"{place}/{os.getpid()}", "w") as file:
        file.write("\\n".join(sys.modules))
atexit.register(leave)
"""
_TASK = """
import os
import signal
from pathlib import Path
import psutil
from jobs import plain_rows

def task():
    told = f"{os.getpid()} {len(psutil.Process().children())} {os.environ.get('WANDB_API_KEY')}"
    Path(f"rank-{os.environ.get('RANK', '-')}").write_text(told)
    return plain_rows(rows=23, test_rows=5)
"""
_SPEC = {
    "name": "job",
    "task": "./job.py:task",
    "batch": {"global_batch": 7, "micro_batch": 3},
    "length": {"steps": 2},
    "optimizer": {"name": "sgd", "lr": 0.1},
}


def job(place: Path) -> dict[str, str]:
    """Write a small job; the environment in which its task can be imported."""
    (place / "job.py").write_text(_TASK)
    (place / "job.yaml").write_text(json.dumps(_SPEC))
    return {"PYTHONPATH": str(Path(__file__).parent)}


def watched(place: Path, environ: dict[str, str]) -> dict[str, str]:
    """The same, in which each process leaves the names of its modules in `place/modules`."""
    (place / "site").mkdir()
    (place / "modules").mkdir()
    (place / "site/sitecustomize.py").write_text(_LEAVE_MODULES)
    path = os.pathsep.join([str(place / "site"), environ.get("PYTHONPATH", "")])
    return environ | {"PYTHONPATH": path, "LEAVE_MODULES": str(place / "modules")}


def modules_of(place: Path) -> dict[int, set[str]]:
    return {int(p.name): set(p.read_text().split()) for p in (place / "modules").iterdir()}


@contextmanager
def waiting_for_its_spec(*words: str, cwd: Path, **environ: str) -> Iterator[subprocess.Popen[str]]:
    """`evenstep run` of a spec that is a pipe nobody has written into."""
    os.mkfifo(cwd / "pipe.yaml")
    process = subprocess.Popen(
        [str(BIN / "evenstep"), "run", "pipe.yaml", *words],
        cwd=cwd,
        env=CLEAN | environ,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def has_torch(process: int) -> bool:
    return "libtorch_python" in Path(f"/proc/{process}/maps").read_text()


def test_the_fork_server_loads_torch_before_the_spec_is_read(tmp_path):
    with waiting_for_its_spec("--processes", "2", cwd=tmp_path) as launcher:
        until(lambda: any(map(has_torch, descendants(launcher.pid))), "a child with torch")
        assert not has_torch(launcher.pid), "it waits for the spec"
        below = descendants(launcher.pid)
        (tmp_path / "pipe.yaml").write_text("nonsense: 3\n")
        _, err = launcher.communicate(timeout=DEADLINE_SECONDS)
    assert launcher.returncode == 64, err
    assert "unknown key" in err
    until(lambda: not any(map(is_alive, below)), "the end of all that it began", 2.0)


def test_a_process_that_trains_loads_the_libraries_before_the_spec_is_read(tmp_path):
    with waiting_for_its_spec(cwd=tmp_path) as process:
        until(lambda: has_torch(process.pid), "torch's libraries")
        assert not descendants(process.pid)
        (tmp_path / "pipe.yaml").write_text("nonsense: 3\n")
        _, err = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 64, err


def test_a_fault_in_a_spec_is_reported_before_anything_is_loaded_to_the_end(tmp_path):
    environ = watched(tmp_path, job(tmp_path))
    refused = evenstep("run", "job.yaml", "batch.rows=3", cwd=tmp_path, **environ)
    assert refused.returncode == 64
    (modules,) = modules_of(tmp_path).values()
    assert "torch" not in modules


def test_the_launcher_does_without_what_only_ranks_need(tmp_path):
    environ = watched(tmp_path, job(tmp_path))
    ended = evenstep("run", "job.yaml", "--processes", 2, cwd=tmp_path, **environ)
    assert ended.returncode == 0, ended.stderr
    ranks = {int((tmp_path / f"rank-{n}").read_text().split()[0]) for n in range(2)}
    found = modules_of(tmp_path)
    (launcher,) = [process for process in found if "launch.processes.agent" in found[process]]
    assert launcher not in ranks
    assert not found[launcher] & {
        "service.training.worker",
        "service.distributed.world",
        "accelerate",
        "torch._dynamo",
    }
    for rank in ranks:
        assert found[rank] >= {"service.training.worker", "accelerate", "torch._dynamo"}
        assert not found[rank] & {"launch.cli", "launch.processes.agent", "wandb"}


def test_a_process_that_compiles_nothing_does_without_the_compiler(tmp_path):
    environ = watched(tmp_path, job(tmp_path))
    for step in (1, 2):  # from the beginning, and from a checkpoint
        ended = evenstep("run", "job.yaml", "--stop-at", step, cwd=tmp_path, **environ)
        assert ended.returncode == (75 if step == 1 else 0), ended.stderr
    started, resumed = modules_of(tmp_path).values()
    assert started >= {"torch", "service.training.worker"} <= resumed
    assert not (started | resumed) & {"torch._dynamo", "launch.processes.agent", "rich.console"}


@pytest.mark.parametrize(
    "words",
    [
        "--help",
        "schema",
        "recipes",
        "runs .",
        "kubernetes render digits kubernetes.image=registry.example.com/evenstep:1",
    ],
)
def test_what_only_prints_never_loads_torch(tmp_path, words):
    ended = evenstep(*words.split(), cwd=tmp_path, **watched(tmp_path, {}))
    assert ended.returncode == 0, ended.stderr
    (modules,) = modules_of(tmp_path).values()
    assert "click" in modules
    assert not modules & {"torch", "accelerate", "wandb"}
    assert words.startswith("kubernetes") or "numpy" not in modules, "a tenth of a second"


def test_what_is_set_after_the_server_was_started_reaches_the_ranks(tmp_path):
    (tmp_path / "key").write_text("k" * 40 + "\n")
    environ = job(tmp_path) | {"WANDB_API_KEY_FILE": str(tmp_path / "key")}
    ended = evenstep("run", "job.yaml", "--processes", 2, cwd=tmp_path, **environ)
    assert ended.returncode == 0, ended.stderr
    for rank in range(2):
        assert (tmp_path / f"rank-{rank}").read_text().split()[2] == "k" * 40


@pytest.mark.skipif("EVENSTEP_DEVICE" in os.environ, reason="counts this machine's devices")
def test_a_server_that_was_started_for_nothing_is_ended(tmp_path):
    environ = job(tmp_path) | {"CUDA_VISIBLE_DEVICES": ""}
    ended = evenstep("run", "job.yaml", "--processes", "auto", cwd=tmp_path, **environ)
    assert ended.returncode == 0, ended.stderr
    _, children, _ = (tmp_path / "rank--").read_text().split()
    assert int(children) <= 2, "its sentinel, and multiprocessing's tracker may be there"


@pytest.mark.parametrize(
    ("words", "variables", "starts"),
    [
        ("run digits", {}, False),
        ("run digits --processes 1", {}, False),
        ("run digits --processes=3", {}, True),
        ("run digits --processes auto", {}, True),
        ("run digits --processes 2 --processes 1", {}, False),
        ("run --max-restarts 2 digits", {}, True),
        ("run digits --max-restarts=0", {}, False),
        ("run digits", {"RANK": "0"}, False),
        ("run digits", {"PET_NNODES": "2"}, True),
        ("run digits", {"PET_NNODES": "1", "PET_NPROC_PER_NODE": "gpu"}, True),
        ("test runs/digits --processes 2", {}, True),
        ("test s3://bucket/runs/digits", {}, True),
        ("test runs/digits task_args.at=s3://bucket", {}, False),
    ],
)
def test_the_arguments_say_who_starts_the_processes(words, variables, starts):
    assert starts_processes(words.split(), variables) is starts


@pytest.mark.parametrize("words", [("run", "digits"), ("run", "digits", "--processes", "2")])
def test_ctrl_c_while_the_command_is_imported_prints_nothing(tmp_path, words):
    """With an import that takes until then in the place of a library."""
    library = tmp_path / "library/click"
    library.mkdir(parents=True)
    text = "import time\nopen({!r}, 'w').close()\nwhile True: time.sleep(0.01)\n"
    (library / "__init__.py").write_text(text.format(str(tmp_path / "imports")))
    env = CLEAN | {"PYTHONPATH": str(library.parent)}
    with subprocess.Popen(
        [BIN / "evenstep", *words],
        cwd=tmp_path,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        until((tmp_path / "imports").exists, "the import", of=process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=DEADLINE_SECONDS)
    assert (process.returncode, out, err) == (130, "", "")


def test_a_directory_for_sockets_that_others_can_change_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user can make it at the same path when something has removed ours."""
    place = tmp_path / "pymp-known"
    monkeypatch.setitem(multiprocessing.current_process()._config, "tempdir", str(place))
    ensure_server()
    assert stat.S_IMODE(place.stat().st_mode) == 0o700, "made again"
    place.chmod(0o770)
    with pytest.raises(SpecError, match="others can write into it"):
        ensure_server()
    place.chmod(0o700)
    ensure_server()
    if os.geteuid() == 0:
        os.chown(place, 65534, 65534)
        with pytest.raises(SpecError, match="belongs to another user"):
            ensure_server()
    place.rename(tmp_path / "other")
    place.symlink_to(tmp_path / "other")
    with pytest.raises(SpecError, match="belongs to another user"):
        ensure_server()


@pytest.mark.parametrize("words", [(), ("--processes", "2")], ids=["one", "two"])
def test_files_with_names_of_modules_are_not_taken_for_these(tmp_path, words):
    """Of the user's files only the task is imported, and what it imports."""
    environ = job(tmp_path) | {"PYTHONHASHSEED": "0"}  # so that Python itself starts it
    with open(tmp_path / "job.py", "a") as file:  # what it starts looks for modules as always
        file.write("assert 'PYTHONSAFEPATH' not in os.environ\n")
    for name in ("queue", "random", "types"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not this one')")
    for name in ("launch", "service"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('nor this one')")
    run = evenstep("run", "./job.yaml", *words, cwd=tmp_path, **environ)
    assert run.returncode == 0, run.stderr


def test_a_checkout_that_is_not_installed_starts_ranks_of_its_own(tmp_path):
    """`python -m launch` finds it in the current directory; another version may be installed."""
    environ = job(tmp_path) | {"PYTHONHASHSEED": "0"}
    checkout = tmp_path / "checkout"
    for name in ("launch", "service"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    with open(tmp_path / "job.py", "a") as file:
        file.write(f"import service, launch.rank.entry as entry\nplace = {str(checkout)!r}\n")
        file.write("for each in (service, entry): assert each.__file__.startswith(place), each\n")
    words = (sys.executable, "-m", "launch", "run", "../job.yaml", "--processes", 2)
    run = command(*words, cwd=checkout, timeout=DEADLINE_SECONDS, **environ)
    assert run.returncode == 0, run.stderr


def test_a_package_with_the_name_of_one_of_ours_is_reported(tmp_path):
    environ = job(tmp_path)
    (tmp_path / "service").mkdir()
    (tmp_path / "job.py").write_text("from service.networks import Net")
    run = evenstep("run", "./job.yaml", cwd=tmp_path, **environ)
    assert run.returncode == SpecError.exit_code
    assert f"Rename {tmp_path}/service: 'service' is a package of Evenstep" in run.stderr
