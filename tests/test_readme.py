"""The README and the first page of the tutorial: what they show is run as it stands there."""

import re

import pytest
import transcript
from commands import BIN, DEADLINE_SECONDS, ROOT, command, evenstep

from service.runs.tracking import read_metrics

README = (ROOT / "README.md").read_text()


def block(language, holding):
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return next(text for name, text in fenced if name == language and holding in text)


@pytest.fixture
def own_job(tmp_path):
    task = block("python", "def task")
    assert len(task.strip().splitlines()) <= 22
    (tmp_path / "my_task.py").write_text(task)
    (tmp_path / "my_job.yaml").write_text(block("yaml", "./my_task.py:task"))
    return tmp_path


def test_a_task_of_ones_own_in_twenty_lines(own_job):
    commands = block("", "evenstep run ./my_job.yaml").strip().splitlines()
    for line in commands:
        program, *words = line.split()
        assert program == "evenstep"
        done = evenstep(*words, cwd=own_job)
        assert done.returncode == 0, done.stderr
    for name in ("larger", "faster"):
        last = read_metrics(own_job / "runs" / name / "metrics.jsonl")[-1]
        assert last["test/accuracy"] > 0.9


def test_the_mistake_that_the_readme_shows(own_job):
    shown = block("", "unknown key").strip()
    text = (own_job / "my_job.yaml").read_text().replace("lr: 0.01", "learning_rate: 0.01")
    (own_job / "my_job.yaml").write_text(text)
    told = evenstep("run", "my_job.yaml", cwd=own_job)
    assert told.returncode == 64
    assert shown.partition(": ")[2] in told.stderr


def test_the_first_five_minutes_are_as_the_tutorial_shows_them():
    shown = transcript.in_page(transcript.PAGE.read_text())
    assert "error: runs/my_job was started with another spec:" in shown
    assert transcript.shape(transcript.transcript()) == transcript.shape(shown), (
        "python tests/transcript.py"
    )


def test_the_same_job_three_ways_as_the_readme_has_them(tmp_path):
    commands = block("", "torchrun --standalone").strip().splitlines()
    assert len(commands) == 3
    for line, said in zip(commands, ("Done after", "Nothing to do", "Nothing to do"), strict=True):
        program, *words = line.split()
        done = command(BIN / program, *words, cwd=tmp_path, timeout=DEADLINE_SECONDS)
        assert done.returncode == 0, done.stderr
        assert said in done.stdout


def test_the_readme_is_read_in_a_few_minutes():
    assert len(README.splitlines()) <= 130


def test_its_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / target).exists(), target
