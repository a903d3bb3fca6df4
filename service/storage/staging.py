"""The files of a run as they are at one moment, held by links while they are uploaded.

A checkpoint that the run removes meanwhile, or a file that it replaces, stays readable: so of a run
that saves faster than it uploads, one more checkpoint is on disk than it keeps.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from service.basics.atomic_files import remove
from service.runs.checkpoint_files import BEST, MANIFEST, checkpoints_in
from service.runs.directory import RunDirectory
from service.storage.published import CHECKPOINTS

_OF_OTHERS = ("wandb", CHECKPOINTS)
"""Directories of a run that are not walked: W&B uploads its own; checkpoints are added whole."""
_LINES = ".jsonl"
_TAIL_BYTES = 1 << 20


@dataclass(frozen=True)
class Staged:
    """One file, which is not changed before the staging directory is."""

    path: str
    """In the directory of the run, with slashes."""
    file: Path
    size_bytes: int
    """Up to the end of its last whole line, where it is a file of lines."""
    identity: tuple[int, int, int]
    """The same for a file that has not changed."""

    @property
    def grows(self) -> bool:
        """Whether it is only appended to, as long as it is the same file."""
        return self.path.endswith((_LINES, ".log"))


class Staging:
    """A directory beside that of the run, on the same file system."""

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        self._place = run.path.with_name(f".{run.name}.uploading")

    def clear(self) -> None:
        """Let go what is held."""
        remove(self._place)

    def checkpoints(self) -> dict[str, list[Staged]]:
        """The files of each complete checkpoint, by its name; all exist at the same time."""
        while True:
            try:
                found = [each.path for each in checkpoints_in(self._run.checkpoints)]
                return {path.name: self._whole(path) for path in found}
            except FileNotFoundError:
                continue  # one was removed, so there is a newer one: hold that

    def best(self) -> str | None:
        """The content of the file that names the best checkpoint."""
        try:
            return (self._run.checkpoints / BEST).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def others(self) -> Iterator[Staged]:
        """All other files."""
        for directory, names, files in os.walk(self._run.path):
            is_root = directory == str(self._run.path)
            names[:] = [n for n in names if n[:1] != "." and not (is_root and n in _OF_OTHERS)]
            for name in files:
                if name[:1] != ".":
                    try:
                        held = self._held(Path(directory, name))
                    except FileNotFoundError:
                        continue  # it was there for a moment only
                    if held is not None:
                        yield held

    def _whole(self, path: Path) -> list[Staged]:
        # The manifest first: it tells whether this is the checkpoint that is already up.
        names = sorted(os.listdir(path), key=lambda name: name != MANIFEST)
        held = (self._held(path / name) for name in names if name[:1] != ".")
        return [each for each in held if each is not None]

    def _held(self, file: Path) -> Staged | None:
        """A link to the file; None where it is no plain file."""
        told = os.lstat(file)
        if not stat.S_ISREG(told.st_mode):
            return None
        path = file.relative_to(self._run.path).as_posix()
        link = self._place / path
        link.parent.mkdir(parents=True, exist_ok=True)
        try:
            link.unlink(missing_ok=True)
            os.link(file, link)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EXDEV, errno.ENOTSUP, errno.EMLINK):
                raise
            link = file  # a file system without links: it may vanish, and is then staged again
        told = os.stat(link)
        size = _up_to_a_line(link, told.st_size) if path.endswith(_LINES) else told.st_size
        return Staged(path, link, size, (told.st_ino, told.st_size, told.st_mtime_ns))


def _up_to_a_line(file: Path, size: int) -> int:
    """Where the last whole line ends: the rest may be a line that is just being written."""
    begin = max(0, size - _TAIL_BYTES)
    with file.open("rb") as opened:
        opened.seek(begin)
        return begin + opened.read(size - begin).rfind(b"\n") + 1
