"""Small file systems of their own, for what happens when a disk is full."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted(place: Path, size: str) -> Iterator[Path]:
    """A file system of that size at `place`, which is made; skips the test where none can be.

    It is full when its pages are: the last one of a file takes up to a page of rows all the same.
    """
    if resource.getpagesize() > 4096:
        pytest.skip("the sizes of small file systems are meant for pages of 4 KiB")
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("only root may mount a small file system")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)
