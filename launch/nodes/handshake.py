"""How two nodes prove to each other that they know the same secret. No torch.

Node 0 first sends a challenge that it never uses again; the new node answers with its
own nonce. A key for this connection is derived from both and the secret, and every later message
is numbered and authenticated with it (HMAC-SHA256). So a recorded answer cannot be reused,
and without the secret nobody can act as a node, or as node 0.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import socket
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

from service.basics.errors import printable
from service.runs.directory import versions

LINE_BYTES = 4096
_TOKEN_BYTES = 16
_PURPOSE = b"evenstep meeting 1"
_LONGEST_HOST = 100


class Unauthenticated(Exception):
    """A message on a connection does not come from a node of this job."""


class OtherVersion(Exception):
    """A node that knows the secret has sent what this version does not understand."""

    def __init__(self, seal: Seal) -> None:
        super().__init__()
        self.seal = seal


@cache
def _own_version() -> str:
    return versions().get("evenstep", "")


@cache
def _this_launcher() -> str:
    host = socket.gethostname()[:_LONGEST_HOST]
    return f"process {os.getpid()} on {host} {secrets.token_hex(4)}"


def launcher_in_words(launcher: str) -> str:
    """The process and the machine of the launcher that sent a request."""
    return printable(launcher.rpartition(" ")[0])


@dataclass(frozen=True)
class JoinRequest:
    """The configuration that a node sends: all but index, generation and launcher must be equal."""

    index: int
    nodes: int
    processes: int
    spec: str
    """A digest."""
    least: int = 0
    """The smallest number of nodes with which the job runs; 0: all of them."""
    generation: int = 0
    """The last generation that it belonged to. It may differ between nodes."""
    runs: str = ""
    """A digest of the address of the runs in a store; empty: they are in a directory."""
    options: str = ""
    """What the command was given besides the spec, as far as it must be equal."""
    launcher: str = field(default_factory=_this_launcher)
    """The launcher that sends it, in words and with a number that no other has."""
    version: str = field(default_factory=_own_version)
    """Of evenstep."""

    @property
    def is_elastic(self) -> bool:
        """Whether the job also runs with fewer nodes."""
        return self.least > 0

    @property
    def range(self) -> str:
        """The numbers of nodes with which the job runs, as torchrun writes them."""
        return f"{self.least}:{self.nodes}" if self.is_elastic else str(self.nodes)


class Lines:
    """Assembles lines from received pieces, with a limit on the length of a line."""

    def __init__(self) -> None:
        self._rest = b""

    def fed(self, piece: bytes) -> list[bytes]:
        """The lines that this piece completes.

        Raises:
            Unauthenticated: a line is longer than any valid one.
        """
        *lines, self._rest = (self._rest + piece).split(b"\n")
        if max(map(len, [*lines, self._rest])) > LINE_BYTES:
            raise Unauthenticated("a line too long")
        return lines


class Seal:
    """Numbers and authenticates the messages of one connection, separately in each direction."""

    def __init__(self, key: bytes, *, own: str, other: str) -> None:
        self._key = key
        self._own, self._other = own, other
        self._said = self._heard = 0

    def sealed(self, message: dict[str, Any], **beside: str) -> bytes:
        """The message as a line; `beside` is what the other end needs before it has the key."""
        text = json.dumps(message)
        proof = self._proof(self._own, self._said, text)
        self._said += 1
        return _line({"said": text, "proof": proof, **beside})

    def opened(self, line: bytes) -> dict[str, Any]:
        """The message.

        Raises:
            Unauthenticated: it is not the next message of the other end, with a code of this key.
        """
        told = _told(line)
        text, proof = _text(told, "said"), _text(told, "proof")
        expected = self._proof(self._other, self._heard, text)
        if not hmac.compare_digest(proof.encode(), expected.encode()):
            raise Unauthenticated("no proof")
        self._heard += 1
        return _told(text.encode())

    def _proof(self, who: str, number: int, text: str) -> str:
        return hmac.digest(self._key, f"{who} {number} {text}".encode(), "sha256").hex()


class Authenticator:
    """Node 0's side of the authentication of a node."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._challenge = secrets.token_hex(_TOKEN_BYTES)

    def challenge(self) -> bytes:
        """The first message of node 0."""
        return _line({"challenge": self._challenge})

    def authenticated(self, line: bytes) -> tuple[JoinRequest, Seal]:
        """The node that has answered.

        Raises:
            Unauthenticated: it does not know the secret.
            OtherVersion: it does, but does not introduce itself as nodes of this version do.
        """
        nonce = _text(_told(line), "nonce")
        seal = Seal(_key(self._secret, self._challenge, nonce), own="0", other="node")
        said = seal.opened(line)
        kinds = {"index": int, "nodes": int, "processes": int, "spec": str}
        kinds |= {"least": int, "generation": int, "runs": str, "options": str}
        kinds |= {"launcher": str, "version": str}
        if {key: type(value) for key, value in said.items()} != kinds:
            raise OtherVersion(seal)
        return JoinRequest(**said), seal


def answered(line: bytes, own: JoinRequest, secret: bytes) -> tuple[bytes, Seal]:
    """The answer of a node to node 0's challenge, and the seal for later messages.

    Raises:
        Unauthenticated: it is not a challenge.
    """
    challenge = _text(_told(line), "challenge")
    nonce = secrets.token_hex(_TOKEN_BYTES)
    seal = Seal(_key(secret, challenge, nonce), own="node", other="0")
    return seal.sealed(asdict(own), nonce=nonce), seal


def _key(secret: bytes, challenge: str, nonce: str) -> bytes:
    return hmac.digest(secret, b"\n".join([_PURPOSE, challenge.encode(), nonce.encode()]), "sha256")


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _told(line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Unauthenticated("no JSON") from error
    if not isinstance(message, dict):
        raise Unauthenticated("no message")
    return message


def _text(message: dict[str, Any], name: str) -> str:
    value = message.get(name)
    if not isinstance(value, str) or not value.isascii():
        raise Unauthenticated(f"no {name}")
    return value
