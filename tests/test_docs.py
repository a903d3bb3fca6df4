"""The pages in docs/: every command that they show is run, in the files that they show.

A block marked `console` holds commands after `$ `; what follows them is a sample of what they say.
A comment such as `# ends with 75` names the exit codes. A block after a line such as "`a.py`:" is
that file.
"""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from contextlib import contextmanager

import pytest
from commands import BIN, CLEAN, DEADLINE_SECONDS, ROOT, command, evenstep
from stores import s3_server

from service.observability.other_writers import _PACKAGES

PAGES = sorted(path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md"))
FILE = re.compile(r"^`([\w./-]+)`:\n\n```\w+\n(.*?)^```$", re.DOTALL | re.MULTILINE)
CONSOLE = re.compile(r"^```console\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def commands_of(text):
    """(words, allowed exit codes) of every command shown, in order."""
    for block in CONSOLE.findall(text):
        for line in re.findall(r"^\$ (.*)$", block, re.MULTILINE):
            words, _, comment = line.partition("#")
            codes = re.findall(r"\d+", comment) if comment.strip().startswith("ends") else ["0"]
            yield shlex.split(words), {int(code) for code in codes}


WITH_COMMANDS = [  # the transcript has a test of its own
    page
    for page in PAGES
    if "```console" in (text := (ROOT / "docs" / page).read_text()) and "transcript.py" not in text
]


@pytest.mark.parametrize("page", WITH_COMMANDS)
def test_every_command_of_a_page_works(page, tmp_path):
    text = (ROOT / "docs" / page).read_text()
    with variables_for(text, tmp_path) as variables:
        require_that_commands_work(text, tmp_path, variables)


@contextmanager
def variables_for(text, directory):
    """What the commands of a page find: an S3 server with the bucket my-bucket, if they use it."""
    if not any("s3://my-bucket" in word for words, _ in commands_of(text) for word in words):
        yield {}
        return
    for package in ("moto", "s3fs"):
        pytest.importorskip(package, reason="needs moto, flask, flask-cors and s3fs")
    with s3_server("my-bucket") as server:
        yield server.variables | {"EVENSTEP_SCRATCH": str(directory / "scratch")}


def require_that_commands_work(text, tmp_path, variables):
    for name, content in FILE.findall(text):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    for words, codes in commands_of(text):
        found = sys.executable if words[0] == "python" else BIN / words[0]
        found = found if os.path.exists(found) else words[0]
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        environ = variables | {"PATH": path}
        done = command(found, *words[1:], cwd=tmp_path, timeout=DEADLINE_SECONDS, **environ)
        assert done.returncode in codes, (words, done.stdout[-2000:], done.stderr[-2000:])


def test_the_pages_with_commands_are_found():
    assert {"how-to/watching.md", "tutorial/own-data.md", "how-to/moving.md"} <= set(WITH_COMMANDS)


def test_the_page_of_the_spec_is_that_of_the_schema(tmp_path):
    done = evenstep("schema", "--page", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (ROOT / "docs/reference/spec.md").read_text(), (
        "evenstep schema --page > docs/reference/spec.md"
    )


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / "docs" / page).read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (ROOT / "docs" / page).parent.joinpath(target).exists(), target


def test_extras_that_are_named_exist():
    """In pages, in messages, and where the project's own extras name each other."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    named = {extra for *_, extra in _PACKAGES}
    files = [
        ROOT / name for name in ("README.md", "CONTRIBUTING.md", "Dockerfile", "pyproject.toml")
    ]
    for folder, kind in (
        ("docs", "*.md"),
        ("service", "*.py"),
        ("launch", "*.py"),
        ("k8s", "*.md"),
    ):
        files += (ROOT / folder).rglob(kind)
    for path in files:
        for group in re.findall(r"evenstep\[([a-z0-9,]+)\]", path.read_text()):
            named.update(group.split(","))
    assert "otel" in named
    assert named <= set(extras), named - set(extras)


def test_the_site_builds_and_asks_no_network(tmp_path):
    """Every link and anchor leads somewhere, and a page loads nothing from elsewhere."""
    pytest.importorskip("mkdocs", reason="pip install 'evenstep[docs]'")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        env=CLEAN | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(PAGES)
    for page in pages:
        text = page.read_text()
        loaded = re.findall(r'<(?:script|img|link)\b[^>]*?(?:src|href)="(https?:[^"]+)', text)
        assert not [url for url in loaded if "canonical" not in url], page
