"""The address of runs in an object store, `s3://bucket/prefix`. Pure: no driver is imported."""

from __future__ import annotations

import re
from dataclasses import dataclass

from service.basics.errors import SpecError

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_LOCAL = ("file", "local")


@dataclass(frozen=True)
class Address:
    """Where objects are kept."""

    scheme: str
    """`s3`, `gs`, `az` or any other that fsspec has a driver for."""
    path: str
    """The bucket and the prefix, without a slash at either end."""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.path}"

    def __truediv__(self, name: str) -> Address:
        return Address(self.scheme, f"{self.path}/{name}")

    @property
    def parent(self) -> Address:
        """The address above: of a run, that of the runs."""
        return Address(self.scheme, self.path.rpartition("/")[0])

    @property
    def name(self) -> str:
        """Its last part: of a run, the name of the run."""
        return self.path.rpartition("/")[2]


def address_in(text: str) -> Address | None:
    """The address that a text is; None where it is the path of a directory.

    Raises:
        SpecError: it has the form of an address, but cannot be used as one.
    """
    match = _ADDRESS.fullmatch(text)
    if match is None and "://" not in text:
        return None
    if match is None:
        raise SpecError(f"{text!r}: is no address of objects. Write SCHEME://BUCKET/PREFIX.")
    scheme, path = match[1].lower(), match[2].strip("/")
    if "@" in path.partition("/")[0] and scheme not in ("abfs", "abfss"):
        raise SpecError(
            f"{scheme}://...@...: an address must not hold credentials, because run.json and the "
            "command line would show them. Give them by the variables or files of the driver."
        )
    if scheme in _LOCAL:
        raise SpecError(f"{text}: this is a directory. Write its path, without {scheme}://.")
    if not path:
        raise SpecError(f"{text}: names no bucket. Write {scheme}://BUCKET/PREFIX.")
    parts = path.split("/")
    if not path.isprintable() or any(part in ("", ".", "..") for part in parts):
        raise SpecError(
            f"{text!r}: is no address of objects. Write {scheme}://BUCKET/PREFIX, with no empty "
            "part, no `.` and no `..` in it."
        )
    return Address(scheme, path)
