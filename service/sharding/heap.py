"""Main memory of a sharded run on CPUs: what is kept when it is freed, and what is returned.

New memory costs a page fault for every 4 KiB.  But memory that is
kept for one purpose is missing for another: in a backward pass activations are freed, and the
gradients of the own rows allocated.  And glibc keeps freed blocks between others, where no large
block has room.  So there are three kinds of blocks:

* Weights and the optimizer's state stay for the whole run.  They are allocated until the first
  update has ended, and outside glibc's heap (`return_blocks`).
* Gathered parameters and the blocks of an exchange are large, and of known size.  They are outside
  the heap too, in pages of 2 MiB, whose faults are nearly free, and are returned when they are
  released (`Pages`, `pages`).
* Activations and whole gradients come and go in the heap (`keep_blocks`).  `Heap.return_surplus`
  returns what is free in it when the process has become larger than it has to be.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

ON_LINUX = sys.platform == "linux"
LARGE_PAGE = 2 << 20

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # M_... of <malloc.h>
_RETURNED_BYTES = 1 << 17
_LARGEST_KEPT_BYTES = 1 << 25  # glibc accepts no more
_ADDED_BYTES = 1 << 26  # grow by more than a step needs, so that all of it is in large pages
_ANY = (1 << 31) - 1  # the largest int
_MADV_DONTNEED, _MADV_HUGEPAGE = 4, 14
_MADV_POPULATE_WRITE = 23  # since Linux 5.14; it keeps what is there

_libc = ctypes.CDLL(None, use_errno=True)
_mallopt = getattr(_libc, "mallopt", None)  # not in other C libraries
_malloc_trim = getattr(_libc, "malloc_trim", None)
_STATM, _MAPS = Path("/proc/self/statm"), Path("/proc/self/maps")


def return_blocks() -> None:
    """Let the C library return freed blocks of 128 KiB and more to the system.

    glibc starts with this limit, but raises it to the size of the largest freed block; then it
    keeps smaller blocks for itself, between other blocks: a process grew by 80 MiB in each of the
    first steps.
    """
    if _mallopt is not None:
        _mallopt(_MMAP_THRESHOLD, _RETURNED_BYTES)
        _mallopt(_TRIM_THRESHOLD, _RETURNED_BYTES)
        _mallopt(_TOP_PAD, _RETURNED_BYTES)


def keep_blocks() -> None:
    """Let the C library keep freed blocks of up to 32 MiB for later ones."""
    if _mallopt is not None:
        _mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES)
        _mallopt(_TRIM_THRESHOLD, _ANY)
        _mallopt(_TOP_PAD, _ADDED_BYTES)
        _enlarge_pages_of_heap()


class Pages:
    """A range of memory outside the heap, which can be returned to the system and used again.

    It begins at a page of 2 MiB, so that Linux can allocate it in such pages.
    """

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # shared memory has no large pages
        self._mapped = mmap.mmap(-1, size_bytes + LARGE_PAGE, flags=flags)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._mapped))
        self._skipped = -address % LARGE_PAGE
        self._begin = address + self._skipped
        self._accessible = True
        _advise(self._begin, size_bytes, _MADV_HUGEPAGE)

    def tensor(self, begin: int, numbers: int, *, dtype: torch.dtype) -> Tensor:
        """A tensor of so many numbers in this memory, from that byte on: [numbers]."""
        offset = self._skipped + begin
        return torch.frombuffer(self._mapped, dtype=dtype, count=numbers, offset=offset)

    def allow(self) -> None:
        """Allow access again after `give_back`."""
        if not self._accessible:
            self._protect(mmap.PROT_READ | mmap.PROT_WRITE)
            self._accessible = True

    def give_back(self) -> None:
        """Return the memory to the system; an access to it ends the process."""
        if self._accessible:
            _advise(self._begin, self._size_bytes, _MADV_DONTNEED)
            self._protect(0)
            self._accessible = False

    def _protect(self, access: int) -> None:
        begin, size_bytes = ctypes.c_void_p(self._begin), ctypes.c_size_t(self._size_bytes)
        if _libc.mprotect(begin, size_bytes, ctypes.c_int(access)):
            raise OSError(ctypes.get_errno(), f"mprotect: {os.strerror(ctypes.get_errno())}")


def populate(tensor: Tensor) -> bool:
    """Let Linux allocate the memory of a tensor now; false if this system cannot do that.

    100 MiB that are filled afterwards take 49 ms instead of 64, with a page fault at each first
    access.  In pages of 2 MiB they take 44 to 143 ms: where free memory is in small pieces, Linux
    moves other memory first.
    """
    begin = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    end = tensor.data_ptr() + tensor.nbytes
    return ON_LINUX and begin < end and _advise(begin, end - begin, _MADV_POPULATE_WRITE)


def pages(size: Sequence[int], *, dtype: torch.dtype) -> Tensor:
    """A tensor without values, in `Pages` if it is large; returned with its last use."""
    numbers = math.prod(size)
    if numbers * dtype.itemsize < LARGE_PAGE or not ON_LINUX:
        return torch.empty(*size, dtype=dtype)
    return Pages(numbers * dtype.itemsize).tensor(0, numbers, dtype=dtype).view(*size)


def discard(tensor: Tensor) -> None:
    """Return the memory of a tensor of `pages` before its last use; its values are lost."""
    if tensor.nbytes >= LARGE_PAGE and ON_LINUX:
        _advise(tensor.data_ptr(), tensor.nbytes, _MADV_DONTNEED)  # with the rest of its last page


class Heap:
    """The heap of this process."""

    def __init__(self) -> None:
        self._needed_bytes = 0

    def return_surplus(self, coming_bytes: int) -> None:
        """Return freed memory if the process would become larger than ever after doing that.

        Args:
            coming_bytes: of `Pages` that are needed now.
        """
        if _malloc_trim is None or not _STATM.exists():
            return
        if _resident_bytes() + coming_bytes <= self._needed_bytes:
            return
        _malloc_trim(0)
        _enlarge_pages_of_heap()
        self._needed_bytes = max(self._needed_bytes, _resident_bytes() + coming_bytes)


def _resident_bytes() -> int:
    return int(_STATM.read_text().split()[1]) * mmap.PAGESIZE


def _enlarge_pages_of_heap() -> None:
    """Let Linux allocate the heap of the main thread, as far as it reaches, in pages of 2 MiB."""
    begin = _begin_of_heap()
    if begin is not None:
        _libc.sbrk.restype = ctypes.c_size_t
        end = _libc.sbrk(ctypes.c_ssize_t(0)) // LARGE_PAGE * LARGE_PAGE
        if begin < end:
            _advise(begin, end - begin, _MADV_HUGEPAGE)


@cache
def _begin_of_heap() -> int | None:
    """The address of its first page of 2 MiB; None if this system does not tell."""
    for line in _MAPS.read_text().splitlines() if _MAPS.exists() else ():
        if line.endswith("[heap]"):
            return -(-int(line.split("-")[0], base=16) // LARGE_PAGE) * LARGE_PAGE
    return None


def _advise(begin: int, size_bytes: int, advice: int) -> bool:
    """Give Linux an advice about memory; one that it does not know has no effect: false."""
    size = ctypes.c_size_t(size_bytes)
    return bool(_libc.madvise(ctypes.c_void_p(begin), size, ctypes.c_int(advice)) == 0)
