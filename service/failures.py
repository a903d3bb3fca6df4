"""Failure reports: one JSON file for each process that failed, with nothing secret in it."""

from __future__ import annotations

import json
import os
import re
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from service.durable import told_of

_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
# The place where a secret lies is none, and a spec may well name it.
_NAMES_A_PLACE = re.compile(r"_(FILE|PATH|DIR)$|^GOOGLE_APPLICATION_CREDENTIALS$", re.IGNORECASE)
_IN_AN_ADDRESS = re.compile(r"(\w+://)[^/\s:@]*:[^/\s@]+@")
_SHORTEST = 8  # characters; what is shorter would blank out innocent text
_NO_WORD = 16  # as long as this, it stands in no innocent text by chance


def redacted(value: Any, environ: Mapping[str, str] = os.environ) -> Any:
    """The value with every secret in its texts replaced by `***`.

    Secret is what an environment variable with a telling name holds (WANDB_API_KEY), and the
    user and password of an address.
    """
    if isinstance(value, str):
        for secret in _secrets(environ):
            value = value.replace(secret, "***")
        return _IN_AN_ADDRESS.sub(r"\1***@", value)
    if isinstance(value, dict):
        return {key: redacted(inner, environ) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(inner, environ) for inner in value]
    return value


def is_secret(text: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the text is one or holds a long one, or it is an address with a password."""
    for secret in _secrets(environ):
        if text == secret or (len(secret) >= _NO_WORD and secret in text):
            return True
    return _IN_AN_ADDRESS.search(text) is not None


def _secrets(environ: Mapping[str, str]) -> list[str]:
    named = {k: v for k, v in environ.items() if _SECRET_NAME.search(k)}
    found = [v for k, v in named.items() if len(v) >= _SHORTEST and not _NAMES_A_PLACE.search(k)]
    return sorted(found, key=len, reverse=True)  # one may hold another


def write_failure(directory: Path, report: Mapping[str, Any]) -> Path | None:
    """Write `<time>-rank-N.json`, whole or not at all; returns where it lies.

    Where there is no room for it that is said, and no more: it is the failure itself that ends
    the process.
    """
    try:
        return _written(directory, report)
    except OSError as error:
        print(
            f"WARNING: the report of a failure is lost: {told_of(directory, error)}",
            file=sys.stderr,
            flush=True,
        )
        return None


def _written(directory: Path, report: Mapping[str, Any]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    path = directory / f"{stamp}-rank-{report['rank']}.json"
    if path.exists():
        path = path.with_stem(f"{path.stem}-{secrets.token_hex(2)}")
    partial = directory / f".{path.name}.partial"
    partial.write_text(json.dumps(redacted(dict(report)), indent=1) + "\n")
    os.replace(partial, path)
    return path


def read_failures(directory: Path) -> Iterator[dict[str, Any]]:
    """Every report in the directory, the earliest first."""
    for path in sorted(directory.glob("*.json")):
        yield json.loads(path.read_text())
