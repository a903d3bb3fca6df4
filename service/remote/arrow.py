"""Data sets of the `datasets` library, as `save_to_disk` writes them: Arrow files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from service.basics.errors import DataBroken, SpecError, did_you_mean
from service.remote.cache import Held
from service.remote.files import File, Files, found
from service.remote.parts import Part

_STATE, _SPLITS = "state.json", "dataset_dict.json"


class Arrow:
    """The Arrow files of a saved data set; each is one part.

    The library decodes the rows, with numbers as numpy's, so its features (images, audio) work.
    """

    def __init__(self, files: Files, names: Sequence[str], columns: Sequence[str] | None) -> None:
        self._files = files
        self._names = [name.removesuffix(f"/{_STATE}") for name in names]
        self._columns = columns

    def files(self) -> Sequence[File]:
        return [file for name in self._names for file in self._saved(name)]

    def parts(self, file: File) -> int:
        return 1

    def read(self, file: File, part: int) -> Part:
        from datasets import Dataset

        held = self._files.hold(file)
        try:
            data = Dataset.from_file(str(held.path))
            for name in self._columns or ():
                if name not in data.column_names:
                    raise SpecError(
                        f"{self._files.told(file.name)}: has no column "
                        f"{name!r}{did_you_mean(name, data.column_names)}"
                    )
            chosen = list(self._columns) if self._columns is not None else None
            return _Rows(held, data.with_format("numpy", columns=chosen))
        except (OSError, ValueError) as error:
            held.close()
            raise DataBroken(
                f"{self._files.told(file.name)}: cannot be read as an Arrow file of `datasets`: "
                f"{error}. Save the data set again."
            ) from error
        except BaseException:
            held.close()
            raise

    def _saved(self, directory: str) -> list[File]:
        """The files of a saved data set, in the order in which it reads them."""
        told = self._files.told(directory)
        listed = {file.name: file for file in self._files.below(directory)}
        if f"{directory}/{_SPLITS}" in listed:
            splits = sorted({name[len(directory) + 1 :].split("/")[0] for name in listed})
            splits.remove(_SPLITS)
            raise SpecError(
                f"{told}: has the splits {', '.join(splits)}. Give the address of one of them, "
                f"such as {told}/{splits[0]}."
            )
        state = found(self._files, [f"{directory}/{_STATE}"], ending=None)[0]
        try:
            content = json.loads(self._files.read(state, 0, state.size))
            names = [f"{directory}/{each['filename']}" for each in content["_data_files"]]
        except (ValueError, KeyError, TypeError) as error:
            raise DataBroken(
                f"{told}/{_STATE}: cannot be read: {type(error).__name__}: {error}. Save the data "
                "set again."
            ) from error
        missing = [name for name in names if name not in listed]
        if missing:
            raise DataBroken(
                f"{self._files.told(missing[0])}: is not there, but {_STATE} names it. Upload the "
                "data set again."
            )
        return [listed[name] for name in names]


class _Rows:
    def __init__(self, held: Held, data: Any) -> None:
        self._held = held
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def row(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = self._data[index]
        return row

    def close(self) -> None:
        self._data = None
        self._held.close()
