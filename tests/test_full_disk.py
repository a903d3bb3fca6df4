"""A disk that is full under a run's records: told once and by all, and nothing is lost."""

import json
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos.campaign import differences
from disks import mounted
from injuring import ended, facts_of, injured
from jobs import spec_of, train_in_process
from processes import ProcessesOf
from saves import watched

from service.basics.atomic_files import AppendOnlyFile
from service.basics.errors import EvenstepError, NotSaved
from service.distributed.world import World
from service.runs.directory import OpenRun, open_run
from service.runs.tracking import read_metrics
from service.spec.files import load_spec


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB, for the runs."""
    if resource.getpagesize() > 4096:
        pytest.skip("a full disk must not have room for 19 rows: needs pages of 4 KiB")
    with mounted(tmp_path / "runs", "3m"):
        yield tmp_path


def test_a_disk_without_room_stops_a_run_or_not_and_loses_no_row(small_disk: Path) -> None:
    environ = injured(
        small_disk,
        # The disk fills up as the save of step 10 begins: it waits for the one before it, of the
        # best test result (step 5), so that one is whole however slow the disk is.
        ("no room", "save", 0, 1, 0.0, 10),
        ("no room", "save", 0, 1, 0.0, 10),  # again, in the second attempt
        ("room again", "forward", 0, 3 * 25),  # in step 30: from step 5 on, three passes of each
        ("disk full", "run.json", 0, 2),  # the second time that an attempt writes it: at its end
        length={"steps": 36},
        checkpoint={"every_steps": 10},
    )
    words = ("--processes", 2)
    code, out, err = ended(*words, cwd=small_disk, **environ)
    assert code == 42, err
    assert err.count("error:") == 1, err
    assert "The checkpoint of step 10 could not be written to" in err
    assert "are free. Earlier ones are unchanged. Free some, or lower checkpoint.keep." in err
    assert "Traceback" not in out + err, "it is no fault of the program"
    (small_disk / "runs/filler").unlink()

    words = (*words, "checkpoint.on_failure=go_on")
    code, out, err = ended(*words, cwd=small_disk, **environ)
    assert code == 42, err
    assert out.count("metrics.jsonl could not be written: no space is left there") == 1
    assert "Training continues (checkpoint.on_failure: go_on)" in out
    assert "run.json could not be written: no space is left there" in err
    assert "The run is done and saved; run the same command again to record this" in err
    assert err.count("error:") == 1, err
    assert "Traceback" not in out + err
    assert facts_of(small_disk)["state"] == "running"

    code, out, err = ended(*words, cwd=small_disk, **environ)
    assert code == 0, err
    assert "Nothing to do" in out
    assert facts_of(small_disk)["state"] == "done"
    assert ended("--processes", 2, "--name", "whole", cwd=small_disk)[0] == 0
    assert differences(small_disk / "runs/job", small_disk / "runs/whole") == []


NEVER = 99


def refused(world: World, runs: Path, name: str, nth: int) -> tuple[str, int]:
    """How the run ends on each process where the lead cannot open `name` the nth time."""
    opened = 0

    def refuse(operation: str, words: tuple[object, ...]) -> None:
        nonlocal opened
        opened += operation == "open" and str(words[0]).endswith(name)
        if world.is_lead and opened == nth:
            raise OSError(28, "No space left on device")

    try:
        with watched(refuse):
            train_in_process(world, spec_of("plain_rows") | {"length": {"steps": 3}}, runs)
    except EvenstepError as error:
        return str(error), error.exit_code
    return "done", 0


@pytest.mark.parametrize(
    ("name", "nth"),
    [
        (".run.json.partial", 1),
        (".spec.yaml.partial", 1),
        (".run.json.partial", 2),
        ("receipt.jsonl", 1),
        ("metrics.jsonl", 1),
        (".run.json.partial", 3),
    ],
)
def test_what_cannot_be_started_or_ended_fails_on_all_processes_with_the_same_message(
    processes: ProcessesOf, tmp_path: Path, name: str, nth: int
) -> None:
    (told,) = set(processes(3).run(refused, tmp_path, name, nth))
    assert "no space is left there. Free some" in told[0]
    assert told[1] == (64 if name == ".spec.yaml.partial" else 42)
    assert set(processes(3).run(refused, tmp_path, name, NEVER)) == {("done", 0)}
    assert json.loads((tmp_path / "job/run.json").read_text())["state"] == "done"
    assert [row["step"] for row in read_metrics(tmp_path / "job/metrics.jsonl")] == [1, 2, 3]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_lines_that_find_no_room_are_kept_and_said_once() -> None:
    said: list[str] = []
    file = AppendOnlyFile(Path("/dev/full"), say=said.append)
    file.add(b"one\n")
    file.add(b"two\n")
    assert len(said) == 1
    assert "/dev/full could not be written: no space is left there" in said[0]
    with pytest.raises(OSError, match="/dev/full"):
        file.sync()
    file.close()


def test_half_a_line_is_gone_on_with_where_it_was_cut(tmp_path: Path) -> None:
    said: list[str] = []
    file = AppendOnlyFile(tmp_path / "rows", say=said.append)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6, before[1]))  # as a quota does, in mid-line
    try:
        file.add(b"one\n")
        file.add(b"two\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "rows").read_bytes() == b"one\ntw"
    assert "it would exceed the limit on the size of a file" in said[0]
    file.add(b"three\n")
    assert (tmp_path / "rows").read_bytes() == b"one\ntwo\nthree\n"
    file.close()


def test_the_end_of_an_attempt_that_cannot_be_entered_leaves_run_json_as_it_was(
    tmp_path: Path,
) -> None:
    opened: OpenRun = open_run(tmp_path, load_spec(spec_of("plain_rows")), fresh=False)
    opened.start_attempt(processes=1, device="cpu", step=0)
    before = opened.directory.facts.read_bytes()

    def refuse(operation: str, words: tuple[object, ...]) -> None:
        if operation == "write":
            raise OSError(122, "Disk quota exceeded")

    with watched(refuse), pytest.raises(NotSaved, match=r"run\.json could .* quota is used up"):
        opened.end_attempt("done", step=3)
    assert opened.directory.facts.read_bytes() == before
    opened.close()
