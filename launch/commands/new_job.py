"""`evenstep new`: a directory with a task, a spec, and the schema for an editor."""

from __future__ import annotations

import json
import os.path
from importlib import resources
from pathlib import Path

from service.basics.errors import SpecError
from service.spec.files import spec_schema

TASK, SPEC, SCHEMA = "my_task.py", "my_job.yaml", "evenstep.schema.json"


def start(directory: Path) -> list[Path]:
    """Write the files into `directory`, which is created; existing files are not replaced.

    Raises:
        SpecError: one of the files exists, or the directory cannot be written.
    """
    shipped = resources.files("service.spec.starter")
    texts = {name: shipped.joinpath(name).read_text(encoding="utf-8") for name in (TASK, SPEC)}
    texts[SCHEMA] = json.dumps(spec_schema(), indent=1) + "\n"
    there = [name for name in texts if os.path.exists(directory / name)]
    if there:
        raise SpecError(
            f"{directory} already contains {', '.join(there)}. Choose another directory."
        )
    written: list[Path] = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            with (directory / name).open("x", encoding="utf-8") as file:
                written.append(directory / name)
                file.write(text)
    except OSError as error:
        for half in written:  # so that the same command works once there is room
            half.unlink(missing_ok=True)
        raise SpecError(f"{directory} cannot be written: {error.strerror}.") from error
    return [directory / name for name in texts]
