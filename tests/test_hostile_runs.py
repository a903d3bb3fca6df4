"""Whatever lies in a directory of runs, each is one line: no traceback, and nobody waits."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from click.testing import CliRunner, Result
from commands import evenstep
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from jobs import spec_of, train_in_process
from processes import ProcessesOf

from launch.cli import evenstep as commands
from service.basics.errors import EvenstepError, SpecError, WillFailAgain, printable
from service.runs.checkpoint_files import _sealed
from service.runs.line_file import BLOCK_BYTES
from service.runs.metrics_file import best_in, last_row, read_curves, read_metrics
from service.runs.receipt_file import read_digests, read_receipt

SPEC = spec_of(
    "plain_rows",
    length={"steps": 6},
    test={"every_steps": 2, "micro_batch": 64},
    checkpoint={"every_steps": 3, "best": {"measure": "test/accuracy", "mode": "max"}},
)
FILES = [
    "run.json",
    "spec.yaml",
    "metrics.jsonl",
    "receipt.jsonl",
    ".lock",
    "failures/one.json",
    "checkpoints/best",
    "checkpoints/step-00000006/manifest.json",
    "checkpoints/step-00000006/state.json",
    "checkpoints/step-00000006/model.safetensors",
]
EVIL = "\x1b[2J\x1b]0;owned\x07\u202egnp\r\nerror: none"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, processes: ProcessesOf) -> Path:
    """A run in two attempts, with a failure report."""
    runs = tmp_path_factory.mktemp("runs")
    processes(1).run(train_in_process, SPEC, runs, 3)
    processes(1).run(train_in_process, SPEC, runs)
    (runs / "job/failures").mkdir()
    report = {"time": 1.7e9, "rank": 0, "kind": "hang", "line": "a.py:3", "stacks": "<f>"}
    (runs / "job/failures/one.json").write_text(json.dumps(report))
    return runs / "job"


# ---- what may happen to a file


def instead(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.unlink(missing_ok=True)
        make(path)

    return damage


def with_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket may have a hundred bytes only
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(here)


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 34)


IN_PLACE: list[Callable[[Path], None]] = [
    instead(os.mkfifo),
    instead(Path.mkdir),
    instead(with_socket),
    instead(sparse),
    instead(Path.touch),
    instead(lambda path: None),
    *(
        instead(lambda path, to=to: path.symlink_to(to))
        for to in ("/dev/zero", "/etc/passwd", "nowhere", ".", "..")
    ),
]

texts = st.sampled_from([EVIL, "", "job", "NaN", "\x00", "é", "x" * 5000]) | st.text(max_size=8)
numbers = st.sampled_from([-1, 0, 1e308, 10**30, 10**400, -(2**63), 2**53, 0.5, 1e-320])
numbers |= st.floats() | st.integers()
plain = st.none() | st.booleans() | texts | numbers
values = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)


def altered(value: Any, data: st.DataObject) -> Any:
    """Plain values with one of them, wherever it stands, replaced or gone."""
    if isinstance(value, dict) and value and data.draw(st.integers(0, 4)):
        key = data.draw(st.sampled_from(sorted(value)))
        if data.draw(st.integers(0, 5)) == 0:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: altered(value[key], data)}
    if isinstance(value, list) and value and data.draw(st.integers(0, 4)):
        place = data.draw(st.integers(0, len(value) - 1))
        return [*value[:place], altered(value[place], data), *value[place + 1 :]]
    return data.draw(values)


def damage(path: Path, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["json", "json", "bytes", "cut", "added", "place"]))
    content = path.read_bytes()
    if kind == "place":
        data.draw(st.sampled_from(IN_PLACE))(path)
    elif kind == "cut":
        path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    elif kind == "added":
        path.write_bytes(content + data.draw(st.binary(max_size=20)))
    elif kind == "bytes" or path.suffix not in (".json", ".jsonl", ".yaml"):
        at = data.draw(st.integers(0, len(content)))
        path.write_bytes(content[:at] + data.draw(st.binary(max_size=9)) + content[at + 2 :])
    elif path.suffix == ".jsonl":
        lines = content.splitlines()
        place = data.draw(st.integers(0, len(lines) - 1))
        lines[place] = json.dumps(altered(json.loads(lines[place]), data)).encode()
        path.write_bytes(b"\n".join(lines) + b"\n")
    elif path.suffix == ".yaml":
        path.write_text(json.dumps(data.draw(values | st.just(SPEC).map(lambda s: s))))
        if data.draw(st.booleans()):
            path.write_text(json.dumps(altered(SPEC, data)))
    else:
        told = altered(json.loads(content), data)
        is_manifest = path.name == "manifest.json" and isinstance(told, dict)
        path.write_text(_sealed(told) if is_manifest else json.dumps(told))


def called(*words: object) -> Result:
    """What a command says and how it ends, which is never a traceback."""
    done = CliRunner().invoke(commands, [str(word) for word in words], standalone_mode=False)
    if not isinstance(done.exception, EvenstepError | SystemExit | None):
        raise done.exception
    if isinstance(done.exception, EvenstepError):
        str(done.exception).encode("utf-8", "surrogateescape")
    shown = done.output.replace("\n", "")
    assert shown == printable(shown), "a terminal is told nothing but text"
    return done


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
@given(data=st.data())
def test_a_damaged_run_is_one_line_and_takes_nothing_down(sound: Path, data: st.DataObject) -> None:
    with TemporaryDirectory() as place:
        runs = Path(place, "runs")
        for name in ("sound", "torn"):
            shutil.copytree(sound, runs / name)
        for file in data.draw(
            st.lists(st.sampled_from(FILES), min_size=1, max_size=3, unique=True)
        ):
            damage(runs / "torn" / file, data)
        listed = called("runs", runs)
        _, *lines = listed.stdout.splitlines()
        told = [line for line in listed.stderr.splitlines() if line.startswith("warning: ")]
        assert len(lines) + len(told) <= 2
        assert any(line.startswith("sound ") and "6/6" in line for line in lines)
        is_run = os.path.lexists(runs / "torn/run.json")
        assert len(lines) + len(told) == (2 if is_run else 1), (listed.stdout, listed.stderr)
        called("checkpoints", runs / "torn")
        called("verify", runs / "torn", runs / "sound", "--level", "bits")
        called("report", runs / "torn", runs / "sound", "-o", Path(place, "both.html"))
        called("report", runs / "torn", "-o", Path(place, "one.html"))


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("number", range(len(IN_PLACE)))
def test_a_special_file_blocks_no_command(
    sound: Path, tmp_path: Path, file: str, number: int
) -> None:
    shutil.copytree(sound, tmp_path / "runs/torn")
    IN_PLACE[number](tmp_path / "runs/torn" / file)
    called("runs", tmp_path / "runs")
    called("checkpoints", tmp_path / "runs/torn")
    called("verify", tmp_path / "runs/torn", sound, "--level", "bits")
    called("report", tmp_path / "runs/torn", "-o", tmp_path / "one.html")
    called("watch", tmp_path / "runs/torn", "--once")
    called("fork", tmp_path / "runs/torn", "--at", "6", "--name", "forked")


def test_a_fork_copies_nothing_that_a_link_names(sound: Path, tmp_path: Path) -> None:
    (tmp_path / "private").write_text("a key of mine")
    for file in ("metrics.jsonl", "receipt.jsonl"):
        run = tmp_path / "runs" / file
        shutil.copytree(sound, run)
        (run / file).unlink()
        (run / file).symlink_to(tmp_path / "private")
        done = called("fork", run, "--at", "6", "--name", "forked")
        assert isinstance(done.exception, SpecError)
        assert str(done.exception).startswith(f"{run / file} cannot be read: it is a link")
        assert {path.name for path in run.parent.iterdir()} == {run.name}
        shutil.rmtree(run)


@pytest.mark.parametrize(
    "told",
    [
        {"runs": {"../job": []}},
        {"runs": {"/etc": []}},
        {"runs": {"a\0b": []}},
        {"runs": {EVIL: []}},
        {"runs": {"job": [["a", EVIL]]}, "format": 7},
        {"runs": {"job": [[1]]}},
        {"runs": []},
        [],
        "[" * 100_000,
    ],
)
def test_a_damaged_sweep_is_one_line(sound: Path, tmp_path: Path, told: Any) -> None:
    """Its file names runs, which are looked for below it and nowhere else."""
    text = told if isinstance(told, str) else json.dumps({"format": 1} | told if told else told)
    (tmp_path / "sweep.json").write_text(text)
    done = CliRunner().invoke(commands, ["report", str(tmp_path), "-o", str(tmp_path / "a.html")])
    assert isinstance(done.exception, SpecError), done.exception
    assert "sweep.json cannot be read" in str(done.exception)


def test_what_a_terminal_would_obey_is_written_out(sound: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a\x1b[31mb"
    shutil.copytree(sound, run)
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(facts | {"state": EVIL}))
    listed = evenstep("runs", cwd=tmp_path)
    assert len(listed.stdout.splitlines()) == 2
    assert "\x1b" not in listed.stdout + listed.stderr
    assert r"a\x1b[31mb" in listed.stdout
    assert r"\u202egnp\r\nerror: none" in listed.stdout
    (run / "run.json").write_text("{" + EVIL)
    refused = evenstep("report", "a\x1b[31mb", cwd=tmp_path)
    assert refused.returncode == 64
    assert "\x1b" not in refused.stderr


# ---- the quick ways to read come to the same as the plain one

row = st.fixed_dictionaries(
    {"epoch": st.floats(0, 9), "time": st.floats(0, 2e9)},
    optional={
        "test/accuracy": st.floats(),
        "train/loss": st.floats() | st.integers(),
        'a "b"\\': st.floats(),
    },
)


@given(st.lists(row, max_size=30), st.integers(0, 80), st.booleans())
@example([], 0, True)
def test_curves_hold_what_the_rows_hold(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, float]], cut: int, largest: bool
) -> None:
    from service.runs.tracking import Row, _line

    with TemporaryDirectory() as place:
        path = Path(place, "metrics.jsonl")
        lines = [
            _line(Row(step, row.pop("epoch"), row.pop("time"), row))
            for step, row in enumerate(map(dict, rows), start=1)
        ]
        content = b"".join(lines)
        path.write_bytes(content[: max(0, len(content) - cut)])
        plain_rows = read_metrics(path)
        curves = read_curves(path)
        assert curves.steps.tolist() == [row["step"] for row in plain_rows]
        for key in {key for row in plain_rows for key in row} - {"step", "epoch", "time"}:
            steps, found = (each.tolist() for each in curves.of[key])
            same = [(row["step"], float(row[key])) for row in plain_rows if key in row]
            assert repr(list(zip(map(int, steps), found, strict=True))) == repr(same)
        assert repr(last_row(path)) == repr(plain_rows[-1] if plain_rows else None)
        known = [(r["test/accuracy"], r["step"]) for r in plain_rows if "test/accuracy" in r]
        known = [pair for pair in known if abs(pair[0]) < float("inf")]
        sign = 1 if largest else -1
        best = max(known, key=lambda pair: (sign * pair[0], -pair[1]), default=None)
        assert best_in(path, "test/accuracy", largest=largest) == best


def test_the_best_row_is_found_beyond_lines_that_are_longer_than_a_block(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    long = {f"train/{number}/{'x' * 90}": 0.5 for number in range(4000)}
    rows = [{"test/loss": 3.0}, long, {"test/loss": 1.0}, long | {"test/loss": 0.5}, {}, {}]
    lines = [json.dumps({"step": n} | row) for n, row in enumerate(rows, start=1)]
    assert len(lines[1]) > 3 * BLOCK_BYTES
    path.write_text("\n".join([*lines, '{"step": 7, "test/loss": 0.1}\n']))
    assert best_in(path, "test/loss", largest=True) == (3.0, 1)
    assert best_in(path, "test/loss", largest=False) == (0.1, 7)
    path.write_text("\n".join(lines))
    assert best_in(path, "test/loss", largest=False) == (0.5, 4)


digests = st.integers(0, 2**64 - 1).map(lambda number: f"{number:016x}")


@given(st.lists(st.lists(digests, min_size=1, max_size=4), max_size=9), st.integers(0, 3))
def test_digests_as_numbers_are_those_of_the_receipt(lines: list[list[str]], again: int) -> None:
    with TemporaryDirectory() as place:
        path, step, text = Path(place, "receipt.jsonl"), 1, ""
        for each in lines:
            line = {"from": step, "to": step + len(each) - 1, "rows": each}
            text += json.dumps(line) + '\n{"step": 1, "weights": {"model.safetensors": "ab"}}\n'
            step = max(1, step + len(each) - again)
        path.write_text(text)
        steps, found = read_digests(path)
        plain = read_receipt(path)
        assert steps.tolist() == sorted(plain)
        assert [f"{digest:016x}" for digest in found.tolist()] == [plain[s] for s in sorted(plain)]


@pytest.mark.parametrize(
    "line",
    [
        '{"from": 1, "to": 1, "rows": ["00000000 0000000"]}',
        '{"from": 1, "to": 1, "rows": [7]}',
        '{"from": 1.0, "to": 1.0, "rows": ["0000000000000001"]}',
        '{"from": -3, "to": -3, "rows": ["0000000000000001"]}',
        f'{{"from": {2**70}, "to": {2**70}, "rows": ["0000000000000001"]}}',
        '{"from": 1, "to": 2000000000000, "rows": ["0000000000000001"]}',
        '{"step": "x", "weights": {}}',
        "[]",
        "1",
        "",
    ],
)
def test_a_line_that_is_not_of_a_receipt_is_named(tmp_path: Path, line: str) -> None:
    good = '{"from": 1, "to": 1, "rows": ["0000000000000001"]}\n'
    (tmp_path / "receipt.jsonl").write_text(good + line + "\n" + good)
    for read in (read_receipt, read_digests):
        with pytest.raises(
            WillFailAgain, match=r"receipt\.jsonl:2: this line is not a row of a receipt"
        ):
            read(tmp_path / "receipt.jsonl")


def test_a_run_that_is_a_link_to_itself_is_reported(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/loop").symlink_to("loop")
    called("runs", tmp_path / "runs")
    assert isinstance(called("report", tmp_path / "runs/loop").exception, SpecError)
