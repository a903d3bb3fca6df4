"""Failure reports: one JSON file for each failed process, without secrets."""

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

from service.basics.atomic_files import make_directory, read_json, replace_unsynced, told_of
from service.basics.secret_names import is_secret_name

# Keys with a known format: of AWS, GitHub, GitLab, Hugging Face, OpenAI and
# similar services, Slack and Google; a signed web token; a private key.
_KEY = re.compile(
    r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bgh[opsur]_[A-Za-z0-9]{36,}|\bgithub_pat_\w{22,}"
    r"|\bglpat-[\w-]{20,}|\bhf_[A-Za-z0-9]{30,}|\bsk-[\w-]{20,}|\bxox[abprs]-[A-Za-z0-9-]{10,}"
    r"|\bAIza[\w-]{35}|\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{5,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
)
# In code: a text that is assigned to a name that looks like a secret.
_ASSIGNED = re.compile(
    r"""(\w*(?:key|token|secret|passw(?:or)?d|passphrase|credential|_pass|_pwd|_pat|auth)\w*"""
    r"""["']?\]?\s*(?::\s*\w+\s*)?[:=]\s*)(["'])([^"'\n]{8,})\2""",
    re.IGNORECASE,
)
_LOOKS_LIKE_A_KEY = re.compile(r"(?=.*\d)(?=.*[A-Za-z])[\w+/=.-]{20,}")
_IN_AN_ADDRESS = re.compile(r"(\w+://)[^/\s:@]*:[^/\s@]+@")
LARGEST_REPORT_BYTES = 4 << 20
_SHORTEST = 8  # characters; shorter ones would redact harmless text
_NO_WORD = 16  # a text of this length does not occur by chance


def redacted(value: Any, environ: Mapping[str, str] = os.environ) -> Any:
    """The value with every secret in its texts replaced by `***`.

    Secrets are the values of environment variables with such names (WANDB_API_KEY), the user and
    password in a URL, and keys with a known format.
    """
    if isinstance(value, str):
        for secret in _secrets(environ):
            value = value.replace(secret, "***")
        return _KEY.sub("***", _IN_AN_ADDRESS.sub(r"\1***@", value))
    if isinstance(value, dict):
        return {key: redacted(inner, environ) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(inner, environ) for inner in value]
    return value


def is_secret(text: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the text is a secret or contains a long one, a key, or a URL with a password."""
    for secret in _secrets(environ):
        if text == secret or (len(secret) >= _NO_WORD and secret in text):
            return True
    return bool(_IN_AN_ADDRESS.search(text) or _KEY.search(text))


def redacted_code(text: str) -> str:
    """The same for code or a diff, in which texts assigned to names of secrets are redacted too."""
    return _ASSIGNED.sub(r"\1\2***\2", str(redacted(text)))


def line_of_secret(code: str) -> int | None:
    """The number, from 1, of the first line of code with an apparent secret."""
    for number, line in enumerate(code.splitlines(), start=1):
        given = [found[3] for found in _ASSIGNED.finditer(line)]
        if is_secret(line) or any(map(_LOOKS_LIKE_A_KEY.fullmatch, given)):
            return number
    return None


def _secrets(environ: Mapping[str, str]) -> list[str]:
    found = [v for k, v in environ.items() if len(v) >= _SHORTEST and is_secret_name(k)]
    return sorted(found, key=len, reverse=True)  # one may contain another


def write_failure(directory: Path, report: Mapping[str, Any]) -> Path | None:
    """Write `<time>-rank-N.json`, completely or not at all; return its path.

    If it cannot be written, only a warning is printed: the process ends because of the failure
    itself.
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
    directory.parent.mkdir(parents=True, exist_ok=True)
    make_directory(directory)
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    path = directory / f"{stamp}-rank-{report['rank']}.json"
    if path.exists():
        path = path.with_stem(f"{path.stem}-{secrets.token_hex(2)}")
    replace_unsynced(path, json.dumps(redacted(dict(report)), indent=1) + "\n")
    return path


def read_failures(directory: Path) -> Iterator[dict[str, Any]]:
    """Every report in the directory, the earliest first; unreadable ones are skipped."""
    try:
        paths = sorted(directory.glob("*.json"))
    except OSError:  # the storage does not answer: the watchdog must go on all the same
        return
    for path in paths:
        try:
            report = read_json(path, at_most=LARGEST_REPORT_BYTES)
        except (OSError, ValueError):
            continue
        if isinstance(report, dict):
            yield report
