"""The files of a run as they are at one moment, held by links while they are uploaded.

A checkpoint that the run removes meanwhile, or a file that it replaces, stays readable: so of a run
that saves faster than it uploads, one more checkpoint is on disk than it keeps.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from service.basics.atomic_files import remove
from service.runs.checkpoint_files import BEST, MANIFEST, Checkpoint, checkpoints_in
from service.runs.directory import RunDirectory
from service.storage.published import CHECKPOINTS, is_sound

_OF_OTHERS = ("wandb", CHECKPOINTS)
"""Directories of a run that are not walked: W&B uploads its own; checkpoints are added whole."""
_WITHOUT_LINKS = (errno.EPERM, errno.EXDEV, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
_LINES = ".jsonl"
_TAIL_BYTES = 1 << 20


@dataclass(frozen=True)
class Staged:
    """One file, which is not changed before the staging directory is."""

    path: str
    """In the directory of the run, with slashes."""
    file: Path
    size_bytes: int
    """Up to the end of its last whole line, where the run writes it line by line."""
    identity: tuple[int, int, int]
    """The same for a file that has not changed."""

    @property
    def grows(self) -> bool:
        """Whether it is only appended to, as long as it is the same file."""
        return self.path.endswith((_LINES, ".log"))


class Staging:
    """A directory beside that of the run, on the same file system."""

    def __init__(
        self, run: RunDirectory, *, longest_bytes: int, say: Callable[[str], None]
    ) -> None:
        """`longest_bytes`: of the path of a file, that a store can have in a name."""
        self._run = run
        self._longest_bytes = longest_bytes
        self._say = say
        self._refused: set[str] = set()
        self._place = run.path.with_name(f".{run.name}.uploading")
        self._written = (run.metrics.name, run.receipt.name)
        """Files of lines that the run appends to while they are read."""

    def clear(self) -> None:
        """Let go what is held."""
        remove(self._place)

    def manifests(self) -> dict[Checkpoint, bytes]:
        """The manifest of each complete checkpoint, the newest first."""
        found = {}
        for each in reversed(checkpoints_in(self._run.checkpoints)):
            try:
                found[each] = (each.path / MANIFEST).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                # The run has just removed it, or somebody has: it is no checkpoint then.
                continue
        return found

    def checkpoint(self, path: Path) -> list[Staged]:
        """The files of a checkpoint.

        Raises:
            FileNotFoundError: the run has removed it meanwhile.
        """
        held = [self._held(path / name) for name in sorted(os.listdir(path)) if name[:1] != "."]
        return [each for each in held if each is not None]

    def best(self) -> str | None:
        """The content of the file that names the best checkpoint."""
        try:
            return (self._run.checkpoints / BEST).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def others(self) -> list[Staged]:
        """All other files."""
        return list(self._others())

    def place(self) -> tuple[int, int]:
        """The identity of the directory of the run, which `--fresh` replaces."""
        told = os.stat(self._run.path)
        return told.st_dev, told.st_ino

    def _others(self) -> Iterator[Staged]:
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

    def _held(self, file: Path) -> Staged | None:
        """A link to the file; None where it is no plain file, or has a name for no store."""
        path = file.relative_to(self._run.path).as_posix()
        if not is_sound(path) or len(path.encode()) > self._longest_bytes:
            if path not in self._refused:
                self._refused.add(path)
                self._say(f"WARNING: {str(file)!a} is not uploaded: rename it.")
            return None
        if not stat.S_ISREG(os.lstat(file).st_mode):
            return None
        link = self._place / path
        link.parent.mkdir(parents=True, exist_ok=True)
        try:
            link.unlink(missing_ok=True)
            os.link(file, link)
        except OSError as error:
            if error.errno not in _WITHOUT_LINKS:
                raise
            link = file  # a file system without links: it may vanish, and is then staged again
        told = os.stat(link)
        size = _up_to_a_line(link, told.st_size) if path in self._written else told.st_size
        return Staged(path, link, size, (told.st_ino, told.st_size, told.st_mtime_ns))


def _up_to_a_line(file: Path, size: int) -> int:
    """Where the last whole line ends: the rest may be a line that is just being written."""
    begin = max(0, size - _TAIL_BYTES)
    with file.open("rb") as opened:
        opened.seek(begin)
        return begin + opened.read(size - begin).rfind(b"\n") + 1
