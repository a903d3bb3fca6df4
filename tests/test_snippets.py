"""Every piece of Python and YAML in the pages and the README runs, and what they name exists.

The commands of the pages, and what is run by these, are in test_docs. Here each other block of
Python is executed in the directory of its page's files, and each other block of YAML is read as a
spec or as sections of one. What cannot be is in `NOT_RUN`, with its reason.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import click
import pytest
import yaml
from commands import ROOT

import launch.cli
from service.data.streams import is_stream
from service.data.task import Task
from service.spec.files import load_spec

PAGES = [
    *sorted((ROOT / "docs").rglob("*.md")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "k8s/README.md")),
]
NAMES = {page: page.relative_to(ROOT).as_posix() for page in PAGES}
NAMED = re.compile(r"`([\w./-]+)`[^\n`]*:\n\n\Z")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LANGUAGES = {"", "console", "dockerfile", "python", "yaml"}

NOT_RUN = {
    # page, how the block begins: why it is not run as it is
    (
        "docs/how-to/own-step.md",
        "def step(model, batch, context):\n    if context.training",
    ): "a part of a task, with `...` for the rest",
    (
        "docs/how-to/own-step.md",
        "def step(model, batch, context):\n    one, other = aug",
    ): "a part of a task: how it augments is left open",
    (
        "docs/how-to/adapters.md",
        "from peft import",
    ): "needs the weights of a BERT and rows of texts; test_peft trains such a one",
    ("docs/how-to/cluster-options.md", "apiVersion: argoproj"): "for Argo CD, not for Evenstep",
    ("docs/how-to/cluster-options.md", "apiVersion: kustomize"): "for Flux, not for Evenstep",
    ("docs/how-to/monitoring.md", "scrape_configs:"): "for Prometheus, not for Evenstep",
    ("docs/how-to/sweep.md", "program: evenstep"): "for W&B's agent; test_sweep runs such a sweep",
}
NAMES_NOTHING = {
    "service.recipes.digit": "the mistake that a message corrects",
    "service/observability/NAME_backend.py": "stands for one of several files",
}
NEEDED = {
    "kubernetes": {"image": "registry.example.com/team/evenstep:0.1.0"},
    "optimizer": {"name": "sgd", "lr": 0.1},
}
"""What a part of a section needs to be read as the whole."""
A_SPEC = {
    "name": "job",
    "task": "service.recipes.digits:task",
    "batch": {"global_batch": 96, "micro_batch": 16},
    "length": {"steps": 20_000},
    "optimizer": {"name": "sgd", "lr": 0.1},
    "test": {"every_epochs": 1},
}


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    language: str
    text: str
    file: str | None
    """The name of the file that it is, if it is one."""

    @property
    def reason(self) -> str | None:
        """Why it is not run."""
        ways = (why for (page, words), why in NOT_RUN.items() if self.begins(page, words))
        return next(ways, None)

    def begins(self, page: str, words: str) -> bool:
        return self.page == page and self.text.startswith(words)

    @property
    def is_started(self) -> bool:
        """Whether it starts runs, and a command of its page runs it as a program, in test_docs."""
        if self.file is None or "from service import" not in self.text:
            return False
        return f"\n$ python {self.file}\n" in (ROOT / self.page).read_text()


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    found = []
    for match in BLOCK.finditer(text):
        named = NAMED.search(text, max(0, match.start() - 200), match.start())
        found.append(Block(NAMES[page], match[1], match[2], named[1] if named else None))
    return found


EVERY_BLOCK = [block for page in PAGES for block in blocks_of(page)]


def pages_with(language: str) -> list[str]:
    return list(dict.fromkeys(block.page for block in EVERY_BLOCK if block.language == language))


def files_of(page: str, place: Path) -> list[Block]:
    """The blocks of a page, whose files are in `place` from now on."""
    blocks = blocks_of(ROOT / page)
    for block in blocks:
        if block.file is not None:
            (place / block.file).parent.mkdir(parents=True, exist_ok=True)
            (place / block.file).write_text(block.text)
    return blocks


@pytest.mark.parametrize("page", pages_with("python"))
def test_every_piece_of_python_runs(page, tmp_path, monkeypatch):
    """A file with tasks also gives the model and the rows of each."""
    monkeypatch.chdir(tmp_path)
    for block in files_of(page, tmp_path):
        if block.language != "python" or block.reason or block.is_started:
            continue
        if "einops" in block.text:
            pytest.importorskip("einops", reason="a package that the page installs")
        names = {"__name__": "snippet", "__file__": str(tmp_path / (block.file or "snippet.py"))}
        exec(compile(block.text, names["__file__"], "exec"), names)
        makers = [make for name, make in names.items() if name == "task" and callable(make)]
        assert len(makers) == block.text.count("def task("), block
        for make in makers:
            task = make()
            assert isinstance(task, Task)
            task.model()
            rows = task.train_data()
            assert is_stream(rows) or rows[0] is not None  # what a stream reads, test_docs runs


@pytest.mark.parametrize("page", pages_with("yaml"))
def test_every_piece_of_a_spec_is_right(page, tmp_path, monkeypatch):
    for block in files_of(page, tmp_path):
        if block.language != "yaml" or block.reason:
            continue
        for variable in re.findall(r"\$\{env:(\w+)\}", block.text):
            monkeypatch.setenv(variable, "2")
        values = yaml.safe_load(block.text)
        if block.file is not None and {"task", "extends"} & values.keys():
            load_spec(tmp_path / block.file)
        else:
            for section, needed in NEEDED.items():
                if section in values:
                    values[section] = needed | values[section]
            spec = load_spec({**A_SPEC, **values})
            assert set(values) <= set(type(spec).model_fields)


def test_every_language_is_known_and_every_reason_is_that_of_a_block():
    assert {block.language for block in EVERY_BLOCK} <= LANGUAGES
    for page, words in NOT_RUN:
        assert any(block.begins(page, words) for block in EVERY_BLOCK), (page, words)
    for reason in NOT_RUN.values():
        for name in re.findall(r"\btest_\w+", reason):
            assert (ROOT / "tests" / f"{name}.py").exists(), name


# ---- what the pages name exists

DOTTED = re.compile(r"\b(?:service|launch|benchmarks)(?:\.[A-Za-z_]\w*)+(?![\w/])")
PATH = re.compile(r"`((?:service|launch|tests|benchmarks|docs|k8s)/[^`\s]+)`")
COMMAND = re.compile(r"\bevenstep ([a-z].*?)(?=`|\| |&&|$)", re.MULTILINE)
EVERY_PAGE = [*NAMES.values(), "CHANGELOG.md"]


def resolved(name: str) -> object:
    """The module, function, class or attribute of this dotted name.

    Raises:
        ImportError, AttributeError: there is none.
    """
    found: object = importlib.import_module(name.partition(".")[0])
    for count, part in enumerate(name.split(".")[1:], start=2):
        if not hasattr(found, part) and isinstance(found, ModuleType):
            importlib.import_module(".".join(name.split(".")[:count]))
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("page", EVERY_PAGE)
def test_what_a_page_names_exists(page):
    text = (ROOT / page).read_text()
    for name in sorted(set(DOTTED.findall(text)) - set(NAMES_NOTHING)):
        assert resolved(name) is not None, name
    for path in sorted(set(PATH.findall(text)) - set(NAMES_NOTHING)):
        assert (ROOT / path).exists(), path


def commands_named(line: str) -> list[click.Command]:
    """The commands that a line such as `kubernetes submit|status` means; none of plain words."""
    found: list[click.Command] = [launch.cli.evenstep]
    for word in line.split():
        groups = [each for each in found if isinstance(each, click.Group)]
        names = word.split("|")
        if not groups or not all(re.fullmatch(r"[a-z-]+", name) for name in names):
            break
        lacking = [name for group in groups for name in names if name not in group.commands]
        assert not lacking, f"evenstep {line}: there is no command {', '.join(lacking)}"
        found = [group.commands[name] for group in groups for name in names]
    return found


@pytest.mark.parametrize("page", EVERY_PAGE)
def test_every_command_and_option_that_a_page_names_exists(page):
    text = (ROOT / page).read_text()
    shown = [line for _, body in BLOCK.findall(text) for line in body.splitlines()]
    lines = [line for line in shown if re.match(r"(\$ )?(\w+=\S+ )*evenstep ", line)]
    lines += re.findall(r"`(evenstep [^`\n]+)`", BLOCK.sub("", text))
    for line in [found for each in lines for found in COMMAND.findall(each)]:
        for command in commands_named(line):
            known = {option for each in command.params for option in each.opts} | {"--help"}
            asked = set(re.findall(r"(?<!\S)--[a-z][\w-]*", line))
            assert asked <= known, f"evenstep {line}: there is no {', '.join(asked - known)}"


def test_a_name_that_is_nowhere_is_found():
    for name in ("service.spec.files.load_specs", "service.precision.multiply_in"):
        with pytest.raises(ImportError):
            resolved(name)
    with pytest.raises(AttributeError):
        resolved("service.spec.models.Spec.nothing")
    with pytest.raises(AssertionError, match="there is no command reprot"):
        commands_named("reprot runs/a")
