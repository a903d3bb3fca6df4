"""WebDataset shards: tar files, in which members with one name before the first dot are one row."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Sequence
from typing import Any

from service.basics.errors import DataBroken, SpecError
from service.remote.cache import Held
from service.remote.files import File, Files, found
from service.remote.parts import Part

# As in webdataset: the name of the row ends at the first dot of the last part of the path.
_NAME = re.compile(r"((?:.*/|)[^./][^./]*)\.([^/]+)")
_BLOCK = 512  # a complete tar file ends with at least one of zeros
_COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst")


class Tar:
    """The shards of a WebDataset; each is one part."""

    def __init__(self, files: Files, names: Sequence[str], columns: Sequence[str] | None) -> None:
        self._files = files
        self._names = names
        self._columns = columns

    def files(self) -> Sequence[File]:
        for name in self._names:
            if name.endswith(_COMPRESSED):
                raise SpecError(
                    f"{self._files.told(name)}: a compressed tar file has no positions to go on "
                    "from. Decompress it; images and most other content do not get smaller."
                )
        return found(self._files, self._names, ending=".tar")

    def parts(self, file: File) -> int:
        return 1

    def read(self, file: File, part: int) -> Part:
        held = self._files.hold(file)
        try:
            return _Shard(held, self._index(held, file))
        except BaseException:
            held.close()
            raise

    def _index(self, held: Held, file: File) -> list[tuple[str, dict[str, tuple[int, int]]]]:
        """Of each row its key, and of each of its members the offset and the size."""
        rows: list[tuple[str, dict[str, tuple[int, int]]]] = []
        try:
            with (
                open(held.descriptor, "rb", closefd=False) as opened,
                tarfile.open(fileobj=opened, mode="r:") as members,
            ):
                while (member := members.next()) is not None:
                    members.members = []  # type: ignore[attr-defined]  # or it keeps all of them
                    match = _NAME.fullmatch(member.name) if member.isreg() else None
                    if match is None:
                        continue
                    key, ending = match[1], match[2].lower()
                    if not rows or rows[-1][0] != key:
                        rows.append((key, {}))
                    if ending in rows[-1][1]:
                        raise DataBroken(
                            f"{self._files.told(file.name)}: {member.name} occurs twice in one "
                            "row. Write the shard again."
                        )
                    rows[-1][1][ending] = member.offset_data, member.size
        except tarfile.TarError as error:
            raise self._incomplete(file, str(error)) from error
        if held.read(file.size - _BLOCK, _BLOCK) != bytes(_BLOCK):
            raise self._incomplete(file, "its end is missing")
        return rows if self._columns is None else [self._chosen(row, file) for row in rows]

    def _incomplete(self, file: File, why: str) -> DataBroken:
        told = self._files.told(file.name)
        return DataBroken(f"{told}: is no complete tar file: {why}. Upload it again.")

    def _chosen(
        self, row: tuple[str, dict[str, tuple[int, int]]], file: File
    ) -> tuple[str, dict[str, tuple[int, int]]]:
        key, members = row
        assert self._columns is not None
        missing = [name for name in self._columns if name not in members]
        if missing:
            raise DataBroken(
                f"{self._files.told(file.name)}: the row {key} has no {', '.join(missing)}; it has "
                f"{', '.join(sorted(members))}."
            )
        return key, {name: members[name] for name in self._columns}


class _Shard:
    def __init__(self, held: Held, rows: list[tuple[str, dict[str, tuple[int, int]]]]) -> None:
        self._held = held
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> dict[str, Any]:
        key, members = self._rows[index]
        return {"__key__": key} | {
            name: self._held.read(offset, size) for name, (offset, size) in members.items()
        }

    def close(self) -> None:
        self._held.close()
