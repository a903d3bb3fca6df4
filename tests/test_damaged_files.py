"""Whatever happened to a run's files, the next attempt says so, or mends it: no traceback."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import BIN, DEADLINE_SECONDS, command, evenstep
from jobs import spec_of, train_in_process
from processes import ProcessesOf

from service.basics.errors import EvenstepError, NoCheckpoint, SpecError, WillFailAgain
from service.distributed.world import World
from service.runs.directory import RunDirectory
from service.runs.failure_reports import write_failure
from service.runs.receipt_file import ReceiptFile, read_receipt
from service.runs.tracking import read_metrics

SPEC = spec_of("plain_rows", length={"steps": 20}, checkpoint={"every_steps": 7})


def attempt(world: World, runs: Path, stop_at: int | None = None) -> tuple[str, int, str]:
    """How an attempt ended: the error's name, its exit code and its words."""
    try:
        train_in_process(world, SPEC, runs, stop_at)
    except EvenstepError as error:
        return type(error).__name__, error.exit_code, str(error)
    return "", 0, ""


@pytest.fixture(scope="module")
def run_of_9(tmp_path_factory: pytest.TempPathFactory, processes: ProcessesOf) -> Path:
    """The runs of a job that was stopped after step 9."""
    runs = tmp_path_factory.mktemp("runs")
    processes(1).run(attempt, runs, 9)
    return runs


def wrong_line(path: Path, line: bytes) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], line + b"\n", *lines[3:]]))


def added(path: Path, text: bytes) -> None:
    path.write_bytes(path.read_bytes() + text)


def altered(path: Path, change: Callable[[dict], object]) -> None:
    facts = json.loads(path.read_text())
    change(facts)
    path.write_text(json.dumps(facts))


def directory_instead(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


REFUSED: dict[str, tuple[Callable[[Path], object], type[EvenstepError], str]] = {
    "run.json without attempts": (
        lambda run: altered(run / "run.json", lambda facts: facts.pop("attempts")),
        SpecError,
        "run.json is damaged",
    ),
    "run.json with an attempt of no step": (
        lambda run: altered(run / "run.json", lambda f: f["attempts"][0].update(from_step=None)),
        SpecError,
        "run.json is damaged",
    ),
    "a receipt torn in its middle": (
        lambda run: wrong_line(run / "receipt.jsonl", b'{"from": 3, "t'),
        WillFailAgain,
        'receipt.jsonl:3: this line is not a row of a receipt: b\'{"from": 3, "t\'',
    ),
    "a receipt with a digest too few": (
        lambda run: wrong_line(run / "receipt.jsonl", b'{"from": 3, "to": 4, "rows": ["aa"]}'),
        WillFailAgain,
        "receipt.jsonl:3: this line is not a row of a receipt",
    ),
    "a receipt of zeros": (
        lambda run: wrong_line(run / "receipt.jsonl", bytes(40)),
        WillFailAgain,
        "receipt.jsonl:3: this line is not a row of a receipt",
    ),
    "metrics torn in their middle": (
        lambda run: wrong_line(run / "metrics.jsonl", b'{"step": 3, "ep'),
        WillFailAgain,
        "metrics.jsonl:3: this line is not a row of metrics",
    ),
    "a directory in the place of metrics": (
        lambda run: directory_instead(run / "metrics.jsonl"),
        EvenstepError,
        "metrics.jsonl could not be written: Is a directory",
    ),
    "checkpoints that are gone": (
        lambda run: shutil.rmtree(run / "checkpoints"),
        NoCheckpoint,
        "job/checkpoints, but the run had one at step 9. Restore it",
    ),
    "a file in the place of checkpoints": (
        lambda run: (shutil.rmtree(run / "checkpoints"), (run / "checkpoints").touch()),
        SpecError,
        "job/checkpoints cannot be used: Not a directory",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_repaired_is_reported_and_nothing_is_lost(
    run_of_9: Path, tmp_path: Path, processes: ProcessesOf, what: str
) -> None:
    damage, kind, told = REFUSED[what]
    shutil.copytree(run_of_9, tmp_path / "runs")
    damage(tmp_path / "runs/job")
    ((name, code, words),) = processes(1).run(attempt, tmp_path / "runs")
    assert (name, code) == (kind.__name__, kind.exit_code), words
    assert told in words
    steps = [path.name for path in (tmp_path / "runs/job").glob("checkpoints/step-*")]
    assert sorted(steps) in (["step-00000007", "step-00000009"], []), "as they were"


def unfinished(run: Path) -> None:
    """As one whose last attempt was killed leaves it."""
    altered(run / "run.json", lambda facts: facts["attempts"][-1].pop("ended"))


def strange_beat(run: Path) -> None:
    unfinished(run)
    beat = {"started": RunDirectory(run).read_facts()["attempts"][-1]["started"]}
    beat |= {"time": "noon", "step": None, "seconds": 3}
    (run / "logs").mkdir(exist_ok=True)
    (run / "logs/rank-0.beat").write_text(json.dumps(beat))


def link_to(place: str) -> Callable[[Path], None]:
    """A link at this place of a run, to a file of a person that lies beside the runs."""

    def damage(run: Path) -> None:
        precious = run.parent.parent / "precious"
        precious.write_text("precious")
        (run / place).parent.mkdir(exist_ok=True)
        (run / place).unlink(missing_ok=True)
        (run / place).symlink_to(precious)

    return damage


@pytest.mark.parametrize(
    "place",
    [
        ".lock",
        "receipt.jsonl",
        "metrics.jsonl",
        ".metrics.jsonl.partial",
        ".receipt.jsonl.partial",
        ".run.json.partial",
        "run.json",
        "logs/rank-0.beat",
        "logs/.rank-0.beat.partial",
        "checkpoints/.best.partial",
        "checkpoints/.step-00000014.partial-1",
    ],
)
def test_nothing_is_written_through_a_link(
    run_of_9: Path, tmp_path: Path, processes: ProcessesOf, place: str
) -> None:
    shutil.copytree(run_of_9, tmp_path / "runs")
    link_to(place)(tmp_path / "runs/job")
    ((_, code, words),) = processes(1).run(attempt, tmp_path / "runs")
    assert (tmp_path / "precious").read_text() == "precious"
    assert code in (0, 42, 64), words
    if place == ".lock":
        assert "a symbolic link is in its place, and a run is not written through links" in words


@pytest.mark.parametrize(
    "part", ["checkpoints", "logs", "failures", "profile", "wandb", "tensorboard", "logged"]
)
def test_a_part_that_lies_elsewhere_is_refused(
    run_of_9: Path, tmp_path: Path, processes: ProcessesOf, part: str
) -> None:
    shutil.copytree(run_of_9, tmp_path / "runs")
    place = tmp_path / "runs/job" / part
    if place.exists():
        shutil.rmtree(place)
    (tmp_path / "elsewhere").mkdir()
    place.symlink_to(tmp_path / "elsewhere")
    ((name, _, words),) = processes(1).run(attempt, tmp_path / "runs")
    assert (name, f"job/{part} is a link" in words) == ("SpecError", True), words
    assert write_failure(place, {"rank": 0}) is None
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_pipe_in_the_place_of_a_file_of_a_run_blocks_nothing(
    run_of_9: Path, tmp_path: Path, processes: ProcessesOf
) -> None:
    for name in ("run.json", "metrics.jsonl", "receipt.jsonl", ".lock"):
        shutil.copytree(run_of_9, tmp_path / name)
        (tmp_path / name / "job" / name).unlink()
        os.mkfifo(tmp_path / name / "job" / name)
        ((_, code, words),) = processes(1).run(attempt, tmp_path / name)
        assert code in (42, 64, 1), (name, words)


MENDED: dict[str, Callable[[Path], object]] = {
    "a torn last row": lambda run: added(run / "metrics.jsonl", b'{"step": 10, "lo'),
    "a torn last line of the receipt": lambda run: added(run / "receipt.jsonl", b"{"),
    "a beat that is none": strange_beat,
    "a beat that is a directory": lambda run: directory_instead(run / "logs/rank-0.beat"),
    "a leftover that is a link": lambda run: (
        run / "checkpoints/.step-00000014.partial-ab"
    ).symlink_to(run / "checkpoints/step-00000009"),
    "a mark of the best that leads out": lambda run: (run / "checkpoints/best").symlink_to(
        "/etc/passwd"
    ),
    "a file called like the next checkpoint": lambda run: (
        run / "checkpoints/step-00000014"
    ).touch(),
}


@pytest.mark.parametrize("what", MENDED)
def test_what_can_be_repaired_is_and_the_result_is_unchanged(
    run_of_9: Path, tmp_path: Path, processes: ProcessesOf, what: str
) -> None:
    shutil.copytree(run_of_9, tmp_path / "runs")
    MENDED[what](tmp_path / "runs/job")
    assert processes(1).run(attempt, tmp_path / "runs") == [("", 0, "")]
    run = RunDirectory(tmp_path / "runs/job")
    assert [row["step"] for row in read_metrics(run.metrics)] == list(range(1, 21))
    assert sorted(read_receipt(run.receipt)) == list(range(1, 21))
    assert run.read_facts()["state"] == "done"
    assert (run.checkpoints / "step-00000009").is_dir(), "what a link led to is untouched"


def test_a_damaged_run_json_is_put_aside_where_a_person_says_so(
    run_of_9: Path, tmp_path: Path
) -> None:
    shutil.copytree(run_of_9, tmp_path / "runs")
    (tmp_path / "job.yaml").write_text(json.dumps(SPEC))
    facts = tmp_path / "runs/job/run.json"
    facts.write_text(facts.read_text()[:40])
    refused = evenstep("run", "job.yaml", cwd=tmp_path)
    assert refused.returncode == 64
    assert "run.json cannot be read" in refused.stderr
    words = ("--fresh", "--processes", 2, "--max-restarts", 1)
    done = evenstep("run", "job.yaml", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def without_rights(*words: object, cwd: Path) -> tuple[int, str]:
    """The command with no more rights than a file's mode gives its owner: its code, and stderr."""
    start: tuple[object, ...] = (BIN / "evenstep", *words)
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root may read everything, and setpriv is not there to change that")
        start = ("setpriv", "--bounding-set=-all", "--inh-caps=-all", *start)
    ended = command(*start, cwd=cwd, timeout=DEADLINE_SECONDS)
    return ended.returncode, ended.stderr


def test_what_may_not_be_read_is_not_taken_for_damaged(run_of_9: Path, tmp_path: Path) -> None:
    """To go on from the checkpoint before would lose steps that are all there."""
    shutil.copytree(run_of_9, tmp_path / "runs")
    (tmp_path / "job.yaml").write_text(json.dumps(SPEC))
    newest = tmp_path / "runs/job/checkpoints/step-00000009"
    (newest / "model.safetensors").chmod(0)
    words = f"{newest.relative_to(tmp_path)}/model.safetensors cannot be read: Permission denied."
    ended = without_rights("run", "job.yaml", cwd=tmp_path)
    assert ended[0] == 64, ended
    assert "cannot be used: Permission denied (" in ended[1]
    assert without_rights("checkpoints", "runs/job", cwd=tmp_path) == (64, f"error: {words}\n")
    assert (newest / "manifest.json").exists(), "it is not set aside"
    (tmp_path / "runs/job").chmod(0)
    listed = without_rights("runs", cwd=tmp_path)
    (tmp_path / "runs/job").chmod(0o755)
    assert listed == (0, "warning: runs/job/run.json cannot be read: Permission denied.\n")


def test_a_receipt_is_on_disk_before_it_takes_the_old_ones_place(
    run_of_9: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "receipt.jsonl"
    shutil.copy(run_of_9 / "job/receipt.jsonl", path)
    done: list[str] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: (done.append(os.readlink(f"/proc/self/fd/{fd}")), sync(fd))[1]
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(f"to {b}"), replace(a, b))[1])
    ReceiptFile(path, step=5).close()
    assert done == [str(tmp_path / ".receipt.jsonl.partial"), f"to {path}", str(tmp_path)]
    assert sorted(read_receipt(path)) == [1, 2, 3, 4, 5]
