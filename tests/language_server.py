"""A real yaml-language-server, spoken to as an editor does: JSON-RPC over its standard input."""

from __future__ import annotations

import json
import select
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
from commands import ROOT

_OURS = ROOT / ".venv/node/node_modules/.bin/yaml-language-server"
SERVER = str(_OURS) if _OURS.exists() else shutil.which("yaml-language-server")
needs_language_server = pytest.mark.skipif(
    SERVER is None,
    reason="no yaml-language-server; `npm install --prefix .venv/node yaml-language-server`",
)
SETTINGS = {
    "yaml": {"validate": True, "completion": True, "hover": True, "schemaStore": {"enable": False}}
}


class Editor:
    """One session with the server, in a directory of files."""

    def __init__(self, directory: Path) -> None:
        assert SERVER is not None
        self._directory = directory
        self._process = subprocess.Popen(
            [SERVER, "--stdio"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._said = b""
        self._number = 0
        self._versions: dict[str, int] = {}
        self.ask(
            "initialize", processId=None, rootUri=directory.as_uri(), capabilities=CAPABILITIES
        )
        self._send(method="initialized", params={})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def open(self, name: str, text: str) -> list[dict[str, Any]]:
        """What the server finds wrong in a file of this name with this text."""
        uri = (self._directory / name).as_uri()
        document = {"uri": uri, "languageId": "yaml", "version": 1, "text": text}
        self._send(method="textDocument/didOpen", params={"textDocument": document})
        while True:
            message = self._next()
            params = message.get("params", {})
            if message.get("method") == "textDocument/publishDiagnostics" and params["uri"] == uri:
                return list(params["diagnostics"])

    def at(self, what: str, name: str, line: int, column: int) -> Any:
        """`completion` or `hover` at a place counted from 0."""
        return self.ask(
            f"textDocument/{what}",
            textDocument={"uri": (self._directory / name).as_uri()},
            position={"line": line, "character": column},
        )

    def ask(self, method: str, **params: Any) -> Any:
        self._number += 1
        self._send(id=self._number, method=method, params=params)
        while True:
            message = self._next()
            if message.get("id") == self._number and "method" not in message:
                assert "error" not in message, message
                return message["result"]

    def _next(self) -> dict[str, Any]:
        """The next message that is not the server's own question, which is answered."""
        while True:
            message = self._read()
            if "id" not in message or "method" not in message:
                return message
            items = message.get("params", {}).get("items", [])
            answer = [SETTINGS.get(item.get("section")) for item in items] or None
            self._send(id=message["id"], result=answer)

    def _send(self, **message: Any) -> None:
        body = json.dumps({"jsonrpc": "2.0", **message}).encode()
        assert self._process.stdin is not None
        self._process.stdin.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)
        self._process.stdin.flush()

    def _read(self) -> dict[str, Any]:
        head = self._until(lambda: self._said.find(b"\r\n\r\n") + 4)
        length = int(head.split(b"Content-Length: ")[1].split(b"\r\n")[0])
        message: dict[str, Any] = json.loads(
            self._until(lambda: length if len(self._said) >= length else 3)
        )
        return message

    def _until(self, length: Any) -> bytes:
        """The first bytes said, once `length` knows how many (more than 3) they are."""
        deadline = time.monotonic() + 60
        assert self._process.stdout is not None
        while (count := length()) <= 3:
            ready, _, _ = select.select([self._process.stdout], [], [], deadline - time.monotonic())
            assert ready, "the language server said nothing for a minute"
            more = self._process.stdout.read1(1 << 16)  # type: ignore[union-attr]
            assert more, "the language server ended"
            self._said += more
        said, self._said = self._said[:count], self._said[count:]
        return said


CAPABILITIES: dict[str, Any] = {
    "textDocument": {
        "completion": {"completionItem": {"documentationFormat": ["markdown"]}},
        "hover": {"contentFormat": ["markdown"]},
        "publishDiagnostics": {},
    },
    "workspace": {"configuration": True},
}
